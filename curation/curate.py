r"""Rows of many sets become the file that a stage trains on.

    a.jsonl, b.jsonl ─rules─▶ ─duplicates─▶ ─benchmarks─▶ ─loss─▶ ─passes─▶ ─sample─▶ sft.jsonl
                        └──────────┴─────────────┴──────────┴────────┴─────────┴─▶ sft.dropped.jsonl

The paper (OVR, sec. 3.3) names the steps and gives no thresholds: all constants here are ours.

rules       what cannot teach or cannot be graded. Better keep a doubtful row than lose an honest
            one: tests/test_curate.py has what the patterns must not hit beside what they must
duplicates  the same problem again, nearly word for word; the first row stays (alike.py)
benchmarks  problems that are test questions, by their words or pictures (alike.py)
loss        under a small language model (score.py): further from the median of the row's source
            than 5 robust standard deviations, up (damage, no language) or down (boilerplate)
passes      problems that the cold-start model (score.py) solves never, or always: no gradient
sample      `count` rows without replacement; a row of a stratum (source, level, format of the
            answer) of n rows weighs n^-alpha: 0 keeps the proportions, 1 makes strata equal

Rows are read twice and never held: the first pass, over all workers, looks at each row alone and
keeps 126 bytes of it (252 MB for 2 M rows); the decisions are made on these; the second pass copies
the rows that stay. No file in between, so there is nothing to resume, and any number of workers
gives the same bytes. What went where is printed, and stands in sft.report.json. Scores cost far
more, so one curates, scores what stays, and curates the same rows again with them.

    python -m curation.curate --rows a.jsonl b.jsonl --kind sft --out out/data/sft.jsonl
    python -m curation.curate --rows k12.jsonl --kind rl --benchmarks mathvision.jsonl \
        --workers 16 --passes out/data/rl.passes.jsonl --count 300000 --out out/data/rl.jsonl
"""

import json
import os
import re
import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import Pool
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from common.log import beside, progress, run_main, write_report
from curation.alike import (
    BANDS,
    DAMAGED,
    ODD,
    PERMUTATIONS,
    Benchmarks,
    contaminations,
    digest,
    fingerprint,
    identity,
    mixed,
    read_benchmarks,
    repeats,
    runs,
    signature,
    sketch,
    words,
)
from reward import extract, grade

CHUNK = 4 << 20  # bytes of a file that a worker takes at a time
FEW = 30  # rows of a source below which its losses are judged by those of all sources
LEAST_SPREAD = 0.02  # nats a token: where all losses are alike, none is abnormal
DIFFICULTY = ((1 / 3, "hard"), (2 / 3, "medium"), (1, "easy"))  # by pass rate, up to and including
NUMBER = re.compile(r"[\s$]*[-+]?[\d.,]+(?:/\d+)?\s*(?:%|\\%|°|\^\\circ)?[\s$.]*")

# of the rules
MIN_THOUGHT = 100  # characters: a thought of less than some 20 words teaches to skip it
MAX_RESPONSE = 4 * 65_536  # characters; mathematics has 2 to 4 a token: surely over 64k tokens
MAX_PROMPT = 20_000  # characters; longer ones are documents, not questions
MAX_GOLD = (200, 10)  # characters, words: longer golds are sentences that no reply matches
LOOP_ZLIB = 0.1  # compressed / plain size; of real replies 0.16 to 0.6, of a table of cases 0.2
LOOP_TAIL = 4_000  # characters at the end looked at alone: a long response ends in a loop
LOOP_WORDS, LOOP_SHARE = 16, 0.4  # share of runs of 16 words that stood there before

