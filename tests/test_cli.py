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

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import yaml
from command_line import Done, assert_one_line, call

from monai_privacy import DPSGDPlan, PrivacyLedger
from monai_privacy.accounting import LedgerState, dpsgd_event
from monai_privacy.data import write_synthetic_chest_xrays
from monai_privacy.errors import user_message


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
    ({"epochs": 3}, "give one of them"),
    ({"noise-multiplier": 1}, "nothing left out: exactly one number can be found"),
]


@pytest.mark.parametrize(("change", "message"), BAD_NUMBERS)
def test_numbers_out_of_range_give_one_line(change, message):
    options = [f"--{name}={value}" for name, value in (GOOD | change).items()]
    assert_one_line(call("calibrate", *options), message)


def test_calibrate_finds_whichever_number_is_left_out():
    shared = ["--num-patients", 1000, "--epsilon", 2, "--json"]
    plan = DPSGDPlan(num_patients=1000, expected_batch_size=100, steps=30, delta=1e-5).calibrate(epsilon=2)
    size, steps, noise = (
        ["--expected-batch-size", 100], ["--steps", 30], ["--noise-multiplier", plan.noise_multiplier]
    )  # fmt: skip
    for known, name, expected in ((size + noise, "steps", 30), (steps + noise, "expected_batch_size", 100)):
        numbers = json.loads(call("calibrate", *shared, *known).stdout)
        assert numbers[name] == pytest.approx(expected, abs=1)
        assert numbers["epsilon"] <= 2
        one_more = DPSGDPlan(
            **{key: value for key, value in numbers.items() if key != "epsilon"} | {name: numbers[name] + 1}
        )
        assert one_more.epsilon() > 2
    assert_one_line(call("calibrate", *shared, *size), "--steps and --noise-multiplier left out")
    assert_one_line(call("calibrate", *shared, "--epochs", 3), "how many steps that is hangs on --expected-batch-size")


def test_delta_at_or_above_one_over_n_warns_in_one_line():
    done = call("calibrate", *[f"--{name}={value}" for name, value in (GOOD | {"delta": 0.001}).items()])
    assert done.returncode == 0
    (warning,) = [line for line in done.stderr.splitlines() if line]
    assert warning.startswith("warning: delta is 0.001, at or above 1/1000")


def test_report_reads_a_ledger(tmp_path):
    plan = DPSGDPlan(num_patients=100, expected_batch_size=10, steps=5, delta=1e-3, noise_multiplier=1.0)
    ledger = PrivacyLedger(tmp_path / "ledger.jsonl")
    entry = ledger.reserve(step=plan.step_event, planned_steps=5, delta=1e-3, unit="patient", facts=plan.to_dict())
    ledger.record_step(entry)
    assert "# Privacy report" in call("report", tmp_path / "ledger.jsonl").stdout
    told = json.loads(call("report", tmp_path / "ledger.jsonl", "--json").stdout)
    assert told["epsilon"] == pytest.approx(plan.epsilon(steps=1))


@pytest.fixture
def ledger(tmp_path) -> Path:
    """A registered cohort with one run of three of its five steps, open."""
    (tmp_path / "ids.txt").write_text("".join(f"patient-{number}\n" for number in range(100)), encoding="utf-8")
    path = tmp_path / "ledger.jsonl"
    done = call(
        "ledger", "register", path, "--cohort", "Lungs", "--epsilon", 8, "--delta", 1e-3, "--ids", tmp_path / "ids.txt"
    )
    assert done.returncode == 0, done.stderr
    assert "registered 'Lungs'" in done.stdout
    assert "100 patients; budget ε = 8 at δ = 0.001" in done.stdout
    book = PrivacyLedger(path)
    plan = DPSGDPlan(num_patients=100, expected_batch_size=10, steps=5, delta=1e-3, noise_multiplier=1.0)
    entry = book.reserve(
        step=plan.step_event, planned_steps=5, delta=1e-3, unit="patient", facts=plan.to_dict(), purpose="=first()"
    )
    for _ in range(3):
        book.record_step(entry)
    return path


