"""How an engine's outputs compare with the uncompressed model's: divergence, accuracy, paired intervals."""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax, softmax

from autocomp.data import Split
from autocomp.errors import ConfigError, EngineError
from autocomp.factory import import_callable, is_factory
from autocomp.protocols import Engine
from autocomp.results import Interval, Score

__all__ = [
    "Floats",
    "Metric",
    "Predictions",
    "Scorer",
    "kl_divergence",
    "load_metric",
    "measured",
    "paired_interval",
    "predict",
    "predictions",
]

Floats = NDArray[np.float32]
Metric = Callable[[Floats, Floats, NDArray[np.int64]], float]
"""(outputs, the uncompressed model's outputs, labels) -> a number to minimise.

Outputs are those of engines, (n, outputs), logits of classes or not. Labels are (n,): where the data has none, the
index of each image in its dataset, by which a metric can look up what belongs to it.
"""


@dataclass(frozen=True, slots=True)
class Predictions:
    """An engine's outputs (n, outputs) on a split, logits of classes or not, with the labels (n,)."""

    logits: Floats
    labels: NDArray[np.int64]

    @property
    def correct(self) -> NDArray[np.bool_]:
        return np.asarray(self.logits.argmax(axis=1) == self.labels)

    @property
    def accuracy(self) -> float:
        """Top-1, in [0, 1]."""
        return float(self.correct.mean())


def predict(engine: Engine, split: Split, batch: int = 256) -> Predictions:
    """Run a whole split through an engine, ``batch`` images at a time.

    Raises:
        EngineError: the engine returned something not finite.
    """
    return predictions(engine.run, split, batch)


def predictions(run: Callable[[Floats], Floats], split: Split, batch: int = 256) -> Predictions:
    """The same of anything that turns images into outputs."""
    logits, labels = [], []
    for images, target in split.batches(batch):
        logits.append(run(images))
        labels.append(target)
    outputs = np.concatenate(logits)
    if not np.isfinite(outputs).all():
        raise EngineError(
            "the engine returned NaN or infinite logits: check how the images are normalised, or keep the most "
            "sensitive layers in fp32"
        )
    return Predictions(outputs, np.concatenate(labels))


def kl_divergence(outputs: Floats, reference: Floats, labels: NDArray[np.int64]) -> float:
    """Mean Kullback-Leibler divergence of the softmax outputs from the reference's, in nats; needs no labels."""
    del labels
    wide, wide_reference = outputs.astype(np.float64), reference.astype(np.float64)
    terms = softmax(wide_reference, axis=1) * (log_softmax(wide_reference, axis=1) - log_softmax(wide, axis=1))
    return float(max(terms.sum(axis=1).mean(), 0.0))


def load_metric(spec: str) -> Metric:
    """``kl``, or ``package.module:function`` with the signature of `Metric`.

    Raises:
        ConfigError: nothing to call under that name.
    """
    if spec == "kl":
        return kl_divergence
    if not is_factory(spec):
        raise ConfigError(f"no metric {spec!r}: use kl, or package.module:function")
    try:
        return import_callable(spec, ConfigError, "use kl")  # type: ignore[return-value]
    except ConfigError as error:
        raise ConfigError(f"no metric {spec!r}: {error}") from error


def measured(metric: Metric, outputs: Floats, reference: Floats, labels: NDArray[np.int64]) -> float:
    """What a metric says. Raises: EngineError if it fails, or says no finite number."""
    try:
        found = float(metric(outputs, reference, labels))
    except Exception as error:  # the user's code may fail in any way
        raise EngineError(f"the metric raised {type(error).__name__}({error}): mend it and try again") from error
    if not np.isfinite(found):
        raise EngineError(f"the metric returned {found}: the model's outputs cannot be compared")
    return found


@dataclass(frozen=True)
class Scorer:
    """Scores engines on one split against the uncompressed engine's outputs there."""

    split: Split
    reference: Predictions
    labelled: bool
    metric: Metric = kl_divergence

    @property
    def classifies(self) -> bool:
        """Whether outputs are logits of classes: labels say so, or a metric that takes them for such."""
        return self.labelled or self.metric is kl_divergence

    def score(self, engine: Engine) -> Score:
        return self.of(predict(engine, self.split))

    def of(self, found: Predictions) -> Score:
        """Raises: EngineError if the metric is not a finite number."""
        divergence = measured(self.metric, found.logits, self.reference.logits, found.labels)
        alike = float((found.logits.argmax(axis=1) == self.reference.logits.argmax(axis=1)).mean())
        accuracy, agreement = found.accuracy if self.labelled else None, alike if self.classifies else None
        return Score(divergence, accuracy, len(found.labels), agreement)


def paired_interval(found: Predictions, reference: Predictions) -> Interval:
    """Difference in accuracy on the same images with its 95% interval.

    The interval is Agresti and Min's for matched proportions (Statistics in Medicine 2005, section 3: half a count
    is added to each cell), which stays honest when few or no images differ.
    """
    better = int((found.correct & ~reference.correct).sum())
    worse = int((~found.correct & reference.correct).sum())
    total = len(found.labels)
    centre = (better - worse) / (total + 2)
    spread = sqrt((better + worse + 1) - (better - worse) ** 2 / (total + 2)) / (total + 2)
    return Interval((better - worse) / total, centre - 1.959964 * spread, centre + 1.959964 * spread)
