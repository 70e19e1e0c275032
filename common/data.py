"""Rows on disk become documents of tokens and patches.

    JSONL, JSON, parquet, Hub ──read_problems, read_examples──▶ Problem, Example
    prompt text and pictures  ──encode_prompt──▶ Prompt(ids, patches, grids, offsets)
    response text             ──encode_response──▶ ids + <|im_end|>   (the sampler gives ids itself)
    prompt and response       ──▶ Document, which packs.py lays side by side

Every row is checked once before a run begins, each process taking its share, and a bad one is
reported with file and line. It is parsed again when it is used, so that two million examples take
no memory. A column that nobody reads is named once, and one that was probably meant to be read
(`image`, `precison`, pictures under another name) stops the run with the cure.

Pictures are resized, normalised and cut as transformers' Qwen2VLImageProcessor does, bit for bit;
only grey of 16 bits differs: there it shows white. The order of the data is a function of
(seed, step), so a resumed run sees what it would have seen.

Dimensions: H, W pixels of a picture, which is h x w patches; S patches in all; D = 1176 =
3 x 2 x 14 x 14 values of a patch.
Nothing to run here: see coldstart.py, rl.py, eval.py.
"""

import base64
import difflib
import json
import math
import os
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import lru_cache
from io import BytesIO
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from common.log import progress

IMAGE_MARKER = "<image>"  # where a picture stands in the prompt of a row
IMAGE_PAD = "<|image_pad|>"  # Qwen2.5-VL's tokenizer: one for each merged patch
STOP = "<|im_end|>"  # Qwen2.5-VL's tokenizer: ends a turn, hence a response
VISION = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", IMAGE_PAD, "<|video_pad|>")
MARKUP = (*VISION, STOP, "<|im_start|>", "<|endoftext|>")  # in a row: a turn that is not there
MARKUP_PATTERN = re.compile("|".join(map(re.escape, MARKUP)))  # 6 times as fast as each on its own
MERGE_SIZE = 2  # preprocessor_config.json: 2 x 2 patches become one token
PATCH_VALUES = 3 * 2 * 14 * 14  # Qwen2.5-VL: colours, frames, rows, columns
MAX_ASPECT = 200  # transformers' smart_resize
ROW_FILES = (".jsonl", ".json", ".parquet")
# without these a row would be another question
UNUSABLE = {"system", "system_prompt", "video", "videos", "audio", "audios"}
PICTURE_FILES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
ENDINGS = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "WEBP": b""}
THREADS = 16  # that open pictures: on a network disk they wait more than they work
Share = tuple[int, int]  # (rank, ranks): the rows rank, rank + ranks, rank + 2 ranks, ...
Fetch = Callable[[int], tuple[str, dict, Path]]  # index -> file and line, row, folder of pictures

# ---- records


@dataclass(frozen=True)
class Problem:
    """A question with its reference answer: one row of RL or evaluation data."""

    id: str
    prompt: str
    answer: str
    images: tuple = ()  # paths or PIL images, in the order of their markers
    source: str = ""
    choices: tuple[str, ...] | None = None
    precision: float | None = None
    extra: dict = field(default_factory=dict, hash=False)  # the row's other columns
    place: str = field(default="", compare=False)  # file and line, for messages


@dataclass(frozen=True)
class Example:
    """A question with a worked response: one row of supervised fine-tuning."""

    id: str
    prompt: str
    response: str
    images: tuple = ()
    source: str = ""
    place: str = field(default="", compare=False)


@dataclass(frozen=True)
class ImageSettings:
    min_pixels: int
    max_pixels: int  # dataclasses.replace(settings, max_pixels=...) for shorter prompts
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Prompt:
    ids: list[int]  # each picture expanded to t*h*w / merge^2 image tokens
    short_ids: list[int]  # one image token a picture: what vLLM wants
    patches: Tensor | None  # (S, D) float32, all pictures in order
    grids: tuple[tuple[int, int, int], ...]  # (t, h, w) in patches of each picture
    offsets: tuple[int, ...]  # index in ids of each picture's first image token


@dataclass(frozen=True)
class Document:
    prompt: Prompt
    response_ids: list[int]  # trained, with the stop token that ends it
    name: str = ""  # what a message calls it

    @property
    def ids(self) -> list[int]:
        return self.prompt.ids + self.response_ids

    def __len__(self) -> int:
        return len(self.prompt.ids) + len(self.response_ids)


