r"""Rows of many sets become the file that a stage trains on.

    a.jsonl, b.jsonl ─rules─▶ ─benchmarks─▶ ─duplicates─▶ ─loss─▶ ─passes─▶ ─sample─▶ sft.jsonl
                        └──────────┴─────────────┴──────────┴────────┴─────────┴─▶ sft.dropped.jsonl

The paper (OVR, sec. 3.3) names the steps and gives no thresholds: all constants here are ours.

rules       what cannot teach or cannot be graded. Better keep a doubtful row than lose an honest
            one: tests/test_curate.py has what the patterns must not hit beside what they must
benchmarks  problems that are test questions, by their words or pictures (alike.py)
duplicates  the same problem again, nearly word for word; the first row stays (alike.py)
loss        under a small language model (score.py): further from the median of the row's source
            than 5 robust standard deviations, up (damage, no language) or down (boilerplate)
passes      problems that the cold-start model (score.py) solves never, or always: no gradient
sample      `count` rows without replacement; a row of a stratum (source, level, format of answer,
            difficulty by passes) of n rows weighs n^-alpha: 0 keeps proportions, 1 makes them equal

Rows are read twice and never held: the first pass, over all workers, looks at each row alone and
keeps 164 bytes of it (328 MB for 2 M rows); the decisions are made on these; the second pass copies
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
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import Pool
from pathlib import Path
from typing import Literal

import numpy as np

from common.log import beside, progress, run_main, write_report
from curation import alike
from reward import Verdict, extract, grade

CHUNK = 4 << 20  # bytes of a file that a worker takes at a time
FEW = 30  # rows of a source below which its losses are judged by those of all sources
LEAST_SPREAD = 0.02  # nats a token: where all losses are alike, none is abnormal
DIFFICULTIES = ("hard", "medium", "easy")  # of up to a third of the tries passed, two thirds, all
WORDS = re.compile(r"[^\W\d_]{3,}(?:[\s,-]+[^\W\d_]+)*\.?")
NUMBER = re.compile(r"[\s$]*[-+]?[\d.,]+(?:/\d+)?\s*(?:%|\\%|°|\^\\circ)?[\s$.]*")

# of the rules
MIN_THOUGHT = 100  # characters: a thought of less than some 20 words teaches to skip it
MAX_RESPONSE = 4 * 65_536  # characters; mathematics has 2 to 4 a token: surely over 64k tokens
MAX_PROMPT = 20_000  # characters; longer ones are documents, not questions
MAX_GOLD = (200, 10)  # characters, words: longer golds are sentences that no reply matches
LOOP_ZLIB = 0.1  # compressed / plain size; of real replies 0.16 to 0.6, of a table of cases 0.2
LOOP_TAIL = 4_000  # characters at the end looked at alone: a long response ends in a loop

MARKUP = re.compile(r"<\|[a-z_]+\|>")  # of the chat; data.py refuses rows that hold it
MOJIBAKE = re.compile(
    "[\ufffd\x80-\x9f\ud800-\udfff]"  # the replacement character, control codes, half a character
    "|â€|âˆ|ï»¿|ï¿½|Ï€|Î[±-»]|[ÃÂ][\xa0-\xaa\xac-\xba\xbc-\xbf]"  # UTF-8 as Latin-1, not «MAÇÃ»
)
FOREIGN = re.compile(  # runs, for one letter is a symbol: the group Ш, the power set of ℵ
    "[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]{2}|[\u0400-\u06ff\u0900-\u0eff]{3}"
)
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

REASONS = {  # why a row goes: (step, what it means)
    "unreadable": ("rules", "The line is no JSON, or lacks a column that every row needs."),
    "malformed": ("rules", "Text is missing, chat markup is in it, or a column has a wrong type."),
    "mojibake": ("rules", "Characters were decoded wrongly: the model would learn to write them."),
    "degenerate_length": ("rules", "A prompt of one word or a document, more than fits a pack."),
    "bad_thought": ("rules", "Not exactly one <think>...</think>, at the start, with a thought."),
    "no_box": ("rules", "No closed \\boxed{} after the thought: nothing that could be rewarded."),
    "refusal": ("rules", "The response declines, or says that it sees no picture."),
    "truncated": ("rules", "The response stops within a sentence, a formula or a code block."),
    "mixed_script": ("rules", "The response falls into a script that the question is not in."),
    "repetition": ("rules", "The response goes round in a loop, as a whole or at its end."),
    "proof": ("rules", "The problem asks for a proof and nothing else: no box holds one."),
    "unjudgeable": ("rules", "The matcher rejects the gold as its own answer, or it is prose."),
    "leak": ("rules", 'The prompt gives the reference away, as in "Answer: 42".'),
    "wrong_box": ("rules", "The box does not hold the reference: one of the two is wrong."),
    "lost_picture": ("rules", "A picture is missing or cannot be read."),
    "contaminated": ("benchmarks", "It is a test question, by its words or its picture."),
    "repeated_id": ("duplicates", "A row above has the same id."),
    "same_words": ("duplicates", "A row above asks the same, word for word."),
    "near": ("duplicates", "A row above asks the same, nearly word for word."),
    "loss_high": ("loss", "Far less likely than others of its source: damage, no language."),
    "loss_low": ("loss", "Far more likely than others of its source: boilerplate, a loop."),
    "not_scored": ("loss", "The language model could not score it; score.py says why."),
    "never_solved": ("passes", "No try was right: no gradient, or a wrong reference."),
    "always_solved": ("passes", "Every try was right: no gradient."),
    "not_tried": ("passes", "It could not be tried; score.py says why."),
    "not_chosen": ("sample", "The draw took others."),
}
STEPS = ("rules", "benchmarks", "duplicates", "loss", "passes", "sample")
FIRST_PASS = ("rules", "benchmarks")  # look at each row alone


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
        for path in (*self.rows, *self.benchmarks, *self.losses, *self.passes):
            if not Path(path).is_file():
                raise FileNotFoundError(f"{path}: no such file in {Path.cwd()}")
            if Path(path).resolve() == Path(self.out).resolve():
                raise ValueError(f"--out {self.out} is one of the inputs and would be overwritten")
        if self.count < 0 or self.alpha < 0 or self.workers < 1 or self.loss_z <= 0:
            raise ValueError("count, alpha: not negative; loss_z: positive; workers: at least 1")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("id", "source", "prompt", "response" if self.kind == "sft" else "answer")


# ---- reading


def rows_of(
    path: str, needs: tuple[str, ...] = ("id",), start: int = 0, end: int = sys.maxsize
) -> Iterator[tuple[bytes, dict]]:
    """(line, row) of the lines that begin in [start, end) of the file.

    row["folder"] is ours. A line that is no row counts as one all the same: under the name of its
    place, with what is wrong as row["unreadable"], which is empty in all others.
    """
    folder, name = os.path.split(path)
    with open(path, "rb") as file:
        file.seek(max(0, start - 1))
        if start:
            file.readline()  # the rest of a line that began before
        while (at := file.tell()) < end and (line := file.readline()):
            if line.strip():
                try:
                    row, fault = read_row(line, needs), ""
                except (ValueError, RecursionError) as error:
                    row, fault = {"id": f"{name}, byte {at}", "source": name}, str(error)
                yield line, row | {"folder": folder, "unreadable": fault}


def read_row(line: bytes, needs: tuple[str, ...]) -> dict:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"not a row: {row!r:.80}")
    for column in needs:
        value = row.get(column)
        if not isinstance(value, str | int | float) or not str(value).strip():
            raise ValueError(f"{column} is {value!r:.80}; the row has {[*row]}"[:300])
    return row


@cache
def benchmarks_of(files: tuple[str, ...]) -> alike.Benchmarks:
    """Items of benchmarks.py, or of files that say "question", "image". A broken one stops the run:
    what it tests would be missed in silence."""
    tests = []
    for path in files:
        for _, row in rows_of(path):
            prompt = row.get("question") or row.get("prompt")  # the one without what all are told
            if not isinstance(prompt, str):
                fault = row["unreadable"] or f"no prompt; the row has {[*row]}"
                raise ValueError(f"benchmark {path}, {row['id']}: {fault}")
            images = row.get("images") or ([row["image"]] if row.get("image") else [])
            tests.append(row | {"prompt": prompt, "images": images})
    return alike.read_benchmarks(tests)


# ---- rules


def faults(row: dict) -> Iterator[tuple[str, str]]:
    """(reason, detail) of all that is wrong with a row, what costs little to find first."""
    if row.get("unreadable"):
        yield "unreadable", row["unreadable"]
    for rule in (malformed, mojibake):
        if detail := rule(row):
            yield rule.__name__, detail
    size = len(row["prompt"])
    if size > MAX_PROMPT or (not row.get("images") and len(row["prompt"].split()) < 2):
        yield "degenerate_length", f"prompt of {size} characters"
    if row.get("response") is not None:
        yield from response_faults(row["prompt"], row["response"].strip())
    if row.get("answer") is not None:
        yield from answer_faults(row)
    for name in row.get("images") or []:
        try:
            alike.fingerprint(str(Path(row["folder"], name)))
        except alike.DAMAGED as error:
            yield "lost_picture", f"{name}: {error}"


def malformed(row: dict) -> str | None:
    """Text is missing, holds markup of the chat, or a column has a type that data.py refuses."""
    texts = [row["prompt"], *([row["response"]] if "response" in row else [])]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        return "prompt or response is not a text"
    if found := MARKUP.search("\n".join(texts)):
        return found[0]
    images, choices = row.get("images") or [], row.get("choices") or []
    for items, kind in ((images, str), (choices, str | int | float)):
        if not isinstance(items, list) or not all(isinstance(item, kind) for item in items):
            return f"images or choices are {items!r:.80}"
    for name, kinds in (("answer", (str, int, float)), ("precision", (int, float))):
        if row.get(name) is not None and type(row[name]) not in kinds:
            return f"{name} is {row[name]!r:.80}"
    markers, pictures = row["prompt"].count("<image>"), len(images)
    return f"{markers} markers for {pictures} pictures" if markers not in (0, pictures) else None


def mojibake(row: dict) -> str | None:
    found = MOJIBAKE.search(row["prompt"]) or MOJIBAKE.search(row.get("response", ""))
    return repr(found.string[max(0, found.start() - 10) : found.end() + 10]) if found else None


def conclusion(response: str) -> str:
    return response.rpartition("</think>")[2]


def response_faults(prompt: str, response: str) -> Iterator[tuple[str, str]]:
    end, markers = conclusion(response), re.findall("</?think>", response)
    thought = len(response) - len("<think></think>") - len(end)
    if len(response) > MAX_RESPONSE:
        yield "degenerate_length", f"response of {len(response)} characters"
    if markers != ["<think>", "</think>"] or not response.startswith("<think>"):
        yield "bad_thought", f"it begins {response[:20]!r} and has {markers[:9]}"
    if thought < MIN_THOUGHT:
        yield "bad_thought", f"thought of {thought} characters"
    status, box = extract(end)
    if status or not box.strip():
        yield "no_box", status or "empty box"
    if found := REFUSAL.search(response):
        yield "refusal", found[0]
    formulas = end.replace(r"\\", "")  # \\[4pt] is a new line
    if end.count("```") % 2 or end.count("$$") % 2 or formulas.count(r"\[") > formulas.count(r"\]"):
        yield "truncated", "an open block"
    if CUT.search(end):
        yield "truncated", repr(end[-20:])
    if (found := FOREIGN.search(response)) and not FOREIGN.search(prompt):
        yield "mixed_script", found[0]
    for part in (response.encode(), response[-LOOP_TAIL:].encode()):
        ratio = len(zlib.compress(part, 1)) / len(part)
        if len(part) >= 1000 and ratio < LOOP_ZLIB:
            yield "repetition", f"zlib {ratio:.2f}"


def answer_faults(row: dict) -> Iterator[tuple[str, str]]:
    prompt, gold = row["prompt"], str(row["answer"])
    if (found := PROOF.search(prompt)) and not ASKS.search(prompt):
        yield "proof", found[0]
    if detail := unjudgeable(row):
        yield "unjudgeable", detail
    if GIVEN.search(prompt) and (detail := leak(prompt, gold)):
        yield "leak", detail
    if row.get("response") is not None:
        box = verdict(row, conclusion(row["response"]))
        if box.score != 1:
            yield "wrong_box", f"box {box.answer!r:.80}, gold {gold!r:.80}"


def verdict(row: dict, response: str) -> Verdict:
    options = {"choices": row.get("choices"), "precision": row.get("precision")}
    return grade(str(row["answer"]), response, **options)


def unjudgeable(row: dict) -> str | None:
    gold = str(row["answer"]).strip()
    if not gold or NO_GOLD.fullmatch(gold):
        return f"gold {gold!r}"
    words = len(re.findall(r"(?<![\\A-Za-z])[A-Za-z]{3,}", gold))
    if len(gold) > MAX_GOLD[0] or (words > MAX_GOLD[1] and not row.get("choices")):
        return f"gold of {len(gold)} characters, {words} words"
    itself = verdict(row, f"\\boxed{{{gold}}}")
    return None if itself.score == 1 else f"gold {gold!r}: {itself.status}"


def leak(prompt: str, gold: str) -> str | None:
    """That 42 occurs in the prompt is no leak, nor is "Answer: 42.5", "Answer: yes or no", or "if
    the answer is 42, then"."""
    spaced = r"\s*".join(map(re.escape, gold.replace(" ", "").strip("$.")))
    end = r"[\s$*)}\]]*(?:\.(?!\d)|\n|$)"
    found = re.search(GIVEN.pattern + r"[\s$*({\[]*" + spaced + end, prompt, re.I)
    return repr(found[0]) if found else None


