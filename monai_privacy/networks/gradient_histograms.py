# Copyright (c) monai_privacy contributors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Histograms of oriented gradients, and a linear classifier on fixed features: what a few images can train."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from monai.data import MetaTensor
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["FixedFeatureClassifier", "GradientHistograms"]

_EPSILON = 1e-5
_CLIPPED_AT = 0.2


class GradientHistograms(nn.Module):
    """Histograms of oriented gradients (HOG) of 2D images: fixed, without parameters, buffers or randomness.

    Each cell of ``cell_size`` pixels a side has a histogram of the directions of its gradients, weighted by their
    magnitude; each block of 2x2 neighbouring cells, at every position, is scaled to unit length, clipped at 0.2 and
    scaled again (L2-Hys). An image's features depend on that image alone, and neither on its brightness nor on its
    contrast. No gradient flows back to the image.

    As ``skimage.feature.hog`` computes it with 2x2 cells a block: central differences, 0 at the border; the channel of
    the strongest gradient in each pixel; each gradient in one bin, and unsigned, so that an edge from dark to bright
    counts as one from bright to dark; pixels beyond the last whole cell are left out.

    Args:
        orientations: number of bins over 180 degrees.
        cell_size: pixels a side of a cell. Images are at least two cells wide and high.

    Raises:
        ValueError: for numbers below 1; from ``forward``, for images that are no 2D images or too small.

    Reference: Dalal & Triggs 2005, "Histograms of oriented gradients for human detection", without the interpolation
        between bins and cells and the Gaussian window of a block.

    Examples::

        GradientHistograms(cell_size=8)(torch.rand(5, 1, 64, 64)).shape  # (5, 1764): 7 x 7 blocks of 4 x 9
    """

    def __init__(self, orientations: int = 9, cell_size: int = 8) -> None:
        super().__init__()
        for name, value in (("orientations", orientations), ("cell_size", cell_size)):
            if value < 1:
                raise ValueError(
                    f"{name} is {value}: a histogram needs at least 1. 9 orientations of 8 pixels are usual."
                )
        self.orientations = orientations
        self.cell_size = cell_size

    def extra_repr(self) -> str:
        """The arguments, for ``repr``."""
        return f"orientations={self.orientations}, cell_size={self.cell_size}"

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, C, H, W) to features (B, F), F = (H // cell_size - 1) (W // cell_size - 1) 4 orientations."""
        cell = self.cell_size
        # Not while tracing, which would take the answer for a constant.
        if not torch.jit.is_tracing() and (x.ndim != 4 or x.shape[1] < 1 or min(x.shape[2:]) < 2 * cell):
            raise ValueError(
                f"images have shape {tuple(x.shape)}, but must be (B, C, H, W) with at least {2 * cell} pixels a side. "
                "Resize them, or choose a smaller cell_size."
            )
        x = _plain(x)
        if x.dtype != torch.float64:
            x = x.float()
        down, right = _strongest(*_differences(x))
        magnitude = torch.hypot(down, right)
        angle = torch.atan2(down, right) % math.pi
        # Rounding can make an angle just below 0 into one of exactly pi, which lies in no bin.
        index = (angle * (self.orientations / math.pi)).long().clamp_(max=self.orientations - 1)
        # One plane a bin and not a scatter: sums in a fixed order, on every device.
        bins = torch.arange(self.orientations, device=x.device).view(1, -1, 1, 1)
        histograms = F.avg_pool2d(torch.where(index == bins, magnitude, 0.0), cell)
        return _normalised_blocks(histograms).flatten(1)


class FixedFeatureClassifier(nn.Module):
    """Fixed features and one trained linear layer: a teacher for shards of 20 to 40 images.

    PATE answers well where there are many teachers, a hundred rather than five, and each then has few images. A linear
    layer on fixed features learns from them what a deep network cannot. So it is with students of noisy labels (below
    three in four right), and with DP-SGD, whose noise grows with the number of parameters. For deep features pass a
    network that was trained on public images.

    Args:
        in_shape: (C, H, W) of the images; (C, H, W, D) for features of volumes.
        num_classes: number of logits.
        features: maps (B, *in_shape) to (B, F) or (B, F, ...), row by row; copied, frozen, and in eval mode for good.
            :class:`GradientHistograms` of 8 pixels a cell where None. For DP-SGD without batch norm (see
            ``convert_batch_norm``).
        mean: subtracted from the features: a number, or one for each feature. It must be public: a mean over the
            patients is a release.
        std: the features are divided by it; like ``mean``.

    Raises:
        ValueError: for numbers that fit no features, and where ``features`` cannot be applied to ``in_shape``.

    Only ``head`` has parameters that are trained. It starts at zero, so that training repeats; ``fit_linear_head``
    fits it at once.

    Examples::

        network = FixedFeatureClassifier(in_shape=(1, 64, 64), num_classes=2)
        network.head = fit_linear_head(network.encode(images), labels, num_classes=2)
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        in_shape: Sequence[int],
        num_classes: int,
        *,
        features: nn.Module | None = None,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}: there is nothing to tell apart. Give at least 2.")
        # A copy: the caller's own module stays trainable.
        self.features = (
            copy.deepcopy(GradientHistograms() if features is None else features).eval().requires_grad_(False)
        )
        width = _width(self.features, in_shape)
        self.register_buffer("mean", _checked_numbers("mean", mean, width))
        self.register_buffer("std", _checked_numbers("std", std, width))
        if not bool((self.std > 0).all()):
            raise ValueError(
                f"std is {float(self.std.min())} at its least: features are divided by it. Give numbers above 0."
            )
        self.head = nn.utils.skip_init(nn.Linear, width, num_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def train(self, mode: bool = True) -> FixedFeatureClassifier:
        """As for any module, but that ``features`` stay in eval mode: their batch norm and dropout are fixed too."""
        super().train(mode)
        self.features.eval()
        return self

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Map images (B, *in_shape) to standardised features (B, F)."""
        encoded: Tensor = (self.features(_plain(x)).flatten(1) - self.mean) / self.std
        return encoded

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, *in_shape) to logits (B, num_classes)."""
        logits: Tensor = self.head(self.encode(x))
        return logits


def _width(features: nn.Module, in_shape: Sequence[int]) -> int:
    """Number of features of one image."""
    try:
        with torch.no_grad():
            found: int = features(torch.zeros(1, *in_shape)).flatten(1).shape[1]
    except RuntimeError as error:
        raise ValueError(
            f"features cannot be applied to images of shape {tuple(in_shape)}: {str(error).splitlines()[0]}. Give in_shape "
            "channels first, and features for such images, on the CPU."
        ) from error
    return found


def _plain(x: Tensor) -> Tensor:
    """The tensor without MONAI's metadata, which nothing here uses and every operation would carry along."""
    return x.as_tensor() if isinstance(x, MetaTensor) else x