class Rows(Sequence):
    """A list whose items are made when they are used. A slice is Rows again."""

    def __init__(self, fetch: Callable[[int], Any], indices: Sequence[int]):
        self.fetch, self.indices = fetch, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return Rows(self.fetch, self.indices[i])
        return self.fetch(int(self.indices[i]))


COLUMNS = {  # what is read of a row
    kind: tuple(f.name for f in fields(kind) if f.name not in ("extra", "place"))
    for kind in (Problem, Example)
}

# ---- reading


def read_problems(
    source: str | Path, split: str = "train", columns: Sequence[str] = (), share: Share = (0, 1)
) -> Rows:
    """{"prompt", "answer", "id"?, "images"?, "source"?, "choices"?, "precision"?} -> Problems

    source: a .jsonl, .json or .parquet file; a directory with SPLIT.jsonl, SPLIT-*.parquet, ... in
    it or in its data/; or a Hub name. columns: ("prompt=problem", ...) reads the column `problem`
    as the prompt. share: the rows that this process checks; all can be read.
    """
    return check_rows(Reader(Problem, source, split, columns), share)


def read_examples(
    source: str | Path, split: str = "train", columns: Sequence[str] = (), share: Share = (0, 1)
) -> Rows:
    """{"prompt", "response", "id"?, "images"?, "source"?} -> Examples; the rest as above."""
    return check_rows(Reader(Example, source, split, columns), share)


def check_rows(reader: "Reader", share: Share) -> Rows:
    """Builds each row of the share once: a bad one stops a run at its start, not after hours."""
    for i in progress(range(share[0], len(reader), share[1]), f"checking {reader.source}"):
        reader(i)
    if reader.absent:  # from this share; another may have it
        reader.absent -= {column for i in range(len(reader)) for column in reader.fetch(i)[1]}
    if reader.absent:
        raise ValueError(f"{reader.source}: --columns names {sorted(reader.absent)}, in no row")
    unread = sorted(reader.unread - {*COLUMNS[Problem], *COLUMNS[Example]})
    if unread and share[0] == 0:
        to = "only kept in problem.extra" if reader.kind is Problem else "not read"
        print(f"{reader.source}: columns {to}: {', '.join(unread)}", flush=True)
    return Rows(reader, range(len(reader)))


class Reader:
    """reader(i): row i as a Problem or an Example, checked.

    unread: columns met so far that are not read; absent: those of --columns not met so far.
    """

    def __init__(self, kind: type, source: str | Path, split: str, columns: Sequence[str] = ()):
        self.kind, self.source, self.columns = kind, source, column_names(columns, COLUMNS[kind])
        self.unread, self.absent = set(), set(self.columns.values())
        self.fetch, ids = raw_rows(source, split, self.columns.get("id", "id"))
        if "id" in self.columns.values() and "id" not in self.columns:
            ids = [None] * len(ids)  # it was given another name, and the rows are numbered
        self.length = len(ids)
        self._refuse_equal(ids)

    def __len__(self) -> int:
        return self.length

    def __call__(self, i: int) -> Problem | Example:
        place, row, folder = self.fetch(i)
        self.absent.difference_update(row)
        ours = {name: row[column] for name, column in self.columns.items() if column in row}
        row = {c: value for c, value in row.items() if c not in self.columns.values()} | ours
        if row.get("id") is None:
            row["id"] = f"row-{i}"
        for column in row.keys() - {*COLUMNS[self.kind], *self.columns}:
            if not is_empty(row[column]):
                refuse_lost(place, row, column, COLUMNS[self.kind], folder)
                self.unread.add(column)
        build = problem_of if self.kind is Problem else example_of
        return build(place, row, folder)

    def _refuse_equal(self, ids: list) -> None:
        """Two rows of one name could not be told apart in any log."""
        rows = {}
        for i, name in enumerate(ids):
            name = f"row-{i}" if name is None else str(name)
            first = rows.setdefault(name, i)
            if first != i:
                raise ValueError(
                    f"{self.fetch(i)[0]}: the id {name!r} is also that of {self.fetch(first)[0]}; "
                    f"make them distinct, or take the rows' numbers instead: --columns "
                    f"old_id={self.columns.get('id', 'id')}"
                )


