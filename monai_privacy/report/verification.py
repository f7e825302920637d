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


"""Whether a report says what its ledger says."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from monai_privacy.report.making import report_on
from monai_privacy.report.values import SCHEMA

# Bounds of other versions of the libraries differ in their last digits, and no more.
_TOLERANCE = 1e-6
# What made the report is a fact about the report, not about the ledger.
_OF_THE_REPORT = ("versions", "ledger")


def differences(report: str | os.PathLike[str], ledger: str | os.PathLike[str]) -> list[str]:
    """What a report's JSON file says otherwise than the ledger does; empty where nothing.

    The ledger is taken as it was when the report was made: its first lines, as many as the report says, checked by the
    hash of the last of them. Everything is then computed anew.

    Raises:
        ValueError: where the file is no report of this version.
        LedgerError: where the ledger is damaged, or has fewer lines.
        FileNotFoundError: where one of both is not there.
    """
    claimed = read_report(report)
    made = report_on(ledger, lines=claimed["ledger_lines"])
    if made.ledger_hash != claimed["ledger_hash"]:
        theirs, right = claimed["ledger_hash"], made.ledger_hash
        return [
            f"ledger_hash: the report says {theirs!r}, line {made.ledger_lines} gives {right!r}: it is another ledger"
        ]
    ours = json.loads(made.to_json())
    return [
        f"{where}: the report says {theirs}, the ledger gives {right}"
        for where, theirs, right in _unequal("", _without(claimed), _without(ours))
    ]


def read_report(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The report in a JSON file.

    Raises:
        ValueError: where it is no report of this version.
        FileNotFoundError: where there is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is no file: name the privacy_report.json that goes with the ledger.")
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no report: {error}. Name a privacy_report.json.") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"{path} has schema {found!r}, and this version reads {SCHEMA!r}. Make the report anew.")
    lines = data.get("ledger_lines")
    if not isinstance(lines, int) or isinstance(lines, bool) or lines < 1 or "ledger_hash" not in data:
        raise ValueError(f"{path} does not say which state of the ledger it is made from. Make the report anew.")
    return data


def _without(data: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in data.items() if name not in _OF_THE_REPORT}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names are all different: of two equal ones, a reader may see either."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice in one object")
    return found


def _unequal(where: str, claimed: Any, ours: Any) -> Iterator[tuple[str, str, str]]:
    if isinstance(claimed, dict) and isinstance(ours, dict):
        for key in dict.fromkeys([*claimed, *ours]):
            inner = f"{where}.{key}".lstrip(".")
            if key not in claimed or key not in ours:
                missing = "nothing"
                yield (
                    inner,
                    missing if key not in claimed else _say(claimed[key]),
                    (missing if key not in ours else _say(ours[key])),
                )
            else:
                yield from _unequal(inner, claimed[key], ours[key])
    elif isinstance(claimed, list) and isinstance(ours, list) and len(claimed) == len(ours):
        for number, (theirs, right) in enumerate(zip(claimed, ours, strict=True), 1):
            yield from _unequal(f"{where}.{number}", theirs, right)
    elif not _same(claimed, ours):
        yield where, _say(claimed), _say(ours)


def _same(claimed: Any, ours: Any) -> bool:
    numbers = (int, float)
    if isinstance(claimed, numbers) and isinstance(ours, numbers) and type(claimed) is not bool is not type(ours):
        if isinstance(claimed, int) and isinstance(ours, int):
            return claimed == ours
        return math.isclose(claimed, ours, rel_tol=_TOLERANCE, abs_tol=0.0)
    return type(claimed) is type(ours) and claimed == ours


def _say(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:117]}..."
