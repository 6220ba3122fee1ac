"""Every error of the public functions: it names the argument, the rule and the value received.

A case changes some arguments of a valid call; the valid calls themselves run in test_interface.py.
"""

import math
import re

import numpy as np
import pytest
import torch
from valid_calls import (
    APPEND,
    CACHE,
    COMBINE,
    COS,
    CU_K,
    CU_Q,
    DENSE,
    HALF,
    KV,
    METADATA,
    PACKED_APPEND,
    PAGED,
    PAGED_CACHE,
    QKV,
    ROTARY,
    TABLE,
    VARLEN,
    VARLEN_KV,
    VARLEN_QKV,
    K,
    Q,
    V,
    call_of,
    grad,
    i32,
    meta,
    rand,
)

JAGGED = torch.nested.nested_tensor([rand(3, 4, 32), rand(2, 4, 32)], layout=torch.jagged)
NESTED = torch.nested.nested_tensor([rand(3, 4, 32), rand(2, 4, 32)], layout=torch.strided)
Type, Value, Unsupported = TypeError, ValueError, NotImplementedError

# (valid call, what is changed, error, message)
CASES = [
    # q, k, v: device, dtype, rank, shape
    (DENSE, {"q": [1.0]}, Type, "q must be a torch.Tensor, got list"),
    (DENSE, {"k": None}, Type, "k must be a torch.Tensor, got NoneType"),
    (DENSE, {"v": 3}, Type, "v must be a torch.Tensor, got int"),
    (DENSE, {"k": K.to("meta")}, Value, "k must be on q's device cpu, got meta"),
    (DENSE, {"v": V.to("meta")}, Value, "v must be on q's device cpu, got meta"),
    (DENSE, {"q": Q.int()}, Value, "q must have dtype float16, bfloat16, float32 or float64, got torch.int32"),
    (DENSE, {"q": Q.to(torch.float8_e4m3fn)}, Value, "q must have dtype float16"),
    (DENSE, {"k": K.half()}, Value, "k must have q's dtype torch.float32, got torch.float16"),
    (DENSE, {"v": V.double()}, Value, "v must have q's dtype torch.float32, got torch.float64"),
    (DENSE, {"q": Q.to_sparse()}, Value, "q must be a strided tensor, got layout torch.sparse_coo"),
    (DENSE, {"q": JAGGED, "k": JAGGED, "v": JAGGED}, Value, "q must be a strided tensor, got layout torch.jagged"),
    (DENSE, {"q": NESTED}, Value, "q must not be a nested tensor; pass packed sequences with cu_seqlens"),
    (DENSE, {"s_aux": rand(4).to_sparse()}, Value, "s_aux must be a strided tensor, got layout torch.sparse_coo"),
    (DENSE, {"alibi_slopes": rand(4).to_sparse()}, Value, "alibi_slopes must be a strided tensor"),
    (QKV, {"qkv": NESTED}, Value, "qkv must not be a nested tensor"),
    (VARLEN_KV, {"kv": rand(7, 2, 2, 32).to_sparse()}, Value, "kv must be a strided tensor"),
    (VARLEN, {"v": V[0].to_sparse()}, Value, "v must be a strided tensor, got layout torch.sparse_coo"),
    (VARLEN, {"k": K[0].to_sparse()}, Value, "k must be a strided tensor, got layout torch.sparse_coo"),
    (DENSE, {"q": Q[0]}, Value, "q must have the shape (batch, seqlen_q, num_heads, head_dim), got (5, 4, 32)"),
    (DENSE, {"k": K[0]}, Value, "k must have the shape (batch, seqlen_k, num_heads_k, head_dim), got (7, 2, 32)"),
    (DENSE, {"v": V[0]}, Value, "v must have the shape (batch, seqlen_k, num_heads_k, head_dim_v), got (7, 2, 8)"),
    (DENSE, {"q": rand(2, 5, 4, 577)}, Value, "q must have a head_dim from 1 to 576, got 577"),
    (DENSE, {"q": rand(2, 5, 4, 0)}, Value, "q must have a head_dim from 1 to 576, got 0"),
    (DENSE, {"v": rand(2, 7, 2, 513)}, Value, "v must have a head_dim_v from 1 to 512, got 513"),
    (DENSE, {"v": rand(2, 7, 2, 0)}, Value, "v must have a head_dim_v from 1 to 512, got 0"),
    (DENSE, {"k": rand(2, 7, 2, 16)}, Value, "k must have q's head_dim 32, got shape (2, 7, 2, 16)"),
    (DENSE, {"v": V[:, :6]}, Value, "v must have k's shape (2, 7, 2, 32) but for the last dimension, got (2, 6, 2, 8)"),
    (DENSE, {"q": rand(2, 5, 3, 32)}, Value, "q must have a multiple of k's num_heads_k heads, at least one, "
     "got num_heads 3 and num_heads_k 2"),
    (DENSE, {"k": K[:, :, :0], "v": V[:, :, :0]}, Value, "got num_heads 4 and num_heads_k 0"),
    (DENSE, {"q": Q[:1]}, Value, "k must have q's batch size 1, got shape (2, 7, 2, 32)"),
    # options of every function
    (DENSE, {"causal": 1}, Type, "causal must be a bool, got 1"),
    (DENSE, {"deterministic": None}, Type, "deterministic must be a bool, got None"),
    (DENSE, {"return_attn_probs": "yes"}, Type, "return_attn_probs must be a bool, got 'yes'"),
    (DENSE, {"return_softmax_lse": 0}, Type, "return_softmax_lse must be a bool, got 0"),
    (DENSE, {"dropout_p": 1.0}, Value, "dropout_p must be in [0, 1), got 1.0"),
    (DENSE, {"dropout_p": -0.1}, Value, "dropout_p must be in [0, 1), got -0.1"),
    (DENSE, {"dropout_p": math.nan}, Value, "dropout_p must be finite as a float32, got nan"),
    (DENSE, {"dropout_p": None}, Type, "dropout_p must be a float, got None"),
    (DENSE, {"dropout_p": 0.1, "softcap": 5.0}, Unsupported, "softcap must be 0 when dropout_p > 0, got 5.0 and 0.1"),
    (DENSE, {"softcap": -1.0}, Value, "softcap must be at least 0 (0 switches it off), got -1.0"),
    (DENSE, {"softcap": math.inf}, Value, "softcap must be finite as a float32, got inf"),
    (DENSE, {"softcap": True}, Type, "softcap must be a float, got True"),
    (DENSE, {"softcap": 1e39}, Value, "softcap must be finite as a float32, got 1e+39"),
    (DENSE, {"softcap": 2**64, "dropout_p": 0.1}, Unsupported, "softcap must be 0 when dropout_p > 0"),
    (DENSE, {"softcap": 10**400}, Value, "softcap must be finite as a float32, got 1000"),
    (DENSE, {"softcap": 1e-40}, Value, "softcap must be 0 or at least 1.1754943508222875e-38, float32's smallest, "
     "got 1e-40"),
    (DENSE, {"softmax_scale": math.nan}, Value, "softmax_scale must be finite as a float32, got nan"),
    (DENSE, {"softmax_scale": -math.inf}, Value, "softmax_scale must be finite as a float32, got -inf"),
    (DENSE, {"softmax_scale": torch.tensor(0.5)}, Type, "softmax_scale must be a float, got tensor(0.5000)"),
    (DENSE, {"softmax_scale": "0.5"}, Type, "softmax_scale must be a float, got '0.5'"),
    (DENSE, {"softmax_scale": np.complex64(1j)}, Type, "softmax_scale must be a float, got "),
    (DENSE, {"softmax_scale": np.array([0.5])}, Type, "softmax_scale must be a float, got array([0.5])"),
    (DENSE, {"softmax_scale": np.bool_(True)}, Type, "softmax_scale must be a float, got "),
    (DENSE, {"softmax_scale": float}, Type, "softmax_scale must be a float, got <class 'float'>"),
    (DENSE, {"window_size": 3}, Type, "window_size must be a pair (left, right), got 3"),
    (DENSE, {"window_size": None}, Type, "window_size must be a pair (left, right), got None"),
    (DENSE, {"window_size": (1,)}, Value, "window_size must have two elements (left, right), got (1,)"),
    (DENSE, {"window_size": (1, 2.0)}, Type, "window_size must be an int, got 2.0"),
    (DENSE, {"window_size": (True, 2)}, Type, "window_size must be an int, got True"),
    (DENSE, {"window_size": i32(1, 2, 3)}, Value, "window_size must have two elements (left, right), got shape (3,)"),
    (DENSE, {"window_size": torch.tensor([1.0, 2.0])}, Type,
     "window_size must have an integer dtype, got torch.float32"),
    (DENSE, {"window_size": torch.tensor([1j, 2j])}, Type,
     "window_size must have an integer dtype, got torch.complex64"),
    (DENSE, {"window_size": meta(2, dtype=torch.int32)}, Value, "window_size must be a pair of ints"),
    (DENSE, {"num_splits": -1}, Value, "num_splits must be in [0, 256] (0 chooses), got -1"),
    (DENSE, {"num_splits": 257}, Value, "num_splits must be in [0, 256] (0 chooses), got 257"),
    (DENSE, {"num_splits": 1.0}, Type, "num_splits must be an int, got 1.0"),
    (DENSE, {"num_splits": True}, Type, "num_splits must be an int, got True"),
    (DENSE, {"num_splits": np.array([1])}, Type, "num_splits must be an int, got array([1])"),
    (DENSE, {"pack_gqa": 1}, Type, "pack_gqa must be None, True or False, got 1"),
    (DENSE, {"alibi_slopes": 0.5}, Type, "alibi_slopes must be a torch.Tensor, got float"),
    (DENSE, {"alibi_slopes": meta(4)}, Value, "alibi_slopes must be on q's device cpu, got meta"),
    (DENSE, {"alibi_slopes": rand(4).half()}, Value, "alibi_slopes must have dtype torch.float32, got torch.float16"),
    (DENSE, {"alibi_slopes": rand(2)}, Value, "alibi_slopes must have the shape (num_heads,) = (4,) or "
     "(batch, num_heads) = (2, 4), got (2,)"),
    (DENSE, {"alibi_slopes": rand(8)[::2]}, Value, "alibi_slopes must have stride 1 in its last dimension, got (2,)"),
    (DENSE, {"alibi_slopes": grad(rand(4))}, Unsupported, "alibi_slopes must not require grad (it has no gradient), "
     "got requires_grad=True"),
    (DENSE, {"s_aux": 1.0}, Type, "s_aux must be a torch.Tensor, got float"),
    (DENSE, {"s_aux": meta(4)}, Value, "s_aux must be on q's device cpu, got meta"),
    (DENSE, {"s_aux": i32(1, 2, 3, 4)}, Value, "s_aux must have dtype float16, bfloat16, float32 or float64, "
     "got torch.int32"),
    (DENSE, {"s_aux": rand(2)}, Value, "s_aux must have the shape (num_heads,) = (4,), got (2,)"),
    # out
    (DENSE, {"out": 1}, Type, "out must be a torch.Tensor, got int"),
    (DENSE, {"out": meta(2, 5, 4, 8)}, Value, "out must be on q's device cpu, got meta"),
    (DENSE, {"out": rand(2, 5, 4, 8).half()}, Value, "out must have q's dtype torch.float32, got torch.float16"),
    (DENSE, {"out": rand(2, 5, 4, 32)}, Value, "out must have the shape q's with head_dim_v = (2, 5, 4, 8), "
     "got (2, 5, 4, 32)"),
    (DENSE, {"out": rand(2, 5, 8, 4).transpose(2, 3)}, Value,
     "out must have stride 1 in its last dimension, got stride "
     "(160, 32, 1, 4)"),
    (DENSE, {"out": rand(1, 5, 4, 8).expand(2, 5, 4, 8)}, Value,
     "out must not overlap itself, got stride (0, 32, 8, 1)"),
    (DENSE, {"out": torch._neg_view(rand(2, 5, 4, 8))}, Value,
     "out must not be a view of negated memory (torch.resolve_neg), got is_neg() True"),
    (DENSE, {"out": rand(2, 5, 4, 8), "k": grad(K)}, Value, "out must not be given when a gradient is needed"),
    (DENSE, {"out": rand(2, 5, 4, 8), "s_aux": grad(rand(4))}, Value,
     "out must not be given when a gradient is needed"),
    (DENSE, {"out": grad(rand(2, 5, 4, 8))}, Value, "out must not be given when a gradient is needed"),
    # varlen
    (VARLEN, {"q": Q}, Value, "q must have the shape (total_q, num_heads, head_dim), got (2, 5, 4, 32)"),
    (VARLEN, {"k": K, "v": V}, Value, "k must have the shape (total_k, num_heads_k, head_dim), got (2, 7, 2, 32)"),
    (VARLEN, {"cu_seqlens_q": [0, 2, 5]}, Type, "cu_seqlens_q must be a torch.Tensor, got list"),
    (VARLEN, {"cu_seqlens_q": CU_Q.to("meta")}, Value, "cu_seqlens_q must be on q's device cpu, got meta"),
    (VARLEN, {"cu_seqlens_q": CU_Q.long()}, Value, "cu_seqlens_q must have dtype torch.int32, got torch.int64"),
    (VARLEN, {"cu_seqlens_q": TABLE}, Value, "cu_seqlens_q must have the shape (batch + 1,), got (2, 2)"),
    (VARLEN, {"cu_seqlens_q": i32()}, Value, "cu_seqlens_q must have batch + 1 elements, at least one, got none"),
    (VARLEN, {"cu_seqlens_q": i32(0, 9, 2, 9, 5)[::2]}, Value, "cu_seqlens_q must be contiguous, got stride (2,)"),
    (VARLEN, {"cu_seqlens_k": i32(0, 7)}, Value, "cu_seqlens_k must have the shape (batch + 1,) = (3,), got (2,)"),
    (VARLEN, {"cu_seqlens_k": i32(0, 9, 3, 9, 7)[::2]}, Value, "cu_seqlens_k must be contiguous, got stride (2,)"),
    (VARLEN, {"cu_seqlens_k": None}, Value, "cu_seqlens_k must be given when block_table is not, got None"),
    (VARLEN, {"max_seqlen_q": -1}, Value, "max_seqlen_q must be at least 0, got -1"),
    (VARLEN, {"max_seqlen_q": 2**31}, Value, "max_seqlen_q must be at most 2147483647, got 2147483648"),
    (VARLEN, {"max_seqlen_k": torch.tensor(2**40)}, Value, "max_seqlen_k must be at most 2147483647"),
    (VARLEN, {"max_seqlen_k": 7.0}, Type, "max_seqlen_k must be an int, got 7.0"),
    (VARLEN, {"max_seqlen_q": CU_Q}, Value, "max_seqlen_q must be an int, None or an integer tensor of one element, "
     "got shape (3,)"),
    (VARLEN, {"max_seqlen_q": torch.tensor(3.0)}, Value, "integer tensor of one element, got shape (), dtype "
     "torch.float32"),
    (VARLEN, {"max_seqlen_q": torch.tensor(3j)}, Value, "got shape (), dtype torch.complex64"),
    (VARLEN, {"seqused_q": i32(1)}, Value, "seqused_q must have the shape (batch,) = (2,), got (1,)"),
    (VARLEN, {"seqused_k": i32(1, 2).long()}, Value, "seqused_k must have dtype torch.int32, got torch.int64"),
    (VARLEN, {"leftpad_k": i32(1, 2, 3)}, Value, "leftpad_k must have the shape (batch,) = (2,), got (3,)"),
    (VARLEN, {"scheduler_metadata": rand(20)}, Value,
     "scheduler_metadata must have dtype torch.int32, got torch.float32"),
    (VARLEN, {"scheduler_metadata": TABLE}, Value,
     "scheduler_metadata must have the shape (num_elements,), got (2, 2)"),
    (VARLEN, {"scheduler_metadata": i32(0, 1)}, Value, "scheduler_metadata must have at least 1 + batch = 3 elements, "
     "got 2"),
    (VARLEN, {"scheduler_metadata": i32(0, 1, 1).to("meta")}, Value, "scheduler_metadata must be on q's device cpu"),
    (VARLEN, {"alibi_slopes": rand(3, 4)}, Value, "alibi_slopes must have the shape (num_heads,) = (4,) or "
     "(batch, num_heads) = (2, 4), got (3, 4)"),
    (VARLEN, {"out": rand(5, 4, 32)}, Value, "out must have the shape q's with head_dim_v = (5, 4, 8), got (5, 4, 32)"),
    # paged
    (PAGED, {"k": K[0], "v": V[0]}, Value, "k must have the shape (num_pages, page_size, num_heads_k, head_dim), "
     "got (7, 2, 32)"),
    (PAGED, {"block_table": [[0]]}, Type, "block_table must be a torch.Tensor, got list"),
    (PAGED, {"block_table": TABLE.long()}, Value, "block_table must have dtype torch.int32, got torch.int64"),
    (PAGED, {"block_table": TABLE.to("meta")}, Value, "block_table must be on q's device cpu, got meta"),
    (PAGED, {"block_table": TABLE[0]}, Value, "block_table must have the shape (batch, max_pages), got (2,)"),
    (PAGED, {"block_table": TABLE[:1]}, Value, "block_table must have one row for each of the 2 batch entries, "
     "got (1, 2)"),
    (PAGED, {"block_table": TABLE.t()}, Value, "block_table must have rows of stride 1, got stride (1, 2)"),
    (PAGED, {"k": rand(4, 0, 2, 32), "v": rand(4, 0, 2, 8)}, Value,
     "k must have a page_size of at least 1, got shape (4, 0, 2, 32)"),
    (PAGED, {"seqused_k": None}, Value, "cu_seqlens_k must be given when seqused_k is not, got None for both"),
    # packed
    (QKV, {"qkv": None}, Type, "qkv must be a torch.Tensor, got NoneType"),
    (QKV, {"qkv": QKV[1]["qkv"].int()}, Value, "qkv must have dtype float16, bfloat16, float32 or float64"),
    (QKV, {"qkv": Q}, Value, "qkv must have the shape (batch, seqlen, 3, num_heads, head_dim), got (2, 5, 4, 32)"),
    (QKV, {"qkv": rand(5, 3, 4, 32)}, Value, "qkv must have the shape (batch, seqlen, 3, num_heads, head_dim), "
     "got (5, 3, 4, 32)"),
    (QKV, {"qkv": rand(2, 5, 2, 4, 32)}, Value, "qkv must have the shape (batch, seqlen, 3, num_heads, head_dim), "
     "got (2, 5, 2, 4, 32)"),
    (QKV, {"qkv": rand(2, 5, 3, 4, 600)}, Value, "qkv must have a head_dim from 1 to 576, got 600"),
    (KV, {"kv": rand(2, 7, 3, 2, 32)}, Value, "kv must have the shape (batch, seqlen_k, 2, num_heads_k, head_dim)"),
    (KV, {"kv": rand(2, 7, 2, 3, 32)}, Value, "q must have a multiple of kv's num_heads_k heads, at least one"),
    (KV, {"kv": KV[1]["kv"].half()}, Value, "kv must have q's dtype torch.float32, got torch.float16"),
    (VARLEN_QKV, {"qkv": rand(5, 4, 4, 32)}, Value, "qkv must have the shape (total, 3, num_heads, head_dim)"),
    (VARLEN_QKV, {"cu_seqlens": None}, Type, "cu_seqlens must be a torch.Tensor, got NoneType"),
    (VARLEN_QKV, {"cu_seqlens": CU_Q.to("meta")}, Value, "cu_seqlens must be on qkv's device cpu, got meta"),
    (VARLEN_QKV, {"max_seqlen": -2}, Value, "max_seqlen must be at least 0, got -2"),
    (VARLEN_KV, {"kv": rand(7, 3, 2, 32)}, Value, "kv must have the shape (total_k, 2, num_heads_k, head_dim)"),
    (VARLEN_KV, {"kv": rand(7, 2, 2, 16)}, Value, "kv must have q's head_dim 32, got shape (7, 2, 16)"),
    (VARLEN_KV, {"cu_seqlens_k": None}, Value, "cu_seqlens_k must be given"),
    # the cache
    (CACHE, {"k_cache": K}, Value, "v_cache must have k_cache's shape (2, 7, 2, 32) but for the last dimension"),
    (CACHE, {"k_cache": K[0]}, Value, "k_cache must have the shape (batch_cache, seqlen_cache, num_heads_k, head_dim), "
     "got (7, 2, 32)"),
    (CACHE, {"q": rand(3, 1, 4, 32)}, Value, "k_cache must have q's batch size 3 when cache_batch_idx is not given, "
     "got shape (2, 16, 2, 32)"),
    (CACHE, {"q": Q[0]}, Value, "q must have the shape (batch, seqlen_q, num_heads, head_dim), got (5, 4, 32)"),
    (CACHE, {"cu_seqlens_q": CU_Q}, Value, "q must have the shape (total_q, num_heads, head_dim), got (2, 5, 4, 32)"),
    (CACHE, {"cache_seqlens": 17}, Value, "cache_seqlens must be at least 0 and leave room for the 0 new tokens in a "
     "cache of 16, got 17"),
    (CACHE, {"cache_seqlens": -1}, Value, "cache_seqlens must be at least 0"),
    (CACHE, {"cache_seqlens": 1.5}, Type, "cache_seqlens must be an int, got 1.5"),
    (CACHE, {"cache_seqlens": i32(1, 2).long()}, Value, "cache_seqlens must have dtype torch.int32, got torch.int64"),
    (CACHE, {"cache_seqlens": i32(1)}, Value, "cache_seqlens must have the shape (batch,) = (2,), got (1,)"),
    (CACHE, {"cache_batch_idx": i32(1)}, Value, "cache_batch_idx must have the shape (batch,) = (2,), got (1,)"),
    (CACHE, {"cache_leftpad": i32(1)}, Value, "cache_leftpad must have the shape (batch,) = (2,), got (1,)"),
    (CACHE, {"rotary_interleaved": None}, Type, "rotary_interleaved must be a bool, got None"),
    (CACHE, {"v": rand(2, 3, 2, 8)}, Value, "v must not be given without k, got a Tensor"),
    (CACHE, {"cu_seqlens_k_new": CU_K}, Value, "cu_seqlens_k_new must not be given without k, got a Tensor"),
    (CACHE, {"rotary_cos": COS, "rotary_sin": COS}, Value, "rotary_cos must not be given without k and v"),
    (CACHE, {"scheduler_metadata": i32(0)}, Value,
     "scheduler_metadata must have at least 1 + batch = 3 elements, got 1"),
    (CACHE, {"max_seqlen_q": -1}, Value, "max_seqlen_q must be at least 0, got -1"),
    (PACKED_APPEND, {"cu_seqlens_q": i32()}, Value,
     "cu_seqlens_q must have batch + 1 elements, at least one, got none"),
    (PAGED_CACHE, {"k_cache": K[0]}, Value,
     "k_cache must have the shape (num_pages, page_size, num_heads_k, head_dim), got (7, 2, 32)"),
    (PAGED_CACHE, {"cache_seqlens": 17}, Value, "room for the 0 new tokens in a cache of 16, got 17"),
    (PAGED_CACHE, {"block_table": TABLE[:1]}, Value, "block_table must have one row for each of the 2 batch entries"),
    (PAGED_CACHE, {"k_cache": rand(4, 0, 2, 32), "v_cache": rand(4, 0, 2, 8)}, Value,
     "k_cache must have a page_size of at least 1, got shape (4, 0, 2, 32)"),
    (APPEND, {"k_cache": rand(1, 16, 2, 32).expand(2, 16, 2, 32)}, Value,
     "k_cache must not overlap itself, got stride (0, 64, 32, 1) for shape (2, 16, 2, 32)"),
    (APPEND, {"v_cache": rand(2, 1, 2, 8).expand(2, 16, 2, 8)}, Value,
     "v_cache must not overlap itself, got stride (16, 0, 8, 1) for shape (2, 16, 2, 8)"),
    (APPEND, {"k_cache": torch._neg_view(rand(2, 16, 2, 32))}, Value, "k_cache must not be a view of negated memory"),
    (APPEND, {"v_cache": torch._neg_view(rand(2, 16, 2, 8))}, Value, "v_cache must not be a view of negated memory"),
    (APPEND, {"cache_seqlens": i32(4, 2**31 - 1)}, Value,
     "cache_seqlens plus the new tokens must fit the cache's 16 tokens, got 2147483650"),
    (APPEND, {"k": rand(2, 3, 2, 32).to_sparse()}, Value, "k must be a strided tensor"),
    (APPEND, {"v": None}, Value, "v must be given with k, got None"),
    (APPEND, {"k": 1}, Type, "k must be a torch.Tensor, got int"),
    (APPEND, {"v": 1}, Type, "v must be a torch.Tensor, got int"),
    (APPEND, {"k": meta(2, 3, 2, 32)}, Value, "k must be on q's device cpu, got meta"),
    (APPEND, {"v": rand(2, 3, 2, 8).half()}, Value, "v must have q's dtype torch.float32, got torch.float16"),
    (APPEND, {"k": rand(3, 2, 32)}, Value, "k must have the shape (batch, seqlen_new, num_heads_k, head_dim), "
     "got (3, 2, 32)"),
    (APPEND, {"k": torch.tensor(1.0)}, Value, "k must have the shape (batch, seqlen_new, num_heads_k, head_dim), "
     "got ()"),
    (APPEND, {"k": rand(1, 3, 2, 32)}, Value, "k must have the shape (batch, seqlen_new, num_heads_k, head_dim) = "
     "(2, 3, 2, 32), got (1, 3, 2, 32)"),
    (APPEND, {"v": rand(2, 4, 2, 8)}, Value, "v must have the shape (batch, seqlen_new, num_heads_k, head_dim_v) = "
     "(2, 3, 2, 8), got (2, 4, 2, 8)"),
    (APPEND, {"cache_seqlens": None}, Value, "cache_seqlens must be given with k (it says where k goes), got None"),
    (APPEND, {"cache_seqlens": 14}, Value, "cache_seqlens must be at least 0 and leave room for the 3 new tokens in a "
     "cache of 16, got 14"),
    (APPEND, {"k": rand(2, 17, 2, 32), "v": rand(2, 17, 2, 8)}, Value, "k must fit into the 16 tokens of an entry's "
     "cache, got 17 new tokens"),
    (APPEND, {"k": grad(rand(2, 3, 2, 32))}, Unsupported, "k must not require grad when k is appended"),
    (APPEND, {"v_cache": grad(rand(2, 16, 2, 8))}, Unsupported, "v_cache must not require grad when k is appended"),
    (PACKED_APPEND, {"k": rand(2, 3, 2, 32)}, Value, "k must have the shape (total_k_new, num_heads_k, head_dim)"),
    (PACKED_APPEND, {"v": rand(4, 2, 8)}, Value,
     "v must have the shape (total_k_new, num_heads_k, head_dim_v) = (3, 2, 8)"),
    (PACKED_APPEND, {"cu_seqlens_k_new": i32(0, 3)}, Value, "cu_seqlens_k_new must have the shape (batch + 1,) = (3,)"),
    (ROTARY, {"rotary_sin": None}, Value, "rotary_sin must be given with rotary_cos, got None"),
    (ROTARY, {"rotary_cos": None}, Value, "rotary_cos must be given with rotary_sin, got None"),
    (ROTARY, {"rotary_sin": COS.to_sparse()}, Value, "rotary_sin must be a strided tensor"),
    (ROTARY, {"rotary_cos": COS.half()}, Value, "rotary_cos must have q's dtype torch.float32, got torch.float16"),
    (ROTARY, {"rotary_cos": COS.to("meta")}, Value, "rotary_cos must be on q's device cpu, got meta"),
    (ROTARY, {"rotary_cos": COS[0]}, Value, "rotary_cos must have the shape (seqlen_rotary, rotary_dim / 2), got (8,)"),
    (ROTARY, {"rotary_sin": COS[:4]}, Value, "rotary_sin must have the shape rotary_cos's = (16, 8), got (4, 8)"),
    (ROTARY, {"rotary_cos": COS[:, :4], "rotary_sin": COS[:, :4]}, Value,
     "rotary_cos must have rotary_dim / 2 columns, "
     "rotary_dim a multiple of 16 up to head_dim 32, got rotary_dim 8"),
    (ROTARY, {"rotary_cos": rand(16, 24), "rotary_sin": rand(16, 24)}, Value, "got rotary_dim 48"),
    # combine
    (COMBINE, {"out_partial": None}, Type, "out_partial must be a torch.Tensor, got NoneType"),
    (COMBINE, {"out_partial": rand(3, 2, 5, 4, 8).to_sparse()}, Value, "out_partial must be a strided tensor"),
    (COMBINE, {"lse_partial": rand(3, 2, 5, 4).to_sparse()}, Value, "lse_partial must be a strided tensor"),
    (COMBINE, {"out": rand(2, 5, 4, 8).to_sparse()}, Value, "out must be a strided tensor"),
    (COMBINE, {"lse_partial": None}, Type, "lse_partial must be a torch.Tensor, got NoneType"),
    (COMBINE, {"lse_partial": meta(3, 2, 5, 4)}, Value, "lse_partial must be on out_partial's device cpu, got meta"),
    (COMBINE, {"lse_partial": rand(3, 2, 5, 4).half()}, Value, "lse_partial must have dtype torch.float32"),
    (COMBINE, {"lse_partial": rand(3, 2, 4, 5)}, Value,
     "lse_partial must have the shape out_partial's but for head_dim "
     "= (3, 2, 5, 4), got (3, 2, 4, 5)"),
    (COMBINE, {"out_partial": rand(3, 5, 8)}, Value, "out_partial must have the shape (num_splits, batch, seqlen,"),
    (COMBINE, {"out_partial": torch.ones(3, 2, 5, 4, 8, dtype=torch.int32)}, Value,
     "out_partial must have dtype float16"),
    (COMBINE, {"out_dtype": torch.int32}, Value, "out_dtype must be float16, bfloat16, float32 or float64, "
     "got torch.int32"),
    (COMBINE, {"out": rand(2, 5, 4, 7)}, Value,
     "out must have the shape out_partial's without num_splits = (2, 5, 4, 8)"),
    (COMBINE, {"out": rand(2, 5, 1, 8).expand(2, 5, 4, 8)}, Value,
     "out must not overlap itself, got stride (40, 8, 0, 1) for shape (2, 5, 4, 8)"),
    (COMBINE, {"out": meta(2, 5, 4, 8)}, Value, "out must be on out_partial's device cpu, got meta"),
    (COMBINE, {"out": rand(2, 5, 4, 8), "out_dtype": HALF}, Value, "out must have out_dtype's dtype torch.float16, "
     "got torch.float32"),
    (COMBINE, {"out": grad(rand(2, 5, 4, 8))}, Value, "out must not be given when a gradient is needed"),
    (COMBINE, {"out": rand(2, 5, 4, 8), "out_partial": grad(rand(3, 2, 5, 4, 8))}, Value, "out must not be given when"),
    (COMBINE, {"out": rand(2, 5, 4, 8), "lse_partial": grad(rand(3, 2, 5, 4))}, Value, "out must not be given when"),
    (COMBINE, {"out": 1}, Type, "out must be a torch.Tensor, got int"),
    (COMBINE, {"out": torch.ones(2, 5, 4, 8, dtype=torch.int32)}, Value, "out must have dtype float16"),
    # metadata
    (METADATA, {"batch_size": -1}, Value, "batch_size must be in [0, 2147483647], got -1"),
    (METADATA, {"batch_size": 2.0}, Type, "batch_size must be an int, got 2.0"),
    (METADATA, {"num_heads_q": 3}, Value, "num_heads_q must be a multiple of num_heads_kv 2, got 3"),
    (METADATA, {"num_heads_kv": 0}, Value, "num_heads_kv must be in [1, 2147483647], got 0"),
    (METADATA, {"num_heads_q": 0}, Value, "num_heads_q must be in [1, 2147483647], got 0"),
    (METADATA, {"headdim": 577}, Value, "headdim must be in [1, 576], got 577"),
    (METADATA, {"headdim_v": 0}, Value, "headdim_v must be in [1, 512], got 0"),
    (METADATA, {"qkv_dtype": torch.int8}, Value,
     "qkv_dtype must be float16, bfloat16, float32 or float64, got torch.int8"),
    (METADATA, {"max_seqlen_k": -3}, Value, "max_seqlen_k must be at least 0, got -3"),
    (METADATA, {"max_seqlen_k_new": 2**63}, Value, "max_seqlen_k_new must be at most 2147483647"),
    (METADATA, {"num_heads_q": 2**64}, Value, "num_heads_q must be in [1, 2147483647], got 18446744073709551616"),
    (METADATA, {"cache_seqlens": 4}, Type, "cache_seqlens must be a torch.Tensor, got int"),
    (METADATA, {"cache_seqlens": i32(1)}, Value, "cache_seqlens must have the shape (batch_size,) = (2,), got (1,)"),
    (METADATA, {"cu_seqlens_q": i32(0, 1)}, Value,
     "cu_seqlens_q must have the shape (batch_size + 1,) = (3,), got (2,)"),
    (METADATA, {"cache_leftpad": i32(0, 1).to("meta")}, Value, "cache_leftpad must be on cache_seqlens's device cpu"),
    (METADATA, {"page_size": 0}, Value, "page_size must be in [1, 2147483647], got 0"),
    (METADATA, {"causal": None}, Type, "causal must be a bool, got None"),
    (METADATA, {"window_size": (1, 2, 3)}, Value, "window_size must have two elements (left, right), got (1, 2, 3)"),
    (METADATA, {"has_softcap": 0.0}, Type, "has_softcap must be a bool, got 0.0"),
    (METADATA, {"num_splits": 300}, Value, "num_splits must be in [0, 256] (0 chooses), got 300"),
    (METADATA, {"pack_gqa": 0}, Type, "pack_gqa must be None, True or False, got 0"),
    (METADATA, {"attention_chunk": 64}, Unsupported,
     "attention_chunk must be 0 (nothing else is supported yet), got 64"),
    (METADATA, {"sm_margin": 8}, Unsupported, "sm_margin must be 0 (nothing else is supported yet), got 8"),
]  # fmt: skip


def case_id(case):
    (function, _), changes, _, _ = case
    return f"{function.__name__}-{'-'.join(changes)}"


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_error(case):
    valid, changes, error, message = case
    with pytest.raises(error, match=re.escape(message)) as raised:
        call_of(valid, changes)
    assert type(raised.value) is error


@pytest.mark.parametrize("valid", [APPEND, PACKED_APPEND, ROTARY], ids=["append", "packed_append", "rotary"])
def test_an_error_leaves_the_cache_alone(valid):
    function, arguments = valid
    k_cache, v_cache = arguments["k_cache"].clone(), arguments["v_cache"].clone()
    with pytest.raises(ValueError, match="num_splits"):
        function(**{**arguments, "k_cache": k_cache, "v_cache": v_cache, "num_splits": -1})
    assert torch.equal(k_cache, arguments["k_cache"]) and torch.equal(v_cache, arguments["v_cache"])
