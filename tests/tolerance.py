"""The one tolerance rule of the tests."""

import torch

# Units of rounding that are granted beside the naive computation's own error. Sums in float32 and float64
# round in the dtype that is compared, in an order of their own, so they get more than the 16-bit dtypes,
# which sum in float32. For float64 inputs the oracle is no more exact than what it judges, so this floor is
# all there is.
_FLOOR_ULPS = {torch.float16: 1, torch.bfloat16: 1, torch.float32: 8, torch.float64: 64}


def _largest(x):
    finite = x[torch.isfinite(x)]
    return finite.abs().max().item() if finite.numel() else 0.0


def floor_unit(dtype):
    """The floor of a result whose largest value is 1."""
    return _FLOOR_ULPS[dtype] * torch.finfo(dtype).eps


def lse_allowance(dtype):
    """LSE of 16-bit inputs is judged as a float32 result, but its exponentials may be fast ones.

    An error of LSE is a relative error of every probability. Those are about to be rounded to `dtype`; a
    sixteenth of that rounding step does no harm, and is far less than the error of scores rounded to `dtype`.
    """
    return torch.finfo(dtype).eps / 16 if dtype.itemsize == 2 else 0.0


def assert_close(name, ours, ref64, ref_low, magnitude=None, allowance=0.0):
    """Pass if max|ours - ref64| <= 2 * max|ref_low - ref64| + floor.

    `ref64` is the oracle in float64. `ref_low` is the same formula, computed naively by PyTorch in the dtype
    of the inputs: what a user would have got without this package. An exact algorithm may at most double its
    error, since it rounds at other places. The floor is a few units of rounding (_FLOOR_ULPS, in ours' dtype)
    of the largest value; without it a naive result that happens to be exact (one key, say) would demand
    exactness. `magnitude` holds the size of the terms that were rounded on the way, if larger than the result
    (reference.gradient_magnitudes).
    `allowance` is absolute, for LSE alone (lse_allowance).

    NaN never passes. Infinities must stand in the same places with the same sign.
    """
    assert ours.shape == ref64.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(ref64.shape)}"
    ours_dtype = ours.dtype
    ours, ref64, ref_low = (x.detach().cpu().double() for x in (ours, ref64, ref_low))
    assert not ref64.isnan().any(), f"{name}: the oracle holds NaN, so the case is wrong"
    num_nan = int(ours.isnan().sum())
    assert num_nan == 0, f"{name}: {num_nan} of {ours.numel()} values are NaN"
    infinite = ref64.isinf()
    agree = torch.equal(ours.isinf(), infinite) and torch.equal(ours[infinite], ref64[infinite])
    assert agree, f"{name}: infinities differ: {int(ours.isinf().sum())} here, {int(infinite.sum())} in the oracle"
    zero = torch.zeros_like(ref64)
    error = torch.where(infinite, zero, ours - ref64).abs()
    naive_error = _largest(torch.where(infinite, zero, ref_low - ref64))
    size = max(_largest(ref64), 0.0 if magnitude is None else _largest(magnitude.double()))
    floor = floor_unit(ours_dtype) * size
    limit = 2 * naive_error + floor + allowance
    if error.numel() and error.max().item() > limit:
        worst = torch.unravel_index(error.argmax(), error.shape)
        where = tuple(int(axis) for axis in worst)
        values = f"got {ours[where]:.6g}, expected {ref64[where]:.6g}"
        raise AssertionError(
            f"{name}: error {error.max().item():.3e} at {where} exceeds {limit:.3e} "
            f"(2 x naive {naive_error:.3e} + floor {floor:.3e} + allowance {allowance:.3e}); {values}"
        )


def assert_same_bits(name, ours, expected):
    """Bitwise equality; NaNs are equal to themselves."""
    assert ours.shape == expected.shape and ours.dtype == expected.dtype, f"{name}: shape or dtype differs"
    if ours.numel() == 0:
        return
    # A clone, since tensors of one element count as contiguous whatever their strides, and view() minds those.
    ours, expected = (x.detach().cpu().clone(memory_format=torch.contiguous_format) for x in (ours, expected))
    ours, expected = (x.flatten().view(torch.uint8) for x in (ours, expected))
    differing = int((ours != expected).sum())
    assert differing == 0, f"{name}: {differing} of {ours.numel()} bytes differ"
