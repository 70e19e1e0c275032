r"""What a reply says is its answer, by rules, and what it scores: for benchmarks, never for RL.

    reply ─after </think>─▶ tail ─rules─▶ (status, answer, rule) ─reward.grade─▶ 0 or 1

RL pays only for the last \boxed{}; a benchmark also asks models that end on "Answer: C", "The
answer is (C) 12 cm", "**C**" or "so it is yes". The first rule that finds something decides:

 1. box         the last closed \boxed{}
 2. answer      the last "answer is ..." or "Answer: ...": the sentence that follows
 3. conclusion  the last sentence names one option or is its text; "Yes, ..." first, or "so it is
                yes" last; a value, "the area is 84", a whole reply of a few words
 4. refusal     "I'm sorry, I can't ...", "I'm unable to view the image"

Nothing is guessed: no letter is drawn, no "A" of "A cube" or "I" of "I think" is an option, nothing
is nearest. Two letters joined by "or", a negation, yes at the start and no at the end: `unparsed`,
and wrong. A thought that never closes is unparsed too, whatever stands in it. Chinese replies
to choices are read where they conclude: 答案是C, 所以选C, 选项B, 故选：D.
"""

import re
from typing import NamedTuple

import reward

LABELS = "ABCDEFGHIJ"  # of options; MMMU-Pro has ten
WINDOW = 8_000  # characters at the end that rules 2 to 4 read: an answer further up is none
STATEMENTS = 8  # last places of "answer is" that are looked at
PIECE = 400  # characters behind "the answer is" that may belong to it


class Verdict(NamedTuple):
    """reward.Verdict with a benchmark's statuses."""

    score: float | None  # None before it is graded, and where the gold cannot be read
    status: str  # ok | truncated | empty | unparsed | refused
    answer: str | None  # None unless ok; "C", "A, C", "yes", or the text as it stands
    rule: str  # which rule decided, for audits


# --- 1. the text that counts ---------------------------------------------------------------------

TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathbb|bf|rm)\s?\{([^{}]{0,300})\}")
MARKUP = re.compile(r"\*\*|__|`|\\[()\[\]]|\$\$|^[ \t]*(?:#+|>|[-*•](?=\s))", re.M)
BOLD_LETTER = re.compile(r"\*\*\s?\(?([A-J])\)?[.:]?\s?\*\*")
WIDE = str.maketrans("（）：，。", "():,.")
SENTENCE_END = re.compile(
    r"(?<!\b[A-Z])(?<!Dr)(?<!Mr)(?<!St)(?<!No)(?<!vs)(?<!approx)[.!?][\"'”)]?(?:\s+|$)|\n|</"
)
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
    """Without what encloses an answer: spaces, quotes, dollars, a stop, a bracket too many."""
    text = text.lstrip(MARKS).rstrip(MARKS + ".")
    for opening, closing in ("{}", "()", "[]"):
        if text.endswith(closing) and text.count(closing) > text.count(opening):
            text = text[:-1]
    if text.endswith("$") and (text.count("$") == 1 or text.startswith("$")):
        text = text.strip("$")
    return text.lstrip(MARKS).rstrip(MARKS + ".")


# --- 2. reading a piece of text: the answer, None (says nothing), "" (contradicts itself) --------

