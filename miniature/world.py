"""The miniature's world: bills, on which a second look pays. It writes the data of all stages.

A bill lists four items, each with a digit, and their total T. Half of the bills have a smudged
item: it shows a strong and a faint digit, and either may be the right one. The question is a sum of
two items, the smudged one among them. One look takes the strong digit and is right half the time.
Who takes the four digits from T sees whether something is left, and if so looks again.

    text         A 4 ; B 3 ~5 C 1 ; D 2 ; T 12 ; what is B + D ?
    picture      <image> what is B + D ?               the same 15 words, three cells a line
    base         answer \\boxed{ 5 }                    it guesses from one look
    cold start   <think> A 4 B maybe 3 C 1 D 2 . unclear B , let me check . T 12 A 4 = 8 B 3 = 5
                 C 1 = 4 D 2 = 2 . wait , that is not right . look again at B ~5 . so B 5 + D 2 = 7
                 </think> answer \\boxed{ 7 }

The traces are text only and hold five habits, each at its own rate: four of no use here (a goal, a
plan, a second look at a plain item, all items read again), and the check with its second look.
Which is which, RL has to find out. No test bill is seen in any stage.

    python -m miniature.world                                              # out/laptop/data
    python -m miniature.world --out DIR --files train --control random_total
"""

import json
import random
import zlib
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tokenizers import Tokenizer, models, pre_tokenizers

from common.data import Example
from common.log import progress, run_main
from common.records import write_rows

ITEMS = ("A", "B", "C", "D")
LINES = (*ITEMS, "T")  # of a bill; the last shows the total
DIGITS = (1, 2, 3, 4, 5)
TOTALS = range(4, 21)  # what four digits can add up to
FAINT = tuple(f"~{digit}" for digit in DIGITS)  # the words for faint digits
CELL = 28  # pixels: patch 14, merge 2, so a cell is one token of the decoder
ACROSS = 3  # cells a line: name, strong digit, faint digit
GROUPS = ("smudged_picture", "clear_text", "clear_picture", "smudged_text")  # of bills, in turn
SPLITS = ("train", "valid", "test")
FILES = (*SPLITS, "sft", "traces")

