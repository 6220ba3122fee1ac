"""The modules of FlashAttention-2 that other libraries import, and the calls that those make.

TransformerEngine 2.20, xformers 0.0.35, diffusers 0.42 and ring-flash-attention call like this in their sources; the
libraries themselves aren't needed.
"""

import math
import re
import subprocess
import sys

import pytest
import torch
from valid_calls import CU_K, CU_Q, K, Q, V, grad, i32, rand

import flash_attn
import flash_attn_2_cuda
from flash_attn import flash_attn_interface as fi
from flash_attn import interface


def public(*tensors, **options):
    """out and LSE of the public function, and the gradients of q, k and v for out as the gradient of out."""
    leaves = [grad(tensor) for tensor in tensors[:3]]
    function = flash_attn.flash_attn_func if len(tensors) == 3 else flash_attn.flash_attn_varlen_func
    out, lse = function(*leaves, *tensors[3:], softmax_scale=0.2, causal=True, return_softmax_lse=True, **options)
    return (out, lse, *torch.autograd.grad(out, leaves, out.detach()))


def assert_same(ours, expected):
    torch.testing.assert_close(ours, tuple(tensor.detach() for tensor in expected), rtol=0, atol=0)


def test_xformers_dense():
    """13 and 19 arguments; gradients of a fused projection have one buffer."""
    q = K  # as many heads as keys
    out, lse, _, rng_state = fi.flash_attn_cuda.fwd(q, K, K, None, None, 0.0, 0.2, True, -1, -1, 0.0, False, None)
    dq, dk, dv = torch.empty(2, 7, 3, 2, 32).unbind(-3)
    fi.flash_attn_cuda.bwd(
        out, q, K, K, out, lse, dq, dk, dv, None, 0.0, 0.2, True, -1, -1, 0.0, False, None, rng_state
    )
    assert_same((out, lse, dq, dk, dv), public(q, K, K))


def test_xformers_varlen():
    """21 and 24 arguments."""
    q, k, v = Q[0], K[0], V[0]
    out, lse, _, rng_state = fi.flash_attn_gpu.varlen_fwd(
        q, k, v, None, CU_Q, CU_K, None, None, None, None, 3, 4, 0.0, 0.2, False, True, -1, -1, 0.0, False, None
    )
    grads = [torch.empty_like(x) for x in (q, k, v)]
    returned = fi.flash_attn_gpu.varlen_bwd(
        out, q, k, v, out, lse, *grads, CU_Q, CU_K, None, 3, 4, 0.0, 0.2, False, True, -1, -1, 0.0, False, None, None
    )
    assert [ours is place for ours, place in zip(returned, grads, strict=False)] == [True] * 3
    assert rng_state.shape == (2,)
    assert_same((out, lse, *grads), public(q, k, v, CU_Q, CU_K, 3, 4))


def test_a_server_writes_to_out_from_pages():
    """cu_seqlens_k has the capacities of pages, seqused_k the lengths; one more argument is num_splits."""
    pages_k, pages_v, table, out = rand(4, 3, 2, 32), rand(4, 3, 2, 8), i32(0, 1, 2, 3).view(2, 2), torch.empty(5, 4, 8)
    arguments = (Q[0], pages_k, pages_v, out, CU_Q, i32(0, 6, 12), i32(3, 6), None, table, None, 3, 6)
    arguments += (0.0, 0.2, False, True, -1, -1, 0.0, False, None)
    expected = flash_attn.flash_attn_varlen_func(
        Q[0], pages_k, pages_v, CU_Q, None, seqused_k=i32(3, 6), block_table=table, softmax_scale=0.2, causal=True
    )
    for more in ((), (0,), (2,)):
        out.fill_(math.nan)
        assert flash_attn_2_cuda.varlen_fwd(*arguments, *more)[0] is out
        torch.testing.assert_close(out, expected)
    with pytest.raises(ValueError, match=r"num_splits must be in \[0, 256\] \(0 chooses\), got 257"):
        flash_attn_2_cuda.varlen_fwd(*arguments, 257)


