"""Checks of single arguments. Each raises with the argument's public name, the rule and the value received."""

from __future__ import annotations

import numbers
import operator
from typing import Any

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# 576/512 is what multi-head latent attention has where queries and keys are compressed (DeepSeek-V2, arXiv:2405.04434).
MAX_HEAD_DIM = 576
MAX_HEAD_DIM_V = 512
MAX_SPLITS = 256
LARGEST_SIZE = 2**31 - 1
# A window side of this size or more is infinite: no sequence is that long, and sums with it must not
# overflow.
_INFINITE_WINDOW = LARGEST_SIZE
# Kernels and torch's products take factors as float32: what isn't one becomes infinite there, or a softcap 0.
_LARGEST_FLOAT32 = torch.finfo(torch.float32).max
_SMALLEST_FLOAT32 = torch.finfo(torch.float32).tiny
_INF = float("inf")


def require_tensor(name: str, value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def require_device(name: str, tensor: torch.Tensor, device: torch.device, whose: str = "q's") -> None:
    if tensor.device != device:
        raise ValueError(f"{name} must be on {whose} device {device}, got {tensor.device}")


def require_float_dtype(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} must have dtype float16, bfloat16, float32 or float64, got {tensor.dtype}")


def require_dtype(name: str, tensor: torch.Tensor, dtype: torch.dtype, whose: str = "") -> None:
    if tensor.dtype != dtype:
        raise ValueError(f"{name} must have {whose}dtype {dtype}, got {tensor.dtype}")


def require_rank(name: str, tensor: torch.Tensor, layout: str) -> None:
    """`layout` names the dimensions, as in "(batch, seqlen_q, num_heads, head_dim)"."""
    if tensor.ndim != layout.count(",") + 1:
        raise ValueError(f"{name} must have the shape {layout}, got {tuple(tensor.shape)}")


def require_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...], layout: str) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have the shape {layout} = {shape}, got {tuple(tensor.shape)}")


def require_writable_rows(name: str, tensor: torch.Tensor, shape: torch.Size) -> None:
    """Of a tensor that receives results."""
    strides = tensor.stride()
    if shape[-1] > 1 and strides[-1] != 1:
        raise ValueError(f"{name} must have stride 1 in its last dimension, got stride {strides}")
    require_no_overlap(name, strides, shape)
    require_no_negative_view(name, tensor)


def require_no_overlap(name: str, strides: tuple[int, ...], shape: torch.Size) -> None:
    """Of a tensor that is written."""
    if (
        0 in strides
        and 0 not in shape
        and any(stride == 0 and size > 1 for stride, size in zip(strides, shape, strict=True))
    ):
        raise ValueError(f"{name} must not overlap itself, got stride {strides} for shape {tuple(shape)}")


def require_no_negative_view(name: str, tensor: torch.Tensor) -> None:
    """Of a tensor that an op writes: it would get a copy. torch.compile can't trace the question, and raises itself."""
    if not torch.compiler.is_compiling() and tensor.is_neg():
        raise ValueError(f"{name} must not be a view of negated memory (torch.resolve_neg), got is_neg() True")


def require_page_size(name: str, shape: torch.Size) -> None:
    if shape[1] < 1:
        raise ValueError(f"{name} must have a page_size of at least 1, got shape {tuple(shape)}")


def require_strided(name: str, tensor: torch.Tensor) -> None:
    if tensor.layout is not torch.strided:
        raise ValueError(f"{name} must be a strided tensor, got layout {tensor.layout}")
    if tensor.is_nested:
        raise ValueError(f"{name} must not be a nested tensor; pass packed sequences with cu_seqlens")


def require_bool(name: str, value: Any) -> None:
    if value is not True and value is not False:
        raise TypeError(f"{name} must be a bool, got {value!r}")


def as_int(name: str, value: Any) -> int:
    """An int from anything that is one without a read from a device; bools and tensors are not."""
    if type(value) is int:
        return value
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value
    if isinstance(value, (bool, float, str, torch.Tensor)) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, got {value!r}")
    try:
        return operator.index(value)
    except TypeError as error:  # of an array
        raise TypeError(f"{name} must be an int, got {value!r}") from error


