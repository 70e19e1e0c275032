r"""The reward: 1 if the last \boxed{} of a response is the reference answer, else 0; nothing else.

    response --extract--> box --clean--> text --tokenize--> tokens --read--> answer --same--> 0 or 1

Expressions are parsed whole into a tree and compared by value. Without symbols the value is exact
as long as it is rational (so 1/2^120 is not 1/2^121), else 72 digits long. With symbols both sides
are evaluated at the same few fixed points: (x+1)^2 and x^2+2x+1, \sin^2 x and 1-\cos^2 x agree at
all of them, x and |x| do not.

Policy; each rule is held by the tests named after it: pytest tests/test_reward.py -k rule_1
 1. Only a closed \boxed{} counts, the last one. Boxes joined by "," or "and" are one list; joined
    by "or" or "/" they are a hedge: 0. Inside one box "or" is one too, unless all is the same.
 2. Numbers must be equal: no tolerance, no x100. `precision` (MathVista): round both first.
    `digits=6` (benchmarks, never RL): an irrational gold may be given in 6 or more right digits.
 3. Lists and sets are order-free and may name an item twice, tuples and intervals not; [ differs
    from (; \pm is both signs.
 4. 50% = 0.5, and 25% = 25 if one side lacks the sign; never 50 = 0.5. A unit may be left out but
    not contradicted.
 5. Equations up to a factor; x = x and 1 = 1 never match; `y =` may be dropped; of x = 2+3 = 5
    the last counts; different symbols never match.
 6. Letters: B, (B), B. text, Option B; two letters or "not B": 0. With choices, a value stands for
    the one option that it equals.
 7. An unreadable gold is never rewarded. A status stands beside every score.
 8. Words are equal without case, articles and full stops; what cannot be read as mathematics is
    compared like words.

The text comes from a model that is paid to fool this file, so nothing in it is ever executed: no
eval, no float(), no int() on unbounded digits, no sympy. Characters, tokens, depth, digits and
arithmetic are counted and capped before they cost anything, so no timeout is needed: any input
costs milliseconds, in any thread. In doubt, 0.

    python reward.py --gold '\frac{1}{2}' --response 'so it is \boxed{0.5}'   # explains itself
    python reward.py cases.jsonl                                              # scores a file
"""

import functools
import itertools
import json
import math
import re
import string
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Annotated, NamedTuple
from zlib import crc32

import mpmath
import tyro

MAX_CHARS = 2_000  # of a box; longer ones are loops or attacks
MAX_TOKENS = 600
MAX_DEPTH = 60  # brackets and exponents inside each other
MAX_ITEMS = 64  # of a list, and boxes joined into one
MAX_BITS = 32_000  # of a numerator or denominator: 2^1009 passes, 10^(10^10) does not
MAX_WORK = 1_500  # units of up to 5 microseconds, for all the arithmetic of a box

STATUSES = "match mismatch no_box unclosed hedged unparsed too_big gold_unparsed".split()


class Verdict(NamedTuple):
    score: float  # 1.0 or 0.0
    status: str
    answer: str | None  # what stood in the box


class Unparsed(Exception):
    """The text is no expression that this file reads."""


class TooBig(Exception):
    """Reading on would cost more than the caps allow."""


class Undefined(Exception):
    """The expression has no value here: 1/0, 0^0, (1/2)!."""


# --- 1. extract: the last box --------------------------------------------------------------------

BRACE = re.compile(r"\\.|[{}]", re.S)  # an escaped brace is eaten by the first half
OPENING = re.compile(r"\\boxed\s{0,8}\{")
GAP = re.compile(
    r"[\s$~]|\\[()\[\],;!]|\\quad|\\text\s*(?=\{)|(?<!\\)[{}]"
)  # decoration between boxes
JOINT = re.compile(r",?(,|;|and|or|/)(?:[a-z](?:_?[0-9])?=)?")  # `and y =` too


def box_at(text: str, start: int) -> tuple[int, int] | None:
    """Begin and end of what the box that opens at `start` holds; None if it does not close."""
    opening = OPENING.match(text, start)
    if not opening:
        return None
    depth = 1
    for brace in BRACE.finditer(text, opening.end(), opening.end() + MAX_CHARS + 2):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return opening.end(), brace.start()
    if len(text) > opening.end() + MAX_CHARS:
        raise TooBig
    return None


def extract(response: str) -> tuple[str, str | None]:
    """(status, text) of the last group of boxes; the status is "" if the text is to be graded.

    Scans back from the end and stops at the first box that does not belong to the group, so a long
    chain of thought is never read. Of a box inside a box the outer one counts.
    """
    contents, begin, hedged = [], len(response), False
    for _ in range(MAX_ITEMS):
        start = response.rfind("\\boxed", 0, begin)
        span = box_at(response, start) if start >= 0 else None
        if span is None and not contents:
            opened = start >= 0 and OPENING.match(response, start)
            return ("unclosed" if opened else "no_box"), None
        if span is None:
            break
        content = response[slice(*span)]
        if contents and span[1] > begin:  # encloses the box found before
            contents[-1] = content
        else:
            gap = response[span[1] + 1 : begin]
            gap = GAP.sub("", gap).lower() if len(gap) <= 40 else "too far"
            joint = JOINT.fullmatch(gap)
            if contents and not joint:
                break
            hedged |= bool(contents) and joint[1] in {"or", "/"}
            contents.append(content)
        begin = start
    else:
        raise TooBig
    return ("hedged" if hedged else ""), ", ".join(reversed(contents))


# --- 2. clean: one spelling for each thing -------------------------------------------------------

# fmt: off
# An explicit table, never NFKC: that would turn 4² into 42. The backtick is ours: it marks a word.
CHARACTERS = str.maketrans({
    **dict.fromkeys("−–—‐‑－", "-"), **dict.fromkeys("×·⋅∗✕•∙", "*"),
    **dict.fromkeys("\u00a0\u2009\u202f\u200a\u2002\u2003\u3000\t\n\r", " "),
    **dict.fromkeys("`\"\u200b\u2061\ufeff“”。", ""),
    **{chr(0xFF01 + i): chr(0x21 + i) for i in range(94)},  # fullwidth （Ａ＋１）
    "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}",
    "¾": r"\frac{3}{4}", "⅕": r"\frac{1}{5}", "⅙": r"\frac{1}{6}", "⅛": r"\frac{1}{8}",
    "√": r"\sqrt ", "∛": r"\sqrt[3] ", "π": r"\pi ", "θ": r"\theta ", "α": r"\alpha ",
    "β": r"\beta ", "γ": r"\gamma ", "δ": r"\delta ", "ε": r"\epsilon ", "λ": r"\lambda ",
    "μ": r"\mu ", "µ": r"\mu ", "ρ": r"\rho ", "σ": r"\sigma ", "τ": r"\tau ", "φ": r"\phi ",
    "ω": r"\omega ", "Δ": r"\Delta ", "Ω": r"\Omega ", "∞": r"\infty ", "∪": r"\cup ",
    "∩": r"\cap ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "±": r"\pm ",
    "°": r"\degree ", "∈": r"\in ", "≤": "<=", "≥": ">=", "⩽": "<=", "⩾": ">=", "≠": "!=",
    "≈": r"\approx ", "→": r"\to ", "÷": "/", "⁄": "/", "′": "'", "’": "'", "″": "''",
    "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "℃": r"\degree C",
    "，": ",", "、": ",", "；": ";", "：": ":", "（": "(", "）": ")",
    "¢": " `cents ", "٫": ".", "٬": ",", "€": " `euros ", "£": " `pounds ", "¥": " `yen ",
    "₹": " `rupees ", "元": " `yuan ",
    **dict.fromkeys("⟨〈", "("), **dict.fromkeys("⟩〉", ")"),
})
RAISED, LOWERED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "₀₁₂₃₄₅₆₇₈₉₊₋ₙ"
SCRIPTS = str.maketrans(RAISED + LOWERED, "0123456789+-n" * 2)
COMMANDS = {  # \name -> what it means here; all others stay as they are
    **dict.fromkeys("left right big Big bigg Bigg bigl bigr Bigl Bigr".split(), ""),
    **dict.fromkeys("displaystyle textstyle boxed limits rm bf it mathrm mathbf".split(), ""),
    **dict.fromkeys([*"quad qquad , ; : ! > ( ) [ ]".split(), " "], " "),
    **dict.fromkeys("dfrac tfrac cfrac".split(), r"\frac "), "sfrac": r"\frac ",
    **dict.fromkeys("dbinom tbinom".split(), r"\binom "),
    **dict.fromkeys("cdot times ast bullet".split(), "*"), **dict.fromkeys("ne neq".split(), "!="),
    **dict.fromkeys("le leq leqslant".split(), "<="), "lt": "<", "div": "/",
    **dict.fromkeys("ge geq geqslant".split(), ">="), "gt": ">", "langle": "(", "rangle": ")",
    "%": "%", "$": " `dollars ", "textdollar": " `dollars ",
    "degree": " `degrees ", "varnothing": r"\emptyset ", "colon": ":",
    **dict.fromkeys("ldots dots cdots".split(), r"\dots "), "iff": r"\Leftrightarrow ",
    **dict.fromkeys("rightarrow longrightarrow".split(), r"\to "), "setminus": r"\setminus ",
    "backslash": r"\setminus ", "mid": "|", "vert": "|", "lbrace": r"\{", "rbrace": r"\}",
    "prime": "'", "land": " `and ", "lor": " `or ", "R": r"\Reals ", "&": " `and ",
    "simeq": r"\approx ", "varphi": r"\phi ", "varepsilon": r"\epsilon ",
    **dict.fromkeys("mathbb mathcal mathscr mathsf mathnormal".split(), ""),
}
# fmt: on
COMMAND = re.compile(r"\\([A-Za-z]+|.)", re.S)
WRAPPED = re.compile(
    r"\\(text(?:rm|bf|it|normal|sf|tt)?|mbox|math(?:rm|bf|it|sf)|operatorname|boldsymbol|ce|bm)"
    r"\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
)
ACCENT = re.compile(
    r"\\(dot|vec|hat|bar|tilde|widehat|overrightarrow|overline)(?![A-Za-z])\s*"
    r"(?:\{\\?([\w ]+)\}|(\w))"
)
DEGREE = re.compile(r"(?:\{\})?\^ ?(?:\{ ?\\circ ?\}|\\circ(?![A-Za-z]))")
GROUPS = r"(?<![0-9.,])([0-9]{1,3}(?:SEP[0-9]{3})+)(?![0-9])"  # 58,500 but not 1,00,0
SPACED_GROUPS = re.compile(
    GROUPS.replace("SEP", r"(?:\\[, ]|,\\! ?|\{,\}|~|\u202f|\u00a0|\u2009| )")
)  # one number
COMMA_GROUPS = re.compile(GROUPS.replace("SEP", ","))  # but inside brackets (1,234) is a pair
ODDS = re.compile(r"(?<=[0-9]) *(?:`?in|`?out +`?of) +(?=[0-9])")  # 1 in 6
UNIT_FRACTION = re.compile(r"\\frac *\{ *(`[^{}]*)\} *\{ *(`(?:[^{}]|\{[^{}]*\})*)\}")
PART = re.compile(r"(?:^|[,;.]?\s)\(?`?(?:[a-d]|i{1,3}|[1-4])\)\s*(?=[^\s,)])")
SPELLINGS = [  # applied where the first text stands
    ("angle", re.compile(r"\\angle *([0-9])"), r"\\theta_{\1}"),
    ("angle", re.compile(r"\\angle(?=\s*=)"), r"\\theta "),
    ("angle", re.compile(r"\\angle(?![A-Za-z])"), ""),
    ("pt]", re.compile(r"\\\\ ?\[[0-9]+pt\]"), r"\\\\ "),
    ("mathbb", re.compile(r"\\mathbb\s*(?:\{R\}|R)"), r"\\Reals "),
    ("|", re.compile(r"\\left\s*\|"), r"\\lvert "),
    ("|", re.compile(r"\\right\s*\|"), r"\\rvert "),
    ("ert", re.compile(r"\\lVert"), r"\\lvert "),
    ("ert", re.compile(r"\\rVert"), r"\\rvert "),
    ("m", re.compile(r"\b([AaPp])\. ?([Mm])\.?(?![A-Za-z])"), r" \1\2 "),  # p.m.
    ("'", re.compile(r"\^ ?\{? ?('+) ?\}?"), r"\1"),  # f^{\prime}
    ("10^", re.compile(r"(?<=[0-9.}]) ?[xX] ?(?=10\^)"), "*"),  # 1.5 x 10^6
]


