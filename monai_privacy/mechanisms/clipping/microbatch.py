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

from monai_privacy.mechanisms.clipping.chunk import Chunk
from monai_privacy.mechanisms.clipping.result import ClippedGradientSum
from monai_privacy.mechanisms.losses import RowLoss


def microbatch_sum(
    forward: Callable[[Tensor, Tensor], Any],
    row_loss: RowLoss,
    chunk: Chunk,
    parameters: Sequence[nn.Parameter],
    max_grad_norm: float,
    *,
    max_rows: int | None = None,
    observe: Callable[[Any, Tensor], None] | None = None,
) -> ClippedGradientSum:
    """Clip and sum the gradients of a chunk; the network sees the rows of one patient at a time.

    Nothing in the network or the loss can then mix patients, and it is never called for no rows.

    Args:
        forward: ``forward(inputs, rows)``, the network on these inputs, rows (R,) of the batch.
        row_loss: see :class:`RowLoss`.
        chunk: the rows.
        parameters: what to differentiate.
        max_grad_norm: L2 bound C on one patient's total gradient.
        max_rows: most rows in one call of the network; does not change the result.
        observe: is shown what the network gave, and its rows, part by part.

    Raises:
        ValueError: for networks with reentrant checkpoints.
    """
    totals = [torch.zeros_like(p) for p in parameters]
    norms = []
    for at in chunk.units.slices():
        gradients: list[Tensor | None] = [None] * len(parameters)
        for start in range(at.start, at.stop, max_rows or (at.stop - at.start)):
            part = slice(start, min(at.stop, start + (max_rows or at.stop)))
            outputs = forward(chunk.inputs[part], chunk.rows[part])
            losses = row_loss(outputs, chunk.targets[part])
            if chunk.weights is not None:
                losses = losses * chunk.weights[part].to(losses)
            found = _gradients(losses.sum(), parameters)
            if observe is not None:
                observe(outputs, chunk.rows[part])
            gradients = [_plus(old, new) for old, new in zip(gradients, found, strict=True)]
        norms.append(_add_clipped(totals, gradients, max_grad_norm, chunk.inputs.device))
    return ClippedGradientSum(gradients=tuple(totals), norms=torch.stack(norms))


def _gradients(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Sequence[Tensor | None]:
    if not loss.requires_grad:
        return [None] * len(parameters)
    try:
        return torch.autograd.grad(loss, parameters, allow_unused=True)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise ValueError(
            "the network has reentrant checkpoints, in which a patient's gradient cannot be had without the others'. "
            "Pass use_reentrant=False to torch.utils.checkpoint."
        ) from error


def _add_clipped(
    totals: list[Tensor], gradients: Sequence[Tensor | None], max_grad_norm: float, device: torch.device
) -> Tensor:
    """Add one patient's gradient to ``totals``, scaled to norm at most C, and return its norm; never waits for a GPU."""
    used = [(total, gradient) for total, gradient in zip(totals, gradients, strict=True) if gradient is not None]
    if not used:
        return torch.zeros((), dtype=torch.float64, device=device)
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
