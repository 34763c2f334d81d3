"""How a run's weights were made: the recipe of their training, and the command that trains so again."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autocomp.config import SearchConfig
from autocomp.errors import RunError
from autocomp.study.replacement import FINETUNED
from autocomp.study.run import Run
from autocomp.study.training import recipe_of

__all__ = ["TrainedBy", "trained_by"]

PYTHON_ONLY = frozenset({"momentum", "slimming", "soft_pruning", "seed"})
"""Settings of a recipe that ``autocomp finetune`` has no flag for."""


@dataclass(frozen=True)
class TrainedBy:
    """The training behind a run's weights.

    Attributes:
        recipe: all its settings.
        command: that trains so again after the search; None where the search itself does.
    """

    recipe: Mapping[str, Any]
    command: str | None

    def to_json(self) -> dict[str, Any]:
        return {"recipe": dict(self.recipe), "command": self.command}


def trained_by(folder: Path, config: SearchConfig) -> TrainedBy | None:
    """The training behind a run's weights; None where there was none.

    Raises:
        RunError: the run's ``policy.json`` is damaged.
    """
    try:
        recipe = json.loads((folder / "policy.json").read_text()).get("training")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as error:
        raise RunError(f"{folder / 'policy.json'} is damaged ({error}): copy the whole run folder again") from error
    if recipe is None:
        return None
    entries = [entry for entry in Run.entries_of(folder) if entry["kind"] == FINETUNED]
    contests = [entry["contest"] for entry in entries if entry["recipe"] == recipe and entry["reason"] is None]
    finalists = len(contests[-1]["entrants"]) if contests and contests[-1] else 1
    epochs = config.resolved_finetune_epochs()
    if epochs and recipe == recipe_of(config, {"epochs": epochs}).to_json() and finalists <= config.finetune_finalists:
        return TrainedBy(recipe, None)
    return TrainedBy(recipe, _command(folder, recipe, recipe_of(config, {}).to_json(), finalists))


def _command(folder: Path, recipe: Mapping[str, Any], usual: Mapping[str, Any], finalists: int) -> str:
    """The command line, or a line of Python where a setting has no flag."""
    given = {name: value for name, value in recipe.items() if value != usual.get(name)}
    if not given.keys() & PYTHON_ONLY:
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in {**given, "finalists": finalists}.items()]
        return shlex.join(["autocomp", "finetune", str(folder), *flags])
    call = f"api.finetune(Path({str(folder)!r}), {given!r}, finalists={finalists})"
    return shlex.join(["python", "-c", f"from pathlib import Path; from autocomp import api; {call}"])
