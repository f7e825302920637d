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

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import random
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from dp_accounting.dp_event import (
    ComposedDpEvent,
    DiscreteLaplaceDpEvent,
    DpEvent,
    GaussianDpEvent,
    SelfComposedDpEvent,
)

from monai_privacy.accounting import (
    LedgerError,
    LedgerState,
    PrivacyBudget,
    PrivacyBudgetError,
    PrivacyLedger,
    affordable_steps,
    dpsgd_event,
    epsilon,
    ledger,
    ledger_file,
    ledger_head,
    ledger_state,
)
from monai_privacy.accounting.events import composed
from monai_privacy.accounting.ledger_file import LedgerFile

STEP = dpsgd_event(sample_rate=0.1, noise_multiplier=2.0).event
# Composed Gaussians are one Gaussian, so what fits a budget is found in no time.
GAUSSIAN = GaussianDpEvent(10.0)


def begin(book: PrivacyLedger, *, step: DpEvent = STEP, planned_steps: int = 100, **options: Any) -> str:
    settings = {"step": step, "planned_steps": planned_steps, "fewest_steps": 1, "delta": 1e-5, "unit": "patient"}
    return book.reserve(**(settings | options))


def steps_on(path: Path) -> int:
    """Steps that a new reader finds."""
    return sum(entry.steps for entry in PrivacyLedger(path).entries)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


@pytest.fixture
def written(path: Path) -> Path:
    """A ledger of seven lines: its opening, one run and five steps."""
    book = PrivacyLedger(path)
    entry = begin(book, facts={"expected_batch_size": 256})
    for _ in range(5):
        book.record_step(entry)
    return path


# Forks processes that have everything imported, runs code in each, kills them if asked to, and tells what they said.
NURSERY = """
import json, os, signal, sys, time
import monai_privacy.accounting
print(flush=True)
for line in sys.stdin:
    task, children = json.loads(line), []
    for names in task["processes"]:
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            def say(what):
                os.write(writer, f"{what}\\n".encode())
            try:
                exec(task["code"], {"say": say} | names)
            except Exception as error:
                say(f"{type(error).__name__}: {error}")
            finally:
                os._exit(0)
        os.close(writer)
        children.append((child, open(reader)))
    if task["kill_after"] is not None:
        time.sleep(task["kill_after"])
        for child, _ in children:
            os.kill(child, signal.SIGKILL)
    print(json.dumps([reader.read().splitlines() for _, reader in children]), flush=True)
    for child, _ in children:
        os.waitpid(child, 0)
"""
RECORD = """
from monai_privacy.accounting import PrivacyLedger
book = PrivacyLedger(path)
while True:
    say(book.record_step(entry))
"""
Fork = Callable[..., list[list[str]]]


@pytest.fixture(scope="module")
def fork() -> Iterator[Fork]:
    nursery = subprocess.Popen(
        [sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert nursery.stdin is not None
    assert nursery.stdout is not None
    nursery.stdout.readline()

    def run(code: str, *processes: dict, kill_after: float | None = None) -> list[list[str]]:
        task = {"code": code, "processes": processes, "kill_after": kill_after}
        nursery.stdin.write(json.dumps(task) + "\n")
        nursery.stdin.flush()
        return json.loads(nursery.stdout.readline())

    yield run
    nursery.stdin.close()
    assert nursery.wait(timeout=60) == 0
    nursery.stdout.close()


class OsWith:
    """The os module with some functions replaced, for the ledger alone."""

    def __init__(self, **replaced: Callable) -> None:
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


# --- what it is for


def test_begin_and_record(path: Path) -> None:
    book = PrivacyLedger(path)
    assert book.entries == ()
    assert book.epsilon(1e-5) == 0
    entry = begin(
        book,
        planned_steps=3,
        facts={"max_grad_norm": 0.5},
        unnoised=("training loss",),
        assumptions=("the number of patients is public",),
    )
    assert book.steps_left(entry) == 3
    assert book.epsilon(1e-5) == 0
    assert [book.record_step(entry) for _ in range(2)] == [1, 2]
    assert book.steps_left(entry) == 1
    for reader in (book, PrivacyLedger(path)):
        (found,) = reader.entries
        assert found == reader.entry(entry)
        assert (found.entry_id, found.unit, found.step) == (entry, "patient", STEP)
        assert (found.steps, found.planned_steps, found.delta) == (2, 3, 1e-5)
        assert found.facts == {"max_grad_norm": 0.5}
        assert found.unnoised == ("training loss",)
        assert found.assumptions == ("the number of patients is public",)
        assert found.not_private == ()
        assert reader.epsilon(1e-5) == epsilon(SelfComposedDpEvent(STEP, 2), 1e-5)
        assert reader.epsilon_bounds(1e-5).epsilon == reader.epsilon(1e-5)


def test_epsilon_is_of_all_runs_together(path: Path) -> None:
    book = PrivacyLedger(path)
    for step, count in ((STEP, 3), (GAUSSIAN, 2)):
        entry = begin(book, step=step)
        for _ in range(count):
            book.record_step(entry)
    begin(book, step=GaussianDpEvent(0.1))  # never ran
    parts = [SelfComposedDpEvent(STEP, 3), SelfComposedDpEvent(GAUSSIAN, 2)]
    assert book.epsilon(1e-5) == epsilon(composed(parts), 1e-5)
    assert book.epsilon(1e-5) < sum(epsilon(part, 1e-5) for part in parts)
    assert book.epsilon(1e-7) > book.epsilon(1e-5)


def test_planned_steps_are_never_passed(path: Path) -> None:
    book = PrivacyLedger(path)
    entry, other = begin(book, planned_steps=2), begin(book, planned_steps=1)
    assert [book.record_step(entry), book.record_step(entry)] == [1, 2]
    before = path.read_bytes()
    for again in (book, PrivacyLedger(path)):
        assert again.steps_left(entry) == 0
        with pytest.raises(PrivacyBudgetError, match=r"all 2 planned steps: nothing was released"):
            again.record_step(entry)
    assert path.read_bytes() == before
    assert book.record_step(other) == 1


@pytest.mark.parametrize("entry", ["", "0" * 32, "unknown"])
def test_an_unknown_entry_is_refused(written: Path, entry: str) -> None:
    book, before = PrivacyLedger(written), written.read_bytes()
    for use in (book.record_step, book.steps_left, book.entry):
        with pytest.raises(LedgerError, match="checkpoint belongs to another ledger"):
            use(entry)
    assert written.read_bytes() == before


@pytest.mark.parametrize(
    "options",
    [
        {"planned_steps": 0},
        {"planned_steps": 2.5},
        {"planned_steps": True},
        {"delta": 0},
        {"delta": 1},
        {"delta": math.nan},
        {"unit": "hospital"},
        {"unit": None},
        {"step": DiscreteLaplaceDpEvent(1.0, 1)},
        {"step": GaussianDpEvent(math.nan)},
        {"step": GaussianDpEvent(-1.0)},
        {"step": ComposedDpEvent([])},
    ],
    ids=str,
)
def test_bad_runs_are_refused(written: Path, options: dict) -> None:
    book, before = PrivacyLedger(written), written.read_bytes()
    with pytest.raises(ValueError, match=r"planned_steps|delta|unit|noise_multiplier|account for"):
        begin(book, **options)
    assert written.read_bytes() == before


def test_costs_of_different_units_are_not_added(written: Path) -> None:
    book, before = PrivacyLedger(written), written.read_bytes()
    with pytest.raises(ValueError, match=r"unit is 'image', but .* counts in units of one patient"):
        begin(book, unit="image")
    assert written.read_bytes() == before


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, {1, 2}, b"bytes", {"deep": [math.nan]}], ids=str)
def test_facts_that_are_no_json_are_refused(written: Path, value: object) -> None:
    book, before = PrivacyLedger(written), written.read_bytes()
    with pytest.raises(LedgerError, match=r"cannot be recorded.*Nothing was released"):
        begin(book, facts={"value": value})
    assert written.read_bytes() == before
    book.record_step(book.entries[0].entry_id)
    assert steps_on(written) == 6


