"""Budgets: a limit on latency, size or work, absolute or relative to the uncompressed engine."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self, get_args

from autocomp.errors import BudgetError

__all__ = ["Budget", "Metric", "Statistic", "parse_budgets"]

Metric = Literal["latency", "size", "macs"]
Statistic = Literal["p50", "p95", "p99"]

_LATENCY_MS = {"s": 1e3, "ms": 1.0, "us": 1e-3, "µs": 1e-3}
_SIZE_BYTES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_MACS = {"macs": 1, "kmacs": 10**3, "mmacs": 10**6, "gmacs": 10**9}
_PATTERN = re.compile(
    r"(?:(?P<statistic>p\d+)\s*(?:<=|<|:)\s*)?"
    r"(?P<number>\d+(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+)\s*(?P<unit>[a-zµ%]*)",
    re.IGNORECASE,
)
_HINT = "write for example 15ms, p95:15ms, 0.5x, 50%, 4MB, 20MMACs or 0.5xMACs"


@dataclass(frozen=True, slots=True)
class Budget:
    """One limit a compressed model must keep.

    Attributes:
        metric: what is limited. Latency is of the real engine; size is the bytes of initializers in the
            shipped ONNX; macs are multiply-accumulates of one sample.
        limit: in ms, bytes or MACs; for a relative budget a fraction of the uncompressed fp32 engine's.
        relative: whether ``limit`` is a fraction in (0, 1] of the reference.
        statistic: the latency statistic judged; None for size and macs.
    """

    metric: Metric
    limit: float
    relative: bool = False
    statistic: Statistic | None = None

    def __post_init__(self) -> None:
        if self.metric not in get_args(Metric):
            raise BudgetError(f"unknown metric {self.metric!r} in a budget: use {', '.join(get_args(Metric))}")
        if self.statistic is not None and self.statistic not in get_args(Statistic):
            raise BudgetError(f"unknown statistic {self.statistic!r} in a budget: use {', '.join(get_args(Statistic))}")
        if not 0 < self.limit < float("inf"):
            raise BudgetError(f"a budget must be a positive number: {_HINT}")
        if self.relative and self.limit > 1:
            raise BudgetError(
                f"a relative budget is a fraction of the uncompressed model, at most 1x: for {self.limit:g} times "
                f"faster or smaller write {1 / self.limit:.3g}x"
            )
        if (self.metric == "latency") != (self.statistic is not None):
            raise BudgetError("a statistic (p50, p95, p99) belongs to a latency budget, and only there")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``15ms``, ``900us``, ``0.015s``, ``0.5x``, ``50%``, ``p95<15ms``, ``p95:15ms``, ``4MB``,
        ``20MMACs``, ``0.5xMACs`` or ``0.5xMB``. Latency is judged at p50 where no statistic is given.

        Raises:
            BudgetError: the text does not parse, or names an unknown statistic or a factor above 1.
        """
        match = _PATTERN.fullmatch(text.strip().replace("μ", "µ"))  # Greek mu -> micro sign
        if match is None:
            raise BudgetError(f"cannot read the budget {text!r}: {_HINT}")
        number, unit = float(match["number"]), match["unit"].lower()
        statistic = match["statistic"].lower() if match["statistic"] else None
        if statistic not in (None, "p50", "p95", "p99"):
            raise BudgetError(f"unknown statistic {statistic!r} in the budget {text!r}: use p50, p95 or p99")
        metric, limit, relative = _resolve(number, unit, text)
        if metric != "latency":
            if statistic is not None:
                raise BudgetError(f"{statistic} in {text!r} has no meaning for {metric}: only latency has statistics")
            return cls(metric, limit, relative)
        return cls(metric, limit, relative, statistic or "p50")  # type: ignore[arg-type]

    @classmethod
    def from_json(cls, data: dict[str, object]) -> Self:
        """Raises: BudgetError if the data is no budget."""
        try:
            return cls(**data)  # type: ignore[arg-type]
        except TypeError as error:
            raise BudgetError(f"this is no budget: {error}") from error

    def to_json(self) -> dict[str, object]:
        return {"metric": self.metric, "limit": self.limit, "relative": self.relative, "statistic": self.statistic}

    def limit_for(self, reference: float) -> float:
        """The absolute limit, given the reference's value in the same unit."""
        return self.limit * reference if self.relative else self.limit

    def violation(self, value: float, reference: float) -> float:
        """``value / limit - 1``: at most 0 where the budget holds."""
        return value / self.limit_for(reference) - 1.0

    def __str__(self) -> str:
        """Short, and `parse` reads back an equal budget."""
        if self.metric == "latency":
            text = f"{_exact(self.limit)}{'x' if self.relative else 'ms'}"
            return text if self.statistic == "p50" else f"{self.statistic}:{text}"
        base, large = ("B", "MB") if self.metric == "size" else ("MACs", "MMACs")
        if self.relative:
            return f"{_exact(self.limit)}x{'MB' if self.metric == 'size' else 'MACs'}"
        millions = f"{self.limit / 10**6:.12g}"
        return f"{millions}{large}" if float(millions) * 10**6 == self.limit else f"{_exact(self.limit)}{base}"


def _exact(number: float) -> str:
    """As few digits as tell the number from every other."""
    short = f"{number:g}"
    return short if float(short) == number else repr(float(number))


def _resolve(number: float, unit: str, text: str) -> tuple[Metric, float, bool]:
    if unit == "x":
        return "latency", number, True
    if unit == "%":
        return "latency", number / 100, True
    if unit == "xmacs":
        return "macs", number, True
    if unit == "xmb":
        return "size", number, True
    if unit in _LATENCY_MS:
        return "latency", number * _LATENCY_MS[unit], False
    if unit in _SIZE_BYTES:
        return "size", number * _SIZE_BYTES[unit], False
    if unit in _MACS:
        return "macs", number * _MACS[unit], False
    reason = "it has no unit" if not unit else f"unknown unit {unit!r}"
    raise BudgetError(f"cannot read the budget {text!r} ({reason}): {_HINT}")


def parse_budgets(texts: Sequence[str]) -> tuple[Budget, ...]:
    """Parse all of a command's budgets; every one must hold.

    Raises:
        BudgetError: none was given, one does not parse, or two limit the same thing.
    """
    if not texts:
        raise BudgetError(f"no budget was given: {_HINT}")
    budgets = tuple(Budget.parse(text) for text in texts)
    seen: set[tuple[str, bool, str | None]] = set()
    for budget in budgets:
        key = (budget.metric, budget.relative, budget.statistic)
        if key in seen:
            raise BudgetError(f"two budgets limit the same thing; keep the smaller one of those like {budget}")
        seen.add(key)
    return budgets
