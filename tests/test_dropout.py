"""Dropout: the mask is the one that the rule prescribes, in forward and backward, and torch's seeds rule it."""

import cases
import pytest
import reference
import torch
from cases import Case
from checks import check_backward, check_forward, gradients_of_a_loss
from harness import build, device_of, drawn_rng_state, on_path
from tolerance import assert_close, assert_same_bits

import flash_attn

SMALL = Case("small-dropout", "one call to vary", "dense", (33, 33), (50, 50), heads=(4, 2), dropout_p=0.3)
PROBS = [
    Case("probs", "every entry inside", "dense", (33, 33), (130, 130), heads=(2, 1), dropout_p=0.3),
    Case("probs-causal-sinks", "masked entries are 0", "dense", (65,), (40,), dropout_p=0.5, causal=True,
         sinks=cases.FP32),
    Case("probs-varlen", "0 outside each sequence", "varlen", (17, 0, 40), (130, 5, 0), dropout_p=0.2),
    Case("probs-window-alibi", "the score as attention makes it", "dense", (33, 33), (70, 70), dropout_p=0.3,
         heads=(4, 2), dims=(41, 24), window=(20, 3), alibi="batch", scale=-0.2),
    Case("probs-paged", "keys from pages", "varlen", (17, 30), (130, 40), dropout_p=0.2, seqused_k=(100, 3), page=16),
    Case("probs-seqused", "0 past the used lengths", "varlen", (17, 30), (130, 40), dropout_p=0.2,
         seqused_q=(9, 30), seqused_k=(100, 3)),
]  # fmt: skip


@pytest.mark.parametrize("case", cases.DROPOUT, ids=lambda case: case.id)
def test_forward(path, case):
    check_forward(path, case)


@pytest.mark.parametrize("case", cases.DROPOUT, ids=lambda case: case.id)
def test_backward(path, case):
    """The oracle's gradients use the mask that the oracle's own Philox gave."""
    check_backward(path, case)


@pytest.mark.parametrize("case", PROBS, ids=lambda case: case.id)
def test_attn_probs_show_the_mask(path, case):
    inputs = build(case, device_of(path))
    exact, low = inputs.expected(), inputs.expected(case.dtype)
    result = on_path(path, case.features | {"attn_probs"}, inputs, lambda: inputs.call(return_attn_probs=True))
    if result is None:
        return
    probs = result[2]
    rounded = [-(-max(lengths) // 128) * 128 for lengths in (case.lens_q, case.lens_k)]
    assert probs.shape == (len(case.lens_q), case.heads[0], *rounded) and probs.dtype == case.dtype
    for b, (expected, naive) in enumerate(zip(exact.probs, low.probs, strict=True)):
        _, rows, columns = expected.shape
        used = probs[b, :, :rows, :columns]
        visible = expected != 0
        assert torch.equal(torch.signbit(used.cpu())[visible], torch.signbit(expected)[visible])
        assert_close("probs", used, expected, naive)
        outside = probs[b].clone()
        outside[:, :rows, :columns] = 0
        assert (outside == 0).all()


@pytest.mark.parametrize("dropout_p", [0.01, 0.1, 0.5, 0.9])
def test_keep_rate(path, dropout_p):
    """With q = 0 and v = 1 the output is the mean of the mask times 1 / (1 - p)."""
    case = Case("keep-rate", "many scores", "dense", (128,) * 2, (512,) * 2, dims=(8, 8), dropout_p=dropout_p)
    inputs = build(case, device_of(path))
    inputs.q.zero_()
    inputs.v.fill_(1.0)
    result = on_path(path, case.features, inputs, inputs.call)
    if result is not None:
        kept = result[0].float().mean().item() * (1 - dropout_p)
        rule = (int(255 * (1 - dropout_p)) + 1) / 256
        deviation = (rule * (1 - rule) / (2 * 2 * 128 * 512)) ** 0.5
        assert abs(kept - rule) < 5 * deviation + 2e-3 * kept


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 192, 256, 512])
def test_mask_is_that_of_the_rule(path, head_dim):
    """With q = 0 and one-hot values each output is one entry of the mask: as many keys a call as v has columns."""
    case = Case(f"mask-{head_dim}", "several tiles of rows and keys", "dense", (140,) * 2, (300,) * 2, heads=(2, 1),
                dims=(head_dim, head_dim), dtype=cases.FP16, dropout_p=0.4)  # fmt: skip
    inputs = build(case, device_of(path))
    inputs.q.zero_()
    mask = torch.stack([reference.keep_mask(inputs.rng_state, 0.4, b, 2, 140, 300) for b in range(2)])
    for first in range(0, 300, head_dim):
        column = torch.arange(min(head_dim, 300 - first))
        inputs.v.zero_()
        inputs.v[:, first + column, :, column] = 1.0
        result = on_path(path, case.features, inputs, inputs.call)
        if result is None:
            return
        kept = result[0][..., column].transpose(1, 2) != 0
        assert torch.equal(kept.cpu(), mask[..., first + column]), f"keys from {first}"


def test_seeds_rule_the_mask(path):
    inputs = build(SMALL, device_of(path))

    def call(seed=None):
        if seed is not None:
            torch.manual_seed(seed)
        return flash_attn.flash_attn_func(inputs.q, inputs.k, inputs.v, dropout_p=0.3)

    def run():
        first, second = call(5), call()
        assert_same_bits("out", call(5), first)
        assert_same_bits("the next out", call(), second)
        assert not torch.equal(first, second) and not torch.equal(call(6), first)
        return True

    on_path(path, SMALL.features, inputs, run)


def test_without_dropout_no_random_number_is_drawn(path):
    inputs = build(SMALL, device_of(path))
    features = SMALL.features - {"dropout"}
    expected = drawn_rng_state(7, device_of(path))
    torch.manual_seed(7)
    on_path(path, features, inputs, lambda: flash_attn.flash_attn_func(inputs.q, inputs.k, inputs.v))
    assert torch.equal(torch.randint(0, 2**62, (2,), dtype=torch.int64, device=device_of(path)), expected)


def test_gradients_repeat(path):
    inputs = build(SMALL, device_of(path))

    def run():
        first, second = gradients_of_a_loss(inputs), gradients_of_a_loss(inputs)
        for name, gradient in first.items():
            assert_same_bits(name, gradient, second[name])
        return True

    on_path(path, SMALL.features | {"backward"}, inputs, run)


def test_masks_of_heads_and_entries_differ():
    mask = torch.stack([reference.keep_mask(torch.tensor([1, 2]), 0.5, b, 3, 64, 64) for b in range(2)])
    flat = mask.flatten(0, 1).flatten(1)
    agreement = (flat[:, None] == flat[None]).double().mean(-1)
    assert (agreement - torch.eye(6, dtype=torch.float64)).max() < 0.6
