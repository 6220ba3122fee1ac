"""The demo's pieces, small: the model learns, and generation from the paged cache is what full computation says."""

import pytest
import torch
from repository import ROOT


@pytest.fixture
def stages(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "demo"))
    import stages

    return stages


@pytest.fixture
def small(stages, monkeypatch):
    """A two-layer model, a setup and a piece of the demo's text."""
    import model

    torch.manual_seed(0)
    config = model.Config(dim=32, layers=2, heads=2, kv_heads=1, head_dim=16, window=8)
    setup = stages.Setup(torch.device("cpu"), torch.float32, context=32, batch_size=4)
    text = torch.tensor(list((ROOT / "demo" / "data" / "persuasion.txt").read_bytes()[:4000]))
    return model.LanguageModel(config), setup, text


@pytest.fixture
def checks(stages):
    from report import Checks

    return Checks()


def test_text_is_ascii():
    (ROOT / "demo" / "data" / "persuasion.txt").read_bytes().decode("ascii")


def test_training_lowers_the_loss(stages, small, checks):
    model, setup, text = small
    untrained = stages.held_out_loss(model, text[3000:], stages.dense, setup, torch.float32)
    stages.train(model, text[:3000], text[3000:], 20, setup, checks)
    assert stages.held_out_loss(model, text[3000:], stages.dense, setup, torch.float32) < untrained - 0.5


@pytest.mark.parametrize("num_steps", [1, 2, 10])
def test_training_takes_any_number_of_steps(stages, small, checks, num_steps):
    model, setup, text = small
    stages.train(model, text[:3000], text[3000:], num_steps, setup, checks)


def test_attention_agrees_with_the_plain_formula(stages, small, checks):
    model, setup, text = small
    stages.check_attention(model, text, setup, checks)
    stages.check_evaluation(model, text, setup, checks)
    assert (checks.passed, checks.failed) == (3, 0)


def test_generation_agrees_with_full_computation(stages, small, checks):
    model, setup, _ = small
    stages.check_generation(model, 20, setup, checks)
    assert (checks.passed, checks.failed) == (1, 0)


def test_a_wrong_cache_is_noticed(stages, small, checks, monkeypatch):
    """Tokens that full computation does not choose fail the check."""
    model, setup, _ = small
    honest = stages.generate
    monkeypatch.setattr(stages, "generate", lambda *args: [(tokens + 1) % 128 for tokens in honest(*args)])
    stages.check_generation(model, 8, setup, checks)
    assert checks.failed == 1


def test_cache_refuses_to_grow_past_its_length(stages, small):
    from paged_cache import PagedKVCache

    model, setup, _ = small
    cache = PagedKVCache(model.config, batch_size=1, max_length=8, page_size=4, device=setup.device, dtype=setup.dtype)
    with pytest.raises(ValueError, match="max_length"):
        cache.reserve(slice(None), 9)


def test_jobs_run_on_the_cpu_path_where_the_kernels_refuse_them(stages, monkeypatch):
    """As on a GPU whose kernels have everything but a paged cache."""
    import attention
    import model

    import flash_attn

    config = model.Config()
    chosen = attention.choose_paths(config, torch.device("cpu"), torch.float32)
    assert {job: explanation.path for job, explanation in chosen.items()} == dict.fromkeys(
        ("training", "evaluation", "generation"), "cpu"
    )
    assert not attention.ON_THE_CPU_PATH

    class Refused:
        path = None

    class Gpu:
        type = "cuda"

    monkeypatch.setattr(attention, "_EXPLAINED", attention._EXPLAINED | {"generation": lambda *about: Refused})
    monkeypatch.setitem(attention._EXPLAINED, "training", lambda *about: chosen["training"])
    monkeypatch.setitem(attention._EXPLAINED, "evaluation", lambda *about: chosen["evaluation"])
    attention.choose_paths(config, Gpu(), torch.bfloat16)
    assert attention.ON_THE_CPU_PATH == {"generation"}
    try:
        with attention.path_for("generation"):
            assert flash_attn._dispatch._forced.path == "cpu"
        with attention.path_for("training"):
            assert getattr(flash_attn._dispatch._forced, "path", None) is None
    finally:
        attention.ON_THE_CPU_PATH.clear()


def test_comparison_prints_a_row_for_each_way(stages, small, capsys):
    model, setup, text = small
    stages.compare(model, text, 64, setup)
    stages.compare_one_layer(model, text, 64, setup)
    printed = capsys.readouterr().out
    assert all(printed.count(f"\n  {name} ") == 2 for name in stages.WAYS)
