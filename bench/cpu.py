"""Speed against transformers and TRL on one CPU core: same process, same weights, same tokens.

  coldstart  a step of stage 1 on documents of lognormal length
  update     a policy step of stage 2: one prompt, 16 responses
  rollout    sampling with log-probs; responses end where both sides are told to
  trl        a whole iteration of PPO and GRPO: sample, grade, judge, learn
  scaling    seconds against size of what should be linear

    python bench/cpu.py --out out/cpu.json    # all, 6 to 7 minutes of CPU time

Before a ratio stands a gate: log-probs, gradients, tokens of all sides agree to float rounding, or
the program ends with what it found. Sides take turns (ours, theirs, ours, ...) and the median CPU
time of the process counts: a busy machine disturbs all alike. A peer is measured as it comes and in
other ways, the fastest of which is its best; where we are no faster, the last table says so.

TRL is for this file alone (1.12 is the last with PPO); without it the theme `trl` is left out:

    python -m venv .venv-bench && .venv-bench/bin/pip install torch==2.13.0  # the same build
    .venv-bench/bin/pip install -r requirements-bench.txt && .venv-bench/bin/python bench/cpu.py
"""

import io
import json
import math
import os
import re
import statistics
import sys
import tempfile
import time
import timeit
from collections.abc import Callable
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import reward  # noqa: E402
import rl  # noqa: E402
import rollout  # noqa: E402
from common import data, distributed, packs  # noqa: E402
from common.log import progress, run_main  # noqa: E402
from miniature import base, world  # noqa: E402
from model import (  # noqa: E402
    Inputs,
    Qwen25VL,
    VisionConfig,
    hub_name,
    load_model,
    save_model,
    train_flops,
)

