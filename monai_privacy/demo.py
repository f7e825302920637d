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
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from ignite.engine import Engine, Events
from rich.console import Console
from rich.table import Table

from monai_privacy.accounting import PrivacyBudget, PrivacyLedger
from monai_privacy.accounting.values import checked_count
from monai_privacy.bundle import Scores, score_bundle, train_bundle
from monai_privacy.data import ImageSource, read_chest_xrays, write_datalist, write_synthetic_chest_xrays
from monai_privacy.figures import save_training_figure
from monai_privacy.handlers import PrivacyProgressHandler
from monai_privacy.plan import DPSGDPlan
from monai_privacy.report import rounded_up

_SYNTHETIC_PATIENTS = 600
_METRIC = "epsilon"
_PRIVATE, _PLAIN = "with privacy", "without privacy"


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
        delta: δ of the guarantee, below 1 / number of training patients.
        output: a folder for this run is made in it.
        epochs: in place of the bundle's own number.
        expected_batch_size: in place of the overlay's share of the patients.
        ledger: a standing ledger of these patients; one for this run alone where None.
        seed: of the split by patient and of the initial weights, never of sampling or noise.
        console: where to tell how it goes.

    Returns:
        The folder of this run.

    Raises:
        ValueError: for bad data or numbers, before training; no folder is left then.
    """
    budget = PrivacyBudget(epsilon, delta)  # bad numbers are refused before any work
    changes: dict[str, Any] = {"seed": seed} | ({} if epochs is None else {"epochs": checked_count("epochs", epochs)})
    private: dict[str, Any] = {"epsilon": budget.epsilon, "delta": budget.delta}
    private |= {} if expected_batch_size is None else {"expected_batch_size": expected_batch_size}
    _bundle_folder()
    given = None if data is None else _read(data, console)
    with _quiet_logs(), _one_thread(), _RunFolder(output) as run:
        source = given or _read(_write_synthetic(run.path, seed, console), console)
        _check_numbers(write_datalist(source, run.path, seed=seed), source.unit, delta, expected_batch_size)
        changes["dataset_dir"] = str(run.path)
        ledger_file = ledger or run.path / "ledger.jsonl"
        private |= {"unit": source.unit, "ledger_file": str(ledger_file)}
        console.print(
            f"Training on {_kind(source)}, first with privacy (ε {epsilon:g}, δ {delta:g}), then without. Finding the "
            "noise takes some seconds ...",
            soft_wrap=True,
        )
        spent = _EpsilonByEpoch()
        # The private one first: it refuses what it cannot do, such as a spent ledger, before time went into the other.
        protected = _train(run.path, _PRIVATE, changes | private, console, handlers=[run, spent])
        plain = _train(run.path, _PLAIN, changes, console)
    result = _summary(source, plain, protected, PrivacyLedger(ledger_file), delta)
    figure = save_training_figure(
        run.path / "demo.png",
        scores={
            _PLAIN: (plain.labels, plain.values),
            f"ε = {rounded_up(result['epsilon'], 2)}": (protected.labels, protected.values),
        },
        epsilon_by_epoch=spent.values,
        delta=delta,
        title=f"Chest X-ray classification, {_kind(source)}; unit of privacy: one {source.unit}",
    )
    (run.path / "summary.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
    _show(result, source, run.path, figure, ledger_file, console)
    return run.path


class _RunFolder:
    """A new folder for one run; what fails before the training of an engine it is attached to leaves nothing of it."""

    def __init__(self, output: Path) -> None:
        self._output = output
        self._kept = False

    def __enter__(self) -> _RunFolder:
        parents = (self._output, *self._output.parents)
        self._made = [folder for folder in parents if not folder.exists()]
        self.path = _new_folder(self._output)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or self._kept:
            return
        shutil.rmtree(self.path, ignore_errors=True)
        with suppress(OSError):  # somebody else has put something there
            for folder in self._made:
                folder.rmdir()

    def attach(self, engine: Engine) -> None:
        # After the trainer's own handler, which refuses: from here on the ledger in this folder counts releases.
        engine.add_event_handler(Events.EPOCH_STARTED, self._keep)

    def _keep(self, engine: Engine) -> None:
        self._kept = True


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


def _write_synthetic(folder: Path, seed: int, console: Console) -> Path:
    console.print(f"No DATA given: writing SYNTHETIC chest X-rays of {_SYNTHETIC_PATIENTS} invented patients (DICOM).")
    return write_synthetic_chest_xrays(folder / "synthetic", num_patients=_SYNTHETIC_PATIENTS, seed=seed)


def _read(data: Path, console: Console) -> ImageSource:
    source = read_chest_xrays(data)
    if source.unit == "image":
        console.print(
            f"[bold]{data} has no patient ids: only single images can be protected.[/bold] A patient with several "
            "images is protected less; the report says how much less."
        )
    return source


def _kind(source: ImageSource) -> str:
    return "SYNTHETIC images" if source.synthetic else "images"


def _check_numbers(datalist: Path, unit: str, delta: float, expected_batch_size: int | None) -> None:
    """Refuse, before a ledger is opened, what the plan of the training would refuse, and a δ that protects nobody."""
    num_patients = json.loads(datalist.read_text(encoding="utf-8"))["num_patients"]["training"]
    if delta >= 1 / num_patients:
        raise ValueError(
            f"delta is {delta:g}, at or above 1 / {num_patients} {unit}s in training: publishing one {unit} whole could "
            f"meet it, so nobody would be protected. Take --delta well below {1 / num_patients:.1g}."
        )
    size = 1 if expected_batch_size is None else expected_batch_size
    DPSGDPlan(num_patients=num_patients, expected_batch_size=size, steps=1, delta=delta, unit=unit)


def _train(
    folder: Path, name: str, changes: Mapping[str, Any], console: Console, *, handlers: Sequence[Any] = ()
) -> Scores:
    """Train the bundle into a folder of that name, privately under the name for it, and measure the test patients."""
    bundle = _bundle_folder()
    train, evaluate = bundle / "configs" / "train.yaml", bundle / "configs" / "evaluate.yaml"
    overlays = [bundle.parent / "overlays" / "dp_sgd.yaml"] if name == _PRIVATE else []
    places = {"bundle_root": str(bundle), "output_dir": str(folder / name.replace(" ", "_"))}
    bar = PrivacyProgressHandler(name, console)
    train_bundle([train, *overlays], {**changes, **places}, handlers=[bar, *handlers])
    return score_bundle([train, evaluate], {**changes, **places})


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
    # A small network on small images is too little work to share: threads wait for each other, and far longer where
    # other programs run (measured on two cores: 15 s in one thread, 29 s in two).
    previous = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


def _summary(
    source: ImageSource, plain: Scores, protected: Scores, ledger: PrivacyLedger, delta: float
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
    result: dict[str, Any], source: ImageSource, folder: Path, figure: Path, ledger: Path, console: Console
) -> None:
    # Not the table's own title: it is broken at the table's width.
    tested = f"{result['test_images']} {_kind(source)} of held-out {source.unit}s"
    console.print(f"Chest X-rays, normal or pneumonia: {tested}", soft_wrap=True)
    table = Table()
    for heading in ("", "AUC", "ε", "δ", "unit of privacy"):
        table.add_column(heading)
    table.add_row(_PLAIN, f"{result['auc_without_privacy']:.3f}", "none", "", "")
    table.add_row(
        _PRIVATE,
        f"{result['auc_with_privacy']:.3f}",
        rounded_up(result["epsilon"], 2),
        f"{result['delta']:g}",
        f"one {result['unit']}",
    )
    console.print(table)
    private = folder / _PRIVATE.replace(" ", "_")
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
