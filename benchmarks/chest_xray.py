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

- Test patients had no part in the choice of the recipe, and are looked at once: see ``benchmarks.held_out``.
- The unit of privacy is the patient. AUC is per image, as in the literature; per patient (mean score) beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from sklearn.metrics import roc_auc_score

from benchmarks.held_out import KEEP_LAST, machine, patient_auc, prepare, run_missing, spread
from monai_privacy import PrivacyLedger
from monai_privacy.bundle import score_bundle, train_bundle
from monai_privacy.data import read_chest_xrays
from monai_privacy.handlers import PrivacyProgressHandler

BUNDLES = Path(__file__).parents[1] / "bundles"
BUNDLE = BUNDLES / "chest_xray_classification"
RESULTS = Path(__file__).parent / "results" / "chest_xray.json"
DELTA = 1e-5


def run(data: Path, seed: int, epsilon: float | None, console: Console) -> dict[str, Any]:
    """One training and one look at the test patients."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = prepare(read_chest_xrays(data), folder, seed)
        common = {
            "bundle_root": str(BUNDLE),
            "dataset_dir": str(folder),
            "output_dir": str(folder / "out"),
            "seed": seed,
        }
        train, overlay = BUNDLE / "configs" / "train.yaml", BUNDLES / "overlays" / "dp_sgd.yaml"
        private: dict[str, Any] = {} if epsilon is None else {"epsilon": epsilon, "delta": DELTA}
        progress = PrivacyProgressHandler(f"seed {seed}, ε {epsilon or 'none'}", console)
        began = time.perf_counter()
        configs = [train] if epsilon is None else [train, overlay]
        train_bundle(configs, common | private | {"train#handlers": [KEEP_LAST]}, handlers=[progress])
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
            cells.append(spread([r[key] for r in rows]))
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
    results = run_missing(
        options.output,
        machine(f"python -m benchmarks.chest_xray --data {options.data.name}", options.threads),
        [(seed, epsilon) for seed in options.seeds for epsilon in (None, *options.epsilons)],
        lambda result: (result["seed"], result["epsilon_target"]),
        lambda seed, epsilon: run(options.data, seed, epsilon, console),
    )
    print(table(results))


if __name__ == "__main__":
    main()
