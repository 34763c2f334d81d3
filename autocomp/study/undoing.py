"""Types of layers that cost time, taken back: a search's last proposals."""

from collections.abc import Callable, Sequence

from autocomp.policy import Policy
from autocomp.protocols import Controller
from autocomp.results import TrialResult

__all__ = ["Undoing"]


class Undoing:
    """A controller whose last proposals are the best found so far, without the types that cost time there.

    What is timed are whole engines, in which one layer that int8 slows down hides among others that it makes faster.
    A profile tells them apart; whether it is right is for a trial of the policy without them, like any other.
    """

    def __init__(self, inner: Controller, undone: Callable[[Policy], Policy], trials: int, last: int) -> None:
        """Args:
        inner: proposes all that is not known to need this.
        undone: a policy without the types that cost time, itself where there are none.
        trials: distinct policies that the search will evaluate.
        last: of these at most so many are kept for policies with types taken back.
        """
        self._inner = inner
        self._undone = undone
        self._trials = trials
        self._last = last
        self._results: dict[Policy, TrialResult] = {}

    def ask(self, count: int) -> list[Policy]:
        open_ones = self._trials - len(self._results) - self._last
        asked = self._inner.ask(min(count, open_ones)) if open_ones > 0 else []
        return asked or self._taken_back()[:count] or self._inner.ask(count)

    def tell(self, results: Sequence[TrialResult]) -> None:
        self._results |= {result.policy: result for result in results}
        self._inner.tell(results)

    def _taken_back(self) -> list[Policy]:
        """Of as many of the best as are looked at, those that have something to take back, without it."""
        feasible = [(r.objective, r.policy) for r in self._results.values() if r.feasible and r.objective is not None]
        best = [policy for _, policy in sorted(feasible, key=lambda entry: entry[0])[: self._last]]
        return [policy for policy in dict.fromkeys(map(self._undone, best)) if policy not in self._results]
