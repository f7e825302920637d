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


"""The report as a page of markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from monai_privacy.report.numbers import rounded_up, rounded_up_percent
from monai_privacy.report.values import PrivacyReport, ReportEntry


def markdown(report: PrivacyReport) -> str:
    """``report`` as markdown."""
    lines = ["# Privacy report", "", _safe(report.claim)]
    if report.risk:
        lines += ["", report.risk_in_words]
    lines += ["", f"Status: **{report.status}**", *(f"- {_safe(reason)}" for reason in report.reasons)]
    if report.entries:
        lines += ["", *table(claim_rows(report))]
    if report.begun:
        lines += ["", f"Begun, with no step recorded and so nothing released: {_names(report.begun)}."]
    for number, entry in enumerate(report.entries, 1):
        lines += [
            "",
            f"## Run {number}: {_safe(entry.purpose) or _safe(entry.entry_id[:8])}",
            "",
            *table(entry_rows(entry)),
        ]
    lines += ["", "## What left without noise", "", *_bullets(unnoised(report), "nothing that the trainer was given")]
    lines += ["", "## What the claim rests on", "", *_bullets(assumptions(report), "nothing beyond the mechanism")]
    lines += ["", "## What it does not protect", "", *_bullets(report.not_covered, "")]
    return "\n".join([*lines, "", made_from(report, "`"), ""])


def claim_rows(report: PrivacyReport) -> list[tuple[str, str]]:
    """The claim's numbers, by name."""
    rows = [
        ("unit", str(report.unit)),
        ("relation", report.relation),
        ("ε", say(report.epsilon)),
        ("δ", f"{report.delta:g}"),
        ("accountant", report.accountant or "none"),
        ("upper bounds", ", ".join(f"{_bound(name)} {say(value)}" for name, value in report.bounds.items())),
        ("ε without amplification, as of a loader that shuffles", say(report.without_amplification)),
    ]
    rows += [(f"ε, {name}", say(value)) for name, value in report.other_units.items()]
    rows += [
        (
            f"best attacker, {float(rate):.1%} false positives".replace(".0%", "%"),
            f"at most {rounded_up_percent(share)}",
        )
        for rate, share in report.risk.items()
    ]
    if report.cohort:
        count = report.cohort["num_units"]
        size = f", {count} {report.cohort['unit']}s registered" if count else ", no ids registered"
        rows.insert(0, ("cohort", f"{report.cohort['name']}{size}"))
    if report.budget:
        rows.append(("budget", f"ε {report.budget['epsilon']:g} at δ {report.budget['delta']:g}"))
        rows.append(("ε with what open runs reserved", say(report.epsilon_reserved)))
    return rows


def entry_rows(entry: ReportEntry) -> list[tuple[str, str]]:
    """A run's numbers, by name."""
    rows = [
        ("entry", f"{entry.entry_id[:8]}, {entry.state}"),
        ("mechanism", entry.mechanism),
        ("sampling, as executed", entry.sampling),
        ("steps recorded", f"{entry.steps} of {entry.planned_steps} planned"),
        (f"ε at δ {entry.delta:g}, this run alone", say(entry.epsilon)),
        ("the same, of all planned steps", say(entry.epsilon_of_planned_steps)),
        ("patients found in the cohort", entry.members),
    ]
    if entry.partition is not None:
        rows.append(("part of the cohort", str(entry.partition)))
    rows += [(name, str(value)) for name, value in entry.facts.items()]
    return rows + [(f"SHA-256, {name}", value[:16]) for name, value in entry.artifacts.items()]


def unnoised(report: PrivacyReport) -> list[str]:
    """What left without noise, each once."""
    return list(dict.fromkeys(item for entry in report.entries for item in entry.unnoised))


def assumptions(report: PrivacyReport) -> list[str]:
    """What the claim rests on, each once."""
    return list(dict.fromkeys(item for entry in report.entries for item in entry.assumptions))


def made_from(report: PrivacyReport, quote: str = "") -> str:
    """Which state of which ledger, by which versions."""
    made_by = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    name = _safe(report.ledger) if quote else report.ledger
    state = f"{quote}{name}{quote} as of line {report.ledger_lines} (SHA-256 {report.ledger_hash[:16]})"
    return f"Made from {state} by {made_by}."


def say(value: float | None) -> str:
    """An ε as the report prints it."""
    return "none" if value is None else rounded_up(value, 4)


def table(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Rows of a markdown table."""
    return ["| | |", "|---|---|", *(f"| {_safe(name)} | {_safe(value)} |" for name, value in rows)]


def _bound(name: str) -> str:
    return name.upper() if name in ("pld", "rdp") else name.replace("pld", "PLD").replace("rdp", "RDP")


def _names(entry_ids: tuple[str, ...]) -> str:
    count = "1 run" if len(entry_ids) == 1 else f"{len(entry_ids)} runs"
    return f"{count} ({', '.join(entry_id[:8] for entry_id in entry_ids)})"


def _bullets(items: Sequence[str] | Mapping[str, None], otherwise: str) -> list[str]:
    return [f"- {_safe(item)}" for item in items] or [otherwise]


def _safe(text: str) -> str:
    """A text from a ledger must not write into the page: no new line, column, tag, link or picture."""
    plain = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*\[\]|!])", r"\\\1", plain)
