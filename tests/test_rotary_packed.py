"""flash_attn.layers.rotary on queries, keys and values in one tensor."""

import pytest
import torch
from rotation_oracle import BATCH, COS, HEAD_DIM, HEADS, ROWS, SEQLEN, SIN, X, tables

from flash_attn.layers import rotary
from flash_attn.layers.rotary import RotaryEmbedding, apply_rotary

QKV_SHAPES = (((BATCH, SEQLEN, 3, HEADS, HEAD_DIM), None), ((BATCH, SEQLEN, 8, HEAD_DIM), 4))


@pytest.mark.parametrize("shape, heads", QKV_SHAPES, ids=("5d", "4d"))
def test_qkv_and_kv(shape, heads):
    qkv = torch.randn(shape)
    parts = qkv.clone().unbind(2) if heads is None else qkv.clone().split((4, 2, 2), dim=2)
    tables_k = tables(HEAD_DIM, torch.float32, ROWS + 1)
    assert rotary.apply_rotary_emb_qkv_(qkv, COS, SIN, *tables_k, seqlen_offsets=3, num_heads_q=heads) is qkv
    q, k, v = qkv.unbind(2) if heads is None else qkv.split((4, 2, 2), dim=2)
    assert torch.equal(q, apply_rotary(parts[0], COS, SIN, 3)) and torch.equal(v, parts[2])
    assert torch.equal(k, apply_rotary(parts[1], *tables_k, 3))

    kv = torch.stack(parts[1:], dim=2)
    assert rotary.apply_rotary_emb_kv_(kv, COS, SIN, interleaved=True) is kv
    assert torch.equal(kv[:, :, 0], apply_rotary(parts[1], COS, SIN, interleaved=True))
    assert torch.equal(kv[:, :, 1], parts[2])


def test_gradient_with_tables_of_the_keys():
    tables_k = tables(HEAD_DIM, torch.float32, ROWS + 1)
    leaf, dout = torch.randn(BATCH, SEQLEN, 3, HEADS, HEAD_DIM).requires_grad_(), torch.randn(3, 7, 3, 2, HEAD_DIM)
    rotary.apply_rotary_emb_qkv_(leaf * 1, COS, SIN, *(-table for table in tables_k), seqlen_offsets=3).backward(dout)
    back = [apply_rotary(dout[:, :, 0], COS, SIN, 3, conjugate=True)]
    back += [-apply_rotary(dout[:, :, 1], *tables_k, 3, conjugate=True), dout[:, :, 2]]
    torch.testing.assert_close(leaf.grad, torch.stack(back, dim=2))


@pytest.mark.parametrize("place", (0, 1))
def test_keys_may_have_one_table_of_their_own(place):
    both, one = [COS, SIN], [None, None]
    both[place] = one[place] = -[COS, SIN][place]
    qkv = torch.randn(BATCH, SEQLEN, 3, HEADS, HEAD_DIM)
    ours, theirs = (rotary.apply_rotary_emb_qkv_(qkv.clone(), COS, SIN, *keys) for keys in (one, both))
    assert torch.equal(ours, theirs) and not torch.equal(ours, rotary.apply_rotary_emb_qkv_(qkv, COS, SIN))


@pytest.mark.parametrize("heads", (0, HEADS))
def test_queries_or_keys_may_have_no_heads(heads):
    x = X.clone()
    assert rotary.apply_rotary_emb_qkv_(x, COS, SIN, num_heads_q=heads) is x
    keys = apply_rotary(X[:, :, :1], COS, SIN)
    assert torch.equal(x, torch.cat((keys, X[:, :, 1:]), dim=2) if heads == 0 else apply_rotary(X, COS, SIN))


@pytest.mark.parametrize("compiled", (False, True))
@pytest.mark.parametrize("shape, heads", QKV_SHAPES, ids=("5d", "4d"))
def test_training_with_an_embedding(shape, heads, compiled):
    layer = RotaryEmbedding(HEAD_DIM)
    call = layer
    if compiled:
        torch._dynamo.reset()
        call = torch.compile(layer, fullgraph=True, backend="aot_eager")
    leaf = torch.randn(shape, requires_grad=True)
    weights = torch.randn(shape)
    (call(leaf * 1, seqlen_offset=3, num_heads_q=heads) * weights).sum().backward()
    want = weights.clone()
    cos, sin = layer._cos_cached, layer._sin_cached
    for place in (0, 1) if heads is None else (slice(0, 4), slice(4, 6)):
        apply_rotary(want[:, :, place], cos, sin, 3, conjugate=True, inplace=True)
    torch.testing.assert_close(leaf.grad, want)


