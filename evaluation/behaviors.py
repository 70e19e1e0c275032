r"""Counts reasoning habits in a text: the paper's four of language and their four visual twins.

    linguistic         visual twin                 a sentence that shows it
    backtracking       visual_reflection           "wait, that is wrong" | "look again at A"
    subgoal_setting    visual_divide_and_conquer   "first list items" | "look at the left part"
    verification       visual_verification         "let me check" | "this matches the figure"
    backward_chaining  goal_driven_visual_tracing  "to get 75, we need" | "so find it in the chart"

A behaviour counts at most once in a sentence. CBR is the share of responses that show it, BTR =
CBR(visual) / CBR(linguistic) of a pair. Departure: the paper asks GPT-4o for the counts. That is
judge.py; this is a lexicon, for highlights and for trends of one model. Right by eye of its hits in
real chains of thought (GPT-3.5 to 4o, Gemini, Qwen-VL-Max, InternLM, no R1-style traces), in the
order above: 17 of 25, 3 of 5; 43 of 50, 18 of 25; 11 of 25, 13 of 18; 36 of 50, 16 of 29. So
publish the judge's rates, or corrected_rate.
"""

import re
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from evaluation.metrics import LEVEL, bootstrap

PAIRS = (  # linguistic, visual
    ("backtracking", "visual_reflection"),
    ("subgoal_setting", "visual_divide_and_conquer"),
    ("verification", "visual_verification"),
    ("backward_chaining", "goal_driven_visual_tracing"),
)
LINGUISTIC, VISUAL = zip(*PAIRS, strict=True)
NAMES = LINGUISTIC + VISUAL
HUES = dict(zip(NAMES, (345, 215, 150, 262, 32, 190, 85, 300), strict=True))  # of marks on pages
MIN_CARRIERS = 10  # responses with a behaviour, under which a ratio or a correction is noise
DRAWS = 2000  # of a bootstrap
MIN_YOUDEN = 0.1  # sensitivity + specificity - 1; near 0 the lexicon says nothing; ours

# The lexicon: shared words first, then the patterns of each behaviour.
IMAGE = r"(?:images?|pictures?|figures?|diagrams?|graphs?|charts?|photos?|plots?|tables?|drawings?)"
PART = (
    r"(?:left|right(?![- ](?:triangle|angle|isosceles))|top|bottom|upper|lower|middle|corner"
    r"|panels?|regions?|halves|parts?|rows?|columns?|quadrants?|sections?)"
)
IN_TURN = r"(?:one by one|one at a time|separately|in turn)"
DUTY = r"(?:need(?: to)?|have to|must|should|can|want to|will)"
I_NEED = r"(?:i|we) (?:(?:first|then|now|just|only|also) )?(?:need|want|must|should|have to)"
I_WILL = rf"(?:let ?['’]?s|let (?:me|us)|(?:i|we)(?: ?['’]ll| {DUTY}))"
TRIED = r"(?: (?:all|the|given|answer|other|against|of|list|possible|if))*"  # and not verified:
TRIED += r" (?:options?|choices?|each|which|values|closest|\w = )"  # "check which"
NO_GOAL = r"(?:(?:solve|answer) (?:this|the (?:problem|question))|\w+ the correct)\b"

