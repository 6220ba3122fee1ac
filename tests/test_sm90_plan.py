"""The planner of SM90: packed heads, split keys, and what is left to SM80's kernels."""

import pytest
from planning import plan, planner

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
