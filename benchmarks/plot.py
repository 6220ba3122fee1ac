"""Draws a recorded benchmark: speed over sequence length, or memory over sequence length.

    python benchmarks/plot.py RESULT.json [RESULT.json ...] --out docs/images/forward_h200.svg [--impls ours,flash]
    python benchmarks/plot.py RESULT.json --memory --out docs/images/memory_h200.svg

Speed is drawn as in the FlashAttention papers, from the suites fwd and fwd_short: a row of panels per head dim, full
and causal, a group of bars per length, a bar per implementation. Memory is the suite `memory`. What was skipped, failed
or wrong has no bar. Of several files, the last one's figure counts. Needs requirements/bench.txt.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from flash_attn.bench.impls import MEANINGS  # noqa: E402
from flash_attn.bench.report import read_json  # noqa: E402
from flash_attn.bench.summary import usable  # noqa: E402

SPEED_SUITES, MEMORY_SUITES = ("fwd_short", "fwd"), ("memory",)
LABELS = {
    "ours": "flash_attn (this package)",
    "ours80": "flash_attn, SM80 kernels",
    "ours90": "flash_attn, SM90 kernels",
    "sdpa": "torch SDPA",
    "flash": "FlashAttention-2 (torch)",
    "cudnn": "cuDNN (torch)",
    "efficient": "memory-efficient (torch)",
    "math": "standard attention (torch)",
    "flex": "FlexAttention (torch)",
    "fa3": "FlashAttention-3",
    "fa4": "FlashAttention-4",
}
COLORS = dict(
    zip(
        MEANINGS,
        ("#2563a8", "#5b93cf", "#16406f", "#9aa5b1", "#e08a2c", "#6aa84f", "#a678b4", "#7b8794", "#c0a336", "#c8473d")
        + ("#8c4a2f",),
        strict=True,
    )
)
INK, FAINT = "#1f2933", "#d5dae0"
STYLE = {
    "svg.hashsalt": "flash_attn",  # the same result draws the same file
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}
GROUP_WIDTH = 0.86

Figures = dict[int, dict[str, dict[str, Any]]]  # length -> implementation -> figure


def rows_of(results: list[dict[str, Any]], suites: tuple[str, ...]) -> list[dict[str, Any]]:
    return [row for suite in suites for result in results for row in result["rows"] if row["suite"] == suite]


def panels_of(rows: list[dict[str, Any]]) -> dict[tuple[int, bool], Figures]:
    """(head dim, causal) -> figures by length."""
    panels: dict[tuple[int, bool], Figures] = {}
    for row in rows:
        case = row["parameters"]
        figures = panels.setdefault((case["head_dim"], case["causal"]), {})
        known = {name: figure for name, figure in row["results"].items() if usable(figure)}
        figures.setdefault(case["seqlen_q"], {}).update(known)
    return dict(sorted(panels.items()))


def names_in(panels: dict[tuple[int, bool], Figures], wanted: list[str] | None) -> list[str]:
    present = {name for figures in panels.values() for by_name in figures.values() for name in by_name}
    return [name for name in wanted or MEANINGS if name in present]


def length_label(seqlen: int) -> str:
    return f"{seqlen // 1024}k" if seqlen % 1024 == 0 else str(seqlen)


def draw_bars(axes: Axes, figures: Figures, names: list[str], scale: float) -> None:
    """A group of bars per length; the value stands on its bar."""
    lengths = sorted(figures)
    width = GROUP_WIDTH / len(names)
    for index, name in enumerate(names):
        offset = (index - (len(names) - 1) / 2) * width
        drawn = [
            (at, figures[seqlen][name]["tflops"] * scale)
            for at, seqlen in enumerate(lengths)
            if name in figures[seqlen]
        ]
        bars = axes.bar([at + offset for at, _ in drawn], [value for _, value in drawn], width, color=COLORS[name])
        axes.bar_label(bars, labels=[f"{value:.0f}" for _, value in drawn], fontsize=6, padding=1)
    axes.set_xticks(range(len(lengths)), [length_label(seqlen) for seqlen in lengths])
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.margins(x=0.02, y=0.12)


def subtitle(environment: dict[str, Any]) -> str:
    machine = environment.get("gpu") or environment.get("cpu", "")
    parts = [machine, f"torch {environment.get('torch')}", f"commit {str(environment.get('commit'))[:8]}"]
    return ", ".join([*parts, str(environment.get("date"))[:10]])


def add_legend(figure: Any, labels: list[str], marks: list[Any], columns: int) -> None:
    figure.legend(marks, labels, loc="outside lower center", ncols=columns, frameon=False)


def draw_speed(results: list[dict[str, Any]], wanted: list[str] | None) -> Any:
    rows = rows_of(results, SPEED_SUITES)
    if not rows:
        raise SystemExit(f"no row of {' or '.join(SPEED_SUITES)} in the result")
    panels = panels_of(rows)
    names = names_in(panels, wanted)
    head_dims = sorted({head_dim for head_dim, _ in panels})
    environment = results[-1]["environment"]
    on_cpu = environment["device"] == "cpu"
    figure, grid = plt.subplots(
        len(head_dims), 2, figsize=(11, 0.9 + 2.6 * len(head_dims)), squeeze=False, sharey="row", layout="constrained"
    )
    for (head_dim, causal), figures in panels.items():
        axes = grid[head_dims.index(head_dim)][int(causal)]
        draw_bars(axes, figures, names, 1e3 if on_cpu else 1)
        axes.set_title(f"head dim {head_dim}, {'causal' if causal else 'full'}", fontsize=9)
        axes.set_ylabel("" if causal else "GFLOP/s" if on_cpu else "TFLOP/s")
    for axes in grid[-1]:
        axes.set_xlabel("sequence length")
    dtype = rows[0]["parameters"]["dtype"]
    figure.suptitle(f"Attention forward, {dtype}\n{subtitle(environment)}", fontsize=10)
    marks = [plt.Rectangle((0, 0), 1, 1, color=COLORS[name]) for name in names]
    add_legend(figure, [LABELS[name] for name in names], marks, columns=3)
    return figure


def draw_memory(results: list[dict[str, Any]], wanted: list[str] | None) -> Any:
    rows = rows_of(results, MEMORY_SUITES)
    if not rows:
        raise SystemExit(f"no row of {' or '.join(MEMORY_SUITES)} in the result")
    case = rows[0]["parameters"]
    figures: Figures = {}
    for row in rows:
        known = {name: one for name, one in row["results"].items() if usable(one) and one.get("peak_bytes")}
        figures.setdefault(row["parameters"]["seqlen_q"], {}).update(known)
    names = names_in({(case["head_dim"], False): figures}, wanted)
    figure, axes = plt.subplots(figsize=(6.5, 4.6), layout="constrained")
    labels = []
    for name in names:
        points = [(at, figures[at][name]["peak_bytes"] / 2**20) for at in sorted(figures) if name in figures[at]]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=COLORS[name])
        # The lines of exact tiled attention lie on each other: numbers beside them would too.
        labels.append(f"{LABELS[name]}: {points[-1][1]:,.0f} MiB at {length_label(points[-1][0])}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted(figures), [length_label(seqlen) for seqlen in sorted(figures)])
    axes.set_xlabel("sequence length")
    axes.set_ylabel("MiB that one call allocates, output included")
    axes.grid(color=FAINT, linewidth=0.6)
    shape = f"batch {case['batch']}, {case['heads']} heads, head dim {case['head_dim']}, {case['dtype']}"
    figure.suptitle(f"Memory of attention forward, {shape}\n{subtitle(results[-1]['environment'])}", fontsize=10)
    add_legend(figure, labels, axes.get_lines(), columns=2)
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT.json")
    parser.add_argument("--out", type=Path, required=True, help="the SVG file")
    parser.add_argument("--memory", action="store_true", help="memory instead of speed")
    parser.add_argument("--impls", type=lambda text: text.split(","), help="only these, in this order")
    options = parser.parse_args(arguments)
    draw = draw_memory if options.memory else draw_speed
    with matplotlib.rc_context(STYLE):
        figure = draw([read_json(file) for file in options.results], options.impls)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(options.out, metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