def test_report_writes_three_files_and_verify_finds_them_true(ledger, tmp_path):
    folder = tmp_path / "report"
    done = call("report", ledger, "--output", folder)
    assert done.stdout.split() == [str(folder / f"privacy_report.{end}") for end in ("json", "md", "html")]
    assert json.loads(call("report", ledger, "--output", folder, "--json").stdout) == done.stdout.split()
    told = call("verify", folder / "privacy_report.json", ledger)
    assert (told.returncode, "says what" in told.stdout) == (0, True)
    assert json.loads(call("verify", folder / "privacy_report.json", ledger, "--json").stdout)["same"] is True
    text = (folder / "privacy_report.json").read_text(encoding="utf-8").replace('"steps": 3', '"steps": 2')
    (folder / "privacy_report.json").write_text(text, encoding="utf-8")
    told = call("verify", folder / "privacy_report.json", ledger)
    assert told.returncode == 3
    assert told.stdout == "entries.1.steps: the report says 2, the ledger gives 3\n"
    told = json.loads(call("verify", folder / "privacy_report.json", ledger, "--json").stdout)
    assert (told["same"], len(told["differences"])) == (False, 1)
    assert_one_line(call("verify", tmp_path / "none.json", ledger), "is no file")
    assert_one_line(call("verify", tmp_path / "ids.txt", ledger), "is no report")


def test_ledger_status_of_nobodys_ledger_says_what_is_missing(tmp_path):
    path = tmp_path / "ledger.jsonl"
    PrivacyLedger(path)
    told = call("ledger", "status", path).stdout
    assert "cohort: not registered, so nobody checks whose data are used" in told


def test_ledger_status_says_what_was_spent_by_whom(ledger):
    book = PrivacyLedger(ledger)
    told = call("ledger", "status", ledger).stdout
    for part in ("cohort: Lungs", "budget: ε = 8 at δ = 0.001", "=first()", book.entries[0].entry_id[:8], "reserved"):
        assert part in told
    found = json.loads(call("ledger", "status", ledger, "--json").stdout)
    assert found["epsilon"] == book.epsilon(1e-3) < found["reserved"] == book.state.epsilon(1e-3, reserved=True)
    assert found["entries"][0]["steps"] == 3
    assert found["cohort"]["num_units"] == 100
    assert json.loads(call("ledger", "status", ledger, "--delta", 1e-5, "--json").stdout)["epsilon"] == book.epsilon(
        1e-5
    )


def test_texts_with_brackets_are_shown_as_they_are(tmp_path):
    path = tmp_path / "ledger.jsonl"
    call("ledger", "register", path, "--cohort", "A [/b] [red]x[/red]", "--epsilon", 8, "--delta", 1e-3)
    plan = DPSGDPlan(num_patients=100, expected_batch_size=10, steps=5, delta=1e-3, noise_multiplier=1.0)
    book = PrivacyLedger(path)
    book.reserve(step=plan.step_event, planned_steps=5, delta=1e-3, unit="patient", purpose="see [/data/run1]")
    done = call("ledger", "status", path)
    assert done.returncode == 0, done.stderr
    assert "A [/b] [red]x[/red]" in done.stdout
    assert "see [/data/run1]" in done.stdout


