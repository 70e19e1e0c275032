r"""Stage 0: what a model says about each row, from which curate.py decides what to drop.

    rows.jsonl ─▶ chunks ─▶ any free rank ─▶ X.rank0.part.jsonl, X.rank1.part.jsonl, ... ─▶ X.jsonl

loss    {"id", "loss", "tokens"}: nats a token of the response given the prompt, by a small
        pretrained model that reads plain text. The paper drops the abnormally high (OVR, sec. 3.3)
passes  {"id", "passes", "samples", "truncated", "no_box", "tokens"}: how many of k tries by the
        cold-start model are right. The paper drops problems always or never solved. "tokens" is the
        mean of a try; one that was cut is wrong, as in RL, whatever stands in it

A row that cannot be measured is there too: null, and "why". A chunk is written when it is whole, so
a run that was killed goes on with the same command on any number of ranks, and ends with the same
bytes: batches are made inside a chunk, draws are addressed by (seed, id, sample). (vLLM: up to
rounding.) With another model, setting or data it is refused. Several nodes share --out's folder.

    torchrun -m curation.score --rows out/data/sft.jsonl --kind loss --model Qwen/Qwen2.5-0.5B \
        --out out/data/sft.losses.jsonl
    torchrun --nproc-per-node 8 -m curation.score --rows out/data/rl.jsonl --kind passes \
        --sampler vllm --model out/coldstart/model --kv-cache-gb 40 --out out/data/rl.passes.jsonl
    python -m curation.score --rows out/laptop/data/train.jsonl --kind passes --max-tokens 144 \
        --model out/laptop/coldstart/model --out out/laptop/data/train.passes.jsonl

Dimensions: B rows of a batch, L tokens of its longest, R tokens of a response, V vocabulary.
"""

import glob
import json
import math
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import data, distributed
from common.log import beside, changes, fingerprint, progress, run_main, write_json, write_report
from model import HEAD_CHUNK
from reward import grade
from rollout import Rollout, open_sampler

GAP = "\n\n"  # between prompt and response, for a model that knows no chat


@dataclass(frozen=True)
class Config:
    """One model on all rows. The paper gives no numbers for this step: all are ours."""

    rows: str  # {"prompt", "response"} or {"prompt", "answer"}: JSONL, parquet, Hub id
    kind: Literal["loss", "passes"]
    model: str  # HF directory or Hub name; loss: any causal LM of text
    out: str  # JSONL to write; while it grows, X.protocol.json and X.rank*.part.jsonl stand beside
    tokens: int = 4096  # loss: of prompt and response; what comes after is not read
    pack_tokens: int = 8192  # loss: tokens that run at once, padding included
    samples: int = 8  # passes: tries a problem
    max_tokens: int = 16_384  # passes: of a response; the paper's RL begins at 24k
    prompt_tokens: int = 2048  # passes: longer prompts are not tried, and say so
    temperature: float = 1.0  # passes: of sampling, RL's
    sampler: Literal["torch", "vllm"] = "torch"  # passes; vllm from some 10 M parameters on
    sampler_batch: int = 256  # passes: responses that a rank samples at once
    kv_cache_gb: float = 0.25  # vllm's room for keys and values, a rank; 7B: 57 kB a token
    chunk: int = 256  # rows between two writes; a kill costs so many, and vllm idles at its end
    dtype: str = "auto"  # bfloat16 on GPUs, float32 on CPUs
    seed: int = 0
    threads: int = 0  # CPU threads a process; 0 shares the cores out, which moves the last digit

    def __post_init__(self):
        if Path(self.out).suffix != ".jsonl":
            raise ValueError(f"--out {self.out} must be a .jsonl file: others stand beside it")
        if Path(self.out).resolve() == Path(self.rows).resolve():
            raise ValueError(f"--out {self.out} is the input and would be overwritten")
        if not 0 < self.tokens <= self.pack_tokens:
            raise ValueError(f"tokens {self.tokens} must be in 1 to pack_tokens {self.pack_tokens}")
        if min(self.samples, self.max_tokens, self.prompt_tokens, self.chunk) < 1:
            raise ValueError("samples, max_tokens, prompt_tokens and chunk must be positive")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"{self.samples} greedy tries are all the same: set --temperature")


# ------------------------------------------------------------------ loss


