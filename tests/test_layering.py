"""A dependency points downward only, in csrc and in the package."""

import ast
import re

import pytest
from repository import ROOT

# What each folder of csrc may include from this project. Only api may name torch, and only dev pybind11.
CPP_LAYERS = {
    "variant": {"variant"},
    "plan": {"plan", "variant"},
    "kernels/common": {"kernels/common", "variant"},
    "kernels/misc": {"kernels/common", "kernels/misc", "variant"},
    "kernels": {"kernels", "variant"},
    "api": {"api", "plan", "kernels/common", "kernels/misc", "variant"},
    "dev": {"plan", "variant"},
    # Stands in for what is below the kernels (CUDA) and beside the api (torch's CUDA part).
    "dev/emulator": {"dev/emulator", "kernels", "api", "variant"},
}
MAY_NAME = {"api": {"torch", "Python.h"}, "dev": {"pybind11"}, "dev/emulator": {"torch", "c10"}}
FOREIGN = ("torch", "ATen", "c10", "pybind11", "Python.h")

# Lowest first. A module imports from its own layer or a lower one.
PYTHON_LAYERS = (
    ("version", "_extension", "_arguments", "_flops", "_plain", "backends", "bert_padding"),
    ("_dispatch", "_checks", "_checks_backward", "_checks_kvcache", "_checks_packed"),
    ("_ops",),
    ("_run", "_schedule"),
    ("_fa2", "interface", "interface_kvcache", "interface_varlen"),
    ("flash_attn_interface", "layers"),
    ("ops",),
    ("_report", "_self_check"),
    ("__init__", "__main__", "bench"),
)
RANKS = {module: rank for rank, layer in enumerate(PYTHON_LAYERS) for module in layer}

CPP_SUFFIXES = (".h", ".cpp", ".cu")
CPP_FILES = sorted(file for file in (ROOT / "csrc").rglob("*") if file.suffix in CPP_SUFFIXES)
PYTHON_FILES = sorted((ROOT / "flash_attn").rglob("*.py"))


def relative(file):
    return str(file.relative_to(ROOT))


def includes_of(file):
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', file.read_text(), re.MULTILINE)


def layer_of(path):
    """The longest folder of CPP_LAYERS that holds the path, relative to csrc; None for what is not ours."""
    holders = [layer for layer in CPP_LAYERS if path.startswith(layer + "/")]
    return max(holders, key=len, default=None)


@pytest.mark.parametrize("file", CPP_FILES, ids=relative)
def test_cpp_includes_point_downward(file):
    layer = layer_of(str(file.relative_to(ROOT / "csrc")))
    assert layer is not None, "the file is in no layer of CPP_LAYERS"
    for include in includes_of(file):
        target = layer_of(include)
        if target is not None:
            allowed = any(target == folder or target.startswith(folder + "/") for folder in CPP_LAYERS[layer])
            assert allowed, f"{layer} must not include {include}"
        for name in FOREIGN:
            foreign = include == name or include.startswith(name + "/")
            assert not foreign or name in MAY_NAME.get(layer, ()), f"{layer} must not include {include}"


MAY_USE_TORCH = tuple(ROOT / "csrc" / layer for layer, names in MAY_NAME.items() if "torch" in names)
WITHOUT_TORCH = [file for file in CPP_FILES if not any(file.is_relative_to(folder) for folder in MAY_USE_TORCH)]


@pytest.mark.parametrize("file", WITHOUT_TORCH, ids=relative)
def test_only_api_names_torch(file):
    found = re.findall(r"\b(?:torch|at|c10)::\w+|\baoti_torch_\w+", file.read_text())
    assert not found


def test_rules_see_an_upward_include(tmp_path):
    file = tmp_path / "tile.h"
    file.write_text('#pragma once\n# include "kernels/common/params.h"\n#include <torch/types.h>\n')
    assert includes_of(file) == ["kernels/common/params.h", "torch/types.h"]
    assert layer_of("kernels/common/params.h") == "kernels/common"
    assert layer_of("kernels/sm80/gemm.h") == "kernels"
    assert layer_of("cute/tensor.hpp") is None


def module_of(file):
    """flash_attn/backends/_math.py -> "backends"; flash_attn/_ops.py -> "_ops"."""
    return file.relative_to(ROOT / "flash_attn").with_suffix("").parts[0]


def imported_modules(file):
    """The modules of flash_attn that the file imports, by the first part of their name below flash_attn."""
    package = ("flash_attn", *file.relative_to(ROOT / "flash_attn").parts[:-1])
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            names = [[*module, alias.name] for alias in node.names]
        else:
            continue
        for name in names:
            if name[0] == "flash_attn":
                yield name[1] if len(name) > 1 and name[1] in RANKS else "__init__"


@pytest.mark.parametrize("file", PYTHON_FILES, ids=relative)
def test_python_imports_point_downward(file):
    module = module_of(file)
    assert module in RANKS, f"{module} is in no layer of PYTHON_LAYERS"
    for imported in imported_modules(file):
        assert RANKS[imported] <= RANKS[module], f"flash_attn.{module} must not import flash_attn.{imported}"


def strings_in_code(tree):
    """Every string that is not a docstring."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


@pytest.mark.parametrize("file", [file for file in PYTHON_FILES if file.name != "_dispatch.py"], ids=relative)
def test_only_dispatch_chooses_paths(file):
    tree = ast.parse(file.read_text())
    assert not {"sm80", "sm90"} & set(strings_in_code(tree)), "a path is named outside _dispatch"
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    # _report tells the user what devices there are.
    assert "get_device_capability" not in attributes or file.name == "_report.py", (
        "the architecture is asked for outside _dispatch"
    )
