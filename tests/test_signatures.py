"""The public signatures, word for word: clients pass positionally, by keyword, and by inspect.signature."""

import inspect
import re

import pytest

import flash_attn
import flash_attn_2_cuda
from flash_attn import bert_padding, flash_attn_interface, interface

_DENSE = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)
_MORE = "s_aux=None, out=None, return_softmax_lse=False"
_HINTS = "num_splits=0, pack_gqa=None"

SIGNATURES = {
    "flash_attn_func": f"(q, k, v, {_DENSE}, *, {_MORE}, {_HINTS})",
    "flash_attn_qkvpacked_func": f"(qkv, {_DENSE}, *, {_MORE}, {_HINTS})",
    "flash_attn_kvpacked_func": f"(q, kv, {_DENSE}, *, {_MORE}, {_HINTS})",
    "flash_attn_varlen_func": (
        "(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=None, max_seqlen_k=None, "
        f"{_DENSE}, block_table=None, *, seqused_q=None, seqused_k=None, leftpad_k=None, {_MORE}, "
        f"scheduler_metadata=None, {_HINTS})"
    ),
    "flash_attn_varlen_qkvpacked_func": f"(qkv, cu_seqlens, max_seqlen=None, {_DENSE}, *, {_MORE}, {_HINTS})",
    "flash_attn_varlen_kvpacked_func": (
        f"(q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=None, max_seqlen_k=None, {_DENSE}, *, {_MORE}, {_HINTS})"
    ),
    "flash_attn_with_kvcache": (
        "(q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
        "cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, "
        "window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
        "return_softmax_lse=False, *, s_aux=None, out=None, cu_seqlens_q=None, max_seqlen_q=None, "
        "cu_seqlens_k_new=None, scheduler_metadata=None, pack_gqa=None)"
    ),
    "flash_attn_combine": "(out_partial, lse_partial, out=None, out_dtype=None)",
    "get_scheduler_metadata": (
        "(batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, cache_seqlens, "
        "qkv_dtype=torch.bfloat16, headdim_v=None, cu_seqlens_q=None, cu_seqlens_k_new=None, cache_leftpad=None, "
        "page_size=None, max_seqlen_k_new=0, causal=False, window_size=(-1, -1), attention_chunk=0, "
        "has_softcap=False, num_splits=0, pack_gqa=None, sm_margin=0)"
    ),
}

BERT_PADDING = {
    "index_first_axis": "(input, indices)",
    "index_put_first_axis": "(values, indices, first_axis_dim)",
    "unpad_input": "(hidden_states, attention_mask, unused_mask=None)",
    "pad_input": "(hidden_states, indices, batch, seqlen)",
}

_WINDOW = "window_size_left, window_size_right, softcap, alibi_slopes"
_LENGTHS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
_OF_BACKWARD = "dout, q, k, v, out, softmax_lse, dq, dk, dv"
FA2_INTERFACE = {
    "_flash_attn_forward": f"(q, k, v, dropout_p, softmax_scale, causal, {_WINDOW}, return_softmax)",
    "_flash_attn_varlen_forward": (
        f"(q, k, v, {_LENGTHS}, dropout_p, softmax_scale, causal, window_size_left=-1, window_size_right=-1, "
        "softcap=0.0, alibi_slopes=None, return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None, "
        "zero_tensors=False)"
    ),
    "_flash_attn_backward": (
        f"({_OF_BACKWARD}, dropout_p, softmax_scale, causal, {_WINDOW}, deterministic, rng_state=None)"
    ),
    "_flash_attn_varlen_backward": (
        f"({_OF_BACKWARD}, {_LENGTHS}, dropout_p, softmax_scale, causal, {_WINDOW}, deterministic, rng_state=None, "
        "zero_tensors=False)"
    ),
}
# How many arguments FlashAttention-2's compiled functions take, by position, and how many may be left out.
FA2_CUDA = {"fwd": (13, 0), "varlen_fwd": (22, 1), "bwd": (19, 0), "varlen_bwd": (24, 0)}


def without_annotations(function) -> str:
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=signature.empty))


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    assert without_annotations(getattr(interface, name)) == SIGNATURES[name]


@pytest.mark.parametrize("name", BERT_PADDING)
def test_bert_padding_signature(name):
    assert without_annotations(getattr(bert_padding, name)) == BERT_PADDING[name]


def test_every_public_function_is_exported():
    assert set(interface.__all__) == set(SIGNATURES)
    assert set(bert_padding.__all__) == set(BERT_PADDING)
    for name in SIGNATURES:
        assert getattr(flash_attn, name) is getattr(interface, name)


@pytest.mark.parametrize("name", SIGNATURES)
def test_docstring_explains_every_parameter(name):
    function = getattr(interface, name)
    doc = inspect.getdoc(function)
    assert "Parameters\n---" in doc and "Returns\n---" in doc and "Raises\n---" in doc
    shared = inspect.signature(interface.flash_attn_func).parameters
    elsewhere = shared if "All other parameters are `flash_attn_func`'s." in doc else ()
    missing = [p for p in inspect.signature(function).parameters if p not in elsewhere and p not in doc]
    assert not missing


@pytest.mark.parametrize("packed", ["flash_attn_qkvpacked_func", "flash_attn_kvpacked_func", "flash_attn_varlen_func"])
def test_dense_options_exist_everywhere(packed):
    """transformers reads varlen's signature alone, and passes what it finds to the dense function too."""
    dense = list(inspect.signature(interface.flash_attn_func).parameters)[3:]
    other = inspect.signature(getattr(interface, packed)).parameters
    assert [name for name in dense if name not in other] == []


@pytest.mark.parametrize("name", FA2_INTERFACE)
def test_fa2_interface(name):
    """ring-flash-attention finds the arguments by inspect.getfullargspec, which sees through no wrapper."""
    function = getattr(flash_attn_interface, name)
    assert without_annotations(function) == FA2_INTERFACE[name]
    assert getattr(flash_attn_interface, f"_wrapped{name}") is function
    parameters = list(inspect.signature(function).parameters)
    assert inspect.isfunction(function) and inspect.getfullargspec(function).args == parameters
    words = set(re.findall(r"\w+", inspect.getdoc(function)))
    assert [parameter for parameter in parameters if parameter not in words] == []


@pytest.mark.parametrize("name", FA2_CUDA)
def test_fa2_cuda(name):
    parameters = inspect.signature(getattr(flash_attn_2_cuda, name)).parameters.values()
    assert all(p.kind is p.POSITIONAL_ONLY for p in parameters)
    assert (len(parameters), sum(p.default is not p.empty for p in parameters)) == FA2_CUDA[name]