def plain_document(example: data.Example, tokenizer) -> data.Document:
    """As plain text. Cut into tokens apart, so that none holds both an end of the prompt and a
    beginning of the response. The prompt gets what the tokenizer puts before a text, if anything;
    a picture is the word <image>.
    """
    ids = tokenizer.encode(example.prompt + GAP)
    response_ids = tokenizer.encode(example.response, add_special_tokens=False)
    return data.Document(data.Prompt(ids, ids, None, (), ()), response_ids)


def within(document: data.Document, tokens: int) -> data.Document:
    """Its first tokens. Only the response is cut: no prompt may end inside a picture."""
    room = max(0, tokens - len(document.prompt.ids))
    return replace(document, response_ids=document.response_ids[:room])


def target_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """logits (R, V), targets (R,) -> log-probs (R,) float32, in chunks: 2048 x 152k x 4 B = 1.2 GB.

    In bfloat16 a log-softmax is off by 0.02 on average.
    """
    parts = zip(logits.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True)
    return torch.cat([-F.cross_entropy(part.float(), ids, reduction="none") for part, ids in parts])


@torch.no_grad()
def plain_logps(documents: Sequence[data.Document], model, budget: int) -> list[Tensor]:
    """Log-probs of each response's tokens, by a model of transformers.

    Padded to the longest of a batch, on the right, where a causal model cannot see it; like
    lengths together. 8192 tokens have 8192 x 152k x 2 B = 2.5 GB of logits in bfloat16, on a CPU
    twice that.
    """
    order = sorted(range(len(documents)), key=lambda i: -len(documents[i]))
    found = [torch.zeros(0)] * len(documents)
    while order:
        longest = len(documents[order[0]])
        batch, order = order[: budget // longest], order[budget // longest :]
        ids = torch.zeros(len(batch), longest, dtype=torch.int64)  # (B, L)
        seen = torch.zeros_like(ids)
        for row, i in enumerate(batch):
            ids[row, : len(documents[i])] = torch.tensor(documents[i].ids)
            seen[row, : len(documents[i])] = 1
        ids, seen = ids.to(model.device), seen.to(model.device)
        logits = model(input_ids=ids, attention_mask=seen, use_cache=False).logits  # (B, L, V)
        for row, i in enumerate(batch):
            first, end = len(documents[i].prompt.ids), len(documents[i])
            predicted = logits[row, first - 1 : end - 1]  # each at the position before it
            found[i] = target_logps(predicted, ids[row, first:end]).cpu()
    return found


def losses(examples: Sequence[data.Example], tokenizer, model, cfg: Config) -> list[dict]:
    """A record of each example."""
    documents = [within(plain_document(example, tokenizer), cfg.tokens) for example in examples]
    fitting = [i for i, document in enumerate(documents) if document.response_ids]
    logps = plain_logps([documents[i] for i in fitting], model, cfg.pack_tokens)
    found = dict(zip(fitting, logps, strict=True))
    asked = zip(examples, documents, strict=True)
    return [loss_record(e.id, d, found.get(i), cfg.tokens) for i, (e, d) in enumerate(asked)]


def loss_record(name: str, document: data.Document, logps: Tensor | None, tokens: int) -> dict:
    """{"id", "loss": nats a token or null, "tokens": of the response that were scored, "why"?}"""
    record = {"id": name, "loss": None, "tokens": len(document.response_ids)}
    if logps is None:
        why = f"a prompt of {len(document.prompt.ids)} tokens leaves none of {tokens} to a response"
        return record | {"why": why}
    loss = -logps.double().mean().item()
    if not math.isfinite(loss):  # JSON has no NaN
        return record | {"why": "the loss is not finite"}
    return record | {"loss": round(loss, 6)}


def loss_scorer(cfg: Config, directory: str, world) -> Callable[[Sequence], list[dict]]:
    """-> examples to records, with the model loaded."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=world.dtype)
    longest = getattr(model.config, "max_position_embeddings", None) or cfg.tokens
    if longest < cfg.tokens:
        raise ValueError(f"{cfg.model} reads {longest} tokens: --tokens {longest}")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = model.to(world.device).eval()
    return partial(losses, tokenizer=tokenizer, model=model, cfg=cfg)


# ------------------------------------------------------------------ passes


def passes(problems: Sequence[data.Problem], sampler, tokenizer, settings, cfg: Config):
    """A record of each problem, from `samples` tries at those whose prompts are short enough."""
    lengths = [data.prompt_length(p.prompt, p.images, tokenizer, settings, p.id) for p in problems]
    tried = [p for p, n in zip(problems, lengths, strict=True) if n <= cfg.prompt_tokens]
    drawn = (cfg.samples, cfg.max_tokens, cfg.temperature, (cfg.seed,))
    tries = defaultdict(list)
    for rollout in sampler.generate(tried, *drawn):
        tries[rollout.problem.id].append(rollout)
    why = f"prompt longer than {cfg.prompt_tokens} tokens"
    return [
        pass_record(p, tries[p.id]) if p.id in tries else {"id": p.id, "passes": None, "why": why}
        for p in problems
    ]


def pass_record(problem: data.Problem, tries: list[Rollout]) -> dict:
    """no_box counts what rl.py counts: no box, or one that is not closed, in cut responses too."""
    options = dict(choices=problem.choices, precision=problem.precision)
    verdicts = [grade(problem.answer, r.text, **options) for r in tries]
    right = [v.score == 1 and r.stopped for v, r in zip(verdicts, tries, strict=True)]
    return {
        "id": problem.id,
        "passes": sum(right),
        "samples": len(tries),
        "truncated": sum(not r.stopped for r in tries),
        "no_box": sum(v.status in ("no_box", "unclosed") for v in verdicts),
        "tokens": round(sum(len(r.response_ids) for r in tries) / len(tries), 1),
    }


def pass_scorer(cfg: Config, directory: str, world) -> Callable[[Sequence], list[dict]]:
    """-> problems to records, with the sampler started; all ranks start theirs together."""
    room = cfg.sampler_batch, cfg.prompt_tokens + cfg.max_tokens, cfg.kv_cache_gb
    sampler = open_sampler(cfg.sampler, directory, world, room)
    tools = {"tokenizer": sampler.tokenizer, "settings": sampler.settings}
    return partial(passes, sampler=sampler, cfg=cfg, **tools)


# ------------------------------------------------------------------ what is kept on the way

PROTOCOL = {  # what a record depends on; how rows are batched moves its last digit at most
    "loss": "kind model tokens".split(),
    "passes": "kind model samples max_tokens prompt_tokens temperature sampler seed".split(),
}


def protocol_of(cfg: Config, directory: str, dtype: torch.dtype) -> dict:
    said = {name: asdict(cfg)[name] for name in PROTOCOL[cfg.kind]}
    said["dtype"] = str(dtype).removeprefix("torch.")
    # a directory may be trained anew under its name; 15 GB are hashed in half a minute
    return said | {"rows": fingerprint(cfg.rows), "weights": fingerprint(directory)}


def parts_of(out: str) -> list[Path]:
    """What ranks have written, of this start or an earlier one with another number of them."""
    stem = glob.escape(beside(out, "rank").name)
    return sorted(Path(out).parent.glob(f"{stem}*.part.jsonl"))


def records_of(out: str) -> dict[str, dict]:
    """Of every row measured so far, by its id."""
    found = {}
    for path in (*parts_of(out), Path(out)):
        if path.exists():
            with path.open(encoding="utf-8") as file:
                found |= {record["id"]: record for record in map(json.loads, file)}
    return found


def claim(cfg: Config, protocol: dict, ids: list[str]) -> list[int]:
    """The chunks that are to be done. One of which a line is missing is done again as a whole,
    because its rows share batches. ValueError where the records there were measured otherwise.
    """
    file = beside(cfg.out, "protocol.json")
    before = json.loads(file.read_text()) if file.exists() else {}
    if before or parts_of(cfg.out) or Path(cfg.out).exists():
        if found := "; ".join(changes(before, protocol)):
            raise ValueError(
                f"{cfg.out} holds records of another protocol ({found}): use another --out, or "
                f"remove it with {file} and the parts beside it"
            )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, protocol)
    for part in parts_of(cfg.out):  # a last line that a kill has left unfinished is cut off
        os.truncate(part, part.read_bytes().rfind(b"\n") + 1)
    done = records_of(cfg.out).keys()
    chunks = [ids[start : start + cfg.chunk] for start in range(0, len(ids), cfg.chunk)]
    todo = [number for number, chunk in enumerate(chunks) if not done >= {*chunk}]
    if len(todo) < len(chunks):
        print(f"{cfg.out}: {len(chunks) - len(todo)} of {len(chunks)} chunks are there already")
    return todo


def append(file, records: list[dict]):
    file.write("".join(json.dumps(record) + "\n" for record in records))
    file.flush()  # a kill loses no chunk that is done


# ------------------------------------------------------------------ what came out


def summary_of(values: list, cfg: Config) -> dict | list[int]:
    """Of losses {"median", "mad"}; of passes how many problems were solved 0, 1, ... k times."""
    if cfg.kind == "passes":
        return np.bincount(np.array(values, int), minlength=cfg.samples + 1).tolist()
    if not values:
        return {"median": None, "mad": None}
    median = float(np.median(values))
    return {"median": median, "mad": float(np.median(np.abs(np.array(values) - median)))}


def summarise(cfg: Config, pairs: list[tuple[str, dict]]) -> dict:
    """(source, record) of all rows -> {kind: {source: summary}, "not_measured": {source: rows}}."""
    measured, missing = defaultdict(list), Counter()
    for source, record in pairs:
        measured[source] += [] if record[cfg.kind] is None else [record[cfg.kind]]
        missing[source] += record[cfg.kind] is None
    found = {source: summary_of(measured[source], cfg) for source in sorted(measured)}
    return {cfg.kind: found, "not_measured": {source: missing[source] for source in found}}


def print_table(cfg: Config, summary: dict, rows: Counter):
    unit = "nats a token" if cfg.kind == "loss" else f"problems by passes of {cfg.samples}"
    print(f"{'source':28} {'rows':>9} {'null':>6}  {unit}")
    for source, found in summary[cfg.kind].items():
        cells = found if cfg.kind == "passes" else found.values()
        cells = [f"{'-' if x is None else round(x, 4):>7}" for x in cells]
        missing = summary["not_measured"][source]
        print(f"{source or '(no source)':28.28} {rows[source]:9,} {missing:6,}", *cells)


def close(cfg: Config, protocol: dict, rows: list[tuple[str, str]]):
    """Parts become one file in the order of the input; a kill on the way is made good by a restart.

    rows: (id, source) of each.
    """
    found = records_of(cfg.out)
    pairs = [(source, found[name]) for name, source in rows]
    whole = beside(cfg.out, "part")
    with whole.open("w", encoding="utf-8") as file:
        append(file, [record for _, record in pairs])
    whole.replace(cfg.out)
    summary = summarise(cfg, pairs)
    write_report(cfg.out, cfg, [cfg.rows], {}, protocol=protocol, **summary)
    for part in parts_of(cfg.out):
        part.unlink()
    print_table(cfg, summary, Counter(source for _, source in rows))


def main(cfg: Config):
    world = distributed.start(cfg.dtype)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    read = {"loss": data.read_examples, "passes": data.read_problems}[cfg.kind]
    items = read(cfg.rows, share=(world.rank, world.size))
    directory = data.model_directory(cfg.model)
    rows, protocol, todo = [], {}, []
    if world.main:
        rows = [(item.id, sys.intern(item.source)) for item in progress(items, "ids")]
        protocol = protocol_of(cfg, directory, world.dtype)
        todo = claim(cfg, protocol, [name for name, _ in rows])
    todo = distributed.everyone(todo)[0]  # nobody writes before the main rank has read
    if todo:
        scorer = {"loss": loss_scorer, "passes": pass_scorer}[cfg.kind](cfg, directory, world)
        # taken from a counter: no rank waits behind another's long responses
        turns = distributed.my_problems(world, len(todo), f"score/{cfg.out}", dynamic=True)
        with beside(cfg.out, f"rank{world.rank}.part.jsonl").open("a", encoding="utf-8") as file:
            for turn in progress(turns, cfg.kind, math.ceil(len(todo) / world.size)):
                start = todo[turn] * cfg.chunk
                append(file, scorer([*items[start : start + cfg.chunk]]))
    world.wait()
    if world.main:
        close(cfg, protocol, rows)
    distributed.finish(world)


if __name__ == "__main__":
    run_main(main, Config)
