"""Which path serves a call, and why another does not: the one place where that is decided.

A path is a family of implementations: the SM90 kernels, the SM80 kernels, the CPU path. A call is described
by its tensors' device, dtype and head dims and by the set of features it uses; a path by those it serves.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from flash_attn import _extension
from flash_attn._arguments import MAX_HEAD_DIM, MAX_HEAD_DIM_V

# Every feature that a call may use, in the order of the support table.
FEATURES = {
    "dense": "dense batches",
    "varlen": "variable lengths (cu_seqlens)",
    "paged": "paged KV (block_table)",
    "causal": "causal mask, bottom-right aligned",
    "window": "sliding window",
    "gqa": "grouped-query and multi-query heads",
    "wide_heads": f"head_dim above {MAX_HEAD_DIM_V}",
    "softcap": "softcap",
    "alibi": "ALiBi slopes",
    "sinks": "attention sinks (s_aux)",
    "dropout": "dropout",
    "seqused_q": "seqused_q",
    "seqused_k": "seqused_k, cache_seqlens",
    "leftpad": "leftpad_k, cache_leftpad",
    "cache_batch_idx": "cache_batch_idx",
    "append": "KV append in place",
    "rotary": "rotary embedding on append",
    "num_splits": "num_splits > 1",
    "combine": "flash_attn_combine",
    "attn_probs": "return_attn_probs with dropout",
    "out": "out=",
    "backward": "backward",
}

DTYPE_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}


@dataclass(frozen=True)
class PathSpec:
    """What a path serves. `features` are keys of FEATURES; `dtypes` are names as FLASH_ATTN_DTYPES takes them."""

    name: str
    title: str
    arch: int | None  # the kernels' architecture; None: plain PyTorch on any device
    capability: tuple[tuple[int, int], tuple[int, int] | None] | None  # compute capabilities, first and last
    dtypes: frozenset[str]
    max_head_dims: tuple[int, int]  # of q and k, and of v
    features: frozenset[str]
    # Of the features, those whose kernels have run in the emulator (docs/contributing.md) and on no GPU yet.
    unproven: frozenset[str] = frozenset()
    backward_arch: int | None = None  # of the kernels that compute gradients after these forwards
    combine_dtypes: frozenset[str] = frozenset()  # of flash_attn_combine's parts, which no attention kernel reads

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Whether a GPU of this compute capability has what the path's kernels use."""
        if self.capability is None:
            return True
        first, last = self.capability
        return first <= capability and (last is None or capability <= last)


_SM90_FEATURES = frozenset(
    {
        "dense",
        "varlen",
        "paged",
        "causal",
        "window",
        "gqa",
        "wide_heads",
        "softcap",
        "alibi",
        "sinks",
        "seqused_q",
        "seqused_k",
        "leftpad",
        "cache_batch_idx",
        "append",
        "rotary",
        "num_splits",
        "out",
        "backward",
    }
)

PATHS = {
    "sm90": PathSpec(
        name="sm90",
        title="SM90 kernels (Hopper)",
        arch=90,
        capability=((9, 0), (9, 0)),
        dtypes=frozenset({"fp16", "bf16"}),
        max_head_dims=(MAX_HEAD_DIM, MAX_HEAD_DIM_V),
        features=_SM90_FEATURES,
        unproven=_SM90_FEATURES,
        backward_arch=80,
    ),
    "sm80": PathSpec(
        name="sm80",
        title="SM80 kernels (Ampere and later)",
        arch=80,
        # Machine code for 8.x and 9.0; the driver compiles the PTX that goes along for what came after.
        capability=((8, 0), None),
        dtypes=frozenset({"fp16", "bf16"}),
        max_head_dims=(MAX_HEAD_DIM, MAX_HEAD_DIM_V),
        features=frozenset(FEATURES),
        unproven=frozenset(
            {
                "wide_heads",
                "paged",
                "leftpad",
                "cache_batch_idx",
                "append",
                "rotary",
                "num_splits",
                "combine",
                "attn_probs",
                "backward",
            }
        ),
        backward_arch=80,
        combine_dtypes=frozenset({"fp16", "bf16", "fp32"}),
    ),
    "cpu": PathSpec(
        name="cpu",
        title="CPU path (PyTorch, any device)",
        arch=None,
        capability=None,
        dtypes=frozenset({"fp16", "bf16", "fp32", "fp64"}),
        max_head_dims=(MAX_HEAD_DIM, MAX_HEAD_DIM_V),
        features=frozenset(FEATURES),
        combine_dtypes=frozenset({"fp16", "bf16", "fp32", "fp64"}),
    ),
}

# Those with kernels, in the order in which they are asked.
_GPU_PATHS = tuple(name for name, path in PATHS.items() if path.arch is not None)

_forced = threading.local()
_chosen: dict[tuple[object, ...], str] = {}
_devices: dict[int, tuple[tuple[int, int], int]] = {}
_LARGEST_SMEM_BYTES = 227 * 1024


