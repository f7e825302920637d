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


"""A registered cohort: no id in any file, strangers refused, parts disjoint, one budget for runs chosen one by one."""

from __future__ import annotations

import math
import stat
from pathlib import Path

import pytest
from dp_accounting.dp_event import GaussianDpEvent, SelfComposedDpEvent
from hypothesis import given, settings
from hypothesis import strategies as st

from monai_privacy.accounting import (
    Cohort,
    LedgerError,
    LedgerState,
    PrivacyBudget,
    PrivacyBudgetError,
    PrivacyLedger,
    affordable_steps,
    epsilon,
    filters,
)
from monai_privacy.accounting.cohort import CohortSecrets, digest_of, keyed_digest
from monai_privacy.accounting.events import composed

IDS = [f"patient-{number:03}" for number in range(90)]
BUDGET = PrivacyBudget(2.0, 1e-5)
STEP = GaussianDpEvent(10.0)


def reserve(book: PrivacyLedger, **options: object) -> str:
    settings = {"step": STEP, "planned_steps": 5, "delta": 1e-5, "unit": "patient"}
    return book.reserve(**(settings | options))  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


def test_what_was_registered_is_what_every_reader_finds(path: Path) -> None:
    book = PrivacyLedger.register(path, cohort="Lungs", budget=BUDGET, ids=IDS, partitions=3, adaptive=True)
    for reader in (book, PrivacyLedger(path), PrivacyLedger(path, budget=BUDGET), LedgerState.of_file(path)):
        cohort = reader.cohort
        assert (cohort.name, cohort.unit, cohort.num_units, cohort.partitions) == ("Lungs", "patient", 90, 3)
        assert cohort.filter_order == filters.filter_order(BUDGET)
        assert reader.budget == BUDGET
    assert "Lungs" in repr(book)
    with pytest.raises(ValueError, match="a cohort is registered once"):
        PrivacyLedger.register(path, cohort="Lungs again", budget=BUDGET)
    with pytest.raises(ValueError, match="budget is fixed"):
        PrivacyLedger(path, budget=PrivacyBudget(9.0, 1e-5))


def test_no_file_holds_an_id_and_the_salt_is_for_the_owner(path: Path) -> None:
    book = PrivacyLedger.register(path, cohort="Lungs", budget=BUDGET, ids=IDS)
    reserve(book, ids=IDS[:7])
    names = sorted(file.name for file in path.parent.iterdir())
    assert names == [f"ledger.jsonl{end}" for end in ("", ".head", ".lock", ".salt", ".units")]
    for file in path.parent.iterdir():
        assert "patient-0" not in file.read_text()
    salt = path.with_name("ledger.jsonl.salt")
    assert stat.S_IMODE(salt.stat().st_mode) == 0o600
    assert len(bytes.fromhex(salt.read_text())) == 32
    # The same ids elsewhere look like others: two ledgers cannot be matched.
    other = path.with_name("other.jsonl")
    PrivacyLedger.register(other, cohort="Lungs", budget=BUDGET, ids=IDS)
    both = [set(file.with_name(f"{file.name}.units").read_text().split()) for file in (path, other)]
    assert not both[0] & both[1]


def test_a_run_on_strangers_is_refused_without_naming_them(path: Path) -> None:
    book = PrivacyLedger.register(path, cohort="Lungs", budget=BUDGET, ids=IDS)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="2 of 5 patients are not in the cohort 'Lungs'") as error:
        reserve(book, ids=[*IDS[:3], "somebody", "else"])
    assert "somebody" not in str(error.value)
    assert path.read_bytes() == before
    assert book.entry(reserve(book, ids=IDS[:5])).members == "checked"
    assert book.entry(reserve(book)).members == "not checked"
    plain = PrivacyLedger(path.with_name("plain.jsonl"))
    assert plain.entry(reserve(plain, ids=["somebody"])).members == "not checked"


