"""The torch ops: schemas, fakes, gradients, and what they refuse.

test_compile.py and test_compiled_training.py have torch.compile, test_autograd.py modes and checkpoints,
test_transforms.py torch.func.
"""

import re
from pathlib import Path

import pytest
import torch
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from valid_calls import CU_K, CU_Q, TABLE, K, Q, V, grad, i32, rand

from flash_attn import (
    _ops,
    _plain,
    flash_attn_combine,
    flash_attn_func,
    flash_attn_with_kvcache,
)

ops = torch.ops.flash_attn
RNG = torch.tensor([123, 456])
SLOPES, SINKS = rand(4).abs(), rand(4)
PAGES = rand(4, 3, 2, 32), rand(4, 3, 2, 8)


def score(window=(-1, -1), softcap=0.0, dropout_p=0.0, longest=(0, 0)):
    return (*longest, 0.25, *window, softcap, dropout_p)


PLAIN = score()


def forward_arguments(
    q=Q, k=K, v=V, s_aux=None, slopes=None, rng=None, lengths=(None,) * 4, places=(None,) * 3, score=PLAIN
):
    return (q, k, v, s_aux, slopes, rng, *lengths, *places, None, *score, 0, None, False)


# One call per layout and per way to compute; small, since opcheck traces each several times.
FORWARD = {
    "dense": forward_arguments(),
    "everything": forward_arguments(
        s_aux=SINKS, slopes=SLOPES, rng=RNG, score=score(window=(3, 0), dropout_p=0.5, longest=(5, 7))
    ),
    "softcap": forward_arguments(score=score(softcap=2.0)),
    "float16": forward_arguments(Q.half(), K.half(), V.half()),
    "float64": forward_arguments(Q.double(), K.double(), V.double()),
    "strided": forward_arguments(Q.mT.contiguous().mT, K.transpose(1, 2).contiguous().transpose(1, 2)),
    "one_row": forward_arguments(Q[:, :1], K, V, score=score(window=(-1, 0))),
    "varlen": forward_arguments(Q[0], K[0], V[0], lengths=(CU_Q, CU_K, i32(1, 3), i32(0, 4))),
    "paged": forward_arguments(Q[0], *PAGES, lengths=(CU_Q, None, None, i32(3, 6)), places=(i32(0, 1), TABLE, None)),
    "cache": forward_arguments(lengths=(None, None, None, i32(3, 6)), places=(None, None, i32(1, 0))),
}
WITH_BACKWARD = [name for name in FORWARD if name not in ("paged", "cache")]


def requiring_grad(arguments):
    return tuple(
        grad(x) if isinstance(x, torch.Tensor) and x.is_floating_point() and i < 4 else x
        for i, x in enumerate(arguments)
    )


def backward_arguments(arguments):
    out, lse = ops.cpu_forward(*arguments)
    q, k, v, s_aux, slopes, rng, *lengths = arguments[:10]
    return (torch.randn_like(out), torch.randn_like(lse), q, k, v, out, lse, *arguments[3:10], *arguments[14:21], True)


# ---- opcheck ----


@pytest.mark.parametrize("name", FORWARD)
def test_opcheck_forward(name):
    opcheck(ops.cpu_forward.default, FORWARD[name])


@pytest.mark.parametrize("name", WITH_BACKWARD)
def test_opcheck_forward_with_gradients(name):
    opcheck(ops.cpu_forward.default, requiring_grad(FORWARD[name]))


def test_opcheck_scheduler_metadata():
    lengths, cu_seqlens_q = i32(70, 9, 0), i32(0, 1, 3, 4)
    for more in ((None, None), (cu_seqlens_q, i32(3, 0, 0))):
        opcheck(
            ops.scheduler_metadata.default,
            (lengths, *more, 8, 2, 64, 64, torch.bfloat16, 2, 80, 16, -1, 0, False, 3, None),
        )


@pytest.mark.parametrize("name", FORWARD)
def test_opcheck_forward_out(name):
    q, _, v = FORWARD[name][:3]
    opcheck(ops.cpu_forward_out.default, (*FORWARD[name], q.new_empty(*q.shape[:-1], v.shape[-1])))


@pytest.mark.parametrize("name", WITH_BACKWARD)
def test_opcheck_backward(name):
    opcheck(ops.cpu_backward.default, backward_arguments(FORWARD[name]))


