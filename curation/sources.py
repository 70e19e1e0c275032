"""The public sets that the paper names, others like them, and one reader that makes rows of them.

    the Hub, or a directory ──common/sets.py and Source.reader──▶ {"id", "source", "prompt",
    "images", "answer", "response"?, "choices"?, "level"?, "origin"} or Dropped, with its reason

Some sets bring a "response", R1's trace; for others it has to be distilled. The paper lists names,
no Hub ids, splits or sizes (sec. 3.3); these are ours, from data set cards and loaders; what could
not be read there is marked "unsure".

    python -m curation.sources   # prints the table
    python -m curation.sources --set geometry3k --out out/raw/geometry3k.jsonl   # from the Hub
    python -m curation.sources --set puzzlevqa --place downloads/PuzzleVQA/data \
        --out out/raw/puzzlevqa.jsonl
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common import sets
from common.data import IMAGE_MARKER
from common.log import beside, run_main, write_report
from common.records import columns
from common.sets import Dropped, Unfit, multiple_choice, text_of
from reward import extract


@dataclass(frozen=True)
class Source(sets.PublicSet):
    """A public set of training data."""

    used_for: str = "rl"  # or "coldstart", or "both"
    license: str = "not stated"
    note: str = ""
    local: str = ""  # why it cannot come from the Hub as it is, and where it comes from


def read(source: Source, place: str, images_to: Path) -> Iterator[dict | Dropped]:
    """The rows of a set; Dropped where one cannot be used. place: "" for the Hub; or a file, or a
    directory with the files as the Hub has them: parquet, JSON or JSONL whose names carry the split
    (or none), pictures embedded or as files."""
    if source.local and not place:
        raise ValueError(f"set {source.name}: {source.local}")
    origin = {"set": source.hub or source.name, "split": source.split, "index": 0}
    origin["license"] = source.license
    for index, row in sets.read_set(source, source.reader, place, images_to):
        yield row if isinstance(row, Dropped) else row | {"origin": origin | {"index": index}}


# ---- answers, options and traces


def last_box(text: str) -> str | None:
    status, box = extract(text)
    return None if status else box


FINAL = re.compile(r"\banswer is:?\s*(.+?)\.?(?:\s*I hope it is correct\.?)?\s*$", re.I | re.M)


def final_answer(text: str) -> str | None:
    """The last box, else what the last "answer is" of a worked solution says."""
    sentences = FINAL.findall(text)
    return last_box(text) or (sentences[-1].strip(" $*") if sentences else None)


def chosen(question: str, options: list, answer) -> dict:
    """The answer is an option's text, else its letter: PuzzleVQA's 3 is a text, and no place."""
    texts, text = [str(option).strip() for option in options], text_of(answer, "answer")
    if texts.count(text) > 1:
        raise Unfit("bad options", f"{text!r:.80} twice in {texts!r:.200}")
    return multiple_choice(question, texts, texts.index(text) if text in texts else text)


def traced(prompt: str, answer, trace, **more) -> dict | Unfit:
    """A row with R1's response. Some sets leave out <think>, which R1's chat template writes."""
    if not isinstance(trace, str) or not trace.strip():
        return Unfit("no trace", f"{trace!r:.40} to {prompt!r:.40}")
    if trace.count("</think>") != 1 or "<think>" in trace.strip()[1:]:
        return Unfit("trace without <think>", f"{trace!r:.40}")
    opened = trace if trace.lstrip().startswith("<think>") else f"<think>\n{trace}"
    return {"prompt": prompt, "answer": answer, "response": opened} | more


# ---- text sets


def math_rows(raw: dict) -> dict:
    answer = last_box(raw["solution"] or "")
    return {"prompt": raw["problem"], "answer": answer, "level": raw["level"]}


def numina_rows(raw: dict) -> dict:
    """Proofs and problems without a number or formula as answer cannot be judged (sec. 3.3)."""
    if raw["question_type"] == "proof" or raw["answer"] in ("proof", "notfound"):
        raise Unfit("no answer", f"{raw['question_type']}, answer {raw['answer']!r:.40}")
    if raw.get("problem_is_valid") in ("No", "Incomplete", "Invalid"):
        raise Unfit("flagged by the set", f"problem_is_valid is {raw['problem_is_valid']}")
    return {"prompt": raw["problem"], "answer": raw["answer"], "level": raw["source"]}


def openr1_rows(raw: dict) -> list:
    """One row for each R1 trace that is complete and that either verifier of the set accepts."""
    verdicts = [raw["correctness_math_verify"] or [], raw.get("correctness_llama") or []]
    rows = []
    for k, trace in enumerate(raw["generations"]):
        name = f"{raw['uuid']}/{k}"
        row = traced(raw["problem"], raw["answer"], trace, id=name, level=raw["source"])
        if raw["is_reasoning_complete"][k] is not True:
            row = Unfit("trace incomplete", name)
        elif not any(verdict[k : k + 1] == [True] for verdict in verdicts):
            row = Unfit("trace not verified", name)
        rows.append(row)
    return rows or [Unfit("no trace", raw["uuid"])]


def deepmath_rows(raw: dict) -> list:
    traces = [raw[f"r1_solution_{k}"] for k in (1, 2, 3)]
    return [traced(raw["question"], raw["final_answer"], trace) for trace in traces]


def octomed_rows(raw: dict) -> list:
    """Right traces and wrong ones, which curate.py grades."""
    return [traced(raw["question"], raw["answer"], trace) for trace in raw["responses"]]


def chat_rows(raw: dict) -> dict | Unfit:
    """[{"role", "content"}], or ShareGPT's [{"from", "value"}]; the last box after the thought is
    the answer. Problems of code have none: their traces are kept without a gold."""
    turns = raw["messages"] if "messages" in raw else raw["conversations"]
    texts = {t.get("role") or t["from"]: t.get("content") or t["value"] for t in turns}
    prompt, trace = (texts.get(a) or texts[b] for a, b in (("user", "human"), ("assistant", "gpt")))
    about = [of["info"] for of in (raw, *turns) if of.get("info")]  # of AM's set
    gold = next(filter(None, (info.get("reference_answer") for info in about)), None)
    answer = gold or last_box(trace.split("</think>")[-1])
    return traced(prompt, answer, trace, level=raw.get("difficulty"))


def tulu_rows(raw: dict) -> dict:
    """The solution is GPT-4o's: it gives the answer to check traces by, and is no R1 trace."""
    answer = final_answer(raw["messages"][-1]["content"])
    return {"id": raw["id"], "prompt": raw["prompt"], "answer": answer}


