r"""Asks a language model what rules cannot tell: how often a behaviour shows, is an answer right.

    items + records ──questions──▶ judge.jsonl: every reply ──read──▶ behaviors.jsonl, judged.jsonl

The paper counts behaviours with GPT-4o, one call a behaviour and response, which ends in
<count>N</count>; answers are judged where the benchmark officially wants it. The paper prints no
prompts: these, and temperature 0, are ours. A reply without exactly one readable tag is asked for
once more with another seed; then the verdict is None, never 0.

A reply is written down the moment it is there, under a hash of model and prompt: after a kill the
same command goes on, and no prompt is paid for twice. Verdicts are read anew from the replies each
time. MathVision-mini at 10k tokens a response is 304 x 8 x 10k = 24 M tokens, hence --sample: what
is drawn also corrects the lexicon's rates over all responses (behaviors.corrected_rate).

    python -m evaluation.judge --records DIR --what behaviors --sample 100 \
        --url http://127.0.0.1:8000/v1 --model Qwen/Qwen2.5-72B-Instruct
    export KEY=...
    python -m evaluation.judge --records DIR --what answers --url https://api.openai.com/v1 \
        --model gpt-4o --key-env KEY
    python eval.py --regrade DIR       # the judge's score beside the rules'
"""

import hashlib
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from common.client import Endpoint, Failure, Unusable, each, user_message
from common.log import command_line, progress, run_main
from evaluation import behaviors
from evaluation.extract import conclusion
from evaluation.records import Appender, read_rows, write_rows

# problem and reasoning come first: a server that caches prefixes reads them once for all eight
COUNT = """\
PROBLEM: {problem}

REASONING of a model that was to solve it: {reasoning}

TASK: Count the distinct instances of one behaviour in the reasoning: {behaviour}.
{definition}
An instance that runs over several sentences counts once. What only sounds like it does not count,
nor does the text of the problem, and it does not matter whether the reasoning is right. End with
the number of instances, 0 if there are none, as <count>N</count>."""
DEFINITIONS = {
    "backtracking": "It notices a mistake or a dead end, and revises or drops what it did before, "
    "as: 'Wait, that cannot be, x must be positive. Let me start over.'",
    "subgoal_setting": "It splits the problem into steps, and says what one of them is to reach, "
    "as: 'First I need the length of AB, then the area.'",
    "verification": "It checks a result that it already has, as: 'Let me check: 3 * 4 + 2 = 14.'",
    "backward_chaining": "It starts from the wanted result and works back to what that needs, as: "
    "'To reach 75 in the end, the step before has to give 25.'",
    "visual_reflection": "It doubts what it took from the image and goes back to it, as: 'Let me "
    "look at the figure again: the angle is at C, not at B.'",
    "visual_divide_and_conquer": "It splits the image into parts and looks at them one by one, as: "
    "'In the left part there are three circles. In the right part...'",
    "visual_verification": "It checks a result that it already has against the image, as: 'The "
    "graph does cross the axis at 2, which agrees with this.'",
    "goal_driven_visual_tracing": "It starts from the wanted result and works back to the evidence "
    "to look for in the image, as: 'For the perimeter I need BC, so let me find its label.'",
}
ANSWER = """\
QUESTION: {question}

REFERENCE: {reference}

REPLY of a model: {reply}

TASK: Judge the final answer of the reply alone, by the reference; do not solve it yourself.
{rubric}
{task}"""
TASKS = {
    "verdict": "Another form of the same value or choice is the same answer. No answer, or several "
    "of them, is incorrect. End with <verdict>correct</verdict> or <verdict>incorrect</verdict>.",
    "score": "In the reference <AND> joins what all has to be there, <OR> what may stand for each "
    "other. End with the share of it that the answer has right, 0.0 to 1.0 in steps of 0.1, as "
    "<score>0.7</score>.",
}

SCORED = {"mmvet"}  # benchmarks with a score from 0 to 1
VALUES = {"count": r"\d{1,4}", "verdict": "correct|incorrect", "score": r"0(\.\d)?|1(\.0)?"}
SEEDS = (0, 1)  # of the first try and of the second


