r"""What a reply says is its answer, by rules, and what it scores: for benchmarks, never for RL.

    reply ─after </think>─▶ tail ─rules─▶ (status, answer, rule) ─reward.grade─▶ 0 or 1

RL pays only for the last \boxed{}; a benchmark also asks models that end on "Answer: C", "The
answer is (C) 12 cm", "**C**" or "so it is yes". The first rule that finds something decides: the
last closed box; the last "answer is ..."; the last sentence, where it names one option, says yes or
gives a value; "I'm unable to view the image", a refusal.

Nothing is guessed: no letter is drawn, no "A" of "A cube" or "I" of "I think" is an option, nothing
is nearest. Two letters joined by "or", a negation, yes at the start and no at the end: `unparsed`,
and wrong. A thought that never closes is unparsed too, whatever stands in it. Chinese replies
to choices are read where they conclude: 答案是C, 所以选C, 选项B, 故选：D.
"""

import re
from typing import NamedTuple

import reward

LABELS = "ABCDEFGHIJ"  # of options; MMMU-Pro has ten
WINDOW = 8_000  # characters at the end that are read for a statement: one further up is none
STATEMENTS = 8  # last places of "answer is" that are looked at
PIECE = 400  # characters of a text that may be an option


class Verdict(NamedTuple):
    score: float | None  # None before it is graded, and where the gold cannot be read
    status: str  # ok | truncated | empty | unparsed | refused
    answer: str | None  # None unless ok; "C", "A, C", "yes", or the text as it stands
    rule: str  # which rule decided, for audits


TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf)\s?\{([^{}]{0,300})\}")
MARKUP = re.compile(r"\*\*|__|`|\\[()\[\]]|\$\$|^[ \t]*(?:#+|>|[-*•](?=\s))", re.M)
BOLD_LETTER = re.compile(r"\*\*\s?\(?([A-J])\)?[.:]?\s?\*\*")
WIDE = str.maketrans("（）：，。", "():,.")
SENTENCE_END = re.compile(r"(?<!\b[A-Z])[.!?][\"'”)]?(?:\s+|$)|\n|</")  # not at a label, A. 12 cm
MARKS = " \t\n*\"'“”;,:!"  # around an answer; no stop before it: .5


def conclusion(reply: str) -> str | None:
    """The tail, behind the last </think>; None if a thought opens there and never closes."""
    tail = reply.rpartition("</think>")[2]
    return None if "<think>" in tail else tail.strip()


def plain(text: str) -> str:
    r"""The end of the text without marks of layout: **, \( \), \text{}; a bold letter is (C)."""
    text = BOLD_LETTER.sub(r"(\1)", text[-WINDOW:].translate(WIDE))
    return MARKUP.sub("", TEXT.sub(r"\1", TEXT.sub(r"\1", text))).strip()


def sentences(text: str) -> list[str]:
    """Those of each line; at least one, so that the first and the last can be taken."""
    return [part.strip() for part in SENTENCE_END.split(text) if re.search(r"\w", part)] or [""]


def trimmed(text: str) -> str:
    """Without what encloses an answer: spaces, quotes, dollars, a stop."""
    text = text.lstrip(MARKS).rstrip(MARKS + ".")
    if text.endswith("$") and (text.count("$") == 1 or text.startswith("$")):
        text = text.strip("$")
    return text.lstrip(MARKS).rstrip(MARKS + ".")


# --- reading a piece of text: the answer, None (says nothing), "" (contradicts itself) -----------

LETTER = r"(?:[(\[{]\s?[A-J]\s?[)\]}]|[A-J](?![^\W一-龥]|['’²-]))"
LETTERS = re.compile(rf"{LETTER}(?:(?:,? and\b|,) ?{LETTER})*")  # (A), (C), and (D)
ANOTHER = re.compile(rf"(?:,? (?:or|and)\b|,|/)(?: maybe| option)? ?{LETTER}")
LEAD = re.compile(
    r"(?i)(?:(?:so|thus|hence|therefore)\b,? ?)?(?:both )?(?:the )?(?:(?:correct|right|best) )?"
    r"(?:(?:option|choice|answer)s?\b)?:? ?"
)
FOLLOWS = re.compile(  # nothing, a label's mark, a reason, a verdict: not "A is the midpoint"
    r"\s*(?:$|[,.:;)(\"”–—-]|(?:but )?not\b|是?(?:正确|对)|,? ?(?:because|since|which)\b"
    r"|(?:is|are|would be) (?:the )?(?:correct|right|best|most|closest)\b)"
)
NEGATED = re.compile(
    r"(?i)\b(?:not|cannot|neither|never|except|incorrect|wrong|eliminat\w+|none)\b|n['’]t\b"
)
MARKED = re.compile(
    r"\(([A-J])\)|\b(?:(?i:option|choice|answer|image|picture|figure|graph|position)s?"
    r"|(?:is|be|choose|pick|with|corresponds to)(?=\s\S+$))\s([A-J])(?![\w'’-])"
)
YES_NO = re.compile(  # not "No dogs"
    r"(?i)(yes|no)(?=\s*(?:$|[,.;:!\"”—–)])|\s+(?:there|the|it|this|that|because|since)\b)"
)
CLAUSE = re.compile(r",? (?:because|since|which|where|as|so)\b|, (?:and|but) | \((?=[a-z ]{3})|;")
VALUE = re.compile(r"[-−]?\s?\\?[$£€]?(?:[\d.√π]|\((?!\w\))|\\(?:d?frac|sqrt|pi)\b)[^=:;?!]{0,80}")
ABOUT = r"(?i:approximately|about|around|roughly|≈|~)\s*"
BEFORE_VALUE = re.compile(rf"\b(?:is|are|be|to|of)\b|=|\\approx|:(?=\s|$)|{ABOUT}")
NO_ANSWER = re.compile(r"(?i)(?:(?:in)?correct|right|wrong|clear)\b")  # "this answer is correct"
WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")


