r"""The reward: 1 if the last \boxed{} of a response is the reference answer, else 0; nothing else.

    response --extract--> box --clean--> text --tokenize--> tokens --read--> answer --same--> 0 or 1

The parser is the evaluator: reading an expression with numbers for its symbols gives its value, an
exact Fraction as long as it can be, then a float or a complex number. Two expressions are equal if
they agree at a few fixed points, some of them negative: x+x and 2x agree, x and |x| do not.

Policy; each rule is held by the tests named after it: pytest tests/test_reward.py -k rule_1
 1. Only a closed \boxed{} counts, the last one. Boxes joined by "," or "and" are one list; "or" and
    "/" are a hedge, in a box or between boxes: 0, unless all of them are the gold.
 2. Numbers must be equal: no tolerance, no x100. `precision` (MathVista): round both first.
    `digits=6` (benchmarks, never RL): an irrational gold may be given in 6 or more right digits.
 3. Lists and sets are order-free and may name an item twice, tuples and intervals not; [ differs
    from (; \pm is both signs. Names must agree where both sides give them.
 4. 50% = 0.5, 25% = 25 if one side has no %; never 50 = 0.5. Units may be left out, not differ.
 5. Equations up to a factor; x = x never matches; `y =` may be dropped; a+b = 2+3 = 5 says 5.
 6. Letters: B, (B), B. text, Option B; two letters or "not B": 0. With choices, a value stands for
    the one option that it equals.
 7. An unreadable gold is never rewarded. A status stands beside every score.
 8. Words are equal without case, articles and stops; so is what cannot be read as mathematics.

The text comes from a model that is paid to fool this file, so nothing in it is ever executed: no
eval, no int() of unbounded digits, no sympy. Characters, tokens, depth, items and bits are capped
before they cost anything, so no timeout is needed, in any thread. In doubt, 0.

    python reward.py --gold '\frac{1}{2}' --response 'so it is \boxed{0.5}'   # explains itself
    python reward.py cases.jsonl                                              # scores a file
"""

import cmath
import itertools
import json
import math
import operator
import re
import string
import threading
import unicodedata
import warnings
from collections import Counter, namedtuple
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import tyro
from tqdm import tqdm

MAX_CHARS = 2_000  # of a box; longer ones are loops or attacks
MAX_TOKENS = 600
MAX_DEPTH = 60  # brackets and exponents inside each other
MAX_ITEMS = 64  # of a list, and boxes joined into one
MAX_BITS = 24_000  # of a numerator or denominator: 2^1009 passes, 10^(10^10) does not
MAX_WORK = 800  # steps in reading and comparing one answer; real ones need 500 at most
STATUSES = "match mismatch no_box unclosed hedged unparsed too_big gold_unparsed failed".split()


class Verdict(NamedTuple):
    score: float  # 1.0 or 0.0
    status: str
    answer: str | None  # what stood in the box


class Unparsed(Exception):
    """The text is no expression that this file reads."""


class TooBig(Exception):
    """Reading on would cost more than the caps allow."""


BUDGET = threading.local()  # .left of MAX_WORK in each thread, so that no call has to hand it on


def spend(steps: int = 1):
    BUDGET.left -= steps
    if BUDGET.left < 0:
        raise TooBig


# --- 1. extract: the last box --------------------------------------------------------------------
OPENING = re.compile(r"\\boxed\s{0,8}\{")
BRACE = re.compile(r"\\.|[{}]", re.S)  # an escaped brace is eaten by the first half
DECORATION = re.compile(r"[\s$~*]|\\[()\[\],;!]|\\quad|\\text\s*(?=\{)|(?<!\\)[{}]")
JOINT = re.compile(r",?(,|;|and|or|/)(?:[a-z](?:_?[0-9])?=)?")  # `and y =` too


def end_of_box(text: str, begin: int) -> int | None:
    """Where the brace closes that opened before `begin`."""
    depth = 1
    for brace in BRACE.finditer(text, begin, begin + MAX_CHARS + 2):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return brace.start()
    if len(text) > begin + MAX_CHARS:
        raise TooBig
    return None


def extract(response: str) -> tuple[str, str | None]:
    """(status, text) of the last group of boxes; the status is "" where the text is graded. Scans
    back from the end, so a long thought is never read. Of a box inside a box the outer one counts.
    """
    boxes, begin, hedged = [], len(response), False
    for _ in range(MAX_ITEMS):
        start = response.rfind("\\boxed", 0, begin)
        opening = OPENING.match(response, start) if start >= 0 else None
        end = end_of_box(response, opening.end()) if opening else None
        if end is None:
            break
        if boxes and end > begin:  # encloses the box found before
            boxes.pop()
        elif boxes:
            gap = DECORATION.sub("", response[end + 1 : begin][:40])  # a joint is short
            if not (joint := JOINT.fullmatch(gap.lower())):
                break
            hedged |= joint[1] in {"or", "/"}
        boxes.append(response[opening.end() : end])
        begin = start
    else:
        raise TooBig
    if not boxes:
        return ("unclosed" if opening else "no_box"), None
    joined = (r" \text{ or } " if hedged else ", ").join(reversed(boxes))
    return ("hedged" if hedged else ""), joined