# ---- first pass: what is known of a row alone

FACT = np.dtype(
    [
        ("id", "u8"),  # hash of (seed, id): is also its luck in the draw
        ("text", "u8"),  # hash of all words and pictures
        ("identity", "u8"),  # hash of what near-duplicates have in common
        ("signature", "u1", (alike.PERMUTATIONS,)),
        ("stratum", "u4"),
    ]
)


def look(cfg: Config, piece: tuple) -> tuple[np.ndarray, list[str], list[tuple], list[dict]]:
    """(facts, reasons, strata, records for .contaminated.jsonl and .dropped.jsonl) of the rows in a
    piece: (path, start, end)."""
    path, *span = piece
    rows = [row for _, row in rows_of(path, cfg.needs, *span)]
    facts, reasons, records = np.zeros(len(rows), FACT), [], []
    for row, fact in zip(rows, facts, strict=True):
        if cfg.kind == "rl":
            row.pop("response", None)  # a problem may come with the trace it was taken from
        reason, detail = next(faults(row), ("", ""))
        hits = [] if reason else alike.contaminations(row, benchmarks_of(cfg.benchmarks))
        for test, score, kind in hits:
            reason, detail = "contaminated", f"as {test}"
            hit = {"benchmark_id": test, "score": score, "kind": kind}
            records.append({"id": row["id"]} | hit)
        if reason:
            records.append(drop_record(row, reason, detail))
        else:
            compare_by(row, fact)
        fact["id"] = alike.digest(str(cfg.seed), str(row["id"]))
        reasons.append(reason)
    return facts, reasons, [stratum_of(row) for row in rows], records


