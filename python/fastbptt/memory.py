"""How much memory training takes, and how much there is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fastbptt import _core
from fastbptt._arrays import as_size
from fastbptt.model import Model
from fastbptt.schedules import Needs

# The core's blocks of this size and more take a multiple of the unit, fastbptt/buffer.h; smaller
# ones of a page.
_LARGE_BLOCK, _BLOCK_UNIT, _PAGE = 4 << 20, 64 << 10, 4 << 10

# Rows of time x batch that run in one call at least: enough for a call to cost nothing.
RUN_AT_ONCE = 4096

# Pieces of a recorded segment at most.
_MOST_PIECES = 12

# Of a kept state, beside its numbers: the objects of Python.
_STATE_OVERHEAD = 512

# Of a call: small objects of Python, and a part of the target while it is checked.
_CALL_OVERHEAD = 48 << 10

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


def steps_at_once(segment: int, B: int) -> int:
    """Return how many of the steps of a segment are recorded, and reversed, in one call."""
    return max(min(segment, max(1, RUN_AT_ONCE // B)), -(-segment // _MOST_PIECES))


def needs_of(
    model: Model,
    T: int,
    B: int,
    *,
    read_bytes: int = 0,
    target_bytes: int = 8,
    in_pieces: bool = True,
    input_gradient: bool = False,
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
    in_pieces : bool
        Whether the loss is taken a piece at a time, and by the core; else the outputs of a segment
        exist as a whole, and their gradient, as for a callable.
    input_gradient : bool
        Whether that of x is wanted; it always is for a model with an embedding.
    batch : dict, optional
        What the core is to know of the batch beside x.
    """
    layer, item, wide = model.recurrent, model.dtype.itemsize, model.compute_dtype.itemsize
    cells = layer.directions * layer.hidden_size if layer.kind == "LSTM" else 0
    states = layer.num_layers * (layer.output_size * item + cells * wide)
    wide_states = layer.num_layers * (layer.output_size + cells) * wide
    # y, and x where it is made, wait for the way back; the others are there for a piece only.
    kept = layer.output_size * item + read_bytes
    passing = layer.output_size * wide + target_bytes
    if item != wide:
        passing += layer.output_size * wide  # y of the piece as the loss takes it
    if model.embedding is not None:
        kept += layer.input_size * item
        passing += 8
    if input_gradient or model.embedding is not None:
        passing += layer.input_size * wide
    out = layer.output_size if model.readout is None else model.readout.out_features
    if not in_pieces:
        passing += 2 * out * wide
    starts = 0
    if batch and "lengths" in batch:
        passing += 2 * layer.output_size * wide + target_bytes  # the rows that are there, apart
        # A tape holds the states where the number of rows changes, and where it begins.
        starts = (len(set(batch["lengths"].tolist())) + 1) * B * wide_states

    tape_step = layer._stack.tape_nbytes(1, B)

    def fixed(longest: int) -> int:
        piece = steps_at_once(longest, B) if in_pieces else longest
        readout = _core.readout_nbytes(
            layer.output_size if model.readout is not None else 1, out, piece * B, item == 8
        )
        if item != wide and model.readout is not None:
            readout += (layer.output_size + 1) * out * wide
        session = layer._stack.session(T, B, piece, batch).nbytes
        # The present state, dL/dstate and what a call returns of both.
        now = piece * B * passing + 4 * B * wide_states
        # The ends of blocks: of each piece its tape, y and x.
        unit = _BLOCK_UNIT if piece * tape_step >= _LARGE_BLOCK else _PAGE
        pieces = -(-longest // piece)
        return session + readout + now + pieces * (starts + 3 * unit) + _CALL_OVERHEAD

    return Needs(B * states + _STATE_OVERHEAD, tape_step + B * kept, fixed)
