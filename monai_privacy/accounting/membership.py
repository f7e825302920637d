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

"""Whose data a run may see: the registered cohort, and its parts."""

from __future__ import annotations

import os
from collections.abc import Iterable

from monai_privacy.accounting.cohort import Cohort, CohortSecrets


def checked_members(
    path: str | os.PathLike[str], cohort: Cohort | None, unit: str, ids: Iterable[str] | None, partition: int | None
) -> str:
    """Compare the ids of a run with the cohort that a ledger was registered for.

    Args:
        path: of the ledger, beside which the digests of the cohort's ids lie.
        cohort: what was registered, if anything was.
        unit: of the run.
        ids: of the run's units, if they are known.
        partition: the part of the cohort that the run is charged to.

    Returns:
        "checked", or "not checked" where nothing was registered to compare with.

    Raises:
        ValueError: for ids that the cohort or its part does not have. No message shows an id.
    """
    if ids is None or cohort is None or cohort.digest is None or cohort.unit != unit:
        if partition is not None:
            raise ValueError(
                f"partition is {partition}, but the ids of the run are not known, or no cohort is registered here to "
                "check them against. Give ids, on a registered cohort."
            )
        return "not checked"
    known = list(dict.fromkeys(str(value) for value in ids))
    if not known:
        raise ValueError(f"ids are empty: a run on no {unit} cannot be checked. Give the ids of its {unit}s.")
    hidden = CohortSecrets(path)
    strangers = hidden.strangers(known, cohort.digest)
    if strangers:
        raise ValueError(
            f"{strangers} of {len(known)} {unit}s are not in the cohort {cohort.name!r} that {path} was registered "
            f"for: their loss would be on no ledger. Take the ledger of these {unit}s, or register their cohort."
        )
    if partition is not None and set(hidden.partitions_of(known, cohort.partitions).values()) - {partition}:
        raise ValueError(
            f"partition is {partition}, but some {unit}s belong to other parts of {cohort.name!r}. Choose them with "
            "partition_ids."
        )
    return "checked"


def ids_of_part(path: str | os.PathLike[str], cohort: Cohort | None, ids: Iterable[str], partition: int) -> list[str]:
    """Those of ``ids`` that belong to a part of the cohort, counted from 0.

    Raises:
        ValueError: where the cohort has no parts.
    """
    if cohort is None or cohort.partitions == 1:
        raise ValueError(f"{path} has no partitions. Register the cohort with a number of them.")
    parts = CohortSecrets(path).partitions_of(ids, cohort.partitions)
    return [name for name, part in parts.items() if part == partition]
