"""Builds the package with kernels that run on the CPU (csrc/dev/emulator): for tests, and for developers without a GPU.

usage: python build_support/emulator.py [--all | --clusters]

It is a copy of the package in build/emulator/package whose extension holds the real ops, planner and kernels, compiled
as C++ for the CPU, of a few variants. With --all it holds every kernel of FLASH_ATTN_ARCHS,
FLASH_ATTN_HEAD_DIMS and FLASH_ATTN_DTYPES, and is in build/emulator-all/package; with --clusters SM90's tile rows with
clusters of two thread blocks, in build/emulator-clusters/package. It is never shipped.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from build_support.jobs import choose_jobs  # noqa: E402
from build_support.options import load_variants, read_options  # noqa: E402
from build_support.toolkit import find_cuda_home, find_cutlass  # noqa: E402

Group = Any  # csrc/variant/variants.py's, which is no package's

CSRC = ROOT / "csrc"
EMULATOR = CSRC / "dev" / "emulator"
# (kind, architecture, dtype, tile row) and the options of each kernel: one of everything that differs in its source.
VARIANTS = (
    (
        "forward",
        90,
        "bf16",
        (64, 64, "227KB"),
        {
            ("Mask::kCausal", "Score::kPlain"),
            ("Mask::kGeneral", "Score::kGeneral"),
        },
    ),
    ("forward", 90, "bf16", (512, 512, "227KB"), {("Mask::kCausal", "Score::kPlain")}),
    ("forward", 90, "bf16", (64, 512, "227KB"), {("Mask::kCausal", "Score::kPlain")}),
    ("backward", 80, "bf16", (64, 64, "163KB"), {("Score::kPlain",)}),
    ("backward", 80, "bf16", (64, 64, "99KB"), {("Score::kGeneral",)}),
    ("backward", 80, "fp16", (32, 32, "99KB"), {("Score::kPlain",)}),
    (
        "forward",
        80,
        "bf16",
        (64, 64, "99KB"),
        {
            ("Mask::kCausal", "Score::kPlain"),
            ("Mask::kGeneral", "Score::kPlain"),
            ("Mask::kGeneral", "Score::kGeneral"),
            ("Mask::kGeneral", "Score::kPlain", "Rows::k64"),
            ("Mask::kGeneral", "Score::kGeneral", "Rows::k64"),
            ("Mask::kGeneral", "Score::kPlain", "Rows::k16"),
        },
    ),
    ("forward", 80, "fp16", (32, 32, "99KB"), {("Mask::kFull", "Score::kPlain")}),
)

CLUSTER_VARIANTS = (
    (
        "forward",
        90,
        "bf16",
        (512, 512, "227KB"),
        {("Mask::kFull", "Score::kPlain"), ("Mask::kCausal", "Score::kPlain"), ("Mask::kGeneral", "Score::kGeneral")},
    ),
    ("forward", 90, "bf16", (128, 128, "227KB"), {("Mask::kCausal", "Score::kPlain")}),
)


@dataclass(frozen=True)
class Build:
    folder: Path
    variants: tuple[Any, ...]  # none: all that the environment asks for
    flags: tuple[str, ...] = ()


FEW = Build(ROOT / "build" / "emulator", VARIANTS)
ALL = Build(ROOT / "build" / "emulator-all", ())
CLUSTERS = Build(ROOT / "build" / "emulator-clusters", CLUSTER_VARIANTS, ("-DFLASH_ATTN_SM90_CLUSTER=2",))

_CPU_INFO = Path("/proc/cpuinfo")
CPU_FLAGS = _CPU_INFO.read_text().split() if _CPU_INFO.exists() else []
COMMON_FLAGS = ["-std=c++20", "-O1", "-fPIC", "-w", "-Wno-psabi"]
KERNEL_FLAGS = [
    # Headers of the emulator stand in for those of the same name.
    f"-I{EMULATOR}",
    f"-I{CSRC}",
    # As nvcc does: a * b + c is rounded once.
    "-ffp-contract=fast",
    "-fexpensive-optimizations",  # without which it doesn't
    *(["-mfma"] if "fma" in CPU_FLAGS else []),
    # Every access calls the emulator's memory check, which is linked instead of ThreadSanitizer.
    "-fsanitize=thread",
    "--param tsan-instrument-func-entry-exit=0",
    # CUTLASS names device functions in templates that nothing uses here.
    "-fpermissive",
]
TRANSLATOR = [Path(__file__).resolve().with_name(name) for name in ("ptx.py", "ptx_instructions.py")]
# PTX says itself what is rounded once.
TRANSLATION_FLAGS = [f"-I{CSRC}", "-ffp-contract=off", "-fwrapv", *(["-mfma"] if "fma" in CPU_FLAGS else [])]
MODULE = "_C.abi3.so"
PTX_MODULE = f"ptx/{MODULE}"
# To read CuTe takes g++ 5 s. It looks for PRECOMPILED in the build's folder, where it runs, before the source's.
HEADER = "dev/emulator/precompiled.h"
PRECOMPILED = f"{HEADER}.gch"


def build_emulator(wanted: Build = FEW, from_ptx: bool = False) -> Path:
    """The folder to put first on PYTHONPATH; ImportError where it can't be built."""
    compiler = _find_compiler(os.environ)
    includes = _find_headers(os.environ)
    try:
        import ninja
        import torch  # noqa: F401
    except ImportError as missing:
        raise ImportError(f"{missing.name} is not installed") from None
    build = wanted.folder
    chosen = _few_groups(wanted.variants) if wanted.variants else _all_groups(os.environ)
    generated = load_variants().write_files(chosen, build / "generated")
    (build / "build.ninja").write_text(_ninja_file(compiler, includes, generated, wanted, from_ptx))
    command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build), "--quiet", f"-j{choose_jobs(os.environ)}"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    package = build / ("package-ptx" if from_ptx else "package")
    _assemble_package(package / "flash_attn", build / (PTX_MODULE if from_ptx else MODULE), chosen)
    return package


