"""What only a GPU shows of the backward pass: memory, graphs, streams, launch limits, lying metadata, hard case 1."""

import itertools
import time

import pytest
import torch
from cases import FP32, Case
from harness import build, cumulative, int32, require_features, require_kernels, require_memory
from tolerance import assert_same_bits

import flash_attn
from flash_attn import _dispatch

BF16, FP16 = torch.bfloat16, torch.float16
MIB = 2**20


@pytest.fixture(autouse=True)
def with_backward(gpu_path):
    require_features(gpu_path, "backward")


def _random(*shape, dtype=BF16):
    return torch.randn(shape, device="cuda", dtype=dtype)


def _leaves(*tensors):
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def _gradients(q, k, v, dout, **options):
    leaves = _leaves(q, k, v)
    out = flash_attn.flash_attn_func(*leaves, deterministic=True, **options)
    return torch.autograd.grad(out, leaves, dout)


def _assert_same_gradients(ours, expected, what=""):
    for name, *pair in zip("qkv", ours, expected, strict=True):
        assert_same_bits(f"d{name}{what}", *pair)


# ---- Memory -----------------------------------------------------------------------------------------------------

ROWS_OF_A_TILE = 128  # at most
_BUCKETS = (32, 64, 96, 128, 192, 256, 512)


