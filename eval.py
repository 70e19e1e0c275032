"""Scores a model on benchmarks: sample once, keep every reply, grade any time.

    items.jsonl    the questions as they are asked, with golds and groups (benchmarks.py)
    protocol.json  the settings. The paper gives no prompt, temperature, k or token limit for its
                   tables, so ours stand beside every number; replies of two are never mixed
    records.jsonl  a reply a line, no verdict: a run that is cut off goes on where it stopped
    graded.jsonl   verdicts (extract.py), and the judge's; what was cut or cannot be read is wrong
    summary.json   scores (metrics.py) and behaviors (behaviors.py), with gallery.html beside it

The model is a HF directory, sampled on all ranks, or behind an OpenAI-compatible address.

    python eval.py --model out/rl/model --bench mathvista pope        # out/eval/rl/mathvista, ...
    torchrun --nproc-per-node 8 eval.py --model out/rl/model --bench mathvision   # eight GPUs
    python eval.py --url http://127.0.0.1:8000/v1 --model ovr --bench math500
    python eval.py --model DIR --data rows.jsonl --sampler torch --max-tokens 160   # a set of yours
    python eval.py --table out/eval/rl/*            # or --regrade DIR, or --compare BEFORE AFTER
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

from common import data, distributed
from common.client import Endpoint, Reply, ask_for_all, user_message
from common.log import fingerprint, progress, run_main, write_json
from common.records import Appender, claim, read_rows, write_rows
from evaluation import behaviors, benchmarks, extract, gallery, metrics
from rollout import address, open_sampler

CHUNK = 2  # batches of replies that a rank samples between two writes
PROTOCOL = "model data limit max_tokens top_p pictures forbid seed url".split()


@dataclass(frozen=True)
class Config:
    """One model on benchmarks, or what is there looked at again."""

    model: str = ""  # HF directory or Hub name; with --url the name that the server knows
    bench: tuple[str, ...] = ()  # names, in any case; --list has them. With --data: its name
    place: str = ""  # local copy of the benchmark, or of each in PLACE/NAME; empty: the Hub
    data: str = ""  # problems of one's own, as rl.py takes them, in place of a benchmark
    columns: tuple[str, ...] = ()  # of such rows with other names: prompt=problem answer=solution
    out: str = ""  # directory; of several benchmarks OUT/NAME. Empty: out/eval/MODEL/NAME
    k: int = 0  # samples an item; 0: the benchmark's (AIME 16, else 1)
    temperature: float = -1.0  # 0: greedy; -1: the benchmark's (AIME 1, else 0)
    top_p: float = 1.0  # 1: the whole distribution
    max_tokens: int = 32768  # of a reply
    prompt_tokens: int = 4096  # vllm's room for a prompt; a picture of a megapixel takes 1,300
    pictures: Literal["true", "blank", "shuffled"] = "true"  # controls: is the picture looked at?
    forbid: tuple[str, ...] = ()  # tokens never drawn: is this word what brings the answers?
    limit: int = 0  # first items (or groups) only; 0: all
    seed: int = 0
    sampler: Literal["auto", "torch", "vllm"] = "auto"  # auto: vllm where it is installed
    sampler_batch: int = 256  # replies that a rank samples at once
    kv_cache_gb: float = 0.0  # vllm's keys and values, a rank; 7B: 57 kB a token; 0: what is left
    url: str = ""  # OpenAI-compatible address, ends in /v1, in place of a sampler
    key_env: str = ""  # NAME of the environment variable that holds its key
    concurrency: int = 64  # requests in flight
    list: bool = False  # print the benchmarks
    regrade: tuple[str, ...] = ()  # directories: grade their records again
    table: tuple[str, ...] = ()  # directories: their scores as one table
    compare: tuple[str, str] | None = None  # directories of one benchmark: before, after

    def __post_init__(self):
        looks = [self.list, self.regrade, self.table, self.compare]
        if sum(map(bool, looks)) > 1:
            raise ValueError("--list, --regrade, --table, --compare: one at a time")
        if any(looks):
            return
        if min(self.max_tokens, self.prompt_tokens, self.sampler_batch) < 1:
            raise ValueError("--max-tokens, --prompt-tokens, --sampler-batch count from 1")
        if not (self.model and (self.bench or self.data)):
            raise ValueError("give --model and --bench or --data; --help has the other ways")
        if self.data and (self.place or len(self.bench) > 1):
            raise ValueError("--data is one set: it has no --place, and --bench may name it")
        if self.columns and not self.data:
            raise ValueError("--columns is for --data: benchmarks have their own readers")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p {self.top_p} is not in (0, 1]")
        for bench in runs_of(self).values():  # a wrong name says which there are
            if bench.k > 1 and bench.temperature == 0:
                raise ValueError(f"k = {bench.k} greedy samples are equal: set --temperature")
        if self.forbid and self.url:
            raise ValueError("--forbid is for a model directory, not for a server")


def runs_of(cfg: Config) -> dict[Path, benchmarks.Benchmark]:
    """{directory: benchmark, with k and temperature as the settings have them}"""
    names = cfg.bench or (Path(cfg.data).stem,)
    benches = {bench.name: bench for bench in (bench_of(name, cfg.data) for name in names)}
    # out/ovr_7b/rl/model -> ovr_7b_rl; Qwen/Qwen2.5-VL-7B -> Qwen_Qwen2.5-VL-7B
    parts = [part for part in Path(cfg.model).parts if part not in ("/", "..", "out", "model")]
    home, runs = Path(cfg.out or f"out/eval/{'_'.join(parts) or 'model'}"), {}
    for name, bench in benches.items():
        temperature = cfg.temperature if cfg.temperature >= 0 else bench.temperature
        out = home if cfg.out and len(benches) == 1 else home / name
        runs[out] = replace(bench, k=cfg.k or bench.k, temperature=temperature)
    return runs


def bench_of(name: str, own_data: str) -> benchmarks.Benchmark:
    """Of --data: one sample, greedy, accuracy by rules; it has no reader and no paper."""
    if own_data:
        return benchmarks.Benchmark(name, hub="", reader=None, split="", size=0)
    return benchmarks.named(name)


def chosen_sampler(cfg: Config) -> str:
    installed = "vllm" if find_spec("vllm") else "torch"
    return installed if cfg.sampler == "auto" else cfg.sampler


# ---- items, and their protocol


def prepare(cfg: Config, bench: benchmarks.Benchmark, out: Path) -> None:
    """items.jsonl, written once: what is asked must not change under the replies. protocol.json:
    what else must not. ValueError if the directory holds replies of another protocol."""
    file, begun = out / "items.jsonl", bool(replies(out, "records*"))
    out.mkdir(parents=True, exist_ok=True)
    if not (begun and file.exists()):  # a failed start is forgotten
        if cfg.data:
            write_rows(file, items_of_data(cfg, out))
        else:
            place = benchmarks.place_of(cfg.place, bench.name, len(cfg.bench) > 1)
            benchmarks.write_items(bench, place, out, cfg.limit)
        if cfg.pictures != "true":
            write_rows(file, with_other_pictures(read_rows(file), cfg.pictures, out))
    protocol = {name: getattr(cfg, name) for name in PROTOCOL} | {"bench": bench.name}
    protocol |= {"k": bench.k, "temperature": bench.temperature}
    protocol |= {"sampler": "" if cfg.url else chosen_sampler(cfg), "items": fingerprint(file)}
    prompts = [item["prompt"] for item in read_rows(file)]
    # how the kinds of questions ask for the answer
    protocol["prompts"] = [k for k in benchmarks.KINDS if any(p.endswith(k) for p in prompts)]
    if cfg.data:
        protocol["rows"] = fingerprint(cfg.data)  # items.jsonl stays as it was written
    claim(out / "protocol.json", protocol, begun)


def items_of_data(cfg: Config, folder: Path) -> list[dict]:
    items = []
    for p in data.read_problems(cfg.data, cfg.columns)[: cfg.limit or None]:
        if not all(isinstance(image, str) for image in p.images):
            raise ValueError(f"{cfg.data}: {p.id} has its pictures inside; write them as files")
        columns = "id source prompt answer choices precision".split()
        item = {name: value for name in columns if (value := getattr(p, name)) is not None}
        item["images"] = [os.path.relpath(image, folder) for image in p.images]
        item["category"] = "image" if p.images else "text"
        item["chance"] = 1 / len(p.choices) if p.choices else 0.0
        items.append(item)
    return items


def with_other_pictures(items: list[dict], how: str, folder: Path) -> list[dict]:
    """Controls. blank: white pictures of the same size. shuffled: those of the next item with as
    many, none of them the item's own by what the files hold: POPE's questions share pictures."""
    held = [{fingerprint(folder / name) for name in item["images"]} for item in items]

    def shown(i: int) -> list[str]:
        own = items[i]["images"]
        if how == "blank" or not own:
            return [blank(folder, name) for name in own]
        for j in (*range(i + 1, len(items)), *range(i)):
            if len(items[j]["images"]) == len(own) and held[i].isdisjoint(held[j]):
                return items[j]["images"]
        raise ValueError(f"--pictures shuffled: no others to show for {own}")

    return [item | {"images": shown(i)} for i, item in enumerate(items)]


def blank(folder: Path, name: str) -> str:
    with Image.open(folder / name) as image:
        white = Image.new("RGB", image.size, "white")
    path = folder / f"blank/{white.width}x{white.height}.png"
    path.parent.mkdir(exist_ok=True)
    white.save(path)
    return os.path.relpath(path, folder)


# ---- replies


def replies(out: Path, name: str) -> dict[tuple[str, int], dict]:
    """{(id, sample): row} of "records*", whichever rank wrote them, of "graded" or "judged"."""
    rows = (row for path in sorted(out.glob(f"{name}.jsonl")) for row in read_rows(path))
    return {(row["id"], row["sample"]): row for row in rows}


def sample(cfg: Config, bench, out: Path, world, open_once: Callable) -> None:
    """Appends the missing replies. A complete run has one file of them, in the order of the items.
    A server is asked once, whatever the ranks."""
    items, done = read_rows(out / "items.jsonl"), replies(out, "records*")
    world.wait()  # nobody writes before all have read
    problems = {}
    for item in items:
        pictures = tuple(str(out / name) for name in item["images"])
        problems[item["id"]] = data.Problem(item["id"], item["prompt"], item["answer"], pictures)
    wanted = [(name, n) for name in problems for n in range(bench.k)]
    missing = [(problems[name], n) for name, n in wanted if (name, n) not in done]
    if missing and (world.main or not cfg.url):
        file = f"records.rank{world.rank}.jsonl" if world.size > 1 else "records.jsonl"
        appender = Appender(out / file)

        def write(problem, n, response, finish, tokens):
            row = {"id": problem.id, "sample": n, "response": response}
            appender.add(row | {"finish": finish, "tokens": tokens})

        if cfg.url:
            ask_server(cfg, bench, missing, write)
        else:
            ask_sampler(cfg, bench, missing, write, world, open_once())
    world.wait()
    if world.main:
        newest = replies(out, "records*")
        write_rows(out / "records.jsonl", [newest[reply] for reply in wanted])
        for path in out.glob("records.rank*.jsonl"):
            path.unlink()


def ask_sampler(cfg: Config, bench, missing: list[tuple], write: Callable, world, sampler) -> None:
    """An item of which a reply is missing is sampled again as a whole: its prompt is read once."""
    problems = [*{problem.id: problem for problem, _ in missing}.values()]
    size = min(CHUNK * cfg.sampler_batch // bench.k, math.ceil(len(problems) / world.size)) or 1
    chunks = [problems[at : at + size] for at in range(0, len(problems), size)]
    mine = distributed.my_problems(world, len(chunks), f"eval/{bench.name}", dynamic=True)
    how = bench.k, cfg.max_tokens, bench.temperature, (cfg.seed,)
    for c in progress(mine, bench.name, len(chunks)):
        for reply in sampler.generate(chunks[c], *how):
            finish = "stop" if reply.stopped else "length"
            write(reply.problem, reply.sample, reply.text, finish, len(reply.response_ids))


def open_for(cfg: Config, world):
    """The sampler of all benchmarks of this call."""
    directory, gb = data.model_directory(cfg.model), cfg.kv_cache_gb
    if not gb and torch.cuda.is_available():  # what the weights and 4 GB for pictures leave
        weights = sum(file.stat().st_size for file in Path(directory).glob("*.safetensors"))
        gb = max(1.0, (0.9 * torch.cuda.mem_get_info()[0] - weights) / 1e9 - 4)
    room = (cfg.sampler_batch, cfg.prompt_tokens + cfg.max_tokens, gb or 0.25)
    sampler = open_sampler(chosen_sampler(cfg), directory, world, room, cfg.forbid)
    sampler.top_p = cfg.top_p
    return sampler


def ask_server(cfg: Config, bench, missing: list[tuple], write: Callable) -> None:
    """Only what is missing is asked, for it may cost. What the server fails at is printed, and
    asked again by the same command."""
    came, sampling = set(), {"max_tokens": cfg.max_tokens, "top_p": cfg.top_p}
    sampling["temperature"] = bench.temperature

    def request(job: int) -> dict | None:
        if job in came:
            return None
        problem, n = missing[job]
        message = user_message(problem.prompt, problem.images)
        return sampling | {"messages": [message], "seed": address((cfg.seed,), problem.id, n)}

    def keep(job: int, reply: Reply) -> None:
        came.add(job)
        thought = "" if reply.thought is None else f"<think>\n{reply.thought}\n</think>\n\n"
        write(*missing[job], thought + reply.text, reply.finish, reply.completion_tokens)

    endpoint = Endpoint(cfg.url, cfg.model, cfg.key_env, cfg.concurrency)
    ask_for_all(endpoint, progress(range(len(missing)), bench.name), request, keep)
    if lost := len(missing) - len(came):
        raise ValueError(f"{bench.name}: {lost} replies are missing: give the command again")


# ---- grading


def graded(record: dict, item: dict, before: dict | None = None) -> dict:
    """The record with its verdict, what metrics group by, and its spans of behaviours: those of
    `before`, this reply's row of an earlier grading, if the lexicon has not changed since."""
    reply = record["response"]
    how = {name: item.get(name) for name in ("choices", "precision", "kind")}
    verdict = extract.grade(str(item["answer"]), reply, finish=record["finish"], **how)
    about = ("source", "answer", "category", "group", "seen", "chance")
    row = record | {name: item.get(name) for name in about} | {"image": bool(item["images"])}
    row |= {"score": verdict.score, "status": verdict.status, "rule": verdict.rule}
    row |= {"extracted": verdict.answer, "lexicon": behaviors.VERSION}
    if before and (before["response"], before.get("lexicon")) == (reply, behaviors.VERSION):
        return row | {"spans": before["spans"]}
    question = item.get("question") or item["prompt"]
    return row | {"spans": behaviors.find_in_thought(reply, question)}


