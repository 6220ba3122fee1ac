"""The declared cases: named suites of shapes, for a GPU and, smaller, for the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor

from flash_attn._dispatch import DTYPE_NAMES

Window = tuple[int, int]
FULL: Window = (-1, -1)
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class Measure(Enum):
    """What is timed, and what a figure counts."""

    DEVICE = "TFLOP/s"  # a call on the device, from a cold L2
    HOST = "us/call"  # the host's time of an eager call
    GRAPH = "us"  # a call of a CUDA graph, replayed: what does not fit in the L2 is read from memory
    GRAPH_BANDWIDTH = "GB/s"  # the same, as KV bytes by time


@dataclass(frozen=True)
class Case:
    """One attention call. With `lengths` it is a packed batch of self-attention, and the batch and seqlens follow.

    With `cached` k and v are a KV cache, with `page` one in pages that lie in random order. With `backward` the call
    is the backward pass alone.
    """

    suite: str
    batch: int
    heads: int
    heads_k: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    dtype: str = "bf16"
    causal: bool = False
    window: Window = FULL
    softcap: float = 0.0
    dropout_p: float = 0.0
    alibi: bool = False
    sinks: bool = False
    lengths: tuple[int, ...] = ()
    backward: bool = False
    cached: bool = False
    page: int = 0

    @property
    def title(self) -> str:
        """Names the case within its suite."""
        batch = f"b{self.batch} h{self.heads}/{self.heads_k}"
        lengths = f"q{self.seqlen_q} k{self.seqlen_k}"
        if self.lengths:
            lengths = f"{min(self.lengths)}..{max(self.lengths)} of {sum(self.lengths)}"
        options = [f"w{self.window[0]},{self.window[1]}"] if self.window != FULL else []
        options += [f"softcap{self.softcap:g}"] if self.softcap else []
        options += [f"dropout{self.dropout_p:g}"] if self.dropout_p else []
        options += [name for name in ("alibi", "sinks") if getattr(self, name)]
        options += [f"page{self.page}"] if self.page else ["cache"] if self.cached else []
        options += ["bwd"] if self.backward else []
        mask = "causal" if self.causal else "full"
        return " ".join([batch, lengths, f"d{self.head_dim}/{self.head_dim_v}", mask, *options, self.dtype])

    @property
    def sides(self) -> Window:
        """The window that the call means: causal is a right side of 0."""
        return (self.window[0], 0) if self.causal else self.window

    @property
    def flops(self) -> int:
        """Of the two matrix products, over the pairs that the mask lets through; of the backward pass's five."""
        squares = [(length, length) for length in self.lengths] or [(self.seqlen_q, self.seqlen_k)] * self.batch
        pairs = sum(visible_pairs(*square, *self.sides) for square in squares)
        forward = 2 * self.heads * pairs * (self.head_dim + self.head_dim_v)
        return forward * 5 // 2 if self.backward else forward

    @property
    def kv_bytes(self) -> int:
        """Of the keys and values, each once."""
        columns = self.heads_k * (self.head_dim + self.head_dim_v)
        return self.batch * self.seqlen_k * columns * DTYPES[self.dtype].itemsize

    @property
    def checked_entry(self) -> int:
        """The batch entry whose results are compared: the longest, or the last of equal ones."""
        return self.lengths.index(max(self.lengths)) if self.lengths else self.batch - 1

    def rows_of(self, x: Tensor, entry: int) -> Tensor:
        """A batch entry's rows of a tensor that is packed or not, as the case is."""
        if not self.lengths:
            return x[entry]
        start = sum(self.lengths[:entry])
        return x[start : start + self.lengths[entry]]


def visible_pairs(seqlen_q: int, seqlen_k: int, left: int, right: int) -> int:
    """How many (query, key) pairs the mask lets through; the last query is aligned with the last key."""
    diagonal = torch.arange(seqlen_q) + seqlen_k - seqlen_q
    first = (diagonal - left).clamp(min=0) if left >= 0 else torch.zeros_like(diagonal)
    last = diagonal + right if right >= 0 else torch.full_like(diagonal, seqlen_k)
    return int((last.clamp(max=seqlen_k - 1) - first + 1).clamp(min=0).sum())


@dataclass(frozen=True)
class Suite:
    name: str
    purpose: str
    cases: Callable[[str, str], Iterator[Case]]  # (name, "cuda" or "cpu") -> cases
    also: tuple[str, ...] = ()  # implementations beside the default ones
    only: tuple[str, ...] = ()  # instead of the default ones
    measure: Measure = Measure.DEVICE
    devices: tuple[str, ...] = ("cuda", "cpu")


def _dense(suite: str, device: str, batch: int, heads: int, seqlen: int, head_dim: int, **options) -> Case:
    dtype = "bf16" if device == "cuda" else "fp32"  # what the CPU is used with
    head_dim_v = options.pop("head_dim_v", head_dim)
    heads_k = options.pop("heads_k", heads)
    return Case(suite, batch, heads, heads_k, seqlen, seqlen, head_dim, head_dim_v, dtype, **options)


