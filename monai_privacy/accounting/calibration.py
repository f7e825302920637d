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

"""Noise for a target (ε, δ)."""

from __future__ import annotations

import math
from collections.abc import Callable

from scipy.optimize import brentq

from monai_privacy.accounting import accountants
from monai_privacy.accounting.events import dpsgd_event
from monai_privacy.accounting.values import checked_delta, checked_epsilon

# The result stays within 0.1 % below the target and never above it.
_TOLERANCE = 1e-3
_SMALLEST, _LARGEST = 0.05, 1e5
# Below this ε the coarse PLD's own error is no longer small.
_COARSE_FROM = 0.5


def calibrate_noise_multiplier(*, epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
    """The smallest noise multiplier, to 0.1 % in ε, with which DP-SGD costs at most ``epsilon`` at ``delta``.

    Args:
        epsilon: finite, above 0.
        delta: strictly between 0 and 1.
        sample_rate: expected batch size divided by the number of patients, in (0, 1].
        steps: planned number of steps.

    Raises:
        ValueError: for values out of range, or a target that no reasonable noise reaches.
    """
    target, delta = checked_epsilon(epsilon), checked_delta(delta)

    def cost(sigma: float) -> float:
        return accountants.epsilon(dpsgd_event(sample_rate=sample_rate, noise_multiplier=sigma, steps=steps), delta)

    def rdp_cost(sigma: float) -> float:
        event = dpsgd_event(sample_rate=sample_rate, noise_multiplier=sigma, steps=steps)
        return accountants.rdp_epsilon(event, delta)

    def coarse_cost(sigma: float) -> float:
        event = dpsgd_event(sample_rate=sample_rate, noise_multiplier=sigma, steps=steps)
        return accountants.coarse_epsilon(event, delta)

    # Fast bounds first, none below the claim: RDP, whose answer is 7 to 13 % too much noise, then a coarse PLD.
    upper = _solve(rdp_cost, target, low=_SMALLEST, high=_LARGEST)
    if target >= _COARSE_FROM:
        upper = _solve(coarse_cost, target, low=upper * 0.5, high=upper)
        if cost(upper) >= target * (1 - _TOLERANCE * 0.9):
            return _round_up_safely(upper, cost, target)
    return _round_up_safely(_solve(cost, target, low=upper * 0.5, high=upper), cost, target)


def _solve(cost: Callable[[float], float], target: float, *, low: float, high: float) -> float:
    """A noise multiplier whose cost lies within the tolerance below ``target``, by Brent's method in log-log scale."""
    known: dict[float, float] = {}

    def excess(log_sigma: float) -> float:
        sigma = math.exp(log_sigma)
        value = known[sigma] = cost(sigma)
        # Aim at the middle of the tolerated band, so that a coarse solution still lies in it.
        return math.log(max(value, 1e-12)) - math.log(target * (1 - _TOLERANCE / 2))

    if excess(math.log(high)) > 0:
        if min(known.values()) <= target:
            return max(known)
        raise ValueError(
            f"epsilon {target:g} needs a noise multiplier above {high:g}. Take fewer steps, a smaller expected batch "
            "size or a larger epsilon."
        )
    if excess(math.log(low)) < 0:
        return low
    brentq(excess, math.log(low), math.log(high), xtol=_TOLERANCE / 40, rtol=1e-9)
    return min(sigma for sigma, value in known.items() if value <= target)


def _round_up_safely(sigma: float, cost: Callable[[float], float], target: float) -> float:
    """``sigma`` with five significant digits, rounded up: a number that a report can print in full."""
    digits = 4 - math.floor(math.log10(sigma))
    rounded = math.ceil(sigma * 10**digits) / 10**digits
    # More noise never costs more, but the accountants are numerical: ask.
    while cost(rounded) > target:
        rounded *= 1 + _TOLERANCE / 10
    return rounded
