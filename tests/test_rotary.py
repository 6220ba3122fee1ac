"""flash_attn.layers.rotary against complex numbers in float64, and as other libraries call it."""

import dataclasses
import importlib

import numpy as np
import pytest
import torch
from rotation_oracle import (
    BATCH,
    COS,
    CU_SEQLENS,
    HEAD_DIM,
    HEADS,
    LENGTHS,
    OFFSETS,
    ROWS,
    SEQLEN,
    SIN,
    X,
    expected,
    positions_of,
    tables,
)

from flash_attn.layers.rotary import RotaryEmbedding, apply_rotary, apply_rotary_emb


@dataclasses.dataclass(frozen=True)
class Call:
    name: str
    packed: bool = False
    offsets: object = 0
    interleaved: bool = False
    conjugate: bool = False
    rotary_dim: int = HEAD_DIM
    dtype: torch.dtype = torch.float64
    table_dtype: torch.dtype | None = None

    def make(self):
        x = torch.randn(13, HEADS, HEAD_DIM) if self.packed else torch.randn(BATCH, SEQLEN, HEADS, HEAD_DIM)
        cos, sin = tables(self.rotary_dim, self.table_dtype or self.dtype)
        return x.to(self.dtype), cos, sin

    @property
    def options(self):
        layout = {"cu_seqlens": CU_SEQLENS, "max_seqlen": max(LENGTHS)} if self.packed else {}
        return dict(seqlen_offsets=self.offsets, interleaved=self.interleaved, conjugate=self.conjugate, **layout)


CALLS = [
    Call("dense"),
    Call("dense_offset", offsets=9),
    Call("dense_offsets", offsets=OFFSETS),
    Call("dense_offsets_int64", offsets=OFFSETS.long()),
    Call("dense_interleaved", interleaved=True),
    Call("dense_partial", rotary_dim=10),
    Call("dense_partial_interleaved", rotary_dim=10, interleaved=True, offsets=OFFSETS),
    Call("dense_nothing_rotated", rotary_dim=0),
    Call("dense_conjugate", conjugate=True, offsets=3),
    Call("dense_bfloat16", dtype=torch.bfloat16),
    Call("dense_float16_tables_float32", dtype=torch.float16, table_dtype=torch.float32),
    Call("packed_with_unused_tokens", packed=True),
    Call("packed_offset", packed=True, offsets=9),
    Call("packed_offsets_interleaved", packed=True, offsets=OFFSETS, interleaved=True),
    Call("packed_conjugate_float32", packed=True, offsets=OFFSETS, conjugate=True, dtype=torch.float32),
]


@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_values(call, inplace):
    x, cos, sin = call.make()
    want = expected(x, cos, sin, positions_of(call.packed, call.offsets), call.interleaved, call.conjugate)
    before = x.clone()
    out = apply_rotary(x, cos, sin, inplace=inplace, **call.options)
    assert out.dtype == x.dtype and (out is x) == inplace and (inplace or torch.equal(x, before))
    # Half a unit of the result's last place, and two products and a sum in the type that computes.
    unit = torch.finfo(call.dtype).eps / 2
    computed = torch.finfo(torch.promote_types(call.dtype, torch.float32)).eps
    assert ((out.double() - want).abs() <= unit * want.abs() + 4 * computed * before.double().abs().amax()).all()


def test_strided_input_in_place():
    """A view of the queries of a fused projection: the keys and values beside it stay."""
    qkv = torch.randn(BATCH, SEQLEN, 3, HEADS, HEAD_DIM)
    before = qkv.clone()
    cos, sin = tables(HEAD_DIM, torch.float32)
    apply_rotary_emb(qkv[:, :, 0], cos, sin, inplace=True)
    assert torch.equal(qkv[:, :, 1:], before[:, :, 1:])
    assert torch.equal(qkv[:, :, 0], apply_rotary_emb(before[:, :, 0], cos, sin))


