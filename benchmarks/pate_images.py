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

"""Labels by private vote and what a student learns from them, on real images, patients held out.

    python -m benchmarks.pate_images --data kermany_xray_96.npz
    python -m benchmarks.pate_images --data covid_ct_128.npz
    python -m benchmarks.pate_images --data lidc_nodules

Writes results/pate_<data>.json and prints a table. How the numbers come about:

- The images are an ``.npz`` with ``images``, ``label`` (0 or 1) and ``patient_id``, or a folder of CT volumes with a CSV,
  prepared as the bundle's configs/volumes.yaml says. For each seed, test patients are a fifth
  of all, and none of the tuning pool that the recipe was chosen on (see ``benchmarks.held_out``); of the others, a quarter
  are the clinic's, whose images are to be labelled; the rest are the hospitals'. A patient is in one of the three.
- Teachers are linear heads on fixed features (histograms of gradients; for volumes, the density at each distance from the
  middle), each on its own patients: of one collection, or
  of five hospitals. They vote through ``TeacherVoteEvaluator`` and ``VoteLabeller``, on a ledger; ε is the ledger's.
- Where the planner refuses, there is no row of labels, unless ``--allow-uninformative`` shows what it refused.
- Students: a linear head on other fixed features of the labelled images; FixMatch with a small network on all of the
  clinic's images. They see noisy labels alone. The ceiling is the same student with the true labels of the same images.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.data import DataLoader, Dataset
from monai.networks.nets import Classifier
from rich.console import Console
from sklearn.metrics import roc_auc_score

from benchmarks.held_out import is_test_patient, machine, spread
from monai_privacy.accounting.ledger import PrivacyLedger
from monai_privacy.data import read_ct_volumes
from monai_privacy.data.partition import partition_patients
from monai_privacy.mechanisms.voting import GNMax
from monai_privacy.networks import FixedFeatureClassifier, GradientHistograms, RadialProfile, fit_linear_head
from monai_privacy.pate import FixMatchTrainer, VotingPlan, advice, require_informative
from monai_privacy.pate.engine import TeacherVoteEvaluator
from monai_privacy.pate.labelling import VoteLabeller
from monai_privacy.pate.teachers import Teacher, TeacherSet
from monai_privacy.provenance import file_digest

RESULTS = Path(__file__).parent / "results"
VOLUMES = Path(__file__).parents[1] / "bundles" / "covid_ct_pate" / "configs" / "volumes.yaml"
DELTA = 1e-5
HOSPITALS = 5
# Chosen on the tuning pool's patients alone; see benchmarks/README.md.
TEACHER_CELL, TEACHER_L2 = 16, 1e-3
STUDENT_CELL, STUDENT_L2 = 12, 0.03


@dataclass(frozen=True)
class Images:
    """Images (N, 1, H, W) in [0, 1] or volumes (N, 1, X, Y, Z) in [-2, 2], labels and patients."""

    images: torch.Tensor
    labels: torch.Tensor
    patients: tuple[str, ...]

    def rows(self, rows: np.ndarray) -> Images:
        """Some of them."""
        return Images(self.images[rows], self.labels[rows], tuple(self.patients[row] for row in rows))


@dataclass(frozen=True)
class Setting:
    """A row of the table: teachers (of each hospital, where there are some), queries and ε."""

    name: str
    teachers: int
    hospitals: int
    queries: int
    epsilon: float


def read(path: Path) -> Images:
    """The images of an ``.npz``, or the volumes of a folder."""
    if path.is_dir():
        source = read_ct_volumes(path, label_column="malignant")
        config = ConfigParser(ConfigParser.load_config_file(VOLUMES))
        prepare = config.get_parsed_content("preprocessing")
        volumes = [prepare({"image": record["image"]})["image"].as_tensor() for record in source.records]
        labels = torch.tensor([record["label"] for record in source.records])
        return Images(torch.stack(volumes), labels, tuple(record["patient_id"] for record in source.records))
    data = np.load(path)
    images = torch.tensor(data["images"]).float()[:, None] / 255
    return Images(images, torch.tensor(data["label"]).long(), tuple(str(one) for one in data["patient_id"]))


def place(patient: str, seed: int, purpose: str) -> float:
    """A number in [0, 1) that the patient, the seed and the purpose decide."""
    return int(hashlib.sha256(f"{purpose}:{seed}:{patient}".encode()).hexdigest(), 16) / 2**256


def divide(data: Images, seed: int) -> dict[str, Images]:
    """Test, public and hospital images, no patient in two of them."""
    test = np.array([is_test_patient(patient, seed) for patient in data.patients])
    public = ~test & np.array([place(patient, seed, "public") < 0.25 for patient in data.patients])
    parts = {"test": test, "public": public, "hospitals": ~test & ~public}
    found = {name: data.rows(np.flatnonzero(mask)) for name, mask in parts.items()}
    everybody = [set(part.patients) for part in found.values()]
    assert not everybody[0] & everybody[1]
    assert not everybody[2] & (everybody[0] | everybody[1])
    return found


def fixed_features(shape: Sequence[int], cell_size: int) -> torch.nn.Module:
    """For images (1, H, W) or volumes (1, X, Y, Z)."""
    return GradientHistograms(cell_size=cell_size) if len(shape) == 3 else RadialProfile(shells=8)


def network(shape: Sequence[int]) -> FixedFeatureClassifier:
    """A teacher."""
    return FixedFeatureClassifier(tuple(shape), 2, features=fixed_features(shape, TEACHER_CELL))


def train(data: Images, setting: Setting, seed: int, folder: Path) -> TeacherSet:
    """One linear head for each shard."""
    homes = None
    if setting.hospitals > 1:
        homes = [f"hospital {int(place(p, seed, 'hospital') * setting.hospitals)}" for p in data.patients]
    # Known here, so that the table can be made again; a consortium's is secret.
    key = hashlib.sha256(f"benchmark {seed}".encode()).digest()
    partition = partition_patients(data.patients, setting.teachers, key=key, hospitals=homes)
    model = network(data.images.shape[1:])
    features = model.encode(data.images)
    found = []
    for number, rows in enumerate(partition.rows):
        if not rows:
            found.append(Teacher(number, None, "", f"shard {number}"))
            continue
        model.head.load_state_dict(
            fit_linear_head(features[list(rows)], data.labels[list(rows)], 2, l2=TEACHER_L2).state_dict()
        )
        path = folder / f"{number:03d}.pt"
        torch.save(model.state_dict(), path)
        found.append(Teacher(number, path, file_digest(path), f"shard {number}"))
    return TeacherSet(tuple(found))


def linear_student(images: torch.Tensor, labels: torch.Tensor, test: torch.Tensor) -> np.ndarray:
    """Scores of the test images by a linear head on fixed features."""
    features = fixed_features(images.shape[1:], STUDENT_CELL)
    head = fit_linear_head(features(images), labels, 2, l2=STUDENT_L2)
    with torch.no_grad():
        scores = head(features(test))
    return np.asarray(scores[:, 1] - scores[:, 0])


def fixmatch_student(
    images: torch.Tensor, labels: torch.Tensor, others: torch.Tensor, test: torch.Tensor, seed: int, steps: int
) -> np.ndarray:
    """Scores of the test images by a small network that also learns from images without labels."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    small = [torch.nn.functional.interpolate(one, size=(48, 48), mode="area") for one in (images, others, test)]
    model = Classifier(
        (1, 48, 48), 2, (32, 64, 64), (2, 2, 2), act="elu", norm=("group", {"num_groups": 8}), num_res_units=0
    )

    def weak(row: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"image": _shifted(row["image"], 2, generator)}

    def strong(row: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        image = _shifted(row["image"], 5, generator)
        contrast, brightness = torch.rand(2, generator=generator).tolist()
        image = 0.5 + (image - 0.5) * (0.5 + contrast) + 0.3 * (brightness - 0.5)
        top, left = torch.randint(0, 32, (2,), generator=generator).tolist()
        image[:, top : top + 16, left : left + 16] = 0.5
        return {"image": image + 0.05 * torch.randn(image.shape, generator=generator)}

    labelled = Dataset([{"image": image, "label": label} for image, label in zip(small[0], labels, strict=True)])
    unlabelled = Dataset([{"image": image} for image in small[1]])
    trainer = FixMatchTrainer(
        "cpu", max_epochs=steps // 4, epoch_length=4, network=model,
        train_data_loader=DataLoader(labelled, batch_size=25, shuffle=True),
        optimizer=torch.optim.Adam(model.parameters(), lr=1e-3), loss_function=torch.nn.CrossEntropyLoss(),
        unlabelled_loader=DataLoader(unlabelled, batch_size=75, shuffle=True), weak=weak, strong=strong,
    )  # fmt: skip
    trainer.run()
    model.eval()
    with torch.no_grad():
        scores = model(small[2])
    return np.asarray(scores[:, 1] - scores[:, 0])


def _shifted(image: torch.Tensor, most: int, generator: torch.Generator) -> torch.Tensor:
    down, right = torch.randint(-most, most + 1, (2,), generator=generator).tolist()
    return torch.roll(image, (down, right), (1, 2))


def run(data: Images, setting: Setting, seed: int, students: Sequence[str], allow: bool) -> dict[str, Any]:
    """One seed of one row."""
    parts = divide(data, seed)
    public, test = parts["public"], parts["test"]
    asked = np.random.default_rng(seed).permutation(len(public.patients))[: setting.queries]
    queries, others = public.rows(asked), public.rows(np.setdiff1d(np.arange(len(public.patients)), asked))
    number = setting.teachers * setting.hospitals
    plan = VotingPlan(number, len(asked), 2, setting.epsilon, DELTA)
    found: dict[str, Any] = {"setting": setting.name, "seed": seed, "queries": len(asked), "noise_std": plan.noise_std}
    found |= {f"{name}_patients": len(set(part.patients)) for name, part in parts.items()}
    try:
        require_informative(advice(plan, hospitals=setting.hospitals))
    except ValueError as error:
        found["refused"] = str(error)
        if not allow:
            return found
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        group = train(parts["hospitals"], setting, seed, folder)
        loader = DataLoader(Dataset([{"image": image} for image in queries.images]), batch_size=len(asked))
        shape = data.images.shape[1:]
        counted = TeacherVoteEvaluator("cpu", loader, network(shape), group)
        counted.run()
        votes = counted.votes()
        ledger = PrivacyLedger(folder / "ledger.jsonl")
        labeller = VoteLabeller(
            GNMax(plan.noise_std), ledger, answers=folder / "answers.jsonl", num_teachers=number,
            max_queries=len(asked), delta=DELTA, num_patients=found["hospitals_patients"], teachers=group.digest,
        )  # fmt: skip
        evaluator = TeacherVoteEvaluator("cpu", loader, network(shape), group, labeller=labeller)
        evaluator.run()
        labels = evaluator.state.labels.labels
        labeller.close()
        found |= {"epsilon": ledger.epsilon(DELTA), "minutes": (time.perf_counter() - start) / 60}
    right = (votes.argmax(dim=1) == queries.labels).float()
    found |= {
        "plurality_accuracy": float(right.mean()),
        "agreement": float((votes.max(dim=1).values / number).mean()),
        "label_accuracy": float((labels == queries.labels).float().mean()),
        "one_teacher_accuracy": float((votes[range(len(asked)), queries.labels] / number).mean()),
    }
    for kind in students:
        for source, given in (("", labels), ("_ceiling", queries.labels)):
            if kind == "linear":
                scores = linear_student(queries.images, given, test.images)
            else:
                scores = fixmatch_student(queries.images, given, others.images, test.images, seed, 800)
            found[f"{kind}_auc{source}"] = float(roc_auc_score(test.labels, scores))
    return found


def settings(data: Path) -> list[Setting]:
    """The rows: many X-rays, some CT volumes, or few CT slices."""
    rows, epsilon = [("100 teachers", 100, 1), ("5 hospitals of 20", 20, HOSPITALS), ("250 teachers", 250, 1)], 2.0
    if "covid" in data.name:
        rows, epsilon = [("50 teachers", 50, 1), ("25 teachers", 25, 1), ("5 hospitals of 5", 5, HOSPITALS)], 8.0
    elif data.is_dir():
        rows = [("100 teachers", 100, 1), ("5 hospitals of 20", 20, HOSPITALS), ("50 teachers", 50, 1)]
    rows.append(("5 teachers", 1, HOSPITALS))
    return [Setting(name, teachers, hospitals, 100, epsilon) for name, teachers, hospitals in rows]


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--students", nargs="*", default=["linear"], choices=["linear", "fixmatch"])
    parser.add_argument("--allow-uninformative", action="store_true", help="measure what the planner refuses as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data, console = read(options.data), Console()
    rows = []
    for setting in settings(options.data):
        for seed in range(options.seeds):
            rows.append(run(data, setting, seed, options.students, options.allow_uninformative))
            console.print(rows[-1])
    path = RESULTS / f"pate_{options.data.stem}.json"
    made_with = machine(f"python -m benchmarks.pate_images --data {options.data.name}", 1)
    path.write_text(json.dumps(made_with | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    columns = ["epsilon", "plurality_accuracy", "label_accuracy"]
    columns += [f"{kind}_auc{source}" for kind in options.students for source in ("", "_ceiling")]
    console.print("| | " + " | ".join(columns) + " |", soft_wrap=True)
    for setting in settings(options.data):
        own = [row for row in rows if row["setting"] == setting.name]
        cells = [
            "refused" if "label_accuracy" not in own[0] else spread([row[name] for row in own]) for name in columns
        ]
        console.print(f"| {setting.name} | " + " | ".join(cells) + " |", soft_wrap=True)


if __name__ == "__main__":
    main()
