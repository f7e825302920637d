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

"""The trainer's loader: the user's data by another draw, or a refusal that says why."""

from __future__ import annotations

import pytest
import torch
from conftest import make_records
from monai.data import (
    CacheDataset,
    DataLoader,
    Dataset,
    PersistentDataset,
    SmartCacheDataset,
    ThreadDataLoader,
    list_data_collate,
    pad_list_data_collate,
)
from monai.transforms import Compose, EnsureTyped, RandSpatialCropSamplesd, SelectItemsd, SplitDimd
from torch.utils.data import (
    BatchSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from monai_privacy.data import poisson_loader, units_of
from monai_privacy.data.loading import parts_by_patient

TRANSFORM = Compose([EnsureTyped("image"), SelectItemsd(["image", "label"])])


def draws(loader, *, rate=1.0, steps=1, **options) -> list:
    return list(poisson_loader(loader, sample_rate=rate, steps=steps, **options))


def load(loader, **options) -> list:
    """The draws of a loader that gives each in one part."""
    return [draw.parts[0] for draw in draws(loader, **options) if draw.parts]


@pytest.mark.parametrize(
    ("kind", "workers"), [(Dataset, 0), (Dataset, 2), (CacheDataset, 0), (PersistentDataset, 0)]
)  # fmt: skip
@pytest.mark.parametrize("loader_class", [DataLoader, ThreadDataLoader, torch.utils.data.DataLoader])
def test_every_row_comes_with_its_patient(records, kind, loader_class, workers, tmp_path):
    options = {"cache_dir": tmp_path} if kind is PersistentDataset else {}
    options |= {"progress": False} if kind is CacheDataset else {}
    collate = {"collate_fn": list_data_collate} if loader_class is torch.utils.data.DataLoader else {}
    loader = loader_class(kind(records, TRANSFORM, **options), batch_size=4, num_workers=workers, **collate)
    (batch,) = load(loader)
    assert batch.data["image"].shape == (40, 1, 8, 8)
    # The ids were dropped by a transform: the patients are those of the untransformed records.
    assert "patient_id" not in batch.data
    expected = [int(record["patient_id"].split("-")[1]) for record in records]
    assert batch.patient_index.tolist() == expected
    assert torch.equal(batch.data["image"][3], records[3]["image"])


def test_thread_workers(records):
    loader = ThreadDataLoader(Dataset(records, TRANSFORM), batch_size=4, num_workers=2, use_thread_workers=True)
    (batch,) = load(loader)
    assert len(batch.patient_index) == 40


def test_an_empty_draw_never_reaches_the_collation(records):
    def collate(samples):
        assert samples
        return list_data_collate(samples)

    loader = DataLoader(Dataset(records[:2], TRANSFORM), batch_size=2, collate_fn=collate)
    found = draws(loader, rate=0.5, steps=50)
    assert 0 < sum(not draw.parts for draw in found) < 50


def test_a_collation_that_could_mix_patients_sees_one_at_a_time():
    """Padding to the largest image of the draw would let one patient change the rows of all others."""
    records = [*make_records(patients=2, side=8), *make_records(patients=1, side=16)]
    records[-1]["patient_id"] = records[-2]["patient_id"] = "large"
    loader = DataLoader(Dataset(records, TRANSFORM), batch_size=2, collate_fn=pad_list_data_collate)
    (draw,) = draws(loader)
    assert [tuple(part.data["image"].shape) for part in draw.parts] == [(2, 1, 8, 8), (2, 1, 8, 8), (2, 1, 16, 16)]
    assert [part.patient_index.tolist() for part in draw.parts] == [[0, 0]] * 3


def test_taking_a_draw_apart_keeps_each_patients_rows(records):
    loader = DataLoader(Dataset(records, Compose([EnsureTyped("image")])), batch_size=2)
    (whole,) = load(loader)
    apart = parts_by_patient(whole)
    assert len(apart) == 20
    assert apart[3].data["patient_id"] == ["patient-3", "patient-3"]
    assert torch.equal(apart[3].data["image"], whole.data["image"][6:8])


def test_crops_belong_to_their_patient(records):
    crops = Compose([TRANSFORM, RandSpatialCropSamplesd("image", roi_size=4, num_samples=3, random_size=False)])
    (batch,) = load(DataLoader(Dataset(records, crops), batch_size=2))
    assert batch.data["image"].shape == (120, 1, 4, 4)
    assert torch.bincount(batch.patient_index).tolist() == [6] * 20


def test_slices_of_a_volume_belong_to_its_patient():
    """2.5D: each volume becomes as many rows as it has slices."""
    records = make_records(patients=4, spatial_dims=3)
    slices = Compose([TRANSFORM, SplitDimd("image", dim=-1, keepdim=False, list_output=True)])
    (batch,) = load(DataLoader(Dataset(records, slices), batch_size=2))
    assert batch.data["image"].shape == (64, 1, 8, 8)
    assert torch.bincount(batch.patient_index).tolist() == [16] * 4
    assert torch.equal(batch.data["image"][17], records[2]["image"][..., 1])


def test_draws_whole_patients(records):
    for batch in load(DataLoader(Dataset(records, TRANSFORM), batch_size=2), rate=0.3, steps=20):
        assert torch.bincount(batch.patient_index).tolist() == [2] * (int(batch.patient_index.max()) + 1)


def test_an_error_in_a_transform_is_raised_and_does_not_end_the_epoch(records):
    def broken(record):
        raise RuntimeError("unreadable image")

    loader = ThreadDataLoader(Dataset(records, broken), batch_size=2)
    with pytest.raises(RuntimeError, match=r"unreadable image|applying transform"):
        load(loader)


def test_a_subset_keeps_its_patients(records):
    subset = Subset(Dataset(records, TRANSFORM), [5, 4, 0])
    assert units_of(subset) == ["patient-2", "patient-2", "patient-0"]
    assert len(load(DataLoader(subset, batch_size=1))[0].patient_index) == 3


def test_image_units_need_no_patient_ids(records):
    for record in records:
        del record["patient_id"]
    loader = DataLoader(Dataset(records, EnsureTyped("image")), batch_size=2)
    assert load(loader, unit="image")[0].patient_index.tolist() == list(range(40))


def test_crops_of_an_image_are_one_unit(records):
    crops = RandSpatialCropSamplesd("image", roi_size=4, num_samples=3, random_size=False)
    (batch,) = load(DataLoader(Dataset(records[:2], crops), batch_size=2), unit="image")
    assert batch.patient_index.tolist() == [0, 0, 0, 1, 1, 1]


def test_another_key_may_name_the_patient(records):
    for record in records:
        record["subject"] = record.pop("patient_id")
    assert units_of(Dataset(records), patient_key="subject")[0] == "patient-0"


class Stream(IterableDataset):
    def __iter__(self):
        yield from make_records(patients=2)


def plain(records) -> Dataset:
    return Dataset(records, TRANSFORM)


REFUSALS = {
    "iterable dataset": (lambda r: DataLoader(Stream(), batch_size=2), "iterable one: it has no rows"),
    "smart cache": (
        lambda r: DataLoader(SmartCacheDataset(r, TRANSFORM, cache_num=4, replace_rate=0.5, progress=False)),
        "SmartCacheDataset: it shows only its cache",
    ),
    "weighted": (
        lambda r: DataLoader(plain(r), sampler=WeightedRandomSampler([1.0] * 40, 40)),
        "WeightedRandomSampler.*Remove the sampler",
    ),
    "subset": (lambda r: DataLoader(plain(r), sampler=SubsetRandomSampler([0, 1])), "SubsetRandomSampler"),
    "with replacement": (
        lambda r: DataLoader(plain(r), sampler=RandomSampler(r, replacement=True)),
        "RandomSampler.*not the Poisson draws",
    ),
    "fewer samples": (lambda r: DataLoader(plain(r), sampler=RandomSampler(r, num_samples=5)), "RandomSampler"),
    "own batch sampler": (
        lambda r: DataLoader(plain(r), batch_sampler=type("Mine", (BatchSampler,), {})(SequentialSampler(r), 2, False)),
        "Mine as batch sampler",
    ),
    "no batching": (lambda r: DataLoader(plain(r), batch_size=None), "NoneType as batch sampler"),
    "repeats": (lambda r: ThreadDataLoader(plain(r), batch_size=2, repeats=3), "repeats=3.*Set repeats=1"),
    "a list": (lambda r: r, "train_data_loader is a list"),
    "no records": (
        lambda r: DataLoader(TensorDataset(torch.zeros(4, 1))),
        "TensorDataset has no list of records in .data",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_say_what_why_and_what_to_do(case, records):
    make, message = REFUSALS[case]
    with pytest.raises(ValueError, match=message) as raised:
        load(make(records))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("value", [None, "", "  ", float("nan")])
def test_a_record_without_patient_id_is_refused(records, value):
    records[7]["patient_id"] = value
    with pytest.raises(ValueError, match=r"record 7 has patient_id=.*unit=\"image\""):
        load(DataLoader(plain(records), batch_size=2))


def test_two_ids_that_spreadsheets_make_of_one_are_refused(records):
    first = records[7]["patient_id"]
    records[8]["patient_id"] = first.swapcase()
    with pytest.raises(ValueError, match=r"rows \d and 8 differ in blanks") as raised:
        load(DataLoader(plain(records), batch_size=2))
    assert first not in str(raised.value)


@pytest.mark.parametrize("value", [1.0, True])
def test_ids_that_may_be_written_in_two_ways_are_refused(records, value):
    records[7]["patient_id"] = value
    with pytest.raises(ValueError, match="may be written otherwise elsewhere"):
        load(DataLoader(plain(records), batch_size=2))


def test_ids_are_the_same_with_blanks_and_as_numbers(records):
    for record, value in zip(records, ["1", " 1 ", 1], strict=False):
        record["patient_id"] = value
    assert set(units_of(Dataset(records[:3]))) == {"1"}


def test_records_that_lack_the_key_are_refused(records):
    del records[3]["patient_id"]
    with pytest.raises(ValueError, match="record 3 has patient_id=None"):
        load(DataLoader(plain(records), batch_size=2))
