"""What the public functions accept, what the forms of an argument mean, and which results come back."""

import inspect
import math

import numpy as np
import pytest
import torch
from valid_calls import (
    APPEND,
    CACHE,
    COMBINE,
    CU_Q,
    DENSE,
    HALF,
    METADATA,
    PACKED_APPEND,
    PAGED,
    PAGED_CACHE,
    ROTARY,
    VALID,
    VARLEN,
    K,
    Q,
    V,
    call_of,
    grad,
    i32,
    meta,
    rand,
)

from flash_attn import _ops, flash_attn_func, flash_attn_qkvpacked_func, flash_attn_varlen_func
from flash_attn.interface import build_call


@pytest.mark.parametrize("name", VALID)
def test_valid_calls(name):
    call_of(VALID[name])


NONE, ONE = i32(0), rand(2, 5, 1, 32)
BORDERLINE = [
    (DENSE, {"q": ONE[..., :1], "k": ONE[..., :1], "v": ONE}),
    (DENSE, {"q": ONE, "k": ONE, "v": ONE, "alibi_slopes": rand(2)[::2]}),
    (DENSE, {"q": Q[:1], "k": K[:1], "v": V[:1], "out": rand(1, 5, 4, 8).expand(3, 5, 4, 8)[:1]}),
    (DENSE, {"q": rand(3, 0, 4, 32), "k": K[:1].expand(3, 7, 2, 32), "v": V[:1].expand(3, 7, 2, 8),
             "out": rand(1, 0, 4, 8).expand(3, 0, 4, 8)}),
    (VARLEN, {"q": Q[0, :0], "k": K[0, :0], "v": V[0, :0], "cu_seqlens_q": NONE, "cu_seqlens_k": NONE}),
    (VARLEN, {"scheduler_metadata": i32(0, 1, 1)}),
    (PACKED_APPEND, {"cache_seqlens": 14}),
    (PACKED_APPEND, {"cache_seqlens": 16, "cu_seqlens_k_new": i32(0, 0, 0), "k": rand(0, 2, 32), "v": rand(0, 2, 8)}),
    (PAGED_CACHE, {"cache_seqlens": 16}),
    (METADATA, {"headdim": 1}),
    (METADATA, {"headdim": 576, "headdim_v": 512}),
]  # fmt: skip


@pytest.mark.parametrize("valid, changes", BORDERLINE, ids=[" ".join(changes) for _, changes in BORDERLINE])
def test_what_is_just_allowed(valid, changes):
    call_of(valid, changes)


def test_results_may_go_where_gradients_are_off():
    with torch.no_grad():
        call_of(COMBINE, {"out": grad(rand(2, 5, 4, 8)), "out_partial": grad(rand(3, 2, 5, 4, 8))})


def same(left, right):
    torch.testing.assert_close(left, right, rtol=0, atol=0)


@pytest.mark.parametrize(
    "window, canonical",
    [
        ([2, 1], (2, 1)),
        (i32(2, 1), (2, 1)),
        (torch.tensor([2, 1]), (2, 1)),
        ((None, 1), (-1, 1)),
        ((2, None), (2, -1)),
        ((-7, 1), (-1, 1)),
        ((None, None), (-1, -1)),
        ((2**31 - 1, 2**62), (-1, -1)),
        ((2**63 - 1, 0), (-1, 0)),
    ],
)
def test_window_forms(window, canonical):
    call = build_call(flash_attn_func, Q, K, V, window_size=window)
    assert (call.window_left, call.window_right) == canonical
    same(flash_attn_func(Q, K, V, window_size=window), flash_attn_func(Q, K, V, window_size=canonical))


@pytest.mark.parametrize("right", [-1, 0, 3, None])
def test_causal_forces_the_right_side(right):
    same(
        flash_attn_func(Q, K, V, causal=True, window_size=(2, right)),
        flash_attn_func(Q, K, V, window_size=(2, 0)),
    )


@pytest.mark.parametrize("longest", [None, 4, torch.tensor(4), torch.tensor([4], dtype=torch.int32), 1, 1000])
def test_max_seqlen_is_a_hint(longest):
    function, arguments = VARLEN
    same(function(**arguments, max_seqlen_q=longest, max_seqlen_k=longest), function(**arguments))


