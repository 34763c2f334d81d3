"""From a configuration to a model, its data, and its graph."""

from dataclasses import replace
from pathlib import Path

from autocomp.compress import Traced, to_tensor, trace
from autocomp.config import SearchConfig
from autocomp.data import DataOptions, Splits, load_data
from autocomp.errors import DataError, ModelError
from autocomp.models import LoadedModel, check_logits, load_model
from autocomp.outcome import Observer, Phase
from autocomp.rows import parts_of

__all__ = ["data_options", "load"]


def load(
    config: SearchConfig, observer: Observer, model: LoadedModel | None = None, splits: Splits | None = None
) -> tuple[LoadedModel, Splits, Traced]:
    """Load data and model, refuse those that do not fit each other, and trace.

    Args:
        model, splits: live objects in place of ``config.model`` and ``config.data``.

    Raises:
        ModelError, DataError: they cannot be loaded, or do not fit each other.
    """
    if splits is None:
        splits = load_data(config.data, data_options(config))
    if model is None:
        weights = Path(config.weights) if config.weights is not None else None
        embedded = config.data == "digits" and config.model == "zoo:resnet20" and weights is None
        model = load_model(config.model, weights, splits.classes, embedded=embedded, output_key=config.output_key)
    if model.weights is None and splits.labelled:
        raise ModelError(f"{model.spec} has no trained weights: give --weights FILE, or use random: data")
    if not splits.labelled:
        model = replace(model, classes=None)  # outputs need not be logits of the data's classes
    check_logits(model, splits.input_shape, splits.inputs)
    observer(Phase("trace"))
    example = to_tensor(next(iter(splits.calibration.batches(2)))[0])
    traced = trace(model.module, parts_of(example, splits.inputs) if splits.inputs else example)
    classes = traced.graph.output_shape[-1]
    if splits.labelled and classes < splits.classes:
        raise DataError(
            f"the labels of {splits.source} name {splits.classes} classes, the model has {classes} outputs: "
            "choose data or a model that fit each other"
        )
    return model, splits, traced


def data_options(config: SearchConfig) -> DataOptions:
    """How a configuration draws and normalises its data."""
    return DataOptions(
        mean=config.mean,
        std=config.std,
        size=config.size,
        calibration=config.calibration_images,
        search=config.search_images,
        selection=config.selection_images,
        seed=config.seed,
    )
