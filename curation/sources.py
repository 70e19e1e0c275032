"""The public sets that the paper names, and one reader that turns each of them into our rows.

    the Hub, or a directory ──raw_rows──▶ rows as the set has them ──Source.rows──▶ question and
    answer ──finish──▶ {"id", "source", "prompt", "images", "answer", ...} or Dropped

    row      a dict of JSON values. <image> stands in the prompt where a picture stands; a picture
             is a file named by its hash in `images_to`, and the row holds its path relative to the
             directory around `images_to`: the JSONL file of the rows belongs there. Options are in
             "choices" and in the prompt as (A), (B), ...; "answer" is then the letter.
    Dropped  a row that cannot be used, with its reason. The caller counts them: none goes silently.

Everything streams: what is in memory is a batch of rows and the ids that the set itself gives. Only
OpenR1's rows carry a response, an R1 trace each; for all other sets a response has to be distilled.

The paper lists names, no Hub ids, splits or sizes (sec. 3.3); these are ours. `certainty` says how
sure a line of the table is: C read from a data set card or a loader, P partly so, U from memory. A
column that is not there stops the reader with the list of those that are.

    python -m curation.sources   # prints the table
    python -m curation.sources --set geometry3k --out out/raw/geometry3k.jsonl   # from the Hub
    python -m curation.sources --set puzzlevqa --place downloads/PuzzleVQA/data \
        --out out/raw/puzzlevqa.jsonl
"""

import hashlib
import io
import json
import os
import re
import string
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
from datasets import load_dataset_builder
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from PIL import Image
from pyarrow.dataset import ParquetFragmentScanOptions

from common.log import beside, on_hub, progress, run_main, write_report
from curation.alike import DAMAGED

IMAGE_MARKER = "<image>"  # as data.py reads it
# as text it would be a turn or a picture that is not there; data.py refuses a file with such a row
MARKUP = re.compile(r"<\|(im_start|im_end|endoftext|image_pad|video_pad|vision_[a-z]+)\|>")
MAX_PROMPT = 20_000  # characters: longer ones are pasted books, not questions
MAX_ANSWER = 1_000  # characters; the matcher reads no more than 2,000
MAX_RESPONSE = 400_000  # characters, some 100k tokens: beyond any context here
MAX_ASPECT = 200  # of a picture's sides; transformers' smart_resize
SPLITS = {"train", "validation", "valid", "val", "dev", "test", "testmini"}
ROW_FILES = (".parquet", ".jsonl", ".json")
CHUNK = 1 << 20  # of a file read at once: characters of JSON, bytes of a parquet column
BATCH = 32  # rows of parquet in memory; with pictures of 1 MB that is 32 MB
BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)
ODD = (KeyError, IndexError, TypeError, AttributeError, ValueError)  # a row of another shape


class Dropped(NamedTuple):
    id: str
    reason: str  # a few words, the same for all rows of a kind: what a counter counts
    detail: str


class Unfit(Exception):
    """A row, or one generation of it, that cannot be used. Raised or listed: (reason, detail)."""


@dataclass(frozen=True)
class Source:
    """A public set: where it lies, what it holds, and how a row of it becomes ours."""

    name: str
    hub: str  # id on the Hub; "" if it is not there
    rows: Callable[[dict], list]  # raw row -> our rows so far, or Unfit in place of one
    needs: str  # columns without which the reader stops, by commas
    license: str
    size: int  # raw rows of the split
    used_for: str  # "coldstart", "rl" or "both"
    certainty: str  # C, P or U: see above
    note: str
    also: str = ""  # columns that are read where they are there
    configs: tuple[str | None, ...] = (None,)
    split: str = "train"
    local: str = ""  # why it cannot come from the Hub as it is, and where it comes from


def columns(names: str) -> list[str]:
    return names.split(", ") if names else []


# ---- reading


def read(
    source: Source | str,
    place: str | Path | None = None,
    split: str | None = None,
    *,
    images_to: Path,
    limit: int | None = None,
) -> Iterator[dict | Dropped]:
    """The rows of a set; Dropped where one cannot be used. limit: stop after so many good rows.

    place: None for the Hub; or a file, or a directory with the files as the Hub has them: parquet,
    JSON or JSONL whose names carry the split (or none), pictures embedded or as files.
    """
    source = named(source) if isinstance(source, str) else source
    if place is None and source.local:
        raise ValueError(f"set {source.name}: {source.local}")
    if place is not None and not Path(place).exists():
        raise FileNotFoundError(f"set {source.name}: {place} does not exist")
    return checked_rows(source, place and Path(place), split or source.split, images_to, limit)


