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

"""What every clipping method returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ClippedGradientSum:
    """The sum of clipped gradients, before noise: private until noise is added.

    Args:
        gradients: one tensor for each parameter, in the order of the parameters given, of the parameter's shape.
        norms: (P,) float64 gradient norms of the patients before clipping, in the order of ``unique(patient_index)``;
            not finite where a patient's gradient was not and so counted as zero.
    """

    gradients: tuple[Tensor, ...]
    norms: Tensor

    @classmethod
    def nothing(cls, parameters: Sequence[nn.Parameter], patients: int, device: torch.device) -> ClippedGradientSum:
        """What patients give on whose rows no parameter has any influence."""
        zeros = tuple(torch.zeros_like(parameter) for parameter in parameters)
        return cls(zeros, torch.zeros(patients, dtype=torch.float64, device=device))

    def __add__(self, other: ClippedGradientSum) -> ClippedGradientSum:
        """The sum over both groups of patients; norms one after the other."""
        gradients = tuple(one + more for one, more in zip(self.gradients, other.gradients, strict=True))
        return ClippedGradientSum(gradients, torch.cat([self.norms, other.norms]))
