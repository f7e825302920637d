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
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from monai_privacy.ledger_cli import NO
from monai_privacy.pate import PlanAdvice, VotingPlan, label_agreement, planning
from monai_privacy.pate.planning import counted, multiples, percent
from monai_privacy.report.numbers import rounded_up

app = typer.Typer(help="Label public images by a private vote of the hospitals' teachers.", no_args_is_help=True)

KeyFile = Annotated[
    Path | None, typer.Option(help="File of the key that the patients were divided with; beside the shards otherwise.")
]
Uninformative = Annotated[
    bool, typer.Option("--allow-uninformative", help="Go on where a student would learn little from the labels.")
]
Epsilon = Annotated[float, typer.Option(help="The ε that all labels together may cost a patient.")]
Delta = Annotated[float, typer.Option(help="The δ of it, well below 1 / number of patients.")]
PerPatient = Annotated[int, typer.Option(help="Most teachers that saw one patient.")]
Classes = Annotated[int, typer.Option(help="Classes to vote for.")]
Configs = Annotated[list[str] | None, typer.Option(help="Config file, and overlays after it, relative to the bundle.")]
Overrides = Annotated[
    list[str] | None, typer.Option(help="Further config entries, as name=value, such as dataset_dir=<folder>.")
]
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
    epsilon: Epsilon,
    classes: Classes = 2,
    delta: Delta = 1e-5,
    teachers_per_patient: PerPatient = 1,
    agreement: Annotated[float, typer.Option(help="Assumed share of the teachers that give the same label.")] = 0.9,
    target: Annotated[float, typer.Option(help="Share of the labels that ought to be the teachers'.")] = 0.9,
    hospitals: Annotated[
        int | None, typer.Option(help="Hospitals that share the teachers; one each where not given.")
    ] = None,
    allow_uninformative: Uninformative = False,
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


