"""What is measured: this package, torch's attention, and the peers that can be imported.

An implementation prepares a case: it lays the tensors out as it wants them, outside the measured time, and gives the
call. What has no such call raises Unsupported.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import flash_attn
from flash_attn import _dispatch
from flash_attn.bench.check import Inputs, alibi_bias, hidden_pairs
from flash_attn.bench.suites import FULL, Case


class Unsupported(Exception):
    """The implementation has no call for the case."""


@dataclass(frozen=True)
class Prepared:
    call: Callable[[], Any]
    # From what the call gives to (batch, seqlen, heads, head_dim_v), or (tokens, heads, head_dim_v) for a packed case.
    in_our_layout: Callable[[Any], Any] = lambda out: out


def backward_of(prepared: Prepared, inputs: Inputs) -> Prepared:
    """The backward pass of a prepared call, which runs forward once: (dq, dk, dv) in our layout."""
    out = prepared.in_our_layout(prepared.call())
    leaves = (inputs.q, inputs.k, inputs.v)
    return Prepared(lambda: torch.autograd.grad(out, leaves, inputs.dout, retain_graph=True))


@dataclass(frozen=True)
class Implementation:
    name: str
    prepare: Callable[[Case, Inputs], Prepared]
    # Entered around the calls: switching backends must not count as time of a call.
    context: Callable[[], AbstractContextManager] = nullcontext


def _unless(case: Case, *options: str) -> None:
    """Raises if the case uses one of the options, named by Case's fields."""
    for option in options:
        value = getattr(case, option)
        if value and value != FULL:
            raise Unsupported(f"no {option}")


def _first(result: Tensor | tuple) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


# ---- This package, and packages with its kind of functions -------------------------------------------------------


def _prepare_ours(case: Case, inputs: Inputs, deterministic: bool = False) -> Prepared:
    if case.cached:
        return _prepare_cache(flash_attn, "block_table", case, inputs)
    options = {"causal": case.causal, "window_size": case.window, "softcap": case.softcap}
    options |= {"dropout_p": case.dropout_p, "alibi_slopes": inputs.alibi_slopes, "s_aux": inputs.sinks}
    options["deterministic"] = deterministic
    defaults = {"causal": False, "window_size": FULL, "softcap": 0.0, "dropout_p": 0.0, "deterministic": False}
    # A user of the plain call does not spell the defaults out.
    options = {name: value for name, value in options.items() if value is not None and value != defaults.get(name)}
    q, k, v = inputs.q, inputs.k, inputs.v
    if case.lengths:
        packing = (inputs.cu_seqlens, inputs.cu_seqlens, case.seqlen_q, case.seqlen_k)
        return Prepared(lambda: flash_attn.flash_attn_varlen_func(q, k, v, *packing, **options))
    return Prepared(lambda: flash_attn.flash_attn_func(q, k, v, **options))


def _prepare_cache(module: ModuleType, table: str, case: Case, inputs: Inputs) -> Prepared:
    """A step of decoding; `table` is what the module calls its block table."""
    k, v = inputs.pages or (inputs.k, inputs.v)
    options = {table: inputs.block_table} if case.page else {}
    options |= {"cache_seqlens": inputs.cache_seqlens, "causal": case.causal}
    return Prepared(lambda: _first(module.flash_attn_with_kvcache(inputs.q, k, v, **options)))


def _prepare_with(module: ModuleType, infinite: int | None):
    """FlashAttention-3 and -4: `infinite` is how they write a side of the window that has no bound."""

    def prepare(case: Case, inputs: Inputs) -> Prepared:
        _unless(case, "alibi", "sinks", "dropout_p")
        if case.cached:
            if not hasattr(module, "flash_attn_with_kvcache"):
                raise Unsupported("no flash_attn_with_kvcache")
            return _prepare_cache(module, "page_table", case, inputs)
        window = tuple(infinite if side < 0 else side for side in case.window)
        options = {"causal": case.causal, "window_size": window}
        options |= {"softcap": case.softcap} if case.softcap else {}
        q, k, v = inputs.q, inputs.k, inputs.v
        if case.lengths:
            options |= {"cu_seqlens_q": inputs.cu_seqlens, "cu_seqlens_k": inputs.cu_seqlens}
            options |= {"max_seqlen_q": case.seqlen_q, "max_seqlen_k": case.seqlen_k}
            return Prepared(lambda: _first(module.flash_attn_varlen_func(q, k, v, **options)))
        return Prepared(lambda: _first(module.flash_attn_func(q, k, v, **options)))

    return prepare


