"""flash_attn.layers.rotary.RotaryEmbedding: its tables, and what it refuses."""

import pytest
import torch
from rotation_oracle import BATCH, HEAD_DIM, HEADS, OFFSETS, ROWS, SEQLEN, X
from torch._subclasses.fake_tensor import FakeTensorMode

from flash_attn.layers.rotary import RotaryEmbedding, apply_rotary


def test_embedding_rotates_by_its_frequencies():
    layer = RotaryEmbedding(16, base=500.0, interleaved=True)
    qkv = torch.randn(BATCH, SEQLEN, 3, HEADS, HEAD_DIM)
    angles = torch.outer(torch.arange(SEQLEN + 2.0), 500.0 ** (-torch.arange(0, 16, 2) / 16))
    want = [apply_rotary(part, angles.cos(), angles.sin(), 2, interleaved=True) for part in qkv.unbind(2)[:2]]
    assert layer(qkv, seqlen_offset=2) is qkv
    for part, expected_part in zip(qkv.unbind(2), want, strict=False):
        torch.testing.assert_close(part, expected_part)


def test_embedding_of_queries_and_keys_apart():
    layer = RotaryEmbedding(HEAD_DIM)
    q, kv = torch.randn(BATCH, SEQLEN, HEADS, HEAD_DIM), torch.randn(BATCH, SEQLEN, 2, 1, HEAD_DIM)
    fused = torch.cat((q, kv.flatten(2, 3)), dim=2)
    rotated_q, rotated_kv = layer(q, kv, seqlen_offset=OFFSETS, max_seqlen=ROWS)
    assert rotated_q is q and rotated_kv is kv
    layer(fused, seqlen_offset=OFFSETS, num_heads_q=HEADS)  # with the tables that it has
    assert torch.equal(fused, torch.cat((q, kv.flatten(2, 3)), dim=2))
    with pytest.raises(ValueError, match="max_seqlen must be given with a Tensor as the first seqlen_offset"):
        RotaryEmbedding(HEAD_DIM)(fused, seqlen_offset=OFFSETS, num_heads_q=HEADS)
    with pytest.raises(ValueError, match="num_heads_q must not be given with kv, got 2"):
        layer(q, kv, num_heads_q=2)


def test_embedding_keeps_its_tables():
    layer = RotaryEmbedding(HEAD_DIM)
    with torch.inference_mode():
        layer._update_cos_sin_cache(9, device="cpu", dtype=torch.float32)
    made_for_inference = layer._cos_cached
    layer._update_cos_sin_cache(8, device="cpu", dtype=torch.float32)
    kept = layer._cos_cached
    assert kept is not made_for_inference and not kept.is_inference()
    layer._update_cos_sin_cache(5, device="cpu", dtype=torch.float32)
    assert layer._cos_cached is kept
    layer._update_cos_sin_cache(layer._seq_len_cached + 1, device="cpu", dtype=torch.float32)
    assert layer._cos_cached is not kept and len(layer._cos_cached) > len(kept)
    assert torch.equal(layer._cos_cached[: len(kept)], kept)
    layer._update_cos_sin_cache(3, device="cpu", dtype=torch.bfloat16)
    assert layer._cos_cached.dtype == torch.bfloat16
    assert "inv_freq" not in layer.state_dict()


def test_embedding_after_a_fake_call():
    """Tools that ask for shapes call a model on tensors without memory first: what they leave is no table."""
    layer, qkv = RotaryEmbedding(HEAD_DIM), torch.randn(BATCH, SEQLEN, 3, HEADS, HEAD_DIM)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        layer(mode.from_tensor(qkv))
    expected = RotaryEmbedding(HEAD_DIM)(qkv.clone())
    assert torch.equal(layer(qkv), expected)


def test_compiled_embedding_that_has_its_tables():
    layer = RotaryEmbedding(HEAD_DIM)
    torch._dynamo.reset()
    fast = torch.compile(lambda qkv: layer(qkv * 1), fullgraph=True, backend="aot_eager")
    qkv = torch.randn(BATCH, SEQLEN, 3, HEADS, HEAD_DIM)
    for _ in range(2):
        torch.testing.assert_close(fast(qkv), layer(qkv * 1))


@pytest.mark.parametrize(
    "make",
    (
        lambda: RotaryEmbedding(HEAD_DIM).to(torch.bfloat16),
        lambda: RotaryEmbedding(HEAD_DIM).half().float(),
        lambda: RotaryEmbedding(HEAD_DIM, device="meta"),
        lambda: torch.nn.Sequential(RotaryEmbedding(HEAD_DIM, device="meta")).to_empty(device="cpu")[0],
    ),
    ids=("rounded", "rounded-before", "missing", "missing-before"),
)
def test_embedding_whose_buffer_is_rounded_or_missing(make):
    layer, exact = make(), RotaryEmbedding(HEAD_DIM)
    for each in (layer, exact):
        each._update_cos_sin_cache(ROWS, device="cpu", dtype=torch.float32)
    assert torch.equal(layer._cos_cached, exact._cos_cached) and torch.equal(layer._sin_cached, exact._sin_cached)


