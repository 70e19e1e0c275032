r"""Scores a model on benchmarks: sample once, keep every reply, grade any time.

    Hub or directory ─benchmarks.py─▶ DIR/items.jsonl ─sampler─▶ DIR/records.jsonl
    items + records ─extract.py─▶ DIR/graded.jsonl ─metrics.py─▶ DIR/summary.json, DIR/gallery.html

items    the questions as they are asked, with their pictures, golds and groups
records  one reply a line, no verdict: appended as they come, so a run that is cut off goes on where
         it stopped; replies of two protocols are never mixed. Several ranks write one file each
graded   the verdicts, a pure function of the two: `--regrade DIR` makes them anew in seconds, with
         what judge.py has said in DIR/judged.jsonl beside them. A reply cut at the limit is
         `truncated` and wrong, and what cannot be read is `unparsed`: nothing is ever guessed

The paper gives no prompt, temperature, k or token limit for its tables, so ours stand beside every
number (DIR/protocol.json). The defaults are a reasoner's: 32k tokens, vLLM where it is installed,
temperature and k of the benchmark. The model is a HF directory, sampled on all ranks, or whatever
answers behind an OpenAI-compatible address.

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
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

from common import data, distributed
from common.client import Endpoint, Failure, each, user_message
from common.log import changes, fingerprint, progress, run_main, write_json
from evaluation import behaviors, benchmarks, extract, gallery, metrics
from evaluation.records import Appender, read_rows, write_rows
from reward import grade
from rollout import Rollout, address, open_sampler

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
            if run.samples > 1 and run.temperature == 0:
                raise ValueError(f"k = {run.samples} greedy samples are equal: set --temperature")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p {self.top_p} is not in (0, 1]")
        if self.forbid and self.url:
            raise ValueError("--forbid is for a model directory, not for a server")


@dataclass(frozen=True)
class Run:
    """One model on one benchmark."""

    cfg: Config
    bench: benchmarks.Benchmark | None  # None: --data
    name: str
    out: Path

    @property
    def samples(self) -> int:
        return self.cfg.k or (self.bench.k if self.bench else 1)

    @property
    def temperature(self) -> float:
        default = self.bench.temperature if self.bench else 0.0
        return self.cfg.temperature if self.cfg.temperature >= 0 else default


def runs_of(cfg: Config) -> list[Run]:
    if cfg.data:
        names, known = [*cfg.bench] or [Path(cfg.data).stem], [None]
    else:
        names = [*dict.fromkeys(benchmarks.named(name).name for name in cfg.bench)]
        known = [benchmarks.named(name) for name in names]
    home = Path(cfg.out or Path("out/eval") / short_name(cfg.model))
    alone = cfg.out and len(names) == 1
    places = [home if alone else home / name for name in names]
    return [Run(cfg, *of) for of in zip(known, names, places, strict=True)]


def short_name(model: str) -> str:
    """out/ovr_7b/rl/model -> ovr_7b_rl; Qwen/Qwen2.5-VL-7B -> Qwen_Qwen2.5-VL-7B"""
    parts = [part for part in Path(os.path.normpath(model)).parts if part not in ("/", "..")]
    parts = parts[parts[:1] == ["out"] :]
    return "_".join(parts[:-1] if parts[1:] and parts[-1] == "model" else parts) or "model"


def chosen_sampler(cfg: Config) -> str:
    if cfg.sampler != "auto":
        return cfg.sampler
    return "vllm" if find_spec("vllm") else "torch"


# ---- items


def make_items(run: Run) -> list[dict]:
    """items.jsonl, written once: what is asked must not change under the replies."""
    cfg, file = run.cfg, run.out / "items.jsonl"
    run.out.mkdir(parents=True, exist_ok=True)
    if not (file.exists() and read_records(run.out)):  # a failed start is forgotten
        if cfg.data:
            write_rows(file, items_of_data(run))
        else:
            own = Path(cfg.place, run.name) if cfg.place else None
            place = str(own) if own and own.exists() else cfg.place
            benchmarks.write_items(run.bench, place, run.out, cfg.limit)
    return read_rows(file)


def items_of_data(run: Run) -> list[dict]:
    items, here = [], os.path.abspath(run.out)
    for p in data.read_problems(run.cfg.data)[: run.cfg.limit or None]:
        if not all(isinstance(image, str) for image in p.images):
            raise ValueError(f"{run.cfg.data}: {p.id} has its pictures inside; write them as files")
        item = {"id": p.id, "source": p.source, "prompt": p.prompt, "answer": p.answer}
        item |= {"choices": p.choices, "precision": p.precision, "question": p.prompt}
        item["images"] = [os.path.relpath(os.path.abspath(image), here) for image in p.images]
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
    shown = {item["id"]: item["images"] for item in items}
    if pictures == "shuffled":
        shown = others(items, folder)
    if pictures == "blank":
        shown = {name: [blank(folder, image) for image in images] for name, images in shown.items()}
    return [
        data.Problem(
            item["id"],
            item["prompt"],
            str(item["answer"]),
            tuple(str(folder / image) for image in shown[item["id"]]),
        )
        for item in items
    ]


def others(items: list[dict], folder: Path) -> dict[str, list[str]]:
    """{id: the next other pictures among the items, as many, none of them its own}. By what the
    files hold: the questions of POPE or MME share a picture."""
    own = {item["id"]: tuple(digest(folder / name) for name in item["images"]) for item in items}
    names = {own[item["id"]]: item["images"] for item in items}
    sets, found = [*names], {}
    for at, key in enumerate(sets):
        later = (sets[(at + n) % len(sets)] for n in range(1, len(sets)))
        fits = (k for k in later if len(k) == len(key) and not set(k) & set(key))
        found[key] = names[next(fits, ())] if key else []
        if key and not found[key]:
            raise ValueError(f"--pictures shuffled: no other pictures to show for {names[key]}")
    return {name: found[key] for name, key in own.items()}


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


def protocol_of(run: Run) -> dict:
    """What may not change between the replies of a directory, and stands beside every number."""
    cfg = run.cfg
    told = {name: asdict(cfg)[name] for name in PROTOCOL} | {"bench": run.name}
    told |= {"k": run.samples, "temperature": run.temperature}
    told["sampler"] = "" if cfg.url else chosen_sampler(cfg)
    if cfg.forbid:
        told["forbid"] = cfg.forbid
    if cfg.data:
        told["rows"] = fingerprint(cfg.data)  # items.jsonl stays as it was written
    else:
        prompts = [item["prompt"] for item in read_rows(run.out / "items.jsonl")]
        ends = [how for how in benchmarks.KINDS if any(p.endswith(how) for p in prompts)]
        told["prompts"] = ends
    return told | {"items": fingerprint(run.out / "items.jsonl")}


def claim(run: Run) -> None:
    """ValueError if the directory holds replies of another protocol."""
    protocol, file = protocol_of(run), run.out / "protocol.json"
    before = json.loads(file.read_text()) if file.exists() and read_records(run.out) else protocol
    if found := "; ".join(changes(before, protocol)):
        raise ValueError(f"{run.out} holds replies of another protocol ({found}): another --out")
    write_json(file, protocol)


def read_records(out: Path) -> list[dict]:
    """All replies so far, whichever rank wrote them."""
    return [record for path in sorted(out.glob("records*.jsonl")) for record in read_rows(path)]


def settle(out: Path, items: list[dict]) -> None:
    """A complete run has one file of records, in the order of the items, each reply once."""
    places = {item["id"]: i for i, item in enumerate(items)}
    newest = {(record["id"], record["sample"]): record for record in read_records(out)}
    order = sorted(newest, key=lambda key: (places[key[0]], key[1]))
    write_rows(out / "records.jsonl", [newest[key] for key in order])
    for path in out.glob("records.rank*.jsonl"):
        path.unlink()


# ---- sampling


def sample(run: Run, world, opened: Callable) -> None:
    """Appends the missing replies. A sampler tries an item again as a whole if a reply is missing,
    its prompt is read once; of a server, which may cost, only what is missing is asked."""
    items = read_rows(run.out / "items.jsonl")
    done = {(record["id"], record["sample"]) for record in read_records(run.out)}
    world.wait()  # nobody writes before all have read
    problems = problems_of(items, run.out, run.cfg.pictures)
    count = Counter(name for name, _ in done)
    todo = [pair for pair in zip(items, problems, strict=True)
            if count[pair[0]["id"]] < run.samples]  # fmt: skip
    if not todo or (run.cfg.url and not world.main):  # a server is asked once, whatever the ranks
        return
    name = f"records.rank{world.rank}.jsonl" if world.size > 1 else "records.jsonl"
    write = Appender(run.out / name).add
    if run.cfg.url:
        return ask_server(run, todo, done, write)
    cfg, sampler = run.cfg, opened()
    size = min(CHUNK * cfg.sampler_batch // run.samples, math.ceil(len(todo) / world.size)) or 1
    chunks = [todo[at : at + size] for at in range(0, len(todo), size)]
    turns = distributed.my_problems(world, len(chunks), f"eval/{run.out}", dynamic=True)
    for turn in progress(turns, run.name, len(chunks)):
        chunk = chunks[turn]
        drawn = (run.samples, cfg.max_tokens, run.temperature, (cfg.seed,))
        for rollout in sampler.generate([problem for _, problem in chunk], *drawn):
            write(record_of(run, chunk[rollout.index][0], rollout))


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


def record_of(run: Run, item: dict, rollout: Rollout) -> dict:
    record = {"id": item["id"], "sample": rollout.sample, "seed": run.cfg.seed}
    record |= hashes(item, run.out) | {"response": rollout.text}
    finish = "stop" if rollout.stopped else "length"
    return record | {"finish": finish, "tokens": len(rollout.response_ids)}


def ask_server(run: Run, todo: list[tuple], done: set, write: Callable) -> None:
    """Records of a served model; what it fails at is told, and asked again by the same command."""
    cfg, failures = run.cfg, Counter()
    sampling = {"max_tokens": cfg.max_tokens, "temperature": run.temperature, "top_p": cfg.top_p}
    missing = [(*pair, n) for pair in todo for n in range(run.samples)
               if (pair[0]["id"], n) not in done]  # fmt: skip

    async def work(ask: Callable, job: tuple):
        item, problem, n = job
        message = user_message(problem.prompt, problem.images)
        seed = address((cfg.seed,), problem.id, n)
        reply = await ask(sampling | {"messages": [message], "seed": seed})
        if isinstance(reply, Failure):
            failures[f"{reply.error}: {reply.message}"] += 1
            return
        thought = "" if reply.thought is None else f"<think>\n{reply.thought}\n</think>\n\n"
        record = {"id": item["id"], "sample": n, "seed": cfg.seed} | hashes(item, run.out)
        record |= {"response": thought + reply.text, "finish": reply.finish}
        write(record | {"tokens": reply.completion_tokens})

    endpoint = Endpoint(cfg.url, cfg.model, cfg.key_env, cfg.concurrency)
    each(endpoint, progress(missing, run.name), work)
    for why, count in failures.most_common(5):
        print(f"{run.name}: {count} requests failed: {why}")
    if failures:
        lost = f"{failures.total()} of {len(missing)} replies are missing"
        raise ValueError(f"{run.name}: {lost}: give the command again")


# ---- grading


def graded(record: dict, item: dict, before: dict | None = None) -> dict:
    """The record with its verdict, what metrics group by, and its spans of behaviours: those of
    `before`, this reply's row of an earlier grading, if the lexicon has not changed since."""
    verdict = extract.grade(
        str(item["answer"]),
        record["response"],
        choices=item.get("choices"),
        precision=item.get("precision"),
        kind=item.get("kind"),
        finish=record["finish"],
    )
    row = record | {"score": verdict.score, "status": verdict.status, "rule": verdict.rule}
    about = ("source", "answer", "category", "group", "seen", "chance")
    row |= {name: item.get(name) for name in about}
    row |= {"extracted": verdict.answer, "image": bool(item["images"])}
    row["lexicon"], known = behaviors.VERSION, before or {}
    if known.get("lexicon") == behaviors.VERSION and known["response"] == record["response"]:
        return row | {"spans": known["spans"]}
    question = item.get("question") or item["prompt"]
    return row | {"spans": behaviors.find_in_thought(record["response"], question)}


