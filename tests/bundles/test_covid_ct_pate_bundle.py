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

"""The PATE bundle: MONAI's own checks, and the whole story on synthetic images."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from command_line import assert_one_line, call
from monai.bundle import ckpt_export, verify_metadata, verify_net_in_out

from monai_privacy.accounting.ledger import PrivacyLedger
from monai_privacy.data import write_synthetic_ct

BUNDLE = Path(__file__).parents[2] / "bundles" / "covid_ct_pate"
SMALL = ["--hospitals", 2, "--teachers", 2, "--queries", 12, "--synthetic-patients", 60, "--epsilon", 2]
CPU = ["--override", "device=cpu", "--override", "epochs=3"]


def test_metadata_follows_monais_schema(tmp_path):
    shutil.copy(Path(__file__).parent / "meta_schema_20240725.json", tmp_path / "schema.json")
    verify_metadata(
        meta_file=str(BUNDLE / "configs" / "metadata.json"), filepath=str(tmp_path / "schema.json"), hash_val=None
    )


def test_the_network_fits_its_metadata_and_is_exported(tmp_path):
    common = {"meta_file": str(BUNDLE / "configs" / "metadata.json"), "device": "cpu"}
    config = str(BUNDLE / "configs" / "inference.yaml")
    verify_net_in_out("network_def", config_file=config, **common)
    from monai.bundle import ConfigParser

    parser = ConfigParser(ConfigParser.load_config_file(config))
    torch.save(parser.get_parsed_content("network_def").state_dict(), tmp_path / "model.pt")
    ckpt_export(
        "network_def", filepath=str(tmp_path / "model.ts"), ckpt_file=str(tmp_path / "model.pt"), config_file=config,
        meta_file=common["meta_file"], use_trace=True, input_shape=[1, 1, 96, 96],
    )  # fmt: skip
    image = torch.rand(3, 1, 96, 96)
    exported = torch.jit.load(tmp_path / "model.ts")
    torch.testing.assert_close(exported(image), parser.get_parsed_content("network_def")(image))


def test_volumes_after_the_bundles_configs(tmp_path):
    from monai.bundle import ConfigParser

    folder = write_synthetic_ct(tmp_path / "ct", num_patients=4, file_format="nifti")
    for name in ("train.yaml", "inference.yaml"):
        files = [str(BUNDLE / "configs" / file) for file in (name, "volumes.yaml")]
        parser = ConfigParser(ConfigParser.load_config_files(files))
        parser["device"] = "cpu"
        image = parser.get_parsed_content("preprocessing")({"image": str(next(folder.rglob("*.nii.gz")))})["image"]
        assert image.shape == (1, 32, 32, 32)
        assert parser.get_parsed_content("network")(image[None]).shape == (1, 2)


def told(run):
    """The story as it ended, on synthetic images."""
    done = call(*run, "--allow-uninformative", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["synthetic"]
    assert found["queries"] == 12
    assert 1.99 < found["epsilon"] <= 2
    return found


@pytest.mark.slow(seconds=60)
def test_the_story_with_volumes(tmp_path):
    story = tmp_path / "story"
    run = ["pate", "run", BUNDLE, story, *SMALL, *CPU, "--ct", "--overlay", "configs/volumes.yaml"]
    told(run)
    with (story / "labels.csv").open() as file:
        assert all(row["image"].endswith(".nii.gz") for row in csv.DictReader(file))


@pytest.mark.slow(seconds=90)
def test_the_whole_story_and_again_at_no_cost(tmp_path):
    story = tmp_path / "story"
    run = ["pate", "run", BUNDLE, story, *SMALL, *CPU]
    # Four teachers: refused before anybody trains.
    assert_one_line(call(*run), "a student learns little")
    assert not (story / "ledger.jsonl").exists()
    found = told(run)
    assert 0 <= found["student_auc"] <= 1
    assert PrivacyLedger(story / "ledger.jsonl").entries[0].steps == 12
    with (story / "labels.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 12
    votes = json.loads((story / "hospital-1" / "votes.json").read_text())
    assert votes["num_teachers"] == 2
    again = told(run)
    assert {k: again[k] for k in ("epsilon", "label_accuracy")} == {k: found[k] for k in ("epsilon", "label_accuracy")}
    assert PrivacyLedger(story / "ledger.jsonl").entries[0].steps == 12
    text = (story / "report" / "privacy_report.md").read_text(encoding="utf-8")
    assert "GNMax" in text
    assert "whoever counted the votes is trusted" in text
