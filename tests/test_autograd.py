"""Attention as a citizen of autograd, on every path: modes, checkpoints, hooks and autocast."""

from dataclasses import replace

import pytest
import torch
from cases import BF16, FP16, Case
from checks import gradients_of_a_loss
from harness import build, device_of, on_path
from tolerance import assert_same_bits
from torch.utils.checkpoint import checkpoint

import flash_attn

SMALL = Case("small-autograd", "one call to vary", "dense", (33, 33), (50, 50), heads=(4, 2), causal=True)
DROPOUT = replace(SMALL, id="dropout-autograd", dropout_p=0.3)


def _attend(q, k, v, **options):
    return flash_attn.flash_attn_func(q, k, v, causal=True, deterministic=True, **options)


def _leaves(case, path):
    inputs, wanted = build(case, device_of(path)).leaves()
    return inputs, list(wanted.values())


def _loss(out):
    return out.float().square().sum()


def _assert_same_gradients(ours, expected):
    for name, *pair in zip("qkv", ours, expected, strict=True):
        assert_same_bits(f"d{name}", *pair)


# ---- Modes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_graph_where_none_is_wanted(path, mode):
    inputs, leaves = _leaves(SMALL, path)
    features = SMALL.features

    def run():
        with mode():
            out, lse = inputs.call()
        assert not out.requires_grad and out.grad_fn is None and not lse.requires_grad
        return out

    out = on_path(path, features, inputs, run)
    plain = build(SMALL, device_of(path))
    result = on_path(path, features, plain, plain.call)
    if result is not None:
        assert not result[0].requires_grad and not result[1].requires_grad
        assert_same_bits("out", result[0], out)


def test_a_graph_where_one_is_wanted(path):
    """The forward pass is the same whether or not a gradient is wanted."""
    inputs, leaves = _leaves(SMALL, path)
    plain = build(SMALL, device_of(path))
    expected = on_path(path, SMALL.features, plain, plain.call)
    result = on_path(path, SMALL.features | {"backward"}, inputs, inputs.call)
    if result is not None:
        assert result[0].requires_grad and result[1].requires_grad
        assert_same_bits("out", result[0].detach(), expected[0])
        assert_same_bits("lse", result[1].detach(), expected[1])


def test_a_graph_can_be_used_twice(path):
    inputs, leaves = _leaves(DROPOUT, path)

    def run():
        loss = _loss(inputs.call(deterministic=True)[0])
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        _assert_same_gradients(torch.autograd.grad(loss, leaves), first)
        return True

    on_path(path, DROPOUT.features | {"backward"}, inputs, run)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("of", ["out", "lse"])
def test_many_gradients_at_once(path, of):
    inputs, leaves = _leaves(SMALL, path)

    def run():
        out = _attend(*leaves, return_attn_probs=True)[of == "lse"]
        given = torch.randn(3, *out.shape, dtype=out.dtype, device=out.device)
        ours = torch.autograd.grad(out, leaves, given, retain_graph=True, is_grads_batched=True)
        expected = [torch.autograd.grad(out, leaves, one, retain_graph=True) for one in given]
        _assert_same_gradients(ours, [torch.stack(grads) for grads in zip(*expected, strict=True)])
        return True

    on_path(path, SMALL.features | {"backward"}, inputs, run)


def test_gradients_accumulate(path):
    inputs, leaves = _leaves(SMALL, path)

    def run():
        once = torch.autograd.grad(_loss(inputs.call(deterministic=True)[0]), leaves)
        for _ in range(2):
            _loss(inputs.call(deterministic=True)[0]).backward()
        _assert_same_gradients([leaf.grad for leaf in leaves], [gradient + gradient for gradient in once])
        return True

    on_path(path, SMALL.features | {"backward"}, inputs, run)


def test_overwritten_inputs_are_noticed(path):
    inputs, leaves = _leaves(SMALL, path)

    def run():
        out = inputs.call()[0]
        with torch.no_grad():
            leaves[1].add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
        return True

    on_path(path, SMALL.features | {"backward"}, inputs, run)


