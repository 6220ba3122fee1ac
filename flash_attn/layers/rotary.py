"""Rotary position embeddings (Su et al., "RoFormer", arXiv:2104.09864), under the names of FlashAttention-2's module.

They are tensor operations of torch, on any device, computed in float32 or above. Gradients flow through them, and
torch.compile fuses them. The pair of columns (a, b) of a token at position p becomes

    a cos[p] - b sin[p],  a sin[p] + b cos[p]

Pairs are (0, 1), (2, 3), ... if `interleaved`, as in GPT-J; else (0, rotary_dim / 2), (1, rotary_dim / 2 + 1), ..., as
in GPT-NeoX.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flash_attn import _arguments as check
from flash_attn.layers._rotation import Names, Places, check_written, checked_tables, parts_of, rotated

# By which tables grow, so that generation doesn't make new ones for each token.
_ROWS_AT_A_TIME = 512
_KEYS: Places = (0,)

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
        Of any of these dtypes. They have no gradient, so they must not require one. rotary_dim is at most head_dim; the
        columns after it stay as they are.
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
    NotImplementedError
        If cos or sin requires grad.
    """
    tables = checked_tables(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen)
    for name, value in (("interleaved", interleaved), ("inplace", inplace), ("conjugate", conjugate)):
        check.require_bool(name, value)
    if inplace:
        check_written("x", x)
    if conjugate:
        tables = (tables[0], -tables[1])
    return rotated(x, None, interleaved, inplace, tables)


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
        qkv; where it requires a gradient a new tensor in its memory, through which alone the gradient comes back.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As in `apply_rotary`, and for a qkv of another shape.
    """
    check.require_tensor("qkv", qkv)
    check.require_strided("qkv", qkv)
    if num_heads_q is None:
        if qkv.ndim != 5 or qkv.shape[2] != 3:
            raise ValueError(f"qkv must have the shape (batch, seqlen, 3, num_heads, head_dim), got {tuple(qkv.shape)}")
        places: Places = (0, 1)
    else:
        num_heads_q = check.as_int("num_heads_q", num_heads_q)
        check.require_rank("qkv", qkv, "(batch, seqlen, num_heads_q + 2 * num_heads_k, head_dim)")
        num_heads_k, rest = divmod(qkv.shape[2] - num_heads_q, 2)
        if num_heads_q < 0 or num_heads_k < 0 or rest:
            raise ValueError(f"num_heads_q must leave an even number of qkv's {qkv.shape[2]} heads, got {num_heads_q}")
        places = (slice(0, num_heads_q), slice(num_heads_q, num_heads_q + num_heads_k))
    check.require_bool("interleaved", interleaved)
    q, k = parts_of(qkv, places)
    tables = checked_tables(q, cos, sin, seqlen_offsets, names=Names("qkv"))
    if cos_k is not None or sin_k is not None:
        keys = (cos if cos_k is None else cos_k, sin if sin_k is None else sin_k)
        names = Names("qkv", "cos" if cos_k is None else "cos_k", "sin" if sin_k is None else "sin_k")
        tables += checked_tables(k, *keys, seqlen_offsets, names=names)
    check_written("qkv", qkv)
    return rotated(qkv, places, interleaved, True, tables)


def apply_rotary_emb_kv_(
    kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: int | Tensor = 0
) -> Tensor:
    """Rotates the keys of kv, (batch, seqlen, 2, num_heads_k, head_dim), in place.

    Parameters and errors are those of `apply_rotary`, and the result is as that of `apply_rotary_emb_qkv_`.
    """
    tables = _tables_of_keys(kv, cos, sin, interleaved, seqlen_offsets)
    return rotated(kv, _KEYS, interleaved, True, tables)


def _tables_of_keys(kv: Any, cos: Any, sin: Any, interleaved: Any, seqlen_offsets: Any) -> tuple[Tensor, Tensor]:
    check.require_tensor("kv", kv)
    check.require_strided("kv", kv)
    if kv.ndim != 5 or kv.shape[2] != 2:
        raise ValueError(f"kv must have the shape (batch, seqlen, 2, num_heads_k, head_dim), got {tuple(kv.shape)}")
    check.require_bool("interleaved", interleaved)
    check_written("kv", kv)
    return checked_tables(parts_of(kv, _KEYS)[0], cos, sin, seqlen_offsets, names=Names("kv"))


def _in_inference_mode() -> bool:
    """What torch.compile traces is in no such mode, and may not ask."""
    return not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()


class RotaryEmbedding(torch.nn.Module):
    """Rotates queries and keys in place, with tables that grow with the longest sequence seen.

    A longer sequence, or another dtype, replaces the tables. A CUDA graph reads those that it was captured with: call
    once with the longest max_seqlen before.

    Parameters
    ----------
    dim : int
        rotary_dim, even.
    base : float
        The angle of pair i at position p is p * base ** (-2 i / dim). Positive.
    interleaved : bool
        As in `apply_rotary`.
    scale_base : float, optional
        Also scale by position, as XPos does (Sun et al., "A Length-Extrapolatable Transformer", arXiv:2212.10554):
        queries grow and keys shrink by ((2 i / dim + 0.4) / 1.4) ** ((p - seqlen // 2) / scale_base), where seqlen is
        the tables' length. Not 0.
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
        self.dim = check.size_of("dim", dim, 2)
        if self.dim % 2:
            raise ValueError(f"dim must be even, got {dim}")
        check.require_bool("interleaved", interleaved)
        check.require_bool("pos_idx_in_fp32", pos_idx_in_fp32)
        if not pos_idx_in_fp32:
            raise NotImplementedError("pos_idx_in_fp32=False is not supported: positions are float32")
        self.base = check.as_float("base", base)
        if self.base <= 0:
            raise ValueError(f"base must be positive, got {base}")
        self.interleaved = interleaved
        self.scale_base = None if scale_base is None else check.as_float("scale_base", scale_base)
        if self.scale_base == 0:
            raise ValueError(f"scale_base must not be 0, got {scale_base}")
        if isinstance(device, bool):
            raise TypeError(f"device must be a torch.device, got {device}")
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        self.register_buffer("scale", None if scale_base is None else self._compute_scale(device), persistent=False)
        self._seq_len_cached = 0
        self._made_for_inference = False
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None
        self._cos_k_cached: Tensor | None = None
        self._sin_k_cached: Tensor | None = None

    def _apply(self, fn: Any, recurse: bool = True) -> RotaryEmbedding:
        """Casts or moves the module. A cast to 16 bits rounds the frequencies, and the meta device has none."""
        was_meta = self.inv_freq.is_meta
        super()._apply(fn, recurse)
        if not self.inv_freq.is_meta and (was_meta or self.inv_freq.dtype != torch.float32):
            self.inv_freq = self._compute_inv_freq(self.inv_freq.device)
        return self

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
            type(cached) is Tensor  # not a FakeTensor, of a mode that has ended
            and seqlen <= self._seq_len_cached
            and (device is None or cached.device == torch.device(device))
            and (dtype is None or cached.dtype == dtype)
            # Tables made under inference_mode can't be saved for a backward pass.
            and (_in_inference_mode() or not self._made_for_inference)
        ):
            return
        if self.scale_base is None:  # XPos depends on the length
            seqlen = (seqlen + _ROWS_AT_A_TIME - 1) // _ROWS_AT_A_TIME * _ROWS_AT_A_TIME
        positions = torch.arange(seqlen, device=device, dtype=torch.float32)
        # A module may stay on the meta device while its inputs lie elsewhere.
        kept = self.inv_freq.dtype == torch.float32 and not self.inv_freq.is_meta
        inv_freq = self.inv_freq.to(positions.device) if kept else self._compute_inv_freq(positions.device)
        angles = torch.outer(positions, inv_freq)
        cos, sin = angles.cos(), angles.sin()
        tables, keys = (cos, sin), None
        if self.scale_base is not None:
            power = (positions - seqlen // 2) / self.scale_base
            scale = self._compute_scale(positions.device) ** power[:, None]
            tables, keys = (cos * scale, sin * scale), (cos / scale, sin / scale)
        # All at once, where memory for one of them may be missing.
        tables = tables[0].to(dtype), tables[1].to(dtype)
        self._cos_k_cached, self._sin_k_cached = (
            (None, None) if keys is None else (keys[0].to(dtype), keys[1].to(dtype))
        )
        self._cos_cached, self._sin_cached = tables
        self._seq_len_cached = seqlen
        self._made_for_inference = _in_inference_mode()

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | Any:
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
            qkv, with kv both, as from `apply_rotary_emb_qkv_`: in training use what is returned.

        Raises
        ------
        TypeError, ValueError
            As in `apply_rotary`; if max_seqlen is missing; for num_heads_q with kv.
        """
        check.require_tensor("qkv", qkv)
        check.require_strided("qkv", qkv)
        check.require_float_dtype("qkv", qkv)
        if qkv.ndim not in (4, 5):
            raise ValueError(f"qkv must have 4 or 5 dimensions, batch and seqlen first, got shape {tuple(qkv.shape)}")
        if kv is not None and num_heads_q is not None:
            raise ValueError(f"num_heads_q must not be given with kv, got {num_heads_q}")
        if max_seqlen is not None:
            length = check.size_of("max_seqlen", max_seqlen, 0)
        elif isinstance(seqlen_offset, Tensor):
            if self._cos_cached is None:
                raise ValueError("max_seqlen must be given with a Tensor as the first seqlen_offset, got None")
            length = self._seq_len_cached
        else:
            length = qkv.shape[1] + check.size_of("seqlen_offset", seqlen_offset, 0)
        self._update_cos_sin_cache(length, device=qkv.device, dtype=qkv.dtype)
        cos, sin = self._cos_cached, self._sin_cached
        cos_k, sin_k = self._cos_k_cached, self._sin_k_cached  # None but for XPos
        if kv is None:
            return apply_rotary_emb_qkv_(qkv, cos, sin, cos_k, sin_k, self.interleaved, seqlen_offset, num_heads_q)
        # All that may be refused comes before anything is written.
        check_written("qkv", qkv)
        tables = checked_tables(qkv, cos, sin, seqlen_offset, names=Names("qkv"))
        keys = (cos, sin) if cos_k is None else (cos_k, sin_k)
        tables_k = _tables_of_keys(kv, *keys, self.interleaved, seqlen_offset)
        return (
            rotated(qkv, None, self.interleaved, True, tables),
            rotated(kv, _KEYS, self.interleaved, True, tables_k),
        )
