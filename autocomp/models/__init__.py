"""Where models come from: the zoo, torchvision, and the user's own code."""

from autocomp.models.load import LoadedModel, called, check_logits, first_not_finite, load_model, wrap_model
from autocomp.models.outputs import logits_in
from autocomp.models.zoo import ZOO, build_zoo

__all__ = [
    "ZOO",
    "LoadedModel",
    "build_zoo",
    "called",
    "check_logits",
    "first_not_finite",
    "load_model",
    "logits_in",
    "wrap_model",
]
