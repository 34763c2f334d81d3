"""Flags that several commands share.

They default to None, "not given", so that a configuration file's value stands where a flag is absent.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = [
    "Address",
    "AsJson",
    "Batch",
    "Budgets",
    "CalibrationImages",
    "Config",
    "Data",
    "Engine",
    "Exclude",
    "Hardware",
    "Include",
    "Mean",
    "Model",
    "OutputKey",
    "Reference",
    "Seed",
    "Size",
    "Space",
    "Std",
    "Text",
    "Threads",
    "Weights",
    "Whole",
    "settings_of",
]

Text = str | None
Whole = int | None
Model = Annotated[Text, typer.Option(help="zoo:NAME, torchvision:NAME or package.module:factory [zoo:resnet20]")]
Weights = Annotated[Text, typer.Option(help="safetensors, or a state dict, of the model")]
OutputKey = Annotated[Text, typer.Option(help="of the logits, where the model returns a dict or a tuple")]
Data = Annotated[Text, typer.Option(help="digits, npz:FILE, imagefolder:DIR, cifar10:DIR, random:CxHxW or a factory")]
Budgets = Annotated[
    list[str] | None,
    typer.Option(metavar="BUDGET", help="15ms, p95:15ms, 0.5x, 50%, 4MB, 20MMACs, 0.5xMACs; may be repeated"),
]
Engine = Annotated[Text, typer.Option(help="backend that runs the model [onnxruntime]")]
Hardware = Annotated[Text, typer.Option(help="hardware profile or described device")]
Reference = Annotated[Text, typer.Option(help="precision of the uncompressed engine compared with [fp32]")]
Threads = Annotated[Whole, typer.Option(help="threads of the engine [1]")]
Batch = Annotated[Whole, typer.Option(help="images a run [1; 32 for the default model and data]")]
Mean = Annotated[Text, typer.Option(help="channel means of the data, as 0.5,0.5,0.5")]
Std = Annotated[Text, typer.Option(help="channel standard deviations of the data, as 0.2,0.2,0.2")]
Size = Annotated[Whole, typer.Option(help="side of the square input, in pixels")]
Space = Annotated[Text, typer.Option(help="search space, by name or file [default]")]
Exclude = Annotated[
    list[str] | None,
    typer.Option(metavar="GLOB", help="layers to leave as they are, as 'layer3.*'; may be repeated"),
]
Include = Annotated[
    list[str] | None,
    typer.Option(metavar="GLOB", help="the only layers to compress, as 'layer3.*'; may be repeated"),
]
Seed = Annotated[Whole, typer.Option(help="of every draw [0]")]
CalibrationImages = Annotated[Whole, typer.Option(help="images for ranges and reconstruction [1024]")]
Address = Annotated[Text, typer.Option(help="Ray cluster: auto, local or ray://HOST:PORT [a running one]")]
Config = Annotated[Path | None, typer.Option(help="TOML file with these names as keys [autocomp.toml where present]")]
AsJson = Annotated[bool | None, typer.Option("--json/--no-json", help="print one JSON object and nothing else")]


def settings_of(context: typer.Context, *others: str) -> dict[str, Any]:
    """The flags of a command that are settings of a search: all but ``config`` and ``others``."""
    return {name: value for name, value in context.params.items() if name not in ("config", *others)}
