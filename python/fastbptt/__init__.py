"""Fast, frugal backpropagation through time for RNN, LSTM and GRU on the CPU.

Examples
--------
>>> import numpy as np
>>> import fastbptt as fb
>>> model = fb.Model(fb.Embedding(10, 8, seed=0), fb.LSTM(8, 16, seed=1), fb.Linear(16, 10))
>>> optimizer = fb.Adam(model.parameters(), lr=0.01)
>>> text = np.arange(200).reshape(50, 4) % 10
>>> for step in range(50):
...     result = fb.value_and_grad(model, text[:-1], text[1:])
...     optimizer.step(result.grads)
>>> result.loss < 1.0
True
"""

from importlib.metadata import version as _version

from fastbptt.checkpointing import Checkpointed
from fastbptt.comparison import segmentation_error
from fastbptt.diagnostics import GradientFlow, gradient_flow
from fastbptt.embedding import Embedding
from fastbptt.layers import GRU, LSTM, RNN
from fastbptt.linear import Linear
from fastbptt.model import Model
from fastbptt.online import RTRL, UORO, EProp, SnAp1
from fastbptt.optimizers import SGD, Adam, RMSprop, clip_grad_norm
from fastbptt.runtime import (
    cpu_info,
    get_float32_matmul_precision,
    get_num_threads,
    set_float32_matmul_precision,
    set_num_threads,
)
from fastbptt.schedules import Full, Truncated
from fastbptt.segmented import Segmented
from fastbptt.storage import load, save
from fastbptt.stream import Stream
from fastbptt.training import each_window, evaluate, value_and_grad

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "RTRL",
    "SGD",
    "UORO",
    "Adam",
    "Checkpointed",
    "EProp",
    "Embedding",
    "Full",
    "GradientFlow",
    "Linear",
    "Model",
    "RMSprop",
    "Segmented",
    "SnAp1",
    "Stream",
    "Truncated",
    "__version__",
    "clip_grad_norm",
    "cpu_info",
    "each_window",
    "evaluate",
    "get_float32_matmul_precision",
    "get_num_threads",
    "gradient_flow",
    "load",
    "save",
    "segmentation_error",
    "set_float32_matmul_precision",
    "set_num_threads",
    "value_and_grad",
]

__version__ = _version("fastbptt")
