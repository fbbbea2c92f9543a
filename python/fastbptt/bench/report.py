"""What was measured on one problem: as lines of a table, and as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastbptt.bench.problems import Problem
from fastbptt.bench.timing import Times

_HEADING = "cell      T,B,I,H              library           median ms   GFLOP/s  x ours  of matrix"


@dataclass
class Point:
    """One problem's times and, where it was measured, each library's peak memory in bytes."""

    problem: Problem
    times: Times
    peak_bytes: dict[str, int] = field(default_factory=dict)

    def gflops(self, library: str) -> float:
        """Return the rate of the matrix products of the step."""
        return self.problem.operations / self.times.seconds(library) / 1e9

    def ratio(self, library: str) -> float:
        """Return the library's time over this library's."""
        return self.times.seconds(library) / self.times.seconds("fastbptt")

    def share(self, library: str) -> float:
        """Return the library's rate over that of the large matrix product."""
        return self.gflops(library) / self.times.matrix_rate()[0]

    def as_dict(self) -> dict[str, Any]:
        """Return what `--json` writes."""
        problem, (rate, by) = self.problem, self.times.matrix_rate()
        results: dict[str, dict[str, float]] = {}
        for library, runs in self.times.steps.items():
            results[library] = {
                "seconds": self.times.seconds(library),
                "runs": len(runs),
                "gflops": self.gflops(library),
                "ratio": self.ratio(library),
                "share": self.share(library),
            }
            if library in self.peak_bytes:
                results[library]["peak_bytes"] = self.peak_bytes[library]
        return {
            "cell": problem.cell,
            **{size: getattr(problem, size) for size in "TBIH"},
            "operations": problem.operations,
            "matrix_gflops": rate,
            "matrix_library": by,
            "results": results,
        }


def heading(*, memory: bool = False) -> str:
    """Return the first line of a table."""
    return _HEADING + ("    peak MB" if memory else "")


def lines(point: Point) -> list[str]:
    """Return one line a library."""
    table = []
    for library in point.times.steps:
        row = (
            f"{point.problem.cell:8}  {point.problem.sizes:19}  {library:15}  "
            f"{point.times.seconds(library) * 1e3:10.3f}  {point.gflops(library):8.2f}  "
            f"{point.ratio(library):6.2f}  {point.share(library):9.1%}"
        )
        if library in point.peak_bytes:
            row += f"  {point.peak_bytes[library] / 1e6:9.2f}"
        table.append(row.rstrip())
    return table
