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

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from PIL import Image

from common import data, distributed
from common.client import Endpoint, Failure, each, user_message
from common.log import changes, fingerprint, progress, run_main, write_json
from common.records import Appender, read_rows, write_rows
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
    dtype: str = "auto"  # bfloat16 on GPUs, float32 on CPUs
    threads: int = 0  # CPU threads a process; 0 shares the cores out
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
        for run in runs_of(self):  # a wrong name says which there are
            if run.bench.k > 1 and run.bench.temperature == 0:
                raise ValueError(f"k = {run.bench.k} greedy samples are equal: set --temperature")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p {self.top_p} is not in (0, 1]")
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
    parts = [part for part in Path(os.path.normpath(model)).parts if part not in ("/", "..")]
    parts = parts[parts[:1] == ["out"] :]
    return "_".join(parts[:-1] if parts[1:] and parts[-1] == "model" else parts) or "model"


def chosen_sampler(cfg: Config) -> str:
    installed = "vllm" if find_spec("vllm") else "torch"
    return installed if cfg.sampler == "auto" else cfg.sampler


# ---- items


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


def items_of_data(cfg: Config, folder: Path) -> list[dict]:
    items = []
    for p in data.read_problems(cfg.data)[: cfg.limit or None]:
        if not all(isinstance(image, str) for image in p.images):
            raise ValueError(f"{cfg.data}: {p.id} has its pictures inside; write them as files")
        item = {"id": p.id, "source": p.source, "prompt": p.prompt, "answer": p.answer}
        item |= {"choices": p.choices, "precision": p.precision}
        item["images"] = [os.path.relpath(image, folder) for image in p.images]
        item["category"] = "image" if p.images else "text"
        item["chance"] = 1 / len(p.choices) if p.choices else 0.0
        items.append({name: value for name, value in item.items() if value is not None})
    return items


@cache
def digest(*files: Path) -> str:
    content = b"".join(file.read_bytes() for file in files)
    return hashlib.sha256(content).hexdigest()[:16] if files else ""


def hashes(item: dict, folder: Path) -> dict[str, str]:
    """Of what is asked: they tie a reply to its question."""
    text = hashlib.sha256(item["prompt"].encode()).hexdigest()[:16]
    return {"prompt_hash": text, "image_hash": digest(*(folder / n for n in item["images"]))}


def problems_of(items: list[dict], folder: Path, pictures: str) -> list[data.Problem]:
    """What the sampler takes. The controls: pictures blank, of their size, or another item's."""
    problems = []
    for at, item in enumerate(items):
        names = item["images"]
        if pictures == "shuffled" and names:
            names = other_pictures(items[at:] + items[:at], folder)
        if pictures == "blank":
            names = [blank(folder, name) for name in names]
        shown, gold = tuple(str(folder / name) for name in names), str(item["answer"])
        problem = data.Problem(item["id"], item["prompt"], gold, shown, extra=hashes(item, folder))
        problems.append(problem)
    return problems


def other_pictures(items: list[dict], folder: Path) -> list[str]:
    """Of the next item with as many pictures, none of which is the first item's. By what the files
    hold: the questions of POPE or MME share a picture."""
    own = [digest(folder / name) for name in items[0]["images"]]
    for item in items[1:]:
        others = item["images"]
        if len(others) == len(own) and not {digest(folder / name) for name in others} & {*own}:
            return others
    raise ValueError(f"--pictures shuffled: no other pictures to show for {items[0]['images']}")


def blank(folder: Path, name: str) -> str:
    with Image.open(folder / name) as image:
        size = image.size
    path = folder / "blank" / f"{size[0]}x{size[1]}.png"
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        part = path.with_suffix(f".{os.getpid()}")
        Image.new("RGB", size, "white").save(part, "png")
        part.replace(path)
    return os.path.relpath(path, folder)


# ---- the protocol, and replies on disk


PROTOCOL = "model data limit max_tokens top_p pictures seed url".split()


