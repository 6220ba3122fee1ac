"""Small valid calls of every public function, and the values they are made of, for tests of the interface."""

from functools import partial

import torch

from flash_attn import (
    flash_attn_combine,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
    get_scheduler_metadata,
)

rand = partial(torch.randn, generator=torch.Generator().manual_seed(0))
HALF = torch.float16


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def grad(tensor):
    return tensor.clone().requires_grad_()


# Batch 2, 4 query heads, 2 key heads, head_dim 32, head_dim_v 8: sizes that no rule can take for one another.
Q, K, V = rand(2, 5, 4, 32), rand(2, 7, 2, 32), rand(2, 7, 2, 8)
CU_Q, CU_K = i32(0, 2, 5), i32(0, 3, 7)
TABLE = i32(0, 1, 2, 3).reshape(2, 2)
COS = rand(16, 8)

DENSE = (flash_attn_func, {"q": Q, "k": K, "v": V})
VARLEN = (
    flash_attn_varlen_func,
    {"q": Q[0], "k": K[0], "v": V[0], "cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K},
)
PAGED = (
    flash_attn_varlen_func,
    {"q": Q[0], "k": rand(4, 3, 2, 32), "v": rand(4, 3, 2, 8), "cu_seqlens_q": CU_Q, "cu_seqlens_k": None}
    | {"seqused_k": i32(3, 6), "block_table": TABLE},
)
QKV = (flash_attn_qkvpacked_func, {"qkv": rand(2, 5, 3, 4, 32)})
KV = (flash_attn_kvpacked_func, {"q": Q, "kv": rand(2, 7, 2, 2, 32)})
VARLEN_QKV = (flash_attn_varlen_qkvpacked_func, {"qkv": rand(5, 3, 4, 32), "cu_seqlens": CU_Q})
VARLEN_KV = (
    flash_attn_varlen_kvpacked_func,
    {"q": Q[0], "kv": rand(7, 2, 2, 32), "cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K},
)
CACHE = (flash_attn_with_kvcache, {"q": Q, "k_cache": rand(2, 16, 2, 32), "v_cache": rand(2, 16, 2, 8)})
APPEND = (
    flash_attn_with_kvcache,
    CACHE[1] | {"k": rand(2, 3, 2, 32), "v": rand(2, 3, 2, 8), "cache_seqlens": i32(4, 6)},
)
PACKED_APPEND = (
    flash_attn_with_kvcache,
    APPEND[1]
    | {"q": Q[0], "cu_seqlens_q": CU_Q}
    | {"k": rand(3, 2, 32), "v": rand(3, 2, 8), "cu_seqlens_k_new": i32(0, 1, 3)},
)
ROTARY = (flash_attn_with_kvcache, APPEND[1] | {"rotary_cos": COS, "rotary_sin": COS})
PAGED_CACHE = (
    flash_attn_with_kvcache,
    {"q": Q, "k_cache": rand(4, 8, 2, 32), "v_cache": rand(4, 8, 2, 8), "block_table": TABLE},
)
COMBINE = (flash_attn_combine, {"out_partial": rand(3, 2, 5, 4, 8), "lse_partial": rand(3, 2, 5, 4)})
METADATA = (
    get_scheduler_metadata,
    {"batch_size": 2, "max_seqlen_q": 1, "max_seqlen_k": 9, "num_heads_q": 4, "num_heads_kv": 2, "headdim": 32}
    | {"cache_seqlens": i32(4, 6)},
)
VALID = {
    "dense": DENSE, "varlen": VARLEN, "paged": PAGED, "qkv": QKV, "kv": KV, "varlen_qkv": VARLEN_QKV,
    "varlen_kv": VARLEN_KV, "cache": CACHE, "append": APPEND, "packed_append": PACKED_APPEND, "rotary": ROTARY,
    "paged_cache": PAGED_CACHE, "combine": COMBINE, "metadata": METADATA,
}  # fmt: skip


def call_of(valid, changes=None):
    function, arguments = valid
    # Caches are written in place: every call has its own.
    own = {name: value.clone() if name.endswith("_cache") else value for name, value in arguments.items()}
    return function(**{**own, **(changes or {})})
