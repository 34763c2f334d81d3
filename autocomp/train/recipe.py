"""How a model is trained."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import cos, isfinite, pi
from typing import Any, Literal, Self, get_args

from autocomp.errors import ConfigError
from autocomp.policy import digest_of

__all__ = ["TrainingRecipe"]

Optimizer = Literal["sgd", "adamw", "muon"]
Schedule = Literal["cosine", "one_cycle"]
Quantization = Literal["learned", "calibrated"]
Norms = Literal["folded", "batch"]
Device = Literal["cpu", "cuda"]
Mixed = Literal["fp32", "bf16", "fp16"]
CHOICES: Mapping[str, Any] = {
    "optimizer": Optimizer, "schedule": Schedule, "quantization": Quantization, "norms": Norms, "device": Device,
    "precision": Mixed,
}  # fmt: skip
START = 0.04
"""One-cycle begins at this fraction of the peak (Smith and Topin, arXiv:1708.07120, as fastai and PyTorch have it)."""

MAGNITUDES = 30
"""Of RandAugment, from the least to the greatest."""


@dataclass(frozen=True, slots=True)
class TrainingRecipe:
    """Everything that training depends on beside model and images; equal recipes give equal weights on one processor;
    a GPU adds in whatever order is fastest.

    Attributes:
        epochs: over the training images.
        lr: the highest learning rate.
        batch: images a step; the last of an epoch may have fewer.
        optimizer: ``sgd`` with Nesterov's momentum, ``adamw``, or ``muon`` for matrices with AdamW for the rest.
        momentum: of SGD and Muon.
        weight_decay: of weights, not of biases; AdamW's and Muon's are decoupled.
        schedule: ``cosine`` falls from the highest rate to 0; ``one_cycle`` rises in a half cosine during warm-up, then
            falls to 0 in another.
        warmup: fraction of all steps during which the rate rises; linearly before ``cosine``.
        label_smoothing: probability spread over all classes (Szegedy et al., arXiv:1512.00567, section 7).
        ema: decay of the average over weights that is returned; less in the first steps, 0 for the last weights.
        clip: largest L2 norm of all gradients together.
        crop: pixels of zero padding, in normalised images, before a crop at random; 0 for none.
        flip: probability of a horizontal flip.
        temperature, distillation: of the softmax, and weight of the teacher's part of the loss, in [0, 1] (Hinton et
            al., arXiv:1503.02531, section 2).
        attention: weight of the distance between the maps of where both models look, beside that loss; 0 for none.
            About 1 is the weight of its authors, a thousand over the places of a map of 32x32.
        hints: weight of the relative distance between the same maps, channel by channel; 0 for none.
        mixup: both parameters of the Beta distribution that the shares of two mixed images are drawn from; 0 for none.
        randaugment: magnitude of two random changes of each image, from 1 to 30; 0 for none.
        slimming: weight of the magnitudes of all batch norms' factors in the loss; 0 for none.
        soft_pruning: part of each convolution's filters, those of least norm, set to zero after each epoch.
        device: ``cpu`` or ``cuda``.
        precision: of a GPU's multiplications: ``fp32``, or ``bf16`` or ``fp16`` where that is safe, weights and sums
            staying ``fp32`` (Micikevicius et al., arXiv:1710.03740); ``fp16`` scales the loss.
        quantization: of a policy's integer layers: ``learned`` trains their weights as codes, with all scales;
            ``calibrated`` trains in float and calibrates afterwards.
        norms: of layers that batch norms were folded into: ``folded`` trains them so, ``batch`` normalises by each
            batch while training and folds the norms again at its end.
        seed: of the images' order and their augmentation.
    """

    epochs: int = 5
    lr: float = 0.01
    batch: int = 128
    optimizer: Optimizer = "sgd"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: Schedule = "cosine"
    warmup: float = 0.05
    label_smoothing: float = 0.0
    ema: float = 0.998
    clip: float = 1.0
    crop: int = 4
    flip: float = 0.5
    temperature: float = 4.0
    distillation: float = 0.9
    attention: float = 0.0
    hints: float = 0.0
    mixup: float = 0.0
    randaugment: int = 0
    slimming: float = 0.0
    soft_pruning: float = 0.0
    device: Device = "cpu"
    precision: Mixed = "fp32"
    quantization: Quantization = "learned"
    norms: Norms = "folded"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("lr", "clip", "temperature"):
            if not (isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ConfigError(f"{name} must be a positive number, not {getattr(self, name)}")
        for name in ("warmup", "label_smoothing", "flip", "distillation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name.replace('_', '-')} must lie in [0, 1], not {getattr(self, name)}")
        for name in ("ema", "momentum", "soft_pruning"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name.replace('_', '-')} must lie in [0, 1), not {getattr(self, name)}")
        for name in ("crop", "weight_decay", "attention", "hints", "mixup", "randaugment", "slimming", "seed"):
            if not (isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ConfigError(f"{name.replace('_', '-')} must not be negative, but is {getattr(self, name)}")
        if self.randaugment > MAGNITUDES:
            raise ConfigError(f"randaugment must be at most {MAGNITUDES}, not {self.randaugment}")
        for name, known in CHOICES.items():
            if getattr(self, name) not in get_args(known):
                raise ConfigError(f"unknown {name} {getattr(self, name)!r}: use {' or '.join(get_args(known))}")
        if self.norms == "batch" and self.batch < 2:
            raise ConfigError("norms of a batch need two images: give a --batch of 2 at least, or leave --norms out")
        if self.precision != "fp32" and self.device == "cpu":
            raise ConfigError(f"precision {self.precision} is for GPUs: give --device cuda with it, or leave it out")

    def lr_at(self, step: int, steps: int) -> float:
        """The learning rate of a step, counted from 0, of ``steps``."""
        rising = round(self.warmup * steps)
        if step < rising:
            part = (step + 1) / (rising + 1)
            if self.schedule == "one_cycle":
                return self.lr * (START + (1 - START) * (1 - cos(pi * part)) / 2)
            return self.lr * part
        return self.lr * (1 + cos(pi * (step - rising) / max(steps - rising, 1))) / 2

    @property
    def varies(self) -> bool:
        """An image is not the same in every epoch."""
        return any(part > 0 for part in (self.crop, self.flip, self.mixup, self.randaugment))

    @property
    def digest(self) -> str:
        return digest_of(self.to_json())

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Raises: ConfigError if the data is no recipe."""
        try:
            return cls(**data)
        except TypeError as error:
            raise ConfigError(f"this is no recipe of training ({error})") from error
