"""``card.md`` of a shipped folder: its claims for readers."""

import json

from autocomp.config import SearchConfig
from autocomp.data import of_pixels
from autocomp.outcome import NUMERICS, Contender
from autocomp.report.tables import ABSENT, macs, markdown_table, megabytes, milliseconds, percent, reference_precision
from autocomp.study.card import Card, DataCard

__all__ = ["render_card"]


def render_card(card: Card) -> str:
    """The card's text; `card.json` holds the same for programs."""
    model, asked = card.model, " and ".join(map(str, card.budgets))
    if card.predicted:
        claim = f"Predicted, an estimate for {asked}: no latency was measured."
    elif card.verified:
        claim = f"Verified: within {asked} on fresh engines, at the upper confidence bound."
    else:
        claim = f"Not verified{f' ({model.note})' if model.note else ''}: for {asked}."
    config = SearchConfig.from_json(card.config)
    sections = [
        f"# {config.model}, compressed\n\n{claim}",
        "## Model\n\n" + markdown_table(
            ("", "latency, ms", "ratio", "accuracy", "change, points", "MACs", "size"),
            [_row(card.reference, f"uncompressed {reference_precision(card.reference, card.device)}"),
             _row(model, "shipped")],
        ),
        _accuracy(card),
        f"## Device\n\n{card.device.get('name')}, {card.device.get('engine')}: {card.device.get('details')}; "
        f"threads {config.threads}, batch {config.resolved_batch()}.",
        f"## Data\n\n{card.data.source}, SHA-256 `{card.data.digest}`. {_input(card.data)}",
        "## Policy\n\n```json\n" + json.dumps(model.policy.to_json(), indent=2) + "\n```",
        f"## Made by\n\n{_made_by(card)}\n\n"
        + ", ".join(f"{name} {version}" for name, version in card.versions.items()) + ".",
        "## Files\n\n" + markdown_table(
            ("file", "SHA-256"), [(name, digest) for name, digest in card.files.items()]
        ),
        "`autocomp verify` on this folder measures and scores the model again, and says which of this no longer holds.",
    ]  # fmt: skip
    if card.notes:
        sections.insert(3, "## Notes\n\n" + "\n".join(f"- {note}" for note in card.notes))
    return "\n\n".join(sections) + "\n"


def _row(row: Contender, name: str) -> tuple[str, ...]:
    latency, delta = row.latency, row.test_delta
    ratio = None if latency is None else latency.ratio
    return (
        name,
        ABSENT if latency is None else f"{latency.statistic} {milliseconds(latency.latency_ms).line}",
        ABSENT if ratio is None else f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})",
        percent(row.test_accuracy),
        ABSENT if delta is None else f"{100 * delta.value:+.2f} ({100 * delta.low:+.2f} to {100 * delta.high:+.2f})",
        macs(row.macs),
        megabytes(row.size_bytes),
    )


def _made_by(card: Card) -> str:
    """The commands that made the weights, and how they were trained."""
    training = card.training or {}
    commands = [" ".join(card.command), *filter(None, [training.get("command")])]
    text = "```console\n" + "\n".join(f"$ {command}" for command in commands) + "\n```"
    if not training:
        return text
    whose = "The second command" if training["command"] else "The search"
    return f"{text}\n\n{whose} trained the weights:\n\n```json\n{json.dumps(training['recipe'], indent=2)}\n```"


def _accuracy(card: Card) -> str:
    """Whose accuracy it is: the engine was not run where latencies are predicted."""
    if card.model.test_accuracy is None:
        return "No accuracy is claimed: the data has no labels."
    if card.predicted or any(note.startswith(NUMERICS) for note in card.notes):
        whose = f"{NUMERICS} on the machine that searched, not the engine's"
        return f"{whose[0].upper()}{whose[1:]}, {_images(card.data)}."
    return f"Accuracy is the engine's, {_images(card.data)}."


def _images(data: DataCard) -> str:
    return "over all test images" if data.test_images is None else f"over all {data.test_images} test images"


def _input(data: DataCard) -> str:
    if not of_pixels(data.source):
        return "Images go in as the dataset gives them."
    if data.mean is None or data.std is None:
        return (
            "It was not at hand at export: images go in as (pixel / 255 - mean) / std, with the mean and std of this "
            "data, which this card and card.json do not know and serving needs. An export beside the data names them."
        )
    size = "" if data.size is None else f", {data.size} pixels a side"
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (data.mean, data.std))
    return f"Images go in as (pixel / 255 - mean) / std{size}; mean {mean}; std {std}."
