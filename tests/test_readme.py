"""README.md: its tables are the generated ones, its pictures show what is computed, its examples run."""

import importlib.util
import re
import sys

import pytest
import torch
from repository import ROOT

from flash_attn import flash_attn_func

README = (ROOT / "README.md").read_text()
PAGES = {"README.md": README} | {f"docs/{page.name}": page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))}
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


@pytest.mark.parametrize("page", PAGES)
def test_linked_files_exist(page):
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", PAGES[page])
    assert [target for target in targets if not (ROOT / page).parent.joinpath(target).exists()] == []


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
