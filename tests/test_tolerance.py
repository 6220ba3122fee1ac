"""The tolerance rule passes what it should and nothing else."""

import math

import pytest
import torch
from tolerance import assert_close, assert_same_bits, lse_allowance

EXACT = torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64)


@pytest.mark.parametrize("sign", [1, -1])
def test_twice_the_naive_error_passes_and_more_fails(sign):
    low = EXACT + sign * 0.1
    assert_close("x", (EXACT + sign * 0.19).float(), EXACT, low)
    with pytest.raises(AssertionError, match="x: error"):
        assert_close("x", (EXACT + sign * 0.21).float(), EXACT, low)


def test_one_wrong_value_fails_and_is_named():
    ours = EXACT.float()
    ours[1] = -1
    with pytest.raises(AssertionError, match=r"error 1.000e\+00 at \(1,\) .* got -1, expected -2"):
        assert_close("x", ours, EXACT, EXACT)


@pytest.mark.parametrize(
    "dtype, units, more",
    [(torch.float16, 1, 2), (torch.bfloat16, 1, 2), (torch.float32, 8, 1.1), (torch.float64, 64, 1.1)],
)
def test_the_floor_is_so_many_units_of_the_largest_value(dtype, units, more):
    step = torch.finfo(dtype).eps * 4 * units
    assert_close("x", (EXACT + 0.9 * step).to(dtype), EXACT, EXACT)
    with pytest.raises(AssertionError):
        assert_close("x", (EXACT + more * step).to(dtype), EXACT, EXACT)


def test_the_floor_grows_with_the_terms_alone():
    """That of small results is small, unless larger terms were rounded on the way."""
    small = EXACT * 2.0**-20
    ours = small + torch.finfo(torch.float32).eps
    assert_close("x", ours.float(), small, small, magnitude=torch.tensor([0.5]))
    with pytest.raises(AssertionError, match="x: error"):
        assert_close("x", ours.float(), small, small)


@pytest.mark.parametrize(
    "dtype, allowance",
    [(torch.float16, 2**-14), (torch.bfloat16, 2**-11), (torch.float32, 0.0), (torch.float64, 0.0)],
)
def test_lse_is_granted_a_sixteenth_of_the_rounding_of_probabilities(dtype, allowance):
    assert lse_allowance(dtype) == allowance
    ours = (EXACT + 2**-10).float()
    assert_close("lse", ours, EXACT, EXACT, allowance=2**-9)
    with pytest.raises(AssertionError):
        assert_close("lse", ours, EXACT, EXACT, allowance=allowance)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_neither_nan_nor_stray_infinity_passes(value):
    ours = torch.tensor([1.0, value, 4.0])
    with pytest.raises(AssertionError):
        assert_close("x", ours, EXACT, EXACT + 100)


def test_infinities_must_match_and_excuse_nothing():
    exact = torch.tensor([1.0, -math.inf], dtype=torch.float64)
    assert_close("x", exact.float(), exact, exact)
    with pytest.raises(AssertionError, match="infinities"):
        assert_close("x", -exact.float(), exact, exact)
    with pytest.raises(AssertionError, match="x: error"):
        assert_close("x", exact.float() + 0.1, exact, exact)


def test_shapes_must_match():
    with pytest.raises(AssertionError, match=r"shape \(1, 3\), expected \(3,\)"):
        assert_close("x", EXACT[None], EXACT, EXACT)


def test_an_oracle_that_holds_nan_judges_nothing():
    with pytest.raises(AssertionError, match="the oracle holds NaN"):
        assert_close("x", EXACT, EXACT * math.nan, EXACT)


# ---- Bits ----

BITS = torch.tensor([[1.0, math.nan], [0.0, 3.0]])


@pytest.mark.parametrize(
    "ours, expected",
    [
        (BITS, BITS.clone()),
        (BITS.t().contiguous().t(), BITS),
        (BITS[:, :0], BITS[:, :0]),
        (BITS.flatten()[::4], BITS.flatten()[:1]),
    ],
    ids=["same", "strides", "none", "one"],
)
def test_same_bits_pass(ours, expected):
    assert_same_bits("x", ours, expected)


@pytest.mark.parametrize(
    "ours, words",
    [
        (BITS.double(), "x: shape or dtype differs"),
        (BITS.view(1, 4), "x: shape or dtype differs"),
        (BITS.t(), "x: .* bytes differ"),
        (-BITS, "x: .* bytes differ"),
        (torch.nextafter(BITS, BITS + 1), "x: .* bytes differ"),
    ],
    ids=["dtype", "shape", "order", "sign", "last place"],
)
def test_other_bits_fail(ours, words):
    with pytest.raises(AssertionError, match=words):
        assert_same_bits("x", ours, BITS)
