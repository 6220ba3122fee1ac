"""The torch ops: schemas, implementations, fakes and gradients, and the functions that call them.

The Python ops (cpu_*) run backends/cpu.py on any device. The CUDA ops without that prefix, which the extension
defines, take the same arguments and the architecture; they get their fakes and autograd formulas here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from flash_attn import _dispatch, _extension, _flops
from flash_attn._arguments import batch_size_of
from flash_attn._checks import NUM_OP_ARGUMENTS, ForwardCall
from flash_attn._checks_backward import BackwardCall
from flash_attn._plain import fix_places, is_batch, is_plain, is_plain_without_grad, refuse_transforms
from flash_attn.backends import cpu

_Outputs = tuple[Tensor, Tensor]

_LIB = torch.library.Library("flash_attn", "FRAGMENT")
_CUDA_KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)

_LENGTHS = "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_q, Tensor? seqused_k"
_PLACES = "Tensor? leftpad_k, Tensor? block_table, Tensor? cache_batch_idx"
_SCORE = (
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float softmax_scale, SymInt window_left, SymInt window_right, "
    "float softcap, float dropout_p"
)
_FORWARD = (
    f"Tensor q, Tensor k, Tensor v, Tensor? s_aux, Tensor? alibi_slopes, Tensor? rng_state, {_LENGTHS}, "
    f"{_PLACES}, Tensor? scheduler_metadata, {_SCORE}, SymInt num_splits, bool? pack_gqa, bool deterministic"
)
_SCHEMAS = {
    "cpu_forward": f"({_FORWARD}) -> (Tensor out, Tensor lse)",
    "cpu_forward_out": f"({_FORWARD}, Tensor(a!) out) -> Tensor lse",
    "cpu_backward": (
        "(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? s_aux, "
        f"Tensor? alibi_slopes, Tensor? rng_state, {_LENGTHS}, {_SCORE}, bool deterministic) "
        "-> (Tensor dq, Tensor dk, Tensor dv, Tensor ds_aux)"
    ),
    "cpu_attn_probs": (
        f"(Tensor q, Tensor k, Tensor lse, Tensor? alibi_slopes, Tensor? rng_state, {_LENGTHS}, {_PLACES}, "
        f"{_SCORE}) -> Tensor"
    ),
    "cpu_append_kv": (
        "(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor? rotary_cos, Tensor? rotary_sin, "
        "Tensor cache_seqlens, Tensor? cu_seqlens_k_new, Tensor? cache_batch_idx, Tensor? block_table, "
        "bool rotary_interleaved) -> Tensor"
    ),
    "cpu_rotary": (
        "(Tensor x, Tensor cos, Tensor sin, Tensor offsets, Tensor? cu_seqlens, bool interleaved, bool advance) "
        "-> Tensor"
    ),
    "cpu_combine": "(Tensor out_partial, Tensor lse_partial, ScalarType? out_dtype) -> (Tensor out, Tensor lse)",
}
_SCORE_ARGUMENTS = slice(ForwardCall._fields.index("max_seqlen_q"), ForwardCall._fields.index("num_splits"))


# ---- Implementations -------------------------------------------------------------------------------------------


def _forward_out(*arguments: Any) -> Tensor:
    result, lse = cpu.forward(*arguments[:-1])
    arguments[-1].copy_(result)
    return lse


# ---- Fakes: shapes, dtypes and strides without a computation ----------------------------------------------------


def _fake_lse(q: Tensor) -> Tensor:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    shape = (q.shape[1], q.shape[0]) if q.ndim == 3 else (q.shape[0], q.shape[2], q.shape[1])
    return q.new_empty(shape, dtype=dtype)


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> _Outputs:
    return q.new_empty((*q.shape[:-1], v.shape[-1])), _fake_lse(q)


def _fake_forward_out(q: Tensor, *_: Any, **__: Any) -> Tensor:
    return _fake_lse(q)


def _fake_backward(
    dout: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    s_aux: Tensor | None, *_: Any, **__: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    ds_aux = q.new_empty((0,), dtype=torch.float32) if s_aux is None else s_aux.new_empty(s_aux.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), ds_aux


def _fake_backward_out(*arguments: Any, **keywords: Any) -> Tensor:
    return _fake_backward(*arguments, **keywords)[-1]


def _fake_attn_probs(
    q: Tensor, k: Tensor, lse: Tensor, alibi_slopes: Tensor | None, rng_state: Tensor | None,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, seqused_q: Tensor | None, seqused_k: Tensor | None,
    leftpad_k: Tensor | None, block_table: Tensor | None, cache_batch_idx: Tensor | None,
    max_seqlen_q: int, max_seqlen_k: int, *_: Any,
) -> Tensor:  # fmt: skip
    batch = batch_size_of(q, cu_seqlens_q)
    rows = max_seqlen_q if cu_seqlens_q is not None else q.shape[1]
    columns = max_seqlen_k if cu_seqlens_k is not None or block_table is not None else k.shape[1]
    return q.new_empty((batch, q.shape[-2], (rows + 127) // 128 * 128, (columns + 127) // 128 * 128))


def _fake_append_kv(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, rotary_cos: Tensor | None, rotary_sin: Tensor | None,
    cache_seqlens: Tensor, *_: Any, **__: Any,
) -> Tensor:  # fmt: skip
    return cache_seqlens.new_empty(cache_seqlens.shape)


def _fake_rotary(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x.new_empty(x.shape)


def _fake_combine(out_partial: Tensor, lse_partial: Tensor, out_dtype: torch.dtype | None) -> _Outputs:
    out = out_partial.new_empty(out_partial.shape[1:], dtype=out_dtype or out_partial.dtype)
    return out, lse_partial.new_empty(lse_partial.shape[1:])


# ---- Gradients -------------------------------------------------------------------------------------------------


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: _Outputs) -> None:
    """Saves what _gradients takes; inputs are the op's, with the kernels' architecture, or nothing for the CPU path."""
    (q, k, v, s_aux, alibi_slopes, rng_state, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k,
     leftpad_k, block_table, cache_batch_idx, *_) = inputs  # fmt: skip
    ctx.set_materialize_grads(False)
    ctx.arch = inputs[NUM_OP_ARGUMENTS:]
    if leftpad_k is not None or block_table is not None or cache_batch_idx is not None:
        places = {"leftpad_k": leftpad_k, "block_table": block_table, "cache_batch_idx": cache_batch_idx}
        ctx.without_backward = [name for name, value in places.items() if value is not None]
        return
    ctx.without_backward = None
    ctx.options = (*inputs[_SCORE_ARGUMENTS], inputs[NUM_OP_ARGUMENTS - 1])
    ctx.save_for_backward(
        q, k, v, *output, s_aux, alibi_slopes, rng_state, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k
    )


def _gradients(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of q, k, v and s_aux."""
    if ctx.without_backward:
        raise NotImplementedError(f"there is no backward through {', '.join(ctx.without_backward)}")
    if dout is None and dlse is None:
        return None, None, None, None
    saved = ctx.saved_tensors
    # A second differentiation has to meet the op, which refuses it.
    direct = not torch.is_grad_enabled() and is_plain(*saved[:7], dout, dlse) and not is_batch(dout, dlse)
    if not direct:
        refuse_transforms(dout, dlse)
    arguments = (dout, dlse, *saved, *ctx.options, *ctx.arch)
    if ctx.arch:
        grads = _run_kernel("backward", arguments) if direct else torch.ops.flash_attn.backward(*arguments)
    else:
        grads = (cpu.backward if direct else torch.ops.flash_attn.cpu_backward)(*arguments)
    dq, dk, dv, ds_aux = grads
    needs_q, needs_k, needs_v, needs_s_aux = ctx.needs_input_grad[:4]
    return dq if needs_q else None, dk if needs_k else None, dv if needs_v else None, ds_aux if needs_s_aux else None


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    """The op's: a gradient for each argument. q, k, v and s_aux, which have one, are the first four."""
    return *_gradients(ctx, dout, dlse), *(None,) * (NUM_OP_ARGUMENTS - 4 + len(ctx.arch))


