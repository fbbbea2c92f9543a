"""The recurrent layers: RNN, LSTM and GRU, with the names, shapes and gate order of PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Generic, Literal, cast, overload

import numpy as np
from numpy import ndarray
from numpy.typing import ArrayLike, DTypeLike

from fastbptt import initialisers
from fastbptt._arrays import (
    Array,
    as_array,
    as_bool,
    as_dtype,
    as_finite,
    as_flags,
    as_lengths,
    as_precision,
    as_probability,
    as_rng,
    as_seed,
    as_size,
    check_parameters,
)
from fastbptt._core import Stack, Tape
from fastbptt._part import Gradients, Part, StateT

# The parameters of a layer in one direction, in the order of the core.
_KINDS = (
    "weight_ih",
    "weight_hh",
    "bias_ih",
    "bias_hh",
    "weight_hr",
    "h0",
    "c0",
    "weight_peephole",
    "weight_ln_ih",
    "weight_ln_hh",
    "weight_ln_c",
    "bias_ln_c",
)


class Recurrent(Part, Generic[StateT]):
    """What RNN, LSTM and GRU have in common: a stack of layers that run through time.

    Attributes
    ----------
    input_size, hidden_size, num_layers : int
        I, H and L.
    bias, batch_first, bidirectional, learn_initial_state : bool
        As given to the constructor.
    dropout, recurrent_dropout : float
        As given to the constructor.
    zoneout : float or tuple of float
        As given to the constructor.
    dtype : numpy.dtype
        float32, float64 or bfloat16.
    tape : str or None
        The dtype of what `forward` keeps beside x and y; None for an RNN, which keeps nothing.
    precision : str or None
        As given to the constructor.
    """

    input_size: int
    hidden_size: int
    num_layers: int
    proj_size: int
    bias: bool
    batch_first: bool
    bidirectional: bool
    dropout: float
    learn_initial_state: bool
    recurrent_dropout: float
    zoneout: float | tuple[float, float]
    precision: str | None = None
    peephole: bool = False
    layer_norm: bool = False
    tape: str | None = None
    _gates: int
    _keep_gate = 1  # the place of the gate that holds the old state, where there is one
    _has_cells: ClassVar[bool] = False
    _transient = ("_stack", "_advance")
    _stack: Stack
    _advance: Callable[..., tuple[Array, StateT]]
    _draws: np.random.Generator | None = None  # seeds of training runs, where there are any

    def _set_sizes(
        self,
        *,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        dtype: DTypeLike,
        dropout: float = 0.0,
        bidirectional: bool = False,
        learn_initial_state: bool = False,
        recurrent_dropout: float = 0.0,
        zoneout: float | tuple[float, float] = 0.0,
        proj_size: int = 0,
        layer_norm: bool = False,
        precision: str | None = None,
    ) -> None:
        self.input_size = as_size("input_size", input_size)
        self.hidden_size = as_size("hidden_size", hidden_size)
        self.num_layers = as_size("num_layers", num_layers)
        self.proj_size = as_size("proj_size", proj_size, least=0)
        if self.proj_size >= self.hidden_size:
            raise ValueError(
                f"proj_size: got {self.proj_size}, wanted less than hidden_size {self.hidden_size}"
            )
        self.bias = as_bool("bias", bias)
        self.batch_first = as_bool("batch_first", batch_first)
        self.dtype = as_dtype(dtype)
        self.dropout = as_probability("dropout", dropout)
        self.bidirectional = as_bool("bidirectional", bidirectional)
        self.learn_initial_state = as_bool("learn_initial_state", learn_initial_state)
        self.recurrent_dropout = as_probability("recurrent_dropout", recurrent_dropout)
        self.zoneout = self._as_zoneout(zoneout)
        self.layer_norm = as_bool("layer_norm", layer_norm)
        self.precision = None if precision is None else as_precision(precision)
        L, I, H, D = self.num_layers, self.input_size, self.hidden_size, self.directions  # noqa: E741
        R, P = self.proj_size or H, self.proj_size
        columns = (I + R) + (L - 1) * (D + 1) * R + (2 * L if self.bias else 0)
        check_parameters(
            f"input_size={I}, hidden_size={H}, num_layers={L}",
            D * H * (self._gates * columns + L * P),
            D * L * ((4 if self.bias else 2) + (P > 0)),
            self.dtype,
        )

    @property
    def directions(self) -> int:
        """D: 2 if bidirectional, else 1."""
        return 2 if self.bidirectional else 1

    @property
    def output_size(self) -> int:
        """The width of y: D*H, or D*P with a projection."""
        return self.directions * (self.proj_size or self.hidden_size)

    def _as_tape(self, value: str | None) -> str:
        own: str = self.dtype.name
        fitting = ("float64",) if own == "float64" else ("float32", "bfloat16")
        if value is None:
            return self._own_tape()
        if value not in fitting:
            wanted = " or ".join(map(repr, fitting))
            raise ValueError(f"tape: got {value!r} for a layer of {own}, wanted {wanted}")
        if self.layer_norm and value == "bfloat16":
            raise ValueError(f"tape: got {value!r} beside layer_norm=True, wanted one of them")
        return value

    def _own_tape(self) -> str:
        # What is normalised has no bounds that bfloat16 could be scaled to.
        name: str = self.compute_dtype.name if self.layer_norm else self.dtype.name
        return name

    def _other_tape(self) -> str | None:
        """Return the dtype of the tape where it is not the layer's own."""
        return None if self.tape == self._own_tape() else self.tape

    def _as_zoneout(self, value: Any) -> float | tuple[float, float]:
        if not isinstance(value, (tuple, list)):
            return as_probability("zoneout", value)
        if not self._has_cells or len(value) != 2:
            wanted = "a number or a pair (h, c)" if self._has_cells else "a number"
            raise ValueError(f"zoneout: got {value!r}, wanted {wanted}")
        h, c = as_probability("zoneout[0]", value[0]), as_probability("zoneout[1]", value[1])
        return h if h == c else (h, c)

    def _initialise(
        self,
        init: str,
        seed: Any,
        *,
        forget_bias: float | None = None,
        chrono: float | None = None,
    ) -> None:
        if not isinstance(init, str) or init not in initialisers.LAYERS:
            raise ValueError(f"init: got {init!r}, wanted 'uniform' or 'orthogonal'")
        biases = {"forget_bias": forget_bias, "chrono": chrono}
        given = {name: as_finite(name, v) for name, v in biases.items() if v is not None}
        if len(given) == 2:
            raise ValueError(
                f"chrono: got {chrono!r} beside forget_bias={forget_bias!r}, wanted one of them"
            )
        for name, value in given.items():
            if not self.bias:
                raise ValueError(f"{name}: got {biases[name]!r} with bias=False, wanted None")
            if name == "chrono" and value <= 2.0:
                raise ValueError(f"chrono: got {chrono!r}, wanted more than 2 steps")
        rng = as_rng(seed)
        self._allocate()
        learned = {n: w for n, w in self._weights.items() if n.startswith(("h0", "c0"))}
        for weight in learned.values():
            weight.fill(0.0)
        drawn = {n: w for n, w in self._weights.items() if n not in learned}
        initialisers.LAYERS[init](drawn, self.hidden_size, rng)
        if self.layer_norm:
            initialisers.layer_norm(self._weights)
        if "forget_bias" in given:
            initialisers.forget_bias(
                self._weights, self.hidden_size, given["forget_bias"], self._keep_gate
            )
        if "chrono" in given:
            initialisers.chrono(
                self._weights, self.hidden_size, given["chrono"], rng, self._keep_gate
            )
        if self._random:
            self._draws = np.random.default_rng(rng.integers(1 << 63))

    @property
    def _random(self) -> bool:
        """Whether training draws random numbers."""
        between = self.dropout > 0.0 and self.num_layers > 1
        return between or self.recurrent_dropout > 0.0 or self.zoneout != 0.0

    def _seed_of(self, seed: Any) -> int | None:
        """Return the seed of a training run: the one given, or a new draw; None if none is used."""
        given = None if seed is None else as_seed(seed)
        if not self._random:
            return None
        if given is not None:
            return given
        if self._draws is None:
            self._draws = np.random.default_rng()
        return int(self._draws.integers(1 << 63))

    def _start(self, B: int) -> Any:
        """Return the state that B rows begin with where none is given; None for zeros."""
        if not self.learn_initial_state:
            return None
        kinds = ("h0", "c0") if self._has_cells else ("h0",)
        parts = [np.stack([self._weights[kind + end] for _, end in self._runs()]) for kind in kinds]
        parts[1:] = [part.astype(self.compute_dtype, copy=False) for part in parts[1:]]
        states = tuple(np.repeat(part[:, None], B, axis=1) for part in parts)
        return states if self._has_cells else states[0]

    def _settings(self) -> dict[str, Any]:
        return {
            "input_size": self.input_size,
            "hidden_size": self.hidden_size,
            "num_layers": self.num_layers,
            "bias": self.bias,
            "batch_first": self.batch_first,
            "dtype": self.dtype.name,
            "dropout": self.dropout,
            "bidirectional": self.bidirectional,
            "learn_initial_state": self.learn_initial_state,
            "recurrent_dropout": self.recurrent_dropout,
            "zoneout": list(self.zoneout) if isinstance(self.zoneout, tuple) else self.zoneout,
            "precision": self.precision,
        }

    def _runs(self) -> Iterator[tuple[int, str]]:
        """Yield each layer in each direction: its number, and the end of its names."""
        for layer in range(self.num_layers):
            yield layer, f"_l{layer}"
            if self.bidirectional:
                yield layer, f"_l{layer}_reverse"

    def _shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        rows, H = self._gates * self.hidden_size, self.hidden_size
        R = self.proj_size or H
        for layer, suffix in self._runs():
            yield f"weight_ih{suffix}", (rows, self.output_size if layer else self.input_size)
            yield f"weight_hh{suffix}", (rows, R)
            if self.bias:
                yield f"bias_ih{suffix}", (rows,)
                yield f"bias_hh{suffix}", (rows,)
            if self.proj_size:
                yield f"weight_hr{suffix}", (self.proj_size, H)
            if self.learn_initial_state:
                yield f"h0{suffix}", (R,)
                if self._has_cells:
                    yield f"c0{suffix}", (H,)
            if self.peephole:
                yield f"weight_peephole{suffix}", (rows - H,)
            if self.layer_norm:
                yield f"weight_ln_ih{suffix}", (rows,)
                yield f"weight_ln_hh{suffix}", (rows,)
            if self.layer_norm and self._has_cells:
                yield f"weight_ln_c{suffix}", (H,)
                if self.bias:
                    yield f"bias_ln_c{suffix}", (H,)

    def _cell(self) -> str:
        raise NotImplementedError

    def _connect(self) -> None:
        self._stack = Stack(
            self._cell(),
            self.input_size,
            self.hidden_size,
            self.num_layers,
            self.batch_first,
            self.dtype.name,
            [self._weights.get(f"{kind}{suffix}") for _, suffix in self._runs() for kind in _KINDS],
            self._options(),
        )
        self._advance = cast("Callable[..., tuple[Array, StateT]]", self._stack.advance)

    def _options(self) -> dict[str, Any]:
        """Return what the core is to know beside cell and sizes."""
        pair = self.zoneout if isinstance(self.zoneout, tuple) else (self.zoneout, self.zoneout)
        return {
            "bidirectional": self.bidirectional,
            "dropout": self.dropout,
            "peephole": self.peephole,
            "layer_norm": self.layer_norm,
            "recurrent_dropout": self.recurrent_dropout,
            "zoneout_h": pair[0],
            "zoneout_c": pair[1] if self._has_cells else 0.0,
            "proj_size": self.proj_size,
            "narrow_tape": self.tape == "bfloat16",
            "precision": self.precision,
        }

    def _flags(self, T: int, B: int, resets: Any, mask: Any) -> dict[str, Array]:
        """Return those that there are of resets and mask, `[T, B]`, by name."""
        return {
            name: as_flags(name, flags, T, B, self.batch_first)
            for name, flags in (("resets", resets), ("mask", mask))
            if flags is not None
        }

    def _batch(
        self,
        x: Array,
        lengths: Any = None,
        resets: Any = None,
        mask: Any = None,
        cells: bool = False,
        seed: int | None = None,
    ) -> dict[str, Any] | None:
        """Return what the core is to know of a batch beside x."""
        batch: dict[str, Any] = {}
        if x.ndim == 3:  # the core says what is wrong with another x
            T, B = x.shape[1::-1] if self.batch_first else x.shape[:2]
            if lengths is not None:
                batch["lengths"] = as_lengths(lengths, T, B)
            batch |= self._flags(T, B, resets, mask)
        if as_bool("return_cells", cells):
            if not self._has_cells:
                raise ValueError(
                    f"return_cells: got True for {type(self).__name__}, which has no cells"
                )
            batch["cells"] = True
        if seed is not None:
            batch["seed"] = seed
        return batch or None

    def _as_state(self, name: str, state: Any, dtype: np.dtype[Any] | None = None) -> Any:
        """Return a state as the core takes it, h of the layer's dtype or another."""
        if type(state) is tuple:
            raise TypeError(
                f"{name}: got a tuple, wanted an array [L*D, B, H]; an LSTM has a tuple (h, c)"
            )
        return as_array(name, state, dtype or self.dtype)

    @overload
    def __call__(
        self,
        x: ArrayLike,
        state: ArrayLike | None = None,
        *,
        lengths: ArrayLike | None = None,
        resets: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        return_cells: Literal[False] = False,
    ) -> tuple[Array, StateT]: ...
    @overload
    def __call__(
        self,
        x: ArrayLike,
        state: ArrayLike | None = None,
        *,
        lengths: ArrayLike | None = None,
        resets: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        return_cells: Literal[True],
    ) -> tuple[Array, StateT, Array]: ...
    # A step of a small layer takes a few microseconds, so arrays go to the core as they come.
    def __call__(
        self,
        x: ArrayLike,
        state: ArrayLike | None = None,
        *,
        lengths: ArrayLike | None = None,
        resets: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        return_cells: bool = False,
    ) -> tuple[Array, StateT] | tuple[Array, StateT, Array]:
        """Run through time, keeping nothing for a gradient. Nothing is drawn at random.

        Parameters
        ----------
        x : array_like
            Input `[T, B, I]`, or `[B, T, I]` with `batch_first`; T may be 0.
        state : array_like, optional
            The state before the first step; by default the learned one, or zeros. For RNN and GRU
            h `[L*D, B, H]`, for LSTM a tuple `(h, c)` of two such arrays.
        lengths : array_like of int, optional
            How many steps each row has, `[B]`, in any order, each from 0 to T; all T by default.
            Behind its length a row costs nothing, y is zero, and its final state is the one at its
            length; of a row of length 0 it is the state before.
        resets : array_like of bool, optional
            `[T, B]`, or `[B, T]` with `batch_first`: whether the row's state is set to zero, or to
            the learned initial state, before the step, as between the episodes of a stream. No
            gradient crosses it. A direction that runs backward begins anew at the same place.
        mask : array_like of bool, optional
            Of the same shape: False where the row misses the step. Its state is carried over, so y
            is that of the step before, and the gradient passes through; x may hold anything there.
        return_cells : bool
            LSTM only: whether every c of the last layer is returned too.

        Returns
        -------
        y : ndarray
            The output h of the last layer at each step, `[T, B, D*H]`, or `[B, T, D*H]`.
        state : ndarray or tuple of ndarray
            The state after the last step, to go on from in the next call; of the direction that
            runs backward, the state after the first step.
        cells : ndarray
            With `return_cells`: c of the last layer at each step, `[T, B, D*H]`, or `[B, T, D*H]`.

        Raises
        ------
        ValueError
            A shape is wrong.
        TypeError
            A dtype is wrong, or something that is no array.

        Examples
        --------
        >>> import numpy as np
        >>> import fastbptt as fb
        >>> layer = fb.GRU(3, 4, seed=0)
        >>> x = np.ones((10, 2, 3), np.float32)
        >>> y, state = layer(x)
        >>> y_1, state_1 = layer(x[:6])
        >>> y_2, state_2 = layer(x[6:], state_1)
        >>> bool(np.allclose(y, np.concatenate([y_1, y_2])))
        True
        """
        if type(x) is not ndarray:
            x = as_array("x", x, self.dtype)
        if state is not None and type(state) is not ndarray:
            state = self._as_state("state", state)
        if lengths is None and resets is None and mask is None and return_cells is False:
            return self._advance(x, state)
        batch = self._batch(x, lengths, resets, mask, return_cells)
        return cast("tuple[Array, StateT]", self._flat(*self._advance(x, state, batch)))

    @staticmethod
    def _flat(y: Any, *rest: Any) -> Any:
        """Put the cells, where y comes with them, behind the rest."""
        return (y[0], *rest, y[1]) if isinstance(y, tuple) else (y, *rest)

    @overload
    def forward(
        self,
        x: ArrayLike,
        state: ArrayLike | None = None,
        training: Literal[True] = True,
        *,
        lengths: ArrayLike | None = None,
        resets: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        return_cells: Literal[False] = False,
        seed: int | None = None,
    ) -> tuple[Array, StateT, Tape]: ...
    @overload
    def forward(
        self,
        x: ArrayLike,
        state: ArrayLike | None,
        training: Literal[False],
        *,
        lengths: ArrayLike | None = None,
        resets: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        return_cells: Literal[False] = False,
        seed: int | None = None,
    ) -> tuple[Array, StateT, None]: ...
    @overload
    def forward(
        self,
        x: ArrayLike,
        state: ArrayLike | None = None,
        *,
        training: Literal[False],
        lengths: ArrayLike | None = None,
        resets: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        return_cells: Literal[False] = False,
        seed: int | None = None,
    ) -> tuple[Array, StateT, None]: ...
    @overload
    def forward(
        self,
        x: ArrayLike,
        state: ArrayLike | None = None,
        training: bool = True,
        *,
        lengths: ArrayLike | None = None,
        resets: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        return_cells: Literal[False] = False,
        seed: int | None = None,
    ) -> tuple[Array, StateT, Tape | None]: ...
    @overload
    def forward(
        self,
        x: ArrayLike,
        state: ArrayLike | None = None,
        training: bool = True,
        *,
        lengths: ArrayLike | None = None,
        resets: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        return_cells: Literal[True],
        seed: int | None = None,
    ) -> tuple[Array, StateT, Tape | None, Array]: ...
    def forward(
        self,
        x: ArrayLike,
        state: ArrayLike | None = None,
        training: bool = True,
        *,
        lengths: ArrayLike | None = None,
        resets: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        return_cells: bool = False,
        seed: int | None = None,
    ) -> tuple[Array, StateT, Tape | None] | tuple[Array, StateT, Tape | None, Array]:
        """Run through time and keep what `backward` needs.

        The tape refers to x, state and y without copying them: until `backward` they, and the
        weights, must stay as they are. y is read-only for that reason.

        Parameters
        ----------
        x : array_like
            Input `[T, B, I]`, or `[B, T, I]` with `batch_first`; T may be 0.
        state : array_like, optional
            The state before the first step; by default the learned one, or zeros. For RNN and GRU
            h `[L*D, B, H]`, for LSTM a tuple `(h, c)` of two such arrays.
        training : bool
            Without it no tape is made, None takes its place, and nothing is drawn at random.
        lengths : array_like of int, optional
            How many steps each row has, `[B]`, in any order, each from 0 to T; all T by default.
            Behind its length a row costs nothing, y is zero, and its final state is the one at its
            length; of a row of length 0 it is the state before.
        resets : array_like of bool, optional
            `[T, B]`, or `[B, T]` with `batch_first`: whether the row's state is set to zero, or to
            the learned initial state, before the step, as between the episodes of a stream. No
            gradient crosses it. A direction that runs backward begins anew at the same place.
        mask : array_like of bool, optional
            Of the same shape: False where the row misses the step. Its state is carried over, so y
            is that of the step before, and the gradient passes through; x may hold anything there.
        return_cells : bool
            LSTM only: whether every c of the last layer is returned too.
        seed : int, optional
            Of what is drawn at random, from 0 to 2**64 - 1: the same seed draws the same. By
            default a new one for each call, which the layer's own seed decides.

        Returns
        -------
        y : ndarray
            The output h of the last layer at each step, `[T, B, D*H]`, or `[B, T, D*H]`.
        state : ndarray or tuple of ndarray
            The state after the last step.
        tape : Tape
            For one call of `backward`; `tape.nbytes` says what it holds beside x and y.
        cells : ndarray
            With `return_cells`: c of the last layer at each step, `[T, B, D*H]`, or `[B, T, D*H]`.

        Raises
        ------
        ValueError
            A shape is wrong.
        TypeError
            A dtype is wrong, or something that is no array.

        Examples
        --------
        >>> import numpy as np
        >>> import fastbptt as fb
        >>> layer = fb.LSTM(3, 4, seed=0)
        >>> y, (h, c), tape = layer.forward(np.ones((10, 2, 3), np.float32))
        >>> y.shape, h.shape, c.shape
        ((10, 2, 4), (1, 2, 4), (1, 2, 4))
        """
        if type(x) is not ndarray:
            x = as_array("x", x, self.dtype)
        if state is not None and type(state) is not ndarray:
            state = self._as_state("state", state)
        if not as_bool("training", training):
            batch = self._batch(x, lengths, resets, mask, return_cells)
            result = self._flat(*self._advance(x, state, batch), None)
            return cast("tuple[Array, StateT, None]", result)
        batch = self._batch(x, lengths, resets, mask, return_cells, self._seed_of(seed))
        result = self._flat(*self._stack.record(x, cast(Any, state), batch))
        result[0].flags.writeable = False
        return cast("tuple[Array, StateT, Tape]", result)

    def backward(
        self,
        tape: Tape,
        grad_y: ArrayLike | None = None,
        grad_state: ArrayLike | None = None,
        *,
        need_x: bool = True,
        grad_cells: ArrayLike | None = None,
    ) -> Gradients[StateT]:
        """Run back through the time that `tape` recorded, and use the tape up.

        Parameters
        ----------
        tape : Tape
            What `forward` of this very layer returned.
        grad_y : array_like, optional
            Gradient of the loss with respect to y, of its shape; zeros by default.
        grad_state : array_like, optional
            Gradient of the loss with respect to the state after the last step, in the form of the
            state; zeros by default. For truncated backpropagation leave it out.
        need_x : bool
            Whether the gradient with respect to the input is wanted; without it some work is saved.
        grad_cells : array_like, optional
            LSTM only: gradient of the loss with respect to every c of the last layer, of the shape
            of the cells; zeros by default.

        Returns
        -------
        Gradients
            `x`, `state` (before the first step) and `weights`. Behind the length of a row, where
            `forward` was given any, `x` is zero and `grad_y` does not count.

        Raises
        ------
        ValueError
            A shape is wrong, or the tape is used up or another layer's.
        TypeError
            A dtype is wrong, or something that is no array, or no tape.

        Notes
        -----
        The error at a step is that of its own output and what comes back from the step behind it
        (Werbos 1990): `dL/dh_t = dL/dy_t + (dL/dh_t through step t+1)`.

        Examples
        --------
        >>> import numpy as np
        >>> import fastbptt as fb
        >>> layer = fb.RNN(3, 4, seed=0)
        >>> y, state, tape = layer.forward(np.ones((10, 2, 3), np.float32))
        >>> grads = layer.backward(tape, np.ones_like(y))  # of y.sum()
        >>> grads.x.shape, grads.state.shape, grads.weights["weight_ih_l0"].shape
        ((10, 2, 3), (1, 2, 4), (4, 3))
        """
        if not isinstance(tape, Tape):
            raise TypeError(
                f"tape: got {type(tape).__name__}, wanted what forward(training=True) returned"
            )
        if grad_y is not None and type(grad_y) is not ndarray:
            grad_y = as_array("grad_y", grad_y, self.compute_dtype)
        if grad_state is not None and type(grad_state) is not ndarray:
            grad_state = self._as_state("grad_state", grad_state, self.compute_dtype)
        if grad_cells is not None and type(grad_cells) is not ndarray:
            grad_cells = as_array("grad_cells", grad_cells, self.compute_dtype)
        x, state, weights = self._stack.reverse(
            tape,
            cast(Any, grad_y),
            cast(Any, grad_state),
            as_bool("need_x", need_x),
            cast(Any, grad_cells),
        )
        # The core lists all kinds for each layer, None for one that is not there.
        found = (grad for grad in weights if grad is not None)
        return Gradients(x, cast(StateT, state), dict(zip(self._weights, found, strict=True)))

    def _arguments(self) -> list[str]:
        shown = [f"{self.input_size}", f"{self.hidden_size}"]
        if self.num_layers != 1:
            shown.append(f"num_layers={self.num_layers}")
        if not self.bias:
            shown.append("bias=False")
        if self.batch_first:
            shown.append("batch_first=True")
        if self.dropout:
            shown.append(f"dropout={self.dropout}")
        if self.bidirectional:
            shown.append("bidirectional=True")
        if self.learn_initial_state:
            shown.append("learn_initial_state=True")
        if self.recurrent_dropout:
            shown.append(f"recurrent_dropout={self.recurrent_dropout}")
        if self.zoneout:
            shown.append(f"zoneout={self.zoneout}")
        if self.layer_norm:
            shown.append("layer_norm=True")
        if self.dtype != np.float32:
            shown.append(f"dtype={self.dtype.name!r}")
        if self._other_tape():
            shown.append(f"tape={self.tape!r}")
        if self.precision is not None:
            shown.append(f"precision={self.precision!r}")
        return shown


