"""How much memory training takes, and how much there is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fastbptt import _core
from fastbptt._arrays import as_size
from fastbptt.model import Model
from fastbptt.schedules import Needs

# The core's blocks of this size and more take a multiple of the unit: fastbptt/buffer.h.
_LARGE_BLOCK, _BLOCK_UNIT = 4 << 20, 64 << 10

# Of a kept state, beside its numbers: the objects of Python.
_STATE_OVERHEAD = 512

_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def as_bytes(name: str, value: Any) -> int:
    """Return a size given in bytes or as text: "64MB" is 64 * 1000**2, "64MiB" 64 * 1024**2."""
    if not isinstance(value, str):
        return as_size(name, value)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b\s*", value.lower())
    if match is None or (match[3] and not match[2]):
        raise ValueError(f"{name}: got {value!r}, wanted a number of bytes or text like '64MB'")
    return as_size(name, int(float(match[1]) * (1024 if match[3] else 1000) ** _UNITS[match[2]]))


def as_text(size: float) -> str:
    """Return a number of bytes in a unit that people read."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.4g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"


def available() -> int | None:
    """Return the memory that the process can still get, in bytes; None where nobody says."""
    found = []
    try:
        meminfo = Path("/proc/meminfo").read_text()
        found += [int(kb) * 1024 for kb in re.findall(r"MemAvailable: +(\d+) kB", meminfo)]
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            found.append(int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return min(found, default=None)


def needs_of(
    model: Model,
    T: int,
    B: int,
    *,
    read_bytes: int = 0,
    target_bytes: int = 8,
    logits: bool = False,
    batch: dict[str, Any] | None = None,
) -> Needs:
    """Return what training `model` takes.

    Parameters
    ----------
    model : Model
    T, B : int
        Of the whole sequence.
    read_bytes : int
        Of a row of x at one step, where reading it makes a copy.
    target_bytes : int
        The same for the target.
    logits : bool
        Whether the outputs of a segment exist as a whole, and their gradient, as for a callable.
    batch : dict, optional
        What the core is to know of the batch beside x.
    """
    layer, item = model.recurrent, model.dtype.itemsize
    states = layer.num_layers * layer.output_size * item * (2 if layer.kind == "LSTM" else 1)
    # y, dL/dy, and what is made for the segment on both its sides.
    row = 2 * layer.output_size * item + read_bytes + target_bytes
    if model.embedding is not None:
        row += 8 + 2 * layer.input_size * item
    out = layer.output_size if model.readout is None else model.readout.out_features
    if logits:
        row += 2 * out * item
    starts = 0
    if batch and "lengths" in batch:
        row += 2 * layer.output_size * item + target_bytes  # the rows that are there, apart
        # A tape holds the states where the number of rows changes, and where it begins.
        starts = (len(set(batch["lengths"].tolist())) + 1) * B * states

    tape_step = layer._stack.tape_nbytes(1, B)

    def fixed(longest: int) -> int:
        readout = _core.readout_nbytes(
            layer.output_size if model.readout is not None else 1, out, longest * B, item == 8
        )
        # The present state, dL/dstate and what a call returns of both; the ends of large blocks.
        ends = 3 * _BLOCK_UNIT if longest * tape_step >= _LARGE_BLOCK else 0
        session = layer._stack.session(T, B, longest, batch)
        return session.nbytes + readout + 4 * B * states + starts + ends

    return Needs(B * states + _STATE_OVERHEAD, tape_step + B * row, fixed)
