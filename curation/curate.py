r"""Rows of many sets become the file that a stage trains on.

    a.jsonl, b.jsonl ─rules─▶ ─benchmarks─▶ ─duplicates─▶ ─loss─▶ ─passes─▶ ─sample─▶ sft.jsonl
                        └──────────┴─────────────┴──────────┴────────┴─────────┴─▶ sft.dropped.jsonl

The paper (OVR, sec. 3.3) names the steps and gives no thresholds: all constants here are ours. Rows
are read twice and never held: the first pass, over all workers, looks at each row alone and keeps
164 bytes of it; on these is decided; the second copies what stays. So there is nothing to resume,
and any number of workers gives the same bytes. Scores cost most: curate, score the rest, curate.

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
from common.records import columns, places_and_rows
from curation import alike
from reward import Verdict, extract, grade

CHUNK = 4 << 20  # bytes of a file that a worker takes at a time
FEW = 30  # rows of a source below which its losses are judged by those of all sources
LEAST_SPREAD = 0.02  # nats a token: where all losses are alike, none is abnormal

# of the rules. Better keep a doubtful row than lose an honest one
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

REASONS = {  # of each step in their order: why a row goes, as docs/data.md explains
    "rules": "malformed lost_picture mojibake degenerate_length bad_thought no_box refusal "
    "mixed_script repetition proof unjudgeable wrong_box",
    "benchmarks": "contaminated",
    "duplicates": "repeated_id same_words near",
    "loss": "abnormal_loss not_scored",
    "passes": "never_solved always_solved not_tried",
    "sample": "not_chosen",
}
STEPS = {reason: step for step, reasons in REASONS.items() for reason in reasons.split()}


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
    alpha: float = 0.5  # a row weighs (rows of its stratum) ^ -alpha: 1 makes strata equal; ours
    seed: int = 0
    workers: int = 1  # processes

    def __post_init__(self):
        if self.loss_z <= 0 or self.workers < 1:
            raise ValueError("--loss-z must be above 0, and --workers count from 1")
        for path in (*self.rows, *self.benchmarks, *self.losses, *self.passes):
            if not Path(path).is_file():
                raise FileNotFoundError(f"{path}: no such file in {Path.cwd()}")
            if Path(path).resolve() == Path(self.out).resolve():
                raise ValueError(f"--out {self.out} is one of the inputs and would be overwritten")


# ---- rules


def grade_row(row: dict, response: str) -> Verdict:
    return grade(row["answer"], response, choices=row["choices"], precision=row["precision"])


def unjudgeable(row: dict) -> str:
    """Why no response to the row can be judged, if so."""
    gold = row["answer"].strip()
    words = len(re.findall(r"(?<![\\A-Za-z])[A-Za-z]{3,}", gold))
    if NO_GOLD.fullmatch(gold) or len(gold) > MAX_GOLD[0]:
        return f"gold {gold!r:.80}"
    if words > MAX_GOLD[1] and not row["choices"]:
        return f"gold of {words} words"
    itself = grade_row(row, f"\\boxed{{{gold}}}")
    return "" if itself.score == 1 else f"gold {gold!r}: {itself.status}"


def faults(row: dict) -> Iterator[tuple[str, str]]:
    """(reason, detail) of all that is wrong with the texts of a row, what costs little first."""
    prompt, text = row["prompt"], f"{row['prompt']}\n{row['response']}"
    if found := data.MARKUP_PATTERN.search(text):
        yield "malformed", found[0]
    if found := MOJIBAKE.search(text):
        yield "mojibake", repr(text[max(0, found.start() - 10) : found.end() + 10])
    is_word = len(prompt.split()) < 2 and not FOREIGN.search(prompt)  # 求三角形的面积 has no blanks
    if len(prompt) > MAX_PROMPT or (is_word and not row["images"]):
        yield "degenerate_length", f"prompt of {len(prompt)} characters"
    if row["response"] is not None:
        response = row["response"].strip()
        conclusion = response.rpartition("</think>")[2]
        thought = len(response) - len("<think></think>") - len(conclusion)
        markers = re.findall("</?think>", response)
        if len(response) > MAX_RESPONSE:
            yield "degenerate_length", f"response of {len(response)} characters"
        if markers != ["<think>", "</think>"] or not response.startswith("<think>"):
            yield "bad_thought", f"it begins {response[:20]!r} and has {markers[:9]}"
        if thought < MIN_THOUGHT:
            yield "bad_thought", f"thought of {thought} characters"
        if found := REFUSAL.search(response):
            yield "refusal", found[0]
        status, box = extract(conclusion)
        if status or not box.strip():
            yield "no_box", status or "empty box"
        if (found := FOREIGN.search(response)) and not FOREIGN.search(prompt):
            yield "mixed_script", found[0]
        ratio = len(zlib.compress(response.encode(), 1)) / len(response.encode())
        if len(response) > 1000 and ratio < LOOP_ZLIB:
            yield "repetition", f"zlib {ratio:.2f}"
    if row["answer"] is not None:
        if (found := PROOF.search(prompt)) and not ASKS.search(prompt):
            yield "proof", found[0]
        if detail := unjudgeable(row):
            yield "unjudgeable", detail
        if row["response"] is not None and (box := grade_row(row, conclusion)).score != 1:
            yield "wrong_box", f"box {box.answer!r:.80}, gold {row['answer']!r:.80}"


def examine(line: bytes, path: str, place: str, cfg: Config) -> tuple[dict, str, str]:
    """(the row as the stages read it, why it goes or "", detail)"""
    row = {"id": place, "source": Path(path).name}
    try:
        row |= data.parse_json(place, line)
        columns, folder = {"response": None, "answer": None}, Path(path).parent
        if cfg.kind == "sft":
            columns |= vars(data.example_of(place, row, folder))
        if cfg.kind == "rl" or row.get("answer") is not None:
            columns |= vars(data.problem_of(place, row, folder))
        row |= columns
    except FileNotFoundError as error:
        return row, "lost_picture", str(error)
    except ValueError as error:
        return row, "malformed", str(error)
    for reason, detail in faults(row):
        return row, reason, detail
    try:
        for image in row["images"]:
            alike.fingerprint(image)
    except ValueError as error:
        return row, "lost_picture", str(error)
    for hit in benchmarks_of(cfg.benchmarks).hits(row):
        return row, "contaminated", "as {}: {} {}".format(*hit)
    return row, "", ""


# ---- first pass: what is known of a row alone

SIGNATURE = ("signature", "u1", (alike.PERMUTATIONS,))  # this, text, identity: what repeats has
# the id's hash, with the seed, is also the row's luck in the draw
FACT = np.dtype([("id", "u8"), ("text", "u8"), ("identity", "u8"), SIGNATURE, ("stratum", "u4")])


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
    return alike.Benchmarks(tests)


def lines_of(path: str, start: int = 0, end: int = sys.maxsize) -> Iterator[tuple[str, bytes]]:
    """(place, line) of the lines that begin in [start, end) of the file."""
    with open(path, "rb") as file:
        file.seek(max(0, start - 1))
        if start:
            file.readline()  # the rest of a line that began before
        while (at := file.tell()) < end and (line := file.readline()):
            if line.strip():
                yield f"{path}, byte {at}", line


def dropped_line(name: str, reason: str, detail: str) -> str:
    row = {"id": name, "step": STEPS[reason], "reason": reason, "detail": detail}
    return json.dumps(row) + "\n"


def look(cfg: Config, piece: tuple) -> tuple[np.ndarray, list[str], list[tuple], list[str]]:
    """(facts, reasons, strata, lines for .dropped.jsonl) of a piece: (path, start, end)."""
    lines, reasons, strata, dropped = [*lines_of(*piece)], [], [], []
    facts = np.zeros(len(lines), FACT)
    for (place, line), fact in zip(lines, facts, strict=True):
        row, reason, detail = examine(line, piece[0], place, cfg)
        if reason:
            dropped.append(dropped_line(row["id"], reason, detail))
        else:
            alike.describe(row, fact)
        fact["id"] = alike.digest(str(cfg.seed), str(row["id"]))
        reasons.append(reason)
        strata.append((str(row["source"]), str(row.get("level"))))
    return facts, reasons, strata, dropped


def survey(cfg: Config, dropped) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(facts, reasons, sources of all rows); writes to the file `dropped`. Workers are given places
    in files and not rows, for a pool reads ahead without end."""
    starts = [(path, at) for path in cfg.rows for at in range(0, os.path.getsize(path), CHUNK)]
    pieces = [(path, at, at + CHUNK) for path, at in starts]
    all_facts, all_reasons, numbers = [np.empty(0, FACT)], [], {}
    benchmarks_of(cfg.benchmarks)  # before the processes part, which then share it
    with Pool(cfg.workers) as pool:
        looks = pool.imap(partial(look, cfg), pieces)
        for facts, reasons, strata, lines in progress(looks, "reading rows", total=len(pieces)):
            facts["stratum"] = [numbers.setdefault(stratum, len(numbers)) for stratum in strata]
            all_facts.append(facts)
            all_reasons += reasons
            dropped.writelines(lines)
    facts = np.concatenate(all_facts)
    sources = np.array([source for source, _ in numbers], object)[facts["stratum"]]
    return facts, np.array(all_reasons, object), sources


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


