"""Sends calls to the kernels of the package that build_support/emulator.py builds, which run on the CPU."""

import os

import torch

from flash_attn import _dispatch, _extension, _ops

IS_EMULATED = _extension.build_info.cuda == "emulated"
# The shared memory of the emulated GPU's thread blocks: that of SM90, SM80 or SM86.
SMEM_BYTES = int(os.environ.get("FLASH_ATTN_EMULATOR_SMEM_KB", "227")) * 1024

_OPS = ("forward", "forward_out", "backward", "backward_out", "attn_probs", "append_kv", "rotary", "combine")
_objections = _dispatch.objections
_library = None  # keeps the registrations


def can_run(path):
    """Whether the package has kernels of the path: what they are emulated for, or compiled for a GPU that is here."""
    spec = _dispatch.PATHS[path]
    if IS_EMULATED:
        return spec.arch in _extension.build_info.archs
    here = torch.cuda.is_available() and spec.runs_on(torch.cuda.get_device_capability())
    return here and spec.arch in _extension.build_info.archs


def _objections_of_emulated(name, q, head_dim_v, features):
    """As _dispatch.objections, of a GPU with SMEM_BYTES."""
    if name == "cpu":
        return _objections(name, q, head_dim_v, features)
    spec = _dispatch.PATHS[name]
    return _dispatch.plan_objections(spec, q.dtype, q.shape[-1], head_dim_v, features, SMEM_BYTES)


def serve_cpu_tensors():
    """The ops are registered for CUDA tensors, which the dispatchers of torch and of the package tell from others."""
    global _library
    _dispatch.objections = _objections_of_emulated
    _library = torch.library.Library("flash_attn", "IMPL", "CPU")
    for name in _OPS:
        op = getattr(torch.ops.flash_attn, name).default
        _library.impl(name, lambda *arguments, op=op: op.redispatch(_ops._CUDA_KEY, *arguments))


if IS_EMULATED:
    serve_cpu_tensors()