def test_a_run_without_guarantee_costs_infinitely_much(path: Path) -> None:
    book = PrivacyLedger(path)
    private = begin(book)
    book.record_step(private)
    insecure = begin(book, not_private=("insecure_seed was set",))
    assert book.epsilon(1e-5) < 10
    book.record_step(insecure)
    assert book.epsilon(1e-5) == PrivacyLedger(path).epsilon(1e-5) == math.inf
    book.record_step(private)
    assert book.epsilon(0.5) == math.inf


# --- the budget


def test_the_budget_is_fixed_when_the_ledger_is_made(tmp_path: Path) -> None:
    budget = PrivacyBudget(2.0, 1e-5)
    for name, first, others in (
        ("with", budget, [PrivacyBudget(3.0, 1e-5), PrivacyBudget(2.0, 1e-4), PrivacyBudget(1.0, 1e-5)]),
        ("without", None, [budget]),
    ):
        path = tmp_path / name
        assert PrivacyLedger(path, budget=first).budget == first
        before = path.read_bytes()
        for other in others:
            with pytest.raises(ValueError, match=r"a cohort's budget is fixed when its ledger is made"):
                PrivacyLedger(path, budget=other)
        for same in (first, None):
            assert PrivacyLedger(path, budget=same).budget == first
        assert path.read_bytes() == before


def test_the_budget_is_never_passed_by_several_runs_together(path: Path) -> None:
    budget = PrivacyBudget(2.2, 1e-5)
    book = PrivacyLedger(path, budget=budget)
    steps = (GaussianDpEvent(4.0), GaussianDpEvent(5.0))
    runs = [
        begin(book, step=steps[0], planned_steps=3),
        begin(book, step=STEP, planned_steps=1),
        begin(book, step=steps[1]),
    ]
    granted = [entry.granted for entry in book.entries]
    assert granted[:2] == [3, 1], "what fits is granted whole"
    assert 0 < granted[2] < 100, "of what does not, as much as fits"
    for run, count in zip(runs, granted, strict=True):
        assert [book.record_step(run) for _ in range(count)] == list(range(1, count + 1))
        assert book.epsilon(budget.delta) <= budget.epsilon
        assert book.steps_left(run) == 0
        with pytest.raises(PrivacyBudgetError, match="nothing was released"):
            book.record_step(run)
    assert [entry.steps for entry in PrivacyLedger(path).entries] == granted
    # And it was used up: one more of either would not have fitted.
    (event,) = book.state.events()
    for step in steps:
        assert epsilon(composed([event, step]), budget.delta) > budget.epsilon
    before = path.read_bytes()
    for step in steps:
        with pytest.raises(PrivacyBudgetError, match=r"budget \(epsilon 2.2, delta 1e-05\) .* is spent"):
            begin(book, step=step)
    assert path.read_bytes() == before
    # A cheaper run still fits: the rule is the budget, not a flag.
    cheap = begin(book, step=GaussianDpEvent(1e4), planned_steps=1)
    assert book.record_step(cheap) == 1