def checked_rows(
    source: Source, place: Path | None, split: str, images_to: Path, limit: int | None
) -> Iterator[dict | Dropped]:
    seen, kept, index = set(), 0, None
    for index, raw, folders in raw_rows(source, place, split):
        for row in rows_of(source, split, index, raw, folders, images_to, seen):
            if kept == limit:
                return
            kept += not isinstance(row, Dropped)
            yield row
    if index is None:
        raise ValueError(f"set {source.name}: {place or source.hub}, split {split}, holds no rows")


def named(name: str) -> Source:
    for source in SOURCES:
        if source.name == name:
            return source
    raise ValueError(f"no set is called {name!r}; there are {', '.join(s.name for s in SOURCES)}")


def rows_of(
    source: Source,
    split: str,
    index: int,
    raw: dict | Unfit,
    folders: list[Path],
    images_to: Path,
    seen: set[str],
) -> Iterator[dict | Dropped]:
    """One raw row: one row of ours, or several (a generation each), each of them checked."""
    where = str(index) if split == source.split else f"{split}-{index}"
    try:
        parts = [raw] if isinstance(raw, Unfit) else source.rows(raw)
    except Unfit as unfit:
        parts = [unfit]
    except ODD as error:
        parts = [Unfit("malformed row", repr(error))]
    for k, part in enumerate(parts):
        own = {} if isinstance(part, Unfit) else part
        number = own.pop("id", None) or None  # the set's own may repeat; a running number cannot
        name = f"{source.name}/{where if number is None else number}"
        name += f"/{k}" if len(parts) > 1 and number is None else ""
        try:
            if isinstance(part, Unfit):
                raise part
            if number is not None and name in seen:
                raise Unfit("duplicate id", f"row {index} of {split} has it again")
            row = {"id": name, "source": source.name} | finish(own, folders, images_to)
            seen.update([name] if number is not None else [])
            origin = {"set": source.hub or source.name, "split": split}
            yield row | {"origin": origin | {"index": index, "license": source.license}}
        except Unfit as unfit:
            yield Dropped(name, *unfit.args)


def finish(row: dict, folders: list[Path], images_to: Path) -> dict:
    """The checks that every set needs; pictures become files last, so a bad row leaves none."""
    pictures = row.pop("images", [])
    if not isinstance(pictures, list):
        raise Unfit("no picture", f"{pictures!r:.80}")
    row = {key: value for key, value in row.items() if value is not None}
    row["prompt"] = words(row.get("prompt"), "prompt", MAX_PROMPT)
    row["answer"] = words(row.get("answer"), "answer", MAX_ANSWER)
    if "response" in row:
        row["response"] = words(row["response"], "response", MAX_RESPONSE)
    markers = row["prompt"].count(IMAGE_MARKER)
    if not markers:
        row["prompt"] = IMAGE_MARKER * len(pictures) + row["prompt"]
    elif markers != len(pictures):
        raise Unfit("markers and pictures differ", f"{markers} markers, {len(pictures)} pictures")
    if not row["prompt"].replace(IMAGE_MARKER, "").strip():
        raise Unfit("no prompt", "only pictures")
    return row | {"images": [keep_image(picture, folders, images_to) for picture in pictures]}


def words(value: Any, column: str, longest: int) -> str:
    """A text that is there; 7 is taken as "7" and 7.0 as "7.0", as the set gives it."""
    if isinstance(value, bool) or not isinstance(value, str | int | float | None):
        raise Unfit("malformed row", f"{column} is {value!r:.80}")
    text = "" if value is None or value != value else str(value).strip()  # NaN is unequal to itself
    if not text:
        raise Unfit(f"no {column}", f"{value!r}")
    if len(text) > longest:
        raise Unfit(f"{column} too long", f"{len(text)} characters, more than {longest}")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half a character: no tokenizer takes it
        raise Unfit("malformed row", f"{column}: {error}") from error
    if column != "answer" and (found := MARKUP.search(text)):
        raise Unfit("chat markup", f"{found.group()} in {column}")
    return text


# ---- pictures


