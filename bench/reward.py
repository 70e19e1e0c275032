r"""The answer matcher against others, in one run; and a million attacks on it.

    python bench/reward.py                          # ours, strings, math-verify if installed
    python bench/reward.py --cases my.jsonl         # other labelled pairs: gold, response, label
    python bench/reward.py --fuzz 1000000           # so many random and mutated inputs
    python bench/reward.py --golds a.jsonl b.jsonl  # every `answer` against itself, in other styles

math-verify is no part of the project: `pip install math-verify==0.9.0 tyro tqdm` into an
environment of its own, and run this file with its python.

Accuracy stands twice: over the pairs as they are, every kind as often as it was written, and with
each kind of gold as often as in real sets (MIX). Microseconds are of one process's CPU time, each
pair once, golds not cached before; a ratio within a run says more than a figure. Memory is the
growth of the peak resident size while it grades.
"""

import json
import random
import re
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import reward  # noqa: E402


@dataclass(frozen=True)
class Config:
    cases: tuple[str, ...] = (str(ROOT / "tests" / "reward_pairs.jsonl"),)  # labelled pairs
    golds: tuple[str, ...] = ()  # JSONL files whose golds are graded against themselves
    fuzz: int = 0  # inputs; 0 compares matchers instead
    seed: int = 0  # of the fuzzer


def ours(case: dict) -> float:
    options = {key: case[key] for key in ("choices", "precision", "digits") if key in case}
    return reward.grade(case["gold"], case["response"], **options).score


def strings(case: dict) -> float:
    """What most training scripts do: the last box, a few styles removed, then ==."""

    def plain(text: str) -> str:
        text = re.sub(r"\\(left|right|,|!|;|\s)|\$|\s", "", text).replace("dfrac", "frac")
        return re.sub(r"\\(?:text|mathrm)\{(.*?)\}", r"\1", text).rstrip(".").lower()

    status, box = reward.extract(case["response"])
    return float(not status and plain(box) == plain(case["gold"]))


def math_verify() -> Callable[[dict], float] | None:
    """Math-Verify as its authors set it up for boxed answers; None if it is not installed."""
    try:
        from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
    except ImportError:
        return None
    latex = LatexExtractionConfig(boxed_match_priority=0)

    def score(case: dict) -> float:
        gold = parse(f"${case['gold']}$", [latex, ExprExtractionConfig()])
        answer = parse(case["response"], [latex, ExprExtractionConfig()])
        return float(verify(gold, answer))

    return score


MIX = {  # share of golds in MATH, ORZ and MMK12, by what the gold is
    "integer": 0.63, "fraction or decimal": 0.15, "expression": 0.12, "list or tuple": 0.05,
    "words or unit": 0.04, "equation": 0.01,
}  # fmt: skip


def kind_of(gold: str) -> str:
    if re.fullmatch(r"-?[0-9]+", gold.replace(",", "").strip("$ ")):
        return "integer"
    if re.fullmatch(
        r"-?(\\d?frac *\{ *[0-9]+ *\} *\{ *[0-9]+ *\}|[0-9]+/[0-9]+|[0-9]*\.[0-9]+)", gold
    ):
        return "fraction or decimal"
    if re.search(r"[=<>]|\\[lg]eq?\b|\\in\b|\\neq?\b", gold):
        return "equation"
    if re.search(
        r"\\text|\\mathrm|[A-Za-z]{3}|[%$]|\^\\circ",
        re.sub(r"\\(?!text|mathrm)[A-Za-z]+", "", gold),
    ):
        return "words or unit"
    return "list or tuple" if re.search(r"[,;]|\\pm|\\cup", gold) else "expression"


def compare(cases: list[dict]):
    matchers = {"reward.py": ours, "string only": strings, "Math-Verify": math_verify()}
    print(f"{len(cases)} labelled pairs, {sum(c['label'] > 0 for c in cases)} of them right\n")
    print("| matcher | accuracy | in the mix of real golds | false positives | false negatives "
          "| p50 us | p99 us | slowest ms | MB |")  # fmt: skip
    print("|---" * 9 + "|")
    for name, matcher in matchers.items():
        if matcher is None:
            print(f"| {name} | not installed here |")
            continue
        matcher({"gold": "5", "response": r"\boxed{5.0}"})  # imports and caches
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        times, errors, right, total = [], Counter(), Counter(), Counter()
        for case in cases:
            start = time.process_time()
            try:
                score = matcher(case)
            except Exception as error:
                score, _ = 0.0, print(f"{name} raised {error!r} on {case['gold']!r}")
            times.append((time.process_time() - start) * 1e6)
            errors[score - case["label"]] += 1
            total[kind_of(case["gold"])] += 1
            right[kind_of(case["gold"])] += score == case["label"]
        megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        times.sort()
        mixed = sum(share * right[kind] / max(total[kind], 1) for kind, share in MIX.items())
        print(f"| {name} | {errors[0] / len(cases):.2%} | {mixed:.2%} | {errors[1]} | {errors[-1]} "
              f"| {statistics.median(times):,.0f} | {times[int(0.99 * len(times))]:,.0f} "
              f"| {times[-1] / 1e3:,.1f} | {megabytes:.1f} |", flush=True)  # fmt: skip
    stream = realistic(cases)
    times = []
    for case in stream:
        start = time.process_time()
        ours(case)
        times.append((time.process_time() - start) * 1e6)
    times.sort()
    print(f"\na stream as RL sees it ({len(stream)} samples, 16 a gold, three golds of four whole "
          f"numbers, 6,000 characters of reasoning): p50 {statistics.median(times):.1f} us, "
          f"p99 {times[int(0.99 * len(times))]:.0f} us")  # fmt: skip


