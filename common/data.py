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

Dimensions: S patches of all pictures; D = 1176 = 3 x 2 x 14 x 14 values of a patch; H, W pixels of
a picture, which is h x w patches. Nothing to run here: see coldstart.py, rl.py, eval.py.
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
from functools import lru_cache, partial
from io import BytesIO
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError
from jinja2 import TemplateError
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from transformers import AutoTokenizer
from transformers import PreTrainedTokenizerBase as Tokenizer

from common.log import progress

IMAGE_MARKER = "<image>"  # where a picture stands in the prompt of a row
IMAGE_PAD = "<|image_pad|>"  # Qwen2.5-VL's tokenizer: one for each merged patch
STOP = "<|im_end|>"  # Qwen2.5-VL's tokenizer: ends a turn, hence a response
VISION = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", IMAGE_PAD, "<|video_pad|>")
MARKUP = (*VISION, STOP, "<|im_start|>", "<|endoftext|>")  # in a row: a turn that is not there
MARKUP_PATTERN = re.compile("|".join(map(re.escape, MARKUP)))  # 6 times as fast as each on its own
MERGE_SIZE = 2  # preprocessor_config.json: 2 x 2 patches become one token
PATCH_VALUES = 3 * 2 * 14 * 14  # Qwen2.5-VL: colours, frames, rows, columns
ROW_FILES = (".jsonl", ".json", ".parquet")
MAX_ASPECT = 200  # transformers' smart_resize
HUB_NAME = r"[\w.-]+/[\w.-]+"
EMPTY = (None, "", [], {})  # a column that holds nothing
# columns without which a row would be another question
UNUSABLE = ("system", "system_prompt", "video", "videos", "audio", "audios")
PICTURE_FILES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
# how a whole file ends; pillow sees by itself that a WEBP was cut
ENDINGS = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9", "WEBP": b""}
THREADS = 16  # that open pictures: on a network disk they wait more than they work
Share = tuple[int, int]  # (rank, ranks): the rows rank, rank + ranks, rank + 2 ranks, ...
Fetch = Callable[[int], tuple[str, dict, Path]]  # index -> file and line, row, folder of pictures
Picture = str | Path | Image.Image

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
        self.pictured: dict[Share, list[int]] = {}  # of a share that was checked: rows with any

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


def read_rows(
    kind: type,
    source: str | Path,  # .jsonl, .json, .parquet, a directory as of the Hub, or a name there
    split: str = "train",
    columns: Sequence[str] = (),  # ("prompt=problem", ...): the column `problem` is the prompt
    share: Share = (0, 1),  # the rows that this process checks; all can be read
) -> Rows:
    """{"prompt", "answer", "id"?, "images"?, "source"?, "choices"?, "precision"?} -> Problems,
    {"prompt", "response", "id"?, "images"?, "source"?} -> Examples.

    Each row of the share is built once: a bad one stops a run at its start, not after hours.
    """
    names = {name: column for name, _, column in (text.partition("=") for text in columns)}
    if len(names) < len(columns) or "" in (*names, *names.values()):
        raise ValueError(f"--columns {' '.join(columns)}: write NAME=COLUMN for each, a name once")
    # where --columns gives `id` another name, no column is the id, and rows are numbered
    id_column = names.get("id", None if "id" in names.values() else "id")
    fetch, ids = raw_rows(source, split, id_column)
    first = {}
    for i, name in enumerate(ids):
        name = f"row-{i}" if name is None else str(name)
        if first.setdefault(name, i) != i:  # two of one name could not be told apart in any log
            places = f"{fetch(i)[0]}: the id {name!r} is also that of {fetch(first[name])[0]}"
            raise ValueError(f"{places}; make them distinct, or --columns old_id={id_column}")
    for column in names.values():
        if not any(column in fetch(i)[1] for i in range(len(ids))):
            raise ValueError(f"{source}: --columns names {column!r}, which is in no row")

    def renamed(i: int) -> tuple[str, dict, Path]:
        place, row, folder = fetch(i)
        ours = {name: row[column] for name, column in names.items() if column in row}
        row = {column: row[column] for column in row if column not in names.values()} | ours
        row["id"] = f"row-{i}" if row.get("id") is None else row["id"]
        return place, row, folder

    build, unread, pictured = problem_of if kind is Problem else example_of, set(), []
    for i in progress(range(share[0], len(ids), share[1]), f"checking {source}"):
        place, row, folder = renamed(i)
        unread |= unread_columns(place, row, COLUMNS[kind], folder)
        if build(place, row, folder).images:
            pictured.append(i)
    unread -= {*names, *COLUMNS[Problem], *COLUMNS[Example]}
    if unread and share[0] == 0:
        to = "only kept in problem.extra" if kind is Problem else "not read"
        print(f"{source}: columns {to}: {', '.join(sorted(unread))}", flush=True)
    rows = Rows(lambda i: build(*renamed(i)), range(len(ids)))
    rows.pictured[share] = pictured
    return rows


