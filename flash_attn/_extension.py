"""Loads the compiled kernels, if there are any, and remembers why not.

Importing never fails and never initialises CUDA: a missing or unloadable extension is a reason that
`flash_attn.info()` tells and that the first call on a GPU raises.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class BuildInfo:
    """What setup.py recorded about the build that is installed."""

    kernels_built: bool
    reason: str = ""
    archs: tuple[int, ...] = ()
    head_dims: tuple[int, ...] = ()
    dtypes: tuple[str, ...] = ()
    cuda: str | None = None
    torch: str | None = None


def _read_build_info() -> BuildInfo:
    file = Path(__file__).with_name("_build_info.json")
    if not file.exists():
        reason = f"it is imported from {file.parent}, a source tree that was not built"
        return BuildInfo(False, f"{reason} (from another folder Python finds the installed package)")
    recorded = json.loads(file.read_text())
    return BuildInfo(
        kernels_built=recorded["kernels_built"],
        reason=recorded["reason"],
        archs=tuple(recorded["archs"]),
        head_dims=tuple(recorded["head_dims"]),
        dtypes=tuple(recorded["dtypes"]),
        cuda=recorded["cuda"],
        torch=recorded["torch"],
    )


@dataclass(frozen=True)
class Kernels:
    """What the loaded extension holds."""

    # ("forward" or "backward", arch) -> the tile table's (head_dim, head_dim_v, bytes of shared memory); a call takes
    # the first that holds it.
    tile_rows: dict[tuple[str, int], tuple[tuple[int, int, int], ...]]
    built: frozenset[tuple[str, int, str, tuple[int, int, int]]]  # (kind, arch, dtype, tile row)


def _loaded_kernels() -> Kernels:
    recorded = json.loads(torch.ops.flash_attn.built_kernels())
    return Kernels(
        tile_rows={
            (kind, int(arch)): tuple(map(tuple, rows))
            for kind, tables in recorded["tile_rows"].items()
            for arch, rows in tables.items()
        },
        built=frozenset(
            (kernel["kind"], kernel["arch"], kernel["dtype"], tuple(kernel["tile_row"]))
            for kernel in recorded["kernels"]
        ),
    )


def _load(build: BuildInfo) -> str | None:
    """Imports the extension, which registers its ops; returns the reason if that can't be done."""
    if not build.kernels_built:
        return f"the CUDA kernels were not built: {build.reason}"
    try:
        importlib.import_module("flash_attn._C")
    except Exception as error:  # an unloadable library must not take the importing program down
        return f"the CUDA extension could not be loaded: {type(error).__name__}: {error}"
    return None


build_info = _read_build_info()
_load_error = _load(build_info)
kernels = _loaded_kernels() if _load_error is None else Kernels({}, frozenset())


def load_error() -> str | None:
    """Why there are no kernels in this process; None if they are loaded."""
    return _load_error


def is_loaded() -> bool:
    return _load_error is None