def claim(run: Run) -> None:
    """protocol.json: what may not change between the replies of a directory, and stands beside
    every number. ValueError if the directory holds replies of another protocol."""
    cfg, items, file = run.cfg, run.out / "items.jsonl", run.out / "protocol.json"
    protocol = {name: getattr(cfg, name) for name in PROTOCOL} | {"bench": run.bench.name}
    protocol |= {"k": run.bench.k, "temperature": run.bench.temperature}
    protocol["sampler"] = "" if cfg.url else chosen_sampler(cfg)
    protocol |= {"forbid": [*cfg.forbid]} if cfg.forbid else {}
    if cfg.data:
        protocol["rows"] = fingerprint(cfg.data)  # items.jsonl stays as it was written
    else:
        prompts = [item["prompt"] for item in read_rows(items)]
        used = [how for how in benchmarks.KINDS if any(p.endswith(how) for p in prompts)]
        protocol["prompts"] = used  # how the kinds of questions ask for the answer
    protocol["items"] = fingerprint(items)
    before = read_json(file) if file.exists() and read_records(run.out) else protocol
    if new := "; ".join(changes(before, protocol)):
        raise ValueError(f"{run.out} holds replies of another protocol ({new}): another --out")
    write_json(file, protocol)


def read_records(out: Path) -> list[dict]:
    """All replies so far, whichever rank wrote them."""
    return [record for path in sorted(out.glob("records*.jsonl")) for record in read_rows(path)]


def settle(out: Path) -> None:
    """A complete run has one file of records, in the order of the items, each reply once."""
    newest = {(record["id"], record["sample"]): record for record in read_records(out)}
    places = {item["id"]: i for i, item in enumerate(read_rows(out / "items.jsonl"))}
    order = sorted(newest, key=lambda key: (places[key[0]], key[1]))
    write_rows(out / "records.jsonl", [newest[key] for key in order])
    for path in out.glob("records.rank*.jsonl"):
        path.unlink()


# ---- sampling


def sample(run: Run, world, open_once: Callable) -> None:
    """Appends the missing replies."""
    cfg, items = run.cfg, read_rows(run.out / "items.jsonl")
    done = {(record["id"], record["sample"]) for record in read_records(run.out)}
    world.wait()  # nobody writes before all have read
    replies = [(item["id"], n) for item in items for n in range(run.bench.k)]
    missing = [reply for reply in replies if reply not in done]
    if not missing or (cfg.url and not world.main):  # a server is asked once, whatever the ranks
        return
    name = f"records.rank{world.rank}.jsonl" if world.size > 1 else "records.jsonl"
    write = Appender(run.out / name).add
    problems = {problem.id: problem for problem in problems_of(items, run.out, cfg.pictures)}
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
            finish = "stop" if reply.stopped else "length"
            about = {"response": reply.text, "finish": finish, "tokens": len(reply.response_ids)}
            write(record_of(run, reply.problem, reply.sample) | about)


def record_of(run: Run, problem: data.Problem, sample: int) -> dict:
    """What a reply is to, with the hashes of what was asked."""
    return {"id": problem.id, "sample": sample, "seed": run.cfg.seed} | problem.extra


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
    cfg, name, failures = run.cfg, run.bench.name, Counter()
    sampling = {"max_tokens": cfg.max_tokens, "top_p": cfg.top_p}
    sampling["temperature"] = run.bench.temperature

    async def work(ask: Callable, job: tuple):
        problem, n = job
        message = user_message(problem.prompt, problem.images)
        seed = address((cfg.seed,), problem.id, n)
        reply = await ask(sampling | {"messages": [message], "seed": seed})
        if isinstance(reply, Failure):
            failures[f"{reply.error}: {reply.message}"] += 1
            return
        thought = "" if reply.thought is None else f"<think>\n{reply.thought}\n</think>\n\n"
        about = {"response": thought + reply.text, "finish": reply.finish}
        write(record_of(run, problem, n) | about | {"tokens": reply.completion_tokens})

    endpoint = Endpoint(cfg.url, cfg.model, cfg.key_env, cfg.concurrency)
    each(endpoint, progress(missing, name), work)
    for why, count in failures.most_common(5):
        print(f"{name}: {count} requests failed: {why}")
    if failures:
        lost = f"{failures.total()} of {len(missing)} replies are missing"
        raise ValueError(f"{name}: {lost}: give the command again")


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


