"""The planner (csrc/plan), called through the development module that build_support/plan_module.py builds."""

import pytest
import repository  # noqa: F401  (makes build_support importable)
from hypothesis import example, given
from hypothesis import strategies as st

from build_support.options import load_variants
from build_support.plan_module import load_plan_module

try:
    planner = load_plan_module()
except ImportError as reason:
    pytest.skip(str(reason), allow_module_level=True)


def problem(**changes):
    values = {
        "layout": planner.Layout.DENSE,
        "layout_k": planner.Layout.DENSE,
        "dtype": planner.Dtype.BF16,
        "batch": 2,
        "num_heads": 8,
        "num_heads_k": 2,
        "head_dim": 64,
        "head_dim_v": 64,
        "rows_q": 1000,
        "rows_k": 1000,
        "has_pages": False,
        "pages_suit_tma": False,
        "window_left": -1,
        "window_right": -1,
        "has_softcap": False,
        "has_alibi": False,
        "has_dropout": False,
        "num_splits": 0,
        "pack_gqa": planner.PackGqa.AUTO,
        "allows_few_rows": True,
    }
    made = planner.Problem()
    for name, value in {**values, **changes}.items():
        setattr(made, name, value)
    return made


LARGEST_SMEM = 227 * 1024


NUM_SMS = 132


def plan(smem=LARGEST_SMEM, arch=planner.Arch.SM80, **changes):
    return planner.make_plan(problem(**changes), arch, smem, NUM_SMS)


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


# ---- Few rows: packed heads, splits -----------------------------------------------------------------------------

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
@example(lengths=[(1, 700)] * 8, left=511, heads=1)  # 512 keys, in five tiles
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


# ---- SM90: packed heads, and what is left to SM80's kernels ---------------------------------------------------------

PREFILL = {"batch": 4, "num_heads": 32, "num_heads_k": 8, "rows_q": 4096, "rows_k": 4096, "head_dim": 128}
PREFILL["head_dim_v"] = 128
LATENT = {"head_dim": 576, "head_dim_v": 512}


def sm90_plan(**changes):
    return plan(arch=planner.Arch.SM90, **(PREFILL | changes))