read_problems, read_examples = partial(read_rows, Problem), partial(read_rows, Example)


def unread_columns(place: str, row: dict, known: tuple[str, ...], folder: Path) -> set[str]:
    """One without which the row would be another question is refused, unless called extra_..."""
    unread = {column for column in row if column not in known and row[column] not in EMPTY}
    free = tuple(name for name in known if row.get(name) in EMPTY)
    for column in unread:
        pictured = "images" in free and shows_picture(row[column], folder)
        meant, cure = nearest(column, free) or ("images" if pictured else None), ""
        if column.lower() in UNUSABLE:
            cure = "a question is one turn of text and pictures: move it into the prompt"
        elif meant:
            cure = f"if it is '{meant}', say so with --columns {meant}={column}"
        if cure and not column.startswith("extra_"):
            cure += f"; if it does not matter, with --columns extra_{column}={column}"
            raise ValueError(f"{place}: column '{column}' is not read; {cure}")
    return unread


@lru_cache(maxsize=4096)
def nearest(name: str, known: tuple[str, ...]) -> str | None:
    """The known column that `name` is a slip of: precison, Answer, imgs. None for all others."""
    long = [other for other in known if other != "id"]  # idx and uid are columns of their own
    return next(iter(difflib.get_close_matches(name.lower(), long, n=1, cutoff=0.8)), None)


def shows_picture(value: Any, folder: Path) -> bool:
    """A picture as `datasets` stores it, a data: URI, the path of a picture; or a list of them."""
    first = value[0] if isinstance(value, list) else value
    if isinstance(first, str):
        file = first[-5:].lower().endswith(PICTURE_FILES) and os.path.isfile(folder / first)
        return file or first.startswith("data:image/")
    return isinstance(first, dict) and first.keys() == {"bytes", "path"}


def problem_of(place: str, row: dict, folder: Path) -> Problem:
    choices, precision = row.get("choices") or [], row.get("precision")
    if not isinstance(choices, list):
        raise ValueError(f"{place}: column 'choices' must be a list, not {choices!r:.80}")
    if precision is not None and not is_number(precision):
        raise ValueError(f"{place}: column 'precision' must be a number, not {precision!r:.80}")
    return Problem(
        answer=text(place, row, "answer", number=True),
        choices=tuple(text(place, {"choices": c}, "choices", number=True) for c in choices) or None,
        precision=None if precision is None else float(precision),
        extra={column: row[column] for column in row if column not in COLUMNS[Problem]},
        **question_of(place, row, folder),
    )


def example_of(place: str, row: dict, folder: Path) -> Example:
    response = text(place, row, "response")
    refuse_markup(f"{place}: column 'response'", response)
    return Example(response=response, **question_of(place, row, folder))


