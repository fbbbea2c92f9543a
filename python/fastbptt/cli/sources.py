"""Where data comes from: what the options name, and how it is opened."""

from __future__ import annotations

import argparse
from typing import Any

from fastbptt.cli.data import Data
from fastbptt.cli.errors import UsageError
from fastbptt.cli.series import read_series
from fastbptt.cli.text import read_text


def given_source(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Return the text or series that the options name, or None."""
    if arguments.series is None:
        if arguments.column is not None:
            raise UsageError(f"--column: got {arguments.column!r} without --series FILE.csv")
        return None if arguments.file is None else {"file": arguments.file}
    if arguments.file is not None:
        raise UsageError(f"FILE: got {arguments.file!r} beside --series; wanted one of the two")
    if arguments.column is None:
        raise UsageError("--series: wanted --column NAME with it")
    return {"series": arguments.series, "column": arguments.column}


def open_source(source: dict[str, Any]) -> Data:
    """Return the data."""
    if "series" in source:
        return read_series(source["series"], source["column"])
    return read_text(source["file"])


def open_again(
    source: dict[str, Any], given: dict[str, Any] | None, fingerprint: Any, path: str, option: str
) -> Data:
    """Return the data that a saved run was trained on.

    Parameters
    ----------
    source : dict
        Where it was.
    given : dict or None
        Where it is now, if that is another place.
    fingerprint
        Of its content.
    path, option : str
        The file of the run, and what names it on the command line.
    """
    if source.keys() not in ({"file"}, {"series", "column"}):
        raise UsageError(f"{option}: {path!r} does not say what it was trained on")
    given = given or source
    if given.keys() != source.keys():
        raise UsageError(
            f"{option}: got {name_of(given)}, but {path!r} was trained on {name_of(source)}"
        )
    data = open_source(given)
    if data.fingerprint() != fingerprint:
        raise UsageError(
            f"{option}: {path!r} was trained on {name_of(source)}, with other content than "
            f"{name_of(given)} has now; wanted the same {data.kind}"
        )
    return data


def name_of(source: dict[str, Any]) -> str:
    """Return what to call it in a message."""
    if "series" in source:
        return f"column {source['column']!r} of {source['series']!r}"
    return "pydoc_data.topics" if source["file"] is None else repr(source["file"])
