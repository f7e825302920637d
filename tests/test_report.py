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
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from dp_accounting.dp_event import DpEvent, GaussianDpEvent, SelfComposedDpEvent

from monai_privacy import DPSGDPlan, LedgerError, PrivacyBudget, PrivacyLedger, PrivacyReport, accounting, report
from monai_privacy.accounting.accountants import group_epsilon
from monai_privacy.accounting.events import composed
from monai_privacy.accounting.ledger_state import LedgerState
from monai_privacy.report import verification

PLAN = DPSGDPlan(num_patients=100, expected_batch_size=20, steps=40, delta=1e-3, noise_multiplier=4.0)
SCHEMA_FILE = Path(report.__file__).with_name("privacy_report.schema.json")
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
    entry = book.reserve(**settings | options)
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
    bounds = LedgerState.bounds

    def train_and_bound(self: LedgerState, *arguments: Any, **options: Any) -> Any:
        trainer.record_step(entry)
        return bounds(self, *arguments, **options)

    monkeypatch.setattr(LedgerState, "bounds", train_and_bound)
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
    assert (found.other_units, found.risk, found.risk_curve, found.risk_in_words) == ({}, {}, (), "")
    assert found.without_amplification is found.epsilon_reserved is None
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
    entry = report.ReportEntry(
        entry_id="e" * 32, purpose="", state="committed", mechanism="mechanism", sampling="Poisson", epsilon=epsilon,
        epsilon_of_planned_steps=epsilon, delta=1e-5, steps=1, planned_steps=1, partition=None, members="checked",
        event={}, facts={"max_grad_norm": 1.0}, unnoised=(), assumptions=(), not_private=(), artifacts={},
    )  # fmt: skip
    settings = {
        "ledger": "ledger.jsonl", "status": "formal, with assumptions", "reasons": (), "unit": "patient",
        "epsilon": epsilon, "delta": 1e-5, "accountant": "an accountant", "bounds": {"pld": epsilon, "rdp": None},
        "budget": None, "epsilon_reserved": epsilon, "without_amplification": None, "other_units": {}, "risk": {},
        "risk_curve": (), "entries": (entry,), "not_covered": ("rain",), "cohort": None, "ledger_lines": 3,
        "ledger_hash": "0" * 64, "begun": (),
    }  # fmt: skip
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


@pytest.mark.slow(seconds=20)
def test_image_level_runs_say_what_holds_for_patients_with_several(path: Path) -> None:
    plan = dataclasses.replace(PLAN, unit="image")
    event = run(path, plan=plan, steps=2)
    found = PrivacyReport.from_ledger(path)
    assert found.unit == "image"
    names = [f"a patient with {k} images" for k in (2, 5, 10)]
    assert list(found.other_units) == names
    costs = [found.other_units[name] for name in names]
    assert found.epsilon < costs[0] < costs[1] < costs[2]
    for size, cost in zip((2, 5, 10), costs, strict=True):
        exact = accounting.capped_images_event(
            sample_rate=0.2, noise_multiplier=4.0, max_images_per_patient=size, steps=2
        )
        if size < 10:  # the fine grid takes long for many images
            assert accounting.epsilon(exact, PLAN.delta) <= cost <= accounting.epsilon(exact, PLAN.delta) * 1.02
        assert cost <= group_epsilon(event, PLAN.delta, size)
    assert "| ε, a patient with 10 images | " in str(found)
    assert json.loads(found.to_json())["other_units"] == found.other_units


def test_patient_level_runs_say_what_holds_for_an_image(path: Path) -> None:
    event = run(path, steps=1)
    found = PrivacyReport.from_ledger(path)
    assert found.other_units == {"one image of a patient, removed or changed": group_epsilon(event, PLAN.delta, 2)}
    assert found.other_units["one image of a patient, removed or changed"] > 2 * found.epsilon