def test_training_with_queries_and_keys_apart():
    layer = RotaryEmbedding(HEAD_DIM)
    q = torch.randn(BATCH, SEQLEN, HEADS, HEAD_DIM, requires_grad=True)
    kv = torch.randn(BATCH, SEQLEN, 2, HEADS, HEAD_DIM, requires_grad=True)
    rotated_q, rotated_kv = layer(q * 1, kv * 1)
    (rotated_q.sum() + rotated_kv.sum()).backward()
    ones = torch.ones(BATCH, SEQLEN, HEADS, HEAD_DIM)
    turned = apply_rotary(ones, layer._cos_cached, layer._sin_cached, conjugate=True)
    torch.testing.assert_close(q.grad, turned)
    torch.testing.assert_close(kv.grad, torch.stack((turned, ones), dim=2))


def test_errors_of_qkv_and_kv():
    with pytest.raises(ValueError, match=r"qkv must have the shape \(batch, seqlen, 3, num_heads, head_dim\)"):
        rotary.apply_rotary_emb_qkv_(X, COS, SIN)
    with pytest.raises(ValueError, match=r"qkv must have the shape .*, got \(7, 2, 3, 24\)"):
        rotary.apply_rotary_emb_qkv_(torch.zeros(7, 2, 3, 24), COS, SIN)
    for heads in (1, -2, 4):
        with pytest.raises(ValueError, match=f"num_heads_q must leave an even number of qkv's 2 heads, got {heads}"):
            rotary.apply_rotary_emb_qkv_(X, COS, SIN, num_heads_q=heads)
    with pytest.raises(TypeError, match="num_heads_q must be an int, got 2.0"):
        rotary.apply_rotary_emb_qkv_(X, COS, SIN, num_heads_q=2.0)
    stacked = torch.stack((X, X, X), dim=2)
    for function, packed in ((rotary.apply_rotary_emb_qkv_, stacked), (rotary.apply_rotary_emb_kv_, stacked[:, :, :2])):
        with pytest.raises(TypeError, match="interleaved must be a bool, got 1"):
            function(packed, COS, SIN, interleaved=1)
    with pytest.raises(ValueError, match=r"kv must have the shape \(batch, seqlen, 2, num_heads_k, head_dim\)"):
        rotary.apply_rotary_emb_kv_(X, COS, SIN)


QKV, KV = torch.randn(BATCH, SEQLEN, 3, HEADS, HEAD_DIM), torch.randn(BATCH, SEQLEN, 2, HEADS, HEAD_DIM)
PACKED_ERRORS = [
    (rotary.apply_rotary_emb_qkv_, (QKV.int(), COS, SIN), "qkv must have dtype float16"),
    (rotary.apply_rotary_emb_qkv_, (QKV[:1].expand_as(QKV), COS, SIN), "qkv must not overlap itself"),
    (rotary.apply_rotary_emb_qkv_, (QKV, COS, SIN, COS.to("meta"), SIN), "cos_k must be on qkv's device cpu, got meta"),
    (rotary.apply_rotary_emb_qkv_, (QKV, COS, SIN, None, SIN[1:]), "sin_k must have the shape cos's = "),
    (
        rotary.apply_rotary_emb_qkv_,
        (QKV, COS, SIN, COS[:5], SIN[:5]),
        "cos_k and sin_k must have rows for the positions",
    ),
    (rotary.apply_rotary_emb_kv_, (KV.int(), COS, SIN), "kv must have dtype float16"),
    (rotary.apply_rotary_emb_kv_, (KV.to_sparse(), COS, SIN), "kv must be a strided tensor"),
]


@pytest.mark.parametrize("function, arguments, message", PACKED_ERRORS, ids=[error[2][:20] for error in PACKED_ERRORS])
def test_errors_name_qkv_and_kv(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)
