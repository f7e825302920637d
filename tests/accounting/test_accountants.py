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
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from dp_accounting.dp_event import DpEvent, GaussianDpEvent, NoOpDpEvent, SelfComposedDpEvent
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import GaussianAccountant
from scipy import stats
from scipy.special import log_ndtr

from monai_privacy.accounting import (
    EpsilonBounds,
    PrivacyBudget,
    accountants,
    affordable_steps,
    dpsgd_event,
    epsilon,
    epsilon_bounds,
    event_from_dict,
    filters,
    true_positive_rates,
    tuning_event,
)
from monai_privacy.accounting.accountants import (
    coarse_epsilon,
    delta_of,
    epsilon_without_amplification,
    group_epsilon,
    rdp_epsilon,
)
from monai_privacy.accounting.divergences import ORDERS
from monai_privacy.accounting.events import (
    capped_images_event,
    composed,
    gnmax_event,
    laplace_event,
    leaves,
    truncated_dpsgd_event,
)

FOLDER = Path(__file__).parents[1] / "golden"
GOLDEN = json.loads((FOLDER / "accounting.json").read_text(encoding="utf-8"))["vectors"]
GOLDEN_EVENTS = json.loads((FOLDER / "accounting_events.json").read_text(encoding="utf-8"))["vectors"]
# Upper bounds may lie above the exact value, and below it by no more than the rounding of their last digits.
ROUNDING = 1e-6


def golden_event(vector: dict) -> DpEvent:
    if "event" in vector:
        return event_from_dict(vector["event"])
    return composed(
        SelfComposedDpEvent(GaussianDpEvent(phase["noise_multiplier"]), phase["steps"])
        if phase["sample_rate"] is None
        else dpsgd_event(**phase)
        for phase in vector["phases"]
    )


def exact_gaussian_epsilon(noise_multiplier: float, delta: float) -> float:
    """ε of one Gaussian release: Balle and Wang 2018, Theorem 8, solved by bisection."""
    mu = 1 / noise_multiplier

    def delta_of(eps: float) -> float:
        near, far = log_ndtr(mu / 2 - eps / mu), eps + log_ndtr(-mu / 2 - eps / mu)
        return math.exp(near) * -math.expm1(far - near)

    low, high = 0.0, mu * mu / 2 + 40 * mu
    if delta_of(low) <= delta:
        return 0.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(middle) > delta else (low, middle)
    return low


@pytest.mark.parametrize("vector", [*GOLDEN, *GOLDEN_EVENTS], ids=lambda vector: vector["id"])
def test_golden(vector: dict) -> None:
    bounds = epsilon_bounds(golden_event(vector), vector["delta"])
    expected = vector["epsilon"]
    best = expected.get("exact", expected.get("pld", expected.get("rdp")))
    assert bounds.epsilon == pytest.approx(best, rel=1e-3)
    if "pld" in expected:
        assert bounds.pld == pytest.approx(expected["pld"], rel=1e-3)
    if "rdp" in expected:
        assert bounds.rdp == pytest.approx(expected["rdp"], rel=1e-6)
    if "exact" in expected:
        assert bounds.epsilon >= expected["exact"] * (1 - ROUNDING)
    if "prv_bracket" in expected:
        low, high = expected["prv_bracket"]
        assert low <= bounds.epsilon <= high
    if "opacus_rdp" in expected:
        assert bounds.epsilon <= expected["opacus_rdp"]
    # Both are upper bounds: one of them below the truth would be the claim.
    assert min(bounds.pld, bounds.rdp) == bounds.epsilon


def test_the_closed_form_of_these_tests_is_the_published_one() -> None:
    singles = [v for v in GOLDEN if "exact" in v["epsilon"] and v["phases"][0]["sample_rate"] is None]
    assert len(singles) >= 10
    for vector in singles:
        (phase,) = vector["phases"]
        sigma = phase["noise_multiplier"] / math.sqrt(phase["steps"])
        assert exact_gaussian_epsilon(sigma, vector["delta"]) == pytest.approx(vector["epsilon"]["exact"], rel=1e-9)


