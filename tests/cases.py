"""The declared cases: every feature alone and in the combinations that have gone wrong elsewhere.

All paths run the same table. Shapes are small, since the oracle is dense; `large` marks the few that only GPU
paths run.
"""

from dataclasses import dataclass

import torch

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@dataclass(frozen=True)
class Case:
    id: str
    reason: str
    layout: str  # "dense", "varlen" or "kvcache"
    lens_q: tuple  # rows of q per batch entry (its slot, where seqused_q says less)
    lens_k: tuple  # rows of k per batch entry (its slot, or the capacity of its cache)
    heads: tuple = (2, 2)  # of q, of k and v
    dims: tuple = (64, 64)  # of q and k, of v
    dtype: torch.dtype = BF16
    causal: bool = False
    window: tuple = (-1, -1)
    softcap: float = 0.0
    scale: float | None = None
    alibi: str | None = None  # "heads" for slopes (H,), "batch" for (B, H)
    sinks: torch.dtype | None = None
    dropout_p: float = 0.0
    seqused_q: tuple | None = None
    seqused_k: tuple | None = None  # for "kvcache": cache_seqlens, before append
    leftpad: tuple | None = None
    page: int | None = None
    # Keys that lie before the window of every row hold garbage, and table slots of nothing but such keys stale ids.
    recycled: bool = False
    lengths_by_cu_seqlens_k: bool = False  # paged varlen whose lengths come from cu_seqlens_k
    cache_rows: tuple | None = None  # cache_batch_idx
    new: tuple | None = None  # tokens to append per entry
    varlen_q: bool = False  # "kvcache" with cu_seqlens_q
    rotary: tuple | None = None  # (rotary_dim, interleaved)
    loudness: float = 1.0  # factor on the inputs
    lse_grad: bool = False
    large: bool = False

    @property
    def differentiable(self):
        return self.layout != "kvcache" and self.page is None and self.leftpad is None

    @property
    def sides(self):
        """How far left and right of the diagonal the mask reaches, None for an infinite side."""
        left, right = self.window[0], 0 if self.causal else self.window[1]
        return tuple(side if 0 <= side < 2**31 - 1 else None for side in (left, right))

    def first_key(self, entry):
        """The first cache row of an entry that the call may read."""
        first = 0 if self.leftpad is None else self.leftpad[entry]
        left, _ = self.sides
        if not self.recycled or left is None:
            return first
        num_rows = self.lens_q[entry] if self.seqused_q is None else self.seqused_q[entry]
        stored = self.lens_k[entry] if self.seqused_k is None else self.seqused_k[entry]
        last = stored + (0 if self.new is None else self.new[entry])
        unseen = last - num_rows - left if num_rows else last
        return max(first, min(unseen, stored))  # an append writes its rows, seen or not

    @property
    def features(self):
        """The keys of _dispatch.FEATURES that a forward call of this case needs.

        Below the interface causal means that nothing right of the diagonal is seen, however it was asked for.
        """
        left, right = self.sides
        wanted = {
            "varlen" if self.layout == "varlen" or self.varlen_q else "dense": True,
            "paged": self.page is not None,
            "causal": right == 0,
            "window": left is not None or right not in (None, 0),
            "softcap": self.softcap > 0,
            "alibi": self.alibi is not None,
            "dropout": self.dropout_p > 0,
            "sinks": self.sinks is not None,
            "gqa": self.heads[0] != self.heads[1],
            "wide_heads": self.dims[0] > 512,
            "seqused_q": self.seqused_q is not None,
            "seqused_k": self.seqused_k is not None or self.lengths_by_cu_seqlens_k,
            "leftpad": self.leftpad is not None,
            "cache_batch_idx": self.cache_rows is not None,
            "append": self.new is not None,
            "rotary": self.rotary is not None,
        }
        return frozenset(name for name, needed in wanted.items() if needed)


def _dense(id, reason, batch, seqlen_q, seqlen_k, **options):
    return Case(id, reason, "dense", (seqlen_q,) * batch, (seqlen_k,) * batch, **options)


