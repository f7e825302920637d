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

"""The draw is what the accountant assumes: every patient whole, on a coin of their own, that nobody can guess."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.utils import set_determinism
from scipy import stats

from monai_privacy.data import PoissonPatientSampler

FALSE_ALARM = 1e-7
PATIENTS = 400
RATE = 0.1
STEPS = 3000


def sizes_in_patients(**options) -> np.ndarray:
    sampler = PoissonPatientSampler(range(PATIENTS), sample_rate=RATE, steps=STEPS, **options)
    return np.array([len(rows) for rows in sampler])


def dispersion_p_value(sizes: np.ndarray) -> float:
    """Two-sided p-value of the test that the sizes vary like Binomial(PATIENTS, RATE)."""
    statistic = float(((sizes - PATIENTS * RATE) ** 2).sum() / (PATIENTS * RATE * (1 - RATE)))
    return 2 * min(stats.chi2.cdf(statistic, len(sizes)), stats.chi2.sf(statistic, len(sizes)))


def test_batch_sizes_have_the_variance_of_a_poisson_draw_and_a_shuffled_loader_does_not():
    assert dispersion_p_value(sizes_in_patients()) > FALSE_ALARM
    assert dispersion_p_value(np.full(STEPS, PATIENTS * RATE)) < FALSE_ALARM


def test_each_patient_is_drawn_at_the_rate():
    counts = np.bincount(
        [row for rows in PoissonPatientSampler(range(50), sample_rate=0.3, steps=4000) for row in rows]
    )
    assert len(counts) == 50
    for count in counts:
        assert stats.binomtest(int(count), 4000, 0.3).pvalue > FALSE_ALARM / 50
    # All together: a rate wrong by a tenth shows here, and hardly in one patient.
    assert stats.binomtest(int(counts.sum()), 50 * 4000, 0.3).pvalue > FALSE_ALARM
    assert stats.binomtest(int(counts.sum()), 50 * 4000, 0.28).pvalue < FALSE_ALARM


def test_coins_are_independent_between_patients_and_steps():
    draws = np.zeros((4000, 8))
    for step, rows in enumerate(PoissonPatientSampler(range(8), sample_rate=0.5, steps=4000)):
        draws[step, rows] = 1
    together = draws - 0.5
    for one in range(8):
        assert abs((together[1:, one] * together[:-1, one]).sum()) < 6 * 0.25 * math.sqrt(4000)
        for other in range(one):
            assert abs((together[:, one] * together[:, other]).sum()) < 6 * 0.25 * math.sqrt(4000)


def test_a_patient_comes_whole_or_not_at_all():
    ids = ["a", "b", "a", "c", "a", "b"]
    rows_of = {"a": [0, 2, 4], "b": [1, 5], "c": [3]}
    for drawn in PoissonPatientSampler(ids, sample_rate=0.5, steps=200):
        expected = [row for patient in "abc" if set(rows_of[patient]) & set(drawn) for row in rows_of[patient]]
        assert drawn == expected


def test_draws_may_be_empty():
    assert any(not rows for rows in PoissonPatientSampler(["a"], sample_rate=0.5, steps=100))


def test_rate_one_draws_everybody():
    assert list(PoissonPatientSampler("abc", sample_rate=1, steps=2)) == [[0, 1, 2], [0, 1, 2]]


def test_no_seed_reaches_the_draw():
    def draws() -> list[list[int]]:
        set_determinism(seed=7)
        torch.manual_seed(7)
        np.random.seed(7)
        return list(PoissonPatientSampler(range(200), sample_rate=0.5, steps=3))

    try:
        assert draws() != draws()
    finally:
        set_determinism(seed=None)


def test_an_insecure_seed_repeats_the_draw():
    first, second = (list(PoissonPatientSampler(range(50), sample_rate=0.3, steps=5, insecure_seed=1)) for _ in "12")
    assert first == second
    assert dispersion_p_value(sizes_in_patients(insecure_seed=1)) > FALSE_ALARM


def test_processes_share_the_patients():
    shares = [PoissonPatientSampler(range(10), sample_rate=1, steps=1, rank=rank, world_size=3) for rank in range(3)]
    rows = [row for share in shares for drawn in share for row in drawn]
    assert sorted(rows) == list(range(10))
    assert [share.num_patients for share in shares] == [4, 3, 3]


@pytest.mark.parametrize("rate", [0, -0.1, 1.01, math.nan, math.inf])
def test_refuses_rates_that_are_no_probability(rate):
    with pytest.raises(ValueError, match="sample_rate is"):
        PoissonPatientSampler("abc", sample_rate=rate, steps=1)


def test_length_is_the_number_of_draws():
    sampler = PoissonPatientSampler("abc", sample_rate=0.5, steps=4)
    assert len(sampler) == len(list(sampler)) == 4
