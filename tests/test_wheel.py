"""What is built can be loaded beside any torch from 2.10 on: the symbols that the module needs and offers."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from flash_attn import _extension


@pytest.fixture(scope="module")
def module_file():
    if not _extension.build_info.kernels_built:
        pytest.skip(f"there is no compiled module: {_extension.build_info.reason}")
    spec = importlib.util.find_spec("flash_attn._C")
    assert spec is not None, "the build recorded kernels, but there is no flash_attn._C"
    return Path(spec.origin)


def read_with(tool, *arguments):
    if shutil.which(tool) is None:
        pytest.skip(f"there is no {tool} (binutils) to read the module with")
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def symbols(module_file, which):
    return {line.split()[-1].split("@")[0] for line in read_with("nm", "-D", which, module_file).splitlines()}


def test_file_name_is_abi3(module_file):
    assert module_file.name == "_C.abi3.so"


def test_needs_no_cpp_symbol_of_torch(module_file):
    of_torch = re.compile(r"_Z\w*?(?<![0-9])(2at|3c10|5torch)[0-9]")
    assert of_torch.match("_ZN3c105ErrorC1Ev") and of_torch.match("_ZNK2at6Tensor3dimEv")
    assert not {name for name in symbols(module_file, "--undefined-only") if of_torch.match(name)}


def test_needs_torch_only_through_its_stable_c_functions(module_file):
    needed = symbols(module_file, "--undefined-only")
    assert any(name.startswith(("aoti_torch_", "torch_")) for name in needed)
    # Of CPython, the limited API's functions to make a module; of CUDA, nothing: its runtime is linked in.
    assert not {name for name in needed if name.startswith(("cu", "Py", "_Py"))} - {"PyModule_Create2"}


def test_offers_only_its_entry_point(module_file):
    assert symbols(module_file, "--defined-only") == {"PyInit__C"}


def test_loads_no_cuda_library(module_file):
    needed = re.findall(r"NEEDED.*\[(.+)\]", read_with("readelf", "-d", module_file))
    assert not [name for name in needed if "cuda" in name or name.startswith(("libc10", "libtorch_python"))]
