"""The command line's grammar: commands, options, and what each value may be."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import NoReturn

from fastbptt import __version__
from fastbptt.bench.libraries import LIBRARIES, PRECISIONS, installed
from fastbptt.bench.problems import suites
from fastbptt.cli.errors import UsageError
from fastbptt.cli.settings import (
    CELLS,
    DEFAULT_SECONDS,
    DEFAULT_STEPS,
    DEFAULTS,
    LEARNING_RATES,
)

DEFAULT_MODEL = "fastbptt.safetensors"

_TEXT = DEFAULTS["text"]
_SERIES = DEFAULTS["series"]

_TRAIN = f"""\
Train a network on a text, character by character, or on a column of numbers.

Without FILE the text is that of the Python documentation topics that every CPython carries. A
character is a Unicode code point. The last tenth is held out: the network never learns from it,
and the summary says how many bits per character it costs (bpc), beside two yardsticks: all
characters alike (uniform), and a table of the frequencies in the training part with one added to
each count (unigram). All three price the same characters: those of the whole text, so that one
that occurs in the held-out part alone is paid for in full by each of them.

The text is cut into --batch streams that are read side by side, --k1 characters an update; the
state goes from one update into the next. With --k2 above --k1 the gradient of those characters
reaches back over the --k2 characters that end with them.

Without --steps and --seconds training ends after {DEFAULT_STEPS} updates
or {DEFAULT_SECONDS:.0f} seconds; for a series after some forty passes, if that is less.
Ctrl-C ends it early and saves the model; --resume goes on from there, to the bits of a run that
was never stopped (on the same machine, with the same number of threads)."""

_SAMPLE = "Write text with a model that `fastbptt train` has saved."

_BENCH = """\
Time a training step (forward, then all gradients) of a recurrent layer, in this library and in
NumPy, torch and JAX where they are installed.

The libraries take turns in one process, each held to the same threads, after their results have
been found to be the same; a time is the median of the runs. GFLOP/s count the operations of the
matrix products, 3 * 2*T*B * G*H * (I+H). `x ours` is the time over this library's. `of matrix` is
the share of the rate at which this machine multiplies two large matrices, measured in turn with
the rest, through NumPy or torch, whichever is faster.

With --memory it measures what a step of a whole training problem takes (the layer, a linear
readout, the mean squared error; x and target are memory maps) with the schedules Full,
Checkpointed and Truncated, and with torch: for each problem at T = 100, 1000 and so on up to its
own T, each point in a fresh process. The peak is the growth of the process's anonymous memory;
allocated is what this library itself held at most. What would take long, or more memory than
there is, is left out.

T is steps, B rows of the batch, I inputs and H hidden units."""

_FLOW = """\
Show how large the gradient of a loss is at each step on its way back through time.

The loss is that of the last of --steps steps, the mean over --rows rows. For each layer, the norm
of dL/dh at the target and at the first step, over how many steps it halves, and whether it has
vanished or exploded on the way, by a factor of 1000. The picture shows dL/dh and dL/dc at each
step, and what each step adds to the gradients of the parameters.

