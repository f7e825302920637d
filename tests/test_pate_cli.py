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


"""``pate plan``: answers, exit codes, a picture, and one clear line for bad input."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from command_line import assert_one_line, call
from PIL import Image

from monai_privacy.accounting import PrivacyLedger
from monai_privacy.pate import VotingPlan, advice
from monai_privacy.pate.hospital_votes import HospitalVotes, write_hospital_votes
from monai_privacy.report.numbers import rounded_up

BLOG = ["pate", "plan", "--teachers", 5, "--queries", 163, "--classes", 2, "--epsilon", 8]
GOOD = ["pate", "plan", "--teachers", 25, "--queries", 163, "--epsilon", 8, "--hospitals", 5]


def test_a_hopeless_plan_is_refused_with_numbers_and_ways_out():
    done = call(*BLOG)
    assert done.returncode == 3
    assert done.stderr == ""
    told = advice(VotingPlan(5, 163, 2, 8.0))
    assert "5 teachers, 163 queries, 2 classes: ε = 8 at δ = 1e-05 for a patient in at most 1 teacher" in done.stdout
    assert "standard deviation 10.84 votes" in done.stdout
    for line in ("25 teachers, 5 for each of 5 hospitals", "6 queries", "ε = 67.56, which protects hardly anybody"):
        assert f"  {line}\n" in done.stdout
    assert all(f"\n{line}\n" in done.stdout for line in told.alternatives)
    last = done.stdout.splitlines()[-1]
    assert last == f"refused: {told.refusal} --allow-uninformative overrides."


def test_bars_are_as_long_as_the_share():
    rows = {}
    for line in call(*BLOG).stdout.splitlines():
        name, _, rest = line.strip().partition("  ")
        if "█" in rest:
            rows[name] = (rest.split("%")[0].strip(), rest.count("█"))
    assert rows["100 %"] == ("62.7", 25)
    assert rows["60 %"] == ("52.6", 21)
    assert rows["5"] == ("60.2", 24)
    assert rows["25"] == ("90.4", 36)
    assert rows["250"] == ("100", 40)
    assert len(rows) == 10


def test_override_is_said():
    done = call(*BLOG, "--allow-uninformative")
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1].startswith("overridden by --allow-uninformative")
    assert "refused" not in done.stdout


def test_a_good_plan_needs_no_override():
    for extra in ([], ["--allow-uninformative"]):
        done = call(*GOOD, *extra)
        assert done.returncode == 0
        assert "25 teachers in 5 hospitals, 163 queries" in done.stdout
        assert "25 teachers, 5 for each of 5 hospitals" in done.stdout
        assert "refused" not in done.stdout
        assert "overridden" not in done.stdout
        assert "Sub-teachers" not in done.stdout


def test_informative_labels_below_the_target_show_the_ways_out_and_are_not_refused():
    done = call("pate", "plan", "--teachers", 15, "--queries", 163, "--epsilon", 8)
    assert done.returncode == 0
    assert "Sub-teachers: each of 15 hospitals splits" in done.stdout
    assert "refused" not in done.stdout


def test_json_is_the_advice():
    done = call(*BLOG, "--json")
    assert done.returncode == 3
    expected = json.loads(json.dumps(advice(VotingPlan(5, 163, 2, 8.0)).to_dict()))
    assert json.loads(done.stdout) == expected | {"overridden": False, "plot": None}
    done = call(*BLOG, "--json", "--allow-uninformative")
    assert done.returncode == 0
    assert json.loads(done.stdout)["overridden"] is True
    assert done.stderr.startswith("overridden by --allow-uninformative")


def test_every_option_reaches_the_plan():
    done = call(
        "pate", "plan", "--teachers", 60, "--queries", 50, "--epsilon", 3, "--classes", 4, "--delta", 1e-6,
        "--teachers-per-patient", 2, "--agreement", 0.8, "--target", 0.95, "--hospitals", 6, "--json",
    )  # fmt: skip
    plan = VotingPlan(60, 50, 4, 3.0, 1e-6, 2)
    expected = advice(plan, hospitals=6, agreement=0.8, target=0.95).to_dict()
    found = json.loads(done.stdout)
    assert found == json.loads(json.dumps(expected)) | {"overridden": False, "plot": None}
    assert found["plan"] == {
        "num_teachers": 60, "num_queries": 50, "num_classes": 4, "epsilon": 3.0, "delta": 1e-6, "teachers_per_patient": 2,
        "noise_std": plan.noise_std,
    }  # fmt: skip


def test_plot_is_drawn_instead_of_bars(tmp_path):
    path = tmp_path / "plan.png"
    done = call(*BLOG, "--plot", path)
    assert done.returncode == 3
    assert f"{path}: label accuracy against ε" in done.stdout
    assert "█" not in done.stdout
    with Image.open(path) as picture:
        assert picture.width > 900
        # One colour for each number of teachers (Okabe and Ito), and a picture that is not blank.
        colours = {colour[:3] for _, colour in picture.convert("RGB").getcolors(2**24)}
    assert {(0, 114, 178), (0, 158, 115), (230, 159, 0), (204, 121, 167), (0, 0, 0)} <= colours
    done = call(*GOOD, "--json", "--plot", path)
    assert json.loads(done.stdout)["plot"] == str(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--teachers", 0], "num_teachers is 0"),
        (["--queries", -1], "num_queries is -1"),
        (["--classes", 1], "num_classes is 1"),
        (["--epsilon", 0], "epsilon is 0.0"),
        (["--epsilon", "nan"], "epsilon is nan"),
        (["--epsilon", 1e6], "epsilon is 1e+06, but plans are made from"),
        (["--delta", 1], "delta is 1.0"),
        (["--teachers-per-patient", 6], "teachers_per_patient is 6"),
        (["--agreement", 0.3], "agreement is 0.3"),
        (["--target", 1], "target is 1.0"),
        (["--target", 0.5], "target is 0.5"),
        (["--hospitals", 9], "hospitals is 9"),
        (["--plot", "plan.pdf"], "only PNG can be written"),
        (["--plot", "no/such/folder/plan.png"], "No such file or directory"),
    ],
)
def test_bad_input_gives_one_line(change, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_one_line(call(*BLOG, *change), message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("left_out", ["--teachers", "--queries", "--epsilon"])
def test_what_is_left_out_is_named(left_out):
    options = list(BLOG)
    place = options.index(left_out)
    del options[place : place + 2]
    done = call(*options)
    assert done.returncode == 2
    assert left_out in done.stderr


def test_planning_imports_neither_torch_nor_monai():
    imports = "import sys, monai_privacy.pate, monai_privacy.pate_cli"
    script = f"{imports}; print({{'torch', 'monai', 'matplotlib'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_labels_and_then_what_they_cost_at_these_votes(tmp_path):
    ledger, bound = tmp_path / "ledger.jsonl", tmp_path / "bound.json"
    votes = []
    for hospital in ("north", "south"):
        teachers = tuple(f"{hospital} {number}" for number in range(500))
        rows = tuple((485, 15) if row % 2 else (20, 480) for row in range(200))
        queries = tuple(f"image {row}" for row in range(200))
        votes.append(tmp_path / f"{hospital}.json")
        write_hospital_votes(HospitalVotes(hospital, 500, queries, rows, teachers, 1), votes[-1])
    labels = ["--ledger", ledger, "--epsilon", 2, "--output", tmp_path / "labels.csv"]
    assert call("pate", "label", *votes, *labels).returncode == 0
    before = PrivacyLedger(ledger).epsilon(1e-5)
    command = ["pate", "bound", *votes, "--ledger", ledger, "--output", bound]
    assert_one_line(call(*command, "--agreement", 0.55), "nothing would be gained")
    assert_one_line(call("pate", "bound", votes[0], *command[4:]), "other teachers")
    typo = tmp_path / "typo.jsonl"
    assert_one_line(call("pate", "bound", *votes, "--ledger", typo, "--output", bound), "does not exist")
    assert not typo.exists()
    done = call(*command, "--agreement", 0.95)
    assert done.returncode == 0, done.stderr
    told = json.loads(bound.read_text(encoding="utf-8"))
    after = PrivacyLedger(ledger).epsilon(1e-5)
    assert told["epsilon"] < told["epsilon_with_release"] < before < after
    first, second = done.stdout.splitlines()
    assert f"the labels betray a patient by at most ε {rounded_up(told['epsilon'], 4)}," in first
    assert f"with this bound {rounded_up(told['epsilon_with_release'], 4)}, at δ = 1e-05" in first
    assert second.endswith(f"is {rounded_up(after, 4)}: that is the claim")
    again = json.loads(call(*command, "--json").stdout)
    assert (again["rdp"], again["ledger_epsilon"]) == (told["rdp"], after)
