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

"""On the real images, where MONAI_PRIVACY_DATA names their folder: are patients found and kept whole?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from monai.data import Dataset

from monai_privacy import count_patients
from monai_privacy.data import LoadChestXRayd, read_chest_xrays, write_datalist
from monai_privacy.data.loading import count_units


def test_kermany_patients_are_kept_whole(real_data: Path, tmp_path: Path):
    source = read_chest_xrays(real_data / "kermany_xray_96.npz")
    assert (source.unit, count_patients(source.records), len(source.records)) == ("patient", 2279, 4171)
    datalist = json.loads(write_datalist(source, tmp_path, seed=0).read_text(encoding="utf-8"))
    patients = [{record["patient_id"] for record in datalist[split]} for split in ("training", "validation", "test")]
    assert sum(map(len, patients)) == len(set.union(*patients)) == 2279
    image = LoadChestXRayd("image")({"image": str(tmp_path / datalist["test"][0]["image"])})["image"]
    assert image.shape == (1, 96, 96)


def test_medmnist_has_no_patients_to_protect(real_data: Path, tmp_path: Path):
    source = read_chest_xrays(real_data / "pneumoniamnist.npz")
    assert source.unit == "image"
    datalist = json.loads(write_datalist(source, tmp_path, seed=0).read_text(encoding="utf-8"))
    dataset = Dataset(datalist["training"])
    with pytest.raises(ValueError, match=r"unit=\"image\""):
        count_units(dataset)
    assert count_units(dataset, unit="image") == len(datalist["training"])
