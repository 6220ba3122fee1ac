"""xformers' memory_efficient_attention with its masks, on our forward and backward passes: on the CPU or a GPU.

xformers calls the functions of FlashAttention-2's extension by position and describes masks by lengths, offsets and
pages in its own way. Each mask that its FlashAttention-2 backend takes is compared with the softmax of the scores in
float32 plus xformers' own dense form of the mask.

usage: python tests/clients/xformers_masks.py
"""

from __future__ import annotations

import functools

import torch

# xformers' masks are made on this device, too, unless they are told another.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS, HEAD_DIM = 4, 32
ALLOWED = 4e-3  # of values that reach 4, in float16


def import_fmha():
    """xformers with what these calls don't need: its own extension, whose CUDA is an older one than torch's, and a GPU.

    Its operators, which it registers for CUDA only, take the CPU as well.
    """
    custom_op = torch.library.custom_op

    def for_any_device(name, function=None, /, **options):
        return custom_op(name, function, **options | {"device_types": None})

    torch.library.custom_op = for_any_device
    try:
        from xformers.ops import fmha
    finally:
        torch.library.custom_op = custom_op
    fmha.common._built_with_cuda = True
    for operator in (fmha.flash.FwOp, fmha.flash.BwOp):
        operator.SUPPORTED_DEVICES = {"cuda", "cpu"}
    return fmha


fmha = import_fmha()
masks = fmha.attn_bias


def random(*shape):
    return torch.randn(shape, dtype=torch.float16, device=DEVICE)


def attend(q, k, v, mask):
    """In float32. All of (batch, length, heads, head_dim); as many heads each."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) * HEAD_DIM**-0.5
    if mask is not None:
        scores = scores + mask.materialize(scores.shape[-2:], torch.float32, scores.device)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1).nan_to_num(0.0), v.float())


def difference(ours, expected):
    largest = [(mine - theirs).abs().max() for mine, theirs in zip(ours, expected, strict=True)]
    return torch.stack(largest).max().item()  # NaN if one is, which Python's max may not see


def trained(mask, batch, queries, keys, heads_k=HEADS):
    """The error of output and gradients; K and V with fewer heads are expanded, as xformers wants it."""
    leaves = [random(batch, queries, HEADS, HEAD_DIM), *(random(batch, keys, heads_k, HEAD_DIM) for _ in "kv")]
    results = []
    flash = fmha.MemoryEfficientAttentionFlashAttentionOp
    for call in (functools.partial(fmha.memory_efficient_attention, op=flash), attend):
        q, k, v = (leaf.detach().requires_grad_() for leaf in leaves)
        out = call(q, *(x.repeat_interleave(HEADS // heads_k, 2) for x in (k, v)), mask)
        results.append((out, *torch.autograd.grad(out, (q, k, v), leaves[0].to(out.dtype))))
    return difference(*results)


def served(mask, keys, dense_mask=None, pages=None):
    """The error of the output alone, for masks that have no gradient. Five dimensions: groups of heads share keys."""
    q = random(1, mask.q_seqinfo.seqstart_py[-1], 2, HEADS // 2, HEAD_DIM)
    k, v = (random(1, keys, 2, 1, HEAD_DIM) for _ in "kv")
    out = fmha.memory_efficient_attention_forward(
        q, *(x.expand(-1, -1, -1, HEADS // 2, -1) for x in (k, v)), attn_bias=mask, op=fmha.flash.FwOp
    )
    if pages is not None:
        k, v = (x[:, pages] for x in (k, v))
    k, v = (x.expand(-1, -1, -1, HEADS // 2, -1).flatten(2, 3) for x in (k, v))
    return difference([out.flatten(2, 3)], [attend(q.flatten(2, 3), k, v, dense_mask or mask)])


LENGTHS_Q, LENGTHS_K = [3, 9, 1], [30, 17, 24]


def errors():
    yield "None", trained(None, 2, 40, 40)
    yield "None, fewer key heads", trained(None, 2, 40, 40, heads_k=2)
    yield "LowerTriangularMask", trained(masks.LowerTriangularMask(), 2, 40, 40)
    yield "LowerTriangularFromBottomRightMask", trained(masks.LowerTriangularFromBottomRightMask(), 2, 20, 40)
    local = masks.LowerTriangularFromBottomRightMask().make_local_attention(7)
    yield type(local).__name__, trained(local, 2, 20, 40)
    yield "LocalAttentionFromBottomRightMask", trained(masks.LocalAttentionFromBottomRightMask(5, 2), 2, 40, 40)

    blocks = masks.BlockDiagonalMask.from_seqlens(LENGTHS_Q, LENGTHS_K)
    same = masks.BlockDiagonalMask.from_seqlens(LENGTHS_K)
    for mask in (
        blocks,
        same.make_causal(),
        blocks.make_causal_from_bottomright(),
        same.make_local_attention(6),
        blocks.make_local_attention_from_bottomright(6),
    ):
        rows = [info.seqstart_py[-1] for info in (mask.q_seqinfo, mask.k_seqinfo)]
        yield type(mask).__name__, trained(mask, 1, *rows)

    padded = {"q_seqlen": LENGTHS_Q, "kv_padding": 32, "kv_seqlen": LENGTHS_K}
    for kind in (masks.BlockDiagonalPaddedKeysMask, masks.BlockDiagonalCausalWithOffsetPaddedKeysMask):
        yield kind.__name__, served(kind.from_seqlens(**padded), 96)
    kind = masks.BlockDiagonalCausalLocalAttentionPaddedKeysMask
    yield kind.__name__, served(kind.from_seqlens_local(**padded, window_size=6), 96)

    gappy = {"q_seqlen": LENGTHS_Q, "kv_seqstarts": [2, 40, 60, 90], "kv_seqlen": LENGTHS_K}
    for kind in (masks.BlockDiagonalGappyKeysMask, masks.BlockDiagonalCausalWithOffsetGappyKeysMask):
        yield kind.__name__, served(kind.from_seqlens(**gappy), 90)

    # Token t of entry b is in page table[b, t // 8]; the dense form has the entries one after another.
    table = torch.randperm(16)[:12].view(3, 4).int().to(DEVICE)
    places = (table[..., None] * 8 + torch.arange(8, device=DEVICE)).flatten().long()
    for dense, paged in (
        (masks.BlockDiagonalPaddedKeysMask, masks.PagedBlockDiagonalPaddedKeysMask),
        (masks.BlockDiagonalCausalWithOffsetPaddedKeysMask, masks.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask),
    ):
        mask = dense.from_seqlens(**padded)
        yield paged.__name__, served(mask.make_paged(table, 8, paged), 128, mask, places)


if __name__ == "__main__":
    torch.manual_seed(0)
    print(f"xformers' operator is {fmha.flash.FwOp.NAME}, on {DEVICE}")
    for name, error in errors():
        print(f"{name}: largest error {error:.1e}", flush=True)
        assert error < ALLOWED, f"{name} is wrong"
