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
from monai_privacy.accounting.calibration import calibrate_batch_size, calibrate_noise_multiplier, calibrate_steps
from monai_privacy.accounting.cohort import Cohort
from monai_privacy.accounting.event_json import event_from_dict, event_to_dict
from monai_privacy.accounting.events import (
    capped_images_event,
    dpsgd_event,
    gaussian_event,
    gnmax_event,
    label_votes_event,
    laplace_event,
    lnmax_event,
    noisy_count_event,
    smooth_release_event,
    truncated_dpsgd_event,
    tuning_event,
    vote_threshold_event,
)
from monai_privacy.accounting.ledger import PrivacyLedger, WhatIf
from monai_privacy.accounting.ledger_calibration import calibrate_noise_for_ledger
from monai_privacy.accounting.ledger_file import LedgerError
from monai_privacy.accounting.ledger_state import LedgerEntry, LedgerState
from monai_privacy.accounting.risk import true_positive_rates
from monai_privacy.accounting.values import PrivacyBudget, PrivacyBudgetError

__all__ = [
    "Cohort",
    "EpsilonBounds",
    "LedgerEntry",
    "LedgerError",
    "LedgerState",
    "PrivacyBudget",
    "PrivacyBudgetError",
    "PrivacyLedger",
    "WhatIf",
    "affordable_steps",
    "calibrate_batch_size",
    "calibrate_noise_for_ledger",
    "calibrate_noise_multiplier",
    "calibrate_steps",
    "capped_images_event",
    "dpsgd_event",
    "epsilon",
    "epsilon_bounds",
    "event_from_dict",
    "event_to_dict",
    "gaussian_event",
    "gnmax_event",
    "label_votes_event",
    "laplace_event",
    "lnmax_event",
    "noisy_count_event",
    "smooth_release_event",
    "true_positive_rates",
    "truncated_dpsgd_event",
    "tuning_event",
    "vote_threshold_event",
]