def size_of(name: str, value: Any, least: int, largest: int = LARGEST_SIZE) -> int:
    value = as_int(name, value)
    if not least <= value <= largest:
        raise ValueError(f"{name} must be in [{least}, {largest}], got {value}")
    return value


def as_float(name: str, value: Any) -> float:
    if type(value) is not float:
        value = _converted_float(name, value)
    # In two steps, since torch.compile fails to compare a NaN with the second pair.
    if not -_INF < value < _INF or not -_LARGEST_FLOAT32 <= value <= _LARGEST_FLOAT32:
        raise ValueError(f"{name} must be finite as a float32, got {value!r}")
    return value


def _converted_float(name: str, value: Any) -> float:
    """Of NumPy's scalars too; a tensor would have to be read."""
    if isinstance(value, (float, torch.SymFloat, torch.SymInt)):
        return value
    # torch.compile can't ask an int for attributes, and takes NumPy's scalars for arrays.
    if isinstance(value, (bool, str, torch.Tensor)) or not (
        isinstance(value, int)
        or (hasattr(value, "__float__") and (torch.compiler.is_compiling() or isinstance(value, numbers.Real)))
    ):
        raise TypeError(f"{name} must be a float, got {value!r}")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{name} must be finite as a float32, got {value!r}") from error


def int32_vector(
    name: str, tensor: Any, device: torch.device, size: int | None, layout: str, whose: str = "q's"
) -> int:
    """Checks int32 metadata of one dimension, such as cu_seqlens; returns its size. Its values are never read here."""
    if isinstance(tensor, torch.Tensor) and tensor.dtype is torch.int32 and tensor.device == device:
        shape = tensor.shape
        if len(shape) == 1 and (size is None or shape[0] == size) and tensor.is_contiguous():
            return shape[0]
    require_tensor(name, tensor)
    require_device(name, tensor, device, whose)
    require_dtype(name, tensor, torch.int32)
    if tensor.ndim != 1 or (size is not None and tensor.shape[0] != size):
        expected = layout if size is None else f"{layout} = ({size},)"
        raise ValueError(f"{name} must have the shape {expected}, got {tuple(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got stride {tensor.stride()}")
    return tensor.shape[0]


def block_table_of(block_table: Any, device: torch.device, batch: int | None) -> int:
    """Checks the table and returns how many pages an entry can have."""
    if isinstance(block_table, torch.Tensor) and block_table.dtype is torch.int32 and block_table.device == device:
        shape = block_table.shape
        if len(shape) == 2 and (batch is None or shape[0] == batch) and (shape[1] <= 1 or block_table.stride(1) == 1):
            return shape[1]
    require_tensor("block_table", block_table)
    require_device("block_table", block_table, device)
    require_dtype("block_table", block_table, torch.int32)
    require_rank("block_table", block_table, "(batch, max_pages)")
    if batch is not None and block_table.shape[0] != batch:
        raise ValueError(
            f"block_table must have one row for each of the {batch} batch entries, got {tuple(block_table.shape)}"
        )
    if block_table.shape[1] > 1 and block_table.stride(1) != 1:
        raise ValueError(f"block_table must have rows of stride 1, got stride {block_table.stride()}")
    return block_table.shape[1]


def scheduler_metadata_of(metadata: Any, device: torch.device, batch: int) -> None:
    size = int32_vector("scheduler_metadata", metadata, device, None, "(num_elements,)")
    if size < 1 + batch:
        raise ValueError(f"scheduler_metadata must have at least 1 + batch = {1 + batch} elements, got {size}")


def window_of(window_size: Any, causal: Any) -> tuple[int, int]:
    """(left, right) with -1 for an infinite side. Causal is right == 0, whatever right was given."""
    if type(window_size) is tuple and len(window_size) == 2 and (causal is False or causal is True):
        left, right = window_size
        if type(left) is int and type(right) is int and left < _INFINITE_WINDOW and right < _INFINITE_WINDOW:
            return (left if left >= 0 else -1), (0 if causal else right if right >= 0 else -1)
    require_bool("causal", causal)
    if isinstance(window_size, torch.Tensor):
        window_size = _window_values(window_size)
    if not isinstance(window_size, (tuple, list)):
        raise TypeError(f"window_size must be a pair (left, right), got {window_size!r}")
    if len(window_size) != 2:
        raise ValueError(f"window_size must have two elements (left, right), got {window_size!r}")
    left, right = _window_side(window_size[0]), _window_side(window_size[1])
    return left, 0 if causal else right


