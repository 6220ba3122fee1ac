"""What the compiled ops refuse: the last line in front of memory, for callers who go past the Python interface.

From tests/, as emulated.py. test_cache_ops_gpu.py has the ops that move tokens.
"""

import itertools
import math

import pytest
import torch
from cases import BF16
from harness import int32

ops = torch.ops.flash_attn

MOST_ROWS = 2**31 - 1024


def rand(*shape, dtype=BF16):
    return torch.randn(shape).to(dtype)


def zeros(*shape):
    return torch.zeros(shape, dtype=torch.int32)


DENSE = {
    "q": rand(2, 5, 4, 64),
    "k": rand(2, 7, 2, 64),
    "v": rand(2, 7, 2, 64),
    "softmax_scale": 0.125,
    "window_left": -1,
    "window_right": -1,
    "max_seqlen_q": 5,
    "max_seqlen_k": 7,
    "softcap": 0.0,
    "dropout_p": 0.0,
    "num_splits": 0,
    "deterministic": False,
    "arch": 80,
}
OFFSETS = {"cu_seqlens_q": int32((0, 3, 5)), "cu_seqlens_k": int32((0, 4, 7))}
VARLEN = DENSE | OFFSETS | {"q": rand(5, 4, 64), "k": rand(7, 2, 64), "v": rand(7, 2, 64)}
PAGES = {"k": rand(9, 16, 2, 64), "v": rand(9, 16, 2, 64), "block_table": zeros(2, 3), "seqused_k": zeros(2)}
PAGED = DENSE | PAGES
ROWS = DENSE | {"k": rand(3, 7, 2, 64), "v": rand(3, 7, 2, 64), "cache_batch_idx": zeros(2)}