@pytest.mark.slow(seconds=20)
def test_ledger_what_if_has_an_exit_code_for_no(ledger):
    run = ["ledger", "what-if", ledger, "--num-patients", 100, "--expected-batch-size", 10, "--steps", 20]
    before = ledger.read_bytes()
    done = call(*run, "--noise-multiplier", 2)
    assert (done.returncode, "; fits" in done.stdout) == (0, True)
    done = call(*run, "--noise-multiplier", 0.3)
    assert (done.returncode, "does not fit: only " in done.stdout) == (3, True)
    # Left out, the noise is the least that fits.
    found = json.loads(call(*run, "--json").stdout)
    assert found["fits"]
    assert 7.9 < found["epsilon_then"] <= 8
    less = call(*run, "--noise-multiplier", found["noise_multiplier"] * 0.99, "--json")
    assert (less.returncode, json.loads(less.stdout)["fits"]) == (3, False)
    assert ledger.read_bytes() == before
    plain = ledger.with_name("plain.jsonl")
    PrivacyLedger(plain)
    assert_one_line(call("ledger", "what-if", plain, *run[3:]), "has no budget, so any run fits")


def test_ledger_what_if_of_an_adaptive_cohort(tmp_path):
    path = tmp_path / "ledger.jsonl"
    call("ledger", "register", path, "--cohort", "Lungs", "--epsilon", 2, "--delta", 1e-5, "--adaptive")
    run = ["ledger", "what-if", path, "--num-patients", 1000, "--expected-batch-size", 50, "--steps", 50, "--json"]
    found = json.loads(call(*run).stdout)
    assert found["fits"]
    less = call(*run, "--noise-multiplier", found["noise_multiplier"] * 0.99)
    assert (less.returncode, json.loads(less.stdout)["fits"]) == (3, False)


def test_ledger_verify_names_the_line(ledger):
    done = call("ledger", "verify", ledger)
    assert (done.returncode, "5 lines follow one another" in done.stdout) == (0, True)
    assert "missing" not in done.stdout
    assert json.loads(call("ledger", "verify", ledger, "--json").stdout) == {
        "lines": 5, "sha256": LedgerState.of_file(ledger).last_hash,
        "within_budget": True, "end_is_known": True,
    }  # fmt: skip
    lines = ledger.read_bytes().splitlines(keepends=True)
    for changed, named in (
        ([*lines[:2], lines[2].replace(b'"step":1', b'"step":7'), *lines[3:]], "line 3"),
        ([*lines[:2], *lines[3:]], "line 3"),
        ([*lines[:2], lines[3], lines[2], lines[4]], "line 3"),
        ([*lines[:3], lines[2], *lines[3:]], "line 4"),
        (lines[:-1], "line 5: it is missing"),
        ([*lines[:-1], lines[-1].replace(b'"time":"2', b'"time":"1')], "line 5: it is not the line"),
    ):
        ledger.write_bytes(b"".join(changed))
        assert_one_line(call("ledger", "verify", ledger), named)
    ledger.write_bytes(b"".join(lines))
    ledger.with_name("ledger.jsonl.head").unlink()
    assert "its .head file is missing" in call("ledger", "verify", ledger).stdout


def test_ledger_export(ledger):
    found = json.loads(call("ledger", "export", ledger).stdout)
    assert found["cohort"]["name"] == "Lungs"
    assert found["budget"] == {"epsilon": 8.0, "delta": 1e-3}
    assert found["entries"][0]["event"]["kind"] == "poisson_sampled"
    (row,) = csv.DictReader(io.StringIO(call("ledger", "export", ledger, "--format", "csv").stdout))
    assert (row["steps"], row["purpose"]) == ("3", "'=first()"), "no formula for a spreadsheet"
    assert json.loads(row["event"]) == found["entries"][0]["event"]
    draft = yaml.safe_load(call("ledger", "export", ledger, "--format", "registry").stdout)
    assert draft["deployment"]["privacy_loss"]["privacy_unit"] == "patient-level"


def test_ledger_commit_and_void(ledger):
    book = PrivacyLedger(ledger)
    run = book.entries[0].entry_id
    other = book.reserve(step=book.entries[0].step, planned_steps=2, delta=1e-3, unit="patient")
    assert_one_line(call("ledger", "void", ledger, run[:8]), "it cannot be void. Commit it.")
    assert_one_line(call("ledger", "commit", ledger, other[:8]), "void it instead")
    assert_one_line(call("ledger", "commit", ledger, "zzz"), "0 runs of")
    assert "committed with 3 steps" in call("ledger", "commit", ledger, run[:8]).stdout
    assert json.loads(call("ledger", "void", ledger, other, "--json").stdout)["state"] == "void"
    assert [entry.state for entry in book.entries] == ["committed", "void"]
    assert_one_line(call("ledger", "void", ledger, other), "is void already")


