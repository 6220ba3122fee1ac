"""The single passes of flash_attn.flash_attn_interface and flash_attn_2_cuda: their values, on every path."""

import math
import zlib

import cases
import pytest
import torch
from cases import BF16, FP32, FP64, Case
from checks import (
    Answer,
    Gradients,
    assert_gradients_right,
    assert_right,
    declared_answers,
    declared_gradients,
    output_gradients,
)
from harness import build, device_of, on_path
from tolerance import assert_same_bits
from torch.utils._python_dispatch import TorchDispatchMode
from valid_calls import CU_K, CU_Q, K, Q, V, grad, i32, rand

import flash_attn
import flash_attn_2_cuda
from flash_attn import _dispatch
from flash_attn import flash_attn_interface as fi

CASES = [
    Case("fa2-gqa-causal", "grouped heads", "dense", (65, 65), (80, 80), heads=(4, 2), causal=True),
    Case("fa2-window-dims", "head dims that differ and fill no vector", "dense", (33,), (70,), dims=(41, 24),
         window=(20, 3), scale=-0.2),
    Case("fa2-softcap-unseen", "rows that see no key", "dense", (40,), (20,), softcap=3.0, causal=True),
    Case("fa2-alibi", "slopes of each entry", "dense", (17, 17), (33, 33), alibi="batch"),
    Case("fa2-dropout", "the mask is drawn once", "dense", (33, 33), (50, 50), heads=(4, 2), dropout_p=0.3),
    Case("fa2-varlen", "an empty sequence", "varlen", (17, 0, 40), (30, 5, 40), heads=(2, 1), causal=True),
    Case("fa2-varlen-alibi-dropout", "all at once", "varlen", (17, 30), (130, 40), alibi="heads", dropout_p=0.2,
         window=(60, 0)),
    Case("fa2-fp32", "a dtype of the CPU path", "dense", (9, 9), (17, 17), dtype=FP32, causal=True),
    Case("fa2-fp64", "whose LSE is float64", "varlen", (9, 3), (17, 1), dtype=FP64),
]  # fmt: skip
FORWARD_ONLY = [
    Case("fa2-seqused", "keys in slots", "varlen", (17, 30), (130, 40), seqused_k=(100, 3)),
    Case("fa2-leftpad", "keys that are left out", "varlen", (17, 30), (130, 40), leftpad=(8, 0)),
    Case("fa2-paged", "a page of any size", "varlen", (17, 30), (130, 40), seqused_k=(100, 3), page=16, causal=True),
]
# dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes
PLAIN = (0.0, 0.2, True, -1, -1, 0.0, None)
by_id = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def seed(case):
    """Dropout's state is then the one that harness.build has put into the oracle."""
    torch.manual_seed(zlib.crc32(case.id.encode()))


def score(inputs):
    case = inputs.case
    scale = case.dims[0] ** -0.5 if case.scale is None else case.scale
    return case.dropout_p, scale, case.causal, *case.window, case.softcap, inputs.score["alibi_slopes"]


def varlen(inputs):
    if inputs.case.layout == "dense":
        return ()
    layout = inputs.layout
    return layout["cu_seqlens_q"], layout.get("cu_seqlens_k"), max(inputs.case.lens_q), max(inputs.case.lens_k)


def forward(inputs, return_softmax=False):
    seed(inputs.case)
    arguments = (inputs.q, inputs.k, inputs.v, *varlen(inputs), *score(inputs), return_softmax)
    if inputs.case.layout == "dense":
        return fi._flash_attn_forward(*arguments)
    places = {name: inputs.layout.get(name) for name in ("block_table", "leftpad_k", "seqused_k")}
    return fi._flash_attn_varlen_forward(*arguments, **places)


def backward(inputs, dout, out, lse, grads, rng_state):
    function = fi._flash_attn_backward if inputs.case.layout == "dense" else fi._flash_attn_varlen_backward
    tensors = (dout.to(inputs.q.device), inputs.q, inputs.k, inputs.v, out, lse)
    return function(*tensors, *grads, *varlen(inputs), *score(inputs), True, rng_state)


def interleaved(tensor):
    """A place for results every other row of which is something else's."""
    buffer = tensor.new_full((*tensor.shape[:-1], 2, tensor.shape[-1]), math.nan)
    return buffer.unbind(-2)


# ---- Values ----


