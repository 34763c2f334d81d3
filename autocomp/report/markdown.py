"""``report.md`` of a run folder: what was asked, what was found, and the evidence."""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autocomp.config import SearchConfig
from autocomp.engines.tensorrt import EngineLayer
from autocomp.errors import RunError
from autocomp.outcome import LayerChoice, SearchResult
from autocomp.policy import Policy
from autocomp.report.effects import draw_effects, effects_table
from autocomp.report.layers import layers_text, read_layers
from autocomp.report.pareto import draw
from autocomp.report.tables import (
    ABSENT,
    budget_rows,
    contender_rows,
    duration,
    macs,
    markdown_table,
    ordered,
    percent,
    reference_precision,
    significant,
    statistic,
    trial_rows,
    untrained,
    verdict,
)
from autocomp.results import Contest
from autocomp.study.provenance import TrainedBy, trained_by

__all__ = ["PICTURE", "REPORT", "render", "write_report"]

REPORT, PICTURE, EFFECTS = "report.md", "pareto.png", "choices.png"
MAX_FAILURES = 10
MEASURED = "Latencies and ratios are of the engine, with confidence bounds; accuracy is the engine's"
PREDICTED = "Latencies and ratios are predicted, nothing was measured; accuracy is of the engine's numerics"


def write_report(result: SearchResult, folder: Path) -> None:
    """Write ``report.md``, ``pareto.png`` and, where choices are explained, ``choices.png``, replacing older ones.

    Raises:
        RunError: the folder cannot be written.
    """
    try:
        draw(result, folder / PICTURE)
        if result.effects:
            draw_effects(result.effects, folder / EFFECTS)
        manifest = _manifest(folder)
        text = render(result, manifest, read_layers(folder), _training(folder, manifest))
        (folder / REPORT).write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(
            f"cannot write the report into {folder} ({error.strerror}): free space or rights there, then run "
            f"'autocomp report {folder}'"
        ) from error


def render(
    result: SearchResult,
    manifest: Mapping[str, Any],
    layers: Sequence[EngineLayer] = (),
    training: TrainedBy | None = None,
) -> str:
    """The report's text.

    Args:
        result: of the search.
        manifest: of the run folder; its ``command``, ``config`` and ``versions`` are shown where present.
        layers: of the shipped engine, where it was inspected.
        training: behind the weights, where there was one.
    """
    asked = " and ".join(str(budget) for budget in result.budgets)
    label = " (predicted, an estimate)" if result.predicted else ""
    sections = [
        f"# Compression under {asked}{label}\n\n{verdict(result)}",
        f"## Budgets\n\n{_budgets(result)}",
        f"## Result\n\n{_contenders(result)}",
        f"## What was chosen\n\n{_choices(result)}",
        f"## Trials\n\n{_trials(result)}",
        f"## Trust\n\n{_trust(result)}",
        f"![What each trial cost and how good it was]({PICTURE})",
        f"## Device\n\n{_device(result, manifest)}",
    ]
    if result.effects:
        text = f"{effects_table(result.effects)}\n\n![What each choice saves and costs]({EFFECTS})"
        sections.insert(4, f"## What each choice saves and costs\n\n{text}")
    if layers:
        sections.insert(4, f"## Engine\n\n{layers_text(layers)}")
    if result.notes:
        sections.append("## Notes\n\n" + "\n".join(f"- {note}" for note in result.notes))
    if "command" in manifest:
        sections.append(f"## Reproduce\n\n{_reproduce(result, manifest, training)}")
    return "\n\n".join(sections) + "\n"


def _manifest(folder: Path) -> Mapping[str, Any]:
    path = folder / "manifest.json"
    data = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return data if isinstance(data, dict) else {}


def _budgets(result: SearchResult) -> str:
    judged = "best found (predicted)" if result.predicted else "best found (upper bound)"
    base = f"uncompressed {reference_precision(result.reference, result.device)}"
    header = ("budget", "limit", base, judged, "holds")
    rows = [(row.budget, row.limit, row.reference, row.judged, row.holds) for row in budget_rows(result)]
    return markdown_table(header, rows)


def _contenders(result: SearchResult) -> str:
    """Search and selection accuracy in a table of their own: they may come from training images."""
    header = (
        "",
        f"latency {statistic(result)}, ms",
        "ratio",
        "accuracy (test)",
        "change, points",
        "MACs",
        "size",
        "status",
    )
    rows = contender_rows(result)
    main = markdown_table(
        header,
        [
            (
                row.name, row.latency_ms.line, row.ratio.line, row.accuracy, row.change.line, row.macs, row.size,
                row.state or ABSENT,
            )
            for row in rows
        ],
    )  # fmt: skip
    evidence = markdown_table(
        ("", "evaluations", "search split", "selection split"),
        [
            (row.name, str(contender.evaluations), percent(contender.search_accuracy),
             percent(contender.selection_accuracy))
            for row, contender in zip(rows, ordered(result), strict=True)
        ],
    )  # fmt: skip
    remark = untrained(result)
    remarks = "".join(f"\n- {row.label}: {row.note}" for row in rows if row.note)
    return "\n\n".join(
        filter(
            None,
            (
                main,
                _sentence(remark) if remark is not None else None,
                remarks.strip(),
                f"{PREDICTED if result.predicted else MEASURED} on the test split, its change paired with the "
                "uncompressed engine's on the same images (95% interval).",
                "Accuracy that guided the choices, not to be compared with the test split's:",
                evidence,
            ),
        )
    )


