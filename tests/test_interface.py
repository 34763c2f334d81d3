"""What a user's model takes and returns: one input, one of several outputs by its key."""

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from autocomp.compress import trace
from autocomp.errors import ModelError
from autocomp.models import check_logits, wrap_model


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


class Several(nn.Module):
    def __init__(self, give: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.conv, self.give = nn.Conv2d(3, 4, 1), give

    def forward(self, x: Tensor) -> object:
        return self.give(self.conv(x).mean((2, 3)))


Named = namedtuple("Named", ["features", "scores"])


@dataclass
class Output:
    features: Tensor
    scores: Tensor


@pytest.mark.parametrize(
    ("give", "key", "listed"),
    [
        (lambda y: {"features": -y, "scores": y}, "scores", "dict with features, scores"),
        (lambda y: (-y, y), "1", "tuple with 0, 1"),
        (lambda y: [-y, y], "1", "list with 0, 1"),
        (lambda y: Named(-y, y), "scores", "Named with features, scores"),
        (lambda y: Output(-y, y), "scores", "Output with features, scores"),
    ],
)
def test_the_logits_among_several_outputs_are_named_by_a_key(
    give: Callable[[Tensor], object], key: str, listed: str
) -> None:
    module, images = Several(give).eval(), torch.randn(2, 3, 5, 5)
    with pytest.raises(ModelError) as error:
        check_logits(wrap_model(module, 4), (3, 5, 5))
    assert f"returns a {listed}: name the part with the logits with --output-key" in one_line(error)
    with pytest.raises(ModelError) as error:
        check_logits(wrap_model(module, 4, "logits"), (3, 5, 5))
    assert f"output-key is logits, but the model returns a {listed}" in one_line(error)
    model = wrap_model(module, 4, key)
    check_logits(model, (3, 5, 5))
    assert torch.equal(model.module(images), module.conv(images).mean((2, 3)))
    assert list(model.module.state_dict()) == list(module.state_dict()) and not module._forward_hooks
    assert torch.equal(trace(model.module, images).module(images), model.module(images))


def test_a_key_for_a_single_tensor_is_refused() -> None:
    with pytest.raises(ModelError, match="output-key is logits, but the model returns a Tensor"):
        check_logits(wrap_model(Several(lambda y: y), 4, "logits"), (3, 5, 5))


def test_images_alone_for_a_model_of_several_inputs_are_refused_by_their_names() -> None:
    class Pair(Several):
        def forward(self, x: Tensor, age: Tensor, scale: float = 1.0) -> object:  # type: ignore[override]
            return super().forward(x)

    words = r"takes x, age, but the data yields images alone: let it yield \(\{'x': ..., 'age': ...\}, label\)"
    with pytest.raises(ModelError, match=words) as error:
        check_logits(wrap_model(Pair(lambda y: y), 4), (3, 5, 5))
    one_line(error)


def test_a_model_larger_than_memory_is_refused_before_it_is_copied() -> None:
    module = nn.Linear(4, 4)
    module.weight = nn.Parameter(torch.zeros(1).expand(2**21, 2**21), requires_grad=False)  # 17.6 TB, none allocated
    with pytest.raises(
        ModelError, match=r"live:Linear needs about 140,737.49 GB .* for 8 copies of its parameters\), but .* free"
    ):
        wrap_model(module, 4)
