"""Bugs that other attention packages shipped, as tests, here and in other files. A test's number is its bug's:

1 sums of the backward pass past 2**31 elements; 2 views, 3 caches and 4 masks past it; 5 limits of a launch's grid;
6 splits that lose rows; 7 garbage in unused cache memory; 8 requests without keys, in CUDA graphs too; 9 sequences of
length 0; 10 NaN in gradients; 11 gradients that differ from run to run; 12 rows that differ with their batch; 15
strides.
"""

import math
from dataclasses import replace

import pytest
import torch
from cases import BF16, FP16, Case
from checks import check_backward, check_forward, check_garbage, gradients_of_a_loss
from harness import build, cumulative, device_of, int32, on_path
from tolerance import assert_same_bits

GARBAGE = [math.nan, math.inf]


def _ids(case):
    return case.id


# 6a: split-KV left rows of `out` unwritten.
@pytest.mark.parametrize("num_splits", [0, 1, 2])
def test_06_every_row_is_written_whatever_the_splits(path, num_splits):
    case = Case(
        "6a", "varlen, paged, four pages each", "varlen", (1, 7), (1024, 1024), seqused_k=(1024, 1024), page=256,
        heads=(4, 4),
    )  # fmt: skip
    check_forward(path, case, {"num_splits"} if num_splits > 1 else frozenset(), num_splits=num_splits)


# 7: garbage in the unused part of a cache.
UNUSED_CACHE = [
    Case("7-contiguous", "capacity 3 of which 1 and 3 are used", "kvcache", (1, 1), (3, 3), seqused_k=(1, 3)),
    Case("7-seqused", "seqused_k within slots of 128", "varlen", (9, 1, 64, 5), (128,) * 4,
         seqused_k=(32, 64, 96, 48), heads=(4, 2), causal=True),
    Case("7-dense-cache", "the same lengths in a dense cache", "kvcache", (1,) * 4, (128,) * 4,
         seqused_k=(32, 64, 96, 48), heads=(4, 2)),
] + [
    Case(f"7-pages-{page}", "the same in pages; page 0 is garbage, table tails are stale", "kvcache", (1,) * 4,
         (128,) * 4, seqused_k=(32, 64, 96, 48), page=page, heads=(4, 2))
    for page in (1, 16, 64, 256)
]  # fmt: skip


@pytest.mark.parametrize("garbage", GARBAGE, ids=str)
@pytest.mark.parametrize("case", UNUSED_CACHE, ids=_ids)
def test_07_garbage_in_unused_cache(path, case, garbage):
    check_garbage(path, case, garbage)


@pytest.mark.parametrize("case", UNUSED_CACHE, ids=_ids)
def test_07_against_the_oracle(path, case):
    check_forward(path, case)


# 8: empty K and padded rows.
DECODE = Case("8", "a batch padded from 5 to 8", "kvcache", (1,) * 8, (16,) * 8, heads=(4, 2),
              seqused_k=(7, 5, 9, 3, 2, 0, 0, 0))  # fmt: skip


@pytest.mark.parametrize("page", [None, 4], ids=["dense", "paged"])
def test_08_padded_batch(path, page):
    case = replace(DECODE, page=page)
    inputs = build(case, device_of(path))
    out = torch.full_like(inputs.q, math.nan)
    padded = on_path(path, case.features | {"out"}, inputs, lambda: inputs.call(out=out))
    layout = {name: value[:5] for name, value in inputs.layout.items()}
    k, v = (inputs.k, inputs.v) if page else (inputs.k[:5], inputs.v[:5])
    real = replace(inputs, q=inputs.q[:5], k=k, v=v, layout=layout)
    alone = on_path(path, case.features, inputs, real.call)
    if padded is None:
        return
    assert_same_bits("real rows", out[:5], alone[0])
    assert_same_bits("lse of real rows", padded[1][:5], alone[1])
    assert (out[5:] == 0).all() and (padded[1][5:] == -math.inf).all()


@pytest.mark.parametrize("causal", [False, True])
def test_08_dense_without_keys(path, causal):
    case = Case("8-empty", "Sk = 0", "dense", (5, 5), (0, 0), heads=(4, 2), causal=causal)
    inputs = build(case, device_of(path))
    out = torch.full_like(inputs.q, math.nan)
    result = on_path(path, case.features | {"out"}, inputs, lambda: inputs.call(out=out))
    if result is not None:
        assert (out == 0).all() and (result[1] == -math.inf).all()
    check_backward(path, case)


