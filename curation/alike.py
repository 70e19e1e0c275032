"""When two texts or two pictures are the same: duplicates in the data, test questions in it.

duplicates  prompts alike word for word, or in >= 0.8 of their runs of five words (MinHash, Broder
            1997). Near ones with other digits, signs, pictures or answers are two problems: "12
            apples" and "13 apples"
benchmarks  >= 0.6 of a test question's runs of eight words stand in the prompt, or the picture is
            its picture. The usual rule, any 13 words in common, flags the boilerplate of contests
pictures    the same if the files are, as part of a problem; as a test's, if two small grey copies
            correlate, for a picture may have been saved anew

Hashes are our own arithmetic and not Python's: the same on every machine and day.
"""

import hashlib
import re
import unicodedata
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from common.data import decoding, opened

PERMUTATIONS = 128  # of a byte each; bands of 8 bytes compare 95 % of pairs at J = 0.8, all at 0.9
NEAR_WORDS, NEAR = 5, 0.8  # Jaccard similarity of runs of 5 words, estimated to within 0.04
TEST_WORDS, TEST_SHARE = 8, 0.6  # contamination: runs of 8 words, share of them in common
MIN_GRAMS = 8  # runs of the shorter text; one of under 15 words has to be equal as a whole
LONG_GRAMS = 20  # 27 words: of a text with a picture, for "Which of these shapes fits?" is nobody's
SAME_PICTURE = 0.92  # correlation of their 32 x 32 copies: saved anew 0.93 to 1, by chance < 0.75

NOISE = re.compile(
    r"\\(?:left|right|displaystyle|text|mathrm|mathbf|quad|qquad|[,;!])(?![a-z])|\\[dt](?=frac)"
    r"|^\s*(?:(?:problem|question|example|exercise)\s*)?\d+\s*[.):]\s(?=\D)|(?<=\w)-(?=[a-z])"
)
WORD = re.compile(
    "[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\\d|[-+*/=<>^!%|#×÷±√∫∑∏≤≥≠∪∩∈]|(?<!\\S)\\.(?!\\S)|"
    "[^\\W\\d_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+"
)
RNG = np.random.default_rng(1997)  # of Broder's "On the resemblance of documents"; never changes
ODD = RNG.integers(0, 1 << 63, PERMUTATIONS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def words(text: str) -> list[str]:
    r"""Lower-case words, single digits and signs; \frac{1}{2} and \dfrac12 are the same."""
    text = unicodedata.normalize("NFKC", text).replace("−", "-").lower().replace("<image>", " ")
    return WORD.findall(NOISE.sub(" ", text))


def digest(*parts: str) -> int:
    """64 bits that are the same on every machine."""
    joined = "\0".join(parts).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(joined, digest_size=8).digest(), "big")


def runs(tokens: list[str], n: int) -> np.ndarray:
    """A hash for each run of n tokens; of a shorter text one, of all it has. -> (runs,) uint64"""
    n = max(1, min(n, len(tokens)))
    codes = (zlib.crc32(token.encode(errors="surrogatepass")) for token in tokens)
    codes = np.fromiter(codes, np.uint64, len(tokens))
    last = len(codes) - n + 1
    x = sum((codes[i : i + last] * ODD[i] for i in range(n)), np.zeros(last, np.uint64))
    # the finaliser of splitmix64 (Steele et al. 2014): all bits depend on all bits
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def describe(row: dict, fact: np.void) -> None:
    """Writes down what `repeats` compares: a hash of all words and pictures, the MinHash signature,
    and a hash of what near-duplicates have in common. Of each minimum the signature keeps a byte:
    two texts have the same in a share of about J. Equal must be signs that are written alike
    everywhere, and those that grids are drawn with; "1/2" may also be a fraction, "*" a product. So
    must the answer be, for puzzles from a generator differ in one name: who has the present?"""
    tokens, gold = words(row["prompt"]), " ".join(words(row["answer"] or ""))
    pictures = [fingerprint(path)[0] for path in row["images"]]
    signs = "".join(t for t in tokens if t.isdigit() or t in "+-=<>#.")
    hashes = runs(tokens, NEAR_WORDS)[:, None] * ODD >> np.uint64(32)
    fact["text"] = digest(" ".join(tokens), *pictures)
    fact["signature"] = hashes.min(axis=0, initial=2**32 - 1).astype(np.uint8)
    fact["identity"] = digest(signs, gold, *pictures)


def first_equal(keys: np.ndarray) -> np.ndarray:
    """For each place the first place with the same key. (N,) -> (N,)"""
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    return first[group]


