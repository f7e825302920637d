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

"""Does row i of a loss depend on row i alone? Asked on synthetic rows, before anything is released."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from monai_privacy.mechanisms.randomness import cuda_devices_of, fresh_randomness

_ROWS = 4
# The same kernel on rows of the same shape repeats itself but for rounding; real coupling is far above this.
_TOLERANCE = 1e-3


def require_independent_rows(row_losses: Callable[[Tensor, Tensor], Tensor], inputs: Tensor, targets: Tensor) -> None:
    """Raise ValueError where changing one row changes the loss of another.

    A network or a loss that mixes rows (batch statistics, a normaliser over the batch, contrastive terms) gives no
    gradient that belongs to one patient, so that clipping it bounds nothing.

    Args:
        row_losses: (R, ...) inputs and (R, ...) targets to (R,) losses.
        inputs: any batch of at least one row; only its shape, dtype and device are used.
        targets: likewise.
    """
    with torch.no_grad():
        base_inputs, base_targets = synthetic_rows(inputs, _ROWS), synthetic_targets(targets, _ROWS)
        expected = _repeatable(row_losses, base_inputs, base_targets)
        for row, changed_inputs, changed_targets in _perturbed(base_inputs, base_targets):
            try:
                found = _repeatable(row_losses, changed_inputs, changed_targets)
            except (IndexError, RuntimeError):  # a label that this loss does not take: no evidence either way
                continue
            others = torch.arange(_ROWS, device=found.device) != row
            before, after = expected[others], found[others]
            scale = before.abs().max().clamp(min=1.0)
            if not torch.allclose(after, before, rtol=_TOLERANCE, atol=_TOLERANCE * float(scale), equal_nan=True):
                gap = float((after - before).abs().max())
                raise ValueError(
                    f"changing one row changed the loss of another by {gap:.2g}: the network or the loss mixes patients, "
                    "so clipping would bound nothing. Remove what works across the batch (batch norm, a normaliser over "
                    "the batch, batch=True, contrastive terms)."
                )


def synthetic_rows(like: Tensor, rows: int) -> Tensor:
    """(``rows``, ...) random inputs of the shape, dtype and device of the rows of ``like``."""
    shape = (rows, *like.shape[1:])
    generator = torch.Generator().manual_seed(0)
    if like.is_floating_point():
        return torch.randn(shape, generator=generator).to(like)
    return torch.randint(0, 2, shape, generator=generator).to(like)


def synthetic_targets(like: Tensor, rows: int) -> Tensor:
    """(``rows``, ...) targets, alternately 0 and 1, of the shape, dtype and device of the rows of ``like``."""
    values = torch.arange(rows) % 2
    return values.reshape(-1, *[1] * (like.ndim - 1)).expand(rows, *like.shape[1:]).clone().to(like)


def _perturbed(inputs: Tensor, targets: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Batches of which one row is another, by its number: what mixes rows may look one way only."""
    for row in range(_ROWS):
        changed = inputs.clone()
        changed[row] = changed[row] * 3 + 1
        yield row, changed, targets.clone()
    for row in (0, _ROWS - 1):
        for label in (1 - row % 2, -1, -100):  # another class; the usual marks of a missing label
            relabelled = targets.clone()
            whole = targets.is_floating_point() or targets.dtype in (torch.int64, torch.int32)
            relabelled[row] = label if whole else 1 - row % 2
            yield row, inputs.clone(), relabelled


def _repeatable(row_losses: Callable[[Tensor, Tensor], Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
    # Dropout must fall alike in each call; outside the user's random state does not move.
    with fresh_randomness(0, cuda_devices=cuda_devices_of(inputs)):
        return row_losses(inputs.clone(), targets.clone()).double()
