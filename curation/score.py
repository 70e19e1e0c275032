r"""Stage 0: what a model says about each row, from which curate.py decides what to drop.

    rows.jsonl ─▶ any free rank ─▶ X.rank0.part.jsonl, X.rank1.part.jsonl, ... ─▶ X.jsonl

loss    {"id", "loss", "tokens"}: nats a token of the response given the prompt, by a small
        pretrained model that reads plain text
passes  {"id", "passes", "samples", "truncated", "no_box", "tokens" of the mean try}: how many tries
        by the cold-start model are right and whole

What cannot be measured is null, and "why". After a kill the same command goes on, on any number of
ranks, to the same bytes (vLLM: up to rounding). Several nodes share --out's folder.

    torchrun -m curation.score --rows out/data/sft.jsonl --kind loss --model Qwen/Qwen2.5-0.5B \
        --out out/data/sft.losses.jsonl
    torchrun --nproc-per-node 8 -m curation.score --rows out/data/rl.jsonl --kind passes \
        --sampler vllm --model out/coldstart/model --kv-cache-gb 40 --out out/data/rl.passes.jsonl
"""

import glob
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import data, distributed
from common.log import beside, fingerprint, progress, run_main, write_report
from common.records import Appender, claim, read_rows, write_rows
from reward import grade
from rollout import Rollout, open_sampler

GAP = "\n\n"  # between prompt and response, for a model that knows no chat
PROTOCOL = {  # what a record depends on
    "loss": "kind model tokens".split(),
    "passes": "kind model samples max_tokens prompt_tokens temperature sampler seed".split(),
}


@dataclass(frozen=True)
class Config:
    """One model on all rows. The paper gives no numbers for this step: all are ours."""

    rows: str  # {"prompt", "response"} or {"prompt", "answer"}: JSONL, parquet, Hub id
    kind: Literal["loss", "passes"]
    model: str  # HF directory or Hub name; loss: any causal LM of text
    out: str  # JSONL to write; while it grows, X.protocol.json and X.rank*.part.jsonl stand beside
    tokens: int = 4096  # loss: of prompt and response; what comes after is not read
    samples: int = 8  # passes: tries a problem
    max_tokens: int = 16_384  # passes: of a response; the paper's RL begins at 24k
    prompt_tokens: int = 2048  # passes: longer prompts are not tried, and say so
    temperature: float = 1.0  # passes: of sampling, RL's
    sampler: Literal["torch", "vllm"] = "torch"  # passes; vllm from some 10 M parameters on
    sampler_batch: int = 256  # passes: responses that a rank samples at once
    kv_cache_gb: float = 0.25  # vllm's room for keys and values, a rank; 7B: 57 kB a token
    chunk: int = 256  # rows that a rank takes at a time; a kill costs so many tries
    seed: int = 0

    def __post_init__(self):
        if Path(self.out).suffix != ".jsonl":
            raise ValueError(f"--out {self.out} must be a .jsonl file: others stand beside it")
        if Path(self.out).resolve() == Path(self.rows).resolve():
            raise ValueError(f"--out {self.out} is the input and would be overwritten")
        counts = "samples tokens max_tokens prompt_tokens sampler_batch chunk".split()
        if zero := [name for name in counts if getattr(self, name) < 1]:
            raise ValueError(f"--{zero[0].replace('_', '-')} counts from 1")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"{self.samples} greedy tries are all the same: set --temperature")


@torch.no_grad()
def loss_record(example: data.Example, tokenizer, model, tokens: int) -> dict:
    """{"id", "loss": nats a token or null, "tokens": of the response that were scored, "why"?}.
    Prompt and response are cut into tokens apart, so that none holds an end of the one and a
    beginning of the other. The prompt gets what the tokenizer puts before a text, if anything; a
    picture is the word <image>. Only the response is cut to what `tokens` leave it. A row at a
    time: 4096 tokens fill a GPU. Their logits are 4096 x 152k x 2 B = 1.2 GB in bfloat16; the
    softmax is in float32, for in bfloat16 it is off by 0.02 on average."""
    prompt_ids = tokenizer.encode(example.prompt + GAP)
    response_ids = tokenizer.encode(example.response, add_special_tokens=False)
    response_ids = response_ids[: max(0, tokens - len(prompt_ids))]
    record = {"id": example.id, "loss": None, "tokens": len(response_ids)}
    if not response_ids:
        why = f"a prompt of {len(prompt_ids)} tokens leaves none of {tokens} to a response"
        return record | {"why": why}
    ids = torch.tensor(prompt_ids + response_ids, device=model.device)
    logits = model(input_ids=ids[None], use_cache=False).logits[0, len(prompt_ids) - 1 : -1]
    loss = F.cross_entropy(logits.float(), ids[len(prompt_ids) :]).item()
    if not math.isfinite(loss):  # JSON has no NaN
        return record | {"why": "the loss is not finite"}
    return record | {"loss": round(loss, 6)}


def pass_record(problem: data.Problem, tries: list[Rollout]) -> dict:
    """no_box counts what rl.py counts: no box, or one that is not closed, in cut responses too."""
    options = dict(choices=problem.choices, precision=problem.precision)
    verdicts = [grade(problem.answer, r.text, **options) for r in tries]
    return {
        "id": problem.id,
        "passes": sum(v.score == 1 and r.stopped for v, r in zip(verdicts, tries, strict=True)),
        "samples": len(tries),
        "truncated": sum(not r.stopped for r in tries),
        "no_box": sum(v.status in ("no_box", "unclosed") for v in verdicts),
        "tokens": round(sum(len(r.response_ids) for r in tries) / len(tries), 1),
    }


