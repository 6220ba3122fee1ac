"""Dense forward passes on every path, and the forms that results can take."""

import cases
import pytest
import torch
from cases import Case
from checks import check_equal_scores, check_forward
from harness import build, device_of, on_path
from tolerance import assert_same_bits

import flash_attn

HINTS = [{"pack_gqa": True}, {"pack_gqa": False}, {"num_splits": 1}, {"deterministic": True}]
SMALL = Case("small", "one call to vary", "dense", (17, 17), (33, 33), heads=(4, 2), causal=True)
MULTIHEAD = Case("multihead", "equal heads, for packed forms", "dense", (33, 33), (33, 33), heads=(3, 3), causal=True)


@pytest.mark.parametrize("case", cases.FORWARD, ids=lambda case: case.id)
def test_forward(path, case):
    check_forward(path, case)


def test_equal_scores(path):
    check_equal_scores(path)


@pytest.mark.parametrize(
    "window",
    [(5, -1), (5, None), [5, -7], torch.tensor([5, -1]), torch.tensor([5, -1], dtype=torch.int32)],
    ids=["tuple", "none", "list", "tensor", "int32-tensor"],
)
def test_forms_of_window_size(path, window):
    inputs = build(SMALL, device_of(path))
    features = SMALL.features - {"causal"} | {"window"}
    plain = on_path(path, features, inputs, lambda: _dense(inputs, window_size=(5, -1)))
    other = on_path(path, features, inputs, lambda: _dense(inputs, window_size=window))
    if plain is not None:
        assert_same_bits("out", other, plain)


def _dense(inputs, **options):
    return flash_attn.flash_attn_func(inputs.q, inputs.k, inputs.v, **options)


def test_returned_tuples(path):
    inputs = build(SMALL, device_of(path))

    def call(**options):
        return on_path(path, SMALL.features, inputs, lambda: _dense(inputs, causal=True, **options))

    out = call()
    if out is None:
        return
    assert isinstance(out, torch.Tensor)
    with_lse = call(return_softmax_lse=True)
    assert isinstance(with_lse, tuple) and len(with_lse) == 2
    assert_same_bits("out", with_lse[0], out)
    assert with_lse[1].shape == (2, 4, 17)


@pytest.mark.parametrize("both", [False, True], ids=["probs", "probs-and-lse"])
def test_attn_probs_without_dropout_are_empty(path, both):
    inputs = build(SMALL, device_of(path))
    result = on_path(
        path, SMALL.features, inputs,
        lambda: _dense(inputs, causal=True, return_attn_probs=True, return_softmax_lse=both),
    )  # fmt: skip
    if result is not None:
        out, lse, probs = result
        assert out.shape == (2, 17, 4, 64) and lse.shape == (2, 4, 17) and probs.numel() == 0


def test_packed_forms_equal_plain(path):
    inputs = build(MULTIHEAD, device_of(path))
    plain = on_path(path, MULTIHEAD.features, inputs, lambda: _dense(inputs, causal=True))
    qkv = torch.stack((inputs.q, inputs.k, inputs.v), dim=2)
    kv = torch.stack((inputs.k, inputs.v), dim=2)
    features = MULTIHEAD.features
    by_qkv = on_path(path, features, inputs, lambda: flash_attn.flash_attn_qkvpacked_func(qkv, causal=True))
    by_kv = on_path(path, features, inputs, lambda: flash_attn.flash_attn_kvpacked_func(inputs.q, kv, causal=True))
    if plain is not None:
        assert_same_bits("qkvpacked", by_qkv, plain)
        assert_same_bits("kvpacked", by_kv, plain)


def test_defaults(path):
    """No option given: full attention, scale 1 / sqrt(D)."""
    inputs = build(SMALL, device_of(path))
    features = SMALL.features - {"causal"}
    plain = on_path(path, features, inputs, lambda: _dense(inputs))
    spelled = on_path(path, features, inputs, lambda: _dense(inputs, dropout_p=0.0, softmax_scale=64**-0.5,
                      causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
                      return_attn_probs=False, s_aux=None, out=None, return_softmax_lse=False, num_splits=0,
                      pack_gqa=None))  # fmt: skip
    if plain is not None:
        assert_same_bits("out", spelled, plain)


@pytest.mark.parametrize("hint", HINTS, ids=lambda hint: next(iter(hint)))
def test_results_are_right_with_any_hint(path, hint):
    check_forward(path, SMALL, **hint)


def test_inputs_are_not_changed_and_out_is_new(path):
    inputs = build(SMALL, device_of(path))
    copies = [x.clone() for x in (inputs.q, inputs.k, inputs.v)]
    out = on_path(path, SMALL.features, inputs, lambda: _dense(inputs, causal=True))
    for name, before in zip("qkv", copies, strict=True):
        assert_same_bits(name, getattr(inputs, name), before)
    if out is not None:
        assert out.untyped_storage().data_ptr() not in [x.untyped_storage().data_ptr() for x in (inputs.q, inputs.v)]


def test_out_may_be_strided(path):
    """vLLM and torch's registry pass views of larger buffers as out=."""
    inputs = build(SMALL, device_of(path))
    plain = on_path(path, SMALL.features, inputs, lambda: _dense(inputs, causal=True))
    buffer = torch.full((2, 17, 4, 3, 64), float("nan"), dtype=SMALL.dtype, device=device_of(path))
    on_path(path, SMALL.features | {"out"}, inputs, lambda: _dense(inputs, causal=True, out=buffer[..., 1, :]))
    if plain is not None:
        assert_same_bits("out", buffer[..., 1, :], plain)
        assert buffer[..., 0, :].isnan().all() and buffer[..., 2, :].isnan().all()
