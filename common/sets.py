"""Public sets, as the Hub or a directory has them, become rows: for training data and benchmarks.

    the Hub, or a directory ──raw_rows──▶ rows as the set has them ──the set's reader──▶ question,
    answer, pictures ──finished──▶ {"id", "source", "prompt", "answer", "images", ...} or Dropped

<image> stands in the prompt where a picture stands, and "images" are paths relative to the
directory around `images_to`, so the file of the rows belongs there. A row that cannot be used comes
out as Dropped, with its reason; a column that the first row lacks stops the reader.

The Hub is read through `datasets`, which streams. JSON on disk is read here, because arrow wants
one type a column, and PuzzleVQA's options are numbers and texts in one list.
"""

import hashlib
import json
import os
import re
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from warnings import catch_warnings

import pyarrow.parquet as pq
from datasets import load_dataset
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from PIL.Image import DecompressionBombWarning

from common.data import IMAGE_MARKER, MARKUP_PATTERN, decoding, opened, upright
from common.log import on_hub, progress

BATCH = 32  # rows of parquet in memory; with pictures of 1 MB that is 32 MB
ROW_FILES = (".parquet", ".jsonl", ".json")
VALIDATION = "validation|valid|val|dev"
SPLITS = rf"train|{VALIDATION}|test|testmini|sample(_variant)?\d+|phyx_mini_\w+"  # in file names
SPLIT = "the split that it is from"  # a column that every reader gets: DynaMath's variants
LETTERS = string.ascii_uppercase
ODD = (LookupError, TypeError, AttributeError, ValueError, SyntaxError)  # a row of another shape
LONGEST = {  # characters
    "prompt": 20_000,  # longer ones are pasted books, not questions
    "answer": 10_000,  # curate.py drops references much shorter; MM-Vet's are paragraphs
    "response": 400_000,  # some 100k tokens: beyond any context here
}


class Unfit(Exception):
    """A row that cannot be used: a few words, the same for all rows of a kind; maybe the detail."""


class Dropped(NamedTuple):
    id: str
    reason: str  # what a counter counts
    detail: str = ""


@dataclass(frozen=True)
class PublicSet:
    """Where a set lies and how a row of it becomes ours."""

    name: str
    hub: str  # id on the Hub; "" if it is read from local copies only
    reader: Callable[[dict], dict | list]  # raw row -> our row so far, or several, or Unfit for one
    split: str  # or several, by commas
    size: int  # raw rows of the split, or items; 0: unknown
    configs: tuple[str | None, ...] = field(default=(None,), kw_only=True)


def named(table: Sequence[PublicSet], name: str) -> PublicSet:
    """In any case, with - for _, too."""
    for entry in table:
        if entry.name == name.lower().replace("-", "_"):
            return entry
    raise ValueError(f"none is called {name!r}; there are {', '.join(e.name for e in table)}")


# ---- rows of ours


def read_set(
    entry: PublicSet, reader: Callable, place: str, images_to: Path
) -> Iterator[tuple[int, dict | Dropped]]:
    """(running number of the raw row, row of ours). place: a file or a directory with the files as
    the Hub has them; "": the Hub. The id is the set's own, or else the running number."""
    ids = set()
    for index, (raw, split, folders) in enumerate(progress(raw_rows(entry, place), entry.name)):
        try:
            parts = reader(raw | {SPLIT: split})
        except (Unfit, *ODD) as error:
            column = error.args[0] if isinstance(error, KeyError) else None
            if index == 0 and isinstance(column, str) and column not in raw:
                raise ValueError(
                    f"{entry.name}, {place or entry.hub}: no column {column!r}; there are "
                    f"{sorted(raw)}. Is it this set, or has it changed since its line here?"
                ) from error
            parts = error
        parts = parts if isinstance(parts, list) else [parts]
        for k, part in enumerate(parts):
            own = part.pop("id", None) if isinstance(part, dict) else None
            default = f"{index}/{k}" if len(parts) > 1 else index
            name = f"{entry.name}/{default if own in (None, '') else own}"
            try:
                if isinstance(part, Exception):
                    raise part
                if name in ids:
                    raise Unfit("duplicate id", f"row {index} has it again")
                row = {"id": name, "source": entry.name} | finished(part, folders, images_to)
                ids.add(name)
            except Unfit as unfit:
                row = Dropped(name, *unfit.args)
            except ODD as error:
                row = Dropped(name, "malformed row", repr(error))
            yield index, row


