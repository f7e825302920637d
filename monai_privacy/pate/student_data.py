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

"""What students see: records with the teachers' answers in them, and random views of the rows of a batch."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.utils.enums import CommonKeys as Keys
from torch import Tensor

__all__ = ["plain", "split_answers", "viewed"]

_NO_ANSWER = -1


def split_answers(
    records: Sequence[Mapping[str, Any]], labels: Sequence[int] | Tensor, *, label_key: str = Keys.LABEL
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Divide public images into those that the teachers answered and all others.

    Args:
        records: one dictionary for each image; not changed. A label that is already there does not get into the result:
            a student is to learn the teachers' answers only.
        labels: (N,) the answers, -1 where there is none (not asked, abstained, or over budget).
        label_key: where the answer goes.

    Returns:
        The answered records with their answers, and the others without any, both in the given order.

    Raises:
        ValueError: for another number of labels than of records, and for labels below -1 or that are no whole numbers.
    """
    answers = labels.tolist() if isinstance(labels, Tensor) else list(labels)
    if len(answers) != len(records):
        raise ValueError(
            f"there are {len(answers)} labels for {len(records)} records. Give one for each, -1 for no answer."
        )
    labelled, unlabelled = [], []
    for index, (record, answer) in enumerate(zip(records, answers, strict=True)):
        bare = {key: value for key, value in record.items() if key != label_key}
        label = _checked_answer(index, answer)
        if label == _NO_ANSWER:
            unlabelled.append(bare)
        else:
            labelled.append(bare | {label_key: label})
    return labelled, unlabelled


def viewed(transform: Callable[[Any], Any], batch: Any) -> Any:
    """The batch with ``transform`` applied to each of its rows; the batch itself is not changed.

    Args:
        transform: gets a row in the form of the batch: a dictionary without its batch axis, or else the image alone.
        batch: a dictionary; or images (B, C, *spatial); or a sequence that begins with them, whose rest stays as it is.

    Returns:
        A batch of the same form. Arrays and tensors of a dictionary that ``transform`` returns replace those of the batch.
        Without MONAI's metadata.

    Raises:
        ValueError: for a dictionary without a tensor.
    """
    if isinstance(batch, Mapping):
        sizes = [len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim]
        if not sizes:
            raise ValueError(
                f"the batch has no tensor among {sorted(map(str, batch))}, so no rows. Collate its images."
            )
        rows = [
            transform({key: _row(value, index, sizes[0]) for key, value in batch.items()}) for index in range(sizes[0])
        ]
        changed = [key for key, value in rows[0].items() if isinstance(value, Tensor | np.ndarray)]
        return {**batch, **{key: torch.stack([plain(row[key]) for row in rows]) for key in changed}}
    if isinstance(batch, list | tuple):
        images = viewed(transform, batch[0])
        return images if len(batch) == 1 else [images, *batch[1:]]
    return torch.stack([plain(transform(row.clone())) for row in plain(batch)])


def plain(image: Any) -> Tensor:
    """The tensor without metadata, which rows of different loaders have in different forms."""
    return image.as_tensor() if isinstance(image, MetaTensor) else torch.as_tensor(image)


def _row(value: Any, index: int, size: int) -> Any:
    if isinstance(value, Tensor) and value.ndim:
        # A copy: a transform that works in place must not change the other view.
        return plain(value)[index].clone()
    return value[index] if isinstance(value, list | tuple) and len(value) == size else value


def _checked_answer(index: int, answer: Any) -> int:
    try:
        label = operator.index(answer)
    except TypeError:
        label = _NO_ANSWER - 1
    if label < _NO_ANSWER:
        raise ValueError(
            f"labels[{index}] is {answer!r}, but must be a class from 0, or -1 for no answer. Give whole numbers."
        )
    return label