def _by_length(head_dims: tuple[int, ...], lengths: tuple[int, ...], cpu_lengths: tuple[int, ...]):
    """As the FlashAttention papers measure: the same number of tokens and of columns whatever the length."""

    def cases(suite: str, device: str) -> Iterator[Case]:
        tokens, width = (16384, 2048) if device == "cuda" else (1024, 512)
        for head_dim in head_dims:
            for seqlen in lengths if device == "cuda" else cpu_lengths:
                for causal in (False, True):
                    heads = width // head_dim
                    yield _dense(suite, device, tokens // seqlen, heads, seqlen, head_dim, causal=causal)

    return cases


def _by_head_dim(pairs: tuple[tuple[int, int], ...]):
    def cases(suite: str, device: str) -> Iterator[Case]:
        batch, width, seqlen = (2, 2048, 8192) if device == "cuda" else (1, 512, 256)
        for head_dim, head_dim_v in pairs:
            heads = max(4 if device == "cuda" else 1, width // head_dim)
            for causal in (False, True):
                yield _dense(suite, device, batch, heads, seqlen, head_dim, head_dim_v=head_dim_v, causal=causal)

    return cases


def _backward(cases: Callable[[str, str], Iterator[Case]]):
    def of(suite: str, device: str) -> Iterator[Case]:
        for case in cases(suite, device):
            yield replace(case, backward=True)

    return of


def _local(suite: str, device: str) -> Iterator[Case]:
    width, seqlen, left = (2048, 16384, 1023) if device == "cuda" else (512, 1024, 127)
    for head_dim in (64, 128, 256):
        yield _dense(suite, device, 1, width // head_dim, seqlen, head_dim, causal=True, window=(left, 0))


def _score(suite: str, device: str) -> Iterator[Case]:
    batch, heads, seqlen, left = (4, 16, 4096, 1023) if device == "cuda" else (1, 4, 512, 127)
    options = (
        {},
        {"softcap": 30.0},
        {"alibi": True},
        {"sinks": True},
        {"window": (left, 0)},
        {"dropout_p": 0.1},
        {"heads_k": heads // 4},
    )
    for option in options:
        yield _dense(suite, device, batch, heads, seqlen, 128, causal=True, **option)


def skewed_lengths(count: int, longest: int, shrink: float, shortest: int) -> tuple[int, ...]:
    """A few long sequences and many short ones, in a mixed order."""
    by_rank = [max(shortest, int(longest * shrink**rank)) for rank in range(count)]
    step = next(step for step in range(count // 2 + 1, count + 1) if math.gcd(step, count) == 1)
    return tuple(by_rank[index * step % count] for index in range(count))


def _packed(suite: str, device: str, lengths: tuple[int, ...], heads: int, head_dim: int, **options) -> Case:
    dense = _dense(suite, device, len(lengths), heads, max(lengths), head_dim, **options)
    return Case(**(vars(dense) | {"lengths": lengths}))


def _varlen(suite: str, device: str) -> Iterator[Case]:
    if device == "cuda":
        skewed, short, width = skewed_lengths(64, 8192, 0.9, 32), skewed_lengths(512, 512, 0.99, 16), 2048
    else:
        skewed, short, width = skewed_lengths(8, 512, 0.7, 8), skewed_lengths(32, 64, 0.95, 4), 512
    for head_dim in (64, 128):
        for causal in (False, True):
            yield _packed(suite, device, skewed, width // head_dim, head_dim, causal=causal)
    yield _packed(suite, device, skewed, width // 64, 64, heads_k=width // 256, causal=True)
    yield _packed(suite, device, short, width // 128, 128, causal=True)


def _tiny(suite: str, device: str) -> Iterator[Case]:
    yield _dense(suite, device, 1, 2, 16, 64)
    yield _dense(suite, device, 1, 2, 16, 64, causal=True)
    yield Case(suite, 1, 8, 8, 1, 128, 128, 128, "bf16" if device == "cuda" else "fp32")
    yield _packed(suite, device, (5, 11), 2, 64, causal=True)


# batch, query heads, key heads, keys, head dim
_DECODE = ((1, 32, 8, 65536, 128), (16, 32, 8, 8192, 128), (128, 32, 8, 4096, 128), (128, 64, 8, 2048, 64),
           (32, 16, 8, 8192, 256), (32, 32, 4, 8192, 512))  # fmt: skip
_DECODE_ON_CPU = ((1, 8, 2, 2048, 64), (4, 8, 2, 512, 64))


def _step(suite: str, device: str, shape: tuple[int, ...], page: int = 0) -> Case:
    batch, heads, heads_k, seqlen_k, head_dim = shape
    dtype = "bf16" if device == "cuda" else "fp32"
    return Case(suite, batch, heads, heads_k, 1, seqlen_k, head_dim, head_dim, dtype, causal=True, cached=True,
                page=page)  # fmt: skip


def _decode(suite: str, device: str) -> Iterator[Case]:
    for shape in _DECODE if device == "cuda" else _DECODE_ON_CPU:
        yield _step(suite, device, shape)


def _paged(*pages: int):
    def cases(suite: str, device: str) -> Iterator[Case]:
        for page in pages:
            for shape in (_DECODE[1], _DECODE[2], _DECODE[5]) if device == "cuda" else _DECODE_ON_CPU:
                yield _step(suite, device, shape, page)

    return cases


# Queries; batch, query heads, key heads, keys; head dims. The last is a step of multi-head latent attention, whose 128
# heads make as many rows of each query.
_CHUNKS = ((2048, (1, 32, 8, 16384), (128, 128)), (512, (8, 8, 1, 8192), (128, 128)),
           (512, (1, 8, 1, 32768), (128, 128)), (2048, (1, 16, 2, 16384), (256, 256)),
           (1, (128, 128, 1, 8192), (576, 512)))  # fmt: skip
_CHUNKS_ON_CPU = ((128, (1, 8, 2, 1024), (64, 64)), (1, (4, 16, 1, 256), (576, 512)))


def _prefill(suite: str, device: str) -> Iterator[Case]:
    for page in (0, 16, 64, 256):
        for queries, shape, (head_dim, head_dim_v) in _CHUNKS if device == "cuda" else _CHUNKS_ON_CPU:
            step = _step(suite, device, (*shape, head_dim), page)
            yield replace(step, seqlen_q=queries, head_dim_v=head_dim_v)


def _latency(suite: str, device: str) -> Iterator[Case]:
    for seqlen_k in (1024, 4096) if device == "cuda" else (256, 1024):
        for head_dim in (64, 128):
            for page in (0, 16):
                yield _step(suite, device, (1, 32, 8, seqlen_k, head_dim), page)


def _memory(suite: str, device: str) -> Iterator[Case]:
    for seqlen in (1024, 2048, 4096, 8192, 16384, 32768):
        yield _dense(suite, device, 1, 8, seqlen, 64)


def _declared_elsewhere(suite: str, device: str) -> Iterator[Case]:
    return iter(())


_HEAD_DIMS = (
    (32, 32), (80, 80), (96, 96), (160, 160), (192, 192), (192, 128), (320, 320), (384, 384), (512, 512),
)  # fmt: skip
_HEAD_DIMS_BACKWARD = ((32, 32), (96, 96), (192, 192), (192, 128), (512, 512))
CPU_PATH = "cpu"  # its cases and its timing are those of benchmarks/cpu_path.py

SUITES = {
    suite.name: suite
    for suite in (
        Suite("fwd", "speed over length", _by_length((64, 128, 256), (1024, 4096, 16384), (256, 1024))),
        Suite("fwd_short", "short sequences", _by_length((64, 128), (512, 1024, 2048), (64, 128))),
        Suite("hdim", "other head dims", _by_head_dim(_HEAD_DIMS)),
        Suite("mla", "head dims of multi-head latent attention", _by_head_dim(((64, 512), (576, 512)))),
        Suite("local", "a sliding window", _local),
        Suite("score", "options of the score, at one shape", _score),
        Suite("varlen", "packed sequences of skewed lengths", _varlen),
        Suite(
            "bwd", "the backward pass over length", _backward(_by_length((64, 128, 256), (1024, 4096, 16384), (256,)))
        ),
        Suite("hdim_bwd", "the backward pass at other head dims", _backward(_by_head_dim(_HEAD_DIMS_BACKWARD))),
        Suite("varlen_bwd", "the backward pass of packed sequences", _backward(_varlen)),
        Suite(
            "bwd_det",
            "the backward pass with deterministic=True, beside the one without",
            _backward(_by_length((64, 128, 256), (1024, 4096, 16384), (256,))),
            only=("ours", "det"),
        ),
        Suite("decode", "one query each, a dense cache", _decode, measure=Measure.GRAPH_BANDWIDTH),
        Suite("paged", "one query each, a cache in pages", _paged(16, 64, 256), measure=Measure.GRAPH_BANDWIDTH),
        Suite("pages", "the same with other page sizes", _paged(1, 8, 32, 128), measure=Measure.GRAPH_BANDWIDTH),
        Suite("prefill", "a chunk of queries against a cache, dense or in pages, and latent attention", _prefill),
        Suite("latency", "one query of one request, in a CUDA graph", _latency, measure=Measure.GRAPH),
        Suite("tiny", "the host's time per eager call", _tiny, also=("sdpa",), measure=Measure.HOST),
        Suite("memory", "memory over length", _memory, also=("math",), devices=("cuda",)),
        Suite(CPU_PATH, "the CPU path's calls, as benchmarks/cpu_path.py", _declared_elsewhere, devices=("cpu",)),
    )
}


def suites_for(device: str) -> tuple[str, ...]:
    return tuple(name for name, suite in SUITES.items() if device in suite.devices)
