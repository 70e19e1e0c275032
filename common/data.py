"""Rows on disk become packs of tokens and patches.

    JSONL, JSON, parquet, Hub ──read_problems, read_examples──▶ Problem, Example
    prompt text and pictures  ──encode_prompt──▶ Prompt(ids, patches, grids, offsets)
    response text             ──encode_response──▶ ids + <|im_end|>   (the sampler gives ids itself)
    Documents(prompt, ids)    ──pack──▶ Pack(ids (T,), positions (3, T), loss_mask (T,), patches)
    of many ranks: lengths    ──plan──▶ which rank packs what  ──lay_out──▶ Pack

Every row is checked once before a run begins, and a bad one is reported with file and line; it is
parsed again when asked for, so that two million examples take no memory. Packing lays whole
documents side by side up to a budget of tokens: no padding, no cut. What is trained follows from
lengths, never from token ids: a mask of `ids == pad` also masks the stop token. A picture that
several documents share (16 samples of one problem) stands once in a pack: one vision pass for all.
So can the whole prompt (`shared`): one pass of everything but attention.

Pictures are resized, normalised and cut as transformers' Qwen2VLImageProcessor does, bit for bit.
The order of the data is a function of (seed, step), so a resumed run sees what it would have seen.
The paper says "sample packing" and no more: what goes into which pack, and its order, are ours.

Dimensions: T tokens of a pack, E of its documents (T where they share none), R trained, S patches,
M image tokens (S / 4 where no picture is shared), D = 1176 = 3 x 2 x 14 x 14 values of a patch.
Nothing to run here: see coldstart.py, rl.py, eval.py.
"""

import io
import json
import math
import re
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from PIL import Image, ImageOps
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from common.packing import plan
from model import mrope_positions

IMAGE_MARKER = "<image>"  # where a picture stands in the prompt of a row
IMAGE_PAD = "<|image_pad|>"  # Qwen2.5-VL's tokenizer: one for each merged patch
STOP = "<|im_end|>"  # Qwen2.5-VL's tokenizer: ends a turn, hence a response
VISION = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", IMAGE_PAD, "<|video_pad|>")
MARKUP = (
    *VISION,
    STOP,
    "<|im_start|>",
    "<|endoftext|>",
)  # in a row's text: a turn that is not there
MERGE_SIZE = 2  # preprocessor_config.json: 2 x 2 patches become one token
PATCH_VALUES = 3 * 2 * 14 * 14  # Qwen2.5-VL: colours, frames, rows, columns
MAX_ASPECT = 200  # transformers' smart_resize
ROW_FILES = (".jsonl", ".json", ".parquet")
QUIET_BYTES = 64 << 20  # below this a progress bar is noise

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


@dataclass(frozen=True)
class Example:
    """A question with a worked response: one row of supervised fine-tuning."""

    id: str
    prompt: str
    response: str
    images: tuple = ()
    source: str = ""


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

    @property
    def ids(self) -> list[int]:
        return self.prompt.ids + self.response_ids

    def __len__(self) -> int:
        return len(self.prompt.ids) + len(self.response_ids)


