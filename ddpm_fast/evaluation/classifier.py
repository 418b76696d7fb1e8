"""Classifier of small images, for class scores of class-conditional networks."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.pixels import from_uint8
from ..utils.files import write_atomically


class Classifier(nn.Module):
    """Network of three 3x3 convolutions, each with batch norm and pooling, and two linear layers.

    x [N, channels, size, size] in [-1, 1] -> logits [N, num_classes].
    """

    def __init__(
        self, num_classes: int = 10, channels: int = 1, size: int = 32, width: int = 32
    ) -> None:
        super().__init__()
        self.settings = dict(num_classes=num_classes, channels=channels, size=size, width=width)
        widths = (channels, width, 2 * width, 4 * width)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for c in widths[1:])
        self.dropout = nn.Dropout(0.3)
        self.hidden = nn.Linear(4 * width * (size // 8) ** 2, 4 * width)
        self.out = nn.Linear(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.max_pool2d(F.relu(norm(convolution(x))), 2)
        return self.out(self.dropout(F.relu(self.hidden(self.dropout(x.flatten(1))))))

    def check(self, shape: tuple[int, ...]) -> None:
        """Validates the shape (H, W, C) of images. ValueError for another than in training."""
        expected = self.settings["size"], self.settings["size"], self.settings["channels"]
        if shape != expected:
            raise ValueError(f"images are {shape}; the classifier was trained on {expected}")

    @torch.no_grad()
    def probabilities(self, images: Tensor, batch_size: int = 256) -> Tensor:
        """Returns class probabilities fp32 [N, classes] of images uint8 [N, H, W, C]."""
        self.check(tuple(images.shape[1:]))
        return torch.cat([self(from_uint8(part)).softmax(1) for part in images.split(batch_size)])


def save_classifier(path: str | Path, classifier: Classifier) -> None:
    """Writes one safetensors file."""
    from safetensors.torch import save

    tensors = {k: v.contiguous() for k, v in classifier.state_dict().items()}
    write_atomically(Path(path), save(tensors, {k: str(v) for k, v in classifier.settings.items()}))


def load_classifier(path: str | Path) -> Classifier:
    """Reads a file that `save_classifier` wrote. ValueError for any other."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as f:
            settings = {k: int(v) for k, v in (f.metadata() or {}).items()}
            classifier = Classifier(**settings)
            classifier.load_state_dict({k: f.get_tensor(k) for k in f.keys()})  # noqa: SIM118
    except FileNotFoundError:
        raise ValueError(
            f"{path} does not exist; train a classifier with weights/train_classifier.py"
        ) from None
    except (SafetensorError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a classifier: {str(error).splitlines()[0]}") from None
    return classifier.eval()
