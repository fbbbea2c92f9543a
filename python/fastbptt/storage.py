"""Models and training runs in files: safetensors, and as JSON in its metadata what is no array.

Tensors have the names of `Model.parameters()`; those of the optimiser's state begin with
`optimizer.`, those of the user with `extra.`. The metadata entry `fastbptt` holds

    {"format": 1, "model": Model.config(), "extra": DICT,
     "optimizer": null or {"type": ..., "config": {...}, "parameters": [names], "state": DICT}}

where DICT is {"values": {what is no array}, "arrays": [the names of what is]}.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fastbptt._arrays import Array
from fastbptt._files import replacing
from fastbptt.model import Model
from fastbptt.optimizers import SGD, Adam, Optimizer, RMSprop

FORMAT = 1

FilePath: TypeAlias = str | os.PathLike[str]

_OPTIMIZERS: dict[str, type[Optimizer]] = {kind.__name__: kind for kind in (Adam, SGD, RMSprop)}
_KEY = "fastbptt"


def save(
    path: FilePath,
    model: Model,
    optimizer: Optimizer | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a model, and what is needed to go on training it, to a file.

    The file is written under another name in the same folder and renamed when it is complete, so
    that no reader, and no failure, meets half of it; what was there before stays until then.

    Parameters
    ----------
    path : str or path-like
        The file; `.safetensors` is the usual ending.
    model : Model
        Its config and its parameters.
    optimizer : Adam, SGD or RMSprop, optional
        Its hyperparameters and state.
    extra : mapping of str to object, optional
        Arrays, and what JSON can hold; tuples come back as lists.

    Raises
    ------
    TypeError
        Something that cannot be written; nothing was.
    OSError
        The file cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> import fastbptt as fb
    >>> model = fb.Model(fb.RNN(3, 4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fb.save(f"{folder}/model.safetensors", model)
    ...     fb.load(f"{folder}/model.safetensors")
    Model(RNN(3, 4))
    """
    target = _path(path)
    if not isinstance(model, Model):
        raise TypeError(f"model: got {type(model).__name__}, wanted a Model")
    tensors = model.parameters()
    header: dict[str, Any] = {"format": FORMAT, "model": model.config(), "optimizer": None}
    if optimizer is not None:
        header["optimizer"], arrays = _optimizer_parts(optimizer, tensors)
        tensors |= arrays
    header["extra"], arrays = _split("extra", {} if extra is None else extra)
    tensors |= arrays
    try:
        text = json.dumps(header, default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"extra: got what JSON cannot hold: {error}") from error
    # The format knows C order only.
    tensors = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    with replacing(target) as temporary:
        try:
            save_file(tensors, temporary, metadata={_KEY: text})
        except SafetensorError as error:
            raise OSError(errno.EIO, str(error), target) from error


def load(path: FilePath) -> Model:
    """Read a model that `save` wrote.

    Parameters
    ----------
    path : str or path-like
        The file.

    Returns
    -------
    Model
        With the parameters as they were saved.

    Raises
    ------
    ValueError
        The file is damaged, of another format version, or no model of this library.
    OSError
        There is no such file (`FileNotFoundError`), or it cannot be read.

    Examples
    --------
    >>> import tempfile
    >>> import fastbptt as fb
    >>> model = fb.Model(fb.GRU(3, 4), fb.Linear(4, 1))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fb.save(f"{folder}/model.safetensors", model)
    ...     same = fb.load(f"{folder}/model.safetensors")
    >>> bool((same.parameters()["1.weight"] == model.parameters()["1.weight"]).all())
    True
    """
    with _reading(path) as (header, get):
        return Model._restore(header.get("model"), get)


def load_training(path: FilePath) -> tuple[Model, Any, dict[str, Any]]:
    """Read all that `save` wrote.

    Parameters
    ----------
    path : str or path-like
        The file.

    Returns
    -------
    model : Model
        With the parameters as they were saved.
    optimizer : Adam, SGD, RMSprop or None
        Over the parameters of that model, in the state in which it was saved.
    extra : dict
        As it was given to `save`; empty if none was.

    Raises
    ------
    ValueError
        The file is damaged, of another format version, or no model of this library.
    OSError
        There is no such file (`FileNotFoundError`), or it cannot be read.

    Examples
    --------
    >>> import tempfile
    >>> import fastbptt as fb
    >>> from fastbptt import storage
    >>> model = fb.Model(fb.RNN(3, 4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fb.save(f"{folder}/model", model, fb.SGD(model.parameters(), lr=0.1), {"epoch": 3})
    ...     model, optimizer, extra = storage.load_training(f"{folder}/model")
    >>> optimizer.lr, extra
    (0.1, {'epoch': 3})
    """
    with _reading(path) as (header, get):
        model = Model._restore(header.get("model"), get)
        optimizer = None
        if header.get("optimizer") is not None:
            optimizer = _restored_optimizer(header["optimizer"], model, get)
        return model, optimizer, _joined("extra", header.get("extra"), get)


