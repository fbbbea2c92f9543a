"""Settings that stay what the constructor was given."""

from __future__ import annotations

from collections.abc import Container
from typing import Any


class Settled:
    """Refuses a new value for a setting: what was made of the old one would not follow."""

    def _settled(self) -> Container[str]:
        """Return the names of the settings."""
        raise NotImplementedError

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__ and name[0] != "_" and name in self._settled():
            kind = type(self).__name__
            raise AttributeError(
                f"{name}: got {value!r}, but the settings of a {kind} do not change; wanted a new "
                f"{kind}"
            )
        super().__setattr__(name, value)
