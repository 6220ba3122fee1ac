"""bert_padding: moving tokens between padded and packed tensors."""

import sys
import types

import numpy as np
import pytest
import torch

from flash_attn import bert_padding
from flash_attn.bert_padding import index_first_axis, index_put_first_axis, pad_input, unpad_input

MASK = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 1]])
ROWS = torch.tensor([0, 2, 5])


@pytest.mark.parametrize("mask", [MASK, MASK.bool(), MASK.float()], ids=["int64", "bool", "float"])
def test_unpad(mask):
    x = torch.randn(3, 4, 2, 5)
    packed, indices, cu_seqlens, longest, used = unpad_input(x, mask)
    kept = mask != 0
    torch.testing.assert_close(packed, x[kept], rtol=0, atol=0)
    assert indices.tolist() == [0, 1, 8, 10, 11] and indices.dtype == torch.int64
    assert cu_seqlens.tolist() == [0, 2, 2, 5] and cu_seqlens.dtype == torch.int32
    assert longest == 3 and type(longest) is int
    assert used.tolist() == [2, 0, 3] and used.dtype == torch.int32
    back = pad_input(packed, indices, 3, 4)
    torch.testing.assert_close(back, x * kept[:, :, None, None], rtol=0, atol=0)


def test_unused_mask_is_packed_but_not_used():
    unused = torch.tensor([[0, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]])
    packed, indices, cu_seqlens, longest, used = unpad_input(torch.randn(3, 4, 7), MASK, unused)
    assert packed.shape == (8, 7)
    assert indices.tolist() == [0, 1, 2, 4, 5, 8, 10, 11]
    assert cu_seqlens.tolist() == [0, 3, 5, 8] and longest == 3
    assert used.tolist() == [2, 0, 3]


@pytest.mark.parametrize("batch, seqlen", [(0, 4), (2, 0)])
def test_empty(batch, seqlen):
    packed, indices, cu_seqlens, longest, used = unpad_input(
        torch.randn(batch, seqlen, 3), torch.ones(batch, seqlen, dtype=torch.int32)
    )
    assert packed.shape == (0, 3) and indices.shape == (0,) and longest == 0
    assert cu_seqlens.tolist() == [0] * (batch + 1) and used.shape == (batch,)
    assert pad_input(packed, indices, batch, seqlen).shape == (batch, seqlen, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int64])
def test_dtypes_and_strides(dtype):
    x = torch.arange(3 * 4 * 6).reshape(3, 6, 4).to(dtype).transpose(1, 2)
    packed, indices, *_ = unpad_input(x, MASK)
    torch.testing.assert_close(packed, x[MASK != 0], rtol=0, atol=0)
    assert packed.dtype == dtype
    assert pad_input(packed, indices, 3, 4).dtype == dtype


def test_gradients():
    x = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    _, indices, *_ = unpad_input(x.detach(), MASK)
    assert torch.autograd.gradcheck(lambda t: unpad_input(t, MASK)[0], x)
    packed = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: pad_input(t, indices, 3, 4), packed)
    assert torch.autograd.gradgradcheck(lambda t: pad_input(t, indices, 3, 4), packed)
    rows = torch.tensor([0, 2, 2])
    assert torch.autograd.gradcheck(lambda t: index_first_axis(t, rows), packed)


