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

"""The trainer's own loader, made of the user's: same dataset, transforms, workers and collation, another draw."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from monai.data import DistributedSampler, SmartCacheDataset, ThreadDataLoader, list_data_collate
from monai.data.utils import set_rnd
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    default_collate,
)

from monai_privacy.data.sampling import PoissonPatientSampler
from monai_privacy.data.splits import require_distinct_ids
from monai_privacy.mechanisms.randomness import InsecureSeeds, SeedSource, fresh_randomness, system_seed

PATIENT_KEY = "patient_id"


# These put row beside row and let none see another. What else a user's function does, it does for one patient at a time.
_ROW_WISE_COLLATE = (default_collate, list_data_collate)


class BatchPart(NamedTuple):
    """Some patients of a draw, each with all their rows.

    Args:
        data: what the user's collate function made of their samples.
        patient_index: (B,) the patient of each row, numbered from 0 within the part.
    """

    data: Any
    patient_index: Tensor


class LogicalBatch(NamedTuple):
    """One Poisson draw.

    Args:
        parts: the draw in one part; or in one for each patient, where the user's collate function might let the samples
            of one patient change the rows of another, as padding to the largest image does. Empty for an empty draw.
    """

    parts: tuple[BatchPart, ...]


def poisson_loader(
    loader: DataLoader,
    *,
    sample_rate: float,
    steps: int,
    unit: str = "patient",
    patient_key: str = PATIENT_KEY,
    rank: int = 0,
    world_size: int = 1,
    insecure_seed: int | None = None,
) -> DataLoader:
    """A loader that yields :class:`LogicalBatch` from the dataset of ``loader``, drawn patient by patient.

    The dataset, its transforms, the workers and the collate function are those of ``loader``; its batch size, shuffling
    and ``drop_last`` give way to the Poisson draw. A collate function other than torch's and MONAI's own is called for
    one patient at a time.

    Args:
        loader: an ordinary ``torch`` or MONAI ``DataLoader`` or ``ThreadDataLoader`` over records (dictionaries).
        sample_rate: probability with which each patient is drawn in a step.
        steps: draws in one pass.
        unit: "patient"; or "image" to let each record be its own unit.
        patient_key: key of the patient's id in the records of ``dataset.data``, read before any transform.
        rank: see :class:`PoissonPatientSampler`.
        world_size: see :class:`PoissonPatientSampler`.
        insecure_seed: see :class:`PoissonPatientSampler`.

    Raises:
        ValueError: for a loader whose draw cannot be replaced by a Poisson draw without changing what is trained on.
    """
    check_loader(loader)
    units = units_of(loader.dataset, unit=unit, patient_key=patient_key)
    sampler = PoissonPatientSampler(
        units, sample_rate=sample_rate, steps=steps, rank=rank, world_size=world_size, insecure_seed=insecure_seed
    )
    # Not a ThreadDataLoader even where the user has one: it swallows an error in its thread and ends the epoch early.
    return DataLoader(
        _WithUnits(
            loader.dataset,
            units,
            patient_key=patient_key if unit == "patient" else None,
            seeds=system_seed if insecure_seed is None else InsecureSeeds(insecure_seed),
        ),
        batch_sampler=sampler,
        collate_fn=_CollateDraw(loader.collate_fn),
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context if loader.num_workers else None,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor if loader.num_workers else None,
        persistent_workers=loader.persistent_workers,
    )


def check_loader(loader: Any) -> None:
    """Raise ValueError, with the reason and the remedy, for a loader that a Poisson draw cannot stand in for."""
    if not isinstance(loader, DataLoader):
        raise ValueError(
            f"train_data_loader is a {type(loader).__name__}: the patients cannot be drawn from it. Give a torch or MONAI "
            "DataLoader over a Dataset of records."
        )
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"the dataset is a {type(dataset).__name__}, an iterable one: it has no rows to draw patients from. Use "
            "Dataset, CacheDataset or PersistentDataset."
        )
    if isinstance(dataset, SmartCacheDataset):
        raise ValueError(
            "the dataset is a SmartCacheDataset: it shows only its cache, so patients would be drawn at another rate "
            "than accounted. Use CacheDataset or PersistentDataset."
        )
    if isinstance(loader, ThreadDataLoader) and loader.repeats != 1:
        raise ValueError(
            f"ThreadDataLoader has repeats={loader.repeats}: each draw would be used {loader.repeats} times and "
            "accounted once. Set repeats=1."
        )
    if type(loader.batch_sampler) is not BatchSampler:
        raise ValueError(
            f"the loader has a {type(loader.batch_sampler).__name__} as batch sampler: its draws are not the Poisson "
            "draws that are accounted. Give a loader with a plain batch_size; the plan sets the expected batch size."
        )
    _check_sampler(loader.sampler)


def _check_sampler(sampler: Any) -> None:
    # monai.data.DistributedSampler and torch's only shard the dataset: the Poisson draw shards by itself.
    is_plain = type(sampler) is SequentialSampler or type(sampler) is DistributedSampler
    is_shuffle = type(sampler) is RandomSampler and not sampler.replacement and sampler._num_samples is None
    if not (is_plain or is_shuffle or type(sampler) is torch.utils.data.DistributedSampler):
        raise ValueError(
            f"the loader has a {type(sampler).__name__}: its draws are not the Poisson draws that are accounted, and "
            "leaving it out would change what is trained on. Remove the sampler; weight the loss by fixed public class "
            "weights, or choose the records beforehand."
        )


def units_of(dataset: Dataset, *, unit: str = "patient", patient_key: str = PATIENT_KEY) -> list[str]:
    """The privacy unit of each row of ``dataset``: the untransformed ``patient_key`` of its records.

    Raises:
        ValueError: where the records cannot be seen, or one has no patient id and ``unit`` is "patient", or two ids look
            like one patient's.
    """
    if unit == "image":
        return [_image_id(dataset, row) for row in range(len(dataset))]  # type: ignore[arg-type]
    units = [_patient_id(record, row, patient_key) for row, record in enumerate(_records_of(dataset))]
    require_distinct_ids(units)
    return units


def count_units(dataset: Dataset, *, unit: str = "patient", patient_key: str = PATIENT_KEY) -> int:
    """How many privacy units ``dataset`` has; whoever puts this number into a plan makes it public."""
    return len(set(units_of(dataset, unit=unit, patient_key=patient_key)))


def _records_of(dataset: Any) -> Sequence[Any]:
    if isinstance(dataset, Subset):
        whole = _records_of(dataset.dataset)
        return [whole[index] for index in dataset.indices]
    records = getattr(dataset, "data", None)
    if not isinstance(records, Sequence) or len(records) != len(dataset):
        raise ValueError(
            f"{type(dataset).__name__} has no list of records in .data, one a row, so its patients are unknown. Use "
            'monai.data.Dataset, CacheDataset or PersistentDataset, or ask for unit="image".'
        )
    return records


def _image_id(dataset: Any, row: int) -> str:
    # An image that is listed several times, to be seen more often, is one unit.
    records = getattr(dataset, "data", None)
    record = records[row] if isinstance(records, Sequence) and len(records) == len(dataset) else None
    if not isinstance(record, Mapping):
        values = [record]
    else:
        values = [record["image"]] if "image" in record else list(record.values())
    files = [os.fspath(file) for value in values for file in _files_in(value)]
    return f"file {'|'.join(files)}" if files else f"row {row}"


def _files_in(value: Any) -> list[Any]:
    listed = list(value) if isinstance(value, (list, tuple)) else [value]
    are_files = all(
        isinstance(file, os.PathLike) or (isinstance(file, str) and os.path.splitext(file)[1]) for file in listed
    )
    return listed if listed and are_files else []


def _patient_id(record: Any, row: int, patient_key: str) -> str:
    value = record.get(patient_key) if isinstance(record, Mapping) else None
    is_number = isinstance(value, numbers.Number) and not isinstance(value, numbers.Integral)
    if value is None or (is_number and math.isnan(value)) or not str(value).strip():  # type: ignore[arg-type]
        raise ValueError(
            f"record {row} has {patient_key}={value!r}: without a patient id the guarantee cannot be per patient. Add "
            f'{patient_key} to every record of the datalist, or ask for unit="image".'
        )
    if is_number or isinstance(value, bool):
        raise ValueError(
            f"record {row} has {patient_key}={value!r}, a {type(value).__name__}: the same patient may be written "
            "otherwise elsewhere (1 and 1.0). Give patient ids as text or whole numbers."
        )
    return str(value).strip()


class _WithUnits(Dataset):
    """The user's dataset, each sample beside the number of its unit.

    Each draw is made with fresh randomness: under a fixed seed a patient's augmentation would depend on who was loaded
    before them.
    """

    def __init__(self, dataset: Any, units: Sequence[str], *, patient_key: str | None, seeds: SeedSource) -> None:
        self.dataset = dataset
        self.units = tuple(units)
        self._patient_key = patient_key
        self._seeds = seeds
        number_of = {unit: number for number, unit in enumerate(dict.fromkeys(units))}
        self._numbers = torch.tensor([number_of[unit] for unit in units], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, row: int) -> tuple[int, Any]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[tuple[int, Any]]:
        """All samples of a draw: torch's loader asks for them at once, so that the seed is set once a draw."""
        seed = self._seeds()
        for transform in transforms_of(self.dataset):
            set_rnd(transform, seed % 2**32)
        with fresh_randomness(seed):
            return [(int(self._numbers[row]), self._checked(row, self.dataset[row])) for row in rows]

    def _checked(self, row: int, sample: Any) -> Any:
        """A dataset that was changed, or that gives another record in place of a broken one, must not change owners."""
        for item in sample if isinstance(sample, list) else [sample]:
            if self._patient_key is None or not isinstance(item, Mapping) or self._patient_key not in item:
                continue
            found = _patient_id(item, row, self._patient_key)
            if found != self.units[row]:
                raise ValueError(
                    f"row {row} gave a sample of another patient than its record names: the patients would be counted "
                    "wrongly. Do not change the dataset once the trainer has it, nor replace one record by another."
                )
        return sample