LETTER = r"(?:[(\[{]\s?[A-J]\s?[)\]}]|[A-J](?![^\W一-龥]|['’²-]))"
LETTERS = re.compile(  # AC, but not CAB; (A), (C), and (D)
    rf"(?=[A-J]{{2,5}}$)A?B?C?D?E?F?G?H?I?J?"
    rf"|{LETTER}(?:(?:,? and\b|,|;| ?&| ?(?=\()) ?(?:option )?{LETTER})*"
)
ANOTHER = re.compile(
    rf"(?:,? (?:or|and)\b|,|/| ?&)(?: possibly| maybe| perhaps| even| option)? ?{LETTER}"
)
LEAD = re.compile(
    r"(?i)(?:(?:so|thus|hence|therefore|overall|finally|in (?:short|conclusion))\b[,:]? ?)?"
    r"(?:both )?(?:the )?(?:(?:correct|right|best) )?(?:(?:option|choice|letter|answer)s?\b)?:? ?"
)
FOLLOWS = re.compile(  # nothing, a label's mark, a reason, a verdict: not "A is the midpoint"
    r"\s*(?:$|(?<!\bI),|[.:;)(\"'”–—-]|(?:and |but )?not\b|是?(?:正确|对)"
    r"|,? ?(?:because|since|which|due|rather|instead)\b"
    r"|(?:is|are|would be|seems?) (?:the )?(?:correct|right|best|answer|most|closest|only|odd)\b)"
)
NEGATED = re.compile(
    r"(?i)\b(?:not|cannot|neither|never|except|incorrect|wrong|unlike|false|eliminat\w+|none)\b"
    r"|n['’]t\b|\brul\w+ out\b"
)
MARKED = re.compile(
    r"\(([A-J])\)|\b(?:(?i:option|choice|answer|image|picture|figure|diagram|graph|shape|position"
    r"|letter)s?|(?:is|be|choose|pick|with|matches|corresponds to|:)(?=\s\S+$))\s([A-J])(?![\w'’-])"
)
YES_NO = re.compile(  # not "No dogs", not "No. 5"
    r"(?i)(yes|no)(?=\s*(?:$|[,;:!\"”—–)]|\.(?!\s*\d)|-\s)"
    r"|\s+(?:the(?:re|se|y)?|this|that|it|he|she|we|you|i|because|since|as)\b)"
)
CLAUSE = re.compile(
    r",? (?:because|since|which|where|so|as|given|due to)\b|, (?:and|but|with) | \((?=[a-z ]{3})|;"
)
VALUE = re.compile(
    r"[-+−±]?\s?\\?[$£€]?\s?(?:[\d.√π]|\((?!\w\))|\\(?:d?frac|sqrt|pi|pm)\b)[^=:;?!]{0,80}"
)
ABOUT = r"(?i:approximately|about|around|roughly|equal to|equals|simply|≈|~)\s*"
BEFORE_VALUE = re.compile(rf"\b(?:is|are|be|to|of)\b|=|\\approx|:(?=\s|$)|{ABOUT}")
NO_ANSWER = re.compile(
    r"(?i)(?:(?:in)?correct|right|wrong|clear|found|given|obtained|determined|based|shown|below"
    r"|above|in|on|by|as follows|not|that|the one|what|unknown|unclear)\b"
)
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
    """The option that is given, or else the one that is named before a negation."""
    answer = read_option(text, choices)
    return marked_letter(NEGATED.split(text)[0], choices) if answer is None else answer


def read_option(text: str, choices) -> str | None:
    """Letters for (C), C. 12 cm, option C, c, the text of an option; "A, C" for several."""
    text, labels = trimmed(text), LABELS[: len(choices or LABELS)]
    if (alone := text.strip("([{ }])")) in [*labels]:  # the text of an option may be d
        return alone
    if letter := option_of(text, choices):
        return letter
    text = text[LEAD.match(text).end() :]
    if re.match(r"(?:n?either|not|none)\b", text, re.I):
        return "" if re.search(LETTER, text) else None
    text = re.sub(r"^\(?[a-j](?=\)|$)", lambda lower: lower[0].upper(), text)
    letters = read_letters(text, choices)
    return option_of(read_yes_no(text) or "", choices) if letters is None else letters


def read_letters(text: str, choices) -> str | None:
    """The letters at the start, if nothing follows, or a mark, a reason, the option's text."""
    match = LETTERS.match(text)
    letters = re.findall("[A-J]", match[0]) if match else []
    if not letters or not {*letters} <= {*LABELS[: len(choices or LABELS)]}:
        return None
    if ANOTHER.match(text, match.end()):
        return ""
    is_label = option_of(trimmed(text[match.end() :]), choices) == letters[-1]
    return ", ".join(sorted({*letters})) if FOLLOWS.match(text, match.end()) or is_label else None


