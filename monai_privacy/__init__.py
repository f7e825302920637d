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

"""Patient-level differential privacy for MONAI: DP-SGD training, one ledger for a cohort, and an honest report."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from monai_privacy.accounting import (
        LedgerError,
        PrivacyBudget,
        PrivacyBudgetError,
        PrivacyLedger,
        dpsgd_event,
        epsilon,
    )
    from monai_privacy.adoption import private_trainer
    from monai_privacy.bundle import DPConfigWorkflow
    from monai_privacy.data import PoissonPatientSampler, count_patients, poisson_loader
    from monai_privacy.data.partition import partition_patients
    from monai_privacy.engines import DPSupervisedTrainer
    from monai_privacy.handlers import PrivacyAccountingHandler, PrivacyProgressHandler, PrivacyReportHandler
    from monai_privacy.mechanisms import GradientClipper, clipped_gradient_sum
    from monai_privacy.mechanisms.confident_voting import ConfidentGNMax
    from monai_privacy.mechanisms.voting import GNMax, LabelVoting, NoisyCount
    from monai_privacy.networks import FixedFeatureClassifier, ResNet9, check_network, convert_batch_norm
    from monai_privacy.opacus_accountant import ledger_accountant
    from monai_privacy.pate.components import PrivateVoted, PrivateVoteHandler
    from monai_privacy.pate.engine import TeacherVoteEvaluator
    from monai_privacy.pate.labelling import VoteLabeller
    from monai_privacy.pate.planning import VotingPlan
    from monai_privacy.pate.students import FixMatchTrainer
    from monai_privacy.pate.teachers import TeacherSet
    from monai_privacy.plan import DPSGDPlan
    from monai_privacy.report import PrivacyReport

# Loaded when first asked for: the command line and the ledger need no torch.
_HOME = {
    "ConfidentGNMax": "mechanisms.confident_voting",
    "DPConfigWorkflow": "bundle",
    "DPSGDPlan": "plan",
    "DPSupervisedTrainer": "engines",
    "FixMatchTrainer": "pate.students",
    "FixedFeatureClassifier": "networks",
    "GNMax": "mechanisms.voting",
    "GradientClipper": "mechanisms",
    "LabelVoting": "mechanisms.voting",
    "LedgerError": "accounting",
    "NoisyCount": "mechanisms.voting",
    "PoissonPatientSampler": "data",
    "PrivacyAccountingHandler": "handlers",
    "PrivacyBudget": "accounting",
    "PrivacyBudgetError": "accounting",
    "PrivacyLedger": "accounting",
    "PrivacyProgressHandler": "handlers",
    "PrivacyReport": "report",
    "PrivacyReportHandler": "handlers",
    "PrivateVoteHandler": "pate.components",
    "PrivateVoted": "pate.components",
    "ResNet9": "networks",
    "TeacherSet": "pate.teachers",
    "TeacherVoteEvaluator": "pate.engine",
    "VoteLabeller": "pate.labelling",
    "VotingPlan": "pate.planning",
    "check_network": "networks",
    "clipped_gradient_sum": "mechanisms",
    "convert_batch_norm": "networks",
    "count_patients": "data",
    "dpsgd_event": "accounting",
    "epsilon": "accounting",
    "ledger_accountant": "opacus_accountant",
    "partition_patients": "data.partition",
    "poisson_loader": "data",
    "private_trainer": "adoption",
}

__all__ = [
    "ConfidentGNMax",
    "DPConfigWorkflow",
    "DPSGDPlan",
    "DPSupervisedTrainer",
    "FixMatchTrainer",
    "FixedFeatureClassifier",
    "GNMax",
    "GradientClipper",
    "LabelVoting",
    "LedgerError",
    "NoisyCount",
    "PoissonPatientSampler",
    "PrivacyAccountingHandler",
    "PrivacyBudget",
    "PrivacyBudgetError",
    "PrivacyLedger",
    "PrivacyProgressHandler",
    "PrivacyReport",
    "PrivacyReportHandler",
    "PrivateVoteHandler",
    "PrivateVoted",
    "ResNet9",
    "TeacherSet",
    "TeacherVoteEvaluator",
    "VoteLabeller",
    "VotingPlan",
    "check_network",
    "clipped_gradient_sum",
    "convert_batch_norm",
    "count_patients",
    "dpsgd_event",
    "epsilon",
    "ledger_accountant",
    "partition_patients",
    "poisson_loader",
    "private_trainer",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
