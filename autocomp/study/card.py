"""The model card of a shipped folder: what it claims, and the digests of the files it claims it of."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from autocomp.budget import Budget
from autocomp.errors import AutocompError, RunError
from autocomp.outcome import Contender
from autocomp.policy import digest_of

__all__ = ["CARD", "Card", "DataCard", "sha256"]

FORMAT = 2
CARD = "card.json"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True, slots=True)
class DataCard:
    """The images behind a card's accuracy, and what a server has to do with its own.

    Attributes:
        source: as ``--data`` takes it.
        digest: of all splits.
        test_images: behind the accuracy; None where the source was not at hand. What follows is then what the run's
            settings say.
        mean, std: of the channels of pixels in [0, 1], which the model's images were normalised with; None where a
            dataset yields ready images, and where they are not known.
        size: side of the square images in pixels; None for their own size.
    """

    source: str
    digest: str
    test_images: int | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    size: int | None = None

    def to_json(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in ("source", "digest", "test_images", "size")}
        return {**plain, **{name: found and list(found) for name, found in (("mean", self.mean), ("std", self.std))}}


@dataclass(frozen=True)
class Card:
    """``card.json``.

    Attributes:
        budgets: asked for.
        verified: the model kept every budget on fresh engines.
        predicted: latencies are estimates.
        model, reference: rows of the run's closing table: the shipped model and the uncompressed one.
        data: behind the accuracy.
        device: that latencies belong to.
        config: the run's settings; engine, batch and threads among them.
        digests: of weights, data, graph, recipe and numerics.
        versions: package -> version.
        command: how the run was started.
        notes: of the run.
        files: name -> SHA-256 of every other file of the folder.
        training: behind the weights: ``recipe``, and the ``command`` that trains so after the search, null where the
            search did; None where there was none.
    """

    budgets: tuple[Budget, ...]
    verified: bool
    predicted: bool
    model: Contender
    reference: Contender
    data: DataCard
    device: Mapping[str, Any]
    config: Mapping[str, Any]
    digests: Mapping[str, str]
    versions: Mapping[str, str]
    command: Sequence[str]
    notes: Sequence[str]
    files: Mapping[str, str]
    training: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data; ``digest`` is over all other fields, so that a change by hand shows."""
        plain: dict[str, Any] = {
            "format": FORMAT,
            "budget": [str(budget) for budget in self.budgets],
            "verified": self.verified,
            "predicted": self.predicted,
            "model": self.model.to_json(),
            "reference": self.reference.to_json(),
            "data": self.data.to_json(),
            "device": dict(self.device),
            "config": dict(self.config),
            "digests": dict(self.digests),
            "versions": dict(self.versions),
            "command": list(self.command),
            "notes": list(self.notes),
            "files": dict(self.files),
            "training": None if self.training is None else dict(self.training),
        }
        return {**plain, "digest": digest_of(plain)}

    @classmethod
    def read(cls, folder: Path) -> tuple[Self, bool]:
        """The card of a shipped folder, and whether it is as it was written.

        Raises:
            RunError: there is none, or it cannot be read.
        """
        path = folder / CARD
        try:
            text = json.loads(path.read_text(encoding="utf-8"))
            if text["format"] != FORMAT:
                raise ValueError(f"format {text['format']}, this version reads {FORMAT}")
            plain = {name: value for name, value in text.items() if name not in ("format", "digest", "budget")}
            plain["budgets"] = tuple(Budget.parse(limit) for limit in text["budget"])
            plain["model"] = Contender.from_json("best", text["model"])
            plain["reference"] = Contender.from_json("reference", text["reference"])
            plain["data"] = DataCard(**text["data"])
            card = cls(**plain)
        except FileNotFoundError:
            raise RunError(f"{folder} was not shipped: it holds no {CARD}") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, AutocompError) as error:
            raise RunError(f"{path} is damaged or of another version ({error}): export the run again") from error
        return card, card.to_json() == text