def drop_record(row: dict, reason: str, detail: str) -> dict:
    return {"id": row["id"], "step": REASONS[reason][0], "reason": reason, "detail": detail}


def stratum_of(row: dict) -> tuple[str, str, str]:
    """(source, level, format)"""
    level = "" if row.get("level") is None else row["level"]
    names = str(row["source"]), str(level), answer_format(row)
    return tuple(name.encode(errors="replace").decode() for name in names)


def answer_format(row: dict) -> str:
    """choice, number, expression or words; "" for a trace that comes without its reference."""
    answer = "" if row.get("answer") is None else str(row["answer"])
    if row.get("choices") or not answer:
        return "choice" if answer else ""
    if NUMBER.fullmatch(answer):
        return "number"
    return "words" if WORDS.fullmatch(answer) else "expression"


def compare_by(row: dict, fact: np.void) -> None:
    """Writes down what finds the duplicates of a row."""
    tokens = alike.words(row["prompt"])
    names = [str(Path(row["folder"], name)) for name in row.get("images") or []]
    pictures = [alike.fingerprint(name)[0] for name in names]
    fact["text"] = alike.digest(" ".join(tokens), *pictures)
    fact["identity"] = alike.identity(tokens, pictures, str(row.get("answer", "")))
    fact["signature"] = alike.signature(tokens)


