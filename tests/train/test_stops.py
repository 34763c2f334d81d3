"""Trainings that are stopped, paused, killed, or diverge."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autocomp.data.preprocess import Preprocess
from autocomp.errors import CompressError, RunError
from autocomp.outcome import Event, Step
from tests.train.small import RECIPE, StopError, net, split, stopping, train


@pytest.mark.parametrize("change", [{"mixup": 0.4}, {"randaugment": 9}], ids=str)
def test_what_changes_images_is_the_same_after_a_stop(change: dict[str, Any], tmp_path: Path) -> None:
    recipe = replace(RECIPE, **change)
    expected = train(recipe, teacher=net(seed=1))
    assert expected.losses != train(RECIPE, teacher=net(seed=1)).losses
    with pytest.raises(StopError):
        train(recipe, teacher=net(seed=1), checkpoint=tmp_path / "state", observer=stopping(7))
    assert train(recipe, teacher=net(seed=1), checkpoint=tmp_path / "state").losses == expected.losses


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
@pytest.mark.parametrize("after", [4, 7, 10])
def test_a_stopped_training_ends_with_the_same_bits(
    after: int, optimizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autocomp.train.loop.KEEP_EVERY", 3)
    recipe, path = replace(RECIPE, optimizer=optimizer), tmp_path / "state"
    expected = train(recipe, teacher=net(seed=1))
    with pytest.raises(StopError):
        train(recipe, teacher=net(seed=1), checkpoint=path, observer=stopping(after))
    events: list[Event] = []
    found = train(recipe, teacher=net(seed=1), checkpoint=path, observer=events.append)
    kept = max(step for step in range(after) if step % 3 == 0 or step % 5 == 0)
    assert sum(isinstance(event, Step) for event in events) == 15 - kept
    assert found.losses == expected.losses
    assert all(np.array_equal(found.tensors[name], value) for name, value in expected.tensors.items())
    again = train(recipe, teacher=net(seed=1), checkpoint=path, observer=stopping(1))  # nothing is left to do
    assert np.array_equal(again.tensors["0.weight"], expected.tensors["0.weight"])


def test_a_training_that_pauses_ends_with_the_same_bits(tmp_path: Path) -> None:
    path, expected = tmp_path / "state", train(RECIPE)
    for epochs in (1, 2, 1):  # the last one asks for less than there is, which is trained anew
        paused = train(RECIPE, checkpoint=path, until=epochs)
        assert paused.losses == expected.losses[:epochs]
    found = train(RECIPE, checkpoint=path)
    assert found.losses == expected.losses
    assert all(np.array_equal(found.tensors[name], value) for name, value in expected.tensors.items())


def test_the_teacher_is_asked_once_where_images_do_not_change(tmp_path: Path) -> None:
    asked = []

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net(seed=1)

        def forward(self, images: Tensor) -> Tensor:
            asked.append(len(images))
            logits: Tensor = self.inner(images)
            return logits

    fixed = replace(RECIPE, crop=0, flip=0.0)
    found = train(fixed, teacher=Counted())
    assert asked == [10, 10, 10, 10, 8]
    for recipe, passes in ((replace(fixed, epochs=1), 1), (replace(fixed, crop=1), 3), (replace(fixed, flip=0.5), 3)):
        asked.clear()
        train(recipe, teacher=Counted())
        assert asked == passes * [10, 10, 10, 10, 8]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("autocomp.train.objective.CACHE_BYTES", 0)
        asked.clear()
        anew = train(fixed, teacher=Counted())
    assert len(asked) == 1 + 15  # too large: found out from the first batch
    assert anew.losses == pytest.approx(found.losses, rel=1e-5)
    with pytest.raises(StopError):
        train(fixed, teacher=Counted(), checkpoint=tmp_path / "state", observer=stopping(7))
    went_on = train(fixed, teacher=Counted(), checkpoint=tmp_path / "state")
    assert went_on.losses == found.losses


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state"
    expected = train(RECIPE)
    with pytest.raises(StopError):
        train(RECIPE, checkpoint=path, observer=stopping(8))
    before = path.read_bytes()

    def killed(*_: object) -> None:
        raise StopError

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", killed)
        with pytest.raises(StopError):
            train(RECIPE, checkpoint=path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    found = train(RECIPE, checkpoint=path)
    assert all(np.array_equal(found.tensors[name], value) for name, value in expected.tensors.items())


def test_what_a_kill_left_half_written_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "state"
    left, own = tmp_path / ".state.a1b2c3d_", tmp_path / ".state.notes-of-mine"
    for file in (left, own):
        file.write_bytes(b"half")
    train(RECIPE, checkpoint=path)
    assert path.exists() and own.exists() and not left.exists()


def test_a_checkpoint_of_something_else_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "state"
    train(RECIPE, checkpoint=path)
    other = replace(RECIPE, lr=0.01)
    assert train(other, checkpoint=path).losses == train(other).losses
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RunError, match="no checkpoint of training: remove it"):
        train(other, checkpoint=path)


def test_divergence_names_the_step_and_keeps_the_last_good_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state"
    images = split()
    dark = replace(images, preprocess=Preprocess((0.3,) * 3, (1e-38,) * 3))  # pixels beyond what sums can hold
    with pytest.raises(CompressError, match=r"its gradient (nan|inf) at step 1 of 15: try a lower --lr than 0.05$"):
        train(RECIPE, images=dark, checkpoint=path)
    assert not path.exists()
    monkeypatch.setattr("autocomp.train.loop.KEEP_EVERY", 1)
    with pytest.raises(CompressError, match=r"training diverged.* at step 2 of 15: .*last good state is in .*state$"):
        train(replace(RECIPE, lr=1e38), checkpoint=path)
    assert torch.load(path, weights_only=True)["step"] == 1
