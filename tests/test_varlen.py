"""Variable lengths: cu_seqlens, seqused, leftpad and pages, forward and backward, on every path."""

import math

import cases
import pytest
import torch
from cases import Case
from checks import check_backward, check_forward, check_garbage
from harness import build, cumulative, device_of, on_path
from tolerance import assert_same_bits

import flash_attn

SMALL = Case("small-varlen", "one to vary", "varlen", (17, 0, 33), (40, 5, 33), heads=(4, 2), causal=True)
AS_DENSE = Case("as-dense", "one sequence", "dense", (65,), (129,), heads=(4, 2), causal=True)
PACKED = Case("packed-varlen", "equal heads", "varlen", (17, 0, 33), (17, 0, 33), heads=(3, 3), causal=True)
ALL = cases.VARLEN_FORWARD
DIFFERENTIABLE = [case for case in ALL if case.differentiable]
FORWARD_ONLY = [case for case in ALL if not case.differentiable]
WITH_GARBAGE = [case for case in ALL if case.seqused_k or case.seqused_q or case.leftpad or case.page]


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.id)
def test_forward(path, case):
    check_forward(path, case)


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=lambda case: case.id)
def test_backward(path, case):
    check_backward(path, case)


@pytest.mark.parametrize("case", FORWARD_ONLY[:3], ids=lambda case: case.id)
def test_no_backward_through_pages_or_leftpad(path, case):
    leafy, wanted = build(case, device_of(path)).leaves()

    def run():
        out, _ = leafy.call()
        with pytest.raises(NotImplementedError):
            torch.autograd.grad(out.sum(), list(wanted.values()))
        return True

    on_path(path, case.features | {"backward"}, leafy, run)


@pytest.mark.parametrize("garbage", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("case", WITH_GARBAGE, ids=lambda case: case.id)
def test_unused_memory_never_matters(path, case, garbage):
    check_garbage(path, case, garbage)


@pytest.mark.parametrize("form", ["none", "larger", "tensor", "int32-tensor"])
def test_max_seqlen_is_only_a_bound(path, form):
    device = device_of(path)
    inputs = build(SMALL, device)
    forms = {
        "none": (None, None), "larger": (100, 4096), "tensor": (torch.tensor(33), torch.tensor(40)),
        "int32-tensor": [torch.tensor(n, dtype=torch.int32, device=device) for n in (33, 40)],
    }  # fmt: skip
    max_q, max_k = forms[form]
    expected = on_path(path, SMALL.features, inputs, inputs.call)
    ours = on_path(path, SMALL.features, inputs, lambda: inputs.call(max_seqlen_q=max_q, max_seqlen_k=max_k))
    if expected is not None:
        assert_same_bits("out", ours[0], expected[0])
        assert_same_bits("lse", ours[1], expected[1])


def test_one_sequence_equals_dense(path):
    """The same numbers from both layouts, up to their different LSE layouts."""
    dense = build(AS_DENSE, device_of(path))
    cu_q, cu_k = cumulative((65,), device_of(path)), cumulative((129,), device_of(path))
    expected = on_path(path, dense.case.features, dense, dense.call)
    ours = on_path(
        path, dense.case.features - {"dense"} | {"varlen"}, dense,
        lambda: flash_attn.flash_attn_varlen_func(
            dense.q[0], dense.k[0], dense.v[0], cu_q, cu_k, 65, 129, causal=True, return_softmax_lse=True
        ),
    )  # fmt: skip
    if expected is not None:
        assert_same_bits("out", ours[0], expected[0][0])
        assert_same_bits("lse", ours[1], expected[1][0])


def test_packed_forms_equal_plain(path):
    inputs = build(PACKED, device_of(path))
    cu, features = inputs.layout["cu_seqlens_q"], PACKED.features
    expected = on_path(path, features, inputs, inputs.call)
    qkv = torch.stack((inputs.q, inputs.k, inputs.v), dim=1)
    by_qkv = on_path(
        path, features, inputs,
        lambda: flash_attn.flash_attn_varlen_qkvpacked_func(qkv, cu, 33, causal=True),
    )  # fmt: skip
    by_kv = on_path(
        path, features, inputs,
        lambda: flash_attn.flash_attn_varlen_kvpacked_func(inputs.q, qkv[:, 1:], cu, cu, 33, 33, causal=True),
    )  # fmt: skip
    if expected is not None:
        assert_same_bits("qkvpacked", by_qkv, expected[0])
        assert_same_bits("kvpacked", by_kv, expected[0])


def test_page_size_does_not_matter(path):
    """The same logical keys in pages of any size give the oracle's values, and nearly each other's."""
    results = []
    for page in (1, 3, 16, 64, 256):
        case = Case("pages", "the same numbers", "varlen", (9, 1), (70, 70), seqused_k=(70, 33), page=page)
        inputs = build(case, device_of(path))
        result = on_path(path, case.features, inputs, inputs.call)
        if result is not None:
            results.append(result)
    for out, lse in results[1:]:
        torch.testing.assert_close(out, results[0][0])
        torch.testing.assert_close(lse, results[0][1])