def test_embedding_whose_frequencies_a_model_scales():
    layer = RotaryEmbedding(HEAD_DIM)
    layer.inv_freq /= 2
    layer._update_cos_sin_cache(ROWS, dtype=torch.float64)
    angles = torch.outer(torch.arange(ROWS, dtype=torch.float32), layer.inv_freq)
    assert torch.equal(layer._cos_cached[:ROWS], angles.cos().double())
    assert torch.equal(layer._sin_cached[:ROWS], angles.sin().double())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_xpos_tables(dtype):
    """Their scale is 1 in the middle of the sequence (arXiv:2212.10554), and the keys' is one by the queries'."""
    layer, plain = RotaryEmbedding(HEAD_DIM, scale_base=4.0), RotaryEmbedding(HEAD_DIM)
    for each in (layer, plain):
        each._update_cos_sin_cache(9, device="cpu", dtype=torch.float32)
    pairs = torch.arange(0, HEAD_DIM, 2) / HEAD_DIM
    scale = ((pairs + 0.4) / 1.4) ** ((torch.arange(9) - 4) / 4.0)[:, None]
    layer._update_cos_sin_cache(9, device="cpu", dtype=dtype)
    for name in ("cos", "sin"):
        table = getattr(plain, f"_{name}_cached")[:9]
        torch.testing.assert_close(getattr(layer, f"_{name}_cached"), (table * scale).to(dtype))
        torch.testing.assert_close(getattr(layer, f"_{name}_k_cached"), (table / scale).to(dtype))
    torch.testing.assert_close(layer.scale, (pairs + 0.4) / 1.4)
    assert plain.scale is None and not layer.state_dict()


def test_xpos_scores_depend_on_distance():
    """The scales of a query and of a key cancel but for their distance, in the frequencies' way."""
    layer = RotaryEmbedding(HEAD_DIM, scale_base=4.0)
    q, k = torch.randn(2, 1, 1, 1, HEAD_DIM).expand(-1, -1, SEQLEN, -1, -1).double()
    kv = torch.stack((k, k), dim=2)
    rotated_q, rotated_kv = layer(q.clone(), kv)
    scores = torch.einsum("bihd,bjhd->bhij", rotated_q, rotated_kv[:, :, 0])[0, 0]
    for distance in range(-SEQLEN + 1, SEQLEN):
        same = scores.diagonal(distance)
        torch.testing.assert_close(same, same[:1].expand_as(same), rtol=1e-6, atol=1e-5)
    # One pair of columns alone: what is left of its score at a distance of 4 is the pair's base.
    only = torch.zeros(1, SEQLEN, 1, HEAD_DIM, dtype=torch.float64)
    only[..., 0] = 1
    rotated_q, rotated_kv = layer(only.clone(), torch.stack((only, only), dim=2))
    score = torch.dot(rotated_q[0, 5, 0], rotated_kv[0, 1, 0, 0])
    torch.testing.assert_close(score, torch.tensor(4.0).cos().double() * 0.4 / 1.4, rtol=1e-5, atol=0)


def test_errors_of_embedding():
    for dim in (0, -2, 2**64):
        with pytest.raises(ValueError, match=rf"dim must be in \[2, 2147483647\], got {dim}"):
            RotaryEmbedding(dim)
    with pytest.raises(ValueError, match="dim must be even, got 7"):
        RotaryEmbedding(7)
    with pytest.raises(TypeError, match="device must be a torch.device, got True"):
        RotaryEmbedding(8, 10000.0, False, None, True)
    with pytest.raises(TypeError, match="pos_idx_in_fp32 must be a bool, got 1"):
        RotaryEmbedding(8, pos_idx_in_fp32=1)
    with pytest.raises(TypeError, match="qkv must be a torch.Tensor, got list"):
        RotaryEmbedding(8)([1.0])
    with pytest.raises(NotImplementedError, match="pos_idx_in_fp32=False is not supported"):
        RotaryEmbedding(8, pos_idx_in_fp32=False)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"base": 0.0}, "base must be positive, got 0.0"),
        ({"base": -1}, "base must be positive, got -1"),
        ({"base": 1e39}, "base must be finite as a float32"),
        ({"scale_base": 0}, "scale_base must not be 0, got 0"),
    ],
    ids=str,
)
def test_bases_that_make_no_tables(arguments, message):
    with pytest.raises(ValueError, match=message):
        RotaryEmbedding(8, **arguments)


BAD_CALLS = [
    ({"qkv": torch.ones(4)}, "qkv must have 4 or 5 dimensions"),
    ({"qkv": X.int()}, "qkv must have dtype float16"),
    ({"max_seqlen": -1}, r"max_seqlen must be in \[0, 2147483647\], got -1"),
    ({"max_seqlen": 2**64}, "max_seqlen must be in .*, got 18446744073709551616"),
    ({"seqlen_offset": -1}, r"seqlen_offset must be in \[0, 2147483647\], got -1"),
    ({"kv": X}, r"kv must have the shape \(batch, seqlen, 2, num_heads_k, head_dim\)"),
    ({"kv": torch.ones(BATCH, 1, 1, 1, HEAD_DIM).expand(-1, SEQLEN, 2, -1, -1)}, "kv must not overlap itself"),
    ({"kv": torch.ones(BATCH, SEQLEN, 2, 1, 2)}, "cos must have at most head_dim / 2 columns of 2 / 2"),
]


@pytest.mark.parametrize("changes, message", BAD_CALLS, ids=[message[:20] for _, message in BAD_CALLS])
def test_an_error_of_embedding_rotates_nothing(changes, message):
    """Whoever calls again must not find queries that have been rotated once already."""
    layer, q = RotaryEmbedding(HEAD_DIM), X.clone()
    arguments = {"qkv": q, "kv": torch.ones(BATCH, SEQLEN, 2, 1, HEAD_DIM)} | changes
    with pytest.raises(ValueError, match=message):
        layer(**arguments)
    assert torch.equal(q, X)
