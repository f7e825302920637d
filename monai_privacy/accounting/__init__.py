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

"""Numbers only: events say what was released, accountants judge them, the ledger remembers. Imports no torch."""

from __future__ import annotations

from monai_privacy.accounting.accountants import EpsilonBounds, affordable_steps, epsilon, epsilon_bounds
from monai_privacy.accounting.calibration import calibrate_noise_multiplier
from monai_privacy.accounting.events import dpsgd_event, event_from_dict, event_to_dict
from monai_privacy.accounting.ledger import LedgerEntry, PrivacyLedger
from monai_privacy.accounting.ledger_file import LedgerError
from monai_privacy.accounting.values import PrivacyBudget, PrivacyBudgetError

__all__ = [
    "EpsilonBounds",
    "LedgerEntry",
    "LedgerError",
    "PrivacyBudget",
    "PrivacyBudgetError",
    "PrivacyLedger",
    "affordable_steps",
    "calibrate_noise_multiplier",
    "dpsgd_event",
    "epsilon",
    "epsilon_bounds",
    "event_from_dict",
    "event_to_dict",
]
