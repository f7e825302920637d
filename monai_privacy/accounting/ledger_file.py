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

"""An append-only file of JSON lines, each bound to the one before by its hash, safe against crashes and other writers."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

_NO_LINE_BEFORE = "0" * 64


class LedgerError(RuntimeError):
    """The ledger cannot be read or written as it must be; nothing was released."""


class LedgerFile:
    """JSON lines that can only be added to.

    Each line carries its number and the SHA-256 of the line before it, so that a changed, dropped, swapped or inserted
    line is noticed. ``append`` returns only once the line is on the disk. A line that a crash cut short was never
    acknowledged, so nothing was released under it: it is cut off before the next line is added.

    Args:
        path: the file; it and its folder are created where missing.
        lock_timeout: seconds to wait for another process that is writing.
    """

    def __init__(self, path: str | os.PathLike[str], *, lock_timeout: float = 60.0) -> None:
        self.path = Path(path)
        self._lock_timeout = lock_timeout
        self._offset = 0
        self._count = 0
        self._last_hash = _NO_LINE_BEFORE
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LedgerError(
                f"{self.path.parent} cannot hold a ledger: {error.strerror}. Name another folder."
            ) from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the only right to read and append, across processes; freed by the system if this process dies."""
        lock = FileLock(f"{self.path}.lock", timeout=self._lock_timeout)
        try:
            lock.acquire()
        except Timeout as error:
            raise LedgerError(
                f"{self.path} is held by another process for over {self._lock_timeout:g} s. Wait for it to end, or "
                "stop it; nothing was released."
            ) from error
        except OSError as error:
            raise self._failure("locked", error) from error
        try:
            yield
        finally:
            lock.release()

    def read_new(self) -> list[dict[str, Any]]:
        """The lines added, by whomever, since the last call; call it while holding the lock.

        Raises:
            LedgerError: naming the first line that was changed, dropped, swapped, inserted, or is no JSON.
        """
        try:
            with open(self.path, "rb") as file:
                if os.fstat(file.fileno()).st_size < self._offset:
                    raise LedgerError(
                        f"{self.path} has become shorter since it was read: lines were removed. Restore it from a copy."
                    )
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            if self._offset:
                raise LedgerError(f"{self.path} has vanished. Restore it from a copy; nothing was released.") from None
            return []
        except OSError as error:
            raise self._failure("read", error) from error
        records = []
        for line in data.splitlines(keepends=True):
            if not line.endswith(b"\n"):  # cut short by a crash before it was acknowledged
                break
            records.append(self._checked(line))
            self._advance(line)
        return records

    def append(self, record: dict[str, Any]) -> dict[str, Any]:
        """Add one line and wait until it is on the disk; call it while holding the lock, after ``read_new``.

        Returns:
            The line as written, with its number, time and the hash of the line before it.

        Raises:
            LedgerError: on a full or read-only disk, or a number that is not finite; nothing counts as written.
        """
        whole = {
            "line": self._count + 1,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            **record,
            "previous": self._last_hash,
        }
        try:
            line = (json.dumps(whole, allow_nan=False, separators=(",", ":")) + "\n").encode()
        except (ValueError, TypeError) as error:
            raise LedgerError(f"{record!r} cannot be recorded: {error}. Nothing was released.") from error
        is_new = not self.path.exists()
        try:
            self._write(line)
            if is_new:
                self._sync_folder()
        except OSError as error:
            raise self._failure("written", error) from error
        self._advance(line)
        return whole

    def _write(self, line: bytes) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            # Drops what a crash, or a full disk, left of an unacknowledged line.
            os.ftruncate(descriptor, self._offset)
            os.lseek(descriptor, self._offset, os.SEEK_SET)
            written = 0
            while written < len(line):
                written += os.write(descriptor, line[written:])
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _sync_folder(self) -> None:
        # Without this a power cut can lose the name of a file whose content is safe.
        descriptor = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _checked(self, line: bytes) -> dict[str, Any]:
        number = self._count + 1
        try:
            record = json.loads(line, parse_constant=_refuse_constant)
        except ValueError as error:
            raise LedgerError(
                f"{self.path}, line {number}: no valid JSON ({error}). Restore it from a copy."
            ) from error
        if not isinstance(record, dict) or record.get("line") != number or record.get("previous") != self._last_hash:
            raise LedgerError(
                f"{self.path}, line {number}: it does not follow the line before it, so a line was changed, dropped, "
                "swapped or inserted. Restore it from a copy."
            )
        return record

    def _advance(self, line: bytes) -> None:
        self._offset += len(line)
        self._count += 1
        self._last_hash = hashlib.sha256(line).hexdigest()

    def _failure(self, verb: str, error: OSError) -> LedgerError:
        return LedgerError(
            f"{self.path} could not be {verb}: {error.strerror or error}. Free the disk or its permissions; nothing "
            "was released."
        )


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number that a ledger may hold")
