"""benchmarks/host_overhead.py runs on any machine and times every kind of call."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

import flash_attn

SCRIPT = ROOT / "benchmarks" / "host_overhead.py"
ROWS = (
    "torch's SDPA",
    "checks of the options",
    "flash_attn_func",
    "  forward and backward",
    "flash_attn_varlen_func, causal",
    "flash_attn_with_kvcache, pages",
    "  appending",
)


def test_every_call_is_timed():
    if not SCRIPT.exists():
        pytest.skip("the package runs outside the source tree, which holds benchmarks/host_overhead.py")
    package = {"PYTHONPATH": str(Path(flash_attn.__file__).parents[1])}
    command = [sys.executable, SCRIPT, "--loops", "1"]
    done = subprocess.run(command, env=os.environ | package, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ROWS:
        assert re.search(rf"^{name} .*(\d+\.\d\d \(\d+\.\d\d\)|no path serves it)", done.stdout, re.MULTILINE), name
