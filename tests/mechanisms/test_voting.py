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

"""Votes: what comes out has the exact law, the events bound what it tells, and bad votes are refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from dp_accounting.dp_event import GaussianDpEvent, LaplaceDpEvent, SelfComposedDpEvent
from scipy import stats

from monai_privacy.accounting import epsilon
from monai_privacy.mechanisms.confident_voting import ConfidentGNMax, InteractiveGNMax
from monai_privacy.mechanisms.noise import InsecureNoise, SystemNoise
from monai_privacy.mechanisms.voting import (
    ABSTAINED,
    GNMax,
    LabelVoting,
    LNMax,
    NoisyCount,
    limit_positives,
    require_votes,
)

DRAWS = 200_000
# Two-sided, with a chance of less than 1e-6 that a right mechanism fails in any of the comparisons here.
FALSE_ALARM = 1e-9


def agrees(successes: int, chance: float, draws: int = DRAWS) -> bool:
    return stats.binomtest(successes, draws, chance).pvalue > FALSE_ALARM


def repeated(row: list[int], draws: int = DRAWS) -> torch.Tensor:
    return torch.tensor([row]).expand(draws, -1)


def chance_of_most(counts: list[int], index: int, law: stats.rv_continuous, scale: float) -> float:
    """Pr[count ``index`` is the largest after noise], by quadrature."""
    grid = np.linspace(-60 * scale, 60 * scale, 400_001)
    others = [law.cdf(grid + counts[index] - count, scale=scale) for i, count in enumerate(counts) if i != index]
    return float(np.trapezoid(law.pdf(grid, scale=scale) * np.prod(others, axis=0), grid))


@pytest.mark.parametrize("counts", [[30, 20], [12, 12, 26], [50, 0], [17, 16, 17]])
@pytest.mark.parametrize(
    ("mechanism", "wrong", "law"),
    [
        (GNMax(noise_std=15.0), GNMax(noise_std=16.5), stats.norm),
        (LNMax(noise_scale=12.0), LNMax(noise_scale=13.5), stats.laplace),
    ],
)
def test_the_most_voted_class_comes_out_as_often_as_the_law_says(mechanism, wrong, law, counts):
    scale = mechanism.noise_std if isinstance(mechanism, GNMax) else mechanism.noise_scale
    noise = InsecureNoise(7)
    found = mechanism.answer(repeated(counts), sum(counts), noise).bincount(minlength=len(counts))
    other = wrong.answer(repeated(counts), sum(counts), noise).bincount(minlength=len(counts))
    chances = [chance_of_most(counts, index, law, scale) for index in range(len(counts))]
    assert sum(chances) == pytest.approx(1, abs=1e-6)
    assert all(agrees(int(n), chance) for n, chance in zip(found, chances, strict=True))
    if max(chances) - min(chances) > 0.2:  # nearly equal chances hardly depend on the noise
        assert not all(agrees(int(n), chance) for n, chance in zip(other, chances, strict=True))


def test_a_noisy_count_abstains_and_errs_as_the_law_says():
    mechanism = NoisyCount(noise_std=9.0, abstain_halfwidth=5.0)
    labels = mechanism.answer(repeated([44, 56]), 100, InsecureNoise(3))
    law = stats.norm(56, 9)
    for label, chance in [(1, law.sf(55)), (0, law.cdf(45)), (ABSTAINED, law.cdf(55) - law.cdf(45))]:
        assert agrees(int((labels == label).sum()), chance)
        assert not agrees(int((labels == label).sum()), stats.norm(56, 11).sf(55) if label == 1 else 0.9 * chance)


def test_a_noisy_count_costs_and_errs_as_gnmax_of_twice_the_variance():
    one, other = NoisyCount(noise_std=10.0), GNMax(noise_std=10 * math.sqrt(2))
    event = [SelfComposedDpEvent(m.answer_event, 50) for m in (one, other)]
    assert epsilon(event[0], 1e-5) == pytest.approx(epsilon(event[1], 1e-5), rel=1e-9)
    chance = stats.norm.cdf(12 / (10 * 2))
    labels = one.answer(repeated([56 - 12, 56]), 100, InsecureNoise(5))
    assert agrees(int(labels.sum()), stats.norm.sf((50 - 56) / 10))
    labels = other.answer(repeated([44, 56]), 100, InsecureNoise(5))
    assert agrees(int(labels.sum()), chance)


def test_confident_answers_as_often_as_the_law_says():
    mechanism = ConfidentGNMax(threshold=60, threshold_noise_std=12.0, noise_std=5.0)
    votes = repeated([55, 45])
    passed = mechanism.ask(votes, InsecureNoise(1))
    assert agrees(int(passed.sum()), stats.norm.sf((60 - 55) / 12))
    wrong = ConfidentGNMax(threshold=60, threshold_noise_std=13.0, noise_std=5.0).ask(votes, InsecureNoise(1))
    assert not agrees(int(wrong.sum()), stats.norm.sf((60 - 55) / 12))
    labels = mechanism.answer(votes, 100, InsecureNoise(2))
    assert agrees(int((labels == 0).sum()), stats.norm.cdf(10 / (5 * math.sqrt(2))))


def test_interactive_asks_where_the_student_is_contradicted():
    student = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    mechanism = InteractiveGNMax(30, 4.0, 4.0, student_probabilities=student)
    votes = torch.tensor([[90, 10], [90, 10]])
    mechanism.check(votes, 100)
    assert mechanism.ask(votes, InsecureNoise(1)).tolist() == [False, True]
    with pytest.raises(ValueError, match="same queries"):
        mechanism.check(votes[:1], 100)
    with pytest.raises(ValueError, match="adding up to 1"):
        InteractiveGNMax(30, 4.0, 4.0, student_probabilities=torch.tensor([[0.5, 0.4]]))
    # Each query by itself, with a law of its own.
    many = InteractiveGNMax(10, 8.0, 4.0, student_probabilities=torch.tensor([[0.8, 0.2]]).expand(DRAWS, -1))
    assert agrees(int(many.ask(repeated([86, 14]), InsecureNoise(4)).sum()), stats.norm.sf((10 - 6) / 8))


def test_label_voting_gives_noisy_majorities():
    mechanism = LabelVoting(noise_std=8.0, num_labels=3, most_positives=2)
    labels = mechanism.answer(repeated([60, 45, 5]), 100, InsecureNoise(2))
    for column, count in enumerate((60, 45, 5)):
        assert agrees(int(labels[:, column].sum()), stats.norm.sf((50 - count) / 8))


def test_a_teacher_says_yes_to_its_surest_labels_alone():
    scores = torch.tensor([[0.9, 0.6, 0.7, 0.1], [0.4, 0.2, 0.1, 0.3]])
    assert limit_positives(scores, 0.5, 2).tolist() == [[1, 0, 1, 0], [0, 0, 0, 0]]
    assert limit_positives(scores, 0.5, 9).tolist() == [[1, 1, 1, 0], [0, 0, 0, 0]]
    with pytest.raises(ValueError, match="not finite"):
        limit_positives(torch.tensor([[math.nan, 0.2]]), 0.5, 1)


@pytest.mark.parametrize("teachers", [1, 3])
def test_events_are_those_of_what_one_patient_can_change(teachers):
    one = GNMax(noise_std=40.0, teachers_per_patient=teachers)
    assert one.answer_event == GaussianDpEvent(40 / (math.sqrt(2) * teachers))
    assert one.question_event is None
    assert LNMax(40.0, teachers).answer_event == SelfComposedDpEvent(LaplaceDpEvent(40 / teachers), 2)
    assert NoisyCount(40.0, teachers_per_patient=teachers).answer_event == GaussianDpEvent(40 / teachers)
    both = ConfidentGNMax(200, 150.0, 40.0, teachers)
    assert both.question_event == GaussianDpEvent(150 / teachers)
    assert both.answer_event == one.answer_event
    # Two vectors of two ones each, apart everywhere: 2 in L2; of a third label there are three ones at most.
    few = LabelVoting(40.0, num_labels=14, most_positives=2, teachers_per_patient=teachers)
    assert few.answer_event == GaussianDpEvent(40 / (2 * teachers))
    assert LabelVoting(40.0, 3, 2, teachers).answer_event == GaussianDpEvent(40 / (math.sqrt(3) * teachers))


class AQuarterOfTheNoise:
    """A mechanism broken on purpose."""

    is_secret = False

    def __init__(self, seed: int) -> None:
        self._noise = InsecureNoise(seed)

    def add_gaussian(self, tensors, standard_deviation):
        return self._noise.add_gaussian(tensors, standard_deviation / 4)


@pytest.mark.parametrize(
    ("mechanism", "queries"),
    [(GNMax(noise_std=2.0), 1), (LNMax(noise_scale=2.0), 1), (NoisyCount(noise_std=1.5), 1), (GNMax(noise_std=5.0), 4)],
)
def test_no_attack_on_neighbouring_votes_beats_the_claim(mechanism, queries):
    event = SelfComposedDpEvent(mechanism.answer_event, queries)
    delta = 1e-3
    claim = epsilon(event, delta)
    assert lower_bound(mechanism, queries, InsecureNoise, delta) <= claim
    if isinstance(mechanism, GNMax):
        assert lower_bound(mechanism, queries, AQuarterOfTheNoise, delta) > claim


def lower_bound(mechanism, queries, source, delta):
    """ε that an attacker shows, who sees the labels of all queries: Clopper and Pearson, at 1e-7 a side."""
    draws = 400_000
    # Close votes, one teacher changed: an answer is told from its opposite most easily around a tie of few votes.
    here, there = torch.tensor([[6, 4]]), torch.tensor([[5, 5]])
    best = 0.0
    for votes, other in ((here, there), (there, here)):
        guesses = []
        for row, seed in ((votes, 11), (other, 12)):
            noise = source(seed)
            labels = mechanism.answer(row.expand(draws * queries, -1), 10, noise).reshape(draws, queries)
            guesses.append(((labels == 1).all(dim=1).sum().item(), (labels == 0).all(dim=1).sum().item()))
        for hits, misses in zip(*guesses, strict=True):
            low = stats.beta.ppf(1e-7, misses, draws - misses + 1)
            high = stats.beta.ppf(1 - 1e-7, hits + 1, draws - hits)
            best = max(best, math.log((low - delta) / high)) if low > delta else best
    return best


@pytest.mark.parametrize(
    ("votes", "message"),
    [
        (torch.tensor([[3, 2], [4, 2]]), "votes of 1 of 2 queries do not add up to 5 teachers"),
        (torch.tensor([[3.0, 2.0]]), "torch.float32, but they must be whole numbers"),
        (torch.tensor([[float("nan"), 2.0]]), "whole numbers"),
        (torch.tensor([[True, False]]), "whole numbers"),
        (torch.tensor([[6, -1]]), "below 0 or above the number of teachers, 5"),
        (torch.tensor([[5], [5]]), "2 classes or more"),
        (torch.tensor([3, 2]), "must be \\(queries, classes\\)"),
    ],
)
def test_what_is_no_histogram_is_refused(votes, message):
    with pytest.raises(ValueError, match=message):
        require_votes(votes, 5)
    with pytest.raises(ValueError, match=message):
        GNMax(3.0).check(votes, 5)


def test_what_a_mechanism_cannot_count_is_refused():
    with pytest.raises(ValueError, match="3 classes, but a noisy count"):
        NoisyCount(3.0).check(torch.tensor([[3, 1, 1]]), 5)
    with pytest.raises(ValueError, match="more than 5 teachers with 1 positives"):
        LabelVoting(3.0, 3, 1).check(torch.tensor([[3, 2, 1]]), 5)
    with pytest.raises(ValueError, match="2 labels, but the mechanism was made for 3"):
        LabelVoting(3.0, 3, 1).check(torch.tensor([[3, 2]]), 5)
    LabelVoting(3.0, 3, 1).check(torch.tensor([[0, 0, 0]]), 5)


@pytest.mark.parametrize("bad", [0, -1.0, math.nan, math.inf, "much"])
def test_noise_that_is_none_is_refused(bad):
    for make in (
        GNMax,
        LNMax,
        NoisyCount,
        lambda noise: ConfidentGNMax(10, noise, 5.0),
        lambda noise: ConfidentGNMax(10, 5.0, noise),
        lambda noise: LabelVoting(noise, 3, 1),
    ):
        with pytest.raises(ValueError, match="noise_s"):
            make(bad)
    with pytest.raises(ValueError, match="abstain_halfwidth"):
        NoisyCount(1.0, abstain_halfwidth=-1)


def test_the_default_noise_is_secret_and_new_each_time():
    votes = repeated([50, 50], 200)
    torch.manual_seed(0)
    first = GNMax(5.0).answer(votes, 100, SystemNoise())
    torch.manual_seed(0)
    assert not torch.equal(first, GNMax(5.0).answer(votes, 100, SystemNoise()))
