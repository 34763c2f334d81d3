"""Training of a compressed model: fine-tuning, distillation from the uncompressed one, and learned int8."""

from autocomp.train.loop import Trainer, Tuned, finetune
from autocomp.train.qat import learnable, learned
from autocomp.train.recipe import TrainingRecipe

__all__ = ["Trainer", "TrainingRecipe", "Tuned", "finetune", "learnable", "learned"]
