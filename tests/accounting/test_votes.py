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

"""What answers by vote cost, against the published reference implementation and by the definitions themselves."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from dp_accounting.dp_event import ComposedDpEvent
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy.integrate import quad
from scipy.special import ndtr
from scipy.stats import norm

from monai_privacy.accounting import epsilon
from monai_privacy.accounting.events import gnmax_event, lnmax_event, vote_threshold_event
from monai_privacy.accounting.gaussian import gaussian_delta, gaussian_epsilon, gaussian_mu
from monai_privacy.accounting.vote_costs import (
    checked_votes,
    gnmax_log_q,
    gnmax_rdp,
    lnmax_log_q,
    lnmax_rdp,
    threshold_log_probability,
    threshold_rdp,
)
from monai_privacy.accounting.vote_sensitivity import (
    gnmax_bound_is_continuous,
    gnmax_local_sensitivity,
    gnmax_sensitivity_conditions,
    published_smooth_release_rdp,
    smooth_release_limit,
    smooth_release_rdp,
    smooth_sensitivity,
    threshold_local_sensitivity,
)

# tensorflow/privacy research/pate_2018 and pate_2017 at 03035d5, run unmodified; see "meta" in the file.
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "pate.json").read_text(encoding="utf-8"))
ORDERS = np.array(GOLDEN["orders"])
VOTES = {name: np.array(entry["matrix"]) for name, entry in GOLDEN["votes"].items()}
TEACHERS = {name: entry["teachers"] for name, entry in GOLDEN["votes"].items()}
TOLERANCE = {"rtol": 1e-5, "atol": 1e-12}


def named(entries):
    return [pytest.param(entry, id=f"{entry.get('votes', number)}-{number}") for number, entry in enumerate(entries)]


def by_mironov(curve, delta=1e-5):
    return np.min(curve - math.log(delta) / (ORDERS - 1))


@pytest.mark.parametrize("entry", named(GOLDEN["gnmax"]))
def test_gnmax_as_published(entry):
    votes, noise = VOTES[entry["votes"]], entry["sigma"]
    log_q = gnmax_log_q(votes, noise)
    assert_allclose(log_q, entry["logq"], **TOLERANCE)
    curves = gnmax_rdp(log_q, noise, ORDERS)
    assert_allclose(curves, entry["rdp_dep"], **TOLERANCE)
    assert_allclose(curves.sum(axis=0), entry["total_rdp_dep"], **TOLERANCE)
    assert by_mironov(curves.sum(axis=0)) == pytest.approx(entry["dep"]["eps_mironov"], rel=1e-5)
    assert gaussian_epsilon(entry["gdp_mu"], 1e-5) == pytest.approx(entry["eps_ind_exact_gdp"], rel=1e-6)
    through_events = epsilon(gnmax_event(noise_std=noise, answers=len(votes)), 1e-5)
    assert through_events == pytest.approx(entry["eps_ind_exact_gdp"], rel=1e-6)


@pytest.mark.parametrize("entry", named(GOLDEN["lnmax"]))
def test_lnmax_as_published(entry):
    votes, scale = VOTES[entry["votes"]], entry["b"]
    log_q = lnmax_log_q(votes, scale)
    assert_allclose(log_q, entry["logq_2018"], **TOLERANCE)
    assert_allclose(np.exp(log_q), entry["q_2017"], **TOLERANCE)
    assert_allclose(lnmax_rdp(log_q, scale, ORDERS), entry["rdp_2018"], **TOLERANCE)
    moments = np.arange(1, 9)
    total = moments * lnmax_rdp(log_q, scale, moments + 1).sum(axis=0)
    assert_allclose(total, entry["logmgf_total_2017_l1_8"], **TOLERANCE)
    assert np.min((total + math.log(1e5)) / moments) == pytest.approx(entry["eps_dep_2017_moments8"], rel=1e-5)


@pytest.mark.parametrize("entry", named(GOLDEN["confident_gnmax"]))
def test_confident_gnmax_as_published(entry):
    votes = VOTES[entry["votes"]]
    log_answered = threshold_log_probability(votes.max(axis=1), entry["T"], entry["sigma1"])
    assert_allclose(log_answered, entry["logpr_answered"], **TOLERANCE)
    asked = threshold_rdp(log_answered, entry["sigma1"], ORDERS)
    answered = gnmax_rdp(gnmax_log_q(votes, entry["sigma2"]), entry["sigma2"], ORDERS)
    assert_allclose(asked, entry["rdp_threshold"], **TOLERANCE)
    assert_allclose(answered, entry["rdp_gnmax"], **TOLERANCE)
    expected = (asked + np.exp(log_answered)[:, None] * answered).sum(axis=0)
    assert_allclose(expected, entry["total_rdp_expected_cost"], **TOLERANCE)
    mask = np.array(entry["answered_mask"])
    assert_allclose(asked.sum(axis=0) + answered[mask].sum(axis=0), entry["total_rdp_realised"], **TOLERANCE)
    event = ComposedDpEvent(
        [
            vote_threshold_event(noise_std=entry["sigma1"], questions=len(votes)),
            gnmax_event(noise_std=entry["sigma2"], answers=int(mask.sum())),
        ]
    )
    assert epsilon(event, 1e-5) == pytest.approx(entry["eps_ind_exact_gdp"], rel=1e-6)


def test_interactive_gnmax_as_published():
    (entry,) = GOLDEN["interactive_gnmax"]
    votes, teachers = VOTES[entry["votes"]], TEACHERS[entry["votes"]]
    excess = (votes - teachers * np.array(entry["student_probs"])).max(axis=1)
    log_answered = threshold_log_probability(np.round(excess), entry["T"], entry["sigma1"])
    assert_allclose(log_answered, entry["logpr_answered"], **TOLERANCE)
    asked = threshold_rdp(log_answered, entry["sigma1"], ORDERS)
    assert_allclose(asked, entry["rdp_threshold"], **TOLERANCE)
    answered = gnmax_rdp(gnmax_log_q(votes, entry["sigma2"]), entry["sigma2"], ORDERS)
    expected = (asked + np.exp(log_answered)[:, None] * answered).sum(axis=0)
    assert_allclose(expected, entry["total_rdp_expected_cost"], **TOLERANCE)


@pytest.mark.parametrize("entry", named(GOLDEN["smooth_sensitivity"]))
def test_smooth_sensitivity_as_published(entry):
    votes, teachers, order = VOTES[entry["votes"]], TEACHERS[entry["votes"]], entry["order"]
    noise, queries = entry["sigma2"], entry["per_query"]
    assert list(gnmax_sensitivity_conditions(noise, votes.shape[1], order)) == entry["conditions_C5_C6"]
    local = gnmax_local_sensitivity(votes, teachers, noise, order)
    for column, name in [(0, "ls2_d0"), (5, "ls2_d5")]:
        assert_allclose(local[:, column], [query[name] for query in queries], **TOLERANCE)
    assert_allclose(local.max(axis=1), [query["ls2_max"] for query in queries], **TOLERANCE)
    if entry["T"] is not None:
        largest = votes.max(axis=1)
        asked = threshold_local_sensitivity(largest, teachers, entry["T"], entry["sigma1"], order)
        assert_allclose(asked[:, 0], [query["ls1_d0"] for query in queries], **TOLERANCE)
        # The reference weighs each answer by its chance, as its expected cost does.
        chance = np.exp(threshold_log_probability(largest, entry["T"], entry["sigma1"]))
        local = asked + chance[:, None] * local
    assert_allclose(local.sum(axis=0)[:20], entry["ls_total_first20"], **TOLERANCE)
    assert local.sum(axis=0)[-1] == pytest.approx(entry["ls_total_last"], rel=1e-5)
    assert smooth_sensitivity(local, entry["beta"]) == pytest.approx(entry["ss_beta"], rel=1e-5)
    found = published_smooth_release_rdp(order, entry["beta"], entry["sigma_ss"])
    assert found == pytest.approx(entry["gnss_rdp"], rel=1e-5)


def test_at_low_orders_the_bound_jumps_and_that_is_said():
    fewer, here, more = (gnmax_rdp(gnmax_log_q([[yes, 40 - yes]], 0.6), 0.6, [1.5])[0, 0] for yes in (21, 22, 23))
    assert max(abs(here - fewer), abs(here - more)) > 2.8 * gnmax_local_sensitivity([[22, 18]], 40, 0.6, 1.5)[0, 0]
    assert not gnmax_bound_is_continuous(0.6, 1.5)
    assert all(gnmax_bound_is_continuous(noise, order) for noise in (5.0, 20.0, 300.0) for order in (3.0, 8.0, 16.0))


@given(st.floats(1.05, 100), st.floats(0.01, 0.999), st.floats(1, 100), st.floats(-1, 1), st.floats(0, 1))
def test_the_divergence_of_a_smooth_release_is_that_of_the_worst_neighbours(order, share, scale, ratio, apart):
    beta = share * smooth_release_limit(order)
    claimed = smooth_release_rdp(order, beta, scale)

    def divergence(ratio, apart):
        """Of N(0, scale²) and N(apart · smaller sensitivity, (scale · ratio)²); Gil et al. 2013."""
        mixed = 1 + order * (ratio**2 - 1)
        mean = order * (apart * min(1, ratio) / scale) ** 2 / (2 * mixed)
        return math.log(ratio) + math.log(ratio**2 / mixed) / (2 * (order - 1)) + mean

    assert divergence(math.exp(ratio * beta), apart) <= claimed * (1 + 1e-6) + 1e-9
    assert divergence(math.exp(-beta), 1) == pytest.approx(claimed, rel=1e-6, abs=1e-9)


def test_the_published_divergence_of_a_smooth_release_is_no_bound():
    # By quadrature: integral of p^8 q^-7 for N(0, 3²) and N(e^-0.05, (3 e^-0.05)²).
    p, q = norm(0, 3), norm(math.exp(-0.05), 3 * math.exp(-0.05))
    found = math.log(quad(lambda x: math.exp(8 * p.logpdf(x) - 7 * q.logpdf(x)), -60, 60, limit=400)[0]) / 7
    assert smooth_release_rdp(8, 0.05, 3) == pytest.approx(found, rel=1e-6)
    assert published_smooth_release_rdp(8, 0.05, 3) < found * 0.7


def test_the_reference_s_own_unit_tests():
    small, large = GOLDEN["upstream_unit"]["ls_gnmax"]
    local = gnmax_local_sensitivity([small["counts"]], small["teachers"], small["sigma"], small["order"])
    assert_allclose(local[0], small["ls"], rtol=1e-4, atol=1e-12)
    local = gnmax_local_sensitivity([large["counts"]], large["teachers"], large["sigma"], large["order"])
    assert_allclose(local[0, 297:301], large["ls_index_297_300"], **TOLERANCE)
    for entry in GOLDEN["upstream_unit"]["check_conditions"]:
        found = gnmax_sensitivity_conditions(entry["sigma"], entry["classes"], entry["order"])
        assert list(found) == entry["out"]


@pytest.mark.parametrize("entry", named(GOLDEN["gdp_exact"]))
def test_exact_gaussian_composition(entry):
    assert gaussian_epsilon(entry["mu"], entry["delta"]) == pytest.approx(entry["eps"], rel=1e-8)


# Published settings of Papernot et al. 2018, Table 1, accounted independently of the data; facts of GOLDEN["gdp_exact"].
@pytest.mark.parametrize(
    ("asked", "threshold", "answered", "noise", "delta", "expected"),
    [
        (640, 150, 286, 40, 1e-5, 2.5426),
        (8500, 200, 3098, 40, 1e-6, 11.1379),
        (1500, 200, 524, 40, 1e-5, 3.5430),
        (12000, 500, 10762, 100, 1e-8, 9.0125),
    ],
)
def test_published_settings(asked, threshold, answered, noise, delta, expected):
    parts = [
        vote_threshold_event(noise_std=threshold, questions=asked),
        gnmax_event(noise_std=noise, answers=answered),
    ]
    assert epsilon(ComposedDpEvent(parts), delta) == pytest.approx(expected, rel=1e-4)


# Closed forms of Balle and Wang 2018, by mpmath with 40 digits: one release with sensitivity 2 at noise 2 and 4 (replacing
# one unit doubles it), and 30 epochs in which each unit comes once, at noise 10.
@pytest.mark.parametrize(
    ("mu", "delta", "expected"),
    [(1.0, 1e-5, 4.3771780956812245), (0.5, 1e-6, 2.254084650219741), (math.sqrt(30) / 10, 1e-5, 2.2070594697595025)],
)
def test_closed_form_to_many_digits(mu, delta, expected):
    assert gaussian_epsilon(mu, delta) == pytest.approx(expected, rel=1e-11)
    assert gaussian_epsilon(mu, delta) >= expected * (1 - 1e-13)


@pytest.mark.parametrize("entry", named(GOLDEN["gdp_calibration"]))
def test_noise_for_a_target(entry):
    mu = gaussian_mu(entry["eps"], entry["delta"])
    assert mu == pytest.approx(entry["mu"], rel=1e-8)
    assert math.sqrt(2 * entry["queries"]) / mu == pytest.approx(entry["sigma"], rel=1e-8)


@pytest.mark.parametrize("entry", named(GOLDEN["multiplicity"]))
def test_a_patient_in_several_teachers(entry):
    event = gnmax_event(
        noise_std=entry["sigma"], answers=entry["queries"], teachers_per_patient=entry["max_teachers_per_patient"]
    )
    assert epsilon(event, 1e-5) == pytest.approx(entry["eps"], rel=1e-6)


@pytest.mark.parametrize("entry", named(GOLDEN["lnmax_data_independent_pld"]))
def test_lnmax_without_looking_at_votes(entry):
    event = lnmax_event(noise_scale=entry["b"], answers=entry["queries"])
    assert epsilon(event, entry["delta"]) == pytest.approx(entry["eps"], rel=entry["rtol"])


def test_the_blog_post_s_setting():
    entry = GOLDEN["pysyft_blog"]
    # What the post computed: one row of counts, 163 times, at Laplace noise of scale 10.
    pure, moments = 2 / 10, np.arange(1, 9)
    log_moments = 163 * moments * np.minimum(pure**2 * (moments + 1) / 2, pure)
    assert np.min((log_moments + math.log(1e5)) / moments) == pytest.approx(entry["published_eps"], rel=1e-9)
    assert epsilon(lnmax_event(noise_scale=10, answers=163), 1e-5) == pytest.approx(8.5859, rel=1e-3)


@given(mu=st.floats(1e-3, 50), delta=st.floats(1e-12, 0.3))
def test_closed_form_is_an_upper_bound_and_no_looser_than_rounding(mu, delta):
    found = gaussian_epsilon(mu, delta)
    assert gaussian_delta(mu, found) <= delta * (1 + 1e-9)
    if found > 0:
        assert gaussian_delta(mu, found * (1 - 1e-6)) > delta * (1 - 1e-9)
        assert gaussian_mu(found, delta) == pytest.approx(mu, rel=1e-6)


@given(epsilon=st.floats(-13, 300).map(lambda x: 10**x), delta=st.floats(-20, -1).map(lambda x: 10**x))
def test_mu_for_a_target_keeps_it_however_odd_it_is(epsilon, delta):
    assert gaussian_delta(gaussian_mu(epsilon, delta), epsilon) <= delta


@given(
    st.lists(st.integers(0, 60), min_size=2, max_size=6),
    st.floats(0.3, 200),
    st.integers(0, 5),
    st.integers(0, 5),
)
def test_data_dependent_costs_bound_the_true_divergence_and_never_exceed_the_independent(counts, noise, lost, gained):
    lost, gained = lost % len(counts), gained % len(counts)
    if counts[lost] == 0 or sum(counts) < 2:
        return
    neighbour = list(counts)
    neighbour[lost] -= 1
    neighbour[gained] += 1
    here, there = argmax_law(counts, noise), argmax_law(neighbour, noise)
    orders = np.array([1.5, 2.0, 4.0, 8.0, 16.0])
    log_q = gnmax_log_q([counts], noise)
    bound = gnmax_rdp(log_q, noise, orders)[0]
    assert np.all(bound <= orders / noise**2 * (1 + 1e-12))
    rest = 1 - here[int(np.argmax(counts))]
    assert math.exp(log_q[0]) >= rest * (1 - 1e-6) - 1e-9
    for order, value in zip(orders, bound, strict=True):
        assert renyi(here, there, order) <= value * (1 + 1e-6) + 1e-9


def argmax_law(counts, noise):
    """Chances of each class under GNMax, by quadrature."""
    grid = np.linspace(-9, 9, 4001)
    weights = norm.pdf(grid) * (grid[1] - grid[0])
    chances = []
    for index, count in enumerate(counts):
        others = np.delete(np.array(counts, float), index)
        chances.append(np.sum(weights * np.prod(ndtr((count - others)[:, None] / noise + grid), axis=0)))
    return np.array(chances) / np.sum(chances)


def renyi(p, q, order):
    # Chances that drown in the quadrature are left out: the comparison has room for them.
    seen = (p > 1e-10) & (q > 1e-10)
    return np.log(np.sum(p[seen] ** order * q[seen] ** (1 - order))) / (order - 1)


@given(st.floats(0.05, 4), st.floats(0.05, 4), st.floats(0, 8))
def test_laplace_shifts_spread_over_two_counts_cost_less_than_over_one(first, second, at):
    # What lnmax_event rests on for patients in several teachers; see its docstring.
    both, one = laplace_delta_of_two(first, second, at), max(0.0, -math.expm1((at - first - second) / 2))
    assert both <= one + 1e-6


def laplace_delta_of_two(first, second, at):
    x = (first + second - at) / 2
    if x <= 0:
        return 0.0
    return 1 - math.exp(-x) * (1 + min(x, first, second) / 2)


def test_two_laplace_counts_in_closed_form():
    # The closed form against a sum over a grid.
    step = 0.004
    grid = np.arange(-16, 18, step) + step / 2
    law = 0.5 * np.exp(-np.abs(grid)) * step
    for first, second, at in [(1.0, 1.0, 0.5), (2.0, 0.5, 0.3), (2.0, 0.5, 1.7), (0.3, 0.9, 1.1)]:
        moved = [0.5 * np.exp(-np.abs(grid - shift)) * step for shift in (first, second)]
        found = np.maximum(0, np.outer(law, law) - math.exp(at) * np.outer(*moved)).sum()
        assert laplace_delta_of_two(first, second, at) == pytest.approx(found, abs=2e-4)


@given(st.lists(st.integers(0, 12), min_size=2, max_size=4).filter(lambda counts: sum(counts) >= 2), st.integers(3, 9))
def test_local_sensitivity_bounds_all_neighbours(counts, noise):
    order, teachers = 4.0, sum(counts)
    try:
        local = gnmax_local_sensitivity([counts], teachers, noise, order)[0, 0]
    except ValueError:
        return
    here = gnmax_rdp(gnmax_log_q([counts], noise), noise, order)[0, 0]
    for lost in range(len(counts)):
        for gained in range(len(counts)):
            if counts[lost] and lost != gained:
                moved = list(counts)
                moved[lost] -= 1
                moved[gained] += 1
                there = gnmax_rdp(gnmax_log_q([moved], noise), noise, order)[0, 0]
                assert abs(there - here) <= local * (1 + 1e-9) + 1e-15


def test_smooth_sensitivity_of_several_thresholds_covers_all_that_is_near():
    # Ten queries just above the threshold and ten far below it: a few teachers away, the former are at their worst.
    teachers, threshold, noise, order, beta = 100, 80, 5.0, 8.0, 0.01
    counts = np.array([82] * 10 + [40] * 10)
    claimed = smooth_sensitivity(threshold_local_sensitivity(counts, teachers, threshold, noise, order), beta)
    curve = threshold_rdp(threshold_log_probability(np.arange(teachers + 1), threshold, noise), noise, [order])[:, 0]

    def one_step(values):
        return sum(
            max(abs(curve[v] - curve[max(v - 1, 0)]), abs(curve[v] - curve[min(v + 1, teachers)])) for v in values
        )

    for distance in range(45):
        for moved in range(-distance, distance + 1):
            near = np.concatenate([counts[:10] + moved, counts[10:] + distance])
            assert math.exp(-beta * distance) * one_step(np.clip(near, 0, teachers)) <= claimed * (1 + 1e-9)


@pytest.mark.parametrize("noise", [0.1, 1.0, 1e6])
def test_unanimous_votes_never_crash(noise):
    log_q = gnmax_log_q([[500, 0], [0, 0]], noise)
    assert np.all(np.isfinite(gnmax_rdp(log_q, noise, ORDERS)))
    assert np.all(gnmax_rdp(log_q, noise, ORDERS) >= 0)
    assert np.all(np.isfinite(lnmax_rdp(lnmax_log_q([[500, 0]], noise), noise, ORDERS)))


@pytest.mark.parametrize(
    ("votes", "teachers", "message"),
    [
        ([[3, 2], [4, 2]], 5, "query 1 add up to 6, but 5 teachers"),
        ([[3.5, 1.5]], None, "no whole numbers"),
        ([[math.nan, 1]], None, "no whole numbers"),
        ([[-1, 6]], 5, "below 0"),
        ([[5], [5]], 5, "two classes"),
        ([3, 2], 5, "must be \\(queries, classes\\)"),
    ],
)
def test_votes_that_are_no_votes(votes, teachers, message):
    with pytest.raises(ValueError, match=message):
        checked_votes(votes, teachers)


def test_values_out_of_range():
    for noise in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="noise_std is"):
            gnmax_log_q([[3, 2]], noise)
        with pytest.raises(ValueError, match="noise_scale is"):
            lnmax_log_q([[3, 2]], noise)
    with pytest.raises(ValueError, match="above 1"):
        gnmax_rdp(np.array([-1.0]), 1.0, [1.0])
    with pytest.raises(ValueError, match="logarithm of a probability"):
        gnmax_rdp(np.array([0.5]), 1.0, [2.0])
    with pytest.raises(ValueError, match="between 1 and"):
        published_smooth_release_rdp(32.0, 0.05, 10.0)
    with pytest.raises(ValueError, match="Choose a smaller beta"):
        smooth_release_rdp(32.0, 0.05, 10.0)
    with pytest.raises(ValueError, match="3 teachers for 4 classes"):
        gnmax_local_sensitivity([[3, 0, 0, 0]], 3, 20, 4.0)
    with pytest.raises(ValueError, match="C5 or C6"):
        gnmax_local_sensitivity([[90, 10, 0, 0, 0, 0, 0, 0, 0, 0]], 100, 20, 25.0)
    with pytest.raises(ValueError, match="largest holds"):
        threshold_local_sensitivity([101], 100, 60, 10, 4.0)
