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


"""Numbers as a report prints them: a bound may be stated larger than it is, never smaller."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, Context, Decimal


def rounded_up(value: float, decimals: int) -> str:
    """``value`` with so many decimals, rounded up."""
    if not math.isfinite(value):
        return str(value)
    return str(Decimal(repr(value)).quantize(Decimal(f"1e-{decimals}"), ROUND_CEILING, Context(prec=400)))


def rounded_up_percent(share: float) -> str:
    """A share of 1 as a percentage of two digits or one decimal, rounded up and never above 100."""
    percent = min(100.0, share * 100)
    return f"{min(Decimal(100), Decimal(rounded_up(percent, 1 if percent < 99.9 else 2))).normalize():f} %"


def odds_factor(epsilon: float) -> str:
    """e^ε, rounded up to three digits, or to a power of ten where it is astronomical."""
    if epsilon > 50:
        return f"10^{math.ceil(epsilon / math.log(10))}"
    return f"{float(Context(prec=3, rounding=ROUND_CEILING).create_decimal(repr(math.exp(epsilon)))):.3g}"


def finite(value: float) -> float | None:
    """``value``, or None where it is infinite or no number, which strict JSON does not know."""
    return value if math.isfinite(value) else None
