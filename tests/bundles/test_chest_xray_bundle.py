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

"""The chest X-ray bundle as MONAI runs it: checks, training, privacy by overlay, evaluation, inference, export."""

from __future__ import annotations

import csv
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import monai.bundle
import nibabel
import numpy as np
import pydicom
import pytest
import torch
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser, ConfigWorkflow, ckpt_export, verify_metadata, verify_net_in_out
from PIL import Image

from monai_privacy import DPSGDPlan, PrivacyLedger, PrivacyReport
from monai_privacy.bundle import score_bundle, train_bundle
from monai_privacy.data import count_patients, read_chest_xrays, write_datalist, write_synthetic_chest_xrays

BUNDLE = Path(__file__).parents[2] / "bundles" / "chest_xray_classification"
CONFIGS = BUNDLE / "configs"
TRAIN, EVALUATE, RESUME = CONFIGS / "train.yaml", CONFIGS / "evaluate.yaml", CONFIGS / "resume.yaml"
INFERENCE, MULTI_GPU, METADATA = CONFIGS / "inference.yaml", CONFIGS / "multi_gpu_train.yaml", CONFIGS / "metadata.json"
OVERLAY = BUNDLE.parent / "overlays" / "dp_sgd.yaml"
# A reconstruction from MONAI's specification; without --filepath the command downloads the published one.
SCHEMA = Path(__file__).parent / "meta_schema_20240725.json"
TARGET_EPSILON = 3.0
DELTA = 1e-3  # below 1 / number of training patients, as few as they are

# MONAI warns before it runs any config, and attributes it to the caller.
pytestmark = pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")