@contextmanager
def use_path(name: str) -> Iterator[None]:
    """Runs every call of this thread inside the `with` block on one path, for tests and benchmarks.

    Autograd has threads of its own for GPUs, in which torch.utils.checkpoint runs a function again: there the `with`
    block belongs into that function.

    A call that the path can't serve raises NotImplementedError instead of taking another.

    Parameters
    ----------
    name : str
        "sm90", "sm80" or "cpu". The last is plain PyTorch; it takes CUDA tensors too, and waits for the GPU then.

    Raises
    ------
    ValueError
        If name is not a path.
    """
    if not isinstance(name, str) or name not in PATHS:
        raise ValueError(f"use_path: name must be one of {', '.join(map(repr, PATHS))}, got {name!r}")
    before = getattr(_forced, "path", None)
    _forced.path = name
    try:
        yield
    finally:
        _forced.path = before


def choose_path(q: torch.Tensor, head_dims: tuple[int, int], features: frozenset[str]) -> str:
    """The path for a validated call: the forced one, else the best that serves it. head_dims are q's and v's.

    Warns, once per kind of call and not while compiling, if the kernels are unproven.

    Raises:
        NotImplementedError: if no kernel serves the call; the message gives each path's reasons.
    """
    forced = getattr(_forced, "path", None)
    if forced is None and not q.is_cuda:
        return "cpu"
    if torch.compiler.is_compiling():
        return _best_that_serves(forced, q, head_dims[1], features)
    # Everything that the choice depends on, so that a small call doesn't pay for it each time.
    key = (forced, q.device, q.dtype, head_dims, features)
    path = _chosen.get(key)
    if path is None:
        path = _chosen[key] = _best_that_serves(forced, q, head_dims[1], features)
        _warn_of_unproven(PATHS[path], features)
    return path


def path_of_explained(q: torch.Tensor, head_dims: tuple[int, int], features: frozenset[str]) -> str:
    """As choose_path, of a call that is only asked about: it neither warns nor keeps the call from warning later."""
    forced = getattr(_forced, "path", None)
    if forced is None and not q.is_cuda:
        return "cpu"
    return _best_that_serves(forced, q, head_dims[1], features)


def unproven_features(path: PathSpec, features: frozenset[str]) -> list[str]:
    """Of a call's features those, in words, whose kernels of this path no GPU has run yet."""
    return [FEATURES[key] for key in FEATURES if key in features & path.unproven]


def _warn_of_unproven(path: PathSpec, features: frozenset[str]) -> None:
    unproven = unproven_features(path, features)
    if unproven:
        warnings.warn(
            f"flash_attn: the {path.title} for {', '.join(unproven)} have run in an emulator, and on no GPU yet; "
            "`python -m flash_attn check` compares them with float64 results on this one",
            stacklevel=5,  # whoever called the public function
        )


def _best_that_serves(forced: str | None, q: torch.Tensor, head_dim_v: int, features: frozenset[str]) -> str:
    """Of the paths that serve a call the first with the fewest unproven features."""
    best, fewest = None, len(FEATURES) + 1
    for name in _candidates(forced):
        unproven = len(features & PATHS[name].unproven)
        if unproven < fewest and not objections(name, q, head_dim_v, features):
            best, fewest = name, unproven
    if best is None:
        raise NotImplementedError(_refusal(forced, q, head_dim_v, features))
    return best


def _candidates(forced: str | None) -> tuple[str, ...]:
    return _GPU_PATHS if forced is None else (forced,)


def objections(name: str, q: torch.Tensor, head_dim_v: int, features: frozenset[str]) -> list[str]:
    """Why a path can't serve a call; an empty list if it can."""
    path = PATHS[name]
    if path.capability is None or not q.is_cuda or not _extension.is_loaded():
        return plan_objections(path, q.dtype, q.shape[-1], head_dim_v, features) + _device_objections(path, q)
    capability, smem_bytes = _device_facts(q.device)
    of_capability = _capability_objections(path, capability, str(q.device))
    # Of kernels for another GPU it doesn't matter whether they would fit into this one's shared memory.
    smem_limit = _LARGEST_SMEM_BYTES if of_capability else smem_bytes
    return plan_objections(path, q.dtype, q.shape[-1], head_dim_v, features, smem_limit) + of_capability


def plan_objections(
    path: PathSpec,
    dtype: torch.dtype,
    head_dim: int,
    head_dim_v: int,
    features: frozenset[str],
    smem_bytes: int = _LARGEST_SMEM_BYTES,
) -> list[str]:
    """Why a path's kernels can't serve a call on a GPU whose thread blocks have `smem_bytes` of shared memory."""
    reasons = []
    dtype_name = DTYPE_NAMES[dtype]
    attends = features != {"combine"}
    dtypes = path.dtypes if attends else path.combine_dtypes
    if dtypes and dtype_name not in dtypes:  # no dtype at all: the feature is missing, which is said below
        reasons.append(f"dtype {dtype_name} (it takes {', '.join(sorted(dtypes))})")
    if attends and not _holds(path.max_head_dims, head_dim, head_dim_v):
        reasons.append(f"head_dim {head_dim}/{head_dim_v} (it takes up to {_pair(path.max_head_dims)})")
    reasons += [FEATURES[key] for key in FEATURES if key in features and key not in path.features]
    if attends and not reasons and path.arch is not None and _extension.is_loaded():
        kinds = [("forward", path.arch)]
        if "backward" in features and path.backward_arch is not None:
            kinds.append(("backward", path.backward_arch))
        for kind, arch in kinds:
            reasons += _build_objections(kind, arch, dtype_name, head_dim, head_dim_v, smem_bytes)
    return reasons


