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
"""The CT bundle as MONAI runs it: from DICOM series and NIfTI, with and without privacy, to probabilities and export."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser, ConfigWorkflow, ckpt_export, verify_metadata, verify_net_in_out
from pydicom.data import get_testdata_file

from monai_privacy import PrivacyLedger
from monai_privacy.bundle import PrivacyRequest, plan_bundle, read_bundle, score_bundle, train_bundle
from monai_privacy.data import count_patients, read_ct_volumes, write_datalist, write_synthetic_ct

BUNDLE = Path(__file__).parents[2] / "bundles" / "lung_nodule_ct_classification"
CONFIGS = BUNDLE / "configs"
TRAIN, PRETRAIN, PRIVATE = CONFIGS / "train.yaml", CONFIGS / "pretrain.yaml", CONFIGS / "private.yaml"
EVALUATE, INFERENCE, RESUME = CONFIGS / "evaluate.yaml", CONFIGS / "inference.yaml", CONFIGS / "resume.yaml"
METADATA = CONFIGS / "metadata.json"
OVERLAY = BUNDLE.parent / "overlays" / "dp_sgd.yaml"
SCHEMA = Path(__file__).parent / "meta_schema_20240725.json"
DELTA = 1e-3

pytestmark = pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")


class Data(NamedTuple):
    """Synthetic volumes, and the list of them."""

    volumes: Path
    folder: Path
    datalist: dict[str, Any]


@pytest.fixture(scope="module", params=["dicom", "nifti"])
def data(request, tmp_path_factory) -> Data:
    root = tmp_path_factory.mktemp("ct")
    volumes = write_synthetic_ct(root / "volumes", num_patients=16, file_format=request.param)
    path = write_datalist(read_ct_volumes(volumes), root / "list", seed=0, test_fraction=0.25, validation_fraction=0.2)
    return Data(volumes, root / "list", json.loads(path.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A warm start, as pretrain.yaml writes it."""
    root = tmp_path_factory.mktemp("pretrained")
    train_bundle([TRAIN, PRETRAIN], {"bundle_root": str(root), "num_volumes": 8, "epochs": 1})
    return root / "models" / "synthetic.pt"


def overrides(data: Data, folder: Path, **values: object) -> dict[str, Any]:
    places = {"dataset_dir": str(data.folder), "output_dir": str(folder), "ledger_file": str(folder / "ledger.jsonl")}
    return {"bundle_root": str(BUNDLE), "initial_weights": str(folder / "none.pt"), **places, **values}


def private(data: Data, folder: Path, weights: Path, **values: object) -> dict[str, Any]:
    """Overrides of a private training; its noise is given, since finding it takes seconds."""
    noise = {"uncalibrated_plan#noise_multiplier": 4.0, "plan": "@uncalibrated_plan"}
    numbers = {"epsilon": 8.0, "delta": DELTA, "epochs": 2, "initial_weights": str(weights)}
    return overrides(data, folder, **{**noise, **numbers, **values})


def network_of(checkpoint: Path) -> torch.nn.Module:
    parser = ConfigParser()
    parser.read_config(str(INFERENCE))
    network = parser.get_parsed_content("network_def").eval()
    network.load_state_dict(torch.load(checkpoint, weights_only=True))
    return network


def workflow(configs: Sequence[Path], kind: str, values: dict[str, Any]) -> ConfigWorkflow:
    made = ConfigWorkflow([str(path) for path in configs], workflow_type=kind, logging_file=False, **values)
    made.initialize()
    return made


# ------------------------------------------------------------------ MONAI's own checks


def test_metadata_follow_the_schema():
    verify_metadata(meta_file=str(METADATA), filepath=str(SCHEMA))


@pytest.mark.parametrize("config", [TRAIN, INFERENCE], ids=["train", "inference"])
def test_the_network_takes_and_gives_what_the_metadata_say(config):
    verify_net_in_out("network_def", meta_file=str(METADATA), config_file=str(config), device="cpu")


def test_training_and_inference_agree_on_network_and_preprocessing():
    train, inference = (ConfigParser.load_config_file(str(path)) for path in (TRAIN, INFERENCE))
    assert train["network_def"] == inference["network_def"]
    assert train["spatial_size"] == inference["spatial_size"] == train["network_def"]["in_shape"][1]
    own = [{k: v for k, v in step.items() if k != "track_meta"} for step in train["train"]["deterministic_transforms"]]
    assert own == inference["preprocessing"]["transforms"]


# ------------------------------------------------------------------ from files to a network


