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

"""The command line: ``python -m monai_privacy --help``."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from monai_privacy import __version__
from monai_privacy.accounting import PrivacyBudget
from monai_privacy.errors import user_message
from monai_privacy.plan import DPSGDPlan
from monai_privacy.report import PrivacyReport, rounded_up

# Exit codes that a script can tell apart: 1 is a fault of the program, 2 is bad input (typer's own choice as well).
_BAD_INPUT = 2

app = typer.Typer(
    help="Patient-level differential privacy for MONAI.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Patients = Annotated[int, typer.Option(help="Number of patients in training; public.")]
BatchSize = Annotated[int, typer.Option(help="Patients that a step draws on average.")]
Delta = Annotated[float, typer.Option(help="The δ of the guarantee, well below 1 / number of patients.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"monai-privacy {__version__}")
        raise typer.Exit


@app.command()
def calibrate(
    num_patients: Patients,
    expected_batch_size: BatchSize,
    epsilon: Annotated[float, typer.Option(help="The ε to stay below.")],
    delta: Delta = 1e-5,
    steps: Annotated[int | None, typer.Option(help="Number of steps; or give --epochs.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Number of epochs; or give --steps.")] = None,
    as_json: AsJson = False,
) -> None:
    """The noise that a training needs for a target ε."""
    if (steps is None) == (epochs is None):
        raise ValueError(f"steps is {steps} and epochs is {epochs}: exactly one is needed. Give --steps or --epochs.")
    if steps is not None:
        plan = DPSGDPlan(num_patients=num_patients, expected_batch_size=expected_batch_size, steps=steps, delta=delta)
    else:
        plan = DPSGDPlan.for_epochs(
            num_patients=num_patients, expected_batch_size=expected_batch_size, epochs=epochs or 0, delta=delta
        )
    plan = plan.calibrate(epsilon=epsilon)
    if as_json:
        print(json.dumps(plan.to_dict() | {"epsilon": plan.epsilon()}))
        return
    print(
        f"noise_multiplier {plan.noise_multiplier:g} for {plan.steps} steps of {plan.expected_batch_size} of "
        f"{plan.num_patients} patients: ε = {rounded_up(plan.epsilon(), 4)} at δ = {plan.delta:g}"
    )


@app.command()
def report(
    ledger: Annotated[Path, typer.Argument(help="The ledger file of a training.")],
    as_json: AsJson = False,
) -> None:
    """What a ledger allows to claim, recomputed."""
    made = PrivacyReport.from_ledger(ledger)
    print(made.to_json() if as_json else made.to_markdown())


@app.command()
def prepare(
    data: Annotated[Path, typer.Argument(help="Where the chest X-rays lie; see the demo's --data for the layouts.")],
    folder: Annotated[Path, typer.Argument(help="The bundle's dataset_dir: datalist.json is written into it.")],
    seed: Annotated[int, typer.Option(help="Seed of the split by patient.")] = 0,
    test_fraction: Annotated[float, typer.Option(help="Share of the patients for testing.")] = 0.2,
    validation_fraction: Annotated[float, typer.Option(help="Share of the patients for validation.")] = 0.1,
) -> None:
    """Read chest X-rays and write the datalist of a bundle, split by patient."""
    _require_exists(data)
    from monai_privacy.data import read_chest_xrays, write_datalist

    source = read_chest_xrays(data)
    path = write_datalist(
        source, folder, seed=seed, test_fraction=test_fraction, validation_fraction=validation_fraction
    )
    counts = json.loads(path.read_text(encoding="utf-8"))["num_patients"]
    shares = ", ".join(f"{count} for {name}" for name, count in counts.items())
    kind = "SYNTHETIC images" if source.synthetic else "images"
    print(f"{path}: {len(source.records)} {kind}; {source.unit}s: {shares}")
    if source.unit == "image":
        print("warning: no patient ids, so only single images can be protected: --unit image", file=sys.stderr)


@app.command()
def demo(
    data: Annotated[
        Path | None,
        typer.Option(
            help="Chest X-rays: the Kermany folder as downloaded, a MedMNIST or benchmark .npz, or a folder of DICOM "
            "files with a CSV of labels. Synthetic ones are made where none is given."
        ),
    ] = None,
    epsilon: Annotated[float, typer.Option(help="The ε to stay below.")] = 3.0,
    delta: Delta = 1e-5,
    output: Annotated[Path, typer.Option(help="Folder for models, report and picture.")] = Path("demo_output"),
    epochs: Annotated[int | None, typer.Option(help="Epochs; the bundle's own number where not given.")] = None,
    expected_batch_size: Annotated[
        int | None, typer.Option(help="Patients that a step draws on average; 28 % of them where not given.")
    ] = None,
    ledger: Annotated[Path | None, typer.Option(help="A standing ledger of these patients.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the split by patient and of the initial weights.")] = 0,
) -> None:
    """Train the chest X-ray bundle with and without privacy, and compare."""
    PrivacyBudget(epsilon, delta)
    if data is not None:
        _require_exists(data)
    from monai_privacy.demo import run_demo

    run_demo(
        data=data,
        epsilon=epsilon,
        delta=delta,
        output=output,
        epochs=epochs,
        expected_batch_size=expected_batch_size,
        ledger=ledger,
        seed=seed,
        console=Console(),
    )


def _require_exists(data: Path) -> None:
    # The readers would say so too, but only after torch and MONAI took seconds to import.
    if not data.expanduser().exists():
        raise FileNotFoundError(f"{data} does not exist. Check the path, and download or mount the data first.")


def main() -> None:
    """Run the command line; bad input gives one line on the error output and exit code 2."""
    # A user reads our own warnings as one line, and not those of the libraries below us.
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", module=r"monai_privacy\..*")
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    try:
        app()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        message = user_message(error)
        if message is None or os.environ.get("MONAI_PRIVACY_DEBUG"):
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(_BAD_INPUT)


def _show_warning(message: Warning | str, *_: object) -> None:
    print(f"warning: {message}", file=sys.stderr)