def scores_of(cfg: Config, column: str, files: tuple, facts, reason: np.ndarray) -> np.ndarray:
    """The loss of each row, or the share of its tries that passed; NaN where score.py could not
    tell it. Takes some 160 bytes a row while it reads. (N,)"""
    scores = {}
    for path, row in ((file, row) for file in files for _, row in places_and_rows(Path(file))):
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
    """Drops what lies above median + z 1.4826 MAD of its source. Median and MAD do not move with
    the rows that they are to find; 1.4826 MAD is the standard deviation of a normal distribution. A
    source of few rows is judged by all."""
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
    one pass takes the smallest -log(u) / w; u is a hash of (seed, id), the row's alone."""
    left = np.flatnonzero(reason == "")
    uniform = ((facts["id"][left] >> np.uint64(11)) + 0.5) / 2**53
    sizes = np.bincount(facts["stratum"][left])[facts["stratum"][left]]
    order = np.argsort(-np.log(uniform) * sizes**cfg.alpha, kind="stable")
    reason[left[order[cfg.count or len(left) :]]] = "not_chosen"


def copy_rows(cfg: Config, reason: np.ndarray, root: np.ndarray, out, dropped) -> None:
    """Writes the rows that stay, pictures relative to the new file, and why the others do not."""
    target = os.path.abspath(Path(cfg.out).parent)
    names = dict.fromkeys(root[root != np.arange(len(root))].tolist())  # of rows that come again
    lines = ((Path(path).parent, *pair) for path in cfg.rows for pair in lines_of(path))
    for i, (folder, place, line) in enumerate(progress(lines, "copying rows", total=len(reason))):
        if STEPS.get(reason[i]) in ("rules", "benchmarks"):
            continue  # written by the first pass
        stored = json.loads(line)
        row = {"id": place} | stored
        if i in names:
            names[i] = row["id"]
        if reason[i]:
            detail = f"as {names[root[i]]}" if root[i] != i else ""
            dropped.write(dropped_line(row["id"], reason[i], detail))
            continue
        if row.get("images") and os.path.abspath(folder) != target:
            read = data.example_of if cfg.kind == "sft" else data.problem_of
            images = read(place, row, folder).images
            row["images"] = [os.path.relpath(image, target) for image in images]
        if row != stored:
            line = json.dumps(row).encode()
        out.write(line.rstrip(b"\r\n") + b"\n")


