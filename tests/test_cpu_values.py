"""What the CPU path, which reads lengths, positions and ids, says of wrong ones; and batches of no entry.

A case changes some arguments of a valid call, as in test_validation.py. The kernels read such values on the
device, where nothing can raise.
"""

import re

import pytest
import torch
from valid_calls import (
    APPEND,
    CACHE,
    CU_Q,
    PACKED_APPEND,
    PAGED,
    PAGED_CACHE,
    ROTARY,
    TABLE,
    VARLEN,
    VARLEN_KV,
    VARLEN_QKV,
    Q,
    call_of,
    i32,
    rand,
)

PAGED_APPEND = (PAGED_CACHE[0], {**APPEND[1], **PAGED_CACHE[1]})
# Queries are rotated, so that cu_seqlens_q is read before the attention reads it.
PACKED_ROTARY = (ROTARY[0], {**ROTARY[1], "q": Q[0], "cu_seqlens_q": CU_Q})
S_DMASK = {"dropout_p": 0.1, "return_attn_probs": True}

# (valid call, what is changed, message)
CASES = [
    (VARLEN, {"cu_seqlens_q": i32(-1, 2, 5)}, "cu_seqlens_q (cu_seqlens) must start at 0, got -1"),
    (VARLEN, {"cu_seqlens_k": i32(1, 2, 5)}, "cu_seqlens_k must start at 0, got 1"),
    (VARLEN, {"cu_seqlens_k": i32(0, 5, 4)}, "cu_seqlens_k must not decrease, got 5 then 4 at index 2"),
    (VARLEN, {"cu_seqlens_q": i32(0, 2, 6)},
     "cu_seqlens_q (cu_seqlens) must end within the 5 tokens of q (qkv), got 6"),
    (VARLEN, S_DMASK | {"max_seqlen_q": 2},
     "max_seqlen_q (max_seqlen) must be at least the longest length 3 for return_attn_probs, got 2"),
    (PAGED, S_DMASK | {"max_seqlen_k": 5},
     "max_seqlen_k must be at least the longest length 6 for return_attn_probs, got 5"),
    (VARLEN_QKV, {"cu_seqlens": i32(0, 7)}, "(cu_seqlens) must end within the 5 tokens of q (qkv), got 7"),
    (VARLEN, {"seqused_q": i32(3, 3)}, "seqused_q must be between 0 and the capacity 2, got 3 at index 0"),
    (VARLEN, {"seqused_k": i32(3, -1)}, "seqused_k (cache_seqlens) must be between 0 and the capacity 4, got -1"),
    (VARLEN, {"leftpad_k": i32(0, -2)}, "leftpad_k (cache_leftpad) must not be negative, got -2 at index 1"),
    (VARLEN_KV, {"cu_seqlens_k": i32(0, 3, 8)}, "cu_seqlens_k must end within the 7 tokens of k (kv), got 8"),
    (PAGED, {"seqused_k": i32(3, 7)}, "seqused_k (cache_seqlens) must be between 0 and the capacity 6, got 7"),
    (PAGED, {"block_table": TABLE + 1},
     "block_table must hold ids of at least 0 and below 4 for pages in use, got 4 in row 1"),
    (CACHE, {"cache_seqlens": i32(17, 0)}, "seqused_k (cache_seqlens) must be between 0 and the capacity 16, got 17"),
    (CACHE, {"cache_batch_idx": i32(0, 2)},
     "cache_batch_idx must be at least 0 and below the cache's 2 rows, got 2 at index 1"),
    (CACHE, {"cache_batch_idx": i32(-1, 1)},
     "cache_batch_idx must be at least 0 and below the cache's 2 rows, got -1 at index 0"),
    (PAGED_CACHE, {"cache_batch_idx": i32(0, 2)},
     "cache_batch_idx must be at least 0 and below block_table's 2 rows, got 2 at index 1"),
    (PAGED_CACHE, {"cache_batch_idx": i32(-1, 1)},
     "cache_batch_idx must be at least 0 and below block_table's 2 rows, got -1 at index 0"),
    (APPEND, {"cache_seqlens": i32(4, 14)}, "cache_seqlens plus the new tokens must fit the cache's 16 tokens, got 17"),
    (APPEND, {"cache_seqlens": i32(-1, 4)}, "cache_seqlens must not be negative, got -1"),
    (APPEND, {"cache_seqlens": i32(-1, -2)}, "cache_seqlens must not be negative, got -2"),
    (APPEND, {"cache_batch_idx": i32(1, 1)}, "cache_batch_idx must not name a row twice with k, got 1 twice"),
    (APPEND, {"cache_batch_idx": i32(2, 0)},
     "cache_batch_idx must be at least 0 and below the cache's 2 rows, got 2 at index 0"),
    (PAGED_APPEND, {"cache_batch_idx": i32(0, -1)},
     "cache_batch_idx must be at least 0 and below block_table's 2 rows, got -1 at index 1"),
    (PAGED_APPEND, {"cache_batch_idx": i32(2, 0)},
     "cache_batch_idx must be at least 0 and below block_table's 2 rows, got 2 at index 0"),
    (PAGED_APPEND, {"block_table": -TABLE},
     "block_table must hold ids of at least 0 and below 4 for pages in use, got -3"),
    (PAGED_APPEND, {"block_table": TABLE + 1},
     "block_table must hold ids of at least 0 and below 4 for pages in use, got 4"),
    (PACKED_APPEND, {"cu_seqlens_k_new": i32(-1, 2, 3)}, "cu_seqlens_k_new must start at 0, got -1"),
    (PACKED_APPEND, {"cu_seqlens_k_new": i32(0, 3, 1)},
     "cu_seqlens_k_new must not decrease, got 3 then 1 at index 2"),
    (PACKED_APPEND, {"cu_seqlens_k_new": i32(0, 1, 4)}, "cu_seqlens_k_new must end within the 3 tokens of k, got 4"),
    (ROTARY, {"rotary_cos": rand(7, 8), "rotary_sin": rand(7, 8)},
     "rotary_cos and rotary_sin must hold the positions 4 to 8, got 7 rows"),
    (ROTARY, {"rotary_cos": rand(8, 8), "rotary_sin": rand(8, 8)},
     "rotary_cos and rotary_sin must hold the positions 4 to 8, got 8 rows"),
    (PACKED_ROTARY, {"cu_seqlens_q": i32(-1, 2, 5)}, "cu_seqlens_q must start at 0, got -1"),
    (PACKED_ROTARY, {"cu_seqlens_q": i32(0, 4, 2)}, "cu_seqlens_q must not decrease, got 4 then 2 at index 2"),
    (PACKED_ROTARY, {"cu_seqlens_q": i32(0, 2, 6)}, "cu_seqlens_q must end within the 5 tokens of q, got 6"),
]  # fmt: skip


