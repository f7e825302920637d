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

"""The answers given so far: written before they leave, so that no query is answered twice, or charged twice."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monai_privacy.accounting.ledger import PrivacyLedger
from monai_privacy.accounting.ledger_file import LedgerError, LedgerFile

__all__ = ["Answer", "AnswerFile", "Intent", "require_newest"]

FORMAT = 1
Answer = int | tuple[int, ...]


@dataclass(frozen=True)
class Intent:
    """A charge that is about to be made.

    Args:
        kind: "ask" for questions, "pay" for answers.
        after: steps that the ledger had before; -1 where these answers were all charged beforehand.
        token: names it in the ledger.
        queries: what it is for.
    """

    kind: str
    after: int
    token: str
    queries: tuple[str, ...]


class AnswerFile:
    """A chained, append-only file of what was asked, paid for and answered; it holds no vote.

    The order of its lines is the order of things: the charge that is about to be made ("ask", "pay"), then what came
    of it ("passed", "answers"). Whoever is interrupted between the two has paid and released nothing, and goes on there.

    Args:
        path: the file; made where it is missing.

    Raises:
        LedgerError: where it is damaged or cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file = LedgerFile(self.path)
        #: What the answers belong to: mechanism, teachers, entries of the ledger.
        self.heading: dict[str, Any] = {}
        #: What every query was answered; -1 where it was not to be.
        self.answers: dict[str, Answer] = {}
        #: Queries that are to be answered, by the outcome of their question.
        self.passed: set[str] = set()
        #: The charge that was about to be made, where nothing is known of it since.
        self.unsettled: Intent | None = None
        #: How many queries were ever paid for, by kind, and the most steps of the ledger that this file knows of.
        self.number: dict[str, int] = {"ask": 0, "pay": 0}
        self.charged: dict[str, int] = {"ask": 0, "pay": 0}
        #: Thresholds that questions were asked with, where they were not the mechanism's own.
        self.thresholds: set[float] = set()
        #: Entries of the ledger for what was published besides: bounds on what these answers cost.
        self.bounds: list[str] = []
        self._hashes: dict[int, str] = {}
        #: Queries whose question, or answer, is paid for and not yet drawn.
        self.paid: dict[str, set[str]] = {"ask": set(), "pay": set()}

    @property
    def mark(self) -> str:
        """Number and hash of the last line: they name that state of the file."""
        line, digest = self._file.head
        return f"{line} {digest}"

    def holds(self, mark: str) -> bool:
        """Whether this file once ended with that line, and so is no older copy, nor another one."""
        line, _, digest = mark.partition(" ")
        return mark == self.mark or (line.isdigit() and self._hashes.get(int(line)) == digest)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """The file is this process's alone, and known to its end."""
        with self._file.locked():
            for record in self._file.read_new():
                try:
                    self._apply(record)
                except (KeyError, TypeError, ValueError, AttributeError) as error:
                    raise LedgerError(f"{self.path}, line {record['line']}: it cannot be read ({error}).") from error
            yield

    def announce(self) -> str:
        """Say that a heading will follow; gives the mark by which what is set aside for it is known again."""
        self._write({"kind": "announced", "token": uuid.uuid4().hex})
        return self.mark

    def begin(self, heading: Mapping[str, Any]) -> None:
        """Write the heading, once what it names is set aside."""
        self._write({"kind": "open", "format": FORMAT, "heading": dict(heading)})

    def intend(self, kind: str, after: int, queries: Sequence[str]) -> Intent:
        """Say which queries are about to be charged, for their question ("ask") or their answer ("pay")."""
        intent = Intent(kind, after, uuid.uuid4().hex, tuple(queries))
        self._write({"kind": kind, "after": after, "token": intent.token, "queries": list(queries)})
        return intent

    def settle(self) -> None:
        """The charge was made."""
        if self.unsettled is not None:
            kind, queries = self.unsettled.kind, self.unsettled.queries
            self.paid[kind].update(queries)
            self.number[kind] += len(queries)
            if self.unsettled.after >= 0:
                self.charged[kind] = self.unsettled.after + len(queries)
            self.unsettled = None

    def drop(self) -> None:
        """The charge was not made, and never will be."""
        self._write({"kind": "dropped"})

    def write_passed(self, outcomes: Mapping[str, bool], threshold: float | None = None) -> None:
        """The outcomes of questions, and their threshold where it is not the mechanism's own."""
        record = {"kind": "passed", "queries": list(outcomes), "passed": list(outcomes.values())}
        self._write(record if threshold is None else record | {"threshold": threshold})

    def write_answers(self, answers: Mapping[str, Answer]) -> None:
        """Answers, before anybody sees them."""
        self._write({"kind": "answers", "queries": list(answers), "labels": list(answers.values())})

    def write_bound(self, entry: str) -> None:
        """A bound on what these answers cost is about to be charged to that entry, and published."""
        self._write({"kind": "bound", "entry": entry})

    def _write(self, record: dict[str, Any]) -> None:
        self._file.append(record)
        for read in self._file.read_new():
            self._apply(read)

    def _apply(self, record: Mapping[str, Any]) -> None:
        kind = record["kind"]
        self._hashes[record["line"] - 1] = record["previous"]
        if kind == "announced" and not self.heading:
            pass
        elif kind == "open" and not self.heading:
            if record["format"] != FORMAT:
                raise ValueError(f"format {record['format']!r} is unknown to this version, which reads {FORMAT}")
            self.heading = dict(record["heading"])
        elif kind in ("ask", "pay") and self.heading:
            # Nobody intends a charge before the last one was made, or is known to have been dropped.
            self.settle()
            self.unsettled = Intent(kind, int(record["after"]), str(record["token"]), tuple(record["queries"]))
        elif kind == "dropped":
            self.unsettled = None
        elif kind == "bound" and self.heading:
            self.bounds.append(str(record["entry"]))
        elif kind == "passed" and self.heading:
            self.settle()
            if "threshold" in record:
                self.thresholds.add(float(record["threshold"]))
            for query, passed in zip(record["queries"], record["passed"], strict=True):
                self.paid["ask"].discard(query)
                if passed:
                    self.passed.add(query)
                else:
                    self.answers[query] = -1
        elif kind == "answers" and self.heading:
            self.settle()
            for query, label in zip(record["queries"], record["labels"], strict=True):
                self.paid["pay"].discard(query)
                self.passed.discard(query)
                self.answers[query] = tuple(label) if isinstance(label, list) else int(label)
        else:
            raise ValueError(f"{kind!r} is not expected here")


def require_newest(ledger: PrivacyLedger, file: AnswerFile) -> None:
    """Refuse an older copy of the ledger, or of the answers, or another ledger: each would draw again what was drawn.

    Raises:
        LedgerError: in that case.
    """
    for kind, entry_id in file.heading["entries"].items():
        if entry_id is None:
            continue
        entry = ledger.entry(entry_id)
        if entry.steps < file.charged[kind]:
            raise LedgerError(
                f"{ledger.path} has {entry.steps} steps of {entry.entry_id[:8]}, but {file.path} knows of "
                f"{file.charged[kind]}: the ledger is an older copy. Put the newest one back; nothing was released."
            )
        if entry.note and not file.holds(entry.note):
            raise LedgerError(
                f"{file.path} does not have line {entry.note.split()[0]} that {ledger.path} knows of: it is an older copy, "
                "or a second one. Put the newest one back; nothing was released."
            )
    for entry_id in file.bounds:
        ledger.entry(entry_id)
