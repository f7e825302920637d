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

"""Noise for a run that shares a ledger's budget with all that was released and reserved before."""

from __future__ import annotations

import math

from monai_privacy.accounting.calibration import calibrate_noise_multiplier
from monai_privacy.accounting.events import dpsgd_event
from monai_privacy.accounting.ledger import PrivacyLedger
from monai_privacy.accounting.values import PrivacyBudgetError

_SMALLEST, _LARGEST = 0.05, 1e5
_TOLERANCE = 1e-3


def calibrate_noise_for_ledger(ledger: PrivacyLedger, *, sample_rate: float, steps: int) -> float:
    """The least noise multiplier, to 0.1 %, with which ``steps`` steps fit what a ledger has left.

    Args:
        ledger: with a budget.
        sample_rate: expected batch size divided by the number of patients, in (0, 1].
        steps: planned number of steps.

    Raises:
        ValueError: where there is no budget, or no noise makes room.
    """
    budget = ledger.budget
    if budget is None:
        raise ValueError(f"{ledger.path} has no budget, so any run fits. Give --noise-multiplier.")
    if ledger.state.adaptive:
        return _through_filter(ledger, sample_rate, steps)
    return max(
        calibrate_noise_multiplier(
            epsilon=budget.epsilon, delta=budget.delta, sample_rate=sample_rate, steps=steps, spent=spent
        )
        for spent in ledger.state.events(reserved=True)
    )


def _through_filter(ledger: PrivacyLedger, sample_rate: float, steps: int) -> float:
    """The least noise that an adaptive budget lets through for all steps: the filter's answer is only yes or no."""
    unit = ledger.cohort.unit if ledger.cohort else "patient"

    def fits(sigma: float) -> bool:
        event = dpsgd_event(sample_rate=sample_rate, noise_multiplier=sigma).event
        try:
            ledger.require_room(step=event, planned_steps=steps, unit=unit)
        except PrivacyBudgetError:
            return False
        return True

    low, high = _SMALLEST, 2 * _SMALLEST
    while not fits(high):
        low, high = high, high * 2
        if high > _LARGEST:
            raise ValueError(f"the budget of {ledger.path} is spent: no noise makes room for {steps} steps.")
    while high > low * (1 + _TOLERANCE):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    return math.ceil(high * 1e4) / 1e4
