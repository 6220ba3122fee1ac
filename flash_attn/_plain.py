"""Whether a call is plain: nothing but autograd watches its ops, so that it may go straight to what computes. And what
the ops of other calls need."""

from __future__ import annotations

import operator

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Bound once: a small call asks each of them.
_num_dispatch_modes = torch._C._len_torch_dispatch_stack
_innermost_transform = torch._C._functorch.peek_interpreter_stack
_is_profiling = torch._C._autograd._profiler_enabled
_is_tracing = torch._C._is_tracing
_is_grads_batched = torch._C._functorch.is_legacy_batchedtensor
_PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter})


def is_plain(tensor: Tensor, *others: Tensor | None) -> bool:
    """Whether no tracer, profiler, mode, subclass or transform would watch an op with these tensors, which are on one
    device, and their memory holds their values, not the negatives (torch.resolve_neg)."""
    if (
        torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or _num_dispatch_modes()
        or _innermost_transform() is not None
        or _is_profiling()
        or _is_tracing()
        or type(tensor) not in _PLAIN_TYPES
        or tensor.is_meta
        or tensor.is_neg()
    ):
        return False
    for other in others:
        if other is not None and (type(other) not in _PLAIN_TYPES or other.is_neg()):
            return False
    return True


def is_plain_without_grad(*tensors: Tensor) -> bool:
    return is_plain(*tensors) and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


def is_batch(*tensors: Tensor | None) -> bool:
    """Whether one is a batch of torch.autograd.grad(is_grads_batched=True), which only an op takes apart."""
    return any(tensor is not None and _is_grads_batched(tensor) for tensor in tensors)


def refuse_transforms(*tensors: Tensor | None) -> None:
    """torch drops forward-mode tangents at a custom op, and fails on torch.func.grad in words about itself."""
    if _has_tangent(tensors) or _is_differentiated():
        raise NotImplementedError(
            "attention has no rule for torch.func.grad, torch.func.jvp and forward-mode differentiation; "
            "use torch.autograd"
        )


def _is_differentiated() -> bool:
    """By torch.func. What torch.compile traces may not ask, and torch refuses there by itself."""
    if torch.compiler.is_compiling():
        return False
    transform = _innermost_transform()
    unsupported = (torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Jvp)
    return transform is not None and transform.key() in unsupported


def _has_tangent(tensors: tuple[Tensor | None, ...]) -> bool:
    """Of forward-mode differentiation. Within its level, a frozen model's tensors have none."""
    if forward_ad._current_level < 0:
        return False
    return any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def fix_places(*written: Tensor | None) -> None:
    """Has torch.compile take the sizes for constants, where an op writes a view that the graph makes of an input.

    Otherwise Inductor drops the view's storage offset, and the op writes at the start of the input (torch 2.11;
    https://github.com/pytorch/pytorch/issues/198068 is alike). It keeps that of a slice of one dimension. To be removed
    when test_compile.py's test_a_compiled_append_writes_into_views passes without it.
    """
    if not torch.compiler.is_dynamo_compiling():
        return
    for tensor in written:
        base = None if tensor is None else tensor._base
        if base is None or _is_slice(tensor, base):
            continue
        for size in (*base.shape, *tensor.shape):
            operator.index(size)  # int() would leave it variable


def _is_slice(tensor: Tensor, base: Tensor) -> bool:
    """Of one dimension, or the whole."""
    if tensor.ndim != base.ndim or any(tensor.stride(dim) != base.stride(dim) for dim in range(base.ndim)):
        return False
    return len([dim for dim in range(base.ndim) if tensor.size(dim) != base.size(dim)]) <= 1
