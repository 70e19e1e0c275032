r"""Scores a model on benchmarks: sample once, keep every reply, grade any time.

1. items.jsonl    the questions as they are asked, with pictures, golds and groups (benchmarks.py)
2. protocol.json  the settings. The paper gives no prompt, temperature, k or token limit for its
                  tables, so ours stand beside every number; replies of two are never mixed
3. records.jsonl  one reply a line, no verdict: appended as they come, so a run that is cut off goes
                  on where it stopped. Several ranks write one file each
4. graded.jsonl   the verdicts (extract.py), a pure function of items, records, and what judge.py
                  has said in judged.jsonl: `--regrade DIR` makes them anew in seconds. A reply cut
                  at the limit is wrong, what cannot be read is `unparsed`: nothing is ever guessed
5. summary.json   scores (metrics.py) and behaviors (behaviors.py), with gallery.html beside it

The defaults are a reasoner's: 32k tokens, vLLM where it is installed, temperature and k of the
benchmark. The model is a HF directory, sampled on all ranks, or whatever answers behind an
OpenAI-compatible address.

    python eval.py --model out/rl/model --bench mathvista pope        # out/eval/rl/mathvista, ...
    torchrun --nproc-per-node 8 eval.py --model out/rl/model --bench mathvision   # eight GPUs
    python eval.py --url http://127.0.0.1:8000/v1 --model ovr --bench math500
    python eval.py --model out/laptop/rl/model --data out/laptop/data/test.jsonl \
        --sampler torch --max-tokens 160
    python eval.py --list                           # the benchmarks
    python eval.py --regrade DIR                    # grade again; nothing is sampled
    python eval.py --table out/eval/rl/*            # all benchmarks of a model, the paper beside
    python eval.py --compare out/eval/coldstart/pope out/eval/rl/pope
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from PIL import Image

from common import data, distributed
from common.client import Endpoint, Reply, ask_for_all, user_message
from common.log import fingerprint, progress, run_main, write_json
from common.records import Appender, claim, read_rows, write_rows
from evaluation import behaviors, benchmarks, extract, gallery, metrics
from rollout import address, open_sampler

CHUNK = 2  # batches of replies that a rank samples between two writes


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
    compare: tuple[str, ...] = ()  # two directories of one benchmark: before, after

    def __post_init__(self):
        if self.compare and len(self.compare) != 2:
            raise ValueError("--compare takes two directories: before, after")
        if self.list or self.regrade or self.table or self.compare:
            return
        if not (self.model and (self.bench or self.data)):
            raise ValueError(
                "give --model and --bench or --data (or --list, --regrade, --table, --compare)"
            )
        if self.data and len(self.bench) > 1:
            raise ValueError(f"--data is one set, --bench names {len(self.bench)}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p {self.top_p} is not in (0, 1]")
        for run in runs_of(self):  # a wrong name says which there are
            if run.bench.k > 1 and run.bench.temperature == 0:
                raise ValueError(f"k = {run.bench.k} greedy samples are equal: set --temperature")
        if self.forbid and self.url:
            raise ValueError("--forbid is for a model directory, not for a server")


class Run(NamedTuple):
    """One model on one benchmark, with k and temperature as the settings have them."""

    cfg: Config
    bench: benchmarks.Benchmark
    out: Path


def runs_of(cfg: Config) -> list[Run]:
    names = cfg.bench or (Path(cfg.data).stem,)
    benches = {bench.name: bench for bench in (bench_of(name, cfg.data) for name in names)}
    home, runs = Path(cfg.out or Path("out/eval") / short_name(cfg.model)), []
    for name, bench in benches.items():
        temperature = cfg.temperature if cfg.temperature >= 0 else bench.temperature
        bench = replace(bench, k=cfg.k or bench.k, temperature=temperature)
        runs.append(Run(cfg, bench, home if cfg.out and len(benches) == 1 else home / name))
    return runs


def bench_of(name: str, own_data: str) -> benchmarks.Benchmark:
    """Of --data: one sample, greedy, accuracy by rules; it has no reader and no paper."""
    if own_data:
        return benchmarks.Benchmark(name, hub="", reader=None, split="", size=0)
    return benchmarks.named(name)


def short_name(model: str) -> str:
    """out/ovr_7b/rl/model -> ovr_7b_rl; Qwen/Qwen2.5-VL-7B -> Qwen_Qwen2.5-VL-7B"""
    parts = [part for part in Path(model).parts if part not in ("/", "..", "out", "model")]
    return "_".join(parts) or "model"


def chosen_sampler(cfg: Config) -> str:
    installed = "vllm" if find_spec("vllm") else "torch"
    return installed if cfg.sampler == "auto" else cfg.sampler


# ---- items, and their protocol


def make_items(run: Run) -> None:
    """items.jsonl, written once: what is asked must not change under the replies."""
    cfg, file = run.cfg, run.out / "items.jsonl"
    run.out.mkdir(parents=True, exist_ok=True)
    if file.exists() and read_records(run.out):  # a failed start is forgotten
        return
    if cfg.data:
        write_rows(file, items_of_data(cfg, run.out))
    else:
        own = Path(cfg.place, run.bench.name)
        place = str(own) if cfg.place and own.exists() else cfg.place
        benchmarks.write_items(run.bench, place, run.out, cfg.limit)
    if cfg.pictures != "true":
        items = read_rows(file)
        if cfg.pictures == "blank":
            shown = [[blank(run.out, name) for name in item["images"]] for item in items]
        else:
            shown = [other_pictures(items[i:] + items[:i], run.out) for i in range(len(items))]
        rows = zip(items, shown, strict=True)
        write_rows(file, [item | {"images": images} for item, images in rows])


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


def other_pictures(items: list[dict], folder: Path) -> list[str]:
    """Of the next item with as many pictures, none of which is the first item's. By what the files
    hold: the questions of POPE or MME share a picture."""
    own = [fingerprint(folder / name) for name in items[0]["images"]]
    for item in items[1:] if own else ():
        names = item["images"]
        if len(names) == len(own) and not {fingerprint(folder / n) for n in names} & {*own}:
            return names
    if own:
        raise ValueError(f"--pictures shuffled: no others to show for {items[0]['images']}")
    return []


def blank(folder: Path, name: str) -> str:
    """A white picture of the same size."""
    with Image.open(folder / name) as image:
        size = image.size
    path = folder / "blank" / f"{size[0]}x{size[1]}.png"
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", size, "white").save(path)
    return os.path.relpath(path, folder)


PROTOCOL = "model data limit max_tokens top_p pictures forbid seed url".split()


def claim_folder(run: Run) -> None:
    """protocol.json: what may not change between the replies of a directory, and stands beside
    every number. ValueError if the directory holds replies of another protocol."""
    cfg, items = run.cfg, run.out / "items.jsonl"
    protocol = {name: getattr(cfg, name) for name in PROTOCOL} | {"bench": run.bench.name}
    protocol |= {"k": run.bench.k, "temperature": run.bench.temperature}
    protocol["sampler"] = "" if cfg.url else chosen_sampler(cfg)
    prompts = [item["prompt"] for item in read_rows(items)]
    # how the kinds of questions ask for the answer
    used = [how for how in benchmarks.KINDS if any(p.endswith(how) for p in prompts)]
    protocol |= {"prompts": used, "items": fingerprint(items)}
    if cfg.data:
        protocol["rows"] = fingerprint(cfg.data)  # items.jsonl stays as it was written
    claim(run.out / "protocol.json", protocol, begun=bool(read_records(run.out)))


# ---- replies on disk


def read_records(out: Path) -> list[dict]:
    """All replies so far, whichever rank wrote them."""
    return [record for path in sorted(out.glob("records*.jsonl")) for record in read_rows(path)]


def settle(out: Path) -> None:
    """A complete run has one file of records, in the order of the items, each reply once."""
    newest = by_reply(read_records(out))
    places = {item["id"]: i for i, item in enumerate(read_rows(out / "items.jsonl"))}
    order = sorted(newest, key=lambda key: (places[key[0]], key[1]))
    write_rows(out / "records.jsonl", [newest[key] for key in order])
    for path in out.glob("records.rank*.jsonl"):
        path.unlink()


# ---- sampling


def sample(run: Run, world, open_once: Callable) -> None:
    """Appends the missing replies."""
    cfg, items = run.cfg, read_rows(run.out / "items.jsonl")
    done = by_reply(read_records(run.out))
    world.wait()  # nobody writes before all have read
    replies = [(item["id"], n) for item in items for n in range(run.bench.k)]
    missing = [reply for reply in replies if reply not in done]
    if not missing or (cfg.url and not world.main):  # a server is asked once, whatever the ranks
        return
    name = f"records.rank{world.rank}.jsonl" if world.size > 1 else "records.jsonl"
    write = Appender(run.out / name).add
    problems = {}
    for item in items:
        pictures = tuple(str(run.out / name) for name in item["images"])
        problems[item["id"]] = data.Problem(item["id"], item["prompt"], item["answer"], pictures)
    if cfg.url:
        ask_server(run, [(problems[name], n) for name, n in missing], write)
    else:
        names = dict.fromkeys(name for name, _ in missing)
        ask_sampler(run, [problems[name] for name in names], write, world, open_once())


def ask_sampler(run: Run, problems: list, write: Callable, world, sampler) -> None:
    """An item of which a reply is missing is sampled again as a whole: its prompt is read once."""
    cfg, n = run.cfg, run.bench.k
    size = min(CHUNK * cfg.sampler_batch // n, math.ceil(len(problems) / world.size)) or 1
    chunks = [problems[at : at + size] for at in range(0, len(problems), size)]
    mine = distributed.my_problems(world, len(chunks), f"eval/{run.out}", dynamic=True)
    for c in progress(mine, run.bench.name, len(chunks)):
        replies = sampler.generate(chunks[c], n, cfg.max_tokens, run.bench.temperature, (cfg.seed,))
        for reply in replies:
            record = {"id": reply.problem.id, "sample": reply.sample, "response": reply.text}
            finish = "stop" if reply.stopped else "length"
            write(record | {"finish": finish, "tokens": len(reply.response_ids)})


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


def ask_server(run: Run, missing: list[tuple], write: Callable) -> None:
    """Only what is missing is asked, for it may cost. What the server fails at is printed, and
    asked again by the same command."""
    cfg, came = run.cfg, set()
    sampling = {"max_tokens": cfg.max_tokens, "top_p": cfg.top_p}
    sampling["temperature"] = run.bench.temperature

    def request(job: int) -> dict | None:
        if job in came:
            return None
        problem, n = missing[job]
        message = user_message(problem.prompt, problem.images)
        return sampling | {"messages": [message], "seed": address((cfg.seed,), problem.id, n)}

    def keep(job: int, reply: Reply) -> None:
        came.add(job)
        problem, n = missing[job]
        thought = "" if reply.thought is None else f"<think>\n{reply.thought}\n</think>\n\n"
        record = {"id": problem.id, "sample": n, "response": thought + reply.text}
        write(record | {"finish": reply.finish, "tokens": reply.completion_tokens})

    endpoint = Endpoint(cfg.url, cfg.model, cfg.key_env, cfg.concurrency)
    ask_for_all(endpoint, progress(range(len(missing)), run.bench.name), request, keep)
    if lost := len(missing) - len(came):
        raise ValueError(f"{run.bench.name}: {lost} replies are missing: give the command again")


# ---- grading


def graded(record: dict, item: dict, before: dict | None = None) -> dict:
    """The record with its verdict, what metrics group by, and its spans of behaviours: those of
    `before`, this reply's row of an earlier grading, if the lexicon has not changed since."""
    gold, reply = str(item["answer"]), record["response"]
    how = {name: item.get(name) for name in ("choices", "precision", "kind")}
    verdict = extract.grade(gold, reply, finish=record["finish"], **how)
    about = ("source", "answer", "category", "group", "seen", "chance")
    row = record | {name: item.get(name) for name in about} | {"image": bool(item["images"])}
    row |= {"score": verdict.score, "status": verdict.status, "rule": verdict.rule}
    row |= {"extracted": verdict.answer, "lexicon": behaviors.VERSION}
    if before and (before["response"], before.get("lexicon")) == (reply, behaviors.VERSION):
        return row | {"spans": before["spans"]}
    question = item.get("question") or item["prompt"]
    return row | {"spans": behaviors.find_in_thought(reply, question)}


