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

"""What a vote of teachers can give at a privacy budget, before anybody trains: public numbers in, shares of labels out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy.special import ndtr

from monai_privacy.accounting.gaussian import gaussian_mu
from monai_privacy.accounting.values import checked_count, checked_delta, checked_epsilon, checked_number

__all__ = [
    "INFORMATIVE",
    "PlanAdvice",
    "VotingPlan",
    "advice",
    "epsilon_needed",
    "label_agreement",
    "most_queries",
    "require_informative",
    "teachers_needed",
]

# By chance half of the labels are right with two classes; below three in four a student learns little (docs/pate.md).
INFORMATIVE = 0.75
MOST_TEACHERS = 10**6
MOST_QUERIES = 10**9
MOST_CLASSES = 10**6
LEAST_EPSILON, MOST_EPSILON = 1e-3, 1e3
# How many times as many teachers are shown beside those planned.
MULTIPLES = (1, 2, 5, 20, 50)
_AGREEMENTS = (0.6, 0.7, 0.8, 0.9, 1.0)
# Far above what floating-point numbers lose on the way to the accountant, far below what a user sees.
_ROUNDED_UP = 1 + 1e-9
# The rule of rectangles on a smooth integrand that vanishes at both ends errs less than the last digit of a float.
_STEP = 0.01
_DEVIATES = np.arange(-10, 10 + _STEP / 2, _STEP)
_WEIGHTS = np.exp(-(_DEVIATES**2) / 2) * (_STEP / math.sqrt(2 * math.pi))


@dataclass(frozen=True)
class VotingPlan:
    """The public numbers of a PATE vote by GNMax: the class with most votes after Gaussian noise on each count.

    Args:
        num_teachers: teachers, each of which votes once on every query.
        num_queries: images to be labelled; the budget is laid out for all of them.
        num_classes: classes to vote for; at least 2.
        epsilon: the ε that all labels together may cost; 0.001 to 1000.
        delta: the δ of it, well below 1 / number of patients.
        teachers_per_patient: most teachers whose training data hold one patient; the noise grows with it.

    Raises:
        ValueError: for values out of range, with the value, the reason and the remedy.

    Guarantee: GNMax with ``noise_std`` on ``num_queries`` queries is (``epsilon``, ``delta``)-DP for whoever sees only the
        labels, where one patient changes the votes of at most ``teachers_per_patient`` teachers. It does not depend on
        how the teachers agree.
    Reference: Papernot et al. 2018, arXiv:1802.08908, Proposition 8; composed exactly, Dong et al. 2019, arXiv:1905.02383,
        Corollary 2.
    """

    num_teachers: int
    num_queries: int
    num_classes: int
    epsilon: float
    delta: float = 1e-5
    teachers_per_patient: int = 1

    def __post_init__(self) -> None:
        limits = {"num_teachers": MOST_TEACHERS, "num_queries": MOST_QUERIES, "num_classes": MOST_CLASSES}
        for name, most in limits.items():
            object.__setattr__(self, name, _checked_size(name, getattr(self, name), most))
        if self.num_classes < 2:
            raise ValueError(f"num_classes is {self.num_classes}, but a vote needs at least 2: count 'no finding' too.")
        epsilon = checked_epsilon(self.epsilon)
        if not LEAST_EPSILON <= epsilon <= MOST_EPSILON:
            raise ValueError(
                f"epsilon is {epsilon:g}, but plans are made from {LEAST_EPSILON:g} to {MOST_EPSILON:g}: below, noise "
                "drowns every vote; above, nobody is protected. 1 to 8 is usual."
            )
        object.__setattr__(self, "epsilon", epsilon)
        object.__setattr__(self, "delta", checked_delta(self.delta))
        object.__setattr__(
            self, "teachers_per_patient", checked_count("teachers_per_patient", self.teachers_per_patient)
        )
        if self.teachers_per_patient > self.num_teachers:
            raise ValueError(
                f"teachers_per_patient is {self.teachers_per_patient}, above num_teachers {self.num_teachers}: no patient "
                "can be in more teachers than there are. Lower it to the most that one patient's images reach."
            )

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on each count, in votes, rounded up so that ``epsilon`` is not exceeded."""
        mu = gaussian_mu(self.epsilon, self.delta)
        return self.teachers_per_patient * math.sqrt(2 * self.num_queries) / mu * _ROUNDED_UP

    def __str__(self) -> str:
        return (
            f"{counted(self.num_teachers, 'teacher')}, {counted(self.num_queries, 'query')} at epsilon {self.epsilon:g}"
        )


