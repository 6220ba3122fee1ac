"""The planner: buckets, tiles, masks and grids."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from planning import plan, planner

from build_support.options import load_variants


@pytest.mark.parametrize(
    ("arch", "head_dim", "head_dim_v", "bucket"),
    [
        ("SM80", 1, 1, (32, 32)),
        ("SM80", 32, 33, (64, 64)),
        ("SM80", 64, 64, (64, 64)),
        ("SM80", 65, 64, (96, 96)),
        ("SM80", 64, 97, (128, 128)),
        ("SM80", 128, 8, (128, 128)),
        ("SM80", 129, 128, (192, 128)),
        ("SM80", 192, 129, (192, 192)),
        ("SM80", 64, 256, (256, 256)),
        ("SM80", 257, 1, (512, 512)),
        ("SM80", 513, 1, (576, 512)),
        ("SM90", 1, 32, (32, 32)),
        ("SM90", 40, 32, (64, 64)),
        ("SM90", 80, 65, (80, 96)),
        ("SM90", 64, 96, (80, 96)),
        ("SM90", 81, 80, (96, 96)),
        ("SM90", 129, 8, (160, 160)),
        ("SM90", 160, 160, (160, 160)),
        ("SM90", 161, 128, (192, 128)),
        ("SM90", 64, 256, (256, 256)),
        ("SM90", 33, 257, (64, 512)),
        ("SM90", 65, 257, (512, 512)),
        ("SM90", 576, 512, (576, 512)),
    ],
)
def test_smallest_bucket_that_holds_both_head_dims(arch, head_dim, head_dim_v, bucket):
    made = plan(arch=getattr(planner.Arch, arch), head_dim=head_dim, head_dim_v=head_dim_v)
    assert (made.head_dim, made.head_dim_v) == bucket


def test_no_bucket_names_the_head_dims():
    with pytest.raises(planner.UnsupportedProblem, match="head_dim.*577/128"):
        plan(head_dim=577, head_dim_v=128)


def test_the_largest_tile_that_the_gpu_holds():
    assert plan(head_dim=512).tile_n > plan(head_dim=512, smem=163 * 1024).tile_n
    assert plan(head_dim=512, smem=163 * 1024).smem_bytes <= 163 * 1024
    with pytest.raises(planner.UnsupportedProblem, match="512/64 in 99 KB of shared memory"):
        plan(head_dim=512, smem=99 * 1024)


@pytest.mark.parametrize(
    ("arch", "row_class"),
    [
        (planner.Arch.SM80, planner.Rows.MANY),
        (planner.Arch.SM80, planner.Rows.UP_TO_64),
        (planner.Arch.SM80, planner.Rows.UP_TO_16),
        (planner.Arch.SM90, planner.Rows.MANY),
    ],
)
def test_each_tile_row_has_a_reason(arch, row_class):
    rows = planner.tile_rows(arch, row_class)
    assert rows and all(reason for *_, reason in rows)
    order = [(qk + v, qk, v, -smem) for qk, v, smem, *_ in rows]
    assert sorted(order) == order, "the planner takes the first row that holds a call"


def test_the_build_reads_the_same_rows():
    """variants.py reads the buckets out of tiles.h as text."""
    classes = {"": planner.Rows.MANY, "64": planner.Rows.UP_TO_64, "16": planner.Rows.UP_TO_16}
    for family in load_variants().FORWARD_FAMILIES:
        rows = planner.tile_rows(getattr(planner.Arch, f"SM{family.arch}"), classes[family.rows])
        expected = [(qk, v, f"{smem // 1024}KB") for qk, v, smem, *_ in rows]
        assert list(family.tile_rows) == list(dict.fromkeys(expected))


@pytest.mark.parametrize(
    ("left", "right", "mask"),
    [(-1, -1, "FULL"), (-1, 0, "CAUSAL"), (1000, 0, "CAUSAL"), (5000, -1, "FULL")],
)
def test_window_that_hides_nothing_on_the_left_needs_no_window_kernel(left, right, mask):
    assert plan(window_left=left, window_right=right).mask == getattr(planner.Mask, mask)


@pytest.mark.parametrize(("left", "right"), [(10, 0), (10, 10), (-1, 5), (999, 0)])
def test_a_window_takes_the_general_mask(left, right):
    made = plan(window_left=left, window_right=right)
    assert (made.mask, made.score) == (planner.Mask.GENERAL, planner.Score.PLAIN)


def test_pages_take_the_general_mask():
    made = plan(has_pages=True)
    assert (made.mask, made.score) == (planner.Mask.GENERAL, planner.Score.PLAIN)


@pytest.mark.parametrize("feature", ["has_softcap", "has_alibi", "has_dropout"])
def test_the_general_score_comes_with_the_general_mask(feature):
    made = plan(window_right=0, **{feature: True})
    assert (made.mask, made.score) == (planner.Mask.GENERAL, planner.Score.GENERAL)


def test_grid_covers_every_row_head_and_entry_once():
    made = plan(batch=3, num_heads=4, num_heads_k=4, rows_q=1000)
    assert made.tiles_per_head == -(-1000 // made.tile_m)
    assert made.num_blocks == made.tiles_per_head * 4 * 3


def test_too_large_a_grid_is_refused():
    most = {"batch": 2**20, "num_heads": 2**10, "num_heads_k": 2**10, "rows_q": 1, "allows_few_rows": False}
    assert plan(**most).num_blocks == 2**30
    with pytest.raises(planner.UnsupportedProblem, match="^q: a launch has at most 1073741824 tiles"):
        plan(**most | {"batch": 2**20 + 1})


@pytest.mark.parametrize("arch", [planner.Arch.SM80, planner.Arch.SM90])
@pytest.mark.parametrize("rows_q", [1, 40, 4096])
@pytest.mark.parametrize("layout", [planner.Layout.DENSE, planner.Layout.VARLEN])
def test_an_empty_batch_has_a_plan(arch, rows_q, layout):
    """Of a packed one the slots are left, since its rows may be there and belong to no entry."""
    made = plan(arch=arch, layout=layout, batch=0, rows_q=rows_q, rows_k=10**6, window_right=0)
    assert made.num_splits == 1
    assert layout == planner.Layout.VARLEN or made.num_blocks == 0


@given(
    lengths=st.lists(st.integers(0, 700), min_size=1, max_size=20),
    unowned=st.integers(0, 700),
    tile_m=st.sampled_from([64, 128]),
)
@example(lengths=[1], unowned=1, tile_m=64)
def test_varlen_slots_hold_every_entry(lengths, unowned, tile_m):
    """The slots of an entry start where the last one's end and are enough for its rows, whatever the lengths. Those of
    the rows past the last entry follow."""
    begin = 0
    for entry, length in enumerate(lengths):
        first = planner.first_varlen_slot(begin, entry, tile_m)
        begin += length
        end = planner.first_varlen_slot(begin, entry + 1, tile_m)
        assert end - first >= -(-length // tile_m)
    assert planner.num_varlen_slots(begin + unowned, len(lengths), tile_m) >= end + -(-unowned // tile_m)
