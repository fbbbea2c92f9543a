"""Optimisers, and clipping of gradients, by the formulas of PyTorch.

A step goes through the parameters in blocks that stay in the cache, with scratch memory for one
block, so it makes no temporary arrays of the size of a parameter. Small parameters share a block:
for them the calls of NumPy cost more than the arithmetic.

Of a parameter in bfloat16 an optimiser keeps a copy in float32, which is what a step changes and
whose rounding the parameter becomes (Micikevicius et al. 2018): most steps are too small for
bfloat16, and would be lost one by one.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from fastbptt._arrays import Array, as_bool, as_finite, compute_dtype
from fastbptt._part import listed
from fastbptt._settled import Settled

# Numbers that a step goes through at a time.
_BLOCK = 1 << 15

# Short enough for a BLAS not to wake its threads for the product of two blocks.
_DOT_BLOCK = 1 << 13

# The estimate of the norm is kept from zero by this much, as in PyTorch.
_CLIP_EPS = 1e-6


@dataclass
class _Block:
    """Numbers that are updated together: `[begin, end)` of all parameters of one dtype in a row.

    They are pieces of parameters, each with its name, where it begins in the parameter, and a view
    of it.
    """

    dtype: Any
    begin: int
    end: int
    pieces: list[tuple[str, int, Array]] = field(default_factory=list)

    def gather(self, arrays: Mapping[str, Array] | None, scratch: Array) -> Array:
        """Return the pieces of parameters, or of arrays like them, as one: a view if it is one."""
        parts = [
            view if arrays is None else arrays[name].reshape(-1)[begin : begin + view.size]
            for name, begin, view in self.pieces
        ]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts, out=scratch[: self.end - self.begin])

    def scatter(self, values: Array) -> None:
        """Write what `gather` made of the parameters back to them."""
        if len(self.pieces) == 1:
            return
        begin = 0
        for _, _, view in self.pieces:
            np.copyto(view, values[begin : begin + view.size])
            begin += view.size


class Optimizer(Settled):
    """What all optimisers have in common: parameters, and buffers of their sizes.

    Attributes
    ----------
    lr : float
        The learning rate; it may be set between steps, which the other settings may not.
    """

    _hyperparameters: ClassVar[tuple[str, ...]]

    def _settled(self) -> Container[str]:
        return self._hyperparameters

    def __init__(self, parameters: Mapping[str, Array], lr: float) -> None:
        if not isinstance(parameters, Mapping):
            raise TypeError(
                f"parameters: got {type(parameters).__name__}, wanted a mapping of names to "
                "arrays, such as model.parameters()"
            )
        if not parameters:
            raise ValueError("parameters: got none, wanted at least one")
        for name, array in parameters.items():
            _check_floats(f"parameters[{name!r}]", array, narrow=True)
            if not (array.flags.writeable and array.flags.c_contiguous):
                raise ValueError(
                    f"parameters[{name!r}]: wanted a writable C-contiguous array: it is updated "
                    "in place"
                )
        self.lr = lr
        self._parameters = dict(parameters)
        self._masters = {
            name: array.astype(compute_dtype(array.dtype))
            for name, array in parameters.items()
            if array.dtype != compute_dtype(array.dtype)
        }
        self._arrange()

    def _arrange(self) -> None:
        """Make what consists of views, which no copy of the optimiser may take along."""
        self._updated = self._parameters | self._masters
        self._blocks = list(_divided(self._updated))
        # By kind and dtype, as long as all parameters of the dtype; by kind and name, views of it.
        self._rows: dict[str, dict[Any, Array]] = {}
        self._buffers: dict[str, dict[str, Array]] = {}
        if self._masters:
            self._buffers["master"] = self._masters

    def __getstate__(self) -> dict[str, Any]:
        views = ("_updated", "_blocks", "_rows")
        return {name: value for name, value in self.__dict__.items() if name not in views}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        values = self._buffers
        self._arrange()
        self._add_buffers(*(kind for kind in values if kind not in self._buffers))
        for kind, buffers in self._buffers.items():
            for name, buffer in buffers.items():
                np.copyto(buffer, values[kind][name])

    @property
    def lr(self) -> float:
        """The learning rate."""
        return self._lr

    @lr.setter
    def lr(self, value: float) -> None:
        self._lr = _at_least_zero("lr", value)

    def _add_buffers(self, *kinds: str) -> None:
        places = _places(self._updated)
        sizes = {p.dtype: places[name].stop for name, p in self._updated.items()}
        for kind in kinds:
            self._rows[kind] = rows = {dtype: np.zeros(n, dtype) for dtype, n in sizes.items()}
            self._buffers[kind] = {
                name: rows[p.dtype][places[name]].reshape(p.shape)
                for name, p in self._updated.items()
            }

    def step(self, grads: Mapping[str, Array]) -> None:
        """Update the parameters in place.

        Everything is checked before the first parameter is written.

        Parameters
        ----------
        grads : mapping of str to ndarray
            A gradient for each parameter, under its name, of its shape and dtype, or of float32 for
            bfloat16; not changed.

        Raises
        ------
        ValueError
            A name is missing or unknown, or a shape is wrong.
        TypeError
            A dtype is wrong, or something that is no array.

        Examples
        --------
        >>> import numpy as np
        >>> import fastbptt as fb
        >>> weight = np.array([1.0, 2.0])
        >>> fb.SGD({"weight": weight}, lr=0.5).step({"weight": np.array([1.0, -1.0])})
        >>> weight.tolist()
        [0.5, 2.5]
        """
        checked = _checked("grads", grads, self._updated)
        longest = max((block.end - block.begin for block in self._blocks), default=0)
        scratch = {
            dtype: np.empty((4, longest), dtype) for dtype in {b.dtype for b in self._blocks}
        }
        self._begin()
        self._follow_parameters()
        with np.errstate(all="ignore"):  # what is not finite shows in the next loss
            for block in self._blocks:
                begin, end = block.begin, block.end
                first, second, third, fourth = scratch[block.dtype]
                parameter, grad = block.gather(None, third), block.gather(checked, fourth)
                buffers = [rows[block.dtype][begin:end] for rows in self._rows.values()]
                self._update(parameter, grad, buffers, first[: end - begin], second[: end - begin])
                block.scatter(parameter)
            for parameter, master in self._narrow_pieces():
                parameter[...] = master

    def _follow_parameters(self) -> None:
        """Take over what others have written into narrow parameters since the last step."""
        with np.errstate(all="ignore"):
            for parameter, master in self._narrow_pieces():
                written = parameter != master.astype(parameter.dtype)
                master[written] = parameter[written]

    def _narrow_pieces(self) -> Iterator[tuple[Array, Array]]:
        """Yield the pieces of parameters in bfloat16, and of their copies in float32."""
        for name, master in self._masters.items():
            narrow, wide = self._parameters[name].reshape(-1), master.reshape(-1)
            for begin in range(0, wide.size, _BLOCK):
                yield narrow[begin : begin + _BLOCK], wide[begin : begin + _BLOCK]

    def _begin(self) -> None:
        """Count the step, where that matters."""

    def _update(
        self, parameter: Array, grad: Array, buffers: list[Array], first: Array, second: Array
    ) -> None:
        """Update one block; `first` and `second` are scratch memory."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """Return the hyperparameters as a dict of JSON's types: arguments of the constructor.

        Examples
        --------
        >>> import numpy as np
        >>> import fastbptt as fb
        >>> fb.SGD({"weight": np.zeros(3)}, lr=0.1, momentum=0.9).config()
        {'lr': 0.1, 'momentum': 0.9, 'nesterov': False, 'weight_decay': 0.0}
        """
        return {"lr": self.lr, **{name: getattr(self, name) for name in self._hyperparameters}}

    def state_dict(self) -> dict[str, Array | int | float]:
        """Return copies of all that changes from step to step, but the parameters.

        Returns
        -------
        dict
            Arrays under names such as "exp_avg.0.weight"; for Adam also the number of steps, and
            for parameters in bfloat16 their copies in float32, "master.0.weight".

        Examples
        --------
        >>> import numpy as np
        >>> import fastbptt as fb
        >>> list(fb.Adam({"weight": np.zeros(3)}).state_dict())
        ['step', 'exp_avg.weight', 'exp_avg_sq.weight']
        """
        return {**self._counters(), **{key: b.copy() for key, b in self._named_buffers().items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned; all is checked before anything is changed.

        Parameters
        ----------
        state : mapping of str to ndarray or int
            Of an optimiser of this kind, with these options, for parameters of these shapes.

        Raises
        ------
        ValueError
            A name is missing or unknown, or a shape or a number is wrong.
        TypeError
            A dtype is wrong, or something that is no array.

        Examples
        --------
        >>> import numpy as np
        >>> import fastbptt as fb
        >>> first, second = (fb.Adam({"weight": np.zeros(3)}) for _ in range(2))
        >>> first.step({"weight": np.ones(3)})
        >>> second.load_state_dict(first.state_dict())
        >>> second.state_dict()["step"]
        1
        """
        buffers, counters = self._named_buffers(), self._counters()
        _check_names("state", state, {**counters, **buffers})
        for name in counters:
            value = state[name]
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise TypeError(f"state[{name!r}]: got {value!r}, wanted an integer")
            if value < 0:
                raise ValueError(f"state[{name!r}]: got {value}, wanted at least 0")
        arrays = _checked("state", {name: state[name] for name in buffers}, buffers)
        for name, buffer in buffers.items():
            np.copyto(buffer, arrays[name])
        for name in counters:
            setattr(self, f"_{name}", int(state[name]))

    def _counters(self) -> dict[str, int]:
        return {}

    def _named_buffers(self) -> dict[str, Array]:
        return {
            f"{kind}.{name}": buffer
            for kind, buffers in self._buffers.items()
            for name, buffer in buffers.items()
        }

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.config().items())
        return f"{type(self).__name__}({len(self._parameters)} parameters, {options})"