def count_steps(reason: np.ndarray, sources: np.ndarray) -> dict:
    """{step: {source: {"in", "kept", "reasons"}}}; prints rows after each step, and why they go."""
    table, lines = {step: {} for step in REASONS}, [["source", "rows", *REASONS]]
    for source in dict.fromkeys(sources.tolist()):
        counts = Counter(reason[sources == source].tolist())
        left = counts.total()
        lines.append([source, f"{left:,}"])
        for step in REASONS:
            reasons = {why: n for why, n in counts.items() if STEPS.get(why) == step}
            kept = left - sum(reasons.values())
            table[step][source] = {"in": left, "kept": kept, "reasons": reasons}
            left = kept
            lines[-1].append(f"{left:,}")
    print(columns(lines, words=1))
    for why, step in STEPS.items():
        if n := (reason == why).sum():
            print(f"{n:>10,}  {step}: {why}")
    print("the reasons are explained in docs/data.md")
    return table


def main(cfg: Config) -> None:
    out = Path(cfg.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    part, why = beside(out, "part"), beside(out, "dropped.jsonl")
    with part.open("wb") as kept, why.open("w") as dropped:
        facts, reason, sources = survey(cfg, dropped)
        root = drop_repeats(reason, facts)
        if cfg.losses:
            losses = scores_of(cfg, "loss", cfg.losses, facts, reason)
            drop_abnormal(reason, losses, sources, cfg.loss_z)
        if cfg.passes:
            rates = scores_of(cfg, "passes", cfg.passes, facts, reason)
            drop(reason, rates == 0, "never_solved")
            drop(reason, rates == 1, "always_solved")
            drop(reason, np.isnan(rates), "not_tried")
            facts["stratum"] = facts["stratum"] * 3 + np.digitize(rates, [1 / 3, 2 / 3], right=True)
        sample(reason, facts, cfg)
        copy_rows(cfg, reason, root, kept, dropped)
    part.replace(out)  # complete: nobody trains on half a file
    inputs = [*cfg.rows, *cfg.benchmarks, *cfg.losses, *cfg.passes]
    write_report(out, cfg, inputs, count_steps(reason, sources))
    if not (reason == "").any():
        with why.open() as file:
            first = file.readline().strip()
        shown = f"{why} says why, first: {first:.500}" if len(facts) else "the files hold none"
        sys.exit(f"{out}: no row stays of {len(facts):,}; {shown}")


if __name__ == "__main__":
    run_main(main, Config)