def test_a_reservation_holds_from_the_first_step_on(path: Path) -> None:
    book = PrivacyLedger(path, budget=PrivacyBudget(2.0, 1e-5))
    room = affordable_steps(GAUSSIAN, PrivacyBudget(2.0, 1e-5), at_most=1000)
    first = begin(book, step=GAUSSIAN, planned_steps=room - 5)
    before = path.read_bytes()
    with pytest.raises(PrivacyBudgetError, match=rf"room for 5 of {room} steps .*nothing was reserved"):
        begin(book, step=GAUSSIAN, planned_steps=room, fewest_steps=None)
    assert path.read_bytes() == before, "denied by default"
    second = begin(book, step=GAUSSIAN, planned_steps=room, fewest_steps=5)
    assert book.entry(second).granted == 5
    assert book.steps_left(first) == room - 5, "no later run takes what an earlier one reserved"
    assert book.epsilon(1e-5) == 0
    assert book.state.epsilon(1e-5, reserved=True) == pytest.approx(epsilon(SelfComposedDpEvent(GAUSSIAN, room), 1e-5))
    book.record_step(first)
    book.commit(first)
    assert book.require_room(step=GAUSSIAN, planned_steps=room, unit="patient", fewest_steps=1) == room - 5 - 1
    book.void(second)
    assert book.require_room(step=GAUSSIAN, planned_steps=room, unit="patient", fewest_steps=1) == room - 1


def test_a_run_is_closed_once_and_goes_on_when_reopened(path: Path) -> None:
    book = PrivacyLedger(path, budget=PrivacyBudget(2.0, 1e-5))
    entry = begin(book, step=GAUSSIAN, planned_steps=10)
    with pytest.raises(ValueError, match="has recorded no step: void it instead"):
        book.commit(entry)
    assert book.reopen(entry) == 10, "a run that is open is left as it is"
    for _ in range(4):
        book.record_step(entry)
    with pytest.raises(ValueError, match="recorded 4 steps, which may have been released: it cannot be void"):
        book.void(entry)
    book.commit(entry, artifacts={"model": "ab" * 32})
    for reader in (book, PrivacyLedger(path)):
        found = reader.entry(entry)
        assert (found.state, found.steps, found.granted, found.artifacts) == ("committed", 4, 4, {"model": "ab" * 32})
        for close in (reader.commit, reader.void):
            with pytest.raises(ValueError, match="is committed already"):
                close(entry)
        with pytest.raises(
            PrivacyBudgetError, match=r"is committed, so its run has ended: nothing was released\. Reopen"
        ):
            reader.record_step(entry)
    assert book.reopen(entry) == 6
    assert book.record_step(entry) == 5
    assert PrivacyLedger(path).steps_left(entry) == 5
    for _ in range(5):
        book.record_step(entry)
    book.commit(entry)
    with pytest.raises(PrivacyBudgetError, match="all 10 planned steps"):
        book.reopen(entry)
    other = begin(book, step=GAUSSIAN, planned_steps=3)
    book.void(other)
    assert book.entry(other).state == "void"
    assert book.reopen(other, fewest_steps=2) == 3


def test_reopening_asks_the_budget_again(path: Path) -> None:
    budget = PrivacyBudget(2.0, 1e-5)
    book = PrivacyLedger(path, budget=budget)
    room = affordable_steps(GAUSSIAN, budget, at_most=1000)
    entry = begin(book, step=GAUSSIAN, planned_steps=room)
    book.record_step(entry)
    book.commit(entry)
    other = begin(book, step=GAUSSIAN, planned_steps=room - 3)
    with pytest.raises(PrivacyBudgetError, match="nothing was reserved"):
        book.reopen(entry)
    assert book.entry(entry).state == "committed"
    assert book.reopen(entry, fewest_steps=1) == 2
    assert book.state.within_budget()
    book.void(other)
    assert book.state.within_budget()


def test_a_run_that_does_not_fit_at_all_is_not_begun(path: Path) -> None:
    book = PrivacyLedger(path, budget=PrivacyBudget(0.1, 1e-5))
    before = path.read_bytes()
    with pytest.raises(PrivacyBudgetError, match="nothing was released"):
        begin(book, step=GaussianDpEvent(1.0))
    assert path.read_bytes() == before


def test_a_run_without_guarantee_fits_no_budget(path: Path) -> None:
    book = PrivacyLedger(path, budget=PrivacyBudget(50.0, 1e-5))
    before = path.read_bytes()
    with pytest.raises(PrivacyBudgetError, match=r"not private \(insecure_seed was set\).*nothing was released"):
        begin(book, not_private=("insecure_seed was set",))
    assert path.read_bytes() == before
    assert book.record_step(begin(book)) == 1


RESERVE = """
from monai_privacy.accounting import PrivacyLedger
from dp_accounting.dp_event import GaussianDpEvent
book = PrivacyLedger(path)
while True:
    entry = book.reserve(step=GaussianDpEvent(10.0), planned_steps=planned, delta=1e-5, unit="patient")
    for _ in range(used):
        say(book.record_step(entry))
    if used:
        book.commit(entry)
"""


