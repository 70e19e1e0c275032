"""The paper's 25 benchmark variants as rows of one table, and the readers that make items of them.

    the Hub, or a directory ──common/sets.py and Benchmark.reader──▶ items {"id", "source",
    "prompt", "question", "images", "answer", ...}, as data.read_problems takes them, and grading:

    kind, chance    choice, yes/no or free; what a guess gets
    category, seen  parts of the set; whether the item is of a set that the paper trains on
    group           what the metric takes together, with "of" items in all (WeMath's steps,
                    MMBench's rotations, MME's pairs), where a gap would spoil it
    judge, rubric   whether officially one grades, and by what

Prompts are ours; ids, splits and columns are those that public loaders read (lmms-eval, lighteval,
official code). A local copy has them, or {id, question, options?, answer, image?, category?}.

    python eval.py --list             # the table
    python -m evaluation.benchmarks --bench mathvision pope --out out/bench    # items, no model
"""

import ast
import base64
import hashlib
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from common import sets
from common.data import IMAGE_MARKER
from common.log import run_main
from common.records import columns, write_rows
from common.sets import SPLIT, Dropped, Unfit, multiple_choice, text_of

# how to answer: the end of every prompt; ours
FREE = "Think step by step. Put the final answer in \\boxed{}."
CHOICES = "Think step by step. Put the letter of the right option in \\boxed{}."
YES_NO = "Think step by step. Put Yes or No in \\boxed{}."
KINDS = {FREE: "free", CHOICES: "choice", YES_NO: "yes/no"}  # as extract.py's

# said before it, where the set is strict about the form
DECIMALS = "Give a decimal number; digits after the point: {}."
HINTS = {"integer": "Give an integer.", "list": "Give a list, as [1, 2, 3]."}
IN_PICTURE = "Answer the question in the picture."

# sets that the paper trains on (sec. 3.3), as other sets call them
SEEN = ("geometry3k", "geoqa", "geos", "iconqa", "pixmo", "chartqa", "tqa", "scienceqa")
PICTURE = re.compile(r"<image ?(\d+)>")  # MMMU-Pro's <image 2>, MathVision's <image2>
LETTERS = re.compile(r"\(?[A-J]\)?([,\s]+\(?[A-J]\)?)*")  # a gold of one or several


@dataclass(frozen=True)
class Benchmark(sets.PublicSet):
    """How a benchmark is read, asked and scored."""

    paper: dict = field(default_factory=dict)  # score -> (base, cold start, OVR); None: not told
    note: str = ""
    metric: str = "accuracy"  # one that metrics.py has under this name
    judge: str = "no"  # officially: "no", "extraction", "yes" (rules undercount), "only" (no rules)
    group: str = ""  # the name in an item's "group" of what belongs together
    k: int = 1  # samples an item
    temperature: float = 0.0  # 0: greedy


# ---- reading


def place_of(place: str, name: str, several: bool) -> str:
    """PLACE/NAME, where it is there; of a single benchmark, PLACE itself otherwise."""
    own = Path(place, name)
    if place and several and not own.exists():
        raise FileNotFoundError(f"{own} does not exist: each of several has a place of its own")
    return str(own) if place and own.exists() else place


def write_items(
    bench: Benchmark, place: str, folder: Path, limit: int = 0
) -> tuple[list[dict], list[Dropped]]:
    """FOLDER/items.jsonl and images beside it -> items, and what cannot be asked, which is printed.
    limit: so many items, or whole groups, which may lie anywhere in the set; 0: all."""
    items, dropped, groups = [], [], defaultdict(list)
    for _, row in sets.read_set(bench, partial(read_row, bench), place, folder / "images"):
        (dropped if isinstance(row, Dropped) else items).append(row)
        if not bench.group and len(items) == limit > 0:
            break
    for item in items if bench.group else ():
        groups[item["group"][bench.group]].append(item)
    wholes = {name: of[0]["group"].get("of", len(of)) for name, of in groups.items()}
    gaps = [f"{k} ({len(of)} of {wholes[k]})" for k, of in groups.items() if len(of) != wholes[k]]
    if gaps:  # what is missing of a group would be missing in its score
        raise ValueError(
            f"benchmark {bench.name}: {len(gaps)} of {len(groups)} groups by {bench.group} have "
            f"gaps, and {bench.metric} wants them whole: {', '.join(gaps[:5])}"
        )
    if bench.group and limit:
        first = [*groups][:limit]
        items = [item for item in items if item["group"][bench.group] in first]
    for reason, count in Counter(row.reason for row in dropped).items():
        examples = [f"{r.id} {r.detail}".strip() for r in dropped if r.reason == reason][:5]
        print(f"{bench.name}: {count} rows are left out: {reason}, as {examples}")
    if not items:
        raise ValueError(f"{bench.name}: no row of {place or bench.hub} can be used")
    if bench.size not in (0, len(items)) and not limit:
        print(f"{bench.name}: {len(items):,} items, where the benchmark has {bench.size:,}")
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "items.jsonl", items)
    return items, dropped