@dataclass(frozen=True)
class Config:
    """Judges what a model replied."""

    records: str  # directory of eval.py; replies and verdicts are written there
    what: Literal["behaviors", "answers"]
    url: str  # of an OpenAI-compatible server, with its /v1
    model: str  # as the server calls it
    all: bool = False  # answers: also of items that officially need no judge
    sample: int = 0  # responses, drawn by a hash of their names; 0: all
    max_tokens: int = 2048  # of the judge's reply
    key_env: str = ""  # NAME of the environment variable that holds the key; empty: none
    concurrency: int = 32  # requests in flight

    def __post_init__(self):
        if self.sample < 0 or self.max_tokens < 1:
            raise ValueError("sample must not be negative, max_tokens must be positive")
        _ = self.endpoint  # checks the rest

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(self.url, self.model, self.key_env, self.concurrency)


class Question(NamedTuple):
    kind: str  # the tag that the reply ends in
    prompt: str


def questions(what: str, item: dict, record: dict) -> dict[str, Question]:
    """Eight by behaviour, or one. None at all where an answer is no answer: it was cut off at the
    limit, its thought never closes, or it is empty."""
    if what == "behaviors":
        about = {"problem": item["prompt"], "reasoning": behaviors.thinking(record["response"])}
        return {
            name: Question("count", COUNT.format(behaviour=name, definition=text, **about))
            for name, text in DEFINITIONS.items()
        }
    reply = conclusion(record["response"])
    if record["finish"] == "length" or not reply:
        return {}
    kind = "score" if item["source"] in SCORED else "verdict"
    about = {"question": item["prompt"], "reference": item["answer"], "reply": reply}
    about |= {"rubric": item.get("rubric") or "", "task": TASKS[kind]}
    return {"judge_score": Question(kind, ANSWER.format(**about))}


def read(kind: str, text: str) -> float | int | None:
    """What stands in the only tag of the reply; None if there are none, several, or no value."""
    found = re.findall(rf"<{kind}>(.*?)</{kind}>", text.rpartition("</think>")[2], re.S)
    if len(found) != 1 or not re.fullmatch(VALUES[kind], value := found[0].strip()):
        return None
    return {"count": int, "verdict": lambda v: float(v == "correct"), "score": float}[kind](value)


class Cache:
    """judge.jsonl, only ever appended: {"hash", "seed"} | fields of a Reply, of all runs."""

    def __init__(self, path: Path, model: str):
        self.model, self.replies, self.tokens = model, {}, Counter()
        self.file = Appender(path)
        for record in read_rows(path):
            self.remember(record)

    def remember(self, record: dict) -> None:
        self.replies.setdefault(record["hash"], {})[record["seed"]] = record["text"]
        self.tokens.update({k: record[k] or 0 for k in ("prompt_tokens", "completion_tokens")})

    def add(self, question: Question, seed: int, reply) -> None:
        record = {"hash": self.key(question), "seed": seed} | asdict(reply)
        self.file.add(record)
        self.remember(record)

    def key(self, question: Question) -> str:
        return hashlib.sha256(json.dumps([self.model, question.prompt]).encode()).hexdigest()

    def verdict(self, question: Question) -> float | int | None:
        texts = self.replies.get(self.key(question), {})
        values = [read(question.kind, texts[seed]) for seed in SEEDS if seed in texts]
        return next((value for value in values if value is not None), None)

    def seeds_due(self, question: Question) -> list[int]:
        """Of the tries that are left, none where there is a verdict."""
        tried = self.replies.get(self.key(question), {})
        return [s for s in SEEDS if s not in tried and self.verdict(question) is None]


def ask_for_all(cfg: Config, cache: Cache, wanted: list[Question]) -> int:
    """-> how many requests failed; they are not kept: the next run asks again."""
    failures = []

    async def work(ask: Callable, question: Question):
        body = {"messages": [user_message(question.prompt)], "temperature": 0}
        while seeds := cache.seeds_due(question):
            outcome = await ask(body | {"seed": seeds[0], "max_tokens": cfg.max_tokens})
            if isinstance(outcome, Failure):
                return failures.append(outcome)
            cache.add(question, seeds[0], outcome)

    due = [question for question in dict.fromkeys(wanted) if cache.seeds_due(question)]
    each(cfg.endpoint, progress(due, "asking the judge"), work)
    return len(failures)


