"""flash_attn_combine: partial results of splits, merged by their LSE."""

import math

import pytest
import reference
import torch
from cases import Case
from harness import Inputs, build, device_of, on_path
from tolerance import assert_close, assert_same_bits

import flash_attn

SHAPES = [(1, 1, 1, 1, 8), (2, 2, 17, 3, 64), (5, 1, 65, 2, 111), (128, 2, 1, 4, 40), (3, 1, 2, 1, 512)]


def _partials(shape, device, dtype=torch.float32):
    """out_partial (splits, B, S, H, D) and lse_partial (splits, B, S, H), with rows side by side in memory."""
    generator = torch.Generator().manual_seed(sum(shape))
    out = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    splits, batch, seqlen, heads, _ = shape
    lse = torch.randn(splits, batch, heads, seqlen, generator=generator, dtype=torch.float64) * 4
    lse = lse.to(torch.float64 if dtype is torch.float64 else torch.float32).transpose(2, 3)
    return out.to(device), lse.to(device)


def _combine(path, out_partial, lse_partial, **options):
    anchor = Inputs(None, out_partial, out_partial, out_partial, {}, {})
    features = {"combine"}
    return on_path(path, features, anchor, lambda: flash_attn.flash_attn_combine(out_partial, lse_partial, **options))


def _check(result, out_partial, lse_partial, dtype=torch.float32):
    exact = reference.combine(out_partial.cpu().double(), lse_partial.cpu().double())
    low = reference.combine(out_partial.cpu().float(), lse_partial.cpu().float())
    out, lse = result
    assert out.dtype is dtype and lse.shape == lse_partial.shape[1:]
    assert_close("out", out, exact[0], low[0].to(dtype))
    assert_close("lse", lse, exact[1], low[1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_combine(path, shape):
    partials = _partials(shape, device_of(path))
    result = _combine(path, *partials)
    if result is not None:
        _check(result, *partials)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_out_dtype(path, dtype):
    partials = _partials((3, 2, 17, 2, 64), device_of(path))
    result = _combine(path, *partials, out_dtype=dtype)
    if result is not None:
        _check(result, *partials, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dtype_of_the_parts(path, dtype):
    partials = _partials((3, 2, 17, 2, 64), device_of(path), dtype)
    result = _combine(path, *partials)
    if result is not None:
        _check(result, *partials, dtype=dtype)


def test_wider_result_than_parts(path):
    partials = _partials((3, 2, 5, 2, 64), device_of(path))
    result = _combine(path, *partials, out_dtype=torch.float64)
    if result is not None:
        assert result[0].dtype is torch.float64
        _check((result[0].float(), result[1]), *partials)


def test_packed_rows(path):
    out_partial, lse_partial = (x.flatten(1, 2) for x in _partials((3, 2, 17, 2, 64), device_of(path)))
    result = _combine(path, out_partial, lse_partial)
    if result is not None:
        _check(result, out_partial, lse_partial)


STRIDED = {
    "odd-start": lambda x: torch.cat((x[..., :1], x), dim=-1)[..., 1:],
    "heads-before-rows": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "columns-apart": lambda x: x.mT.contiguous().mT,
    "one-part-for-all": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED)
def test_strided_parts(path, view):
    out_partial, lse_partial = _partials((3, 2, 17, 2, 64), device_of(path))
    out_partial = view(out_partial)
    expected = _combine(path, out_partial.contiguous(), lse_partial.contiguous())
    result = _combine(path, out_partial, lse_partial)
    if result is not None:
        assert_same_bits("out", result[0], expected[0])
        assert_same_bits("lse", result[1], expected[1])


def test_part_that_saw_no_key_may_hold_anything(path):
    out_partial, lse_partial = _partials((4, 1, 5, 2, 16), device_of(path))
    lse_partial[1] = -math.inf
    lse_partial[:, :, 2] = -math.inf
    empty = lse_partial == -math.inf
    expected = _combine(path, out_partial.masked_fill(empty.unsqueeze(-1), 0.0), lse_partial)
    result = _combine(path, out_partial.masked_fill(empty.unsqueeze(-1), math.nan), lse_partial)
    if result is not None:
        assert_same_bits("out", result[0], expected[0])


def test_nan_is_kept(path):
    out_partial, lse_partial = _partials((4, 1, 5, 2, 16), device_of(path))
    out_partial[1, 0, 2, 1], lse_partial[1, 0, 2, 1] = math.nan, math.nan
    result = _combine(path, out_partial, lse_partial)
    if result is not None:
        lost = torch.isnan(lse_partial[1])
        assert_same_bits("rows of O with NaN", result[0].isnan(), lost[..., None].expand_as(result[0]))
        assert_same_bits("LSE that is NaN", result[1].isnan(), lost)


def test_out_argument(path):
    partials = _partials((3, 2, 17, 2, 64), device_of(path))
    expected = _combine(path, *partials)
    poisoned = torch.full_like(partials[0][0], math.nan)
    result = _combine(path, *partials, out=poisoned)
    if result is not None:
        assert result[0].data_ptr() == poisoned.data_ptr()
        assert_same_bits("out", poisoned, expected[0])


def test_empty_splits(path):
    """A split that saw no key has LSE = -inf and counts for nothing; if all did, O = 0 and LSE = -inf."""
    out_partial, lse_partial = _partials((4, 1, 5, 2, 16), device_of(path))
    lse_partial[1] = -math.inf
    lse_partial[:, :, 2] = -math.inf
    out_partial[lse_partial == -math.inf] = 0.0
    result = _combine(path, out_partial, lse_partial)
    if result is None:
        return
    _check(result, out_partial, lse_partial)
    assert (result[0][:, 2] == 0).all() and (result[1][:, 2] == -math.inf).all()


def test_no_parts(path):
    """Nothing was seen: O = 0 and LSE = -inf."""
    result = _combine(path, *_partials((0, 1, 5, 2, 16), device_of(path)))
    if result is not None:
        assert result[0].shape == (1, 5, 2, 16) and (result[0] == 0).all() and (result[1] == -math.inf).all()


def test_splits_of_keys_give_the_whole(path):
    case = Case("combine-keys", "a call cut in three by its keys", "dense", (17, 17), (90, 90), heads=(4, 2))
    inputs = build(case, device_of(path))

    def part(start, end):
        return flash_attn.flash_attn_func(
            inputs.q, inputs.k[:, start:end], inputs.v[:, start:end], return_softmax_lse=True
        )

    parts = [
        on_path(path, case.features, inputs, lambda a=a, b=b: part(a, b)) for a, b in ((0, 40), (40, 41), (41, 90))
    ]
    if parts[0] is None:
        return
    out_partial = torch.stack([out.float() for out, _ in parts])
    lse_partial = torch.stack([lse.transpose(1, 2) for _, lse in parts])
    result = _combine(path, out_partial, lse_partial)
    if result is None:
        return
    exact = inputs.expected()
    eps = torch.finfo(case.dtype).eps
    assert (result[0].cpu() - exact.out).abs().max() < 2 * eps * exact.out.abs().max()
    assert (result[1].cpu() - exact.lse.transpose(1, 2)).abs().max() < 1e-4
