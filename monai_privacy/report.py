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

"""What a run may claim, recomputed from the ledger alone."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from decimal import ROUND_CEILING, Context, Decimal
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dp_accounting import dp_event
from dp_accounting.dp_event import DpEvent

from monai_privacy.accounting import accountants
from monai_privacy.accounting.events import composed
from monai_privacy.accounting.ledger import LedgerEntry, PrivacyLedger

_GROUP_SIZES = (2, 5, 10)
_DELTA_TOO_LARGE = "no protection: delta is too large"
# Above the first, where odds may nearly triple, "learns little" would be a lie; above the second the bound says nothing.
_LITTLE, _LIMITED = 1.0, 10.0
_NOT_COVERED = (
    "hyper-parameters that were chosen by looking at these patients",
    "statistics fitted on these patients, such as class weights or normalisation constants",
    "that the cohort exists, and who is in it by other sources",
    "a patient who appears under two ids",
    "whoever can read the memory or the disk of the training machine",
    "labels and images that were public anyway",
    "validation and test patients: their images were used without noise",
    "releases about the same patients that are not in this ledger",
)
_PACKAGES = ("monai-privacy", "dp-accounting", "monai", "torch")


@dataclass(frozen=True)
class ReportEntry:
    """One run in the report; see :class:`~monai_privacy.accounting.ledger.LedgerEntry` for the fields."""

    entry_id: str
    mechanism: str
    epsilon: float | None
    epsilon_of_planned_steps: float | None
    delta: float
    steps: int
    planned_steps: int
    facts: Mapping[str, Any]
    unnoised: tuple[str, ...]
    assumptions: tuple[str, ...]
    not_private: tuple[str, ...]


@dataclass(frozen=True)
class PrivacyReport:
    """The claim of a ledger, what it rests on and what it leaves out.

    ``str(report)`` is markdown; :meth:`to_json` the same facts for programs.

    Args:
        status: "formal, with assumptions"; "formal for the network alone", where something else left without noise;
            "no protection: delta is too large"; "not private"; or "nothing released".
        unit: "patient" or "image"; None while nothing was released.
        epsilon: ε at ``delta`` of everything on the ledger together; None where nothing holds.
        delta: the δ of the claim: the budget's, else the smallest of the runs.
        accountant: whose bound ε is.
        bounds: both valid bounds; None where nothing holds.
        budget: what the cohort may spend, where a budget was set.
        group_epsilon: for image-level runs, ε for a patient with that many images; None where nothing holds.
        entries: the runs that released something.
        ledger_lines: how many lines the ledger had.
        ledger_hash: SHA-256 of the last of them.
        begun: names of the runs that began and have no step recorded: they released nothing.
        versions: of the packages that made this report.
    """

    ledger: str
    status: str
    unit: str | None
    epsilon: float | None
    delta: float | None
    accountant: str | None
    bounds: Mapping[str, float | None]
    budget: Mapping[str, float] | None
    group_epsilon: Mapping[int, float | None]
    entries: tuple[ReportEntry, ...]
    not_covered: tuple[str, ...] = _NOT_COVERED
    relation: str = "add or remove one unit"
    ledger_lines: int = 0
    ledger_hash: str = ""
    begun: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=lambda: _versions())

    @classmethod
    def from_ledger(cls, ledger: PrivacyLedger | str | os.PathLike[str]) -> PrivacyReport:
        """The report on ``ledger``, or on the ledger file of that path.

        Raises:
            LedgerError: where the ledger is damaged.
            FileNotFoundError: where there is no such file.
        """
        if not isinstance(ledger, PrivacyLedger):
            if not Path(ledger).is_file():
                raise FileNotFoundError(f"{ledger} is no ledger file: name the ledger that the training wrote.")
            ledger = PrivacyLedger(ledger)
        known = ledger.entries
        entries = tuple(entry for entry in known if entry.steps)
        lines, last_hash = ledger.head
        budget = ledger.budget
        state: dict[str, Any] = {
            "ledger": Path(ledger.path).name,
            "budget": asdict(budget) if budget else None,
            "ledger_lines": lines,
            "ledger_hash": last_hash,
            "begun": tuple(entry.entry_id for entry in known if not entry.steps),
        }
        if not entries:
            return cls(
                status="nothing released",
                unit=None,
                epsilon=None,
                delta=None,
                accountant=None,
                bounds={},
                group_epsilon={},
                entries=(),
                **state,
            )
        delta = budget.delta if budget else min(entry.delta for entry in entries)
        # Of these entries, not of the ledger: another process may be adding to it.
        event = composed(entry.event for entry in entries)
        bounds = accountants.epsilon_bounds(event, delta)
        holds = math.isfinite(bounds.epsilon) and not any(entry.not_private for entry in entries)
        sizes = _GROUP_SIZES if entries[0].unit == "image" else ()
        groups = {k: _finite(accountants.group_epsilon(event, delta, k)) if holds else None for k in sizes}
        return cls(
            status=_status(entries, delta) if holds else "not private",
            unit=entries[0].unit,
            epsilon=bounds.epsilon if holds else None,
            delta=delta,
            accountant=bounds.accountant if holds else None,
            bounds={
                "pld": _finite(bounds.pld) if holds else None,
                "rdp": _finite(bounds.rdp) if holds else None,
            },
            group_epsilon=groups,
            entries=tuple(_report_entry(entry) for entry in entries),
            **state,
        )

    @property
    def claim(self) -> str:
        """The claim in one or two sentences."""
        if self.status == "nothing released":
            return "Nothing was released about this cohort."
        reasons = "; ".join(dict.fromkeys(reason for entry in self.entries for reason in entry.not_private))
        if self.epsilon is None or self.delta is None:
            return f"No privacy is claimed{': ' + reasons if reasons else ''}."
        if self.status == _DELTA_TOO_LARGE:
            return (
                f"No protection is claimed: δ = {self.delta:g} is at or above 1 / number of {self.unit}s, and publishing "
                f"one {self.unit} whole could meet it."
            )
        released = "the trained network" if len(self.entries) == 1 else f"all {len(self.entries)} runs together"
        limited = "can learn only so much" if self.epsilon <= _LIMITED else "may learn"
        learns = "learns little" if self.epsilon <= _LITTLE else limited
        whose = "any one patient's data were" if self.unit == "patient" else "any one image was"
        text = (
            f"Whoever sees {released} {learns} about whether {whose} used: the odds change by a factor of at most "
            f"{_factor(self.epsilon)} (ε = {rounded_up(self.epsilon, 2)}), but for a chance of δ = {self.delta:g}."
        )
        if self.unit == "image":
            text += " This protects single images: a patient with several images is protected less, or hardly at all."
        return text

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        data = asdict(self)
        data["group_epsilon"] = {str(size): value for size, value in self.group_epsilon.items()}
        return {"schema": 1, "claim": self.claim} | data

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False, ensure_ascii=False)

    def to_markdown(self) -> str:
        """The report as a page of markdown."""
        lines = ["# Privacy report", "", self.claim, "", f"Status: **{self.status}**"]
        if self.entries:
            lines += ["", *_claim_table(self)]
        if self.begun:
            lines += ["", f"Begun, with no step recorded and so nothing released: {_names(self.begun)}."]
        for number, entry in enumerate(self.entries, 1):
            lines += ["", f"## Run {number}: {entry.entry_id[:8]}", "", *_entry_table(entry)]
        unnoised = dict.fromkeys(item for entry in self.entries for item in entry.unnoised)
        assumptions = dict.fromkeys(item for entry in self.entries for item in entry.assumptions)
        lines += ["", "## What left without noise", "", *_bullets(unnoised, "nothing that the trainer was given")]
        lines += ["", "## What the claim rests on", "", *_bullets(assumptions, "nothing beyond the mechanism")]
        lines += ["", "## What it does not protect", "", *_bullets(dict.fromkeys(self.not_covered), "")]
        made_by = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        state = f"`{self.ledger}` as of line {self.ledger_lines} (SHA-256 {self.ledger_hash[:16]})"
        return "\n".join([*lines, "", f"Made from {state} by {made_by}.", ""])

    def write(self, folder: str | os.PathLike[str]) -> tuple[Path, Path]:
        """Write ``privacy_report.json`` and ``privacy_report.md`` into ``folder``, made where missing."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        paths = target / "privacy_report.json", target / "privacy_report.md"
        for path, text in zip(paths, (self.to_json(), self.to_markdown()), strict=True):
            path.write_text(text, encoding="utf-8")
        return paths

    def __str__(self) -> str:
        return self.to_markdown()

    def _repr_markdown_(self) -> str:  # what a notebook shows
        return self.to_markdown()


