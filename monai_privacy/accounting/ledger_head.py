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


"""How many lines of a ledger were acknowledged, beside the ledger itself."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple


class Head(NamedTuple):
    """Number of the lines, and SHA-256 of the last one."""

    lines: int
    last_hash: str


class LedgerHead:
    """The file ``<ledger>.head``, one line that is replaced as a whole.

    Args:
        ledger: path of the ledger.
    """

    def __init__(self, ledger: Path) -> None:
        self.path = ledger.with_name(ledger.name + ".head")

    def read(self) -> Head | None:
        """What it says; None where it is missing, or empty as a power cut may leave it."""
        try:
            found = re.fullmatch(r"(\d{1,18}) ([0-9a-f]{64})\n", self.path.read_text(encoding="ascii"))
        except (OSError, UnicodeDecodeError):
            return None
        return Head(int(found[1]), found[2]) if found else None

    def write(self, head: Head) -> None:
        """Say so from now on; raises OSError where it cannot."""
        new = self.path.with_name(self.path.name + ".new")
        new.write_text(f"{head.lines} {head.last_hash}\n", encoding="ascii")
        os.replace(new, self.path)
