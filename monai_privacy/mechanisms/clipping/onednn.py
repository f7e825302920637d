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

"""Products of float32 matrices by oneDNN, which torch has for compiled networks and not for its own ``bmm``.

Torch multiplies float32 matrices on a CPU by MKL, which leaves much of an AMD processor unused; convolutions go to oneDNN.
Where per-patient gradients of a convolution are matrix products, they should be no slower than it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from monai_privacy.mechanisms.clipping.units import Units

# So many times as long as it is wide, a matrix is better taken as the second factor, and the product turned.
_LONG = 16


def has_onednn(x: Tensor) -> bool:
    """Whether :func:`onednn_products` can multiply tensors like ``x``."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def onednn_products(gradients: Tensor, inputs: Tensor, units: Units, out: Tensor) -> None:
    """(R, N, L) and (R, L, M) float32 matrices to ``out``, the (P, N, M) sums of their products over each unit's rows."""
    multiply = torch.ops.mkldnn._linear_pointwise.default
    turned = gradients.shape[2] >= _LONG * gradients.shape[1]
    for total, rows in zip(out.unbind(), units.slices(), strict=True):
        for at, (gradient, x) in enumerate(zip(gradients[rows].unbind(), inputs[rows].unbind(), strict=True)):
            one, other = (x.T, gradient) if turned else (gradient, x.T)
            product = multiply(_dense(one), _dense(other), None, "none", [], "")
            product = product.T if turned else product
            if at == 0:
                total.copy_(product)
            else:
                total.add_(product)


def _dense(matrix: Tensor) -> Tensor:
    """With rows or columns side by side: oneDNN refuses some other strides, as those of overlapping tensors."""
    return matrix if matrix.is_contiguous() or matrix.T.is_contiguous() else matrix.contiguous()
