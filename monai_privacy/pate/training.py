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

"""Shards of a prepared data set, a folder for each teacher, and teachers trained on them by any bundle."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monai_privacy.accounting.cohort import digest_of, keyed_digest
from monai_privacy.accounting.values import checked_count
from monai_privacy.data.partition import PatientPartition, partition_patients, write_manifest
from monai_privacy.data.partition_manifest import PartitionManifest
from monai_privacy.pate.teachers import Teacher, TeacherSet, record_teacher, trained_teacher, weights_digest
from monai_privacy.provenance import file_digest

__all__ = ["MANIFEST", "TeacherRecipe", "teacher_pool", "train_teachers", "write_shards"]

MANIFEST = "manifest.json"
_ROOM = 0.8


def write_shards(
    datalist_file: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    num_teachers: int,
    *,
    key: bytes,
    teachers_per_patient: int = 1,
    hospital_key: str | None = None,
    base_dir: str | os.PathLike[str] | None = None,
) -> PatientPartition:
    """Divide the training patients of a ``datalist.json`` among teachers: a folder with a ``datalist.json`` for each.

    Args:
        datalist_file: what ``prepare`` wrote, or any of that form with a ``patient_id`` in each training record.
        folder: made if need be; gets ``000/datalist.json`` and so on, and ``manifest.json`` without patient ids.
        num_teachers: number of teachers; of each hospital, where ``hospital_key`` is given.
        key: secret bytes, see :func:`~monai_privacy.data.partition.partition_patients`.
        teachers_per_patient: most teachers that one patient may be in.
        hospital_key: the entry of a record that names its hospital.
        base_dir: where relative paths in the list start; its own folder where None.

    Raises:
        ValueError: for records without patients, and for whatever the partition refuses.
    """
    source = Path(datalist_file)
    listed = json.loads(source.read_text(encoding="utf-8"))
    records = listed.get("training") or []
    if not records or not all("patient_id" in record for record in records):
        raise ValueError(
            f"{source} has {len(records)} training records, not all with a patient_id: images of one patient could be in "
            "many teachers. Prepare the data with patient ids."
        )
    homes = None
    if hospital_key is not None:
        if not all(hospital_key in record for record in records):
            raise ValueError(f"{source} has training records without {hospital_key!r}: name the entry of the hospital.")
        homes = [str(record[hospital_key]) for record in records]
    partition = partition_patients(
        [record["patient_id"] for record in records],
        num_teachers,
        key=key,
        teachers_per_patient=teachers_per_patient,
        hospitals=homes,
    )
    root, start = Path(folder), Path(os.path.abspath(base_dir or source.parent))
    root.mkdir(parents=True, exist_ok=True)
    # Shards name patients, and the key lies beside them: not for a repository, which "git add" would put them into.
    (root / ".gitignore").write_text("*\n", encoding="utf-8")
    heading = {name: listed[name] for name in ("name", "synthetic", "unit", "labels") if name in listed}
    for number, rows in enumerate(partition.rows):
        shard = root / f"{number:03d}"
        shard.mkdir(parents=True, exist_ok=True)
        own = [_absolute(records[row], start) for row in rows]
        text = json.dumps(
            {**heading, "num_patients": {"training": len({r["patient_id"] for r in own})}, "training": own}
        )
        (shard / "datalist.json").write_text(text + "\n", encoding="utf-8")
    write_manifest(partition, root / MANIFEST)
    return partition


@dataclass(frozen=True)
class TeacherRecipe:
    """How each teacher is trained: a MONAI bundle, and what is overridden in it.

    Args:
        bundle_root: the bundle's folder.
        config_files: its training config and overlays, relative to the folder.
        data_key: the config entry that takes the folder with a shard's ``datalist.json``.
        output_key: the config entry that takes the folder for results.
        checkpoint: the file that the training leaves there.
        overrides: further entries, by name.
    """

    bundle_root: Path
    config_files: tuple[str, ...] = ("configs/train.yaml",)
    data_key: str = "dataset_dir"
    output_key: str = "output_dir"
    checkpoint: str = "model.pt"
    overrides: tuple[tuple[str, Any], ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 of the configs and of what is overridden."""
        files = [f"{name} {file_digest(self.bundle_root / name)}" for name in self.config_files]
        keys = [self.data_key, self.output_key, self.checkpoint]
        return hashlib.sha256(json.dumps([files, keys, self.overrides], default=str).encode()).hexdigest()