MARKUP = re.compile(r"<\|[a-z_]+\|>")  # of the chat; data.py refuses rows that hold it
MOJIBAKE = re.compile(
    "[\ufffd\x80-\x9f\ud800-\udfff]"  # the replacement character, control codes, half a character
    "|â€|âˆ|ï»¿|ï¿½|Ï€|Î[±-»]|[ÃÂ][\xa0-\xaa\xac-\xba\xbc-\xbf]"  # UTF-8 as Latin-1, not «MAÇÃ»
)
SCRIPTS = {  # runs, for one letter is a symbol: the group Ш, the power set of ℵ
    "CJK": re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]{2}"),
    "Cyrillic": re.compile("[\u0400-\u04ff]{3}"),
    "Arabic": re.compile("[\u0600-\u06ff]{3}"),
    "Hebrew": re.compile("[\u0590-\u05ff]{3}"),
    "Indic or Thai": re.compile("[\u0900-\u0eff]{3}"),
}
GIVEN = re.compile(r"(?:\b(?:answer|ans\.?)\s*(?:is\b|[:=])\s*:?|\\boxed\s*(?=\{))", re.I)
PROOF = re.compile(r"\b(?:prove|show|demonstrate) that\b|\bprove:", re.I)
ASKS = re.compile(
    r"\?|\b(?:find|determine|compute|calculate|evaluate|what|which|how|express|solve)\b", re.I
)
NO_GOLD = re.compile(r"proof|see (?:the )?(?:solution|proof)|.*answers? (?:may|will) vary.*", re.I)
REFUSAL = re.compile(  # not "I'm sorry, I made a mistake", nor "I cannot divide by zero"
    r"\bas an ai (?:language )?model\b"
    r"|\bi['’]m sorry,? but i(?: can['’]t| cannot| am unable|['’]m unable)"
    r"|\bi(?: can['’]t| cannot| am unable to|['’]m unable to) (?:assist|comply|fulfill|help with"
    r"|help you with|(?:see|view|access) (?:the|any|this) (?:image|picture|figure|diagram))",
    re.I,
)
CUT = re.compile(r"(?:[,;(\[{=+\\]|\b(?:the|an|of|and|or|with|because))$")
OPEN, CLOSE = re.compile(r"(?<!\\)\\\["), re.compile(r"(?<!\\)\\\]")  # but \\[4pt] is a new line


@dataclass(frozen=True)
class Config:
    """Stage 0: from rows to the file that a stage reads."""

    rows: tuple[str, ...]  # JSONL files {"id", "source", "prompt", "response" or "answer", ...}
    kind: Literal["sft", "rl"]  # sft rows need a response, rl rows an answer
    out: str  # JSONL to write; .dropped.jsonl, .contaminated.jsonl, .report.json beside it
    benchmarks: tuple[str, ...] = ()  # JSONL files of test questions {"id", "prompt", "images"?}
    losses: tuple[str, ...] = ()  # of score.py --kind loss; none: the step lets all pass
    passes: tuple[str, ...] = ()  # of score.py --kind passes; none: the step lets all pass
    loss_z: float = 5.0  # robust standard deviations (1.48 x MAD) from the source's median; ours
    count: int = 0  # rows to choose; 0: all
    alpha: float = 0.5  # a row weighs (rows of its stratum) ^ -alpha; ours
    seed: int = 0
    workers: int = 1  # processes

    def __post_init__(self):
        if not self.rows:
            raise ValueError("--rows names no file")
        for path in (*self.rows, *self.benchmarks, *self.losses, *self.passes):
            if not Path(path).is_file():
                raise FileNotFoundError(f"{path}: no such file in {Path.cwd()}")
            if Path(path).resolve() == Path(self.out).resolve():
                raise ValueError(f"--out {self.out} is one of the inputs and would be overwritten")
        if len({*map(os.path.realpath, self.rows)}) < len(self.rows):
            raise ValueError(f"--rows {' '.join(self.rows)}: a file is named twice")
        if self.count < 0 or self.alpha < 0 or self.workers < 1 or self.loss_z <= 0:
            raise ValueError("count, alpha: not negative; loss_z: positive; workers: at least 1")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("id", "source", "prompt", "response" if self.kind == "sft" else "answer")


# ---- reading


class Broken(NamedTuple):
    """A line that is no row. It counts as one all the same, under the name of its place."""

    id: str
    detail: str


def rows_of(
    path: Path, start: int, end: int, needs: tuple[str, ...] = ()
) -> Iterator[tuple[bytes, dict | Broken]]:
    """(line, row) of the lines that begin in [start, end) of the file; row["folder"] is ours."""
    with path.open("rb") as file:
        file.seek(max(0, start - 1))
        if start:
            file.readline()  # the rest of a line that began before
        while (at := file.tell()) < end and (line := file.readline()):
            if line.strip():
                row, wrong = read_row(line, needs)
                place = f"{path.name}, byte {at}"
                yield line, Broken(place, wrong) if wrong else row | {"folder": str(path.parent)}


def read_row(line: bytes, needs: tuple[str, ...]) -> tuple[dict, str]:
    """(the row, "") or ({}, what is wrong)"""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return {}, f"not JSON: {error}"
    if not isinstance(row, dict):
        return {}, f"not a row: {row!r:.80}"
    if missing := [name for name in needs if row.get(name) is None]:
        return {}, f"{missing} missing; the row has {[*row]}"[:300]
    for name in {"id", "source"} & {*needs}:
        if not isinstance(row[name], str | int) or not str(row[name]).strip():
            return {}, f"{name} is {row[name]!r:.80}"
    return row, ""