def read_row(bench: Benchmark, raw: dict) -> list[dict]:
    """By the benchmark's own columns, or by the simple ones of a row that has those alone."""
    try:
        items = bench.reader(raw)
    except KeyError as error:
        if error.args[0] in raw or bench.group or not {"id", "question", "answer"} <= raw.keys():
            raise
        more = {"id": raw["id"], "category": raw.get("category")}
        if raw.get("options"):
            items = ask_options(raw["question"], raw["options"], raw["answer"], **more)
        else:
            items = ask(raw["question"], raw["answer"], **more)
        if raw.get("image"):
            items = of_one_picture(items, raw["image"])
    items = items if isinstance(items, list) else [items]
    return [{"judge": bench.judge != "no"} | item for item in items]


# ---- what the items have in common


def ask(question, answer, how: str = "", hint: str = "", **more) -> dict:
    """An item: the text that is asked, how it is to be answered, and the gold. how: empty: letters,
    Yes or No, or free, as the gold is. For a guess at a letter four options are assumed."""
    chance, gold = 0.0, str(answer).strip()
    if not how:
        is_yes_no = gold.lower() in ("yes", "no")
        how = CHOICES if LETTERS.fullmatch(gold) else YES_NO if is_yes_no else FREE
    if how == CHOICES:
        letters = re.findall("[A-J]", gold)
        answer, chance = ", ".join(letters), 0.25 if len(letters) == 1 else 0.0
    elif how == YES_NO:
        if gold.lower() not in ("yes", "no"):
            raise Unfit("no answer", "neither yes nor no")
        answer, chance = gold.capitalize(), 0.5
        question = re.sub(r"\s*Please answer yes or no\.?", "", question, flags=re.I)
    if "precision" in more:
        hint = DECIMALS.format(more["precision"])
    question, ending = text_of(question, "prompt"), f"{hint} {how}".strip()
    item = {"question": question, "prompt": f"{question}\n\n{ending}"}
    return item | {"answer": answer, "kind": KINDS[how], "chance": chance} | more


def ask_options(question, options: list, gold: int | str, show=True, mix="", **more) -> dict:
    """gold: the place of the right option, from 0, or its letter; never its text. show=False: the
    options stand in the question or the picture. mix: in the order of a hash of it and the option's
    place, the same on every machine, where the set has put the right one in a place of its own."""
    if mix:
        keys = [hashlib.sha256(f"{mix}/{k}".encode()).digest() for k in range(len(options))]
        order = sorted(range(len(options)), key=keys.__getitem__)
        options, gold = [options[k] for k in order], order.index(gold)
    row = multiple_choice(question, options, gold)
    item = ask(question, row["answer"], CHOICES) | row | {"chance": 1 / len(row["choices"])} | more
    return item | {"prompt": f"{row['prompt'] if show else item['question']}\n\n{CHOICES}"}


def placed(item: dict, pictures: dict) -> dict:
    """A marker where a picture is first named, the pictures in that order; those unnamed first."""
    order = list(dict.fromkeys(int(k) for k in PICTURE.findall(item["prompt"])))
    if not set(order) <= set(pictures):
        raise Unfit("no picture", "the question names more than there are")
    first = {k: IMAGE_MARKER for k in order}
    prompt = PICTURE.sub(lambda m: first.pop(int(m[1]), f"image {m[1]}"), item["prompt"])
    rest = [k for k in pictures if k not in order]
    prompt = IMAGE_MARKER * len(rest) + prompt
    return item | {"prompt": prompt, "images": [pictures[k] for k in rest + order]}


