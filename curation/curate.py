r"""Rows of many sets become the file that a stage trains on.

    a.jsonl, b.jsonl ─rules─▶ ─benchmarks─▶ ─duplicates─▶ ─loss─▶ ─passes─▶ ─sample─▶ sft.jsonl
                        └──────────┴─────────────┴──────────┴────────┴─────────┴─▶ sft.dropped.jsonl

The paper (OVR, sec. 3.3) names the steps and gives no thresholds: all constants here are ours.

rules       what the stages refuse, cannot teach or cannot be graded. Better keep a doubtful row
            than lose an honest one: tests/test_curate.py has what the patterns must not hit
benchmarks  problems that are test questions, by their words or pictures (alike.py)
duplicates  the same problem again, nearly word for word; the first row stays (alike.py)
loss        under a small language model (score.py): above the median of the row's source by more
            than 5 robust standard deviations, as damage is and what is no language
passes      problems that the cold-start model (score.py) solves never, or always: no gradient
sample      `count` rows without replacement; a row of a stratum (source, level, third of the pass
            rates) of n rows weighs n^-alpha: 0 keeps proportions, 1 makes them equal

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

from common import data
from common.log import beside, progress, run_main, write_report
from common.records import places_and_rows
from curation import alike
from reward import Verdict, extract, grade

CHUNK = 4 << 20  # bytes of a file that a worker takes at a time
FEW = 30  # rows of a source below which its losses are judged by those of all sources
LEAST_SPREAD = 0.02  # nats a token: where all losses are alike, none is abnormal

# of the rules
MIN_THOUGHT = 100  # characters: a thought of less than some 20 words teaches to skip it
MAX_RESPONSE = 4 * 65_536  # characters; mathematics has 2 to 4 a token: surely over 64k tokens
MAX_PROMPT = 20_000  # characters; longer ones are documents, not questions
MAX_GOLD = (200, 10)  # characters, words: longer golds are sentences that no reply matches
LOOP_ZLIB = 0.1  # compressed / plain size; of real replies 0.16 to 0.6, of a table of cases 0.2

MOJIBAKE = re.compile(
    "[\ufffd\x80-\x9f\ud800-\udfff]"  # the replacement character, control codes, half a character
    "|â€|âˆ|ï»¿|ï¿½|Ï€|Î[±-»]|[ÃÂ][\xa0-\xaa\xac-\xba\xbc-\xbf]"  # UTF-8 as Latin-1, not «MAÇÃ»
)
FOREIGN = re.compile(  # runs, for one letter is a symbol: the group Ш, the power set of ℵ
    "[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]{2}|[\u0400-\u06ff\u0900-\u0eff]{3}"
)
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

REASONS = {  # why a row goes: (step, what it means)
    "malformed": ("rules", "The stage that reads the file would refuse the row."),
    "lost_picture": ("rules", "A picture is missing or cannot be read."),
    "mojibake": ("rules", "Characters were decoded wrongly: the model would learn to write them."),
    "degenerate_length": ("rules", "A prompt of one word or a document, more than fits a pack."),
    "bad_thought": ("rules", "Not exactly one <think>...</think>, at the start, with a thought."),
    "no_box": ("rules", "No closed \\boxed{} after the thought: nothing that could be rewarded."),
    "refusal": ("rules", "The response declines, or says that it sees no picture."),
    "mixed_script": ("rules", "The response falls into a script that the question is not in."),
    "repetition": ("rules", "The response goes round in a loop."),
    "proof": ("rules", "The problem asks for a proof and nothing else: no box holds one."),
    "unjudgeable": ("rules", "The matcher rejects the gold as its own answer, or it is prose."),
    "wrong_box": ("rules", "The box does not hold the reference: one of the two is wrong."),
    "contaminated": ("benchmarks", "It is a test question, by its words or its picture."),
    "repeated_id": ("duplicates", "A row above has the same id."),
    "same_words": ("duplicates", "A row above asks the same, word for word."),
    "near": ("duplicates", "A row above asks the same, nearly word for word."),
    "abnormal_loss": ("loss", "Far less likely than others of its source: damage, no language."),
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
    out: str  # JSONL to write; .dropped.jsonl and .report.json beside it
    benchmarks: tuple[str, ...] = ()  # items.jsonl of evaluation.benchmarks, or {"id", "prompt"}
    losses: tuple[str, ...] = ()  # of score.py --kind loss; none: the step lets all pass
    passes: tuple[str, ...] = ()  # of score.py --kind passes; none: the step lets all pass
    loss_z: float = 5.0  # robust standard deviations (1.48 x MAD) above the source's median; ours
    count: int = 0  # rows to choose; 0: all
    alpha: float = 0.5  # a row weighs (rows of its stratum) ^ -alpha; ours
    seed: int = 0
    workers: int = 1  # processes

    def __post_init__(self):
        if len({*map(os.path.realpath, self.rows)}) < len(self.rows):
            raise ValueError(f"--rows names a file twice: {' '.join(self.rows)}")
        if self.count < 0 or self.alpha < 0 or self.workers < 1 or self.loss_z <= 0:
            raise ValueError("count, alpha: not negative; loss_z: positive; workers: at least 1")
        for path in (*self.rows, *self.benchmarks, *self.losses, *self.passes):
            if not Path(path).is_file():
                raise FileNotFoundError(f"{path}: no such file in {Path.cwd()}")
            if Path(path).resolve() == Path(self.out).resolve():
                raise ValueError(f"--out {self.out} is one of the inputs and would be overwritten")


# ---- reading


def lines_of(path: str, start: int = 0, end: int = sys.maxsize) -> Iterator[tuple[str, bytes]]:
    """(place, line) of the lines that begin in [start, end) of the file."""
    with open(path, "rb") as file:
        file.seek(max(0, start - 1))
        if start:
            file.readline()  # the rest of a line that began before
        while (at := file.tell()) < end and (line := file.readline()):
            if line.strip():
                yield f"{path}, byte {at}", line


def columns_of(row: dict, path: str, place: str, kind: str) -> dict:
    """As the stages read them, pictures as paths from here. A ValueError or FileNotFoundError where
    a stage would refuse the row."""
    columns = {"response": None, "answer": None}
    if kind == "sft":
        columns |= vars(data.example_of(place, row, Path(path).parent))
    if kind == "rl" or row.get("answer") is not None:
        columns |= vars(data.problem_of(place, row, Path(path).parent))
    return columns


@cache
def benchmarks_of(files: tuple[str, ...]) -> alike.Benchmarks:
    """A broken question stops the run: what it tests would be missed in silence."""
    tests = []
    for path in files:
        for place, row, folder in data.line_rows(Path(path)):
            # items have the question also without what all of a benchmark are told
            prompt = row.get("question") or data.text(place, row, "prompt")
            images = [str(folder / name) for name in row.get("images") or []]
            tests.append((data.text(place, row, "id"), prompt, images))
        if not tests:
            raise ValueError(f"--benchmarks {path}: there is no question in it")
    return alike.read_benchmarks(tests)


# ---- rules


def first_fault(line: bytes, path: str, place: str, kind: str) -> tuple[dict, str, str]:
    """(the row, why it goes or "", detail)"""
    row = {"id": place, "source": Path(path).name}
    try:
        row |= data.parse_json(place, line)
        row |= columns_of(row, path, place, kind)
    except FileNotFoundError as error:
        return row, "lost_picture", str(error)
    except ValueError as error:
        return row, "malformed", str(error)
    return row, *next(faults(row), ("", ""))


def faults(row: dict) -> Iterator[tuple[str, str]]:
    """(reason, detail) of all that is wrong with a row, what costs little to find first."""
    yield from text_faults(row)
    for path in row["images"]:
        try:
            alike.fingerprint(path)
        except ValueError as error:
            yield "lost_picture", str(error)


def text_faults(row: dict) -> Iterator[tuple[str, str]]:
    prompt, response = row["prompt"], row["response"]
    text = f"{prompt}\n{response}"
    if found := data.MARKUP_PATTERN.search(text):
        yield "malformed", found[0]
    if found := MOJIBAKE.search(text):
        yield "mojibake", repr(text[max(0, found.start() - 10) : found.end() + 10])
    if len(prompt) > MAX_PROMPT or (not row["images"] and len(prompt.split()) < 2):
        yield "degenerate_length", f"prompt of {len(prompt)} characters"
    if response is not None:
        yield from response_faults(prompt, response.strip())
    if row["answer"] is not None:
        yield from answer_faults(row)


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
    if found := REFUSAL.search(response):
        yield "refusal", found[0]
    status, box = extract(end)
    if status or not box.strip():
        yield "no_box", status or "empty box"
    if (found := FOREIGN.search(response)) and not FOREIGN.search(prompt):
        yield "mixed_script", found[0]
    ratio = len(zlib.compress(response.encode(), 1)) / len(response.encode())
    if len(response) > 1000 and ratio < LOOP_ZLIB:
        yield "repetition", f"zlib {ratio:.2f}"


def answer_faults(row: dict) -> Iterator[tuple[str, str]]:
    if (found := PROOF.search(row["prompt"])) and not ASKS.search(row["prompt"]):
        yield "proof", found[0]
    if detail := unjudgeable(row):
        yield "unjudgeable", detail
    if row["response"] is not None:
        box = verdict(row, conclusion(row["response"]))
        if box.score != 1:
            yield "wrong_box", f"box {box.answer!r:.80}, gold {row['answer']!r:.80}"


def verdict(row: dict, response: str) -> Verdict:
    return grade(row["answer"], response, choices=row["choices"], precision=row["precision"])


def unjudgeable(row: dict) -> str | None:
    gold = row["answer"].strip()
    words = len(re.findall(r"(?<![\\A-Za-z])[A-Za-z]{3,}", gold))
    if NO_GOLD.fullmatch(gold) or len(gold) > MAX_GOLD[0]:
        return f"gold {gold!r:.80}"
    if words > MAX_GOLD[1] and not row["choices"]:
        return f"gold of {words} words"
    itself = verdict(row, f"\\boxed{{{gold}}}")
    return None if itself.score == 1 else f"gold {gold!r}: {itself.status}"


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
    """(facts, reasons, strata, records for .dropped.jsonl) of the rows in a piece: (path, start,
    end)."""
    lines, tests = [*lines_of(*piece)], benchmarks_of(cfg.benchmarks)
    facts, reasons, strata, dropped = np.zeros(len(lines), FACT), [], [], []
    for (place, line), fact in zip(lines, facts, strict=True):
        row, reason, detail = first_fault(line, piece[0], place, cfg.kind)
        if not reason and (hit := next(alike.contaminations(row, tests), None)):
            reason, detail = "contaminated", "as {}: {} {}".format(*hit)
        if reason:
            dropped.append(drop_record(row["id"], reason, detail))
        else:
            compare_by(row, fact)
        fact["id"] = alike.digest(str(cfg.seed), str(row["id"]))
        reasons.append(reason)
        strata.append((str(row["source"]), str(row.get("level"))))
    return facts, reasons, strata, dropped


def drop_record(name: str, reason: str, detail: str) -> dict:
    return {"id": name, "step": REASONS[reason][0], "reason": reason, "detail": detail}


def compare_by(row: dict, fact: np.void) -> None:
    """Writes down what finds the duplicates of a row."""
    tokens = alike.words(row["prompt"])
    pictures = [alike.fingerprint(path)[0] for path in row["images"]]
    fact["text"] = alike.digest(" ".join(tokens), *pictures)
    fact["identity"] = alike.identity(tokens, pictures, row["answer"] or "")
    fact["signature"] = alike.signature(tokens)


def survey(cfg: Config, dropped) -> tuple[np.ndarray, np.ndarray, list[tuple]]:
    """(facts of all rows, reasons, strata by their numbers); writes the records to the file.
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
            dropped.writelines(json.dumps(record) + "\n" for record in records)
    return np.concatenate(all_facts), np.array(all_reasons, object), list(numbers)


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
        for _, row in places_and_rows(Path(path)):
            if column not in row:
                raise ValueError(f"{path}: not a file of score.py with {column!r}: {row!r:.200}")
            score = np.nan if row[column] is None else row[column] / row.get("samples", 1)
            scores[alike.digest(str(cfg.seed), row["id"])] = score
    scores = np.array([scores.get(key, np.inf) for key in facts["id"].tolist()])
    if missing := np.isinf(scores[reason == ""]).sum():
        raise ValueError(
            f"{missing:,} of the {(reason == '').sum():,} rows that are left have no score in "
            f"{' '.join(files)}: curate without it, give the result to score.py, and come back"
        )
    return scores


