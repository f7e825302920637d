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


"""What recorded events cost: the smaller of two valid upper bounds on ε, under add-or-remove-one of a unit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.metadata import version

import numpy as np
from dp_accounting import dp_event
from dp_accounting.dp_event import DpEvent
from dp_accounting.pld import privacy_loss_distribution as pld_lib
from dp_accounting.rdp.rdp_privacy_accountant import compute_delta, compute_epsilon
from numpy.typing import NDArray

from monai_privacy.accounting.divergences import (
    ORDERS,
    combined,
    finest_interval,
    has_distribution,
    has_tight_divergence,
    privacy_loss_distribution,
    renyi_divergences,
    without_amplification,
)
from monai_privacy.accounting.events import composed, leaves
from monai_privacy.accounting.gaussian import gaussian_delta, gaussian_epsilon
from monai_privacy.accounting.values import PrivacyBudget, checked_count, checked_delta

_INTERVAL = 1e-4
# Discretisation adds about 2 steps · interval² / ε to ε (measured): with few steps the interval may be longer, so far that ε
# is told too large by no more than a hundred-thousandth. In powers of two, so that single steps are computed once.
_RELATIVE_EXCESS = 5e-6
_LONGEST = 8
# Below this ε the discretisation of the privacy loss dominates the PLD bound: refine it.
_SMALL_EPSILON = 0.1
_FINE_INTERVAL = 1e-5
_COARSE_INTERVAL = 1e-3
# Above this ε the discretisation grows with it, in powers of two so that single steps are computed once: a hundred thousand
# points resolve a privacy loss to five digits, and a PLD of millions takes minutes.
_LARGE_EPSILON = 20.0
_LARGEST_EPSILON = 1e6

# Composing by FFT rounds δ by up to 3e-17 a step (measured against exact Gaussians, up to 1e6 steps), either way, which at
# δ = 1e-12 understates ε. Nine times that is taken off δ, so that the bound stays one.
_ROUNDING_PER_STEP = 2**-52

Counts = tuple[tuple[DpEvent, int], ...]


@dataclass(frozen=True)
class EpsilonBounds:
    """Two upper bounds on ε of the same events at the same δ.

    Args:
        delta: the δ that both hold at.
        pld: by privacy loss distributions (Koskela et al. 2020; Doroshenko et al. 2022), inf where not computed. Of
            events for which only Rényi divergences are known, such as tuning, beside others: the sum of one bound for
            those and one for the others, at half δ each.
        rdp: by Rényi divergences (Mironov 2017), converted by Canonne et al. 2020, Proposition 12.
        closed_form: whether ``pld`` is the exact number, as it is where all releases are Gaussian.
    """

    delta: float
    pld: float
    rdp: float
    closed_form: bool = False

    @property
    def epsilon(self) -> float:
        """The claim: the smaller bound, since both are valid."""
        return min(self.pld, self.rdp)

    @property
    def accountant(self) -> str:
        """Name and version of the accountant whose bound is the claim."""
        if self.closed_form and self.pld <= self.rdp:
            return "closed form of Gaussian releases"
        name = "PLD" if self.pld <= self.rdp else "RDP"
        return f"dp-accounting {version('dp-accounting')} {name}"


def epsilon(event: DpEvent, delta: float) -> float:
    """An upper bound on ε such that ``event`` is (ε, δ)-DP under adding or removing one unit.

    Args:
        event: what was released, see :mod:`monai_privacy.accounting.events`.
        delta: strictly between 0 and 1.

    Returns:
        The smaller of the PLD and RDP bounds of dp-accounting.
    """
    return epsilon_bounds(event, delta).epsilon


def epsilon_bounds(event: DpEvent, delta: float) -> EpsilonBounds:
    """Both bounds on ε of ``event`` at ``delta``; see :class:`EpsilonBounds`."""
    return _bounds(tuple(leaves(event).items()), checked_delta(delta))


# A report asks for the same numbers several times, and for those of the plan after each epoch.
@lru_cache(maxsize=256)
def _bounds(items: Counts, delta: float) -> EpsilonBounds:
    if not items:
        return EpsilonBounds(delta=delta, pld=0.0, rdp=0.0)
    by_rdp = _rdp_epsilon(items, delta)
    mu = _mu_of_gaussians(items)
    if mu is not None:
        return EpsilonBounds(delta=delta, pld=gaussian_epsilon(mu, delta), rdp=by_rdp, closed_form=True)
    by_pld = _pld_where_known(items, delta, by_rdp)
    return EpsilonBounds(delta=delta, pld=by_pld, rdp=by_rdp)


def _mu_of_gaussians(items: Counts) -> float | None:
    """μ of all releases together where all are Gaussian; None where one is not."""
    if not all(isinstance(leaf, dp_event.GaussianDpEvent) for leaf, _ in items):
        return None
    mu = math.sqrt(math.fsum(count / leaf.noise_multiplier**2 for leaf, count in items))
    # Beyond that the closed form loses its digits, and nobody claims such an ε.
    return mu if 1e-6 < mu < 1e3 else None


def _pld_where_known(items: Counts, delta: float, by_rdp: float) -> float:
    known = tuple((leaf, count) for leaf, count in items if has_distribution(leaf))
    others = tuple((leaf, count) for leaf, count in items if not has_distribution(leaf))
    if not known or (others and delta < 1e-280):
        return math.inf
    if others:
        return _bounds(known, delta / 2).epsilon + _rdp_epsilon(others, delta / 2)
    tight = all(has_tight_divergence(leaf) for leaf, _ in items)
    if tight and by_rdp > _LARGEST_EPSILON:
        return math.inf
    by_pld = _pld_epsilon(items, delta, _interval(items, by_rdp))
    if tight and min(by_pld, by_rdp) < _SMALL_EPSILON:
        by_pld = min(by_pld, _pld_epsilon(items, delta, _FINE_INTERVAL))
    return by_pld


def _interval(items: Counts, by_rdp: float) -> float:
    """The discretisation of the privacy loss that ε is computed with."""
    if not all(has_tight_divergence(leaf) for leaf, _ in items):
        return _INTERVAL
    steps = sum(combined(leaf, count)[1] for leaf, count in items)
    allowed = max(1.0, by_rdp * math.sqrt(_RELATIVE_EXCESS / steps) / _INTERVAL)
    return _INTERVAL * max(min(_LONGEST, 2 ** math.floor(math.log2(allowed))), _coarseness(items, by_rdp))


def _coarseness(items: Counts, by_rdp: float) -> int:
    """How many times the usual interval: 1 up to an ε of 20; of events whose RDP bound says little, always."""
    if by_rdp <= _LARGE_EPSILON or not all(has_tight_divergence(leaf) for leaf, _ in items):
        return 1
    return 2 ** math.ceil(math.log2(by_rdp / _LARGE_EPSILON))


def coarse_epsilon(event: DpEvent, delta: float) -> float:
    """A looser bound than :func:`epsilon`, some ten times as fast: to search with, never to claim."""
    delta = checked_delta(delta)
    items = tuple(leaves(event).items())
    by_rdp = _rdp_epsilon(items, delta)
    if by_rdp > _LARGEST_EPSILON or not items or not all(has_distribution(leaf) for leaf, _ in items):
        return by_rdp
    interval = max(_COARSE_INTERVAL * _coarseness(items, by_rdp), *(8 * finest_interval(leaf) for leaf, _ in items))
    return min(by_rdp, _pld_epsilon(items, delta, interval))


def affordable_steps(step: DpEvent, budget: PrivacyBudget, *, spent: DpEvent | None = None, at_most: int) -> int:
    """The largest number of ``step`` events, up to ``at_most``, that keeps ``spent`` and them within ``budget``.

    Monotonicity of composition makes this a bisection. Returns 0 where not even one fits.
    """
    checked_count("at_most", at_most)
    before = [] if spent is None else [spent]

    def excess(steps: int, bound: Callable[[DpEvent, float], float]) -> float:
        event = composed([*before, dp_event.SelfComposedDpEvent(step, steps)] if steps else before)
        return math.log(max(bound(event, budget.delta), 1e-12) / budget.epsilon)

    # Fast bounds first, none below the claim: each says from where on to ask the next, and the claim is asked a few times.
    most = 0
    for bound in (rdp_epsilon, coarse_epsilon, epsilon):
        most = _largest(partial(excess, bound=bound), start=most, at_most=at_most)
    return most


def _largest(excess: Callable[[int], float], *, start: int, at_most: int) -> int:
    """The largest number up to ``at_most`` where ``excess``, which never falls, is at most 0; 0 where there is none.

    From ``start`` to either side of it, then false position with bisection in turn.
    """
    low, high = start, at_most + 1
    at_low = excess(low) if low else -1.0
    at_high = math.inf
    if at_low > 0:
        low, at_low, high, at_high = 0, -1.0, low, at_low
    while high > at_most and low < at_most:
        # ε grows about as the root of the steps; a little more, to get past.
        guess = min(
            at_most,
            max(low + 1, math.ceil(low * math.exp(min(50.0, -2 * at_low)) * 1.002)) if low else 1 + at_most // 64,
        )
        value = excess(guess)
        if value > 0:
            high, at_high = guess, value
        else:
            low, at_low = guess, value
    turn = 0
    while high - low > 1:
        middle = (low + high) // 2
        if turn % 2 == 0 and low and math.isfinite(at_high):
            share = -at_low / (at_high - at_low)
            middle = min(high - 1, max(low + 1, low + round((high - low) * share)))
        value = excess(middle)
        if value > 0:
            high, at_high = middle, value
        else:
            low, at_low = middle, value
        turn += 1
    return low


def rdp_epsilon(event: DpEvent, delta: float) -> float:
    """The RDP bound alone: looser than :func:`epsilon`, and fast for any parameters."""
    return _rdp_epsilon(tuple(leaves(event).items()), checked_delta(delta))


def rdp_curve(event: DpEvent) -> NDArray[np.float64]:
    """Upper bounds on the Rényi divergences of ``event`` at :data:`~monai_privacy.accounting.divergences.ORDERS`."""
    return _rdp_curve(tuple(leaves(event).items()))


def _rdp_curve(items: Counts) -> NDArray[np.float64]:
    total = np.zeros(len(ORDERS))
    for leaf, count in items:
        total = total + count * renyi_divergences(leaf)
    return total


def _rdp_epsilon(items: Counts, delta: float) -> float:
    if not items:
        return 0.0
    return float(compute_epsilon(ORDERS, _rdp_curve(items), delta)[0])


def group_epsilon(event: DpEvent, delta: float, group_size: int) -> float:
    """ε at ``delta`` for ``group_size`` units that come and go together, such as the images of one patient.

    Reference: (ε, δ) for one unit gives (kε, δ(e^{kε} - 1)/(e^ε - 1)) for k (Vadhan 2017, Lemma 2.2), optimised over
    the δ of one unit. A rough bound: it grows at least k-fold.
    """
    size, delta = checked_count("group_size", group_size), checked_delta(delta)
    if size == 1:
        return epsilon(event, delta)

    def excess(log_delta: float) -> float:
        one = rdp_epsilon(event, math.exp(log_delta))
        return log_delta + _log_delta_growth(one, size) - math.log(delta)

    low, high = math.log(1e-290), math.log(delta)
    if excess(low) > 0:
        return math.inf
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if excess(middle) > 0 else (middle, high)
    return size * rdp_epsilon(event, math.exp(low))


def _log_delta_growth(one: float, size: int) -> float:
    """log((e^{kε} - 1) / (e^ε - 1)), also where ε is 0 (log k) or inf."""
    if one == 0:
        return math.log(size)
    if math.isinf(one):
        return math.inf
    return (size - 1) * one + math.log(math.expm1(-size * one) / math.expm1(-one))


def epsilon_without_amplification(event: DpEvent, delta: float) -> float:
    """ε at ``delta`` for a loader that shuffles, in which each unit comes once in an epoch, instead of drawing.

    Each run counts by itself, its epochs rounded up. Zero-out relation: a unit is replaced by nothing, at a fixed divisor.
    No bound for draws that somebody saw: a unit may be in more steps than expected.

    Reference: composition of Gaussians, as in Chua et al. 2024, arXiv:2403.17673, for adaptive batch linear queries.
    """
    return epsilon(composed(_without_amplification(event)), delta)


def _without_amplification(event: DpEvent) -> list[DpEvent]:
    if type(event) is dp_event.ComposedDpEvent:
        return [plain for child in event.events for plain in _without_amplification(child)]
    plain: list[DpEvent] = []
    for leaf, count in leaves(event).items():
        times = math.ceil(count * _chance(leaf) * (1 - 1e-12))
        plain.append(dp_event.SelfComposedDpEvent(without_amplification(leaf), max(1, times)))
    return plain


def _chance(leaf: DpEvent) -> float:
    """The probability that a unit is drawn in one release."""
    if isinstance(leaf, (dp_event.PoissonSampledDpEvent, dp_event.TruncatedSubsampledGaussianDpEvent)):
        return float(leaf.sampling_probability)
    if isinstance(leaf, dp_event.MixtureOfGaussiansDpEvent):
        # Of each of its images: all of them at once in so many steps, or apart in more, which costs less.
        return sum(s * p for s, p in zip(leaf.sensitivities, leaf.sampling_probs, strict=True)) / max(
            leaf.sensitivities
        )
    return 1.0


def delta_of(event: DpEvent, epsilons: NDArray[np.float64]) -> NDArray[np.float64]:
    """Upper bounds on δ of ``event`` at each of ``epsilons``, which must not be below 0: its privacy profile."""
    items = tuple(leaves(event).items())
    if not items:
        return np.zeros(len(epsilons))
    mu = _mu_of_gaussians(items)
    if mu is not None:
        return np.array([gaussian_delta(mu, float(value)) for value in epsilons])
    curve = _rdp_curve(items)
    by_rdp = np.array([float(compute_delta(ORDERS, curve, value)[0]) for value in epsilons])
    tight = all(has_tight_divergence(leaf) for leaf, _ in items)
    if not all(has_distribution(leaf) for leaf, _ in items):
        return by_rdp
    usual = _rdp_epsilon(items, 1e-5)
    if tight and usual > _LARGEST_EPSILON:
        return by_rdp
    total, rounding = _composed_pld(items, _interval(items, usual))
    # One by one: for a whole array the library walks through the distribution in Python.
    by_pld = np.array([float(total.get_delta_for_epsilon(float(value))) for value in epsilons]) + rounding
    return np.minimum(1.0, np.minimum(by_pld, by_rdp))


def _pld_epsilon(items: Counts, delta: float, interval: float) -> float:
    total, rounding = _composed_pld(items, interval)
    return max(0.0, float(total.get_epsilon_for_delta(delta - rounding))) if rounding < delta else math.inf


# A report asks for ε, and then for the whole profile.
@lru_cache(maxsize=4)
def _composed_pld(items: Counts, interval: float) -> tuple[pld_lib.PrivacyLossDistribution, float]:
    # One grid for all: distributions compose only where theirs agree.
    interval = max(interval, *(finest_interval(leaf) for leaf, _ in items))
    total: pld_lib.PrivacyLossDistribution | None = None
    rounding = 0.0
    for leaf, count in items:
        leaf, count = combined(leaf, count)
        once = privacy_loss_distribution(leaf, interval)
        part = once if count == 1 else once.self_compose(count)
        total = part if total is None else total.compose(part)
        rounding += (count + 1) * _ROUNDING_PER_STEP
    return total, rounding
