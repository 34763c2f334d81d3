"""What each choice saves and costs, as a table and a picture."""

from collections.abc import Sequence
from pathlib import Path

from autocomp.outcome import ChoiceEffect
from autocomp.report.tables import ABSENT, macs, markdown_table, significant

__all__ = ["draw_effects", "effects_table"]

_DPI = 120
_COLOURS = {"channels": "#0072B2", "precision": "#009E73", "branch": "#D55E00"}
_NAMES = {"channels": "channels removed", "precision": "precision", "branch": "branch removed"}


def effects_table(effects: Sequence[ChoiceEffect]) -> str:
    """Markdown: one row a choice, with what it saves in ms and costs in thousandths of the divergence."""
    header = ("layer", "choice", "saves, ms (predicted)", "95 %", "MACs saved", "costs alone, divergence / 1000")
    lines = [f"{effect.name}: {effect.choice} here costs {-effect.saved_ms.value:+.3f} ms"
             for effect in effects if effect.saved_ms is not None and effect.saved_ms.high < 0]  # fmt: skip
    rows = [
        (f"`{effect.name}`", effect.choice, *_time(effect), macs(effect.macs_saved), _loss(effect))
        for effect in effects
    ]
    slower = f"Slower than without, beyond the prediction's error: {'; '.join(lines)}." if lines else ""
    remark = (
        "What a choice saves is the time of the policy without it minus that of the policy, both predicted from a "
        "profile, not measured. What it costs is the divergence that it alone causes in the uncompressed model; with ~ "
        "it was read off a line through measured counts."
    )
    return "\n\n".join(filter(None, (markdown_table(header, rows), slower, remark)))


def draw_effects(effects: Sequence[ChoiceEffect], path: Path) -> None:
    """Write a PNG: one bar a choice, to the left what it saves in ms with its interval, to the right what it costs."""
    # Imported here, as a figure of its own without pyplot's global state: a search that draws nothing pays nothing.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(11.0, 1.8 + 0.19 * len(effects)), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    places = range(len(effects))
    colours = [_COLOURS[effect.kind] for effect in effects]
    timed = [(place, effect.saved_ms) for place, effect in enumerate(effects) if effect.saved_ms is not None]
    left.barh(list(places), [effect.saved_ms.value if effect.saved_ms else 0.0 for effect in effects], color=colours)
    for place, saved in timed:
        left.hlines(place, saved.low, saved.high, colors="k", lw=1.0)
    left.axvline(0.0, c="k", lw=0.8)
    left.set_xlabel("saves, ms (predicted, 95 %)" if timed else "no profile: times are not known")
    right.barh(list(places), [1000 * (effect.loss or 0.0) for effect in effects], color=colours)
    for place, effect in enumerate(effects):
        if effect.loss is None:
            right.text(0.0, place, " not measured", va="center", fontsize=5, color="#555555")
    right.set_xlabel("costs alone, thousandths of a nat")
    left.set_yticks(list(places), [f"{effect.name}: {effect.choice}" for effect in effects], fontsize=6)
    left.invert_yaxis()
    for axis in (left, right):
        axis.grid(alpha=0.25, linewidth=0.6, axis="x")
        axis.spines[["top", "right"]].set_visible(False)
    kinds = [kind for kind in _COLOURS if any(effect.kind == kind for effect in effects)]
    handles = [Patch(color=_COLOURS[kind], label=_NAMES[kind]) for kind in kinds]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle("What each choice of the best found saves and costs")
    figure.savefig(path, format="png")


def _time(effect: ChoiceEffect) -> tuple[str, str]:
    saved = effect.saved_ms
    return (ABSENT, ABSENT) if saved is None else (f"{saved.value:+.3f}", f"{saved.low:+.3f} to {saved.high:+.3f}")


def _loss(effect: ChoiceEffect) -> str:
    if effect.loss is None:
        return ABSENT
    value = 1000 * effect.loss
    return f"{'' if effect.loss_measured else '~ '}{significant(value, 3) if value >= 1 else f'{value:.2f}'}"