def _claim_table(report: PrivacyReport) -> list[str]:
    rows: list[tuple[str, str]] = [
        ("unit", str(report.unit)),
        ("relation", report.relation),
        ("ε", _say(report.epsilon)),
        ("δ", f"{report.delta:g}"),
        ("accountant", report.accountant or "none"),
        ("upper bounds", ", ".join(f"{name.upper()} {_say(value)}" for name, value in report.bounds.items())),
    ]
    if report.budget:
        rows.append(("budget", f"ε {report.budget['epsilon']:g} at δ {report.budget['delta']:g}"))
    rows += [(f"ε, patient with {size} images", _say(value)) for size, value in report.group_epsilon.items()]
    return _table(rows)


def _entry_table(entry: ReportEntry) -> list[str]:
    rows = [
        ("mechanism", entry.mechanism),
        ("steps recorded", f"{entry.steps} of {entry.planned_steps} planned"),
        (f"ε at δ {entry.delta:g}, this run alone", _say(entry.epsilon)),
        ("the same, of all planned steps", _say(entry.epsilon_of_planned_steps)),
        *((name, str(value)) for name, value in entry.facts.items()),
    ]
    return _table(rows)


def _names(entry_ids: tuple[str, ...]) -> str:
    count = "1 run" if len(entry_ids) == 1 else f"{len(entry_ids)} runs"
    return f"{count} ({', '.join(entry_id[:8] for entry_id in entry_ids)})"


