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

"""Answers by noisy votes of teachers: what each mechanism releases, and the event that each release is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from dp_accounting.dp_event import DpEvent
from torch import Tensor

from monai_privacy.accounting.events import (
    gnmax_event,
    label_votes_event,
    lnmax_event,
    noisy_count_event,
)
from monai_privacy.accounting.values import checked_count, checked_number, checked_positive
from monai_privacy.mechanisms.noise import NoiseSource

__all__ = [
    "ABSTAINED",
    "GNMax",
    "LNMax",
    "LabelVoting",
    "NoisyCount",
    "VotingMechanism",
    "limit_positives",
    "require_ballots",
    "require_votes",
]

#: The label of a query that was not answered.
ABSTAINED = -1


class VotingMechanism(Protocol):
    """A way to answer queries from the teachers' votes.

    Every query is asked a question first, where ``question_event`` is an event: its outcome says which queries are to be
    answered, and each answer costs ``answer_event`` once more. Where there is no question, every query is answered.
    """

    @property
    def question_event(self) -> DpEvent | None:
        """What asking costs, for each query; None where nothing is asked."""
        ...

    @property
    def answer_event(self) -> DpEvent | None:
        """What an answer costs, for each query that is answered; None where the question paid for it."""
        ...

    def check(self, votes: Tensor, num_teachers: int) -> None:
        """Refuse votes that this mechanism's cost does not hold for, with a ValueError."""
        ...

    def check_ballots(self, votes: Tensor) -> None:
        """Refuse what one teacher cannot say, before its votes are added to those of others, with a ValueError."""
        ...

    def ask(self, votes: Tensor, noise: NoiseSource) -> Tensor:
        """Which queries are to be answered, booleans of shape (queries,). Charge the questions before."""
        ...

    def answer(self, votes: Tensor, num_teachers: int, noise: NoiseSource) -> Tensor:
        """The labels, integers of shape (queries,), or (queries, labels). Charge the answers before."""
        ...


def require_votes(votes: Tensor, num_teachers: int) -> None:
    """Refuse anything but a histogram to which each teacher gave one vote for each query.

    Args:
        votes: counts, integers of shape (queries, classes).
        num_teachers: how many voted.

    Raises:
        ValueError: for another shape, fewer than two classes, no integers, counts below 0, or sums that are not
            ``num_teachers``. No message shows a count: votes are private.
    """
    teachers = checked_count("num_teachers", num_teachers)
    _require_counts(votes, teachers)
    wrong = int((votes.sum(dim=1) != teachers).sum())
    if wrong:
        raise ValueError(
            f"the votes of {wrong} of {len(votes)} queries do not add up to {teachers} teachers, but each votes once on "
            "every query. Count again, and leave no teacher out."
        )


def require_ballots(votes: Tensor, most: int, fewest: int = 0) -> None:
    """Refuse the votes of one teacher that are not 0 or 1, or of which a query has too many or too few.

    Args:
        votes: of one teacher, shape (queries, classes).
        most: ones that a query may have.
        fewest: ones that it must have.
    """
    ones = votes.sum(dim=1)
    if votes.dim() != 2 or bool(((votes != 0) & (votes != 1)).any()) or bool(((ones > most) | (ones < fewest)).any()):
        says = f"{most} class" if fewest == most else f"at most {most} labels"
        raise ValueError(
            f"a teacher does not vote for {says} with one vote each on every query: one patient would move more votes than "
            "is accounted for. Give a vote function that does."
        )


def _require_counts(votes: Tensor, teachers: int) -> None:
    if votes.dim() != 2 or votes.shape[1] < 2:
        raise ValueError(
            f"votes have shape {tuple(votes.shape)}, but they must be (queries, classes), 2 classes or more."
        )
    if votes.is_floating_point() or votes.is_complex() or votes.dtype == torch.bool:
        raise ValueError(f"votes are {votes.dtype}, but they must be whole numbers: give counts, not shares or scores.")
    if bool(((votes < 0) | (votes > teachers)).any()):
        raise ValueError(f"votes hold counts below 0 or above the number of teachers, {teachers}. Count again.")