def _differences(x: Tensor) -> tuple[Tensor, Tensor]:
    """Central differences along H and along W, each (B, C, H, W), 0 at the border."""
    down, right = torch.zeros_like(x), torch.zeros_like(x)
    down[:, :, 1:-1] = x[:, :, 2:] - x[:, :, :-2]
    right[:, :, :, 1:-1] = x[:, :, :, 2:] - x[:, :, :, :-2]
    return down, right


def _strongest(down: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """In each pixel the gradient of the channel where it is longest, (B, 1, H, W)."""
    channel = torch.hypot(down, right).argmax(dim=1, keepdim=True)
    return down.gather(1, channel), right.gather(1, channel)


def _normalised_blocks(histograms: Tensor) -> Tensor:
    """L2-Hys of every 2x2 cells: (B, bins, rows, columns) to (B, rows - 1, columns - 1, 2, 2, bins)."""
    blocks = histograms.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 4, 5, 1)
    return _unit_length(_unit_length(blocks).clamp(max=_CLIPPED_AT))


def _unit_length(blocks: Tensor) -> Tensor:
    return blocks / (blocks.square().sum(dim=(-3, -2, -1), keepdim=True) + _EPSILON**2).sqrt()


def _checked_numbers(name: str, values: float | Sequence[float], width: int) -> Tensor:
    numbers = torch.as_tensor(values, dtype=torch.float32).detach().clone()
    if numbers.ndim > 1 or (numbers.ndim == 1 and len(numbers) != width):
        raise ValueError(
            f"{name} has shape {tuple(numbers.shape)} for {width} features. Give one number, or one for each."
        )
    if not bool(numbers.isfinite().all()):
        raise ValueError(
            f"{name} holds a value that is not finite, which would be so for every image. Give finite numbers."
        )
    return numbers
