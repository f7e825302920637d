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

"""The demo's folder and threads; what it prints is tested with the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ignite.engine import Engine
from rich.console import Console

from monai_privacy import demo
from monai_privacy.data import write_synthetic_chest_xrays


@pytest.fixture(scope="module")
def xrays(tmp_path_factory) -> Path:
    return write_synthetic_chest_xrays(tmp_path_factory.mktemp("data") / "xrays", num_patients=40, image_size=32)


def leave(output: Path, *, trained: bool) -> None:
    """Fail in a folder of a run, before or after its training began."""
    engine = Engine(lambda engine, batch: None)

    def fail() -> None:
        with demo._RunFolder(output) as run:
            run.attach(engine)
            (run.path / "datalist.json").touch()
            if trained:
                engine.run([0])
            raise KeyError

    with pytest.raises(KeyError):
        fail()


def test_what_fails_before_training_leaves_no_folder(tmp_path):
    leave(tmp_path / "new" / "output", trained=False)
    assert not list(tmp_path.iterdir())


def test_what_fails_before_training_leaves_the_folders_that_were_there(tmp_path):
    (tmp_path / "output" / "earlier").mkdir(parents=True)
    leave(tmp_path / "output", trained=False)
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["earlier"]


def test_what_fails_in_training_keeps_its_folder(tmp_path):
    leave(tmp_path / "output", trained=True)
    assert list((tmp_path / "output").rglob("datalist.json"))


def test_it_trains_in_one_thread_and_gives_the_others_back(xrays, tmp_path, monkeypatch):
    threads = []

    def train(*_: object, **__: object) -> None:
        threads.append(torch.get_num_threads())
        raise ValueError("enough")

    monkeypatch.setattr(demo, "train_bundle", train)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ValueError, match="enough"):
            demo.run_demo(data=xrays, epsilon=3, delta=1e-3, output=tmp_path / "out", console=Console(quiet=True))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert threads == [1]
    assert not (tmp_path / "out").exists()