def _build_objections(
    kind: str, arch: int, dtype_name: str, head_dim: int, head_dim_v: int, smem_bytes: int
) -> list[str]:
    """What the GPU's shared memory doesn't hold, or FLASH_ATTN_HEAD_DIMS and the like left out of this build."""
    rows = [row for row in _extension.kernels.tile_rows[kind, arch] if _holds(row[:2], head_dim, head_dim_v)]
    dims = f"{kind} at head_dim {head_dim}/{head_dim_v}"
    if not rows:
        largest = max(row[:2] for row in _extension.kernels.tile_rows[kind, arch])
        return [f"{dims} (it takes up to {_pair(largest)})"]
    row = next((row for row in rows if row[2] <= smem_bytes), None)
    if row is None:
        return [f"{dims} needs more shared memory than the {smem_bytes // 1024} KB here"]
    if (kind, arch, dtype_name, row) in _extension.kernels.built:
        return []
    build = _extension.build_info
    return [
        f"this build has no SM{arch} {kind} kernel for {dtype_name} and head_dim {row[0]}/{row[1]}: it was made with "
        f"FLASH_ATTN_ARCHS={_joined(build.archs)}, FLASH_ATTN_HEAD_DIMS={_joined(build.head_dims)}, "
        f"FLASH_ATTN_DTYPES={_joined(build.dtypes)}"
    ]


def _holds(largest: tuple[int, ...], head_dim: int, head_dim_v: int) -> bool:
    return head_dim <= largest[0] and head_dim_v <= largest[1]


def _pair(head_dims: tuple[int, ...]) -> str:
    return "/".join(map(str, head_dims))


def _joined(values: tuple[object, ...]) -> str:
    return ",".join(map(str, values))


def _device_objections(path: PathSpec, q: torch.Tensor) -> list[str]:
    if path.capability is None:
        return []
    if not q.is_cuda:
        return [f"needs CUDA tensors, and q is on {q.device}"]
    return [str(_extension.load_error())]


def _capability_objections(path: PathSpec, capability: tuple[int, int], device: str) -> list[str]:
    if path.runs_on(capability):
        return []
    first, last = path.capability
    needed = f"{first[0]}.{first[1]}"
    if last != first:
        needed += " or later" if last is None else f" to {last[0]}.{last[1]}"
    return [f"needs compute capability {needed}, and {device} has {capability[0]}.{capability[1]}"]


def smem_bytes_for(q: torch.Tensor) -> int:
    """Shared memory of a thread block on q's GPU; for other tensors on the largest that kernels are made for."""
    return _device_facts(q.device)[1] if q.is_cuda else _LARGEST_SMEM_BYTES


def _device_facts(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability, and the bytes of shared memory that a thread block can have."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    # A graph that reads the table is compiled again once the table has changed.
    if torch.compiler.is_compiling():
        return _asked_facts(index)
    if index not in _devices:
        _devices[index] = _asked_facts(index)
    return _devices[index]


def _asked_facts(index: int) -> tuple[tuple[int, int], int]:
    properties = torch.cuda.get_device_properties(index)
    return (properties.major, properties.minor), properties.shared_memory_per_block_optin


def _refusal(forced: str | None, q: torch.Tensor, head_dim_v: int, features: frozenset[str]) -> str:
    lines = [f"{name}: {'; '.join(objections(name, q, head_dim_v, features))}" for name in _candidates(forced)]
    hint = "" if forced == "cpu" else ". The CPU path runs it: with flash_attn.use_path('cpu'), or on CPU tensors"
    return f"no kernel serves this call ({' | '.join(lines)}){hint}"


def support_table() -> str:
    """The table of paths and features that README.md holds, in Markdown."""
    paths = PATHS.values()
    rows = [
        ["", *(path.title for path in paths)],
        ["---", *(":---:" for _ in paths)],
        [
            "dtypes",
            *(", ".join(name for name in DTYPE_NAMES.values() if name in path.dtypes) for path in paths),
        ],
        ["head dims of q and k, and of v", *("1 to {}, 1 to {}".format(*path.max_head_dims) for path in paths)],
    ]
    for key, title in FEATURES.items():
        rows.append([title, *(_support(path, key) for path in paths)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _support(path: PathSpec, feature: str) -> str:
    if feature not in path.features:
        return "–"
    return "unproven" if feature in path.unproven else "yes"