def only(answers: set[str]) -> str | None:
    """The one answer; None of none, "" of several: they contradict each other."""
    return answers.pop() if len(answers) == 1 else "" if answers else None


def option_of(text: str, choices) -> str | None:
    """The letter of the one option that has this text or value."""
    if not choices or not 0 < len(text) <= PIECE:
        return None
    try:
        return only({*reward.letter_of(reward.clean(text), tuple(choices))})
    except (reward.Unparsed, reward.TooBig):
        return None


def read_choice(text: str, choices) -> str | None:
    """Letters for (C), C. 12 cm, option C, c, the text of an option; "A, C" for several. Behind
    them stands nothing, or a mark, a reason, the option's text."""
    text, labels = trimmed(text), LABELS[: len(choices or LABELS)]
    if (alone := text.strip("([{ }])")) in [*labels]:  # the text of an option may be d
        return alone
    if letter := option_of(text, choices):
        return letter
    text = text[LEAD.match(text).end() :]
    text = re.sub(r"^\(?[a-j](?=\)|$)", lambda lower: lower[0].upper(), text)
    match = LETTERS.match(text)
    letters = re.findall("[A-J]", match[0]) if match else []
    if letters and {*letters} <= {*labels}:
        rest = text[match.end() :]
        if ANOTHER.match(rest):
            return ""
        if FOLLOWS.match(rest) or option_of(trimmed(rest), choices) == letters[-1]:
            return ", ".join(sorted({*letters}))
    return option_of(read_yes_no(text) or "", choices)


def read_yes_no(text: str, choices=None) -> str | None:
    text = trimmed(text)
    match = YES_NO.match(text, LEAD.match(text).end())
    return match[1].lower() if match else None


def read_free(text: str, choices=None) -> str | None:
    """The text up to a reason or a remark; of a whole sentence, "the area is 24", the value."""
    text = trimmed(CLAUSE.split(text, maxsplit=1)[0])
    value = stated_value(text) if len(WORD.findall(text)) > 2 else None
    text = value or re.sub(rf"^{ABOUT}", "", text)
    return None if not text or len(text) > 200 or NO_ANSWER.match(text) else text


def stated_value(sentence: str) -> str | None:
    r"""X, or the X of "is X" or "= X" at its end: 12, 5\sqrt{3}, 7 square metres, no more words."""
    value = trimmed(BEFORE_VALUE.split(trimmed(sentence.split(" because")[0]))[-1])
    return value if VALUE.fullmatch(value) and len(WORD.findall(value)) <= 3 else None


# --- rules, from the most explicit to the least, and the verdict ---------------------------------

ANSWER = re.compile(  # Answer: ..., the correct option among these is ..., 答案是..., 故选...
    r"(?i)(?:<answer>|答案[是为:]|(?<![不没排除])选[项择]?[是为]?:?(?=\s?\(?[A-J])"
    r"|\b(?:ans(?:wers?)?|(?:correct|right|best|final|closest) (?:option|choice|value))\b"
    r"(?: (?:choice|option))?(?:[\"'>)*]{0,3}\s?[:=]"
    r"|(?:(?:,| (?:to|for|of|that|in|among|here|i|we)\b)(?:[^.:\n]|\.\d){0,80}?)?"
    r" (?:is|are|(?:would|should|must|will) be)\b))"
    r"[\s:\"'“*]*(?:(?:therefore|thus|(?:most )?likely|probably)\b[\s:,]*)?"
)
ITEM = re.compile(r"\(?[A-J][.):]+\s*")
CONCLUDES = re.compile(
    r"(?i)\b(?:therefore|thus|hence|so|correct|best|answer|choose|select)\b"
    r"|(?:\([A-J]\)|\b(?-i:[A-J]))\W*$"
)
CLOSING = re.compile(r"(?i)(?:\b(?:is|be|so|say)|:) \"?(yes|no)\W*$")
REFUSES = re.compile(
    r"(?i)\bi(?:['’]m| am)? (?:can['’]?t|cannot|unable|not able)\b"
    r"|\bcannot be (?:determined|answered)\b"
)


