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

"""The report: recomputed from the ledger's file alone, never better than the truth, strict JSON and readable markdown."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from dp_accounting.dp_event import DpEvent, GaussianDpEvent, SelfComposedDpEvent

from monai_privacy import DPSGDPlan, LedgerError, PrivacyBudget, PrivacyLedger, PrivacyReport, accounting, report
from monai_privacy.accounting.accountants import group_epsilon
from monai_privacy.accounting.events import composed

PLAN = DPSGDPlan(num_patients=100, expected_batch_size=20, steps=40, delta=1e-3, noise_multiplier=4.0)
STATISTICS = "training images, loss, predictions and metrics, to whatever handler asks for them"
VALIDATION = "metrics on the validation patients, and whatever was chosen by them"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


def run(
    book: PrivacyLedger | Path, *, steps: int = 5, plan: DPSGDPlan = PLAN, step: DpEvent | None = None, **options: Any
) -> DpEvent:
    """Record a run, as the trainer does; return what it released."""
    book = book if isinstance(book, PrivacyLedger) else PrivacyLedger(book)
    settings = {
        "step": step or plan.step_event,
        "planned_steps": plan.steps,
        "delta": plan.delta,
        "unit": plan.unit,
        "facts": plan.to_dict(),
        "assumptions": ("the number of patients, 100, is public",),
    }
    entry = book.begin(**settings | options)
    for _ in range(steps):
        book.record_step(entry)
    return SelfComposedDpEvent(step or plan.step_event, steps)


def test_it_is_recomputed_from_the_file_alone(path: Path, tmp_path: Path) -> None:
    event = run(path)
    copy = tmp_path / "elsewhere" / path.name
    copy.parent.mkdir()
    shutil.copy(path, copy)
    path.unlink()
    found = PrivacyReport.from_ledger(copy)
    bounds = accounting.epsilon_bounds(event, PLAN.delta)
    assert found == PrivacyReport.from_ledger(str(copy)) == PrivacyReport.from_ledger(PrivacyLedger(copy))
    assert (found.epsilon, found.delta) == (bounds.epsilon, PLAN.delta)
    assert found.epsilon == PrivacyLedger(copy).epsilon(PLAN.delta)
    assert found.bounds == {"pld": bounds.pld, "rdp": bounds.rdp}
    assert found.accountant == bounds.accountant
    assert (found.unit, found.relation, found.ledger) == ("patient", "add or remove one unit", "ledger.jsonl")
    (entry,) = found.entries
    assert (entry.epsilon, entry.delta, entry.steps, entry.planned_steps) == (bounds.epsilon, PLAN.delta, 5, 40)
    assert entry.facts == PLAN.to_dict()
    assert set(found.versions) == {"monai-privacy", "dp-accounting", "monai", "torch"}


def test_reading_writes_nothing(path: Path) -> None:
    run(path)
    before = path.read_bytes()
    PrivacyReport.from_ledger(path)
    assert path.read_bytes() == before


def test_more_steps_are_seen_at_once(path: Path) -> None:
    book = PrivacyLedger(path)
    run(book)
    first = PrivacyReport.from_ledger(book)
    PrivacyLedger(path).record_step(book.entries[0].entry_id)
    second = PrivacyReport.from_ledger(book)
    assert second.entries[0].steps == 6
    assert second.epsilon > first.epsilon


def test_the_epsilon_is_of_the_steps_that_are_listed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Another process keeps training while the report is made.
    book = PrivacyLedger(path)
    run(book)
    entry, trainer = book.entries[0].entry_id, PrivacyLedger(path)
    sync = PrivacyLedger._sync

    def sync_and_train(self: PrivacyLedger) -> None:
        sync(self)
        if self is book:
            trainer.record_step(entry)

    monkeypatch.setattr(PrivacyLedger, "_sync", sync_and_train)
    found = PrivacyReport.from_ledger(book)
    steps = found.entries[0].steps
    assert found.epsilon == accounting.epsilon(SelfComposedDpEvent(PLAN.step_event, steps), PLAN.delta)


# --- statuses


@pytest.mark.parametrize("begun", [0, 1, 2])
def test_nothing_released(path: Path, begun: int) -> None:
    book = PrivacyLedger(path)
    for _ in range(begun):
        run(book, steps=0)
    found = PrivacyReport.from_ledger(path)
    assert found.status == "nothing released"
    assert found.claim == "Nothing was released about this cohort."
    assert (found.epsilon, found.delta, found.unit, found.entries) == (None, None, None, ())
    assert found.claim in str(found)
    assert "| ε |" not in str(found)
    assert json.loads(found.to_json())["epsilon"] is None
    # The state of the ledger is named all the same: a later release is then seen to be later.
    assert (found.ledger_lines, found.ledger_hash) == book.head
    assert f"as of line {1 + begun} (SHA-256 {book.head[1][:16]})" in str(found)
    names = tuple(entry.entry_id for entry in book.entries)
    assert found.begun == names
    assert json.loads(found.to_json())["begun"] == list(names)
    assert all(name[:8] in str(found) for name in names)
    assert ("with no step recorded" in str(found)) == (begun > 0)
    assert ("1 run (" in str(found)) == (begun == 1)


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({}, "formal, with assumptions"),
        ({"unnoised": (VALIDATION,)}, "formal, with assumptions"),
        ({"unnoised": (STATISTICS,)}, "formal for the network alone"),
        ({"unnoised": (VALIDATION, STATISTICS)}, "formal for the network alone"),
        ({"not_private": ("insecure_seed was set",)}, "not private"),
        ({"not_private": ("insecure_seed was set",), "unnoised": (STATISTICS,)}, "not private"),
        pytest.param({"step": GaussianDpEvent(1e-160)}, "not private", id="next to no noise"),
    ],
)
def test_status(path: Path, options: dict, status: str) -> None:
    run(path, **options)
    found = PrivacyReport.from_ledger(path)
    assert found.status == status
    assert f"Status: **{status}**" in str(found)
    assert (found.epsilon is None) == (status == "not private")
    for item in options.get("unnoised", ()):
        assert f"- {item}" in str(found)


def test_one_run_without_guarantee_spoils_the_whole_cohort(path: Path) -> None:
    plan = dataclasses.replace(PLAN, unit="image")
    run(path, plan=plan)
    run(path, plan=plan, not_private=("insecure_seed was set: the noise can be repeated",))
    found = PrivacyReport.from_ledger(path)
    assert found.status == "not private"
    assert found.claim == "No privacy is claimed: insecure_seed was set: the noise can be repeated."
    assert found.epsilon is None
    assert found.accountant is None
    # No number may stand where none holds.
    assert found.bounds == {"pld": None, "rdp": None}
    assert set(found.group_epsilon.values()) == {None}
    assert [entry.epsilon is None for entry in found.entries] == [False, True]
    assert "| ε | none |" in str(found)
    assert "| upper bounds | PLD none, RDP none |" in str(found)


def test_a_run_without_guarantee_that_never_ran_spoils_nothing(path: Path) -> None:
    event = run(path)
    run(path, steps=0, not_private=("insecure_seed was set",))
    found = PrivacyReport.from_ledger(path)
    assert found.status == "formal, with assumptions"
    assert found.epsilon == accounting.epsilon(event, PLAN.delta)
    assert len(found.entries) == 1
    assert len(found.begun) == 1
    assert f"with no step recorded and so nothing released: 1 run ({found.begun[0][:8]})." in str(found)


# --- the claim


def made(epsilon: float, **changes: Any) -> PrivacyReport:
    entry = report.ReportEntry("e" * 32, "mechanism", epsilon, epsilon, 1e-5, 1, 1, {}, (), (), ())
    settings = {
        "ledger": "ledger.jsonl",
        "status": "formal, with assumptions",
        "unit": "patient",
        "epsilon": epsilon,
        "delta": 1e-5,
        "accountant": "an accountant",
        "bounds": {"pld": epsilon, "rdp": None},
        "budget": None,
        "group_epsilon": {},
        "entries": (entry,),
    }
    return PrivacyReport(**settings | changes)


def test_the_claim_in_a_sentence() -> None:
    assert made(3.0).claim == (
        "Whoever sees the trained network can learn only so much about whether any one patient's data were used: the "
        "odds change by a factor of at most 20.1 (ε = 3.00), but for a chance of δ = 1e-05."
    )
    two = made(3.0, entries=made(3.0).entries * 2)
    assert two.claim.startswith("Whoever sees all 2 runs together can learn only so much")
    image = made(3.0, unit="image").claim
    assert "whether any one image was used" in image
    assert image.endswith(
        "This protects single images: a patient with several images is protected less, or hardly at all."
    )


@pytest.mark.parametrize("epsilon", [1e-9, 0.004, 0.0101, 1.0, 1.0000001, 2.994, 2.2049, 8.0, 9.999, 33.3, 49.99])
def test_no_digit_flatters(epsilon: float) -> None:
    found = made(epsilon)
    (factor, stated) = re.search(r"at most ([\d.e+]+) \(ε = ([\d.]+)\)", found.claim).groups()
    assert epsilon <= float(stated) <= epsilon + 0.01
    assert math.exp(epsilon) <= float(factor) <= math.exp(epsilon) * 1.011
    (stated,) = re.search(r"\| ε \| ([\d.]+) \|", str(found)).groups()
    assert epsilon <= float(stated) <= epsilon + 0.0001


def test_rounding_up_leaves_infinity() -> None:
    assert report.rounded_up(math.inf, 2) == "inf"


def test_numbers_that_need_no_rounding_stay() -> None:
    assert "(ε = 1.10)" in made(1.1).claim
    assert "factor of at most 1 (ε = 0.00)" in made(0.0).claim


@pytest.mark.parametrize(("epsilon", "factor"), [(60.0, "10^27"), (800.0, "10^348"), (1e6, "10^434295")])
def test_a_useless_epsilon_is_not_praised(epsilon: float, factor: str) -> None:
    claim = made(epsilon).claim
    assert "learns little" not in claim
    assert f"by a factor of at most {factor} (ε = {epsilon:.2f})" in claim


@pytest.mark.parametrize(("epsilon", "little"), [(0.5, True), (1.0, True), (1.01, False), (30.0, False)])
def test_little_is_said_where_it_is_little(epsilon: float, little: bool) -> None:
    assert ("learns little" in made(epsilon).claim) == little


# --- several runs, budgets, images


def test_two_runs_cost_less_together_than_apart(path: Path) -> None:
    other = dataclasses.replace(PLAN, noise_multiplier=5.0, delta=1e-4)
    events = [run(path), run(path, plan=other)]
    found = PrivacyReport.from_ledger(path)
    alone = [entry.epsilon for entry in found.entries]
    assert alone == [accounting.epsilon(events[0], 1e-3), accounting.epsilon(events[1], 1e-4)]
    assert max(alone) < found.epsilon < sum(alone)
    # At the smaller δ of the two: the larger one would show a smaller ε.
    assert found.delta == 1e-4
    assert found.epsilon == accounting.epsilon(composed(events), 1e-4)
    assert "## Run 2: " in str(found)


def test_a_budget_sets_the_delta(path: Path) -> None:
    budget = PrivacyBudget(4.0, 1e-5)
    event = run(PrivacyLedger(path, budget=budget))
    found = PrivacyReport.from_ledger(path)
    assert found.delta == 1e-5
    assert found.epsilon == accounting.epsilon(event, 1e-5)
    assert found.budget == {"epsilon": 4.0, "delta": 1e-5}
    assert "| budget | ε 4 at δ 1e-05 |" in str(found)
    assert found.entries[0].delta == PLAN.delta


def test_image_level_runs_get_the_bound_for_patients_with_several(path: Path) -> None:
    plan = dataclasses.replace(PLAN, unit="image")
    event = run(path, plan=plan, steps=2)
    found = PrivacyReport.from_ledger(path)
    assert found.unit == "image"
    assert found.group_epsilon == {k: group_epsilon(event, PLAN.delta, k) for k in (2, 5, 10)}
    assert found.epsilon * 2 <= found.group_epsilon[2] < found.group_epsilon[5] < found.group_epsilon[10]
    assert "| ε, patient with 10 images | " in str(found)
    assert json.loads(found.to_json())["group_epsilon"] == {str(k): v for k, v in found.group_epsilon.items()}


def test_patient_level_runs_need_none(path: Path) -> None:
    run(path, steps=1)
    found = PrivacyReport.from_ledger(path)
    assert found.group_epsilon == {}
    assert "patient with" not in str(found)


def test_an_infinite_group_bound_is_none(path: Path) -> None:
    run(path, plan=dataclasses.replace(PLAN, unit="image"), step=GaussianDpEvent(0.05), steps=1)
    found = PrivacyReport.from_ledger(path)
    assert found.epsilon > 100
    assert found.bounds["pld"] is None
    assert found.group_epsilon[10] is None
    assert "| ε, patient with 10 images | none |" in str(found)
    json.loads(found.to_json(), parse_constant=pytest.fail)


# --- files


def test_json_is_strict_and_complete(path: Path) -> None:
    run(path, unnoised=(VALIDATION,))
    found = PrivacyReport.from_ledger(path)
    data = json.loads(found.to_json(), parse_constant=pytest.fail)
    assert data == json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["schema"] == 1
    assert data["claim"] == found.claim
    assert data["epsilon"] == found.epsilon
    assert data["entries"][0]["facts"] == PLAN.to_dict()
    assert data["entries"][0]["unnoised"] == [VALIDATION]
    assert data["not_covered"] == list(found.not_covered)
    assert set(data) == {"schema", "claim"} | {field.name for field in dataclasses.fields(PrivacyReport)}


def test_markdown(path: Path) -> None:
    run(path, unnoised=(VALIDATION,))
    found = PrivacyReport.from_ledger(path)
    text = str(found)
    assert text == found.to_markdown() == found._repr_markdown_()
    assert text.startswith("# Privacy report\n")
    for part in (
        found.claim,
        "| unit | patient |",
        "| relation | add or remove one unit |",
        "| δ | 0.001 |",
        "| steps recorded | 5 of 40 planned |",
        "| noise_multiplier | 4.0 |",
        f"## Run 1: {found.entries[0].entry_id[:8]}",
        f"## What left without noise\n\n- {VALIDATION}\n",
        "## What the claim rests on\n\n- the number of patients, 100, is public\n",
        "## What it does not protect\n\n- hyper-parameters",
        "- a patient who appears under two ids",
        "Made from `ledger.jsonl` as of line ",
    ):
        assert part in text
    # Every row of a table has its two cells.
    assert all(line.count("|") == 3 for line in text.splitlines() if line.startswith("|"))


def test_markdown_says_that_nothing_left(path: Path) -> None:
    run(path, assumptions=())
    text = str(PrivacyReport.from_ledger(path))
    assert "## What left without noise\n\nnothing that the trainer was given\n" in text
    assert "## What the claim rests on\n\nnothing beyond the mechanism\n" in text


def test_write(path: Path, tmp_path: Path) -> None:
    run(path)
    found = PrivacyReport.from_ledger(path)
    for _ in range(2):
        paths = found.write(tmp_path / "new" / "folder")
        assert [p.name for p in paths] == ["privacy_report.json", "privacy_report.md"]
        assert paths[0].read_text(encoding="utf-8") == found.to_json()
        assert paths[1].read_text(encoding="utf-8") == found.to_markdown()
        assert "ε" in paths[1].read_text(encoding="utf-8")


def test_a_missing_file_is_not_made(tmp_path: Path) -> None:
    for missing in (tmp_path / "none.jsonl", str(tmp_path / "none.jsonl"), tmp_path):
        with pytest.raises(FileNotFoundError, match="is no ledger file: name the ledger that the training wrote"):
            PrivacyReport.from_ledger(missing)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_ledger_gives_no_report(path: Path) -> None:
    run(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], *lines[4:]]))
    with pytest.raises(LedgerError, match="line 4"):
        PrivacyReport.from_ledger(path)


def test_another_file_is_not_taken_for_a_ledger(tmp_path: Path) -> None:
    other = tmp_path / "train.json"
    other.write_text('{"lr": 0.1}')
    with pytest.raises(LedgerError, match="line 1"):
        PrivacyReport.from_ledger(other)
    assert other.read_text() == '{"lr": 0.1}'


def test_a_delta_that_protects_nobody_is_not_a_claim(path: Path) -> None:
    run(PrivacyLedger(path, budget=PrivacyBudget(50.0, 0.5)))
    found = PrivacyReport.from_ledger(path)
    assert found.status == "no protection: delta is too large"
    assert found.claim.startswith("No protection is claimed: δ = 0.5")


def test_the_state_of_the_ledger_and_the_planned_steps_are_named(path: Path) -> None:
    run(path)
    found = PrivacyReport.from_ledger(path)
    assert found.ledger_lines == len(path.read_bytes().splitlines())
    (entry,) = found.entries
    assert entry.epsilon_of_planned_steps == PLAN.epsilon() > entry.epsilon
    assert "Poisson draw" in entry.mechanism
