"""The peak of a process's own memory: anonymous pages, without the files that it has mapped."""

from __future__ import annotations

import threading
from types import TracebackType

from fastbptt.bench.peak_memory import peak, restart_peak, status

# Long enough to leave the run alone, short enough for what a run of some milliseconds takes.
_INTERVAL = 0.002


class PeakGrowth:
    """While the context lasts, how far memory grows beyond what it was at its begin.

    The kernel keeps no peak of anonymous memory (RssAnon), so a thread looks every two
    milliseconds. Where the kernel does not tell it at all, it is the peak of the resident size,
    mapped files included.

    Attributes
    ----------
    bytes : int
        The growth, once the context is left.
    """

    def __enter__(self) -> PeakGrowth:
        self.bytes = 0
        self._done = threading.Event()
        self._anonymous = _has_anonymous()
        self._before = _anonymous() if self._anonymous else restart_peak()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if self._anonymous:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        if self._anonymous:
            self._thread.join()
            self._look()
        else:
            self.bytes = max(0, peak() - self._before)

    def _watch(self) -> None:
        while not self._done.wait(_INTERVAL):
            self._look()

    def _look(self) -> None:
        self.bytes = max(self.bytes, _anonymous() - self._before)


def _anonymous() -> int:
    return status("RssAnon")


def _has_anonymous() -> bool:
    try:
        _anonymous()
    except (OSError, KeyError):
        return False
    return True
