"""Rotary position embeddings (Su et al., "RoFormer", arXiv:2104.09864), under the names of FlashAttention-2's module.

They are tensor operations of torch, on any device, computed in float32 or above. Gradients flow through them, and
torch.compile fuses them. The pair of columns (a, b) of a token at position p becomes

    a cos[p] - b sin[p],  a sin[p] + b cos[p]

Pairs are (0, 1), (2, 3), ... if `interleaved`, as in GPT-J; else (0, rotary_dim / 2), (1, rotary_dim / 2 + 1), ..., as
in GPT-NeoX.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flash_attn import _arguments as check
from flash_attn._plain import is_plain
from flash_attn.backends._rotary import rotate_columns

# By which tables grow, so that generation doesn't make new ones for each token.
_ROWS_AT_A_TIME = 512

__all__ = [
    "RotaryEmbedding",
    "apply_rotary",
    "apply_rotary_emb",
    "apply_rotary_emb_func",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qkv_",
]


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """Rotates the first rotary_dim columns of each head of x by its token's position.

    Parameters
    ----------
    x : Tensor, (batch, seqlen, num_heads, head_dim), or (total, num_heads, head_dim) with cu_seqlens
        float16, bfloat16, float32 or float64, any strides.
    cos, sin : Tensor, (seqlen_rotary, rotary_dim / 2)
        Of any of these dtypes. rotary_dim is at most head_dim; the columns after it stay as they are.
    seqlen_offsets : int, or Tensor, (batch,), int32 or int64
        The position of each sequence's first token.
    cu_seqlens : Tensor, (batch + 1,), int32, optional
        Where each packed sequence begins, and where the last one ends. Tokens of none stay as they are.
    max_seqlen : int, optional
        The longest packed sequence: with an int as seqlen_offsets, the tables must reach its end. Tokens beyond it are
        rotated all the same.
    interleaved : bool
        Which columns are a pair; see above.
    inplace : bool
        Write to x, and return it: where x requires a gradient, as a new tensor in the same memory, through which alone
        the gradient comes back. x may then be a view or a leaf, as with FlashAttention-2; who needs its former values
        for another gradient gets torch's error.
    conjugate : bool
        Rotate the other way, which undoes the rotation.

    Returns
    -------
    Tensor, x's shape and dtype

    Raises
    ------
    TypeError, ValueError
        If an argument's type, shape, dtype or device is wrong, or a position lies outside of the tables. Positions that
        come from tensors are looked at on the CPU alone: elsewhere a token at such a position stays as it is.
    """
    tables = _checked_tables(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen)
    for name, value in (("interleaved", interleaved), ("inplace", inplace), ("conjugate", conjugate)):
        check.require_bool(name, value)
    if conjugate:
        tables = (tables[0], -tables[1])
    return _rotated(x, None, interleaved, inplace, tables)


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """`apply_rotary` in the argument order of FlashAttention-2's layer. Parameters, results and errors are the same."""
    return apply_rotary(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, interleaved, inplace)


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Rotates the queries and keys of qkv in place.

    Parameters
    ----------
    qkv : Tensor, (batch, seqlen, 3, num_heads, head_dim), or with num_heads_q
            (batch, seqlen, num_heads_q + 2 * num_heads_k, head_dim)
    cos, sin, interleaved, seqlen_offsets
        As in `apply_rotary`.
    cos_k, sin_k : Tensor, optional
        Tables for the keys, where theirs are others.
    num_heads_q : int, optional
        Heads of queries in a qkv of four dimensions; those of keys and of values share the rest.

    Returns
    -------
    Tensor
        qkv itself.

    Raises
    ------
    TypeError, ValueError
        As in `apply_rotary`, and for a qkv of another shape.
    """
    check.require_tensor("qkv", qkv)
    if num_heads_q is None:
        if qkv.ndim != 5 or qkv.shape[2] != 3:
            raise ValueError(f"qkv must have the shape (batch, seqlen, 3, num_heads, head_dim), got {tuple(qkv.shape)}")
        places: _Places = (0, 1)
    else:
        num_heads_q = check.as_int("num_heads_q", num_heads_q)
        check.require_rank("qkv", qkv, "(batch, seqlen, num_heads_q + 2 * num_heads_k, head_dim)")
        num_heads_k, rest = divmod(qkv.shape[2] - num_heads_q, 2)
        if num_heads_q < 0 or num_heads_k < 0 or rest:
            raise ValueError(f"num_heads_q must leave an even number of qkv's {qkv.shape[2]} heads, got {num_heads_q}")
        places = (slice(0, num_heads_q), slice(num_heads_q, num_heads_q + num_heads_k))
    check.require_bool("interleaved", interleaved)
    keys = (cos if cos_k is None else cos_k, sin if sin_k is None else sin_k)
    tables = [
        table
        for part, (part_cos, part_sin) in zip(_parts_of(qkv, places), ((cos, sin), keys), strict=True)
        for table in _checked_tables(part, part_cos, part_sin, seqlen_offsets)
    ]
    return _rotated(qkv, places, interleaved, True, tables)


def apply_rotary_emb_kv_(
    kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: int | Tensor = 0
) -> Tensor:
    """Rotates the keys of kv, (batch, seqlen, 2, num_heads_k, head_dim), in place and returns kv.

    Parameters and errors are those of `apply_rotary`.
    """
    check.require_tensor("kv", kv)
    if kv.ndim != 5 or kv.shape[2] != 2:
        raise ValueError(f"kv must have the shape (batch, seqlen, 2, num_heads_k, head_dim), got {tuple(kv.shape)}")
    check.require_bool("interleaved", interleaved)
    places = (0,)
    tables = _checked_tables(_parts_of(kv, places)[0], cos, sin, seqlen_offsets)
    return _rotated(kv, places, interleaved, True, tables)


class RotaryEmbedding(torch.nn.Module):
    """Rotates queries and keys in place, with tables that grow with the longest sequence seen.

    Parameters
    ----------
    dim : int
        rotary_dim, even.
    base : float
        The angle of pair i at position p is p * base ** (-2 i / dim).
    interleaved : bool
        As in `apply_rotary`.
    scale_base : float, optional
        Also scale by position, as XPos does (Sun et al., "A Length-Extrapolatable Transformer", arXiv:2212.10554):
        queries grow and keys shrink by ((2 i / dim + 0.4) / 1.4) ** ((p - seqlen // 2) / scale_base), where seqlen is
        the tables' length.
    device : torch.device, optional
        Where the frequencies lie.
    pos_idx_in_fp32 : bool
        For older callers: positions are float32 always, so False raises NotImplementedError.
    """

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: Any = None,
        *,
        pos_idx_in_fp32: bool = True,
    ) -> None:
        super().__init__()
        if check.as_int("dim", dim) % 2 or dim <= 0:
            raise ValueError(f"dim must be positive and even, got {dim}")
        check.require_bool("interleaved", interleaved)
        check.require_bool("pos_idx_in_fp32", pos_idx_in_fp32)
        if not pos_idx_in_fp32:
            raise NotImplementedError("pos_idx_in_fp32=False is not supported: positions are float32")
        self.dim = dim
        self.base = check.as_float("base", base)
        self.interleaved = interleaved
        self.scale_base = None if scale_base is None else check.as_float("scale_base", scale_base)
        if isinstance(device, bool):
            raise TypeError(f"device must be a torch.device, got {device}")
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        self.register_buffer("scale", None if scale_base is None else self._compute_scale(device), persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None
        self._cos_k_cached: Tensor | None = None
        self._sin_k_cached: Tensor | None = None

    def _fractions(self, device: Any) -> Tensor:
        """2 i / dim of each pair i."""
        return torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim

    def _compute_scale(self, device: Any = None) -> Tensor:
        return (self._fractions(device) + 0.4) / 1.4

    def _compute_inv_freq(self, device: Any = None) -> Tensor:
        # In this order: base ** -fraction differs in the last place, and the angle of a far position by 0.004.
        return 1.0 / self.base ** self._fractions(device)

    def _update_cos_sin_cache(self, seqlen: int, device: Any = None, dtype: torch.dtype | None = None) -> None:
        """Makes tables of at least `seqlen` positions, unless those at hand will do."""
        cached = self._cos_cached
        if (
            cached is not None
            and seqlen <= self._seq_len_cached
            and (device is None or cached.device == torch.device(device))
            and (dtype is None or cached.dtype == dtype)
            # Tables made under inference_mode can't be saved for a backward pass.
            and not (cached.is_inference() and not torch.is_inference_mode_enabled())
        ):
            return
        if self.scale_base is None:  # XPos depends on the length
            seqlen = (seqlen + _ROWS_AT_A_TIME - 1) // _ROWS_AT_A_TIME * _ROWS_AT_A_TIME
        positions = torch.arange(seqlen, device=device, dtype=torch.float32)
        # A model that was cast to 16 bits has rounded its buffers, and one made on the meta device has none.
        kept = self.inv_freq.dtype == torch.float32 and not self.inv_freq.is_meta
        inv_freq = self.inv_freq.to(positions.device) if kept else self._compute_inv_freq(positions.device)
        angles = torch.outer(positions, inv_freq)
        cos, sin = angles.cos(), angles.sin()
        self._seq_len_cached = seqlen
        if self.scale_base is None:
            self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)
            return
        power = (positions - seqlen // 2) / self.scale_base
        scale = self._compute_scale(positions.device) ** power[:, None]
        self._cos_cached, self._sin_cached = (cos * scale).to(dtype), (sin * scale).to(dtype)
        self._cos_k_cached, self._sin_k_cached = (cos / scale).to(dtype), (sin / scale).to(dtype)

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Rotates in place.

        Parameters
        ----------
        qkv : Tensor
            As in `apply_rotary_emb_qkv_`; with kv the queries alone, (batch, seqlen, num_heads, head_dim).
        kv : Tensor, (batch, seqlen, 2, num_heads_k, head_dim), optional
        seqlen_offset : int, or Tensor, (batch,), int32 or int64
            The position of each sequence's first token.
        max_seqlen : int, optional
            How many positions the tables must have. Where seqlen_offset is a tensor, whose values are not read, it is
            needed once; without it the tables stay as long as they are.
        num_heads_q : int, optional
            As in `apply_rotary_emb_qkv_`.

        Returns
        -------
        Tensor or (Tensor, Tensor)
            qkv itself; with kv both.

        Raises
        ------
        TypeError, ValueError
            As in `apply_rotary`; if max_seqlen is missing; for num_heads_q with kv.
        """
        check.require_tensor("qkv", qkv)
        if kv is not None and num_heads_q is not None:
            raise ValueError(f"num_heads_q must not be given with kv, got {num_heads_q}")
        if max_seqlen is not None:
            length = check.as_int("max_seqlen", max_seqlen)
        elif isinstance(seqlen_offset, Tensor):
            if self._cos_cached is None:
                raise ValueError("max_seqlen must be given with a Tensor as the first seqlen_offset, got None")
            length = self._seq_len_cached
        else:
            length = qkv.shape[1] + check.as_int("seqlen_offset", seqlen_offset)
        self._update_cos_sin_cache(length, device=qkv.device, dtype=qkv.dtype)
        cos, sin = self._cos_cached, self._sin_cached
        cos_k, sin_k = (cos, sin) if self.scale_base is None else (self._cos_k_cached, self._sin_k_cached)
        if kv is None:
            return apply_rotary_emb_qkv_(qkv, cos, sin, cos_k, sin_k, self.interleaved, seqlen_offset, num_heads_q)
        q = apply_rotary_emb(qkv, cos, sin, self.interleaved, inplace=True, seqlen_offsets=seqlen_offset)
        return q, apply_rotary_emb_kv_(kv, cos_k, sin_k, self.interleaved, seqlen_offset)


# ---- The rotation, of a tensor or of some parts of it ------------------------------------------------------------

# Indices along the third dimension; None for the tensor itself.
_Places = tuple[int | slice, ...] | None


def _parts_of(x: Tensor, places: _Places) -> tuple[Tensor, ...]:
    return (x,) if places is None else tuple(x[:, :, place] for place in places)


def _rotated(x: Tensor, places: _Places, interleaved: bool, inplace: bool, tables: Sequence[Tensor]) -> Tensor:
    """`tables`: cos and sin of the tokens of each part."""
    if inplace:
        check.require_no_overlap("x", x.stride(), x.shape)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Rotation.apply(x, places, interleaved, inplace, *tables)
    return _rotate_parts(x, places, interleaved, inplace, tables)


def _rotate_parts(x: Tensor, places: _Places, interleaved: bool, inplace: bool, tables: Sequence[Tensor]) -> Tensor:
    out = x if inplace else x.clone()
    for part, cos, sin in zip(_parts_of(out, places), tables[::2], tables[1::2], strict=True):
        rotate_columns(part, part, cos, sin, interleaved)
    return out


class _Rotation(torch.autograd.Function):
    """Its gradient is the rotation the other way. Tables get none."""

    @staticmethod
    def forward(x: Tensor, places: _Places, interleaved: bool, inplace: bool, *tables: Tensor) -> Tensor:
        return _rotate_parts(x, places, interleaved, inplace, tables)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.places, ctx.interleaved, _, *tables = inputs
        ctx.save_for_backward(*tables)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        tables = [-table if index % 2 else table for index, table in enumerate(ctx.saved_tensors)]
        return (_rotated(dout, ctx.places, ctx.interleaved, False, tables), *[None] * (3 + len(tables)))


# ---- Checks, and each token's row of the tables ------------------------------------------------------------------


def _check(x: Any, cos: Any, sin: Any, seqlen_offsets: Any, cu_seqlens: Any, max_seqlen: Any) -> None:
    check.require_tensor("x", x)
    check.require_float_dtype("x", x)
    packed = cu_seqlens is not None
    check.require_rank("x", x, "(total, num_heads, head_dim)" if packed else "(batch, seqlen, num_heads, head_dim)")
    for name, table in (("cos", cos), ("sin", sin)):
        check.require_tensor(name, table)
        check.require_device(name, table, x.device, "x's")
        check.require_float_dtype(name, table)
        check.require_rank(name, table, "(seqlen_rotary, rotary_dim / 2)")
    check.require_shape("sin", sin, tuple(cos.shape), "cos's")
    if 2 * cos.shape[1] > x.shape[-1]:
        raise ValueError(f"cos must have at most head_dim / 2 columns of {x.shape[-1]} / 2, got {cos.shape[1]}")
    batch = (
        check.int32_vector("cu_seqlens", cu_seqlens, x.device, None, "(batch + 1,)", "x's") - 1
        if packed
        else x.shape[0]
    )
    if batch < 0:
        raise ValueError("cu_seqlens must have at least one element, got none")
    longest = None if packed else x.shape[1]
    if max_seqlen is not None:
        longest = check.as_int("max_seqlen", max_seqlen)
        if not packed:
            raise ValueError(f"max_seqlen must not be given without cu_seqlens, got {max_seqlen}")
        if longest < 0:
            raise ValueError(f"max_seqlen must be at least 0, got {max_seqlen}")
    if not isinstance(seqlen_offsets, Tensor):
        offset = check.as_int("seqlen_offsets", seqlen_offsets)
        if offset < 0:
            raise ValueError(f"seqlen_offsets must be at least 0, got {offset}")
        if longest is not None and offset + longest > cos.shape[0]:
            raise ValueError(
                f"cos and sin must have rows for the positions below {offset + longest}, got {cos.shape[0]} rows"
            )
        return
    check.require_device("seqlen_offsets", seqlen_offsets, x.device, "x's")
    if seqlen_offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"seqlen_offsets must have dtype int32 or int64, got {seqlen_offsets.dtype}")
    check.require_shape("seqlen_offsets", seqlen_offsets, (batch,), "(batch,)")


def _checked_tables(
    x: Any,
    cos: Any,
    sin: Any,
    seqlen_offsets: Any,
    cu_seqlens: Any = None,
    max_seqlen: Any = None,
) -> tuple[Tensor, Tensor]:
    _check(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen)
    return _tables_of_tokens(x, cos, sin, seqlen_offsets, cu_seqlens)


def _tables_of_tokens(
    x: Tensor, cos: Tensor, sin: Tensor, seqlen_offsets: int | Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """cos and sin of each token, (..., 1, rotary_dim / 2): 1 and 0 where a token stays as it is."""
    if cu_seqlens is None and not isinstance(seqlen_offsets, Tensor):
        rows = slice(seqlen_offsets, seqlen_offsets + x.shape[1])
        return cos[rows, None], sin[rows, None]
    positions, is_used = _positions(x, seqlen_offsets, cu_seqlens)
    num_rows = cos.shape[0]
    has_row = (positions >= 0) & (positions < num_rows)
    if x.device.type == "cpu" and is_plain(x):
        outside = positions[is_used & ~has_row]
        if outside.numel():
            raise ValueError(f"cos and sin must have a row for each position, got {outside[0].item()} of {num_rows}")
    rotates = (is_used & has_row)[..., None, None]
    # A table without rows is one that no token has a row of.
    rows = positions.clamp(0, max(num_rows - 1, 0))
    if num_rows == 0:
        cos, sin = cos.new_ones((1, cos.shape[1])), sin.new_zeros((1, sin.shape[1]))
    return torch.where(rotates, cos[rows].unsqueeze(-2), 1), torch.where(rotates, sin[rows].unsqueeze(-2), 0)


def _positions(x: Tensor, seqlen_offsets: int | Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """The position of each token, (batch, seqlen) or (total,), and whether it belongs to a sequence. Reads nothing."""
    if cu_seqlens is None:
        assert isinstance(seqlen_offsets, Tensor)
        positions = seqlen_offsets.to(torch.int64)[:, None] + torch.arange(x.shape[1], device=x.device)
        return positions, torch.ones_like(positions, dtype=torch.bool)
    tokens = torch.arange(x.shape[0], device=x.device, dtype=torch.int32)
    num_entries = cu_seqlens.shape[0] - 1
    if num_entries == 0:
        return tokens, torch.zeros_like(tokens, dtype=torch.bool)
    entries = torch.searchsorted(cu_seqlens[1:], tokens, right=True)
    is_used = (entries < num_entries) & (tokens >= cu_seqlens[0])
    entries = entries.clamp(max=num_entries - 1)
    offsets = seqlen_offsets.to(torch.int64)[entries] if isinstance(seqlen_offsets, Tensor) else seqlen_offsets
    return tokens - cu_seqlens[entries] + offsets, is_used
