r"""The paper's 25 benchmark variants as rows of one table, and the readers that make items of them.

    the Hub, or a directory ──sources.py──▶ rows as the set has them ──Benchmark.rows──▶ question,
    gold, group ──checks──▶ {"id", "source", "prompt", "question", "images", "answer", ...}

    item   what data.read_problems takes, and what grading wants: "kind" (choice, yes/no, free);
           "category"; "group", what the metric takes together, with "of" items in all where a gap
           would spoil it (WeMath's steps, MMBench's rotations, MME's pairs); "judge": officially
           one grades; "rubric" for it; "seen": it comes from a set that the paper trains on.
    chance one rule for all: the metric, where each item is right with its own "chance".

The paper gives no prompt, split, k or temperature for its tables. Prompts are ours: the question,
options as (A) ..., and one constant below that asks for a box. Options in a column whose order the
set chose (GPQA, MMLU-Pro) are shuffled by a hash of the item's id. Where the letters are drawn in
the picture or stand in the question (LogicVista, MMStar, MMMU-Pro's vision) they stay.

A local copy has the official columns, or the simple ones {id, question, options?, answer, image?,
category?}, with a letter as answer if there are options: read if the official ones are missing.

    python -m evaluation.benchmarks   # prints the table
    python -m evaluation.benchmarks --bench mathvision --out out/bench/mathvision/items.jsonl
    python -m evaluation.benchmarks --bench math500 --place DIR --out out/bench/math500/items.jsonl
"""

import ast
import base64
import hashlib
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from common.log import progress, run_main
from curation.sources import (
    IMAGE_MARKER,
    ODD,
    ROW_FILES,
    SPLITS,
    Dropped,
    Unfit,
    checked_rows,
    chosen,
    columns,
    into_file,
    json_rows,
    row_files,
)

# how to answer: the end of every prompt; ours
FREE = "Think step by step. Put the final answer in \\boxed{}."
CHOICES = "Think step by step. Put the letter of the right option in \\boxed{}."
LETTERS = (
    "Think step by step. Put the letter of the right option in \\boxed{}, or all that are right."
)
YES_NO = "Think step by step. Put Yes or No in \\boxed{}."
KINDS = {FREE: "free", CHOICES: "choice", LETTERS: "choice", YES_NO: "yes/no"}  # as extract.py's

# said before it, where the set is strict about the form
INTEGER = "Give an integer."
DECIMALS = "Give a decimal number; digits after the point: {}."
LIST = "Give a list, as [1, 2, 3]."
IN_PICTURE = "Answer the question in the picture."

SEEN = re.compile(  # sets that the paper trains on (sec. 3.3), as other sets call them
    r"(geometry3k|geoqa|geos|iconqa|pixmo|chartqa|puzzlevqa|algopuzzlevqa|tqa|scienceqa|mmk12)"
    r"(?![a-z0-9])",
    re.I,
)
SIMPLE = ("id, question, answer", "options, image, category")  # needed, read where there
SPLIT = "the split that it is from"  # a column that we add: DynaMath's variants are splits
PICTURE = re.compile(r"<image ?(\d+)>")  # MMMU-Pro's <image 2>, MathVision's <image2>


