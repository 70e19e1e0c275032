r"""Rules for rows: what cannot teach, or cannot be graded. Each has a name, which is its reason.

    judge(row) ──▶ (number of the first rule that applies, its detail), or (0, "")

The paper (OVR, sec. 3.3) says that "rules and models find unwanted patterns" and gives none: the
rules, their order and their constants are ours. A rule takes a row, {"prompt", "images"?,
"response"?, "answer"?, "choices"?, "precision"?, "folder"}, and says what is wrong, or None. It is
asked only where the row has the columns it needs: a problem without a response is asked whether its
answer can be graded, a trace also whether it thinks, stops, and boxes the answer.

Better to keep a doubtful row than to lose an honest one: patterns are narrow, and what they must
not hit (the power set of a Hebrew letter, "I'm sorry, I made a mistake", a table of cases) stands
in tests/test_curate.py beside what they must. To change what is dropped, add a function to RULES.
"""

import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from curation.alike import DAMAGED, fingerprint, runs
from reward import extract, grade

MIN_THOUGHT = 100  # characters: a thought of less than some 20 words teaches to skip it
MAX_RESPONSE = 4 * 65_536  # characters; mathematics has 2 to 4 a token: surely over 64k tokens
MAX_PROMPT = 20_000  # characters; longer ones are documents, not questions
MAX_GOLD = (200, 10)  # characters, words: longer golds are sentences that no reply matches
LOOP_ZLIB = 0.1  # compressed / plain size; of real replies 0.16 to 0.6, of a table of cases 0.2
LOOP_TAIL = 4_000  # characters at the end looked at alone: a long response ends in a loop
LOOP_WORDS, LOOP_SHARE = 16, 0.4  # share of runs of 16 words that stood there before

MARKUP = re.compile(r"<\|[a-z_]+\|>")  # of the chat; data.py refuses rows that hold it
MOJIBAKE = re.compile(
    "[\ufffd\x80-\x9f\ud800-\udfff]"  # the replacement character, control codes, half a character
    "|â€|âˆ|ï»¿|ï¿½|Ï€|Î[±-»]|[ÃÂ][\xa0-\xaa\xac-\xba\xbc-\xbf]"  # UTF-8 as Latin-1, not «MAÇÃ»
)
SCRIPTS = {  # runs, for one letter is a symbol: the group Ш, the power set of ℵ
    "CJK": re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]{2}"),
    "Cyrillic": re.compile("[\u0400-\u04ff]{3}"),
    "Arabic": re.compile("[\u0600-\u06ff]{3}"),
    "Hebrew": re.compile("[\u0590-\u05ff]{3}"),
    "Indic or Thai": re.compile("[\u0900-\u0eff]{3}"),
}
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
OPEN, CLOSE = re.compile(r"(?<!\\)\\\["), re.compile(r"(?<!\\)\\\]")  # but \\[4pt] is a new line


def malformed(row: dict) -> str | None:
    """Text is missing, holds markup of the chat, or a column has a type that data.py refuses."""
    texts = [row["prompt"], *([row["response"]] if "response" in row else [])]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        return "prompt or response is not a text"
    if found := MARKUP.search("\n".join(texts)):
        return found[0]
    images, choices, precision = (row.get(name) for name in ("images", "choices", "precision"))
    for name, value, kind in (("images", images, str), ("choices", choices, str | int | float)):
        if value is not None and not (
            isinstance(value, list) and all(isinstance(item, kind) for item in value)
        ):
            return f"{name} is {value!r:.80}"
    if choices == [] or (precision is not None and type(precision) not in (int, float)):
        return f"choices {choices!r}, precision {precision!r:.80}"
    if type(row.get("answer", "")) not in (str, int, float):
        return f"answer is {row['answer']!r:.80}"
    markers, images = row["prompt"].count("<image>"), len(images or [])
    return f"{markers} markers for {images} pictures" if markers not in (0, images) else None


def mojibake(row: dict) -> str | None:
    """Characters that were decoded wrongly: the model would learn to write them."""
    found = MOJIBAKE.search(row["prompt"]) or MOJIBAKE.search(row.get("response", ""))
    return repr(found.string[max(0, found.start() - 10) : found.end() + 10]) if found else None


def degenerate_length(row: dict) -> str | None:
    """A prompt of one word without a picture, a thought of a few words, more than fits a pack."""
    prompt, response = row["prompt"], row.get("response")
    if len(prompt) > MAX_PROMPT or (not row.get("images") and len(prompt.split()) < 2):
        return f"prompt of {len(prompt)} characters"
    if response is None or MIN_THOUGHT <= len(response) <= MAX_RESPONSE:
        return None
    return f"response of {len(response)} characters"


def bad_thought(row: dict) -> str | None:
    """Not exactly one <think>...</think>, at the start, with a thought in it."""
    response = row["response"].lstrip()
    opened, closed = response.count("<think>"), response.count("</think>")
    if (opened, closed) != (1, 1) or not response.startswith("<think>"):
        where = "" if response.startswith("<think>") else ", not at the start"
        return f"{opened} <think>, {closed} </think>{where}"
    thought = len(response) - len("<think></think>") - len(conclusion(response))
    return None if thought >= MIN_THOUGHT else f"thought of {thought} characters"


def no_box(row: dict) -> str | None:
    r"""No closed \boxed{} after the thought: nothing that stage 2 could reward."""
    status, box = extract(conclusion(row["response"]))
    return status or (None if box.strip() else "empty box")