class _AnswersAll:
    """Asks nothing, and answers every query."""

    @property
    def question_event(self) -> DpEvent | None:
        """None: every query is answered."""
        return None

    def check_ballots(self, votes: Tensor) -> None:
        """One vote on every query."""
        require_ballots(votes, 1, 1)

    def ask(self, votes: Tensor, noise: NoiseSource) -> Tensor:
        """All of them."""
        return torch.ones(len(votes), dtype=torch.bool)


@dataclass(frozen=True)
class GNMax(_AnswersAll):
    """The class with most votes after Gaussian noise on each count.

    Args:
        noise_std: standard deviation of the noise, in votes.
        teachers_per_patient: most teachers that saw one patient.

    Guarantee: each answer is a Gaussian release with noise multiplier ``noise_std`` / (√2 ``teachers_per_patient``).
    Reference: Papernot et al. 2018, arXiv:1802.08908, Section 4.1 and Proposition 8.
    """

    noise_std: float
    teachers_per_patient: int = 1

    def __post_init__(self) -> None:
        checked_positive("noise_std", self.noise_std)
        checked_count("teachers_per_patient", self.teachers_per_patient)

    @property
    def answer_event(self) -> DpEvent | None:
        """One answer."""
        return gnmax_event(noise_std=self.noise_std, teachers_per_patient=self.teachers_per_patient).event

    def check(self, votes: Tensor, num_teachers: int) -> None:
        """See :func:`require_votes`."""
        require_votes(votes, num_teachers)

    def answer(self, votes: Tensor, num_teachers: int, noise: NoiseSource) -> Tensor:
        """Classes, shape (queries,)."""
        return with_gaussian(votes, self.noise_std, noise).argmax(dim=1)


@dataclass(frozen=True)
class LNMax(_AnswersAll):
    """The class with most votes after Laplace noise on each count.

    Args:
        noise_scale: scale b of the noise, in votes; the papers' γ is 1 / b.
        teachers_per_patient: most teachers that saw one patient.

    Guarantee: each answer is two Laplace releases with noise multiplier ``noise_scale`` / ``teachers_per_patient``.
    Reference: Papernot et al. 2017, arXiv:1610.05755, Section 2.
    """

    noise_scale: float
    teachers_per_patient: int = 1

    def __post_init__(self) -> None:
        checked_positive("noise_scale", self.noise_scale)
        checked_count("teachers_per_patient", self.teachers_per_patient)

    @property
    def answer_event(self) -> DpEvent | None:
        """One answer."""
        return lnmax_event(noise_scale=self.noise_scale, teachers_per_patient=self.teachers_per_patient)

    def check(self, votes: Tensor, num_teachers: int) -> None:
        """See :func:`require_votes`."""
        require_votes(votes, num_teachers)

    def answer(self, votes: Tensor, num_teachers: int, noise: NoiseSource) -> Tensor:
        """Classes, shape (queries,)."""
        counts = votes.to(torch.float64)
        a, b, c, d = noise.add_gaussian([torch.zeros_like(counts)] * 4, 1.0)
        # The determinant of four standard normal numbers is Laplace of scale 1 (Kotz et al. 2001, Section 2.2).
        return (counts + self.noise_scale * (a * b + c * d)).argmax(dim=1)


@dataclass(frozen=True)
class NoisyCount(_AnswersAll):
    """Of two classes, the one that a noisy count of the votes for class 1 favours; none where it is too close.

    Args:
        noise_std: standard deviation of the noise on that one count, in votes.
        abstain_halfwidth: votes around the middle within which no answer is given; it costs nothing.
        teachers_per_patient: most teachers that saw one patient.

    Guarantee: each query is a Gaussian release with noise multiplier ``noise_std`` / ``teachers_per_patient``, answered
    or not. With ``noise_std`` σ/√2 an answer costs and errs as much as one of :class:`GNMax` with σ.
    """

    noise_std: float
    abstain_halfwidth: float = 0.0
    teachers_per_patient: int = 1

    def __post_init__(self) -> None:
        checked_positive("noise_std", self.noise_std)
        checked_count("teachers_per_patient", self.teachers_per_patient)
        if not checked_number("abstain_halfwidth", self.abstain_halfwidth) >= 0:
            raise ValueError(f"abstain_halfwidth is {self.abstain_halfwidth}, but it must be at least 0 votes.")

    @property
    def answer_event(self) -> DpEvent | None:
        """One count."""
        return noisy_count_event(noise_std=self.noise_std, teachers_per_patient=self.teachers_per_patient).event

    def check(self, votes: Tensor, num_teachers: int) -> None:
        """See :func:`require_votes`; two classes alone."""
        require_votes(votes, num_teachers)
        if votes.shape[1] != 2:
            raise ValueError(f"votes have {votes.shape[1]} classes, but a noisy count decides between 2. Use GNMax.")

    def answer(self, votes: Tensor, num_teachers: int, noise: NoiseSource) -> Tensor:
        """Classes, or -1, shape (queries,)."""
        excess = with_gaussian(votes[:, 1], self.noise_std, noise) - num_teachers / 2
        labels = (excess > 0).long()
        return torch.where(excess.abs() < self.abstain_halfwidth, ABSTAINED, labels)


