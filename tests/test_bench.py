"""python -m flash_attn bench: its declared cases, its checks, whole runs. test_bench_results.py has what follows."""

import dataclasses
import io
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flash_attn import __main__ as main_module
from flash_attn import _dispatch
from flash_attn.bench import check, cpu_path, impls, measure, report, runner, suites

TINY = suites.Case("fwd", 2, 4, 2, 24, 24, 16, 16, "fp32", causal=True)
PACKED = suites.Case("varlen", 3, 4, 2, 20, 20, 16, 8, "fp32", causal=True, lengths=(5, 20, 1))
BACKWARD = dataclasses.replace(TINY, suite="bwd", backward=True)
BY_DEVICE = [(name, device) for device in ("cuda", "cpu") for name in suites.suites_for(device) if name != "cpu"]


# ---- Declared cases ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name,device", BY_DEVICE)
def test_declared_cases(name, device):
    suite = suites.SUITES[name]
    cases = list(suite.cases(name, device))
    titles = [case.title for case in cases]
    assert cases and len(set(titles)) == len(titles), "titles tell the cases of a suite apart"
    for case in cases:
        assert case.suite == name and case.dtype in suites.DTYPES
        assert case.heads % case.heads_k == 0 and case.batch > 0
        assert 1 <= case.head_dim <= 576 and 1 <= case.head_dim_v <= 512
        assert case.flops > 0
        assert not (case.softcap and case.dropout_p), "the API refuses both together"
        if case.lengths:
            assert len(case.lengths) == case.batch and max(case.lengths) == case.seqlen_q == case.seqlen_k
        if device == "cpu":
            assert case.flops < 5e9, "a case on the CPU takes well under a second"
        most_queries = case.seqlen_k if name == "prefill" else 1
        assert not case.cached or (case.seqlen_q <= most_queries and not case.backward)
    assert set(suite.also) | set(suite.only) <= set(impls.NAMES)


@pytest.mark.parametrize(
    "changes, title",
    [
        ({}, "b2 h4/2 q24 k24 d16/16 causal fp32"),
        ({"causal": False, "window": (4, -1), "seqlen_q": 9}, "b2 h4/2 q9 k24 d16/16 full w4,-1 fp32"),
        ({"alibi": True, "sinks": True, "softcap": 30.0}, "b2 h4/2 q24 k24 d16/16 causal softcap30 alibi sinks fp32"),
        ({"dropout_p": 0.1, "backward": True}, "b2 h4/2 q24 k24 d16/16 causal dropout0.1 bwd fp32"),
        ({"cached": True, "head_dim_v": 8}, "b2 h4/2 q24 k24 d16/8 causal cache fp32"),
        ({"cached": True, "page": 16}, "b2 h4/2 q24 k24 d16/16 causal page16 fp32"),
        ({"batch": 3, "lengths": (5, 20, 1)}, "b3 h4/2 1..20 of 26 d16/16 causal fp32"),
    ],
)
def test_titles_tell_every_parameter(changes, title):
    assert dataclasses.replace(TINY, **changes).title == title


def test_every_skewed_length_occurs_once():
    assert sorted(suites.skewed_lengths(8, 512, 0.7, 60)) == [60, 60, 86, 122, 175, 250, 358, 512]


def test_lengths_are_skewed():
    for case in suites.SUITES["varlen"].cases("varlen", "cuda"):
        lengths = sorted(case.lengths)
        assert lengths[-1] >= 8 * lengths[len(lengths) // 4] and list(case.lengths) not in (lengths, lengths[::-1])


def test_every_name_is_explained():
    assert set(impls.MEANINGS) == set(impls.NAMES)
    assert {name for names in impls.DEFAULTS.values() for name in names} <= set(impls.NAMES)


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (3, 0), (0, 2), (2, -1), (-1, 1)], ids=str)
@pytest.mark.parametrize("seqlens", [(7, 7), (4, 9), (9, 4), (1, 6), (5, 1)], ids=str)
def test_flops_by_counting(seqlens, window):
    seqlen_q, seqlen_k = seqlens
    left, right = window
    pairs = 0
    for i in range(seqlen_q):
        for j in range(seqlen_k):
            distance = j - (i + seqlen_k - seqlen_q)
            pairs += (left < 0 or distance >= -left) and (right < 0 or distance <= right)
    case = suites.Case("fwd", 3, 4, 2, seqlen_q, seqlen_k, 16, 8, window=window)
    # A multiplication and an addition for each element of q.k and of p.v.
    assert case.flops == 3 * 4 * pairs * (2 * 16 + 2 * 8)
    hidden = check.hidden_pairs(seqlen_q, seqlen_k, window, torch.device("cpu"))
    assert int((~hidden).sum()) == pairs