@pytest.mark.parametrize("delta", [1e-3, 1e-6, 1e-9, 1e-10, 1e-11, 1e-12, 1e-13, 1e-14, 1e-16, 1e-30, 1e-200])
@pytest.mark.parametrize(("noise_multiplier", "steps"), [(50.0, 20_000), (10.0, 100), (1000.0, 100_000)])
def test_full_batches_are_gaussians_and_never_claimed_cheaper(
    noise_multiplier: float, steps: int, delta: float
) -> None:
    # Without an allowance for the rounding of FFTs, ε of 20,000 steps is 0.7 % too small at δ = 1e-12.
    event = dpsgd_event(sample_rate=1.0, noise_multiplier=noise_multiplier, steps=steps)
    exact = exact_gaussian_epsilon(noise_multiplier / math.sqrt(steps), delta)
    bounds = epsilon_bounds(event, delta)
    assert bounds.pld >= exact * (1 - ROUNDING)
    assert bounds.rdp >= exact * (1 - ROUNDING)
    assert bounds.epsilon <= exact * 1.15
    if delta >= 1e-9:
        assert bounds.epsilon <= exact * 1.002


def test_a_divergence_that_drowns_in_rounding_is_not_taken_for_none() -> None:
    # dp-accounting's RDP of this event is negative at some orders. At ε = 0 it needs δ of about 0.4 q/σ = 6e-14.
    event = dpsgd_event(sample_rate=1.3e-10, noise_multiplier=911.0)
    assert rdp_epsilon(event, 1e-15) > 0
    assert epsilon(event, 1e-15) > 0


def test_the_claim_is_the_smaller_bound_and_names_its_accountant() -> None:
    assert EpsilonBounds(delta=1e-5, pld=2.0, rdp=3.0).epsilon == 2.0
    assert EpsilonBounds(delta=1e-5, pld=3.0, rdp=2.0).epsilon == 2.0
    assert EpsilonBounds(delta=1e-5, pld=2.0, rdp=3.0).accountant.endswith(" PLD")
    assert EpsilonBounds(delta=1e-5, pld=math.inf, rdp=2.0).accountant.endswith(" RDP")
    event = dpsgd_event(sample_rate=0.05, noise_multiplier=4.0, steps=50)
    bounds = epsilon_bounds(event, 1e-5)
    assert 0 < bounds.pld < bounds.rdp < math.inf
    assert bounds.rdp == rdp_epsilon(event, 1e-5)
    assert epsilon(event, 1e-5) == bounds.epsilon == bounds.pld


@pytest.mark.parametrize("event", [composed([]), NoOpDpEvent(), composed([NoOpDpEvent(), composed([])])])
def test_nothing_costs_nothing(event: DpEvent) -> None:
    assert epsilon_bounds(event, 1e-5) == EpsilonBounds(delta=1e-5, pld=0.0, rdp=0.0)


@pytest.mark.parametrize("delta", [0, 1, 1.5, -1e-5, math.nan, math.inf, 5e-324, True, "1e-5", None])
def test_bad_delta(delta: object) -> None:
    event = GaussianDpEvent(1.0)
    for make in (
        lambda: epsilon(event, delta),  # type: ignore[arg-type]
        lambda: epsilon(NoOpDpEvent(), delta),  # type: ignore[arg-type]
        lambda: rdp_epsilon(event, delta),  # type: ignore[arg-type]
        lambda: group_epsilon(event, delta, 2),  # type: ignore[arg-type]
        lambda: PrivacyBudget(1.0, delta),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match="delta is"):
            make()


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, True, "3", None])
def test_bad_epsilon_of_a_budget(value: object) -> None:
    with pytest.raises(ValueError, match="epsilon is"):
        PrivacyBudget(value, 1e-5)  # type: ignore[arg-type]


RUNS = st.builds(
    dpsgd_event,
    sample_rate=st.sampled_from([0.02, 0.3]),
    noise_multiplier=st.sampled_from([3.0, 8.0]),
    steps=st.integers(1, 200),
)
RELEASES = RUNS | st.builds(GaussianDpEvent, st.sampled_from([3.0, 30.0]))