def test_rows(files: Iterable[str]) -> Iterator[dict]:
    """The questions of benchmarks: items of benchmarks.py, or files that say "question", "image". A
    broken one stops the run: what it tests would be missed in silence."""
    for path in files:
        for _, row in rows_of(Path(path), 0, os.path.getsize(path), ("id",)):
            if isinstance(row, Broken):
                raise ValueError(f"benchmark {path}, {row.id}: {row.detail}")
            prompt = row.get("question") or row.get("prompt")  # the one without what all are told
            if not isinstance(prompt, str):
                raise ValueError(f"benchmark {path}: {row['id']} has no prompt; it has {[*row]}")
            one = [row["image"]] if row.get("image") else []
            yield row | {"prompt": prompt, "images": row.get("images") or one}


class Scores(NamedTuple):
    """What score.py said of rows: 12 bytes a row, sorted by the hash of the id."""

    keys: np.ndarray  # (S,) uint64
    values: np.ndarray  # (S,) float32; NaN: the row could not be scored
    samples: int  # tries a problem, for passes

    def of(self, row_id: str) -> float:
        """Infinite, if nobody asked."""
        key = np.uint64(digest(row_id))
        at = int(np.searchsorted(self.keys, key))
        return float(self.values[at]) if at < len(self.keys) and self.keys[at] == key else np.inf


def read_scores(files: Iterable[str], column: str) -> Scores:
    keys, values, samples = [], [], set()
    for path in files:
        for _, row in rows_of(Path(path), 0, os.path.getsize(path), ("id",)):
            if isinstance(row, Broken) or column not in row:
                raise ValueError(f"{path}: not a file of score.py with {column!r}: {row!r:.200}")
            keys.append(digest(str(row["id"])))
            values.append(np.nan if row[column] is None else row[column])
            samples |= {row["samples"]} if row.get("samples") and row[column] is not None else set()
    if len(samples) > 1:
        raise ValueError(f"{[*files]}: problems were tried {sorted(samples)} times; give one kind")
    keys = np.array(keys, np.uint64)
    order = np.argsort(keys, kind="stable")
    return Scores(keys[order], np.array(values, np.float32)[order], max(samples, default=0))


@cache
def given(cfg: Config) -> tuple[Benchmarks, Scores, Scores]:
    """(test questions, losses, passes): read before the processes part, which then share them."""
    losses, passes = read_scores(cfg.losses, "loss"), read_scores(cfg.passes, "passes")
    return read_benchmarks(test_rows(cfg.benchmarks)), losses, passes


# ---- rules: what is wrong with a row, or None


def conclusion(response: str) -> str:
    """What stands after the last </think>."""
    return response.rpartition("</think>")[2]


def malformed(row: dict) -> str | None:
    """Text is missing, holds markup of the chat, or a column has a type that data.py refuses."""
    texts = [row["prompt"], *([row["response"]] if "response" in row else [])]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        return "prompt or response is not a text"
    if found := MARKUP.search("\n".join(texts)):
        return found[0]
    images, choices, precision = (row.get(name) for name in ("images", "choices", "precision"))
    for name, value, kind in (("images", images, str), ("choices", choices, str | int | float)):
        if value is not None and not (
            isinstance(value, list) and all(isinstance(item, kind) for item in value)
        ):
            return f"{name} is {value!r:.80}"
    if choices == [] or (precision is not None and type(precision) not in (int, float)):
        return f"choices {choices!r}, precision {precision!r:.80}"
    if type(row.get("answer", "")) not in (str, int, float):
        return f"answer is {row['answer']!r:.80}"
    markers, images = row["prompt"].count("<image>"), len(images or [])
    return f"{markers} markers for {images} pictures" if markers not in (0, images) else None


def mojibake(row: dict) -> str | None:
    """Characters that were decoded wrongly: the model would learn to write them."""
    found = MOJIBAKE.search(row["prompt"]) or MOJIBAKE.search(row.get("response", ""))
    return repr(found.string[max(0, found.start() - 10) : found.end() + 10]) if found else None


def degenerate_length(row: dict) -> str | None:
    """A prompt of one word without a picture, a thought of a few words, more than fits a pack."""
    prompt, response = row["prompt"], row.get("response")
    if len(prompt) > MAX_PROMPT or (not row.get("images") and len(prompt.split()) < 2):
        return f"prompt of {len(prompt)} characters"
    if response is None or MIN_THOUGHT <= len(response) <= MAX_RESPONSE:
        return None
    return f"response of {len(response)} characters"