def scorer(cfg: Config, directory: str, world) -> Callable[[Sequence], list[dict]]:
    """-> rows to records, by the model, which all ranks load together."""
    if cfg.kind == "loss":
        try:
            model = AutoModelForCausalLM.from_pretrained(directory, dtype=world.dtype)
        except (OSError, ValueError) as error:
            raise ValueError(f"{cfg.model} is no causal LM of text ({str(error):.300})") from error
        longest = getattr(model.config, "max_position_embeddings", None) or cfg.tokens
        if longest < cfg.tokens:
            raise ValueError(f"{cfg.model} reads {longest} tokens: --tokens {longest}")
        tools = AutoTokenizer.from_pretrained(directory), model.to(world.device).eval()
        return lambda examples: [loss_record(example, *tools, cfg.tokens) for example in examples]

    room = cfg.sampler_batch, cfg.prompt_tokens + cfg.max_tokens, cfg.kv_cache_gb
    sampler = open_sampler(cfg.sampler, directory, world, room)

    def passes(problems: Sequence[data.Problem]) -> list[dict]:
        tools, tries = (sampler.tokenizer, sampler.settings), defaultdict(list)
        lengths = [data.prompt_length(p, *tools) for p in problems]
        fitting = [p for p, n in zip(problems, lengths, strict=True) if n <= cfg.prompt_tokens]
        options = cfg.samples, cfg.max_tokens, cfg.temperature, (cfg.seed,)
        for rollout in sampler.generate(fitting, *options):
            tries[rollout.problem.id].append(rollout)
        untried = {"passes": None, "why": f"prompt longer than {cfg.prompt_tokens} tokens"}
        return [
            pass_record(p, tries[p.id]) if p.id in tries else {"id": p.id} | untried
            for p in problems
        ]

    return passes


def parts_of(out: str) -> list[Path]:
    """What ranks have written, of this start or an earlier one with another number of them."""
    return sorted(Path(out).parent.glob(glob.escape(beside(out, "rank").name) + "*.part.jsonl"))


def records_of(out: str) -> dict[str, dict]:
    """Of every row measured so far, by its id."""
    return {row["id"]: row for path in (*parts_of(out), Path(out)) for row in read_rows(path)}


def finish(cfg: Config, rows: list[tuple[str, str]]) -> None:
    """Parts become one file in the order of the input; a kill on the way is made good by a restart.
    rows: (id, source) of each. A line for each source is printed and reported."""
    records, values, summary = records_of(cfg.out), defaultdict(list), {}
    write_rows(Path(cfg.out), [records[name] for name, _ in rows])
    for name, source in rows:
        values[source].append(records[name][cfg.kind])
    for source, scores in sorted(values.items()):
        measured = [value for value in scores if value is not None]
        mean = round(sum(measured) / len(measured), 4) if measured else None
        summary[source] = {"rows": len(scores), "measured": len(measured), "mean": mean}
        if cfg.kind == "passes":  # problems that were solved 0, 1, ... k times
            counts = Counter(measured)
            summary[source]["problems"] = [counts[passes] for passes in range(cfg.samples + 1)]
        print(f"{source:28.28}", *(f"{value} {name}  " for name, value in summary[source].items()))
    write_report(cfg.out, cfg, [cfg.rows], {}, **{cfg.kind: summary})
    for part in parts_of(cfg.out):
        part.unlink()


def main(cfg: Config):
    world = distributed.start()
    read = {"loss": data.read_examples, "passes": data.read_problems}[cfg.kind]
    items = read(cfg.rows, share=(world.rank, world.size))
    directory, rows, left = data.model_directory(cfg.model), [], []
    if world.main:
        Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
        done = records_of(cfg.out)
        protocol = {name: getattr(cfg, name) for name in PROTOCOL[cfg.kind]}
        # a directory may be trained anew under its name; 15 GB are hashed in half a minute
        protocol |= {"rows": fingerprint(cfg.rows), "weights": fingerprint(directory)}
        claim(beside(cfg.out, "protocol.json"), protocol, begun=bool(done))
        rows = [(item.id, item.source) for item in progress(items, "ids")]
        left = [i for i, (name, _) in enumerate(rows) if name not in done]
        print(f"{cfg.out}: {len(left):,} of {len(rows):,} rows are to be measured")
    left = distributed.everyone(left)[0]  # nobody writes before the main rank has read
    if left:
        measure = scorer(cfg, directory, world)
        part = Appender(beside(cfg.out, f"rank{world.rank}.part.jsonl"))
        chunks = [left[at : at + cfg.chunk] for at in range(0, len(left), cfg.chunk)]
        # taken from a counter: no rank waits behind another's long responses
        turns = distributed.my_problems(world, len(chunks), f"score/{cfg.out}", dynamic=True)
        for turn in progress(turns, cfg.kind, math.ceil(len(chunks) / world.size)):
            for record in measure([items[i] for i in chunks[turn]]):
                part.add(record)
    world.wait()
    if world.main:
        finish(cfg, rows)
    distributed.finish(world)


if __name__ == "__main__":
    run_main(main, Config)
