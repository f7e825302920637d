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

"""Votes that hospitals send as files, so that their teachers never leave them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from monai_privacy.accounting.values import checked_count
from monai_privacy.mechanisms.voting import require_votes

__all__ = ["HospitalVotes", "read_hospital_votes", "teachers_digest", "total_votes", "write_hospital_votes"]

FORMAT = 2


@dataclass(frozen=True)
class HospitalVotes:
    """What the teachers of one hospital say about some queries, added up. PRIVATE until noise was added to the total.

    Args:
        hospital: its name.
        num_teachers: how many of its teachers voted on each query.
        queries: a name for each, by content (see :func:`~monai_privacy.pate.labelling.query_digest`).
        votes: counts, one row a query, one column a class.
        teachers: the identity of each teacher (see :class:`~monai_privacy.pate.teachers.Teacher`); empty for one of an empty
            shard.
        teachers_per_patient: most of its teachers that one patient is in.

    Raises:
        ValueError: for counts that do not add up, or a query that is there twice.
    """

    hospital: str
    num_teachers: int
    queries: tuple[str, ...]
    votes: tuple[tuple[int, ...], ...] = field(repr=False)
    teachers: tuple[str, ...] = field(repr=False)
    teachers_per_patient: int

    def __post_init__(self) -> None:
        if not self.hospital.strip():
            raise ValueError("the votes name no hospital: one that sends them twice would not be noticed. Name it.")
        checked_count("num_teachers", self.num_teachers)
        checked_count("teachers_per_patient", self.teachers_per_patient)
        named = [one for one in self.teachers if one]
        if len(self.teachers) != self.num_teachers or len(set(named)) != len(named):
            raise ValueError(
                f"{self.hospital} says that {self.num_teachers} teachers voted, and names {len(self.teachers)}, of which "
                f"{len(set(named))} are different and trained. Name each once."
            )
        if len(self.queries) != len(self.votes) or not self.queries:
            raise ValueError(
                f"{self.hospital} sends votes on {len(self.votes)} queries with {len(self.queries)} names."
            )
        if len(set(self.queries)) != len(self.queries):
            raise ValueError(f"{self.hospital} votes twice on the same query: each teacher votes once. Count again.")
        if len({len(row) for row in self.votes}) != 1 or any(type(n) is not int for row in self.votes for n in row):
            raise ValueError(f"the votes of {self.hospital} are no table of whole numbers. Count again.")
        try:
            require_votes(torch.tensor(self.votes), self.num_teachers)
        except ValueError as error:
            raise ValueError(f"{self.hospital}: {error}") from error


def write_hospital_votes(votes: HospitalVotes, path: str | os.PathLike[str]) -> Path:
    """Write the votes of one hospital as JSON, whole or not at all, for the owner of the file alone to read."""
    target = Path(path)
    partial = target.with_name(target.name + ".partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        json.dump({"format": FORMAT, **asdict(votes)}, file)
        file.write("\n")
    os.replace(partial, target)
    return target


def read_hospital_votes(path: str | os.PathLike[str]) -> HospitalVotes:
    """The votes in a file of :func:`write_hospital_votes`.

    Raises:
        ValueError: for a file that cannot be read, of an unknown version, or with counts that do not add up.
    """
    try:
        values: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        version = values.pop("format")
        rows = tuple(tuple(row) for row in values["votes"])
        known = {**values, "queries": tuple(values["queries"]), "votes": rows, "teachers": tuple(values["teachers"])}
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}. Name the votes of a hospital.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} holds no votes of a hospital ({error}). Ask the hospital to write them again."
        ) from error
    if version != FORMAT:
        raise ValueError(f"{path} has format {version!r}, unknown to this version, which reads {FORMAT}.")
    try:
        return HospitalVotes(**known)
    except TypeError as error:
        raise ValueError(
            f"{path} holds no votes of a hospital ({error}). Ask the hospital to write them again."
        ) from error


def teachers_digest(hospitals: Sequence[HospitalVotes]) -> str:
    """A name for all teachers that vote, whatever the order of their hospitals."""
    lines = sorted(f"{one.hospital} {' '.join(one.teachers)}" for one in hospitals)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def total_votes(hospitals: Sequence[HospitalVotes]) -> tuple[tuple[str, ...], Tensor, int]:
    """All hospitals' votes on the same queries, added up.

    Returns:
        The names of the queries in the first hospital's order, counts of shape (queries, classes), and the number of
        teachers behind them.

    Raises:
        ValueError: where a hospital is there twice, or two vote on other queries or classes.
    """
    if not hospitals:
        raise ValueError("there are no votes: give the file of each hospital.")
    names = [one.hospital.strip().casefold() for one in hospitals]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"{', '.join(twice)} is there twice: its patients would move two votes. Give one file a hospital."
        )
    teachers = [teacher for one in hospitals for teacher in one.teachers if teacher]
    if len(set(teachers)) != len(teachers):
        raise ValueError(
            f"{len(teachers) - len(set(teachers))} teachers vote for two hospitals: their patients would move two votes. "
            "Count each teacher once."
        )
    first = hospitals[0]
    total = torch.zeros(len(first.queries), len(first.votes[0]), dtype=torch.int64)
    for one in hospitals:
        if set(one.queries) != set(first.queries) or len(one.votes[0]) != len(first.votes[0]):
            raise ValueError(
                f"{one.hospital} votes on {len(one.queries)} queries of {len(one.votes[0])} classes, {first.hospital} on "
                f"{len(first.queries)} of {len(first.votes[0])}, or on others: every teacher votes on every query."
            )
        rows = dict(zip(one.queries, one.votes, strict=True))
        total += torch.tensor([rows[name] for name in first.queries])
    return first.queries, total, sum(one.num_teachers for one in hospitals)
