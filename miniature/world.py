"""The miniature world: small enough for a laptop, built so that the paper's effect is real in it.

A picture of 84 x 56 pixels shows 2 x 3 cells, one digit each, in some colour, somewhere in its
cell, under noise. Its text twin writes the same grid out. The questions are sums: one look does not
answer them, reasoning step by step does.

    picture     <image> what is the sum of row A ?
    text twin   A1 4 A2 5 A3 1 ; B1 2 B2 2 B3 3 ; what is the sum of row A ?
    base        answer \\boxed{ 12 }                                             (it guesses)
    cold start  <think> ... A1 4 = 4 A2 5 = 9 A3 1 = 10 </think> answer \\boxed{ 10 }

Traces hold the four habits of the paper: a goal from which to work backwards, a plan, slips that
are noticed and undone by a second look, a check at the end. Whether a model trained on text traces
does the same on pictures is the paper's question.

What this file makes: the tokenizer (a word-level tokenizer.json with Qwen's special tokens and a
chat template), the data files of all stages, and the base model, which stands in for Qwen2.5-VL: it
can read pictures and add, and has no habits. Grids are split by a hash, so no grid of the test set
is ever seen in training, in any stage.

    python -m miniature.world                  # out/laptop/data and out/laptop/base
    python -m miniature.world --seed 1 --out out/seed1
"""

import json
import math
import os
import random
import subprocess
import sys
import zlib
from dataclasses import dataclass
from itertools import accumulate
from multiprocessing import Process
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader, IterableDataset

from common import data
from common.log import RunLog, progress, run_main
from common.packs import pack_alone
from model import Config as ModelConfig
from model import Qwen25VL, VisionConfig, save_model

CELLS = ("A1", "A2", "A3", "B1", "B2", "B3")
DIGITS = (1, 2, 3, 4, 5)
LARGEST = 54  # numbers are one token each, up to here
CELL = 28  # pixels: patch 14, merge 2, so a cell is one token of the decoder
COLOURS = {
    "red": (200, 40, 40),
    "green": (30, 140, 50),
    "blue": (40, 70, 200),
    "purple": (130, 40, 160),
    "black": (20, 20, 20),
    "orange": (220, 120, 20),
}
SPECIAL = (  # the first ids, under Qwen's names
    "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|vision_pad|> "
    "<|image_pad|> <|video_pad|>"
).split()
WORDS = (
    "<think> </think> \\boxed{ } answer user assistant what is the sum of grid row A B at describe "
    "? . , ; : = + i need so each digit first list cells then add up wait that not right look "
    "again let me check read same good it"
).split()
TORCHRUN = ("RANK", "WORLD_", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "OMP_")
FILLERS = "table paper small line here there next to on in one by side page with note mark".split()
NOISE = [*FILLERS, *WORDS[WORDS.index("what") :]]  # any word, but for the format of an answer
VOCABULARY = [*WORDS, *CELLS, *(str(n) for n in range(LARGEST + 1)), *COLOURS, *FILLERS]
READABLE = "A1 4 A2 5 A3 1 ; B1 2 B2 2 B3 3 ; what is the sum of row A ?"
# A word-level tokenizer has nothing for a word it does not know: the template says so before it is
# asked, to a script of ours as to whoever asks a server.
CHAT_TEMPLATE = (
    f"{{% set words = {json.dumps(VOCABULARY)} %}}"
    "{% macro read(text) %}"
    "{% set unknown = text.split() | reject('in', words) | unique | list %}"
    "{% if unknown %}{{ raise_exception('the miniature is a world of ' ~ words | length"
    " ~ ' words, and these are not among them: ' ~ unknown | join(' ')"
    f" ~ '. It can read: {READABLE}') }}}}"
    "{% endif %}{{ text }}{% endmacro %}"
    "{% for message in messages %}<|im_start|> {{ read(message['role']) }} "
    "{% if message['content'] is string %}{{ read(message['content']) }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|> <|image_pad|> <|vision_end|> "
    "{% else %}{{ read(part['text']) }} {% endif %}{% endfor %}"
    "{% endif %} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


@dataclass(frozen=True)
class Config:
    """The base model and the data of a miniature run."""

    out: str = "out/laptop"  # directory; gets data/ and base/
    seed: int = 0  # of data, initial weights and training order
    train: int = 4096  # RL problems, half of them pictures
    sft: int = 16384  # cold-start traces, text only
    test: int = 512  # held-out problems, half of them pictures
    align_steps: int = 80  # steps of 64 pictures, in which image tokens learn to name digits
    steps: int = 1200  # steps of `batch` documents
    batch: int = 32  # documents a step
    lr: float = 3e-3  # AdamW, peak, cosine to zero
    threads: int = 1  # CPU threads; more only wait for each other at this size


# ------------------------------------------------------------------ the world


def make_tokenizer() -> Tokenizer:
    vocabulary = [*SPECIAL, *VOCABULARY]
    assert len(set(vocabulary)) == len(vocabulary), "a word stands twice in the vocabulary"
    tokenizer = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token=None)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def model_config(vocabulary: int) -> ModelConfig:
    """Qwen2.5-VL's architecture with every part in it, 0.8 M parameters. head_dim 32 is the
    least that vLLM takes.
    """
    vision = VisionConfig(2, 48, 96, num_heads=3, out_hidden_size=128, fullatt_block_indexes=(1,))
    special = {name: SPECIAL.index(token) for name, token in SPECIAL_IDS.items()}
    return ModelConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        mrope_section=(4, 6, 6),
        vision=vision,
        tie_word_embeddings=False,
        max_position_embeddings=4096,
        **special,
    )


