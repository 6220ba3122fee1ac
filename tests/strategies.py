"""Hypothesis strategies for cases and calls: any shape, stride, mask, list of lengths and page size that the API
allows."""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from cases import BF16, FP16, FP32, FP64, Case
from hypothesis import assume
from hypothesis import strategies as st
from memory import Memory

from flash_attn._arguments import MAX_HEAD_DIM, MAX_HEAD_DIM_V

_FEW_HEADS = [(1, 1), (2, 1), (2, 2), (3, 1), (4, 2), (5, 1)]
HEADS = st.sampled_from([*_FEW_HEADS, (6, 3), (7, 1), (12, 2), (17, 1)])


# Pairs of models that have a bucket of their own, by the larger of the two.
_MODELS_PAIRS = {192: (192, 128), 512: (64, 512), 576: (576, 512)}
HEAD_DIMS = (32, 64, 80, 96, 128, 160, 192, 256, 512, 576)  # the buckets of head dims; SM80 has none of 80 and 160


class Sizes(NamedTuple):
    """Strategies for everything whose size decides how long a case takes."""

    length: st.SearchStrategy
    cached_queries: st.SearchStrategy  # rows of q of an entry that reads a cache
    capacity: st.SearchStrategy  # of a cache; at least 1
    dims: st.SearchStrategy  # (head_dim, head_dim_v)
    side: st.SearchStrategy  # of a window
    heads: st.SearchStrategy = HEADS
    most_work: float = math.inf  # as work_of counts it


def _equal_or_not(head_dim):
    pairs = st.one_of(head_dim.map(lambda d: (d, d)), st.tuples(head_dim, head_dim))
    return pairs.map(lambda dims: (dims[0], min(dims[1], MAX_HEAD_DIM_V)))


@st.composite
def dims_in(draw, buckets):
    """(head_dim, head_dim_v), the larger of which lies in one of the buckets, often at an end of it."""
    bucket = draw(st.sampled_from(buckets))
    if bucket in _MODELS_PAIRS and draw(st.sampled_from([False, False, False, True])):
        return _MODELS_PAIRS[bucket]
    least = max((other for other in HEAD_DIMS if other < bucket), default=0) + 1
    ends = {bucket, bucket - 8, bucket - 1, least, least + 7}
    larger = draw(st.one_of(st.sampled_from(sorted(ends, reverse=True)), st.integers(least, bucket)))
    other = draw(st.one_of(st.just(larger), st.just(larger), st.integers(1, larger)))
    if larger > MAX_HEAD_DIM_V:
        return larger, min(other, MAX_HEAD_DIM_V)
    return (larger, other) if draw(st.booleans()) else (other, larger)


SMALL = Sizes(
    length=st.one_of(st.integers(0, 10), st.integers(0, 90)),
    cached_queries=st.integers(1, 9),
    capacity=st.integers(1, 70),
    dims=_equal_or_not(st.one_of(st.sampled_from([8, 16, 32, 64]), st.integers(1, 72))),
    side=st.one_of(st.just(-1), st.integers(0, 40)),
)
_TILE_EDGES = [edge + by for edge in (16, 32, 64, 128) for by in (0, -1, 1)]
_DIM_EDGES = [edge + by for edge in HEAD_DIMS for by in (0, -1, 1, -8, 8) if edge + by <= MAX_HEAD_DIM]
# The sizes at which kernels change their ways: ends of tiles, ends of head-dim buckets.
EDGES = Sizes(
    length=st.one_of(st.sampled_from([0, 1, *_TILE_EDGES]), st.integers(0, 70), st.integers(0, 300)),
    cached_queries=st.one_of(st.integers(0, 9), st.sampled_from(_TILE_EDGES)),
    capacity=st.one_of(st.sampled_from([1, *_TILE_EDGES]), st.integers(1, 70), st.integers(1, 300)),
    dims=_equal_or_not(st.one_of(st.sampled_from(_DIM_EDGES), st.integers(1, MAX_HEAD_DIM))),
    side=st.one_of(st.sampled_from([-1, 0, 1, -3, 2**31 - 1, *_TILE_EDGES]), st.integers(0, 40), st.integers(0, 300)),
)
# What emulated kernels compute in a few seconds: several tiles of rows and of keys, caches that are split by the
# planner's own choice, and large head dims seldom.
EMULATED = Sizes(
    length=st.one_of(st.sampled_from([0, 1, *_TILE_EDGES]), st.integers(0, 70), st.integers(0, 200)),
    cached_queries=st.one_of(st.integers(0, 9), st.sampled_from(_TILE_EDGES[:9])),
    capacity=st.one_of(
        st.sampled_from([1, *_TILE_EDGES]), st.integers(1, 300), st.integers(1, 300), st.integers(300, 1300)
    ),
    dims=dims_in([64, 64, 64, 64, 32, 32, 128, 128, 128, 96, 192, 256, 512, 576]),
    side=st.one_of(
        st.sampled_from([-1, 0, 1, -3, 2**31 - 1, *_TILE_EDGES]), *[st.integers(0, 40)] * 2, st.integers(0, 150)
    ),
    heads=st.sampled_from([*_FEW_HEADS, (8, 2), (17, 1)]),
    most_work=40,
)


