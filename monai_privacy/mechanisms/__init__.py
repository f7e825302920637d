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

"""What makes a release private: clipping, noise and per-row losses. Imports torch, never MONAI."""

from __future__ import annotations

from monai_privacy.mechanisms.clipping import ClippedGradientSum, GradientClipper, clipped_gradient_sum
from monai_privacy.mechanisms.losses import RowLoss
from monai_privacy.mechanisms.noise import InsecureNoise, NoiseSource, SystemNoise

__all__ = [
    "ClippedGradientSum",
    "GradientClipper",
    "InsecureNoise",
    "NoiseSource",
    "RowLoss",
    "SystemNoise",
    "clipped_gradient_sum",
]