def transforms_of(dataset: Any) -> list[Any]:
    found = [getattr(dataset, "transform", None)]
    if isinstance(dataset, Subset):
        found += transforms_of(dataset.dataset)
    return [transform for transform in found if transform is not None]


def require_unchanged(loader: Any, *, unit: str, patient_key: str) -> None:
    """Raise ValueError where the records of a :func:`poisson_loader` are no longer those that it was made for."""
    wrapped: _WithUnits = loader.dataset
    if tuple(units_of(wrapped.dataset, unit=unit, patient_key=patient_key)) != wrapped.units:
        raise ValueError(
            "the dataset's records have changed since the trainer was made: the patients would be counted wrongly. Make "
            "a new trainer for new records."
        )


class _CollateDraw:
    """The user's collation, with the unit of each row beside it; an empty draw never reaches it."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate = collate

    def __call__(self, drawn: list[tuple[int, Any]]) -> LogicalBatch:
        if not drawn:
            return LogicalBatch(())
        if self._collate in _ROW_WISE_COLLATE:
            return LogicalBatch((self._part(drawn),))
        by_unit: dict[int, list[tuple[int, Any]]] = {}
        for unit, sample in drawn:
            by_unit.setdefault(unit, []).append((unit, sample))
        return LogicalBatch(tuple(self._part(own) for own in by_unit.values()))

    def _part(self, drawn: list[tuple[int, Any]]) -> BatchPart:
        # A multi-sample transform gives a list of crops for one record: all of them are the patient's.
        units = [unit for unit, sample in drawn for _ in range(len(sample) if isinstance(sample, list) else 1)]
        _, patient_index = torch.unique(torch.tensor(units, dtype=torch.int64), return_inverse=True)
        return BatchPart(self._collate([sample for _, sample in drawn]), patient_index)


def parts_by_patient(part: BatchPart) -> list[BatchPart]:
    """``part`` taken apart: one part for each of its patients, by rows."""
    count = len(part.patient_index)
    patients = int(part.patient_index.max()) + 1 if count else 0
    rows_of = [(part.patient_index == patient).nonzero().reshape(-1) for patient in range(patients)]
    return [BatchPart(rows_of_value(part.data, rows, count), torch.zeros_like(rows)) for rows in rows_of]


def rows_of_value(value: Any, rows: Tensor, count: int) -> Any:
    """Those ``rows`` of whatever has ``count`` rows inside ``value``: tensors, lists of values, and containers of them."""
    if isinstance(value, Tensor):
        return value[rows] if value.ndim and len(value) == count else value
    if isinstance(value, Mapping):
        return {key: rows_of_value(item, rows, count) for key, item in value.items()}
    if isinstance(value, list) and len(value) == count and not any(isinstance(item, Tensor) for item in value):
        return [value[row] for row in rows.tolist()]
    if isinstance(value, (list, tuple)):
        return type(value)(rows_of_value(item, rows, count) for item in value)
    return value
