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
"""MONAI's workflows made private at run time, without an overlay file."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from monai.bundle import ConfigWorkflow
from monai.bundle.utils import merge_kv
from monai.utils import ensure_tuple

from monai_privacy.bundle.findings import PrivacyRequest
from monai_privacy.bundle.overlay import plan_bundle, require_private
from monai_privacy.bundle.reading import read_bundle

__all__ = ["DPConfigWorkflow"]

# Arguments of ConfigWorkflow; all others are values for config ids.
_NOT_CONFIG = (
    "meta_file", "logging_file", "init_id", "run_id", "final_id", "tracking", "workflow_type", "properties_path"
)  # fmt: skip


class DPConfigWorkflow(ConfigWorkflow):
    """A bundle's training, private: ``ConfigWorkflow`` with the overlay that ``python -m monai_privacy overlay`` writes.

    ::

        python -m monai.bundle run_workflow --workflow_name monai_privacy.DPConfigWorkflow \\
            --config_file configs/train.json --epsilon 8

    Args:
        config_file: see ``ConfigWorkflow``; the configs of a training, its multi-GPU overlay included.
        epsilon: see ``PrivacyRequest``, as all arguments down to ``ledger``.
        workflow_kwargs: the other arguments of ``ConfigWorkflow``, and values for config ids, which override those of the
            overlay too.

    Raises:
        ValueError: where something keeps the training from being private, before anything is trained.
    """

    def __init__(
        self,
        config_file: str | Sequence[str],
        *,
        epsilon: float = 8.0,
        delta: float | None = None,
        num_patients: int | None = None,
        expected_batch_size: int | None = None,
        max_grad_norm: float = 1.0,
        unit: Literal["patient", "image"] = "patient",
        patient_key: str = "patient_id",
        patient_table: str | None = None,
        patient_pattern: str | None = None,
        image_key: str = "image",
        batch_norm: Literal["group", "fold"] = "group",
        public_weights: str | None = None,
        sampler: Literal["refuse", "drop"] = "refuse",
        ledger: str | None = None,
        **workflow_kwargs: Any,
    ) -> None:
        request = PrivacyRequest(
            epsilon=epsilon,
            delta=delta,
            num_patients=num_patients,
            expected_batch_size=expected_batch_size,
            max_grad_norm=max_grad_norm,
            unit=unit,
            patient_key=patient_key,
            patient_table=None if patient_table is None else Path(patient_table),
            patient_pattern=patient_pattern,
            image_key=image_key,
            batch_norm=batch_norm,
            public_weights=None if public_weights is None else Path(public_weights),
            sampler=sampler,
            ledger=ledger,
        )
        # The overlay's own numbers, such as privacy#epsilon, exist only after it was merged.
        numbers = {
            name: value for name, value in workflow_kwargs.items() if name.split("#")[0].split("::")[0] == "privacy"
        }
        others = {name: value for name, value in workflow_kwargs.items() if name not in numbers}
        known = read_bundle([Path(one) for one in ensure_tuple(config_file)]).content
        for name in others.keys() - known.keys() - set(_NOT_CONFIG):
            meant = difflib.get_close_matches(name, [one.name for one in fields(PrivacyRequest)], n=1, cutoff=0.8)
            if meant:
                raise ValueError(f"{name} is no argument and no config id, and would be ignored: {meant[0]} was meant?")
        super().__init__(config_file=config_file, **others)
        overrides = {name: value for name, value in others.items() if name not in _NOT_CONFIG}
        config = read_bundle([Path(one) for one in ensure_tuple(config_file)], overrides)
        plan = plan_bundle(config, request)
        require_private(plan)
        if not plan.training:
            raise ValueError(
                "the training is private already, with the numbers of its own plan: epsilon and the others given here would "
                "not be used. Run it with ConfigWorkflow, or leave its overlay out."
            )
        for name, value in (plan.training | numbers).items():
            merge_kv(self.parser, name, value)
