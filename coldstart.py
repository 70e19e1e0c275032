"""Stage 1, the linguistic cold start: the language model is fine-tuned on text-only reasoning.

    rows {"prompt", "response"} ─▶ documents ─▶ packs ─▶ sum of -log p(token) / all trained tokens

Vision tower and merger keep every bit (OVR, sec. 3.1). Large batch and large learning rate are the
paper's: meant to break the instruct model's habits. That what is learnt here on text also helps
with pictures is its claim, which eval.py measures. How it departs from a textbook SFT script:
  1  No padding: documents lie back to back in packs, and attention stays inside each.
  2  One denominator: the trained tokens of the whole step, over all packs and ranks, known before
     backward. The gradient is the same however the batch is cut.
  3  The order of the data is a function of (seed, step): a resumed run is the same, bit for bit.
  4  A batch can be counted in packs, as the paper's 640 must be (docs/recipe.md).

    torchrun coldstart.py                      # the miniature: minutes on a laptop
    torchrun --nproc-per-node 2 coldstart.py   # the same numbers from two processes
    bash runs/ovr_7b.sh                        # both stages at 7B, with the paper's numbers
"""

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch.utils.data import Dataset, Subset

from common import checkpoint, data, distributed
from common.log import RunLog, Timer, due, model_card, run_main, stop_on_signal
from common.packs import Pack, filler_pack, full_pack, make_pack, plan_packs
from miniature.base import ensure
from model import read_config, train_flops
from rollout import open_sampler, solved

BETAS = (0.9, 0.95)  # AdamW; paper: "Qwen2.5's default"; ours: the numbers, as in stage 2
CLIP_NORM = 1.0  # of the gradient; ours: as in stage 2
TITLE = "Open Vision Reasoner, stage 1: linguistic cold start"
SHOWN = "loss lr grad_norm tokens_per_second eval_image eval_text".split()  # on the step line


@dataclass(frozen=True)
class Config:
    """Stage 1. Defaults are the miniature's; the paper's value stands behind each setting."""

    model: str = "out/laptop/base/model"  # HF directory or Hub name; paper: Qwen2.5-VL-7B-Instruct
    data: str = "out/laptop/data/sft.jsonl"  # JSONL, parquet, Hub name; paper: 2 M traces
    columns: tuple[str, ...] = ()  # of rows with other names: prompt=problem response=solution
    out: str = "out/laptop/coldstart"  # run directory
    epochs: float = 1.0  # passes over the rows; paper: 5; laptop: its world is small
    batch_packs: int = 0  # packs a step, over all ranks; paper: 640; 0: see batch_rows
    batch_rows: int = 40  # rows a step, where batch_packs is 0; paper: about 9,500
    pack_tokens: int = 4096  # tokens a pack, which is a micro-batch; paper: 64k; laptop: short rows
    max_tokens: int = 4096  # longer rows are left out, with a count; <= pack_tokens; paper: 64k
    lr: float = 1.5e-3  # peak; paper: 2e-4; laptop: small models want larger steps
    lr_end: float = 1.5e-4  # cosine ends here; ours: a tenth of the peak
    warmup: float = 0.03  # share of the steps, linear; ours: the paper names none
    weight_decay: float = 0.1  # AdamW, of matrices; paper: "Qwen2.5's default"; ours: the number
    lora_rank: int = 0  # of adapters that train in place of the decoder; paper: 0, without
    lora_alpha: float = 32.0  # scales them by alpha / rank; Schulman et al. 2025: 32
    recompute: Literal["none", "selective", "full"] = "none"  # of activations, in backward
    compile: bool = False  # blocks by torch.compile: for GPUs; minutes at the start
    valid: int = 128  # rows kept apart for the validation loss
    valid_every: int = 50  # steps, the first included; 0: at the end only
    save_every: int = 0  # steps between checkpoints; 0: by --save-minutes, or on Ctrl-C only
    save_minutes: float = 0.0  # after so many since the last one, too; 0: by steps alone
    keep_every: int = 1  # older exported models stay where this divides the step; the newest 2 do
    eval_data: str = ""  # problems that nobody trains on, solved greedily; none: no evaluation
    eval_every: int = 50  # steps between evaluations; 0: at the end only
    wandb: str = ""  # project on Weights & Biases that gets the metrics; none: not sent
    tensorboard: bool = False  # the metrics into RUN/tensorboard, too
    seed: int = 0

    def __post_init__(self):
        if self.max_tokens > self.pack_tokens:
            raise ValueError(f"--max-tokens {self.max_tokens} > --pack-tokens {self.pack_tokens}")
        if min(self.epochs, self.valid, max(self.batch_packs, self.batch_rows)) <= 0:
            raise ValueError("--epochs, --valid and --batch-packs or --batch-rows must be positive")


