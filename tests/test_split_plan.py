"""The planner of few rows: packed heads, and keys that are split."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from planning import LARGEST_SMEM, NUM_SMS, plan, planner

DECODE = {"batch": 4, "num_heads": 32, "num_heads_k": 8, "rows_q": 1, "rows_k": 8192, "window_right": 0}
CACHE = {"layout": planner.Layout.VARLEN, "layout_k": planner.Layout.DENSE, "has_pages": True}


@pytest.mark.parametrize(
    ("changes", "rows", "packed_heads"),
    [
        ({}, "UP_TO_16", 4),
        ({"pack_gqa": planner.PackGqa.NEVER}, "UP_TO_16", 1),
        ({"num_splits": 1}, "UP_TO_16", 4),
        ({"rows_q": 4}, "UP_TO_16", 4),
        ({"rows_q": 5}, "UP_TO_64", 4),
        ({"num_heads_k": 1}, "UP_TO_64", 32),
        ({"rows_q": 64}, "UP_TO_64", 4),
        ({"rows_q": 65}, "MANY", 1),
        ({"rows_q": 65, "num_splits": 2}, "MANY", 1),
        ({"rows_q": 65, "pack_gqa": planner.PackGqa.ALWAYS}, "UP_TO_64", 4),
        ({"rows_q": 65, "num_heads": 8, "pack_gqa": planner.PackGqa.ALWAYS}, "MANY", 1),
        ({"rows_q": 2**29, "batch": 1, "pack_gqa": planner.PackGqa.ALWAYS}, "UP_TO_64", 1),  # 2^31 rows are too many
        ({"layout": planner.Layout.VARLEN, "layout_k": planner.Layout.VARLEN, "num_splits": 1}, "MANY", 1),
        (
            {
                "layout": planner.Layout.VARLEN,
                "layout_k": planner.Layout.VARLEN,
                "num_splits": 1,
                "pack_gqa": planner.PackGqa.ALWAYS,
            },
            "UP_TO_64",
            4,
        ),
        ({"has_dropout": True}, "MANY", 1),
        ({"allows_few_rows": False}, "MANY", 1),
    ],
)
def test_few_rows_take_small_tiles(changes, rows, packed_heads):
    made = plan(**(DECODE | changes))
    assert (made.rows, made.packed_heads) == (getattr(planner.Rows, rows), packed_heads)
    assert made.mask == planner.Mask.GENERAL or rows == "MANY"


@pytest.mark.parametrize("arch", [planner.Arch.SM80, planner.Arch.SM90])
@pytest.mark.parametrize(
    "changes", [{}, {"pages_suit_tma": True}, {"layout_k": planner.Layout.VARLEN, "has_pages": False}]
)
@pytest.mark.parametrize("group", [1, 8])
def test_one_split_takes_the_same_kernel_whatever_the_batch(changes, group, arch):
    """Or a row's bits would depend on what else is in the batch."""
    heads = {"num_heads": 8 * group, "num_heads_k": 8, "num_splits": 1}
    kinds = {
        (made.arch, made.rows, made.packed_heads, made.tile_n, made.num_splits)
        for batch, rows_q in ((1, 1), (2, 10), (2, 11), (128, 128), (3, 6000))
        for made in [plan(arch=arch, **(DECODE | CACHE | changes | heads | {"batch": batch, "rows_q": rows_q}))]
    }
    assert len(kinds) == 1


def test_exact_splits_are_slots_of_the_grid():
    made = plan(**DECODE, num_splits=5)
    assert made.num_splits == 5
    assert made.num_slots == 4 * 5 and made.num_blocks == made.num_slots * 8


def test_chosen_splits_depend_on_shapes_alone_and_fit_the_grid():
    """The device cuts no finer than target_slots in all, but for each tile's last part, nor keys into parts of less
    than 256."""
    made = plan(**(DECODE | {"rows_k": 2**17}))
    assert made.num_splits == 0
    assert made.num_slots == 4 + made.target_slots
    assert made.num_blocks == made.num_slots * 8
    short = plan(**(DECODE | {"rows_k": 600}))
    assert (short.num_splits, short.num_slots) == (0, 4 * 3)


def test_there_is_a_slot_to_aim_at_however_many_heads():
    made = plan(**(DECODE | {"batch": 1, "num_heads": 2000, "num_heads_k": 2000, "rows_k": 2**17}))
    assert (made.num_splits, made.target_slots) == (0, 1)


def test_a_window_past_all_keys_splits_as_none_does():
    widest = {"window_left": 2**63 - 1, "window_right": 2**63 - 1}
    assert plan(**(DECODE | widest)).num_slots == plan(**DECODE).num_slots > 4


@pytest.mark.parametrize(("batch", "num_splits"), [(16, 0), (17, 1)])
def test_heads_that_share_a_tile_count_in_a_wave(batch, num_splits):
    """64 queries of 4 heads are 4 tiles; 17 entries of those and 8 heads more than a wave, of four blocks on an SM."""
    assert plan(**(DECODE | {"rows_q": 64, "batch": batch})).num_splits == num_splits