@pytest.mark.parametrize("changes", [{}, {"causal": False}, {"softcap": 2.0}, {"window": (3, 0)}], ids=str)
def test_the_result_may_be_changed_in_place(path, changes):
    """By whoever takes no gradient of it."""
    case = replace(SMALL, id="in-place", **changes)
    inputs, _ = _leaves(case, path)

    def run():
        out = inputs.call()[0]
        expected = out.detach() * 2
        out *= 2
        assert_same_bits("out", out.detach(), expected)
        return True

    on_path(path, case.features | {"backward"}, inputs, run)


def test_second_derivative_raises(path):
    inputs, leaves = _leaves(SMALL, path)

    def run():
        (dq,) = torch.autograd.grad(_loss(inputs.call()[0]), leaves[:1], create_graph=True)
        with pytest.raises(NotImplementedError, match="attention has no second derivative"):
            dq.float().sum().backward()
        return True

    on_path(path, SMALL.features | {"backward"}, inputs, run)


# ---- Checkpoints and hooks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("case", [SMALL, DROPOUT], ids=lambda case: case.id)
def test_checkpointing(path, case, reentrant):
    """The forward pass runs twice and draws one dropout mask."""
    inputs, leaves = _leaves(case, path)

    def gradients(attention):
        torch.manual_seed(0)
        return torch.autograd.grad(_loss(attention(*leaves)), leaves)

    def attention(q, k, v):
        with flash_attn.use_path(path):  # the second time in autograd's thread
            return _attend(q, k, v, dropout_p=case.dropout_p)

    def checkpointed(*tensors):
        return checkpoint(attention, *tensors, use_reentrant=reentrant)

    def reentrant_gradients():
        torch.manual_seed(0)
        _loss(checkpointed(*leaves)).backward()  # torch.autograd.grad is not for reentrant checkpoints
        return [leaf.grad for leaf in leaves]

    def run():
        ours = reentrant_gradients() if reentrant else gradients(checkpointed)
        _assert_same_gradients(ours, gradients(attention))
        return True

    on_path(path, case.features | {"backward"}, inputs, run)


def test_saved_tensors_may_move(path):
    """Offloading: what is saved goes to the host and comes back as other tensors."""
    inputs, leaves = _leaves(DROPOUT, path)

    def run():
        expected = torch.autograd.grad(_loss(inputs.call(deterministic=True)[0]), leaves)
        with torch.autograd.graph.save_on_cpu():
            out = inputs.call(deterministic=True)[0]
        _assert_same_gradients(torch.autograd.grad(_loss(out), leaves), expected)
        return True

    on_path(path, DROPOUT.features | {"backward"}, inputs, run)


def test_a_mode_sees_the_ops(path):
    """Tracers, profilers of operations and selective checkpoints work through dispatch modes."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    inputs, leaves = _leaves(SMALL, path)
    seen = []

    def run():
        expected = torch.autograd.grad(_loss(inputs.call(deterministic=True)[0]), leaves)
        with Record():
            ours = torch.autograd.grad(_loss(inputs.call(deterministic=True)[0]), leaves)
        prefix = "flash_attn.cpu_" if path == "cpu" else "flash_attn."
        assert f"{prefix}forward.default" in seen and f"{prefix}backward.default" in seen
        _assert_same_gradients(ours, expected)
        return True

    on_path(path, SMALL.features | {"backward"}, inputs, run)


# ---- Autocast ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_autocast(path, dtype):
    """Weights in float32, attention in 16 bits because its inputs come from autocast's products, their gradients
    in float32; the backward pass runs outside the region, as autograd's rule is."""
    device = device_of(path)
    anchor = build(replace(SMALL, dtype=dtype), device)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 33, 32, generator=generator).to(device)
    weights = [(torch.randn(3 * 64, 32, generator=generator) * 0.2).to(device).requires_grad_()]

    def gradient(attention, wide=False):
        with torch.autocast(device, dtype=dtype, enabled=not wide):
            qkv = torch.nn.functional.linear(x, weights[0]).unflatten(-1, (3, 2, 32))
            out = attention(*qkv.unbind(2))
        assert out.dtype is (torch.float32 if wide else dtype)
        (found,) = torch.autograd.grad(_loss(out), weights)
        return found

    def plain(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(
            *(tensor.transpose(1, 2) for tensor in (q, k, v)), is_causal=True
        ).transpose(1, 2)

    def run():
        ours, exact = gradient(_attend), gradient(plain, wide=True)
        assert ours.dtype is torch.float32
        naive = gradient(plain)
        error, naive_error = ((found - exact).abs().max().item() for found in (ours, naive))
        assert error <= 2 * naive_error + torch.finfo(dtype).eps * exact.abs().max().item()
        return True

    on_path(path, (SMALL.features - {"gqa"}) | {"backward"}, anchor, run)


@pytest.mark.parametrize("options", [{"softcap": 5.0}, {"dropout_p": 0.3}, {}], ids=str)
def test_autocast_changes_no_bit(path, options):
    """Inputs have the dtype that they have, and what a path widens stays wide."""
    inputs = build(replace(SMALL, id=f"autocast-{options}", **options), device_of(path))

    def run():
        expected = gradients_of_a_loss(inputs), inputs.call()
        with torch.autocast(inputs.q.device.type, dtype=BF16):
            ours = gradients_of_a_loss(inputs), inputs.call()
        _assert_same_gradients(ours[0].values(), expected[0].values())
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(ours[1], expected[1], strict=True))
        return True

    on_path(path, inputs.case.features | {"backward"}, inputs, run)