class Paper(NamedTuple):
    """What the paper's tables say; None where they say nothing."""

    base: float | None  # Qwen2.5-VL-7B
    coldstart: float | None
    ovr: float | None
    of: str = "accuracy"  # which score of the metric


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark is read, asked and scored; sources.py reads it as it reads a Source."""

    name: str
    hub: str  # id on the Hub; "" if it is not there
    rows: Callable[[dict], list]  # raw row -> items so far, or Unfit in place of one
    needs: str  # columns without which the reader stops, by commas
    also: str  # columns that are read where they are there
    split: str
    size: int  # items
    metric: str  # "accuracy", or one that metrics.py has under this name
    paper: tuple[Paper, ...]  # () if it is ours and not the paper's
    certainty: str  # C: read from a loader or the data, P: partly, U: from memory
    note: str
    prompts: tuple[str, ...] = (CHOICES,)  # the constants that end its prompts
    judge: str = "no"  # officially: "no", "extraction", "yes" (rules undercount), "only" (no rules)
    group: str = ""  # the name in an item's "group" of what belongs together
    configs: tuple[str | None, ...] = (None,)
    more_splits: tuple[str, ...] = ()
    seen: bool | None = None  # where the items themselves do not say
    k: int = 1  # samples an item
    temperature: float = 0.0  # 0: greedy
    license: str = "for evaluation only"
    local: str = ""  # why it cannot come from the Hub


# ---- reading


def read(
    benchmark: Benchmark | str,
    place: str | Path | None = None,
    *,
    images_to: Path,
    limit: int | None = None,
) -> Iterator[dict | Dropped]:
    """The items; Dropped where one cannot be used. ValueError at the end for a group with a gap.

    place: as in sources.read. limit: so many items, or whole groups where the metric has groups.
    """
    benchmark = named(benchmark) if isinstance(benchmark, str) else benchmark
    if place is None and benchmark.local:
        raise ValueError(f"benchmark {benchmark.name}: {benchmark.local}")
    if place is not None and not Path(place).exists():
        raise FileNotFoundError(f"benchmark {benchmark.name}: {place} does not exist")
    return checked_items(benchmark, place and Path(place), images_to, limit)


def named(name: str) -> Benchmark:
    for benchmark in BENCHMARKS:
        if benchmark.name == name:
            return benchmark
    there = ", ".join(b.name for b in BENCHMARKS)
    raise ValueError(f"no benchmark is called {name!r}; there are {there}")


def checked_items(
    benchmark: Benchmark, place: Path | None, images_to: Path, limit: int | None
) -> Iterator[dict | Dropped]:
    kept, ids, sizes, wanted = 0, set(), Counter(), {}
    for row in rows_of_all_splits(benchmark, place, images_to, limit):
        if not isinstance(row, Dropped) and row["id"] in ids:
            row = Dropped(row["id"], "duplicate id", "another split or file has it, too")
        if not isinstance(row, Dropped):
            if kept == limit and not benchmark.group:
                return
            kept += 1
            ids.add(row["id"])
            group = row.get("group", {})
            name = group.get(benchmark.group)
            sizes[name] += 1
            wanted[name] = group.get("of")
        yield row
    gaps = [f"{g} ({n} of {wanted[g]})" for g, n in sizes.items() if wanted[g] not in (None, n)]
    if gaps:
        raise ValueError(
            f"benchmark {benchmark.name}: {len(gaps)} of {len(sizes)} groups by {benchmark.group} "
            f"have gaps, and {benchmark.metric} wants them whole: {', '.join(gaps[:5])}. Read all "
            f"of the set; what was dropped says why"
        )


def rows_of_all_splits(
    benchmark: Benchmark, place: Path | None, images_to: Path, limit: int | None
) -> Iterator[dict | Dropped]:
    first = set()  # groups, where `limit` counts them
    for split in (benchmark.split, *benchmark.more_splits):
        for file in files_of(benchmark, place, split):
            part = as_it_lies(benchmark, file, split)
            part = replace(part, split=split, rows=completed(part, split, first, limit))
            yield from checked_rows(part, file, split, images_to, None if part.group else limit)


def completed(benchmark: Benchmark, split: str, first: set, limit: int | None) -> Callable:
    """The rows function with what all items of the benchmark share, of the first groups only."""
    shared = {"judge": benchmark.judge != "no"}
    shared |= {} if benchmark.seen is None else {"seen": benchmark.seen}

    def is_wanted(item: dict | Unfit) -> bool:
        if isinstance(item, Unfit) or not (limit and benchmark.group):
            return True
        group = item["group"][benchmark.group]
        first.update([group] if len(first) < limit else [])
        return group in first

    def rows(raw: dict) -> list:
        items = [item for item in benchmark.rows(raw | {SPLIT: split}) if is_wanted(item)]
        return [item if isinstance(item, Unfit) else shared | item for item in items]

    return rows


def files_of(benchmark: Benchmark, place: Path | None, split: str) -> list[Path | None]:
    """The files that are named after an unusual split, as PhyX_mini_OE.parquet or image-00000-of-1,
    without their neighbours. sources.py tells usual splits apart by the words in the names."""
    alone = not benchmark.more_splits
    if place is None or (alone and (place.is_file() or split in SPLITS)):
        return [place]
    found = sorted(p for folder in (place, place / "data") for p in folder.glob("*"))
    found = [p for p in found if p.suffix in ROW_FILES]
    names = {split, split.replace("_variant", "")}  # DynaMath's files are called sample1-...
    alike = [p for p in found if re.sub(r"-\d+-of-.*", "", p.stem).lower() in names]
    if not alike and not (alone and len(found) == 1):
        raise FileNotFoundError(
            f"benchmark {benchmark.name}, {place}: no file of split {split!r}, but "
            f"{[p.name for p in found]}; give the directory that holds it as {split}-*.parquet"
        )
    return alike or found


def as_it_lies(benchmark: Benchmark, place: Path | None, split: str) -> Benchmark:
    """The benchmark, or its simple reader where the official columns are missing from `place`."""
    if place is None:
        return benchmark
    folders = [c for c in benchmark.configs if c and (place / c).is_dir()] or [None]
    path = place if place.is_file() else row_files(place, folders[0], split)[0]
    there = first_columns(benchmark, path)
    simple = not there.issuperset(columns(benchmark.needs)) and there.issuperset(columns(SIMPLE[0]))
    if not simple:
        return benchmark
    if benchmark.group:
        raise ValueError(
            f"benchmark {benchmark.name}, {path}: {benchmark.metric} wants groups, so the official "
            f"columns {columns(benchmark.needs)}; there are {sorted(there)}"
        )
    needs, also = SIMPLE
    rows = partial(simple_rows, how=LETTERS) if LETTERS in benchmark.prompts else simple_rows
    return replace(benchmark, rows=rows, needs=needs, also=also, configs=(None,))


def first_columns(benchmark: Benchmark, path: Path) -> set[str]:
    if path.suffix == ".parquet":
        return set(pq.read_schema(path).names)
    first = next(json_rows(replace(benchmark, needs=""), path), None)
    return set(first) if isinstance(first, dict) else set()


# ---- what the items have in common


def ask(question: Any, answer: Any, how: str, *hints: str, **more) -> dict:
    """An item: the text that is asked, how it is to be answered, and the gold."""
    if not isinstance(question, str) or not question.strip():
        raise Unfit("no prompt", f"{question!r:.80}")
    question = question.strip()
    prompt = f"{question}\n\n{' '.join([*hints, how])}"
    item = {"question": question, "prompt": prompt, "answer": answer}
    return item | {"kind": KINDS[how], "chance": 0.0} | more


def ask_options(question: Any, options: list, gold: int | str, show=True, **more) -> dict:
    """gold: the place of the right option, from 0, or its letter; never its text. show=False: the
    options stand in the question or the picture."""
    row = chosen(question, options, place_of(gold), is_index=True)
    item = ask(row["prompt"] if show else question, row["answer"], CHOICES, choices=row["choices"])
    return item | {"question": question.strip(), "chance": 1 / len(options)} | more


def ask_lettered(question: Any, letters: Any, how: str = CHOICES, **more) -> dict:
    """Options that stand in the question or the picture; four, if the question does not tell."""
    letters = re.findall("[A-J]", str(letters or ""))
    item = ask(question, ", ".join(letters), how)
    guess = 1 / (options_in(item["question"]) or 4) if len(letters) == 1 else 0.0
    return item | {"chance": guess} | more


def ask_yes_no(question: Any, answer: str, **more) -> dict:
    if str(answer).lower() not in ("yes", "no"):
        raise Unfit("no answer", f"{answer!r:.80} is not yes or no")
    question = re.sub(r"\s*Please answer yes or no\.?", "", question, flags=re.I)
    return ask(question, str(answer).capitalize(), YES_NO, chance=0.5) | more


def place_of(gold: int | str) -> int:
    if isinstance(gold, int):
        return gold
    letter = str(gold).strip("() .")
    if len(letter) != 1 or letter not in string.ascii_uppercase:
        raise Unfit("answer not among the options", f"{gold!r:.80} is not a letter")
    return string.ascii_uppercase.index(letter)


def options_in(question: str) -> int:
    """How many of A, B, C, ... are options in the text: (A) 3, B. 4, `from A, B, and C`; or 0."""
    listed = re.search(r"\bfrom ((?:[A-J](?:,? and |, ?|))+)", question)
    labels = set(re.findall(r"(?<![A-Za-z])([A-J])[).:]", question))
    labels |= set(re.findall("[A-J]", listed.group(1) if listed else ""))
    count = next(k for k, letter in enumerate("ABCDEFGHIJK") if letter not in labels)
    return count if count > 1 else 0


def is_letters(answer: Any) -> bool:
    return re.fullmatch(r"\(?[A-J]\)?([,\s]+\(?[A-J]\)?)*", str(answer).strip()) is not None


def shuffled(name: str, options: list, gold: int) -> tuple[list, int]:
    """In the order of a hash of the item's id and the option's place: the same on every machine."""
    keys = [hashlib.sha256(f"{name}/{k}".encode()).digest() for k in range(len(options))]
    order = sorted(range(len(options)), key=keys.__getitem__)
    return [options[k] for k in order], order.index(gold)


def placed(item: dict, pictures: dict[int, Any]) -> dict:
    """A marker where a picture is first named, the pictures in that order; those unnamed first."""
    order = list(dict.fromkeys(int(k) for k in PICTURE.findall(item["prompt"])))
    if missing := [k for k in order if k not in pictures]:
        raise Unfit("no picture", f"the question names {missing}, there are {[*pictures]}")
    first = {k: IMAGE_MARKER for k in order}
    prompt = PICTURE.sub(lambda m: first.pop(int(m[1]), f"image {m[1]}"), item["prompt"])
    rest = [k for k in pictures if k not in order]
    prompt = IMAGE_MARKER * len(rest) + prompt
    return item | {"prompt": prompt, "images": [pictures[k] for k in rest + order]}


def of_one_picture(item: dict, picture: Any) -> dict:
    """MathVision: what <image1>, <image2>, ... name are all parts of one picture."""
    if len(set(PICTURE.findall(item["prompt"]))) == 1:
        return placed(item, {int(PICTURE.search(item["prompt"])[1]): picture})
    return item | {"prompt": PICTURE.sub(r"image \1", item["prompt"]), "images": [picture]}


def is_seen(origin: Any) -> bool:
    return SEEN.match(str(origin)) is not None


def filled(value: Any) -> bool:
    """Not null, NaN or "nan", as a table of unequal rows fills its cells."""
    return value is not None and value == value and str(value).strip() not in ("", "nan")


def simple_rows(raw: dict, how: str = CHOICES) -> list:
    """A local copy: {id, question, options?, answer, image?, category?}."""
    answer = raw["answer"]
    if raw.get("options"):
        item = ask_options(raw["question"], raw["options"], answer)
    elif is_letters(answer):
        item = ask_lettered(raw["question"], answer, how)
    elif str(answer).lower() in ("yes", "no"):
        item = ask_yes_no(raw["question"], answer)
    else:  # MMK12's two blanks, $$a$$ $$b$$, are a list
        answer = re.sub(r"\$\$\s+\$\$", "$$, $$", answer) if isinstance(answer, str) else answer
        item = ask(raw["question"], answer, FREE)
    item = of_one_picture(item, raw["image"]) if raw.get("image") else item
    return [item | {"id": raw["id"], "category": raw.get("category")}]


# ---- language


def aime_rows(raw: dict) -> list:
    answer = str(int(raw["answer"]))  # 073 is 73
    return [ask(raw["problem"], answer, FREE, id=raw.get("id"))]


def math500_rows(raw: dict) -> list:
    more = {"id": raw["unique_id"], "category": raw["subject"]}
    return [ask(raw["problem"], raw["answer"], FREE, **more)]


def gpqa_rows(raw: dict) -> list:
    wrong = [raw[f"Incorrect Answer {k}"].strip() for k in (1, 2, 3)]
    options, gold = shuffled(raw["Record ID"], [raw["Correct Answer"].strip(), *wrong], 0)
    more = {"id": raw["Record ID"], "category": raw.get("High-level domain")}
    return [ask_options(raw["Question"], options, gold, **more)]


def mmlu_rows(raw: dict) -> list:
    return [ask_options(raw["question"], raw["choices"], raw["answer"], category=raw["subject"])]


def mmlu_pro_rows(raw: dict) -> list:
    """N/A is a filler, which the official code takes out, too."""
    gold = raw["options"][place_of(raw["answer"])]
    options = [option for option in raw["options"] if option != "N/A"]
    options, gold = shuffled(str(raw["question_id"]), options, options.index(gold))
    more = {"id": raw["question_id"], "category": raw["category"]}
    return [ask_options(raw["question"], options, gold, **more)]


# ---- visual reasoning


def mathvista_rows(raw: dict) -> list:
    """An option that is printed twice stands once: three items have one, and one has it as gold."""
    about = raw["metadata"]
    more = {"id": raw["pid"], "category": about["task"], "seen": is_seen(about["source"])}
    more["images"] = [raw.get("decoded_image") or raw["image"]]
    if raw["choices"]:
        options = list(dict.fromkeys(raw["choices"]))
        if raw["answer"] not in options:
            raise Unfit("answer not among the options", f"{raw['answer']!r:.80} in {options}")
        return [ask_options(raw["question"], options, options.index(raw["answer"]), **more)]
    question = raw["question"] + (f" (Unit: {raw['unit']})" if raw.get("unit") else "")
    if raw["answer_type"] == "float":
        decimals = int(raw["precision"])
        more["precision"] = decimals
        return [ask(question, raw["answer"], FREE, DECIMALS.format(decimals), **more)]
    hints = {"integer": [INTEGER], "list": [LIST]}.get(raw["answer_type"], [])
    return [ask(question, raw["answer"], FREE, *hints, **more)]


def mathvision_rows(raw: dict) -> list:
    more = {"id": raw["id"], "category": raw["subject"]}
    if raw["options"]:
        item = ask_options(raw["question"], raw["options"], raw["answer"], **more)
    else:
        item = ask(raw["question"], raw["answer"], FREE, **more)
    return [of_one_picture(item, raw.get("decoded_image") or raw["image"])]


def mathverse_rows(raw: dict) -> list:
    """The question is in the picture. Four options are assumed for a guess: they are there, too."""
    if raw["problem_version"].lower().replace("_", " ") != "vision only":
        raise Unfit("not the vision-only version", raw["problem_version"])
    about = raw["metadata"]
    more = {"id": raw["sample_index"], "category": about["subfield"]}
    more |= {"seen": is_seen(about["source"]), "images": [raw["image"]]}
    if raw["question_type"] == "multi-choice" and is_letters(raw["answer"]):
        return [ask_lettered(IN_PICTURE, raw["answer"], **more)]
    return [ask(IN_PICTURE, raw["answer"], FREE, **more)]


def dynamath_rows(raw: dict) -> list:
    """A question has ten variants, a split each. Floats are asked for, and compared, to 0.001."""
    variant = int(re.search(r"\d+$", raw[SPLIT])[0])
    more = {"id": f"{raw['id']}/{variant}", "category": raw.get("subject")}
    more["group"] = {"question": str(raw["id"]), "variant": variant}
    more["images"] = [raw.get("decoded_image") or raw["image"]]
    if raw["answer_type"] == "multiple choice" and is_letters(raw["ground_truth"]):
        return [ask_lettered(raw["question"], raw["ground_truth"], **more)]
    if raw["answer_type"] == "float":
        hint = DECIMALS.format(3)
        return [ask(raw["question"], raw["ground_truth"], FREE, hint, precision=3, **more)]
    return [ask(raw["question"], raw["ground_truth"], FREE, **more)]


def wemath_rows(raw: dict) -> list:
    """key 3steps_2 is the second step of three, 3steps_multi the problem that needs them all."""
    steps, part = re.fullmatch(r"(\d)steps_(\d|multi)", raw["key"]).groups()
    group = {"problem": str(raw["ID"]), "part": raw["key"], "of": int(steps) + 1}
    more = {"id": f"{raw['ID']}/{part}", "group": group, "images": [raw["image_path"]]}
    more["category"] = raw.get("knowledge concept")
    return [ask_options(raw["question"], wemath_options(raw["option"]), raw["answer"], **more)]


def wemath_options(text: str) -> list[str]:
    """`A. 3; B. 4;C. 5` -> 3, 4, 5. Each letter is looked for behind the last, because ten rows of
    the set have a stray semicolon (`get Shape ;C.; C. Shape A`), lack one, or go on from C to F."""
    text, labels = text.strip(), []
    for letter in "ABCDEFGHIJ":
        behind, label = labels[-1].end() if labels else 0, rf"{letter}[.．、](?!\s*[;；])"
        found = re.compile(rf"(?:^|[;；]\s*){label}").search(text, behind)
        found = found or re.compile(rf"\s{label}").search(text, behind)
        if not found:
            break
        labels.append(found)
    if not labels:
        raise Unfit("bad options", text)
    ends = [label.start() for label in labels[1:]] + [len(text)]
    *options, last = [
        text[label.end() : end].strip(" ;；") for label, end in zip(labels, ends, strict=True)
    ]
    return options + re.split(r"[;；]\s*F\.\s*(?=No correct answer)", last)


def logicvista_rows(raw: dict) -> list:
    """The letters stand in question or picture, so nothing can be shuffled; three golds are two of
    them, and one is a number."""
    skill = raw["skill"]
    more = {"category": skill[0] if isinstance(skill, list) and skill else str(skill)}
    more |= {"id": raw.get("id"), "images": [raw["image"]]}
    if not is_letters(raw["answer"]):
        return [ask(raw["question"], raw["answer"], FREE, **more)]
    return [ask_lettered(raw["question"], raw["answer"], LETTERS, **more)]


def mmmu_pro_rows(raw: dict) -> list:
    """`options` is a Python list in a string; <image 2> in it or in the question is image_2."""
    pictures = {k: raw[f"image_{k}"] for k in range(1, 8) if raw.get(f"image_{k}")}
    more = {"id": raw["id"], "category": raw["subject"]}
    item = ask_options(raw["question"], literal_list(raw["options"]), raw["answer"], **more)
    return [placed(item, pictures)]


def mmmu_pro_vision_rows(raw: dict) -> list:
    more = {"id": raw["id"], "category": raw["subject"], "images": [raw["image"]]}
    options = literal_list(raw["options"])
    return [ask_options(IN_PICTURE, options, raw["answer"], show=False, **more)]


def literal_list(options: Any) -> list:
    """validation_Accounting_29 has its list in a list."""
    try:
        found = ast.literal_eval(str(options))
        return [*map(str, found[0] if isinstance(found[0], list) else found)]
    except (*ODD, SyntaxError, MemoryError, RecursionError) as error:
        raise Unfit("bad options", f"{options!r:.80}: {error}") from error


# ---- CharXiv: the set numbers its instructions; their wording here is ours

REASONING = {  # reasoning_a_type: kind, instruction, rubric
    1: ("text in the chart", "The answer is text that is written in the chart: labels and subplots "
        "by their full names, several by commas.", "the same text of the chart"),
    2: ("other text", "Follow the options or instructions in the question, if there are any; else "
        "answer with a short phrase.", "the same thing in other words, or the same option"),
    3: ("number in the chart", "The answer is a number that is written in the chart.",
        "a number of the same value"),
    4: ("other number", "", "a number of the same value"),
}  # fmt: skip
NONE = "If there is none, the answer is Not Applicable."
TICK = "Read the {} axis, also if plots share it; leave out scales and units set apart from it."
LOW, LEFT = TICK.format("lower horizontal"), TICK.format("left vertical")
LINES = "Grid lines, ticks and auxiliary lines do not count; without lines, it is Not Applicable."
STEP = "If the labels are no numbers or the steps differ, the answer is Not Applicable."
BAR = f"Leave out a percent sign. {NONE}"
TEXT, VALUE = "the same term, however it is spelled", "a number of exactly the same value"
DESCRIPTIVE = {  # descriptive_q1..4: question, instruction, rubric
    1: ("what is the title?", f"A mere letter is no title. {NONE}", TEXT),
    2: ("what is the label of the x-axis?", f"{LOW} {NONE}", TEXT),
    3: ("what is the label of the y-axis?", f"{LEFT} {NONE}", TEXT),
    4: ("what is the leftmost labeled tick of the x-axis?", LOW, TEXT),
    5: ("what is the rightmost labeled tick of the x-axis?", LOW, TEXT),
    6: ("what is the lowest labeled tick of the y-axis?", LEFT, TEXT),
    7: ("what is the highest labeled tick of the y-axis?", LEFT, TEXT),
    8: ("by how much do neighbouring ticks of the x-axis differ?", f"{LOW} {STEP}", VALUE),
    9: ("by how much do neighbouring ticks of the y-axis differ?", f"{LEFT} {STEP}", VALUE),
    10: ("how many lines are there?", LINES, VALUE),
    11: ("do any lines cross?", f"Answer Yes or No. {LINES}", "the same answer"),
    12: ("how many labels has the legend?", f"A legend outside the plot counts. {NONE}", VALUE),
    13: ("which labels has the legend?", f"List them from top to bottom, then from left to right, "
         f"by commas. A legend outside the plot counts. {NONE}", "the same terms in this order"),
    14: ("by how much do the highest and the lowest tick of the colour bar differ?", BAR, VALUE),
    15: ("what is the highest tick of the colour bar?", BAR, VALUE),
    16: ("what is the general trend from left to right?", "Answer with a few words, as: rises, "
         "then stays.", "the same trend"),
    17: ("how many ticks are labeled on all axes together?", "Shared axes count.", VALUE),
    18: ("how are the subplots laid out?", "Answer as `n by m`: rows by columns. A single plot is "
         "1 by 1.", "the same rows and columns"),
    19: ("how many subplots are there?", "A single plot counts as 1.", VALUE),
}  # fmt: skip


def rubric(same: str) -> str:
    return f"Right if the answer is {same}. For Not Applicable it has to say as much."


def charxiv_reasoning_rows(raw: dict) -> list:
    kind, hint, same = REASONING[int(raw["reasoning_a_type"])]
    if not hint:
        decimals = len(str(raw["reasoning_a"]).partition(".")[2])
        hint = DECIMALS.format(decimals) if decimals else INTEGER
    more = {"category": kind, "rubric": rubric(same), "images": [raw["image"]]}
    return [ask(raw["reasoning_q"], raw["reasoning_a"], FREE, hint, **more)]


def charxiv_descriptive_rows(raw: dict) -> list:
    """Four items a figure, of 19 questions by number; one in four has the gold Not Applicable."""
    items = []
    for k in (1, 2, 3, 4):
        number = int(raw[f"descriptive_q{k}"])
        question, hint, same = DESCRIPTIVE[number]
        text = f"{'' if number in (18, 19) else subplot(raw)}{question}"
        more = {"category": f"question {number}", "rubric": rubric(same), "images": [raw["image"]]}
        text = text[0].upper() + text[1:]
        items.append(ask(text, raw[f"descriptive_a{k}"], FREE, hint, **more))
    return items


def subplot(raw: dict) -> str:
    """Where there are several: by row and column, or by words where they form no grid."""
    if filled(raw["subplot_loc"]):
        return f"For {raw['subplot_loc']}, "
    if filled(raw["subplot_row"]) and int(raw["subplot_row"]) > 0:
        row, column = int(raw["subplot_row"]), int(raw["subplot_col"])
        return f"For the subplot in row {row} and column {column}, "
    return "For this plot, "


# ---- perception


def mmbench_rows(raw: dict) -> list:
    """index % 1e6 is the question, index // 1e6 its rotation: as many as it has options."""
    rotation, question = divmod(int(raw["index"]), 1_000_000)
    options = [raw[x] for x in "ABCDE" if filled(raw.get(x))]
    text = f"{raw['hint']}\n{raw['question']}" if filled(raw.get("hint")) else raw["question"]
    group = {"question": str(question), "rotation": rotation, "of": len(options)}
    more = {"id": raw["index"], "category": raw["category"], "images": [raw["image"]]}
    more |= {"group": group, "seen": is_seen(raw.get("source"))}
    return [ask_options(text, options, raw["answer"], **more)]