@settings(max_examples=6, deadline=None)
@given(parts=st.lists(RELEASES, min_size=1, max_size=3))
def test_bounds_of_compositions(parts: list[DpEvent]) -> None:
    delta = 1e-5
    together = epsilon_bounds(composed(parts), delta)
    assert together.pld <= together.rdp * 1.001 + 1e-3
    # Basic composition: each part at its share of δ.
    assert together.epsilon <= sum(epsilon(part, delta / len(parts)) for part in parts) * 1.001 + 1e-3
    assert together.epsilon >= max(epsilon(part, delta) for part in parts) * (1 - ROUNDING)
    backwards = epsilon_bounds(composed([composed(parts[::-1]), NoOpDpEvent()]), delta)
    assert backwards.pld == pytest.approx(together.pld, rel=1e-9)
    assert backwards.rdp == pytest.approx(together.rdp, rel=1e-9)


def test_a_run_in_pieces_costs_what_it_costs_in_one_piece() -> None:
    whole = dpsgd_event(sample_rate=0.1, noise_multiplier=3.0, steps=60)
    pieces = composed([dpsgd_event(sample_rate=0.1, noise_multiplier=3.0, steps=n) for n in (1, 9, 50)])
    assert epsilon_bounds(pieces, 1e-5) == epsilon_bounds(whole, 1e-5)


@pytest.mark.parametrize(
    "event",
    [
        dpsgd_event(sample_rate=0.1, noise_multiplier=3.0, steps=100),
        dpsgd_event(sample_rate=1.0, noise_multiplier=50.0, steps=1000),
        dpsgd_event(sample_rate=0.5, noise_multiplier=0.3, steps=10_000),
        composed([GaussianDpEvent(3.0), dpsgd_event(sample_rate=0.1, noise_multiplier=3.0, steps=10)]),
    ],
)
def test_the_bound_to_search_with_is_a_bound(event: DpEvent) -> None:
    assert epsilon(event, 1e-5) * (1 - ROUNDING) <= accountants.coarse_epsilon(event, 1e-5) <= rdp_epsilon(event, 1e-5)


def test_a_small_epsilon_is_computed_on_a_fine_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    # At an interval of 1e-4 this is 9 % above the exact value.
    event = dpsgd_event(sample_rate=1.0, noise_multiplier=10_000.0, steps=10_000)
    exact = exact_gaussian_epsilon(100.0, 1e-5)
    assert exact <= epsilon(event, 1e-5) <= exact * 1.002
    intervals: list[float] = []
    real = accountants._pld_epsilon

    def watched(counts: dict, delta: float, interval: float) -> float:
        intervals.append(interval)
        return real(counts, delta, interval)

    monkeypatch.setattr(accountants, "_pld_epsilon", watched)
    accountants._bounds.cache_clear()
    epsilon(event, 1e-5)
    assert intervals == [1e-4, 1e-5]
    epsilon(event, 1e-5)
    assert len(intervals) == 2, "the same question is answered from the cache"
    intervals.clear()
    assert epsilon(dpsgd_event(sample_rate=0.05, noise_multiplier=8.0, steps=100), 1e-5) > 0.1
    assert intervals == [1e-4]


@pytest.mark.parametrize(
    ("sample_rate", "noise_multiplier", "steps", "delta", "interval"),
    [
        (0.268, 3.58, 119, 1.4e-6, 8e-4), (0.205, 3.86, 1524, 1.4e-7, 4e-4), (0.444, 11.5, 74, 8.8e-6, 2e-4),
        (0.0365, 2.29, 64, 1.4e-8, 2e-4), (0.95, 12.1, 2, 4.6e-7, 4e-4),
    ],
)  # fmt: skip
def test_a_longer_interval_for_few_steps_adds_less_than_a_hundred_thousandth(
    sample_rate: float, noise_multiplier: float, steps: int, delta: float, interval: float
) -> None:
    event = dpsgd_event(sample_rate=sample_rate, noise_multiplier=noise_multiplier, steps=steps)
    items = tuple(leaves(event).items())
    assert accountants._interval(items, accountants.rdp_epsilon(event, delta)) == pytest.approx(interval)
    finest = accountants._pld_epsilon(items, delta, 2.5e-5)
    assert finest * (1 - ROUNDING) <= epsilon(event, delta) <= finest * (1 + 1e-5)


