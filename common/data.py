"""Rows on disk become documents of tokens and patches.

    JSONL, parquet, Hub       ──read_problems, read_examples──▶ Problem, Example
    prompt text and pictures  ──encode_prompt──▶ Prompt(ids, patches, grids, offsets)
    prompt and response       ──encode_example──▶ Document, which packs.py lays side by side

Every row and its pictures are checked once before a run begins, each process taking its share, and
a bad one is reported with file and line. It is parsed again when it is used, so that two million
take no memory. Pictures become patches as by transformers' Qwen2VLImageProcessor, bit for bit. The
order of the data is a function of (seed, step), so a resumed run sees what it would have seen.

Dimensions: S patches of all pictures, D = 1176 values of a patch; H x W pixels, h x w patches.
"""

import json
import math
import os
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from io import BytesIO
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError
from jinja2 import TemplateError
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from transformers import AutoTokenizer

from common import distributed
from common.log import on_hub, progress
from reward import Verdict

IMAGE_MARKER = "<image>"  # where a picture stands in the prompt of a row
IMAGE_PAD = "<|image_pad|>"  # Qwen2.5-VL's tokenizer: one for each merged patch
STOP = "<|im_end|>"  # Qwen2.5-VL's tokenizer: ends a turn, hence a response
VISION = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", IMAGE_PAD, "<|video_pad|>")
MARKUP = (*VISION, STOP, "<|im_start|>", "<|endoftext|>")  # in a row: a turn that is not there
MARKUP_PATTERN = re.compile("|".join(map(re.escape, MARKUP)))  # 6 times as fast as each on its own
MERGE_SIZE = 2  # preprocessor_config.json: 2 x 2 patches become one token
PATCH_VALUES = 3 * 2 * 14 * 14  # Qwen2.5-VL: colours, frames, rows, columns
MAX_ASPECT = 200  # transformers' smart_resize
PROBLEM_COLUMNS = ("id", "prompt", "answer", "images", "source", "choices", "precision")
READ = {*PROBLEM_COLUMNS, "response", "group", "watch"}  # the last two by rl.py, from extra
# What no one reads and the question may need; the second only where a row has no images
OTHER_TURNS, PICTURES = "system|video|audio", ".*(image|img|picture|figure|photo)"
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


@dataclass
class Rollout:
    """One sampled response to a problem, and what it is worth."""

    problem: Problem
    sample: int  # which of the n
    prompt: Prompt
    index: int = 0  # place of the problem in the list; in rl.py, in the stream of all steps
    response_ids: list[int] = field(default_factory=list)  # the stop token included, if it came
    logps: list[float] = field(default_factory=list)  # of each response token, by the sampler
    stopped: bool = False  # False: cut at max_tokens
    text: str = ""
    verdict: Verdict | None = None
    reward: float = 0.0
    seed: int = 0  # of its random numbers
    unfinished: bool = False  # put aside when enough others had ended: goes on in the next step
    stale: int = 0  # of its first tokens: drawn in earlier steps, by the policies of that time

    @property
    def name(self) -> str:
        return f"{self.problem.id}#{self.sample}"

    @property
    def document(self) -> Document:
        return Document(self.prompt, self.response_ids, self.name)


@dataclass
class Rows(Sequence):
    """A list whose items are made when they are used. A slice is Rows again."""

    fetch: Callable
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return Rows(self.fetch, self.indices[i])
        return self.fetch(int(self.indices[i]))


# ---- rows


