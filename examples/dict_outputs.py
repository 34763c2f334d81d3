"""A model that returns a dict: the logits, and features that training or other code wants.

Its weights are those of the other example, which has the same layers::

    python examples/own_model.py own_model.safetensors
    autocomp search --model examples.dict_outputs:model --output-key logits --weights own_model.safetensors \
        --data examples.own_model:data --budget 0.5x

Only what the logits need is compressed and shipped. A dataclass, a named tuple or a tuple works as well, a plain tuple
with the position as its key.
"""

from torch import Tensor, nn

from examples.own_model import model as plain


class WithFeatures(nn.Sequential):
    def forward(self, images: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        *body, head = self
        features = images
        for layer in body:
            features = layer(features)
        return {"features": features, "logits": head(features)}


def model() -> nn.Module:
    """What ``--model`` names."""
    return WithFeatures(*plain())