def drop_abnormal(reason: np.ndarray, losses: np.ndarray, sources: np.ndarray, z: float) -> None:
    """Drops what lies above median + z 1.4826 MAD of its source.

    Median and MAD do not move with the rows that they are to find; 1.4826 MAD is the standard
    deviation of a normal distribution. A source of few rows is judged by all.
    """
    drop(reason, np.isnan(losses), "not_scored")
    left = reason == ""
    for source in dict.fromkeys(sources[left].tolist()):
        of = left & (sources == source)
        normal = losses[of if of.sum() >= FEW else left]
        median = np.median(normal)
        spread = max(1.4826 * np.median(np.abs(normal - median)), LEAST_SPREAD)
        drop(reason, of & (losses > median + z * spread), "abnormal_loss")


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
    lines = ((path, *pair) for path in cfg.rows for pair in lines_of(path))
    for i, (path, place, line) in enumerate(progress(lines, "copying rows", total=len(reason))):
        if reason[i] and REASONS[reason[i]][0] in FIRST_PASS:
            continue
        row = json.loads(line)
        if i in names:
            names[i] = row["id"]
        if reason[i]:
            detail = f"as {names[root[i]]}" if root[i] != i else ""
            dropped.write(json.dumps(drop_record(row["id"], reason[i], detail)) + "\n")
            continue
        if row.get("images") and os.path.abspath(Path(path).parent) != target:
            images = columns_of(row, path, place, cfg.kind)["images"]
            row["images"] = [os.path.relpath(image, target) for image in images]
            line = json.dumps(row).encode()
        out.write(line.rstrip(b"\r\n") + b"\n")


