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

"""The Gaussian mechanism in closed form: μ, ε and δ of any number of Gaussian releases together."""

from __future__ import annotations

import math
from collections.abc import Callable

from scipy.special import log_ndtr

from monai_privacy.accounting.values import checked_delta, checked_epsilon, checked_positive

__all__ = ["gaussian_delta", "gaussian_epsilon", "gaussian_mu"]

_MOST = 1e6


def gaussian_delta(mu: float, epsilon: float) -> float:
    """The exact δ at ``epsilon`` of Gaussian releases that are μ-GDP together.

    Args:
        mu: square root of the sum over all releases of (L2 sensitivity / noise standard deviation)².
        epsilon: at least 0.

    Reference: Balle & Wang 2018, arXiv:1805.06530, Theorem 8; Dong et al. 2019, arXiv:1905.02383, Corollary 1.
    """
    mu = checked_positive("mu", mu)
    if not epsilon >= 0:
        raise ValueError(f"epsilon is {epsilon}, but it must be at least 0.")
    if math.isinf(epsilon):
        return 0.0
    upper, lower = float(log_ndtr(mu / 2 - epsilon / mu)), float(epsilon + log_ndtr(-mu / 2 - epsilon / mu))
    if math.isinf(upper):
        return 0.0
    # exp(upper) - exp(lower), where both may be tiny.
    return math.exp(upper) * -math.expm1(min(lower - upper, 0.0))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The smallest ε at ``delta`` of Gaussian releases that are μ-GDP together, rounded up; see :func:`gaussian_delta`.

    Raises:
        ValueError: for values out of range.
    """
    mu, delta = checked_positive("mu", mu), checked_delta(delta)
    if gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while gaussian_delta(mu, high) > delta:
        low, high = high, 2 * high
        if high > _MOST**2:
            return math.inf
    found = _bisected(low, high, lambda epsilon: gaussian_delta(mu, epsilon) <= delta)[1]
    # What doubles lose in δ, against 60 digits, and twice as much again.
    return found * (1 + 1e-12 + 1e-15 / mu)


def gaussian_mu(epsilon: float, delta: float) -> float:
    """The largest μ for which Gaussian releases are (``epsilon``, ``delta``)-DP together, rounded down."""
    epsilon, delta = checked_epsilon(epsilon), checked_delta(delta)
    low, high = 1.0, 1.0
    while gaussian_delta(low, epsilon) > delta:
        low, high = low / 2, low
    while gaussian_delta(high, epsilon) <= delta:
        if high > _MOST:
            return high
        low, high = high, 2 * high
    return _bisected(low, high, lambda mu: gaussian_delta(mu, epsilon) > delta)[0]


def _bisected(low: float, high: float, is_high: Callable[[float], bool]) -> tuple[float, float]:
    """Both sides of where ``is_high`` becomes true, relatively 1e-13 apart."""
    while high - low > 1e-13 * high:
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (low, middle) if is_high(middle) else (middle, high)
    return low, high