def regrade(out: Path) -> list[dict]:
    """graded.jsonl anew from items, records, and the judge's word if it is there.

    ValueError names a record whose question has changed, and one without an item.
    """
    items = {item["id"]: item for item in read_rows(out / "items.jsonl")}
    judged, before = (
        {(row["id"], row["sample"]): row for row in read_rows(out / f"{name}.jsonl")}
        for name in ("judged", "graded")
    )
    asked, rows = cache(lambda name: hashes(items[name], out)), []
    for record in progress(read_records(out), "grading"):
        key = record["id"], record["sample"]
        if record["id"] not in items:
            raise ValueError(f"{out}: reply to {record['id']!r}, which is not among the items")
        if any(record[name] != value for name, value in asked(record["id"]).items()):
            raise ValueError(f"{out}: item {record['id']} is not what its reply was asked")
        row = graded(record, items[record["id"]], before.get(key))
        if key in judged:
            row["judge_score"] = judged[key]["judge_score"]
        rows.append(row)
    bench = bench_of(json.loads((out / "protocol.json").read_text()))
    if bench and bench.judge == "only":  # sentences: without a judge there is no score
        rows = [row | {"score": None} for row in rows]
    write_rows(out / "graded.jsonl", rows)
    return rows


def bench_of(protocol: dict) -> benchmarks.Benchmark | None:
    return None if protocol["data"] else benchmarks.named(protocol["bench"])