@pytest.mark.parametrize("lengths", [(7, 5, 9, 3, 2, 0, 0, 0), (1, 0, 0, 16, 0, 2, 2, 2)], ids=str)
def test_08_graph_replay(path, lengths):
    """Captured with full lengths, replayed with others in the same tensors: bitwise equal to an eager call."""
    if device_of(path) == "cpu":
        pytest.skip("CUDA graphs need a GPU")
    case = Case(
        "8-graph", "varlen, captured at full lengths", "varlen", (16,) * 8, (16,) * 8, heads=(4, 2), causal=True
    )
    inputs = build(case, device_of(path))
    out = torch.empty_like(inputs.q)

    def capture():
        inputs.call(out=out)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            _, lse = inputs.call(out=out)
        return graph, lse

    captured = on_path(path, case.features | {"out"}, inputs, capture)
    if captured is None:
        return
    graph, lse = captured
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        inputs.layout[name].copy_(cumulative(lengths))
    out.fill_(math.nan)
    graph.replay()
    eager, eager_lse = on_path(path, case.features, inputs, inputs.call)
    used = sum(lengths)
    assert_same_bits("out", out[:used], eager[:used])
    assert_same_bits("lse", lse[:, :used], eager_lse[:, :used])


# 9: zero-length sequences, which have hung kernels.
ZERO_LENGTHS = [
    Case("9a", "keys without queries", "varlen", (0, 0, 1023), (0, 1, 2044)),
    Case("9b", "wide heads, MQA, a sequence with neither", "varlen", (0, 1208, 840, 0), (2538, 1742, 840, 3072),
         heads=(4, 1), dims=(256, 256)),
    Case("9c", "single queries between nothing", "varlen", (0, 1, 0, 1), (0, 3, 0, 5), heads=(9, 3), causal=True),
    Case("9d", "ragged", "varlen", (1743, 1559), (1743, 1559), causal=True),
]  # fmt: skip


@pytest.mark.parametrize("case", ZERO_LENGTHS, ids=_ids)
def test_09_zero_length_sequences(path, case, watchdog):
    inputs = build(case, device_of(path))
    with watchdog():
        features = case.features | {"backward"}
        gradients = on_path(path, features, inputs, lambda: gradients_of_a_loss(inputs))
    if gradients is not None:
        ends = cumulative(case.lens_k).tolist()
        for length_q, start, end in zip(case.lens_q, ends, ends[1:], strict=False):
            if length_q == 0:
                assert (gradients["dk"][start:end] == 0).all() and (gradients["dv"][start:end] == 0).all()
    check_forward(path, case)
    check_backward(path, case)


# 10: NaN in backward.
def _loud(id, reason, *args, **options):
    return Case(f"10-{id}", reason, *args, dtype=FP16, loudness=3.0, **options)


LOUD = [
    _loud(f"varlen-{d}", "most rows are fully masked", "varlen", (76, 34, 146), (1, 1, 1), heads=(1, 1), causal=True,
          dims=(d, d))
    for d in (32, 128, 512)
] + [
    _loud("one-d16", "one query, one key", "dense", (1,), (1,), heads=(1, 1), dims=(16, 16)),
    _loud("one-d512", "the same at the widest head", "dense", (1,), (1,), heads=(1, 1), dims=(512, 512)),
    _loud("causal-d128", "1024 rows, the first with one key", "dense", (1024,), (1024,), heads=(1, 1), dims=(128, 128),
          causal=True),
    _loud("causal-d512", "the same at the widest head", "dense", (256,), (256,), heads=(1, 1), dims=(512, 512),
          causal=True),
]  # fmt: skip


@pytest.mark.parametrize("case", LOUD, ids=_ids)
def test_10_no_nan_in_backward(path, case):
    check_forward(path, case)
    check_backward(path, case)


def test_10_fully_masked_rows(path):
    """out = 0 and dq = 0 in every row but the last of each sequence."""
    inputs = build(LOUD[0], device_of(path))
    last = (cumulative(LOUD[0].lens_q)[1:] - 1).tolist()
    masked = [row for row in range(256) if row not in last]
    result = on_path(path, LOUD[0].features, inputs, inputs.call)
    if result is not None:
        assert (result[0][masked] == 0).all() and (result[1][:, masked] == -math.inf).all()
    gradients = on_path(path, LOUD[0].features | {"backward"}, inputs, lambda: gradients_of_a_loss(inputs))
    if gradients is not None:
        assert (gradients["dq"][masked] == 0).all()


# 15: odd strides.
def _head_dim_outermost(x):
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


def _odd_kv_head_stride(x):
    """One kv head whose stride, which never counts, is odd."""
    return x.as_strided(x.shape, (*x.stride()[:-2], 7, 1))


def _rows_innermost(x):
    return x.movedim(-3, -1).contiguous().movedim(-1, -3)


