"""Stage 1, the linguistic cold start: the language model is fine-tuned on text-only reasoning.

    rows {"prompt", "response"} ─▶ documents ─▶ packs ─▶ sum of -log p(token) / all trained tokens

Only the LLM trains; vision tower and merger keep every bit (OVR, sec. 3.1). The aggressive pair of
large batch and large learning rate is the paper's: it is meant to break the instruct model's
habits. What is learnt here on text is measured on pictures afterwards (eval.py): that transfer is
the paper's claim.

How it departs from a textbook SFT script:
  1  No padding: documents lie back to back in packs of a token budget, attention stays inside each.
  2  One denominator: the number of trained tokens of the whole step, over all packs and all ranks,
     known before backward. The gradient is the same however the batch is cut.
  3  The order of the data is a function of (seed, step): a resumed run is the same, bit for bit.

    torchrun coldstart.py                          # the miniature: minutes on a laptop
    torchrun --nproc-per-node 2 coldstart.py       # the same numbers from two processes
    torchrun --nproc-per-node 8 coldstart.py --model DIR --data ROWS.jsonl \\
        --batch 640 --pack-tokens 65536 --lr 2e-4 --lr-end 2e-5 --epochs 5     # the paper's numbers
"""

import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch.utils.data import ConcatDataset, Dataset, Subset

import checkpoints
import data
import parallel
import toy
from model import load_model
from runlog import RunLog, stop_on_signal


@dataclass(frozen=True)
class Config:
    """Stage 1. Defaults are the miniature's; the paper's value stands behind each setting."""

    model: str = "out/laptop/base/model"  # HF directory; paper: Qwen2.5-VL-7B-Instruct
    data: str = "out/laptop/data/sft.jsonl"  # rows {"prompt", "response"}: JSONL, parquet, Hub id
    replay: str = ""  # more rows mixed in (perception, to prevent forgetting); paper: none
    out: str = "out/laptop/coldstart"  # run directory
    epochs: float = 1.0  # passes over the rows; paper: 5
    batch: int = 64  # sequences a step, over all ranks; paper: 640
    pack_tokens: int = 4096  # tokens a pack, which is a micro-batch; paper: 65,536
    max_tokens: int = 4096  # longer rows are left out, with a count; paper: 65,536
    lr: float = 1e-3  # peak; paper: 2e-4
    lr_end: float = 1e-4  # cosine ends here; ours: a tenth of the peak
    warmup: float = 0.03  # share of the steps; ours
    weight_decay: float = 0.1  # ours; the paper says "Qwen2.5's default optimiser"
    beta1: float = 0.9  # ours
    beta2: float = 0.95  # ours
    clip: float = 1.0  # gradient norm; ours
    valid: int = 128  # rows kept apart for the validation loss
    valid_every: int = 50  # steps
    save_every: int = 0  # steps between checkpoints; 0: at the end and on Ctrl-C only
    seed: int = 0
    threads: int = 0  # CPU threads a process; 0 shares the cores out
    wandb: str = ""  # project name; empty: off

    def __post_init__(self):
        if self.max_tokens > self.pack_tokens:
            raise ValueError(f"max_tokens {self.max_tokens} > pack_tokens {self.pack_tokens}")
        if min(self.epochs, self.batch, self.valid) <= 0:
            raise ValueError("epochs, batch and valid must be positive")


def cosine_lr(step: int, steps: int, peak: float, end: float, warmup: float) -> float:
    """Linear warm-up over a share of the steps, then a cosine from peak to end; step from 0."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return peak * (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * done))


def freeze_vision(model):
    """The paper trains the LLM module only: vision tower and merger are left untouched."""
    for weight in model.visual.parameters():
        weight.requires_grad_(False)


def split_rows(cfg: Config) -> tuple[Dataset, Dataset]:
    """Rows to train on, and rows for the validation loss; replayed rows are only trained on."""
    rows = data.read_examples(cfg.data)
    if len(rows) <= cfg.valid:
        raise ValueError(
            f"{cfg.data} has {len(rows)} rows, {cfg.valid} are kept for validation: lower --valid"
        )
    valid = sorted(random.Random(cfg.seed).sample(range(len(rows)), cfg.valid))
    kept = sorted(set(range(len(rows))) - set(valid))
    train = Subset(rows, kept)
    if cfg.replay:
        train = ConcatDataset([train, data.read_examples(cfg.replay)])
    return train, Subset(rows, valid)


def packs_of(documents: list, budget: int, world) -> tuple[list[data.Pack], float]:
    """This rank's packs, as many on every rank, and the number of trained tokens on all ranks."""
    packs = data.pack(documents, budget) if documents else []
    (tokens,) = parallel.sums(world, sum(int(p.loss_mask.sum()) for p in packs))
    most = int(parallel.largest(world, len(packs)))
    return packs + [data.filler_pack()] * (most - len(packs)), tokens