def blink_rows(raw: dict) -> list:
    """`prompt` says more than `question`, and ends with the options."""
    more = {"id": raw["idx"], "category": raw["sub_task"]}
    more["images"] = [raw[f"image_{k}"] for k in (1, 2, 3, 4) if raw.get(f"image_{k}")]
    return [ask_options(raw["prompt"], raw["choices"], raw["answer"], show=False, **more)]


def mmstar_rows(raw: dict) -> list:
    about = raw.get("meta_info") or {}
    more = {"id": raw["index"], "category": raw["category"], "images": [raw["image"]]}
    more["seen"] = is_seen(about.get("source") if isinstance(about, dict) else about)
    return [ask_lettered(raw["question"], raw["answer"], **more)]


def hallusion_rows(raw: dict) -> list:
    if str(raw["visual_input"]) == "0":
        raise Unfit("a question without picture", "the paper's table is of the image split")
    of = f"{raw['category']}/{raw['subcategory']}/{raw['set_id']}"
    group = {"figure": f"{of}/{raw['figure_id']}", "question": f"{of}/{raw['question_id']}"}
    more = {"id": f"{of}/{raw['figure_id']}/{raw['question_id']}", "images": [raw["image"]]}
    more |= {"group": group, "category": f"{raw['category']}/{raw['subcategory']}"}
    return [ask_yes_no(raw["question"], ["No", "Yes"][int(raw["gt_answer"])], **more)]


