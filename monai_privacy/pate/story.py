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

"""The whole story on one machine: hospitals with labelled patients, a clinic with images, votes, labels, a student."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from monai_privacy.accounting.ledger import PrivacyLedger
from monai_privacy.accounting.values import checked_count
from monai_privacy.bundle.running import score_bundle, train_bundle
from monai_privacy.data import ImageSource, split_patients, write_datalist
from monai_privacy.data.partition_manifest import read_manifest
from monai_privacy.pate.hospital_votes import HospitalVotes, write_hospital_votes
from monai_privacy.pate.planning import VotingPlan, advice, require_informative
from monai_privacy.pate.steps import hospital_votes_of, key_from_file, label_votes, write_labels
from monai_privacy.pate.students import split_answers
from monai_privacy.pate.teachers import TeacherSet
from monai_privacy.pate.training import MANIFEST, TeacherRecipe, teacher_pool, train_teachers, write_shards

__all__ = ["PateStory", "StoryResult", "run_story"]

#: Shares of the patients: the clinic's images to be labelled, and those that its student is tested on.
CLINIC_SHARE, TEST_SHARE = 0.2, 0.2


@dataclass(frozen=True)
class PateStory:
    """The numbers of the story; all are public.

    Args:
        hospitals: how many share the patients.
        teachers: of each hospital.
        queries: most images that the clinic asks about.
        epsilon, delta: what all labels together may cost a patient.
        seed: of who is at which hospital, and of the trainings.
        allow_uninformative: go on where the planner refuses.
    """

    hospitals: int = 5
    teachers: int = 20
    queries: int = 100
    epsilon: float = 2.0
    delta: float = 1e-5
    seed: int = 0
    allow_uninformative: bool = False

    def __post_init__(self) -> None:
        for name in ("hospitals", "teachers", "queries"):
            checked_count(name, getattr(self, name))


@dataclass(frozen=True)
class StoryResult:
    """How it ended.

    Args:
        patients, images: of hospitals, clinic and test.
        queries: images that were asked about.
        label_accuracy: share of the released labels that are right; the clinic of real life cannot know it.
        student_auc: of the student on the clinic's test patients.
        ceiling_auc: the same student with the true labels of the same images.
        epsilon: of everything on the ledger.
    """

    patients: Mapping[str, int]
    queries: int
    label_accuracy: float
    student_auc: float
    ceiling_auc: float
    epsilon: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def run_story(
    bundle: Path,
    source: ImageSource,
    output: Path,
    story: PateStory,
    *,
    train_config: Sequence[str] = ("configs/train.yaml",),
    evaluate_config: Sequence[str] = ("configs/evaluate.yaml",),
    inference_config: Sequence[str] = ("configs/inference.yaml",),
    overrides: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> StoryResult:
    """Divide patients among hospitals and a clinic, and go all the way to a student; begun again, it goes on.

    Args:
        bundle: a bundle whose training, evaluation and inference take ``dataset_dir`` and ``output_dir``.
        source: labelled images with patients; the clinic's labels are used to measure, and for nothing else.
        output: the folder for everything.
        story: the numbers.
        train_config, evaluate_config, inference_config: config files, relative to the bundle.
        overrides: further entries for all of them.
        say: told what happens, a line each.

    Raises:
        ValueError: where the planner refuses, or the images name no patients.
    """
    if not source.has_patient_ids:
        raise ValueError(
            "the images name no patients: nobody can say who is in which teacher. Give images with patients."
        )
    changes = dict(overrides or {})
    lists = _divided(source, output / "data", story)
    asked = _asked(lists["validation"], story)
    plan = VotingPlan(story.hospitals * story.teachers, len(asked), 2, story.epsilon, story.delta)
    if not story.allow_uninformative:
        require_informative(advice(plan, hospitals=story.hospitals))
    recipe = TeacherRecipe(bundle.absolute(), tuple(train_config), overrides=tuple(sorted(changes.items())))
    votes = []
    with teacher_pool() as pool:
        for name, records in _hospitals(lists["training"], story).items():
            say(f"{name}: {len({r['patient_id'] for r in records})} patients, {story.teachers} teachers")
            found = _vote(recipe, name, records, asked, output / name, story, inference_config, changes, pool)
            write_hospital_votes(found, output / name / "votes.json")
            votes.append(found)
    ledger = PrivacyLedger(output / "ledger.jsonl")
    queries, answers, _ = label_votes(
        votes, ledger, output / "answers.jsonl", epsilon=story.epsilon, delta=story.delta,
        allow_uninformative=story.allow_uninformative, num_patients=len({r["patient_id"] for r in lists["training"]}),
        purpose="labels for the clinic's images",
    )  # fmt: skip
    names = json.loads((output / "queries.json").read_text(encoding="utf-8"))
    write_labels(output / "labels.csv", queries, answers, names)
    given = dict(zip((names[query] for query in queries), answers.labels.tolist(), strict=True))
    labelled = [record for record in asked if record["image"] in given]
    noisy = [given[record["image"]] for record in labelled]
    right = [record["label"] for record in labelled]
    say(f"clinic: {answers.answered} of {len(queries)} images labelled")
    auc = {
        kind: _student(bundle, labelled, labels, lists["test"], output / kind, train_config, evaluate_config, changes)
        for kind, labels in (("student", noisy), ("ceiling", right))
    }
    return StoryResult(
        patients={name: len({r["patient_id"] for r in records}) for name, records in lists.items()},
        queries=len(queries),
        label_accuracy=float(np.mean(np.equal(noisy, right))),
        student_auc=auc["student"],
        ceiling_auc=auc["ceiling"],
        epsilon=ledger.epsilon(story.delta),
    )


def _divided(source: ImageSource, folder: Path, story: PateStory) -> dict[str, list[dict[str, Any]]]:
    path = folder / "datalist.json"
    if not path.is_file():
        write_datalist(
            source, folder, seed=story.seed, test_fraction=TEST_SHARE, validation_fraction=CLINIC_SHARE
        )  # fmt: skip
    listed = json.loads(path.read_text(encoding="utf-8"))
    return {
        split: [{**record, "image": str((folder / record["image"]).absolute())} for record in listed[split]]
        for split in ("training", "validation", "test")
    }


def _asked(records: Sequence[dict[str, Any]], story: PateStory) -> list[dict[str, Any]]:
    order = np.random.default_rng(story.seed).permutation(len(records))[: story.queries]
    return [records[row] for row in order]


def _hospitals(records: Sequence[dict[str, Any]], story: PateStory) -> dict[str, list[dict[str, Any]]]:
    shares = {f"hospital-{number + 1}": 1 / story.hospitals for number in range(story.hospitals)}
    places = split_patients([record["patient_id"] for record in records], shares, seed=story.seed)
    return {name: [records[row] for row in rows] for name, rows in places.items()}


def _vote(
    recipe: TeacherRecipe,
    name: str,
    records: Sequence[dict[str, Any]],
    asked: Sequence[dict[str, Any]],
    folder: Path,
    story: PateStory,
    inference_config: Sequence[str],
    changes: Mapping[str, Any],
    pool: ProcessPoolExecutor,
) -> HospitalVotes:
    """One hospital's teachers, trained where they are not, and what they say."""
    folder.mkdir(parents=True, exist_ok=True)
    key = key_from_file(folder / "partition.key", make=True)
    if not (folder / "shards" / MANIFEST).is_file():
        _write_list(folder / "datalist.json", training=records)
        write_shards(folder / "datalist.json", folder / "shards", story.teachers, key=key)
    manifest = read_manifest(folder / "shards" / MANIFEST, key)
    manifest.require_strangers([record["patient_id"] for record in asked])
    teachers: TeacherSet = train_teachers(recipe, manifest, folder / "shards", folder / "teachers", pool=pool)
    known = {
        "input_files": [record["image"] for record in asked],
        **{k: v for k, v in changes.items() if k in ("device", "image_size")},
    }
    votes, named = hospital_votes_of(
        recipe.bundle_root, teachers, hospital=name, config_files=inference_config, overrides=known
    )
    queries = folder.parent / "queries.json"
    queries.write_text(json.dumps(dict(zip(votes.queries, named, strict=True)), indent=1) + "\n", encoding="utf-8")
    return votes


def _student(
    bundle: Path,
    records: Sequence[dict[str, Any]],
    labels: Sequence[int],
    test: Sequence[dict[str, Any]],
    folder: Path,
    train_config: Sequence[str],
    evaluate_config: Sequence[str],
    changes: Mapping[str, Any],
) -> float:
    """AUC on the test patients of the bundle's network, trained on these labels."""
    labelled, _ = split_answers(records, labels)
    _write_list(folder / "datalist.json", training=labelled, test=test)
    common = {
        "bundle_root": str(bundle.absolute()), "dataset_dir": str(folder), "output_dir": str(folder), **changes
    }  # fmt: skip
    configs = [bundle / name for name in train_config]
    train_bundle(configs, common)
    return score_bundle([*configs, *(bundle / name for name in evaluate_config)], common).metrics["auc"]


def _write_list(path: Path, **splits: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({name: list(records) for name, records in splits.items()}) + "\n", encoding="utf-8")
