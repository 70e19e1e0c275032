"""The miniature's base model: it reads pictures, takes away and adds, and has no habits.

It stands in for Qwen2.5-VL-7B-Instruct, with every part of it and 0.8 M parameters. First the
vision tower learns to name words, each image token one word, as CLIP did before Qwen2.5-VL. Then
the language model learns to describe bills, to take items from a total, and to guess sums.

A habit pays only if the skills under it work: a model that read the faint digit right in one case
of four showed every habit and gained nothing. So there are gates: the probability of the right word
inside traces on pictures, though it has never seen a trace. Training goes on until all hold, or the
stated steps end; then it says which do not.

    torchrun --nproc-per-node 2 -m miniature.base              # out/laptop/base, the same from one
    python -m miniature.base --measure out/laptop/rl/model     # the skills of any stage, as JSON
"""

import json
import math
import os
import random
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters

from common import checkpoint, data, distributed
from common.log import RunLog, progress, run_main
from common.packs import Pack, pack_alone
from miniature import world
from miniature.world import ITEMS, LINES
from model import Config as ModelConfig
from model import Qwen25VL, VisionConfig, load_model, save_model

GATES = dict.fromkeys("digit faint total smudge countdown sum".split(), 0.95)  # ours


@dataclass(frozen=True)
class Config:
    """The base model, or with --measure what some model can do."""

    out: str = "out/laptop/base"  # run directory
    seed: int = 0
    align: int = 160  # steps of 40 pictures, in which the tower learns to name words
    steps: int = 450  # steps of 32 documents, in which the rest learns to read and add
    more: int = 100  # steps of every further round, where a gate does not hold
    most: int = 850  # steps in all
    lr: float = 3e-3  # peak
    measure: str = ""  # a model directory: nothing is trained