class Adam(Optimizer):
    """Adam (Kingma & Ba 2015).

    With `m` and `v` the running means of g and g^2, `m_hat = m / (1 - beta_1^t)` and
    `v_hat = v / (1 - beta_2^t)` in step t: `w -= lr * m_hat / (sqrt(v_hat) + eps)`.

    Parameters
    ----------
    parameters : mapping of str to ndarray
        What is updated in place, such as `model.parameters()`.
    lr : float
        The learning rate.
    betas : tuple of float
        How much of m and v a step keeps, each in [0, 1).
    eps : float
        Keeps the quotient finite.
    weight_decay : float
        What is added to g, times w.

    Raises
    ------
    ValueError
        A number is out of range, or a parameter read-only or not contiguous.
    TypeError
        A parameter is no array of float32, float64 or bfloat16, or an option no number.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbptt as fb
    >>> weight = np.array([1.0, 2.0])
    >>> adam = fb.Adam({"weight": weight}, lr=0.1)
    >>> adam.step({"weight": np.array([3.0, -0.01])})
    >>> weight.round(3).tolist()
    [0.9, 2.1]
    """

    _hyperparameters = ("betas", "eps", "weight_decay")

    def __init__(
        self,
        parameters: Mapping[str, Array],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(parameters, lr)
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise TypeError(f"betas: got {betas!r}, wanted two numbers")
        self.betas = (_fraction("betas[0]", betas[0]), _fraction("betas[1]", betas[1]))
        self.eps = _at_least_zero("eps", eps)
        self.weight_decay = _at_least_zero("weight_decay", weight_decay)
        self._step = 0
        self._add_buffers("exp_avg", "exp_avg_sq")

    def config(self) -> dict[str, Any]:
        """Return the hyperparameters as a dict of JSON's types: arguments of the constructor."""
        return {**super().config(), "betas": list(self.betas)}

    def _counters(self) -> dict[str, int]:
        return {"step": self._step}

    def _begin(self) -> None:
        self._step += 1

    def _update(
        self, parameter: Array, grad: Array, buffers: list[Array], first: Array, second: Array
    ) -> None:
        exp_avg, exp_avg_sq = buffers
        beta1, beta2 = self.betas
        grad = _decayed(parameter, grad, self.weight_decay, second)

        np.subtract(grad, exp_avg, out=first)
        first *= 1 - beta1
        exp_avg += first

        np.multiply(grad, grad, out=first)
        first *= 1 - beta2
        exp_avg_sq *= beta2
        exp_avg_sq += first

        np.sqrt(exp_avg_sq, out=first)
        first /= math.sqrt(1 - beta2**self._step)
        first += self.eps
        np.divide(exp_avg, first, out=first)
        first *= self.lr / (1 - beta1**self._step)
        parameter -= first


class SGD(Optimizer):
    """Stochastic gradient descent, with momentum and Nesterov's variant of it.

    `w -= lr * g`; with momentum `b = momentum * b + g` takes the place of g, and with `nesterov`
    `g + momentum * b` does (Sutskever et al. 2013).

    Parameters
    ----------
    parameters : mapping of str to ndarray
        What is updated in place, such as `model.parameters()`.
    lr : float
        The learning rate.
    momentum : float
        How much of b a step keeps.
    nesterov : bool
        Whether to look ahead; with momentum only.
    weight_decay : float
        What is added to g, times w.

    Raises
    ------
    ValueError
        A number is out of range, `nesterov` without momentum, or a parameter is read-only or not
        contiguous.
    TypeError
        A parameter is no array of float32, float64 or bfloat16, or an option has the wrong type.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbptt as fb
    >>> weight = np.array([1.0])
    >>> sgd = fb.SGD({"weight": weight}, lr=0.1, momentum=0.5)
    >>> for _ in range(2):
    ...     sgd.step({"weight": np.array([1.0])})
    >>> weight.round(3).tolist()
    [0.75]
    """

    _hyperparameters = ("momentum", "nesterov", "weight_decay")

    def __init__(
        self,
        parameters: Mapping[str, Array],
        lr: float = 1e-3,
        *,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(parameters, lr)
        self.momentum = _at_least_zero("momentum", momentum)
        self.nesterov = as_bool("nesterov", nesterov)
        self.weight_decay = _at_least_zero("weight_decay", weight_decay)
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov: got True with momentum=0.0, wanted a momentum above 0")
        if self.momentum:
            self._add_buffers("momentum_buffer")

    def _update(
        self, parameter: Array, grad: Array, buffers: list[Array], first: Array, second: Array
    ) -> None:
        grad = _decayed(parameter, grad, self.weight_decay, second)
        direction = grad
        if buffers:
            (direction,) = buffers
            direction *= self.momentum
            direction += grad
        if self.nesterov:
            np.multiply(direction, self.momentum, out=first)
            first += grad
            direction = first
        np.multiply(direction, self.lr, out=first)
        parameter -= first


class RMSprop(Optimizer):
    """RMSprop (Tieleman & Hinton 2012), centered on request (Graves 2013).

    With `v` the running mean of g^2: `w -= lr * g / (sqrt(v) + eps)`. Centered, the square of the
    running mean of g is taken from v; with momentum `b = momentum * b + g / (sqrt(v) + eps)`, and
    `w -= lr * b`.

    Parameters
    ----------
    parameters : mapping of str to ndarray
        What is updated in place, such as `model.parameters()`.
    lr : float
        The learning rate.
    alpha : float
        How much of v a step keeps, in [0, 1).
    eps : float
        Keeps the quotient finite.
    momentum : float
        How much of b a step keeps.
    centered : bool
        Whether to divide by the deviation in place of the root of the mean square.
    weight_decay : float
        What is added to g, times w.

    Raises
    ------
    ValueError
        A number is out of range, or a parameter read-only or not contiguous.
    TypeError
        A parameter is no array of float32, float64 or bfloat16, or an option has the wrong type.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbptt as fb
    >>> weight = np.array([1.0, 2.0])
    >>> fb.RMSprop({"weight": weight}, lr=0.1, alpha=0.0).step({"weight": np.array([3.0, -0.01])})
    >>> weight.round(3).tolist()
    [0.9, 2.1]
    """

    _hyperparameters = ("alpha", "eps", "momentum", "centered", "weight_decay")

    def __init__(
        self,
        parameters: Mapping[str, Array],
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        *,
        momentum: float = 0.0,
        centered: bool = False,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(parameters, lr)
        self.alpha = _fraction("alpha", alpha)
        self.eps = _at_least_zero("eps", eps)
        self.momentum = _at_least_zero("momentum", momentum)
        self.centered = as_bool("centered", centered)
        self.weight_decay = _at_least_zero("weight_decay", weight_decay)
        self._add_buffers("square_avg")
        if self.centered:
            self._add_buffers("grad_avg")
        if self.momentum:
            self._add_buffers("momentum_buffer")

    def _update(
        self, parameter: Array, grad: Array, buffers: list[Array], first: Array, second: Array
    ) -> None:
        grad = _decayed(parameter, grad, self.weight_decay, second)
        square_avg, *more = buffers
        np.multiply(grad, grad, out=first)
        first *= 1 - self.alpha
        square_avg *= self.alpha
        square_avg += first
        if self.centered:
            grad_avg = more.pop(0)
            np.subtract(grad, grad_avg, out=first)
            first *= 1 - self.alpha
            grad_avg += first
            np.multiply(grad_avg, grad_avg, out=first)
            np.subtract(square_avg, first, out=first)
            # A variance of zero may come out a rounding error below.
            np.maximum(first, 0, out=first)
            np.sqrt(first, out=first)
        else:
            np.sqrt(square_avg, out=first)
        first += self.eps
        np.divide(grad, first, out=first)
        if self.momentum:
            (momentum_buffer,) = more
            momentum_buffer *= self.momentum
            momentum_buffer += first
            np.multiply(momentum_buffer, self.lr, out=first)
        else:
            first *= self.lr
        parameter -= first


def clip_grad_norm(grads: Mapping[str, Array], max_norm: float) -> float:
    """Scale gradients in place so that their norm, all taken together, is at most `max_norm`.

    Where the norm is not finite, they are left as they are.

    Parameters
    ----------
    grads : mapping of str to ndarray
        Gradients, such as `value_and_grad` returns.
    max_norm : float
        The largest norm, at least 0; with `inf` the norm is only measured.

    Returns
    -------
    float
        The norm before.

    Raises
    ------
    ValueError
        `max_norm` is negative or NaN, or an array is read-only.
    TypeError
        Something is no array of float32 or float64, or `max_norm` no number.

    References
    ----------
    R. Pascanu, T. Mikolov and Y. Bengio, "On the difficulty of training recurrent neural networks",
    ICML 2013.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbptt as fb
    >>> grads = {"weight": np.array([3.0]), "bias": np.array([4.0])}
    >>> fb.clip_grad_norm(grads, 1.0)
    5.0
    >>> {name: grad.round(4).tolist() for name, grad in grads.items()}
    {'weight': [0.6], 'bias': [0.8]}
    """
    limit = math.inf if max_norm == math.inf else _at_least_zero("max_norm", max_norm)
    _check_mapping("grads", grads)
    for name, grad in grads.items():
        _check_floats(f"grads[{name!r}]", grad)
        if not grad.flags.writeable:
            raise ValueError(f"grads[{name!r}]: got a read-only array; it is scaled in place")
    squares = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for grad in grads.values():
            flat = np.ascontiguousarray(grad).reshape(-1)
            for begin in range(0, flat.size, _DOT_BLOCK):
                wide = flat[begin : begin + _DOT_BLOCK].astype(np.float64, copy=False)
                squares += float(np.dot(wide, wide))
    norm = math.sqrt(squares)
    scale = limit / (norm + _CLIP_EPS)
    if math.isfinite(norm) and scale < 1:
        for grad in grads.values():
            grad *= scale
    return norm


def _places(parameters: Mapping[str, Array]) -> dict[str, slice]:
    """Return where each lies if all of one dtype are put in a row."""
    places, ends = {}, {parameter.dtype: 0 for parameter in parameters.values()}
    for name, parameter in parameters.items():
        begin = ends[parameter.dtype]
        ends[parameter.dtype] += parameter.size
        places[name] = slice(begin, ends[parameter.dtype])
    return places


def _divided(parameters: Mapping[str, Array]) -> Iterator[_Block]:
    """Cut parameters into blocks: long ones into several, neighbours that are short into one."""
    places = _places(parameters)
    open_blocks: dict[Any, _Block] = {}
    for name, parameter in parameters.items():
        dtype, flat = parameter.dtype, parameter.reshape(-1)
        for begin in range(0, flat.size, _BLOCK):
            view = flat[begin : begin + _BLOCK]
            first = places[name].start + begin
            block = open_blocks.get(dtype)
            if block is None or first + view.size - block.begin > _BLOCK:
                if block is not None:
                    yield block
                block = open_blocks[dtype] = _Block(dtype, first, first)
            block.pieces.append((name, begin, view))
            block.end = first + view.size
    yield from open_blocks.values()


def _decayed(parameter: Array, grad: Array, weight_decay: float, scratch: Array) -> Array:
    """Return the gradient with that of the weight decay."""
    if not weight_decay:
        return grad
    np.multiply(parameter, weight_decay, out=scratch)
    scratch += grad
    return scratch


def _check_mapping(what: str, values: Any) -> None:
    if not isinstance(values, Mapping):
        raise TypeError(f"{what}: got {type(values).__name__}, wanted a mapping of names to arrays")


def _check_names(what: str, values: Any, wanted: Mapping[str, Any]) -> None:
    _check_mapping(what, values)
    missing, unknown = listed(wanted, values), listed(values, wanted)
    if missing or unknown:
        faults = [f"{missing} missing"] if missing else []
        faults += [f"{unknown} unknown"] if unknown else []
        raise ValueError(f"{what}: {'; '.join(faults)}")


def _check_floats(what: str, array: Any, narrow: bool = False) -> None:
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{what}: got {type(array).__name__}, wanted an array")
    if narrow and array.dtype.name == "bfloat16":
        return
    if array.dtype not in (np.float32, np.float64):
        raise TypeError(f"{what}: got dtype {array.dtype}, wanted float32 or float64")


def _checked(what: str, values: Any, wanted: Mapping[str, Array]) -> dict[str, Array]:
    """Return contiguous arrays with the names, shapes and dtypes of `wanted`."""
    _check_names(what, values, wanted)
    checked = {}
    for name, like in wanted.items():
        value = values[name]
        if not isinstance(value, np.ndarray):
            raise TypeError(f"{what}[{name!r}]: got {type(value).__name__}, wanted an array")
        if value.shape != like.shape:
            raise ValueError(f"{what}[{name!r}]: got shape {value.shape}, wanted {like.shape}")
        if value.dtype != like.dtype:
            raise TypeError(f"{what}[{name!r}]: got dtype {value.dtype}, wanted {like.dtype}")
        checked[name] = np.ascontiguousarray(value)
    return checked


def _at_least_zero(name: str, value: Any) -> float:
    number = as_finite(name, value)
    if number < 0:
        raise ValueError(f"{name}: got {value!r}, wanted at least 0")
    return number


def _fraction(name: str, value: Any) -> float:
    number = _at_least_zero(name, value)
    if number >= 1:
        raise ValueError(f"{name}: got {value!r}, wanted less than 1")
    return number
