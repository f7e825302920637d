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

"""Opacus's per-sample gradients through the same seam, for who wants them and as an oracle in tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from monai_privacy.mechanisms.clipping.chunk import Chunk
from monai_privacy.mechanisms.clipping.materials import Material, UnitGradients
from monai_privacy.mechanisms.clipping.one_pass import summed
from monai_privacy.mechanisms.clipping.result import ClippedGradientSum
from monai_privacy.mechanisms.losses import RowLoss

# Per-sample gradients must add up to the ordinary gradient; a wrong layout of the input is off by a tenth or more.
_TOLERANCE = 1e-3


def opacus_sum(
    network: nn.Module,
    forward: Callable[[Tensor, Tensor], Any],
    row_loss: RowLoss,
    chunk: Chunk,
    parameters: Sequence[nn.Parameter],
    names: Sequence[str],
    max_grad_norm: float,
    *,
    observe: Callable[[Any, Tensor], None] | None = None,
) -> ClippedGradientSum:
    """Clip and sum the gradients of a chunk with Opacus's hooks, attached for this call only.

    Args:
        network: in training mode: Opacus's hooks do nothing otherwise.
        forward: ``forward(inputs, rows)``, the network on these inputs, rows (R,) of the batch.
        row_loss: see :class:`RowLoss`.
        chunk: the rows.
        parameters: what to differentiate.
        names: of the parameters, for messages.
        max_grad_norm: L2 bound C on one patient's total gradient.
        observe: is shown what the network gave, and its rows.

    Raises:
        ValueError: where Opacus has no gradient for each row, or gives some that do not add up to the whole.
    """
    from opacus.grad_sample import GradSampleHooks  # slow to import, and not always wanted

    if not network.training:
        raise ValueError("the network is in evaluation mode, in which Opacus's hooks do nothing. Call network.train().")
    before = [parameter.grad for parameter in network.parameters()]
    for parameter in network.parameters():
        parameter.grad = None
    hooks = None
    try:
        hooks = GradSampleHooks(network, loss_reduction="sum", strict=False)
        outputs = forward(chunk.inputs, chunk.rows)
        losses = row_loss(outputs, chunk.targets)
        loss = (losses if chunk.weights is None else losses * chunk.weights.to(losses)).sum()
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        materials = _materials(parameters, names, chunk)
        if observe is not None:
            observe(outputs, chunk.rows)
    except (RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
        raise ValueError(
            f"Opacus cannot give a gradient for each row of {type(network).__name__}: {error}. Use method='auto'."
        ) from error
    finally:
        if hooks is not None:
            hooks.cleanup()
        for parameter, gradient in zip(network.parameters(), before, strict=True):
            parameter.grad = gradient
    return summed(materials, parameters, chunk.units, max_grad_norm, loss.device)


def _materials(parameters: Sequence[nn.Parameter], names: Sequence[str], chunk: Chunk) -> dict[int, list[Material]]:
    found: dict[int, list[Material]] = {}
    for at, parameter in enumerate(parameters):
        rows = getattr(parameter, "grad_sample", None)
        if rows is not None or parameter.grad is not None:
            found[at] = [UnitGradients(chunk.units.sum(_whole(rows, parameter.grad, names[at], chunk.units.rows)))]
    return found


@torch.no_grad()
def _whole(rows: Any, gradient: Tensor | None, name: str, count: int) -> Tensor:
    """``rows``, if they are the (R, ...) parts of ``gradient``."""
    if not isinstance(rows, Tensor) or len(rows) != count or gradient is None:
        kind = "none" if rows is None else f"{len(rows)}"
        raise ValueError(f"Opacus gives {kind} gradients of {name} for {count} rows. Use method='auto'.")
    gap, scale = (rows.sum(0) - gradient).norm(), rows.flatten(1).norm(dim=1).sum()
    if bool(gap > _TOLERANCE * scale):  # a comparison with NaN is False: such patients are left out later
        raise ValueError(
            f"Opacus's gradients of {name} do not add up to the whole gradient (they miss {float(gap / scale):.1%} of "
            "it): it misreads the layout of an input. Use method='auto'."
        )
    return rows
