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

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version

import numpy as np
from dp_accounting import dp_event, rdp
from dp_accounting.dp_event import DpEvent
from dp_accounting.pld import privacy_loss_distribution as pld_lib
from numpy.typing import NDArray

from monai_privacy.accounting.events import composed, leaves
from monai_privacy.accounting.values import PrivacyBudget, checked_count, checked_delta

_INTERVAL = 1e-4
# Below this ε the discretisation of the privacy loss dominates the PLD bound: refine it.
_SMALL_EPSILON = 0.1
_FINE_INTERVAL = 1e-5
_COARSE_INTERVAL = 1e-3
# Above this ε a PLD needs much memory and time, and no decision hangs on the difference.
_LARGE_EPSILON = 100.0

# Composing by FFT rounds δ by up to 3e-17 a step (measured against exact Gaussians, up to 1e6 steps), either way, which at
# δ = 1e-12 understates ε. Nine times that is taken off δ, so that the bound stays one.
_ROUNDING_PER_STEP = 2**-52

# dp-accounting warns through absl for each RDP order that does not converge; leaving one out only loosens the bound.
logging.getLogger("absl").setLevel(logging.ERROR)


@dataclass(frozen=True)
class EpsilonBounds:
    """Two upper bounds on ε of the same events at the same δ.

    Args:
        delta: the δ that both hold at.
        pld: by privacy loss distributions (Koskela et al. 2020; Doroshenko et al. 2022), inf where not computed.
        rdp: by Rényi divergences (Mironov 2017), converted by Canonne et al. 2020, Proposition 12.
    """

    delta: float
    pld: float
    rdp: float

    @property
    def epsilon(self) -> float:
        """The claim: the smaller bound, since both are valid."""
        return min(self.pld, self.rdp)

    @property
    def accountant(self) -> str:
        """Name and version of the accountant whose bound is the claim."""
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
def _bounds(items: tuple[tuple[DpEvent, int], ...], delta: float) -> EpsilonBounds:
    if not items:
        return EpsilonBounds(delta=delta, pld=0.0, rdp=0.0)
    counts = dict(items)
    by_rdp = _rdp_epsilon(counts, delta)
    if by_rdp > _LARGE_EPSILON:
        return EpsilonBounds(delta=delta, pld=math.inf, rdp=by_rdp)
    by_pld = _pld_epsilon(counts, delta, _INTERVAL)
    if min(by_pld, by_rdp) < _SMALL_EPSILON:
        by_pld = min(by_pld, _pld_epsilon(counts, delta, _FINE_INTERVAL))
    return EpsilonBounds(delta=delta, pld=by_pld, rdp=by_rdp)


def coarse_epsilon(event: DpEvent, delta: float) -> float:
    """A looser bound than :func:`epsilon`, some ten times as fast: to search with, never to claim."""
    delta = checked_delta(delta)
    by_rdp = rdp_epsilon(event, delta)
    return min(by_rdp, _pld_epsilon(leaves(event), delta, _COARSE_INTERVAL)) if by_rdp < _LARGE_EPSILON else by_rdp


def affordable_steps(step: DpEvent, budget: PrivacyBudget, *, spent: DpEvent | None = None, at_most: int) -> int:
    """The largest number of ``step`` events, up to ``at_most``, that keeps ``spent`` and them within ``budget``.

    Monotonicity of composition makes this a bisection. Returns 0 where not even one fits.
    """
    checked_count("at_most", at_most)
    before = [] if spent is None else [spent]

    def fits(steps: int, bound: Callable[[DpEvent, float], float]) -> bool:
        event = composed([*before, dp_event.SelfComposedDpEvent(step, steps)])
        return bound(event, budget.delta) <= budget.epsilon

    def largest(low: int, high: int, bound: Callable[[DpEvent, float], float]) -> int:
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle, bound) else (low, middle)
        return low

    # What RDP allows fits. From there upwards, so that no PLD far above the budget is computed: it would take long.
    low, high = largest(0, at_most + 1, rdp_epsilon), at_most + 1
    while low < at_most:
        more = min(at_most, low + max(1, low // 2))
        if not fits(more, epsilon):
            high = more
            break
        low = more
    return largest(low, high, epsilon)


def rdp_epsilon(event: DpEvent, delta: float) -> float:
    """The RDP bound alone: looser than :func:`epsilon`, and fast for any parameters."""
    return _rdp_epsilon(leaves(event), checked_delta(delta))


def _rdp_epsilon(counts: dict[DpEvent, int], delta: float) -> float:
    if not counts:
        return 0.0
    total = sum(count * _rdp_curve(leaf) for leaf, count in counts.items())
    return float(rdp.compute_epsilon(rdp.RdpAccountant().orders, total, delta)[0])


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


# The curve takes most of the time, and every number of steps and every δ asks for the same one.
@lru_cache(maxsize=256)
def _rdp_curve(leaf: DpEvent) -> NDArray[np.float64]:
    accountant = rdp.RdpAccountant()
    with np.errstate(over="ignore", divide="ignore"):  # an infinite divergence is an answer
        accountant.compose(leaf)
    curve = accountant.rdp
    # Divergences of about 1e-20 drown in rounding, and dp-accounting takes a negative one for no cost at all.
    return np.where(curve > 0, curve, np.inf)


def _pld_epsilon(counts: dict[DpEvent, int], delta: float, interval: float) -> float:
    total = pld_lib.identity(value_discretization_interval=interval)
    rounding = 0.0
    for leaf, count in counts.items():
        if isinstance(leaf, dp_event.GaussianDpEvent):
            # Composed Gaussians are one Gaussian: exact, and much faster than composing their PLDs.
            leaf, count = dp_event.GaussianDpEvent(leaf.noise_multiplier / math.sqrt(count)), 1
        once = _single_pld(leaf, interval)
        total = total.compose(once if count == 1 else once.self_compose(count))
        rounding += (count + 1) * _ROUNDING_PER_STEP
    return max(0.0, float(total.get_epsilon_for_delta(delta - rounding))) if rounding < delta else math.inf


# The single-step distribution takes most of the time, and every epoch of a run asks for the same one.
@lru_cache(maxsize=64)
def _single_pld(leaf: DpEvent, interval: float) -> pld_lib.PrivacyLossDistribution:
    if isinstance(leaf, dp_event.PoissonSampledDpEvent):
        sigma, rate = leaf.event.noise_multiplier, leaf.sampling_probability
    else:
        sigma, rate = leaf.noise_multiplier, 1.0
    return pld_lib.from_gaussian_mechanism(
        standard_deviation=sigma, sampling_prob=rate, value_discretization_interval=interval
    )