def label_agreement(plan: VotingPlan, agreement: float) -> float:
    """Probability that the released label is the one that most teachers voted for.

    All other teachers are taken to vote for one rival class. That is the worst spread: whatever the winner's noise, the
    chance to stay above all rivals is a product of log-concave functions of their votes, least where one has them all.
    Classes without votes have noise too.

    It says nothing about whether most teachers are right.

    Args:
        plan: the vote.
        agreement: share of the teachers that vote for that label, 0.5 to 1. Counts are not rounded to whole teachers: a
            share over many queries rarely is one.

    Returns:
        A share between 0 and 1, by quadrature, to 12 digits. It rises with teachers, ε, δ and agreement and falls with
        queries, classes and teachers per patient.
    """
    share = _checked_share("agreement", agreement, 0.5, 1.0)
    votes = share * plan.num_teachers / plan.noise_std
    lead = (2 * share - 1) * plan.num_teachers / plan.noise_std
    above_rival = ndtr(_DEVIATES + lead)
    above_others = ndtr(_DEVIATES + votes) ** (plan.num_classes - 2)
    return min(1.0, float(np.sum(_WEIGHTS * above_rival * above_others)))


def teachers_needed(plan: VotingPlan, agreement: float, target: float) -> int | None:
    """The fewest teachers with which a share ``target`` of the labels is as most teachers gave them.

    Args:
        plan: the vote; its own number of teachers has no say.
        agreement: see :func:`label_agreement`; taken to be the same however many there are.
        target: share of the labels, above 0 and below 1.

    Returns:
        At least ``teachers_per_patient``; None where a million are too few.
    """
    goal = _checked_target(target)
    return _smallest(
        plan.teachers_per_patient,
        MOST_TEACHERS,
        lambda number: label_agreement(replace(plan, num_teachers=number), agreement) >= goal,
    )


def most_queries(plan: VotingPlan, agreement: float, target: float) -> int | None:
    """The most queries with which it is; None where it is not with one. A billion at most. See :func:`teachers_needed`."""
    goal = _checked_target(target)
    too_many = _smallest(
        1, MOST_QUERIES, lambda number: label_agreement(replace(plan, num_queries=number), agreement) < goal
    )
    most = MOST_QUERIES if too_many is None else too_many - 1
    return most or None


def epsilon_needed(plan: VotingPlan, agreement: float, target: float) -> float | None:
    """The least ε, rounded up, with which it is; None where 1000 is too little. See :func:`teachers_needed`."""
    goal = _checked_target(target)

    def holds(epsilon: float) -> bool:
        return label_agreement(replace(plan, epsilon=epsilon), agreement) >= goal

    low, high = LEAST_EPSILON, MOST_EPSILON
    if holds(low):
        return low
    if not holds(high):
        return None
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


@dataclass(frozen=True, kw_only=True)
class PlanAdvice:
    """What a plan gives, and what it would take to give more; see :func:`advice`.

    Args:
        plan: the vote.
        hospitals: sites that share the teachers among them.
        agreement: assumed share of the teachers that vote for the same label.
        target: share of the labels that ought to be as most teachers gave them.
        table: pairs of an agreement and the share of such labels.
        label_accuracy: the same at ``agreement``.
        teachers_needed: fewest teachers for ``target``; None where a million are too few.
        sub_teachers_per_hospital: the same for each hospital, rounded up.
        queries_affordable: most queries for ``target``; None where one is too many.
        epsilon_needed: least ε for ``target``; None where 1000 is too little.
    """

    plan: VotingPlan
    hospitals: int
    agreement: float
    target: float
    table: tuple[tuple[float, float], ...]
    label_accuracy: float
    teachers_needed: int | None
    sub_teachers_per_hospital: int | None
    queries_affordable: int | None
    epsilon_needed: float | None

    @property
    def informative(self) -> bool:
        """Whether a student could learn from the labels: at least :data:`INFORMATIVE` of them as most teachers say."""
        return self.label_accuracy >= INFORMATIVE

    @property
    def reaches_target(self) -> bool:
        """Whether the plan as it is gives ``target``."""
        return self.label_accuracy >= self.target

    @property
    def refusal(self) -> str | None:
        """Why the plan is not worth its privacy and what to do instead, in one line; None where it is informative."""
        if self.informative:
            return None
        unanimous = percent(label_agreement(self.plan, 1.0))
        ways = ["let each hospital train with differential privacy and share its model"]
        if self.queries_affordable is not None:
            ways.insert(0, f"ask for at most {counted(self.queries_affordable, 'label')}")
        if self.sub_teachers_per_hospital is not None:
            ways.insert(0, f"split each hospital's patients among {self.sub_teachers_per_hospital} sub-teachers")
        remedy = ", or ".join(ways)
        return (
            f"{self.plan}: after the noise {unanimous} of the labels would be what most teachers said even if all "
            f"agreed, {percent(self.label_accuracy)} if {percent(self.agreement)} of them did; below "
            f"{percent(INFORMATIVE)} a student learns little. {remedy[0].upper()}{remedy[1:]}."
        )

    @property
    def alternatives(self) -> tuple[str, ...]:
        """The three ways out, each one in a sentence or two; none where the plan reaches its target."""
        if self.reaches_target:
            return ()
        return (self._by_sub_teachers(), self._by_private_models(), self._by_fewer_queries())

    def _by_sub_teachers(self) -> str:
        if self.teachers_needed is None:
            return f"Sub-teachers: even {MOST_TEACHERS} are too few for {percent(self.target)} of the labels."
        return (
            f"Sub-teachers: each of {counted(self.hospitals, 'hospital')} splits its patients into "
            f"{counted(self.sub_teachers_per_hospital or 0, 'shard')}, no patient in two of them, and trains a teacher on "
            f"each: {percent(self.target)} of the labels, if these agree as much. ε stays that of one patient; a hospital "
            "as a whole is not protected."
        )

    def _by_private_models(self) -> str:
        return (
            "DP-trained hospital models: with fewer than about 50 teachers, each hospital trains with DPSupervisedTrainer "
            "and shares its model. These can label any number of images, without more noise: ε is spent in training."
        )

    def _by_fewer_queries(self) -> str:
        if self.queries_affordable is None:
            return f"Fewer queries: not even one label would reach {percent(self.target)}."
        return (
            f"Fewer queries: {percent(self.target)} of {counted(self.queries_affordable, 'label')}, and a semi-supervised "
            "student, such as FixMatch, that learns from the images without labels too."
        )

    def to_dict(self) -> dict[str, Any]:
        """The numbers and sentences as plain JSON."""
        table = [{"agreement": share, "label_accuracy": found} for share, found in self.table]
        plan = asdict(self.plan) | {"noise_std": self.plan.noise_std}
        return asdict(self) | {
            "plan": plan,
            "table": table,
            "informative": self.informative,
            "reaches_target": self.reaches_target,
            "refusal": self.refusal,
            "alternatives": list(self.alternatives),
        }


