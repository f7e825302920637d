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

"""Teachers on the disk: one checkpoint for each shard, and checks that they are as many different ones."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from monai_privacy.accounting.values import checked_count
from monai_privacy.provenance import file_digest, state_digest

__all__ = ["Teacher", "TeacherSet", "record_teacher", "trained_teacher", "weights_digest"]

_RECORD = "teacher.json"


@dataclass(frozen=True)
class Teacher:
    """One trained teacher.

    Args:
        number: which shard it learnt from, counted from 0.
        checkpoint: its weights, a state dict or a dictionary that holds one as "model"; None where its shard is empty:
            it then always votes for one class, ``number`` modulo their number, since how many vote is a public number.
        sha256: of that file.
        shard: keyed digest of the shard's patients, from the manifest.
        recipe: SHA-256 of the configs that it was trained with.
        teachers_per_patient: most teachers that one of its patients is in, from the manifest.
        weights: SHA-256 of its weights, which two files with the same weights share; of the file where not known.
        partition: signature of the manifest that its shard is of; empty where it is not known.
        of: number of teachers of that manifest; 0 where it is not known.
    """

    number: int
    checkpoint: Path | None
    sha256: str
    shard: str
    recipe: str = ""
    teachers_per_patient: int = 1
    weights: str = ""
    partition: str = ""
    of: int = 0

    @property
    def identity(self) -> str:
        """A name for whose patients it learnt from, as far as that is known: its shard, or else its weights."""
        if self.checkpoint is None:
            return ""
        if not self.partition:
            return self.weights or self.sha256
        return hashlib.sha256(f"{self.partition} {self.shard}".encode()).hexdigest()

    def load_into(self, network: nn.Module, device: torch.device | str = "cpu") -> None:
        """Put this teacher's weights into ``network``, every one of them, in evaluation mode.

        Raises:
            ValueError: where the file has changed since it was recorded, or does not fit the network.
        """
        if self.checkpoint is None:
            raise ValueError(
                f"teacher {self.number} has no checkpoint: its shard is empty. It votes for a fixed class."
            )
        if file_digest(self.checkpoint) != self.sha256:
            raise ValueError(
                f"teacher {self.number}: {self.checkpoint.name} has changed since it was trained (SHA-256). Train it again."
            )
        try:
            network.load_state_dict(_state(self.checkpoint, device), strict=True)
        except (RuntimeError, TypeError) as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise ValueError(
                f"teacher {self.number}: {self.checkpoint.name} does not fit the network ({reason}). Give the network that "
                "the teachers were trained with."
            ) from error
        network.eval()


@dataclass(frozen=True)
class TeacherSet:
    """All teachers that vote together, each of its own shard.

    Args:
        teachers: in the order of their shards.

    Raises:
        ValueError: for a teacher that is missing or there twice, two that are the same file or learnt from the same
            shard, or different recipes. One teacher that is counted twice would move two votes.
    """

    teachers: tuple[Teacher, ...]

    def __post_init__(self) -> None:
        if not self.teachers:
            raise ValueError("there are no teachers: train some, or name their folder.")
        numbers = [teacher.number for teacher in self.teachers]
        missing, twice = sorted(set(range(len(numbers))) - set(numbers)), _repeated(numbers)
        if missing or twice:
            raise ValueError(
                f"of {len(numbers)} teachers, {_listed(missing) or 'none'} missing and {_listed(twice) or 'none'} twice: "
                "each shard has one teacher. Train those that are missing; every teacher votes."
            )
        trained = [teacher for teacher in self.teachers if teacher.checkpoint is not None]
        # Of shards that are known to be different, two may well teach the same, such as one class alone.
        unknown = [one for one in trained if not one.partition]
        for group, values, what in (
            (unknown, [one.sha256 for one in unknown], "the same weights"),
            (unknown, [one.weights or one.sha256 for one in unknown], "the same weights"),
            (trained, [one.shard for one in trained], "the same shard"),
        ):
            same = _repeated(values)
            if same:
                clones = [one.number for one, value in zip(group, values, strict=True) if value == same[0]]
                raise ValueError(
                    f"teachers {_listed(clones)} have {what}: one patient would move several votes. Train each on its own "
                    "shard."
                )
        if len({(one.partition, one.of) for one in self.teachers}) > 1 or self.teachers[0].of not in (0, len(numbers)):
            raise ValueError(
                f"these {len(numbers)} teachers are not all those of one partition, which has {self.teachers[0].of}: a "
                "patient may be in two. Train all shards of one partition, into a folder of their own."
            )
        if len({teacher.recipe for teacher in trained}) > 1:
            raise ValueError("the teachers were trained with different configs: train them all with the same.")

    def __len__(self) -> int:
        return len(self.teachers)

    def __iter__(self) -> Iterator[Teacher]:
        return iter(self.teachers)

    @property
    def teachers_per_patient(self) -> int:
        """Most of these teachers that one patient is in: a patient moves so many votes."""
        return max(teacher.teachers_per_patient for teacher in self.teachers)

    @property
    def digest(self) -> str:
        """SHA-256 of all teachers: answers belong to one set of them."""
        lines = sorted(f"{one.number} {one.sha256} {one.shard}" for one in self.teachers)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str], *, num_teachers: int | None = None) -> TeacherSet:
        """All teachers below ``folder``, each in a folder of its own with a ``teacher.json``.

        Raises:
            ValueError: as of the class, and where there are not ``num_teachers``.
        """
        root = Path(folder)
        found = [_read(path) for path in sorted(root.glob(f"*/{_RECORD}"))]
        if num_teachers is not None and len(found) != num_teachers:
            raise ValueError(
                f"{root} has {len(found)} teachers, but the manifest has {num_teachers} shards: every teacher votes. Train "
                "those that are missing."
            )
        return cls(tuple(sorted(found, key=lambda one: one.number)))

    @classmethod
    def from_checkpoints(cls, checkpoints: Sequence[str | os.PathLike[str]]) -> TeacherSet:
        """Teachers that somebody else trained, a file each. That they saw different patients is then an assumption."""
        paths = [Path(one) for one in checkpoints]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise ValueError(f"{_listed(missing)} cannot be found: give the files of all teachers.")
        return cls(
            tuple(
                Teacher(number, path, file_digest(path), f"unknown {number}", weights=weights_digest(path))
                for number, path in enumerate(paths)
            )
        )


def record_teacher(folder: Path, teacher: Teacher) -> None:
    """Write down that a teacher is trained, as the last thing, so that an interrupted training is not taken for one."""
    values = asdict(teacher) | {"checkpoint": None if teacher.checkpoint is None else teacher.checkpoint.name}
    partial = folder / (_RECORD + ".partial")
    partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, folder / _RECORD)


def trained_teacher(folder: Path, shard: str, recipe: str, partition: str = "") -> Teacher | None:
    """The teacher recorded in ``folder``, if it is whole, and of this shard, recipe and partition; else None."""
    if not (folder / _RECORD).is_file():
        return None
    try:
        found = _read(folder / _RECORD)
    except ValueError:
        return None
    if (found.shard, found.recipe, found.partition) != (shard, recipe, partition):
        return None
    whole = found.checkpoint is None or (found.checkpoint.is_file() and file_digest(found.checkpoint) == found.sha256)
    return found if whole else None


def weights_digest(path: Path) -> str:
    """SHA-256 of a checkpoint's weights, whatever the file is called and however it was written."""
    return state_digest(_state(path, "cpu"))


def _state(path: Path, device: torch.device | str) -> dict[str, Any]:
    state = torch.load(path, map_location=device, weights_only=True)
    found: dict[str, Any] = (
        state["model"] if isinstance(state, dict) and isinstance(state.get("model"), dict) else state
    )
    return found


def _read(path: Path) -> Teacher:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        name = values["checkpoint"]
        return Teacher(
            number=int(values["number"]),
            checkpoint=None if name is None else path.parent / str(name),
            sha256=str(values["sha256"]),
            shard=str(values["shard"]),
            recipe=str(values["recipe"]),
            teachers_per_patient=checked_count("teachers_per_patient", values["teachers_per_patient"]),
            weights=str(values["weights"]),
            partition=str(values["partition"]),
            of=int(values["of"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): train this teacher again.") from error


def _repeated(values: Sequence[Any]) -> list[Any]:
    return sorted(value for value, count in Counter(values).items() if count > 1)


def _listed(values: Sequence[Any]) -> str:
    shown = ", ".join(str(value) for value in values[:5])
    return shown + (f" and {len(values) - 5} more" if len(values) > 5 else "")
