"""Finds the CUDA toolkit and the CUTLASS headers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path


def find_cuda_home(environ: Mapping[str, str]) -> tuple[Path | None, list[str]]:
    """The toolkit's root, and where it was looked for.

    A root is a folder with both the compiler and the runtime's headers: the folder above an `nvcc` on PATH
    need not be one, since that may be a wrapper script far from the toolkit that it runs.
    """
    candidates: list[tuple[str, Path]] = []
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if environ.get(name):
            candidates.append((name, Path(environ[name])))
    if not candidates:
        candidates = _guess_cuda_homes(environ)
    for _, root in candidates:
        if (root / "bin" / "nvcc").exists() and (root / "include" / "cuda_runtime.h").exists():
            return root, []
    return None, [f"{root} ({origin})" for origin, root in candidates]


def _guess_cuda_homes(environ: Mapping[str, str]) -> list[tuple[str, Path]]:
    guesses = []
    nvcc = shutil.which("nvcc", path=environ.get("PATH"))
    if nvcc:
        guesses.append(("above nvcc on PATH", Path(nvcc).parent.parent))
        guesses.append(("above the file that nvcc on PATH links to", Path(nvcc).resolve().parent.parent))
        dryrun = subprocess.run(
            [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
        )
        top = re.search(r"^#\$ TOP=(.+)$", dryrun.stderr, re.MULTILINE)
        if top:
            guesses.append(("what nvcc on PATH calls TOP", Path(os.path.normpath(top[1].strip()))))
    guesses.append(("the default", Path("/usr/local/cuda")))
    return guesses


def cuda_release(cuda_home: Path) -> str:
    """The toolkit's version, as "13.0"."""
    text = subprocess.run([cuda_home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+\.\d+)", text)
    if release is None:
        raise RuntimeError(f"{cuda_home}/bin/nvcc --version names no release: {text!r}")
    return release[1]


def find_cutlass(root: Path, environ: Mapping[str, str]) -> Path:
    """The folder with CUTLASS's headers."""
    candidates = [root / "third_party" / "cutlass" / "include"]
    spec = find_spec("cutlass_library")
    for package in (spec.submodule_search_locations or []) if spec else []:
        candidates.append(Path(package) / "source" / "include")
    if environ.get("CUTLASS_PATH"):
        path = Path(environ["CUTLASS_PATH"])
        candidates += [path / "include", path]
    for folder in candidates:
        if (folder / "cute" / "tensor.hpp").exists():
            return folder.resolve()
    looked = [str(folder) for folder in candidates]
    if spec is None:
        looked.append("the Python package cutlass_library (not installed)")
    if not environ.get("CUTLASS_PATH"):
        looked.append("CUTLASS_PATH (not set)")
    raise SystemExit(
        "flash-attn: the CUTLASS headers were not found: run `git submodule update --init` or "
        "`pip install --no-deps nvidia-cutlass==4.2.0.0`, or set CUTLASS_PATH. Looked in: " + "; ".join(looked)
    )