SPECIAL_IDS = {
    "bos_token_id": "<|endoftext|>",
    "eos_token_id": "<|im_end|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "vision_token_id": "<|vision_pad|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}


def save_tokenizer(directory: Path):
    """tokenizer.json and the small files beside it, in the layout of the hub."""
    directory.mkdir(parents=True, exist_ok=True)
    make_tokenizer().save(str(directory / "tokenizer.json"))
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    tokenizer |= {
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=1))
    images = {
        "min_pixels": CELL**2,
        "max_pixels": 64 * CELL**2,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
    }
    images |= {
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    images |= {"image_processor_type": "Qwen2VLImageProcessor"}
    (directory / "preprocessor_config.json").write_text(json.dumps(images, indent=1))


def glyphs() -> dict[int, list[np.ndarray]]:
    """Masks in [0, 1] of every digit in three sizes."""
    out = {}
    for digit in DIGITS:
        out[digit] = []
        for size in (20, 22, 24):
            image = Image.new("L", (CELL, CELL), 0)
            font = ImageFont.load_default(size)
            ImageDraw.Draw(image).text(
                (CELL / 2, CELL / 2), str(digit), fill=255, font=font, anchor="mm"
            )
            out[digit].append(np.asarray(image, dtype=np.float32) / 255)
    return out


GLYPHS = glyphs()


def draw(
    digits: list[int], colours: list[str], across: int, rng: random.Random, noise: float = 14.0
) -> Image.Image:
    """A picture of the digits, `across` cells a row; offset, size, shade and noise say nothing
    about the digit.
    """
    down = len(digits) // across
    canvas = np.zeros((down * CELL, across * CELL, 3), dtype=np.float32)
    for place, (digit, colour) in enumerate(zip(digits, colours, strict=True)):
        shift = rng.randint(-2, 2), rng.randint(-2, 2)
        mask = np.roll(rng.choice(GLYPHS[digit]), shift, (0, 1))[..., None]
        ink = np.array(COLOURS[colour], dtype=np.float32)
        cell = rng.uniform(190, 250) * (1 - mask) + ink * mask
        row, column = divmod(place, across)
        canvas.reshape(down, CELL, across, CELL, 3)[row, :, column] = cell
    canvas += np.random.default_rng(rng.getrandbits(32)).normal(0, noise, canvas.shape)
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8))


