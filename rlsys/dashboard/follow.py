"""Reading files that another process is writing: only what is new, and never half a line."""

import json
import os
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Follower:
    """The JSON objects of a file with one per line, as they arrive.

    A last line without its end is left for the next look. A file that was replaced or became shorter (a resumed
    run forgets what came after its checkpoint) is read again from the start, and `generation` grows; so is an
    array that had ended and goes on. Lines that
    are no JSON object are counted in `skipped`. A Chrome trace, `[` and one event with a comma per line, reads
    the same way; `closed` says that its array has ended.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode = 0
        self._read = 0
        self._cut = b""
        self.generation = 0
        self.skipped = 0
        self.closed = False

    def poll(self) -> list[Row]:
        """Rows completed since the last call; after a change of `generation` all rows, from the first."""
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                inode, size = status.st_ino, status.st_size
                reopened = self.closed and size != self._read
                if (self._inode and inode != self._inode) or size < self._read or reopened:
                    self._restart()
                self._inode = inode
                if size == self._read:
                    return []
                file.seek(self._read)
                data = file.read(size - self._read)
        except FileNotFoundError:
            if self._read:
                self._restart()
                self._inode = 0
            return []
        self._read += len(data)
        *lines, self._cut = (self._cut + data).split(b"\n")
        rows = [row for line in lines if (row := self._parse(line)) is not None]
        # The array's last bracket may come without an end of line.
        self.closed = self.closed or self._cut.strip() == b"]"
        return rows

    def _restart(self) -> None:
        self._read, self._cut, self.skipped, self.closed = 0, b"", 0, False
        self.generation += 1

    def _parse(self, line: bytes) -> Row | None:
        text = line.strip()
        if text in (b"", b"["):
            return None
        if text == b"]":
            self.closed = True
            return None
        self.closed = False
        try:
            row = json.loads(text.removesuffix(b","))
        except ValueError:
            row = None
        if isinstance(row, dict):
            return row
        self.skipped += 1
        return None