def _path(path: FilePath) -> str:
    try:
        return os.fsdecode(os.fspath(path))
    except TypeError:
        raise TypeError(f"path: got {type(path).__name__}, wanted str or a path") from None


def _split(prefix: str, values: Any) -> tuple[dict[str, Any], dict[str, Array]]:
    """Return what JSON holds, with the names of the arrays, and the arrays as tensors."""
    if not isinstance(values, Mapping):
        raise TypeError(f"{prefix}: got {type(values).__name__}, wanted a mapping")
    plain: dict[str, Any] = {}
    arrays: dict[str, Array] = {}
    for name, value in values.items():
        if not isinstance(name, str):
            raise TypeError(f"{prefix}: got the key {name!r}, wanted str")
        if not isinstance(value, np.ndarray):
            plain[name] = value
        elif _is_storable(value):
            arrays[f"{prefix}.{name}"] = value
        else:
            raise TypeError(
                f"{prefix}: got {name!r}, {type(value).__name__} of {value.dtype}, wanted an "
                "array of bool, int, uint or float of up to 64 bits"
            )
    return {"values": plain, "arrays": [name[len(prefix) + 1 :] for name in arrays]}, arrays


def _is_storable(array: Array) -> bool:
    masked = isinstance(array, np.ma.MaskedArray)
    return array.dtype.kind in "biuf" and array.dtype.itemsize <= 8 and not masked


def _joined(prefix: str, parts: Any, get: Callable[[str], Array]) -> dict[str, Any]:
    """Return what `_split` took apart."""
    return {**parts["values"], **{name: get(f"{prefix}.{name}") for name in parts["arrays"]}}


def _optimizer_parts(
    optimizer: Optimizer, parameters: Mapping[str, Array]
) -> tuple[dict[str, Any], dict[str, Array]]:
    kind = type(optimizer).__name__
    if type(optimizer) not in _OPTIMIZERS.values():
        raise TypeError(f"optimizer: got {kind}, wanted {' or '.join(_OPTIMIZERS)}")
    ours = optimizer._parameters
    strange = [name for name in ours if ours[name] is not parameters.get(name)]
    if strange:
        raise ValueError(f"optimizer: got one that updates {strange[0]!r}, no parameter of model")
    state, arrays = _split("optimizer", optimizer.state_dict())
    return {
        "type": kind,
        "config": optimizer.config(),
        "parameters": list(ours),
        "state": state,
    }, arrays


def _restored_optimizer(parts: Any, model: Model, get: Callable[[str], Array]) -> Any:
    parameters = model.parameters()
    ours = {name: parameters[name] for name in parts["parameters"]}
    optimizer = _OPTIMIZERS[parts["type"]](ours, **parts["config"])
    optimizer.load_state_dict(_joined("optimizer", parts["state"], get))
    return optimizer


def _plain(value: Any) -> Any:
    """Return a NumPy number as the Python number that JSON can hold."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} ({value!r:.80})")


@contextmanager
def _reading(path: FilePath) -> Iterator[tuple[dict[str, Any], Callable[[str], Array]]]:
    """Give header and tensors of a file; what is wrong with them becomes a ValueError."""
    name = _path(path)
    with open(name, "rb") as file:  # an OSError that says what it is, where there is one
        start = file.read(1)
    try:
        if not start:
            raise ValueError("got an empty file")
        with safe_open(name, framework="np") as tensors:
            header = _header(tensors.metadata())

            def get(tensor: str) -> Array:
                array: Array = tensors.get_tensor(tensor)
                return array

            yield header, get
    except (
        SafetensorError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        RecursionError,
    ) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"path: {name!r} is no model that can be read: {what}; "
            "wanted a complete file that fastbptt.save wrote"
        ) from error


def _header(metadata: dict[str, str] | None) -> dict[str, Any]:
    text = (metadata or {}).get(_KEY)
    if text is None:
        raise ValueError(f"got safetensors without the metadata entry {_KEY!r}")
    header: dict[str, Any] = json.loads(text)
    version = header.get("format")
    if version != FORMAT:
        raise ValueError(f"got format version {version!r}, wanted {FORMAT}")
    return header
