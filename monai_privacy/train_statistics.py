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

"""What a training step shows of itself: nothing, unless its user asked for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.utils.enums import CommonKeys as Keys
from torch import Tensor

from monai_privacy.mechanisms.losses import RowLoss


class NoStatistics(dict):
    """What a training step shows of itself: nothing. Whatever a logger looks for is None, which loggers pass over."""

    def __missing__(self, key: Any) -> None:
        return None


# A list of one, as after decollation, which `from_engine(..., first=True)` and StatsHandler's default expect.
NO_STATISTICS = [NoStatistics()]


def training_statistics(
    row_loss: RowLoss, inputs: Tensor, targets: Tensor, predictions: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    order = torch.cat([rows for rows, _ in predictions]).argsort()
    outputs = torch.cat([outputs for _, outputs in predictions])[order]
    with torch.no_grad():
        loss = row_loss(outputs, targets).mean()
    return {Keys.IMAGE: inputs, Keys.LABEL: targets, Keys.PRED: outputs, Keys.LOSS: loss}


def merged(statistics: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The statistics of all parts; without the images, where there are several parts, which may differ in size."""
    if len(statistics) == 1:
        return statistics[0]
    whole: dict[str, Tensor] = {key: torch.cat([part[key] for part in statistics]) for key in (Keys.LABEL, Keys.PRED)}
    rows = torch.tensor([float(len(part[Keys.LABEL])) for part in statistics])
    losses = torch.stack([part[Keys.LOSS].cpu() for part in statistics])
    return whole | {Keys.LOSS: (losses * rows).sum() / rows.sum()}
