"""What only a GPU shows: streams, graphs, launch limits, lying metadata. Other modules compare results."""

import threading

import pytest
import torch
from harness import cumulative, int32, require_features
from tolerance import assert_same_bits

import flash_attn

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("gpu_path"),
]


def _random(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device="cuda", dtype=dtype)


def _varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, **options):
    return flash_attn.flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, return_softmax_lse=True, **options)


def _packed(total_q, total_k, heads=2, head_dim=64):
    return _random(total_q, heads, head_dim), _random(total_k, heads, head_dim), _random(total_k, heads, head_dim)


def test_repeated_runs_are_bitwise_equal():
    q, k, v = (_random(2, 513, 4, 128) for _ in range(3))
    first = flash_attn.flash_attn_func(q, k, v, causal=True)
    for _ in range(20):
        assert_same_bits("out", flash_attn.flash_attn_func(q, k, v, causal=True), first)


def test_first_work_of_a_thread(gpu_path):
    """With all its memory from the cache nothing before the launch gives the thread a context."""
    q, k, v = (_random(2, 513, 4, 128) for _ in range(3))
    expected = flash_attn.flash_attn_func(q, k, v, causal=True).cpu()
    found = []

    def work():
        with flash_attn.use_path(gpu_path):
            found.append(flash_attn.flash_attn_func(q, k, v, causal=True))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert_same_bits("out", found[0], expected)


@pytest.mark.parametrize("total_q", [100, 128, 300, 1000])
def test_rows_of_no_sequence_are_zero(total_q):
    """Packed batches are padded to fixed sizes; the padding's rows must not come back as whatever memory held."""
    q, k, v = _packed(total_q, 64)
    out, lse = _varlen(q, k, v, cumulative([20, 50], "cuda"), cumulative([30, 34], "cuda"))
    assert (out[70:] == 0).all() and (lse[:, 70:] == -torch.inf).all()
    assert (out[:70] != 0).any(-1).all() and lse[:, :70].isfinite().all()


@pytest.mark.sanitize
@pytest.mark.parametrize(
    "cu_seqlens", [[0, -5, 7], [0, 900, 901], [5, 3, 1], [-(2**31), 2**31 - 1, 0], [0, 0, 0], [900, 950, 1000]], ids=str
)
def test_lying_metadata_reads_no_foreign_memory(cu_seqlens):
    """The values are on the device, where no host check sees them; compute-sanitizer must find this clean."""
    q, k, v = _packed(1000, 1000)
    good = cumulative([500, 500], "cuda")
    bad = int32(cu_seqlens, "cuda")
    for cu_seqlens_q, cu_seqlens_k in ((bad, good), (good, bad), (bad, bad)):
        _varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, causal=True)
    torch.cuda.synchronize()


# Of the same total: a few tiles, or more than there are multiprocessors, which blocks then share out among themselves.
REPLAYED = {
    "few-tiles": [[100, 100, 56], [1, 254, 1], [0, 0, 256], [10, 20, 30], [128, 128, 0]],
    "many-tiles": [[1000, 1000, 1000], [3000, 0, 0], [1, 1, 2998], [0, 1500, 1500], [1000, 1000, 10]],
}


