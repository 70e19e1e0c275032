r"""Asks a language model what rules cannot tell: how often a behaviour shows, is an answer right.

    items + records ──questions──▶ judge.jsonl: every reply ──read──▶ behaviors.jsonl, judged.jsonl

The paper counts behaviours with GPT-4o, one call a behaviour and response; it prints no prompts:
these, and temperature 0, are ours. A reply without exactly one readable tag is asked for once more;
then the verdict is None, never 0. Replies are kept under a hash of model and prompt: none is paid
for twice. MathVision-mini at 10k tokens a response is 304 x 8 x 10k = 24 M tokens, hence --sample,
which also corrects the lexicon's rates.

    python -m evaluation.judge --records DIR --what behaviors --sample 100 \
        --url http://127.0.0.1:8000/v1 --model Qwen/Qwen2.5-72B-Instruct
    python -m evaluation.judge --records DIR --what answers --url https://api.openai.com/v1 \
        --model gpt-4o --key-env KEY   # the NAME of a variable; then eval.py --regrade DIR
"""

import hashlib
import json
import re
import zlib
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from common.client import Endpoint, Reply, ask_for_all, user_message
from common.log import progress, run_main
from common.records import Appender, columns, read_rows, write_rows
from evaluation import behaviors
from evaluation.extract import conclusion

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
TRIES = 2  # of a question whose first reply cannot be read


@dataclass(frozen=True, kw_only=True)
class Config(Endpoint):
    """Judges what a model replied."""

    records: str  # directory of eval.py; replies and verdicts are written there
    what: Literal["behaviors", "answers"]
    sample: int = 0  # responses, drawn by a hash of their names; 0: all
    max_tokens: int = 2048  # of the judge's reply
    concurrency: int = 32  # requests in flight


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
    tags = re.findall(rf"<{kind}>(.*?)</{kind}>", text.rpartition("</think>")[2], re.S)
    if len(tags) != 1 or not re.fullmatch(VALUES[kind], value := tags[0].strip()):
        return None
    return {"count": int, "verdict": lambda v: float(v == "correct"), "score": float}[kind](value)


def ask(cfg: Config, every: dict[Question, None]) -> dict[Question, float | int | None]:
    """Verdicts, read from judge.jsonl, {"hash", "seed"} | fields of a Reply, of all runs; what is
    not there yet is asked for and added."""
    path, texts = Path(cfg.records, "judge.jsonl"), defaultdict(list)
    file = Appender(path)
    for record in read_rows(path):
        texts[record["hash"]].append(record["text"])
    contents = {question: json.dumps([cfg.model, question.prompt]).encode() for question in every}
    keys = {question: hashlib.sha256(text).hexdigest() for question, text in contents.items()}

    def verdict(question: Question) -> float | int | None:
        values = (read(question.kind, text) for text in texts[keys[question]])
        return next((value for value in values if value is not None), None)

    def request(question: Question) -> dict | None:
        seed = len(texts[keys[question]])  # another for each try
        if seed == TRIES or verdict(question) is not None:
            return None
        body = {"messages": [user_message(question.prompt)], "max_tokens": cfg.max_tokens}
        return body | {"seed": seed, "temperature": 0}

    def write(question: Question, reply: Reply) -> None:
        key = keys[question]
        file.add({"hash": key, "seed": len(texts[key])} | asdict(reply))
        texts[key].append(reply.text)

    ask_for_all(cfg, progress(every, "asking the judge"), request, write)
    return {question: verdict(question) for question in every}


def show(records: list[dict], rows: list[dict]) -> None:
    """CBR by the lexicon over all responses, corrected by the judged ones, and the judge's own;
    then BTR by the judge. The judge's: of responses all of whose counts could be read."""
    counts = {(row["id"], row["sample"]): row["counts"] for row in rows}
    heard = [behaviors.find(behaviors.thinking(record["response"])) for record in records]
    heard = behaviors.counted(heard) > 0
    whole = [row for row in rows if None not in row["counts"].values()]
    shown = [[row["counts"][name] > 0 for name in behaviors.NAMES] for row in whole]
    shown, ids = np.array(shown).reshape(-1, 8), [row["id"] for row in whole]
    means = behaviors.means(shown, ids) if whole else {}

    def text(share: tuple | None) -> str:
        return "{:.1%} ({:.1%} to {:.1%})".format(*share) if share else "n/a"

    lines = [("share with", f"lexicon, {len(records):,}", "corrected", f"judge, {len(whole):,}")]
    for b, name in enumerate(behaviors.NAMES):
        said = [counts.get((r["id"], r["sample"]), {}).get(name) for r in records]
        right = text(behaviors.corrected_rate(heard[:, b], said))
        lines.append((name, f"{heard[:, b].mean():.1%}", right, text(means.get(name))))
    print(columns(lines, words=1))
    for (spoken, visual), rate in behaviors.transfers(shown, ids).items():
        print(f"{visual} / {spoken}: {text(rate)}")


def main(cfg: Config) -> None:
    folder, is_count = Path(cfg.records), cfg.what == "behaviors"
    items = {item["id"]: item for item in read_rows(folder / "items.jsonl")}
    records = read_rows(folder / "records.jsonl")
    if not (items and records):
        raise FileNotFoundError(f"{folder} holds no items.jsonl and records.jsonl of eval.py")
    if not is_count:
        records = [record for record in records if items[record["id"]].get("judge", True)]
        if not records:
            raise ValueError(f"{folder} needs no judge: its official score is by rules")
    # an order by names alone, which mixes them: the first n are a sample, the same at every run
    records.sort(key=lambda r: zlib.crc32(f"{r['id']}/{r['sample']}".encode()))
    sample = records[: cfg.sample or None]
    named = [questions(cfg.what, items[record["id"]], record) for record in sample]
    every = [question for of_reply in named for question in of_reply.values()]
    verdicts, rows = ask(cfg, dict.fromkeys(every)), []  # equal questions are asked once
    for record, of_reply in zip(sample, named, strict=True):
        said = {name: verdicts[question] for name, question in of_reply.items()}
        said = {"counts": said} if is_count else {"judge_score": 0.0} | said
        rows.append({"id": record["id"], "sample": record["sample"]} | said)
    write_rows(out := folder / ("behaviors.jsonl" if is_count else "judged.jsonl"), rows)
    unread = sum(verdicts[question] is None for question in every)
    print(f"{out}: {len(rows):,} responses, {unread:,} of {len(every):,} questions unanswered")
    if is_count:
        show(records, rows)


if __name__ == "__main__":
    run_main(main, Config)
