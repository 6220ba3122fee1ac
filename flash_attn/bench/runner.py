"""Measures cases with implementations: an implementation that fails on a case is a recorded failure, not an end."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from flash_attn.bench import measure
from flash_attn.bench.check import Reference, make_inputs, make_reference
from flash_attn.bench.gradients import GradientReference, make_gradient_reference
from flash_attn.bench.impls import Implementation, Prepared, Unsupported, backward_of
from flash_attn.bench.suites import SUITES, Case, Measure

_MESSAGE_LENGTH = 300


class DeviceLost(RuntimeError):
    """The GPU's context is broken: whatever is measured after that fails too."""


@dataclass(frozen=True)
class Settings:
    device: str  # "cuda" or "cpu"
    rep_ms: float
    rounds: int


@dataclass
class Figure:
    """One implementation on one case: the times of its rounds, or why there are none."""

    round_ms: list[float] = field(default_factory=list)
    error: float | None = None
    wrong: str | None = None
    peak_bytes: int | None = None
    skipped: str | None = None
    failed: str | None = None

    def record(self, flops: int | None, kv_bytes: int | None = None) -> dict[str, Any]:
        """For JSON: what is known of it."""
        known = {name: value for name, value in asdict(self).items() if value not in (None, [])}
        if self.round_ms and self.failed is None:
            known["ms"] = statistics.median(self.round_ms)
            if flops is not None:
                known["tflops"] = flops / known["ms"] / 1e9
            if kv_bytes is not None:
                known["gb_s"] = kv_bytes / known["ms"] / 1e6
        return known


def run_case(
    case: Case, implementations: list[Implementation], settings: Settings, progress: Callable[[str], None]
) -> dict[str, Any]:
    """A row of the results. The implementations take turns, so that a GPU which heats up slows all of them."""
    inputs = make_inputs(case, settings.device)
    reference = (make_gradient_reference if case.backward else make_reference)(case, inputs)
    figures = {implementation.name: Figure() for implementation in implementations}
    ready: list[tuple[Implementation, Prepared]] = []
    with torch.set_grad_enabled(case.backward):
        for implementation in implementations:
            progress(f"{case.title}: {implementation.name}, check")
            figure = figures[implementation.name]
            with _failures_in(figure, settings.device), implementation.context():
                prepared = implementation.prepare(case, inputs)
                prepared = backward_of(prepared, inputs) if case.backward else prepared
                _check(figure, prepared, reference, settings.device)
                ready.append((implementation, prepared))
        for turn in range(settings.rounds):
            for implementation, prepared in ready:
                progress(f"{case.title}: {implementation.name}, round {turn + 1} of {settings.rounds}")
                figure = figures[implementation.name]
                if figure.failed is None:
                    with _failures_in(figure, settings.device), implementation.context():
                        figure.round_ms.append(_time_ms(prepared, case, settings))
    row = {"suite": case.suite, "case": case.title, "parameters": asdict(case), "flops": case.flops}
    kv_bytes = case.kv_bytes if SUITES[case.suite].measure is Measure.GRAPH_BANDWIDTH else None
    row["results"] = {name: figure.record(case.flops, kv_bytes) for name, figure in figures.items()}
    return row


def _check(figure: Figure, prepared: Prepared, reference: Reference | GradientReference, device: str) -> None:
    out = prepared.call()
    verdict = reference.judge(prepared.in_our_layout(out))
    del out  # its memory would count as the next call's
    figure.error, figure.wrong = verdict.error, verdict.wrong
    figure.peak_bytes = measure.peak_bytes(prepared.call, device)


def _time_ms(prepared: Prepared, case: Case, settings: Settings) -> float:
    what = SUITES[case.suite].measure
    if what is Measure.HOST:
        return measure.overhead_ms(prepared.call, settings.device)
    if what in (Measure.GRAPH, Measure.GRAPH_BANDWIDTH):
        return measure.graph_ms(prepared.call, settings.device, settings.rep_ms)
    return measure.time_ms(prepared.call, settings.device, settings.rep_ms)


@contextmanager
def _failures_in(figure: Figure, device: str) -> Iterator[None]:
    """What goes wrong inside is the figure's, and the run goes on."""
    try:
        yield
        return
    except Unsupported as reason:
        figure.skipped = str(reason)
    except Exception as error:
        figure.failed = f"{type(error).__name__}: {str(error).strip()[:_MESSAGE_LENGTH]}"
    if device == "cuda":
        _free_cuda(figure.failed)


def _free_cuda(failure: str | None) -> None:
    """Returns memory to the driver after a failure, and notices a context that no call survives."""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception as error:
        raise DeviceLost(f"the GPU is lost, after {failure}: {error}") from error
