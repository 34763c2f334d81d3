"""Training of a compressed model: fine-tuning, and distillation from the uncompressed one."""

from autocomp.train.loop import Tuned, finetune
from autocomp.train.recipe import TrainingRecipe

__all__ = ["TrainingRecipe", "Tuned", "finetune"]
