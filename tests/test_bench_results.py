"""What comes of a benchmark's results: the summary's arithmetic, the plots."""

import dataclasses
import importlib.util
import math
import sys

import pytest
from repository import ROOT

from flash_attn import __main__ as main_module
from flash_attn.bench import report, suites, summary


def figure(ms, **more):
    return {"ms": ms, "tflops": 1 / ms} | more


def result_of(*rows):
    listed = [{"suite": suite, "case": case, "flops": 1, "results": results} for suite, case, results in rows]
    return {"format": report.FORMAT, "environment": {"device": "cuda"}, "rows": listed}


def test_summary_arithmetic():
    first = result_of(
        ("fwd", "a", {"ours": figure(1.0), "flash": figure(2.0)}),
        ("fwd", "b", {"ours": figure(2.0), "flash": figure(1.0), "cudnn": {"failed": "x"}}),
        ("fwd", "c", {"ours": figure(1.0), "flash": figure(9.0, wrong="error")}),
        ("tiny", "t", {"ours": figure(0.030), "sdpa": figure(0.025)}),
    )
    second = result_of(("fwd", "a", {"ours": figure(1.0), "flash": figure(8.0)}))
    fwd, tiny = summary.compare([first])
    assert (fwd.suite, fwd.ours, fwd.peer) == ("fwd", "ours", "flash") and fwd.speed == {"a": 2.0, "b": 0.5}
    assert fwd.geometric_mean == pytest.approx(1.0) and fwd.slowest == "b"
    assert tiny.added_us["t"] == pytest.approx(5.0)
    merged = summary.compare([first, second])[0]
    assert merged.speed["a"] == 5.0 and merged.geometric_mean == pytest.approx(math.sqrt(2.5))
    text = summary.table([first])
    assert "| fwd | ours | flash | 2 | 1.000 | 0.500 | b |" in text and "+5.0 us" in text


def test_summary_tells_what_it_leaves_out():
    result = result_of(("fwd", "a", {"ours": {"failed": "RuntimeError: no"}, "flash": figure(1.0)}))
    assert summary.compare([result]) == []
    assert summary.problems([result]) == ["# ours, 1 case(s), first fwd a: failed: RuntimeError: no"]
    wrong = result_of(*(("fwd", case, {"flash": figure(1.0, wrong="error")}) for case in "ab"))
    assert summary.problems([wrong]) == ["# flash, 2 case(s), first fwd a: wrong: error"]
    assert summary.problems([wrong], only_ours=True) == []
    assert summary.problems([wrong, result], only_ours=True) == summary.problems([result])


def test_steps_table():
    def row(suite, page, **results):
        return (suite, f"page {page}", results | {"parameters": {
            "batch": 2, "seqlen_k": 40, "heads": 4, "heads_k": 2, "head_dim": 16, "page": page}})  # fmt: skip

    result = result_of(
        row("decode", 0, ours80=figure(0.01, gb_s=3500.0)),
        row("paged", 16, ours80=figure(0.01, gb_s=3400.0)),
        row("latency", 64, ours80=figure(0.0123)),
        row("pages", 1, ours80=figure(0.01, gb_s=9.0, wrong="error")),
        row("pages", 8, ours=figure(0.01, gb_s=9.0)),
        row("prefill", 32, ours80=figure(0.01)),
    )
    for listed in result["rows"]:
        listed["parameters"] = listed["results"].pop("parameters")
    assert summary.steps_table([result], "ours80").splitlines() == [
        "| step | dense | page 16 | page 64 |",
        "| --- | ---: | ---: | ---: |",
        "| 2 x 40 keys, 4/2 heads of 16 | 3500 GB/s | 3400 GB/s | 12.3 us |",
    ]


def test_summary_refuses_other_files(tmp_path, capsys):
    file = tmp_path / "other.json"
    for content, words in ((b"[]", "no result of this benchmark"), (b"x", "no JSON"), (b"\xff", "no JSON")):
        file.write_bytes(content)
        assert main_module.main(["bench", "--summary", str(file)]) == 2
        assert f"{file} is {words}" in capsys.readouterr().err


# ---- Plots -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plot():
    pytest.importorskip("matplotlib", reason="requirements/bench.txt is not installed: plots are not tested")
    spec = importlib.util.spec_from_file_location("benchmarks_plot", ROOT / "benchmarks" / "plot.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def synthetic(tmp_path):
    rows = []
    for name in ("fwd", "fwd_short", "memory", "bwd", "decode", "paged", "pages"):
        for case in suites.SUITES[name].cases(name, "cuda"):
            ms = case.flops / 5e11
            results = {
                "ours": figure(ms, tflops=501.0, peak_bytes=case.seqlen_q * 1000, gb_s=3456.0),
                "flash": figure(ms, tflops=402.0, peak_bytes=case.seqlen_q * 2000),
                "math": {"failed": "OutOfMemoryError"},
            }
            rows.append((name, case.title, results))
            rows[-1][2]["parameters"] = dataclasses.asdict(case)
    result = result_of(*((suite, case, results) for suite, case, results in rows))
    for row in result["rows"]:
        row["parameters"] = row["results"].pop("parameters")
    result["environment"] |= {"gpu": "Test GPU", "torch": "2", "package": "1", "date": "2026-01-01", "commit": "abc"}
    file = tmp_path / "result.json"
    report.write_json(file, result)
    return file


def test_speed_plot(plot, synthetic, tmp_path):
    out = tmp_path / "images" / "speed.svg"
    plot.main([str(synthetic), "--out", str(out)])
    drawn = out.read_text()
    for words in ("head dim 64", "head dim 256", "causal", "16k", ">501<", ">402<", "Test GPU"):
        assert words in drawn, words
    plot.main([str(synthetic), "--out", str(tmp_path / "again.svg")])
    assert (tmp_path / "again.svg").read_text() == drawn, "the same result draws the same file"


def test_memory_plot(plot, synthetic, tmp_path):
    out = tmp_path / "memory.svg"
    plot.main([str(synthetic), "--memory", "--out", str(out)])
    assert "package): 31 MiB at 32k" in out.read_text()


def test_backward_plot(plot, synthetic, tmp_path):
    out = tmp_path / "backward.svg"
    plot.main([str(synthetic), "--backward", "--out", str(out)])
    assert "Attention backward" in out.read_text() and "head dim 256" in out.read_text()


def test_decode_plot(plot, synthetic, tmp_path):
    out = tmp_path / "decode.svg"
    plot.main([str(synthetic), "--decode", "--out", str(out)])
    drawn = out.read_text()
    for words in ("16 x 8192 keys, 32/8 heads of 128", "dense", "256", ">3456<", "Decoding"):
        assert words in drawn, words


def test_every_implementation_has_a_colour_and_a_label(plot):
    assert set(plot.COLORS) == set(plot.LABELS) == set(plot.MEANINGS)


def test_plot_of_chosen_implementations(plot, synthetic, tmp_path, capsys):
    out = tmp_path / "speed.svg"
    plot.main([str(synthetic), "--impls", "flash", "--out", str(out)])
    assert ">402<" in out.read_text() and ">501<" not in out.read_text()
    with pytest.raises(SystemExit):
        plot.main([str(synthetic), "--impls", "flash,nobody", "--out", str(out)])
    assert "nobody" in capsys.readouterr().err


def test_plot_needs_its_suite(plot, tmp_path):
    file = tmp_path / "result.json"
    report.write_json(file, result_of(("hdim", "a", {"ours": figure(1.0)})))
    with pytest.raises(SystemExit, match="no row of"):
        plot.main([str(file), "--out", str(tmp_path / "x.svg")])