def record_of(kind: type, place: str, row: dict, folder: Path) -> Problem | Example:
    prompt, images = text(place, row, "prompt"), row.get("images") or []
    images = images if isinstance(images, list) else [images]
    split_at_markers(f"{place}: column 'prompt'", prompt, len(images))
    question = dict(
        id=text(place, row, "id"),
        prompt=prompt,
        images=tuple(image_source(place, image, folder) for image in images),
        source=text(place, row, "source") if row.get("source") else "",
        place=place,
    )
    if kind is Example:
        response = text(place, row, "response")
        refuse_markup(f"{place}: column 'response'", response)
        return Example(response=response, **question)
    choices, precision = row.get("choices") or [], row.get("precision")
    if not isinstance(choices, list):
        raise ValueError(f"{place}: column 'choices' must be a list, not {choices!r:.80}")
    if precision is not None and not is_number(precision):
        raise ValueError(f"{place}: column 'precision' must be a number, not {precision!r:.80}")
    return Problem(
        answer=text(place, row, "answer"),
        choices=tuple(text(place, {"choices": c}, "choices") for c in choices) or None,
        precision=None if precision is None else float(precision),
        extra={column: row[column] for column in row if column not in PROBLEM_COLUMNS},
        **question,
    )


problem_of, example_of = partial(record_of, Problem), partial(record_of, Example)