def of_one_picture(item: dict, picture) -> dict:
    """MathVision: <image1>, <image2>, ... name parts of one picture, which stands first."""
    return item | {"prompt": PICTURE.sub(r"image \1", item["prompt"]), "images": [picture]}


def about(raw: dict, name: str, category: str, *images: str) -> dict:
    """By the names of the columns: what every item says of itself."""
    return {"id": raw[name], "category": raw[category], "images": [raw[x] for x in images]}


def is_seen(origin) -> bool:
    return str(origin).lower().startswith(SEEN)


def filled(value) -> bool:
    """Not null, NaN or "nan", as a table of unequal rows fills its cells."""
    return value is not None and value == value and str(value).strip() not in ("", "nan")


# ---- language


def aime(raw: dict) -> dict:
    return ask(raw["problem"], str(int(raw["answer"])), FREE, id=raw.get("id"))  # 073 is 73


def math500(raw: dict) -> dict:
    return ask(raw["problem"], raw["answer"], FREE, **about(raw, "unique_id", "subject"))


def gpqa(raw: dict) -> dict:
    columns = ("Correct Answer", *(f"Incorrect Answer {k}" for k in (1, 2, 3)))
    more = {"id": raw["Record ID"], "category": raw.get("High-level domain")}
    options = [raw[column].strip() for column in columns]
    return ask_options(raw["Question"], options, 0, mix=str(raw["Record ID"]), **more)


def mmlu(raw: dict) -> dict:
    return ask_options(raw["question"], raw["choices"], raw["answer"], category=raw["subject"])


def mmlu_pro(raw: dict) -> dict:
    """N/A is a filler, which the official code takes out, too."""
    gold = raw["options"]["ABCDEFGHIJ".index(raw["answer"])]
    options = [option for option in raw["options"] if option != "N/A"]
    more = about(raw, "question_id", "category") | {"mix": str(raw["question_id"])}
    return ask_options(raw["question"], options, options.index(gold), **more)


# ---- visual reasoning


def mathvista(raw: dict) -> dict:
    """An option that is printed twice stands once: three items have one, and one has it as gold."""
    question, answer, kind = raw["question"], raw["answer"], raw["answer_type"]
    more = about(raw, "pid", "metadata", "decoded_image") | {"category": raw["metadata"]["task"]}
    more["seen"] = is_seen(raw["metadata"]["source"])
    if raw["choices"]:
        options = list(dict.fromkeys(raw["choices"]))
        gold = options.index(answer) if answer in options else -1
        return ask_options(question, options, gold, **more)
    question += f" (Unit: {raw['unit']})" if raw.get("unit") else ""
    more |= {"precision": int(raw["precision"])} if kind == "float" else {}
    return ask(question, answer, FREE, HINTS.get(kind, ""), **more)


def mathvision(raw: dict) -> dict:
    more = about(raw, "id", "subject")
    if raw["options"]:
        item = ask_options(raw["question"], raw["options"], raw["answer"], **more)
    else:
        item = ask(raw["question"], raw["answer"], FREE, **more)
    return of_one_picture(item, raw["decoded_image"])


def mathverse(raw: dict) -> dict:
    """The question is in the picture, and so are its options."""
    if raw["problem_version"] != "Vision Only":
        raise Unfit("not the vision-only version")
    origin = raw["metadata"]
    more = {"id": raw["sample_index"], "category": origin["subfield"], "images": [raw["image"]]}
    return ask(IN_PICTURE, raw["answer"], seen=is_seen(origin["source"]), **more)


def dynamath(raw: dict) -> dict:
    """A question has ten variants, a split each. Floats are asked for, and compared, to 0.001."""
    variant = int(re.search(r"\d+$", raw[SPLIT])[0])
    more = {"id": f"{raw['id']}/{variant}", "category": raw.get("subject")}
    more["group"] = {"question": str(raw["id"]), "variant": variant}
    how, about_it = (FREE, {"precision": 3}) if raw["answer_type"] == "float" else ("", {})
    more |= {"images": [raw["decoded_image"]]} | about_it
    return ask(raw["question"], raw["ground_truth"], how, **more)


def wemath(raw: dict) -> dict:
    """key 3steps_2 is the second step of three, 3steps_multi the problem that needs them all."""
    steps, part = re.fullmatch(r"(\d)steps_(\d|multi)", raw["key"]).groups()
    group = {"problem": str(raw["ID"]), "part": raw["key"], "of": int(steps) + 1}
    more = {"id": f"{raw['ID']}/{part}", "group": group, "images": [raw["image_path"]]}
    more["category"] = raw.get("knowledge concept")
    return ask_options(raw["question"], wemath_options(raw["option"]), raw["answer"], **more)