# What is rotated in place while its gradient is recorded, as models do it.
IN_PLACE = {
    "result": lambda leaf: leaf * 1,
    "leaf": lambda leaf: leaf,
    "one of several views": lambda leaf: torch.stack((leaf, leaf), dim=2).unbind(2)[0],
    "slice": lambda leaf: torch.cat((leaf, leaf), dim=2)[:, :, :HEADS],
}


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("inplace", (False, True))
def test_gradient_is_the_conjugate_rotation(inplace, name):
    x, cos, sin = CALLS[0].make()
    leaf = x.clone().requires_grad_()
    dout = torch.randn_like(x)
    rotated = apply_rotary_emb(IN_PLACE[name](leaf), cos, sin, inplace=inplace, seqlen_offsets=OFFSETS)
    assert torch.equal(rotated, apply_rotary_emb(x, cos, sin, seqlen_offsets=OFFSETS))
    rotated.backward(dout)
    torch.testing.assert_close(leaf.grad, apply_rotary(dout, cos, sin, OFFSETS, conjugate=True))


def test_gradients_of_gradients():
    x, cos, sin = CALLS[0].make()
    x = x[:1, :2].requires_grad_()
    options = dict(interleaved=True, conjugate=True)
    assert torch.autograd.gradcheck(lambda x: apply_rotary(x, cos, sin, 1, **options), x)
    assert torch.autograd.gradgradcheck(lambda x: apply_rotary(x, cos, sin, 1, **options).pow(2), x)


def test_values_that_another_gradient_needs():
    """The rotation in place would falsify it, so torch must notice."""
    x, cos, sin = CALLS[0].make()
    activated = x.requires_grad_().exp()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        apply_rotary_emb(activated, cos, sin, inplace=True).sum().backward()


def test_compiles_without_breaks_or_new_graphs():
    def both(x, packed, cos, sin, offsets, cu_seqlens):
        rotated = apply_rotary_emb(x, cos, sin, seqlen_offsets=2)
        rotated = apply_rotary_emb(rotated, cos, sin, interleaved=True, seqlen_offsets=offsets)
        return rotated, apply_rotary_emb(packed * 1, cos, sin, inplace=True, cu_seqlens=cu_seqlens)

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend="aot_eager")
    cos, sin = tables(HEAD_DIM, torch.float32)
    for batch, seqlen in ((2, 5), (3, 9)):
        x = torch.randn(batch, seqlen, HEADS, HEAD_DIM)
        offsets = torch.arange(batch, dtype=torch.int32)
        cu_seqlens = torch.arange(0, batch * seqlen + 1, seqlen, dtype=torch.int32)
        arguments = (x, x.flatten(0, 1), cos, sin, offsets, cu_seqlens)
        for ours, eager in zip(compiled(*arguments), both(*arguments), strict=True):
            torch.testing.assert_close(ours, eager)


def test_positions_without_a_row():
    """The CPU looks at them."""
    x, cos, sin = CALLS[0].make()
    far = torch.tensor([0, ROWS - SEQLEN + 1, 0], dtype=torch.int32)
    with pytest.raises(ValueError, match="cos and sin must have a row for each position, got 40 of 40"):
        apply_rotary(x, cos, sin, far)
    with pytest.raises(ValueError, match="got -1 of 40"):
        apply_rotary(x, cos, sin, far.clamp(max=0) - 1)
    for last in (0, ROWS - SEQLEN):
        apply_rotary(x, cos, sin, torch.full((BATCH,), last))
    empty, lengths = torch.randn(0, HEADS, HEAD_DIM), torch.zeros(1, dtype=torch.int32)
    assert apply_rotary(empty, *tables(HEAD_DIM, rows=0), cu_seqlens=lengths, max_seqlen=0).shape == empty.shape


