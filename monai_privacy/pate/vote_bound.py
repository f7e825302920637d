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

"""What labels cost at the votes there were, a private number; and the plan by which a bound on it is published."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
from dp_accounting.dp_event import DpEvent, SelfComposedDpEvent
from dp_accounting.rdp.rdp_privacy_accountant import compute_epsilon
from numpy.typing import NDArray
from scipy.stats import norm
from torch import Tensor

from monai_privacy.accounting.accountants import epsilon
from monai_privacy.accounting.events import composed, gaussian_event, leaves, smooth_release_event
from monai_privacy.accounting.values import checked_count, checked_delta, checked_positive
from monai_privacy.accounting.vote_costs import (
    gnmax_log_q,
    gnmax_rdp,
    threshold_log_probability,
    threshold_rdp,
)
from monai_privacy.accounting.vote_sensitivity import (
    gnmax_bound_is_continuous,
    gnmax_local_sensitivity,
    smooth_release_limit,
    smooth_release_rdp,
    smooth_sensitivity,
    threshold_local_sensitivity,
)
from monai_privacy.mechanisms.confident_voting import ConfidentGNMax
from monai_privacy.mechanisms.voting import GNMax

__all__ = ["PrivateVoteCost", "VoteBoundPlan", "plan_vote_bound", "private_vote_cost"]

BoundedMechanism = GNMax | ConfidentGNMax
BOUNDED = (GNMax, ConfidentGNMax)
# Where plans look for the smallest bound: Rényi orders, shares of the beta at which the divergence is infinite, noise.
_ORDERS = (3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 14.0, 16.0, 20.0, 24.0, 28.0, 32.0, 40.0, 48.0, 64.0)
_BETAS = (0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
_NOISES = (3.0, 4.0, 6.0, 8.0, 11.0, 16.0, 22.0, 32.0, 45.0, 64.0, 90.0)
_SENSITIVITY_NOISES = (4.0, 8.0, 16.0, 32.0)
# So that its logarithm is finite; a larger number is as good a smooth sensitivity.
_LEAST_SENSITIVITY = 1e-12


@dataclass(frozen=True)
class VoteBoundPlan:
    """The public numbers of a published bound, chosen before anybody looks at the votes.

    Args:
        order: Rényi order of the bound.
        beta: of the smooth sensitivity; so small that the divergence of ``order`` is finite.
        noise_multiplier: noise on the bound, over its smooth sensitivity.
        sensitivity_noise_multiplier: noise on the logarithm of the smooth sensitivity, over ``beta``.
        delta: δ of the ε that is told.
        miss_probability: chance that the noise makes the published number too small.
        expected_epsilon: what the labels and this release would cost together, if teachers agree as was assumed; None where
            nobody reckoned it.
        independent_epsilon: what the labels cost whatever the votes; likewise.
    """

    order: float
    beta: float
    noise_multiplier: float
    sensitivity_noise_multiplier: float
    delta: float
    miss_probability: float = 1e-6
    expected_epsilon: float | None = None
    independent_epsilon: float | None = None

    def __post_init__(self) -> None:
        checked_delta(self.delta)
        checked_delta(self.miss_probability)
        checked_positive("sensitivity_noise_multiplier", self.sensitivity_noise_multiplier)
        smooth_release_rdp(self.order, self.beta, self.noise_multiplier)

    @property
    def event(self) -> DpEvent:
        """What the release costs: the bound, and the logarithm of its smooth sensitivity, which moves by at most β."""
        bound = smooth_release_event(beta=self.beta, noise_multiplier=self.noise_multiplier)
        return composed([bound, gaussian_event(self.sensitivity_noise_multiplier)])

    @property
    def rdp(self) -> float:
        """Rényi divergence of the release at ``order``."""
        size = self.order / (2 * self.sensitivity_noise_multiplier**2)
        return smooth_release_rdp(self.order, self.beta, self.noise_multiplier) + size

    @property
    def quantile(self) -> float:
        """What a normal number exceeds with half the ``miss_probability``."""
        return float(norm.isf(self.miss_probability / 2))

    def epsilon(self, rdp: float) -> float:
        """ε at ``delta`` of a Rényi divergence of ``order``."""
        return float(compute_epsilon([self.order], [rdp], self.delta)[0])


@dataclass(frozen=True)
class PrivateVoteCost:
    """PRIVATE: what the labels cost at these votes, and how much that could be on votes nearby. Never to be shown.

    Args:
        rdp: Rényi divergence of all questions and answers, at the plan's order.
        smooth_sensitivity: of that number.
    """

    rdp: float = field(repr=False)
    smooth_sensitivity: float = field(repr=False)


def plan_vote_bound(
    mechanism: BoundedMechanism,
    *,
    num_teachers: int,
    num_queries: int,
    num_classes: int,
    delta: float,
    agreement: float = 0.9,
    miss_probability: float = 1e-6,
    filter_order: float | None = None,
) -> VoteBoundPlan:
    """Choose order and noise of a bound for votes in which so many teachers agree, without a look at the true ones.

    Args:
        mechanism: :class:`~monai_privacy.mechanisms.GNMax` or :class:`~monai_privacy.mechanisms.ConfidentGNMax`.
        num_teachers, num_queries, num_classes: of the votes.
        delta: δ of the ε that is told.
        agreement: assumed share of the teachers that give the same label.
        miss_probability: chance that the noise makes the published number too small.
        filter_order: the Rényi order that the ledger accounts with, where its budget is adaptive.

    Raises:
        ValueError: for a mechanism whose bound is not proved, or noise that no order has a proof for.
    """
    require_bounded(mechanism)
    teachers, queries = checked_count("num_teachers", num_teachers), checked_count("num_queries", num_queries)
    if not 1 / num_classes <= agreement <= 1:
        raise ValueError(f"agreement is {agreement}, but it must lie between 1 / {num_classes} and 1.")
    winner = round(agreement * teachers)
    others = np.diff(np.linspace(0, teachers - winner, num_classes).round().astype(int))
    votes = np.array([[winner, *others]])
    independent = epsilon(SelfComposedDpEvent(composed(_events(mechanism)), queries), delta)
    quantile = float(norm.isf(miss_probability / 2))
    best: VoteBoundPlan | None = None
    smallest = math.inf
    for order in _ORDERS:
        try:
            rdp, local = _cost(mechanism, order, votes, teachers)
        except ValueError:
            continue  # nothing is proved at this order
        for share in _BETAS:
            beta = share * smooth_release_limit(order)
            if filter_order is not None and beta >= smooth_release_limit(filter_order):
                continue
            smooth = max(_LEAST_SENSITIVITY, smooth_sensitivity(queries * local[None], beta))
            for noise, size_noise in product(_NOISES, _SENSITIVITY_NOISES):
                plan = VoteBoundPlan(order, beta, noise, size_noise, delta, miss_probability)
                upper = queries * rdp + quantile * noise * smooth * math.exp(quantile * beta * size_noise)
                expected = plan.epsilon(upper + plan.rdp)
                if expected < smallest:
                    best, smallest = plan, expected
    if best is None:
        raise ValueError(
            "with this noise nothing is proved about votes nearby (conditions C5 and C6): take more noise, or publish what "
            "the labels cost whatever the votes."
        )
    return replace(best, expected_epsilon=smallest, independent_epsilon=independent)


def private_vote_cost(
    plan: VoteBoundPlan, mechanism: BoundedMechanism, votes: Tensor, num_teachers: int
) -> PrivateVoteCost:
    """What labels cost at these votes: PRIVATE, as it is made of them.

    Each query counts as answered, also where ``ConfidentGNMax`` abstained: how many were answered came of the noise, and a
    sum over those alone would be no Rényi divergence of anything fixed beforehand.

    Args:
        plan: order and beta.
        mechanism: how the votes became labels.
        votes: counts, integers of shape (queries, classes), of all queries that were asked.
        num_teachers: number of teachers, each with one vote on each query.

    Reference: Papernot et al. 2018, arXiv:1802.08908, Theorem 6, Propositions 7 and 10, Appendix B.
    """
    require_bounded(mechanism)
    mechanism.check(votes, num_teachers)
    rdp, local = _cost(mechanism, plan.order, votes.numpy(), num_teachers)
    return PrivateVoteCost(rdp, max(_LEAST_SENSITIVITY, smooth_sensitivity(local[None], plan.beta)))


def require_bounded(mechanism: object) -> None:
    if type(mechanism) not in BOUNDED or getattr(mechanism, "teachers_per_patient", 1) != 1:
        raise ValueError(
            f"a bound on what votes cost is proved for GNMax and ConfidentGNMax with each patient in one teacher, not for "
            f"{mechanism}: what it costs whatever the votes is on the ledger."
        )


def _events(mechanism: BoundedMechanism) -> list[DpEvent]:
    return [event for event in (mechanism.question_event, mechanism.answer_event) if event is not None]


def independent_rdp(mechanism: BoundedMechanism, order: float) -> float:
    """Of one query, whatever the votes."""
    return sum(
        count * order / (2 * event.noise_multiplier**2) for event, count in leaves(composed(_events(mechanism))).items()
    )


def _cost(
    mechanism: BoundedMechanism, order: float, votes: NDArray[Any], teachers: int
) -> tuple[float, NDArray[np.float64]]:
    """The Rényi divergence, and by how much it could change on votes so many teachers away, shape (teachers,)."""
    std = mechanism.noise_std
    if not gnmax_bound_is_continuous(std, order):
        raise ValueError(
            f"at order {order:g} with noise_std {std:g} the bound jumps, which no sensitivity covers: choose a higher order."
        )
    rdp = float(gnmax_rdp(gnmax_log_q(votes, std), std, [order]).sum())
    local = gnmax_local_sensitivity(votes, teachers, std, order).sum(axis=0)
    if isinstance(mechanism, ConfidentGNMax):
        largest, threshold, std = votes.max(axis=1), mechanism.threshold, mechanism.threshold_noise_std
        rdp += float(threshold_rdp(threshold_log_probability(largest, threshold, std), std, [order]).sum())
        local = local + threshold_local_sensitivity(largest, teachers, threshold, std, order).sum(axis=0)
    return rdp, local
