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
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

# Large enough that torch's threads are worth their start, and small beside any network that needs several.
_BLOCK = 1 << 18
# Of a float64: its bits after the binary point, and the others of a number from 1 to 2.
_FRACTION, _ONE = (1 << 52) - 1, 0x3FF << 52


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
    """Noise from a cryptographic generator, keyed anew by the operating system at each call; it cannot be seeded.

    A ``torch.Generator`` on the CPU keeps 32 bits of its seed and is linear besides: a coordinate whose gradient is
    known to be zero shows its noise, and from some hundred of those the noise of every other coordinate follows. So
    the bits are those of AES-128 in counter mode under a key from ``os.urandom`` that is thrown away after the call;
    they become normal numbers in float64, are added in float64, and the sum is rounded once.
    ``set_determinism``, ``torch.manual_seed`` and checkpoints have no hold on it.

    On a CUDA device the noise is made by the device's own counter-based generator (Philox), seeded anew from the
    operating system with 64 bits at each call.
    """

    is_secret = True

    def add_gaussian(self, tensors: Sequence[Tensor], standard_deviation: float) -> list[Tensor]:
        """See :class:`NoiseSource`."""
        on_cpu = [tensor for tensor in tensors if tensor.device.type != "cuda"]
        noised_on_cpu = iter(_noised_on_cpu(on_cpu, standard_deviation))
        return [
            _noised_on_cuda(tensor, standard_deviation) if tensor.device.type == "cuda" else next(noised_on_cpu)
            for tensor in tensors
        ]


def _noised_on_cuda(tensor: Tensor, standard_deviation: float) -> Tensor:
    generator = torch.Generator(device=tensor.device)
    generator.manual_seed(int.from_bytes(os.urandom(8), "little", signed=True))
    noise = torch.randn(tensor.shape, generator=generator, device=tensor.device, dtype=torch.float64)
    return (tensor.double() + noise * standard_deviation).to(tensor.dtype)


@torch.no_grad()
def _noised_on_cpu(tensors: Sequence[Tensor], standard_deviation: float) -> list[Tensor]:
    sources = [tensor.cpu().to(torch.promote_types(tensor.dtype, torch.float32)).reshape(-1) for tensor in tensors]
    found: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(source.dtype for source in sources):
        places = [at for at, source in enumerate(sources) if source.dtype == dtype]
        # One after the other in one new tensor: a network has hundreds of small ones.
        flat = torch.cat([sources[at] for at in places])
        _add_noise(flat, standard_deviation)
        found |= dict(zip(places, flat.split([len(sources[at]) for at in places]), strict=True))
    return [found[at].view(tensor.shape).to(tensor) for at, tensor in enumerate(tensors)]


def _add_noise(flat: Tensor, standard_deviation: float) -> None:
    """Change (N,) values in place, in float64, with one rounding at the end where they are in float32."""
    if not len(flat):
        return
    noise = _Noise(min(_BLOCK, len(flat)))
    # One buffer for all blocks: a new one for each would cost a fault a page.
    buffer = torch.empty(noise.size, dtype=torch.float64)
    for block in flat.split(_BLOCK):
        total = buffer[: len(block)].copy_(block)
        noise.add_to(total, standard_deviation)
        block.copy_(total)


class _Noise:
    """Adds fresh normal numbers, under a key of its own.

    Args:
        size: most numbers at once, one or more.
    """

    def __init__(self, size: int) -> None:
        self.size = size + size % 2
        self._cipher = Cipher(algorithms.AES(os.urandom(16)), modes.CTR(bytes(16))).encryptor()
        # The cipher asks for room for one block of its own more.
        self._zeros, self._drawn = bytes(8 * self.size), bytearray(8 * self.size + 15)
        self._bits = torch.frombuffer(self._drawn, dtype=torch.int64, count=self.size)
        self._cosine = torch.empty(self.size // 2, dtype=torch.float64)

    def add_to(self, values: Tensor, standard_deviation: float) -> None:
        """Change (N,) ``values`` in float64 in place."""
        self._cipher.update_into(self._zeros, self._drawn)
        radius, cosine, sine = _polar(_uniform(self._bits), standard_deviation, self._cosine)
        for part, direction in zip(values.split(len(radius)), (cosine, sine), strict=False):
            part.addcmul_(radius[: len(part)], direction[: len(part)])


def _uniform(bits: Tensor) -> Tensor:
    """Random int64 to numbers in [1, 2) in float64, in place: the bits below its binary point, all equally likely."""
    return bits.bitwise_and_(_FRACTION).bitwise_or_(_ONE).view(torch.float64)


def _polar(uniform: Tensor, standard_deviation: float, cosine: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Radius, cosine and sine of independent normal points in the plane (Box and Muller 1958).

    Radius times cosine and radius times sine are independent normal numbers.

    Args:
        uniform: (2 N,) in [1, 2), which is written over.
        standard_deviation: of the normal numbers.
        cosine: (N,) is written over, where given.
    """
    half = len(uniform) // 2
    # (0, 1], exactly, so that the logarithm is finite.
    radius = uniform[:half].neg_().add_(2).log_().mul_(-2 * standard_deviation**2).sqrt_()
    angle = uniform[half:].mul_(2 * math.pi)
    return radius, torch.cos(angle, out=cosine), angle.sin_()


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
