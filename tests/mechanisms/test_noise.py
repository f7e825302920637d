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

"""Is it Gaussian, of the right size, fresh each time, and out of reach of every seed?"""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch
from monai.utils import set_determinism
from scipy import stats

from monai_privacy.mechanisms import noise
from monai_privacy.mechanisms.noise import InsecureNoise, SystemNoise, _polar, _uniform

COUNT = 200_000
SIGMA = 1.7
# Two-sided, so that the system's own randomness fails a sound build less than once in a million runs.
FALSE_ALARM = 1e-7


def variance_p_value(sample: torch.Tensor, standard_deviation: float) -> float:
    """Two-sided p-value of the chi-squared test that ``sample`` has this standard deviation."""
    statistic = float((sample.double() / standard_deviation).square().sum())
    tail = stats.chi2.cdf(statistic, sample.numel()), stats.chi2.sf(statistic, sample.numel())
    return 2 * min(tail)


def draw(sigma: float = SIGMA, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    zeros = [torch.zeros(COUNT // 2, dtype=dtype), torch.zeros(COUNT // 20, 10, dtype=dtype)]
    return torch.cat([t.reshape(-1) for t in SystemNoise().add_gaussian(zeros, sigma)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_standard_deviation_is_sigma_and_the_same_test_fails_at_two_thirds(dtype):
    assert variance_p_value(draw(dtype=dtype), SIGMA) > FALSE_ALARM
    assert variance_p_value(draw(dtype=dtype) * (2 / 3), SIGMA) < FALSE_ALARM
    assert variance_p_value(draw(dtype=dtype), SIGMA * 0.97) < FALSE_ALARM


def test_distribution_is_gaussian():
    sample = (draw() / SIGMA).double().numpy()
    assert stats.kstest(sample, "norm").pvalue > FALSE_ALARM
    # Box-Muller makes its numbers in pairs.
    radius, cosine, sine = _polar(
        _uniform(torch.from_numpy(np.random.default_rng(0).integers(0, 1 << 63, 1 << 16))), 1.0
    )
    paired = (radius * cosine).numpy(), (radius * sine).numpy()
    assert stats.kstest(paired[0] + paired[1], stats.norm(scale=math.sqrt(2)).cdf).pvalue > FALSE_ALARM
    assert stats.pearsonr(paired[0] ** 2, paired[1] ** 2).pvalue > FALSE_ALARM
    half = len(sample) // 4
    assert stats.pearsonr(sample[:half], sample[half : 2 * half]).pvalue > FALSE_ALARM


def test_every_call_is_fresh():
    first, second = draw(), draw()
    assert not torch.equal(first, second)
    assert stats.pearsonr(first.numpy(), second.numpy()).pvalue > FALSE_ALARM


def test_no_seed_reaches_it():
    set_determinism(seed=123)
    try:
        first = SystemNoise().add_gaussian([torch.zeros(100)], 1.0)[0]
        set_determinism(seed=123)
        torch.manual_seed(0)
        second = SystemNoise().add_gaussian([torch.zeros(100)], 1.0)[0]
    finally:
        set_determinism(seed=None)
    assert not torch.equal(first, second)


def test_it_does_not_move_the_users_random_state():
    before = torch.get_rng_state()
    SystemNoise().add_gaussian([torch.zeros(100)], 1.0)
    assert torch.equal(before, torch.get_rng_state())


def test_a_cpu_generator_would_have_kept_32_bits_of_its_seed():
    """Why the noise does not come from a torch.Generator: this is the weakness that SystemNoise avoids."""
    generator = torch.Generator()
    low = torch.randn(4, generator=generator.manual_seed(5))
    high = torch.randn(4, generator=generator.manual_seed(5 + 2**32))
    assert torch.equal(low, high)


def test_adds_to_what_is_there_and_changes_nothing_in_place():
    tensors = [torch.full((1000, 3), 5.0), torch.tensor(2.0), torch.zeros(0)]
    noised = SystemNoise().add_gaussian(tensors, 1e-6)
    assert [t.shape for t in noised] == [t.shape for t in tensors]
    torch.testing.assert_close(noised[0], tensors[0], atol=1e-4, rtol=0)
    assert not torch.equal(noised[0], tensors[0])
    assert torch.equal(tensors[0], torch.full((1000, 3), 5.0))


@pytest.mark.parametrize("count", [0, 1, 7, (1 << 19) + 3])
def test_any_count(count):
    noised = SystemNoise().add_gaussian([torch.zeros(count)], 1.0)[0]
    assert noised.shape == (count,)
    assert int((noised == 0).sum()) <= 1


def test_no_two_blocks_share_noise():
    sample = SystemNoise().add_gaussian([torch.zeros(100_000, dtype=torch.float64) for _ in range(3)], 1.0)
    assert len(torch.cat(sample).unique()) == 300_000


def test_blocks_leave_out_no_coordinate_and_share_no_noise(monkeypatch):
    monkeypatch.setattr(noise, "_BLOCK", 1 << 14)
    tensors = [
        torch.zeros(40_000),
        torch.full((7, 5_001), 2.0),
        torch.zeros(1),
        torch.zeros(0),
        torch.zeros(30_000, dtype=torch.float64),
    ]
    found = SystemNoise().add_gaussian(tensors, SIGMA)
    assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in tensors]
    added = torch.cat([(one.double() - other.double()).reshape(-1) for one, other in zip(found, tensors, strict=True)])
    assert variance_p_value(added, SIGMA) > FALSE_ALARM
    assert (added != 0).all()
    assert len(torch.unique(added)) > 0.99 * len(added)
    third = len(added) // 3
    assert stats.pearsonr(added[:third].numpy(), added[third : 2 * third].numpy()).pvalue > FALSE_ALARM


def test_each_generator_has_a_key_of_its_own_from_the_operating_system(monkeypatch):
    asked = []

    def urandom(count, real=os.urandom):
        asked.append(count)
        return real(count)

    monkeypatch.setattr("monai_privacy.mechanisms.noise.os.urandom", urandom)
    SystemNoise().add_gaussian([torch.zeros(10)], 1.0)
    SystemNoise().add_gaussian([torch.zeros(10)], 1.0)
    assert asked == [16, 16]


def test_both_ends_of_the_uniform_numbers_give_finite_noise():
    ends = [0, -1]
    for first in ends:
        for second in ends:
            uniform = _uniform(torch.tensor([first, second]))
            assert ((uniform >= 1) & (uniform < 2)).all()
            radius, cosine, sine = _polar(uniform, 1.0)
            assert torch.isfinite(torch.cat([radius, cosine, sine])).all()
            assert radius <= math.sqrt(2 * 52 * math.log(2)) + 1e-12


def test_insecure_noise_repeats_and_says_so():
    assert not InsecureNoise(1).is_secret
    assert SystemNoise().is_secret
    first, second = (InsecureNoise(1).add_gaussian([torch.zeros(50)], SIGMA)[0] for _ in range(2))
    assert torch.equal(first, second)
    sample = InsecureNoise(3).add_gaussian([torch.zeros(COUNT)], SIGMA)[0]
    assert variance_p_value(sample, SIGMA) > FALSE_ALARM
    assert variance_p_value(sample * 2 / 3, SIGMA) < FALSE_ALARM


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_noise_on_cuda():
    zeros = [torch.zeros(COUNT, device="cuda")]
    first, second = (SystemNoise().add_gaussian(zeros, SIGMA)[0].cpu() for _ in range(2))
    assert variance_p_value(first, SIGMA) > FALSE_ALARM
    assert variance_p_value(first * 2 / 3, SIGMA) < FALSE_ALARM
    assert not torch.equal(first, second)