@dataclass
class Pack:
    ids: Tensor  # (T,) int64
    positions: Tensor  # (3, T) int64: M-RoPE, from 0 in each document
    lengths: list[int]  # of the documents, in order; their sum is E >= T
    rows: Tensor  # (R,) int64: of each trained token, the row before it, where it is predicted
    targets: Tensor  # (R,) int64: the ids of the trained tokens
    trained: list[int]  # trained tokens of each document; their sum is R
    patches: Tensor | None  # (S, D) float32, each picture once
    grids: list[tuple[int, int, int]]
    slots: Tensor  # (M,) int64: where in T the image rows go
    sources: Tensor  # (M,) int64: which row of the vision tower's merged output goes there
    members: list[int]  # index of each document in the list handed to pack()
    expand: Tensor | None = None  # (E,) int64: rows of the documents, where they share any

    def __post_init__(self):
        shown = 0 if self.patches is None else len(self.patches)
        t = sum(self.lengths) if self.expand is None else int(self.ids.shape[0])
        e = t if self.expand is None else len(self.expand)
        shapes = [tuple(x.shape) for x in (self.ids, self.positions)]
        assert shapes == [(t,), (3, t)] and e == sum(self.lengths), f"{shapes}, {e} for {t} tokens"
        assert self.rows.shape == self.targets.shape == (sum(self.trained),), f"{self.rows.shape}"
        assert self.slots.shape == self.sources.shape, f"{self.slots.shape} {self.sources.shape}"
        assert sum(map(math.prod, self.grids)) == shown, f"{self.grids} for {shown} patches"
        last, seen = max([-1, *self.sources.tolist()]), shown // MERGE_SIZE**2
        assert last < seen, f"an image token wants vision row {last} of {seen}"

    @property
    def inputs(self) -> dict:
        """What the model's forward takes: model(**pack.inputs)."""
        names = "ids positions lengths patches grids slots sources expand".split()
        return {name: getattr(self, name) for name in names}

    def to(self, device: torch.device | str) -> "Pack":
        """Onto a GPU from pinned memory: the host goes on and does not wait for the copy."""
        if torch.device(device).type == "cpu":
            return self
        moved = copy(self)  # checked already, and to check on the GPU is to wait for it
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(moved, name, value.pin_memory().to(device, non_blocking=True))
        return moved


class Rows(Sequence):
    """A list whose items are made when asked for. A slice is Rows again."""

    def __init__(self, fetch: Callable[[int], Any], indices: Sequence[int]):
        self.fetch, self.indices = fetch, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return Rows(self.fetch, self.indices[i])
        return self.fetch(int(self.indices[i]))


# ---- reading


def read_problems(source: str | Path, split: str = "train", cache_dir: str | None = None) -> Rows:
    """{"id", "prompt", "answer", "images"?, "source"?, "choices"?, "precision"?} -> Rows of Problem

    source: a .jsonl, .json or .parquet file; a directory with SPLIT.jsonl, SPLIT-*.parquet, ... in
    it or in its data/; or a Hub name. Parquet and the Hub go through the cache of `datasets`
    (cache_dir, else where HF_HOME says). JSON is read where it lies: a table would guess one type
    for all answers and forget line numbers.
    """
    return checked(raw_rows(source, split, cache_dir), problem_of)


def read_examples(source: str | Path, split: str = "train", cache_dir: str | None = None) -> Rows:
    """{"id", "prompt", "response", "images"?, "source"?} -> Rows of Example; sources as above."""
    return checked(raw_rows(source, split, cache_dir), example_of)


def checked(raw: Rows, build: Callable) -> Rows:
    """Builds every row once, so that a bad one stops a run before it starts, not at hour ten."""
    for where, row, folder in raw:
        build(where, row, folder)
    return Rows(lambda i: build(*raw[i]), range(len(raw)))


def problem_of(where: str, row: dict, folder: Path) -> Problem:
    choices, precision = row.get("choices"), row.get("precision")
    if choices is not None:
        if not isinstance(choices, list) or not choices:
            raise ValueError(f"{where}: column 'choices' must be a list of texts, not {choices!r}")
        choices = tuple(text(where, {"choices": c}, "choices", number=True) for c in choices)
    if precision is not None:
        if isinstance(precision, bool) or not isinstance(precision, int | float):
            raise ValueError(f"{where}: column 'precision' must be a number, not {precision!r}")
        precision = float(precision)
    return Problem(
        answer=text(where, row, "answer", number=True),
        choices=choices,
        precision=precision,
        **question_of(where, row, folder),
    )


def example_of(where: str, row: dict, folder: Path) -> Example:
    response = text(where, row, "response")
    refuse_markup(f"{where}: column 'response'", response)
    return Example(response=response, **question_of(where, row, folder))


def question_of(where: str, row: dict, folder: Path) -> dict[str, Any]:
    """The columns that both kinds of row have."""
    if row.get("image") is not None and "images" not in row:
        raise ValueError(f"{where}: column 'image' is not read; write 'images', a list")
    prompt, images = text(where, row, "prompt"), row.get("images") or []
    if not isinstance(images, list):
        raise ValueError(f"{where}: column 'images' must be a list of paths, not {images!r:.80}")
    refuse_markup(f"{where}: column 'prompt'", prompt)
    split_at_markers(where, prompt, len(images))
    return dict(
        id=text(where, row, "id", number=True),
        prompt=prompt,
        images=tuple(located(where, image, folder) for image in images),
        source=text(where, row, "source") if row.get("source") else "",
    )


