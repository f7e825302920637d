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

"""What clipping does with each layer of a network: method, share of the cost, memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from monai_privacy.mechanisms.clipping.clipper import GradientClipper
from monai_privacy.mechanisms.clipping.one_pass import UseCost
from monai_privacy.mechanisms.losses import RowLoss


@dataclass(frozen=True)
class LayerCost:
    """One use of trained parameters.

    Args:
        parameters: their names.
        operation: what was done with them, as torch calls it.
        method: how the norms of the weight were found; "rows" where the operation gives them by itself.
        share: of the time of all layers' backward passes and norms, from 0 to 1.
        nbytes: memory held until the clip factors were known.
    """

    parameters: tuple[str, ...]
    operation: str
    method: str
    share: float
    nbytes: int


@dataclass(frozen=True)
class ClippingExplanation:
    """How the gradients of a network are clipped.

    Args:
        layers: each use of trained parameters, in the order of the forward pass; empty where patients go one by one.
        faults: why patients go through the network one at a time; empty where they go together.
    """

    layers: tuple[LayerCost, ...]
    faults: tuple[str, ...]

    def __str__(self) -> str:
        """The table."""
        if self.faults:
            return f"Patients go through the network one at a time, which is slow: {'; '.join(self.faults)}."
        heads = ("parameters", "operation", "method", "share", "memory")
        rows = [
            (", ".join(c.parameters), c.operation, c.method, f"{c.share:.1%}", f"{c.nbytes / 2**20:.1f} MB")
            for c in self.layers
        ]
        widths = [max(len(row[at]) for row in [heads, *rows]) for at in range(len(heads))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [heads, *rows]
        ]
        return "\n".join(line.rstrip() for line in lines)


def explain_clipping(network: nn.Module, example: Tensor) -> ClippingExplanation:
    """Clip the gradients of synthetic rows like ``example``, each a patient's only one, and say how that was done.

    Args:
        network: in the mode in which it will be trained; not changed.
        example: (R, ...) inputs; only their number, shape, dtype and device are used.

    Returns:
        Methods and costs as measured on this machine; another machine or number of rows may give others.
    """
    rows = len(example)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(example.shape, generator=generator).to(example) if example.is_floating_point() else example * 0
    batch = (inputs, torch.zeros(rows, device=example.device))
    clipper = GradientClipper(network, RowLoss(_mean_square))
    costs: list[UseCost] = []
    devices = [example.device] if example.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        for metered in (None, costs.append):  # methods are chosen at the first time
            clipper(batch, torch.arange(rows), 1.0, meter=metered)
    names = clipper.names
    total = sum(cost.seconds for cost in costs) or 1.0
    layers = [
        LayerCost(
            tuple(names[at] for at in cost.use.parameters),
            cost.use.operation.name,
            cost.method,
            cost.seconds / total,
            cost.nbytes,
        )
        for cost in sorted(costs, key=lambda cost: cost.use.number)
    ]
    return ClippingExplanation(tuple(layers), clipper.faults)


def _mean_square(outputs: Any, targets: Tensor) -> Tensor:
    """(R,) numbers that depend on everything that the network gives."""
    return torch.stack([output.float().flatten(1).square().mean(1) for output in _tensors(outputs)]).sum(0)


def _tensors(outputs: Any) -> Sequence[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs] if outputs.is_floating_point() and outputs.dim() else []
    values = outputs.values() if isinstance(outputs, dict) else outputs if isinstance(outputs, list | tuple) else ()
    return [tensor for value in values for tensor in _tensors(value)]