def _varlen(id, reason, lens_q, lens_k, **options):
    return Case(id, reason, "varlen", tuple(lens_q), tuple(lens_k), **options)


def _cache(id, reason, lens_q, capacity, **options):
    return Case(id, reason, "kvcache", tuple(lens_q), (capacity,) * len(lens_q), **options)


_LENGTH_PAIRS = ((1, 1), (1, 200), (2, 17), (17, 2), (63, 65), (64, 64), (65, 63), (128, 129), (129, 128))
_HEAD_DIMS = (1, 8, 16, 32, 40, 64, 80, 96, 111, 128, 160, 192, 224, 256, 320, 512)
_DIM_PAIRS = ((192, 128), (64, 512), (576, 512), (525, 40), (40, 64), (128, 64), (33, 7))

LENGTHS = [
    _dense(f"len-{sq}x{sk}{'-causal' * causal}", "tile edges: one short, exact, one over; both ways round",
           1, sq, sk, causal=causal)
    for sq, sk in (*_LENGTH_PAIRS, (200, 257))
    for causal in (False, True)
]  # fmt: skip

HEAD_DIMS = [
    _dense(f"dim-{d}x{dv}-{str(dtype)[6:]}", "any head dim, equal or not, multiple of 8 or not", 2, 65, 77,
           dims=(d, dv), dtype=dtype, causal=dtype is BF16)
    for d, dv in [(d, d) for d in _HEAD_DIMS] + list(_DIM_PAIRS)
    for dtype in (BF16, FP16)
]  # fmt: skip

