"""Tests beside each other, on pytest-xdist's workers: how many, which come first, and what each build may take."""

import os

import repository  # noqa: F401  (makes build_support importable)
import torch

from build_support.jobs import choose_jobs

# The files with tests that take the fixture `compilers`.
NUM_BUILDS = 2
# With two more than that, everything else is done before the builds are.
MOST_WORKERS = NUM_BUILDS + 2


def num_workers(environ):
    """As many as there could be compilers. 0, no worker but pytest's own process, where that is one or tests need the
    memory and the time of a GPU.
    """
    if torch.cuda.is_available():
        return 0
    workers = min(choose_jobs(environ), MOST_WORKERS)
    return workers if workers > 1 else 0


def is_on_worker(environ=os.environ):
    return "PYTEST_XDIST_WORKER" in environ


def jobs_of_a_build(environ):
    """Each build's share, where others may run beside it."""
    jobs = choose_jobs(environ)
    return max(1, jobs // NUM_BUILDS) if is_on_worker(environ) else jobs


def builds_first(items):
    """The tests in the order in which workers start them: a build that starts last keeps the others waiting."""
    return sorted(items, key=lambda item: "compilers" not in item.fixturenames)
