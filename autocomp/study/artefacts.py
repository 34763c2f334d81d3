"""What a finished search leaves in its folder, and how a shipped policy is read back."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from safetensors.numpy import save as save_tensors

from autocomp.compress import Compressed
from autocomp.errors import EngineError, InputError
from autocomp.outcome import SearchResult
from autocomp.policy import Policy, Recipe
from autocomp.results import TrialResult
from autocomp.storage import csv_of, write_atomic
from autocomp.study.run import Run
from autocomp.study.workbench import Workbench

__all__ = ["ShippedPolicy", "refuse_other_inputs", "ship", "write_layers", "write_model", "write_table"]

FORMAT = 1
SETTINGS = ("seed", "mean", "std", "size", "calibration_images", "search_images", "selection_images")
"""Fields of a search's configuration that its splits depend on; `apply` takes them from ``policy.json``."""


@dataclass(frozen=True)
class ShippedPolicy:
    """``policy.json``: a policy with all that rebuilds its weights, and the digests that prove it did.

    Attributes:
        policy, recipe: what to apply, and how.
        model, data: specs they were applied to.
        digests: of weights, data, graph and numerics.
        kept: group -> indices of the channels kept.
        scales: quantized value -> scale and zero point.
        settings: of the search that decide which images the splits hold and how they are normalised.
        onnx_sha256: of the shipped ``model.onnx``.
        reference_sha256: of the uncompressed ``reference.onnx`` beside it.
        training: recipe of the fine-tuning, which nothing rebuilds without training again; None where there was none.
    """

    policy: Policy
    recipe: Recipe
    model: str | None = None
    data: str | None = None
    digests: Mapping[str, str] | None = None
    kept: Mapping[str, Sequence[int]] | None = None
    scales: Mapping[str, Mapping[str, float]] | None = None
    settings: Mapping[str, Any] | None = None
    onnx_sha256: str | None = None
    reference_sha256: str | None = None
    training: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "policy": self.policy.to_json(),
            "recipe": self.recipe.to_json(),
            "model": self.model,
            "data": self.data,
            "digests": dict(self.digests or {}),
            "kept": {name: list(indices) for name, indices in (self.kept or {}).items()},
            "scales": dict(self.scales or {}),
            "settings": dict(self.settings or {}),
            "onnx_sha256": self.onnx_sha256,
            "reference_sha256": self.reference_sha256,
            "training": None if self.training is None else dict(self.training),
        }

    @classmethod
    def read(cls, path: Path) -> Self:
        """A shipped ``policy.json``, or a bare policy (which gets the default recipe).

        Raises:
            InputError: the file is missing or is neither.
        """
        try:
            data = json.loads(path.read_text())
        except FileNotFoundError:
            raise InputError(f"no policy file {path}: give the policy.json of a run") from None
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read as JSON ({error}): give the policy.json of a run") from error
        if not isinstance(data, dict):
            raise InputError(f"{path} is no policy: give the policy.json of a run")
        if "policy" not in data:
            return cls(Policy.from_json(data), Recipe())
        fields = {key: data.get(key) for key in ("model", "data", "onnx_sha256", "reference_sha256", "training")}
        for key in ("digests", "kept", "scales", "settings"):
            fields[key] = data.get(key) or {}
            if not isinstance(fields[key], dict):
                raise InputError(f"{key} in {path} is no table: give the policy.json of a run")
        return cls(Policy.from_json(data["policy"]), Recipe.from_json(data.get("recipe", {})), **fields)


def write_model(
    bench: Workbench, compressed: Compressed, folder: Path, training: Mapping[str, Any] | None = None
) -> ShippedPolicy:
    """Write ``model.onnx``, ``weights.safetensors`` (float32, pruned shapes) and ``policy.json``.

    Args:
        training: recipe of the fine-tuning behind the weights.
    """
    onnx = bench.emitter.emit(compressed)
    shipped = ShippedPolicy(
        policy=compressed.policy,
        recipe=bench.finishing,
        model=bench.model.spec,
        data=bench.splits.source,
        digests=shipped_digests(bench),
        kept=compressed.kept,
        scales={value: params.to_json() for value, params in compressed.params.items()},
        settings={name: value for name, value in bench.config.to_json().items() if name in SETTINGS},
        onnx_sha256=hashlib.sha256(onnx).hexdigest(),
        reference_sha256=hashlib.sha256(bench.reference).hexdigest(),
        training=training,
    )
    write_atomic(folder / "model.onnx", onnx)
    write_atomic(folder / "weights.safetensors", save_tensors(dict(compressed.tensors)))
    write_atomic(folder / "policy.json", json.dumps(shipped.to_json(), indent=2))
    return shipped


def write_layers(bench: Workbench, folder: Path) -> None:
    """Write ``layers.json`` beside ``model.onnx``: what its engine is made of, where the backend describes that."""
    inspect: Callable[[bytes], Sequence[Any]] | None = getattr(bench.backend, "layers", None)
    if inspect is not None:
        with suppress(EngineError):  # a finished search does not fail because its engine cannot be described
            made = inspect((folder / "model.onnx").read_bytes())
            write_atomic(folder / "layers.json", json.dumps([layer.to_json() for layer in made], indent=2))


def refuse_other_inputs(shipped: ShippedPolicy, path: Path, bench: Workbench) -> None:
    """Raises: InputError: weights, data, graph, recipe or numerics are not those that a policy was made with."""
    for name, digest in (shipped.digests or {}).items():
        if bench.digests.get(name) != digest:
            raise InputError(
                f"the {name} differ from those the policy was made with: give the same --model, --weights and --data "
                f"({path} names model {shipped.model}, data {shipped.data})"
            )


def shipped_digests(bench: Workbench) -> dict[str, str]:
    """What a shipped model depends on, beside its policy."""
    digests = {
        name: digest for name, digest in bench.digests.items() if name not in ("space", "finishing", "reference")
    }
    return {**digests, "recipe": bench.finishing.digest}


def ship(bench: Workbench, run: Run, result: SearchResult, results: Sequence[TrialResult]) -> None:
    """Write the best model and the uncompressed one, the table of trials and ``result.json``."""
    if result.best is not None:
        run.write("reference.onnx", bench.reference)
        write_model(bench, bench.emitter.finish(result.best.policy), run.folder)
        write_layers(bench, run.folder)
    write_table(run, results)
    run.write("result.json", json.dumps(result.to_json(), indent=2))


def write_table(run: Run, results: Sequence[TrialResult]) -> None:
    """Write ``results.csv``, one row a trial."""
    run.write("results.csv", csv_of(map(_row, results)))


def _row(result: TrialResult) -> dict[str, Any]:
    return {
        "number": result.number,
        "role": result.role,
        "status": result.status,
        "feasible": result.feasible,
        "objective": result.objective,
        "divergence": result.score.divergence if result.score else None,
        "accuracy": result.score.accuracy if result.score else None,
        "agreement": result.score.agreement if result.score else None,
        "latency_ms": result.latency_ms,
        "ratio": result.ratio,
        "macs": result.macs,
        "size_bytes": result.size_bytes,
        "cached_timing": result.cached_timing,
        "stage": result.stage,
        "error": result.error,
        "log": result.log,
        "seconds": sum(result.seconds.values()),
        "overhead_s": sum(s for stage, s in result.seconds.items() if stage not in ("time", "score")),
        "policy": json.dumps(result.policy.to_json(), sort_keys=True),
    }
