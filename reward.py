r"""The reward: 1 if the last \boxed{} of a response is the reference answer, else 0; nothing else.

    response --extract--> box --clean--> text --tokenize--> tokens --read--> answer --same--> 0 or 1

An expression becomes a *sum of terms*: exact Fractions times powers of atoms, which are symbols (x,
\pi) and, for roots, primes: \sqrt{12} is 2 * 3^(1/2). A number is a sum without atoms. So 1/2, 0.5
and \frac{2}{4} are equal by construction, (x+1)^2 is x^2+2x+1, and 1/2^120 is not 1/2^121.

Policy
 1. Only a closed \boxed{} counts, the last one. Boxes joined by "," or "and" are one list; joined
    by "or" or "/" they are a hedge: 0.
 2. Numbers must be exactly equal: no tolerance, no x100. `precision` (MathVista): round first.
 3. Lists and sets are order-free, tuples and intervals not; [ differs from (; \pm is both signs.
 4. 50% = 0.5, and 25% = 25 if one side lacks the sign; never 50 = 0.5. A unit may be left out but
    not contradicted.
 5. Equations up to a factor; x = x never matches; `y =` may be dropped.
 6. Letters: B, (B), B. text, Option B; two letters or "not B": 0. With choices, a value stands for
    the one option that it equals.
 7. An unreadable gold is never rewarded. A status stands beside every score.

The text comes from a model that is paid to fool this file, so nothing in it is ever evaluated: no
eval, no float(), no int() on unbounded digits, no sympy. Characters, tokens, depth, digits and
arithmetic are counted and capped, so no timeout is needed: any input costs milliseconds, in any
thread. In doubt, 0. Functions (sin, log), matrices and number bases match only if written alike.

    python reward.py --gold '\frac{1}{2}' --response 'so it is \boxed{0.5}'
"""

import re
import string
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import comb, factorial
from typing import NamedTuple

MAX_CHARS = 2_000  # of a box; longer ones are loops or attacks
MAX_TOKENS = 600
MAX_DEPTH = 60  # brackets and exponents inside each other
MAX_ITEMS = 64  # of a list, and boxes joined into one
MAX_BITS = 4_096  # of a numerator or denominator: 2^1009 passes, 10^(10^10) does not
MAX_WORK = 2_000  # term operations a box, up to 5 microseconds each


STATUSES = "match mismatch no_box unclosed hedged unparsed too_big gold_unparsed".split()


class Verdict(NamedTuple):
    score: float  # 1.0 or 0.0
    status: str
    answer: str | None  # what stood in the box


class Unparsed(Exception):
    """The text is no expression that this file reads."""


class TooBig(Exception):
    """Reading on would cost more than the caps allow."""


# --- 1. extract: the last box --------------------------------------------------------------------

BRACE = re.compile(r"\\.|[{}]", re.S)  # an escaped brace is eaten by the first half
OPENING = re.compile(r"\\boxed\s{0,8}\{")
GAP = re.compile(
    r"[\s$~]|\\[()\[\],;!]|\\quad|\\text\s*(?=\{)|(?<!\\)[{}]"
)  # decoration between boxes


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
            if contents and gap not in {",", ";", "and", ",and", "or", ",or", "/"}:
                break
            hedged |= bool(contents) and gap in {"or", ",or", "/"}
            contents.append(content)
        begin = start
    else:
        raise TooBig
    return ("hedged" if hedged else ""), ", ".join(reversed(contents))


# --- 2. clean: one spelling for each thing -------------------------------------------------------