def same(a: str, b: str) -> bool:
    """Are two extracted answers one, for maj@k? 1/2 and 0.5 are."""
    return a == b or grade(a, f"\\boxed{{{b}}}", digits=6).score == 1


def finish(out: Path) -> dict:
    """Everything that follows from items and records. summary.json comes last, and whole: it says
    that a benchmark is done (runs/eval.sh)."""
    rows, items = regrade(out), read_rows(out / "items.jsonl")
    protocol = json.loads((out / "protocol.json").read_text())
    bench, paper = bench_of(protocol), {}
    if bench and len(items) > 0.95 * bench.size:  # a part of it is another benchmark
        paper = {of: ovr for of, (_, _, ovr) in bench.paper.items()}
        if bench.metric == "accuracy":
            paper.pop("mean", None)  # of the two MMMU-Pro: see show_table
    metric = bench.metric if bench else "accuracy"
    summary = metrics.summarise(metric, rows, items, paper, same)
    summary |= {"behaviors": behaviors.summarise(rows), "protocol": protocol}
    text = gallery.page(rows, items, out.name, protocol, out, (200, 0))  # gallery.py has more
    (out / "gallery.html").write_text(text, encoding="utf-8")
    write_json(out / "summary.json", summary)
    return summary


# ---- several directories