def question_of(place: str, row: dict, folder: Path) -> dict[str, Any]:
    """The columns that both kinds of row have."""
    prompt, images = text(place, row, "prompt"), row.get("images") or []
    images = images if isinstance(images, list) else [images]
    refuse_markup(f"{place}: column 'prompt'", prompt)
    split_at_markers(place, prompt, len(images))
    return dict(
        id=text(place, row, "id", number=True),
        prompt=prompt,
        images=tuple(image_source(place, image, folder) for image in images),
        source=text(place, row, "source") if row.get("source") else "",
        place=place,
    )


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def text(place: str, row: dict, column: str, number: bool = False) -> str:
    """A column that must be there and hold text; with number=True, 7 is taken as "7"."""
    value = row.get(column)
    if value is None:
        raise ValueError(f"{place}: column '{column}' is missing; the row has {str([*row]):.300}")
    if not isinstance(value, str) and not (number and is_number(value)):
        kind = "text or a number" if number else "text"
        raise ValueError(f"{place}: column '{column}' must be {kind}, not {value!r:.80}")
    if not str(value).strip():
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
    if not isinstance(image, str) or not os.path.isfile(folder / image):
        fault = f"image {image!r:.80} does not exist; paths are relative to {folder.resolve()}"
        raise FileNotFoundError(f"{place}: {fault}")
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
        count = f"{len(pieces) - 1} markers {IMAGE_MARKER} for {images} images"
        raise ValueError(f"{place}: {count}; write one for each, or none to put all images first")
    return pieces


def raw_rows(source: str | Path, split: str, id_column: str | None) -> tuple[Fetch, list]:
    """How to get a row as it is written, and the ids of all rows, None where one has none."""
    path = Path(source)
    files = split_files(path, split) if path.is_dir() else [path]
    is_name = path.suffix not in ROW_FILES and re.fullmatch(HUB_NAME, str(source))
    if not path.exists() and not is_name:
        raise FileNotFoundError(f"{source}: no such file in {Path.cwd()}, and not a Hub name")
    if path.exists() and files[0].suffix not in ROW_FILES:
        raise ValueError(f"{source}: rows are read from {', '.join(ROW_FILES)}")
    if not path.exists() or files[0].suffix == ".parquet":
        fetch, ids = table_rows(files, split, id_column)
    else:
        fetch, ids = (list_rows if files[0].suffix == ".json" else line_rows)(files[0], id_column)
    if not ids:
        raise ValueError(f"{source}: holds no rows")
    return fetch, ids


def split_files(directory: Path, split: str) -> list[Path]:
    """train.jsonl, train.json or all of train-*.parquet, as the Hub names them; never the test
    split beside it. ValueError where that is not one thing.
    """
    paths = [*directory.iterdir(), *directory.glob("data/*")]
    paths = sorted(path for path in paths if path.suffix in ROW_FILES)
    ours = [path for path in paths if path.stem == split or path.stem.startswith(f"{split}-")]
    if not ours or (len(ours) > 1 and {path.suffix for path in ours} != {".parquet"}):
        names = [path.name for path in ours or paths]
        fault = f"holds {names}, where {split}.jsonl, .json or {split}-*.parquet is wanted"
        raise ValueError(f"{directory}: {fault}: name the file itself")
    return ours


def line_rows(path: Path, id_column: str | None) -> tuple[Fetch, list]:
    """An index of the lines, 16 bytes each, in 5 us a line of 30 kB if its id stands first.

    `datasets` takes 200 us, copies all data once more, ends a line at every carriage return or
    guesses one type for all answers, and names no line when a byte is wrong.
    """
    key = re.escape(json.dumps(id_column).encode())
    id_first = re.compile(rb"\s*{\s*" + key + rb'\s*:\s*("[^"\\]*"|-?\d+)\s*[,}]')
    numbers, offsets, ids, offset = array("q"), array("q"), [], 0
    with path.open("rb", buffering=1 << 20) as file:
        for number, line in enumerate(progress(file, f"reading {path.name}"), start=1):
            if not line.isspace():
                numbers.append(number)
                offsets.append(offset)
                if first := id_first.match(line):  # so the rest of the line is not parsed
                    ids.append(first[1].strip(b'"').decode(errors="replace"))
                else:
                    ids.append(parse_json(f"{path}, line {number}", line).get(id_column))
            offset += len(line)

    def fetch(i: int) -> tuple[str, dict, Path]:
        place = f"{path}, line {numbers[i]}"
        with path.open("rb") as file:
            file.seek(offsets[i])
            return place, parse_json(place, file.readline()), path.parent

    return fetch, ids