def test_an_infinite_group_bound_is_none(path: Path) -> None:
    run(path, plan=dataclasses.replace(PLAN, unit="image"), step=GaussianDpEvent(5e-4), steps=1)
    found = PrivacyReport.from_ledger(path)
    assert found.epsilon > 100
    assert found.bounds["pld"] is None
    assert found.other_units["a patient with 10 images"] is None
    assert "| ε, a patient with 10 images | none |" in str(found)
    json.loads(found.to_json(), parse_constant=pytest.fail)


def test_what_would_hold_without_amplification(path: Path) -> None:
    run(path, steps=20)
    found = PrivacyReport.from_ledger(path)
    # 20 steps of a fifth: four times each patient.
    plain = accounting.epsilon(SelfComposedDpEvent(GaussianDpEvent(4.0), 4), PLAN.delta)
    assert found.without_amplification == pytest.approx(plain)
    assert found.without_amplification > found.epsilon
    assert "| ε without amplification, as of a loader that shuffles | " in str(found)


def test_the_risk_is_that_of_the_best_attacker(path: Path) -> None:
    event = run(path, steps=20)
    found = PrivacyReport.from_ledger(path)
    rates = accounting.true_positive_rates(event, [0.001, 0.01])
    assert list(found.risk.values()) == pytest.approx(list(rates))
    assert set(found.risk) == {"0.001", "0.01"}
    assert dict(found.risk_curve)[0.001] == found.risk["0.001"]
    share = re.search(r"recognises at most ([\d.]+) % of those", found.risk_in_words)[1]
    assert found.risk["0.001"] * 100 <= float(share) <= found.risk["0.001"] * 100 + 0.1
    assert found.risk_in_words in str(found)
    assert "| best attacker, 0.1% false positives | at most " in str(found)


@pytest.mark.parametrize("share", [0.0, 1e-9, 0.00101, 0.0271, 0.5, 0.999, 0.99999, 1.0])
def test_percentages_never_flatter(share: float) -> None:
    text = report.numbers.rounded_up_percent(share)
    assert share * 100 <= float(text.removesuffix(" %")) <= min(100, share * 100 + 0.1)


def test_reservations_of_open_runs_are_shown_beside_the_claim(path: Path) -> None:
    book = PrivacyLedger(path, budget=PrivacyBudget(8.0, 1e-5))
    run(book, steps=5)
    found = PrivacyReport.from_ledger(path)
    assert found.epsilon_reserved > found.epsilon
    # A checkpoint may be newer than the report beside it.
    reserved = report.numbers.rounded_up(found.epsilon_reserved, 2)
    assert found.claim.endswith(f"after this report was written may cost up to ε = {reserved} together with the rest.")
    assert found.epsilon_reserved == pytest.approx(accounting.epsilon(SelfComposedDpEvent(PLAN.step_event, 40), 1e-5))
    book.commit(book.entries[0].entry_id, artifacts={"model": "12" * 32})
    done = PrivacyReport.from_ledger(path)
    assert done.epsilon_reserved == done.epsilon == found.epsilon
    assert "has not ended" not in done.claim
    assert done.entries[0].state == "committed"
    assert f"| SHA-256, model | {'12' * 8} |" in str(done)


def test_parts_of_a_cohort_cost_what_the_dearest_costs(path: Path) -> None:
    ids = [f"patient-{number}" for number in range(60)]
    book = PrivacyLedger.register(path, cohort="Lungs", budget=PrivacyBudget(8.0, 1e-5), ids=ids, partitions=3)
    parts = [book.partition_ids(ids, part) for part in range(3)]
    assert sorted(name for part in parts for name in part) == sorted(ids)
    events = [run(book, steps=5 * (part + 1), ids=parts[part], partition=part) for part in range(3)]
    whole = run(book, steps=2, ids=ids)
    found = PrivacyReport.from_ledger(path)
    assert found.epsilon == accounting.epsilon(composed([events[2], whole]), 1e-5)
    assert found.epsilon < accounting.epsilon(composed([*events, whole]), 1e-5)
    assert found.cohort["name"] == "Lungs"
    assert [entry.members for entry in found.entries] == ["checked"] * 4
    assert "| cohort | Lungs, 60 patients registered |" in str(found)
    assert "| part of the cohort | 2 |" in str(found)
    assert not any("not checked" in reason for reason in found.reasons)
    run(book, steps=1)
    assert any("1 runs did not say whose data" in reason for reason in PrivacyReport.from_ledger(path).reasons)


