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

"""What is kept of a layer's use in the backward pass until the clip factors are known.

Either the gradient of each unit, or the units' squared norms and a way to form the clipped sum afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# A float32 norm of a million elements is 4e-5 low on the CPU; in chunks of this many it is right to 1e-7.
_CHUNK = 4096
# Near 1e-38 float32 has few digits left, and a product with such a factor would not be what the norm says.
_SMALLEST_FACTOR = 1e-30
# Numbers of a unit from which on more threads are worth another call.
_SHARED = 1 << 14
# Times the rounding of float32, 6e-8: what the sum may be beside its norm, in clipping norms.
_MOST_CANCELLED = 1e4


@dataclass(frozen=True)
class UnitGradients:
    """The gradient of each unit with respect to one parameter.

    Args:
        values: (P, ...), for each unit the numbers of its gradient.
        squares: (P,) float64, where they are known already.
        arrange: from (n, ...) like ``values`` to (n, *shape of the parameter); None where they have that shape.
    """

    values: Tensor
    squares: Tensor | None = None
    arrange: Callable[[Tensor], Tensor] | None = None

    @property
    def arranged(self) -> Tensor:
        """(P, *shape of the parameter)."""
        return self.values if self.arrange is None else self.arrange(self.values)

    def squared_norms(self) -> Tensor:
        """(P,) float64."""
        return squared_norms(self.values) if self.squares is None else self.squares

    def weighted_sum(self, factors: Tensor, finite: Tensor | None) -> Tensor:
        """Σ over units of factor times gradient, units that are not ``finite`` left out; None where all are."""
        flat = self.values.reshape(len(self.values), -1)
        if finite is not None:
            # Zero times infinity is not a number.
            flat = torch.where(finite[:, None], flat, 0)
        total = _combined(factors.to(flat.dtype), flat).reshape(self.values.shape[1:])
        # In order, as parameters lie: fused optimizers read memory and not strides.
        return total if self.arrange is None else self.arrange(total[None])[0].contiguous()

    @property
    def nbytes(self) -> int:
        """Memory that is held."""
        return self.values.nbytes


def _combined(factors: Tensor, values: Tensor) -> Tensor:
    """(P,) factors times (P, N) values."""
    # On a CPU a vector times a matrix is left to one thread, which sees half of the memory's bandwidth: a part for each.
    parts = math.gcd(values.shape[1], torch.get_num_threads()) if values.device.type == "cpu" else 1
    if parts == 1 or values.shape[1] < _SHARED:
        return factors @ values
    return torch.bmm(factors.expand(parts, 1, -1), values.unflatten(1, (parts, -1)).transpose(0, 1)).flatten()


@dataclass(frozen=True)
class Postponed:
    """Norms now, the clipped sum later, from the input and the output gradient of the layer.

    Args:
        squares: (P,) float64 squared norms.
        combine: (P,) factors and (P,) finite flags, None where all are, to the sum, of the parameter's shape.
        magnitudes: (P,) float64 bounds on the sum of absolute values of what ``combine`` adds up for a unit of factor 1.
        sources: what ``combine`` works on.
    """

    squares: Tensor
    combine: Callable[[Tensor, Tensor | None], Tensor]
    magnitudes: Tensor
    sources: tuple[Tensor, ...]
    _versions: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_versions", tuple(source._version for source in self.sources))

    @property
    def nbytes(self) -> int:
        """Memory that is held."""
        return sum(source.nbytes for source in self.sources)

    def squared_norms(self) -> Tensor:
        """(P,) float64."""
        return self.squares

    def weighted_sum(self, factors: Tensor, finite: Tensor | None) -> Tensor:
        """Σ over units of factor times gradient, units that are not ``finite`` left out; None where all are.

        Raises:
            ValueError: where what the norms were of has been written over.
        """
        if tuple(source._version for source in self.sources) != self._versions:
            raise ValueError(
                "a layer's input or output gradient was written over after its norm was taken (by a hook or an autograd "
                "function that works in place), so the clipped sum would be of other numbers. Make it return a new tensor."
            )
        return self.combine(factors, finite)


Material = UnitGradients | Postponed


@dataclass(frozen=True)
class Bundle:
    """Gradients of several parameters side by side.

    Args:
        gradients: (P, total size).
        sizes: of each parameter.
    """

    gradients: UnitGradients
    sizes: tuple[int, ...]


def squared_norms(values: Tensor) -> Tensor:
    """(P, ...) tensors to (P,) float64 squared L2 norms over all but the first dimension.

    In float32 a square overflows from 1.8e19 on and the norm is then not finite: such a patient counts as zero.
    """
    flat = values.reshape(len(values), -1)
    size = flat.shape[1]
    if flat.dtype == torch.float64 or size <= _CHUNK:
        wide = flat if flat.dtype == torch.float64 else flat.float()
        return torch.linalg.vector_norm(wide, dim=1).double().square()
    whole = size - size % _CHUNK
    chunks = (flat if whole == size else flat[:, :whole]).float().view(len(values), -1, _CHUNK)
    parts = torch.linalg.vector_norm(chunks, dim=2).double().square().sum(1)
    if whole < size:
        parts = parts + torch.linalg.vector_norm(flat[:, whole:].float(), dim=1).double().square()
    return parts


def measured(values: Tensor, arrange: Callable[[Tensor], Tensor] | None = None) -> UnitGradients:
    """(P, ...) gradients that nobody else holds; of large ones the norms are taken at once, from the cache.

    Small ones will be measured together with others.
    """
    return UnitGradients(values, squared_norms(values) if values[0].numel() > _CHUNK else None, arrange)


def added(materials: Sequence[Material]) -> Material:
    """One parameter's materials from several uses: the units' gradients add up before the norm.

    Raises:
        ValueError: where a use kept norms only, which do not add up.
    """
    if len(materials) == 1:
        return materials[0]
    kept = [material for material in materials if isinstance(material, UnitGradients)]
    if len(kept) != len(materials):
        raise ValueError("a parameter that is used more than once needs the units' gradients, not their norms.")
    return UnitGradients(torch.stack([material.arranged for material in kept]).sum(0))


def unless_all(finite: Tensor) -> Tensor | None:
    """The flags of the units, or None where all are set and it costs nothing to know."""
    # On a GPU the question itself would wait for the device; what it saves costs less.
    return None if finite.device.type == "cpu" and bool(finite.all()) else finite


def bundled(materials: Mapping[int, Material]) -> tuple[dict[int, Material], dict[int, tuple[Bundle, int]]]:
    """Put the many small gradients (norm layers, biases) side by side, so that they cost one operation and not hundreds.

    Returns:
        The materials that are left, and for each other parameter its bundle and where it lies there.
    """
    alone: dict[int, Material] = {}
    groups: dict[tuple[torch.dtype, torch.device], dict[int, Tensor]] = {}
    for at, material in materials.items():
        if isinstance(material, UnitGradients) and material.values[0].numel() <= _CHUNK:
            groups.setdefault((material.values.dtype, material.values.device), {})[at] = material.arranged
        else:
            alone[at] = material
    places: dict[int, tuple[Bundle, int]] = {}
    for group in groups.values():
        flat = [values.reshape(len(values), -1) for values in group.values()]
        bundle = Bundle(UnitGradients(torch.cat(flat, 1)), tuple(values.shape[1] for values in flat))
        places |= {at: (bundle, number) for number, at in enumerate(group)}
    return alone, places


def clip_factors(materials: Iterable[Material], max_grad_norm: float) -> tuple[Tensor, Tensor, Tensor]:
    """Norms before clipping, factors min(1, C/norm), and whether the unit counts, (P,) each.

    A unit does not count whose norm is not finite, or so large that the factor has lost digits in float32, or whose
    gradient is what is left of terms so much larger than the bound that a sum formed anew in float32 may be another.
    """
    kept = list(materials)
    squares = torch.stack([material.squared_norms() for material in kept]).sum(0)
    norms = squares.sqrt()
    factors = (max_grad_norm / norms.clamp(min=1e-300)).clamp(max=1.0)
    counts = torch.isfinite(norms) & (factors > _SMALLEST_FACTOR)
    for material in kept:
        if isinstance(material, Postponed):
            counts = counts & (factors * material.magnitudes < _MOST_CANCELLED * max_grad_norm)
    return norms, torch.where(counts, factors, 0.0), counts