def text(where: str, row: dict, column: str, number: bool = False) -> str:
    """A column that must be there and hold text; with number=True, 7 is taken as "7"."""
    value = row.get(column)
    if value is None:
        raise ValueError(f"{where}: column '{column}' is missing; the row has {sorted(row)}")
    if isinstance(value, bool) or not isinstance(value, str | int | float if number else str):
        kind = "text or a number" if number else "text"
        raise ValueError(f"{where}: column '{column}' must be {kind}, not {value!r:.80}")
    if not str(value).strip():
        raise ValueError(f"{where}: column '{column}' is empty")
    return str(value)


def located(where: str, image: Any, folder: Path) -> str | Image.Image:
    """A path relative to the file of the row, or {"bytes", "path"} as `datasets` stores it."""
    if isinstance(image, dict):
        if image.get("bytes"):
            return open_image(io.BytesIO(image["bytes"]), f"{where}: embedded image")
        image = image.get("path")
    if not isinstance(image, str) or not image:
        raise ValueError(f"{where}: an image must be a path, not {image!r:.80}")
    if not (folder / image).is_file():
        raise FileNotFoundError(
            f"{where}: image {image} does not exist; paths are relative to {folder.resolve()}"
        )
    return str(folder / image)


def refuse_markup(where: str, words: str) -> None:
    for token in MARKUP:
        if token in words:
            raise ValueError(f"{where} contains {token}, which is markup of the chat; take it out")


def split_at_markers(where: str, prompt: str, images: int) -> list[str]:
    """The texts between the pictures. Without a marker, all pictures stand before the text."""
    pieces = prompt.split(IMAGE_MARKER)
    if len(pieces) == 1:
        return [""] * images + pieces
    if len(pieces) - 1 != images:
        raise ValueError(
            f"{where}: {len(pieces) - 1} markers {IMAGE_MARKER} for {images} images; write one for "
            f"each image, or none to put all images first"
        )
    return pieces


def raw_rows(source: str | Path, split: str, cache_dir: str | None) -> Rows:
    """Rows of (where, row, folder of its images)."""
    path = Path(source)
    if path.exists():
        files = split_files(path, split) if path.is_dir() else [path]
        kinds = {".jsonl": jsonl_rows, ".json": json_rows, ".parquet": table_rows}
        if files[0].suffix not in kinds:
            raise ValueError(f"{files[0]}: rows are read from {', '.join(kinds)}")
        options = (split, cache_dir) if files[0].suffix == ".parquet" else ()
        rows = kinds[files[0].suffix](files, *options)
    elif path.suffix not in ROW_FILES and re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        rows = table_rows(str(source), split, cache_dir)
    else:
        raise FileNotFoundError(f"{source}: no such file in {Path.cwd()}, and not a Hub name")
    if not len(rows):
        raise ValueError(f"{source}: holds no rows")
    return rows


def split_files(directory: Path, split: str) -> list[Path]:
    """train.jsonl, train-00000-of-00002.parquet, ...: never the test split beside them."""
    found = [p for p in (*directory.iterdir(), *directory.glob("data/*")) if p.suffix in ROW_FILES]
    files = sorted(p for p in found if p.stem == split or p.stem.startswith(f"{split}-"))
    if not files:
        raise FileNotFoundError(
            f"{directory}: no {split}.jsonl, .json or .parquet, nor {split}-*, but "
            f"{sorted(p.name for p in found)}; name the file itself"
        )
    if len({(p.parent, p.suffix) for p in files}) > 1:
        raise ValueError(f"{directory}: {[p.name for p in files]} are of several kinds; name one")
    return files


def jsonl_rows(files: list[Path]) -> Rows:
    lines = []  # (file, line number, byte offset)
    for f, path in enumerate(files):
        offset = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    lines.append((f, number, offset))
                offset += len(line)
    table = np.array(lines, dtype=np.int64)  # 24 bytes a row, whatever its length

    def fetch(i: int) -> tuple[str, dict, Path]:
        f, number, offset = table[i].tolist()
        with files[f].open("rb") as file:
            file.seek(offset)
            where, line = f"{files[f]}, line {number}", file.readline()
        return where, as_row(where, parse_json(where, line)), files[f].parent

    return Rows(fetch, range(len(lines)))