def aime_rows(raw: dict) -> dict:
    if int(raw["Year"]) > 2023:
        raise Unfit("held out", f"AIME {raw['Year']} is a benchmark")
    row = {"id": raw["ID"], "prompt": raw["Question"], "answer": raw["Answer"]}
    return row | {"level": raw["Problem Number"]}


def orz_rows(raw: dict) -> dict:
    truth = raw["1"]["ground_truth"]
    return {"prompt": raw["0"]["value"], "answer": truth["value"], "level": truth.get("pass_at_n")}


# ---- sets with pictures


def geometry3k_rows(raw: dict) -> dict:
    return {"prompt": raw["problem"], "answer": raw["answer"], "images": raw["images"]}


def geoqa_rows(raw: dict) -> dict:
    answer = re.search(r"<answer>(.*?)</answer>", raw["solution"], re.S)
    return {"prompt": raw["problem"], "answer": answer and answer[1], "images": raw["image"]}


def iconqa_rows(raw: dict) -> dict:
    """Options are texts, joined by commas, or pictures, which stand in the prompt; or none."""
    row = {"id": raw["question_id"], "images": [raw["query_image"]], "level": raw.get("grade")}
    options = (raw["choices"] or "").split(",")
    if raw["ques_type"] == "choose_txt":
        return row | chosen(raw["question"], options, raw["answer"])
    if raw["ques_type"] == "fill_in_blank":
        return row | {"prompt": raw["question"], "answer": raw["answer"]}
    pictures = [raw[f"choice_image_{k}"] for k in range(5) if raw.get(f"choice_image_{k}")]
    if len(pictures) != len(options):  # the copy on the Hub has columns for two pictures only
        raise Unfit("options without pictures", f"{len(options)} options, {len(pictures)} pictures")
    place = int(re.fullmatch(r"choice_(\d+)\.png", raw["answer"])[1])
    question = multiple_choice(raw["question"], [IMAGE_MARKER] * len(pictures), place)
    row |= {"prompt": IMAGE_MARKER + question["prompt"], "answer": question["answer"]}
    return row | {"images": row["images"] + pictures}


