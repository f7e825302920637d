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


"""What a hostile reviewer did to the ledger and the report: each once went through silently."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
from dp_accounting.dp_event import GaussianDpEvent, SelfComposedDpEvent

from monai_privacy import DPSGDPlan, LedgerError, PrivacyBudget, PrivacyLedger, PrivacyReport
from monai_privacy.accounting import LedgerState, dpsgd_event, epsilon
from monai_privacy.accounting.accountants import epsilon_without_amplification
from monai_privacy.accounting.events import composed
from monai_privacy.distributed import ProcessGroup
from monai_privacy.ledger_conduct import LedgerConduct
from monai_privacy.opacus_accountant import LedgerAccountant
from monai_privacy.report import verification

BUDGET = PrivacyBudget(4.0, 1e-5)
PLAN = DPSGDPlan(num_patients=40, expected_batch_size=10, steps=4, delta=1e-3, noise_multiplier=4.0)
IDS = [f"patient-{number}" for number in range(40)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


def reserve(book: PrivacyLedger, *, steps: int = 1, **options: object) -> str:
    settings = {"step": GaussianDpEvent(5.0), "planned_steps": 3, "delta": 1e-5, "unit": "patient"}
    entry = book.reserve(**(settings | options))  # type: ignore[arg-type]
    for _ in range(steps):
        book.record_step(entry)
    return entry


def append_forged(path: Path, *records: dict) -> None:
    """Add lines as somebody who knows the format would, head included."""
    for record in records:
        lines = path.read_bytes().splitlines(keepends=True)
        whole = {"line": len(lines) + 1, "time": "2026-01-01T00:00:00+00:00", **record}
        whole["previous"] = hashlib.sha256(lines[-1]).hexdigest()
        line = (json.dumps(whole, separators=(",", ":")) + "\n").encode()
        path.write_bytes(b"".join(lines) + line)
        path.with_name(path.name + ".head").write_text(f"{len(lines) + 1} {hashlib.sha256(line).hexdigest()}\n")


def test_an_adaptive_ledger_that_grants_too_much_claims_nothing(path: Path) -> None:
    book = PrivacyLedger.register(path, cohort="Lungs", budget=BUDGET, adaptive=True)
    reserve(book)
    forged = json.loads(path.read_bytes().splitlines()[1]) | {"entry": "f" * 32}
    forged["step_event"] = {"kind": "gaussian", "noise_multiplier": 0.1}
    append_forged(path, {k: v for k, v in forged.items() if k not in ("line", "time", "previous")})
    append_forged(path, {"kind": "step", "entry": "f" * 32, "step": 1})
    assert LedgerState.of_file(path).epsilon(1e-5) == math.inf
    assert not LedgerState.of_file(path).within_budget()
    found = PrivacyReport.from_ledger(path)
    assert (found.status, found.epsilon) == ("not private", None)
    assert "filter" in found.claim


def test_a_report_says_that_a_budget_was_passed(path: Path) -> None:
    book = PrivacyLedger(path, budget=PrivacyBudget(1.0, 1e-5))
    reserve(book, planned_steps=1)
    forged = json.loads(path.read_bytes().splitlines()[1]) | {"entry": "f" * 32}
    forged["step_event"] = {"kind": "gaussian", "noise_multiplier": 0.5}
    append_forged(path, {k: v for k, v in forged.items() if k not in ("line", "time", "previous")})
    append_forged(path, {"kind": "step", "entry": "f" * 32, "step": 1})
    assert any(
        "more was released or reserved than the budget" in text for text in PrivacyReport.from_ledger(path).reasons
    )


def conduct(book: PrivacyLedger, ids: list[str], partition: int | None) -> LedgerConduct:
    return LedgerConduct(
        PLAN, book, ProcessGroup.current(), ids=ids, partition=partition, fewest_steps=None, purpose="", artifacts={},
        unnoised=(), assumptions=(), not_private=(),
    )  # fmt: skip


def test_a_resumed_run_keeps_its_patients_and_its_part(path: Path) -> None:
    book = PrivacyLedger.register(path, cohort="Lungs", budget=PrivacyBudget(8.0, 1e-3), ids=IDS, partitions=2)
    parts = [book.partition_ids(IDS, part) for part in range(2)]
    entry = conduct(book, parts[1], 1).begin_or_continue(None, 0)
    assert conduct(book, parts[1], 1).begin_or_continue(entry, 0) == entry
    for ids, part, said in (
        (parts[0], 1, "belong to other parts"),
        (parts[0], 0, "a run keeps its part"),
        (IDS, None, "a run keeps its part"),
        (["a stranger"], 1, "are not in the cohort"),
        ([], 1, "ids are empty"),
    ):
        with pytest.raises(ValueError, match=said):
            conduct(book, ids, part).begin_or_continue(entry, 0)
    assert book.entry(entry).steps == 0


def test_a_run_on_nobody_is_not_checked(path: Path) -> None:
    book = PrivacyLedger.register(path, cohort="Lungs", budget=BUDGET, ids=IDS, partitions=2)
    for partition in (None, 0, 1):
        with pytest.raises(ValueError, match="ids are empty"):
            reserve(book, ids=[], partition=partition)
    assert book.entries == ()


def test_a_step_of_opacus_over_several_batches_is_refused(path: Path) -> None:
    class Optimizer:
        noise_multiplier = 1.0
        accumulated_iterations = 4

    book = PrivacyLedger(path)
    hook = LedgerAccountant(book, unit="image", planned_steps=9, delta=1e-5).get_optimizer_hook_fn(0.05)
    with pytest.raises(ValueError, match="adds up 4 batches"):
        hook(Optimizer())
    assert book.entries == ()
    Optimizer.accumulated_iterations = 1
    hook(Optimizer())
    assert book.entries[0].step == dpsgd_event(sample_rate=0.05, noise_multiplier=1.0).event


def test_nine_short_shuffled_runs_are_nine_and_not_one() -> None:
    short = dpsgd_event(sample_rate=0.01, noise_multiplier=2.0, steps=11)
    nine = composed([short] * 9)
    assert epsilon_without_amplification(nine, 1e-5) == epsilon(SelfComposedDpEvent(GaussianDpEvent(2.0), 9), 1e-5)


def test_an_adaptive_report_gives_no_number_of_what_was_released(path: Path) -> None:
    book = PrivacyLedger.register(path, cohort="Lungs", budget=BUDGET, adaptive=True)
    reserve(book)
    found = PrivacyReport.from_ledger(path)
    assert found.without_amplification is None
    assert found.other_units == {}
    question = book.what_if(GaussianDpEvent(5.0), 1)
    assert question.epsilon_now == question.epsilon_then == pytest.approx(4.0)


def test_a_delta_for_a_cohort_of_unknown_size_is_not_praised(path: Path) -> None:
    reserve(PrivacyLedger(path), delta=0.5)
    assert any("how many units there are is not known" in text for text in PrivacyReport.from_ledger(path).reasons)


@pytest.mark.parametrize("head", ["", "7 ", "garbage\n", "\0" * 40, "4 abc\n"])
def test_a_damaged_head_is_not_taken_for_a_missing_one(path: Path, head: str) -> None:
    reserve(PrivacyLedger(path), steps=3)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-2]))
    path.with_name(path.name + ".head").write_text(head)
    for use in (lambda: PrivacyLedger(path), lambda: LedgerState.of_file(path)):
        with pytest.raises(LedgerError, match=r"head is damaged .*would not be noticed"):
            use()
    assert path.read_bytes() == b"".join(lines[:-2])


@pytest.mark.parametrize("content", [b"", b"\0" * 4096, b'{"line":1,"ti'])
def test_an_empty_file_is_no_ledger_to_a_reader(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(LedgerError, match="this is no ledger"):
        LedgerState.of_file(path)
    with pytest.raises(LedgerError, match="this is no ledger"):
        PrivacyReport.from_ledger(path)


def test_reports_are_compared_strictly(path: Path, tmp_path: Path) -> None:
    reserve(PrivacyLedger(path, budget=PrivacyBudget(4.0, 9e-13)), facts={"num_patients": 1_000_000})
    file = PrivacyReport.from_ledger(path).write(tmp_path / "report")[0]
    text = file.read_text(encoding="utf-8")
    data = json.loads(text)
    assert verification.differences(file, path) == []
    file.write_text(text.replace('"epsilon":', '"epsilon": 0.01, "epsilon":', 1), encoding="utf-8")
    with pytest.raises(ValueError, match="a name is there twice"):
        verification.differences(file, path)
    for change in (
        {"delta": 0},
        {"budget": {"epsilon": 4.0, "delta": 0}},
        {"ledger.audited by": "somebody"},
        {"versions.epsilon": 0.01},
        {"entries": [data["entries"][0] | {"facts": {"num_patients": 1_000_001}}]},
    ):
        file.write_text(json.dumps(data | change), encoding="utf-8")
        assert len(verification.differences(file, path)) == 1, change


@pytest.mark.parametrize(
    "evil", ["![x](https://evil/t.png)", "[here](https://evil)", "**Approved**", "`code`", "a \\| b"]
)
def test_markdown_of_a_ledger_stays_text(path: Path, evil: str) -> None:
    reserve(PrivacyLedger(path), purpose=evil, assumptions=(evil,))
    text = PrivacyReport.from_ledger(path).to_markdown()
    assert evil not in text
    assert "](" not in text.replace("\\](", "")
    assert all(line.replace("\\|", "").count("|") == 3 for line in text.splitlines() if line.startswith("| "))


def test_the_name_of_a_ledger_stays_text(tmp_path: Path) -> None:
    path = tmp_path / "x<img src=x>`.jsonl"
    reserve(PrivacyLedger(path))
    assert "<img" not in PrivacyReport.from_ledger(path).to_markdown()


@pytest.mark.parametrize("name", ["", "x", "<script>" * 4, "F" * 32, 7])
def test_an_entry_is_named_by_hexadecimal_digits(path: Path, name: object) -> None:
    reserve(PrivacyLedger(path))
    forged = json.loads(path.read_bytes().splitlines()[1]) | {"entry": name}
    append_forged(path, {k: v for k, v in forged.items() if k not in ("line", "time", "previous")})
    with pytest.raises(LedgerError, match="line 4"):
        PrivacyLedger(path)


@pytest.mark.parametrize(
    "options",
    [
        {"purpose": "\udcff"},
        {"facts": {"num_patients": None}},
        {"facts": {"num_patients": "many"}},
        {"step": SelfComposedDpEvent(GaussianDpEvent(5.0), 10**400)},
        {"step": GaussianDpEvent(1e-200)},
        {"step": GaussianDpEvent(1e200)},
    ],
    ids=["surrogate", "no size", "size in words", "endless", "no noise", "all noise"],
)
def test_what_no_report_could_be_made_of_is_refused(path: Path, options: dict) -> None:
    book = PrivacyLedger(path)
    before = path.read_bytes()
    with pytest.raises((ValueError, LedgerError)):
        reserve(book, **options)
    assert path.read_bytes() == before