def regrade(out: Path, bench: benchmarks.Benchmark) -> list[dict]:
    """graded.jsonl anew from items, records, and the judge's word if it is there."""
    items = {item["id"]: item for item in read_rows(out / "items.jsonl")}
    judged, before = (
        {(row["id"], row["sample"]): row for row in read_rows(out / f"{name}.jsonl")}
        for name in ("judged", "graded")
    )
    rows = []
    for record in progress(read_records(out), "grading"):
        item, key = items.get(record["id"]), (record["id"], record["sample"])
        if not item or (record | hashes(item, out)) != record:
            raise ValueError(f"{out}: item {key[0]} is gone or is not what its reply was asked")
        row = graded(record, item, before.get(key))
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


def show_table(folders: list[Path]) -> None:
    ends = Counter(folder.name for folder in folders)
    names = {folder: folder.name if ends[folder.name] == 1 else f"{folder}" for folder in folders}
    summaries = {name: read_json(folder / "summary.json") for folder, name in names.items()}
    forms = [folder for folder in folders if folder.name in ("mmmu_pro", "mmmu_pro_vision")]
    both = mmmu_pro(forms) if len(forms) == 2 and len({*ends}) > 1 else {}
    print(metrics.table(summaries | both))
    for name, summary in summaries.items():
        settings = ", ".join(f"{k} {v}" for k, v in summary["protocol"].items() if k != "items")
        print(f"{name}: {settings}")


def mmmu_pro(forms: list[Path]) -> dict[str, dict]:
    """The paper's number is most likely the mean of the two forms of the questions."""
    rows = [row for folder in forms for row in read_rows(folder / "graded.jsonl")]
    rows = [row | {"group": {"question": row["id"].split("/", 1)[1]}} for row in rows]
    items = [*{row["id"]: row for row in rows}.values()]
    paper = {"accuracy": benchmarks.named("mmmu_pro").paper["mean"][-1]}
    return {"mmmu_pro, both": metrics.summarise("both forms", rows, items, paper)}


def show_comparison(before: Path, after: Path) -> None:
    metric = read_json(before / "summary.json")["metric"]
    rows = [read_rows(out / "graded.jsonl") for out in (before, after)]
    for out, run in zip((before, after), rows, strict=True):
        if not all("spans" in row for row in run):
            raise ValueError(f"{out} was graded by an older version: eval.py --regrade {out}")
    comparison = metrics.compare(metric, *rows)
    for name, d in comparison["difference"].items():
        print(
            f"{name}: {d['before']:.3f} -> {d['after']:.3f}, {d['difference']:+.3f} "
            f"[{d['low']:+.3f}, {d['high']:+.3f}], p {d['p']:.3g}"
        )
    print(f"McNemar: p {comparison['sign']:.3g}")
    ids = [[(row["id"], row["sample"]) for row in run] for run in rows]
    if ids[0] == ids[1]:
        old, new = (behaviors.shown_by([row["spans"] for row in run]) for run in rows)
        habits = behaviors.paired_difference(new, old, [name for name, _ in ids[0]])
        for name, (change, low, high) in habits.items():
            print(f"{name}: {change:+.3f} of the replies [{low:+.3f}, {high:+.3f}]")
    for way in ("gained", "lost"):
        print(f"{way}: {len(comparison[way])}", *comparison[way][:50])


def evaluate(cfg: Config) -> None:
    world, runs = distributed.start(cfg.dtype), runs_of(cfg)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    for run in runs if world.main else ():  # what is missing of the last is said before the first
        make_items(run)
        claim(run)
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
        show_table([*map(Path, cfg.table)])
    elif cfg.compare:
        show_comparison(*map(Path, cfg.compare))
    elif cfg.regrade:
        print(metrics.table({folder: finish(Path(folder)) for folder in cfg.regrade}))
    else:
        evaluate(cfg)


if __name__ == "__main__":
    run_main(main, Config)