def _window_side(side: Any) -> int:
    if side is None:
        return -1
    side = as_int("window_size", side)
    return side if 0 <= side < _INFINITE_WINDOW else -1


def _window_values(window: torch.Tensor) -> list[int]:
    if window.device.type != "cpu" or torch.compiler.is_compiling():
        raise ValueError(
            f"window_size must be a pair of ints, or a CPU tensor outside torch.compile "
            f"(its values are needed on the host), got a tensor on {window.device}"
        )
    if window.dtype.is_floating_point or window.dtype.is_complex or window.dtype == torch.bool:
        raise TypeError(f"window_size must have an integer dtype, got {window.dtype}")
    if tuple(window.shape) != (2,):
        raise ValueError(f"window_size must have two elements (left, right), got shape {tuple(window.shape)}")
    return window.tolist()


def batch_size_of(q: torch.Tensor, cu_seqlens_q: torch.Tensor | None) -> int:
    return q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1


def max_seqlen_of(name: str, value: Any) -> int:
    """The longest sequence as the host knows it; 0 when it does not, so that no tensor is waited for."""
    if value is None:
        return 0
    if isinstance(value, torch.Tensor):
        if value.numel() != 1 or value.dtype.is_floating_point or value.dtype.is_complex:
            raise ValueError(
                f"{name} must be an int, None or an integer tensor of one element, "
                f"got shape {tuple(value.shape)}, dtype {value.dtype}"
            )
        if torch.compiler.is_compiling() or type(value) is not torch.Tensor or value.device.type != "cpu":
            return 0
        value = value.item()
    value = as_int(name, value)
    if _is_known(value < 0):
        raise ValueError(f"{name} must be at least 0, got {value}")
    if _is_known(value > LARGEST_SIZE):
        raise ValueError(f"{name} must be at most {LARGEST_SIZE}, got {value}")
    return value


def _is_known(condition: bool | torch.SymBool) -> bool:
    """False where torch.compile can't tell, as of a tensor's .item(): no result depends on a longest length."""
    if type(condition) is bool and not torch.compiler.is_compiling():
        return condition
    # Here, since it loads sympy.
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(condition)


def options_of(
    softcap: Any,
    dropout_p: Any,
    num_splits: Any,
    pack_gqa: Any,
    deterministic: Any,
    return_attn_probs: Any,
    return_softmax_lse: Any,
) -> tuple[float, float, int]:
    """Checks the options that describe no tensor and returns the numbers: one condition for what they mostly are."""
    if not (
        (type(softcap) is float and type(dropout_p) is float and type(num_splits) is int)
        and (
            (softcap == 0.0 and 0.0 <= dropout_p < 1.0)
            or (_SMALLEST_FLOAT32 <= softcap <= _LARGEST_FLOAT32 and dropout_p == 0.0)
        )
        and 0 <= num_splits <= MAX_SPLITS
        and (pack_gqa is None or pack_gqa is False or pack_gqa is True)
        and (deterministic is False or deterministic is True)
        and (return_attn_probs is False or return_attn_probs is True)
        and (return_softmax_lse is False or return_softmax_lse is True)
    ):
        softcap = softcap_of(softcap)
        dropout_p = dropout_of(dropout_p, softcap)
        num_splits = num_splits_of(num_splits)
        pack_gqa_of(pack_gqa)
        require_bool("deterministic", deterministic)
        require_bool("return_attn_probs", return_attn_probs)
        require_bool("return_softmax_lse", return_softmax_lse)
    return softcap, dropout_p, num_splits


