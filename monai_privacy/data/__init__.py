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

"""Drawing patients, and reading what hospitals have."""

from __future__ import annotations

from monai_privacy.data.chest_xray import read_chest_xrays
from monai_privacy.data.chest_xray_transforms import LoadChestXRay, LoadChestXRayd
from monai_privacy.data.ct import read_ct_volumes
from monai_privacy.data.ct_transforms import CropAroundFinding, CropAroundFindingd, LoadCT, LoadCTd, RepeatViewsd
from monai_privacy.data.datalist import bundle_records, write_datalist
from monai_privacy.data.dicom_series import CTSeries, CTTree, read_ct_series
from monai_privacy.data.loading import LogicalBatch, count_units, poisson_loader, units_of
from monai_privacy.data.partition import PatientPartition, new_partition_key, partition_patients, write_manifest
from monai_privacy.data.partition_manifest import PartitionManifest, read_manifest
from monai_privacy.data.patients import with_patient_ids
from monai_privacy.data.sampling import PoissonPatientSampler
from monai_privacy.data.source import ImageSource, count_patients
from monai_privacy.data.splits import split_patients
from monai_privacy.data.synthetic import write_synthetic_chest_xrays
from monai_privacy.data.synthetic_ct import SyntheticNodules, write_synthetic_ct

__all__ = [
    "CTSeries",
    "CTTree",
    "CropAroundFinding",
    "CropAroundFindingd",
    "ImageSource",
    "LoadCT",
    "LoadCTd",
    "LoadChestXRay",
    "LoadChestXRayd",
    "LogicalBatch",
    "PartitionManifest",
    "PatientPartition",
    "PoissonPatientSampler",
    "RepeatViewsd",
    "SyntheticNodules",
    "bundle_records",
    "count_patients",
    "count_units",
    "new_partition_key",
    "partition_patients",
    "poisson_loader",
    "read_chest_xrays",
    "read_ct_series",
    "read_ct_volumes",
    "read_manifest",
    "split_patients",
    "units_of",
    "with_patient_ids",
    "write_datalist",
    "write_manifest",
    "write_synthetic_chest_xrays",
    "write_synthetic_ct",
]
