"""Peak memory of one training step, measured in a fresh process.

What counts is the highest resident size during the step beyond what was resident before it, when
input, weights and dL/dy were already there.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from fastbptt.bench.fresh_process import FreshProcess, thread_environment
from fastbptt.bench.libraries import make_step
from fastbptt.bench.problems import Problem


def peak_memory(library: str, problem: Problem, dtype: str = "float32", threads: int = 1) -> int:
    """Return the bytes that one step takes, from a process in which it is the first."""
    # With a threshold of its own, glibc gives every large block back as soon as it is freed, so
    # that what the preparation used does not hide what the step takes.
    environment = thread_environment(threads) | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    with FreshProcess(environment) as process:
        return process.call(_measure, library, problem, dtype, threads)


def _measure(library: str, problem: Problem, dtype: str, threads: int) -> int:
    # What a library loads and allocates once is not the step's.
    make_step(library, replace(problem, T=2), dtype, threads).run()
    step = make_step(library, problem, dtype, threads)
    before = restart_peak()
    step.run()
    return max(0, peak() - before)


def status(field: str) -> int:
    """Return a size that Linux tells of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def restart_peak() -> int:
    """Let the peak start anew where the system can do so; return the resident size."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return status("VmRSS")
    except OSError:
        return peak()


def peak() -> int:
    """Return the highest resident size since `restart_peak`, or since the process began."""
    try:
        return status("VmHWM")
    except OSError:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
