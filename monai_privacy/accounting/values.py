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

"""The validated public numbers that every privacy statement is made of."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import SupportsIndex


class PrivacyBudgetError(RuntimeError):
    """The next release does not fit the budget; nothing was released."""


def checked_epsilon(epsilon: float) -> float:
    """Return ``epsilon`` as a float, or raise ValueError unless it is finite and above 0."""
    value = checked_number("epsilon", epsilon)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"epsilon is {epsilon}, but a guarantee needs a finite number above 0; 1 to 8 is usual.")
    return value


def checked_delta(delta: float) -> float:
    """Return ``delta`` as a float, or raise ValueError unless it lies strictly between 0 and 1."""
    value = checked_number("delta", delta)
    # 1e-300 and below: subnormal and near-subnormal values break the accountants' logarithms.
    if not (1e-300 < value < 1):
        raise ValueError(
            f"delta is {delta}, but it must lie between 0 and 1, well below 1 / number of patients; 1e-5 is usual."
        )
    return value


def checked_positive(name: str, value: float) -> float:
    """Return ``value`` as a float, or raise ValueError unless it is finite and above 0."""
    number = checked_number(name, value)
    if not (math.isfinite(number) and number > 1e-300):
        raise ValueError(f"{name} is {value}, but it must be a finite number above 0.")
    return number


def checked_count(name: str, value: SupportsIndex) -> int:
    """Return ``value`` as an int, or raise ValueError unless it is a whole number of at least 1."""
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if isinstance(value, bool) or number < 1:
        raise ValueError(f"{name} is {value!r}, but it must be a whole number of at least 1: give an explicit integer.")
    return number


def checked_steps(name: str, value: SupportsIndex) -> int:
    """The same, and at most a billion: nobody trains so long, and larger counts overflow the accountants."""
    number = checked_count(name, value)
    if number > 10**9:
        raise ValueError(f"{name} is above {10**9}: plan fewer steps.")
    return number


def checked_noise(name: str, value: float) -> float:
    """The same as checked_positive, and within what the accountants can square."""
    number = checked_positive(name, value)
    if not 1e-160 <= number <= 1e150:
        raise ValueError(f"{name} is {value}, but only numbers between 1e-160 and 1e150 can be accounted for.")
    return number


def checked_number(name: str, value: float) -> float:
    """Return ``value`` as a float, infinite or NaN as it may be, or raise ValueError where it is no number."""
    if isinstance(value, bool) or (not isinstance(value, (int, float)) and not hasattr(value, "__float__")):
        raise ValueError(f"{name} is {value!r}, but it must be a number.")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{name} is too large for a floating-point number.") from error


@dataclass(frozen=True)
class PrivacyBudget:
    """The most that a cohort may ever spend: every release in a ledger together is (epsilon, delta)-DP.

    Args:
        epsilon: finite, above 0.
        delta: strictly between 0 and 1.
    """

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "epsilon", checked_epsilon(self.epsilon))
        object.__setattr__(self, "delta", checked_delta(self.delta))