def loss_of(model, pack: data.Pack, tokens: float, device) -> torch.Tensor:
    """This pack's part of the mean of -log p over all trained tokens of the step."""
    pack = pack.to(device)
    logps, _ = model(**pack.inputs, rows=pack.rows, targets=pack.targets)
    return -logps.sum() / tokens


@torch.no_grad()
def validate(model, documents: list, cfg: Config, world) -> float:
    """Mean -log p over the trained tokens of rows that are never trained on."""
    packs, tokens = packs_of(documents[world.rank :: world.size], cfg.pack_tokens, world)
    mine = sum(loss_of(model, pack, tokens, world.device).item() for pack in packs)
    return parallel.sums(world, mine)[0]


def main(cfg: Config):
    world = parallel.start(cfg.threads)
    toy.ensure(world, cfg.model, cfg.data)
    out = Path(cfg.out)
    start, checkpoint = checkpoints.claim(out, cfg)
    tokenizer, settings = data.load_tokenizer(cfg.model), data.load_image_settings(cfg.model)
    train, valid = split_rows(cfg)
    stream = data.Stream(train, cfg.seed)
    valid = [data.encode_example(example, tokenizer, settings) for example in valid]
    valid = [document for document in valid if len(document) <= cfg.max_tokens]
    steps = math.ceil(cfg.epochs * len(train) / cfg.batch)

    model = load_model(cfg.model, device=world.device)
    freeze_vision(model)
    model = parallel.shard(model, world)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [  # vectors (norms, biases) are not decayed
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": cfg.weight_decay},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, cfg.lr, (cfg.beta1, cfg.beta2), fused=True)
    state = {"model": (model, optimizer)}
    if checkpoint:
        checkpoints.load_state(checkpoint, state)
    log = RunLog(out, cfg, steps, world.main, start)

    stopped = False
    with stop_on_signal(world.main) as stop:
        for step in range(start, steps):
            began = time.perf_counter()
            # 1. read: the same batch on every rank, each takes its share
            examples = stream.batch(step, cfg.batch)[world.rank :: world.size]
            documents = [data.encode_example(example, tokenizer, settings) for example in examples]
            fitting = [d for d in documents if len(d) <= cfg.max_tokens]
            packs, tokens = packs_of(fitting, cfg.pack_tokens, world)
            # 2. learn
            lr = cosine_lr(step, steps, cfg.lr, cfg.lr_end, cfg.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad()
            loss = 0.0
            for pack in packs:
                part = loss_of(model, pack, tokens, world.device)
                (part * world.size).backward()  # FSDP takes the mean over ranks, the loss is a sum
                loss += part.item()
            norm = parallel.clip_gradients(model, cfg.clip)
            optimizer.step()
            # 3. tell
            loss, too_long = parallel.sums(world, loss, len(documents) - len(fitting))
            speed = tokens / (time.perf_counter() - began)
            parallel.refuse_nan(step, {"loss": loss, "grad_norm": norm})
            metrics = {"loss": loss, "lr": lr, "grad_norm": norm, "tokens": tokens}
            metrics |= {"too_long": too_long, "tokens_per_second": speed}
            last = step == steps - 1
            if step % cfg.valid_every == 0 or last:
                metrics["valid_loss"] = validate(model, valid, cfg, world)
            log.log(step, metrics, show=("loss", "lr", "grad_norm", "tokens_per_second"))
            stopped = parallel.largest(world, stop.requested)
            if stopped or (cfg.save_every and (step + 1) % cfg.save_every == 0):
                checkpoints.save_checkpoint(out, step + 1, state, model, cfg.model)
            if stopped:
                break
    if not stopped:
        checkpoints.save_whole(model, out / "model", cfg.model)
    elif world.main:
        print(stop.advice)
    log.close()
    parallel.finish(world)


if __name__ == "__main__":
    main(tyro.cli(Config))
