"""What info() and explain() print, and what `python -m flash_attn check` notices."""

import dataclasses
import warnings

import pytest
import torch

import flash_attn
from flash_attn import __main__ as cli
from flash_attn import _dispatch, _report, _self_check

PLAN = {
    "arch": 80, "pages_need_sm80": True, "dtype": "bf16", "head_dim": 64, "head_dim_v": 32, "mask": "causal",
    "score": "plain", "tile_m": 16, "tile_n": 128, "num_threads": 96, "smem_bytes": 99 * 1024, "num_blocks": 7,
    "num_splits": 0, "packed_heads": 4, "copies": [],
}  # fmt: skip
RESOURCES = "96 threads, 99 KB of shared memory"
BACKWARD = PLAN | {"tile_m": 64, "num_blocks": 5, "workspace_bytes": 123}


def lines_of(**fields):
    return str(_report.Explanation("f", **fields)).splitlines()


def test_an_explanation_names_the_path_that_runs_and_what_is_unproven():
    reasons = {"sm90": ["too new", "too wide"], "sm80": [], "cpu": []}
    unproven = {"sm90": ["dense batches"], "sm80": ["dropout", "backward"], "cpu": []}
    assert lines_of(path="sm80", objections=reasons, unproven=unproven) == [
        "f: sm80",
        "  sm90: too new; too wide",
        "  sm80: serves it, with kernels that no GPU has run yet for dropout, backward  <- runs",
        "  cpu: serves it",
    ]
    assert lines_of(path=None, objections={"cpu": []}) == ["f: no path serves this call", "  cpu: serves it"]


def test_an_explanation_tells_the_plan():
    plans = {"sm90": PLAN | {"copies": ["k", "v"]}, "sm80": PLAN | {"num_splits": 3, "packed_heads": 1}}
    assert lines_of(path="sm90", objections={"sm90": [], "sm80": []}, plans=plans) == [
        "f: sm90",
        "  sm90: serves it  <- runs",
        f"    a kernel of SM80: {_report._WHY_SM80_PAGES}",
        f"    variant bf16 d64/32 causal mask, plain score, tile 16 x 128, {RESOURCES}, 7 blocks, "
        "keys split by their lengths, 4 heads in a tile",
        f"    copies k, v first: {_report._WHY_COPIES}",
        "  sm80: serves it",
        f"    variant bf16 d64/32 causal mask, plain score, tile 16 x 128, {RESOURCES}, 7 blocks, 3 split(s)",
    ]
    plan = PLAN | {"pages_need_sm80": False, "backward": BACKWARD}
    _, _, why, _, backward = lines_of(path="sm90", objections={"sm90": []}, plans={"sm90": plan})
    assert why == f"    a kernel of SM80: {_report._WHY_SM80_ROWS}"
    assert backward == (
        f"    backward by SM80's kernels, d64/32, plain score, tile 64 x 128, {RESOURCES}, 5 blocks, "
        "123 bytes of workspace for dQ"
    )


def test_info_names_each_gpu_and_why_there_are_no_kernels():
    devices = tuple(_report.DeviceInfo(name, capability) for name, capability in (("A", (8, 0)), ("H", (9, 1))))
    info = dataclasses.replace(flash_attn.info(), kernels=(), kernels_missing="not built", devices=devices)
    assert str(info).splitlines()[1:] == [
        "kernels: none, not built",
        "cuda:0: A, compute capability 8.0",
        "cuda:1: H, compute capability 9.1",
    ]


@pytest.mark.parametrize("wrong", range(3))
def test_one_wrong_result_of_a_check_counts(wrong):
    def calls(random):
        exact = [torch.ones(4, dtype=torch.float64)] * 3
        return [(x * (1.5 if i == wrong else 1.0), x) for i, x in enumerate(exact)]

    assert _self_check._error(calls, torch.float16, "cpu") == 0.5


@pytest.mark.parametrize("title, calls, features", _self_check._CHECKS, ids=[check[0] for check in _self_check._CHECKS])
def test_a_check_uses_what_it_says_and_is_silent(title, calls, features, monkeypatch):
    told = set()

    def choose_path(q, head_dims, used):
        told.update(used)
        warnings.warn("flash_attn: kernels that have run on no GPU yet", stacklevel=2)
        return "cpu"

    monkeypatch.setattr(_dispatch, "choose_path", choose_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, outcome = _self_check._checked("cpu", calls, torch.bfloat16, "cpu", 2**-6)
    assert outcome is _self_check._Outcome.RIGHT and features <= told


def test_check_runs_on_the_paths_that_are_here(capsys, monkeypatch):
    monkeypatch.setattr(_self_check, "_CHECKS", _self_check._CHECKS[:1])
    monkeypatch.setattr(_self_check, "_paths_here", lambda: {"cpu": "cpu"})
    assert cli.main(["check"]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["cpu", "cpu", "all right"]
    assert cli.main(["check", "--path", "sm80"]) == 1
    assert capsys.readouterr().out.startswith("the path sm80 is not available here: ")