def test_files_that_are_missing_or_others_stop_a_run(path: Path) -> None:
    book = PrivacyLedger.register(path, cohort="Lungs", budget=BUDGET, ids=IDS)
    other = path.with_name("other.jsonl")
    PrivacyLedger.register(other, cohort="Hearts", budget=BUDGET, ids=IDS[:50])
    before = path.read_bytes()
    for end in (".units", ".salt"):
        file = path.with_name(f"ledger.jsonl{end}")
        content = file.read_text()
        file.write_text(other.with_name(f"other.jsonl{end}").read_text())
        with pytest.raises((LedgerError, ValueError), match=r"not the list that|not in the cohort"):
            reserve(book, ids=IDS[:5])
        file.write_text("no hex" if end == ".salt" else "")
        with pytest.raises(LedgerError, match="nothing was released"):
            reserve(book, ids=IDS[:5])
        file.unlink()
        with pytest.raises(LedgerError, match=r"without it no patient can be checked.*nothing was released"):
            reserve(book, ids=IDS[:5])
        file.write_text(content)
    assert path.read_bytes() == before
    reserve(book, ids=IDS)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cohort": " "}, "cohort name"),
        ({"cohort": "x" * 201}, "cohort name"),
        ({"ids": []}, "give all ids"),
        ({"ids": ["a", "b", "a"]}, "1 ids are there twice"),
        ({"ids": ["a", ""]}, "at least one character"),
        ({"ids": ["a", 7]}, "must be a text"),
        ({"unit": "hospital"}, "unit is 'hospital'"),
        ({"partitions": 0}, "partitions"),
        ({"partitions": 3}, "no ids were given"),
    ],
    ids=str,
)
def test_bad_registrations_make_no_ledger(path: Path, options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PrivacyLedger.register(path, **({"cohort": "Lungs", "budget": BUDGET} | options))
    assert not path.exists()


def test_another_relation_is_refused() -> None:
    with pytest.raises(ValueError, match="issue 378"):
        Cohort(name="Lungs", relation="replace one unit")


def test_digests_are_keyed_and_do_not_hang_on_the_order() -> None:
    assert keyed_digest(b"a" * 32, "x") != keyed_digest(b"b" * 32, "x") != keyed_digest(b"b" * 32, "y")
    assert digest_of(["b", "a"]) == digest_of(["a", "b"]) != digest_of(["a", "c"])


# --- parts


@settings(max_examples=20, deadline=None)
@given(parts=st.integers(2, 7), ids=st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=40, unique=True))
def test_every_patient_is_in_one_part_whoever_else_is_there(
    tmp_path_factory: pytest.TempPathFactory, parts: int, ids: list[str]
) -> None:
    hidden = CohortSecrets(tmp_path_factory.mktemp("cohort") / "ledger.jsonl")
    hidden.create(ids)
    found = hidden.partitions_of(ids, parts)
    assert set(found) == set(ids)
    assert all(0 <= part < parts for part in found.values())
    assert all(hidden.partitions_of([name], parts) == {name: part} for name, part in found.items())


def test_parts_share_the_budget_with_the_whole_and_not_with_each_other(path: Path) -> None:
    book = PrivacyLedger.register(path, cohort="Lungs", budget=BUDGET, ids=IDS, partitions=3)
    parts = [book.partition_ids(IDS, part) for part in range(3)]
    room = affordable_steps(STEP, BUDGET, at_most=1000)
    whole = reserve(book, ids=IDS, planned_steps=10)
    for part in range(3):
        with pytest.raises(PrivacyBudgetError, match=f"room for {room - 10} of {room - 9} steps"):
            reserve(book, ids=parts[part], partition=part, planned_steps=room - 9)
        reserve(book, ids=parts[part], partition=part, planned_steps=room - 10 - part)
    # The whole has room where its fullest part has.
    with pytest.raises(PrivacyBudgetError, match="is spent or reserved"):
        reserve(book, planned_steps=1)
    assert book.state.within_budget()
    assert book.state.epsilon(1e-5, reserved=True) == pytest.approx(epsilon(SelfComposedDpEvent(STEP, room), 1e-5))
    book.void(whole)
    assert book.require_room(step=STEP, planned_steps=room, unit="patient", fewest_steps=1) == 10


def test_a_part_must_be_the_one_that_was_fixed(path: Path) -> None:
    book = PrivacyLedger.register(path, cohort="Lungs", budget=BUDGET, ids=IDS, partitions=3)
    parts = [book.partition_ids(IDS, part) for part in range(3)]
    assert all(parts)
    before = path.read_bytes()
    for options, said in (
        ({"ids": parts[0], "partition": 1}, "belong to other parts"),
        ({"ids": [*parts[1], parts[2][0]], "partition": 1}, "belong to other parts"),
        ({"partition": 1}, "the ids of the run are not known"),
        ({"ids": parts[0], "partition": 3}, r"belong to other parts|registered with 3"),
        ({"ids": parts[0], "partition": -1}, r"belong to other parts|registered with 3"),
    ):
        with pytest.raises(ValueError, match=said):
            reserve(book, **options)
    assert path.read_bytes() == before
    plain = PrivacyLedger(path.with_name("plain.jsonl"))
    with pytest.raises(ValueError, match="has no partitions"):
        plain.partition_ids(IDS, 0)
    with pytest.raises(ValueError, match="no cohort is registered"):
        reserve(plain, ids=IDS, partition=0)