@pytest.mark.parametrize(
    ("sample_rate", "noise_multiplier", "steps", "prv"),
    # Upper bounds of Opacus 1.6.0's PRV accountant, error 0.01; inf where it needs more than 7 GB.
    [(0.8192, 0.8, 1_000, 690.904), (0.8192, 10.0, 20_000, 115.745), (0.5, 0.3, 10_000, math.inf)],
)
def test_a_large_epsilon_takes_a_coarse_grid_and_not_minutes(
    sample_rate: float, noise_multiplier: float, steps: int, prv: float
) -> None:
    start = time.monotonic()
    bounds = epsilon_bounds(dpsgd_event(sample_rate=sample_rate, noise_multiplier=noise_multiplier, steps=steps), 1e-5)
    assert time.monotonic() - start < 20
    assert bounds.pld < bounds.rdp
    if prv < math.inf:
        assert bounds.pld == pytest.approx(prv, rel=1e-3)


@pytest.mark.parametrize(("sample_rate", "noise_multiplier"), [(1.0, 1e-4), (0.1, 1e-100)])
def test_a_meaningless_epsilon_is_left_to_rdp(
    sample_rate: float, noise_multiplier: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> float:
        raise AssertionError("a PLD of this size would need gigabytes")

    monkeypatch.setattr(accountants, "_pld_epsilon", refuse)
    bounds = epsilon_bounds(dpsgd_event(sample_rate=sample_rate, noise_multiplier=noise_multiplier, steps=3), 1e-5)
    assert bounds.epsilon > 1e6
    assert bounds.pld == math.inf


@settings(max_examples=6, deadline=None)
@given(steps=st.integers(1, 400), more=st.integers(1, 400), delta=st.sampled_from([1e-3, 1e-5, 1e-8]))
def test_more_steps_and_smaller_delta_never_cost_less(steps: int, more: int, delta: float) -> None:
    event, longer = (dpsgd_event(sample_rate=0.02, noise_multiplier=4.0, steps=n) for n in (steps, steps + more))
    assert epsilon(event, delta) <= epsilon(longer, delta) * (1 + ROUNDING)
    assert epsilon(event, delta) <= epsilon(event, delta / 10) * (1 + ROUNDING)


GAUSSIAN = GaussianDpEvent(20.0)
STEP = dpsgd_event(sample_rate=0.2, noise_multiplier=6.0).event


@pytest.mark.parametrize(
    ("step", "spent"),
    [
        pytest.param(GAUSSIAN, None, id="Gaussians"),
        pytest.param(GAUSSIAN, SelfComposedDpEvent(STEP, 20), id="Gaussians after a run"),
        pytest.param(STEP, None, id="steps"),
        pytest.param(STEP, GaussianDpEvent(3.0), id="steps after a Gaussian"),
        pytest.param(STEP, SelfComposedDpEvent(STEP, 5), id="steps after the same steps"),
    ],
)
def test_affordable_steps_are_the_most_that_fit(step: DpEvent, spent: DpEvent | None) -> None:
    budget = PrivacyBudget(1.5, 1e-5)

    def cost(steps: int) -> float:
        return epsilon(composed([*([spent] if spent else []), SelfComposedDpEvent(step, steps)]), budget.delta)

    steps = affordable_steps(step, budget, spent=spent, at_most=300)
    assert 1 < steps < 300
    assert cost(steps) <= budget.epsilon < cost(steps + 1)
    assert affordable_steps(step, budget, spent=spent, at_most=steps - 1) == steps - 1
    assert affordable_steps(step, budget, spent=spent, at_most=steps) == steps
    assert affordable_steps(step, budget, spent=spent, at_most=steps + 1) == steps


def test_affordable_steps_of_a_gaussian_are_the_exact_ones() -> None:
    # ε of k releases depends on σ/√k alone: exactly 100 of σ = 30 cost what one of σ = 3 costs.
    target = exact_gaussian_epsilon(3.0, 1e-5)
    assert affordable_steps(GaussianDpEvent(30.0), PrivacyBudget(target * 1.001, 1e-5), at_most=500) == 100
    assert affordable_steps(GaussianDpEvent(30.0), PrivacyBudget(target * 0.9999, 1e-5), at_most=500) == 99


def test_no_step_is_affordable_where_none_fits() -> None:
    step = dpsgd_event(sample_rate=0.5, noise_multiplier=1.0).event
    assert affordable_steps(step, PrivacyBudget(0.1, 1e-5), at_most=1) == 0
    assert affordable_steps(step, PrivacyBudget(0.1, 1e-5), at_most=1000) == 0
    tiny = GaussianDpEvent(1e4)
    assert affordable_steps(tiny, PrivacyBudget(1.0, 1e-5), spent=GaussianDpEvent(1.0), at_most=10) == 0


def test_affordable_steps_compute_no_distribution_far_above_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    costs: list[float] = []
    real = accountants._pld_epsilon

    def watched(counts: dict, delta: float, interval: float) -> float:
        costs.append(real(counts, delta, interval))
        return costs[-1]

    monkeypatch.setattr(accountants, "_pld_epsilon", watched)
    step = dpsgd_event(sample_rate=0.5, noise_multiplier=4.0).event
    steps = affordable_steps(step, PrivacyBudget(3.0, 1e-5), at_most=2000)
    assert 20 < steps < 100
    assert max(costs) < 6


@pytest.mark.parametrize("at_most", [0, -1, 2.5, True, "7", None])
def test_bad_number_of_steps(at_most: object) -> None:
    with pytest.raises(ValueError, match="at_most is"):
        affordable_steps(GaussianDpEvent(1.0), PrivacyBudget(1.0, 1e-5), at_most=at_most)  # type: ignore[arg-type]


@pytest.mark.parametrize(("noise_multiplier", "delta"), [(800.0, 1e-3), (100.0, 1e-5), (10.0, 1e-5), (2.0, 1e-5)])
@pytest.mark.parametrize("size", [2, 3, 10, 50])
def test_group_epsilon_is_a_bound(noise_multiplier: float, delta: float, size: int) -> None:
    # k units together move a Gaussian release by k: exactly a Gaussian with σ/k. Where one unit costs nothing at δ (the
    # first case), k units still cost something.
    claimed = group_epsilon(GaussianDpEvent(noise_multiplier), delta, size)
    exact = exact_gaussian_epsilon(noise_multiplier / size, delta)
    assert exact > 0 or size == 2
    assert claimed >= exact
    assert claimed >= size * epsilon(GaussianDpEvent(noise_multiplier), delta)


def test_group_epsilon_grows_with_the_group() -> None:
    event = dpsgd_event(sample_rate=0.01, noise_multiplier=1.0, steps=100)
    one = epsilon(event, 1e-5)
    sizes = (1, 2, 3, 5, 10, 100)
    claims = [group_epsilon(event, 1e-5, size) for size in sizes]
    assert claims[0] == one
    assert claims == sorted(claims)
    assert all(claim >= size * one for claim, size in zip(claims, sizes, strict=True))


def test_group_epsilon_is_infinite_rather_than_wrong() -> None:
    weak = dpsgd_event(sample_rate=0.5, noise_multiplier=0.3, steps=10_000)
    assert group_epsilon(weak, 1e-5, 10) == math.inf
    # No δ of one unit is small enough for this δ of two.
    assert group_epsilon(GaussianDpEvent(1.0), 1e-295, 2) == math.inf
    # RDP itself gives up.
    assert group_epsilon(GaussianDpEvent(1e-160), 1e-5, 2) == math.inf


@pytest.mark.parametrize("size", [0, -2, 1.5, True, "3"])
def test_bad_group_size(size: object) -> None:
    with pytest.raises(ValueError, match="group_size is"):
        group_epsilon(GaussianDpEvent(1.0), 1e-5, size)  # type: ignore[arg-type]


def test_accounting_imports_no_torch() -> None:
    code = (
        "import sys, monai_privacy.accounting, monai_privacy.plan, monai_privacy.report\n"
        "print([m for m in ('torch', 'monai', 'ignite', 'opacus') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


# --- releases of several kinds


def test_tuning_beside_an_image_level_run_has_a_joint_bound() -> None:
    """Of one only divergences are known, of the other only the distribution is tight: each gets half of δ."""
    tuned = tuning_event(dpsgd_event(sample_rate=0.05, noise_multiplier=4.0, steps=100), mean_runs=10, shape=1.0)
    images = capped_images_event(sample_rate=0.02, noise_multiplier=3.0, max_images_per_patient=3, steps=50)
    bounds = epsilon_bounds(composed([tuned, images]), 1e-5)
    assert bounds.pld == pytest.approx(epsilon(images, 5e-6) + rdp_epsilon(tuned, 5e-6))
    assert bounds.epsilon == bounds.pld < bounds.rdp < math.inf
    assert bounds.epsilon > max(epsilon(tuned, 1e-5), epsilon(images, 1e-5))
    alone = epsilon_bounds(tuned, 1e-5)
    assert (alone.pld, alone.epsilon) == (math.inf, alone.rdp)


@pytest.mark.parametrize(
    "event",
    [
        capped_images_event(sample_rate=0.05, noise_multiplier=2.0, max_images_per_patient=4, steps=30),
        truncated_dpsgd_event(num_patients=200, sample_rate=0.1, max_batch_size=25, noise_multiplier=2.0, steps=30),
    ],
    ids=["images", "truncated"],
)
def test_divergences_without_amplification_bound_the_distribution(event: DpEvent) -> None:
    bounds = epsilon_bounds(event, 1e-5)
    assert bounds.pld < bounds.rdp < math.inf
    assert coarse_epsilon(event, 1e-5) >= bounds.pld * (1 - ROUNDING)


def test_tuning_of_an_image_level_run_is_bounded_without_amplification() -> None:
    images = capped_images_event(sample_rate=0.02, noise_multiplier=30.0, max_images_per_patient=3, steps=20)
    plain = SelfComposedDpEvent(GaussianDpEvent(10.0), 20)
    tuned, bound = (tuning_event(event, mean_runs=5, shape=1.0) for event in (images, plain))
    assert epsilon(tuned, 1e-5) == pytest.approx(epsilon(bound, 1e-5))
    assert epsilon(tuned, 1e-5) > epsilon(images, 1e-5)


def test_a_large_epsilon_of_images_is_not_left_to_the_loose_bound() -> None:
    event = capped_images_event(sample_rate=0.01, noise_multiplier=1.0, max_images_per_patient=8, steps=20)
    bounds = epsilon_bounds(event, 1e-5)
    assert bounds.rdp > 100
    assert bounds.epsilon == bounds.pld < 20


def test_fewer_images_cost_less_and_a_truncation_that_never_happens_costs_nothing() -> None:
    costs = [
        epsilon(capped_images_event(sample_rate=0.02, noise_multiplier=2.0, max_images_per_patient=k, steps=20), 1e-5)
        for k in (1, 2, 4)
    ]
    assert costs == sorted(costs)
    assert costs[0] * 1.5 < costs[1]
    plain = dpsgd_event(sample_rate=0.1, noise_multiplier=2.0, steps=30)
    wide, narrow = (
        truncated_dpsgd_event(num_patients=200, sample_rate=0.1, max_batch_size=size, noise_multiplier=2.0, steps=30)
        for size in (60, 20)
    )
    assert epsilon(wide, 1e-5) == pytest.approx(epsilon(plain, 1e-5), rel=1e-4)
    assert epsilon(narrow, 1e-5) > epsilon(plain, 1e-5) * 1.05


RATE = 256 / 10_000
SIX_RELEASES = [
    GaussianDpEvent(20.0),
    dpsgd_event(sample_rate=RATE, noise_multiplier=2.0, steps=1172),
    dpsgd_event(sample_rate=RATE, noise_multiplier=2.0, steps=960),
    dpsgd_event(sample_rate=RATE, noise_multiplier=2.0, steps=290),
    gnmax_event(noise_std=40.0, answers=500),
    GaussianDpEvent(4.75),
]


def test_six_releases_cost_about_half_of_what_their_epsilons_add_up_to() -> None:
    """The worked example of docs/accounting.md; its numbers were given to us (joint 4.71, RDP 5.09, sums 8.79 and 9.73)."""
    alone = [epsilon(release, 1e-5) for release in SIX_RELEASES]
    assert alone == pytest.approx([0.16, 1.90, 1.71, 0.91, 3.34, 0.77], abs=0.006)
    assert sum(alone) == pytest.approx(8.79, abs=0.01)
    assert sum(epsilon(release, 1e-5 / 6) for release in SIX_RELEASES) == pytest.approx(9.73, abs=0.01)
    joint = epsilon_bounds(composed(SIX_RELEASES), 1e-5)
    assert joint.pld == pytest.approx(4.71, abs=0.01)
    assert joint.rdp == pytest.approx(5.09, abs=0.01)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from([*SIX_RELEASES, laplace_event(2.0)]), min_size=1, max_size=6))
