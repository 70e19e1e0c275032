r"""Counts reasoning habits in a text: the paper's four of language and their four visual twins.

    linguistic         visual twin                 a sentence that shows it
    backtracking       visual_reflection           "wait, that is wrong" | "look at A3 again"
    subgoal_setting    visual_divide_and_conquer   "first list cells" | "look at the left part"
    verification       visual_verification         "let me check" | "this matches the figure"
    backward_chaining  goal_driven_visual_tracing  "to get 75, we need" | "so find it in the chart"

The unit is the sentence; a behaviour counts at most once in each. Doubt or "again" makes a sentence
reflection, not verification: whoever doubts has not confirmed.

    CBR(behaviour) = share of responses with at least one instance              (rates)
    BTR(pair)      = CBR(visual) / CBR(linguistic)                              (transfer_rates)

Departure: the paper asks GPT-4o for the counts. This is a lexicon. On real replies lexicons are
right in about half of their hits, so it is meant for highlights and for trends of one model, not
for publication. It knows R1's English and the lower-case, spaced language of the miniature.
"""

import re
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

LINGUISTIC = ("backtracking", "subgoal_setting", "verification", "backward_chaining")
VISUAL = (
    "visual_reflection",
    "visual_divide_and_conquer",
    "visual_verification",
    "goal_driven_visual_tracing",
)
NAMES = LINGUISTIC + VISUAL
PAIRS = tuple(zip(LINGUISTIC, VISUAL, strict=True))
MIN_CARRIERS = 10  # responses with the linguistic behaviour; under it a ratio is noise


class Span(NamedTuple):
    name: str
    start: int  # offsets in the text that was searched, so text[start:end] is the sentence
    end: int


# --- the lexicon: shared words first, then the patterns of each behaviour -------------------------

IMAGE = r"(?:images?|pictures?|figures?|diagrams?|graphs?|charts?|photos?|plots?|tables?|drawings?)"
PART = (
    r"(?:left|right|top|bottom|upper|lower|middle|corner|panels?|regions?|halves|parts?|rows?"
    r"|columns?|quadrants?|sections?)"
)
CELL = r"[a-z] ?[1-9]"  # the miniature's names: A3
DUTY = r"(?:need(?: to)?|have to|must|should|can|want to|will)"
I_NEED = r"(?:i|we) (?:(?:first|then|now|just|only|also) )?(?:need|want|must|should|have to)"
I_WILL = rf"(?:let ?['’]?s|let (?:me|us)|(?:i|we)(?: ?['’]ll| {DUTY}))"

