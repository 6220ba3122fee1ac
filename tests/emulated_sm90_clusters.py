"""Cases on SM90's kernels whose thread blocks come in clusters of two, run on the CPU as emulated_sm90.py's.

They have a package of their own; from tests/:

    PYTHONPATH=$(python ../build_support/emulator.py --clusters) python -m pytest emulated_sm90_clusters.py
"""

import json

import checks
import pytest
import torch
from cases import BF16, FP32, Case
from emulated_sm90 import record_launches

import flash_attn


def dense(id, reason, len_q, len_k, batch=1, **options):
    """Head dim 512, where tiles have 64 rows and keys, and clusters 128 rows, unless it is said otherwise."""
    return Case(id, reason, "dense", (len_q,) * batch, (len_k,) * batch, **{"dims": (512, 512)} | options)


def varlen(id, reason, lens_q, lens_k, **options):
    return Case(id, reason, "varlen", lens_q, lens_k, **{"dims": (512, 512)} | options)


# Served by CLUSTER_VARIANTS of build_support/emulator.py: full, causal, and general masks with a general score.
DENSE = (
    dense("full", "both blocks of each cluster have rows", 256, 130, batch=2),
    dense("full-odd", "the last cluster's second block has no row", 320, 65, heads=(3, 3)),
    dense("full-1-key", "one tile of keys, with one key", 70, 1),
    dense("full-part-of-a-slice", "columns end within a slice of K and of V", 130, 100, dims=(456, 328)),
    dense("full-short-columns", "K ends before its last slice, V in its left half", 100, 70, dims=(300, 136)),
    dense("causal", "the blocks of a cluster would visit different keys", 200, 200, causal=True),
    dense("causal-many", "clusters with several pairs of tiles", 520, 520, dims=(512, 64), heads=(2, 1), causal=True),
    dense("causal-gqa-8", "eight heads of one key-value head", 150, 130, heads=(8, 1), causal=True),
    dense("causal-short-k", "rows that see nothing", 300, 70, heads=(4, 2), causal=True, sinks=FP32),
    dense("causal-empty-k", "no key at all", 130, 0, batch=2, causal=True, sinks=BF16),
    dense("window", "keys that one block's rows alone see", 330, 400, window=(40, 30), softcap=20.0),
    dense("window-right", "the window's right side is past the diagonal", 200, 300, window=(-1, 70), softcap=20.0),
    dense("alibi", "slopes of two heads", 130, 200, heads=(2, 1), alibi="heads", sinks=BF16),
    dense("128-causal", "groups in turns, tiles of 128", 400, 410, dims=(128, 128), heads=(3, 1), causal=True),
    dense("128-causal-odd", "the only cluster's second block has no row", 100, 300, dims=(128, 72), causal=True),
)
VARLEN = (
    varlen(
        "varlen-causal",
        "empty and short entries",
        (0, 1, 130, 64, 65, 0, 200),
        (0, 33, 129, 0, 250, 7, 20),
        heads=(4, 2),
        causal=True,
    ),
    varlen("varlen-full", "one row past a block, and past a cluster", (65, 129), (64, 1), heads=(3, 1)),
    varlen(
        "varlen-window", "keys before all windows hold NaN", (129, 70, 3), (300, 0, 65), window=(20, 5), softcap=20.0,
        alibi="batch", recycled=True,
    ),
    varlen(
        "seqused", "unused rows fill blocks and clusters", (270, 270, 130), (200, 10, 66), seqused_q=(270, 70, 0),
        seqused_k=(200, 7, 66), causal=True,
    ),
    varlen("varlen-128", "groups in turns", (0, 129, 300, 7), (20, 129, 250, 7), dims=(128, 128), causal=True),
)  # fmt: skip
PACKED = (
    dense("packed-causal", "heads share tiles", 70, 200, heads=(4, 2), causal=True),
    dense("packed-128", "heads share tiles", 70, 90, dims=(128, 128), heads=(8, 2), causal=True, sinks=FP32),
)


@pytest.fixture
def ran(monkeypatch):
    return record_launches(monkeypatch)


@pytest.mark.parametrize("case", DENSE, ids=lambda case: case.id)
def test_dense(case: Case, ran):
    checks.check_forward("sm90", case, pack_gqa=False)
    assert ran == {90}


@pytest.mark.parametrize("case", VARLEN, ids=lambda case: case.id)
def test_varlen(case: Case, ran):
    checks.check_forward("sm90", case, num_splits=1)
    assert ran == {90}


@pytest.mark.parametrize("case", PACKED, ids=lambda case: case.id)
def test_packed_heads(case: Case, ran):
    checks.check_forward("sm90", case, pack_gqa=True)
    assert ran == {90}


def test_blocks_come_in_pairs():
    q, kv = (torch.empty(1, length, 3, 512, dtype=BF16) for length in (320, 65))
    call = flash_attn.interface.build_call(flash_attn.flash_attn_func, q, kv, kv)
    plan = json.loads(torch.ops.flash_attn.explain_forward(*call.op_arguments(), 90))
    assert plan["num_blocks"] == 3 * 3 * 2
