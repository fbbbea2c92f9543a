"""Instruments that show the gradient on its way back through time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fastbptt._arrays import Array, _as_int, as_bool, as_finite
from fastbptt.gate_gradients import CELLS, Steps, Weights, gate_gradients
from fastbptt.layers import Recurrent
from fastbptt.losses import Loss, make_objective
from fastbptt.model import Model
from fastbptt.source import Source
from fastbptt.training import _Input

# A change of the norm by this factor between the target and the first step is a verdict.
_FACTOR = 1e3

# Elements of a state that are looked at together, so that they stay in the cache.
_BLOCK = 1 << 15

_KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class Verdict(NamedTuple):
    """A judgement, true or false, with the reasons.

    Attributes
    ----------
    holds : bool
        Whether it is so in any of the layers asked about; `bool(verdict)` too.
    text : str
        The reasons in words, a line a layer; `str(verdict)` too.
    figures : tuple of dict
        The numbers in the text, a dict a layer.
    """

    holds: bool
    text: str
    figures: tuple[dict[str, Any], ...]

    def __bool__(self) -> bool:
        return self.holds

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, eq=False)
class GradientFlow:
    """The norms of a gradient at every step; what `gradient_flow` returns.

    Norms are Frobenius norms over rows and units, in float64. n is the number of steps up to the
    target; step t lies at the distance `n - 1 - t` from it.

    Attributes
    ----------
    loss : float
        What the gradient is of.
    h : ndarray
        Norm of dL/dh_t, `[L, n]`: what the loss feels of a change of h_t, by whatever way.
    c : ndarray or None
        Norm of dL/dc_t, `[L, n]`, of an LSTM.
    weights : dict of str to ndarray
        By the names of `model.parameters()`: norm of what step t alone adds to the gradient of that
        parameter, `[n]`. Empty if it was not asked for.
    all_targets : bool
        Whether the loss is that of all steps, not that of the last of them.
    """

    loss: float
    h: Array
    c: Array | None
    weights: dict[str, Array] = field(default_factory=dict)
    all_targets: bool = False

    @property
    def distance(self) -> Array:
        """How many steps lie between each step and the last, `[n]`."""
        return np.arange(self.h.shape[1] - 1, -1, -1)

    def half_life(self, layer: int = -1) -> float:
        """Return over how many steps back the norm of dL/dh halves, on the average.

        Parameters
        ----------
        layer : int
            Which; by default the last.

        Returns
        -------
        float
            From the slope of the line of least squares through `log2` of the norms against the
            distance; norms of zero are left out. `inf` where the line does not fall, or is no line
            as there is but one step; 0 where nothing comes as far as one step; NaN where less than
            two norms are finite.

        Raises
        ------
        ValueError
            The flow is that of all targets, which keep the norm up on the way; or there is no such
            layer.

        Examples
        --------
        >>> import numpy as np
        >>> import fastbptt as fb
        >>> norms = np.array([[1.0, 2.0, 4.0, 8.0]])
        >>> fb.GradientFlow(loss=1.0, h=norms, c=None).half_life()
        1.0
        """
        self._check_one_target("half_life")
        norms = self.h[self._layers(layer)[0]]
        slope = _slope(norms, self.distance)
        if slope is None:
            if not np.isfinite(norms).all():
                return math.nan
            return math.inf if len(norms) < 2 or norms[-1] == 0.0 else 0.0
        # A line that is level but for rounding would have a half-life of millions of steps.
        return -1.0 / slope if slope * len(norms) < -1e-9 else math.inf

    def vanishing(self, layer: int | None = None, factor: float = _FACTOR) -> Verdict:
        """Say whether the gradient has vanished on its way to the first step.

        Parameters
        ----------
        layer : int, optional
            Which; by default all, and any one is enough.
        factor : float
            It has vanished if the norm at the first step is so many times less than at the target.

        Returns
        -------
        Verdict
            True or false, with the reasons in words.

        Raises
        ------
        ValueError
            The flow is that of all targets, there is no such layer, or the factor is not above 1.

        Examples
        --------
        >>> import numpy as np
        >>> import fastbptt as fb
        >>> flow = fb.GradientFlow(loss=1.0, h=np.array([[1e-6, 1e-3, 1.0]]), c=None)
        >>> print(flow.vanishing())  # doctest: +NORMALIZE_WHITESPACE
        layer 0 vanishes: |dL/dh| is 1 at the target and 1e-06 two steps before it,
        1e+06 times less; it halves every 0.1 steps
        """
        self._check_one_target("vanishing")
        factor = _as_factor(factor)
        found = []
        for place in self._layers(layer):
            norms = self.h[place]
            near, far, half_life = float(norms[-1]), float(norms[0]), self.half_life(place)
            times = _ratio(near, far)
            holds = times > factor
            says = "vanishes" if holds else "does not vanish"
            text = f"layer {place} {says}: {self._ends(norms)}"
            if math.isfinite(times) and times > 0.0 and len(norms) > 1 and far > 0.0:
                more = times if times >= 1.0 else 1.0 / times
                text += f", {more:.3g} times {'less' if times >= 1.0 else 'more'}"
            if math.isfinite(half_life):
                text += f"; it halves every {half_life:.1f} steps"
            figures = {"layer": place, "target": near, "first": far, "half_life": half_life}
            found.append((holds, text, figures))
        return _verdict(found)

    def exploding(self, layer: int | None = None, factor: float = _FACTOR) -> Verdict:
        """Say whether the gradient grows without measure on its way.

        Parameters
        ----------
        layer : int, optional
            Which; by default all, and any one is enough.
        factor : float
            It explodes if the norm at some step is so many times that at the last one, or not
            finite.

        Returns
        -------
        Verdict
            True or false, with the reasons in words.

        Raises
        ------
        ValueError
            There is no such layer, or the factor is not above 1.

        Examples
        --------
        >>> import numpy as np
        >>> import fastbptt as fb
        >>> flow = fb.GradientFlow(loss=1.0, h=np.array([[1e6, 1e3, 1.0]]), c=None)
        >>> print(flow.exploding())
        layer 0 explodes: |dL/dh| is 1 at the target and at most 1e+06, two steps before it
        """
        factor = _as_factor(factor)
        found = []
        for place in self._layers(layer):
            norms = self.h[place]
            near = float(norms[-1])
            where = "last step" if self.all_targets else "target"
            wrong = np.flatnonzero(~np.isfinite(norms))
            if wrong.size:
                # Time runs backward: the last one is where it began.
                step = int(wrong[-1])
                peak, holds = float(norms[step]), True
                text = f"|dL/dh| is {peak:g}"
            else:
                step = len(norms) - 1 - int(norms[::-1].argmax())
                peak = float(norms[step])
                holds = _ratio(peak, near) > factor
                text = f"|dL/dh| is {near:.3g} at the {where} and at most {peak:.3g}"
            distance = len(norms) - 1 - step
            text += f", {_steps(distance)} before it" if distance else ", there"
            text = f"layer {place} {'explodes' if holds else 'does not explode'}: {text}"
            figures = {"layer": place, "target": near, "largest": peak, "distance": distance}
            found.append((holds, text, figures))
        return _verdict(found)

    def plot(self, path: Any = None) -> Any:
        """Draw the norms against the distance from the target, on a logarithmic scale.

        Takes matplotlib: `pip install 'fastbptt[plot]'`.

        Parameters
        ----------
        path : str or path-like, optional
            Where to write the picture, as PNG, SVG, PDF or whatever its ending says.

        Returns
        -------
        matplotlib.figure.Figure
            Norms of dL/dh, and of dL/dc dashed, on the left; of each step's own part in the
            gradients of the parameters on the right, if it is there.

        Raises
        ------
        ImportError
            matplotlib is not installed.

        Examples
        --------
        >>> import numpy as np
        >>> import fastbptt as fb
        >>> flow = fb.GradientFlow(loss=1.0, h=np.array([[1e-6, 1e-3, 1.0]]), c=None)
        >>> len(flow.plot().axes)
        1
        """
        from fastbptt.flow_plot import compare

        figure = compare({"": self})
        if path is not None:
            figure.savefig(path)
        return figure

    def _check_one_target(self, name: str) -> None:
        if self.all_targets:
            raise ValueError(f"{name}: got the flow of all targets, wanted that of one (at=-1)")

    def _layers(self, layer: int | None) -> list[int]:
        L = len(self.h)
        if layer is None:
            return list(range(L))
        place = _as_int("layer", layer)
        if not -L <= place < L:
            raise ValueError(f"layer: got {place}, wanted from {-L} to {L - 1}")
        return [place % L]

    def _ends(self, norms: Array) -> str:
        n, near, far = len(norms), norms[-1], norms[0]
        if n == 1:
            return f"there is but one step, with |dL/dh| {near:.3g}"
        text = f"|dL/dh| is {near:.3g} at the target and"
        if far == 0.0 and near > 0.0:
            reach = n - 1 - int(np.flatnonzero(norms)[0])
            return f"{text} 0 from {_steps(reach + 1)} before it on"
        return f"{text} {far:.3g} {_steps(n - 1)} before it"


def gradient_flow(
    model: Model,
    x: ArrayLike,
    target: Any,
    loss: Loss = "cross_entropy",
    state: Any = None,
    *,
    at: int | None = -1,
    ignore_index: int = -100,
    contributions: bool = True,
) -> GradientFlow:
    """Return how large the gradient of a loss is at each step, layer by layer.

    All of it is exact, from one run forward and one back, a step at a time. Memory is that of
    `Full()`. The model is not changed; nothing is dropped.

    Parameters
    ----------
    model, x, target, loss, state, ignore_index
        As for `value_and_grad`.
    at : int or None
        The step whose target's loss is looked at, by default the last; steps behind it are left
        out. None: the loss of all targets.
    contributions : bool
        Whether each step's own part in the gradients of the parameters is wanted too.

    Returns
    -------
    GradientFlow
        The norms, with `half_life`, `vanishing`, `exploding` and `plot`.

    Raises
    ------
    ValueError
        A shape is wrong, a class is out of range, `loss` is unknown, there is no step `at`, no
        target counts there, or the layer has options beyond those of a plain RNN, LSTM or GRU.
    TypeError
        A dtype is wrong, or something is not what it should be at all.

    Notes
    -----
    With J_t the Jacobian of step t, dL/dh at a step that is k before the target is a product of k
    of them with dL/dh at the target. Where their norms stay under 1 it vanishes exponentially,
    where they are above, it may explode (Hochreiter 1991; Bengio et al. 1994; Pascanu et al. 2013).

    dL/dh_t and dL/dc_t count every way to the loss: h_t by the output, the layer above and the next
    step, c_t by h_t and the next step. The contribution of step t to a weight's gradient is that of
    its use at step t alone; the gradient is the sum over the steps.

    References
    ----------
    R. Pascanu, T. Mikolov and Y. Bengio, "On the difficulty of training recurrent neural networks",
    ICML 2013.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbptt as fb
    >>> model = fb.Model(fb.RNN(3, 16, seed=0), fb.Linear(16, 1, seed=1))
    >>> x = np.random.default_rng(2).standard_normal((100, 8, 3), np.float32)
    >>> flow = fb.gradient_flow(model, x, np.ones((100, 8, 1), np.float32), "mse")
    >>> flow.h.shape, bool(flow.vanishing()), flow.half_life() < 3
    ((1, 100), True, True)
    """
    source = _Input(model, x)
    objective = make_objective(loss, model, target, source.T, source.B, ignore_index)
    contributions = as_bool("contributions", contributions)
    first, n = _steps_with_loss(at, source.T)
    layer = model.recurrent
    _check_layer(layer)
    below = source.vectors(0, n)
    if state is None:
        state = layer._start(source.B)
    else:
        state = layer._as_state("state", state)
        # One step of the whole, so that the core looks at the state before it is taken apart.
        layer._stack.session(1, source.B, 1).advance(below[:1], state, 0)
    walks = []
    for number in range(layer.num_layers):
        walks.append(_Walk(layer, number, below, _of_layer(state, number)))
        below = walks[-1].y
    if at is not None:
        objective.narrow(first, n)
    zeros = {} if model.readout is None else model.readout._zero_grads()
    value, grad = objective(below[first:], first, n, zeros)
    assert grad is not None
    if at is not None and loss == "cross_entropy":
        _check_counts(model, target, first, ignore_index)
    grad_y = np.zeros(below.shape, model.compute_dtype)
    grad_y[first:] = grad
    place = 0 if model.embedding is None else 1
    weights: dict[str, Array] = {}
    for walk in reversed(walks):
        grad_y = walk.back(grad_y, contributions)
        weights = {f"{place}.{name}": norms for name, norms in walk.weights.items()} | weights
    c = [walk.c for walk in walks if walk.c is not None]
    return GradientFlow(
        loss=value,
        h=np.stack([walk.h for walk in walks]),
        c=np.stack(c) if c else None,
        weights=weights,
        all_targets=at is None,
    )


def _steps_with_loss(at: int | None, T: int) -> tuple[int, int]:
    """Return the first step whose loss counts and how many steps there are up to the last."""
    if at is None:
        return 0, T
    step = _as_int("at", at)
    if not -T <= step < T:
        raise ValueError(f"at: got {step}, wanted None or from {-T} to {T - 1}, as x has {T} steps")
    return step % T, step % T + 1


def _check_counts(model: Model, target: Any, step: int, ignore_index: int) -> None:
    here = Source("target", target, model.batch_first).take(step, step + 1)
    if (here == ignore_index).all():
        raise ValueError(
            f"target: no target counts: got ignore_index = {ignore_index} in all rows of step "
            f"{step}, wanted at least one that does; at= chooses another step"
        )


def _of_layer(state: Any, number: int) -> Any:
    """Return the state of one layer, as that of a stack of one."""
    if state is None:
        return None
    if isinstance(state, tuple | list):
        return tuple(part[number : number + 1] for part in state)
    return state[number : number + 1]


def _check_layer(layer: Recurrent[Any]) -> None:
    """Refuse what the formulas of `gate_gradients` do not know."""
    options = ("bidirectional", "recurrent_dropout", "zoneout", "peephole", "coupled", "layer_norm")
    for option in options:
        if getattr(layer, option, False):
            raise ValueError(
                f"model: got {layer!r}, but the flow is that of the cells alone, in one direction; "
                f"wanted a layer without {option}"
            )
    kinds = (*_KINDS, "h0", "c0")
    known = {f"{kind}_l{number}" for kind in kinds for number in range(layer.num_layers)}
    if not layer.weights.keys() <= known or layer._cell() not in CELLS:
        raise ValueError(f"model: got {layer!r}, wanted a plain RNN, LSTM or GRU")


def _alone(layer: Recurrent[Any], number: int) -> Recurrent[Any]:
    """Return a layer of the stack as a stack of one, over the same parameters."""
    weights = layer.weights
    settings = layer._settings() | {
        "input_size": weights[f"weight_ih_l{number}"].shape[1],
        "num_layers": 1,
        "batch_first": False,
    }
    return type(layer)._restore(
        settings, lambda name: weights[f"{name.removesuffix('_l0')}_l{number}"]
    )


class _Walk:
    """One layer's way through time and back, a step at a time; what is kept of it are norms."""

    def __init__(self, layer: Recurrent[Any], number: int, x: Array, state: Any) -> None:
        self._names = [f"{kind}_l{number}" for kind in _KINDS]
        self._parameters = [layer.weights.get(name) for name in self._names]
        self._cell = layer._cell()
        alone = _alone(layer, number)
        self._dtype = layer.compute_dtype
        self._session = alone._stack.session(len(x), x.shape[1], 1)
        self._needs_x = number > 0
        self._x, self._initial = x, state
        self._tapes, outputs, cells = [], [], []
        for t in range(len(x)):
            y, state, tape = self._session.record(x[t : t + 1], state, t)
            self._tapes.append(tape)
            outputs.append(y)
            if isinstance(state, tuple):
                cells.append(state[1])
        self.y = np.concatenate(outputs)
        self._cells = np.concatenate(cells) if cells else None
        self.h: Array
        self.c: Array | None = None
        self.weights: dict[str, Array] = {}

    # What has exploded is to be shown, not warned of.
    @np.errstate(over="ignore", invalid="ignore")
    def back(self, grad_y: Array, contributions: bool) -> Array:
        """Note the norms on the way back; return the gradient with respect to x.

        Parameters
        ----------
        grad_y : ndarray
            What the loss and the layer above give to the output of each step, `[n, B, H]`; the
            rest of dL/dh is added to it in place.
        contributions : bool
            Whether the norms of the parameters are wanted.
        """
        grad_x = np.empty(self._x.shape if self._needs_x else 0, self._dtype)
        grad_c = None if self._cells is None else np.zeros_like(self._cells)
        after: Any = None
        for t in range(len(grad_y) - 1, -1, -1):
            own = grad_y[t : t + 1]
            dx, before = self._session.reverse(self._tapes.pop(), own, after, self._needs_x)
            if dx is not None:
                grad_x[t] = dx[0]
            if after is not None:
                own += after[0] if isinstance(after, tuple) else after
                if grad_c is not None:
                    grad_c[t] = after[1][0]
            after = before
        self.h = _norms(grad_y)
        if contributions or grad_c is not None:
            self._note_gates(grad_y, grad_c, contributions)
        return grad_x

    def _note_gates(self, grad_h: Array, grad_c: Array | None, contributions: bool) -> None:
        """Note the norms of dL/dc and of what each step adds to the parameters' gradients."""
        n, B, H = grad_h.shape
        ih, hh, bias_ih, bias_hh = (
            None if weight is None else self._wide(weight) for weight in self._parameters
        )
        assert ih is not None
        assert hh is not None
        weights = Weights(ih, hh, bias_ih, bias_hh)
        h_before, c_before = self._before()
        c = np.zeros(n)
        norms = {name: np.zeros(n) for name in _KINDS}
        block = max(1, _BLOCK // (B * H))
        for begin in range(0, n, block):
            part = slice(begin, min(begin + block, n))

            def cut(array: Array | None, part: slice = part) -> Array | None:
                return None if array is None else array[part]

            steps = Steps(
                self._wide(self._x[part]),
                self._wide(h_before[part]),
                self._wide(self.y[part]),
                cut(c_before),
                cut(self._cells),
            )
            errors = gate_gradients(self._cell, weights, steps, grad_h[part], cut(grad_c))
            if errors.cell is not None:
                c[part] = _norms(errors.cell)
            if contributions:
                squares = [_squared_product(errors.hh[..., rows], h) for rows, h in errors.inputs]
                norms["weight_ih"][part] = np.sqrt(_squared_product(errors.ih, steps.x))
                norms["weight_hh"][part] = np.sqrt(sum(squares))
                norms["bias_ih"][part] = _norms(errors.ih.sum(axis=1, dtype=np.float64))
                norms["bias_hh"][part] = _norms(errors.hh.sum(axis=1, dtype=np.float64))
        self.c = None if grad_c is None else c
        if contributions:
            present = zip(self._names, self._parameters, norms.values(), strict=True)
            self.weights = {name: norm for name, weight, norm in present if weight is not None}

    def _wide(self, array: Array) -> Array:
        """Return an array in the dtype of arithmetic."""
        return array.astype(self._dtype, copy=False)

    def _before(self) -> tuple[Array, Array | None]:
        """Return the states that the steps began with, each `[n, B, H]`."""
        h, c = self._initial if isinstance(self._initial, tuple) else (self._initial, None)
        h = np.zeros_like(self.y[:1]) if h is None else h
        h_before = np.concatenate([h, self.y[:-1]])
        if self._cells is None:
            return h_before, None
        c = np.zeros_like(self._cells[:1]) if c is None else c
        return h_before, np.concatenate([c, self._cells[:-1]])


def _squared_product(left: Array, right: Array) -> Array:
    """Return the squared norm of `left[t].T @ right[t]` for each t.

    Parameters
    ----------
    left, right : ndarray
        `[n, B, R]` and `[n, B, C]`.

    Notes
    -----
    It is the sum of `(left left^T) * (right right^T)`, element by element: for few rows much less
    work than the product itself.
    """
    left, right = left.astype(np.float64, copy=False), right.astype(np.float64, copy=False)
    B, R, C = left.shape[1], left.shape[2], right.shape[2]
    if B * (R + C) <= R * C:
        products = (left @ left.swapaxes(1, 2)) * (right @ right.swapaxes(1, 2))
        # A sum that cancels may come out below zero, by a rounding.
        return np.asarray(np.maximum(products.sum(axis=(1, 2)), 0.0))
    return np.array([_norm(a.T @ b) ** 2 for a, b in zip(left, right, strict=True)])


def _norm(array: Array) -> float:
    # In float64: the squares of small float32 numbers would be zero.
    flat = array.ravel().astype(np.float64, copy=False)
    return math.sqrt(flat @ flat)


def _norms(array: Array) -> Array:
    return np.array([_norm(step) for step in array])


def _slope(norms: Array, distance: Array) -> float | None:
    """Return by how much `log2` of the norms rises a step back; None if there are not two."""
    there = np.isfinite(norms) & (norms > 0.0)
    if np.count_nonzero(there) < 2:
        return None
    d = distance[there] - distance[there].mean()
    return float(d @ np.log2(norms[there]) / (d @ d))


def _ratio(a: float, b: float) -> float:
    if a == b or not math.isfinite(a):
        return 1.0 if a == b else math.nan
    return a / b if b else math.inf


def _steps(count: int) -> str:
    words = ("no", "one", "two", "three")
    number = words[count] if count < len(words) else str(count)
    return f"{number} step{'' if count == 1 else 's'}"


def _as_factor(value: Any) -> float:
    factor = as_finite("factor", value)
    if factor <= 1.0:
        raise ValueError(f"factor: got {factor:g}, wanted more than 1")
    return factor


def _verdict(found: list[tuple[bool, str, dict[str, Any]]]) -> Verdict:
    holds = any(one for one, _, _ in found)
    return Verdict(holds, "\n".join(t for _, t, _ in found), tuple(f for _, _, f in found))
