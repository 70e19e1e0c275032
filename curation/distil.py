r"""Reasoning for problems: asks a teacher until a reply is right, and keeps every reply.

    problems.jsonl ──ask──▶ traces.replies.jsonl ──judge──▶ traces.jsonl, traces.dropped.jsonl

The paper (OVR, sec. 3.3) distilled its traces from DeepSeek-R1 and says no more. Here a problem is
asked until `keep` replies are accepted, `tries` times at most: those that have ended and that the
rules of curate.py let pass. Replies are judged anew at each start, and nothing is asked twice: the
same command goes on after a kill, or after more --tries, --budget or rows. In memory are the
problems, not the replies: 1 M take some 2 GB.

    vllm serve deepseek-ai/DeepSeek-R1-Distill-Qwen-32B --reasoning-parser deepseek_r1
    python -m curation.distil --rows problems.jsonl --url http://127.0.0.1:8000/v1 \
        --model deepseek-ai/DeepSeek-R1-Distill-Qwen-32B --out out/data/traces.jsonl
    export KEY=...                              # a paid one: 18 M tokens of replies, then stop
    python -m curation.distil ... --key-env KEY --budget 18
"""

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from common import data
from common.client import Endpoint, Reply, Unusable, ask_for_all, user_message
from common.log import beside, progress, run_main, write_report
from common.records import Appender, claim, places_and_rows, write_rows
from curation.curate import faults, unjudgeable
from rollout import address

SUFFIX = r"Please reason step by step, and put your final answer within \boxed{}."  # R1's card
PROTOCOL = ("model", "suffix", "temperature", "top_p", "max_tokens", "seed")  # may not change


@dataclass(frozen=True, kw_only=True)
class Config(Endpoint):
    """Stage 0: responses for problems."""

    rows: tuple[str, ...]  # JSONL files {"id", "source", "prompt", "images"?, "answer", ...}
    out: str  # JSONL to write; replies, dropped rows, protocol and report beside it
    suffix: str = SUFFIX  # a line after each prompt
    temperature: float = 0.6  # R1's model card
    top_p: float = 0.95  # R1's model card
    max_tokens: int = 32_768  # of a reply, its thought included; R1's model card
    tries: int = 4  # most replies of a problem; ours
    keep: int = 1  # accepted replies that are enough, each a row; ours
    seed: int = 0  # of (seed, id, sample) is made the seed of a request
    budget: float = 0.0  # million tokens of replies, earlier runs included; 0: no limit

    def __post_init__(self):
        super().__post_init__()
        if Path(self.out).resolve() in {Path(path).resolve() for path in self.rows}:
            raise ValueError(f"--out {self.out} is one of the inputs and would be overwritten")
        if not 1 <= self.keep <= self.tries:
            raise ValueError(f"keep {self.keep} must be at least 1 and at most tries {self.tries}")
        if self.tries > 1 and self.temperature == 0:
            raise ValueError(f"{self.tries} tries at temperature 0 are the same: set --tries 1")


def read_problems(files: Iterable[str]) -> dict[str, data.Problem]:
    """{id: problem}. A row that could never be accepted is refused before it costs."""
    problems = {}
    for problem in (problem for path in files for problem in data.read_problems(path)):
        if other := problems.get(problem.id):
            raise ValueError(f"{problem.place}: the id {problem.id!r} is also in {other.place}")
        if detail := unjudgeable(vars(problem)):
            cure = "curation.curate --kind rl takes such rows out"
            raise ValueError(f"{problem.place}: no reply can be judged, {detail}: {cure}")
        problems[problem.id] = problem
    return problems


def response_of(record: dict) -> str:
    """The trace with its thought between <think> and </think>, whichever way the server tells it:
    in a field of its own, in the text, or in a text whose <think> the chat template wrote."""
    text, thought = record["text"].strip(), record["thought"]
    if thought is not None:
        return f"<think>\n{thought.strip()}\n</think>\n\n{text}"
    if "</think>" in text and "<think>" not in text:
        return "<think>\n" + text
    return text


