"""Ctrl-C during training: stop where the model is whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupt:
    """Takes SIGINT and SIGTERM over while it is entered.

    The first one is remembered in `signal`, and raises `KeyboardInterrupt` only where `breakable`
    says that nothing is being changed, so that an update of the weights is made whole or not at
    all. The second one always raises `KeyboardInterrupt`.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._breakable = False
        self._before: dict[int, Any] = {}

    @property
    def exit_status(self) -> int:
        """What a shell expects of a command that ended on this signal; 0 without one."""
        return 0 if self.signal is None else 128 + self.signal

    def __enter__(self) -> Interrupt:
        # Python delivers signals to the main thread, and only that one may set handlers.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    @contextmanager
    def breakable(self) -> Iterator[None]:
        """Code whose loss costs nothing but the time it took."""
        self._breakable = True
        try:
            yield
        finally:
            self._breakable = False

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        second = self.signal is not None
        self.signal = self.signal or number
        if second or self._breakable:
            raise KeyboardInterrupt
