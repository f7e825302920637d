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

import re

import pytest
import torch
from monai.data import MetaTensor

from monai_privacy.networks import FixedFeatureClassifier, RadialProfile


def images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def distance(*sizes: int) -> torch.Tensor:
    axes = [torch.arange(size, dtype=torch.float64) - (size - 1) / 2 for size in sizes]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).norm(dim=0)


@pytest.mark.parametrize("shape", [(3, 1, 20, 24, 30), (3, 2, 25, 20), (2, 1, 40)])
def test_means_over_shells(shape):
    x, away = images(*shape), distance(*shape[2:])
    width = min(shape[2:]) / 2 / 5
    expected = [
        x[:, channel][:, (away >= n * width) & (away < (n + 1) * width)].mean(1)
        for channel in range(shape[1])
        for n in range(5)
    ]
    torch.testing.assert_close(RadialProfile(shells=5)(x), torch.stack(expected, 1))


def test_a_ball_of_some_radius_is_seen_at_its_radius_and_not_beyond():
    away = distance(32, 32, 32)
    found = RadialProfile(shells=8)((away < 8).float()[None, None])[0]
    torch.testing.assert_close(found, torch.tensor([1.0] * 4 + [0.0] * 4))
    assert RadialProfile(shells=2, radius=8.0)((away < 8).float()[None, None]).tolist() == [[1.0, 1.0]]


def test_turned_and_mirrored_it_is_the_same():
    x = images(2, 1, 16, 16, 16)
    found = RadialProfile(shells=6)(x)
    torch.testing.assert_close(RadialProfile(shells=6)(x.transpose(2, 4).flip(3)), found)


def test_an_image_s_features_are_its_own_and_nothing_flows_back():
    x = images(4, 1, 16, 16).requires_grad_()
    found = RadialProfile(shells=4)(x)
    assert not found.requires_grad
    torch.testing.assert_close(found[2:3], RadialProfile(shells=4)(x[2:3]))
    assert type(RadialProfile(shells=4)(MetaTensor(x.detach()))) is torch.Tensor
    assert RadialProfile(shells=4)((10 * x).byte()).dtype == torch.float32


def test_in_a_classifier_of_volumes():
    network = FixedFeatureClassifier(in_shape=(1, 16, 16, 16), num_classes=3, features=RadialProfile(shells=5))
    assert [tuple(parameter.shape) for parameter in network.parameters()] == [(3, 5), (3,)]
    assert network(torch.rand(2, 1, 16, 16, 16)).shape == (2, 3)
    assert repr(RadialProfile(5, 7.5)) == "RadialProfile(shells=5, radius=7.5)"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: RadialProfile(shells=0), "shells is 0"),
        (lambda: RadialProfile(radius=0.0), "radius is 0.0"),
        (lambda: RadialProfile(radius=float("inf")), "radius is inf"),
        (lambda: RadialProfile()(torch.rand(3, 4)), "(3, 4)"),
        (lambda: RadialProfile(shells=9)(torch.rand(1, 1, 8, 8)), "too thin"),
    ],
)
def test_bad_input(make, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        make()