def json_rows(files: list[Path]) -> Rows:
    rows = []
    for path in files:
        found = parse_json(f"{path}", path.read_bytes())
        if not isinstance(found, list):
            raise ValueError(
                f"{path}: must hold a list of rows; with one row a line, call it .jsonl"
            )
        for i, row in enumerate(found):
            rows.append((f"{path}, row {i}", as_row(f"{path}, row {i}", row), path.parent))
    return Rows(rows.__getitem__, range(len(rows)))


def parse_json(where: str, data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:  # broken JSON or broken UTF-8
        raise ValueError(f"{where}: not JSON ({error}); .jsonl holds one object a line") from None


def as_row(where: str, row: Any) -> dict:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a row must be an object with named columns, not {row!r:.80}")
    return row


def table_rows(source: list[Path] | str, split: str, cache_dir: str | None) -> Rows:
    """Parquet files, or a Hub name, through `datasets`. Pictures stay encoded until used."""
    import datasets  # here, because the import takes a second that JSON need not pay

    local = not isinstance(source, str)
    name, folder = (str(source[0]), source[0].parent) if local else (source, Path("."))
    quiet = local and sum(path.stat().st_size for path in source) < QUIET_BYTES
    hushed = quiet and not datasets.are_progress_bars_disabled()
    where = dict(data_files=[str(path) for path in source]) if local else {}
    try:
        if hushed:
            datasets.disable_progress_bars()
        table = datasets.load_dataset(
            "parquet" if local else source,
            split="train" if local else split,
            cache_dir=cache_dir,
            **where,
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        cure = "is it parquet?" if local else f"is it on the Hub, with a split {split}? or a path?"
        kind = ValueError if local else FileNotFoundError
        raise kind(f"{name}: not readable ({error.__cause__ or error}); {cure}") from error
    finally:
        if hushed:
            datasets.enable_progress_bars()
    raw = table.with_format("arrow")
    return Rows(lambda i: (f"{name}, row {i}", raw[i].to_pylist()[0], folder), range(len(raw)))


# ---- pictures


def open_image(source: Any, name: str) -> Image.Image:
    """Reads the header: the size is known, the pixels are not decoded yet."""
    try:
        return Image.open(source)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: pillow cannot open it ({error}); replace the file") from error


def load_image(image: str | Path | Image.Image) -> Image.Image:
    """-> upright RGB. Give the sampler this very picture, or it sees another one than the trainer.

    As transformers' load_image: the camera's rotation is applied, alpha is dropped and not blended.
    """
    opened = image if isinstance(image, Image.Image) else open_image(image, str(image))
    try:
        return ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:  # a sound header, damaged pixels
        raise ValueError(f"{image}: damaged image ({error}); replace the file") from error


def load_image_settings(directory: str | Path) -> ImageSettings:
    path = Path(directory) / "preprocessor_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; copy it from the Qwen2.5-VL model")
    raw = json.loads(path.read_text())
    size = raw.get("size", {})  # newer files give the bounds here; both are counts of pixels
    return ImageSettings(
        raw.get("min_pixels") or size["shortest_edge"],
        raw.get("max_pixels") or size["longest_edge"],
        raw["patch_size"],
        raw["temporal_patch_size"],
        raw["merge_size"],
        tuple(raw["image_mean"]),
        tuple(raw["image_std"]),
    )


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
    cells = cells.transpose(0, 3, 1, 4, 6, 2, 5)[
        :, :, :, :, :, None
    ]  # (h/m, w/m, m, m, 3, 1, p, p)
    frames = np.repeat(cells, settings.temporal_patch_size, axis=5)  # a still: the same frame twice
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
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError) as error:
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
        tokenizer.chat_template = json.loads(older.read_text())["chat_template"]
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
    prompt = encode_prompt(example.prompt, example.images, tokenizer, settings, example.id)
    return Document(prompt, encode_response(example.response, tokenizer))


