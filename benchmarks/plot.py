"""Draws a recorded benchmark: speed or memory over sequence length, or bandwidth of decoding.

    python benchmarks/plot.py RESULT.json [RESULT.json ...] --out docs/images/forward_h200.svg [--impls ours,flash]
    python benchmarks/plot.py RESULT.json --backward --out docs/images/backward_h200.svg
    python benchmarks/plot.py RESULT.json --decode --out docs/images/decode_h200.svg
    python benchmarks/plot.py RESULT.json --memory --out docs/images/memory_h200.svg

Speed is drawn as in the FlashAttention papers, from the suites fwd and fwd_short, or bwd: a row of panels per head dim,
full and causal, a group of bars per length, a bar per implementation. Decoding is the suites decode, paged and pages: a
panel per shape, a group of bars per page size. Memory is the suite `memory`. What was skipped, failed or wrong has no
bar. Of several files, the last one's figure counts. Needs requirements/bench.txt.
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

SPEED_SUITES, BACKWARD_SUITES, MEMORY_SUITES = ("fwd_short", "fwd"), ("bwd",), ("memory",)
DECODE_SUITES = ("decode", "paged", "pages")
LABELS = {
    "ours": "flash_attn (this package)",
    "ours80": "flash_attn, SM80 kernels",
    "ours90": "flash_attn, SM90 kernels",
    "det": "flash_attn, deterministic",
    "det80": "flash_attn, SM80 kernels, deterministic",
    "det90": "flash_attn, SM90 kernels, deterministic",
    "sdpa": "torch SDPA",
    "flash": "FlashAttention-2 (torch)",
    "cudnn": "cuDNN (torch)",
    "efficient": "memory-efficient (torch)",
    "math": "standard attention (torch)",
    "flex": "FlexAttention (torch)",
    "fa3": "FlashAttention-3",
    "fa4": "FlashAttention-4",
}
COLORS = {
    "ours": "#2563a8",
    "ours80": "#5b93cf",
    "ours90": "#16406f",
    "det": "#8fb4dc",
    "det80": "#a9c6e6",
    "det90": "#4a6f9c",
    "sdpa": "#9aa5b1",
    "flash": "#e08a2c",
    "cudnn": "#6aa84f",
    "efficient": "#a678b4",
    "math": "#7b8794",
    "flex": "#c0a336",
    "fa3": "#c8473d",
    "fa4": "#8c4a2f",
}
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


def draw_bars(
    axes: Axes, figures: Figures, names: list[str], scale: float, what: str = "tflops", label: Any = length_label
) -> None:
    """A group of bars per length; the value stands on its bar."""
    lengths = sorted(figures)
    width = GROUP_WIDTH / len(names)
    for index, name in enumerate(names):
        offset = (index - (len(names) - 1) / 2) * width
        drawn = [
            (at, figures[seqlen][name][what] * scale) for at, seqlen in enumerate(lengths) if name in figures[seqlen]
        ]
        bars = axes.bar([at + offset for at, _ in drawn], [value for _, value in drawn], width, color=COLORS[name])
        axes.bar_label(bars, labels=[f"{value:.0f}" for _, value in drawn], fontsize=6, padding=1)
    axes.set_xticks(range(len(lengths)), [label(seqlen) for seqlen in lengths])
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.margins(x=0.02, y=0.12)


def subtitle(environment: dict[str, Any]) -> str:
    machine = environment.get("gpu") or environment.get("cpu", "")
    parts = [machine, f"torch {environment.get('torch')}", f"commit {str(environment.get('commit'))[:8]}"]
    return ", ".join([*parts, str(environment.get("date"))[:10]])


def add_legend(figure: Any, labels: list[str], marks: list[Any], columns: int) -> None:
    figure.legend(marks, labels, loc="outside lower center", ncols=columns, frameon=False)


def draw_speed(results: list[dict[str, Any]], wanted: list[str] | None, suites: tuple[str, ...] = SPEED_SUITES) -> Any:
    rows = required_rows(results, suites)
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
    passed = "backward" if rows[0]["parameters"].get("backward") else "forward"
    figure.suptitle(f"Attention {passed}, {dtype}\n{subtitle(environment)}", fontsize=10)
    marks = [plt.Rectangle((0, 0), 1, 1, color=COLORS[name]) for name in names]
    add_legend(figure, [LABELS[name] for name in names], marks, columns=3)
    return figure


def draw_backward(results: list[dict[str, Any]], wanted: list[str] | None) -> Any:
    return draw_speed(results, wanted, BACKWARD_SUITES)


def draw_decode(results: list[dict[str, Any]], wanted: list[str] | None) -> Any:
    """A panel per shape, a group per page size; the dense cache is the first."""
    panels: dict[str, Figures] = {}
    for row in required_rows(results, DECODE_SUITES):
        case = row["parameters"]
        title = f"{case['batch']} x {case['seqlen_k']} keys, {case['heads']}/{case['heads_k']} heads of "
        known = {name: one for name, one in row["results"].items() if usable(one) and "gb_s" in one}
        figures = panels.setdefault(title + str(case["head_dim"]), {})
        figures.setdefault(case["page"], {}).update(known)
    names = names_in({(index, False): figures for index, figures in enumerate(panels.values())}, wanted)
    num_rows = -(-len(panels) // 2)
    figure, grid = plt.subplots(num_rows, 2, figsize=(11, 0.9 + 2.4 * num_rows), squeeze=False, layout="constrained")
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, figures) in zip(grid.flat, panels.items(), strict=False):
        draw_bars(axes, figures, names, 1.0, "gb_s", lambda page: str(page) if page else "dense")
        axes.set_title(title, fontsize=9)
        axes.set_ylabel("GB/s of keys and values")
        axes.set_xlabel("tokens of a page")
    figure.suptitle(f"Decoding, one query each, CUDA graph\n{subtitle(results[-1]['environment'])}", fontsize=10)
    marks = [plt.Rectangle((0, 0), 1, 1, color=COLORS[name]) for name in names]
    add_legend(figure, [LABELS[name] for name in names], marks, columns=3)
    return figure


def required_rows(results: list[dict[str, Any]], suites: tuple[str, ...]) -> list[dict[str, Any]]:
    rows = rows_of(results, suites)
    if not rows:
        raise SystemExit(f"no row of {' or '.join(suites)} in the result")
    return rows


def draw_memory(results: list[dict[str, Any]], wanted: list[str] | None) -> Any:
    rows = required_rows(results, MEMORY_SUITES)
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


DRAWINGS = {"backward": draw_backward, "decode": draw_decode, "memory": draw_memory}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT.json")
    parser.add_argument("--out", type=Path, required=True, help="the SVG file")
    what = parser.add_mutually_exclusive_group()
    for name, draw in DRAWINGS.items():
        what.add_argument(f"--{name}", dest="draw", action="store_const", const=draw, help=f"{name}, not forward speed")
    parser.set_defaults(draw=draw_speed)
    parser.add_argument("--impls", type=lambda text: text.split(","), help="only these, in this order")
    options = parser.parse_args(arguments)
    for name in options.impls or ():
        if name not in MEANINGS:
            parser.error(f"--impls: must be of {', '.join(MEANINGS)}, got {name!r}")
    with matplotlib.rc_context(STYLE):
        figure = options.draw([read_json(file) for file in options.results], options.impls)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(options.out, metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