# ---- report


def count_steps(reason: np.ndarray, sources: np.ndarray) -> dict:
    """{step: {source: {"in", "kept", "reasons"}}}"""
    table = {step: {} for step in STEPS}
    for source in dict.fromkeys(sources.tolist()):
        counts = Counter(reason[sources == source].tolist())
        left = counts.total()
        for step in STEPS:
            reasons = {why: n for why, n in counts.items() if why and REASONS[why][0] == step}
            kept = left - sum(reasons.values())
            table[step][source] = {"in": left, "kept": kept, "reasons": reasons}
            left = kept
    return table


def show(steps: dict) -> None:
    """Rows after each step, and why rows went."""
    print(f"{'source':30}{'rows':>10}" + "".join(f"{step:>12}" for step in STEPS))
    for source, first in steps["rules"].items():
        after = "".join(f"{steps[step][source]['kept']:>12,}" for step in STEPS)
        print(f"{source:30.30}{first['in']:>10,}{after}")
    for why, (step, meaning) in REASONS.items():
        if n := sum(of["reasons"].get(why, 0) for of in steps[step].values()):
            print(f"{n:>10,}  {step}: {why.replace('_', ' ')}. {meaning}")


def main(cfg: Config) -> None:
    out = Path(cfg.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = beside(out, "part")
    with part.open("wb") as kept, beside(out, "dropped.jsonl").open("w") as dropped:
        facts, reason, strata = survey(cfg, dropped)
        sources = np.array([source for source, _ in strata], object)[facts["stratum"]]
        root = drop_repeats(reason, facts)
        if cfg.losses:
            losses = scores_of(facts, reason, "loss", cfg)
            drop_abnormal(reason, losses, sources, cfg.loss_z)
        if cfg.passes:
            rates = scores_of(facts, reason, "passes", cfg)
            drop(reason, rates == 0, "never_solved")
            drop(reason, rates == 1, "always_solved")
            drop(reason, np.isnan(rates), "not_tried")
            facts["stratum"] = facts["stratum"] * 3 + np.digitize(rates, [1 / 3, 2 / 3], right=True)
        sample(reason, facts, cfg)
        copy_rows(cfg, reason, root, kept, dropped)
    part.replace(out)  # complete: nobody trains on half a file
    steps = count_steps(reason, sources)
    write_report(out, cfg, (*cfg.rows, *cfg.benchmarks, *cfg.losses, *cfg.passes), steps)
    show(steps)
    if not (reason == "").any():
        file = beside(out, "dropped.jsonl")
        with file.open() as dropped:
            first = dropped.readline().strip()
        sys.exit(f"{out}: no row stays of {len(facts):,}; {file} says why, first: {first:.500}")


if __name__ == "__main__":
    run_main(main, Config)