def show_table(folders: Iterable[str]) -> None:
    ends = Counter(Path(folder).name for folder in folders)
    names = {f: Path(f).name if ends[Path(f).name] == 1 else str(f) for f in folders}
    summaries = {names[f]: json.loads((Path(f) / "summary.json").read_text()) for f in folders}
    pro = {Path(f).name: f for f in folders if Path(f).name in ("mmmu_pro", "mmmu_pro_vision")}
    if len(pro) == 2:  # the paper's number is their mean
        parts = {name: read_rows(Path(folder) / "graded.jsonl") for name, folder in pro.items()}
        rows = metrics.as_parts(parts)
        items = [*{row["id"]: row for row in rows}.values()]
        paper = {"mean": benchmarks.named("mmmu_pro").paper["mean"][-1]}
        summaries["mmmu_pro, both"] = metrics.summarise("mean of parts", rows, items, paper)
    print(metrics.table(summaries))
    for name, summary in summaries.items():
        if "protocol" in summary:
            told = ", ".join(f"{k} {v}" for k, v in summary["protocol"].items() if k != "items")
            print(f"{name}: {told}")


def show_comparison(before: Path, after: Path) -> None:
    metric = json.loads((before / "summary.json").read_text())["metric"]
    rows = [read_rows(out / "graded.jsonl") for out in (before, after)]
    found = metrics.compare(metric, *rows)
    for name, d in found["difference"].items():
        print(
            f"{name}: {d['before']:.3f} -> {d['after']:.3f}, {d['difference']:+.3f} "
            f"[{d['low']:+.3f}, {d['high']:+.3f}], p {d['p']:.3g}"
        )
    print(f"McNemar: {found['mcnemar']}")
    ids = [[(row["id"], row["sample"]) for row in run] for run in rows]
    if ids[0] == ids[1]:
        old, new = (behaviors.shown_by([row["spans"] for row in run]) for run in rows)
        changes = behaviors.paired_difference(new, old, [name for name, _ in ids[0]])
        for name, (change, low, high) in changes.items():
            print(f"{name}: {change:+.3f} of the replies [{low:+.3f}, {high:+.3f}]")
    for way in ("gained", "lost"):
        print(f"{way}: {len(found[way])}: {' '.join(map(str, found[way][:50]))}")


def evaluate(cfg: Config) -> None:
    world, runs = distributed.start(cfg.dtype), runs_of(cfg)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    for run in runs if world.main else ():  # what is missing of the last is said before the first
        make_items(run)
        claim(run)
    opened = cache(lambda: open_for(cfg, world))
    for run in runs:
        world.wait()
        sample(run, world, opened)
        world.wait()
        if world.main:
            settle(run.out, read_rows(run.out / "items.jsonl"))
            print(metrics.table({run.name: finish(run.out)}), f"{run.out}", sep="\n", flush=True)
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
