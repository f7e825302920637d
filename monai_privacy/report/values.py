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


"""A report as a value: what is claimed, of what, on which grounds, and what is left out."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from monai_privacy.accounting.ledger import PrivacyLedger
from monai_privacy.report.numbers import odds_factor, rounded_up, rounded_up_percent

SCHEMA = "monai_privacy.report/2"
NOTHING, NOT_PRIVATE = "nothing released", "not private"
FORMAL, NETWORK_ALONE = "formal, with assumptions", "formal for the network alone"
DELTA_TOO_LARGE = "no protection: delta is too large"
# Above the first, where odds may nearly triple, "learns little" would be a lie; above the second the bound says nothing.
_LITTLE, _LIMITED = 1.0, 10.0


@dataclass(frozen=True)
class ReportEntry:
    """One run in the report; see :class:`~monai_privacy.accounting.ledger_state.LedgerEntry` for the fields.

    Args:
        sampling: how its batches were drawn, as executed.
        event: what it released, as typed JSON.
    """

    entry_id: str
    purpose: str
    state: str
    mechanism: str
    sampling: str
    epsilon: float | None
    epsilon_of_planned_steps: float | None
    delta: float
    steps: int
    planned_steps: int
    partition: int | None
    members: str
    event: Mapping[str, Any]
    facts: Mapping[str, Any]
    unnoised: tuple[str, ...]
    assumptions: tuple[str, ...]
    not_private: tuple[str, ...]
    artifacts: Mapping[str, str]


@dataclass(frozen=True)
class PrivacyReport:
    """The claim of a ledger, what it rests on and what it leaves out.

    ``str(report)`` is markdown; :meth:`to_json` the same facts for programs, by a published schema
    (``monai_privacy/report/privacy_report.schema.json``); :meth:`to_html` a page with pictures for a board. The fields
    follow Ponomareva et al. 2023, Section 5.3, and NIST SP 800-226.

    Args:
        status: "formal, with assumptions"; "formal for the network alone", where something else left without noise;
            "no protection: delta is too large"; "not private"; or "nothing released".
        reasons: why the status is no better.
        unit: "patient" or "image"; None while nothing was released.
        epsilon: ε at ``delta`` of everything on the ledger together; None where nothing holds.
        delta: the δ of the claim: the budget's, else the smallest of the runs.
        accountant: whose bound ε is.
        bounds: all valid bounds; None where nothing holds.
        budget: what the cohort may spend, where a budget was set.
        epsilon_reserved: ε of what was released and what open runs may still release.
        without_amplification: ε for a loader that shuffled instead of drawing; None for adaptive budgets.
        other_units: ε for one image of a patient, or for patients with several images, by name.
        risk: the best attacker's true-positive rate at false-positive rates of 0.1 % and 1 %.
        risk_curve: the same at many, as pairs of false- and true-positive rate.
        entries: the runs that released something.
        cohort: what was registered.
        ledger_lines: how many lines the ledger had.
        ledger_hash: SHA-256 of the last of them.
        begun: names of the runs that began and have no step recorded: they released nothing.
        versions: of the packages that made this report.
    """

    ledger: str
    status: str
    reasons: tuple[str, ...]
    unit: str | None
    epsilon: float | None
    delta: float | None
    accountant: str | None
    bounds: Mapping[str, float | None]
    budget: Mapping[str, float] | None
    epsilon_reserved: float | None
    without_amplification: float | None
    other_units: Mapping[str, float | None]
    risk: Mapping[str, float]
    risk_curve: tuple[tuple[float, float], ...]
    entries: tuple[ReportEntry, ...]
    not_covered: tuple[str, ...]
    cohort: Mapping[str, Any] | None
    ledger_lines: int
    ledger_hash: str
    begun: tuple[str, ...]
    versions: Mapping[str, str] = field(default_factory=dict)
    relation: str = "add or remove one unit"

    @classmethod
    def from_ledger(cls, ledger: PrivacyLedger | str | os.PathLike[str]) -> PrivacyReport:
        """The report on ``ledger``, or on the ledger file of that path; writes nothing.

        Raises:
            LedgerError: where the ledger is damaged.
            FileNotFoundError: where there is no such file.
        """
        from monai_privacy.report.making import report_on

        return report_on(ledger.path if isinstance(ledger, PrivacyLedger) else ledger)

    @property
    def claim(self) -> str:
        """The claim in one or two sentences that need no mathematics."""
        if self.status == NOTHING:
            return "Nothing was released about this cohort."
        if self.epsilon is None or self.delta is None:
            reasons = "; ".join(self.reasons)
            return f"No privacy is claimed{': ' + reasons if reasons else ''}."
        if self.status == DELTA_TOO_LARGE:
            return (
                f"No protection is claimed: δ = {self.delta:g} is at or above 1 / number of {self.unit}s, and publishing "
                f"one {self.unit} whole could meet it."
            )
        released = "the trained network" if len(self.entries) == 1 else f"all {len(self.entries)} runs together"
        if len(self.entries) == 1 and self.entries[0].facts.get("max_grad_norm") is None:
            released = "what was released"
        limited = "can learn only so much" if self.epsilon <= _LIMITED else "may learn"
        learns = "learns little" if self.epsilon <= _LITTLE else limited
        whose = "any one patient's data were" if self.unit == "patient" else "any one image was"
        text = (
            f"Whoever sees {released} {learns} about whether {whose} used: the odds change by a factor of at most "
            f"{odds_factor(self.epsilon)} (ε = {rounded_up(self.epsilon, 2)}), but for a chance of δ = {self.delta:g}."
        )
        if self.unit == "image":
            text += " This protects single images: a patient with several images is protected less, or hardly at all."
        if self.epsilon_reserved is not None and self.epsilon_reserved > self.epsilon:
            text += (
                " A run has not ended: what it lets out, or saved, after this report was written may cost up to "
                f"ε = {rounded_up(self.epsilon_reserved, 2)} together with the rest."
            )
        return text

    @property
    def risk_in_words(self) -> str:
        """What the claim means for an attacker who guesses who was in the data; empty where nothing holds."""
        if not self.risk:
            return ""
        return (
            f"An attacker who wrongly suspects 1 in 1,000 {self.unit}s that were not used recognises at most "
            f"{rounded_up_percent(self.risk['0.001'])} of those that were; one who wrongly suspects 1 in 100, at most "
            f"{rounded_up_percent(self.risk['0.01'])}."
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {"schema": SCHEMA, "claim": self.claim, "risk_in_words": self.risk_in_words} | asdict(self)

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False, ensure_ascii=False)

    def to_markdown(self) -> str:
        """The report as a page of markdown."""
        from monai_privacy.report.markdown import markdown

        return markdown(self)

    def to_html(self) -> str:
        """The report as one HTML page with its pictures in it, for any browser, without a network."""
        from monai_privacy.report.html import html

        return html(self)

    def to_registry(self, **known: Any) -> dict[str, Any]:
        """A draft entry for the Differential Privacy Deployments Registry; see :func:`.registry.registry_entry`."""
        from monai_privacy.report.registry import registry_entry

        return registry_entry(self, **known)

    def write(self, folder: str | os.PathLike[str], *, html: bool = True) -> tuple[Path, ...]:
        """Write ``privacy_report.json``, ``.md`` and ``.html`` into ``folder``, made where missing.

        Args:
            folder: where to.
            html: leave the page out where False, since it takes the longest.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        texts = {"json": self.to_json(), "md": self.to_markdown()} | ({"html": self.to_html()} if html else {})
        paths = []
        for ending, text in texts.items():
            path = target / f"privacy_report.{ending}"
            path.write_text(text, encoding="utf-8")
            paths.append(path)
        return tuple(paths)

    def __str__(self) -> str:
        return self.to_markdown()

    def _repr_markdown_(self) -> str:  # what a notebook shows
        return self.to_markdown()
