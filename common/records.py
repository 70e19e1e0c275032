"""JSONL files: read, written whole, or line by line through kills; their protocol; text tables."""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from common.log import UTF8, changes, write_json


def places_and_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """(the byte that it begins at, row). A last line that a kill cut off is no row; nothing is
    written, so that looking at a run that is under way does it no harm."""
    place = 0
    with path.open("rb") as file:
        for line in file:
            try:
                if line.endswith(b"\n"):
                    yield place, json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, byte {place}: not JSON: {error}") from error
            place += len(line)


def read_rows(path: Path) -> list[dict]:
    """All rows, none if there is no file."""
    return [row for _, row in places_and_rows(path)] if path.exists() else []


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """Whole or not at all: a kill leaves the old file or the new one."""
    part = path.with_suffix(".part")
    with part.open("w", **UTF8) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
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
        with path.open("rb") as file:  # line by line: replies may be more than fit in memory
            self.file.truncate(sum(len(line) for line in file if line.endswith(b"\n")))
        self.file.seek(0, os.SEEK_END)

    def add(self, row: dict) -> int:
        """-> the byte that its line begins at"""
        place = self.file.tell()
        self.file.write(json.dumps(row).encode() + b"\n")
        self.file.flush()
        return place


def columns(rows: list[Sequence[str]], words: int) -> str:
    """A table to print: so many columns of words, then numbers, each as wide as it has to be."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    forms = [f"{'<' if i < words else '>'}{width}" for i, width in enumerate(widths)]
    lines = ["  ".join(map(format, row, forms)).rstrip() for row in rows]
    return "\n".join(lines)


def claim(file: Path, protocol: dict, begun: bool) -> None:
    """Notes in `file` how the rows beside it are made. ValueError where some are there (begun) that
    were made in another way: a result would be of neither."""
    protocol = json.loads(json.dumps(protocol))  # as it is read back: lists for tuples
    before = json.loads(file.read_text()) if begun and file.exists() else {}
    if begun and (differences := "; ".join(changes(before, protocol))):
        fault = f"what stands beside it is of another protocol ({differences})"
        raise ValueError(f"{file}: {fault}: use another --out, or remove both")
    write_json(file, protocol)