PATTERNS = {
    "backtracking": [
        r"\b(?:wait|hold on|oops|hmm|hm)\b.{0,90}\b(?:wrong|not (?:right|correct)|incorrect"
        r"|mistaken?|error|impossible|start over|should (?:be|use|have))\b",
        r"\b(?:scratch that|dead end|start(?:ing)? over|getting nowhere|back to square one)\b",
        r"\b(?:i|we) (?:must have |have )?made an? (?:\w+ )?(?:mistake|error)\b",
        r"\bmy (?:\w+ )?(?:assumption|approach|calculation|answer|reading)\b.{0,60}"
        r"\b(?:was|is) (?:wrong|incorrect)\b",
        r"\b(?:this|that|which) (?:\w+ )?contradicts\b|\b(?:try|use) another\b|\bthrown? away\b",
        r"\b(?:that|this|which) ?(?:is|['’]s|was) (?:not right|not correct|wrong|incorrect)\b",
        r"\balternatively\b.{0,60}\b(?:i|we) (?:should|could|can|might)\b",
        r"\bi (?:misread|mistook|miscounted|miscalculated|misjudged)\b",
    ],
    "subgoal_setting": [
        rf"^(?:so,? |ok(?:ay)?,? )?first ?,? ?(?:{I_NEED}|{I_WILL}|find|list|count|compute"
        r"|calculate|determine|solve|note)\b",
        r"\bstep (?:\d+|one|two|three) ?[:.,]|^to (?:start|begin)(?: with)? ?,",
        r"\bbefore (?:i|we|you) (?:can|could)\b.{1,60}\b(?:have|need|must)\b",
        rf"^(?:so,? |and )?(?:next|now|then) ?,? {I_NEED}\b",
        rf"\b{I_WILL} (?:first|start (?:by|with)|begin (?:by|with)|break)\b",
    ],
    "verification": [
        r"\b(?:let ?['’]?s|let (?:me|us)|(?:i|we)(?: ?['’]ll| will| can| should)) (?:\w+ )?"
        r"(?:(?:double|cross)[- ]?check|check|verify|confirm|test)\b",  # not: we must verify
        r"^(?:to|so to) (?:double[- ]?check|check|verify|confirm) ?,|^as a (?:sanity )?check\b",
        r"\bsanity[- ]check\b|^(?:so )?(?:double[- ]?|cross[- ]?)?checking\b",
        r"\b(?:plug|substitut)\w*\b.{0,40}\bback\b",
        r"\bdo(?:es)? (?:this|that|it|these|they) (?:\w+ )?(?:satisfy|hold|match|agree|work|fit)\b",
    ],
    "backward_chaining": [
        rf"\bto (?:get|reach|obtain|make|end with) [^,]{{1,40}}, ?(?:{I_NEED}|it must)\b",
        r"\b(?:suppose|assume|if) the (?:final )?(?:answer|result)\b.{1,60}\b(?:then|would)\b",
        r"\bwork(?:ing)? (?:backwards?|in reverse)\b",
        r"\b(?:i|we) want to end\b|\bjust before (?:that|this)\b.{0,40}\b(?:must|would)\b",
        r"\b(?:target|goal|total|result|answer) (?:is|should|must|has to)\b"
        rf".{{1,60}}(?:\b{I_NEED}\b|which means\b)",
        rf"^so {I_NEED} (?:each|every|all)\b",  # the miniature, from the wanted sum to its digits
    ],
    "visual_reflection": [
        r"\blook(?:ing|ed)?\b(?! for\b).{0,40}\bagain\b",
        rf"\b(?:see|view|read|examin|inspect|check|stud)\w*\b.{{0,30}}\b{IMAGE}\b.{{0,20}}\bagain\b",
        rf"\bre-?(?:check|examin|inspect|look|read|visit|view)\w*\b.{{0,30}}\b{IMAGE}\b",
        r"\b(?:(?:take|takes|taking|have|having) (?:another|a second|a closer)|on second) look\b",
        rf"\bmis(?:interpreted|read|saw|judged|understood|identified|counted)\b.{{0,20}}\b{IMAGE}\b",
        rf"\bmis(?:read|saw) (?:the )?(?:cell )?{CELL}\b",
    ],
    "visual_divide_and_conquer": [
        rf"\b{I_WILL} (?:\w+ )?(?:start with|begin with|look at|focus on|examine|describe|consider)"
        rf"\b.{{0,40}}\b{PART}\b",
        rf"\b(?:split|divid|partition|decompos|break)\w*\b.{{0,30}}\b(?:{IMAGE}|regions?|shapes?)\b"
        r".{0,30}\binto\b",
        rf"\b(?:options?|{PART}|{IMAGE}) (?:one by one|one at a time|separately|in turn)\b",
    ],
    "visual_verification": [
        r"\b(?:check|verify|confirm|validat|compar|cross-?check)\w*\b.{0,40}"
        rf"\b(?:against|with|in|from|using)\b.{{0,20}}\b{IMAGE}\b",
        r"\b(?:matches|agrees?(?: with)?|fits|is consistent with|confirmed by)\b"
        rf".{{0,30}}\b(?:the|this|that|our) {IMAGE}\b",
        rf"^as a check\b.{{0,60}}\b{IMAGE}\b",
    ],
    "goal_driven_visual_tracing": [
        r"\b(?:to|in order to) (?:get|answer|find|tell|determine|know|solve)\b.{1,40}"
        rf"\b{I_WILL} .{{0,60}}\b{IMAGE}\b",
        rf"\bto (?:get|answer|find|tell|solve)\b.{{1,40}}\b{I_WILL} (?:look|search) for\b",
        rf"\b{I_NEED}\b.{{1,40}}\bso\b.{{0,40}}\b(?:find|look for|locate)\b.{{0,40}}\b{IMAGE}\b",
        rf"\bfor the answer to be\b.{{0,80}}\b{IMAGE}\b",
        r"\b(?:i['’ ]?a?m|i am|we are) looking for\b.{0,60}\b(?:because|since)\b",
    ],
}
LEXICON = {name: re.compile("|".join(parts), re.I) for name, parts in PATTERNS.items()}
DOUBT = re.compile(
    r"\b(?:again|wait|hmm|hold on|actually|wrong|not right|incorrect|mistaken?|misread)\b",
    re.I,
)
NEEDS_NO_DOUBT = {"verification", "visual_verification"}
SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)|\n+")  # 3.5 and A.B do not end a sentence