def test_negative_views(path):
    """Tensors whose memory holds the negatives of their values."""
    inputs, (q, k, v) = _leaves(SMALL, path)

    def run():
        for negated in (0, 1, 2):
            views = [torch._neg_view(x) if i == negated else x for i, x in enumerate((q, k, v))]
            signs = [-1 if i == negated else 1 for i in range(3)]
            out = _attend(*views)
            expected = _attend(*(sign * x for sign, x in zip(signs, (q, k, v), strict=True)))
            assert torch.equal(out, expected)
            dout = torch.ones_like(out)
            ours = torch.autograd.grad(out, (q, k, v), torch._neg_view(dout))
            _assert_same_gradients(ours, torch.autograd.grad(expected, (q, k, v), -dout))
        return True

    on_path(path, SMALL.features | {"backward"}, inputs, run)


@pytest.mark.parametrize("name", ["s_aux", "alibi_slopes"])
def test_negative_views_of_scores(path, name):
    inputs, leaves = _leaves(SMALL, path)
    values = torch.linspace(0.2, 1.0, 4, device=device_of(path))

    def run():
        ours, expected = (_attend(*leaves, **{name: x}) for x in (torch._neg_view(values), -values))
        assert torch.equal(ours, expected)
        dout = torch.ones_like(ours)
        _assert_same_gradients(*(torch.autograd.grad(out, leaves, dout) for out in (ours, expected)))
        return True

    on_path(path, SMALL.features | {"backward", {"s_aux": "sinks", "alibi_slopes": "alibi"}[name]}, inputs, run)


# ---- Others -------------------------------------------------------------------------------------------------------


def test_slopes_gradient_is_refused(path):
    """ALiBi's slopes have no gradient: asked for one, the call says so instead of leaving it out."""
    inputs = build(SMALL, device_of(path))
    slopes = torch.ones(4, device=device_of(path), requires_grad=True)

    def run():
        with pytest.raises((ValueError, NotImplementedError), match="alibi_slopes"):
            _attend(inputs.q, inputs.k, inputs.v, alibi_slopes=slopes)
        return True

    on_path(path, SMALL.features | {"alibi"}, inputs, run)


def test_gradients_in_a_thread_of_their_own(path):
    """Data-parallel code runs whole steps in threads; the forced path and the mask belong to the caller's."""
    import threading

    inputs = build(SMALL, device_of(path))
    found = []

    def work():
        with flash_attn.use_path(path):
            found.append(gradients_of_a_loss(inputs))

    def run():
        expected = gradients_of_a_loss(inputs)
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 3
        for gradients in found:
            _assert_same_gradients(gradients.values(), expected.values())
        return True

    on_path(path, SMALL.features | {"backward"}, inputs, run)
