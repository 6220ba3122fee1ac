"""What torch.utils.flop_counter.FlopCounterMode counts of the ops, which is nothing for an op it does not know.

It counts as for torch's own attention: a multiplication and an addition for each element of the matrix products, and
all pairs of a sequence's queries and keys, those that the mask hides, too.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from flash_attn._arguments import batch_size_of


def _forward(
    q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None, alibi_slopes: Tensor | None, rng_state: Tensor | None,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, seqused_q: Tensor | None, seqused_k: Tensor | None,
    leftpad_k: Tensor | None, block_table: Tensor | None, cache_batch_idx: Tensor | None,
    scheduler_metadata: Tensor | None, max_seqlen_q: int, max_seqlen_k: int, *_: Any, **__: Any,
) -> int:  # fmt: skip
    """Of two products, Q K' and P V."""
    lengths = cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k
    pairs = _pairs(q, k, *lengths, max_seqlen_q, max_seqlen_k, leftpad_k, block_table)
    return 2 * q.shape[-2] * pairs * (q.shape[-1] + v.shape[-1])


def _backward(
    dout: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    s_aux: Tensor | None, alibi_slopes: Tensor | None, rng_state: Tensor | None,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, seqused_q: Tensor | None, seqused_k: Tensor | None,
    max_seqlen_q: int, max_seqlen_k: int, *_: Any, **__: Any,
) -> int:  # fmt: skip
    """Of five products: Q K' once more, dO V', P' dO, dS K and dS' Q."""
    pairs = _pairs(q, k, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k)
    return 2 * q.shape[-2] * pairs * (3 * q.shape[-1] + 2 * v.shape[-1])


def _pairs(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, seqused_q: Tensor | None,
    seqused_k: Tensor | None, max_seqlen_q: int, max_seqlen_k: int,
    leftpad_k: Tensor | None = None, block_table: Tensor | None = None,
) -> int:  # fmt: skip
    """Of a query and a key, over all batch entries."""
    batch = batch_size_of(q, cu_seqlens_q)
    longest_q, longest_k = _longest(q, cu_seqlens_q, max_seqlen_q), _longest(k, cu_seqlens_k, max_seqlen_k)
    if block_table is not None:
        longest_k *= block_table.shape[1]
    rows = _lengths(batch, longest_q, cu_seqlens_q, seqused_q)
    keys = _lengths(batch, longest_k, cu_seqlens_k, seqused_k, leftpad_k)
    return sum(num_rows * num_keys for num_rows, num_keys in zip(rows, keys, strict=True))


def _longest(x: Tensor, cu_seqlens: Tensor | None, max_seqlen: int) -> int:
    """How long a sequence of x can be, or a page of a cache; a max_seqlen of 0 is unknown."""
    return x.shape[1] if cu_seqlens is None else max_seqlen or x.shape[0]


def _lengths(
    batch: int, longest: int, cu_seqlens: Tensor | None, seqused: Tensor | None, leftpad: Tensor | None = None
) -> list[int]:
    """Each entry's length; the longest there can be where the tensors that tell have no values."""
    if any(tensor is not None and (tensor.is_meta or is_fake(tensor)) for tensor in (cu_seqlens, seqused, leftpad)):
        return [longest] * batch
    if seqused is not None:
        ends = seqused.tolist()
    else:
        ends = [longest] * batch if cu_seqlens is None else cu_seqlens.diff().tolist()
    starts = [0] * batch if leftpad is None else leftpad.tolist()
    return [max(end - start, 0) for start, end in zip(starts, ends, strict=True)]


# Op, without its prefix -> its formula. What has no matrix product is left out, and attn_probs, which is for debugging.
FORMULAS = {"forward": _forward, "forward_out": _forward, "backward": _backward, "backward_out": _backward}
