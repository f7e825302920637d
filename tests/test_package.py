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

"""The shape of the package: layers, names, headers."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import monai
import pytest

import monai_privacy

ROOT = Path(monai_privacy.__file__).parent
# Each layer may import from the layers before it, and within itself.
LAYERS = [
    ["accounting"],
    ["mechanisms", "networks"],
    ["data", "plan", "report", "distributed", "provenance", "opacus_accountant"],
    ["requirements", "train_statistics", "ledger_conduct"],
    ["engines"],
    ["handlers", "adoption"],
    ["figures", "errors", "bundle"],
    ["pate"],
    ["demo"],
    ["ledger_cli", "pate_cli"],
    ["bundle_cli"],
    ["cli"],
    ["__main__", "__init__"],
]


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def layer(top: str) -> int:
    return next(number for number, names in enumerate(LAYERS) if top in names)


def imported(path: Path) -> set[str]:
    """First-level modules of the package that a file imports, those in functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("monai_privacy.")}
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downward(path):
    top = path.relative_to(ROOT).parts[0].removesuffix(".py")
    upward = {name for name in imported(path) if layer(name) > layer(top)}
    assert not upward


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_has_licence_and_docstring(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# Copyright (c) monai_privacy contributors\n# Licensed under the Apache License")
    assert ast.get_docstring(ast.parse(text))


def test_no_public_name_repeats_one_of_monai():
    taken = set()
    for module in pkgutil.walk_packages(monai.__path__, "monai."):
        if module.name.split(".")[1] in {"engines", "handlers", "data", "networks", "transforms", "losses", "metrics",
                                         "inferers", "apps", "utils", "fl", "bundle", "optimizers"}:  # fmt: skip
            try:
                loaded = importlib.import_module(module.name)
            except Exception:  # optional dependencies that are not installed
                continue
            taken |= {
                name for name, value in vars(loaded).items() if inspect.isclass(value) or inspect.isfunction(value)
            }
    ours = set(monai_privacy.__all__)
    for module in pkgutil.walk_packages(monai_privacy.__path__, "monai_privacy."):
        if not module.name.endswith("__main__"):
            loaded = importlib.import_module(module.name)
            ours |= {
                name
                for name, value in vars(loaded).items()
                if inspect.isclass(value) and value.__module__ == module.name and not name.startswith("_")
            }
    assert not ours & taken


def test_every_public_name_exists_and_is_documented():
    for name in monai_privacy.__all__:
        assert inspect.getdoc(getattr(monai_privacy, name)), name
    assert set(monai_privacy._HOME) == set(monai_privacy.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        monai_privacy.nothing  # noqa: B018


def test_accounting_imports_no_torch():
    script = (
        "import sys, monai_privacy.accounting, monai_privacy.plan, monai_privacy.report; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_short_names_work_in_bundle_configs():
    from monai.bundle import ConfigParser

    plan = ConfigParser(
        {"plan": {"_target_": "DPSGDPlan", "num_patients": 10, "expected_batch_size": 2, "steps": 3, "delta": 1e-3}}
    ).get_parsed_content("plan")
    assert plan.sample_rate == 0.2
