"""Tensors whose elements lie more than 2^31 apart, on the emulated kernels: products of 32 bits would miss them.

Of their memory only the rows' pages exist. From tests/, as emulated.py.
"""

import itertools
import mmap

import pytest
import torch
from cases import BF16
from harness import int32
from tolerance import assert_same_bits

import flash_attn

ops = torch.ops.flash_attn

# In elements. A head, an entry, and rows from the 64th on are further away than 2^31.
ROW_STRIDE = 2**25
HEAD_STRIDE = 2**31 + 2**20
ENTRY_STRIDE = 2 * HEAD_STRIDE  # TMA's descriptors count entries in heads
NUM_ROWS = 130
TENSOR_STRIDE = 2**12  # where the next tensor begins, between the rows of the last one
NUM_ELEMENTS = ENTRY_STRIDE + HEAD_STRIDE + (NUM_ROWS + 1) * ROW_STRIDE


MAP_NORESERVE = 0x4000  # Linux's; older versions of Python's mmap don't have it


@pytest.fixture
def far():
    """Makes copies of (entry, row, head, column) tensors, of at most two entries and heads."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    pages = mmap.mmap(-1, NUM_ELEMENTS * BF16.itemsize, flags=flags)
    pages.madvise(mmap.MADV_NOHUGEPAGE)  # a row would have 2 MB
    memory = torch.frombuffer(pages, dtype=BF16)
    begins = itertools.count(0, TENSOR_STRIDE)

    def copy(tensor):
        strides = (ENTRY_STRIDE, ROW_STRIDE, HEAD_STRIDE, 1)
        return memory.as_strided(tensor.shape, strides, next(begins)).copy_(tensor)

    return copy


def rand(*shape):
    return torch.randn(shape).to(BF16)


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize(("path", "num_queries"), [("sm80", 3), ("sm80", NUM_ROWS), ("sm90", NUM_ROWS)])
def test_forward(far, path, num_queries, num_splits):
    near = rand(2, num_queries, 2, 64), rand(2, NUM_ROWS, 2, 64), rand(2, NUM_ROWS, 2, 64)
    out = far(torch.zeros_like(near[0]))
    with flash_attn.use_path(path):
        options = {"causal": True, "num_splits": num_splits}
        expected = flash_attn.flash_attn_func(*near, **options)
        flash_attn.flash_attn_func(*map(far, near), out=out, **options)
    assert_same_bits("out", out, expected)


@pytest.mark.parametrize(("path", "num_queries"), [("sm80", 3), ("sm80", 70), ("sm90", 70)])
def test_pages(far, path, num_queries):
    """Two pages whose rows, heads and places are far."""
    table = int32([[1, 0], [0, 1]])
    q, (k, v) = rand(2, num_queries, 4, 64), (rand(2, 64, 2, 64) for _ in "kv")
    with flash_attn.use_path(path):
        options = {"cache_seqlens": int32((120, 70)), "block_table": table, "causal": True}
        expected = flash_attn.flash_attn_with_kvcache(q, k, v, **options)
        ours = flash_attn.flash_attn_with_kvcache(q, far(k), far(v), **options)
    assert_same_bits("out", ours, expected)


def test_backward(far):
    q, k, v, dout = (rand(2, NUM_ROWS, 2, 64) for _ in range(4))
    with flash_attn.use_path("sm80"):
        out, lse = flash_attn.flash_attn_func(q, k, v, causal=True, return_softmax_lse=True)
    given = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "lse": lse}
    given |= {"max_seqlen_q": NUM_ROWS, "max_seqlen_k": NUM_ROWS, "softmax_scale": 0.125, "softcap": 0.0}
    given |= {"dropout_p": 0.0, "window_left": -1, "window_right": 0, "deterministic": True, "arch": 80}
    expected = ops.backward(*(given.get(a.name) for a in ops.backward.default._schema.arguments))
    ours = {f"d{name}": far(torch.zeros_like(given[name])) for name in "qkv"}
    given |= ours | {name: far(given[name]) for name in ("dout", "q", "k", "v", "out")}
    ops.backward_out(*(given.get(a.name) for a in ops.backward_out.default._schema.arguments))
    for (name, gradient), right in zip(ours.items(), expected, strict=False):
        assert_same_bits(name, gradient, right)


@pytest.mark.parametrize("paged", [False, True])
def test_append(far, paged):
    caches = [torch.zeros(2, 100, 2, 64).to(BF16) for _ in "kv"]
    given = [rand(2, 3, 2, 64), rand(2, 3, 2, 64), None, None, int32((97, 95)), None, None]
    given += [int32([[1], [0]]) if paged else None, True]
    ours = [far(cache) for cache in caches]
    ops.append_kv(*caches, *given)
    ops.append_kv(*ours, *map(far, given[:2]), *given[2:])
    for name, cache, right in zip(("k_cache", "v_cache"), ours, caches, strict=True):
        assert right.any()
        assert_same_bits(name, cache, right)


def test_combine(far):
    """Each entry is a part."""
    parts, lse = rand(2, 70, 2, 64), torch.randn(2, 70, 2)
    with flash_attn.use_path("sm80"):
        expected, _ = flash_attn.flash_attn_combine(parts, lse)
        ours, _ = flash_attn.flash_attn_combine(far(parts), lse)
    assert_same_bits("out", ours, expected)
