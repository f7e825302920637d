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

"""The chest X-ray bundle with and without privacy, side by side: what ``make demo`` runs."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from rich.console import Console
from rich.table import Table

from monai_privacy.accounting import PrivacyBudget, PrivacyLedger
from monai_privacy.bundle import Scores, score_bundle, train_bundle
from monai_privacy.data import ChestXRaySource, read_chest_xrays, write_datalist, write_synthetic_chest_xrays
from monai_privacy.figures import save_training_figure
from monai_privacy.handlers import PrivacyProgressHandler

_SYNTHETIC_PATIENTS = 600
_METRIC = "epsilon"


def run_demo(
    *,
    data: Path | None,
    epsilon: float,
    delta: float,
    output: Path,
    epochs: int | None = None,
    expected_batch_size: int | None = None,
    ledger: Path | None = None,
    seed: int = 0,
    console: Console,
) -> Path:
    """Prepare the data, train the bundle twice, evaluate on held-out patients, and write report, models and picture.

    Args:
        data: where chest X-rays lie, see ``read_chest_xrays``; synthetic ones are written where None.
        epsilon: ε to stay below.
        delta: δ of the guarantee.
        output: a folder for this run is made in it.
        epochs: in place of the bundle's own number.
        expected_batch_size: in place of the overlay's share of the patients.
        ledger: a standing ledger of these patients; one for this run alone where None.
        seed: of the split by patient and of the initial weights, never of sampling or noise.
        console: where to tell how it goes.

    Returns:
        The folder of this run.

    Raises:
        ValueError: for bad data or numbers, before training.
    """
    budget = PrivacyBudget(epsilon, delta)  # refuses bad numbers before any work
    bundle = _bundle_folder()
    folder = _new_folder(output)
    source = _read(data, folder, seed, console)
    write_datalist(source, folder, seed=seed)
    common: dict[str, Any] = {"bundle_root": str(bundle), "dataset_dir": str(folder), "seed": seed}
    common |= {} if epochs is None else {"epochs": epochs}
    private: dict[str, Any] = {"epsilon": budget.epsilon, "delta": budget.delta, "unit": source.unit}
    private |= {} if expected_batch_size is None else {"expected_batch_size": expected_batch_size}
    ledger_file = ledger or folder / "ledger.jsonl"
    private["ledger_file"] = str(ledger_file)
    kind = "synthetic images" if source.synthetic else "images"
    spent = _EpsilonByEpoch()
    train, overlay = bundle / "configs" / "train.yaml", bundle.parent / "overlays" / "dp_sgd.yaml"
    evaluate = [train, bundle / "configs" / "evaluate.yaml"]
    with _quiet_logs():
        console.print(
            f"Training on {kind}, first without privacy, then with (ε {epsilon:g}, δ {delta:g}) ...", soft_wrap=True
        )
        plain_dir, private_dir = folder / "without_privacy", folder / "with_privacy"
        bar = PrivacyProgressHandler("without privacy", console)
        train_bundle([train], common | {"output_dir": str(plain_dir)}, handlers=[bar])
        plain = score_bundle(evaluate, common | {"output_dir": str(plain_dir)})
        with console.status("finding the noise for this ε ..."):
            bar = PrivacyProgressHandler("with privacy", console)
        train_bundle([train, overlay], common | private | {"output_dir": str(private_dir)}, handlers=[bar, spent])
        protected = score_bundle(evaluate, common | {"output_dir": str(private_dir)})
    result = _summary(source, plain, protected, PrivacyLedger(ledger_file), delta)
    figure = save_training_figure(
        folder / "demo.png",
        scores={
            "without privacy": (plain.labels, plain.values),
            f"ε = {result['epsilon']:.2f}": (protected.labels, protected.values),
        },
        epsilon_by_epoch=spent.values,
        delta=delta,
        title=f"Chest X-ray classification, {kind}; unit of privacy: one {source.unit}",
    )
    (folder / "summary.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
    _show(result, source, folder, figure, ledger_file, console)
    return folder


class _EpsilonByEpoch:
    """Remembers ε after each epoch, as the trainer's metrics have it."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: self.values.append(e.state.metrics[_METRIC]))


def _bundle_folder() -> Path:
    folder = Path(__file__).parents[1] / "bundles" / "chest_xray_classification"
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing: the demo runs from a clone of the repository, not from a wheel.")
    return folder


def _new_folder(output: Path) -> Path:
    # A folder for each run: a model is never overwritten by one with another guarantee.
    name = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for suffix in ("", *(f"_{number}" for number in range(2, 100))):
        folder = output / f"{name}{suffix}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if not output.is_dir():
                raise ValueError(f"{output} is a file, not a folder: name another folder with --output.") from None
            continue
        return folder
    raise ValueError(f"{output} has too many runs of this second: name another folder with --output.")


def _read(data: Path | None, folder: Path, seed: int, console: Console) -> ChestXRaySource:
    if data is None:
        console.print(
            f"No DATA given: writing SYNTHETIC chest X-rays of {_SYNTHETIC_PATIENTS} invented patients (DICOM)."
        )
        data = write_synthetic_chest_xrays(folder / "synthetic", num_patients=_SYNTHETIC_PATIENTS, seed=seed)
    source = read_chest_xrays(data)
    if source.unit == "image":
        console.print(
            f"[bold]{data} has no patient ids: only single images can be protected.[/bold] A patient with several "
            "images is protected less; the report says how much less."
        )
    return source


@contextmanager
def _quiet_logs() -> Iterator[None]:
    # The libraries log each epoch, and tracebacks of errors that the command line tells in one line.
    previous = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(previous)


@contextmanager
def _one_thread() -> Iterator[None]:
    # A patient's few small images are too little work to share: threads would spend their time waiting for each other.
    previous = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


def _summary(
    source: ChestXRaySource, plain: Scores, protected: Scores, ledger: PrivacyLedger, delta: float
) -> dict[str, Any]:
    return {
        "synthetic": source.synthetic,
        "unit": source.unit,
        "auc_without_privacy": plain.metrics["auc"],
        "auc_with_privacy": protected.metrics["auc"],
        "epsilon": ledger.epsilon(delta),
        "delta": delta,
        "test_images": len(plain.labels),
        "plan": dict(ledger.entries[-1].facts),
        "budget": asdict(ledger.budget) if ledger.budget else None,
    }


def _show(
    result: dict[str, Any], source: ChestXRaySource, folder: Path, figure: Path, ledger: Path, console: Console
) -> None:
    kind = "SYNTHETIC images" if source.synthetic else "images"
    title = f"Chest X-rays, normal or pneumonia: {result['test_images']} {kind} of held-out {source.unit}s"
    table = Table(title=title, title_justify="left")
    for heading in ("", "AUC", "ε", "δ", "unit of privacy"):
        table.add_column(heading)
    table.add_row("without privacy", f"{result['auc_without_privacy']:.3f}", "none", "", "")
    table.add_row(
        "with privacy",
        f"{result['auc_with_privacy']:.3f}",
        f"{result['epsilon']:.2f}",
        f"{result['delta']:g}",
        f"one {result['unit']}",
    )
    console.print(table)
    private = folder / "with_privacy"
    places = {
        "report": private / "privacy_report.md",
        "model": private / "model.pt",
        "picture": figure,
        "ledger": ledger,
    }
    for name, path in places.items():
        console.print(f"{name:8} {_short(path)}", soft_wrap=True, highlight=False)


def _short(path: Path) -> str:
    try:
        return os.path.relpath(path) if not os.path.relpath(path).startswith("..") else str(path)
    except ValueError:  # another drive
        return str(path)