def verl_rows(raw: dict) -> dict:
    """The layout of verl: turns, pictures (or none: a text problem), the gold in reward_model."""
    kind = raw.get("reward_type") or "exact_match"
    if kind not in ("multiple_choice", "numeric", "exact_match", "list_match"):
        raise Unfit("graded otherwise", kind)  # by a model, or by where a box lies
    turns = raw["prompt"] if isinstance(raw["prompt"], list) else [raw["prompt"]]
    prompt = next(turn["content"] for turn in turns if turn["role"] == "user")
    images = raw["images"] if "images" in raw else raw["image"]
    gold = raw["reward_model"]["ground_truth"]
    return {"prompt": prompt, "answer": gold, "images": images or []}


def virl_rows(raw: dict) -> dict:
    row = {"id": raw["qid"], "prompt": raw["question"], "images": raw["image"]}
    return row | {"answer": last_box(raw["answer"]) or raw["answer"], "level": raw.get("category")}


def llava_rows(raw: dict) -> dict:
    """LLaVA's turns: the picture's marker stands in the question, the reply is the answer."""
    question, reply = (turn["value"] for turn in raw["conversations"][:2])
    return {"prompt": question, "answer": final_answer(reply) or reply, "images": raw["image"]}


def pixmo_rows(raw: dict) -> dict:
    """The set gives URLs and hashes. Fetched pictures: a column `image`, or files by their hash."""
    picture = raw.get("image") or {"path": raw["image_sha256"], "sha256": raw["image_sha256"]}
    prompt = f"How many {text_of(raw['label'], 'prompt')} are there in the picture?"
    return {"prompt": prompt, "answer": raw["count"], "images": picture}


def chartqa_rows(raw: dict) -> dict:
    answer = raw["label"][0] if isinstance(raw["label"], list) else raw["label"]
    return {"prompt": raw["query"], "answer": answer, "images": raw["image"]}


def puzzle_rows(raw: dict) -> dict:
    row = {"id": raw.get("id"), "images": raw["image"]}
    return row | chosen(raw["question"], raw["options"], raw["answer"])


def scienceqa_rows(raw: dict) -> dict:
    """The hint is part of the question: a passage to read, or what the picture shows. The answer
    is the place of an option, from 0."""
    row = multiple_choice(raw["question"], raw["choices"], raw["answer"])
    row["prompt"] = f"{raw.get('hint') or ''}\n{row['prompt']}".strip()
    return row | {"images": raw["image"] or [], "level": raw.get("grade")}


def mmk12_rows(raw: dict) -> dict:
    """Two blanks are two formulas side by side, $$a$$ $$b$$: for the matcher a list."""
    row = {"id": raw.get("id"), "prompt": raw["question"], "answer": raw["answer"]}
    if isinstance(row["answer"], str):
        row["answer"] = re.sub(r"\$\$\s+\$\$", "$$, $$", row["answer"])
    return row | {"images": raw["image"], "level": raw.get("subject")}


def atomthink_rows(raw: dict) -> dict:
    """The solution names its answer at the end; a row that holds only single steps has none."""
    question, *_, solution = (turn["value"] for turn in raw["conversations"])
    prompt = question.split("THE GIVEN QUESTION:\n")[-1].split("HISTORICAL REASONING STEPS:")[0]
    return {"prompt": prompt, "answer": final_answer(solution), "images": raw.get("image") or []}


# ---- the table

SUBJECTS = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra")
SUBJECTS += ("number_theory", "prealgebra", "precalculus")
OPENMMREASONER = ("virl39k", "thinklite_vl_hard", "wemath_standard", "mmk12", "wemath_pro")
OPENMMREASONER += ("algopuzzle",)
ORZ = "Open-Reasoner-Zero/orz_math_"
ZIP = "its pictures are in images.zip: `hf download` to DIR, unpack there, and give --place DIR"

