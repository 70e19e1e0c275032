r"""Rows of many sets become the file that a stage trains on.

    a.jsonl, b.jsonl ─rules─▶ ─duplicates─▶ ─benchmarks─▶ ─sample─▶ sft.jsonl (or rl.jsonl)
                        └──────────┴─────────────┴───────────┴──▶ dropped.jsonl, one line a row

The paper (OVR, sec. 3) names the steps and gives no thresholds: all constants here are ours.

rules       what cannot teach or cannot be graded: see RULES, each with the reason it stands for
duplicates  prompts alike word for word, or in >= 0.8 of their runs of five words (MinHash); the
            first row stays. Near ones with other digits, signs, pictures or answers both stay
benchmarks  >= 0.6 of a test question's runs of eight words stand in the prompt, or the picture is
            its picture. The usual rule, any 13 words in common, flags the boilerplate of contests
sample      `count` rows without replacement; a row of a stratum (source, level) of n rows weighs
            n^-alpha: 0 keeps the proportions, 1 makes strata equal

Rows are read twice and never held: the first pass, over all workers, looks at each row alone and
keeps 118 bytes of it (240 MB for 2 M rows); the decisions are made on these; the second pass copies
the rows that stay. No file in between, so there is nothing to resume: two million rows of 6 kB take
50 core-minutes (40,000 a minute on one), and give the same bytes with any number of workers.

    python curate.py --rows a.jsonl b.jsonl --kind sft --out out/sft/sft.jsonl
    python curate.py --rows k12.jsonl --kind rl --benchmarks mathvision.jsonl --count 300000 \
        --alpha 0.5 --workers 16 --out out/rl/rl.jsonl    # a directory for each: its reports
"""

import hashlib
import json
import os
import re
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from multiprocessing import Pool
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tyro
from PIL import Image

from reward import extract, grade
from runlog import progress

CHUNK = 4 << 20  # bytes of a file that a worker takes at a time
MIN_THOUGHT = 100  # characters: a thought of less than some 20 words teaches to skip it
MAX_RESPONSE = 4 * 65_536  # characters; mathematics has 2 to 4 a token: surely over 64k tokens
MAX_PROMPT = 20_000  # characters; longer ones are documents, not questions
MAX_GOLD = (200, 10)  # characters, words: longer golds are sentences that no reply matches
LOOP_ZLIB = 0.1  # compressed / plain size; of real replies 0.16 to 0.6, of a table of cases 0.2
LOOP_TAIL = 4_000  # characters at the end looked at alone: a long response ends in a loop
LOOP_WORDS, LOOP_SHARE = 16, 0.4  # share of runs of 16 words that stood there before
PERMUTATIONS, BANDS = 128, 16  # bands of 8 compare 95 % of pairs at J = 0.8, all at 0.9
NEAR_WORDS, NEAR = 5, 0.8  # Jaccard similarity of runs of 5 words, estimated to within 0.04
TEST_WORDS, TEST_SHARE = 8, 0.6  # contamination: runs of 8 words, share of them in common
MIN_GRAMS = 8  # of the shorter text; under 15 words a match must be the whole text
LONG_GRAMS = 20  # 27 words: in common, for an excerpt (boilerplate has 22); or with two pictures
NEAR_BITS = 6  # of 64 of a picture's dhash: candidates, for line drawings meet at 2 by chance
SAME_PICTURE = 0.92  # correlation of their 32 x 32 copies: saved anew 0.93 to 1, by chance < 0.75


