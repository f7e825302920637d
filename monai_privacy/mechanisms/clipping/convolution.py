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

"""Convolutions and transposed convolutions in one, two and three dimensions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from monai_privacy.mechanisms.clipping.materials import Material, Postponed, UnitGradients, measured, squared_norms
from monai_privacy.mechanisms.clipping.onednn import has_onednn, onednn_products
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
from monai_privacy.mechanisms.clipping.unfolding import Unfolding
from monai_privacy.mechanisms.clipping.units import Units

_backward = torch.ops.aten.convolution_backward.default
Size = tuple[int, ...]
# Gram matrices are made for as many units at a time as take this much.
_GRAM_BYTES = 8 << 20
_RUN_BYTES = 4 << 20
_NORMS = ", norms"
_ONEDNN = ", oneDNN"


@dataclass(frozen=True)
class ConvolutionRule(OperationRule):
    """``torch.conv1d`` to ``conv3d`` and their transposes, whatever stride, padding, dilation and groups.

    Shape: x (R, C_in, *spatial), weight (C_out, C_in / groups, *kernel), or (C_in, C_out / groups, *kernel) if
    transposed.
    """

    stride: Size
    padding: Size
    dilation: Size
    groups: int
    transposed: bool = False
    output_padding: Size = ()
    lower_precision = True
    reads_input = False

    @property
    def name(self) -> str:  # type: ignore[override]
        """As torch calls it."""
        return f"conv{'_transpose' if self.transposed else ''}{len(self.stride)}d"

    def run(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See the base class."""
        assert weight is not None
        return torch.convolution(x, weight, bias, *self._arguments), ()

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
        gradient = _in_order(gradient)
        found_bias = None
        if wanted.bias:
            assert bias is not None
            found_bias = by_unit(wide(gradient).flatten(2).sum(2), units, bias)
        found_weight = None
        if wanted.weight:
            found_weight = choose(
                (self, x.shape[1:], weight.shape, x.dtype, x.device.type, wanted.gradients_only),
                lambda: self._methods(x, gradient, weight, units, wanted.gradients_only),
                lambda name: self._collect(name, x, gradient, weight, units),
            )
        # Last, so that the layer before finds it in the cache.
        grad_x = (
            _backward(gradient, x, weight, None, *self._arguments, (True, False, False))[0] if wanted.input else None
        )
        return Found(grad_x, found_weight, found_bias)

    @property
    def _arguments(self) -> tuple[Size, Size, Size, bool, Size, int]:
        output_padding = self.output_padding or (0,) * len(self.stride)
        return self.stride, self.padding, self.dilation, self.transposed, output_padding, self.groups

    def _methods(
        self, x: Tensor, gradient: Tensor, weight: Tensor, units: Units, gradients_only: bool
    ) -> list[NormMethod]:
        size, rows = weight.numel() * max(4, weight.element_size()), units.rows
        positions = math.prod((x if self.transposed else gradient).shape[2:])
        one = 2.0 * weight.numel() * positions * rows  # an ordinary weight gradient
        kept, held = units.number * size, x.nbytes + gradient.nbytes
        methods = []
        for name in self._forms(x, gradient, weight):
            unfolding = self._unfolding(name, x, gradient, weight)
            of_row = self._row_bytes(unfolding, x, gradient, weight)
            run = of_row * self._run_rows(unfolding, x, gradient, weight, units)
            # Where one run does it all, row by row, what it makes is kept.
            made = kept if run >= kept and rows == units.number else 0
            methods.append(NormMethod(name, kept, size if name == "loop" else run - made, one))
            if not gradients_only:
                methods.append(NormMethod(f"{name}{_NORMS}", held, run, 2 * one, instead_of=name))
        if gradients_only:
            return methods
        image, output = (gradient, x) if self.transposed else (x, gradient)
        pixels, phases = self._phase_pixels(image), self._phases(weight, image.shape[2:])
        per_unit = rows / units.number
        gram = rows * (
            2.0 * per_unit * math.prod(map(len, phases)) * pixels**2 * image.shape[1]
            + per_unit * positions**2 * (2.0 * output.shape[1] + self.groups * sum(weight.shape[2:]))
        )
        if gram < 2 * one:
            of_unit = self._gram_bytes(image, output, max(units.counts))
            temporary = min(units.number * of_unit, max(_GRAM_BYTES, of_unit))
            methods.append(NormMethod("gram", held, temporary, 2 * gram + one))
        return methods

    def _gram_bytes(self, image: Tensor, output: Tensor, rows: int) -> int:
        """What the Gram matrices of a unit of so many rows take, about."""
        pixels, positions = rows * self._phase_pixels(image), rows * math.prod(output.shape[2:])
        return 8 * (
            self.groups * (2 * pixels**2 + 2 * positions**2) + pixels * image.shape[1] + positions * output.shape[1]
        )

    def _collect(self, name: str, x: Tensor, gradient: Tensor, weight: Tensor, units: Units) -> Material:
        """By the method of that name."""
        if name == "gram":
            return self._gram(x, gradient, weight, units)
        form = name.removesuffix(_NORMS)
        unfolding = self._unfolding(form, x, gradient, weight)
        most = self._run_rows(unfolding, x, gradient, weight, units)
        if name == form:
            arrange = None if unfolding is None else unfolding.arranged
            if most == units.rows:
                return measured(self._form(form, unfolding, x, gradient, weight, units), arrange)
            shape = weight.shape if unfolding is None else unfolding.shape(weight)
            values, squares, done = weight.new_empty((units.number, *shape), dtype=wide(weight[:0]).dtype), [], 0
            for rows, run in units.runs(most):
                out = values[done : done + run.number]
                squares.append(squared_norms(self._form(form, unfolding, x[rows], gradient[rows], weight, run, out)))
                done += run.number
            return UnitGradients(values, torch.cat(squares), arrange)
        with full_precision(x):
            squares = [
                squared_norms(self._form(form, unfolding, wide(x[rows]), wide(gradient[rows]), wide(weight), run))
                for rows, run in units.runs(most)
            ]
        return self._postponed(torch.cat(squares), x, gradient, weight, units)

    def _forms(self, x: Tensor, gradient: Tensor, weight: Tensor) -> list[str]:
        """The ways to the units' gradients."""
        forms = ["loop"] if len(x) == 1 else ["loop", "grouped"]
        if not self.transposed and self.groups == 1:
            form = "product" if set(weight.shape[2:]) == {1} and not any(self.padding) else "unfold"
            forms += [form, form + _ONEDNN] if has_onednn(x) and has_onednn(gradient) else [form]
        return forms

    def _unfolding(self, form: str, x: Tensor, gradient: Tensor, weight: Tensor) -> Unfolding | None:
        """How a form that is a matrix product takes the convolution apart."""
        if form in ("loop", "grouped"):
            return None
        return Unfolding.cheapest(x.shape, gradient.shape, weight.shape, self.stride, self.padding, self.dilation)

    def _run_rows(self, unfolding: Unfolding | None, x: Tensor, gradient: Tensor, weight: Tensor, units: Units) -> int:
        """How many rows are worked on at once: what is made of them passes through the cache, not through memory."""
        return min(units.rows, max(_RUN_BYTES // self._row_bytes(unfolding, x, gradient, weight), *units.counts))

    def _row_bytes(self, unfolding: Unfolding | None, x: Tensor, gradient: Tensor, weight: Tensor) -> int:
        """What a form makes for a row, about."""
        return weight.numel() * max(4, weight.element_size()) + (unfolding.row_bytes(x, gradient) if unfolding else 0)

    def _form(
        self,
        form: str,
        unfolding: Unfolding | None,
        x: Tensor,
        gradient: Tensor,
        weight: Tensor,
        units: Units,
        out: Tensor | None = None,
    ) -> Tensor:
        """(P, ...) gradients of units, as the form lays them; ``out``, where given."""
        shape = weight.shape if unfolding is None else unfolding.shape(weight)
        values = weight.new_empty((units.number, *shape), dtype=wide(weight[:0]).dtype) if out is None else out
        if unfolding is not None:
            multiply = onednn_products if form.endswith(_ONEDNN) else unit_products
            multiply(*unfolding.factors(x, gradient), units, values.view(units.number, shape[0], -1))
        elif form == "loop":
            for unit, rows in enumerate(units.slices()):
                values[unit] = self._weight_gradient(x[rows], gradient[rows], weight)
        else:
            by_row = self._grouped(x, gradient, weight)
            values.copy_(units.sum(wide(by_row)).view_as(values))
        return values

    def _weight_gradient(self, x: Tensor, gradient: Tensor, weight: Tensor) -> Tensor:
        return _backward(gradient, x, weight, None, *self._arguments, (False, True, False))[1]

    def _grouped(self, x: Tensor, gradient: Tensor, weight: Tensor) -> Tensor:
        """The rows folded into the channels: one weight gradient with R times as many groups."""
        rows = len(x)
        folded = replace(self, groups=rows * self.groups)
        values = folded._weight_gradient(
            # By way of one dimension: a map of one pixel would keep strides by which torch takes it for channels-last.
            x.reshape(-1).view(1, -1, *x.shape[2:]),
            gradient.reshape(-1).view(1, -1, *gradient.shape[2:]),
            weight.new_empty((rows * weight.shape[0], *weight.shape[1:])),  # only its shape is asked for
        )
        return values.unflatten(0, (rows, -1))

    def _gram(self, x: Tensor, gradient: Tensor, weight: Tensor, units: Units) -> Material:
        """Inner products of patches times those of output gradients, summed over pairs of positions.

        ‖Σ_l patch_l g_lᵀ‖² = Σ_{l, m} ⟨patch_l, patch_m⟩⟨g_l, g_m⟩, over the positions of all rows of a unit. Products of
        patches are sums of products of pixels, so that no patch is ever copied. In float64: the terms may cancel, and
        a norm that is too small would break the bound.
        """
        # A transposed convolution's weight gradient is that of the convolution it transposes, with x for its output.
        image, output = (gradient, x) if self.transposed else (x, gradient)
        squares = torch.zeros(units.number, dtype=torch.float64, device=x.device)
        most = max(1, _GRAM_BYTES // self._gram_bytes(image, output, max(units.counts)))
        for chosen, rows, block in units.blocks(most):
            outputs = _positions(output[rows], block, self.groups)
            outputs = outputs.transpose(1, 2) @ outputs
            inner = squares.new_zeros(len(outputs))
            for phase in itertools.product(*self._phases(weight, image.shape[2:])):
                # A call for each phase: the large products of pixels go as soon as they are summed.
                inner += self._patch_products(image[rows], phase, output.shape[2:], block).mul_(outputs).sum((1, 2))
            # Rounding may leave a zero norm slightly negative.
            squares[chosen] = inner.unflatten(0, (-1, self.groups)).sum(1).clamp_(min=0)
        return self._postponed(squares, x, gradient, weight, units)

    def _phases(self, weight: Tensor, image: Size) -> list[list[tuple[int, list[int]]]]:
        """For each dimension, the pixels that some offsets of the kernel see, every stride-th from the first one named.

        Position l of the output sees pixel l + t of them, t among the shifts. Offsets in different phases see different
        pixels, so that products of pixels are made within a phase alone.
        """
        phases = []
        for n, kernel, stride, padding, dilation in zip(
            image, weight.shape[2:], self.stride, self.padding, self.dilation, strict=True
        ):
            shifts: dict[int, list[int]] = {}
            for offset in range(-padding, kernel * dilation - padding, dilation):
                shifts.setdefault(offset % stride, []).append(offset // stride)
            phases.append([(first, of_first) for first, of_first in shifts.items() if first < n])
        return phases

    def _phase_pixels(self, image: Tensor) -> int:
        """How many pixels a phase has, at most."""
        return math.prod(-(-n // s) for n, s in zip(image.shape[2:], self.stride, strict=True))

    def _patch_products(
        self, image: Tensor, phase: tuple[tuple[int, list[int]], ...], output: Size, units: Units
    ) -> Tensor:
        """(P G, n L, n L) inner products of the patches under each pair of positions, as far as a phase has them."""
        seen = [slice(first, None, step) for (first, _), step in zip(phase, self.stride, strict=True)]
        part = image[(slice(None), slice(None), *seen)]
        pixels = _positions(part, units, self.groups)
        shape = (units.equal or 1, *part.shape[2:])
        products = (pixels.transpose(1, 2) @ pixels).view(-1, *shape, *shape)
        # A sum over the offsets of one dimension after the other: of 27 offsets it takes nine.
        for dimension, (_, shifts) in enumerate(phase):
            products = _shifted(products, 2 + dimension, 3 + dimension + len(phase), shifts, output[dimension])
        return products.reshape(len(products), -1, (units.equal or 1) * math.prod(output))

    def _postponed(self, squares: Tensor, x: Tensor, gradient: Tensor, weight: Tensor, units: Units) -> Material:
        def combine(factors: Tensor, finite: Tensor | None) -> Tensor:
            scale = units.spread(factors).to(gradient.dtype if gradient.element_size() >= 4 else torch.float32)
            inputs = zeroed(wide(x), finite, units)
            scaled = zeroed(wide(gradient) * scale.view(-1, *[1] * (gradient.dim() - 1)), finite, units)
            with full_precision(x):
                return self._weight_gradient(inputs, scaled, wide(weight))

        bounds = magnitudes(x, gradient, units, math.sqrt(math.prod(weight.shape[2:])))
        return Postponed(squares, combine, bounds, (x, gradient))


def _in_order(values: Tensor) -> Tensor:
    """What lies scattered in a larger tensor (as gradients of a concatenation do) copied once, where two products would."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    channels_last = formats.get(values.dim())
    if channels_last is not None and values.is_contiguous(memory_format=channels_last):
        return values
    return values.contiguous()


def zeroed(values: Tensor, finite: Tensor | None, units: Units) -> Tensor:
    """(R, ...) values with zeros in the rows of units that are not ``finite``: zero times infinity is not a number."""
    if finite is None:
        return values
    return torch.where(units.spread(finite).view(-1, *[1] * (values.dim() - 1)), values, 0)


def _shifted(products: Tensor, one: int, other: int, shifts: Sequence[int], size: int) -> Tensor:
    """Σ over shifts t of products[i + t, j + t], for i and j below ``size`` in two dimensions; nothing lies outside."""
    there = products.shape[one]
    if list(shifts) == [0] and there == size:
        return products
    total = products.new_zeros([size if at in (one, other) else n for at, n in enumerate(products.shape)])
    for shift in shifts:
        first, last = max(0, -shift), min(size, there - shift)
        if first < last:
            into = total.narrow(one, first, last - first).narrow(other, first, last - first)
            start = first + shift
            into += products.narrow(one, start, last - first).narrow(other, start, last - first)
    return total


def _positions(values: Tensor, units: Units, groups: int) -> Tensor:
    """(P n, G c, *spatial) to (P G, c, n L) in float64: the positions of all rows of a unit side by side."""
    split = values.double().flatten(2).reshape(units.number, units.equal or 1, groups, -1, math.prod(values.shape[2:]))
    return split.permute(0, 2, 3, 1, 4).reshape(units.number * groups, split.shape[3], -1)
