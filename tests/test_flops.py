"""torch's FLOP counter counts the ops as it counts torch's own attention, by the lengths of each batch entry."""

import pytest
import torch
from cases import Case
from harness import build, device_of, on_path
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from valid_calls import meta

from flash_attn import _extension

# No length, number of heads or head dim is one that another could stand for.
CASES = [
    Case("dense", "one length for all", "dense", (5,) * 2, (7,) * 2, heads=(4, 2), dims=(32, 8)),
    Case("causal", "hidden pairs count", "dense", (9,) * 2, (7,) * 2, causal=True),
    Case("packed", "a length each, and none", "varlen", (3, 0, 11), (5, 2, 17), heads=(6, 2)),
    Case("packed-used", "slots in part", "varlen", (6, 9), (13, 8), seqused_q=(2, 9), seqused_k=(11, 0)),
    Case("pages", "lengths of pages", "varlen", (3, 2), (20, 31), seqused_k=(19, 31), page=16),
    Case("pages-by-offsets", "the same by cu_seqlens_k", "varlen", (3, 2), (20, 31), lengths_by_cu_seqlens_k=True,
         page=16),
    Case("cache", "as many as are stored", "kvcache", (1, 1), (30, 30), heads=(4, 1), seqused_k=(9, 27)),
    Case("cache-all", "a cache that is full", "kvcache", (2,) * 2, (30,) * 2),
    Case("cache-append", "and appended", "kvcache", (3, 3), (30, 30), seqused_k=(9, 20), new=(3, 3)),
    Case("cache-leftpad", "less the padding, which may be all", "kvcache", (2, 2), (30, 30), seqused_k=(9, 20),
         leftpad=(4, 21)),
]  # fmt: skip


def expected(case, formula):
    """The sum of what torch counts for each entry by itself."""
    (heads, _), (dim, dim_v), total = case.heads, case.dims, 0
    none = (0,) * len(case.lens_q)
    new, leftpad = case.new or none, case.leftpad or none
    stored = zip(case.seqused_k or case.lens_k, new, leftpad, strict=True)
    keys = [max(count + more - padding, 0) for count, more, padding in stored]
    for rows, columns in zip(case.seqused_q or case.lens_q, keys, strict=True):
        q, k, v, out = ((1, heads, *shape) for shape in ((rows, dim), (columns, dim), (columns, dim_v), (rows, dim_v)))
        total += sdpa_flop_count(q, k, v) if formula is sdpa_flop_count else sdpa_backward_flop_count(out, q, k, v)
    return total


def count(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_forward_call_counts_its_two_products(path, case):
    inputs = build(case, device_of(path))

    def run():
        assert count(inputs.call) == expected(case, sdpa_flop_count) > 0
        return True

    on_path(path, case.features, inputs, run)


def test_a_call_that_writes_out_counts(path):
    inputs = build(CASES[0], device_of(path))

    def run():
        out = torch.empty_like(inputs.q[..., : inputs.v.shape[-1]])
        assert count(lambda: inputs.call(out=out)) == expected(CASES[0], sdpa_flop_count)
        return True

    on_path(path, CASES[0].features, inputs, run)


@pytest.mark.parametrize("case", [case for case in CASES if case.differentiable], ids=lambda case: case.id)
def test_a_backward_pass_counts_its_five_products(path, case):
    inputs = build(case, device_of(path))

    def run():
        inputs.q.requires_grad_()
        out, _ = inputs.call()
        assert count(out.sum().backward) == expected(case, sdpa_backward_flop_count) > 0
        return True

    on_path(path, case.features | {"backward"}, inputs, run)


# The ops of the kernels take the architecture as well; tensors without values need no device.
OPS = [("cpu_", ()), pytest.param("", (80,), marks=pytest.mark.skipif(not _extension.is_loaded(), reason="not built"))]
SCORE = (0.25, -1, -1, 0.0, 0.0)


@pytest.mark.parametrize("prefix, arch", OPS, ids=["cpu", "kernels"])
@pytest.mark.parametrize("longest_q, longest_k", [(0, 0), (4, 6)], ids=["unknown", "known"])
def test_lengths_without_values_count_as_the_longest(prefix, arch, longest_q, longest_k):
    ops, vector = torch.ops.flash_attn, meta(4, dtype=torch.int32)
    q, k, v, lse = meta(9, 4, 32), meta(11, 2, 32), meta(11, 2, 8), meta(4, 9)
    out, lengths = meta(9, 4, 8), (vector, vector, None, None)
    score = (longest_q, longest_k, *SCORE)
    entries, rows, columns = 3, longest_q or 9, longest_k or 11
    shapes = [(entries, 4, *shape) for shape in ((rows, 32), (columns, 32), (columns, 8), (rows, 8))]

    forward = (q, k, v, None, None, None, *lengths, None, None, None, None, *score, 0, None, False, *arch)
    for name, more in (("forward", ()), ("forward_out", (out,))):
        op = getattr(ops, prefix + name)
        assert count(lambda op=op, more=more: op(*forward, *more)) == sdpa_flop_count(*shapes[:3]), name
    backward = (out, None, q, k, v, out, lse, None, None, None, *lengths, *score, False, *arch)
    for name, more in (("backward", ()), ("backward_out", (q, k, v))):
        if op := getattr(ops, prefix + name, None):
            counted = count(lambda op=op, more=more: op(*backward, *more))
            assert counted == sdpa_backward_flop_count(shapes[3], *shapes[:3]), name


@pytest.mark.parametrize("prefix, arch", OPS, ids=["cpu", "kernels"])
def test_pages_without_lengths_count_as_full(prefix, arch):
    q, cache, table = meta(2, 3, 4, 32), meta(50, 16, 2, 32), meta(2, 5, dtype=torch.int32)
    places = (None, table, None)
    used = (None, None, None, meta(2, dtype=torch.int32))
    forward = (q, cache, cache, None, None, None, *used, *places, None, 0, 0, *SCORE, 0, None, False, *arch)
    keys = (2, 4, 5 * 16, 32)
    counted = count(lambda: getattr(torch.ops.flash_attn, prefix + "forward")(*forward))
    assert counted == sdpa_flop_count((2, 4, 3, 32), keys, keys)
