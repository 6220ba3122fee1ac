"""Draws what benchmarks/train_gpt.py recorded: loss curves, their distance from float32, speed and memory.

    python benchmarks/plot_training.py RESULT.json --out docs/images/training_h200.svg

A row of panels per head dim. Needs requirements/bench.txt.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402
from plot import COLORS, FAINT, LABELS, STYLE, subtitle  # noqa: E402

LABELS = LABELS | {"float32": "standard attention in float32 (torch)"}
COLORS = COLORS | {"float32": "#1f2933"}
SMOOTHED_STEPS = 10  # over which a distance is averaged


def smoothed(values: list[float]) -> list[float]:
    windows = [values[max(0, end - SMOOTHED_STEPS) : end] for end in range(1, len(values) + 1)]
    return [sum(window) / len(window) for window in windows]


def label_of(run: dict[str, Any]) -> str:
    memory = f", {run['peak_bytes'] / 2**30:.2f} GiB" if "peak_bytes" in run else ""
    return f"{LABELS[run['name']]}: {run['tokens_per_s'] / 1e3:,.0f}k tokens/s{memory}"


def draw(result: dict[str, Any]) -> Any:
    runs = [run for run in result["runs"] if "losses" in run]
    if not runs:
        raise SystemExit("no run of the result has a loss curve")
    head_dims = sorted({run["head_dim"] for run in runs})
    figure, grid = plt.subplots(
        len(head_dims), 2, figsize=(11, 1.0 + 3.2 * len(head_dims)), squeeze=False, layout="constrained"
    )
    for (curves, distances), head_dim in zip(grid, head_dims, strict=True):
        here = [run for run in runs if run["head_dim"] == head_dim]
        exact = next((run["losses"] for run in here if run["name"] == "float32"), None)
        for run in here:
            style = {"color": COLORS[run["name"]], "linewidth": 2.4 if run["name"].startswith("ours") else 1.0}
            steps = range(1, len(run["losses"]) + 1)
            curves.plot(steps, run["losses"], label=label_of(run), **style)
            if exact is not None and run["name"] != "float32":
                apart = [abs(a - b) for a, b in zip(run["losses"], exact, strict=True)]
                distances.plot(steps, smoothed(apart), **style)
        curves.set_title(f"head dim {head_dim}: loss, nats per token", fontsize=9)
        curves.legend(frameon=False, fontsize=7)
        distances.set_title(f"distance from float32's curve, mean of {SMOOTHED_STEPS} steps", fontsize=9)
        distances.set_ylim(bottom=0)
        for axes in (curves, distances):
            axes.grid(color=FAINT, linewidth=0.6)
            axes.set_xlabel("step")
    setup = result["settings"]
    model = f"{setup['layers']} layers of {setup['dim']}, {setup['batch_size']} x {setup['context']} tokens a step"
    title = f"A small GPT, {setup['dtype']}, {model}; same data and weights"
    figure.suptitle(f"{title}\n{subtitle(result['environment'])}", fontsize=10)
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, metavar="RESULT.json")
    parser.add_argument("--out", type=Path, required=True, help="the SVG file")
    options = parser.parse_args(arguments)
    with matplotlib.rc_context(STYLE):
        figure = draw(json.loads(options.result.read_text()))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(options.out, metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
