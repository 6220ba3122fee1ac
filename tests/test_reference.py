"""The oracle is checked against published vectors, against PyTorch, and against arithmetic done by hand."""

import math

import pytest
import reference
import torch
from tolerance import floor_unit

ONES = 0xFFFFFFFF
PHILOX_VECTORS = [  # kat_vectors of Random123: philox4x32 10
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def _draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _attend(q, k, v, **options):
    options.setdefault("allowed", reference.allowed_mask(q.shape[0], k.shape[0]))
    return reference.attend(q, k, v, **({"scale": 0.3} | options))


@pytest.mark.parametrize(("counter", "key", "words"), PHILOX_VECTORS)
def test_philox_known_answers(counter, key, words):
    assert tuple(int(word) for word in reference.philox_4x32_10(counter, key)) == words


def test_keep_mask_follows_the_rule_bit_by_bit():
    seed, offset, p, batch_idx, num_heads = 2**61 + 12345, 2**40 + 77, 0.3, 5, 3
    mask = reference.keep_mask(torch.tensor([seed, offset]), p, batch_idx, num_heads, 40, 70)
    for h, i, j in [(0, 0, 0), (1, 7, 1), (2, 8, 8), (0, 15, 31), (1, 16, 32), (2, 39, 69), (0, 25, 46)]:
        counter = (j // 32 * 4 + j % 8 // 2, i // 16 * 8 + i % 8, batch_idx * num_heads + h, offset % 2**32)
        words = reference.philox_4x32_10(counter, (seed % 2**32, seed // 2**32))
        stream = b"".join(int(word).to_bytes(4, "little") for word in words)
        byte = stream[i // 8 % 2 * 8 + j % 32 // 8 * 2 + j % 2]
        assert bool(mask[h, i, j]) == (byte <= math.floor(255 * (1 - p)))


def test_keep_mask_gives_every_score_its_own_byte():
    """16 x 32 scores take 32 counters of 16 bytes: no byte serves two scores."""
    i, j = torch.meshgrid(torch.arange(32), torch.arange(64), indexing="ij")
    byte = (i // 8 % 2) * 8 + (j % 32 // 8) * 2 + j % 2
    column, row = j // 32 * 4 + j % 8 // 2, i // 16 * 8 + i % 8
    places = torch.stack((column, row, byte)).flatten(1).T.tolist()
    assert len(set(map(tuple, places))) == 32 * 64


@pytest.mark.parametrize("causal", [False, True])
def test_equals_torch_sdpa_with_gradients(causal):
    leaves = [_draw(2, 33, 4, 16, seed=s).requires_grad_() for s in range(3)]
    heads_first = [x.transpose(1, 2) for x in leaves]
    ours = reference.attention(*leaves, causal=causal).out
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        theirs = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=causal).transpose(1, 2)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    weight = _draw(*ours.shape, seed=9)
    for mine, its in zip(
        torch.autograd.grad(ours, leaves, weight), torch.autograd.grad(theirs, leaves, weight), strict=True
    ):
        torch.testing.assert_close(mine, its, rtol=1e-12, atol=1e-12)


def test_equals_torch_sdpa_with_window_alibi_and_groups():
    q, k, v = _draw(1, 20, 6, 8), _draw(1, 31, 2, 8, seed=1), _draw(1, 31, 2, 5, seed=2)
    slopes = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    ours = reference.attention(q, k, v, window_size=(7, 3), alibi_slopes=slopes, softmax_scale=0.2).out
    bias = torch.full((6, 20, 31), -math.inf, dtype=torch.float64)
    for i in range(20):
        for j in range(31):
            if i + 11 - 7 <= j <= i + 11 + 3:
                bias[:, i, j] = -slopes.double() * abs(i + 11 - j)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        theirs = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=bias, scale=0.2, enable_gqa=True
        ).transpose(1, 2)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_lse_and_probs_by_hand():
    """One row, two keys, a sink: p = exp(s) / (exp(s0) + exp(s1) + exp(sink)), with s after the softcap."""
    q, k, v = torch.tensor([[[2.0]]]), torch.tensor([[[1.0]], [[-3.0]]]), torch.tensor([[[10.0]], [[20.0]]])
    out, lse, probs = _attend(
        q.double(), k.double(), v.double(), scale=0.5, softcap=1.5, sinks=torch.tensor([0.25]).double()
    )
    scores = [1.5 * math.tanh(0.5 * 2 * key / 1.5) for key in (1.0, -3.0)]
    total = sum(map(math.exp, (*scores, 0.25)))
    assert lse.item() == pytest.approx(math.log(total), rel=1e-14)
    assert probs[0, 0].tolist() == pytest.approx([math.exp(s) / total for s in scores], rel=1e-14)
    expected = (10 * math.exp(scores[0]) + 20 * math.exp(scores[1])) / total
    assert out.item() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("seqlen_k", [0, 2])
@pytest.mark.parametrize("with_sink", [False, True])
def test_fully_masked_rows_have_finite_gradients(seqlen_k, with_sink):
    q, k, v = (_draw(n, 1, 4, seed=n).requires_grad_() for n in (5, seqlen_k, seqlen_k))
    sinks = torch.tensor([0.5], dtype=torch.float64, requires_grad=True) if with_sink else None
    allowed = reference.allowed_mask(5, seqlen_k, causal=True)
    out, lse, _ = _attend(q, k, v, allowed=allowed, sinks=sinks)
    masked = 5 - seqlen_k
    assert (out[:masked] == 0).all()
    assert (lse[:, :masked] == (0.5 if with_sink else -math.inf)).all()
    for gradient in torch.autograd.grad(out.sum() + lse.masked_fill(lse.isinf(), 0).sum(), [q, k, v]):
        assert gradient.isfinite().all()


def test_gradcheck_of_every_score_feature():
    q, k, v = (_draw(n, h, 3, seed=n).requires_grad_() for n, h in ((5, 4), (7, 2), (7, 2)))
    sinks = _draw(4).requires_grad_()
    keep = reference.keep_mask(torch.tensor([3, 4]), 0.3, 0, 4, 5, 7)

    def call(q, k, v, sinks):
        return _attend(
            q, k, v, allowed=reference.allowed_mask(5, 7, window_size=(3, 1)), softcap=1.3, sinks=sinks,
            slopes=torch.tensor([0.1, 0.2, 0.3, 0.4]), keep=keep, dropout_p=0.3,
        )[:2]  # fmt: skip

    assert torch.autograd.gradcheck(call, (q, k, v, sinks))


def test_allowed_mask_small():
    assert reference.allowed_mask(2, 4, causal=True).tolist() == [[True, True, True, False], [True] * 4]
    assert reference.allowed_mask(3, 2, causal=True).tolist() == [[False, False], [True, False], [True, True]]
    assert reference.allowed_mask(1, 4, window_size=(1, -1)).tolist() == [[False, False, True, True]]
    assert reference.allowed_mask(2, 3, window_size=(None, 0)).tolist() == [[True, True, False], [True] * 3]


def test_layouts_agree():
    """Dense, varlen, paged and left-padded forms of the same two sequences."""
    q, k, v = _draw(2, 5, 4, 8), _draw(2, 12, 2, 8, seed=1), _draw(2, 12, 2, 8, seed=2)
    used = torch.tensor([7, 12])
    dense = reference.attention(q, k, v, seqused_k=used, causal=True)
    varlen = reference.attention(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu_seqlens_q=torch.tensor([0, 5, 10]),
        cu_seqlens_k=torch.tensor([0, 12, 24]), seqused_k=used, causal=True,
    )  # fmt: skip
    assert torch.equal(varlen.out.view_as(dense.out), dense.out)
    assert torch.equal(varlen.lse.view(4, 2, 5).transpose(0, 1), dense.lse)
    pools = [x.reshape(6, 4, 2, 8).flip(0) for x in (k, v)]
    table = torch.tensor([[5, 4, -1], [2, 1, 0]])
    paged = reference.attention(q, *pools, seqused_k=used, block_table=table, causal=True)
    assert torch.equal(paged.out, dense.out)
    padded = [torch.cat((x[:1].roll(1, 1)[:, :2] * math.nan, x[:1]), dim=1) for x in (k, v)]
    leftpad = reference.attention(q[:1], *padded, seqused_k=torch.tensor([9]), leftpad_k=torch.tensor([2]), causal=True)
    assert torch.equal(leftpad.out, dense.out[:1])


def test_rotation_turns_and_keeps_norms():
    x, angle = _draw(6, 2, 20), torch.rand(30, 8, dtype=torch.float64) * 6
    positions = torch.arange(6) + 11
    for interleaved in (False, True):
        turned = reference.rotate(x, angle.cos(), angle.sin(), positions, interleaved)
        torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
        assert torch.equal(turned[..., 16:], x[..., 16:])
    pairs = torch.view_as_complex(x[..., :16].unflatten(-1, (8, 2)).contiguous())
    expected = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)[positions][:, None])
    ours = reference.rotate(x, angle.cos(), angle.sin(), positions, True)
    torch.testing.assert_close(ours[..., :16], expected.flatten(-2))


@pytest.mark.parametrize("scale", [None, -0.2])
def test_magnitudes_by_hand(scale):
    """Of two rows, two keys and a sink, in float64: the formulas of the docstrings, term by term."""
    q, k, v = _draw(1, 2, 1, 4), _draw(1, 2, 1, 4, seed=1), _draw(1, 2, 1, 3, seed=2)
    dout, dlse, sink = _draw(1, 2, 1, 3, seed=3), _draw(1, 1, 2, seed=4), torch.tensor([0.25])
    rows, keys, values = (x[0, :, 0] for x in (q, k, v))
    expected = {"dq": [], "dk": torch.zeros(2, 4).double(), "dv": torch.zeros(2, 3).double()}
    sizes, of_sink = [], 0.0
    for row, arriving, lse_arriving in zip(rows, dout[0, :, 0], dlse[0, 0], strict=True):
        by = 0.5 if scale is None else scale
        weight = [math.exp(by * float(row @ key)) for key in keys]
        total = sum(weight) + math.exp(0.25)
        p = torch.tensor(weight).double() / total
        exponent = math.log(sum(math.exp(abs(by) * float(row.abs() @ key.abs())) for key in keys)) / 64
        sizes.append(weight[0] / sum(weight) * values[0].abs() + weight[1] / sum(weight) * values[1].abs())
        sizes[-1] = sizes[-1] * exponent
        delta = float((arriving * (p @ values)).norm() + lse_arriving.abs()) * (1 + exponent)
        expected["dq"].append(abs(by) * delta * (p @ keys.abs()))
        expected["dk"] += abs(by) * delta * p[:, None] * row.abs()
        expected["dv"] += exponent * p[:, None] * arriving.abs()
        of_sink += (math.exp(0.25) / total * delta) ** 2
    expected["dq"] = torch.stack(expected["dq"])
    torch.testing.assert_close(reference.output_magnitude(q, k, v, softmax_scale=scale)[0, :, 0], torch.stack(sizes))
    found = reference.gradient_magnitudes(q, k, v, dout, dlse, softmax_scale=scale, s_aux=sink)
    sink_unit = floor_unit(torch.float64) / floor_unit(torch.float32)
    assert found.pop("ds_aux").item() == pytest.approx(math.sqrt(of_sink) * sink_unit, rel=1e-12)
    for name, size in found.items():
        torch.testing.assert_close(size[0, :, 0], expected[name])
    packed = {"cu_seqlens_q": torch.tensor([0, 2]), "cu_seqlens_k": torch.tensor([0, 2]), "softmax_scale": scale}
    again = reference.gradient_magnitudes(*(x[0] for x in (q, k, v, dout, dlse)), s_aux=sink, **packed)
    assert again.pop("ds_aux").tolist() == pytest.approx([math.sqrt(of_sink) * sink_unit], rel=1e-12)
    torch.testing.assert_close(again, {name: size[0] for name, size in found.items()})


def test_combine_of_splits_is_the_whole():
    q, k, v = _draw(1, 5, 2, 8), _draw(1, 12, 2, 8, seed=1), _draw(1, 12, 2, 8, seed=2)
    whole = reference.attention(q, k, v)
    parts = [reference.attention(q, k[:, a:b], v[:, a:b]) for a, b in ((0, 5), (5, 5), (5, 12))]
    lses = torch.stack([part.lse.transpose(1, 2) for part in parts])
    out, lse = reference.combine(torch.stack([part.out for part in parts]), lses)
    torch.testing.assert_close(out, whole.out)
    torch.testing.assert_close(lse, whole.lse.transpose(1, 2))
