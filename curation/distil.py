r"""Reasoning for problems: asks a teacher until a reply is right, and keeps every reply.

    problems.jsonl ──ask──▶ traces.replies.jsonl ──judge──▶ traces.jsonl, traces.dropped.jsonl

The paper (OVR, sec. 3.3) distilled its traces from DeepSeek-R1 and says no more. Here a problem is
asked until `keep` replies are accepted, `tries` times at most: the teacher has finished, thought
between <think> and </think>, and boxed what reward.py takes for the reference. Sampling is what
R1's model card recommends: temperature 0.6, top-p 0.95, and the line that asks for a box.

A reply is paid for, so it is written down the moment it is there, and nothing is asked twice: the
same command goes on after a kill, or after more --tries, --budget or rows. Replies on disk are
judged anew at each start, so a better matcher costs nothing, and the order and the bytes of the
traces do not depend on the order in which replies came. In memory are the problems, not the
replies: 1 M problems take some 2 GB.

    vllm serve deepseek-ai/DeepSeek-R1-Distill-Qwen-32B --reasoning-parser deepseek_r1
    python -m curation.distil --rows problems.jsonl --url http://127.0.0.1:8000/v1 \
        --model deepseek-ai/DeepSeek-R1-Distill-Qwen-32B --out out/data/traces.jsonl
    export KEY=...                                # a paid one: 40 USD, then stop
    python -m curation.distil ... --key_env KEY --price_in 0.55 --price_out 2.19 --budget 40
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from common import data
from common.client import (
    Endpoint,
    Failure,
    Reply,
    Unusable,
    ask_for_all,
    picture_type,
    user_message,
)
from common.log import beside, progress, run_main, write_report
from common.records import Appender, claim, places_and_rows, write_rows
from curation.curate import MARKUP, REFUSAL, conclusion, unjudgeable
from reward import extract, grade
from rollout import address

SUFFIX = r"Please reason step by step, and put your final answer within \boxed{}."  # R1's card
PROTOCOL = ("model", "suffix", "temperature", "top_p", "max_tokens", "seed")  # may not change


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
        if min(self.budget, self.temperature, self.price_in, self.price_out) < 0:
            raise ValueError("budget, temperature and prices must not be negative")
        if self.max_tokens < 1:
            raise ValueError("max_tokens must be positive")
        if self.tries > 1 and self.temperature == 0:
            raise ValueError(f"{self.tries} tries at temperature 0 are the same: set --tries 1")
        if self.budget and not (self.price_in or self.price_out):
            raise ValueError("--budget needs --price_in and --price_out")
        _ = self.endpoint  # checks the rest

    @property
    def endpoint(self) -> Endpoint:
        names = "url model key_env concurrency stall retries".split()
        return Endpoint(**{name: getattr(self, name) for name in names})


# ---- 1. rows


def read_problems(files: Sequence[str]) -> dict[str, data.Problem]:
    """{id: problem}. A row that could never be accepted is refused before it costs."""
    problems = {}
    for path in files:
        for place, row, folder in progress(data.line_rows(Path(path)), "checking rows"):
            problem = data.problem_of(place, row, folder)
            if other := problems.get(problem.id):
                raise ValueError(f"{place}: the id {problem.id!r} is also that of {other.place}")
            if row.get("response") is not None:
                raise ValueError(f"{place}: it has a response already: leave such rows out")
            if detail := unjudgeable(row):
                cure = "curation.curate --kind rl takes such rows out"
                raise ValueError(f"{place}: no reply can be judged, {detail}: {cure}")
            for image in problem.images:
                with data.decoding(image, place):
                    picture_type(image)
            problems[problem.id] = problem
    return problems


# ---- 2. replies and what becomes of them


class Verdict(NamedTuple):
    place: int  # of the reply in X.replies.jsonl, in bytes
    reason: str  # "accepted", or why not
    detail: str


def response_of(record: dict) -> str:
    """The trace with its thought between <think> and </think>, whichever way the server tells it:
    in a field of its own, in the text, or in a text whose <think> the chat template wrote."""
    text, thought = record["text"].strip(), record["thought"]
    if thought is not None:
        return f"<think>\n{thought.strip()}\n</think>\n\n{text}"
    if "</think>" in text and "<think>" not in text:
        return "<think>\n" + text
    return text


def judge(problem: data.Problem, record: dict) -> tuple[str, str]:
    """(reason, detail) of a reply."""
    if "error" in record:
        return "failed", f"{record['error']}: {record['message']}"
    if record["finish"] == "length":
        return "truncated", f"{record['completion_tokens']} tokens"
    if record["finish"] == "content_filter":
        return "refusal", "content_filter"
    response = response_of(record)
    end = conclusion(response)
    if not record["text"].strip() or not end.strip():
        return "empty", "nothing stands after the thought"
    for reason, pattern in (("refusal", REFUSAL), ("markup", MARKUP)):
        if match := pattern.search(response):
            return reason, match[0]
    if response.count("<think>") != 1 or response.count("</think>") != 1:
        return "without_thought", f"{response.count('</think>')} </think>"
    if extract(end)[0] in ("no_box", "unclosed"):
        return "no_box", end.strip()[-80:]
    verdict = grade(problem.answer, end, choices=problem.choices, precision=problem.precision)
    if verdict.score == 1:
        return "accepted", ""
    return "wrong", f"{verdict.status}: box {verdict.answer!r:.80}, gold {problem.answer!r:.80}"


def wanted(cfg: Config, verdicts: list[Verdict]) -> bool:
    """Is another reply wanted? Not where the server failed, all retries used: it would again."""
    reasons = [verdict.reason for verdict in verdicts]
    enough = reasons.count("accepted") >= cfg.keep
    return not enough and len(reasons) < cfg.tries and "failed" not in reasons


class Replies:
    """X.replies.jsonl: a line a reply, only ever appended. In memory is what becomes of each.

    A line is {"id", "sample", "asked"} | fields of a Reply or of a Failure.
    """

    def __init__(self, cfg: Config, problems: dict[str, data.Problem]):
        self.cfg, self.path, self.problems = cfg, beside(cfg.out, "replies.jsonl"), problems
        self.verdicts = {name: {} for name in problems}  # {id: {sample: Verdict}}
        self.usage = Counter(replies=0, failures=0, prompt_tokens=0, completion_tokens=0)
        self.file = Appender(self.path)
        protocol = {name: getattr(cfg, name) for name in PROTOCOL}
        claim(beside(cfg.out, "protocol.json"), protocol, begun=self.path.stat().st_size > 0)
        for place, record in progress(places_and_rows(self.path), "judging replies"):
            if not (cfg.retry_failed and "error" in record):
                self.remember(place, record)

    def remember(self, place: int, record: dict) -> None:
        if "error" in record:
            self.usage["failures"] += 1
        else:
            tokens = {name: record[name] for name in ("prompt_tokens", "completion_tokens")}
            if self.cfg.budget and None in tokens.values():
                raise Unusable(f"{self.cfg.url} does not count tokens: --budget cannot be kept")
            self.usage.update({name: count or 0 for name, count in tokens.items()}, replies=1)
        if problem := self.problems.get(record["id"]):
            if record["asked"] != prompt_hash(problem):
                raise ValueError(
                    f"{self.path}: the prompt or a picture of {problem.id} has changed since it "
                    "was asked: use another --out, or another id"
                )
            verdict = Verdict(place, *judge(problem, record))
            self.verdicts[problem.id][record["sample"]] = verdict

    def add(self, problem: data.Problem, outcome: Reply | Failure) -> None:
        record = {"id": problem.id, "sample": len(self.verdicts[problem.id])}
        record |= {"asked": prompt_hash(problem)} | asdict(outcome)
        self.remember(self.file.add(record), record)

    def request(self, problem: data.Problem) -> dict | None:
        """The next of a problem; None where no more is wanted, or all is spent."""
        cfg, sample = self.cfg, len(self.verdicts[problem.id])
        spent = cfg.budget and self.cost() >= cfg.budget
        if spent or not wanted(cfg, self.needed(problem)):
            return None
        prompt = f"{problem.prompt}\n{cfg.suffix}" if cfg.suffix else problem.prompt
        body = {name: getattr(cfg, name) for name in ("temperature", "top_p", "max_tokens")}
        body["seed"] = address((cfg.seed,), problem.id, sample)
        return body | {"messages": [user_message(prompt, problem.images)]}

    def needed(self, problem: data.Problem) -> list[Verdict]:
        """In the order of samples; of more than --tries and --keep now want, the first."""
        verdicts = []
        for verdict in self.verdicts[problem.id].values():
            if wanted(self.cfg, verdicts):
                verdicts.append(verdict)
        return verdicts

    def accepted(self, problem: data.Problem) -> Iterator[dict]:
        with self.path.open("rb") as file:
            for verdict in self.needed(problem):
                if verdict.reason == "accepted":
                    file.seek(verdict.place)
                    yield json.loads(file.readline())

    def cost(self) -> float:
        """USD, as far as the server counted tokens."""
        inward, outward = self.usage["prompt_tokens"], self.usage["completion_tokens"]
        return (inward * self.cfg.price_in + outward * self.cfg.price_out) / 1e6


def prompt_hash(problem: data.Problem) -> str:
    """What tells a problem from another of the same id: its text, and the names of its pictures."""
    parts = [problem.prompt, *(Path(image).name for image in problem.images)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


# ---- 3. writing


def traces(cfg: Config, problem: data.Problem, replies: Replies) -> Iterator[dict]:
    """A row for each accepted reply: ID, ID/1, ...; pictures relative to the new file."""
    names = ("source", "prompt", "answer", "choices", "precision")
    row = {name: getattr(problem, name) for name in names if getattr(problem, name) is not None}
    row |= problem.extra
    row["images"] = [os.path.relpath(image, Path(cfg.out).parent) for image in problem.images]
    for number, record in enumerate(replies.accepted(problem)):
        distilled = {"model": cfg.model, "sample": record["sample"], "finish": record["finish"]}
        distilled["tokens"] = record["completion_tokens"]
        name = f"{problem.id}/{number}" if number else problem.id
        origin = (row.get("origin") or {}) | {"distilled": distilled}
        yield {"id": name} | row | {"response": response_of(record), "origin": origin}


def why_not(cfg: Config, verdicts: list[Verdict]) -> tuple[str, str]:
    """(reason, detail) of a problem without an accepted reply: what its replies mostly were."""
    reasons = [verdict.reason for verdict in verdicts]
    listed = f"{len(reasons)} replies: {', '.join(reasons)}"
    if wanted(cfg, verdicts):
        return "not_asked", f"the budget was spent; {listed}"
    return Counter(reasons).most_common(1)[0][0], f"{listed}; {verdicts[-1].detail}"


def write(cfg: Config, problems: list[data.Problem], replies: Replies) -> dict[str, dict]:
    """The traces and the dropped rows anew. -> {source: {in, kept, reasons}}"""
    table, dropped = {}, []
    for problem in problems:
        verdicts = replies.needed(problem)
        count = table.setdefault(problem.source, {"in": 0, "kept": 0, "reasons": Counter()})
        count["in"] += 1
        if any(verdict.reason == "accepted" for verdict in verdicts):
            count["kept"] += 1
            continue
        reason, detail = why_not(cfg, verdicts)
        count["reasons"][reason] += 1
        dropped.append({"id": problem.id, "step": "distil", "reason": reason, "detail": detail})
    write_rows(beside(cfg.out, "dropped.jsonl"), dropped)
    rows = (row for p in progress(problems, "writing") for row in traces(cfg, p, replies))
    write_rows(Path(cfg.out), rows)
    return table


def main(cfg: Config) -> None:
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    problems = read_problems(cfg.rows)
    replies, problems = Replies(cfg, problems), [*problems.values()]
    ask_for_all(cfg.endpoint, progress(problems, "asking"), replies.request, replies.add)
    table = write(cfg, problems, replies)
    verdicts = Counter(v.reason for problem in problems for v in replies.needed(problem))
    usage = {**replies.usage, "cost_usd": round(replies.cost(), 6)}
    write_report(cfg.out, cfg, cfg.rows, {"distil": table}, usage=usage, verdicts=verdicts)
    for source, count in table.items():
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in count["reasons"].most_common())
        print(f"{source:30.30} {count['kept']:>10,} of {count['in']:,}  {reasons}")
    print("replies:", ", ".join(f"{n:,} {reason}" for reason, n in verdicts.most_common()))
    print(", ".join(f"{count:,} {name}" for name, count in usage.items()))
    if verdicts["failed"]:
        print("--retry_failed asks again what failed")


if __name__ == "__main__":
    run_main(main, Config)