def marked_letter(sentence: str, choices) -> str | None:
    """The one option that a sentence names; "" for two; None if none, or if it denies one."""
    marks = [*MARKED.finditer(sentence)]
    letters = {match[1] or match[2] for match in marks}
    if NEGATED.search(sentence) or not letters & {*LABELS[: len(choices or LABELS)]}:
        return None
    listed = any(ANOTHER.match(sentence, match.end()) for match in marks)  # options B and C
    return "" if listed else only(letters)


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
    r"""X of a sentence that is X or ends in "is X" or "= X": a number or a formula, with at most
    three words behind it: 12, 5\sqrt{3}, 7 square metres."""
    value = trimmed(BEFORE_VALUE.split(trimmed(sentence.split(" because")[0]))[-1])
    is_value = VALUE.fullmatch(value) and len(WORD.findall(value)) <= 3
    return value if is_value and not NEGATED.search(value) else None


# --- 3. rules, from the most explicit to the least, and the verdict ------------------------------

ANSWER = re.compile(
    r"(?im)(?:<answer>|答案[是为:]|(?<![不没排除])选[项择]?[是为]?:?(?=\s?\(?[A-J])|\bans(?:\.|\s?[:=])"
    r"|^[ \t]*(?:(?:the|my|final|correct) ){0,3}answers?[ \t]*\n"  # a heading
    r"|\b(?:answers?|(?:correct|right|best|final|closest|nearest) (?:option|choice|result|solution"
    r"|letter|value))\b(?: (?:choice|option|letter)\b)?(?:[\"'>)\]*]{0,3}\s?[:=]|(?:,[^.:\n]{1,80},"
    r"| (?:to|for|of|that|which|in|among|from|here|i|we)\b(?:[^.:\n]|\.\d){0,80}?)?"
    r" (?:is|are|was|(?:would|should|must|will|(?:seems|appears) to) be)\b))"
    r"[\s:\"'“*]*(?:(?:clearly|therefore|thus|(?:most )?likely|probably|indeed|simply)\b[\s:,]*)?"
)
HYPOTHETICAL = re.compile(
    r"(?i)\b(?:if|suppose|assum\w+|whether|unless|(?:might|may|could) (?:think|say))\b[^.\n]{0,30}$"
)
ITEM = re.compile(r"\(?[A-J][.):]+\s*")
CONCLUDES = re.compile(
    r"(?i)\b(?:therefore|thus|hence|so|con(?:clu|sequent)\w+|correct|best|answer|choose|choice|select|pick"
    r"|go with|match(?:es)?|corresponds?)\b|(?:\([A-J]\)|\b(?-i:[A-J]))\W*$"
)
CLOSING = re.compile(r"(?i)(?:\b(?:is|be|so|say|a)|:) \"?(yes|no)\W*$")
REFUSES = re.compile(
    r"(?i)\b(?:sorry|apologi[sz]e)\b[^.\n]{0,60}(?:can['’]?t|cannot|unable|not able|don['’]t)"
    r"|\bi(?: can['’]?t| cannot| could not|(?:['’]m| am) (?:unable|not able) to) (?:\w+ ){0,3}?"
    r"(?:assist|help|determine|provide|answer|make|give|comply|(?:see|view|access|process|identify"
    r"|analy[sz]e|interpret) (?:the contents? of )?(?:\w+ ){0,3}(?:image|picture|figure|photo)s?)\b"
    r"|\bi (?:do not|don['’]t) have (?:\w+[- ]){0,4}(?:data|access|information|ability|values)\b"
    r"|\bcannot be (?:determined|answered)\b"
)


def box(tail: str, read, choices) -> str | None:
    """The last closed box, as RL reads it; its letter or its yes where one can be made out."""
    try:
        status, content = reward.extract(tail)
    except reward.TooBig:
        return ""
    if status == "no_box":
        return None
    content = "" if status else content.strip("= \n")
    answer = None if read is read_free else read(plain(content), choices)
    return content if answer is None else answer


