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


"""What the lines of a ledger say: a cohort, its budget, its runs, and what they have cost together."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dp_accounting import dp_event
from dp_accounting.dp_event import DpEvent

from monai_privacy.accounting import accountants
from monai_privacy.accounting.accountants import EpsilonBounds, affordable_steps
from monai_privacy.accounting.cohort import UNITS, Cohort
from monai_privacy.accounting.event_json import event_from_dict
from monai_privacy.accounting.events import composed, leaves
from monai_privacy.accounting.filters import allowance, divergence_at, filtered_epsilon, steps_through_filter
from monai_privacy.accounting.ledger_file import RESTORE, LedgerError, LedgerFile
from monai_privacy.accounting.values import PrivacyBudget, checked_count, checked_delta, checked_steps

FORMAT = 2


@dataclass(frozen=True)
class LedgerEntry:
    """One run, as the ledger knows it.

    Args:
        entry_id: random name of the run; a resumed run keeps it.
        unit: whose data one unit is: "patient" or "image".
        step: the event of one step.
        planned_steps: the most steps that this run may ever record.
        delta: the δ that the run was planned for.
        granted: steps reserved for it while it is open; what it recorded once it is closed.
        steps: steps recorded so far; each was recorded before it was released.
        state: "reserved", "committed" or "void".
        partition: the part of the cohort it sees, counted from 0; None for the whole.
        purpose: who ran it and why, in words.
        members: "checked" where each of its patients was found in the registered cohort; else "not checked".
        facts: the public numbers of the plan, for the report.
        unnoised: what left this run without noise, by name.
        assumptions: what the claim rests on beyond the mechanism, by name.
        not_private: why the run carries no guarantee at all; empty where it does.
        artifacts: SHA-256 of what went in (code, configs) and came out (the model), by name.
        token: names the last charge of several steps, so that whoever asks for it again is not taken for somebody else.
        note: what the run last said about files of its own; it costs nothing.
    """

    entry_id: str
    unit: str
    step: DpEvent
    planned_steps: int
    delta: float
    granted: int = 0
    steps: int = 0
    state: str = "reserved"
    partition: int | None = None
    purpose: str = ""
    members: str = "not checked"
    facts: Mapping[str, Any] = field(default_factory=dict)
    unnoised: tuple[str, ...] = ()
    assumptions: tuple[str, ...] = ()
    not_private: tuple[str, ...] = ()
    artifacts: Mapping[str, str] = field(default_factory=dict)
    token: str = ""
    note: str = ""

    @property
    def event(self) -> DpEvent:
        """What this run has released so far."""
        return _repeated(self.step, self.steps)

    @property
    def reserved_event(self) -> DpEvent:
        """What it has released, or may still release without asking."""
        return _repeated(self.step, max(self.steps, self.granted))

    @property
    def steps_left(self) -> int:
        """Steps that it may still record."""
        return max(0, self.granted - self.steps) if self.state == "reserved" else 0


class LedgerState:
    """The state after some lines of a ledger; :meth:`apply` takes the next one.

    Several runs on disjoint parts of a cohort cost what the dearest part costs, together with the runs on the whole:
    a patient is in one part alone (parallel composition, McSherry 2009, Theorem 4).
    """

    def __init__(self) -> None:
        self.budget: PrivacyBudget | None = None
        self.cohort: Cohort | None = None
        self.opened = False
        self.lines = 0
        self.last_hash = "0" * 64
        self._entries: dict[str, LedgerEntry] = {}

    @classmethod
    def of_file(cls, path: str | os.PathLike[str], *, lines: int | None = None) -> LedgerState:
        """The state of the file, or of its first ``lines`` lines; writes nothing, not even a lock.

        Raises:
            LedgerError: naming the first line that is damaged, or where there are fewer lines.
        """
        state = cls()
        file = LedgerFile(path, read_only=True)
        for record in file.read_new():
            if record["line"] - 1 == lines:
                break
            state.apply(record, path)
        state.lines, state.last_hash = file.head
        if not state.opened:
            raise LedgerError(f"{path}, line 1: it is missing, so this is no ledger. {RESTORE}")
        if lines is not None and state.lines < lines:
            raise LedgerError(f"{path} has {state.lines} lines, not {lines}: it is older, or another ledger. {RESTORE}")
        return state

    @classmethod
    def of_entries(cls, entries: Iterable[LedgerEntry]) -> LedgerState:
        """A state with these runs alone, without cohort or budget."""
        state = cls()
        state._entries = {entry.entry_id: entry for entry in entries}
        return state

    def with_run(self, entry: LedgerEntry) -> LedgerState:
        """A state with one run more."""
        other = self.of_entries([*self.entries, entry])
        other.budget, other.cohort = self.budget, self.cohort
        return other

    @property
    def entries(self) -> tuple[LedgerEntry, ...]:
        """All runs, oldest first."""
        return tuple(self._entries.values())

    def get(self, entry_id: str) -> LedgerEntry | None:
        """The run of that name."""
        return self._entries.get(entry_id)

    @property
    def adaptive(self) -> bool:
        """Whether the budget holds even where runs were chosen after seeing what earlier runs gave."""
        return self.cohort is not None and self.cohort.filter_order is not None

    @property
    def delta(self) -> float | None:
        """The δ of the claim: the budget's, else the smallest of the runs; None where nothing was released."""
        if self.budget is not None:
            return self.budget.delta
        return min((entry.delta for entry in self.entries if entry.steps), default=None)

    def events(self, *, reserved: bool = False, besides: str | None = None) -> tuple[DpEvent, ...]:
        """What each part of the cohort has seen released, together with what the whole has; one where there are none.

        Args:
            reserved: counts what open runs may still release as well.
            besides: leaves this run out.
        """
        counted = [e for e in self.entries if e.entry_id != besides]
        numbers = sorted({e.partition for e in counted if e.partition is not None})
        parts: list[int | None] = [*numbers] or [None]
        events = []
        for part in parts:
            own = [e for e in counted if e.partition in (None, part)]
            events.append(composed(e.reserved_event if reserved else e.event for e in own if e.steps or reserved))
        return tuple(events)

    @property
    def not_private(self) -> bool:
        """Whether a run that carries no guarantee has released something."""
        return any(entry.not_private for entry in self.entries if entry.steps)

    def bounds(self, delta: float, *, reserved: bool = False) -> EpsilonBounds:
        """Both bounds on ε of the part that lost most, of the mechanisms as recorded, had all been fixed beforehand."""
        found = [accountants.epsilon_bounds(event, delta) for event in self.events(reserved=reserved)]
        return max(found, key=lambda bounds: bounds.epsilon)

    def epsilon(self, delta: float, *, reserved: bool = False) -> float:
        """ε at ``delta`` of everything released; inf where a run that released something carries no guarantee.

        Where the budget is adaptive, that of all that its filter may let through, as soon as anything was released: the
        bounds of what was released hold only for runs that were fixed beforehand.
        """
        if self.not_private:
            return math.inf
        if self.budget is not None and self.cohort is not None and self.cohort.filter_order is not None:
            used = any(entry.steps or (reserved and entry.steps_left) for entry in self.entries)
            # Whatever the file says was granted: the filter's bound holds where the filter held.
            if not self._through_filter(self.budget, self.cohort.filter_order):
                return math.inf
            return filtered_epsilon(self.budget, self.cohort.filter_order, checked_delta(delta)) if used else 0.0
        return self.bounds(delta, reserved=reserved).epsilon

    def steps_within_budget(self, entry: LedgerEntry) -> int:
        """The most steps, recorded ones included, that the budget allows this run beside all that others may use."""
        if self.budget is None:
            return entry.planned_steps
        others = [e for e in self.entries if e.entry_id != entry.entry_id]
        if entry.not_private or any(e.not_private and e.steps for e in others):
            return 0
        state = LedgerState.of_entries(
            e for e in others if entry.partition is None or e.partition in (None, entry.partition)
        )
        most = entry.planned_steps
        # The same sum more than once, where parts are alike, costs nothing: the accountants remember.
        for spent in state.events(reserved=True):
            if self.cohort is not None and self.cohort.filter_order is not None:
                order = self.cohort.filter_order
                most = min(most, steps_through_filter(entry.step, self.budget, order, spent=spent, at_most=most))
            else:
                most = affordable_steps(entry.step, self.budget, spent=spent, at_most=most)
            if not most:
                break
        return most

    def within_budget(self) -> bool:
        """Whether everything released and reserved keeps the budget."""
        if self.budget is None:
            return True
        if any(entry.not_private for entry in self.entries if entry.steps or entry.steps_left):
            return False
        if self.cohort is not None and self.cohort.filter_order is not None:
            return self._through_filter(self.budget, self.cohort.filter_order)
        events = self.events(reserved=True)
        return all(accountants.epsilon(event, self.budget.delta) <= self.budget.epsilon for event in events)

    def _through_filter(self, budget: PrivacyBudget, order: float) -> bool:
        return all(divergence_at(event, order) <= allowance(budget, order) for event in self.events(reserved=True))

    def check_new(self, entry: LedgerEntry) -> None:
        """Refuse a run that does not belong on this ledger.

        Raises:
            ValueError: for another unit than that of the cohort or of the runs before, or a part that does not exist.
        """
        unit = self.cohort.unit if self.cohort is not None else next((e.unit for e in self.entries), entry.unit)
        if unit != entry.unit:
            raise ValueError(
                f"unit is {entry.unit!r}, but this ledger counts in units of one {unit}: their costs cannot be added. "
                "Use the same unit for every run on this cohort."
            )
        parts = self.cohort.partitions if self.cohort is not None else 1
        if entry.partition is not None and (
            isinstance(entry.partition, bool)
            or not isinstance(entry.partition, int)
            or not 0 <= entry.partition < parts
            or parts == 1
        ):
            raise ValueError(
                f"partition is {entry.partition}, but the cohort was registered with {parts}: only parts that were fixed "
                "then, counted from 0, are known to be disjoint."
            )

    def apply(self, record: Mapping[str, Any], path: object) -> None:
        """Take the next line.

        Raises:
            LedgerError: naming the line, where it cannot follow those before.
        """
        try:
            self._apply(record)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
            raise LedgerError(f"{path}, line {record['line']}: it cannot be read ({error}). {RESTORE}") from error

    def _apply(self, record: Mapping[str, Any]) -> None:
        kind = record["kind"]
        if kind == "open" and not self.opened:
            self._open(record)
            return
        entry = self._entries.get(record["entry"]) if self.opened and kind != "open" else None
        if kind == "reserve" and self.opened and entry is None:
            entry = entry_from(record)
            self.check_new(entry)
        elif entry is None:
            raise ValueError(f"{kind!r} is not expected here")
        elif (
            kind == "step"
            and _number_of_steps(record) <= entry.steps_left
            and record["step"] == (entry.steps + _number_of_steps(record))
        ):
            entry = replace(entry, steps=record["step"], token=_text(record.get("token", "")))
        elif kind == "note":
            entry = replace(entry, note=_text(record["text"]))
        elif kind == "commit" and entry.state == "reserved" and record["steps"] == entry.steps and entry.steps:
            artifacts = {**entry.artifacts, **_texts(record["artifacts"])}
            entry = replace(entry, state="committed", granted=entry.steps, artifacts=artifacts)
        elif kind == "void" and entry.state == "reserved" and not entry.steps:
            entry = replace(entry, state="void", granted=0)
        elif kind == "reopen" and entry.state != "reserved":
            granted = _granted(record["granted"], entry)
            entry = replace(entry, state="reserved", granted=granted)
        else:
            raise ValueError(f"{kind!r} is not expected here")
        self._entries = {**self._entries, entry.entry_id: entry}

    def _open(self, record: Mapping[str, Any]) -> None:
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']!r} is unknown to this version, which reads {FORMAT}")
        self.budget = None if record["budget"] is None else PrivacyBudget(**record["budget"])
        self.cohort = None if record["cohort"] is None else Cohort.from_dict(record["cohort"])
        if self.cohort is not None and self.cohort.filter_order is not None:
            if self.budget is None:
                raise ValueError("a filter without a budget")
            divergence_at(dp_event.GaussianDpEvent(1.0), self.cohort.filter_order)
        self.opened = True


