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

"""What the clipping engine needs to know of an operation with parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from monai_privacy.mechanisms.clipping.materials import Material, UnitGradients, squared_norms
from monai_privacy.mechanisms.clipping.units import Units


@dataclass(frozen=True)
class NormMethod:
    """What one exact way to the norms of a weight's gradients by unit costs.

    Args:
        name: "loop", "grouped", "product", "gram" ...
        held: bytes that stay until the clip factors are known.
        temporary: bytes beside that, while it works.
        arithmetic: estimated multiplications and additions, the forming of the clipped sum included.
        instead_of: name of a method that is better wherever its memory is there.
    """

    name: str
    held: int
    temporary: int
    arithmetic: float
    instead_of: str | None = None


class Choose(Protocol):
    """Choose one of several methods and return what it collects."""

    def __call__(
        self,
        signature: tuple[object, ...],
        methods: Callable[[], Sequence[NormMethod]],
        collect: Callable[[str], Material],
    ) -> Material:
        """Collect by the best of ``methods()``; ``signature`` names the case, so that it is found once."""
        ...


class Wanted(NamedTuple):  # a named tuple, as what is made for each use should take no time
    """What a backward pass is asked for.

    Args:
        input: the gradient of the input.
        weight: the material of the weight.
        bias: the material of the bias.
        gradients_only: the parameter is used elsewhere too, so that norms alone would not do.
    """

    input: bool
    weight: bool
    bias: bool
    gradients_only: bool = False


class Found(NamedTuple):
    """What a backward pass gives; None for what was not wanted."""

    input: Tensor | None = None
    weight: Material | None = None
    bias: Material | None = None


class OperationRule(ABC):
    """An operation ``y = f(x, weight, bias)`` in which row i of y depends on row i of x alone.

    Rows are the first dimension of x. All methods work on plain tensors and are not differentiated themselves.
    """

    name: str
    # Under autocast, the dtype policy of torch: these run in the lower precision.
    lower_precision: bool = False
    # Whether the backward pass reads the input even where the weight is not trained.
    reads_input: bool = True

    @abstractmethod
    def run(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output, and further tensors that :meth:`backward` needs."""

    @abstractmethod
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
        """Input gradient and materials from the ``gradient`` of the output."""


def by_unit(rows: Tensor, units: Units, like: Tensor) -> UnitGradients:
    """(R, ...) gradients of rows to those of units, of the shape of ``like``."""
    values, shape = units.sum(rows), (units.number, *like.shape)
    return UnitGradients(values if values.shape == shape else values.reshape(shape))


def unit_products(gradients: Tensor, inputs: Tensor, units: Units, out: Tensor) -> None:
    """(R, N, L) and (R, L, M) matrices to ``out``, the (P, N, M) sums of their products over the rows of each unit."""
    if gradients.dtype != out.dtype or (gradients.is_cuda and units.rows > units.number):
        out.copy_(units.sum(wide(torch.bmm(gradients, inputs))))
    elif units.rows == units.number:
        torch.bmm(gradients, inputs, out=out)
    else:
        # A sum grows in the cache, where a product for each row would go through memory twice.
        for total, rows in zip(out.unbind(), units.slices(), strict=True):
            first, *others = zip(gradients[rows].unbind(), inputs[rows].unbind(), strict=True)
            torch.mm(*first, out=total)
            for gradient, x in others:
                total.addmm_(gradient, x)


def magnitudes(x: Tensor, gradient: Tensor, units: Units, times: float = 1.0) -> Tensor:
    """(P,) float64 bounds Σ ‖x_r‖‖g_r‖ over a unit's rows r: by Cauchy and Schwarz, no sum of their products has larger
    terms; ``times`` for how often a layer uses each number."""
    squares = squared_norms(x).sqrt() * squared_norms(gradient).sqrt()
    return units.sum(squares) * times


def wide(tensor: Tensor) -> Tensor:
    """At least float32: sums over patients in bfloat16 would round by more than a clipping norm."""
    return tensor if tensor.element_size() >= 4 else tensor.float()