# --- 2. clean: one spelling for each thing -------------------------------------------------------
# fmt: off
# An explicit table, never NFKC: that would turn 4² into 42. The backtick is ours: it marks a word.
CHARACTERS = str.maketrans({
    **dict.fromkeys("−–—‐‑", "-"), **dict.fromkeys("×·⋅∗✕•∙", "*"), **dict.fromkeys("÷⁄∕", "/"),
    **dict.fromkeys("\u00a0\u2009\u202f\u200a\u2002\u2003\u3000\t\n\r", " "),
    **dict.fromkeys("`\"\u200b\u2061\ufeff“”。", ""), **dict.fromkeys("⟨〈", "("),
    **{chr(0xFF01 + i): chr(0x21 + i) for i in range(94)},  # fullwidth （Ａ＋１）
    **{c: rf"\frac{{{n[0]}}}{{{n[1]}}}" for c, n in zip("½⅓⅔¼¾⅕⅖⅗⅘⅙⅛",
       "12 13 23 14 34 15 25 35 45 16 18".split(), strict=True)}, "∛": r"\sqrt[3] ",
    **{c: f"\\{name} " for c, name in zip("√πθαβγδεηκλμµνρστφχψωΔΓΛΣΦΩ∞∪∩∅±∈≈→⌊⌋⌈⌉°∠∖",
       "sqrt pi theta alpha beta gamma delta epsilon eta kappa lambda mu mu nu rho sigma tau phi "
       "chi psi omega Delta Gamma Lambda Sigma Phi Omega infty cup cap emptyset pm in approx to "
       "lfloor rfloor lceil rceil degree angle setminus".split(), strict=True)},
    **dict.fromkeys("⟩〉", ")"), "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "℃": r"\degree C",
    "≤": "<=", "≥": ">=", "⩽": "<=", "⩾": ">=", "≠": "!=", "′": "'", "’": "'", "″": "''", "٫": ".",
    **dict.fromkeys("、٬", ","), **{c: f" `{name} " for c, name in zip(
       "¢€£¥₹元", "cents euros pounds yen rupees yuan".split(), strict=True)},
})
RAISED, LOWERED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "₀₁₂₃₄₅₆₇₈₉₊₋ₙ"
SCRIPTS = str.maketrans(RAISED + LOWERED, "0123456789+-n" * 2)
MEANINGS = {  # of commands: \name is read as the text before its names; others stay as they are
    "": "left right middle big Big bigg Bigg bigl bigr Bigl Bigr displaystyle textstyle boxed "
        "limits nolimits rm bf it mathrm mathbf mathbb mathcal mathscr mathsf mathnormal underline",
    " ": "quad qquad , ; : ! > ( ) [ ] /", r"\frac ": "dfrac tfrac cfrac sfrac",
    r"\binom ": "dbinom tbinom", "*": "cdot times ast bullet", "/": "div", "!=": "ne neq",
    "<": "lt", "<=": "le leq leqslant", ">": "gt", ">=": "ge geq geqslant", "(": "langle",
    ")": "rangle", r"\{": "lbrace", r"\}": "rbrace", ":": "colon", "%": "%", r"\phi ": "varphi",
    " `dollars ": "$ textdollar", " `degrees ": "degree", r"\emptyset ": "varnothing",
    r"\dots ": "ldots dots cdots", r"\to ": "rightarrow longrightarrow", r"\approx ": "simeq",
    r"\setminus ": "backslash textbackslash", r"\Reals ": "R", "|": "mid vert Vert",
    " `and ": "land &", " `or ": "lor", r"\epsilon ": "varepsilon", r"\theta ": "vartheta",
}
COMMANDS = {" ": " "}
COMMANDS |= {name: meaning for meaning, names in MEANINGS.items() for name in names.split()}
GROUPS = r"(?<![0-9.,])([0-9]{1,3}(?:_[0-9]{3})+)(?![0-9])"  # 58,500 but not 1,00,0
SPACED_GROUPS = re.compile(GROUPS.replace("_", r"(?:\\[, ]|,\\! ?|\{,\}|~|[ \u202f\u00a0\u2009])"))
COMMA_GROUPS = re.compile(GROUPS.replace("_", ","))  # but inside brackets (1,234) is a pair
COMMAND = re.compile(r"\\([A-Za-z]+|.)", re.S)
WRAPPED = re.compile(
    r"\\(text(?:rm|bf|it|normal|sf|tt)?|mbox|math(?:rm|bf|it|sf)|operatorname|boldsymbol|ce|bm)"
    r"\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
ACCENT = re.compile(r"\\(dot|vec|hat|bar|tilde|widehat|overrightarrow|overline)(?![A-Za-z])\s*"
                    r"(?:\{\\?([\w ]+)\}|(\w))")
TIME = re.compile(r"(?i)\b0?([0-9]{1,2})(?::([0-5][0-9]))? ?`?([ap])m\b")
PERIODIC = re.compile(r"(?<![0-9])([0-9]+)\.([0-9]*)\\overline\{([0-9]+)\}")

DAMAGE = (  # golds come with \f, \t or \b of \frac, \text, \boxed read as control characters
    (r"\t(?=ext|imes|heta|an)", r"\\t"), (r"\r(?=ight|m\{)", r"\\r"), (r"\n(?=eq\b|e\b)", r"\\n"),
    ("\f", r"\\f"), ("\b", r"\\b"), (r"(?<=\S)\$\$\s+\$\$(?=\S)", " ; "),
    (r"\\(q?quad)(?=[A-Za-z])", r"\\\1 "),
)
SPELLINGS = (
    (r"\\(?:text)?color\s*\{[^{}]*\}|\\[hv]space\*?\{[^{}]*\}|\\tag\{[^{}]*\}", " "),
    (r"\\(?:left|right|[bB]igg?[lr]?) *\.|^\*\*(?=[^*]+\*\*$)|(?<=[^*])\*\*$", ""),
    (r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}", r"{\\frac{\1}{\2}}"),
    (r"\{([^{}]*)\\choose(?![A-Za-z])([^{}]*)\}", r"{\\binom{\1}{\2}}"),
    (r"\\(begin|end)\{(?:[pb]?matrix|smallmatrix|array)\}(?: ?\{[clr| ]+\})?", r"\\\1{matrix}"),
    (r"\\angle *([0-9])", r"\\theta_{\1}"), (r"\\angle\s*=", ""),
    (r"\\angle(?![A-Za-z])|(?<=\\\\) ?\[[0-9]+pt\]", " "), (r"\\mathbb\s*(?:\{R\}|R)", r"\\Reals "),
    (r"\\(?:(l)eft|(r)ight)\s*(?:\||\\vert)|\\([lr])Vert", r"\\\1\2\3vert "),
    (r"\b([AaPp])\. ?([Mm])\.?(?![A-Za-z])", r" \1\2 "),
    (r"\^ ?\{? ?('+) ?\}?", r"\1"), (r"\(([0-9A-F]+)\)(?=_)", r"\1"),  # f^{\prime}, (1011)_2
    (r"(?<![0-9./])([0-9]+) ([0-9]+)/([0-9]+)(?![0-9/])", r"\1\\frac{\2}{\3}"),  # 2 1/2
)
WORDINGS = (  # once words are marked
    (r"(?:\{\})?\^ ?(?:\{ ?\\circ ?\}|\\circ(?![A-Za-z]))", r"\\degree "),
    (r"(?<=[0-9]) *(?:`?in|`?out +`?of) +(?=[0-9])", "/"),  # 1 in 6
    (r"(?<=[0-9)}])(or|and)(?=[-+0-9\\(]|[a-z](?:_\{?[0-9]\}?)? ?[=<>\\])", r" `\1 "),  # x=1orx=2
)
MONEY = "`(?:euros|dollars|pounds|yen|rupees|yuan|cents|USD)"
PHRASES = (  # once commands are read
    (r"(?i)^(?:`?the )?(?:`?(?:final|correct) )?`?answer(?: `?is)? ?:? (?=.)", ""),
    (r"(?i)^(?:`?(?:approximately|approx|about|roughly)\b\.?|\\approx) ?(?=.)", ""),
    (rf"({MONEY} ?[0-9]+|\b[0-9]+(?=,[0-9][0-9] ?{MONEY})),([0-9][0-9])\b", r"\1.\2"),  # 3,50 €
    (r"(?i)^(`?yes|`?no)\b ?, `?(?:it|they|he|she|there) `?[a-z']+(?: `?not)?$", r"\1"),
    (r"^\(?`?(?:a|i|1)\) ?([^()]+?)[ ,;.]*\(`?(?:b|ii|2)\) ?([^()]+)$", r"(\1, \2)"),  # (a) 5 (b) 7
    (r"(?<=[0-9]:[0-5][0-9]):00\b|\b0(?=[0-9]:[0-5][0-9])", ""),  # 08:34:00 is 8:34
    (r"\\(frac|binom) *([0-9])", r"\\\1{\2}"),  # \frac12 is a half
    (r"(?<=[0-9]) ?\^? ?\{? ?`?(?:st|nd|rd|th)\b ?\}?", ""),  # 5^{th}
    (rf"(^|[=,(] ?)({MONEY}) ?(-?[0-9.,]*[0-9])", r"\1\3 \2"),  # $5
    (r"(?i)^`?(?:year|point|day|number) (?=[0-9(])", ""), (r"`degrees ?`?([CF])\b", r"`\1"),
    (r"`(?:square|sq) (`[A-Za-z]+)", r"\1^2"), (r"`cubic (`[A-Za-z]+)", r"\1^3"), (r"`per\b", "/"),
    (r"`?\bk(?:mp?h|ph)\b", "`km/`h"), (r"`?\bmph\b", "`mi/`h"), (r"`?\bmpg\b", "`mi/`gal"),
    (r"\\mu ?`?m\b", "`um"), (r"(?<=[0-9]) ?\\Omega\b", " `ohm"),
)
# fmt: on
# Templates are expanded where a pattern is found: `sub` would parse each of them each time.
DAMAGE, SPELLINGS, WORDINGS, PHRASES = (
    [(re.compile(pattern), lambda m, text=text: m.expand(text)) for pattern, text in pairs]
    for pairs in (DAMAGE, SPELLINGS, WORDINGS, PHRASES)
)


def rewritten(text: str, pairs: list) -> str:
    for pattern, replacement in pairs:
        text = pattern.sub(replacement, text)
    return text


def clean(text: str) -> str:
    r"""One spelling for each thing; words that stood in \text{} are marked with a backtick."""
    if "\n" in text and "\\begin" not in text:  # one answer a line
        text = re.sub(r"\s*\n\s*", " ; ", text.strip())
    text = SPACED_GROUPS.sub(lambda m: re.sub("[^0-9]", "", m.group()), text)
    if not text.isascii():  # x² is x^2, x₁ is x_1, and the digits of any script, ٣ and ३, are 3
        text = re.sub(f"[{RAISED}]+", lambda m: f"^{{{m.group().translate(SCRIPTS)}}}", text)
        text = re.sub(f"[{LOWERED}]+", lambda m: f"_{{{m.group().translate(SCRIPTS)}}}", text)
        text = "".join(str(unicodedata.decimal(c, c)) for c in text)
    text = text.translate(CHARACTERS)
    if len(text) > 2 * MAX_CHARS:  # 2,000 times ½ are 22,000 characters
        raise TooBig
    if "\\\\" in text and "\\begin" not in text:  # escaped once too often, or a broken line
        text = re.sub(r"\\\\(?=[A-Za-z])", r"\\", text)
    text = rewritten(text.replace("\\prime", "'"), SPELLINGS)
    text = WRAPPED.sub(unwrap, WRAPPED.sub(unwrap, text))  # twice for \textbf{\text{B}}
    text = rewritten(ACCENT.sub(unaccent, text).replace("{:}", ":"), WORDINGS)
    text = PERIODIC.sub(  # 0.1\overline{6} is (16 - 1) / 90
        lambda m: m.expand(r"\\frac{\1\2\3-\1\2}") + f"{{{'9' * len(m[3])}{'0' * len(m[2])}}}", text
    )
    if text.replace(r"\$", "").count("$") != 1:  # a pair is math mode; a lone one is money
        text = re.sub(r"(?<!\\)\$", " ", text)
    text = COMMAND.sub(lambda m: COMMANDS.get(m.group(1), m.group()), text)
    text = text.replace("$", " `dollars ").replace("%", " `percent ").replace("~", " ")
    text = rewritten(" ".join(text.split()).rstrip(" .;"), PHRASES)
    text = TIME.sub(lambda m: f"{int(m[1]) % 12 + 12 * (m[3] in 'pP')}:{m[2] or '00'}", text)
    if not re.search(r"[(\[]|\\\{", text):
        text = COMMA_GROUPS.sub(lambda m: m.group().replace(",", ""), text)
    return text


def unwrap(match: re.Match) -> str:
    r"""\mathrm{i} is a symbol, \text{m} a unit, \mathrm{cm} too, \ce{H2O} has subscripts."""
    kind, content = match.groups()
    if kind == "ce":
        return re.sub(r"(?<=[A-Za-z)])([0-9]+)", r"_{\1}", content)
    if len(content.strip()) > 1 or kind in {"text", "mbox", "textrm", "textnormal"}:
        return re.sub(r"(?<![\\A-Za-z`])[A-Za-z]+", r"`\g<0>", f" {content} ")
    if kind in {"mathbf", "boldsymbol", "bm"} and content in "ijk":
        return f" {content}_{{vec}} "
    return f" `{content} " if kind == "mathrm" and content in UNIT_LETTERS else f" {content} "


def unaccent(match: re.Match) -> str:
    r"""\vec{a} is a, but \hat{i} is no imaginary unit, \bar{z} not z and 0.\overline{3} a third."""
    content = (match[2] or match[3]).replace(" ", "").replace("math", "")
    if content.isdecimal():
        return rf"\overline{{{content}}}"
    mark = "_{bar}" if match[1] in {"bar", "overline"} else "_{vec}"
    is_marked = len(content) == 1 and (mark == "_{bar}" or content in "ijk")
    return content + mark if is_marked else f" {content} "


# --- 3. tokenize ---------------------------------------------------------------------------------
# fmt: off
UNIT_NAMES = """mm millimeter millimetre|cm centimeter centimetre|m meter metre|km kilometer
kilometre|in inch inches|ft foot feet|yd yard|mi mile|s sec second|min minute|h hr hour|day|week
|month|year yr|mg milligram|g gram|kg kilogram|lb pound|ml mL milliliter|L l liter litre
|dollar usd USD|cent|euro|degree deg|radian rad|percent pct percentage|N n newton|J j joule|W w watt
|kw kW kilowatt|V v volt|A a amp ampere|K k kelvin|C coulomb celsius|F fahrenheit|pa Pa pascal
|hz Hz hertz|mol mole|ohm|ev eV|yuan|yen|rupee|ha hectare|acre|kj kJ kilojoule
|cal calorie|t ton tonne|nm nanometer|um micrometer micron|rpm|atm|bit|byte|oz ounce|gal gallon"""
UNITS = {alias: names.split()[0] for names in UNIT_NAMES.split("|") for alias in names.split()}
UNIT_LETTERS = set("mgshLNJWVKCF")
FILLERS = {"`the", "`a", "`an", "`old", "`different"}
SHORT_WORDS = set("no on or is in at an am pm AM PM if to of up by as".split())
NOT_UNITS = {"`" + word for word in """or and not to nor but no is are if then than either about
maybe perhaps possibly true false other none hundred billion dozen times of out in""".split()}
NUMBER_WORDS = {word: str(n) for n, word in enumerate(
    """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen twenty""".split())}
GREEK = """alpha beta gamma delta epsilon zeta eta theta kappa lambda mu nu xi rho sigma tau phi chi
psi omega pi Gamma Delta Theta Lambda Sigma Phi Psi Omega ell hbar""".split()
SYMBOLS = {*string.ascii_letters, *("\\" + name for name in GREEK), "\\infty"}
OTHER_NAMES = {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "tg": "tan", "ctg": "cot",
               "cosec": "csc", "hcf": "gcd", "infinity": "infty", "inf": "infty",
               **{a + name: "arc" + name for a in ("ar", "a") for name in ("sinh", "cosh", "tanh")}}
MATRIX = "\\begin{matrix}"  # that of all its styles
BRACKETS = {"(": ")", "{": "}", "[": "]", "\\{": "\\}", "\\lfloor": "\\rfloor",
            "\\lceil": "\\rceil", MATRIX: "\\end{matrix}"}
OPEN, CLOSE = {*BRACKETS}, {*BRACKETS.values()}
RELATIONS = {"=", "!=", "<", "<=", ">", ">=", "\\in", "\\approx"}
SET_OPERATIONS = {"\\cup": operator.or_, "\\cap": operator.and_, "\\setminus": operator.gt}
MONTHS = "january february march april may june july august september october november december"
MONTHS = {spelling: name for name in MONTHS.split() for spelling in (name, name[:3])}
IGNORED = {"{", "}", ".", "`and", *FILLERS}  # in texts
SAME_WORDS = {
    **dict.fromkeys("oui sí si ja да 是 はい sim 对 yeah".split(), "yes"),
    **dict.fromkeys("non nein нет 否 いいえ não 不是".split(), "no"), "grey": "gray",
    **dict.fromkeys("doesnotexist undefined".split(), "dne"),
    **dict.fromkeys("nosolution nosolutions nosuchnumber emptyset \\{\\}".split(), "\\emptyset"),
    "infinitelymanysolutions": "infinitelymany", "allrealnumbers": "\\Reals", "allreals": "\\Reals",
}
PRODUCTS = set("abcdxyz"), set("kmnpqrstxyz")  # xyz and mnp are products, cat is a word
TOKEN = re.compile(
    r"`[A-Za-z]+|[0-9]+(?:\.[0-9]+|\.(?=\\))?(?:[eE][+-]?[0-9]+)?|\.[0-9]+"
    r"|\\(?:begin|end)\{[A-Za-z]+\*?\}|\\[A-Za-z]+|\\[{}\\]|[<>!]=|\*\*|->|[A-Za-z]+|\S")
# fmt: on


def tokenize(text: str) -> list[str]:
    tokens, depth = [], 0
    for token in TOKEN.findall(text):
        if token.isascii() and token.lstrip("`").isalpha():
            tokens += split_letters(token, tokens[-1] if tokens else "")
        else:
            tokens.append({"**": "^", "->": "\\to"}.get(token, token))
        depth += (token in OPEN) - (token in CLOSE)
        if depth > MAX_DEPTH or len(tokens) > MAX_TOKENS:
            raise TooBig
    return tokens


def split_letters(run: str, before: str) -> list[str]:
    """`ab` is a times b, `cm` and `square` are words, `sqrt` and `sin` commands, `five` is 5."""
    word = run.lstrip("`")
    name, lower = OTHER_NAMES.get(word, word), word.lower()
    is_minute = word == "min" and (run != word or is_number(before) or before in UNIT_LETTERS)
    if (name in FUNCTIONS or name in {"sqrt", "pi"} or name != word) and not is_minute:
        return ["\\" + name]
    if len(word) > 2 and lower in NUMBER_WORDS:
        return [NUMBER_WORDS[lower]]
    if run != word:
        return [run]
    if word[:-1] in {"sin", "cos", "tan", "ln", "log"}:  # sinx, ln n
        return ["\\" + word[:-1], word[-1]]
    is_product = any(set(word) <= letters for letters in PRODUCTS) and sorted(word) == list(word)
    is_word = is_minute or len(run) > 2 and not (is_product and len(run) < 5 and run not in UNITS)
    is_word |= len(run) == 2 and (run in UNITS or run in SHORT_WORDS)
    return ["`" + run] if is_word else list(run)


def is_number(token: str) -> bool:
    return token != "" and token[0] in "0123456789." and token != "."


def cut(tokens: list[str], separators) -> tuple[list, list]:
    """The pieces, none empty, between separators outside all brackets, and these separators."""
    if {*separators}.isdisjoint(tokens):
        return [tokens] if tokens else [], []
    spend(len(tokens) // 16)
    pieces, found, depth = [[]], [], 0
    for token in tokens:
        depth += (token in OPEN) - (token in CLOSE)
        if depth == 0 and token in separators:
            found.append(token)
            pieces.append([])
        else:
            pieces[-1].append(token)
    if len(pieces) > MAX_ITEMS:
        raise TooBig
    return [piece for piece in pieces if piece], found


# --- 4. values: Fraction, float, complex or Matrix; None where there is none ---------------------
class Matrix(tuple):
    """Rows of numbers. A tuple (1, 2) is a column in brackets "()", an interval [0, 1) in "[)"."""

    brackets = ""

    def __add__(self, other):
        return Matrix(tuple(map(operator.add, *rows)) for rows in zip(self, other, strict=True))

    def __mul__(self, other):
        if type(other) is not Matrix:
            return Matrix(tuple(x * other for x in row) for row in self)
        columns = list(zip(*other, strict=True))
        pairs = [[zip(row, column, strict=True) for column in columns] for row in self]
        return Matrix(tuple(sum(x * y for x, y in cell) for cell in row) for row in pairs)

    __rmul__ = __mul__


def entries(x) -> list:
    """The numbers of a matrix, or the number."""
    return [cell for row in x for cell in row] if type(x) is Matrix else [x]


def calculate(operation: Callable, *values):
    """The one place where numbers are made: None where there is no value (1/0, the larger of two
    complex numbers), TooBig before the next step could get expensive."""
    if any(x is None for x in values):
        return None
    spend()
    try:
        result = operation(*values)
        for x in entries(result):
            if type(x) is Fraction:
                bits = max(map(abs, x.as_integer_ratio())).bit_length()
                spend(bits // 256)
                if bits > MAX_BITS:
                    raise TooBig
            elif not cmath.isfinite(x) and (cmath.isnan(x) or INFINITIES.isdisjoint(values)):
                return None
    except (ArithmeticError, ValueError, TypeError):
        return None
    is_noise = type(result) is complex and abs(result.imag) <= 1e-13 * abs(result)
    return result.real if is_noise else result


def power(a, b):
    """Exact where it can be; the odd root of a negative number is the real one."""
    if a == 0 and not b > 0:
        raise ZeroDivisionError
    if type(b) is not Fraction:
        return complex(a) ** b
    if b.denominator == 1:
        size = max(map(abs, a.as_integer_ratio())).bit_length() - 1 if type(a) is Fraction else 0
        if size * abs(b) > MAX_BITS:  # before, not after
            raise TooBig
        return a ** int(b)
    if type(a) is complex or (a < 0 and b.denominator % 2 == 0):
        return complex(a) ** float(b)
    if a < 0:
        return (-1) ** (b.numerator % 2) * power(-a, b)
    if type(a) is Fraction:
        degree = b.denominator
        nearest = math.isqrt if degree == 2 else lambda n: round(n ** (1 / degree))
        root = Fraction(*map(nearest, a.as_integer_ratio()))
        if root**degree == a:
            return power(root, Fraction(b.numerator))
    return float(a) ** float(b)


def whole(function: Callable, most: int, *values) -> Fraction:
    """A function of whole numbers, none over `most`."""
    if max(values) > most:
        raise TooBig
    if any(type(x) is not Fraction or x.denominator > 1 or x < 0 for x in values):
        raise ValueError
    return Fraction(function(*map(int, values)))


# fmt: off
ONE, INFINITIES = Fraction(1), {math.inf, -math.inf}
POINTS = range(5)  # at three of them some symbols are negative, which matters to roots and bars
FUNCTIONS = {
    **{name: getattr(cmath, name) for name in "sin cos tan sinh cosh tanh exp".split()},
    **{"arc" + name: getattr(cmath, "a" + name) for name in "sin cos tan sinh cosh tanh".split()},
    "sec": lambda x: 1 / cmath.cos(x), "csc": lambda x: 1 / cmath.sin(x),
    "cot": lambda x: cmath.cos(x) / cmath.sin(x), "sech": lambda x: 1 / cmath.cosh(x),
    "csch": lambda x: 1 / cmath.sinh(x), "coth": lambda x: 1 / cmath.tanh(x),
    "arcsec": lambda x: cmath.acos(1 / x), "arccsc": lambda x: cmath.asin(1 / x),
    "arccot": lambda x: cmath.pi / 2 - cmath.atan(x), "max": max, "min": min,
    **dict.fromkeys(("ln", "log"), lambda x, base=math.e: cmath.log(x) / cmath.log(base)),
    "lg": lambda x, base=10: cmath.log(x) / cmath.log(base),
    "gcd": partial(whole, math.gcd, 10**9), "lcm": partial(whole, math.lcm, 10**9),
}
ENCLOSED = BRACKETS | {"|": "|", "\\lvert": "\\rvert"}
SUM, PRODUCT, JUXTAPOSED, FACTOR, POWER = range(1, 6)  # how tight operations bind
BINDING = {"+": SUM, "-": SUM, "*": PRODUCT, "/": PRODUCT, "^": POWER}
TINY = Fraction(1, 10**12)  # \log_{10} 1000 is 2.9999999999999996 as a float
OPERATIONS = {"+": operator.add, "-": lambda a, b: a + b * -1, "*": operator.mul,
              **dict.fromkeys(("/", "\\frac"), lambda a, b: a * (1 / b)),
              "\\binom": partial(whole, math.comb, 1000), "!": partial(whole, math.factorial, 1000),
              "|": abs, "\\lvert": abs, "\\lfloor": lambda x: Fraction(math.floor(x + TINY)),
              "\\lceil": lambda x: Fraction(math.ceil(x - TINY))}
CONSTANTS = {"\\pi": math.pi, "e": math.e, "i": 1j, "\\infty": math.inf}
CONSTANTS |= {f"{axis}_vec": Matrix((Fraction(axis == c),) for c in "ijk") for axis in "ijk"}
STARTS = {*SYMBOLS, *("\\" + name for name in FUNCTIONS), *BRACKETS, "\\lvert", "\\frac",
          "\\sqrt", "\\binom"} - {"\\{"}
WHOLE_ONLY = re.compile(
    r"!|\\binom|\\[lr](?:floor|ceil)|\\gcd|\\lcm|\(-[0-9./]+\)\^(?!\{?-?[0-9]+(?:\}|$))")
# `km/`h, m/s^2. A space ends each token: else there are 2^n ways to read n letters.
UNITS_LAST = re.compile(r"(?:(?:`[A-Za-z]+|[mgshLNJWVKCF/*{}()]|\^ (?:\{ )?(?:- )?[1-6]) )+")
# fmt: on


@lru_cache(maxsize=4096)
def stand_in(name: str, point: int, discrete: bool) -> Fraction:
    """What a symbol is at a point: in (0, 1), (5, 45), (1, 3), (2, 3), (1, 2), or below -1."""
    u, code = Fraction(crc32(f"{name} at {point}".encode()) % 1008 + 1, 1009), sum(map(ord, name))
    if discrete:  # only whole numbers make sense: n!, (-1)^n; odd ones and even ones
        n = int(2 + (4 + 9 * point) * u)
        return Fraction(n + (n + point + code) % 2)
    is_negative = (0, 0, code % 2, not code % 2, code // 2 % 2)[point]
    return (-1 if is_negative else 1) * (u, 5 + 40 * u, 1 + 2 * u, 2 + u, 1 + u)[point]


@lru_cache(maxsize=1024)
def to_fraction(token: str) -> Fraction:
    """12, 0.5, .5, 2.5e-10, exactly."""
    if len(token) > 1_000 or len(token.lower().partition("e")[2]) > 4:
        raise TooBig
    return Fraction(token)


# --- 5. expressions: from tokens to the value at a point -----------------------------------------
class Reader:
    """Reads the tokens of one expression by precedence climbing; every step returns a value."""

    def __init__(self, tokens: tuple, symbol_at: Callable):
        self.tokens, self.symbol_at = (*tokens, "", ""), symbol_at
        self.at = self.depth = self.bars = self.arguments = 0

    def peek(self, ahead: int = 0) -> str:
        return self.tokens[self.at + ahead]

    def take(self) -> str:
        token = self.peek()
        if not token:
            raise Unparsed
        self.at += 1
        return token

    def skip(self, token: str) -> bool:
        found = self.peek() == token
        self.at += found
        return found

    def operand(self, level: int):
        """What comes next and all that is bound to it at least as tight as `level`."""
        signs = []
        while self.peek() in {"+", "-"} and len(signs) < 2:  # 5 - -3
            signs.append(self.take())
        result = self.operand(max(level, PRODUCT)) if signs else self.atom()
        if signs.count("-") == 1:
            result = calculate(operator.mul, -1, result)
        while token := self.peek():
            binding = BINDING.get(token) or self.juxtaposed(token, level)
            if binding < level:
                break
            before, name = self.tokens[self.at - 1], self.take() if token in BINDING else "*"
            is_mixed = token == "\\frac" and before.isdecimal() and result == to_fraction(before)
            other = self.operand({SUM: PRODUCT, POWER: POWER}.get(binding, FACTOR))
            if is_mixed and type(other) is Fraction and 0 < other < 1:
                name = "+"  # 2\frac{1}{2} is 2.5, not 1
            result = calculate(power if name == "^" else OPERATIONS[name], result, other)
        return result

    def juxtaposed(self, token: str, level: int) -> int:
        """2x, 2|x|, x(x+1), 5 `cm, n 2^n, 2! 3!, 2^6 3^5; not "2 3". The argument of
        \\sin 2(x+1) is a product, that of \\sin x (x+1) and \\sin x \\cos x is not."""
        before, caret = self.tokens[self.at - 1], self.tokens[max(self.at - 2, 0)]
        if is_number(token):
            after_power = before in SYMBOLS or before in {"!", "}"} or caret == "^"
            return JUXTAPOSED if after_power and self.peek(1) in {"^", "!"} else 0
        is_next_factor = token[1:] in FUNCTIONS or (token == "(" and not is_number(before))
        if level == JUXTAPOSED and is_next_factor and before != "\\pi":
            return 0
        starts = token in STARTS or token[:1] == "`" or (token == "|" and not self.bars)
        return JUXTAPOSED if starts else 0

    def atom(self):
        spend()
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise TooBig
        token = self.take()
        if is_number(token):
            result = to_fraction(token)
        elif token in SYMBOLS or token[0] == "`":
            name = (unit_name(token[1:]) if token[0] == "`" else token) + self.subscript()
            result = CONSTANTS[name] if name in CONSTANTS else self.symbol_at(name)
        elif token[1:] in FUNCTIONS and token[0] == "\\":
            result = self.function(token[1:])
        elif token in {"\\frac", "\\binom"}:
            result = calculate(OPERATIONS[token], self.atom(), self.atom())
        elif token == "\\sqrt":
            index = self.enclosed(self.take()) if self.peek() == "[" else Fraction(2)
            result = calculate(power, self.atom(), calculate(operator.truediv, 1, index))
        else:
            result = self.enclosed(token)
        while self.peek() == "!" or (self.peek() == "`degrees" and self.arguments):
            is_factorial = self.take() == "!"
            if is_factorial and self.peek() == "!":  # a double factorial, or an exclamation
                raise Unparsed
            result = calculate(OPERATIONS["!"] if is_factorial else math.radians, result)
        self.depth -= 1
        return result

    def enclosed(self, opening: str):
        """(x), {x}, [x], |x|; (1, 2) and [0, 1) as columns; matrices by rows."""
        closings, rows = {ENCLOSED.get(opening)}, [[]]
        outer, self.bars = self.bars, opening == "|"
        while self.peek() not in closings:
            rows[-1].append(self.operand(SUM))
            if opening in {"(", "[", "\\{"} and (self.skip(",") or self.skip(";")):
                closings = {")", "]"} if opening != "\\{" else closings  # \min\{3, 5\}
                rows.append([])
            elif opening == MATRIX and self.skip("\\\\"):
                rows += [[]] if self.peek() not in closings else []
            elif not (opening == MATRIX and self.skip("&")):
                break
        closing, self.bars = self.take(), outer
        if closing not in closings or not all(len(row) == len(rows[0]) > 0 for row in rows):
            raise Unparsed
        if len(rows) > 1 or opening == MATRIX:
            matrix = Matrix(map(tuple, rows))
            matrix.brackets = opening + closing if len(opening) == 1 else ""
            return calculate(lambda *cells: matrix, *itertools.chain(*rows))
        return calculate(OPERATIONS[opening], rows[0][0]) if opening in OPERATIONS else rows[0][0]

    def subscript(self) -> str:
        start = self.at
        if self.skip("_") and self.take() == "{":
            while not self.take().endswith("}"):
                pass
        while self.skip("'"):
            pass
        return re.sub("[`{}]", "", "".join(self.tokens[start : self.at]))

    def function(self, name: str):
        """\\sin^2 x, \\sin 2x, \\log_2(x), \\gcd(n, k); \\sin x \\cos x is a product."""
        base, exponent = [], None
        for _ in range(2):
            if name in {"log", "lg"} and self.skip("_"):
                base = [self.atom()]
            elif self.skip("^"):
                exponent = self.operand(POWER)
        self.arguments += 1  # \sin 30^\circ
        x = self.atom() if self.peek() in {"(", "\\{"} else self.operand(JUXTAPOSED)
        self.arguments -= 1
        if exponent == -1 and "arc" + name in FUNCTIONS:
            return calculate(FUNCTIONS["arc" + name], x)
        result = calculate(FUNCTIONS[name], *entries(x), *base)
        return result if exponent is None else calculate(power, result, exponent)


class Expression:
    """Tokens as a function of their symbols; values are kept, for the samples of a problem share a
    gold. Units are symbols. `discrete`: its symbols are whole numbers, as in n!, floors, (-1)^n."""

    def __init__(self, tokens, ones: frozenset = frozenset()):
        self.ones, self.tokens = ones, tuple(t for t in tokens if t.lower() not in FILLERS)
        self.discrete = bool(WHOLE_ONLY.search("".join(tokens)))
        words = {t.lower() for t in self.tokens if t[0] == "`"}
        is_text = not NOT_UNITS.isdisjoint(words) or "".join(self.tokens[:1])[:1] == "`"
        is_text |= bool(ones) and not self.ends_in({t for t in tokens if t[0] == "`"} | ones)
        if is_text or len(words) > 5 or self.tokens.count("`percent") > 1:
            raise Unparsed
        values: dict[str, Fraction] = {}  # of the symbols, at the first point
        first = lambda x: values.setdefault(x, stand_in(x, 0, self.discrete))  # noqa: E731
        self.known = {(0, self.discrete): self.read_with(first)}
        self.symbols = frozenset(values)
        self.units = self.symbols & {unit_name(t[1:]) for t in self.tokens if t[0] == "`"}

    def ends_in(self, units) -> bool:
        """Whether the units stand last, behind a value: 9.8 m/s^2; not 2 + cm, \\sqrt{2g}."""
        start = next((i for i, t in enumerate(self.tokens) if t in units), len(self.tokens))
        tail, before = self.tokens[start:], ["", "", *self.tokens[:start]]
        is_open = sum(map(tail.count, "})")) > sum(map(tail.count, "{("))
        is_root = before[-2] in {"\\sqrt", "}"}
        starts_inside = before[-1] in {"{", "("} and not is_root  # 3 \frac{m}{s}, 3 (m)
        are_units = UNITS_LAST.fullmatch(" ".join((*tail, "")))
        has_value = any(is_number(t) or t in SYMBOLS for t in before) and before[-1] not in {*"+-^"}
        return bool(are_units) and has_value and (starts_inside or not is_open)

    def unit_letters(self) -> frozenset[str]:
        """m and s of `9.8 m/s^2`: letters behind a number that can be nothing but its unit."""
        start = next((i for i, t in enumerate(self.tokens) if t in UNIT_LETTERS), 0)
        is_unit = any(map(is_number, self.tokens[:start])) and self.ends_in(UNIT_LETTERS)
        return self.symbols & UNIT_LETTERS if is_unit else frozenset()

    def read_with(self, symbol_at: Callable):
        reader = Reader(self.tokens, lambda x: ONE if x in self.ones else symbol_at(x))
        value = reader.operand(SUM)
        if reader.peek():  # all tokens must be used: no prefix parsing
            raise Unparsed
        return value

    def at(self, point: int = 0, discrete: bool = False):
        """The value at a point, or None where there is none."""
        key = point, discrete or self.discrete
        if key not in self.known:
            self.known[key] = self.read_with(lambda name: stand_in(name, *key))
        return self.known[key]

    def where(self, x):
        """The value where every symbol is x."""
        return self.read_with(lambda name: x) if self.symbols else self.at()

    def real(self) -> Fraction | float | None:
        """The value if it is one finite real number."""
        x = None if self.symbols else self.at()
        return x if type(x) in {Fraction, float} and abs(x) < math.inf else None

    def __repr__(self) -> str:
        return f"{''.join(self.tokens)} = {self.at()}"


def near(a, b) -> bool:
    """Exactly equal if both are rational, else to 11 of a float's 16 digits. \\sin \\pi is 0."""
    if type(a) is Matrix or type(b) is Matrix:
        brackets = {x.brackets if type(x) is Matrix else "x" for x in (a, b)}
        shapes = [[len(row) for row in x] if brackets == {""} else len(entries(x)) for x in (a, b)]
        is_alike = shapes[0] == shapes[1] and (len(brackets) == 1 or brackets == {"", "()"})
        return is_alike and all(map(near, entries(a), entries(b)))
    if a == b or type(a) is type(b) is Fraction:
        return a == b
    least = 1e-14 if not (a and b) and type(a or b) is not Fraction else 0
    gap = calculate(lambda a, b: abs(a - b) - max(1e-11 * max(abs(a), abs(b)), least), a, b)
    return gap is not None and gap <= 0


def same_expression(gold: Expression, answer: Expression) -> bool:
    """\\log is either logarithm."""
    if gold.tokens == answer.tokens or agree(gold, answer):
        return True
    common = [["\\lg" if t == "\\log" else t for t in side.tokens] for side in (gold, answer)]
    return "\\log" in gold.tokens + answer.tokens and agree(*map(Expression, common))


def agree(gold: Expression, answer: Expression) -> bool:
    """The same values at the points where both have some, complex ones only if real ones lack. A
    rational number equal to an irrational one as far as floats tell is a short fraction."""
    real, unreal, symbols = 0, [], gold.symbols | answer.symbols
    for point in POINTS if symbols else POINTS[:1]:
        g, a = (side.at(point, gold.discrete or answer.discrete) for side in (gold, answer))
        if g is None or a is None:
            continue
        if symbols and complex in (type(g), type(a)):  # \ln x^2 and 2\ln x for a negative x
            unreal.append(near(g, a))
        elif not near(g, a):
            return False
        elif not symbols and type(a) is Fraction and type(g) is not Fraction:
            return sum(n.bit_length() for n in a.as_integer_ratio()) < 35  # 3.14159265358979 for pi
        else:
            real += not symbols or g != 0  # of \binom{n}{k} for n < k all are 0
    return real > bool(symbols) or (unreal != [] and real + len(unreal) > 1 and all(unreal))


# --- 6. read: tokens to an answer of one of five kinds -------------------------------------------
# An Expression (a number, a formula, a tuple, an interval, a matrix, with or without a unit); or
# words, and whatever could not be read, equal only if written alike; or
# in no order: list, set, both signs of +-; hedged if joined by "or"; {1, {2}} is not {1, 2}:
Many = namedtuple("Many", "items hedged is_set", defaults=[False, False])
# or x = 5, 2x+y = 3, x < y: difference SIGN 0. `name` of the left side (x, f(x), |AB|; "" if it is
# more), `last` side as an answer: of a+b = 2+3 = 5 it is 5:
Relation = namedtuple("Relation", "name last sign difference left", defaults=["=", None, None])
# or real numbers: where the set may begin and end, and whether it holds a number:
Reals = namedtuple("Reals", "ends holds")


def unit_name(word: str) -> str:
    spellings = (word, word.removesuffix("s"), word.lower(), word.lower().removesuffix("s"))
    known = (UNITS[spelling] for spelling in spellings if spelling in UNITS)
    return next(known, spellings[-1] if len(word) > 1 else word)


def to_text(tokens) -> str:
    """Words lose articles, units and months get one name, C_1 is C1; symbols keep their case."""
    words = []
    for before, token in zip(["", *tokens], tokens, strict=False):
        is_subscript = token == "_" and not is_number(before)
        if len(tokens) == 1 or not (is_subscript or token.lower() in IGNORED):
            word = token.removeprefix("`")
            words.append(unit_name(word) if is_number(before) else word)
    if len(words) < 7 and any(word.lower() in MONTHS for word in words):  # July 4, 2020
        words = [MONTHS.get(word.lower(), word).lstrip("0") for word in words]
        words = ["date", *sorted(word for word in words if word not in {",", "of"})]
    text = re.sub(r"(?<=[^\W\d_]) (?=[^\W\d_])|(?<=\W) (?=\W)", "", " ".join(words))
    return SAME_WORDS.get(text.lower(), text)


def read(tokens: list[str]):
    """Tokens -> an answer: separators first, then relations, brackets, numbers and words."""
    if not tokens:
        raise Unparsed
    for read_kind in (read_list, read_relation, read_set, read_ratio, read_brackets, expression):
        if (answer := read_kind(tokens)) is not None:
            return answer
    text = to_text(tokens)
    return Reals((), lambda x: True) if text == "\\Reals" else text


def expression(tokens: list[str]) -> Expression | None:
    try:
        return Expression(tokens)
    except Unparsed:
        return None


def combined(one, sign: str, other) -> Expression:
    return Expression(["(", *one, ")", sign, "(", *other, ")"])


def only_item(answer):
    return answer.items[0] if type(answer) is Many and len(answer.items) == 1 else answer


def are_named(items) -> bool:
    """x = 1, y = 2, not x = 1, x = 2."""
    return len({x.name for x in items if type(x) is Relation and x.name}) == len(items) > 1


def flat(items, hedged: bool = False) -> Many:
    """A list inside a list, as \\pm makes it, is one list; sets and x = 1, y = 2 stay together."""
    is_list = lambda x: type(x) is Many and not x.is_set and not are_named(x.items)  # noqa: E731
    return Many(tuple(y for x in items for y in (x.items if is_list(x) else [x])), hedged)


def read_list(tokens: list[str]):
    """x = 1, y = 2 or x = 3, y = 4: `or` cuts first, then semicolons, then commas."""
    for joints in ({"`or"}, {";"}, {",", "`and"}):
        if len(pieces := cut(tokens, joints)[0]) > 1:
            text = to_text(tokens)
            return text if text.startswith("date ") else flat(map(read, pieces), "`or" in joints)
    if tokens.count("\\pm") == 1 and tokens[0] != "\\{":
        return flat(read([sign if t == "\\pm" else t for t in tokens]) for sign in "+-")
    return None


def read_set(tokens: list[str]):
    """[0, 1) \\cup (2, 3), \\mathbb{R} \\setminus \\{1\\}, from left to right."""
    pieces, operations = cut(tokens, SET_OPERATIONS)
    if not operations or len(pieces) != len(operations) + 1:
        return None
    answers = tuple(map(read, pieces))
    if total := joined(operations, map(to_reals, answers)):
        return total
    return Many(answers) if {*operations} == {"\\cup"} else None  # ends with symbols


def read_ratio(tokens: list[str]):
    """3:4 is 3/4."""
    parts, signs = cut(tokens, {":", "`to"})
    is_ratio = len(signs) == 1 and len(parts) == 2 and all(map(expression, parts))
    return combined(parts[0], "/", parts[1]) if is_ratio else None


def read_brackets(tokens: list[str]):
    """{1, 2}, {x | x < 3}, (x = 1, y = 2), P(3, -4)."""
    if tokens[0] in SYMBOLS and tokens[1:2] == ["("] and "," in tokens:
        return read(tokens[1:])
    opening, inside = tokens[0], tokens[1:-1]
    if cut(tokens, CLOSE)[1] != tokens[-1:] or opening not in {"(", "[", "\\{", "{"} or not inside:
        return None
    pieces = cut(inside, {",", ";"})[0]
    bar = next((i for i, t in enumerate(inside) if t in {"|", ":"}), 0)
    if opening == "\\{" and bar and is_name(inside[:bar]):
        return read(inside[bar + 1 :])
    if opening == "\\{" or (opening == "{" and len(pieces) > 1):
        return flat(map(read, pieces))._replace(is_set=True)
    if opening == "[" and len(pieces) == 1 and inside[0] != MATRIX:
        return to_text(tokens)
    is_one = len(pieces) == 1 or 0 < inside.count("=") < 9
    return read(inside) if opening in {"(", "{"} and is_one else None


# --- 7. equations, inequalities and sets of numbers ----------------------------------------------
def is_name(tokens: list[str]) -> bool:
    """x, a_1, f(x), |AB|, (x, y), P(X > 2), `triangle area`; no arithmetic: 2+3 is no name."""
    if tokens[1:2] == ["^"] and tokens[0] in {*string.ascii_uppercase, "f", "g"}:  # A^n, f^{-1}(x)
        tokens = tokens[:1] + tokens[6 if "".join(tokens[2:6]) == "{-1}" else 3 :]
    depth = 0
    for before, token in zip(["", *tokens], tokens, strict=False):
        depth += (token in OPEN) - (token in CLOSE)
        is_subscript = is_number(token) and (before in {"_", "{"} or depth)
        is_operator = token in {"+", "-", "*", "/", "^", "\\sqrt"} and not depth
        if is_operator or token == "`not" or (is_number(token) and not is_subscript):
            return False
    return any(token in SYMBOLS or token[0] == "`" for token in tokens)


def name_of(tokens: list[str]) -> str:
    """y(x), f(x) and y are y; |AB| and AB are AB; dy/dx is y'."""
    name = re.sub(r"[`{}|]|\\[lr]vert|\(([a-z])\)$", "", "".join(tokens))
    name = re.sub(r"^\\frac(?:d|\\partial)([a-z])(?:d|\\partial)[a-z]$", r"\1'", name)
    return re.sub(r"^f(?='*$)", "y", name)


def read_relation(tokens: list[str]):
    """x = 5, 2x + y = 3, x < 3, 1 < x <= 2, x \\in [0, 1); anything else is text."""
    parts, signs = cut(tokens, RELATIONS)
    if not signs:
        return None
    if len(parts) != len(signs) + 1 or len(parts) > 6 or "`not" in tokens:
        return to_text(tokens)
    if "\\approx" in signs and (signs[0] != "\\approx" or not is_name(parts[0])):
        return read(tokens[: tokens.index("\\approx")])  # x = 1/3 \approx 0.33 is 1/3
    sides = list(map(expression, parts))
    if {*signs} <= {"=", "\\in", "\\approx"}:
        return read_equation(parts, sides, signs) or to_text(tokens)
    return (None not in sides and read_inequality(parts, sides, signs)) or to_text(tokens)


def read_equation(parts: list, sides: list, signs: list[str]):
    """`x = 5 + 6 = 11` names 11, as does `11 = x`; 5 + 6 = 11 is 11; all else is an equation."""
    if len({*map(tuple, parts)}) < len(parts):
        raise Unparsed  # x = x, 1 = 1
    if len(parts) == 2 and sides[0] and not sides[0].symbols and is_name(parts[1]):
        parts, sides = parts[::-1], sides[::-1]
    last, is_known = only_item(read(parts[-1])), None not in sides and "\\in" not in signs
    is_identity = is_known and all(same_expression(side, sides[-1]) for side in sides)
    is_equation = is_known and len(parts) == 2 and not is_identity
    zero = combined(parts[0], "-", parts[1]) if is_equation else None
    if is_name(parts[0]) or (sides[0] is None and "\\in" not in signs):  # \int_0^2 3x dx = 6
        name = name_of(parts[0])
        if type(last) is Many:  # x = \pm 1 says x = 1, x = -1
            return flat(Relation(name, x) for x in last.items)
        if name[:1] == "(" and type(last) is Expression:  # (p, q) = (5, 2) says p = 5, q = 2
            names, values = (cut([*text[1:-1]], {","})[0] for text in (name, last.tokens))
            if len(names) == len(values):
                return Many(tuple(map(Relation, map("".join, names), map(read, values))))
        return Relation(name, last, "=", zero)
    if is_known and any(side.symbols for side in sides):
        return Relation("", last, "=", zero, None if is_identity else sides[0])
    if is_known and not is_identity:
        raise Unparsed  # 2 = 3
    return last if is_known else None


def read_inequality(parts: list, sides: list[Expression], signs: list[str]):
    """A set of numbers if it is about one thing: x <= 3, 1 < 2x <= 2, x != 0, |x| < 3, f(x) > 0."""
    if {*signs} <= {">", ">="}:
        signs = [sign.replace(">", "<") for sign in reversed(signs)]
        parts, sides = parts[::-1], sides[::-1]
    things, functions = set(), []
    for part, side in zip(parts, sides, strict=True):
        is_thing = len(side.symbols) > 1 and is_name(part)  # f(x)
        things |= {name_of(part)} if is_thing else side.symbols
        functions.append((lambda x: x) if is_thing else side.where)
    if not {*signs} <= {"<", "<=", "!="} or not things:
        return None
    steps = list(zip(functions, signs, functions[1:], strict=False))
    ends = [roots(lambda x, f=f, g=g: calculate(operator.sub, f(x), g(x))) for f, _, g in steps]
    if len(things) > 1 or None in ends or any(side.discrete for side in sides):
        zero = combined(parts[0], "-", parts[1])
        return Relation("", None, signs[0], zero) if len(parts) == 2 else None
    holds = lambda x: all(in_order(f(x), sign, g(x)) for f, sign, g in steps)  # noqa: E731
    return Relation(*things, Reals(tuple(itertools.chain(*ends)), holds), signs[0])


def roots(f: Callable) -> list | None:
    """Where f is zero, if it is a line or, with bars, two that meet: its far ends tell."""
    far, near_by = 10**6, [Fraction(n, 7) for n in (-17, 1, 22)]
    points = [*(Fraction(n) for n in (-far, -far // 2, far // 2, far)), *near_by]
    values = [f(x) for x in points]
    if any(type(y) not in {Fraction, float} or abs(y) > 1e100 for y in values):
        return None
    slopes = [(values[i + 1] - values[i]) * 2 / far for i in (0, 2)]
    lines = [(slopes[0], values[0] + slopes[0] * far), (slopes[1], values[3] - slopes[1] * far)]
    for x, y in zip(points, values, strict=True):
        if all(abs(slope * x + shift - y) > 1e-6 * (1 + abs(y)) for slope, shift in lines):
            return None
    return [-shift / slope for slope, shift in lines if abs(slope) > 1e-9]


def in_order(a, sign: str, b) -> bool:
    """a < b, a <= b or a != b; the noise of floats decides nothing."""
    if a is None or b is None or complex in (type(a), type(b)):
        return False
    return sign == "<=" if near(a, b) else sign == "!=" or a < b


def to_reals(answer) -> Reals | None:
    """An interval, or a list of them or of numbers, as a set; None if its ends are no numbers."""
    if type(answer) is Relation:
        return to_reals(answer.last)
    if type(answer) is Many:  # x > 2, x != 3 are both; what cannot be both and 1, [2, 3] are either
        names = {x.name if type(x) is Relation else "" for x in answer.items}
        sets, count = list(map(to_reals, answer.items)), len(answer.items) - 1
        is_both = len(names) == 1 and "" not in names and not answer.hedged
        both = joined(["\\cap"] * count, sets) if is_both else None
        if both and any(map(both.holds, probes(both))):
            return both
        return joined(["\\cup"] * count, sets)
    if type(answer) is not Expression or answer.symbols:
        return answer if type(answer) is Reals else None
    ends, brackets = entries(answer.at()), getattr(answer.at(), "brackets", "[]")  # 5 is [5, 5]
    if not all(type(x) in {Fraction, float} for x in ends) or len(ends) > 2 or not brackets:
        return None
    low, high = ["<=" if bracket in "[]" else "<" for bracket in brackets]
    holds = lambda x: in_order(ends[0], low, x) and in_order(x, high, ends[-1])  # noqa: E731
    return Reals(tuple(x for x in ends if abs(x) < 1e100), holds)


def joined(operations: list[str], sets) -> Reals | None:
    if None in (sets := list(sets)):
        return None

    def holds(x) -> bool:
        spend(1 + len(sets) // 4)
        held = sets[0].holds(x)
        for operation, other in zip(operations, sets[1:], strict=True):
            held = SET_OPERATIONS[operation](held, other.holds(x))
        return held

    return Reals(tuple(end for one in sets for end in one.ends), holds)


def probes(*sets: Reals) -> list:
    """All ends, and a number between any two and beyond the last: a set is what it holds there."""
    ends = sorted({end for reals in sets for end in reals.ends}) or [Fraction(0)]
    between = [(a + b) / 2 for a, b in itertools.pairwise(ends)]
    return [ends[0] - abs(ends[0]) - 1, *ends, *between, ends[-1] + abs(ends[-1]) + 1]


# --- 8. same: by the kind of the gold ------------------------------------------------------------
Rules = namedtuple("Rules", "precision digits", defaults=[None, None])  # of grade


def same(gold, answer, rules: Rules) -> bool:
    """Both sides in a common form, then by the kind of the gold."""
    is_several = type(gold.last if type(gold) is Relation else gold) in {Many, Reals}
    if type(answer) is Many and answer.hedged and not is_several:  # 1/2 or 0.5
        return all(type(x) is not str and same(gold, x, rules) for x in answer.items)
    kinds = {type(gold), type(answer)}
    if kinds == {Expression, Many}:
        gold, answer = as_tuple(gold), as_tuple(answer)
    if Relation in kinds and Many not in kinds:
        return same_relation(gold, answer, rules)
    if Reals in {type(getattr(x, "last", x)) for x in (gold, answer)}:
        sets = to_reals(gold), to_reals(answer)
        held = None not in sets and [(sets[0].holds(x), sets[1].holds(x)) for x in probes(*sets)]
        return bool(held) and any(map(all, held)) and all(a == b for a, b in held)
    if kinds == {str, Expression}:  # \text{e}
        gold, answer = (x if type(x) is str else to_text(x.tokens) for x in (gold, answer))
    if type(gold) is not type(answer):
        return False
    if type(gold) is str:
        is_words = len(gold) > 1 and "\\" not in gold
        return gold == answer or (is_words and gold.lower() == answer.lower())
    return (same_many if type(gold) is Many else same_value)(gold, answer, rules)


def as_tuple(answer):
    """p = 5, q = 2 as (5, 2), by the order of the names."""
    if type(answer) is not Many or not are_named(answer.items):
        return answer
    values = [x.last for x in sorted(answer.items, key=lambda x: x.name)]
    if not all(type(x) is Expression for x in values):
        return answer
    return Expression(["(", *[t for x in values for t in (",", *x.tokens)][1:], ")"])


def same_relation(gold, answer, rules: Rules) -> bool:
    """Equations up to a factor; else names must agree where both sides give them."""
    if type(answer) is not Relation:
        return bool(gold.name) and same(gold.last, answer, rules)
    if type(gold) is not Relation:  # a^2+b^2 = 5 says 5, (x+1)^2 = x^2+2x+1 its right side
        symbols = getattr(gold, "symbols", frozenset())
        is_unsolved = answer.left and len(answer.left.symbols - symbols) < 2  # 2x = 5
        is_zero = type(answer.last) is Expression and answer.last.real() == 0  # 2x-y = 0
        says_last = answer.last and (answer.name or not (is_unsolved or is_zero))
        return bool(says_last) and same(gold, answer.last, rules)
    if gold.name == answer.name != "" and same(gold.last, answer.last, rules):
        return True
    top, bottom, factors = gold.difference, answer.difference, []
    if not (top and bottom and top.symbols == bottom.symbols and gold.sign == answer.sign):
        return False
    kind = top.discrete or bottom.discrete
    values = ((top.at(point, kind), bottom.at(point, kind)) for point in POINTS)
    quotients = (calculate(operator.truediv, *pair) for pair in values)
    for factor in itertools.islice(filter(None, quotients), 4):
        factors.append(factor)
        if not near(factor, factors[0]):
            return False
    is_symmetric = gold.sign in {"=", "!="}  # the others turn round with a negative factor
    return len(factors) > 1 and (is_symmetric or in_order(Fraction(0), "<", factors[0]))


def same_many(gold: Many, answer: Many, rules: Rules) -> bool:
    """Every item of the gold takes one of the answer's. A set may name one twice."""
    left = list(answer.items)
    if len(gold.items) < len(left) <= 2 * len(gold.items):
        left = [x for i, x in enumerate(left) if not any(same(x, y, rules) for y in left[:i])]
    is_listed = are_named(gold.items) and not any(type(x) is Relation for x in left)
    if is_listed and len({x.name[0] for x in gold.items}) == len(left):  # p, q, but not x_1, x_2
        return all(same(g, a, rules) for g, a in zip(gold.items, left, strict=False))
    for g in gold.items:
        if (found := next((a for a in left if same(g, a, rules)), None)) is None:
            return False
        left.remove(found)
    return not left


def same_value(gold: Expression, answer: Expression, rules: Rules) -> bool:
    """A unit may be left out but not contradicted; 50% is 0.5, or 50 where one side lacks the %."""
    gold_units, answer_units = gold.units, answer.units
    if gold_units or not gold.symbols:  # 9.8 m/s^2 and 20 J, whose letters were read as symbols
        answer_units |= answer.unit_letters()
    gold_units |= gold.unit_letters() if answer.units else frozenset()
    if gold_units and answer_units:
        return same_expression(gold, answer)
    g, a = Expression(gold.tokens, gold_units), Expression(answer.tokens, answer_units)
    x, y = g.real(), a.real()
    if x is not None and y is not None:
        if "percent" in gold.units ^ answer.units:
            percent, other = (x, y) if "percent" in gold.units else (y, x)
            return near(other * 100, percent) or (near(other, percent) and abs(other) > 1)
        if rules.precision is not None and rounded(x, rules) == rounded(y, rules):
            return True
        if rules.digits and is_decimal_of(x, a.tokens, rules.digits):
            return True
    return same_expression(g, a)


def rounded(x, rules: Rules) -> int:
    """Half away from zero, as people do it; in units of the last place."""
    scale = 10 ** min(max(int(rules.precision), 0), 12)
    return math.floor(abs(Fraction(x)) * scale + Fraction(1, 2)) * (1 if x > 0 else -1)


def is_decimal_of(gold, tokens: tuple, digits: int) -> bool:
    """3.14159 for pi: `digits` or more, all right, the last rounded, as far as a float knows."""
    text = "".join(tokens)
    if type(gold) is Fraction or not re.fullmatch(r"-?[0-9]*\.[0-9]{1,60}", text):
        return False
    places, significant = len(text.partition(".")[2]), len(text.replace(".", "").lstrip("-0"))
    tolerance = Fraction(1, 2 * 10**places) + abs(Fraction(gold)) / 10**15
    return significant >= digits and abs(Fraction(gold) - Fraction(text)) <= tolerance


# --- 9. letters ----------------------------------------------------------------------------------
# fmt: off
LABEL = re.compile(
    r"(?:(?:the )?(?:correct )?(?:option|choice|answer|选项|答案是?)(?: is)?:? ?)?"
    r"(?:\(([A-Z])\)|([A-Z]))(?: ?[.:)]$|$|(?<=\)) ?[.:]? ?(.+)|(?<!\)) ?[.:)] ?(.+))", re.I | re.S)
LETTERS = re.compile(r"\(?[A-J]\)?(?:(?: ?, ?(?:and )?| ?; ?| and | ?)\(?[A-J]\)?){0,9}")
ANOTHER = re.compile(r"(?:\b(?:or|and|nor|not|but)\b|[,/&]) ?(?:option )?\(?[A-HJ]\b"
                     r"|\b[A-J][.:)] |(?<![A-Za-z])\([a-j]\)")
# fmt: on


def bare(text: str) -> str:
    return re.sub("[`{}]", "", text).strip(" .")


def letters_in(text: str, choices: tuple = (), any_order: bool = False) -> frozenset[str]:
    """{B} for B, (B), B. text, Option B; {B, D} for BD or B and D; else the empty set."""
    text = bare(text).strip("[]")
    if LETTERS.fullmatch(text):
        found = re.findall("[A-J]", text)
        is_angle = text.isalpha() and found != sorted(set(found)) and not any_order  # CAB
        return frozenset() if is_angle else frozenset(found)
    if not (match := LABEL.fullmatch(text)):
        return frozenset()
    letter, rest = match[1] or match[2], match[3] or match[4] or ""
    option = letter_of(rest, choices) if choices and rest else frozenset()
    is_label = letter.isupper() or match[1]
    if option or not is_label or ANOTHER.search(rest + " "):  # D. x = 2 or x = 3 is what D says
        return option & {letter}
    return frozenset(letter.upper())


def grade_letters(gold: str, answer: str, choices: tuple[str, ...]) -> bool | None:
    """None if the gold is no letter. With choices, the value of an option becomes its letter."""
    wanted = letters_in(gold) if choices or ":" not in gold else frozenset()  # A:B = 1
    if not choices:
        return letters_in(answer, any_order=len(wanted) > 1) == wanted if wanted else None
    labels = frozenset(string.ascii_uppercase[: len(choices)])
    wanted = wanted if wanted and wanted <= labels else letter_of(gold, choices)
    given = letter_of(answer, choices) if answer.islower() else frozenset()  # an option may be "d"
    given = given or letters_in(answer, choices, len(wanted) > 1)
    given = given if given and given <= labels else letter_of(answer, choices)
    return wanted == given if wanted else None


def letter_of(text: str, choices: tuple[str, ...]) -> frozenset[str]:
    """The one option that equals the text."""
    options = list(zip(string.ascii_uppercase, map(read_gold, choices), strict=False))
    alike = [x for x, (words, _) in options if bare(words).lower() == bare(text).lower()]
    if len(alike) != 1 or len(bare(text)) < 2:  # 5-2-3 is the order 5-2-3, whatever else equals 0
        BUDGET.left = MAX_WORK // 2
        answer = only_item(read(tokenize(text)))
        alike = [x for x, (_, option) in options if option and same(option, answer, Rules())]
    return frozenset(alike) if len(alike) == 1 else frozenset()


# --- 10. grade -----------------------------------------------------------------------------------
INTEGER, DECIMAL = re.compile(r"[+-]?[0-9]{1,18}"), re.compile(r"-?[0-9]+\.[0-9]{1,2}")
CLOCK = re.compile(r"[0-9]{1,2}:[0-9]{2}")
HALF_DAY = re.compile(r"(?i)[0-9][^0-9=]{0,12}(?<![a-z])[ap]\.? ?m\b")  # 3:30 \text{ p.m.}


@lru_cache(maxsize=4096)  # the 16 samples of a problem share a gold
def read_gold(gold: str) -> tuple[str, object]:
    """(clean text, answer); the answer is None if the gold cannot be read."""
    text, tokens, BUDGET.left = clean(rewritten(gold[:MAX_CHARS], DAMAGE)), [], MAX_WORK
    try:
        tokens = tokenize(text)
        return text, only_item(read(tokens))
    except Unparsed:
        return text, None
    except TooBig:  # of 10^{10^{10}} there is a spelling, of 700 tokens not even that
        return text, to_text(tokens) if tokens else None


def grade(gold: str, response: str, *, choices=None, precision=None, digits=None) -> Verdict:
    """Does the last box of the response hold the gold? By the policy above; never raises.

    `choices`: the texts of the options in order. `precision`: decimals to round both sides to
    (MathVista). `digits`: from how many right digits on a decimal stands for an irrational gold.
    """
    box = None
    try:
        status, box = extract(response)
        is_hedged = status == "hedged"
        if box is not None:
            status = compare(gold, box, tuple(choices or ()), Rules(precision, digits))
        if is_hedged and (status != "match" or type(read_gold(gold)[1]) is Many):
            status = "hedged"
    except TooBig:
        status = "too_big"
    except Unparsed:
        status = "unparsed"
    except Exception as error:  # the last net: a fault here costs one answer, not a run of days
        warnings.warn(f"the matcher failed on gold {gold!r:.200}: {error!r}", stacklevel=2)
        status = "failed"
    return Verdict(float(status == "match"), status, box)


def compare(gold: str, box: str, choices: tuple, rules: Rules) -> str:
    """The status: the cheap comparisons first, then the one of the gold's kind."""
    if len(box) > MAX_CHARS:
        raise TooBig
    if INTEGER.fullmatch(gold) and INTEGER.fullmatch(box) and not choices:  # most golds
        return "match" if int(gold) == int(box) else "mismatch"
    spelled, reference = read_gold(gold)
    BUDGET.left = MAX_WORK
    if reference is None:
        return "gold_unparsed"
    text = clean(box if box.isprintable() else rewritten(box, DAMAGE))
    if (letters := grade_letters(spelled, text, choices)) is not None:
        return "match" if letters else "mismatch"
    if text == spelled or (DECIMAL.fullmatch(spelled) and text == spelled.replace(".", ",")):
        return "match"  # written alike, or 2,74 where the gold is 2.74
    clocks = CLOCK.fullmatch(spelled), CLOCK.fullmatch(text)
    if all(clocks) or (any(clocks) and "=" not in text and HALF_DAY.search(f"{gold} {box}")):
        return "mismatch"  # as ratios 3:30 and 1:10 would be equal
    answer = only_item(read(tokenize(text)))
    if same(reference, answer, rules):
        return "match"
    if type(answer) is Many and answer.hedged and type(reference) is not Many:
        return "hedged"
    is_odd = type(answer) is str and not re.search(r"^[^\\]*[^\W\d][^\\]*$", answer)
    return "unparsed" if is_odd else "mismatch"


# --- command line --------------------------------------------------------------------------------
# fmt: off
def main(cases: tyro.conf.Positional[Path | None] = None, gold: str = r"\frac{1}{2}",
         response: str = r"so it is \boxed{0.5}", choices: tuple[str, ...] = (),
         precision: float | None = None, digits: int | None = None):
    # fmt: on
    """Explains the verdict on --gold and --response by the other options, or scores a JSONL file of
    cases: gold, response, label, perhaps kind, choices, precision and digits."""
    if cases is None:
        verdict = grade(gold, response, choices=choices, precision=precision, digits=digits)
        print(f"score {verdict.score:g}, status {verdict.status}, in the box: {verdict.answer}")
        for name, text in (("gold", gold), ("box", verdict.answer or "")):
            spelled, answer = read_gold(text)
            print(f"{name:>5} is spelled {spelled}\n{'':>5} is read as {answer!r}")
        return
    right, total = Counter(), Counter()
    for at, line in enumerate(tqdm(cases.read_text().splitlines(), unit=" cases", disable=None), 1):
        try:
            case = json.loads(line)
            gold, response, label = case["gold"], case["response"], float(case["label"])
        except (ValueError, KeyError, TypeError) as error:
            fault = f"{cases}, line {at}: {error!r}; a case has gold, response and label"
            raise SystemExit(fault) from None
        options = {key: case.get(key) for key in ("choices", "precision", "digits")}
        verdict, kind = grade(gold, response, **options), case.get("kind", "all kinds")
        total[kind] += 1
        right[kind] += verdict.score == label
        if verdict.score != label:
            fault = "false positive" if verdict.score else "false negative"
            tqdm.write(f"line {at} {fault} {kind}: gold {gold!r}, {verdict}")
    for kind in sorted(total, key=lambda k: right[k] / total[k]):
        print(f"{kind:20} {right[kind]:5} of {total[kind]:5}")
    print(f"{'all':20} {right.total():5} of {total.total():5}")


if __name__ == "__main__":
    tyro.cli(main)