@pytest.mark.parametrize(
    ("changes", "arch", "packed_heads"),
    [
        ({}, "SM90", 1),
        ({"rows_q": 129}, "SM90", 4),
        ({"rows_q": 128}, "SM90", 1),
        ({"rows_q": 129, "pack_gqa": planner.PackGqa.NEVER}, "SM90", 1),
        ({"pack_gqa": planner.PackGqa.ALWAYS}, "SM90", 4),
        ({"rows_q": 129, "num_heads": 24}, "SM90", 1),
        ({"pack_gqa": planner.PackGqa.ALWAYS, "num_heads": 24}, "SM80", 3),
        ({"rows_q": 1}, "SM80", 4),
        ({"rows_q": 64}, "SM90", 4),
        ({"rows_q": 64, "rows_k": 2048}, "SM80", 4),  # 64 tiles that aren't split
        ({"rows_q": 64, "batch": 64}, "SM90", 4),
        ({"rows_q": 64, "batch": 64, "pack_gqa": planner.PackGqa.NEVER}, "SM90", 1),
        ({"rows_q": 64, "batch": 64, "num_heads": 8, "pack_gqa": planner.PackGqa.ALWAYS}, "SM90", 1),  # one head each
        ({"rows_q": 2**29, "batch": 1, "pack_gqa": planner.PackGqa.ALWAYS}, "SM80", 1),  # 2^31 rows are too many
        ({"rows_q": 63, "batch": 64, "pack_gqa": planner.PackGqa.NEVER}, "SM80", 1),
        ({"rows_q": 16, "batch": 64, "num_heads": 8}, "SM80", 1),
        ({"rows_q": 1, "allows_few_rows": False}, "SM90", 4),
        ({"rows_q": 1, "batch": 66, "num_heads": 128, "num_heads_k": 1} | LATENT, "SM90", 64),
        ({"rows_q": 1, "batch": 65, "num_heads": 128, "num_heads_k": 1} | LATENT, "SM90", 64),
        ({"rows_q": 1, "batch": 20, "num_heads": 128, "num_heads_k": 1} | LATENT, "SM80", 128),  # 80 parts for 132 SMs
        ({"rows_q": 1, "batch": 16, "num_heads": 128, "num_heads_k": 1, "rows_k": 8192} | LATENT, "SM90", 64),
        ({"rows_q": 65, "num_heads": 128, "num_heads_k": 1}, "SM90", 64),
        ({"has_dropout": True}, "SM80", 1),
        ({"has_pages": True}, "SM80", 1),
        ({"has_pages": True, "pages_suit_tma": True}, "SM90", 1),
    ],
)
def test_sm90_leaves_few_rows_and_what_it_lacks_to_sm80(changes, arch, packed_heads):
    made = sm90_plan(**changes)
    assert (made.arch, made.packed_heads) == (getattr(planner.Arch, arch), packed_heads)
    if arch == "SM90":
        rows = (PREFILL | changes)["rows_q"] * packed_heads
        assert made.tiles_per_head == -(-rows // made.tile_m)
        heads = (PREFILL | changes)["num_heads"] // packed_heads
        num_parts = made.tiles_per_head * heads * (PREFILL | changes)["batch"] * made.num_splits
        assert made.num_blocks == num_parts


@pytest.mark.parametrize("arch", [planner.Arch.SM80, planner.Arch.SM90])
@pytest.mark.parametrize("heads", [(8, 8), (32, 8), (128, 1)])
@pytest.mark.parametrize("rows_q", [1, 5, 16, 40, 64, 65, 129])
def test_with_one_split_the_batch_chooses_no_kernel(arch, heads, rows_q):
    """Dense queries; of packed ones the lengths could, and test_batch_invariance.py looks at those."""
    made = [
        plan(**PREFILL | dict(arch=arch, batch=batch, num_heads=heads[0], num_heads_k=heads[1], rows_q=rows_q,
                              num_splits=1))
        for batch in (1, 2, 5, 20, 66, 300)
    ]  # fmt: skip
    assert len({(p.arch, p.rows, p.packed_heads, p.tile_m, p.num_splits) for p in made}) == 1


CHUNK_OF_ONE = {"batch": 1, "num_heads": 8, "num_heads_k": 1, "rows_q": 640, "rows_k": 32768, "window_right": 0}


@pytest.mark.parametrize(
    ("changes", "num_splits"),
    [
        ({}, 3),  # of 40 tiles, so that the parts fit at once
        ({"rows_q": 1024}, 2),
        ({"rows_q": 1100}, 1),
        ({"rows_k": 4096}, 2),
        ({"rows_k": 2048}, 1),
        ({"rows_k": 0}, 1),
        ({"window_left": 1000}, 1),
        ({"has_pages": True, "pages_suit_tma": True}, 3),
        ({"num_splits": 1}, 1),
        ({"num_splits": 7}, 7),
        ({"num_splits": 7, "rows_q": 129}, 7),  # packed
        ({"allows_few_rows": False}, 1),
        ({"allows_few_rows": False, "num_splits": 7}, 7),
    ],
)
def test_sm90_splits_keys_where_tiles_are_few(changes, num_splits):
    made = sm90_plan(**(CHUNK_OF_ONE | changes))
    assert (made.arch, made.num_splits) == (planner.Arch.SM90, num_splits)
    assert made.num_blocks == made.tiles_per_head * 8 // made.packed_heads * num_splits
    assert num_splits == 1 or made.num_slots == made.tiles_per_head * num_splits


def test_pages_keep_their_mask_on_sm90():
    pages = {"has_pages": True, "pages_suit_tma": True, "window_right": 0}
    assert sm90_plan(**pages).mask == planner.Mask.CAUSAL
    assert sm90_plan(**pages, window_left=100).mask == planner.Mask.GENERAL


def test_one_split_takes_the_same_sm90_kernel_whatever_the_batch():
    kinds = {
        (made.arch, made.rows, made.packed_heads)
        for batch, rows_q in ((1, 1), (2, 10), (128, 128), (3, 6000), (1, 70))
        for made in [sm90_plan(layout=planner.Layout.VARLEN, layout_k=planner.Layout.VARLEN, num_splits=1,
                               batch=batch, rows_q=rows_q)]
    }  # fmt: skip
    assert kinds == {(planner.Arch.SM90, planner.Rows.MANY, 1)}
