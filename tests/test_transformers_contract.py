"""What transformers does with this package, as its 5.17 sources have it; transformers itself isn't needed."""

import inspect

import pytest
import torch
from valid_calls import i32, rand

from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn.bert_padding import pad_input, unpad_input

HEADS, HEADS_KV, DIM = 4, 2, 16
OPTIONAL = ("dropout_p", "window_size", "deterministic", "softcap", "s_aux", "max_seqlen_q", "max_seqlen_k")


def states(batch, length, dtype=torch.float32):
    """(batch, length, heads, dim) views of (batch, heads, length, dim) tensors, as a model's projections give them."""
    shapes = ((HEADS, DIM), (HEADS_KV, DIM), (HEADS_KV, DIM))
    return [rand(batch, heads, length, dim).to(dtype).requires_grad_().transpose(1, 2) for heads, dim in shapes]


def options(**extra):
    """It asks the varlen function's signature which options exist and passes those to the dense function too."""
    supported = inspect.signature(flash_attn_varlen_func).parameters
    found = {"dropout_p": 0.0, "deterministic": False, "softcap": 0.0, "window_size": (3, 3)} | extra
    assert all(name in supported for name in found)
    return {"causal": True, "softmax_scale": DIM**-0.5} | found


def same(left, right):
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


def test_detection_by_signature():
    parameters = inspect.signature(flash_attn_varlen_func).parameters
    assert [name for name in OPTIONAL if name not in parameters] == []
    assert "block_table" in inspect.signature(flash_attn_with_kvcache).parameters


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dense(dtype):
    q, k, v = states(2, 6, dtype)
    assert not q.is_contiguous()
    sinks = rand(HEADS).to(dtype)  # transformers casts s_aux to the query's dtype
    out = flash_attn_func(q, k, v, **options(s_aux=sinks))
    assert not isinstance(out, tuple) and out.shape == q.shape and out.dtype == dtype
    out.sum().backward()


def test_padded_batch_through_unpad_and_pad():
    q, k, v = states(3, 6)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]])
    packed, indices, cu_q, max_q, _ = unpad_input(q, mask)
    k_packed, *_ = unpad_input(k, mask)
    v_packed, *_ = unpad_input(v, mask)
    out = flash_attn_varlen_func(
        packed, k_packed, v_packed, cu_seqlens_q=cu_q, cu_seqlens_k=cu_q, max_seqlen_q=max_q, max_seqlen_k=max_q,
        **options(),
    )  # fmt: skip
    padded = pad_input(out, indices, 3, 6)
    assert padded.shape == q.shape
    for row, length in enumerate((6, 4, 2)):
        part = [x[row : row + 1, 6 - length :] for x in (q, k, v)]
        same(padded[row, 6 - length :], flash_attn_func(*part, **options())[0])
        assert padded[row, : 6 - length].count_nonzero() == 0


def test_packed_sequences_from_position_ids():
    """One object is both cu_seqlens, and both longest lengths are tensors of no dimension."""
    q, k, v = (x.reshape(-1, *x.shape[2:]) for x in states(1, 9))
    position_ids = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4])
    starts = torch.cat(((position_ids == 0).nonzero().flatten(), torch.tensor([9]))).int()
    longest = starts.diff().max()
    assert longest.ndim == 0
    out = flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=longest, max_seqlen_k=longest,
        **options(),
    )  # fmt: skip
    for low, high in ((0, 4), (4, 9)):
        part = [x[None, low:high] for x in (q, k, v)]
        same(out[low:high], flash_attn_func(*part, **options())[0])
    out.sum().backward()


def test_a_tuple_result_starts_with_the_output():
    q, k, v = states(2, 6)
    result = flash_attn_func(q, k, v, return_attn_probs=True)
    assert isinstance(result, tuple)
    same(result[0], flash_attn_func(q, k, v))


@pytest.mark.parametrize("sinks", [False, True])
def test_continuous_batching(sinks):
    """Prefill calls varlen positionally; decode appends to pages that a table with -1 at its ends names."""
    extra = {"s_aux": rand(HEADS)} if sinks else {}
    q, k, v = (x.detach().reshape(-1, *x.shape[2:]) for x in states(1, 7))
    cu = i32(0, 3, 7)
    prefill = flash_attn_varlen_func(
        q, k, v, cu, cu, 4, 4, softmax_scale=DIM**-0.5, causal=True, window_size=(-1, -1), **extra
    )
    pages_k, pages_v = torch.zeros(6, 4, HEADS_KV, DIM), torch.zeros(6, 4, HEADS_KV, DIM)
    table = i32(5, 2, -1, 0, 3, -1).view(2, 3)
    for entry, (low, high) in enumerate(((0, 3), (3, 7))):
        for pages, new in ((pages_k, k), (pages_v, v)):
            pages[table[entry, 0], : high - low] = new[low:high]
    new_q, new_k, new_v = (x.detach() for x in states(2, 1))
    decoded = flash_attn_with_kvcache(
        q=new_q, k_cache=pages_k, v_cache=pages_v, k=new_k, v=new_v, cache_seqlens=i32(3, 4),
        softmax_scale=DIM**-0.5, causal=True, window_size=(-1, -1), block_table=table, **extra,
    )  # fmt: skip
    assert prefill.shape == q.shape and decoded.shape == new_q.shape
    for entry, (low, high) in enumerate(((0, 3), (3, 7))):
        all_k, all_v = (torch.cat((old[None, low:high], new[entry, None]), 1) for old, new in ((k, new_k), (v, new_v)))
        same(decoded[entry], flash_attn_func(new_q[entry, None], all_k, all_v, causal=True, **extra)[0])
    same(pages_k[5, 3], new_k[0, 0])
    same(pages_k[3, 0], new_k[1, 0])


def test_values_padded_to_the_head_dim_of_the_queries():
    """It pads v with zeros where head dims differ and cuts the output; the same as passing v as it is."""
    q, k, v = states(2, 6)
    v = v[..., :8]
    padded = torch.nn.functional.pad(v, (0, DIM - 8))
    same(flash_attn_func(q, k, padded, causal=True)[..., :8], flash_attn_func(q, k, v, causal=True))
