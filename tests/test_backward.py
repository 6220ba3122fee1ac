"""Gradients of dense calls on every path, against the oracle's autograd."""

from dataclasses import replace

import cases
import pytest
import torch
from cases import BF16, FP16, FP32, FP64, Case
from checks import check_backward, gradients_of_a_loss
from harness import build, device_of, on_path
from tolerance import assert_same_bits

import flash_attn

TINY = Case("tiny-fp64", "for gradcheck", "dense", (3,), (5,), heads=(2, 1), dims=(4, 3), dtype=FP64)
SMALL = Case("small-grad", "one call to vary", "dense", (17, 17), (33, 33), heads=(4, 2), causal=True)
GENERAL = replace(
    TINY, id="general-grad", reason="all of the score", window=(2, 1), softcap=1.5, alibi="heads", sinks=FP64
)
DTYPES = [
    Case(f"grad-{str(dtype)[6:]}{'-causal' * causal}", "every dtype", "dense", (65, 65), (97, 97), heads=(4, 2),
         dtype=dtype, causal=causal, lse_grad=causal)
    for dtype in (BF16, FP16, FP32, FP64)
    for causal in (False, True)
]  # fmt: skip


@pytest.mark.parametrize("case", cases.FORWARD + DTYPES, ids=lambda case: case.id)
def test_backward(path, case):
    check_backward(path, case)


def _leaves(case, path):
    inputs, wanted = build(case, device_of(path)).leaves()
    return inputs, list(wanted.values())


def test_only_what_is_wanted_gets_a_gradient(path):
    inputs = build(SMALL, device_of(path))
    everything, all_leaves = _leaves(SMALL, path)

    def run():
        weight = torch.ones_like(inputs.q)
        expected = torch.autograd.grad(everything.call()[0], all_leaves, weight)
        for index, name in enumerate("qkv"):
            leaf = getattr(inputs, name).clone().requires_grad_()
            out = replace(inputs, **{name: leaf}).call()[0]
            out.backward(weight)
            assert_same_bits(f"d{name}", leaf.grad, expected[index])
        return True

    on_path(path, SMALL.features | {"backward"}, inputs, run)


def test_gradient_through_lse_alone(path):
    """Out is unused: the gradient has to come through LSE."""
    case = replace(TINY, id="lse-alone", dims=(16, 16), dtype=BF16 if path != "cpu" else FP64)
    inputs, leaves = _leaves(case, path)

    def run():
        dq, dk, dv = torch.autograd.grad(inputs.call()[1].sum(), leaves, allow_unused=True)
        assert dv is None or (dv == 0).all()
        oracle, exact = inputs.leaves(FP64)
        expected = torch.autograd.grad(oracle.expected().lse.sum(), [exact["q"], exact["k"]])
        tolerance = {"rtol": 1e-10, "atol": 1e-12} if case.dtype is FP64 else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(dq.double().cpu(), expected[0], **tolerance)
        torch.testing.assert_close(dk.double().cpu(), expected[1], **tolerance)
        return True

    on_path(path, case.features | {"backward"}, inputs, run)


@pytest.mark.parametrize("case", [TINY, GENERAL], ids=lambda case: case.id)
def test_gradcheck(case):
    """Float64 through torch's own numerical check, on the CPU path, without the oracle."""
    inputs, leaves = _leaves(case, "cpu")
    names = ["q", "k", "v", "s_aux"][: len(leaves)]

    def call(*tensors):
        given = dict(zip(names, tensors, strict=True))
        score = dict(inputs.score, s_aux=given.get("s_aux"))
        return replace(inputs, q=given["q"], k=given["k"], v=given["v"], score=score).call()

    assert torch.autograd.gradcheck(call, leaves)


def test_double_backward_raises():
    inputs, leaves = _leaves(TINY, "cpu")
    out, _ = inputs.call()
    with pytest.raises(NotImplementedError):
        (dq,) = torch.autograd.grad(out.sum(), leaves[:1], create_graph=True)
        torch.autograd.grad(dq.sum(), leaves[:1])


def test_gradient_of_a_non_contiguous_dout(path):
    inputs, leaves = _leaves(SMALL, path)
    dout = torch.randn(2, 4, 64, 17, generator=torch.Generator().manual_seed(1)).to(SMALL.dtype)
    dout = dout.to(device_of(path)).permute(0, 3, 1, 2)

    def run():
        strided = torch.autograd.grad(inputs.call()[0], leaves, dout)
        plain = torch.autograd.grad(inputs.call()[0], leaves, dout.contiguous())
        expanded = torch.autograd.grad(inputs.call()[0].sum(), leaves)
        ones = torch.autograd.grad(inputs.call()[0], leaves, torch.ones_like(dout).contiguous())
        for name, *pairs in zip("qkv", strided, plain, expanded, ones, strict=True):
            assert_same_bits(f"d{name}", pairs[0], pairs[1])
            assert_same_bits(f"d{name} of a sum", pairs[2], pairs[3])
        return True

    on_path(path, SMALL.features | {"backward"}, inputs, run)


def test_packed_gradients(path):
    case = replace(SMALL, id="packed-grad", lens_k=SMALL.lens_q, heads=(2, 2))
    inputs, leaves = _leaves(case, path)

    def run():
        weight = torch.ones_like(inputs.q)
        expected = torch.stack(torch.autograd.grad(inputs.call()[0], leaves, weight), dim=2)
        qkv = torch.stack([leaf.detach() for leaf in leaves], dim=2).requires_grad_()
        (packed,) = torch.autograd.grad(flash_attn.flash_attn_qkvpacked_func(qkv, causal=True), qkv, weight)
        assert_same_bits("dqkv", packed, expected)
        kv = qkv.detach()[:, :, 1:].clone().requires_grad_()
        q = inputs.q.detach().clone().requires_grad_()
        out = flash_attn.flash_attn_kvpacked_func(q, kv, causal=True)
        dq, dkv = torch.autograd.grad(out, (q, kv), weight)
        assert_same_bits("dq", dq, expected[:, :, 0])
        assert_same_bits("dkv", dkv, expected[:, :, 1:])
        return True

    on_path(path, case.features | {"backward"}, inputs, run)


@pytest.mark.parametrize("deterministic", [False, True])
def test_backward_twice_is_bitwise_equal(path, deterministic):
    """Always true of the CPU path; of a GPU path where asked for."""
    if path != "cpu" and not deterministic:
        pytest.skip("a GPU path may add in any order unless deterministic=True")
    inputs = build(SMALL, device_of(path))

    def run():
        first, second = (gradients_of_a_loss(inputs, deterministic=deterministic) for _ in range(2))
        for name, gradient in first.items():
            assert_same_bits(name, gradient, second[name])
        return True

    on_path(path, SMALL.features | {"backward"}, inputs, run)


def test_no_graph_without_requires_grad():
    inputs = build(SMALL)
    out, lse = inputs.call()
    assert not out.requires_grad and not lse.requires_grad
    leafy, _ = inputs.leaves()
    with torch.no_grad():
        assert not leafy.call()[0].requires_grad
    assert leafy.call()[0].requires_grad