def test_opcheck_attn_probs():
    for name in ("everything", "varlen", "paged"):
        arguments = forward_arguments(*FORWARD[name][:5], RNG, FORWARD[name][6:10], FORWARD[name][10:13])
        _, lse = ops.cpu_forward(*arguments)
        q, k = arguments[:2]
        for longest in ((5, 7), (129, 256)):  # hints but for packed sequences; the result's sizes are multiples of 128
            opcheck(
                ops.cpu_attn_probs.default,
                (q, k, lse, *arguments[4:13], *score(dropout_p=0.5, longest=longest)),
            )


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("paged", [False, True])
def test_opcheck_append_kv(rotary, paged):
    caches = (rand(4, 8, 2, 32), rand(4, 8, 2, 8)) if paged else (rand(2, 16, 2, 32), rand(2, 16, 2, 8))
    angles = (rand(16, 8), rand(16, 8)) if rotary else (None, None)
    new = K[:, :3], V[:, :3]
    opcheck(
        ops.cpu_append_kv.default,
        (*caches, *new, *angles, i32(4, 6), None, None, TABLE if paged else None, True),
    )


@pytest.mark.parametrize("cu_seqlens, x", [(None, Q), (CU_Q, Q[0])], ids=["dense", "varlen"])
def test_opcheck_rotary(cu_seqlens, x):
    for interleaved in (False, True):
        for advance in (False, True):
            opcheck(ops.cpu_rotary.default, (x, rand(16, 8), rand(16, 8), i32(4, 6), cu_seqlens, interleaved, advance))


@pytest.mark.parametrize("out_dtype", [None, torch.float16])
def test_opcheck_combine(out_dtype):
    opcheck(ops.cpu_combine.default, (rand(3, 2, 5, 4, 8), rand(3, 2, 5, 4), out_dtype))


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_cuda_op_has_the_same_arguments(name):
    """The C++ schema repeats the Python one, with the architecture at its end."""
    source = Path(__file__).parent.parent / f"csrc/api/{name}_args.h"
    if not source.exists():
        pytest.skip("no C++ sources beside the tests")
    macro = rf"#define FLASH_ATTN_{name.upper()}_SCHEMA_ARGS((?:.*\\\n)+.*)"
    text = "".join(re.findall(r'"([^"]*)"', re.search(macro, source.read_text()).group(1)))
    python = _ops._SCHEMAS[f"cpu_{name}"]
    assert text == python[1 : python.index(") ->")] + ", int arch"


@pytest.mark.parametrize("name", ["attn_probs", "append_kv", "rotary", "combine"])
def test_cuda_op_has_the_same_schema(name):
    source = Path(__file__).parent.parent / "csrc/api"
    if not source.exists():
        pytest.skip("no C++ sources beside the tests")
    text = "".join(file.read_text() for file in sorted(source.glob("*.h")))
    macro = re.search(rf"#define FLASH_ATTN_{name.upper()}_SCHEMA((?:.*\\\n)+.*)", text).group(1)
    assert "".join(re.findall(r'"([^"]*)"', macro)) == _ops._SCHEMAS[f"cpu_{name}"]


# ---- The direct call, which eager code takes, is the op ----


@pytest.mark.parametrize("name", WITH_BACKWARD)
def test_direct_call_equals_the_op(name):
    arguments = requiring_grad(FORWARD[name])
    leaves = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
    results = []
    for forward in (ops.cpu_forward, _ops._forward_with_gradient):
        out, lse = forward(*arguments)
        grads = torch.autograd.grad((out, lse), leaves, (torch.ones_like(out), torch.ones_like(lse)))
        results.append((out, lse, *grads))
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


# ---- Gradients ----


def test_only_needed_gradients_come_back():
    q, s_aux = grad(Q), grad(SINKS)
    flash_attn_func(q, K, V, s_aux=s_aux).sum().backward()
    assert q.grad.shape == q.shape and s_aux.grad.shape == (4,)


def test_no_gradient_comes_of_none():
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dout):
            return None

    q = grad(Q)
    Stop.apply(flash_attn_func(q, K, V)).sum().backward()
    assert q.grad is None


def test_gradient_of_the_lse_alone():
    q, v = grad(Q), grad(V)
    _, lse = flash_attn_func(q, K, v, return_softmax_lse=True)
    lse.sum().backward()
    assert q.grad.abs().sum() > 0 and v.grad.count_nonzero() == 0