def finish(out: Path) -> dict:
    """All that follows from items, records and the judge's word. summary.json comes last, and
    whole: it says that a benchmark is done (runs/eval.sh)."""
    protocol = json.loads((out / "protocol.json").read_text())
    bench = bench_of(protocol["bench"], protocol["data"])
    items = {item["id"]: item for item in read_rows(out / "items.jsonl")}
    if fingerprint(out / "items.jsonl") != protocol["items"]:
        print(f"{out}/items.jsonl was changed after it was asked: its golds count, not its prompts")
    records, judged, before = (replies(out, name) for name in ("records*", "judged", "graded"))
    rows = []
    for key, record in progress(records.items(), "grading"):
        if record["id"] not in items:
            raise ValueError(f"{out}: item {key[0]} has a reply, and is gone from items.jsonl")
        rows.append(graded(record, items[record["id"]], before.get(key)))
        if bench.judge == "only":  # sentences: without a judge there is no score
            rows[-1]["score"] = None
        if key in judged:
            rows[-1]["judge_score"] = judged[key]["judge_score"]
    write_rows(out / "graded.jsonl", rows)
    whole, items = len(items) > 0.95 * bench.size, [*items.values()]
    paper = {name: ovr for name, (_, _, ovr) in bench.paper.items() if whole}  # not of a part
    try:
        summary = metrics.summarise(bench.metric, rows, items, paper)
    except ValueError as error:  # its evaluation has not ended
        raise ValueError(f"{out}: {error}; give the command that began it again") from error
    summary |= {"behaviors": behaviors.summarise(rows), "protocol": protocol}
    page = gallery.page(rows, items, out.name, protocol, out)
    (out / "gallery.html").write_text(page, encoding="utf-8", errors="replace")  # half characters
    write_json(out / "summary.json", summary)
    return summary


