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

"""One loss value for each row, from a loss function that was written to give one value for a batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class RowLoss:
    """Call ``loss_function`` so that row i of the result depends on row i of its inputs alone.

    A loss with a ``reduction`` (torch's and MONAI's) is copied and asked for "none"; what it gives for a row is then
    averaged over that row, or summed where its reduction was "sum". Class weights stay what they were for a row: fixed
    public numbers in a sum, never divided by the weights that happen to be in the batch. Any other callable that gives
    one number for a batch is called once for each row.

    Args:
        loss_function: ``loss_function(outputs, targets)``. It is not changed.

    Raises:
        ValueError: for losses that pool the batch, and where a class-weighted loss cannot be had per row, since calling
            it row by row would cancel its weights without a word.
    """

    def __init__(self, loss_function: Callable[..., Any]) -> None:
        self._reduction = str(getattr(loss_function, "reduction", "mean"))
        self._loss = _unreduced(loss_function) if hasattr(loss_function, "reduction") else loss_function
        self._row_wise: dict[Any, bool] = {}

    @property
    def unreduced(self) -> Any:
        """The copy of the user's loss that is called."""
        return self._loss

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        """(B,) losses of ``outputs``, whatever the network gave for B rows, and (B, ...) ``targets``."""
        if not self._gives_rows(outputs, targets):
            return self._one_row_at_a_time(outputs, targets)
        flat = self._loss(outputs, targets).reshape(len(targets), -1)
        return flat.sum(1) if self._reduction == "sum" else flat.mean(1)

    def _gives_rows(self, outputs: Any, targets: Any) -> bool:
        """Whether there is a number for each row. One for each of C classes looks like it where there are C rows, so
        the loss is asked again with one row more; once for each shape of a row."""
        rows = len(targets)
        key = (_row_shapes(outputs, rows), _row_shapes(targets, rows))
        if key not in self._row_wise:
            with torch.no_grad():
                once = self._loss(outputs, targets)
                again = self._loss(_with_last_row_twice(outputs, rows), _with_last_row_twice(targets, rows))
            self._row_wise[key] = _has_rows(once, rows) and _has_rows(again, rows + 1)
        return self._row_wise[key]

    def _one_row_at_a_time(self, outputs: Any, targets: Any) -> Tensor:
        weight = getattr(self._loss, "weight", None)
        if weight is not None:
            raise ValueError(
                f"{type(self._loss).__name__} has class weights but gives no loss for each row: calling it row by row "
                'would cancel the weights. Use a loss that has reduction="none".'
            )
        rows = len(targets)
        values = [self._loss(_row(outputs, i, rows), _row(targets, i, rows)) for i in range(rows)]
        return torch.stack([value.reshape(-1).mean() for value in values])


def _unreduced(loss_function: Any) -> Any:
    # The caller's loss stays as it was: validation may use the same object.
    loss = copy.deepcopy(loss_function)
    parts = loss.modules() if isinstance(loss, nn.Module) else [loss]
    for part in parts:  # combined losses (MONAI's DiceCELoss, FocalLoss, ...) hold others
        if hasattr(part, "reduction"):
            part.reduction = "none"
        # MONAI's overlap losses over the whole batch give one number a class, which may look like one a row.
        if getattr(part, "batch", None) is True and hasattr(part, "reduction"):
            raise ValueError(
                f"{type(part).__name__}(batch=True) pools the rows of a batch, so it mixes patients and clipping would "
                "bound nothing. Pass batch=False."
            )
    return loss


def _has_rows(losses: Any, rows: int) -> bool:
    return isinstance(losses, Tensor) and losses.ndim > 0 and len(losses) == rows


def _row_shapes(value: Any, rows: int) -> Any:
    shapes: list[Any] = []
    _map_rows(value, rows, lambda tensor: shapes.append((tensor.shape[1:], tensor.dtype)))
    return tuple(shapes)


def _with_last_row_twice(value: Any, rows: int) -> Any:
    return _map_rows(value, rows, lambda tensor: torch.cat([tensor, tensor[-1:]]))


def _row(value: Any, index: int, rows: int) -> Any:
    """Row ``index``, kept as a batch of one."""
    return _map_rows(value, rows, lambda tensor: tensor[index : index + 1])


def _map_rows(value: Any, rows: int, change: Callable[[Tensor], Any]) -> Any:
    """``change`` each tensor of so many rows; the same inside of lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        return change(value) if value.ndim and len(value) == rows else value
    if isinstance(value, dict):
        return {key: _map_rows(item, rows, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_map_rows(item, rows, change) for item in value)
    return value