PATTERNS = {
    "backtracking": [
        r"\b(?:wait|hold on|oops|hmm|hm)\b.{0,90}\b(?:wrong|not (?:right|correct)|incorrect"
        r"|mistaken?|error|impossible|start over|should (?:be|use|have))\b",
        r"\b(?:scratch that|(?:leads?|led) to a dead end|start(?:ing)? over|getting nowhere"
        r"|back to square one)\b",
        r"\b(?:i|we) (?:must have |have )?made an? (?:\w+ )?(?:mistake|error)\b",
        r"\bmy (?:\w+ )?(?:assumption|approach|calculation|answer|reading)\b.{0,60}"
        r"\b(?:was|is) (?:wrong|incorrect)\b",
        r"\b(?:this|that) contradicts\b|\b(?:try|use) another\b(?! (?:question|problem))",
        r"\bthat ?(?:is|['’]s|was) (?:not right|not correct|wrong|incorrect)\b",  # not: this is
        r"\balternatively\b.{0,60}\b(?:i|we) (?:should|could|can|might)\b|\bthrown? away\b",
        r"\bi (?:misread|mistook|miscounted|miscalculated|misjudged)\b",
    ],
    "subgoal_setting": [
        rf"^(?:so,? |ok(?:ay)?,? )?first ?,? ?(?:{I_NEED}|{I_WILL}|find|list|count|compute"
        r"|calculate|determine|solve|note)\b",
        r"(?:^\W*step (?:\d+|one|two|three) ?[:.,]|\bstep \d+ ?:)|^to (?:start|begin)(?: with)? ?,",
        r"\bbefore (?:i|we|you) (?:can|could)\b.{1,60}\b(?:have|need|must)\b",
        rf"^(?:so,? |and )?(?:next|now|then) ?,? {I_NEED}\b",
        rf"\b{I_WILL} (?:first|start (?:by|with)|begin (?:by|with)|break)\b",
    ],
    "verification": [
        r"\b(?:let ?['’]?s|let (?:me|us)|(?:i|we)(?: ?['’]ll| will| can| should)) (?:\w+ )?"
        rf"(?:(?:double|cross)[- ]?check|check|verify|confirm|test)\b(?!{TRIED})",  # not: we must
        r"^(?:to|so to) (?:double[- ]?check|check|verify|confirm) ?,|^as a (?:sanity )?check\b",
        rf"\bsanity[- ]check\b|^(?:so )?(?:double[- ]?|cross[- ]?)?checking\b(?!{TRIED})",
        r"\bplug\w*\b.{0,40}\bback in\b(?!to\b)",  # substituted back: mostly to go on
        r"\b(?:plug|substitut)\w*\b.{0,40}\bback\b.*"
        r"\b(?:check|verif|confirm|satisf|hold|work|both sides|indeed)",
        r"\bdo(?:es)? (?:this|that|it|these|they) (?:\w+ )?(?:satisfy|hold|match|agree|work|fit)\b",
    ],
    "backward_chaining": [
        rf"(?:^|[,:] |\b(?:and|so|order) )to (?:get|reach|obtain|make|end with) [^,]{{1,40}}, ?"
        rf"(?:{I_NEED}|it must)\b",
        r"\b(?:suppose|assume|if) the (?:final )?(?:answer|result)\b.{1,60}\b(?:then|would)\b",
        r"\bwork(?:ing)? (?:backwards?|in reverse)\b|\b(?:i|we) want to end\b",
        r"\bjust before (?:that|this)\b.{0,40}\b(?:must|would)\b",
        r"\b(?:(?:target|goal) is|(?:target|goal|total|result|answer) (?:should|must|has to))\b"
        rf".{{1,60}}(?:\b{I_NEED}\b|which means\b)",
        rf"^so {I_NEED} (?:each|every|all)\b",  # the miniature, from the wanted sum to its digits
    ],
    "visual_reflection": [
        r"\blook(?:ing|ed)?\b(?! for\b| at (?:the|our) (?:problem|question|equation|options))"
        r".{0,40}\bagain\b",
        rf"\b(?:see|view|read|examin|inspect|check|stud)\w*\b.{{0,30}}\b{IMAGE}\b.{{0,20}}\bagain\b",
        rf"\bre-?(?:check|examin|inspect|look|read|visit)\w*\b.{{0,30}}\b{IMAGE}\b",  # not: review
        r"\b(?:(?:take|takes|taking|have|having) (?:another|a second|a closer)|on second) look\b",
        rf"\bmis(?:interpreted|read|saw|judged|understood|identified|counted)\b.{{0,20}}\b{IMAGE}\b",
        # the miniature: a cell, all cells once more
        r"\bmis(?:read|saw) (?:the )?(?:cell )?[a-z] ?[1-9]\b|^read again :",
    ],
    "visual_divide_and_conquer": [
        rf"\b{I_WILL} (?:\w+ )?(?:start with|begin with|look at|focus on|examine|describe|consider)"
        rf"\b.{{0,40}}\b{PART}\b",
        rf"\b(?:{I_WILL}|by) (?:split|divid|partition|decompos|break)\w*\b.{{0,30}}"
        rf"\b(?:{IMAGE}|regions?|shapes?)\b.{{0,30}}\binto\b",
        rf"\b(?:{PART}|{IMAGE}) {IN_TURN}\b|\boptions? {IN_TURN}\b.{{0,30}}\b{IMAGE}\b",
    ],
    "visual_verification": [
        r"^(?!to (?:find|determine|answer|solve)\b).*"
        r"\b(?:check|verify|confirm|validat|compar|cross-?check)\w*\b.{0,40}"
        rf"\b(?:against|with)\b.{{0,20}}\b{IMAGE}\b",
        r"(?<!best )\b(?:matches|agrees?(?: with)?|fits|is consistent with|confirmed by)\b"
        rf".{{0,30}}\b(?:the|this|that|our) {IMAGE}\b",
        rf"^as a check\b.{{0,60}}\b{IMAGE}\b",
    ],
    "goal_driven_visual_tracing": [
        rf"\bto (?!{NO_GOAL})(?:get|answer|find|tell|determine|know|solve)\b.{{1,40}}"
        rf"\b{I_WILL} (?!(?:to )?(?:\w+ly )?(?:analy[sz]e|assess|examine) ).{{0,60}}\b{IMAGE}\b",
        rf"\bto (?:get|answer|find|tell|solve)\b.{{1,40}}\b{I_WILL} (?:look|search) for\b",
        rf"\b{I_NEED}\b.{{1,40}}\bso\b.{{0,40}}\b(?:find|look for|locate)\b.{{0,40}}\b{IMAGE}\b",
        rf"\bfor the answer to be\b.{{0,80}}\b{IMAGE}\b",
        r"\b(?:i['’ ]?a?m|i am|we are) looking for\b.{0,60}\b(?:because|since)\b",
    ],
}
LEXICON = {name: re.compile("|".join(parts), re.I) for name, parts in PATTERNS.items()}
DOUBT = re.compile(
    r"(?i)\b(?:again|wait|hmm|hold on|actually|wrong|not right|incorrect|mistaken?|misread)\b"
)
SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)|\n+|</?think>")  # 3.5 and A.B do not end a sentence
VERSION = zlib.crc32(f"{PATTERNS} {DOUBT} {SENTENCE_END}".encode())  # others' spans are found anew


