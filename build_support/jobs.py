"""How many compilers to run at once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

# One nvcc job on a CuTe kernel peaks below this.
BYTES_PER_JOB = 2.5 * 2**30


def choose_jobs(environ: Mapping[str, str], filesystem: Path = Path("/")) -> int:
    """MAX_JOBS if set, else what both the cores and the free memory allow."""
    if environ.get("MAX_JOBS"):
        jobs = environ["MAX_JOBS"]
        if not jobs.isdigit() or int(jobs) < 1:
            raise ValueError(f"MAX_JOBS must be a positive integer; got {jobs!r}")
        return int(jobs)
    by_memory = int(_free_memory(filesystem) // BYTES_PER_JOB)
    return max(1, min(_cores(filesystem), by_memory))


def _cores(filesystem: Path) -> int:
    cores = len(os.sched_getaffinity(0))
    quota = _read(filesystem / "sys/fs/cgroup/cpu.max").split()  # "max 100000" or "200000 100000"
    if len(quota) == 2 and quota[0].isdigit():
        cores = min(cores, max(1, int(quota[0]) // int(quota[1])))
    quota_us = _read(filesystem / "sys/fs/cgroup/cpu/cpu.cfs_quota_us")
    period_us = _read(filesystem / "sys/fs/cgroup/cpu/cpu.cfs_period_us")
    if quota_us.isdigit() and period_us.isdigit():
        cores = min(cores, max(1, int(quota_us) // int(period_us)))
    return cores


def _free_memory(filesystem: Path) -> int:
    free = 2**62
    for line in _read(filesystem / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    cgroup = filesystem / "sys/fs/cgroup"
    for limit_file, used_file in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        limit, used = _read(cgroup / limit_file), _read(cgroup / used_file)
        if limit.isdigit() and used.isdigit():
            free = min(free, int(limit) - int(used) + _reclaimable(cgroup / limit_file))
    return max(free, 0)


def _reclaimable(limit_file: Path) -> int:
    """Page cache counts as used in a cgroup, but a compiler that needs the memory gets it."""
    for line in _read(limit_file.with_name("memory.stat")).splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