def case_id(case):
    (function, _), changes, _ = case
    return f"{function.__name__}-{'-'.join(changes)}"


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_error(case):
    valid, changes, message = case
    with pytest.raises(ValueError, match=re.escape(message)):
        call_of(valid, changes)


NO_ENTRY = {"cache_seqlens": i32(), "cache_batch_idx": i32()}


@pytest.mark.parametrize("packed_k", [False, True], ids=["k", "packed_k"])
@pytest.mark.parametrize("packed_q", [False, True], ids=["q", "packed_q"])
@pytest.mark.parametrize("valid", [APPEND, ROTARY, PAGED_APPEND], ids=["append", "rotary", "paged"])
def test_append_of_no_entry(valid, packed_q, packed_k):
    """A step of a server that has no request left: rows of no entry come out as 0, and the cache stays."""
    changes = {**NO_ENTRY, "return_softmax_lse": True}
    changes |= {"q": rand(3, 4, 32), "cu_seqlens_q": i32(0)} if packed_q else {"q": rand(0, 3, 4, 32)}
    if packed_k:
        changes |= {"k": rand(2, 2, 32), "v": rand(2, 2, 8), "cu_seqlens_k_new": i32(0)}
    else:
        changes |= {"k": rand(0, 2, 2, 32), "v": rand(0, 2, 2, 8)}
    function, arguments = valid
    k_cache, v_cache = arguments["k_cache"].clone(), arguments["v_cache"].clone()
    out, lse = function(**{**arguments, **changes, "k_cache": k_cache, "v_cache": v_cache})
    assert out.shape == (*changes["q"].shape[:-1], 8) and not out.count_nonzero()
    assert lse.shape == ((4, 3) if packed_q else (0, 4, 3)) and torch.isneginf(lse).all()
    assert torch.equal(k_cache, arguments["k_cache"]) and torch.equal(v_cache, arguments["v_cache"])
