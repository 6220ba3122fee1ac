"""What a server does with a cache, on every path: pages of any size, views of one buffer, splits, mixed batches.

Beside the declared cases of test_kvcache.py; the numbers are those of test_hard_cases.py.
"""

import math
from dataclasses import replace

import pytest
import torch
from cases import BF16, FP16, FP32, Case
from checks import answer_of, assert_right, check_forward, check_garbage
from harness import build, device_of, on_path
from tolerance import assert_same_bits

import flash_attn

PAGES = (1, 8, 16, 32, 64, 128, 256)
DIMS = ((64, 64), (128, 128), (256, 256), (512, 512), (192, 128), (64, 512), (576, 512))


def _ids(case):
    return case.id


def _splits(num_splits):
    return frozenset({"num_splits"}) if num_splits > 1 else frozenset()


# ---- Pages ------------------------------------------------------------------------------------------------------

PAGED = [
    Case(f"page-{page}-{dims[0]}x{dims[1]}", "several tiles of keys, tails inside pages and tiles", "varlen",
         (1, 70, 0, 3), (300, 200, 40, 129), seqused_k=(300, 131, 40, 65), page=page, heads=(4, 2), dims=dims,
         causal=True, dtype=FP16 if page == 32 else BF16, large=dims != (64, 64))
    for page in PAGES
    for dims in DIMS
]  # fmt: skip
PAGED_DECODE = [
    Case(f"page-{page}-decode{'-window' * windowed}", "one query each", "kvcache", (1,) * 4, (300,) * 4, page=page,
         seqused_k=(300, 0, 17, 256), heads=(8, 2), window=(100, 0) if windowed else (-1, -1), causal=not windowed)
    for page in PAGES
    for windowed in (False, True)
]  # fmt: skip


@pytest.mark.parametrize("case", PAGED + PAGED_DECODE, ids=_ids)
def test_pages(path, case):
    check_forward(path, case)