def test_numpy_scalars():
    same(
        flash_attn_func(
            Q, K, V, window_size=(np.int64(2), np.int32(1)), softmax_scale=np.float32(0.5),
            num_splits=np.int64(1),
        ),
        flash_attn_func(Q, K, V, window_size=(2, 1), softmax_scale=0.5),
    )  # fmt: skip
    assert type(build_call(flash_attn_func, Q, K, V, softmax_scale=np.float32(0.5)).softmax_scale) is float


class Three:
    """An integer of another library's type."""

    def __index__(self):
        return 3


@pytest.mark.parametrize("three", [Three(), np.uint64(3)], ids=["index", "uint64"])
def test_integers_of_other_types(three):
    function, arguments = METADATA
    changes = {"headdim": 8, "page_size": three, "max_seqlen_k": three, "max_seqlen_k_new": three, "num_splits": three}
    plain = {name: 3 if value is three else value for name, value in changes.items()}
    same(function(**{**arguments, **changes}), function(**{**arguments, **plain}))


def test_alibi_slopes_that_require_grad_are_fine_without_gradients():
    with torch.no_grad():
        flash_attn_func(Q, K, V, alibi_slopes=grad(rand(4)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_sinks_have_any_float_dtype(dtype):
    assert flash_attn_func(Q, K, V, s_aux=rand(4).to(dtype)).dtype == Q.dtype


def test_hints_change_nothing():
    plain = flash_attn_func(Q, K, V)
    for hints in ({"num_splits": 7}, {"pack_gqa": True}, {"pack_gqa": False}, {"deterministic": True}):
        same(flash_attn_func(Q, K, V, **hints), plain)
    function, arguments = VARLEN
    for content in (0, -5, 10**6):
        metadata = torch.full((17,), content, dtype=torch.int32)
        same(function(**arguments, scheduler_metadata=metadata), function(**arguments))


# ---- What the ops are told ----


@pytest.mark.parametrize(
    "options, features",
    [
        ({"num_splits": 1}, set()),
        ({"num_splits": 2}, {"num_splits"}),
        ({"return_attn_probs": True}, set()),
        ({"dropout_p": 0.5}, {"dropout"}),
        ({"dropout_p": 0.5, "return_attn_probs": True}, {"dropout", "attn_probs"}),
        ({"out": rand(2, 5, 4, 8)}, {"out"}),
        ({"v": grad(V)}, {"backward"}),
        ({"s_aux": grad(rand(4))}, {"sinks", "backward"}),
    ],
    ids=lambda value: " ".join(sorted(value)),
)
def test_features_of_options(options, features):
    """test_cases.py has those of declared cases."""
    function, arguments = DENSE
    assert build_call(function, **arguments | options).features == {"dense", "gqa"} | features


SLOPES, SINKS = rand(4), rand(4)
# Option -> its value and the fields of the call that come of it.
OPTIONS = {
    "dropout_p": (0.5, {"dropout_p": 0.5}),
    "softmax_scale": (0.3, {"softmax_scale": 0.3}),
    "causal": (True, {"window_left": -1, "window_right": 0}),
    "window_size": ((2, 1), {"window_left": 2, "window_right": 1}),
    "softcap": (3.0, {"softcap": 3.0}),
    "alibi_slopes": (SLOPES, {"alibi_slopes": SLOPES}),
    "deterministic": (True, {"deterministic": True}),
    "return_attn_probs": (True, {"return_attn_probs": True}),
    "return_softmax_lse": (True, {"return_softmax_lse": True}),
    "s_aux": (SINKS, {"s_aux": SINKS}),
    "num_splits": (3, {"num_splits": 3}),
    "pack_gqa": (True, {"pack_gqa": True}),
    "max_seqlen_q": (9, {"max_seqlen_q": 9}),
    "max_seqlen_k": (8, {"max_seqlen_k": 8}),
    "max_seqlen": (7, {"max_seqlen_q": 7, "max_seqlen_k": 7}),
}
TAKEN = [
    (name, option)
    for name, (function, _) in VALID.items()
    if name not in ("combine", "metadata")
    for option in OPTIONS
    if option in inspect.signature(function).parameters
]


@pytest.mark.parametrize("name, option", TAKEN)
def test_every_option_reaches_the_call(name, option, monkeypatch):
    """The one that runs and the one that is explained."""
    function, arguments = VALID[name]
    value, fields = OPTIONS[option]
    run = []
    monkeypatch.setattr(_ops, "forward", lambda path, call: run.append(call) or (Q, Q))
    call_of(VALID[name], {option: value})
    for call in (*run, build_call(function, **arguments, **{option: value})):
        assert {field: getattr(call, field) for field in fields} == fields
    default = build_call(function, **arguments)
    assert len(run) == 1 and {field: getattr(default, field) for field in fields} != fields


def test_only_attention_functions_have_calls():
    with pytest.raises(
        ValueError, match="function must be an attention function of flash_attn, got <built-in function"
    ):
        build_call(print, Q)


@pytest.mark.parametrize("needs_grad", [False, True])
def test_torch_may_ask_for_determinism_of_gradients(needs_grad):
    q = grad(Q) if needs_grad else Q
    try:
        torch.use_deterministic_algorithms(True)
        assert build_call(flash_attn_func, q, K, V).deterministic is needs_grad
    finally:
        torch.use_deterministic_algorithms(False)
    assert build_call(flash_attn_func, q, K, V).deterministic is False


@pytest.mark.parametrize(
    "valid, changes, longest",
    [
        (VARLEN, {}, (3, 4)),
        (VARLEN, {"max_seqlen_q": 5, "max_seqlen_k": 6}, (5, 6)),
        (VARLEN, {"cu_seqlens_q": NONE, "cu_seqlens_k": NONE}, (0, 0)),
        (VARLEN, {"cu_seqlens_q": i32(0, 5), "cu_seqlens_k": i32(0, 7)}, (5, 7)),
        (PAGED, {}, (3, 2 * 3)),
        (PAGED, {"max_seqlen_k": 5}, (3, 5)),
        (DENSE, {}, (0, 0)),
    ],
)
def test_longest_lengths_are_known_where_probabilities_need_them(valid, changes, longest):
    function, arguments = valid
    call = build_call(function, **arguments | changes, dropout_p=0.5, return_attn_probs=True)
    assert (call.max_seqlen_q, call.max_seqlen_k) == longest


@pytest.mark.parametrize(
    "valid, changes, lengths",
    [(CACHE, {}, None), (CACHE, {"cache_seqlens": 5}, [5, 5]), (PAGED_CACHE, {}, [16, 16])],
    ids=["whole", "int", "pages"],
)
def test_lengths_of_a_cache(valid, changes, lengths):
    function, arguments = valid
    call = build_call(function, **arguments | changes)
    assert call.max_seqlen_q == call.max_seqlen_k == 0
    if lengths is None:
        assert call.seqused_k is None
    else:
        assert call.seqused_k.dtype == torch.int32 and call.seqused_k.tolist() == lengths
        there = {name: value.to("meta") for name, value in arguments.items()}
        assert build_call(function, **there | changes).seqused_k.is_meta


# ---- Results ----


def test_forms_of_the_result():
    out = flash_attn_func(Q, K, V)
    assert out.shape == (2, 5, 4, 8)
    out, lse = flash_attn_func(Q, K, V, return_softmax_lse=True)
    assert lse.shape == (2, 4, 5) and lse.dtype == torch.float32
    out, lse, probs = flash_attn_func(Q, K, V, return_attn_probs=True, return_softmax_lse=True)
    assert probs.numel() == 0 and probs.dtype == Q.dtype
    *_, probs = flash_attn_func(Q, K, V, dropout_p=0.5, return_attn_probs=True)
    assert probs.shape == (2, 4, 128, 128)
    function, arguments = VARLEN
    out, lse = function(**arguments, return_softmax_lse=True)
    assert out.shape == (5, 4, 8) and lse.shape == (4, 5)
    for longest, size in ((None, 128), (torch.tensor(4), 128), (129, 256)):
        *_, probs = function(**arguments, max_seqlen_k=longest, dropout_p=0.5, return_attn_probs=True)
        assert probs.shape == (2, 4, 128, size)
    *_, lse = flash_attn_func(Q.double(), K.double(), V.double(), return_softmax_lse=True)
    assert lse.dtype == torch.float64


@pytest.mark.parametrize("valid", [DENSE, VARLEN, PAGED, CACHE], ids=["dense", "varlen", "paged", "cache"])
def test_out_is_written_and_returned(valid):
    function, arguments = valid
    expected = function(**arguments)
    rows = torch.full((*expected.shape[:-1], 20), math.nan)
    out = rows[..., 4:12]
    version = out._version
    result, lse = function(**arguments, out=out, return_softmax_lse=True)
    assert result is out and out._version > version
    same(out, expected)
    assert rows[..., :4].isnan().all() and rows[..., 12:].isnan().all()


def test_packed_forms_are_views():
    qkv = rand(2, 5, 3, 4, 32)
    same(flash_attn_qkvpacked_func(qkv, causal=True), flash_attn_func(*qkv.unbind(2), causal=True))
    packed = grad(qkv)
    flash_attn_qkvpacked_func(packed, causal=True).sum().backward()
    parts = [grad(part) for part in qkv.unbind(2)]
    flash_attn_func(*parts, causal=True).sum().backward()
    same(packed.grad, torch.stack([part.grad for part in parts], dim=2))


def test_the_cache_is_written_in_place_and_not_copied():
    function, arguments = APPEND
    k_cache, v_cache = arguments["k_cache"].clone(), arguments["v_cache"].clone()
    before, version = k_cache.clone(), k_cache._version
    function(**{**arguments, "k_cache": k_cache, "v_cache": v_cache})
    assert k_cache._version > version
    same(k_cache[0, 4:7], arguments["k"][0])
    same(v_cache[1, 6:9], arguments["v"][1])
    k_cache[0, 4:7], k_cache[1, 6:9] = before[0, 4:7], before[1, 6:9]
    same(k_cache, before)


def test_cache_seqlens_as_an_int_is_the_tensor():
    function, arguments = APPEND
    results = []
    for lengths in (5, i32(5, 5)):
        own = {name: arguments[name].clone() for name in ("k_cache", "v_cache")}
        results.append((function(**{**arguments, **own, "cache_seqlens": lengths}), own["k_cache"]))
    same(results[0], results[1])


def test_metadata():
    metadata = call_of(METADATA, {"num_splits": 3})
    assert metadata.dtype == torch.int32 and metadata.shape == (17,)
    assert metadata.tolist() == [0, 3, 3] + [0] * 14
    assert call_of(METADATA).tolist()[:3] == [0, 1, 1]
    same(call_of(CACHE, {"scheduler_metadata": metadata}), call_of(CACHE))


def test_combine_into_out():
    function, arguments = COMBINE
    expected, expected_lse = function(**arguments)
    out = torch.empty(2, 5, 4, 8, dtype=HALF)
    result, lse = function(**arguments, out=out)
    assert result is out and lse.shape == (2, 5, 4)
    same(out, expected.half())
    same(lse, expected_lse)
    assert function(**arguments, out_dtype=HALF)[0].dtype == HALF
    packed, packed_lse = function(arguments["out_partial"][:, 0], arguments["lse_partial"][:, 0])
    same((packed, packed_lse), (expected[0], expected_lse[0]))


# ---- No value of a tensor on a device is read ----


def test_nothing_is_read_from_a_device():
    """The meta device stands for a GPU: reading a value from it raises."""
    q, k, v = (tensor.to("meta") for tensor in (Q, K, V))
    assert flash_attn_func(q, k, v, alibi_slopes=meta(2, 4), s_aux=meta(4), dropout_p=0.1).shape == (2, 5, 4, 8)
    cu = CU_Q.to("meta")
    longest = meta(dtype=torch.int32)
    arguments = {"max_seqlen_q": longest, "max_seqlen_k": longest, "seqused_q": cu[1:], "leftpad_k": cu[1:]}
    out = flash_attn_varlen_func(q[0], k[0], v[0], cu, cu, **arguments)
    assert out.shape == (5, 4, 8)
    function, arguments = PAGED
    pages = {name: None if value is None else value.to("meta") for name, value in arguments.items()}
    assert function(**pages).shape == (5, 4, 8)
    assert function(**{**pages, "seqused_k": None, "cu_seqlens_k": cu}).shape == (5, 4, 8)
    for options in ({"dropout_p": 0.1}, {"return_attn_probs": True, "return_softmax_lse": True}):
        function(**pages, **options)
    probs = {"dropout_p": 0.1, "return_attn_probs": True}
    with pytest.raises(ValueError, match="max_seqlen_q must be an int for return_attn_probs with dropout"):
        function(**pages, **probs)
    with pytest.raises(ValueError, match="max_seqlen_k must be an int for return_attn_probs with dropout"):
        flash_attn_varlen_func(q[0], k[0], v[0], cu, cu, max_seqlen_q=3, **probs)
    for function, arguments in (ROTARY, PACKED_APPEND, PAGED_CACHE):
        assert function(**{name: value.to("meta") for name, value in arguments.items()}).is_meta
