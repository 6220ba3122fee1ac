"""What users write, for a type checker (test_typing.py). An `ignore` that isn't needed is an error, too: it says that
the checker must object to the line."""

from torch import Tensor

from flash_attn import (
    explain,
    flash_attn_combine,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    get_scheduler_metadata,
    info,
    use_path,
)
from flash_attn.bert_padding import pad_input, unpad_input
from flash_attn.layers.rotary import RotaryEmbedding, apply_rotary_emb


def train(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    flash_attn_func(q, k, v, causal=True, window_size=(255, 0)).sum().backward()
    out, lse = flash_attn_func(q, k, v, dropout_p=0.1, return_softmax_lse=True)
    out, lse, probs = flash_attn_func(q, k, v, 0.1, None, True, [None, 0], return_attn_probs=True)
    flash_attn_func(q, k, v, causal="yes")  # type: ignore[arg-type]
    flash_attn_func(q, k, v, dropout=0.1)  # type: ignore[call-arg]
    loss: Tensor = out.mean() + lse.mean() + probs.sum()
    return loss


def pack(hidden: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rows, indices, cu_seqlens, max_seqlen, seqused = unpad_input(hidden, mask)
    q = apply_rotary_emb(rows, cos, sin, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
    out = flash_attn_varlen_func(q, q, q, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, s_aux=None)
    out.add_(q)
    return pad_input(out, indices, hidden.shape[0], hidden.shape[1])


def serve(q: Tensor, pages: Tensor, block_table: Tensor, lengths: Tensor) -> Tensor:
    metadata = get_scheduler_metadata(4, 1, 4096, 32, 8, 128, cache_seqlens=lengths)
    with use_path("cpu"):
        step, lse = flash_attn_with_kvcache(
            q,
            pages,
            pages,
            cache_seqlens=lengths,
            block_table=block_table,
            scheduler_metadata=metadata,
            return_softmax_lse=True,
        )
    merged, _ = flash_attn_combine(step[None].float(), lse[None])
    print(info(), explain(flash_attn_func, q, q, q), RotaryEmbedding(64)(q))
    return merged