def pope_rows(raw: dict) -> list:
    more = {"id": f"{raw['category']}/{raw['question_id']}", "category": raw["category"]}
    return [ask_yes_no(raw["question"], raw["answer"], images=[raw["image"]], **more)]


def realworldqa_rows(raw: dict) -> list:
    """The set's last sentence asks for the bare answer, which would forbid to think."""
    question = re.sub(r"\s*Please answer directly[^\n]*$", "", raw["question"].strip())
    more = {"images": [raw["image"]]}
    if is_letters(raw["answer"]) and options_in(question):
        return [ask_lettered(question, raw["answer"], **more)]
    if str(raw["answer"]).lower() in ("yes", "no"):
        return [ask_yes_no(question, raw["answer"], **more)]
    return [ask(question, raw["answer"], FREE, **more)]


def phyx_rows(raw: dict) -> list:
    """The picture is base64 in a text."""
    picture = {"bytes": base64.b64decode(raw["image"], validate=True)}
    more = {"id": raw["index"], "category": raw["category"], "images": [picture]}
    return [ask(raw["question"], raw["answer"], FREE, **more)]


def mme_rows(raw: dict) -> list:
    """Two questions an image, one with the answer Yes and one with No, under the same id."""
    group = {"image": f"{raw['category']}/{raw['question_id']}", "of": 2}
    more = {"category": raw["category"], "group": group, "images": [raw["image"]]}
    return [ask_yes_no(raw["question"], raw["answer"], **more)]