def stated(text: str, read, choices) -> str | None:
    """What the last "answer is" gives; passed are "the answer is clear", "if the answer is A"."""
    for match in reversed(list(ANSWER.finditer(text))[-STATEMENTS:]):
        if HYPOTHETICAL.search(text, max(0, match.start() - 60), match.start()):
            continue
        answer = read(sentences(text[match.end() :][:PIECE])[0], choices)
        if answer is not None:
            return answer
    return None


def concluded_choice(text: str, choices) -> str | None:
    """The last sentence is an option, or names one and concludes, or states its value."""
    *before, last = sentences(text)
    is_listed = ITEM.match(last) and any(map(ITEM.match, before))  # the options themselves
    is_denied = NEGATED.search(last) and not option_of(trimmed(ITEM.sub("", last)), choices)
    letters = None if is_listed or is_denied else read_option(last, choices)
    is_sole = len({mark[1] or mark[2] for mark in MARKED.finditer(text)}) == 1
    if not letters and (is_sole or CONCLUDES.search(last)):
        letters = marked_letter(last, choices)
    return option_of(stated_value(last) or "", choices) if letters is None else letters


def concluded_yes_no(text: str, choices) -> str | None:
    """The start and the end: "Yes, ...", "so it is yes", "Hence, no"; they must agree."""
    first, *_, last = sentences(text) * 2
    closing = CLOSING.search(last)
    end = closing[1].lower() if closing else read_yes_no(last)
    return only({read_yes_no(first), end} - {None})


def concluded_free(text: str, choices) -> str | None:
    """The last sentence is a value, or concludes with one; or the whole reply is a few words."""
    if REFUSES.search(text):
        return None
    *before, last = sentences(text)
    value, is_line = stated_value(last), "\n" not in text
    if value and (value == trimmed(last) or "=" in last or is_line or CONCLUDES.search(last)):
        return value
    return trimmed(last) if not before and len(text) <= 80 else None


READERS = {  # of a piece of text that gives the answer, and of a whole reply that concludes
    "choice": (read_choice, concluded_choice),
    "yes/no": (read_yes_no, concluded_yes_no),
    "free": (read_free, concluded_free),
}


def extract(reply: str, *, choices=None, kind: str | None = None) -> Verdict:
    """The answer that a reply gives. `choices`: texts of the options; `kind`: one of READERS.

    Without `kind` it is a choice if there are choices, else free. A choice without `choices` has
    the options A to J; its answer may be several letters, "A, C". Never raises on a reply.
    """
    kind = kind or ("choice" if choices else "free")
    if kind not in READERS:
        raise ValueError(f"kind {kind!r}: one of {', '.join(READERS)}")
    read, conclude = READERS[kind]
    tail = conclusion(reply)
    if tail is None:
        return Verdict(None, "unparsed", None, "unfinished thought")
    if not tail:
        return Verdict(None, "empty", None, "nothing after the thought")
    answer, rule = box(tail, read, choices), "box"
    text = plain(tail)
    if answer is None:
        answer, rule = stated(text, read, choices), "answer"
    if answer is None:
        answer, rule = conclude(text, choices), "conclusion"
    if answer is None and REFUSES.search(text):
        return Verdict(None, "refused", None, "refusal")
    rule = "no rule" if answer is None else rule
    return Verdict(None, "ok" if answer else "unparsed", answer or None, rule)


def kind_of(gold: str, choices) -> str:
    """What is asked for, as far as options and gold show it."""
    if choices or re.fullmatch(r"\(?[A-J]\)?(?:, ?[A-J])*", gold.strip()):
        return "choice"
    return "yes/no" if gold.strip(" .").lower() in ("yes", "no") else "free"


def grade(gold, reply, *, choices=None, precision=None, kind=None, finish="stop") -> Verdict:
    """Does the reply give the gold? Of an irrational gold 6 right digits are enough.

    `finish`: why the reply ended; "length" is truncated, and wrong whatever stands in it. A gold
    that cannot be read scores None: then the item is at fault, not the reply.
    """
    verdict = Verdict(None, "truncated", None, "finish")
    if finish != "length":
        verdict = extract(reply, choices=choices, kind=kind or kind_of(gold, choices))
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
