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

"""Votes that answer only where the teachers agree, or contradict the student."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from dp_accounting.dp_event import DpEvent
from torch import Tensor

from monai_privacy.accounting.events import gnmax_event, vote_threshold_event
from monai_privacy.accounting.values import checked_count, checked_number, checked_positive
from monai_privacy.mechanisms.noise import NoiseSource
from monai_privacy.mechanisms.voting import require_ballots, require_votes, with_gaussian

__all__ = ["ConfidentGNMax", "InteractiveGNMax"]


@dataclass(frozen=True)
class ConfidentGNMax:
    """GNMax of those queries alone on which the teachers agree, found out with noise as well.

    Args:
        threshold: votes that the largest count must reach, after noise.
        threshold_noise_std: standard deviation of the noise on it, in votes.
        noise_std: of the noise on each count of a query that passed, in votes.
        teachers_per_patient: most teachers that saw one patient.

    Guarantee: each query is a Gaussian release with noise multiplier ``threshold_noise_std`` / t, and each one answered
    another with ``noise_std`` / (√2 t), t being ``teachers_per_patient``.
    Reference: Papernot et al. 2018, arXiv:1802.08908, Algorithm 1.
    """

    threshold: float
    threshold_noise_std: float
    noise_std: float
    teachers_per_patient: int = 1

    def __post_init__(self) -> None:
        checked_number("threshold", self.threshold)
        checked_positive("threshold_noise_std", self.threshold_noise_std)
        checked_positive("noise_std", self.noise_std)
        checked_count("teachers_per_patient", self.teachers_per_patient)

    @property
    def question_event(self) -> DpEvent | None:
        """One comparison."""
        teachers = self.teachers_per_patient
        return vote_threshold_event(noise_std=self.threshold_noise_std, teachers_per_patient=teachers).event

    @property
    def answer_event(self) -> DpEvent | None:
        """One answer."""
        return gnmax_event(noise_std=self.noise_std, teachers_per_patient=self.teachers_per_patient).event

    def check(self, votes: Tensor, num_teachers: int) -> None:
        """See :func:`require_votes`."""
        require_votes(votes, num_teachers)

    def check_ballots(self, votes: Tensor) -> None:
        """One vote on every query."""
        require_ballots(votes, 1, 1)

    def ask(self, votes: Tensor, noise: NoiseSource) -> Tensor:
        """Whether the largest count passes the threshold."""
        return with_gaussian(votes.amax(dim=1), self.threshold_noise_std, noise) >= self.threshold

    def answer(self, votes: Tensor, num_teachers: int, noise: NoiseSource) -> Tensor:
        """Classes, shape (queries,)."""
        return with_gaussian(votes, self.noise_std, noise).argmax(dim=1)


@dataclass(frozen=True)
class InteractiveGNMax(ConfidentGNMax):
    """GNMax of those queries alone on which the teachers contradict a student that was trained on earlier answers.

    Where they do not, the query is not answered: the student's own opinion may stand there, and costs nothing, as the
    student is made of answers already released.

    Args:
        threshold: votes by which a class must exceed what the student expects of it, after noise.
        threshold_noise_std: standard deviation of the noise on that excess, in votes.
        noise_std: of the noise on each count of a query that passed, in votes.
        teachers_per_patient: most teachers that saw one patient.
        student_probabilities: what the student thinks, shape (queries, classes), each row adding up to 1.

    Guarantee: as of :class:`ConfidentGNMax`, for a student that saw public images and answers only.
    Reference: Papernot et al. 2018, arXiv:1802.08908, Algorithm 2.
    """

    student_probabilities: Tensor = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        super().__post_init__()
        chances = self.student_probabilities
        if chances.dim() != 2 or bool((chances < 0).any()) or not bool(((chances.sum(1) - 1).abs() < 1e-3).all()):
            raise ValueError("student_probabilities must be (queries, classes), at least 0, each row adding up to 1.")

    def check(self, votes: Tensor, num_teachers: int) -> None:
        """See :func:`require_votes`; as many queries as the student has opinions on."""
        require_votes(votes, num_teachers)
        if votes.shape != self.student_probabilities.shape:
            raise ValueError(
                f"votes have shape {tuple(votes.shape)}, and student_probabilities "
                f"{tuple(self.student_probabilities.shape)}: the student must have looked at the same queries."
            )

    def ask(self, votes: Tensor, noise: NoiseSource) -> Tensor:
        """Whether a class exceeds what the student expects."""
        expected = votes.sum(dim=1, keepdim=True) * self.student_probabilities.to(torch.float64)
        return with_gaussian((votes - expected).amax(dim=1), self.threshold_noise_std, noise) >= self.threshold