def list_rows(path: Path, id_column: str | None) -> tuple[Fetch, list]:
    places, rows = [], parse_json(f"{path}", path.read_bytes(), list)
    for i, row in enumerate(rows):
        places.append(f"{path}, row {i}")
        parse_json(places[i], json.dumps(row).encode())
    return lambda i: (places[i], rows[i], path.parent), [row.get(id_column) for row in rows]


def parse_json(place: str, content: bytes, kind: type = dict) -> Any:
    try:
        value = json.loads(content.decode("utf-8-sig"))
        if b"\\u" in content:  # "\\ud83d" is JSON and half a character: no log could hold it
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # broken JSON, broken UTF-8, nested too deep
        raise ValueError(f"{place}: not JSON ({error})") from None
    if not isinstance(value, kind):
        wanted = "an object with named columns" if kind is dict else "a list of rows"
        raise ValueError(f"{place}: must be {wanted}, not {value!r:.80}")
    return value


def table_rows(files: list[Path], split: str, id_column: str | None) -> tuple[Fetch, list]:
    """Parquet files, or a Hub name, through the cache that `datasets` has."""
    import datasets  # here, because the import takes a second that JSON need not pay

    source, folder = files[0], files[0].parent
    kind, names = (
        ("parquet", {split: [*map(str, files)]}) if source.is_file() else (f"{source}", None)
    )
    try:  # in this format no picture is decoded
        table = datasets.load_dataset(kind, data_files=names, split=split).with_format("arrow")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        fault = f"not readable as parquet, nor on the Hub with a split {split}"
        raise FileNotFoundError(f"{source}: {fault} ({error.__cause__ or error})") from error
    ids = table[id_column].to_pylist() if id_column in table.column_names else [None] * len(table)
    return lambda i: (f"{source}, row {i}", table[i].to_pylist()[0], folder), ids


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
        raise ValueError(f"{name}: damaged picture ({reason:.300}); replace it") from error


def opened(image: Picture) -> Image.Image:  # its header: the size is known, no pixel decoded
    return image if isinstance(image, Image.Image) else Image.open(image)


def picture_name(image: Picture, row: str = "") -> str:
    name = "embedded picture" if isinstance(image, Image.Image) else str(image)
    return f"{row}: {name}" if row else name


def load_image(image: Picture) -> Image.Image:
    """-> upright RGB. The sampler gets this very picture, or it sees another than the trainer."""
    with decoding(picture_name(image)):
        return upright(opened(image))


def upright(image: Image.Image) -> Image.Image:
    """As transformers' load_image: the camera's rotation is applied, alpha is dropped and not
    blended. Grey of 16 bits becomes 8 bits; pillow's own conversion cuts at 255: all turns white.
    """
    image.load()
    rotation = image.getexif().get(ExifTags.Base.Orientation)
    if image.mode.startswith(("I", "F")):
        levels = np.asarray(image)
        if image.mode == "F" or levels.min() < 0 or levels.max() > 65535:
            raise ValueError(f"mode {image.mode} has no known white; save 8 bits a channel")
        image = Image.fromarray(np.round(levels / 257).astype(np.uint8))
    picture = image.convert("RGB")
    picture.info = {}  # exif_transpose writes the other fields anew, and fails at a broken one
    picture.getexif()[ExifTags.Base.Orientation] = rotation
    return ImageOps.exif_transpose(picture)