def bad_thought(row: dict) -> str | None:
    """Not exactly one <think>...</think>, at the start, with a thought in it."""
    response = row["response"].lstrip()
    opened, closed = response.count("<think>"), response.count("</think>")
    if (opened, closed) != (1, 1) or not response.startswith("<think>"):
        where = "" if response.startswith("<think>") else ", not at the start"
        return f"{opened} <think>, {closed} </think>{where}"
    thought = len(response) - len("<think></think>") - len(conclusion(response))
    return None if thought >= MIN_THOUGHT else f"thought of {thought} characters"


def no_box(row: dict) -> str | None:
    r"""No closed \boxed{} after the thought: nothing that stage 2 could reward."""
    status, box = extract(conclusion(row["response"]))
    return status or (None if box.strip() else "empty box")


def refusal(row: dict) -> str | None:
    """The response declines, or says that it sees no picture."""
    found = REFUSAL.search(row["response"])
    return found[0] if found else None


def truncated(row: dict) -> str | None:
    """The response stops in the middle of a sentence, a formula or a code block."""
    end = conclusion(row["response"]).rstrip()
    opened = len(OPEN.findall(end)) - len(CLOSE.findall(end))
    if end.count("```") % 2 or end.count("$$") % 2 or opened > 0:
        return "an open block"
    return repr(end[-20:]) if CUT.search(end) else None


def repetition(row: dict) -> str | None:
    """The response goes round in a loop, as a whole or at its end."""
    response = row["response"]
    for part in (response, response[-LOOP_TAIL:]):
        plain = part.encode()
        ratio = len(zlib.compress(plain, 1)) / len(plain)
        if len(plain) >= 1000 and ratio < LOOP_ZLIB:
            return f"zlib {ratio:.2f}"
    grams = runs(response.split(), LOOP_WORDS)
    share = 1 - len(np.unique(grams)) / len(grams) if len(grams) >= 100 else 0.0
    return f"{share:.2f} of runs of {LOOP_WORDS} words" if share > LOOP_SHARE else None


def mixed_script(row: dict) -> str | None:
    """The response falls into a script in which the question is not written."""
    if row["response"].isascii():
        return None
    for name, pattern in SCRIPTS.items():
        found = pattern.search(row["response"])
        if found and not pattern.search(row["prompt"]):
            return f"{name}: {found[0]}"
    return None


def proof(row: dict) -> str | None:
    """The problem asks for a proof and for nothing else: no box holds one."""
    found = PROOF.search(row["prompt"])
    return found[0] if found and not ASKS.search(row["prompt"]) else None


def unjudgeable(row: dict) -> str | None:
    """The matcher would not even accept the gold as an answer to itself, or the gold is prose."""
    gold, choices = str(row.get("answer", "")).strip(), row.get("choices")
    if not gold or NO_GOLD.fullmatch(gold):
        return f"gold {gold!r}"
    words = len(re.findall(r"(?<![\\A-Za-z])[A-Za-z]{3,}", gold))
    if len(gold) > MAX_GOLD[0] or (words > MAX_GOLD[1] and not choices):
        return f"gold of {len(gold)} characters, {words} words"
    options = {"choices": choices, "precision": row.get("precision")}
    verdict = grade(gold, f"\\boxed{{{gold}}}", **options)
    return None if verdict.score == 1 else f"gold {gold!r}: {verdict.status}"


def leak(row: dict) -> str | None:
    """The prompt gives the reference away: "Answer: 42". That 42 occurs in it is no leak."""
    if not GIVEN.search(row["prompt"]):
        return None
    gold = r"\s*".join(map(re.escape, str(row["answer"]).replace(" ", "").strip("$.")))
    # not "Answer: 32.5", "Answer: yes or no", "if the answer is 32, then"
    end = r"[\s$*)}\]]*(?:\.(?!\d)|\n|$)"
    found = re.search(GIVEN.pattern + r"[\s$*({\[]*" + gold + end, row["prompt"], re.I)
    return repr(found[0]) if found else None


def wrong_box(row: dict) -> str | None:
    """The box does not hold the reference: the response, or the reference, is wrong."""
    options = {"choices": row.get("choices"), "precision": row.get("precision")}
    verdict = grade(str(row["answer"]), conclusion(row["response"]), **options)
    return None if verdict.score == 1 else f"box {verdict.answer!r:.80}, gold {row['answer']!r:.80}"


def lost_picture(row: dict) -> str | None:
    """A picture is missing or cannot be read. (Looked at last: it costs the most.)"""
    for name in row.get("images") or []:
        try:
            fingerprint(str(Path(row["folder"], name)))
        except DAMAGED as error:
            return f"{name}: {error}"
    return None


