"""What the demo prints and measures: a progress bar, checks, a table, time and peak memory."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch


class Progress:
    """A plain progress bar; where stdout is no terminal, a line per fifth of the way."""

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.done = label, total, 0
        self.start = time.perf_counter()
        self.live = sys.stdout.isatty()

    def step(self, note: str = "") -> None:
        self.done += 1
        elapsed = time.perf_counter() - self.start
        filled = 24 * self.done // self.total
        bar = "#" * filled + "-" * (24 - filled)
        line = f"  {self.label} [{bar}] {self.done}/{self.total}  {elapsed:.0f} s  {note}"
        if self.live:
            print(f"\r{line:<100}", end="\n" if self.done == self.total else "", flush=True)
        elif self.done == self.total or self.done * 5 // self.total > (self.done - 1) * 5 // self.total:
            print(line, flush=True)


class Checks:
    """Counts what was checked and what failed, and prints each."""

    def __init__(self) -> None:
        self.passed, self.failed = 0, 0

    def __call__(self, ok: bool, text: str) -> None:
        self.passed += ok
        self.failed += not ok
        print(f"  {'ok  ' if ok else 'FAIL'}  {text}", flush=True)


def title(text: str) -> None:
    print(f"\n== {text}", flush=True)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, ["-" * width for width in widths], *rows]:
        first, *rest = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)]
        print("  " + "   ".join([first, *rest]).rstrip())


def median_seconds(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Median wall time of `run`, after one call that warms caches up."""
    run()
    times = []
    for _ in range(repeats):
        _synchronize(device)
        start = time.perf_counter()
        run()
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """How far memory rises above its level at the call while `run` runs; None where that can't be told.

    On a GPU PyTorch's allocator counts it; on the CPU the high-water mark of resident memory does (Linux).
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present size
    except (OSError, AttributeError):
        return None
    before = _status_bytes("VmRSS")
    run()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