def test_the_joint_account_is_at_most_rdp_and_the_sum(parts: list[DpEvent]) -> None:
    joint = epsilon_bounds(composed(parts), 1e-5)
    assert joint.pld <= joint.rdp * (1 + ROUNDING)
    assert joint.epsilon <= sum(epsilon(part, 1e-5 / len(parts)) for part in parts) * (1 + ROUNDING)
    assert joint.epsilon >= max(epsilon(part, 1e-5) for part in parts) * (1 - ROUNDING)


# --- what it means


@pytest.mark.parametrize(("noise_multiplier", "rate"), [(1.0, 0.01), (0.5, 0.001), (3.0, 0.1), (10.0, 0.0001)])
def test_the_best_attacker_on_a_gaussian_is_the_exact_one(noise_multiplier: float, rate: float) -> None:
    """Dong, Roth & Su 2022, equation (6): the trade-off of a Gaussian is Φ(Φ⁻¹(rate) + 1/σ)."""
    exact = stats.norm.cdf(stats.norm.ppf(rate) + 1 / noise_multiplier)
    (found,) = true_positive_rates(GaussianDpEvent(noise_multiplier), [rate])
    assert exact * (1 - ROUNDING) <= found <= exact * 1.01


def test_the_best_attacker_on_a_known_training() -> None:
    """facts: ε = 5.58 at δ = 1e-5 is at most 2.7 % at 0.1 % and 12 % at 1 %."""
    event = dpsgd_event(sample_rate=0.0256, noise_multiplier=1.0, steps=1172)
    rates = true_positive_rates(event, [0.001, 0.01])
    assert rates == pytest.approx((0.027, 0.12), rel=0.05)
    # Far less than ε and δ alone would say.
    eps = epsilon(event, 1e-5)
    assert rates[0] < 0.2 * (math.exp(eps) * 0.001 + 1e-5)