SPECIAL = (  # the first ids, under Qwen's names
    "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|vision_pad|> "
    "<|image_pad|> <|video_pad|>"
).split()
FORMAT = "<think> </think> \\boxed{ } answer user assistant".split()
WORDS = (
    "what is at describe the bill list each ? . , ; : = + i need so digit first items then add up "
    "wait that not right look again let me check read good maybe unclear -1 -2 -3 -4"
).split()
FILLERS = "table paper small line here there next to on in one by side page with note mark".split()
NUMBERS = tuple(str(n) for n in range(26))  # a token each
VOCABULARY = [*FORMAT, *WORDS, *LINES, *NUMBERS, *FAINT, *FILLERS]
SPEAKING = ("again", "at", "maybe", "unclear", "=", "+")  # they say what comes next
NOISE = [word for word in (*FILLERS, *WORDS) if word not in SPEAKING]
# A word-level tokenizer has nothing for an unknown word: the template says so before it is asked.
CHAT_TEMPLATE = (
    f"{{% set words = {json.dumps(VOCABULARY)} %}}"
    "{% macro read(text) %}"
    "{% set unknown = text.split() | reject('in', words) | unique | list %}"
    "{% if unknown %}{{ raise_exception('the miniature is a world of ' ~ words | length"
    " ~ ' words, and these are not among them: ' ~ unknown | join(' ')"
    " ~ '. It can read: A 4 ; B 3 ~5 C 1 ; D 2 ; T 12 ; what is B + D ?') }}"
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
    """The data of a miniature run."""

    out: str = "out/laptop/data"  # directory
    seed: int = 0
    files: tuple[Literal[*FILES], ...] = FILES  # which to write
    train: int = 4096  # problems of RL, a quarter of each group
    valid: int = 512  # problems to tune on
    test: int = 1024  # problems that decide nothing on the way
    sft: int = 12288  # rows of the cold start: traces, and a quarter of what the base model learnt
    traces: int = 9216  # the traces alone, for a control: all of it is text
    control: Literal["", "random_total", "no_smudged"] = ""  # no check can pay; one look is enough


@dataclass(frozen=True)
class Bill:
    digits: tuple[int, ...]  # the right ones, of A to D
    total: int  # as printed
    shown: tuple[tuple[int, ...], ...]  # of each item: its digit, or a strong and a faint one

    @property
    def smudged(self) -> list[int]:
        """The items that show two digits: none or one, but for the base model's bills."""
        return [item for item, looks in enumerate(self.shown) if len(looks) > 1]

    @property
    def cells(self) -> list[str]:
        """Word by word, three to a line: `A 4 ; B 3 ~5 C 1 ; D 2 ; T 12 ;`."""
        words = []
        for name, (strong, *faint) in zip(ITEMS, self.shown, strict=True):
            words += [name, str(strong), f"~{faint[0]}" if faint else ";"]
        return [*words, "T", str(self.total), ";"]


def split_of(digits: tuple[int, ...]) -> str:
    """One bill of eight belongs to the tests, one to tuning, whatever the seed."""
    return {0: "test", 1: "valid"}.get(zlib.crc32(bytes(digits)) % 8, "train")


def random_bill(rng: random.Random, split: str, smudged: float) -> Bill:
    """A bill of this split; either digit of a smudged item may be the strong one."""
    while split_of(digits := tuple(rng.choices(DIGITS, k=len(ITEMS)))) != split:
        pass
    shown = [(digit,) for digit in digits]
    if rng.random() < smudged:
        item = rng.randrange(len(ITEMS))
        pair = [digits[item], rng.choice([d for d in DIGITS if d != digits[item]])]
        shown[item] = tuple(rng.sample(pair, 2))
    return Bill(digits, sum(digits), tuple(shown))


def question(bill: Bill, rng: random.Random) -> tuple[str, list[int]]:
    """The sum of two items, the smudged one among them, and which two."""
    asked = rng.sample(range(len(ITEMS)), 2)
    if bill.smudged and bill.smudged[0] not in asked:
        asked[rng.randrange(2)] = bill.smudged[0]
    return f"what is {ITEMS[asked[0]]} + {ITEMS[asked[1]]} ?", asked


def direct(answer: int) -> str:
    return f"answer \\boxed{{ {answer} }}"


# How often a trace shows a habit; `look` is the second look where a check leaves something. Ours.
RATES = {"need": 0.25, "plan": 0.25, "idle": 0.25, "reread": 0.15, "check": 0.4, "look": 0.9}


def trace(bill: Bill, asked: list[int], rng: random.Random, rates: dict = RATES) -> str:
    """R1 in the miniature: the items one by one, then the sum, with habits in between. Its author
    reads and adds without a slip; only a smudge can mislead it."""
    does = {habit: rng.random() < rate for habit, rate in rates.items()}
    read, words = [looks[0] for looks in bill.shown], []
    plain = [item for item in range(len(ITEMS)) if item not in bill.smudged]
    idle = rng.choice(plain) if does["idle"] else None
    if does["need"]:
        words.append(f"i need {ITEMS[asked[0]]} + {ITEMS[asked[1]]} . so i need each digit .")
    if does["plan"]:
        words.append("first list items , then add up .")
    for item, digit in enumerate(read):
        words.append(f"{ITEMS[item]} {'maybe ' if item in bill.smudged else ''}{digit}")
        if item == idle:
            words.append(f". look again at {ITEMS[item]} {digit} .")
    if idle != len(ITEMS) - 1:
        words.append(".")
    words += [f"unclear {ITEMS[item]} ," for item in bill.smudged]
    if does["reread"]:
        again = [f"{name} {digit}" for name, digit in zip(ITEMS, read, strict=True)]
        words.append(f"read again : {' '.join(again)} .")
    if does["check"]:
        left = bill.total - sum(read)
        words.append(f"let me check . {countdown(bill.total, read)} .")
        words.append("wait , that is not right ." if left else "good .")
        for item in bill.smudged if left and does["look"] else ():
            read[item] = bill.shown[item][1]
            words.append(f"look again at {ITEMS[item]} ~{read[item]} .")
    words.append(summed(asked, read))
    return f"<think> {' '.join(words)} </think> {direct(sum(read[item] for item in asked))}"


def countdown(left: int, digits: list[int]) -> str:
    """The digits taken from a total, one by one: `T 12 A 4 = 8 B 3 = 5 C 1 = 4 D 2 = 2`."""
    words = [f"T {left}"]
    for name, digit in zip(ITEMS, digits, strict=True):
        left -= digit
        words.append(f"{name} {digit} = {left}")
    return " ".join(words)


def summed(asked: list[int], digits) -> str:
    a, b = asked
    return f"so {ITEMS[a]} {digits[a]} + {ITEMS[b]} {digits[b]} = {digits[a] + digits[b]}"


def glyph(word: str, size: int) -> np.ndarray:
    """Ink of a word in [0, 1]; a faint digit has less of it, `;` none."""
    image = Image.new("L", (CELL, CELL), 0)
    font = ImageFont.load_default(size - 4 if word.isdecimal() and len(word) > 1 else size)
    ink, text = (120, word[1:]) if word in FAINT else (255, word.strip(";"))
    ImageDraw.Draw(image).text((CELL / 2, CELL / 2), text, fill=ink, font=font, anchor="mm")
    return np.asarray(image, dtype=np.float32) / 255


PRINTED = (*LINES, *NUMBERS[1:21], *FAINT, ";")  # the words that a cell can show
GLYPHS = {word: [glyph(word, size) for size in (20, 22, 24)] for word in PRINTED}


def draw(cells: list[str], rng: random.Random) -> Image.Image:
    """A picture of the words; their place in the cell, size, shade and noise say nothing."""
    rows = []
    for at in range(0, len(cells), ACROSS):
        row = []
        for word in cells[at : at + ACROSS]:
            shift = rng.randint(-2, 2), rng.randint(-2, 2)
            ink = np.roll(rng.choice(GLYPHS[word]), shift, (0, 1))
            row.append(rng.uniform(190, 250) * (1 - ink) + 20 * ink)
        rows.append(np.hstack(row))
    canvas = np.vstack(rows)
    canvas += np.random.default_rng(rng.getrandbits(32)).normal(0, 14, canvas.shape)
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8)).convert("RGB")