@pytest.mark.parametrize("case", CASES + FORWARD_ONLY, ids=lambda case: case.id)
def test_forward(path, case):
    inputs, _ = build(case, device_of(path)).leaves()
    result = on_path(path, case.features, inputs, lambda: forward(inputs))
    if result is None:
        return
    out, lse, probs, rng_state = result
    assert not (out.requires_grad or lse.requires_grad)
    assert_right(Answer(out, lse, *declared_answers(case, device_of(path))))
    assert probs.numel() == 0 and rng_state.shape == (2,) and rng_state.dtype == torch.int64
    if case.dropout_p > 0:
        assert torch.equal(rng_state, inputs.rng_state)


@by_id
def test_backward_into_given_memory(path, case):
    inputs, _ = build(case, device_of(path)).leaves()
    dout, _ = output_gradients(inputs)
    places, beside = zip(*(interleaved(tensor.detach()) for tensor in (inputs.q, inputs.k, inputs.v)), strict=True)

    def run():
        out, lse, _, rng_state = forward(inputs)
        return out, lse, backward(inputs, dout, out, lse, places, rng_state)

    result = on_path(path, case.features | {"backward"}, inputs, run)
    if result is None:
        return
    out, lse, softmax_d = result
    ours = dict(zip(("dq", "dk", "dv"), places, strict=True))
    assert_gradients_right(Gradients(ours, *declared_gradients(case, device_of(path))))
    assert all(rows.isnan().all() for rows in beside) and not softmax_d.requires_grad
    expected = (dout.double() * out.double().cpu()).sum(-1).movedim(-1, -2)
    assert softmax_d.dtype == lse.dtype and softmax_d.is_contiguous()
    torch.testing.assert_close(softmax_d.cpu().double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["dout", "out"])
def test_dq_in_the_place_of_what_was_read(path, name):
    """softmax_d is of what lay there before."""
    case = Case("fa2-in-place", "memory that is used twice", "dense", (33, 33), (50, 50), causal=True)
    inputs = build(case, device_of(path))
    dout, _ = output_gradients(inputs)

    def run():
        out, lse, _, rng_state = forward(inputs)
        both = []
        for places in ("apart", "together"):
            read = {"dout": dout.to(out.device, copy=True), "out": out.clone()}
            dq = torch.empty_like(inputs.q) if places == "apart" else read[name]
            both.append((backward(inputs, *read.values(), lse, (dq, None, None), rng_state), dq))
        return both

    result = on_path(path, case.features | {"backward"}, inputs, run)
    if result is None:
        return
    for what, apart, together in zip(("softmax_d", "dq"), *result, strict=True):
        assert_same_bits(what, together, apart)


@by_id
@pytest.mark.parametrize("given", [(), ("dk",)], ids=["none", "dk"])
def test_backward_into_new_memory(path, case, given):
    """The bits don't depend on where the gradients go."""
    inputs = build(case, device_of(path))
    dout, _ = output_gradients(inputs)
    dout, leaves = dout.to(inputs.q.device), {"dq": inputs.q, "dk": inputs.k, "dv": inputs.v}
    dropout_p, *others, softcap, slopes = score(inputs)
    lengths = varlen(inputs)

    def bwd(places, out, lse, rng_state):
        tensors = (dout, inputs.q, inputs.k, inputs.v, out, lse, *places)
        rest = (softcap, True, None, rng_state)
        if not lengths:
            return flash_attn_2_cuda.bwd(*tensors, slopes, dropout_p, *others, *rest)
        numbers = (*lengths[2:], dropout_p, others[0], True)
        return flash_attn_2_cuda.varlen_bwd(*tensors, *lengths[:2], slopes, *numbers, *others[1:], *rest)

    def run():
        out, lse, _, rng_state = forward(inputs)
        state = rng_state if dropout_p > 0 else None
        everything = [torch.full_like(leaf, math.nan) for leaf in leaves.values()]
        expected = bwd(everything, out, lse, state)
        assert all(ours is place for ours, place in zip(expected[:3], everything, strict=True))
        places = [torch.full_like(leaf, math.nan) if name in given else None for name, leaf in leaves.items()]
        ours = bwd(places, out, lse, state)
        assert all(place is None or place is got for got, place in zip(ours[:3], places, strict=True))
        for name, left, right in zip((*leaves, "softmax_d"), ours, expected, strict=True):
            assert_same_bits(name, left, right)
        return True

    on_path(path, case.features | {"backward"}, inputs, run)


class RecordOps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.arguments = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.arguments[op.__name__] = args
        return op(*args, **(kwargs or {}))