ALONE = distributed.World(0, 1, torch.device("cpu"))
SHAPE = dict(hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, vocab_size=2048, mrope_section=(8, 12, 12))  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Sizes of the work. Lengths are lognormal where a sigma (of their logarithm) is given."""

    themes: tuple[str, ...] = ("coldstart", "update", "rollout", "trl", "scaling")
    rounds: int = 3  # times each side is measured, after the gate has warmed it up
    documents: tuple[int, ...] = (24,)  # of a cold-start step
    updates: tuple[tuple[int, int], ...] = ((128, 128), (64, 256))  # prompt, mean response tokens
    rollouts: tuple[tuple[int, int, int, float], ...] = (  # prompts, samples, mean tokens, sigma
        (4, 16, 48, 0.8), (8, 1, 64, 0), (4, 16, 64, 0))  # fmt: skip
    iterations: tuple[tuple[str, int, int, int, float], ...] = (  # algorithm, then the same
        ("ppo", 4, 8, 32, 0.8), ("ppo", 4, 8, 32, 0), ("grpo", 4, 8, 32, 0.8))  # fmt: skip
    pack_tokens: int = 4096  # the default of coldstart.py and rl.py
    seed: int = 0  # of weights, documents, lengths
    out: str = ""  # JSON file with everything measured


def agree(what: str, found: float, limit: float = 1e-4) -> str:
    """The parity gate."""
    if not found <= limit:  # NaN too
        raise SystemExit(f"parity gate: {what} differ by {found:.3g} > {limit:g}; no ratio")
    return f"{what} differ by {found:.1e} at most"


def measure(label: str, sides: dict, rounds: int, warm: int = 0) -> dict[str, list[float]]:
    """CPU seconds of each side in each round, in turns, after `warm` rounds that do not count."""
    seconds = {name: [] for name in sides}
    for number in progress(range(-warm, rounds), label, rounds + warm):
        for name, side in sides.items():
            start = time.process_time()
            side()
            seconds[name] += [time.process_time() - start] if number >= 0 else []
    return seconds


def report(theme: str, work: str, gate: str, seconds: dict[str, list[float]]) -> list[dict]:
    """Sides: ours, the peer as it comes, its other ways. table: a row for each way of ours."""
    print(f"\n{theme}: {work}\ngate: {gate}\n\n| side | CPU s, median | all |\n|---|---|---|")
    medians = {side: statistics.median(found) for side, found in seconds.items()}
    for side, found in seconds.items():
        every = " ".join(f"{x:.3f}" for x in sorted(found))
        print(f"| {side} | {medians[side]:.3f} | {every} |", flush=True)
    theirs, table = [side for side in medians if not side.startswith("ours")], []
    for side in (side for side in medians if side not in theirs):
        cells = [theme, work, f"{side}: {medians[side]:.2f} s"]
        for peer in (theirs[0], min(theirs, key=medians.get)):
            ratio = medians[peer] / medians[side]
            verdict = f"{ratio:.2f}{', no faster' * (ratio < 1.05)}"
            cells += [f"{peer}: {medians[peer]:.2f} s", verdict]
        table.append(cells)
    return [{"theme": theme, "work": work, "gate": gate, "seconds": seconds, "table": table}]


def lengths_of(mean: float, sigma: float, count: int, rng) -> list[int]:
    """Quantiles of a lognormal distribution, shuffled: no lucky draw decides."""
    z = np.array([statistics.NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)])
    lengths = np.exp(math.log(mean) - sigma**2 / 2 + sigma * z).round().astype(int)
    return rng.permutation(lengths).tolist()


def document(prompt: int, response: int, rng) -> data.Document:
    """So many random words, none of them special."""
    ids = rng.integers(len(world.SPECIAL), SHAPE["vocab_size"], prompt + response).tolist()
    return data.Document(data.Prompt(ids[:prompt], ids[:prompt], None, (), ()), ids[prompt:])


def problems_of(count: int, rng) -> list[data.Problem]:
    return [
        data.Problem(str(i), " ".join(rng.choice(world.FILLERS, 26)), "7") for i in range(count)
    ]


def name_of(count: int, samples: int, lengths: list[int]) -> str:
    span = f"{min(lengths)} to {max(lengths)}" if len({*lengths}) > 1 else lengths[0]
    return f"{count} x {samples} responses of {span} tokens, {sum(lengths)} in all"


def make_model(folder: Path, seed: int):
    """A model directory: random weights, the miniature's tokenizer."""
    world.save_tokenizer(folder)
    tower = VisionConfig(1, 48, 96, 3, SHAPE["hidden_size"], (0,))  # never run
    torch.manual_seed(seed)
    save_model(Qwen25VL(replace(base.model_config(2048), vision=tower, **SHAPE)), folder)


def load_sides(folder: Path) -> tuple[Qwen25VL, nn.Module]:
    """The same weights in our model and in transformers', the tower frozen as in both stages."""
    theirs = hf.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    theirs.model.visual.requires_grad_(False)
    return distributed.load(folder, ALONE), theirs


def our_backward(model, documents, scales: Tensor, budget: int, shared: bool = False) -> Tensor:
    """Stage 2's loss with `scales` for advantages; all 1, it is stage 1's. -> log-probs."""
    found, tokens = [None] * len(documents), sum(len(d.response_ids) for d in documents)
    lengths = [len(d) for d in documents]
    (plan,) = packs.plan_packs(lengths, [id(d.prompt) for d in documents], budget)
    for members in plan:
        members = sorted(members, key=lengths.__getitem__)
        pack = packs.make_pack([documents[i] for i in members], members, shared)
        logps, _ = model.logps(pack)
        scale = scales[members].repeat_interleave(torch.tensor(pack.counts))
        (rl.policy_loss(logps, logps.detach(), scale, 0.2, 0.2).sum() / tokens).backward()
        for i, part in zip(members, logps.detach().split(pack.counts), strict=True):
            found[i] = part
    return torch.cat(found)