@pytest.mark.parametrize("command", ["status", "verify", "export", "commit", "void", "what-if"])
def test_a_ledger_that_is_not_there_is_not_made(tmp_path, command):
    more = {"commit": ["x"], "void": ["x"]}.get(command, [])
    if command == "what-if":
        more = ["--num-patients", 9, "--expected-batch-size", 3, "--steps", 3]
    assert_one_line(call("ledger", command, tmp_path / "none.jsonl", *more), "is no ledger file")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num-patients": 0}, "num_patients is 0"),
        ({"expected-batch-size": 0}, "expected_batch_size is 0"),
        ({"expected-batch-size": 200}, "above the 100 patients"),
        ({"steps": 0}, "steps is 0"),
        ({"noise-multiplier": 0}, "noise_multiplier is 0.0"),
        ({"noise-multiplier": "nan"}, "noise_multiplier is nan"),
        ({"noise-multiplier": "1e-200"}, "noise_multiplier is 1e-200"),
        ({"noise-multiplier": "1e200"}, "noise_multiplier is 1e+200"),
        ({"steps": 10**20}, "steps is above 1000000000"),
        ({"delta": 2}, "delta is 2.0"),
    ],
)
def test_what_if_with_numbers_out_of_range_gives_one_line(ledger, change, message):
    numbers = {"num-patients": 100, "expected-batch-size": 10, "steps": 5, "noise-multiplier": 1} | change
    assert_one_line(
        call("ledger", "what-if", ledger, *[f"--{name}={value}" for name, value in numbers.items()]), message
    )


def test_ids_in_another_encoding_give_one_line(tmp_path):
    (tmp_path / "ids.txt").write_bytes("Müller\n".encode("latin-1"))
    new = ["ledger", "register", tmp_path / "new.jsonl", "--cohort", "Lungs", "--epsilon", 8, "--delta", 1e-3]
    assert_one_line(call(*new, "--ids", tmp_path / "ids.txt"), "is no UTF-8 text")
    (tmp_path / "ids.txt").write_bytes("\ufeffMüller\r\nMeier\r\n".encode())
    assert json.loads(call(*new, "--ids", tmp_path / "ids.txt", "--json").stdout)["num_units"] == 2
    step = dpsgd_event(sample_rate=0.1, noise_multiplier=5.0).event
    book, run = PrivacyLedger(tmp_path / "new.jsonl"), {"step": step, "planned_steps": 1, "unit": "patient"}
    assert book.require_room(**run, ids=["Müller", "Meier"]) == 1
    with pytest.raises(ValueError, match="not in the cohort"):
        book.require_room(**run, ids=["Müller", "Stranger"])


def test_bad_registrations_give_one_line(tmp_path, ledger):
    new = ["ledger", "register", tmp_path / "new.jsonl", "--cohort", "Lungs", "--epsilon", 8, "--delta", 1e-3]
    assert_one_line(call(*new, "--ids", tmp_path / "none.txt"), "does not exist")
    assert_one_line(call(*new, "--unit", "hospital"), "unit is 'hospital'")
    assert_one_line(call(*new, "--partitions", 2), "no ids were given")
    assert_one_line(call(*new[:2], ledger, *new[3:]), "a cohort is registered once")
    assert not (tmp_path / "new.jsonl").exists()
    assert json.loads(call(*new, "--json").stdout)["name"] == "Lungs"


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
        opened.reserve(step=plan.step_event, planned_steps=10**6, delta=1e-4, unit="patient", facts=plan.to_dict())
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