def finished(row: dict, folders: list[Path], images_to: Path) -> dict:
    """The checks that every set needs; pictures become files last, so a bad row leaves none."""
    pictures = row.pop("images", [])
    pictures = pictures if isinstance(pictures, list) else [pictures]
    row = {"prompt": None} | {name: value for name, value in row.items() if value is not None}
    if "response" not in row:  # a trace is of use without a gold
        row.setdefault("answer", None)
    row |= {column: text_of(row[column], column) for column in LONGEST if column in row}
    markers = row["prompt"].count(IMAGE_MARKER)
    if not markers:
        row["prompt"] = IMAGE_MARKER * len(pictures) + row["prompt"]
    elif markers != len(pictures):
        raise Unfit("markers and pictures differ", f"{markers} markers, {len(pictures)} pictures")
    return row | {"images": [keep_image(picture, folders, images_to) for picture in pictures]}


def text_of(value, column: str) -> str:
    """A text that is there; 7 is taken as "7" and 7.0 as "7.0", as the set gives it."""
    if not isinstance(value, str | int | float | None):
        raise Unfit("malformed row", f"{column} is {value!r:.80}")
    text = "" if value is None or value != value else str(value).strip()  # NaN is unequal to itself
    if not text.replace(IMAGE_MARKER, "").strip():
        raise Unfit(f"no {column}", repr(value))
    if len(text) > LONGEST[column]:
        raise Unfit(f"{column} too long", f"{len(text)} characters, more than {LONGEST[column]}")
    text.encode()  # fails at half a character, which no tokenizer takes
    if column != "answer" and (mark := MARKUP_PATTERN.search(text)):
        raise Unfit("chat markup", f"{mark[0]} in {column}")
    return text


def multiple_choice(question, options, gold: int | str) -> dict:
    """The options stand in the prompt as (A), (B), ... gold: the place of the right one, from 0, or
    its letter as "B", "(B)", "b."; never its text."""
    texts = [str(option).strip() for option in options]
    if not 2 <= len(texts) <= 26 or not all(texts):
        raise Unfit("bad options", f"{texts!r:.200}")
    letter = str(gold).strip("() .").upper()
    by_letter = LETTERS.find(letter) if len(letter) == 1 else -1
    place = gold if isinstance(gold, int) else by_letter
    if not 0 <= place < len(texts):
        raise Unfit("answer not among the options", f"{gold!r} of {texts!r:.200}")
    lines = [f"({x}) {text}" for x, text in zip(LETTERS, texts, strict=False)]
    prompt = "\n".join([text_of(question, "prompt"), "Choices:", *lines])
    return {"prompt": prompt, "answer": LETTERS[place], "choices": texts}


# ---- pictures


def keep_image(picture, folders: list[Path], images_to: Path) -> str:
    """Writes the bytes, as they came, to images_to/HASH.FORMAT, once; returns the row's path. A new
    picture is decoded in full: a damaged one would stop a run days later."""
    content = image_bytes(picture, folders)
    cell = {"bytes": content}
    try:
        with catch_warnings(action="error", category=DecompressionBombWarning), decoding(cell):
            image = opened(cell)
            path = images_to / f"{hashlib.sha256(content).hexdigest()[:16]}.{image.format.lower()}"
            if not path.exists():
                upright(image)
    except ValueError as error:
        raise Unfit("picture cannot be opened", str(error)) from error
    if not path.exists():
        images_to.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")  # a run that is killed leaves no half file
        part.write_bytes(content)
        part.replace(path)
    return f"{images_to.name}/{path.name}"


def image_bytes(picture, folders: list[Path]) -> bytes:
    """Of {"bytes", "path"} as `datasets` stores it, or of a path below one of the folders."""
    cell = picture if isinstance(picture, dict) else {"path": picture}
    if isinstance(cell.get("bytes"), bytes):
        return cell["bytes"]
    name = str(cell.get("path") or "")
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise Unfit("picture outside the set", name)
    files = [folder / name for folder in folders if os.path.isfile(folder / name)]
    if not files:
        raise Unfit("no picture", f"{picture!r:.99} is not in {[*map(str, folders)] or 'the rows'}")
    content = files[0].read_bytes()
    if "sha256" in cell and hashlib.sha256(content).hexdigest() != cell["sha256"]:
        raise Unfit("picture has changed", f"{name} is not what the set was made of")
    return content


