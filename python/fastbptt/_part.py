"""What the parts of a model have in common: named parameters that stay where they are."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np

from fastbptt._arrays import Array, as_array, compute_dtype
from fastbptt._settled import Settled

StateT = TypeVar("StateT")
PartT = TypeVar("PartT", bound="Part")


@dataclass(frozen=True)
class Gradients(Generic[StateT]):
    """What `backward` returns.

    Attributes
    ----------
    x : ndarray
        Gradient with respect to the input, of its shape; None if it was not asked for.
    state : ndarray or tuple of ndarray
        Gradient with respect to the state before the first step; None for a `Linear`.
    weights : dict of str to ndarray
        Gradient with respect to the parameters, under their names.
    """

    x: Any
    state: StateT
    weights: dict[str, Array]


class Part(Settled):
    """A part of a model: settings that do not change, and parameters that do."""

    kind: ClassVar[str]  # the name in `config`; a subclass of a user is saved as what it extends
    dtype: np.dtype[Any]
    _weights: dict[str, Array]

    @property
    def compute_dtype(self) -> np.dtype[Any]:
        """Of arithmetic and gradients: float32 for a part of bfloat16, else `dtype`."""
        return compute_dtype(self.dtype)

    def _zero_grads(self) -> dict[str, Array]:
        return {name: np.zeros(w.shape, self.compute_dtype) for name, w in self._weights.items()}

    def _computed(self, name: str, value: Any) -> Array:
        """Return what is to be of the part's dtype, in that of its arithmetic."""
        array = as_array(name, value, self.dtype)
        if self.dtype == self.compute_dtype:
            return array
        if array.dtype != self.dtype:
            raise TypeError(f"{name}: got dtype {array.dtype}, wanted {self.dtype}")
        return array.astype(self.compute_dtype)

    @property
    def weights(self) -> dict[str, Array]:
        """The parameters: a new dict of the arrays themselves.

        Write into an array (`layer.weights["bias_ih_l0"][...] = 0`) to change a parameter; what is
        put in the dict in place of an array does not reach the layer.
        """
        return dict(self._weights)

    def load_state_dict(self, mapping: Mapping[str, Any]) -> None:
        """Copy values into the parameters; all are checked before the first is written.

        Parameters
        ----------
        mapping : mapping of str to array_like
            A value for each of `weights`, of its shape, and of its dtype or one that fits in it
            without rounding. A `state_dict` of the PyTorch module of the same name will do.

        Raises
        ------
        ValueError
            A name is missing or unknown, or a shape is wrong.
        TypeError
            A value is no array, or its dtype does not fit.

        Examples
        --------
        >>> import fastbptt as fb
        >>> first, second = fb.GRU(2, 3, seed=1), fb.GRU(2, 3, seed=2)
        >>> second.load_state_dict(first.weights)
        >>> bool((first.weights["weight_hh_l0"] == second.weights["weight_hh_l0"]).all())
        True
        """
        copy_in(self._weights, mapping)

    def config(self) -> dict[str, Any]:
        """Return the settings as a dict of JSON's types: `type`, and the constructor's arguments.

        Examples
        --------
        >>> import fastbptt as fb
        >>> fb.Linear(3, 2).config()
        {'type': 'Linear', 'in_features': 3, 'out_features': 2, 'bias': True, 'dtype': 'float32'}
        """
        return {"type": self.kind, **self._settings()}

    def _settings(self) -> dict[str, Any]:
        raise NotImplementedError

    def _settled(self) -> Container[str]:
        return self._settings()

    # Checks and sets all settings, given by name; refuses sizes that the machine cannot hold.
    _configure: Callable[..., None]

    def _shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield names and shapes of the parameters, in PyTorch's order."""
        raise NotImplementedError

    def _connect(self) -> None:
        """Make what hangs on `_weights`; `_transient` names the attributes that hold it."""

    _transient: ClassVar[tuple[str, ...]] = ()

    def _allocate(self) -> None:
        """Make the parameters, not yet initialised."""
        self._weights = {name: np.empty(s, self.dtype) for name, s in self._shapes()}
        self._connect()

    @classmethod
    def _restore(
        cls: type[PartT], settings: Mapping[str, Any], get: Callable[[str], Array]
    ) -> PartT:
        """Return a part over arrays that exist: `get` finds one by its name."""
        part = cls.__new__(cls)
        try:
            part._configure(**settings)
        except MemoryError as error:  # sizes that the arrays there are cannot have
            raise ValueError(str(error)) from error
        weights = {}
        for name, shape in part._shapes():
            array = get(name)
            if array.shape != shape or array.dtype != part.dtype:
                raise ValueError(
                    f"{name}: got {array.dtype} of shape {array.shape}, "
                    f"wanted {part.dtype} of shape {shape}"
                )
            weights[name] = _usable(array, part.dtype)
        part._weights = weights
        part._connect()
        return part

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in self._transient}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._weights = {name: _usable(w, self.dtype) for name, w in self._weights.items()}
        self._connect()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._arguments())})"

    def _arguments(self) -> list[str]:
        raise NotImplementedError


def _usable(array: Array, dtype: np.dtype[Any]) -> Array:
    # What comes out of a pickle or a file may be read-only, or lie anywhere.
    if array.dtype == dtype and array.flags.carray:
        return array
    return np.array(array, dtype, order="C")


def copy_in(parameters: Mapping[str, Array], values: Mapping[str, Any]) -> None:
    """Copy `values` into the arrays of the same names; nothing is written unless all fit."""
    if not isinstance(values, Mapping):
        raise TypeError(
            f"mapping: got {type(values).__name__}, wanted a mapping of names to arrays"
        )
    missing, unknown = listed(parameters, values), listed(values, parameters)
    if missing or unknown:
        faults = [
            f"{names} {what}"
            for names, what in ((missing, "missing"), (unknown, "unknown"))
            if names
        ]
        raise ValueError(f"mapping: {'; '.join(faults)}")
    checked: list[tuple[Array, Array]] = []
    for name, parameter in parameters.items():
        value = as_array(name, values[name], parameter.dtype)
        if not np.can_cast(value.dtype, parameter.dtype, "safe"):
            raise TypeError(f"{name}: got dtype {value.dtype}, wanted {parameter.dtype}")
        if value.shape != parameter.shape:
            raise ValueError(f"{name}: got shape {value.shape}, wanted {parameter.shape}")
        if not parameter.flags.writeable:
            raise ValueError(f"{name}: the parameter is read-only, wanted a writable one")
        if any(np.may_share_memory(value, other) for other in parameters.values()):
            value = value.copy()
        checked.append((parameter, value))
    for parameter, value in checked:
        np.copyto(parameter, value)


def listed(names: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    """Return those of `names` that are not `known`, for a message."""
    return ", ".join(repr(name) for name in names if name not in known)