def keep_image(picture: Any, folders: list[Path], images_to: Path) -> str:
    """Writes the bytes, as they came, to images_to/<hash>.<format>, once; returns the row's path.

    A new picture is decoded in full: a damaged one would stop a training run days later.
    """
    data = image_bytes(picture, folders)
    try:
        with (
            warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning),
            Image.open(io.BytesIO(data)) as image,
        ):
            suffix = {"JPEG": "jpg"}.get(image.format, str(image.format).lower())
            path = images_to / f"{hashlib.sha256(data).hexdigest()[:16]}.{suffix}"
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise Unfit("picture too narrow", f"{image.size}, beyond {MAX_ASPECT}:1")
            if not path.exists():
                image.load()
    except BOMBS as error:
        raise Unfit("decompression bomb", str(error)) from error
    except DAMAGED as error:
        raise Unfit("picture cannot be opened", str(error)) from error
    if not path.exists():
        images_to.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")  # a run that is killed leaves no half file
        part.write_bytes(data)
        part.replace(path)
    return f"{images_to.name}/{path.name}"


def image_bytes(picture: Any, folders: list[Path]) -> bytes:
    """Of {"bytes", "path"} as `datasets` stores it, or of a path below one of the folders."""
    sha256 = None
    if isinstance(picture, dict):
        if isinstance(picture.get("bytes"), bytes):
            return picture["bytes"]
        picture, sha256 = picture.get("path"), picture.get("sha256")
    if not isinstance(picture, str) or not picture:
        raise Unfit("no picture", f"{picture!r:.80}")
    if os.path.isabs(picture) or ".." in Path(picture).parts:
        raise Unfit("picture outside the set", picture)
    for folder in folders:
        if os.path.isfile(folder / picture):  # False, too, for what can be no name of a file
            data = (folder / picture).read_bytes()
            if sha256 and hashlib.sha256(data).hexdigest() != sha256:
                raise Unfit("picture has changed", f"{picture} is not what the set was made of")
            return data
    raise Unfit("no picture", f"{picture} is not in {[*map(str, folders)] or 'the rows'}"[-300:])


# ---- raw rows


def raw_rows(
    source: Source, place: Path | None, split: str
) -> Iterator[tuple[int, dict | Unfit, list[Path]]]:
    """(running number, row, folders where its pictures may lie) over all configs of the set."""
    configs = source.configs
    if place:  # a folder for each config, or one that holds them all
        configs = [c for c in configs if c and (place / c).is_dir()] or [None]
        if configs != [None] and len(configs) < len(source.configs):
            missing = sorted(set(source.configs) - set(configs))
            raise FileNotFoundError(f"set {source.name}: {place} lacks the folders {missing}")
    index = 0
    for config in configs:
        local = place and local_rows(source, place, config, split)
        for raw, folders in local or hub_rows(source, config, split):
            yield index, raw, folders
            index += 1


def refuse_unreachable(hub: str) -> None:
    """FileNotFoundError at once; datasets would ask for half a minute before it gives up."""
    try:
        HfApi().dataset_info(hub, timeout=10)
    except (OSError, HTTPError) as error:
        raise FileNotFoundError(
            f"{hub} cannot be read from the Hub: {error}. Get it where the Hub can be reached "
            f"(`hf download --repo-type dataset {hub} --local-dir DIR`), then give --place DIR"
        ) from error


def hub_rows(source: Source, config: str | None, split: str) -> Iterator[tuple[dict, list[Path]]]:
    """As load_dataset(..., streaming=True), but a shard of 500 MB takes 0.6 GB and not 1.2."""
    if on_hub(source.hub):
        refuse_unreachable(source.hub)
    builder = load_dataset_builder(source.hub, config)
    if hasattr(builder.config, "fragment_scan_options"):  # parquet
        builder.config.fragment_scan_options = ParquetFragmentScanOptions(pre_buffer=False)
        builder.config.batch_size = BATCH
    stream = builder.as_streaming_dataset(split=split)
    stream = stream.decode(False) if stream.features else stream  # pictures as bytes, not pixels
    for i, raw in enumerate(stream):
        if i == 0:
            require(source, f"{source.hub}, split {split}", raw)
        yield raw, []


def local_rows(
    source: Source, place: Path, config: str | None, split: str
) -> Iterator[tuple[dict | Unfit, list[Path]]]:
    files = [place] if place.is_file() else row_files(place, config, split)
    for path in files:
        root = path.parent if place.is_file() else place
        folders = list(dict.fromkeys([path.parent, root, root / "images"]))
        if path.suffix == ".parquet":
            # by default the whole file is buffered ahead: 228 MB for one of 200 MB; so 28 MB
            table = pq.ParquetFile(path, pre_buffer=False, buffer_size=CHUNK)
            require(source, str(path), table.schema_arrow.names)
            wanted = columns(source.needs) + columns(source.also)
            there = [name for name in wanted if name in table.schema_arrow.names]
            batches = table.iter_batches(batch_size=BATCH, columns=there)
            rows = (row for batch in batches for row in batch.to_pylist())
        else:
            rows = json_rows(source, path)
        for raw in rows:
            yield raw, folders


