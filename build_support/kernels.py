"""Builds flash_attn._C with torch.utils.cpp_extension. Imported only once torch is known to be there."""

from __future__ import annotations

import copy
import os
import re
import shutil
import sys
from pathlib import Path

import torch.utils.cpp_extension as cpp_extension
from setuptools import Extension

from build_support.decision import Kernels
from build_support.jobs import choose_jobs
from build_support.options import load_variants
from build_support.toolkit import find_cutlass

ROOT = Path(__file__).resolve().parents[1]
EXPORTS = Path(__file__).resolve().with_name("exports.map")

# libtorch's stable ABI of this release: the wheel loads with it and with every later one.
TORCH_TARGET_VERSION = "0x020a000000000000"

# Machine code for each kernel family, named by the end of its files' names. SM80 kernels also serve Hopper,
# for what its own kernels lack: the front end, which takes most of the time, runs once and its PTX is assembled
# for both, and goes along for the GPUs that come after.
GENCODES = {
    "_sm80": ("arch=compute_80,code=[compute_80,sm_80,sm_90]",),
    "_sm90": ("arch=compute_90a,code=sm_90a",),
}
EVERY_GPU = GENCODES["_sm80"]

# torch's stable ABI is hidden, which a struct with a tensor in it would not be by default: g++ warns of each.
CXX_FLAGS = ["-O3", "-std=c++20", "-Wall", "-fvisibility=hidden"]
# g++ 12 takes what an empty std::optional<Tensor> holds for uninitialised (GCC's bug 80635); to be tried without.
CXX_FLAGS += ["-Wno-maybe-uninitialized"]
NVCC_FLAGS = [
    "-O3",
    "-std=c++20",
    "--expt-relaxed-constexpr",
    # torch forbids arithmetic on half and bfloat16 by default; CUTLASS uses it.
    "-U__CUDA_NO_HALF_OPERATORS__",
    "-U__CUDA_NO_HALF_CONVERSIONS__",
    "-U__CUDA_NO_HALF2_OPERATORS__",
    "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
    # CUTLASS and CuTe declare functions that one translation unit doesn't use.
    "-diag-suppress=177",
]


def make_extension(kernels: Kernels) -> Extension:
    # torch guesses the toolkit's root from PATH, where a wrapper script misleads it.
    cpp_extension.CUDA_HOME = str(kernels.cuda_home)
    extension = cpp_extension.CUDAExtension(
        "flash_attn._C",
        [str(file.relative_to(ROOT)) for file in _fixed_sources()],
        include_dirs=[str(ROOT / "csrc"), str(find_cutlass(ROOT, os.environ))],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION), ("USE_CUDA", None)],
        extra_compile_args={"cxx": list(CXX_FLAGS), "nvcc": list(NVCC_FLAGS)},
        extra_link_args=[f"-Wl,--version-script={EXPORTS}", "-Wl,--gc-sections", "-s"],
        py_limited_api=True,
    )
    # The CUDA runtime is linked statically, and none of torch's CUDA libraries is named: the module then
    # loads beside a torch of another CUDA release, or of none.
    extension.libraries = ["torch_cpu", "cudart_static", "dl", "rt", "pthread"]
    extension.depends = [str(file.relative_to(ROOT)) for file in sorted((ROOT / "csrc").rglob("*.h"))]
    return extension


def _fixed_sources() -> list[Path]:
    folders = ("api", "plan", "variant", "kernels")
    return sorted(
        file for folder in folders for file in (ROOT / "csrc" / folder).rglob("*") if file.suffix in (".cpp", ".cu")
    )


class BuildKernels(cpp_extension.BuildExtension):
    """BuildExtension with flags for each kernel family: one ninja run a family, through torch's own rules."""

    kernels: Kernels  # set by the subclass that setup.py makes

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.editable_mode:
            # setuptools picks a new folder each time, in which ninja would find nothing to reuse. This is the one
            # that a wheel is built in.
            self.build_temp = os.path.join("build", f"temp.{self.plat_name}-{sys.implementation.cache_tag}")

    def build_extensions(self) -> None:
        generated = Path(self.build_temp) / "generated"
        options = self.kernels.options
        made = load_variants().generate(generated, options.archs, options.head_dims, options.dtypes)
        # A copy: setuptools may run this command twice on the extension that setup() was given.
        extension = copy.copy(self.extensions[0])
        extension.include_dirs = [*extension.include_dirs, str(generated.absolute())]
        extension.sources = [*map(str, made), *extension.sources]
        self.extensions = [extension]
        self._choose_parallelism(len(extension.sources))
        super().build_extensions()

    def build_extension(self, extension: Extension) -> None:
        sources = list(extension.sources)
        cu_groups = _group_by_gencodes([source for source in sources if source.endswith(".cu")])
        extension.sources = [source for source in sources if not source.endswith(".cu")]
        extension.extra_objects = list(extension.extra_objects)
        for gencodes, group in cu_groups.items():
            # self.compiler.compile is torch's here: it writes a ninja file and runs it.
            flags = [f"-gencode={gencode}" for gencode in gencodes]
            extension.extra_objects += self.compiler.compile(
                group,
                output_dir=str(Path(self.build_temp) / group_name(gencodes)),
                macros=extension.define_macros,
                include_dirs=extension.include_dirs,
                extra_postargs={
                    "cxx": extension.extra_compile_args["cxx"],
                    "nvcc": extension.extra_compile_args["nvcc"] + flags,
                },
            )
        super().build_extension(extension)

    def _choose_parallelism(self, num_files: int) -> None:
        jobs = choose_jobs(os.environ)
        os.environ["MAX_JOBS"] = str(jobs)
        os.environ.setdefault("NINJA_STATUS", "[%f/%t, %e s] ")
        if shutil.which("ccache") and "PYTORCH_NVCC" not in os.environ:
            os.environ["PYTORCH_NVCC"] = f"ccache {self.kernels.cuda_home / 'bin' / 'nvcc'}"
        print(
            f"flash-attn: compiling {num_files} files, {jobs} at a time, with CUDA {self.kernels.cuda} "
            f"from {self.kernels.cuda_home} for {self.kernels.options}",
            flush=True,
        )


def group_name(gencodes: tuple[str, ...]) -> str:
    """A folder's name: the GPUs in it."""
    return "-".join(re.findall(r"(?:sm|compute)_\w+", " ".join(gencode.rpartition("=")[2] for gencode in gencodes)))


def _group_by_gencodes(sources: list[str]) -> dict[tuple[str, ...], list[str]]:
    groups: dict[tuple[str, ...], list[str]] = {}
    for source in sources:
        family = next((end for end in GENCODES if Path(source).stem.endswith(end)), None)
        groups.setdefault(GENCODES[family] if family else EVERY_GPU, []).append(source)
    return groups