DENSE = [
    _dense("fp32", "float32 is a dtype of the CPU path", 2, 65, 129, dtype=FP32, causal=True),
    _dense("fp64", "float64, so that gradcheck works on user code; its LSE is float64", 2, 65, 129,
           dtype=FP64),
    _dense("rows-300-window", "more rows than the CPU path takes at once, some of which see the same keys", 2, 300, 333,
           window=(90, 20), heads=(2, 1), lse_grad=True),
    _dense("rows-300-alibi", "the same, where later rows see all keys of earlier ones", 1, 300, 330, alibi="heads",
           causal=True),
    _dense("fp64-general", "every score feature in float64, where nothing hides behind rounding", 2, 33, 50,
           dtype=FP64, window=(20, 5), softcap=3.0, alibi="heads", sinks=FP64, heads=(4, 2), lse_grad=True),
    _dense("gqa-4-2", "a group of two", 2, 65, 64, heads=(4, 2)),
    _dense("gqa-6-3-causal", "three kv heads: not a power of two", 2, 64, 129, heads=(6, 3), causal=True),
    _dense("mqa-5-1-causal", "one kv head, an odd group", 2, 17, 65, heads=(5, 1), causal=True),
    _dense("mqa-decode", "one query row against many keys: heads get packed", 3, 1, 200, heads=(8, 1)),
    _dense("scale", "softmax_scale given, not the default", 2, 63, 64, scale=0.31),
    _dense("scale-negative", "a negative scale turns the maximum round", 1, 17, 33, scale=-0.2),
    _dense("scale-zero", "a scale of zero is a mean", 1, 17, 33, scale=0.0, causal=True),
    _dense("scale-negative-causal", "a mask of -inf that is scaled too becomes +inf", 1, 33, 33, scale=-0.2,
           causal=True),
    _dense("scale-zero-causal-fp32", "or NaN", 1, 33, 33, scale=0.0, causal=True, dtype=FP32),
    _dense("loud", "scores of some hundred: exp must not overflow", 1, 65, 129, loudness=6.0),
    _dense("loud-fp16", "the same in float16, whose largest value is 65504", 1, 65, 129, loudness=6.0,
           dtype=FP16),
    _dense("window-left", "a left window only", 2, 65, 129, window=(16, -1)),
    _dense("window-right", "a right window only", 2, 65, 129, window=(-1, 3)),
    _dense("window-both", "both sides, in the middle of tiles", 2, 129, 200, window=(40, 9)),
    _dense("window-zero", "the diagonal alone", 1, 65, 65, window=(0, 0)),
    _dense("window-causal", "the usual sliding window; the right side is overridden", 2, 129, 129,
           window=(31, 7),
           causal=True, heads=(4, 2)),
    _dense("window-wide", "a window wider than both lengths is no window", 1, 63, 65, window=(1000, 1000)),
    _dense("window-misses", "a short K: the first rows see no key on the left side", 1, 129, 17,
           window=(4, 2)),
    _dense("causal-short-k", "more queries than keys: the first rows see nothing", 2, 129, 17, causal=True),
    _dense("causal-short-k-sinks", "rows that see nothing but the sink: O = 0, LSE = sink", 2, 65, 17,
           causal=True,
           sinks=BF16, lse_grad=True),
    _dense("empty-k", "no key at all: O = 0, LSE = -inf, gradients 0", 2, 5, 0),
    _dense("empty-k-causal", "the same, causal", 2, 5, 0, causal=True),
    _dense("empty-k-sinks", "no key but a sink: LSE = sink", 2, 5, 0, sinks=FP32),
    _dense("empty-q", "no query: empty output, dk = dv = 0", 2, 0, 7),
    _dense("empty-batch", "a batch of nothing", 0, 4, 4),
    _dense("softcap", "a softcap that bends the scores", 2, 65, 129, softcap=2.0),
    _dense("softcap-causal-gqa", "Gemma's combination", 2, 64, 65, softcap=15.0, causal=True, heads=(4, 2),
           loudness=3.0),
    _dense("softcap-window-fp16", "softcap before the mask, not after", 2, 65, 65, softcap=5.0,
           window=(20, 0), dtype=FP16),
    _dense("alibi", "slopes per head, distance on both sides of the diagonal", 2, 65, 129, alibi="heads"),
    _dense("alibi-batch-causal", "slopes per batch entry and head", 2, 129, 65, alibi="batch", causal=True,
           heads=(4, 2)),
    _dense("alibi-softcap-window", "the order: scale, softcap, ALiBi, mask", 2, 65, 77, alibi="heads",
           softcap=2.0,
           window=(30, 4)),
    _dense("sinks", "a sink in q's dtype, as transformers sends it", 2, 65, 65, sinks=BF16, heads=(4, 2)),
    _dense("sinks-fp32-causal-window", "gpt-oss: sinks, causal, sliding window, GQA", 2, 129, 129, sinks=FP32,
           causal=True, window=(31, 0), heads=(8, 2)),
    _dense("sinks-fp16", "float16 inputs with a float16 sink", 1, 17, 64, sinks=FP16, dtype=FP16),
    _dense("lse-grad", "a gradient that arrives through LSE as well", 2, 65, 64, lse_grad=True, heads=(4, 2)),
    _dense("lse-grad-causal-masked", "the same where rows are fully masked", 2, 65, 17, lse_grad=True,
           causal=True),
    _dense("dims-everything", "unequal odd dims with every score feature", 2, 40, 65, dims=(33, 7),
           softcap=4.0,
           alibi="batch", sinks=FP32, window=(25, 3), heads=(6, 2), dtype=FP16, lse_grad=True),
]  # fmt: skip

DROPOUT = [
    _dense("dropout", "dropout alone", 2, 65, 129, dropout_p=0.2),
    _dense("dropout-causal-gqa", "the mask is per query head, not per kv head", 2, 64, 77, dropout_p=0.5,
           causal=True,
           heads=(4, 2)),
    _dense("dropout-sinks", "the sink is never dropped", 2, 33, 40, dropout_p=0.3, sinks=FP32, lse_grad=True),
    _dense("dropout-everything", "with ALiBi, a window and unequal dims", 2, 50, 65, dropout_p=0.15,
           alibi="heads",
           window=(40, 6), dims=(40, 64), dtype=FP16),
    _dense("dropout-fp64", "float64, where nothing hides behind rounding", 1, 33, 65, dropout_p=0.4,
           dtype=FP64),
    _varlen("dropout-varlen", "positions count within the sequence", (33, 0, 65, 1), (17, 5, 70, 40),
            dropout_p=0.25,
            causal=True),
    _varlen("dropout-seqused", "positions count within what is used", (33, 40), (70, 50), dropout_p=0.25,
            seqused_q=(20, 40), seqused_k=(65, 31)),
]  # fmt: skip

