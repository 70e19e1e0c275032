r"""What a reply says is its answer, by rules, and what it scores: for benchmarks, never for RL.

    reply ─after </think>─▶ tail ─rules─▶ (status, answer, rule) ─reward.grade─▶ 0 or 1

RL pays only for the last \boxed{}; a benchmark also asks models that end on "Answer: C", "The
answer is (C) 12 cm", "**C**" or "so it is yes". Rules go from the most explicit to the least, and
the first one that finds something decides:

 1. box         the last closed \boxed{}
 2. answer      the last "answer is ..." or "Answer: ...": the sentence that follows
 3. conclusion  the last sentence names one option or is its text, or yes or no; "Yes, ..." first
 4. refusal     "I'm sorry, I can't ...", "I'm unable to view the image"
 5. value       the last line is a value, or ends in "is 84"; the whole reply is a few words

Nothing is guessed: no letter is drawn, no "A" of "A cube" or "I" of "I think" is an option, nothing
is nearest. Two letters joined by "or", a negation, yes at the start and no at the end: `unparsed`,
and wrong. A thought that never closes is unparsed too, whatever stands in it. Each answer carries
the name of its rule, so that a table of right answers by rule can be looked into. Chinese replies
to choices are read where they conclude: 答案是C, 所以选C, 选项B, 故选：D.
"""

import re
import string
from typing import NamedTuple

import reward

KINDS = ("choice", "yes/no", "free")
WINDOW = 8_000  # characters at the end that rules 2 to 5 read: an answer further up is none
STATEMENTS = 8  # last places of "answer is" that are looked at
PIECE = 400  # characters behind "the answer is" that may belong to it
LABELS = string.ascii_uppercase[:10]  # options where none are given; MMMU-Pro has ten


class Extraction(NamedTuple):
    """What a reply says is its answer; `answer` is None unless the status is ok."""

    status: str  # ok | empty | unparsed | refused
    answer: str | None  # "C", "A, C", "yes", or the text as it stands
    rule: str  # which rule decided, for audits


class Verdict(NamedTuple):
    """reward.Verdict with a benchmark's statuses; the score is None if the gold is at fault."""

    score: float | None
    status: str  # ok | truncated | empty | unparsed | refused
    answer: str | None
    rule: str


# --- 1. the text that counts ---------------------------------------------------------------------

TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathbb|bf|rm)\s?\{([^{}]{0,300})\}")
MARKUP = re.compile(r"\*\*|__|`|\\[()\[\]]|\$\$|^[ \t]*(?:#+|>|[-*•](?=\s))", re.M)
BOLD_LETTER = re.compile(r"\*\*\s?\(?([A-J])\)?[.:]?\s?\*\*")
WIDE = str.maketrans("（）：，。", "():,.")
SENTENCE_END = re.compile(
    r"(?<!\b[A-Z])(?<!Dr)(?<!Mr)(?<!St)(?<!No)(?<!vs)(?<!approx)[.!?。][\"'”)]?(?:\s+|$)"
)


def conclusion(reply: str) -> str | None:
    """The tail, behind the last </think>; None if a thought opens there and never closes."""
    tail = reply[reply.rfind("</think>") + len("</think>") :] if "</think>" in reply else reply
    return None if "<think>" in tail else tail.strip()


def plain(text: str, kind: str) -> str:
    r"""The end of the text without marks of layout: **, \( \), \text{}; a bold letter is (C)."""
    text = text[-WINDOW:].translate(WIDE)
    text = BOLD_LETTER.sub(r"(\1)", text) if kind == "choice" else text
    return MARKUP.sub("", TEXT.sub(r"\1", TEXT.sub(r"\1", text))).strip()


def lines_of(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if re.search(r"\w", line)]


def sentences(line: str) -> list[str]:
    return [part.strip() for part in SENTENCE_END.split(line) if part.strip()] or [line]


def trimmed(text: str) -> str:
    """Without what encloses an answer: spaces, quotes, dollars, a stop, a bracket too many."""
    text = text.strip(" \t\n*\"'“”.;,:!。")
    for opening, closing in ("{}", "()", "[]"):
        if text.endswith(closing) and text.count(closing) > text.count(opening):
            text = text[:-1]
    if text.endswith("$") and (text.count("$") == 1 or text.startswith("$")):
        text = text.strip("$")
    return text.strip(" \t\n\"'“”.;,:!。")