def entry_from(record: Mapping[str, Any]) -> LedgerEntry:
    """The run that a "reserve" line begins."""
    if record["unit"] not in UNITS:
        raise ValueError(f"unit is {record['unit']!r}, but it must be one of {', '.join(UNITS)}.")
    planned = checked_steps("planned_steps", record["planned_steps"])
    step = event_from_dict(record["step_event"])
    leaves(step)
    entry = LedgerEntry(
        entry_id=record["entry"],
        unit=record["unit"],
        step=step,
        planned_steps=planned,
        delta=checked_delta(record["delta"]),
        partition=record["partition"],
        purpose=_text(record["purpose"]),
        members=_text(record["members"]),
        facts=dict(record["facts"]),
        unnoised=_tuple(record["unnoised"]),
        assumptions=_tuple(record["assumptions"]),
        not_private=_tuple(record["not_private"]),
        artifacts=_texts(record["artifacts"]),
        note=_text(record.get("note", "")),
    )
    if not isinstance(entry.entry_id, str) or not re.fullmatch(r"[0-9a-f]{32}", entry.entry_id):
        raise ValueError(f"entry is {entry.entry_id!r}, but it must be 32 hexadecimal digits")
    size = entry.facts.get("num_patients", 1)
    if isinstance(size, bool) or not isinstance(size, int):
        raise ValueError(f"num_patients is {size!r} among the facts, but it must be a whole number")
    return replace(entry, granted=_granted(record["granted"], entry))


def _number_of_steps(record: Mapping[str, Any]) -> int:
    """How many steps a line records; one where it does not say."""
    return checked_count("count", record.get("count", 1))


def _granted(value: Any, entry: LedgerEntry) -> int:
    granted = checked_count("granted", value)
    if not entry.steps < granted <= entry.planned_steps:
        raise ValueError(f"granted is {granted}, not above {entry.steps} and at most {entry.planned_steps}")
    return granted


def _tuple(values: Iterable[Any]) -> tuple[str, ...]:
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"{values!r} is no list")
    return tuple(_text(value) for value in values)


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {_text(name): _text(value) for name, value in values.items()}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    value.encode()  # half of a character, which no file can hold, is a ValueError
    return value


def _repeated(step: DpEvent, count: int) -> DpEvent:
    return dp_event.SelfComposedDpEvent(step, count) if count else dp_event.NoOpDpEvent()