VARLEN = [
    _varlen("varlen", "sequences of different lengths", (17, 64, 1, 65), (33, 64, 129, 2)),
    _varlen("varlen-causal-gqa", "each sequence has its own diagonal", (17, 64, 1, 65), (33, 64, 129, 200),
            causal=True,
            heads=(4, 2)),
    _varlen("varlen-one", "one sequence equals the dense call", (129,), (200,), causal=True, dtype=FP16),
    _varlen("varlen-many-short", "more sequences than a tile has rows", (3, 1, 2, 4) * 10, (5, 1, 7, 2) * 10,
            causal=True),
    _varlen("varlen-zeros", "zero lengths of q, of k and of both, at either end", (0, 5, 0, 17, 3, 0),
            (4, 0, 0, 33, 9, 0),
            lse_grad=True),
    _varlen("varlen-all-empty", "nothing but empty sequences", (0, 0), (0, 0)),
    _varlen("varlen-short-k-causal", "fully masked rows inside a sequence", (65, 30), (17, 1), causal=True,
            heads=(2, 1)),
    _varlen("varlen-window", "a window per sequence", (65, 129), (100, 64), window=(30, 5)),
    _varlen("varlen-alibi-batch", "slopes of the right entry", (33, 65), (65, 40), alibi="batch"),
    _varlen("varlen-softcap-sinks", "score features in varlen", (33, 65, 0), (65, 40, 3), softcap=3.0,
            sinks=BF16,
            lse_grad=True, causal=True),
    _varlen("varlen-dims", "unequal head dims in varlen", (33, 65), (65, 40), dims=(192, 128), heads=(4, 1),
            causal=True),
    _varlen("varlen-d256", "a wide head in varlen", (33, 65), (65, 40), dims=(256, 256), causal=True),
    _varlen("varlen-fp32", "float32 in varlen", (33, 65), (65, 40), dtype=FP32, window=(9, 9)),
    _varlen("seqused-k", "keys past seqused_k hold garbage", (17, 64, 5), (65, 129, 40),
            seqused_k=(33, 129, 0),
            causal=True),
    _varlen("seqused-q", "rows past seqused_q: O = 0, LSE = -inf, dq = 0", (17, 64, 5), (65, 129, 40),
            seqused_q=(3, 64, 0), lse_grad=True),
    _varlen("seqused-both-window", "the diagonal follows the used lengths", (33, 64), (65, 129),
            seqused_q=(20, 1),
            seqused_k=(40, 100), window=(25, 2), heads=(4, 2)),
    _varlen("varlen-recycled", "keys before every window may hold anything, and get no gradient", (33, 70), (100, 200),
            window=(30, 4), softcap=5.0, heads=(4, 2), recycled=True),
    _varlen("seqused-q-sinks", "LSE past seqused_q is -inf even with a sink", (17, 33), (20, 40),
            seqused_q=(9, 33),
            sinks=FP32, lse_grad=True),
    _varlen("seqused-q-edge", "all rows of a tile but one are in use", (200, 130, 70), (210, 140, 90),
            seqused_q=(191, 127, 63), dims=(40, 24), sinks=FP32, causal=True),
]  # fmt: skip

