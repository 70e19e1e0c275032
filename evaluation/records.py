"""JSONL files: read whole, written whole, or appended line by line through kills."""

import fcntl
import json
from collections.abc import Iterable
from pathlib import Path


def read_rows(path: Path) -> list[dict]:
    """The rows, none if there is no file. A last line that a kill cut off is none; nothing is
    written, so that looking at a run that is under way does it no harm."""
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    return [json.loads(line) for line in lines[:-1]]


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """Whole or not at all: a kill leaves the old file or the new one."""
    part = path.with_suffix(".part")
    with part.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    part.replace(path)


class Appender:
    """Adds rows, each on disk before the next: a kill loses none that came. One process a file."""

    def __init__(self, path: Path):
        self.file = path.open("ab")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:  # two would pay twice
            raise ValueError(f"another process writes {path}: let it end first") from error
        except OSError as error:  # some network file systems
            print(f"{path} cannot be locked ({error}): start no second run on it")
        self.file.truncate(path.read_bytes().rfind(b"\n") + 1)  # what a kill left of a line

    def add(self, row: dict) -> None:
        self.file.write(json.dumps(row).encode() + b"\n")
        self.file.flush()