def clean(text: str) -> str:
    r"""One spelling for each thing; words that stood in \text{} are marked with a backtick."""
    if "\n" in text and "\\begin" not in text:  # one answer a line
        text = re.sub(r"\s*\n\s*", " ; ", text.strip())
    text = SPACED_GROUPS.sub(lambda m: re.sub("[^0-9]", "", m.group()), text)
    text = text.translate(CHARACTERS) if text.isascii() else from_unicode(text)
    if "\\\\" in text and "\\begin" not in text:  # escaped once too often, or a broken line
        text = re.sub(r"\\\\(?=[A-Za-z])", r"\\", text)
    text = text.replace("\\prime", "'")
    for needle, pattern, replacement in SPELLINGS:
        if needle in text:
            text = pattern.sub(replacement, text)
    if "\\" in text:
        for _ in range(2):  # \textbf{\text{B}}
            text = WRAPPED.sub(unwrap, text)
        text = DEGREE.sub(r"\\degree ", ACCENT.sub(unaccent, text)).replace("{:}", ":")
    if "`" in text:
        text = UNIT_FRACTION.sub(r" \1 / \2 ", text)
    if "in" in text or "of" in text:
        text = ODDS.sub("/", text)
    bare = text.replace(r"\$", "")
    if bare.count("$") != 1:  # a pair is math mode; a lone dollar, like \$, is money
        text = re.sub(r"(?<!\\)\$", " ", text)
    text = COMMAND.sub(lambda m: COMMANDS.get(m.group(1), m.group()), text)
    text = text.replace("$", " `dollars ").replace("%", " `percent ").replace("~", " ")
    text = " ".join(text.split()).rstrip(" .;")
    if not re.search(r"[(\[]|\\\{", text):
        text = COMMA_GROUPS.sub(lambda m: m.group().replace(",", ""), text)
    return text


def from_unicode(text: str) -> str:
    """x² is x^2, x₁ x_1, and the decimal digits of any script, ٣ and ३, are 3."""
    text = re.sub(rf"[{RAISED}]+", lambda m: "^{" + m.group().translate(SCRIPTS) + "}", text)
    text = re.sub(rf"[{LOWERED}]+", lambda m: "_{" + m.group().translate(SCRIPTS) + "}", text)
    digits = {c: str(unicodedata.decimal(c)) for c in set(text) if unicodedata.decimal(c, -1) >= 0}
    return "".join(digits.get(c, c) for c in text).translate(CHARACTERS)


def unwrap(match: re.Match) -> str:
    r"""\mathrm{i} is a symbol, \text{m} a unit, \mathrm{cm} too, \ce{H2O} has subscripts."""
    kind, content = match.groups()
    if kind == "ce":
        return re.sub(r"(?<=[A-Za-z)])([0-9]+)", r"_{\1}", content)
    if len(content.strip()) == 1 and kind not in {"text", "mbox", "textrm", "textnormal"}:
        if kind == "mathrm" and content in UNIT_LETTERS:
            return f" `{content} "
        in_bold = kind in {"mathbf", "boldsymbol", "bm"} and content in "ijk"
        return f" {content}_{{vec}} " if in_bold else f" {content} "
    return re.sub(r"(?<![\\A-Za-z`])[A-Za-z]+", r"`\g<0>", f" {content} ")


def unaccent(match: re.Match) -> str:
    r"""\vec{a} is a, but \hat{i} is no imaginary unit, \bar{z} not z and 0.\overline{3} a third."""
    accent, content = match.group(1), (match.group(2) or match.group(3)).replace(" ", "")
    content = {"imath": "i", "jmath": "j"}.get(content, content)
    if content.isdecimal():
        return rf"\overline{{{content}}}"
    if accent in {"bar", "overline"}:
        return f"{content}_{{bar}}" if len(content) == 1 else content
    return f"{content}_{{vec}}" if content in {"i", "j", "k"} else f" {content} "


def repair(gold: str) -> str:
    r"""Golds come damaged: \f, \t or \b of \frac, \text, \boxed read as control characters."""
    gold = re.sub(r"\t(?=ext|imes|heta|an)", r"\\t", gold)
    gold = re.sub(r"\r(?=ight|m\{)", r"\\r", gold)
    gold = re.sub(r"\n(?=eq\b|e\b)", r"\\n", gold)
    gold = re.sub(r"(?<=\S)\$\$\s+\$\$(?=\S)", " ; ", gold)  # $$a$$ $$b$$
    gold = re.sub(r"\\(q?quad)(?=[A-Za-z])", r"\\\1 ", gold)  # \quadx_2
    return gold.replace("\f", "\\f").replace("\b", "\\b")


# --- 3. tokenize ---------------------------------------------------------------------------------

ALIASES = """mm millimeter millimetre|cm centimeter centimetre|m meter metre|km kilometer kilometre
|in inch inches|ft foot feet|yd yard|mi mile|s sec second|min minute|h hr hour|day|week|month|year
|yr|mg milligram|g gram|kg kilogram|lb pound|ml mL milliliter|l L liter litre|dollar usd USD|cent
|euro|degree deg|radian rad|percent pct percentage|n N newton|j J joule|w W watt|kw kW kilowatt
|v V volt|a A amp ampere|k K kelvin|C coulomb celsius|F fahrenheit|pa Pa pascal|hz Hz hertz|mol mole
|ohm|ev eV|unit|th st nd rd|yuan|yen|rupee|ha hectare|acre|kj kJ kilojoule|cal calorie|t ton tonne
|nm nanometer|um micrometer micron|rpm|atm|bit|byte|oz ounce|gal gallon|am AM|pm PM"""
UNITS = {alias: names.split()[0] for names in ALIASES.split("|") for alias in names.split()}
UNIT_LETTERS = set("mgshLNJWVKCF")
COMPOUND_UNITS = {"mph": "mi / h", "mpg": "mi / gal", "kmh": "km / h", "kph": "km / h"}
SHORT_WORDS = set("no on or is in at an am pm AM PM if to of up by as".split())
NOT_UNITS = set("""or and not to nor but no is are if then than either about maybe perhaps true
false other none hundred thousand million billion dozen times of out in""".split())  # fmt: skip
NUMBER_WORDS = {word: str(n) for n, word in enumerate(
    """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen twenty""".split())}  # fmt: skip
ORDINALS = {word: str(n) for n, word in enumerate(
    "first - third fourth fifth sixth seventh eighth ninth tenth".split(), 1)}  # fmt: skip
POWERS_OF_TEN = {"hundred": "100", "thousand": "1000", "million": "1000000"}
GREEK = """alpha beta gamma delta epsilon zeta eta theta kappa lambda mu nu xi rho sigma tau phi chi
psi omega pi Gamma Delta Theta Lambda Sigma Phi Psi Omega ell hbar""".split()
SYMBOLS = {*string.ascii_letters, *("\\" + name for name in GREEK)}
FUNCTIONS = """sin cos tan cot sec csc arcsin arccos arctan arccot sinh cosh tanh exp ln log lg gcd
lcm max min""".split()
COMMAND_WORDS = {"sqrt", "pi", *FUNCTIONS}
OTHER_NAMES = {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "tg": "tan", "ctg": "cot"}
OTHER_NAMES |= {"cosec": "csc", "hcf": "gcd", "infinity": "infty", "inf": "infty"}
PRODUCTS = set("abcdxyz"), set("kmnpqrstxyz")  # xyz and mnp are products, cat is a word
TOKEN = re.compile(
    r"`[A-Za-z]+|[0-9]+(?:\.[0-9]+|\.(?=\\))?(?:[eE][+-]?[0-9]+)?|\.[0-9]+"
    r"|\\(?:begin|end)\{[A-Za-z]+\*?\}|\\[A-Za-z]+|\\[{}\\]|[<>!]=|\*\*|->|[A-Za-z]+|\S"
)
MATRICES = {"pmatrix", "bmatrix", "matrix", "array", "smallmatrix"}
SYSTEMS = {"cases", "aligned", "align", "gathered"}  # of equations, or of cases
ENVIRONMENTS = MATRICES | SYSTEMS
OPEN = {"(", "[", "{", "\\{", "\\lfloor", "\\lceil", *(f"\\begin{{{e}}}" for e in ENVIRONMENTS)}
CLOSE = {")", "]", "}", "\\}", "\\rfloor", "\\rceil", *(f"\\end{{{e}}}" for e in ENVIRONMENTS)}


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
    name = OTHER_NAMES.get(word, word)
    is_minute = word == "min" and (run != word or is_number(before) or before in UNIT_LETTERS)
    if (name in COMMAND_WORDS or name != word) and not is_minute:
        return ["\\" + name]
    if len(word) > 2 and word.lower() in NUMBER_WORDS:
        return [NUMBER_WORDS[word.lower()]]
    if word.lower() in ORDINALS:
        return [ORDINALS[word.lower()], "`th"]
    if is_number(before) and word.lower() in POWERS_OF_TEN:
        return ["*", POWERS_OF_TEN[word.lower()]]
    if run != word:
        return [run]
    for function in ("sin", "cos", "tan", "ln", "log"):  # sinx, ln n
        if word[:-1] == function:
            return ["\\" + function, word[-1]]
    is_product = any(set(word) <= letters for letters in PRODUCTS) and sorted(word) == list(word)
    is_word = is_minute or len(run) > 2 and not (is_product and len(run) < 5 and run not in UNITS)
    is_word |= len(run) == 2 and (run in UNITS or run in SHORT_WORDS)
    return ["`" + run] if is_word else list(run)


def is_number(token: str) -> bool:
    return token[:1] in set("0123456789.") and token != "."


def split_top(tokens: list[str], separators: set[str]) -> list[list[str]]:
    """Cuts at the separators that stand outside all brackets; empty pieces (", and") vanish."""
    pieces, depth = [[]], 0
    for token in tokens:
        depth += (token in OPEN) - (token in CLOSE)
        if depth == 0 and token in separators:
            pieces.append([])
        else:
            pieces[-1].append(token)
    return [piece for piece in pieces if piece]


def at_top(tokens: list[str]) -> list[str]:
    """The tokens outside all brackets, and the closing ones."""
    depth, top = 0, []
    for token in tokens:
        depth += (token in OPEN) - (token in CLOSE)
        if depth == 0:
            top.append(token)
    return top


# --- 4. expressions: from tokens to a tree -------------------------------------------------------

# A tree is ("number", Fraction), ("symbol", name) or (operation, tree, ...).
Tree = tuple
STARTS = {*SYMBOLS, *("\\" + name for name in FUNCTIONS), "(", "{", "\\lvert"}
STARTS |= {"\\frac", "\\sqrt", "\\binom", "\\lfloor", "\\lceil"}
TRIGONOMETRIC = {"\\" + name for name in "sin cos tan cot sec csc".split()}


def number(value: int | Fraction) -> Tree:
    return ("number", Fraction(value))


def negative(tree: Tree) -> Tree:
    return ("number", -tree[1]) if tree[0] == "number" else ("-", tree)


def product_of(factors: list[Tree]) -> Tree:
    return factors[0] if len(factors) == 1 else ("*", *factors)


def divided(top: Tree, bottom: Tree) -> Tree:
    if top[0] == bottom[0] == "number" and bottom[1]:
        return ("number", top[1] / bottom[1])
    return ("/", top, bottom)