def survey(cfg: Config, dropped, contaminated) -> tuple[np.ndarray, np.ndarray, list[tuple]]:
    """(facts of all rows, reasons, strata by their numbers); writes the records to the files.
    Workers are given places in files and not rows, for a pool reads ahead without end."""
    sizes = {path: os.path.getsize(path) for path in cfg.rows}
    pieces = [(path, at, at + CHUNK) for path, n in sizes.items() for at in range(0, n, CHUNK)]
    all_facts, all_reasons, numbers = [np.empty(0, FACT)], [], {}
    benchmarks_of(cfg.benchmarks)  # before the processes part, which then share it
    with Pool(cfg.workers) as pool:
        looks = pool.imap(partial(look, cfg), pieces)
        for facts, reasons, strata, records in progress(looks, "reading rows", total=len(pieces)):
            facts["stratum"] = [numbers.setdefault(stratum, len(numbers)) for stratum in strata]
            all_facts.append(facts)
            all_reasons += reasons
            for record in records:
                write(dropped if "step" in record else contaminated, record)
    return np.concatenate(all_facts), np.array(all_reasons, object), list(numbers)


def write(file, record: dict) -> None:
    file.write(json.dumps(record).encode() + b"\n")


# ---- decisions: `reason` of each row is why it goes, "" while it is left