def cosine_lr(step: int, steps: int, peak: float, end: float, warmup: float) -> float:
    """Linear warm-up over a share of the steps, then a cosine from peak to end; step from 0.

    The last step, steps - 1, gets exactly `end`, however short the run.
    """
    rising = min(max(1, round(warmup * steps)), steps - 1)
    if step < rising:
        return peak * (step + 1) / rising
    done = (step - rising + 1) / (steps - rising)
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * done))


def split_rows(cfg: Config, world) -> tuple[Dataset, Dataset]:
    """Rows to train on, and rows for the validation loss."""
    rows = data.read_examples(cfg.data, columns=cfg.columns, share=(world.rank, world.size))
    if len(rows) <= cfg.valid:
        raise ValueError(f"{cfg.data} has {len(rows)} rows, --valid keeps {cfg.valid}: lower it")
    valid = sorted(random.Random(cfg.seed).sample(range(len(rows)), cfg.valid))
    train = sorted(set(range(len(rows))) - set(valid))
    return Subset(rows, train), Subset(rows, valid)


def rows_a_step(cfg: Config, train: Sequence, encode: Callable) -> int:
    """How many rows fill --batch-packs packs on average; those that are too long fill none.

    Measured on rows drawn by the seed, so that a step stays a function of (seed, step).
    """
    chosen = random.Random(cfg.seed).sample(range(len(train)), min(1024, len(train)))
    lengths = [len(encode(train[i])) for i in chosen]
    tokens = sum(x for x in lengths if x <= cfg.max_tokens)
    if not tokens:
        raise ValueError(f"{cfg.data}: no row of {len(chosen)} fits --max-tokens {cfg.max_tokens}")
    return max(1, round(cfg.batch_packs * cfg.pack_tokens * len(chosen) / tokens))


def share_rows(
    rows: Sequence, encode: Callable, cfg: Config, world, cost: Callable
) -> tuple[list[Pack], float, int]:
    """-> this rank's packs, the trained tokens of all ranks, how many rows were too long."""
    # a share is encoded to learn the lengths of all, then what this rank will train
    documents = {i: encode(rows[i]) for i in range(world.rank, len(rows), world.size)}
    lengths = distributed.union({i: len(document) for i, document in documents.items()})
    fitting = sorted(i for i in lengths if lengths[i] <= cfg.max_tokens)
    sizes, packs = [lengths[i] for i in fitting], []
    # each row is a group of its own: rows share no prompt
    for places in plan_packs(sizes, fitting, cfg.pack_tokens, world.size, cost)[world.rank]:
        members = sorted((fitting[k] for k in places), key=lengths.__getitem__)
        chosen = [documents.get(i) or encode(rows[i]) for i in members]
        packs.append(make_pack(chosen, members) if chosen else filler_pack())
    (tokens,) = distributed.sums(sum(len(pack.targets) for pack in packs))
    return packs, tokens, len(rows) - len(fitting)


def loss_of(model, pack: Pack, tokens: float, device) -> torch.Tensor:
    """This pack's part of the mean of -log p over all trained tokens of the step."""
    return -model.logps(pack.to(device))[0].sum() / tokens


def update(model, optimizer, packs: list[Pack], tokens: float, step: int, world) -> dict:
    """One optimiser step, or FloatingPointError with the rows concerned where it is not finite."""
    optimizer.zero_grad()
    losses = []  # read after the loop, in which nothing waits for the GPU
    for pack in packs:
        loss = loss_of(model, pack, tokens, world.device)
        distributed.backward(model, loss, world, last=pack is packs[-1])
        losses.append(loss.detach())
    norm, losses = distributed.clip_gradients(model, CLIP_NORM), torch.stack(losses).tolist()
    metrics = {"loss": distributed.sums(sum(losses))[0], "grad_norm": norm}
    distributed.refuse_nan(step, metrics, packs, losses)
    optimizer.step()
    return metrics


