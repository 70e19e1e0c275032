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
    bash runs/ovr_7b.sh                            # both stages at 7B, with the paper's numbers
"""

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from torch.utils.data import ConcatDataset, Dataset, Subset

from common import checkpoint as checkpoints
from common import data, packing
from common import distributed as parallel
from common.log import Pulse, RunLog, stop_on_signal
from common.provenance import model_card
from miniature import world as toy
from model import train_flops
from tools import plan


@dataclass(frozen=True)
class Config:
    """Stage 1. Defaults are the miniature's; the paper's value stands behind each setting."""

    model: str = "out/laptop/base/model"  # HF directory; paper: Qwen2.5-VL-7B-Instruct
    data: str = "out/laptop/data/sft.jsonl"  # JSONL, parquet, Hub id; paper: 2 M traces (sec. 3.3)
    replay: str = ""  # more rows mixed in; paper: none; laptop: text alone costs its sight
    out: str = "out/laptop/coldstart"  # run directory
    epochs: float = 1.0  # passes over the rows; paper: 5; laptop: its world is small
    batch: int = 64  # sequences a step, over all ranks; paper: 640; laptop: seconds a step
    pack_tokens: int = 4096  # tokens a pack, which is a micro-batch; paper: 64k; laptop: short rows
    max_tokens: int = 4096  # longer rows are left out, with a count; paper: 64k; laptop: short rows
    lr: float = 1e-3  # peak; paper: 2e-4; laptop: small models want larger steps
    lr_end: float = 1e-4  # cosine ends here; ours: a tenth of the peak
    warmup: float = 0.03  # share of the steps, linear; ours: the paper names none
    weight_decay: float = 0.1  # AdamW, of matrices; paper: "Qwen2.5's default"; ours: the number
    beta1: float = 0.9  # AdamW; paper: "Qwen2.5's default"; ours: the number, as in stage 2
    beta2: float = 0.95  # AdamW; paper: "Qwen2.5's default"; ours: the number, as in stage 2
    clip: float = 1.0  # of the gradient's norm; ours: as in stage 2
    recompute: str = "none"  # activations in backward: none, selective (keeps attention), full
    compile: bool = False  # blocks by torch.compile: for GPUs; minutes at the start
    dtype: str = "auto"  # bfloat16 on GPUs, float32 on CPUs; ours: masters always float32
    shard_ranks: int = 0  # ranks that share one copy of the weights; 0: those of a node
    valid: int = 128  # rows kept apart for the validation loss
    valid_every: int = 50  # steps
    save_every: int = 0  # steps between checkpoints; 0: at the end and on Ctrl-C only
    keep_last: int = 2  # newest checkpoints from which a run can go on
    keep_every: int = 1  # exported models stay for every so many steps; the newest always
    dump_minutes: float = 30.0  # without a new phase: every thread's stack into RUN/heartbeat
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


def packs_of(
    items: Sequence, encode: Callable, cfg: Config, world, cost
) -> tuple[list[data.Pack], float, int]:
    """-> this rank's packs, the trained tokens of all ranks, how many items were too long.

    Each rank encodes a share of the items to learn their lengths, then those that it will train.
    All ranks have as many packs, and their k-th packs, which run at the same time, cost about the
    same.
    """
    documents = {i: encode(items[i]) for i in range(world.rank, len(items), world.size)}
    lengths = parallel.union(world, {i: len(document) for i, document in documents.items()})
    fitting = [i for i in range(len(items)) if lengths[i] <= cfg.max_tokens]
    sizes = [lengths[i] for i in fitting]
    packs = []
    for places in packing.plan(sizes, fitting, cfg.pack_tokens, world.size, cost)[world.rank]:
        members = sorted((fitting[k] for k in places), key=lengths.__getitem__)
        documents |= {i: encode(items[i]) for i in members if i not in documents}
        packs.append(data.lay_out(documents, members) if members else data.filler_pack())
    (tokens,) = parallel.sums(world, sum(len(p.targets) for p in packs))
    return packs, tokens, len(items) - len(fitting)


def loss_of(model, pack: data.Pack, tokens: float, device) -> torch.Tensor:
    """This pack's part of the mean of -log p over all trained tokens of the step."""
    pack = pack.to(device)
    logps, _ = model(**pack.inputs, rows=pack.rows, targets=pack.targets)
    return -logps.sum() / tokens