class RNN(Recurrent[Array]):
    """Layers of `h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)`, or relu (Elman 1990).

    Parameters
    ----------
    input_size, hidden_size : int
        I and H.
    num_layers : int
        L; each layer but the first takes the output of the one below.
    nonlinearity : {"tanh", "relu"}
        What the sum goes through.
    bias : bool
        Whether there are `b_ih` and `b_hh`.
    batch_first : bool
        Whether x and y have the batch before time: `[B, T, .]`. States stay `[L*D, B, H]`.
    dtype : {"float32", "float64", "bfloat16"}
        Of parameters, inputs and results. In bfloat16, which needs `fastbptt[bfloat16]`, all
        arithmetic and all gradients, and c, are float32; h is rounded at each step.
    dropout : float
        The part p, from 0 to 1, of the output of every layer but the last that training drops:
        `y * m / (1 - p)` with m 1 or 0 (Srivastava et al. 2014; between layers Zaremba et al.
        2014). `forward` and `value_and_grad` train, the call of the layer does not.
    bidirectional : bool
        Whether each layer has a second set of parameters, `weight_ih_l0_reverse` and so on, that
        runs from the last step to the first (Schuster & Paliwal 1997). Both outputs stand side by
        side in y, `[T, B, 2H]`, and are what the next layer takes; states are `[2L, B, H]`, each
        layer's forward one first. A row with a length begins its way back at its own last step.
    learn_initial_state : bool
        Whether the state to start from, where none is given, is learned (Forcada & Carrasco 1995):
        parameters `h0_l0` `[H]` of each layer and direction, zeros at first.
    recurrent_dropout : float
        The part p of h_{t-1}, from 0 to 1, that training drops before every product with W_hh:
        `W_hh (m * h_{t-1} / (1 - p))`, with one m of ones and zeros for all of time, drawn anew
        for each row and layer (Gal & Ghahramani 2016).
    zoneout : float
        The probability k that a unit keeps its value for a step of training:
        `h_t = d * h_{t-1} + (1 - d) * h~_t`, d one with probability k and else zero, h~ what the
        layer computes (Krueger et al. 2017). Without training d is k, the expectation.
    precision : {"highest", "high", "medium"}, optional
        Of the matrix products, see `set_float32_matmul_precision`; by default what that says when
        a call begins, and `"medium"` in bfloat16. Products of float64 have one precision.
    seed : int, optional
        Of the initial parameters, and of what training draws; a new one each time by default.
    init : {"uniform", "orthogonal"}
        PyTorch's default, or orthogonal recurrent matrices (Saxe et al. 2014).

    Raises
    ------
    ValueError
        A size is not positive, sizes overflow, a choice is unknown, or a probability is out of
        range.
    TypeError
        A size is no integer, or a switch no bool.
    MemoryError
        The machine cannot hold the parameters.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbptt as fb
    >>> layer = fb.RNN(3, 4, nonlinearity="relu", seed=0)
    >>> y, h = layer(np.ones((10, 2, 3), np.float32))
    >>> y.shape, h.shape
    ((10, 2, 4), (1, 2, 4))
    >>> sorted(layer.weights)
    ['bias_hh_l0', 'bias_ih_l0', 'weight_hh_l0', 'weight_ih_l0']
    """

    kind = "RNN"
    nonlinearity: str
    _gates = 1

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dtype: DTypeLike = "float32",
        dropout: float = 0.0,
        bidirectional: bool = False,
        learn_initial_state: bool = False,
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
        precision: str | None = None,
        seed: Any = None,
        init: str = "uniform",
    ) -> None:
        self._configure(
            input_size=input_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            nonlinearity=nonlinearity,
            bias=bias,
            batch_first=batch_first,
            dtype=dtype,
            dropout=dropout,
            bidirectional=bidirectional,
            learn_initial_state=learn_initial_state,
            recurrent_dropout=recurrent_dropout,
            zoneout=zoneout,
            precision=precision,
        )
        self._initialise(init, seed)

    def _configure(self, *, nonlinearity: str, **settings: Any) -> None:
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"nonlinearity: got {nonlinearity!r}, wanted 'tanh' or 'relu'")
        self.nonlinearity = nonlinearity
        self._set_sizes(**settings)

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "nonlinearity": self.nonlinearity}

    def _cell(self) -> str:
        return f"rnn_{self.nonlinearity}"

    def _arguments(self) -> list[str]:
        other = [] if self.nonlinearity == "tanh" else [f"nonlinearity={self.nonlinearity!r}"]
        return super()._arguments() + other