def drawn(records: list[dict], sample: int) -> list[dict]:
    """The same at every run, and spread over all: by a hash of their names."""
    mixed = sorted(records, key=lambda r: zlib.crc32(f"{r['id']}/{r['sample']}".encode()))
    return mixed[:sample] if sample else records


def show_behaviors(records: list[dict], rows: list[dict]) -> None:
    """The judge's rates, the lexicon's over all responses, and these put right by the former."""
    counts = {(row["id"], row["sample"]): row["counts"] for row in rows}
    heard = behaviors.presence([behaviors.thinking(r["response"]) for r in records])
    print(f"{'share of responses with':28}{'judge':>7}{'of':>6}{'lexicon':>9}   corrected (95 %)")
    for b, name in enumerate(behaviors.NAMES):
        said = [counts.get((r["id"], r["sample"]), {}).get(name) for r in records]
        read = [number > 0 for number in said if number is not None]
        rate = f"{np.mean(read):7.1%}" if read else "    n/a"
        right = behaviors.corrected_rate(heard[:, b], said)
        told = "{:.1%} ({:.1%} to {:.1%})".format(*right) if right else "n/a"
        print(f"{name:28}{rate}{len(read):6,}{heard[:, b].mean():9.1%}   {told}")
    whole = [[n > 0 for n in c.values()] for c in counts.values() if None not in c.values()]
    shown = np.array(whole, dtype=bool).reshape(-1, len(behaviors.NAMES))
    for pair, ratio in behaviors.transfer_rates(shown).items():
        print(f"{pair[1]} / {pair[0]}: {'n/a' if ratio is None else f'{ratio:.1%}'}")


def main(cfg: Config) -> None:
    folder = Path(cfg.records)
    items = {item["id"]: item for item in read_rows(folder / "items.jsonl")}
    records = read_rows(folder / "records.jsonl")
    if lost := [record["id"] for record in records if record["id"] not in items]:
        raise ValueError(
            f"{folder}/items.jsonl lacks {len(lost)} items of the records, as {lost[0]!r}"
        )
    if cfg.what == "answers" and not cfg.all:
        official = [r for r in records if items[r["id"]].get("judge", True)]
        if records and not official:
            raise ValueError(f"{folder} officially needs no judge; --all asks one all the same")
        records = official
    sampled, cache = drawn(records, cfg.sample), Cache(folder / "judge.jsonl", cfg.model)
    asked = [questions(cfg.what, items[record["id"]], record) for record in sampled]
    wanted = [question for named in asked for question in named.values()]
    try:
        failed = ask_for_all(cfg, cache, wanted)
    except (KeyboardInterrupt, Unusable) as error:
        print(f"{len(cache.replies):,} replies are kept; to go on: {command_line()}")
        raise SystemExit(f"stopped: {error or 'Ctrl-C'}") from error
    rows, unread = [], 0
    for record, named in zip(sampled, asked, strict=True):
        told = {name: cache.verdict(question) for name, question in named.items()}
        unread += list(told.values()).count(None)
        told = {"counts": told} if cfg.what == "behaviors" else {"judge_score": 0.0} | told
        rows.append({"id": record["id"], "sample": record["sample"]} | told)
    out = folder / ("behaviors.jsonl" if cfg.what == "behaviors" else "judged.jsonl")
    write_rows(out, rows)
    print(f"{out}: {len(rows):,} responses, {unread:,} of {len(wanted):,} questions unanswered")
    print(f"{failed:,} requests failed: the same command asks them again")
    told = " + ".join(f"{count:,} {name}" for name, count in cache.tokens.items())
    print(f"all runs: {sum(map(len, cache.replies.values())):,} replies, {told}")
    if cfg.what == "behaviors":
        show_behaviors(records, rows)


if __name__ == "__main__":
    run_main(main, Config)