def check_images(rows: Sequence, share: Share = (0, 1)) -> int:
    """Opens header and end of every picture of the share and returns how many there are.

    A file that was cut is found now, and not when its row comes up, hours into a run. 10,000
    pictures of a local disk take 2 s, where to decode them takes 40. What is wrong in the middle of
    a file is found only when it is decoded.
    """
    mine = range(share[0], len(rows), share[1])
    if isinstance(rows, Rows):  # rows without pictures are not built again, where that is known
        mine = rows.pictured.get(share, mine)
    with ThreadPool(THREADS) as pool:
        results = pool.imap(lambda i: check_pictures(rows[i]), mine, chunksize=64)
        results = [*progress(results, "checking pictures", len(mine))]
    if damaged := [fault for _, fault in results if fault]:
        first = "\n".join(damaged[:20])
        raise ValueError(f"pictures of {len(damaged)} rows are damaged, among them\n{first}")
    return sum(count for count, _ in results)


def check_pictures(row: Problem | Example) -> tuple[int, str]:
    """-> how many there are, and what is wrong with one of them. Decoded only if the end is odd."""
    try:
        for image in row.images:
            with decoding(picture_name(image, row.place or row.id)):
                picture = opened(image)
                if "exif" in picture.info:
                    picture.getexif()
                if not ends_well(picture):
                    upright(picture)
    except ValueError as error:
        return 0, str(error)
    return len(row.images), ""


def ends_well(image: Image.Image) -> bool:
    """Whether its file ends as its format does. A picture without a file was made in memory."""
    file = getattr(image, "fp", None)
    if file is None:
        return True
    file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
    tail = file.read().rstrip(b"\0")  # a disk's empty blocks do no harm
    return image.format in ENDINGS and tail.endswith(ENDINGS[image.format])


def load_image_settings(directory: str | Path) -> ImageSettings:
    path = Path(directory) / "preprocessor_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; copy it from the Qwen2.5-VL model")
    raw = parse_json(f"{path}", path.read_bytes())
    size = raw.get("size") or {}  # newer files give the bounds here; both are counts of pixels
    bounds = {"min_pixels": size.get("shortest_edge"), "max_pixels": size.get("longest_edge")}
    raw = bounds | {name: value for name, value in raw.items() if value is not None}
    names = [*bounds, "patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std"]
    if missing := [name for name in names if raw.get(name) is None]:
        raise ValueError(f"{path}: {missing} missing; copy it from the Qwen2.5-VL model")
    *numbers, mean, std = (raw[name] for name in names)
    return ImageSettings(*numbers, tuple(mean), tuple(std))


def smart_resize(
    height: int, width: int, settings: ImageSettings, name: str = "image"
) -> tuple[int, int]:
    """(height, width): multiples of 28, area in [min_pixels, max_pixels], ratio about kept.

    Qwen2-VL (arXiv 2409.12191, sec. 2.1, naive dynamic resolution). Halves are rounded to even.
    """
    ratio = max(height, width) / min(height, width)
    if ratio > MAX_ASPECT:
        size = f"{width} x {height} px"
        raise ValueError(f"{name} of {size}: aspect ratio {ratio:.0f} > {MAX_ASPECT}")
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


def image_patches(
    image: Picture, settings: ImageSettings, row: str = ""
) -> tuple[Tensor, tuple[int, int, int]]:
    """-> patches (S, D) float32 and grid (t, h, w) with S = t*h*w; a picture is one moment, t = 1.

    The patches of a merge block are neighbours: block rows, blocks, then rows and columns within.
    """
    name = picture_name(image, row)
    with decoding(name):
        image = upright(opened(image))
    height, width = smart_resize(image.height, image.width, settings, name)
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
    if Path(name).is_dir() or not re.fullmatch(HUB_NAME, str(name)):
        return str(name)  # what is not there is named by whoever opens it
    wanted = ["*.json", "*.safetensors", "*.jinja", "merges.txt"]
    try:
        return snapshot_download(str(name), allow_patterns=wanted)
    except (FileNotFoundError, ConnectionError, RepositoryNotFoundError) as error:
        raise FileNotFoundError(
            f"{name}: no such directory, and no such model in the Hub's cache; get it with "
            f"`HF_HUB_OFFLINE=0 hf download {name}`, or give the directory that holds it"
        ) from error


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """With its chat template, which older model directories keep in chat_template.json."""
    if not (Path(directory) / "tokenizer_config.json").is_file():
        raise FileNotFoundError(f"{directory}: no tokenizer_config.json, so not a model directory")
    tokenizer = AutoTokenizer.from_pretrained(str(directory))
    older = Path(directory) / "chat_template.json"
    if tokenizer.chat_template is None and older.is_file():
        tokenizer.chat_template = parse_json(f"{older}", older.read_bytes()).get("chat_template")
    if tokenizer.chat_template is None:
        raise ValueError(f"{directory}: no chat template; copy chat_template.json from the model")
    if missing := {IMAGE_PAD, STOP} - tokenizer.get_vocab().keys():
        raise ValueError(f"{directory}: no {sorted(missing)} in the tokenizer; use Qwen2.5-VL's")
    return tokenizer


