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
"""What a reader of images found: records with label and patient, whatever the files were."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["UNNAMED_CLASSES", "ImageSource", "Record", "count_patients"]

Record = dict[str, Any]

UNNAMED_CLASSES = ("negative", "positive")


@dataclass(frozen=True, eq=False)
class ImageSource:
    """Labelled images of patients, pixels unread.

    Args:
        layout: in which layout they lie: kermany, medmnist, npz or folder (X-rays); dicom or nifti (CT).
        records: one dictionary for each image: ``image`` (a path as text; the paths of a series' slices, from feet to
            head; or an (H, W) uint8 array), ``label`` (0 or 1), ``patient_id``, and ``split`` where the source has splits
            of its own.
        has_patient_ids: whether ``patient_id`` names patients. If not, each image counts as a patient of its own, and
            a guarantee for a "patient" covers only one image.
        synthetic: whether every image says that it is synthetic.
        class_names: the names of labels 0 and 1.
        kind: what the images are, in words.
        notices: what was left out, or is odd, one line each, naming the file. A patient id is in none of them.
    """

    layout: Literal["kermany", "medmnist", "npz", "folder", "dicom", "nifti"]
    records: tuple[Record, ...]
    has_patient_ids: bool
    synthetic: bool = False
    class_names: tuple[str, str] = UNNAMED_CLASSES
    kind: str = "chest X-rays"
    notices: tuple[str, ...] = ()

    @property
    def unit(self) -> Literal["patient", "image"]:
        """Whom the source allows to protect."""
        return "patient" if self.has_patient_ids else "image"


def count_patients(records: Iterable[Mapping[str, Any]]) -> int:
    """The number of different patients in the records."""
    return len({record["patient_id"] for record in records})
