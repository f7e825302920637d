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
"""Tables of labels as hospitals write them: a CSV that names files, labels and perhaps patients."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monai_privacy.data.image_files import one_line

FILE_COLUMNS = ("file", "filename", "image", "path")
_LABEL_COLUMNS = ("label", "target")
_PATIENT_COLUMNS = ("patient_id", "patientid")


class LayoutError(ValueError):
    """Marks our own messages, so that they are not taken for a failure to read."""


@dataclass(frozen=True)
class LabelRow:
    """A line of a table.

    Args:
        table: the file.
        line: its number, for messages.
        name: what the line names, as written.
        label: 0 or 1.
        patient_cell: the patient id as written, None where the table has no such column.
        cells: all cells by column.
    """

    table: Path
    line: int
    name: str
    label: int
    patient_cell: str | None
    cells: dict[str, str]


def files_below(folder: Path, suffix: str) -> list[Path]:
    """Files below a folder, sorted, without those that macOS and file managers hide in archives."""
    found = (p for p in folder.rglob("*") if p.name.lower().endswith(suffix) and p.is_file())
    return sorted(p for p in found if not is_hidden(p.relative_to(folder)))


def is_hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def only_table(folder: Path) -> Path:
    """The one CSV below a folder.

    Raises:
        ValueError: where there are several, any of which may hold the labels.
    """
    tables = files_below(folder, ".csv")
    if len(tables) > 1:
        names = ", ".join(str(table.relative_to(folder)) for table in tables)
        raise LayoutError(
            f"folder {folder} has {len(tables)} CSV files ({names}), and any may hold the labels. Leave one of them."
        )
    return tables[0]


def read_labels(
    table: Path, *, file_columns: Sequence[str] = FILE_COLUMNS, label_column: str | None = None
) -> list[LabelRow]:
    """The lines of a table of labels.

    Args:
        table: a CSV, separated by commas or semicolons.
        file_columns: names, in lower case, of the column that says which image a line is about.
        label_column: name of the column of labels; "label" or "target" where None.

    Raises:
        ValueError: naming the file and the line, for a table that cannot be read so.
    """
    names, rows = _read(table)
    labels = _LABEL_COLUMNS if label_column is None else (label_column.strip().lower(),)
    file = _column(table, names, "file", file_columns)
    label = _column(table, names, "label", labels)
    patient = _column(table, names, "patient", _PATIENT_COLUMNS, needed=False)
    return [
        LabelRow(
            table,
            line,
            row[file or ""],
            checked_label(row[label or ""], f"line {line} of {table}"),
            None if patient is None else row[patient],
            row,
        )
        for line, row in rows
    ]


def _read(table: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Names of the columns, and the rows with their line numbers."""
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:  # spreadsheets begin UTF-8 with a mark
            head = file.readline()
            file.seek(0)
            # Spreadsheets of half of Europe separate columns by semicolons.
            reader = csv.DictReader(file, delimiter=";" if ";" in head and "," not in head else ",", restval="")
            rows = [(reader.line_num, _cells(table, reader.line_num, row)) for row in reader]
            return list(reader.fieldnames or ()), rows
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise LayoutError(f"CSV {table} cannot be read ({one_line(error)}). Save it as a UTF-8 CSV file.") from error


def _cells(table: Path, line: int, row: dict[str | None, Any]) -> dict[str, str]:
    more = row.pop(None, [])
    if any(cell.strip() for cell in more):
        raise LayoutError(
            f"line {line} of {table} has {len(more)} cells more than there are columns, so which is which is unknown. "
            "Correct the line."
        )
    return {name: cell for name, cell in row.items() if name is not None}


def _column(
    table: Path, names: Sequence[str], meaning: str, choices: Sequence[str], *, needed: bool = True
) -> str | None:
    matches = [name for name in names if name.strip().lower() in choices]
    if len(matches) > 1:
        raise LayoutError(f"CSV {table} has the columns {matches}, and either may be the {meaning}. Leave one.")
    if not matches and needed:
        raise LayoutError(
            f"CSV {table} has the columns {list(names)}, none of which is {' or '.join(choices)}. Rename the column that "
            f"holds the {meaning}."
        )
    return matches[0] if matches else None


def checked_label(value: object, where: str) -> int:
    try:
        number = float(value)  # type: ignore[arg-type]  # spreadsheets write 1 as "1.0"
    except (TypeError, ValueError):
        number = -1.0
    if number not in (0.0, 1.0):
        raise LayoutError(
            f"label {value!r} at {where} is neither 0 nor 1, and only two classes are supported. Recode the labels."
        )
    return int(number)


def named_path(row: LabelRow, seen: dict[str, int], *, folders: bool = False) -> Path:
    """The file (or folder, where allowed) that a line names; ``seen`` remembers which line named which.

    Raises:
        ValueError: where there is none, or an earlier line named it.
    """
    path = row.table.parent / row.name.strip()
    if not row.name.strip() or not (path.is_file() or (folders and path.is_dir())):
        raise LayoutError(
            f"line {row.line} of {row.table} names the file {row.name!r}, which does not exist in {row.table.parent}. "
            "Give paths relative to the CSV, or remove the line."
        )
    first = seen.setdefault(os.path.realpath(path), row.line)
    if first != row.line:
        raise LayoutError(
            f"line {row.line} of {row.table} names the file {row.name!r} a second time, after line {first}, so the image "
            "would count twice. Remove one line."
        )
    return path


def is_missing(patient_id: str) -> bool:
    return patient_id.strip().lower() in ("", "nan", "none")  # the last two are what pandas writes for no value


def patient_of(row: LabelRow, file: Path, from_dicom: str | None) -> str:
    """The patient of a line's image.

    Args:
        row: the line.
        file: of the image, for messages.
        from_dicom: PatientID in the image's header, perhaps empty; None where it is no DICOM file.

    Raises:
        ValueError: where no patient is known, or two are. No message shows an id: it may name a person, and messages end
            up in logs.
    """
    if row.patient_cell is not None:
        from_table = row.patient_cell.strip()
        if is_missing(from_table):
            raise LayoutError(
                f"patient id of {file} on line {row.line} of {row.table} is empty, so the image cannot be protected with "
                "its patient. Fill it in, or remove the line."
            )
        if from_dicom and from_dicom != from_table:
            raise LayoutError(
                f"patient id of {file} on line {row.line} of {row.table} is not the one in its DICOM header, and a "
                "patient under two ids is not protected. Correct the line, or de-identify the file with the same id."
            )
        return from_table
    if from_dicom is None:
        raise LayoutError(
            f"CSV {row.table} has no column patient_id, and {file} is no DICOM file that could tell the patient. Add the "
            "column."
        )
    if not from_dicom:
        raise LayoutError(
            f"PatientID of {file} is empty and CSV {row.table} has no column patient_id, so the image cannot be protected "
            "with its patient. Add the column."
        )
    return from_dicom
