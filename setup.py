"""The build. The metadata, which is in pyproject.toml, needs neither torch nor a CUDA toolkit."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from build_support.decision import Kernels, PurePython, build_info, decide  # noqa: E402

BUILD_INFO = Path("flash_attn", "_build_info.json")
# Every other command (egg_info, dist_info, sdist, clean) reads or writes metadata only.
BUILDING = {"bdist_wheel", "build", "build_ext", "build_py", "develop", "editable_wheel", "install"}


def write_build_info(command, decision: Kernels | PurePython) -> None:
    """Beside the modules that the command builds. An editable install points to the source tree, or, if it is strict,
    links to what was built."""
    is_editable = getattr(command, "editable_mode", False)
    in_place = is_editable or getattr(command, "inplace", False)
    folders = ([ROOT] if in_place else []) + ([Path(command.build_lib)] if is_editable or not in_place else [])
    for folder in folders:
        file = folder / BUILD_INFO
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(build_info(decision, command.distribution.get_version()))


def pure_commands(decision: PurePython) -> dict:
    print(f"flash-attn: the CUDA kernels are not built: {decision.reason}", flush=True)

    class BuildPackage(CleanBuildPy):
        def run(self) -> None:
            super().run()
            write_build_info(self, decision)

    return {"cmdclass": {"build_py": BuildPackage}}


def kernel_commands(decision: Kernels) -> dict:
    from build_support.kernels import BuildKernels, make_extension

    class BuildExtensions(BuildKernels):
        kernels = decision

        def run(self) -> None:
            super().run()
            write_build_info(self, decision)

    return {
        "ext_modules": [make_extension(decision)],
        "cmdclass": {"build_py": CleanBuildPy, "build_ext": BuildExtensions},
        "options": {"bdist_wheel": {"py_limited_api": "cp310", "build_number": decision.build_tag}},
    }


class CleanBuildPy(build_py):
    """Starts from an empty folder: setuptools would ship whatever an earlier build left there."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()

    def get_outputs(self, include_bytecode=1) -> list[str]:
        return [*super().get_outputs(include_bytecode), str(Path(self.build_lib) / BUILD_INFO)]


def build_arguments() -> dict:
    if not BUILDING & set(sys.argv[1:]):
        return {}
    decision = decide()
    return kernel_commands(decision) if isinstance(decision, Kernels) else pure_commands(decision)


setup(license="BSD-3-Clause", **build_arguments())
