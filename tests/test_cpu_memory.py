"""The CPU path's memory is linear in the sequence length: four times the length, about four times the memory."""

import json
import os
import subprocess
import sys

import pytest

SHORT, LONG = 4096, 16384
# Four times the length may take four times the memory and an allocator's slack.
GROWTH = 5.0
# Below this, thread buffers and the allocator's granularity drown what grows.
FLOOR_MIB = 32
# A single head's score matrix at the long length. Two of them is what a quadratic backward needs at least.
SCORES_MIB = LONG * LONG * 4 / 2**20

CASES = {
    "causal": {"causal": True},
    "alibi_window": {"window_size": (511, 64), "alibi": True},
    "softcap": {"window_size": (4095, 0), "softcap": 20.0},
    "dropout_window": {"window_size": (255, 0), "dropout_p": 0.1},
}

SCRIPT = """
import json, sys
import torch
from flash_attn import flash_attn_func

options = json.loads(sys.argv[1])
if options.pop("alibi", False):
    options["alibi_slopes"] = torch.tensor([0.125])
if "window_size" in options:
    options["window_size"] = tuple(options["window_size"])

def peak_mib():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024

def run(seqlen):
    q, k, v = (torch.randn(1, seqlen, 1, 32, requires_grad=True) for _ in range(3))
    flash_attn_func(q, k, v, **options).sum().backward()
    return peak_mib()

print(json.dumps([run(int(seqlen)) for seqlen in sys.argv[2:]]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("name", CASES)
def test_memory_is_linear_in_the_sequence_length(name):
    arguments = [json.dumps(CASES[name]), "64", str(SHORT), str(LONG)]
    finished = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        # One head leaves more threads nothing to share but barriers, slow ones on a busy machine.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    start, short, long = json.loads(finished.stdout)
    grown_short, grown_long = max(short - start, FLOOR_MIB), long - start
    assert grown_long < GROWTH * grown_short, f"{grown_short:.0f} MiB at {SHORT}, {grown_long:.0f} MiB at {LONG}"
    assert grown_long < SCORES_MIB / 4, f"{grown_long:.0f} MiB at {LONG}"
