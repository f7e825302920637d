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

"""The ledger of a cohort: every release, written before it happens; what it may still release; what it has cost."""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dp_accounting import dp_event
from dp_accounting.dp_event import DpEvent

from monai_privacy.accounting import accountants
from monai_privacy.accounting.accountants import EpsilonBounds, affordable_steps
from monai_privacy.accounting.events import composed, event_from_dict, event_to_dict
from monai_privacy.accounting.ledger_file import RESTORE, LedgerError, LedgerFile
from monai_privacy.accounting.values import PrivacyBudget, PrivacyBudgetError, checked_count, checked_delta

_FORMAT = 1
UNITS = ("patient", "image")


@dataclass(frozen=True)
class LedgerEntry:
    """One run, as the ledger knows it.

    Args:
        entry_id: random name of the run; a resumed run keeps it.
        unit: whose data one unit is: "patient" or "image".
        step: the event of one step.
        planned_steps: the most steps that this run may ever record.
        delta: the δ that the run was planned for.
        steps: steps recorded so far; each was recorded before it was released.
        facts: the public numbers of the plan, for the report.
        unnoised: what left this run without noise, by name.
        assumptions: what the claim rests on beyond the mechanism, by name.
        not_private: why the run carries no guarantee at all; empty where it does.
    """

    entry_id: str
    unit: str
    step: DpEvent
    planned_steps: int
    delta: float
    steps: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)
    unnoised: tuple[str, ...] = ()
    assumptions: tuple[str, ...] = ()
    not_private: tuple[str, ...] = ()

    @property
    def event(self) -> DpEvent:
        """What this run has released so far."""
        if not self.steps:
            return dp_event.NoOpDpEvent()
        return dp_event.SelfComposedDpEvent(self.step, self.steps)