def filter_long(items: Sequence, limit: int, lengths) -> tuple[Rows, int]:
    """The items of at most `limit` tokens, and how many were left out. None is ever cut to fit: a
    prompt that ends inside a picture has fewer image tokens than image rows. lengths[i]: of item i.
    """
    kept = [i for i in range(len(items)) if lengths[i] <= limit]
    return Rows(items.__getitem__, kept), len(items) - len(kept)


# ---- packs


def pack(
    documents: Sequence[Document], budget: int, merge: int = MERGE_SIZE, shared: bool = False
) -> list[Pack]:
    """Whole documents into packs of at most `budget` tokens, for a process that runs alone.

    Any order gives the same loss. Here from short to long: attention takes equal lengths as one
    batch.
    """
    lengths = [len(document) for document in documents]
    (bins,) = plan(lengths, [id(document.prompt) for document in documents], budget)
    ordered = (sorted(b, key=lengths.__getitem__) for b in bins)
    return [lay_out(documents, members, merge, shared) for members in ordered]


def lay_out(
    documents: Sequence[Document], members: list[int], merge: int = MERGE_SIZE, shared: bool = False
) -> Pack:
    """One pack of the documents `members`, in this order.

    shared: tries at one problem (documents with the same `prompt` object) share its rows, so that
    projections, MLPs and embedding run once a prompt: of 16 responses as long as their prompt 17
    parts are left of 32. `expand` lists every document's rows for attention, which is as before;
    so are all log-probs and gradients, to rounding.
    """
    ids, positions, slots, sources, patches, grids = [], [], [], [], [], []
    rows, targets, trained, expand = [], [], [], []
    places, first_row, merged = (
        {},
        {},
        0,
    )  # a prompt's place in ids; its pictures' in the tower's rows
    for i in members:
        prompt, response = documents[i].prompt, documents[i].response_ids
        if not prompt.ids:
            raise ValueError(f"document {i} has no prompt: nothing predicts its first token")
        images = list(zip(prompt.offsets, prompt.grids, strict=True))
        turned, length = mrope_positions(len(documents[i]), images, merge), len(prompt.ids)
        start = places.get(id(prompt))
        if fresh := start is None:
            start = len(ids)
            ids += prompt.ids
            positions.append(turned[:, :length])
            if shared:
                places[id(prompt)] = start
        own = [*range(start, start + length), *range(len(ids), len(ids) + len(response))]
        expand += own
        rows += own[length - 1 : -1] if response else []
        ids += response
        targets += response
        trained.append(len(response))
        positions.append(turned[:, length:])
        if not images or not fresh:
            continue
        sizes = [image_tokens(grid, merge) for grid in prompt.grids]
        if id(prompt.patches) not in first_row:
            first_row[id(prompt.patches)] = merged
            patches.append(prompt.patches)
            grids += prompt.grids
            merged += sum(sizes)
        row = first_row[id(prompt.patches)]
        sources += range(row, row + sum(sizes))
        for offset, size in zip(prompt.offsets, sizes, strict=True):
            slots += range(start + offset, start + offset + size)
    rows, targets, slots, sources, expand = (
        torch.tensor(x, dtype=torch.int64) for x in (rows, targets, slots, sources, expand)
    )
    return Pack(
        ids=torch.tensor(ids),
        positions=torch.cat(positions, dim=1),
        lengths=[len(documents[i]) for i in members],
        rows=rows,
        targets=targets,
        trained=trained,
        patches=torch.cat(patches) if patches else None,
        grids=grids,
        slots=slots,
        sources=sources,
        members=members,
        expand=expand if len(expand) > len(ids) else None,
    )


def filler_pack() -> Pack:
    """Two tokens, none trained: for a rank that has run out of packs while others run theirs."""
    filler = lay_out([Document(Prompt([0, 0], [0, 0], None, (), ()), [])], [0], MERGE_SIZE)
    filler.members = []  # it stands for no document
    return filler


def with_blank_picture(pack: Pack) -> Pack:
    """A pack that runs the vision tower even without a picture of its own; no token shows this one.

    Where the tower is trained: the ranks gather its shards together, and one that left it out would
    keep the others waiting for ever. Its gradient is 0, as if it had been left out.
    """
    if pack.patches is not None:
        return pack
    return replace(pack, patches=torch.zeros(MERGE_SIZE**2, PATCH_VALUES), grids=[(1, 2, 2)])


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
