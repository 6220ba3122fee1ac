"""Generated cases: any shape, stride, mask, list of lengths and page size that the spec allows."""

import itertools
from dataclasses import replace

import pytest
import torch
from cases import BF16, FP16, FP32, FP64, Case
from checks import check_backward, check_forward
from harness import build, device_of, on_path
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerance import assert_close, assert_same_bits

# `path` is the same for all examples of a test; its fixture keeps no state.
shared_path = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

HEADS = st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 1), (4, 2), (6, 3)])
HEAD_DIMS = st.one_of(st.sampled_from([8, 16, 32, 64]), st.integers(1, 72))
SIDE = st.one_of(st.just(-1), st.integers(0, 40))


@st.composite
def scores(draw):
    """The options of a case that concern its scores."""
    dims = draw(st.one_of(HEAD_DIMS.map(lambda d: (d, d)), st.tuples(HEAD_DIMS, HEAD_DIMS)))
    dropout_p = draw(st.sampled_from([0.0, 0.0, 0.0, 0.1, 0.6]))
    return {
        "heads": draw(HEADS),
        "dims": dims,
        "dtype": draw(st.sampled_from([BF16, FP16, FP32, FP64])),
        "causal": draw(st.booleans()),
        "window": draw(st.one_of(st.just((-1, -1)), st.tuples(SIDE, SIDE))),
        "softcap": 0.0 if dropout_p else draw(st.sampled_from([0.0, 0.0, 1.5, 30.0])),
        "alibi": draw(st.sampled_from([None, None, "heads", "batch"])),
        "sinks": draw(st.sampled_from([None, None, FP32, BF16])),
        "scale": draw(st.sampled_from([None, None, 0.3, -0.1])),
        "lse_grad": draw(st.booleans()),
        "dropout_p": dropout_p,
    }


LENGTH = st.one_of(st.integers(0, 10), st.integers(0, 90))


@st.composite
def dense(draw):
    batch, length_q, length_k = draw(st.integers(1, 3)), draw(LENGTH), draw(LENGTH)
    return _named(Case("", "generated", "dense", (length_q,) * batch, (length_k,) * batch, **draw(scores())))


@st.composite
def varlen(draw):
    pairs = draw(st.lists(st.tuples(LENGTH, LENGTH), min_size=1, max_size=5))
    lens_q, lens_k = zip(*pairs, strict=True)
    seqused = {}
    for name, lengths in (("seqused_q", lens_q), ("seqused_k", lens_k)):
        if draw(st.booleans()):
            seqused[name] = tuple(draw(st.integers(0, length)) for length in lengths)
    return _named(Case("", "generated", "varlen", lens_q, lens_k, **seqused, **draw(scores())))


@st.composite
def cached(draw):
    """A cache, paged or not, perhaps with left padding, perhaps with new tokens and rotary."""
    batch, length_q, capacity = draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 70))
    options = draw(scores()) | {"dropout_p": 0.0, "lse_grad": False}
    paged = draw(st.booleans())
    num_new = draw(st.sampled_from([None, 0, 1, min(4, capacity)]))
    before = [draw(st.integers(0, capacity - (num_new or 0))) for _ in range(batch)]
    if paged:
        options["page"] = draw(st.sampled_from([1, 2, 7, 16, 64]))
    elif draw(st.booleans()):
        options["cache_rows"] = tuple(draw(st.permutations(range(batch + 2))))[:batch]
    if draw(st.booleans()):
        options["leftpad"] = tuple(draw(st.integers(0, length)) for length in before)
    if num_new is not None:
        options["new"] = (num_new,) * batch
        if options["dims"][0] >= 16 and draw(st.booleans()):
            options["rotary"] = (draw(st.sampled_from(range(16, options["dims"][0] + 1, 16))), draw(st.booleans()))
    lens = (length_q,) * batch, (capacity,) * batch
    return _named(Case("", "generated", "kvcache", *lens, seqused_k=tuple(before), **options))


def _named(case):
    """The id seeds the numbers, so it has to tell cases apart."""
    return replace(case, id=repr(case))


@shared_path
@given(case=dense())
def test_dense(path, case):
    check_forward(path, case)
    check_backward(path, case)


@shared_path
@given(case=varlen())
def test_varlen(path, case):
    check_forward(path, case)
    check_backward(path, case)


@shared_path
@given(case=cached())
def test_cached(path, case):
    check_forward(path, case)


@st.composite
def memory_order(draw):
    """How to lay out a tensor of four dimensions: order, step, offset, and the dimensions that are expanded."""
    return {
        "order": draw(st.permutations(range(4))),
        "steps": draw(st.tuples(*[st.sampled_from([1, 1, 2, 3])] * 4)),
        "expanded": draw(st.sampled_from([None, None, 0, 2])),
    }


def _laid_out(x, order, steps, expanded):
    """(values, the same values in the wanted memory order): stride-0 dimensions repeat their first slice."""
    if expanded is not None:
        x = x.narrow(expanded, 0, 1).expand(x.shape)
    core = x if expanded is None else x.narrow(expanded, 0, 1)
    larger = core.new_full([n * step for n, step in zip(core.shape, steps, strict=True)], float("nan"))
    larger = larger.permute(order).contiguous().permute([order.index(axis) for axis in range(4)])
    view = larger[tuple(slice(None, None, step) for step in steps)]
    view.copy_(core)
    return x.contiguous(), view.expand(x.shape)


@shared_path
@given(of_q=memory_order(), of_k=memory_order(), of_v=memory_order(), causal=st.booleans())
def test_strides(path, of_q, of_k, of_v, causal):
    """Any order of dimensions, step between elements and stride 0 gives what contiguous tensors give."""
    case = Case("strides", "the same numbers", "dense", (9, 9), (21, 21), heads=(4, 2), dims=(16, 24), causal=causal)
    inputs = build(case, device_of(path))
    plain, strided = {}, {}
    for name, layout in (("q", of_q), ("k", of_k), ("v", of_v)):
        plain[name], strided[name] = _laid_out(getattr(inputs, name), **layout)
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
