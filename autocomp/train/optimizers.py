"""What turns gradients into steps."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from autocomp.train.recipe import TrainingRecipe

__all__ = ["Muon", "optimizers", "orthogonal"]

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
AS_ADAMW = 0.2
"""Root mean square of what AdamW's updates usually are, for a learning rate of 1."""


class Muon(torch.optim.Optimizer):
    """Each step moves a matrix in all of its directions alike: momentum, made `orthogonal` (Jordan et al., Muon, 2024,
    https://kellerjordan.github.io/posts/muon). A convolution is the matrix of its filters; of a grouped one, too, whose
    filters read different inputs.

    Updates have the root mean square that AdamW's have, so that both take the same learning rate and decay (Liu et al.,
    arXiv:2502.16982, section 2.2). PyTorch's own computes in bfloat16, which is slow with AVX2 alone.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                if "momentum_buffer" not in self.state[weight]:
                    self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
                mean = self.state[weight]["momentum_buffer"]
                mean.lerp_(weight.grad, 1 - group["momentum"])
                ahead = weight.grad.lerp(mean, group["momentum"])  # Nesterov's
                update = orthogonal(ahead.flatten(1)).reshape(weight.shape)
                size = AS_ADAMW * max(len(weight), weight[0].numel()) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * size)


def orthogonal(matrix: Tensor) -> Tensor:
    """U V' of a matrix U S V', nearly: singular values come to lie near 1, the least of them below.

    Five steps of a Newton-Schulz iteration whose coefficients lift small singular values fast (Jordan et al.).

    Args:
        matrix: (rows, columns).
    """
    tall = matrix.shape[0] > matrix.shape[1]
    found = matrix.T if tall else matrix
    found = found / found.norm().clamp_min(torch.finfo(matrix.dtype).tiny)
    linear, cubic, quintic = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = found @ found.T
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=cubic, alpha=quintic), found, beta=linear)
    return found.T if tall else found


def optimizers(weights: Mapping[str, nn.Parameter], recipe: TrainingRecipe) -> list[torch.optim.Optimizer]:
    """Those that share the weights among them.

    Vectors (biases, scales of quantization) do not decay. Muon takes what maps several inputs to several outputs, AdamW
    the rest.
    """
    matrices = [weight for weight in weights.values() if _is_matrix(weight)] if recipe.optimizer == "muon" else []
    taken = {id(weight) for weight in matrices}
    rest = [weight for weight in weights.values() if id(weight) not in taken]
    groups = [
        {"params": [weight for weight in rest if weight.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [weight for weight in rest if weight.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    found: list[torch.optim.Optimizer] = []
    if matrices:
        found.append(Muon(matrices, recipe.lr, recipe.momentum, recipe.weight_decay))
    if groups and recipe.optimizer == "sgd":
        found.append(torch.optim.SGD(groups, recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0))
    elif groups:
        found.append(torch.optim.AdamW(groups, recipe.lr))
    return found


def _is_matrix(weight: Tensor) -> bool:
    """It has several outputs, and several inputs each; a depthwise convolution's have nothing to do with each other."""
    return weight.ndim > 1 and weight.shape[0] > 1 and weight.shape[1] > 1
