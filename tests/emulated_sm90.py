"""Declared cases on the SM90 kernels' real source, run on the CPU: as emulated.py."""

import ctypes
import json
import re
from dataclasses import replace

import checks
import pytest
import torch
from cases import BF16, FP32
from emulated import CASES
from emulated_kernels import take_launches
from tolerance import assert_same_bits

import flash_attn
from flash_attn import _ops

# Served by the kernels that build_support/emulator.py compiles: bf16 with causal masks or general scores and head dims
# up to 64; and head dims 512/512 and 64/512, causal. With few rows a call is left to SM80's kernels, but not a varlen
# call with one split.
DENSE = (
    "causal-short-k-sinks",
    "dim-33x7-bfloat16",
    "dim-40x64-bfloat16",
    "len-200x257-causal",
    "alibi-softcap-window",
    "softcap-causal-gqa",
    "dim-512x512-bfloat16",
    "dim-64x512-bfloat16",
)
VARLEN = (
    "varlen-causal-gqa",
    "varlen-short-k-causal",
    "seqused-k",
    "seqused-q-edge",
    "varlen-alibi-batch",
    "leftpad",
    "varlen-recycled",
)
MORE = (
    replace(CASES["empty-k-causal"], id="empty-k-70-causal", lens_q=(70, 70)),
    replace(CASES["scale-negative-causal"], id="scale-negative-70-causal", lens_q=(70,), lens_k=(90,)),
    CASES["cache-batch-idx-many"],
    replace(CASES["len-200x257-causal"], id="len-200x257-dims-64x512", dims=(64, 512)),
)
PACKED = (
    replace(CASES["alibi-softcap-window"], id="packed-everything", heads=(8, 2), sinks=BF16),
    replace(
        CASES["varlen-causal-gqa"], id="packed-varlen", heads=(8, 1), lens_q=(17, 130, 1, 65), lens_k=(33, 150, 129, 20)
    ),
    replace(
        CASES["seqused-q"],
        id="packed-seqused",
        heads=(4, 2),
        lens_q=(65, 129, 70),
        seqused_q=(3, 129, 0),
        alibi="heads",
    ),
    replace(CASES["dim-512x512-bfloat16"], id="packed-512", heads=(4, 2)),
)
HEADS_OF_TWO_TILES = replace(CASES["len-200x257-causal"], id="128-heads", lens_q=(65,), lens_k=(70,), heads=(128, 1))
# Boxes of 16 to 128 rows, whole pages or parts of them; entries of many rows each, which SM90's kernels serve.
PAGED = (
    replace(CASES["paged-16"], id="paged-16-many", lens_q=(170, 65, 64)),
    replace(CASES["paged-5"], id="paged-48-window", page=48, lens_q=(70, 130), softcap=5.0),
    replace(CASES["paged-64-seqused-q"], id="paged-64-many", lens_q=(133, 64)),
    replace(CASES["paged-256"], id="paged-256-packed", lens_q=(100, 40), causal=True, heads=(4, 1)),
    replace(CASES["paged-cu-seqlens-k"], id="paged-80-cu-seqlens-k", lens_q=(70, 80), page=80),
    replace(CASES["paged-empty"], id="paged-empty-many", lens_q=(75, 70), causal=True),
    replace(CASES["paged-dims"], id="paged-dims-many", lens_q=(90, 70)),
    replace(CASES["paged-16-recycled-prefill"], id="paged-16-recycled-softcap", softcap=5.0),
    replace(CASES["paged-64-recycled"], id="paged-64-recycled-many", lens_q=(70, 133)),
    # Unseen at both ends of the only box of an entry.
    replace(CASES["paged-64-recycled"], id="paged-128-recycled", lens_q=(70, 80), seqused_k=(210, 330), page=128,
            window=(3, 0)),
    replace(CASES["cache-batch-idx-paged"], id="cache-batch-idx-paged-many", lens_q=(70, 70)),
    replace(CASES["append-paged"], id="append-paged-many", lens_q=(70, 70)),
    replace(CASES["rotary-paged-gqa"], id="rotary-paged-many", lens_q=(70, 70), new=(3, 3)),
    replace(CASES["paged-16"], id="paged-16-dims-512", lens_q=(170, 65, 64), dims=(512, 512)),
    replace(CASES["paged-16"], id="paged-32-dims-64x512", lens_q=(170, 65, 64), dims=(64, 512), page=32),
)  # fmt: skip