def advice(
    plan: VotingPlan, *, hospitals: int | None = None, agreement: float = 0.9, target: float = 0.9
) -> PlanAdvice:
    """What ``plan`` gives, and the teachers, queries and ε with which it would give ``target``.

    Args:
        plan: the vote.
        hospitals: sites that share the teachers among them; as many as teachers where None.
        agreement: assumed share of the teachers that vote for the same label, 0.5 to 1. Measure it on public images: on
            private ones it is private itself.
        target: share of the labels that ought to be as most teachers gave them, at least :data:`INFORMATIVE`, below 1.

    Raises:
        ValueError: for values out of range.
    """
    if _checked_target(target) < INFORMATIVE:
        raise ValueError(
            f"target is {target}, below {INFORMATIVE:g}: a student learns little from such labels. Raise it."
        )
    sites = plan.num_teachers if hospitals is None else checked_count("hospitals", hospitals)
    if sites > plan.num_teachers:
        raise ValueError(
            f"hospitals is {sites}, but there are only {plan.num_teachers} teachers: each hospital has one at least. Count "
            "those that train a teacher."
        )
    teachers = teachers_needed(plan, agreement, target)
    return PlanAdvice(
        plan=plan,
        hospitals=sites,
        agreement=float(agreement),
        target=float(target),
        table=tuple((share, label_agreement(plan, share)) for share in _AGREEMENTS),
        label_accuracy=label_agreement(plan, agreement),
        teachers_needed=teachers,
        sub_teachers_per_hospital=None if teachers is None else -(-teachers // sites),
        queries_affordable=most_queries(plan, agreement, target),
        epsilon_needed=epsilon_needed(plan, agreement, target),
    )


def require_informative(found: PlanAdvice) -> None:
    """Raise ValueError, in one line with value, reason and remedy, where the labels would teach a student little."""
    if found.refusal is not None:
        raise ValueError(found.refusal)


def multiples(plan: VotingPlan) -> list[tuple[int, int]]:
    """Factors, 1 first, and so many times the planned teachers: what splitting each teacher's patients would give."""
    return [(factor, factor * plan.num_teachers) for factor in MULTIPLES if factor * plan.num_teachers <= MOST_TEACHERS]


def percent(share: float) -> str:
    """A share as a percentage of at most one decimal, rounded down: no promise is larger than what it stands for."""
    # What a float lacks is no reason to take off a tenth of a percent: 0.57 * 100 * 10 is 569.9999999999999.
    return f"{math.floor(round(share * 1000, 6)) / 10:g} %"


def counted(number: int, noun: str) -> str:
    """Number and noun, in the plural where it is not 1."""
    plural = noun[:-1] + "ies" if noun.endswith("y") else noun + "s"
    return f"{number} {noun if number == 1 else plural}"


def _smallest(low: int, high: int, holds: Callable[[int], bool]) -> int | None:
    """The smallest number from ``low`` to ``high`` from which on ``holds`` is true; None where it never is."""
    if not holds(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return high


def _checked_size(name: str, value: int, most: int) -> int:
    number = checked_count(name, value)
    if number > most:
        raise ValueError(f"{name} is above {most}, the most that plans are made for. Check the number.")
    return number


def _checked_share(name: str, value: float, least: float, most: float) -> float:
    share = checked_number(name, value)
    if not least <= share <= most:
        raise ValueError(
            f"{name} is {value}, but it is a share of the teachers from {least:g} to {most:g}: 0.9 is usual."
        )
    return share


def _checked_target(target: float) -> float:
    goal = checked_number("target", target)
    if not 0 < goal < 1:
        raise ValueError(f"target is {target}, but it is a share of the labels above 0 and below 1: 0.9 is usual.")
    return goal
