"""The loop over the updates of a run."""

from __future__ import annotations

import math
import os
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

import fastbptt as fb
from fastbptt.cli.data import Array, stream_starts
from fastbptt.cli.errors import RunError
from fastbptt.cli.interrupt import Interrupt
from fastbptt.cli.run import Run, all_finite

# A run that is killed, or whose loss becomes NaN, loses no more than a tenth of itself.
_SAVES = 0.1
_SHORTEST, _LONGEST = 2.0, 60.0


@dataclass
class Update:
    """What one update will change, computed while nothing was changed yet."""

    loss: float
    grads: dict[str, Array]
    state: Any


class Loop:
    """Updates of a run, one after the other, with a progress bar."""

    def __init__(self, run: Run, path: str, began: float, stop: Interrupt) -> None:
        self.run = run
        self.path = path
        self.stop = stop
        self.trained = 0
        self.seconds = 0.0
        self._began = began
        self._starts = stream_starts(run.data.targets, run.settings, run.data.unit)
        self._saved_steps: int | None = None
        # What an earlier command left in the file stays until this one has something better.
        self._next_save = self._later() if os.path.exists(path) else 0.0

    def train(self) -> None:
        """Go on to the limits of the run; weights, state and steps always belong together."""
        run, began = self.run, time.monotonic()
        terminal = sys.stderr.isatty()
        # An overflow ends the training with a message of its own.
        with (
            np.errstate(all="ignore"),
            tqdm(
                total=run.limits.steps,
                initial=run.steps,
                unit="update",
                file=sys.stderr,
                dynamic_ncols=True,
                mininterval=0.1 if terminal else 10.0,
            ) as bar,
        ):
            while not self._done():
                try:
                    with self.stop.breakable():
                        update = self._compute()
                except KeyboardInterrupt:
                    break
                self._check(update)
                if time.monotonic() >= self._next_save:
                    self.save()
                run.optimizer.lr = run.settings.learning_rate(run.steps)
                run.optimizer.step(update.grads)
                run.state = update.state
                run.steps += 1
                self.trained += run.settings.k1 * run.settings.batch
                self.seconds = time.monotonic() - began
                bar.set_postfix_str(self._progress(update.loss), refresh=False)
                bar.update()

    def save(self) -> None:
        """Write the run to its file."""
        self.run.save(self.path)
        self._saved_steps = self.run.steps
        self._next_save = self._later()

    def left(self) -> str:
        """Return what is in the file, for the message of a run that failed."""
        if self._saved_steps is not None:
            return f"{self.path!r} holds the model after {self._saved_steps} updates"
        return f"{self.path!r} is as it was before" if os.path.exists(self.path) else "none saved"

    def _done(self) -> bool:
        if self.stop.signal is not None:
            return True
        limits = self.run.limits
        if limits.steps is not None and self.run.steps >= limits.steps:
            return True
        late = limits.seconds is not None and time.monotonic() - self._began >= limits.seconds
        return late and self.trained > 0

    def _compute(self) -> Update:
        """Return loss and gradient of the next k1 steps, the gradient reaching back k2 steps."""
        run, settings = self.run, self.run.settings
        end = (run.steps + 1) * settings.k1
        begin = max(0, end - settings.k2)
        next_begin = max(0, end + settings.k1 - settings.k2)
        # A stream that reaches the start of the next one goes on into it: the text goes on there
        # too, and the state with it. Only the stream that reaches the end of all meets a seam.
        time_steps = np.arange(begin, end, dtype=np.int64)
        index = (self._starts[None, :] + time_steps[:, None]) % run.data.targets
        x, target, loss = run.data.window(index, end - begin - settings.k1)
        result = fb.value_and_grad(run.model, x, target, loss=loss, state=run.state)
        state = result.state
        if next_begin < end:
            # The next window begins inside this one: its state is the one this window had there.
            ahead = next_begin - begin
            state = run.model(x[:ahead], run.state)[1] if ahead else run.state
        return Update(float(result.loss), result.grads, state)

    def _check(self, update: Update) -> None:
        """Clip the gradient; end the training if it or the loss is not finite."""
        step = self.run.steps + 1
        if not math.isfinite(update.loss):
            raise RunError(
                f"the loss became {update.loss} at step {step}; training stopped, {self.left()}; "
                "a smaller --lr or --clip may help"
            )
        clip = self.run.settings.clip
        if clip:
            finite = math.isfinite(fb.clip_grad_norm(update.grads, clip))
        else:
            finite = all_finite(update.grads.values())
        if not finite:
            raise RunError(
                f"the loss is {update.loss:g} but its gradient became infinite or NaN at step "
                f"{step}; training stopped, {self.left()}; a smaller --lr or --clip may help"
            )

    def _progress(self, loss: float) -> str:
        data = self.run.data
        rate = self.trained / max(self.seconds, 1e-9)
        return f"{data.progress(loss)}, {rate:,.0f} {data.unit}s/s"

    def _later(self) -> float:
        now = time.monotonic()
        return now + min(max(_SAVES * (now - self._began), _SHORTEST), _LONGEST)
