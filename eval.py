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
number (DIR/protocol.json). The model is a HF directory, sampled by torch or vLLM on all ranks, or
whatever answers behind an OpenAI-compatible address.

    torchrun --nproc-per-node 8 eval.py --model out/rl/model --bench mathvision --sampler vllm \
        --max-tokens 32768 --kv-cache-gb 40 --out out/eval/rl/mathvision
    python eval.py --url http://127.0.0.1:8000/v1 --model ovr --bench math500 --out DIR
    python eval.py --model out/laptop/rl/model --data out/laptop/data/test.jsonl --out DIR
    python eval.py --regrade DIR                    # grade again; nothing is sampled
    python eval.py --table out/eval/rl/*            # all benchmarks of a model, the paper beside
    python eval.py --compare out/eval/coldstart/pope out/eval/rl/pope
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

from common import data, distributed
from common.client import Endpoint, Failure, ask_all, user_message
from common.log import changes, fingerprint, progress, run_main
from evaluation import behaviors, benchmarks, extract, metrics
from evaluation.gallery import page
from reward import grade
from rollout import Rollout, address, open_sampler

CHUNK = 64  # items that a rank samples between two writes


@dataclass(frozen=True)
class Config:
    """One model on one benchmark, or what is there looked at again."""

    model: str = ""  # HF directory or Hub name; with --url the name that the server knows
    bench: str = ""  # name in benchmarks.py; with --data any name
    place: str = ""  # local copy of the benchmark; empty: the Hub
    data: str = ""  # problems of one's own, as rl.py takes them, in place of a benchmark
    out: str = ""  # directory of this model and this benchmark
    k: int = 0  # samples an item; 0: the benchmark's (AIME 16, else 1)
    temperature: float = -1.0  # 0: greedy; -1: the benchmark's (AIME 1, else 0)
    max_tokens: int = 160  # of a reply: the miniature's; a reasoner of 7B wants 32768
    prompt_tokens: int = 4096  # vllm's room for a prompt; a picture of a megapixel takes 1,300
    pictures: Literal["true", "blank", "shuffled"] = "true"  # controls: is the picture looked at?
    forbid: tuple[str, ...] = ()  # tokens never drawn: is this word what brings the answers?
    limit: int = 0  # first items (or groups) only; 0: all
    seed: int = 0
    sampler: Literal["torch", "vllm"] = "torch"
    sampler_batch: int = 256  # replies that a rank samples at once
    kv_cache_gb: float = 0.25  # vllm's room for keys and values, a rank; 7B: 57 kB a token
    dtype: str = "auto"  # bfloat16 on GPUs, float32 on CPUs
    threads: int = 0  # CPU threads a process; 0 shares the cores out
    url: str = ""  # OpenAI-compatible address, ends in /v1, in place of a sampler
    key_env: str = ""  # NAME of the environment variable that holds its key
    concurrency: int = 64  # requests in flight
    regrade: str = ""  # directory: grade its records again
    table: tuple[str, ...] = ()  # directories: their scores as one table
    compare: tuple[str, ...] = ()  # two directories of one benchmark: before, after

    def __post_init__(self):
        if self.regrade or self.table or self.compare:
            if self.compare and len(self.compare) != 2:
                raise ValueError("--compare takes two directories: before, after")
            return
        if not (self.model and self.out and (self.bench or self.data)):
            raise ValueError(
                "give --model, --out and --bench or --data (or --regrade, --table, --compare)"
            )
        if not self.data:
            benchmarks.named(self.bench)  # says which there are
        if self.samples > 1 and self.heat == 0:
            raise ValueError(f"k = {self.samples} greedy samples are the same: set --temperature")
        if self.forbid and self.url:
            raise ValueError("--forbid is for a model directory, not for a server")

    @property
    def samples(self) -> int:
        return self.k or (1 if self.data else benchmarks.named(self.bench).k)

    @property
    def heat(self) -> float:
        """The temperature of sampling."""
        if self.temperature >= 0:
            return self.temperature
        return 0.0 if self.data else benchmarks.named(self.bench).temperature


# ---- items


def read_rows(path: Path) -> list[dict]:
    """The rows of a JSONL file; none if it is not there. A last line that a kill cut off is cut."""
    if not path.exists():
        return []
    with path.open("rb+") as file:
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
        file.seek(0)
        return [json.loads(line) for line in file]


def write_rows(path: Path, rows: Iterable[dict]):
    part = path.with_suffix(".part")
    with part.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    part.replace(path)


def make_items(cfg: Config) -> list[dict]:
    """items.jsonl, written once: what is asked must not change under the replies."""
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "items.jsonl"
    if not (file.exists() and read_records(out)):  # what failed before its first reply is forgotten
        write_rows(file, items_of_data(cfg) if cfg.data else items_of_benchmark(cfg))
    return read_rows(file)


def items_of_benchmark(cfg: Config) -> list[dict]:
    options = {"images_to": Path(cfg.out) / "images", "limit": cfg.limit or None}
    found = list(progress(benchmarks.read(cfg.bench, cfg.place or None, **options), cfg.bench))
    lost = [row for row in found if isinstance(row, benchmarks.Dropped)]
    for reason, count in Counter(row.reason for row in lost).items():
        named = [row.id for row in lost if row.reason == reason][:5]
        print(f"{cfg.bench}: {count} items are left out: {reason}, as {named}")
    return [row for row in found if isinstance(row, dict)]


def items_of_data(cfg: Config) -> list[dict]:
    problems = data.read_problems(cfg.data)[: cfg.limit or None]
    here, items = os.path.abspath(cfg.out), []
    for p in problems:
        item = {"id": p.id, "source": p.source, "prompt": p.prompt, "answer": p.answer}
        item |= {"choices": p.choices, "precision": p.precision, "question": p.prompt}
        if not all(isinstance(image, str) for image in p.images):
            raise ValueError(f"{cfg.data}: {p.id} has its pictures inside; write them as files")
        item["images"] = [os.path.relpath(os.path.abspath(image), here) for image in p.images]
        kind = "image" if p.images else "text"
        items.append({k: v for k, v in item.items() if v is not None} | {"category": kind})
    return items


def hashes(item: dict, folder: Path) -> dict[str, str]:
    """Of what is asked: they tie a reply to its question."""
    pixels = b"".join((folder / name).read_bytes() for name in item["images"])
    text, shown = (hashlib.sha256(x).hexdigest()[:16] for x in (item["prompt"].encode(), pixels))
    return {"prompt_hash": text, "image_hash": shown if item["images"] else ""}


# ---- sampling


PROTOCOL = "model bench data limit k temperature max_tokens pictures seed sampler url".split()


def protocol_of(cfg: Config) -> dict:
    """What may not change between the replies of a directory, and stands beside every number."""
    said = {name: asdict(cfg)[name] for name in PROTOCOL}
    said |= {"k": cfg.samples, "temperature": cfg.heat, "top_p": 1.0}
    if cfg.forbid:
        said["forbid"] = cfg.forbid
    if cfg.data:
        said["rows"] = fingerprint(cfg.data)  # items.jsonl stays as it was written
    else:
        said["prompts"] = benchmarks.named(cfg.bench).prompts
    return json.loads(json.dumps(said | {"items": fingerprint(Path(cfg.out) / "items.jsonl")}))


def claim(out: Path, protocol: dict) -> None:
    """ValueError if the directory holds replies of another protocol."""
    file = out / "protocol.json"
    before = json.loads(file.read_text()) if file.exists() and read_records(out) else protocol
    if found := "; ".join(changes(before, protocol)):
        raise ValueError(f"{out} holds replies of another protocol ({found}): another --out")
    file.write_text(json.dumps(protocol, indent=1))


def read_records(out: Path) -> list[dict]:
    """All replies so far, whichever rank wrote them."""
    return [record for path in sorted(out.glob("records*.jsonl")) for record in read_rows(path)]


def settle(out: Path, items: list[dict]) -> None:
    """A complete run has one file of records, in the order of the items, each reply once."""
    write_rows(out / "records.jsonl", latest(read_records(out), [item["id"] for item in items]))
    for path in out.glob("records.rank*.jsonl"):
        path.unlink()


def latest(records: list[dict], order: list[str]) -> list[dict]:
    """One record a (id, sample), the newest, in the order of the items."""
    places, found = {name: i for i, name in enumerate(order)}, {}
    for record in records:
        found[record["id"], record["sample"]] = record
    return sorted(found.values(), key=lambda r: (places[r["id"]], r["sample"]))


def problem_of(item: dict, folder: Path, picture: Path | None) -> data.Problem:
    """What the sampler takes. picture: of another item, in place of the first one."""
    images = [str(folder / name) for name in item["images"]]
    if images and picture is not None:
        images[0] = str(picture)
    return data.Problem(item["id"], item["prompt"], str(item["answer"]), tuple(images))


def problems_of(items: list[dict], folder: Path, pictures: str) -> list[data.Problem]:
    """The controls: all pictures blank, of their size; or each item shown the next one's."""
    shown = [item for item in items if item["images"]]
    names = [folder / item["images"][0] for item in shown]
    after = dict(zip((i["id"] for i in shown), names[1:] + names[:1], strict=True))
    problems = [
        problem_of(item, folder, after.get(item["id"]) if pictures == "shuffled" else None)
        for item in items
    ]
    if pictures == "blank":
        return [replace(p, images=tuple(blank(image) for image in p.images)) for p in problems]
    return problems


def blank(path: str) -> Image.Image:
    with Image.open(path) as image:
        return Image.new("RGB", image.size, "white")


def record_of(rollout: Rollout, asked: dict, seed: int) -> dict:
    said = {"id": rollout.problem.id, "sample": rollout.sample, "seed": seed} | asked
    finish = "stop" if rollout.stopped else "length"
    return said | {
        "response": rollout.text,
        "finish": finish,
        "tokens": len(rollout.response_ids),
    }


def sample(cfg: Config, items: list[dict], world) -> None:
    """Appends the missing replies. A sampler tries an item again as a whole if a reply is missing,
    its prompt is read once; of a server, which may cost, only what is missing is asked."""
    out = Path(cfg.out)
    done = {(record["id"], record["sample"]) for record in read_records(out)}
    count = Counter(name for name, _ in done)
    world.wait()  # nobody writes before all have read
    todo = [item for item in items if count[item["id"]] < cfg.samples]
    if not todo:
        return
    problems = problems_of(todo, out, cfg.pictures)
    chunks = [range(at, min(at + CHUNK, len(todo))) for at in range(0, len(todo), CHUNK)]
    if cfg.url:
        replies = ask_endpoint(cfg, todo, problems, done)
    else:
        room = cfg.sampler_batch, cfg.prompt_tokens + cfg.max_tokens, cfg.kv_cache_gb
        directory = data.model_directory(cfg.model)
        sampler = open_sampler(cfg.sampler, directory, world, room, cfg.forbid)
        drawn = (cfg.samples, cfg.max_tokens, cfg.heat, (cfg.seed,))
        turns = distributed.my_problems(world, len(chunks), f"eval/{cfg.out}", dynamic=True)
        asked = lru_cache(None)(lambda i: hashes(todo[i], out))
        replies = (
            record_of(rollout, asked(chunk[rollout.index]), cfg.seed)
            for chunk in (chunks[turn] for turn in progress(turns, cfg.bench, len(chunks)))
            for rollout in sampler.generate([problems[i] for i in chunk], *drawn)
        )
    name = f"records.rank{world.rank}.jsonl" if world.size > 1 else "records.jsonl"
    with (out / name).open("a", encoding="utf-8") as file:
        for record in replies:
            file.write(json.dumps(record) + "\n")
            file.flush()  # a kill loses no reply that came


def ask_endpoint(
    cfg: Config, items: list[dict], problems: list[data.Problem], done: set[tuple[str, int]]
) -> Iterator[dict]:
    """Records of a served model; what it fails at is told, and asked again by the same command."""
    if cfg.pictures == "blank":
        raise ValueError("--pictures blank is for a model directory, not for a server")
    endpoint = Endpoint(cfg.url, cfg.model, cfg.key_env, cfg.concurrency)
    out, failures = Path(cfg.out), Counter()
    sampling = {"max_tokens": cfg.max_tokens, "temperature": cfg.heat, "top_p": 1.0}

    def jobs():
        for i, p in enumerate(problems):
            message = user_message(p.prompt, [Path(image) for image in p.images])
            for n in (n for n in range(cfg.samples) if (p.id, n) not in done):
                seed = address((cfg.seed,), p.id, n)
                yield (i, n), sampling | {"messages": [message], "seed": seed}

    total = sum((p.id, n) not in done for p in problems for n in range(cfg.samples))
    for (i, n), reply in progress(ask_all(endpoint, jobs()), cfg.bench, total):
        if isinstance(reply, Failure):
            failures[f"{reply.error}: {reply.message}"] += 1
            continue
        thought = "" if reply.thought is None else f"<think>\n{reply.thought}\n</think>\n\n"
        said = {"id": items[i]["id"], "sample": n, "seed": cfg.seed} | hashes(items[i], out)
        said |= {"response": thought + reply.text, "finish": reply.finish}
        yield said | {"tokens": reply.completion_tokens}
    for why, count in failures.most_common(5):
        print(f"{cfg.bench}: {count} requests failed: {why}")
    if failures:
        raise SystemExit(
            f"{failures.total()} of {total} replies are missing: give the command again"
        )


# ---- grading


def graded(record: dict, item: dict) -> dict:
    """The record with its verdict and what metrics group by."""
    options = {"choices": item.get("choices"), "precision": item.get("precision")}
    options |= {"kind": item.get("kind"), "finish": record["finish"]}
    verdict = extract.grade(str(item["answer"]), record["response"], **options)
    row = record | {"score": verdict.score, "status": verdict.status, "rule": verdict.rule}
    about = {name: item.get(name) for name in ("source", "answer", "category", "group", "seen")}
    return row | about | {"extracted": verdict.answer, "image": bool(item["images"])}


def regrade(out: Path) -> list[dict]:
    """graded.jsonl anew from items, records, and the judge's word if it is there.

    ValueError names a record whose question has changed, and one without an item.
    """
    items = {item["id"]: item for item in read_rows(out / "items.jsonl")}
    rows, judged = [], {(r["id"], r["sample"]): r for r in read_rows(out / "judged.jsonl")}
    asked = lru_cache(None)(lambda name: hashes(items[name], out))
    for record in read_records(out):
        if record["id"] not in items:
            raise ValueError(f"{out}: reply to {record['id']!r}, which is not among the items")
        if any(record[name] != value for name, value in asked(record["id"]).items()):
            raise ValueError(f"{out}: item {record['id']} is not what its reply was asked")
        row = graded(record, items[record["id"]])
        if verdict := judged.get((record["id"], record["sample"])):
            row["judge_score"] = verdict["judge_score"]
        rows.append(row)
    if only_judge(json.loads((out / "protocol.json").read_text())):
        rows = [row | {"score": None} for row in rows]
    write_rows(out / "graded.jsonl", rows)
    return rows


def only_judge(protocol: dict) -> bool:
    """MM-Vet's answers are sentences that no rule can grade: without a judge it has no score."""
    return not protocol["data"] and benchmarks.named(protocol["bench"]).judge == "only"


def same(a: str, b: str) -> bool:
    """Are two extracted answers one, for maj@k? 1/2 and 0.5 are."""
    return a == b or grade(a, f"\\boxed{{{b}}}", digits=6).score == 1


def summarise(out: Path, rows: list[dict]) -> dict:
    """What summary.json holds: scores with intervals, chance, statuses, habits, the protocol."""
    protocol = json.loads((out / "protocol.json").read_text())
    items, metric, paper = read_rows(out / "items.jsonl"), "accuracy", {}
    if not protocol["data"]:
        bench = benchmarks.named(protocol["bench"])
        metric = bench.metric
        if len(items) > 0.95 * bench.size:  # a part of it is another benchmark
            paper = {p.of: p.ovr for p in bench.paper if p.ovr is not None}
        if metric == "accuracy":
            paper.pop("mean", None)  # of the two MMMU-Pro: see show_table
    summary = metrics.summarise(metric, rows, items=items, paper=paper, same=same)
    asked = {item["id"]: item.get("question") or item["prompt"] for item in items}
    summary |= {"behaviors": habits(rows, asked), "protocol": protocol}
    return summary


def habits(rows: list[dict], asked: dict[str, str]) -> dict:
    """What the lexicon finds in the thoughts: CBR, BTR, and what is behind them. A lexicon shows
    trends; judge.py asks a model, as the paper does."""
    thoughts = [
        behaviors.without_echo(behaviors.thinking(row["response"]), asked[row["id"]])
        for row in rows
    ]
    counts, tokens = behaviors.counts(thoughts), [row["tokens"] for row in rows]
    transfer = behaviors.transfer_rates(counts)
    found = {
        "rates": behaviors.rates(counts),
        "without_visual": behaviors.spoken_rates(thoughts),  # sentences that are both left out
        "transfer": {visual: ratio for (_, visual), ratio in transfer.items()},
        "by_score": behaviors.rates_by_score(counts, [row["score"] for row in rows]),
    }
    if None not in tokens:  # a server may not count
        found["per_1000_tokens"] = behaviors.mean_counts(counts, tokens)
        begun = counts.copy()
        for i, (thought, n) in enumerate(zip(thoughts, tokens, strict=True)):
            if (start := behaviors.opening(thought, n)) != thought:
                begun[i] = behaviors.counts([start])
        found["first_2000_tokens"] = behaviors.rates(begun)
    return found


def finish(out: Path) -> dict:
    """Everything that follows from items and records. summary.json comes last, and whole: it says
    that a benchmark is done (runs/eval.sh)."""
    rows = regrade(out)
    summary, items = summarise(out, rows), read_rows(out / "items.jsonl")
    text = page(rows, items, out.name, summary["protocol"], out, limit=200)  # gallery.py has more
    (out / "gallery.html").write_text(text, encoding="utf-8")
    part = out / "summary.part"
    part.write_text(json.dumps(summary, indent=1))
    part.replace(out / "summary.json")
    return summary


# ---- several directories


def show_table(folders: Iterable[str]) -> None:
    summaries = {Path(f).name: json.loads((Path(f) / "summary.json").read_text()) for f in folders}
    pro = {name: folder for folder in folders if (name := Path(folder).name).startswith("mmmu_pro")}
    if len(pro) == 2:  # the paper's number is their mean
        parts = {name: read_rows(Path(folder) / "graded.jsonl") for name, folder in pro.items()}
        said = {"mean": benchmarks.named("mmmu_pro").paper[0].ovr}
        both = metrics.summarise("mean of parts", metrics.as_parts(parts), paper=said)
        summaries["mmmu_pro, both"] = both
    print(metrics.table(summaries))
    for name, summary in summaries.items():
        if "protocol" in summary:
            told = ", ".join(f"{k} {v}" for k, v in summary["protocol"].items() if k != "items")
            print(f"{name}: {told}")


def show_comparison(before: Path, after: Path) -> dict:
    summary = json.loads((before / "summary.json").read_text())
    rows = [read_rows(out / "graded.jsonl") for out in (before, after)]
    found = metrics.compare(summary["metric"], *rows)
    for name, d in found["difference"].items():
        print(
            f"{name}: {d['before']:.3f} -> {d['after']:.3f}, {d['difference']:+.3f} "
            f"[{d['low']:+.3f}, {d['high']:+.3f}], p {d['p']:.3g}"
        )
    print(f"McNemar: {found['mcnemar']}")
    texts = [[behaviors.thinking(row["response"]) for row in run] for run in rows]
    if [(r["id"], r["sample"]) for r in rows[0]] == [(r["id"], r["sample"]) for r in rows[1]]:
        changes = behaviors.paired_difference(*reversed(texts), [row["id"] for row in rows[0]])
        for name, (change, low, high) in changes.items():
            print(f"{name}: {change:+.3f} of the replies [{low:+.3f}, {high:+.3f}]")
    for way in ("gained", "lost"):
        print(f"{way}: {len(found[way])}: {' '.join(map(str, found[way][:50]))}")
    return found


def main(cfg: Config):
    if cfg.table:
        return show_table(cfg.table)
    if cfg.compare:
        return show_comparison(*map(Path, cfg.compare))
    out, world = Path(cfg.regrade or cfg.out), None
    if not cfg.regrade:
        world = distributed.start(cfg.dtype)
        if cfg.threads:
            torch.set_num_threads(cfg.threads)
        if world.main:
            make_items(cfg)
            claim(out, protocol_of(cfg))
        world.wait()
        items = read_rows(out / "items.jsonl")
        sample(cfg, items, world)
        world.wait()
        if world.main:
            settle(out, items)
    if world is None or world.main:
        print(metrics.table({out.name: finish(out)}))
    if world is not None:
        distributed.finish(world)


if __name__ == "__main__":
    run_main(main, Config)
