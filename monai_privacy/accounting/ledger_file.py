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
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from monai_privacy.accounting.ledger_head import Head, LedgerHead

RESTORE = "Restore its newest copy; an older one would forget releases."


class LedgerError(RuntimeError):
    """The ledger cannot be read or written as it must be; nothing was released."""


class _Position(NamedTuple):
    """How much of a file has been read."""

    offset: int = 0
    lines: int = 0
    last_hash: str = "0" * 64


class LedgerFile:
    """JSON lines that can only be added to.

    Each line carries its number and the SHA-256 of the line before it, so that a line that was changed, dropped, swapped
    or inserted before others is noticed: accidents and careless edits, not a forger who computes the hashes anew. The
    last lines have nothing after them, so a second file, ``<path>.head``, holds their number and the last one's hash:
    lines that went missing at the end, an older copy put back or a changed last line are noticed by it. Where it is
    missing, as beside a copy, they are not. ``append`` returns only once the line is on the disk. A line that a crash
    cut short was never acknowledged, so nothing was released under it: it is cut off before the next line is added.

    Args:
        path: the file; it and its folder are created where missing. Links are followed, so that all names of a file
            share one lock.
        lock_timeout: seconds to wait for another process that is writing.
        read_only: write nothing at all, for a file that is only to be read, such as a copy on a read-only disk.
    """

    def __init__(self, path: str | os.PathLike[str], *, lock_timeout: float = 60.0, read_only: bool = False) -> None:
        self.path = Path(os.path.realpath(path))
        self._lock_timeout = lock_timeout
        self._read_only = read_only
        self._head = LedgerHead(self.path)
        self._read = _Position()
        if read_only:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LedgerError(
                f"{self.path.parent} cannot hold a ledger: {error.strerror}. Name another folder; nothing was released."
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

    def read_new(self) -> Iterator[dict[str, Any]]:
        """The lines added, by whomever, since they were last read; call it while holding the lock.

        A line counts as read when the next one is asked for: one that its reader could not use comes again.

        Raises:
            LedgerError: naming the first line that was changed, dropped, swapped, inserted, or is no JSON.
        """
        # Read before the lines: a reader without the lock may then find more of these than are acknowledged.
        acknowledged = self._acknowledged()
        self._check_acknowledged(acknowledged)
        # Not splitlines: it would end a line at a stray carriage return, and all after it would pass for cut short.
        *lines, last = self._unread().split(b"\n")
        for line in lines:
            yield self._checked(line + b"\n")
            self._advance(line + b"\n")
            self._check_acknowledged(acknowledged)
        if _is_json(last):
            # Whole but for its end, as some editors leave it: it may have been acknowledged, so it counts.
            record = self._checked(last + b"\n")
            if not self._read_only:
                self._end_line()
            yield record
            self._advance(last + b"\n")
            self._check_acknowledged(acknowledged)
        else:
            self._check_cut_short(last)
        if acknowledged is not None and self._read.lines < acknowledged.lines:
            raise LedgerError(
                f"{self.path}, line {self._read.lines + 1}: it is missing, for {acknowledged.lines} lines were "
                f"acknowledged: the file was cut off, or is an older copy. {RESTORE} For another cohort, name another file."
            )

    @property
    def has_head(self) -> bool:
        """Whether lines missing at the end would be noticed."""
        return self._acknowledged() is not None

    @property
    def head(self) -> tuple[int, str]:
        """Number and SHA-256 of the last line read."""
        return self._read.lines, self._read.last_hash

    def append(self, record: dict[str, Any]) -> None:
        """Add one line and wait until it is on the disk; call it while holding the lock, after ``read_new``.

        ``read_new`` gives the line back.

        Raises:
            LedgerError: on a full or read-only disk, or a number that is not finite; nothing counts as written.
        """
        whole = {
            "line": self._read.lines + 1,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            **record,
            "previous": self._read.last_hash,
        }
        try:
            line = (json.dumps(whole, allow_nan=False, separators=(",", ":")) + "\n").encode()
        except (ValueError, TypeError) as error:
            raise LedgerError(f"{record!r} cannot be recorded: {error}. Nothing was released.") from error
        try:
            self._write(line)
            if self._read.offset == 0:
                self._sync_folder()
            # Last: a crash before it leaves a line that nobody acknowledged, and that counts all the same.
            self._head.write(Head(self._read.lines + 1, hashlib.sha256(line).hexdigest()))
        except OSError as error:
            raise self._failure("written", error) from error

    def _unread(self) -> bytes:
        try:
            with open(self.path, "rb") as file:
                if os.fstat(file.fileno()).st_size < self._read.offset:
                    raise LedgerError(
                        f"{self.path} has become shorter since it was read: lines were removed. {RESTORE}"
                    )
                file.seek(self._read.offset)
                return file.read()
        except FileNotFoundError:
            if self._read.offset:
                raise LedgerError(f"{self.path} has vanished; nothing was released. {RESTORE}") from None
            return b""
        except OSError as error:
            raise self._failure("read", error) from error

    def _write(self, line: bytes) -> None:
        # Made for the first line only: a file that vanished must not come back without its lines.
        descriptor = os.open(self.path, os.O_RDWR | (0 if self._read.offset else os.O_CREAT), 0o600)
        try:
            if b"\n" in os.pread(descriptor, os.fstat(descriptor).st_size, self._read.offset):
                raise LedgerError(
                    f"{self.path} was written to by a process that does not hold {self.path}.lock; nothing was released. "
                    "Keep the lock file, and the ledger on a disk with file locks."
                )
            # Drops what a crash, or a full disk, left of an unacknowledged line.
            os.ftruncate(descriptor, self._read.offset)
            os.lseek(descriptor, self._read.offset, os.SEEK_SET)
            written = 0
            while written < len(line):
                written += os.write(descriptor, line[written:])
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _end_line(self) -> None:
        try:
            with open(self.path, "ab", buffering=0) as file:
                file.write(b"\n")
                os.fsync(file.fileno())
        except OSError as error:
            raise self._failure("written", error) from error

    def _sync_folder(self) -> None:
        # Without this a power cut can lose the name of a file whose content is safe.
        descriptor = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _checked(self, line: bytes) -> dict[str, Any]:
        number = self._read.lines + 1
        try:
            record = json.loads(line, parse_constant=_finite, parse_float=_finite)
        except (ValueError, RecursionError) as error:
            raise LedgerError(f"{self.path}, line {number}: no valid JSON ({error}). {RESTORE}") from error
        if (
            not isinstance(record, dict)
            or record.get("line") != number
            or record.get("previous") != self._read.last_hash
        ):
            raise LedgerError(
                f"{self.path}, line {number}: it does not follow the line before it, so a line was changed, dropped, "
                f"swapped or inserted. {RESTORE}"
            )
        return record

    def _check_cut_short(self, line: bytes) -> None:
        """Refuse to overwrite what no crash of ours left, such as a file that is no ledger."""
        start = b'{"line":%d,' % (self._read.lines + 1)
        # A power cut may leave zeros where a line was to be.
        if not start.startswith(line.rstrip(b"\0")[: len(start)]):
            raise LedgerError(
                f"{self.path}, line {self._read.lines + 1}: it is neither a line of a ledger nor the beginning of one. Name "
                f"the right file. {RESTORE}"
            )

    def _advance(self, line: bytes) -> None:
        # In one assignment: an interrupt must not leave half a position.
        self._read = _Position(
            offset=self._read.offset + len(line),
            lines=self._read.lines + 1,
            last_hash=hashlib.sha256(line).hexdigest(),
        )

    def _acknowledged(self) -> Head | None:
        try:
            return self._head.read()
        except ValueError as error:
            raise LedgerError(
                f"{self._head.path} is damaged ({error}), so lines missing at the end of {self.path} would not be noticed. "
                f"{RESTORE} If it is whole, by its newest report, delete the damaged file."
            ) from error

    def _check_acknowledged(self, acknowledged: Head | None) -> None:
        if acknowledged is None or self._read.lines != acknowledged.lines:
            return
        if self._read.lines and self._read.last_hash != acknowledged.last_hash:
            raise LedgerError(
                f"{self.path}, line {self._read.lines}: it is not the line that was acknowledged, so it was changed. "
                f"{RESTORE}"
            )

    def _failure(self, verb: str, error: OSError) -> LedgerError:
        return LedgerError(
            f"{self.path} could not be {verb}: {error.strerror or error}. Free the disk or its permissions; nothing "
            "was released."
        )


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is no number that a ledger may hold")
    return value