def test_indexing():
    x = torch.randn(6, 2, 3)
    indices = torch.tensor([4, 0, 5], dtype=torch.int32)
    rows = index_first_axis(x, indices)
    torch.testing.assert_close(rows, x[[4, 0, 5]], rtol=0, atol=0)
    placed = index_put_first_axis(rows, indices, 6)
    torch.testing.assert_close(placed[[4, 0, 5]], rows, rtol=0, atol=0)
    assert placed[[1, 2, 3]].count_nonzero() == 0
    assert index_put_first_axis(torch.ones(3), indices, 6).tolist() == [1, 0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: unpad_input(x[0, 0], MASK), r"hidden_states must have at least 2 dimensions, got shape \(5,\)"),
        (lambda x: unpad_input(x, MASK[:2]), r"attention_mask must have the shape .* = \(3, 4\), got \(2, 4\)"),
        (lambda x: unpad_input(x, MASK, MASK[0]), r"unused_mask must have at least 2 dimensions, got shape \(4,\)"),
        (lambda x: unpad_input(x, MASK.to("meta")), r"attention_mask must be on .*cpu, got meta"),
        (lambda x: index_first_axis(x, MASK), r"indices must have one dimension, got shape \(3, 4\)"),
        (lambda x: index_first_axis(x, MASK[0].float()), r"indices must have dtype int32 or int64, got torch.float32"),
        (lambda x: index_first_axis(x, MASK[0].to("meta")), r"indices must be on input's device cpu, got meta"),
        (lambda x: pad_input(x, MASK[0], 3, 4), r"indices must have one element per row of hidden_states, 3, got 4"),
        (lambda x: pad_input(x, MASK[0].to("meta"), 3, 4), r"indices must be on hidden_states's device cpu, got meta"),
        (lambda x: index_put_first_axis(x, MASK[0], 9), r"indices must have one element per row of values, 3, got 4"),
        (lambda x: index_first_axis(x, ROWS), r"indices must be at least 0 and below input's 3 rows, got 5"),
        (lambda x: index_first_axis(x, -ROWS), r"indices must be at least 0 and below input's 3 rows, got -5"),
        (
            lambda x: index_put_first_axis(x, ROWS, 5),
            r"indices must be at least 0 and below the result's 5 rows, got 5",
        ),
        (
            lambda x: index_put_first_axis(x[0, 0, 0], ROWS, 6),
            r"values must have at least 1 dimensions, got shape \(\)",
        ),
        (lambda x: pad_input(x, ROWS, 1, 5), r"indices must be at least 0 and below the result's 5 rows, got 5"),
        (lambda x: pad_input(x, ROWS, 0, 5), r"indices must be at least 0 and below the result's 0 rows, got 5"),
        (lambda x: index_put_first_axis(x, ROWS, -1), r"first_axis_dim must be at least 0 and below .*, got -1"),
        (lambda x: pad_input(x, ROWS, -1, 6), r"batch must be at least 0 and below .*, got -1"),
        (lambda x: pad_input(x, ROWS, 1, -6), r"seqlen must be at least 0 and below 2\*\*63, got -6"),
        (
            lambda x: pad_input(x, ROWS, 1, 2**63),
            r"seqlen must be at least 0 and below 2\*\*63, got 9223372036854775808",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(3, 4, 5))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: unpad_input([1.0], MASK), "hidden_states must be a torch.Tensor, got list"),
        (lambda x: index_first_axis([1.0], ROWS), "input must be a torch.Tensor, got list"),
        (lambda x: index_put_first_axis([1.0], ROWS, 6), "values must be a torch.Tensor, got list"),
        (lambda x: index_put_first_axis(x, ROWS, None), "first_axis_dim must be an int, got None"),
        (lambda x: pad_input(x, ROWS, 1.0, 6), "batch must be an int, got 1.0"),
        (lambda x: pad_input(x, ROWS, True, 6), "batch must be an int, got True"),
        (lambda x: pad_input(x, ROWS, 1, "6"), "seqlen must be an int, got '6'"),
        (lambda x: pad_input(x, ROWS, np.array([1]), 6), "batch must be an int, got array"),
        (
            lambda x: pad_input(x, ROWS, torch.tensor(1.0), 6),
            "batch must be an int or an integer tensor of one element",
        ),
        (lambda x: pad_input(x, ROWS, torch.tensor(True), 6), "batch must be an int or an integer tensor of one"),
        (lambda x: pad_input(x, ROWS, 1, torch.tensor([6, 6])), "seqlen must be an int or an integer tensor of one"),
        (lambda x: pad_input(x, ROWS, 1, torch.ones((), device="meta").int()), "seqlen must be an int or an integer"),
    ],
)
def test_error_of_type(call, message):
    with pytest.raises(TypeError, match=message):
        call(torch.randn(3, 4, 5))


def test_sizes_may_be_tensors():
    """As torch's own sizes: max_seqlen_in_batch is one where somebody else made it."""
    rows = torch.randn(3, 4)
    padded = pad_input(rows, ROWS, torch.tensor(2), torch.tensor(3, dtype=torch.int32))
    assert padded.shape == (2, 3, 4) and torch.equal(padded.flatten(0, 1)[ROWS], rows)


def test_compiled_round_trip():
    """Neither sizes nor indices are looked at there."""
    x = torch.randn(3, 4, 5)
    _, indices, *_ = unpad_input(x, MASK)
    fast = torch.compile(
        lambda x, rows: pad_input(x.flatten(0, 1)[rows], rows, *x.shape[:2]),
        fullgraph=True, dynamic=True, backend="aot_eager",
    )  # fmt: skip
    torch.testing.assert_close(fast(x, indices), x * MASK[..., None], rtol=0, atol=0)


def test_names_of_einops(monkeypatch):
    """A stand-in where einops isn't installed: what counts is that the name leads there, and that import fails well."""
    einops = types.ModuleType("einops")
    einops.rearrange, einops.nothing = lambda *_: "rearranged", None
    monkeypatch.setitem(sys.modules, "einops", einops)
    from flash_attn.bert_padding import rearrange

    assert rearrange is einops.rearrange
    with pytest.raises(AttributeError, match="module 'flash_attn.bert_padding' has no attribute 'nothing'"):
        bert_padding.nothing  # noqa: B018
    monkeypatch.setitem(sys.modules, "einops", None)
    with pytest.raises(AttributeError, match="flash_attn.bert_padding.repeat is einops.repeat, and einops can't be"):
        bert_padding.repeat  # noqa: B018
    with pytest.raises(ImportError):
        from flash_attn.bert_padding import repeat  # noqa: F401
    assert not hasattr(bert_padding, "rearrange") and not hasattr(bert_padding, "nothing")