def drop(reason: np.ndarray, which: np.ndarray, why: str) -> None:
    """Rows that went before keep their reason."""
    reason[(reason == "") & which] = why


def drop_repeats(reason: np.ndarray, facts: np.ndarray) -> np.ndarray:
    """The row that each repeats, or itself. (N,)"""
    rows = np.arange(len(facts))
    root = rows.copy()
    left = np.flatnonzero(reason == "")
    root[left] = left[alike.first_equal(facts["id"][left])]
    drop(reason, root != rows, "repeated_id")
    left = np.flatnonzero(reason == "")
    root[left] = left[alike.repeats(facts[left])]
    drop(reason, (root != rows) & (facts["text"] == facts["text"][root]), "same_words")
    drop(reason, root != rows, "near")
    return root


def scores_of(facts, reason: np.ndarray, column: str, cfg: Config) -> np.ndarray:
    """The loss of each row, or the share of its tries that passed; NaN where score.py could not
    tell it. Takes some 160 bytes a row while it reads. (N,)"""
    scores, files = {}, cfg.losses if column == "loss" else cfg.passes
    for path in files:
        for _, row in rows_of(path):
            if column not in row:
                raise ValueError(f"{path}: not a file of score.py with {column!r}: {row!r:.200}")
            score = np.nan if row[column] is None else row[column] / row.get("samples", 1)
            scores[alike.digest(str(cfg.seed), str(row["id"]))] = score
    scores = np.array([scores.get(key, np.inf) for key in facts["id"].tolist()])
    if missing := np.isinf(scores[reason == ""]).sum():
        raise ValueError(
            f"{missing:,} of the {(reason == '').sum():,} rows that are left have no score in "
            f"{' '.join(files)}: curate without it, give the result to score.py, and come back"
        )
    return scores


def drop_abnormal(reason: np.ndarray, losses: np.ndarray, sources: np.ndarray, z: float) -> dict:
    """Drops what lies outside median -+ z 1.4826 MAD of its source. -> {source: [low, high]}

    Median and MAD do not move with the rows that they are to find; 1.4826 MAD is the standard
    deviation of a normal distribution. A source of few rows is judged by all.
    """
    drop(reason, np.isnan(losses), "not_scored")
    left, limits = reason == "", {}
    for source in dict.fromkeys(sources[left].tolist()):
        of = left & (sources == source)
        normal = losses[of if of.sum() >= FEW else left]
        median = np.median(normal)
        spread = max(1.4826 * np.median(np.abs(normal - median)), LEAST_SPREAD)
        low, high = limits[source] = [median - z * spread, median + z * spread]
        drop(reason, of & (losses > high), "loss_high")
        drop(reason, of & (losses < low), "loss_low")
    return limits


def sample(reason: np.ndarray, facts: np.ndarray, cfg: Config) -> None:
    """Drops all but `count` rows (0: all); a row weighs w = n^-alpha, n rows left in its stratum.

    Efraimidis, Spirakis 2006 (algorithm A, by logarithms): a weighted draw without replacement in
    one pass takes the smallest -log(u) / w. u is a hash of (seed, id), so a row's luck hangs on no
    other row.
    """
    left = np.flatnonzero(reason == "")
    uniform = ((facts["id"][left] >> np.uint64(11)) + 0.5) / 2**53
    sizes = np.bincount(facts["stratum"][left])[facts["stratum"][left]]
    order = np.argsort(-np.log(uniform) * sizes**cfg.alpha, kind="stable")
    reason[left[order[cfg.count or len(left) :]]] = "not_chosen"


# ---- second pass