def column_names(columns: Sequence[str], known: tuple[str, ...]) -> dict[str, str]:
    """("prompt=problem",) -> {"prompt": "problem"}. A name that we do not know leads to extra."""
    names = {}
    for text in columns:
        name, equals, column = text.partition("=")
        if not (name and equals and column):
            raise ValueError(f"--columns {text}: write NAME=COLUMN, as prompt=problem")
        if name not in known and (meant := nearest(name, known)):
            raise ValueError(f"--columns {text}: is {meant}={column} meant?")
        if name in names:
            raise ValueError(f"--columns {text}: {name} is {names[name]} already")
        names[name] = column
    return names


@lru_cache(maxsize=4096)
def nearest(name: str, known: tuple[str, ...]) -> str | None:
    """The known column that `name` is a slip of: precison, Answer, imgs. None for all others."""
    if name.lower() in known:
        return name.lower()
    long = [other for other in known if other != "id"]  # idx and uid are columns of their own
    return next(iter(difflib.get_close_matches(name.lower(), long, n=1, cutoff=0.8)), None)


def refuse_lost(place: str, row: dict, column: str, known: tuple[str, ...], folder: Path) -> None:
    """A column that is not read is refused where the question would be another one without it."""
    cure = f"if it does not matter, give it another name: --columns extra_{column}={column}"
    if column.lower() in UNUSABLE:
        raise ValueError(
            f"{place}: column '{column}' cannot be used: a question is one turn of text and "
            f"pictures; move what matters into the prompt; {cure}"
        )
    meant = nearest(column, tuple(name for name in known if is_empty(row.get(name))))
    if meant is None and is_empty(row.get("images")) and shows_picture(row[column], folder):
        meant = "images"
    if meant:
        raise ValueError(
            f"{place}: column '{column}' is not read; if it is '{meant}', say so with "
            f"--columns {meant}={column}; {cure}"
        )


def is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)


def shows_picture(value: Any, folder: Path) -> bool:
    """A picture as `datasets` stores it, a data: URI, the path of a picture; or a list of them."""
    if isinstance(value, list):
        return bool(value) and shows_picture(value[0], folder)
    if isinstance(value, dict):
        return value.keys() == {"bytes", "path"} and not is_empty(value["bytes"] or value["path"])
    if not isinstance(value, str):
        return False
    path = value.lower().endswith(PICTURE_FILES) and os.path.isfile(folder / value)
    return path or value.startswith("data:image/")


def problem_of(place: str, row: dict, folder: Path) -> Problem:
    choices, precision = row.get("choices"), row.get("precision")
    if choices is not None:
        if not isinstance(choices, list) or not choices:
            raise ValueError(f"{place}: column 'choices' must be a list, not {choices!r:.80}")
        choices = tuple(text(place, {"choices": c}, "choices", number=True) for c in choices)
    if precision is not None:
        if not isinstance(precision, int | float) or isinstance(precision, bool):
            raise ValueError(f"{place}: column 'precision' must be a number, not {precision!r:.80}")
        precision = float(text(place, row, "precision", number=True))
    return Problem(
        answer=text(place, row, "answer", number=True),
        choices=choices,
        precision=precision,
        extra={column: row[column] for column in row if column not in COLUMNS[Problem]},
        **question_of(place, row, folder),
    )


def example_of(place: str, row: dict, folder: Path) -> Example:
    response = text(place, row, "response")
    refuse_markup(f"{place}: column 'response'", response)
    return Example(response=response, **question_of(place, row, folder))


def question_of(place: str, row: dict, folder: Path) -> dict[str, Any]:
    """The columns that both kinds of row have."""
    prompt, images = text(place, row, "prompt"), row.get("images")
    images = images if isinstance(images, list) else [] if is_empty(images) else [images]
    refuse_markup(f"{place}: column 'prompt'", prompt)
    split_at_markers(place, prompt, len(images))
    return dict(
        id=text(place, row, "id", number=True),
        prompt=prompt,
        images=tuple(image_source(place, image, folder) for image in images),
        source=text(place, row, "source") if row.get("source") else "",
        place=place,
    )