def row_files(place: Path, config: str | None, split: str) -> list[Path]:
    """The files of one split, by the words in their names, else all. Never two splits mixed."""
    top = place / config if config else place
    inside = (top, top / "data", top / split)
    found = sorted(p for folder in inside for p in folder.glob("*") if p.suffix in ROW_FILES)
    said = {p: p.stem if p.parent == top else f"{p.parent.name}-{p.stem}" for p in found}
    splits = {p: SPLITS & {*re.split(r"[-_.]", text)} for p, text in said.items()}
    files = [p for p in found if split in splits[p]] if any(splits.values()) else found
    if not files:
        raise FileNotFoundError(
            f"{top}: no {', '.join(ROW_FILES)} of split {split!r}, but "
            f"{[p.name for p in found]}; give the file itself"
        )
    if len({p.suffix for p in files}) > 1:
        raise ValueError(f"{place}: {[p.name for p in files]} are of several kinds; give one file")
    return files


def require(source: Source, place: str, there: Any) -> None:
    missing = [column for column in columns(source.needs) if column not in there]
    if missing:
        raise ValueError(
            f"set {source.name}, {place}: no column {missing}; there are {sorted(there)}. Is it "
            f"{source.hub or source.name}, or has the set changed since its line in sources.py?"
        )


def json_rows(source: Source, path: Path) -> Iterator[dict | Unfit]:
    """JSON lines, or one list, whatever the name says. A list of turns becomes {"0": .., "1": ..},
    as `datasets` names them."""
    with path.open("rb") as file:
        is_list = file.read(CHUNK).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    for i, raw in enumerate(list_items(path) if is_list else line_items(path)):
        raw = {str(k): turn for k, turn in enumerate(raw)} if isinstance(raw, list) else raw
        if not isinstance(raw, dict | Unfit):
            raw = Unfit("malformed row", f"{raw!r:.80}")
        if i == 0 and isinstance(raw, dict):
            require(source, str(path), raw)
        yield raw