class LSTM(Recurrent[tuple[Array, Array]]):
    """Long short-term memory (Hochreiter & Schmidhuber 1997; forget gate Gers et al. 2000).

    With `a = W_ih x_t + b_ih`, `u = W_hh h_{t-1} + b_hh` and the logistic function s:
    `i, f, o = s(a + u)`, `g = tanh(a + u)`, `c_t = f*c_{t-1} + i*g`, `h_t = o*tanh(c_t)`;
    the gates are stacked along the rows of the parameters in the order i, f, g, o.

    Parameters
    ----------
    input_size, hidden_size : int
        I and H.
    num_layers : int
        L; each layer but the first takes the output of the one below.
    proj_size : int
        P, less than H: h and y have P values, `h_t = W_hr (o*tanh(c_t))` (Sak et al. 2014), and c
        has H. There is `weight_hr` `[P, H]`, and `weight_hh` is `[4H, P]`. 0 for no projection.
        Options that act on h act on these P values.
    bias : bool
        Whether there are `b_ih` and `b_hh`.
    batch_first : bool
        Whether x and y have the batch before time: `[B, T, .]`. States stay `[L*D, B, H]`.
    dtype : {"float32", "float64", "bfloat16"}
        Of parameters, inputs and results. In bfloat16, which needs `fastbptt[bfloat16]`, all
        arithmetic and all gradients, and c, are float32; h is rounded at each step.
    dropout : float
        The part p, from 0 to 1, of the output of every layer but the last that training drops:
        `y * m / (1 - p)` with m 1 or 0 (Srivastava et al. 2014; between layers Zaremba et al.
        2014). `forward` and `value_and_grad` train, the call of the layer does not.
    bidirectional : bool
        Whether each layer has a second set of parameters, `weight_ih_l0_reverse` and so on, that
        runs from the last step to the first (Schuster & Paliwal 1997). Both outputs stand side by
        side in y, `[T, B, 2H]`, and are what the next layer takes; states are `[2L, B, H]`, each
        layer's forward one first. A row with a length begins its way back at its own last step.
    learn_initial_state : bool
        Whether the state to start from, where none is given, is learned (Forcada & Carrasco 1995):
        parameters `h0_l0`, `c0_l0` `[H]` of each layer and direction, zeros at first.
    recurrent_dropout : float
        The part p of h_{t-1}, from 0 to 1, that training drops before every product with W_hh:
        `W_hh (m * h_{t-1} / (1 - p))`, with one m of ones and zeros for all of time, drawn anew
        for each row and layer (Gal & Ghahramani 2016).
    zoneout : float or pair of float
        The probability k that a unit keeps its value for a step of training:
        `h_t = d * h_{t-1} + (1 - d) * h~_t`, d one with probability k and else zero, h~ what the
        layer computes, and the same for c with draws of its own (Krueger et al. 2017). A pair is
        that of h and that of c. Without training d is k, the expectation.
    peephole : bool
        Whether the gates see the cell through diagonal weights (Gers & Schmidhuber 2000):
        `i = s(a + u + p_i * c_{t-1})`, `f = s(a + u + p_f * c_{t-1})`, `o = s(a + u + p_o * c_t)`,
        with a parameter `weight_peephole_l0` `[3H]` of p_i, p_f, p_o; `[2H]` of p_f, p_o if
        coupled. In zoneout c_t is the one that is computed.
    coupled : bool
        Whether `i = 1 - f`, so that the gates are f, g, o (CIFG in Greff et al. 2017).
    layer_norm : bool
        Whether both products, and the c_t inside the tanh, are normalised (Ba et al. 2016):
        `a = g_ih*N(W_ih x_t) + b_ih`, `u = g_hh*N(W_hh h_{t-1}) + b_hh`,
        `h_t = o*tanh(g_c*N(c_t) + b_c)`, with `N(v) = (v - mean(v)) / sqrt(var(v) + 1e-5)` over all
        gates, or cells, of a row and the variance of a population. There are `weight_ln_ih_l0` and
        `weight_ln_hh_l0` `[4H]`, `weight_ln_c_l0` `[H]`, all ones at first, and `bias_ln_c_l0`
        `[H]` if there are biases, which all start at zero. In zoneout c_t is the one that is
        computed. A tape has 9H + 4 values a step and row, 7H + 4 if coupled, in the place of 5H
        and 4H, always float32 or float64.
    tape : {"float32", "bfloat16"}, optional
        The dtype of what training keeps of each step beside x and y, by default that of the layer.
        In bfloat16, not for float64 layers, it takes half of the memory: the results stay the same
        to the bit, the gradient is that of gates and cells with 8 bits of precision.
    precision : {"highest", "high", "medium"}, optional
        Of the matrix products, see `set_float32_matmul_precision`; by default what that says when
        a call begins, and `"medium"` in bfloat16. Products of float64 have one precision.
    seed : int, optional
        Of the initial parameters, and of what training draws; a new one each time by default.
    init : {"uniform", "orthogonal"}
        PyTorch's default, or orthogonal recurrent matrices (Saxe et al. 2014).
    forget_bias : float, optional
        Initial bias of the forget gate, in `bias_ih`, with zero in `bias_hh`; 1 is usual
        (Jozefowicz et al. 2015). By default it is drawn as the others are.
    chrono : float, optional
        In place of `forget_bias`: the longest memory that is expected, in steps, above 2. The
        biases start so that the units spread over all spans up to it (Tallec & Ollivier 2018).

    Raises
    ------
    ValueError
        A size is not positive, sizes overflow, a choice is unknown, a probability is out of range,
        or `forget_bias` or `chrono` has no bias to set, or both are given.
    TypeError
        A size is no integer, or a switch no bool.
    MemoryError
        The machine cannot hold the parameters.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbptt as fb
    >>> layer = fb.LSTM(3, 4, num_layers=2, forget_bias=1.0, seed=0)
    >>> y, (h, c) = layer(np.ones((10, 2, 3), np.float32))
    >>> y.shape, h.shape, c.shape
    ((10, 2, 4), (2, 2, 4), (2, 2, 4))
    >>> layer.weights["bias_ih_l1"][4:8].tolist()
    [1.0, 1.0, 1.0, 1.0]
    >>> y, (h, c) = fb.LSTM(3, 4, proj_size=2)(np.ones((10, 2, 3), np.float32))
    >>> y.shape, h.shape, c.shape
    ((10, 2, 2), (1, 2, 2), (1, 2, 4))
    """

    kind = "LSTM"
    _has_cells = True
    coupled: bool

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        proj_size: int = 0,
        bias: bool = True,
        batch_first: bool = False,
        dtype: DTypeLike = "float32",
        dropout: float = 0.0,
        bidirectional: bool = False,
        learn_initial_state: bool = False,
        recurrent_dropout: float = 0.0,
        zoneout: float | tuple[float, float] = 0.0,
        peephole: bool = False,
        coupled: bool = False,
        layer_norm: bool = False,
        tape: str | None = None,
        precision: str | None = None,
        seed: Any = None,
        init: str = "uniform",
        forget_bias: float | None = None,
        chrono: float | None = None,
    ) -> None:
        self._configure(
            input_size=input_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            proj_size=proj_size,
            bias=bias,
            batch_first=batch_first,
            dtype=dtype,
            dropout=dropout,
            bidirectional=bidirectional,
            learn_initial_state=learn_initial_state,
            recurrent_dropout=recurrent_dropout,
            zoneout=zoneout,
            precision=precision,
            peephole=peephole,
            coupled=coupled,
            layer_norm=layer_norm,
            tape=tape,
        )
        self._initialise(init, seed, forget_bias=forget_bias, chrono=chrono)

    def _configure(
        self,
        *,
        peephole: bool = False,
        coupled: bool = False,
        tape: str | None = None,
        **settings: Any,
    ) -> None:
        self.peephole = as_bool("peephole", peephole)
        self.coupled = as_bool("coupled", coupled)
        self._gates, self._keep_gate = (3, 0) if self.coupled else (4, 1)
        self._set_sizes(**settings)
        self.tape = self._as_tape(tape)

    def _settings(self) -> dict[str, Any]:
        own = ("proj_size", "peephole", "coupled", "layer_norm")
        settings = {**super()._settings(), **{name: getattr(self, name) for name in own}}
        return {**settings, "tape": self._other_tape()}

    def _cell(self) -> str:
        return "lstm_coupled" if self.coupled else "lstm"

    def _arguments(self) -> list[str]:
        more = [f"proj_size={self.proj_size}"] if self.proj_size else []
        more += [f"{name}=True" for name in ("peephole", "coupled") if getattr(self, name)]
        return super()._arguments() + more

    def _as_state(self, name: str, state: Any, dtype: np.dtype[Any] | None = None) -> Any:
        if (type(state) is tuple or type(state) is list) and len(state) == 2:
            h, c = state
            if type(h) is ndarray and type(c) is ndarray:
                return state
            return (
                as_array(f"{name}[0]", h, dtype or self.dtype),
                as_array(f"{name}[1]", c, self.compute_dtype),
            )
        return state  # the core says what is wanted


