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
"""AUC of the lung nodule bundle with and without privacy, on held-out patients.

    python -m benchmarks.lung_nodules --data lidc_nodules

The folder holds NIfTI nodules and labels.csv (file, patient_id, malignant, diameter_mm). Writes results/lung_nodules.json
and prints the table. How the numbers come about:

- Test patients had no part in the choice of the recipe, and are looked at once: see ``benchmarks.held_out``.
- The warm start was trained on synthetic volumes alone, once, before the first row; its minutes stand apart.
- The unit of privacy is the patient. AUC is per nodule, as in the literature; per patient (mean score) beside it.
- Diameter: the radiologists' diameter as the score, with nothing learned.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from sklearn.metrics import roc_auc_score

from benchmarks.held_out import KEEP_LAST, is_test_patient, machine, patient_auc, prepare, run_missing, spread
from monai_privacy import PrivacyLedger
from monai_privacy.bundle import score_bundle, train_bundle
from monai_privacy.data import read_ct_volumes
from monai_privacy.handlers import PrivacyProgressHandler

BUNDLES = Path(__file__).parents[1] / "bundles"
BUNDLE = BUNDLES / "lung_nodule_ct_classification"
RESULTS = Path(__file__).parent / "results" / "lung_nodules.json"
DELTA = 1e-4
#: Rows of the table: what is changed in the bundle's recipe.
VARIANTS: dict[str, dict[str, Any]] = {
    "last layer": {},
    "all layers": {"trained_layers": ".*", "learning_rate": 0.002, "epochs": 20},
    "all layers, no warm start": {
        "trained_layers": ".*", "initial_weights": "none", "needs_initial_weights": False, "learning_rate": 0.005,
        "epochs": 30,
    },
}  # fmt: skip
PLAIN: dict[str, dict[str, Any]] = {
    "all layers": {"needs_initial_weights": True},
    "all layers, no warm start": {"initial_weights": "none", "learning_rate": 0.001, "epochs": 20},
}
CONFIGS = BUNDLE / "configs"


def pretrain(weights: Path, console: Console) -> float:
    """Train on synthetic volumes, where it was not done; minutes."""
    log = weights.with_suffix(".json")
    if not (weights.is_file() and log.is_file()):
        began = time.perf_counter()
        handlers = [PrivacyProgressHandler("synthetic volumes", console)]
        overrides = {"bundle_root": str(weights.parents[1]), "output_dir": str(weights.parent), "num_workers": 0}
        train_bundle([CONFIGS / "train.yaml", CONFIGS / "pretrain.yaml"], overrides, handlers=handlers)
        log.write_text(json.dumps({"minutes": (time.perf_counter() - began) / 60}), encoding="utf-8")
    return float(json.loads(log.read_text(encoding="utf-8"))["minutes"])


def run(data: Path, weights: Path, console: Console, seed: int, epsilon: float | None, variant: str) -> dict[str, Any]:
    """One training and one look at the test patients."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = prepare(read_ct_volumes(data, label_column="malignant"), folder, seed)
        common: dict[str, Any] = {
            "bundle_root": str(BUNDLE),
            "dataset_dir": str(folder),
            "output_dir": str(folder / "out"),
            "seed": seed,
        }
        train, recipe = CONFIGS / "train.yaml", (PLAIN if epsilon is None else VARIANTS)[variant]
        configs = [train]
        changes: dict[str, Any] = {"initial_weights": str(weights)}
        if epsilon is not None:
            configs += [BUNDLES / "overlays" / "dp_sgd.yaml", CONFIGS / "private.yaml"]
            changes |= {"epsilon": epsilon, "delta": DELTA}
        changes |= recipe | {"train#handlers": [KEEP_LAST]}
        progress = PrivacyProgressHandler(f"seed {seed}, ε {epsilon or 'none'}, {variant}", console)
        began = time.perf_counter()
        train_bundle(configs, common | changes, handlers=[progress])
        seconds = time.perf_counter() - began
        scores = score_bundle([train, CONFIGS / "evaluate.yaml"], common)
        datalist = json.loads((folder / "datalist.json").read_text(encoding="utf-8"))
        result = {
            "seed": seed,
            "epsilon_target": epsilon,
            "variant": variant,
            "auc_nodule": float(roc_auc_score(scores.labels, scores.values)),
            "auc_patient": patient_auc([r["patient_id"] for r in datalist["test"]], scores.labels, scores.values),
            "seconds": seconds,
            **sizes,
        }
        if epsilon is not None:
            ledger = PrivacyLedger(folder / "ledger.jsonl")
            result |= {"epsilon": ledger.epsilon(DELTA), **dict(ledger.entries[0].facts)}
        return result


def diameter(data: Path, seed: int) -> tuple[float, float]:
    """AUC, per nodule and per patient, of the diameter on the same test patients."""
    with open(data / "labels.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if is_test_patient(row["patient_id"], seed)]
    labels = [int(float(row["malignant"])) for row in rows]
    sizes = [float(row["diameter_mm"]) for row in rows]
    return float(roc_auc_score(labels, sizes)), patient_auc([row["patient_id"] for row in rows], labels, sizes)


def table(results: list[dict[str, Any]], baseline: list[tuple[float, float]]) -> str:
    """The results as markdown: mean and standard deviation over the seeds."""
    lines = [
        "| | trained | ε (δ = 1e-4) | AUC per nodule | AUC per patient | minutes |",
        "|---|---|---|---|---|---|",
        f"| diameter alone | nothing | none | {spread([b[0] for b in baseline])} | {spread([b[1] for b in baseline])} | |",
    ]
    for target in sorted({r["epsilon_target"] for r in results}, key=lambda e: -(e or 1e9)):
        for variant in dict.fromkeys(r["variant"] for r in results if r["epsilon_target"] == target):
            rows = [r for r in results if (r["epsilon_target"], r["variant"]) == (target, variant)]
            name = "without privacy" if target is None else "private, unit: patient"
            epsilon = "none" if target is None else f"{max(r['epsilon'] for r in rows):.3f}"
            aucs = [spread([r[key] for r in rows]) for key in ("auc_nodule", "auc_patient")]
            minutes = f"{statistics.median(r['seconds'] for r in rows) / 60:.1f}"
            lines.append(f"| {' | '.join([name, variant, epsilon, *aucs, minutes])} |")
    return "\n".join(lines)


def main() -> None:
    """Run all seeds, targets and variants; a run that is already in the results file is not repeated."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="lidc_nodules, or a folder like it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epsilons", type=float, nargs="+", default=[8.0, 1.0])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--weights", type=Path, default=BUNDLE / "models" / "synthetic.pt")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console(stderr=True)
    minutes = pretrain(options.weights, console)
    wanted = [
        (seed, epsilon, variant)
        for variant in options.variants
        for seed in options.seeds
        for epsilon in (None, *options.epsilons)
        if epsilon is not None or variant in PLAIN
    ]
    results = run_missing(
        options.output,
        machine(f"python -m benchmarks.lung_nodules --data {options.data.name}", options.threads),
        wanted,
        lambda result: (result["seed"], result["epsilon_target"], result["variant"]),
        lambda *one: run(options.data, options.weights, console, *one),
    )
    print(table(results, [diameter(options.data, seed) for seed in options.seeds]))
    print(f"\nwarm start: {minutes:.1f} minutes on synthetic volumes, once")


if __name__ == "__main__":
    main()
