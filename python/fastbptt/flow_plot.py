"""Pictures of gradient flows; matplotlib is imported when one is drawn."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastbptt._arrays import Array
from fastbptt.diagnostics import GradientFlow


def compare(flows: Mapping[str, GradientFlow], title: str = "") -> Any:
    """Draw flows beside each other, norm against distance on a logarithmic scale.

    Parameters
    ----------
    flows : mapping of str to GradientFlow
        By what to call them.
    title : str
        Above the picture.

    Returns
    -------
    matplotlib.figure.Figure
        dL/dh and, dashed, dL/dc on the left; what each step adds to the gradients of the recurrent
        matrices on the right, or of all parameters if there is but one flow.

    Raises
    ------
    ImportError
        matplotlib is not installed.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbptt as fb
    >>> from fastbptt.flow_plot import compare
    >>> one = fb.GradientFlow(loss=1.0, h=np.array([[1e-6, 1e-3, 1.0]]), c=None)
    >>> two = fb.GradientFlow(loss=1.0, h=np.array([[0.1, 0.5, 1.0]]), c=None)
    >>> len(compare({"RNN": one, "LSTM": two}).axes)
    1
    """
    with_weights = any(flow.weights for flow in flows.values())
    figure = _figure((11, 4.5) if with_weights else (6.5, 4.5))
    states, *rest = figure.subplots(1, 2 if with_weights else 1, squeeze=False)[0]
    draw_states(states, flows)
    for axes in rest:
        _draw_weights(axes, flows)
    if title:
        figure.suptitle(title)
    return figure


def draw_states(axes: Any, flows: Mapping[str, GradientFlow]) -> None:
    """Draw dL/dh and, dashed, dL/dc of each flow and layer into axes of matplotlib."""
    colour = 0
    for name, flow in flows.items():
        for layer, norms in enumerate(flow.h):
            of = f", layer {layer}" if len(flow.h) > 1 else ""
            style: dict[str, Any] = {"color": f"C{colour}"}
            _line(axes, flow, norms, f"{name} dL/dh{of}".strip(), **style)
            if flow.c is not None:
                style["linestyle"] = "--"
                _line(axes, flow, flow.c[layer], f"{name} dL/dc{of}".strip(), **style)
            colour += 1
    _finish(axes, flows, "norm of the gradient of a state")


def _draw_weights(axes: Any, flows: Mapping[str, GradientFlow]) -> None:
    for name, flow in flows.items():
        for parameter, norms in flow.weights.items():
            if len(flows) == 1 or "weight_hh" in parameter:
                _line(axes, flow, norms, f"{name} {parameter}".strip())
    _finish(axes, flows, "norm of what a step adds to the gradient")


def _line(axes: Any, flow: GradientFlow, norms: Array, label: str, **style: Any) -> None:
    # A logarithmic scale has no place for zero.
    axes.plot(flow.distance, np.where(norms > 0.0, norms, np.nan), label=label, **style)


def _finish(axes: Any, flows: Mapping[str, GradientFlow], label: str) -> None:
    all_targets = any(flow.all_targets for flow in flows.values())
    until = "the last step" if all_targets else "the target"
    axes.set(yscale="log", xlabel=f"steps before {until}", ylabel=label)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize="small")


def _figure(size: tuple[float, float]) -> Any:
    try:
        # Not through pyplot, which looks for a screen.
        module = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ImportError(
            "plot: matplotlib is not installed; wanted: pip install 'fastbptt[plot]'"
        ) from error
    return module.Figure(figsize=size, layout="constrained")
