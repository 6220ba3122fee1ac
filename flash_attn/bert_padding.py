"""Moves tokens between padded (batch, seqlen, ...) and packed (total, ...) tensors, for variable-length attention.

The names, the argument order and the five results of `unpad_input` are those that model code imports.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from flash_attn._arguments import as_int
from flash_attn._plain import is_plain

__all__ = ["index_first_axis", "index_put_first_axis", "pad_input", "unpad_input"]


def __getattr__(name: str) -> Any:
    """einops' functions of which FlashAttention-2's module holds the names: verl and OpenRLHF import them from here."""
    if name not in ("rearrange", "repeat"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import einops
    except ImportError as error:
        raise AttributeError(f"{__name__}.{name} is einops.{name}, and einops can't be imported: {error}") from error
    return getattr(einops, name)


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Selects rows of the first dimension.

    Parameters
    ----------
    input : Tensor, (rows, ...)
        Any dtype; gradients flow to it.
    indices : Tensor, (num_selected,), int32 or int64
        Row numbers. They may repeat.

    Returns
    -------
    Tensor, (num_selected, ...)

    Raises
    ------
    TypeError, ValueError
        If a type, a shape, a dtype, a device, a size or, on the CPU, an index is wrong.
    """
    _check("input", input, 1)
    _check_indices(indices, "input", input)
    _check_rows(indices, input.shape[0], "input's")
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Writes rows into a tensor of zeros: what `index_first_axis` took out goes back to its place.

    Parameters
    ----------
    values : Tensor, (num_selected, ...)
        Gradients flow to it.
    indices : Tensor, (num_selected,), int32 or int64
        Where each row goes; no number may occur twice.
    first_axis_dim : int
        Rows of the result.

    Returns
    -------
    Tensor, (first_axis_dim, ...)

    Raises
    ------
    TypeError, ValueError
        If a type, a shape, a dtype, a device, a size or, on the CPU, an index is wrong.
    """
    return _put_rows("values", values, indices, _size("first_axis_dim", first_axis_dim))


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Packs the tokens that a mask keeps.

    It waits for the device, since the number of tokens and the longest length are host values.

    Parameters
    ----------
    hidden_states : Tensor, (batch, seqlen, ...)
        Gradients flow to it.
    attention_mask : Tensor, (batch, seqlen), any dtype
        Nonzero where a token is used.
    unused_mask : Tensor, (batch, seqlen), any dtype, optional
        Nonzero where a token is allotted but unused: it is packed too, and not counted in `seqused`.

    Returns
    -------
    hidden_states : Tensor, (total, ...)
        The tokens of both masks, sequence by sequence.
    indices : Tensor, (total,), int64
        Their numbers in the flattened (batch * seqlen); `pad_input` takes them.
    cu_seqlens : Tensor, (batch + 1,), int32
        Where each sequence starts.
    max_seqlen_in_batch : int
        Most packed tokens of a sequence.
    seqused : Tensor, (batch,), int32
        Tokens of `attention_mask` in each sequence.

    Raises
    ------
    TypeError, ValueError
        If a type, a shape, a dtype or a device is wrong.
    """
    _check("hidden_states", hidden_states, 2)
    _check_mask("attention_mask", attention_mask, hidden_states)
    kept = attention_mask != 0
    used = kept.sum(dim=-1, dtype=torch.int32)
    lengths = used
    if unused_mask is not None:
        _check_mask("unused_mask", unused_mask, hidden_states)
        kept = kept | (unused_mask != 0)
        lengths = kept.sum(dim=-1, dtype=torch.int32)
    indices = torch.nonzero(kept.flatten(), as_tuple=False).flatten()
    max_seqlen_in_batch = int(lengths.max()) if lengths.numel() else 0
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    packed = hidden_states.flatten(0, 1).index_select(0, indices)
    return packed, indices, cu_seqlens, max_seqlen_in_batch, used


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Puts packed tokens back to their places and zeros everywhere else.

    Parameters
    ----------
    hidden_states : Tensor, (total, ...)
        Gradients flow to it.
    indices : Tensor, (total,), int32 or int64
        As `unpad_input` returns them.
    batch, seqlen : int
        Size of the padded tensor.

    Returns
    -------
    Tensor, (batch, seqlen, ...)

    Raises
    ------
    TypeError, ValueError
        If a type, a shape, a dtype, a device, a size or, on the CPU, an index is wrong.
    """
    batch, seqlen = _size("batch", batch), _size("seqlen", seqlen)
    return _put_rows("hidden_states", hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))


def _put_rows(name: str, rows: Tensor, indices: Tensor, num_rows: int) -> Tensor:
    _check(name, rows, 1)
    _check_indices(indices, name, rows)
    if indices.shape[0] != rows.shape[0]:
        raise ValueError(f"indices must have one element per row of {name}, {rows.shape[0]}, got {indices.shape[0]}")
    _check_rows(indices, num_rows, "the result's")
    # index_copy keeps no copy of the zeros for the backward pass, unlike an assignment through indices.
    return rows.new_zeros((num_rows, *rows.shape[1:])).index_copy(0, indices.long(), rows)


def _check(name: str, tensor: Tensor, least_rank: int) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.ndim < least_rank:
        raise ValueError(f"{name} must have at least {least_rank} dimensions, got shape {tuple(tensor.shape)}")


def _size(name: str, value: Any) -> int:
    """A size as torch takes it: also an integer tensor of one element, which it reads."""
    if isinstance(value, Tensor):
        dtype = value.dtype
        if value.numel() != 1 or value.is_meta or dtype.is_floating_point or dtype.is_complex or dtype is torch.bool:
            raise TypeError(f"{name} must be an int or an integer tensor of one element, got {value!r}")
        value = operator.index(value)
    value = as_int(name, value)
    if not torch.compiler.is_compiling() and not 0 <= value < 2**63:
        raise ValueError(f"{name} must be at least 0 and below 2**63, got {value}")
    return value


def _check_rows(indices: Tensor, num_rows: int, whose: str) -> None:
    """On the CPU alone, where torch looks at each index too."""
    if not is_plain(indices) or indices.device.type != "cpu" or not indices.numel():
        return
    low, high = indices.min().item(), indices.max().item()
    if low < 0 or high >= num_rows:
        raise ValueError(
            f"indices must be at least 0 and below {whose} {num_rows} rows, got {low if low < 0 else high}"
        )


def _check_indices(indices: Tensor, name: str, rows: Tensor) -> None:
    _check("indices", indices, 1)
    if indices.device != rows.device:
        raise ValueError(f"indices must be on {name}'s device {rows.device}, got {indices.device}")
    if indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"indices must have dtype int32 or int64, got {indices.dtype}")
    if indices.ndim != 1:
        raise ValueError(f"indices must have one dimension, got shape {tuple(indices.shape)}")


def _check_mask(name: str, mask: Tensor, hidden_states: Tensor) -> None:
    _check(name, mask, 2)
    if mask.device != hidden_states.device:
        raise ValueError(f"{name} must be on hidden_states' device {hidden_states.device}, got {mask.device}")
    if tuple(mask.shape) != tuple(hidden_states.shape[:2]):
        raise ValueError(
            f"{name} must have the shape (batch, seqlen) = {tuple(hidden_states.shape[:2])}, got {tuple(mask.shape)}"
        )
