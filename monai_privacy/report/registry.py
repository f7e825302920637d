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


"""A draft entry for the Differential Privacy Deployments Registry."""

from __future__ import annotations

import re
from typing import Any

from monai_privacy.report.markdown import assumptions, unnoised
from monai_privacy.report.numbers import rounded_up
from monai_privacy.report.values import PrivacyReport

# What no ledger can know. Each stays as it is in the draft until somebody writes it.
_UNKNOWN = "TO BE WRITTEN"


def registry_entry(
    report: PrivacyReport,
    *,
    name: str | None = None,
    curators: tuple[str, ...] = (_UNKNOWN,),
    description: str = _UNKNOWN,
    intended_use: str = _UNKNOWN,
    region: str = _UNKNOWN,
    publication_date: str = "1970-01-01",
    authors: tuple[str, ...] = (_UNKNOWN,),
) -> dict[str, Any]:
    """What of ``report`` fits the registry's schema; the rest is to be written by hand.

    Args:
        report: a report with a claim.
        name: of the model; that of the cohort where None.
        curators: who publishes it.
        description: of the model.
        intended_use: of the model.
        region: whose law applies.
        publication_date: YYYY-MM-DD.
        authors: who fills in the entry.

    Raises:
        ValueError: where the report claims nothing.

    Reference: arXiv:2509.13509; github.com/opendp/deployments-registry-data, schemas/deployments-schema.yaml.
    """
    if report.epsilon is None or report.delta is None:
        raise ValueError(f"the report says {report.status!r}: there is no claim that could be registered.")
    title = name or (report.cohort["name"] if report.cohort else report.ledger)
    unit = f"{report.unit}-level"
    mechanisms = dict.fromkeys(f"{entry.mechanism}; sampling: {entry.sampling}" for entry in report.entries)
    versions = ", ".join(f"{package} {number}" for package, number in report.versions.items())
    left = unnoised(report)
    return {
        "url_slug": re.sub(r"[^a-z0-9]+", "-", str(title).lower()).strip("-") or "model",
        "status": "Draft",
        "tier": 3,
        "deployment": {
            "basic": {
                "name": title,
                "data_curators": list(curators),
                "intended_use": intended_use,
                "data_product_type": "Machine learning model",
                "data_product_region": region,
                "description": description,
                "publication_date": publication_date,
                "data_product_sector": "Healthcare",
            },
            "dp_variant": {
                "variant_name": "Approximate DP",
                "data_domain": f"medical images with the {report.unit} that each belongs to",
                "unprotected_quantities": "; ".join(left) or "none that the trainer was given",
            },
            "privacy_loss": {
                "privacy_unit": unit,
                "privacy_unit_details": f"neighbours: {report.relation}, with all that the {report.unit} has",
                "privacy_parameters": {"epsilon": float(rounded_up(report.epsilon, 4)), "delta": report.delta},
                "privacy_parameters_details": f"{report.claim} {report.risk_in_words}".strip(),
            },
            "deployment_model": {
                "model_name": "Central",
                "release_type": "One release" if len(report.entries) == 1 else "Many releases",
                "data_source_type": "Static",
                "access_type": "Non-interactive",
            },
            "accounting": {
                "composition": f"{report.accountant}, of all {len(report.entries)} runs on the cohort's ledger together",
            },
            "implementation": {
                "preprocessing_and_hyperparameter_tuning": "Not covered: " + "; ".join(report.not_covered),
                "mechanisms": "; ".join(mechanisms) + f". Made by {versions}.",
                "justification": "Assumptions: " + ("; ".join(assumptions(report)) or "none beyond the mechanism"),
            },
            "administrative": {"registry_authors": list(authors)},
        },
    }