# --- 2. reading a piece of text: the answer, None (says nothing), "" (contradicts itself) --------

LETTER = re.compile(r"[(\[{]\s?([A-Z])\s?[)\]}]|([A-Z])(?![^\W一-龥]|['’²-])")
LOWER = re.compile(r"\(?([a-j])(?:\)|$)")
RUN = re.compile(r"(?=[A-J]{2,5}$)A?B?C?D?E?F?G?H?I?J?")  # AC, but not CAB
SO = re.compile(
    r"(?:so|thus|hence|therefore|overall|finally|in (?:short|conclusion))\b[,:]?\s*", re.I
)
NAMED = re.compile(
    r"(?:both )?(?:the )?(?:(?:correct|right|best) )?(?:options?|choices?|letters?)?:? ?", re.I
)
JOINT = re.compile(
    r"\s?(?:(,? ?\bor\b|/)(?: (?:possibly|maybe|perhaps|even))?"
    r"|,? ?\band\b|,|;|&|(?=\())\s?(?:option )?"
)
FOLLOWS = re.compile(  # nothing, a label's mark, a reason, a verdict: not "A is the midpoint"
    r"\s*(?:$|(?<!\bI),|[.:;)(\"'”–—-]|(?:,? ?(?:and|but) )?not\b"
    r"|,? ?(?:rather|instead|because|since|which|due)\b"
    r"|是?(?:正确|对)|(?:is|are|would be|seems?) (?:the )?"
    r"(?:correct|right|best|answer|most|closest|only|odd)\b)"
)
NEGATED = re.compile(
    r"\b(?:not|cannot|neither|never|except|incorrect|wrong|unlike|false|eliminat\w+|none)\b"
    r"|n['’]t\b|\brul\w+ out\b",
    re.I,
)
MARKED = re.compile(
    r"\(([A-J])\)|\b(?:(?i:option|choice|answer|image|picture|figure|diagram|graph|shape|position"
    r"|letter)s?|(?:is|be|choose|pick|with|matches|corresponds to|:)(?=\s\S+$))\s([A-J])(?![\w'’-])"
)
CONCLUDES = re.compile(
    r"\b(?:therefore|thus|hence|so|conclu\w+|consequently|correct|best|answer|choose|choice|select"
    r"|pick|go with|match(?:es)?|corresponds?)\b",
    re.I,
)
YES_NO = re.compile(  # not "No dogs", not "No. 5"
    r"(yes|no)(?=\s*(?:$|[,;:!\"”—–)]|\.(?!\s*\d)|-\s)|\s+(?:there|it|this|that|these|they|the|he"
    r"|she|we|you|because|since|as|i)\b)",
    re.I,
)
CLAUSE = re.compile(  # a reason, a remark in brackets
    r",? (?:because|since|which|where|so|as|given|due to)\b|, (?:and|but|with) | \((?=[a-z ]{3})|;"
)
VALUE = re.compile(
    r"[-+−±]?\s?(?:\\?[$£€])?\s?(?:[\d(√π]|\.\d|\\(?:d?frac|sqrt|pi|pm)\b)[^=:;?!]{0,80}"
)
BEFORE_VALUE = re.compile(r"\b(?:is|are|be|equals|to|of)\b|=|≈|\\approx|:(?=\s|$)")
ABOUT = re.compile(r"(?:approximately|about|around|roughly|equal to|equals|simply|≈|~)\s*", re.I)
NO_ANSWER = re.compile(
    r"(?:correct|right|wrong|incorrect|clear|found|given|obtained|determined|based|shown|below"
    r"|above|in|on|by|as follows|not|that|the one|what|unknown|unclear)\b",
    re.I,
)
ITEM = re.compile(r"\(?[A-J][.):]+\s*")
WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")


def labels_of(choices) -> str:
    return string.ascii_uppercase[: len(choices)] if choices else LABELS