@lru_cache(maxsize=1024)
def to_fraction(token: str) -> Fraction:
    """12, 0.5, .5, 2.5e-10, exactly."""
    if token.isdecimal() and len(token) < 1_000:
        return Fraction(int(token))
    digits, _, exponent = token.lower().partition("e")
    whole, _, decimals = digits.partition(".")
    if len(digits) > 1_000 or len(exponent) > 4:
        raise TooBig
    value = Fraction(int(whole + decimals), 10 ** len(decimals))
    return value * Fraction(10) ** int(exponent or "0")


class Parser:
    """Recursive descent over the tokens of one expression; all must be used: no prefix parsing.

    sum > product > mixed > power > atom.
    """

    def __init__(self, tokens: list[str]):
        self.tokens, self.at, self.depth, self.bars = list(tokens), 0, 0, 0

    def peek(self, ahead: int = 0) -> str:
        return self.tokens[self.at + ahead] if self.at + ahead < len(self.tokens) else ""

    def take(self, expected: str = "") -> str:
        token = self.peek()
        if not token or (expected and token != expected):
            raise Unparsed
        self.at += 1
        return token

    def sign(self) -> int:
        sign = 1
        for _ in range(2):  # 5 - -3, but not ----5
            if self.peek() in {"+", "-"}:
                sign = -sign if self.take() == "-" else sign
        return sign

    def signed(self, read) -> Tree:
        return negative(read()) if self.sign() < 0 else read()

    def sum(self) -> Tree:
        terms = [self.signed(self.product)]
        while self.peek() in {"+", "-"}:
            terms.append(self.signed(self.product))
        return terms[0] if len(terms) == 1 else ("+", *terms)

    def product(self) -> Tree:
        factors = [self.mixed()]
        while token := self.peek():
            if token == "*":
                self.take()
                factors.append(self.signed(self.mixed))
            elif token == "/":
                self.take()
                factors = [divided(product_of(factors), self.signed(self.mixed))]
            elif token in STARTS or (token == "|" and not self.bars) or token[:6] == "\\begin":
                factors.append(self.power())  # juxtaposed; "2 3" is not 6, and not 23
            elif factors[-1][0] + self.peek(1) in {"symbol^", "!!", "!^"} and is_number(token):
                factors.append(self.power())  # n 2^n, 2! 3!
            else:
                break
        return product_of(factors)

    def mixed(self) -> Tree:
        """2\\frac{1}{2} and 2 1/2 are 2.5, not 1."""
        if not self.peek().isdecimal():
            return self.power()
        if is_number(self.peek(1)) and self.peek(2) == "/" and is_number(self.peek(3)):
            whole, top, bottom = (to_fraction(self.peek(i)) for i in (0, 1, 3))
            if not top < bottom:
                raise Unparsed
            self.at += 4
            return number(whole + top / bottom)
        follows_fraction = self.peek(1) == "\\frac"
        whole = self.power()
        if not follows_fraction:
            return whole
        part = self.power()
        if part[0] == "number" and 0 < part[1] < 1:
            return ("+", whole, part)
        return ("*", whole, part)

    def power(self) -> Tree:
        base = self.atom()
        while self.peek() in {"^", "!", "`degrees"}:
            token = self.take()
            if token == "^":
                self.depth += 1  # x^x^x^...
                base = ("^", base, self.signed(self.power))
                self.depth -= 1
            elif token == "!":
                if self.peek() == "!":  # a double factorial, or an exclamation
                    raise Unparsed
                base = ("!", base)
            else:
                base = ("*", base, ("symbol", "\\pi"), number(Fraction(1, 180)))
        return base

    def atom(self) -> Tree:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise TooBig
        token = self.take()
        if is_number(token):
            tree = self.decimal(token)
        elif token in {"(", "{"} or (token == "[" and self.peek()[:6] == "\\begin"):
            tree = self.sum()
            if token == "{" and self.peek() in {"\\over", "\\choose"}:
                tree = self.combine(self.take(), tree, self.sum())
            self.take({"(": ")", "{": "}", "[": "]"}[token])
        elif token in {"|", "\\lvert"}:
            self.bars += token == "|"
            tree = ("abs", self.sum())
            self.bars -= token == "|"
            self.take({"|": "|", "\\lvert": "\\rvert"}[token])
        elif token in {"\\lfloor", "\\lceil"}:
            tree = (token[2:], self.sum())
            self.take(token.replace("l", "r", 1))
        elif token in {"\\frac", "\\binom"}:
            tree = self.combine(token, self.argument(), self.argument())
        elif token == "\\sqrt":
            index = number(2)
            if self.peek() == "[":
                self.take()
                index = self.sum()
                self.take("]")
            tree = ("^", self.atom(), divided(number(1), index))
        elif token[1:] in FUNCTIONS and token[0] == "\\":
            tree = self.function(token[1:])
        elif token.startswith("\\begin"):
            tree = self.matrix()
        elif token in SYMBOLS:
            tree = ("symbol", token + self.subscript())
        else:
            raise Unparsed
        self.depth -= 1
        return tree

    def decimal(self, token: str) -> Tree:
        value = to_fraction(token)
        if self.peek() == "\\overline":  # 0.1\overline{6}
            self.take()
            self.take("{")
            period = self.take()
            self.take("}")
            if "." not in token or not period.isdecimal():
                raise Unparsed
            places = len(token.partition(".")[2])
            value += Fraction(int(period[:300]), 10**places * (10 ** len(period[:300]) - 1))
        if self.peek() == "_":  # 52_8 is in base 8
            raise Unparsed
        return ("number", value)

    def argument(self) -> Tree:
        """What \\frac takes: a group or ONE digit, so \\frac12 is a half."""
        token = self.peek()
        if is_number(token) and len(token) > 1:
            if not token.isdecimal():
                raise Unparsed
            self.tokens[self.at : self.at + 1] = [token[0], token[1:]]
        return self.atom()

    def subscript(self) -> str:
        name = ""
        if self.peek() == "_":
            self.take()
            if self.peek() != "{":
                name = "_" + self.take()
            elif "}" not in self.tokens[self.at :]:
                raise Unparsed
            else:
                end = self.tokens.index("}", self.at)
                name, self.at = "_" + "".join(self.tokens[self.at + 1 : end]), end + 1
        while self.peek() == "'":
            name += self.take()
        return name.replace("`", "")

    def combine(self, command: str, top: Tree, bottom: Tree) -> Tree:
        is_fraction = command in {"\\frac", "\\over"}
        return divided(top, bottom) if is_fraction else ("binomial", top, bottom)

    def function(self, name: str) -> Tree:
        """\\sin^2 x, \\sin 2x, \\log_2(x), \\gcd(n, k); \\sin x \\cos x is a product."""
        base, exponent = None, None
        for _ in range(2):
            if self.peek() == "_" and name == "log":
                self.take()
                base = self.atom()
            elif self.peek() == "^":
                self.take()
                exponent = self.signed(self.atom)
        if name in {"gcd", "lcm", "max", "min"}:
            close = {"(": ")", "\\{": "\\}"}.get(self.take(), "")
            arguments = [self.sum()]
            while self.peek() == ",":
                self.take()
                arguments.append(self.sum())
            self.take(close or "?")
            tree = (name, *arguments)
        else:
            argument = self.function_argument()
            if name in {"log", "lg"}:
                base = base or (number(10) if name == "lg" else ("symbol", "\\log"))
                tree = ("log", base, argument)
            elif exponent == number(-1) and "arc" + name in FUNCTIONS:
                return ("arc" + name, argument)
            else:
                tree = (name, argument)
        return tree if exponent is None else ("^", tree, exponent)

    def function_argument(self) -> Tree:
        if self.peek() == "(":
            return self.atom()
        sign = self.sign()
        factors = [self.power()]
        while (token := self.peek()) in STARTS or is_number(token):
            after_number = all(f[0] == "number" or f[1] == "\\pi" for f in factors)
            if token[1:] in FUNCTIONS or (token == "(" and not after_number) or is_number(token):
                break
            factors.append(self.power())
        return product_of(factors) if sign > 0 else negative(product_of(factors))

    def matrix(self) -> Tree:
        r"""\begin{pmatrix} a & b \\ c & d \end{pmatrix}; brackets of all shapes are the same."""
        name = self.tokens[self.at - 1][7:-1]
        if name not in MATRICES:
            raise Unparsed
        if name == "array":  # {cc}
            self.take("{")
            while self.take() != "}":
                pass
        rows = [[]]
        while self.peek() != f"\\end{{{name}}}":
            rows[-1].append(self.sum())
            if self.peek() == "&":
                self.take()
            elif self.peek() == "\\\\":
                self.take()
                rows += [[]] if self.peek()[:4] != "\\end" else []
        self.take()
        if len({len(row) for row in rows}) != 1:
            raise Unparsed
        return ("matrix", *(tuple(row) for row in rows))


# --- 5. values: a tree at a point ----------------------------------------------------------------

# A number is a Fraction as long as it is rational, then an mpmath number of 240 bits: real or, with
# i, complex. A private context whose precision never changes is safe in any thread.
MP = mpmath.MPContext()
MP.prec = 240
HALF = Fraction(1, 2)
CLOSE_ENOUGH, NOTHING = MP.mpf(10) ** -40, MP.mpf(10) ** -55
COSTS = {"+": 1, "*": 1, "/": 1, "^": 4, "matrix": 1, "abs": 1, "-": 1}  # others 8


class Purse:
    """The work that one box may cost, shared by its parts: 64 list items get no 64 budgets."""

    def __init__(self, is_gold: bool = False):
        self.work, self.is_gold = 0, is_gold

    def spend(self, work: int):
        self.work += work
        if self.work > MAX_WORK:
            raise TooBig


def value(tree: Tree, symbols: dict, purse: Purse):
    """The value of a tree: Fraction, MP.mpf, MP.mpc, or a tuple of rows of them for a matrix."""
    operation = tree[0]
    if operation == "number":
        return tree[1]
    if operation == "symbol":
        return symbols[tree[1]]
    purse.spend(COSTS.get(operation, 8))
    if operation == "matrix":
        return tuple(tuple(value(cell, symbols, purse) for cell in row) for row in tree[1:])
    values = [value(part, symbols, purse) for part in tree[1:]]
    if operation in {"+", "*"}:
        total, join = values[0], plus if operation == "+" else times
        for x in values[1:]:
            total = join(total, x, purse)
        return total
    if any(type(x) is tuple for x in values) and operation != "-":
        raise Undefined  # the power of a matrix
    x = OPERATIONS[operation](*values)
    if type(x) in {MP.mpf, MP.mpc} and not MP.isfinite(x):
        raise Undefined
    return paid(x, purse)


def paid(x, purse: Purse):
    """x, if it is small enough to go on with; a complex number without imaginary part is real."""
    if type(x) is Fraction:
        bits = x.numerator.bit_length() + x.denominator.bit_length()
        if bits > MAX_BITS:
            raise TooBig
        purse.spend(bits >> 8)
    return x.real if type(x) is MP.mpc and abs(x.imag) < NOTHING else x


def plus(a, b, purse: Purse):
    if type(a) is type(b) is MP.mpf:
        return a + b
    if type(a) is not tuple and type(b) is not tuple:
        a, b = alike(a, b)
        return paid(a + b, purse)
    if type(a) is not type(b) or [len(row) for row in a] != [len(row) for row in b]:
        raise Undefined
    return tuple(
        tuple(plus(x, y, purse) for x, y in zip(*rows, strict=True))
        for rows in zip(a, b, strict=True)
    )


def times(a, b, purse: Purse):
    if type(a) is type(b) is MP.mpf:
        return a * b
    if type(a) is not tuple and type(b) is not tuple:
        a, b = alike(a, b)
        return paid(a * b, purse)
    if type(a) is not tuple:
        return tuple(tuple(times(a, x, purse) for x in row) for row in b)
    if type(b) is not tuple:
        return times(b, a, purse)
    if len(a[0]) != len(b):
        raise Undefined
    purse.spend(len(a) * len(b) * len(b[0]))

    def cell(row, column):
        return sum((times(x, y, purse) for x, y in zip(row, column, strict=True)), Fraction(0))

    return tuple(tuple(cell(row, column) for column in zip(*b, strict=True)) for row in a)


