"""``autocomp finetune`` and ``sparsify``: training after a search, and before one."""

from pathlib import Path
from typing import Annotated

import typer

from autocomp.cli.flags import (
    Address,
    AsJson,
    Config,
    Data,
    Mean,
    Model,
    OutputKey,
    Seed,
    Size,
    Std,
    Text,
    Weights,
    settings_of,
)
from autocomp.cli.output import print_found, watched

__all__ = ["add_training_commands"]

Epochs = Annotated[int | None, typer.Option(help="over the training images [5]")]
Rate = Annotated[float | None, typer.Option(help="the highest learning rate [0.01]; adamw and muon want less: 0.001")]
OF_TRAINING = ("epochs", "lr", "slimming", "soft_pruning")


def add_training_commands(app: typer.Typer) -> None:
    """Register the commands of this file."""
    app.command()(finetune)
    app.command()(sparsify)


def finetune(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(help="run folder")],
    epochs: Epochs = None,
    lr: Rate = None,
    optimizer: Annotated[Text, typer.Option(help="sgd, adamw or muon [sgd]")] = None,
    schedule: Annotated[Text, typer.Option(help="cosine or one_cycle [cosine]")] = None,
    batch: Annotated[int | None, typer.Option(help="images a step [128]")] = None,
    warmup: Annotated[float | None, typer.Option(help="part of all steps in which the rate rises [0.05]")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="of weights, not of biases [0.0001]")] = None,
    clip: Annotated[float | None, typer.Option(help="largest norm of all gradients [1]")] = None,
    ema: Annotated[float | None, typer.Option(help="decay of the weights' average, 0 for the last [0.998]")] = None,
    label_smoothing: Annotated[float | None, typer.Option(help="probability spread over all classes [0]")] = None,
    distillation: Annotated[float | None, typer.Option(help="weight of the uncompressed model's say [0.9]")] = None,
    temperature: Annotated[float | None, typer.Option(help="of what the uncompressed model says [4]")] = None,
    quantization: Annotated[Text, typer.Option(help="learned (train int8 as int8) or calibrated [learned]")] = None,
    norms: Annotated[Text, typer.Option(help="folded, or batch: normalise while training [folded]")] = None,
    crop: Annotated[int | None, typer.Option(help="pixels that images are shifted by, at most [4]")] = None,
    flip: Annotated[float | None, typer.Option(help="probability of mirroring [0.5; 0 for digits]")] = None,
    attention: Annotated[float | None, typer.Option(help="weight of where the uncompressed model looks [0]")] = None,
    hints: Annotated[float | None, typer.Option(help="weight of what the uncompressed model sees [0]")] = None,
    mixup: Annotated[float | None, typer.Option(help="mix images, shares drawn from Beta of this [0: not]")] = None,
    randaugment: Annotated[int | None, typer.Option(help="magnitude of random changes, to 30 [0: none]")] = None,
    device: Annotated[Text, typer.Option(help="cpu or cuda [cpu]")] = None,
    precision: Annotated[Text, typer.Option(help="of a GPU: fp32, bf16 or fp16 [fp32]")] = None,
    finalists: Annotated[int | None, typer.Option(min=1, help="policies that begin; one goes on [3]")] = None,
    address: Address = None,
    json: AsJson = None,
) -> None:
    """Train a run's best models, quantize them again, and keep the one that trains best where the engine says that it
    is better.

    Images that the search scored with are never trained on. Stopped, the same command goes on.
    """
    others = ("run", "finalists", "address", "json")
    given = {name: value for name, value in context.params.items() if name not in others and value is not None}
    from autocomp import api
    from autocomp.report import print_finetuned

    with watched("the run is as it was, and the same command goes on", as_json=bool(json)) as observer:
        found = api.finetune(run, given, observer, address, finalists)
    print_found(found, print_finetuned, as_json=bool(json))


def sparsify(
    context: typer.Context,
    model: Model = None,
    weights: Weights = None,
    output_key: OutputKey = None,
    data: Data = None,
    slimming: Annotated[float | None, typer.Option(help="weight of the batch norms' factors in the loss [0]")] = None,
    soft_pruning: Annotated[float | None, typer.Option(help="part of filters set to zero each epoch [0]")] = None,
    epochs: Epochs = None,
    lr: Rate = None,
    mean: Mean = None,
    std: Std = None,
    size: Size = None,
    seed: Seed = None,
    out: Annotated[Path, typer.Option(help="file for the weights")] = Path("sparse.safetensors"),
    config: Config = None,
    json: AsJson = None,
) -> None:
    """Train a model before any search so that whole channels grow small, and write weights for --weights.

    Stopped, the same command goes on.
    """
    from autocomp.config import read_config

    settings = settings_of(context, "out", "json", *OF_TRAINING)
    given = {name: context.params[name] for name in OF_TRAINING if context.params[name] is not None}
    chosen = read_config(config, settings)

    from autocomp import api
    from autocomp.report import print_sparsified

    with watched("the same command goes on", as_json=bool(json)) as observer:
        found = api.sparsify(chosen, given, out, observer)
    print_found(found, print_sparsified, as_json=bool(json))