def option_of(text: str, choices) -> str | None:
    """The letter of the one option that has this text or value."""
    if not choices or not 0 < len(text) <= PIECE:
        return None
    try:
        found = reward.letter_of(reward.clean(text), tuple(choices))
    except (reward.Unparsed, reward.TooBig):
        return None
    return next(iter(found), None)


def read_choice(text: str, choices) -> str | None:
    """Letters for (C), C. 12 cm, option C, c, the text of an option; "A, C" for several."""
    text, labels = trimmed(text), labels_of(choices)
    alone = LETTER.fullmatch(text)
    if alone and (alone[1] or alone[2]) in labels:
        return alone[1] or alone[2]
    if letter := option_of(text, choices):
        return letter
    text = NAMED.sub("", SO.sub("", text, count=1), count=1)
    text = LOWER.sub(lambda m: f"({m[1].upper()})", text, count=1) if LOWER.match(text) else text
    if re.match(r"(?:either|neither|not|none)\b", text, re.I):
        return "" if LETTER.search(text) else None
    if RUN.fullmatch(text) and set(text) <= set(labels):
        return ", ".join(text)
    letters = read_letters(text, choices)
    return option_of(read_yes_no(text) or "", choices) if letters is None else letters


def read_letters(text: str, choices) -> str | None:
    """The letters at the start, if nothing follows, or a mark, a reason, the option's text."""
    found, at = [], 0
    while (match := LETTER.match(text, at)) and (match[1] or match[2]) in labels_of(choices):
        found.append(match[1] or match[2])
        joint = JOINT.match(text, match.end())
        if not joint or not LETTER.match(text, joint.end()):
            follows = FOLLOWS.match(text, match.end())
            if not follows and option_of(trimmed(text[match.end() :]), choices) != found[-1]:
                return None
            break
        if joint[1]:
            return ""
        at = joint.end()
    return ", ".join(sorted(set(found))) or None


def marked_letter(sentence: str, choices) -> str | None:
    """The one option that a sentence names; "" for two; None if none, or if it denies one."""
    found = set()
    for match in MARKED.finditer(sentence):
        listed = JOINT.match(sentence, match.end())
        found.add(match[1] or match[2])
        found |= {"?"} if listed and LETTER.match(sentence, listed.end()) else set()
    if not found & set(labels_of(choices)) or NEGATED.search(sentence):
        return None
    return found.pop() if len(found) == 1 else ""


def read_yes_no(text: str) -> str | None:
    text = SO.sub("", trimmed(text), count=1)
    if re.match(r"(?:either )?(?:yes|no) ?(?:or|/) ?(?:yes|no)\b", text, re.I):
        return ""
    match = YES_NO.match(text)
    return match[1].lower() if match else None


def read_free(text: str) -> str | None:
    """The text up to its first clause; of a whole sentence, "the area is 24", the value."""
    text = trimmed(CLAUSE.split(text, maxsplit=1)[0])
    value = stated_value(text) if len(WORD.findall(text)) > 2 else None
    text = value or ABOUT.sub("", text, count=1)
    return None if not text or len(text) > 200 or NO_ANSWER.match(text) else text


def stated_value(sentence: str) -> str | None:
    """X of a sentence that ends in "is X" or "= X"; X is a number or a formula, with its unit."""
    for before in reversed(list(BEFORE_VALUE.finditer(sentence))[-8:]):
        value = ABOUT.sub("", trimmed(sentence[before.end() :]), count=1)
        if is_value(value):
            return value
    return None


def is_value(text: str) -> bool:
    r"""A number or formula, with at most three words behind it: 12, 5\sqrt{3}, 7 square metres."""
    return bool(VALUE.fullmatch(text)) and len(WORD.findall(text)) <= 3 and not NEGATED.search(text)


def read(text: str, kind: str, choices) -> str | None:
    """A piece of text that stands where the answer is given."""
    if kind == "yes/no":
        return read_yes_no(text)
    if kind == "free":
        return read_free(text)
    found = read_choice(text, choices)
    return marked_letter(NEGATED.split(text)[0], choices) if found is None else found


# --- 3. rules, from the most explicit to the least -----------------------------------------------

