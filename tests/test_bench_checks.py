"""What python -m flash_attn bench measures against: its inputs, its references, and what they call wrong."""

import dataclasses
import math

import pytest
import torch
from test_bench import BACKWARD, PACKED, TINY

from flash_attn.bench import check, gradients, impls, suites

OPTIONS = (
    {},
    {"heads_k": 4},
    {"causal": False},
    {"causal": False, "window": (3, 2)},
    {"window": (4, 0)},
    {"softcap": 2.0},
    {"alibi": True},
    {"alibi": True, "causal": False, "seqlen_q": 9},
    {"sinks": True},
    {"seqlen_q": 9},
)


def outputs_of(case, name):
    inputs = check.make_inputs(case, "cpu")
    prepared = impls.load(name).prepare(case, inputs)
    return prepared.in_our_layout(prepared.call()), check.make_reference(case, inputs)


# A packed case is of self-attention: its keys have no length of their own.
PACKED_OPTIONS = [options for options in OPTIONS if "seqlen_q" not in options]
LAYOUTS = [("dense", options) for options in OPTIONS] + [("packed", options) for options in PACKED_OPTIONS]


@pytest.mark.parametrize("name", ["ours", "sdpa"])
@pytest.mark.parametrize("layout,options", LAYOUTS, ids=str)
def test_implementations_are_right(layout, options, name):
    case = dataclasses.replace(PACKED if layout == "packed" else TINY, **options)
    if name == "sdpa" and (case.softcap or case.sinks):
        with pytest.raises(impls.Unsupported, match="softcap|sinks"):
            outputs_of(case, name)
        return
    out, reference = outputs_of(case, name)
    verdict = reference.judge(out)
    assert verdict.wrong is None and verdict.error < 1e-6


def test_reference_has_the_longest_entry_and_distant_heads():
    reference = check.make_reference(PACKED, check.make_inputs(PACKED, "cpu"))
    assert reference.entry == 1 and reference.heads == (0, 3) and reference.out.shape == (20, 2, 8)
    assert reference.out.dtype is torch.float64


@pytest.mark.parametrize("case", [TINY, PACKED], ids=["dense", "packed"])
def test_references_are_the_same_in_blocks_of_rows(case, monkeypatch):
    inputs = check.make_inputs(dataclasses.replace(case, backward=True), "cpu")
    makers = check.make_reference, gradients.make_gradient_reference
    whole = [make(case, inputs) for make in makers]
    monkeypatch.setattr(check, "_ROWS_AT_ONCE", 7)
    parts = [make(case, inputs) for make in makers]
    torch.testing.assert_close((parts[0].out, *parts[1].exact), (whole[0].out, *whole[1].exact))
    assert {x.dtype for x in parts[1].exact} == {torch.float64}


def test_inputs_have_the_dtype_and_are_the_same_every_time():
    case = dataclasses.replace(TINY, dtype="bf16", backward=True)
    inputs, again = check.make_inputs(case, "cpu"), check.make_inputs(case, "cpu")
    for name in ("q", "k", "v", "dout"):
        tensor = getattr(inputs, name)
        assert tensor.dtype is torch.bfloat16 and torch.equal(tensor, getattr(again, name))


def test_alibi_slopes_are_those_of_the_paper():
    inputs = check.make_inputs(dataclasses.replace(TINY, heads=8, alibi=True), "cpu")
    assert inputs.alibi_slopes.tolist() == [2.0**-power for power in range(1, 9)]


@pytest.mark.parametrize("case", [TINY, PACKED], ids=["dense", "packed"])
def test_wrong_outputs_are_seen(case):
    out, reference = outputs_of(case, "ours")
    entry = slice(5, 25) if case.lengths else 1
    for damage, words in ((1.001, "relative error"), (math.nan, "relative error nan")):
        wrong = out.clone()
        wrong[entry] *= damage
        assert words in reference.judge(wrong).wrong
    wrong = out.clone()
    wrong[entry][-1] *= 1 + 4.5e-5  # too little for the norm of all rows
    assert "row" in reference.judge(wrong).wrong
    assert "shape" in reference.judge(out[..., :-1]).wrong
    assert reference.judge(out * (1 + 0.9e-5)).wrong is None, "a row may err by as much as the whole"
    later = outputs_of(dataclasses.replace(case, causal=False), "ours")[0]
    assert reference.judge(later).wrong, "another mask"


