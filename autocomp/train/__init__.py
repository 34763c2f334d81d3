"""Training of a compressed model: fine-tuning, distillation from the uncompressed one, and learned int8."""

from autocomp.train.loop import device_of, finetune
from autocomp.train.qat import learnable, learned
from autocomp.train.recipe import TrainingRecipe
from autocomp.train.training import Trainer, Training, Tuned

__all__ = [
    "Trainer",
    "Training",
    "TrainingRecipe",
    "Tuned",
    "device_of",
    "finetune",
    "learnable",
    "learned",
]