BE = r"(?:is|are|was|would be|should be|must be|will be|seems to be|appears to be)"
ANSWER = re.compile(
    r"<answer>|答案[是为:]|(?<![不没排除])选[项择]?[是为]?:?(?=\s?\(?[A-J])|\bans(?:\.|\s?[:=])"
    r"|^[ \t]*(?:(?:the|my|final|correct) ){0,3}answers?[ \t]*\n"  # a heading
    r"|\b(?:answers?|(?:correct|right|best|final|closest|nearest) (?:option|choice|result|solution"
    r"|letter|value))\b"
    r"(?: (?:choice|option|letter)\b)?(?:[\"'>)\]*]{0,3}\s?[:=]"
    r"|(?:,[^.:\n]{1,80},"
    r"| (?:to|for|of|that|which|in|among|from|here|i|we)\b(?:[^.:\n]|\.\d){0,80}?)?"
    rf" {BE}\b)",
    re.I | re.M,
)
HYPOTHETICAL = re.compile(
    r"\b(?:if|suppose|assum\w+|whether|unless|(?:might|may|could) (?:think|say))\b[^.\n]{0,30}$",
    re.I,
)
ADVERBS = re.compile(
    r"[\s:\"'“*]*"
    r"(?:(?:clearly|therefore|thus|(?:most )?likely|probably|indeed|simply)\b[\s:,]*)?",
    re.I,
)
PICTURE = r"(?:image|picture|figure|photo)"
REFUSES = re.compile(
    r"\b(?:sorry|apologi[sz]e)\b[^.\n]{0,60}(?:can['’]?t|cannot|unable|not able|don['’]t)"
    r"|\bi(?: can['’]?t| cannot| could not|(?:['’]m| am) (?:unable|not able) to) (?:\w+ ){0,3}?"
    r"(?:(?:assist|help|determine|provide|answer|make|give|comply)\b"
    rf"|(?:see|view|access) (?:(?:the|any|this|your|an) )?(?:contents? of the )?{PICTURE}"
    rf"|(?:identify|analy[sz]e|interpret|process)\b[^.\n]{{0,40}}{PICTURE})"
    r"|\bi (?:do not|don['’]t) have (?:\w+[- ]){0,4}(?:data|access|information|ability|values)\b"
    r"|\bcannot be (?:determined|answered)\b",
    re.I,
)


def boxed(tail: str, kind: str, choices) -> str | None:
    """The last closed box, as RL reads it; its letter or its yes where one can be made out."""
    status, content = reward.extract(tail)
    if status == "no_box":
        return None
    if status or not content.strip("= \n"):
        return ""
    content = content.strip().removeprefix("=")
    found = None if kind == "free" else read(plain(content, kind), kind, choices)
    return content if found is None else found


def answer_line(text: str, kind: str, choices) -> str | None:
    """What the last "answer is" gives; one that gives nothing, "the answer is clear", is passed."""
    for match in reversed(list(ANSWER.finditer(text))[-STATEMENTS:]):
        if HYPOTHETICAL.search(text, max(0, match.start() - 60), match.start()):
            continue
        begin = ADVERBS.match(text, match.end()).end()
        piece = text[begin : begin + PIECE].split("\n")[0].split("</answer>")[0]
        found = read(sentences(piece)[0], kind, choices)
        if found is not None:
            return found
    return None


def concluding(text: str, kind: str, choices) -> str | None:
    """The last sentence names one option; the reply opens or ends with yes or no."""
    lines = lines_of(text)
    if not lines or kind == "free":
        return None
    last = sentences(lines[-1])[-1]
    if kind == "yes/no":
        return first_or_last(lines[0], last)
    whole = None if is_listed(lines) else read_choice(last, choices)
    if whole and NEGATED.search(last) and not option_of(trimmed(ITEM.sub("", last)), choices):
        return None  # "A: wrong"
    named = marked_letter(last, choices)
    ends = re.search(r"(?:\([A-J]\)|\b[A-J])\W*$", last)
    is_sole = len({m[1] or m[2] for m in MARKED.finditer(text)}) == 1
    is_verdict = ends or CONCLUDES.search(last) or is_sole
    return named if not whole and named is not None and is_verdict else whole


