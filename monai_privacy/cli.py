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
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from monai_privacy import __version__
from monai_privacy.accounting import LedgerState, PrivacyBudget, calibrate_batch_size, calibrate_steps
from monai_privacy.bundle_cli import check, overlay
from monai_privacy.errors import user_message
from monai_privacy.ledger_cli import NO
from monai_privacy.ledger_cli import app as ledger_app
from monai_privacy.pate_cli import app as pate_app
from monai_privacy.plan import DPSGDPlan
from monai_privacy.report import PrivacyReport, rounded_up
from monai_privacy.report.verification import differences, read_report

# Exit codes that a script can tell apart: 1 is a fault of the program, 2 is bad input (typer's own choice as well), 3 a
# question that was answered with no.
_BAD_INPUT = 2

app = typer.Typer(
    help="Patient-level differential privacy for MONAI.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(ledger_app, name="ledger")
app.add_typer(pate_app, name="pate")
app.command()(check)
app.command()(overlay)

Patients = Annotated[int, typer.Option(help="Number of patients in training; public.")]
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
    expected_batch_size: Annotated[
        int | None, typer.Option(help="Patients that a step draws on average; the largest that fits where not given.")
    ] = None,
    epsilon: Annotated[float, typer.Option(help="The ε to stay below.")] = 3.0,
    delta: Delta = 1e-5,
    steps: Annotated[int | None, typer.Option(help="Number of steps; the most that fit where not given.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Number of epochs, instead of --steps.")] = None,
    noise_multiplier: Annotated[float | None, typer.Option(help="Noise; the least that fits where not given.")] = None,
    as_json: AsJson = False,
) -> None:
    """Find the one number that is left out, noise, steps or batch size, for a target ε."""
    if steps is not None and epochs is not None:
        raise ValueError(f"steps is {steps} and epochs is {epochs}: give one of them.")
    if epochs is not None:
        if expected_batch_size is None:
            raise ValueError(
                f"epochs is {epochs}, but how many steps that is hangs on --expected-batch-size: give it too."
            )
        steps = DPSGDPlan.for_epochs(
            num_patients=num_patients, expected_batch_size=expected_batch_size, epochs=epochs, delta=delta
        ).steps
    missing = [
        name
        for name, value in (
            ("--steps", steps), ("--expected-batch-size", expected_batch_size), ("--noise-multiplier", noise_multiplier)
        )
        if value is None
    ]  # fmt: skip
    if len(missing) != 1:
        raise ValueError(
            f"{' and '.join(missing) or 'nothing'} left out: exactly one number can be found. Give two of --steps (or "
            "--epochs), --expected-batch-size and --noise-multiplier."
        )
    if expected_batch_size is None:
        expected_batch_size = calibrate_batch_size(
            epsilon=epsilon,
            delta=delta,
            num_patients=num_patients,
            noise_multiplier=noise_multiplier or 0.0,
            steps=steps or 0,
        )
    one = DPSGDPlan(num_patients=num_patients, expected_batch_size=expected_batch_size, steps=steps or 1, delta=delta)
    if steps is None:
        steps = calibrate_steps(
            epsilon=epsilon, delta=delta, sample_rate=one.sample_rate, noise_multiplier=noise_multiplier or 0.0
        )
    plan = replace(one, steps=steps, noise_multiplier=noise_multiplier)
    if noise_multiplier is None:
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
    ledger: Annotated[Path, typer.Argument(help="The ledger file of a cohort.")],
    output: Annotated[
        Path | None, typer.Option(help="A folder for privacy_report.json, .md and .html, instead of printing.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What a ledger allows to claim, recomputed."""
    made = PrivacyReport.from_ledger(ledger)
    if output is None:
        print(made.to_json() if as_json else made.to_markdown())
        return
    paths = [str(path) for path in made.write(output)]
    print(json.dumps(paths) if as_json else "\n".join(paths))


@app.command()
def verify(
    report_file: Annotated[Path, typer.Argument(metavar="REPORT", help="A privacy_report.json.")],
    ledger: Annotated[Path, typer.Argument(help="The ledger that it was made from.")],
    as_json: AsJson = False,
) -> None:
    """Recompute a report from its ledger; exit code 3 where it says anything else."""
    found = differences(report_file, ledger)
    made, now = read_report(report_file)["ledger_lines"], LedgerState.of_file(ledger).lines
    since = f", as of line {made}: {now - made} lines were added since" if now > made else ""
    if as_json:
        print(json.dumps({"same": not found, "differences": found, "lines_since": now - made}, ensure_ascii=False))
    elif found:
        print("\n".join(found))
    else:
        print(f"{report_file} says what {ledger} gives{since}")
    if found:
        raise typer.Exit(NO)


@app.command()
def prepare(
    data: Annotated[
        Path,
        typer.Argument(
            help="Where the images lie: chest X-rays (see the demo's --data), or a folder of CT with a CSV."
        ),
    ],
    folder: Annotated[Path, typer.Argument(help="The bundle's dataset_dir: datalist.json is written into it.")],
    ct: Annotated[bool, typer.Option("--ct", help="CT volumes: DICOM series or NIfTI, and one CSV.")] = False,
    label_column: Annotated[str | None, typer.Option(help="With --ct: the CSV's column of labels, 0 or 1.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="With --ct: stop at the first unreadable file.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the split by patient.")] = 0,
    test_fraction: Annotated[float, typer.Option(help="Share of the patients for testing.")] = 0.2,
    validation_fraction: Annotated[float, typer.Option(help="Share of the patients for validation.")] = 0.1,
) -> None:
    """Read chest X-rays or CT volumes and write the datalist of a bundle, split by patient."""
    _require_exists(data)
    if not ct and (strict or label_column is not None):
        raise ValueError("--strict and --label-column go with --ct: add it, or leave them out.")
    from monai_privacy.data import read_chest_xrays, read_ct_volumes, write_datalist

    source = read_ct_volumes(data, label_column=label_column, strict=strict) if ct else read_chest_xrays(data)
    for notice in source.notices:
        print(f"notice: {notice}", file=sys.stderr)
    path = write_datalist(
        source, folder, seed=seed, test_fraction=test_fraction, validation_fraction=validation_fraction
    )
    counts = json.loads(path.read_text(encoding="utf-8"))["num_patients"]
    shares = ", ".join(f"{count} for {name}" for name, count in counts.items())
    kind = ("SYNTHETIC " if source.synthetic else "") + ("volumes" if ct else "images")
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
