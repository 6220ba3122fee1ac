"""Gradients on every path, against the oracle's autograd; any strides of what arrives from above."""

from dataclasses import replace

import cases
import pytest
import torch
from cases import BF16, FP16, FP32, FP64, Case
from checks import check_backward, gradients_of_a_loss
from harness import build, device_of, on_path
from memory import Memory, place
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


@pytest.mark.parametrize("case", cases.FORWARD + DTYPES + cases.BACKWARD, ids=lambda case: case.id)
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
        expected = torch.autograd.grad(everything.call(deterministic=True)[0], all_leaves, weight)
        for index, name in enumerate("qkv"):
            leaf = getattr(inputs, name).clone().requires_grad_()
            out = replace(inputs, **{name: leaf}).call(deterministic=True)[0]
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
        torch.testing.assert_close(dq.double().cpu(), expected[0].cpu(), **tolerance)
        torch.testing.assert_close(dk.double().cpu(), expected[1].cpu(), **tolerance)
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


# ---- Strides of what arrives from above -------------------------------------------------------------------------

PLAIN_ORDER = (0, 1, 2, 3)
DOUTS = {
    "heads-first": Memory((0, 2, 1, 3)),
    "rows-innermost": Memory((0, 2, 3, 1)),
    "head-dim-outermost": Memory((3, 0, 1, 2)),
    "misaligned": Memory(PLAIN_ORDER, offset=1),
    "gaps-in-head-dim": Memory(PLAIN_ORDER, step=(3, 2)),
    "gaps-in-rows": Memory(PLAIN_ORDER, step=(1, 3)),
    "stride-0-batch": Memory(PLAIN_ORDER, expanded=0),
    "stride-0-row": Memory(PLAIN_ORDER, expanded=1),
    "stride-0-head": Memory(PLAIN_ORDER, expanded=2),
    "stride-0-head-dim": Memory(PLAIN_ORDER, expanded=3),
}  # fmt: skip


def _assert_strides_change_no_bit(path, case, inputs, leaves, dout):
    def run():
        strided = torch.autograd.grad(inputs.call(deterministic=True)[0], leaves, dout)
        plain = dout.clone(memory_format=torch.contiguous_format)
        plain = torch.autograd.grad(inputs.call(deterministic=True)[0], leaves, plain)
        for name, *pair in zip("qkv", strided, plain, strict=True):
            assert_same_bits(f"d{name}", *pair)
        return True

    on_path(path, case.features | {"backward"}, inputs, run)


@pytest.mark.parametrize("dims", [(64, 64), (40, 24), (128, 33)], ids=str)
@pytest.mark.parametrize("layout", DOUTS)
def test_dout_of_any_strides(path, layout, dims):
    """The same bits as from a contiguous dout; memory between its elements holds NaN."""
    case = replace(SMALL, id=f"dout-{dims}", dims=dims)
    inputs, leaves = _leaves(case, path)
    dout = torch.randn(2, 17, 4, dims[1], generator=torch.Generator().manual_seed(1)).to(case.dtype)
    dout = place(dout.to(device_of(path)), DOUTS[layout])

    _assert_strides_change_no_bit(path, case, inputs, leaves, dout)


@pytest.mark.parametrize("expanded", [0, None], ids=["stride-0", "heads-first"])
def test_dout_of_packed_sequences_of_any_strides(path, expanded):
    case = Case("dout-varlen", "packed", "varlen", (17, 0, 40), (33, 5, 40), heads=(4, 2), causal=True)
    inputs, leaves = _leaves(case, path)
    dout = torch.randn(57, 4, 64, generator=torch.Generator().manual_seed(1)).to(case.dtype)
    dout = place(dout.to(device_of(path)), Memory((1, 0, 2), expanded=expanded))

    _assert_strides_change_no_bit(path, case, inputs, leaves, dout)


def test_gradient_of_a_sum_is_that_of_ones(path):
    """sum() sends down one number whose every stride is 0, through out and through LSE."""
    inputs, leaves = _leaves(SMALL, path)

    def run():
        out, lse = inputs.call(deterministic=True)
        ones = torch.ones_like(out), torch.ones_like(lse, memory_format=torch.contiguous_format)
        expected = torch.autograd.grad((out, lse), leaves, ones)
        out, lse = inputs.call(deterministic=True)
        for name, *pair in zip("qkv", torch.autograd.grad(out.sum() + lse.sum(), leaves), expected, strict=True):
            assert_same_bits(f"d{name}", *pair)
        return True

    on_path(path, SMALL.features | {"backward"}, inputs, run)


