"""The numbers that parameters start from; each function fills arrays in place.

The draws are float64 and then rounded, so that the float32 and the float64 layer of one seed start
from the same point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from fastbptt._arrays import Array

# Elements drawn at a time, so that float64 draws for a large float32 matrix stay small.
_BLOCK = 1 << 17


def uniform(array: Array, bound: float, rng: np.random.Generator) -> None:
    """Fill with the uniform distribution over `[-bound, bound)`.

    Parameters
    ----------
    array : ndarray
        C-contiguous, float32 or float64, any shape; written.
    bound : float
        Not negative.
    rng : numpy.random.Generator
        Where the numbers come from.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbptt import initialisers
    >>> weight = np.empty((20, 5), np.float32)
    >>> initialisers.uniform(weight, 0.1, np.random.default_rng(0))
    >>> bool(np.abs(weight).max() <= np.float32(0.1))
    True
    """
    _fill(array, lambda n: rng.uniform(-bound, bound, n))


def normal(array: Array, rng: np.random.Generator) -> None:
    """Fill with the normal distribution of mean 0 and variance 1.

    Parameters
    ----------
    array : ndarray
        C-contiguous, float32 or float64, any shape; written.
    rng : numpy.random.Generator
        Where the numbers come from.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbptt import initialisers
    >>> table = np.empty((100, 100), np.float32)
    >>> initialisers.normal(table, np.random.default_rng(0))
    >>> round(float(table.std()), 1)
    1.0
    """
    _fill(array, rng.standard_normal)


def orthogonal(array: Array, rng: np.random.Generator) -> None:
    """Fill a matrix with a random orthogonal one (Saxe et al. 2014).

    Parameters
    ----------
    array : ndarray
        `[M, N]`, float32 or float64; written. Its rows or its columns, whichever are fewer, become
        orthonormal.
    rng : numpy.random.Generator
        Where the numbers come from.

    Notes
    -----
    Q of the QR decomposition of a matrix of normal numbers, its columns signed by the diagonal of
    R, is distributed evenly over the orthogonal matrices.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbptt import initialisers
    >>> weight = np.empty((5, 5))
    >>> initialisers.orthogonal(weight, np.random.default_rng(0))
    >>> bool(np.allclose(weight @ weight.T, np.eye(5)))
    True
    """
    if array.shape[0] < array.shape[1]:
        array = array.T
    q, r = np.linalg.qr(rng.standard_normal(array.shape))
    array[...] = q * np.where(np.diagonal(r) < 0.0, -1.0, 1.0)


def uniform_layers(
    weights: Mapping[str, Array], hidden_size: int, rng: np.random.Generator
) -> None:
    """Fill recurrent layers as PyTorch does: uniform over `[-1/sqrt(H), 1/sqrt(H))`.

    Parameters
    ----------
    weights : mapping of str to ndarray
        The parameters of the layers, `weight_ih_l0` and so on; written.
    hidden_size : int
        H.
    rng : numpy.random.Generator
        Where the numbers come from.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbptt import initialisers
    >>> weights = {"weight_ih_l0": np.empty((4, 3)), "weight_hh_l0": np.empty((4, 4))}
    >>> initialisers.uniform_layers(weights, 4, np.random.default_rng(0))
    >>> bool(np.abs(weights["weight_ih_l0"]).max() <= 0.5)
    True
    """
    bound = 1.0 / math.sqrt(hidden_size)
    for weight in weights.values():
        uniform(weight, bound, rng)


def orthogonal_layers(
    weights: Mapping[str, Array], hidden_size: int, rng: np.random.Generator
) -> None:
    """Fill recurrent layers so that signals keep their size from step to step.

    The recurrent matrix of each gate, and a projection, is orthogonal (Saxe et al. 2014), the
    input matrix of each gate uniform over `[-b, b)` with `b = sqrt(6 / (I + H))` (Glorot & Bengio
    2010), biases zero.

    Parameters
    ----------
    weights : mapping of str to ndarray
        The parameters of the layers, `weight_ih_l0` and so on; written.
    hidden_size : int
        H.
    rng : numpy.random.Generator
        Where the numbers come from.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbptt import initialisers
    >>> weights = {"weight_hh_l0": np.empty((8, 4)), "bias_hh_l0": np.empty(8)}
    >>> initialisers.orthogonal_layers(weights, 4, np.random.default_rng(0))
    >>> first, second = np.split(weights["weight_hh_l0"], 2)
    >>> bool(np.allclose(first @ first.T, np.eye(4)) and np.allclose(second @ second.T, np.eye(4)))
    True
    """
    for name, weight in weights.items():
        if name.startswith("weight_hh"):
            for gate in weight.reshape(-1, hidden_size, weight.shape[1]):
                orthogonal(gate, rng)
        elif name.startswith("weight_hr"):
            orthogonal(weight, rng)
        elif name.startswith("weight_ih"):
            uniform(weight, math.sqrt(6.0 / (weight.shape[1] + hidden_size)), rng)
        else:
            weight.fill(0.0)


def forget_bias(
    weights: Mapping[str, Array], hidden_size: int, value: float, gate: int = 1
) -> None:
    """Set the bias of an LSTM's forget gate to `value` (Gers et al. 2000, Jozefowicz et al. 2015).

    The two biases of a gate add up: `value` goes into `bias_ih`, and `bias_hh` becomes zero.

    Parameters
    ----------
    weights : mapping of str to ndarray
        The parameters of LSTM layers, `bias_ih_l0` and so on; written.
    hidden_size : int
        H; gates are stacked as i, f, g, o.
    value : float
        The bias; 1 is usual, more lets the cell remember for longer from the start.
    gate : int
        The place of f among the gates.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbptt import initialisers
    >>> weights = {"bias_ih_l0": np.zeros(8), "bias_hh_l0": np.ones(8)}
    >>> initialisers.forget_bias(weights, 2, 1.0)
    >>> weights["bias_ih_l0"].tolist()
    [0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    """
    forget = slice(gate * hidden_size, (gate + 1) * hidden_size)
    for name, weight in weights.items():
        if name.startswith("bias_ih"):
            weight[forget] = value
        elif name.startswith("bias_hh"):
            weight[forget] = 0.0


def chrono(
    weights: Mapping[str, Array],
    hidden_size: int,
    longest: float,
    rng: np.random.Generator,
    gate: int = 1,
) -> None:
    """Set the biases of the gates for memories of up to `longest` steps (Tallec & Ollivier 2018).

    A gate that is held at f forgets over about `1/(1 - f)` steps; with `f = s(b)` that is
    `1 + exp(b)`. So `b = log(u)`, u uniform over `[1, longest - 1)`, spreads the units over all
    spans of time up to `longest`. In an LSTM the forget gate gets b and the input gate -b, in a GRU
    the update gate z, which keeps the old state, gets b; the other gates get 0. It goes into
    `bias_ih`, and `bias_hh` becomes zero.

    Parameters
    ----------
    weights : mapping of str to ndarray
        The parameters of LSTM or GRU layers, `bias_ih_l0` and so on; written.
    hidden_size : int
        H; four gates i, f, g, o or three r, z, n are stacked.
    longest : float
        The longest span between a cause and its effect that is expected, in steps; above 2.
    rng : numpy.random.Generator
        Where the numbers come from.
    gate : int
        The place of f or z among the gates.

    References
    ----------
    C. Tallec and Y. Ollivier, "Can recurrent neural networks warp time?", ICLR 2018.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbptt import initialisers
    >>> weights = {"bias_ih_l0": np.ones(8), "bias_hh_l0": np.ones(8)}
    >>> initialisers.chrono(weights, 2, 100, np.random.default_rng(0))
    >>> i, f, g, o = weights["bias_ih_l0"].reshape(4, 2)
    >>> bool((f > 0).all() and (f < np.log(99)).all() and (i == -f).all())
    True
    """
    for name, weight in weights.items():
        if not name.startswith("bias"):
            continue
        weight.fill(0.0)
        if name.startswith("bias_ih"):
            gates = weight.reshape(-1, hidden_size)
            bias = np.log(rng.uniform(1.0, longest - 1.0, hidden_size))
            gates[gate] = bias
            if len(gates) == 4:
                gates[0] = -bias


def layer_norm(weights: Mapping[str, Array]) -> None:
    """Set what layer normalisation starts from: gains of one, and all biases zero (Ba et al. 2016).

    Parameters
    ----------
    weights : mapping of str to ndarray
        The parameters of layers, `weight_ln_ih_l0`, `bias_ih_l0` and so on; written.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbptt import initialisers
    >>> weights = {"weight_ln_ih_l0": np.zeros(2), "bias_ih_l0": np.ones(2)}
    >>> initialisers.layer_norm(weights)
    >>> weights["weight_ln_ih_l0"].tolist(), weights["bias_ih_l0"].tolist()
    ([1.0, 1.0], [0.0, 0.0])
    """
    for name, weight in weights.items():
        if name.startswith("weight_ln"):
            weight.fill(1.0)
        elif name.startswith("bias"):
            weight.fill(0.0)


LAYERS: dict[str, Callable[[Mapping[str, Array], int, np.random.Generator], None]] = {
    "uniform": uniform_layers,
    "orthogonal": orthogonal_layers,
}


def _fill(array: Array, draw: Callable[[int], Array]) -> None:
    flat = array.reshape(-1)
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK]
        block[...] = draw(block.size)