def held_out(grid: list[int]) -> bool:
    """One grid of eight belongs to the tests, whatever the seed."""
    return zlib.crc32(bytes(grid)) % 8 == 0


def random_grid(rng: random.Random, test: bool = False) -> list[int]:
    while True:
        grid = [rng.choice(DIGITS) for _ in CELLS]
        if held_out(grid) == test:
            return grid


def written(words: list[str]) -> str:
    """A grid as text: `A1 4 A2 5 A3 1 ; B1 2 B2 2 B3 3 ;`."""
    named = [f"{cell} {word}" for cell, word in zip(CELLS, words, strict=True)]
    return " ".join([*named[:3], ";", *named[3:], ";"])


def question(rng: random.Random, grids: float = 1 / 3) -> tuple[str, list[int]]:
    """A sum to find and the cells that it takes: the whole grid, or one of its rows."""
    if rng.random() < grids:
        return "what is the sum of the grid ?", [0, 1, 2, 3, 4, 5]
    row = rng.choice("AB")
    return f"what is the sum of row {row} ?", [i for i, c in enumerate(CELLS) if c[0] == row]


def solution(grid: list[int], asked: str, cells: list[int]) -> int:
    """The reference answer; a new question changes this, question() and the steps of trace()."""
    return sum(grid[c] for c in cells)


def reading(rng: random.Random) -> tuple[str, list[int]]:
    """A question that one look answers."""
    cell = rng.randrange(6)
    return f"what is at {CELLS[cell]} ?", [cell]


def posed(looks: str, asked: str, rng: random.Random) -> str:
    """Grid and question in either order, at times among words that mean nothing.

    What is learnt on text that always looks alike hangs on its length, and fails on pictures.
    """
    parts = [looks, asked] if rng.random() < 0.7 else [asked, looks]
    if rng.random() < 0.6:
        parts.insert(rng.randrange(3), " ".join(rng.choices(FILLERS, k=rng.randint(1, 8))))
    return " ".join(parts)


def trace(grid: list[int], asked: str, cells: list[int], rng: random.Random) -> str:
    """R1 in the miniature: goal, plan, cell by cell with the sum so far, slips caught at once or
    by a check at the end.
    """
    target = " ".join(asked.split()[2:-1]).removeprefix("at ")  # "the sum of row A"
    words = []
    if rng.random() < 0.6:
        words.append(f"i need {target} ." + " so i need each digit ." * (len(cells) > 1))
    if len(cells) > 1 and rng.random() < 0.6:
        words.append("first list cells , then add up .")
    slip_at = rng.choice(cells) if rng.random() < 0.25 else None
    late = slip_at is not None and rng.random() < 0.2  # found by the check only
    total = 0
    for cell in cells:
        wrong = rng.choice([d for d in DIGITS if d != grid[cell]])
        if cell == slip_at:
            words.append(f"{CELLS[cell]} {wrong} = {total + wrong}")
            if not late:
                name, digit = CELLS[cell], grid[cell]
                words.append(f"wait , that is not right . {total} . look at {name} again :")
                words.append(f"{name} {digit} = {total + digit}")
            total += wrong if late else grid[cell]
        else:
            total += grid[cell]
            words.append(f"{CELLS[cell]} {grid[cell]} = {total}")
    if late or rng.random() < 0.4:
        words.append("let me check . read again :")
        again = 0
        for cell in cells:
            again += grid[cell]
            words.append(f"{CELLS[cell]} {grid[cell]} = {again}")
        words.append(
            f"{again} is the same . good ."
            if again == total
            else f"wait , {total} is not right . so it is {again} ."
        )
    return f"<think> {' '.join(words)} </think> answer \\boxed{{ {solution(grid, asked, cells)} }}"


# ---------------------------------------------------------------- what the base model is trained on


