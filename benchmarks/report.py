"""The tables that benchmarks end with, and where they go."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    problem: str
    library: str
    seconds: float
    gflops: float
    peak_bytes: int


def table(rows: list[Row]) -> list[str]:
    """One line a row, under a heading."""
    width = max(len(row.problem) for row in rows)
    heading = f"{'suite-cell-T,B,I,H':{width}}  library          median ms  GFLOP/s    peak MB"
    return [heading] + [
        f"{row.problem:{width}}  {row.library:15}  {row.seconds * 1e3:9.3f}  {row.gflops:7.1f}"
        f"  {row.peak_bytes / 1e6:9.1f}"
        for row in rows
    ]


def put_between(path: Path, first: str, last: str, block: str) -> None:
    """Replace what a file has between two lines."""
    before, found, behind = path.read_text(encoding="utf-8").partition(first)
    _, found_last, after = behind.partition(last)
    if not (found and found_last):
        raise SystemExit(f"{path} has no {first.strip()} ... {last}")
    path.write_text(before + first + block + last + after, encoding="utf-8")