def by_reply(rows: list[dict]) -> dict[tuple[str, int], dict]:
    return {(row["id"], row["sample"]): row for row in rows}


def regrade(out: Path, bench: benchmarks.Benchmark) -> list[dict]:
    """graded.jsonl anew from items, records, and the judge's word if it is there."""
    items = {item["id"]: item for item in read_rows(out / "items.jsonl")}
    judged, before = (by_reply(read_rows(out / f"{name}.jsonl")) for name in ("judged", "graded"))
    rows = []
    for record in progress(read_records(out), "grading"):
        key = record["id"], record["sample"]
        if key[0] not in items:
            raise ValueError(f"{out}: item {key[0]} has a reply, and is gone from items.jsonl")
        row = graded(record, items[key[0]], before.get(key))
        if bench.judge == "only":  # sentences: without a judge there is no score
            row["score"] = None
        if key in judged:
            row["judge_score"] = judged[key]["judge_score"]
        rows.append(row)
    write_rows(out / "graded.jsonl", rows)
    return rows


def finish(out: Path) -> dict:
    """Everything that follows from items and records. summary.json comes last, and whole: it says
    that a benchmark is done (runs/eval.sh)."""
    protocol = read_json(out / "protocol.json")
    bench = bench_of(protocol["bench"], protocol["data"])
    if fingerprint(out / "items.jsonl") != protocol["items"]:
        print(f"{out}/items.jsonl was changed after it was asked: its golds count, not its prompts")
    rows, items = regrade(out, bench), read_rows(out / "items.jsonl")
    whole = len(items) > 0.95 * bench.size  # a part of it is another benchmark
    paper = {name: ovr for name, (_, _, ovr) in bench.paper.items()} if whole else {}
    summary = metrics.summarise(bench.metric, rows, items, paper)
    summary |= {"behaviors": behaviors.summarise(rows), "protocol": protocol}
    text = gallery.page(rows, items, out.name, protocol, out)
    (out / "gallery.html").write_text(text, encoding="utf-8")
    write_json(out / "summary.json", summary)
    return summary


