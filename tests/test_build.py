"""The build: what it chooses, what it says when it can't, and a build of a subset."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from repository import ROOT

from build_support import decision, emulator, jobs, toolkit  # noqa: I001  (repository makes it importable)
from build_support.options import read_options
from flash_attn import version

GIB = 2**30


@pytest.fixture
def machine(tmp_path):
    """Writes the files that a Linux kernel would show, and returns where."""

    def write(files):
        for name, text in files.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return tmp_path

    return write


# Which kernels


def test_everything_is_built_by_default():
    options = read_options({})
    assert not options.skip_cuda
    assert options.archs == (80, 90)
    assert options.head_dims == (32, 64, 80, 96, 128, 160, 192, 256, 512, 576)
    assert options.dtypes == ("fp16", "bf16")


def test_subset_keeps_the_table_order():
    options = read_options({"FLASH_ATTN_HEAD_DIMS": "128, 64", "FLASH_ATTN_DTYPES": "bf16"})
    assert options.head_dims == (64, 128)
    assert options.dtypes == ("bf16",)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("FLASH_ATTN_ARCHS", "70", "FLASH_ATTN_ARCHS must be a comma-separated list of 80, 90; got '70'"),
        ("FLASH_ATTN_HEAD_DIMS", "64,65", "FLASH_ATTN_HEAD_DIMS must be .* 64, 80, 96, 128.*; got '64,65'"),
        ("FLASH_ATTN_DTYPES", "fp8", "FLASH_ATTN_DTYPES must be .* fp16, bf16; got 'fp8'"),
        ("FLASH_ATTN_SKIP_CUDA", "perhaps", "FLASH_ATTN_SKIP_CUDA must be 0 or 1; got 'perhaps'"),
    ],
)
def test_a_wrong_choice_names_the_allowed_ones(name, value, message):
    with pytest.raises(ValueError, match=message):
        read_options({name: value})


# Whether there are kernels at all


def test_skip_cuda_is_a_reason():
    decided = decision.decide({"FLASH_ATTN_SKIP_CUDA": "1"})
    info = json.loads(decision.build_info(decided, "1.0"))
    assert not info["kernels_built"]
    assert "FLASH_ATTN_SKIP_CUDA" in info["reason"]
    assert info["archs"] == info["head_dims"] == info["dtypes"] == []


def test_no_toolkit_is_a_reason_that_lists_where_it_looked(monkeypatch):
    """Without torch, too, which an isolated build doesn't have."""
    monkeypatch.setitem(sys.modules, "torch", None)
    decided = decision.decide({"CUDA_HOME": "/nowhere"})
    assert isinstance(decided, decision.PurePython)
    assert "/nowhere (CUDA_HOME)" in decided.reason


def test_torch_without_cuda_is_a_reason(monkeypatch):
    fake_torch = type("torch", (), {"__version__": "9.9+cpu", "version": type("version", (), {"cuda": None})})
    monkeypatch.setattr(decision, "_import_torch", lambda: fake_torch)
    monkeypatch.setattr(decision, "find_cuda_home", lambda environ: (Path("/cuda"), []))
    assert "9.9+cpu" in decision.decide({}).reason


def test_no_torch_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(decision, "find_cuda_home", lambda environ: (Path("/cuda"), []))
    with pytest.raises(SystemExit, match="pip install torch ninja .*pip install --no-build-isolation"):
        decision.decide({})


@pytest.mark.parametrize(
    "torch_version,torch_cuda,toolkit,message",
    [
        ("2.9.1+cu130", "13.0", "13.0", r"compiled against torch 2\.10 or later, and 2\.9\.1\+cu130 is installed"),
        ("2.10.0+cu128", "12.8", "13.0", r"built with CUDA 12\.8, and .* holds CUDA 13\.0, but their major releases"),
    ],
)
def test_releases_that_do_not_fit_are_one_sentence(monkeypatch, torch_version, torch_cuda, toolkit, message):
    version = type("version", (), {"cuda": torch_cuda})
    monkeypatch.setattr(
        decision, "_import_torch", lambda: type("torch", (), {"__version__": torch_version, "version": version})
    )
    monkeypatch.setattr(decision, "find_cuda_home", lambda environ: (Path("/cuda"), []))
    monkeypatch.setattr(decision, "cuda_release", lambda cuda_home: toolkit)
    with pytest.raises(SystemExit, match=message):
        decision.decide({})