VARLEN_FORWARD_ONLY = [
    _varlen("leftpad", "keys before leftpad hold garbage; j counts from the first used key", (17, 33),
            (65, 129),
            leftpad=(5, 64), causal=True),
    _varlen("leftpad-seqused", "leftpad and seqused_k together; one entry keeps nothing", (17, 33, 4),
            (65, 129, 20),
            leftpad=(5, 0, 20), seqused_k=(40, 100, 20), alibi="heads"),
    _varlen("paged-16", "the usual page size", (17, 1, 64), (65, 129, 200), seqused_k=(50, 129, 177),
            page=16, causal=True),
    _varlen("paged-1", "a page per token", (5, 17), (33, 40), seqused_k=(33, 20), page=1, heads=(4, 2)),
    _varlen("paged-5", "a page size that is no power of two", (5, 17), (33, 40), seqused_k=(33, 21), page=5,
            window=(9, 2)),
    _varlen("paged-64-seqused-q", "large pages with padded queries", (33, 64), (200, 129), seqused_q=(20, 64),
            seqused_k=(129, 128), page=64, causal=True, sinks=BF16),
    _varlen("paged-256", "a page longer than any sequence", (33, 1), (200, 129), seqused_k=(129, 1),
            page=256),
    _varlen("paged-cu-seqlens-k", "FA2's form: lengths come from cu_seqlens_k", (17, 33), (65, 40), page=16,
            lengths_by_cu_seqlens_k=True, causal=True),
    _varlen("paged-leftpad", "leftpad skips whole pages", (17, 33), (65, 129), seqused_k=(60, 100),
            leftpad=(20, 3),
            page=16, causal=True),
    _varlen("paged-empty", "an entry without a single page", (5, 1), (64, 64), seqused_k=(0, 30), page=16),
    _varlen("paged-dims", "unequal head dims in pages", (9, 1), (64, 64), seqused_k=(64, 30), page=16,
            dims=(40, 64),
            softcap=3.0),
    _varlen("paged-16-recycled", "a server gave the pages before the window away: several tiles lie before it",
            (17, 1, 70, 5), (265, 329, 300, 40), seqused_k=(250, 329, 277, 21), page=16, window=(100, 0), causal=True,
            heads=(4, 2), recycled=True),
    _varlen("paged-16-recycled-prefill", "the same for tiles of many rows", (130, 70), (300, 290), page=16,
            seqused_k=(300, 290), window=(100, 0), causal=True, recycled=True),
    _varlen("paged-64-recycled", "the window begins inside a page and a tile", (70, 1), (300, 330),
            seqused_k=(300, 200), page=64, window=(33, 5), softcap=5.0, recycled=True),
]  # fmt: skip

