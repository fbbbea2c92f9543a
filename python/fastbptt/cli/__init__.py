"""The command line: `fastbptt train`, `sample`, `bench` and `flow`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from fastbptt.cli import options
from fastbptt.cli.bench import bench
from fastbptt.cli.errors import RunError, UsageError
from fastbptt.cli.flow import flow
from fastbptt.cli.sample import sample
from fastbptt.cli.train import train

__all__ = ["main"]

_COMMANDS = {"train": train, "sample": sample, "bench": bench, "flow": flow}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments behind the program's name; those of the process by default.

    Returns
    -------
    int
        0 when all is done; 1 when the work failed, such as a loss that became NaN; 2 when the
        arguments or the files they name cannot be used; 130 after Ctrl-C. Both failures write one
        line to stderr.
    """
    try:
        arguments = options.parser().parse_args(argv)
        return _COMMANDS[arguments.command](arguments)
    except (UsageError, RunError) as error:
        print(f"fastbptt: error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print("fastbptt: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of stdout is gone; the interpreter would complain once more at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