def _num_slots_used(made, lengths, left):
    """How many slots the device takes (csrc/kernels/sm80/few_rows_schedule.h), causal, with a window."""
    work = []
    for queries, keys in lengths:
        row_tiles = -(-queries * made.packed_heads // made.tile_m)
        first = max(keys - queries - left, 0) // made.tile_n
        work.append((row_tiles, max(-(-keys // made.tile_n) - first, 0) if queries and keys else 0))
    total = sum(row_tiles * key_tiles for row_tiles, key_tiles in work)
    target = made.target_slots
    lengths = [max(-(-total // target), made.min_tiles)]
    slots = []
    for _ in range(4):
        slots.append(sum(rows * min(max(-(-key_tiles // lengths[-1]), 1), 256) for rows, key_tiles in work))
        if slots[-1] <= target:
            return slots[-1]
        lengths.append(-(-lengths[-1] * slots[-1] // target))
    return slots[0]


_LENGTHS = st.tuples(st.one_of(st.integers(0, 4), st.integers(0, 3000)), st.one_of(st.just(1), st.integers(0, 9000)))


@given(lengths=st.lists(_LENGTHS, min_size=1, max_size=40), left=st.integers(0, 2000), heads=st.sampled_from([1, 2, 8]))
@example(lengths=[(1000, 4000)] + [(1, 4000)] * 19, left=300, heads=1)  # one entry sees far more keys than the mean
@example(lengths=[(1, 632)] * 8, left=504, heads=1)  # 505 keys, in five tiles
def test_the_grid_holds_every_split(lengths, left, heads):
    made = plan(
        **CACHE, batch=len(lengths), rows_q=sum(queries for queries, _ in lengths), rows_k=9000, num_heads=heads,
        num_heads_k=1, window_left=left, window_right=0,
    )  # fmt: skip
    if made.num_splits == 0:
        assert _num_slots_used(made, lengths, left) <= made.num_slots


def waves(made, blocks_per_sm):
    """Launches of as many thread blocks as the GPU holds at once."""
    return made.num_blocks / (NUM_SMS * blocks_per_sm)


@pytest.mark.parametrize("num_heads_k", [1, 2, 8, 24, 64])
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
def test_decoding_of_long_requests_fills_two_waves(head_dim, num_heads_k):
    """And not a block more, for which all SMs would wait; but for each entry's last part, which is no longer."""
    heads = {"num_heads": 4 * num_heads_k, "num_heads_k": num_heads_k, "head_dim": head_dim, "head_dim_v": head_dim}
    made = plan(**(DECODE | heads | {"batch": 1, "rows_k": 2**18}))
    blocks_per_sm = min(4, (LARGEST_SMEM + 1024) // (made.smem_bytes + 1024))
    assert 1.7 <= made.target_slots * num_heads_k / (NUM_SMS * blocks_per_sm) <= 2
    assert waves(made, blocks_per_sm) <= 2 + 64 / (NUM_SMS * blocks_per_sm)


def test_mixed_lengths_are_split_in_large_batches():
    """One request may be as long as all others together, and the host does not know."""
    made = plan(**(DECODE | {"batch": 256, "rows_k": 2**17}))
    assert made.num_splits == 0


def test_bytes_on_their_way_in_decoding():
    """An SM's share of 4.2 TB/s for a microsecond is 32 KB. Blocks have a tile of K and of V under way."""
    for head_dim in (64, 128, 256, 512):
        made = plan(**(DECODE | {"head_dim": head_dim, "head_dim_v": head_dim}))
        blocks_per_sm = min(4, (LARGEST_SMEM + 1024) // (made.smem_bytes + 1024))
        assert made.tile_n * 2 * head_dim * 2 * blocks_per_sm >= 3 * 32 * 1024


CHUNK = {"batch": 1, "num_heads": 32, "num_heads_k": 8, "head_dim": 128, "head_dim_v": 128, "rows_q": 512,
           "rows_k": 65536, "window_right": 0, "has_pages": True}  # fmt: skip


@pytest.mark.parametrize(("num_heads", "num_splits"), [(32, 2), (16, 4), (4, 16), (1, 64)])
def test_few_tiles_of_many_rows_are_split_over_one_wave(num_heads, num_splits):
    """Four tiles of rows; two blocks on an SM; no part of less than 1024 keys."""
    few = {"num_heads": num_heads, "num_heads_k": 1}
    made = plan(**(CHUNK | few))
    assert (made.rows, made.mask, made.packed_heads) == (planner.Rows.MANY, planner.Mask.GENERAL, 1)
    assert made.num_splits == num_splits
    assert made.num_blocks == 4 * num_heads * num_splits <= 2 * NUM_SMS
    one_request = plan(**(CHUNK | few | {"layout": planner.Layout.VARLEN, "layout_k": planner.Layout.DENSE}))
    assert one_request.num_splits == num_splits
    assert one_request.num_blocks == one_request.tiles_per_head * num_heads * num_splits


@pytest.mark.parametrize(
    "changes",
    [
        {"rows_q": 4096},
        {"rows_k": 900},
        {"num_splits": 1},
        {"has_dropout": True},
        {"allows_few_rows": False},
        {"window_left": 300},
    ],
    ids=str,
)
def test_many_rows_are_not_split_where_nothing_is_won(changes):
    made = plan(**(CHUNK | changes))
    assert made.rows == planner.Rows.MANY and made.num_splits == 1
    assert made.num_blocks == made.tiles_per_head * 32


def test_what_is_not_split_keeps_its_mask():
    assert plan(**(CHUNK | {"has_pages": False, "rows_q": 4096})).mask == planner.Mask.CAUSAL
    assert plan(**(CHUNK | {"has_pages": False})).mask == planner.Mask.GENERAL


def test_exact_splits_of_many_rows():
    made = plan(**(CHUNK | {"num_splits": 3}))
    assert (made.num_splits, made.num_slots, made.num_blocks) == (3, 4 * 3, 4 * 3 * 32)
    assert plan(**(CHUNK | {"batch": 0})).num_blocks == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"batch": 4096},
        {"rows_k": 100},
        {"window_left": 100},
        {"num_splits": 1},
    ],
    ids=str,
)
def test_nothing_is_split_where_nothing_is_won(changes):
    made = plan(**(DECODE | changes))
    assert made.num_splits == 1 and made.num_slots == (DECODE | changes)["batch"]
