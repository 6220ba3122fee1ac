"""Time and memory of one call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import cache

import torch

Call = Callable[[], object]
WARMUP_MS = 10.0
_L2_BYTES = 256 * 2**20  # more than any GPU's L2
_MIN_REPEATS = 3
_CALLS_PER_SAMPLE = 50  # far fewer than the launches a stream queues before it blocks the host
_OVERHEAD_SAMPLES = 20


def time_ms(call: Call, device: str, rep_ms: float) -> float:
    """Median time of a call, repeated for about rep_ms: on the GPU by its own clock, from a cold L2."""
    if device == "cpu":
        return _host_ms(call, rep_ms)
    do_bench = _do_bench()
    if do_bench is None:
        return _event_ms(call, rep_ms)
    return do_bench(call, warmup=WARMUP_MS, rep=rep_ms, return_mode="median")


@cache
def _do_bench() -> Callable[..., float] | None:
    """Triton's, where it works: it needs a C compiler the first time."""
    try:
        from triton.testing import do_bench

        do_bench(lambda: None, warmup=1, rep=1)
    except Exception:
        return None
    return do_bench


def _host_ms(call: Call, rep_ms: float) -> float:
    call()
    times: list[float] = []
    while len(times) < _MIN_REPEATS or sum(times) < rep_ms:
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def _event_ms(call: Call, rep_ms: float) -> float:
    """What do_bench does, without triton."""
    flush = torch.empty(_L2_BYTES, dtype=torch.int8, device="cuda")

    def measured(repeats: int) -> list[float]:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in pairs:
            flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]

    call()
    estimate = max(statistics.median(measured(_MIN_REPEATS)), 1e-3)  # the events' resolution
    measured(max(1, int(WARMUP_MS / estimate)))
    return statistics.median(measured(max(_MIN_REPEATS, int(rep_ms / estimate))))


_GRAPH_MS = 5.0  # the least that a replay takes, so that its launch does not count


def graph_ms(call: Call, device: str, rep_ms: float) -> float:
    """Median time of a call in a CUDA graph of many, replayed for about rep_ms; on the CPU that of a plain call.

    Nothing is flushed: what fits in the L2 is found there.
    """
    if device == "cpu":
        return _host_ms(call, rep_ms)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)

    def captured(count: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(count):
                call()
        return graph

    def replayed(graph: torch.cuda.CUDAGraph, repeats: int) -> float:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in pairs:
            start.record()
            graph.replay()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in pairs)

    one = captured(1)
    replayed(one, _MIN_REPEATS)
    count = max(1, min(500, int(_GRAPH_MS / max(replayed(one, _MIN_REPEATS), 1e-3))))
    many = captured(count)
    each = replayed(many, _MIN_REPEATS) / count
    return replayed(many, max(_MIN_REPEATS, int(rep_ms / (each * count)))) / count


def overhead_ms(call: Call, device: str) -> float:
    """Median time that the host spends in a call; on a GPU nothing is waited for in between."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(_CALLS_PER_SAMPLE):
        call()
    samples = []
    for _ in range(_OVERHEAD_SAMPLES):
        synchronize()
        start = time.perf_counter()
        for _ in range(_CALLS_PER_SAMPLE):
            call()
        samples.append((time.perf_counter() - start) * 1e3 / _CALLS_PER_SAMPLE)
    synchronize()
    return statistics.median(samples)


def peak_bytes(call: Call, device: str) -> int | None:
    """What a call allocates at its highest beyond its inputs, its output included. Only the GPU's allocator tells."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
