"""What only a GPU shows of serving: graphs that replay with other requests, no waiting, hard cases 3 and 8."""

import math
from dataclasses import replace

import checks
import pytest
import torch
from cases import FP32, Case
from harness import build, cumulative, int32, require_features, require_memory
from tolerance import assert_same_bits

import flash_attn

BF16, FP16 = torch.bfloat16, torch.float16


def _needs(path, case, *more):
    require_features(path, *case.features, *more)


def _random(*shape, dtype=BF16):
    return torch.randn(shape, device="cuda", dtype=dtype)


# ---- Graphs -----------------------------------------------------------------------------------------------------


def _tensors(inputs):
    """Every tensor of a call, by name."""
    found = {name: getattr(inputs, name) for name in ("q", "k", "v", "new_k", "new_v")}
    found |= dict(zip(("cos", "sin"), inputs.rotary, strict=True)) | inputs.layout
    found |= {name: inputs.score[name] for name in ("alibi_slopes", "s_aux")}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _pad(inputs, num_pages, num_columns):
    """The inputs in a pool and a table of fixed size: spare pages hold NaN, spare slots an id out of range."""
    if "block_table" not in inputs.layout:
        return inputs
    pools = []
    for pool in (inputs.k, inputs.v):
        pools.append(pool.new_full((num_pages, *pool.shape[1:]), math.nan))
        pools[-1][: pool.shape[0]] = pool
    table = inputs.layout["block_table"]
    wide = table.new_full((table.shape[0], num_columns), 2**31 - 1)
    wide[:, : table.shape[1]] = table
    return replace(inputs, k=pools[0], v=pools[1], layout=inputs.layout | {"block_table": wide})


def _requests(case, lengths):
    """Inputs of one shape whose contents, tables and lengths differ."""
    made = [build(replace(case, id=f"{case.id}-{index}", seqused_k=used), "cuda") for index, used in enumerate(lengths)]
    if case.page is None:
        return made
    num_pages = max(inputs.k.shape[0] for inputs in made)
    num_columns = max(inputs.layout["block_table"].shape[1] for inputs in made)
    return [_pad(inputs, num_pages, num_columns) for inputs in made]


GRAPHS = [
    (Case("graph-decode", "dense cache", "kvcache", (1,) * 4, (300,) * 4, heads=(8, 2), causal=True),
     ((300,) * 4, (1, 2, 3, 4), (300, 0, 17, 256), (0, 0, 0, 0))),
    (Case("graph-paged", "pages", "kvcache", (1,) * 4, (300,) * 4, heads=(8, 2), page=16, causal=True),
     ((300,) * 4, (1, 2, 3, 4), (300, 0, 17, 256), (0, 0, 0, 0))),
    (Case("graph-append", "append and rotary into pages", "kvcache", (1,) * 4, (300,) * 4, heads=(8, 2), page=16,
          new=(1,) * 4, rotary=(64, False), causal=True),
     ((299,) * 4, (0, 1, 15, 16), (200, 0, 31, 255))),
    (Case("graph-chunked-append", "prefill and decode append in one call", "kvcache", (40, 1, 3), (300,) * 3,
          new=(40, 1, 3), varlen_q=True, heads=(4, 2), page=16, rotary=(32, True), causal=True),
     ((260, 299, 0), (0, 1, 15), (100, 17, 290))),
    (Case("graph-speculative", "drafted tokens, window, sinks", "kvcache", (5,) * 3, (300,) * 3, heads=(4, 1), page=64,
          window=(100, 0), sinks=FP32, alibi="batch"),
     ((300,) * 3, (5, 6, 7), (299, 64, 65))),
    (Case("graph-rows", "rows of a larger cache, left padding", "kvcache", (1,) * 3, (200,) * 3, heads=(4, 2),
          cache_rows=(4, 0, 2), leftpad=(5, 0, 9), causal=True),
     ((200,) * 3, (6, 1, 9), (100, 199, 64))),
    (Case("graph-varlen", "chunked prefill beside decoding", "varlen", (1, 64, 1, 7), (300,) * 4, heads=(4, 2), page=32,
          causal=True),
     ((300,) * 4, (1, 64, 2, 7), (128, 299, 33, 100))),
]  # fmt: skip