def test_an_adaptive_cohort_claims_its_filter_and_not_what_it_would_be_otherwise(path: Path) -> None:
    book = PrivacyLedger.register(path, cohort="Lungs", budget=PrivacyBudget(3.0, 1e-5), adaptive=True)
    event = run(book, steps=3)
    found = PrivacyReport.from_ledger(path)
    assert found.epsilon == book.epsilon(1e-5) == pytest.approx(3.0)
    assert found.epsilon > accounting.epsilon(event, 1e-5)
    assert found.bounds["pld as if fixed beforehand"] == accounting.epsilon_bounds(event, 1e-5).pld
    assert found.accountant.startswith("Rényi filter of order ")
    # What an attacker can do is what the whole budget allows.
    exact = true_positive_rate_of_one_pair(3.0, 1e-5, 0.01)
    assert found.risk["0.01"] <= exact
    assert found.risk["0.01"] > accounting.true_positive_rates(event, [0.01])[0]


def true_positive_rate_of_one_pair(epsilon: float, delta: float, rate: float) -> float:
    """Wasserman & Zhou 2010, Theorem 2.4."""
    return min(math.exp(epsilon) * rate + delta, 1 - math.exp(-epsilon) * (1 - delta - rate))


# --- files


def test_json_is_strict_and_complete(path: Path) -> None:
    run(path, unnoised=(VALIDATION,))
    found = PrivacyReport.from_ledger(path)
    data = json.loads(found.to_json(), parse_constant=pytest.fail)
    assert data == json.loads(json.dumps(found.to_dict(), allow_nan=False))
    jsonschema.validate(data, json.loads(SCHEMA_FILE.read_text(encoding="utf-8")))
    assert data["schema"] == "monai_privacy.report/2"
    assert data["claim"] == found.claim
    assert data["epsilon"] == found.epsilon
    assert data["entries"][0]["facts"] == PLAN.to_dict()
    assert data["entries"][0]["unnoised"] == [VALIDATION]
    assert data["not_covered"] == list(found.not_covered)
    assert set(data) == {"schema", "claim", "risk_in_words"} | {
        field.name for field in dataclasses.fields(PrivacyReport)
    }


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
        assert [p.name for p in paths] == ["privacy_report.json", "privacy_report.md", "privacy_report.html"]
        assert paths[0].read_text(encoding="utf-8") == found.to_json()
        assert paths[1].read_text(encoding="utf-8") == found.to_markdown()
        assert paths[2].read_text(encoding="utf-8") == found.to_html()
        assert "ε" in paths[1].read_text(encoding="utf-8")
    assert len(found.write(tmp_path / "other", html=False)) == len(list((tmp_path / "other").iterdir())) == 2


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
    assert entry.sampling == "Poisson, each unit on its own coin with probability 0.2"
    assert "DP-SGD" in entry.mechanism
    assert entry.event == accounting.event_to_dict(SelfComposedDpEvent(PLAN.step_event, 5))


