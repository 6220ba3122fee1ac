"""Draws the pictures in docs/images from the rule that the README states. Run: python docs/draw_masks.py

The pictures are SVG, written directly: no plotting library is needed. tests/test_readme.py compares the rule
with what flash_attn computes, and the committed pictures with what this script draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

IMAGES = Path(__file__).parent / "images"
CELL, GAP, TOP, LEFT = 18, 44, 62, 44  # pixels
SEEN, HIDDEN, EMPTY_ROW, INK, FAINT = "#2563a8", "#e8ebef", "#f6dada", "#1f2933", "#66727f"


def allowed(i: int, j: int, seqlen_q: int, seqlen_k: int, window_size: tuple[int, int], causal: bool) -> bool:
    """Whether query i may see key j: the diagonal ends in the bottom right corner, bounds are inclusive."""
    left, right = window_size
    right = 0 if causal else right
    diagonal = i + seqlen_k - seqlen_q
    return (left < 0 or j >= diagonal - left) and (right < 0 or j <= diagonal + right)


@dataclass(frozen=True)
class Panel:
    """One mask: sequences of these lengths, packed one after another, with the same options."""

    caption: str
    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    window_size: tuple[int, int] = (-1, -1)
    causal: bool = False

    def sees(self) -> list[list[bool]]:
        """Row by row, over the packed queries and keys."""
        rows = [[False] * sum(self.lengths_k) for _ in range(sum(self.lengths_q))]
        starts_q, starts_k = accumulate((0, *self.lengths_q)), accumulate((0, *self.lengths_k))
        for start_q, start_k, sq, sk in zip(starts_q, starts_k, self.lengths_q, self.lengths_k, strict=False):
            for i in range(sq):
                for j in range(sk):
                    rows[start_q + i][start_k + j] = allowed(i, j, sq, sk, self.window_size, self.causal)
        return rows


PICTURES = {
    "causal": (
        Panel("causal, 6 queries, 6 keys", (6,), (6,), causal=True),
        Panel("causal, 3 queries, 8 keys", (3,), (8,), causal=True),
        Panel("causal, 8 queries, 5 keys", (8,), (5,), causal=True),
    ),
    "window": (
        Panel("window (2, 1)", (8,), (8,), window_size=(2, 1)),
        Panel("causal, window (3, -1)", (8,), (8,), window_size=(3, -1), causal=True),
        Panel("window (2, 1), 4 queries", (4,), (8,), window_size=(2, 1)),
    ),
    "varlen": (
        Panel("causal, packed lengths 3, 5, 2", (3, 5, 2), (3, 5, 2), causal=True),
        Panel("causal, queries 2, 1, 3, keys 4, 6, 3", (2, 1, 3), (4, 6, 3), causal=True),
    ),
}


LEGEND = (
    (SEEN, "seen", 0),
    (HIDDEN, "masked", 80),
    (EMPTY_ROW, "query that sees no key: O = 0, LSE = -inf", 176),
)


def draw_masks(panels: tuple[Panel, ...]) -> str:
    """The panels side by side: a row per query, a column per key."""
    shapes, x = [], LEFT
    for panel in panels:
        shapes += draw_panel(panel, x)
        x += max(sum(panel.lengths_k) * CELL, round(6.6 * len(panel.caption))) + GAP
    legend_y = TOP + max(sum(panel.lengths_q) for panel in panels) * CELL + 18
    empty_rows = not all(any(row) for panel in panels for row in panel.sees())
    for color, words, offset in LEGEND if empty_rows else LEGEND[:2]:
        shapes.append(rect(LEFT + offset, legend_y, color))
        shapes.append(label(LEFT + offset + CELL + 6, legend_y + 13, words, anchor="start"))
    return svg(x, legend_y + CELL + 14, shapes)


def draw_panel(panel: Panel, x: int) -> list[str]:
    shapes = [label(x, 20, panel.caption, anchor="start", color=INK, size=13)]
    shapes += [label(x + j * CELL + CELL // 2, TOP - 6, str(n)) for j, n in enumerate(counts(panel.lengths_k))]
    shapes.append(label(x, TOP - 22, "key j", anchor="start"))
    for i, (row, n) in enumerate(zip(panel.sees(), counts(panel.lengths_q), strict=True)):
        y = TOP + i * CELL
        shapes.append(label(x - 6, y + 13, f"i = {n}" if i == 0 else str(n), anchor="end"))
        hidden = HIDDEN if any(row) else EMPTY_ROW
        shapes += [rect(x + j * CELL, y, SEEN if seen else hidden) for j, seen in enumerate(row)]
    return shapes


def counts(lengths: tuple[int, ...]) -> list[int]:
    """Positions within each sequence: i and j start again at every sequence."""
    return [position for length in lengths for position in range(length)]


def draw_cache() -> str:
    """One paged cache: which logical tokens lie in which page, and which memory is never read."""
    page_size, tables, lengths, new = 4, ((3, 0, 5), (1, 4, -1)), (9, 5), 2
    shapes = [label(LEFT, 20, "block_table: slot n names the page of tokens 4n to 4n + 3", "start", INK, 13)]
    colors = {"cached": SEEN, "appended": "#e08a1e", "never read": HIDDEN}
    pages: dict[int, list[str]] = {}
    for entry_idx, (table, length) in enumerate(zip(tables, lengths, strict=True)):
        y = 40 + entry_idx * 30
        shapes.append(label(LEFT, y + 13, f"entry {entry_idx}, cache_seqlens {length}:", "start"))
        for slot, page in enumerate(table):
            shapes.append(label(LEFT + 190 + slot * 44, y + 13, str(page), color=INK))
            shapes.append(frame(LEFT + 172 + slot * 44, y - 2, 36, 22))
            for row in range(page_size):
                token = slot * page_size + row
                kind = "cached" if token < length else "appended" if token < length + new else "never read"
                if page >= 0:
                    pages.setdefault(page, []).append(f"{kind}|{entry_idx}:{token}")
    top = 130
    shapes.append(label(LEFT, top - 12, "pages of 4 tokens (entry:token)", "start", INK, 13))
    for page in range(6):
        x = LEFT + page * (page_size * 30 + 12)
        shapes.append(label(x, top + 48, f"page {page}", "start"))
        for row in range(page_size):
            kind, _, name = pages.get(page, ["never read|"] * page_size)[row].partition("|")
            shapes.append(rect(x + row * 30, top, colors[kind], 29, 29))
            if kind != "never read":
                shapes.append(label(x + row * 30 + 14, top + 19, name, color="#ffffff"))
    for offset, (words, color) in zip((0, 90, 200), colors.items(), strict=True):
        shapes.append(rect(LEFT + offset, top + 68, color))
        shapes.append(label(LEFT + offset + CELL + 6, top + 81, words, "start"))
    return svg(LEFT + 6 * (page_size * 30 + 12) + 18, top + 100, shapes)


def rect(x: int, y: int, color: str, width: int = CELL - 1, height: int = CELL - 1) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{color}"/>'


def frame(x: int, y: int, width: int, height: int) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="none" stroke="{FAINT}"/>'


def label(x: int, y: int, text: str, anchor: str = "middle", color: str = FAINT, size: int = 11) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{color}" font-size="{size}">{text}</text>'


def svg(width: int, height: int, shapes: list[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="#ffffff"/>', *shapes, "</svg>"]) + "\n"


def all_pictures() -> dict[str, str]:
    """File name -> SVG text."""
    pictures = {f"{name}.svg": draw_masks(panels) for name, panels in PICTURES.items()}
    return pictures | {"paged_cache.svg": draw_cache()}


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    for name, text in all_pictures().items():
        (IMAGES / name).write_text(text)
        print(IMAGES / name)
