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
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from randomgen import AESCounter
from torch import Tensor

# Bounds the memory of one draw to some tens of megabytes, whatever the size of the network.
# Small enough for the cache, and for torch not to divide it: where the other cores are busy, threads wait for each
# other longer than they work.
_BLOCK = (1 << 15) - 2


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
    results = []
    blocks = _normal_blocks()
    block = torch.empty(0)
    for tensor in tensors:
        source = tensor.detach().cpu().to(torch.promote_types(tensor.dtype, torch.float32)).reshape(-1)
        target, done = torch.empty_like(source), 0
        while done < len(source):
            if not len(block):
                block = next(blocks)
            take = min(len(block), len(source) - done)
            noise, block = block[:take], block[take:]
            part = slice(done, done + take)
            # The copy is the one rounding, where the gradient is in float32.
            target[part].copy_(noise.mul_(standard_deviation).add_(source[part]))
            done += take
        results.append(target.reshape(tensor.shape).to(tensor))
    return results


def _normal_blocks() -> Iterator[Tensor]:
    """Blocks of fresh standard normal numbers, in float64; each is written over by the next."""
    generator = np.random.Generator(AESCounter(key=int.from_bytes(os.urandom(16), "little")))
    buffer = np.empty(_BLOCK)
    while True:
        generator.random(out=buffer)
        yield _normal(buffer)


def _normal(uniform: np.ndarray) -> Tensor:
    """Turn numbers uniform on [0, 1), of even length, into standard normal ones in place (Box and Muller 1958)."""
    values = torch.from_numpy(uniform)
    # From [0, 1) to (0, 1], exactly, so that the logarithm is finite.
    radius = values[: len(uniform) // 2].neg_().add_(1.0).log_().mul_(-2.0).sqrt_()
    angle = values[len(uniform) // 2 :].mul_(2 * math.pi)
    cosine = angle.cos()
    angle.sin_().mul_(radius)
    radius.mul_(cosine)
    return values


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