@pytest.mark.parametrize("name", REPLAYED)
def test_graph_replays_with_other_lengths(name):
    first, *others = REPLAYED[name]
    q, k, v = _packed(sum(first), sum(first), heads=2 if sum(first) < 1000 else 16)
    cu_seqlens = cumulative(first, "cuda")
    _varlen(q, k, v, cu_seqlens, cu_seqlens, causal=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = _varlen(q, k, v, cu_seqlens, cu_seqlens, causal=True)
    for lengths in others:
        cu_seqlens.copy_(cumulative(lengths))
        q.normal_()
        out.fill_(torch.nan)
        lse.fill_(torch.nan)
        graph.replay()
        eager_out, eager_lse = _varlen(q, k, v, cu_seqlens, cu_seqlens, causal=True)
        assert_same_bits("out", out, eager_out)
        assert_same_bits("lse", lse, eager_lse)


def test_runs_on_the_current_stream():
    """A kernel on another stream would not wait for the inputs that this one is still making."""
    q, k, v = (_random(1, 2048, 8, 64) for _ in range(3))
    expected = flash_attn.flash_attn_func(q, k, v)
    late = torch.zeros_like(q)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(q)
        out = flash_attn.flash_attn_func(late, k, v)
    stream.synchronize()
    assert_same_bits("out", out, expected)


def test_streams_share_nothing():
    """Two calls at once, each with more tiles than there are multiprocessors."""
    streams = [torch.cuda.Stream() for _ in range(2)]
    calls = [(*_packed(6000, 6000, heads=16), cumulative(lengths, "cuda")) for lengths in ([6000], [10] * 600)]
    expected = [_varlen(q, k, v, cu_seqlens, cu_seqlens)[0] for q, k, v, cu_seqlens in calls]
    torch.cuda.synchronize()
    outs = [[], []]
    for _ in range(10):
        for stream, (q, k, v, cu_seqlens), mine in zip(streams, calls, outs, strict=True):
            with torch.cuda.stream(stream):
                mine.append(_varlen(q, k, v, cu_seqlens, cu_seqlens)[0])
    torch.cuda.synchronize()
    for mine, want in zip(outs, expected, strict=True):
        for out in mine:
            assert_same_bits("out", out, want)


def _with_probabilities(random):
    return flash_attn.flash_attn_func(*(random(1, 300, 2, 64) for _ in "qkv"), dropout_p=0.3, return_attn_probs=True)


def _append_to_pages(random):
    q, new_k, new_v = random(2, 3, 4, 64), random(2, 3, 2, 64), random(2, 3, 2, 64)
    k_pages, v_pages = random(6, 64, 2, 64), random(6, 64, 2, 64)
    options = {"rotary_cos": random(256, 32), "rotary_sin": random(256, 32), "causal": True, "num_splits": 2}
    options["cache_seqlens"] = int32([130, 5], q.device)
    options["block_table"] = int32([[4, 1, 0], [2, 5, 3]], q.device)
    out, lse = flash_attn.flash_attn_with_kvcache(q, k_pages, v_pages, new_k, new_v, return_softmax_lse=True, **options)
    return out, lse, k_pages, v_pages


# (features beside those of a dense call, a call). The backward pass: test_backward_gpu.py.
CALLS = {
    "forward": ((), lambda random: [flash_attn.flash_attn_func(*(random(1, 300, 2, 64) for _ in "qkv"))]),
    "probabilities": (("dropout", "attn_probs"), _with_probabilities),
    "append": (("paged", "append", "rotary", "num_splits"), _append_to_pages),
    "combine": (
        ("combine",),
        lambda random: flash_attn.flash_attn_combine(random(3, 9, 2, 64), random(3, 9, 2).float()),
    ),
}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@pytest.mark.parametrize("name", CALLS)
def test_second_device(gpu_path, name):
    """The first device is the current one, which has run the same kernels before, and stays it."""
    features, call = CALLS[name]
    require_features(gpu_path, *features)

    def results_on(device):
        torch.manual_seed(0)
        return call(lambda *shape: torch.randn(shape, dtype=torch.bfloat16).to(device))

    expected, ours = results_on("cuda:0"), results_on("cuda:1")
    assert torch.cuda.current_device() == 0
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.device == torch.device("cuda:1")
        assert_same_bits(name, mine.cpu(), theirs.cpu())


def _same_as_slices(q, k, v, picks, **options):
    """A large batch's entries must equal calls of their own."""
    out = flash_attn.flash_attn_func(q, k, v, **options)
    for index in picks:
        part = slice(index, index + 1)
        assert_same_bits(f"entry {index}", out[part], flash_attn.flash_attn_func(q[part], k[part], v[part], **options))


def test_more_batch_entries_than_a_grid_dimension_holds():
    q, k, v = (_random(65536, 4, 8, 64) for _ in range(3))
    _same_as_slices(q, k, v, (0, 1, 32767, 65535), causal=True)


def test_more_heads_than_a_grid_dimension_holds():
    q, k, v = (_random(1, 4, 71280, 64) for _ in range(3))
    out = flash_attn.flash_attn_func(q, k, v)
    for head in (0, 65535, 65536, 71279):
        part = slice(head, head + 1)
        alone = flash_attn.flash_attn_func(q[:, :, part], k[:, :, part], v[:, :, part])
        assert_same_bits(f"head {head}", out[:, :, part], alone)


def test_more_sequences_than_a_grid_dimension_holds():
    count, length = 80_000, 16
    q, k, v = _packed(count * length, count * length, heads=1)
    cu_seqlens = torch.arange(count + 1, dtype=torch.int32, device="cuda") * length
    out, _ = _varlen(q, k, v, cu_seqlens, cu_seqlens, causal=True)
    dense = (tensor.view(count, length, 1, 64) for tensor in (q, k, v))
    assert_same_bits("out", out, flash_attn.flash_attn_func(*dense, causal=True).view_as(out))


@pytest.mark.parametrize("causal", [False, True])
def test_strides_past_two_to_the_31(causal):
    """Hard case 2: rows and heads of a view that spans more than 2**31 elements."""
    rows, heads = 8, 2
    buffer = torch.empty(2**31 + 2**30, device="cuda", dtype=torch.bfloat16)
    view = buffer.as_strided((1, rows, heads, 64), (0, 2**28, 2**30 + 2**26, 1))
    view.normal_()
    q, k = _random(1, rows, heads, 64), _random(1, rows, heads, 64)
    out = flash_attn.flash_attn_func(q, k, view, causal=causal)
    assert_same_bits("v", out, flash_attn.flash_attn_func(q, k, view.contiguous(), causal=causal))
    out = flash_attn.flash_attn_func(view, view, view, causal=causal)
    plain = view.contiguous()
    assert_same_bits("q, k, v", out, flash_attn.flash_attn_func(plain, plain, plain, causal=causal))


@pytest.mark.parametrize("dims", [(247, 255), (40, 33), (7, 64)], ids=str)
def test_padded_rows_that_lie_apart_in_memory(dims):
    """aten::pad keeps the order of dimensions in memory; drawn by the fuzzer: misaligned address."""

    def rows_innermost(head_dim):
        return _random(3, 2, head_dim, 129).permute(0, 3, 1, 2)

    q, k, v = rows_innermost(dims[0]), rows_innermost(dims[0]), rows_innermost(dims[1])
    out = flash_attn.flash_attn_func(q, k, v, causal=True)
    plain = flash_attn.flash_attn_func(*(tensor.contiguous() for tensor in (q, k, v)), causal=True)
    assert_same_bits("out", out, plain)


def test_torch_compile_with_dynamic_lengths():
    compiled = torch.compile(
        lambda q, k, v: flash_attn.flash_attn_func(q, k, v, causal=True),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for batch, length in ((2, 64), (3, 100), (1, 17)):
        q, k, v = (_random(batch, length, 4, 64) for _ in range(3))
        assert_same_bits("out", compiled(q, k, v), flash_attn.flash_attn_func(q, k, v, causal=True))


def test_opcheck_of_the_kernel_op(gpu_path):
    q, k, v = (_random(2, 33, 4, 64) for _ in range(3))
    arch = flash_attn._dispatch.PATHS[gpu_path].arch
    call = flash_attn.interface.build_call(flash_attn.flash_attn_func, q, k, v, causal=True)
    torch.library.opcheck(torch.ops.flash_attn.forward, (*call.op_arguments(), arch))
    torch.library.opcheck(torch.ops.flash_attn.forward_out, (*call.op_arguments(), arch, torch.empty_like(q)))