@pytest.mark.parametrize("packed", [False, True], ids=["bshd", "thd"])
def test_transformer_engine_context_parallel(packed):
    """Most arguments are keywords; results 0, 1 and 3 of the forward pass are used."""
    tensors = (Q[0], K[0], V[0], CU_Q, CU_K, 3, 4) if packed else (Q, K, V)
    forward_function = fi._flash_attn_varlen_forward if packed else fi._flash_attn_forward
    backward_function = fi._flash_attn_varlen_backward if packed else fi._flash_attn_backward
    options = {"softmax_scale": 0.2, "dropout_p": 0.0, "window_size_left": -1, "window_size_right": 0}
    options |= {"alibi_slopes": None, "softcap": 0.0}
    pages = {"block_table": None} if packed else {}
    results = forward_function(*tensors, causal=True, return_softmax=False, **pages, **options)
    out, lse, rng_state = results[0], results[1], results[3]
    grads = [torch.empty_like(tensor) for tensor in tensors[:3]]
    backward_function(
        out, *tensors[:3], out, lse, *grads, *tensors[3:], causal=True, rng_state=rng_state, deterministic=False,
        **options,
    )  # fmt: skip
    assert_same((out, lse, *grads), public(*tensors))


@pytest.mark.parametrize("length, kept", [(5, "view"), (5, "copy"), (4, "view"), (4, "as it was"), (4, "apart")])
def test_diffusers(length, kept):
    """A dropout that drops nothing, since FlashAttention-2 gives LSE and S_dmask with dropout only. LSE comes back
    transposed: as a view, also where there are as many rows as heads, or (for its hub kernels) a copy. What isn't
    transposed stays so, though other numbers lie between its own."""
    q = Q[:, :length]
    arguments = (1e-30, 0.2, True, -1, -1, 0.0, None)
    out, lse, _, rng_state = fi._wrapped_flash_attn_forward(q, K, V, *arguments, True)
    views = {"view": lse.permute(0, 2, 1), "copy": lse.permute(0, 2, 1).contiguous(), "as it was": lse}
    views["apart"] = torch.stack((lse, torch.full_like(lse, torch.nan)), dim=-1)[..., 0]
    grads = [torch.empty_like(tensor) for tensor in (q, K, V)]
    fi._wrapped_flash_attn_backward(out, q, K, V, out, views[kept], *grads, *arguments, False, rng_state)
    torch.testing.assert_close((out, lse, *grads), tuple(x.detach() for x in public(q, K, V)))


# ---- Names and imports ----


def test_public_functions_are_the_same_objects():
    for name in interface.__all__:
        assert getattr(fi, name) is getattr(flash_attn, name)
    assert fi.flash_attn_gpu is fi.flash_attn_cuda is flash_attn_2_cuda


def test_import_needs_no_gpu_and_starts_none():
    code = "import torch, flash_attn_2_cuda, flash_attn.flash_attn_interface; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- Errors ----