With a MODEL that `fastbptt train` has saved, x and target are stretches of what it was trained on,
evenly apart; FILE or --series says where that is now, if it has moved. With another model, or with
--random, they are noise. Without MODEL a new RNN, LSTM and GRU are compared, on noise."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix("argument "))


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line; it raises `UsageError`."""
    top = _Parser(
        prog="fastbptt",
        description="Train recurrent networks on the CPU by backpropagation through time.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"fastbptt {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_train(
        commands.add_parser(
            "train",
            help="train a network on a text or a series and save it",
            description=_TRAIN,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
    )
    _add_sample(
        commands.add_parser(
            "sample",
            help="write text with a saved model",
            description=_SAMPLE,
            allow_abbrev=False,
        )
    )
    _add_bench(
        commands.add_parser(
            "bench",
            help="time training steps beside NumPy, torch and JAX",
            description=_BENCH,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
    )
    _add_flow(
        commands.add_parser(
            "flow",
            help="show how far back in time the gradient of a model reaches",
            description=_FLOW,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
    )
    return top


def _add_train(train: argparse.ArgumentParser) -> None:
    train.add_argument("file", nargs="?", metavar="FILE", help="a UTF-8 text")

    data = train.add_argument_group("a series in place of a text")
    data.add_argument("--series", metavar="FILE.csv", help="a table whose first line names columns")
    data.add_argument(
        "--column",
        metavar="NAME",
        help="the numeric column to forecast one row ahead; scaled by the mean and deviation of "
        "its training part, its last tenth is held out",
    )

    net = train.add_argument_group("the network")
    net.add_argument("--cell", choices=CELLS, help=f"default {_TEXT['cell']}")
    net.add_argument("--hidden", type=whole(1), metavar="N", help=_default("hidden"))
    net.add_argument(
        "--embedding",
        type=whole(1),
        metavar="N",
        help=f"numbers that stand for a character, default {_TEXT['embedding']} (text only)",
    )
    net.add_argument("--layers", type=whole(1), metavar="N", help=_default("layers"))

    how = train.add_argument_group("training")
    how.add_argument(
        "--batch",
        type=whole(1),
        metavar="N",
        help=f"streams side by side, {_default('batch')}, fewer where the data is short",
    )
    how.add_argument("--k1", type=whole(1), metavar="N", help=f"steps an update, {_default('k1')}")
    how.add_argument(
        "--k2", type=whole(1), metavar="N", help="steps the gradient reaches back, default k1"
    )
    how.add_argument(
        "--optimizer", choices=tuple(LEARNING_RATES), help=f"default {_TEXT['optimizer']}"
    )
    rates = ", ".join(f"{rate:g} for {name}" for name, rate in LEARNING_RATES.items())
    how.add_argument(
        "--lr", type=real(0.0, above=True), metavar="X", help=f"learning rate, default {rates}"
    )
    how.add_argument(
        "--lr-decay",
        type=whole(0),
        metavar="N",
        help="updates after which the learning rate is a half, after twice as many a third, and "
        f"so on; 0: it stays, {_default('lr_decay')}",
    )
    how.add_argument(
        "--clip",
        type=real(0.0),
        metavar="X",
        help=f"largest norm of the gradient, 0 for none, {_default('clip')}",
    )
    how.add_argument(
        "--seed", type=whole(0), metavar="N", help=f"of the first weights, {_default('seed')}"
    )
    how.add_argument(
        "--threads", type=whole(1, 1024), metavar="N", help="default: all that the process may use"
    )
    how.add_argument(
        "--steps", type=whole(1), metavar="N", help="updates in total, those before --resume too"
    )
    how.add_argument(
        "--seconds",
        type=real(0.0, above=True),
        metavar="X",
        help="wall time to train for, in this command",
    )

    out = train.add_argument_group("files")
    out.add_argument(
        "--save",
        metavar="MODEL",
        help=f"default {DEFAULT_MODEL} in this folder, or the file that --resume names",
    )
    out.add_argument(
        "--resume",
        metavar="MODEL",
        help="go on with a saved run, by its own settings and on its own text",
    )
    out.add_argument("--json", metavar="FILE", help="write the summary here too, as JSON")


def _add_sample(sample: argparse.ArgumentParser) -> None:
    sample.add_argument("model", metavar="MODEL", help="a file that `fastbptt train` has saved")
    sample.add_argument("--prompt", default="", metavar="TEXT", help="the text to go on from")
    sample.add_argument(
        "--length", type=whole(0), default=500, metavar="N", help="characters, default 500"
    )
    sample.add_argument(
        "--temperature",
        type=real(0.0),
        default=0.8,
        metavar="X",
        help="below 1 likelier characters, above 1 wilder ones, 0 always the likeliest; "
        "default 0.8",
    )
    sample.add_argument("--seed", type=whole(0), metavar="N", help="default: another each time")


def _add_bench(bench: argparse.ArgumentParser) -> None:
    bench.add_argument(
        "--cell",
        type=some_of(CELLS),
        default=CELLS,
        metavar="NAMES",
        help="with commas between, default " + ",".join(CELLS),
    )
    what = bench.add_mutually_exclusive_group()
    what.add_argument(
        "--problem",
        type=sizes,
        action="append",
        metavar="T,B,I,H",
        help="may be given several times; with --memory default 1000000,1,64,64",
    )
    what.add_argument(
        "--suite",
        type=some_of(suites()),
        metavar="NAMES",
        help=f"problems of a table, {', '.join(suites())}, with commas between; default small",
    )
    bench.add_argument(
        "--beside",
        type=_peers,
        default=tuple(name for name in LIBRARIES[1:] if installed(name)),
        metavar="NAMES",
        help=f"of {', '.join(LIBRARIES[1:])}, with commas between, or none; default: those that "
        "are installed",
    )
    bench.add_argument(
        "--threads", type=whole(1, 1024), default=1, metavar="N", help="of every library, default 1"
    )
    bench.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    bench.add_argument(
        "--precision",
        action="store_true",
        help="also at lower precisions of float32 products, and in bfloat16: "
        + ", ".join(PRECISIONS),
    )
    bench.add_argument(
        "--seconds",
        type=real(0.0, above=True),
        default=2.0,
        metavar="X",
        help="to measure for, in all, for each cell and problem, default 2; each library runs "
        "a few times at least",
    )
    bench.add_argument(
        "--memory",
        action="store_true",
        help="measure memory against T in place of rates; three minutes by default",
    )
    bench.add_argument("--json", metavar="FILE", help="write what was measured here too, as JSON")
    bench.add_argument(
        "--plot",
        metavar="FILE.png",
        help="also measure the first problem at several T, and draw time and peak memory against "
        "T; takes matplotlib and some minutes. With --memory: draw what is measured of the first",
    )


def _add_flow(flow: argparse.ArgumentParser) -> None:
    flow.add_argument("model", nargs="?", metavar="MODEL", help="a saved model")
    flow.add_argument("file", nargs="?", metavar="FILE", help="the text it was trained on")
    flow.add_argument("--series", metavar="FILE.csv", help="the table it was trained on")
    flow.add_argument("--column", metavar="NAME", help="the column of the table")
    flow.add_argument("--random", action="store_true", help="noise in place of the data")
    flow.add_argument(
        "--steps", type=whole(1), default=200, metavar="N", help="up to the target, default 200"
    )
    flow.add_argument("--rows", type=whole(1), default=16, metavar="N", help="default 16")
    flow.add_argument(
        "--targets",
        choices=("last", "all"),
        default="last",
        help="whose loss: of the last step (default) or of all; of all, only growth can be told",
    )
    flow.add_argument("--hidden", type=whole(1), metavar="N", help="without MODEL; default 64")
    flow.add_argument("--seed", type=whole(0), default=0, metavar="N", help="default 0")
    flow.add_argument(
        "--plot", metavar="FILE.png", default="flow.png", help="the picture, default flow.png"
    )
    flow.add_argument("--json", metavar="FILE", help="write the norms here too, as JSON")


def some_of(choices: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """Return a reader of names with commas between; the names are in the order of `choices`."""

    def read(text: str) -> tuple[str, ...]:
        names = text.split(",")
        if not set(names) <= set(choices):
            raise argparse.ArgumentTypeError(f"got {text!r}, wanted some of {','.join(choices)}")
        return tuple(name for name in choices if name in names)

    return read


def sizes(text: str) -> tuple[int, int, int, int]:
    """Read `T,B,I,H`."""
    try:
        T, B, I, H = map(int, text.split(","))  # noqa: E741
    except ValueError:
        T = B = I = H = 0  # noqa: E741
    if min(T, B, I, H) < 1:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, wanted T,B,I,H, four whole numbers of at least 1"
        )
    return T, B, I, H


def _peers(text: str) -> tuple[str, ...]:
    if text == "none":
        return ()
    names = some_of(LIBRARIES[1:])(text)
    for name in names:
        if not installed(name):
            raise argparse.ArgumentTypeError(f"got {text!r}, but {name} is not installed")
    return names


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return a reader of whole numbers of at least `least` and at most `most`."""
    wanted = f"a whole number of at least {least}"
    if most is not None:
        wanted = f"a whole number from {least} to {most}"

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"got {text!r}, wanted {wanted}")
        return value

    return read


def real(least: float, *, above: bool = False) -> Callable[[str], float]:
    """Return a reader of finite numbers of at least `least`, or above it."""
    wanted = f"a number above {least:g}" if above else f"a number of at least {least:g}"

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < least or (above and value == least):
            raise argparse.ArgumentTypeError(f"got {text!r}, wanted {wanted}")
        return value

    return read


def _default(name: str) -> str:
    text, series = _TEXT[name], _SERIES[name]
    return f"default {text}" if text == series else f"default {text} ({series} for a series)"
