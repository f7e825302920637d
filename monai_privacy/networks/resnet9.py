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

"""A ResNet with group norm, as small as the DP-SGD literature on chest X-rays uses it, in 2D and 3D."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.layers.factories import Conv, Pool
from monai.networks.layers.utils import get_act_layer, get_norm_layer
from torch import Tensor, nn

__all__ = ["ResNet9"]


class _ResidualBlock(nn.Module):
    """Two 3x3 convolutions with group norm, and a shortcut that is normalised too where it has weights."""

    def __init__(
        self,
        *,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        stride: int,
        num_groups: int,
        act: str | tuple[str, dict[str, Any]],
    ) -> None:
        super().__init__()
        conv = Conv[Conv.CONV, spatial_dims]
        self.conv1 = conv(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.norm1 = _group_norm(out_channels, num_groups)
        self.conv2 = conv(out_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.norm2 = _group_norm(out_channels, num_groups)
        self.act = get_act_layer(act)
        self.shortcut: nn.Module = nn.Identity()
        # The one stage of stride 1 follows a stem of its own width.
        if stride != 1:
            self.shortcut = nn.Sequential(
                conv(in_channels, out_channels, kernel_size=1, stride=stride, bias=False),
                _group_norm(out_channels, num_groups),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, *spatial) to (B, out_channels, *spatial / stride)."""
        out = self.act(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        out = out + self.shortcut(x)
        activated: Tensor = self.act(out)
        return activated


class ResNet9(nn.Module):
    """Residual network with one basic block a stage and group norm everywhere, shortcuts included.

    A 7x7 convolution and a max pooling, both of stride 2, then four stages of one block each (the last three of
    stride 2), global average pooling and a linear layer. No batch statistic and no buffer: a row's output depends
    on that row alone, in training as in evaluation, so that it can be trained with DP-SGD as it is. With the
    defaults, three input channels and eight classes it has 4,909,896 parameters in 2D.

    Args:
        spatial_dims: number of spatial dimensions, 1, 2 or 3.
        in_channels: number of channels of the image.
        out_channels: number of classes (logits a row).
        widths: channels of the four stages; the stem has as many as the first stage.
        num_groups: groups of each group norm; must divide each width.
        act: activation type and arguments, as in MONAI's ``get_act_layer``.

    Raises:
        ValueError: where ``spatial_dims`` is not 1, 2 or 3, where there are not four widths, or where
            ``num_groups`` does not divide one of them.

    The network halves each side five times. Below 32 voxels a side the stages run out of space: a group norm that
    sees two channels of one voxel each passes on nothing but a sign.

    Source: the "ResNet9" of Tayebi Arasteh et al., "Preserving fairness and diagnostic accuracy in private
    large-scale AI models for medical imaging", Communications Medicine 2024 (Mish, GroupNorm(32, C), 2D), here for
    volumes too. It has neither the ScaleNorm nor the centred weights of the other network of that name.

    Examples::

        network = ResNet9(spatial_dims=3, in_channels=1, out_channels=2)
        network(torch.zeros(1, 1, 64, 64, 64)).shape  # (1, 2)
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        widths: Sequence[int] = (64, 128, 256, 512),
        num_groups: int = 32,
        act: str | tuple[str, dict[str, Any]] = "mish",
    ) -> None:
        super().__init__()
        _check_arguments(spatial_dims, widths=widths, num_groups=num_groups)
        self.stem = nn.Sequential(
            Conv[Conv.CONV, spatial_dims](in_channels, widths[0], kernel_size=7, stride=2, padding=3, bias=False),
            _group_norm(widths[0], num_groups),
            get_act_layer(act),
            Pool[Pool.MAX, spatial_dims](kernel_size=3, stride=2, padding=1),
        )
        self.stages = nn.Sequential(
            *(
                _ResidualBlock(
                    spatial_dims=spatial_dims,
                    in_channels=before,
                    out_channels=width,
                    stride=stride,
                    num_groups=num_groups,
                    act=act,
                )
                for before, width, stride in zip((widths[0], *widths[:-1]), widths, (1, 2, 2, 2), strict=True)
            )
        )
        self.pool = Pool[Pool.ADAPTIVEAVG, spatial_dims](1)
        self.head = nn.Linear(widths[-1], out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, in_channels, *spatial) to logits (B, out_channels)."""
        features = self.pool(self.stages(self.stem(x)))
        logits: Tensor = self.head(torch.flatten(features, 1))
        return logits


def _group_norm(channels: int, num_groups: int) -> nn.Module:
    norm: nn.Module = get_norm_layer(("group", {"num_groups": num_groups}), channels=channels)
    return norm


def _check_arguments(spatial_dims: int, *, widths: Sequence[int], num_groups: int) -> None:
    if spatial_dims not in (1, 2, 3):
        raise ValueError(f"spatial_dims is {spatial_dims}: images have 1, 2 or 3 dimensions. Pass one of these.")
    if len(widths) != 4:
        raise ValueError(f"widths has {len(widths)} entries, {tuple(widths)}: there are four stages. Pass four.")
    for width in widths:
        if num_groups < 1 or width < 1 or width % num_groups:
            raise ValueError(
                f"num_groups is {num_groups}, which does not divide the width {width}: groups must be of one size. "
                "Choose a divisor of every width, or other widths."
            )
