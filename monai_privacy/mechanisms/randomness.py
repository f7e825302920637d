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

"""Fresh randomness for what the user's own code draws: dropout, augmentation."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

SeedSource = Callable[[], int]


def system_seed() -> int:
    """63 bits from the operating system's cryptographic generator."""
    return int.from_bytes(os.urandom(8), "little") >> 1


class InsecureSeeds:
    """Repeatable seeds for debugging.

    Args:
        insecure_seed: the seed of the seeds.
    """

    def __init__(self, insecure_seed: int) -> None:
        self._generator = np.random.default_rng(insecure_seed)

    def __call__(self) -> int:
        return int(self._generator.integers(2**63))


@contextmanager
def fresh_randomness(seed: int, *, cuda_devices: tuple[int, ...] = ()) -> Iterator[None]:
    """Let torch, numpy and ``random`` draw from ``seed`` inside, and go on outside as if nothing had been drawn.

    Under a fixed seed (``set_determinism``) one patient's dropout mask or augmentation depends on who was drawn before
    them: a patient then changes the gradients of all others, and no clipping bounds that. With a secret seed for each
    step the masks are independent of who was drawn.
    """
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    cuda_states = [torch.cuda.get_rng_state(device) for device in cuda_devices]
    # Not torch.manual_seed: where there is no GPU it keeps a trace of each call for the day when there is one.
    torch.default_generator.manual_seed(seed)
    for device in cuda_devices:
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    apple_state = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    if apple_state is not None:
        torch.mps.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        for device, state in zip(cuda_devices, cuda_states, strict=True):
            torch.cuda.set_rng_state(state, device)
        if apple_state is not None:
            torch.mps.set_rng_state(apple_state)


def cuda_devices_of(tensor: Tensor) -> tuple[int, ...]:
    """The device of ``tensor`` as :func:`fresh_randomness` takes it: its number where it is a GPU's, nothing otherwise."""
    return (torch.device(tensor.device).index or 0,) if tensor.device.type == "cuda" else ()