def _table(rows: list[tuple[str, str]]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]


def _bullets(items: Mapping[str, None], otherwise: str) -> list[str]:
    return [f"- {item}" for item in items] or [otherwise]


def _say(value: float | None) -> str:
    return "none" if value is None else rounded_up(value, 4)


def rounded_up(value: float, decimals: int) -> str:
    """``value`` with so many decimals: a bound may be stated larger than it is, never smaller."""
    if not math.isfinite(value):
        return str(value)
    return str(Decimal(repr(value)).quantize(Decimal(f"1e-{decimals}"), ROUND_CEILING, Context(prec=400)))


def _factor(epsilon: float) -> str:
    """e^ε, rounded up to three digits, or to a power of ten where it is astronomical."""
    if epsilon > 50:
        return f"10^{math.ceil(epsilon / math.log(10))}"
    return f"{float(Context(prec=3, rounding=ROUND_CEILING).create_decimal(repr(math.exp(epsilon)))):.3g}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _status(entries: tuple[LedgerEntry, ...], delta: float) -> str:
    if any(entry.not_private for entry in entries):
        return "not private"
    if any(delta * int(entry.facts.get("num_patients", 1)) >= 1 for entry in entries):
        return _DELTA_TOO_LARGE
    if any(item.startswith("training") for entry in entries for item in entry.unnoised):
        return "formal for the network alone"
    return "formal, with assumptions"


def _mechanism(step: DpEvent) -> str:
    if isinstance(step, dp_event.PoissonSampledDpEvent):
        return "Gaussian noise on a Poisson draw, each unit on its own coin (DP-SGD)"
    return "Gaussian noise, no sampling" if isinstance(step, dp_event.GaussianDpEvent) else type(step).__name__


def _report_entry(entry: LedgerEntry) -> ReportEntry:
    planned = dp_event.SelfComposedDpEvent(entry.step, entry.planned_steps)
    alone = math.inf if entry.not_private else accountants.epsilon(entry.event, entry.delta)
    return ReportEntry(
        entry_id=entry.entry_id,
        mechanism=_mechanism(entry.step),
        epsilon=_finite(alone),
        epsilon_of_planned_steps=None if entry.not_private else _finite(accountants.epsilon(planned, entry.delta)),
        delta=entry.delta,
        steps=entry.steps,
        planned_steps=entry.planned_steps,
        facts=dict(entry.facts),
        unnoised=entry.unnoised,
        assumptions=entry.assumptions,
        not_private=entry.not_private,
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a source tree that was not installed
            found[name] = "not installed"
    return found