def is_number(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def text(place: str, row: dict, column: str) -> str:
    """A column that must be there and hold text; 7 is taken as "7"."""
    value = row.get(column)
    if is_number(value) or (isinstance(value, str) and value.strip()):
        return str(value)
    fault = f"is neither text nor a number: {value!r:.80}"
    if value is None or isinstance(value, str):
        fault = f"is {'missing' if value is None else 'empty'}; the row has {str([*row]):.300}"
    raise ValueError(f"{place}: column '{column}' {fault}")


def image_source(place: str, image, folder: Path) -> str | Image.Image:
    """A path relative to the row's file, or {"bytes", "path"} as `datasets` stores a picture."""
    if isinstance(image, dict) and image.get("bytes"):
        with decoding(image, place):
            return opened(image)
    path = image.get("path") if isinstance(image, dict) else image
    if isinstance(path, str) and os.path.isfile(folder / path):
        return str(folder / path)
    fault = f"image {path!r:.80} does not exist; paths are relative to {folder.resolve()}"
    raise FileNotFoundError(f"{place}: {fault}")


def refuse_markup(name: str, words: str):
    if mark := MARKUP_PATTERN.search(words):
        raise ValueError(f"{name} contains {mark[0]}, which is markup of the chat; take it out")


def split_at_markers(name: str, prompt: str, images: int) -> list[str]:
    """The texts between the pictures. Without a marker, all pictures stand before the text."""
    refuse_markup(name, prompt)
    pieces = prompt.split(IMAGE_MARKER)
    if len(pieces) == 1:
        return [""] * images + pieces
    if len(pieces) - 1 != images:
        count = f"{len(pieces) - 1} markers {IMAGE_MARKER} for {images} images"
        raise ValueError(f"{name}: {count}; write one for each, or none to put all images first")
    return pieces


def line_rows(path: Path) -> Rows:
    """(place, row, folder) of each line that is not blank, by an index of 16 bytes each. `datasets`
    takes 40 times as long, guesses one type for all answers, and names no line of a wrong byte.
    """
    filled, offsets = array("q"), array("q", [0])
    with path.open("rb", buffering=1 << 20) as file:
        for number, line in enumerate(progress(file, f"reading {path.name}")):
            if not line.isspace():
                filled.append(number)
            offsets.append(offsets[-1] + len(line))

    def fetch(number: int) -> tuple[str, dict, Path]:
        place = f"{path}, line {number + 1}"
        with path.open("rb") as file:
            file.seek(offsets[number])
            return place, parse_json(place, file.readline()), path.parent

    return Rows(fetch, filled)


def parse_json(place: str, content: bytes) -> dict:
    try:
        value = json.loads(content.decode("utf-8-sig"))
        if b"\\u" in content:  # "\\ud83d" is JSON and half a character: no log could hold it
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # broken JSON, broken UTF-8, nested too deep
        raise ValueError(f"{place}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{place}: must be an object with named columns, not {value!r:.80}")
    return value


def table_rows(path: Path) -> Rows:
    """The same of a parquet file, or of the train split of a directory or of a name on the Hub."""
    import datasets  # here, because the import takes a second that JSONL need not pay

    how = dict(path="parquet", data_files=f"{path}") if path.is_file() else dict(path=f"{path}")
    try:  # in this format no picture is decoded
        table = datasets.load_dataset(**how, split="train").with_format("arrow")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        fault = "neither .jsonl, nor parquet, nor on the Hub with a split train"
        raise FileNotFoundError(f"{path}: {fault} ({error.__cause__ or error})") from error
    folder = path if path.is_dir() else path.parent
    fetch = lambda i: (f"{path}, row {i}", table[i].to_pylist()[0], folder)  # noqa: E731
    return Rows(fetch, range(len(table)))


def read_rows(
    build: Callable[[str, dict, Path], Problem | Example],
    source: str | Path,  # .jsonl, .parquet, a directory of parquet, or a name on the Hub
    columns: Sequence[str] = (),  # ("prompt=problem", ...): the column `problem` is the prompt
    share: tuple[int, int] = (0, 1),  # (rank, ranks): the rows that this process checks
) -> Rows:
    """All rows of a source, of which a share is checked now. Without an id a row has its number."""
    raw = line_rows(Path(source)) if f"{source}".endswith(".jsonl") else table_rows(Path(source))
    if not len(raw):
        raise ValueError(f"{source}: there is no row in it")
    names = {name: column for name, _, column in (text.partition("=") for text in columns)}
    for name, column in names.items():
        if not any(column in row for _, row, _ in raw):
            raise ValueError(f"{source}: --columns {name}={column}: no row has a column {column!r}")

    def fetch(i: int) -> tuple[str, dict, Path]:
        place, row, folder = raw[i]
        ours = {name: row[column] for name, column in names.items() if column in row}
        row = {column: row[column] for column in row if column not in names.values()} | ours
        return place, row | {"id": f"row-{i}" if row.get("id") is None else row["id"]}, folder

    check_rows(Rows(fetch, range(len(raw))), build, share, source)
    return Rows(lambda i: build(*fetch(i)), range(len(raw)))


read_problems, read_examples = partial(read_rows, problem_of), partial(read_rows, example_of)


def check_rows(rows: Rows, build: Callable, share: tuple[int, int], source: str | Path):
    """Builds each row of the share and decodes its pictures: what is bad stops a run at its start,
    not after hours. 10,000 photographs take two cores 20 s. Unread columns are named; one without
    which the row may be another question is refused, unless it is called extra_...
    """

    def check(i: int) -> tuple[str, set[str]]:
        place, row, folder = rows[i]
        unread = {column for column in row if row[column]} - READ
        lost = OTHER_TURNS if row.get("images") else f"{OTHER_TURNS}|{PICTURES}"
        for column in unread:
            if re.match(lost, column, re.IGNORECASE) and not column.startswith("extra_"):
                cure = f"images={column}, if these are its pictures, or extra_{column}={column}"
                fault = f"{place}: column '{column}' is not read: --columns {cure}"
                raise ValueError(f"{fault}, if the question is whole without it")
        record = build(place, row, folder)
        for image in record.images:
            load_image(image, place)
        return record.id, unread

    mine, unread, first, twins = range(share[0], len(rows), share[1]), set(), {}, []
    with ThreadPool(16) as pool:  # on a network disk they wait more than they work
        checked = progress(pool.imap(check, mine, chunksize=64), f"checking {source}", len(mine))
        for i, (name, columns) in zip(mine, checked, strict=True):
            unread |= columns
            if first.setdefault(name, i) != i:
                twins.append((i, first[name]))
    # of the ranks that share the rows; the main one may also read a file alone
    for theirs in distributed.everyone(first) if share[1] > 1 else ():
        twins += [(i, first[name]) for name, i in theirs.items() if first.get(name, i) != i]
    for i, other in twins[:1]:  # no log could tell them apart
        place, row, _ = rows[i]
        fault = f"{place}: the id {row['id']!r} is also that of {rows[other][0]}"
        raise ValueError(
            f"{fault}; make them distinct (rl.py, coldstart.py: --columns extra_id=id)"
        )
    if unread and share[0] == 0:
        kept = ", ".join(sorted(unread))
        print(f"{source}: columns that nothing here reads, but a reward may: {kept}", flush=True)


# ---- pictures


@contextmanager
def decoding(image: Picture | dict, row: str = "") -> Iterator[None]:
    """One message for whatever is wrong with a picture. Pillow's decoders raise a dozen kinds of
    error at damaged files, so all are caught, and nothing but decoding happens inside.
    """
    try:
        yield
    except Exception as error:
        name = f"{image}" if isinstance(image, str | Path) else "embedded picture"
        name = f"{row}: {name}" if row else name
        kind = "no picture" if isinstance(error, FileNotFoundError) else "damaged picture"
        reason = str(error) or type(error).__name__
        raise ValueError(f"{name}: {kind} ({reason:.300}); replace it") from error


def opened(image: Picture | dict) -> Image.Image:
    """Its header: the size is known, no pixel decoded. Refused are grey of 16 bits, which pillow
    cuts at 255, and what is too narrow for transformers.
    """
    if isinstance(image, dict):  # as `datasets` stores it
        image = BytesIO(image["bytes"])
    image = image if isinstance(image, Image.Image) else Image.open(image)
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"mode {image.mode}, which would turn white: save 8 bits a channel")
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ValueError(f"{image.width} x {image.height} px: aspect ratio > {MAX_ASPECT}")
    return image