def quotient(a, b):
    if not b or type(a) is tuple or type(b) is tuple:
        raise Undefined
    a, b = alike(a, b)
    return a / b


def alike(a, b) -> tuple:
    """Both rational, or both mpmath numbers."""
    return (a, b) if type(a) is type(b) is Fraction else (inexact(a), inexact(b))


def inexact(x):
    if type(x) is not Fraction:
        return x
    return MP.make_mpf(mpmath.libmp.from_rational(x.numerator, x.denominator, MP.prec, "n"))


def power(a, b):
    """a^b. Exact where it can be; the odd root of a negative number is the real one."""
    if a == 0:
        if not (is_real(b) and b > 0):
            raise Undefined
        return Fraction(0)
    if type(b) is Fraction and b.denominator == 1:
        n = int(b)
        if type(a) is Fraction:
            bits = max(a.numerator.bit_length(), a.denominator.bit_length())
            if (bits - 1) * abs(n) > MAX_BITS:  # before, not after
                raise TooBig
        elif n.bit_length() > 64:
            raise TooBig
        return a**n
    if type(b) is Fraction and is_real(a) and a < 0 and b.denominator % 2:
        return (-1) ** (b.numerator % 2) * power(-a, b)
    if type(b) is Fraction and type(a) is Fraction and a > 0 and b.denominator < 100:
        roots = [whole_root(n, b.denominator) for n in (a.numerator, a.denominator)]
        if None not in roots:
            return power(Fraction(*roots), Fraction(b.numerator))
    if b == HALF:
        return MP.sqrt(tame(a, 10**6))
    return MP.power(tame(a, 10**6), tame(b))


def whole_root(n: int, degree: int) -> int | None:
    """The root if it is whole; None if not, or if n is too long to tell."""
    if n.bit_length() > 200:
        return None
    root = math.isqrt(n) if degree == 2 else int(MP.nint(MP.root(n, degree)))
    return root if root**degree == n else None


def tame(x, magnitude: int = 64):
    """As an mpmath number, if a function of it costs little: nothing over 2^magnitude."""
    x = inexact(x)
    if x and abs(MP.mag(x)) > magnitude:
        raise TooBig
    return x


def is_real(x) -> bool:
    return type(x) in {Fraction, MP.mpf}


def whole(x, low: int = -(10**9), high: int = 10**9) -> int:
    if type(x) is not Fraction or x.denominator != 1 or x < low:
        raise Undefined
    if x > high:
        raise TooBig
    return int(x)


def floor(x) -> Fraction:
    if not is_real(x):
        raise Undefined
    return Fraction(math.floor(x) if type(x) is Fraction else int(MP.floor(tame(x))))


def logarithm(base, x):
    if not x or not base or base == 1:
        raise Undefined
    return MP.ln(tame(x, 10**6)) / MP.ln(tame(base, 10**6))


def largest(*values, pick=max):
    if not all(is_real(x) for x in values):
        raise Undefined
    return pick(values if all(type(x) is Fraction for x in values) else map(inexact, values))


def of(function):
    return lambda x: function(tame(x))


OPERATIONS = {
    "-": lambda a: times(Fraction(-1), a, Purse()),
    "/": quotient,
    "^": power,
    "!": lambda n: Fraction(math.factorial(whole(n, 0, 2_000))),
    "abs": abs,
    "binomial": lambda n, k: Fraction(math.comb(whole(n, 0, 2_000), whole(k, 0, 2_000))),
    "floor": floor,
    "ceil": lambda x: -floor(-x),
    "gcd": lambda *ns: Fraction(math.gcd(*map(whole, ns))),
    "lcm": lambda *ns: Fraction(math.lcm(*map(whole, ns))),
    "max": largest,
    "min": functools.partial(largest, pick=min),
    "log": logarithm,
    "ln": lambda x: logarithm(CONSTANTS["e"], x),
    "sec": of(lambda x: quotient(MP.one, MP.cos(x))),
    "csc": of(lambda x: quotient(MP.one, MP.sin(x))),
    "cot": of(lambda x: quotient(MP.cos(x), MP.sin(x))),
    "arccot": of(lambda x: MP.pi / 2 - MP.atan(x)),
    **{name: of(getattr(MP, name)) for name in "sin cos tan sinh cosh tanh exp".split()},
    **{"arc" + name: of(getattr(MP, "a" + name)) for name in ("sin", "cos", "tan")},
}


CONSTANTS = {"\\pi": +MP.pi, "e": +MP.e, "i": MP.mpc(0, 1)}


@lru_cache(maxsize=4096)
def stand_in(name: str, rank: int, point: int, discrete: bool):
    """What a symbol is at a point: in (0, 1), (1, 8), (5, 45); at 3 and 4 every other is < 0."""
    u = Fraction(crc32(f"{name} at {point}".encode()) + 1, 2**32 + 2)
    if discrete:
        return Fraction(int(2 + (4 + 9 * point) * u))
    sign = -1 if point > 2 and (rank + point) % 2 else 1
    return inexact(sign * (u, 1 + 7 * u, 5 + 40 * u, 1 + 2 * u, 2 + u)[point])


WHOLE_NUMBERS_ONLY = {"!", "binomial", "floor", "ceil", "gcd", "lcm"}


class Formula:
    """An expression as a function of its symbols; values of golds are kept for the next sample.

    `discrete`: the symbols can only be whole numbers, as in n!, floors and (-1)^n. `smooth`: sums,
    products, quotients and whole powers alone, so that two points tell two of them apart.
    """

    def __init__(self, tree: Tree):
        self.tree, self.known = tree, {}
        self.discrete, self.smooth, names = False, True, set()
        trees = [tree]
        while trees:
            operation, *parts = trees.pop()
            if operation == "symbol":
                names.add(parts[0])
            elif operation == "matrix":
                trees += [cell for row in parts for cell in row]
            elif operation != "number":
                trees += parts
                is_power = operation == "^"
                self.discrete |= operation in WHOLE_NUMBERS_ONLY or (
                    is_power
                    and parts[1][0] != "number"
                    and parts[0][0] == "number"
                    and parts[0][1] < 0
                )
                whole_power = is_power and parts[1][0] == "number" and parts[1][1].denominator == 1
                self.smooth &= operation in {"+", "-", "*", "/"} or whole_power
        self.symbols = frozenset(names - CONSTANTS.keys() - {"\\log"})
        self.bare_log = "\\log" in names  # without a base: either logarithm

    def at(self, point: int, purse: Purse, discrete: bool = False, decimal: bool = False):
        """The value at a point, or None where there is none."""
        key = point, discrete, decimal
        if key not in self.known:
            symbols = {"\\log": Fraction(10) if decimal else CONSTANTS["e"], **CONSTANTS}
            for rank, name in enumerate(sorted(self.symbols)):
                symbols[name] = stand_in(name, rank, point, discrete)
            self.known[key] = self.where(symbols, purse)
        return self.known[key]

    def where(self, symbols: dict, purse: Purse):
        """The value where the symbols have these values, or None where there is none."""
        try:
            return value(self.tree, symbols, purse)
        except (Undefined, ZeroDivisionError, ValueError):
            return None


# --- 6. answers: what a whole box can be ---------------------------------------------------------


class Text(NamedTuple):
    """Words, and whatever could not be read: equal only if written alike."""

    text: str
    has_words: bool = True


class Value(NamedTuple):
    formula: Formula
    unit: str  # "" if none
    tokens: tuple = ()


class Group(NamedTuple):
    """Ordered: tuple, interval or ratio; `brackets` is "()", "[)", ":" and so on."""

    brackets: str
    items: tuple


class Many(NamedTuple):
    """Unordered: list, set, both signs of +-."""

    items: tuple
    hedged: bool = False  # joined by "or"


class Named(NamedTuple):
    """`x = 5`; the name alone decides nothing."""

    name: str
    value: object
    equation: object = None  # the same as a Relation, for y = 2x+3 against 2x-y+3 = 0


class Relation(NamedTuple):
    """left OP right as `formula OP 0`; equal up to a factor."""

    operator: str  # = != < <=
    formula: Formula


class Reals(NamedTuple):
    """A set of real numbers: disjoint pieces (low, low is in, high, high is in) in order."""

    pieces: tuple


class Clock(NamedTuple):
    """3:30 pm in minutes of the day."""

    minutes: Fraction


class Based(NamedTuple):
    """52_8: digits and a base."""

    digits: str
    base: int


RELATIONS = {"=", "!=", "<", "<=", ">", ">=", "\\in"}
JOINS, RATIO = {",", ";", "`and", "`or"}, {":", "`to"}
SET_OPERATIONS = {"\\cup", "\\cap", "\\setminus"}
INF = float("inf")
INFINITIES = {"\\infty": INF, "- \\infty": -INF}
TOTALS = [  # how many of the first one each is
    {"s": 1, "min": 60, "h": 3600, "day": 86400, "week": 604800},
    {"in": 1, "ft": 12}, {"oz": 1, "lb": 16}, {"cm": 1, "m": 100}, {"g": 1, "kg": 1000},
    {"''": 1, "'": 60, "degree": 3600},
]  # fmt: skip
PREFIXES = {"`year", "`point", "`answer", "`day", "`number"}
ARTICLES = {"the", "a", "an"}
MONTHS = """january february march april may june july august september october november december
""".split()
ISO_DATE = re.compile(r"([12][0-9]{3})-(0[1-9]|1[0-2])-([0-3][0-9])")
SAME_WORDS = {
    **dict.fromkeys("oui sí si ja да 是 はい sim 对 yeah".split(), "yes"),
    **dict.fromkeys("non nein нет 否 いいえ não 不是".split(), "no"),
    **dict.fromkeys("doesnotexist undefined".split(), "dne"),
    **dict.fromkeys("nosolution nosolutions nosuchnumber emptyset".split(), "\\emptyset"),
    **dict.fromkeys("allrealnumbers allreals".split(), "\\Reals"),
    "infinitelymanysolutions": "infinitelymany",
    "grey": "gray",
    **dict.fromkeys(["infinity", "+ \\infty"], "\\infty"),
}


def to_text(tokens: list[str]) -> Text:
    """Words lose case and articles, units and months get one name, digits in subscripts are digits;
    symbols keep their case (S is not s)."""
    words, dropped = [], {"{", "}", "_", ".", "`and"}
    dropped |= {",", "&"} if "\\end{cases}" in tokens else set()
    for before, token in zip(["", *tokens], tokens, strict=False):
        word = token.removeprefix("`")
        after_number = is_number(before) and (word in UNITS or word.removesuffix("s") in UNITS)
        if after_number:
            word = UNITS.get(word) or UNITS[word.removesuffix("s")]
        if token[0] == "`" and word.lower() in ARTICLES and len(tokens) > 1:
            continue
        if token not in dropped or len(tokens) == 1:
            words.append(word)
    has_words = any(t[0] == "`" or not t.isascii() for t in tokens)
    months = [i for i, w in enumerate(words) if len(w) > 2 and month_of(w)]
    if len(months) == 1 and 2 <= len(words) <= 6:  # July 4, 2020 is 4 July 2020
        name = month_of(words.pop(months[0]))
        days = [w for w in words if w not in {",", "of", "th", "st", "nd", "rd"}]
        words = [name, *sorted((d.lstrip("0") for d in days), key=len)]
    text = re.sub(r"(?<=[^\W\d_]) (?=[^\W\d_])", "", " ".join(words))
    return Text(SAME_WORDS.get(text.lower(), text), has_words)


def month_of(word: str) -> str:
    full = [m for m in MONTHS if m == word.lower() or m[:3] == word.lower()]
    return full[0] if full else ""


def to_formula(tokens: list[str]) -> Formula:
    parser = Parser(tokens)
    tree = parser.sum()
    if parser.peek():
        raise Unparsed
    return Formula(tree)


