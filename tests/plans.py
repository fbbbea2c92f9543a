"""What tests of plans share: a run of a plan without data."""

from __future__ import annotations


class Simulator:
    """Follows a plan without data: which states exist, and how far each loss is carried back."""

    def __init__(self, T):
        self.T = T
        self.t = self.furthest = 0
        self.stored = set()
        self.piles = []
        self.loss_steps = []
        self.reach = {}  # the window of a step with a loss: the first step its gradient gets to
        self.recorded = []
        self.advanced = self.most_recorded = self.most_stored = 0
        self.error_at = None

    def run(self, plan):
        for action in plan:
            t0, t1 = action.t0, action.t1
            if action.verb in ("advance", "record"):
                assert self.t == t0 < t1 <= self.T, action
                self.t = t1
                self.furthest = max(self.furthest, t1)
                if action.verb == "record":
                    self.piles.append((t0, t1))
                    self.recorded.append((t0, t1))
                else:
                    self.advanced += t1 - t0
            elif action.verb == "store":
                assert self.t == t0 == t1, action
                assert t0 not in self.stored, action
                self.stored.add(t0)
            elif action.verb == "restore":
                assert t0 in self.stored, action
                self.t = t0
                if action.last:
                    self.stored.remove(t0)
            else:
                self.reverse(action)
            self.most_recorded = max(self.most_recorded, sum(b - a for a, b in self.piles))
            self.most_stored = max(self.most_stored, len(self.stored))
        assert not self.piles
        # Each state was released by a restore: none was stored in vain.
        assert not self.stored
        assert self.furthest == self.T
        assert sorted(self.loss_steps) == list(range(self.T))
        return self

    def reverse(self, action):
        assert self.piles.pop() == (action.t0, action.t1), action
        begin = action.t0 if action.loss_from is None else action.loss_from
        assert action.t0 <= begin <= action.t1
        if self.error_at != action.t1:
            self.carried = []
        self.carried += range(begin, action.t1)
        self.loss_steps += range(begin, action.t1)
        self.reach |= dict.fromkeys(self.carried, action.t0)
        self.error_at = action.t0