def load_image(image: Picture, row: str = "") -> Image.Image:
    """-> upright RGB. The sampler gets this very picture, or it sees another than the trainer."""
    with decoding(image, row):
        return upright(opened(image))


def upright(image: Image.Image) -> Image.Image:
    """As transformers' load_image: the camera's rotation is applied, alpha is dropped and not
    blended.
    """
    image.load()  # a PNG's rotation may come behind its pixels
    rotation = image.getexif().get(ExifTags.Base.Orientation)
    picture = image.convert("RGB")
    picture.info = {}  # exif_transpose writes the other fields anew, and fails at a broken one
    picture.getexif()[ExifTags.Base.Orientation] = rotation
    return ImageOps.exif_transpose(picture)


def load_image_settings(directory: str | Path) -> ImageSettings:
    path = Path(directory) / "preprocessor_config.json"
    raw = parse_json(f"{path}", path.read_bytes())
    raw = {"min_pixels": None, "max_pixels": None} | raw
    size = raw.get("size") or {}  # newer files give the bounds here; both are counts of pixels
    try:
        return ImageSettings(
            raw["min_pixels"] or size["shortest_edge"],
            raw["max_pixels"] or size["longest_edge"],
            *(raw[name] for name in ("patch_size", "temporal_patch_size", "merge_size")),
            *(tuple(raw[name]) for name in ("image_mean", "image_std")),
        )
    except KeyError as error:
        raise ValueError(f"{path} has no {error}: fetch it again") from error


def smart_resize(height: int, width: int, settings: ImageSettings) -> tuple[int, int]:
    """(height, width): multiples of 28, area in [min_pixels, max_pixels], ratio about kept.

    Qwen2-VL (arXiv 2409.12191, sec. 2.1, naive dynamic resolution). Halves are rounded to even.
    """
    unit, sides = settings.patch_size * settings.merge_size, (height, width)
    high, wide = (round(side / unit) * unit for side in sides)
    if high * wide > settings.max_pixels:
        scale = math.sqrt(height * width / settings.max_pixels)
        high, wide = (max(unit, math.floor(side / scale / unit) * unit) for side in sides)
    elif high * wide < settings.min_pixels:
        scale = math.sqrt(settings.min_pixels / (height * width))
        high, wide = (math.ceil(side * scale / unit) * unit for side in sides)
    return high, wide


def image_patches(image: Picture, settings: ImageSettings, row: str = "") -> tuple[Tensor, tuple]:
    """-> patches (S, D) float32 and grid (t, h, w) with S = t*h*w; a picture is one moment, t = 1.

    The patches of a merge block are neighbours: block rows, blocks, then rows and columns within.
    """
    with decoding(image, row):
        image = upright(opened(image))
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
    """A directory as it is; a Hub name as its snapshot in the Hub's cache, downloaded unless
    HF_HUB_OFFLINE=1, which the scripts under runs/ set.
    """
    if not on_hub(name):
        return str(name)  # what is not there is named by whoever opens it
    wanted = ["*.json", "*.safetensors", "*.jinja", "merges.txt"]
    try:
        return snapshot_download(str(name), allow_patterns=wanted)
    except (FileNotFoundError, ConnectionError, RepositoryNotFoundError) as error:
        fault = f"{name}: no such directory, and no such model in the Hub's cache"
        raise FileNotFoundError(f"{fault}: `HF_HUB_OFFLINE=0 hf download {name}`") from error


