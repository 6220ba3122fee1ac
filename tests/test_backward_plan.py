"""The planner of the backward (csrc/plan/backward_plan.cpp), called as in planning.py."""

import pytest
from planning import LARGEST_SMEM, planner, problem

DENSE, VARLEN = planner.Layout.DENSE, planner.Layout.VARLEN
# Three entries whose rows fill no tile, with as many key-value heads as no other number here.
CALL = {"batch": 3, "num_heads": 10, "num_heads_k": 5, "rows_q": 1000, "rows_k": 700}


def plan(smem=LARGEST_SMEM, **changes):
    return planner.make_backward_plan(problem(**(CALL | changes)), smem)


def tiles(rows, tile_rows):
    return -(-rows // tile_rows)


@pytest.mark.parametrize("head_dims", [(33, 7), (64, 64), (160, 192), (512, 512), (257, 40)])
@pytest.mark.parametrize("smem", [LARGEST_SMEM, 163 * 1024])
@pytest.mark.parametrize(("layout", "layout_k"), [(DENSE, DENSE), (VARLEN, VARLEN), (VARLEN, DENSE)])
def test_grid_and_workspace(head_dims, smem, layout, layout_k):
    """Each tile of keys has a thread block for each part of its columns; each tile of rows has sums of dQ in as many
    columns as the kernel has, and a counter for each part of them."""
    made = plan(smem, head_dim=head_dims[0], head_dim_v=head_dims[1], layout=layout, layout_k=layout_k)
    assert made.head_dim >= head_dims[0] and made.head_dim_v >= head_dims[1] and made.smem_bytes <= smem
    assert made.column_blocks == (2 if made.head_dim == 512 else 1)
    if layout_k == DENSE:
        assert made.key_tiles_per_head == tiles(700, made.tile_n)
        key_runs = 5 * 3
    else:
        assert made.key_tiles_per_head == planner.num_varlen_slots(700, 3, made.tile_n)
        key_runs = 5
    if layout == DENSE:
        assert made.query_tiles_per_head == tiles(1000, made.tile_m)
        query_runs = 10 * 3
    else:
        assert made.query_tiles_per_head == planner.num_varlen_slots(1000, 3, made.tile_m)
        query_runs = 10
    assert made.num_key_blocks == made.key_tiles_per_head * key_runs * made.column_blocks
    assert made.num_query_blocks == made.query_tiles_per_head * query_runs * made.column_blocks
    assert made.num_dq_counters == made.num_query_blocks
    assert made.num_dq_sums == made.query_tiles_per_head * made.tile_m * query_runs * made.head_dim


def test_a_general_score_has_a_smaller_tile_where_a_plain_one_has_registers():
    assert plan().tile_m == 128
    for feature in ("has_softcap", "has_alibi", "has_dropout"):
        made = plan(**{feature: True})
        assert (made.score, made.tile_m) == (planner.Score.GENERAL, 64)
    assert plan(smem=99 * 1024).tile_m == 64


def test_too_large_a_grid_is_refused():
    tile = plan(head_dim=512)
    rows = {"q": tile.tile_m, "k": tile.tile_n}
    for name in "qk":
        # Two blocks, of half of the columns each, for each of 2^29 tiles.
        most = {"head_dim": 512, "batch": 2**19, f"rows_{name}": rows[name] * 2**10}
        most |= {"num_heads": 1, "num_heads_k": 1, f"rows_{'k' if name == 'q' else 'q'}": 1}
        assert getattr(plan(**most), {"q": "num_query_blocks", "k": "num_key_blocks"}[name]) == 2**30
        with pytest.raises(planner.UnsupportedProblem, match=f"^{name}: a launch has at most 1073741824 tiles"):
            plan(**most | {"batch": 2**19 + 1})


def test_no_bucket_names_the_head_dims():
    with pytest.raises(planner.UnsupportedProblem, match="head_dim: no SM80 backward kernel for 513/64 in 227 KB"):
        plan(head_dim=513)
    with pytest.raises(planner.UnsupportedProblem, match="512/64 in 99 KB of shared memory"):
        plan(smem=99 * 1024, head_dim=512)
