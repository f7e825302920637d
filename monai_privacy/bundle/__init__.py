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
"""MONAI bundles: run them from Python, and make those that somebody else wrote private."""

from __future__ import annotations

from monai_privacy.bundle.findings import Finding, PrivacyRequest
from monai_privacy.bundle.overlay import BundlePlan, plan_bundle, require_private, write_overlays
from monai_privacy.bundle.reading import BundleConfig, read_bundle
from monai_privacy.bundle.running import Scores, score_bundle, train_bundle
from monai_privacy.bundle.workflow import DPConfigWorkflow

__all__ = [
    "BundleConfig",
    "BundlePlan",
    "DPConfigWorkflow",
    "Finding",
    "PrivacyRequest",
    "Scores",
    "plan_bundle",
    "read_bundle",
    "require_private",
    "score_bundle",
    "train_bundle",
    "write_overlays",
]