class PrivacyLedger:
    """Every release on one cohort, in an append-only file.

    A step is recorded, and on the disk, before it is released: a crash over-counts and never under-counts. Restoring
    an old checkpoint does not shorten the ledger. Several processes may share the file.

    Args:
        path: the JSON-lines file; made at the first run.
        budget: the most that all releases in this file together may cost. It is written into the file and cannot be
            changed afterwards; a later opening may leave it out or must repeat it.

    Raises:
        LedgerError: where the file is damaged, unreadable or of an unknown version.
        ValueError: for a budget other than the one in the file.

    Guarantee: no step is recorded that would take the cohort past the budget, or a run past its planned steps. A run
    that carries no guarantee fits no budget.
    """

    def __init__(self, path: str | os.PathLike[str], *, budget: PrivacyBudget | None = None) -> None:
        self._file = LedgerFile(path)
        self._entries: dict[str, LedgerEntry] = {}
        self._budget: PrivacyBudget | None = None
        self._opened = False
        self._allowed: tuple[object, int] = (None, 0)
        with self._file.locked():
            self._refresh()
            if not self._opened:
                self._append({"kind": "open", "format": _FORMAT, "budget": _budget_to_dict(budget)})
        if budget is not None and budget != self._budget:
            raise ValueError(
                f"{self.path} was opened with budget {_say(self._budget)}, not {_say(budget)}: a cohort's budget is fixed "
                "when its ledger is made. Leave budget out, or take another ledger for another cohort."
            )

    def __repr__(self) -> str:
        return f"PrivacyLedger({str(self.path)!r}, budget={_say(self._budget)}, entries={len(self._entries)})"

    @property
    def path(self) -> os.PathLike[str]:
        """The file."""
        return self._file.path

    @property
    def budget(self) -> PrivacyBudget | None:
        """The most that all releases together may cost; None where none was set."""
        return self._budget

    @property
    def entries(self) -> tuple[LedgerEntry, ...]:
        """All runs, oldest first, as the file has them now."""
        self._sync()
        return tuple(self._entries.values())

    def entry(self, entry_id: str) -> LedgerEntry:
        """The run of that name, as the file has it now.

        Raises:
            LedgerError: where the file has no such run.
        """
        self._sync()
        return self._known(entry_id)

    @property
    def head(self) -> tuple[int, str]:
        """Number and SHA-256 of the last line that was read: they name that state of the ledger."""
        return self._file.head

    @property
    def event(self) -> DpEvent:
        """Everything that was released."""
        return composed(entry.event for entry in self.entries if entry.steps)

    def epsilon(self, delta: float) -> float:
        """ε at ``delta`` of everything released on this cohort; inf where a recorded run carries no guarantee."""
        entries = [entry for entry in self.entries if entry.steps]
        if any(entry.not_private for entry in entries):
            return math.inf
        return accountants.epsilon(composed(entry.event for entry in entries), delta)

    def epsilon_bounds(self, delta: float) -> EpsilonBounds:
        """Both bounds behind :meth:`epsilon`, of the mechanisms as recorded."""
        return accountants.epsilon_bounds(self.event, delta)

    def begin(
        self,
        *,
        step: DpEvent,
        planned_steps: int,
        delta: float,
        unit: str,
        facts: Mapping[str, Any] | None = None,
        unnoised: tuple[str, ...] = (),
        assumptions: tuple[str, ...] = (),
        not_private: tuple[str, ...] = (),
    ) -> str:
        """Write a new run into the ledger and return its name; releases nothing.

        Raises:
            PrivacyBudgetError: where not even one step fits the budget, as none does of a run that is not private.
            ValueError: for values out of range, or a unit other than that of the runs before.
        """
        record = {
            "kind": "begin",
            "entry": uuid.uuid4().hex,
            "unit": unit,
            "step_event": event_to_dict(step),
            "planned_steps": checked_count("planned_steps", planned_steps),
            "delta": checked_delta(delta),
            "facts": dict(facts or {}),
            "unnoised": list(unnoised),
            "assumptions": list(assumptions),
            "not_private": list(not_private),
        }
        with self._file.locked():
            self._refresh()
            self._require_room(_entry_from(record))
            self._append(record)
        return str(record["entry"])

    def require_room(self, *, step: DpEvent, planned_steps: int, unit: str, not_private: tuple[str, ...] = ()) -> None:
        """Refuse what :meth:`begin` would refuse, and write nothing.

        One more step of a run that has begun fits where one of a new run with the same step does.

        Raises:
            PrivacyBudgetError: where not even one step fits the budget.
            ValueError: for a unit other than that of the runs before.
        """
        self._sync()
        self._require_room(LedgerEntry("", unit, step, planned_steps, delta=0.5, not_private=not_private))

    def _require_room(self, entry: LedgerEntry) -> None:
        self._check_unit(entry.unit)
        if self._steps_within_budget(entry) < 1:
            raise PrivacyBudgetError(self._spent_message(entry))

    def steps_left(self, entry_id: str) -> int:
        """How many further steps of that run fit both its plan and the cohort's budget, as the file stands now."""
        self._sync()
        return self._steps_left(self._known(entry_id))

    def record_step(self, entry_id: str) -> int:
        """Charge the next step of a run; only when this returns may the step be released.

        Returns:
            The number of the step, counted from 1, crashed and repeated steps included.

        Raises:
            PrivacyBudgetError: where the step does not fit; nothing is charged.
            LedgerError: where the line cannot be written; nothing may be released.
        """
        with self._file.locked():
            self._refresh()
            entry = self._known(entry_id)
            if self._steps_left(entry) < 1:
                raise PrivacyBudgetError(
                    f"entry {entry_id[:8]} of {self.path} has recorded all {entry.planned_steps} planned steps: nothing "
                    "was released. Plan more steps in a new run."
                    if entry.steps >= entry.planned_steps
                    else self._spent_message(entry)
                )
            self._append({"kind": "step", "entry": entry_id, "step": entry.steps + 1})
            return entry.steps + 1

    def _steps_left(self, entry: LedgerEntry) -> int:
        return max(0, min(entry.planned_steps, self._steps_within_budget(entry)) - entry.steps)

    def _steps_within_budget(self, entry: LedgerEntry) -> int:
        """The most steps, recorded ones included, that the budget allows this run beside the others."""
        if self._budget is None:
            return entry.planned_steps
        others = [e for e in self._entries.values() if e.entry_id != entry.entry_id and e.steps]
        if entry.not_private or any(e.not_private for e in others):
            return 0
        # Solved once, and again only when another run on this ledger has moved.
        key = (entry.step, entry.planned_steps, [(e.entry_id, e.steps) for e in others])
        known, steps = self._allowed
        if known != key:
            spent = composed(e.event for e in others)
            steps = affordable_steps(entry.step, self._budget, spent=spent, at_most=entry.planned_steps)
            self._allowed = (key, steps)
        return steps

    def _spent_message(self, entry: LedgerEntry) -> str:
        if entry.not_private:
            return (
                f"the run is not private ({'; '.join(entry.not_private)}), so it does not fit the budget "
                f"{_say(self._budget)} of {self.path}: nothing was released. Debug with a ledger that has no budget."
            )
        return (
            f"the budget {_say(self._budget)} of {self.path} is spent: the next step does not fit, so nothing was "
            "released. Ask the cohort's data steward; a new ledger for the same patients would hide what they lost."
        )

    def _check_unit(self, unit: str) -> None:
        other = next((e for e in self._entries.values() if e.unit != unit), None)
        if other is not None:
            raise ValueError(
                f"unit is {unit!r}, but {self.path} counts in units of one {other.unit}: their costs cannot be added. "
                "Use the same unit for every run on this cohort."
            )

    def _known(self, entry_id: str) -> LedgerEntry:
        if entry_id not in self._entries:
            raise LedgerError(
                f"{self.path} has no entry {entry_id!r}: the checkpoint belongs to another ledger. Resume with the "
                "ledger of that run, or load the network alone to begin a new entry."
            )
        return self._entries[entry_id]

    def _sync(self) -> None:
        with self._file.locked():
            self._refresh()

    def _refresh(self) -> None:
        for record in self._file.read_new():
            self._apply(record)

    def _append(self, record: dict[str, Any]) -> None:
        self._file.append(record)
        # Read back, not applied: an interrupt anywhere leaves this object with what the file says, or less of it.
        self._refresh()

    def _apply(self, record: Mapping[str, Any]) -> None:
        try:
            kind = record["kind"]
            if kind == "open" and not self._opened:
                self._apply_open(record)
            elif kind == "begin" and self._opened and record["entry"] not in self._entries:
                self._entries[record["entry"]] = _entry_from(record)
            elif kind == "step" and record["step"] == self._entries[record["entry"]].steps + 1:
                entry = self._entries[record["entry"]]
                self._entries[entry.entry_id] = replace(entry, steps=entry.steps + 1)
            else:
                raise ValueError(f"{kind!r} is not expected here")
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise LedgerError(f"{self.path}, line {record['line']}: it cannot be read ({error}). {RESTORE}") from error

    def _apply_open(self, record: Mapping[str, Any]) -> None:
        if record["format"] != _FORMAT:
            raise ValueError(f"format {record['format']!r} is unknown to this version; update monai-privacy")
        self._budget = None if record["budget"] is None else PrivacyBudget(**record["budget"])
        self._opened = True


def _entry_from(record: Mapping[str, Any]) -> LedgerEntry:
    if record["unit"] not in UNITS:
        raise ValueError(f"unit is {record['unit']!r}, but it must be one of {', '.join(UNITS)}.")
    return LedgerEntry(
        entry_id=record["entry"],
        unit=record["unit"],
        step=event_from_dict(record["step_event"]),
        planned_steps=checked_count("planned_steps", record["planned_steps"]),
        delta=checked_delta(record["delta"]),
        facts=dict(record["facts"]),
        unnoised=tuple(record["unnoised"]),
        assumptions=tuple(record["assumptions"]),
        not_private=tuple(record["not_private"]),
    )


def _budget_to_dict(budget: PrivacyBudget | None) -> dict[str, float] | None:
    return None if budget is None else {"epsilon": budget.epsilon, "delta": budget.delta}


def _say(budget: PrivacyBudget | None) -> str:
    return "none" if budget is None else f"(epsilon {budget.epsilon:g}, delta {budget.delta:g})"
