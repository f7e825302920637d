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

"""Measuring on patients who had no part in anything before: what the benchmarks on real images share.

- The patients of the tuning pool (55 %, by a hash of their id) chose the recipe: network, optimizer, learning rate,
  clipping norm, batch size and steps. No test patient is one of them.
- For each seed, the test patients (20 % of all) are drawn from the other 45 %; everybody else is trained on. No
  validation, no early stopping, no best checkpoint: the network after the last step is measured, once.
"""

from __future__ import annotations

import hashlib
import json
import platform
import statistics
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from monai_privacy.data import ImageSource, count_patients, write_datalist

TEST_SHARE = 0.2
POOL_SHARE = 0.55

#: Nothing looks at images outside training: no validation, only the last network is kept.
KEEP_LAST = {
    "_target_": "CheckpointSaver",
    "save_dir": "@output_dir",
    "save_dict": {"model": "@network"},
    "save_final": True,
    "final_filename": "model.pt",
}


def in_tuning_pool(patient_id: str) -> bool:
    """Whether this patient may have influenced the recipe, and so must not be tested on."""
    return int(hashlib.sha256(f"tuning-pool:{patient_id}".encode()).hexdigest(), 16) % 100 < 100 * POOL_SHARE


def is_test_patient(patient_id: str, seed: int) -> bool:
    """Whether this patient is tested on with this seed: a fifth of all, none of them from the pool."""
    if in_tuning_pool(patient_id):
        return False
    place = int(hashlib.sha256(f"test:{seed}:{patient_id}".encode()).hexdigest(), 16) / 2**256
    return place < TEST_SHARE / (1 - POOL_SHARE)


def prepare(source: ImageSource, folder: Path, seed: int) -> dict[str, int]:
    """Write the datalist of this seed into ``folder``; how many patients and images are where."""
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


def patient_auc(patients: list[str], labels: Sequence[int], values: Sequence[float]) -> float:
    """AUC with one score a patient, the mean over their images; label 1 where any of their images has it."""
    ids = sorted(set(patients))
    rows = np.array([ids.index(patient) for patient in patients])
    mean = np.bincount(rows, values) / np.bincount(rows)
    return float(roc_auc_score(np.bincount(rows, labels) > 0, mean))


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over the seeds."""
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}"


def machine(command: str, threads: int) -> dict[str, Any]:
    """What the results were made with."""
    packages = ("monai-privacy", "torch", "monai", "dp-accounting")
    return {
        "command": command,
        "machine": f"{platform.machine()}, {threads} CPU threads, no GPU",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def run_missing(
    output: Path,
    made_with: dict[str, Any],
    wanted: Sequence[tuple[Any, ...]],
    key: Callable[[dict[str, Any]], tuple[Any, ...]],
    run: Callable[..., dict[str, Any]],
) -> list[dict[str, Any]]:
    """Run what is not in the results file, which is written after each run."""
    results: list[dict[str, Any]] = []
    if output.is_file():
        results = json.loads(output.read_text(encoding="utf-8"))["results"]
    done = {key(result) for result in results}
    for one in wanted:
        if one not in done:
            results.append(run(*one))
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(made_with | {"results": results}, indent=1), encoding="utf-8")
    return results