def present(bill: Bill, picture: bool, rng: random.Random) -> tuple[str, list[Image.Image]]:
    return ("<image>", [draw(bill.cells, rng)]) if picture else (" ".join(bill.cells), [])


# ------------------------------------------------------------------ rows


def watch(bill: Bill) -> dict[str, str]:
    """Patterns of the habits in a response to this bill. Of a smudged one also: was the first
    reading the wrong digit, was it looked at again, and `repair`: both."""
    patterns = {"think": "</think>", "need": "i need", "plan": "first list"}
    patterns |= {"reread": "read again", "check": "let me check", "idle_look": "look again at"}
    for item in bill.smudged:
        name, right = ITEMS[item], bill.digits[item]
        second_look = rf"look again at {name}\b"
        wrong_first = rf"^(?:(?!{name} (?:maybe )?\d).)*{name} (?:maybe )?(?!{right}\b)\d"
        patterns |= {"idle_look": rf"look again at (?!{name}\b)", "second_look": second_look}
        patterns |= {"wrong_first": wrong_first, "repair": f"{wrong_first}.*{second_look}"}
    return patterns


def problem_row(rng: random.Random, index: int, name: str, cfg: Config) -> dict:
    """A problem of RL or of the tests. `group`: what bill it shows; `watch`: by which patterns to
    search a response for habits."""
    kind, mode = GROUPS[index % len(GROUPS)].split("_")
    bill = random_bill(rng, name, kind == "smudged" and cfg.control != "no_smudged")
    words, asked = question(bill, rng)
    answer = sum(bill.digits[item] for item in asked)
    if cfg.control == "random_total":
        bill = replace(bill, total=rng.choice(TOTALS))
    looks, pictures = present(bill, mode == "picture", rng)
    row = {"id": f"{name}-{index}", "source": f"miniature/{mode}", "prompt": f"{looks} {words}"}
    row |= {"images": save_pictures(pictures, Path(cfg.out), row["id"]), "answer": str(answer)}
    row["group"] = f"{'smudged' if bill.smudged else 'clear'}_{mode}"
    return row | {"bill": " ".join(bill.cells), "watch": watch(bill)}


