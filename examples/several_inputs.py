"""A model of two inputs: an image, and the exposure that it was taken with.

Its weights are those of the first example, which has the same layers::

    python examples/own_model.py own_model.safetensors
    autocomp search --model examples.several_inputs:model --weights own_model.safetensors \
        --data examples.several_inputs:data --budget 0.5x

The shipped ``model.onnx`` has the inputs ``image`` and ``exposure``, each with a batch axis before it.
"""

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from examples.own_model import data as plain_data
from examples.own_model import model as plain


class Exposed(nn.Sequential):
    def forward(self, image: Tensor, exposure: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(image / exposure)


def model() -> nn.Module:
    """What ``--model`` names."""
    return Exposed(*plain())


class Photographs(Dataset[tuple[dict[str, Tensor], Tensor]]):
    """Every input under the name of an argument of forward(): float tensors, of one axis or more."""

    def __init__(self, plain: TensorDataset, seed: int) -> None:
        self.plain = plain
        draw = torch.Generator().manual_seed(seed)
        self.exposures = 0.5 + torch.rand(len(plain), 1, 1, 1, generator=draw)

    def __len__(self) -> int:
        return len(self.plain)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        image, label = self.plain[index]
        exposure = self.exposures[index]
        return {"image": image * exposure, "exposure": exposure}, label


def data() -> tuple[Photographs, ...]:
    """What ``--data`` names: (train, validation, test)."""
    return tuple(Photographs(part, seed) for seed, part in enumerate(plain_data()))
