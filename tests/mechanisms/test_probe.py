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

"""A network or a loss that mixes rows is found before anything is released; an honest one passes."""

from __future__ import annotations

import monai.losses
import pytest
import torch
import torch.nn.functional as F
from conftest import make_network
from torch import Tensor, nn

from monai_privacy.mechanisms import RowLoss
from monai_privacy.mechanisms.probe import require_independent_rows

INPUTS = torch.randn(2, 1, 8, 8)
LABELS = torch.tensor([0, 1])


def probe(network, loss, inputs=INPUTS, targets=LABELS) -> None:
    row_loss = RowLoss(loss)
    require_independent_rows(lambda x, y: row_loss(network(x), y), inputs, targets)


class MixesRows(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 2)

    def forward(self, inputs):
        features = inputs.flatten(1)
        return self.head(features - features.mean(0))


def divided_by_valid_labels(outputs: Tensor, targets: Tensor) -> Tensor:
    valid = targets >= 0
    losses = F.binary_cross_entropy_with_logits(outputs, targets.clamp(min=0), reduction="none") * valid
    return losses.sum(1) / valid.sum()


def test_an_ordinary_network_and_loss_pass():
    probe(make_network(), nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0])))


def test_dropout_and_in_place_layers_pass():
    probe(nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(0.5), make_network()), nn.CrossEntropyLoss())


def test_missing_labels_that_are_left_out_row_by_row_pass():
    head = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    probe(head, nn.BCEWithLogitsLoss(), targets=torch.zeros(2, 3))


@pytest.mark.parametrize("network", [MixesRows(), nn.Sequential(nn.BatchNorm2d(1), make_network())])
def test_a_network_that_mixes_rows_is_refused(network):
    with pytest.raises(ValueError, match="mixes patients"):
        probe(network, nn.CrossEntropyLoss())


def test_a_batch_normaliser_over_valid_labels_is_refused():
    head = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(ValueError, match="mixes patients"):
        probe(head, divided_by_valid_labels, targets=torch.zeros(2, 3))


def test_dice_over_the_batch_is_refused():
    same_size = nn.Conv2d(1, 4, 1)
    loss = monai.losses.DiceLoss(sigmoid=True, batch=True)
    with pytest.raises(ValueError, match="mixes patients"):
        probe(same_size, loss, targets=torch.zeros(2, 4, 8, 8))


def test_it_uses_only_the_shape_of_the_data():
    seen = []

    def losses(inputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(inputs)
        return inputs.flatten(1).sum(1) + targets

    require_independent_rows(losses, torch.full((2, 3), 1e6), LABELS)
    assert all(float(inputs.abs().max()) < 100 for inputs in seen)


def test_it_does_not_move_the_users_random_state():
    network = nn.Sequential(nn.Dropout(0.5), make_network())
    before = torch.get_rng_state()
    probe(network, nn.CrossEntropyLoss())
    assert torch.equal(before, torch.get_rng_state())
