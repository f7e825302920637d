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

"""Private aggregation of teacher ensembles (PATE). The planner comes first: it needs numbers only, and imports no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from monai_privacy.pate.planning import (
    INFORMATIVE,
    PlanAdvice,
    VotingPlan,
    advice,
    epsilon_needed,
    label_agreement,
    most_queries,
    require_informative,
    teachers_needed,
)

if TYPE_CHECKING:
    from monai_privacy.pate.students import FixMatchTrainer, pseudo_label_loss, split_answers

# Loaded when first asked for: they need torch.
_HOME = {
    "FixMatchTrainer": "students",
    "pseudo_label_loss": "students",
    "split_answers": "students",
}

__all__ = [
    "INFORMATIVE",
    "FixMatchTrainer",
    "PlanAdvice",
    "VotingPlan",
    "advice",
    "epsilon_needed",
    "label_agreement",
    "most_queries",
    "pseudo_label_loss",
    "require_informative",
    "split_answers",
    "teachers_needed",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
