r"""Reasoning for problems: asks a teacher until a reply is right, and keeps every reply.

    problems.jsonl ──ask──▶ traces.replies.jsonl ──judge──▶ traces.jsonl, traces.dropped.jsonl

The paper (OVR, sec. 3.3) distilled its traces from DeepSeek-R1 and says no more. Here a problem is
asked until `keep` replies are accepted, `tries` times at most: the teacher has finished, thought
between <think> and </think>, and boxed what reward.py takes for the reference. Sampling is what
R1's model card recommends: temperature 0.6, top-p 0.95, and the line that asks for a box.

A reply is paid for, so it is written down the moment it is there, and nothing is asked twice: the
same command goes on after a kill, or after more --tries, --budget or rows. What becomes of a reply
is decided by a second pass that asks nobody, so a better matcher costs nothing, and the order and
the bytes of the traces do not depend on the order in which replies came.

    vllm serve deepseek-ai/DeepSeek-R1-Distill-Qwen-32B --reasoning-parser deepseek_r1
    python -m curation.distil --rows problems.jsonl --url http://127.0.0.1:8000/v1 \
        --model deepseek-ai/DeepSeek-R1-Distill-Qwen-32B --out out/data/traces.jsonl
    export KEY=...                                # a paid one: 40 USD, then stop
    python -m curation.distil ... --key_env KEY --price_in 0.55 --price_out 2.19 --budget 40
"""

import fcntl
import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from common.client import (
    Endpoint,
    Failure,
    Reply,
    Unusable,
    each,
    picture_type,
    user_message,
)
from common.log import beside, changes, command_line, compact, progress, run_main, write_report
from curation.alike import DAMAGED
from curation.curate import MARKUP, REFUSAL, conclusion, malformed, mojibake, unjudgeable
from reward import extract, grade

SUFFIX = r"Please reason step by step, and put your final answer within \boxed{}."  # R1's card


@dataclass(frozen=True)
class Config:
    """Stage 0: responses for problems."""

    rows: tuple[str, ...]  # JSONL files {"id", "source", "prompt", "images"?, "answer", ...}
    url: str  # of an OpenAI-compatible server, with its /v1
    model: str  # as the server calls it
    out: str  # JSONL to write; replies, dropped rows, protocol and report beside it
    key_env: str = ""  # NAME of the environment variable that holds the key; empty: none
    suffix: str = SUFFIX  # a line after each prompt
    temperature: float = 0.6  # R1's model card
    top_p: float = 0.95  # R1's model card
    max_tokens: int = 32_768  # of a reply, its thought included; R1's model card
    tries: int = 4  # most replies of a problem; ours
    keep: int = 1  # accepted replies that are enough, each a row; ours
    limit: int = 0  # first rows only; 0: all
    seed: int = 0  # of (seed, id, sample) is made the seed of a request
    concurrency: int = 64  # requests in flight
    stall: float = 300.0  # seconds of silence after which a request is given up and tried again
    retries: int = 6  # tries after the first that the server fails
    price_in: float = 0.0  # USD per million tokens of prompts
    price_out: float = 0.0  # USD per million tokens of replies
    budget: float = 0.0  # USD, earlier runs included; what is in flight comes on top. 0: no limit
    retry_failed: bool = False  # ask again what the server failed at in earlier runs

    def __post_init__(self):
        if not self.rows:
            raise ValueError("--rows names no file")
        if Path(self.out).resolve() in {Path(path).resolve() for path in self.rows}:
            raise ValueError(f"--out {self.out} is one of the inputs and would be overwritten")
        if not 1 <= self.keep <= self.tries:
            raise ValueError(f"keep {self.keep} must be at least 1 and at most tries {self.tries}")
        least = min(self.limit, self.budget, self.temperature, self.price_in, self.price_out)
        if least < 0 or self.max_tokens < 1:
            raise ValueError(
                "limit, budget, temperature, prices must not be negative, max_tokens positive"
            )
        if self.tries > 1 and self.temperature == 0:
            raise ValueError(f"{self.tries} tries at temperature 0 are the same: set --tries 1")
        if self.budget and not (self.price_in or self.price_out):
            raise ValueError("--budget needs --price_in and --price_out")
        _ = self.endpoint  # checks the rest

    @property
    def endpoint(self) -> Endpoint:
        names = "url model key_env concurrency stall retries".split()
        return Endpoint(**{name: getattr(self, name) for name in names})


