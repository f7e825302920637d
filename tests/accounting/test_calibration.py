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

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from monai_privacy.accounting import accountants, calibrate_noise_multiplier, calibration, dpsgd_event, epsilon

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "accounting.json").read_text(encoding="utf-8"))["vectors"]
SETTINGS = {"epsilon": 1.0, "delta": 1e-5, "sample_rate": 0.2, "steps": 100}


@pytest.mark.parametrize(
    ("target", "delta", "sample_rate", "steps"),
    [
        (0.05, 1e-5, 0.1, 100),
        (0.5, 1e-6, 0.01, 1000),
        (1.0, 1e-5, 1.0, 10),
        (3.0, 1e-5, 256 / 2279, 180),
        # Above 100 the claim is RDP's alone.
        (150.0, 1e-5, 0.1, 100),
        (1000.0, 1e-5, 0.5, 10),
    ],
)
def test_the_target_is_met_from_below_within_a_thousandth(
    target: float, delta: float, sample_rate: float, steps: int
) -> None:
    sigma = calibrate_noise_multiplier(epsilon=target, delta=delta, sample_rate=sample_rate, steps=steps)
    cost = epsilon(dpsgd_event(sample_rate=sample_rate, noise_multiplier=sigma, steps=steps), delta)
    assert target * (1 - 1e-3) <= cost <= target


def test_a_loose_first_guess_does_not_cost_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    # As for few steps at small sampling rates, where RDP asks for more than twice the noise that is needed.
    real = accountants.rdp_epsilon
    monkeypatch.setattr(accountants, "rdp_epsilon", lambda event, delta: 4 * real(event, delta))
    sigma = calibrate_noise_multiplier(epsilon=0.5, delta=1e-5, sample_rate=1.0, steps=10)
    cost = epsilon(dpsgd_event(sample_rate=1.0, noise_multiplier=sigma, steps=10), 1e-5)
    assert 0.5 * (1 - 1e-3) <= cost <= 0.5


@pytest.mark.parametrize("vector", [v for v in GOLDEN if v["id"].startswith("gauss-cal")], ids=lambda v: v["id"])
def test_full_batches_need_the_exact_noise_of_gaussians(vector: dict) -> None:
    (phase,) = vector["phases"]
    sigma = calibrate_noise_multiplier(
        epsilon=vector["epsilon"]["exact"], delta=vector["delta"], sample_rate=1.0, steps=16
    )
    exact = phase["noise_multiplier"] * 4
    assert exact * (1 - 1e-6) <= sigma <= exact * 1.002


@pytest.mark.parametrize(
    "harder", [{"steps": 150}, {"sample_rate": 0.3}, {"delta": 1e-6}, {"epsilon": 0.9}], ids=lambda h: next(iter(h))
)
def test_more_must_be_hidden_by_more_noise(harder: dict) -> None:
    # Looser than any two calibrated values can differ by chance.
    assert calibrate_noise_multiplier(**SETTINGS | harder) > calibrate_noise_multiplier(**SETTINGS) * 1.01


def test_the_number_can_be_printed_in_full() -> None:
    sigma = calibrate_noise_multiplier(**SETTINGS)
    assert float(f"{sigma:.5g}") == sigma


@pytest.mark.parametrize(
    "cost",
    [
        pytest.param(lambda sigma: 3.0 / sigma, id="smooth"),
        pytest.param(lambda sigma: 3.0 / sigma**12, id="steep"),
        pytest.param(lambda sigma: 1.5 if sigma >= 1.23456 else 40.0, id="jump to the target"),
        pytest.param(lambda sigma: 1.0 if sigma >= 1.23456 else 40.0, id="jump past the target"),
        pytest.param(lambda sigma: 0.0 if sigma >= 1.23456 else math.inf, id="all or nothing"),
    ],
)
@pytest.mark.parametrize("start", [0.06, 1.0, 1.2346, 700.0])
def test_the_least_noise_is_found_whatever_the_cost(cost: Callable[[float], float], start: float) -> None:
    asked: list[float] = []

    def watched(sigma: float) -> float:
        asked.append(sigma)
        return cost(sigma)

    sigma = calibration._least_noise(watched, 1.5, start=start, stride=1.2)
    assert cost(sigma) <= 1.5
    assert cost(sigma) >= 1.5 * (1 - 1e-3) or cost(sigma * (1 - 1e-4)) > 1.5
    assert sigma in asked, "what is returned was judged itself"
    # Only one stride is ever taken into noise that is too small.
    assert min(asked) >= min(start, sigma / 1.2 / 1.0002)
    assert len(asked) < 100


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("epsilon", value) for value in (0, -1.0, math.nan, math.inf, True, "3", None)],
        *[("delta", value) for value in (0, 1, -1e-5, math.nan, math.inf, True, "1e-5", None)],
        *[("sample_rate", value) for value in (0, -0.1, 1.5, math.nan, math.inf, True, "0.1", None)],
        *[("steps", value) for value in (0, -1, 10.0, math.nan, True, "10", None)],
    ],
)
def test_bad_values_are_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} is "):
        calibrate_noise_multiplier(**SETTINGS | {name: value})


def test_a_target_out_of_reach_is_an_error_with_a_remedy() -> None:
    with pytest.raises(ValueError, match=r"epsilon 1e-08 needs a noise multiplier above 100000.*Take fewer steps"):
        calibrate_noise_multiplier(epsilon=1e-8, delta=1e-12, sample_rate=1.0, steps=10**6)


def test_a_target_that_asks_for_no_noise_is_still_never_passed() -> None:
    sigma = calibrate_noise_multiplier(epsilon=1e6, delta=1e-5, sample_rate=0.1, steps=1)
    assert sigma > 0
    assert epsilon(dpsgd_event(sample_rate=0.1, noise_multiplier=sigma), 1e-5) <= 1e6
