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
from sklearn.linear_model import LogisticRegression

from monai_privacy.networks import fit_linear_head


def problem(rows: int, width: int, num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = 3.0 + 2.0 * torch.randn(rows, width, generator=generator, dtype=torch.float64)
    labels = torch.randint(num_classes, (rows,), generator=generator)
    labels[:num_classes] = torch.arange(num_classes)
    return features, labels


@pytest.mark.parametrize(("rows", "width", "num_classes"), [(40, 7, 3), (200, 12, 4), (20, 60, 3)])
@pytest.mark.parametrize("l2", [1e-3, 0.3])
def test_equals_the_regression_of_scikit_learn(rows: int, width: int, num_classes: int, l2: float) -> None:
    features, labels = problem(rows, width, num_classes)
    head = fit_linear_head(features, labels, num_classes, l2=l2)
    reference = LogisticRegression(C=1 / (l2 * rows), tol=1e-12, max_iter=50_000).fit(features.numpy(), labels.numpy())
    torch.testing.assert_close(head.weight.detach(), torch.tensor(reference.coef_), rtol=1e-3, atol=1e-4)
    logits = torch.tensor(reference.decision_function(features.numpy()))
    torch.testing.assert_close(head(features).detach(), logits, rtol=1e-3, atol=1e-3)
    assert abs(float(head.bias.detach().sum() - reference.intercept_.sum())) < 1e-3


@pytest.mark.parametrize(("rows", "width"), [(50, 8), (12, 90)])
def test_no_gradient_is_left(rows: int, width: int) -> None:
    features, labels = problem(rows, width, 2)
    head = fit_linear_head(features, labels, 2, l2=1e-2)
    loss = torch.nn.functional.cross_entropy(head(features), labels) + 0.5 * 1e-2 * head.weight.square().sum()
    loss.backward()
    assert max(float(p.grad.abs().max()) for p in head.parameters()) < 1e-7


def test_it_repeats_and_leaves_everything_else_alone() -> None:
    features, labels = problem(30, 50, 3)
    features.requires_grad_()
    before = torch.get_rng_state()
    with torch.no_grad():
        first = fit_linear_head(features, labels, 3)
    second = fit_linear_head(features, labels, 3)
    assert torch.equal(before, torch.get_rng_state())
    assert features.grad is None
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.bias, second.bias)
    assert all(p.requires_grad and p.is_leaf and p.grad is None for p in first.parameters())
    assert fit_linear_head(features.float(), labels, 3).weight.dtype == torch.float32


def test_one_class_is_always_predicted() -> None:
    features, _ = problem(6, 4, 2)
    for rows in (1, 6):
        head = fit_linear_head(features[:rows], torch.ones(rows, dtype=torch.long), 3)
        assert set(head(1e3 * features - 500).argmax(dim=1).tolist()) == {1}
        assert float(head(features).detach().softmax(dim=1)[:, 1].min()) > 0.999


def test_a_class_without_rows_is_never_predicted() -> None:
    features, labels = problem(40, 5, 2)
    labels = labels * 2
    head = fit_linear_head(features, labels, 4)
    alone = fit_linear_head(features, labels // 2, 2)
    wide = 100 * torch.randn(500, 5, dtype=torch.float64)
    assert set(head(wide).argmax(dim=1).tolist()) == {0, 2}
    torch.testing.assert_close(head(wide)[:, [0, 2]], alone(wide))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"features": torch.zeros(0, 3), "labels": torch.zeros(0, dtype=torch.long)},
            "there are no rows to learn from",
        ),
        ({"features": torch.zeros(2, 3, 1)}, "features have shape (2, 3, 1)"),
        ({"labels": torch.tensor([0])}, "labels (1,)"),
        ({"labels": torch.tensor([0, 2])}, "labels run from 0 to 2, but must lie from 0 to 1"),
        ({"labels": torch.tensor([0, -1])}, "labels run from -1 to 0"),
        ({"labels": torch.tensor([0.0, 1.0])}, "labels are torch.float32"),
        ({"features": torch.tensor([[1.0, 2.0], [3.0, float("inf")]])}, "1 values that are not finite"),
        ({"features": torch.zeros(2, 3, dtype=torch.long)}, "features are torch.int64"),
        ({"l2": 0.0}, "l2 is 0.0"),
        ({"l2": float("nan")}, "l2 is nan"),
    ],
)
def test_errors(changed: dict[str, object], message: str) -> None:
    arguments = {"features": torch.zeros(2, 3), "labels": torch.tensor([0, 1]), "num_classes": 2} | changed
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        fit_linear_head(**arguments)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