def difference(left: Formula, right: Formula) -> Formula:
    return Formula(("+", left.tree, negative(right.tree)))


# --- 7. read: tokens to an answer ----------------------------------------------------------------


def read_answer(tokens: list[str], purse: Purse) -> tuple:
    """Tokens -> an answer: separators first, then brackets, then numbers and words."""
    if not tokens:
        raise Unparsed

    def read_all(pieces):
        if len(pieces) > MAX_ITEMS:
            raise TooBig
        return [read_answer(piece, purse) for piece in pieces]

    top = at_top(tokens)
    if tokens[0][7:-1] in SYSTEMS and len(top) == 1:
        rows = split_top([t for t in tokens[1:-1] if t != "&"], {"\\\\"})
        if all("=" in row for row in rows):
            return flat(read_all(rows))
    if "\\approx" in top:  # 1/3 \approx 0.33 is 1/3, x \approx 0.33 is 0.33
        at = tokens.index("\\approx")
        tokens[at] = "="
        if not is_name(tokens[:at]):
            tokens = tokens[:at]
        return read_answer(tokens, purse)
    if "`and" in top and (total := read_total(tokens)):
        return total
    if not JOINS.isdisjoint(top) and len(pieces := split_top(tokens, JOINS)) > 1:
        if not (date := to_text(tokens)).text.startswith(tuple(MONTHS)):
            return flat(read_all(pieces), hedged="`or" in top)
        return date
    if tokens == ["\\{", "\\}"]:
        return Text("\\emptyset")
    if operators := [t for t in top if t in RELATIONS]:
        return read_relation(split_top(tokens, RELATIONS), operators, tokens, purse)
    if tokens[0] == "\\Reals" or not SET_OPERATIONS.isdisjoint(top):
        return read_set(tokens, [t for t in top if t in SET_OPERATIONS], purse)
    if not RATIO.isdisjoint(top) and len(pieces := split_top(tokens, RATIO)) > 1:
        half = pieces[-1].pop()[1:].lower() if pieces[-1][-1].lower() in {"`am", "`pm"} else ""
        ratio = Group(":", tuple(read_all(pieces)))
        return read_clock(ratio, half) if half else ratio
    is_label = tokens[0] in SYMBOLS or tokens[0].lower() == "`point"
    if len(tokens) > 3 and is_label and tokens[1] == "(" and "," in tokens:
        tokens, top = tokens[1:], top[1:]  # the point P(3, -4)
    if len(top) == 1 and tokens[0] in {"(", "[", "\\{", "{"} and tokens[-1] in CLOSE:
        pieces = split_top(tokens[1:-1], {",", ";"})
        bar = next((i for i, t in enumerate(tokens) if t in {"|", ":"}), 0)
        if tokens[0] == "\\{" and bar and is_name(tokens[1:bar]):  # {x | x < 3}
            return read_answer(tokens[bar + 1 : -1], purse)
        if tokens[0] == "\\{" or (tokens[0] == "{" and len(pieces) > 1):
            return flat(read_all(pieces))
        if len(pieces) > 1 and "\\pm" not in tokens:
            return Group(tokens[0] + tokens[-1], tuple(read_all(pieces)))
        is_plain_group = tokens[0] == "(" or {"\\over", "\\choose"}.isdisjoint(tokens)
        if len(pieces) == 1 and tokens[0] in {"(", "{"} and is_plain_group:
            return read_answer(tokens[1:-1], purse)
    if tokens.count("\\pm") == 1:
        at = tokens.index("\\pm")
        return flat(read_all([tokens[:at] + [sign] + tokens[at + 1 :] for sign in "+-"]))
    return read_value(tokens, purse)


def flat(items: list, hedged: bool = False) -> Many:
    """A list inside a list, as \\pm makes it, is one list."""
    lists = (item.items if type(item) is Many else [item] for item in items)
    return Many(tuple(x for items in lists for x in items), hedged)


def read_value(tokens: list[str], purse: Purse) -> tuple:
    """A number or expression, perhaps with a unit; text if it is neither."""
    if len(tokens) == 5 and (date := ISO_DATE.fullmatch("".join(tokens))):
        return Text(f"{MONTHS[int(date[2]) - 1]} {int(date[3])} {date[1]}")
    if len(tokens) > 3 and (total := read_total(tokens)):
        return total
    if "_" in tokens[-4:-1] and (based := read_based(tokens)):
        return based
    try:
        body, unit = split_unit(tokens, purse.is_gold)
        if unit in {"am", "pm"} and len(body) == 1:
            whole_hour = Value(Formula(number(0)), "")
            return read_clock(Group(":", (Value(to_formula(body), ""), whole_hour)), unit)
        return Value(to_formula(body), unit, tuple(body))
    except Unparsed:
        pass
    try:  # \cos 72^\circ + i \sin 72^\circ
        return Value(to_formula(tokens), "", tuple(tokens))
    except Unparsed:
        text = to_text(tokens)
        return REALS if text.text == "\\Reals" else text


def read_clock(ratio: Group, half: str) -> Clock:
    """3:30 pm is 15:30."""
    hours, minutes = (x.formula.tree[1] if type(x) is Value else None for x in ratio.items[:2])
    if type(hours) is not Fraction or type(minutes) is not Fraction:
        raise Unparsed
    return Clock((hours % 12 + 12 * (half == "pm")) * 60 + minutes)


def read_total(tokens: list[str]) -> Value | None:
    """2 hours 15 minutes, 5 ft 3 in, 63 degrees 45' as one number of the smallest unit."""
    text = "".join(t for t in tokens if t not in {"`and", ","})
    pairs = re.findall(r"([0-9]+(?:\.[0-9]+)?)(`?[A-Za-z]+|'+)", text)
    if len(pairs) < 2 or "".join(n + unit for n, unit in pairs) != text:
        return None
    units = [unit.lstrip("`") for _, unit in pairs]
    units = [UNITS.get(unit) or UNITS.get(unit.removesuffix("s"), unit) for unit in units]
    units = ["min" if unit == "m" and "h" in units else unit for unit in units]  # 3h 41m
    for family in TOTALS:
        if all(unit in family for unit in units):
            total = sum(to_fraction(n) * family[u] for (n, _), u in zip(pairs, units, strict=True))
            return Value(Formula(number(total)), f"total {next(iter(family))}")
    return None


def read_based(tokens: list[str]) -> Based | None:
    """1011_2, AB3_{16}, 52_{\\text{eight}}."""
    text = re.sub("[{}()`]", "", "".join(tokens))
    match = re.fullmatch(r"([0-9A-Za-z]*[0-9][0-9A-Za-z]*|[A-F]+)_([0-9]{1,2})", text)
    if not match or not 2 <= int(match[2]) <= 36 or len(match[1]) > 200:
        return None
    return Based(match[1].upper().lstrip("0"), int(match[2]))


# --- 8. units ------------------------------------------------------------------------------------


def split_unit(tokens: list[str], is_gold: bool) -> tuple[list[str], str]:
    """`5 cm` -> 5, "cm"; "m s^-2" for m/s^2. A noun that is no unit counts as one: 5 apples."""
    if tokens[0] in {"`dollars", "`euros", "`pounds", "`yen", "`rupees", "`yuan", "`USD"}:
        tokens = tokens[1:] + tokens[:1]
    if tokens[0].lower() in PREFIXES and len(tokens) > 1:
        tokens = tokens[1:]
    end, depths = None, [0, *itertools.accumulate((t in OPEN) - (t in CLOSE) for t in tokens)]
    for start, token in enumerate(tokens):
        if token[0] == "`":
            end = start
            while end and tokens[end - 1] in {"^", "{", "\\", "\\mu", "*"}:  # 5^{\text{th}}
                end -= 1
            if depths[end] == 0:
                break
    else:
        return tokens, ""
    body = tokens[:end]
    tail = [t for t in tokens[len(body) :] if t not in {"{", "}"}]
    if tail == ["`degrees"] and not TRIGONOMETRIC.isdisjoint(body):  # \sin 30^\circ
        return tokens, ""
    while tail[0] in {"^", "\\", "*"}:
        tail.pop(0)
    return body, unit_of(tail, is_gold)


def unit_of(tail: list[str], is_gold: bool) -> str:
    """Canonical text of a unit: names in order with their exponents."""
    powers, sign, times, unknown, at, name = Counter(), 1, 1, [], 0, None
    tail = " ".join(COMPOUND_UNITS.get(t.lstrip("`"), t) for t in tail)
    tail = re.sub(r"\\mu `?(?=[A-Za-z])", "`u", tail).split()
    while at < len(tail):
        token = tail[at]
        word = token.removeprefix("`")
        known = (
            UNITS.get(word) or UNITS.get(word.lower()) or UNITS.get(word.lower().removesuffix("s"))
        )
        if token in {"/", "`per"}:
            sign, name = -1, None
        elif token in {"^", "`squared", "`cubed"} and name:
            exponent = {"`squared": 2, "`cubed": 3}.get(token)
            if exponent is None:
                at += 1
                minus = at < len(tail) and tail[at] == "-"
                at += minus
                if at >= len(tail) or tail[at] not in set("123456"):
                    raise Unparsed
                exponent = int(tail[at]) * (-1 if minus else 1)
            powers[name] += sign * (exponent - 1)
        elif word in {"square", "sq", "cubic"}:
            times = 3 if word == "cubic" else 2
        elif token in {"*", "(", ")", "."}:
            pass
        elif known:
            if powers["percent"]:
                raise Unparsed  # 5\%\%
            name = known
            powers[name] += sign * times
            times = 1
        elif token[0] != "`" or word.lower() in NOT_UNITS or word.lower() in MONTHS:
            raise Unparsed
        elif word.lower() not in ARTICLES:
            unknown.append(word.lower().removesuffix("s"))
        at += 1
    if len(unknown) > (3 if is_gold else 2):
        raise Unparsed
    for ignored in ("th", "unit", *(["degree"] if powers["C"] or powers["F"] else [])):
        powers.pop(ignored, None)
    if unknown and not powers:
        powers[unknown[-1]] = 1
    return " ".join(n if p == 1 else f"{n}^{p}" for n, p in sorted(powers.items()) if p)


# --- 9. equations and inequalities ---------------------------------------------------------------


def read_relation(parts: list, operators: list, tokens: list[str], purse: Purse) -> tuple:
    """x = 5, 2x + y = 3, x < 3, 1 < x <= 2, x \\in [0, 1); anything else is text."""
    if len(parts) != len(operators) + 1 or len(parts) > 6:
        return to_text(tokens)
    if set(operators) <= {"=", "\\in"} and is_name(parts[0]):
        return read_named(parts, operators, purse)
    try:
        sides = [to_formula(part) for part in parts]
    except Unparsed:
        return to_text(tokens)
    if set(operators) == {"="}:
        return read_equation(parts, sides, tokens, purse)
    if "\\in" in operators or len(parts) > 3:
        return to_text(tokens)
    if any(operator in {">", ">="} for operator in operators):
        if not all(operator in {">", ">="} for operator in operators):
            return to_text(tokens)
        operators, sides = [o.replace(">", "<") for o in reversed(operators)], sides[::-1]
        parts = parts[::-1]
    if found := as_interval(operators, sides, parts, purse):
        return found
    if len(sides) > 2:
        return to_text(tokens)
    return relation(operators[0], *sides, purse)


def read_named(parts: list, operators: list, purse: Purse) -> tuple:
    """`x = 5 + 6 = 11` is 11: as with boxes, what comes last is the answer."""
    name = re.sub("[`{}]|\\([a-z]\\)$", "", "".join(parts[0]))  # y(x) is y
    name = re.sub(r"^\\fracd([a-z])d[a-z]$", r"\1'", name)
    answer = read_answer(parts[-1], purse)
    equation = None
    if operators == ["="]:
        try:
            equation = relation("=", to_formula(parts[0]), to_formula(parts[1]), purse)
        except Unparsed:
            pass
    return Named(name, answer, equation)


