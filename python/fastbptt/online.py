"""Rules that learn while they run: how the error of a step reaches the steps before it.

They are for `Stream`. `Truncated` is one of them; those here run forward in time, and keep instead
of past steps what the parameters have done to the state so far.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any, TypeAlias

from fastbptt._arrays import as_size
from fastbptt.layers import LSTM
from fastbptt.model import Model
from fastbptt.schedules import Truncated


@dataclass(frozen=True, init=False, repr=False)
class _Forward:
    """What the rules that run forward have in common."""

    every: int

    def __init__(self, every: int = 1) -> None:
        object.__setattr__(self, "every", as_size("every", every))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({'' if self.every == 1 else f'every={self.every}'})"


class RTRL(_Forward):
    """Real-time recurrent learning: the exact gradient, with no look back (Williams & Zipser 1989).

    The influence `J = dh_t/dw` of every parameter on every unit goes forward with the state,
    `J_t = (dh_t/dh_{t-1}) J_{t-1} + (the influence of step t)`, and `dL_t/dw = dL_t/dh_t J_t`.

    Per stream, with n = H numbers in the state (2H in an LSTM) and P parameters in the recurrent
    layer and the embedding (`G*H*(I + H + 2)` and `V*I`):

    - time of a step: `2*n*H*P` operations, so it grows like H^4
    - memory: `n*P` numbers, which grows like H^3
    - bias: none while the parameters stay; where they change, J is that of the parameters as they
      were, which small steps make small

    Parameters
    ----------
    every : int
        Steps from one update to the next.

    Raises
    ------
    ValueError
        `every` is less than 1.
    TypeError
        `every` is no integer.

    References
    ----------
    R. J. Williams and D. Zipser, "A learning algorithm for continually running fully recurrent
    neural networks", Neural Computation 1(2), 1989.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbptt as fb
    >>> model = fb.Model(fb.GRU(3, 4, seed=0), fb.Linear(4, 1, seed=1))
    >>> stream = fb.Stream(model, "mse", fb.RTRL(), fb.SGD(model.parameters(), lr=0.1))
    >>> x, target = np.ones((1, 3), np.float32), np.ones((1, 1), np.float32)
    >>> first = stream.push(x, target).loss
    >>> stream.push(x, target).loss < first
    True
    """


class SnAp1(_Forward):
    """The sparse n-step approximation of RTRL for n = 1 (Menick et al. 2020).

    Of the influence J only that of a parameter on the unit of its own gate is kept, h and c of an
    LSTM together, and of the Jacobian only its diagonal:
    `J_t = diag(dh_t/dh_{t-1}) J_{t-1} + (the influence of step t)`.

    - time of a step and memory, per stream: of the order of the parameters of the recurrent layer,
      like H^2, as a step forward itself
    - bias: what reaches a unit by way of other units is left out. Without such ways (a diagonal
      recurrent matrix) the gradient is that of RTRL. An embedding learns from the error of the same
      step alone. In a GRU with `reset_after=False` a reset gate reaches all units in one step; only
      its own unit is kept here too.

    Parameters
    ----------
    every : int
        Steps from one update to the next.

    Raises
    ------
    ValueError
        `every` is less than 1.
    TypeError
        `every` is no integer.

    References
    ----------
    J. Menick, E. Elsen, U. Evci, S. Osindero, K. Simonyan and A. Graves, "A practical sparse
    approximation for real time recurrent learning", arXiv:2006.07232, 2020.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbptt as fb
    >>> model = fb.Model(fb.LSTM(3, 4, seed=0), fb.Linear(4, 1, seed=1))
    >>> stream = fb.Stream(model, "mse", fb.SnAp1(every=2), fb.Adam(model.parameters()))
    >>> for _ in range(4):
    ...     pushed = stream.push(np.ones((1, 3), np.float32), np.ones((1, 1), np.float32))
    >>> stream.updates
    2
    """


class EProp(_Forward):
    """Eligibility traces in the manner of e-prop, for LSTM (Bellec et al. 2020).

    As `SnAp1`, but nothing that goes through the recurrent weights is followed: what is left is the
    way of the cell state, `dc_t/dw = f_t dc_{t-1}/dw + (the influence of step t)`. The learning
    signal is `dL_t/dh_t` by way of the readout's own weights (symmetric e-prop).

    - time of a step and memory, per stream: of the order of the parameters of the recurrent layer,
      like H^2
    - bias: all influence by way of the recurrent weights is left out. An embedding learns from the
      error of the same step alone.

    Parameters
    ----------
    every : int
        Steps from one update to the next.

    Raises
    ------
    ValueError
        `every` is less than 1.
    TypeError
        `every` is no integer.

    References
    ----------
    G. Bellec, F. Scherr, A. Subramoney, E. Hajek, D. Salaj, R. Legenstein and W. Maass, "A solution
    to the learning dilemma for recurrent networks of spiking neurons", Nature Communications 11,
    3625, 2020.

    Examples
    --------
    >>> import fastbptt as fb
    >>> fb.Stream(fb.Model(fb.GRU(3, 4)), "mse", fb.EProp())
    Traceback (most recent call last):
        ...
    ValueError: rule: EProp() is for an LSTM, got GRU(3, 4); wanted an LSTM, or SnAp1()
    """


@dataclass(frozen=True, init=False, repr=False)
class UORO(_Forward):
    """Unbiased online recurrent optimisation (Tallec & Ollivier 2017).

    In place of the influence J a product of two vectors is kept, one of the size of the state and
    one of the size of the parameters, whose mean over random signs is J.

    - time of a step and memory, per stream: of the order of the parameters of the recurrent layer
      and the embedding, like H^2 and V*I
    - bias: none while the parameters stay; but a variance that grows with H and with the time that
      errors reach back

    Parameters
    ----------
    seed : int, optional
        Of the signs; a new one each time by default.
    every : int
        Steps from one update to the next.

    Raises
    ------
    ValueError
        `every` is less than 1, or `seed` negative or of more than 63 bits.
    TypeError
        One of them is no integer.

    References
    ----------
    C. Tallec and Y. Ollivier, "Unbiased online recurrent optimization", arXiv:1702.05043, 2017.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbptt as fb
    >>> model = fb.Model(fb.RNN(3, 4, seed=0), fb.Linear(4, 1, seed=1))
    >>> stream = fb.Stream(model, "mse", fb.UORO(seed=1))
    >>> pushed = stream.push(np.ones((2, 3), np.float32), np.ones((2, 1), np.float32))
    >>> stream.grads["0.weight_hh_l0"].shape
    (4, 4)
    """

    seed: int

    def __init__(self, seed: int | None = None, every: int = 1) -> None:
        super().__init__(every)
        value = secrets.randbits(63) if seed is None else as_size("seed", seed, 0)
        if value >= 1 << 63:
            raise ValueError(f"seed: got {value}, wanted less than 2**63")
        object.__setattr__(self, "seed", value)

    def __repr__(self) -> str:
        every = "" if self.every == 1 else f", every={self.every}"
        return f"UORO(seed={self.seed}{every})"


Rule: TypeAlias = Truncated | RTRL | SnAp1 | EProp | UORO

_RULES = (Truncated, RTRL, SnAp1, EProp, UORO)

# The settings of layers that a stream knows what to do with.
_KNOWN = frozenset(
    {
        *("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dtype"),
        *("nonlinearity", "reset_after"),
    }
)


def steps_of(rule: Rule) -> int:
    """Return the steps from one update to the next."""
    return rule.k1 if isinstance(rule, Truncated) else rule.every


def config_of(rule: Rule) -> dict[str, Any]:
    """Return what two rules must have in common for one to go on where the other stopped."""
    name = type(rule).__name__
    if isinstance(rule, Truncated):
        return {"type": name, "k1": rule.k1, "k2": rule.k2}
    return {"type": name, "every": rule.every}


def check_rule(rule: Any, model: Model) -> None:
    """Refuse what is no rule, or cannot run through this model."""
    if not isinstance(rule, _RULES):
        name = rule.__name__ if isinstance(rule, type) else type(rule).__name__
        wanted = ", ".join(kind.__name__ for kind in _RULES)
        raise TypeError(f"rule: got {name}, wanted one of {wanted}")
    layer = model.recurrent
    if layer.dtype != layer.compute_dtype:
        raise ValueError(f"model: got {layer!r}, and a stream wants float32 or float64")
    for name, value in layer._settings().items():
        if name not in _KNOWN and value:
            raise ValueError(
                f"model: got {layer!r}, and a stream has no {name}; wanted a layer without it"
            )
    if isinstance(rule, Truncated):
        return
    if isinstance(rule, EProp) and not isinstance(layer, LSTM):
        raise ValueError(f"rule: {rule} is for an LSTM, got {layer!r}; wanted an LSTM, or SnAp1()")
    if layer.num_layers != 1:
        raise ValueError(
            f"rule: {rule} runs through one layer, got {layer!r}; wanted num_layers=1, or "
            "Truncated(k1, k2), which takes any number"
        )