class Data(NamedTuple):
    """Synthetic X-rays and their datalist."""

    images: Path
    folder: Path
    datalist: dict[str, Any]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Data:
    root = tmp_path_factory.mktemp("data")
    source = read_chest_xrays(write_synthetic_chest_xrays(root / "images", num_patients=30, image_size=48))
    path = write_datalist(source, root / "list", seed=0)
    return Data(root / "images", root / "list", json.loads(path.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory) -> Path:
    """The folder of a plain training."""
    folder = tmp_path_factory.mktemp("plain")
    train_bundle([TRAIN], overrides(data, folder, epochs=1))
    return folder


class Run(NamedTuple):
    """What a command left and wrote."""

    folder: Path
    ledger: Path
    log: str


@pytest.fixture(scope="module")
def private(data, tmp_path_factory) -> Run:
    """A private training by the command of the bundle's README, into the folder that it chooses itself."""
    root = tmp_path_factory.mktemp("private")
    values = {"epsilon": TARGET_EPSILON, "delta": DELTA, "epochs": 2}
    log = bundle_command([TRAIN, OVERLAY], dataset_dir=data.folder, bundle_root=root, **values)
    return Run(root / "models" / "private", data.folder / "ledger.jsonl", log)


def bundle_command(configs: Sequence[Path], *, launcher: Sequence[str] = (), **values: object) -> str:
    """``python -m monai.bundle run`` as the bundle's README says, in the bundle's folder; what it wrote."""
    names = str([os.path.relpath(path, BUNDLE) for path in configs])
    options = [text for name, value in values.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-W", "ignore", *launcher, "-m", "monai.bundle", "run", "--config_file", names, *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=BUNDLE, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def overrides(data: Data, folder: Path, **values: object) -> dict[str, Any]:
    # A ledger for each folder: the default one lies beside the datalist, which the tests share.
    places = {"dataset_dir": str(data.folder), "output_dir": str(folder), "ledger_file": str(folder / "ledger.jsonl")}
    return {"bundle_root": str(BUNDLE), **places, **values}


def private_overrides(noise_multiplier: float = 4.0) -> dict[str, Any]:
    """Overrides that give the overlay's plan its noise: finding it takes seconds, which one test spends."""
    noise = {"uncalibrated_plan#noise_multiplier": noise_multiplier, "plan": "@uncalibrated_plan"}
    return noise | {"epsilon": TARGET_EPSILON, "delta": DELTA}


def workflow(configs: Sequence[Path], kind: str, values: Mapping[str, Any]) -> ConfigWorkflow:
    made = ConfigWorkflow([str(path) for path in configs], workflow_type=kind, logging_file=False, **values)
    made.initialize()
    return made


def classify(files: Sequence[Path], model: Path, folder: Path, **values: object) -> list[list[str]]:
    """The rows of probabilities.csv."""
    chosen = {"input_files": [str(file) for file in files], "checkpoint_file": str(model), "output_dir": str(folder)}
    run = workflow([INFERENCE], "infer", chosen | {"bundle_root": str(BUNDLE), **values})
    run.run()
    run.finalize()
    return probabilities(folder)


def probabilities(folder: Path) -> list[list[str]]:
    with open(folder / "probabilities.csv", newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


# ------------------------------------------------------------------ MONAI's own checks


def test_metadata_follows_the_schema():
    verify_metadata(meta_file=str(METADATA), filepath=str(SCHEMA))


@pytest.mark.parametrize("missing", ["task", "network_data_format"])
def test_the_schema_notices_what_is_missing(tmp_path, missing):
    metadata = json.loads(METADATA.read_text(encoding="utf-8"))
    del metadata[missing]
    (tmp_path / "metadata.json").write_text(json.dumps(metadata), encoding="utf-8")
    with pytest.raises(ValueError, match=f"'{missing}' is a required property"):
        verify_metadata(meta_file=str(tmp_path / "metadata.json"), filepath=str(SCHEMA))


def test_the_changelog_names_the_version():
    metadata = json.loads(METADATA.read_text(encoding="utf-8"))
    assert metadata["version"] in metadata["changelog"]


@pytest.mark.parametrize("config", [TRAIN, INFERENCE], ids=["train", "inference"])
def test_the_network_takes_and_gives_what_the_metadata_say(config):
    verify_net_in_out("network_def", meta_file=str(METADATA), config_file=str(config), device="cpu")


@pytest.mark.parametrize(
    ("configs", "kind"),
    [([TRAIN], "train"), ([TRAIN, OVERLAY], "train"), ([TRAIN, EVALUATE], "train"), ([INFERENCE], "infer")],
    ids=["train", "private", "evaluate", "inference"],
)
def test_the_workflow_has_every_property_that_monai_asks_for(data, tmp_path, configs, kind):
    values = overrides(data, tmp_path, **(private_overrides() if OVERLAY in configs else {}))
    assert workflow(configs, kind, values).check_properties() == []


def test_the_export_computes_what_the_checkpoint_does(private, tmp_path):
    ckpt_export(
        "network_def",
        filepath=str(tmp_path / "model.ts"),
        ckpt_file=str(private.folder / "model.pt"),
        meta_file=str(METADATA),
        config_file=[str(TRAIN), str(INFERENCE)],
    )
    extra = {"metadata.json": ""}
    exported = torch.jit.load(tmp_path / "model.ts", _extra_files=extra)
    assert json.loads(extra["metadata.json"]) == json.loads(METADATA.read_text(encoding="utf-8"))
    images = torch.randn(3, 1, 32, 32)
    torch.testing.assert_close(exported(images), network_of(private.folder / "model.pt")(images))


def network_of(checkpoint: Path) -> torch.nn.Module:
    """The network that inference.yaml defines, with these weights."""
    parser = ConfigParser()
    parser.read_config(str(INFERENCE))
    network = parser.get_parsed_content("network_def").eval()
    network.load_state_dict(torch.load(checkpoint, weights_only=True))
    return network


def test_training_and_inference_agree_on_network_and_preprocessing():
    train, inference = (ConfigParser.load_config_file(str(path)) for path in (TRAIN, INFERENCE))
    assert train["network_def"] == inference["network_def"]
    assert train["image_size"] == inference["image_size"] == train["network_def"]["in_shape"][1:]

    def steps(preprocessing: dict[str, Any]) -> list[dict[str, Any]]:
        # Inference keeps the file's name with the image, for ClassificationSaver.
        return [{k: v for k, v in step.items() if k != "track_meta"} for step in preprocessing["transforms"]]

    assert steps(train["train"]["preprocessing"]) == steps(inference["preprocessing"])
    assert train["validate"]["preprocessing"] == "%train#preprocessing"


# ------------------------------------------------------------------ training


@pytest.mark.parametrize(
    "configs", [[TRAIN], [TRAIN, EVALUATE], [TRAIN, OVERLAY]], ids=["train", "evaluate", "private"]
)
def test_without_prepared_data_one_line_says_how_to_make_them(tmp_path, configs, capfd):
    with pytest.raises(SystemExit) as stop:
        monai.bundle.run(config_file=[str(path) for path in configs], bundle_root=str(tmp_path), logging_file=False)
    assert stop.value.code == (
        f"error: {tmp_path}/data/datalist.json does not exist: the images are not prepared. "
        f"Run: python -m monai_privacy prepare <your images> {tmp_path}/data (with --ct for CT volumes)"
    )
    assert "Traceback" not in "".join(capfd.readouterr())
    assert not list(tmp_path.rglob("*.jsonl"))


def test_a_list_without_test_images_is_named(data, tmp_path):
    (tmp_path / "datalist.json").write_text(json.dumps(data.datalist | {"test": []}), encoding="utf-8")
    with pytest.raises(SystemExit, match="has no test images"):
        score_bundle([TRAIN, EVALUATE], overrides(data, tmp_path / "out") | {"dataset_dir": str(tmp_path)})


def test_private_and_plain_training_have_folders_of_their_own(tmp_path):
    folders = []
    for configs in ([TRAIN], [TRAIN, OVERLAY]):
        made = ConfigWorkflow([str(path) for path in configs], "train", logging_file=False, bundle_root=str(tmp_path))
        folders.append(Path(made.parser.get_parsed_content("output_dir")))
    assert folders == [tmp_path / "models", tmp_path / "models" / "private"]


def test_plain_training_leaves_a_model_and_nothing_of_privacy(plain):
    assert {path.name for path in plain.iterdir()} == {"model.pt", "resume_checkpoint_epoch=1.pt"}
    network_of(plain / "model.pt")


def test_private_training_stays_below_its_epsilon_and_reports_it(private, data):
    (entry,) = PrivacyLedger(private.ledger).entries
    plan = DPSGDPlan.from_dict(entry.facts)
    assert plan.num_patients == count_patients(data.datalist["training"]) < len(data.datalist["training"])
    assert plan.expected_batch_size == round(0.28 * plan.num_patients)
    assert entry.unit == plan.unit == "patient"
    assert entry.steps == entry.planned_steps == 2 * plan.steps_per_epoch
    recomputed = PrivacyReport.from_ledger(private.ledger)
    assert (private.folder / "privacy_report.md").read_text(encoding="utf-8") == recomputed.to_markdown()
    report = json.loads((private.folder / "privacy_report.json").read_text(encoding="utf-8"))
    assert report == json.loads(recomputed.to_json())
    assert report["entries"][0]["state"] == "committed"
    assert set(report["entries"][0]["artifacts"]) == {"code", "model"}
    assert 0.95 * TARGET_EPSILON < report["epsilon"] <= TARGET_EPSILON
    assert (report["unit"], report["delta"], report["status"]) == ("patient", DELTA, "formal, with assumptions")
    assert report["budget"] == {"epsilon": TARGET_EPSILON, "delta": DELTA}
    network_of(private.folder / "model.pt")  # the same network, no other names or shapes


def test_private_training_logs_epsilon_and_no_training_loss(private):
    assert len(re.findall(r"Metrics -- epsilon: \d\.\d", private.log)) == 2
    assert "train_loss" not in private.log


def test_a_second_training_on_a_spent_ledger_is_refused_and_replaces_nothing(private, data):
    files = [private.ledger, *private.folder.iterdir()]
    before = [file.read_bytes() for file in files]
    (entry,) = PrivacyLedger(private.ledger).entries
    values = private_overrides(entry.facts["noise_multiplier"]) | {"epochs": 2, "ledger_file": str(private.ledger)}
    # MONAI wraps what a config's expression raises.
    with pytest.raises(RuntimeError) as refusal:
        train_bundle([TRAIN, OVERLAY], overrides(data, private.folder, **values))
    said = str(refusal.value.__cause__)
    assert "budget (epsilon 3, delta 0.001)" in said
    assert "is spent" in said
    assert [file.read_bytes() for file in files] == before


class StopAt:
    """Breaks the run off before a step, as a crash would."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_STARTED(once=self.iteration), self._stop)

    def _stop(self, engine: Engine) -> None:
        raise KeyboardInterrupt


def test_a_resumed_training_continues_its_ledger_entry(data, tmp_path):
    # Calibrated, so that its own reservation leaves no room for another run.
    values = overrides(data, tmp_path, epochs=3, epsilon=TARGET_EPSILON, delta=DELTA)
    with pytest.raises(KeyboardInterrupt):
        train_bundle([TRAIN, OVERLAY], values, handlers=[StopAt(iteration=6)])
    ledger = PrivacyLedger(tmp_path / "ledger.jsonl")
    (begun,) = ledger.entries
    assert begun.steps == 5
    assert json.loads((tmp_path / "privacy_report.json").read_text(encoding="utf-8"))["entries"][0]["steps"] == 4
    trainer = train_bundle([TRAIN, OVERLAY, RESUME], values)
    (entry,) = ledger.entries
    assert entry.entry_id == begun.entry_id == trainer.ledger_entry
    # Four steps an epoch; the fifth was released before the interruption and is charged beside its repetition.
    assert entry.steps == entry.planned_steps == 12
    assert trainer.state.iteration == 11
    assert json.loads((tmp_path / "privacy_report.json").read_text(encoding="utf-8"))["entries"][0]["steps"] == 12
    network_of(tmp_path / "model.pt")


def test_a_private_training_does_not_go_on_from_a_plain_one(plain, data, tmp_path):
    shutil.copy(plain / "resume_checkpoint_epoch=1.pt", tmp_path)
    values = overrides(data, tmp_path, epochs=2, **private_overrides())
    with pytest.raises(RuntimeError) as refusal:
        train_bundle([TRAIN, OVERLAY, RESUME], values)
    assert "'ledger_entry' is absent" in str(innermost(refusal.value))
    assert not PrivacyLedger(tmp_path / "ledger.jsonl").entries
    assert not (tmp_path / "model.pt").exists()


def test_resuming_takes_the_newest_checkpoint(data, tmp_path, caplog):
    values = overrides(data, tmp_path)
    with caplog.at_level(logging.INFO):
        train_bundle([TRAIN], values | {"epochs": 3})
    losses = [float(loss) for loss in re.findall(r"train_loss: (\d+\.\d+)", caplog.text)]  # no private training logs it
    assert losses[-1] < losses[0]
    assert sorted(tmp_path.glob("resume_*.pt")) == [tmp_path / f"resume_checkpoint_epoch={n}.pt" for n in (2, 3)]
    resumed: list[int] = []

    class NoteEpochs:
        def attach(self, engine: Engine) -> None:
            engine.add_event_handler(Events.EPOCH_STARTED, lambda e: resumed.append(e.state.epoch))

    train_bundle([TRAIN, RESUME], values | {"epochs": 4}, handlers=[NoteEpochs()])
    assert resumed == [4]


def test_data_without_patient_ids_are_protected_by_image_or_not_at_all(data, tmp_path):
    datalist = {name: data.datalist[name] for name in ("training", "validation")}
    unnamed = {
        name: [{"image": record["image"], "label": record["label"]} for record in records]
        for name, records in datalist.items()
    }
    (tmp_path / "datalist.json").write_text(json.dumps(unnamed), encoding="utf-8")
    values = overrides(data, tmp_path / "out", epochs=1, **private_overrides()) | {"dataset_dir": str(tmp_path)}
    with pytest.raises(RuntimeError) as refusal:
        train_bundle([TRAIN, OVERLAY], values)
    assert "without a patient id" in str(innermost(refusal.value))
    assert not list((tmp_path / "out").iterdir())
    train_bundle([TRAIN, OVERLAY], values | {"unit": "image"})
    report = json.loads((tmp_path / "out" / "privacy_report.json").read_text(encoding="utf-8"))
    assert report["unit"] == "image"
    assert report["entries"][0]["facts"]["num_patients"] == len(unnamed["training"])
    assert "single images" in report["claim"]


def innermost(error: BaseException) -> BaseException:
    return error if error.__cause__ is None else innermost(error.__cause__)


# ------------------------------------------------------------------ evaluation and inference


def test_evaluation_measures_the_test_patients(plain, data):
    scores = score_bundle([TRAIN, EVALUATE], overrides(data, plain))
    assert list(scores.labels) == [record["label"] for record in data.datalist["test"]]
    labels, values = np.array(scores.labels), np.array(scores.values)
    guesses = values > 0.5
    expected = {
        "auc": np.mean(values[labels == 1][:, None] > values[labels == 0]),
        "accuracy": np.mean(guesses == labels),
        "sensitivity": np.mean(guesses[labels == 1]),
        "specificity": np.mean(~guesses[labels == 0]),
    }
    assert scores.metrics == pytest.approx(expected, abs=1e-6)
    with open(plain / "metrics.csv", newline="", encoding="utf-8") as file:
        saved = {name: float(value) for name, value in csv.reader(file)}
    assert saved == pytest.approx(expected, abs=1e-6)


def test_metrics_are_plain_numbers_where_scores_are_tied(plain, data, tmp_path):
    # MONAI's AUC is then a numpy.float32.
    constant = {name: torch.zeros_like(value) for name, value in network_of(plain / "model.pt").state_dict().items()}
    torch.save({"model": constant}, tmp_path / "model.pt")
    scores = score_bundle([TRAIN, EVALUATE], overrides(data, tmp_path))
    assert scores.metrics["auc"] == 0.5
    assert json.loads(json.dumps(scores.metrics)) == scores.metrics


def test_all_formats_get_the_probabilities_of_the_evaluation(plain, data, tmp_path):
    scores = score_bundle([TRAIN, EVALUATE], overrides(data, plain))
    by_name = dict(zip([record["image"] for record in data.datalist["test"]], scores.values, strict=True))
    chosen = list(by_name)[:2]
    files = [form for number, file in enumerate(chosen) for form in forms_of(Path(file), tmp_path / str(number))]
    expected = [[1 - by_name[file], by_name[file]] for file in chosen for _ in range(4)]
    assert abs(expected[0][1] - expected[4][1]) > 1e-4  # two images, not one score for all
    for batch_size in (1, 3):
        rows = classify(files, plain / "model.pt", tmp_path / "out", batch_size=batch_size)
        assert [row[0] for row in rows] == [str(file) for file in files]
        np.testing.assert_allclose([[float(cell) for cell in row[1:]] for row in rows], expected, atol=1e-5)


def forms_of(file: Path, folder: Path) -> list[Path]:
    """The picture in a DICOM file as it is, with the other polarity, as PNG and as NIfTI."""
    folder.mkdir()
    dataset = pydicom.dcmread(file)
    pixels = dataset.pixel_array
    inverted = (2**dataset.BitsStored - 1 - pixels).astype(pixels.dtype)
    is_inverted = dataset.PhotometricInterpretation == "MONOCHROME1"
    bright = inverted if is_inverted else pixels
    Image.fromarray(bright).save(folder / "image.png")
    nibabel.save(nibabel.Nifti1Image(bright.T.astype(np.int16), np.eye(4)), folder / "image.nii.gz")
    dataset.PhotometricInterpretation = "MONOCHROME2" if is_inverted else "MONOCHROME1"
    dataset.PixelData = inverted.tobytes()
    dataset.save_as(folder / "inverted.dcm")
    return [file, folder / "inverted.dcm", folder / "image.png", folder / "image.nii.gz"]


def test_one_dicom_file_is_classified_from_the_private_checkpoint(private, data, tmp_path, capsys):
    file = data.datalist["test"][0]["image"]
    values = {"input_files": [file], "checkpoint_file": str(private.folder / "model.pt"), "output_dir": str(tmp_path)}
    # What the command calls.
    monai.bundle.run(config_file=str(INFERENCE), logging_file=False, **values)
    assert "1 images to classify" in capsys.readouterr().out
    ((name, normal, pneumonia),) = probabilities(tmp_path)
    assert name == file
    assert float(normal) + float(pneumonia) == pytest.approx(1.0, abs=1e-6)
    scores = score_bundle([TRAIN, EVALUATE], overrides(data, private.folder))
    assert float(pneumonia) == pytest.approx(scores.values[0], abs=1e-5)


def test_a_folder_is_classified_by_its_pattern(plain, data, tmp_path):
    run = workflow(
        [INFERENCE],
        "infer",
        {
            "dataset_dir": str(data.images),
            "checkpoint_file": str(plain / "model.pt"),
            "output_dir": str(tmp_path),
        },
    )
    run.run()
    dicom = sorted(data.images.rglob("*.dcm"))
    assert [row[0] for row in probabilities(tmp_path)] == [str(file) for file in dicom]


# ------------------------------------------------------------------ several processes


@pytest.mark.slow(seconds=30)
def test_two_processes_train_one_private_network(data, tmp_path):
    values = {
        "dataset_dir": data.folder,
        "output_dir": tmp_path,
        "ledger_file": tmp_path / "ledger.jsonl",
        "epochs": 2,
        **private_overrides(),
    }
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    bundle_command([TRAIN, MULTI_GPU, OVERLAY], launcher=launcher, device="$torch.device('cpu')", **values)
    (entry,) = PrivacyLedger(tmp_path / "ledger.jsonl").entries
    assert entry.steps == entry.planned_steps == 2 * DPSGDPlan.from_dict(entry.facts).steps_per_epoch
    assert entry.facts["num_patients"] == count_patients(data.datalist["training"])
    assert (tmp_path / "privacy_report.md").exists()
    network_of(tmp_path / "model.pt")
