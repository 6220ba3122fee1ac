"""What this installation holds and what a call would run: info() and explain()."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from flash_attn import _dispatch, _extension, interface
from flash_attn.version import __version__


@dataclass(frozen=True)
class DeviceInfo:
    """A GPU that torch sees."""

    name: str
    capability: tuple[int, int]


@dataclass(frozen=True)
class Info:
    """What is installed, and the GPUs that torch sees."""

    version: str
    torch: str
    kernels: tuple[str, ...]  # architecture, kind, dtype and head-dim bucket of each kernel family built
    kernels_missing: str | None  # why there are none
    build: _extension.BuildInfo
    devices: tuple[DeviceInfo, ...]

    def __str__(self) -> str:
        lines = [f"flash_attn {self.version}, torch {self.torch}"]
        if self.kernels_missing is None:
            lines.append(f"kernels (CUDA {self.build.cuda}), up to which head dims and with how much shared memory:")
            families: dict[str, list[str]] = {}
            for kernel in self.kernels:
                family, _, bucket = kernel.partition(" d")
                families.setdefault(family, []).append(bucket)
            lines += [f"  {family}: {', '.join(buckets)}" for family, buckets in families.items()]
        else:
            lines.append(f"kernels: none, {self.kernels_missing}")
        lines += [
            f"cuda:{index}: {device.name}, compute capability {device.capability[0]}.{device.capability[1]}"
            for index, device in enumerate(self.devices)
        ]
        if not self.devices:
            lines.append("no GPU: calls run on the CPU path")
        return "\n".join(lines)


def info() -> Info:
    """Tells versions, the kernels that were built or why there are none, and the GPUs. Starts nothing on a GPU.

    Returns
    -------
    Info
        Its attributes are data, its str() is text.
    """
    count = torch.cuda.device_count()
    return Info(
        version=__version__,
        torch=torch.__version__,
        kernels=tuple(
            f"sm{arch} {kind} {dtype} d{qk}/{v} ({smem // 1024} KB)"
            for kind, arch, dtype, (qk, v, smem) in sorted(_extension.kernels.built)
        ),
        kernels_missing=_extension.load_error(),
        build=_extension.build_info,
        devices=tuple(
            DeviceInfo(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index))
            for index in range(count)
        ),
    )


@dataclass(frozen=True)
class Explanation:
    """Which path serves a call, why the others don't, and the plan of each set of kernels that has one."""

    function: str
    path: str | None  # None: no path serves the call as it stands
    objections: dict[str, list[str]]  # path -> why it does not serve the call; empty if it would
    plans: dict[str, dict[str, Any]] = field(default_factory=dict)
    unproven: dict[str, list[str]] = field(default_factory=dict)  # path -> what of the call no GPU has run yet on it

    def __str__(self) -> str:
        lines = [f"{self.function}: {self.path or 'no path serves this call'}"]
        for name, reasons in self.objections.items():
            chosen = "  <- runs" if name == self.path else ""
            said = "; ".join(reasons) or "serves it"
            if not reasons and self.unproven.get(name):
                said += f", with kernels that no GPU has run yet for {', '.join(self.unproven[name])}"
            lines.append(f"  {name}: {said}{chosen}")
            if name in self.plans:
                plan = self.plans[name]
                if plan["arch"] != _dispatch.PATHS[name].arch:
                    why = _WHY_SM80_PAGES if plan["pages_need_sm80"] else _WHY_SM80_ROWS
                    lines.append(f"    a kernel of SM{plan['arch']}: {why}")
                lines.append(
                    f"    variant {plan['dtype']} d{plan['head_dim']}/{plan['head_dim_v']} {plan['mask']} mask, "
                    f"{plan['score']} score, "
                    f"tile {plan['tile_m']} x {plan['tile_n']}, {plan['num_threads']} threads, "
                    f"{plan['smem_bytes'] // 1024} KB of shared memory, {plan['num_blocks']} blocks, "
                    f"{_splits(plan)}"
                )
                if plan["copies"]:
                    lines.append(f"    copies {', '.join(plan['copies'])} first: {_WHY_COPIES}")
                if "backward" in plan:
                    lines.append(_backward_line(plan["backward"]))
        return "\n".join(lines)


_WHY_SM80_ROWS = "few query rows, for which they have smaller tiles and split keys"
_WHY_SM80_PAGES = (
    "SM90's take pages of a multiple of 16 tokens, without leftpad_k, whose rows lie apart in steps of 16 bytes"
)
_WHY_COPIES = "rows have to lie apart, with the last dimension contiguous, in steps of 16 bytes from aligned addresses"


def _backward_line(plan: dict[str, Any]) -> str:
    return (
        f"    backward by SM{plan['arch']}'s kernels, d{plan['head_dim']}/{plan['head_dim_v']}, {plan['score']} score, "
        f"tile {plan['tile_m']} x {plan['tile_n']}, {plan['num_threads']} threads, "
        f"{plan['smem_bytes'] // 1024} KB of shared memory, {plan['num_blocks']} blocks, "
        f"{plan['workspace_bytes']} bytes of workspace for dQ"
    )


def _splits(plan: dict[str, Any]) -> str:
    heads = f", {plan['packed_heads']} heads in a tile" if plan.get("packed_heads", 1) > 1 else ""
    splits = plan["num_splits"]
    return ("keys split by their lengths" if splits == 0 else f"{splits} split(s)") + heads


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Tells what a call of a public function would run, and why not something else. Runs nothing.

    Parameters
    ----------
    function : callable
        `flash_attn_func` or another public attention function.
    *args, **kwargs
        Its arguments. Where the kernels are built, they are planned for tensors on the CPU or on the meta device
        too, so that a machine without a GPU can tell what one with a GPU would run.

    Returns
    -------
    Explanation
        Its attributes are data, its str() is text.

    Raises
    ------
    TypeError, ValueError
        As the call itself would; ValueError too if function is none of these functions.
    """
    call = interface.build_call(function, *args, **kwargs)
    return explain_call(function.__name__, call)


def explain_call(title: str, call: Any) -> Explanation:
    objections = {
        name: _dispatch.objections(name, call.q, call.head_dims[1], call.features) for name in _dispatch.PATHS
    }
    try:
        path = _dispatch.path_of_explained(call.q, call.head_dims, call.features)
    except NotImplementedError:
        path = None
    plans, smem_bytes = {}, _dispatch.smem_bytes_for(call.q)
    for spec in _dispatch.PATHS.values():
        if spec.arch is None or not _extension.is_loaded():
            continue
        if not _dispatch.plan_objections(spec, call.q.dtype, *call.head_dims, call.features, smem_bytes):
            plan = json.loads(torch.ops.flash_attn.explain_forward(*call.op_arguments(), spec.arch))
            if call.needs_grad:
                plan["backward"] = json.loads(torch.ops.flash_attn.explain_backward(*call.op_arguments(), spec.arch))
            plans[spec.name] = plan
    unproven = {name: _dispatch.unproven_features(spec, call.features) for name, spec in _dispatch.PATHS.items()}
    return Explanation(title, path, objections, plans, unproven)
