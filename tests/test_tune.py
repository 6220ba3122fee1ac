"""benchmarks/tune_sm90.py makes a program of a tile; without an SM90 GPU it says why it doesn't run."""

import importlib.util
import os
import sys

import pytest
import torch
from repository import ROOT
from torch.nn.functional import scaled_dot_product_attention

SCRIPT = ROOT / "benchmarks" / "tune_sm90.py"
TILE = (192, 128, 12, 1, 2, 2, 0)


@pytest.fixture
def tune(monkeypatch):
    if not SCRIPT.exists():
        pytest.skip("the package runs outside the source tree, which holds benchmarks/tune_sm90.py")
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("tune_sm90", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_program_runs(tune, tmp_path, capsys):
    from build_support.toolkit import find_cuda_home, find_cutlass

    if find_cuda_home(os.environ)[0] is None:
        pytest.skip("there is no CUDA toolkit")
    try:
        find_cutlass(ROOT, os.environ)
    except SystemExit as reason:
        pytest.skip(str(reason))
    program = tune.compile_program(tmp_path, (64, 64), TILE, "causal", tune.compile_shared(tmp_path))
    assert program is not None, capsys.readouterr().err
    result = tune.run(program, 1, 2, 200)
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9:
        milliseconds, total = result
        assert milliseconds > 0
        # Of other values with the same spread.
        q, k, v = torch.randn(3, 1, 2, 200, 64)
        expected = scaled_dot_product_attention(q, k, v, is_causal=True).abs().sum().item()
        assert total == pytest.approx(expected, rel=0.1)
    else:
        assert result is None
        assert "status 1, " in capsys.readouterr().err, "a reason, not a signal"