# --- finding -------------------------------------------------------------------------------------


class Span(NamedTuple):
    name: str
    start: int  # offsets in the text that was searched, so text[start:end] is the sentence
    end: int


def thinking(text: str) -> str:
    """What stands before the LAST </think>, since thoughts may quote the tag; all of it without."""
    before, tag, _ = text.rpartition("</think>")
    return (before if tag else text).strip().removeprefix("<think>").strip()


def find(text: str) -> list[Span]:
    """All sentences with a behaviour, in order; a sentence may stand under several names."""
    spans, start = [], 0
    for stop in [*(match.end() for match in SENTENCE_END.finditer(text)), len(text)]:
        sentence = text[start:stop].strip()
        names = [name for name, pattern in LEXICON.items() if pattern.search(sentence)]
        if DOUBT.search(sentence):  # whoever doubts has not confirmed
            names = [name for name in names if "verification" not in name]
        begin = text.find(sentence, start)
        spans += [Span(name, begin, begin + len(sentence)) for name in names]
        start = stop
    return spans


def find_in_thought(response: str, question: str) -> list[Span]:
    """The spans of the thought alone, as offsets in the response, without sentences that echo the
    question: four fifths of their runs of three words, of three runs at least, stand in it."""
    thought, known = thinking(response), set(runs(question))
    begin, spans = response.find(thought), []
    for name, start, end in find(thought):
        own = runs(thought[start:end])
        if len(own) < 3 or sum(run in known for run in own) < 0.8 * len(own):
            spans.append(Span(name, begin + start, begin + end))
    return spans


