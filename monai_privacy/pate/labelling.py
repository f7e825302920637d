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

"""Labels by vote: each query charged before it is answered, answered once, and remembered."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from dp_accounting.dp_event import DpEvent
from torch import Tensor

from monai_privacy.accounting.event_json import event_to_dict
from monai_privacy.accounting.ledger import PrivacyLedger
from monai_privacy.accounting.values import PrivacyBudgetError, checked_count
from monai_privacy.mechanisms.noise import NoiseSource, SystemNoise
from monai_privacy.mechanisms.voting import ABSTAINED, LabelVoting, VotingMechanism
from monai_privacy.pate.answers import Answer, AnswerFile, Intent, require_newest

__all__ = ["VoteLabeller", "VoteLabels", "query_digest"]

_ASSUMPTIONS = (
    "whoever counted the votes is trusted, and kept them to itself",
    "no patient is in more teachers than stated, under whatever id",
    "nothing about a teacher was chosen on other teachers' patients, nor on the votes",
    "the images asked about are of nobody whom a teacher learnt from",
    "a student whose opinion was asked saw public images and released labels alone",
)


@dataclass(frozen=True)
class VoteLabels:
    """What became of some queries.

    Args:
        labels: classes, shape (queries,), or 0 and 1, shape (queries, labels); -1 where there is no answer.
        answered: how many have an answer.
        abstained: how many have none, as the votes were too close.
        repeated: how many of both were known from before, and cost nothing.
        unaffordable: how many were left, as the budget was spent.
    """

    labels: Tensor
    answered: int
    abstained: int
    repeated: int
    unaffordable: int


def query_digest(image: Tensor) -> str:
    """A name for an image by its content alone: equal images have equal names, whichever file they come from."""
    array = torch.as_tensor(image).detach().cpu().contiguous()
    header = f"{array.dtype} {tuple(array.shape)} ".encode()
    return hashlib.sha256(header + array.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:32]


class VoteLabeller:
    """Answers queries from the votes of teachers, on the ledger of those teachers' patients.

    Each query is charged, and the charge is on the disk, before its answer is drawn; the answer is on the disk before it
    is returned. A query that was answered before gets the same answer and costs nothing. After an interruption anywhere,
    queries that were paid for are not charged again, and none gets a second answer.

    Args:
        mechanism: how votes become labels.
        ledger: that of the teachers' patients.
        answers: the file of answers, made where it is missing; it belongs to one mechanism and one set of teachers.
        num_teachers: how many vote on every query.
        max_queries: the most queries that may ever be answered here; set aside in the ledger when the file is made.
        delta: the δ that this was planned for.
        unit: "patient" or "image": what is in at most so many teachers.
        ids: ids of all units behind the teachers, to check against a registered cohort.
        num_patients: how many there are, for the report.
        teachers: a digest of the manifest of the teachers, or any text that names them.
        purpose: who asks and why, in words.
        artifacts: SHA-256 of teachers, code and configs, by name.
        noise: where the noise comes from.

    Raises:
        PrivacyBudgetError: where so many queries do not fit the budget; nothing is charged.
        ValueError: where the file belongs to another mechanism, other teachers or another ledger.

    Guarantee: everything ever returned from one file is one (ε, δ)-DP release for the teachers' patients, as the ledger
    accounts it. Where questions decide what is answered, all answers set aside are charged before the first question,
    unless the cohort is registered with an adaptive filter: the account of those really drawn would hold for numbers fixed
    beforehand alone (Feldman & Zrnic 2021, arXiv:2008.11193).

    Back the file of answers and the ledger up together: each refuses to go on with an older copy of the other.
    """

    def __init__(
        self,
        mechanism: VotingMechanism,
        ledger: PrivacyLedger,
        *,
        answers: str | os.PathLike[str],
        num_teachers: int,
        max_queries: int,
        delta: float,
        unit: str = "patient",
        ids: Iterable[str] | None = None,
        num_patients: int | None = None,
        teachers: str = "",
        purpose: str = "",
        artifacts: Mapping[str, str] | None = None,
        noise: NoiseSource | None = None,
    ) -> None:
        self._mechanism = mechanism
        self._ledger = ledger
        self._noise = noise or SystemNoise()
        self._num_teachers = checked_count("num_teachers", num_teachers)
        self._file = AnswerFile(answers)
        facts = {
            "mechanism": type(mechanism).__name__,
            **_parameters(mechanism),
            "num_teachers": num_teachers,
            "max_queries": checked_count("max_queries", max_queries),
            **({"num_patients": num_patients} if num_patients is not None else {}),
        }
        common = {
            "delta": delta,
            "unit": unit,
            "ids": None if ids is None else list(ids),
            "purpose": purpose,
            "facts": facts,
            "assumptions": _ASSUMPTIONS,
            "not_private": () if self._noise.is_secret else ("the noise of the votes is repeatable",),
            "artifacts": dict(artifacts or {}),
        }
        wanted = {
            "facts": facts,
            "teachers": teachers,
            "costs": _costs(mechanism),
            "unit": unit,
            "delta": delta,
            "secret": self._noise.is_secret,
        }
        with self._file.locked():
            if not self._file.heading:
                self._void_leftovers()
                common["note"] = self._file.announce()
                self._file.begin(wanted | {"entries": self._reserve(common, int(max_queries))})
            self._require_same(wanted, None if ids is None else list(ids))
            require_newest(self._ledger, self._file)
            self._settle()

    def label(self, queries: Sequence[str], votes: Tensor, *, mechanism: VotingMechanism | None = None) -> VoteLabels:
        """Answer some queries.

        Args:
            queries: a name for each, as of :func:`query_digest`.
            votes: counts, integers of shape (queries, classes); they leave no trace.
            mechanism: for these queries alone, with the same costs: the student of an interactive one changes.

        Raises:
            ValueError: for votes that are no such counts; nothing is charged.
            LedgerError: where something cannot be written; nothing is released.
        """
        one = self._mechanism if mechanism is None else mechanism
        if type(one) is not type(self._mechanism) or _fixed(one) != _fixed(self._mechanism):
            raise ValueError("mechanism has other costs than the one that was set aside for. Make another labeller.")
        names = [str(query) for query in queries]
        if len(names) != len(votes):
            raise ValueError(
                f"there are {len(names)} queries and votes on {len(votes)}: give one row of votes for each."
            )
        if not names:
            raise ValueError("there are no queries: give one at least.")
        one.check(votes, self._num_teachers)
        counts = votes.detach().cpu()
        with self._file.locked():
            known = sum(name in self._file.answers for name in names)
            rows = {name: row for row, name in enumerate(names) if name not in self._file.answers}
            self._draw(one, counts, rows)
            found = [self._file.answers.get(name) for name in names]
        empty: Answer = (ABSTAINED,) * counts.shape[1] if isinstance(one, LabelVoting) else ABSTAINED
        labels = torch.tensor([empty if label is None or label == ABSTAINED else label for label in found])
        abstained = sum(label == ABSTAINED for label in found)
        missing = sum(label is None for label in found)
        return VoteLabels(labels, len(found) - abstained - missing, abstained, known, missing)

    @property
    def teachers_per_patient(self) -> int:
        """Most teachers that one patient may be in, for the costs to hold."""
        return int(getattr(self._mechanism, "teachers_per_patient", 1))

    @property
    def queries_left(self) -> int:
        """How many new queries may still be asked."""
        return self._ledger.steps_left(str(self._entry("ask") or self._entry("pay")))

    def check_ballots(self, votes: Tensor) -> None:
        """Refuse what one teacher cannot say: its votes on some queries, before they are added to those of others."""
        self._mechanism.check_ballots(votes)

    def close(self) -> None:
        """Say that no more will be asked, so that the ledger frees what was not used."""
        with self._file.locked():
            for kind in ("pay", "ask"):
                entry_id = self._entry(kind)
                entry = None if entry_id is None else self._ledger.entry(entry_id)
                if entry is None or entry.state != "reserved":
                    continue
                if entry.steps:
                    self._ledger.commit(entry.entry_id)
                else:
                    self._ledger.void(entry.entry_id)

    def _void_leftovers(self) -> None:
        """Free what was set aside for this file by somebody who was interrupted before the file could say so."""
        for entry in self._ledger.entries:
            if entry.state == "reserved" and not entry.steps and entry.note and self._file.holds(entry.note):
                self._ledger.void(entry.entry_id)

    def _reserve(self, common: Mapping[str, Any], planned: int) -> dict[str, str | None]:
        entries: dict[str, str | None] = {"ask": None, "pay": None}
        try:
            for kind, event in zip(entries, _events(self._mechanism), strict=True):
                if event is not None:
                    # Of answers that a question precedes, as many as fit; everything else whole or not at all.
                    fewest = 1 if kind == "pay" and entries["ask"] else None
                    entries[kind] = self._ledger.reserve(
                        step=event, planned_steps=planned, fewest_steps=fewest, **common
                    )
        except PrivacyBudgetError:
            if entries["ask"]:
                self._ledger.void(entries["ask"])
            raise
        return entries

    def _require_same(self, wanted: Mapping[str, Any], ids: list[str] | None) -> None:
        heading = self._file.heading
        changed = sorted(name for name, value in wanted.items() if heading.get(name) != value and name != "secret")
        if changed:
            raise ValueError(
                f"{self._file.path} holds answers with other {', '.join(changed)}: {[heading.get(n) for n in changed]}, not "
                f"{[wanted[n] for n in changed]}. Name another file: other teachers or noise are another release."
            )
        if heading["secret"] and not wanted["secret"]:
            raise ValueError(
                f"{self._file.path} holds private answers: noise that can be repeated may not add to them. Name another "
                "file."
            )
        for entry_id in heading["entries"].values():
            if entry_id is not None:
                self._ledger.entry(entry_id)
                if ids is not None:
                    self._ledger.require_members(entry_id, ids, None)

    def _entry(self, kind: str) -> str | None:
        entry: str | None = self._file.heading["entries"][kind]
        return entry

    @property
    def _prepaid(self) -> bool:
        """Whether all answers are charged at once, since how many there will be depends on the votes."""
        return bool(self._entry("ask") and self._entry("pay")) and not self._ledger.state.adaptive

    def _settle(self) -> None:
        """Make, or find made, the charge that was about to be made when somebody was interrupted."""
        intent = self._file.unsettled
        if intent is None:
            return
        try:
            self._charge(intent)
        except PrivacyBudgetError:
            self._file.drop()

    def _charge(self, intent: Intent) -> None:
        if intent.after >= 0:
            entry = str(self._entry(intent.kind))
            self._ledger.record_steps(entry, len(intent.queries), after=intent.after, token=intent.token)
        self._file.settle()

    def _draw(self, mechanism: VotingMechanism, votes: Tensor, rows: Mapping[str, int]) -> None:
        file = self._file
        require_newest(self._ledger, self._file)
        self._settle()
        candidates = list(rows)
        if self._entry("ask"):
            if self._prepaid:
                self._pay_all()
            asked = self._pay("ask", [name for name in candidates if name not in file.passed])
            if asked:
                outcomes = mechanism.ask(votes, self._noise)
                threshold = getattr(mechanism, "threshold", None)
                own = threshold == getattr(self._mechanism, "threshold", None)
                file.write_passed({name: bool(outcomes[rows[name]]) for name in asked}, None if own else threshold)
                self._ledger.write_note(str(self._entry("ask")), file.mark)
            candidates = [name for name in candidates if name in file.passed]
        answered = self._pay("pay", candidates) if self._entry("pay") else candidates
        if answered:
            labels = mechanism.answer(votes, self._num_teachers, self._noise)
            file.write_answers({name: _plain(labels[rows[name]]) for name in answered})
            self._ledger.write_note(str(self._entry("pay") or self._entry("ask")), file.mark)

    def _pay_all(self) -> None:
        entry = self._ledger.entry(str(self._entry("pay")))
        if entry.steps_left:
            self._ledger.record_steps(entry.entry_id, entry.steps_left)

    def _pay(self, kind: str, names: Sequence[str]) -> list[str]:
        """Charge what was not charged before, as far as the budget reaches; the names that may be drawn."""
        file, entry = self._file, self._ledger.entry(str(self._entry(kind)))
        prepaid = kind == "pay" and self._prepaid
        left = entry.granted - file.number["pay"] if prepaid else entry.steps_left
        new = [name for name in names if name not in file.paid[kind]][: max(0, left)]
        if new:
            self._charge(file.intend(kind, -1 if prepaid else entry.steps, new))
        return [name for name in names if name in file.paid[kind]]


def _events(mechanism: VotingMechanism) -> tuple[DpEvent | None, DpEvent | None]:
    return mechanism.question_event, mechanism.answer_event


def _fixed(mechanism: VotingMechanism) -> dict[str, Any]:
    """All that may not change from call to call."""
    return {name: value for name, value in _parameters(mechanism).items() if name != "threshold"}


def _costs(mechanism: VotingMechanism) -> list[dict[str, Any] | None]:
    return [None if event is None else event_to_dict(event) for event in _events(mechanism)]


def _parameters(mechanism: VotingMechanism) -> dict[str, Any]:
    """The public numbers of a mechanism."""
    found = {field.name: getattr(mechanism, field.name) for field in fields(mechanism)}  # type: ignore[arg-type]
    return {name: value for name, value in found.items() if isinstance(value, (int, float))}


def _plain(label: Tensor) -> Answer:
    return tuple(int(one) for one in label) if label.dim() else int(label)
