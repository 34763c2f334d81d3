"""Train the weights that autocomp ships: ResNet-20 on scikit-learn's handwritten digits.

    python examples/train_digits.py autocomp/assets/resnet20_digits.safetensors

A few minutes on one core. The recipe was chosen on the search and selection splits, which are held out from
training; the test split is read once, at the end.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from autocomp.data import DataOptions, Split, load_data
from autocomp.models import build_zoo


def tensors(split: Split) -> tuple[Tensor, Tensor]:
    """All of a split: images (n, 3, 32, 32) and labels (n,)."""
    images, labels = next(split.batches(len(split)))
    return torch.from_numpy(images), torch.from_numpy(labels)


def augment(images: Tensor, background: float) -> Tensor:
    """Rotate by up to 14 degrees, scale and shear by up to 15%, shift by up to 10% of the width, at random."""
    count = len(images)

    def uniform(limit: float) -> Tensor:
        return (torch.rand(count) * 2 - 1) * limit

    angle, scale_x, scale_y = uniform(0.25), 1 + uniform(0.15), 1 + uniform(0.15)
    shear = uniform(0.15)
    cos, sin = torch.cos(angle), torch.sin(angle)
    rows = (
        torch.stack([scale_x * cos, shear - scale_x * sin, uniform(0.2)], dim=1),
        torch.stack([scale_y * sin, scale_y * cos, uniform(0.2)], dim=1),
    )
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    moved = F.grid_sample(images - background, grid, align_corners=False)  # pixels from outside are background
    return moved + background


def accuracy(model: nn.Module, *splits: Split) -> float:
    """Top-1 in [0, 1] over all images of the splits."""
    model.eval()
    right = total = 0
    with torch.inference_mode():
        for split in splits:
            images, labels = tensors(split)
            right += int((model(images).argmax(1) == labels).sum())
            total += len(labels)
    return right / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    data = load_data("digits", DataOptions())
    if data.train is None:
        raise SystemExit("the digits have no training split")
    images, labels = tensors(data.train)
    background = float(images.min())
    model = build_zoo("resnet20", data.classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = len(images) // args.batch  # the rest of each shuffled epoch is left out
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.rate, total_steps=args.epochs * steps, pct_start=0.2, cycle_momentum=False
    )
    for epoch in range(args.epochs):
        model.train()
        order = torch.randperm(len(images))
        for chosen in order[: steps * args.batch].split(args.batch):
            loss = F.cross_entropy(model(augment(images[chosen], background)), labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if epoch % 10 == 9:
            held_out = accuracy(model, data.search, data.selection)
            print(f"epoch {epoch + 1}: loss {loss.item():.3f}, held-out accuracy {held_out:.2%}", flush=True)

    # PyTorch's own counter of batches is of no use to inference.
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, args.out)
    print(f"test accuracy {accuracy(model, data.test):.2%} over {len(data.test)} images")
    print(f"{args.out}: {args.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
