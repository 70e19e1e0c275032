r"""When two texts or two pictures are the same: duplicates in the data, test questions in it.

duplicates  prompts alike word for word, or in >= 0.8 of their runs of five words (MinHash, Broder
            1997); the first row stays. Near ones with other digits, signs, pictures or answers both
            stay: "12 apples" and "13 apples" are two problems
benchmarks  >= 0.6 of a test question's runs of eight words stand in the prompt, or the picture is
            its picture. The usual rule, any 13 words in common, flags the boilerplate of contests
pictures    alike if the files are; saved anew, if two small grey copies of them correlate

All hashes are our own arithmetic and not Python's, so they are the same on every machine and day.
Nothing here holds a row: a text becomes some numbers, and arrays of these are compared.
"""

import hashlib
import re
import struct
import unicodedata
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

PERMUTATIONS, BANDS = 128, 16  # bands of 8 compare 95 % of pairs at J = 0.8, all at 0.9
NEAR_WORDS, NEAR = 5, 0.8  # Jaccard similarity of runs of 5 words, estimated to within 0.04
TEST_WORDS, TEST_SHARE = 8, 0.6  # contamination: runs of 8 words, share of them in common
MIN_GRAMS = 8  # of the shorter text; under 15 words a match must be the whole text
LONG_GRAMS = 20  # 27 words: in common, for an excerpt (boilerplate has 22); or with two pictures
NEAR_BITS = 6  # of 64 of a picture's dhash: candidates, for line drawings meet at 2 by chance
SAME_PICTURE = 0.92  # correlation of their 32 x 32 copies: saved anew 0.93 to 1, by chance < 0.75
# what pillow raises for a broken picture, and for one of 89 million pixels or more: a bomb
DAMAGED = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error)
DAMAGED += (Image.DecompressionBombError, Image.DecompressionBombWarning)

# ---- texts

NOISE = re.compile(
    r"\\(?:left|right|displaystyle|text|mathrm|mathbf|quad|qquad|[,;!])(?![a-z])|\\[dt](?=frac)"
    r"|^\s*(?:(?:problem|question|example|exercise)\s*)?\d+\s*[.):]\s(?=\D)|(?<=\w)-(?=[a-z])"
)
WORD = re.compile(
    "[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\\d|[-+*/=<>^!%|#×÷±√∫∑∏≤≥≠∪∩∈]|(?<!\\S)\\.(?!\\S)|"
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

    Signs count that are written alike everywhere, and those that grids are drawn with; "1/2" may
    also be a fraction, "*" a product. The answer counts because puzzles from a generator differ in
    one name: who has the blue present?
    """
    signs = "".join(t for t in tokens if t.isdigit() or t in "+-=<>#.")
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


# ---- pictures


class Picture(NamedTuple):
    sha256: str
    dhash: int  # 64 bits: is each pixel of a 9 x 8 copy brighter than the one to its left?
    small: np.ndarray  # (1024,) float32: a 32 x 32 copy of mean 0 and length 1


@lru_cache(64)  # the pictures of a row are asked for up to three times
def fingerprint(path: str) -> Picture:
    """Raises one of DAMAGED."""
    bombs = Image.DecompressionBombWarning
    with warnings.catch_warnings(action="error", category=bombs), Image.open(path) as image:
        image = image.convert("RGBA")  # on white, or a transparent drawing is black on black
    grey = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("L")
    pixels = np.asarray(grey.resize((9, 8)))
    bits = np.packbits(pixels[:, 1:] > pixels[:, :-1])
    small = np.asarray(grey.resize((32, 32)), dtype=np.float32).ravel()
    small = small - small.mean()
    small /= max(float(np.linalg.norm(small)), 1.0)  # a blank one is like nothing
    sha = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return Picture(sha, int.from_bytes(bits.tobytes(), "big"), small)


# ---- benchmarks


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


def read_benchmarks(rows: Iterable[dict]) -> Benchmarks:
    """rows: {"id", "prompt", "images", "folder"}, each a test question."""
    ids, grams, pictured, seen, shown = [], [], [], [], []
    texts, pictures = defaultdict(list), defaultdict(list)
    for item, row in enumerate(rows):
        tokens, images = test_words(row["prompt"]), row["images"]
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
