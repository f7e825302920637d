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

"""Multinomial logistic regression on a few rows: the best linear head there is, the same each time."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from monai_privacy.accounting.values import checked_positive

__all__ = ["fit_linear_head"]

# The logit of a class without rows. Those of the others sum to 0 (each step from 0 does), so that it is never the largest.
_ABSENT = -30.0
_MOST_STEPS = 1000


def fit_linear_head(features: Tensor, labels: Tensor, num_classes: int, *, l2: float = 1e-3) -> nn.Linear:
    """Fit a linear layer by logistic regression with an L2 penalty, to convergence.

    Minimises the mean cross-entropy plus ``l2 / 2`` times the sum of squared weights; biases are free. The minimum is
    unique up to rounding, so that the rows alone decide: no seed, no step size, no early stopping on somebody's
    validation images. Not private by itself: it is for teachers, whose votes are noised, and for students.

    Args:
        features: (N, F) floats.
        labels: (N,) integers from 0 to ``num_classes`` - 1. A class without rows is never predicted; where all rows
            have one class, that class always is.
        num_classes: number of logits.
        l2: strength of the penalty, above 0; ``1 / (N C)`` of scikit-learn's ``LogisticRegression``. Choose it on public
            images: chosen on the shards of all teachers, it would depend on all patients.

    Returns:
        A layer from F features to ``num_classes`` logits, in the dtype and on the device of ``features``.

    Raises:
        ValueError: for no rows, labels that are no classes, and values that are not finite.

    Reference: Papernot et al. 2017 (arXiv:1610.05755), section 2.1: any learner may be a teacher.
    """
    _check(features, labels, num_classes)
    l2 = checked_positive("l2", l2)
    present, targets = labels.long().to(features.device).unique(return_inverse=True)
    # Biases are free, so that the centre changes nothing but the number of steps.
    centre = features.detach().double().mean(dim=0)
    # The best weights are sums of the rows: in a basis of these there are as many numbers to find as rows, not features.
    basis, coordinates = torch.linalg.qr((features.detach().double() - centre).T)
    inputs = coordinates.T
    weight = inputs.new_zeros(len(present), inputs.shape[1], requires_grad=True)
    bias = inputs.new_zeros(len(present), requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=_MOST_STEPS,
        history_size=20,
        tolerance_grad=1e-8,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(F.linear(inputs, weight, bias), targets) + 0.5 * l2 * weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    # Without the random numbers of a layer's usual start, which would move the caller's random state.
    head = nn.utils.skip_init(nn.Linear, features.shape[1], num_classes, device=features.device, dtype=features.dtype)
    with torch.no_grad():
        weight = weight @ basis.T
        head.weight.zero_()
        head.bias.fill_(_ABSENT)
        head.weight[present] = weight.to(features)
        head.bias[present] = (bias - weight @ centre).to(features)
    return head


def _check(features: Tensor, labels: Tensor, num_classes: int) -> None:
    if features.ndim != 2 or labels.ndim != 1 or len(features) != len(labels):
        raise ValueError(
            f"features have shape {tuple(features.shape)} and labels {tuple(labels.shape)}, but must be (N, F) and (N,). "
            "Flatten the features, and give one label for each row."
        )
    if not len(labels):
        raise ValueError(
            "there are no rows to learn from: an empty teacher cannot be fitted, but must vote. Let it vote for one fixed "
            "class."
        )
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"labels are {labels.dtype}, but must be whole numbers, one a class. Convert them with .long()."
        )
    lowest, highest = int(labels.long().min()), int(labels.long().max())
    if lowest < 0 or highest >= num_classes:
        raise ValueError(
            f"labels run from {lowest} to {highest}, but must lie from 0 to {num_classes - 1}. Leave rows without an answer "
            "(-1) out, or raise num_classes."
        )
    if not features.is_floating_point() or not bool(features.isfinite().all()):
        raise ValueError(
            f"features are {features.dtype} with {int((~features.isfinite()).sum())} values that are not finite, which no "
            "head fits. Convert or repair them."
        )
