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

"""How far a data-dependent bound could be off on neighbouring votes, and what it costs to publish it with noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtri_exp

from monai_privacy.accounting.values import checked_count, checked_number, checked_positive
from monai_privacy.accounting.vote_costs import (
    checked_votes,
    gnmax_log_q,
    rdp_formula,
    rdp_formula_applies,
    threshold_log_probability,
    threshold_rdp,
)

__all__ = [
    "gnmax_bound_is_continuous",
    "gnmax_local_sensitivity",
    "gnmax_sensitivity_conditions",
    "published_smooth_release_rdp",
    "smooth_release_limit",
    "smooth_release_rdp",
    "smooth_sensitivity",
    "threshold_local_sensitivity",
]

_Array = NDArray[np.float64]
_LOWEST = -10_000.0


def gnmax_local_sensitivity(votes: ArrayLike, num_teachers: int, noise_std: float, order: float) -> _Array:
    """Bounds on how far one more changed teacher can move the bound of :func:`gnmax_rdp`, shape (queries, teachers).

    Column d holds for all votes that d teachers away could have cast, where :func:`gnmax_bound_is_continuous`.

    Args:
        votes: counts, shape (queries, classes).
        num_teachers: number of teachers.
        noise_std: standard deviation of the noise on each count, in votes.
        order: the one Rényi order, fixed before any vote was seen.

    Raises:
        ValueError: where conditions C5 and C6 do not hold, without which nothing is proved, or there are no more teachers
            than classes.

    Reference: Papernot et al. 2018, arXiv:1802.08908, Algorithms 3 to 5 and Proposition 13.
    """
    counts = checked_votes(votes, checked_count("num_teachers", num_teachers))
    classes = counts.shape[1]
    if num_teachers <= classes:
        raise ValueError(
            f"there are {num_teachers} teachers for {classes} classes, but the sensitivity is proved for more than that: "
            "publish the data-independent ε alone."
        )
    if not all(gnmax_sensitivity_conditions(noise_std, classes, order)):
        raise ValueError(
            f"noise_std {noise_std:g} with {classes} classes at order {order:g} fails condition C5 or C6, under which the "
            "local sensitivity is proved. Take more noise or a lower order, or publish the data-independent ε alone."
        )
    curve = _Curve(noise_std, classes, order)
    found = np.full((len(counts), num_teachers), float(curve.local(np.array([curve.log_q1]))[0]))
    ordered = -np.sort(-counts, axis=1)
    log_q = gnmax_log_q(ordered, noise_std)
    to_left = log_q > curve.log_q0
    walking = to_left | (log_q < curve.log_q1)
    for distance in range(num_teachers):
        if not walking.any():
            break
        found[walking, distance] = curve.local(log_q[walking])
        step = np.where(to_left, 1, -1)
        walking &= np.where(to_left, (log_q > curve.log_q0) & (ordered[:, 1] > 0), log_q < curve.log_q1)
        ordered[:, 0] += step * walking
        ordered[:, 1] -= step * walking
        ordered = -np.sort(-ordered, axis=1)
        log_q = gnmax_log_q(ordered, noise_std)
    return found


def threshold_local_sensitivity(
    largest: ArrayLike, num_teachers: int, threshold: float, noise_std: float, order: float
) -> _Array:
    """The same for the noisy comparison of the largest count with a threshold, shape (queries, teachers).

    Args:
        largest: largest counts, whole numbers from 0 to ``num_teachers``.
        num_teachers: number of teachers.
        threshold: in votes.
        noise_std: standard deviation of the noise on the count, in votes.
        order: the one Rényi order.
    """
    teachers = checked_count("num_teachers", num_teachers)
    counts = np.asarray(largest)
    if np.any(counts != np.floor(counts)) or np.any(counts < 0) or np.any(counts > teachers):
        raise ValueError(f"largest holds values other than 0 to {teachers}: give the largest count of each query.")
    curve = threshold_rdp(threshold_log_probability(np.arange(teachers + 1), threshold, noise_std), noise_std, order)
    steps = np.abs(np.diff(curve[:, 0]))
    around = np.maximum(np.append(steps, 0.0), np.insert(steps, 0, 0.0))
    up, down = (counts.astype(int)[:, None] + sign * np.arange(teachers) for sign in (1, -1))
    above = np.where(up <= teachers, around[np.minimum(up, teachers)], 0.0)
    exactly = np.maximum(above, np.where(down >= 0, around[np.maximum(down, 0)], 0.0))
    # Votes d teachers away on some queries may be nearer on others, and the sum is over all of them.
    return np.asarray(np.maximum.accumulate(exactly, axis=1))


def smooth_sensitivity(local: ArrayLike, beta: float) -> float:
    """The β-smooth sensitivity of a sum over queries: the largest of e^{-βd} times what column d adds up to.

    Args:
        local: local sensitivities, shape (queries, teachers): one teacher has one vote on each query.
        beta: above 0.

    Reference: Nissim et al. 2007, Definition 2.2; Papernot et al. 2018, arXiv:1802.08908, Section B.
    """
    total = np.asarray(local, dtype=np.float64).sum(axis=0)
    return float(np.max(total * np.exp(-checked_positive("beta", beta) * np.arange(len(total)))))


def smooth_release_limit(order: float) -> float:
    """The β from which on nothing bounds the Rényi divergence of ``order`` of a release with smooth sensitivity."""
    return math.log(order / (order - 1)) / 2


def smooth_release_rdp(order: float, beta: float, noise_multiplier: float) -> float:
    """The Rényi divergence, at ``order``, of publishing a number with noise N(0, (smooth sensitivity · s)²).

    Two such laws on neighbours have standard deviations with a ratio r between e^{-β} and e^β, and means that differ by
    at most the smaller of their smooth sensitivities. Both terms of the divergence of two normal laws are largest where
    r = e^{-β} and the means differ by all of that, so that this is exact in the worst case. Theorem 23 of Papernot et al.
    2018 is not used: towards the end of its range it lies below it (see :func:`published_smooth_release_rdp`).

    Args:
        order: above 1.
        beta: of the smooth sensitivity, below :func:`smooth_release_limit`.
        noise_multiplier: s.

    Reference: divergence of normal laws, Gil et al. 2013; smooth sensitivity, Nissim et al. 2007.
    """
    alpha, beta = checked_number("order", order), checked_positive("beta", beta)
    scale = checked_positive("noise_multiplier", noise_multiplier)
    if not (alpha > 1 and beta < smooth_release_limit(alpha)):
        raise ValueError(
            f"order is {alpha:g} with beta {beta:g}, but the order must be above 1, and e^(-2 beta) above 1 - 1 / order: "
            "beyond, the divergence is infinite. Choose a smaller beta."
        )
    # Both without cancellation where beta is small.
    mean = alpha / (2 * scale**2 * (1 - (alpha - 1) * math.expm1(2 * beta)))
    spread = -alpha * beta - math.log1p(alpha * math.expm1(-2 * beta)) / 2
    return mean + max(0.0, spread) / (alpha - 1)


def published_smooth_release_rdp(order: float, beta: float, noise_multiplier: float) -> float:
    """What the paper gives for :func:`smooth_release_rdp`: to compare with, no bound, and never what is claimed.

    At order 8, β = 0.05 and s = 3 it says 1.154, where neighbours have a divergence of 1.730.

    Reference: Papernot et al. 2018, arXiv:1802.08908, Theorem 23.
    """
    alpha, beta = checked_number("order", order), checked_positive("beta", beta)
    scale = checked_positive("noise_multiplier", noise_multiplier)
    if not 1 < alpha < 1 / (2 * beta):
        raise ValueError(
            f"order is {alpha:g} with beta {beta:g}, but it must lie between 1 and 1 / (2 beta) = {1 / (2 * beta):g}. "
            "Choose a smaller beta."
        )
    spread = (beta * alpha - math.log1p(-2 * alpha * beta) / 2) / (alpha - 1)
    return alpha * math.exp(2 * beta) / scale**2 + spread


def gnmax_bound_is_continuous(noise_std: float, order: float) -> bool:
    """Whether the data-dependent bound passes into the data-independent one without a jump.

    At low orders it does not: where the formula begins to hold it is smaller already, and :func:`gnmax_local_sensitivity`,
    which is the paper's, does not see that jump (order 1.5 at noise 0.6: three times what it says).
    """
    noise, alpha = checked_positive("noise_std", noise_std), checked_number("order", order)
    return _excess(_formula_from(noise, alpha), noise, alpha) >= 0


@lru_cache(maxsize=64)
def gnmax_sensitivity_conditions(noise_std: float, num_classes: int, order: float) -> tuple[bool, bool]:
    """Whether conditions C5 and C6 of the local sensitivity hold, looked at on a fine grid of log q.

    Reference: Papernot et al. 2018, arXiv:1802.08908, Appendix B.4.2.
    """
    curve = _Curve(noise_std, num_classes, order)
    # In log q, as far down as the bound is above what doubles resolve.
    grid = np.linspace(max(50 * curve.log_q0, _LOWEST), curve.log_q0, 20_001)[:-1]
    first = _never_falls(curve.dependent, grid)
    return first, first and _never_falls(
        lambda logs: curve.dependent(curve.shifted(logs, 1)) - curve.dependent(logs), grid[grid < curve.log_q1]
    )


def _never_falls(function: Callable[[_Array], _Array], grid: _Array) -> bool:
    values = function(grid)
    return bool(np.all(np.diff(values) >= -1e-12 * np.abs(values).max()))


class _Curve:
    """The data-dependent bound at one order, as a function of log q."""

    def __init__(self, noise_std: float, num_classes: int, order: float) -> None:
        self.noise_std = checked_positive("noise_std", noise_std)
        self.num_classes = checked_count("num_classes", num_classes)
        self.order = checked_number("order", order)
        self.log_q0 = _log_q0(self.noise_std, self.order)
        self.log_q1 = float(self.shifted(np.array([self.log_q0]), -1)[0])

    def shifted(self, logs: _Array, side: int) -> _Array:
        """log q after one vote was moved, at most up (``side`` 1) or down (-1)."""
        others = math.log(self.num_classes - 1)
        moved = others + log_ndtr(ndtri_exp(logs - others) + side * math.sqrt(2) / self.noise_std)
        return np.asarray(np.minimum(moved, 0.0))

    def dependent(self, logs: _Array) -> _Array:
        return _dependent(logs, self.noise_std, self.order)

    def rdp(self, logs: _Array) -> _Array:
        independent = self.order / self.noise_std**2
        below = np.minimum(logs, np.nextafter(self.log_q0, -np.inf))
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            found = np.where(np.isneginf(logs), 0.0, self.dependent(below))
        return np.where(logs >= self.log_q0, independent, found)

    def local(self, logs: _Array) -> _Array:
        at = np.where((self.log_q1 <= logs) & (logs <= self.log_q0), self.log_q1, logs)
        here = self.rdp(at)
        return np.maximum(self.rdp(self.shifted(at, 1)) - here, here - self.rdp(self.shifted(at, -1)))


def _dependent(logs: _Array, noise_std: float, order: float) -> _Array:
    variance = noise_std**2
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        return rdp_formula(logs, np.sqrt(-logs * variance), variance, np.asarray(order))


def _formula_from(noise_std: float, order: float) -> float:
    """The largest log q for which the data-dependent formula is taken."""
    return -max((1 + 1 / noise_std) ** 2, ((order - 0.99) / noise_std) ** 2, 1 / noise_std**2)


def _excess(log_q: float, noise_std: float, order: float) -> float:
    """By how much the formula exceeds the data-independent bound."""
    return float(_dependent(np.array([log_q]), noise_std, order)[0]) - order / noise_std**2


@lru_cache(maxsize=64)
def _log_q0(noise_std: float, order: float) -> float:
    """log q above which the data-independent bound is the smaller one."""

    def excess(log_q: float) -> float:
        return _excess(log_q, noise_std, order)

    upper = _formula_from(noise_std, order)
    lower = upper
    if excess(upper) >= 0:
        while excess(lower) > 0:
            lower *= 1.5
            if lower < _LOWEST:
                raise ValueError(
                    f"noise_std {noise_std:g} at order {order:g} leaves nothing to gain from the votes: publish the "
                    "data-independent ε alone."
                )
        upper = float(brentq(excess, lower, upper)) if lower < upper else upper
    higher = np.array([noise_std * math.sqrt(-upper)])
    if not (higher[0] + 1 >= order and rdp_formula_applies(np.array([upper]), higher, noise_std**2)[0]):
        raise ValueError(
            f"noise_std {noise_std:g} at order {order:g} lies outside Theorem 6. Choose more noise or a lower order."
        )
    return upper