def test_two_processes_never_overspend_together(path: Path, fork: Fork) -> None:
    budget = PrivacyBudget(1.5, 1e-5)
    book = PrivacyLedger(path, budget=budget)
    said = fork(RESERVE, *({"path": str(path), "planned": 3, "used": 2} for _ in range(2)))
    for *numbers, reason in said:
        assert numbers == ["1", "2"] * (len(numbers) // 2)
        assert reason.startswith("PrivacyBudgetError: ")
    entries = book.entries
    assert len(entries) == sum(len(numbers) // 2 for *numbers, _ in said)
    # Equal steps of Gaussian noise: all runs together are one, so the sum is known. Two of three were used each time.
    room = affordable_steps(GAUSSIAN, budget, at_most=200)
    assert room - 3 < sum(entry.steps for entry in entries) <= room
    assert book.epsilon(budget.delta) <= budget.epsilon


@pytest.mark.slow(seconds=15)
def test_two_processes_killed_at_any_point_never_overspend(tmp_path: Path, fork: Fork) -> None:
    """200 kills: what was acknowledged is on the ledger, and what all may still do fits the budget."""
    budget, chance, acknowledged = PrivacyBudget(8.0, 1e-5), random.Random(1), 0
    # So long that a few steps are recorded on this machine, however busy it is.
    alone = {"path": str(tmp_path / "alone.jsonl"), "planned": 3, "used": 3}
    PrivacyLedger(tmp_path / "alone.jsonl", budget=PrivacyBudget(1.0, 1e-5))
    start = time.monotonic()
    (numbers,) = fork(RESERVE, alone)
    longest = 6 * (time.monotonic() - start) / len(numbers)
    for batch in range(10):
        path = tmp_path / f"{batch}.jsonl"
        book = PrivacyLedger(path, budget=budget)
        for _ in range(20):
            before = sum(entry.steps for entry in book.entries)
            names = {"path": str(path), "planned": chance.randint(1, 9)}
            said = fork(
                RESERVE,
                names | {"used": 1},
                names | {"used": names["planned"]},
                kill_after=chance.uniform(0.0, longest),
            )
            numbers = sum(line.isdigit() for lines in said for line in lines)
            steps = sum(entry.steps for entry in PrivacyLedger(path).entries)
            # Each of both may have recorded one more that it could not say.
            assert before + numbers <= steps <= before + numbers + 2
            acknowledged += numbers
        assert book.state.within_budget()
        assert book.state.epsilon(budget.delta, reserved=True) <= budget.epsilon
        # Crashed runs keep what they reserved, until somebody closes them.
        open_runs = [entry for entry in book.entries if entry.state == "reserved"]
        reserved = book.state.epsilon(budget.delta, reserved=True)
        for entry in open_runs:
            (book.commit if entry.steps else book.void)(entry.entry_id)
        assert book.state.epsilon(budget.delta, reserved=True) == book.epsilon(budget.delta) <= reserved
        if any(entry.steps_left for entry in open_runs):
            assert book.epsilon(budget.delta) < reserved
    assert acknowledged > 20


# --- several writers


def test_two_processes_lose_no_step(path: Path, fork: Fork) -> None:
    book = PrivacyLedger(path)
    entries = [begin(book, planned_steps=60), begin(book, planned_steps=60)]
    # Under two names: both must share one lock.
    link = path.with_name("link.jsonl")
    link.symlink_to(path)
    said = fork(RECORD, {"path": str(path), "entry": entries[0]}, {"path": str(link), "entry": entries[1]})
    for *numbers, reason in said:
        assert numbers == [str(n) for n in range(1, 61)]
        assert "all 60 planned steps" in reason
    assert [entry.steps for entry in book.entries] == [60, 60]
    assert steps_on(link) == 120
    assert len(path.read_bytes().splitlines()) == 1 + 2 + 120


def test_two_processes_may_share_one_run(path: Path, fork: Fork) -> None:
    book = PrivacyLedger(path)
    entry = begin(book, planned_steps=50)
    said = fork(RECORD, *[{"path": str(path), "entry": entry}] * 2)
    numbers = [int(number) for *numbers, _ in said for number in numbers]
    assert sorted(numbers) == list(range(1, 51))


def test_threads_may_share_one_ledger(path: Path) -> None:
    book = PrivacyLedger(path)
    entry = begin(book)
    numbers: list[int] = []
    threads = [
        threading.Thread(target=lambda: numbers.extend([book.record_step(entry) for _ in range(15)])) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(numbers) == list(range(1, 46))
    assert steps_on(path) == 45


def test_a_step_is_on_the_disk_when_it_may_be_released(path: Path, fork: Fork) -> None:
    book = PrivacyLedger(path)
    entry = begin(book)
    for number in (1, 2, 3):
        assert book.record_step(entry) == number
        count = "from monai_privacy.accounting import PrivacyLedger; say(PrivacyLedger(path).entries[0].steps)"
        assert fork(count, {"path": str(path)}) == [[str(number)]]


def test_a_step_is_synchronised_before_it_may_be_released(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def write(descriptor: int, data: bytes) -> int:
        # A line may be written in pieces; each must be there before the disk is asked to keep it.
        calls.append("write")
        return os.write(descriptor, data[:50])

    def fsync(descriptor: int) -> None:
        found = os.fstat(descriptor)
        calls.append("folder" if stat.S_ISDIR(found.st_mode) else f"file of {found.st_size} bytes")
        os.fsync(descriptor)

    monkeypatch.setattr(ledger_file, "os", OsWith(write=write, fsync=fsync))
    book = PrivacyLedger(path)
    assert calls[-2:] == [f"file of {path.stat().st_size} bytes", "folder"]
    entry = begin(book)
    calls.clear()
    book.record_step(entry)
    assert calls[-1] == f"file of {path.stat().st_size} bytes"
    assert set(calls[:-1]) == {"write"}
    assert len(calls) > 3


def test_several_steps_in_one_line_all_or_none(path: Path) -> None:
    book = PrivacyLedger(path)
    entry = begin(book, planned_steps=10)
    assert book.record_steps(entry, 4) == 4
    assert book.record_step(entry) == 5
    with pytest.raises(PrivacyBudgetError):
        book.record_steps(entry, 6)
    assert book.entry(entry).steps == 5
    for count in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="count is"):
            book.record_steps(entry, count)  # type: ignore[arg-type]
    assert book.record_steps(entry, 5) == 10
    assert LedgerState.of_file(path).get(entry).steps == 10  # type: ignore[union-attr]


def test_a_charge_that_is_asked_for_again_is_made_once(path: Path) -> None:
    book = PrivacyLedger(path)
    entry = begin(book, planned_steps=10)
    for _ in range(3):
        assert book.record_steps(entry, 4, after=0, token="a") == 4
    assert book.record_steps(entry, 2, after=4, token="b") == 6
    # As many steps after as many, and somebody else's nevertheless.
    for after, token in ((4, "c"), (4, ""), (0, "a"), (3, "c"), (7, "c")):
        with pytest.raises(ValueError, match="another process charges the same run"):
            book.record_steps(entry, 2, after=after, token=token)
    assert book.entry(entry).steps == 6


def test_a_note_costs_nothing_and_stays(path: Path) -> None:
    book = PrivacyLedger(path)
    entry = begin(book, planned_steps=10)
    book.record_step(entry)
    spent = book.epsilon(1e-5)
    book.write_note(entry, "first")
    book.write_note(entry, "second")
    assert (PrivacyLedger(path).entry(entry).note, book.epsilon(1e-5)) == ("second", spent)
    book.commit(entry)
    book.write_note(entry, "third")
    with pytest.raises(LedgerError, match="no entry"):
        book.write_note("f" * 32, "text")


@pytest.mark.parametrize(("step", "count"), [(5, 4), (3, 4), (4, 0), (4, -1), (4, True), (11, 11), (0, 0)])
def test_a_line_of_several_steps_adds_up(path: Path, step: int, count: int) -> None:
    book = PrivacyLedger(path)
    entry = begin(book, planned_steps=10)
    file = LedgerFile(path)
    with file.locked():
        list(file.read_new())
        file.append({"kind": "step", "entry": entry, "step": step, "count": count})
    with pytest.raises(LedgerError, match="line 3"):
        LedgerState.of_file(path)


# --- crashes


def test_kill_nine_loses_no_acknowledged_step(path: Path, fork: Fork) -> None:
    entry = begin(PrivacyLedger(path), planned_steps=10**6)
    chance = random.Random(0)
    acknowledged = 0
    on_file = 0
    for _ in range(30):
        (said,) = fork(RECORD, {"path": str(path), "entry": entry}, kill_after=chance.uniform(0.0, 0.06))
        assert [int(number) for number in said] == list(range(on_file + 1, on_file + 1 + len(said)))
        acknowledged += len(said)
        found = steps_on(path)
        # At most one more: recorded, and not yet acknowledged.
        assert on_file + len(said) <= found <= on_file + len(said) + 1
        on_file = found
    assert acknowledged > 10
    assert PrivacyLedger(path).record_step(entry) == on_file + 1


@pytest.mark.parametrize("zeros", [0, 300], ids=["cut", "zeros after a power cut"])
def test_a_line_that_a_crash_cut_short_is_dropped(written: Path, zeros: int) -> None:
    whole = written.read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    head_of(written, lines=6)  # a crash before the line was whole is one before it was acknowledged
    for cut in [*range(start, len(whole) - 1, 9), len(whole) - 2]:
        written.write_bytes(whole[:cut] + b"\0" * zeros)
        book = PrivacyLedger(written)
        (entry,) = book.entries
        assert entry.steps == 4
        assert book.record_step(entry.entry_id) == 5
        assert steps_on(written) == 5
        assert b"\0" not in written.read_bytes()
        head_of(written, lines=6)


def test_a_whole_line_without_its_end_counts(written: Path) -> None:
    # An editor may strip the last line break: the step may have been released, so it must not be dropped.
    written.write_bytes(written.read_bytes().rstrip(b"\n"))
    book = PrivacyLedger(written)
    (entry,) = book.entries
    assert entry.steps == 5
    assert book.record_step(entry.entry_id) == 6
    assert steps_on(written) == 6


@pytest.mark.parametrize("whole", [b"", b"\n", b'{"line":1,"time":"2026-', b"\0" * 100], ids=str)
def test_a_ledger_whose_first_line_was_cut_short(path: Path, whole: bytes) -> None:
    if whole == b"\n":
        path.write_bytes(whole)
        with pytest.raises(LedgerError, match="line 1: no valid JSON"):
            PrivacyLedger(path)
        return
    path.write_bytes(whole)
    book = PrivacyLedger(path, budget=PrivacyBudget(1.0, 1e-5))
    assert book.budget == PrivacyLedger(path).budget == PrivacyBudget(1.0, 1e-5)


@pytest.mark.parametrize("content", [b"a note to myself", b'{"lr": 0.1}', b"7", b'{"line":2,', b"\0\0{", b"PK\x03\x04"])
def test_a_file_that_is_no_ledger_is_left_alone(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    for _ in range(2):
        with pytest.raises(LedgerError, match="line 1: it "):
            PrivacyLedger(path)
    assert path.read_bytes() == content


class Interrupt(BaseException):
    """Ctrl-C, at any line."""


def interrupted(action: Callable[[], object], after: int) -> bool:
    """Run ``action``, interrupted after that many lines of the ledger's code; tell whether it came to that."""
    files = {ledger.__file__, ledger_file.__file__, ledger_head.__file__, ledger_state.__file__}
    lines = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal lines
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            lines += 1
            if lines > after:
                raise Interrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    except Interrupt:
        return True
    finally:
        sys.settrace(before)
    return False


# What an interrupt leaves open, the garbage collector closes.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_anywhere_never_loses_a_step(tmp_path: Path) -> None:
    kept = 0
    for after in range(10_000):
        path = tmp_path / f"{after}.jsonl"
        book = PrivacyLedger(path)
        entry = begin(book)
        book.record_step(entry)
        PrivacyLedger(path).record_step(entry)  # another writer, so that there are lines to read
        if not interrupted(lambda book=book, entry=entry: book.record_step(entry), after):
            break
        on_file = steps_on(path)
        assert on_file in (2, 3)
        kept += on_file == 3
        # A notebook goes on with the same object: it is right, or refuses.
        try:
            number = book.record_step(entry)
        except LedgerError:
            assert steps_on(path) == on_file
        else:
            assert number == on_file + 1
            assert steps_on(path) == book.entry(entry).steps == number
    assert after > 50, "the code was traced"
    assert kept > 5, "interrupts after the line was written were among them"


# --- disks


def one_line_of(error: pytest.ExceptionInfo[LedgerError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert "nothing was released" in text.lower()
    return text


@pytest.mark.parametrize(
    ("call", "number", "said"),
    [
        ("open", errno.EROFS, "Read-only file system"),
        ("open", errno.EACCES, "Permission denied"),
        ("pread", errno.EIO, "Input/output error"),
        ("ftruncate", errno.EROFS, "Read-only file system"),
        ("write", errno.EROFS, "Read-only file system"),
        ("write", errno.ENOSPC, "No space left on device"),
        ("write", errno.EDQUOT, "quota"),
        ("fsync", errno.EIO, "Input/output error"),
    ],
)
def test_a_disk_that_refuses(written: Path, call: str, number: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    book = PrivacyLedger(written)
    (entry,) = book.entries
    before = written.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(ledger_file, "os", OsWith(**{call: fail}))
        with pytest.raises(LedgerError) as error:
            book.record_step(entry.entry_id)
    assert said in one_line_of(error)
    # Where only the synchronisation failed, the line may be there: that over-counts.
    on_file = 6 if call == "fsync" else 5
    assert steps_on(written) == on_file
    assert written.read_bytes().startswith(before)
    assert book.record_step(entry.entry_id) == on_file + 1
    assert steps_on(written) == on_file + 1


def test_half_a_line_and_then_a_full_disk(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = PrivacyLedger(written)
    (entry,) = book.entries
    before = written.read_bytes()
    left = 60

    def write(descriptor: int, data: bytes) -> int:
        nonlocal left
        if not left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = os.write(descriptor, data[:left])
        left -= count
        return count

    with monkeypatch.context() as patch:
        patch.setattr(ledger_file, "os", OsWith(write=write))
        with pytest.raises(LedgerError) as error:
            book.record_step(entry.entry_id)
    assert "No space left" in one_line_of(error)
    assert len(written.read_bytes()) == len(before) + 60
    assert steps_on(written) == 5
    assert book.record_step(entry.entry_id) == 6
    assert steps_on(written) == 6


def test_a_full_disk_in_a_real_process(written: Path, fork: Fork) -> None:
    code = """
import os, resource
from monai_privacy.accounting import LedgerError, PrivacyLedger
book = PrivacyLedger(path)
entry = book.entries[0].entry_id
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(path) + room, unlimited[1]))
for _ in range(2):
    try:
        book.record_step(entry)
    except LedgerError as error:
        say(error)
say(PrivacyLedger(path).entries[0].steps)
resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
say(book.record_step(entry))
"""
    for room, before in ((0, 5), (40, 6)):
        ((*errors, found, number),) = fork(code, {"path": str(written), "room": room})
        assert len(errors) == 2
        assert all("could not be written" in error and "nothing was released" in error for error in errors)
        assert (int(found), int(number)) == (before, before + 1)
    assert steps_on(written) == 7


def test_a_lock_that_cannot_be_taken(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book, before = PrivacyLedger(written), written.read_bytes()

    def acquire(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(ledger_file.FileLock, "acquire", acquire)
    for use in (lambda: book.record_step("any"), lambda: book.entries, lambda: PrivacyLedger(written)):
        with pytest.raises(LedgerError) as error:
            use()
        assert "could not be locked: Read-only file system" in one_line_of(error)
    assert written.read_bytes() == before


def test_a_lock_that_another_process_holds(written: Path) -> None:
    book = PrivacyLedger(written)
    (entry,) = book.entries
    book._file._lock_timeout = 0.2
    code = (
        "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, f"{written}.lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        before = written.read_bytes()
        for use in (lambda: book.record_step(entry.entry_id), lambda: begin(book), lambda: book.epsilon(1e-5)):
            with pytest.raises(LedgerError) as error:
                use()
            assert "is held by another process for over 0.2 s" in one_line_of(error)
        assert written.read_bytes() == before
        holder.kill()
    assert book.record_step(entry.entry_id) == 6


def test_paths_that_cannot_be_a_ledger(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a regular file")
    for path in (tmp_path / "file" / "ledger.jsonl", tmp_path / "file" / "deeper" / "ledger.jsonl"):
        with pytest.raises(LedgerError) as error:
            PrivacyLedger(path)
        assert "cannot hold a ledger" in one_line_of(error)
    (tmp_path / "folder").mkdir()
    with pytest.raises(LedgerError) as error:
        PrivacyLedger(tmp_path / "folder")
    assert "could not be read: Is a directory" in one_line_of(error)
    assert PrivacyLedger(tmp_path / "new" / "folders" / "ledger.jsonl").entries == ()


# --- tampering


def head_of(path: Path, *, lines: int) -> None:
    """Write the file that says how many lines were acknowledged, as it was after so many."""
    last = path.read_bytes().splitlines(keepends=True)[lines - 1]
    path.with_name(path.name + ".head").write_text(f"{lines} {hashlib.sha256(last).hexdigest()}\n")


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def forged(records: list[dict]) -> bytes:
    """The records with line numbers and hashes that fit, as somebody who read this code would write them."""
    text, previous = b"", "0" * 64
    for number, record in enumerate(records, 1):
        line = (json.dumps(record | {"line": number, "previous": previous}, separators=(",", ":")) + "\n").encode()
        text, previous = text + line, hashlib.sha256(line).hexdigest()
    return text


TAMPERING: dict[str, tuple[Callable[[list[bytes]], list[bytes]], str]] = {
    "a changed number": (
        lambda a: [a[0], a[1].replace(b'"planned_steps":100', b'"planned_steps":999'), *a[2:]],
        "line 3",
    ),
    "less noise": (
        lambda a: [a[0], a[1].replace(b'"noise_multiplier":2.0', b'"noise_multiplier":9.0'), *a[2:]],
        "line 3",
    ),
    "a budget": (lambda a: [a[0].replace(b'"budget":null', b'"budget":{"epsilon":9,"delta":0.1}'), *a[1:]], "line 2"),
    "a dropped first line": (lambda a: a[1:], "line 1"),
    "a dropped line": (lambda a: a[:3] + a[4:], "line 4"),
    "swapped lines": (lambda a: [*a[:3], a[4], a[3], *a[5:]], "line 4"),
    "a duplicated line": (lambda a: [*a[:4], a[3], *a[4:]], "line 5"),
    "the last line again": (lambda a: [*a, a[-1]], "line 8"),
    "an inserted line": (lambda a: [*a[:3], b'{"line":4,"kind":"step"}\n', *a[3:]], "line 4"),
    "an empty line": (lambda a: [*a[:3], b"\n", *a[3:]], "line 4"),
    "a list": (lambda a: [*a[:3], b"[4]\n", *a[3:]], "line 4"),
    "no JSON": (lambda a: [*a[:3], b"oops\n", *a[4:]], "line 4"),
    "no UTF-8": (lambda a: [*a[:3], b'"\xff\xfe"\n', *a[4:]], "line 4"),
    "a line of brackets": (lambda a: [*a[:3], b"[" * 200_000 + b"\n", *a[4:]], "line 4"),
    "a wrong hash": (lambda a: [*a[:-1], a[-1].replace(b'"previous":"', b'"previous":"0')], "line 7"),
    "a wrong number": (lambda a: [*a[:-1], a[-1].replace(b'"line":7', b'"line":8')], "line 7"),
    "NaN": (lambda a: [*a[:-1], a[-1].replace(b'"step":5', b'"step":NaN')], "line 7: .*NaN"),
    "Infinity": (lambda a: [*a[:-1], a[-1].replace(b'"step":5', b'"step":-Infinity')], "line 7: .*Infinity"),
    "an infinite number": (lambda a: [*a[:-1], a[-1].replace(b'"step":5', b'"step":1e999')], "line 7: .*1e999"),
    "Windows line ends": (lambda a: [line.replace(b"\n", b"\r\n") for line in a], "line 2"),
    # White space for JSON, and the end of a line for a careless reader, who would take the rest for cut short.
    "a carriage return": (lambda a: [*a[:3], a[3].replace(b'{"line":4,', b'{"line":4,\r'), *a[4:]], "line 5"),
    "a vertical tab": (lambda a: [*a[:3], a[3].replace(b'{"line":4,', b'{"line":4,\x0b'), *a[4:]], "line 4"),
    "a changed last line": (lambda a: [*a[:-1], a[-1].replace(b'"time":"2', b'"time":"3')], "line 7: .*was changed"),
    "a dropped last line": (lambda a: a[:-1], "line 7: it is missing, for 7 lines"),
    "three lines cut off": (lambda a: a[:-3], "line 5: it is missing, for 7 lines"),
    "half of the last line": (lambda a: [*a[:-1], a[-1][:20]], "line 7: it is missing"),
    "all lines": (lambda a: [], "line 1: it is missing"),
    "rubbish at the end": (lambda a: [*a, b"rubbish"], "line 8: it is neither"),
    "another end": (lambda a: [*a, b'{"line":9,"ti'], "line 8: it is neither"),
}


@pytest.mark.parametrize(("tamper", "named"), TAMPERING.values(), ids=TAMPERING.keys())
def test_tampering_is_noticed(written: Path, tamper: Callable, named: str) -> None:
    before = lines_of(written)
    after = b"".join(tamper(before))
    assert after != b"".join(before)
    written.write_bytes(after)
    for _ in range(2):
        with pytest.raises(LedgerError, match=named):
            PrivacyLedger(written)
    assert written.read_bytes() == after, "what was found is evidence, and stays"


COHORT = {
    "name": "a cohort", "unit": "patient", "num_units": None, "digest": None, "partitions": 1, "filter_order": None,
    "relation": "add or remove one unit",
}  # fmt: skip
CLOSE = {"kind": "commit", "artifacts": {}}
FORGERIES: dict[str, tuple[Callable[[list[dict]], object], str]] = {
    "an unknown format": (lambda r: r[0].update(format=1), r"line 1: .*format 1 is unknown"),
    "a filter of no order": (
        lambda r: r[0].update(budget={"epsilon": 1, "delta": 1e-5}, cohort=COHORT | {"filter_order": 2.345}),
        "line 1",
    ),
    "a filter without budget": (lambda r: r[0].update(cohort=COHORT | {"filter_order": 8.0}), "line 1: .*filter"),
    "a cohort of parts that are none": (
        lambda r: r[0].update(cohort=COHORT | {"partitions": 0}),
        "line 1: .*partitions",
    ),
    "an unknown relation": (lambda r: r[0].update(cohort=COHORT | {"relation": "replace"}), "line 1: .*replace"),
    "a part of the whole": (lambda r: r[1].update(partition=0), "line 2: .*partition is 0"),
    "more granted than planned": (lambda r: r[1].update(granted=101), "line 2: .*granted is 101"),
    "nothing granted": (lambda r: r[1].update(granted=0), "line 2: .*granted is 0"),
    "fewer granted than recorded": (lambda r: r[1].update(granted=4), "line 7: .*'step' is not expected"),
    "endless steps": (lambda r: r[1].update(planned_steps=10**12), "line 2: .*planned_steps"),
    "a commit of other steps": (
        lambda r: r.insert(4, CLOSE | {"entry": r[1]["entry"], "steps": 1}),
        "line 5: .*'commit'",
    ),
    "a step after the commit": (
        lambda r: r.insert(4, CLOSE | {"entry": r[1]["entry"], "steps": 2}),
        "line 6: .*'step'",
    ),
    "a void of what was released": (
        lambda r: r.insert(4, {"kind": "void", "entry": r[1]["entry"]}),
        "line 5: .*'void'",
    ),
    "an open run reopened": (
        lambda r: r.insert(4, {"kind": "reopen", "entry": r[1]["entry"], "granted": 100}),
        "line 5: .*'reopen'",
    ),
    "no format": (lambda r: r[0].pop("format"), "line 1"),
    "a damaged budget": (lambda r: r[0].update(budget={"epsilon": -1, "delta": 1e-5}), "line 1: .*epsilon is -1"),
    "half a budget": (lambda r: r[0].update(budget={"epsilon": 1}), "line 1"),
    "an unknown kind": (lambda r: r[3].update(kind="refund"), "line 4: .*'refund' is not expected"),
    "no kind": (lambda r: r[3].pop("kind"), "line 4: .*kind"),
    "a second opening": (lambda r: r.insert(3, r[0]), "line 4: .*'open' is not expected"),
    "no opening": (lambda r: r.pop(0), "line 1: .*'reserve' is not expected"),
    "the same run again": (lambda r: r.insert(3, r[1]), "line 4: .*'reserve' is not expected"),
    "a step of no run": (lambda r: r[3].update(entry="f" * 32), "line 4"),
    "a missing step": (lambda r: r.pop(3), "line 4: .*'step' is not expected"),
    "a repeated step": (lambda r: r.insert(3, r[2]), "line 4: .*'step' is not expected"),
    "a step back": (lambda r: r[4].update(step=-1), "line 5: .*'step' is not expected"),
    "no planned steps": (lambda r: r[1].update(planned_steps=0), "line 2: .*planned_steps is 0"),
    "a delta of 1": (lambda r: r[1].update(delta=1), "line 2: .*delta is 1"),
    "an unknown unit": (lambda r: r[1].update(unit="hospital"), "line 2: .*unit is 'hospital'"),
    "a free step": (lambda r: r[1].update(step_event={"kind": "composed", "events": []}), "line 2: .*no event"),
    "an unknown event": (lambda r: r[1].update(step_event={"kind": "os.system"}), "line 2: .*os.system"),
    "a huge number": (lambda r: r[1].update(delta=10**400), "line 2: .*delta is too large"),
    "no text": (lambda r: r[1].update(unnoised=7), "line 2"),
}


@pytest.mark.parametrize(("forge", "named"), FORGERIES.values(), ids=FORGERIES.keys())
def test_forged_lines_are_refused(written: Path, forge: Callable, named: str) -> None:
    records = [json.loads(line) for line in lines_of(written)]
    assert forged(records) == written.read_bytes(), "the forger knows the format"
    forge(records)
    text = forged(records)
    written.write_bytes(text)
    with pytest.raises(LedgerError, match=named):
        PrivacyLedger(written)
    assert written.read_bytes() == text


def test_what_others_forge_is_refused_by_those_who_have_the_file_open(written: Path) -> None:
    book = PrivacyLedger(written)
    (entry,) = book.entries
    records = [json.loads(line) for line in lines_of(written)]
    last = records[-1]
    written.write_bytes(forged([*records, last | {"step": 6}, last | {"step": 6}]))
    for use in (book.record_step, book.steps_left, book.entry, lambda _: book.epsilon(1e-5)):
        with pytest.raises(LedgerError, match="line 9"):
            use(entry.entry_id)
    # Put right, it goes on: the lines before the forged one count.
    written.write_bytes(forged([*records, last | {"step": 6}]))
    assert book.record_step(entry.entry_id) == 7
    assert steps_on(written) == 7


def test_a_file_that_changes_under_an_open_ledger(written: Path) -> None:
    book = PrivacyLedger(written)
    (entry,) = book.entries
    before = lines_of(written)
    uses = (book.record_step, book.steps_left, book.entry, lambda _: book.epsilon(1e-5), lambda _: begin(book))
    other = written.with_name("other.jsonl")
    begin(PrivacyLedger(other), facts={"long": "x" * 5000})
    for content, said in (
        (b"".join(before[:-1]), "has become shorter"),
        (b"", "has become shorter"),
        (other.read_bytes(), "line 8: "),
    ):
        written.write_bytes(content)
        for use in uses:
            with pytest.raises(LedgerError, match=said):
                use(entry.entry_id)
        assert written.read_bytes() == content
    written.unlink()
    for use in uses:
        with pytest.raises(LedgerError, match="has vanished"):
            use(entry.entry_id)
    assert not written.exists()
    written.write_bytes(b"".join(before))
    assert book.record_step(entry.entry_id) == 6


def test_a_writer_without_the_lock_is_noticed(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = PrivacyLedger(written)
    (entry,) = book.entries
    rival = b'{"line":8,"kind":"step"}\n'

    def open_late(*arguments: Any) -> int:
        with written.open("ab") as file:
            file.write(rival)
        return os.open(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ledger_file, "os", OsWith(open=open_late))
        with pytest.raises(LedgerError) as error:
            book.record_step(entry.entry_id)
    assert "does not hold" in one_line_of(error)
    assert lines_of(written)[-1] == rival, "what it recorded is not overwritten"


def test_a_file_that_vanishes_at_the_last_moment_does_not_come_back_empty(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = PrivacyLedger(written)
    (entry,) = book.entries

    def open_late(*arguments: Any) -> int:
        written.unlink()
        return os.open(*arguments)

    monkeypatch.setattr(ledger_file, "os", OsWith(open=open_late))
    with pytest.raises(LedgerError) as error:
        book.record_step(entry.entry_id)
    assert "could not be written" in one_line_of(error)
    assert not written.exists()
