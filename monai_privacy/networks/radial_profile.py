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

"""Fixed features of a finding in the middle of an image or volume: how bright it is at each distance from the middle."""

from __future__ import annotations

import math

import torch
from monai.data import MetaTensor
from torch import Tensor, nn

__all__ = ["RadialProfile"]


class RadialProfile(nn.Module):
    """Mean intensity at each distance from the middle: fixed, without parameters, buffers or randomness.

    For crops around a finding, such as a lung nodule: size and density of the finding are in these few numbers, whatever
    way it is turned, so that a linear head can learn from a dozen patients. An image's features depend on that image
    alone. Every dimension counts in voxels: resample to one spacing first. No gradient flows back to the image.

    Args:
        shells: number F of distances, each as wide as the others.
        radius: largest distance, in voxels; voxels beyond it are left out. Half of the shortest side where None.

    Raises:
        ValueError: for fewer than one shell or a radius not above 0; from ``forward``, for images of less than one
            spatial dimension, and for a shell in which no voxel lies.

    Examples::

        RadialProfile(shells=8)(torch.rand(5, 1, 32, 32, 32)).shape  # (5, 8)
    """

    def __init__(self, shells: int = 8, radius: float | None = None) -> None:
        super().__init__()
        if shells < 1:
            raise ValueError(f"shells is {shells}: a profile needs at least 1. 8 for 32 voxels a side are usual.")
        if radius is not None and not 0 < radius < math.inf:
            raise ValueError(f"radius is {radius}, but must be a finite number above 0: the voxels to look at.")
        self.shells = shells
        self.radius = radius

    def extra_repr(self) -> str:
        """The arguments, for ``repr``."""
        return f"shells={self.shells}, radius={self.radius}"

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, C, *spatial) to features (B, C F): the shells of each channel, the innermost first."""
        if x.ndim < 3:
            raise ValueError(f"images have shape {tuple(x.shape)}, but must be (B, C, *spatial). Add what is missing.")
        x = x.as_tensor() if isinstance(x, MetaTensor) else x
        x = x if x.dtype == torch.float64 else x.float()
        radius = self.radius or min(x.shape[2:]) / 2
        squares = torch.zeros((), device=x.device)
        for axis, size in enumerate(x.shape[2:]):
            shape = [-1 if other == axis else 1 for other in range(x.ndim - 2)]
            squares = squares + (torch.arange(size, device=x.device) - (size - 1) / 2).square().view(shape)
        shell = (squares.sqrt() * (self.shells / radius)).long().flatten()
        members = (shell[:, None] == torch.arange(self.shells, device=x.device)).to(x.dtype)
        voxels = members.sum(0)
        # Not while tracing, which would take the answer for a constant.
        if not torch.jit.is_tracing() and not bool((voxels > 0).all()):
            raise ValueError(
                f"{self.shells} shells up to {radius:g} voxels are too thin for images of {tuple(x.shape[2:])}: some hold "
                "no voxel. Ask for fewer."
            )
        return ((x.flatten(2) @ members) / voxels).flatten(1)