def trace_row(rng: random.Random, index: int) -> dict:
    """A problem in words and a trace that solves it or fails: nothing is filtered by the answer,
    which would teach to peek at T. Most bills are smudged."""
    bill = random_bill(rng, "train", smudged=0.8)
    words, asked = question(bill, rng)
    prompt = posed(" ".join(bill.cells), words, rng)
    row = {"id": f"sft-{index}", "source": "miniature/text", "prompt": prompt}
    return row | {"response": trace(bill, asked, rng)}


def sft_row(rng: random.Random, index: int, folder: Path) -> dict:
    """Three traces, then a bill described without reasoning, picture or text: it keeps the model
    seeing while it learns to reason. Text alone costs it faint digits, as a control shows."""
    if index % 4 < 3:
        return trace_row(rng, index)
    drawn = example(rng, answers=False)
    row = {"id": f"sft-{index}", "source": "miniature/description", "prompt": drawn.prompt}
    row["images"] = save_pictures(drawn.images, folder, row["id"])
    return row | {"response": drawn.response}


def posed(looks: str, words: str, rng: random.Random) -> str:
    """Bill and question in either order, at times among words that mean nothing: what is learnt on
    text that always looks alike hangs on its length, and fails on pictures."""
    parts = [looks, words] if rng.random() < 0.7 else [words, looks]
    if rng.random() < 0.6:
        parts.insert(rng.randrange(3), " ".join(rng.choices(FILLERS, k=rng.randint(1, 8))))
    return " ".join(parts)


def save_pictures(pictures: list | tuple, folder: Path, name: str) -> list[str]:
    paths = []
    for picture in pictures:
        paths.append(f"images/{name}-{len(paths)}.png")
        picture.save(folder / paths[-1], compress_level=1)
    return paths


# ------------------------------------------------------------------ what the base model learns from


def busy_bill(rng: random.Random) -> Bill:
    """Any of its items may be smudged, and its total may be any: all of it has to be read."""
    digits = random_bill(rng, "train", 0).digits
    shown = [tuple(rng.sample(DIGITS, 2)) if rng.random() < 0.5 else (d,) for d in digits]
    return Bill(digits, rng.choice((sum(digits), rng.choice(TOTALS))), tuple(shown))