def read_equation(parts: list, sides: list[Formula], tokens: list, purse: Purse) -> tuple:
    """5 = x names x, 2 + 3 = 5 is 5, all else an equation."""
    if len(parts) == 2 and is_name(parts[1]) and not sides[0].symbols:
        return read_named(parts[::-1], ["="], purse)
    if not any(side.symbols for side in sides):
        values = [side.at(0, purse) for side in sides]
        alike = len({to_text(part) for part in parts}) < len(parts)
        if alike or None in values or not all(equal(v, values[-1]) for v in values):
            raise Unparsed  # 1 = 1, 2 = 3
        return read_value(parts[-1], purse)
    return relation("=", *sides, purse) if len(sides) == 2 else to_text(tokens)


def is_name(tokens: list[str]) -> bool:
    """x, a_1, f(x), |AB|, (x, y), P(X > 2), `triangle area`; no arithmetic: 2+3 is no name."""
    depth = 0
    if tokens[1:2] == ["^"] and tokens[0] in {*string.ascii_uppercase, "f", "g"}:  # A^n, f^{-1}(x)
        exponent = "".join(tokens[2:6])
        tokens = tokens[:1] + tokens[6:] if exponent == "{-1}" else tokens[:1] + tokens[3:]
    for before, token in zip(["", *tokens], tokens, strict=False):
        depth += (token in OPEN) - (token in CLOSE)
        is_subscript = is_number(token) and (before in {"_", "{"} or depth)
        if token in {"+", "-", "*", "/", "^", "\\sqrt", "`not"} and not depth:
            return False
        if is_number(token) and not is_subscript:
            return False
    return any(token in SYMBOLS or token[0] == "`" for token in tokens)


def fraction_of(tree: Tree) -> tuple[Tree, Tree]:
    """(numerator, denominator), so that y = 6/x is xy = 6."""
    operation, *parts = tree
    if operation not in {"+", "*", "/", "-"}:
        return tree, number(1)
    split = [fraction_of(part) for part in parts]
    if operation == "-":
        return negative(split[0][0]), split[0][1]
    if operation == "/":
        (a, b), (c, d) = split
        return product_of([a, d]), product_of([b, c])
    bottoms = [bottom for _, bottom in split]
    if operation == "*":
        return product_of([top for top, _ in split]), product_of(bottoms)
    if all(bottom == number(1) for bottom in bottoms):
        return tree, number(1)
    others = [bottoms[:i] + bottoms[i + 1 :] for i in range(len(split))]
    tops = [product_of([top, *rest]) for (top, _), rest in zip(split, others, strict=True)]
    return ("+", *tops), product_of(bottoms)


def relation(operator: str, left: Formula, right: Formula, purse: Purse) -> Relation:
    """0 = 0, 1 = 1 and x = x say nothing: Unparsed."""
    formula = difference(left, right)
    if operator == "=":
        tree, _ = fraction_of(formula.tree)
        formula = Formula(tree)
    if all(formula.at(k, Purse() if purse.is_gold else purse) in (0, None) for k in range(2)):
        raise Unparsed
    return Relation(operator, formula)


def as_interval(operators: list, sides: list[Formula], parts: list, purse: Purse) -> Named | None:
    """x <= 3 -> x = (-infinity, 3], 1 < 2x <= 2 -> x = (1/2, 1], x != 0 -> all but 0, |x| < 3 ->
    (-3, 3); None unless one thing stands between numbers."""
    middle = next((i for i, side in enumerate(sides) if side.symbols), None)
    if middle is None or len(operators) > 1 + (middle == 1):
        return None
    if any(side.symbols for i, side in enumerate(sides) if i != middle):
        if len(sides) > 2:
            return None
        sides, middle = [difference(*sides), Formula(number(0))], 0
    subject = sides[middle]
    in_bars = subject.tree[0] == "abs" and len(sides) == 2
    if in_bars:
        subject = Formula(subject.tree[1])
    line = as_line(subject, purse)
    if line is None and len(sides) == 2:
        return None
    name, scale, shift = line or ("".join(parts[middle]), MP.one, MP.zero)
    low, low_in, high, high_in = -INF, False, INF, False
    for i, operator in enumerate(operators):
        bound = sides[i + 1 if middle == i else i].at(0, purse)
        if bound is None or not is_real(bound):
            return None
        bound = inexact(bound)
        ends = sorted([(bound - shift) / scale, (-bound - shift) / scale])
        if in_bars and bound > 0 and operator != "!=":
            inside = ((ends[0], operator == "<=", ends[1], operator == "<="),)
            outside = complement(((ends[0], operator == "<", ends[1], operator == "<"),))
            return Named(name, Reals(inside if middle == 0 else outside))
        bound = (bound - shift) / scale
        if in_bars:
            return None
        if operator == "!=":
            return Named(name, Reals(complement(((bound, True, bound, True),))))
        if (middle == i) == (scale > 0):
            high, high_in = bound, operator == "<="
        else:
            low, low_in = bound, operator == "<="
    return Named(name, Reals(((low, low_in, high, high_in),))) if low < high else None


def as_line(formula: Formula, purse: Purse) -> tuple | None:
    """(x, a, b) if the formula is a x + b."""
    if len(formula.symbols) != 1 or formula.discrete:
        return None
    (name,) = formula.symbols
    symbols = {**CONSTANTS, "\\log": CONSTANTS["e"]}
    values = [formula.where({**symbols, name: Fraction(x)}, purse) for x in (0, 1, 3)]
    if not all(is_real(v) for v in values):
        return None
    at_0, at_1, at_3 = map(inexact, values)
    slope = at_1 - at_0
    return (name, slope, at_0) if slope != 0 and equal(at_3 - at_0, 3 * slope) else None


# --- 10. sets of real numbers --------------------------------------------------------------------

REALS = Reals(((-INF, False, INF, False),))


def union(pieces: Iterator[tuple]) -> tuple:
    """Overlapping and touching pieces become one."""
    merged = []
    for low, low_in, high, high_in in sorted(pieces, key=lambda p: (p[0], not p[1])):
        if merged and (low < merged[-1][2] or (low == merged[-1][2] and (low_in or merged[-1][3]))):
            before = merged[-1]
            end = max((before[2], before[3]), (high, high_in))
            merged[-1] = (before[0], before[1], *end)
        else:
            merged.append((low, low_in, high, high_in))
    return tuple(merged)


def complement(pieces: tuple) -> tuple:
    """The gaps between the pieces: they end where a piece begins, with that point or without."""
    starts = [(-INF, True), *((high, high_in) for *_, high, high_in in pieces)]
    stops = [*((low, low_in) for low, low_in, *_ in pieces), (INF, True)]
    gaps = [(a, not a_in, b, not b_in) for (a, a_in), (b, b_in) in zip(starts, stops, strict=True)]
    return tuple(g for g in gaps if g[0] < g[2] or (g[0] == g[2] and g[1] and g[3]))


def read_set(tokens: list[str], operations: list[str], purse: Purse) -> tuple:
    """[0, 1) \\cup (2, 3), \\mathbb{R} \\setminus \\{1\\}, from left to right."""
    if tokens == ["\\Reals"]:
        return REALS
    pieces = split_top(tokens, SET_OPERATIONS)
    if len(pieces) != len(operations) + 1 or not operations:
        return to_text(tokens)
    answers = [read_answer(piece, purse) for piece in pieces]
    sets = [to_reals(answer, purse) for answer in answers]
    if None in sets:  # ends with symbols
        return Many(tuple(answers)) if set(operations) == {"\\cup"} else to_text(tokens)
    total = sets[0].pieces
    for operation, other in zip(operations, sets[1:], strict=True):
        if operation == "\\cup":
            total = union((*total, *other.pieces))
        else:
            keep = other.pieces if operation == "\\cap" else complement(other.pieces)
            total = complement(union((*complement(total), *complement(keep))))
    return Reals(total)


def to_reals(answer: object, purse: Purse) -> Reals | None:
    """An interval, or a list of them or of numbers, as a set; None if its ends are no numbers."""
    if type(answer) is Named:
        return to_reals(answer.value, purse)
    if type(answer) is Reals:
        return answer
    if type(answer) is Many:
        sets = [to_reals(item, purse) for item in answer.items]
        if None in sets:
            return None
        names = {item.name if type(item) is Named else None for item in answer.items}
        gaps = union(p for s in sets for p in complement(s.pieces))
        if len(names) == 1 and None not in names and not answer.hedged and complement(gaps):
            return Reals(complement(gaps))  # x > 2, x != 3: both
        return Reals(union(p for s in sets for p in s.pieces))
    if type(answer) is Value:
        x = real_of(answer, purse)
        return None if x is None else Reals(((x, True, x, True),))
    if type(answer) is not Group or len(answer.items) != 2 or answer.brackets == ":":
        return None
    low, high = (real_of(item, purse) for item in answer.items)
    if low is None or high is None or not low < high:
        return None
    return Reals(((low, answer.brackets[0] == "[", high, answer.brackets[1] == "]"),))


def real_of(answer: object, purse: Purse):
    """The real number that an answer is, or None; infinities are numbers here."""
    if type(answer) is Text:
        return INFINITIES.get(answer.text)
    if type(answer) is not Value or answer.formula.symbols or answer.unit:
        return None
    x = answer.formula.at(0, Purse() if purse.is_gold else purse)
    return inexact(x) if x is not None and is_real(x) else None


# --- 11. same: by the type of the gold -----------------------------------------------------------


class Rules(NamedTuple):
    purse: Purse  # pays for the answer; each value of a gold, which is trusted, has its own
    gold_purse: Purse | None = None
    precision: float | None = None  # decimals to round to
    digits: int | None = None  # right digits that stand for an irrational number


def equal(a, b) -> bool:
    """Two values: exactly if both are rational, else to 40 digits."""
    if type(a) is tuple or type(b) is tuple:
        if type(a) is not type(b) or [len(row) for row in a] != [len(row) for row in b]:
            return False
        return all(map(equal, entries(a), entries(b)))
    if type(a) is Fraction and type(b) is Fraction:
        return a == b
    a, b = inexact(a), inexact(b)
    size = max(abs(a), abs(b))
    return abs(a - b) <= (size * CLOSE_ENOUGH if a and b else NOTHING)


def values_at_points(gold: Formula, answer: Formula, rules: Rules, decimal: bool) -> Iterator:
    """Pairs of values at the points where both exist; complex ones only if real ones lack."""
    discrete, real, unreal = gold.discrete or answer.discrete, 0, []
    must = [0, 3, 4][: 1 + len(gold.symbols)]  # the signs matter to roots and bars
    points = must + [1, 2]
    if not gold.symbols:
        must = points = [0]
    elif discrete:
        must = points = [0, 1, 2, 3]
    elif gold.smooth and answer.smooth:
        must = points = [0, 1]
    for point in points:
        if real >= 2 and point not in must:
            return
        g = gold.at(point, rules.gold_purse or Purse(), discrete, decimal)
        a = answer.at(point, rules.purse, discrete, decimal)
        if g is None or a is None:
            continue
        if gold.symbols and MP.mpc in (type(g), type(a)):  # \ln x^2 and 2\ln x for a negative x
            unreal.append((g, a))
        else:
            real += 1
            yield g, a
    yield from (unreal if real < 2 else [])


def same_formula(gold: Formula, answer: Formula, rules: Rules) -> bool:
    """The same symbols, and at the fixed points the same values."""
    if gold.symbols != answer.symbols:
        return False
    for decimal in (False, True)[: 1 + (gold.bare_log or answer.bare_log)]:
        agree = [equal(*pair) for pair in until_they_differ(gold, answer, rules, decimal)]
        if all(agree) and len(agree) > bool(gold.symbols):
            return True
    return False


def until_they_differ(gold, answer, rules, decimal) -> Iterator[tuple]:
    for pair in values_at_points(gold, answer, rules, decimal):
        yield pair
        if not equal(*pair):
            return


def entries(x) -> list:
    """The numbers of a matrix, or the number."""
    return [cell for row in x for cell in row] if type(x) is tuple else [x]