def _choices(result: SearchResult) -> str:
    best = result.best
    if best is None:
        return "Nothing: no policy met the budget."
    lines = []
    if best.policy.dropped:
        lines.append(f"Residual branches removed: {', '.join(f'`{name}`' for name in sorted(best.policy.dropped))}.")
    if result.layers:
        rows = [_layer_row(choice) for choice in result.layers]
        lines.append(markdown_table(("layer", "channels kept", "precision", "MACs", "of before"), rows))
    else:
        lines.append(_policy(best.policy))
    return "\n\n".join(lines)


def _layer_row(choice: LayerChoice) -> tuple[str, str, str, str, str]:
    share = f"{choice.macs_left / choice.macs:.2f}x" if choice.macs else ABSENT
    if choice.kept == 0:
        return f"`{choice.name}`", f"removed (of {choice.channels})", ABSENT, "0", share
    return (
        f"`{choice.name}`", f"{choice.kept} of {choice.channels}", choice.precision, macs(choice.macs_left), share,
    )  # fmt: skip


def _policy(policy: Policy) -> str:
    """What a policy changes, where the layers themselves are not at hand."""
    names = dict.fromkeys([*policy.kept, *policy.precisions])
    if not names:
        return "No channel was removed, and every layer runs in fp32."
    rows = [(f"`{name}`", str(policy.kept.get(name, "all")), str(policy.precision(name))) for name in names]
    return markdown_table(("layer", "channels kept", "precision"), rows)


def _trials(result: SearchResult) -> str:
    rows = trial_rows(result)
    header = ["asked by", "evaluated", "feasible", "infeasible", "failed"]
    counts = [[row.role, str(row.evaluated), str(row.feasible), str(row.infeasible), str(row.failed)] for row in rows]
    if any(row.unlisted for row in rows):
        header.append("not listed")
        counts = [[*line, str(row.unlisted)] for line, row in zip(counts, rows, strict=True)]
    parts = [markdown_table(header, counts), f"Wall time {duration(result.seconds)}."]
    stages: dict[str, float] = {}
    for trial in result.front:
        for stage, seconds in trial.seconds.items():
            stages[stage] = stages.get(stage, 0.0) + seconds
    if stages:
        spent = ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in stages.items())
        parts.append(f"Spent in the trials: {spent}.")
    failed = [trial for trial in result.front if trial.status == "failed"]
    if failed:
        lines = [
            f"- trial {trial.number} ({trial.role}), {trial.stage}: {trial.error}"
            + (f" (`{trial.log}`)" if trial.log else "")
            for trial in failed
        ]
        rest = [f"- and {len(failed) - MAX_FAILURES} more in `journal.jsonl`"] if len(failed) > MAX_FAILURES else []
        parts.append("\n".join(["Failures:\n", *lines[:MAX_FAILURES], *rest]))
    return "\n\n".join(parts)


def _trust(result: SearchResult) -> str:
    text = _on_other_images(result)
    return text if result.contest is None else f"{text}\n\n{_after_training(result.contest)}"


def _on_other_images(result: SearchResult) -> str:
    if result.trust is None:
        return "Too few policies were scored to say how well the search score ranks them on other images."
    return (
        f"{_sentence(str(result.trust))} The policies are spread from the best score to the worst; near 1, what looked "
        "better in the search is better on images it never saw. Test images take no part in it."
    )


def _after_training(contest: Contest) -> str:
    """How the policies that were trained stood, the winner first."""
    header = ["trial", "search score", *(f"selection split after {epochs}" for epochs in contest.epochs)]
    rows = []
    for entrant in contest.entrants:
        cells = [percent(accuracy) for accuracy in entrant.accuracies]
        out = [ABSENT] * (len(contest.epochs) - len(cells))
        rows.append([str(entrant.trial), significant(entrant.divergence, 3), *cells, *out])
    text = "The best of the search were trained, and those that trained best went on:"
    return f"{text}\n\n{markdown_table(header, rows)}\n\n{_sentence(str(contest))}"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _device(result: SearchResult, manifest: Mapping[str, Any]) -> str:
    facts = {key: value for key, value in result.device.items() if key != "details"}
    facts |= result.device.get("details") or {}
    facts |= manifest.get("versions") or {}
    return markdown_table(("property", "value"), [(str(key), str(value)) for key, value in facts.items()])


def _training(folder: Path, manifest: Mapping[str, Any]) -> TrainedBy | None:
    return trained_by(folder, SearchConfig.from_json(manifest["config"])) if "config" in manifest else None


def _reproduce(result: SearchResult, manifest: Mapping[str, Any], training: TrainedBy | None) -> str:
    """The command as it was typed (the manifest has it quoted), and the one that rebuilds what was shipped: nothing
    rebuilds trained weights but training."""
    commands = [" ".join(["autocomp", *manifest["command"][1:]])]
    config = manifest.get("config") or {}
    if training is not None:
        commands += [training.command] if training.command is not None else []
    elif result.best is not None:
        flags = [f"--{key}={config[key]}" for key in ("model", "weights", "data") if config.get(key)]
        commands.append(shlex.join(["autocomp", "apply", str(result.run / "policy.json"), *flags]))
    return "```console\n" + "\n".join(f"$ {command}" for command in commands) + "\n```"
