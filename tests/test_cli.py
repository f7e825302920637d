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

"""The command line: right answers, exit codes for scripts, and one clear line for each kind of bad input."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from monai_privacy import DPSGDPlan, PrivacyLedger
from monai_privacy.cli import main
from monai_privacy.data import write_synthetic_chest_xrays
from monai_privacy.errors import user_message


@dataclass(frozen=True)
class Done:
    """What a call printed and its exit code."""

    stdout: str
    stderr: str
    returncode: int


def call(*arguments: object) -> Done:
    """Run the command line as a user does, but in this process: starting torch takes seconds."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", ["monai_privacy", *map(str, arguments)]),
        mock.patch.dict(os.environ, COLUMNS="120"),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Done(out.getvalue(), err.getvalue(), code)


def assert_one_line(done: Done, message: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert message in errors[0]


@pytest.fixture(scope="module")
def xrays(tmp_path_factory) -> Path:
    """Synthetic chest X-rays of 40 patients, as DICOM files with a CSV."""
    return write_synthetic_chest_xrays(
        tmp_path_factory.mktemp("data") / "xrays", num_patients=40, image_size=32, seed=1
    )


def test_calibrate_prints_the_noise():
    options = ["--num-patients", 1000, "--expected-batch-size", 100, "--epsilon", 2, "--epochs", 3]
    done = call("calibrate", *options, "--json")
    numbers = json.loads(done.stdout)
    plan = DPSGDPlan(num_patients=1000, expected_batch_size=100, steps=30, delta=1e-5).calibrate(epsilon=2)
    assert numbers["noise_multiplier"] == plan.noise_multiplier
    assert numbers["epsilon"] <= 2
    told = call("calibrate", *options).stdout
    assert f"noise_multiplier {plan.noise_multiplier:g} for 30 steps" in told
    assert plan.epsilon() <= float(told.split("ε = ")[1].split()[0]) <= 2


GOOD = {"num-patients": 1000, "expected-batch-size": 100, "epsilon": 2, "steps": 30, "delta": 1e-5}
BAD_NUMBERS = [
    ({"expected-batch-size": 2000}, "expected_batch_size is 2000, above the 1000 patients"),
    ({"epsilon": 0}, "epsilon is 0.0"),
    ({"epsilon": -1}, "epsilon is -1.0"),
    ({"epsilon": "nan"}, "epsilon is nan"),
    ({"epsilon": "inf"}, "epsilon is inf"),
    ({"delta": 0}, "delta is 0.0"),
    ({"delta": 1}, "delta is 1.0"),
    ({"num-patients": 0}, "num_patients is 0"),
    ({"epochs": 3}, "exactly one is needed"),
]


@pytest.mark.parametrize(("change", "message"), BAD_NUMBERS)
def test_numbers_out_of_range_give_one_line(change, message):
    options = [f"--{name}={value}" for name, value in (GOOD | change).items()]
    assert_one_line(call("calibrate", *options), message)


def test_delta_at_or_above_one_over_n_warns_in_one_line():
    done = call("calibrate", *[f"--{name}={value}" for name, value in (GOOD | {"delta": 0.001}).items()])
    assert done.returncode == 0
    (warning,) = [line for line in done.stderr.splitlines() if line]
    assert warning.startswith("warning: delta is 0.001, at or above 1/1000")


def test_report_reads_a_ledger(tmp_path):
    plan = DPSGDPlan(num_patients=100, expected_batch_size=10, steps=5, delta=1e-3, noise_multiplier=1.0)
    ledger = PrivacyLedger(tmp_path / "ledger.jsonl")
    entry = ledger.begin(step=plan.step_event, planned_steps=5, delta=1e-3, unit="patient", facts=plan.to_dict())
    ledger.record_step(entry)
    assert "# Privacy report" in call("report", tmp_path / "ledger.jsonl").stdout
    told = json.loads(call("report", tmp_path / "ledger.jsonl", "--json").stdout)
    assert told["epsilon"] == pytest.approx(plan.epsilon(steps=1))


def test_a_missing_or_damaged_ledger_gives_one_line(tmp_path):
    assert_one_line(call("report", tmp_path / "none.jsonl"), "is no ledger file")
    (tmp_path / "bad.jsonl").write_text("not json\n", encoding="utf-8")
    assert_one_line(call("report", tmp_path / "bad.jsonl"), "line 1: no valid JSON")


def test_bad_input_in_a_process_of_its_own():
    command = [sys.executable, "-m", "monai_privacy", "report", "nowhere.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert_one_line(Done(done.stdout, done.stderr, done.returncode), "nowhere.jsonl is no ledger file")


def test_version_and_help():
    assert call("--version").stdout.startswith("monai-privacy 0.")
    assert "calibrate" in call("--help").stdout


def test_prepare_writes_a_datalist(xrays, tmp_path):
    done = call("prepare", xrays, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "SYNTHETIC" in done.stdout
    datalist = json.loads((tmp_path / "datalist.json").read_text(encoding="utf-8"))
    assert datalist["training"][0].keys() >= {"image", "label", "patient_id"}


def test_demo_compares_and_says_synthetic_unit_and_places(xrays, tmp_path):
    done = call("demo", "--data", xrays, "--output", tmp_path, "--epochs", 2, "--epsilon", 3, "--delta", 1e-3)
    assert done.returncode == 0, done.stderr
    for told in ("SYNTHETIC", "without privacy", "with privacy", "one patient", "AUC", "ε", "0.001", "epoch 2/2"):
        assert told in done.stdout, told
    (folder,) = tmp_path.iterdir()
    for place in ("with_privacy/privacy_report.md", "with_privacy/model.pt", "demo.png", "ledger.jsonl"):
        assert (folder / place).is_file()
        assert place in done.stdout
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert summary["synthetic"]
    assert 2.9 < summary["epsilon"] <= 3
    assert "loss" not in done.stdout.lower()


def test_demo_on_a_file_without_patient_ids_protects_images_and_says_so(tmp_path):
    generator = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 60), ("val", 20), ("test", 20)):
        labels = np.arange(count) % 2
        images = generator.integers(0, 100, (count, 28, 28)) + 100 * labels[:, None, None]
        arrays |= {f"{split}_images": images.astype(np.uint8), f"{split}_labels": labels[:, None].astype(np.uint8)}
    np.savez(tmp_path / "medmnist.npz", **arrays)
    done = call(
        "demo", "--data", tmp_path / "medmnist.npz", "--output", tmp_path / "out", "--epochs", 1, "--delta", 1e-3
    )
    assert done.returncode == 0, done.stderr
    assert "one image" in done.stdout
    assert "no patient ids" in done.stdout
    report = next((tmp_path / "out").rglob("privacy_report.md")).read_text(encoding="utf-8")
    assert "This protects single images" in report


def break_dicom(folder: Path) -> None:
    next(folder.rglob("*.dcm")).write_bytes(b"not a DICOM file")


def rewrite_csv(folder: Path, change) -> None:
    path = folder / "labels.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    rows = [change(number, row) for number, row in enumerate(rows)]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


BAD_DATA = {
    "unreadable DICOM": (break_dicom, ".dcm"),
    "no patient ids": (lambda f: rewrite_csv(f, lambda n, row: row | {"patient_id": ""}), "patient"),
    "label out of range": (
        lambda f: rewrite_csv(f, lambda n, row: row | {"label": 7 if n == 3 else row["label"]}),
        "7",
    ),
    "no images": (lambda f: [p.unlink() for p in f.rglob("*.dcm")], ""),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_gives_one_line_and_nothing_is_trained(case, tmp_path):
    spoil, message = BAD_DATA[case]
    folder = write_synthetic_chest_xrays(tmp_path / "data", num_patients=6, image_size=32, seed=0)
    spoil(folder)
    assert_one_line(call("demo", "--data", folder, "--output", tmp_path / "out"), message)
    assert not (tmp_path / "out").exists()


def test_no_data_and_too_few_patients_give_one_line(xrays, tmp_path):
    assert_one_line(call("demo", "--data", tmp_path / "nowhere", "--output", tmp_path / "out"), "nowhere")
    (tmp_path / "empty").mkdir()
    assert_one_line(call("demo", "--data", tmp_path / "empty", "--output", tmp_path / "out"), "empty")
    assert not (tmp_path / "out").exists()


def test_data_that_do_not_exist_are_refused_before_anything_is_imported(tmp_path):
    heavy = {"monai_privacy.demo": None, "monai_privacy.data": None}  # an import of either would fail
    with mock.patch.dict(sys.modules, heavy):
        assert_one_line(call("demo", "--data", tmp_path / "nowhere"), "nowhere does not exist")
        assert_one_line(call("prepare", tmp_path / "nowhere", tmp_path), "nowhere does not exist")


BAD_DEMO_NUMBERS = {
    "--epochs=0": "epochs is 0",
    "--epochs=-1": "epochs is -1",
    "--epsilon=0": "epsilon is 0.0",
    "--delta=0": "delta is 0.0",
    "--delta=0.1": "delta is 0.1, at or above 1 / ",
    "--expected-batch-size=0": "expected_batch_size is 0",
    "--expected-batch-size=500": "expected_batch_size is 500, above the",
}


@pytest.mark.parametrize("option", BAD_DEMO_NUMBERS)
def test_demo_refuses_bad_numbers_before_training_and_leaves_nothing(xrays, tmp_path, option):
    options = ["--data", xrays, "--output", tmp_path / "out", "--ledger", tmp_path / "cohort.jsonl"]
    with mock.patch("monai_privacy.demo.train_bundle", side_effect=AssertionError("trained")):
        done = call("demo", *options, option)
    assert_one_line(done, BAD_DEMO_NUMBERS[option])
    # Nor a ledger: its budget could not be changed any more.
    assert not list(tmp_path.iterdir())


def test_a_full_disk_gives_one_line_and_releases_nothing(xrays, tmp_path):
    # Enough for the datalist and the models, too little for a long ledger.
    ledger = tmp_path / "cohort.jsonl"
    plan = DPSGDPlan(num_patients=100, expected_batch_size=10, steps=10**6, delta=1e-4, noise_multiplier=50.0)
    opened = PrivacyLedger(ledger)
    for _ in range(60):
        opened.begin(step=plan.step_event, planned_steps=10**6, delta=1e-4, unit="patient", facts=plan.to_dict())
    size = ledger.stat().st_size
    entries = opened.entries
    limit = max(size + 300, 10_000)
    code = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
from monai_privacy import PrivacyLedger
from monai_privacy.errors import user_message
ledger = PrivacyLedger({str(ledger)!r})
acknowledged = 0
try:
    while True:
        ledger.record_step({entries[0].entry_id!r})
        acknowledged += 1
except Exception as error:
    print(acknowledged, user_message(error))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    acknowledged, message = done.stdout.strip().split(" ", 1)
    assert "nothing was released" in message
    assert PrivacyLedger(ledger).entries[0].steps == int(acknowledged)


def test_a_ledger_that_cannot_be_written_stops_the_demo_before_training(xrays, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    done = call(
        "demo", "--data", xrays, "--output", tmp_path / "out", "--epochs", 1, "--delta", 1e-3,
        "--ledger", tmp_path / "file" / "ledger.jsonl",
    )  # fmt: skip
    assert_one_line(done, "cannot hold a ledger")
    assert "epoch" not in done.stdout
    assert not (tmp_path / "out").exists()


def test_a_standing_ledger_refuses_what_the_cohort_cannot_afford(xrays, tmp_path):
    options = ["demo", "--data", xrays, "--epochs", 1, "--delta", 1e-3, "--ledger", tmp_path / "cohort.jsonl"]
    assert call(*options, "--output", tmp_path / "one").returncode == 0
    spent = call(*options, "--output", tmp_path / "two")
    assert_one_line(spent, "is spent")
    assert "epoch" not in spent.stdout  # not even the training without privacy
    assert_one_line(call(*options, "--output", tmp_path / "two", "--epsilon", 9), "a cohort's budget is fixed")
    assert not (tmp_path / "two").exists()


def test_faults_of_the_program_keep_their_traceback():
    assert user_message(KeyError("x")) is None
    wrapped = RuntimeError("wrapped")
    wrapped.__cause__ = ValueError("the\nreason")
    assert user_message(wrapped) == "the reason"
    assert "Is a directory" in (user_message(IsADirectoryError(21, "Is a directory", "x")) or "")
