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

from dp_accounting.dp_event import DpEvent

from monai_privacy.accounting import accountants
from monai_privacy.accounting.events import composed, dpsgd_event
from monai_privacy.accounting.values import PrivacyBudget, checked_count, checked_delta, checked_epsilon

# The result stays within 0.1 % below the target and never above it.
_TOLERANCE = 1e-3
_SMALLEST, _LARGEST = 0.05, 1e5
# Below this ε the coarse PLD's own error is no longer small.
_COARSE_FROM = 0.5


def calibrate_noise_multiplier(
    *, epsilon: float, delta: float, sample_rate: float, steps: int, spent: DpEvent | None = None
) -> float:
    """The smallest noise multiplier, to 0.1 % in ε, with which DP-SGD costs at most ``epsilon`` at ``delta``.

    Args:
        epsilon: finite, above 0.
        delta: strictly between 0 and 1.
        sample_rate: expected batch size divided by the number of patients, in (0, 1].
        steps: planned number of steps.
        spent: what was released before, on the same patients: both together are to stay within ``epsilon``.

    Raises:
        ValueError: for values out of range, or a target that no reasonable noise reaches.
    """
    target, delta = checked_epsilon(epsilon), checked_delta(delta)

    before = [] if spent is None else [spent]
    cost = accountants.epsilon(composed(before), delta)
    if cost >= target:
        raise ValueError(
            f"epsilon {target:g} is spent: what was released before costs {cost:.4g} by itself. No noise makes room."
        )

    def event(sigma: float) -> DpEvent:
        run = dpsgd_event(sample_rate=sample_rate, noise_multiplier=sigma, steps=steps)
        return composed([*before, run]) if before else run

    # Fast bounds first, none below the claim, so that the noise each asks for is enough: RDP, whose answer is often 7 to
    # 13 % too much, then a coarse PLD. The claim itself is asked last, and mostly once.
    enough = _least_noise(lambda sigma: accountants.rdp_epsilon(event(sigma), delta), target, start=1.0, stride=2.0)
    if target >= _COARSE_FROM:
        enough = _least_noise(
            lambda sigma: accountants.coarse_epsilon(event(sigma), delta), target, start=enough, stride=1.15
        )
    return _least_noise(lambda sigma: accountants.epsilon(event(sigma), delta), target, start=enough, stride=1.15)


def calibrate_steps(
    *,
    epsilon: float,
    delta: float,
    sample_rate: float,
    noise_multiplier: float,
    at_most: int = 10**6,
    spent: DpEvent | None = None,
) -> int:
    """The most DP-SGD steps, up to ``at_most``, that cost at most ``epsilon`` at ``delta`` together with ``spent``.

    Raises:
        ValueError: for values out of range, or where not even one fits.
    """
    step = dpsgd_event(sample_rate=sample_rate, noise_multiplier=noise_multiplier).event
    steps = accountants.affordable_steps(step, PrivacyBudget(epsilon, delta), spent=spent, at_most=at_most)
    if not steps:
        raise ValueError(
            f"epsilon {epsilon:g} does not pay for one step at noise multiplier {noise_multiplier:g} and sample rate "
            f"{sample_rate:.3g}. Take more noise, a smaller expected batch size or a larger epsilon."
        )
    return steps


def calibrate_batch_size(
    *,
    epsilon: float,
    delta: float,
    num_patients: int,
    noise_multiplier: float,
    steps: int,
    spent: DpEvent | None = None,
) -> int:
    """The largest expected batch size with which ``steps`` steps cost at most ``epsilon`` at ``delta``.

    Raises:
        ValueError: for values out of range, or where not even a batch of one fits.
    """
    patients, target, delta = (
        checked_count("num_patients", num_patients),
        checked_epsilon(epsilon),
        checked_delta(delta),
    )
    before = [] if spent is None else [spent]

    def fits(size: int, bound: Callable[[DpEvent, float], float]) -> bool:
        run = dpsgd_event(sample_rate=size / patients, noise_multiplier=noise_multiplier, steps=steps)
        return bound(composed([*before, run]), delta) <= target

    low, high = 0, patients + 1
    # The fast bound is never below the claim, so that what it lets through fits; the claim is asked for the rest.
    for bound, upwards in ((accountants.rdp_epsilon, False), (accountants.epsilon, True)):
        if upwards:
            high = low
            while high <= patients and fits(max(1, high), bound):
                low, high = max(1, high), max(2, math.ceil(high * 1.1) + 1)
            high = min(high, patients + 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle, bound) else (low, middle)
    if not low:
        raise ValueError(
            f"epsilon {target:g} does not pay for {steps} steps at noise multiplier {noise_multiplier:g}, not even with one "
            "patient a step. Take more noise, fewer steps or a larger epsilon."
        )
    return low


def _least_noise(cost: Callable[[float], float], target: float, *, start: float, stride: float) -> float:
    """The least noise multiplier, to the tolerance, whose cost is at most ``target``.

    Strides from ``start`` to either side of the target, then false position in log-log scale (Illinois variant). Noise
    far too small is never tried: its PLD would take long.
    """
    lowest, middle = math.log(1 - _TOLERANCE), math.log(1 - _TOLERANCE / 2)

    def excess(sigma: float) -> float:
        return math.log(max(cost(sigma), 1e-12) / target)

    high = _printable(start)
    above = excess(high)
    low, below = high, above
    while above > 0:
        if high >= _LARGEST:
            raise ValueError(
                f"epsilon {target:g} needs a noise multiplier above {high:g}. Take fewer steps, a smaller expected batch "
                "size or a larger epsilon."
            )
        low, below = high, above
        high = min(_LARGEST, _printable(high * stride))
        above = excess(high)
    while below < lowest and low > _SMALLEST:
        high, above = low, below
        low = max(_SMALLEST, _printable(low / stride))
        below = excess(low)
    if below <= 0:
        return low
    at_low, at_high, side = below - middle, above - middle, 0
    while above < lowest:
        weight = at_low / (at_low - at_high) if math.isfinite(at_low) else 0.5
        sigma = _printable(low * (high / low) ** weight)
        if not low < sigma < high:
            sigma = _printable(math.sqrt(low * high))
        if not low < sigma < high:
            break
        value = excess(sigma)
        if value > 0:
            low, at_low = sigma, value - middle
            at_high, side = at_high / (2 if side < 0 else 1), -1
        else:
            high, above, at_high = sigma, value, value - middle
            at_low, side = at_low / (2 if side > 0 else 1), 1
    return high


def _printable(sigma: float) -> float:
    """``sigma`` with five significant digits, rounded up: a report can print it in full."""
    digits = 4 - math.floor(math.log10(sigma))
    return math.ceil(round(sigma * 10**digits, 6)) / 10**digits
