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


"""A budget that holds even where each run is chosen after seeing what the runs before it gave."""

from __future__ import annotations

import math

import numpy as np
from dp_accounting.dp_event import DpEvent

from monai_privacy.accounting.accountants import rdp_curve
from monai_privacy.accounting.divergences import ORDERS
from monai_privacy.accounting.values import PrivacyBudget

# Sums of thousands of divergences round; a step that fits by less than this does not fit.
_ROUNDING = 1e-9


def filter_order(budget: PrivacyBudget) -> float:
    """The Rényi order that lets most Gaussian noise through a filter with that budget."""
    allowed = [allowance(budget, order) / order for order in ORDERS]
    return ORDERS[int(np.argmax(allowed))]


def allowance(budget: PrivacyBudget, order: float) -> float:
    """The Rényi divergence of ``order`` that is within ``budget``; at or below 0 where none is.

    Guarantee: releases whose divergences of that order add up to at most this are (ε, δ)-DP together, however each was
    chosen after those before it.
    Reference: Feldman & Zrnic 2021, arXiv:2008.11193, Theorem 4.3; conversion by Canonne et al. 2020, Proposition 12.
    """
    return budget.epsilon + (math.log(budget.delta) + math.log(order)) / (order - 1) - math.log1p(-1 / order)


def filtered_epsilon(budget: PrivacyBudget, order: float, delta: float) -> float:
    """ε at ``delta`` of whatever the filter of that budget lets through; the budget's own at its δ."""
    whole = allowance(budget, order)
    return max(0.0, whole - (math.log(delta) + math.log(order)) / (order - 1) + math.log1p(-1 / order))


def divergence_at(event: DpEvent, order: float) -> float:
    """An upper bound on the Rényi divergence of ``order``; inf where none is known."""
    return float(rdp_curve(event)[ORDERS.index(order)])


def steps_through_filter(
    step: DpEvent, budget: PrivacyBudget, order: float, *, spent: DpEvent | None = None, at_most: int
) -> int:
    """The most ``step`` events, up to ``at_most``, that the filter lets through after ``spent``."""
    left = allowance(budget, order) * (1 - _ROUNDING) - (divergence_at(spent, order) if spent is not None else 0.0)
    each = divergence_at(step, order)
    if not math.isfinite(each) or left < each:
        return 0
    return min(at_most, math.floor(left / each))