def test_metadata_needs_neither_torch_nor_nvcc(tmp_path):
    """Under an interpreter that has setuptools only: -S -I hides site-packages, and PATH is empty."""
    import setuptools

    site = tmp_path / "site"
    site.mkdir()
    for pattern in ("setuptools*", "_distutils_hack", "pkg_resources", "wheel*", "packaging*"):
        for package in Path(setuptools.__file__).parents[1].glob(pattern):
            (site / package.name).symlink_to(package)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "from setuptools import build_meta\n"
        f"print(build_meta.prepare_metadata_for_build_wheel({str(tmp_path)!r}))\n"
        "assert 'torch' not in sys.modules\n"
    )
    run = subprocess.run(
        [sys.executable, "-S", "-I", "-c", code], cwd=ROOT, env={"PATH": ""}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    (metadata,) = tmp_path.glob("*.dist-info/METADATA")
    fields = metadata.read_text()
    assert "\nName: flash-attn\n" in fields
    assert "\nRequires-Dist: torch>=2.10\n" in fields
    assert f"\nVersion: {version.__version__}\n" in fields


def test_every_module_is_built_and_distributed(tmp_path):
    modules = (str(file.relative_to(ROOT)) for file in (ROOT / "flash_attn").rglob("*.py"))
    files = {"flash_attn_2_cuda.py", "flash_attn/py.typed", *modules}
    built, source = tmp_path / "built", tmp_path / "source"
    for command in (
        ["build_py", f"--build-lib={built}"],
        ["egg_info", f"--egg-base={tmp_path}", "sdist", "--formats=tar", f"--dist-dir={source}"],
    ):
        run = subprocess.run(
            [sys.executable, "setup.py", *command],
            cwd=ROOT,
            env={**os.environ, "FLASH_ATTN_SKIP_CUDA": "1"},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stdout + run.stderr
    found = {str(file.relative_to(built)) for file in built.rglob("*") if file.is_file()}
    assert found == files | {"flash_attn/_build_info.json"}
    (archive,) = source.iterdir()
    with tarfile.open(archive) as tar:
        distributed = {name.partition("/")[2] for name in tar.getnames()}
    assert not files - distributed


# The toolkit


def make_toolkit(folder):
    (folder / "bin").mkdir(parents=True)
    (folder / "include").mkdir()
    (folder / "include" / "cuda_runtime.h").touch()
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(f'#!/bin/sh\necho "#$ TOP={folder}/bin/.." >&2\n')
    nvcc.chmod(0o755)
    return folder


def test_cuda_home_is_found_behind_a_wrapper(tmp_path):
    real = make_toolkit(tmp_path / "cuda-99")
    wrapper = tmp_path / "local" / "bin" / "nvcc"
    wrapper.parent.mkdir(parents=True)
    wrapper.write_text(f'#!/bin/sh\nexec {real}/bin/nvcc "$@"\n')
    wrapper.chmod(0o755)
    found, _ = toolkit.find_cuda_home({"PATH": f"{wrapper.parent}:{os.defpath}"})
    assert found == real


@pytest.mark.parametrize("name", ["CUDA_HOME", "CUDA_PATH"])
def test_environment_wins(tmp_path, name):
    make_toolkit(tmp_path / "on-path")
    named = make_toolkit(tmp_path / "named")
    found, _ = toolkit.find_cuda_home({name: str(named), "PATH": str(tmp_path / "on-path" / "bin")})
    assert found == named


def make_cutlass(folder):
    (folder / "cute").mkdir(parents=True)
    (folder / "cute" / "tensor.hpp").touch()
    return folder


def test_cutlass_comes_from_the_submodule_first(tmp_path):
    submodule = make_cutlass(tmp_path / "third_party" / "cutlass" / "include")
    elsewhere = make_cutlass(tmp_path / "elsewhere" / "include")
    assert toolkit.find_cutlass(tmp_path, {"CUTLASS_PATH": str(elsewhere.parent)}) == submodule


def test_cutlass_path_is_the_last_resort(tmp_path, monkeypatch):
    monkeypatch.setattr(toolkit, "find_spec", lambda name: None)
    headers = make_cutlass(tmp_path / "elsewhere" / "include")
    assert toolkit.find_cutlass(tmp_path, {"CUTLASS_PATH": str(headers.parent)}) == headers
    assert toolkit.find_cutlass(tmp_path, {"CUTLASS_PATH": str(headers)}) == headers


def test_no_cutlass_lists_where_it_looked(tmp_path, monkeypatch):
    monkeypatch.setattr(toolkit, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as failure:
        toolkit.find_cutlass(tmp_path, {})
    message = str(failure.value)
    assert "third_party/cutlass/include" in message
    assert "cutlass_library (not installed)" in message
    assert "CUTLASS_PATH (not set)" in message


def test_emulator_without_headers_is_one_sentence(monkeypatch):
    def missing(environ):
        raise ImportError("there are no CUDA headers")

    monkeypatch.setattr(emulator, "_find_headers", missing)
    monkeypatch.setattr(sys, "argv", ["emulator.py"])
    with pytest.raises(SystemExit, match="the kernels can't be emulated: there are no CUDA headers"):
        emulator.main()


# Jobs


def test_max_jobs_overrides():
    assert jobs.choose_jobs({"MAX_JOBS": "7"}) == 7
    with pytest.raises(ValueError, match="MAX_JOBS must be a positive integer; got 'many'"):
        jobs.choose_jobs({"MAX_JOBS": "many"})


def test_jobs_are_bounded_by_free_memory(machine, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    filesystem = machine({"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {10 * GIB // 1024} kB\n"})
    assert jobs.choose_jobs({}, filesystem) == 4


def test_jobs_are_bounded_by_the_container(machine, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    files = {
        "proc/meminfo": f"MemAvailable: {500 * GIB // 1024} kB\n",
        "sys/fs/cgroup/cpu.max": "800000 100000\n",
        "sys/fs/cgroup/memory.max": f"{16 * GIB}\n",
        "sys/fs/cgroup/memory.current": f"{15 * GIB}\n",
        "sys/fs/cgroup/memory.stat": f"anon 5\ninactive_file {14 * GIB}\n",
    }
    assert jobs.choose_jobs({}, machine(files)) == 6
    assert jobs.choose_jobs({}, machine({"sys/fs/cgroup/memory.max": "max\n"})) == 8


def test_one_job_at_least(machine):
    assert jobs.choose_jobs({}, machine({"proc/meminfo": "MemAvailable: 1000 kB\n"})) == 1


# A real build


def test_build_of_a_subset(tmp_path, compilers):
    """One head dim and one dtype: the module holds these kernels and no other."""
    decided = decision.decide(os.environ)
    if isinstance(decided, decision.PurePython):
        pytest.skip(f"no kernels can be built here: {decided.reason}")
    # Headers take most of the time: to optimise less, or for fewer GPUs, saves little.
    chosen = {"FLASH_ATTN_ARCHS": "80", "FLASH_ATTN_HEAD_DIMS": "32", "FLASH_ATTN_DTYPES": "bf16"}
    build = subprocess.run(
        [sys.executable, "setup.py", "build", f"--build-base={tmp_path}"],
        cwd=ROOT,
        env={**os.environ, **chosen},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert build.returncode == 0, build.stdout + build.stderr
    assert "at a time" in build.stdout
    generated = {file.name for file in tmp_path.rglob("generated/*.cu")}
    # Calls with few rows have fewer buckets: head dim 32 takes those of 64.
    assert generated == {f"{kernels}_sm80.cu" for kernels in ("forward_d32_32", "forward_d64_64", "backward_d32_32")}

    (info_file,) = tmp_path.glob("lib*/flash_attn/_build_info.json")
    info = json.loads(info_file.read_text())
    assert info["kernels_built"]
    assert (info["archs"], info["head_dims"], info["dtypes"]) == ([80], [32], ["bf16"])

    code = "import torch, flash_attn._C; print(torch.ops.flash_attn.built_kernels())"
    listing = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(info_file.parents[1])},
        capture_output=True,
        text=True,
    )
    assert listing.returncode == 0, listing.stderr
    kernels = json.loads(listing.stdout)["kernels"]
    found = {(kernel["kind"], kernel["arch"], kernel["dtype"], *kernel["tile_row"][:2]) for kernel in kernels}
    assert found == {("forward", 80, "bf16", 32, 32), ("backward", 80, "bf16", 32, 32)}