def test_flops_of_packed_sequences():
    assert PACKED.flops == 2 * 4 * (16 + 8) * sum(n * (n + 1) // 2 for n in PACKED.lengths)


# ---- Running -----------------------------------------------------------------------------------------------------


@pytest.fixture
def no_cuda(monkeypatch):
    """Whatever a CPU run might ask of CUDA fails."""

    def forbidden(*args, **kwargs):
        raise AssertionError("torch.cuda was touched")

    asked = ("is_available", "synchronize", "empty_cache", "get_device_name", "get_device_properties", "_lazy_init")
    for name in asked:
        monkeypatch.setattr(torch.cuda, name, forbidden)


@pytest.fixture
def few_cases(monkeypatch):
    small = {
        "fwd": [TINY, dataclasses.replace(TINY, head_dim=24, head_dim_v=24)],
        "tiny": [dataclasses.replace(PACKED, suite="tiny")],
        "score": [dataclasses.replace(TINY, suite="score", sinks=True)],
        "bwd": [BACKWARD],
        "paged": [suites.Case("paged", 2, 4, 2, 1, 40, 16, 16, "fp32", causal=True, cached=True, page=8)],
        "latency": [suites.Case("latency", 1, 4, 2, 1, 40, 16, 16, "fp32", causal=True, cached=True)],
    }
    for name, cases in small.items():
        suite = dataclasses.replace(suites.SUITES[name], cases=lambda name, device, cases=cases: iter(cases))
        monkeypatch.setitem(suites.SUITES, name, suite)


def bench(*arguments):
    return main_module.main(["bench", *map(str, arguments)])


def test_driver_is_asked_about_the_same_gpu_as_torch(monkeypatch):
    """CUDA_VISIBLE_DEVICES changes torch's indices, not those of nvidia-smi."""
    asked = []

    def answer(command, folder=None):
        asked.append(command)
        return "580.1, 700.00 W, 1980 MHz"

    gpu = SimpleNamespace(uuid="12345678-9abc-def0-1234-56789abcdef0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: gpu)
    monkeypatch.setattr(report, "_output_of", answer)
    assert report._nvidia_smi() == {"driver": "580.1", "power_limit": "700.00 W", "max_clock": "1980 MHz"}
    assert asked[0][-2:] == ["-i", f"GPU-{gpu.uuid}"]


def test_run_end_to_end(tmp_path, capsys, no_cuda, few_cases, monkeypatch):
    monkeypatch.setenv(report.COMMIT_VARIABLE, "0123abcd")
    monkeypatch.setattr(measure, "_OVERHEAD_SAMPLES", 2)
    file = tmp_path / "new" / "result.json"
    arguments = ("--device", "cpu", "--suites", "fwd,tiny,score", "--rep", "0.1", "--rounds", "2")
    assert bench(*arguments, "--json", file) == 0
    printed = capsys.readouterr().out
    result = report.read_json(file)
    assert [row["suite"] for row in result["rows"]] == ["fwd", "fwd", "tiny", "score"]
    environment = result["environment"]
    assert environment["commit"] == "0123abcd" and environment["torch"] == torch.__version__
    assert environment["device"] == "cpu" and environment["cpu"] and environment["date"].startswith("20")
    for row in result["rows"]:
        for name, figure in row["results"].items():
            if name == "sdpa" and row["suite"] == "score":
                assert figure == {"skipped": "no sinks"}
                continue
            assert len(figure["round_ms"]) == 2 and figure["ms"] > 0 and figure["error"] < 1e-6
            assert figure["tflops"] == pytest.approx(row["flops"] / figure["ms"] / 1e9)
            assert "wrong" not in figure and "failed" not in figure
    assert "GFLOP/s" in printed and "us/call" in printed and "geometric mean" in printed
    assert bench("--summary", file) == 0
    assert "| fwd | ours | sdpa | 2 |" in capsys.readouterr().out


def test_run_of_steps_and_of_the_backward_pass(tmp_path, capsys, no_cuda, few_cases):
    file = tmp_path / "result.json"
    arguments = ("--device", "cpu", "--suites", "bwd,paged,latency", "--rep", "0.1", "--rounds", "1")
    assert bench(*arguments, "--json", file) == 0
    printed = capsys.readouterr().out
    rows = {row["suite"]: row["results"] for row in report.read_json(file)["rows"]}
    assert rows["bwd"]["ours"]["ms"] > 0 and rows["bwd"]["sdpa"]["ms"] > 0
    step = rows["paged"]["ours"]
    assert step["gb_s"] == pytest.approx(2 * 40 * 2 * 32 * 4 / step["ms"] / 1e6)
    assert rows["paged"]["sdpa"] == {"skipped": "no page"} and "gb_s" not in rows["latency"]["ours"]
    assert "GB/s" in printed and ", us " in printed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_graph_timing():
    x = torch.ones(1 << 24, device="cuda")
    graphed, eager = measure.graph_ms(lambda: x.mul_(1), "cuda", 5.0), measure._event_ms(lambda: x.mul_(1), 5.0)
    assert 0.2 * eager < graphed < 2 * eager


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_run_on_the_gpu(tmp_path, few_cases, monkeypatch):
    cases = [dataclasses.replace(TINY, dtype="bf16", head_dim=64, head_dim_v=64, heads_k=4)]
    suite = dataclasses.replace(suites.SUITES["fwd"], cases=lambda name, device: iter(cases))
    monkeypatch.setitem(suites.SUITES, "fwd", suite)
    file = tmp_path / "result.json"
    assert bench("--suites", "fwd", "--impls", "ours,flash,math", "--rep", "1", "--json", file) == 0
    (row,) = report.read_json(file)["rows"]
    for one in row["results"].values():
        assert one["ms"] > 0 and one["peak_bytes"] >= 2 * 24 * 4 * 64 * 2, "the output at least"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_event_timing_without_triton():
    x = torch.ones(1 << 20, device="cuda")
    assert 0 < measure._event_ms(lambda: x.mul_(1), 1.0) < 10


def test_failures_are_recorded_and_the_run_goes_on(tmp_path, capsys, few_cases, monkeypatch):
    def broken(case, inputs):
        raise RuntimeError("no such kernel")

    def wrong(case, inputs):
        return impls.Prepared(lambda: torch.zeros(*inputs.q.shape[:-1], case.head_dim_v))

    made = {"ours": impls.Implementation("ours", wrong), "sdpa": impls.Implementation("sdpa", broken)}
    monkeypatch.setattr(impls, "load", made.__getitem__)
    file = tmp_path / "result.json"
    assert bench("--device", "cpu", "--suites", "fwd", "--rep", "0.1", "--json", file) == 1
    for row in report.read_json(file)["rows"]:
        assert row["results"]["sdpa"] == {"failed": "RuntimeError: no such kernel"}
        assert "relative error" in row["results"]["ours"]["wrong"] and row["results"]["ours"]["ms"] > 0
    printed = capsys.readouterr().out
    assert "no such kernel" in printed and "2 case(s)" in printed and "!" in printed


def test_a_lost_gpu_ends_the_run(tmp_path, capsys, few_cases, monkeypatch):
    def lost(case, *others):
        raise runner.DeviceLost("illegal memory access")

    monkeypatch.setattr(runner, "run_case", lost)
    file = tmp_path / "result.json"
    assert bench("--device", "cpu", "--suites", "fwd", "--json", file) == 1
    assert report.read_json(file)["stopped"] == f"fwd {TINY.title}: illegal memory access"


def test_progress_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("COLUMNS", "40")
    out = Terminal()
    table = report.Table("cpu", 2, out)
    table.progress("a long description that the terminal has no room for")
    shown = out.getvalue().removeprefix("\r\033[K")
    assert shown.startswith("[....................] 1/2 a long") and len(shown) < 40
    table.done = 1
    table.progress("more")
    assert "[##########..........] 2/2 more" in out.getvalue()


def test_failure_while_timing_is_recorded():
    calls = iter([torch.zeros(2, 24, 4, 16)])
    once = impls.Implementation("once", lambda case, inputs: impls.Prepared(lambda: next(calls)))
    row = runner.run_case(TINY, [once], runner.Settings("cpu", 0.1, 2), lambda what: None)
    figure = row["results"]["once"]
    assert "StopIteration" in figure["failed"] and "ms" not in figure


def test_failure_in_a_later_round_leaves_no_time(monkeypatch):
    times = iter([1.0])
    monkeypatch.setattr(measure, "time_ms", lambda *arguments: next(times))
    row = runner.run_case(TINY, [impls.load("ours")], runner.Settings("cpu", 0.1, 2), lambda what: None)
    figure = row["results"]["ours"]
    assert figure["round_ms"] == [1.0] and figure["failed"] == "StopIteration: " and "ms" not in figure


def test_a_long_message_is_cut():
    def fail(case, inputs):
        raise ValueError(" " + "x" * 1000)

    one = impls.Implementation("one", fail)
    row = runner.run_case(TINY, [one], runner.Settings("cpu", 0.1, 1), lambda what: None)
    assert row["results"]["one"]["failed"] == "ValueError: " + "x" * 300


@pytest.mark.parametrize("case", [TINY, BACKWARD], ids=["forward", "backward"])
def test_a_run_tells_what_it_does_and_records_no_gradients_unless_asked(case, monkeypatch):
    said, modes = [], []

    def prepare(case, inputs):
        prepared = impls.load("ours").prepare(case, inputs)
        modes.append(torch.is_grad_enabled())
        return prepared

    monkeypatch.setattr(measure, "peak_bytes", lambda call, device: 1234)
    monkeypatch.setattr(measure, "time_ms", lambda call, device, rep_ms: 2.0)
    one = impls.Implementation("one", prepare)
    row = runner.run_case(case, [one], runner.Settings("cpu", 0.1, 2), said.append)
    assert said == [f"{case.title}: one, {what}" for what in ("check", "round 1 of 2", "round 2 of 2")]
    assert modes == [case.backward] and row["results"]["one"]["peak_bytes"] == 1234


@pytest.mark.parametrize(
    "suite, how", [("fwd", "time_ms"), ("tiny", "overhead_ms"), ("latency", "graph_ms"), ("paged", "graph_ms")]
)
def test_suites_are_timed_as_they_say(suite, how, monkeypatch):
    for name in ("time_ms", "overhead_ms", "graph_ms"):
        monkeypatch.setattr(measure, name, lambda *arguments, name=name: name)
    case, prepared = dataclasses.replace(TINY, suite=suite), impls.Prepared(lambda: None)
    assert runner._time_ms(prepared, case, runner.Settings("cpu", 0.1, 1)) == how


def test_a_gpu_is_freed_after_a_failure_or_is_lost(monkeypatch):
    done = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("empty_cache"))
    with runner._failures_in(runner.Figure(), "cuda"):
        raise ValueError("no such kernel")
    assert done == ["synchronize", "empty_cache"]
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: next(iter(())))
    with pytest.raises(runner.DeviceLost, match="the GPU is lost, after ValueError: no such kernel: "):
        with runner._failures_in(runner.Figure(), "cuda"):
            raise ValueError("no such kernel")


