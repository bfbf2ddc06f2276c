# SPDX-License-Identifier: Apache-2.0
"""The work file of a job that may be interrupted: what is done is on the device, and is never done again.

1. The first line holds the settings. A job that goes on with others is refused, since its rows would not fit together.
2. Each record is one line, and a batch of records is synced to the device before the job goes on.
3. A line that was cut off by an interruption is the last one. It is dropped when the file is opened again, and what it
   stood for is done again.
4. A lock keeps a second process from the same file. The system takes it back from a process that is killed.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from frozen_peft.data.rows import dump_row
from frozen_peft.utils.files import sync

__all__ = ["Journal"]

_FORMAT = 1


class Journal:
    """An append-only file of records.

    Args:
        path: Where it is; created where it does not exist.
        settings: What the records depend on, as JSON.

    Attributes:
        records: What earlier runs have left, in the order in which it was written.

    Raises:
        ValueError: The file is of a job with other settings, is no such file, or another process has it open.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path = path
        self._lock = FileLock(f"{path}.lock")
        try:
            self._lock.acquire(blocking=False)
        except Timeout as error:
            raise ValueError(f"another process is at work on {path}; wait for it, or write elsewhere") from error
        try:
            self.records = self._open(settings)
        except BaseException:
            self._lock.release()
            raise

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        """Writes records, and returns when they are on the device."""
        if not records:
            return
        self._file.write("".join(map(dump_row, records)).encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Ends work on the file, which stays."""
        self._file.close()
        self._lock.release()

    def remove(self) -> None:
        """Ends work on the file, and removes it."""
        self._file.close()
        self.path.unlink()
        self._lock.release()
        Path(self._lock.lock_file).unlink(missing_ok=True)

    def _open(self, settings: dict[str, Any]) -> list[dict[str, Any]]:
        content = self.path.read_bytes() if self.path.exists() else b""
        # What follows the last line break was cut off.
        whole = content[: content.rfind(b"\n") + 1]
        lines = [_parsed(line, number, self.path) for number, line in enumerate(whole.splitlines(), start=1)]
        if lines:
            self._require_same(settings, lines[0])
        self._file = self.path.open("r+b" if content else "wb")
        self._file.truncate(len(whole))
        self._file.seek(len(whole))
        if not lines:
            self.append([{"format": _FORMAT, "settings": settings}])
            # So that a new file is still there after a power failure, where folders can be synced.
            if os.name == "posix":
                sync(self.path.absolute().parent)
        return lines[1:]

    def _require_same(self, settings: dict[str, Any], header: dict[str, Any]) -> None:
        if header.get("format") != _FORMAT or not isinstance(header.get("settings"), dict):
            raise ValueError(f"{self.path} is no work file of this version; move it away to begin anew")
        known = header["settings"]
        wanted = json.loads(json.dumps(settings))
        changed = [name for name in {**known, **wanted} if known.get(name) != wanted.get(name)]
        if changed:
            differences = "; ".join(f"{name}: {known.get(name)!r} then, {wanted.get(name)!r} now" for name in changed)
            raise ValueError(
                f"{self.path} was begun with other settings ({differences}). Give those to go on, or remove the file "
                "to begin anew"
            )


def _parsed(line: bytes, number: int, path: Path) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise ValueError(
            f"{path}, line {number}: no JSON object, so the file is damaged, or no work file; move it away to begin "
            "anew"
        )
    return record