@pytest.mark.parametrize("garbage", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("layout", ["varlen", "kvcache"])
def test_07_garbage_in_pages(path, layout, page, garbage):
    """Block 0 is poisoned, as is all past the lengths; the table's tail holds foreign, negative and huge ids."""
    lens_q = (1, 9, 64, 5) if layout == "varlen" else (3,) * 4
    case = Case(f"7-{layout}-{page}", "unused memory", layout, lens_q, (128,) * 4, seqused_k=(32, 64, 96, 48),
                page=page, heads=(4, 2), causal=True)  # fmt: skip
    check_garbage(path, case, garbage)


@pytest.mark.parametrize("garbage", [math.nan, math.inf], ids=str)
def test_07_garbage_with_splits(path, garbage):
    """A split that begins or ends past the length reads nothing of what is there."""
    case = Case("7-splits", "unused memory", "kvcache", (1,) * 4, (300,) * 4, seqused_k=(32, 64, 96, 300), page=16,
                heads=(4, 2))  # fmt: skip
    clean, dirty = (build(case, device_of(path), garbage=value) for value in (0.0, garbage))
    features = case.features | {"num_splits"}
    expected, ours = (on_path(path, features, x, lambda x=x: x.call(num_splits=5)) for x in (clean, dirty))
    if ours is not None:
        assert_same_bits("out", ours[0], expected[0])
        assert_same_bits("lse", ours[1], expected[1])


# ---- Views of one buffer ----------------------------------------------------------------------------------------


def _page_after_page(k, v):
    both = torch.stack((k, v), dim=1)  # (pages, 2, page, heads, head_dim), vLLM's and TensorRT-LLM's
    return both[:, 0], both[:, 1]


def _halves(k, v):
    both = torch.stack((k, v))
    return both[0], both[1]


def _heads_first(k, v):
    both = torch.cat((k, v), dim=-1).transpose(1, 2).contiguous()  # (pages, heads, page, 2 * head_dim), vLLM's
    both = both.transpose(1, 2)
    return both[..., : k.shape[-1]], both[..., k.shape[-1] :]


def _spread(k, v):
    """Odd page, token and head strides, and an offset that no vector load divides."""
    pages, page, heads, dim = k.shape
    strides = ((page * heads * (dim + 3) + 5), heads * (dim + 3), dim + 3, 1)
    views = []
    for x in (k, v):
        flat = torch.full((strides[0] * pages + 1,), math.nan, dtype=x.dtype, device=x.device)
        views.append(flat.as_strided(x.shape, strides, 1))
        views[-1].copy_(x)
    return views


VIEWS = {"page-after-page": _page_after_page, "halves": _halves, "heads-first": _heads_first, "spread": _spread}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("page", [None, 1, 16, 64])
def test_keys_and_values_as_views_of_one_buffer(path, page, view):
    case = Case(f"views-{page}", "one buffer", "kvcache", (1, 1, 1), (130,) * 3, seqused_k=(100, 130, 7), page=page,
                heads=(4, 2), causal=True)  # fmt: skip
    inputs = build(case, device_of(path))
    expected = on_path(path, case.features, inputs, inputs.call)
    k, v = VIEWS[view](inputs.k, inputs.v)
    ours = on_path(path, case.features, inputs, replace(inputs, k=k, v=v).call)
    if ours is not None:
        assert_same_bits("out", ours[0], expected[0])
        assert_same_bits("lse", ours[1], expected[1])


@pytest.mark.parametrize("view", VIEWS)
def test_append_through_views_of_one_buffer(path, view):
    """The new tokens land in the views, and nothing else of the buffer changes."""
    case = Case("views-append", "one buffer", "kvcache", (3, 3), (64, 64), seqused_k=(15, 31), new=(3, 3), page=16,
                heads=(4, 2), rotary=(32, True), causal=True)  # fmt: skip
    plain, inputs = build(case, device_of(path)), build(case, device_of(path))
    expected = on_path(path, case.features, plain, plain.call)
    k, v = VIEWS[view](inputs.k, inputs.v)
    ours = on_path(path, case.features, inputs, replace(inputs, k=k, v=v).call)
    if ours is not None:
        assert_same_bits("out", ours[0], expected[0])
        assert_same_bits("k_cache", k, plain.k)
        assert_same_bits("v_cache", v, plain.v)


@pytest.mark.parametrize("dims", [(192, 128), (576, 512)], ids=str)
@pytest.mark.parametrize("page", [None, 16])
def test_values_are_part_of_the_keys(path, page, dims):
    """As in MLA: v is the first columns of k, in the same memory."""
    case = Case(f"alias-{page}", "one tensor", "kvcache", (1, 1), (130, 130), seqused_k=(100, 33), page=page,
                heads=(8, 1), dims=dims, causal=True)  # fmt: skip
    inputs = build(case, device_of(path))
    v = inputs.k[..., : dims[1]]
    expected = on_path(path, case.features, inputs, replace(inputs, v=v.clone()).call)
    ours = on_path(path, case.features, inputs, replace(inputs, v=v).call)
    if ours is not None:
        assert_same_bits("out", ours[0], expected[0])


# ---- Splits -----------------------------------------------------------------------------------------------------

DECODE = [
    Case(f"decode-{dims[0]}x{dims[1]}", "long and short requests side by side", "kvcache", (1,) * 4, (1500,) * 4,
         seqused_k=(1500, 1024, 3, 0), heads=(8, 2), dims=dims, causal=True, large=dims != (64, 64))
    for dims in DIMS
] + [
    Case("decode-paged", "the same in pages", "kvcache", (1,) * 4, (1500,) * 4, seqused_k=(1500, 1024, 3, 0),
         heads=(8, 1), page=16),
    Case("decode-scores", "every score feature, combined once", "kvcache", (2,) * 3, (700,) * 3,
         seqused_k=(700, 90, 1), heads=(4, 2), softcap=5.0, alibi="batch", sinks=FP32, window=(500, 0)),
    Case("decode-leftpad", "left padding in decoding", "kvcache", (1,) * 3, (700,) * 3, seqused_k=(700, 90, 64),
         leftpad=(300, 5, 64), heads=(4, 2)),
]  # fmt: skip


@pytest.mark.parametrize("num_splits", [0, 1, 3, 16])
@pytest.mark.parametrize("case", DECODE, ids=_ids)
def test_decode_with_splits(path, case, num_splits):
    check_forward(path, case, _splits(num_splits), num_splits=num_splits)


@pytest.mark.parametrize("pack_gqa", [None, True, False])
@pytest.mark.parametrize("heads", [(4, 1), (6, 2), (7, 1), (64, 2), (3, 3)], ids=str)
def test_packed_heads(path, heads, pack_gqa):
    """Groups that divide a tile, that don't, and that exceed a warp's rows, with several queries each."""
    case = Case(f"pack-{heads}", "query heads of a key head share a tile", "kvcache", (1, 5, 2), (300,) * 3,
                seqused_k=(300, 131, 2), heads=heads, page=16, varlen_q=True, causal=True, alibi="heads")  # fmt: skip
    check_forward(path, case, pack_gqa=pack_gqa)


@pytest.mark.parametrize("num_splits", [0, 1, 2, 16, 32, 128])
def test_06b_any_number_of_splits(path, num_splits):
    case = Case("6b", "one query, 4096 keys", "kvcache", (1,), (4096,), heads=(16, 8), dims=(128, 128))
    check_forward(path, case, _splits(num_splits), num_splits=num_splits)


def test_06c_a_cache_that_grows(path):
    """2,000 steps of decoding, a token each, with automatic splits."""
    case = Case("6c", "the cache after 2000 steps", "kvcache", (1,), (2048,), heads=(4, 1), dims=(32, 32),
                seqused_k=(2000,), page=16, causal=True)  # fmt: skip
    inputs = build(case, device_of(path))
    length = torch.zeros(1, dtype=torch.int32, device=device_of(path))
    grown = replace(inputs, layout=inputs.layout | {"seqused_k": length})
    outs = torch.full((2000, 4, 32), math.nan, dtype=case.dtype, device=device_of(path))

    def run():
        for step in range(2000):
            length.fill_(step + 1)
            outs[step] = grown.call()[0][0, 0]
        return True

    if on_path(path, case.features, inputs, run) is None:
        return
    assert outs.isfinite().all()
    exact = inputs.expected().out[0, 0]
    assert (outs[-1].cpu() - exact).abs().max() <= 2 * torch.finfo(case.dtype).eps * exact.abs().max()
    check_forward(path, case)


def test_12_batch_invariance(path):
    """With num_splits=1 a row's bits don't depend on what is beside it."""
    rows = []
    for others in (None, 9, 10):
        lens_q = (1,) if others is None else (1, others)
        lengths = (19802,) * len(lens_q)
        case = Case("12", "one seed for all: row 0 is the same", "varlen", lens_q, lengths, seqused_k=lengths, page=16,
                    heads=(14, 2), causal=True)  # fmt: skip
        inputs = build(case, device_of(path))
        if rows:
            alone = rows[0][1]
            pages = alone.layout["block_table"][0, : -(-19802 // 16)].long()
            for name in "kv":
                getattr(inputs, name)[inputs.layout["block_table"][0, : len(pages)].long()] = getattr(alone, name)[
                    pages
                ]
            inputs.q[0] = alone.q[0]
        result = on_path(path, case.features, inputs, lambda inputs=inputs: inputs.call(num_splits=1))
        if result is None:
            return
        rows.append((result, inputs))
    for (out, lse), _ in rows[1:]:
        assert_same_bits("row 0", out[0], rows[0][0][0][0])
        assert_same_bits("lse of row 0", lse[:, 0], rows[0][0][1][:, 0])


# ---- Mixed batches ----------------------------------------------------------------------------------------------


def _mixed(id, reason, lens_q, lengths, **options):
    options = {"heads": (4, 2), "causal": True, "page": 16} | options
    return Case(id, reason, "varlen", lens_q, lengths, seqused_k=lengths, **options)


MIXED = [
    _mixed("chunked-prefill", "chunks of prompts beside single tokens in one batch", (1, 1, 100, 1, 37, 1),
           (250, 17, 180, 1, 37, 129)),
    _mixed("chunked-prefill-window", "the same with gpt-oss's window and sinks", (1, 1, 100, 1, 37, 1),
           (250, 17, 180, 1, 37, 129), window=(60, 0), sinks=BF16),
    _mixed("speculative", "a few drafted tokens each", (5, 1, 4, 8), (200, 64, 4, 131), heads=(8, 1)),
    _mixed("padded", "a batch padded with requests that have neither queries nor keys", (1, 6, 0, 0), (100, 30, 0, 0)),
    _mixed("one-long-chunk", "a window; one entry's queries together see far more keys than the others'",
           (1000,) + (1,) * 19, (1500,) + (600,) * 19, window=(300, 0), heads=(1, 1)),
    _mixed("seqused-q", "fixed slots, of which some queries are used", (8, 8, 8), (100, 30, 8), seqused_q=(1, 8, 0)),
]  # fmt: skip
SPECULATIVE_APPEND = [
    Case("speculative-append", "drafted tokens are appended and attend to each other", "kvcache", (5,) * 3, (128,) * 3,
         seqused_k=(100, 7, 0), new=(5,) * 3, page=16, heads=(8, 2), rotary=(64, False), causal=True),
    Case("chunked-append", "prefill and decode append in one call", "kvcache", (40, 1, 3), (128,) * 3,
         seqused_k=(60, 100, 0), new=(40, 1, 3), page=16, heads=(4, 2), varlen_q=True, causal=True),
]  # fmt: skip


@pytest.mark.parametrize("case", MIXED + SPECULATIVE_APPEND, ids=_ids)
def test_mixed_batches(path, case):
    check_forward(path, case)


@pytest.mark.parametrize("num_splits", [2, 7])
@pytest.mark.parametrize("case", MIXED, ids=_ids)
def test_mixed_batches_with_splits(path, case, num_splits):
    check_forward(path, case, _splits(num_splits), num_splits=num_splits)


def test_drafted_tokens_equal_single_steps(path):
    """Five tokens in one causal call are right, and so is each in a call of its own."""
    case = Case("drafted", "speculative decoding", "kvcache", (5, 5), (90, 90), seqused_k=(70, 90), heads=(4, 2),
                causal=True)  # fmt: skip
    check_forward(path, case)
    inputs = build(case, device_of(path))
    for row in range(5):
        lengths = inputs.layout["seqused_k"] - 4 + row
        step = replace(inputs, q=inputs.q[:, row : row + 1], layout={"seqused_k": lengths})
        answer = answer_of(path, case.features, step)
        if answer is not None:
            assert_right(answer)


# ---- Compilation ------------------------------------------------------------------------------------------------


def test_compiled_steps(path):
    """Append, rotary and pages in one compiled graph, for batches that change: the bits of eager calls."""

    def step(q, k_cache, v_cache, k, v, cos, sin, lengths, table):
        return flash_attn.flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, rotary_cos=cos, rotary_sin=sin, cache_seqlens=lengths, block_table=table,
            causal=True, return_softmax_lse=True,
        )  # fmt: skip

    torch._dynamo.reset()
    fast = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, new in ((3, 5), (5, 7), (6, 9)):
        case = Case(f"compiled-{batch}", "a step", "kvcache", (new,) * batch, (64,) * batch, new=(new,) * batch,
                    seqused_k=tuple(range(10, 10 + batch)), page=16, heads=(4, 2), rotary=(32, True),
                    causal=True)  # fmt: skip
        results = []
        for function in (step, fast):  # in this order: a refusal is no NotImplementedError once it is compiled
            x = build(case, device_of(path))
            arguments = (x.q, x.k, x.v, x.new_k, x.new_v, *x.rotary, x.layout["seqused_k"], x.layout["block_table"])
            found = on_path(path, case.features, x, lambda f=function, a=arguments: f(*a))
            if found is None:
                return
            results.append((*found, x.k, x.v))
        for name, expected, ours in zip(("out", "lse", "k_cache", "v_cache"), *results, strict=True):
            assert_same_bits(name, ours, expected)


# ---- Scheduler metadata -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_splits", [0, 1, 4])
def test_metadata_serves_all_layers(path, num_splits):
    """Computed once, used by calls alike; between calls its semaphore is 0, and it holds a whole buffer's slice."""
    case = Case("metadata", "four layers", "kvcache", (1,) * 3, (700,) * 3, seqused_k=(700, 90, 1), heads=(8, 2),
                page=16, causal=True)  # fmt: skip
    device, features = device_of(path), case.features | _splits(num_splits)
    layers = [build(replace(case, id=f"metadata-{layer}"), device) for layer in range(4)]
    lengths = layers[0].layout["seqused_k"]
    made = flash_attn.get_scheduler_metadata(3, 1, 704, 8, 2, 64, lengths, page_size=16, causal=True,
                                             num_splits=num_splits)  # fmt: skip
    buffer = torch.zeros(made.numel() + 40, dtype=torch.int32, device=device)
    buffer[: made.numel()] = made
    metadata = buffer[: made.numel()]
    for layer in layers:
        result = on_path(
            path, features, layer,
            lambda layer=layer: layer.call(scheduler_metadata=metadata, num_splits=num_splits),
        )  # fmt: skip
        if result is None:
            return
        exact = layer.expected().out
        error = (result[0].cpu() - exact).abs().max().item()
        assert error <= 2 * torch.finfo(case.dtype).eps * exact.abs().max().item()
        assert torch.equal(metadata, made) and metadata[0] == 0
    assert not buffer[made.numel() :].any()


def test_metadata_of_a_compiled_step(path):
    """Nothing breaks the graph, which serves other batches and lengths as well."""
    device = device_of(path)

    def make(lengths, new_tokens):
        return flash_attn.get_scheduler_metadata(
            lengths.shape[0], 1, 2048, 8, 2, 64, lengths, page_size=16, max_seqlen_k_new=new_tokens, causal=True
        )

    compiled = torch.compile(make, backend="aot_eager", fullgraph=True, dynamic=True)
    for lengths, new_tokens in (([2000, 3, 0], 1), ([70, 1900], 5)):
        lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
        with flash_attn.use_path(path):
            assert_same_bits("metadata", compiled(lengths, new_tokens), make(lengths, new_tokens))
