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

import copy
import math
import re

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from torch import Tensor, nn

from monai_privacy.mechanisms import GradientClipper
from monai_privacy.networks import FixedFeatureClassifier, GradientHistograms, check_network, fit_linear_head

# skimage.feature.hog 0.26 of ((r² + 3 r c) mod 17) / 16 for r, c = 0..7, with 9 orientations, cells of 4 and blocks of 2.
GOLDEN = [
    *(0.0, 0.096613, 0.262478, 0.211378, 0.262478, 0.051003, 0.0, 0.072129, 0.153008),
    *(0.13607, 0.25984, 0.0, 0.262478, 0.262478, 0.039117, 0.0, 0.154995, 0.0),
    *(0.262478, 0.199578, 0.034988, 0.212646, 0.262478, 0.05532, 0.069975, 0.138301, 0.0),
    *(0.262478, 0.0, 0.0, 0.0, 0.262478, 0.102005, 0.262478, 0.182641, 0.161285),
]  # fmt: skip


def images(number: int, *shape: int) -> Tensor:
    return torch.rand(number, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def ramp(degrees: float, side: int = 32) -> Tensor:
    """(1, 1, side, side), brighter in the direction given, counted from the rightward one to the downward one."""
    rows, columns = torch.meshgrid(*[torch.arange(side, dtype=torch.float64)] * 2, indexing="ij")
    angle = math.radians(degrees)
    return (math.cos(angle) * columns + math.sin(angle) * rows)[None, None]


def test_golden_values_of_scikit_image() -> None:
    row, column = torch.meshgrid(*[torch.arange(8)] * 2, indexing="ij")
    image = ((row**2 + 3 * row * column) % 17).double() / 16
    found = GradientHistograms(cell_size=4)(image[None, None])
    torch.testing.assert_close(found[0], torch.tensor(GOLDEN, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "cell_size", "orientations"), [((1, 64, 64), 8, 9), ((1, 45, 61), 8, 9), ((3, 33, 40), 5, 7)]
)
def test_equals_scikit_image(shape: tuple[int, ...], cell_size: int, orientations: int) -> None:
    reference = pytest.importorskip("skimage.feature").hog
    batch = images(3, *shape)
    expected = [
        reference(
            np.moveaxis(image.numpy(), 0, -1),
            orientations,
            (cell_size,) * 2,
            (2, 2),
            block_norm="L2-Hys",
            channel_axis=-1,
        )
        for image in batch
    ]
    found = GradientHistograms(orientations, cell_size)(batch)
    torch.testing.assert_close(found, torch.tensor(np.stack(expected)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("orientations", [9, 4])
@pytest.mark.parametrize("turn", [0, 180])
def test_a_ramp_is_in_the_bin_of_its_direction(orientations: int, turn: int) -> None:
    width = 180 / orientations
    for number in range(orientations):
        found = GradientHistograms(orientations)(ramp((number + 0.5) * width + turn)).view(-1, orientations)
        assert set(found.argmax(dim=1).tolist()) == {number}
        # Each of the 36 numbers a block is 1/2: one bin in each of four cells.
        inner = found.view(3, 3, 4, orientations)[1, 1]
        torch.testing.assert_close(inner[:, number], torch.full((4,), 0.5, dtype=torch.float64), rtol=1e-3, atol=1e-3)


def test_an_angle_just_below_zero_is_in_the_last_bin() -> None:
    # In float32 such an angle modulo pi is pi, one bin too far: half of this edge would be lost.
    image = torch.ones(16, 16)
    image[:, :3] = -1.0
    image[:, 3] = -1e-9 * torch.arange(16)
    found = GradientHistograms()(image[None, None]).view(4, 9)
    assert float(found[0, 8]) > 0.4


def test_brightness_and_contrast_do_not_matter() -> None:
    batch = images(4, 2, 33, 40)
    features = GradientHistograms()
    expected = features(batch)
    torch.testing.assert_close(features(3.7 * batch - 2.5), expected, rtol=1e-6, atol=1e-6)
    assert float((features(images(5, 2, 33, 40)[1:]) - expected).abs().max()) > 0.05


def test_blocks_have_unit_length_and_flat_ones_none() -> None:
    blocks = GradientHistograms()(images(2, 1, 32, 32)).view(2, 9, 36)
    torch.testing.assert_close(blocks.norm(dim=2), torch.ones(2, 9, dtype=torch.float64), rtol=1e-5, atol=0)
    assert float(blocks.max()) < 0.5
    assert torch.equal(GradientHistograms()(torch.ones(1, 1, 16, 16)), torch.zeros(1, 36))


@pytest.mark.parametrize(("height", "width", "blocks"), [(16, 16, 1), (17, 31, 2), (45, 61, 24), (64, 64, 49)])
def test_shapes_of_any_size(height: int, width: int, blocks: int) -> None:
    assert GradientHistograms()(images(2, 1, height, width)).shape == (2, blocks * 36)
    assert GradientHistograms(4, 8)(images(2, 3, height, width)).shape == (2, blocks * 16)


def test_the_strongest_channel_counts() -> None:
    flat, edge = torch.full((1, 1, 16, 16), 0.5), ramp(30, 16).float()
    features = GradientHistograms()
    expected = features(edge)
    for channels in ([flat, edge], [edge, flat], [edge, 0.5 * ramp(120, 16).float()]):
        torch.testing.assert_close(features(torch.cat(channels, dim=1)), expected)


def test_rows_are_alone_and_repeat() -> None:
    batch = images(5, 1, 40, 40).float()
    features = GradientHistograms().train()
    whole = features(batch)
    assert torch.equal(whole, features(batch))
    assert torch.equal(whole, torch.cat([features(batch[row : row + 1]) for row in range(5)]))
    assert torch.equal(whole, features(MetaTensor(batch)))
    assert type(features(MetaTensor(batch))) is Tensor
    assert features.state_dict() == {}
    assert features(batch.half()).dtype == torch.float32
    assert not features(batch.requires_grad_()).requires_grad


def test_only_the_head_is_trained_and_it_starts_at_zero() -> None:
    network = FixedFeatureClassifier(in_shape=(1, 28, 28), num_classes=3, features=GradientHistograms(cell_size=4))
    assert [name for name, p in network.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
    assert network.head.in_features == 6 * 6 * 36
    logits = network(images(2, 1, 28, 28).float())
    assert torch.equal(logits, torch.zeros(2, 3))
    logits[:, 0].sum().backward()
    assert float(network.head.weight.grad[0].abs().sum()) > 0
    assert check_network(network) == ()


def test_given_features_are_copied_frozen_and_fixed() -> None:
    torch.manual_seed(0)
    given = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(2)).train()
    before = copy.deepcopy(given.state_dict())
    network = FixedFeatureClassifier((1, 12, 12), 2, features=given).train()
    nn.init.ones_(network.head.weight)
    assert network.head.in_features == 16
    assert network.training
    batch = images(4, 1, 12, 12).float()
    assert torch.equal(network(batch), network(batch))
    # Kernels round otherwise for one row than for four, on some machines.
    torch.testing.assert_close(network(batch)[:1], network(batch[:1]))
    assert all(torch.equal(value, before[name]) for name, value in network.features.state_dict().items())
    assert given.training
    assert all(p.requires_grad for p in given.parameters())
    assert not any(p.requires_grad for p in network.features.parameters())


def test_features_are_standardised_by_the_numbers_given() -> None:
    features = nn.Flatten()
    network = FixedFeatureClassifier((1, 1, 2), 2, features=features, mean=[1.0, 2.0], std=[2.0, 4.0])
    assert network.encode(torch.tensor([[[[3.0, 6.0]]]])).tolist() == [[1.0, 1.0]]
    assert {"mean", "std"} <= set(network.state_dict())
    assert type(network.encode(MetaTensor(torch.ones(1, 1, 1, 2)))) is Tensor
    network = FixedFeatureClassifier((1, 1, 2), 2, features=features, mean=1, std=2)
    assert network.encode(torch.tensor([[[[3.0, 6.0]]]])).tolist() == [[1.0, 2.5]]


def test_built_from_a_config() -> None:
    config = {
        "_target_": "FixedFeatureClassifier",
        "in_shape": [1, 32, 32],
        "num_classes": 2,
        "features": {"_target_": "GradientHistograms", "cell_size": 4},
        "std": 0.25,
    }
    network = ConfigParser({"network": config}).get_parsed_content("network")
    assert network(images(2, 1, 32, 32).float()).shape == (2, 2)
    assert "cell_size=4" in repr(network)


@pytest.mark.parametrize("method", ["auto", "one_pass", "microbatch"])
def test_clipping_by_patient_equals_autograd(method: str) -> None:
    network = FixedFeatureClassifier((1, 32, 32), 3, mean=0.1, std=0.2).double()
    torch.manual_seed(0)
    nn.init.normal_(network.head.weight)
    batch, labels, patients = images(5, 1, 32, 32), torch.tensor([0, 1, 2, 1, 0]), torch.tensor([4, 1, 4, 4, 2])
    loss = nn.CrossEntropyLoss(reduction="sum")
    gradients = []
    for patient in patients.unique():
        rows = patients == patient
        found = torch.autograd.grad(loss(network(batch[rows]), labels[rows]), list(network.head.parameters()))
        gradients.append(torch.cat([part.flatten() for part in found]))
    norms = torch.stack([gradient.norm() for gradient in gradients])
    bound = float(norms.median())
    expected = sum(gradient * min(1.0, bound / float(gradient.norm())) for gradient in gradients)
    clipper = GradientClipper(network, loss, method=method)
    clipped = clipper((batch, labels), patients, bound)
    assert clipper.faults == ()
    torch.testing.assert_close(
        torch.cat([part.flatten() for part in clipped.gradients]), expected, rtol=1e-10, atol=1e-10
    )
    torch.testing.assert_close(clipped.norms, norms, rtol=1e-10, atol=1e-10)


def test_a_shard_of_thirty_images_is_enough_for_edges() -> None:
    torch.manual_seed(0)
    directions = torch.tensor([20.0, 110.0])
    labels = torch.arange(230) % 2
    noisy = torch.cat([ramp(float(directions[label]), 16) for label in labels]) / 16 + 0.1 * torch.randn(230, 1, 16, 16)
    noisy = noisy * (0.2 + torch.rand(230, 1, 1, 1)) + torch.rand(230, 1, 1, 1)
    network = FixedFeatureClassifier((1, 16, 16), 2)
    network.head = fit_linear_head(network.encode(noisy[:30].float()), labels[:30], 2)
    assert float((network(noisy[30:].float()).argmax(dim=1) == labels[30:]).double().mean()) > 0.95


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GradientHistograms(0), "orientations is 0"),
        (lambda: GradientHistograms(9, -1), "cell_size is -1"),
        (lambda: GradientHistograms()(torch.zeros(1, 1, 15, 40)), "images have shape (1, 1, 15, 40)"),
        (lambda: GradientHistograms()(torch.zeros(1, 16, 16)), "images have shape (1, 16, 16)"),
        (lambda: GradientHistograms()(torch.zeros(1, 1, 32, 32, 32)), "images have shape (1, 1, 32, 32, 32)"),
        (lambda: FixedFeatureClassifier((1, 32, 32), 1), "num_classes is 1"),
        (lambda: FixedFeatureClassifier((1, 8, 8), 2), "images have shape (1, 1, 8, 8)"),
        (lambda: FixedFeatureClassifier((2, 32, 32), 2, features=nn.Conv2d(1, 1, 3)), "of shape (2, 32, 32)"),
        (lambda: FixedFeatureClassifier((1, 32, 32), 2, mean=[0.0, 1.0]), "mean has shape (2,) for 324 features"),
        (lambda: FixedFeatureClassifier((1, 32, 32), 2, std=[[1.0]]), "std has shape (1, 1) for 324 features"),
        (lambda: FixedFeatureClassifier((1, 32, 32), 2, std=0.0), "std is 0.0 at its least"),
        (lambda: FixedFeatureClassifier((1, 32, 32), 2, mean=float("nan")), "mean holds a value that is not finite"),
    ],
)
def test_errors(make, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        make()
    assert "\n" not in str(error.value)