def softcap_of(softcap: Any) -> float:
    softcap = as_float("softcap", softcap)
    if softcap < 0:
        raise ValueError(f"softcap must be at least 0 (0 switches it off), got {softcap}")
    if 0 < softcap < _SMALLEST_FLOAT32:
        raise ValueError(f"softcap must be 0 or at least {_SMALLEST_FLOAT32}, float32's smallest, got {softcap}")
    return softcap


def dropout_of(dropout_p: Any, softcap: float) -> float:
    dropout_p = as_float("dropout_p", dropout_p)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if dropout_p > 0 and softcap > 0:
        raise NotImplementedError(f"softcap must be 0 when dropout_p > 0, got {softcap} and {dropout_p}")
    return dropout_p


def num_splits_of(num_splits: Any) -> int:
    num_splits = as_int("num_splits", num_splits)
    if not 0 <= num_splits <= MAX_SPLITS:
        raise ValueError(f"num_splits must be in [0, {MAX_SPLITS}] (0 chooses), got {num_splits}")
    return num_splits


def pack_gqa_of(pack_gqa: Any) -> bool | None:
    if pack_gqa is not None and pack_gqa is not True and pack_gqa is not False:
        raise TypeError(f"pack_gqa must be None, True or False, got {pack_gqa!r}")
    return pack_gqa


def alibi_slopes_of(slopes: Any, device: torch.device, batch: int, num_heads: int) -> None:
    require_tensor("alibi_slopes", slopes)
    require_strided("alibi_slopes", slopes)
    require_device("alibi_slopes", slopes, device)
    require_dtype("alibi_slopes", slopes, torch.float32)
    shape = tuple(slopes.shape)
    if shape != (num_heads,) and shape != (batch, num_heads):  # torch.compile finds no symbolic sizes with `in`
        raise ValueError(
            f"alibi_slopes must have the shape (num_heads,) = ({num_heads},) or "
            f"(batch, num_heads) = ({batch}, {num_heads}), got {shape}"
        )
    if slopes.shape[-1] > 1 and slopes.stride(-1) != 1:
        raise ValueError(f"alibi_slopes must have stride 1 in its last dimension, got {slopes.stride()}")
    if slopes.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError("alibi_slopes must not require grad (it has no gradient), got requires_grad=True")


def s_aux_of(s_aux: Any, device: torch.device, num_heads: int) -> None:
    require_tensor("s_aux", s_aux)
    require_strided("s_aux", s_aux)
    require_device("s_aux", s_aux, device)
    require_float_dtype("s_aux", s_aux)
    require_shape("s_aux", s_aux, (num_heads,), "(num_heads,)")


def out_of(out: Any, q: torch.Tensor, shape_q: torch.Size, head_dim_v: int, needs_grad: bool) -> None:
    """`out` is written in place, so nothing that it depends on may be waiting for a gradient."""
    if not isinstance(out, torch.Tensor):
        require_tensor("out", out)
    shape = out.shape
    if out.device != q.device or out.dtype != q.dtype or shape != shape_q or head_dim_v != shape_q[-1]:
        require_device("out", out, q.device)
        require_dtype("out", out, q.dtype, "q's ")
        require_shape("out", out, (*shape_q[:-1], head_dim_v), "q's with head_dim_v")
    require_writable_rows("out", out, shape)
    if needs_grad or (out.requires_grad and torch.is_grad_enabled()):
        raise ValueError("out must not be given when a gradient is needed; got tensors with requires_grad=True")


def generator_of(name: str, generator: Any, device: torch.device) -> None:
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"{name} must be a torch.Generator or None, got {type(generator).__name__}")
    # torch.Generator("cuda") has no index.
    if generator.device.type != device.type or generator.device.index not in (None, device.index):
        raise ValueError(f"{name} must be on q's device {device}, got {generator.device}")


def rng_state_of(rng_state: Any, device: torch.device) -> None:
    require_tensor("rng_state", rng_state)
    require_device("rng_state", rng_state, device)
    require_dtype("rng_state", rng_state, torch.int64)
    require_shape("rng_state", rng_state, (2,), "(2,)")
    if not rng_state.is_contiguous():
        raise ValueError(f"rng_state must be contiguous, got stride {rng_state.stride()}")