STRIDES = {
    "rows-innermost": (_rows_innermost, _rows_innermost),
    "transposed": (_head_dim_outermost, _head_dim_outermost),
    "odd-degenerate": (lambda x: x, _odd_kv_head_stride),
    "heads-first": (lambda x: x.transpose(-3, -2).contiguous().transpose(-3, -2),) * 2,
}
STRIDED = [
    Case("15-dense", "dense, one kv head", "dense", (33, 33), (65, 65), heads=(4, 1), causal=True, dtype=BF16),
    Case("15-padded", "q and k narrower than v: padding must not keep their strides", "dense", (33, 33), (65, 65),
         heads=(4, 1), dims=(16, 24)),
    Case("15-varlen", "varlen, one kv head", "varlen", (33, 17), (65, 20), heads=(4, 1), dtype=FP16),
]  # fmt: skip


def _equal_to_contiguous(path, contiguous, strided):
    features = contiguous.case.features
    expected = on_path(path, features, contiguous, contiguous.call)
    ours = on_path(path, features, strided, strided.call)
    if expected is not None:
        assert_same_bits("out", ours[0], expected[0])
        assert_same_bits("lse", ours[1], expected[1])


@pytest.mark.parametrize("kind", STRIDES)
@pytest.mark.parametrize("case", STRIDED, ids=_ids)
def test_15_odd_strides(path, case, kind):
    contiguous = build(case, device_of(path))
    of_q, of_kv = STRIDES[kind]

    def with_strides(q, k, v, **others):
        return replace(contiguous, q=of_q(q), k=of_kv(k), v=of_kv(v), **others)

    strided = with_strides(contiguous.q, contiguous.k, contiguous.v)
    assert any(not x.is_contiguous() for x in (strided.q, strided.k)) or kind == "odd-degenerate"
    _equal_to_contiguous(path, contiguous, strided)

    def run():
        expected = gradients_of_a_loss(contiguous)
        leaves = [x.clone().requires_grad_() for x in (contiguous.q, contiguous.k, contiguous.v)]
        loss = with_strides(*leaves).call()[0].float().square().sum()
        for name, gradient in zip("qkv", torch.autograd.grad(loss, leaves), strict=True):
            assert_same_bits(f"d{name}", gradient, expected[f"d{name}"])
        return True

    on_path(path, case.features | {"backward"}, contiguous, run)


def test_15_broadcast_keys(path):
    """K and V of one entry and one head, expanded over both with stride 0; the gradient sums over all of them."""
    case = Case("15-broadcast", "stride 0", "dense", (33,) * 3, (40,) * 3, heads=(4, 4))
    inputs = build(case, device_of(path))
    k, v = (x[:1, :, :1] for x in (inputs.k, inputs.v))
    shape = (3, 40, 4, 64)
    expanded = replace(inputs, k=k.expand(shape), v=v.expand(shape))
    contiguous = replace(inputs, k=k.expand(shape).contiguous(), v=v.expand(shape).contiguous())
    _equal_to_contiguous(path, contiguous, expanded)

    def run():
        expected = gradients_of_a_loss(contiguous)
        leaf = k.clone().requires_grad_()
        loss = replace(inputs, k=leaf.expand(shape), v=expanded.v).call()[0].float().square().sum()
        (gradient,) = torch.autograd.grad(loss, leaf)
        total = expected["dk"].double().sum((0, 2), keepdim=True)
        torch.testing.assert_close(gradient.double(), total, rtol=0.05, atol=0.05 * total.abs().max().item())
        return True

    on_path(path, case.features | {"backward"}, inputs, run)


def test_15_every_stride_of_a_paged_pool(path):
    """A pool whose pages are slices of a larger buffer, K and V interleaved."""
    case = Case("15-pool", "strided pages", "varlen", (9, 1), (64, 64), seqused_k=(64, 30), page=16, heads=(4, 2))
    inputs = build(case, device_of(path))
    buffer = torch.stack((inputs.k, inputs.v), dim=1)
    _equal_to_contiguous(path, inputs, replace(inputs, k=buffer[:, 0], v=buffer[:, 1]))


def test_15_metadata_may_be_slices(path):
    """A block table with more columns than this call needs to see, lengths from the middle of a larger tensor."""
    case = replace(DECODE, page=4)
    inputs = build(case, device_of(path))
    table = inputs.layout["block_table"]
    wide = torch.cat((table, torch.full_like(table, -1)), dim=1)[:, : table.shape[1]]
    lengths = int32((99, *case.seqused_k, 99), device_of(path))[1:-1]
    layout = {"seqused_k": lengths, "block_table": wide}
    _equal_to_contiguous(path, inputs, replace(inputs, layout=layout))