class GRU(Recurrent[Array]):
    """Gated recurrent unit (Cho et al. 2014).

    With `a = W_ih x_t + b_ih`, `u = W_hh h_{t-1} + b_hh` and the logistic function s:
    `r, z = s(a + u)`, `n = tanh(a_n + r*u_n)`, `h_t = (1 - z)*n + z*h_{t-1}`;
    the gates are stacked along the rows of the parameters in the order r, z, n.

    Parameters
    ----------
    input_size, hidden_size : int
        I and H.
    num_layers : int
        L; each layer but the first takes the output of the one below.
    reset_after : bool
        Whether r acts on the product, as above and as in PyTorch and cuDNN, or before it, as in the
        first paper: `n = tanh(a_n + W_hn (r*h_{t-1}) + b_hn)`.
    bias : bool
        Whether there are `b_ih` and `b_hh`.
    batch_first : bool
        Whether x and y have the batch before time: `[B, T, .]`. States stay `[L*D, B, H]`.
    dtype : {"float32", "float64", "bfloat16"}
        Of parameters, inputs and results. In bfloat16, which needs `fastbptt[bfloat16]`, all
        arithmetic and all gradients, and c, are float32; h is rounded at each step.
    dropout : float
        The part p, from 0 to 1, of the output of every layer but the last that training drops:
        `y * m / (1 - p)` with m 1 or 0 (Srivastava et al. 2014; between layers Zaremba et al.
        2014). `forward` and `value_and_grad` train, the call of the layer does not.
    bidirectional : bool
        Whether each layer has a second set of parameters, `weight_ih_l0_reverse` and so on, that
        runs from the last step to the first (Schuster & Paliwal 1997). Both outputs stand side by
        side in y, `[T, B, 2H]`, and are what the next layer takes; states are `[2L, B, H]`, each
        layer's forward one first. A row with a length begins its way back at its own last step.
    learn_initial_state : bool
        Whether the state to start from, where none is given, is learned (Forcada & Carrasco 1995):
        parameters `h0_l0` `[H]` of each layer and direction, zeros at first.
    recurrent_dropout : float
        The part p of h_{t-1}, from 0 to 1, that training drops before every product with W_hh:
        `W_hh (m * h_{t-1} / (1 - p))`, with one m of ones and zeros for all of time, drawn anew
        for each row and layer (Gal & Ghahramani 2016).
    zoneout : float
        The probability k that a unit keeps its value for a step of training:
        `h_t = d * h_{t-1} + (1 - d) * h~_t`, d one with probability k and else zero, h~ what the
        layer computes (Krueger et al. 2017). Without training d is k, the expectation.
    layer_norm : bool
        Whether both products are normalised (Ba et al. 2016): `a = g_ih*N(W_ih x_t) + b_ih`,
        `u = g_hh*N(W_hh h_{t-1}) + b_hh`, with `N(v) = (v - mean(v)) / sqrt(var(v) + 1e-5)`, the
        variance that of a population. As in the paper a row's 2H values of r and z are normalised
        together and the H of n by themselves (some libraries take all 3H together). There are
        `weight_ln_ih_l0` and `weight_ln_hh_l0` `[3H]`, ones at first; biases start at zero. It goes
        with `reset_after=True` alone, for which the paper states it. A tape has 6H + 4 values a
        step and row in the place of 4H, always float32 or float64.
    tape : {"float32", "bfloat16"}, optional
        The dtype of what training keeps of each step beside x and y, by default that of the layer.
        In bfloat16, not for float64 layers, it takes half of the memory: the results stay the same
        to the bit, the gradient is that of gates with 8 bits of precision.
    precision : {"highest", "high", "medium"}, optional
        Of the matrix products, see `set_float32_matmul_precision`; by default what that says when
        a call begins, and `"medium"` in bfloat16. Products of float64 have one precision.
    seed : int, optional
        Of the initial parameters, and of what training draws; a new one each time by default.
    init : {"uniform", "orthogonal"}
        PyTorch's default, or orthogonal recurrent matrices (Saxe et al. 2014).
    chrono : float, optional
        The longest memory that is expected, in steps, above 2: the biases start so that the units
        spread over all spans up to it (Tallec & Ollivier 2018). By default they are drawn.

    Raises
    ------
    ValueError
        A size is not positive, sizes overflow, a choice is unknown, a probability is out of range,
        `chrono` has no bias to set, or `layer_norm` comes with `reset_after=False`.
    TypeError
        A size is no integer, or a switch no bool.
    MemoryError
        The machine cannot hold the parameters.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbptt as fb
    >>> layer = fb.GRU(3, 4, batch_first=True, seed=0)
    >>> layer
    GRU(3, 4, batch_first=True)
    >>> y, h = layer(np.ones((2, 10, 3), np.float32))
    >>> y.shape, h.shape
    ((2, 10, 4), (1, 2, 4))
    """

    kind = "GRU"
    reset_after: bool
    _gates = 3

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        reset_after: bool = True,
        bias: bool = True,
        batch_first: bool = False,
        dtype: DTypeLike = "float32",
        dropout: float = 0.0,
        bidirectional: bool = False,
        learn_initial_state: bool = False,
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
        layer_norm: bool = False,
        tape: str | None = None,
        precision: str | None = None,
        seed: Any = None,
        init: str = "uniform",
        chrono: float | None = None,
    ) -> None:
        self._configure(
            input_size=input_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            reset_after=reset_after,
            bias=bias,
            batch_first=batch_first,
            dtype=dtype,
            dropout=dropout,
            bidirectional=bidirectional,
            learn_initial_state=learn_initial_state,
            recurrent_dropout=recurrent_dropout,
            zoneout=zoneout,
            layer_norm=layer_norm,
            tape=tape,
            precision=precision,
        )
        self._initialise(init, seed, chrono=chrono)

    def _configure(self, *, reset_after: bool, tape: str | None = None, **settings: Any) -> None:
        self.reset_after = as_bool("reset_after", reset_after)
        self._set_sizes(**settings)
        self.tape = self._as_tape(tape)
        if self.layer_norm and not self.reset_after:
            raise ValueError("layer_norm: got True beside reset_after=False, wanted one of them")

    def _settings(self) -> dict[str, Any]:
        own = {"reset_after": self.reset_after, "layer_norm": self.layer_norm}
        return {**super()._settings(), **own, "tape": self._other_tape()}

    def _cell(self) -> str:
        return "gru" if self.reset_after else "gru_reset_before"

    def _arguments(self) -> list[str]:
        return super()._arguments() + ([] if self.reset_after else ["reset_after=False"])