def load_tokenizer(directory: str | Path):
    if not (Path(directory) / "tokenizer_config.json").is_file():
        raise FileNotFoundError(f"{directory}: no tokenizer_config.json, so not a model directory")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{directory}: its tokenizer cannot be read ({error})") from error
    older = Path(directory) / "chat_template.json"
    if tokenizer.chat_template is None and older.is_file():
        tokenizer.chat_template = parse_json(f"{older}", older.read_bytes()).get("chat_template")
    return tokenizer


def chat_ids(problem: Problem | Example, tokenizer) -> list[int]:
    """The user's turn and the opening of the answer, by the chat template; one token a picture."""
    name, images, content = problem.place or problem.id, len(problem.images), []
    for i, piece in enumerate(split_at_markers(name, problem.prompt, images)):
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


def encode_prompt(problem: Problem | Example, tokenizer, settings) -> Prompt:
    """settings: None will do where there are no pictures."""
    short_ids, name = chat_ids(problem, tokenizer), problem.place or problem.id
    pictures = [image_patches(image, settings, name) for image in problem.images]
    grids = tuple(grid for _, grid in pictures)
    pad, ids, offsets = tokenizer.convert_tokens_to_ids(IMAGE_PAD), [], []
    for token in short_ids:
        copies = 1
        if token == pad:  # only the template can have written it: markup is refused
            copies = image_tokens(grids[len(offsets)], settings.merge_size)
            offsets.append(len(ids))
        ids += [token] * copies
    patches = torch.cat([part for part, _ in pictures]) if pictures else None
    return Prompt(ids, short_ids, patches, grids, tuple(offsets))


def prompt_length(problem: Problem, tokenizer, settings: ImageSettings) -> int:
    """len(encode_prompt(...).ids) from the headers of the images, without decoding a pixel."""
    length = len(chat_ids(problem, tokenizer))
    for image in problem.images:
        with decoding(image, problem.place or problem.id):
            width, height = opened(image).size  # a camera's rotation swaps them, the count stays
            height, width = smart_resize(height, width, settings)
        length += height * width // (settings.patch_size * settings.merge_size) ** 2 - 1
    return length


def encode_response(response: str, tokenizer) -> list[int]:
    """The ids of a written response, and the stop token, which is trained like any other."""
    ids = tokenizer.encode(response, add_special_tokens=False)
    return [*ids, tokenizer.convert_tokens_to_ids(STOP)]


def encode_example(example: Example, tokenizer, settings) -> Document:
    prompt = encode_prompt(example, tokenizer, settings)
    response_ids = encode_response(example.response, tokenizer)
    return Document(prompt, response_ids, example.place or example.id)


# ---- order


@lru_cache(maxsize=4)  # a batch may span two epochs, in either order
def permutation(n: int, seed: int, epoch: int, *order: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch, *order]).permutation(n)


class Stream:
    """Endless order, a fresh permutation each epoch. Without state, so a resume needs none."""

    def __init__(self, items: Sequence, seed: int):
        self.items, self.seed = items, seed

    def __getitem__(self, place: int):
        """The item at a place; negative places, -1, -2, ..., are a second order of the same."""
        order = () if place >= 0 else (1,)
        epoch, k = divmod(place if place >= 0 else -1 - place, len(self.items))
        return self.items[int(permutation(len(self.items), self.seed, epoch, *order)[k])]

    def batch(self, step: int, count: int) -> list:
        """Places [step * count, (step + 1) * count) of the endless order, with a constant count."""
        return [self[place] for place in range(step * count, (step + 1) * count)]