def test_attackers_at_the_ends() -> None:
    event = GaussianDpEvent(1.0)
    rates = true_positive_rates(event, [0.0, 1e-6, 0.5, 1.0])
    assert rates[-1] == 1.0
    assert all(true >= false for true, false in zip(rates, (0.0, 1e-6, 0.5, 1.0), strict=True))
    assert true_positive_rates(composed([]), [0.25]) == (0.25,)
    assert true_positive_rates(GaussianDpEvent(0.01), [0.001])[0] == pytest.approx(1.0)
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="false-positive rate"):
            true_positive_rates(event, [bad])


def test_the_profile_is_the_inverse_of_epsilon() -> None:
    for event in (
        dpsgd_event(sample_rate=0.05, noise_multiplier=2.0, steps=50),
        tuning_event(GaussianDpEvent(5.0), mean_runs=10, shape=1.0),
        capped_images_event(sample_rate=0.05, noise_multiplier=3.0, max_images_per_patient=2, steps=10),
    ):
        eps = epsilon(event, 1e-5)
        (delta,) = delta_of(event, np.array([eps]))
        assert delta == pytest.approx(1e-5, rel=0.05)
    assert delta_of(composed([]), np.array([1.0])).tolist() == [0.0]


def test_without_amplification_each_unit_is_in_its_share_of_the_steps() -> None:
    # 30 epochs of a shuffled loader: one Gaussian at σ/√30 (facts: 2.20706 at σ = 10).
    event = dpsgd_event(sample_rate=0.05, noise_multiplier=10.0, steps=600)
    assert epsilon_without_amplification(event, 1e-5) == pytest.approx(2.2070594697595025, rel=1e-6)
    # N = 500, B = 64, 30 epochs, σ = 2 (facts: 12.807).
    event = dpsgd_event(sample_rate=64 / 500, noise_multiplier=2.0, steps=234)
    assert epsilon_without_amplification(event, 2e-4) == pytest.approx(12.807158298861484, rel=1e-3)
    assert epsilon_without_amplification(event, 2e-4) > epsilon(event, 2e-4)
    one = dpsgd_event(sample_rate=1e-6, noise_multiplier=2.0)
    assert epsilon_without_amplification(one, 1e-5) == epsilon(GaussianDpEvent(2.0), 1e-5)
    gaussian = SelfComposedDpEvent(GaussianDpEvent(3.0), 7)
    assert epsilon_without_amplification(gaussian, 1e-5) == epsilon(gaussian, 1e-5)