WRONG = [
    (DENSE, {"q": rand(2, 5, 4, 64, dtype=torch.float32)}, "k must have q's dtype"),
    (DENSE, {"v": rand(2, 7, 2, 64, dtype=torch.float16)}, "v must have q's dtype"),
    (DENSE, {name: rand(2, 5, 2, 64, dtype=torch.float32) for name in "qkv"}, "q must be float16 or bfloat16"),
    (DENSE, {"q": rand(5, 4, 64)}, "q must have 4 dimensions"),
    (VARLEN, {"k": rand(1, 7, 2, 64)}, "k must have 3 dimensions"),
    (DENSE, {"k": rand(3, 7, 2, 64)}, r"k must have shape \(2, 7, 2, 64\)"),
    (DENSE, {"k": rand(2, 7, 2, 56)}, r"k must have shape \(2, 7, 2, 64\)"),
    (DENSE, {"v": rand(2, 6, 2, 64)}, r"v must have shape \(2, 7, 2, 64\)"),
    (DENSE, {"v": rand(2, 7, 1, 64)}, r"v must have shape \(2, 7, 2, 64\)"),
    (VARLEN, {"v": rand(6, 2, 64)}, r"v must have shape \(7, 2, 64\)"),
    (PAGED, {"v": rand(8, 16, 2, 64)}, r"v must have shape \(9, 16, 2, 64\)"),
    (ROWS, {"v": rand(2, 7, 2, 64)}, r"v must have shape \(3, 7, 2, 64\)"),
    (DENSE, {"q": rand(2, 5, 3, 64)}, "q's heads must be a multiple of k's, got 3 and 2"),
    (DENSE, {"q": rand(2, 5, 4, 0), "k": rand(2, 7, 2, 0)}, "head_dim must be at least 1, got 0 and 64"),
    (DENSE, {"v": rand(2, 7, 2, 0)}, "head_dim must be at least 1, got 64 and 0"),
    (DENSE, {name: rand(2, 1, 2, 64).expand(-1, MOST_ROWS - 4, -1, -1) for name in "kv"}, "q and k have at most"),
    (PAGED, {name: rand(1, 16, 2, 64).expand(MOST_ROWS + 1, -1, -1, -1) for name in "kv"}, "k has at most .* pages"),
    (VARLEN, {"cu_seqlens_q": torch.tensor([0, 3, 5])}, "cu_seqlens_q must have dtype"),
    (VARLEN, {"cu_seqlens_q": zeros(1, 3)}, r"cu_seqlens_q must have shape \(3\)"),
    (VARLEN, {"cu_seqlens_q": zeros(0)}, "cu_seqlens_q must hold at least one offset"),
    (VARLEN, {"cu_seqlens_k": zeros(2)}, r"cu_seqlens_k must have shape \(3\)"),
    (VARLEN, {"cu_seqlens_k": zeros(6)[::2]}, "cu_seqlens_k must be contiguous"),
    (
        DENSE,
        {"cu_seqlens_k": zeros(3), "k": rand(7, 2, 64), "v": rand(7, 2, 64)},
        "cu_seqlens_k goes with cu_seqlens_q",
    ),
    (VARLEN, {"cache_batch_idx": zeros(2)}, "cache_batch_idx goes with a cache"),
    (DENSE, {"seqused_q": zeros(3)}, r"seqused_q must have shape \(2\)"),
    (DENSE, {"seqused_k": zeros(1)}, r"seqused_k must have shape \(2\)"),
    (DENSE, {"leftpad_k": zeros(1)}, r"leftpad_k must have shape \(2\)"),
    (ROWS, {"cache_batch_idx": zeros(1)}, r"cache_batch_idx must have shape \(2\)"),
    (DENSE, {"scheduler_metadata": zeros(2)}, "scheduler_metadata must hold at least 3 elements, got 2"),
    (PAGED, {"block_table": zeros(3, 3)}, "block_table must have 2 rows, got 3"),
    (PAGED, {"block_table": zeros(3)}, "block_table must have 2 dimensions"),
    (PAGED, {"block_table": zeros(2, 3).long()}, "block_table must be int32"),
    (PAGED, {"block_table": zeros(3, 2).mT}, "block_table must have rows of stride 1"),
    (PAGED, {"k": rand(9, 0, 2, 64), "v": rand(9, 0, 2, 64)}, "k must have pages of at least one row"),
    (DENSE, {"s_aux": rand(2)}, r"s_aux must have shape \(4\)"),
    (DENSE, {"alibi_slopes": torch.ones(2)}, r"alibi_slopes must have shape \(4\)"),
    (DENSE, {"alibi_slopes": torch.ones(1, 4)}, r"alibi_slopes must have shape \(2, 4\)"),
    (DENSE, {"alibi_slopes": rand(4)}, "alibi_slopes must be float32"),
    (DENSE, {"alibi_slopes": torch.ones(4, 2).mT}, "alibi_slopes must have stride 1 over heads"),
    (DENSE, {"softmax_scale": math.inf}, "softmax_scale must be finite, got inf"),
    (DENSE, {"softcap": -1.0}, "softcap must be at least 0, got -1"),
    (DENSE, {"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1"),
    (DENSE, {"dropout_p": 0.5}, "rng_state must be given with dropout_p"),
    (DENSE, {"dropout_p": 0.5, "rng_state": zeros(2)}, "rng_state must be int64"),
    (DENSE, {"dropout_p": 0.5, "rng_state": zeros(1).long()}, r"rng_state must have shape \(2\)"),
    (DENSE, {"dropout_p": 0.5, "rng_state": zeros(4).long()[::2]}, "rng_state must be contiguous"),
    (DENSE, {"num_splits": 257}, r"num_splits must be in \[0, 256\], got 257"),
    (DENSE, {"num_splits": -1}, r"num_splits must be in \[0, 256\], got -1"),
    (DENSE, {"arch": 70}, "arch must be 80 or 90, got 70"),
]


def call(op, given):
    """Arguments that aren't given are None."""
    return op(*(given.get(argument.name) for argument in op._schema.arguments))


@pytest.mark.parametrize(("valid", "changes", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_forward(valid, changes, message):
    with pytest.raises(RuntimeError, match=f"flash_attn: {message}"):
        call(ops.forward.default, valid | changes)


def test_a_kernel_that_was_not_built():
    wide = {"q": rand(2, 5, 4, 256), "k": rand(2, 7, 2, 256), "v": rand(2, 7, 2, 256)}
    with pytest.raises(RuntimeError, match='the kernel for {.*"head_dim": 256.* was left out of this build by'):
        call(ops.forward.default, DENSE | wide)
    grads = {"out": wide["q"], "dout": wide["q"], "lse": torch.zeros(2, 4, 5)}
    with pytest.raises(RuntimeError, match='the backward kernel for {.*"head_dim": 256.* was left out of this build'):
        call(ops.backward.default, DENSE | wide | grads)


@pytest.mark.parametrize("valid", [DENSE, VARLEN, PAGED, ROWS])
def test_what_the_others_depart_from_is_right(valid):
    call(ops.forward.default, valid)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (rand(2, 5, 4, 64, dtype=torch.float16), "out must have q's dtype"),
        (rand(2, 5, 4, 56), "out must have q's shape with v's head_dim"),
        (rand(2, 4, 4, 64), "out must have q's shape with v's head_dim"),
    ],
)
def test_forward_out(out, message):
    with pytest.raises(RuntimeError, match=message):
        call(ops.forward_out.default, DENSE | {"out": out})


BACKWARD = DENSE | {"out": rand(2, 5, 4, 64), "lse": torch.zeros(2, 4, 5), "dout": rand(2, 5, 4, 64)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": rand(2, 5, 4, 56)}, "out must be the forward's"),
        ({"out": rand(2, 5, 4, 64, dtype=torch.float16)}, "out must be the forward's"),
        ({"lse": torch.zeros(2, 5, 4)}, "lse must be the forward's"),
        ({"lse": torch.zeros(2, 4, 5).double()}, "lse must be the forward's"),
        ({"dout": None}, "dout or dlse must be given"),
        ({"dout": rand(2, 5, 4, 56)}, r"dout must have the shape \(2, 5, 4, 64\)"),
        ({"dout": rand(2, 5, 4, 64, dtype=torch.float16)}, "dout must have q's dtype"),
        ({"dlse": torch.zeros(2, 4, 6)}, r"dlse must have the shape \(2, 4, 5\)"),
        ({"dlse": rand(2, 4, 5)}, "dlse must have lse's dtype"),
    ],
)
def test_backward(changes, message):
    with pytest.raises(RuntimeError, match=message):
        call(ops.backward.default, BACKWARD | changes)


