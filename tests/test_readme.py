"""README.md: its tables are the generated ones, its pictures show what is computed, its examples run."""

import importlib.util
import re
import sys

import pytest
import torch
from repository import ROOT

from flash_attn import flash_attn_func

README = (ROOT / "README.md").read_text()
PAGES = {
    str(page.relative_to(ROOT)): page.read_text()
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md")
}
EXAMPLES = [
    pytest.param(example, id=f"{name}-{index}")
    for name, text in PAGES.items()
    for index, example in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
]


def load(name):
    """A script of docs/, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


draw_masks = load("draw_masks")
PANELS = [panel for panels in draw_masks.PICTURES.values() for panel in panels]


def test_tables_are_up_to_date():
    assert load("fill_readme").filled(README) == README, "run python docs/fill_readme.py"


@pytest.mark.parametrize("example", EXAMPLES)
def test_example_runs(example):
    assert 'device = "cuda"' not in example
    try:
        exec(compile(example, "README.md", "exec"), {})
    except NotImplementedError as refusal:  # an example that takes the GPU where there is one
        assert torch.cuda.is_available()
        pytest.skip(str(refusal))


def anchors_of(text):
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_linked_files_and_headings_exist(page):
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = (ROOT / page).parent / name if name else ROOT / page
        if not file.exists() or (anchor and anchor not in anchors_of(file.read_text())):
            wrong.append(target)
    assert wrong == []


@pytest.mark.parametrize("page", PAGES)
def test_lines_outside_of_tables_are_short(page):
    assert not [line for line in PAGES[page].splitlines() if len(line) > 120 and not line.startswith("|")]


def test_every_picture_is_shown():
    shown = {target for text in PAGES.values() for target in re.findall(r"images/([\w.]+)\)", text)}
    assert {file.name for file in draw_masks.IMAGES.iterdir()} == shown


@pytest.mark.parametrize("name", sorted(draw_masks.all_pictures()))
def test_picture_is_up_to_date(name):
    drawn = draw_masks.all_pictures()[name]
    assert (draw_masks.IMAGES / name).read_text() == drawn, "run python docs/draw_masks.py"


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.caption)
def test_picture_shows_what_is_computed(panel):
    """With the unit vectors as values, the output holds the probabilities: 0 exactly where a key is masked."""
    for seqlen_q, seqlen_k in zip(panel.lengths_q, panel.lengths_k, strict=True):
        q, k = torch.randn(1, seqlen_q, 1, 8), torch.randn(1, seqlen_k, 1, 8)
        v = torch.eye(seqlen_k)[None, :, None]
        out = flash_attn_func(q, k, v, causal=panel.causal, window_size=panel.window_size)
        drawn = draw_masks.Panel("", (seqlen_q,), (seqlen_k,), panel.window_size, panel.causal).sees()
        assert torch.equal(out[0, :, 0] != 0, torch.tensor(drawn))