# fmt: off
# An explicit table, never NFKC: that would turn 4² into 42. The backtick is ours: it marks a word.
CHARACTERS = str.maketrans({
    **dict.fromkeys("−–—‐‑", "-"), **dict.fromkeys("×·⋅∗", "*"),
    **dict.fromkeys("\u00a0\u2009\u202f\u200a\u2002\u2003\u3000\t\n\r", " "),
    **dict.fromkeys("`\"\u200b\u2061\ufeff", ""),
    **{small: f"^{{{n}}}" for n, small in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
    "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}",
    "¾": r"\frac{3}{4}", "√": r"\sqrt ", "π": r"\pi ", "θ": r"\theta ", "α": r"\alpha ",
    "β": r"\beta ", "γ": r"\gamma ", "φ": r"\phi ", "ω": r"\omega ", "λ": r"\lambda ", "μ": r"\mu ",
    "σ": r"\sigma ", "∞": r"\infty ", "∪": r"\cup ", "∅": r"\emptyset ", "±": r"\pm ",
    "°": r"\degree ", "∈": r"\in ", "≤": "<=", "≥": ">=", "≠": "!=", "÷": "/", "′": "'", "’": "'",
    "，": ",", "：": ":", "€": " `euros ", "£": " `pounds ",
})
COMMANDS = {  # \name -> what it means here; all others stay as they are
    **dict.fromkeys("left right big Big bigl bigr Bigl Bigr displaystyle boxed limits".split(), ""),
    **dict.fromkeys([*"quad qquad , ; : ! > ( ) [ ]".split(), " "], " "),
    **dict.fromkeys("dfrac tfrac cfrac".split(), r"\frac "),
    **dict.fromkeys("dbinom tbinom".split(), r"\binom "),
    **dict.fromkeys("cdot times ast".split(), "*"), **dict.fromkeys("ne neq".split(), "!="),
    **dict.fromkeys("le leq leqslant".split(), "<="), "lt": "<", "div": "/",
    **dict.fromkeys("ge geq geqslant".split(), ">="), "gt": ">", "langle": "(", "rangle": ")",
    "%": "%", "$": " `dollars ", "degree": " `degrees ", "varnothing": r"\emptyset ",
}
# fmt: on
COMMAND = re.compile(r"\\([A-Za-z]+|.)", re.S)
WRAPPED = re.compile(
    r"\\(text(?:rm|bf|it)?|mbox|math(?:rm|bf|it)|operatorname|boldsymbol)\s*\{([^{}]*)\}"
)
DEGREE = re.compile(r"\^ ?(?:\{ ?\\circ ?\}|\\circ(?![A-Za-z]))")
GROUPS = r"(?<![0-9.,])([0-9]{1,3}(?:SEP[0-9]{3})+)(?![0-9])"  # 58,500 but not 1,00,0
SPACED_GROUPS = re.compile(GROUPS.replace("SEP", r"(?:\\[, ]|,\\!|\{,\}|~)"))  # surely one number
COMMA_GROUPS = re.compile(GROUPS.replace("SEP", ","))  # but inside brackets (1,234) is a pair


def clean(text: str) -> str:
    r"""One spelling for each thing; words that stood in \text{} are marked with a backtick."""
    text = SPACED_GROUPS.sub(lambda m: re.sub("[^0-9]", "", m.group()), text).translate(CHARACTERS)
    for _ in range(2):  # \textbf{\text{B}}
        text = WRAPPED.sub(unwrap, text)
    text = DEGREE.sub(r"\\degree ", text)
    bare = text.replace(r"\$", "")
    if bare.count("$") != 1:  # a pair is math mode; a lone dollar, like \$, is money
        text = re.sub(r"(?<!\\)\$", " ", text)
    text = COMMAND.sub(lambda m: COMMANDS.get(m.group(1), m.group()), text)
    text = text.replace("$", " `dollars ").replace("%", " `percent ").replace("~", " ")
    text = " ".join(text.split()).rstrip(" .")
    if not re.search(r"[(\[]|\\\{", text):
        text = COMMA_GROUPS.sub(lambda m: m.group().replace(",", ""), text)
    return text


def unwrap(match: re.Match) -> str:
    r"""\mathrm{i} is a symbol, \text{m} a unit, \mathrm{cm} too."""
    kind, content = match.groups()
    if len(content.strip()) == 1 and kind.startswith("math"):
        return f" {content} "
    return re.sub(r"(?<![\\A-Za-z`])[A-Za-z]+", r"`\g<0>", f" {content} ")


def repair(gold: str) -> str:
    r"""Golds come damaged: \f, \t or \b of \frac, \text, \boxed read as control characters."""
    gold = re.sub(r"\t(?=ext|imes|heta|an)", r"\\t", gold)
    return gold.replace("\f", "\\f").replace("\b", "\\b")


# --- 3. tokenize ---------------------------------------------------------------------------------

ALIASES = """mm millimeter millimetre|cm centimeter centimetre|m meter metre|km kilometer kilometre
|in inch inches|ft foot feet|yd yard|mi mile|s sec second|min minute|h hr hour|day|week|month|year
|yr|mg milligram|g gram|kg kilogram|lb pound|ml milliliter|l liter litre|dollar usd|cent|euro
|degree deg|radian rad|percent|mph|n newton|j joule|w watt|v volt|unit|th st nd rd"""
UNITS = {alias: names.split()[0] for names in ALIASES.split("|") for alias in names.split()}
SHORT_WORDS = set("no on or is in at an am pm AM PM if to of up".split())
NOT_UNITS = set("or and not to hundred thousand million billion dozen times".split())
GREEK = "alpha beta gamma delta theta lambda mu rho sigma phi varphi omega pi".split()
SYMBOLS = {*string.ascii_letters, *("\\" + name for name in GREEK)}
TOKEN = re.compile(
    r"`[A-Za-z]+|[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|\.[0-9]+"
    r"|\\[A-Za-z]+|\\[{}]|[<>!]=|\*\*|[A-Za-z]+|\S"
)
OPEN, CLOSE = {"(", "[", "{", "\\{"}, {")", "]", "}", "\\}"}


def tokenize(text: str) -> list[str]:
    tokens, depth = [], 0
    for token in TOKEN.findall(text):
        if token.isascii() and token.isalpha():
            tokens += split_letters(token)
        else:
            tokens.append("^" if token == "**" else token)
        depth += (token in OPEN) - (token in CLOSE)
        if depth > MAX_DEPTH or len(tokens) > MAX_TOKENS:
            raise TooBig
    return tokens


def split_letters(run: str) -> list[str]:
    """`ab` is a times b, `cm` and `square` are words, `sqrt` is a command."""
    if run in {"sqrt", "pi"}:
        return ["\\" + run]
    is_word = len(run) > 2 or (len(run) == 2 and (run in UNITS or run in SHORT_WORDS))
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


# --- 4. expressions: sums of terms ---------------------------------------------------------------

# {((atom, exponent), ...): coefficient}; 3 sqrt(2) x^2 is {(("2", 1/2), ("x", 2)): 3}, zero is {}.
Terms = dict[tuple, Fraction]
ONE = Fraction(1)


def constant(terms: Terms) -> Fraction | None:
    return terms.get((), Fraction(0)) if all(key == () for key in terms) else None


def spell(terms: Terms) -> str:
    """One text for equal sums: the name of an atom that cannot be taken apart, as in 1/(x+1)."""
    text = "+".join(
        f"{c}" + "".join(f"*{atom}^{e}" for atom, e in key) for key, c in sorted(terms.items())
    )
    if len(text) > MAX_CHARS:
        raise TooBig
    return f"({text})"


def to_fraction(token: str) -> Fraction:
    """12, 0.5, .5, 2.5e-10, exactly."""
    digits, _, exponent = token.lower().partition("e")
    whole, _, decimals = digits.partition(".")
    if len(digits) > 1_000 or len(exponent) > 4:
        raise TooBig
    return Fraction(int(whole + decimals), 10 ** len(decimals)) * Fraction(10) ** int(
        exponent or "0"
    )


def prime_powers(n: int) -> dict[str, int]:
    """360 -> {"2": 3, "3": 2, "5": 1}, by trial division to 1000; what is left counts as prime."""
    powers, p = {}, 2
    while n > 1 and p < 1_000 and p * p <= n:
        while n % p == 0:
            powers[str(p)], n = powers.get(str(p), 0) + 1, n // p
        p += 1
    return powers | ({str(n): powers.get(str(n), 0) + 1} if n > 1 else {})


class Purse:
    """The work that one box may cost, shared by its parts: 64 list items get no 64 budgets."""

    def __init__(self, is_gold: bool = False):
        self.work, self.is_gold = 0, is_gold

    def spend(self, work: int):
        self.work += work
        if self.work > MAX_WORK:
            raise TooBig


class Expression:
    """Recursive descent over the tokens of one expression; all must be used: no prefix parsing."""

    def __init__(self, tokens: list[str], purse: "Purse"):
        self.tokens, self.at, self.depth, self.spend = list(tokens), 0, 0, purse.spend

    def read(self) -> Terms:
        terms = self.sum()
        if self.peek():
            raise Unparsed
        return terms

    # -- grammar: sum > product > mixed > power > atom

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

    def sum(self) -> Terms:
        total = self.scale(self.sign(), self.product())
        while self.peek() in {"+", "-"}:
            total = self.plus(total, self.scale(self.sign(), self.product()))
        return total

    def product(self) -> Terms:
        value = self.mixed()
        while token := self.peek():
            if token in {"*", "/"}:
                self.take()
                right = self.scale(self.sign(), self.mixed())
                value = self.times(value, right if token == "*" else self.raised(right, -ONE))
            elif token in SYMBOLS or token in {"(", "{", "\\frac", "\\sqrt", "\\binom"}:
                value = self.times(value, self.power())  # juxtaposed; "2 3" is not 6, and not 23
            else:
                break
        return value

    def mixed(self) -> Terms:
        """2\\frac{1}{2} and 2 1/2 are 2.5, not 1."""
        if not self.peek().isdecimal():
            return self.power()
        if is_number(self.peek(1)) and self.peek(2) == "/" and is_number(self.peek(3)):
            whole, top, bottom = (to_fraction(self.peek(i)) for i in (0, 1, 3))
            if not top < bottom:
                raise Unparsed
            self.at += 4
            return {(): whole + top / bottom}
        follows_fraction = self.peek(1) == "\\frac"
        whole = self.power()
        if follows_fraction:
            part = self.power()
            size = constant(part)
            is_part = size is not None and 0 < size < 1
            return self.plus(whole, part) if is_part else self.times(whole, part)
        return whole

    def power(self) -> Terms:
        base = self.atom()
        while self.peek() in {"^", "!"}:
            if self.take() == "^":
                self.depth += 1  # x^x^x^...
                sign = self.sign()
                base = self.raised(base, self.scale(sign, self.power()))
                self.depth -= 1
            else:
                n = constant(base)
                if n is None or n.denominator > 1 or not 0 <= n <= 200 or self.peek() == "!":
                    raise Unparsed
                base = {(): Fraction(factorial(int(n)))}
        return base

    def atom(self) -> Terms:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise TooBig
        token = self.take()
        if is_number(token):
            value = to_fraction(token)
            terms = {(): value} if value else {}
            if self.peek() == "_":  # 52_8 is in base 8
                raise Unparsed
        elif token == "(":
            terms = self.sum()
            self.take(")")
        elif token == "{":
            terms = self.sum()
            if self.peek() in {"\\over", "\\choose"}:
                terms = self.combine(self.take(), terms, self.sum())
            self.take("}")
        elif token in {"\\frac", "\\binom"}:
            terms = self.combine(token, self.argument(), self.argument())
        elif token == "\\sqrt":
            index = ONE * 2
            if self.peek() == "[":
                self.take()
                index = constant(self.sum())
                self.take("]")
            if index not in range(2, 100):
                raise Unparsed
            terms = self.raised(self.atom(), 1 / index)
        elif token in SYMBOLS:
            terms = {((token + self.subscript(), ONE),): ONE}
        else:
            raise Unparsed
        self.depth -= 1
        return terms

    def argument(self) -> Terms:
        """What \\frac takes: a group or ONE digit, so \\frac12 is a half."""
        token = self.peek()
        if is_number(token) and len(token) > 1:
            if not token.isdecimal():
                raise Unparsed
            self.tokens[self.at : self.at + 1] = [token[0], token[1:]]
        return self.atom()

    def subscript(self) -> str:
        if self.peek() != "_":
            return ""
        self.take()
        if self.peek() != "{":
            return "_" + self.take()
        end = self.tokens.index("}", self.at) if "}" in self.tokens[self.at :] else len(self.tokens)
        inside, self.at = self.tokens[self.at + 1 : end], end + 1
        return "_" + "".join(inside)

    # -- arithmetic, all of it paid for

    def plus(self, a: Terms, b: Terms) -> Terms:
        self.spend(len(b))
        total = dict(a)
        for key, coefficient in b.items():
            total[key] = self.checked(total.get(key, 0) + coefficient)
        return {key: coefficient for key, coefficient in total.items() if coefficient}

    def scale(self, sign: int, a: Terms) -> Terms:
        return a if sign == 1 else {key: -coefficient for key, coefficient in a.items()}

    def times(self, a: Terms, b: Terms) -> Terms:
        product = {}
        for key_a, c_a in a.items():
            for key_b, c_b in b.items():
                exponents = dict(key_a)
                for atom, e in key_b:
                    exponents[atom] = exponents.get(atom, 0) + e
                for key, c in self.term(c_a * c_b, exponents).items():
                    product[key] = self.checked(product.get(key, 0) + c)
        return {key: c for key, c in product.items() if c}

    def checked(self, c: Fraction) -> Fraction:
        bits = max(c.numerator.bit_length(), c.denominator.bit_length())
        if bits > MAX_BITS:
            raise TooBig
        self.spend(bits // 64)
        return c

    def term(self, coefficient: Fraction, exponents: dict[str, Fraction]) -> Terms:
        """One term in normal form: primes keep an exponent in [0, 1), i^2 = -1."""
        key = []
        for atom, e in sorted(exponents.items()):
            self.spend(2)
            if max(e.numerator.bit_length(), e.denominator.bit_length()) > 64:
                raise TooBig
            if atom.isdecimal():
                whole = e.numerator // e.denominator
                coefficient *= self.number_power(Fraction(int(atom)), whole)
                e -= whole
            elif atom == "i" and e.denominator == 1:
                coefficient, e = coefficient * (-1) ** (int(e) % 4 // 2), e % 2
            if e:
                key.append((atom, e))
        return {tuple(key): self.checked(coefficient)} if coefficient else {}

    def number_power(self, c: Fraction, n: int) -> Fraction:
        if (
            max(c.numerator.bit_length(), c.denominator.bit_length()) * abs(n) > MAX_BITS
        ):  # before, not after
            raise TooBig
        return c**n

    def raised(self, base: Terms, exponent: Terms | Fraction) -> Terms:
        e = exponent if isinstance(exponent, Fraction) else constant(exponent)
        if e is None:  # x^n stays whole
            return {((f"{spell(base)}^{spell(exponent)}", ONE),): ONE}
        if not base:  # 0^2 is 0; 0^0 and 1/0 are nothing
            if e <= 0:
                raise Unparsed
            return {}
        (key, c), *more = base.items()
        if not more and e.denominator == 1:
            return self.term(self.number_power(c, int(e)), {atom: old * e for atom, old in key})
        if not more and all(atom.isdecimal() or (old == 1 and len(key) == 1) for atom, old in key):
            return self.root(c, dict(key), e)
        if e.denominator == 1 and 0 <= e <= 20:
            power = {(): ONE}
            for _ in range(int(e)):
                power = self.times(power, base)
            return power
        return {((spell(base), e),): ONE}  # 1/(x+1) and sqrt(x+1) stay whole

    def root(self, c: Fraction, atoms: dict[str, Fraction], e: Fraction) -> Terms:
        """(c * atoms)^e for a fraction e, by prime factors: sqrt(12) = 2 * 3^(1/2)."""
        sign = ONE
        exponents = {atom: old * e for atom, old in atoms.items()}
        if c < 0 and atoms == {} and e == Fraction(1, 2):
            exponents["i"] = ONE
        elif c < 0 and atoms == {} and e.numerator == 1 and e.denominator % 2:
            sign = -ONE  # the real cube root of -8
        elif c < 0:
            raise Unparsed
        self.spend(20)
        for n, direction in ((abs(c.numerator), 1), (c.denominator, -1)):
            for prime, count in prime_powers(n).items():
                exponents[prime] = exponents.get(prime, 0) + count * direction * e
        return self.term(sign, exponents)

    def combine(self, command: str, top: Terms, bottom: Terms) -> Terms:
        if command in {"\\frac", "\\over"}:
            return self.times(top, self.raised(bottom, -ONE))
        n, k = constant(top), constant(bottom)
        if n is None or k is None or n.denominator * k.denominator > 1 or not 0 <= k <= n <= 400:
            raise Unparsed
        return {(): Fraction(comb(int(n), int(k)))}


# --- 5. answers: what a whole box can be ---------------------------------------------------------


class Text(NamedTuple):
    """Words, and whatever could not be read: equal only if written alike."""

    text: str


class Value(NamedTuple):
    terms: tuple  # sorted items of Terms
    unit: str  # "" if none


class Group(NamedTuple):
    """Ordered: tuple, interval or ratio; `brackets` is "()", "[)", ":" and so on."""

    brackets: str
    items: tuple


class Many(NamedTuple):
    """Unordered: list, set, union of intervals, both signs of +-."""

    items: tuple
    hedged: bool = False  # joined by "or"


class Named(NamedTuple):
    """`x = 5`; the name alone decides nothing."""

    name: str
    value: object
    equation: object  # the same as a Relation, for y = 2x+3 against 2x-y+3 = 0


class Relation(NamedTuple):
    """left OP right as `terms OP 0`, scaled so that 2x = 4 and x-2 = 0 are equal."""

    operator: str  # = != < <=
    terms: tuple


RELATIONS = {"=", "!=", "<", "<=", ">", ">="}
JOINS, RATIO = {",", ";", "`and", "`or"}, {":", "`to"}
INFINITY = Text("infinity"), Text("-infinity")


def to_text(tokens: list[str]) -> Text:
    """Words lose their case, symbols keep it (S is not s); braces around one token go: 52_{8}."""
    words = []
    for token in tokens:
        words.append(token[1:].lower() if token[0] == "`" else token)
        if token == "}" and words[-3:-2] == ["{"]:
            words[-3:] = [words[-2]]
    return Text(re.sub("(?<=[A-Za-z]) (?=[A-Za-z])", "", " ".join(words)))


def frozen(terms: Terms) -> tuple:
    return tuple(sorted(terms.items()))


def read_answer(tokens: list[str], purse: Purse) -> tuple:
    """Tokens -> Text, Value, Group, Many, Named or Relation: separators first, then brackets."""
    if not tokens:
        raise Unparsed

    def read_all(pieces):
        if len(pieces) > MAX_ITEMS:
            raise TooBig
        return [read_answer(piece, purse) for piece in pieces]

    top = at_top(tokens)
    for separators in (JOINS, {"\\cup"}):
        if not separators.isdisjoint(top) and len(pieces := split_top(tokens, separators)) > 1:
            return flat(read_all(pieces), hedged="`or" in top)
    if operators := [t for t in top if t in RELATIONS]:
        return read_relation(split_top(tokens, RELATIONS), operators, tokens, purse)
    if not RATIO.isdisjoint(top) and len(pieces := split_top(tokens, RATIO)) > 1:
        return Group(":", tuple(read_all(pieces)))
    if len(tokens) > 3 and tokens[0] in SYMBOLS and tokens[1] == "(" and "," in tokens:
        tokens, top = tokens[1:], top[1:]  # the point P(3, -4)
    if len(top) == 1 and tokens[0] in {"(", "[", "\\{"} and tokens[-1] in CLOSE:
        pieces = split_top(tokens[1:-1], {",", ";"})
        if tokens[0] == "\\{":
            return flat(read_all(pieces))
        if len(pieces) > 1:
            return Group(tokens[0] + tokens[-1], tuple(read_all(pieces)))
        if tokens[0] == "(":
            return read_answer(tokens[1:-1], purse)
    if tokens.count("\\pm") == 1:
        at = tokens.index("\\pm")
        return flat(read_all([tokens[:at] + [sign] + tokens[at + 1 :] for sign in "+-"]))
    return read_value(tokens, purse)


def at_top(tokens: list[str]) -> list[str]:
    """The tokens outside all brackets, and the closing ones."""
    depth, top = 0, []
    for token in tokens:
        depth += (token in OPEN) - (token in CLOSE)
        if depth == 0:
            top.append(token)
    return top


def flat(items: list, hedged: bool = False) -> Many:
    """A list inside a list, as \\pm makes it, is one list."""
    lists = (item.items if type(item) is Many else [item] for item in items)
    return Many(tuple(x for items in lists for x in items), hedged)


def read_value(tokens: list[str], purse: Purse) -> Value | Text:
    """A number or expression, perhaps with a unit; text if it is neither."""
    if tokens[-1] in {"\\infty", "`infinity"} and tokens[:-1] in ([], ["+"], ["-"]):
        return INFINITY["-" in tokens]
    try:
        body, unit = split_unit(tokens, purse.is_gold)
        return Value(frozen(Expression(body, purse).read()), unit)
    except (Unparsed, TooBig):
        return to_text(tokens)


def split_unit(tokens: list[str], is_gold: bool) -> tuple[list[str], str]:
    """`5 cm` -> 5, "cm". A box may use known units only; in a gold any noun is taken for one."""
    if tokens[0] in {"`dollars", "`euros", "`pounds"}:  # $5
        tokens = tokens[1:] + tokens[:1]
    start = next((i for i, token in enumerate(tokens) if token[0] == "`"), len(tokens))
    body, tail = tokens[:start], [t for t in tokens[start:] if t not in {"{", "}"}]
    while body and body[-1] in {"^", "{"}:  # 5^{\text{th}}, 69{degrees}
        body.pop()
    unit, power, known = "", "", True
    for token in tail:
        word = token.removeprefix("`").lower()
        name = UNITS.get(word) or UNITS.get(word.removesuffix("s"))
        if word in {"square", "sq", "cubic"}:
            power = "^3" if word == "cubic" else "^2"
        elif word in {"/", "^", "2", "3", "per"}:
            unit += "/" if word == "per" else word
        elif token[0] != "`" or word in NOT_UNITS or (unit and unit[-1] != "/" and not is_gold):
            raise Unparsed
        else:
            known = known and name is not None
            unit, power = unit + (name or word) + power, ""
    if not known and not (is_gold and len(tail) <= 3):
        raise Unparsed
    return body, "" if unit in {"th", "unit", "unit^2", "unit^3"} else unit


def read_relation(parts: list, operators: list, tokens: list[str], purse: Purse) -> tuple:
    """x = 5, 2x + y = 3, x < 3, 1 < x <= 2; anything else is text."""
    if len(parts) != len(operators) + 1 or len(parts) > 3:
        return to_text(tokens)
    try:
        sides = [Expression(part, purse).read() for part in parts]
        links = zip(operators, sides, sides[1:], strict=False)
        relations = [relate(operator, left, right, purse) for operator, left, right in links]
    except (Unparsed, TooBig):
        relations = [None]
    if operators == ["="] and is_name(parts[0]):
        return Named("".join(parts[0]), read_answer(parts[1], purse), relations[0])
    if None in relations:
        return to_text(tokens)
    return as_interval(relations) or (relations[0] if len(relations) == 1 else to_text(tokens))


def is_name(tokens: list[str]) -> bool:
    """x, a_1, f(x), |AB|, (x, y), `triangle area`; no arithmetic: 2+3 = 5 is no answer 5."""
    for before, token in zip(["", *tokens], tokens, strict=False):
        is_subscript = is_number(token) and before in {"_", "{"}
        if token in {"+", "-", "*", "/", "^", "\\sqrt", "`not"}:
            return False
        if is_number(token) and not is_subscript:
            return False
    return any(token in SYMBOLS or token[0] == "`" for token in tokens)


def relate(operator: str, left: Terms, right: Terms, purse: Purse) -> Relation:
    """left - right, divided by its last coefficient. 0 = 0 and 1 = 1 say nothing: Unparsed."""
    if operator in {">", ">="}:
        operator, left, right = operator.replace(">", "<"), right, left
    algebra = Expression([], purse)
    terms = algebra.plus(left, algebra.scale(-1, right))
    if constant(terms) is not None:
        raise Unparsed
    last = frozen(terms)[-1][1]
    scale = last if operator in {"=", "!="} else abs(last)  # a negative factor would turn < around
    return Relation(operator, tuple((key, algebra.checked(c / scale)) for key, c in frozen(terms)))


def as_interval(relations: list[Relation]) -> Named | None:
    """x <= 3 -> x = (-infinity, 3], 1 < x <= 2 -> x = (1, 2]; None unless x stands alone."""
    ends, unknowns = {"low": ("(", INFINITY[1]), "high": (")", INFINITY[0])}, set()
    found = []
    for operator, terms in relations:
        unknown = [key for key, _ in terms if any(not atom.isdecimal() for atom, _ in key)]
        if operator not in {"<", "<="} or len(unknown) != 1 or [e for _, e in unknown[0]] != [1]:
            return None
        slope = dict(terms)[unknown[0]]
        bound = Value(tuple((key, -c / slope) for key, c in terms if key != unknown[0]), "")
        side, bracket = ("high", ")]") if slope > 0 else ("low", "([")
        ends[side] = bracket[operator == "<="], bound
        found.append(side)
        unknowns.add(unknown[0])
    if len(unknowns) != 1 or len(set(found)) != len(found):
        return None
    (left, low), (right, high) = ends.values()
    return Named(unknowns.pop()[0][0], Group(left + right, (low, high)), None)


# --- 6. same: by the type of the gold ------------------------------------------------------------


def same(gold: object, answer: object, precision: float | None = None) -> bool:
    gold, answer = (
        x.items[0] if type(x) is Many and len(x.items) == 1 else x for x in (gold, answer)
    )
    if type(gold) is Named and type(answer) is Named:
        fits = gold.name == answer.name or is_plain(answer.value)  # y = 2x is not z = 2x
        return fits and same(gold.value, answer.value, precision)
    if Relation in (type(gold), type(answer)):
        gold, answer = (x.equation if type(x) is Named else x for x in (gold, answer))
        return type(gold) is type(answer) and gold == answer
    if Many in (type(gold), type(answer)):
        gold, answer = by_name(gold), by_name(answer)
    gold, answer = (x.value if type(x) is Named else x for x in (gold, answer))
    if type(gold) is not type(answer):
        return False
    if type(gold) is Value:
        return same_value(gold, answer, precision)
    if type(gold) is Text:
        return gold == answer
    if len(gold.items) != len(answer.items):
        return False
    if type(gold) is Group:
        pairs = zip(gold.items, answer.items, strict=True)
        return gold.brackets == answer.brackets and all(same(g, a, precision) for g, a in pairs)
    left = list(answer.items)
    named = all(type(x) is Named for x in gold.items + answer.items)
    for g in gold.items:  # every item of the gold takes one of the answer's
        at = next((i for i, a in enumerate(left) if same(g, a, precision)
                   and (not named or g.name == a.name)), None)  # fmt: skip
        if at is None:
            return False
        left.pop(at)
    return True


def by_name(answer: object) -> object:
    """(p, q) = (5, 2) -> p = 5, q = 2."""
    if type(answer) is Named and type(answer.value) is Group and answer.name[0] == "(":
        names, items = answer.name[1:-1].split(","), answer.value.items
        if len(names) == len(items):
            pairs = zip(names, items, strict=True)
            return Many(tuple(Named(name, item, None) for name, item in pairs))
    return answer


def is_plain(answer: tuple) -> bool:
    return type(answer) is Value and constant(dict(answer.terms)) is not None


def same_value(gold: Value, answer: Value, precision: float | None) -> bool:
    if gold.unit and answer.unit and gold.unit != answer.unit:
        return False
    g, a = (constant(dict(x.terms)) for x in (gold, answer))
    if g is not None and a is not None and "percent" in (gold.unit, answer.unit):
        if gold.unit != answer.unit:  # 50% is 0.5, and 50 where the question asks for percent
            percent, plain = (g, a) if gold.unit else (a, g)
            return plain == percent / 100 or (plain == percent and abs(plain) > 1)
    if gold.terms == answer.terms:
        return True
    if precision is None or g is None or a is None:
        return False
    return rounded(g, precision) == rounded(a, precision)


def rounded(x: Fraction, decimals: float) -> int:
    """Half away from zero, as people do it; in units of the last place."""
    scaled = abs(x) * 10 ** min(max(int(decimals), 0), 12) + Fraction(1, 2)
    return (scaled.numerator // scaled.denominator) * (1 if x > 0 else -1)


# --- 7. letters ----------------------------------------------------------------------------------

LABEL = re.compile(
    r"(?:(?:the )?(?:correct )?(?:option|choice|answer)(?: is)?:? ?)?"
    r"(?:\(([A-Z])\)|([A-Z]))(?: ?[.:)]$|$|(?<=\)) ?[.:]? ?(.+)|(?<!\)) ?[.:)] ?(.+))",
    re.I | re.S,
)
LETTERS = re.compile(r"\(?[A-J]\)?(?:(?: ?, ?(?:and )?| ?; ?| and | ?)\(?[A-J]\)?){0,9}")


def letters_in(text: str) -> frozenset[str]:
    """{B} for B, (B), B. text, Option B; {B, D} for BD or B and D; else the empty set."""
    text = text.replace("`", "").replace("{", "").replace("}", "").strip(" .")
    if LETTERS.fullmatch(text):
        found = re.findall("[A-J]", text)
        runs = text.isalpha() and found != sorted(set(found))  # CAB is an angle, not three options
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
    wanted, given = letters_in(gold), letters_in(answer)
    if choices:
        wanted = wanted if wanted and wanted <= set(labels) else letter_of(gold, choices)
        given = given if given and given <= set(labels) else letter_of(answer, choices)
    return wanted == given if wanted else None


def letter_of(text: str, choices: tuple[str, ...]) -> frozenset[str]:
    """The one option that equals the text."""
    value = read_answer(tokenize(text), Purse())
    options = zip(string.ascii_uppercase, map(read_gold, choices), strict=False)
    equal = [letter for letter, (_, option) in options if same(option, value)]
    return frozenset(equal) if len(equal) == 1 else frozenset()


# --- 8. grade ------------------------------------------------------------------------------------

INTEGER = re.compile(r"[+-]?[0-9]{1,18}")


@lru_cache(maxsize=4096)  # the 16 samples of a problem share a gold
def read_gold(gold: str) -> tuple[str, object]:
    """(clean text, answer); the answer is None if the gold cannot be read."""
    try:
        text = clean(repair(gold[:MAX_CHARS]))
        return text, read_answer(tokenize(text), Purse(is_gold=True))
    except (Unparsed, TooBig):
        return "", None


def grade(gold: str, response: str, *, choices=None, precision: float | None = None) -> Verdict:
    """Does the last box of the response hold the gold? By the policy above; never raises."""
    box = None
    try:
        status, box = extract(response)
        if status:
            return Verdict(0.0, status, box)
        if len(box) > MAX_CHARS:
            raise TooBig
        right, status = compare(gold, box, tuple(choices or ()), precision)
        return Verdict(float(right), "match" if right else status, box)
    except TooBig:
        return Verdict(0.0, "too_big", box)
    except Unparsed:
        return Verdict(0.0, "unparsed", box)


def compare(gold: str, box: str, choices: tuple, precision: float | None) -> tuple[bool, str]:
    """(right, status if not): the cheap comparisons first, then the typed one."""
    if (
        INTEGER.fullmatch(gold) and INTEGER.fullmatch(box) and not choices
    ):  # most golds are integers
        return int(gold) == int(box), "mismatch"
    spelled, reference = read_gold(gold)
    if reference is None:
        return False, "gold_unparsed"
    text = clean(box)
    letters = grade_letters(spelled, text, choices)
    if letters is not None:
        return letters, "mismatch"
    if text == spelled:
        return True, "match"
    answer = read_answer(tokenize(text), Purse())
    hedged = type(answer) is Many and answer.hedged and type(reference) is not Many
    unread = type(answer) is Text and ("\\" in answer.text or not re.search("[a-z]", answer.text))
    status = "hedged" if hedged else "unparsed" if unread else "mismatch"
    return same(reference, answer, precision), status


# --- command line --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    gold: str = r"\frac{1}{2}"  # the reference answer
    response: str = r"so it is \boxed{0.5}"  # what the model wrote
    choices: tuple[str, ...] = ()  # texts of the options, if it is multiple choice
    precision: float | None = None  # decimals to round to before comparing (MathVista)


def main(cfg: Config):
    verdict = grade(cfg.gold, cfg.response, choices=cfg.choices, precision=cfg.precision)
    print(f"score {verdict.score:g}, status {verdict.status}, in the box: {verdict.answer}")
    for name, text in (("gold", repair(cfg.gold)), ("box", verdict.answer or "")):
        try:
            print(f"{name:>5} reads as {read_answer(tokenize(clean(text)), Purse(name == 'gold'))}")
        except (Unparsed, TooBig) as reason:
            print(f"{name:>5} was not read: {type(reason).__name__}")


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config))