# fmt: off
SOURCES = (
    # text: problems
    Source("math", "EleutherAI/hendrycks_math", math_rows, "train", 7_500, "both", "MIT",
           "train only: MATH500 is drawn from test", configs=SUBJECTS),
    Source("numinamath", "AI-MO/NuminaMath-1.5", numina_rows, "train", 896_215, "both",
           "Apache-2.0", "level is its source; amc_aime may hold benchmark problems"),
    Source("tulu3_math", "allenai/tulu-3-sft-personas-math", tulu_rows, "train", 149_960,
           "coldstart", "ODC-BY 1.0", "unsure: column id"),
    Source("aime", "di-zhang-fdu/AIME_1983_2024", aime_rows, "train", 933, "both", "MIT",
           "cut at 2023, for 2024 is a benchmark"),
    Source("orz_57k", f"{ORZ}57k_collection", orz_rows, "train", 56_878, "both", "MIT"),
    Source("orz_72k", f"{ORZ}72k_collection_extended", orz_rows, "train", 72_400, "both", "MIT",
           "a user of it found duplicates"),
    Source("orz_13k_hard", "", orz_rows, "train", 13_000, "both", "MIT",
           local="not on the Hub; fetch orz_math_13k_collection_hard.json from data/ of the "
           "repository Open-Reasoner-Zero, and give --place FILE"),
    # text: R1's traces, in place of distilling
    Source("openr1_math", "open-r1/OpenR1-Math-220k", openr1_rows, "train", 93_733, "coldstart",
           "Apache-2.0", "R1, several a row", configs=("default",)),
    Source("deepmath", "zwhe99/DeepMath-103K", deepmath_rows, "train", 103_110, "coldstart", "MIT",
           "R1, three a row"),
    Source("octomed_orz", "OctoMed/OrzMath", octomed_rows, "train", 16_000, "coldstart",
           "Apache-2.0", "R1-0528, up to five a row, on orz_57k"),
    Source("mixture_of_thoughts", "open-r1/Mixture-of-Thoughts", chat_rows, "train", 349_317,
           "coldstart", "not stated", "R1; half science, a quarter code", configs=("all",)),
    Source("openthoughts3", "open-thoughts/OpenThoughts3-1.2M", chat_rows, "train", 1_200_000,
           "coldstart", "Apache-2.0", "level is its difficulty"),
    Source("am_r1_distilled", "a-m-team/AM-DeepSeek-R1-Distilled-1.4M", chat_rows, "train",
           1_400_000, "coldstart", "not stated", "unsure; .jsonl.zst: `pip install zstandard`"),
    # pictures: the paper's
    Source("geometry3k", "hiyouga/geometry3k", geometry3k_rows, "train", 2_101, "rl", "MIT",
           "MathVista and MathVerse draw on it"),
    Source("geoqa", "leonardPKU/GEOQA_R1V_Train_8K", geoqa_rows, "train", 8_031, "rl",
           "not stated", "MathVista and MathVerse draw on it"),
    Source("geos", "lmms-lab/LLaVA-OneVision-Data", llava_rows, "train", 186, note="unsure",
           configs=("GEOS(MathV360K)",)),
    Source("iconqa", "lmms-lab-encoder/ICON-QA", iconqa_rows, "val", 21_488, "rl",
           "CC BY-NC-SA 4.0", "val, for it has no train; more than two pictured options go"),
    Source("pixmo_count", "allenai/pixmo-count", pixmo_rows, "train", 36_916, "rl", "ODC-BY 1.0",
           "the wording is ours; counts come from a detector",
           local="the Hub has the addresses of its pictures only; fetch the image_url of each "
           "row to DIR/images/<image_sha256> beside its parquet files, and give --place DIR"),
    Source("chartqa", "HuggingFaceM4/ChartQA", chartqa_rows, "train", 28_299, "rl", "GPL-3.0",
           "matched without the benchmark's tolerance of 5 %"),
    Source("puzzlevqa", "declare-lab/PuzzleVQA", puzzle_rows, "train", 2_000, "rl", "MIT",
           "or --place PuzzleVQA/data of its repository"),
    Source("algopuzzlevqa", "declare-lab/AlgoPuzzleVQA", puzzle_rows, "data", 1_800, "rl",
           "Apache-2.0", "or --place AlgoPuzzleVQA/data of its repository"),
    Source("tqa", "OpenMMReasoner/OpenMMReasoner-RL-74K", verl_rows, "train", 6_501, "rl",
           "not stated", "unsure: its size", configs=("tqa_train",)),
    Source("scienceqa", "derek-thomas/ScienceQA", scienceqa_rows, "train", 12_726, "rl",
           "CC BY-NC-SA 4.0", "half of its rows have no picture; level is the school grade"),
    Source("mmk12", "FanqingM/MMK12", mmk12_rows, "train", 15_616, "rl", "Apache-2.0",
           "K12 of MM-Eureka; level is the subject; test is a benchmark"),
    Source("atomthink", "Kun-Xiang/AMATH-SFT", atomthink_rows, "train", 124_000, "rl",
           "Apache-2.0", "unsure: how its solutions name the answer", ZIP),
    # pictures: others, ready for RL
    Source("mmr1_rl", "MMR1/MMR1-RL", geometry3k_rows, "train", 14_996),
    Source("mmrl", "csfufu/mmrl", geometry3k_rows, "train", 30_937),
    Source("virl39k_embedded", "Kun-Xiang/ViRL39K", geometry3k_rows, "train", 38_870),
    Source("virl39k", "TIGER-Lab/ViRL39K", virl_rows, "train", 38_870, "rl", "MIT", local=ZIP),
    Source("openmmreasoner", "OpenMMReasoner/OpenMMReasoner-RL-74K", verl_rows, "train", 74_000,
           note="without tqa_train", configs=OPENMMREASONER),
    Source("mmpr_tiny", "OpenGVLab/MMPR-Tiny", verl_rows, "train", 70_000, local=ZIP),
    Source("vero", "zlab-princeton/Vero-600k", verl_rows, "train", 600_000, note="unsure",
           local="a config a source: `hf download` those that you want, and --place one of them"),
    Source("clevr_cogen", "leonardPKU/clevr_cogen_a_train", geoqa_rows, "train", 0),  # counting
    Source("multimodal_open_r1", "lmms-lab/multimodal-open-r1-8k-verified", geoqa_rows, "train",
           8_000),
)
# fmt: on


