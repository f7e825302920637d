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

"""Poisson sampling of patients: the draw that the accountants assume, and no other."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from monai_privacy.accounting.events import checked_sample_rate
from monai_privacy.accounting.values import checked_count

_COIN_BITS = 64


class PoissonPatientSampler(Sampler[list[int]]):
    """A batch sampler: in each step every patient comes with all their rows, or not at all, on a coin of their own.

    The coins are bits of the operating system's cryptographic generator: they have no state, cannot be seeded and are
    untouched by ``set_determinism``; who can guess the draw has no amplification by sampling. A draw may be empty.

    Args:
        patient_ids: the patient of each row of the dataset, in order.
        sample_rate: probability with which each patient is drawn in a step, in (0, 1].
        steps: number of draws in one pass, ``plan.steps_per_epoch`` in the trainer.
        rank: this process, of ``world_size`` that each draw from their own share of the patients. Each share is drawn
            independently, so that all of them together are one Poisson draw.
        world_size: number of processes.
        insecure_seed: repeatable draws for debugging; the run is then not private.

    Yields:
        Row indices of the patients drawn, patient by patient.

    Reference: Mironov et al. 2019, Section 3 (Poisson sampling); McMahan et al. 2018, Algorithm 1 (of users).
    """

    def __init__(
        self,
        patient_ids: Sequence[Hashable],
        *,
        sample_rate: float,
        steps: int,
        rank: int = 0,
        world_size: int = 1,
        insecure_seed: int | None = None,
    ) -> None:
        self.sample_rate = checked_sample_rate(sample_rate)
        self.steps = checked_count("steps", steps)
        rows: dict[Hashable, list[int]] = {}
        for row, patient in enumerate(patient_ids):
            rows.setdefault(patient, []).append(row)
        self._rows = list(rows.values())[rank::world_size]
        self._insecure = None if insecure_seed is None else np.random.default_rng([insecure_seed, rank])

    @property
    def num_patients(self) -> int:
        """Patients that this process draws from."""
        return len(self._rows)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.steps):
            yield [row for patient in np.flatnonzero(self._coins()) for row in self._rows[patient]]

    def _coins(self) -> npt.NDArray[np.bool_]:
        count = len(self._rows)
        # Rounded down: a rate too low by 2^-64 never costs more than was accounted.
        threshold = int(self.sample_rate * 2**_COIN_BITS)
        if threshold >= 2**_COIN_BITS:
            return np.ones(count, dtype=bool)
        if self._insecure is None:
            bits = np.frombuffer(os.urandom(count * _COIN_BITS // 8), dtype=np.uint64)
        else:
            bits = self._insecure.integers(0, 2**_COIN_BITS, size=count, dtype=np.uint64)
        return np.asarray(bits < np.uint64(threshold))