def chat_ids(prompt: str, images: int, tokenizer: Tokenizer, name: str) -> list[int]:
    """The user's turn and the opening of the answer, by the chat template; one token a picture."""
    refuse_markup(name, prompt)
    content = []
    for i, piece in enumerate(split_at_markers(name, prompt, images)):
        content += [{"type": "image"}] if i else []
        content += [{"type": "text", "text": piece}] if piece else []
    turn = [{"role": "user", "content": content}]
    try:
        chat = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:  # a template says what its model cannot read
        raise ValueError(f"{name}: {error}") from error
    ids = tokenizer.encode(chat, add_special_tokens=False)  # the template has written them
    pads = ids.count(tokenizer.convert_tokens_to_ids(IMAGE_PAD))
    if pads != images:
        raise ValueError(f"{name}: the chat template wrote {pads} image tokens for {images} images")
    return ids


def encode_prompt(
    prompt: str,
    images: Sequence[Picture],
    tokenizer: Tokenizer,
    settings: ImageSettings | None,  # None will do where there are no pictures
    name: str = "prompt",  # what an error calls it: the id of the row
) -> Prompt:
    short_ids = chat_ids(prompt, len(images), tokenizer, name)
    pictures = [image_patches(image, settings, name) for image in images]
    grids = tuple(grid for _, grid in pictures)
    pad, ids, offsets = tokenizer.convert_tokens_to_ids(IMAGE_PAD), [], []
    for token in short_ids:
        if token != pad:
            ids.append(token)
        else:  # only the template can have written it: chat_ids refuses others
            grid = grids[len(offsets)]
            offsets.append(len(ids))
            ids += [pad] * image_tokens(grid, settings.merge_size)
    patches = torch.cat([part for part, _ in pictures]) if pictures else None
    return Prompt(ids, short_ids, patches, grids, tuple(offsets))


def prompt_length(
    prompt: str,
    images: Sequence[Picture],
    tokenizer: Tokenizer,
    settings: ImageSettings | None,
    name: str = "prompt",
) -> int:
    """len(encode_prompt(...).ids) from the headers of the images, without decoding a pixel."""
    length = len(chat_ids(prompt, len(images), tokenizer, name))
    for image in images:
        with decoding(called := picture_name(image, name)):
            width, height = opened(image).size  # a camera's rotation swaps them, the count stays
        height, width = smart_resize(height, width, settings, called)
        length += height * width // (settings.patch_size * settings.merge_size) ** 2 - 1
    return length


def encode_response(response: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of a written response, and the stop token, which is trained like any other."""
    refuse_markup("response", response)
    ids = tokenizer.encode(response, add_special_tokens=False)
    return [*ids, tokenizer.convert_tokens_to_ids(STOP)]


def encode_example(
    example: Example, tokenizer: Tokenizer, settings: ImageSettings | None
) -> Document:
    name = example.place or example.id
    prompt = encode_prompt(example.prompt, example.images, tokenizer, settings, name)
    try:
        return Document(prompt, encode_response(example.response, tokenizer), name)
    except Exception as error:  # what a tokenizer raises at a word it does not know
        raise ValueError(f"{name}: the tokenizer cannot read the response ({error})") from error


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
