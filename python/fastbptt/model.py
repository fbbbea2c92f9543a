"""Embedding, recurrent layers and readout as one thing with one set of parameters."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from fastbptt._arrays import Array, as_index
from fastbptt._part import Part, PartT, copy_in
from fastbptt._settled import Settled
from fastbptt.embedding import Embedding
from fastbptt.layers import GRU, LSTM, RNN, Recurrent
from fastbptt.linear import Linear

State: TypeAlias = Array | tuple[Array, Array]

_KINDS: dict[str, type[Part]] = {kind.kind: kind for kind in (Embedding, RNN, LSTM, GRU, Linear)}
_WANTED = "an Embedding or none, one recurrent layer, a Linear or none, in that order"


class Model(Settled):
    """An optional Embedding, recurrent layers, and an optional Linear, one after the other.

    Parameters
    ----------
    *parts : Embedding, RNN, LSTM, GRU or Linear
        In that order, with sizes and dtypes that fit. Exactly one is recurrent; it may have several
        layers.

    Attributes
    ----------
    parts : tuple
        As given.
    embedding : Embedding or None
    recurrent : RNN, LSTM or GRU
    readout : Linear or None

    Raises
    ------
    ValueError
        Parts are missing, too many, in another order, or do not fit each other.
    TypeError
        A part is none of those.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbptt as fb
    >>> model = fb.Model(fb.Embedding(10, 3), fb.LSTM(3, 4), fb.Linear(4, 10))
    >>> logits, state = model(np.array([[1, 2], [3, 4], [5, 6]]))
    >>> logits.shape
    (3, 2, 10)
    >>> list(model.parameters())[:2]
    ['0.weight', '1.weight_ih_l0']
    """

    def __init__(self, *parts: Part) -> None:
        for place, part in enumerate(parts):
            if not isinstance(part, (Embedding, Recurrent, Linear)):
                raise TypeError(f"parts[{place}]: got {type(part).__name__}, wanted {_WANTED}")
        rest = list(parts)
        embedding = _take(rest, Embedding)
        recurrent: Recurrent[Any] | None = _take(rest, Recurrent)
        readout = _take(rest, Linear)
        if recurrent is None or rest:
            got = ", ".join(type(part).__name__ for part in parts) or "none"
            raise ValueError(f"parts: got {got}; wanted {_WANTED}")
        for part in parts:
            if part.dtype != recurrent.dtype:
                raise ValueError(
                    f"parts: got {part!r} of {part.dtype} beside {recurrent!r} of "
                    f"{recurrent.dtype}, wanted one dtype"
                )
        if embedding is not None and embedding.embedding_dim != recurrent.input_size:
            raise ValueError(
                f"parts: got {embedding!r} with embedding_dim {embedding.embedding_dim} before "
                f"{recurrent!r} with input_size {recurrent.input_size}, wanted the same"
            )
        if readout is not None and readout.in_features != recurrent.output_size:
            D = "" if recurrent.directions == 1 else "2 x "
            size = "proj_size" if recurrent.proj_size else "hidden_size"
            raise ValueError(
                f"parts: got {readout!r} with in_features {readout.in_features} behind "
                f"{recurrent!r} with {D}{size} {recurrent.output_size}, wanted the same"
            )
        self.parts = parts
        self.embedding = embedding
        self.recurrent = recurrent
        self.readout = readout

    def _settled(self) -> Container[str]:
        return ("parts", "embedding", "recurrent", "readout")

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of all parameters and of the output; but what a readout of bfloat16 gives is float32."""
        return self.recurrent.dtype

    @property
    def compute_dtype(self) -> np.dtype[Any]:
        """Of arithmetic and gradients: float32 for a model of bfloat16, else `dtype`."""
        return self.recurrent.compute_dtype

    @property
    def batch_first(self) -> bool:
        """Whether inputs and outputs have the batch before time."""
        return self.recurrent.batch_first

    def __call__(
        self,
        x: ArrayLike,
        state: ArrayLike | None = None,
        *,
        lengths: ArrayLike | None = None,
        resets: ArrayLike | None = None,
        mask: ArrayLike | None = None,
    ) -> tuple[Array, Any]:
        """Run through time, keeping nothing for a gradient. Nothing is dropped.

        Parameters
        ----------
        x : array_like
            With an embedding class numbers `[T, B]`, else `[T, B, I]`; with `batch_first` B comes
            before T.
        state : array_like, optional
            The state before the first step, in the form of the recurrent layer; by default the
            learned one, or zeros.
        lengths : array_like of int, optional
            How many steps each row has, `[B]`, in any order, each from 0 to T; all T by default.
            Behind them the output is zero, and the state is the one at the length.
        resets, mask : array_like of bool, optional
            Before which steps a row's state begins anew, and which steps there are, as the call of
            the recurrent layer takes them.

        Returns
        -------
        output : ndarray
            Of the readout, `[T, B, N]`, or of the recurrent layer, `[T, B, D*H]`; with
            `batch_first` B comes before T.
        state : ndarray or tuple of ndarray
            The state after the last step, to go on from in the next call.

        Raises
        ------
        ValueError
            A shape is wrong, or a class number out of range.
        TypeError
            A dtype is wrong, or something that is no array.

        Examples
        --------
        >>> import numpy as np
        >>> import fastbptt as fb
        >>> model = fb.Model(fb.GRU(3, 4), fb.Linear(4, 1))
        >>> output, state = model(np.ones((1, 2, 3), np.float32))
        >>> output, state = model(np.ones((1, 2, 3), np.float32), state)
        >>> output.shape, state.shape
        ((1, 2, 1), (1, 2, 4))
        """
        if self.embedding is not None:
            x = self.embedding._rows(self._index(x))
        y, last = self.recurrent(x, state, lengths=lengths, resets=resets, mask=mask)
        if self.readout is None:
            return y, last
        output = self.readout(y)
        if lengths is not None:
            T = y.shape[1 if self.batch_first else 0]
            away = np.asarray(lengths) <= np.arange(T)[:, None]
            output[away.T if self.batch_first else away] = 0.0
        return output, last

    def _index(self, x: ArrayLike) -> Array:
        """Return class numbers `[T, B]` (or `[B, T]`) as int64, all in range."""
        assert self.embedding is not None
        index = as_index("x", x, self.embedding.num_embeddings)
        if index.ndim != 2:
            axes = "[B, T]" if self.batch_first else "[T, B]"
            raise ValueError(f"x: got shape {index.shape}, wanted class numbers {axes}")
        return index

    def parameters(self) -> dict[str, Array]:
        """Return all parameters by the names that `torch.nn.Sequential` would give them.

        Returns
        -------
        dict of str to ndarray
            The arrays themselves: to write into them changes the model.

        Examples
        --------
        >>> import fastbptt as fb
        >>> model = fb.Model(fb.RNN(3, 4, bias=False), fb.Linear(4, 1))
        >>> list(model.parameters())
        ['0.weight_ih_l0', '0.weight_hh_l0', '1.weight', '1.bias']
        """
        return {
            f"{place}.{name}": weight
            for place, part in enumerate(self.parts)
            for name, weight in part.weights.items()
        }

    def load_state_dict(self, mapping: Mapping[str, Any]) -> None:
        """Copy values into the parameters; all are checked before the first is written.

        Parameters
        ----------
        mapping : mapping of str to array_like
            A value for each of `parameters()`, of its shape, and of its dtype or one that fits in
            it without rounding.

        Raises
        ------
        ValueError
            A name is missing or unknown, or a shape is wrong.
        TypeError
            A value is no array, or its dtype does not fit.

        Examples
        --------
        >>> import copy
        >>> import fastbptt as fb
        >>> model = fb.Model(fb.RNN(3, 4))
        >>> best = copy.deepcopy(model.parameters())
        >>> model.load_state_dict(best)
        """
        copy_in(self.parameters(), mapping)

    def config(self) -> dict[str, Any]:
        """Return what the model is made of, without its parameters, as a dict of JSON's types.

        Examples
        --------
        >>> import fastbptt as fb
        >>> model = fb.Model(fb.GRU(3, 4))
        >>> fb.Model.from_config(model.config())
        Model(GRU(3, 4))
        """
        return {"parts": [part.config() for part in self.parts]}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Model:
        """Return a new model, its parameters newly drawn.

        Parameters
        ----------
        config : mapping
            What `config()` returned.

        Raises
        ------
        ValueError
            It is no such thing.

        Examples
        --------
        >>> import fastbptt as fb
        >>> fb.Model.from_config({"parts": [{"type": "RNN", "input_size": 3, "hidden_size": 4}]})
        Model(RNN(3, 4))
        """
        return cls._build(config, lambda place, kind, settings: kind(**settings))

    @classmethod
    def _restore(cls, config: Any, get: Callable[[str], Array]) -> Model:
        """Return a model over arrays that exist: `get` finds a parameter by its name."""
        return cls._build(
            config,
            lambda place, kind, settings: kind._restore(
                settings, lambda name: get(f"{place}.{name}")
            ),
        )

    @classmethod
    def _build(cls, config: Any, build: Callable[[int, Any, dict[str, Any]], Part]) -> Model:
        parts = config.get("parts") if isinstance(config, Mapping) else None
        if not isinstance(parts, (list, tuple)):
            raise ValueError(f"config: got {config!r:.200}, wanted a mapping with a list of parts")
        built = []
        for place, part in enumerate(parts):
            settings = dict(part) if isinstance(part, Mapping) else {}
            name = settings.pop("type", None)
            kind = _KINDS.get(name) if isinstance(name, str) else None
            if kind is None:
                kinds = ", ".join(_KINDS)
                raise ValueError(f"config: got part {part!r:.200}, wanted the type {kinds}")
            try:
                built.append(build(place, kind, settings))
            except (TypeError, ValueError) as error:
                raise ValueError(f"config: part {place} ({name}): {error}") from error
        return cls(*built)

    def __repr__(self) -> str:
        return f"Model({', '.join(map(repr, self.parts))})"


def _take(rest: list[Part], kind: type[PartT]) -> PartT | None:
    """Remove the first of `rest` if it is of this kind."""
    part = rest[0] if rest else None
    if not isinstance(part, kind):
        return None
    del rest[0]
    return part