@pytest.mark.parametrize("num_splits", [0, 1, 4])
@pytest.mark.parametrize("case, lengths", GRAPHS, ids=[case.id for case, _ in GRAPHS])
def test_graph_replays_with_other_requests(gpu_path, case, lengths, num_splits):
    """Captured at full lengths; each replay has the bits of an eager call, caches included."""
    _needs(gpu_path, replace(case, seqused_k=lengths[0]), "out", *["num_splits"] * (num_splits > 1))
    static, *others = _requests(case, lengths)
    pristine = {name: tensor.clone() for name, tensor in _tensors(static).items()}
    out = torch.empty(*static.q.shape[:-1], case.dims[1], device="cuda", dtype=case.dtype)

    def call():
        return static.call(out=out, num_splits=num_splits)[1]

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lse = call()
    held = _tensors(static)
    for index, fresh in enumerate([replace(static, **{name: pristine[name] for name in "kv"}), *others]):
        for name, tensor in _tensors(fresh).items():
            held[name].copy_(tensor)
        out.fill_(math.nan)
        lse.fill_(math.nan)
        graph.replay()
        eager_out, eager_lse = fresh.call(num_splits=num_splits)
        assert_same_bits(f"out of replay {index}", out, eager_out)
        assert_same_bits(f"lse of replay {index}", lse, eager_lse)
        assert_same_bits(f"k of replay {index}", static.k, fresh.k)
        assert_same_bits(f"v of replay {index}", static.v, fresh.v)