@dataclass(frozen=True)
class Config:
    """Stage 0: from rows to the file that a stage reads."""

    rows: tuple[str, ...]  # JSONL files {"id", "source", "prompt", "response" or "answer", ...}
    kind: Literal["sft", "rl"]  # sft rows need a response, rl rows an answer
    out: str  # JSONL to write; dropped.jsonl, contaminated.jsonl, report.json beside it
    benchmarks: tuple[str, ...] = ()  # JSONL files of test questions {"id", "prompt", "images"?}
    count: int = 0  # rows to choose; 0: all
    alpha: float = 0.5  # a row weighs (rows of its stratum) ^ -alpha; ours
    seed: int = 0
    workers: int = 1  # processes

    def __post_init__(self):
        if not self.rows:
            raise ValueError("--rows names no file")
        if Path(self.out).resolve() in {Path(path).resolve() for path in self.rows}:
            raise ValueError(f"--out {self.out} is one of the inputs and would be overwritten")
        if self.count < 0 or self.alpha < 0 or self.workers < 1:
            raise ValueError("count and alpha must not be negative, workers at least 1")


# ---- 1. rules: row -> what is wrong with it, or None. The name of a rule is its reason.

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
    """Text is missing, holds markup of the chat, or has other markers than pictures (data.py)."""
    texts = [row["prompt"], *([row["response"]] if "response" in row else [])]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        return "prompt or response is not a text"
    if found := MARKUP.search("\n".join(texts)):
        return found[0]
    markers, images = row["prompt"].count("<image>"), len(row.get("images") or [])
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
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
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


# ---- 2. duplicates

NOISE = re.compile(
    r"\\(?:left|right|displaystyle|text|mathrm|mathbf|quad|qquad|[,;!])(?![a-z])|\\[dt](?=frac)"
    r"|^\s*(?:(?:problem|question|example|exercise)\s*)?\d+\s*[.):]\s(?=\D)|(?<=\w)-(?=[a-z])"
)
WORD = re.compile(
    "[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\\d|[-+*/=<>^!%|×÷±√∫∑∏≤≥≠∪∩∈]|"
    "[^\\W\\d_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+"
)
MASK, GOLDEN = (1 << 64) - 1, 0x9E3779B97F4A7C15
RNG = np.random.default_rng(1997)  # of Broder's "On the resemblance of documents"; never changes
ODD = RNG.integers(0, 1 << 63, PERMUTATIONS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
SHIFT = RNG.integers(0, 1 << 63, PERMUTATIONS, dtype=np.uint64)


def words(text: str) -> list[str]:
    r"""Lower-case words, single digits and signs; \frac{1}{2} and \dfrac12 are the same."""
    text = unicodedata.normalize("NFKC", text).replace("−", "-").lower().replace("<image>", " ")
    return WORD.findall(NOISE.sub(" ", text))


def digest(*parts: str) -> int:
    """64 bits that are the same on every machine."""
    joined = "\0".join(parts).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(joined, digest_size=8).digest(), "big")


@lru_cache(1 << 17)
def word_hash(word: str) -> int:
    return zlib.crc32(word.encode(errors="surrogatepass")) * GOLDEN & MASK


def mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al. 2014): all bits depend on all bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def runs(tokens: list[str], n: int) -> np.ndarray:
    """A hash for each run of n tokens; of a shorter text one, of all it has. -> (runs,) uint64"""
    n = max(1, min(n, len(tokens)))
    hashes = np.fromiter(map(word_hash, tokens), np.uint64, len(tokens))
    last = len(hashes) - n + 1
    return mixed(sum((hashes[i : i + last] * ODD[i] for i in range(n)), np.zeros(last, np.uint64)))


def signature(tokens: list[str]) -> np.ndarray:
    """MinHash (Broder 1997): equal in each place with probability J. (PERMUTATIONS,) uint32"""
    grams = runs(tokens, NEAR_WORDS)[:, None]
    return ((grams * ODD + SHIFT) >> np.uint64(32)).min(axis=0, initial=MASK >> 32).astype("u4")


def sketch(signed: np.ndarray) -> np.ndarray:
    """The two lowest bits of each place: 32 bytes, J to within 0.04 (Li, Koenig 2010)."""
    return np.packbits(np.stack([signed & 1, signed >> 1 & 1]).astype(np.uint8)).view(np.uint64)