def _run_kernel(name: str, arguments: tuple[Any, ...]) -> Any:
    """Straight to the CUDA kernel: what the dispatcher does before it costs more than a small call on a GPU."""
    return _redispatch[name](_CUDA_KEY, *arguments)


# Name -> its op's OpOverload.redispatch, found and bound once. The compiled module's ops alone.
_redispatch: dict[str, Any] = {}


class _EagerForward(torch.autograd.Function):
    """The forward ops and their gradient without the dispatcher's Python kernels for autograd.

    All arguments but the first four, which have a gradient, are one: autograd looks at each.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None, others: tuple[Any, ...]) -> _Outputs:
        arguments = (q, k, v, s_aux, *others)
        on_cpu_path = len(arguments) == NUM_OP_ARGUMENTS
        output = cpu.forward(*arguments) if on_cpu_path else _run_kernel("forward", arguments)
        _setup_backward(ctx, arguments, output)
        return output

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, dout, dlse), None


# Without what Function.apply does for transforms, of which there are none in a plain call.
_apply_eager_forward = super(torch.autograd.Function, _EagerForward).apply


def _forward_with_gradient(*arguments: Any) -> _Outputs:
    return _apply_eager_forward(*arguments[:4], arguments[4:])


def _refuse_backward(what: str) -> Any:
    def backward(ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(what)

    return backward


def _refuse_vmap(name: str) -> Any:
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> None:
        raise NotImplementedError(f"flash_attn::{name} has no batching rule for torch.vmap; pass a batch dimension")

    return vmap


# Of the ops whose results have no gradient.
_REFUSED_GRADIENTS = {
    "backward": "attention has no second derivative",
    "attn_probs": "S_dmask of return_attn_probs has no gradient",
    "rotary": "there is no backward through the rotary embedding of flash_attn_with_kvcache",
    "combine": "there is no backward through flash_attn_combine",
}
_FAKES = {
    "forward": _fake_forward,
    "forward_out": _fake_forward_out,
    "backward": _fake_backward,
    "attn_probs": _fake_attn_probs,
    "append_kv": _fake_append_kv,
    "rotary": _fake_rotary,
    "combine": _fake_combine,
}
# Ops that write arguments, and which.
_WRITTEN = {"forward_out": (-1,), "append_kv": (0, 1)}


# ---- Registration ----------------------------------------------------------------------------------------------


def _in_place(name: str, mutated: tuple[int, ...]) -> Any:
    """The ADInplaceOrView kernel of an op that writes arguments: autograd has to learn that they changed."""
    op = getattr(torch.ops.flash_attn, name).default

    def kernel(keyset: Any, *arguments: Any) -> Any:
        for index in mutated:
            torch.autograd.graph.increment_version(arguments[index])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *arguments)

    return kernel


def _register(prefix: str, fakes: dict[str, Any], written: dict[str, tuple[int, ...]]) -> None:
    """What torch has to know of defined ops to trace, differentiate, functionalise and count them."""
    for name, fake in fakes.items():
        torch.library.register_fake(f"flash_attn::{prefix}{name}", fake, lib=_LIB)
    _register_autograd(prefix + "forward", _backward, _setup_backward)
    for name, what in _REFUSED_GRADIENTS.items():
        _register_autograd(prefix + name, _refuse_backward(what))
    for name in fakes:
        torch.library.register_vmap(f"flash_attn::{prefix}{name}", _refuse_vmap(prefix + name), lib=_LIB)
    for name, mutated in written.items():
        _LIB.impl(prefix + name, _in_place(prefix + name, mutated), "ADInplaceOrView", with_keyset=True)
    for name in _flops.FORMULAS.keys() & fakes.keys():
        register_flop_formula(getattr(torch.ops.flash_attn, prefix + name), get_raw=True)(_flops.FORMULAS[name])


def _register_autograd(name: str, backward: Any, setup_context: Any = None) -> None:
    torch.library.register_autograd(f"flash_attn::{name}", backward, setup_context=setup_context, lib=_LIB)


def _register_python_ops() -> None:
    for name in _FAKES:
        _LIB.define(f"cpu_{name}" + _SCHEMAS[f"cpu_{name}"], tags=(torch.Tag.pt2_compliant_tag,))
        implementation = _forward_out if name == "forward_out" else getattr(cpu, name)
        _LIB.impl(f"cpu_{name}", implementation, "CompositeExplicitAutograd")
    _register("cpu_", _FAKES, _WRITTEN)


def _register_cuda_ops() -> None:
    for name in ("forward", "forward_out", "backward", "append_kv", "rotary", "combine"):
        _redispatch[name] = getattr(torch.ops.flash_attn, name).default._handle.redispatch_boxed
    _register("", _FAKES | {"backward_out": _fake_backward_out}, _WRITTEN | {"backward_out": (-3, -2, -1)})


_register_python_ops()
if _extension.is_loaded():
    _register_cuda_ops()


# ---- Calls -----------------------------------------------------------------------------------------------------


def forward(path: str, call: ForwardCall) -> _Outputs:
    """(out, lse) of a checked call on the path chosen for it."""
    out = call.out
    arguments = call.op_arguments()
    if path != "cpu":
        arguments = (*arguments, _dispatch.PATHS[path].arch)
    tensors = call.q, call.k, call.v, out, call.s_aux, call.alibi_slopes
    if is_plain(*tensors):
        if out is not None:
            return out, _write_forward(path, arguments, out)
        if call.needs_grad:
            return _forward_with_gradient(*arguments)
        return cpu.forward(*arguments) if path == "cpu" else _run_kernel("forward", arguments)
    refuse_transforms(*tensors)
    ops = torch.ops.flash_attn
    if out is None:
        return (ops.cpu_forward if path == "cpu" else ops.forward)(*arguments)
    fix_places(out)
    return out, (ops.cpu_forward_out if path == "cpu" else ops.forward_out)(*arguments, out)


def _write_forward(path: str, arguments: tuple[Any, ...], out: Tensor) -> Tensor:
    """lse; `out`, which nothing differentiates, is written without the dispatcher's Python kernels."""
    if path == "cpu":
        return _forward_out(*arguments, out)
    torch.autograd.graph.increment_version(out)
    return _run_kernel("forward_out", (*arguments, out))