# SM90's kernels leave calls with few rows to SM80's.
EMULATED_SM90 = EMULATED._replace(
    length=st.one_of(st.sampled_from([0, *_TILE_EDGES[6:]]), st.integers(60, 200), st.integers(60, 200)),
    cached_queries=st.one_of(st.sampled_from(_TILE_EDGES[6:]), st.integers(65, 140)),
    capacity=st.one_of(st.sampled_from(_TILE_EDGES), st.integers(1, 300)),
)


def work_of(case, backward=False):
    """How many tiles of 64 rows and 64 keys the call computes; large head dims count for more, if not in proportion,
    lest nothing but empty sequences be left of them."""
    packed = case.heads[0] // case.heads[1] if case.layout == "kvcache" else 1
    lengths = zip(case.lens_q, case.lens_k, strict=True)
    tiles = sum(-(-rows * packed // 64) * -(-keys // 64) for rows, keys in lengths)
    return tiles * (case.heads[0] // packed) * math.sqrt(max(case.dims) / 64) * (4 if backward else 1)


@st.composite
def scores(draw, sizes=SMALL):
    """The options of a case that concern its scores."""
    dropout_p = draw(st.sampled_from([0.0, 0.0, 0.0, 0.1, 0.6]))
    return {
        "heads": draw(sizes.heads),
        "dims": draw(sizes.dims),
        "dtype": draw(st.sampled_from([BF16, FP16, FP32, FP64])),
        "causal": draw(st.booleans()),
        "window": draw(st.one_of(st.just((-1, -1)), st.tuples(sizes.side, sizes.side))),
        "softcap": 0.0 if dropout_p else draw(st.sampled_from([0.0, 0.0, 1.5, 30.0])),
        "alibi": draw(st.sampled_from([None, None, "heads", "batch"])),
        "sinks": draw(st.sampled_from([None, None, FP32, BF16])),
        "scale": draw(st.sampled_from([None, None, 0.3, -0.1, 0.0])),
        "lse_grad": draw(st.booleans()),
        "dropout_p": dropout_p,
        "loudness": draw(st.sampled_from([1.0, 1.0, 1.0, 4.0])),
    }


@st.composite
def dense(draw, sizes=SMALL):
    batch, length_q, length_k = draw(st.integers(1, 3)), draw(sizes.length), draw(sizes.length)
    return _named(Case("", "generated", "dense", (length_q,) * batch, (length_k,) * batch, **draw(scores(sizes))))


def _within(draw, lengths):
    return tuple(draw(st.integers(0, length)) for length in lengths)


@st.composite
def varlen(draw, sizes=SMALL):
    lens_q, lens_k = _pairs_of_lengths(draw, sizes)
    seqused = {}
    for name, lengths in (("seqused_q", lens_q), ("seqused_k", lens_k)):
        if draw(st.booleans()):
            seqused[name] = _within(draw, lengths)
    return _named(Case("", "generated", "varlen", lens_q, lens_k, **seqused, **draw(scores(sizes))))


def _pairs_of_lengths(draw, sizes):
    pairs = draw(st.lists(st.tuples(sizes.length, sizes.length), min_size=1, max_size=5))
    return tuple(zip(*pairs, strict=True))


PAGES = st.one_of(st.sampled_from([1, 1, 2, 7, 8, 16, 48, 64, 128]), st.integers(1, 20), st.integers(1, 300))


@st.composite
def paged_varlen(draw, sizes=SMALL):
    """Keys in pages, whose lengths either of the two arguments may give, perhaps with left padding."""
    lens_q, lens_k = _pairs_of_lengths(draw, sizes)
    options = draw(scores(sizes)) | {"page": draw(PAGES)}
    if draw(st.booleans()):
        options["lengths_by_cu_seqlens_k"] = True
    else:
        options["seqused_k"] = _within(draw, lens_k)
    if draw(st.booleans()):
        options["seqused_q"] = _within(draw, lens_q)
    if draw(st.booleans()):
        options["leftpad"] = _within(draw, options.get("seqused_k", lens_k))
    return _named(Case("", "generated", "varlen", lens_q, lens_k, **options))


@st.composite
def cached(draw, sizes=SMALL):
    """A cache, paged or not, perhaps with left padding, perhaps with new tokens and rotary."""
    batch, capacity = draw(st.integers(1, 3)), draw(sizes.capacity)
    options = draw(scores(sizes)) | {"dropout_p": 0.0, "lse_grad": False}
    options["varlen_q"] = draw(st.booleans())
    num_new = draw(st.sampled_from([None, 0, 1, min(4, capacity), min(19, capacity)]))
    if options["varlen_q"]:
        lens_q = tuple(draw(sizes.cached_queries) for _ in range(batch))
        new = None if num_new is None else tuple(draw(st.integers(0, num_new)) for _ in range(batch))
    else:
        lens_q = (draw(sizes.cached_queries),) * batch
        new = None if num_new is None else (num_new,) * batch
    before = _within(draw, [capacity - count for count in new or (0,) * batch])
    if draw(st.booleans()):
        options["page"] = draw(PAGES)
    if draw(st.booleans()):
        options["cache_rows"] = tuple(draw(st.permutations(range(batch + 2))))[:batch]
    if draw(st.booleans()):
        options["leftpad"] = _within(draw, before)
    if new is not None:
        options["new"] = new
        if options["dims"][0] >= 16 and draw(st.booleans()):
            options["rotary"] = (draw(st.sampled_from(range(16, options["dims"][0] + 1, 16))), draw(st.booleans()))
    return _named(Case("", "generated", "kvcache", lens_q, (capacity,) * batch, seqused_k=before, **options))


def _named(case):
    """The id seeds the numbers, so it has to tell cases apart."""
    return replace(case, id=repr(case))


@st.composite
def memories(draw, num_dims, expandable=(), last_is_dense=False):
    """A memory layout; `last_is_dense` keeps the last dimension at stride 1, as `out=` must have it."""
    order = draw(st.permutations(range(num_dims - last_is_dense)))
    return Memory(
        order=(*order, *range(len(order), num_dims)),
        step=(draw(st.integers(0, len(order) - 1)), draw(st.sampled_from([1, 1, 2, 3]))),
        offset=draw(st.sampled_from([0, 0, 8, 1, 5])),
        expanded=draw(st.sampled_from([None, None, *expandable])),
    )


@dataclass(frozen=True)
class Call:
    """A case and all else that a caller may choose; None for a memory is what torch would give."""

    case: Case
    q: Memory | None = None
    spare_rows: int = 0  # of packed q, k and v, after the last sequence
    # K and V as views of one buffer: "columns" of one row, "halves" of an entry or page, V the "prefix" of K's columns.
    shared_kv: str | None = None
    k: Memory | None = None
    v: Memory | None = None
    passes_out: bool = False
    out: Memory | None = None
    garbage: float = math.nan  # in memory that the call must not use
    max_seqlen: str = "exact"  # or "none", or "loose": larger than any length
    pack_gqa: bool | None = None
    num_splits: int = 0
    metadata: str | None = None  # scheduler_metadata: that of get_scheduler_metadata, or "garbage"
    backward: bool = False
    dout: Memory | None = None
    deterministic: bool = False

    @property
    def features(self):
        more = {"out": self.passes_out, "num_splits": self.num_splits > 1, "backward": self.backward}
        return self.case.features | {name for name, needed in more.items() if needed}


def _expandable(case, name, num_dims, has_spare_rows=False):
    """The dimensions that may have stride 0: none of a cache that is written, and of memory that is partly unused
    only heads and head_dim, since the unused part differs from one sequence to the next."""
    if name != "q" and case.new is not None:
        return []
    lengths = (case.seqused_q, case.seqused_k, case.leftpad, case.cache_rows)
    partly_unused = has_spare_rows or case.page is not None or case.recycled
    partly_unused |= any(given is not None for given in lengths)
    # In float32 and float64 scores over a head_dim of stride 0 rounded up to four times as much as the naive ones.
    return range(num_dims - 2 if partly_unused else 0, num_dims - (case.dtype in (FP32, FP64)))


def _ways_to_share(case):
    """How K and V may lie in one buffer: V may be part of K where nothing is written."""
    halves = case.dims[0] == case.dims[1] and (case.layout != "varlen" or case.page is not None)
    prefix = case.dims[0] >= case.dims[1] and case.new is None
    return ["columns", *["halves"] * halves, *["prefix"] * prefix]


def _simplest(case, served):
    """The case without the features that no path in question serves."""
    options = {"page": "paged", "leftpad": "leftpad", "cache_rows": "cache_batch_idx", "new": "append"}
    options["rotary"] = "rotary"
    unserved = {field: None for field, feature in options.items() if feature not in served}
    if "new" in unserved:
        unserved["rotary"] = None
    if case.dtype in (FP32, FP64):
        unserved["dtype"] = BF16 if case.dtype is FP32 else FP16
    if "dropout" not in served:
        unserved["dropout_p"] = 0.0
    return replace(case, lengths_by_cu_seqlens_k=case.lengths_by_cu_seqlens_k and "paged" in served, **unserved)


KINDS = ("forward", "backward", "cache")


@st.composite
def calls(draw, served=None, sizes=EDGES, kinds=KINDS):
    """A whole call of one of the kinds. Given the features that a path serves, seven calls of eight use no others."""
    kind = draw(st.sampled_from(kinds))
    layouts = {
        "forward": [dense(sizes), varlen(sizes), paged_varlen(sizes)],
        "backward": [dense(sizes), varlen(sizes)],
        "cache": [cached(sizes)],
    }[kind]
    case = replace(draw(st.one_of(layouts)), id="")
    case = replace(case, recycled=case.window[0] >= 0 and draw(st.booleans()))
    num_splits = draw(st.sampled_from([0, 0, 1, 2, 3, 17, 256]))
    if num_splits > 17 and sum(case.lens_q) * case.heads[0] > 200:
        num_splits = 17  # each split keeps a copy of the output
    # In float32 the CPU path's backward is torch's own (scaled_dot_product_attention's), whose error is up to three
    # times that of the naive one where scores are large: exponentials good to 20 units in the last place.
    backward = kind == "backward" and case.dtype is not FP32
    if served is not None and draw(st.integers(0, 7)):
        case = _simplest(case, served)
        num_splits = num_splits if "num_splits" in served else min(num_splits, 1)
        backward = backward and "backward" in served
    assume(work_of(case, backward) <= sizes.most_work)
    packed_q = case.layout == "varlen" or case.varlen_q
    num_dims = {"q": 3 if packed_q else 4, "k": 3 if case.layout == "varlen" and case.page is None else 4}
    num_dims["v"] = num_dims["k"]
    spare_rows = draw(st.sampled_from([0, 0, 0, 3, 70, 150])) if packed_q and case.new is None else 0
    placed = {
        name: draw(st.one_of(st.none(), memories(count, _expandable(case, name, count, spare_rows > 0))))
        for name, count in num_dims.items()
    }
    metadata = draw(st.sampled_from([None, "own", "garbage"])) if case.layout == "kvcache" else None
    passes_out = not backward and draw(st.booleans())
    out = draw(st.one_of(st.none(), memories(num_dims["q"], last_is_dense=True))) if passes_out else None
    dout = None
    if backward:  # what is poisoned past seqused_q must not be repeated
        expandable = range(case.seqused_q is not None or spare_rows > 0, num_dims["q"])
        dout = draw(st.one_of(st.none(), memories(num_dims["q"], expandable)))
    return Call(
        case if backward else replace(case, lse_grad=False),
        **placed,
        spare_rows=spare_rows,
        shared_kv=draw(st.sampled_from([None, None, *_ways_to_share(case)])),
        passes_out=passes_out,
        out=out,
        garbage=draw(st.sampled_from([math.nan, math.inf])),
        max_seqlen=draw(st.sampled_from(["exact", "none", "loose"])),
        pack_gqa=draw(st.sampled_from([None, None, True, False])),
        num_splits=num_splits,
        metadata=metadata,
        backward=backward,
        dout=dout,
        deterministic=backward and draw(st.booleans()),
    )
