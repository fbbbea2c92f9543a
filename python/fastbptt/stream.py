"""Streams: a model that learns from each step as it arrives."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy import ndarray
from numpy.typing import ArrayLike

from fastbptt import _core, storage
from fastbptt._arrays import Array, as_array, as_finite, as_size, from_any
from fastbptt.losses import Loss, as_pair
from fastbptt.model import Model
from fastbptt.online import UORO, Rule, check_rule, config_of, steps_of
from fastbptt.optimizers import Optimizer, clip_grad_norm
from fastbptt.schedules import Truncated

_INT64 = np.dtype(np.int64)
_MOST = 1 << 62


class Pushed(NamedTuple):
    """What `Stream.push` returns.

    Attributes
    ----------
    prediction : ndarray
        What the model said of each step before it learned from it: `[B, N]` of a step, `[n, B, N]`
        of a block (`[B, n, N]` with `batch_first`).
    loss : float
        Of these predictions: the mean over the targets that count, 0 if none does; of a callable
        loss the sum over the steps.
    """

    prediction: Array
    loss: float


class Stream:
    """B parallel streams that a model predicts and learns from, a step at a time.

    The memory, and the time of a step, do not depend on how many steps there were. Only the order
    of the calls matters: `push` takes the next step of all streams, and updates the parameters when
    `rule` says.

    Parameters
    ----------
    model : Model
        What learns. Its parameters are updated in place.
    loss : {"cross_entropy", "mse"} or callable
        As for `value_and_grad`. A callable gets one step at a time: `loss(output, target, steps)`
        with output `[1, B, N]` returns a number and the gradient with respect to output.
    rule : Truncated, RTRL, SnAp1, EProp or UORO
        How the error of a step reaches the steps before it, and how often there is an update.
        `Truncated(1, 1)` is the error of the same step alone.
    optimizer : Adam, SGD or RMSprop, optional
        Over `model.parameters()`, or some of them. An update is one step of it, with the mean of
        the gradients of the targets that counted since the last one (for a callable loss with the
        sum of what it returned). None: the parameters stay, and the gradients add up in `grads`.
    batch_size : int, optional
        B; by default that of the first push.
    ignore_index : int
        The class of a target that does not count, for "cross_entropy".
    max_norm : float, optional
        The norm to which the gradient of an update is clipped.

    Attributes
    ----------
    model, loss, rule, optimizer
        As given.
    steps, updates : int
        How many there were.

    Raises
    ------
    ValueError
        The loss is unknown, a number out of range, or the rule cannot run through the model.
    TypeError
        Something is not what it should be at all.

    Examples
    --------
    A sum of the last two inputs, learned as they come:

    >>> import numpy as np
    >>> import fastbptt as fb
    >>> model = fb.Model(fb.LSTM(1, 16, seed=0), fb.Linear(16, 1, seed=1))
    >>> optimizer = fb.Adam(model.parameters(), lr=0.01)
    >>> stream = fb.Stream(model, "mse", fb.Truncated(1, 4), optimizer, batch_size=1)
    >>> x = np.random.default_rng(0).uniform(-1, 1, (1000, 1, 1)).astype(np.float32)
    >>> losses = [stream.push(x[t], x[t] + x[t - 1]).loss for t in range(1, 1000)]
    >>> bool(np.mean(losses[-100:]) < 0.1 * np.mean(losses[:100]))
    True
    """

    def __init__(
        self,
        model: Model,
        loss: Loss,
        rule: Rule,
        optimizer: Optimizer | None = None,
        *,
        batch_size: int | None = None,
        ignore_index: int = -100,
        max_norm: float | None = None,
    ) -> None:
        if not isinstance(model, Model):
            raise TypeError(f"model: got {type(model).__name__}, wanted a Model")
        if isinstance(loss, str):
            if loss not in ("cross_entropy", "mse"):
                raise ValueError(f"loss: got {loss!r}, wanted 'cross_entropy', 'mse' or a callable")
        elif not callable(loss):
            raise TypeError(
                f"loss: got {type(loss).__name__}, wanted 'cross_entropy', 'mse' or a callable"
            )
        check_rule(rule, model)
        self.model = model
        self.loss = loss
        self.rule = rule
        self.optimizer = optimizer
        self.steps = 0
        self.updates = 0
        self._parameters = model.parameters()
        self._check_optimizer()
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, (int, np.integer)):
            raise TypeError(f"ignore_index: got {ignore_index!r}, wanted an integer")
        self._ignore_index = int(ignore_index)
        self._max_norm = None if max_norm is None else as_finite("max_norm", max_norm)
        if self._max_norm is not None and self._max_norm <= 0:
            raise ValueError(f"max_norm: got {max_norm}, wanted more than 0")
        self._every = steps_of(rule)
        # Only the window of Truncated has to be looked at when it is full.
        self._lazy = optimizer is None and not isinstance(rule, Truncated)
        self._since = 0  # steps since the last update
        self._pending = 0  # targets that counted in them
        self._count = 0  # targets whose gradients are in _grads
        self._grads = {name: np.zeros_like(p) for name, p in self._parameters.items()}
        self._grad_list = list(self._grads.values())
        self._lock: threading.Lock | _InLoss = threading.Lock()
        self._batch_size = None
        self._core: _core.Stream | None = None
        if batch_size is not None:
            self._batch_size = as_size("batch_size", batch_size)
            self._core = self._new_core(self._batch_size)

    def _check_optimizer(self) -> None:
        if self.optimizer is None:
            return
        if not isinstance(self.optimizer, Optimizer):
            kind = type(self.optimizer).__name__
            raise TypeError(f"optimizer: got {kind}, wanted Adam, SGD, RMSprop or None")
        for name, array in self.optimizer._parameters.items():
            if self._parameters.get(name) is not array:
                raise ValueError(
                    f"optimizer: got one that updates {name!r}, no parameter of model; wanted one "
                    "over model.parameters()"
                )

    @property
    def batch_size(self) -> int | None:
        """The number of streams, B; None before the first push."""
        return self._batch_size

    def push(
        self,
        x: ArrayLike | None,
        target: Any = None,
        *,
        x_mask: ArrayLike | None = None,
        target_mask: ArrayLike | None = None,
    ) -> Pushed:
        """Take a step, or a block of steps one after another, and learn from it.

        All arguments are checked before the first step; if they are refused, nothing has changed.

        Parameters
        ----------
        x : array_like or None
            One step of all streams, `[B, I]`, or class numbers `[B]` for a model with an embedding;
            or a block of n of them, `[n, B, I]` or `[n, B]` (`[B, n, .]` with `batch_first`). None:
            no input, the state carries over to the next step.
        target : array_like, optional
            What the prediction is compared with: class numbers `[B]` for "cross_entropy", `[B, N]`
            for "mse"; for a block with n as in x. For a callable loss what it takes, with n in
            front for a block. None: nothing is learned from the error of this step.
        x_mask : array_like of bool, optional
            `[B]`, for a block with n: False where a stream has no input, and its state carries
            over; what x holds there is not looked at.
        target_mask : array_like of bool, optional
            Of the same shape: False where a stream has no target.

        Returns
        -------
        Pushed
            `prediction` and `loss`: the mean over the targets that count, for a callable loss the
            sum of what it returned over the steps of the block.

        Raises
        ------
        ValueError
            A shape, a class or the number of streams is wrong, or a number is NaN or infinite.
        TypeError
            A dtype is wrong, or something that is no array.
        KeyboardInterrupt
            In the middle of a block; the steps before it are learned and counted in `steps`.

        Examples
        --------
        >>> import numpy as np
        >>> import fastbptt as fb
        >>> model = fb.Model(fb.Embedding(5, 4, seed=0), fb.GRU(4, 8, seed=1), fb.Linear(8, 5))
        >>> stream = fb.Stream(model, "cross_entropy", fb.SnAp1(), fb.Adam(model.parameters()))
        >>> stream.push([0, 1], [1, 2]).prediction.shape
        (2, 5)
        >>> stream.push(None, [3, 3]).prediction.shape  # no input in this step
        (2, 5)
        >>> stream.push([2, 0], [3, 1], target_mask=[True, False]).prediction.shape
        (2, 5)
        """
        with self._lock:
            single, core, block, n = self._open(x, target, x_mask, target_mask)
            total, count, begin = 0.0, 0, 0
            ended = None
            while begin < n and ended is None:
                end = min(n, begin + self._every - self._since)
                if isinstance(self.loss, str):
                    value, counted, taken, ended = core.push(block, begin, end)
                    end = begin + taken
                else:
                    end = begin + 1
                    value, counted = self._push_custom(core, block, target, single, begin)
                total += value
                count += counted
                self._pending += counted
                self._since += end - begin
                self.steps += end - begin
                begin = end
                if self._since == self._every:
                    self._update(core)
            if ended is not None:
                raise ended
            prediction = block.prediction
            if single:
                prediction = prediction[0]
            elif self.model.batch_first:
                prediction = prediction.swapaxes(0, 1)
            if isinstance(self.loss, str) and count:
                total /= count
            return Pushed(prediction, total)

    def predict(self, x: ArrayLike | None, *, x_mask: ArrayLike | None = None) -> Array:
        """Return what `push` would predict of this step, and change nothing.

        Parameters
        ----------
        x, x_mask
            One step, as for `push`.

        Returns
        -------
        ndarray
            `[B, N]`

        Raises
        ------
        ValueError, TypeError
            As for `push`; or x is a block.

        Examples
        --------
        >>> import numpy as np
        >>> import fastbptt as fb
        >>> model = fb.Model(fb.RNN(3, 4), fb.Linear(4, 1))
        >>> stream = fb.Stream(model, "mse", fb.RTRL())
        >>> x = np.ones((2, 3), np.float32)
        >>> bool((stream.predict(x) == stream.push(x).prediction).all())
        True
        """
        with self._lock:
            single, core, block, _ = self._open(x, None, x_mask, None)
            if not single:
                raise ValueError(f"x: got a block of shape {np.shape(x)}, wanted one step")  # type: ignore[arg-type]
            prediction: Array = core.attempt(block, 0)[0]
            return prediction

    def reset(self, rows: ArrayLike | None = None) -> None:
        """Begin streams anew: the state is zero, and no error reaches back beyond this point.

        Parameters
        ----------
        rows : array_like, optional
            Which of them: bool `[B]`, or their numbers; all by default.

        Raises
        ------
        ValueError
            The shape or a number is wrong.
        TypeError
            They are neither bools nor integers.

        Examples
        --------
        >>> import numpy as np
        >>> import fastbptt as fb
        >>> model = fb.Model(fb.RNN(3, 4))
        >>> stream = fb.Stream(model, "mse", fb.Truncated(5))
        >>> x = np.ones((2, 3), np.float32)
        >>> first = stream.push(x).prediction
        >>> stream.reset([1])
        >>> second = stream.push(x).prediction
        >>> (second == first).all(axis=1).tolist()
        [False, True]
        """
        with self._lock:
            if self._core is None or self._batch_size is None:
                if rows is None:
                    return
                raise ValueError("rows: got some before the first push, wanted batch_size given")
            marks = np.zeros(self._batch_size, np.uint8)
            if rows is None:
                marks[:] = 1
            else:
                chosen = from_any("rows", rows)
                if chosen.dtype == np.bool_:
                    if chosen.shape != marks.shape:
                        raise ValueError(f"rows: got shape {chosen.shape}, wanted {marks.shape}")
                elif chosen.size and chosen.dtype.kind not in "iu":
                    raise TypeError(f"rows: got {chosen.dtype}, wanted bools or integers")
                elif chosen.size and (chosen.min() < 0 or chosen.max() >= len(marks)):
                    raise ValueError(
                        f"rows: got {chosen.tolist()}, wanted from 0 to {len(marks) - 1}"
                    )
                else:
                    chosen = chosen.astype(np.intp)
                marks[chosen] = 1
            self._core.reset(marks)

    def flush(self) -> None:
        """Update now, with the steps since the last update, though the rule's are not complete.

        Examples
        --------
        >>> import numpy as np
        >>> import fastbptt as fb
        >>> model = fb.Model(fb.RNN(3, 4))
        >>> stream = fb.Stream(model, "mse", fb.Truncated(5), fb.SGD(model.parameters()))
        >>> pushed = stream.push(np.ones((2, 3), np.float32), np.ones((2, 4), np.float32))
        >>> stream.updates
        0
        >>> stream.flush()
        >>> stream.updates
        1
        """
        with self._lock:
            if self._core is not None:
                self._update(self._core)

    @property
    def grads(self) -> dict[str, Array]:
        """The gradients, under the names of `model.parameters()`.

        Without an optimizer the sum over all targets that counted since the beginning or the last
        `zero_grad`, `count` of them, as far as the rule took them; with one what the last update
        used.
        """
        with self._lock:
            if self._lazy and self._core is not None:
                self._collect(self._core)
            return dict(self._grads)

    @property
    def count(self) -> int:
        """How many targets `grads` is the sum, or the mean, of: classes, or numbers for "mse".

        So without an optimizer `grads[name] / count` is the gradient of the mean loss. For a
        callable loss how often it was called.
        """
        return self._count + (self._pending if self._lazy else 0)

    def zero_grad(self) -> None:
        """Let `grads` begin at zero again."""
        with self._lock:
            if self._lazy and self._core is not None:
                self._collect(self._core)
            self._clear()

    def state_dict(self) -> dict[str, Any]:
        """Return copies of all that the stream, its model and its optimizer go on from.

        Returns
        -------
        dict
            For `load_state_dict`: `config`, `parameters`, `optimizer`, `stream`, `grads`.

        Examples
        --------
        >>> import numpy as np
        >>> import fastbptt as fb
        >>> def new_stream():
        ...     model = fb.Model(fb.GRU(3, 4))
        ...     return fb.Stream(model, "mse", fb.SnAp1(), fb.Adam(model.parameters()))
        >>> first, second = new_stream(), new_stream()
        >>> x, target = np.ones((2, 3), np.float32), np.ones((2, 4), np.float32)
        >>> _ = first.push(x, target)
        >>> second.load_state_dict(first.state_dict())
        >>> first.push(x, target).loss == second.push(x, target).loss
        True
        """
        with self._lock:
            optimizer = self.optimizer
            return {
                "config": self._config(),
                "parameters": {name: p.copy() for name, p in self._parameters.items()},
                "optimizer": None if optimizer is None else optimizer.state_dict(),
                "stream": {} if self._core is None else self._core.state(),
                "grads": {name: grad.copy() for name, grad in self._grads.items()},
            }

    def __getstate__(self) -> Any:
        raise TypeError("a Stream cannot be copied or pickled; wanted state_dict() or save()")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, bit for bit; all is checked first.

        Parameters
        ----------
        state : mapping
            Of a stream with the same kind of model, loss, rule and optimizer. The learning rate
            comes from there.

        Raises
        ------
        ValueError
            It is of another stream, or something in it is missing or wrong; nothing has changed.
        TypeError
            It is no mapping, or something in it has the wrong type.

        Examples
        --------
        >>> import fastbptt as fb
        >>> stream = fb.Stream(fb.Model(fb.GRU(3, 4)), "mse", fb.RTRL(), batch_size=2)
        >>> other = fb.Stream(fb.Model(fb.GRU(3, 4)), "mse", fb.RTRL())
        >>> other.load_state_dict(stream.state_dict())
        >>> other.batch_size
        2
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state: got {type(state).__name__}, wanted a mapping")
        missing = [name for name in _STATE if name not in state]
        if missing:
            raise ValueError(f"state: {', '.join(map(repr, missing))} missing")
        with self._lock:
            self._load(state)

    def save(self, path: storage.FilePath) -> None:
        """Write all that the stream goes on from to a file, which `fb.load` reads the model of.

        The file takes the place of an older one when it is complete, so whenever the process is
        killed, there is a complete one.

        Parameters
        ----------
        path : str or path-like
            The file; `.safetensors` is the usual ending.

        Raises
        ------
        OSError
            The file cannot be written.

        Examples
        --------
        >>> import tempfile
        >>> import fastbptt as fb
        >>> model = fb.Model(fb.GRU(3, 4))
        >>> stream = fb.Stream(model, "mse", fb.RTRL(), fb.SGD(model.parameters()), batch_size=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     stream.save(f"{folder}/stream.safetensors")
        ...     stream.load(f"{folder}/stream.safetensors")
        ...     fb.load(f"{folder}/stream.safetensors")
        Model(GRU(3, 4))
        """
        with self._lock:
            extra: dict[str, Any] = {"stream": self._config()}
            state = {} if self._core is None else self._core.state()
            extra |= {f"stream.{name}": array for name, array in state.items()}
            extra |= {f"grads.{name}": grad for name, grad in self._grads.items()}
            storage.save(path, self.model, self.optimizer, extra)

    def load(self, path: storage.FilePath) -> None:
        """Go on from a file that `save` wrote, bit for bit; all is checked first.

        Parameters
        ----------
        path : str or path-like
            The file, of a stream with the same kind of model, loss, rule and optimizer.

        Raises
        ------
        ValueError
            The file is damaged or of something else; nothing has changed.
        OSError
            There is no such file (`FileNotFoundError`), or it cannot be read.
        """
        model, optimizer, extra = storage.load_training(path)
        if "stream" not in extra:
            raise ValueError(f"path: {path!r} has a model and no stream, wanted what save wrote")

        def part(prefix: str) -> dict[str, Any]:
            return {k[len(prefix) :]: v for k, v in extra.items() if k.startswith(prefix)}

        state = {
            "config": extra["stream"],
            "parameters": model.parameters(),
            "optimizer": None if optimizer is None else optimizer.state_dict(),
            "stream": part("stream."),
            "grads": part("grads."),
        }
        try:
            self.load_state_dict(state)
        except (ValueError, TypeError) as error:
            raise ValueError(f"path: {path!r}: {error}") from error

    def __repr__(self) -> str:
        return f"Stream({self.model!r}, {self.loss!r}, {self.rule!r}, {self.optimizer!r})"

    def _open(
        self, x: Any, target: Any, x_mask: Any, target_mask: Any
    ) -> tuple[bool, _core.Stream, _core.Block, int]:
        """Check a push; return whether it is a single step, and its steps."""
        model = self.model
        axes = 2 if model.embedding is None else 1
        named = isinstance(self.loss, str)
        if x is not None and type(x) is not ndarray:
            x = as_array("x", x, model.dtype if model.embedding is None else _INT64)
        if named and target is not None:
            target, target_axes = self._as_target(target)
        else:
            target_axes = 1
            if not named and target_mask is not None:
                raise TypeError("target_mask: got one beside a callable loss, wanted None")
        if x is not None:
            single = x.ndim == axes
            if not single and x.ndim != axes + 1:
                raise ValueError(f"x: got shape {x.shape}, wanted {self._wanted(axes)}")
        else:
            single = not (named and target is not None) or target.ndim == target_axes
        if model.embedding is not None and x is not None and x.dtype != _INT64:
            x = _as_classes("x", x)
        if single:
            n = 1
            x = None if x is None else x[None]
            target = target[None] if named and target is not None else target
        else:
            if model.batch_first:
                x = None if x is None else x.swapaxes(0, 1)
                if named and target is not None and target.ndim > 1:
                    target = target.swapaxes(0, 1)
            n = len(x if x is not None else target)
        B = self._batch_size
        core = self._core
        if core is None or B is None:
            leading = x if x is not None else target if named else None
            if leading is None:
                raise ValueError("x: got None in the first push, wanted batch_size given")
            B = leading.shape[1] if leading.ndim > 1 else 0
            if B < 1:
                raise ValueError(f"x: got shape {leading.shape}, wanted at least one stream")
            core = self._new_core(B)
        if not named and not single and target is not None and len(target) != n:
            raise ValueError(f"target: got {len(target)} steps, wanted {n}")
        block = core.open(
            n,
            x,
            None if x_mask is None else self._as_mask("x_mask", x_mask, single),
            target if named else None,
            None if target_mask is None else self._as_mask("target_mask", target_mask, single),
            self._ignore_index,
        )
        self._core, self._batch_size = core, B
        return single, core, block, n

    def _wanted(self, axes: int) -> str:
        size = "" if axes == 1 else f", {self.model.recurrent.input_size}"
        block = "B, n" if self.model.batch_first else "n, B"
        return f"[B{size}], or a block [{block}{size}]"

    def _as_target(self, target: Any) -> tuple[Array, int]:
        if self.loss == "mse":
            axes = 2
            if type(target) is not ndarray:
                target = as_array("target", target, self.model.dtype)
        else:
            axes = 1
            if type(target) is not ndarray:
                target = from_any("target", target)
            if target.dtype != _INT64:
                target = _as_classes("target", target)
        if target.ndim not in (axes, axes + 1):
            raise ValueError(
                f"target: got shape {target.shape}, wanted {axes} axes, or {axes + 1} for a block"
            )
        return target, axes

    def _as_mask(self, name: str, mask: Any, single: bool) -> Array:
        array = from_any(name, mask)
        if array.dtype != np.bool_:
            raise TypeError(f"{name}: got {array.dtype}, wanted bools")
        if single:
            array = array[None]
        elif self.model.batch_first and array.ndim == 2:
            array = array.swapaxes(0, 1)
        return np.ascontiguousarray(array).view(np.uint8)

    def _new_core(self, B: int) -> _core.Stream:
        model, rule = self.model, self.rule
        layer, readout = model.recurrent, model.readout
        weights = layer.weights
        # No memory holds so many, and the integers of the core end soon behind.
        k1, k2 = (rule.k1, rule.k2) if isinstance(rule, Truncated) else (1, 1)
        k1, k2 = min(k1, _MOST), min(k2, _MOST)
        return _core.Stream(
            layer._cell(),
            layer.input_size,
            layer.hidden_size,
            layer.num_layers,
            layer.dtype.name,
            min(B, _MOST),
            type(rule).__name__,
            k1,
            k2,
            rule.seed if isinstance(rule, UORO) else 0,
            self.loss if isinstance(self.loss, str) else "",
            [
                weights.get(f"{kind}_l{number}")
                for number in range(layer.num_layers)
                for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            ],
            None if model.embedding is None else model.embedding.weights["weight"],
            None if readout is None else readout.weights["weight"],
            None if readout is None else readout.weights.get("bias"),
        )

    def _push_custom(
        self, core: _core.Stream, block: _core.Block, target: Any, single: bool, t: int
    ) -> tuple[float, int]:
        output = core.attempt(block, t)[t : t + 1]
        if target is None:
            core.keep(None)
            return 0.0, 0
        assert not isinstance(self.loss, str)
        if not hasattr(target, "shape"):
            target = from_any("target", target)
        if single:
            part = target[None]
        elif self.model.batch_first:
            part = target[:, t : t + 1].swapaxes(0, 1)
        else:
            part = target[t : t + 1]
        output = output.view()
        output.flags.writeable = False  # it is what the push returns
        free, self._lock = self._lock, _InLoss(self._lock)
        try:
            value, grad = as_pair(self.loss(output, part, slice(self.steps, self.steps + 1)))
        finally:
            self._lock = free
        core.keep(as_array("grad_output of loss", grad, self.model.dtype))
        return value, 1

    def _collect(self, core: _core.Stream) -> None:
        """Move what the core has gathered into `_grads`."""
        core.gather(self._grad_list)
        self._count += self._pending
        self._since = self._pending = 0

    def _clear(self) -> None:
        for grad in self._grad_list:
            grad.fill(0)
        self._count = 0

    def _update(self, core: _core.Stream) -> None:
        if self._lazy:
            self._since = 0
            return
        if self.optimizer is None:
            self._collect(core)
            return
        if self._pending:
            self._clear()
        self._collect(core)
        if not self._count:
            return
        if isinstance(self.loss, str):
            for grad in self._grad_list:
                grad *= 1.0 / self._count
        if self._max_norm is not None:
            clip_grad_norm(self._grads, self._max_norm)
        wanted = self.optimizer._parameters
        self.optimizer.step({name: self._grads[name] for name in wanted})
        self.updates += 1

    def _config(self) -> dict[str, Any]:
        optimizer = self.optimizer
        return {
            "model": self.model.config(),
            "rule": config_of(self.rule),
            "loss": self.loss if isinstance(self.loss, str) else None,
            "optimizer": None
            if optimizer is None
            else {"type": type(optimizer).__name__, **optimizer.config()},
            "batch_size": self._batch_size,
            "counters": {name: getattr(self, name) for name in _COUNTERS},
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        theirs, ours = state["config"], self._config()
        if not isinstance(theirs, Mapping) or set(theirs) != set(ours):
            raise ValueError("state['config']: wanted what state_dict returned")
        for name in ("model", "rule", "loss", "optimizer"):
            got, wanted = _without_lr(theirs[name]), _without_lr(ours[name])
            if got != wanted:
                raise ValueError(f"state: got a stream with {name} {got}, wanted {wanted}")
        B = theirs["batch_size"]
        if self._batch_size not in (None, B):
            raise ValueError(f"state: got {B} streams, wanted {self._batch_size}")
        for name, part in (("config']['counters", theirs["counters"]), ("grads", state["grads"])):
            if not isinstance(part, Mapping):
                raise TypeError(f"state['{name}']: got {type(part).__name__}, wanted a mapping")
        counters = {
            name: as_size(f"state['config']['counters'][{name!r}]", theirs["counters"].get(name), 0)
            for name in _COUNTERS
        }
        if counters["_since"] > self._every:
            raise ValueError(
                f"state['config']['counters']['_since']: got {counters['_since']}, wanted at most "
                f"{self._every}, the steps from one update to the next"
            )
        core = None if B is None else self._new_core(as_size("batch_size", B))
        if core is not None:
            stream = state["stream"]
            if not isinstance(stream, Mapping):
                raise TypeError(f"state['stream']: got {type(stream).__name__}, wanted a mapping")
            core.set_state(dict(stream))
        grads = state["grads"]
        for name, grad in self._grads.items():
            got = grads.get(name)
            if not isinstance(got, ndarray) or got.shape != grad.shape or got.dtype != grad.dtype:
                raise ValueError(f"state['grads'][{name!r}]: wanted {grad.dtype} {grad.shape}")
        before = {name: p.copy() for name, p in self._parameters.items()}
        optimizer = self.optimizer
        lr = None if optimizer is None else optimizer.lr
        try:
            self.model.load_state_dict(state["parameters"])
            if optimizer is not None:
                optimizer.lr = theirs["optimizer"].get("lr")
                optimizer.load_state_dict(state["optimizer"])
        except BaseException:
            self.model.load_state_dict(before)
            if optimizer is not None and lr is not None:
                optimizer.lr = lr
            raise
        for name, grad in self._grads.items():
            np.copyto(grad, grads[name])
        self._core, self._batch_size = core, B
        for name, value in counters.items():
            setattr(self, name, value)


class _InLoss:
    """A lock that is held while a loss runs: who waits for it there would wait for ever."""

    def __init__(self, lock: threading.Lock | _InLoss) -> None:
        self._lock = lock
        self._thread = threading.get_ident()

    def __enter__(self) -> None:
        if threading.get_ident() == self._thread:
            raise RuntimeError("a loss was about to use the stream that is calling it")
        self._lock.__enter__()

    def __exit__(self, *error: object) -> None:
        self._lock.__exit__(None, None, None)


_STATE = ("config", "parameters", "optimizer", "stream", "grads")
_COUNTERS = ("steps", "updates", "_since", "_pending", "_count")


def _without_lr(config: Any) -> Any:
    if isinstance(config, Mapping) and "lr" in config:
        return {name: value for name, value in config.items() if name != "lr"}
    return config


def _as_classes(name: str, array: Array) -> Array:
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name}: got {array.dtype}, wanted class numbers, integers")
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name}: got {array.max()}, wanted class numbers")
    return array.astype(np.int64)
