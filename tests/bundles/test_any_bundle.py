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
"""Bundles that somebody else wrote: judged, made private by an overlay, trained, and their networks used."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from command_line import assert_one_line, call
from monai.bundle import ConfigWorkflow, ckpt_export, create_workflow
from monai.networks.nets import DenseNet
from third_party import EVALUATE, IMAGES_EACH, PATIENTS, SIDE, flat, nested, pretrained, write_bundle
from typer.testing import CliRunner

from monai_privacy import DPSupervisedTrainer, PrivacyBudgetError, PrivacyLedger
from monai_privacy.bundle import DPConfigWorkflow, PrivacyRequest, plan_bundle, read_bundle, write_overlays
from monai_privacy.bundle.reading import BundleConfig
from monai_privacy.bundle.serving import everywhere
from monai_privacy.cli import app
from monai_privacy.networks import FoldedBatchNorm

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning")

PATTERN = r"p(\d+)_"
DELTA = 1e-3
NAMED = {"patient_pattern": PATTERN, "delta": DELTA}


def verdicts(root: Path, **wishes: object) -> dict[str, list[str]]:
    """What was found, by verdict: "id: words"."""
    plan = plan_bundle(read_bundle([root]), PrivacyRequest(**{**NAMED, **wishes}))
    found: dict[str, list[str]] = {}
    for finding in plan.findings:
        found.setdefault(finding.verdict, []).append(f"{finding.where}: {finding.what}. {finding.remedy}")
    return found


def says(found: dict[str, list[str]], verdict: str, *words: str) -> bool:
    return any(all(word in text for word in words) for text in found.get(verdict, ()))


def overlays(root: Path, **wishes: object) -> list[Path]:
    config = read_bundle([root])
    return write_overlays(plan_bundle(config, PrivacyRequest(**{**NAMED, **wishes})), config, root / "configs")


def run(*configs: Path, kind: str = "train", **overrides: object) -> ConfigWorkflow:
    workflow = ConfigWorkflow([str(path) for path in configs], workflow_type=kind, logging_file=False, **overrides)
    workflow.initialize()
    workflow.run()
    workflow.finalize()
    return workflow


def entry_of(root: Path):
    (entry,) = PrivacyLedger(root / "data" / "ledger.jsonl").entries
    return entry


# ------------------------------------------------------------------ trained


@pytest.mark.parametrize(("make", "suffix"), [(nested, ".json"), (nested, ".yaml"), (flat, ".yaml"), (flat, ".json")])
def test_an_overlay_makes_a_bundle_private_in_either_layout_and_format(tmp_path, make, suffix):
    root = write_bundle(tmp_path / "bundle", make, suffix=suffix)
    before = (root / "configs" / f"train{suffix}").read_bytes()
    overlay, _ = overlays(root, epsilon=4.0)
    assert (overlay.suffix, (root / "configs" / f"train{suffix}").read_bytes()) == (suffix, before)
    workflow = run(root / "configs" / f"train{suffix}", overlay)
    trainer = workflow.parser.get_parsed_content("train#trainer" if make is nested else "trainer")
    assert isinstance(trainer, DPSupervisedTrainer)
    entry = entry_of(root)
    assert (entry.state, entry.steps, entry.facts["num_patients"]) == ("committed", 8, PATIENTS)
    assert PrivacyLedger(root / "data" / "ledger.jsonl").epsilon(DELTA) <= 4.0
    assert (root / "models" / "private" / "model.pt").is_file()
    assert not (root / "models" / "model.pt").exists()
    assert (root / "models" / "private" / "privacy_report.json").is_file()


def test_the_private_network_serves_inference_and_export(tmp_path):
    root = write_bundle(tmp_path / "bundle")
    overlay, network = overlays(root)
    run(root / "configs" / "train.json", overlay)
    workflow = run(root / "configs" / "inference.json", network, kind="infer")
    loaded = workflow.parser.get_parsed_content("network").state_dict()
    saved = torch.load(root / "models" / "private" / "model.pt", weights_only=True)
    assert all(torch.equal(loaded[key], saved[key]) for key in saved)
    ckpt_export(
        net_id="network_def",
        filepath=str(root / "model.ts"),
        ckpt_file=str(root / "models" / "private" / "model.pt"),
        meta_file=str(root / "configs" / "metadata.json"),
        config_file=[str(root / "configs" / "inference.json"), str(network)],
    )
    assert torch.jit.load(str(root / "model.ts"))(torch.zeros(1, 1, SIDE, SIDE)).shape == (1, 2)


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("loads", ["loader", "expression"])
def test_inference_under_other_names_takes_the_private_network(tmp_path, norm, loads):
    root = write_bundle(tmp_path / "bundle", change=lambda config: config["network_def"].update(norm=norm))
    inference = root / "configs" / "inference.json"
    config = json.loads(inference.read_text(encoding="utf-8"))
    del config["ckpt_dir"]
    config |= {
        "net": config.pop("network_def") | {"norm": norm},
        "network": "$@net.to(@device)",
        "weights": "$@bundle_root + '/models/model.pt'",
    }
    if loads == "loader":
        config["handlers"][0]["load_path"] = "@weights"
    else:
        config["handlers"] = []
        config["run"].insert(0, "$@network.load_state_dict(torch.load(@weights, weights_only=True))")
    inference.write_text(json.dumps(config), encoding="utf-8")
    # The network that the bundle came with lies where inference looks for it.
    with_norm = {**json.loads((root / "configs" / "train.json").read_text(encoding="utf-8"))["network_def"]}
    del with_norm["_target_"]
    (root / "models").mkdir()
    torch.save(DenseNet(**with_norm).state_dict(), root / "models" / "model.pt")
    overlay, network = overlays(root)
    run(root / "configs" / "train.json", overlay)
    loaded = run(inference, network, kind="infer").parser.get_parsed_content("network").state_dict()
    saved = torch.load(root / "models" / "private" / "model.pt", weights_only=True)
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[key], saved[key]) for key in saved)


@pytest.mark.parametrize("evaluated", ["$@ckpt_dir + '/model.pt'", "$@bundle_root + '/models/model.pt'"])
@pytest.mark.parametrize("inferred", ["component", "expression"])
def test_one_overlay_follows_evaluation_and_inference(tmp_path, inferred, evaluated):
    """As bundles of the model zoo have them: what one of the two configs changes inside, the other has not at all."""
    root = write_bundle(tmp_path / "bundle")
    inference, evaluate = (root / "configs" / f"{name}.json" for name in ("inference", "evaluate"))
    config = json.loads(inference.read_text(encoding="utf-8"))
    loader, path = config["handlers"].pop(), "$@bundle_root + '/models/model.pt'"
    if inferred == "component":
        config |= {"checkpointloader": loader | {"load_path": path}, "initialize": ["$@checkpointloader(@evaluator)"]}
    else:
        config |= {"checkpoint": path, "handlers": [loader | {"load_path": "$@checkpoint"}]}
    inference.write_text(json.dumps(config), encoding="utf-8")
    change = copy.deepcopy(EVALUATE)
    change["validate#handlers"][0]["load_path"] = evaluated
    evaluate.write_text(json.dumps(change), encoding="utf-8")
    train = root / "configs" / "train.json"
    pretrained(root)  # a network without privacy lies where the bundle's own configs look for one
    assert not says(verdicts(root), "noted", "may be a network without privacy")
    overlay, network = overlays(root)
    run(train, overlay)
    saved = torch.load(root / "models" / "private" / "model.pt", weights_only=True)
    for configs in ([train, evaluate, network], [inference, network]):
        loaded = run(*configs, kind="infer").parser.get_parsed_content("network").state_dict()
        assert loaded.keys() == saved.keys()
        assert all(torch.equal(loaded[key], saved[key]) for key in saved)


@pytest.mark.parametrize(
    "change",
    [
        {"validate#handlers#0#load_path": "$@bundle_root + '/models/model.pt'"},
        {"initialize": ["$monai.handlers.CheckpointLoader(@bundle_root + '/models/model.pt', {'model': @network})"]},
        {"network": "$torch.jit.load(@bundle_root + '/models/model.ts')"},
        {"run": ["$@validate#evaluator.run()"]},
    ],
)
def test_an_evaluation_that_does_not_show_what_it_loads_is_noted(tmp_path, change):
    root = write_bundle(tmp_path / "bundle")
    evaluate = root / "configs" / "evaluate.json"
    evaluate.write_text(json.dumps(EVALUATE), encoding="utf-8")
    assert not says(verdicts(root), "noted", "evaluate.json")
    hidden = {key: value for key, value in EVALUATE.items() if key != "validate#handlers"}
    evaluate.write_text(json.dumps(hidden | change), encoding="utf-8")
    assert says(verdicts(root), "noted", "evaluate.json does not show which", "without privacy")


def test_a_config_that_follows_inference_is_read_after_it(tmp_path):
    root = write_bundle(tmp_path / "bundle")
    change = {"handlers#0#_disabled_": True, "network": "$torch.jit.load(@bundle_root + '/models/model_trt.ts')"}
    (root / "configs" / "inference_trt.json").write_text(json.dumps(change), encoding="utf-8")
    assert says(verdicts(root), "noted", "inference_trt.json does not show which", "without privacy")


def test_a_folder_that_stands_inside_a_handler_is_followed(tmp_path):
    def change(config):
        config["train"]["handlers"][2]["save_dir"] = "$@bundle_root + '/models'"
        config["validate"]["handlers"].pop()

    root = write_bundle(tmp_path / "bundle", change=change)
    evaluate = copy.deepcopy(EVALUATE)
    evaluate["validate#handlers"][0]["load_path"] = "$@train#handlers#2#save_dir + '/model.pt'"
    (root / "configs" / "evaluate.json").write_text(json.dumps(evaluate), encoding="utf-8")
    found = verdicts(root)
    assert says(found, "changed", "evaluate.json loads the private network") or says(found, "noted", "evaluate.json")


def test_changes_that_no_one_overlay_can_make_are_noted():
    def config(content: dict) -> BundleConfig:
        return BundleConfig((), Path(), content)

    loader, other = {"load_path": "a"}, {"validator": "b"}
    change = {"handlers#0#load_path": "private/a"}
    alone, notes = everywhere(change, [config({"handlers": [loader]})])
    assert (alone, notes) == (change, [])
    both, notes = everywhere(change, [config({"handlers": [loader]}), config({"handlers": [loader, other]})])
    assert (both, notes) == (change, [])
    one_of_two, notes = everywhere(
        change | {"handlers#1#validator": "c"}, [config({"handlers": [loader, other]}), config({"net": 1})]
    )
    assert (one_of_two, notes) == ({"handlers": [{"load_path": "private/a"}, {"validator": "c"}]}, [])
    for others in ([{"handlers": [other]}], [{"handlers": [loader, other]}, {}]):
        none, (note,) = everywhere(change, [config({"handlers": [loader]}), *map(config, others)])
        assert none == {}
        assert (note.verdict, note.where) == ("noted", "handlers#0#load_path")
        assert "without privacy" in note.what
    assert everywhere({"net": 1}, [config({}), config({"net": {"a": 2}})]) == ({"net": 1}, [])


def test_what_bundles_run_besides_is_known(tmp_path):
    def change(config):
        config |= {
            "file": "$open(@dataset_dir + '/x.json', 'w')",
            "other": "$object()",
            "log": "$open('ids', 'w') if print(*@train#dataset) is None else 0",
        }
        config["initialize"] += ["$import sys", "$sys.path.append(@bundle_root)"]
        config["initialize"] += ["$sys.path.append('.') or print(*@train#dataset)", "$print(*@train#dataset#data)"]
        config["finalize"] = ["$@file.close()", "$@other.close()", "$@log.close()"]

    found = verdicts(write_bundle(tmp_path / "bundle", change=change))
    assert says(found, "noted", "finalize#2", "@log.close")
    assert says(found, "refused", "initialize#3", "looks at training patients")
    assert says(found, "refused", "initialize#4", "looks at training patients")
    assert not says(found, "noted", "initialize#2")
    assert not says(found, "noted", "@file.close")
    assert says(found, "noted", "finalize#1", "@other.close")


def test_no_records_here_are_not_no_patients(tmp_path):
    root = write_bundle(tmp_path / "bundle")
    for image in (root / "data" / "train").iterdir():
        image.unlink()
    assert says(verdicts(root), "asked", "no records are here", "--num-patients")
    found = verdicts(root, num_patients=PATIENTS)
    assert says(found, "noted", "no records are here", "the trainer looks for patient_id")
    assert "asked" not in found


def test_inference_that_does_not_show_what_it_loads_is_noted(tmp_path):
    root = write_bundle(tmp_path / "bundle")
    inference = root / "configs" / "inference.json"
    config = json.loads(inference.read_text(encoding="utf-8"))
    assert not says(verdicts(root), "noted", "inference.json")
    elsewhere = copy.deepcopy(config)
    elsewhere["handlers"][0]["load_path"] = "/elsewhere/model.pt"
    inference.write_text(json.dumps(elsewhere), encoding="utf-8")
    assert says(verdicts(root), "noted", "inference.json loads '/elsewhere/model.pt'", "without privacy")
    inference.write_text(json.dumps(config | {"handlers": []}), encoding="utf-8")
    assert says(verdicts(root), "noted", "inference.json does not show which network", "without privacy")
    done = call("overlay", root, "--patient-pattern", PATTERN, "--delta", DELTA)
    assert done.returncode == 0
    assert "inference.json does not show which network it uses" in done.stdout.splitlines()[-1]


def test_options_of_the_command_line_reach_the_plan(tmp_path):
    root = write_bundle(tmp_path / "bundle")
    overlay, _ = overlays(root)
    for name in ("epsilon", "privacy#epsilon"):
        made = ConfigWorkflow(
            [str(root / "configs" / "train.json"), str(overlay)],
            workflow_type="train",
            logging_file=False,
            **{name: 1.5},
        )
        made.parser.parse()
        assert made.parser.get_parsed_content("privacy#ledger").budget.epsilon == 1.5
        assert made.parser.get_parsed_content("privacy#plan").epsilon() <= 1.5
    root = write_bundle(tmp_path / "other", change=lambda config: config.update(epsilon=1e-8))
    overlay, _ = overlays(root)
    written = json.loads(overlay.read_text(encoding="utf-8"))
    assert "epsilon" not in written
    assert written["privacy"]["epsilon"] == 8.0


def test_pretrained_batch_norms_keep_what_they_learnt(tmp_path):
    root = write_bundle(tmp_path / "bundle")
    weights = pretrained(root)
    before = weights.read_bytes()
    overlay, network = overlays(root, batch_norm="fold", public_weights=weights)
    workflow = run(root / "configs" / "train.json", overlay)
    trained = workflow.parser.get_parsed_content("network")
    assert any(isinstance(module, FoldedBatchNorm) for module in trained.modules())
    assert any("batch-norm statistics" in text for text in entry_of(root).assumptions)
    assert weights.read_bytes() == before
    loaded = run(root / "configs" / "inference.json", network, kind="infer").parser.get_parsed_content("network")
    image = torch.randn(2, 1, SIDE, SIDE)
    assert torch.equal(loaded.eval()(image), trained.eval()(image))


def test_folding_starts_from_the_public_network(tmp_path):
    root = write_bundle(tmp_path / "bundle")
    weights = pretrained(root)
    overlay, _ = overlays(root, batch_norm="fold", public_weights=weights)
    workflow = ConfigWorkflow(
        [str(root / "configs" / "train.json"), str(overlay)], workflow_type="train", logging_file=False
    )
    workflow.initialize()
    folded = workflow.parser.get_parsed_content("network_def").eval()
    (plain,) = read_bundle([root]).evaluated("network_def")
    plain.load_state_dict(torch.load(weights, weights_only=True)["model"])
    image = torch.randn(2, 1, SIDE, SIDE)
    torch.testing.assert_close(folded(image), plain.eval()(image), rtol=1e-4, atol=1e-5)


def test_the_same_at_run_time_without_a_file(tmp_path):
    root = write_bundle(tmp_path / "bundle")
    workflow = create_workflow(
        "monai_privacy.DPConfigWorkflow",
        config_file=str(root / "configs" / "train.json"),
        logging_file=False,
        epsilon=4.0,
        max_epochs=1,
        **NAMED,
        **{"privacy#max_grad_norm": 0.5},
    )
    assert isinstance(workflow, DPConfigWorkflow)
    workflow.run()
    entry = entry_of(root)
    assert (entry.state, entry.steps, entry.facts["max_grad_norm"]) == ("committed", 4, 0.5)
    assert not (root / "configs" / "privacy.json").exists()


def test_what_cannot_be_private_is_refused_at_run_time(tmp_path):
    root = write_bundle(
        tmp_path / "bundle", change=lambda c: c["train"]["trainer"].update(iteration_update="$lambda: 0")
    )
    with pytest.raises(ValueError, match="iteration_update of your own"):
        DPConfigWorkflow(str(root / "configs" / "train.json"), logging_file=False, **NAMED)
    assert not (root / "data" / "ledger.jsonl").exists()


@pytest.mark.slow(seconds=30)
def test_with_the_bundles_own_multi_gpu_overlay(tmp_path):
    for attempt in range(3):
        root = write_bundle(tmp_path / f"bundle{attempt}")
        overlay, _ = overlays(root)
        names = str([f"configs/{name}" for name in ("train.json", "multi_gpu_train.json", overlay.name)])
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
             "-m", "monai.bundle", "run", "--config_file", names],
            cwd=root, capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        # Torch's gloo aborts now and then when it is taken down, after everything was done (torch 2.13).
        if "terminate called without an active exception" not in done.stderr:
            break
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    entry = entry_of(root)
    assert (entry.state, entry.steps) == ("committed", 8)


# ------------------------------------------------------------------ habits of other people's bundles


def test_a_zoo_classifier_is_judged_part_by_part(tmp_path):
    found = verdicts(write_bundle(tmp_path / "bundle"))
    assert says(found, "changed", "train#trainer:", "DPSupervisedTrainer")
    assert says(found, "changed", "network_def:", "batch norms", "group norms")
    assert says(found, "private", "loss:", "reduction (sum) has no say")
    assert says(found, "private", "initialize:", "set_determinism fixes neither")
    assert says(found, "private", "train#handlers#1:", "StatsHandler has nothing to show")
    assert says(found, "changed", "train#trainer#key_train_metric:", "left out")
    assert says(found, "unnoised", "train#handlers#0:", "validation patients")
    assert says(found, "unnoised", "validate#handlers#1:", "chosen by its metric")
    assert says(found, "changed", "ckpt_dir:", "private/")
    assert says(found, "changed", "train#dataset#data:", f"{PATIENTS * IMAGES_EACH} records of {PATIENTS} patients",
                f"One patient has {IMAGES_EACH} of them")  # fmt: skip
    assert not {"refused", "asked"} & set(found)


def test_without_patients_one_has_to_ask_for_images(tmp_path):
    root = write_bundle(tmp_path / "bundle")
    found = verdicts(root, patient_pattern=None)
    assert says(found, "asked", "train#dataset#data:", "without a patient id", "--patient-pattern", "--unit image")
    found = verdicts(root, patient_pattern=None, unit="image")
    assert says(found, "private", "24 records of 24 images", "Single images are protected")
    overlay, _ = overlays(root, patient_pattern=None, unit="image")
    run(root / "configs" / "train.json", overlay)
    report = (root / "models" / "private" / "privacy_report.md").read_text(encoding="utf-8")
    assert "| unit | image |" in report
    assert "any one image" in report.splitlines()[2]


def test_a_pattern_by_which_each_image_is_a_patient_is_told(tmp_path):
    """Such as one that takes the image's number for the patient's: the claim would be about images."""
    root = write_bundle(tmp_path / "bundle")
    found = verdicts(root, patient_pattern=r"(p\d+_\d+)\.npy")
    assert says(found, "changed", "24 records of 24 patients", "true only if nobody has two of them")


def test_an_overlay_of_an_earlier_call_does_not_outlive_it(tmp_path):
    """A conversion that is asked for no more would be applied by whoever names both files."""
    root = write_bundle(tmp_path / "bundle")
    assert [path.stem for path in overlays(root)] == ["privacy", "privacy_network"]
    config = read_bundle([root / "configs" / "train.json"])
    plan = replace(plan_bundle(config, PrivacyRequest(**NAMED)), network={})
    assert [path.stem for path in write_overlays(plan, config, root / "configs")] == ["privacy"]
    assert not list((root / "configs").glob("privacy_network*"))


@pytest.mark.parametrize("with_network", [False, True])
def test_an_overlay_that_a_plan_was_made_from_stays(tmp_path, with_network):
    root = write_bundle(tmp_path / "bundle")
    privacy, network = overlays(root)
    config = read_bundle([root / "configs" / "train.json", network if with_network else privacy])
    plan = plan_bundle(config, PrivacyRequest(**NAMED))
    assert bool(plan.training) is with_network
    write_overlays(replace(plan, network={}), config, root / "configs")
    assert privacy.exists()
    assert network.exists()


def test_a_table_names_the_patients(tmp_path):
    root = write_bundle(tmp_path / "bundle")
    table = root / "patients.csv"
    names = [f"p{patient:02d}_{image}.npy" for patient in range(PATIENTS) for image in range(IMAGES_EACH)]
    table.write_text("file,patient_id\n" + "".join(f"{name},X{name[:3]}\n" for name in names), encoding="utf-8")
    found = verdicts(root, patient_pattern=None, patient_table=table)
    assert says(found, "changed", f"of {PATIENTS} patients")


def test_a_number_of_patients_that_the_records_deny_is_not_taken(tmp_path):
    root = write_bundle(tmp_path / "bundle")
    assert says(verdicts(root, num_patients=24), "asked", f"{PATIENTS} patients, and you say 24")


def test_data_that_are_elsewhere_need_their_number(tmp_path):
    def elsewhere(config):
        config["images"] = "$open(@bundle_root + '/nowhere.json').read()"

    root = write_bundle(tmp_path / "bundle", change=elsewhere)
    assert says(verdicts(root), "asked", "nowhere.json", "--num-patients")
    found = verdicts(root, num_patients=500)
    assert says(found, "noted", "cannot be read here")
    assert not {"refused", "asked"} & set(found)
    overlay, _ = overlays(root, num_patients=500)
    written = json.loads(overlay.read_text(encoding="utf-8"))
    assert (written["privacy"]["num_patients"], written["expected_batch_size"]) == (500, 125)


def test_class_weights_and_fixed_statistics_are_assumptions(tmp_path):
    root = write_bundle(tmp_path / "bundle", flat)
    found = verdicts(root)
    assert says(found, "noted", "lossfn#weight:", "public")
    assert says(found, "noted", "preprocessing#transforms#3:", "subtrahend and divisor")
    overlay, _ = overlays(root)
    run(root / "configs" / "train.json", overlay)
    assumptions = entry_of(root).assumptions
    assert any("class weights" in text for text in assumptions)
    assert any("NormalizeIntensity" in text for text in assumptions)


def weighted(config):
    config["sampler"] = {
        "_target_": "torch.utils.data.WeightedRandomSampler", "weights": "$[1.0 + l for l in @labels]", "num_samples": 24
    }  # fmt: skip
    config["train_loader"] |= {"sampler": "@sampler", "shuffle": False}


def test_a_weighted_sampler_is_refused_or_left_out(tmp_path):
    root = write_bundle(tmp_path / "bundle", flat, suffix=".yaml", change=weighted)
    assert says(verdicts(root), "refused", "train_loader#sampler:", "WeightedRandomSampler", "--sampler drop")
    with pytest.raises(ValueError, match="WeightedRandomSampler"):
        overlays(root)
    assert not (root / "configs" / "privacy.yaml").exists()
    overlay, _ = overlays(root, sampler="drop")
    run(root / "configs" / "train.yaml", overlay)
    assert entry_of(root).state == "committed"


def crops(config):
    config["train"]["preprocessing"]["transforms"].insert(
        3,
        {
            "_target_": "RandSpatialCropSamplesd",
            "keys": "image",
            "roi_size": [8, 8],
            "num_samples": 4,
            "random_size": False,
        },
    )
    config["train"]["dataset"] |= {"_target_": "SmartCacheDataset", "replace_rate": 0.5, "cache_num": 4}
    config["train"]["dataloader"] |= {"_target_": "ThreadDataLoader", "repeats": 2}
    config["train"]["trainer"] |= {"accumulation_steps": 2, "amp": True}


def test_crops_caches_threads_and_mixed_precision(tmp_path):
    root = write_bundle(tmp_path / "bundle", change=crops)
    found = verdicts(root)
    assert says(found, "private", "train#preprocessing#transforms#3:", "4 samples", "clipped once")
    assert says(found, "changed", "train#dataset:", "CacheDataset takes its place")
    assert says(found, "changed", "train#dataloader#repeats:", "used several times")
    assert says(found, "changed", "train#trainer#accumulation_steps:")
    assert says(found, "noted", "train#trainer#amp:", "bf16")
    assert not {"refused", "asked"} & set(found)
    overlay, _ = overlays(root)
    run(root / "configs" / "train.json", overlay, **{"train#trainer#amp": False})
    assert entry_of(root).state == "committed"


def regression(config):
    config["network_def"] = {
        "_target_": "Regressor", "in_shape": [1, SIDE, SIDE], "out_shape": [1], "channels": [4, 8], "strides": [2, 2],
    }  # fmt: skip
    config["labels"] = "$[[float(os.path.basename(name)[1:3])] for name in @images]"
    config["loss"] = {"_target_": "torch.nn.MSELoss"}
    config["train"]["preprocessing"]["transforms"][-1]["keys"] = ["image", "label"]
    config["train"]["handlers"] = config["train"]["handlers"][2:]


def test_regression(tmp_path):
    root = write_bundle(tmp_path / "bundle", change=regression)
    found = verdicts(root)
    assert says(found, "private", "network_def:", "Regressor")
    paths = overlays(root)
    run(root / "configs" / "train.json", paths[0])
    assert entry_of(root).state == "committed"


def images_handler(config):
    config["train"]["handlers"].insert(
        1, {"_target_": "TensorBoardImageHandler", "log_dir": "@bundle_root", "batch_transform": "$lambda batch: batch"}
    )


def test_a_handler_that_shows_patients_is_switched_off(tmp_path):
    root = write_bundle(tmp_path / "bundle", change=images_handler)
    assert says(verdicts(root), "changed", "train#handlers#1:", "TensorBoardImageHandler", "switched off")
    overlay, _ = overlays(root)
    run(root / "configs" / "train.json", overlay)
    assert entry_of(root).state == "committed"


def on_disk(config):
    config["train"]["dataset"] = {
        "_target_": "PersistentDataset",
        "data": config["train"]["dataset"]["data"],
        "transform": "@train#preprocessing",
        "cache_dir": "$@bundle_root + '/cache'",
    }


def test_a_cache_on_the_disk_is_named(tmp_path):
    found = verdicts(write_bundle(tmp_path / "bundle", change=on_disk))
    assert says(found, "unnoised", "train#dataset:", "PersistentDataset keeps images", "/cache")


OWN_CODE = """
import torch
from monai.engines import SupervisedTrainer
class OwnTrainer(SupervisedTrainer):
    pass