def documented_workspace_bytes(batch, heads, seqlen_q, head_dim):
    """What README.md says that a backward call allocates beside the three gradients, at most."""
    rows = -(-seqlen_q // ROWS_OF_A_TILE) * ROWS_OF_A_TILE
    bucket = next(b for b in _BUCKETS if head_dim <= b)
    return 4 * batch * heads * rows * (bucket + 4)


def requested_bytes(which):
    """Not what is allocated, which depends on the blocks that other tests have left in the cache."""
    return torch.cuda.memory_stats()[f"requested_bytes.all.{which}"]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("head_dim", [40, 64, 128, 256, 512])
def test_memory_is_what_is_documented_and_linear(gpu_path, head_dim, deterministic):
    require_kernels(gpu_path, _random(1, 1, 1, head_dim), "backward")
    peaks = []
    for seqlen in (2048, 8192):
        q, k, v = _random(1, seqlen, 4, head_dim), _random(1, seqlen, 2, head_dim), _random(1, seqlen, 2, head_dim)
        leaves = _leaves(q, k, v)
        out = flash_attn.flash_attn_func(*leaves, causal=True, deterministic=deterministic)
        dout = torch.randn_like(out)
        torch.cuda.synchronize()
        before = requested_bytes("current")
        torch.cuda.reset_peak_memory_stats()
        gradients = torch.autograd.grad(out, leaves, dout)
        torch.cuda.synchronize()
        peaks.append(requested_bytes("peak") - before)
        results = sum(gradient.numel() * gradient.element_size() for gradient in gradients)
        padded = 0 if head_dim % 8 == 0 else 2 * results
        allowed = results + padded + documented_workspace_bytes(1, 4, seqlen, head_dim) + MIB // 4
        assert peaks[-1] <= allowed, f"{peaks[-1] / MIB:.1f} MiB, documented {allowed / MIB:.1f} MiB"
        del gradients, leaves, out, dout
    assert peaks[1] <= 4.1 * peaks[0]


def test_nothing_is_kept_after_a_step():
    """What the forward pass saves is q, k, v, out and LSE; after the backward pass all of it is free."""
    leaves = _leaves(*(_random(2, 1024, 4, 64) for _ in range(3)))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = flash_attn.flash_attn_func(*leaves, causal=True)
    saved = torch.cuda.memory_allocated() - before
    assert saved <= out.numel() * 2 + 2 * 4 * 1024 * 4 + 4096
    gradients = torch.autograd.grad(out.sum(), leaves)
    del out, gradients
    torch.cuda.synchronize()
    end = time.monotonic() + 10  # autograd's thread lets go of its references after it has handed over the gradients
    while torch.cuda.memory_allocated() != before and time.monotonic() < end:
        time.sleep(0.01)
    assert torch.cuda.memory_allocated() == before


# ---- The op -----------------------------------------------------------------------------------------------------


def _op_arguments(path, q, k, v, dout, **options):
    """The arguments of flash_attn::backward for a call, after its forward pass."""
    call = flash_attn.interface.build_call(flash_attn.flash_attn_func, q, k, v, **options)
    out, lse = flash_attn.flash_attn_func(q, k, v, return_softmax_lse=True, **options)
    names = ("q", "k", "v", "out", "lse", "s_aux", "alibi_slopes", "rng_state", "cu_seqlens_q", "cu_seqlens_k")
    names += ("seqused_q", "seqused_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale", "window_left", "window_right")
    names += ("softcap", "dropout_p", "deterministic")
    known = call._asdict() | {"out": out, "lse": lse}
    return (dout, torch.randn_like(lse), *(known[name] for name in names), _dispatch.PATHS[path].arch)


def test_preallocated_gradients(gpu_path):
    """They may be views of one tensor, as of a packed dqkv; what lies between them is not written."""
    q, k, v, dout = (_random(2, 130, 4, 64) for _ in range(4))
    arguments = _op_arguments(gpu_path, q, k, v, dout, causal=True, deterministic=True)
    *expected, _ = torch.ops.flash_attn.backward(*arguments)
    buffer = torch.full((2, 130, 5, 4, 64), torch.nan, device="cuda", dtype=BF16)
    places = buffer.unbind(2)
    versions = [place._version for place in places[1:4]]
    ds_aux = torch.ops.flash_attn.backward_out(*arguments, *places[1:4])
    _assert_same_gradients(places[1:4], expected)
    assert places[0].isnan().all() and places[4].isnan().all() and ds_aux.numel() == 0
    assert all(place._version > before for place, before in zip(places[1:4], versions, strict=True))


def test_opcheck_of_the_op(gpu_path):
    q, dout = (_random(2, 33, 4, 64) for _ in range(2))
    k, v = (_random(2, 50, 2, 64) for _ in range(2))
    sinks = torch.randn(4, device="cuda")
    arguments = _op_arguments(gpu_path, q, k, v, dout, causal=True, deterministic=True, s_aux=sinks)
    torch.library.opcheck(torch.ops.flash_attn.backward.default, arguments)
    places = [torch.empty_like(tensor) for tensor in (q, k, v)]
    torch.library.opcheck(torch.ops.flash_attn.backward_out.default, (*arguments, *places))


# ---- No waiting for the device ----------------------------------------------------------------------------------

WITHOUT_SYNC = [
    Case("sync-dense", "the plain call", "dense", (65, 65), (130, 130), heads=(4, 2), causal=True),
    Case("sync-dropout", "a mask drawn on the device", "dense", (65, 65), (130, 130), dropout_p=0.2),
    Case("sync-varlen", "lengths on the device", "varlen", (65, 0, 9), (130, 7, 30), heads=(4, 2), sinks=FP32,
         seqused_k=(100, 7, 3), lse_grad=True),
]  # fmt: skip


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("case", WITHOUT_SYNC, ids=lambda case: case.id)
def test_no_host_sync(gpu_path, case, deterministic):
    require_features(gpu_path, *case.features)
    inputs, wanted = build(case, "cuda").leaves()
    leaves = list(wanted.values())

    def step():
        if case.dropout_p:
            rng = {"dropout_p": case.dropout_p}
            out, lse = flash_attn.flash_attn_func(*leaves, **rng, return_softmax_lse=True, deterministic=deterministic)
        else:
            out, lse = inputs.call(deterministic=deterministic)
        return torch.autograd.grad((out, lse), leaves, (torch.ones_like(out), torch.ones_like(lse)))

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_streams():
    """The backward pass waits for what its stream has not yet made, and runs where the forward pass ran."""
    q, k, v, dout = (_random(1, 1024, 8, 64) for _ in range(4))
    expected = _gradients(q, k, v, dout, causal=True)
    late, late_dout = torch.zeros_like(q), torch.zeros_like(dout)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(q)
        leaves = [late.requires_grad_(), *_leaves(k, v)]
        out = flash_attn.flash_attn_func(*leaves, causal=True, deterministic=True)
        torch.cuda._sleep(20_000_000)
        late_dout.copy_(dout)
        ours = torch.autograd.grad(out, leaves, late_dout)
    stream.synchronize()
    _assert_same_gradients(ours, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_second_device():
    tensors = [_random(1, 130, 2, 64) for _ in range(4)]
    expected = _gradients(*tensors)
    with torch.cuda.stream(torch.cuda.Stream("cuda:1")):
        torch.cuda.set_device(0)
        ours = _gradients(*(tensor.to("cuda:1") for tensor in tensors))
    torch.cuda.synchronize("cuda:1")
    assert torch.cuda.current_device() == 0
    _assert_same_gradients([gradient.to("cuda:0") for gradient in ours], expected)


# ---- Graphs -----------------------------------------------------------------------------------------------------


def _captured(step):
    """(graph, what step returned in it), after the warm-up on a side stream that torch asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_graph_draws_a_mask_in_each_replay_that_both_passes_use(gpu_path, head_dim):
    """With q = 0 a probability is 1 / Sk. With unit vectors as values, out is the mask; with unit vectors as dout,
    dv is its transpose."""
    dropout_p = 0.4
    k = _random(2, head_dim, 3, head_dim, dtype=FP16)
    require_kernels(gpu_path, k, "dropout", "backward")
    eye = torch.eye(head_dim, device="cuda", dtype=FP16)[None, :, None].expand_as(k)
    q, k, v = _leaves(torch.zeros_like(k), k, eye)

    def step():
        out = flash_attn.flash_attn_func(q, k, v, dropout_p=dropout_p)
        return out, *torch.autograd.grad(out, (q, k, v), eye)

    torch.manual_seed(0)
    graph, (out, dq, dk, dv) = _captured(step)
    masks = []
    for _ in range(3):
        for tensor in (out, dq, dk, dv):
            tensor.fill_(torch.nan)
        graph.replay()
        kept = out != 0
        assert torch.equal(kept, (dv != 0).transpose(1, 3)), "the backward pass dropped other probabilities"
        assert abs(kept.float().mean().item() - (1 - dropout_p)) < 0.02
        assert dq.isfinite().all() and dk.isfinite().all()
        masks.append(kept.clone())
    for first, second in itertools.combinations(masks, 2):
        assert not torch.equal(first, second), "a replay repeated a mask"


def test_graph_of_a_step_replays_with_other_lengths_and_contents():
    q, k, v, dout = (_random(300, 4, 64) for _ in range(4))
    leaves = _leaves(q, k[:, :2], v[:, :2])
    cu_q, cu_k = cumulative([100, 100, 100], "cuda"), cumulative([150, 100, 50], "cuda")

    def step():
        out, lse = flash_attn.flash_attn_varlen_func(
            *leaves, cu_q, cu_k, 300, 300, causal=True, deterministic=True, return_softmax_lse=True
        )
        return torch.autograd.grad(out, leaves, dout)

    graph, gradients = _captured(step)
    for lens_q, lens_k in (([1, 298, 1], [9, 0, 291]), ([0, 0, 300], [100, 100, 100]), ([128, 64, 108], [64, 65, 171])):
        cu_q.copy_(cumulative(lens_q))
        cu_k.copy_(cumulative(lens_k))
        with torch.no_grad():
            for tensor in (*leaves, dout):
                tensor.normal_()
        for gradient in gradients:
            gradient.fill_(torch.nan)
        graph.replay()
        ours = [gradient.clone() for gradient in gradients]
        _assert_same_gradients(ours, step(), f" of {lens_q}")


def test_whole_training_step_in_a_graph():
    """make_graphed_callables splits the passes into two graphs of one pool."""
    linear = torch.nn.Linear(64, 3 * 4 * 64, device="cuda", dtype=BF16)
    x = _random(2, 130, 64).requires_grad_()

    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            q, k, v = self.linear(x).unflatten(-1, (3, 4, 64)).unbind(2)
            return flash_attn.flash_attn_func(q, k, v, causal=True, deterministic=True)

    eager = torch.autograd.grad(Attention()(x).float().square().sum(), (x, linear.weight))
    graphed = torch.cuda.make_graphed_callables(Attention(), (x,))
    ours = torch.autograd.grad(graphed(x).float().square().sum(), (x, linear.weight))
    for name, *pair in zip(("dx", "dweight"), ours, eager, strict=True):
        torch.testing.assert_close(*pair, msg=lambda text, name=name: f"{name}: {text}")


# ---- Sizes ------------------------------------------------------------------------------------------------------


def _check_slices(tensors, gradients, picks, dim, **options):
    """Entries of a large call equal calls of their own."""
    for index in picks:
        alone = [tensor.narrow(dim, index, 1).clone() for tensor in tensors]
        ours = [gradient.narrow(dim, index, 1) for gradient in gradients]
        _assert_same_gradients(ours, _gradients(*alone, **options), f" of entry {index}")


def test_01_more_than_two_to_the_31_elements():
    """Hard case 1. Its sums of dq in float32 pass 2**31 elements too."""
    require_memory(60)
    q, dout = (_random(400, 10496, 4, 128) for _ in range(2))
    k, v = (_random(400, 128, 4, 128) for _ in range(2))
    q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
    out = flash_attn.flash_attn_func(q, k, v, deterministic=True)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    picks = (0, 199, 399)
    for index in picks:
        part = slice(index, index + 1)
        with torch.no_grad():
            assert_same_bits("out", out[part], flash_attn.flash_attn_func(q[part], k[part], v[part]))
    _check_slices([tensor.detach() for tensor in (q, k, v, dout)], gradients, picks, 0)


def test_11_many_rows_that_add_to_few_keys():
    """Hard case 11's second part: fifty runs. Under racecheck, test_sanitize.py has its shape with fewer entries."""
    q, dout = (_random(300, 2048, 1, 128) for _ in range(2))
    k, v = (_random(300, 128, 1, 128) for _ in range(2))
    first = _gradients(q, k, v, dout)
    for _ in range(49):
        for ours, expected in zip(_gradients(q, k, v, dout), first, strict=True):
            assert torch.equal(ours, expected)


def test_05_more_batch_entries_than_a_grid_dimension_holds():
    require_memory(24)
    tensors = [_random(65536, 4, 8, 64) for _ in range(4)]
    gradients = _gradients(*tensors, causal=True)
    _check_slices(tensors, gradients, (0, 1, 32767, 65535), 0, causal=True)


def test_05_more_heads_than_a_grid_dimension_holds():
    tensors = [_random(1, 4, 71280, 64) for _ in range(4)]
    _check_slices(tensors, _gradients(*tensors), (0, 65535, 65536, 71279), 2)


def test_05_more_sequences_than_a_grid_dimension_holds():
    count, length = 80_000, 16
    q, k, v, dout = (_random(count * length, 1, 64) for _ in range(4))
    leaves = _leaves(q, k, v)
    cu = torch.arange(count + 1, dtype=torch.int32, device="cuda") * length
    out = flash_attn.flash_attn_varlen_func(*leaves, cu, cu, length, length, causal=True, deterministic=True)
    dense = _gradients(*(tensor.view(count, length, 1, 64) for tensor in (q, k, v, dout)), causal=True)
    ours = [gradient.view(count, length, 1, 64) for gradient in torch.autograd.grad(out, leaves, dout)]
    _assert_same_gradients(ours, dense)


@pytest.mark.sanitize
@pytest.mark.parametrize(
    "cu_seqlens",
    [
        [0, -5, 7], [0, 900, 901], [5, 3, 1], [-(2**31), 2**31 - 1, 0], [0, 0, 0], [900, 950, 1000],
        [0, 0, 900, 100, 1000], [0, 700, 100, 800],  # turns of tiles that belong to no entry, or to two
    ],
    ids=str,
)  # fmt: skip
def test_lying_metadata_touches_no_foreign_memory(cu_seqlens):
    """The values are on the device, where no host check sees them; compute-sanitizer must find this clean."""
    q, k, v, dout = (_random(1000, 2, 64) for _ in range(4))
    count = len(cu_seqlens) - 1
    good, bad = cumulative([1000 // count] * count, "cuda"), int32(cu_seqlens, "cuda")
    for (cu_q, cu_k), deterministic in itertools.product(((bad, good), (good, bad), (bad, bad)), (False, True)):
        leaves = _leaves(q, k, v)
        out = flash_attn.flash_attn_varlen_func(
            *leaves, cu_q, cu_k, None, None, causal=True, deterministic=deterministic
        )
        torch.autograd.grad(out, leaves, dout)
    torch.cuda.synchronize()


def test_rows_of_no_sequence_have_no_gradient():
    """Packed batches are padded to fixed sizes; the padding's gradients are 0, not what memory held."""
    q, k, v, dout = (_random(500, 2, 64) for _ in range(4))
    cu = cumulative([20, 130, 50], "cuda")
    leaves = _leaves(q, k, v)
    out = flash_attn.flash_attn_varlen_func(*leaves, cu, cu, None, None, causal=True)
    for name, gradient in zip("qkv", torch.autograd.grad(out, leaves, dout), strict=True):
        assert (gradient[200:] == 0).all(), f"d{name}"
        assert (gradient[:200] != 0).any(-1).float().mean() > 0.9
