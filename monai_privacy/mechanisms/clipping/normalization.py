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

"""Layers with a weight and a bias for each channel: group, instance and layer norm, folded batch norm, PReLU."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from monai_privacy.mechanisms.clipping.operation import Choose, Found, OperationRule, Wanted, by_unit, wide
from monai_privacy.mechanisms.clipping.units import Units


@dataclass(frozen=True)
class GroupNormRule(OperationRule):
    """``torch.group_norm``: x (R, C, *spatial), weight and bias (C,); instance norm is that of C groups."""

    groups: int
    eps: float
    name: str = "group_norm"

    def run(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See the base class."""
        x = x.contiguous()
        rows, channels, positions = len(x), x.shape[1], math.prod(x.shape[2:])
        y, mean, rstd = torch.native_group_norm(x, weight, bias, rows, channels, positions, self.groups, self.eps)
        return y, (mean, rstd)

    def backward(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        extra: tuple[Tensor, ...],
        gradient: Tensor,
        units: Units,
        wanted: Wanted,
        choose: Choose,
    ) -> Found:
        """The rows folded into the channels: the kernel then gives each row's own gradients at no extra cost."""
        mean, rstd = extra
        rows, channels, positions = len(x), x.shape[1], math.prod(x.shape[2:])
        grad_x, of_weight, of_bias = torch.ops.aten.native_group_norm_backward(
            # The kernel reads memory in order, whatever the strides say.
            gradient.reshape(1, rows * channels, positions).contiguous(),
            x.reshape(1, rows * channels, positions).contiguous(),
            mean.reshape(1, -1),
            rstd.reshape(1, -1),
            # One channel keeps a stride of zero through reshape.
            None if weight is None else weight.expand(rows, -1).reshape(-1).contiguous(),
            1,
            rows * channels,
            positions,
            rows * self.groups,
            (wanted.input, wanted.weight, wanted.bias),
        )
        return Found(
            grad_x.reshape(x.shape) if wanted.input else None,
            by_unit(wide(of_weight.view(rows, channels)), units, weight)
            if wanted.weight and weight is not None
            else None,
            by_unit(wide(of_bias.view(rows, channels)), units, bias) if wanted.bias and bias is not None else None,
        )


@dataclass(frozen=True)
class LayerNormRule(OperationRule):
    """``torch.nn.functional.layer_norm``: x (R, ..., *shape), weight and bias of that shape."""

    shape: tuple[int, ...]
    eps: float
    name = "layer_norm"

    def run(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See the base class."""
        y, mean, rstd = torch.native_layer_norm(x, self.shape, weight, bias, self.eps)
        return y, (mean, rstd)

    def backward(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        extra: tuple[Tensor, ...],
        gradient: Tensor,
        units: Units,
        wanted: Wanted,
        choose: Choose,
    ) -> Found:
        """See the base class."""
        mean, rstd = extra
        gradient = gradient.contiguous()
        grad_x = None
        if wanted.input:
            grad_x = torch.ops.aten.native_layer_norm_backward(
                gradient, x.contiguous(), self.shape, mean, rstd, weight, bias, (True, False, False)
            )[0]
        rows = len(x)
        of_weight = of_bias = None
        if wanted.weight and weight is not None:
            normalized = (x - mean) * rstd
            of_weight = by_unit(_over_positions(wide(gradient * normalized), rows, weight), units, weight)
        if wanted.bias and bias is not None:
            of_bias = by_unit(_over_positions(wide(gradient), rows, bias), units, bias)
        return Found(grad_x, of_weight, of_bias)


def _over_positions(values: Tensor, rows: int, parameter: Tensor) -> Tensor:
    return values.reshape(rows, -1, parameter.numel()).sum(1)


@dataclass(frozen=True)
class ChannelAffineRule(OperationRule):
    """``channel_affine``: x (R, C, *spatial) times weight plus bias, (C,) each."""

    name = "channel_affine"

    def run(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See the base class."""
        assert weight is not None
        assert bias is not None
        shape = _channel_shape(x)
        return torch.addcmul(bias.view(shape), x, weight.view(shape)).to(x.dtype), ()

    def backward(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        extra: tuple[Tensor, ...],
        gradient: Tensor,
        units: Units,
        wanted: Wanted,
        choose: Choose,
    ) -> Found:
        """See the base class."""
        assert weight is not None
        assert bias is not None
        return Found(
            (gradient * weight.view(_channel_shape(x))).to(x.dtype) if wanted.input else None,
            by_unit(_over_space(wide(gradient) * wide(x)), units, weight) if wanted.weight else None,
            by_unit(_over_space(wide(gradient)), units, bias) if wanted.bias else None,
        )


def _channel_shape(x: Tensor) -> list[int]:
    return [1, x.shape[1]] + [1] * (x.dim() - 2)


def _over_space(values: Tensor) -> Tensor:
    """(R, C, *spatial) to (R, C)."""
    return values.flatten(2).sum(2) if values.dim() > 2 else values


@dataclass(frozen=True)
class PReLURule(OperationRule):
    """``torch.prelu``: x (R, C, *spatial) or (R,), weight (C,) or (1,)."""

    name = "prelu"
    lower_precision = True

    def run(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See the base class."""
        assert weight is not None
        return functional.prelu(x, weight), ()

    def backward(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        extra: tuple[Tensor, ...],
        gradient: Tensor,
        units: Units,
        wanted: Wanted,
        choose: Choose,
    ) -> Found:
        """See the base class."""
        assert weight is not None
        slope = weight.view(_channel_shape(x)) if weight.numel() > 1 else weight
        of_weight = None
        if wanted.weight:
            rows = wide(gradient) * wide(x).clamp(max=0)
            summed = _over_space(rows) if weight.numel() > 1 else rows.reshape(len(x), -1).sum(1, keepdim=True)
            of_weight = by_unit(summed, units, weight)
        return Found(torch.where(x > 0, gradient, gradient * slope) if wanted.input else None, of_weight)