# ---- several directories


def summary_of(folder: str) -> dict:
    return json.loads((Path(folder) / "summary.json").read_text())


def show_table(folders: tuple[str, ...]) -> None:
    ended = [folder for folder in folders if (Path(folder) / "summary.json").exists()]
    for folder in sorted({*folders} - {*ended}):
        print(f"{folder}: no summary.json, so no evaluation has ended there")
    summaries = {folder: summary_of(folder) for folder in ended}
    lines = dict(summaries)
    forms = [f for f in folders if Path(f).name in ("mmmu_pro", "mmmu_pro_vision")]
    if len(forms) == 2:  # the paper's number is most likely the mean of the two
        rows = [row for folder in forms for row in read_rows(Path(folder) / "graded.jsonl")]
        rows = [row | {"group": {"question": row["id"].split("/", 1)[1]}} for row in rows]
        items = [*{row["id"]: row for row in rows}.values()]
        paper = {"accuracy": benchmarks.named("mmmu_pro").paper["mean"][-1]}
        lines["mmmu_pro, both"] = metrics.summarise("both forms", rows, items, paper)
    print(metrics.table(lines))
    for folder, summary in summaries.items():
        given = {k: v for k, v in summary["protocol"].items() if k != "items" and v != ""}
        settings = ", ".join(f"{name} {value}" for name, value in given.items())
        print(f"{folder}: {settings}")