def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Jaccard similarity estimated from sketches; two bits agree by chance 1 time in 4."""
    differ = a ^ b
    half = differ.shape[-1] // 2  # low bits, then high bits
    unequal = np.bitwise_count(differ[..., :half] | differ[..., half:]).sum(axis=-1)
    return 1 - unequal / PERMUTATIONS * 4 / 3


def identity(tokens: list[str], pictures: Iterable[str], gold: str) -> int:
    """Of what must be equal in near-duplicates: "12 apples" and "13 apples" are two problems.

    Signs count that are written alike everywhere; "1/2" may also be a fraction, "*" a product. The
    answer counts because puzzles from a generator differ in one name: who has the blue present?
    """
    signs = "".join(t for t in tokens if t.isdigit() or t in "+-=<>")
    return digest(signs, " ".join(words(gold)), *pictures)


def repeats(facts: np.ndarray) -> np.ndarray:
    """For each row the first row that it repeats, word for word or nearly; or itself. (N,) -> (N,)

    Bands are sorted one at a time, so memory is one band's. In a run of equal bands each row is
    compared with the first and with the one before: linear, even where 10^5 rows share a band.
    """
    _, first, group = np.unique(facts["text"], return_index=True, return_inverse=True)
    root = first[group]  # exact ones
    alone = np.flatnonzero(root == np.arange(len(facts)))
    pairs = np.empty(0, np.int64)  # later row * 2^32 + earlier row
    for band in range(BANDS):
        keys = facts["bands"][alone, band]
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        same = np.flatnonzero(keys[1:] == keys[:-1]) + 1
        starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        lead = starts[np.searchsorted(starts, same, "right") - 1]
        for before in (same - 1, lead):
            later, earlier = alone[order[same]], alone[order[before]]
            alike = similarity(facts["sketch"][later], facts["sketch"][earlier]) >= NEAR
            pairs = np.union1d(pairs, (later << 32 | earlier)[alike])
    for pair in pairs:
        later, earlier = pair >> 32, pair & 0xFFFFFFFF
        kept = root[earlier]  # B repeats A, C is like B: C goes only if it is like A
        if root[later] == later:
            if kept == earlier or similarity(*facts["sketch"][[later, kept]]) >= NEAR:
                root[later] = kept
    return root[root]  # of a copy whose first row is near to an earlier one


# ---- 3. benchmarks


class Picture(NamedTuple):
    sha256: str
    dhash: int  # 64 bits: is each pixel of a 9 x 8 copy brighter than the one to its left?
    small: np.ndarray  # (1024,) float32: a 32 x 32 copy of mean 0 and length 1


@lru_cache(64)  # the pictures of a row are asked for up to three times
def fingerprint(path: str) -> Picture:
    with Image.open(path) as image:
        image = image.convert("RGBA")  # on white, or a transparent drawing is black on black
    grey = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("L")
    pixels = np.asarray(grey.resize((9, 8)))
    bits = np.packbits(pixels[:, 1:] > pixels[:, :-1])
    small = np.asarray(grey.resize((32, 32)), dtype=np.float32).ravel()
    small = small - small.mean()
    small /= max(float(np.linalg.norm(small)), 1.0)  # a blank one is like nothing
    sha = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return Picture(sha, int.from_bytes(bits.tobytes(), "big"), small)


class Benchmarks(NamedTuple):
    """Test questions as sorted arrays: 12 bytes a run of words, shared by the workers."""

    ids: list[str]
    sizes: np.ndarray  # runs of each question
    pictured: np.ndarray  # has it pictures?
    grams: np.ndarray  # sorted
    owners: np.ndarray  # the question of each gram
    texts: dict[int, list[int]]  # hash of a whole short text -> questions
    pictures: dict[str, list[int]]  # sha256 -> questions
    dhashes: np.ndarray
    small: np.ndarray  # (pictures, 1024) float32
    shown: np.ndarray  # the question of each picture


def test_words(prompt: str) -> list[str]:
    """Without the code of drawings, which a set with pictures has not."""
    return words(re.sub(r"\[asy\].*?(?:\[/asy\]|$)", " ", prompt, flags=re.S))


def read_benchmarks(files: Iterable[str]) -> Benchmarks:
    ids, grams, pictured, seen, shown = [], [], [], [], []
    texts, pictures = defaultdict(list), defaultdict(list)
    for path in files:
        for _, row in rows_of(Path(path), 0, os.path.getsize(path), ("id", "prompt")):
            item, tokens, images = len(ids), test_words(row["prompt"]), row.get("images") or []
            found = np.unique(runs(tokens, TEST_WORDS))
            if len(found) < MIN_GRAMS:
                found = found[:0]
                if len(tokens) >= 3 and not images:  # "find x" is nobody's question
                    texts[digest(*tokens)].append(item)
            ids.append(str(row["id"]))
            grams.append(found)
            pictured.append(bool(images))
            for name in images:
                seen.append(fingerprint(str(Path(row["folder"], name))))
                pictures[seen[-1].sha256].append(item)
                shown.append(item)
    sizes = np.array([len(found) for found in grams], np.int64)
    grams = np.concatenate([np.empty(0, np.uint64), *grams])
    owners = np.repeat(np.arange(len(ids), dtype=np.uint32), sizes)
    order = np.argsort(grams, kind="stable")
    dhashes = np.array([picture.dhash for picture in seen], np.uint64)
    small = np.array([picture.small for picture in seen], np.float32).reshape(-1, 1024)
    gist = dhashes, small, np.array(shown, np.int64)
    return Benchmarks(
        ids, sizes, np.array(pictured, bool), grams[order], owners[order], texts, pictures, *gist
    )


def contaminations(row: dict, tests: Benchmarks) -> Iterator[tuple[str, float, str]]:
    """(benchmark id, score, kind) of each test question that stands in the row.

    text: containment of the question in the prompt, or, where much is in common, of the prompt, an
    excerpt, in the question. words: two short texts without pictures are the same. image: the same
    file; image_near: the same picture, saved anew. A picture is enough: another question about it
    still shows it. A short text is not where both have pictures: "Which figure can be made from
    these shapes?" is a template.
    """
    tokens, images = test_words(row["prompt"]), row.get("images") or []
    grams = np.unique(runs(tokens, TEST_WORDS))
    left, right = (np.searchsorted(tests.grams, grams, side) for side in ("left", "right"))
    spans = [tests.owners[a:b] for a, b in zip(left, right, strict=True) if b > a]
    for item, common in Counter(np.concatenate(spans).tolist() if spans else ()).items():
        if images and tests.pictured[item] and min(len(grams), tests.sizes[item]) < LONG_GRAMS:
            continue
        score = common / tests.sizes[item]
        if common >= LONG_GRAMS:
            score = max(score, common / len(grams))
        if score >= TEST_SHARE:
            yield tests.ids[item], round(float(score), 3), "text"
    if not images:
        for item in tests.texts.get(digest(*tokens), ()):
            yield tests.ids[item], 1.0, "words"
    for name in images if tests.pictures else ():
        picture = fingerprint(str(Path(row["folder"], name)))
        for item in tests.pictures.get(picture.sha256, ()):
            yield tests.ids[item], 1.0, "image"
        if picture.sha256 in tests.pictures:
            continue
        bits = np.bitwise_count(tests.dhashes ^ np.uint64(picture.dhash))
        for k in np.flatnonzero(bits <= NEAR_BITS):
            if (score := float(tests.small[k] @ picture.small)) >= SAME_PICTURE:
                yield tests.ids[tests.shown[k]], round(score, 3), "image_near"


# ---- 4. strata and weights


def sampling_keys(uniform: np.ndarray, strata: np.ndarray, alpha: float) -> np.ndarray:
    """-log(u) / w with w = n^-alpha, n rows in the stratum: the smallest keys are the sample.

    Efraimidis, Spirakis 2006 (algorithm A, by logarithms): a weighted draw without replacement in
    one pass. u is a hash of (seed, id), so a row's luck hangs on no other row. (N,), (N,) -> (N,)
    """
    _, group, sizes = np.unique(strata, return_inverse=True, return_counts=True)
    return -np.log(uniform) * sizes[group].astype(float) ** alpha


def chosen(uniform: np.ndarray, strata: np.ndarray, alpha: float, count: int) -> np.ndarray:
    """The places of `count` rows, in the order of the rows."""
    keys = sampling_keys(uniform, strata, alpha)
    return np.sort(np.argsort(keys, kind="stable")[: count or None])


# ---- first pass: what is known of a row alone

FACT = np.dtype(
    [
        ("id", "u8"),  # hash of (seed, id)
        ("text", "u8"),  # hash of all words and pictures
        ("bands", "u4", (BANDS,)),
        ("sketch", "u8", (PERMUTATIONS * 2 // 64,)),
        ("stratum", "u4"),
        ("rule", "u1"),  # that drops it, from 1
        ("tested", "?"),  # stands in a benchmark
    ]
)


def rows_of(
    path: Path, start: int, end: int, needs: tuple[str, ...] = ()
) -> Iterator[tuple[bytes, dict]]:
    """(line, row) of the lines that begin in [start, end) of the file; row["folder"] is ours."""
    with path.open("rb") as file:
        file.seek(max(0, start - 1))
        if start:
            file.readline()  # the rest of a line that began before
        while (at := file.tell()) < end and (line := file.readline()):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                missing = [name for name in needs if name not in row.keys()]
            except (ValueError, AttributeError) as error:
                raise ValueError(f"{path}, byte {at}: not a row of JSON: {error}") from error
            if missing:
                raise ValueError(f"{path}, byte {at}: {missing} missing; the row has {list(row)}")
            yield line, row | {"folder": str(path.parent)}


@cache
def benchmarks(files: tuple[str, ...]) -> Benchmarks:
    return read_benchmarks(files)


def look(cfg: Config, piece: tuple[str, int, int]) -> tuple[np.ndarray, list, list, list]:
    """(facts (n,), the strata by number, lines for dropped.jsonl, lines for contaminated.jsonl)"""
    tests, strata, dropped, hits = benchmarks(cfg.benchmarks), {}, [], []
    needs = ("id", "source", "prompt", "response" if cfg.kind == "sft" else "answer")
    rows = [row for _, row in rows_of(Path(piece[0]), *piece[1:], needs)]
    facts = np.zeros(len(rows), FACT)
    for row, fact in zip(rows, facts, strict=True):
        row |= {name: "" for name in needs if row[name] is None}  # a rule says so
        if cfg.kind == "rl":
            row.pop("response", None)
        fact["id"] = digest(str(cfg.seed), str(row["id"]))
        level = "" if row.get("level") is None else str(row["level"])
        stratum = (str(row["source"]), level)
        fact["stratum"] = strata.setdefault(stratum, len(strata))
        fact["rule"], detail = judge(row)
        if fact["rule"]:
            reason = RULES[fact["rule"] - 1].name
            dropped.append({"id": row["id"], "step": "rules", "reason": reason, "detail": detail})
            continue
        compare_by(row, fact)
        for test, score, kind in contaminations(row, tests):
            fact["tested"] = True
            hits.append({"id": row["id"], "benchmark_id": test, "score": score, "kind": kind})
    return facts, list(strata), dropped, hits


def compare_by(row: dict, fact: np.void) -> None:
    """Writes down what finds the duplicates of a row."""
    tokens = words(row["prompt"])
    names = [str(Path(row["folder"], name)) for name in row.get("images") or []]
    pictures = [fingerprint(name).sha256 for name in names]
    signed, same = signature(tokens), identity(tokens, pictures, str(row.get("answer", "")))
    bands = signed.reshape(BANDS, -1)
    keys = (bands * ODD[: bands.shape[1]]).sum(axis=1, dtype=np.uint64) ^ np.uint64(same)
    fact["text"] = digest(" ".join(tokens), *pictures)
    fact["bands"], fact["sketch"] = mixed(keys) >> np.uint64(32), sketch(signed)


def survey(cfg: Config) -> Iterator[tuple[np.ndarray, list, list, list]]:
    """look() at all pieces in their order. Workers are given places in files and not rows, for a
    pool reads ahead without end."""
    sizes = {path: os.path.getsize(path) for path in cfg.rows}
    pieces = [(path, at, at + CHUNK) for path, n in sizes.items() for at in range(0, n, CHUNK)]
    benchmarks(cfg.benchmarks)  # before the processes part, which then share it
    with Pool(cfg.workers) if cfg.workers > 1 else nullcontext() as pool:
        found = pool.imap(partial(look, cfg), pieces) if pool else map(partial(look, cfg), pieces)
        yield from progress(found, "looking at rows", total=len(pieces))


# ---- decisions, second pass, report

REASONS = (  # (step, reason); a row that stays has number 0
    ("", "kept"),
    *(("rules", rule.name) for rule in RULES),
    ("duplicates", "repeated_id"),
    ("duplicates", "same_words"),
    ("duplicates", "near"),
    ("benchmarks", "contaminated"),
    ("sample", "not_chosen"),
)
STEPS = ("rules", "duplicates", "benchmarks", "sample")
REPEATED, SAME, NEARLY, TESTED, NOT_CHOSEN = range(len(RULES) + 1, len(REASONS))


def decide(facts: np.ndarray, cfg: Config) -> tuple[np.ndarray, np.ndarray]:
    """(number of the reason, row that it repeats) of each row. (N,) -> (N,), (N,)"""
    reason, root = facts["rule"].copy(), np.arange(len(facts))
    alive = np.flatnonzero(reason == 0)
    _, first, group = np.unique(facts["id"][alive], return_index=True, return_inverse=True)
    root[alive] = alive[first[group]]
    reason[root != np.arange(len(facts))] = REPEATED

    alive = np.flatnonzero(reason == 0)
    root[alive] = alive[repeats(facts[alive])]
    again = alive[root[alive] != alive]
    same = facts["text"][again] == facts["text"][root[again]]
    reason[again] = np.where(same, SAME, NEARLY)

    reason[(reason == 0) & facts["tested"]] = TESTED
    alive = np.flatnonzero(reason == 0)
    uniform = ((facts["id"][alive] >> np.uint64(11)) + 0.5) / 2**53
    places = chosen(uniform, facts["stratum"][alive], cfg.alpha, cfg.count)
    reason[np.delete(alive, places)] = NOT_CHOSEN
    return reason, root


def copy_rows(cfg: Config, reason: np.ndarray, root: np.ndarray, out, dropped) -> None:
    """Writes the rows that stay, pictures relative to the new file, and why the others do not."""
    target = os.path.abspath(Path(cfg.out).parent)
    firsts = dict.fromkeys(root[root != np.arange(len(root))].tolist())  # rows to be named
    lines = (pair for path in cfg.rows for pair in rows_of(Path(path), 0, os.path.getsize(path)))
    for i, (line, row) in enumerate(progress(lines, "copying rows", total=len(reason))):
        step, why = REASONS[reason[i]]
        if i in firsts:
            firsts[i] = row["id"]
        if not step:
            folder = os.path.abspath(row.pop("folder"))
            if row.get("images") and folder != target:
                places = [os.path.relpath(os.path.join(folder, n), target) for n in row["images"]]
                line = json.dumps(row | {"images": places}, ensure_ascii=False).encode()
            out.write(line.rstrip(b"\r\n") + b"\n")
        elif step != "rules":  # those were written with their detail in the first pass
            detail = f"as {firsts[root[i]]}" if step == "duplicates" else ""
            write(dropped, [{"id": row["id"], "step": step, "reason": why, "detail": detail}])


def write(file, lines: Iterable[dict]) -> None:
    file.write("".join(json.dumps(line) + "\n" for line in lines).encode())


def report(reason: np.ndarray, stratum: np.ndarray, labels: list[tuple[str, str]]) -> dict:
    """{step: {source: {in, kept, reasons}}, "strata": {source and level: {in, kept}}}"""
    counts = defaultdict(Counter)  # source -> number of a reason -> rows
    pairs, rows = np.unique(np.stack([stratum, reason]), axis=1, return_counts=True)
    for s, r, n in zip(*pairs.tolist(), rows.tolist(), strict=True):
        counts[labels[s][0]][r] += n
    table = {}
    left = {source: count.total() for source, count in counts.items()}
    for step in STEPS:
        table[step] = {}
        for source, count in counts.items():
            of_step = {REASONS[r][1]: n for r, n in count.items() if REASONS[r][0] == step}
            kept = left[source] - sum(of_step.values())
            table[step][source] = {"in": left[source], "kept": kept, "reasons": of_step}
            left[source] = kept
    before = np.bincount(stratum[(reason == 0) | (reason == NOT_CHOSEN)], minlength=len(labels))
    after = np.bincount(stratum[reason == 0], minlength=len(labels))
    table["strata"] = {
        " ".join(label).strip(): {"in": int(n), "kept": int(k)}
        for label, n, k in zip(labels, before, after, strict=True)
    }
    return table


def show(table: dict) -> None:
    """Rows after each step, why rows went, and the strata before and after the draw."""
    print(f"{'source':30}{'rows':>10}" + "".join(f"{step:>12}" for step in STEPS))
    for source, first in table["rules"].items():
        after = "".join(f"{table[step][source]['kept']:>12,}" for step in STEPS)
        print(f"{source:30.30}{first['in']:>10,}{after}")
    why = {rule.name: rule.why for rule in RULES}
    for step in STEPS:
        total = sum((Counter(of["reasons"]) for of in table[step].values()), Counter())
        for reason, n in total.most_common():
            print(f"{n:>10,}  {step}: {reason.replace('_', ' ')}. {why.get(reason, '')}")
    sums = [max(1, sum(of[x] for of in table["strata"].values())) for x in ("in", "kept")]
    for label, of in sorted(table["strata"].items(), key=lambda item: -item[1]["in"])[:40]:
        shares = [of[x] / total for x, total in zip(("in", "kept"), sums, strict=True)]
        print(
            f"{label:40.40}{of['in']:>10,}{shares[0]:>8.1%} -> {of['kept']:>10,}{shares[1]:>8.1%}"
        )


def main(cfg: Config) -> dict:
    out = Path(cfg.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    facts, strata, part = [np.empty(0, FACT)], {}, out.with_suffix(".part")
    with (
        part.open("wb") as rows,
        (out.parent / "dropped.jsonl").open("wb") as dropped,
        (out.parent / "contaminated.jsonl").open("wb") as contaminated,
    ):
        for found, labels, gone, hits in survey(cfg):
            numbers = [strata.setdefault(label, len(strata)) for label in labels]
            found["stratum"] = np.array(numbers, np.uint32)[found["stratum"]]
            facts.append(found)
            write(dropped, gone)
            write(contaminated, hits)
        facts = np.concatenate(facts)
        reason, root = decide(facts, cfg)
        copy_rows(cfg, reason, root, rows, dropped)
    part.replace(out)  # complete: nobody trains on half a file
    table = report(reason, facts["stratum"], list(strata))
    (out.parent / "report.json").write_text(json.dumps(table, indent=1))
    show(table)
    return table


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
