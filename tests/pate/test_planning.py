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


"""The planner of PATE: right noise, right shares of labels, and what it takes to reach a target."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import ndtr
from scipy.stats import norm

from monai_privacy.accounting import epsilon, gnmax_event
from monai_privacy.pate import (
    INFORMATIVE,
    VotingPlan,
    advice,
    epsilon_needed,
    label_agreement,
    most_queries,
    require_informative,
    teachers_needed,
)
from monai_privacy.pate.planning import MOST_EPSILON, MOST_QUERIES, MOST_TEACHERS, multiples, percent

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "pate.json").read_text(encoding="utf-8"))
BLOG = VotingPlan(num_teachers=5, num_queries=163, num_classes=2, epsilon=8.0)
# ε for which the released label is that of most teachers with 95 %, all of them agreeing: computed by hand with Gaussian
# differential privacy before there was a planner, from Φ(M / (√2 σ)) = 0.95.
NINETY_FIVE = {
    5: {100: 48.9, 300: 113, 1000: 304},
    10: {100: 18.8, 300: 39.8, 1000: 97.7},
    25: {100: 6.0, 300: 11.8, 1000: 25.7},
    50: {100: 2.7, 300: 5.1, 1000: 10.5},
    100: {100: 1.25, 300: 2.3, 1000: 4.6},
    250: {100: 0.46, 300: 0.84, 1000: 1.6},
}
LAST_DIGIT = {1.25: 0.01, 0.46: 0.01, 0.84: 0.01, 113: 1, 304: 1}

quick = settings(max_examples=40, deadline=None)
shares = st.floats(0.5, 1.0)


@st.composite
def plans(draw) -> VotingPlan:
    teachers = draw(st.integers(1, 2000))
    return VotingPlan(
        num_teachers=teachers,
        num_queries=draw(st.integers(1, 5000)),
        num_classes=draw(st.integers(2, 30)),
        epsilon=draw(st.floats(0.05, 100)),
        delta=draw(st.sampled_from([1e-9, 1e-6, 1e-5, 1e-3])),
        teachers_per_patient=draw(st.integers(1, min(3, teachers))),
    )


@pytest.mark.parametrize("entry", GOLDEN["gdp_calibration"], ids=lambda entry: f"{entry['eps']}-{entry['queries']}")
def test_noise_is_that_of_the_reference(entry):
    plan = VotingPlan(7, entry["queries"], 3, entry["eps"], entry["delta"])
    assert plan.noise_std == pytest.approx(entry["sigma"], rel=1e-8)


@pytest.mark.parametrize("entry", GOLDEN["multiplicity"], ids=lambda entry: entry["max_teachers_per_patient"])
def test_noise_grows_with_the_teachers_of_a_patient(entry):
    plan = VotingPlan(100, entry["queries"], 2, entry["eps"], teachers_per_patient=entry["max_teachers_per_patient"])
    assert plan.noise_std == pytest.approx(entry["sigma"], rel=1e-8)


@quick
@given(plans())
def test_noise_never_claims_less_than_the_accountant_shows(plan):
    event = gnmax_event(
        noise_std=plan.noise_std, answers=plan.num_queries, teachers_per_patient=plan.teachers_per_patient
    )
    shown = epsilon(event, plan.delta)
    assert shown <= plan.epsilon
    # Nor is there more of it than that takes.
    assert shown == pytest.approx(plan.epsilon, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(("teachers", "queries"), [(m, q) for m, row in NINETY_FIVE.items() for q in row])
def test_epsilon_for_95_percent_of_unanimous_votes(teachers, queries):
    expected = NINETY_FIVE[teachers][queries]
    found = epsilon_needed(VotingPlan(teachers, queries, 2, 1.0), 1.0, 0.95)
    assert found == pytest.approx(expected, abs=0.6 * LAST_DIGIT.get(expected, 0.1))


@pytest.mark.parametrize(("budget", "mu"), [(1, 0.268), (2, 0.502), (4, 0.925), (8, 1.666)])
def test_teachers_for_95_percent_of_unanimous_votes(budget, mu):
    """M of at least 2 z √Q / μ(ε), with the values of μ at δ = 1e-5 given to three decimals."""
    found = teachers_needed(VotingPlan(1, 300, 2, budget), 1.0, 0.95)
    assert found == pytest.approx(2 * norm.ppf(0.95) * math.sqrt(300) / mu, abs=1.2)


def test_five_hospitals_and_163_queries_are_hopeless():
    """Teachers and queries of a published tutorial (OpenMined): Φ(5 μ(8) / (2 √163)) with the μ of the golden file."""
    assert label_agreement(BLOG, 1.0) == pytest.approx(ndtr(5 * 1.666030598 / (2 * math.sqrt(163))), abs=1e-8)
    assert label_agreement(BLOG, 1.0) == pytest.approx(0.628, abs=5e-4)
    assert label_agreement(BLOG, 0.9) == pytest.approx(0.603, abs=5e-4)


@quick
@given(plans(), shares)
def test_two_classes_have_a_closed_form(plan, share):
    plan = replace(plan, num_classes=2)
    lead = (2 * share - 1) * plan.num_teachers
    assert label_agreement(plan, share) == pytest.approx(ndtr(lead / (math.sqrt(2) * plan.noise_std)), abs=1e-12)


@pytest.mark.parametrize(("classes", "share"), [(3, 0.6), (5, 1.0), (10, 0.8), (1000, 0.5), (1000, 0.9)])
def test_more_classes_by_adaptive_quadrature(classes, share):
    plan = VotingPlan(60, 200, classes, 5.0)
    first, second = (number * plan.num_teachers / plan.noise_std for number in (share, 1 - share))

    def density(noise: float) -> float:
        return norm.pdf(noise) * ndtr(first - second + noise) * ndtr(first + noise) ** (classes - 2)

    expected = quad(density, -12, 12, epsabs=1e-13, limit=500)[0]
    assert label_agreement(plan, share) == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize(("classes", "share"), [(2, 0.7), (3, 0.7), (3, 1.0), (10, 0.8)])
def test_monte_carlo_agrees(classes, share):
    plan, draws = VotingPlan(20, 200, classes, 8.0), 200_000
    votes = np.zeros(classes)
    votes[:2] = share * plan.num_teachers, (1 - share) * plan.num_teachers

    def frequency(noise_std: float) -> float:
        noise = np.random.default_rng(0).normal(0, noise_std, (draws, classes))
        return float(np.mean(np.argmax(votes + noise, axis=1) == 0))

    expected = label_agreement(plan, share)
    tolerance = 4.5 * math.sqrt(expected * (1 - expected) / draws)
    assert abs(frequency(plan.noise_std) - expected) < tolerance
    # The same test notices noise of two thirds.
    assert abs(frequency(plan.noise_std * 2 / 3) - expected) > tolerance


@pytest.mark.parametrize("others", [(6, 0, 0, 0), (5, 1, 0, 0), (3, 3, 0, 0), (2, 2, 2, 0), (2, 2, 1, 1)])
def test_one_rival_is_the_worst_spread(others):
    plan = VotingPlan(20, 100, 5, 3.0)

    def density(noise: float) -> float:
        own = 14 / plan.noise_std + noise
        return norm.pdf(noise) * math.prod(ndtr(own - votes / plan.noise_std) for votes in others)

    chance = quad(density, -12, 12, epsabs=1e-13)[0]
    worst = label_agreement(plan, 0.7)
    assert chance == pytest.approx(worst, abs=1e-11) if others[0] == 6 else chance > worst + 1e-5


SLACK = 1e-12


@quick
@given(plans(), shares, st.integers(1, 100), st.floats(1.0, 5.0))
def test_label_agreement_is_monotone(plan, share, more, factor):
    here = label_agreement(plan, share)
    assert 0 <= here <= 1
    better = [
        replace(plan, num_teachers=plan.num_teachers + more),
        replace(plan, epsilon=plan.epsilon * factor),
        replace(plan, delta=plan.delta * factor),
    ]
    worse = [
        replace(plan, num_queries=plan.num_queries + more),
        replace(plan, num_classes=plan.num_classes + more),
        replace(plan, teachers_per_patient=min(plan.num_teachers, plan.teachers_per_patient + more)),
    ]
    assert all(label_agreement(other, share) >= here - SLACK for other in better)
    assert all(label_agreement(other, share) <= here + SLACK for other in worse)
    assert label_agreement(plan, min(1.0, share * factor)) >= here - SLACK


def test_each_number_matters():
    here = label_agreement(VotingPlan(20, 100, 3, 3.0), 0.8)
    for change in ({"num_teachers": 21}, {"epsilon": 3.1}, {"delta": 1e-4}):
        assert label_agreement(replace(VotingPlan(20, 100, 3, 3.0), **change), 0.8) > here + 1e-3
    for change in ({"num_queries": 110}, {"num_classes": 4}, {"teachers_per_patient": 2}):
        assert label_agreement(replace(VotingPlan(20, 100, 3, 3.0), **change), 0.8) < here - 1e-3
    assert label_agreement(VotingPlan(20, 100, 3, 3.0), 0.81) > here + 1e-3


@quick
@given(plans(), st.floats(0.55, 1.0), st.floats(0.3, 0.99))
def test_what_is_needed_reaches_the_target_and_less_does_not(plan, share, target):
    teachers = teachers_needed(plan, share, target)
    if teachers is None:
        assert label_agreement(replace(plan, num_teachers=MOST_TEACHERS), share) < target
    else:
        assert label_agreement(replace(plan, num_teachers=teachers), share) >= target
        assert teachers >= plan.teachers_per_patient
        if teachers > plan.teachers_per_patient:
            assert label_agreement(replace(plan, num_teachers=teachers - 1), share) < target
    queries = most_queries(plan, share, target)
    if queries is not None:
        assert label_agreement(replace(plan, num_queries=queries), share) >= target
    if queries != MOST_QUERIES:
        assert label_agreement(replace(plan, num_queries=(queries or 0) + 1), share) < target
    least = epsilon_needed(plan, share, target)
    if least is None:
        assert label_agreement(replace(plan, epsilon=MOST_EPSILON), share) < target
    else:
        assert label_agreement(replace(plan, epsilon=least), share) >= target
        if least > 0.001:
            assert label_agreement(replace(plan, epsilon=least * (1 - 1e-6)), share) < target


def test_none_where_nothing_reaches_the_target():
    tie = VotingPlan(10, 10, 2, 1.0)
    assert teachers_needed(tie, 0.5, 0.9) is None
    assert most_queries(tie, 0.5, 0.9) is None
    assert epsilon_needed(tie, 0.5, 0.9) is None
    told = advice(tie, agreement=0.5)
    assert told.sub_teachers_per_hospital is None
    assert told.alternatives[0].startswith("Sub-teachers: even 1000000 are too few")
    assert told.alternatives[2].startswith("Fewer queries: not even one label")
    with pytest.raises(ValueError, match=r"Let each hospital train with differential privacy and share its model\.$"):
        require_informative(told)


def test_most_queries_ends_at_a_billion():
    assert most_queries(VotingPlan(10**6, 1, 2, 1000.0), 1.0, 0.9) == MOST_QUERIES


def test_advice_for_five_hospitals():
    told = advice(BLOG)
    assert (told.hospitals, told.agreement, told.target) == (5, 0.9, 0.9)
    assert [share for share, _ in told.table] == [0.6, 0.7, 0.8, 0.9, 1.0]
    assert all(value == label_agreement(BLOG, share) for share, value in told.table)
    assert told.label_accuracy == label_agreement(BLOG, 0.9)
    # 2 z √Q / (0.8 μ) = 24.6 teachers; (0.4 M μ / z)² = 6.8 queries; μ = 2 z √Q / (0.8 M), of which ε is 67.6.
    assert told.teachers_needed == 25
    assert told.sub_teachers_per_hospital == 5
    assert told.queries_affordable == 6
    assert told.epsilon_needed == pytest.approx(67.55, abs=0.01)
    assert not told.informative
    assert not told.reaches_target
    sub_teachers, models, queries = told.alternatives
    assert "each of 5 hospitals splits its patients into 5 shards, no patient in two of them" in sub_teachers
    assert "fewer than about 50 teachers, each hospital trains with DPSupervisedTrainer" in models
    assert "90 % of 6 labels" in queries
    assert "semi-supervised" in queries


def test_refusal_is_one_line_with_value_reason_and_remedy():
    with pytest.raises(ValueError) as caught:
        require_informative(advice(BLOG))
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith("5 teachers, 163 queries at epsilon 8: after the noise 62.7 % of the labels would be ")
    assert "60.2 % if 90 % of them did; below 75 % a student learns little." in line
    assert "Split each hospital's patients among 5 sub-teachers, or ask for at most 6 labels, or let each" in line


@quick
@given(plans(), shares)
def test_refused_exactly_below_informative(plan, share):
    told = advice(plan, agreement=share)
    if label_agreement(plan, share) >= INFORMATIVE:
        require_informative(told)
        assert told.refusal is None
    else:
        with pytest.raises(ValueError):
            require_informative(told)


def test_a_plan_that_reaches_its_target_needs_no_way_out():
    told = advice(replace(BLOG, num_teachers=25), hospitals=5)
    assert told.informative
    assert told.reaches_target
    assert told.alternatives == ()
    assert (told.hospitals, told.sub_teachers_per_hospital) == (5, 5)


def test_sub_teachers_per_hospital_are_rounded_up():
    told = advice(VotingPlan(7, 163, 2, 8.0), hospitals=3)
    assert told.teachers_needed == 25
    assert told.sub_teachers_per_hospital == 9


def test_advice_is_plain_json():
    numbers = json.loads(json.dumps(advice(BLOG).to_dict(), allow_nan=False))
    assert numbers["plan"]["noise_std"] == BLOG.noise_std
    assert numbers["plan"]["num_queries"] == 163
    assert numbers["table"][4] == {"agreement": 1.0, "label_accuracy": label_agreement(BLOG, 1.0)}
    assert numbers["informative"] is False
    assert numbers["teachers_needed"] == 25
    assert numbers["refusal"] == advice(BLOG).refusal
    assert len(numbers["alternatives"]) == 3


def test_a_plan_never_changes():
    with pytest.raises(FrozenInstanceError):
        BLOG.epsilon = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_teachers": 0}, "num_teachers is 0"),
        ({"num_teachers": 2.5}, "num_teachers is 2.5"),
        ({"num_teachers": 10**6 + 1}, "num_teachers is above 1000000"),
        ({"num_queries": 0}, "num_queries is 0"),
        ({"num_queries": 10**400}, "num_queries is above 1000000000"),
        ({"num_classes": 1}, "num_classes is 1, but a vote needs at least 2"),
        ({"num_classes": True}, "num_classes is True"),
        ({"epsilon": 0}, "epsilon is 0"),
        ({"epsilon": float("nan")}, "epsilon is nan"),
        ({"epsilon": 1e-4}, "epsilon is 0.0001, but plans are made from 0.001 to 1000"),
        ({"epsilon": 2000}, "epsilon is 2000, but plans are made from 0.001 to 1000"),
        ({"delta": 0}, "delta is 0"),
        ({"delta": 1}, "delta is 1"),
        ({"teachers_per_patient": 0}, "teachers_per_patient is 0"),
        ({"teachers_per_patient": 6}, "teachers_per_patient is 6, above num_teachers 5"),
    ],
)
def test_numbers_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(BLOG, **change)


@pytest.mark.parametrize("share", [0.49, 1.01, -1, math.nan, math.inf, "0.9", True])
def test_agreement_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match="agreement is "):
        label_agreement(BLOG, share)


@pytest.mark.parametrize("target", [0, 1, 1.5, math.nan, "0.9"])
@pytest.mark.parametrize("search", [teachers_needed, most_queries, epsilon_needed])
def test_target_out_of_range_is_refused(search, target):
    with pytest.raises(ValueError, match="target is "):
        search(BLOG, 0.9, target)


def test_advice_refuses_what_makes_no_sense():
    with pytest.raises(ValueError, match="hospitals is 6, but there are only 5 teachers"):
        advice(BLOG, hospitals=6)
    with pytest.raises(ValueError, match="hospitals is 0"):
        advice(BLOG, hospitals=0)
    with pytest.raises(ValueError, match=r"target is 0\.7, below 0\.75"):
        advice(BLOG, target=0.7)


def test_multiples_stay_within_what_can_be_planned():
    assert multiples(BLOG) == [(1, 5), (2, 10), (5, 25), (20, 100), (50, 250)]
    assert multiples(replace(BLOG, num_teachers=10**6)) == [(1, 10**6)]


@pytest.mark.parametrize(
    ("share", "text"), [(0.6289, "62.8 %"), (0.57, "57 %"), (0.7499, "74.9 %"), (0.9999, "99.9 %"), (1.0, "100 %")]
)
def test_percentages_are_rounded_down(share, text):
    assert percent(share) == text
