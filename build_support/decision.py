"""Decides whether the kernels are built, and says why where they are not."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from build_support.options import BuildOptions, read_options
from build_support.toolkit import cuda_release, find_cuda_home

OLDEST_TORCH = (2, 10)  # that has the stable ABI's functions which csrc/api calls
WITHOUT_KERNELS = "or set FLASH_ATTN_SKIP_CUDA=1 for the package without its kernels"
HOW_TO_INSTALL = (
    'run `pip install torch ninja "setuptools>=64" wheel`, then `pip install --no-build-isolation .` '
    f"({WITHOUT_KERNELS})"
)


@dataclass(frozen=True)
class Kernels:
    """The kernels are built, with this toolkit against this torch."""

    options: BuildOptions
    cuda_home: Path
    cuda: str
    torch: str

    @property
    def build_tag(self) -> str:
        """Tells wheels of one version apart by CUDA's major release; PEP 427 wants a digit first."""
        return f"1cu{self.cuda.partition('.')[0]}"


@dataclass(frozen=True)
class PurePython:
    """The kernels are not built, for this reason."""

    options: BuildOptions
    reason: str


def decide(environ: Mapping[str, str] = os.environ) -> Kernels | PurePython:
    options = read_options(environ)
    if options.skip_cuda:
        return PurePython(options, "FLASH_ATTN_SKIP_CUDA was set when the package was built")
    if not sys.platform.startswith("linux"):
        return PurePython(options, f"the kernels are built on Linux only, not on {sys.platform}")
    # Before torch, which a build in an environment of its own (pip install .) does without where there is no toolkit.
    cuda_home, looked_in = find_cuda_home(environ)
    if cuda_home is None:
        return PurePython(options, "no CUDA toolkit was found; looked in " + ", ".join(looked_in))
    torch = _import_torch()
    if torch.version.cuda is None:
        return PurePython(options, f"the torch {torch.__version__} that it was built with has no CUDA")
    cuda = cuda_release(cuda_home)
    _require_releases(torch, cuda, cuda_home)
    _require_tools(environ)
    return Kernels(options, cuda_home, cuda, str(torch.__version__))


def _require_releases(torch: ModuleType, cuda: str, cuda_home: Path) -> None:
    if tuple(map(int, str(torch.__version__).split(".")[:2])) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise SystemExit(
            f"flash-attn: the kernels are compiled against torch {oldest} or later, and {torch.__version__} is "
            f"installed: run `pip install --upgrade torch` ({WITHOUT_KERNELS})."
        )
    if cuda.partition(".")[0] != torch.version.cuda.partition(".")[0]:
        raise SystemExit(
            f"flash-attn: torch {torch.__version__} was built with CUDA {torch.version.cuda}, and {cuda_home} holds "
            f"CUDA {cuda}, but their major releases must be the same: set CUDA_HOME to another toolkit, install "
            f"another torch, {WITHOUT_KERNELS}."
        )


def _require_tools(environ: Mapping[str, str]) -> None:
    if find_spec("ninja") is None and shutil.which("ninja") is None:
        raise SystemExit(f"flash-attn: ninja is needed to build the kernels: {HOW_TO_INSTALL}.")
    if shutil.which(environ.get("CXX", "c++").split()[-1]) is None:
        raise SystemExit("flash-attn: there is no C++ compiler to build the kernels: install g++, or set CXX.")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise SystemExit("flash-attn: Python.h is needed to build the kernels: install python3-dev.")


def _import_torch() -> ModuleType:
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise SystemExit(
            f"flash-attn: torch can't be imported here ({error}), and the kernels are compiled against the "
            f"torch that is installed: {HOW_TO_INSTALL}."
        ) from None


def build_info(decision: Kernels | PurePython, version: str) -> str:
    """What flash_attn/_build_info.json says, for flash_attn.info()."""
    built = isinstance(decision, Kernels)
    info = {
        "version": version,
        "kernels_built": built,
        "reason": "" if built else decision.reason,
        "archs": decision.options.archs if built else (),
        "head_dims": decision.options.head_dims if built else (),
        "dtypes": decision.options.dtypes if built else (),
        "cuda": decision.cuda if built else None,
        "torch": decision.torch if built else None,
    }
    return json.dumps(info, indent=2) + "\n"
