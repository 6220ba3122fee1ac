"""Declared cases on the SM90 kernels' real source, run on the CPU: as emulated.py."""

import ctypes
import re

import checks
import pytest
import torch
from emulated import CASES

import flash_attn

# Served by the kernels that build_support/emulator.py compiles: bf16 with causal masks or general scores and head dims
# up to 64; and head dim 512, causal.
FORWARD = (
    "varlen-causal-gqa",
    "varlen-short-k-causal",
    "causal-short-k-sinks",
    "gqa-6-3-causal",
    "mqa-5-1-causal",
    "seqused-k",
    "empty-k-causal",
    "scale-negative-causal",
    "dim-33x7-bfloat16",
    "dim-40x64-bfloat16",
    "len-200x257-causal",
    "alibi-softcap-window",
    "softcap-causal-gqa",
    "varlen-alibi-batch",
    "dim-512x512-bfloat16",
    "dim-64x512-bfloat16",
)

_TOO_EARLY = "reads byte .* of shared memory(, which nothing has written| while a copy|, which a copy)"
# Kernels of csrc/dev/emulator/faulty_kernels_sm90.cu, and what is said of them.
FAULTS = {
    "read_stage_before_its_barrier": _TOO_EARLY,
    "multiply_stage_before_its_barrier": _TOO_EARLY,
    "overwrite_stage_in_use": "writes byte .*, which .*(still read|, with no barrier between)",
    "give_back_stage_before_products_end": "writes byte .*, which the copy engine or the tensor cores still read",
    "read_accumulator_before_wait": "reads registers of a matrix product that it has not waited for",
    "write_operand_before_wait": "writes registers of a matrix product that it has not waited for",
    "return_before_wait": "returns while its matrix products are under way",
    "store_without_fence": "has the copy engine or the tensor cores read .*, with no fence after it",
    "overwrite_what_is_stored": "writes byte .*, which the copy engine or the tensor cores still read",
    "copy_with_an_unfenced_barrier": "whose initialisation was not fenced",
    "wait_for_a_phase_that_never_ends": "128 for the mbarrier at byte .* and parity 1",
    "arrive_too_often": "arrives at the mbarrier .* more often than it was initialised for",
    "wait_at_a_barrier_alone": "128 for barrier 3",
    "write_without_a_turn": "writes byte .*, with no barrier between",
    "take_registers_that_others_have": "4 for registers that others have",
}


@pytest.mark.parametrize("name", FORWARD)
def test_forward(name):
    checks.check_forward("sm90", CASES[name])


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name):
    library = ctypes.CDLL(flash_attn._C.__file__)
    library.flash_attn_run_faulty_sm90_kernel.restype = ctypes.c_char_p
    tensor = torch.ones(64, 64, dtype=torch.bfloat16)
    said = library.flash_attn_run_faulty_sm90_kernel(name.encode(), ctypes.c_void_p(tensor.data_ptr())).decode()
    assert re.search(FAULTS[name], said)