@pytest.mark.parametrize(
    ("step", "mechanism", "sampling"),
    [
        (GaussianDpEvent(5.0), "Gaussian noise", "none: every unit each time"),
        (accounting.laplace_event(5.0), "Laplace noise", "none: every unit each time"),
        (
            accounting.truncated_dpsgd_event(
                num_patients=100, sample_rate=0.2, max_batch_size=40, noise_multiplier=4.0
            ).event,
            "Gaussian noise on a sum of clipped gradients (DP-SGD)",
            "probability 0.2, cut down at random to 40",
        ),
        (
            accounting.capped_images_event(sample_rate=0.02, noise_multiplier=4.0, max_images_per_patient=3).event,
            "certified for patients with at most so many",
            "each of at most 3 images of a patient",
        ),
        (
            accounting.tuning_event(SelfComposedDpEvent(PLAN.step_event, 3), mean_runs=5.0),
            "of which the best was released",
            "none: every unit each time",
        ),
        (composed([GaussianDpEvent(5.0), accounting.laplace_event(9.0)]), "several, one after another", "none"),
    ],
    ids=["gaussian", "laplace", "truncated", "images", "tuned", "several"],
)
def test_every_kind_of_release_is_named(path: Path, step: DpEvent, mechanism: str, sampling: str) -> None:
    run(path, step=step, steps=2)
    (entry,) = PrivacyReport.from_ledger(path).entries
    assert mechanism in entry.mechanism
    assert sampling in entry.sampling


# --- the page


