"""Scores a model on problems with known answers: sample once, keep everything, grade any time.

    problems.jsonl ─sampler─▶ DIR/records.jsonl ─grade─▶ DIR/summary.json

A record holds the reply, its verdict and how it was drawn, so that a number can be looked into and
graded again by a better matcher without sampling again. Records are appended as they come: a run
that is cut off goes on where it stopped, and refuses to mix replies of two protocols. A reply that
was cut at the token limit is `truncated` and wrong, never graded by what stands in it so far.

Accuracy is the mean over problems of the mean over k samples (avg@k; with k = 1 and temperature 0
the greedy accuracy). Its standard error is taken over problems, not over samples: the k samples of
one problem are not independent.

    python eval.py --model out/laptop/rl/model --data out/laptop/data/test.jsonl --out DIR
    python eval.py ... --k 4 --temperature 1        # avg@4 at temperature 1
    python eval.py --regrade DIR --data ...         # grade DIR/records.jsonl again
"""

import json
import math
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro

import behaviors
import data
from model import load_model
from reward import grade
from rollout import Rollout, TorchSampler
from runlog import progress

CHUNK = 64  # problems between two writes of records.jsonl


@dataclass(frozen=True)
class Config:
    """One model on one benchmark."""

    data: str  # problems: JSONL, parquet, Hub id
    out: str = ""  # directory of records.jsonl and summary.json
    model: str = ""  # HF directory
    bench: str = "toy"  # name of the benchmark, for the tables
    k: int = 1  # samples a problem
    temperature: float = 0.0  # 0: greedy
    max_tokens: int = 160  # of a reply
    limit: int = 0  # first problems only; 0: all
    seed: int = 0
    regrade: str = ""  # directory whose records are graded again; nothing is sampled
    threads: int = 0  # CPU threads; 0: torch's choice

    def __post_init__(self):
        if not self.regrade and not (self.model and self.out):
            raise ValueError("give --model and --out, or --regrade DIR")
        if self.k > 1 and self.temperature == 0:
            raise ValueError(f"k = {self.k} greedy samples are all the same: set --temperature")


PROTOCOL = ("bench", "data", "model", "k", "temperature", "max_tokens", "seed")  # may not change


def judged(problem: data.Problem, record: dict) -> dict:
    """The record with its verdict. A truncated reply is wrong whatever it says."""
    if record["finish"] == "length":
        return record | {"score": 0.0, "status": "truncated", "extracted": None}
    options = {"choices": problem.choices, "precision": problem.precision}
    options["digits"] = 6  # 3.14159 is pi here, not in RL
    v = grade(problem.answer, record["response"], **options)
    return record | {"score": v.score, "status": v.status, "extracted": v.answer}


def record_of(rollout: Rollout, seed: int) -> dict:
    """What records.jsonl keeps of a reply, before its verdict."""
    problem = rollout.problem
    return {
        "id": problem.id,
        "sample": rollout.sample,
        "seed": seed,
        "source": problem.source,
        "image": bool(problem.images),
        "prompt": problem.prompt,
        "response": rollout.text,
        "answer": problem.answer,
        "finish": "stop" if rollout.stopped else "length",
        "tokens": len(rollout.response_ids),
    }


def accuracy(records: list[dict]) -> tuple[float, float]:
    """avg@k and its standard error over problems: sd of the problems' means / sqrt(problems)."""
    by_problem = defaultdict(list)
    for record in records:
        by_problem[record["id"]].append(record["score"])
    means = [sum(scores) / len(scores) for scores in by_problem.values()]
    n = len(means)
    mean = sum(means) / n
    variance = sum((m - mean) ** 2 for m in means) / max(1, n - 1)
    return mean, math.sqrt(variance / n)


