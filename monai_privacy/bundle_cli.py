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
"""``python -m monai_privacy check`` and ``overlay``: bundles that somebody else wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from monai_privacy.ledger_cli import NO

if TYPE_CHECKING:  # torch and MONAI take seconds to import, which the other commands need not wait for
    from monai_privacy.bundle import BundleConfig, BundlePlan

_ALREADY = "this training is private already, by the numbers of its own plan"
_HEADINGS = {
    "refused": "cannot be made private",
    "asked": "only you know",
    "changed": "the overlay changes",
    "unnoised": "leaves without noise",
    "noted": "to be known",
    "private": "private as it is",
}

Bundle = Annotated[list[Path], typer.Argument(help="A bundle's folder, or its config files in the order of merging.")]
Epsilon = Annotated[float, typer.Option(help="The ε to stay below.")]
Delta = Annotated[float | None, typer.Option(help="The δ; 1e-5 or less where not given.")]
Patients = Annotated[int | None, typer.Option(help="Number of patients in training, public; counted where not given.")]
Batch = Annotated[int | None, typer.Option(help="Patients that a step draws on average; a quarter where not given.")]
Norm = Annotated[float, typer.Option(help="The clipping norm.")]
Unit = Annotated[str, typer.Option(help="patient, or image, which protects single images only.")]
Key = Annotated[str, typer.Option(help="Key of the patient's id in the records.")]
Table = Annotated[Path | None, typer.Option(help="A CSV with file and patient_id, where records have no id.")]
Pattern = Annotated[str | None, typer.Option(help="A regular expression whose first group is the id in a file's name.")]
ImageKey = Annotated[str, typer.Option(help="Key of the image's file, for table and pattern.")]
BatchNorm = Annotated[str, typer.Option(help="group: from scratch; fold: keep what it learnt on public data.")]
Weights = Annotated[Path | None, typer.Option(help="For fold: the checkpoint whose statistics you declare public.")]
Sampler = Annotated[str, typer.Option(help="refuse or drop a sampler that draws some records more often.")]
Ledger = Annotated[
    str | None, typer.Option(help="File of the cohort's ledger; in the bundle's folder where not given.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def check(
    bundle: Bundle,
    num_patients: Patients = None,
    unit: Unit = "patient",
    patient_key: Key = "patient_id",
    patient_table: Table = None,
    patient_pattern: Pattern = None,
    image_key: ImageKey = "image",
    batch_norm: BatchNorm = "group",
    public_weights: Weights = None,
    sampler: Sampler = "refuse",
    as_json: AsJson = False,
) -> None:
    """Say what of a bundle is private, what must change and why, and what leaves without noise; nothing is trained.

    Exit code 3 where an overlay alone does not make it private.
    """
    _, plan = _planned(
        bundle,
        num_patients=num_patients,
        unit=unit,
        patient_key=patient_key,
        patient_table=patient_table,
        patient_pattern=patient_pattern,
        image_key=image_key,
        batch_norm=batch_norm,
        public_weights=public_weights,
        sampler=sampler,
    )
    _print_findings(plan, as_json=as_json)
    if plan.obstacles:
        raise typer.Exit(NO)


def overlay(
    bundle: Bundle,
    epsilon: Epsilon = 8.0,
    delta: Delta = None,
    num_patients: Patients = None,
    expected_batch_size: Batch = None,
    max_grad_norm: Norm = 1.0,
    unit: Unit = "patient",
    patient_key: Key = "patient_id",
    patient_table: Table = None,
    patient_pattern: Pattern = None,
    image_key: ImageKey = "image",
    batch_norm: BatchNorm = "group",
    public_weights: Weights = None,
    sampler: Sampler = "refuse",
    ledger: Ledger = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the overlays; that of the configs otherwise.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write the overlays that make a bundle's training private; the bundle itself is not changed.

    Exit code 3, and nothing is written, where an overlay alone does not make it private.
    """
    config, plan = _planned(
        bundle,
        epsilon=epsilon,
        delta=delta,
        num_patients=num_patients,
        expected_batch_size=expected_batch_size,
        max_grad_norm=max_grad_norm,
        unit=unit,
        patient_key=patient_key,
        patient_table=patient_table,
        patient_pattern=patient_pattern,
        image_key=image_key,
        batch_norm=batch_norm,
        public_weights=public_weights,
        sampler=sampler,
        ledger=ledger,
    )
    if plan.obstacles or not plan.training:
        _print_findings(plan, as_json=as_json)
        if plan.obstacles:
            raise typer.Exit(NO)
        return
    from monai_privacy.bundle import write_overlays

    paths = write_overlays(plan, config, output or config.files[0].parent)
    if as_json:
        print(json.dumps([str(path) for path in paths]))
        return
    for path in paths:
        print(path)
    print(f"ledger: {plan.training['privacy']['ledger_file']}")
    names = "', '".join(str(path) for path in (*config.files, paths[0]))
    print(f"\npython -m monai.bundle run --config_file \"['{names}']\"")
    if len(paths) > 1:
        print(f"evaluation, inference and ckpt_export: name {paths[1]} after their configs")
    for one in plan.findings:
        if one.network and one.verdict == "noted":
            print(f"{one.where or 'bundle'}: {one.what}. {one.remedy}.")


def _planned(bundle: list[Path], **wishes: Any) -> tuple[BundleConfig, BundlePlan]:
    from monai_privacy.bundle import PrivacyRequest, plan_bundle, read_bundle

    request = PrivacyRequest(**wishes)
    config = read_bundle(bundle)
    return config, plan_bundle(config, request)


def _print_findings(plan: BundlePlan, *, as_json: bool) -> None:
    if as_json:
        findings = [
            {"verdict": one.verdict, "where": one.where, "what": one.what, "remedy": one.remedy}
            for one in plan.findings
        ]
        print(json.dumps({"private_by_overlay": not plan.obstacles, "findings": findings}, ensure_ascii=False))
        return
    console = Console(soft_wrap=True, highlight=False)
    for verdict, heading in _HEADINGS.items():
        found = [finding for finding in plan.findings if finding.verdict == verdict]
        if found:
            console.print(f"[bold]{heading}[/bold]")
        for finding in found:
            remedy = f". {finding.remedy.rstrip('.')}." if finding.remedy else ""
            console.print(escape(f"  {finding.where or 'bundle'}: {finding.what}{remedy}"))
    number = len(plan.obstacles)
    console.print(
        ("An overlay makes this training private: python -m monai_privacy overlay" if plan.training else _ALREADY)
        if number == 0
        else f"{number} {'thing keeps' if number == 1 else 'things keep'} this training from being private by an overlay"
    )
