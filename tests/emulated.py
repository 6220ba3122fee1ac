"""Declared cases on the SM80 kernels' real source, run on the CPU (csrc/dev/emulator). emulated_sm90.py: on SM90's.

They run in a process of their own, since the package that is built for it holds other kernels of the same names; from
tests/:

    PYTHONPATH=$(python ../build_support/emulator.py) python -m pytest emulated.py
"""

import ctypes
import re

import checks
import pytest
import reference
import test_combine as combine_tests
import test_dropout
import test_fa2_interface
import torch
from cases import ALL
from tolerance import assert_close

import flash_attn

# Served by the kernels that build_support/emulator.py compiles: bf16 with head dims up to 64, whose plain scores are
# causal or have a window where there are more than 64 queries; fp16 with head dims up to 32 and neither.
FORWARD = (
    "varlen-causal-gqa",
    "varlen-many-short",
    "causal-short-k-sinks",
    "gqa-6-3-causal",
    "seqused-k",
    "seqused-q-edge",
    "empty-k-causal",
    "scale-negative-causal",
    "dim-33x7-bfloat16",
    "dim-40x64-bfloat16",
    "alibi-softcap-window",
    "softcap-causal-gqa",
    "varlen-alibi-batch",
    "dropout-causal-gqa",
    "dropout-seqused",
    "bwd-16x16-full",
    "paged-leftpad",
    "leftpad",
    "cache-decode",
    "cache-empty",
    "cache-paged",
    "cache-batch-idx",
    "cache-batch-idx-many",
    "cache-batch-idx-paged",
    "cache-lengths",
    "cache-lengths-window",
    "append-none",
    "append-varlen",
    "append-paged",
    "rotary-interleaved",
    "rotary-paged-gqa",
    "varlen-recycled",
    "paged-16-recycled",
    "paged-16-recycled-prefill",
    "paged-64-recycled",
    "cache-recycled",
    "cache-recycled-leftpad",
    "cache-paged-1-recycled",
    "append-recycled",
)
SPLIT = (
    "cache-decode",
    "cache-lengths",
    "paged-16",
    "varlen-many-short",
    "paged-16-recycled-prefill",
    "gqa-6-3-causal",
    "seqused-q-edge",
)
BACKWARD = (
    "varlen-recycled",
    "varlen-softcap-sinks",
    "seqused-q",
    "alibi-batch-causal",
    "dropout-sinks",
    "bwd-33x7-everything",
    "bwd-16x16-full",
)
GIVEN_MEMORY = ("fa2-window-dims", "fa2-varlen-alibi-dropout")

# Kernels of csrc/dev/emulator/faulty_kernels.cu, and what is said of them.
FAULTS = {
    "read_unwritten": "reads byte .* of shared memory, which nothing has written",
    "read_without_barrier": "reads byte .* of shared memory, which (nothing|thread .*) (has written|wrote)",
    "write_without_barrier": "(reads|writes) byte .* of shared memory, which .*, with no barrier between",
    "write_what_a_lane_disagrees_with": "writes byte .* to which thread .* wrote another value, with no barrier",
    "copy_to_where_a_lane_copies": "writes byte .* of shared memory, which thread .* wrote, with no barrier",
    "read_without_wait": "reads byte .* of shared memory while a copy to it is under way",
    "read_without_barrier_after_wait": "reads byte .* of shared memory",
    "read_past_tensor": "reads global memory outside of any tensor",
    "write_past_tensor": "writes global memory outside of any tensor",
    "copy_past_tensor": "reads global memory outside of any tensor",
    "write_past_shared_memory": "writes byte .* of 1024 bytes of shared memory",
    "write_what_another_block_writes": "writes global memory at .* of block [01] wrote in this launch",
    "read_what_another_block_writes": "reads global memory at .* of block [01] wrote in this launch",
    "shuffle_with_a_lane_that_left": "wait at .* an instruction of their warp, for others that never come",
    "wait_for_a_later_block": "waits for a thread block that does not start before it",
}

