"""What a table of times has to say about the machine they are from."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import fastbptt as fb


def machine() -> dict[str, Any]:
    """Return the CPU's name, how many CPUs the process may use, core 0's caches, and the ISA."""
    affinity = hasattr(os, "sched_getaffinity")
    return {
        "cpu": _cpu(),
        "cpus": len(os.sched_getaffinity(0)) if affinity else os.cpu_count(),
        "caches": _caches(),
        "isa": fb.cpu_info()["isa"],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _caches() -> dict[str, str]:
    caches = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = (
                (folder / name).read_text().strip() for name in ("level", "type", "size")
            )
        except OSError:
            continue
        if kind != "Instruction":
            caches[f"L{level}"] = size
    return caches
