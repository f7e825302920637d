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


"""The report as one page of HTML, for any browser, on paper too: no script, nothing loaded from anywhere."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from monai_privacy.report.markdown import assumptions, claim_rows, entry_rows, made_from, unnoised
from monai_privacy.report.numbers import rounded_up
from monai_privacy.report.pictures import budget_picture, risk_picture
from monai_privacy.report.values import DELTA_TOO_LARGE, NOT_PRIVATE, PrivacyReport

_HERE = Path(__file__).parent


def html(report: PrivacyReport) -> str:
    """``report`` as a page; whatever a ledger says is text in it, never markup."""
    holds = report.status not in (NOT_PRIVATE, DELTA_TOO_LARGE) and report.epsilon is not None
    return _template().render(
        report=report,
        holds=holds,
        headline=f"ε {rounded_up(report.epsilon, 2)}" if holds and report.epsilon is not None else report.status,
        rows=claim_rows(report) if report.entries else [],
        entries=[(entry, entry_rows(entry)) for entry in report.entries],
        unnoised=unnoised(report),
        assumptions=assumptions(report),
        risk=risk_picture(report) if holds and report.risk_curve else "",
        budget=budget_picture(report) if holds else "",
        made_from=made_from(report),
    )


@lru_cache(maxsize=1)
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.jinja")