def text(place: str, row: dict, column: str, number: bool = False) -> str:
    """A column that must be there and hold text; with number=True, 7 is taken as "7"."""
    value = row.get(column)
    if value is None:
        raise ValueError(f"{place}: column '{column}' is missing; the row has {str([*row]):.300}")
    if isinstance(value, bool) or not isinstance(value, str | int | float if number else str):
        kind = "text or a number" if number else "text"
        raise ValueError(f"{place}: column '{column}' must be {kind}, not {value!r:.80}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{place}: column '{column}' is {value}")
    if value == "" or (isinstance(value, str) and value.isspace()):
        raise ValueError(f"{place}: column '{column}' is empty")
    return str(value)


def image_source(place: str, image: Any, folder: Path) -> str | Image.Image:
    """A path relative to the row's file, a data: URI, or {"bytes", "path"} as `datasets` stores it.

    Bytes are base64 in JSON. Only the header of such a picture is read here.
    """
    blob = None
    if isinstance(image, dict):
        blob, image = image.get("bytes"), image.get("path")
    elif isinstance(image, str) and image.startswith("data:"):
        blob = image.partition(",")[2]
    if blob:
        with decoding(f"{place}: embedded picture"):
            return Image.open(BytesIO(base64.b64decode(blob) if isinstance(blob, str) else blob))
    if not isinstance(image, str) or not image:
        raise ValueError(f"{place}: an image must be a path, not {image!r:.80}")
    if not os.path.isfile(folder / image):
        raise FileNotFoundError(
            f"{place}: image {image:.80} does not exist; paths are relative to {folder.resolve()}"
        )
    return str(folder / image)


def refuse_markup(name: str, words: str) -> None:
    if mark := MARKUP_PATTERN.search(words):
        raise ValueError(f"{name} contains {mark[0]}, which is markup of the chat; take it out")


def split_at_markers(place: str, prompt: str, images: int) -> list[str]:
    """The texts between the pictures. Without a marker, all pictures stand before the text."""
    pieces = prompt.split(IMAGE_MARKER)
    if len(pieces) == 1:
        return [""] * images + pieces
    if len(pieces) - 1 != images:
        raise ValueError(
            f"{place}: {len(pieces) - 1} markers {IMAGE_MARKER} for {images} images; write one for "
            f"each image, or none to put all images first"
        )
    return pieces


def raw_rows(source: str | Path, split: str, id_column: str) -> tuple[Fetch, list]:
    """How to get a row as it is written, and the ids of all rows, None where one has none."""
    path = Path(source)
    if path.exists():
        files = split_files(path, split) if path.is_dir() else [path]
        kinds = {".jsonl": jsonl_rows, ".json": json_rows, ".parquet": table_rows}
        if files[0].suffix not in kinds:
            raise ValueError(f"{files[0]}: rows are read from {', '.join(kinds)}")
        fetch, ids = kinds[files[0].suffix](files, id_column)
    elif path.suffix not in ROW_FILES and re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        fetch, ids = table_rows(str(source), id_column, split)
    else:
        raise FileNotFoundError(f"{source}: no such file in {Path.cwd()}, and not a Hub name")
    if not ids:
        raise ValueError(f"{source}: holds no rows")
    return fetch, ids


def split_files(directory: Path, split: str) -> list[Path]:
    """train.jsonl, train-00000-of-00002.parquet, ...: never the test split beside them."""
    paths = [*directory.iterdir(), *directory.glob("data/*")]
    names = sorted(path.name for path in paths if path.suffix in ROW_FILES)
    ours = re.compile(rf"{re.escape(split)}(-.*)?\.(jsonl|json|parquet)")
    files = sorted(path for path in paths if ours.fullmatch(path.name))
    if not files:
        raise FileNotFoundError(
            f"{directory}: no {split}.jsonl, .json or .parquet, nor {split}-*, but {names}; name "
            f"the file itself"
        )
    if len({(path.parent, path.suffix) for path in files}) > 1:
        raise ValueError(f"{directory}: {[p.name for p in files]} are of several kinds; name one")
    return files