def train_teachers(
    recipe: TeacherRecipe,
    manifest: PartitionManifest,
    shards: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    workers: int | None = None,
    pool: ProcessPoolExecutor | None = None,
    on_done: Callable[[int, int], None] = lambda done, total: None,
) -> TeacherSet:
    """Train one teacher on each shard, side by side in processes; those already trained are kept.

    Each teacher is an ordinary training that sees its own shard and nothing else. A shard without patients gets a teacher
    that votes for a fixed class: leaving it out would tell that nobody is in it.

    Args:
        recipe: the training.
        manifest: of the shards.
        shards: the folder that :func:`write_shards` filled.
        folder: for the teachers, ``000/`` and so on.
        workers: processes side by side; None for as many as there are cores and memory for, one on a GPU.
        pool: of :func:`teacher_pool`, to be used again; one of its own where None.
        on_done: called with the number of teachers trained so far, and of all.

    Raises:
        ValueError: where a training fails, with its last line, or a shard is not that of the manifest; the teachers that
            are trained are kept.
    """
    root, recipe_digest = Path(folder), recipe.digest
    places = {shard.teacher: _checked_shard(manifest, shard.teacher, Path(shards)) for shard in manifest.shards}
    done = {n: trained_teacher(root / f"{n:03d}", places[n], recipe_digest, manifest.signature) for n in places}
    todo = [number for number, teacher in done.items() if teacher is None]
    on_done(len(places) - len(todo), len(places))

    def finish(number: int, sha256: str | None) -> None:
        own = root / f"{number:03d}"
        checkpoint = None if sha256 is None else own / recipe.checkpoint
        own.mkdir(parents=True, exist_ok=True)
        teacher = Teacher(
            number, checkpoint, sha256 or "", places[number], recipe_digest, manifest.teachers_per_patient,
            "" if checkpoint is None else weights_digest(checkpoint), manifest.signature, manifest.num_teachers,
        )  # fmt: skip
        record_teacher(own, teacher)
        done[number] = teacher
        on_done(sum(one is not None for one in done.values()), len(places))

    for number in [n for n in todo if not manifest.shards[n].num_rows]:
        finish(number, None)
    todo = [number for number in todo if manifest.shards[number].num_rows]
    if todo:
        with contextlib.nullcontext(pool) if pool is not None else teacher_pool() as processes:
            _train_all(recipe, todo, Path(shards), root, workers, processes, finish)
    return TeacherSet.from_folder(root, num_teachers=len(places))


def _checked_shard(manifest: PartitionManifest, number: int, shards: Path) -> str:
    """A name for what a teacher learns from: its list of records, whose patients must be those of the manifest."""
    path = shards / f"{number:03d}" / "datalist.json"
    try:
        records = json.loads(path.read_text(encoding="utf-8"))["training"]
        patients = {str(record["patient_id"]) for record in records}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}). Divide the patients again.") from error
    shard = manifest.shards[number]
    found = sorted(keyed_digest(manifest.digest_key, patient) for patient in patients)
    if found != list(shard.digests) or len(records) != shard.num_rows:
        raise ValueError(
            f"{path} has {len(patients)} patients and {len(records)} rows, but not those of the manifest, which has "
            f"{shard.num_patients} and {shard.num_rows}: a patient may be in two teachers. Divide the patients again."
        )
    return digest_of([*found, file_digest(path)])