def mmvet_rows(raw: dict) -> list:
    """The gold joins what has to be said by <AND>, and alternatives by <OR>."""
    more = {"id": raw["question_id"], "category": raw["capability"], "images": [raw["image"]]}
    return [ask(raw["question"], raw["answer"], FREE, **more)]


# ---- the table

BLINK = tuple(
    """Art_Style Counting Forensic_Detection Functional_Correspondence IQ_Test Jigsaw
    Multi-view_Reasoning Object_Localization Relative_Depth Relative_Reflectance
    Semantic_Correspondence Spatial_Relation Visual_Correspondence Visual_Similarity""".split()
)
AIME = {"prompts": (FREE,), "k": 16, "temperature": 1.0}
AVERAGED = "k and temperature are inferred: 63.5 is no multiple of 1/30"
ROTATED = "1,164 questions and their rotations"
IMAGES = "image_1, image_2, image_3, image_4, image_5, image_6, image_7"
CHARXIV = "image, subplot_row, subplot_col, subplot_loc, descriptive_q1, descriptive_q2, " \
    "descriptive_q3, descriptive_q4, descriptive_a1, descriptive_a2, descriptive_a3, " \
    "descriptive_a4"  # fmt: skip
MMBENCH = ("index, question, answer, A, B, category, image", "C, D, E, hint, source")
MATHVISION = ("id, question, options, answer, image, subject", "decoded_image")
BOTH = "OVR's number is most likely the mean with the other MMMU-Pro"
OURS = "ours, not the paper's"
SIMPLE_ONLY = "it is read from local copies in the simple columns only; give place=DIR"

