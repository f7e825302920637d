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

"""Parameters that a network uses in its own arithmetic: added to each row, or put beside it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from monai_privacy.mechanisms.clipping.operation import Choose, Found, OperationRule, Wanted, by_unit, wide
from monai_privacy.mechanisms.clipping.units import Units


@dataclass(frozen=True)
class AddRule(OperationRule):
    """``x + bias``: x (R, ...) and the same bias for each row, as position embeddings are."""

    name = "add"
    reads_input = False

    def run(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See the base class."""
        assert bias is not None
        return x + bias, ()

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
        assert bias is not None
        of_bias = None
        if wanted.bias:
            shape = bias.shape[1:] if bias.dim() == gradient.dim() else bias.shape
            of_bias = by_unit(wide(gradient).sum_to_size(len(gradient), *_padded(shape, gradient)), units, bias)
        return Found(gradient.to(x.dtype) if wanted.input else None, bias=of_bias)


def _padded(shape: tuple[int, ...], like: Tensor) -> tuple[int, ...]:
    return (1,) * (like.dim() - 1 - len(shape)) + tuple(shape)


@dataclass(frozen=True)
class ExpandRule(OperationRule):
    """``weight.expand(R, ...)``: weight (1, ...) once for each row, as class tokens are; x (R, 0) is there to be counted.

    Args:
        shape: of a row of the result.
    """

    shape: tuple[int, ...]
    name = "expand"

    def run(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See the base class."""
        assert weight is not None
        return weight.expand(len(x), *self.shape).clone(), ()

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
        rows = wide(gradient).sum_to_size(len(gradient), *_padded(weight.shape[1:], gradient))
        return Found(weight=by_unit(rows, units, weight) if wanted.weight else None)