def jsonl_rows(files: list[Path], id_column: str) -> tuple[Fetch, list]:
    """An index of the lines, 24 bytes each: 5 us a line of 30 kB.

    The "text" builder of `datasets` takes 200 us, copies all data once more, ends a line at every
    carriage return, and names no line when a byte is wrong; its "json" builder guesses one type
    for all answers.
    """
    lines, ids = array("q"), []  # of each row the file, the line's number and where it begins
    for f, path in enumerate(files):
        offset = 0
        with path.open("rb", buffering=1 << 20) as file:
            for number, line in enumerate(progress(file, f"reading {path.name}"), start=1):
                if not line.isspace():
                    lines.extend((f, number, offset))
                    ids.append(id_of_line(line, id_column))
                offset += len(line)

    def fetch(i: int) -> tuple[str, dict, Path]:
        f, number, offset = lines[3 * i : 3 * i + 3]
        with files[f].open("rb") as file:
            file.seek(offset)
            place, line = f"{files[f]}, line {number}", file.readline()
        return place, as_row(place, parse_json(place, line)), files[f].parent

    return fetch, ids


def id_of_line(line: bytes, column: str) -> str | None:
    """Where the id stands first, as in all that we write, the rest of the line is not parsed."""
    first = re.match(rb'\s*{\s*"([^"\\]*)"\s*:\s*("[^"\\]*"|-?\d+)\s*[,}]', line)
    if first and first[1] == column.encode():
        return first[2].strip(b'"').decode(errors="replace")
    if column.isascii() and column.encode() not in line:
        return None
    try:
        row = parse_json("", line)
        return row.get(column) if isinstance(row, dict) else None
    except ValueError:
        return None  # whoever checks this row says what is wrong with it


def json_rows(files: list[Path], id_column: str) -> tuple[Fetch, list]:
    rows = []
    for path in files:
        content = parse_json(f"{path}", path.read_bytes())
        if not isinstance(content, list):
            raise ValueError(f"{path}: must hold a list of rows; with one a line, call it .jsonl")
        places = [f"{path}, row {i}" for i in range(len(content))]
        pairs = zip(places, content, strict=True)
        rows += [(place, as_row(place, row), path.parent) for place, row in pairs]
    return rows.__getitem__, [row.get(id_column) for _, row, _ in rows]


def parse_json(place: str, content: bytes) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # broken JSON, broken UTF-8, nested too deep
        raise ValueError(f"{place}: not JSON ({error})") from None


def as_row(place: str, row: Any) -> dict:
    if not isinstance(row, dict):
        raise ValueError(f"{place}: a row must be an object with named columns, not {row!r:.80}")
    for column, value in row.items():
        try:  # "\\ud83d" is JSON and is no character: no log could be written with it
            words = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            (column + words).encode()
        except (UnicodeEncodeError, RecursionError) as error:
            raise ValueError(f"{place}: column {column!r:.80} is not text ({error})") from None
    return row


def table_rows(source: list[Path] | str, id_column: str, split="train") -> tuple[Fetch, list]:
    """Parquet files, or a Hub name, through the cache of `datasets`, where HF_HOME says."""
    import datasets  # here, because the import takes a second that JSON need not pay

    local = not isinstance(source, str)
    name, folder = (str(source[0]), source[0].parent) if local else (source, Path("."))
    which = dict(data_files=[str(path) for path in source]) if local else {}
    try:
        table = datasets.load_dataset("parquet" if local else source, split=split, **which)
        table = table.with_format("arrow")  # no picture is decoded
        present = id_column in table.column_names
        ids = table[id_column].to_pylist() if present else [None] * len(table)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        cure = "is it parquet?" if local else f"is it on the Hub, with a split {split}? or a path?"
        kind = ValueError if local else FileNotFoundError
        raise kind(f"{name}: not readable ({error.__cause__ or error}); {cure}") from error

    def fetch(i: int) -> tuple[str, dict, Path]:
        place = f"{name}, row {i}"
        try:
            return place, table[i].to_pylist()[0], folder
        except ValueError as error:  # text that is not UTF-8
            raise ValueError(f"{place}: not readable ({error})") from None

    return fetch, ids


# ---- pictures


@contextmanager
def decoding(name: str) -> Iterator[None]:
    """One message for whatever is wrong with a picture.

    Pillow's decoders raise a dozen kinds of error at damaged files, TypeError, RuntimeError and
    struct.error among them. So all are caught, and nothing but decoding happens inside.
    """
    try:
        yield
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"{name}: damaged picture ({reason:.300}); replace the file") from error