READERS = {"choice": read_choice, "yes/no": read_yes_no, "free": read_free}


def box(tail: str, kind: str, choices) -> str | None:
    """The last closed box, as RL reads it; its letter or its yes where one can be made out."""
    try:
        status, content = reward.extract(tail)
    except reward.TooBig:
        return ""
    if status == "no_box":
        return None
    content = "" if status else content.strip("= \n")
    answer = READERS[kind](plain(content), choices) if kind != "free" else None
    return content if answer is None else answer


def stated(text: str, kind: str, choices) -> str | None:
    """What the last "answer is" gives; passed are those that say nothing, "the answer is clear"."""
    ends = [match.end() for match in ANSWER.finditer(text)][-STATEMENTS:]
    answers = (READERS[kind](sentences(text[end:])[0], choices) for end in reversed(ends))
    return next((answer for answer in answers if answer is not None), None)


def concluded(text: str, kind: str, choices) -> str | None:
    """Of a choice, the last sentence is an option, or names one and concludes, or states its value.
    Start and end agree on yes or no. The last sentence gives a value; or all is a few words."""
    *before, last = sentences(text)
    if kind == "yes/no":
        closing = CLOSING.search(last)
        end = closing[1].lower() if closing else read_yes_no(last)
        return only({read_yes_no(before[0] if before else last), end} - {None})
    if kind == "free":
        is_short = not before and len(text) <= 80 and not REFUSES.search(text)
        return stated_value(last) or (trimmed(last) if is_short else None)
    if ITEM.match(last) and any(map(ITEM.match, before)):  # the options themselves
        return None
    letters, marks = read_choice(last, choices), [*MARKED.finditer(last)]
    is_sole = len({mark[1] or mark[2] for mark in MARKED.finditer(text)}) == 1
    if letters is None and (is_sole or CONCLUDES.search(last)) and not NEGATED.search(last):
        listed = any(ANOTHER.match(last, mark.end()) for mark in marks)  # options B and C
        letters = "" if listed else only({mark[1] or mark[2] for mark in marks})
    return option_of(stated_value(last) or "", choices) if letters is None else letters


def extract(reply: str, *, choices=None, kind: str | None = None) -> Verdict:
    """The answer that a reply gives. `choices`: texts of the options, A to J where there are none;
    `kind`: one of READERS. Never raises on a reply."""
    kind, tail = kind or ("choice" if choices else "free"), conclusion(reply)
    if tail is None:
        return Verdict(None, "unparsed", None, "unfinished thought")
    if not tail:
        return Verdict(None, "empty", None, "nothing after the thought")
    text = plain(tail)
    rules = (("box", box, tail), ("answer", stated, text), ("conclusion", concluded, text))
    for name, rule, where in rules:
        answer = rule(where, kind, choices)
        if answer is not None:
            return Verdict(None, "ok" if answer else "unparsed", answer or None, name)
    if REFUSES.search(text):
        return Verdict(None, "refused", None, "refusal")
    return Verdict(None, "unparsed", None, "no rule")


def grade(gold, reply, *, choices=None, precision=None, kind=None, finish="stop") -> Verdict:
    """Does the reply give the gold? Of an irrational gold 6 right digits are enough. `finish`: why
    the reply ended; "length" is truncated, and wrong whatever stands in it. A gold that cannot be
    read scores None: then the item is at fault, not the reply."""
    verdict = Verdict(None, "truncated", None, "finish")
    if finish != "length":
        is_choice = choices or re.fullmatch(r"\(?[A-J]\)?(?:, ?[A-J])*", gold.strip())
        is_yes_no = gold.strip(" .").lower() in ("yes", "no")
        kind = kind or ("choice" if is_choice else "yes/no" if is_yes_no else "free")
        verdict = extract(reply, choices=choices, kind=kind)
    if reward.read_gold(gold)[1] is None:
        return verdict._replace(rule="unreadable gold")
    if verdict.status != "ok":
        return verdict._replace(score=0.0)
    boxed = f"\\boxed{{{verdict.answer}}}"
    score, status, whole = reward.grade(gold, boxed, choices=choices, precision=precision, digits=6)
    is_words = status == "unparsed" and "\\" not in TEXT.sub("", verdict.answer)  # no mathematics
    if whole != verdict.answer or not (is_words or status in ("match", "mismatch")):
        return verdict._replace(score=0.0, status="unparsed", answer=None)
    return verdict._replace(score=score)