# --- budgets for runs that are chosen one after another


def test_an_adaptive_budget_is_kept_by_the_filter(path: Path) -> None:
    book = PrivacyLedger.register(path, cohort="Lungs", budget=BUDGET, adaptive=True)
    order = filters.filter_order(BUDGET)
    room = filters.steps_through_filter(STEP, BUDGET, order, at_most=10**6)
    entry = reserve(book, planned_steps=10**6, fewest_steps=1)
    assert book.entry(entry).granted == room < affordable_steps(STEP, BUDGET, at_most=10**6)
    for noise in (10.0, 30.0, 1000.0):
        try:
            reserve(book, step=GaussianDpEvent(noise), planned_steps=1)
        except PrivacyBudgetError:
            continue
        spent = sum(filters.divergence_at(event, order) for event in book.state.events(reserved=True))
        assert spent <= filters.allowance(BUDGET, order)
    assert book.state.within_budget()
    # What was released may have been chosen by what came before, so nothing less than the budget is claimed.
    assert book.epsilon(1e-5) == 0
    book.record_step(entry)
    assert book.epsilon(1e-5) == pytest.approx(BUDGET.epsilon)
    assert book.epsilon(1e-5) > book.epsilon_bounds(1e-5).epsilon
    assert book.epsilon(1e-7) > book.epsilon(1e-5) > book.epsilon(1e-3)
    other = PrivacyLedger.register(path.with_name("other.jsonl"), cohort="Lungs", budget=BUDGET, adaptive=True)
    assert other.what_if(STEP, 5).steps_that_fit == 5


def test_a_run_that_is_not_private_passes_no_filter(path: Path) -> None:
    book = PrivacyLedger.register(path, cohort="Lungs", budget=BUDGET, adaptive=True)
    with pytest.raises(PrivacyBudgetError, match="not private"):
        reserve(book, not_private=("insecure_seed was set",))


# --- what if


def test_what_if_says_what_would_be_and_writes_nothing(path: Path) -> None:
    book = PrivacyLedger.register(path, cohort="Lungs", budget=BUDGET)
    entry = reserve(book, planned_steps=4)
    book.record_step(entry)
    before = path.read_bytes()
    found = book.what_if(GaussianDpEvent(5.0), 6)
    assert (found.delta, found.steps) == (1e-5, 6)
    assert found.epsilon_now == epsilon(SelfComposedDpEvent(STEP, 4), 1e-5)
    then = composed([SelfComposedDpEvent(STEP, 4), SelfComposedDpEvent(GaussianDpEvent(5.0), 6)])
    assert found.epsilon_then == epsilon(then, 1e-5)
    assert found.steps_that_fit == book.require_room(
        step=GaussianDpEvent(5.0), planned_steps=6, unit="patient", fewest_steps=1
    )
    assert path.read_bytes() == before
    assert len(book.entries) == 1
    assert book.what_if(STEP, 1, delta=1e-7).epsilon_now > found.epsilon_now
    for bad in (0, math.nan, 2.0):
        with pytest.raises(ValueError, match="delta"):
            book.what_if(STEP, 1, delta=bad)
    with pytest.raises(ValueError, match="give a delta"):
        PrivacyLedger(path.with_name("plain.jsonl")).what_if(STEP, 1)


# --- reading alone


def test_a_state_is_read_from_a_disk_that_nobody_can_write(path: Path, tmp_path: Path) -> None:
    book = PrivacyLedger.register(path, cohort="Lungs", budget=BUDGET)
    entry = reserve(book)
    book.record_step(entry)
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / path.name).write_bytes(path.read_bytes())
    state = LedgerState.of_file(copy / path.name)
    assert state.entries == book.entries
    assert (state.lines, state.last_hash) == book.head
    assert [file.name for file in copy.iterdir()] == [path.name], "no lock, no head"
    first = LedgerState.of_file(path, lines=2)
    assert (first.lines, first.entries[0].steps) == (2, 0)
    with pytest.raises(LedgerError, match="has 3 lines, not 9"):
        LedgerState.of_file(path, lines=9)