def model_config(vocabulary: int) -> ModelConfig:
    """Qwen2.5-VL's architecture in small. head_dim 32 is the least that vLLM takes."""
    vision = VisionConfig(2, 48, 96, num_heads=3, out_hidden_size=128, fullatt_block_indexes=(1,))
    sizes = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, mrope_section=(4, 6, 6), max_position_embeddings=4096)
    ids = {"bos": "<|endoftext|>", "eos": "<|im_end|>", "vision_start": "<|vision_start|>"}
    ids |= {"vision_end": "<|vision_end|>", "vision": "<|vision_pad|>"}
    ids |= {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    ids = {f"{name}_token_id": world.SPECIAL.index(token) for name, token in ids.items()}
    return ModelConfig(
        vocab_size=vocabulary, vision=vision, tie_word_embeddings=False, **sizes, **ids
    )


# ------------------------------------------------------------------ what it can do


def skill_of(words: list[str], at: int) -> str:
    """Which skill a word of a trace asks for; most words ask for none."""
    word, before = words[at], words[at - 1]
    if before == "=":
        return "sum" if words[at + 1] == "</think>" else "countdown"
    if before == "unclear":
        return "smudge"  # which item it is
    if word in world.FAINT:
        return "faint"
    if before == "T":
        return "total"
    return "digit" if word.isdecimal() and before in (*ITEMS, "maybe") else ""


def pack_examples(examples: list, tokenizer, settings) -> Pack:
    return pack_alone([data.encode_example(e, tokenizer, settings) for e in examples])


@torch.no_grad()
def word_logps(model: Qwen25VL, examples: list, tokenizer, settings) -> list[list[float]]:
    """Of each example, the log-prob of every word of its response: a word is a token."""
    pack = pack_examples(examples, tokenizer, settings)
    pieces = model.logps(pack)[0].split(pack.counts)
    return [piece.tolist() for _, piece in sorted(zip(pack.members, pieces, strict=True))]


def skills(model: Qwen25VL, tokenizer, settings) -> dict[str, float]:
    """Mean probability of the right word where a trace on a picture asks for a skill, all words
    before it given; and log P(wait) after a countdown, where nothing is left and where some is.
    """
    rng, rates = random.Random(0), dict.fromkeys(world.RATES, 0.0) | {"check": 1.0, "look": 1.0}
    found, traces, doubts = defaultdict(list), [], []
    for _ in range(128):
        bill = world.random_bill(rng, "valid", smudged=1.0)
        looks, pictures = world.present(bill, True, rng)
        words, asked = world.question(bill, rng)
        trace = world.trace(bill, asked, rng, rates)
        doubt = trace[: trace.index("wait" if "wait" in trace else "good")] + "wait"
        traces.append(data.Example("trace", f"{looks} {words}", trace, tuple(pictures)))
        doubts.append(data.Example("doubt", f"{looks} {words}", doubt, tuple(pictures)))
    for trace, logps in zip(traces, word_logps(model, traces, tokenizer, settings), strict=True):
        words = trace.response.split()
        for at in range(1, len(words)):
            found[skill_of(words, at)].append(math.exp(logps[at]))
    for doubt, logps in zip(doubts, word_logps(model, doubts, tokenizer, settings), strict=True):
        left = "0 left" if "= 0 . wait" in doubt.response else "some left"
        found[f"log P(wait), {left}"].append(logps[-2])  # behind it comes the stop token
    return {name: sum(of) / len(of) for name, of in sorted(found.items()) if name}


# ------------------------------------------------------------------ training


class Optimizer:
    """Steps on losses that come in halves: two processes take one each, one takes both. Since a + b
    is b + a, the weights are the same to the last bit.

    Matrices by Muon (Jordan et al. 2024): 450 steps teach what takes AdamW 800. AdamW for the rest.
    """

    def __init__(self, matrices: list, others: list, ranks):
        self.weights, self.ranks = [*matrices, *others], ranks
        self.parts = [(torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0), 1.0)]
        if matrices:
            muon = torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
            self.parts.append((muon, 2.0))  # it bears twice the rate

    def step(self, halves: Iterable[Tensor], lr: float):
        for weight in self.weights:
            weight.grad = None
        for loss in halves:
            loss.backward()
        if self.ranks.size > 1:
            gradients = [weight.grad for weight in self.weights]
            every = parameters_to_vector(gradients)  # one message a step in place of sixty
            dist.all_reduce(every)
            vector_to_parameters(every, gradients)
        clip_grad_norm_(self.weights, 1.0)
        for optimizer, share in self.parts:
            optimizer.param_groups[0]["lr"] = share * lr
            optimizer.step()


def align(model: Qwen25VL, tokenizer, settings, cfg: Config, ranks):
    """CLIP in the miniature: every image token names its word and comes near its embedding.

    Without it the language model needs some ten times the steps before it reads at all.
    """
    ids = tokenizer.convert_tokens_to_ids(list(world.PRINTED))
    embeddings = model.model.embed_tokens.weight.detach()[ids]  # they stay, the tower comes to them
    optimizer = Optimizer([], list(model.visual.parameters()), ranks)

    def loss(rng: random.Random) -> Tensor:
        drawn = [rng.choices(world.PRINTED, k=len(LINES) * world.ACROSS) for _ in range(20)]
        pictures = [data.image_patches(world.draw(cells, rng), settings) for cells in drawn]
        patches, grids = zip(*pictures, strict=True)
        features = model.visual(torch.cat(patches), list(grids))
        wanted = torch.tensor([world.PRINTED.index(word) for cells in drawn for word in cells])
        named = F.cross_entropy(features @ embeddings.T, wanted)
        return (named + F.mse_loss(features, embeddings[wanted])) / 2

    rngs = [random.Random(f"{cfg.seed}/align/{half}") for half in range(ranks.rank, 2, ranks.size)]
    for k in progress(range(cfg.align), "align"):
        lr = 3e-3 * min(1, (k + 1) / 10) * (1 - k / cfg.align)
        optimizer.step((loss(rng) for rng in rngs), lr)