# fmt: off
BENCHMARKS = (
    # language
    Benchmark("aime2024", "HuggingFaceH4/aime_2024", aime_rows, "problem, answer", "id", "train",
              30, "avg@k", (Paper(6.7, None, 63.5),), "P", AVERAGED, **AIME),
    Benchmark("aime2025", "yentinglin/aime_2025", aime_rows, "problem, answer", "id", "train",
              30, "avg@k", (Paper(6.7, None, 52.1),), "P", AVERAGED, **AIME),
    Benchmark("math500", "HuggingFaceH4/MATH-500", math500_rows,
              "problem, answer, subject, unique_id", "", "test", 500, "accuracy",
              (Paper(67.4, None, 95.3),), "P", "drawn from the test part of MATH", prompts=(FREE,)),
    Benchmark("gpqa_diamond", "Idavidrein/gpqa", gpqa_rows,
              "Record ID, Question, Correct Answer, Incorrect Answer 1, Incorrect Answer 2, "
              "Incorrect Answer 3", "High-level domain", "train", 198, "accuracy",
              (Paper(31.8, None, 49.8),), "C", "gated; do not republish; options shuffled",
              configs=("gpqa_diamond",)),
    Benchmark("mmlu", "cais/mmlu", mmlu_rows, "question, subject, choices, answer", "", "test",
              14_042, "accuracy", (Paper(69.6, None, 77.2),), "P", "mean over questions",
              configs=("all",)),
    Benchmark("mmlu_pro", "TIGER-Lab/MMLU-Pro", mmlu_pro_rows,
              "question_id, question, options, answer, category", "", "test", 12_032, "accuracy",
              (Paper(51.7, None, 67.9),), "C", "options shuffled; the official 5 examples are not "
              "shown"),
    # visual reasoning
    Benchmark("mathvista", "AI4Math/MathVista", mathvista_rows,
              "pid, question, image, choices, precision, answer, answer_type, metadata",
              "decoded_image, unit", "testmini", 1_000, "accuracy", (Paper(69.2, None, 72.1),), "C",
              "28 % from sets that the paper trains on", prompts=(CHOICES, FREE),
              judge="extraction"),
    Benchmark("mathvision", "MathLLMs/MathVision", mathvision_rows, *MATHVISION, "test", 3_040,
              "accuracy", (Paper(25.5, None, 51.8),), "C", "most of its options are in the picture",
              prompts=(CHOICES, FREE)),
    Benchmark("mathvision_mini", "MathLLMs/MathVision", mathvision_rows, *MATHVISION, "testmini",
              304, "accuracy", (), "C", "behaviours are measured on it; no score in the paper",
              prompts=(CHOICES, FREE)),
    Benchmark("mathverse", "AI4Math/MathVerse", mathverse_rows,
              "sample_index, problem_version, image, answer, question_type, metadata", "",
              "testmini", 788, "accuracy", (Paper(41.1, None, 54.6),), "C",
              "vision only, the other 3,152 rows are dropped; 46 % from sets that the paper trains "
              "on; 49.0 by rules and 55.1 by a judge on the same replies", prompts=(CHOICES, FREE),
              judge="yes", configs=("testmini",)),
    Benchmark("dynamath", "DynaMath/DynaMath_Sample", dynamath_rows,
              "id, question, image, ground_truth, answer_type", "decoded_image, subject",
              "sample_variant1", 5_010, "worst of variants", (Paper(21.8, None, 33.5, "worst"),),
              "C", "501 questions in ten splits; a missing variant is wrong",
              prompts=(CHOICES, FREE), group="question",
              more_splits=tuple(f"sample_variant{k}" for k in range(2, 11))),
    Benchmark("wemath", "We-Math/We-Math", wemath_rows,
              "ID, key, question, option, answer, image_path", "knowledge concept", "testmini",
              1_740, "strict and loose", (Paper(31.2, None, 44.6, "strict"),
              Paper(53.1, None, 64.8, "loose")), "C", "525 problems of two or three steps",
              group="problem"),
    Benchmark("logicvista", "lscpku/LogicVista", logicvista_rows,
              "id, question, answer, image, skill", "", "test", 448, "accuracy",
              (Paper(47.9, None, 54.8),), "C", "the letters stand in question or picture: not "
              "shuffled; 3 golds of several letters, 1 row is empty", prompts=(LETTERS, FREE),
              judge="extraction"),
    Benchmark("mmmu_pro", "MMMU/MMMU_Pro", mmmu_pro_rows, "id, question, options, answer, subject",
              IMAGES, "test", 1_730, "accuracy", (Paper(None, None, 50.2, "mean"),), "C",
              BOTH, configs=("standard (10 options)",)),
    Benchmark("mmmu_pro_vision", "MMMU/MMMU_Pro", mmmu_pro_vision_rows,
              "id, image, options, answer, subject", "", "test", 1_730, "accuracy",
              (Paper(None, None, 50.2, "mean"),), "C", BOTH, configs=("vision",)),
    Benchmark("charxiv_reasoning", "princeton-nlp/CharXiv", charxiv_reasoning_rows,
              "image, reasoning_q, reasoning_a, reasoning_a_type", "", "validation", 1_000,
              "accuracy", (Paper(36.4, None, 44.5),), "C", "wording of its four instructions is "
              "ours; a local copy is place=val.parquet", prompts=(FREE,), judge="yes"),
    Benchmark("charxiv_descriptive", "princeton-nlp/CharXiv", charxiv_descriptive_rows, CHARXIV, "",
              "validation", 4_000, "accuracy", (Paper(67.3, None, 73.6),), "P",
              "wording of its 19 questions is ours; a quarter is Not Applicable; a local copy is "
              "place=val.parquet", prompts=(FREE,), judge="yes"),
    # perception
    Benchmark("mmbench_en", "lmms-lab-encoder/MMBench", mmbench_rows, *MMBENCH, "dev", 4_329,
              "circular", (Paper(85.3, 86.1, 86.6, "circular"),), "P", ROTATED,
              group="question", configs=("en",)),
    Benchmark("mmbench_cn", "lmms-lab-encoder/MMBench", mmbench_rows, *MMBENCH, "dev", 4_329,
              "circular", (Paper(84.6, 82.1, 84.2, "circular"),), "P", ROTATED,
              group="question", configs=("cn",)),
    Benchmark("blink", "BLINK-Benchmark/BLINK", blink_rows,
              "idx, sub_task, prompt, choices, answer, image_1", "image_2, image_3, image_4", "val",
              1_901, "accuracy", (Paper(53.7, 51.5, 54.1),), "C",
              "over items; the mean of its 14 tasks differs", configs=BLINK),
    Benchmark("mmstar", "Lin-Chen/MMStar", mmstar_rows, "index, question, image, answer, category",
              "meta_info", "val", 1_500, "accuracy", (Paper(62.1, 62.4, 62.7),), "C",
              "options stand in the question"),
    Benchmark("hallusionbench", "lmms-lab-encoder/HallusionBench", hallusion_rows,
              "category, subcategory, visual_input, set_id, figure_id, question_id, question, "
              "gt_answer, image", "", "image", 951, "hallusion",
              (Paper(49.0, 55.0, 53.6, "mean"),), "C", "the paper's number is most likely the mean "
              "of aAcc, fAcc and qAcc", prompts=(YES_NO,), judge="yes", group="figure"),
    Benchmark("pope", "lmms-lab-encoder/POPE", pope_rows,
              "question_id, question, answer, image, category", "", "test", 9_000, "f1",
              (Paper(86.1, 82.5, 83.2, "f1"),), "C", "F1 of Yes over its three categories",
              prompts=(YES_NO,)),
    Benchmark("realworldqa", "xai-org/RealworldQA", realworldqa_rows, "image, question, answer", "",
              "test", 765, "accuracy", (Paper(69.3, 63.1, 65.5),), "C",
              "its request for a bare answer is taken out", prompts=(CHOICES, YES_NO, FREE)),
    Benchmark("phyx", "Cloudriver/PhyX", phyx_rows, "index, question, image, answer, category", "",
              "phyx_mini_oe", 1_000, "accuracy", (Paper(37.5, 47.7, 50.0),), "P",
              "free answers of the small part; rules lose ten points or more", prompts=(FREE,),
              judge="yes", configs=("data_for_llms_eval",)),
    Benchmark("mme", "lmms-lab-encoder/MME", mme_rows,
              "question_id, image, question, answer, category", "", "test", 2_374, "mme sum",
              (Paper(1659.7, 1549.8, 1559.1, "perception"),), "C", "perception has ten of its "
              "fourteen categories, 2,000 points", prompts=(YES_NO,), group="image"),
    Benchmark("mmvet", "lmms-lab-encoder/MMVet", mmvet_rows,
              "question_id, question, answer, image, capability", "", "test", 218, "judge",
              (Paper(63.9, 61.8, 63.6),), "C", "scored from 0 to 1 by a judge; no rules exist",
              prompts=(FREE,), judge="only"),
    # others that lie beside the paper's
    Benchmark("puzzlevqa", "", simple_rows, *SIMPLE, "test", 2_000, "accuracy", (), "C",
              f"{OURS}: one of its training sets", seen=True, local=SIMPLE_ONLY),
    Benchmark("algopuzzlevqa", "", simple_rows, *SIMPLE, "test", 1_800, "accuracy", (), "C",
              f"{OURS}: one of its training sets", seen=True, local=SIMPLE_ONLY),
    Benchmark("mmk12", "", simple_rows, *SIMPLE, "test", 2_000, "accuracy", (), "P",
              f"{OURS}: the test part of a training set", (FREE, CHOICES), seen=True,
              local=SIMPLE_ONLY),
    Benchmark("bbh", "", simple_rows, *SIMPLE, "test", 6_511, "accuracy", (), "P",
              f"{OURS}: reasoning in text", (CHOICES, YES_NO, FREE), local=SIMPLE_ONLY),
)
# fmt: on


