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

"""What labels cost at the votes there were: charged, published with noise once, an upper bound, and nothing else leaves."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from dp_accounting.dp_event import SelfComposedDpEvent
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from monai_privacy.accounting import (
    PrivacyBudget,
    PrivacyBudgetError,
    epsilon,
    epsilon_bounds,
    gaussian_event,
    smooth_release_event,
)
from monai_privacy.accounting.accountants import rdp_curve
from monai_privacy.accounting.divergences import ORDERS
from monai_privacy.accounting.events import composed
from monai_privacy.accounting.ledger import PrivacyLedger
from monai_privacy.accounting.ledger_file import LedgerError
from monai_privacy.accounting.vote_costs import gnmax_log_q, gnmax_rdp, threshold_log_probability, threshold_rdp
from monai_privacy.accounting.vote_sensitivity import smooth_release_limit, smooth_release_rdp
from monai_privacy.mechanisms.confident_voting import ConfidentGNMax, InteractiveGNMax
from monai_privacy.mechanisms.noise import InsecureNoise
from monai_privacy.mechanisms.voting import GNMax, LNMax
from monai_privacy.pate.labelling import VoteLabeller
from monai_privacy.pate.vote_bound import PrivateVoteCost, VoteBoundPlan, plan_vote_bound, private_vote_cost
from monai_privacy.pate.vote_bound_release import VoteBound, _draw, release_vote_bound
from monai_privacy.report import PrivacyReport

TEACHERS, DELTA = 250, 1e-5
VOTES = torch.tensor([[240 + row % 11, 10 - row % 11] for row in range(300)])
QUERIES = [f"query {row}" for row in range(300)]
CONFIDENT = ConfidentGNMax(200, 60.0, 25.0)


class NoNoise:
    """In place of noise: shows what is published, and how much noise it would have had."""

    is_secret = True

    def __init__(self, look=lambda: None):
        self.deviations = []
        self._look = look

    def add_gaussian(self, tensors, standard_deviation):
        self._look()
        self.deviations.append(standard_deviation)
        return list(tensors)


class StoppedError(Exception):
    pass


def stop():
    raise StoppedError


def answered(folder, mechanism=None, *, budget=None, votes=VOTES, **changes):
    """A ledger with labels, and what release_vote_bound needs."""
    book = PrivacyLedger(folder / "ledger.jsonl", budget=budget)
    settings = {"answers": folder / "answers.jsonl", "num_teachers": TEACHERS, "max_queries": 300, "delta": DELTA}
    VoteLabeller(mechanism or GNMax(20.0), book, **settings | changes).label(QUERIES[: len(votes)], votes)
    return book, (QUERIES[: len(votes)], votes, book, folder / "answers.jsonl", folder / "bound.json")


@pytest.mark.parametrize("mechanism", [GNMax(20.0), CONFIDENT])
def test_it_is_charged_published_once_and_an_upper_bound(tmp_path, mechanism):
    book, given_ = answered(tmp_path, mechanism)
    labels, before = book.epsilon(DELTA), len(book.entries)
    found = release_vote_bound(*given_, agreement=0.97)
    entry = book.entries[-1]
    assert (len(book.entries), entry.entry_id, entry.steps, entry.state) == (before + 1, found.entry, 1, "committed")
    assert labels < book.epsilon(DELTA) < labels + epsilon(found.plan.event, DELTA / 2) + 0.1
    private = private_vote_cost(found.plan, mechanism, VOTES, TEACHERS)
    assert private.rdp <= found.rdp < found.independent_rdp
    assert found.epsilon < found.epsilon_with_release < labels
    # The same file again: the same bound at no cost.
    assert release_vote_bound(*given_, agreement=0.97) == found
    assert len(book.entries) == before + 1
    told = json.loads((tmp_path / "bound.json").read_text(encoding="utf-8"))
    assert (told["epsilon"], told["epsilon_with_release"]) == (found.epsilon, found.epsilon_with_release)
    report = PrivacyReport.from_ledger(tmp_path / "ledger.jsonl")
    assert report.entries[-1].mechanism == "a number with Gaussian noise in proportion to its smooth sensitivity"
    assert report.epsilon == pytest.approx(book.epsilon(DELTA))


def test_the_private_number_is_the_papers_and_does_not_show_itself():
    plan = plan_vote_bound(GNMax(20.0), num_teachers=TEACHERS, num_queries=300, num_classes=2, delta=DELTA)
    found = private_vote_cost(plan, GNMax(20.0), VOTES, TEACHERS)
    answers = gnmax_rdp(gnmax_log_q(VOTES.numpy(), 20.0), 20.0, [plan.order]).sum()
    assert found.rdp == pytest.approx(answers, rel=1e-12)
    assert repr(found) == str(found) == "PrivateVoteCost()"
    confident = private_vote_cost(plan, ConfidentGNMax(150, 20.0, 20.0), VOTES, TEACHERS)
    passing = threshold_log_probability(VOTES.amax(1).numpy(), 150, 20.0)
    # Each query as if it had been answered: whether it was came of the noise.
    assert confident.rdp == pytest.approx(answers + threshold_rdp(passing, 20.0, [plan.order]).sum(), rel=1e-12)
    assert confident.smooth_sensitivity > found.smooth_sensitivity


def test_the_documentations_example_has_its_numbers():
    plan = plan_vote_bound(GNMax(100.0), num_teachers=1000, num_queries=1000, num_classes=2, delta=1e-5, agreement=0.95)
    labels = SelfComposedDpEvent(GNMax(100.0).answer_event, 1000)
    together = composed([labels, plan.event])
    told = (plan.expected_epsilon, plan.independent_epsilon, epsilon(labels, 1e-5), epsilon(together, 1e-5))
    assert [f"{value:.2f}" for value in told] == ["0.59", "1.76", "1.76", "1.95"]
    text = (Path(__file__).parents[2] / "docs" / "pate.md").read_text(encoding="utf-8")
    assert "expects ε = 0.59 where 1.76 holds whatever the votes" in text
    assert "goes up by it, to 1.95 in that example" in text


def test_noise_is_in_proportion_to_the_sensitivities(tmp_path):
    _, given_ = answered(tmp_path)
    noise = NoNoise()
    found = release_vote_bound(*given_, agreement=0.97, noise=noise)
    private = private_vote_cost(found.plan, GNMax(20.0), VOTES, TEACHERS)
    plan = found.plan
    assert noise.deviations == pytest.approx(
        [private.smooth_sensitivity * plan.noise_multiplier, plan.beta * plan.sensitivity_noise_multiplier]
    )
    assert found.noisy_rdp == pytest.approx(private.rdp)
    assert found.noisy_log_sensitivity == pytest.approx(math.log(private.smooth_sensitivity))


def test_published_numbers_follow_their_law_and_miss_as_often_as_said(tmp_path):
    plan = VoteBoundPlan(8.0, 0.02, 6.0, 4.0, DELTA, miss_probability=0.2)
    private = private_vote_cost(plan, GNMax(20.0), VOTES, TEACHERS)
    noise, count = InsecureNoise(7), 4000
    drawn = [VoteBound(plan, *_draw(plan, private, noise), math.inf, "", "") for _ in range(count)]
    for values, mean, std in (
        ([one.noisy_rdp for one in drawn], private.rdp, 6 * private.smooth_sensitivity),
        ([one.noisy_log_sensitivity for one in drawn], math.log(private.smooth_sensitivity), 0.08),
    ):
        assert stats.kstest(values, stats.norm(mean, std).cdf).pvalue > 1e-7
        # The same test sees a quarter more of noise.
        assert stats.kstest(values, stats.norm(mean, std * 1.25).cdf).pvalue < 1e-7
    misses = sum(one.rdp < private.rdp for one in drawn)
    assert misses <= stats.binom.isf(1e-7, count, 0.2)
    # Without the allowance for noise, half of them would be too small.
    assert sum(one.noisy_rdp < private.rdp for one in drawn) > stats.binom.isf(1e-7, count, 0.2)


def divergence(order, first, second):
    """Rényi divergence of two normal laws, each (mean, standard deviation)."""
    (m, s), (n, t) = first, second
    mixed = order * t**2 + (1 - order) * s**2
    assert mixed > 0
    return math.log(t / s) + math.log(t**2 / mixed) / (2 * (order - 1)) + order * (m - n) ** 2 / (2 * mixed)


@given(
    st.lists(st.tuples(st.integers(0, 30), st.booleans()), min_size=1, max_size=5),
    st.sampled_from([(4.0, 0.02), (4.0, 0.1), (8.0, 0.01), (2.5, 0.15)]),
    st.sampled_from([GNMax(4.0), GNMax(8.0), ConfidentGNMax(20, 6.0, 8.0)]),
)
def test_a_teacher_more_changes_what_is_published_by_no_more_than_is_charged(rows, numbers, mechanism):
    plan = VoteBoundPlan(*numbers, 5.0, 6.0, DELTA)
    counts = torch.tensor([[yes, 30 - yes] for yes, _ in rows])
    moves = torch.tensor([[1, -1] if up else [-1, 1] for _, up in rows])
    there = counts + moves * ((counts + moves).amin(dim=1, keepdim=True) >= 0)
    try:
        here, near = (private_vote_cost(plan, mechanism, votes, 30) for votes in (counts, there))
    except ValueError:
        assume(False)
    for one, other in ((here, near), (near, here)):
        total = divergence(
            plan.order, (one.rdp, 5 * one.smooth_sensitivity), (other.rdp, 5 * other.smooth_sensitivity)
        ) + divergence(
            plan.order,
            (math.log(one.smooth_sensitivity), 6 * plan.beta),
            (math.log(other.smooth_sensitivity), 6 * plan.beta),
        )
        assert total <= plan.rdp * (1 + 1e-9)


def test_what_the_ledger_has_is_what_the_release_costs():
    plan = VoteBoundPlan(8.0, 0.02, 6.0, 4.0, DELTA)
    curve = rdp_curve(plan.event)
    assert curve[ORDERS.index(8.0)] == pytest.approx(plan.rdp, rel=1e-12)
    assert plan.rdp == smooth_release_rdp(8.0, 0.02, 6.0) + 8 / (2 * 4**2)
    # No distribution is known of it, and least of all a Gaussian's.
    bounds = epsilon_bounds(smooth_release_event(beta=0.02, noise_multiplier=6.0), DELTA)
    assert bounds.pld == math.inf
    assert bounds.epsilon == bounds.rdp > epsilon(gaussian_event(6.0), DELTA)
    # Infinite from 1 / (1 - e^(-2 beta)) = 25.5 on.
    assert np.isfinite(curve).tolist() == [order < 25.5 for order in ORDERS]


def test_charged_before_it_is_drawn_and_whoever_is_interrupted_pays_again(tmp_path):
    book, given_ = answered(tmp_path)
    with pytest.raises(StoppedError):
        release_vote_bound(*given_, agreement=0.97, noise=NoNoise(stop))
    assert (book.entries[-1].steps, book.entries[-1].state) == (1, "reserved")
    assert not (tmp_path / "bound.json").exists()
    found = release_vote_bound(*given_, agreement=0.97)
    assert [(one.steps, one.state) for one in book.entries[1:]] == [(1, "committed"), (1, "committed")]
    assert found.entry == book.entries[-1].entry_id


def test_what_was_set_aside_and_not_charged_is_freed(tmp_path, monkeypatch):
    book, given_ = answered(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(PrivacyLedger, "record_step", lambda *_: stop())
        with pytest.raises(StoppedError):
            release_vote_bound(*given_, agreement=0.97)
    assert (book.entries[-1].steps, book.entries[-1].state) == (0, "reserved")
    release_vote_bound(*given_, agreement=0.97)
    assert [(one.steps, one.state) for one in book.entries[1:]] == [(0, "void"), (1, "committed")]


def test_whatever_the_noise_it_is_between_nothing_and_what_holds_for_all_votes():
    plan = VoteBoundPlan(8.0, 0.02, 6.0, 4.0, DELTA)
    assert VoteBound(plan, -5.0, math.log(1e-3), 0.5, "", "").rdp == 0
    assert VoteBound(plan, 5.0, math.log(1e-3), 0.5, "", "").rdp == 0.5


def test_a_question_without_its_answer_counts(tmp_path, monkeypatch):
    book = PrivacyLedger(tmp_path / "ledger.jsonl")
    answers = tmp_path / "answers.jsonl"
    # Seven standard deviations from the threshold: every question passes.
    sure = ConfidentGNMax(60, 25.0, 25.0)
    one = VoteLabeller(sure, book, answers=answers, num_teachers=TEACHERS, max_queries=300, delta=DELTA)
    one.label(QUERIES[:299], VOTES[:299])
    with monkeypatch.context() as patched:
        patched.setattr(ConfidentGNMax, "answer", lambda *_: stop())
        with pytest.raises(StoppedError):
            one.label(QUERIES[299:], VOTES[299:])
    output = tmp_path / "bound.json"
    fewer = (QUERIES[:299], VOTES[:299], book, answers, output)
    assert_refused(book, output, fewer, "300 queries were asked, of which 299", agreement=0.97)
    release_vote_bound(QUERIES, VOTES, book, answers, output, agreement=0.97)


def test_another_ledger_or_an_older_copy_of_either_file(tmp_path):
    _, given_ = answered(tmp_path)
    queries, votes, _, answers, output = given_
    other = PrivacyLedger(tmp_path / "other.jsonl")
    with pytest.raises(LedgerError, match="another ledger"):
        release_vote_bound(queries, votes, other, answers, output, agreement=0.97)
    assert other.entries == ()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    release_vote_bound(*given_, agreement=0.97)
    output.unlink()
    after = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def put_back(name):
        for path, contents in after.items():
            path.write_bytes(before[path] if path.name.startswith(name) else contents)

    put_back("ledger")
    with pytest.raises(LedgerError, match="has no entry"):
        release_vote_bound(queries, votes, PrivacyLedger(tmp_path / "ledger.jsonl"), answers, output, agreement=0.97)
    put_back("answers")
    with pytest.raises(LedgerError, match="older copy"):
        release_vote_bound(queries, votes, PrivacyLedger(tmp_path / "ledger.jsonl"), answers, output, agreement=0.97)
    assert not output.exists()


def test_questions_with_another_threshold_than_that_on_file(tmp_path):
    book, given_ = answered(tmp_path, CONFIDENT)
    settings = {"answers": given_[3], "num_teachers": TEACHERS, "max_queries": 300, "delta": DELTA}
    one = VoteLabeller(ConfidentGNMax(200, 60.0, 25.0), book, **settings | {"answers": tmp_path / "more.jsonl"})
    one.label(QUERIES[:2], VOTES[:2], mechanism=ConfidentGNMax(245, 60.0, 25.0))
    entries = book.entries
    with pytest.raises(ValueError, match="another threshold than 200"):
        release_vote_bound(QUERIES[:2], VOTES[:2], book, tmp_path / "more.jsonl", tmp_path / "b.json", agreement=0.97)
    assert book.entries == entries


def test_a_plan_for_an_adaptive_budget_is_finite_at_its_order(tmp_path):
    book = PrivacyLedger.register(
        tmp_path / "ledger.jsonl", cohort="Lungs", budget=PrivacyBudget(9.0, DELTA), adaptive=True
    )
    settings = {"answers": tmp_path / "answers.jsonl", "num_teachers": TEACHERS, "max_queries": 300, "delta": DELTA}
    VoteLabeller(GNMax(20.0), book, **settings).label(QUERIES, VOTES)
    found = release_vote_bound(QUERIES, VOTES, book, tmp_path / "answers.jsonl", tmp_path / "b.json", agreement=0.97)
    assert found.plan.beta < smooth_release_limit(book.cohort.filter_order)
    free = {"num_teachers": TEACHERS, "num_queries": 300, "num_classes": 2, "delta": DELTA}
    assert plan_vote_bound(GNMax(20.0), **free, filter_order=63.0).beta < smooth_release_limit(63.0)
    assert plan_vote_bound(GNMax(20.0), **free).beta > smooth_release_limit(63.0)


def assert_refused(book, output, given_, match, error=ValueError, **options):
    entries = book.entries
    with pytest.raises(error, match=match):
        release_vote_bound(*given_, **options)
    assert book.entries == entries
    assert not output.exists()


def test_refused_and_nothing_charged(tmp_path):
    book, given_ = answered(tmp_path)
    queries, votes, _, answers, output = given_
    assert_refused(book, output, given_, "nothing would be gained", agreement=0.6)
    assert_refused(book, output, given_, "agreement is 1.2", agreement=1.2)
    fewer = (queries[1:], votes[1:], book, answers, output)
    assert_refused(book, output, fewer, "of which 299 are among the 299 rows", agreement=0.97)
    assert_refused(book, output, (queries, votes[1:], book, answers, output), "each once", agreement=0.97)
    other = (queries, votes + 1, book, answers, output)
    assert_refused(book, output, other, "counts below 0 or above|do not add up", agreement=0.97)
    assert_refused(book, output, given_, "other teachers", agreement=0.97, teachers="others")
    nowhere = (*given_[:4], tmp_path / "no" / "b.json")
    assert_refused(book, nowhere[-1], nowhere, "folder that exists", agreement=0.97)
    nowhere = (queries, votes, book, tmp_path / "none.jsonl", output)
    assert_refused(book, output, nowhere, "does not exist", agreement=0.97)


@pytest.mark.parametrize("mechanism", [LNMax(20.0), GNMax(20.0, teachers_per_patient=2)])
def test_a_mechanism_without_a_proof(tmp_path, mechanism):
    book, given_ = answered(tmp_path, mechanism)
    assert_refused(book, given_[-1], given_, "each patient in one teacher|answers of LNMax", agreement=0.97)
    with pytest.raises(ValueError, match="proved for GNMax and ConfidentGNMax"):
        plan_vote_bound(mechanism, num_teachers=250, num_queries=300, num_classes=2, delta=DELTA)


def test_an_interactive_mechanism_is_another_one():
    student = torch.full((300, 2), 0.5)
    with pytest.raises(ValueError, match="proved for GNMax and ConfidentGNMax"):
        private_vote_cost(
            VoteBoundPlan(8.0, 0.02, 6.0, 4.0, DELTA), InteractiveGNMax(10, 60.0, 20.0, 1, student), VOTES, TEACHERS
        )


def test_it_must_fit_the_budget(tmp_path):
    labels = epsilon(GNMax(20.0).answer_event, DELTA)
    book, given_ = answered(tmp_path, votes=VOTES[:1], max_queries=1, budget=PrivacyBudget(labels * 1.01, DELTA))
    plan = VoteBoundPlan(8.0, 0.02, 6.0, 4.0, DELTA)
    assert_refused(book, given_[-1], given_, "budget", PrivacyBudgetError, plan=plan)


def test_a_file_that_is_there(tmp_path):
    book, given_ = answered(tmp_path, max_queries=400)
    output = given_[-1]
    output.write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="is there and holds no bound"):
        release_vote_bound(*given_, agreement=0.97)
    output.unlink()
    release_vote_bound(*given_, agreement=0.97)
    VoteLabeller(GNMax(20.0), book, answers=given_[3], num_teachers=TEACHERS, max_queries=400, delta=DELTA).label(
        ["one more"], VOTES[:1]
    )
    more = ([*QUERIES, "one more"], torch.cat([VOTES, VOTES[:1]]), *given_[2:])
    entries = book.entries
    with pytest.raises(ValueError, match="a bound of other answers"):
        release_vote_bound(*more, agreement=0.97)
    assert book.entries == entries


def test_noise_that_can_be_repeated_is_no_privacy(tmp_path):
    book, given_ = answered(tmp_path)
    release_vote_bound(*given_, agreement=0.97, noise=InsecureNoise(3))
    assert book.entries[-1].not_private == ("the noise of the bound is repeatable",)


def test_the_plan_looks_at_no_vote_and_finds_the_best_of_its_grid():
    settings = {"num_teachers": 250, "num_queries": 300, "num_classes": 2, "delta": DELTA}
    found = plan_vote_bound(GNMax(20.0), **settings, agreement=0.96)
    votes = torch.tensor([[240, 10]] * 300)
    private = private_vote_cost(found, GNMax(20.0), votes, 250)
    exact = VoteBound(found, private.rdp, math.log(private.smooth_sensitivity), math.inf, "", "")
    assert exact.epsilon_with_release == pytest.approx(found.expected_epsilon)
    assert found.independent_epsilon == pytest.approx(5.5448, abs=1e-3)
    assert found.expected_epsilon < plan_vote_bound(GNMax(20.0), **settings, agreement=0.9).expected_epsilon
    with pytest.raises(ValueError, match="conditions C5 and C6"):
        plan_vote_bound(GNMax(0.5), **settings)
    with pytest.raises(ValueError, match="the bound jumps"):
        private_vote_cost(VoteBoundPlan(1.5, 0.02, 6.0, 4.0, DELTA), GNMax(0.519), torch.tensor([[21, 19]]), 40)
    with pytest.raises(ValueError, match="Choose a smaller beta"):
        VoteBoundPlan(8.0, 0.067, 6.0, 4.0, DELTA)
    assert PrivateVoteCost(1.0, 2.0).rdp == 1.0