@app.command()
def partition(
    datalist: Annotated[Path, typer.Argument(help="The datalist.json of the prepared images.")],
    output: Annotated[Path, typer.Argument(help="Folder for the shards.")],
    teachers: Annotated[int, typer.Option(help="Teachers; of each hospital where --hospital-key is given.")],
    key_file: Annotated[
        Path | None, typer.Option(help="File of the secret key, made where missing; beside the shards otherwise.")
    ] = None,
    hospital_key: Annotated[str | None, typer.Option(help="Entry of a record that names its hospital.")] = None,
    teachers_per_patient: Annotated[int, typer.Option(help="Most teachers that one patient may be in.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Divide the training patients among teachers, each whole and by a keyed hash of its id alone."""
    from monai_privacy.pate.steps import key_from_file
    from monai_privacy.pate.training import write_shards

    output.mkdir(parents=True, exist_ok=True)
    key_path = key_file or output / "partition.key"
    made = write_shards(
        datalist, output, teachers, key=key_from_file(key_path, make=True),
        teachers_per_patient=teachers_per_patient, hospital_key=hospital_key,
    )  # fmt: skip
    sizes = sorted(len(rows) for rows in made.rows)
    found = {
        "teachers": made.num_teachers,
        "hospitals": list(made.hospitals),
        "images_per_teacher": [sizes[0], sizes[len(sizes) // 2], sizes[-1]],
        "empty": list(made.empty_teachers),
        "folder": str(output),
        "key": str(key_path),
    }
    if as_json:
        print(json.dumps(found))
        return
    print(
        f"{output}: {made.num_teachers} teachers, {sizes[0]} to {sizes[-1]} images each, {sizes[len(sizes) // 2]} median"
    )
    if made.empty_teachers:
        print(f"{counted(len(made.empty_teachers), 'teacher')} without images: they vote for a fixed class")
    print(f"{key_path}: the key. Keep it secret: with it, anybody can tell whether a known patient is in")


@app.command()
def train_teachers(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle that each teacher is trained by.")],
    shards: Annotated[Path, typer.Argument(help="Folder of the shards, from partition.")],
    output: Annotated[Path, typer.Argument(help="Folder for the teachers.")],
    config: Configs = None,
    override: Overrides = None,
    data_key: Annotated[str, typer.Option(help="Config entry for the folder with a datalist.json.")] = "dataset_dir",
    output_key: Annotated[str, typer.Option(help="Config entry for the folder of results.")] = "output_dir",
    checkpoint: Annotated[str, typer.Option(help="The file that a training leaves there.")] = "model.pt",
    key_file: KeyFile = None,
    workers: Annotated[
        int | None, typer.Option(help="Trainings side by side; as many as fit the memory otherwise.")
    ] = None,
) -> None:
    """Train a teacher on each shard; those already trained are kept, so that it can be stopped and begun again."""
    from monai_privacy.data.partition_manifest import read_manifest
    from monai_privacy.pate.steps import key_from_file
    from monai_privacy.pate.training import MANIFEST, TeacherRecipe, train_teachers

    recipe = TeacherRecipe(
        bundle.absolute(), tuple(config or ["configs/train.yaml"]), data_key, output_key, checkpoint,
        tuple(sorted(_overrides(override).items())),
    )  # fmt: skip
    manifest = read_manifest(shards / MANIFEST, key_from_file(key_file or shards / "partition.key"))
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("teachers", total=manifest.num_teachers)
        found = train_teachers(
            recipe, manifest, shards, output, workers=workers,
            on_done=lambda done, total: progress.update(task, completed=done, total=total),
        )  # fmt: skip
    print(f"{output}: {counted(len(found), 'teacher')}, SHA-256 {found.digest[:16]}")


@app.command()
def vote(
    bundle: Annotated[Path, typer.Argument(help="Folder of the teachers' bundle.")],
    teachers: Annotated[Path, typer.Argument(help="Folder of the teachers.")],
    output: Annotated[Path, typer.Argument(help="File for the votes, which are private.")],
    hospital: Annotated[str, typer.Option(help="Name of the hospital that these teachers are of.")],
    classes: Classes = 2,
    config: Configs = None,
    override: Overrides = None,
) -> None:
    """Let a hospital's teachers vote on images, and write their votes to a file; teachers never leave the hospital."""
    from monai_privacy.pate.hospital_votes import write_hospital_votes
    from monai_privacy.pate.steps import hospital_votes_of
    from monai_privacy.pate.teachers import TeacherSet

    changes = _overrides(override)
    group = TeacherSet.from_folder(teachers)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("teachers", total=len(group))
        found, files = hospital_votes_of(
            bundle.absolute(), group, hospital=hospital, num_classes=classes,
            config_files=tuple(config or ["configs/inference.yaml"]), overrides=changes,
            on_teacher=lambda _: progress.advance(task),
        )  # fmt: skip
    write_hospital_votes(found, output)
    queries = output.with_suffix(".queries.json")
    queries.write_text(json.dumps(dict(zip(found.queries, files, strict=True)), indent=1) + "\n", encoding="utf-8")
    asked = f"{counted(len(found.queries), 'query')} by {counted(len(group), 'teacher')}"
    print(f"{output}: {asked}; PRIVATE: for the aggregator alone")
    print(f"{queries}: which file is which query")


@app.command()
def label(
    votes: Annotated[list[Path], typer.Argument(help="A file of votes from each hospital.")],
    ledger: Annotated[Path, typer.Option(help="Ledger of the hospitals' patients.")],
    output: Annotated[Path, typer.Option(help="CSV for the labels.")],
    epsilon: Epsilon,
    delta: Delta = 1e-5,
    answers: Annotated[
        Path | None, typer.Option(help="File that remembers answers; beside the ledger otherwise.")
    ] = None,
    max_queries: Annotated[
        int | None, typer.Option(help="Queries that the noise is for; these where not given.")
    ] = None,
    teachers_per_patient: PerPatient = 1,
    num_patients: Annotated[int | None, typer.Option(help="Patients behind all teachers, for the report.")] = None,
    queries: Annotated[Path | None, typer.Option(help="The .queries.json that names the files.")] = None,
    purpose: Annotated[str, typer.Option(help="Who asks and why, for the report.")] = "",
    allow_uninformative: Uninformative = False,
    as_json: AsJson = False,
) -> None:
    """Add up the hospitals' votes and release noisy labels, charged to the ledger before they are drawn."""
    from monai_privacy.accounting import PrivacyLedger
    from monai_privacy.pate.hospital_votes import read_hospital_votes
    from monai_privacy.pate.steps import label_votes, write_labels

    names = {} if queries is None else _query_files(queries)
    book = PrivacyLedger(ledger)
    asked, found, vote = label_votes(
        [read_hospital_votes(path) for path in votes], book, answers or ledger.with_suffix(".answers.jsonl"),
        epsilon=epsilon, delta=delta, teachers_per_patient=teachers_per_patient, max_queries=max_queries,
        allow_uninformative=allow_uninformative, num_patients=num_patients, purpose=purpose,
    )  # fmt: skip
    write_labels(output, asked, found, names)
    numbers = {
        "answered": found.answered, "abstained": found.abstained, "repeated": found.repeated,
        "unaffordable": found.unaffordable, "noise_std": vote.noise_std, "epsilon": book.epsilon(delta), "delta": delta,
    }  # fmt: skip
    if as_json:
        print(json.dumps(numbers | {"output": str(output)}))
        return
    print(f"{output}: {found.answered} of {len(asked)} labelled, {found.repeated} of them known from before")
    print(f"ε of everything on {ledger}: {rounded_up(numbers['epsilon'], 4)} at δ = {delta:g}")


@app.command()
def bound(
    votes: Annotated[list[Path], typer.Argument(help="The files of votes that were labelled.")],
    ledger: Annotated[Path, typer.Option(help="Ledger of the hospitals' patients.")],
    output: Annotated[Path, typer.Option(help="JSON file for the bound.")],
    answers: Annotated[
        Path | None, typer.Option(help="File that remembers answers; beside the ledger otherwise.")
    ] = None,
    agreement: Annotated[
        float, typer.Option(help="Share of the teachers expected to agree, before anybody looked at the votes.")
    ] = 0.9,
    purpose: Annotated[str, typer.Option(help="Who asks and why, for the report.")] = "",
    as_json: AsJson = False,
) -> None:
    """Publish, with noise and charged to the ledger, what the labels cost at the votes there were (data-dependent ε)."""
    from monai_privacy.accounting import PrivacyLedger
    from monai_privacy.pate.hospital_votes import read_hospital_votes, teachers_digest, total_votes
    from monai_privacy.pate.vote_bound_release import release_vote_bound

    if not ledger.exists():
        raise ValueError(f"{ledger} does not exist: name the ledger that the labels were charged to.")
    hospitals = [read_hospital_votes(path) for path in votes]
    queries, counts, _ = total_votes(hospitals)
    book = PrivacyLedger(ledger)
    found = release_vote_bound(
        queries, counts, book, answers or ledger.with_suffix(".answers.jsonl"), output,
        teachers=teachers_digest(hospitals), agreement=agreement, purpose=purpose,
    )  # fmt: skip
    delta = found.plan.delta
    if as_json:
        print(json.dumps(found.to_dict() | {"ledger_epsilon": book.epsilon(delta), "output": str(output)}))
        return
    print(
        f"{output}: at the votes there were, the labels betray a patient by at most ε {rounded_up(found.epsilon, 4)}, with "
        f"this bound {rounded_up(found.epsilon_with_release, 4)}, at δ = {delta:g}, but for a chance of "
        f"{found.plan.miss_probability:g}"
    )
    print(f"whatever the votes, ε of everything on {ledger} is {rounded_up(book.epsilon(delta), 4)}: that is the claim")


@app.command()
def run(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle, such as bundles/covid_ct_pate.")],
    output: Annotated[Path, typer.Argument(help="Folder for everything; begun again, it goes on.")],
    data: Annotated[
        Path | None, typer.Option(help="Labelled images with patients; SYNTHETIC ones are made where not given.")
    ] = None,
    ct: Annotated[bool, typer.Option("--ct", help="The images are CT volumes, as for prepare --ct.")] = False,
    label_column: Annotated[str | None, typer.Option(help="With --ct, the column of the labels, 0 or 1.")] = None,
    overlay: Annotated[
        list[str] | None, typer.Option(help="Config after each of the bundle's, such as configs/volumes.yaml.")
    ] = None,
    hospitals: Annotated[int, typer.Option(help="Hospitals that the patients are divided among.")] = 5,
    teachers: Annotated[int, typer.Option(help="Teachers of each hospital.")] = 20,
    queries: Annotated[int, typer.Option(help="Most images that the clinic asks about.")] = 100,
    epsilon: Epsilon = 2.0,
    delta: Delta = 1e-5,
    seed: Annotated[int, typer.Option(help="Of who is at which hospital.")] = 0,
    synthetic_patients: Annotated[int, typer.Option(help="How many, without data.")] = 1500,
    override: Overrides = None,
    allow_uninformative: Uninformative = False,
    as_json: AsJson = False,
) -> None:
    """The whole story on one machine: hospitals' teachers label a clinic's images, and a student learns from them."""
    from monai_privacy.data import read_chest_xrays, read_ct_volumes, write_synthetic_chest_xrays, write_synthetic_ct
    from monai_privacy.pate.story import PateStory, run_story
    from monai_privacy.report import PrivacyReport

    # MONAI's handlers log to the standard output, which is for the result.
    logging.disable(logging.WARNING)
    story = PateStory(hospitals, teachers, queries, epsilon, delta, seed, allow_uninformative)
    changes = _overrides(override)
    if data is None:
        data = output / "synthetic"
        if ct and not data.is_dir():
            write_synthetic_ct(data, num_patients=synthetic_patients, file_format="nifti", seed=seed)
        elif not data.is_dir():
            write_synthetic_chest_xrays(data, num_patients=synthetic_patients, image_size=96, seed=seed)
    source = read_ct_volumes(data, label_column=label_column) if ct else read_chest_xrays(data)
    after = tuple(overlay or ())
    found = run_story(
        bundle, source, output, story,
        train_config=("configs/train.yaml", *after), inference_config=("configs/inference.yaml", *after),
        overrides=changes, say=lambda line: print(line, file=sys.stderr),
    )  # fmt: skip
    paths = PrivacyReport.from_ledger(output / "ledger.jsonl").write(output / "report")
    if as_json:
        print(json.dumps(found.to_dict() | {"synthetic": source.synthetic, "report": [str(path) for path in paths]}))
        return
    made_up = "SYNTHETIC images: " if source.synthetic else ""
    print(
        f"{made_up}{percent(found.label_accuracy)} of {counted(found.queries, 'label')} right, at ε {found.epsilon:.4g}"
    )
    print(f"student: AUC {found.student_auc:.3f} on {counted(found.patients['test'], 'patient')} of the clinic")
    print(f"the same student with the true labels: AUC {found.ceiling_auc:.3f}")
    print(f"report: {paths[0].parent}")


def _overrides(pairs: list[str] | None) -> dict[str, object]:
    found: dict[str, object] = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ValueError(f"override is {pair!r}, but it must be name=value, such as epochs=3.")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _query_files(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {str(query): str(file) for query, file in found.items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} does not name the files of queries ({error}). Take the one that vote wrote."
        ) from error


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