def realistic(cases: list[dict]) -> list[dict]:
    """16 samples a problem, half of them right; three golds of four are whole numbers."""
    rng = random.Random(0)
    thought = (
        "<think>" + "Let me see: the sum is $x + y = 12$, so I try again. " * 120 + "</think> "
    )
    stream = []
    for at in range(400):
        case = rng.choice(cases)
        if at % 4:
            gold = str(rng.randrange(1_000))
            boxes = [gold, str(rng.randrange(1_000))]
        else:
            gold, boxes = case["gold"], [case["gold"], reward.extract(case["response"])[1] or "7"]
        stream += [{"gold": gold, "response": f"{thought}\\boxed{{{rng.choice(boxes)}}}"}
                   for _ in range(16)]  # fmt: skip
    return stream


def restyled(gold: str) -> dict[str, str]:
    """The same answer as other people would write it."""
    styles = {"plain": gold, "dfrac": gold.replace("\\frac", "\\dfrac"), "dollars": f"${gold}$"}
    brackets = re.sub(
        r"(?<!\\right)(?<!\\)\)", r"\\right)", re.sub(r"(?<!\\left)(?<!\\)\(", r"\\left(", gold)
    )
    styles["left right"] = brackets if "\\left" not in gold else gold
    styles["spaces"] = re.sub(r"([=+])", r" \1 ", gold)
    if not re.search(r"[=<>]|\\in|\\text|[A-Za-z]{3}|^\W*[A-Z]\W*$", gold):
        styles["x ="] = f"x = {gold}"
    return styles


def self_match(paths: tuple[str, ...]):
    total, misses = 0, []
    for path in paths:
        for line in Path(path).read_text().splitlines():
            row = json.loads(line)
            gold = str(row["answer"])
            for style, box in restyled(gold).items():
                verdict = reward.grade(gold, f"\\boxed{{{box}}}", choices=row.get("options"))
                total += 1
                if not verdict.score:
                    misses.append((Path(path).name, style, gold[:60], verdict.status))
    for miss in misses:
        print(*miss, sep=" | ")
    print(f"{total} golds and styles, {1 - len(misses) / total:.2%} match themselves")


def mutated(text: str, rng: random.Random, pieces: list[str]) -> str:
    """A few cuts, repetitions and pieces of other cases."""
    for _ in range(rng.randrange(1, 5)):
        at, to = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        way = rng.randrange(5)
        if way < 2:
            text = text[:at] + rng.choice(pieces) + text[to if way else at :]
        else:
            text = text[:at] + ("", text[at:to] * 2, text[at:to] * 40)[way - 2] + text[to:]
    return text[:2_500]


def fuzz(cases: list[dict], count: int, seed: int):
    """Stops at the first input that raises, costs a quarter second of CPU, or has a score that its
    status denies; prints every pair that was paid, to be looked at, and the slowest."""
    marker = Path(tempfile.mkdtemp()) / "executed"
    rng, slowest, statuses = random.Random(seed), (0.0, ""), Counter()
    boxes = [case["response"].rpartition("\\boxed{")[2].partition("$")[0][:200] for case in cases]
    golds = [case["gold"] for case in cases]
    pieces = [*"\\{}()[]|^_=<>,;:%$!&'`\"", "\n", "\\frac", "\\sqrt", "\\text{", "\\pm", "\\cup",
              "\\begin{pmatrix}", "\\log", "^{", "or", "9" * 40, "x", "\\overline{3}", "\\boxed{",
              "½", "²", "−", *(b[:20] for b in boxes[:300]),
              f"__import__('os').system('touch {marker}')", f"open('{marker}', 'w')"]  # fmt: skip
    warnings.simplefilter("error")  # the net of grade warns when it catches something
    for _ in tqdm(range(count), unit=" inputs", disable=None):
        gold, box = rng.choice(golds), mutated(rng.choice(boxes), rng, pieces)
        gold = mutated(gold, rng, pieces) if rng.random() < 0.2 else gold
        choices = ("1", "x", "B") if len(gold) == 1 else None
        start = time.process_time()
        verdict = reward.grade(gold, f"\\boxed{{{box}}}", choices=choices)
        seconds = time.process_time() - start
        slowest = max(slowest, (seconds, f"gold {gold!r}, box {box!r}"[:400]))
        statuses[verdict.status] += 1
        if verdict.score:
            tqdm.write(f"paid: {gold!r} for {box!r}")
        assert verdict.status in reward.STATUSES and verdict.score == (verdict.status == "match")
        assert seconds < 0.25, f"{seconds:.2f} s of CPU: {gold!r} {box!r}"
    assert not marker.exists(), "a payload was executed"
    print(f"{count} inputs: {dict(statuses)}; slowest {slowest[0] * 1e3:.0f} ms, {slowest[1]}")


def main(cfg: Config):
    cases = []
    for path in cfg.cases:
        cases += [json.loads(line) for line in Path(path).read_text().splitlines()]
    if cfg.golds:
        self_match(cfg.golds)
    elif cfg.fuzz:
        fuzz(cases, cfg.fuzz, cfg.seed)
    else:
        compare(cases)


if __name__ == "__main__":
    main(tyro.cli(Config))
