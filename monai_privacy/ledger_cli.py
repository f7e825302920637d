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


"""``python -m monai_privacy ledger``: what a data steward asks of a ledger."""

from __future__ import annotations

import csv
import json
import math
import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from monai_privacy.accounting import (
    LedgerEntry,
    LedgerState,
    PrivacyBudget,
    PrivacyLedger,
    calibrate_noise_for_ledger,
    dpsgd_event,
    event_to_dict,
)
from monai_privacy.accounting.ledger_file import LedgerFile
from monai_privacy.plan import DPSGDPlan
from monai_privacy.report import PrivacyReport, rounded_up

# Beside 0, 1 for a fault of the program and 2 for bad input: the answer is no.
NO = 3

app = typer.Typer(help="Register a cohort, ask what it has spent, and check a ledger.", no_args_is_help=True)

LedgerPath = Annotated[Path, typer.Argument(help="The ledger file.")]
EntryName = Annotated[str, typer.Argument(help="The run, or how its name begins.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


class ExportFormat(StrEnum):
    """What ``ledger export`` can write."""

    json = "json"
    csv = "csv"
    registry = "registry"


@app.command()
def register(
    ledger: LedgerPath,
    cohort: Annotated[str, typer.Option(help="Name of the cohort, for people.")],
    epsilon: Annotated[float, typer.Option(help="The ε that all releases together may cost.")],
    delta: Annotated[float, typer.Option(help="The δ of it, well below 1 / number of patients.")],
    ids: Annotated[Path | None, typer.Option(help="A text file with one patient id a line.")] = None,
    unit: Annotated[str, typer.Option(help='Whose data one unit is: "patient" or "image".')] = "patient",
    adaptive: Annotated[
        bool, typer.Option("--adaptive", help="Hold the budget even where runs are chosen by what earlier ones gave.")
    ] = False,
    partitions: Annotated[int, typer.Option(help="Disjoint parts that runs may be confined to.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Make the ledger of a cohort, with its budget."""
    known = None
    if ids is not None:
        if not ids.is_file():
            raise FileNotFoundError(f"{ids} does not exist. Name a text file with one patient id a line.")
        known = _ids_in(ids)
    book = PrivacyLedger.register(
        ledger, cohort=cohort, budget=PrivacyBudget(epsilon, delta), ids=known, unit=unit, adaptive=adaptive,
        partitions=partitions,
    )  # fmt: skip
    assert book.cohort is not None
    if as_json:
        print(json.dumps(asdict(book.cohort)))
        return
    count = f"{book.cohort.num_units} {unit}s" if book.cohort.num_units else f"{unit}s not listed, so no run is checked"
    print(f"registered {cohort!r} in {ledger}: {count}; budget ε = {epsilon:g} at δ = {delta:g}")


@app.command()
def status(
    ledger: LedgerPath,
    delta: Annotated[float | None, typer.Option(help="The δ to state ε at; the budget's where not given.")] = None,
    as_json: AsJson = False,
) -> None:
    """What was spent and reserved, by which runs."""
    state = _state(ledger)
    at = delta if delta is not None else state.delta
    found = _status(state, at)
    if as_json:
        print(json.dumps(found))
        return
    console = Console(highlight=False, markup=False)
    name = (
        state.cohort.name
        if state.cohort
        else "not registered, so nobody checks whose data are used; `register` makes a ledger that does"
    )
    console.print(f"cohort: {name}")
    if at is None:
        console.print("nothing released, and no budget")
    else:
        console.print(
            f"released: ε = {_say(found['epsilon'])} at δ = {at:g}; with reservations {_say(found['reserved'])}"
        )
    if state.budget:
        console.print(f"budget: ε = {state.budget.epsilon:g} at δ = {state.budget.delta:g}")
    table = Table("entry", "state", "steps", "granted", "alone ε", "purpose", box=None, pad_edge=False)
    for entry in found["entries"]:
        table.add_row(
            entry["entry"][:8], entry["state"], str(entry["steps"]), str(entry["granted"]), _say(entry["epsilon"]),
            Text(entry["purpose"]),
        )  # fmt: skip
    if found["entries"]:
        console.print(table)


@app.command("what-if")
def what_if(
    ledger: LedgerPath,
    num_patients: Annotated[int, typer.Option(help="Patients that the run would train on.")],
    expected_batch_size: Annotated[int, typer.Option(help="Patients that a step would draw on average.")],
    steps: Annotated[int, typer.Option(help="Number of steps.")],
    noise_multiplier: Annotated[
        float | None, typer.Option(help="Noise; where not given, the least with which the run fits is found.")
    ] = None,
    delta: Annotated[float | None, typer.Option(help="The δ to state ε at; the budget's where not given.")] = None,
    as_json: AsJson = False,
) -> None:
    """What a further run would cost, and whether it fits; exit code 3 where it does not."""
    _require_file(ledger)
    book = PrivacyLedger(ledger)
    at = delta if delta is not None else book.state.delta
    # Checks the numbers, and says what is wrong with them.
    plan = DPSGDPlan(
        num_patients=num_patients,
        expected_batch_size=expected_batch_size,
        steps=steps,
        delta=at if at is not None else 1e-5,
        noise_multiplier=noise_multiplier,
    )
    if noise_multiplier is None:
        noise_multiplier = calibrate_noise_for_ledger(book, sample_rate=plan.sample_rate, steps=steps)
    event = dpsgd_event(sample_rate=plan.sample_rate, noise_multiplier=noise_multiplier).event
    found = book.what_if(event, steps, delta=delta)
    fits = found.steps_that_fit >= steps
    if as_json:
        numbers = {name: _finite(value) for name, value in asdict(found).items()}
        print(json.dumps(numbers | {"noise_multiplier": noise_multiplier, "fits": fits}))
    else:
        answer = "fits" if fits else f"does not fit: only {found.steps_that_fit} steps do"
        print(
            f"{steps} steps at noise multiplier {noise_multiplier:g}: ε = {_say(found.epsilon_now)} now, "
            f"{_say(found.epsilon_then)} then, at δ = {found.delta:g}; {answer}"
        )
    if not fits:
        raise typer.Exit(NO)


@app.command()
def verify(ledger: LedgerPath, as_json: AsJson = False) -> None:
    """Check every line; exit code 2 names the first that was changed, dropped, swapped, added or is missing."""
    state = _state(ledger)
    within = state.within_budget()
    complete = LedgerFile(ledger, read_only=True).has_head
    if as_json:
        found = {"lines": state.lines, "sha256": state.last_hash, "within_budget": within, "end_is_known": complete}
        print(json.dumps(found))
    else:
        end = "" if complete else "; its .head file is missing, so lines cut off at the end would not be noticed"
        print(f"{ledger}: {state.lines} lines follow one another, SHA-256 {state.last_hash[:16]}{end}")
        if not within:
            print("more was released or reserved than the budget allows", file=sys.stderr)
    if not within:
        raise typer.Exit(NO)


@app.command()
def export(
    ledger: LedgerPath,
    to: Annotated[ExportFormat, typer.Option("--format", help="json, csv, or a draft for the deployments registry.")]
    = ExportFormat.json,
) -> None:  # fmt: skip
    """Print all runs, for spreadsheets, programs or the Differential Privacy Deployments Registry."""
    state = _state(ledger)
    if to is ExportFormat.registry:
        print(
            yaml.safe_dump(PrivacyReport.from_ledger(ledger).to_registry(), sort_keys=False, allow_unicode=True), end=""
        )
        return
    runs = [_run(entry) for entry in state.entries]
    if to is ExportFormat.json:
        cohort = asdict(state.cohort) if state.cohort else None
        budget = asdict(state.budget) if state.budget else None
        print(json.dumps({"cohort": cohort, "budget": budget, "entries": runs}, indent=2, ensure_ascii=False))
        return
    names = ("entry", "purpose", "state", "unit", "steps", "planned_steps", "delta", "epsilon", "event")
    writer = csv.DictWriter(sys.stdout, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for run in runs:
        # A spreadsheet would run a text that begins like a formula.
        purpose = f"'{run['purpose']}" if run["purpose"][:1] in ("=", "+", "-", "@") else run["purpose"]
        writer.writerow(run | {"purpose": purpose, "event": json.dumps(run["event"])})


@app.command()
def commit(ledger: LedgerPath, entry: EntryName, as_json: AsJson = False) -> None:
    """Close a run that ended without saying so, such as one that crashed for good: what it did not use is free."""
    book, found = _open_entry(ledger, entry)
    book.commit(found.entry_id)
    told = f"{found.entry_id[:8]} is committed with {found.steps} steps"
    print(json.dumps(_run(book.entry(found.entry_id))) if as_json else told)


@app.command()
def void(ledger: LedgerPath, entry: EntryName, as_json: AsJson = False) -> None:
    """Give back the reservation of a run that has recorded no step."""
    book, found = _open_entry(ledger, entry)
    book.void(found.entry_id)
    print(json.dumps(_run(book.entry(found.entry_id))) if as_json else f"{found.entry_id[:8]} is void")


def _ids_in(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no UTF-8 text: {error.reason}. Save it as UTF-8, one patient id a line."
        ) from error
    return [line.strip() for line in lines if line.strip()]


def _open_entry(ledger: Path, name: str) -> tuple[PrivacyLedger, LedgerEntry]:
    _require_file(ledger)
    book = PrivacyLedger(ledger)
    found = [entry for entry in book.entries if name and entry.entry_id.startswith(name)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} runs of {ledger} have a name that begins with {name!r}. See 'ledger status'.")
    return book, found[0]


def _status(state: LedgerState, delta: float | None) -> dict[str, Any]:
    spent = state.epsilon(delta) if delta is not None else 0.0
    reserved = state.epsilon(delta, reserved=True) if delta is not None else 0.0
    return {
        "cohort": asdict(state.cohort) if state.cohort else None,
        "budget": asdict(state.budget) if state.budget else None,
        "adaptive": state.adaptive,
        "delta": delta,
        "epsilon": _finite(spent),
        "reserved": _finite(reserved),
        "lines": state.lines,
        "entries": [_run(entry) for entry in state.entries],
    }


def _run(entry: LedgerEntry) -> dict[str, Any]:
    alone = LedgerState.of_entries([entry])
    return {
        "entry": entry.entry_id,
        "purpose": entry.purpose,
        "state": entry.state,
        "unit": entry.unit,
        "partition": entry.partition,
        "steps": entry.steps,
        "granted": entry.granted,
        "planned_steps": entry.planned_steps,
        "delta": entry.delta,
        "epsilon": _finite(alone.epsilon(entry.delta)),
        "event": event_to_dict(entry.step),
        "facts": dict(entry.facts),
        "unnoised": list(entry.unnoised),
        "assumptions": list(entry.assumptions),
        "not_private": list(entry.not_private),
        "artifacts": dict(entry.artifacts),
    }


def _state(ledger: Path) -> LedgerState:
    _require_file(ledger)
    return LedgerState.of_file(ledger)


def _require_file(ledger: Path) -> None:
    if not ledger.is_file():
        raise FileNotFoundError(
            f"{ledger} is no ledger file: name the ledger that a training or 'ledger register' wrote."
        )


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _say(value: float | None) -> str:
    return "none holds" if value is None or not math.isfinite(value) else rounded_up(value, 4)