def refusal(row: dict) -> str | None:
    """The response declines, or says that it sees no picture."""
    found = REFUSAL.search(row["response"])
    return found[0] if found else None


def truncated(row: dict) -> str | None:
    """The response stops in the middle of a sentence, a formula or a code block."""
    end = conclusion(row["response"]).rstrip()
    opened = len(OPEN.findall(end)) - len(CLOSE.findall(end))
    if end.count("```") % 2 or end.count("$$") % 2 or opened > 0:
        return "an open block"
    return repr(end[-20:]) if CUT.search(end) else None


def repetition(row: dict) -> str | None:
    """The response goes round in a loop, as a whole or at its end."""
    response = row["response"]
    for part in (response, response[-LOOP_TAIL:]):
        plain = part.encode()
        ratio = len(zlib.compress(plain, 1)) / len(plain)
        if len(plain) >= 1000 and ratio < LOOP_ZLIB:
            return f"zlib {ratio:.2f}"
    grams = runs(response.split(), LOOP_WORDS)
    share = 1 - len(np.unique(grams)) / len(grams) if len(grams) >= 100 else 0.0
    return f"{share:.2f} of runs of {LOOP_WORDS} words" if share > LOOP_SHARE else None


def mixed_script(row: dict) -> str | None:
    """The response falls into a script in which the question is not written."""
    if row["response"].isascii():
        return None
    for name, pattern in SCRIPTS.items():
        found = pattern.search(row["response"])
        if found and not pattern.search(row["prompt"]):
            return f"{name}: {found[0]}"
    return None


def proof(row: dict) -> str | None:
    """The problem asks for a proof and for nothing else: no box holds one."""
    found = PROOF.search(row["prompt"])
    return found[0] if found and not ASKS.search(row["prompt"]) else None


def unjudgeable(row: dict) -> str | None:
    """The matcher would not even accept the gold as an answer to itself, or the gold is prose."""
    gold, choices = str(row.get("answer", "")).strip(), row.get("choices")
    if not gold or NO_GOLD.fullmatch(gold):
        return f"gold {gold!r}"
    words = len(re.findall(r"(?<![\\A-Za-z])[A-Za-z]{3,}", gold))
    if len(gold) > MAX_GOLD[0] or (words > MAX_GOLD[1] and not choices):
        return f"gold of {len(gold)} characters, {words} words"
    options = {"choices": choices, "precision": row.get("precision")}
    verdict = grade(gold, f"\\boxed{{{gold}}}", **options)
    return None if verdict.score == 1 else f"gold {gold!r}: {verdict.status}"


def leak(row: dict) -> str | None:
    """The prompt gives the reference away: "Answer: 42". That 42 occurs in it is no leak."""
    if not GIVEN.search(row["prompt"]):
        return None
    gold = r"\s*".join(map(re.escape, str(row["answer"]).replace(" ", "").strip("$.")))
    # not "Answer: 32.5", "Answer: yes or no", "if the answer is 32, then"
    end = r"[\s$*)}\]]*(?:\.(?!\d)|\n|$)"
    found = re.search(GIVEN.pattern + r"[\s$*({\[]*" + gold + end, row["prompt"], re.I)
    return repr(found[0]) if found else None


def wrong_box(row: dict) -> str | None:
    """The box does not hold the reference: the response, or the reference, is wrong."""
    options = {"choices": row.get("choices"), "precision": row.get("precision")}
    verdict = grade(str(row["answer"]), conclusion(row["response"]), **options)
    return None if verdict.score == 1 else f"box {verdict.answer!r:.80}, gold {row['answer']!r:.80}"


def lost_picture(row: dict) -> str | None:
    """A picture is missing or cannot be read. (Looked at last: it costs the most.)"""
    for name in row.get("images") or []:
        try:
            fingerprint(str(Path(row["folder"], name)))
        except DAMAGED as error:
            return f"{name}: {error}"
    return None


class Rule(NamedTuple):
    find: Callable[[dict], str | None]
    needs: tuple[str, ...] = ()  # columns without which the rule is not asked

    @property
    def name(self) -> str:
        return self.find.__name__

    @property
    def why(self) -> str:
        return self.find.__doc__.split("\n")[0]


RESPONSE, ANSWER = ("response",), ("answer",)
RULES = (  # in this order: the first that applies is the reason; cheap ones first
    Rule(malformed),
    Rule(mojibake),
    Rule(degenerate_length),
    Rule(bad_thought, RESPONSE),
    Rule(no_box, RESPONSE),
    Rule(refusal, RESPONSE),
    Rule(truncated, RESPONSE),
    Rule(mixed_script, RESPONSE),
    Rule(proof, ANSWER),
    Rule(unjudgeable, ANSWER),
    Rule(leak, ANSWER),
    Rule(wrong_box, (*RESPONSE, *ANSWER)),
    Rule(repetition, RESPONSE),
    Rule(lost_picture, ("images",)),
)


def conclusion(response: str) -> str:
    """What stands after the last </think>."""
    return response.rpartition("</think>")[2]


def judge(row: dict) -> tuple[int, str]:
    """(number of the first rule that applies, counted from 1, and its detail), or (0, "")."""
    for number, rule in enumerate(RULES, 1):
        if all(row.get(column) is not None for column in rule.needs):
            if detail := rule.find(row):
                return number, detail
    return 0, ""