WHY = {  # reasons of replies, and of problems none of whose replies was accepted
    "wrong": "The box does not hold the reference.",
    "no_box": "No box is closed after the thought.",
    "truncated": "The reply was cut at max_tokens.",
    "refusal": "The teacher declined.",
    "empty": "Nothing stands after the thought.",
    "without_thought": "No thought stands between <think> and </think>.",
    "markup": "The reply holds markup of the chat.",
    "failed": "The server gave no reply, all tries used.",
    "not_asked": "The budget was spent.",
    "malformed": "The row cannot be asked.",
    "repeated_id": "A row above has the same id.",
}
PROTOCOL = ("model", "suffix", "temperature", "top_p", "max_tokens", "seed")  # may not change


# ---- 1. rows


def read_rows(cfg: Config) -> Iterator[tuple[dict, str, str]]:
    """(row, reason why it is not asked or "", detail); row["folder"] is ours. A line that is no row
    comes as one with the name of its place."""
    seen, count = set(), 0
    for path in cfg.rows:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                if count == (cfg.limit or -1):
                    return
                count += 1
                place = {"id": f"{path}:{number}", "source": "unknown"}
                row, reason, detail = checked(line, str(Path(path).parent))
                if row.get("id") in seen:
                    reason, detail = "repeated_id", f"{path}:{number}"
                seen.add(row.get("id", place["id"]))
                yield place | row, reason, detail


