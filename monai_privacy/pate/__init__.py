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

__all__ = [
    "INFORMATIVE",
    "PlanAdvice",
    "VotingPlan",
    "advice",
    "epsilon_needed",
    "label_agreement",
    "most_queries",
    "require_informative",
    "teachers_needed",
]