def open_image(source: Any, name: str) -> Image.Image:
    """Reads the header: the size is known, the pixels are not decoded yet."""
    with decoding(name):
        return Image.open(source)


def load_image(image: str | Path | Image.Image, name: str = "") -> Image.Image:
    """-> upright RGB. Give the sampler this very picture, or it sees another one than the trainer.

    As transformers' load_image: the camera's rotation is applied, alpha is dropped and not blended.
    """
    name = name or picture_name(image)
    opened = image if isinstance(image, Image.Image) else open_image(image, name)
    with decoding(name):
        opened.load()
        rotation = opened.getexif().get(ExifTags.Base.Orientation)
        picture = eight_bits(opened).convert("RGB")
        picture.info = {}  # exif_transpose writes the other fields anew, and fails at a broken one
        picture.getexif()[ExifTags.Base.Orientation] = rotation
        return ImageOps.exif_transpose(picture)


def eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits as grey of 8. Pillow's own conversion cuts at 255: nearly all turns white."""
    if not image.mode.startswith(("I", "F")):
        return image
    levels = np.asarray(image)
    if image.mode == "F" or levels.min() < 0 or levels.max() > 65535:
        raise ValueError(f"mode {image.mode} has no known white; save it with 8 bits a channel")
    return Image.fromarray(np.round(levels / 257).astype(np.uint8))


def check_images(rows: Sequence, share: Share = (0, 1)) -> int:
    """Opens header and end of every picture of the share and returns how many there are.

    A file that was cut is found now, and not when its row comes up, hours into a run. 10,000
    pictures of a local disk take 2 s, where to decode them takes 40. What is wrong in the middle of
    a file is found only when it is decoded.
    """

    def faults(i: int) -> list[str]:
        row = rows[i]
        return [image_fault(image, row.place or row.id) for image in row.images]

    mine = range(share[0], len(rows), share[1])
    with ThreadPool(THREADS) as pool:
        results = progress(pool.imap(faults, mine, chunksize=64), "checking pictures", len(mine))
        pictures = [fault for row_faults in results for fault in row_faults]
    if damaged := [fault for fault in pictures if fault]:
        more = [f"and {len(damaged) - 20} more"] if len(damaged) > 20 else []
        raise ValueError("\n".join(damaged[:20] + more))
    return len(pictures)


def image_fault(image: str | Image.Image, place: str) -> str:
    """What is wrong with a picture, or "". It is decoded only where its end looks wrong."""
    name = f"{place}: {picture_name(image)}"
    try:
        opened = image if isinstance(image, Image.Image) else open_image(image, name)
        file = getattr(opened, "fp", None)
        if file is None:
            return ""  # made in memory
        with decoding(name):
            if "exif" in opened.info:
                opened.getexif()
            position, size = file.tell(), file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 4096))
            tail = file.read().rstrip(b"\0")  # a disk's empty blocks do no harm
            file.seek(position)
        known = opened.format in ENDINGS and not opened.mode.startswith(("I", "F"))
        if not (known and tail.endswith(ENDINGS[opened.format])):
            load_image(opened, name)
    except ValueError as error:
        return str(error)
    return ""


def picture_name(image: str | Path | Image.Image) -> str:
    return "embedded picture" if isinstance(image, Image.Image) else str(image)


def load_image_settings(directory: str | Path) -> ImageSettings:
    path = Path(directory) / "preprocessor_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; copy it from the Qwen2.5-VL model")
    raw = as_row(f"{path}", parse_json(f"{path}", path.read_bytes()))
    size = raw.get("size") or {}  # newer files give the bounds here; both are counts of pixels
    try:
        return ImageSettings(
            raw.get("min_pixels") or size["shortest_edge"],
            raw.get("max_pixels") or size["longest_edge"],
            raw["patch_size"],
            raw["temporal_patch_size"],
            raw["merge_size"],
            tuple(raw["image_mean"]),
            tuple(raw["image_std"]),
        )
    except KeyError as error:
        raise ValueError(f"{path}: {error} is missing; copy it from the Qwen2.5-VL model") from None