def copy_rows(cfg: Config, reason: np.ndarray, root: np.ndarray, out, dropped) -> None:
    """Writes the rows that stay, pictures relative to the new file, and why the others do not."""
    target = os.path.abspath(Path(cfg.out).parent)
    names = dict.fromkeys(root[root != np.arange(len(root))].tolist())  # of rows that come again
    lines = (pair for path in cfg.rows for pair in rows_of(path, cfg.needs))
    for i, (line, row) in enumerate(progress(lines, "copying rows", total=len(reason))):
        if i in names:
            names[i] = row["id"]
        if not reason[i]:
            folder = os.path.abspath(row["folder"])
            if row.get("images") and folder != target:
                places = [os.path.relpath(os.path.join(folder, n), target) for n in row["images"]]
                line = json.dumps(json.loads(line) | {"images": places}).encode()
            out.write(line.rstrip(b"\r\n") + b"\n")
        elif REASONS[reason[i]][0] not in FIRST_PASS:
            detail = f"as {names[root[i]]}" if root[i] != i else ""
            write(dropped, drop_record(row, reason[i], detail))


# ---- report


def count_steps(reason: np.ndarray, sources: np.ndarray) -> dict:
    """{step: {source: {"in", "kept", "reasons"}}}"""
    table = {step: {} for step in STEPS}
    for source in dict.fromkeys(sources.tolist()):
        counts = Counter(reason[sources == source].tolist())
        left = counts.total()
        for step in STEPS:
            reasons = {
                why: counts[why] for why in REASONS if REASONS[why][0] == step and counts[why]
            }
            kept = left - sum(reasons.values())
            table[step][source] = {"in": left, "kept": kept, "reasons": reasons}
            left = kept
    return table


def count_strata(reason: np.ndarray, stratum: np.ndarray, strata: list[tuple]) -> dict:
    """{"source / level / format": {"in", "kept"}}: rows before and after the draw."""
    after = Counter(stratum[reason == ""].tolist())
    before = after + Counter(stratum[reason == "not_chosen"].tolist())
    return {
        " / ".join(filter(None, strata[s])): {"in": n, "kept": after[s]}
        for s, n in before.most_common()
    }


def show(steps: dict, strata: dict) -> None:
    """Rows after each step, why rows went, and the largest strata before and after the draw."""
    print(f"{'source':30}{'rows':>10}" + "".join(f"{step:>12}" for step in STEPS))
    for source, first in steps["rules"].items():
        after = "".join(f"{steps[step][source]['kept']:>12,}" for step in STEPS)
        print(f"{source:30.30}{first['in']:>10,}{after}")
    for why, (step, meaning) in REASONS.items():
        if n := sum(of["reasons"].get(why, 0) for of in steps[step].values()):
            print(f"{n:>10,}  {step}: {why.replace('_', ' ')}. {meaning}")
    for stratum, of in [*strata.items()][:40]:
        print(f"{stratum:40.40}{of['in']:>10,} -> {of['kept']:>10,}")


def main(cfg: Config) -> dict:
    out = Path(cfg.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    part, limits = beside(out, "part"), {}
    with (
        part.open("wb") as kept,
        beside(out, "dropped.jsonl").open("wb") as dropped,
        beside(out, "contaminated.jsonl").open("wb") as contaminated,
    ):
        facts, reason, strata = survey(cfg, dropped, contaminated)
        sources = np.array([source for source, _, _ in strata], object)[facts["stratum"]]
        root = drop_repeats(reason, facts)
        if cfg.losses:
            losses = scores_of(facts, reason, "loss", cfg)
            limits = drop_abnormal(reason, losses, sources, cfg.loss_z)
        if cfg.passes:
            rates = scores_of(facts, reason, "passes", cfg)
            drop(reason, rates == 0, "never_solved")
            drop(reason, rates == 1, "always_solved")
            drop(reason, np.isnan(rates), "not_tried")
            facts["stratum"] = facts["stratum"] * 3 + np.digitize(rates, [1 / 3, 2 / 3], right=True)
            strata = [(*names, difficulty) for names in strata for difficulty in DIFFICULTIES]
        sample(reason, facts, cfg)
        copy_rows(cfg, reason, root, kept, dropped)
    part.replace(out)  # complete: nobody trains on half a file
    steps, strata = count_steps(reason, sources), count_strata(reason, facts["stratum"], strata)
    why = {reason: meaning for reason, (_, meaning) in REASONS.items()}
    inputs = (*cfg.rows, *cfg.benchmarks, *cfg.losses, *cfg.passes)
    write_report(out, cfg, inputs, steps, strata=strata, why=why, losses=limits)
    show(steps, strata)
    if not (reason == "").any():
        sys.exit(f"{out}: no row stays of {len(facts):,}; the table above says why")
    return {"steps": steps, "strata": strata}


if __name__ == "__main__":
    run_main(main, Config)
