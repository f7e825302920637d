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

"""Whose rows are which: the rows of a batch by patient, patients one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Units:
    """A batch of rows in which the rows of each unit (patient) stand together.

    Args:
        counts: rows of each unit, in the order of the rows; none is zero.
    """

    counts: tuple[int, ...]

    @property
    def number(self) -> int:
        """P, the number of units."""
        return len(self.counts)

    @cached_property
    def rows(self) -> int:
        """R, the number of rows."""
        return sum(self.counts)

    @cached_property
    def equal(self) -> int | None:
        """Rows of a unit where all units have as many, else None."""
        return self.counts[0] if len(set(self.counts)) == 1 else None

    def times(self, factor: int) -> Units:
        """The same units where a layer sees ``factor`` rows for each row of the batch."""
        return self if factor == 1 else Units(tuple(count * factor for count in self.counts))

    def slices(self) -> Iterator[slice]:
        """The rows of each unit."""
        start = 0
        for count in self.counts:
            yield slice(start, start + count)
            start += count

    def sum(self, values: Tensor) -> Tensor:
        """(R, ...) values of rows to (P, ...) sums over each unit."""
        if self.rows == self.number:
            return values
        if self.equal:
            return values.unflatten(0, (self.number, self.equal)).sum(1)
        return values.new_zeros((self.number, *values.shape[1:])).index_add_(0, self._owner(values.device), values)

    def spread(self, values: Tensor) -> Tensor:
        """(P,) values of units to (R,) values of rows."""
        return values if self.rows == self.number else values[self._owner(values.device)]

    def runs(self, most: int) -> Iterator[tuple[slice, Units]]:
        """Units one after the other, in runs of up to ``most`` rows or of one unit: their rows, and they alone."""
        first, start, stop = 0, 0, 0
        for unit, count in enumerate(self.counts):
            if unit > first and stop - start + count > most:
                yield slice(start, stop), Units(self.counts[first:unit])
                first, start = unit, stop
            stop += count
        yield slice(start, stop), self if first == 0 else Units(self.counts[first:])

    def blocks(self, most: int) -> Iterator[tuple[Tensor | slice, Tensor | slice, Units]]:
        """Up to ``most`` units of as many rows each at a time: their numbers, their rows, and they as units alone."""
        if self.equal:
            for start in range(0, self.number, most):
                stop = min(self.number, start + most)
                yield slice(start, stop), slice(start * self.equal, stop * self.equal), Units(self.counts[start:stop])
            return
        counts, owner = torch.tensor(self.counts), self._owner("cpu")
        for count in sorted(set(self.counts)):
            for units in (counts == count).nonzero()[:, 0].split(most):
                rows = torch.isin(owner, units).nonzero()[:, 0]
                yield units, rows, Units((count,) * len(units))

    def _owner(self, device: torch.device | str) -> Tensor:
        # Built on the CPU and sent over: repeat_interleave on a GPU would wait for it.
        return torch.arange(self.number).repeat_interleave(torch.tensor(self.counts)).to(device, non_blocking=True)