def test_images_apart_cost_no_more_than_all_at_once() -> None:
    event = capped_images_event(sample_rate=0.05, noise_multiplier=5.0, max_images_per_patient=3, steps=40)
    once_each = SelfComposedDpEvent(GaussianDpEvent(5.0), 6)
    assert epsilon_without_amplification(event, 1e-5) == pytest.approx(
        epsilon(SelfComposedDpEvent(GaussianDpEvent(5.0 / 3), 2), 1e-5)
    )
    assert epsilon_without_amplification(event, 1e-5) >= epsilon(once_each, 1e-5)


# --- filters


@pytest.mark.parametrize("budget", [PrivacyBudget(1.0, 1e-5), PrivacyBudget(8.0, 1e-6), PrivacyBudget(0.1, 1e-4)])
def test_a_filter_lets_through_what_the_accountant_allows_and_little_less(budget: PrivacyBudget) -> None:
    order = filters.filter_order(budget)
    assert order in ORDERS
    step = GaussianDpEvent(100.0)
    through = filters.steps_through_filter(step, budget, order, at_most=10**9)
    fixed = affordable_steps(step, budget, at_most=10**9)
    assert 0.6 * fixed < through <= fixed
    # Mironov's divergence of a Gaussian is α / 2σ²: the sum may reach the allowance, and no step more.
    assert through * order / 2 / 100**2 <= filters.allowance(budget, order) < (through + 2) * order / 2 / 100**2
    spent = SelfComposedDpEvent(step, through)
    assert filters.steps_through_filter(step, budget, order, spent=spent, at_most=10) == 0
    assert filters.steps_through_filter(step, budget, order, at_most=5) == 5
    assert epsilon(spent, budget.delta) <= budget.epsilon


def test_a_filter_of_a_useless_order_lets_nothing_through() -> None:
    budget = PrivacyBudget(0.1, 1e-10)
    assert filters.allowance(budget, min(ORDERS)) < 0
    assert filters.steps_through_filter(GaussianDpEvent(1e6), budget, min(ORDERS), at_most=10) == 0


@pytest.mark.filterwarnings("ignore:GDP accounting is experimental:UserWarning")
def test_gdp_is_no_bound():
    """Why there is no GDP accountant here: the limit theorem's ε can lie below that of the mechanism itself."""
    gdp = GaussianAccountant()
    gdp.history = [(1.0, 0.064, 470)]
    exact = epsilon(dpsgd_event(sample_rate=0.064, noise_multiplier=1.0, steps=470), 1e-4)
    assert gdp.get_epsilon(1e-4) == pytest.approx(7.88, abs=0.01)
    assert exact == pytest.approx(8.32, abs=0.01)