def test_dlse_of_any_strides(path):
    inputs, leaves = _leaves(SMALL, path)
    dlse = torch.randn(17, 2, 4, generator=torch.Generator().manual_seed(1)).to(device_of(path)).permute(1, 2, 0)

    def run():
        strided = torch.autograd.grad(inputs.call(deterministic=True)[1], leaves[:2], dlse)
        plain = torch.autograd.grad(inputs.call(deterministic=True)[1], leaves[:2], dlse.contiguous())
        for name, *pair in zip("qk", strided, plain, strict=True):
            assert_same_bits(f"d{name}", *pair)
        return True

    on_path(path, SMALL.features | {"backward"}, inputs, run)


# ---- Packed forms -----------------------------------------------------------------------------------------------


def test_packed_gradients(path):
    case = replace(SMALL, id="packed-grad", lens_k=SMALL.lens_q, heads=(2, 2))
    inputs, leaves = _leaves(case, path)
    options = {"causal": True, "deterministic": True}

    def run():
        weight = torch.ones_like(inputs.q)
        expected = torch.stack(torch.autograd.grad(inputs.call(deterministic=True)[0], leaves, weight), dim=2)
        qkv = torch.stack([leaf.detach() for leaf in leaves], dim=2).requires_grad_()
        (packed,) = torch.autograd.grad(flash_attn.flash_attn_qkvpacked_func(qkv, **options), qkv, weight)
        assert_same_bits("dqkv", packed, expected)
        kv = qkv.detach()[:, :, 1:].clone().requires_grad_()
        q = inputs.q.detach().clone().requires_grad_()
        out = flash_attn.flash_attn_kvpacked_func(q, kv, **options)
        dq, dkv = torch.autograd.grad(out, (q, kv), weight)
        assert_same_bits("dq", dq, expected[:, :, 0])
        assert_same_bits("dkv", dkv, expected[:, :, 1:])
        return True

    on_path(path, case.features | {"backward"}, inputs, run)


def test_packed_gradients_of_packed_sequences(path):
    case = Case("packed-varlen-grad", "both packings", "varlen", (17, 0, 40), (17, 0, 40), heads=(3, 3), causal=True)
    inputs, leaves = _leaves(case, path)
    cu, options = inputs.layout["cu_seqlens_q"], {"causal": True, "deterministic": True}

    def run():
        weight = torch.ones_like(inputs.q)
        expected = torch.stack(torch.autograd.grad(inputs.call(deterministic=True)[0], leaves, weight), dim=1)
        qkv = torch.stack([leaf.detach() for leaf in leaves], dim=1).requires_grad_()
        out = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, cu, 40, **options)
        assert_same_bits("dqkv", torch.autograd.grad(out, qkv, weight)[0], expected)
        q, kv = qkv.detach()[:, 0].clone().requires_grad_(), qkv.detach()[:, 1:].clone().requires_grad_()
        out = flash_attn.flash_attn_varlen_kvpacked_func(q, kv, cu, cu, 40, 40, **options)
        dq, dkv = torch.autograd.grad(out, (q, kv), weight)
        assert_same_bits("dq", dq, expected[:, 0])
        assert_same_bits("dkv", dkv, expected[:, 1:])
        return True

    on_path(path, case.features | {"backward"}, inputs, run)


@pytest.mark.parametrize("form", ["none", "larger"])
def test_max_seqlen_is_only_a_bound(path, form):
    case = Case("bound-grad", "hints change nothing", "varlen", (17, 0, 140), (40, 5, 133), heads=(4, 2), causal=True)
    inputs = build(case, device_of(path))
    longest = {"none": (None, None), "larger": (500, 4096)}[form]
    bounds = dict(zip(("max_seqlen_q", "max_seqlen_k"), longest, strict=True))

    def run():
        expected = gradients_of_a_loss(inputs)
        for name, gradient in gradients_of_a_loss(inputs, **bounds).items():
            assert_same_bits(name, gradient, expected[name])
        return True

    on_path(path, case.features | {"backward"}, inputs, run)