def repeats(facts: np.ndarray) -> np.ndarray:
    """For each row the first row that it repeats, word for word or nearly; or itself. (N,) -> (N,).
    facts: "text" and "identity", hashes, and "signature" of each row. A row is compared with the
    first of those that share a band (8 places of the signature) and the identity: linear, even
    where 10^5 rows share it. Bands are sorted one at a time, so memory is one band's."""
    root, signatures = first_equal(facts["text"]), facts["signature"]
    alone = np.flatnonzero(root == np.arange(len(facts)))
    pairs = np.empty(0, np.int64)  # later row * 2^32 + earlier row
    for band in signatures.view(np.uint64).T:
        leader = alone[first_equal(band[alone] ^ facts["identity"][alone])]
        later, earlier = alone[leader != alone], leader[leader != alone]
        near = (signatures[later] == signatures[earlier]).mean(axis=1) >= NEAR
        pairs = np.union1d(pairs, (later << 32 | earlier)[near])
    for pair in pairs:
        later, first = pair >> 32, root[pair & 0xFFFFFFFF]
        # B repeats A, C is like B: C goes only if it is like A
        if root[later] == later and (signatures[later] == signatures[first]).mean() >= NEAR:
            root[later] = first
    return root[root]  # of a copy whose first row is near to an earlier one


@lru_cache(64)  # a row's pictures are needed up to three times
def fingerprint(path: str) -> tuple[str, np.ndarray]:
    """(sha256, a grey copy of 32 x 32 pixels, of mean 0 and length 1). ValueError if the picture is
    damaged, or has 89 million pixels or more: a bomb."""
    bombs = Image.DecompressionBombWarning
    with decoding(path), warnings.catch_warnings(action="error", category=bombs):
        image = opened(path).convert("RGBA")  # on white, or a drawing is black on black
        grey = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("L")
        small = np.asarray(grey.resize((32, 32)), dtype=np.float32).ravel()
    small = small - small.mean()
    small /= max(float(np.linalg.norm(small)), 1.0)  # a blank one is like nothing
    return hashlib.sha256(Path(path).read_bytes()).hexdigest(), small


def test_grams(prompt: str) -> np.ndarray:
    """Hashes of runs of words; of a short text one, of the whole; of "find x", which is nobody's
    question, none. The code of drawings is left out, which a set with pictures has not."""
    tokens = words(re.sub(r"\[asy\].*?(?:\[/asy\]|$)", " ", prompt, flags=re.S))
    grams = np.unique(runs(tokens, TEST_WORDS))
    if len(grams) >= MIN_GRAMS:
        return grams
    return np.array([digest(*tokens)] if len(tokens) >= 3 else [], np.uint64)


class Benchmarks:
    """Test questions, (id, prompt, paths of pictures) each, as sorted arrays: 12 bytes a run of
    words, shared by the workers."""

    def __init__(self, tests: list[tuple[str, str, list[str]]]):
        texts = [test_grams(prompt) for _, prompt, _ in tests]
        grams = np.concatenate([np.empty(0, np.uint64), *texts])
        order = np.argsort(grams, kind="stable")
        self.ids, self.sizes = [test[0] for test in tests], [*map(len, texts)]  # runs of each
        owners = np.repeat(np.arange(len(tests), dtype=np.uint32), self.sizes)
        self.grams, self.owners = grams[order], owners[order]  # the question of each gram
        small = [fingerprint(path)[1] for *_, images in tests for path in images]
        self.small = np.array(small, np.float32).reshape(-1, 32 * 32)
        self.shown = [k for k, (*_, images) in enumerate(tests) for _ in images]  # of each picture

    def hits(self, row: dict) -> Iterator[tuple[str, str, float]]:
        """(benchmark id, "text" or "image", score) of each test question that stands in the row.
        The score of a text is the share of the question that stands in the prompt; of a picture the
        correlation. A picture is enough: another question about it still shows it. Where one of the
        two has a picture, a short text is not: "Which figure can be made?" is a template."""
        images, grams = row["images"], test_grams(row["prompt"])
        left, right = (np.searchsorted(self.grams, grams, side) for side in ("left", "right"))
        owners = [self.owners[a:b] for a, b in zip(left, right, strict=True) if b > a]
        for item, common in Counter(np.concatenate(owners).tolist() if owners else ()).items():
            is_template = self.sizes[item] < LONG_GRAMS and (images or item in self.shown)
            score = common / self.sizes[item]
            if score >= TEST_SHARE and not is_template:
                yield self.ids[item], "text", round(score, 3)
        for path in images if self.shown else ():
            correlations = self.small @ fingerprint(path)[1]
            for k in np.flatnonzero(correlations >= SAME_PICTURE):
                yield self.ids[self.shown[k]], "image", round(float(correlations[k]), 3)