# ---- raw rows


def raw_rows(entry: PublicSet, place: str) -> Iterator[tuple]:
    """(row, its split, folders where its pictures may lie) over all splits and configs."""
    splits, top = entry.split.split(", "), Path(place)
    if not place:
        for split in splits:
            for config in entry.configs:
                yield from ((raw, split, []) for raw in hub_rows(entry.hub, config, split))
        return
    # a folder for each config, or one that holds them all
    tops = [top / config for config in entry.configs if config and (top / config).is_dir()]
    if tops and len(tops) < len(entry.configs):
        missing = sorted({*entry.configs} - {path.name for path in tops})
        raise FileNotFoundError(f"{entry.name}: {place} lacks the folders {missing}")
    root = top.parent if top.is_file() else top
    for split in splits:
        for file in (file for path in tops or [top] for file in files_of(path, split)):
            folders = [file.parent, root, root / "images"]
            yield from ((raw, split, folders) for raw in file_rows(file))


def hub_rows(hub: str, config: str | None, split: str) -> Iterator[dict]:
    if on_hub(hub):
        try:  # at once; datasets would ask for half a minute before it gives up
            HfApi().dataset_info(hub, timeout=10)
        except (OSError, HTTPError) as error:
            raise FileNotFoundError(
                f"{hub} cannot be read from the Hub: {error}. Get it where the Hub can be reached "
                f"(`hf download --repo-type dataset {hub} --local-dir DIR`), then give --place DIR"
            ) from error
    rows = load_dataset(hub, config, split=split, streaming=True)
    return iter(rows.decode(False) if rows.features else rows)  # pictures as bytes, not pixels


def files_of(top: Path, split: str) -> list[Path]:
    """The files whose path names the split as a word (data/test-00000-of-1.parquet, but no
    testmini), else all if none names one. Never two splits mixed."""
    if top.is_file():
        return [top]
    near = {*top.iterdir(), *(top / "data").glob("*"), *(top / split).glob("*")}
    files = sorted(f for f in near if f.suffix in ROW_FILES)
    files = files or sorted(f for f in top.rglob("*") if f.suffix in ROW_FILES)

    def naming(words: str) -> list[Path]:
        word = re.compile(rf"(?<![a-z0-9])(?<!non_)(?:{words})(?![a-z0-9])", re.I)
        return [file for file in files if word.search(file.relative_to(top).as_posix())]

    # DynaMath's files are called sample1, its splits sample_variant1
    alias = VALIDATION if split in VALIDATION.split("|") else split.replace("_variant", "")
    ours = naming(split) or naming(alias) or ([] if naming(SPLITS) else files)
    for kind in ROW_FILES:  # a set that lies there as parquet and as JSON is read once
        if alike := [file for file in ours if file.suffix == kind]:
            return alike
    there = [file.name for file in files] or f"no {', '.join(ROW_FILES)} at all"
    raise FileNotFoundError(f"{top}: no file of split {split!r}, but {there}; give the file itself")


def file_rows(path: Path) -> Iterator:
    """Parquet; or JSON lines or one list of JSON, whatever the name says. A list is held whole:
    AtomThink's 214 MB take 1 GB. A row that is a list of turns becomes {"0": ..., "1": ...}, as
    `datasets` has it; a broken line stays bytes, which no reader takes, and counts as malformed."""
    if path.suffix == ".parquet":
        # by default the whole file is held, and more
        table = pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
        for batch in table.iter_batches(batch_size=BATCH):
            yield from batch.to_pylist()
        return
    with path.open("rb") as file:
        is_list = file.read(1) == b"["
        file.seek(0)
        for text in [file.read()] if is_list else filter(bytes.strip, file):
            try:
                rows = json.loads(text)
            except ValueError as error:
                if is_list:
                    raise ValueError(f"{path}: not valid JSON ({error}); fetch it again") from error
                rows = text
            for row in rows if is_list else [rows]:
                yield {str(k): t for k, t in enumerate(row)} if isinstance(row, list) else row