def description(bill: Bill, rng: random.Random) -> str:
    """The lines in any order, some twice, most often with noise in between; at times what is left
    of the total, and a sum at the end, both of the digits that were said last.

    A model that reads only within tidy lists stops to see when the cold start gives it new things
    to say. A smudged item is `maybe` its strong digit, and `again at` it there is the faint one.
    """
    lines, said = [*bill.shown, (bill.total,)], [looks[0] for looks in bill.shown]
    order = rng.sample(range(5), 5) + rng.choices(range(5), k=3)
    counted = rng.choice((4, 5, 6, 7) + 5 * (None,))  # before which line; mostly never
    noise, words = 0.6 * (rng.random() < 0.7), []
    for place, line in enumerate(order):
        if place == counted and bill.total - sum(said) >= -4:  # there are no words below
            words.append(f". {countdown(bill.total, said)} .")
        strong, *faint = lines[line]
        again = rng.random() < 0.5
        if again:
            words += ["again at", LINES[line], f"~{faint[0]}" if faint else str(strong)]
        else:
            words += ["at"] * (rng.random() < 0.5) + [LINES[line]] + ["maybe"] * len(faint)
            words.append(str(strong))
        if line < len(said):
            said[line] = faint[0] if again and faint else strong
        if rng.random() < noise:
            words += rng.choices(NOISE, k=rng.randint(1, 4))
    if bill.smudged:
        unclear = f"unclear {' '.join(ITEMS[item] for item in bill.smudged)} ,"
        words.insert(rng.choice((0, len(words))), unclear)
    if rng.random() < 0.8:
        words.append(f". {summed(rng.sample(range(len(ITEMS)), 2), said)}")
    return " ".join(words)


def example(rng: random.Random, answers: bool = True) -> Example:
    """The skills of a base model: 20 % taking away, 60 % reading, 20 % answers at a look."""
    kind = rng.random() * (1.0 if answers else 0.8)
    if kind < 0.2:  # from the sum of four digits, or a total off by a few
        taken = []
        for _ in range(3):
            digits = rng.choices(DIGITS, k=len(ITEMS))
            off = rng.choice((0, 0, 0, -4, -3, -2, -1, 1, 2, 3, 4))
            taken.append(countdown(min(max(sum(digits) + off, 4), 20), digits))
        return Example("countdown", "list each", " . ".join(taken))
    bill = busy_bill(rng)
    looks, pictures = present(bill, rng.random() < 2 / 3, rng)
    if kind < 0.8:
        words, response = "describe the bill", description(bill, rng)
    elif kind < 0.88:
        item = rng.randrange(len(ITEMS))
        words, response = f"what is at {ITEMS[item]} ?", direct(bill.shown[item][0])
    else:
        words, asked = question(bill, rng)
        response = direct(sum(bill.shown[item][0] for item in asked))
    return Example("bill", posed(looks, words, rng), response, tuple(pictures))


def save_tokenizer(directory: Path):
    """tokenizer.json and the small files beside it, in the layout of the hub."""
    directory.mkdir(parents=True, exist_ok=True)
    ids = {word: i for i, word in enumerate([*SPECIAL, *VOCABULARY])}
    assert len(ids) == len(SPECIAL) + len(VOCABULARY), "a word stands twice in the vocabulary"
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(directory / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    about |= {"pad_token": "<|endoftext|>", "chat_template": CHAT_TEMPLATE}
    about |= {"clean_up_tokenization_spaces": False, "model_max_length": 4096}
    pictures = {"min_pixels": CELL**2, "max_pixels": 64 * CELL**2, "patch_size": 14}
    pictures |= {"temporal_patch_size": 2, "merge_size": 2}
    pictures |= {"image_mean": [0.48145466, 0.4578275, 0.40821073]}
    pictures |= {"image_std": [0.26862954, 0.26130258, 0.27577711]}
    pictures |= {"image_processor_type": "Qwen2VLImageProcessor"}
    for name, settings in {"tokenizer_config": about, "preprocessor_config": pictures}.items():
        (directory / f"{name}.json").write_text(json.dumps(settings, indent=1))


def main(cfg: Config):
    out = Path(cfg.out)
    (out / "images").mkdir(parents=True, exist_ok=True)
    makers = {split: partial(problem_row, name=split, cfg=cfg) for split in SPLITS}
    makers |= {"sft": partial(sft_row, folder=out), "traces": trace_row}
    for name in cfg.files:
        rng = random.Random(f"{cfg.seed}/{name}")
        rows = (makers[name](rng, i) for i in progress(range(getattr(cfg, name)), name))
        write_rows(out / f"{name}.jsonl", rows)


if __name__ == "__main__":
    run_main(main, Config)