def wemath_options(text: str) -> list[str]:
    """`A. 3; B. 4;C. 5` -> 3, 4, 5. Only the letter that is next begins an option, because ten rows
    of the set have a stray semicolon (`get Shape ;C.; C. Shape A`), lack one, or go on with F."""
    text, labels = text.strip(), []
    for label in re.finditer(r"(?:^|[;；\s])\s*([A-F])[.．、](?!\s*[;；])", text):
        is_none = label[1] == "F" and text[label.end() :].strip() == "No correct answer"
        if is_none or label[1] == "ABCDEFG"[len(labels)]:
            labels.append(label)
    if not labels:
        raise Unfit("bad options")
    ends = [label.start() for label in labels[1:]] + [None]
    texts = (text[label.end() : end] for label, end in zip(labels, ends, strict=True))
    return [option.strip(" ;；") for option in texts]


def logicvista(raw: dict) -> dict:
    """The letters stand in question or picture; three golds are two of them, one is a number."""
    more = {"id": raw.get("id"), "category": raw["skill"][0], "images": [raw["image"]]}
    return ask(raw["question"], raw["answer"], **more)


def mmmu_pro(raw: dict) -> dict:
    """`options` is a Python list in a string; <image 2> in it or in the question is image_2."""
    pictures = {k: raw[f"image_{k}"] for k in range(1, 8) if raw.get(f"image_{k}")}
    options, more = ast.literal_eval(raw["options"]), about(raw, "id", "subject")
    return placed(ask_options(raw["question"], options, raw["answer"], **more), pictures)


def mmmu_pro_vision(raw: dict) -> dict:
    options, more = ast.literal_eval(raw["options"]), about(raw, "id", "subject", "image")
    return ask_options(IN_PICTURE, options, raw["answer"], show=False, **more)


# ---- CharXiv: the set numbers its instructions; their wording here is ours

NONE = "If there is none, the answer is Not Applicable."
LOW = "Read the lower horizontal axis, also if plots share it."
LEFT = "Read the left vertical axis, also if plots share it."
STEP = "If the labels are no numbers or the steps differ, the answer is Not Applicable."
LINES = "Grid lines, ticks and auxiliary lines do not count; without lines, it is Not Applicable."
BAR = f"Leave out a percent sign. {NONE}"
# fmt: off
REASONING = {  # reasoning_a_type: kind, instruction, the judge's rubric
    1: ("text in the chart", "The answer is text that is written in the chart, in full.",
        "Right if it is the same text, however it is spelled or abbreviated."),
    2: ("other text", "Follow the question's instructions, or else answer with a short phrase.",
        "Right if it means the same; of several things named, all have to be there and no more."),
    3: ("number in the chart", "The answer is a number that is written in the chart.",
        "Right if it is exactly the same number, in digits or words, with a unit or without."),
    4: ("other number", "",
        "Right if it is exactly the same number, to as many digits; one that is close is wrong."),
}
DESCRIPTIVE = {  # descriptive_q1..4: question, instruction
    1: ("what is the title?", f"A mere letter is no title. {NONE}"),
    2: ("what is the label of the x-axis?", f"{LOW} {NONE}"),
    3: ("what is the label of the y-axis?", f"{LEFT} {NONE}"),
    4: ("what is the leftmost labeled tick of the x-axis?", LOW),
    5: ("what is the rightmost labeled tick of the x-axis?", LOW),
    6: ("what is the lowest labeled tick of the y-axis?", LEFT),
    7: ("what is the highest labeled tick of the y-axis?", LEFT),
    8: ("by how much do neighbouring ticks of the x-axis differ?", f"{LOW} {STEP}"),
    9: ("by how much do neighbouring ticks of the y-axis differ?", f"{LEFT} {STEP}"),
    10: ("how many lines are there?", LINES),
    11: ("do any lines cross?", f"Answer Yes or No. {LINES}"),
    12: ("how many labels has the legend?", f"A legend outside the plot counts. {NONE}"),
    13: ("which labels has the legend?", f"By commas, downwards, then to the right. {NONE}"),
    14: ("by how much do the highest and the lowest tick of the colour bar differ?", BAR),
    15: ("what is the highest tick of the colour bar?", BAR),
    16: ("what is the trend from left to right?", "A few words: rises, then stays."),
    17: ("how many ticks are labeled on all axes together?", "Shared axes count."),
    18: ("how are the subplots laid out?", "As `n by m`, rows by columns; a single one is 1 by 1."),
    19: ("how many subplots are there?", "A single plot counts as 1."),
}
# fmt: on
RUBRIC = (
    "Right if the answer is the same text, however it is spelled, or exactly the same number; a "
    "list in the same order, a trend in other words. For Not Applicable it has to say as much."
)