def read_json(file: Path) -> dict:
    return json.loads(file.read_text())


# ---- several directories


def show_table(folders: tuple[str, ...]) -> None:
    summaries = {folder: read_json(Path(folder) / "summary.json") for folder in folders}
    forms = [f for f in folders if Path(f).name in ("mmmu_pro", "mmmu_pro_vision")]
    print(metrics.table(summaries | (mmmu_pro(forms) if len(forms) == 2 else {})))
    for folder, summary in summaries.items():
        settings = ", ".join(f"{k} {v}" for k, v in summary["protocol"].items() if k != "items")
        print(f"{folder}: {settings}")


def mmmu_pro(forms: list[str]) -> dict[str, dict]:
    """The paper's number is most likely the mean of the two forms of the questions."""
    rows = [row for folder in forms for row in read_rows(Path(folder) / "graded.jsonl")]
    rows = [row | {"group": {"question": row["id"].split("/", 1)[1]}} for row in rows]
    items = [*{row["id"]: row for row in rows}.values()]
    paper = {"accuracy": benchmarks.named("mmmu_pro").paper["mean"][-1]}
    return {"mmmu_pro, both": metrics.summarise("both forms", rows, items, paper)}


def show_comparison(before: Path, after: Path) -> None:
    """The difference of the scores, of the behaviours, and which units flipped."""
    for out in (before, after):
        if not (out / "graded.jsonl").exists():
            raise FileNotFoundError(f"{out}: no graded.jsonl, so no evaluation has ended there")
    metric = read_json(before / "summary.json")["metric"]
    runs = [by_reply(read_rows(out / "graded.jsonl")) for out in (before, after)]
    comparison = metrics.compare(metric, *([*run.values()] for run in runs))
    for name, d in comparison["difference"].items():
        change = f"{d['after'] - d['before']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]"
        print(f"{name}: {d['before']:.3f} -> {d['after']:.3f}, {change}")
    print(f"McNemar: p {comparison['sign']:.3g}")
    if runs[0].keys() == runs[1].keys():  # of the same k
        old, new = (behaviors.shown_by([run[key]["spans"] for key in runs[0]]) for run in runs)
        changes = behaviors.means(new.astype(int) - old, [name for name, _ in runs[0]])
        for name, (change, low, high) in changes.items():
            print(f"{name}: {change:+.3f} of the replies [{low:+.3f}, {high:+.3f}]")
    for way in ("gained", "lost"):
        print(f"{way}: {len(comparison[way])}", *comparison[way][:50])


def evaluate(cfg: Config) -> None:
    world, runs = distributed.start(), runs_of(cfg)
    for run in runs if world.main else ():  # what is missing of the last is said before the first
        make_items(run)
        claim_folder(run)
    open_once = cache(lambda: open_for(cfg, world))  # one sampler for all benchmarks
    for run in runs:
        world.wait()
        sample(run, world, open_once)
        world.wait()
        if world.main:
            settle(run.out)
            print(metrics.table({run.bench.name: finish(run.out)}), run.out, sep="\n", flush=True)
    distributed.finish(world)


def main(cfg: Config):
    if cfg.list:
        print(benchmarks.table())
    elif cfg.table:
        show_table(cfg.table)
    elif cfg.compare:
        show_comparison(*map(Path, cfg.compare))
    elif cfg.regrade:
        print(metrics.table({folder: finish(Path(folder)) for folder in cfg.regrade}))
    else:
        evaluate(cfg)


if __name__ == "__main__":
    run_main(main, Config)
