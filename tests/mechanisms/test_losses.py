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

"""Any loss, one value for each row, that depends on that row alone."""

from __future__ import annotations

import monai.losses
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from monai_privacy.mechanisms import RowLoss

ROWS = 4
LOGITS = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(0))
CLASSES = torch.tensor([0, 2, 1, 2])
MULTI = torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]])
WEIGHT = torch.tensor([0.2, 1.0, 3.0])

CASES = {
    "cross entropy": (nn.CrossEntropyLoss(), LOGITS, CLASSES),
    "cross entropy, sum": (nn.CrossEntropyLoss(reduction="sum"), LOGITS, CLASSES),
    "cross entropy, smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), LOGITS, CLASSES),
    "binary, many labels": (nn.BCEWithLogitsLoss(pos_weight=WEIGHT), LOGITS, MULTI),
    "binary, (B, 1)": (nn.BCEWithLogitsLoss(), LOGITS[:, :1], MULTI[:, :1]),
    "binary, (B,)": (nn.BCEWithLogitsLoss(), LOGITS[:, 0], MULTI[:, 0]),
    "mean squared": (nn.MSELoss(), LOGITS, MULTI),
    "focal": (monai.losses.FocalLoss(), LOGITS, MULTI),
    "dice": (monai.losses.DiceLoss(sigmoid=True), torch.randn(ROWS, 2, 4, 4), torch.ones(ROWS, 2, 4, 4)),
    "plain function": (lambda outputs, targets: F.cross_entropy(outputs, targets), LOGITS, CLASSES),
    "function of rows": (lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="none"), LOGITS, CLASSES),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rows", [1, ROWS])
def test_equals_the_loss_of_each_row_alone(case, rows):
    loss, outputs, targets = CASES[case]
    found = RowLoss(loss)(outputs[:rows], targets[:rows])
    assert found.shape == (rows,)
    alone = torch.stack([torch.as_tensor(loss(outputs[i : i + 1], targets[i : i + 1])).sum() for i in range(rows)])
    torch.testing.assert_close(found, alone)


@pytest.mark.parametrize("case", CASES)
def test_no_row_sees_another(case):
    loss, outputs, targets = CASES[case]
    changed = outputs.clone()
    changed[0] += 100
    found, moved = RowLoss(loss)(outputs, targets), RowLoss(loss)(changed, targets)
    assert torch.equal(found[1:], moved[1:])


def test_class_weights_stay_fixed_numbers_in_a_sum():
    found = RowLoss(nn.CrossEntropyLoss(weight=WEIGHT))(LOGITS, CLASSES)
    expected = F.cross_entropy(LOGITS, CLASSES, reduction="none") * WEIGHT[CLASSES]
    torch.testing.assert_close(found, expected)
    one = RowLoss(nn.CrossEntropyLoss(weight=WEIGHT))(LOGITS[:1], CLASSES[:1])
    torch.testing.assert_close(one, expected[:1])


def test_refuses_weights_that_row_by_row_calls_would_cancel():
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = WEIGHT

        def forward(self, outputs, targets):
            return F.cross_entropy(outputs, targets, weight=self.weight)

    with pytest.raises(ValueError, match="class weights but gives no loss for each row"):
        RowLoss(Weighted())(LOGITS, CLASSES)


def test_leaves_the_users_loss_as_it_was():
    loss = nn.CrossEntropyLoss()
    RowLoss(loss)(LOGITS, CLASSES)
    assert loss.reduction == "mean"


def test_combined_losses_of_monai_are_per_row():
    loss = monai.losses.DiceFocalLoss(sigmoid=True)
    outputs, targets = torch.randn(ROWS, 2, 4, 4), torch.ones(ROWS, 2, 4, 4)
    found = RowLoss(loss)(outputs, targets)
    changed = outputs.clone()
    changed[0] += 5
    assert found.shape == (ROWS,)
    assert torch.equal(found[1:], RowLoss(loss)(changed, targets)[1:])
