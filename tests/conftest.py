"""Fixtures and profiles that every test module shares."""

import contextlib
import faulthandler
import os
import signal
import zlib

import pytest
import torch
from emulation import IS_EMULATED, can_run
from harness import GPU_PATHS, met, require_features
from hypothesis import HealthCheck, settings
from workers import builds_first, is_on_worker, jobs_of_a_build, num_workers

import flash_attn

# Shapes are small: more threads spend their time waiting for each other, above all on a busy machine.
torch.set_num_threads(1)

_COMMON = dict(deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.register_profile("ci", max_examples=30, derandomize=True, database=None, **_COMMON)
settings.register_profile("long", max_examples=500, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """What `-n auto` means, where pytest-xdist is installed."""
    return num_workers(os.environ)


def pytest_collection_modifyitems(items):
    if is_on_worker():
        items[:] = builds_first(items)


def pytest_runtest_setup(item):
    """A test's random numbers are the same whatever ran before it in its process."""
    torch.manual_seed(zlib.crc32(item.nodeid.encode()))


@pytest.fixture
def compilers(monkeypatch):
    """For a test that compiles for minutes. Workers start it first, and each build takes its share of MAX_JOBS."""
    monkeypatch.setenv("MAX_JOBS", str(jobs_of_a_build(os.environ)))


@pytest.fixture(params=("cpu", *GPU_PATHS))
def path(request):
    """Each path that a call can take. What a path has no kernel for, harness.on_path checks."""
    if request.param in GPU_PATHS and not can_run(request.param):
        pytest.skip(f"no device here runs {request.param}")
    if request.param == "cpu" and IS_EMULATED:
        pytest.skip("what is emulated is the kernels")
    return request.param


@pytest.fixture(params=GPU_PATHS)
def gpu_path(request):
    """Each path of kernels, forced for the whole test; skipped where this machine or the package has none."""
    if not torch.cuda.is_available() or not can_run(request.param):
        pytest.skip(f"no GPU here runs {request.param}")
    require_features(request.param)
    with flash_attn.use_path(request.param):
        yield request.param


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """A test whose calls a path refused is skipped with the path's reasons, whatever else it checked.

    Of drawn calls some are meant to be refused: such a test is skipped only if all were.
    """
    met.served, refused = 0, met.refused
    refused.clear()
    result = yield
    if refused and not (met.served and pyfuncitem.get_closest_marker("drawn")):
        pytest.skip("no kernel for it: " + " | ".join(refused))
    return result


@pytest.fixture
def watchdog():
    """Fail a test that takes over 30 s, and end the process if it hangs where Python can't interrupt it.

    It is started and stopped by the test, so that the oracle's time does not count: `with watchdog(): ...`.
    """

    def on_alarm(signum, frame):
        raise TimeoutError("the test ran for over 30 s")

    @contextlib.contextmanager
    def guard():
        previous = signal.signal(signal.SIGALRM, on_alarm)
        signal.alarm(30)
        faulthandler.dump_traceback_later(60, exit=True)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            signal.alarm(0)
            signal.signal(signal.SIGALRM, previous)

    return guard
