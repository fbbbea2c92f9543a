"""The table that a run of the benchmarks ends with."""

from __future__ import annotations

from dataclasses import dataclass


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
    heading = f"{'suite-cell-T,B,I,H':{width}}  library   median ms  GFLOP/s    peak MB"
    return [heading] + [
        f"{row.problem:{width}}  {row.library:8}  {row.seconds * 1e3:9.3f}  {row.gflops:7.1f}"
        f"  {row.peak_bytes / 1e6:9.1f}"
        for row in rows
    ]