class Page(HTMLParser):
    """Collects what a browser would load, the text, and the tags that were left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_holds_what_the_report_holds(path: Path) -> None:
    run(path, unnoised=(VALIDATION,), purpose="Pneumonia, first try")
    found = PrivacyReport.from_ledger(path)
    page = Page(found.to_html())
    assert page.open == []
    for part in (
        found.claim, found.risk_in_words, VALIDATION, "the number of patients, 100, is public", found.not_covered[0],
        "Pneumonia, first try", "5 of 40 planned", found.accountant, "formal, with assumptions", found.ledger_hash[:16],
    ):  # fmt: skip
        assert " ".join(part.split()) in " ".join(page.text.split())
    assert sum(tag == "svg" for tag, _ in page.tags) == 2
    assert all(attributes["aria-label"] for tag, attributes in page.tags if tag == "svg")


def test_the_page_loads_nothing_and_runs_nothing(path: Path) -> None:
    run(path)
    page = Page(PrivacyReport.from_ledger(path).to_html())
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not any(name in attributes for _, attributes in page.tags for name in ("src", "href", "onload"))


@pytest.mark.parametrize(
    "evil", ["<script>alert(1)</script>", "| a | b |\n# Private", '"><img src=x onerror=alert(1)>']
)
def test_what_a_ledger_says_is_text_and_no_markup(path: Path, evil: str) -> None:
    PrivacyLedger.register(path, cohort=evil, budget=PrivacyBudget(8.0, 1e-5))
    run(path, purpose=evil, assumptions=(evil,), unnoised=(evil,), facts={"max_grad_norm": 1.0, evil: evil})
    found = PrivacyReport.from_ledger(path)
    page = Page(found.to_html())
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert " ".join(evil.split()) in " ".join(page.text.split())
    text = found.to_markdown()
    assert "<script>" not in text
    assert "<img" not in text
    assert "\n# Private" not in text
    assert all(line.replace("\\|", "").count("|") == 3 for line in text.splitlines() if line.startswith("|"))


@pytest.mark.parametrize(
    "options", [{"not_private": ("insecure_seed was set",)}, {"steps": 0}, {"delta": 0.02}], ids=str
)
def test_a_page_without_a_claim_praises_nothing(path: Path, options: dict) -> None:
    run(path, **options)
    page = Page(PrivacyReport.from_ledger(path).to_html())
    assert sum(tag == "svg" for tag, _ in page.tags) == 0
    assert ("number bad", True) in [(attributes.get("class"), True) for _, attributes in page.tags]


# --- the registry


def test_the_registry_draft_says_what_the_report_says(path: Path) -> None:
    PrivacyLedger.register(path, cohort="Lungs of 2026", budget=PrivacyBudget(8.0, 1e-5))
    run(path, unnoised=(VALIDATION,))
    found = PrivacyReport.from_ledger(path)
    entry = found.to_registry(curators=("A hospital",))
    assert (entry["url_slug"], entry["status"], entry["tier"]) == ("lungs-of-2026", "Draft", 3)
    deployment = entry["deployment"]
    parameters = deployment["privacy_loss"]["privacy_parameters"]
    assert found.epsilon <= parameters["epsilon"] <= found.epsilon + 1e-4
    assert parameters["delta"] == 1e-5
    assert deployment["basic"]["data_curators"] == ["A hospital"]
    assert deployment["dp_variant"]["unprotected_quantities"] == VALIDATION
    assert deployment["basic"]["intended_use"] == "TO BE WRITTEN"
    with pytest.raises(ValueError, match="no claim that could be registered"):
        dataclasses.replace(made(1.0), epsilon=None, status="not private").to_registry()


# --- verification


def verified(path: Path, folder: Path) -> tuple[Path, dict]:
    """A ledger with a run, and its report as a file and as a dictionary."""
    run(PrivacyLedger(path, budget=PrivacyBudget(8.0, 1e-5)), unnoised=(VALIDATION,))
    file = PrivacyReport.from_ledger(path).write(folder)[0]
    return file, json.loads(file.read_text(encoding="utf-8"))


def test_a_true_report_is_verified_also_when_the_ledger_has_grown(path: Path, tmp_path: Path) -> None:
    file, _ = verified(path, tmp_path / "report")
    assert verification.differences(file, path) == []
    run(path, steps=3)
    assert verification.differences(file, path) == []


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("epsilon",), 0.5),
        (("delta",), 1e-9),
        (("status",), "formal"),
        (("claim",), "All is well."),
        (("unit",), "image"),
        (("budget", "epsilon"), 9.0),
        (("risk", "0.01"), 0.011),
        (("without_amplification",), None),
        (("entries", 0, "steps"), 4),
        (("entries", 0, "unnoised"), []),
        (("entries", 0, "event", "event", "event", "noise_multiplier"), 8.0),
        (("entries", 0, "facts", "max_grad_norm"), 2.0),
        (("not_covered", 3), "nobody"),
    ],
    ids=str,
)
def test_a_report_that_was_changed_is_caught_and_the_place_is_named(
    path: Path, tmp_path: Path, where: tuple, value: object
) -> None:
    file, data = verified(path, tmp_path / "report")
    inner = data
    for key in where[:-1]:
        inner = inner[key]
    assert inner[where[-1]] != value
    inner[where[-1]] = value
    file.write_text(json.dumps(data), encoding="utf-8")
    named = ".".join(str(key + 1) if isinstance(key, int) else key for key in where)
    (said,) = verification.differences(file, path)
    assert said.startswith(f"{named}: the report says ")


def test_fields_that_were_added_or_dropped_are_named(path: Path, tmp_path: Path) -> None:
    file, data = verified(path, tmp_path / "report")
    del data["not_covered"]
    data["praise"] = "excellent"
    file.write_text(json.dumps(data), encoding="utf-8")
    said = verification.differences(file, path)
    assert [line.split(":")[0] for line in said] == ["praise", "not_covered"]


def test_another_ledger_or_one_cut_off_is_named(path: Path, tmp_path: Path) -> None:
    file, _ = verified(path, tmp_path / "report")
    other = tmp_path / "other.jsonl"
    run(PrivacyLedger(other, budget=PrivacyBudget(8.0, 1e-5)))
    (said,) = verification.differences(file, other)
    assert "it is another ledger" in said
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-2]))
    path.with_name(path.name + ".head").unlink()
    with pytest.raises(LedgerError, match=f"has {len(lines) - 2} lines, not {len(lines)}"):
        verification.differences(file, path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema": 1}', '{"schema": "monai_privacy.report/2"}', "\x00"])
def test_what_is_no_report_is_refused(path: Path, tmp_path: Path, content: str) -> None:
    run(path)
    file = tmp_path / "privacy_report.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"no report|schema|which state"):
        verification.differences(file, path)
    with pytest.raises(FileNotFoundError, match=r"name the privacy_report\.json"):
        verification.differences(tmp_path / "none.json", path)
