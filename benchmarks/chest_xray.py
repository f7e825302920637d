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

"""AUC of the chest X-ray bundle with and without privacy, on held-out patients.

    python -m benchmarks.chest_xray --data kermany_xray_96.npz

Writes results/chest_xray.json and prints the README's table. How the numbers come about:

- The patients of the tuning pool (55 %, by a hash of their id) chose the recipe: network, optimizer, learning rate,
  clipping norm, batch size and steps. No test patient is one of them.
- For each seed, the test patients (20 % of all) are drawn from the other 45 %; everybody else is trained on. No
  validation, no early stopping, no best checkpoint: the network after the last step is measured, once.
- The unit of privacy is the patient. AUC is per image, as in the literature; per patient (mean score) beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from sklearn.metrics import roc_auc_score

from monai_privacy import PrivacyLedger
from monai_privacy.bundle import score_bundle, train_bundle
from monai_privacy.data import count_patients, read_chest_xrays, write_datalist
from monai_privacy.handlers import PrivacyProgressHandler

BUNDLES = Path(__file__).parents[1] / "bundles"
BUNDLE = BUNDLES / "chest_xray_classification"
RESULTS = Path(__file__).parent / "results" / "chest_xray.json"
TEST_SHARE = 0.2
POOL_SHARE = 0.55
DELTA = 1e-5


def in_tuning_pool(patient_id: str) -> bool:
    """Whether this patient may have influenced the recipe, and so must not be tested on."""
    return int(hashlib.sha256(f"tuning-pool:{patient_id}".encode()).hexdigest(), 16) % 100 < 100 * POOL_SHARE


def is_test_patient(patient_id: str, seed: int) -> bool:
    """Whether this patient is tested on with this seed: a fifth of all, none of them from the pool."""
    if in_tuning_pool(patient_id):
        return False
    place = int(hashlib.sha256(f"test:{seed}:{patient_id}".encode()).hexdigest(), 16) / 2**256
    return place < TEST_SHARE / (1 - POOL_SHARE)


def prepare(data: Path, folder: Path, seed: int) -> dict[str, int]:
    """Write the datalist of this seed into ``folder``; how many patients and images are where."""
    source = read_chest_xrays(data)
    path = write_datalist(source, folder, seed=0, test_fraction=0.0, validation_fraction=0.0)
    datalist = json.loads(path.read_text(encoding="utf-8"))
    records = datalist.pop("training")
    # One list, in the source's order: a patient's pseudonym is looked up by row.
    is_test = [is_test_patient(record["patient_id"], seed) for record in source.records]
    datalist["training"] = [record for record, test in zip(records, is_test, strict=True) if not test]
    datalist["test"] = [record for record, test in zip(records, is_test, strict=True) if test]
    assert not {r["patient_id"] for r in datalist["training"]} & {r["patient_id"] for r in datalist["test"]}
    path.write_text(json.dumps(datalist), encoding="utf-8")
    return {
        f"{name}_{what}": count
        for name in ("training", "test")
        for what, count in (("patients", count_patients(datalist[name])), ("images", len(datalist[name])))
    }


def run(data: Path, seed: int, epsilon: float | None, console: Console) -> dict[str, Any]:
    """One training and one look at the test patients."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = prepare(data, folder, seed)
        common = {
            "bundle_root": str(BUNDLE),
            "dataset_dir": str(folder),
            "output_dir": str(folder / "out"),
            "seed": seed,
        }
        train, overlay = BUNDLE / "configs" / "train.yaml", BUNDLES / "overlays" / "dp_sgd.yaml"
        # Nothing looks at images outside training: no validation, only the last network is kept.
        keep_last = {
            "_target_": "CheckpointSaver",
            "save_dir": "@output_dir",
            "save_dict": {"model": "@network"},
            "save_final": True,
            "final_filename": "model.pt",
        }
        private: dict[str, Any] = {} if epsilon is None else {"epsilon": epsilon, "delta": DELTA}
        progress = PrivacyProgressHandler(f"seed {seed}, ε {epsilon or 'none'}", console)
        began = time.perf_counter()
        configs = [train] if epsilon is None else [train, overlay]
        train_bundle(configs, common | private | {"train#handlers": [keep_last]}, handlers=[progress])
        seconds = time.perf_counter() - began
        scores = score_bundle([train, BUNDLE / "configs" / "evaluate.yaml"], common)
        datalist = json.loads((folder / "datalist.json").read_text(encoding="utf-8"))
        result = {
            "seed": seed,
            "epsilon_target": epsilon,
            "auc_image": float(roc_auc_score(scores.labels, scores.values)),
            "auc_patient": patient_auc([r["patient_id"] for r in datalist["test"]], scores.labels, scores.values),
            "seconds": seconds,
            **sizes,
        }
        if epsilon is not None:
            ledger = PrivacyLedger(folder / "ledger.jsonl")
            result |= {"epsilon": ledger.epsilon(DELTA), **dict(ledger.entries[0].facts)}
        return result


def patient_auc(patients: list[str], labels: tuple[int, ...], values: tuple[float, ...]) -> float:
    """AUC with one score a patient, the mean over their images; label 1 where any of their images has it."""
    ids = sorted(set(patients))
    rows = np.array([ids.index(patient) for patient in patients])
    mean = np.bincount(rows, values) / np.bincount(rows)
    return float(roc_auc_score(np.bincount(rows, labels) > 0, mean))


def table(results: list[dict[str, Any]]) -> str:
    """The results as markdown: mean and standard deviation over the seeds."""
    lines = [
        "| | ε (δ = 1e-5) | AUC per image | AUC per patient | minutes |",
        "|---|---|---|---|---|",
    ]
    for target in sorted({r["epsilon_target"] for r in results}, key=lambda e: -(e or 1e9)):
        rows = [r for r in results if r["epsilon_target"] == target]
        name = "without privacy" if target is None else "private, unit: patient"
        cells = [name, "none" if target is None else f"{max(r['epsilon'] for r in rows):.3f}"]
        for key in ("auc_image", "auc_patient"):
            values = [r[key] for r in rows]
            cells.append(f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}")
        cells.append(f"{statistics.median(r['seconds'] for r in rows) / 60:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run all seeds and targets; a run that is already in the results file is not repeated."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="kermany_xray_96.npz, or another source with patients")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epsilons", type=float, nargs="+", default=[8.0, 1.0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console(stderr=True)
    results: list[dict[str, Any]] = []
    if options.output.is_file():
        results = json.loads(options.output.read_text(encoding="utf-8"))["results"]
    done = {(r["seed"], r["epsilon_target"]) for r in results}
    for seed in options.seeds:
        for epsilon in (None, *options.epsilons):
            if (seed, epsilon) not in done:
                results.append(run(options.data, seed, epsilon, console))
                options.output.parent.mkdir(parents=True, exist_ok=True)
                options.output.write_text(
                    json.dumps(machine(options) | {"results": results}, indent=1), encoding="utf-8"
                )
    print(table(results))


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """What the results were made with."""
    packages = ("monai-privacy", "torch", "monai", "dp-accounting")
    return {
        "command": f"python -m benchmarks.chest_xray --data {options.data.name}",
        "machine": f"{platform.machine()}, {options.threads} CPU threads, no GPU",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


if __name__ == "__main__":
    main()
