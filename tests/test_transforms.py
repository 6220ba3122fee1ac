"""Attention under torch.func, torch.vmap and forward-mode differentiation, on every path: it refuses."""

import pytest
import torch
from cases import Case
from harness import build, device_of, on_path
from valid_calls import APPEND, COMBINE, ROTARY

import flash_attn

SMALL = Case("small-transforms", "one call to vary", "dense", (33, 33), (50, 50), heads=(4, 2), causal=True)

TRANSFORMS = {
    "grad": lambda attention, q: torch.func.grad(lambda x: attention(x).float().sum())(q),
    "jvp": lambda attention, q: torch.func.jvp(attention, (q,), (q,)),
    "jacrev": lambda attention, q: torch.func.jacrev(attention)(q),
    "vmap": lambda attention, q: torch.vmap(attention)(torch.stack((q, q))),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_are_refused(path, transform):
    inputs = build(SMALL, device_of(path))

    def run():
        what = "vmap" if transform == "vmap" else "torch.func"
        with pytest.raises(NotImplementedError, match=f"attention.*{what}|no batching rule for torch.{what}"):
            TRANSFORMS[transform](lambda q: flash_attn.flash_attn_func(q, inputs.k, inputs.v, causal=True), inputs.q)
        return True

    on_path(path, SMALL.features, inputs, run)


@pytest.mark.parametrize("transform", ["jvp", "jacfwd"])
def test_compiled_forward_mode_is_refused(path, transform):
    """torch would make the tangent 0."""
    inputs = build(SMALL, device_of(path))

    def differentiated(q):
        def attention(x):
            return flash_attn.flash_attn_func(x, inputs.k, inputs.v, causal=True)

        return torch.func.jvp(attention, (q,), (q,)) if transform == "jvp" else torch.func.jacfwd(attention)(q)

    def run():
        with pytest.raises(Exception, match="attention has no rule for torch.func.grad, torch.func.jvp"):
            torch.compile(differentiated, backend="eager")(inputs.q)
        return True

    on_path(path, SMALL.features, inputs, run)


def test_forward_mode_is_refused(path):
    inputs = build(SMALL, device_of(path))

    def run():
        with torch.autograd.forward_ad.dual_level():
            q = torch.autograd.forward_ad.make_dual(inputs.q, inputs.q)
            with pytest.raises(NotImplementedError, match="forward-mode"):
                flash_attn.flash_attn_func(q, inputs.k, inputs.v, causal=True)
        return True

    on_path(path, SMALL.features, inputs, run)


@pytest.mark.parametrize("of", ["out", "lse"])
def test_gradients_lose_no_tangent(path, of):
    """Of the gradient that comes in: q, k and v have none."""
    inputs = build(SMALL, device_of(path))

    def run():
        q = inputs.q.detach().requires_grad_()
        out, lse = flash_attn.flash_attn_func(q, inputs.k, inputs.v, causal=True, return_softmax_lse=True)
        result = {"out": out, "lse": lse}[of]
        with torch.autograd.forward_ad.dual_level():
            incoming = torch.autograd.forward_ad.make_dual(torch.ones_like(result), torch.ones_like(result))
            with pytest.raises(NotImplementedError, match="forward-mode"):
                torch.autograd.grad(result, q, incoming)
        return True

    on_path(path, SMALL.features | {"backward"}, inputs, run)


def test_a_call_without_tangents_runs_within_forward_mode(path):
    """As that of a frozen encoder, before the model that is differentiated."""
    inputs = build(SMALL, device_of(path))

    def run():
        q = inputs.q.detach().requires_grad_()

        def differentiated():
            out = flash_attn.flash_attn_func(q, inputs.k, inputs.v, causal=True)
            return out, *torch.autograd.grad(out, q, torch.ones_like(out))

        expected = differentiated()
        with torch.autograd.forward_ad.dual_level():
            assert all(map(torch.equal, differentiated(), expected))
        return True

    on_path(path, SMALL.features | {"backward"}, inputs, run)


def _forward_mode(function, x):
    with torch.autograd.forward_ad.dual_level():
        return function(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.parametrize("transform", [*TRANSFORMS, "forward-mode"])
@pytest.mark.parametrize(
    "valid, name, written",
    [(COMBINE, "out_partial", ()), (COMBINE, "lse_partial", ()), (APPEND, "k", ("k_cache", "v_cache"))]
    + [(ROTARY, "q", ("k_cache", "v_cache"))],
    ids=["combine", "combine-lse", "append", "rotary"],
)
def test_transforms_are_refused_by_all(valid, name, written, transform):
    """None of these loses a tangent, and no cache is written before."""
    function, arguments = valid
    arguments = arguments | {name: arguments[name].clone() for name in written}
    before = {name: arguments[name].clone() for name in written}

    def call(x):
        result = function(**{**arguments, name: x})
        return result[0] if isinstance(result, tuple) else result

    with pytest.raises(NotImplementedError):
        TRANSFORMS.get(transform, _forward_mode)(call, arguments[name])
    if (name, transform) != ("q", "vmap"):  # which k has no part in
        assert all(torch.equal(arguments[name], cache) for name, cache in before.items())