def their_backward(model, documents, scales: Tensor, groups) -> Tensor:
    """Rows padded on the right, no logits before the shortest prompt's end, as in TRL."""
    found, tokens = [None] * len(documents), sum(len(d.response_ids) for d in documents)
    for group in groups:
        ids = pad_sequence([torch.tensor(documents[i].ids) for i in group], True)
        starts = torch.tensor([[len(documents[i].prompt.ids)] for i in group])
        ends, places = torch.tensor([[len(documents[i])] for i in group]), torch.arange(len(ids[0]))
        keep = len(places) - int(starts.min())
        mask = {"attention_mask": (places < ends).long()} if len(group) > 1 else {}
        logits = model(ids, **mask, logits_to_keep=keep + 1, use_cache=False).logits[:, :-1]
        logps = logits.gather(2, ids[:, -keep:, None]).squeeze(2) - logits.logsumexp(-1)
        trained = ((places >= starts) & (places < ends))[:, -keep:]
        losses = rl.policy_loss(logps, logps.detach(), scales[group, None], 0.2, 0.2)
        ((losses * trained).sum() / tokens).backward()
        for i, row, mine in zip(group, logps.detach(), trained, strict=True):
            found[i] = row[mine]
    return torch.cat(found)


def compete(theme: str, work: str, documents, scales: Tensor, width: int, folder, cfg: Config):
    """An optimiser step of ours and of transformers, which pads `width` documents at a time."""
    (ours, theirs), order = load_sides(folder), np.argsort([*map(len, documents)]).tolist()
    our = partial(our_backward, ours, documents, scales, cfg.pack_tokens)
    their = partial(their_backward, theirs, documents, scales)
    sides = {"ours, packed": (ours, our)}
    if len({id(d.prompt) for d in documents}) < len(documents):
        sides["ours, shared prompt"] = ours, partial(our, shared=True)
    for label, groups in {
        f"padded by {width}": torch.arange(len(order)).split(width),
        "by length, padded by 8": torch.tensor(order).split(8),
        "by length, padded by 4": torch.tensor(order).split(4),
        "one by one": torch.tensor(order).split(1),
    }.items():
        sides[f"transformers, {label}"] = theirs, partial(their, groups)
    found, steps = [], {}
    for name, (model, backward) in sides.items():
        model.zero_grad()
        logps, named = backward(), model.named_parameters()
        grads = {hub_name(n): p.grad.flatten() for n, p in named if p.grad is not None}
        found.append((logps, torch.cat([grads[n] for n in sorted(grads)])))
        adam = torch.optim.AdamW(model.parameters(), 1e-6, fused=True)  # no gradient: left alone
        steps[name] = lambda a=adam, b=backward: (a.zero_grad(), b(), a.step())
    (logps, gradient), *others = found
    gate = agree("log-probs", max((x - logps).abs().max().item() for x, _ in others))
    apart = max((g - gradient).norm() for _, g in others) / gradient.norm()
    gate += ", " + agree("gradients", apart.item())
    return report(theme, work, gate, measure(f"{theme}, {work}", steps, cfg.rounds))