def show_comparison(before: str, after: str) -> None:
    """The difference of the scores, of the behaviours, and which units flipped."""
    metric, _ = (summary_of(folder)["metric"] for folder in (before, after))  # both have ended
    one, other = (replies(Path(folder), "graded") for folder in (before, after))
    if not (one and other):
        raise FileNotFoundError(f"{before}, {after}: graded.jsonl is gone; --regrade makes it anew")
    comparison = metrics.compare(metric, [*one.values()], [*other.values()])
    for name, d in comparison["difference"].items():
        change = f"{d['after'] - d['before']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]"
        print(f"{name}: {d['before']:.3f} -> {d['after']:.3f}, {change}")
    print(f"McNemar: p {comparison['sign']:.3g}")
    if one.keys() == other.keys():  # of the same k
        spans = ([run[key]["spans"] for key in one] for run in (one, other))
        old, new = (behaviors.counted(of_run) > 0 for of_run in spans)
        changes = behaviors.means(new.astype(int) - old, [name for name, _ in one])
        for name, (change, low, high) in changes.items():
            print(f"{name}: {change:+.3f} of the replies [{low:+.3f}, {high:+.3f}]")
    for way in ("gained", "lost"):
        print(f"{way}: {len(comparison[way])}", *comparison[way][:50])


def main(cfg: Config) -> None:
    if cfg.list:
        return print(benchmarks.table())
    if cfg.table:
        return show_table(cfg.table)
    if cfg.compare:
        return show_comparison(*cfg.compare)
    if cfg.regrade:
        return print(metrics.table({folder: finish(Path(folder)) for folder in cfg.regrade}))
    world, runs = distributed.start(), runs_of(cfg)
    for out in runs if world.main else ():  # what is missing of the last is said before the first
        prepare(cfg, runs[out], out)
    open_once = cache(lambda: open_for(cfg, world))  # one sampler for all benchmarks
    world.wait()
    for out, bench in runs.items():
        sample(cfg, bench, out, world, open_once)
        if world.main:
            print(metrics.table({bench.name: finish(out)}), out, sep="\n", flush=True)
    distributed.finish(world)


if __name__ == "__main__":
    run_main(main, Config)