def summarise(records: list[dict], protocol: dict) -> dict:
    """Accuracy, statuses, lengths and behaviour rates by kind of problem, and the protocol."""
    kinds = {"all": records}
    kinds |= {
        "image": [r for r in records if r["image"]],
        "text": [r for r in records if not r["image"]],
    }
    summary = {"protocol": protocol}
    for kind, rows in kinds.items():
        if not rows:
            continue
        mean, error = accuracy(rows)
        summary[kind] = {
            "accuracy": mean,
            "standard_error": error,
            "problems": len({r["id"] for r in rows}),
            "samples": len(rows),
            "tokens": sum(r["tokens"] for r in rows) / len(rows),
            "status": dict(Counter(r["status"] for r in rows)),
            "behaviors": behaviors.rates([r["response"] for r in rows]),
        }
    return summary


def read_records(path: Path) -> list[dict]:
    """The records so far; a last line that was cut off by a kill is dropped, and sampled again."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    if len(whole) < len(lines):
        path.write_text("".join(whole))
    return [json.loads(line) for line in whole]


def write_records(path: Path, records: list[dict]):
    """All records anew; renamed when complete, because a reply costs more than its verdict."""
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(record) + "\n" for record in records))
    part.replace(path)


def claim(out: Path, protocol: dict) -> list[dict]:
    """Records of an earlier, unfinished run. ValueError if its protocol was another one."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "protocol.json"
    if file.exists() and (before := json.loads(file.read_text())) != protocol:
        changed = [
            f"{k} {before.get(k)!r} -> {v!r}" for k, v in protocol.items() if before.get(k) != v
        ]
        raise ValueError(
            f"{out} holds replies of another protocol ({'; '.join(changed)}): use another --out"
        )
    file.write_text(json.dumps(protocol, indent=1))
    return read_records(out / "records.jsonl")


def sample(cfg: Config, problems: list, out: Path) -> list[dict]:
    """All records of the benchmark, those on disk and the missing ones."""
    records = claim(out, {name: asdict(cfg)[name] for name in PROTOCOL})
    count = Counter(r["id"] for r in records)
    todo = [p for p in problems if count[p.id] < cfg.k]
    asked, again = {p.id for p in problems}, {p.id for p in todo}
    records = [r for r in records if r["id"] not in again]  # those outside --limit stay on disk
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    directory = data.model_directory(cfg.model)
    tokenizer = data.load_tokenizer(directory)
    model = load_model(directory, dtype, device)
    sampler = TorchSampler(model, tokenizer, data.load_image_settings(directory))
    write_records(out / "records.jsonl", records)
    with (out / "records.jsonl").open("a") as file:
        for start in progress(range(0, len(todo), CHUNK), cfg.bench):
            part = todo[start : start + CHUNK]
            rollouts = sampler.generate(part, cfg.k, cfg.max_tokens, cfg.temperature, (cfg.seed,))
            for rollout in rollouts:
                record = judged(rollout.problem, record_of(rollout, cfg.seed))
                records.append(record)
                file.write(json.dumps(record) + "\n")
            file.flush()
    return [r for r in records if r["id"] in asked]


def main(cfg: Config):
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    problems = list(data.read_problems(cfg.data))
    if twice := [name for name, n in Counter(p.id for p in problems).items() if n > 1]:
        raise ValueError(f"{cfg.data}: ids {twice[:5]} stand more than once; each needs its own")
    out = Path(cfg.regrade or cfg.out)
    if cfg.regrade:
        by_id = {p.id: p for p in problems}
        records = [judged(by_id[r["id"]], r) for r in read_records(out / "records.jsonl")]
        write_records(out / "records.jsonl", records)
        protocol = json.loads((out / "protocol.json").read_text())
    else:
        records = sample(cfg, problems[: cfg.limit or None], out)
        protocol = {name: asdict(cfg)[name] for name in PROTOCOL}
    summary = summarise(records, protocol)
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    for kind in ("image", "text"):
        if kind in summary:
            s = summary[kind]
            shown = f"{s['accuracy']:.3f} +- {s['standard_error']:.3f}"
            size = f"n {s['problems']} x {protocol['k']}"
            print(f"{protocol['bench']} {kind:5} {shown}  {size}  {s['tokens']:.0f} tokens")


if __name__ == "__main__":
    main(tyro.cli(Config))
