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


"""``python -m monai_privacy pate``: private labels by the vote of teachers."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from monai_privacy.ledger_cli import NO
from monai_privacy.pate import PlanAdvice, VotingPlan, label_agreement, planning
from monai_privacy.pate.planning import counted, multiples, percent
from monai_privacy.report.numbers import rounded_up

app = typer.Typer(help="Label public images by a private vote of the hospitals' teachers.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]

# e^20 is 500 million to one.
_WEAK_EPSILON = 20
_BAR = 40
_EIGHTHS = " ▏▎▍▌▋▊▉"


@app.callback()
def _group() -> None:
    # typer would drop the name of a command that is the only one.
    pass


@app.command()
def plan(
    teachers: Annotated[int, typer.Option(help="Teachers that vote, on disjoint patients.")],
    queries: Annotated[int, typer.Option(help="Images to be labelled.")],
    epsilon: Annotated[float, typer.Option(help="The ε that all labels together may cost a patient.")],
    classes: Annotated[int, typer.Option(help="Classes to vote for.")] = 2,
    delta: Annotated[float, typer.Option(help="The δ of it, well below 1 / number of patients.")] = 1e-5,
    teachers_per_patient: Annotated[int, typer.Option(help="Most teachers that saw one patient.")] = 1,
    agreement: Annotated[float, typer.Option(help="Assumed share of the teachers that give the same label.")] = 0.9,
    target: Annotated[float, typer.Option(help="Share of the labels that ought to be the teachers'.")] = 0.9,
    hospitals: Annotated[
        int | None, typer.Option(help="Hospitals that share the teachers; one each where not given.")
    ] = None,
    allow_uninformative: Annotated[
        bool, typer.Option("--allow-uninformative", help="Accept labels that teach a student little.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="A PNG of label accuracy against ε, instead of bars.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say how good labels by a vote of teachers would be, before anybody trains; exit code 3 where they are no use."""
    vote = VotingPlan(
        num_teachers=teachers, num_queries=queries, num_classes=classes, epsilon=epsilon, delta=delta,
        teachers_per_patient=teachers_per_patient,
    )  # fmt: skip
    found = planning.advice(vote, hospitals=hospitals, agreement=agreement, target=target)
    if plot is not None:
        # matplotlib takes a second to import, which the numbers need not wait for.
        from monai_privacy.pate.pictures import save_plan_figure

        plot = save_plan_figure(plot, found)
    overridden = allow_uninformative and not found.informative
    if as_json:
        print(json.dumps(found.to_dict() | {"overridden": overridden, "plot": plot and str(plot)}, ensure_ascii=False))
    else:
        _print_advice(found, plot)
    if found.refusal is None:
        return
    if overridden:
        line = "overridden by --allow-uninformative: a student learns little from these labels"
        print(line, file=sys.stderr if as_json else sys.stdout)
        return
    if not as_json:
        print(f"refused: {found.refusal} --allow-uninformative overrides.")
    raise typer.Exit(NO)


def _print_advice(found: PlanAdvice, plot: Path | None) -> None:
    vote = found.plan
    console = Console(highlight=False, markup=False, soft_wrap=True)
    shared = f" in {counted(found.hospitals, 'hospital')}" if found.hospitals != vote.num_teachers else ""
    console.print(
        f"{counted(vote.num_teachers, 'teacher')}{shared}, {counted(vote.num_queries, 'query')}, {vote.num_classes} "
        f"classes: ε = {vote.epsilon:g} at δ = {vote.delta:g} for a patient in at most "
        f"{counted(vote.teachers_per_patient, 'teacher')}"
    )
    console.print(f"noise on each count: standard deviation {rounded_up(vote.noise_std, 2)} votes (GNMax)\n")
    if plot is None:
        console.print(_bars("teachers agree", [(percent(share), value) for share, value in found.table]))
        console.print(f"\nwhere {percent(found.agreement)} of the teachers agree, by their number:\n")
        console.print(_bars("teachers", _by_number(found)))
    else:
        console.print(f"{plot}: label accuracy against ε")
    console.print(
        f"\nwhere {percent(found.agreement)} of the teachers agree, {percent(found.label_accuracy)} of the labels would be "
        f"theirs. {percent(found.target)} would take one of:"
    )
    for line in _ways(found):
        console.print(f"  {line}")
    for line in found.alternatives:
        console.print(f"\n{line}")
    if not found.informative:
        console.print()


def _by_number(found: PlanAdvice) -> list[tuple[str, float]]:
    return [
        (str(number), label_agreement(replace(found.plan, num_teachers=number), found.agreement))
        for _, number in multiples(found.plan)
    ]


def _ways(found: PlanAdvice) -> list[str]:
    """What would reach the target, the plan's other numbers unchanged."""
    ways = []
    if found.teachers_needed is not None:
        each = f"{found.sub_teachers_per_hospital} for each of {counted(found.hospitals, 'hospital')}"
        ways.append(f"{counted(found.teachers_needed, 'teacher')}, {each}")
    if found.queries_affordable is not None:
        ways.append(counted(found.queries_affordable, "query"))
    if found.epsilon_needed is not None:
        weak = ", which protects hardly anybody" if found.epsilon_needed > _WEAK_EPSILON else ""
        ways.append(f"ε = {rounded_up(found.epsilon_needed, 2)}{weak}")
    return ways or ["nothing within the limits of a plan"]


def _bars(heading: str, rows: list[tuple[str, float]]) -> Table:
    """One bar a row, from nothing to all labels."""
    table = Table(box=None, pad_edge=False)
    table.add_column(heading, justify="right")
    table.add_column("labels as they said", justify="right")
    table.add_column("")
    for name, share in rows:
        whole, rest = divmod(int(share * _BAR * 8), 8)
        table.add_row(name, percent(share), ("█" * whole + _EIGHTHS[rest]).rstrip())
    return table