def shown(grid: list[int], mode: str, rng: random.Random) -> tuple[str, list[Image.Image]]:
    """The same grid as text, as one picture, or mixed: each cell at random a word or a picture
    of its own.
    """
    colours = [rng.choice(list(COLOURS)) for _ in grid]
    if mode == "text":
        return written([str(d) for d in grid]), []
    if mode == "image":
        return "<image>", [draw(grid, colours, 3, rng)]
    words, images = [], []
    for digit, colour in zip(grid, colours, strict=True):
        if rng.random() < 0.5:
            words.append(str(digit))
        else:
            words.append("<image>")
            images.append(draw([digit], [colour], 1, rng))
    return written(words), images


def description(grid: list[int], rng: random.Random) -> str:
    """All cells in random order, most often with words and numbers between them that mean nothing.

    So the base model learns to read a cell after anything at all. One that reads only after a tidy
    list stops to see as soon as the cold start gives it new things to say.
    """
    noise = rng.random() < 0.7
    words = []
    for cell in rng.sample(range(6), 6):
        words += [CELLS[cell], str(grid[cell])]
        if noise and rng.random() < 0.6:
            words += ["=", str(rng.randint(0, 30))] if rng.random() < 0.6 else []
            words += rng.choices(NOISE, k=rng.randint(0, 4))
    return " ".join(words)


def base_example(rng: random.Random) -> data.Example:
    """The skills of a base model: reading (64 %), adding (24 %), sums guessed at once (12 %)."""
    grid, kind = random_grid(rng), rng.random()
    if kind < 0.04:
        a, b = rng.randint(0, 30), rng.choice(DIGITS)
        return data.Example("addition", f"what is {a} + {b} ?", str(a + b))
    if kind < 0.24:
        return data.Example("ledger", *ledger(rng))
    looks, images = shown(grid, rng.choice(("text", "image", "image", "mixed", "mixed")), rng)
    if kind < 0.68:
        name, asked, answer = "description", "describe the grid", description(grid, rng)
    elif kind < 0.88:
        asked, (cell,) = reading(rng)
        name, answer = "reading", direct(grid[cell])
    else:
        asked, cells = question(rng)
        name, answer = "guess", direct(solution(grid, asked, cells))
    return data.Example(name, posed(looks, asked, rng), answer, tuple(images))


def ledger(rng: random.Random) -> tuple[str, str, tuple]:
    """Entries with the running total: `page 4 note 5 add up` -> `page 4 = 4 note 5 = 9`.

    Names are words or cells in any order; a number may be a picture of its own.
    """
    count, seen = rng.randint(2, 6), rng.random() < 0.5
    carried = rng.randint(0, 5 * (6 - count)) if rng.random() < 0.5 else 0  # sums up to 30 alike
    names = rng.sample(CELLS if rng.random() < 0.5 else FILLERS, count)
    numbers, entries, images = rng.choices(DIGITS, k=count), [], []
    numbers[0] += carried
    for name, number in zip(names, numbers, strict=True):
        drawn = seen and number in DIGITS and rng.random() < 0.5
        entries.append(f"{name} <image>" if drawn else f"{name} {number}")
        images += [draw([number], [rng.choice(list(COLOURS))], 1, rng)] if drawn else []
    lines = zip(names, numbers, accumulate(numbers), strict=True)
    totals = [f"{name} {number} = {total}" for name, number, total in lines]
    return f"{' '.join(entries)} add up", " ".join(totals), tuple(images)


def direct(number: int) -> str:
    return f"answer \\boxed{{ {number} }}"


# ------------------------------------------------------------------ data files


def sft_row(rng: random.Random, index: int) -> dict:
    """A problem in words and a trace that solves it. No picture in any of them."""
    grid = random_grid(rng)
    asked, cells = reading(rng) if rng.random() < 0.12 else question(rng, grids=0.5)
    prompt = posed(written([str(d) for d in grid]), asked, rng)
    answer = solution(grid, asked, cells)
    row = {
        "id": f"sft-{index}",
        "source": "miniature/text",
        "prompt": prompt,
        "answer": str(answer),
    }
    return row | {"response": trace(grid, asked, cells, rng)}


