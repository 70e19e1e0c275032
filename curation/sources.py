"""The public sets that the paper names, others like them, and one reader that makes rows of them.

    the Hub, or a directory ──raw_rows──▶ rows as the set has them ──Source.rows──▶ question and
    answer ──finish──▶ {"id", "source", "prompt", "images", "answer", ...} or Dropped

    row      a dict of JSON values. <image> stands in the prompt where a picture stands; a picture
             is a file named by its hash in `images_to`, and the row holds its path relative to the
             directory around `images_to`: the JSONL file of the rows belongs there. Options are in
             "choices" and in the prompt as (A), (B), ...; "answer" is then the letter.
    Dropped  a row that cannot be used, with its reason. The caller counts them: none goes silently.

The Hub is read through `datasets`, which streams; local files here, a batch of rows in memory: JSON
line by line, for arrow wants one type a column, and PuzzleVQA's options are numbers and texts in
one list. Some sets bring responses, R1's traces; for the others they have to be distilled.

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
    size: int  # raw rows of the split; 0: unknown
    used_for: str  # "coldstart", "rl" or "both"
    certainty: str  # C, P or U: see above
    note: str
    configs: tuple[str | None, ...] = (None,)
    split: str = "train"
    local: str = ""  # why it cannot come from the Hub as it is, and where it comes from


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
    for found in raw_rows(source, place, split):
        index = found[0]
        for row in rows_of(source, split, found, images_to, seen):
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


def parts_of(source: Source, raw: dict | Unfit) -> list[dict | Unfit]:
    try:
        return [raw] if isinstance(raw, Unfit) else source.rows(raw)
    except Unfit as unfit:
        return [unfit]
    except ODD as error:
        return [Unfit("malformed row", repr(error))]


def rows_of(source: Source, split: str, found: tuple, images_to: Path, seen: set[str]):
    """One raw row: one row of ours, or several (a generation each), each of them checked."""
    index, raw, folders = found
    where = str(index) if split == source.split else f"{split}-{index}"
    for k, part in enumerate(parts := parts_of(source, raw)):
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
    pictures = [p for some in pictures for p in (some if isinstance(some, list) else [some])]
    row = {key: value for key, value in row.items() if value is not None}
    row["prompt"] = words(row.get("prompt"), "prompt", MAX_PROMPT)
    if "response" in row:
        row["response"] = words(row["response"], "response", MAX_RESPONSE)
    if "response" not in row or "answer" in row:  # a trace is of use without a gold
        row["answer"] = words(row.get("answer"), "answer", MAX_ANSWER)
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


def raw_rows(source: Source, place: Path | None, split: str) -> Iterator[tuple[int, dict, list]]:
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


def hub_rows(source: Source, config: str | None, split: str) -> Iterator[tuple[dict, list]]:
    if on_hub(source.hub):
        try:  # at once; datasets would ask for half a minute before it gives up
            HfApi().dataset_info(source.hub, timeout=10)
        except (OSError, HTTPError) as error:
            raise FileNotFoundError(
                f"{source.hub} cannot be read from the Hub: {error}. Get it where the Hub can be "
                f"reached (`hf download --repo-type dataset {source.hub} --local-dir DIR`), then "
                f"give --place DIR"
            ) from error
    # as load_dataset(..., streaming=True), but a shard of 500 MB takes 0.6 GB and not 1.2
    builder = load_dataset_builder(source.hub, config)
    if hasattr(builder.config, "fragment_scan_options"):  # parquet
        builder.config.fragment_scan_options = ParquetFragmentScanOptions(pre_buffer=False)
        builder.config.batch_size = BATCH
    rows = builder.as_streaming_dataset(split=split)
    rows = rows.decode(False) if rows.features else rows  # pictures as bytes, not pixels
    yield from ((raw, []) for raw in checked(source, f"{source.hub}, split {split}", rows))


def local_rows(
    source: Source, place: Path, config: str | None, split: str
) -> Iterator[tuple[dict | Unfit, list[Path]]]:
    for path in [place] if place.is_file() else row_files(place, config, split):
        root = path.parent if place.is_file() else place
        folders = list(dict.fromkeys([path.parent, root, root / "images"]))
        if path.suffix == ".parquet":
            # through `datasets` a file of 40 MB took 100 MB; so 20
            table = pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
            batches = table.iter_batches(batch_size=BATCH)
            rows = (row for batch in batches for row in batch.to_pylist())
        else:
            rows = json_rows(path)
        yield from ((raw, folders) for raw in checked(source, str(path), rows))


def checked(source: Source, place: str, rows: Iterable) -> Iterator[dict | Unfit]:
    """Rows of which the first has the columns that the reader needs. A list of turns becomes
    {"0": .., "1": ..}, as `datasets` names them."""
    for i, raw in enumerate(rows):
        raw = {str(k): turn for k, turn in enumerate(raw)} if isinstance(raw, list) else raw
        if not isinstance(raw, dict | Unfit):
            raw = Unfit("malformed row", f"{raw!r:.80}")
        missing = [c for c in source.needs.split(", ") if isinstance(raw, dict) and c not in raw]
        if i == 0 and missing:
            raise ValueError(
                f"set {source.name}, {place}: no column {missing}; there are {sorted(raw)}. Is it "
                f"{source.hub or source.name}, or has the set changed since its line in sources.py?"
            )
        yield raw


def json_rows(path: Path) -> Iterator[Any]:
    """JSON lines, or one list, whatever the name says. A list is held whole: AtomThink's
    214 MB take 1 GB."""
    with path.open("rb") as file:
        if file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            try:
                yield from json.loads(path.read_text(encoding="utf-8-sig"))
            except ValueError as error:
                raise ValueError(f"{path}: not valid JSON ({error}); fetch it again") from error
            return
        file.seek(0)
        for number, line in enumerate(file, start=1):
            try:
                if line.strip():
                    yield json.loads(line)
            except ValueError as error:
                yield Unfit("malformed row", f"{path}, line {number}: {error}")


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
    verdicts = [raw["correctness_math_verify"] or [], raw.get("correctness_llama") or []]
    rows = []
    for k, trace in enumerate(raw["generations"]):
        row = traced(f"{raw['uuid']}/{k}", raw["problem"], raw["answer"], trace)
        if raw["is_reasoning_complete"][k] is not True:
            row = Unfit("trace incomplete", f"generation {k} of {raw['uuid']}")
        elif not any(k < len(verdict) and verdict[k] is True for verdict in verdicts):
            row = Unfit("trace not verified", f"generation {k} of {raw['uuid']}")
        rows.append(row if isinstance(row, Unfit) else row | {"level": raw["source"]})
    return rows or [Unfit("no trace", raw["uuid"])]


def traced(name: Any, prompt: str, answer: Any, trace: Any) -> dict | Unfit:
    """A row with R1's response. Some sets leave out <think>, which R1's chat template writes."""
    if not isinstance(trace, str) or not trace.strip():
        return Unfit("no trace", f"{trace!r:.40} of {name}")
    if trace.count("</think>") != 1 or "<think>" in trace.strip()[1:]:
        return Unfit("trace without <think>", f"of {name}")
    opened = trace if trace.lstrip().startswith("<think>") else f"<think>\n{trace}"
    return {"id": name, "prompt": prompt, "answer": answer, "response": opened}


def deepmath_rows(raw: dict) -> list:
    traces = [raw[f"r1_solution_{k}"] for k in (1, 2, 3)]
    return [traced(None, raw["question"], raw["final_answer"], trace) for trace in traces]


def octomed_rows(raw: dict) -> list:
    """Several R1-0528 traces a problem, right ones and wrong ones: curate.py grades each."""
    return [traced(None, raw["question"], raw["answer"], trace) for trace in raw["responses"]]


def chat_rows(raw: dict) -> list:
    """[{"role", "content"}], or ShareGPT's [{"from", "value"}]; the last box after the thought is
    the answer. Problems of code have none: their traces are kept without a gold."""
    turns = raw.get("messages") or raw["conversations"]
    said = {t.get("role") or t["from"]: t.get("content") or t["value"] for t in turns}
    trace = said.get("assistant") or said["gpt"]
    about = [of["info"] for of in (raw, *turns) if of.get("info")]  # of AM's set
    gold = next(filter(None, (info.get("reference_answer") for info in about)), None)
    answer = gold or last_box(trace.split("</think>")[-1])
    row = traced(None, said.get("user") or said["human"], answer, trace)
    return [row if isinstance(row, Unfit) else row | {"level": raw.get("difficulty")}]


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
    options = raw["choices"]
    options = options.split(",") if isinstance(options, str) else options or []
    if raw["ques_type"] == "choose_txt":
        return [row | chosen(raw["question"], options, raw["answer"])]
    if raw["ques_type"] == "fill_in_blank":
        return [row | {"prompt": raw["question"], "answer": raw["answer"]}]
    pictures = [raw[f"choice_image_{k}"] for k in range(5) if raw.get(f"choice_image_{k}")]
    if len(pictures) != len(options):  # the copy on the Hub has columns for two pictures only
        raise Unfit("options without pictures", f"{len(pictures)} of {len(options)}")
    number = re.search(r"\d+", str(raw["answer"]))  # choice_1.png
    if not number or int(number.group()) >= len(pictures):
        raise Unfit("answer not among the options", f"{raw['answer']!r:.80} of {len(pictures)}")
    row["images"] += pictures
    row["answer"] = string.ascii_uppercase[int(number.group())]
    prompt = with_options(raw["question"], [IMAGE_MARKER] * len(pictures))
    return [row | {"prompt": prompt and IMAGE_MARKER + prompt}]


def verl_rows(raw: dict) -> list:
    """The layout of verl: turns, pictures, and the gold in reward_model."""
    kind = raw.get("reward_type") or "exact_match"
    if kind not in ("multiple_choice", "numeric", "exact_match", "list_match"):
        raise Unfit("graded otherwise", kind)  # by a model, or by where a box lies
    turns = raw["prompt"] if isinstance(raw["prompt"], list) else [raw["prompt"]]
    prompt = next(turn["content"] for turn in turns if turn.get("role", "user") == "user")
    images = raw.get("images") or raw.get("image") or []
    images = images if isinstance(images, list) else [images]
    return [{"prompt": prompt, "answer": raw["reward_model"]["ground_truth"], "images": images}]


def virl_rows(raw: dict) -> list:
    row = {"id": raw["qid"], "prompt": raw["question"], "images": raw["image"]}
    return [
        row | {"answer": last_box(raw["answer"]) or raw["answer"], "level": raw.get("category")}
    ]


def llava_rows(raw: dict) -> list:
    """LLaVA's turns: the picture's marker stands in the question, the reply is the answer."""
    asked, told = (turn["value"] for turn in raw["conversations"][:2])
    return [{"prompt": asked, "answer": final_answer(told) or told, "images": [raw["image"]]}]


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


# ---- the table

SUBJECTS = (
    *("algebra", "counting_and_probability", "geometry", "intermediate_algebra"),
    *("number_theory", "prealgebra", "precalculus"),
)
ORZ = "Open-Reasoner-Zero/orz_math_"
ZIP = (
    "its pictures are in images.zip; `hf download` the set to DIR, unpack images.zip there and "
    "give place=DIR"
)

# fmt: off
SOURCES = (
    # text: problems
    Source("math", "EleutherAI/hendrycks_math", math_rows, "problem, solution, level",
           "MIT", 7_500, "both", "C", "train only: MATH500 is drawn from test", configs=SUBJECTS),
    Source("numinamath", "AI-MO/NuminaMath-1.5", numina_rows,
           "problem, answer, question_type, source", "Apache-2.0", 896_215, "both", "C",
           "level is its source; 110,998 proofs go; amc_aime may hold benchmark problems"),
    Source("tulu3_math", "allenai/tulu-3-sft-personas-math", tulu_rows, "id, prompt, messages",
           "ODC-BY 1.0", 149_960, "coldstart", "C",
           "solutions end `The final answer is $...$` (open-instruct); column id from memory"),
    Source("aime", "di-zhang-fdu/AIME_1983_2024", aime_rows,
           "ID, Year, Problem Number, Question, Answer", "MIT", 933, "both", "C",
           "its card says not to train on it; cut at 2023, for 2024 is a benchmark"),
    Source("orz_57k", f"{ORZ}57k_collection", orz_rows, "0, 1", "MIT", 56_878, "both", "C",
           "pairs of turns; or place=orz_math_57k_collected.json of its repository"),
    Source("orz_72k", f"{ORZ}72k_collection_extended", orz_rows, "0, 1", "MIT", 72_400, "both", "C",
           "a user of it found duplicates"),
    Source("orz_13k_hard", "", orz_rows, "0, 1", "MIT", 13_000, "both", "C",
           "seven public loaders take the file of the repository",
           local="it is not on the Hub; fetch orz_math_13k_collection_hard.json from the "
                 "repository Open-Reasoner-Zero, data/, and give place=the file"),
    # text: R1's traces, in place of distilling
    Source("openr1_math", "open-r1/OpenR1-Math-220k", openr1_rows,
           "uuid, problem, answer, source, generations, is_reasoning_complete, "
           "correctness_math_verify", "Apache-2.0", 93_733, "coldstart", "C",
           "R1 traces, several a row; config extended has 131,396 more rows", configs=("default",)),
    Source("deepmath", "zwhe99/DeepMath-103K", deepmath_rows,
           "question, final_answer, r1_solution_1, r1_solution_2, r1_solution_3",
           "MIT", 103_110, "coldstart", "C", "three R1 traces a problem, without <think>"),
    Source("octomed_orz", "OctoMed/OrzMath", octomed_rows, "question, answer, responses",
           "Apache-2.0", 16_000, "coldstart", "C", "up to 5 traces of R1-0528 on orz_57k"),
    Source("mixture_of_thoughts", "open-r1/Mixture-of-Thoughts", chat_rows, "messages",
           "not stated", 349_317, "coldstart", "C",
           "R1; math 93,733, science 172,514, code 83,070", configs=("all",)),
    Source("openthoughts3", "open-thoughts/OpenThoughts3-1.2M", chat_rows, "conversations",
           "Apache-2.0", 1_200_000, "coldstart", "C", "level is its difficulty"),
    Source("am_r1_distilled", "a-m-team/AM-DeepSeek-R1-Distilled-1.4M", chat_rows, "messages",
           "not stated", 1_400_000, "coldstart", "P", ".jsonl.zst: `pip install zstandard` first"),
    # pictures: the paper's
    Source("geometry3k", "hiyouga/geometry3k", geometry3k_rows, "images, problem, answer",
           "MIT", 2_101, "rl", "C", "free answers; MathVista and MathVerse draw on Geometry3K"),
    Source("geoqa", "leonardPKU/GEOQA_R1V_Train_8K", geoqa_rows, "image, problem, solution",
           "not stated", 8_031, "rl", "C",
           "R1-V's, in English; MathVista and MathVerse draw on GeoQA; size from memory"),
    Source("geos", "lmms-lab/LLaVA-OneVision-Data", llava_rows, "image, conversations",
           "not stated", 186, "rl", "P", "or FineVision's geos(mathv360k); size of the original",
           configs=("GEOS(MathV360K)",)),
    Source("iconqa", "lmms-lab-encoder/ICON-QA", iconqa_rows,
           "question_id, question, choices, answer, query_image, ques_type",
           "CC BY-NC-SA 4.0", 21_488, "rl", "C", "moved by lmms-eval; val and test, no train; "
           "questions with more than two pictures as options go", split="val"),
    Source("pixmo_count", "allenai/pixmo-count", pixmo_rows, "image_sha256, count, label",
           "ODC-BY 1.0", 36_916, "rl", "C",
           "the wording of the question is ours; the counts of train come from a detector",
           local="the Hub has the addresses of its pictures only; fetch the image_url of each row "
                 "to DIR/images/<image_sha256> beside its parquet files, and give place=DIR"),
    Source("chartqa", "HuggingFaceM4/ChartQA", chartqa_rows, "image, query, label",
           "GPL-3.0", 28_299, "rl", "C", "matched without the benchmark's tolerance of 5 %"),
    Source("puzzlevqa", "declare-lab/PuzzleVQA", puzzle_rows, "image, question, options, answer",
           "MIT", 2_000, "rl", "C", "or place=PuzzleVQA/data of its repository"),
    Source("algopuzzlevqa", "declare-lab/AlgoPuzzleVQA", puzzle_rows, "image, question, answer",
           "Apache-2.0", 1_800, "rl", "C", "three loaders read split data; the answer is an "
           "option's text; or place=AlgoPuzzleVQA/data of its repository", split="data"),
    Source("tqa", "OpenMMReasoner/OpenMMReasoner-RL-74K", verl_rows, "prompt, images, reward_model",
           "not stated", 6_501, "rl", "P",
           "diagram questions; also OneVision's config MathV360K_TQA; size of the original",
           configs=("tqa_train",)),
    Source("scienceqa", "derek-thomas/ScienceQA", scienceqa_rows,
           "image, question, choices, answer", "CC BY-NC-SA 4.0", 12_726, "rl", "C",
           "half of its rows have no picture; level is the school grade"),
    Source("mmk12", "FanqingM/MMK12", mmk12_rows, "question, answer, image",
           "Apache-2.0", 15_616, "rl", "C",
           "K12 of MM-Eureka; level is the subject; test is a benchmark"),
    Source("atomthink", "Kun-Xiang/AMATH-SFT", atomthink_rows, "conversations",
           "Apache-2.0", 124_000, "rl", "P",
           "SMAT, formerly AMATH; how its solutions name the answer: from its evaluation code",
           local=ZIP + " (and AMATH-SFT.json)"),
    # pictures: others, ready for RL
    Source("mmr1_rl", "MMR1/MMR1-RL", geometry3k_rows, "images, problem, answer",
           "not stated", 14_996, "rl", "C", ""),
    Source("mmrl", "csfufu/mmrl", geometry3k_rows, "images, problem, answer",
           "not stated", 30_937, "rl", "C", ""),
    Source("virl39k_embedded", "Kun-Xiang/ViRL39K", geometry3k_rows, "images, problem, answer",
           "not stated", 38_870, "rl", "C", "ViRL39K with its pictures inside"),
    Source("virl39k", "TIGER-Lab/ViRL39K", virl_rows, "question, answer, image, qid",
           "MIT", 38_870, "rl", "C", "level is the category", local=ZIP),
    Source("openmmreasoner", "OpenMMReasoner/OpenMMReasoner-RL-74K", verl_rows,
           "prompt, images, reward_model", "not stated", 74_000, "rl", "C", "without tqa_train",
           configs=("virl39k", "thinklite_vl_hard", "wemath_standard", "mmk12", "wemath_pro",
                    "algopuzzle")),
    Source("mmpr_tiny", "OpenGVLab/MMPR-Tiny", verl_rows, "prompt, images, reward_model",
           "not stated", 70_000, "rl", "C", "", local=ZIP),
    Source("vero", "zlab-princeton/Vero-600k", verl_rows, "prompt, image, reward_model",
           "not stated", 600_000, "rl", "P", "a config a source; fetched whole, split by split",
           local="it has a config a source; `hf download` those that you want and give "
                 "place=one of their folders"),
    Source("clevr_cogen", "leonardPKU/clevr_cogen_a_train", geoqa_rows, "image, problem, solution",
           "not stated", 0, "rl", "C", "counting"),
    Source("multimodal_open_r1", "lmms-lab/multimodal-open-r1-8k-verified", geoqa_rows,
           "image, problem, solution", "not stated", 8_000, "rl", "C", "size by its name"),
)
# fmt: on


def table() -> str:
    """The sets as plain columns, each as wide as it has to be."""
    head = ("set", "for", "sure", "rows", "split", "licence", "hub", "note")
    rows = [head]
    for s in SOURCES:
        configs = [c for c in s.configs if c]
        hub = (s.hub or "-") + (f" ({len(configs)} configs)" if len(configs) > 1 else "")
        size = f"{s.size:,}" if s.size else "?"
        rows.append((s.name, s.used_for, s.certainty, size, s.split, s.license, hub, s.note))
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
    """Rows into cfg.out, what was dropped and the report beside it; an error if no row is left."""
    if not cfg.set:
        return print(table())
    source, out, kept, reasons = named(cfg.set), Path(cfg.out), 0, Counter()
    out.parent.mkdir(parents=True, exist_ok=True)
    options = {"images_to": out.parent / "images", "limit": cfg.limit or None}
    found = read(source, cfg.place or None, cfg.split or None, **options)
    part, why = beside(out, "part"), beside(out, "dropped.jsonl")
    with part.open("w") as rows, why.open("w") as dropped:
        for row in progress(found, source.name, total=cfg.limit or None):
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
        sys.exit(f"{out}: no row of {source.name} can be used; {why} says why")


if __name__ == "__main__":
    run_main(main, Config)