def main(cfg: Config):
    world = distributed.start()
    ensure(world, cfg.model, cfg.data)
    run, directory = Path(cfg.out), data.model_directory(cfg.model)
    start, state = checkpoint.resume_or_start(run, cfg)
    tokenizer, settings = data.load_tokenizer(directory), data.load_image_settings(directory)
    encode = partial(data.encode_example, tokenizer=tokenizer, settings=settings)
    cost = partial(train_flops, read_config(directory))
    share = partial(share_rows, encode=encode, cfg=cfg, world=world, cost=cost)
    train, valid = split_rows(cfg, world)
    if cfg.eval_data:
        held_out = data.read_problems(cfg.eval_data, share=(world.rank, world.size))
    valid_packs, valid_tokens, too_long = share(valid)
    if not valid_tokens:
        raise ValueError(f"{cfg.data}: --max-tokens {cfg.max_tokens} fits no --valid row: raise it")
    stream = data.Stream(train, cfg.seed)
    count = rows_a_step(cfg, train, encode) if cfg.batch_packs else cfg.batch_rows
    steps = math.ceil(cfg.epochs * len(train) / count)
    learns = distributed.Trained(False, cfg.lora_rank, cfg.lora_alpha, cfg.seed)
    model = distributed.load(directory, world, "lm", learns, cfg.recompute, cfg.compile)
    trained = [p for p in model.parameters() if p.requires_grad]  # all but the tower
    matrices = {"params": [p for p in trained if p.ndim > 1], "weight_decay": cfg.weight_decay}
    vectors = {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0}  # norms, biases
    optimizer = torch.optim.AdamW([matrices, vectors], cfg.lr, BETAS, fused=True)
    models = {"model": (model, optimizer)}
    if state:
        checkpoint.load_state(state, models)
    distributed.rehearse(model, optimizer, full_pack(cfg.pack_tokens), world)
    if cfg.eval_data:
        sampler = open_sampler("torch", directory, world)
    if world.main:
        print(f"{steps} steps of {count} rows; validation rows too long: {too_long} of {cfg.valid}")
    log, timer, stopped = RunLog(run, cfg, steps, world.main, start), Timer(), False
    card = partial(model_card, TITLE, cfg, run / "model", run, cfg.max_tokens)
    saver = checkpoint.Saver(run, directory, world.dtype, cfg.keep_every)
    with stop_on_signal(run, world.main) as stop:
        for step in range(start, steps):
            began = time.perf_counter()
            # 1. read: the same batch on every rank, each trains its share
            timer("read")
            packs, tokens, too_long = share(stream.batch(step, count))
            # 2. update, unless all rows of this step were too long
            timer("update")
            lr = cosine_lr(step, steps, cfg.lr, cfg.lr_end, cfg.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            metrics = update(model, optimizer, packs, tokens, step, world) if tokens else {}
            metrics |= {"lr": lr, "tokens": tokens, "too_long": too_long}
            metrics["tokens_per_second"] = tokens / (time.perf_counter() - began)
            if step == steps - 1 or (cfg.valid_every and step % cfg.valid_every == 0):
                timer("validate")
                with torch.no_grad():
                    losses = [loss_of(model, p, valid_tokens, world.device) for p in valid_packs]
                distributed.release(model)
                losses = [loss.item() for loss in losses]
                (metrics["valid_loss"],) = distributed.sums(sum(losses))
                # what the last step has ruined is not exported
                distributed.refuse_nan(step, metrics, valid_packs, losses)
            if cfg.eval_data and due(step, steps, cfg.eval_every):
                timer("evaluate")
                sampler.sync(distributed.whole_weights(model, world.dtype))
                metrics |= solved(sampler, held_out, cfg.max_tokens, world)
            # 3. log, save
            metrics |= timer.seconds() | {"peak_gb": distributed.peak_gb(world)}
            log.log(step, metrics, SHOWN if tokens else ("too_long", *SHOWN))
            stopped = distributed.largest(stop.requested)
            if stopped or saver.due(step + 1, cfg):
                timer("save")  # after the log: all steps of a checkpoint stand in it
                saver.save(step + 1, models, model, card(step=step + 1))
            if stopped:
                break
    if not stopped:
        checkpoint.export(model, run / "model", directory, world.dtype, card(step=steps))
    elif world.main:
        print(stop.advice)
    log.close()
    distributed.finish(world)


if __name__ == "__main__":
    run_main(main, Config)
