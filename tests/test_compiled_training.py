"""Training under torch.compile, on every path: no graph breaks, one graph for all sizes, the bits of eager calls."""

from dataclasses import replace

import pytest
import torch
from cases import Case
from harness import build, device_of, on_path
from tolerance import assert_same_bits

import flash_attn

DENSE = Case("compiled", "sizes change", "dense", (33, 33), (50, 50), heads=(4, 2), causal=True)


def _leaves(case, path):
    inputs, wanted = build(case, device_of(path)).leaves()
    return inputs, list(wanted.values())


def _loss(out):
    return out.float().square().sum()


def _compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_compiled_for_sizes_that_change(path, dropout_p):
    """One graph, forward and backward, for all sizes; the same bits as eager calls."""
    torch._dynamo.utils.counters.clear()

    def attention(q, k, v):
        return flash_attn.flash_attn_func(q, k, v, dropout_p, causal=True, deterministic=True, return_softmax_lse=True)

    def results(function, leaves):
        torch.manual_seed(3)
        out, lse = function(*leaves)
        return out, lse, *torch.autograd.grad(_loss(out) + lse.sum(), leaves)

    fast = _compiled(attention)
    for batch, length_q, length_k in ((3, 33, 50), (5, 64, 64), (6, 17, 130)):
        case = replace(DENSE, id=f"compiled-{batch}", lens_q=(length_q,) * batch, lens_k=(length_k,) * batch,
                       dropout_p=dropout_p)  # fmt: skip
        inputs, leaves = _leaves(case, path)

        def run(leaves=leaves):
            expected = results(attention, leaves)  # first: a refusal is no NotImplementedError once it is compiled
            for name, *pair in zip(("out", "lse", "dq", "dk", "dv"), results(fast, leaves), expected, strict=True):
                assert_same_bits(name, *pair)
            return True

        if on_path(path, case.features | {"backward"}, inputs, run) is None:
            return
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compiled_packed_sequences(path):
    def attention(q, k, v, cu_q, cu_k, longest):
        return flash_attn.flash_attn_varlen_func(q, k, v, cu_q, cu_k, longest, longest, causal=True, deterministic=True)

    fast = _compiled(attention)
    for lens_q, lens_k in (((17, 0, 33), (40, 5, 33)), ((100, 20), (90, 64)), ((3, 1, 4, 1), (5, 9, 2, 6))):
        case = Case("compiled-varlen", "lengths change", "varlen", lens_q, lens_k, heads=(4, 2), causal=True)
        inputs, leaves = _leaves(case, path)
        packing = (inputs.layout["cu_seqlens_q"], inputs.layout["cu_seqlens_k"], 128)

        def run(leaves=leaves, packing=packing):
            ours, expected = (
                torch.autograd.grad(_loss(function(*leaves, *packing)), leaves) for function in (fast, attention)
            )
            for name, *pair in zip("qkv", ours, expected, strict=True):
                assert_same_bits(f"d{name}", *pair)
            return True

        on_path(path, case.features | {"backward"}, inputs, run)