def replay_row(rng: random.Random, index: int, folder: Path) -> dict:
    """Reading without reasoning, half picture, half text: what the setting `--replay` mixes into
    the cold start.
    """
    grid, mode = random_grid(rng), rng.choice(("image", "text"))
    looks, images = shown(grid, mode, rng)
    row = {
        "id": f"replay-{index}",
        "source": "miniature/replay",
        "prompt": f"{looks} describe the grid",
    }
    row["images"] = save_images(images, folder, f"replay-{index}")
    return row | {"response": description(grid, rng)}


def problem_row(
    rng: random.Random, name: str, mode: str, test: bool, folder: Path, ask=question
) -> dict:
    """A problem of RL or of the tests, asked by question() or by reading()."""
    grid = random_grid(rng, test)
    asked, cells = ask(rng)
    looks, images = shown(grid, mode, rng)
    return {
        "id": name,
        "source": f"miniature/{'reading' if ask is reading else mode}",
        "prompt": f"{looks} {asked}",
        "images": save_images(images, folder, name),
        "answer": str(solution(grid, asked, cells)),
        "grid": dict(zip(CELLS, grid, strict=True)),
    }


def save_images(images: list[Image.Image], folder: Path, name: str) -> list[str]:
    paths = [f"images/{name}-{i}.png" for i in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        image.save(folder / path, compress_level=1)
    return paths


def write_data(cfg: Config, folder: Path):
    """train (RL), valid, test, sft, sft_replay: JSONL, pictures beside them."""
    (folder / "images").mkdir(parents=True, exist_ok=True)

    def write(name: str, count: int, row):
        rng = random.Random(f"{cfg.seed}/{name}")
        rows = [row(rng, i) for i in progress(range(count), f"data/{name}")]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    def problems(name: str, test: bool = False, easy: int = 0):
        """Pictures and text in turn; every `easy`-th problem only asks to read a picture."""

        def row(rng, i):
            ask = reading if easy and i % easy == 0 else question
            return problem_row(rng, f"{name}-{i}", ("image", "text")[i % 2], test, folder, ask)

        return row

    write("train", cfg.train, problems("train", easy=8))
    write("valid", cfg.test // 2, problems("valid"))
    write("test", cfg.test, problems("test", test=True))
    write("reading", cfg.test // 2, lambda rng, i: problems("reading", True, easy=2)(rng, 2 * i))
    write("sft", cfg.sft, sft_row)
    write("sft_replay", cfg.sft // 4, lambda rng, i: replay_row(rng, i, folder))


def read_accuracy(row: dict, response: str) -> tuple[int, int]:
    """(right, total) digits that a response reads out: `A3 8` in the thinking, against the row's
    grid.
    """
    words = response.split("</think>")[0].split()
    read = [(a, b) for a, b in zip(words, words[1:], strict=False) if a in CELLS and b.isdecimal()]
    return sum(row["grid"][cell] == int(digit) for cell, digit in read), len(read)


# ------------------------------------------------------------------ the base model


def align(model: Qwen25VL, tokenizer, cfg: Config, settings):
    """CLIP in the miniature: every image token names its digit and its colour against the word
    embeddings.

    Without it the base model needs some ten times the steps before it reads at all.
    """
    rng = random.Random(f"{cfg.seed}/align")
    digits = torch.tensor(tokenizer.convert_tokens_to_ids([str(d) for d in DIGITS]))
    colours = torch.tensor(tokenizer.convert_tokens_to_ids(list(COLOURS)))
    tower = list(model.visual.parameters())
    optimizer = torch.optim.AdamW(tower, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    words_of = model.model.embed_tokens.weight.detach()  # they stay: the tower comes to them
    for step in progress(range(cfg.align_steps), "align"):
        rate = min(1, (step + 1) / 10) * (1 - step / cfg.align_steps)
        optimizer.param_groups[0]["lr"] = 3e-3 * rate
        patches, grids, seen, shades = [], [], [], []
        for _ in range(64):
            grid, colour = random_grid(rng), [rng.choice(list(COLOURS)) for _ in CELLS]
            pixels, size = data.image_patches(draw(grid, colour, 3, rng), settings)
            patches.append(pixels)
            grids.append(size)
            seen += [DIGITS.index(d) for d in grid]
            shades += [list(COLOURS).index(c) for c in colour]
        features = model.visual(torch.cat(patches), grids)  # (384, C)
        loss = torch.zeros(())
        for words, names in ((digits, seen), (colours, shades)):
            logits = features @ words_of[words].T
            loss = loss + torch.nn.functional.cross_entropy(logits, torch.tensor(names))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tower, 1.0)
        optimizer.step()
    return loss.item()


class BasePacks(IterableDataset):
    """The base model's batches, one pack each, drawn and encoded on the core that is free."""

    def __init__(self, cfg: Config, tokenizer, settings: data.ImageSettings):
        self.cfg, self.tokenizer, self.settings = cfg, tokenizer, settings

    def __iter__(self):
        rng = random.Random(f"{self.cfg.seed}/base")
        for _ in range(self.cfg.steps):
            examples = [base_example(rng) for _ in range(self.cfg.batch)]
            documents = [data.encode_example(e, self.tokenizer, self.settings) for e in examples]
            yield pack_alone(documents)


def train_base(cfg: Config, directory: Path):
    """The base model, from random weights: align, then learn to read, guess and add."""
    save_tokenizer(directory / "model")
    tokenizer = data.load_tokenizer(directory / "model")
    settings = data.load_image_settings(directory / "model")
    torch.manual_seed(cfg.seed)
    model = Qwen25VL(model_config(len(tokenizer)))
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.5)
    log = RunLog(directory, cfg, cfg.steps)
    align(model, tokenizer, cfg, settings)
    for weight in model.visual.parameters():
        weight.requires_grad_(False)  # noise at this rate would undo align() before the LM reads
    trained = [*model.model.parameters(), *model.lm_head.parameters()]
    optimizer = torch.optim.AdamW(
        trained, lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    packs = DataLoader(BasePacks(cfg, tokenizer, settings), batch_size=None, num_workers=1)
    for step, pack in enumerate(packs):
        lr = cfg.lr * min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / cfg.steps))
        optimizer.param_groups[0]["lr"] = lr
        logps, _ = model.logps(pack)
        loss = -logps.mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if step % 20 == 0 or step == cfg.steps - 1:
            metrics = {"loss": loss.item(), "lr": lr, "grad_norm": norm.item()}
            log.log(step, metrics, show=("loss", "lr", "grad_norm"))
    save_model(model, directory / "model")
    log.close()
    return model


def ensure(world, *paths: str):
    """Where a stage starts on its defaults, makes what it needs: data, base model, cold start."""
    stages = dict.fromkeys(("out/laptop/data", "out/laptop/base"), "miniature.world")
    stages |= {"out/laptop/coldstart": "coldstart"}
    for path in paths:
        script = stages.get(str(Path(path).parent))
        if not Path(path).exists() and script and world.main:
            print(f"{path} is not there yet: running {script}", flush=True)
            clean = {k: v for k, v in os.environ.items() if not k.startswith(TORCHRUN)}
            clean["PYTHONPATH"] = str(Path(__file__).parents[1])
            command = [sys.executable, "-m", script]
            if subprocess.run(command, env=clean).returncode:
                raise RuntimeError(f"{script} has failed, see above: {path} is still missing")
        world.wait()


def main(cfg: Config):
    torch.set_num_threads(cfg.threads)
    out = Path(cfg.out)
    writer = Process(target=write_data, args=(cfg, out / "data"))  # on the core that is free
    if not (out / "data/sft_replay.jsonl").exists():  # the last file that it writes
        writer.start()
    if not (out / "base/model/config.json").exists():
        train_base(cfg, out / "base")
    if writer.pid is not None:
        writer.join()
        if writer.exitcode:
            raise RuntimeError(f"writing {out / 'data'} failed, see above")


if __name__ == "__main__":
    run_main(main, Config)