LSE = torch.zeros(2, 4, 5)
_SCORE = {"q": Q, "k": K, "v": V, "dropout_p": 0.0, "softmax_scale": 0.2, "causal": True, "window_size_left": -1}
_SCORE |= {"window_size_right": -1, "softcap": 0.0, "alibi_slopes": None}
FORWARD = _SCORE | {"return_softmax": False}
OUT = rand(2, 5, 4, 8)
BACKWARD = _SCORE | {"dout": OUT, "out": OUT, "softmax_lse": LSE, "dq": None, "dk": None, "dv": None}
BACKWARD |= {"deterministic": False}
PACKED = {"q": Q[0], "k": K[0], "v": V[0], "cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K, "max_seqlen_q": 3}
PACKED |= {"max_seqlen_k": 4}
PACKED_OUT = {"dout": OUT[0], "out": OUT[0], "softmax_lse": LSE[0]}
GRAD = torch.empty_like(V)
ERRORS = [
    (FORWARD, {"k": K.half()}, "k must have q's dtype torch.float32, got torch.float16"),
    (FORWARD, {"window_size_left": 1.5}, "window_size_left must be an int, got 1.5"),
    (FORWARD, {"return_softmax": 1}, "return_softmax must be a bool, got 1"),
    (FORWARD, {"dropout_p": 1.0}, "dropout_p must be in [0, 1), got 1.0"),
    (BACKWARD, {"dout": None}, "dout must be a torch.Tensor, got NoneType"),
    (BACKWARD, {"dout": OUT[:, :3]}, "dout must have the shape q's with head_dim_v = (2, 5, 4, 8), got (2, 3, 4, 8)"),
    (BACKWARD, {"out": OUT.half()}, "out must have q's dtype torch.float32, got torch.float16"),
    (BACKWARD, {"softmax_lse": LSE.double()}, "softmax_lse must have dtype torch.float32, got torch.float64"),
    (BACKWARD, {"softmax_lse": None}, "softmax_lse must be a torch.Tensor, got NoneType"),
    (BACKWARD, {"softmax_lse": LSE.to("meta")}, "softmax_lse must be on q's device cpu, got meta"),
    (BACKWARD, {"softmax_lse": LSE[:, :3]},
     "softmax_lse must have the shape (batch, num_heads, seqlen_q) = (2, 4, 5), got (2, 3, 5)"),
    (BACKWARD, {"dq": V}, "dq must have the shape q's = (2, 5, 4, 32), got (2, 7, 2, 8)"),
    (BACKWARD, {"dq": Q.to_sparse()}, "dq must be a strided tensor, got layout torch.sparse_coo"),
    (BACKWARD, {"dk": K.half()}, "dk must have q's dtype torch.float32, got torch.float16"),
    (BACKWARD, {"dk": K.mT.contiguous().mT}, "dk must have stride 1 in its last dimension, got stride (448, 64, 1, 2)"),
    (BACKWARD, {"dv": V[:1].expand(2, -1, -1, -1)}, "dv must not overlap itself, got stride (0, 16, 8, 1)"),
    (BACKWARD, {"dv": V.to("meta")}, "dv must be on q's device cpu, got meta"),
    (BACKWARD, {"q": Q[..., :8], "k": V, "dk": GRAD, "dv": GRAD}, "dv must not be the tensor given as dk"),
    (BACKWARD, {"deterministic": None}, "deterministic must be a bool, got None"),
    (BACKWARD, {"dropout_p": 0.5}, "rng_state must be what the forward pass returned when dropout_p > 0, got None"),
    (BACKWARD, {"dropout_p": 0.5, "rng_state": i32(1, 2)}, "rng_state must have dtype torch.int64, got torch.int32"),
    (BACKWARD, {"dropout_p": 0.5, "rng_state": torch.zeros(2).long().to("meta")},
     "rng_state must be on q's device cpu, got meta"),
    (BACKWARD, {"dropout_p": 0.5, "rng_state": torch.zeros(4).long()[::2]},
     "rng_state must be contiguous, got stride (2,)"),
    (BACKWARD, {"dropout_p": 0.5, "rng_state": torch.zeros(3).long()}, "rng_state must have the shape (2,) = (2,), "
     "got (3,)"),
    (FORWARD | PACKED, {"zero_tensors": 0}, "zero_tensors must be a bool, got 0"),
    (FORWARD | PACKED, {"cu_seqlens_k": i32(0, 7)}, "cu_seqlens_k must have the shape (batch + 1,) = (3,), got (2,)"),
    (BACKWARD | PACKED | PACKED_OUT, {"softmax_lse": LSE},
     "softmax_lse must have the shape (num_heads, total_q) = (4, 5), got (2, 4, 5)"),
]  # fmt: skip


@pytest.mark.parametrize("valid, changes, message", ERRORS, ids=[error[2][:60] for error in ERRORS])
def test_error(valid, changes, message):
    name = f"_flash_attn{'_varlen' * ('cu_seqlens_q' in valid)}_{'backward' if 'dout' in valid else 'forward'}"
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        getattr(fi, name)(**valid | changes)


def test_gen_must_be_a_generator_on_the_device():
    raw = (Q, K, V, None, None, 0.5, 0.2, False, -1, -1, 0.0, False)
    with pytest.raises(TypeError, match="gen must be a torch.Generator or None, got int"):
        flash_attn_2_cuda.fwd(*raw, 3)
    meta = tuple(x.to("meta") if isinstance(x, torch.Tensor) else x for x in raw)
    with pytest.raises(ValueError, match="gen must be on q's device meta, got cpu"):
        flash_attn_2_cuda.fwd(*meta, torch.Generator())
    with pytest.raises(TypeError, match="gen must be a torch.Generator or None, got int"):
        flash_attn_2_cuda.bwd(OUT, Q, K, V, OUT, LSE, None, None, None, *raw[4:11], False, 3, None)
