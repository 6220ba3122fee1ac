"""Splits computed ahead for get_scheduler_metadata, from a plan such as the kernels' planner makes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flash_attn
from flash_attn import _schedule

PLAN = {"tile_m": 16, "tile_n": 64, "packed_heads": 4, "target_slots": 40, "min_tiles": 4}


def step(lengths, **changes):
    made = _schedule.Step(
        seqlens_k=torch.tensor(lengths, dtype=torch.int32), cu_seqlens_q=None, leftpad=None, num_heads=32,
        num_heads_k=8, head_dim=128, head_dim_v=128, dtype=torch.bfloat16, longest_q=1, longest_k=8192,
        page_size=None, window_left=-1, window_right=0, has_softcap=False, num_splits=0, pack_gqa=None,
    )  # fmt: skip
    return made._replace(**changes)


def splits(lengths, plan=PLAN, **changes):
    return _schedule._by_lengths(step(lengths, **changes), plan).tolist()


@given(lengths=st.lists(st.integers(0, 8192), min_size=1, max_size=100), target=st.integers(1, 500))
def test_all_parts_fit_the_grid(lengths, target):
    made = splits(lengths, PLAN | {"target_slots": target})
    assert all(1 <= count <= 256 for count in made)
    assert sum(made) <= target + len(lengths)


PLAN_WITHOUT_PACKING = {"tile_m": 128, "tile_n": 64, "packed_heads": 1, "min_tiles": 1}


def test_longer_parts_where_those_of_the_mean_length_need_one_slot_too_many():
    """Seven requests in 19 parts are 133 slots; one slot more than fit would cost as much time as all others."""
    assert splits([2**15] * 7, PLAN_WITHOUT_PACKING | {"target_slots": 133}) == [19] * 7
    assert splits([2**15] * 7, PLAN_WITHOUT_PACKING | {"target_slots": 132}) == [18] * 7


@given(
    batch=st.integers(1, 100), length=st.integers(2**12, 2**17), rows=st.integers(1, 1024), target=st.integers(8, 1056)
)
def test_parts_of_equal_requests_fit_at_once_or_have_the_mean_length(batch, length, rows, target):
    row_tiles, key_tiles = -(-rows // 128), -(-length // 64)
    made = splits([length] * batch, PLAN_WITHOUT_PACKING | {"target_slots": target}, longest_q=rows, longest_k=2**17)
    of_mean_length = min(-(-key_tiles // -(-batch * row_tiles * key_tiles // target)), 256)
    assert made == made[:1] * batch
    if batch * row_tiles * made[0] > target:
        assert made[0] == of_mean_length
    else:
        assert of_mean_length / 2 <= made[0] <= of_mean_length


def test_one_long_request_beside_many_short_ones_is_split_all_the_same():
    """Though the short ones alone have more slots than fit at once."""
    made = splits([100] * 200 + [2**17])
    assert made[:200] == [1] * 200
    assert made[-1] >= 30


def test_long_requests_have_more_parts_and_empty_ones_have_one():
    made = splits([8192, 4096, 100, 0])
    assert made[0] > made[1] > made[2] == made[3] == 1


def test_no_part_has_too_few_keys():
    assert splits([64 * 4 * 3, 1], PLAN | {"target_slots": 1000}) == [3, 1]


@pytest.mark.parametrize("new", [{"max_seqlen_k_new": 1}, {"cu_seqlens_k_new": [0, 1, 1]}], ids=str)
def test_new_tokens_count(monkeypatch, new):
    monkeypatch.setattr(_schedule, "_plan", lambda step: PLAN | {"target_slots": 1000, "num_splits": 0})
    lengths = torch.tensor([256, 255], dtype=torch.int32)
    new = {name: torch.tensor(value, dtype=torch.int32) for name, value in new.items()}
    assert flash_attn.get_scheduler_metadata(2, 1, 8192, 32, 8, 128, lengths)[1:3].tolist() == [1, 1]
    assert flash_attn.get_scheduler_metadata(2, 1, 8192, 32, 8, 128, lengths, **new)[1:3].tolist() == [2, 1]


def test_a_number_that_the_plan_has_serves_all(monkeypatch):
    monkeypatch.setattr(_schedule, "_plan", lambda step: PLAN | {"num_splits": 5})
    assert _schedule.num_splits(step([8192, 1])) == 5


def test_left_padding_does_not_count():
    plan = PLAN | {"target_slots": 1000}
    assert splits([256], plan) == [1]
    assert splits([257], plan) == [2]
    assert splits([2560], plan, leftpad=torch.tensor([2304], dtype=torch.int32)) == [1]


def test_more_padding_than_keys_counts_as_none():
    changes = {"leftpad": torch.tensor([5000, 0])}
    assert splits([10, 64 * 200], PLAN | {"target_slots": 10}, **changes) == [1, 8]


def test_a_window_hides_keys():
    assert splits([8192], PLAN | {"target_slots": 1000}, window_left=255) == [1]


# 20 tiles of keys in parts of as many as `target_slots` has them: 64 keys to a tile, 16 packed rows to a tile.
IN_PARTS = PLAN | {"min_tiles": 1, "packed_heads": 4}


@pytest.mark.parametrize(
    "lengths, changes, target, parts",
    [
        ([1280], {}, 20, [20]),
        ([1281], {}, 21, [21]),
        ([1280], {}, 10, [10]),
        ([1280], {}, 9, [7]),  # parts of 3 tiles: 7 are enough
        ([1280], {"longest_q": 4}, 20, [20]),  # 16 rows
        ([1280], {"longest_q": 5}, 20, [10]),  # 20 rows: two tiles of rows for each part
        ([1280], {"longest_q": 0}, 20, [20]),  # unknown: one
        ([1280] * 2, {"cu_seqlens_q": torch.tensor([0, 0, 1])}, 20, [1, 20]),  # no query sees a key
        ([1280] * 2, {"cu_seqlens_q": torch.tensor([0, 4, 9])}, 60, [20, 20]),
        ([1280] * 2, {"cu_seqlens_q": torch.tensor([0, 4, 9])}, 59, [10, 10]),
        ([1280], {"window_left": 0}, 20, [1]),
        ([1280], {"window_left": 62}, 20, [1]),  # of the last query's 63 keys the first is in the last tile
        ([1280], {"window_left": 63}, 20, [1]),
        ([1280], {"window_left": 64}, 20, [2]),
        ([1280], {"window_left": 62, "longest_q": 3}, 20, [2]),
        ([100], {"window_left": 1000}, 20, [2]),
        ([64 * 600], {}, 600, [256]),
        ([64 * 200] + [0] * 40, {}, 25, [25] + [1] * 40),  # nothing fits, so that parts are of 200 / 25 tiles
        ([64 * 19, 64 * 6], {}, 5, [4, 1]),  # 5 tiles need 6 slots, 6 need 5
        ([64 * 53, 64 * 51], {}, 7, [3, 3]),  # 15 need 8, 18 need 6
        ([64 * 54, 64, 128], {}, 3, [1, 1, 1]),  # the fourth length fits
        ([64 * 9, 64 * 5, 64 * 53, 64 * 8], {}, 4, [1, 1, 3, 1]),  # none of four does
    ],
)
def test_parts_by_hand(lengths, changes, target, parts):
    assert splits(lengths, IN_PARTS | {"target_slots": target}, **changes) == parts


def test_the_longest_lengths_do_not_overflow():
    longest = step([2**31 - 1], longest_q=2**10)
    found = _schedule._by_lengths(longest, PLAN | {"target_slots": 2**16, "packed_heads": 4})
    assert found.dtype == torch.int32 and found.tolist() == [256]


@pytest.mark.parametrize("batch, size", [(0, 1), (1, 17), (4, 17), (5, 33)])
def test_metadata_has_room_for_four_numbers_of_each_entry(batch, size):
    made = flash_attn.get_scheduler_metadata(batch, 1, 8192, 32, 8, 128, torch.zeros(batch, dtype=torch.int32))
    assert made.tolist() == [0] + [1] * batch + [0] * (size - 1 - batch)


@pytest.mark.parametrize(
    "changes, q, k, longest_q, table",
    [
        ({"longest_q": 3}, (2, 3), (2, 8192), 3, None),
        ({"longest_q": 0, "longest_k": 0}, (2, 1), (2, 2**20), 0, None),
        ({"cu_seqlens_q": torch.tensor([0, 1, 4], dtype=torch.int32), "longest_q": 3}, (6,), (2, 8192), 3, None),
        ({"cu_seqlens_q": torch.tensor([0, 1, 4], dtype=torch.int32), "longest_q": 0}, (2,), (2, 8192), 0, None),
        ({"page_size": 16}, (2, 1), (1, 16), 1, (2, 512)),
        ({"page_size": 16, "longest_k": 17}, (2, 1), (1, 16), 1, (2, 2)),
    ],
)
def test_the_call_that_is_planned(changes, q, k, longest_q, table):
    """No tensor is larger than a row or a page; SM90's kernels take no pages whose rows have a stride of 0."""
    call = _schedule._call(step([70, 9], **changes, head_dim_v=64, has_softcap=True, num_splits=3))
    assert call.q.shape == (*q, 32, 128) and call.k.shape == (*k, 8, 128) and call.v.shape == (*k, 8, 64)
    assert (call.k.stride(1) != 0) == (table is not None) and call.k.untyped_storage().nbytes() <= 16 * 128 * 2
    assert call.max_seqlen_q == longest_q and call.softcap > 0 and call.num_splits == 3 and "causal" in call.features
    assert table is None if call.block_table is None else call.block_table.shape == table


def test_the_cpu_path_does_not_split():
    assert _schedule.num_splits(step([8192])) == 1
    assert _schedule.num_splits(step([8192], num_splits=7)) == 7
