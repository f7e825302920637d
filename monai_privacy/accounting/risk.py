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


"""What (ε, δ) means: how often the best attacker is right about whether a unit was in the data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from dp_accounting.dp_event import DpEvent
from numpy.typing import NDArray

from monai_privacy.accounting.accountants import delta_of

# As fine as the curve needs between its bends, and no longer than a second.
EPSILONS = np.unique(np.concatenate([np.linspace(0, 3, 121), np.linspace(3, 30, 136), np.linspace(30, 110, 41)]))


def true_positive_rates(event: DpEvent, false_positive_rates: Sequence[float]) -> tuple[float, ...]:
    """Upper bounds on an attacker's true-positive rate at each false-positive rate.

    The attacker knows everything but whether one unit was in the data, sees all that ``event`` released, and guesses.

    Args:
        event: what was released.
        false_positive_rates: how often the attacker may say "was in" of a unit that was not; each in [0, 1].

    Reference: Wasserman & Zhou 2010, Theorem 2.4; Dong, Roth & Su 2022, Proposition 2.12 (over all ε of the profile).
    """
    rates = np.asarray([_checked_rate(rate) for rate in false_positive_rates])
    return tuple(rates_by_profile(EPSILONS, delta_of(event, EPSILONS), rates).tolist())


def rates_by_profile(
    epsilons: NDArray[np.float64], deltas: NDArray[np.float64], false_positive_rates: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The same, where (ε, δ) is known to hold for some pairs alone."""
    rate = false_positive_rates[:, None]
    with np.errstate(over="ignore"):
        by_first = np.exp(epsilons) * rate + deltas
    by_second = 1 - np.exp(-epsilons) * (1 - deltas - rate)
    return np.clip(np.minimum(by_first, by_second).min(axis=1), false_positive_rates, 1.0)


def _checked_rate(rate: float) -> float:
    if not 0 <= rate <= 1:
        raise ValueError(f"a false-positive rate is {rate}, but it must lie between 0 and 1.")
    return float(rate)