def runs(text: str) -> list[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return list(zip(words, words[1:], words[2:], strict=False))


def count(text: str) -> dict[str, int]:
    """Sentences with each of the eight behaviours, zeros included."""
    names = [span.name for span in find(text)]
    return {name: names.count(name) for name in NAMES}


def watched(text: str, patterns: dict[str, str]) -> dict[str, bool]:
    """Which of a row's own patterns (its column `watch`: {name: regular expression}) a text shows:
    the miniature's rows name the item that is worth a second look, which no lexicon can know."""
    return {name: re.search(pattern, text) is not None for name, pattern in patterns.items()}


# --- rates: of (N, 8) booleans, does response n show NAMES[b], by the lexicon or by a judge -------


def counted(spans: Sequence[Sequence[Span]]) -> np.ndarray:
    """Spans of each response -> in how many sentences it shows each behaviour, (N, 8)."""
    names = [[span[0] for span in of_one] for of_one in spans]
    return np.array([[of_one.count(name) for name in NAMES] for of_one in names]).reshape(-1, 8)


def rates(values: np.ndarray) -> dict[str, float]:
    """CBR, or the mean of other (N, 8) values; 0 of no responses is 0."""
    return dict(zip(NAMES, (values.sum(axis=0) / max(1, len(values))).tolist(), strict=True))


def interval(values: np.ndarray, items: Sequence, statistic: Callable) -> np.ndarray:
    """95 % interval of statistic(sums of the values (N, K)), two ends (2, ...). items: the problem
    of each response; samples of one are alike, so the bootstrap draws problems."""
    _, group = np.unique([str(item) for item in items], return_inverse=True)
    sums = np.zeros((group.max() + 1, values.shape[1]))  # per problem
    np.add.at(sums, group, values)
    with np.errstate(invalid="ignore", divide="ignore"):  # a draw may hold no carrier
        draws = statistic(bootstrap(sums, DRAWS))
    return np.nanquantile(np.where(np.isfinite(draws), draws, np.nan), LEVEL, axis=0)


def transfers(shown: np.ndarray, items: Sequence) -> dict[tuple[str, str], tuple | None]:
    """{pair: (rate, low, high)}: BTR = CBR_visual / CBR_linguistic, both from the same drawn items;
    None under ten linguistic carriers."""
    found = dict.fromkeys(PAIRS)
    for pair in PAIRS:
        columns = shown[:, [NAMES.index(name) for name in pair]]  # (N, 2)
        spoken, seen = columns.sum(axis=0).tolist()
        if spoken >= MIN_CARRIERS:
            ends = interval(columns, items, lambda sums: sums[:, 1] / sums[:, 0])
            found[pair] = (seen / spoken, *ends.tolist())
    return found


def means(values: np.ndarray, items: Sequence) -> dict[str, tuple[float, float, float]]:
    """{name: (mean, low, high)} of (N, 8) values: CBR of what responses show; or of differences
    `one.astype(int) - other`, say with the true picture and with a blank one."""
    with_ones = np.c_[values, np.ones(len(values))]  # problems may have unequally many samples
    ends = interval(with_ones, items, lambda sums: sums[:, :8] / sums[:, 8:])
    columns = np.vstack([values.mean(axis=0), ends]).T.tolist()
    return {name: tuple(column) for name, column in zip(NAMES, columns, strict=True)}


def corrected_rate(lexicon: Sequence[bool], judged: Sequence[bool | None]) -> tuple | None:
    """(rate, low, high): the lexicon's CBR put right by a judge, with its 95 % interval.
    (rate + spec - 1) / (sens + spec - 1), Rogan and Gladen 1978. judged: the verdict on response n,
    None where none was asked for; the others must be a random sample. Responses are drawn one by
    one, so many samples of one problem look surer than they are. None ("n/a") where the judge heard
    or missed it under ten times, or the lexicon is deaf to it, in the sample or one draw of 20."""
    verdicts = np.array([0 if verdict is None else 1 + bool(verdict) for verdict in judged], int)
    cells = np.eye(6)[2 * verdicts + np.array(lexicon, int)]  # (N, 6)
    if min(cells[:, 2:4].sum(), cells[:, 4:].sum()) < MIN_CARRIERS:
        return None
    table = np.vstack([cells.sum(axis=0), bootstrap(cells, DRAWS)])
    table = table.reshape(-1, 3, 2)  # the sample, then draws; judge: not asked, no, yes; lexicon
    rate = table[:, :, 1].sum(axis=1) / len(cells)
    with np.errstate(invalid="ignore"):  # a draw may lack a class
        false, true = (table[:, 1:, 1] / table[:, 1:].sum(axis=2)).T  # 1 - spec, sens
    right = np.clip((rate - false) / np.maximum(true - false, MIN_YOUDEN), 0, 1)
    right[~(true - false >= MIN_YOUDEN)] = np.nan
    if np.isnan(right[0]) or np.isnan(right).mean() > 0.05:
        return None
    return (float(right[0]), *np.nanquantile(right[1:], LEVEL).tolist())


def summarise(rows: list[dict]) -> dict:
    """What graded rows with their "spans" show: CBR and BTR, and what is behind them. Length alone
    raises a CBR: so replies of known length have counts per token and early rates as well."""
    spans, items = [row["spans"] for row in rows], [row["id"] for row in rows]
    shown, scores = counted(spans) > 0, np.array([row["score"] for row in rows], float)
    known, plain, early = [row for row in rows if row["tokens"] is not None], [], []
    for row in rows:
        visual = {start for name, start, _ in row["spans"] if name in VISUAL}
        plain.append([span for span in row["spans"] if span[1] not in visual])
    for row in known:  # up to the same share of the characters as 2,000 tokens are of all
        end = len(row["response"]) * 2000 / max(1, row["tokens"])
        early.append([span for span in row["spans"] if span[1] < end])
    transfer = {visual: of for (_, visual), of in transfers(shown, items).items()}
    summary = {
        "rates": rates(shown),
        "mean_count": rates(counted(spans)),
        "without_visual": {name: rates(counted(plain) > 0)[name] for name in LINGUISTIC},
        "transfer": {visual: of and of[0] for visual, of in transfer.items()},
        "transfer_interval": {visual: of and of[1:] for visual, of in transfer.items()},
        "by_score": {"right": rates(shown[scores == 1]), "wrong": rates(shown[scores < 1])},
    }
    if known:
        mean_tokens = max(1, np.mean([row["tokens"] for row in known]))
        per_1000 = counted([row["spans"] for row in known]) * 1000 / mean_tokens
        summary |= {"per_1000_tokens": rates(per_1000)}
        summary |= {"first_2000_tokens": rates(counted(early) > 0)}
    return summary
