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
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import Protocol

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

# Small enough for the cache, and for torch not to divide the work on half of it: where the other cores are busy, threads
# wait for each other longer than they work.
_BLOCK = (1 << 16) - 2
_PRECISION = 1 << 53
# Coordinates whose noise takes far longer than a thread takes to start.
_WORTH_A_THREAD = 1 << 19

_Pair = tuple[Tensor, Tensor]


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


def _noised_on_cpu(tensors: Sequence[Tensor], standard_deviation: float) -> list[Tensor]:
    sources = [tensor.detach().cpu().to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]
    targets = [torch.empty_like(source, memory_format=torch.contiguous_format) for source in sources]
    pairs = [(source.reshape(-1), target.view(-1)) for source, target in zip(sources, targets, strict=True)]
    shares = _shares(pairs, torch.get_num_threads())
    if len(shares) <= 1:
        for share in shares:
            _add_noise(share, standard_deviation)
    else:
        # Each share under a key of its own; torch leaves the interpreter free while it computes.
        with ThreadPoolExecutor(len(shares)) as pool:
            list(pool.map(_add_noise, shares, repeat(standard_deviation)))
    return [target.to(tensor) for tensor, target in zip(tensors, targets, strict=True)]


def _shares(pairs: Sequence[_Pair], most: int) -> list[list[_Pair]]:
    """The pairs, cut into as many shares of about the same length as are worth a thread."""
    number = sum(len(source) for source, _ in pairs)
    count = max(1, min(most, number // _WORTH_A_THREAD))
    shares: list[list[_Pair]] = [[] for _ in range(count)]
    room = -(-number // count)
    at, filled = 0, 0
    for source, target in pairs:
        done = 0
        while done < len(source):
            if filled == room:
                at, filled = at + 1, 0
            take = min(room - filled, len(source) - done)
            shares[at].append((source[done : done + take], target[done : done + take]))
            done, filled = done + take, filled + take
    return [share for share in shares if share]


@torch.no_grad()
def _add_noise(pairs: Sequence[_Pair], standard_deviation: float) -> None:
    """Write sources plus noise into targets."""
    number = sum(len(source) for source, _ in pairs)
    size = min(_BLOCK, number + number % 2)
    blocks = _normal_blocks(size, standard_deviation)
    block, wide = torch.empty(0), torch.empty(size, dtype=torch.float64)
    for source, target in pairs:
        done = 0
        while done < len(source):
            if not len(block):
                block = next(blocks)
            take = min(len(block), len(source) - done)
            noise, block = block[:take], block[take:]
            part = slice(done, done + take)
            # The second copy is the one rounding, where the gradient is in float32.
            target[part].copy_(wide[:take].copy_(source[part]).add_(noise))
            done += take


def _normal_blocks(size: int, standard_deviation: float) -> Iterator[Tensor]:
    """Blocks of ``size`` fresh normal numbers, in float64; each is written over by the next."""
    cipher = Cipher(algorithms.AES(os.urandom(16)), modes.CTR(bytes(16))).encryptor()
    # The cipher asks for room for one block of its own more.
    zeros, drawn = bytes(8 * size), bytearray(8 * size + 15)
    bits, values = torch.frombuffer(drawn, dtype=torch.int64, count=size), torch.empty(size, dtype=torch.float64)
    while True:
        cipher.update_into(zeros, drawn)
        # As many bits as a double holds.
        values.copy_(bits.bitwise_and_(_PRECISION - 1))
        yield _normal(values, standard_deviation)


def _normal(integers: Tensor, standard_deviation: float) -> Tensor:
    """Turn uniform integers below 2⁵³, an even number of them, into normal numbers in place (Box and Muller 1958)."""
    half = len(integers) // 2
    # From 0 ... 2⁵³ - 1 to (0, 1], exactly, so that the logarithm is finite.
    radius = integers[:half].add_(1).mul_(1 / _PRECISION).log_().mul_(-2 * standard_deviation**2).sqrt_()
    angle = integers[half:].mul_(2 * math.pi / _PRECISION)
    cosine = angle.cos()
    angle.sin_().mul_(radius)
    radius.mul_(cosine)
    return integers


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