def coldstart(folder: Path, cfg: Config, rng, count: int) -> list[dict]:
    documents = [document(n // 4, n - n // 4, rng) for n in lengths_of(150, 0.8, count, rng)]
    wide = sum(8 * max(map(len, documents[i : i + 8])) for i in range(0, count, 8))
    work = f"{count} documents, {sum(map(len, documents))} tokens ({wide} when padded by 8)"
    return compete("coldstart", work, documents, torch.ones(count), 8, folder, cfg)


def update(folder: Path, cfg: Config, rng, prompt: int, mean: int) -> list[dict]:
    lengths, first = lengths_of(mean, 0.8, 16, rng), document(prompt, 0, rng)
    documents = [replace(document(0, n, rng), prompt=first.prompt) for n in lengths]
    advantages = torch.tensor(rng.normal(size=16), dtype=torch.float32)
    work = f"prompt of {prompt}, 16 responses, {sum(lengths)} tokens in all"
    return compete("update", work, documents, advantages, 16, folder, cfg)


@contextmanager
def ending(sampler, lengths: list[int], problems, samples: int):
    """Within, row i of sampler.generate(problems, samples, seed=(0,)) has lengths[i] tokens.
    Rows move when others end: the uniform number that one draws with tells which row and token.
    """
    draw, forbidden, stop = rollout.draw_tokens, sampler.forbidden, min(sampler.stops)
    seeds = [rollout.address((0,), p.id, n) for p in problems for n in range(samples)]
    drawn = [rollout.row_uniforms(seed, max(lengths)) for seed in seeds]
    (known, where), last = torch.stack(drawn, dim=1).flatten().sort(), torch.tensor(lengths) - 1

    def draw_or_stop(logits, uniforms, *how) -> Tensor:
        at = torch.searchsorted(known, uniforms)
        assert torch.equal(known[at], uniforms), "the sampler draws with other numbers than these"
        rows, token = where[at] % len(lengths), draw(logits, uniforms, *how)
        return torch.where(last[rows] == where[at] // len(lengths), stop, token)

    sampler.forbidden = torch.cat([forbidden, torch.tensor([stop])])
    with mock.patch.object(rollout, "draw_tokens", draw_or_stop):
        yield
    sampler.forbidden = forbidden


class Due(hf.LogitsProcessor):
    """The same rule for generate()."""

    def __init__(self, lengths: list[int], sampler, start: int):
        self.lengths, self.start, self.stop = torch.tensor(lengths), start, min(sampler.stops)
        self.forbidden = torch.cat([sampler.forbidden, torch.tensor([self.stop])])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.index_fill(1, self.forbidden, float("-inf"))
        due = self.lengths == input_ids.shape[1] - self.start + 1
        scores[due] = float("-inf")
        scores[due, self.stop] = 0.0
        return scores


@torch.no_grad()
def their_rollouts(model, prompts: Tensor, lengths, sampler, size: int, **options):
    """prompts (N, P). -> tokens and log-probs of all responses, flat."""
    tokens, found, start = [], [], prompts.shape[1]
    for rows in torch.arange(len(prompts)).split(size):
        due, asked = [lengths[i] for i in rows], prompts[rows]
        rule = hf.LogitsProcessorList([Due(due, sampler, start)])
        out = model.generate(
            asked, attention_mask=torch.ones_like(asked), logits_processor=rule,
            max_new_tokens=max(due), return_dict_in_generate=True, **options,
        )  # fmt: skip
        new, real = out.sequences[:, start:], torch.arange(max(due)) < torch.tensor(due)[:, None]
        tokens.append(new[real])
        if out.logits:
            logits = torch.stack(out.logits, 1)
            found.append((logits.gather(2, new[..., None]).squeeze(2) - logits.logsumexp(-1))[real])
    return torch.cat(tokens), torch.cat(found) if found else None


def greedy_gap(greedy: list, tokens: Tensor, logps: Tensor) -> float:
    """Largest difference of log-probs, each row up to a tie: the first token that differs counts
    too, and behind it the two sides read different texts.
    """
    gaps, sizes = [], [len(r.response_ids) for r in greedy]
    for r, theirs, their_logps in zip(greedy, tokens.split(sizes), logps.split(sizes), strict=True):
        same = (theirs == torch.tensor(r.response_ids)).cumprod(0).sum().item()
        gaps.append((their_logps - torch.tensor(r.logps))[: same + 1].abs().max())
    return max(gaps).item()


def rollouts(folder: Path, cfg: Config, rng, count, samples, mean, sigma) -> list[dict]:
    (ours, theirs), rows = load_sides(folder), count * samples
    sampler = rollout.TorchSampler(ours, data.load_tokenizer(folder), None)
    theirs.generation_config.update(eos_token_id=min(sampler.stops), pad_token_id=0, top_k=0)
    problems, lengths = problems_of(count, rng), lengths_of(mean, sigma, rows, rng)
    generate = partial(sampler.generate, problems, samples, max(lengths), seed=(0,))
    work = name_of(count, samples, lengths)
    with ending(sampler, lengths, problems, samples):
        greedy = generate(temperature=0)
        prompts = torch.tensor([r.prompt.ids for r in greedy])
        their = partial(their_rollouts, theirs, prompts, lengths, sampler)
        tokens, logps = their(rows, do_sample=False, output_logits=True)
        gate = agree("greedy tokens are equal, log-probs", greedy_gap(greedy, tokens, logps))
        sides = {
            "ours": generate,
            "generate": partial(their, rows, do_sample=True, output_logits=True),
            "generate, no log-probs": partial(their, rows, do_sample=True),
            "generate by 16": partial(their, 16, do_sample=True, output_logits=True),
        }
        seconds = measure(f"rollout, {work}", sides, cfg.rounds)
    return report("rollout", work, gate, seconds)


def odd(completion_ids: list[list[int]], **_) -> list[float]:
    """The reward of all sides: random weights are never right."""
    return [float(sum(ids) % 2) for ids in completion_ids]


class Odd(nn.Module):
    """As a reward model, which TRL's PPO wants."""

    base_model_prefix, score = "backbone", nn.Identity()

    def backbone(self, input_ids: Tensor, **_):
        return mock.Mock(hidden_states=[(input_ids.cumsum(1) % 2)[..., None].float()])


def as_qwen2(folder: Path, kind=hf.Qwen2ForCausalLM):
    """Our decoder as transformers' Qwen2, which it is for text: TRL's PPO knows no Qwen2.5-VL."""
    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = hf.Qwen2Config.from_pretrained(folder, rope_parameters=rope, num_labels=1)
    config.pad_token_id = config.bos_token_id
    return kind.from_pretrained(folder, config=config, dtype=torch.float32)


def our_iteration(c: rl.Config, models: dict, problems, lengths: list[int], sampler, drawn: set):
    """The steps of rl.main, all but log and checkpoint. drawn: gets its tokens."""
    policy, cost = models["policy"].model, partial(train_flops, sampler.model.config)
    with ending(sampler, lengths, problems, c.samples):
        rollouts = sampler.generate(problems, c.samples, max(lengths), seed=(0,))
    for r, r.reward in zip(rollouts, odd([r.response_ids for r in rollouts]), strict=True):
        r.verdict = rl.grade(r.problem.answer, r.text)
    rollouts = packs.exchange(rollouts, problems)
    parts = packs.share_packs(rollouts, c, cost, None, ALONE)
    if c.algorithm == "ppo":
        every = sum(parts, [])
        rl.critic_values(models["critic"], every)
        for p in every:
            p.advantages, p.returns = rl.gae(p.rewards, p.values, p.counts, rl.GAMMA, c.lam)
        rl.normalise(every)
        rl.train(models["critic"], parts, rl.critic_losses, 0)
    else:
        rl.compare_samples(rollouts, sum(parts, []), c.samples)
    metrics = rl.train(models["policy"], parts, partial(rl.policy_losses, cfg=c), 0)
    sampler.sync(distributed.whole_weights(policy))
    rollout.canary_gap(sampler, policy, problems[0], False)
    drawn.add(int(metrics["tokens"]))


def their_iteration(c: rl.Config, prompts, lengths, sampler, drawn: set, **setting) -> Callable:
    """TRL's train() of one step, on all prompts with c.samples tries each."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    policy, start, longest, rows = as_qwen2(c.model), len(prompts[0]), max(lengths), len(lengths)
    plain, rule = policy.generate, hf.LogitsProcessorList([Due(lengths, sampler, start)])

    def generate(*inputs, **options):
        found = plain(*inputs, logits_processor=rule, **options)
        new = getattr(found, "sequences", found)[:, start:]
        drawn.add(int((new == min(sampler.stops)).int().argmax(1).add(1).sum()))
        return found

    policy.generate = generate
    setting |= dict(output_dir=f"{c.model}/trl", report_to="none", save_strategy="no", bf16=False)
    setting |= dict(per_device_train_batch_size=8, gradient_accumulation_steps=rows // 8)
    setting |= dict(use_cpu=True, learning_rate=c.lr, temperature=1.0, disable_tqdm=True)
    if c.algorithm == "grpo":
        room = dict(num_generations=c.samples, max_completion_length=longest, max_steps=1)
        asked = Dataset.from_dict({"prompt": [sampler.tokenizer.decode(ids) for ids in prompts]})
        args = GRPOConfig(**setting, **room)
        return GRPOTrainer(policy, odd, args, asked, None, sampler.tokenizer).train
    args = PPOConfig(**setting, num_ppo_epochs=1, response_length=longest, stop_token="eos",
                     num_sample_generations=0, total_episodes=rows)  # fmt: skip
    asked = Dataset.from_dict({"input_ids": prompts * c.samples})
    value = as_qwen2(c.model, hf.Qwen2ForSequenceClassification)
    models = policy, as_qwen2(c.model), Odd()
    return PPOTrainer(args, sampler.tokenizer, *models, asked, value, eval_dataset=asked).train


def trl(folder: Path, cfg: Config, rng, algorithm, count, samples, mean, sigma) -> list[dict]:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    ours, tokenizer, drawn = load_model(folder), data.load_tokenizer(folder), set()
    sampler = rollout.TorchSampler(ours, tokenizer, None)
    problems, lengths = problems_of(count, rng), lengths_of(mean, sigma, count * samples, rng)
    prompts = [data.encode_prompt(p, tokenizer, None).ids for p in problems]
    c = rl.Config(model=str(folder), algorithm=algorithm, problems=count, samples=samples, lr=1e-6,
                  critic_lr=1e-6, lengths=((0, max(lengths)),))  # fmt: skip
    ids = torch.tensor(document(200, 0, rng).ids)
    inputs = Inputs(ids, torch.arange(200).expand(3, -1), [200])
    gap = ours.logits(inputs) - as_qwen2(folder)(ids[None]).logits[0]
    gate = agree("logits", gap.abs().max().item()) + f", {sum(lengths)} tokens drawn and trained"
    common = prompts, lengths, sampler, drawn
    ours = partial(our_iteration, c, rl.load_models(c, c.model, ALONE), problems, *common[1:])
    sides = {"ours": ours, "TRL": their_iteration(c, *common)}
    sides["TRL, activations kept"] = their_iteration(c, *common, gradient_checkpointing=False)
    work = f"{algorithm}, {name_of(count, samples, lengths)}"
    with redirect_stdout(io.StringIO()):
        seconds = measure(f"trl, {work}", sides, cfg.rounds, warm=1)
    if drawn != {sum(lengths)}:
        raise SystemExit(f"parity gate: {drawn} tokens, not {sum(lengths)}")
    return report("trl", work, gate, seconds)


def scaling(folder: Path, cfg: Config, rng) -> list[dict]:
    config = replace(load_model(folder).config, num_hidden_layers=0, vocab_size=256)
    model = Qwen25VL(config)  # no layers take no time; responses end after about 24 tokens
    sampler = rollout.TorchSampler(model, data.load_tokenizer(folder), None, 1 << 20)
    words = config.vocab_size - len(sampler.forbidden)
    model.model.embed_tokens.weight.data.fill_(1.0)
    stop = model.lm_head.weight.data.zero_()[config.eos_token_id]
    stop.fill_(math.log(words / 24) / config.hidden_size)
    thought, rows = "so the sum is $x + y = 12$, and { 12 } may be wrong; once more: ", []
    work = {
        "TorchSampler without its model, rows": (64, lambda n: partial(
            sampler.generate, problems_of(n // 16, rng), 16, 64, seed=(0,))),
        "reward.grade, characters after the box": (4096, lambda n: partial(
            reward.grade, "1/3", r"\boxed{\frac{2}{6}} " + thought * (n // len(thought)))),
        "packs.plan_packs on 8 ranks, documents": (256, lambda n: partial(
            packs.plan_packs, lengths_of(2048, 0.8, n, rng), [i // 16 for i in range(n)],
            65536, 8, partial(train_flops, config))),
        "rl.gae, tokens": (1024, lambda n: partial(
            rl.gae, torch.zeros(n), torch.rand(n), [n], 1.0, 0.95)),
    }  # fmt: skip
    print("\nscaling: seconds ~ size ^ exponent, by least squares of the logarithms\n\n"
          "| what | size: ms | exponent |\n|---|---|---|")  # fmt: skip
    for name, (smallest, make) in work.items():
        sizes = [smallest * 4**k for k in range(4)]
        runs = [timeit.Timer(make(n), timer=time.process_time).autorange() for n in sizes]
        seconds = [total / calls for calls, total in runs]
        exponent = float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])
        shown = ", ".join(f"{n}: {s * 1e3:.3g}" for n, s in zip(sizes, seconds, strict=True))
        print(f"| {name} | {shown} | {exponent:.2f} |", flush=True)
        rows.append({"what": name, "sizes": sizes, "seconds": seconds, "exponent": exponent})
    return rows


def main(cfg: Config):
    works = {"coldstart": (coldstart, [(n,) for n in cfg.documents]), "scaling": (scaling, [()]),
             "update": (update, cfg.updates), "rollout": (rollouts, cfg.rollouts),
             "trl": (trl, cfg.iterations)}  # fmt: skip
    if unknown := {*cfg.themes} - {*works}:
        raise ValueError(f"themes are {', '.join(works)}; got {', '.join(sorted(unknown))}")
    if "trl" in cfg.themes and not find_spec("trl"):
        print("trl is not installed: pip install -r requirements-bench.txt")
        works["trl"] = trl, []
    torch.set_num_threads(1)
    hf.utils.logging.set_verbosity_error()
    hf.utils.logging.disable_progress_bar()
    load, began, found, rng = os.getloadavg()[0], time.perf_counter(), {}, np.random.default_rng
    with tempfile.TemporaryDirectory() as name:
        make_model(folder := Path(name), cfg.seed)
        for theme in cfg.themes:
            play, shapes = works[theme]
            found[theme] = [row for x in shapes for row in play(folder, cfg, rng(cfg.seed), *x)]
    print("\n| theme | work | ours | peer as it comes | times ours | its best | times ours |\n"
          "|---|---|---|---|---|---|---|")  # fmt: skip
    for cells in (x for rows in found.values() for row in rows for x in row.get("table", [])):
        print(f"| {' | '.join(cells)} |")
    info = Path("/proc/cpuinfo")
    names = re.findall("model name\\s*: (.*)", info.read_text()) if info.exists() else []
    about = {"cpu": (names or ["unknown"])[0], "python": sys.version.split()[0]}
    about |= {name: version(name) for name in ("torch", "transformers", "trl") if find_spec(name)}
    about |= {"load before": f"{load:.1f}", "load after": f"{os.getloadavg()[0]:.1f}"}
    about |= {"minutes": f"{(time.perf_counter() - began) / 60:.1f}"}
    print("\none thread, float32; " + ", ".join(f"{name} {x}" for name, x in about.items()))
    if cfg.out:
        Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
        whole = {"config": asdict(cfg), "machine": about, "found": found}
        Path(cfg.out).write_text(json.dumps(whole, indent=1))


if __name__ == "__main__":
    run_main(main, Config)
