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

"""The steps from prepared images to labels, as the command line takes them: partition, teachers, votes, labels."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from monai_privacy.accounting.ledger import PrivacyLedger
from monai_privacy.data.partition import new_partition_key
from monai_privacy.mechanisms.voting import GNMax
from monai_privacy.pate.engine import TeacherVoteEvaluator
from monai_privacy.pate.hospital_votes import HospitalVotes, teachers_digest, total_votes
from monai_privacy.pate.labelling import VoteLabeller, VoteLabels
from monai_privacy.pate.planning import VotingPlan, advice, require_informative
from monai_privacy.pate.teachers import TeacherSet

__all__ = ["hospital_votes_of", "key_from_file", "label_votes", "write_labels"]


def key_from_file(path: str | os.PathLike[str], *, make: bool = False) -> bytes:
    """The partition's key, hexadecimal in a file for its owner alone; made where it is missing and ``make`` is set.

    Raises:
        ValueError: where it is missing or no key.
    """
    file = Path(path)
    if make and not file.exists():
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as new:
            new.write(new_partition_key().hex() + "\n")
    try:
        return bytes.fromhex(file.read_text(encoding="ascii").strip())
    except OSError as error:
        raise ValueError(
            f"{file} cannot be read: {error.strerror}. Name the key that the patients were divided with."
        ) from error
    except ValueError as error:
        raise ValueError(f"{file} holds no key in hexadecimal digits. Put the right file back.") from error


def hospital_votes_of(
    bundle: str | os.PathLike[str],
    teachers: TeacherSet,
    *,
    hospital: str,
    num_classes: int = 2,
    config_files: Sequence[str] = ("configs/inference.yaml",),
    overrides: Mapping[str, Any] | None = None,
    network_id: str = "network",
    loader_id: str = "dataloader",
    inferer_id: str = "inferer",
    on_teacher: Any = None,
) -> tuple[HospitalVotes, tuple[str, ...]]:
    """Let teachers vote on the images of a bundle's inference config.

    Args:
        bundle: the bundle's folder.
        teachers: of this hospital.
        hospital: its name.
        num_classes: number of classes.
        config_files: inference config and overlays, relative to the folder.
        overrides: further entries, such as the folder of the images.
        network_id, loader_id, inferer_id: where the config has them.
        on_teacher: called with an engine after each teacher.

    Returns:
        The votes, which are private, and the file of each image, in the order of the queries.
    """
    from ignite.engine import Events

    root = Path(bundle)
    parser = ConfigParser()
    parser.read_config([str(root / name) for name in config_files])
    parser.update({"bundle_root": str(root), **dict(overrides or {})})
    loader, network = parser.get_parsed_content(loader_id), parser.get_parsed_content(network_id)
    if not len(loader):
        raise ValueError(
            f"{', '.join(config_files)} finds no image: correct the folder, or the pattern of the files' names, such as "
            "--override 'input_pattern=**/*.dcm'."
        )
    inferer = parser.get_parsed_content(inferer_id) if inferer_id in parser else None
    device = parser.get_parsed_content("device") if "device" in parser else "cpu"
    evaluator = TeacherVoteEvaluator(device, loader, network, teachers, num_classes=num_classes, inferer=inferer)
    if on_teacher is not None:
        evaluator.add_event_handler(Events.EPOCH_COMPLETED, on_teacher)
    evaluator.run()
    rows = dict(zip(evaluator.queries, evaluator.votes().tolist(), strict=True))
    votes = HospitalVotes(
        hospital,
        len(teachers),
        tuple(rows),
        tuple(tuple(row) for row in rows.values()),
        tuple(one.identity for one in teachers),
        teachers.teachers_per_patient,
    )
    files = [str(name) for batch in loader for name in _file_names(batch)]
    return votes, tuple(files[evaluator.queries.index(query)] for query in rows)


def label_votes(
    hospitals: Sequence[HospitalVotes],
    ledger: PrivacyLedger,
    answers: str | os.PathLike[str],
    *,
    epsilon: float,
    delta: float,
    teachers_per_patient: int = 1,
    max_queries: int | None = None,
    allow_uninformative: bool = False,
    num_patients: int | None = None,
    purpose: str = "",
) -> tuple[tuple[str, ...], VoteLabels, VotingPlan]:
    """Answer the queries that all hospitals voted on by GNMax, with the noise that the plan asks for.

    Args:
        hospitals: their votes.
        ledger: that of the teachers' patients.
        answers: the file of answers.
        epsilon, delta: what all labels together may cost a patient.
        teachers_per_patient: most teachers that saw one patient.
        max_queries: how many queries the noise is for; those that there are where None.
        allow_uninformative: label although a student would learn little.
        num_patients: how many patients are behind the teachers, for the report.
        purpose: who asks and why.

    Raises:
        ValueError: for votes that do not fit together, or labels that would be noise; nothing is charged.
    """
    queries, votes, num_teachers = total_votes(hospitals)
    most = max(one.teachers_per_patient for one in hospitals)
    if teachers_per_patient < most:
        raise ValueError(
            f"teachers_per_patient is {teachers_per_patient}, but a hospital has patients in {most} of its teachers: they "
            f"move so many votes. Give {most}, or more where patients were at several hospitals."
        )
    plan = VotingPlan(
        num_teachers=num_teachers,
        num_queries=len(queries) if max_queries is None else max_queries,
        num_classes=votes.shape[1],
        epsilon=epsilon,
        delta=delta,
        teachers_per_patient=teachers_per_patient,
    )
    if not allow_uninformative:
        require_informative(advice(plan, hospitals=len(hospitals)))
    labeller = VoteLabeller(
        GNMax(plan.noise_std, teachers_per_patient),
        ledger,
        answers=answers,
        num_teachers=num_teachers,
        max_queries=plan.num_queries,
        delta=delta,
        num_patients=num_patients,
        teachers=teachers_digest(hospitals),
        purpose=purpose,
    )
    return queries, labeller.label(queries, votes), plan


def write_labels(
    path: str | os.PathLike[str], queries: Sequence[str], labels: VoteLabels, files: Mapping[str, str]
) -> Path:
    """A CSV with a line for each query: file (or the query's name where none is known) and label, -1 for none."""
    target = Path(path)
    with target.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["image", "label"])
        writer.writerows(
            [files.get(query, query), label] for query, label in zip(queries, labels.labels.tolist(), strict=True)
        )
    return target


def _file_names(batch: Mapping[str, Any]) -> Sequence[str]:
    image = batch["image"]
    names = getattr(image, "meta", {}).get("filename_or_obj", [""] * len(image))
    return [names] if isinstance(names, str) else names