def table() -> str:
    """The benchmarks as plain columns; the paper's scores are base, cold start and OVR."""
    head = ("benchmark", "sure", "items", "metric", "judge", "k", "T", "base", "cold", "ovr")
    rows = [(*head, "split", "hub", "note")]
    for b in BENCHMARKS:
        scores = [
            " / ".join("-" if score is None else f"{score:g}" for score in column) or "-"
            for column in list(zip(*b.paper, strict=True))[:3] or [(), (), ()]
        ]
        known = (b.name, b.certainty, f"{b.size:,}", b.metric, b.judge)
        asked = (str(b.k), f"{b.temperature:g}")
        rows.append((*known, *asked, *scores, b.split, b.hub or "-", b.note))
    wide = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, wide, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


# ---- a benchmark into a file


@dataclass(frozen=True)
class Config:
    """One benchmark into a file of items; without --bench, the table."""

    bench: str = ""  # its name in the table
    place: str = ""  # file or directory that holds it; empty: the Hub
    out: str = ""  # JSONL to write; pictures go to images/ beside it
    limit: int = 0  # stop after so many items, or groups of them; 0: all

    def __post_init__(self):
        if self.bench and not self.out:
            raise ValueError(f"--bench {self.bench} needs --out, the file to write")
        if self.limit < 0 or (not self.bench and (self.out or self.place)):
            raise ValueError("--limit must not be negative, --out and --place need a --bench")


def main(cfg: Config) -> None:
    if not cfg.bench:
        return print(table())
    benchmark, out = named(cfg.bench), Path(cfg.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    limit = cfg.limit or None
    found = read(benchmark, cfg.place or None, images_to=out.parent / "images", limit=limit)
    into_file(progress(found, benchmark.name, total=limit or benchmark.size), cfg, benchmark)


if __name__ == "__main__":
    run_main(main, Config)
