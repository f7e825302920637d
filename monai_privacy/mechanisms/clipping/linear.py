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

"""Linear layers on inputs of any rank, and embeddings."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from monai_privacy.mechanisms.clipping.convolution import zeroed
from monai_privacy.mechanisms.clipping.materials import Material, Postponed, UnitGradients, measured, squared_norms
from monai_privacy.mechanisms.clipping.operation import (
    Choose,
    Found,
    NormMethod,
    OperationRule,
    Wanted,
    by_unit,
    magnitudes,
    unit_products,
    wide,
)
from monai_privacy.mechanisms.clipping.precision import full_precision
from monai_privacy.mechanisms.clipping.units import Units


@dataclass(frozen=True)
class LinearRule(OperationRule):
    """``torch.nn.functional.linear``: x (R, ..., C_in), weight (C_out, C_in)."""

    name = "linear"
    lower_precision = True
    reads_input = False

    def run(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See the base class."""
        assert weight is not None
        return functional.linear(x, weight, bias), ()

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
        grad_x = gradient @ weight if wanted.input else None
        rows, positions = len(x), math.prod(x.shape[1:-1])
        x, gradient = x.reshape(rows, positions, -1), gradient.reshape(rows, positions, -1)
        found_bias = None
        if wanted.bias:
            assert bias is not None
            found_bias = by_unit(wide(gradient).sum(1), units, bias)
        found_weight = None
        if wanted.weight:
            found_weight = choose(
                (self.name, positions, weight.shape, x.dtype, x.device.type, wanted.gradients_only),
                lambda: self._methods(x, gradient, weight, units, wanted.gradients_only),
                lambda name: {"product": _product, "gram": _gram}[name](x, gradient, weight, units),
            )
        return Found(grad_x, found_weight, found_bias)

    def _methods(
        self, x: Tensor, gradient: Tensor, weight: Tensor, units: Units, gradients_only: bool
    ) -> list[NormMethod]:
        rows, positions, channels = x.shape
        size = weight.numel() * max(4, weight.element_size())
        one = 2.0 * rows * positions * weight.numel()
        product = NormMethod("product", units.number * size, rows * size if rows > units.number else 0, one)
        if gradients_only:
            return [product]
        pairs = rows * (rows / units.number) * positions**2
        gram = 2.0 * pairs * (channels + gradient.shape[2])
        temporary = int(8 * (2 * pairs + x.numel() + gradient.numel()))
        return [product, NormMethod("gram", x.nbytes + gradient.nbytes, temporary, 2 * gram + one)]


def _product(x: Tensor, gradient: Tensor, weight: Tensor, units: Units) -> Material:
    values = weight.new_empty((units.number, *weight.shape), dtype=wide(weight[:0]).dtype)
    unit_products(gradient.transpose(1, 2), x, units, values)
    return measured(values)


def _gram(x: Tensor, gradient: Tensor, weight: Tensor, units: Units) -> Material:
    """‖Σ_l g_l x_lᵀ‖² = Σ_{l, m} ⟨x_l, x_m⟩⟨g_l, g_m⟩ over the positions of all rows of a unit, in float64."""
    squares = torch.zeros(units.number, dtype=torch.float64, device=x.device)
    for chosen, rows, block in units.blocks(units.number):
        inputs, outputs = (_positions(values[rows], block) for values in (x, gradient))
        products = (inputs @ inputs.transpose(1, 2)) * (outputs @ outputs.transpose(1, 2))
        # Rounding may leave a zero norm slightly negative.
        squares[chosen] = products.flatten(1).sum(1).clamp_(min=0)

    def combine(factors: Tensor, finite: Tensor | None) -> Tensor:
        scale = units.spread(factors).to(wide(gradient[:0]).dtype)
        scaled = zeroed(wide(gradient) * scale[:, None, None], finite, units)
        with full_precision(x):
            return scaled.flatten(0, 1).T @ zeroed(wide(x), finite, units).flatten(0, 1)

    return Postponed(squares, combine, magnitudes(x, gradient, units), (x, gradient))


def _positions(values: Tensor, units: Units) -> Tensor:
    return values.double().reshape(units.number, -1, values.shape[-1])


@dataclass(frozen=True)
class EmbeddingRule(OperationRule):
    """``torch.nn.functional.embedding``: x (R, ...) integers, weight (V, C)."""

    padding_idx: int | None = None
    name = "embedding"

    def run(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See the base class."""
        assert weight is not None
        return functional.embedding(x, weight, self.padding_idx), ()

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
        if not wanted.weight:
            return Found()
        assert weight is not None
        words = x.reshape(len(x), -1)
        gradient = wide(gradient).reshape(*words.shape, -1)
        if self.padding_idx is not None:
            gradient = gradient * (words != self.padding_idx % len(weight)).unsqueeze(-1)
        kept = NormMethod("scatter", units.number * weight.numel() * 4, 0, gradient.numel())
        equal = NormMethod(
            "equal words",
            gradient.nbytes,
            8 * words.shape[1] * words.numel(),
            4.0 * words.shape[1] * gradient.numel(),
        )
        found = choose(
            (self.name, words.shape[1], weight.shape, x.device.type, wanted.gradients_only),
            lambda: [kept] if wanted.gradients_only else [kept, equal],
            lambda name: {"scatter": _scatter, "equal words": _equal_words}[name](words, gradient, weight, units),
        )
        return Found(weight=found)


def _scatter(words: Tensor, gradient: Tensor, weight: Tensor, units: Units) -> Material:
    owner = units.spread(torch.arange(units.number, device=words.device))
    at = (owner[:, None] * len(weight) + words).flatten()
    values = gradient.new_zeros((units.number * len(weight), weight.shape[1]))
    return UnitGradients(values.index_add_(0, at, gradient.flatten(0, 1)).unflatten(0, (units.number, -1)))


def _equal_words(words: Tensor, gradient: Tensor, weight: Tensor, units: Units) -> Material:
    """Two positions with the same word share a row of the gradient, all others are orthogonal."""
    squares = torch.zeros(units.number, dtype=torch.float64, device=words.device)
    for chosen, rows, block in units.blocks(units.number):
        values = _positions(gradient[rows], block)
        seen = words[rows].reshape(block.number, -1)
        products = (values @ values.transpose(1, 2)) * (seen[:, :, None] == seen[:, None, :])
        squares[chosen] = products.flatten(1).sum(1).clamp_(min=0)

    def combine(factors: Tensor, finite: Tensor | None) -> Tensor:
        scaled = zeroed(gradient * units.spread(factors).to(gradient.dtype)[:, None, None], finite, units)
        return scaled.new_zeros(weight.shape).index_add_(0, words.flatten(), scaled.flatten(0, 1))

    # A word's terms are added up over its places.
    bounds = units.sum(squared_norms(gradient).sqrt()) * words.shape[1] ** 0.5
    return Postponed(squares, combine, bounds, (gradient,))