def prompt_hash(problem: data.Problem) -> str:
    """What tells a problem from another of the same id: its text, and the names of its pictures."""
    parts = [problem.prompt, *(Path(image).name for image in problem.images)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


class Replies:
    """X.replies.jsonl: a line a reply, only ever appended. In memory is what becomes of each. A
    line is {"id", "sample", "asked"} | fields of a Reply; of another prompt it counts for none."""

    def __init__(self, cfg: Config, problems: dict[str, data.Problem]):
        self.cfg, self.path, self.problems = cfg, beside(cfg.out, "replies.jsonl"), problems
        self.verdicts = {name: [] for name in problems}  # (byte of its line, reason) by samples
        self.usage = Counter(replies=0, prompt_tokens=0, completion_tokens=0)
        self.file = Appender(self.path)
        protocol = {name: getattr(cfg, name) for name in PROTOCOL}
        claim(beside(cfg.out, "protocol.json"), protocol, begun=self.path.stat().st_size > 0)
        for place, record in progress(places_and_rows(self.path), "judging replies"):
            self.judge(place, record)

    def judge(self, place: int, record: dict) -> None:
        tokens = {name: record[name] for name in ("prompt_tokens", "completion_tokens")}
        if self.cfg.budget and tokens["completion_tokens"] is None:
            raise Unusable(f"{self.cfg.url} does not count tokens: --budget cannot be kept")
        self.usage.update({name: count or 0 for name, count in tokens.items()}, replies=1)
        problem = self.problems.get(record["id"])
        if problem and record["asked"] == prompt_hash(problem):
            row = vars(problem) | {"response": response_of(record)}
            ended = {"length": "truncated", "content_filter": "refusal"}.get(record["finish"])
            reason = ended or next(faults(row), ("accepted", ""))[0]
            self.verdicts[problem.id].append((place, reason))

    def add(self, problem: data.Problem, reply: Reply) -> None:
        record = {"id": problem.id, "sample": len(self.verdicts[problem.id])}
        record |= {"asked": prompt_hash(problem)} | asdict(reply)
        self.judge(self.file.add(record), record)

    @property
    def is_spent(self) -> bool:
        """What is in flight by then comes on top."""
        budget = self.cfg.budget * 1e6
        return 0 < budget <= self.usage["completion_tokens"]

    def request(self, problem: data.Problem) -> dict | None:
        """The next of a problem; None where no more is wanted, or all is spent."""
        cfg, sample = self.cfg, len(self.verdicts[problem.id])
        if self.is_spent or sample >= cfg.tries or len(self.accepted(problem)) == cfg.keep:
            return None
        prompt = f"{problem.prompt}\n{cfg.suffix}" if cfg.suffix else problem.prompt
        body = {name: getattr(cfg, name) for name in ("temperature", "top_p", "max_tokens")}
        body["seed"] = address((cfg.seed,), problem.id, sample)
        return body | {"messages": [user_message(prompt, problem.images)]}

    def accepted(self, problem: data.Problem) -> list[int]:
        """Places of those that become rows; of more than --tries now wants, the first count."""
        needed = self.verdicts[problem.id][: self.cfg.tries]
        return [place for place, reason in needed if reason == "accepted"][: self.cfg.keep]

    def traces(self) -> Iterator[dict]:
        """A row for each accepted reply: ID, ID/1, ...; pictures relative to the new file."""
        names = ("source", "prompt", "answer", "choices", "precision")
        with self.path.open("rb") as file:
            for problem in progress(self.problems.values(), "writing"):
                columns = {name: getattr(problem, name) for name in names}
                row = {name: of for name, of in columns.items() if of is not None} | problem.extra
                folder = Path(self.cfg.out).parent
                row["images"] = [os.path.relpath(image, folder) for image in problem.images]
                for number, place in enumerate(self.accepted(problem)):
                    file.seek(place)
                    record = json.loads(file.readline())
                    distilled = {"model": self.cfg.model, "sample": record["sample"]}
                    origin = (row.get("origin") or {}) | {"distilled": distilled}
                    name = f"{problem.id}/{number}" if number else problem.id
                    yield {"id": name} | row | {"response": response_of(record), "origin": origin}


def main(cfg: Config) -> None:
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    problems, counts, table, dropped = read_problems(cfg.rows), defaultdict(Counter), {}, []
    replies = Replies(cfg, problems)
    ask_for_all(cfg, progress(problems.values(), "asking"), replies.request, replies.add)
    for problem in problems.values():
        reasons = [reason for _, reason in replies.verdicts[problem.id][: cfg.tries]]
        most = Counter(reasons or ["no_reply"]).most_common(1)[0][0]
        counts[problem.source]["accepted" if "accepted" in reasons else most] += 1
        if "accepted" not in reasons:
            detail = f"{len(reasons)} replies: {', '.join(reasons)}"
            dropped.append({"id": problem.id, "step": "distil", "reason": most, "detail": detail})
    for source, reasons in counts.items():
        kept = reasons.pop("accepted", 0)
        table[source] = {"in": kept + reasons.total(), "kept": kept, "reasons": reasons}
        shown = ", ".join(f"{n:,} {reason}" for reason, n in reasons.most_common())
        print(f"{source:30.30} {kept:>10,} of {table[source]['in']:,}  {shown}")
    write_rows(beside(cfg.out, "dropped.jsonl"), dropped)
    write_rows(Path(cfg.out), replies.traces())
    write_report(cfg.out, cfg, cfg.rows, {"distil": table}, usage=replies.usage)
    print(", ".join(f"{count:,} {name}" for name, count in replies.usage.items()))
    if replies.is_spent:
        print(f"--budget {cfg.budget:g} (million tokens) is spent: give a larger one to go on")


if __name__ == "__main__":
    run_main(main, Config)
