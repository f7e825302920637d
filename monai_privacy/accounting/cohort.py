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


"""Who a ledger is about, without a patient's name in it."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monai_privacy.accounting.ledger_file import LedgerError
from monai_privacy.accounting.values import checked_count

UNITS = ("patient", "image")
RELATION = "add or remove one unit"
_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """What is fixed about a cohort when it is registered.

    Args:
        name: what the steward calls it.
        unit: whose data one unit is: "patient" or "image".
        num_units: how many there are, where their ids were given.
        digest: SHA-256 of the salted digests of all their ids, sorted; None where no ids were given.
        partitions: number of disjoint parts, by a hash of the id; 1 where there are none.
        filter_order: Rényi order of the filter that the budget is kept by; None where each run's numbers are fixed
            before any run, or at least do not depend on what earlier runs gave.
        relation: which cohorts are neighbours; always "add or remove one unit".
    """

    name: str
    unit: str = "patient"
    num_units: int | None = None
    digest: str | None = None
    partitions: int = 1
    filter_order: float | None = None
    relation: str = RELATION

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip() or len(self.name) > 200:
            raise ValueError(f"cohort name is {self.name!r}, but a report needs a name of 1 to 200 characters.")
        if self.unit not in UNITS:
            raise ValueError(f"unit is {self.unit!r}, but it must be one of {', '.join(UNITS)}.")
        if self.relation != RELATION:
            raise ValueError(
                f"relation is {self.relation!r}, but only {RELATION!r} is accounted for: dp-accounting's RDP of replace-one "
                "leaves out a factor of two (google/differential-privacy issue 378)."
            )
        checked_count("partitions", self.partitions)
        if self.num_units is not None:
            checked_count("num_units", self.num_units)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Cohort:
        """The cohort that ``dataclasses.asdict`` wrote."""
        return cls(**data)


class CohortSecrets:
    """The salt of a cohort and its list of salted digests, in two files beside the ledger.

    The salt is a secret: whoever has it and the list can find out whether a known id is in the cohort. Neither file
    holds an id, and neither is needed to account; without them no run can be checked against the cohort.

    Args:
        ledger: path of the ledger.
    """

    def __init__(self, ledger: str | os.PathLike[str]) -> None:
        path = Path(os.path.realpath(ledger))
        self._salt = path.with_name(path.name + ".salt")
        self._list = path.with_name(path.name + ".units")

    def create(self, ids: Iterable[str]) -> tuple[int, str]:
        """Make both files for these ids; the number of ids, and the digest of them all.

        Raises:
            ValueError: for an id that is empty, no text, or there twice.
            LedgerError: where the files cannot be written.
        """
        known = list(ids)
        bad = next((value for value in known if not isinstance(value, str) or not value), None)
        if bad is not None or not known:
            raise ValueError(f"an id is {bad!r}, but each must be a text of at least one character; give all ids.")
        if len(set(known)) != len(known):
            raise ValueError(f"{len(known) - len(set(known))} ids are there twice: give each id once.")
        try:
            if not self._salt.exists():
                # Made whole and readable for the owner alone before it has its name.
                new = self._salt.with_name(self._salt.name + ".new")
                new.unlink(missing_ok=True)
                descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(descriptor, "w") as file:
                    file.write(secrets.token_hex(32))
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(new, self._salt)
            lines = sorted(self._digests(known).values())
            self._list.write_text("\n".join(lines) + "\n", encoding="ascii")
        except OSError as error:
            raise LedgerError(
                f"{self._salt.parent} cannot hold the digests of a cohort: {error.strerror or error}. Name another folder; "
                "nothing was released."
            ) from error
        return len(lines), digest_of(lines)

    def strangers(self, ids: Iterable[str], digest: str) -> int:
        """How many of ``ids`` are not in the cohort with that digest.

        Raises:
            LedgerError: where a file is missing, or the list is not that of the cohort.
        """
        listed = self._listed(digest)
        return sum(value not in listed for value in self._digests(ids).values())

    def partitions_of(self, ids: Iterable[str], partitions: int) -> dict[str, int]:
        """The part, counted from 0, that each of these ids falls into."""
        return {name: int(value, 16) % partitions for name, value in self._digests(ids).items()}

    def _listed(self, digest: str) -> set[str]:
        try:
            lines = self._list.read_text(encoding="ascii").split()
        except (OSError, UnicodeDecodeError) as error:
            raise self._missing(self._list, error) from error
        if digest_of(lines) != digest:
            raise LedgerError(
                f"{self._list} is not the list that the cohort was registered with. Put the right one back; nothing was "
                "released."
            )
        return set(lines)

    def _digests(self, ids: Iterable[str]) -> dict[str, str]:
        try:
            salt = bytes.fromhex(self._salt.read_text(encoding="ascii").strip())
        except (OSError, ValueError) as error:
            raise self._missing(self._salt, error) from error
        return {value: keyed_digest(salt, value) for value in ids}

    def _missing(self, path: Path, error: Exception) -> LedgerError:
        return LedgerError(
            f"{path} cannot be read ({error}): without it no patient can be checked against the cohort. Put it back beside "
            "the ledger; nothing was released."
        )


def keyed_digest(salt: bytes, value: str) -> str:
    """HMAC-SHA256 of an id, its first 16 bytes in hex: the same id and salt give the same, and nobody can go back."""
    return hmac.new(salt, value.encode(), hashlib.sha256).digest()[:_BYTES].hex()


def digest_of(digests: Iterable[str]) -> str:
    """SHA-256 of sorted digests, a line each."""
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()