def same_relation(gold: Relation, answer: Relation, rules: Rules) -> bool:
    """The same operator, and one side a constant times the other; a positive one for < and <=."""
    left, right = gold.formula, answer.formula
    if gold.operator != answer.operator or left.symbols != right.symbols:
        return False
    pairs = []
    for u, v in values_at_points(left, right, rules, decimal=False):
        if len(entries(u)) != len(entries(v)):
            return False
        pairs += zip(entries(u), entries(v), strict=True)
    zeros = [bool(u) == bool(v) for u, v in pairs]
    pairs = [(u, v) for u, v in pairs if u and v]
    if len(pairs) < 2 or not all(zeros):
        return False
    first, second = pairs[0]
    if gold.operator in {"<", "<="} and not all(is_real(x) for pair in pairs for x in pair):
        return False
    if gold.operator in {"<", "<="} and first * second < 0:
        return False
    return all(equal(u * second, v * first) for u, v in pairs[1:])


def same(gold: object, answer: object, rules: Rules) -> bool:
    """Both sides in a common form, then by the type of the gold."""
    gold, answer = (
        x.items[0] if type(x) is Many and len(x.items) == 1 else x for x in (gold, answer)
    )
    several = type(gold.value if type(gold) is Named else gold) in {Many, Reals}
    if type(answer) is Many and answer.hedged and not several:  # 1/2 or 0.5
        return all(type(x) in {Value, Named} and same(gold, x, rules) for x in answer.items)
    if type(gold) is Named and type(answer) is Named:
        fits = gold.name == answer.name or (  # y = 2x is not z = 2x, x = -3 not y = -3
            is_plain(answer.value) and not {gold.name, answer.name} <= {"x", "y", "z"}
        )
        if fits and same(gold.value, answer.value, rules):
            return True
        if gold.name == answer.name and None in (gold.equation, answer.equation):
            return False
    if Relation in (type(gold), type(answer)) or type(gold) is type(answer) is Named:
        gold, answer = (x.equation if type(x) is Named else x for x in (gold, answer))
        both = type(gold) is type(answer) is Relation
        return both and same_relation(gold, answer, rules)
    if Many in (type(gold), type(answer)):
        gold, answer = by_name(gold), by_name(answer)
        gold, answer = in_order(gold, answer), in_order(answer, gold)
    gold, answer = (x.value if type(x) is Named else x for x in (gold, answer))
    if Reals in (type(gold), type(answer)):
        sets = to_reals(gold, rules.gold_purse or Purse()), to_reals(answer, rules.purse)
        return None not in sets and same_reals(*sets)
    if Clock in (type(gold), type(answer)):
        return same_clock(gold, answer)
    if type(gold) is Group and type(answer) is Group and gold.brackets == answer.brackets == ":":
        return same_ratio(gold, answer, rules)
    gold, answer = as_quotient(gold, answer), as_quotient(answer, gold)
    gold, answer = as_tuple(gold, answer), as_tuple(answer, gold)
    if {type(gold), type(answer)} == {Text, Value}:  # \text{e}
        gold, answer = (to_text(x.tokens) if type(x) is Value else x for x in (gold, answer))
    if type(gold) is not type(answer):
        return False
    if type(gold) is Value:
        return same_value(gold, answer, rules)
    if type(gold) is Text and (gold.has_words or answer.has_words) and len(gold.text) > 1:
        return gold.text.lower() == answer.text.lower()
    if type(gold) in {Text, Based}:
        return gold[:1] == answer[:1] if type(gold) is Text else gold == answer
    return same_items(gold, answer, rules)


def same_items(gold: Group | Many, answer: Group | Many, rules: Rules) -> bool:
    """In order, or every item of the gold takes one of the answer's. A set may name one twice."""
    if type(gold) is Many and len(answer.items) > len(gold.items):
        first, one_box = [], rules._replace(gold_purse=rules.purse)
        for item in answer.items:
            first += [] if any(same(item, other, one_box) for other in first) else [item]
        answer = Many(tuple(first))
    if len(gold.items) != len(answer.items):
        return False
    if type(gold) is Group:
        kinds = {gold.brackets, answer.brackets}
        pairs = zip(gold.items, answer.items, strict=True)
        return (len(kinds) == 1 or kinds == {"parts", "()"}) and all(
            same(g, a, rules) for g, a in pairs
        )
    left = list(answer.items)
    named = all(type(x) is Named for x in gold.items + answer.items)
    for g in gold.items:
        fitting = (a for a in left if (not named or g.name == a.name) and same(g, a, rules))
        if (found := next(fitting, None)) is None:
            return False
        left.remove(found)
    return True


def by_name(answer: object) -> object:
    """(p, q) = (5, 2) -> p = 5, q = 2."""
    if type(answer) is Named and type(answer.value) is Group and answer.name[:1] == "(":
        names, items = answer.name[1:-1].split(","), answer.value.items
        if len(names) == len(items):
            pairs = zip(names, items, strict=True)
            return Many(tuple(Named(name, item) for name, item in pairs))
    return answer


def in_order(answer: object, other: object) -> object:
    """x = 1, y = 2 where the other side is a tuple; a list where it is (a) ... (b) ..."""
    if type(answer) is not Many or type(other) is not Group:
        return answer
    names = [x.name for x in answer.items if type(x) is Named]
    if other.brackets == "()" and len(set(names)) == len(answer.items) and names == sorted(names):
        return Group("()", tuple(x.value for x in answer.items))
    return Group("parts", answer.items) if other.brackets == "parts" else answer


def is_plain(answer: object) -> bool:
    return type(answer) is Value and not answer.formula.symbols


def same_reals(gold: Reals, answer: Reals) -> bool:
    if len(gold.pieces) != len(answer.pieces):
        return False
    return all(
        (a, b) == (c, d)
        and all(x == y or (abs(x) != INF != abs(y) and equal(x, y)) for x, y in ends)
        for (e, a, f, b), (g, c, h, d) in zip(gold.pieces, answer.pieces, strict=True)
        for ends in [((e, g), (f, h))]
    )


def same_clock(gold: object, answer: object) -> bool:
    """3:30 pm is 15:30, and 3:30 where a side does not say which half of the day."""
    minutes = []
    for side in (gold, answer):
        if type(side) is Group and side.brackets == ":" and all(map(is_plain, side.items)):
            hours, rest = (item.formula.tree[1] for item in side.items[:2])
            minutes.append(hours * 60 + rest if type(hours) is type(rest) is Fraction else None)
        else:
            minutes.append(side.minutes if type(side) is Clock else None)
    if None in minutes:
        return False
    unsaid = type(gold) is not type(answer) and min(minutes) <= 720
    return minutes[0] == minutes[1] or (unsaid and abs(minutes[0] - minutes[1]) == 720)


def same_ratio(gold: Group, answer: Group, rules: Rules) -> bool:
    """2:4 is 1:2: every item against the first. But 2:40 and 1:20 are times of day."""
    if len(gold.items) != len(answer.items):
        return False
    if all(same(g, a, rules) for g, a in zip(gold.items, answer.items, strict=True)):
        return True
    if not all(type(x) is Value and not x.unit for x in gold.items + answer.items):
        return False
    if all(len("".join(x.items[1].tokens)) == 2 for x in (gold, answer)):
        return False
    g, a = ([x.formula for x in side.items] for side in (gold, answer))
    crossed = zip(
        [of_two("*", x, a[0]) for x in g[1:]], [of_two("*", y, g[0]) for y in a[1:]], strict=True
    )
    return all(same_formula(x, y, rules) for x, y in crossed) and not any(
        x.tree == number(0) for x in g + a
    )


def of_two(operation: str, a: Formula, b: Formula) -> Formula:
    return Formula((operation, a.tree, b.tree))


def as_quotient(answer: object, other: object) -> object:
    """3:4 where the other side is a number."""
    if type(other) is not Value or type(answer) is not Group or answer.brackets != ":":
        return answer
    if len(answer.items) != 2 or not all(is_plain(x) and not x.unit for x in answer.items):
        return answer
    top, bottom = (x.formula for x in answer.items)
    return Value(of_two("/", top, bottom), "")


AXES = ["i_vec", "j_vec", "k_vec"]


def along(tree: Tree, axis: str) -> Tree:
    """The coefficient of a unit vector: it is 1 and the others are 0."""
    if tree[0] == "symbol":
        return number(tree[1] == axis) if tree[1] in AXES else tree
    return tree if tree[0] == "number" else (tree[0], *(along(part, axis) for part in tree[1:]))


def as_tuple(answer: object, other: object) -> object:
    """A column or row vector where the other side is a tuple."""
    is_vector = type(other) is Group and other.brackets == "()"
    is_vector |= type(other) is Value and other.formula.tree[0] == "matrix"
    if type(answer) is not Value:
        return answer
    axes = answer.formula.symbols & set(AXES)
    if axes and (is_vector or type(other) is Group):
        size = len(other.items) if type(other) is Group else 3
        return Group("()", tuple(
            Value(Formula(along(answer.formula.tree, axis)), "")
            for axis in AXES[:size]))  # fmt: skip
    if not is_vector or type(other) is Value:
        return answer
    operation, *rows = answer.formula.tree
    if operation != "matrix" or 1 not in (len(rows), len(rows[0])):
        return answer
    cells = [Formula(cell) for row in rows for cell in row]
    return Group("()", tuple(Value(cell, "") for cell in cells))


# --- 12. same numbers: units, percent, rounding --------------------------------------------------


def same_value(gold: Value, answer: Value, rules: Rules) -> bool:
    if bool(gold.unit) != bool(answer.unit):  # 9.8 m/s^2 where letters could be units
        gold, answer = with_unit(gold, answer), with_unit(answer, gold)
    if gold.unit != answer.unit and "total" in gold.unit + answer.unit:
        gold, answer = as_total(gold, answer), as_total(answer, gold)
    if gold.unit and answer.unit and gold.unit != answer.unit:
        return False
    if same_constant(gold, answer, rules):
        return True
    return not disagree_on_percent(gold, answer) and same_formula(
        gold.formula, answer.formula, rules
    )


def with_unit(answer: Value, other: Value) -> Value:
    """`9.8 m/s^2` read again with its letters as a unit, if the other side has one."""
    if answer.unit or not other.unit or not answer.formula.symbols:
        return answer
    letters = {*UNIT_LETTERS, "\\mu", "\\Omega"}
    start = next((i for i, t in enumerate(answer.tokens) if t in letters), 0)
    body, tail = list(answer.tokens[:start]), " ".join(answer.tokens[start:])
    while body and body[-1] in {"*", "{", "\\frac"}:
        body.pop()
    tail = tail.replace("} {", "/").replace("\\Omega", "`ohm").replace("{", "").replace("}", "")
    try:
        return Value(to_formula(body), unit_of(tail.split(), False), tuple(body))
    except Unparsed:
        return answer


def as_total(answer: Value, other: Value) -> Value:
    """135 minutes in seconds where the other side is 2 hours 15 minutes."""
    for family in TOTALS:
        if other.unit == f"total {next(iter(family))}" and answer.unit in family:
            scale = Formula(number(family[answer.unit]))
            return Value(of_two("*", answer.formula, scale), other.unit)
    return answer


def disagree_on_percent(gold: Value, answer: Value) -> bool:
    return gold.unit != answer.unit and "percent" in (gold.unit, answer.unit)


def same_constant(gold: Value, answer: Value, rules: Rules) -> bool:
    """Percent, rounding and decimals for irrational golds, where both sides are real numbers."""
    if gold.formula.symbols or answer.formula.symbols:
        return False
    g = gold.formula.at(0, rules.gold_purse or Purse())
    a = answer.formula.at(0, rules.purse)
    if any(x is None or type(x) is tuple or not is_real(x) for x in (g, a)):
        return False
    if disagree_on_percent(gold, answer):  # 50% is 0.5, and 50 where the question asks for percent
        percent, plain = (g, a) if gold.unit else (a, g)
        return equal(plain * 100, percent) or (equal(plain, percent) and abs(plain) > 1)
    if rules.precision is not None and rounded(g, rules.precision) == rounded(a, rules.precision):
        return True
    return rules.digits is not None and is_decimal_of(g, answer.tokens, rules.digits)