def checked(line: bytes, folder: str) -> tuple[dict, str, str]:
    """One line as read_rows gives it, before it is known among others."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return {}, "malformed", f"not JSON: {error}"
    if not isinstance(row, dict) or not isinstance(row.get("id"), str | int):
        return {}, "malformed", f"no row with an id: {line[:80]!r}"
    row = {"source": "unknown"} | row | {"folder": folder}
    if row.get("response") is not None:
        raise ValueError(
            f"row {row['id']} in {folder} has a response already: distil only rows without one"
        )
    row.pop("response", None)
    if missing := [name for name in ("prompt", "answer") if row.get(name) is None]:
        return row, "malformed", f"no {' and no '.join(missing)}"
    if not isinstance(row["source"], str) or not isinstance(row.get("origin") or {}, dict):
        detail = f"source {row['source']!r:.80}, origin {row.get('origin')!r:.80}"
        return row | {"source": "unknown"}, "malformed", detail
    for rule in (malformed, mojibake, unjudgeable):  # what can never be accepted is not paid for
        if detail := rule(row):
            return row, rule.__name__, detail
    try:
        for picture in pictures(row):
            picture_type(picture)
    except DAMAGED as error:
        return row, "lost_picture", str(error)
    return row, "", ""


def pictures(row: dict) -> list[Path]:
    return [Path(row["folder"], name) for name in row.get("images") or []]


# ---- 2. requests and replies


def address(seed: int, problem_id: str, sample: int) -> int:
    """The seed of a request, as rollout.address makes it, which loads torch."""
    return zlib.crc32(f"{seed}/{problem_id}/{sample}".encode(errors="surrogatepass"))


def request(cfg: Config, row: dict, sample: int) -> dict:
    prompt = f"{row['prompt']}\n{cfg.suffix}" if cfg.suffix else row["prompt"]
    sampling = {name: getattr(cfg, name) for name in ("temperature", "top_p", "max_tokens")}
    seed = address(cfg.seed, row["id"], sample)
    return {"messages": [user_message(prompt, pictures(row))], "seed": seed} | sampling


def asked(row: dict) -> str:
    """What tells a problem from another of the same id: its text, and the names of its pictures."""
    parts = [row["prompt"], *(path.name for path in pictures(row))]
    return hashlib.sha256("\0".join(parts).encode(errors="surrogatepass")).hexdigest()[:16]


@dataclass
class Totals:
    """What a number of requests came to."""

    replies: int = 0
    failures: int = 0
    uncounted: int = 0  # replies whose tokens the server did not count
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, record: dict) -> None:
        if "error" in record:
            self.failures += 1
            return
        self.replies += 1
        self.uncounted += record["completion_tokens"] is None
        self.prompt_tokens += record["prompt_tokens"] or 0
        self.completion_tokens += record["completion_tokens"] or 0

    def cost(self, cfg: Config) -> float:
        """USD, as far as tokens were counted."""
        return (self.prompt_tokens * cfg.price_in + self.completion_tokens * cfg.price_out) / 1e6


class Replies:
    """X.replies.jsonl: a line a reply, only ever appended. In memory are the places of lines.

    records: {"id", "sample", "asked"} | fields of a Reply or of a Failure.
    """

    def __init__(self, cfg: Config):
        self.path, self.cfg = beside(cfg.out, "replies.jsonl"), cfg
        self.places, self.totals, self.end = {}, Totals(), 0
        self.file = self.path.open("a+b")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:  # two would pay twice
            raise SystemExit(f"another process writes {self.path}: let it end first") from error
        except OSError as error:  # some network file systems
            print(f"{self.path} cannot be locked ({error}): start no second run on it")
        claim(beside(cfg.out, "protocol.json"), cfg, empty=not self.path.stat().st_size)
        self.file.seek(0)
        for line in progress(self.file, "reading replies"):
            if not line.endswith(b"\n"):  # a kill cut it off
                self.file.truncate(self.end)
                break
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{self.path}, byte {self.end}: not JSON: {error}") from error
            again = cfg.retry_failed and "error" in record
            self.count(record, len(line), hide=again)

    def count(self, record: dict, size: int, hide: bool = False):
        if not hide:  # a tuple, for there are millions of them: 250 bytes a problem in all
            self.places[record["id"]] = (*self.places.get(record["id"], ()), self.end)
        self.totals.add(record)
        self.end += size

    def of(self, row: dict) -> dict[int, dict]:
        """{sample: record} of a problem; what was asked again counts as it came last."""
        found = {}
        for place in self.places.get(row["id"], ()):
            self.file.seek(place)
            record = json.loads(self.file.readline())
            if record["asked"] != asked(row):
                raise ValueError(
                    f"{self.path}: the prompt or a picture of {row['id']} has changed since it was "
                    "asked: use another --out, or another id"
                )
            found[record["sample"]] = record
        return found  # in the order of samples: each is asked after the one before

    def add(self, row: dict, sample: int, outcome: Reply | Failure) -> dict:
        record = {"id": row["id"], "sample": sample, "asked": asked(row)} | asdict(outcome)
        line = json.dumps(record).encode() + b"\n"
        self.file.write(line)
        self.file.flush()  # a kill loses no reply that came
        self.count(record, len(line))
        return record

    def spent(self) -> float:
        return self.totals.cost(self.cfg)


def claim(path: Path, cfg: Config, empty: bool) -> None:
    """ValueError where the replies on disk were asked for in another way."""
    protocol = {name: getattr(cfg, name) for name in PROTOCOL}
    if not empty:
        if not path.exists():
            raise ValueError(f"{path} is lost, which says how its replies were asked for")
        before = json.loads(path.read_text())
        if found := "; ".join(changes(before, protocol)):
            raise ValueError(f"{cfg.out}: replies of another protocol ({found}): another --out")
    path.write_text(json.dumps(protocol, indent=1))


# ---- 3. verdicts: pure functions of a row and its replies


def response_of(record: dict) -> str:
    """The trace with its thought between <think> and </think>, whichever way the server tells it:
    in a field of its own, in the text, or in a text whose <think> the chat template wrote."""
    text, thought = record["text"], record["thought"]
    if thought is not None:
        return f"<think>\n{thought.strip()}\n</think>\n\n{text.strip()}"
    if "</think>" in text and "<think>" not in text:
        return "<think>\n" + text.strip()
    return text.strip()


def verdict(row: dict, record: dict) -> tuple[str, str]:
    """(reason, detail) of a reply; the reason of an accepted one is "accepted"."""
    if "error" in record:
        return "failed", f"{record['error']}: {record['message']}"
    if record["finish"] == "length":
        return "truncated", f"{record['completion_tokens']} tokens"
    if record["finish"] == "content_filter":
        return "refusal", "content_filter"
    response = response_of(record)
    end = conclusion(response)
    if not record["text"].strip() or not end.strip():
        return "empty", "" if record["thought"] is None else "a thought alone"
    if found := REFUSAL.search(response):
        return "refusal", found[0]
    if found := MARKUP.search(response):
        return "markup", found[0]
    if response.count("<think>") != 1 or response.count("</think>") != 1:
        return "without_thought", f"{response.count('</think>')} </think>"
    if extract(end)[0] in ("no_box", "unclosed"):
        return "no_box", end.strip()[-80:]
    options = {"choices": row.get("choices"), "precision": row.get("precision")}
    graded = grade(str(row["answer"]), end, **options)
    if graded.score == 1:
        return "accepted", ""
    return "wrong", f"{graded.status}: box {graded.answer!r:.80}, gold {row['answer']!r:.80}"


def judged(cfg: Config, row: dict, records: dict[int, dict]) -> list[tuple[dict, str, str]]:
    """(record, reason, detail) in the order of samples, up to the last that is needed."""
    found = []
    for record in records.values():
        if not wanted(cfg, found):
            break
        found.append((record, *verdict(row, record)))
    return found


def wanted(cfg: Config, found: list[tuple[dict, str, str]]) -> bool:
    """Is another reply wanted? Not where the server failed, all retries used: it would again."""
    reasons = [reason for _, reason, _ in found]
    enough = reasons.count("accepted") >= cfg.keep
    return not enough and len(found) < cfg.tries and "failed" not in reasons


# ---- 4. asking


async def solve(ask: Callable, row: dict, cfg: Config, replies: Replies) -> bool:
    """Asks for a problem until nothing more is wanted, or all is spent. Is a reply accepted?"""
    records = replies.of(row)
    found = judged(cfg, row, records)
    while wanted(cfg, found) and not (cfg.budget and replies.spent() >= cfg.budget):
        sample = len(records)
        outcome = await ask(request(cfg, row, sample))
        records[sample] = replies.add(row, sample, outcome)
        if cfg.budget and replies.totals.uncounted:
            raise Unusable(f"{cfg.url} does not count tokens: --budget cannot be kept")
        found = judged(cfg, row, records)
    return any(reason == "accepted" for _, reason, _ in found)


def ask_for_all(cfg: Config, replies: Replies, rows: int) -> None:
    bar = progress((row for row, reason, _ in read_rows(cfg) if not reason), "asking", total=rows)
    totals, verdicts = replies.totals, Counter()
    before = totals.completion_tokens

    async def work(ask: Callable, row: dict):
        verdicts[await solve(ask, row, cfg, replies)] += 1
        seconds = max(bar.format_dict["elapsed"], 1e-9)
        speed = compact((totals.completion_tokens - before) / seconds)
        share = f"{verdicts[True] / verdicts.total():.0%} right"
        bar.set_postfix_str(f"{share}, {speed} tokens/s, {replies.spent():.2f} USD", refresh=False)

    each(cfg.endpoint, bar, work)


# ---- 5. writing


def traces(cfg: Config, row: dict, found: list[tuple[dict, str, str]]) -> Iterator[dict]:
    """A row for each accepted reply: ID, ID/1, ...; pictures relative to the new file."""
    target = os.path.abspath(Path(cfg.out).parent)
    plain = {name: value for name, value in row.items() if name != "folder"}
    if row.get("images"):
        plain["images"] = [os.path.relpath(os.path.abspath(p), target) for p in pictures(row)]
    accepted = [record for record, reason, _ in found if reason == "accepted"]
    for k, record in enumerate(accepted):
        distilled = {"model": cfg.model, "sample": record["sample"], "finish": record["finish"]}
        distilled["tokens"] = record["completion_tokens"]
        origin = (row.get("origin") or {}) | {"distilled": distilled}
        name = f"{row['id']}/{k}" if k else row["id"]
        yield plain | {"id": name, "response": response_of(record), "origin": origin}


def why_not(cfg: Config, found: list[tuple[dict, str, str]]) -> tuple[str, str]:
    """(reason, detail) of a problem without an accepted reply: what its replies mostly were."""
    reasons = [reason for _, reason, _ in found]
    told = f"{len(found)} replies: {', '.join(reasons)}"
    if wanted(cfg, found):
        return "not_asked", f"the budget was spent. {told}" if found else "the budget was spent"
    return Counter(reasons).most_common(1)[0][0], f"{told}; {found[-1][2]}"


def write(cfg: Config, replies: Replies, rows: int) -> tuple[dict, Counter]:
    """The traces and the dropped rows anew. -> ({source: {in, kept, reasons}}, Counter of verdicts
    of replies)"""
    table, verdicts = {}, Counter()
    with whole(cfg.out) as kept, whole(beside(cfg.out, "dropped.jsonl")) as dropped:
        for row, reason, detail in progress(read_rows(cfg), "judging", total=rows):
            found = [] if reason else judged(cfg, row, replies.of(row))
            verdicts.update(reason for _, reason, _ in found)
            count = table.setdefault(row["source"], {"in": 0, "kept": 0, "reasons": Counter()})
            count["in"] += 1
            if lines := list(traces(cfg, row, found)):
                count["kept"] += 1
                count["rows"] = count.get("rows", 0) + len(lines)
                kept.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
                continue
            if not reason:
                reason, detail = why_not(cfg, found)
            count["reasons"][reason] += 1
            line = {"id": row["id"], "step": "distil", "reason": reason, "detail": detail}
            dropped.write(json.dumps(line) + "\n")
    return table, verdicts


@contextmanager
def whole(path: str | Path) -> Iterator[TextIO]:
    """A file to write that has its name only when it is complete."""
    part = Path(f"{path}.part")
    # half a character of a reply, which UTF-8 has no bytes for, stays the escape that JSON has
    with part.open("w", encoding="utf-8", errors="backslashreplace") as file:
        yield file
    part.replace(path)


def show(cfg: Config, table: dict, verdicts: Counter, totals: Totals) -> None:
    for source, of in table.items():
        print(f"{source:30.30} {of['kept']:>10,} of {of['in']:,}")
    reasons = sum((of["reasons"] for of in table.values()), Counter())
    for kind, counts in (("problems", reasons), ("replies", verdicts)):
        for reason, n in counts.most_common():
            print(f"{n:>10,} {kind} {reason.replace('_', ' ')}")
    print(
        f"{totals.replies:,} replies, {totals.prompt_tokens:,} + {totals.completion_tokens:,} "
        f"tokens ({totals.uncounted:,} replies not counted by the server), "
        f"{totals.cost(cfg):.2f} USD"
    )
    if verdicts["failed"]:
        print(f"{verdicts['failed']:,} requests failed: --retry_failed asks them again")


def main(cfg: Config) -> None:
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    good = Counter(not reason for _, reason, _ in progress(read_rows(cfg), "looking at rows"))
    replies = Replies(cfg)
    try:
        ask_for_all(cfg, replies, good[True])
    except (KeyboardInterrupt, Unusable) as error:
        print(f"{replies.totals.replies:,} replies are kept; to go on: {command_line()}")
        raise SystemExit(f"stopped: {error or 'Ctrl-C'}") from error
    table, verdicts = write(cfg, replies, good.total())
    usage = vars(replies.totals) | {"cost_usd": round(replies.spent(), 6)}
    write_report(cfg.out, cfg, cfg.rows, {"distil": table}, why=WHY, usage=usage, verdicts=verdicts)
    show(cfg, table, verdicts, replies.totals)


if __name__ == "__main__":
    run_main(main, Config)