@torch.no_grad()
def validate(model, packs: list[data.Pack], tokens: float, world) -> float:
    """Mean -log p over the trained tokens of rows that are never trained on."""
    mine = sum(loss_of(model, pack, tokens, world.device).item() for pack in packs)
    parallel.release(model)
    return parallel.sums(world, mine)[0]


def card_of(cfg: Config, out: Path, step: int, loss: float | None) -> str:
    """README.md of an exported model."""
    extra = {"step": step} | ({} if loss is None else {"loss": loss})
    title = "Open Vision Reasoner, stage 1: linguistic cold start"
    return model_card(title, cfg, out / "model", out, cfg.max_tokens, extra)


def main(cfg: Config):
    world = parallel.start(cfg.threads, cfg.dtype, cfg.shard_ranks)
    toy.ensure(world, cfg.model, cfg.data)
    out = Path(cfg.out)
    start, checkpoint = checkpoints.claim(out, cfg)
    directory = data.model_directory(cfg.model)
    tokenizer, settings = data.load_tokenizer(directory), data.load_image_settings(directory)
    train, valid = split_rows(cfg)
    stream = data.Stream(train, cfg.seed)
    steps = math.ceil(cfg.epochs * len(train) / cfg.batch)

    how = {"recompute": cfg.recompute, "compile": cfg.compile}
    model = parallel.load(directory, world, **how)  # the tower is frozen
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

    def packed(items):
        def encode(example):
            return data.encode_example(example, tokenizer, settings)

        return packs_of(items, encode, cfg, world, partial(train_flops, model.config))

    valid_packs, valid_tokens, _ = packed(valid)
    stopped, loss = False, None
    pulse = Pulse(out, world.rank, cfg.dump_minutes)
    saver = checkpoints.Saver(out, directory, world.dtype, cfg.keep_last, cfg.keep_every)
    with saver, stop_on_signal(world.main) as stop:
        for step in range(start, steps):
            began = time.perf_counter()
            # 1. read: the same batch on every rank, each trains its share
            pulse("read", step)
            examples = stream.batch(step, cfg.batch)
            packs, tokens, too_long = packed(examples)
            # 2. learn
            pulse("learn", step)
            lr = cosine_lr(step, steps, cfg.lr, cfg.lr_end, cfg.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad()
            losses = []  # read after the loop, in which nothing waits for the GPU
            for pack in packs:
                part = loss_of(model, pack, tokens, world.device)
                parallel.backward(model, part, world, last=pack is packs[-1])
                losses.append(part.detach())
            norm = parallel.clip_gradients(model, cfg.clip)
            losses = torch.stack(losses).tolist()
            broken = [p for p, x in zip(packs, losses, strict=True) if not math.isfinite(x)]
            suspects = [examples[i].id for pack in broken for i in pack.members]
            (loss,) = parallel.sums(world, sum(losses))
            parallel.refuse_nan(world, step, {"loss": loss, "grad_norm": norm}, suspects)
            optimizer.step()
            # 3. tell
            speed = tokens / (time.perf_counter() - began)
            metrics = {"loss": loss, "lr": lr, "grad_norm": norm, "tokens": tokens}
            metrics |= {"too_long": too_long, "tokens_per_second": speed}
            last = step == steps - 1
            if step % cfg.valid_every == 0 or last:
                pulse("validate", step)
                metrics["valid_loss"] = validate(model, valid_packs, valid_tokens, world)
            metrics |= pulse.seconds() | {"peak_gb": parallel.peak_gb(world)}
            log.log(step, metrics, show=("loss", "lr", "grad_norm", "tokens_per_second"))
            if world.main and step < start + 2:  # of a GPU that plan.py knows
                plan.show_beside("coldstart", cfg, model.config, world.size, packs, metrics)
            stopped = parallel.largest(world, stop.requested)
            if stopped or (cfg.save_every and (step + 1) % cfg.save_every == 0):
                pulse("save", step)  # after the log: a checkpoint's steps all stand in it
                saver.save(step + 1, state, model, card_of(cfg, out, step + 1, loss))
            saver.settle()
            if stopped:
                break
    pulse("leave", steps)
    if not stopped:
        card = card_of(cfg, out, steps, loss)
        checkpoints.save_whole(model, out / "model", directory, world.dtype, card)
    elif world.main:
        print(stop.advice)
    log.close()
    parallel.finish(world)
    pulse.close()


if __name__ == "__main__":
    main(tyro.cli(Config))
