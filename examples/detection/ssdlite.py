"""A detector: backbone and heads are compressed, anchors, box decoding and suppression stay torchvision's.

Put photographs into ``photos`` and take torchvision's weights, or your own of that model::

    autocomp search --model examples.detection.ssdlite:model --weights ssdlite320_mobilenet_v3_large_coco.pth \
        --data examples.detection.ssdlite:data --metric examples.detection.ssdlite:divergence \
        --calibration-images 256 --search-images 64 --selection-images 64 --budget 0.7x

``detect`` then finds objects with the shipped ``model.onnx``.
"""

from pathlib import Path

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.special import log_softmax
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD
from torchvision.transforms.functional import normalize, pil_to_tensor

BOX = 4  # regressions of an anchor's box; its other outputs are logits, the background's first


class Raw(nn.Module):
    """What a detector computes before its post-processing, as one tensor: (images, anchors * (classes + 4)).

    Its weights are called as the detector's. A RetinaNet's backbone and head have the same outputs.
    """

    def __init__(self, detector: SSD) -> None:
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head

    def forward(self, images: Tensor) -> Tensor:
        found = self.head(list(self.backbone(images).values()))
        return torch.cat([found["cls_logits"], found["bbox_regression"]], 2).flatten(1)


def detector(classes: int = 91) -> SSD:
    """SSDLite with random weights; ``--weights`` fills its backbone and heads."""
    found: SSD = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=classes).eval()
    return found


def model() -> nn.Module:
    """What ``--model`` names."""
    return Raw(detector())


class Photographs(Dataset[Tensor]):
    """Images alone, in the size and normalisation of the detector: nothing is known of what they show."""

    def __init__(self, files: list[Path], side: int = 320) -> None:
        self.files, self.side = files, side

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        picture = Image.open(self.files[index]).convert("RGB").resize((self.side, self.side))
        return normalize(pil_to_tensor(picture) / 255, [0.5] * 3, [0.5] * 3)


def data() -> tuple[Photographs, Photographs]:
    """What ``--data`` names: (train, test), here every fifth photograph for the last look."""
    files = sorted(Path("photos").glob("*.jpg"))
    return Photographs([file for number, file in enumerate(files) if number % 5]), Photographs(files[::5])


def divergence(
    outputs: NDArray[np.float32], reference: NDArray[np.float32], places: NDArray[np.int64], classes: int = 91
) -> float:
    """What ``--metric`` names: how far classes and boxes are from the uncompressed detector's, by anchor.

    The divergence of the class scores, and the distance of the box where the uncompressed detector sees an object.
    With annotations it could be a loss or 1 - mAP: ``places`` says which images of the dataset these are.
    """
    (logits, boxes), (own, own_boxes) = parts(outputs, classes), parts(reference, classes)
    wanted, found = log_softmax(own, axis=2), log_softmax(logits, axis=2)
    seen = 1 - np.exp(wanted[..., 0])
    apart = np.abs(boxes - own_boxes).mean(2)
    return float((np.exp(wanted) * (wanted - found)).sum(2).mean() + (seen * apart).sum() / seen.sum())


def parts(raw: NDArray[np.float32], classes: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Class logits (images, anchors, classes) and box regressions (images, anchors, 4)."""
    anchors = raw.reshape(len(raw), -1, classes + BOX)
    return anchors[..., :classes], anchors[..., classes:]


def detect(
    whole: SSD, session: onnxruntime.InferenceSession, images: Tensor, classes: int = 91
) -> list[dict[str, Tensor]]:
    """Boxes, scores and labels of images (n, 3, side, side), as normalised by `Photographs`.

    Args:
        whole: gives anchors, decoding and suppression; its weights are not used.
        session: of ``model.onnx``.
    """
    (raw,) = session.run(None, {"input": images.numpy()})
    logits, boxes = (torch.from_numpy(part) for part in parts(raw, classes))
    sizes = [tuple(image.shape[-2:]) for image in images]
    with torch.inference_mode():
        maps = list(whole.backbone(images[:1]).values())  # their sizes place the anchors
        anchors = whole.anchor_generator(ImageList(images, sizes), maps)
        found: list[dict[str, Tensor]] = whole.postprocess_detections(
            {"cls_logits": logits, "bbox_regression": boxes}, anchors, sizes
        )
    return found