@pytest.mark.parametrize("direct", [True, False])
def test_second_derivative_raises(direct):
    q = grad(Q)
    out, _ = (_ops._forward_with_gradient if direct else ops.cpu_forward)(*forward_arguments(q))
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="attention has no second derivative"):
        dq.sum().backward()


@pytest.mark.parametrize(
    "name, message", [("paged", "no backward through leftpad_k, block_table"), ("cache", "through cache_batch_idx")]
)
@pytest.mark.parametrize("direct", [True, False])
def test_backward_that_does_not_exist_raises(name, message, direct):
    out, _ = (_ops._forward_with_gradient if direct else ops.cpu_forward)(*requiring_grad(FORWARD[name]))
    with pytest.raises(NotImplementedError, match=message):
        out.sum().backward()


def append_call(q):
    caches = {"k_cache": torch.zeros(2, 16, 2, 32), "v_cache": torch.zeros(2, 16, 2, 8)}
    return {"q": q, **caches, "k": K[:, :3], "v": V[:, :3], "cache_seqlens": i32(4, 6)}


def test_query_gradient_through_an_append():
    """The caches were written before the op saved them, so the gradient is that of attention to them."""
    q, other = grad(Q), grad(Q)
    call = append_call(q)
    out = flash_attn_with_kvcache(**call)
    out.sum().backward()
    caches = {"k_cache": call["k_cache"], "v_cache": call["v_cache"]}
    flash_attn_with_kvcache(other, **caches, cache_seqlens=i32(7, 9)).sum().backward()
    torch.testing.assert_close(q.grad, other.grad, rtol=0, atol=0)


def test_query_gradient_after_another_append_raises():
    call = append_call(grad(Q))
    out = flash_attn_with_kvcache(**call)
    flash_attn_with_kvcache(**{**call, "q": Q, "cache_seqlens": i32(7, 9)})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_rotary_has_no_gradient():
    out = flash_attn_with_kvcache(**append_call(grad(Q)), rotary_cos=rand(16, 8), rotary_sin=rand(16, 8))
    with pytest.raises(NotImplementedError, match="no backward through the rotary embedding"):
        out.sum().backward()


def test_combine_has_no_gradient():
    out, _ = flash_attn_combine(grad(rand(3, 2, 5, 4, 8)), rand(3, 2, 5, 4))
    with pytest.raises(NotImplementedError, match="no backward through flash_attn_combine"):
        out.sum().backward()


@pytest.mark.parametrize("direct", [True, False])
def test_written_tensors_change_their_version(direct):
    """Autograd notices that a tensor which it saved was overwritten."""
    out, cache = rand(2, 5, 4, 8), rand(2, 16, 2, 32)
    versions = out._version, cache._version
    ops.cpu_forward_out(*FORWARD["dense"], out)
    arguments = (cache, rand(2, 16, 2, 8), K[:, :3], V[:, :3], None, None, i32(4, 6), None, None, None, True)
    _ops.append_kv("cpu", arguments) if direct else ops.cpu_append_kv(*arguments)
    assert out._version > versions[0] and cache._version > versions[1]


# ---- What goes straight to what computes ----


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return op(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


WATCHED = {
    "mode": Watching,
    "profiler": torch.profiler.profile,
    "forward mode": torch.autograd.forward_ad.dual_level,
}
NOT_PLAIN = {"subclass": Q.as_subclass(Subclass), "negative": torch._neg_view(Q)}


@pytest.mark.parametrize("watched", WATCHED)
def test_a_watched_call_is_not_plain(watched):
    with WATCHED[watched]():
        assert not _plain.is_plain(Q)
    assert _plain.is_plain(Q)


def test_a_transformed_call_is_not_plain():
    found = []
    torch.vmap(lambda x: found.append(_plain.is_plain(Q)) or x)(Q)
    assert found == [False]


@pytest.mark.parametrize("tensor", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_a_call_of_other_tensors_is_not_plain(tensor):
    assert _plain.is_plain(Q, None, K, torch.nn.Parameter(V))
    assert _plain.is_plain(tensor) is _plain.is_plain(Q, tensor) is _plain.is_plain(Q, K, tensor) is False


def test_a_call_without_gradients_is_plain():
    assert _plain.is_plain_without_grad(Q, K) and not _plain.is_plain_without_grad(Q, grad(K))
    with torch.no_grad():
        assert _plain.is_plain_without_grad(Q, grad(K))
        assert not _plain.is_plain_without_grad(Q, torch._neg_view(K))
