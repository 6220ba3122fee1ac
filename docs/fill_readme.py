"""Fills the tables of README.md that come from the code and from recorded measurements.

    python docs/fill_readme.py

The support table is what `python -m flash_attn support` prints; the CPU path's table holds the figures of
benchmarks/results/cpu_path.json, which benchmarks/cpu_path.py --json writes; the GPU's those of h200_forward.json,
h200_backward.json and h200_decode.json there, which `python -m flash_attn bench --json` wrote on an H200, and of
h200_training.json, which benchmarks/train_gpt.py --json did.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from flash_attn import _dispatch
from flash_attn.bench import summary

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
CPU_RESULTS = RESULTS / "cpu_path.json"
NOT_MEASURED = "No measurement has been recorded yet."


def sections() -> dict[str, str]:
    """Marker -> the Markdown that belongs between `<!-- marker -->` and `<!-- /marker -->`."""
    return {
        "support table": _dispatch.support_table(),
        "cpu table": cpu_table(),
        "gpu table": gpu_table("h200_forward", lambda recorded: summary.table([recorded])),
        "backward table": gpu_table("h200_backward", lambda recorded: summary.table([recorded])),
        "decode table": gpu_table("h200_decode", decode_tables),
        "training table": gpu_table("h200_training", lambda recorded: train_gpt().table(recorded["runs"])),
    }


def gpu_table(name: str, table: Callable[[dict[str, Any]], str]) -> str:
    file = RESULTS / f"{name}.json"
    if not file.exists():
        return NOT_MEASURED
    recorded = json.loads(file.read_text())
    made_on = recorded["environment"]
    driver = made_on.get("driver", "unknown")
    where = f"{made_on['gpu']}, driver {driver}, torch {made_on['torch']}, commit {made_on['commit'][:10]}"
    return f"Measured on {where}.\n\n{table(recorded)}"


def decode_tables(recorded: dict[str, Any]) -> str:
    names = {name for row in recorded["rows"] for name in row["results"] if name.startswith("ours")}
    return "\n\n".join([*(summary.steps_table([recorded], name) for name in sorted(names)), summary.table([recorded])])


def train_gpt() -> ModuleType:
    """The script, which knows its table."""
    if "train_gpt" not in sys.modules:
        spec = importlib.util.spec_from_file_location("train_gpt", ROOT / "benchmarks" / "train_gpt.py")
        module = sys.modules["train_gpt"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules["train_gpt"]


def cpu_table() -> str:
    if not CPU_RESULTS.exists():
        return NOT_MEASURED
    recorded = json.loads(CPU_RESULTS.read_text())
    made_on = recorded["environment"]
    rows = [
        ["call", "flash_attn", "torch SDPA", "ratio", "memory, flash_attn", "memory, SDPA"],
        ["---", "---:", "---:", "---:", "---:", "---:"],
    ]
    for case in recorded["cases"]:
        rows.append(
            [
                case["name"],
                f"{case['ours_ms']:.2f} ms",
                f"{case['sdpa_ms']:.2f} ms",
                f"{case['ratio']:.2f}",
                f"{case['ours_peak_mib']:.0f} MiB",
                f"{case['sdpa_peak_mib']:.0f} MiB",
            ]
        )
    where = f"{made_on['cpu']}, {made_on['threads']} threads, torch {made_on['torch']}"
    return f"Measured on {where}.\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows)


def filled(text: str) -> str:
    for marker, content in sections().items():
        pattern = re.compile(rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"README.md must hold the marker {marker!r} once")
        text = pattern.sub(lambda found, content=content: f"{found[1]}{content}\n{found[2]}", text)
    return text


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