@pytest.mark.parametrize("page", [None, 4])
def test_08_graph_of_a_padded_batch(gpu_path, page):
    """Captured at batch 8; the real rows equal an eager call, the empty rows are 0 with LSE -inf."""
    case = Case("8-graph", "a server's padding", "kvcache", (1,) * 8, (16,) * 8, seqused_k=(16,) * 8, heads=(4, 2),
                page=page)  # fmt: skip
    _needs(gpu_path, case, "out")
    inputs = build(case, "cuda")
    out = torch.empty_like(inputs.q)
    inputs.call(out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, lse = inputs.call(out=out)
    inputs.layout["seqused_k"].copy_(int32((7, 5, 9, 3, 2, 0, 0, 0)))
    out.fill_(math.nan)
    graph.replay()
    real = {name: value[:5] for name, value in inputs.layout.items()}
    k, v = (inputs.k, inputs.v) if page else (inputs.k[:5], inputs.v[:5])
    alone = replace(inputs, q=inputs.q[:5], k=k, v=v, layout=real).call()
    assert_same_bits("real rows", out[:5], alone[0])
    assert_same_bits("their lse", lse[:5], alone[1])
    assert (out[5:] == 0).all() and (lse[5:] == -math.inf).all()


@pytest.mark.parametrize("num_splits", [0, 4])
def test_graph_keeps_its_metadata(gpu_path, num_splits):
    """Metadata that was made before the capture, for other lengths, serves every replay, and stays as it was."""
    case = Case("graph-metadata", "a server's step", "kvcache", (1,) * 4, (600,) * 4, seqused_k=(600,) * 4,
                heads=(8, 2), page=16, causal=True)  # fmt: skip
    _needs(gpu_path, case, "out", *["num_splits"] * (num_splits > 1))
    static, other = _requests(case, ((600,) * 4, (1, 599, 64, 0)))
    out = torch.empty_like(static.q)
    metadata = flash_attn.get_scheduler_metadata(4, 1, 608, 8, 2, 64, static.layout["seqused_k"], page_size=16,
                                                 causal=True, num_splits=num_splits)  # fmt: skip
    before = metadata.clone()

    def layer(inputs, **options):
        return inputs.call(scheduler_metadata=metadata, num_splits=num_splits, **options)

    layer(static, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer(static, out=out)
        layer(static, out=out)
    held = _tensors(static)
    for name, tensor in _tensors(other).items():
        held[name].copy_(tensor)
    out.fill_(math.nan)
    graph.replay()
    assert_same_bits("out", out, layer(other)[0])
    assert torch.equal(metadata, before)


# ---- No waiting, no hidden allocation ---------------------------------------------------------------------------

CALLS = [
    Case("sync-decode", "dense cache", "kvcache", (1,) * 3, (300,) * 3, seqused_k=(300, 1, 64), heads=(8, 2)),
    Case("sync-paged", "pages", "kvcache", (1,) * 3, (300,) * 3, seqused_k=(300, 1, 64), heads=(8, 2), page=16),
    Case("sync-append", "append, rotary, pages", "kvcache", (2,) * 3, (300,) * 3, seqused_k=(298, 1, 64), heads=(8, 2),
         page=16, new=(2,) * 3, rotary=(64, True), causal=True),
    Case("sync-varlen-append", "packed new tokens", "kvcache", (3, 1), (100,) * 2, seqused_k=(60, 9), new=(3, 1),
         varlen_q=True, causal=True),
    Case("sync-varlen", "chunked prefill", "varlen", (1, 64), (300,) * 2, seqused_k=(300, 64), heads=(8, 2), page=16,
         causal=True, leftpad=(3, 0)),
]  # fmt: skip


@pytest.mark.parametrize("num_splits", [0, 4])
@pytest.mark.parametrize("case", CALLS, ids=lambda case: case.id)
def test_no_host_sync(gpu_path, case, num_splits):
    _needs(gpu_path, case, *["num_splits"] * (num_splits > 1))
    inputs = build(case, "cuda")
    inputs.call(num_splits=num_splits)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        inputs.call(num_splits=num_splits)
        inputs.call(num_splits=num_splits, max_seqlen_q=None) if case.varlen_q else None
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_metadata_needs_no_host_sync(gpu_path):
    lengths = int32((300, 1, 64), "cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        flash_attn.get_scheduler_metadata(3, 1, 300, 8, 2, 64, lengths)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("num_splits", [0, 4])
def test_memory_does_not_depend_on_the_lengths(gpu_path, num_splits):
    """What is on the device decides no allocation: a full cache and an empty one take the same memory."""
    case = Case("memory", "decoding", "kvcache", (1,) * 4, (4096,) * 4, seqused_k=(4096,) * 4, heads=(8, 2), page=16)
    _needs(gpu_path, case, *["num_splits"] * (num_splits > 1))
    inputs = build(case, "cuda")
    peaks = []
    for length in (4096, 1, 0):
        inputs.layout["seqused_k"].fill_(length)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        inputs.call(num_splits=num_splits)
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert len(set(peaks)) == 1, peaks
    assert peaks[0] < 4 * 2**20, "splits of one token's outputs are small"


# ---- Lying metadata ---------------------------------------------------------------------------------------------


@pytest.mark.sanitize
@pytest.mark.parametrize("num_splits", [0, 3])
@pytest.mark.parametrize("num_queries", [1, 70])
@pytest.mark.parametrize("what", ["seqused_k", "block_table", "cache_batch_idx", "leftpad_k"])
def test_lying_metadata_touches_no_foreign_memory(gpu_path, what, num_queries, num_splits):
    """compute-sanitizer must find this clean."""
    checks.check_lying_cache(gpu_path, what, num_queries, num_splits)


@pytest.mark.sanitize
@pytest.mark.parametrize("what", ["seqused_k", "block_table"])
def test_lying_append_writes_no_foreign_memory(gpu_path, what):
    checks.check_lying_append(gpu_path, what)


@pytest.mark.sanitize
def test_lying_offsets_touch_no_foreign_memory(gpu_path):
    checks.check_lying_offsets(gpu_path)


# ---- Addresses --------------------------------------------------------------------------------------------------


def test_03a_pages_past_two_to_the_31(gpu_path):
    """140,000 blocks, K and V in one buffer; a sequence in the highest blocks."""
    num_pages, page, heads, dim, length = 140_000, 16, 8, 128, 500
    require_features(gpu_path, "varlen", "paged", "causal", "gqa", "seqused_k")
    require_memory(12)
    buffer = torch.full((num_pages, 2, page, heads, dim), math.nan, device="cuda", dtype=BF16)
    used = -(-length // page)
    ids = torch.arange(num_pages - 1, num_pages - 1 - used, -1, device="cuda", dtype=torch.int32)
    small = _random(used, 2, page, heads, dim)
    buffer[ids.long()] = small
    q = _random(70, 2 * heads, dim)
    lengths, cu = int32([length], "cuda"), cumulative([70], "cuda")

    def attend(pool, table):
        return flash_attn.flash_attn_varlen_func(
            q, pool[:, 0], pool[:, 1], cu, None, 70, length, seqused_k=lengths, block_table=table[None], causal=True,
            return_softmax_lse=True,
        )  # fmt: skip

    out, lse = attend(buffer, ids)
    same, same_lse = attend(small, torch.arange(used, device="cuda", dtype=torch.int32))
    assert out.isfinite().all()
    assert_same_bits("out", out, same)
    assert_same_bits("lse", lse, same_lse)


def test_03b_rows_of_a_cache_past_two_to_the_31(gpu_path):
    """A batch stride of 2**30 elements; slot 0 stays untouched, 1 to 4 get the new tokens."""
    heads, dim, capacity, start = 32, 128, 64, 50
    require_features(gpu_path, "dense", "causal", "seqused_k", "cache_batch_idx", "append")
    require_memory(24)
    caches, small = [], []
    for _ in range(2):
        flat = torch.empty(4 * 2**30 + capacity * heads * dim, device="cuda", dtype=FP16)
        view = flat.as_strided((5, capacity, heads, dim), (2**30, heads * dim, dim, 1))
        view.normal_()
        caches.append(view)
        small.append(view.clone(memory_format=torch.contiguous_format))
    q, k, v = (_random(4, 3, heads, dim, dtype=FP16) for _ in range(3))
    rows, lengths = int32([1, 2, 3, 4], "cuda"), int32([start] * 4, "cuda")
    before = [cache.clone() for cache in small]
    out, expected = (
        flash_attn.flash_attn_with_kvcache(
            q, *pair, k, v, cache_seqlens=lengths, cache_batch_idx=rows, causal=True
        )
        for pair in (caches, small)
    )  # fmt: skip
    assert_same_bits("out", out, expected)
    for view, old, new in zip(caches, before, (k, v), strict=True):
        assert_same_bits("slot 0", view[0], old[0])
        assert_same_bits("new tokens", view[1:, start : start + 3], new)
        assert_same_bits("older tokens", view[1:, :start], old[1:, :start])
        assert_same_bits("free slots", view[1:, start + 3 :], old[1:, start + 3 :])


def test_more_requests_than_a_grid_dimension_holds(gpu_path):
    count = 70_000
    require_features(gpu_path, "dense", "seqused_k", "gqa", "paged")
    q, pool = _random(count, 1, 2, 64), _random(1000, 1, 1, 64)
    table = torch.randint(0, 1000, (count, 4), device="cuda", dtype=torch.int32)
    lengths = torch.randint(0, 5, (count,), device="cuda", dtype=torch.int32)
    out = flash_attn.flash_attn_with_kvcache(q, pool, pool, cache_seqlens=lengths, block_table=table)
    for first in (0, 32_767, 65_534, count - 3):
        part = slice(first, first + 3)
        alone = flash_attn.flash_attn_with_kvcache(
            q[part], pool, pool, cache_seqlens=lengths[part], block_table=table[part]
        )
        torch.testing.assert_close(out[part], alone)