# ---- a set into a file


@dataclass(frozen=True)
class Config:
    """One set into a file of rows; without --set, the table of the sets."""

    set: str = ""  # its name in the table
    place: str = ""  # file or directory that holds it; empty: the Hub
    out: str = ""  # JSONL to write; pictures go to images/ beside it
    limit: int = 0  # stop after so many good rows; 0: all

    def __post_init__(self):
        if bool(self.set) != bool(self.out) or (self.place and not self.set):
            raise ValueError("give --set and --out together: the set, and the file to write")


def main(cfg: Config) -> None:
    """Rows into cfg.out, what was dropped and the report beside it; an error if no row is left."""
    if not cfg.set:
        table = [("set", "for", "rows", "split", "licence", "hub", "note")]
        for s in SOURCES:
            size = f"{s.size:,}" if s.size else "?"
            table.append((s.name, s.used_for, size, s.split, s.license, s.hub or "-", s.note))
        return print(columns(table, words=len(table[0])))
    source, out = sets.named(SOURCES, cfg.set), Path(cfg.out)
    good, reasons = 0, Counter()
    out.parent.mkdir(parents=True, exist_ok=True)
    part, why = beside(out, "part"), beside(out, "dropped.jsonl")
    with part.open("w") as rows, why.open("w") as dropped:
        for row in read(source, cfg.place, out.parent / "images"):
            if isinstance(row, Dropped):
                reasons[row.reason] += 1
                dropped.write(json.dumps(row._asdict() | {"step": "read"}) + "\n")
                continue
            good += 1
            rows.write(json.dumps(row) + "\n")
            if good == cfg.limit:
                break
    part.replace(out)
    counts = {"in": good + reasons.total(), "kept": good, "reasons": dict(reasons)}
    inputs, hub = ([cfg.place], "") if cfg.place else ([], source.hub)
    write_report(out, cfg, inputs, {"read": {source.name: counts}}, hub=hub)
    print(f"{out}: {good:,} of {source.size:,} rows; dropped: {dict(reasons) or 'none'}")
    if not good:
        sys.exit(f"{out}: no row of {source.name} can be used; {why} says why")


if __name__ == "__main__":
    run_main(main, Config)
