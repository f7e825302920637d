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

"""The reference method: one patient at a time through the network. Slow, and right for every network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from monai_privacy.mechanisms.clipping.result import ClippedGradientSum
from monai_privacy.mechanisms.losses import RowLoss


def clipped_gradient_sum(
    network: nn.Module,
    loss_function: Callable[..., Any],
    batch: tuple[Tensor, Tensor],
    patient_index: Tensor,
    max_grad_norm: float,
    *,
    parameters: Sequence[nn.Parameter] | None = None,
    row_weights: Tensor | None = None,
    max_physical_batch_size: int | None = None,
    forward: Callable[[Tensor, Tensor], Any] | None = None,
) -> ClippedGradientSum:
    """Sum the gradients of a batch, each patient's clipped once.

    All rows of a patient, whatever images, crops or augmented views they are, make one gradient. A patient whose
    gradient is not finite counts as zero. The network sees the rows of one patient at a time, so that nothing in it,
    and nothing in the loss, can mix patients; it is never called for no rows.

    Args:
        network: any module; buffers that it updates in forward are not covered by the guarantee (see
            ``networks.check_network``).
        loss_function: ``loss_function(outputs, targets)``; made a loss for each row by :class:`RowLoss`.
        batch: inputs and targets, B rows each.
        patient_index: (B,) integers, one a row; need not be sorted or start at zero.
        max_grad_norm: L2 bound C on one patient's total gradient.
        parameters: what to differentiate; the network's trainable parameters where None.
        row_weights: (B,) factors on the rows' losses that depend on nothing but the patient's own rows; ones where
            None, so that a patient's gradient is the sum over their rows.
        max_physical_batch_size: most rows in one call of the network; does not change the result.
        forward: ``forward(inputs, rows)`` for these inputs, rows (R,) of the batch, in place of ``network(inputs)``.

    Returns:
        The sum, of the parameters' shapes, dtype and device, and the norms before clipping.

    Guarantee: adding or removing one patient moves the sum by at most C in L2.
    Reference: Abadi et al. 2016, Algorithm 1; Charles et al. 2024 for several rows a patient.
    """
    inputs, targets = batch
    _check_rows(inputs, targets, patient_index)
    params = [p for p in network.parameters() if p.requires_grad] if parameters is None else list(parameters)
    totals = [torch.zeros_like(p) for p in params]
    row_loss = loss_function if isinstance(loss_function, RowLoss) else RowLoss(loss_function)
    norms = []
    for rows in _rows_by_patient(patient_index):
        gradients: list[Tensor | None] = [None] * len(params)
        for part in rows.split(max_physical_batch_size or len(rows)):
            outputs = network(inputs[part]) if forward is None else forward(inputs[part], part)
            losses = row_loss(outputs, targets[part])
            if row_weights is not None:
                losses = losses * row_weights[part].to(losses)
            found = torch.autograd.grad(losses.sum(), params, allow_unused=True)
            gradients = [_plus(old, new) for old, new in zip(gradients, found, strict=True)]
        norms.append(_add_clipped(totals, gradients, max_grad_norm))
    device = patient_index.device
    return ClippedGradientSum(
        gradients=tuple(totals),
        norms=torch.stack(norms) if norms else torch.zeros(0, dtype=torch.float64, device=device),
    )


def _add_clipped(totals: list[Tensor], gradients: Sequence[Tensor | None], max_grad_norm: float) -> Tensor:
    """Add one patient's gradient to ``totals``, scaled to norm at most C, and return its norm; never waits for a GPU."""
    used = [(total, gradient) for total, gradient in zip(totals, gradients, strict=True) if gradient is not None]
    if not used:
        return torch.zeros((), dtype=torch.float64, device=totals[0].device if totals else None)
    # In float64: a float32 norm of a million elements is 4e-5 low, and squares of large gradients overflow.
    parts = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for _, gradient in used]
    norm = torch.linalg.vector_norm(torch.stack(parts))
    factor = (max_grad_norm / norm.clamp(min=1e-300)).clamp(max=1.0)
    finite = torch.isfinite(norm)
    for total, gradient in used:
        # Not gradient * 0: zero times infinity is not a number.
        total += torch.where(finite, gradient * factor.to(gradient.dtype), torch.zeros_like(gradient))
    return norm


def _plus(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    if old is None or new is None:
        return new if old is None else old
    return old + new


def _rows_by_patient(patient_index: Tensor) -> list[Tensor]:
    if not len(patient_index):
        return []
    _, inverse, counts = patient_index.unique(return_inverse=True, return_counts=True)
    return list(inverse.argsort(stable=True).split(counts.tolist()))


def _check_rows(inputs: Tensor, targets: Tensor, patient_index: Tensor) -> None:
    if patient_index.ndim != 1 or patient_index.is_floating_point():
        raise ValueError(
            f"patient_index has shape {tuple(patient_index.shape)} and dtype {patient_index.dtype}, but it must be one "
            "integer for each row."
        )
    if not len(inputs) == len(targets) == len(patient_index):
        raise ValueError(
            f"{len(inputs)} inputs, {len(targets)} targets and {len(patient_index)} patients: each row must belong to "
            "one patient. Give patient_index for each row that the network sees."
        )
