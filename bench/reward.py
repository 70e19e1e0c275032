"""The answer matcher against others, in one run; and an hour of attacks on it.

    python bench/reward.py                          # ours, strings, math-verify if installed
    python bench/reward.py --cases my.jsonl         # other labelled pairs: gold, response, label
    python bench/reward.py --fuzz 60                # minutes of coverage-guided fuzzing (atheris)
    python bench/reward.py --golds a.jsonl b.jsonl  # every `answer` against itself, in other styles

math-verify and atheris are no part of the project: `pip install math-verify==0.9.0 atheris==3.0.0`
into an environment of their own, with mpmath and tyro, and run this file with its python.

Microseconds are of one process on one core, each pair once, golds not cached before; a ratio within
a run says more than a figure. Memory is the growth of the peak resident size while it grades.
"""

import json
import random
import re
import resource
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import reward  # noqa: E402


@dataclass(frozen=True)
class Config:
    cases: tuple[str, ...] = (str(ROOT / "tests" / "reward_pairs.jsonl"),)  # labelled pairs
    golds: tuple[str, ...] = ()  # JSONL files whose golds are graded against themselves
    fuzz: float = 0.0  # minutes of fuzzing; 0 compares matchers instead
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


def compare(cases: list[dict]):
    matchers = {"reward.py": ours, "string only": strings, "Math-Verify": math_verify()}
    print(f"{len(cases)} labelled pairs, {sum(c['label'] > 0 for c in cases)} of them right\n")
    print("| matcher | accuracy | false positives | false negatives | p50 us | p99 us | slowest ms "
          "| MB |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
    for name, matcher in matchers.items():
        if matcher is None:
            print(f"| {name} | not installed here |")
            continue
        matcher({"gold": "5", "response": r"\boxed{5.0}"})  # imports and caches
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        times, errors = [], Counter()
        for case in cases:
            start = time.perf_counter()
            try:
                score = matcher(case)
            except Exception as error:
                score, _ = 0.0, print(f"{name} raised {error!r} on {case['gold']!r}")
            times.append((time.perf_counter() - start) * 1e6)
            errors[score - case["label"]] += 1
        megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        times.sort()
        print(f"| {name} | {errors[0] / len(cases):.2%} | {errors[1]} | {errors[-1]} "
              f"| {statistics.median(times):,.0f} | {times[int(0.99 * len(times))]:,.0f} "
              f"| {times[-1] / 1e3:,.1f} | {megabytes:.1f} |", flush=True)  # fmt: skip
    stream = realistic(cases)
    times = []
    for case in stream:
        start = time.perf_counter()
        ours(case)
        times.append((time.perf_counter() - start) * 1e6)
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


def fuzz(cases: list[dict], minutes: float, seed: int):
    """Random and mutated pairs; stops at the first that raises, takes 250 ms of CPU, writes a file,
    or has a score that its status denies. Ends the process: libFuzzer does."""
    import atheris

    with atheris.instrument_imports(include=["reward"]):
        sys.modules.pop("reward")
        import reward as target

    marker = Path(tempfile.mkdtemp()) / "executed"
    slowest, count = 0.0, 0

    def one_input(data: bytes):
        nonlocal slowest, count
        gold, _, response = data.decode("utf-8", "replace").partition("\x00")
        start = time.process_time()
        for box in (response, f"\\boxed{{{response}}}"):
            choices = ("1", "x", "B") if len(gold) == 1 else None
            verdict, _ = target.explain(gold, box, choices)
            assert verdict.status in target.STATUSES
            assert verdict.score == (verdict.status == "match")
        seconds = time.process_time() - start
        count += 1
        if seconds > slowest:
            slowest = seconds
            print(
                f"slowest so far: {seconds * 1e3:.0f} ms, input {count} {data!r:.300}", flush=True
            )
        assert seconds < 0.25, f"{seconds:.2f} s of CPU"
        assert not marker.exists()

    corpus = Path(tempfile.mkdtemp())
    for at, case in enumerate(cases):
        box = case["response"].rpartition("\\boxed")[2][:500]
        (corpus / str(at)).write_text(f"{case['gold']}\x00{box}")
    words = {
        *target.COMMANDS,
        *target.COMMAND_WORDS,
        *target.GREEK,
        "frac",
        "sqrt",
        "boxed",
        "text",
    }
    dictionary = corpus.parent / f"{corpus.name}.dict"
    dictionary.write_text(
        "".join(f'"\\\\{w}"\n' for w in sorted(words) if w.isalpha()) + '"^{"\n"_{"\n'
    )
    flags = [f"-max_total_time={int(minutes * 60)}", f"-seed={seed + 1}", f"-dict={dictionary}"]
    atheris.Setup([sys.argv[0], *flags, "-max_len=600", str(corpus)], one_input)
    atheris.Fuzz()


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