def charxiv_reasoning(raw: dict) -> dict:
    kind, hint, rubric = REASONING[int(raw["reasoning_a_type"])]
    if not hint:
        decimals = len(str(raw["reasoning_a"]).partition(".")[2])
        hint = DECIMALS.format(decimals) if decimals else HINTS["integer"]
    more = {"category": kind, "rubric": rubric, "images": [raw["image"]]}
    return ask(raw["reasoning_q"], raw["reasoning_a"], FREE, hint, **more)


def charxiv_descriptive(raw: dict) -> list[dict]:
    """Four items a figure, of 19 questions by number; one in four has the gold Not Applicable. A
    subplot is named by words, or by row and column, where there are several."""
    plot, row = "this plot", raw["subplot_row"]
    if filled(raw["subplot_loc"]):
        plot = raw["subplot_loc"]
    elif filled(row) and int(row) > 0:
        plot = f"the subplot in row {int(row)} and column {int(raw['subplot_col'])}"
    items = []
    for k in (1, 2, 3, 4):
        number = int(raw[f"descriptive_q{k}"])
        question, hint = DESCRIPTIVE[number]
        text = f"For {'the figure' if number in (18, 19) else plot}, {question}"
        more = {"category": f"question {number}", "rubric": RUBRIC, "images": [raw["image"]]}
        items.append(ask(text, raw[f"descriptive_a{k}"], FREE, hint, **more))
    return items


# ---- perception


def mmbench(raw: dict) -> dict:
    """index % 1e6 is the question, index // 1e6 its rotation: as many as it has options."""
    rotation, question = divmod(int(raw["index"]), 1_000_000)
    options = [raw[x] for x in "ABCDE" if filled(raw.get(x))]
    text = f"{raw['hint']}\n{raw['question']}" if filled(raw.get("hint")) else raw["question"]
    group = {"question": str(question), "rotation": rotation, "of": len(options)}
    more = about(raw, "index", "category", "image") | {"seen": is_seen(raw.get("source"))}
    return ask_options(text, options, raw["answer"], group=group, **more)


def blink(raw: dict) -> dict:
    images = [f"image_{k}" for k in (1, 2, 3, 4) if raw.get(f"image_{k}")]
    more = about(raw, "idx", "sub_task", *images)
    return ask_options(raw["prompt"], raw["choices"], raw["answer"], show=False, **more)


def mmstar(raw: dict) -> dict:
    more = about(raw, "index", "category", "image")
    more["seen"] = is_seen((raw.get("meta_info") or {}).get("source"))
    return ask(raw["question"], raw["answer"], CHOICES, **more)


def hallusion(raw: dict) -> dict:
    if str(raw["visual_input"]) == "0":
        raise Unfit("a question without picture", "the paper's table is of the image split")
    of = f"{raw['category']}/{raw['subcategory']}/{raw['set_id']}"
    group = {"figure": f"{of}/{raw['figure_id']}", "question": f"{of}/{raw['question_id']}"}
    more = {"id": f"{of}/{raw['figure_id']}/{raw['question_id']}", "images": [raw["image"]]}
    more |= {"group": {"set": of} | group, "category": f"{raw['category']}/{raw['subcategory']}"}
    return ask(raw["question"], ["No", "Yes"][int(raw["gt_answer"])], YES_NO, **more)


def pope(raw: dict) -> dict:
    more = {"id": f"{raw['category']}/{raw['question_id']}", "category": raw["category"]}
    return ask(raw["question"], raw["answer"], YES_NO, images=[raw["image"]], **more)


def realworldqa(raw: dict) -> dict:
    """The set's last sentence asks for the bare answer, which would forbid to think."""
    question = re.sub(r"\s*Please answer directly[^\n]*$", "", raw["question"].strip())
    return ask(question, raw["answer"], images=[raw["image"]])