def test_kernels_write_given_memory_themselves(path):
    inputs = build(CASES[0], device_of(path))
    dout, _ = output_gradients(inputs)
    places = [torch.empty_like(tensor) for tensor in (inputs.q, inputs.k, inputs.v)]

    def run():
        out, lse, _, rng_state = forward(inputs)
        with RecordOps() as record:
            backward(inputs, dout, out, lse, places, rng_state)
        return record.arguments

    ops = on_path(path, CASES[0].features | {"backward"}, inputs, run)
    if ops is not None:
        assert ("backward_out.default" in ops) == (path != "cpu") == ("copy_.default" not in ops)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("asked", ["argument", "torch", None])
def test_deterministic(asked, packed):
    tensors, lengths = ((Q[0], K[0], V[0]), (CU_Q, CU_K, 3, 4)) if packed else ((Q, K, V), ())
    forward = fi._flash_attn_varlen_forward if packed else fi._flash_attn_forward
    backward = fi._flash_attn_varlen_backward if packed else fi._flash_attn_backward
    out, lse, *_ = forward(*tensors, *lengths, *PLAIN, False)
    try:
        torch.use_deterministic_algorithms(asked == "torch")
        with RecordOps() as record:
            backward(out, *tensors, out, lse, None, None, None, *lengths, *PLAIN, asked == "argument")
    finally:
        torch.use_deterministic_algorithms(False)
    assert record.arguments["cpu_backward.default"][-1] is (asked is not None)


def test_a_path_is_chosen_for_each_pass(monkeypatch):
    """A backward pass by what it needs itself: its forward pass may have run elsewhere."""
    chosen = []

    def choose_path(q, head_dims, features):
        chosen.append(features)
        return "cpu"

    monkeypatch.setattr(_dispatch, "choose_path", choose_path)
    out, lse, *_ = fi._flash_attn_forward(Q, K, V, *PLAIN, False)
    fi._flash_attn_backward(out, Q, K, V, out, lse, None, None, None, *PLAIN, False)
    assert chosen == [{"dense", "gqa", "causal"}, {"dense", "gqa", "causal", "backward"}]


@pytest.mark.parametrize("name", ["dout", "q", "k", "v", "out", "lse", "dq", "dk", "dv"])
def test_no_tangent_is_lost(name):
    """Of what a backward pass is given. It has written nothing when it refuses."""
    out, lse, *_ = fi._flash_attn_forward(Q, K, V, *PLAIN, False)
    places = {"dq": torch.zeros_like(Q), "dk": torch.zeros_like(K), "dv": torch.zeros_like(V)}
    tensors = {"dout": out, "q": Q, "k": K, "v": V, "out": out, "lse": lse} | places
    with torch.autograd.forward_ad.dual_level():
        tensors[name] = torch.autograd.forward_ad.make_dual(tensors[name], torch.ones_like(tensors[name]))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            fi._flash_attn_backward(*tensors.values(), *PLAIN, False)
    assert not any(place.any() for place in places.values())


@pytest.mark.parametrize("zero_tensors", [False, True])
def test_rows_of_no_sequence(path, zero_tensors):
    """They get out 0, LSE -inf and gradients of 0, whatever they hold; zero_tensors asks for what always is."""
    q, k, v, dout = (rand(24, 2, 64).to(BF16).to(device_of(path)) for _ in range(4))
    for tensor in (q, k, v, dout):
        tensor[20:] = math.nan
    cu = i32(0, 7, 20).to(q.device)
    lengths, options = (cu, cu, 13, 13), (0.0, 0.2, False, -1, -1, 0.0, None)
    grads = [torch.full_like(q, math.nan) for _ in range(3)]
    case = Case("rows", "of no sequence", "varlen", (7, 13), (7, 13))

    def run():
        out, lse, *_ = fi._flash_attn_varlen_forward(q, k, v, *lengths, *options, zero_tensors=zero_tensors)
        assert (out[20:] == 0).all() and (lse[:, 20:] == -math.inf).all() and lse[:, :20].isfinite().all()
        softmax_d = fi._flash_attn_varlen_backward(
            dout, q, k, v, out, lse, *grads, *lengths, *options, False, None, zero_tensors
        )
        for tensor in (*grads, softmax_d.T):
            assert (tensor[20:] == 0).all() and tensor[:20].isfinite().all()
        return True

    on_path(path, case.features | {"backward"}, build(case, q.device), run)


