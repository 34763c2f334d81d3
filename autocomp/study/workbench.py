"""Everything a search works with, made ready once: model, data, graph, statistics, engine files."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocomp import resources
from autocomp.capabilities import Capabilities, Numerics
from autocomp.compress import (
    Compressed,
    Statistics,
    Traced,
    calibration_notes,
    collect,
    compress,
    equalize,
    export_compressed,
    export_onnx,
    footprint,
    kept_outputs,
    logits_of,
    structure,
    to_tensor,
)
from autocomp.config import SearchConfig
from autocomp.controllers import CONTROLLERS
from autocomp.data import Split, Splits
from autocomp.engines import BackendSpec, Template, emit, load_template, with_codes, with_shapes
from autocomp.engines.label import labelled
from autocomp.errors import CompressError, ConfigError, EngineError, InputError, ModelError
from autocomp.graph import LayerGraph
from autocomp.memory import refuse_larger
from autocomp.models import LoadedModel
from autocomp.outcome import Observer, Phase
from autocomp.policy import Policy, Precision, Recipe
from autocomp.protocols import Backend, Engine
from autocomp.space import PolicySpace, SearchSpace
from autocomp.study.loading import load
from autocomp.study.predicted import target_of
from autocomp.study.score import load_metric
from autocomp.study.worker import Emitter

__all__ = [
    "EditEmitter",
    "ExportEmitter",
    "Workbench",
    "backend_spec",
    "chance_limit",
    "first_images",
    "package_versions",
    "prepare",
]

PARITY = 1e-3
"""Largest relative L2 error between torch and the engine on the uncompressed fp32 model."""
PACKAGES = ("autocomp", "torch", "onnx", "onnxruntime", "openvino", "optuna", "numpy", "scipy")

Images = NDArray[np.float32]


@dataclass(frozen=True)
class _Compressor:
    """Model, statistics and recipes: all that turns a policy into weights."""

    traced: Traced
    statistics: Statistics
    recipe: Recipe
    finishing: Recipe
    numerics: Numerics
    images: Images
    finished: dict[Policy, Compressed] = field(default_factory=dict, kw_only=True, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """To travel without what is computed sooner than sent."""
        return {**self.__dict__, "statistics": replace(self.statistics, outputs={}), "finished": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        outputs = kept_outputs(state["traced"], to_tensor(state["images"]))
        self.__dict__.update(state, statistics=replace(state["statistics"], outputs=outputs))

    def compress(self, policy: Policy) -> Compressed:
        return compress(self.traced, self.statistics, policy, self.recipe, self.numerics, to_tensor(self.images))

    def finish(self, policy: Policy) -> Compressed:
        if policy not in self.finished:  # asked for when chosen, verified, scored and shipped
            images = to_tensor(self.images)
            self.finished[policy] = compress(
                self.traced, self.statistics, policy, self.finishing, self.numerics, images
            )
        return self.finished[policy]


@dataclass(frozen=True)
class EditEmitter(_Compressor):
    """One export per model, then an edit of the ONNX graph per policy."""

    template: Template

    def skeleton(self, policy: Policy) -> bytes:
        parts = structure(self.traced, policy, self.statistics, self.numerics, self.recipe)
        return labelled(emit(self.template, policy, *parts, self.numerics), policy)

    def emit(self, compressed: Compressed) -> bytes:
        parts = compressed.tensors, compressed.weights, compressed.params
        return labelled(emit(self.template, compressed.policy, *parts, self.numerics), compressed.policy)


@dataclass(frozen=True)
class ExportEmitter(_Compressor):
    """A full export per policy, seconds each: for models whose ONNX graph cannot be edited safely."""

    def skeleton(self, policy: Policy) -> bytes:
        return self.emit(self.compress(policy))

    def emit(self, compressed: Compressed) -> bytes:
        """Raises: EngineError: a layer is of a type that full exports are not written in."""
        for name, precision in compressed.policy.precisions.items():
            if not precision.is_integer:
                raise EngineError(f"{name} cannot be {precision}: this model is exported whole, in fp32 and int8")
        return labelled(with_codes(export_compressed(compressed), compressed.weights), compressed.policy)


@dataclass(frozen=True)
class Workbench:
    """What `prepare` made ready.

    Attributes:
        model, splits, traced, space: loaded, traced and restricted to what the engine runs.
        spec, backend: of the engine.
        emitter: policies -> files.
        recipe: of compression in trials.
        finishing: of finalists: the same with every layer solved in sequence.
        reference_policy: of the uncompressed model that others are compared with: one precision for all layers.
        reference: its ONNX.
        images: the calibration images, (n, c, h, w).
        statistics: of the uncompressed model on them.
        notes: lines the user should read.
    """

    config: SearchConfig
    model: LoadedModel
    splits: Splits
    traced: Traced
    space: PolicySpace
    spec: BackendSpec
    backend: Backend
    emitter: Emitter
    recipe: Recipe
    finishing: Recipe
    reference_policy: Policy
    reference: bytes
    images: Images
    statistics: Statistics
    notes: tuple[str, ...]

    @property
    def digests(self) -> Mapping[str, str]:
        """What a cached accuracy depends on, beside the policy."""
        numerics = self.backend.capabilities().numerics
        return {
            "weights": self.model.weights_digest,
            "data": self.splits.digest,
            "graph": self.traced.graph.digest,
            "recipe": self.recipe.digest,
            "finishing": self.finishing.digest,
            "reference": self.config.reference,
            "space": self.space.digest,
            "numerics": f"{numerics.signed_activations}/{numerics.symmetric_activations}/{numerics.weight_max}",
        }


def prepare(
    config: SearchConfig,
    observer: Observer,
    model: LoadedModel | None = None,
    splits: Splits | None = None,
    recipe: Recipe | None = None,
) -> Workbench:
    """Load, trace, collect statistics and export, refusing bad input before any folder is made.

    Args:
        model, splits: live objects in place of ``config.model`` and ``config.data``.
        recipe: for trials and finalists, in place of the default ones with the configuration's seed.

    Raises:
        InputError: model, weights, data, space or engine do not fit; see the subclasses.
    """
    _refuse_unknown_names(config)
    spec = backend_spec(config)
    target = target_of(config, spec)
    choices = SearchSpace.load(resources.find("search_spaces", config.space)).narrowed(config.exclude, config.include)
    model, splits, traced = load(config, observer, model, splits)
    backend = target(traced.graph)
    capabilities = backend.capabilities()
    base = _reference_policy(config, traced.graph, capabilities)
    space = choices.restrict(traced.graph, capabilities)
    calibrated = min(config.calibration_images, len(splits.calibration))
    recipe, finishing = _recipes(config, calibrated) if recipe is None else (recipe, recipe)
    refuse_larger(model.spec, footprint(traced.graph, recipe.images))
    observer(Phase("statistics"))
    images = first_images(splits.calibration, recipe.images)
    traced = equalize(traced, recipe)
    try:
        statistics = collect(traced, to_tensor(images), recipe)
    except CompressError as error:  # of the uncompressed model: no policy is to blame
        raise ModelError(str(error)) from error
    compressor = (traced, statistics, recipe, finishing, capabilities.numerics, images)
    emitter, reference, notes = _emitter(compressor, backend)
    if base.precisions:
        if isinstance(emitter, ExportEmitter) and not _precision(config.reference).is_integer:
            raise ConfigError(
                f"the file of this model is exported in float32: leave out --reference {config.reference}"
            )
        reference = emitter.emit(emitter.finish(base))
    notes = (
        *traced.notes,
        *calibration_notes(traced.graph, statistics.ranges, statistics.logits, recipe.ranges),
        *notes,
    )
    made = (config, model, splits, traced, space, spec, backend, emitter, recipe, finishing, base)
    return Workbench(*made, reference, images, statistics, notes)


def _recipes(config: SearchConfig, images: int) -> tuple[Recipe, Recipe]:
    """For trials, in milliseconds a policy that drops no branch, and for finalists, in seconds."""
    ranges: Any = config.ranges
    finishing = Recipe(seed=config.seed, images=images, reconstruction="sequential", ranges=ranges)
    return replace(finishing, reconstruction="auto", rounding="nearest"), finishing


def backend_spec(config: SearchConfig) -> BackendSpec:
    """The engine a configuration names."""
    return BackendSpec(config.engine, config.resolved_batch(), config.threads, config.hardware, config.tf32)


def _refuse_unknown_names(config: SearchConfig) -> None:
    """What is made only later is looked up now, before anything is loaded or written."""
    if config.controller not in CONTROLLERS:
        raise ConfigError(f"unknown controller {config.controller!r}: use {', '.join(CONTROLLERS)}")
    load_metric(config.metric)
    _precision(config.reference)
    _recipes(config, config.calibration_images)


def _precision(name: str) -> Precision:
    try:
        return Precision.parse(name)
    except InputError as error:
        raise ConfigError(f"--reference {name}: {error}") from error


def _reference_policy(config: SearchConfig, graph: LayerGraph, capabilities: Capabilities) -> Policy:
    """Raises: ConfigError: the engine does not run that precision."""
    precision = _precision(config.reference)
    if precision not in capabilities.precisions:
        known = ", ".join(map(str, capabilities.precisions))
        raise ConfigError(f"--reference {precision} does not run on {config.engine}: give one of {known}")
    return Policy(precisions={layer.name: precision for layer in graph.layers})


_Parts = tuple[Traced, Statistics, Recipe, Recipe, Numerics, Images]


def first_images(split: Split, count: int) -> Images:
    """The first ``count`` images of a split, (count, c, h, w)."""
    batches: list[Images] = []
    missing = count
    for images, _ in split.batches(128):
        batches.append(images[:missing])
        missing -= len(batches[-1])
        if missing <= 0:
            break
    return np.concatenate(batches)


def _emitter(parts: _Parts, backend: Backend) -> tuple[Emitter, bytes, Sequence[str]]:
    """The editing emitter where its file agrees with torch, else the exporting one, with a note.

    Returns:
        the emitter, the uncompressed model's file, and notes.
    """
    traced, *_, images = parts
    try:
        editing = EditEmitter(*parts, load_template(export_onnx(traced), traced.graph))
        reference = editing.emit(editing.compress(Policy()))
        with backend.build(reference) as engine:
            error = _parity(engine, traced, images[:32])
        if error <= PARITY:
            with_shapes(editing.skeleton(_narrow(traced.graph)), 1)  # raises where an edit does not fit
            return editing, reference, ()
        reason = f"its outputs differ from torch's by {error:.1e}"
    except EngineError as refused:
        reason = str(refused)
    note = f"the ONNX graph cannot be edited safely ({reason}): every policy is exported anew, which is slower"
    exporting = ExportEmitter(*parts)
    reference = exporting.emit(exporting.compress(Policy()))
    try:
        with backend.build(reference) as engine:
            error = _parity(engine, traced, images[:32])
    except EngineError as refused:
        raise ModelError(f"the engine fails on the uncompressed model: {refused}") from refused
    if error > PARITY:
        raise ModelError(
            f"the exported model differs from torch's by {error:.1e} (relative L2): it depends on something that "
            "ONNX does not keep; export it by hand to see which operator"
        )
    return exporting, reference, (note,)


def _narrow(graph: LayerGraph) -> Policy:
    """Every group at about half of its channels."""
    return graph.normalise(Policy({group.name: max(1, group.channels // 2) for group in graph.groups}))


def _parity(engine: Engine, traced: Traced, images: Images) -> float:
    """Relative L2 error of the engine's logits."""
    expected = logits_of(traced.module, images)
    difference = engine.run(images) - expected
    return float(np.linalg.norm(difference) / max(float(np.linalg.norm(expected)), 1e-12))


def chance_limit(classes: int, images: int) -> float:
    """Accuracy a guessing model stays under, 999 times in 1,000."""
    chance = 1.0 / classes
    return chance + 3.1 * sqrt(chance * (1 - chance) / images)


def package_versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
