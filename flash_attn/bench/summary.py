"""python -m flash_attn bench --summary: this package beside each peer, from recorded results."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from flash_attn.bench.suites import SUITES, Measure

Row = dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """A suite's cells that both implementations computed, and computed right."""

    suite: str
    ours: str
    peer: str
    speed: dict[str, float]  # case -> the peer's time by ours: above 1 where ours is faster
    added_us: dict[str, float]  # case -> microseconds that a call of ours takes more

    @property
    def geometric_mean(self) -> float:
        return math.exp(statistics.fmean(map(math.log, self.speed.values())))

    @property
    def slowest(self) -> str:
        return min(self.speed, key=self.speed.__getitem__)


def usable(figure: dict[str, Any] | None) -> bool:
    return figure is not None and "ms" in figure and "wrong" not in figure


def compare(results: Iterable[dict[str, Any]]) -> list[Comparison]:
    """Ratios are taken within a run; a cell of several runs is their median."""
    cells: dict[tuple[str, str, str], dict[str, list[tuple[float, float]]]] = {}
    for result in results:
        for row in result["rows"]:
            for ours, peer in _pairs(row):
                ms = row["results"][ours]["ms"], row["results"][peer]["ms"]
                cells.setdefault((row["suite"], ours, peer), {}).setdefault(row["case"], []).append(ms)
    found = []
    for (suite, ours, peer), cases in cells.items():
        speed = {case: statistics.median(theirs / mine for mine, theirs in pairs) for case, pairs in cases.items()}
        added = {case: statistics.median(mine - theirs for mine, theirs in pairs) for case, pairs in cases.items()}
        found.append(Comparison(suite, ours, peer, speed, {case: ms * 1e3 for case, ms in added.items()}))
    order = list(SUITES)
    return sorted(found, key=lambda one: (order.index(one.suite), one.ours, one.peer))


def _pairs(row: Row) -> Iterable[tuple[str, str]]:
    names = [name for name, figure in row["results"].items() if usable(figure)]
    return [(ours, peer) for ours in names for peer in names if ours.startswith("ours") and not peer.startswith("ours")]


def problems(results: Iterable[dict[str, Any]], only_ours: bool = False) -> list[str]:
    """A line per kind of failure and wrong result, with the number of its cases and the first; no ratio shows them."""
    found: dict[tuple[str, str], list[str]] = {}
    for result in results:
        for row in result["rows"]:
            for name, figure in row["results"].items():
                if only_ours and not name.startswith("ours"):
                    continue
                for kind in ("failed", "wrong"):
                    if kind in figure:
                        found.setdefault((name, f"{kind}: {figure[kind]}"), []).append(f"{row['suite']} {row['case']}")
    return [f"# {name}, {len(cases)} case(s), first {cases[0]}: {text}" for (name, text), cases in found.items()]


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: speed of ours by the peer's, per suite; where a suite measures the host's time, microseconds too."""
    lines = [
        "| suite | ours | peer | cells | geometric mean | lowest | where |",
        "| --- | --- | --- | ---: | ---: | ---: | --- |",
    ]
    notes = []
    for one in compare(results):
        numbers = f"{len(one.speed)} | {one.geometric_mean:.3f} | {one.speed[one.slowest]:.3f} | {one.slowest}"
        lines.append(f"| {one.suite} | {one.ours} | {one.peer} | {numbers} |")
        if SUITES[one.suite].measure is Measure.HOST:
            worst = max(one.added_us, key=one.added_us.__getitem__)
            notes.append(f"- {one.suite}: {one.ours} - {one.peer} is {one.added_us[worst]:+.1f} us at most, at {worst}")
    return "\n".join(lines + [""] * bool(notes) + notes)


def steps_table(results: list[dict[str, Any]], name: str) -> str:
    """Markdown: an implementation's steps of decoding, a row per shape, a column per page size, each with its unit.

    Of several files, the last one's figure counts.
    """
    cells: dict[str, dict[int, str]] = {}
    for result in results:
        for row in result["rows"]:
            what = SUITES[row["suite"]].measure
            if what not in (Measure.GRAPH, Measure.GRAPH_BANDWIDTH) or not usable(row["results"].get(name)):
                continue
            case, figure = row["parameters"], row["results"][name]
            shape = f"{case['batch']} x {case['seqlen_k']} keys, {case['heads']}/{case['heads_k']} heads of "
            shape += f"{case['head_dim']}"
            text = f"{figure['gb_s']:.0f} GB/s" if what is Measure.GRAPH_BANDWIDTH else f"{figure['ms'] * 1e3:.1f} us"
            cells.setdefault(shape, {})[case["page"]] = text
    pages = sorted({page for by_page in cells.values() for page in by_page})
    heads = [f"page {page}" if page else "dense" for page in pages]
    lines = ["| " + " | ".join(["step", *heads]) + " |", "| " + " | ".join(["---"] + ["---:"] * len(pages)) + " |"]
    for shape, by_page in cells.items():
        lines.append("| " + " | ".join([shape, *(by_page.get(page, "–") for page in pages)]) + " |")
    return "\n".join(lines)