class DPSupervisedTrainer(SupervisedTrainer):
    pass
def make_network():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 2))
"""


def own_trainer(config):
    config["train"]["trainer"]["_target_"] = "scripts.own.OwnTrainer"


def named_alike(config):
    config["train"]["trainer"]["_target_"] = "scripts.own.DPSupervisedTrainer"


def warm_up(config):
    config["initialize"].append("$scripts.own.warm_up(@network, @train#dataloader)")


def second_trainer(config):
    config["other"] = "$monai.engines.SupervisedTrainer(@device, 1, @train#dataloader, @network, @optimizer, @loss)"
    config["run"].insert(0, "$@other.run()")


def measured_patients(config):
    config["again"] = {**config["validate"]["evaluator"], "val_data_loader": "@train#dataloader"}
    config["run"].append("$@again.run()")


def gan(config):
    config["train"]["trainer"]["_target_"] = "GanTrainer"


def iterable(config):
    config["train"]["dataset"]["_target_"] = "monai.data.IterableDataset"


def patches(config):
    config["train"]["dataset"]["_target_"] = "PatchDataset"


def data_parallel(config):
    config["network"] = "$torch.nn.DataParallel(@network_def.to(@device))"


def lbfgs(config):
    config["optimizer"]["_target_"] = "torch.optim.LBFGS"


def batch_dice(config):
    config["loss"] = {"_target_": "DiceLoss", "batch": True}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (own_trainer, "OwnTrainer may have steps of its own"),
        (named_alike, "DPSupervisedTrainer may have steps of its own"),
        (warm_up, "looks at training patients outside of the trainer"),
        (second_trainer, "trains by an expression"),
        (measured_patients, "it measures training patients"),
        (gan, "GanTrainer trains two networks"),
        (iterable, "IterableDataset has no rows"),
        (patches, "rows of PatchDataset are patches"),
        (data_parallel, "DataParallel splits"),
        (lbfgs, "LBFGS evaluates the loss several times"),
        (batch_dice, "batch=True mixes the rows"),
    ],
)
def test_what_cannot_be_private_is_refused_with_the_reason(tmp_path, change, words):
    root = write_bundle(tmp_path / "bundle", change=change)
    (root / "scripts").mkdir()
    (root / "scripts" / "__init__.py").write_text("", encoding="utf-8")
    (root / "scripts" / "own.py").write_text(OWN_CODE, encoding="utf-8")
    assert says(verdicts(root), "refused", words)
    with pytest.raises(ValueError, match=words):
        overlays(root)


def test_a_network_of_the_bundles_own_code(tmp_path):
    def change(config):
        config["network_def"] = "$scripts_own.make_network()"
        config["imports"].append("$import scripts_own")

    root = write_bundle(tmp_path / "bundle", change=change)
    (root / "scripts_own.py").write_text(OWN_CODE, encoding="utf-8")
    found = verdicts(root)
    assert says(found, "private", "network_def:", "Sequential") or says(found, "private", "network:", "Sequential")


def test_a_private_bundle_stays_as_it_is(tmp_path):
    root = write_bundle(tmp_path / "bundle")
    overlay, _ = overlays(root)
    plan = plan_bundle(read_bundle([root / "configs" / "train.json", overlay]), PrivacyRequest())
    assert [finding.what for finding in plan.findings if finding.where == "train#trainer"] == [
        "it is private already, with the numbers of its own plan"
    ]
    assert not plan.training


def test_a_private_bundle_does_not_take_other_numbers(tmp_path):
    root = write_bundle(tmp_path / "bundle")
    overlay, _ = overlays(root)
    with pytest.raises(ValueError, match="private already"):
        DPConfigWorkflow([str(root / "configs" / "train.json"), str(overlay)], logging_file=False, epsilon=1.0)


def test_statements_that_are_not_known_are_assumptions_of_the_report(tmp_path):
    root = write_bundle(tmp_path / "bundle", change=lambda c: c["initialize"].append("$sorted([2, 1])"))
    assert says(verdicts(root), "noted", "initialize#1:", "sorted([2, 1])", "not known here")
    overlay, _ = overlays(root)
    run(root / "configs" / "train.json", overlay)
    assert any("sorted([2, 1])" in text for text in entry_of(root).assumptions)


def test_validation_on_training_patients_is_refused_where_names_tell_the_patients(tmp_path):
    root = write_bundle(tmp_path / "bundle")
    overlay, _ = overlays(root)
    # Where the overlay was written for other images.
    train = root / "configs" / "train.json"
    config = json.loads(train.read_text(encoding="utf-8")) | {"val_images": "$@images[:4]"}
    train.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(Exception) as refusal:
        run(root / "configs" / "train.json", overlay)
    assert "both trained on and validated on" in str(refusal.value.__cause__)


def test_overlays_hold_configs_only(tmp_path):
    root = write_bundle(tmp_path / "bundle")
    for path in overlays(root):
        text = path.read_text(encoding="utf-8")
        assert not [word for word in ("import", "lambda", "eval(", "__class__") if word in text]


# ------------------------------------------------------------------ command line


def test_the_command_line_checks_and_writes(tmp_path):
    root = write_bundle(tmp_path / "bundle")
    done = CliRunner().invoke(app, ["check", str(root)])
    assert done.exit_code == 3
    assert "only you know" in done.output
    done = CliRunner().invoke(app, ["check", str(root), "--patient-pattern", PATTERN])
    assert done.exit_code == 0, done.output
    assert "An overlay makes this training private" in done.output
    done = CliRunner().invoke(app, ["check", str(root), "--patient-pattern", PATTERN, "--json"])
    found = json.loads(done.output)
    assert found["private_by_overlay"] is True
    assert {finding["verdict"] for finding in found["findings"]} <= {"private", "changed", "unnoised", "noted"}
    done = CliRunner().invoke(app, ["overlay", str(root), "--epsilon", "8", "--output", str(tmp_path / "out")])
    assert done.exit_code == 3
    assert not (tmp_path / "out").exists()
    command = ["overlay", str(root), "--epsilon", "8", "--patient-pattern", PATTERN, "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "privacy.json").is_file()
    assert "python -m monai.bundle run" in done.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "does not exist"),
        (["{root}", "--unit", "hospital"], "must be patient or image"),
        (["{root}", "--batch-norm", "fold"], "without public_weights"),
        (["{root}", "--patient-pattern", "x", "--patient-table", "y"], "both given"),
        (["{root}/configs/metadata.json"], "has 0 trainers"),
    ],
)
def test_bad_input_is_one_line(tmp_path, arguments, words):
    root = write_bundle(tmp_path / "bundle")
    assert_one_line(call("check", *[text.format(root=root) for text in arguments]), words)


def test_a_broken_config_is_named(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text("trainer: [", encoding="utf-8")
    with pytest.raises(ValueError, match=r"train\.yaml cannot be read as configs"):
        read_bundle([path])
    path.write_text(yaml.safe_dump([1, 2]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"train\.yaml"):
        plan_bundle(read_bundle([path]), PrivacyRequest())


# ------------------------------------------------------------------ what a newcomer met


def test_a_smart_cache_goes_with_its_handler(tmp_path):
    def smart(config):
        config["train"]["dataset"] |= {"_target_": "SmartCacheDataset", "replace_rate": 0.5, "cache_num": 4}
        config["train"]["handlers"].insert(0, {"_target_": "SmartCacheHandler", "smartcacher": "@train#dataset"})

    root = write_bundle(tmp_path / "bundle", change=smart)
    assert says(verdicts(root), "changed", "SmartCacheHandler has no cache")
    overlay, _ = overlays(root)
    run(root / "configs" / "train.json", overlay, max_epochs=1)
    assert entry_of(root).steps


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"patient_pattern": "x("}, "no regular expression"),
        ({"patient_pattern": None, "patient_table": Path("nope.csv")}, "is no file"),
        ({"expected_batch_size": 1000}, "expected_batch_size is 1000, but there are"),
    ],
)
def test_bad_wishes_are_no_secret_of_the_number_of_patients(tmp_path, wishes, message):
    root = write_bundle(tmp_path / "bundle")
    with pytest.raises(ValueError, match=message):
        verdicts(root, num_patients=PATIENTS, **wishes)


def test_a_table_is_named_by_its_whole_path(tmp_path, monkeypatch):
    root = write_bundle(tmp_path / "bundle")
    images = sorted((root / "data").rglob("*.npy"))
    lines = [f"{path},{path.name[1:3]}" for path in images]
    (tmp_path / "table.csv").write_text("file,patient_id\n" + "\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    overlay, _ = overlays(root, patient_pattern=None, patient_table=Path("table.csv"))
    assert json.loads(overlay.read_text(encoding="utf-8"))["train#dataset#data"]["table"] == str(tmp_path / "table.csv")


def test_an_option_that_is_nearly_one_is_not_ignored(tmp_path):
    root = write_bundle(tmp_path / "bundle")
    with pytest.raises(ValueError, match="epsilom is no argument and no config id, and would be ignored: epsilon"):
        DPConfigWorkflow(str(root / "configs" / "train.json"), epsilom=1, logging_file=False, **NAMED)


def test_a_private_training_says_what_it_will_cost_and_check_that_it_is_private(tmp_path, caplog):
    root = write_bundle(tmp_path / "bundle")
    overlay, _ = overlays(root)
    with caplog.at_level("INFO"):
        run(root / "configs" / "train.json", overlay)
    assert "Private training: " in caplog.text
    assert "which cost ε = 7.99" in caplog.text
    told = call("check", root / "configs" / "train.json", overlay)
    assert told.returncode == 0
    assert told.stdout.splitlines()[-1] == "this training is private already, by the numbers of its own plan"


def test_a_budget_that_another_run_holds_is_said_to_be_held(tmp_path):
    root = write_bundle(tmp_path / "bundle")
    overlay, _ = overlays(root)
    made = ConfigWorkflow(
        [str(root / "configs" / "train.json"), str(overlay)], workflow_type="train", logging_file=False
    )
    made.initialize()
    trainer = made.parser.get_parsed_content("train#trainer")
    held = trainer.ledger.reserve(
        step=trainer.plan.step_event, planned_steps=trainer.plan.steps, delta=DELTA, unit="patient"
    )
    with pytest.raises(PrivacyBudgetError, match=f"Steps are reserved for {held[:8]}: resume that run, or free them"):
        trainer.run()


def test_patients_who_are_validated_on_as_well_are_seen_before_training(tmp_path):
    root = write_bundle(
        tmp_path / "bundle",
        change=lambda config: config.update(val_images="$sorted(glob.glob(@dataset_dir + '/val/*.npy')) + @images[:2]"),
    )
    assert says(verdicts(root), "asked", "1 patients are in training and in validation too", "Divide")
    assert not says(verdicts(root, unit="image"), "asked", "in validation too")