# ---- torch's scaled_dot_product_attention -------------------------------------------------------------------------


def _prepare_sdpa(case: Case, inputs: Inputs) -> Prepared:
    """On a padded batch where the case is packed; with an explicit mask where SDPA has no other way to say it."""
    _unless(case, "softcap", "sinks", "page")
    q, k, v = (_padded(case, x).transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
    # Causal self-attention hides the padding, which stands at the end, from every query that counts.
    top_left_is_bottom_right = case.seqlen_q == case.seqlen_k
    is_causal = case.sides == (-1, 0) and top_left_is_bottom_right and not case.alibi
    options = {"is_causal": True} if is_causal else {}
    if case.dropout_p:
        options["dropout_p"] = case.dropout_p
    if case.heads != case.heads_k:
        options["enable_gqa"] = True
    if not is_causal:
        mask = _explicit_mask(case, inputs)
        options |= {} if mask is None else {"attn_mask": mask}

    def in_our_layout(out: Tensor) -> Tensor:
        out = out.transpose(1, 2)
        return out[_used(case, out.device)] if case.lengths else out

    return Prepared(lambda: F.scaled_dot_product_attention(q, k, v, **options), in_our_layout)


def _used(case: Case, device: torch.device) -> Tensor:
    lengths = torch.tensor(case.lengths, device=device)
    return torch.arange(max(case.lengths), device=device) < lengths[:, None]


def _padded(case: Case, x: Tensor) -> Tensor:
    if not case.lengths:
        return x
    return x.new_zeros(len(case.lengths), max(case.lengths), *x.shape[1:]).index_put((_used(case, x.device),), x)


def _explicit_mask(case: Case, inputs: Inputs) -> Tensor | None:
    device = inputs.q.device
    masked = case.sides != FULL and not (case.seqlen_q == 1 and case.sides == (-1, 0))
    hidden = hidden_pairs(case.seqlen_q, case.seqlen_k, case.sides, device)[None, None] if masked else None
    if case.lengths:
        padding = ~_used(case, device)[:, None, None, :]
        hidden = padding if hidden is None else hidden | padding
    if case.alibi:
        bias = alibi_bias(inputs.alibi_slopes, case.seqlen_q, case.seqlen_k)[None].to(inputs.q.dtype)
        return bias if hidden is None else bias.masked_fill(hidden, -torch.inf)
    return None if hidden is None else ~hidden


def _prepare_torch_flash(case: Case, inputs: Inputs) -> Prepared:
    """SDPA's flash backend takes no mask; windows and packed batches go to the same kernels by varlen_attn."""
    _unless(case, "alibi")
    if not case.lengths and case.window == FULL:
        return _prepare_sdpa(case, inputs)
    _unless(case, "softcap", "sinks", "dropout_p")
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = ((x if case.lengths else x.flatten(0, 1)) for x in (inputs.q, inputs.k, inputs.v))
    packing = (inputs.cu_seqlens, inputs.cu_seqlens, case.seqlen_q, case.seqlen_k)
    shape = q.shape[:-1] if case.lengths else (case.batch, case.seqlen_q, case.heads)

    def in_our_layout(out: Tensor) -> Tensor:
        return out.view(*shape, case.head_dim_v)

    return Prepared(lambda: varlen_attn(q, k, v, *packing, window_size=case.sides), in_our_layout)


def _prepare_torch_math(case: Case, inputs: Inputs) -> Prepared:
    num_scores = case.batch * case.heads * case.seqlen_q * case.seqlen_k
    if num_scores > 2**34:  # 64 GB in float32, twice
        raise Unsupported(f"{num_scores * 4 / 2**30:.0f} GiB of scores")
    return _prepare_sdpa(case, inputs)


# ---- torch's FlexAttention ----------------------------------------------------------------------------------------


def _prepare_flex(case: Case, inputs: Inputs) -> Prepared:
    _unless(case, "sinks", "dropout_p", "lengths", "page")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    left, right = case.sides
    offset = case.seqlen_k - case.seqlen_q
    far_left, far_right = (side if side >= 0 else case.seqlen_q + case.seqlen_k for side in (left, right))
    slopes, softcap = inputs.alibi_slopes, case.softcap

    def visible(b, h, i, j):
        return (i + offset - j <= far_left) & (j - i - offset <= far_right)

    def modified(score, b, h, i, j):
        if softcap:
            score = softcap * torch.tanh(score / softcap)
        return score if slopes is None else score - slopes[h] * (i + offset - j).abs()

    device = inputs.q.device.type
    mask = None
    if case.sides != FULL:
        mask = create_block_mask(visible, None, None, case.seqlen_q, case.seqlen_k, device=device)
    score_mod = modified if softcap or case.alibi else None
    torch._dynamo.reset()  # every case is a compilation of its own, and Dynamo counts and limits them
    compiled = torch.compile(flex_attention, dynamic=False)
    q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
    options = {"score_mod": score_mod, "block_mask": mask, "enable_gqa": case.heads != case.heads_k}
    return Prepared(lambda: compiled(q, k, v, **options), lambda out: out.transpose(1, 2))


# ---- The table ----------------------------------------------------------------------------------------------------

_SDPA_BACKENDS = {
    "flash": (SDPBackend.FLASH_ATTENTION, _prepare_torch_flash),
    "cudnn": (SDPBackend.CUDNN_ATTENTION, _prepare_sdpa),
    "efficient": (SDPBackend.EFFICIENT_ATTENTION, _prepare_sdpa),
    "math": (SDPBackend.MATH, _prepare_torch_math),
}
# name -> modules to try, and how they write an unbounded side of the window.
_PEERS = {
    "fa3": (("flash_attn_interface", "fa3_fwd_interface"), -1),
    "fa4": (("flash_attn.cute.interface",), None),
}
# ours80, ours90: this package with one path forced.
_FORCED = {f"ours{path.arch}": name for name, path in _dispatch.PATHS.items() if path.arch is not None}
# det, det80, det90: the same with deterministic=True. Their names don't begin with "ours", so that they count as peers.
_DETERMINISTIC = {"det": None} | {f"det{path.arch}": name for name, path in _dispatch.PATHS.items() if path.arch}

NAMES = ("ours", *_FORCED, *_DETERMINISTIC, "sdpa", *_SDPA_BACKENDS, "flex", *_PEERS)
MEANINGS = {
    "ours": "this package",
    **{name: f"this package, with use_path({path!r})" for name, path in _FORCED.items()},
    "det": "this package, deterministic=True",
    **{
        name: f"this package, deterministic=True, with use_path({path!r})"
        for name, path in _DETERMINISTIC.items()
        if path is not None
    },
    "sdpa": "torch's scaled_dot_product_attention, its own choice of backend",
    "flash": "the same, FlashAttention-2",
    "cudnn": "the same, cuDNN",
    "efficient": "the same, memory-efficient",
    "math": "the same, standard attention, which stores the scores",
    "flex": "torch's FlexAttention, compiled",
    "fa3": "FlashAttention-3 (flash_attn_interface or the wheel fa3-fwd)",
    "fa4": "FlashAttention-4 (flash_attn.cute)",
}
DEFAULTS = {"cuda": ("ours", "flash", "cudnn", "efficient", "fa3"), "cpu": ("ours", "sdpa")}


def load(name: str) -> Implementation:
    """Raises ValueError for a name that is not one, ImportError for a peer that is not installed."""
    if name == "ours":
        return Implementation(name, _prepare_ours)
    if name in _FORCED:
        return Implementation(name, _prepare_ours, lambda: flash_attn.use_path(_FORCED[name]))
    if name in _DETERMINISTIC:
        path = _DETERMINISTIC[name]
        prepare = partial(_prepare_ours, deterministic=True)
        return Implementation(name, prepare, nullcontext if path is None else lambda: flash_attn.use_path(path))
    if name == "sdpa":
        return Implementation(name, _prepare_sdpa)
    if name in _SDPA_BACKENDS:
        backend, prepare = _SDPA_BACKENDS[name]
        return Implementation(name, prepare, lambda: sdpa_kernel([backend]))
    if name == "flex":
        return Implementation(name, _prepare_flex)
    if name in _PEERS:
        modules, infinite = _PEERS[name]
        return Implementation(name, _prepare_with(_import_first(modules), infinite))
    raise ValueError(f"an implementation must be one of {', '.join(NAMES)}, got {name!r}")


def _import_first(modules: tuple[str, ...]) -> ModuleType:
    reasons = []
    for module in modules:
        try:
            return importlib.import_module(module)
        except Exception as error:  # a peer that breaks while it loads is a peer that is not there
            reasons.append(f"{module}: {type(error).__name__}: {error}")
    raise ImportError("; ".join(reasons))