KVCACHE = [
    _cache("cache-full", "no cache_seqlens: all of the cache", (1, 1), 65),
    _cache("cache-decode", "one token, different lengths, garbage past them", (1, 1, 1), 129,
           seqused_k=(33, 129, 1),
           heads=(8, 2), causal=True),
    _cache("cache-prefill", "many queries against a longer cache", (17, 17), 129, seqused_k=(100, 64),
           causal=True),
    _cache("cache-empty", "an empty cache entry", (2, 2), 40, seqused_k=(0, 17)),
    _cache("cache-window", "sliding window in decoding", (3, 3), 129, seqused_k=(100, 64), window=(20, 0),
           heads=(4, 1)),
    _cache("cache-alibi-softcap-sinks", "score features in decoding", (3, 3), 65, seqused_k=(50, 64),
           alibi="batch", softcap=3.0, sinks=BF16, causal=True),
    _cache("cache-dims", "unequal head dims", (1, 1), 65, seqused_k=(50, 64), dims=(192, 128), heads=(4, 1),
           dtype=FP16),
    _cache("cache-leftpad", "a left-padded batch", (2, 2), 65, seqused_k=(50, 64), leftpad=(7, 0), causal=True),
    _cache("cache-batch-idx", "entries live in other rows of a larger cache", (1, 1), 65, seqused_k=(50, 64),
           cache_rows=(4, 1)),
    _cache("cache-batch-idx-equal", "equal lengths in rows that don't follow each other", (1,) * 3, 65,
           seqused_k=(50,) * 3, cache_rows=(2, 0, 1)),
    _cache("cache-batch-idx-many", "the same for tiles of many rows", (70, 70), 130, seqused_k=(100, 64),
           cache_rows=(3, 0), causal=True),
    _cache("cache-batch-idx-paged", "entries have other rows of a larger table", (3, 3), 100, seqused_k=(50, 64),
           cache_rows=(4, 1), page=16, dims=(40, 24), causal=True),
    _cache("cache-lengths", "parts by lengths, of more entries than a warp has lanes, some without keys",
           (2,) * 37, 400, seqused_k=(0, 400, 1, 255, 257, *(13 * b for b in range(31)), 0), heads=(2, 1),
           dims=(40, 24), sinks=FP32, causal=True),
    _cache("cache-lengths-window", "parts by lengths, of what windows and queries leave to see", (1, 7, 0, 3), 900,
           seqused_k=(900, 640, 500, 300), heads=(4, 2), window=(280, 0), varlen_q=True, recycled=True),
    _cache("cache-paged", "a paged cache", (1, 1, 1), 100, seqused_k=(50, 64, 0), page=16, causal=True),
    _cache("cache-paged-1", "a page per token", (4, 4), 40, seqused_k=(30, 7), page=1, heads=(4, 2)),
    _cache("cache-recycled", "what is before the window has been overwritten", (3, 3), 300,
           seqused_k=(300, 180), window=(90, 0), heads=(4, 2), recycled=True),
    _cache("cache-recycled-leftpad", "padding and window end in different tiles", (2, 2), 300, seqused_k=(290, 200),
           leftpad=(30, 150), window=(90, 0), recycled=True),
    _cache("cache-paged-1-recycled", "a page per token, most of them given away", (1, 1), 300, seqused_k=(290, 30),
           page=1, window=(40, 0), heads=(8, 2), recycled=True),
    _cache("append-recycled", "new tokens beside pages that were given away", (3, 3), 300, seqused_k=(200, 290),
           new=(3, 3), page=16, window=(90, 0), causal=True, recycled=True),
    _cache("cache-varlen-q", "queries of different numbers", (1, 7, 3), 100, seqused_k=(50, 64, 9),
           varlen_q=True,
           causal=True),
    _cache("cache-latent", "multi-head latent attention, keys compressed", (2, 2), 150, seqused_k=(140, 33),
           dims=(576, 512), heads=(16, 1), page=64, causal=True),
    _cache("cache-fp32", "float32", (2, 2), 65, seqused_k=(50, 64), dtype=FP32),
    _cache("append-1", "one new token", (1, 1), 65, seqused_k=(50, 0), new=(1, 1), causal=True),
    _cache("append-many", "a chunk of new tokens", (9, 9), 65, seqused_k=(50, 3), new=(9, 9), causal=True,
           heads=(4, 2)),
    _cache("append-none", "k and v of no token", (1, 1), 65, seqused_k=(50, 3), new=(0, 0)),
    _cache("append-not-q", "more new keys than queries", (2, 2), 65, seqused_k=(50, 3), new=(5, 5),
           causal=True),
    _cache("append-paged", "new tokens cross a page edge", (5, 5), 64, seqused_k=(14, 31), new=(5, 5),
           page=16,
           causal=True),
    _cache("append-batch-idx", "new tokens go to the right row", (2, 2), 33, seqused_k=(20, 31), new=(2, 2),
           cache_rows=(3, 0), causal=True),
    _cache("append-leftpad", "cache_seqlens counts the padding", (2, 2), 33, seqused_k=(20, 31), new=(2, 2),
           leftpad=(6, 0), causal=True),
    _cache("append-varlen", "each entry has its own number of new tokens", (3, 1, 4), 40,
           seqused_k=(20, 31, 0),
           new=(3, 1, 4), varlen_q=True, causal=True),
    _cache("rotary-interleaved", "pairs (0,1), (2,3), ...", (3, 3), 65, seqused_k=(50, 0), new=(3, 3),
           rotary=(32, True),
           causal=True),
    _cache("rotary-halves", "pairs (0, rd/2), ...", (3, 3), 65, seqused_k=(50, 7), new=(3, 3),
           rotary=(64, False),
           causal=True, dtype=FP16),
    _cache("rotary-full", "neither causal nor local: all queries at cache_seqlens", (3, 3), 65,
           seqused_k=(50, 7),
           new=(3, 3), rotary=(64, True)),
    _cache("rotary-window", "local without causal: query positions advance", (3, 3), 65, seqused_k=(50, 7),
           new=(3, 3), rotary=(16, False), window=(20, 4)),
    _cache("rotary-window-left", "a left side of 0 is local, too", (3, 3), 65, seqused_k=(50, 7), new=(3, 3),
           rotary=(32, True), window=(0, -1)),
    _cache("rotary-window-infinite", "a side of 2**31 - 1 is infinite, so the call isn't local", (3, 3), 65,
           seqused_k=(50, 7), new=(3, 3), rotary=(16, False), window=(-1, 2**31 - 1)),
    _cache("rotary-paged-gqa", "rotary, append and pages", (3, 3), 64, seqused_k=(15, 31), new=(3, 3),
           rotary=(32, True), page=16, heads=(4, 2), causal=True),
    _cache("rotary-leftpad", "positions are absolute cache indices", (2, 2), 65, seqused_k=(50, 7), new=(2, 2),
           rotary=(32, False), leftpad=(9, 0), causal=True),
    _cache("rotary-varlen", "rotary with queries of different numbers", (3, 1), 65, seqused_k=(50, 7),
           new=(3, 1), rotary=(32, False), varlen_q=True, causal=True),
    _cache("rotary-fp32", "float32 tables", (2, 2), 65, seqused_k=(50, 7), new=(2, 2), rotary=(32, True),
           dtype=FP32, causal=True),
]  # fmt: skip