def test_backward_of_a_part_of_the_keys():
    """What rings of GPUs do: out and LSE are those over all keys, dq the sum of the parts' shares."""
    q, k, v, dout = (rand(2, 9, 4, 16).double() for _ in range(4))
    options = (0.0, 0.25, False, -1, -1, 0.0, None)
    parts = list(zip(k.split((4, 5), 1), v.split((4, 5), 1), strict=True))
    results = [fi._flash_attn_forward(q, *part, *options, False)[:2] for part in parts]
    outs, lses = (torch.stack(tensors) for tensors in zip(*results, strict=True))
    out, lse = flash_attn.flash_attn_combine(outs, lses.transpose(-1, -2))
    grads = [[torch.empty_like(x) for x in (q, *part)] for part in parts]
    for part, places in zip(parts, grads, strict=True):
        fi._flash_attn_backward(dout, q, *part, out, lse.transpose(-1, -2), *places, *options, False)
    leaves = [grad(x) for x in (q, k, v)]
    expected = torch.autograd.grad(flash_attn.flash_attn_func(*leaves, softmax_scale=0.25), leaves, dout)
    dqs, dks, dvs = zip(*grads, strict=True)
    for ours, theirs in zip((sum(dqs), torch.cat(dks, 1), torch.cat(dvs, 1)), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


# Its function has no packed queries and no sinks.
CACHED = [case for case in cases.KVCACHE if not (case.varlen_q or case.sinks)]


@pytest.mark.parametrize("case", CACHED, ids=lambda case: case.id)
def test_cache(path, case):
    """20 arguments, as FlashAttention-2's flash_attn_with_kvcache passes them."""
    public, raw = build(case, device_of(path)), build(case, device_of(path))
    expected = on_path(path, case.features, public, public.call)
    out = torch.empty_like(expected[0]) if expected is not None else None
    _, scale, causal, *window, softcap, slopes = score(raw)

    def run():
        layout = raw.layout
        places = (layout.get(name) for name in ("cache_batch_idx", "leftpad_k", "block_table"))
        interleaved = case.rotary is None or case.rotary[1]
        with torch.enable_grad():
            return flash_attn_2_cuda.fwd_kvcache(
                raw.q.requires_grad_(), raw.k, raw.v, raw.new_k, raw.new_v, layout.get("seqused_k"), *raw.rotary,
                *places, slopes, out, scale, causal, *window, softcap, interleaved, raw.extra.get("num_splits", 0),
            )  # fmt: skip

    ours = on_path(path, case.features, raw, run)
    if ours is None:
        return
    assert ours[0] is out and not ours[0].requires_grad
    for name, left, right in zip(("out", "lse"), ours, expected, strict=True):
        assert_same_bits(name, left, right)
    for name in "kv":
        assert_same_bits(f"{name}_cache", getattr(raw, name), getattr(public, name))


def test_random_numbers_come_from_gen():
    raw = (Q, K, V, None, None, 0.5, 0.2, False, -1, -1, 0.0, True)
    gen = torch.Generator()
    torch.manual_seed(3)
    by_default = flash_attn_2_cuda.fwd(*raw, None)
    torch.manual_seed(3)
    public = flash_attn.flash_attn_func(Q, K, V, 0.5, 0.2, return_attn_probs=True)
    by_gen = flash_attn_2_cuda.fwd(*raw, gen.manual_seed(3))
    again = flash_attn_2_cuda.fwd(*raw, gen)
    for name, left, right in zip(("out", "lse", "S_dmask", "rng_state"), by_default, by_gen, strict=True):
        assert_same_bits(name, left, right)
    for name, left, right in zip(("out", "lse", "S_dmask"), by_default[:3], public, strict=True):
        assert_same_bits(name, left, right)
    assert by_gen[2].shape == (2, 4, 128, 128) and not torch.equal(by_gen[3], again[3])
    tensors = (rand(*V.shape[:1], 5, 4, 8), Q, K, V, *by_gen[:2], None, None, None, None, 0.5, 0.2, False, -1, -1, 0.0)
    stated = flash_attn_2_cuda.bwd(*tensors, False, None, by_gen[3])
    drawn = flash_attn_2_cuda.bwd(*tensors, False, gen.manual_seed(3), None)
    for name, left, right in zip(("dq", "dk", "dv", "softmax_d"), stated, drawn, strict=True):
        assert_same_bits(name, left, right)


def test_written_gradients_are_known_to_autograd():
    out, lse, *_ = fi._flash_attn_forward(Q, K, V, *PLAIN, False)
    dq = torch.empty_like(Q)
    kept = grad(Q) * dq
    fi._flash_attn_backward(out, Q, K, V, out, lse, dq, None, None, *PLAIN, False)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.sum().backward()
