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


"""What a cohort's ledger allows to claim, for a board, a clinician and a program."""

from __future__ import annotations

from monai_privacy.report.making import report_on
from monai_privacy.report.numbers import rounded_up
from monai_privacy.report.values import PrivacyReport, ReportEntry

__all__ = ["PrivacyReport", "ReportEntry", "report_on", "rounded_up"]