def test_positions_without_a_row_that_nobody_reads():
    """Under torch.compile, as on a GPU: such tokens stay as they are."""
    x, cos, sin = CALLS[0].make()
    far = torch.tensor([ROWS - 3, -2, ROWS + 10], dtype=torch.int32)
    torch._dynamo.reset()
    rotate = torch.compile(apply_rotary, fullgraph=True, backend="aot_eager")
    places = {token: at for token, at in positions_of(False, far).items() if 0 <= at < ROWS}
    assert 0 < len(places) < BATCH * SEQLEN
    torch.testing.assert_close(rotate(x, cos, sin, far), expected(x, cos, sin, places, False))
    assert torch.equal(rotate(x, cos[:0], sin[:0], far), x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_no_read_from_a_gpu():
    x, cos, sin = (tensor.cuda() for tensor in dataclasses.replace(CALLS[0], packed=True).make())
    cu_seqlens, offsets = CU_SEQLENS.cuda(), OFFSETS.cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = apply_rotary(x, cos, sin, offsets, cu_seqlens)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want = expected(x.cpu(), cos.cpu(), sin.cpu(), positions_of(True, OFFSETS), False)
    torch.testing.assert_close(out.cpu(), want)


ERRORS = [
    ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
    ({"x": X.int()}, ValueError, "x must have dtype float16, bfloat16, float32 or float64, got torch.int32"),
    ({"x": X[0]}, ValueError, r"x must have the shape \(batch, seqlen, num_heads, head_dim\), got \(7, 2, 24\)"),
    ({"cu_seqlens": CU_SEQLENS}, ValueError, r"x must have the shape \(total, num_heads, head_dim\)"),
    ({"cos": COS[0]}, ValueError, r"cos must have the shape \(seqlen_rotary, rotary_dim / 2\), got \(12,\)"),
    ({"sin": SIN[1:]}, ValueError, r"sin must have the shape cos's = \(40, 12\), got \(39, 12\)"),
    ({"sin": SIN.to("meta")}, ValueError, "sin must be on x's device cpu, got meta"),
    ({"x": X[..., :22]}, ValueError, "cos must have at most head_dim / 2 columns of 22 / 2, got 12"),
    ({"seqlen_offsets": -1}, ValueError, r"seqlen_offsets must be in \[0, 2147483647\], got -1"),
    ({"x": X[0], "cu_seqlens": CU_SEQLENS, "seqlen_offsets": 2**32}, ValueError, "seqlen_offsets must be in"),
    ({"seqlen_offsets": 34}, ValueError, "cos and sin must have rows for the positions below 41, got 40 rows"),
    ({"seqlen_offsets": 1.5}, TypeError, "seqlen_offsets must be an int, got 1.5"),
    (
        {"seqlen_offsets": OFFSETS[:2]},
        ValueError,
        r"seqlen_offsets must have the shape \(batch,\) = \(3,\), got \(2,\)",
    ),
    ({"seqlen_offsets": OFFSETS.to("meta")}, ValueError, "seqlen_offsets must be on x's device cpu, got meta"),
    ({"seqlen_offsets": OFFSETS.float()}, ValueError, "seqlen_offsets must have dtype int32 or int64, got torch.float"),
    ({"max_seqlen": 7}, ValueError, "max_seqlen must not be given without cu_seqlens, got 7"),
    ({"x": X[0], "cu_seqlens": CU_SEQLENS, "max_seqlen": 41}, ValueError, "for the positions below 41, got 40 rows"),
    ({"x": X[0], "cu_seqlens": CU_SEQLENS, "max_seqlen": -1}, ValueError, "max_seqlen must be at least 0, got -1"),
    ({"x": X[0], "cu_seqlens": CU_SEQLENS[:0]}, ValueError, "cu_seqlens must have at least one element, got none"),
    ({"x": X[0], "cu_seqlens": CU_SEQLENS.long()}, ValueError, "cu_seqlens must have dtype torch.int32"),
    ({"interleaved": 1}, TypeError, "interleaved must be a bool, got 1"),
    ({"inplace": None}, TypeError, "inplace must be a bool, got None"),
    ({"x": X[:1].expand(2, -1, -1, -1), "inplace": True}, ValueError, "x must not overlap itself, got stride"),
    ({"x": X.to_sparse()}, ValueError, "x must be a strided tensor, got layout torch.sparse_coo"),
    ({"sin": SIN.to_sparse()}, ValueError, "sin must be a strided tensor"),
    ({"cos": COS.clone().requires_grad_()}, NotImplementedError, "cos must not require grad"),
    ({"seqlen_offsets": np.array([1])}, TypeError, r"seqlen_offsets must be an int, got array\(\[1\]\)"),
]


@pytest.mark.parametrize("changed, error, message", ERRORS, ids=range(len(ERRORS)))
def test_errors(changed, error, message):
    with pytest.raises(error, match=message):
        apply_rotary(**{"x": X, "cos": COS, "sin": SIN, **changed})


# ---- As others call it ---------------------------------------------------------------------------------------------


def test_module_that_vllm_looks_up():
    assert importlib.import_module("flash_attn.ops.triton.rotary").apply_rotary is apply_rotary


def test_layer_of_modernbert():
    """transformers 4.48 to 4.57: a subclass with tables of its own length, and a rotation of the queries and keys of
    packed tokens in place, inside of an autograd function.
    """

    class Rotation(torch.autograd.Function):
        @staticmethod
        def forward(ctx, qkv, cos, sin, cu_seqlens, max_seqlen):
            ctx.save_for_backward(cos, sin, cu_seqlens)
            ctx.max_seqlen = max_seqlen
            qkv = qkv.contiguous()
            rotate_packed(qkv, cos, sin, cu_seqlens, max_seqlen)
            return qkv

        @staticmethod
        def backward(ctx, dqkv):
            dqkv = dqkv.contiguous()
            rotate_packed(dqkv, *ctx.saved_tensors, ctx.max_seqlen, conjugate=True)
            return dqkv, None, None, None, None

    def rotate_packed(qkv, cos, sin, cu_seqlens, max_seqlen, **options):
        both = qkv[:, :2].view(qkv.shape[0], -1, qkv.shape[-1])
        apply_rotary(
            both, cos, sin, seqlen_offsets=0, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, interleaved=False,
            inplace=True, **options,
        )  # fmt: skip

    class Embedding(RotaryEmbedding):
        def __init__(self, dim, base, max_seqlen):
            super().__init__(dim=dim, base=base, pos_idx_in_fp32=True, device=None, interleaved=False)
            self._update_cos_sin_cache(max_seqlen, device="cpu", dtype=torch.float64)

        def forward(self, qkv, cu_seqlens, max_seqlen):
            self._update_cos_sin_cache(max_seqlen, device=qkv.device, dtype=qkv.dtype)
            return Rotation.apply(qkv, self._cos_cached, self._sin_cached, cu_seqlens, max_seqlen)

    layer = Embedding(HEAD_DIM, 10000.0, ROWS)
    qkv = torch.randn(11, 3, HEADS, HEAD_DIM, dtype=torch.float64)
    leaf = qkv.clone().requires_grad_()
    out = layer(leaf * 1, CU_SEQLENS, max(LENGTHS))
    places = positions_of(True, 0)
    for part in (0, 1):
        want = expected(qkv[:, part], layer._cos_cached, layer._sin_cached, places, False)
        torch.testing.assert_close(out[:, part], want)
    assert torch.equal(out[:, 2], qkv[:, 2])
    dout = torch.randn_like(qkv)
    out.backward(dout.clone())
    want = expected(dout[:, 0], layer._cos_cached, layer._sin_cached, places, False, conjugate=True)
    torch.testing.assert_close(leaf.grad[:, 0], want)
    assert torch.equal(leaf.grad[:, 2], dout[:, 2])
