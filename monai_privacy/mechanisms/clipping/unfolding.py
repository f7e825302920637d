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

"""The weight gradient of a convolution as one matrix product a row, of patches that lie side by side."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

Size = tuple[int, ...]


@dataclass(frozen=True)
class Unfolding:
    """A convolution of one group, one of whose sides is copied into patches, channels last, where they are not pixels.

    With a stride of one it can be read from either side: what an output's gradient gives to the input's pixels around it
    is a convolution as well. The side with fewer numbers is the one to copy.

    Args:
        kernel: of the weight.
        stride: see ``torch.nn.functional.conv2d``.
        padding: likewise.
        dilation: likewise.
        turned: copy the output's gradient, not the input.
    """

    kernel: Size
    stride: Size
    padding: Size
    dilation: Size
    turned: bool

    @classmethod
    @lru_cache(maxsize=4096)
    def cheapest(
        cls, x: torch.Size, gradient: torch.Size, weight: torch.Size, stride: Size, padding: Size, dilation: Size
    ) -> Unfolding:
        """Of the side that makes less to copy; from the shapes, and remembered, as it is asked for at each step."""
        plain = cls(tuple(weight[2:]), stride, padding, dilation, turned=False)
        can_turn = set(stride) == {1} and min(plain._outer_padding) >= 0 and not plain.is_pointwise
        turned = can_turn and gradient[1] * math.prod(x[2:]) < x[1] * math.prod(gradient[2:])
        return cls(plain.kernel, stride, padding, dilation, turned)

    @cached_property
    def is_pointwise(self) -> bool:
        """Whether a patch is a pixel, so that nothing is copied."""
        return set(self.kernel) == {1} and not any(self.padding)

    @cached_property
    def _outer_padding(self) -> Size:
        """Of the output's gradient, so that each pixel of the input has the outputs that see it around itself."""
        return tuple((k - 1) * d - p for k, d, p in zip(self.kernel, self.dilation, self.padding, strict=True))

    def row_bytes(self, x: Tensor, gradient: Tensor) -> int:
        """What is copied for a row, about; in float32, as for norms, where it is in less."""
        if self.is_pointwise:
            seen = 0 if set(self.stride) == {1} else math.prod(gradient.shape[2:])
            return x.shape[1] * seen * max(4, x.element_size())
        copied, other, padding = (gradient, x, self._outer_padding) if self.turned else (x, gradient, self.padding)
        padded = math.prod(n + 2 * p for n, p in zip(copied.shape[2:], padding, strict=True))
        patches = math.prod(self.kernel) * math.prod(other.shape[2:])
        return copied.shape[1] * (patches + padded) * max(4, copied.element_size())

    def factors(self, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """(R, N, L) and (R, L, K M): their products are the rows' gradients, of the shape (N, *kernel, M).

        Shape: N is C_out and M is C_in, or the other way round if turned.
        """
        if self.is_pointwise:
            steps = [slice(None, None, step) for step in self.stride]
            return gradient.flatten(2), x[(slice(None), slice(None), *steps)].flatten(2).transpose(1, 2)
        if self.turned:
            return x.flatten(2), self._patches(gradient, self._outer_padding, tuple(x.shape[2:]))
        return gradient.flatten(2), self._patches(x, self.padding, tuple(gradient.shape[2:]))

    def shape(self, weight: Tensor) -> Size:
        """What :meth:`arranged` takes for a weight's gradient."""
        first, last = (1, 0) if self.turned else (0, 1)
        return weight.shape[first], *self.kernel, weight.shape[last]

    def arranged(self, values: Tensor) -> Tensor:
        """(P, N, *kernel, M) to (P, C_out, C_in, *kernel)."""
        if self.turned:
            # Seen from the other side, the kernel's offsets run backward.
            return values.flip(tuple(range(2, 2 + len(self.kernel)))).movedim(-1, 1)
        return values.movedim(-1, 2)

    def _patches(self, image: Tensor, padding: Size, positions: Size) -> Tensor:
        """(R, L, K C): with the channels last, whole rows of a patch are copied at once."""
        rows, channels = image.shape[:2]
        if any(padding):
            padded = image.new_zeros(
                (rows, *[n + 2 * p for n, p in zip(image.shape[2:], padding, strict=True)], channels)
            )
            inside = [slice(p, p + n) for n, p in zip(image.shape[2:], padding, strict=True)]
            padded[(slice(None), *inside)] = image.movedim(1, -1)
        else:
            padded = image.movedim(1, -1).contiguous()
        of_row, *spatial, of_channel = padded.stride()
        between = [n * s for n, s in zip(spatial, self.stride, strict=True)]
        within = [n * d for n, d in zip(spatial, self.dilation, strict=True)]
        patches = padded.as_strided(
            (rows, *positions, *self.kernel, channels),
            (of_row, *between, *within, of_channel),
            padded.storage_offset(),
        )
        return patches.reshape(rows, math.prod(positions), -1)
