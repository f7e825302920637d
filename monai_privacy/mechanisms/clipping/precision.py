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

"""Full float32 where norms and clipped sums are formed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def full_precision(like: Tensor) -> Iterator[None]:
    """No TF32, nor bfloat16 under a float32 dtype: norm and sum must be of the same numbers, or the bound holds to 1e-3."""
    if like.device.type == "cuda":
        matmul = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False
        try:
            with torch.backends.cudnn.flags(allow_tf32=False):
                yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = matmul
        return
    # set_float32_matmul_precision("medium") lets oneDNN round to bfloat16 on processors that multiply it.
    onednn: Any = torch.backends.mkldnn
    settings = [getattr(onednn, name) for name in ("matmul", "conv") if hasattr(onednn, name)]
    lowered = [setting for setting in settings if setting.fp32_precision not in ("none", "ieee")]
    # What is only inherited goes back to being so: the user may change it above.
    before = [
        "none" if setting.fp32_precision == onednn.fp32_precision else setting.fp32_precision for setting in lowered
    ]
    for setting in lowered:
        setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        for setting, value in zip(lowered, before, strict=True):
            setting.fp32_precision = value