def smart_resize(height: int, width: int, settings: ImageSettings) -> tuple[int, int]:
    """(height, width): multiples of 28, area in [min_pixels, max_pixels], ratio about kept.

    Qwen2-VL (arXiv 2409.12191, sec. 2.1, naive dynamic resolution). Halves are rounded to even.
    """
    ratio = max(height, width) / min(height, width)
    if ratio > MAX_ASPECT:
        raise ValueError(f"image of {width} x {height} px: aspect ratio {ratio:.0f} > {MAX_ASPECT}")
    unit = settings.patch_size * settings.merge_size
    high, wide = round(height / unit) * unit, round(width / unit) * unit
    if high * wide > settings.max_pixels:
        scale = math.sqrt(height * width / settings.max_pixels)
        high = max(unit, math.floor(height / scale / unit) * unit)
        wide = max(unit, math.floor(width / scale / unit) * unit)
    elif high * wide < settings.min_pixels:
        scale = math.sqrt(settings.min_pixels / (height * width))
        high = math.ceil(height * scale / unit) * unit
        wide = math.ceil(width * scale / unit) * unit
    return high, wide


def image_patches(image: str | Path | Image.Image, settings: ImageSettings) -> tuple[Tensor, tuple]:
    """-> patches (S, D) float32 and grid (t, h, w) with S = t*h*w; a picture is one moment, t = 1.

    The patches of a merge block are neighbours: block rows, blocks, then rows and columns within.
    """
    image = load_image(image)
    height, width = smart_resize(image.height, image.width, settings)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))  # (H, W, 3) uint8
    # A channel has 256 levels: normalise those, rounding as the official code does, and look up.
    levels = (np.arange(256)[:, None] * (1 / 255)).astype(np.float32)
    levels = (levels - np.float32(settings.mean)) / np.float32(settings.std)  # (256, 3)
    p, m = settings.patch_size, settings.merge_size
    h, w = height // p, width // p
    cells = levels[pixels, np.arange(3)].reshape(h // m, m, p, w // m, m, p, 3)
    cells = cells.transpose(0, 3, 1, 4, 6, 2, 5)[:, :, :, :, :, None]
    # (h/m, w/m, m, m, 3, 1, p, p), and a still is the same frame twice
    frames = np.repeat(cells, settings.temporal_patch_size, axis=5)
    return torch.from_numpy(frames.reshape(h * w, -1)), (1, h, w)


def image_tokens(grid: tuple[int, int, int], merge: int) -> int:
    return math.prod(grid) // merge**2


# ---- tokens


def model_directory(name: str | Path) -> str:
    """A directory as it is; a Hub name as the directory in the Hub's cache that holds its snapshot.

    Nothing is downloaded where HF_HUB_OFFLINE=1, as the scripts under runs/ set it: then
    FileNotFoundError says how to get it.
    """
    if Path(name).is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        return str(name)  # what is not there is named by whoever opens it
    wanted = ["*.json", "*.safetensors", "*.jinja", "merges.txt"]
    try:
        return snapshot_download(str(name), allow_patterns=wanted)
    except (FileNotFoundError, ConnectionError, RepositoryNotFoundError) as error:
        raise FileNotFoundError(
            f"{name}: no such directory, and no such model in the Hub's cache; get it with "
            f"`HF_HUB_OFFLINE=0 hf download {name}`, or give the directory that holds it"
        ) from error


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """With its chat template, which older model directories keep in chat_template.json."""
    if not (Path(directory) / "tokenizer_config.json").is_file():
        raise FileNotFoundError(f"{directory}: no tokenizer_config.json, so not a model directory")
    tokenizer = AutoTokenizer.from_pretrained(str(directory))
    older = Path(directory) / "chat_template.json"
    if tokenizer.chat_template is None and older.is_file():
        template = as_row(f"{older}", parse_json(f"{older}", older.read_bytes()))
        tokenizer.chat_template = template.get("chat_template")
    if tokenizer.chat_template is None:
        raise ValueError(f"{directory}: no chat template; copy chat_template.json from the model")
    missing = {IMAGE_PAD, STOP} - tokenizer.get_vocab().keys()
    if missing:
        raise ValueError(f"{directory}: no {sorted(missing)} in the tokenizer; use Qwen2.5-VL's")
    return tokenizer


def chat_ids(prompt: str, images: int, tokenizer: PreTrainedTokenizerBase, name: str) -> list[int]:
    """The user's turn and the opening of the answer, by the chat template; one token a picture."""
    refuse_markup(name, prompt)
    content = []
    for i, piece in enumerate(split_at_markers(name, prompt, images)):
        content += [{"type": "image"}] if i else []
        content += [{"type": "text", "text": piece}] if piece else []
    turn = [{"role": "user", "content": content}]
    chat = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(chat, add_special_tokens=False)  # the template has written them
    pads = ids.count(tokenizer.convert_tokens_to_ids(IMAGE_PAD))
    if pads != images:
        raise ValueError(f"{name}: the chat template wrote {pads} image tokens for {images} images")
    return ids


def encode_prompt(
    prompt: str,
    images: Sequence[str | Image.Image],
    tokenizer: PreTrainedTokenizerBase,
    settings: ImageSettings | None,  # None will do where there are no pictures
    name: str = "prompt",  # what an error calls it: the id of the row
) -> Prompt:
    short_ids = chat_ids(prompt, len(images), tokenizer, name)
    try:
        pictures = [image_patches(image, settings) for image in images]
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    pad = tokenizer.convert_tokens_to_ids(IMAGE_PAD)
    grids = tuple(grid for _, grid in pictures)
    ids, offsets = [], []
    for token in short_ids:
        count = 1
        if token == pad:  # only the template can have written it: chat_ids refuses others
            count = image_tokens(grids[len(offsets)], settings.merge_size)
            offsets.append(len(ids))
        ids += [token] * count
    patches = torch.cat([part for part, _ in pictures]) if pictures else None
    return Prompt(ids, short_ids, patches, grids, tuple(offsets))


def prompt_length(
    prompt: str,
    images: Sequence[str | Image.Image],
    tokenizer: PreTrainedTokenizerBase,
    settings: ImageSettings | None,
    name: str = "prompt",
) -> int:
    """len(encode_prompt(...).ids) from the headers of the images, without decoding a pixel."""
    length = len(chat_ids(prompt, len(images), tokenizer, name))
    for image in images:
        try:  # a camera's rotation swaps the sides, and the count stays
            image = image if isinstance(image, Image.Image) else open_image(image, str(image))
            height, width = smart_resize(image.height, image.width, settings)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        length += height * width // (settings.patch_size * settings.merge_size) ** 2 - 1
    return length


def encode_response(response: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a written response, and the stop token, which is trained like any other."""
    refuse_markup("response", response)
    ids = tokenizer.encode(response, add_special_tokens=False)
    return [*ids, tokenizer.convert_tokens_to_ids(STOP)]


def encode_example(
    example: Example, tokenizer: PreTrainedTokenizerBase, settings: ImageSettings | None
) -> Document:
    name = example.place or example.id
    prompt = encode_prompt(example.prompt, example.images, tokenizer, settings, name)
    return Document(prompt, encode_response(example.response, tokenizer), name)


def filter_long(items: Sequence, limit: int, lengths: Mapping | Sequence) -> tuple[Rows, int]:
    """The items of at most `limit` tokens, and how many were left out. None is ever cut to fit: a
    prompt that ends inside a picture has fewer image tokens than image rows. lengths[i]: of item i.
    """
    short = [i for i in range(len(items)) if lengths[i] <= limit]
    return Rows(items.__getitem__, short), len(items) - len(short)


# ---- order


@lru_cache(maxsize=2)  # a batch may span two epochs
def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


class Stream:
    """Endless batches, a fresh permutation each epoch. Without state, so a resume needs none."""

    def __init__(self, items: Sequence, seed: int):
        if not len(items):
            raise ValueError("a stream needs at least one item; were all of them filtered out?")
        self.items, self.seed = items, seed

    def batch(self, step: int, count: int) -> list:
        """Places [step * count, (step + 1) * count) of the endless order, with a constant count."""
        places = (divmod(i, len(self.items)) for i in range(step * count, (step + 1) * count))
        order = [permutation(len(self.items), self.seed, epoch)[k] for epoch, k in places]
        return [self.items[int(i)] for i in order]