@pytest.mark.parametrize("name", ["dq", "dk", "dv"])
def test_backward_out(name):
    grads = {"dq": rand(2, 5, 4, 64), "dk": rand(2, 7, 2, 64), "dv": rand(2, 7, 2, 64)}
    call(ops.backward_out.default, BACKWARD | grads)
    for wrong, message in ((grads[name][:, 1:], "the shape"), (grads[name].half(), "q's dtype")):
        with pytest.raises(RuntimeError, match=f"{name} must have {message}"):
            call(ops.backward_out.default, BACKWARD | grads | {name: wrong})


def test_gradients_must_not_overlap():
    """Those of a fused projection only interleave."""
    queries = {"q": rand(2, 7, 2, 64), "dout": rand(2, 7, 2, 64), "out": rand(2, 7, 2, 64), "lse": torch.zeros(2, 2, 7)}
    names, memory = ("dq", "dk", "dv"), rand(3, 2, 7, 2, 64)
    fused = dict(zip(names, rand(2, 7, 2, 3, 64).unbind(3), strict=True))
    call(ops.backward_out.default, BACKWARD | queries | fused)
    for name, other in itertools.permutations(names, 2):
        grads = dict(zip(names, memory, strict=True)) | {name: memory[names.index(other)]}
        with pytest.raises(RuntimeError, match="dq, dk and dv must not overlap one another"):
            call(ops.backward_out.default, BACKWARD | queries | grads)
    given = BACKWARD | queries | fused
    for name, read in itertools.product(("dk", "dv"), ("q", "k", "v", "dout")):
        with pytest.raises(RuntimeError, match="dk and dv must not overlap q, k, v or dout"):
            call(ops.backward_out.default, given | {name: given[read]})
    call(ops.backward_out.default, BACKWARD | queries | fused | {"dq": queries["dout"]})


def test_attn_probs():
    valid = VARLEN | {"lse": torch.zeros(4, 5), "dropout_p": 0.5, "rng_state": torch.zeros(2, dtype=torch.int64)}
    call(ops.attn_probs.default, valid)
    for changes, message in (
        ({"lse": torch.zeros(2, 4, 3)}, "lse must be the forward's"),
        ({"max_seqlen_q": -1}, "max_seqlen_q must be in"),
        ({"max_seqlen_k": 2**31}, "max_seqlen_k must be in"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(ops.attn_probs.default, valid | changes)