# --- finding -------------------------------------------------------------------------------------


def thinking(text: str) -> str:
    """The text before the LAST </think> without its opening tag: thoughts may quote the tag.

    Without </think> the thought was cut off, or there was none: then the whole text is returned.
    """
    before, tag, _ = text.rpartition("</think>")
    return (before if tag else text).strip().removeprefix("<think>").strip()


def sentences(text: str) -> Iterator[tuple[int, int]]:
    """Begin and end of each sentence, without the white space around it."""
    start = 0
    for end in [*(match.end() for match in SENTENCE_END.finditer(text)), len(text)]:
        sentence = text[start:end]
        if sentence.strip():
            yield start + len(sentence) - len(sentence.lstrip()), start + len(sentence.rstrip())
        start = end


def find(text: str) -> list[Span]:
    """All sentences with a behaviour, in order; a sentence may stand under several names."""
    spans = []
    for start, end in sentences(text):
        sentence = text[start:end]
        doubtful = DOUBT.search(sentence) is not None
        for name, pattern in LEXICON.items():
            if not (doubtful and name in NEEDS_NO_DOUBT) and pattern.search(sentence):
                spans.append(Span(name, start, end))
    return spans


def count(text: str) -> dict[str, int]:
    """Sentences with each of the eight behaviours, zeros included."""
    counts = dict.fromkeys(NAMES, 0)
    for span in find(text):
        counts[span.name] += 1
    return counts


# --- rates ---------------------------------------------------------------------------------------


def presence(texts: Sequence[str]) -> np.ndarray:
    """(N, 8) booleans: does response n show behaviour NAMES[b] at least once?"""
    rows = [[found > 0 for found in count(text).values()] for text in texts]
    return np.array(rows, dtype=bool).reshape(len(texts), len(NAMES))


def rates(texts: Sequence[str]) -> dict[str, float]:
    """CBR: the share of responses that show each behaviour; 0 of no responses is 0."""
    shown = presence(texts)
    return {name: float(shown[:, b].sum() / max(1, len(texts))) for b, name in enumerate(NAMES)}


def transfer_rates(texts: Sequence[str]) -> dict[tuple[str, str], float | None]:
    """BTR = CBR_visual / CBR_linguistic of each pair; None under ten linguistic carriers."""
    carriers = presence(texts).sum(axis=0)
    ratios = {}
    for spoken, seen in PAIRS:
        below, above = carriers[NAMES.index(spoken)], carriers[NAMES.index(seen)]
        ratios[spoken, seen] = float(above / below) if below >= MIN_CARRIERS else None
    return ratios


def transfer_interval(
    texts: Sequence[str],
    pair: tuple[str, str],
    items: Sequence[Hashable] | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """95 % bootstrap interval of a BTR, paired: both rates come from the same drawn items.

    items: the problem of each response. Samples of one problem are alike, so problems are drawn.
    None where transfer_rates says None.
    """
    shown = presence(texts)[:, [NAMES.index(name) for name in pair]]  # (N, 2)
    if shown[:, 0].sum() < MIN_CARRIERS:
        return None
    _, group = np.unique([str(i) for i in items or range(len(texts))], return_inverse=True)
    sums = np.zeros((group.max() + 1, 2))  # (P, 2) carriers per problem
    np.add.at(sums, group, shown)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(draws, len(sums)))
    below, above = sums[drawn].sum(axis=1).T  # (draws,) each
    low, high = np.quantile(above[below > 0] / below[below > 0], [0.025, 0.975])
    return float(low), float(high)