CASES = {case.id: case for case in ALL}


@pytest.mark.parametrize("name", FORWARD)
def test_forward(name):
    checks.check_forward("sm80", CASES[name])


def test_equal_scores():
    checks.check_equal_scores("sm80")


def test_output_must_not_overlap_keys():
    """What only interleaves with them, as in a fused projection, shares no element."""
    q, k, v = torch.randn(3, 1, 80, 2, 64).bfloat16()
    memory = torch.randn(200, 2, 64).bfloat16()
    fused = torch.randn(1, 80, 2, 4, 64).bfloat16().unbind(3)
    with flash_attn.use_path("sm80"):
        for keys, values, out in ((k, v, k), (k, v, v), (memory[None, :80], v, memory[None, 40:120])):
            with pytest.raises(RuntimeError, match="out must not overlap the keys or values"):
                flash_attn.flash_attn_func(q, keys, values, causal=True, out=out)
        flash_attn.flash_attn_func(*fused[:3], causal=True, out=fused[3])


def test_negative_views():
    """Tensors whose memory holds the negatives of their values; nothing but the dispatcher minds the difference."""
    q, k, v = torch.randn(3, 1, 80, 2, 64).bfloat16()
    with flash_attn.use_path("sm80"):
        for out in (None, torch.empty_like(q)):
            ours = flash_attn.flash_attn_func(q, k, torch._neg_view(v), causal=True, out=out)
            assert torch.equal(ours, flash_attn.flash_attn_func(q, k, -v, causal=True))
        (cos, sine), lengths = torch.rand(2, 80, 16).bfloat16(), torch.zeros(1, dtype=torch.int32)
        ours, expected = (
            flash_attn.flash_attn_with_kvcache(
                q, k * 0, v * 0, k, v, rotary_cos=cos, rotary_sin=sin, cache_seqlens=lengths, causal=True
            )
            for sin in (torch._neg_view(sine), -sine)
        )
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("window", [(-1, -1), (50, -1)])
def test_longest_cache(window):
    """An infinite window beside as many rows as there may be: what kernels add to its sides stays an int."""
    q, k, v = torch.randn(3, 1, 3, 1, 64).bfloat16()
    k, v = (x[:, :1].expand(-1, 2**31 - 1027, -1, -1) for x in (k, v))
    lengths = torch.tensor([200], dtype=torch.int32)
    with flash_attn.use_path("sm80"):
        ours = flash_attn.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, window_size=window)
        assert torch.equal(ours, v[:, :3])
        k, v = (x[:, :1].expand(-1, 2**31 - 1026, -1, -1) for x in (k, v))
        with pytest.raises(RuntimeError, match="q and k have at most 2147482624 rows together, got 3 and 2147482622"):
            flash_attn.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths)


@pytest.mark.parametrize("name", BACKWARD)
def test_backward(name):
    checks.check_backward("sm80", CASES[name])


def test_deterministic_sums_are_added_in_turn(monkeypatch):
    """Of four tiles of keys, whose shares of dQ are x, 0, -x and x: in any other order the sum overflows on its way."""
    x = 2.0**127
    sign = torch.ones(512).index_fill(0, torch.arange(1, 512, 2), -1)
    share = torch.tensor([x, 0, -x, x]).repeat_interleave(128)
    q = torch.zeros(1, 64, 1, 64).bfloat16().requires_grad_()
    k = (sign * share)[None, :, None, None].expand(1, 512, 1, 64).bfloat16()
    v = sign[None, :, None, None].expand(1, 512, 1, 64).bfloat16()
    dout = torch.zeros(1, 64, 1, 64).bfloat16()
    dout[..., 0] = 4  # dP is 4 where the sign is 1 and else -4, P is 1 / 512
    for deterministic in (True, False):
        in_turn = set()
        for seed in "123":
            monkeypatch.setenv("FLASH_ATTN_EMULATOR_SEED", seed)
            with flash_attn.use_path("sm80"):
                out = flash_attn.flash_attn_func(q, k, v, softmax_scale=2.0**-9, deterministic=deterministic)
                (dq,) = torch.autograd.grad(out, q, dout)
            in_turn.add(bool((dq == x * 2.0**-9).all()))
        assert in_turn == {True} if deterministic else False in in_turn


