"""The environment variables that choose what is built."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TypeVar

VARIANTS = Path(__file__).resolve().parents[1] / "csrc" / "variant" / "variants.py"

_Item = TypeVar("_Item", int, str)


@dataclass(frozen=True)
class BuildOptions:
    skip_cuda: bool
    archs: tuple[int, ...]
    head_dims: tuple[int, ...]
    dtypes: tuple[str, ...]


def load_variants() -> ModuleType:
    """csrc/variant/variants.py, the table of what can be compiled."""
    name = "flash_attn_variants"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, VARIANTS)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def read_options(environ: Mapping[str, str]) -> BuildOptions:
    variants = load_variants()
    return BuildOptions(
        skip_cuda=_switch(environ, "FLASH_ATTN_SKIP_CUDA"),
        archs=_subset(environ, "FLASH_ATTN_ARCHS", variants.ARCHS),
        head_dims=_subset(environ, "FLASH_ATTN_HEAD_DIMS", variants.HEAD_DIMS),
        dtypes=_subset(environ, "FLASH_ATTN_DTYPES", variants.DTYPES),
    )


def _subset(environ: Mapping[str, str], name: str, allowed: tuple[_Item, ...]) -> tuple[_Item, ...]:
    """The chosen part of `allowed`, in its order; all of it where the variable is unset or empty."""
    value = environ.get(name, "").strip()
    if not value:
        return allowed
    chosen = {item.strip() for item in value.replace(";", ",").split(",")}
    if not chosen <= {str(item) for item in allowed}:
        choices = ", ".join(map(str, allowed))
        raise ValueError(f"{name} must be a comma-separated list of {choices}; got {value!r}")
    return tuple(item for item in allowed if str(item) in chosen)


def _switch(environ: Mapping[str, str], name: str) -> bool:
    value = environ.get(name, "").strip().lower()
    if value in ("", "0", "false", "no", "off"):
        return False
    if value in ("1", "true", "yes", "on"):
        return True
    raise ValueError(f"{name} must be 0 or 1; got {environ[name]!r}")