def test_dropout_is_judged_by_its_noise():
    case = suites.Case("score", 1, 2, 2, 256, 256, 64, 64, "fp32", causal=True, dropout_p=0.1)
    torch.manual_seed(0)
    out, reference = outputs_of(case, "ours")
    assert reference.judge(out).wrong is None
    assert "scales" in reference.judge(out * 0.9).wrong, "not divided by 1 - p"
    inputs = check.make_inputs(case, "cpu")
    undropped = impls.load("ours").prepare(dataclasses.replace(case, dropout_p=0.0), inputs).call()
    assert "noise" in reference.judge(undropped).wrong
    assert reference.judge(torch.full_like(out, math.nan)).wrong


def test_a_small_row_is_judged_by_its_own_size():
    reference = check.make_reference(TINY, check.make_inputs(TINY, "cpu"))
    reference.out[3] *= 1e-3
    ours = torch.zeros(2, 24, 4, 16)
    ours[1][:, [0, 3]] = reference.out.float()
    assert reference.judge(ours).wrong is None
    ours[1, 3] *= 1 + 1e-4
    assert "row" in reference.judge(ours).wrong


def test_noise_of_dropout_is_that_of_the_second_half_of_the_rows():
    exact = torch.randn(200, 2, 16, dtype=torch.float64)
    ours = exact * (torch.rand_like(exact) > 0.2) / 0.8
    few_keys = torch.cat((exact[:100] * 3, ours[100:]))
    assert check._judge_dropout(few_keys, exact, 0.2).wrong is None
    assert "scales" in check._judge_dropout(torch.cat((ours[:100], ours[100:] * 0.8)), exact, 0.2).wrong
    assert "noise is 0.000" in check._judge_dropout(torch.cat((ours[:100], exact[100:])), exact, 0.2).wrong


def gradients_of(case, name):
    inputs = check.make_inputs(case, "cpu")
    with torch.enable_grad():
        prepared = impls.backward_of(impls.load(name).prepare(case, inputs), inputs)
    return prepared.in_our_layout(prepared.call()), gradients.make_gradient_reference(case, inputs)


@pytest.mark.parametrize("name", ["ours", "det", "sdpa"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": (4, 0)}, {"alibi": True}], ids=str)
def test_gradients_of_implementations_are_right(options, packed, name):
    case = dataclasses.replace(PACKED if packed else TINY, backward=True, **options)
    found, reference = gradients_of(case, name)
    verdict = reference.judge(found)
    assert verdict.wrong is None and verdict.error < 2e-6
    assert [tuple(x.shape) for x in reference.exact] == [(20 if packed else 24, n, d) for n, d in
                                                         ((4, 16), (2, 16), (2, 8 if packed else 16))]  # fmt: skip


@pytest.mark.parametrize("index", range(3))
def test_wrong_gradients_are_seen(index):
    found, reference = gradients_of(BACKWARD, "ours")
    for damage, words in ((1.001, "relative error"), (math.nan, "relative error nan")):
        wrong = [x.clone() for x in found]
        wrong[index][1] *= damage
        assert words in reference.judge(wrong).wrong and gradients.NAMES[index] in reference.judge(wrong).wrong
    assert "torch.float64" in reference.judge([x.double() for x in found]).wrong
    assert f"{gradients.NAMES[index]} has shape" in reference.judge([*found[:index], found[index][..., :-1],
                                                                     *found[index + 1 :]]).wrong  # fmt: skip


@pytest.mark.parametrize("index", range(3))
def test_the_error_of_gradients_is_the_largest(index):
    found, reference = gradients_of(BACKWARD, "ours")
    found = [x * (1 + 1e-5) if i == index else x for i, x in enumerate(found)]
    verdict = reference.judge(found)
    assert verdict.wrong is None and verdict.error == pytest.approx(1e-5, rel=0.1)


def test_flops_of_the_backward_pass():
    assert BACKWARD.flops * 2 == TINY.flops * 5


@pytest.mark.parametrize("page", [0, 1, 7, 16])
def test_steps_from_a_cache_are_right(page):
    case = suites.Case("paged", 2, 4, 2, 1, 40, 16, 8, "fp32", causal=True, cached=True, page=page)
    out, reference = outputs_of(case, "ours")
    verdict = reference.judge(out)
    assert verdict.wrong is None and verdict.error < 1e-6
    assert case.kv_bytes == 2 * 40 * 2 * (16 + 8) * 4
    if page:
        with pytest.raises(impls.Unsupported, match="page"):
            outputs_of(case, "sdpa")


def test_pages_lie_in_random_order():
    case = suites.Case("paged", 2, 4, 2, 1, 256, 16, 16, "fp32", causal=True, cached=True, page=16)
    table = check.make_inputs(case, "cpu").block_table
    assert torch.equal(table, check.make_inputs(case, "cpu").block_table)
    assert sorted(table.flatten().tolist()) == list(range(32)) and not (table.diff() == 1).all()
