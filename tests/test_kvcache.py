"""flash_attn_with_kvcache: lengths, pages, rows, left padding, append and rotary, on every path."""

import math
from dataclasses import replace

import cases
import pytest
import torch
from cases import Case
from checks import (
    Gradients,
    assert_gradients_right,
    check_forward,
    check_garbage,
    check_nan_is_kept,
    gradients_on,
    oracle_gradients,
    output_gradients,
)
from harness import build, device_of, on_path
from tolerance import assert_same_bits

import flash_attn

SMALL = Case("small-cache", "one to vary", "kvcache", (1, 1), (40, 40), seqused_k=(20, 20), heads=(4, 2), causal=True)
STRIDED = [case for case in cases.KVCACHE if case.id in ("cache-window", "cache-varlen-q")]
APPEND = replace(SMALL, id="small-append", new=(1, 1))


@pytest.mark.parametrize("case", cases.KVCACHE, ids=lambda case: case.id)
def test_forward(path, case):
    check_forward(path, case)


@pytest.mark.parametrize("garbage", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("case", [c for c in cases.KVCACHE if c.seqused_k], ids=lambda case: case.id)
def test_unused_cache_never_matters(path, case, garbage):
    check_garbage(path, case, garbage)


@pytest.mark.parametrize("num_splits", [0, 1, 3])
@pytest.mark.parametrize("num_queries", [1, 70])
def test_nan_is_kept(path, num_queries, num_splits):
    check_nan_is_kept(path, num_queries, num_splits)


PLAIN_CACHE = [c for c in cases.KVCACHE if not (c.page or c.leftpad or c.cache_rows or c.new)]


@pytest.mark.parametrize("case", PLAIN_CACHE, ids=lambda case: case.id)
def test_gradients_through_a_dense_cache(path, case):
    """A cache that is only read is like any k and v with seqused_k."""
    inputs = build(case, device_of(path))
    dout, _ = output_gradients(inputs)
    ours = gradients_on(path, case.features, inputs, dout, None)
    if ours is not None:
        assert_gradients_right(Gradients(ours, *oracle_gradients(inputs, dout, None)))


@pytest.mark.parametrize("case", [SMALL, APPEND], ids=lambda case: case.id)
def test_cache_seqlens_as_int(path, case):
    plain, by_int = build(case, device_of(path)), build(case, device_of(path))
    expected = on_path(path, case.features, plain, plain.call)
    ours = on_path(path, case.features, by_int, lambda: by_int.call(cache_seqlens=20))
    if expected is not None:
        assert_same_bits("out", ours[0], expected[0])
        assert_same_bits("k_cache", by_int.k, plain.k)


def test_returns_out_alone_by_default(path):
    inputs = build(SMALL, device_of(path))
    pair = on_path(path, SMALL.features, inputs, inputs.call)
    alone = on_path(path, SMALL.features, inputs, lambda: inputs.call(return_softmax_lse=False))
    if pair is not None:
        assert isinstance(alone, torch.Tensor)
        assert_same_bits("out", alone, pair[0])


@pytest.mark.parametrize("num_splits", [0, 1, 2, 3, 16, 128])
def test_any_number_of_splits(path, num_splits):
    case = replace(SMALL, id="splits", lens_k=(257, 257), seqused_k=(200, 257), heads=(8, 2), causal=False)
    check_forward(path, case, {"num_splits"} if num_splits > 1 else frozenset(), num_splits=num_splits)


def test_scheduler_metadata_is_only_a_hint(path):
    """Right metadata, none, and stale metadata give the same result."""
    device = device_of(path)
    inputs = build(SMALL, device)
    expected = on_path(path, SMALL.features, inputs, inputs.call)
    lengths = inputs.layout["seqused_k"]
    right = flash_attn.get_scheduler_metadata(2, 1, 40, 4, 2, 64, lengths, causal=True)
    assert right.dtype is torch.int32 and right.shape == (1 + 4 * 4,)
    for metadata in (right, torch.zeros_like(right)):
        ours = on_path(path, SMALL.features, inputs, lambda m=metadata: inputs.call(scheduler_metadata=m))
        if expected is not None:
            assert_same_bits("out", ours[0], expected[0])


@pytest.mark.parametrize("case", STRIDED, ids=lambda case: case.id)
def test_strided_caches(path, case):
    """vLLM keeps K and V in one buffer, heads before tokens."""
    inputs = build(case, device_of(path))
    expected = on_path(path, case.features, inputs, inputs.call)
    both = torch.cat((inputs.k, inputs.v), dim=-1).transpose(1, 2).contiguous().transpose(1, 2)
    dim = case.dims[0]
    strided = replace(inputs, k=both[..., :dim], v=both[..., dim:])
    ours = on_path(path, case.features, strided, strided.call)
    if expected is not None:
        assert_same_bits("out", ours[0], expected[0])


@pytest.mark.parametrize("case", [case for case in cases.KVCACHE if case.new], ids=lambda case: case.id)
def test_append_leaves_the_lengths_alone(path, case):
    """The attention sees the new tokens; the caller's lengths are the caller's to advance."""
    inputs = build(case, device_of(path))
    lengths = inputs.layout["seqused_k"].clone()
    if on_path(path, case.features, inputs, inputs.call) is not None:
        assert_same_bits("cache_seqlens", inputs.layout["seqused_k"], lengths)


@pytest.mark.parametrize("rotary", [None, (32, True)], ids=["plain", "rotary"])
@pytest.mark.parametrize("page", [None, 16])
def test_an_idle_entry_of_a_padded_batch(path, page, rotary):
    """transformers pads a batch of requests with entries of -1 tokens before their only new one, and no pages."""
    case = Case("idle", "two of four", "kvcache", (1,) * 4, (64,) * 4, seqused_k=(3, 20, 31, 1), new=(1,) * 4,
                page=page, heads=(4, 2), rotary=rotary, causal=True)  # fmt: skip
    inputs, plain = build(case, device_of(path)), build(case, device_of(path))
    expected = on_path(path, case.features, plain, plain.call)
    idle = [1, 3]
    inputs.layout["seqused_k"][idle] = -1
    if page is not None:
        inputs.layout["block_table"][idle] = -1
    before = [x.clone() for x in (inputs.k, inputs.v)]
    ours = on_path(path, case.features, inputs, inputs.call)
    if ours is None:
        return
    for name, result, whole in zip(("out", "lse"), ours, expected, strict=True):
        assert_same_bits(name, result[[0, 2]], whole[[0, 2]])
    assert not ours[0][idle].any() and (ours[1][idle] == -math.inf).all()
    for cache, old in zip((inputs.k, inputs.v), before, strict=True):
        changed = (cache.nan_to_num(9.0) != old.nan_to_num(9.0)).flatten(2).any(2)
        assert changed.sum() == 2, "one token of each entry that isn't idle"


def test_append_writes_through_strided_caches(path):
    plain = build(APPEND, device_of(path))
    expected = on_path(path, APPEND.features, plain, plain.call)
    inputs = build(APPEND, device_of(path))
    both = torch.stack((inputs.k, inputs.v), dim=3)
    strided = replace(inputs, k=both[:, :, :, 0], v=both[:, :, :, 1])
    ours = on_path(path, APPEND.features, strided, strided.call)
    if expected is not None:
        assert_same_bits("out", ours[0], expected[0])
        assert_same_bits("k_cache", both[:, :, :, 0], plain.k)
        assert_same_bits("v_cache", both[:, :, :, 1], plain.v)


def test_decoding_step_by_step_equals_one_causal_call(path):
    """Appending one token at a time gives the rows of the causal attention of the whole."""
    case = Case("whole", "a causal call", "dense", (20,), (20,), heads=(4, 2), causal=True)
    whole = build(case, device_of(path))
    features = {"dense", "gqa", "causal", "append", "seqused_k"}
    caches = [torch.full_like(x, math.nan) for x in (whole.k, whole.v)]
    rows = []
    for t in range(20):
        token = [x[:, t : t + 1] for x in (whole.q, whole.k, whole.v)]
        rows.append(
            on_path(
                path, features, whole,
                lambda token=token, t=t: flash_attn.flash_attn_with_kvcache(
                    token[0], *caches, *token[1:], cache_seqlens=t, causal=True
                ),
            )
        )  # fmt: skip
    if rows[0] is None:
        return
    assert_same_bits("k_cache", caches[0], whole.k)
    assert_same_bits("v_cache", caches[1], whole.v)
    exact = whole.expected().out
    ours = torch.cat(rows, dim=1).cpu().double()
    assert (ours - exact).abs().max() <= 2 * torch.finfo(whole.case.dtype).eps * exact.abs().max()