def rounded(x, decimals: float) -> int:
    """Half away from zero, as people do it; in units of the last place."""
    scaled = abs(x) * 10 ** min(max(int(decimals), 0), 12)
    nearest = floor(scaled + Fraction(1, 2))
    return int(nearest) * (1 if x > 0 else -1)


def is_decimal_of(gold, tokens: tuple, digits: int) -> bool:
    """3.14159 for pi: every digit right, the last one rounded, at least `digits` of them."""
    text = "".join(tokens)
    if type(gold) is Fraction or not re.fullmatch(r"-?[0-9]*\.[0-9]{1,60}", text):
        return False
    places = len(text.partition(".")[2])
    significant = len(text.replace(".", "").lstrip("-0"))
    error = abs(gold - inexact(Fraction(text)))
    return significant >= digits and error * 2 <= MP.mpf(10) ** -places


# --- 13. letters ---------------------------------------------------------------------------------

LABEL = re.compile(
    r"(?:(?:the )?(?:correct )?(?:option|choice|answer|选项|答案是?)(?: is)?:? ?)?"
    r"(?:\(([A-Z])\)|([A-Z]))(?: ?[.:)]$|$|(?<=\)) ?[.:]? ?(.+)|(?<!\)) ?[.:)] ?(.+))",
    re.I | re.S,
)
LETTERS = re.compile(r"\(?[A-J]\)?(?:(?: ?, ?(?:and )?| ?; ?| and | ?)\(?[A-J]\)?){0,9}")


def letters_in(text: str, any_order: bool = False) -> frozenset[str]:
    """{B} for B, (B), B. text, Option B; {B, D} for BD or B and D; else the empty set."""
    text = text.replace("`", "").replace("{", "").replace("}", "").strip(" .[]")
    if LETTERS.fullmatch(text):
        found = re.findall("[A-J]", text)
        runs = (
            text.isalpha() and found != sorted(set(found)) and not any_order
        )  # CAB is an angle, not three options
        return frozenset() if runs else frozenset(found)
    match = LABEL.fullmatch(text)
    if not match:
        return frozenset()
    letter, rest = match.group(1) or match.group(2), match.group(3) or match.group(4) or ""
    if not letter.isupper() or re.search(r"\b(?:or|not|and)\b|\b[A-J][.:)]", rest):
        return frozenset()
    return frozenset(letter)


def grade_letters(gold: str, answer: str, choices: tuple[str, ...]) -> bool | None:
    """None if the gold is no letter. With choices, the value of an option becomes its letter."""
    labels = string.ascii_uppercase[: len(choices)]
    wanted = letters_in(gold) if choices or ":" not in gold else frozenset()  # A:B = 1
    given = letters_in(answer, any_order=len(wanted) > 1)
    if wanted and not choices and re.fullmatch(r"\([a-j]\)", answer):
        given = frozenset(answer[1].upper())
    if choices:
        wanted = wanted if wanted and wanted <= set(labels) else letter_of(gold, choices)
        given = given if given and given <= set(labels) else letter_of(answer, choices)
    return wanted == given if wanted else None


def letter_of(text: str, choices: tuple[str, ...]) -> frozenset[str]:
    """The one option that equals the text."""
    purse = Purse()
    answer = read_box(text, purse)
    options = list(zip(string.ascii_uppercase, map(read_gold, choices), strict=False))
    plain = text.replace("`", "").lower()
    alike = [x for x, (words, _) in options if words.replace("`", "").lower().rstrip(".") == plain]
    if len(alike) == 1 and len(plain) > 1:  # 5-2-3 is the order 5-2-3, whatever else equals 0
        return frozenset(alike)
    equal = [x for x, (_, option) in options if option and same(option, answer, Rules(purse))]
    return frozenset(equal) if len(equal) == 1 else frozenset()


# --- 14. grade -----------------------------------------------------------------------------------

INTEGER, DECIMAL = re.compile(r"[+-]?[0-9]{1,18}"), re.compile(r"-?[0-9]+\.[0-9]{1,2}")
DECIDED_BY = {
    Text: "words (rule 8)",
    Value: "values (rules 2, 4, 5)",
    Clock: "time of day (rule 4)",
}
DECIDED_BY |= dict.fromkeys((Named, Relation), "names and equations (rule 5)")


def read_box(text: str, purse: Purse) -> tuple:
    """The answer in cleaned text; (a) 5 (b) 7 is an ordered pair of parts."""
    parts = split_parts(text)
    if parts:
        return Group("parts", tuple(read_answer(tokenize(part), purse) for part in parts))
    return read_answer(tokenize(text), purse)


def split_parts(text: str) -> list[str]:
    """The texts behind (a), (b), ... or (i), (ii), ...; [] if the text is not so divided."""
    found = list(PART.finditer(text))
    labels = [re.sub("[^a-d1-4i]", "", m.group().replace("`", "")) for m in found]
    if len(found) < 2 or found[0].start() or labels not in (
        list("abcd")[: len(found)], ["i", "ii", "iii"][: len(found)], list("1234")[: len(found)]
    ):  # fmt: skip
        return []
    ends = [m.start() for m in found[1:]] + [len(text)]
    return [text[m.end() : end].strip(" ,;.") for m, end in zip(found, ends, strict=True)]


@lru_cache(maxsize=4096)  # the 16 samples of a problem share a gold
def read_gold(gold: str) -> tuple[str, object]:
    """(clean text, answer); the answer is None if the gold cannot be read."""
    try:
        text = clean(repair(gold[:MAX_CHARS]))
        return text, read_box(text, Purse(is_gold=True))
    except (Unparsed, TooBig):
        return "", None


def grade(
    gold: str,
    response: str,
    *,
    choices=None,
    precision: float | None = None,
    digits: int | None = None,
) -> Verdict:
    """Does the last box of the response hold the gold? By the policy above; never raises.

    `choices`: the texts of the options in order. `precision`: decimals to round both sides to
    (MathVista). `digits`: from how many right digits on a decimal stands for an irrational gold.
    """
    try:
        return explain(gold, response, choices, precision, digits)[0]
    except Exception as error:  # the last net: a fault of this file costs one answer, not a run of
        warnings.warn(f"the matcher failed on gold {gold!r:.200}: {error!r}", stacklevel=2)  # days
        return Verdict(0.0, "unparsed", None)


def explain(gold, response, choices=None, precision=None, digits=None) -> tuple[Verdict, str]:
    """The verdict and the step that decided."""
    box = None
    try:
        status, box = extract(response)
        if status:
            return Verdict(0.0, status, box), "extraction (rule 1)"
        if len(box) > MAX_CHARS:
            raise TooBig
        right, status, rule = compare(gold, box, tuple(choices or ()), precision, digits)
        return Verdict(float(right), "match" if right else status, box), rule
    except TooBig:
        return Verdict(0.0, "too_big", box), "the caps on length and work"
    except Unparsed:
        return Verdict(0.0, "unparsed", box), "reading the box"


def compare(gold: str, box: str, choices, precision, digits) -> tuple[bool, str, str]:
    """(right, status if not, what decided): the cheap comparisons first, then the typed one."""
    if (
        INTEGER.fullmatch(gold) and INTEGER.fullmatch(box) and not choices
    ):  # most golds are integers
        return int(gold) == int(box), "mismatch", "two integers (rule 2)"
    spelled, reference = read_gold(gold)
    if reference is None:
        return False, "gold_unparsed", "the gold cannot be read (rule 7)"
    text = clean(box if box.isprintable() else repair(box))
    letters = grade_letters(spelled, text, choices)
    if letters is not None:
        return letters, "mismatch", "letters (rule 6)"
    if text == spelled or (DECIMAL.fullmatch(spelled) and text == spelled.replace(".", ",")):
        return True, "match", "written alike"  # 2,74 where the gold is 2.74
    purse = Purse()
    answer = read_box(text, purse)
    hedged = type(answer) is Many and answer.hedged and type(reference) is not Many
    unread = type(answer) is Text and (
        "\\" in answer.text or not re.search("[^\\W\\d]", answer.text)
    )
    status = "hedged" if hedged else "unparsed" if unread else "mismatch"
    right = same(reference, answer, Rules(purse, None, precision, digits))
    rule = "a hedge (rule 1)" if hedged else DECIDED_BY.get(type(reference), "items (rule 3)")
    return right, status, rule


# --- command line --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    cases: Annotated[Path | None, tyro.conf.Positional] = None
    """JSONL of gold, response, label, perhaps kind, choices, precision: scored, misses listed."""
    gold: str = r"\frac{1}{2}"  # the reference answer
    response: str = r"so it is \boxed{0.5}"  # what the model wrote
    choices: tuple[str, ...] = ()  # texts of the options, if it is multiple choice
    precision: float | None = None  # decimals to round to before comparing (MathVista)
    digits: int | None = None  # right digits that stand for an irrational gold; benchmarks: 6


def main(cfg: Config):
    if cfg.cases is not None:
        return score_file(cfg.cases)
    verdict, rule = explain(cfg.gold, cfg.response, cfg.choices, cfg.precision, cfg.digits)
    print(f"score {verdict.score:g}, status {verdict.status}, in the box: {verdict.answer}")
    for name, text in (("gold", repair(cfg.gold)), ("box", verdict.answer or "")):
        try:
            print(f"{name:>5} {describe(read_box(clean(text), Purse(name == 'gold')))}")
        except (Unparsed, TooBig) as reason:
            print(f"{name:>5} was not read: {type(reason).__name__}")
    print(f"decided by {rule}")


def describe(answer: object) -> str:
    """How an answer was read, in one line."""
    if type(answer) is Value:
        formula = answer.formula
        number = "" if formula.symbols else f" = {formula.at(0, Purse())}"[:30]
        symbols = f" of {', '.join(sorted(formula.symbols))}" if formula.symbols else ""
        return f"expression{symbols} {''.join(answer.tokens)}{number} {answer.unit}".rstrip()
    if type(answer) in {Group, Many}:
        kind = f"ordered {answer.brackets}" if type(answer) is Group else "in any order"
        return f"{kind}: " + "; ".join(map(describe, answer.items))
    if type(answer) is Named:
        return f"{answer.name} = {describe(answer.value)}"
    if type(answer) is Relation:
        return f"... {answer.operator} 0 in {', '.join(sorted(answer.formula.symbols))}"
    if type(answer) is Reals:
        pieces = [f"{'(['[a]}{float(x):g}, {float(y):g}{')]'[b]}" for x, a, y, b in answer.pieces]
        return f"numbers in {' or '.join(pieces) or 'nothing'}"
    return f"{type(answer).__name__.lower()}: {answer[0]}"


def score_file(path: Path):
    """Accuracy by kind, and every miss."""
    right, total = Counter(), Counter()
    for at, line in enumerate(path.read_text().splitlines(), 1):
        try:
            case = json.loads(line)
            gold, response, label = case["gold"], case["response"], float(case["label"])
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(
                f"{path}, line {at}: {error!r}; a case is a JSON object with gold, response, label"
            ) from None
        verdict = grade(
            gold, response, choices=case.get("choices"), precision=case.get("precision")
        )
        kind = case.get("kind", "all")
        total[kind] += 1
        right[kind] += verdict.score == label
        if verdict.score != label:
            error = "false positive" if verdict.score else "false negative"
            print(
                f"line {at} {error} {kind}: gold {gold!r}, box {verdict.answer!r}, {verdict.status}"
            )
    for kind in sorted(total, key=lambda k: right[k] / total[k]):
        print(f"{kind:20} {right[kind]:5} of {total[kind]:5}")
    print(f"{'all':20} {sum(right.values()):5} of {sum(total.values()):5}")


if __name__ == "__main__":
    main(tyro.cli(Config))
