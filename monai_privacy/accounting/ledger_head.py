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
        """What it says; None where there is none.

        Raises:
            ValueError: where it says something else, or cannot be read.
        """
        try:
            text = self.path.read_text(encoding="ascii")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(str(error)) from error
        found = re.fullmatch(r"(\d{1,18}) ([0-9a-f]{64})\n", text)
        if found is None:
            raise ValueError("it is not what this package writes")
        return Head(int(found[1]), found[2])

    def write(self, head: Head) -> None:
        """Say so from now on; raises OSError where it cannot."""
        new = self.path.with_name(self.path.name + ".new")
        with open(new, "w", encoding="ascii") as file:
            file.write(f"{head.lines} {head.last_hash}\n")
            file.flush()
            # Or a power cut could leave a name without its content.
            os.fsync(file.fileno())
        os.replace(new, self.path)
