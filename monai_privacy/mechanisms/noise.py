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

"""Gaussian noise that nobody can predict or repeat."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

# Bounds the memory of one draw to some tens of megabytes, whatever the size of the network.
_CHUNK = 1 << 20


class NoiseSource(Protocol):
    """Where the noise of a mechanism comes from."""

    @property
    def is_secret(self) -> bool:
        """Whether nobody can predict the noise; False makes a run "not private"."""
        ...

    def add_gaussian(self, tensors: Sequence[Tensor], standard_deviation: float) -> list[Tensor]:
        """New tensors: ``tensors`` plus independent N(0, ``standard_deviation``²) on each coordinate."""
        ...


class SystemNoise:
    """Noise from the operating system's cryptographic generator; it has no state and cannot be seeded.

    A ``torch.Generator`` on the CPU keeps 32 bits of its seed and is linear besides: a coordinate whose gradient is
    known to be zero shows its noise, and from some hundred of those the noise of every other coordinate follows. So
    each number is made from fresh bits of ``os.urandom`` (Box-Muller in float64, added in float64, rounded once).
    ``set_determinism``, ``torch.manual_seed`` and checkpoints have no hold on it.

    On a CUDA device the noise is made by the device's own counter-based generator (Philox), seeded anew from the
    operating system with 64 bits at each call.
    """

    is_secret = True

    def add_gaussian(self, tensors: Sequence[Tensor], standard_deviation: float) -> list[Tensor]:
        """See :class:`NoiseSource`."""
        return [self._add(tensor, standard_deviation) for tensor in tensors]

    def _add(self, tensor: Tensor, standard_deviation: float) -> Tensor:
        if tensor.device.type == "cuda":
            generator = torch.Generator(device=tensor.device)
            generator.manual_seed(int.from_bytes(os.urandom(8), "little", signed=True))
            noise = torch.randn(tensor.shape, generator=generator, device=tensor.device, dtype=torch.float64)
            return (tensor.double() + noise * standard_deviation).to(tensor.dtype)
        flat = tensor.detach().to("cpu", torch.float64).reshape(-1)
        noisy = torch.cat([part + system_normal(part.numel()) * standard_deviation for part in flat.split(_CHUNK)])
        return noisy.reshape(tensor.shape).to(tensor.device, tensor.dtype)


class InsecureNoise:
    """Repeatable noise for debugging; whoever knows the seed can take it off, so the run is not private.

    Args:
        insecure_seed: the seed.
    """

    is_secret = False

    def __init__(self, insecure_seed: int) -> None:
        self._generator = torch.Generator().manual_seed(insecure_seed)

    def add_gaussian(self, tensors: Sequence[Tensor], standard_deviation: float) -> list[Tensor]:
        """See :class:`NoiseSource`."""
        return [
            (t.cpu().double() + torch.randn(t.shape, generator=self._generator).double() * standard_deviation).to(t)
            for t in tensors
        ]


def system_normal(count: int) -> Tensor:
    """(``count``,) float64 standard normal numbers from the operating system's cryptographic generator, on the CPU."""
    pairs = -(-count // 2)
    uniform = system_uniform(2 * pairs)
    radius = uniform[:pairs].log_().mul_(-2).sqrt_()
    angle = uniform[pairs:].mul_(2 * math.pi)
    return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count]


def system_uniform(count: int) -> Tensor:
    """(``count``,) float64 numbers uniform on the open interval (0, 1), 52 random bits each, on the CPU."""
    if not count:
        return torch.empty(0, dtype=torch.float64)
    bits = torch.frombuffer(bytearray(os.urandom(8 * count)), dtype=torch.int64)
    # The mask makes the shift a logical one; the half keeps both ends out, so that the logarithm is finite.
    return bits.bitwise_right_shift(12).bitwise_and_((1 << 52) - 1).double().add_(0.5).mul_(2.0**-52)