def phyx(raw: dict) -> dict:
    """The picture is base64 in a text."""
    more = about(raw, "index", "category")
    more["images"] = [{"bytes": base64.b64decode(raw["image"], validate=True)}]
    return ask(raw["question"], raw["answer"], FREE, **more)


def mme(raw: dict) -> dict:
    """Two questions an image, one with the answer Yes and one with No, under the same id."""
    group = {"image": f"{raw['category']}/{raw['question_id']}", "of": 2}
    more = {"category": raw["category"], "group": group, "images": [raw["image"]]}
    return ask(raw["question"], raw["answer"], YES_NO, **more)


def mmvet(raw: dict) -> dict:
    """The gold joins what has to be said by <AND>, and alternatives by <OR>."""
    more = about(raw, "question_id", "capability", "image")
    return ask(raw["question"], raw["answer"], FREE, **more)


# ---- the table

BLINK = tuple(
    """Art_Style Counting Forensic_Detection Functional_Correspondence IQ_Test Jigsaw
    Multi-view_Reasoning Object_Localization Relative_Depth Relative_Reflectance
    Semantic_Correspondence Spatial_Relation Visual_Correspondence Visual_Similarity""".split()
)
AVERAGED = {"k": 16, "temperature": 1.0, "metric": "avg@k"}  # inferred: 63.5 is no multiple of 1/30
VARIANTS = ", ".join(f"sample_variant{k}" for k in range(1, 11))
CIRCULAR = {"metric": "circular", "group": "question"}


def score(base: float | None, coldstart: float | None, ovr: float, of: str = "accuracy") -> dict:
    return {of: (base, coldstart, ovr)}


