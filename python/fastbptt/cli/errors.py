"""The two ways in which a command ends early, each with its exit status."""

from __future__ import annotations


class UsageError(Exception):
    """What the user gave cannot be used; one line that says what was got and what was wanted."""

    status = 2


class RunError(Exception):
    """The work itself failed; one line that says where, and what is left on disk."""

    status = 1