def _train_all(
    recipe: TeacherRecipe,
    todo: Sequence[int],
    shards: Path,
    root: Path,
    workers: int | None,
    pool: ProcessPoolExecutor,
    finish: Callable[[int, str | None], None],
) -> None:
    most = None if workers is None else checked_count("workers", workers)
    rest = list(todo)
    running: dict[Future[tuple[str, int]], int] = {}
    threads = 1 if most is None else max(1, (os.cpu_count() or 1) // most)
    try:
        while rest or running:
            # What the first training takes says how many fit side by side; the pool starts processes as they are needed.
            while rest and len(running) < (most or 1):
                number = rest.pop(0)
                job = pool.submit(_train_one, recipe, *_folders(number, shards, root), threads)
                running[job] = number
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for job in done:
                sha256, peak = job.result()
                finish(running.pop(job), sha256)
                most = _how_many(peak) if most is None else most
    except BaseException:
        for job in running:
            job.cancel()
        raise


def teacher_pool() -> ProcessPoolExecutor:
    """Processes for trainings, to be shared by several calls of :func:`train_teachers`: each takes seconds to start."""
    # Not forked: threads of torch do not survive it.
    return ProcessPoolExecutor(os.cpu_count() or 1, mp_context=multiprocessing.get_context("spawn"))


def _folders(number: int, shards: Path, root: Path) -> tuple[Path, Path]:
    return (shards / f"{number:03d}").absolute(), (root / f"{number:03d}").absolute()


def _train_one(recipe: TeacherRecipe, shard: Path, output: Path, threads: int) -> tuple[str, int]:
    """In a process of its own: train, and return the checkpoint's SHA-256 and the peak of memory in bytes."""
    import logging
    import warnings

    import torch
    from monai.bundle import ConfigWorkflow

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(threads)
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    os.chdir(recipe.bundle_root)
    changed: Mapping[str, Any] = {
        **dict(recipe.overrides), recipe.data_key: str(shard), recipe.output_key: str(output)
    }  # fmt: skip
    try:
        workflow = ConfigWorkflow(
            config_file=list(recipe.config_files), workflow_type="train", logging_file=False, **changed
        )
        missing = [key for key in (recipe.data_key, recipe.output_key) if key not in _entries(recipe)]
        if missing:
            raise ValueError(
                f"the config has no entry {missing[0]!r}: name the one that takes the shard, or the results"
            )
        workflow.initialize()
        _require_shard(workflow.parser, shard)
        workflow.run()
        workflow.finalize()
        return file_digest(output / recipe.checkpoint), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    except (Exception, SystemExit) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        reason = reason.removeprefix("error: ")
        raise ValueError(f"teacher {int(shard.name)} could not be trained: {reason}") from None


def _entries(recipe: TeacherRecipe) -> Any:
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    parser.read_config([str(recipe.bundle_root / name) for name in recipe.config_files])
    return parser


def _require_shard(parser: Any, shard: Path) -> None:
    """The trainer must read the images of this shard, and no others: a name mistaken would give it all patients."""
    names = [name for name in ("train#trainer", "trainer") if name in parser]
    trainer = parser.get_parsed_content(names[0]) if names else None
    records = getattr(getattr(getattr(trainer, "data_loader", None), "dataset", None), "data", None)
    if not isinstance(records, (list, tuple)) or not all(isinstance(one, dict) and "image" in one for one in records):
        raise ValueError(
            "nobody can see which images the trainer reads: it needs train#trainer or trainer, with a loader over a MONAI "
            "Dataset of records with an image"
        )
    own = json.loads((shard / "datalist.json").read_text(encoding="utf-8"))["training"]
    read, given = (sorted(json.dumps(one["image"], default=str) for one in some) for some in (records, own))
    if read != given:
        raise ValueError(
            f"it would train on {len(read)} images that are not the {len(given)} of its shard: check --data-key and the "
            "overrides"
        )


def _how_many(peak: int) -> int:
    import torch

    if torch.cuda.is_available():
        return 1
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not on this system
        return 1
    return max(1, min(os.cpu_count() or 1, int(_ROOM * free // max(1, peak))))


def _absolute(record: Mapping[str, Any], start: Path) -> dict[str, Any]:
    image = record["image"]
    paths = [image] if isinstance(image, str) else list(image)
    found = [str(start / path) for path in paths]
    return {**record, "image": found[0] if isinstance(image, str) else found}
