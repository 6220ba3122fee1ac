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
        results = []
        for case in self.cases:
            progress(f"{case.name}: time")
            results.append(self.script.measure(case, seconds))
        has_memory = self.script.measures_memory()
        for case, result in zip(self.cases, results, strict=True):
            if has_memory:
                progress(f"{case.name}: memory")
                result.ours_peak_mib = self.script.peak_mib(case.ours)
                result.sdpa_peak_mib = self.script.peak_mib(case.sdpa)
            yield row_of(result)


def declared(quick: bool, only: str) -> Declared:
    script = load_script()
    torch.manual_seed(0)
    return Declared(script, tuple(case for case in script.cases(quick) if only in case.name))


def row_of(result: Any) -> dict[str, Any]:
    figures = {}
    for name in ("ours", "sdpa"):
        error = getattr(result, f"{name}_error")
        figures[name] = {"ms": getattr(result, f"{name}_median_ms"), "best_ms": getattr(result, f"{name}_ms")}
        figures[name] |= {} if math.isnan(error) else {"error": error}
        peak_mib = getattr(result, f"{name}_peak_mib")
        figures[name] |= {"peak_bytes": int(peak_mib * 2**20)} if peak_mib else {}
    return {"suite": CPU_PATH, "case": result.name, "parameters": None, "flops": None, "results": figures}
