"""The hard cases that need a GPU's memory or speed: addresses and masks past 2**31, dropout over a large call.

The numbers are those of test_hard_cases.py. Each test says how much memory it takes; where that is not
free, it is skipped.
"""

import pytest
import reference
import torch
from harness import require_features, require_memory
from tolerance import assert_close, assert_same_bits, lse_allowance

import flash_attn

pytestmark = pytest.mark.usefixtures("gpu_path")

BF16 = torch.bfloat16
ROWS_AT_ONCE = 1024  # of a float64 oracle


def _normal(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype, device="cuda").normal_()


def _attend(q, k, v, **options):
    return flash_attn.flash_attn_func(q, k, v, return_softmax_lse=True, **options)


def _assert_rows(q, k, v, out, lse, rows, head, causal=False):
    """Some rows of one head, of tensors (1, S, H, D), against the oracle on the GPU."""
    length = q.shape[1]
    num_keys = rows.stop if causal else length
    q, k, v = (x[0, part, head : head + 1] for x, part in ((q, rows), (k, slice(num_keys)), (v, slice(num_keys))))
    i = torch.arange(rows.start, rows.stop, device="cuda")[:, None]
    allowed = torch.arange(num_keys, device="cuda")[None] <= (i if causal else length)

    def oracle(dtype):
        tensors = (x.to(dtype) for x in (q, k, v))
        return reference.attend(*tensors, allowed=allowed, scale=q.shape[-1] ** -0.5)[:2]

    exact, low = oracle(torch.float64), oracle(q.dtype)
    name = f"head {head}, rows {rows.start} to {rows.stop}"
    assert_close(f"out, {name}", out[0, rows, head : head + 1], exact[0], low[0])
    low_lse = oracle(torch.float32)[1]
    assert_close(f"lse, {name}", lse[0, head : head + 1, rows], exact[1], low_lse, allowance=lse_allowance(q.dtype))


@pytest.mark.parametrize("sliced", [False, True], ids=["contiguous", "slices"])
def test_02a_batch_past_two_to_the_31(sliced):
    """The last entry, and those on both sides of element 2**31, equal calls of their own."""
    require_memory(27)
    batch, shape = 768, (2048, 8, 256)
    if sliced:
        q, k, v = _normal(batch, shape[0], 3, *shape[1:]).unbind(2)
    else:
        q, k, v = (_normal(batch, *shape) for _ in range(3))
    out, lse = _attend(q, k, v)
    for entry in (0, 170, 171, 511, 512, batch - 1):
        part = slice(entry, entry + 1)
        alone, alone_lse = _attend(q[part].clone(), k[part].clone(), v[part].clone())
        assert_same_bits(f"out of entry {entry}", out[part], alone)
        assert_same_bits(f"lse of entry {entry}", lse[part], alone_lse)


def test_02b_rows_past_two_to_the_31():
    """v is the last third of a packed tensor, so its last rows lie past element 2**31."""
    require_memory(16)
    length, heads, head_dim = 110592, 56, 128
    packed = _normal(1, length, 3, heads, head_dim)
    q, k = (_normal(1, length, heads, head_dim) for _ in range(2))
    v = packed[:, :, 2]
    assert v.stride(1) == 21504
    out, lse = _attend(q, k, v)
    for head in (0, heads - 1):
        for first in (0, length // 2, length - 64):
            _assert_rows(q, k, v, out, lse, slice(first, first + 64), head)
    contiguous = v.contiguous()
    del packed, v
    same, same_lse = _attend(q, k, contiguous)
    assert_same_bits("out", out, same)
    assert_same_bits("lse", lse, same_lse)


# 46341 is the first length whose square passes 2**31; that of 65536 is 2**32.
@pytest.mark.parametrize("length", [46341, 65536, 65537, 73728])
def test_04_every_row_of_a_long_causal_mask(length):
    require_memory(8)
    q, k, v = (_normal(1, length, 1, 128) for _ in range(3))
    out, lse = _attend(q, k, v, causal=True)
    for first in range(0, length, ROWS_AT_ONCE):
        _assert_rows(q, k, v, out, lse, slice(first, min(first + ROWS_AT_ONCE, length)), 0, causal=True)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_dropout_keep_rate_of_a_large_call(gpu_path, dropout_p):
    """With q = 0 and v = 1 each output is the mean of a row of the mask, times 1 / (1 - p)."""
    require_features(gpu_path, "dropout")
    require_memory(2)
    batch, length, heads = 8, 2048, 16
    k = _normal(batch, length, heads, 64, dtype=torch.float16)
    torch.manual_seed(0)
    out, _ = _attend(torch.zeros_like(k), k, torch.ones_like(k), dropout_p=dropout_p)
    kept = out[..., 0].double() * (1 - dropout_p)
    rule = (int(255 * (1 - dropout_p)) + 1) / 256
    spread = (rule * (1 - rule)) ** 0.5
    assert abs(kept.mean().item() - rule) < 5 * spread / (batch * heads * length**2) ** 0.5 + 1e-5
    per_head = kept.mean(dim=1)
    assert (per_head - rule).abs().max().item() < 6 * spread / length + 1e-4
    assert per_head.unique().numel() > 1, "all heads have one mask"
