"""What a run says: its environment, a line per case, the failures, the JSON file."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, TextIO

import torch

import flash_attn
from flash_attn.bench.suites import SUITES, Measure

FORMAT = 1
COMMIT_VARIABLE = "FLASH_ATTN_COMMIT"
_TITLE_WIDTH, _FIGURE_WIDTH, _BAR_WIDTH = 62, 11, 20


def environment(device: str) -> dict[str, Any]:
    """What a figure depends on. Asks nothing of CUDA on a CPU run."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "package": flash_attn.__version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device,
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if device == "cuda":
        found |= {
            "gpu": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "built_with_cuda": flash_attn.info().build.cuda,
        }
        found |= _nvidia_smi()
    return found


def _output_of(command: list[str], folder: Path | None = None) -> str | None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _commit() -> str | None:
    """The variable wins: a copy of the tree on a GPU machine has no history."""
    if os.environ.get(COMMIT_VARIABLE):
        return os.environ[COMMIT_VARIABLE]
    package = Path(flash_attn.__file__).resolve().parent
    if _output_of(["git", "ls-files", "--error-unmatch", "version.py"], package) is None:
        return None  # installed, perhaps below a repository of something else
    changed = _output_of(["git", "status", "--porcelain", "--untracked-files=no", "."], package.parent)
    commit = _output_of(["git", "rev-parse", "HEAD"], package)
    return f"{commit}{' with changes' if changed else ''}"


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _nvidia_smi() -> dict[str, str]:
    fields = ("driver_version", "power.limit", "clocks.max.sm")
    # Not by its index, which CUDA_VISIBLE_DEVICES shifts for torch and not for nvidia-smi. Whether torch's UUID has
    # nvidia-smi's prefix is documented nowhere.
    gpu = "GPU-" + str(torch.cuda.get_device_properties().uuid).removeprefix("GPU-")
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "-i", gpu]
    output = _output_of(query)
    values = [value.strip() for value in output.split(",")] if output else []
    names = ("driver", "power_limit", "max_clock")
    return dict(zip(names, values, strict=True)) if len(values) == len(names) else {}


def heading(found: dict[str, Any]) -> str:
    machine = found.get("gpu") or f"{found['cpu']}, {found['threads']} thread(s)"
    versions = [f"flash_attn {found['package']}", f"torch {found['torch']}"]
    versions += [f"CUDA {found['cuda']}", f"driver {found.get('driver', 'unknown')}"] if "cuda" in found else []
    return f"# {machine}; {', '.join(versions)}; commit {found['commit'] or 'unknown'}"


# ---- Lines --------------------------------------------------------------------------------------------------------


def unit_of(row: dict[str, Any], device: str) -> str:
    what = SUITES[row["suite"]].measure
    if what is not Measure.DEVICE:
        return what.value
    if row["flops"] is None:
        return "ms"
    return "TFLOP/s" if device == "cuda" else "GFLOP/s"


def cell(figure: dict[str, Any] | None, unit: str) -> str:
    """A figure, `!` if the output is wrong; `-` for a case it has no call for, `x` for a failure."""
    if figure is None or "skipped" in figure:
        return "-"
    if "ms" not in figure:
        return "x"
    mark = "!" if "wrong" in figure else " "
    if unit in (Measure.HOST.value, Measure.GRAPH.value):
        return f"{figure['ms'] * 1e3:.1f}{mark}"
    if unit == "ms":
        return f"{figure['ms']:.3f}{mark}"
    if unit == Measure.GRAPH_BANDWIDTH.value:
        return f"{figure['gb_s']:.0f}{mark}"
    return f"{figure['tflops'] * (1 if unit == 'TFLOP/s' else 1e3):.0f}{mark}"


class Table:
    """Prints a suite's heading when it begins, then a line per row; on a terminal, a progress bar below."""

    def __init__(self, device: str, total: int, out: TextIO) -> None:
        self.device, self.total, self.out = device, total, out
        self.done = 0
        self.above: tuple[str, tuple[str, ...]] | None = None

    def progress(self, what: str) -> None:
        if not self.out.isatty():
            return
        full = _BAR_WIDTH * self.done // max(self.total, 1)
        line = f"[{'#' * full}{'.' * (_BAR_WIDTH - full)}] {self.done + 1}/{self.total} {what}"
        # A line that wraps could not be taken back.
        line = line[: shutil.get_terminal_size().columns - 1]
        print(f"\r\033[K{line}", end="", file=self.out, flush=True)

    def add(self, row: dict[str, Any]) -> None:
        if self.out.isatty():
            print("\r\033[K", end="", file=self.out)
        unit, names = unit_of(row, self.device), tuple(row["results"])
        if self.above != (row["suite"], names):
            self.above = (row["suite"], names)
            title = f"{row['suite']}: {SUITES[row['suite']].purpose}, {unit}"
            print(_line(title, names), file=self.out, flush=True)
        self.done += 1
        title = f"[{self.done}/{self.total}] {row['case']}"
        print(_line(title, [cell(figure, unit) for figure in row["results"].values()]), file=self.out, flush=True)


def _line(title: str, cells: Any) -> str:
    return f"{title:{_TITLE_WIDTH}}" + "".join(f"{value:>{_FIGURE_WIDTH}}" for value in cells)


def wrong_ones(rows: list[dict[str, Any]], prefix: str) -> list[str]:
    """Cases that an implementation whose name begins so computed wrongly."""
    return [
        f"{row['suite']} {row['case']}"
        for row in rows
        for name, figure in row["results"].items()
        if name.startswith(prefix) and "wrong" in figure
    ]


# ---- JSON ---------------------------------------------------------------------------------------------------------


def _partial(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    return file.with_name(file.name + ".partial")


def require_writable(file: Path) -> None:
    """Raises OSError where write_json would."""
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a folder")
    partial = _partial(file)
    partial.touch()
    partial.unlink()


def write_json(file: Path, result: dict[str, Any]) -> None:
    """Whole or not at all: a run that is stopped leaves the rows it had."""
    partial = _partial(file)
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(file)


def read_json(file: Path) -> dict[str, Any]:
    try:
        result = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        raise ValueError(f"{file} is no result of this benchmark (format {FORMAT})")
    return result


def fail(message: str) -> int:
    print(message, file=sys.stderr)
    return 2