def _find_compiler(environ: Mapping[str, str]) -> str:
    compiler = environ.get("CXX", "c++").split()
    if shutil.which(compiler[-1]) is None:
        raise ImportError(f"there is no C++ compiler {compiler[-1]!r}")
    macros = subprocess.run(
        [*compiler, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True, check=True
    ).stdout
    if "__clang__" in macros:
        raise ImportError(f"{' '.join(compiler)} is clang, and only g++ takes CUTLASS's device code as C++")
    return " ".join(compiler)


def _find_headers(environ: Mapping[str, str]) -> list[Path]:
    cuda = _find_cuda_headers(environ)
    try:
        cutlass = find_cutlass(ROOT, environ)
    except SystemExit as reason:
        raise ImportError(str(reason)) from None
    return [cutlass, cuda, cuda / "cccl", Path(sysconfig.get_path("include"))]


def _find_cuda_headers(environ: Mapping[str, str]) -> Path:
    """Those of a toolkit, or else those that torch's wheels bring."""
    cuda_home, looked_in = find_cuda_home(environ)
    candidates = [cuda_home / "include"] if cuda_home else []
    spec = find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        candidates += sorted(Path(folder).glob("cu*/include"))
        candidates += sorted(Path(folder).glob("cuda_runtime/include"))
    for folder in candidates:
        if (folder / "cuda_runtime.h").exists() and (folder / "cccl").exists():
            return folder
    raise ImportError("there are no CUDA headers; looked in " + ", ".join([*map(str, candidates), *looked_in]))


def _few_groups(variants: tuple[Any, ...]) -> list[Group]:
    """The groups of kernels that are named as in VARIANTS."""
    chosen = []
    for kind, arch, dtype, tile_row, wanted in variants:
        for group in load_variants().groups([arch], [tile_row[0], tile_row[1]], [dtype]):
            options = tuple(own for own in group.options if own in wanted)
            if (group.kind.name, group.tile_row) == (kind, tile_row) and options:
                chosen.append(replace(group, options=options))
    return chosen


def _all_groups(environ: Mapping[str, str]) -> list[Group]:
    options = read_options(environ)
    return load_variants().groups(options.archs, options.head_dims, options.dtypes)


def _ninja_file(compiler: str, includes: list[Path], generated: list[Path], wanted: Build, from_ptx: bool) -> str:
    from torch.utils import cpp_extension

    from build_support.kernels import TORCH_TARGET_VERSION

    api = [file for file in sorted((CSRC / "api").glob("*.cpp")) if file.name != "cuda_stream.cpp"]
    host = [*sorted(EMULATOR.glob("*.cpp")), *sorted((CSRC / "plan").glob("*.cpp"))]
    host += [*sorted((CSRC / "kernels" / "sm90").glob("*.cpp")), *(file for file in generated if file.suffix == ".cpp")]
    kernels = [file for file in generated if file.suffix == ".cu"]
    kernels += [*sorted((CSRC / "kernels" / "misc").glob("*.cu")), *sorted(EMULATOR.glob("*.cu"))]
    folders = [*includes, *cpp_extension.include_paths()]
    flags = " ".join([*COMMON_FLAGS, *wanted.flags, *(f"-isystem {folder}" for folder in folders), "-DUSE_CUDA"])
    libraries = " ".join([*(f"-L{folder}" for folder in cpp_extension.library_paths()), "-ltorch_cpu", "-lc10"])
    lines = [
        f"rule compile\n  command = {compiler} -MMD -MF $out.d $flags {flags} -c $in -o $out\n"
        "  depfile = $out.d\n  deps = gcc",
        # Functions of this module come before those of the same name in torch and CUDA's libraries.
        f"rule link\n  command = {compiler} -shared -Wl,-Bsymbolic $in {libraries} -o $out",
    ]
    lines.append(
        f"build {PRECOMPILED}: compile {CSRC / HEADER}\n  flags = {' '.join([*KERNEL_FLAGS, '-x c++-header'])}"
    )
    objects = []
    for files, flags_of_files in (
        (kernels, [*KERNEL_FLAGS, f"-include {HEADER}", "-x c++"]),  # first: they take longest
        (api, [f"-I{CSRC}", f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", "-DFLASH_ATTN_FEW_ROWS=true"]),
        (host, [f"-I{CSRC}"]),
    ):
        for file in files:
            objects.append(f"objects/{file.parent.name}_{file.name}.o")
            needed = f" | {PRECOMPILED}" if files is kernels else ""
            lines.append(f"build {objects[-1]}: compile {file}{needed}\n  flags = {' '.join(flags_of_files)}")
    if from_ptx:
        names = {f"ptx/{file.stem}": file for file in kernels if file.parent != EMULATOR}
        lines += _translate_rules(names, includes[0], wanted.flags)
        objects += [f"{name}.o" for name in names]
    lines.append(f"build {PTX_MODULE if from_ptx else MODULE}: link {' '.join(objects)}\n")
    return "\n".join(lines)


def _translate_rules(names: Mapping[str, Path], cutlass: Path, own_flags: tuple[str, ...]) -> list[str]:
    """For NAME.ptx, NAME.cpp and NAME.o of each kernel file."""
    from build_support.kernels import EVERY_GPU, GENCODES, NVCC_FLAGS

    nvcc, looked_in = find_cuda_home(os.environ)
    if nvcc is None:
        raise ImportError("there is no nvcc; looked in " + ", ".join(looked_in))
    flags = " ".join([*NVCC_FLAGS, *own_flags, f"-I{CSRC}", f"-isystem {cutlass}"])
    lines = [
        f"rule ptx\n  command = {nvcc}/bin/nvcc {flags} $arch -ptx -MD -MF $out.d $in -o $out\n"
        "  depfile = $out.d\n  deps = gcc",
        f"rule translate\n  command = {sys.executable} {TRANSLATOR[0]} $in $out",
    ]
    for name, file in names.items():
        gencode = GENCODES.get(file.stem[-len("_sm80") :], EVERY_GPU)[0]  # arch=compute_90a,code=sm_90a
        lines.append(f"build {name}.ptx: ptx {file}\n  arch = -{gencode.partition(',')[0]}")
        lines.append(f"build {name}.cpp: translate {name}.ptx | {' '.join(map(str, TRANSLATOR))}")
        lines.append(f"build {name}.o: compile {name}.cpp\n  flags = {' '.join(TRANSLATION_FLAGS)}")
    return lines


def _assemble_package(package: Path, module: Path, chosen: list[Group]) -> None:
    """Links to the Python files that are installed, beside the emulated extension."""
    shutil.rmtree(package.parent, ignore_errors=True)
    package.mkdir(parents=True)
    (package.parent / "flash_attn_2_cuda.py").symlink_to(ROOT / "flash_attn_2_cuda.py")
    for file in (ROOT / "flash_attn").iterdir():
        if file.suffix == ".py" or (file.is_dir() and file.name != "__pycache__"):
            (package / file.name).symlink_to(file)
    (package / "_C.abi3.so").symlink_to(module)
    info = {"version": "", "kernels_built": True, "reason": "", "cuda": "emulated", "torch": None}
    info["archs"] = sorted({group.arch for group in chosen})
    # Kernels for few rows have fewer buckets, which smaller head dims take: they tell nothing of what was asked for.
    info["head_dims"] = sorted({dim for group in chosen if not group.rows for dim in group.tile_row[:2]})
    info["dtypes"] = sorted({dtype for group in chosen for dtype in group.dtypes})
    (package / "_build_info.json").write_text(json.dumps(info))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    chosen = parser.add_mutually_exclusive_group()
    for name, build, what in (
        ("--all", ALL, "every kernel that is built by default, not only VARIANTS"),
        ("--clusters", CLUSTERS, "CLUSTER_VARIANTS, whose thread blocks come in clusters of two"),
    ):
        chosen.add_argument(name, action="store_const", const=build, dest="build", help=what)
    parser.add_argument("--ptx", action="store_true", help="kernels as nvcc compiles them, translated from their PTX")
    parser.set_defaults(build=FEW)
    arguments = parser.parse_args()
    try:
        print(build_emulator(arguments.build, arguments.ptx))
    except ImportError as reason:
        sys.exit(f"the kernels can't be emulated: {reason}")


if __name__ == "__main__":
    main()
