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

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from randomgen import AESCounter
from torch import Tensor

# Bounds the memory of one draw to some tens of megabytes, whatever the size of the network.
_CHUNK = 1 << 16


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
    they become normal numbers in float64 (ziggurat), are added in float64, and the sum is rounded once.
    ``set_determinism``, ``torch.manual_seed`` and checkpoints have no hold on it.

    On a CUDA device the noise is made by the device's own counter-based generator (Philox), seeded anew from the
    operating system with 64 bits at each call.
    """

    is_secret = True

    def add_gaussian(self, tensors: Sequence[Tensor], standard_deviation: float) -> list[Tensor]:
        """See :class:`NoiseSource`."""
        noised: list[Tensor] = []
        jobs: list[tuple[Tensor, Tensor]] = []
        for tensor in tensors:
            if tensor.device.type == "cuda":
                noised.append(_noised_on_cuda(tensor, standard_deviation))
                continue
            wide = tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
            source = wide.detach().cpu().contiguous().reshape(-1)
            target = torch.empty_like(source)
            jobs += zip(source.split(_CHUNK), target.split(_CHUNK), strict=True)
            noised.append(target.reshape(tensor.shape))
        _add_on_cpu(jobs, standard_deviation)
        return [result.to(tensor) for result, tensor in zip(noised, tensors, strict=True)]


def _noised_on_cuda(tensor: Tensor, standard_deviation: float) -> Tensor:
    generator = torch.Generator(device=tensor.device)
    generator.manual_seed(int.from_bytes(os.urandom(8), "little", signed=True))
    noise = torch.randn(tensor.shape, generator=generator, device=tensor.device, dtype=torch.float64)
    return (tensor.double() + noise * standard_deviation).to(tensor.dtype)


def _add_on_cpu(jobs: Sequence[tuple[Tensor, Tensor]], standard_deviation: float) -> None:
    """Write each first tensor plus noise into the second, on as many threads as torch uses."""

    def work(share: Sequence[tuple[Tensor, Tensor]]) -> None:
        generator, buffer = _fresh_generator(), np.empty(_CHUNK)
        for source, target in share:
            noise = buffer[: source.numel()]
            generator.standard_normal(out=noise)
            noise *= standard_deviation
            noise += source.numpy()
            # The one rounding, where the gradient is in float32.
            target.numpy()[:] = noise

    threads = min(torch.get_num_threads(), len(jobs))
    if threads <= 1:
        return work(jobs)
    # numpy lets go of the interpreter while it draws.
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, [jobs[number::threads] for number in range(threads)]))
    return None


def _fresh_generator() -> np.random.Generator:
    return np.random.Generator(AESCounter(key=int.from_bytes(os.urandom(16), "little")))


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
