"""The environment variables that choose what is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ARCHS = ("80",)
HEAD_DIMS = ("64", "128")
DTYPES = ("fp16", "bf16")


@dataclass(frozen=True)
class BuildOptions:
    skip_cuda: bool
    archs: tuple[int, ...]
    head_dims: tuple[int, ...]
    dtypes: tuple[str, ...]


def read_options(environ: Mapping[str, str]) -> BuildOptions:
    return BuildOptions(
        skip_cuda=_switch(environ, "FLASH_ATTN_SKIP_CUDA"),
        archs=tuple(int(arch) for arch in _subset(environ, "FLASH_ATTN_ARCHS", ARCHS)),
        head_dims=tuple(int(dim) for dim in _subset(environ, "FLASH_ATTN_HEAD_DIMS", HEAD_DIMS)),
        dtypes=_subset(environ, "FLASH_ATTN_DTYPES", DTYPES),
    )


def _subset(environ: Mapping[str, str], name: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
    """The chosen part of `allowed`, in its order; all of it where the variable is unset or empty."""
    value = environ.get(name, "").strip()
    if not value:
        return allowed
    chosen = [item.strip() for item in value.replace(";", ",").split(",") if item.strip()]
    if not chosen or any(item not in allowed for item in chosen):
        raise ValueError(f"{name} must be a comma-separated list of {', '.join(allowed)}; got {value!r}")
    return tuple(item for item in allowed if item in chosen)


def _switch(environ: Mapping[str, str], name: str) -> bool:
    value = environ.get(name, "").strip().lower()
    if value in ("", "0", "false", "no", "off"):
        return False
    if value in ("1", "true", "yes", "on"):
        return True
    raise ValueError(f"{name} must be 0 or 1; got {environ[name]!r}")
