"""Kernels without a GPU: builds the package on the emulator and runs the modules for it.

Once as g++ compiles the kernels for it, with its own version of each instruction, and once as nvcc compiles them for a
GPU, translated from their PTX.
"""

import os
import subprocess
import sys

import pytest
from repository import ROOT

from build_support.emulator import build_emulator

MODULES = (
    "emulated.py",
    "emulated_addresses.py",
    "emulated_merge.py",
    "emulated_ops.py",
    "emulated_sm90.py",
    "test_cache_ops_gpu.py",
)


# The faults are in kernels of the emulator's own.
@pytest.mark.parametrize(("from_ptx", "selected"), [(False, ""), (True, "not test_a_fault")], ids=["source", "ptx"])
def test_emulated_kernels(compilers, from_ptx, selected):
    try:
        package = build_emulator(from_ptx=from_ptx)
    except ImportError as reason:
        pytest.skip(f"the kernels can't be emulated: {reason}")
    # From tests/, where no flash_attn hides the emulated one.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", selected, *MODULES]
    run = subprocess.run(
        command, cwd=ROOT / "tests", env=os.environ | {"PYTHONPATH": str(package)}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