def test_cpu_suite_takes_the_scripts_cases(tmp_path, capsys, no_cuda):
    if not cpu_path.SCRIPT.exists():
        pytest.skip("the package runs outside the source tree, which holds benchmarks/cpu_path.py")
    file = tmp_path / "result.json"
    only = "kvcache dense B4 Sq1 "
    assert bench("--suites", "cpu", "--device", "cpu", "--only", only, "--rep", "1", "--json", file) == 0
    rows = report.read_json(file)["rows"]
    assert len(rows) == 2 and all(row["case"].startswith(only) for row in rows)
    for row in rows:
        assert set(row["results"]) == {"ours", "sdpa"}
        assert all(one["ms"] >= one["best_ms"] > 0 and one["error"] < 1e-2 for one in row["results"].values())


@pytest.mark.parametrize(
    "arguments,words",
    [
        (("--suites", "fwd,nothing"), "nothing"),
        (("--suites", ","), "--suites must give at least one name"),
        (("--impls", "ours,nobody"), "--impls: an implementation must be one of ours,"),
        (("--impls", ","), "--impls must give at least one name"),
        (
            ("--suites", "fwd,tiny", "--only", "no such case"),
            "--only: a case of fwd, tiny must contain it, got 'no such case'",
        ),
        (("--rep", "0"), "--rep must be a time above 0 in ms, got 0.0"),
        (("--rep", "nan"), "--rep must be a time above 0 in ms, got nan"),
        (("--rounds", "0"), "--rounds must be at least 1, got 0"),
        (("--json", __file__ + "/result.json"), "--json: "),
        (("--json", str(Path(__file__).parent)), "is a folder"),
        (("--suites", "memory"), "cuda only"),
        (("--impls", "fa3"), "none of fa3 can be imported"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_misuse(arguments, words, capsys, monkeypatch):
    monkeypatch.setitem(impls._PEERS, "fa3", (("there_is_no_such_module",), -1))
    assert bench("--device", "cpu", *arguments) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "option,value,words",
    [
        ("--only", "no such case", "--only: a case of cpu must contain it, got 'no such case'"),
        ("--impls", "ours", "--impls must not be given with cpu, which has its own two, got ours"),
    ],
)
def test_misuse_of_the_cpu_suite(option, value, words, capsys):
    if not cpu_path.SCRIPT.exists():
        words = f"--suites: cpu needs the source tree, and there is no {cpu_path.SCRIPT}"
    assert bench("--device", "cpu", "--suites", "cpu", option, value) == 2
    assert words in capsys.readouterr().err


def test_forced_paths_have_names():
    for path in _dispatch.PATHS.values():
        if path.arch is not None:
            with impls.load(f"ours{path.arch}").context():
                assert _dispatch._forced.path == path.name