def backward(path: str, call: BackwardCall) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of a checked call; what its caller gave of them is written and returned."""
    a = call.forward
    arguments = (
        call.dout, None, a.q, a.k, a.v, call.out, call.lse, a.s_aux, a.alibi_slopes, a.rng_state, a.cu_seqlens_q,
        a.cu_seqlens_k, a.seqused_q, a.seqused_k, *a[_SCORE_ARGUMENTS], a.deterministic,
    )  # fmt: skip
    ops, given = torch.ops.flash_attn, (call.dq, call.dk, call.dv)
    refuse_transforms(call.dout, a.q, a.k, a.v, call.out, call.lse, a.s_aux, *given)
    if path == "cpu":
        computed = ops.cpu_backward(*arguments)
    else:
        arguments = (*arguments, _dispatch.PATHS[path].arch)
        if all(grad is not None for grad in given):
            fix_places(*given)
            ops.backward_out(*arguments, *given)
            return given
        computed = ops.backward(*arguments)
    dq, dk, dv = (new if grad is None else grad.copy_(new) for grad, new in zip(given, computed[:3], strict=True))
    return dq, dk, dv


def attn_probs(path: str, call: ForwardCall, lse: Tensor) -> Tensor:
    """S_dmask of a call that has run; it has no gradient."""
    a = call
    op = torch.ops.flash_attn.cpu_attn_probs if path == "cpu" else torch.ops.flash_attn.attn_probs
    return op(
        a.q.detach(), a.k.detach(), lse.detach(), a.alibi_slopes, a.rng_state, a.cu_seqlens_q, a.cu_seqlens_k,
        a.seqused_q, a.seqused_k, a.leftpad_k, a.block_table, a.cache_batch_idx, a.max_seqlen_q, a.max_seqlen_k,
        a.softmax_scale, a.window_left, a.window_right, a.softcap, a.dropout_p,
    )  # fmt: skip


def append_kv(path: str, arguments: tuple[Any, ...], *used_next: Tensor | None) -> Tensor:
    """Writes new keys and values into the caches, and returns how many the entries have then.

    `used_next` are the attention's other tensors: what it would refuse is refused before anything is written.
    """
    direct = is_plain(*arguments[:6])
    if not direct:
        refuse_transforms(*arguments[:6], *used_next)
        fix_places(*arguments[:2])
    if path == "cpu":
        return (cpu.append_kv if direct else torch.ops.flash_attn.cpu_append_kv)(*arguments)
    if direct:
        torch.autograd.graph.increment_version(arguments[:2])
        return _run_kernel("append_kv", arguments)
    return torch.ops.flash_attn.append_kv(*arguments)


def rotary(path: str, arguments: tuple[Any, ...]) -> Tensor:
    """The rotated queries."""
    direct = is_plain_without_grad(*arguments[:3])
    if not direct:
        refuse_transforms(*arguments[:3])
    if path == "cpu":
        return (cpu.rotary if direct else torch.ops.flash_attn.cpu_rotary)(*arguments)
    return _run_kernel("rotary", arguments) if direct else torch.ops.flash_attn.rotary(*arguments)


def combine(path: str, out_partial: Tensor, lse_partial: Tensor, out_dtype: torch.dtype | None) -> _Outputs:
    arguments = out_partial, lse_partial, out_dtype
    direct = is_plain_without_grad(out_partial, lse_partial)
    if not direct:
        refuse_transforms(out_partial, lse_partial)
    if path == "cpu":
        return (cpu.combine if direct else torch.ops.flash_attn.cpu_combine)(*arguments)
    return _run_kernel("combine", arguments) if direct else torch.ops.flash_attn.combine(*arguments)