# fmt: off
BENCHMARKS = (  # name, hub, reader, split, items, the paper's scores, note
    # language
    Benchmark("aime2024", "HuggingFaceH4/aime_2024", aime, "train", 30, score(6.7, None, 63.5),
              **AVERAGED),
    Benchmark("aime2025", "yentinglin/aime_2025", aime, "train", 30, score(6.7, None, 52.1),
              **AVERAGED),
    Benchmark("math500", "HuggingFaceH4/MATH-500", math500, "test", 500, score(67.4, None, 95.3)),
    Benchmark("gpqa_diamond", "Idavidrein/gpqa", gpqa, "train", 198, score(31.8, None, 49.8),
              "gated; do not republish", configs=("gpqa_diamond",)),
    Benchmark("mmlu", "cais/mmlu", mmlu, "test", 14_042, score(69.6, None, 77.2), configs=("all",)),
    Benchmark("mmlu_pro", "TIGER-Lab/MMLU-Pro", mmlu_pro, "test", 12_032, score(51.7, None, 67.9),
              "the official 5 examples are not shown"),
    # visual reasoning
    Benchmark("mathvista", "AI4Math/MathVista", mathvista, "testmini", 1_000,
              score(69.2, None, 72.1), "28 % from training sets", judge="extraction"),
    Benchmark("mathvision", "MathLLMs/MathVision", mathvision, "test", 3_040,
              score(25.5, None, 51.8)),
    Benchmark("mathvision_mini", "MathLLMs/MathVision", mathvision, "testmini", 304,
              note="behaviours are measured on it; no score in the paper"),
    Benchmark("mathverse", "AI4Math/MathVerse", mathverse, "testmini", 788, score(41.1, None, 54.6),
              "46 % from training sets; a judge adds 6 points", judge="yes", configs=("testmini",)),
    Benchmark("dynamath", "DynaMath/DynaMath_Sample", dynamath, VARIANTS, 5_010,
              score(21.8, None, 33.5, "worst"), metric="worst of variants", group="question"),
    Benchmark("wemath", "We-Math/We-Math", wemath, "testmini", 1_740,
              score(31.2, None, 44.6, "strict") | score(53.1, None, 64.8, "loose"),
              "525 problems of two or three steps", "strict and loose", group="problem"),
    Benchmark("logicvista", "lscpku/LogicVista", logicvista, "test", 448, score(47.9, None, 54.8),
              "3 golds of several letters, 1 row is empty", judge="extraction"),
    Benchmark("mmmu_pro", "MMMU/MMMU_Pro", mmmu_pro, "test", 1_730, score(None, None, 50.2, "mean"),
              "OVR's is most likely the mean of both", configs=("standard (10 options)",)),
    Benchmark("mmmu_pro_vision", "MMMU/MMMU_Pro", mmmu_pro_vision, "test", 1_730,
              score(None, None, 50.2, "mean"), "see mmmu_pro", configs=("vision",)),
    Benchmark("charxiv_reasoning", "princeton-nlp/CharXiv", charxiv_reasoning, "validation", 1_000,
              score(36.4, None, 44.5), "local: --place val.parquet", judge="yes"),
    Benchmark("charxiv_descriptive", "princeton-nlp/CharXiv", charxiv_descriptive, "validation",
              4_000, score(67.3, None, 73.6), "local: --place val.parquet", judge="yes"),
    # perception
    Benchmark("mmbench_en", "lmms-lab-encoder/MMBench", mmbench, "dev", 4_329,
              score(85.3, 86.1, 86.6, "circular"), "1,164 questions", configs=("en",), **CIRCULAR),
    Benchmark("mmbench_cn", "lmms-lab-encoder/MMBench", mmbench, "dev", 4_329,
              score(84.6, 82.1, 84.2, "circular"), "1,164 questions", configs=("cn",), **CIRCULAR),
    Benchmark("blink", "BLINK-Benchmark/BLINK", blink, "val", 1_901, score(53.7, 51.5, 54.1),
              "over items; the mean of its 14 tasks differs", configs=BLINK),
    Benchmark("mmstar", "Lin-Chen/MMStar", mmstar, "val", 1_500, score(62.1, 62.4, 62.7)),
    Benchmark("hallusionbench", "lmms-lab-encoder/HallusionBench", hallusion, "image", 951,
              score(49.0, 55.0, 53.6, "mean"), "most likely the mean of aAcc, fAcc and qAcc",
              "hallusion", "yes", "figure"),
    Benchmark("pope", "lmms-lab-encoder/POPE", pope, "test", 9_000, score(86.1, 82.5, 83.2, "f1"),
              "F1 of Yes", "f1"),
    Benchmark("realworldqa", "xai-org/RealworldQA", realworldqa, "test", 765,
              score(69.3, 63.1, 65.5)),
    Benchmark("phyx", "Cloudriver/PhyX", phyx, "phyx_mini_oe", 1_000, score(37.5, 47.7, 50.0),
              "rules lose ten points or more", judge="yes", configs=("data_for_llms_eval",)),
    Benchmark("mme", "lmms-lab-encoder/MME", mme, "test", 2_374,
              score(1659.7, 1549.8, 1559.1, "perception"), metric="mme sum", group="image"),
    Benchmark("mmvet", "lmms-lab-encoder/MMVet", mmvet, "test", 218, score(63.9, 61.8, 63.6),
              "scored from 0 to 1 by a judge; no rules exist", "judge", "only"),
)
# fmt: on
named = partial(sets.named, BENCHMARKS)


def table() -> str:
    """The paper's scores are base, cold start and OVR."""
    rows = [
        ("benchmark", "items", "metric", "judge", "k", "T", "base", "cold", "ovr", "hub", "note")
    ]
    for b in BENCHMARKS:
        stages = zip(*b.paper.values(), strict=True) if b.paper else [()] * 3
        scores = [["-" if x is None else f"{x:g}" for x in stage] for stage in stages]
        scores = [" / ".join(stage) or "-" for stage in scores]
        known = (b.name, f"{b.size:,}", b.metric, b.judge, str(b.k), f"{b.temperature:g}")
        rows.append((*known, *scores, b.hub, b.note))
    return columns(rows, words=len(rows[0]))


@dataclass(frozen=True)
class Config:
    """Benchmarks into files of items, as eval.py asks them, say to keep them out of training."""

    bench: tuple[str, ...]  # names; eval.py --list has them
    out: str  # items.jsonl and images go into a folder for each below it
    place: str = ""  # local copy of the benchmark, or of each in PLACE/NAME; empty: the Hub
    limit: int = 0  # first items, or groups of them; 0: all


def main(cfg: Config) -> None:
    for bench in map(named, cfg.bench):
        place = place_of(cfg.place, bench.name, len(cfg.bench) > 1)
        write_items(bench, place, Path(cfg.out) / bench.name, cfg.limit)


if __name__ == "__main__":
    run_main(main, Config)