def is_listed(lines: list[str]) -> bool:
    """The last line is one of several that begin with the letter of an option."""
    return bool(ITEM.match(lines[-1])) and any(map(ITEM.match, lines[:-1]))


def first_or_last(first: str, last: str) -> str | None:
    """Yes or no at the start, and at the end: "so it is yes", "Hence, no"; both must agree."""
    closing = re.search(r"(?:\b(?:is|be|so|say|a)|:) \"?(yes|no)\W*$", last, re.I)
    ends = closing[1].lower() if closing else read_yes_no(last)
    found = {read_yes_no(first), ends} - {None}
    return found.pop() if len(found) == 1 else "" if found else None


def refusal(text: str, kind: str, choices) -> str | None:
    return "refused" if REFUSES.search(text) else None


def lone_value(text: str, kind: str, choices) -> str | None:
    """The last line is a value, or concludes with one; or the whole reply is a few words."""
    lines = lines_of(text)
    if not lines or kind == "yes/no":
        return None
    last = trimmed(sentences(lines[-1])[-1])
    found = last if is_value(last) else None
    if found is None and ("=" in last or len(lines) == 1 or CONCLUDES.search(last)):
        found = stated_value(last)
    if kind == "free":
        return found or (last if len(lines) == 1 and len(text) <= 80 else None)
    return option_of(found, choices) if found else None


RULES = {
    "box": boxed,
    "answer": answer_line,
    "conclusion": concluding,
    "refusal": refusal,
    "value": lone_value,
}


def extract(reply: str, *, choices=None, kind: str | None = None) -> Extraction:
    """The answer that a reply gives. `choices`: texts of the options; `kind`: one of KINDS.

    Without `kind` it is a choice if there are choices, else free. A choice without `choices` has
    the options A to J; its answer may be several letters, "A, C". Never raises on a reply.
    """
    kind = kind or ("choice" if choices else "free")
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r}: one of {', '.join(KINDS)}")
    tail = conclusion(reply)
    if not tail:
        thought = Extraction("unparsed", None, "unfinished thought")
        return thought if tail is None else Extraction("empty", None, "nothing after the thought")
    text = plain(tail, kind)
    for name, rule in RULES.items():
        try:
            found = rule(tail if name == "box" else text, kind, choices)
        except reward.TooBig:
            found = ""
        if found is not None:
            status = "refused" if name == "refusal" else "ok" if found else "unparsed"
            return Extraction(status, found if status == "ok" else None, name)
    return Extraction("unparsed", None, "no rule")


# --- 4. the verdict ------------------------------------------------------------------------------


def kind_of(gold: str, choices) -> str:
    """What is asked for, as far as options and gold show it."""
    if choices or re.fullmatch(r"\(?[A-J]\)?(?:, ?[A-J])*", gold.strip()):
        return "choice"
    return "yes/no" if gold.strip(" .").lower() in ("yes", "no") else "free"


def grade(gold, reply, *, choices=None, precision=None, kind=None, finish="stop") -> Verdict:
    """Does the reply give the gold? Extraction by the rules above, comparison by reward.grade.

    `finish`: why the reply ended; "length" is truncated, and wrong whatever stands in it. Of an
    irrational gold 6 right digits are enough. A gold that cannot be read scores None: then the item
    is at fault, not the reply.
    """
    status, answer, rule = "truncated", None, "finish"
    if finish != "length":
        status, answer, rule = extract(reply, choices=choices, kind=kind or kind_of(gold, choices))
    if reward.read_gold(gold)[1] is None:
        return Verdict(None, status, answer, "unreadable gold")
    if status != "ok":
        return Verdict(0.0, status, None, rule)
    box = f"\\boxed{{{answer}}}"
    verdict = reward.grade(gold, box, choices=choices, precision=precision, digits=6)
    words = verdict.status == "unparsed" and "\\" not in TEXT.sub("", answer)  # but no mathematics
    if verdict.answer != answer or not (words or verdict.status in ("match", "mismatch")):
        return Verdict(0.0, "unparsed", None, rule)
    return Verdict(verdict.score, "ok", answer, rule)
