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

import os
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dp_accounting.dp_event import DpEvent

from monai_privacy.accounting import ledger_messages as messages
from monai_privacy.accounting.accountants import EpsilonBounds
from monai_privacy.accounting.cohort import Cohort, CohortSecrets
from monai_privacy.accounting.event_json import event_to_dict
from monai_privacy.accounting.filters import filter_order
from monai_privacy.accounting.ledger_file import LedgerError, LedgerFile
from monai_privacy.accounting.ledger_state import FORMAT, LedgerEntry, LedgerState, entry_from
from monai_privacy.accounting.membership import checked_members, ids_of_part
from monai_privacy.accounting.values import (
    PrivacyBudget,
    PrivacyBudgetError,
    checked_count,
    checked_delta,
    checked_steps,
)


@dataclass(frozen=True)
class WhatIf:
    """What a further run would cost, had it been on the ledger.

    Args:
        delta: the δ of both.
        epsilon_now: ε of everything released and reserved.
        epsilon_then: the same with the run.
        steps: its steps.
        steps_that_fit: how many of them the budget allows; all where there is none.
    """

    delta: float
    epsilon_now: float
    epsilon_then: float
    steps: int
    steps_that_fit: int


class PrivacyLedger:
    """Every release on one cohort, in an append-only file.

    A run reserves its steps before the first, and is refused where they do not fit the budget beside all that was
    released and reserved before. Each step is then recorded, and on the disk, before it is released: a crash
    over-counts and never under-counts, and keeps the reservation. A run that has ended is committed, which frees what
    it did not use, or is void where it released nothing. Restoring an old checkpoint does not shorten the ledger.
    Several processes may share the file.

    Args:
        path: the JSON-lines file; made at the first run. :meth:`register` makes one for a named cohort.
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
        self._state = LedgerState()
        with self._file.locked():
            self._refresh()
            if not self._state.opened:
                self._append(_opening(None, budget))
        if budget is not None and budget != self.budget:
            raise ValueError(
                f"{self.path} was opened with budget {messages.say(self.budget)}, not {messages.say(budget)}: a cohort's "
                "budget is fixed when its ledger is made. Leave budget out, or take another ledger for another cohort."
            )

    @classmethod
    def register(
        cls,
        path: str | os.PathLike[str],
        *,
        cohort: str,
        budget: PrivacyBudget,
        ids: Iterable[str] | None = None,
        unit: str = "patient",
        adaptive: bool = False,
        partitions: int = 1,
    ) -> PrivacyLedger:
        """A new ledger for a named cohort.

        Args:
            path: the file, which must not exist.
            cohort: name of the cohort, for people.
            budget: the most that all releases together may cost.
            ids: ids of all its units, as the runs will give them. Kept as salted digests beside the ledger; a run on
                others is then refused. Where None, no run is checked.
            unit: "patient" or "image".
            adaptive: keep the budget by a Rényi filter, which holds even where each run is chosen after seeing what
                the runs before gave. It lets a little less through. Otherwise the tighter joint account is kept, valid
                where the runs' numbers do not depend on earlier results, and the report says so.
            partitions: number of disjoint parts, by a keyed hash of the id, that runs may be confined to. Runs on
                different parts cost what the dearest costs. Needs ``ids``.

        Raises:
            ValueError: where the file exists, or for values out of range.
            LedgerError: where it cannot be written.
        """
        if Path(path).exists():
            raise ValueError(
                f"{path} exists: a cohort is registered once. Open it without register, or name another file."
            )
        if checked_count("partitions", partitions) > 1 and ids is None:
            raise ValueError(f"partitions is {partitions}, but no ids were given: without them no run can be placed.")
        order = filter_order(budget) if adaptive else None
        named = Cohort(name=cohort, unit=unit, partitions=partitions, filter_order=order)
        file = LedgerFile(path)
        with file.locked():
            if any(True for _ in file.read_new()):
                raise ValueError(f"{path} exists by now: another process registered a cohort there.")
            if ids is not None:
                number, digest = CohortSecrets(file.path).create(ids)
                named = replace(named, num_units=number, digest=digest)
            file.append(_opening(named, budget))
        return cls(path)

    def __repr__(self) -> str:
        name = f", cohort={self.cohort.name!r}" if self.cohort else ""
        budget = messages.say(self.budget)
        return f"PrivacyLedger({str(self.path)!r}{name}, budget={budget}, entries={len(self._state.entries)})"

    @property
    def path(self) -> os.PathLike[str]:
        """The file."""
        return self._file.path

    @property
    def budget(self) -> PrivacyBudget | None:
        """The most that all releases together may cost; None where none was set."""
        return self._state.budget

    @property
    def cohort(self) -> Cohort | None:
        """What was registered; None where the ledger was made without."""
        return self._state.cohort

    @property
    def state(self) -> LedgerState:
        """What the file says now; it changes with the ledger."""
        self._sync()
        return self._state

    @property
    def entries(self) -> tuple[LedgerEntry, ...]:
        """All runs, oldest first, as the file has them now."""
        return self.state.entries

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

    def epsilon(self, delta: float) -> float:
        """ε at ``delta`` of everything released on this cohort; inf where a recorded run carries no guarantee."""
        return self.state.epsilon(delta)

    def epsilon_bounds(self, delta: float) -> EpsilonBounds:
        """Both bounds behind :meth:`epsilon`, of the mechanisms as recorded."""
        return self.state.bounds(delta)

    def reserve(
        self,
        *,
        step: DpEvent,
        planned_steps: int,
        delta: float,
        unit: str,
        fewest_steps: int | None = None,
        ids: Iterable[str] | None = None,
        partition: int | None = None,
        purpose: str = "",
        facts: Mapping[str, Any] | None = None,
        unnoised: tuple[str, ...] = (),
        assumptions: tuple[str, ...] = (),
        not_private: tuple[str, ...] = (),
        artifacts: Mapping[str, str] | None = None,
        note: str = "",
    ) -> str:
        """Set steps aside for a new run and return its name; releases nothing.

        Args:
            step: the event of one step.
            planned_steps: how many to set aside.
            delta: the δ that the run was planned for.
            unit: "patient" or "image", as for every run on this cohort.
            fewest_steps: take as many as fit, if at least so many do; all or none where None.
            ids: ids of its units, to check against the registered cohort.
            partition: the part of the cohort it sees, counted from 0; needs ``ids``.
            purpose: who runs it and why, in words.
            facts: public numbers of its plan, as JSON.
            unnoised: what leaves it without noise.
            assumptions: what its claim rests on.
            not_private: why it carries no guarantee; empty where it does.
            artifacts: SHA-256 of its code and configs, by name.
            note: the first text of :meth:`write_note`.

        Raises:
            PrivacyBudgetError: where they do not fit the budget, as no step does of a run that is not private.
            ValueError: for values out of range, another unit than before, or ids that the cohort does not have.
        """
        members = checked_members(self.path, self.cohort, unit, ids, partition)
        record = {
            "kind": "reserve",
            "entry": uuid.uuid4().hex,
            "unit": unit,
            "step_event": event_to_dict(step),
            "planned_steps": checked_count("planned_steps", planned_steps),
            "granted": planned_steps,
            "delta": checked_delta(delta),
            "partition": partition,
            "purpose": purpose,
            "members": members,
            "facts": dict(facts or {}),
            "unnoised": list(unnoised),
            "assumptions": list(assumptions),
            "not_private": list(not_private),
            "artifacts": dict(artifacts or {}),
            **({"note": note} if note else {}),
        }
        # Asked once without the lock: accounting may take a while, and trainings must be able to record meanwhile. The
        # accountants remember, so that asking again is quick.
        self._sync()
        self._room(entry_from(record), fewest_steps)
        with self._file.locked():
            self._refresh()
            self._append(record | {"granted": self._room(entry_from(record), fewest_steps)})
        return str(record["entry"])

    def require_room(
        self,
        *,
        step: DpEvent,
        planned_steps: int,
        unit: str,
        fewest_steps: int | None = None,
        ids: Iterable[str] | None = None,
        partition: int | None = None,
        not_private: tuple[str, ...] = (),
    ) -> int:
        """How many steps :meth:`reserve` would grant; refuses what it would refuse, and writes nothing.

        Raises:
            PrivacyBudgetError: where the steps do not fit.
            ValueError: for another unit than before, or ids that the cohort does not have.
        """
        self._sync()
        checked_members(self.path, self.cohort, unit, ids, partition)
        planned = checked_count("planned_steps", planned_steps)
        run = LedgerEntry("", unit, step, planned, delta=0.5, partition=partition, not_private=not_private)
        return self._room(run, fewest_steps)

    def reopen(self, entry_id: str, *, fewest_steps: int | None = None) -> int:
        """Reserve what is left of the plan of a run that was committed or void, to go on with it; the steps granted.

        A run that is still open is left as it is.

        Raises:
            PrivacyBudgetError: where not so many steps fit.
        """
        with self._file.locked():
            self._refresh()
            entry = self._known(entry_id)
            if entry.state == "reserved":
                return entry.steps_left
            left = entry.planned_steps - entry.steps
            if left < 1:
                raise PrivacyBudgetError(messages.full(self.path, self.budget, entry))
            fewest = left if fewest_steps is None else min(left, checked_count("fewest_steps", fewest_steps))
            granted = self._room(entry, entry.steps + fewest)
            self._append({"kind": "reopen", "entry": entry_id, "granted": granted})
            return granted - entry.steps

    def commit(self, entry_id: str, *, artifacts: Mapping[str, str] | None = None) -> None:
        """Close a run that has ended: it counts with the steps it recorded, and frees the others.

        Args:
            entry_id: the run.
            artifacts: SHA-256 of what came out, such as the model, by name.

        Raises:
            ValueError: where it is closed, or has recorded no step (see :meth:`void`).
        """
        with self._file.locked():
            self._refresh()
            entry = self._require_open(entry_id)
            if not entry.steps:
                raise ValueError(f"entry {entry_id[:8]} of {self.path} has recorded no step: void it instead.")
            record = {"kind": "commit", "entry": entry_id, "steps": entry.steps, "artifacts": dict(artifacts or {})}
            self._append(record)

    def void(self, entry_id: str) -> None:
        """Give back the reservation of a run that released nothing.

        Raises:
            ValueError: where it is closed, or has recorded a step: that step may have been released.
        """
        with self._file.locked():
            self._refresh()
            entry = self._require_open(entry_id)
            if entry.steps:
                raise ValueError(
                    f"entry {entry_id[:8]} of {self.path} has recorded {entry.steps} steps, which may have been released: "
                    "it cannot be void. Commit it."
                )
            self._append({"kind": "void", "entry": entry_id})

    def what_if(self, step: DpEvent, steps: int, *, delta: float | None = None, partition: int | None = None) -> WhatIf:
        """What ``steps`` further steps would cost, and how many of them fit; writes nothing.

        Args:
            step: the event of one step.
            steps: how many.
            delta: the δ to state ε at; that of the budget where None.
            partition: the part of the cohort they would see.

        Raises:
            ValueError: where neither a δ nor a budget is there.
        """
        state = self.state
        if delta is None and state.budget is None:
            raise ValueError("delta is None and the ledger has no budget: give a delta.")
        at = state.budget.delta if delta is None and state.budget is not None else checked_delta(delta or 0.0)
        unit = state.cohort.unit if state.cohort else next((e.unit for e in state.entries), "patient")
        run = LedgerEntry("what if", unit, step, checked_steps("steps", steps), at, granted=steps, partition=partition)
        state.check_new(run)
        return WhatIf(
            delta=at,
            epsilon_now=state.epsilon(at, reserved=True),
            epsilon_then=state.with_run(run).epsilon(at, reserved=True),
            steps=steps,
            steps_that_fit=state.steps_within_budget(run),
        )

    def steps_left(self, entry_id: str) -> int:
        """How many further steps that run may record."""
        self._sync()
        return self._known(entry_id).steps_left

    def record_step(self, entry_id: str) -> int:
        """Charge the next step of a run; only when this returns may the step be released.

        Returns:
            The number of the step, counted from 1, crashed and repeated steps included.

        Raises:
            PrivacyBudgetError: where the step was not reserved; nothing is charged.
            LedgerError: where the line cannot be written; nothing may be released.
        """
        with self._file.locked():
            self._refresh()
            entry = self._known(entry_id)
            if not entry.steps_left:
                raise PrivacyBudgetError(messages.full(self.path, self.budget, entry))
            self._append({"kind": "step", "entry": entry_id, "step": entry.steps + 1})
            return entry.steps + 1

    def record_steps(self, entry_id: str, count: int, *, after: int | None = None, token: str = "") -> int:
        """Charge several steps of a run in one line, all or none; only when this returns may they be released.

        Args:
            entry_id: the run.
            count: how many.
            after: charge only where the run has recorded so many steps.
            token: a name for this charge, never used before: where it is the last one recorded, nothing is charged, so that
                whoever was interrupted here can ask again.

        Returns:
            The number of the last of them.

        Raises:
            PrivacyBudgetError: where so many were not reserved; nothing is charged.
            LedgerError: where the line cannot be written; nothing may be released.
            ValueError: where the run has recorded another number of steps than ``after``.
        """
        number = checked_count("count", count)
        with self._file.locked():
            self._refresh()
            entry = self._known(entry_id)
            if token and entry.token == token:
                return entry.steps
            if after is not None and entry.steps != after:
                raise ValueError(
                    f"entry {entry_id[:8]} of {self.path} has recorded {entry.steps} steps, not {after}: another process "
                    "charges the same run. Let one process answer at a time."
                )
            if number > entry.steps_left:
                raise PrivacyBudgetError(messages.full(self.path, self.budget, entry))
            record = {"kind": "step", "entry": entry_id, "step": entry.steps + number, "count": number, "token": token}
            self._append(record)
            return entry.steps + number

    def write_note(self, entry_id: str, text: str) -> None:
        """Keep a text for a run, such as the state of a file of its own; the last one counts, and it costs nothing."""
        with self._file.locked():
            self._refresh()
            self._known(entry_id)
            self._append({"kind": "note", "entry": entry_id, "text": text})

    def _room(self, entry: LedgerEntry, fewest_steps: int | None) -> int:
        """Steps that this run may have in all; raises where they are fewer than it needs."""
        self._state.check_new(entry)
        fewest = entry.planned_steps if fewest_steps is None else checked_count("fewest_steps", fewest_steps)
        granted = self._state.steps_within_budget(entry)
        if granted < min(fewest, entry.planned_steps):
            raise PrivacyBudgetError(messages.spent(self.path, self.budget, entry, granted, self._state.entries))
        return granted

    def require_members(self, entry_id: str, ids: Iterable[str], partition: int | None) -> None:
        """Refuse to go on with a run on other data than it was reserved for.

        Raises:
            ValueError: for ids that the registered cohort does not have, or another part of it.
        """
        entry = self.entry(entry_id)
        if entry.partition != partition:
            raise ValueError(
                f"entry {entry_id[:8]} of {self.path} is charged to part {entry.partition} of the cohort, not {partition}: "
                "a run keeps its part. Resume with that part, or begin a new run."
            )
        if entry.members == "checked":
            checked_members(self.path, self.cohort, entry.unit, ids, partition)

    def partition_ids(self, ids: Iterable[str], partition: int) -> list[str]:
        """Those of ``ids`` that belong to a part of the cohort, counted from 0."""
        return ids_of_part(self.path, self.cohort, ids, partition)

    def _known(self, entry_id: str) -> LedgerEntry:
        entry = self._state.get(entry_id)
        if entry is None:
            raise LedgerError(
                f"{self.path} has no entry {entry_id!r}: the checkpoint belongs to another ledger. Resume with the "
                "ledger of that run, or load the network alone to begin a new entry."
            )
        return entry

    def _require_open(self, entry_id: str) -> LedgerEntry:
        entry = self._known(entry_id)
        if entry.state != "reserved":
            raise ValueError(
                f"entry {entry_id[:8]} of {self.path} is {entry.state} already: there is nothing to close."
            )
        return entry

    def _sync(self) -> None:
        with self._file.locked():
            self._refresh()

    def _refresh(self) -> None:
        for record in self._file.read_new():
            self._state.apply(record, self.path)

    def _append(self, record: dict[str, Any]) -> None:
        self._file.append(record)
        # Read back, not applied: an interrupt anywhere leaves this object with what the file says, or less of it.
        self._refresh()


def _opening(cohort: Cohort | None, budget: PrivacyBudget | None) -> dict[str, Any]:
    return {
        "kind": "open",
        "format": FORMAT,
        "cohort": None if cohort is None else asdict(cohort),
        "budget": None if budget is None else asdict(budget),
    }