RULES = {  # rule: columns without which it is not asked. The first that applies is the reason
    malformed: (),
    mojibake: (),
    degenerate_length: (),
    bad_thought: ("response",),
    no_box: ("response",),
    refusal: ("response",),
    truncated: ("response",),
    mixed_script: ("response",),
    proof: ("answer",),
    unjudgeable: ("answer",),
    leak: ("answer",),
    wrong_box: ("response", "answer"),
    repetition: ("response",),
    lost_picture: ("images",),
}


def judge(row: dict) -> tuple[int, str]:
    """(number of the first rule that applies, counted from 1, and its detail), or (0, "")."""
    for number, (rule, needs) in enumerate(RULES.items(), 1):
        if all(row.get(column) is not None for column in needs) and (detail := rule(row)):
            return number, detail
    return 0, ""


# ---- first pass: what is known of a row alone

FACT = np.dtype(
    [
        ("id", "u8"),  # hash of (seed, id)
        ("text", "u8"),  # hash of all words and pictures
        ("bands", "u4", (BANDS,)),
        ("sketch", "u8", (PERMUTATIONS * 2 // 64,)),
        ("stratum", "u4"),
        ("loss", "f4"),  # nats a token; NaN: could not be scored, infinite: was not asked
        ("passes", "f4"),  # of the samples; as above
        ("rule", "u1"),  # that drops it, from 1
        ("tested", "?"),  # stands in a benchmark
    ]
)


class Look(NamedTuple):
    facts: np.ndarray  # (n,) FACT
    strata: list[tuple[str, str, str]]  # source, level, format: by the number in the facts
    dropped: list[dict]  # lines for .dropped.jsonl
    contaminated: list[dict]  # lines for .contaminated.jsonl


def look(cfg: Config, piece: tuple[str, int, int]) -> Look:
    tests, losses, passes = given(cfg)
    strata, dropped, hits = {}, [], []
    rows = [row for _, row in rows_of(Path(piece[0]), *piece[1:], cfg.needs)]
    facts = np.zeros(len(rows), FACT)
    for row, fact in zip(rows, facts, strict=True):
        if isinstance(row, Broken):
            fact["rule"], detail = UNREADABLE, row.detail
            stratum = (Path(piece[0]).name, "", "")
        else:
            fact["rule"], detail = judge(without_response(row) if cfg.kind == "rl" else row)
            fact["id"] = digest(str(cfg.seed), str(row["id"]))
            fact["loss"], fact["passes"] = losses.of(str(row["id"])), passes.of(str(row["id"]))
            stratum = stratum_of(row, float(fact["passes"]) / max(1, passes.samples))
        fact["stratum"] = strata.setdefault(stratum, len(strata))
        if fact["rule"]:
            row_id = row.id if isinstance(row, Broken) else row["id"]
            reason = REASONS[fact["rule"]][1]
            dropped.append({"id": row_id, "step": "rules", "reason": reason, "detail": detail})
            continue
        compare_by(row, fact)
        for test, score, kind in contaminations(row, tests):
            fact["tested"] = True
            hits.append({"id": row["id"], "benchmark_id": test, "score": score, "kind": kind})
    return Look(facts, list(strata), dropped, hits)


def without_response(row: dict) -> dict:
    """A problem of RL may come with the trace it was taken from."""
    return {name: value for name, value in row.items() if name != "response"}


def stratum_of(row: dict, rate: float) -> tuple[str, str, str]:
    """(source, level, format). A set that tells no level: by the pass rate, where it is known."""
    level = row.get("level")
    if level is None and 0 <= rate <= 1:
        level = next(name for bound, name in DIFFICULTY if rate <= bound)
    names = str(row["source"]), "" if level is None else str(level), answer_format(row)
    return tuple(name.encode(errors="replace").decode() for name in names)


def answer_format(row: dict) -> str:
    """choice, number, expression or words; "" for a trace that comes without its reference."""
    answer = str(row.get("answer", ""))
    if row.get("choices") or not answer:
        return "choice" if answer else ""
    if NUMBER.fullmatch(answer):
        return "number"
    return (
        "words" if re.fullmatch(r"[^\W\d_]{3,}(?:[\s,-]+[^\W\d_]+)*\.?", answer) else "expression"
    )


def compare_by(row: dict, fact: np.void) -> None:
    """Writes down what finds the duplicates of a row."""
    tokens = words(row["prompt"])
    names = [str(Path(row["folder"], name)) for name in row.get("images") or []]
    pictures = [fingerprint(name).sha256 for name in names]
    signed, same = signature(tokens), identity(tokens, pictures, str(row.get("answer", "")))
    bands = signed.reshape(BANDS, -1)
    keys = (bands * ODD[: bands.shape[1]]).sum(axis=1, dtype=np.uint64) ^ np.uint64(same)
    fact["text"] = digest(" ".join(tokens), *pictures)
    fact["bands"], fact["sketch"] = mixed(keys) >> np.uint64(32), sketch(signed)


def survey(cfg: Config) -> Iterator[Look]:
    """look() at all pieces in their order. Workers are given places in files and not rows, for a
    pool reads ahead without end."""
    sizes = {path: os.path.getsize(path) for path in cfg.rows}
    pieces = [(path, at, at + CHUNK) for path, n in sizes.items() for at in range(0, n, CHUNK)]
    given(cfg)
    with Pool(cfg.workers) if cfg.workers > 1 else nullcontext() as pool:
        found = pool.imap(partial(look, cfg), pieces) if pool else map(partial(look, cfg), pieces)
        yield from progress(found, "looking at rows", total=len(pieces))


# ---- decisions

REASONS = (  # (step, reason, why); a row that stays has number 0
    ("", "kept", ""),
    *(("rules", rule.__name__, rule.__doc__.split("\n")[0]) for rule in RULES),
    ("rules", "unreadable", "The line is no JSON, or lacks a column that every row needs."),
    ("duplicates", "repeated_id", "A row above has the same id."),
    ("duplicates", "same_words", "A row above asks the same, word for word."),
    ("duplicates", "near", "A row above asks the same, nearly word for word."),
    ("benchmarks", "contaminated", "It is a test question, by its words or its picture."),
    ("loss", "loss_high", "Far less likely than others of its source: damaged, or no language."),
    ("loss", "loss_low", "Far more likely than others of its source: boilerplate, or a loop."),
    ("loss", "not_scored", "The language model could not score it; score.py says why."),
    ("passes", "never_solved", "No try was right: no gradient, or a wrong reference."),
    ("passes", "always_solved", "Every try was right: no gradient."),
    ("passes", "not_tried", "It could not be tried; score.py says why."),
    ("sample", "not_chosen", "The draw took others."),
)
STEPS = ("rules", "duplicates", "benchmarks", "loss", "passes", "sample")
NUMBERS = {reason: number for number, (_, reason, _) in enumerate(REASONS)}
UNREADABLE = NUMBERS["unreadable"]


def decide(facts: np.ndarray, sources: np.ndarray, cfg: Config) -> tuple[np.ndarray, np.ndarray]:
    """(number of the reason, row that it repeats) of each row. sources: a number a row. (N,)"""
    reason, root = facts["rule"].copy(), np.arange(len(facts))
    alive = np.flatnonzero(reason == 0)
    _, first, group = np.unique(facts["id"][alive], return_index=True, return_inverse=True)
    root[alive] = alive[first[group]]
    reason[root != np.arange(len(facts))] = NUMBERS["repeated_id"]

    alive = np.flatnonzero(reason == 0)
    root[alive] = alive[repeats(facts[alive])]
    again = alive[root[alive] != alive]
    same = facts["text"][again] == facts["text"][root[again]]
    reason[again] = np.where(same, NUMBERS["same_words"], NUMBERS["near"])

    reason[(reason == 0) & facts["tested"]] = NUMBERS["contaminated"]
    if cfg.losses:
        alive = asked(facts["loss"], reason, cfg.losses)
        losses, of = facts["loss"][alive], sources[alive]
        for source, (low, high) in loss_bounds(losses, of, cfg.loss_z).items():
            drop(reason, alive, (of == source) & (losses > high), "loss_high")
            drop(reason, alive, (of == source) & (losses < low), "loss_low")
        drop(reason, alive, np.isnan(losses), "not_scored")
    if cfg.passes:
        alive = asked(facts["passes"], reason, cfg.passes)
        drop(reason, alive, facts["passes"][alive] == 0, "never_solved")
        drop(reason, alive, facts["passes"][alive] == given(cfg)[2].samples, "always_solved")
        drop(reason, alive, np.isnan(facts["passes"][alive]), "not_tried")

    alive = np.flatnonzero(reason == 0)
    uniform = ((facts["id"][alive] >> np.uint64(11)) + 0.5) / 2**53
    places = chosen(uniform, facts["stratum"][alive], cfg.alpha, cfg.count)
    reason[np.delete(alive, places)] = NUMBERS["not_chosen"]
    return reason, root


def drop(reason: np.ndarray, alive: np.ndarray, which: np.ndarray, why: str) -> None:
    reason[alive[which]] = NUMBERS[why]


def asked(scores: np.ndarray, reason: np.ndarray, files: tuple[str, ...]) -> np.ndarray:
    """The places of the rows that are left; all of them must be in the files of scores."""
    alive = np.flatnonzero(reason == 0)
    if missing := np.isinf(scores[alive]).sum():
        raise ValueError(
            f"{missing:,} of the {len(alive):,} rows that are left have no score in "
            f"{' '.join(files)}: curate without it, give the result to score.py, and come back"
        )
    return alive


def loss_bounds(losses: np.ndarray, sources: np.ndarray, z: float) -> dict[int, tuple]:
    """{source: (lowest, highest) normal loss}: median -+ z 1.4826 MAD of the source. (N,), (N,)

    Median and MAD do not move with the rows that they are to find; 1.4826 MAD is the standard
    deviation of a normal distribution. A source of few rows is judged by all.
    """
    found = {}
    for source in np.unique(sources).tolist():
        of = losses[sources == source]
        found[source] = bounds(of if np.isfinite(of).sum() >= FEW else losses, z)
    return found


def bounds(losses: np.ndarray, z: float) -> tuple[float, float]:
    losses = losses[np.isfinite(losses)].astype(np.float64)
    if not len(losses):
        return -np.inf, np.inf
    median = np.median(losses)
    spread = max(1.4826 * np.median(np.abs(losses - median)), LEAST_SPREAD)
    return median - z * spread, median + z * spread


def sampling_keys(uniform: np.ndarray, strata: np.ndarray, alpha: float) -> np.ndarray:
    """-log(u) / w with w = n^-alpha, n rows in the stratum: the smallest keys are the sample.

    Efraimidis, Spirakis 2006 (algorithm A, by logarithms): a weighted draw without replacement in
    one pass. u is a hash of (seed, id), so a row's luck hangs on no other row. (N,), (N,) -> (N,)
    """
    _, group, sizes = np.unique(strata, return_inverse=True, return_counts=True)
    return -np.log(uniform) * sizes[group].astype(float) ** alpha


def chosen(uniform: np.ndarray, strata: np.ndarray, alpha: float, count: int) -> np.ndarray:
    """The places of `count` rows, in the order of the rows."""
    keys = sampling_keys(uniform, strata, alpha)
    return np.sort(np.argsort(keys, kind="stable")[: count or None])


# ---- second pass


def copy_rows(cfg: Config, reason: np.ndarray, root: np.ndarray, out, dropped) -> None:
    """Writes the rows that stay, pictures relative to the new file, and why the others do not."""
    target = os.path.abspath(Path(cfg.out).parent)
    firsts = dict.fromkeys(root[root != np.arange(len(root))].tolist())  # rows to be named
    files = ((Path(path), os.path.getsize(path)) for path in cfg.rows)
    lines = (pair for path, size in files for pair in rows_of(path, 0, size, cfg.needs))
    for i, (line, row) in enumerate(progress(lines, "copying rows", total=len(reason))):
        step, why, _ = REASONS[reason[i]]
        if i in firsts:
            firsts[i] = row["id"]
        if not step:
            folder = os.path.abspath(row.pop("folder"))
            if row.get("images") and folder != target:
                places = [os.path.relpath(os.path.join(folder, n), target) for n in row["images"]]
                line = json.dumps(row | {"images": places}).encode()
            out.write(line.rstrip(b"\r\n") + b"\n")
        elif step != "rules":  # those were written with their detail in the first pass
            detail = f"as {firsts[root[i]]}" if step == "duplicates" else ""
            write(dropped, [{"id": row["id"], "step": step, "reason": why, "detail": detail}])


def write(file, lines: Iterable[dict]) -> None:
    file.write("".join(json.dumps(line) + "\n" for line in lines).encode())


# ---- report


def count(reason: np.ndarray, stratum: np.ndarray, labels: list[tuple]) -> dict:
    """{step: {source: {"in", "kept", "reasons"}}}"""
    counts = defaultdict(Counter)  # source -> number of a reason -> rows
    pairs, rows = np.unique(np.stack([stratum, reason]), axis=1, return_counts=True)
    for s, r, n in zip(*pairs.tolist(), rows.tolist(), strict=True):
        counts[labels[s][0]][r] += n
    table = {step: {} for step in STEPS}
    for source, of in counts.items():
        left = of.total()
        for step in STEPS:
            reasons = {REASONS[r][1]: n for r, n in of.items() if REASONS[r][0] == step}
            kept = left - sum(reasons.values())
            table[step][source] = {"in": left, "kept": kept, "reasons": reasons}
            left = kept
    return table


def strata_of(reason: np.ndarray, stratum: np.ndarray, labels: list[tuple]) -> dict:
    """{"source / level / format": {"in", "kept"}}: rows before and after the draw."""
    before = np.bincount(stratum[(reason == 0) | (reason == NUMBERS["not_chosen"])], minlength=1)
    after = np.bincount(stratum[reason == 0], minlength=len(before))
    named = [" / ".join(filter(None, label)) for label in labels]
    pairs = zip(named, before.tolist(), after.tolist(), strict=False)
    return {label: {"in": n, "kept": k} for label, n, k in pairs if n}


def scores_of(facts, reason, sources: np.ndarray, names: list[str], cfg: Config) -> dict:
    """Of the rows that came to the step: what loss is normal, how many are solved how often.

    {"losses": {source: [lowest, highest]}, "passes": {source: [rows solved 0, 1, ... times]}}
    """
    step = np.array([STEPS.index(s) if s else len(STEPS) for s, _, _ in REASONS])[reason]
    losses, passes = (step >= STEPS.index(name) for name in ("loss", "passes"))
    found = {"losses": {}, "passes": {}}
    if cfg.losses:
        bounds = loss_bounds(facts["loss"][losses], sources[losses], cfg.loss_z)
        found["losses"] = {names[source]: [*pair] for source, pair in bounds.items()}
    for source in np.unique(sources[passes]).tolist() if cfg.passes else ():
        solved = facts["passes"][passes & (sources == source)]
        solved = solved[np.isfinite(solved)].astype(int)
        tries = np.bincount(solved, minlength=given(cfg)[2].samples + 1)
        found["passes"][names[source]] = tries.tolist()
    return found


def show(steps: dict, strata: dict) -> None:
    """Rows after each step, why rows went, and the strata before and after the draw."""
    print(f"{'source':30}{'rows':>10}" + "".join(f"{step:>12}" for step in STEPS))
    for source, first in steps["rules"].items():
        after = "".join(f"{steps[step][source]['kept']:>12,}" for step in STEPS)
        print(f"{source:30.30}{first['in']:>10,}{after}")
    why = {reason: text for _, reason, text in REASONS}
    for step in STEPS:
        total = sum((Counter(of["reasons"]) for of in steps[step].values()), Counter())
        for reason, n in total.most_common():
            print(f"{n:>10,}  {step}: {reason.replace('_', ' ')}. {why[reason]}")
    sums = [max(1, sum(of[x] for of in strata.values())) for x in ("in", "kept")]
    for label, of in sorted(strata.items(), key=lambda item: -item[1]["in"])[:40]:
        shares = [of[x] / total for x, total in zip(("in", "kept"), sums, strict=True)]
        print(
            f"{label:40.40}{of['in']:>10,}{shares[0]:>8.1%} -> {of['kept']:>10,}{shares[1]:>8.1%}"
        )


def main(cfg: Config) -> dict:
    out = Path(cfg.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    facts, strata, part = [np.empty(0, FACT)], {}, beside(out, "part")
    with (
        part.open("wb") as rows,
        beside(out, "dropped.jsonl").open("wb") as dropped,
        beside(out, "contaminated.jsonl").open("wb") as contaminated,
    ):
        for found in survey(cfg):
            numbers = [strata.setdefault(label, len(strata)) for label in found.strata]
            found.facts["stratum"] = np.array(numbers, np.uint32)[found.facts["stratum"]]
            facts.append(found.facts)
            write(dropped, found.dropped)
            write(contaminated, found.contaminated)
        facts, labels = np.concatenate(facts), list(strata)
        names = list(dict.fromkeys(label[0] for label in labels))
        sources = np.array([names.index(label[0]) for label in labels], int)[facts["stratum"]]
        reason, root = decide(facts, sources, cfg)
        copy_rows(cfg, reason, root, rows, dropped)
    part.replace(out)  # complete: nobody trains on half a file
    steps = count(reason, facts["stratum"], labels)
    strata = strata_of(reason, facts["stratum"], labels)
    why = {reason: text for _, reason, text in REASONS if text}
    scores = scores_of(facts, reason, sources, names, cfg)
    inputs = (*cfg.rows, *cfg.benchmarks, *cfg.losses, *cfg.passes)
    write_report(out, cfg, inputs, steps, strata=strata, why=why, **scores)
    show(steps, strata)
    if not (reason == 0).any():
        sys.exit(f"{out}: no row stays of {len(facts):,}; the table above says why")
    return {"steps": steps, "strata": strata}


if __name__ == "__main__":
    run_main(main, Config)