@pytest.mark.parametrize("name", GIVEN_MEMORY)
def test_backward_into_given_memory(name):
    (case,) = (case for case in test_fa2_interface.CASES if case.id == name)
    test_fa2_interface.test_backward_into_given_memory("sm80", case)


@pytest.mark.parametrize("name", SPLIT)
def test_split(name):
    checks.check_forward("sm80", CASES[name], features=frozenset({"num_splits"}), num_splits=3)


@pytest.mark.parametrize("num_splits", [0, 1, 3])
@pytest.mark.parametrize("num_queries", [1, 70])
def test_nan_is_kept(num_queries, num_splits):
    checks.check_nan_is_kept("sm80", num_queries, num_splits)


@pytest.mark.parametrize("case", test_dropout.PROBS, ids=lambda case: case.id)
def test_attn_probs(case):
    test_dropout.test_attn_probs_show_the_mask("sm80", case)


@pytest.mark.parametrize("num_splits", [0, 3])
@pytest.mark.parametrize("num_queries", [1, 70])
@pytest.mark.parametrize("what", ["seqused_k", "block_table", "cache_batch_idx", "leftpad_k"])
def test_lying_metadata(what, num_queries, num_splits):
    checks.check_lying_cache("sm80", what, num_queries, num_splits)


@pytest.mark.parametrize("what", ["seqused_k", "block_table"])
def test_lying_append(what):
    checks.check_lying_append("sm80", what)


@pytest.mark.parametrize("num_splits", [0, 1, 3])
@pytest.mark.parametrize("lens_q", [(3, 1, 2), (130, 70, 1)])
def test_rows_of_no_entry(lens_q, num_splits):
    checks.check_rows_of_no_entry("sm80", lens_q, num_splits)


def test_gradients_of_rows_of_no_sequence():
    test_fa2_interface.test_rows_of_no_sequence("sm80", False)


def test_lying_offsets():
    checks.check_lying_offsets("sm80")


def test_nan_is_kept_by_combine():
    combine_tests.test_nan_is_kept("sm80")


def test_combine():
    """Parts that saw nothing hold NaN."""
    generator = torch.Generator().manual_seed(0)
    parts, lse = torch.randn(3, 2, 5, 4, 40, generator=generator), torch.randn(3, 2, 5, 4, generator=generator)
    parts[1, 0], lse[1, 0] = float("nan"), float("-inf")
    with flash_attn.use_path("sm80"):
        ours = flash_attn.flash_attn_combine(parts, lse)
    exact, low = reference.combine(parts.double(), lse.double()), reference.combine(parts, lse)
    for name, *values in zip(("out", "lse"), ours, exact, low, strict=True):
        assert_close(name, *values)
    with pytest.raises(RuntimeError, match="out_dtype must be float16, bfloat16, float32 or float64"):
        torch.ops.flash_attn.combine(parts, lse, torch.int32)


def said_of(faulty_kernel):
    library = ctypes.CDLL(flash_attn._C.__file__)
    library.flash_attn_run_faulty_kernel.restype = ctypes.c_char_p
    out = torch.zeros(64)
    return library.flash_attn_run_faulty_kernel(faulty_kernel.encode(), ctypes.c_void_p(out.data_ptr())).decode()


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name):
    assert re.search(FAULTS[name], said_of(name))


def test_what_a_later_block_reads_is_found(monkeypatch):
    """Where blocks run one after the other; side by side both may read first."""
    monkeypatch.setenv("FLASH_ATTN_EMULATOR_SEED", "4")
    said = said_of("write_what_a_later_block_reads")
    assert re.search("reads global memory at .* of block 0 wrote in this launch", said)
