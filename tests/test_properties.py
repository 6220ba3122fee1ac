"""Generated cases: any shape, stride, mask, list of lengths and page size that the API allows."""

import itertools
from dataclasses import replace

import pytest
import torch
from cases import BF16, FP32, FP64, Case
from checks import check_backward, check_forward
from harness import build, device_of, on_path
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from memory import place
from strategies import cached, dense, memories, varlen
from tolerance import assert_close, assert_same_bits

# `path` is the same for all examples of a test; its fixture keeps no state.
shared_path = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

LAYOUTS = memories(4, expandable=(0, 2))


@pytest.mark.drawn
@shared_path
@given(case=dense())
def test_dense(path, case):
    check_forward(path, case)
    check_backward(path, case)


@pytest.mark.drawn
@shared_path
@given(case=varlen())
def test_varlen(path, case):
    check_forward(path, case)
    check_backward(path, case)


@pytest.mark.drawn
@shared_path
@given(case=cached())
def test_cached(path, case):
    check_forward(path, case)


@pytest.mark.drawn
@shared_path
@given(of_q=LAYOUTS, of_k=LAYOUTS, of_v=LAYOUTS, causal=st.booleans())
def test_strides(path, of_q, of_k, of_v, causal):
    """Any order of dimensions, gaps, offset and stride 0 give what contiguous tensors give."""
    case = Case("strides", "the same numbers", "dense", (9, 9), (21, 21), heads=(4, 2), dims=(16, 24), causal=causal)
    inputs = build(case, device_of(path))
    strided = {
        name: place(getattr(inputs, name), memory) for name, memory in zip("qkv", (of_q, of_k, of_v), strict=True)
    }
    plain = {name: value.clone(memory_format=torch.contiguous_format) for name, value in strided.items()}
    expected = on_path(path, case.features, inputs, lambda: replace(inputs, **plain).call())
    ours = on_path(path, case.features, inputs, lambda: replace(inputs, **strided).call())
    if expected is not None:
        assert_same_bits("out", ours[0], expected[0])
        assert_same_bits("lse", ours[1], expected[1])


@pytest.mark.parametrize("causal", [False, True])
def test_every_small_mask(path, causal):
    """All lengths up to 5 and windows up to 3 on both sides: a thousand masks, half of them with a sink."""
    dtype = BF16 if device_of(path) == "cuda" else FP64
    sides = (-1, 0, 1, 2, 3)
    for length_q, length_k in itertools.product(range(1, 6), range(5)):
        sinks = FP32 if (length_q + length_k) % 2 else None
        case = Case("mask", "small masks", "dense", (length_q,), (length_k,), heads=(1, 1), dims=(8, 8), dtype=dtype,
                    causal=causal, sinks=sinks)  # fmt: skip
        inputs = build(case, device_of(path))
        for window in itertools.product(sides, sides):
            masked = replace(inputs, case=replace(case, window=window), score=inputs.score | {"window_size": window})
            result = on_path(path, masked.case.features, masked, masked.call)
            if result is None:
                continue
            exact, low = masked.expected(), masked.expected(dtype)
            name = f"Sq={length_q} Sk={length_k} window={window} causal={causal}"
            assert_close(f"out {name}", result[0], exact.out, low.out)
            assert torch.equal(result[1].isinf().cpu(), exact.lse.isinf()), name
