"""A Python process of its own, for what is decided before the first import."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, TypeVar

T = TypeVar("T")


class ProcessError(Exception):
    """A call in the process raised, or the process is gone.

    Attributes
    ----------
    kind : str
        The name of the exception's class; empty if the process is gone.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def thread_environment(threads: int) -> dict[str, str]:
    """Return the variables that hold every library to so many threads.

    They have to be there before NumPy, torch or JAX is imported.
    """
    names = ("FASTBPTT", "OMP", "OPENBLAS", "MKL", "BLIS")
    variables = {f"{name}_NUM_THREADS": str(threads) for name in names}
    variables |= {"VECLIB_MAXIMUM_THREADS": str(threads)}
    # XLA's pool, under its new and its old name; its products have a pool of their own.
    variables |= {"PJRT_NPROC": str(threads), "NPROC": str(threads), "JAX_PLATFORMS": "cpu"}
    if threads == 1:
        flags = os.environ.get("XLA_FLAGS", "")
        variables["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()
    return variables


class FreshProcess:
    """Calls functions, one after the other, in a new process with these variables set.

    Functions, arguments and results go there and back by pickle. Leaving the context ends it,
    whatever it does.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        with _environment(environment):
            self._process.start()
        theirs.close()

    def __enter__(self) -> FreshProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.kill()
        self._process.join()
        self._process.close()

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Return `function(*arguments)`; `ProcessError` if it raises or the process ends."""
        try:
            self._connection.send((function, arguments))
            kind, result = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join()
            raise ProcessError(
                "", f"the process that measures ended with status {self._process.exitcode}"
            ) from error
        if kind is not None:
            raise ProcessError(kind, result)
        value: T = result
        return value


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(connection: Connection) -> None:
    # Ctrl-C goes to every process of the terminal; the one that called ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        answer: tuple[str | None, Any]
        try:
            answer = None, function(*arguments)
        except Exception as error:
            answer = type(error).__name__, f"{type(error).__name__}: {error}"
        connection.send(answer)
