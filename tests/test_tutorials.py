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

"""The tutorials run, and what is committed with them is whole and tells nothing about the machine that made it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parents[1] / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MACHINE_PATH = re.compile(r"/home/|/root/|/Users/|/tmp/|/var/folders/|/private/(?:var|tmp)/|[A-Za-z]:\\")
MAX_BYTES = 1_500_000

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(outputs: list[NotebookNode]) -> Iterator[str]:
    """What outputs say; not their pictures, whose base64 could spell anything."""
    for output in outputs:
        if output.output_type == "stream":
            yield output.text
        elif output.output_type == "error":
            yield "\n".join([output.ename, output.evalue, *output.traceback])
        else:
            yield from (str(value) for kind, value in output.data.items() if not kind.startswith("image/"))


def last_outputs(notebook: NotebookNode) -> str:
    cells = [cell for cell in code_cells(notebook) if cell.outputs]
    return "\n".join(texts(cells[-1].outputs))


def assert_clean(notebook: NotebookNode) -> None:
    for cell in code_cells(notebook):
        complaints = [o for o in cell.outputs if o.output_type == "error" or o.get("name") == "stderr"]
        assert not complaints, "\n".join(texts(complaints))


def assert_ends_with_report(notebook: NotebookNode) -> None:
    report = last_outputs(notebook)
    assert "# Privacy report" in report
    assert re.search(r"\| ε \| \d+\.\d+ \|", report)
    assert "| unit | patient |" in report
    assert "What it does not protect" in report


def test_there_are_tutorials():
    assert NOTEBOOKS


@each_notebook
def test_licence_comes_first(path):
    first = nbformat.read(path, 4).cells[0].source
    assert first.startswith("Copyright (c) monai_privacy contributors")
    assert "Licensed under the Apache License, Version 2.0" in first


@each_notebook
def test_committed_notebook_is_whole(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert path.stat().st_size < MAX_BYTES
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)
    assert_clean(notebook)
    assert_ends_with_report(notebook)
    assert any(cell.cell_type == "markdown" and cell.source.startswith("## Limits") for cell in notebook.cells)


@each_notebook
def test_committed_notebook_names_no_path_of_a_machine(path):
    for cell in code_cells(nbformat.read(path, 4)):
        for text in texts(cell.outputs):
            assert not MACHINE_PATH.search(text), text


@pytest.mark.parametrize(
    "text", ["/home/ada/x", "in /tmp/tmpq2/l.jsonl", "/Users/ada", r"C:\Users\ada", "/private/var/folders/zz"]
)
def test_paths_of_machines_are_recognised(text):
    assert MACHINE_PATH.search(text)


@pytest.mark.slow(seconds=60)
@each_notebook
def test_notebook_runs(path, tmp_path, monkeypatch):
    temporary, working = tmp_path / "temporary", tmp_path / "working"
    temporary.mkdir()
    working.mkdir()
    monkeypatch.setenv("MONAI_PRIVACY_TUTORIAL_QUICK", "1")
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, 4)
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(working)}}
    ).execute()
    assert_clean(notebook)
    assert_ends_with_report(notebook)
    assert not any(working.iterdir())
    assert not list(temporary.rglob("*.dcm"))
    assert not list(temporary.rglob("*.jsonl"))
