"""benchmarks/train_gpt.py, tiny, on the CPU: the same data and weights, curves that agree, a record, a picture."""

import importlib.util
import json
import sys

import pytest
import torch
from repository import ROOT


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


train_gpt = load("train_gpt")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    file = tmp_path_factory.mktemp("training") / "result.json"
    assert train_gpt.main(["--device", "cpu", "--tiny", "--ways", "ours,math,float32", "--json", str(file)]) == 0
    return file


def test_data_is_the_same_for_a_seed_and_repeats_itself():
    text = train_gpt.batches(train_gpt.TINY)
    assert torch.equal(text, train_gpt.batches(train_gpt.TINY))
    setup = train_gpt.TINY
    assert text.shape == (setup.steps, setup.batch_size, setup.context + 1)
    assert 0 <= text.min() and text.max() < setup.vocab
    successors = {}
    for before, after in zip(text[..., :-1].flatten().tolist(), text[..., 1:].flatten().tolist(), strict=True):
        successors.setdefault(before, []).append(after)
    usual = sum(len(found) - len(set(found)) for found in successors.values())
    assert usual > 0.5 * sum(map(len, successors.values())), "most pairs of tokens come again"


def test_curves_agree_and_fall(recorded):
    runs = json.loads(recorded.read_text())["runs"]
    assert [(run["head_dim"], run["name"]) for run in runs] == [
        (head_dim, name) for head_dim in (64, 128) for name in ("ours", "math", "float32")
    ]
    for run in runs:
        assert len(run["losses"]) == train_gpt.TINY.steps and run["tokens_per_s"] > 0
        assert run["losses"][-1] < run["losses"][0] - 0.1
    for ours, math, exact in (runs[:3], runs[3:]):
        assert train_gpt.distance(ours["losses"], exact["losses"]) < 1e-4
        assert math["losses"] == exact["losses"], "in float32 both are the same computation"
        assert ours["losses"][0] == pytest.approx(exact["losses"][0], abs=1e-5)


def test_bfloat16_stays_near_float32():
    """Autocast gives attention 16-bit inputs, as on a GPU."""
    setup = train_gpt.replace(train_gpt.TINY, dtype="bfloat16", steps=6)
    text = train_gpt.batches(setup)
    ours, math, exact = (
        train_gpt.train(setup, 64, train_gpt.WAYS[name], text, "cpu")["losses"] for name in ("ours", "math", "float32")
    )
    apart = train_gpt.distance(ours, exact)
    assert 0 < apart < 0.02 and apart < 5 * train_gpt.distance(math, exact) + 1e-3


@pytest.mark.parametrize("steps", [1, 2, 10])
def test_any_number_of_steps(steps, tmp_path):
    arguments = ["--device", "cpu", "--tiny", "--steps", str(steps), "--head-dims", "64", "--ways", "math"]
    file = tmp_path / "result.json"
    assert train_gpt.main([*arguments, "--json", str(file)]) == 0
    assert "losses" in json.loads(file.read_text())["runs"][0]


def test_a_refusal_is_recorded(tmp_path, capsys):
    file = tmp_path / "result.json"
    arguments = ["--device", "cpu", "--tiny", "--steps", "1", "--head-dims", "64", "--ways", "ours80,math"]
    assert train_gpt.main([*arguments, "--json", str(file)]) == 1
    refused, trained = json.loads(file.read_text())["runs"]
    assert "NotImplementedError" in refused["failed"] and "losses" in trained
    assert "| 64 | ours80 | NotImplementedError" in capsys.readouterr().out


def test_misuse(capsys):
    with pytest.raises(SystemExit):
        train_gpt.main(["--ways", "ours,nobody"])
    assert "nobody" in capsys.readouterr().err


def test_picture(recorded, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="requirements/bench.txt is not installed: plots are not tested")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    out = tmp_path / "images" / "training.svg"
    plot_training = load("plot_training")
    plot_training.main([str(recorded), "--out", str(out)])
    drawn = out.read_text()
    for words in ("head dim 64", "head dim 128", "tokens/s", "distance from float32"):
        assert words in drawn, words
    plot_training.main([str(recorded), "--out", str(tmp_path / "again.svg")])
    assert (tmp_path / "again.svg").read_text() == drawn, "the same record draws the same file"