_TOO_EARLY = "reads byte .* of shared memory(, which nothing has written| while a copy|, which a copy)"
# Kernels of csrc/dev/emulator/faulty_kernels_sm90.cu, and what is said of them.
FAULTS = {
    "read_stage_before_its_barrier": _TOO_EARLY,
    "multiply_stage_before_its_barrier": _TOO_EARLY,
    "overwrite_stage_in_use": "writes byte .*, which .*(still read|, with no barrier between)",
    "release_stage_before_products_end": "writes byte .*, which TMA or the tensor cores still read",
    "read_accumulator_before_wait": "reads registers of a matrix product that it has not waited for",
    "write_operand_before_wait": "writes registers of a matrix product that it has not waited for",
    "return_before_wait": "returns while its matrix products are under way",
    "store_without_fence": "has TMA or the tensor cores read .*, with no fence after it",
    "overwrite_what_is_stored": "writes byte .*, which TMA or the tensor cores still read",
    "copy_with_an_unfenced_barrier": "whose initialisation was not fenced",
    "wait_for_a_phase_that_never_ends": "128 for the mbarrier at byte .* and parity 1",
    "arrive_too_often": "arrives at the mbarrier .* more often than it was initialised for",
    "wait_at_a_barrier_alone": "128 for barrier 3",
    "write_without_a_turn": "writes byte .*, with no barrier between",
    "take_registers_that_others_have": "4 for registers that others have",
}
# Faults of the kernel in csrc/dev/emulator/faulty_kernels_clusters.cu, and what is said of each.
CLUSTER_FAULTS = {
    "none": "^$",
    "starts_alone": "reads byte .* of block . of the cluster's shared memory|there is no barrier|was not fenced",
    "leaves_at_once": "leaves while copies|leaves while others of the cluster may still|which has left",
    "leaves_alone": "leaves while others of the cluster may still use its shared memory|which has left",
    "releases_to_itself_only": "writes byte .*, which .*(still read|, with no barrier between)",
    "releases_early": "writes byte .*, which .*(still read|, with no barrier between)",
    "expects_its_own_bytes": f"{_TOO_EARLY}|for the mbarrier at byte",
    "expects_nothing": f"{_TOO_EARLY}|for the mbarrier at byte",
    "forgets_its_barrier": "256 for barrier 3; 256 for the cluster's barrier",
}


def record_launches(monkeypatch):
    """The architectures of the forward kernels that run from now on."""
    archs, forward = set(), _ops.forward

    def recorded(path, call):
        take_launches()
        result = forward(path, call)
        archs.update(map(int, re.findall(r"sm(\d+)::launch_forward", take_launches())))
        return result

    monkeypatch.setattr(_ops, "forward", recorded)
    return archs


@pytest.fixture
def ran(monkeypatch):
    return record_launches(monkeypatch)


def copies(q, k, v):
    call = flash_attn.interface.build_call(flash_attn.flash_attn_func, q, k, v, causal=True)
    return json.loads(torch.ops.flash_attn.explain_forward(*call.op_arguments(), 90))["copies"]


@pytest.mark.parametrize("case", [*(CASES[name] for name in DENSE), *MORE], ids=lambda case: case.id)
def test_dense(case, ran):
    checks.check_forward("sm90", case)
    assert ran == {90}


def test_equal_scores(ran):
    checks.check_equal_scores("sm90")
    assert ran == {90}


@pytest.mark.parametrize("name", VARLEN)
def test_varlen(name, ran):
    checks.check_forward("sm90", CASES[name], num_splits=1)
    assert ran == {90}


@pytest.mark.parametrize("case", PACKED, ids=lambda case: case.id)
def test_packed_heads(case, ran):
    checks.check_forward("sm90", case, pack_gqa=True)
    assert ran == {90}


def test_more_heads_than_share_a_tile(ran):
    checks.check_forward("sm90", HEADS_OF_TWO_TILES)
    assert ran == {90}


@pytest.mark.parametrize("case", PAGED, ids=lambda case: case.id)
def test_pages(case, ran):
    checks.check_forward("sm90", case)
    assert ran == {90}


@pytest.mark.parametrize("num_splits", [1, 3])
def test_nan_is_kept(num_splits, ran):
    checks.check_nan_is_kept("sm90", 70, num_splits)
    assert ran == {90}


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("what", ["seqused_k", "block_table", "cache_batch_idx"])
def test_lying_metadata(what, num_splits, ran):
    checks.check_lying_cache("sm90", what, 70, num_splits)
    assert ran == {90}


@pytest.mark.parametrize("num_splits", [0, 3])
def test_rows_of_no_entry(num_splits, ran):
    checks.check_rows_of_no_entry("sm90", (200, 70, 1), num_splits)
    assert ran == {90}


def test_lying_offsets(ran):
    checks.check_lying_offsets("sm90")
    assert 90 in ran


SPLIT = (
    *(case for case in PAGED if case.id in ("paged-16-many", "paged-16-recycled-softcap", "paged-32-dims-64x512")),
    *(replace(case, sinks=BF16) for case in PACKED if case.id in ("packed-varlen", "packed-512")),
    replace(CASES["seqused-q"], id="seqused-q-many", lens_q=(70, 200, 80), seqused_q=(3, 190, 0), causal=True),
    replace(CASES["alibi-softcap-window"], id="scores-many", lens_q=(80, 80), lens_k=(300, 300), sinks=FP32),
    CASES["seqused-q-edge"],
    replace(CASES["varlen-causal-gqa"], id="varlen-many", lens_q=(200, 1, 0, 90), lens_k=(600, 9, 70, 0)),
)