def line_items(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                if line.strip():
                    yield json.loads(line)
            except ValueError as error:
                yield Unfit("malformed row", f"{path}, line {number}: {error}")


def list_items(path: Path) -> Iterator[Any]:
    """The items of one long list, a chunk of text at a time: AtomThink's is 214 MB."""
    decode, gap = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*")
    with path.open(encoding="utf-8-sig") as file:
        text = file.read(CHUNK).lstrip()
        at = 1  # behind the bracket
        while not text.startswith("]", at := gap.match(text, at).end()):
            try:
                item, at = decode(text, at)
            except ValueError as error:  # cut by the chunk, or wrong
                more = file.read(max(CHUNK, len(text) - at))  # twice as much: linear in the end
                if not more:
                    raise ValueError(f"{path}: not valid JSON ({error}); fetch it again") from error
                text, at = text[at:] + more, 0
                continue
            yield item


# ---- what the sets have in common


def last_box(text: str) -> str | None:
    r"""What stands in the last closed \boxed{} or \fbox{}, or after \boxed; None without one."""
    for box in reversed([*re.finditer(r"\\(?:boxed|fbox)\s*(?:\{|(\w+))", text)]):
        if box.group(1):  # \boxed 5, as a few solutions of MATH have it
            return box.group(1)
        start, depth = box.end(), 1
        for brace in re.finditer(r"\\.|[{}]", text[start:], re.S):  # \{ is no brace
            depth += {"{": 1, "}": -1}.get(brace.group(), 0)
            if depth == 0:
                return text[start : start + brace.start()]
    return None


FINAL = re.compile(r"\banswer is:?\s*(.+?)\.?(?:\s*I hope it is correct\.?)?\s*$", re.I | re.M)


def final_answer(text: str) -> str | None:
    """The last box, else what the last "answer is" of a worked solution says."""
    told = FINAL.findall(text)
    return last_box(text) or (told[-1].strip(" $*") if told else None)


def chosen(question: str, options: list, answer: Any, is_index: bool = False) -> dict:
    """A multiple-choice question: options into the prompt and "choices", the answer as a letter.

    The answer is the option's text, else its letter. PuzzleVQA's 3 is an option's value and
    ScienceQA's the place of one, so a set whose answers are places, from 0, has to say so.
    """
    texts = [str(option).strip() for option in options]
    if not 2 <= len(texts) <= 26 or not all(texts):
        raise Unfit("bad options", f"{texts!r:.200}")
    if answer is None or answer == "":
        raise Unfit("no answer", f"{answer!r} for {texts!r:.200}")
    letters, text = [*string.ascii_uppercase[: len(texts)]], str(answer).strip()
    if is_index:
        alike = letters[answer : answer + 1] if answer >= 0 else []
    else:
        alike = [x for x, option in zip(letters, texts, strict=True) if option == text]
        alike = alike or [x for x in letters if x == text.strip("().").upper()]
    if len(alike) != 1:
        reason = "bad options" if alike else "answer not among the options"
        raise Unfit(reason, f"{answer!r:.80} in {texts!r:.200}")
    return {"prompt": with_options(question, texts), "answer": alike[0], "choices": texts}


def with_options(question: str, texts: list[str]) -> str | None:
    if not isinstance(question, str) or not question.strip():
        return None  # finish() says so
    lines = [f"({x}) {t}" for x, t in zip(string.ascii_uppercase, texts, strict=False)]
    return "\n".join([question.strip(), "Choices:", *lines])


# ---- text sets


def math_rows(raw: dict) -> list:
    answer = last_box(raw["solution"] or "")
    return [{"prompt": raw["problem"], "answer": answer, "level": raw["level"]}]


def numina_rows(raw: dict) -> list:
    """Proofs and problems without a number or formula as answer cannot be judged (sec. 3.3)."""
    if raw["question_type"] == "proof" or raw["answer"] in ("proof", "notfound"):
        raise Unfit("no answer", f"{raw['question_type']}, answer {raw['answer']!r:.40}")
    if raw.get("problem_is_valid") in ("No", "Incomplete", "Invalid"):
        raise Unfit("flagged by the set", f"problem_is_valid is {raw['problem_is_valid']}")
    return [{"prompt": raw["problem"], "answer": raw["answer"], "level": raw["source"]}]


def openr1_rows(raw: dict) -> list:
    """One row for each R1 trace that is complete and that either verifier of the set accepts."""
    complete, rows = raw["is_reasoning_complete"], []
    verdicts = [raw["correctness_math_verify"] or [], raw.get("correctness_llama") or []]
    for k, trace in enumerate(raw["generations"]):
        right = any(k < len(verdict) and verdict[k] is True for verdict in verdicts)
        row = {"id": f"{raw['uuid']}/{k}", "prompt": raw["problem"], "answer": raw["answer"]}
        row |= {"response": trace, "level": raw["source"]}
        if complete[k] is not True:
            row = Unfit("trace incomplete", f"generation {k} of {raw['uuid']}")
        elif not right:
            row = Unfit("trace not verified", f"generation {k} of {raw['uuid']}")
        elif not isinstance(trace, str):
            row = Unfit("no trace", f"generation {k} of {raw['uuid']} is {trace!r:.40}")
        elif not trace.lstrip().startswith("<think>") or trace.count("</think>") != 1:
            row = Unfit("trace without <think>", f"generation {k} of {raw['uuid']}")
        rows.append(row)
    return rows or [Unfit("no trace", raw["uuid"])]


def tulu_rows(raw: dict) -> list:
    """The solution is GPT-4o's: it gives the answer to check traces by, and is no R1 trace."""
    answer = final_answer(raw["messages"][-1]["content"])
    return [{"id": raw["id"], "prompt": raw["prompt"], "answer": answer}]


def aime_rows(raw: dict) -> list:
    if int(raw["Year"]) > 2023:
        raise Unfit("held out", f"AIME {raw['Year']} is a benchmark")
    row = {"id": raw["ID"], "prompt": raw["Question"], "answer": raw["Answer"]}
    return [row | {"level": raw["Problem Number"]}]


def orz_rows(raw: dict) -> list:
    truth = raw["1"]["ground_truth"]
    row = {"prompt": raw["0"]["value"], "answer": truth["value"]}
    return [row | {"level": truth.get("pass_at_n")}]


# ---- sets with pictures


def geometry3k_rows(raw: dict) -> list:
    return [{"prompt": raw["problem"], "answer": raw["answer"], "images": raw["images"]}]


def geoqa_rows(raw: dict) -> list:
    found = re.search(r"<answer>(.*?)</answer>", raw["solution"], re.S)
    answer = found and found.group(1)
    return [{"prompt": raw["problem"], "answer": answer, "images": [raw["image"]]}]


def iconqa_rows(raw: dict) -> list:
    """Options are texts, joined by commas, or pictures, which stand in the prompt; or none."""
    row = {"id": raw["question_id"], "images": [raw["query_image"]], "level": raw.get("grade")}
    if raw["ques_type"] == "choose_txt":
        options = raw["choices"]
        options = options.split(",") if isinstance(options, str) else options
        return [row | chosen(raw["question"], options, raw["answer"])]
    if raw["ques_type"] == "fill_in_blank":
        return [row | {"prompt": raw["question"], "answer": raw["answer"]}]
    pictures = [raw[f"choice_image_{k}"] for k in range(5) if raw.get(f"choice_image_{k}")]
    number = re.search(r"\d+", str(raw["answer"]))  # choice_1.png
    if not number or int(number.group()) >= len(pictures):
        raise Unfit("answer not among the options", f"{raw['answer']!r:.80} of {len(pictures)}")
    row["images"] += pictures
    row["answer"] = string.ascii_uppercase[int(number.group())]
    prompt = with_options(raw["question"], [IMAGE_MARKER] * len(pictures))
    return [row | {"prompt": prompt and IMAGE_MARKER + prompt}]


def pixmo_rows(raw: dict) -> list:
    """The set gives URLs and hashes. Fetched pictures: a column `image`, or files by their hash."""
    picture = raw.get("image") or {"path": raw["image_sha256"], "sha256": raw["image_sha256"]}
    label = raw["label"] or ""
    prompt = f"How many {label.strip()} are there in the picture?" if label.strip() else None
    return [{"prompt": prompt, "answer": raw["count"], "images": [picture]}]


def chartqa_rows(raw: dict) -> list:
    label = raw["label"]
    answer = label[0] if isinstance(label, list) and label else label or None
    return [{"prompt": raw["query"], "answer": answer, "images": [raw["image"]]}]


def puzzle_rows(raw: dict) -> list:
    """AlgoPuzzleVQA once came without options in some of its files."""
    row = {"id": raw.get("id"), "images": [raw["image"]]}
    if raw.get("options"):
        return [row | chosen(raw["question"], raw["options"], raw["answer"])]
    return [row | {"prompt": raw["question"], "answer": raw["answer"]}]


def tqa_rows(raw: dict) -> list:
    """A raw row is a lesson. Its text questions need the lesson's text, so diagrams only."""
    rows = []
    for name, asked in raw["questions"]["diagramQuestions"].items():
        try:
            rows.append({"id": name} | tqa_question(asked))
        except Unfit as unfit:
            rows.append(unfit)
        except ODD as error:
            rows.append(Unfit("malformed row", f"{name}: {error!r}"))
    return rows


def tqa_question(asked: dict) -> dict:
    options, key = asked["answerChoices"], asked["correctAnswer"]["processedText"]
    texts = [options[label]["processedText"] for label in sorted(options)]  # a, b, c, ...
    place = sorted(options).index(key) if key in options else -1
    row = chosen(asked["beingAsked"]["processedText"], texts, place, is_index=True)
    return row | {"images": [asked["imagePath"]]}


def scienceqa_rows(raw: dict) -> list:
    """The hint is part of the question: a passage to read, or what the picture shows."""
    row = chosen(raw["question"], raw["choices"], raw["answer"], is_index=True)
    row["level"] = raw.get("grade")
    hint = (raw.get("hint") or "").strip()
    if hint and row["prompt"]:
        row["prompt"] = f"{hint}\n{row['prompt']}"
    return [row | {"images": [raw["image"]] if raw["image"] else []}]


def mmk12_rows(raw: dict) -> list:
    """Two blanks have two formulas side by side: $$a$$ $$b$$, for the matcher a list."""
    answer = raw["answer"]
    answer = re.sub(r"\$\$\s+\$\$", "$$, $$", answer) if isinstance(answer, str) else answer
    row = {"id": raw.get("id"), "prompt": raw["question"], "answer": answer}
    return [row | {"images": [raw["image"]], "level": raw.get("subject")}]


def atomthink_rows(raw: dict) -> list:
    """The solution names its answer at the end; a row that holds only single steps has none."""
    asked, *_, solved = (turn["value"] for turn in raw["conversations"])
    prompt = asked.split("THE GIVEN QUESTION:\n")[-1].split("HISTORICAL REASONING STEPS:")[0]
    images = raw.get("image") or []  # none: a text problem
    images = images if isinstance(images, list) else [images]
    return [{"prompt": prompt, "answer": final_answer(solved), "images": images}]


def no_rows(raw: dict) -> list:
    raise Unfit("no canonical set", "")


# ---- the table

SUBJECTS = (
    *("algebra", "counting_and_probability", "geometry", "intermediate_algebra"),
    *("number_theory", "prealgebra", "precalculus"),
)
ORZ = "Open-Reasoner-Zero/orz_math_"

# fmt: off
SOURCES = (
    # text
    Source("math", "EleutherAI/hendrycks_math", math_rows, "problem, solution, level",
           "MIT", 7_500, "both", "C", "train only: MATH500 is drawn from test", configs=SUBJECTS),
    Source("numinamath", "AI-MO/NuminaMath-1.5", numina_rows,
           "problem, answer, question_type, source", "Apache-2.0", 896_215, "both", "C",
           "level is its source; 110,998 proofs go; amc_aime may hold benchmark problems",
           also="problem_is_valid"),
    Source("tulu3_math", "allenai/tulu-3-sft-personas-math", tulu_rows, "id, prompt, messages",
           "ODC-BY 1.0", 149_960, "coldstart", "P",
           "how its solutions name the answer is from memory; unread ones are counted"),
    Source("openr1_math", "open-r1/OpenR1-Math-220k", openr1_rows,
           "uuid, problem, answer, source, generations, is_reasoning_complete, "
           "correctness_math_verify", "Apache-2.0", 93_733, "coldstart", "C",
           "R1 traces, several a row; config extended has 131,396 more rows",
           also="correctness_llama", configs=("default",)),
    Source("aime", "di-zhang-fdu/AIME_1983_2024", aime_rows,
           "ID, Year, Problem Number, Question, Answer", "MIT", 933, "both", "P",
           "2024 is held out; size and licence from memory"),
    Source("orz_57k", f"{ORZ}57k_collection", orz_rows, "0, 1", "MIT", 56_878, "both", "P",
           "Hub id unsure; place=orz_math_57k_collected.json of its repository is not"),
    Source("orz_72k", f"{ORZ}72k_collection_extended", orz_rows, "0, 1", "MIT", 72_000, "both", "P",
           "a user of it found duplicates"),
    Source("orz_13k_hard", f"{ORZ}13k_collection_hard", orz_rows, "0, 1", "MIT", 13_000, "both",
           "P", "Hub id unsure; place=orz_math_13k_collection_hard.json is not"),
    # pictures
    Source("geometry3k", "hiyouga/geometry3k", geometry3k_rows, "images, problem, answer",
           "MIT", 2_101, "rl", "C", "free answers; MathVista and MathVerse draw on Geometry3K"),
    Source("geoqa", "leonardPKU/GEOQA_R1V_Train_8K", geoqa_rows, "image, problem, solution",
           "not stated", 8_031, "rl", "P",
           "as released with R1-V, in English; MathVista and MathVerse draw on GeoQA"),
    Source("geos", "", no_rows, "", "unknown", 186, "rl", "U", "no canonical release",
           local="GEOS has no canonical release with its pictures; leave it out, or bring your "
                 "copy into the form of our rows yourself"),
    Source("iconqa", "lmms-lab/ICON-QA", iconqa_rows,
           "question_id, question, choices, answer, query_image, ques_type",
           "CC BY-NC-SA 4.0", 21_488, "rl", "P", "this copy has val and test, no train",
           also="grade, choice_image_0, choice_image_1, choice_image_2, choice_image_3, "
                "choice_image_4", split="val"),
    Source("pixmo_count", "allenai/pixmo-count", pixmo_rows, "image_sha256, count, label",
           "ODC-BY 1.0", 36_916, "rl", "C",
           "the wording of the question is ours; the counts of train come from a detector",
           also="image",
           local="the Hub has the addresses of its pictures only; fetch the image_url of each row "
                 "to DIR/images/<image_sha256> beside its parquet files, and give place=DIR"),
    Source("chartqa", "HuggingFaceM4/ChartQA", chartqa_rows, "image, query, label",
           "GPL-3.0", 28_299, "rl", "C", "matched without the benchmark's tolerance of 5 %"),
    Source("puzzlevqa", "declare-lab/PuzzleVQA", puzzle_rows, "image, question, options, answer",
           "MIT", 2_000, "rl", "C", "or place=PuzzleVQA/data of its repository", also="id"),
    Source("algopuzzlevqa", "declare-lab/AlgoPuzzleVQA", puzzle_rows, "image, question, answer",
           "Apache-2.0 or MIT", 1_800, "rl", "P",
           "Hub split unsure; place=AlgoPuzzleVQA/data of its repository is not",
           also="id, options"),
    Source("tqa", "", tqa_rows, "questions", "CC BY-NC 3.0", 6_501, "rl", "C",
           "diagram questions only; size counts them",
           local="it is not on the Hub; unpack tqa_train_val_test.zip, which the Allen Institute "
                 "for AI offers, and give place=tqa_train_val_test"),
    Source("scienceqa", "derek-thomas/ScienceQA", scienceqa_rows,
           "image, question, choices, answer", "CC BY-NC-SA 4.0", 12_726, "rl", "C",
           "half of its rows have no picture; level is the school grade", also="hint, grade"),
    Source("mmk12", "FanqingM/MMK12", mmk12_rows, "question, answer, image",
           "Apache-2.0", 15_616, "rl", "C",
           "K12 of MM-Eureka; level is the subject; test is a benchmark", also="id, subject"),
    Source("atomthink", "Kun-Xiang/AMATH-SFT", atomthink_rows, "conversations",
           "Apache-2.0", 124_000, "rl", "P",
           "SMAT, formerly AMATH; how its solutions name the answer: from its evaluation code",
           also="image",
           local="its pictures are in images.zip; download AMATH-SFT.json and images.zip to DIR, "
                 "unpack images.zip there and give place=DIR"),
)
# fmt: on


def table() -> str:
    """The sets as plain columns, each as wide as it has to be."""
    head = ("set", "for", "sure", "rows", "split", "licence", "hub", "note")
    rows = [head]
    for s in SOURCES:
        configs = [c for c in s.configs if c]
        hub = (s.hub or "-") + (f" ({len(configs)} configs)" if len(configs) > 1 else "")
        rows.append(
            (s.name, s.used_for, s.certainty, f"{s.size:,}", s.split, s.license, hub, s.note)
        )
    wide = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, wide, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


# ---- a set into a file


@dataclass(frozen=True)
class Config:
    """One set into a file of rows; without --set, the table of the sets."""

    set: str = ""  # its name in the table
    place: str = ""  # file or directory that holds it; empty: the Hub
    split: str = ""  # empty: the one that the table names
    out: str = ""  # JSONL to write; pictures go to images/ beside it
    limit: int = 0  # stop after so many good rows; 0: all

    def __post_init__(self):
        if self.set and not self.out:
            raise ValueError(f"--set {self.set} needs --out, the file to write")
        if self.limit < 0 or (not self.set and (self.out or self.place)):
            raise ValueError("--limit must not be negative, --out and --place need a --set")


def main(cfg: Config) -> None:
    if not cfg.set:
        return print(table())
    source, out = named(cfg.set), Path(cfg.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    options = {"images_to": out.parent / "images", "limit": cfg.limit or None}
    found = read(source, cfg.place or None, cfg.split or None, **options)
    into_file(progress(found, source.name, total=cfg.limit or None), cfg, source)


def into_file(found: Iterable[dict | Dropped], cfg, source) -> None:
    """Rows into cfg.out, what was dropped and the report beside it; exits if nothing can be used.

    cfg has place and out; source has name, hub and size: a Source, or a Benchmark.
    """
    out, kept, reasons = Path(cfg.out), 0, Counter()
    part = beside(out, "part")
    with part.open("w") as rows, beside(out, "dropped.jsonl").open("w") as dropped:
        for row in found:
            if isinstance(row, Dropped):
                reasons[row.reason] += 1
                dropped.write(json.dumps(row._asdict() | {"step": "read"}) + "\n")
            else:
                kept += 1
                rows.write(json.dumps(row) + "\n")
    part.replace(out)
    of = {"in": kept + reasons.total(), "kept": kept, "reasons": dict(reasons)}
    inputs, hub = ([cfg.place], "") if cfg.place else ([], source.hub)
    write_report(out, cfg, inputs, {"read": {source.name: of}}, hub=hub)
    print(f"{out}: {kept:,} of {source.size:,} rows; dropped: {dict(reasons) or 'none'}")
    if not kept:
        why = beside(out, "dropped.jsonl")
        sys.exit(f"{out}: no row of {source.name} can be used; {why} says why")


if __name__ == "__main__":
    run_main(main, Config)
