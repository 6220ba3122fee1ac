"""Builds flash_attn_plan, the pybind11 module through which pytest calls csrc/plan. It is never shipped.

usage: python build_support/plan_module.py
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (ROOT / "csrc" / "dev" / "plan_bindings.cpp", *sorted((ROOT / "csrc" / "plan").glob("*.cpp")))
MODULE = ROOT / "build" / "dev" / ("flash_attn_plan" + sysconfig.get_config_var("EXT_SUFFIX"))


def load_plan_module() -> ModuleType:
    """The module, rebuilt if it is older than its sources; ImportError where it can't be built."""
    if not _is_fresh():
        _build()
    spec = importlib.util.spec_from_file_location("flash_attn_plan", MODULE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _is_fresh() -> bool:
    if not MODULE.exists():
        return False
    headers = [file for folder in ("plan", "variant") for file in (ROOT / "csrc" / folder).glob("*.h")]
    return MODULE.stat().st_mtime > max(file.stat().st_mtime for file in (*SOURCES, *headers))


def _build() -> None:
    compiler = os.environ.get("CXX", "c++").split()
    if shutil.which(compiler[0]) is None:
        raise ImportError(f"flash_attn_plan can't be built: there is no C++ compiler {compiler[0]!r}")
    python_include = sysconfig.get_path("include")
    if not Path(python_include, "Python.h").exists():
        raise ImportError(f"flash_attn_plan can't be built: there is no Python.h in {python_include}")
    try:
        import pybind11
    except ImportError:
        raise ImportError("flash_attn_plan can't be built: pybind11 is not installed") from None
    MODULE.parent.mkdir(parents=True, exist_ok=True)
    with MODULE.with_name("lock").open("w") as lock:
        # Processes that collect tests at the same time wait for the first one's build.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_fresh():
            _compile(compiler, [f"-I{ROOT / 'csrc'}", f"-I{pybind11.get_include()}", f"-I{python_include}"])


def _compile(compiler: list[str], includes: list[str]) -> None:
    fresh = MODULE.with_suffix(f".{os.getpid()}")
    flags = ["-O1", "-std=c++20", "-fPIC", "-shared", "-fvisibility=hidden"]
    subprocess.run([*compiler, *flags, *includes, *map(str, SOURCES), "-o", str(fresh)], check=True)
    fresh.replace(MODULE)


if __name__ == "__main__":
    try:
        load_plan_module()
    except ImportError as reason:
        print(f"{reason}; the tests of the planner are skipped", file=sys.stderr)
