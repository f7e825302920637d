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

"""The sum of the patients' gradients, each clipped once: the only thing that DP-SGD takes from private data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from monai_privacy.mechanisms.clipping.clipper import ClippingMethod, GradientClipper
from monai_privacy.mechanisms.clipping.explanation import ClippingExplanation, LayerCost, explain_clipping
from monai_privacy.mechanisms.clipping.result import ClippedGradientSum

__all__ = [
    "ClippedGradientSum",
    "ClippingExplanation",
    "ClippingMethod",
    "GradientClipper",
    "LayerCost",
    "clipped_gradient_sum",
    "explain_clipping",
]


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
    observe: Callable[[Any, Tensor], None] | None = None,
    method: ClippingMethod = "auto",
) -> ClippedGradientSum:
    """Sum the gradients of a batch, each patient's clipped once.

    All rows of a patient, whatever images, crops or augmented views they are, make one gradient. A patient whose
    gradient is not finite counts as zero. The network is never called for no rows. For more than one batch make a
    :class:`GradientClipper`, which remembers the fastest way through a network.

    Args:
        network: any module; buffers that it updates in forward are not covered by the guarantee (see
            ``networks.check_network``).
        loss_function: ``loss_function(outputs, targets)``; made a loss for each row by ``RowLoss``.
        batch: inputs and targets, B rows each.
        patient_index: (B,) integers, one a row; need not be sorted or start at zero.
        max_grad_norm: L2 bound C on one patient's total gradient.
        parameters: what to differentiate; the network's trainable parameters where None.
        row_weights: (B,) factors on the rows' losses that depend on nothing but the patient's own rows; ones where
            None, so that a patient's gradient is the sum over their rows.
        max_physical_batch_size: most rows in one call of the network; does not change the result.
        forward: ``forward(inputs, rows)`` for these inputs, rows (R,) of the batch, in place of ``network(inputs)``. It
            is also called for synthetic inputs, and again where the fast method has to be given up.
        observe: ``observe(outputs, rows)`` is shown what the network gave for each row, once.
        method: see :class:`GradientClipper`.

    Returns:
        The sum, of the parameters' shapes, dtype and device, and the norms before clipping.

    Guarantee: adding or removing one patient moves the sum by at most C in L2.
    Reference: Abadi et al. 2016, Algorithm 1; Charles et al. 2024 for several rows a patient.
    """
    clipper = GradientClipper(network, loss_function, parameters=parameters, method=method)
    return clipper(
        batch,
        patient_index,
        max_grad_norm,
        row_weights=row_weights,
        max_physical_batch_size=max_physical_batch_size,
        forward=forward,
        observe=observe,
    )