@dataclass(frozen=True)
class LabelVoting(_AnswersAll):
    """All labels of a query at once, such as the findings of a chest X-ray: those with a noisy majority.

    Args:
        noise_std: standard deviation of the noise on the count of each label, in votes.
        num_labels: labels of a query.
        most_positives: labels that one teacher may say yes to; see :func:`limit_positives`.
        teachers_per_patient: most teachers that saw one patient.

    Guarantee: each query is a Gaussian release whose L2 sensitivity is √(2 ``most_positives``), at most
    √``num_labels``, times ``teachers_per_patient``: all labels of it together.
    Reference: τ voting of Dziedzic et al. 2022, arXiv:2211.15410, Section 4.2.
    """

    noise_std: float
    num_labels: int
    most_positives: int
    teachers_per_patient: int = 1

    def __post_init__(self) -> None:
        checked_positive("noise_std", self.noise_std)
        for name in ("num_labels", "most_positives", "teachers_per_patient"):
            checked_count(name, getattr(self, name))

    @property
    def answer_event(self) -> DpEvent | None:
        """All labels of one query."""
        return label_votes_event(
            noise_std=self.noise_std,
            num_labels=self.num_labels,
            most_positives=self.most_positives,
            teachers_per_patient=self.teachers_per_patient,
        ).event

    def check(self, votes: Tensor, num_teachers: int) -> None:
        """Refuse counts that teachers with so many positives each cannot give."""
        teachers = checked_count("num_teachers", num_teachers)
        _require_counts(votes, teachers)
        if votes.shape[1] != self.num_labels:
            raise ValueError(f"votes have {votes.shape[1]} labels, but the mechanism was made for {self.num_labels}.")
        wrong = int((votes.sum(dim=1) > teachers * self.most_positives).sum())
        if wrong:
            raise ValueError(
                f"the votes of {wrong} of {len(votes)} queries are more than {teachers} teachers with {self.most_positives} "
                "positives each can give. Limit each teacher's positives before counting."
            )

    def check_ballots(self, votes: Tensor) -> None:
        """At most so many labels on every query."""
        require_ballots(votes, self.most_positives)

    def answer(self, votes: Tensor, num_teachers: int, noise: NoiseSource) -> Tensor:
        """0 or 1 for each label, shape (queries, labels)."""
        return (with_gaussian(votes, self.noise_std, noise) > num_teachers / 2).long()


def limit_positives(scores: Tensor, threshold: float, most_positives: int) -> Tensor:
    """One teacher's votes on several labels: yes where the score passes, at most ``most_positives``, the highest ones.

    Args:
        scores: probabilities of one teacher, shape (queries, labels).
        threshold: yes above it.
        most_positives: see :class:`LabelVoting`.

    Returns:
        0 or 1, int64, the same shape.

    Raises:
        ValueError: for scores that are not finite.
    """
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("a teacher's scores are not finite: it cannot vote. Train it again.")
    kept = checked_count("most_positives", most_positives)
    votes = torch.zeros_like(scores, dtype=torch.int64)
    highest = scores.topk(min(kept, scores.shape[1]), dim=1).indices
    return votes.scatter(1, highest, 1) * (scores > threshold)


def with_gaussian(counts: Tensor, noise_std: float, noise: NoiseSource) -> Tensor:
    """Counts in float64, with N(0, ``noise_std``²) on each."""
    (noised,) = noise.add_gaussian([counts.to(torch.float64)], noise_std)
    return noised
