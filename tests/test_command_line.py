"""python -m flash_attn: info, support, explain and check. Needs no GPU."""

import dataclasses
import functools

import pytest
import torch

import flash_attn
from flash_attn import __main__ as cli
from flash_attn import _dispatch, _extension, _self_check


@pytest.mark.skipif(not _extension.is_loaded(), reason=f"no extension: {_extension.load_error()}")
def test_explain_on_the_command_line_copies_nothing(capsys):
    assert cli.main(["explain", "--causal", "--head-dim", "64"]) == 0
    said = capsys.readouterr().out
    assert "variant bf16 d64/64 causal mask" in said and "copies" not in said


def test_info_tells_versions_and_reasons():
    info = flash_attn.info()
    assert info.version == flash_attn.__version__ and info.torch == torch.__version__
    assert (info.kernels_missing is None) == _extension.is_loaded() == bool(info.kernels)
    assert flash_attn.__version__ in str(info)


def test_info_has_a_line_for_each_family_of_kernels():
    kernels = (
        "sm80 backward bf16 d64/64 (99 KB)",
        "sm80 forward bf16 d64/64 (99 KB)",
        "sm80 forward bf16 d96/96 (99 KB)",
    )
    build = _extension.BuildInfo(kernels_built=True, cuda="13.0")
    info = dataclasses.replace(flash_attn.info(), kernels=kernels, kernels_missing=None, build=build, devices=())
    assert str(info).splitlines()[1:] == [
        "kernels (CUDA 13.0), up to which head dims and with how much shared memory:",
        "  sm80 backward bf16: 64/64 (99 KB)",
        "  sm80 forward bf16: 64/64 (99 KB), 96/96 (99 KB)",
        "no GPU: calls run on the CPU path",
    ]


def test_command_line(capsys):
    for command in (["info"], ["support"], ["explain", "--causal", "--heads-k", "4"], ["check", "--path", "cpu"]):
        assert cli.main(command) == 0
    output = capsys.readouterr().out
    assert "flash_attn_func: " in output and "all right" in output and "| dense batches |" in output
    if not torch.cuda.is_available():
        assert cli.main(["check", "--path", "sm80"]) == 1


def test_check_finds_the_path_of_a_build_without_float16(monkeypatch):
    def objections(name, q, head_dim_v, features):
        return [] if (name, q.dtype, head_dim_v) == ("sm80", torch.bfloat16, 128) else ["not built"]

    monkeypatch.setattr(_dispatch, "objections", objections)
    monkeypatch.setattr(_extension, "is_loaded", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert _self_check._paths_here("meta") == {"cpu": "cpu", "sm80": "meta"}


def test_check_tells_what_did_not_run(capsys, monkeypatch):
    def refuse(random, head_dim):
        raise NotImplementedError("no kernel")

    refusal = ("a call", functools.partial(refuse, head_dim=64), set())
    monkeypatch.setattr(_self_check, "_CHECKS", (refusal, *_self_check._CHECKS[:1]))
    assert cli.main(["check", "--path", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "cpu: a call, float16: not run: no kernel" and lines[-1] == "all right, 2 not run"


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--dropout 1.5", "dropout_p must be in [0, 1), got 1.5"),
        ("--dropout 0.1 --softcap 3", "softcap must be 0 when dropout_p > 0, got 3.0 and 0.1"),
        ("--head-dim 577", "q must have a head_dim from 1 to 576, got 577"),
        ("--heads 3 --heads-k 2", "got num_heads 3 and num_heads_k 2"),
        ("--batch 1000000 --seqlen-q 10000000", "the tensors of this call can't be made here: "),
        ("--batch 9999999999999999999", "the tensors of this call can't be made here: "),
    ],
)
def test_command_line_tells_why_a_call_is_refused(capsys, arguments, words):
    assert cli.main(["explain", *arguments.split()]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("size", ["-1", "2.5", "many"])
def test_command_line_refuses_a_size(capsys, size):
    with pytest.raises(SystemExit) as ended:
        cli.main(["explain", f"--seqlen-q={size}"])
    assert ended.value.code == 2
    assert f"--seqlen-q: must be an int of at least 0, got {size!r}" in capsys.readouterr().err


@pytest.mark.parametrize("factor", [1.1, float("nan")])
def test_check_tells_wrong_results(capsys, monkeypatch, factor):
    right = _self_check._attention
    monkeypatch.setattr(_self_check, "_attention", lambda *args, **options: right(*args, **options) * factor)
    failures = 2 * len(_self_check._CHECKS)  # in either dtype
    assert cli.main(["check", "--path", "cpu"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert all("WRONG" in line for line in lines[:-1]) and lines[-1] == f"{failures} wrong"
