"""Fills the tables of README.md that come from the code and from recorded measurements.

    python docs/fill_readme.py

The support table is what `python -m flash_attn support` prints; the CPU path's table holds the figures of
benchmarks/results/cpu_path.json, which benchmarks/cpu_path.py --json writes; the GPU's those of h200_forward.json
there, which `python -m flash_attn bench --json` wrote on an H200.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from flash_attn import _dispatch
from flash_attn.bench import summary

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
GPU_RESULTS = ROOT / "benchmarks" / "results" / "h200_forward.json"
CPU_RESULTS = ROOT / "benchmarks" / "results" / "cpu_path.json"


def sections() -> dict[str, str]:
    """Marker -> the Markdown that belongs between `<!-- marker -->` and `<!-- /marker -->`."""
    return {"support table": _dispatch.support_table(), "cpu table": cpu_table(), "gpu table": gpu_table()}


def gpu_table() -> str:
    if not GPU_RESULTS.exists():
        return "No measurement has been recorded yet: `make bench` on a GPU makes one."
    recorded = json.loads(GPU_RESULTS.read_text())
    made_on = recorded["environment"]
    where = f"{made_on['gpu']}, driver {made_on['driver']}, torch {made_on['torch']}, commit {made_on['commit'][:10]}"
    return f"Measured on {where}.\n\n{summary.table([recorded])}"


def cpu_table() -> str:
    if not CPU_RESULTS.exists():
        return "No measurement has been recorded yet: `make bench` makes one."
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
    where = f"{made_on['machine']}, {made_on['threads']} threads, torch {made_on['torch']}"
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