def test_a_plain_training_then_evaluation_and_inference(data, tmp_path):
    train_bundle([TRAIN], overrides(data, tmp_path, epochs=1))
    assert workflow([TRAIN], "train", overrides(data, tmp_path)).check_properties() == []
    scores = score_bundle([TRAIN, EVALUATE], overrides(data, tmp_path))
    assert len(scores.labels) == len(data.datalist["test"])
    assert set(scores.metrics) == {"auc", "accuracy", "sensitivity", "specificity"}
    files = [record["image"] for record in data.datalist["test"]]
    chosen = {"input_files": files, "checkpoint_file": str(tmp_path / "model.pt"), "output_dir": str(tmp_path / "eval")}
    inference = workflow([INFERENCE], "infer", {"bundle_root": str(BUNDLE), **chosen})
    inference.run()
    with open(tmp_path / "eval" / "probabilities.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert [float(row[2]) for row in rows] == pytest.approx(list(scores.values), abs=1e-5)


def test_a_private_training_trains_the_last_layer_from_synthetic_weights(data, weights, tmp_path):
    train_bundle([TRAIN, OVERLAY, PRIVATE], private(data, tmp_path, weights))
    (entry,) = PrivacyLedger(tmp_path / "ledger.jsonl").entries
    assert (entry.state, entry.steps, entry.unit) == ("committed", 4, "patient")
    assert entry.facts["num_patients"] == count_patients(data.datalist["training"]) < len(data.datalist["training"])
    before, after = torch.load(weights, weights_only=True), torch.load(tmp_path / "model.pt", weights_only=True)
    assert all(torch.equal(before[name], after[name]) for name in after if not name.startswith("final"))
    assert after["final.1.weight"].shape == (2, 512)
    network_of(tmp_path / "model.pt")


def test_the_last_layer_is_not_trained_on_random_ones(data, tmp_path):
    with pytest.raises(RuntimeError) as refusal:
        train_bundle([TRAIN, OVERLAY, PRIVATE], private(data, tmp_path, tmp_path / "none.pt"))
    assert "none.pt does not exist" in said(refusal.value)
    assert not (tmp_path / "model.pt").exists()


def test_all_layers_can_be_trained_privately_too(data, weights, tmp_path):
    values = private(data, tmp_path, weights, trained_layers=".*", epochs=1, num_views=2)
    train_bundle([TRAIN, OVERLAY, PRIVATE], values)
    before, after = torch.load(weights, weights_only=True), torch.load(tmp_path / "model.pt", weights_only=True)
    assert not torch.equal(before["net.layer_0.conv.weight"], after["net.layer_0.conv.weight"])


class StopAt:
    """Breaks the run off before a step, as a crash would."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_STARTED(once=self.iteration), self._stop)

    def _stop(self, engine: Engine) -> None:
        raise KeyboardInterrupt


def test_a_resumed_training_continues_its_ledger_entry(data, weights, tmp_path):
    values = private(data, tmp_path, weights, epochs=3)
    with pytest.raises(KeyboardInterrupt):
        train_bundle([TRAIN, OVERLAY, PRIVATE], values, handlers=[StopAt(iteration=4)])
    begun = PrivacyLedger(tmp_path / "ledger.jsonl").entries[0]
    assert begun.steps == 3
    train_bundle([TRAIN, OVERLAY, PRIVATE, RESUME], values)
    (entry,) = PrivacyLedger(tmp_path / "ledger.jsonl").entries
    assert (entry.entry_id, entry.steps) == (begun.entry_id, 6)


def test_the_export_computes_what_the_checkpoint_does(data, weights, tmp_path):
    train_bundle([TRAIN, OVERLAY, PRIVATE], private(data, tmp_path, weights, epochs=1))
    ckpt_export(
        "network_def",
        filepath=str(tmp_path / "model.ts"),
        ckpt_file=str(tmp_path / "model.pt"),
        meta_file=str(METADATA),
        config_file=[str(TRAIN), str(INFERENCE)],
    )
    image = torch.randn(2, 1, 32, 32, 32)
    torch.testing.assert_close(torch.jit.load(tmp_path / "model.ts")(image), network_of(tmp_path / "model.pt")(image))


def test_an_unreadable_volume_is_named_when_it_is_met(data, tmp_path):
    folder = tmp_path / "list"
    shutil.copytree(data.folder, folder)
    records = json.loads((folder / "datalist.json").read_text(encoding="utf-8"))
    records["training"][0]["image"] = str(tmp_path / "lost.nii.gz")
    (tmp_path / "lost.nii.gz").write_bytes(b"nothing")
    (folder / "datalist.json").write_text(json.dumps(records), encoding="utf-8")
    with pytest.raises(Exception) as refusal:
        train_bundle([TRAIN], overrides(data, tmp_path / "out") | {"dataset_dir": str(folder)})
    assert "lost.nii.gz cannot be loaded" in said(refusal.value)


def said(error: BaseException | None) -> str:
    """What an error and its causes say: MONAI wraps what a config's expression raises."""
    return "" if error is None else f"{error} {said(error.__cause__)}"


def test_real_dicom_goes_through_the_datalist_and_the_trainer(weights, tmp_path):
    # Two studies of real patients, in the pydicom wheel, with scouts and reports beside the slices.
    real = Path(get_testdata_file("CT_small.dcm")).parent / "dicomdirtests"
    shutil.copytree(real, tmp_path / "real")
    rows = "file,label\n98892001/CT5N,0\n77654033/CT2,1\n"
    (tmp_path / "real" / "labels.csv").write_text(rows, encoding="utf-8")
    source = read_ct_volumes(tmp_path / "real")
    assert [len(record["image"]) for record in source.records] == [5, 4]
    assert any("seem to be missing" in notice for notice in source.notices)
    write_datalist(source, tmp_path / "list", seed=0, test_fraction=0.0, validation_fraction=0.0)
    places = {"dataset_dir": str(tmp_path / "list"), "output_dir": str(tmp_path / "out"), "train#handlers": []}
    numbers = {"uncalibrated_plan#noise_multiplier": 4.0, "plan": "@uncalibrated_plan", "delta": 0.1, "epochs": 1}
    given = {"bundle_root": str(BUNDLE), "initial_weights": str(weights), "ledger_file": str(tmp_path / "l.jsonl")}
    train_bundle([TRAIN, OVERLAY, PRIVATE], places | numbers | given)
    (entry,) = PrivacyLedger(tmp_path / "l.jsonl").entries
    assert (entry.facts["num_patients"], entry.steps, entry.state) == (2, 2, "committed")


def test_check_finds_nothing_against_the_bundle(data):
    config = read_bundle([TRAIN], overrides(data, data.folder))
    plan = plan_bundle(config, PrivacyRequest())
    assert not plan.obstacles
    assert any("no layer mixes patients" in finding.what for finding in plan.findings)
