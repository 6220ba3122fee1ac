"""A short run of tests/fuzz.py, the same calls every time; and that a wrong answer would not pass it."""

import fuzz
import pytest
import torch
from harness import Inputs

SEED = 1


@pytest.mark.drawn
def test_drawn_calls(path):
    calls = 40 if path == "cpu" else 300
    tally = fuzz.fuzz(fuzz.Options((path,), calls), SEED)
    assert tally.failure is None, fuzz.describe(tally.failure)
    assert tally.served > 0.6 * calls


@pytest.fixture
def wrong_past_64_keys(monkeypatch):
    """Every path's answers are 5 % too large where there are more than 64 keys."""
    right = Inputs.call

    def call(self, **options):
        out, lse = right(self, **options)
        return out.mul_(1.05) if max(self.case.lens_k) > 64 else out, lse

    monkeypatch.setattr(Inputs, "call", call)


def test_a_wrong_answer_fails_with_a_reproducer(wrong_past_64_keys):
    tally = fuzz.fuzz(fuzz.Options(("cpu",), 100), SEED, seconds=60)
    assert tally.failure is not None and "exceeds" in tally.failure.error
    assert 64 < max(tally.failure.call.case.lens_k) <= 129
    script = fuzz.reproducer("cpu", tally.failure.call)
    body = script.split("END'\n")[1].removesuffix("END")
    with pytest.raises(AssertionError, match="exceeds"):
        exec(body, {})


def test_main_reports_and_returns_its_verdict(capsys, monkeypatch):
    assert fuzz.main(["--path", "cpu", "--calls", "5"]) == 0
    assert "5 calls" in capsys.readouterr().out
    monkeypatch.setattr(fuzz, "check", lambda path, call: torch.zeros(1)[2])
    assert fuzz.main(["--path", "cpu", "--calls", "5"]) == 1
    assert "FAILED on cpu: IndexError" in capsys.readouterr().out


def test_a_run_draws_what_is_asked_for():
    tally = fuzz.fuzz(fuzz.Options(("cpu",), 6, ("cache",), (64,)), SEED)
    assert tally.failure is None, fuzz.describe(tally.failure)
    assert tally.counts["kvcache"] == tally.counts["head_dim to 64"] == tally.served == 6


def test_a_run_goes_on_where_it_was_stopped(tmp_path, capsys, monkeypatch):
    arguments = ["--path", "cpu", "--calls", "3", "--log", str(tmp_path / "log")]
    assert fuzz.main([*arguments, "--seed", "4"]) == 0
    drawn = []
    monkeypatch.setattr(fuzz, "fuzz", lambda options, seed, *_: drawn.append(seed) or fuzz.Tally(3, 3))
    assert fuzz.main([*arguments, "--seed", "3-5"]) == 0
    assert drawn == [3, 5]
    assert "9 calls" in capsys.readouterr().out
    fuzz.main([*arguments, "--seed", "4", "--kinds", "cache"])
    assert drawn == [3, 5, 4]