def teach(model: Qwen25VL, tokenizer, settings, cfg: Config, ranks):
    """The language model alone: noise at its rate would undo what the tower has learnt. A cosine to
    zero; where a gate does not hold, shorter ones from a third of the peak."""
    layers = list(model.model.layers.parameters())
    others = [weight for weight in layers if weight.ndim == 1]
    others += [model.model.embed_tokens.weight, model.model.norm.weight, model.lm_head.weight]
    optimizer = Optimizer([weight for weight in layers if weight.ndim == 2], others, ranks)
    rngs = [random.Random(f"{cfg.seed}/base/{half}") for half in range(ranks.rank, 2, ranks.size)]
    log, step, count, peak = RunLog(cfg.out, cfg, cfg.most, ranks.main), 0, cfg.steps, cfg.lr
    failed = [*GATES]
    while failed and step + count <= cfg.most:
        for k in range(count):
            drawn = [[world.example(rng) for _ in range(16)] for rng in rngs]
            packs = [pack_examples(half, tokenizer, settings) for half in drawn]
            (tokens,) = distributed.sums(sum(len(pack.targets) for pack in packs))
            losses = [-model.logps(pack)[0].sum() / tokens for pack in packs]
            lr = peak * min(1.0, (k + 1) / 20) * 0.5 * (1 + math.cos(math.pi * k / count))
            optimizer.step(losses, lr)
            if step % 20 == 0:
                (loss,) = distributed.sums(sum(loss.item() for loss in losses))
                log.log(step, {"loss": loss, "lr": lr}, show=("loss", "lr"))
            step += 1
        count, peak, measured = cfg.more, cfg.lr / 3, skills(model, tokenizer, settings)
        failed = [f"{n} {measured[n]:.2f}" for n, gate in GATES.items() if measured[n] < gate]
        if ranks.main:
            held = f"these gates do not hold: {', '.join(failed)}" if failed else "all gates hold"
            print(f"{step} steps, {held}", flush=True)
    log.close()


def ensure(ranks, *paths: str):
    """Where a stage starts on its defaults, makes what it needs: data, base model, cold start."""
    makers = {"out/laptop/data": "miniature.world", "out/laptop/base": "miniature.base"}
    makers |= {"out/laptop/coldstart": "coldstart"}
    torchrun = "RANK WORLD_ LOCAL_ GROUP_ ROLE_ MASTER_ TORCHELASTIC_ OMP_".split()
    for path in paths:
        maker = makers.get(str(Path(path).parent))
        if not Path(path).exists() and maker and ranks.main:
            print(f"{path} is not there yet: running {maker}", flush=True)
            clean = {k: v for k, v in os.environ.items() if not k.startswith(tuple(torchrun))}
            clean["PYTHONPATH"] = str(Path(__file__).parents[1])
            if subprocess.run([sys.executable, "-m", maker], env=clean).returncode:
                raise RuntimeError(f"{maker} has failed, see above: {path} is still missing")
        ranks.wait()


def main(cfg: Config):
    if cfg.measure:
        settings = data.load_tokenizer(cfg.measure), data.load_image_settings(cfg.measure)
        return print(json.dumps(skills(load_model(cfg.measure), *settings), indent=1))
    ranks, part = distributed.start(), Path(cfg.out) / "model.part"
    if ranks.size > 2:
        raise ValueError(f"{ranks.size} processes: the base model is trained by one or two")
    if ranks.main:
        world.save_tokenizer(part)
    ranks.wait()
    readers = data.load_tokenizer(part), data.load_image_settings(part)
    torch.manual_seed(cfg.seed)
    model = Qwen25VL(model_config(len(readers[0])))
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.5)
    align(model, *readers, cfg, ranks)
    teach(model, *readers, cfg, ranks)
    save_model(model, part)
    if ranks.main:
        checkpoint.publish(part, part.with_suffix(""))
    distributed.finish(ranks)


if __name__ == "__main__":
    run_main(main, Config)