@pytest.mark.parametrize("num_splits", [2, 5])
@pytest.mark.parametrize("case", SPLIT, ids=lambda case: case.id)
def test_split_keys(case, num_splits, ran):
    checks.check_forward("sm90", case, frozenset({"num_splits"}), num_splits=num_splits)
    assert ran == {90}


def test_keys_are_split_where_tiles_are_few(ran):
    case = replace(CASES["paged-16"], id="chunk", lens_q=(70,), lens_k=(4400,), seqused_k=(4390,), heads=(2, 1))
    checks.check_forward("sm90", case)
    assert ran == {90}


def test_few_rows_run_on_sm80_kernels(ran):
    checks.check_forward("sm90", CASES["cache-decode"])
    assert ran == {80}


def test_few_rows_run_on_sm90_kernels_where_sm80_has_none(ran):
    checks.check_forward("sm90", replace(CASES["dim-512x512-bfloat16"], id="few-rows-512", lens_q=(3,), lens_k=(70,)))
    assert ran == {90}


def test_cache_without_entries(ran):
    """Its descriptors have one entry all the same: TMA knows no dimension of size 0."""
    q = torch.randn(2, 100, 4, 64).to(BF16)
    cache = torch.empty(0, 16, 4, 64, dtype=BF16)
    idx = torch.zeros(2, dtype=torch.int32)
    with flash_attn.use_path("sm90"):
        out = flash_attn.flash_attn_with_kvcache(q, cache, cache, cache_batch_idx=idx, causal=True)
    assert not out.any() and ran == {90}


def test_gradients_come_from_sm80_kernels(ran):
    checks.check_backward("sm90", CASES["alibi-batch-causal"])
    assert ran == {90}


def in_memory(x, order):
    """The same elements, the dimensions in another order in memory."""
    return x.permute(order).contiguous().permute([order.index(dim) for dim in range(x.dim())])


@pytest.mark.parametrize(
    "what",
    ["rows", "heads", "batch", "head_dim", "address", "query heads", "heads first", "rows first", "heads before rows"],
)
def test_strides_that_tma_cannot_take(what, ran):
    """The same bits as from contiguous tensors."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 70, 4, 64, generator=generator).to(BF16) for _ in range(3))
    out = None
    if what == "rows":
        k = k[:, :1].expand(-1, 70, -1, -1)
    elif what == "heads":
        k, v = (x[:, :, :1].expand(-1, -1, 4, -1) for x in (k, v))
    elif what == "batch":
        k, v = (x[:1].expand(2, -1, -1, -1) for x in (k, v))
    elif what == "head_dim":
        v = in_memory(v, (0, 3, 2, 1))
    elif what == "address":
        k = torch.cat((k.flatten()[:1], k.flatten()))[1:].view(k.shape)
    elif what == "query heads":
        q = q[:, :, :1].expand(-1, -1, 4, -1)
    else:
        order = {"heads first": (2, 0, 1, 3), "rows first": (1, 0, 2, 3), "heads before rows": (0, 2, 1, 3)}[what]
        q, k, v, out = (in_memory(x, order) for x in (q, k, v, q))
    with flash_attn.use_path("sm90"):
        ours = flash_attn.flash_attn_func(q, k, v, causal=True, pack_gqa=False, out=out)
        expected = flash_attn.flash_attn_func(q.contiguous(), k.contiguous(), v.contiguous(), causal=True)
    assert_same_bits("out", ours, expected)
    copied = {"rows": ["k"], "head_dim": ["v"], "address": ["k"], "query heads": ["q"], "heads first": ["q"]}
    assert copies(q, k, v) == copied.get(what, []) and ran == {90}


def said_of(function, name, offset=0):
    """What the emulator says of a kernel with a fault, which the function runs."""
    run = getattr(ctypes.CDLL(flash_attn._C.__file__), function)
    run.restype = ctypes.c_char_p
    tensor = torch.ones(64, 64, dtype=torch.bfloat16)
    return run(name.encode(), ctypes.c_void_p(tensor.data_ptr() + offset)).decode()


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name):
    assert re.search(FAULTS[name], said_of("flash_attn_run_faulty_sm90_kernel", name))


def test_a_descriptor_begins_where_there_is_memory():
    assert said_of("flash_attn_run_faulty_sm90_kernel", "load_no_row") == ""
    said = said_of("flash_attn_run_faulty_sm90_kernel", "load_no_row", offset=-4096)
    assert "loads by a descriptor that begins outside of any tensor" in said


@pytest.mark.parametrize("name", CLUSTER_FAULTS)
def test_a_fault_of_a_cluster_is_found(name):
    assert re.search(CLUSTER_FAULTS[name], said_of("flash_attn_run_faulty_cluster_kernel", name))
