"""The suite `cpu`: the cases and the timing of benchmarks/cpu_path.py, as rows of this harness."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import flash_attn
from flash_attn.bench.suites import CPU_PATH

SCRIPT = Path(flash_attn.__file__).resolve().parents[1] / "benchmarks" / "cpu_path.py"
NAMES = ("ours", "sdpa")


def load_script() -> ModuleType:
    """Raises FileNotFoundError where only the package is installed: the script is in the source tree."""
    if not SCRIPT.exists():
        raise FileNotFoundError(f"the suite {CPU_PATH!r} needs the source tree, and there is no {SCRIPT}")
    spec = importlib.util.spec_from_file_location("flash_attn_benchmarks_cpu_path", SCRIPT)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Declared:
    """The script and the cases of it that are to be run."""

    script: ModuleType
    cases: tuple[Any, ...]

    def rows(self, seconds: float, progress: Callable[[str], None]) -> Iterator[dict[str, Any]]:
        """Peaks are measured last, as the script does: they need the allocator set up in a way that costs time."""
        results: list[Any] = []
        for case in self.cases:
            progress(f"{case.name}: time")
            results.append(_attempt(lambda case=case: self.script.measure(case, seconds)))
        has_memory = self.script.measures_memory()
        for case, result in zip(self.cases, results, strict=True):
            if isinstance(result, str):
                yield row_of(case.name, dict.fromkeys(NAMES, {"failed": result}))
                continue
            if has_memory:
                progress(f"{case.name}: memory")
                result.ours_peak_mib = self.script.peak_mib(case.ours)
                result.sdpa_peak_mib = self.script.peak_mib(case.sdpa)
            yield row_of(case.name, {name: figure_of(result, name) for name in NAMES})


def _attempt(measured: Callable[[], Any]) -> Any:
    """The result, or what went wrong: the script measures both implementations at once, so the failure is of both."""
    try:
        return measured()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def declared(quick: bool, only: str) -> Declared:
    script = load_script()
    torch.manual_seed(0)
    return Declared(script, tuple(case for case in script.cases(quick) if only in case.name))


def figure_of(result: Any, name: str) -> dict[str, Any]:
    error, peak_mib = getattr(result, f"{name}_error"), getattr(result, f"{name}_peak_mib")
    figure = {"ms": getattr(result, f"{name}_median_ms"), "best_ms": getattr(result, f"{name}_ms")}
    figure |= {} if math.isnan(error) else {"error": error}
    return figure | ({"peak_bytes": int(peak_mib * 2**20)} if peak_mib else {})


def row_of(case: str, figures: dict[str, Any]) -> dict[str, Any]:
    return {"suite": CPU_PATH, "case": case, "parameters": None, "flops": None, "results": figures}