# With 8 heads or more the tiles of such a batch outnumber the multiprocessors of any GPU.
_MANY_Q, _MANY_K = (tuple(step * i % limit for i in range(40)) for step, limit in ((97, 700), (61, 900)))

LARGE = [
    _dense("large-causal", "several tiles per row block", 2, 2048, 2048, heads=(4, 2), causal=True,
           large=True),
    _dense("large-d128", "the head dim that most models have", 1, 1024, 3000, dims=(128, 128), heads=(4, 4),
           large=True,
           dtype=FP16),
    _varlen("large-varlen", "several tiles in some sequences", (1500, 0, 77, 513), (1500, 9, 1300, 2049),
            causal=True,
            heads=(4, 1), large=True),
    _varlen("large-many-tiles", "blocks that take many tiles, of all lengths", _MANY_Q, _MANY_K, causal=True,
            heads=(8, 2), large=True),
    _varlen("large-many-tiles-d128", "the same, some without keys in their window", _MANY_Q, _MANY_K, dims=(128, 128),
            window=(300, 20), heads=(8, 8), sinks=FP32, large=True),
    _varlen("large-many-tiles-d512", "the same, where two groups share rows", _MANY_Q, _MANY_K, dims=(512, 512),
            heads=(8, 8), dtype=FP16, large=True),
    _cache("large-many-tiles-cache", "dense queries, lengths of keys on the device", (300,) * 24, 900,
           seqused_k=_MANY_K[:24], heads=(8, 2), causal=True, large=True),
]  # fmt: skip

_BWD_DIMS = ((16, 16), (32, 32), (64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256), (64, 512),
             (512, 512), (33, 7))  # fmt: skip
_BWD_OPTIONS = {
    "full": {"dtype": FP16, "lse_grad": True},
    "causal-gqa": {"causal": True, "heads": (4, 2)},
    "window-softcap": {"window": (70, 20), "softcap": 5.0, "dtype": FP16, "heads": (3, 1), "lse_grad": True},
    "everything": {"window": (200, 0), "alibi": "batch", "sinks": BF16, "dropout_p": 0.2, "heads": (4, 2),
                   "seqused_q": (250, 0, 65), "seqused_k": (140, 30, 333)},
}  # fmt: skip
BACKWARD = [
    _varlen(f"bwd-{d}x{dv}-{name}", "several tiles of rows and of keys, with ends inside tiles, per head dim",
            (270, 0, 65), (150, 30, 391), dims=(d, dv), large=d not in (16, 33), **options)
    for d, dv in _BWD_DIMS
    for name, options in _BWD_OPTIONS.items()
]  # fmt: skip

FORWARD = LENGTHS + HEAD_DIMS + DENSE + [case for case in LARGE if case.layout == "dense"]
VARLEN_FORWARD = VARLEN + VARLEN_FORWARD_ONLY + [case for case in LARGE if case.layout == "varlen"]
ALL = FORWARD + VARLEN_FORWARD + KVCACHE + DROPOUT + BACKWARD
