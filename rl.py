"""Stage 2, multimodal reinforcement learning: PPO on text and pictures, with a reward that only
asks whether the boxed answer is right (OVR, sec. 3.2 and 4.1; the recipe is Open-Reasoner-Zero's).

Again and again: 1 sample, 2 reward, 3 pack, 4 advantages, 5 update, 6 sync, log, save. The loop of
main() is numbered so. How it departs from textbook PPO, all by the paper:
  1  No KL term and no reference model; no entropy bonus.
  2  GAE with gamma = lambda = 1: A_t = R - V(s_t), and the critic's target is R at every token.
  3  Strictly on-policy: one policy step for each batch, so that the ratio is exactly 1 and the clip
     never acts. With --policy-steps 4 it does, and with --finish-share 0.8, which puts the longest
     responses of a step aside: they go on in the next, and begin with tokens of an older policy.
  4  Policy and critic are two networks, both from the cold-start model.
  5  Advantages are normalised over all tokens of the batch.
  6  A response that is cut at the length budget is wrong: reward 0, nothing bootstrapped. The
     budget is a penalty that the curriculum relaxes.
`--algorithm grpo` replaces the critic by the mean of the G samples: step 4 has the `if`.

    torchrun rl.py                                 # the miniature: minutes on a laptop
    torchrun --nproc-per-node 2 rl.py              # the same numbers from two processes
    python -m tools.trace                          # one recorded problem through the six steps
    bash runs/ovr_7b.sh                            # both stages at 7B, with the paper's numbers

Dimensions: P problems, G samples each, N = P G rollouts, T tokens of a pack, R trained tokens.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from common import checkpoint, data, distributed
from common.batches import Batches, groups_of, row_of, trace_rows
from common.data import Rollout
from common.log import RunLog, Timer, model_card, run_main, stop_on_signal
from common.packs import Pack, full_pack, share_packs, with_blank_picture
from evaluation import behaviors
from miniature.base import ensure
from model import train_flops
from reward import grade
from rollout import canary, canary_gap, open_sampler, solved

GAMMA = 1.0  # discount a token; paper, sec. 4.1
BETAS, WEIGHT_DECAY = (0.9, 0.95), 0.0  # AdamW; paper, sec. 4.1
CLIP_NORM = 1.0  # of the gradient; Open-Reasoner-Zero's code
# The sampler's log-probs and the trainer's may differ by so many nats a token on average: rounding
# gives 1e-6 to 1e-4 in float32 and about 0.01 in bfloat16, stale weights 0.3 and more.
GAP_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.1}
LOGGED = 16  # decoded rollouts a step in rollouts.jsonl
NO_BOX = ("no_box", "unclosed")  # of the matcher's statuses
UNREAD = ("unparsed", "gold_unparsed", "too_big", "failed")
SHOWN = ("reward", "length", "entropy", "grad_norm", "logp_diff")  # on the step line


@dataclass(frozen=True)
class Config:
    """Stage 2. Defaults are the miniature's; the paper's value stands behind each setting."""

    model: str = "out/laptop/coldstart/model"  # HF directory or Hub name; paper: the cold start
    data: str = "out/laptop/data/train.jsonl"  # JSONL, parquet, Hub name; paper: 300 k problems
    columns: tuple[str, ...] = ()  # of rows with other names: prompt=problem answer=solution
    out: str = "out/laptop/rl"  # run directory
    algorithm: Literal["ppo", "grpo"] = "ppo"  # grpo has no critic; paper: ppo
    steps: int = 35  # iterations; paper: 900 to 1,000; laptop: a minute
    problems: int = 64  # unique prompts a step, over all ranks; paper: 512; laptop: seconds a step
    samples: int = 4  # responses a prompt; paper: 16; laptop: seconds a step
    resample: int = 0  # rounds in which groups all right or all wrong are replaced; paper: none
    policy_steps: int = 1  # optimiser steps a batch; paper: 1
    critic_steps: int = 4  # optimiser steps a batch, one pass; paper: 4; ORZ's code: one pass
    # (step, tokens): from that step on, tokens a response may have; paper: 0 24k, 300 32k, 700 48k
    lengths: tuple[tuple[int, int], ...] = ((0, 67),)
    prompt_tokens: int = 512  # longer prompts are left out, with a count; ours: never cut
    lr: float = 3e-4  # policy; paper: 1e-6; laptop: small models want larger steps
    critic_lr: float = 1e-3  # critic; paper: 5e-6; laptop: small models want larger steps
    warmup: int = 5  # optimiser steps, linear, of each model; paper: 50; laptop: it has 35 steps
    lam: float = 1.0  # GAE's lambda; paper: 1
    epsilon: float = 0.2  # PPO's clip; paper: 0.2; acts with more policy steps or a finish share
    epsilon_high: float = 0.0  # the clip's upper end, DAPO: 0.28; paper: none; 0: as epsilon
    tis: float = 0.0  # cap of the weight trainer / sampler, 2 is usual; ours: 0, not weighted
    train_vision: bool = False  # trains tower and merger; ours: frozen, as in stage 1
    sampler: Literal["torch", "vllm"] = "torch"  # vllm: faster from tens of M parameters on
    sampler_batch: int = 256  # responses that a rank samples at once
    finish_share: float = 1.0  # of the responses; the rest goes on next step, off-policy; paper: 1
    kv_cache_gb: float = 0.25  # vllm's room for keys and values, a rank; 7B: 57 kB a token
    pack_tokens: int = 4096  # tokens a pack, which is a micro-batch; ours: what memory holds
    lora_rank: int = 0  # of adapters that train in place of the decoder; paper: 0, without
    lora_alpha: float = 32.0  # scales them by alpha / rank; Schulman et al. 2025: 32
    recompute: Literal["none", "selective", "full"] = "none"  # of activations, in backward
    compile: bool = False  # blocks by torch.compile: for GPUs; minutes at the start
    offload: bool = False  # a model that waits for the other waits in host memory
    save_every: int = 5  # steps between checkpoints; 0: by --save-minutes, or on Ctrl-C only
    save_minutes: float = 0.0  # after so many since the last one, too; 0: by steps alone
    keep_every: int = 1  # older exported models stay where this divides the step; the newest 2 do
    eval_data: str = ""  # problems that nobody trains on, solved greedily; none: no evaluation
    eval_every: int = 10  # steps between evaluations; 0: at the end only
    wandb: str = ""  # project on Weights & Biases that gets metrics and rollouts; none: not sent
    tensorboard: bool = False  # metrics and rollouts into RUN/tensorboard, too
    seed: int = 0

    def __post_init__(self):
        if min(self.steps, self.samples, self.policy_steps, self.critic_steps) < 1 or self.tis < 0:
            raise ValueError("steps, samples, policy and critic steps count from 1, tis from 0")
        if self.epsilon_high < 0:
            raise ValueError(f"--epsilon-high {self.epsilon_high} < 0: how far above 1 it may rise")
        starts = [first for first, _ in self.lengths]
        if starts != sorted(set(starts)) or starts[:1] != [0]:
            raise ValueError(f"--lengths are pairs of step and tokens, rising from 0: {starts}")
        if (longest := self.prompt_tokens + self.longest) > self.pack_tokens:
            raise ValueError(f"--pack-tokens {self.pack_tokens} < prompt + response, {longest}")
        if self.problems < self.parts:
            cure = "raise it, or lower --critic-steps and --policy-steps"
            raise ValueError(f"--problems {self.problems} < {self.parts} parts of a batch: {cure}")
        if self.algorithm == "grpo" and (self.samples < 2 or self.finish_share < 1):
            rule = "--samples must be at least 2, and --finish-share 1"
            raise ValueError(f"grpo compares all samples of a problem: {rule}")
        if not self.parts / self.problems <= self.finish_share <= 1:
            least = f"{self.parts} parts of a batch / --problems {self.problems}"
            raise ValueError(f"--finish-share {self.finish_share}: from {least} to 1")
        if self.resample < 0 or (self.resample and self.algorithm == "ppo"):
            why = "with ppo's critic a group that is all right or all wrong teaches, too"
            raise ValueError(f"--resample {self.resample} counts from 0, for grpo alone: {why}")

    @property
    def longest(self) -> int:
        """Tokens of the longest response of the run."""
        return max(tokens for _, tokens in self.lengths)

    @property
    def clip(self) -> tuple[float, float]:
        """How far below 1 and above 1 the ratio still counts."""
        return self.epsilon, self.epsilon_high or self.epsilon

    @property
    def parts(self) -> int:
        """Into how many a batch is cut; an optimiser step takes one or several of them."""
        return math.lcm(self.policy_steps, self.critic_steps if self.algorithm == "ppo" else 1)


# ------------------------------------------------------------------ the algorithm


def gae(
    rewards: Tensor, values: Tensor, counts: list[int], gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16) of responses back to back.

    rewards, values (R,), tokens of each response -> advantages A (R,), critic's targets A + V (R,).
    delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}; V_t is of the state
    *before* token t, and past the end V = A = 0, also where the response was cut: a cut is a
    failure, not a state with a future. With gamma = lam = 1 and one reward R at the end (OVR, sec.
    4.1): A_t = R - V_t and the target is R.
    """
    advantages = []
    for r, v in zip(rewards.split(counts), values.split(counts), strict=True):
        backwards, after, advantage = [], 0.0, 0.0
        for reward, value in zip(reversed(r.tolist()), reversed(v.tolist()), strict=True):
            advantage = reward + gamma * after - value + gamma * lam * advantage
            backwards.append(advantage)
            after = value
        advantages += reversed(backwards)
    advantages = torch.tensor(advantages, dtype=values.dtype)
    return advantages, advantages + values


def group_advantages(rewards: Tensor, eps: float = 1e-6) -> Tensor:
    """GRPO (Shao et al. 2024, sec. 4.1.2): A = (r - mean) / std in each group. (P, G) -> (P, G).

    A group that is all right or all wrong carries no signal and gets exactly 0, not noise / eps.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    std = rewards.std(dim=1, keepdim=True, correction=0)
    return torch.where(std > eps, centred / std.clamp_min(eps), 0.0)


def policy_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, low: float, high: float
) -> Tensor:
    """PPO's clipped objective (Schulman et al. 2017, eq. 7) as a loss, a term a token: all (R,).

    -min(ratio A, clip(ratio, 1 - low, 1 + high) A); PPO has low = high, DAPO (arXiv 2503.14476, eq.
    10) a larger high, so that unlikely tokens may rise. On-policy, old_logps = logps.detach(), the
    ratio is 1 and the gradient is that of -A log p.
    """
    ratios = (logps - old_logps).exp()
    return -torch.minimum(ratios * advantages, ratios.clamp(1 - low, 1 + high) * advantages)


def value_loss(values: Tensor, returns: Tensor) -> Tensor:
    """Half the squared error, a term a token, unclipped as in the paper's equation: all (R,)."""
    return 0.5 * (values - returns) ** 2


def importance_weights(logps: Tensor, sampler_logps: Tensor, cap: float) -> Tensor:
    """Truncated importance sampling (Ionides 2008): min(pi_trainer / pi_sampler, cap), all (R,).

    Constants to the gradient, exactly 1 where trainer and sampler agree; the cap bounds variance.
    """
    return (logps - sampler_logps).exp().clamp(max=cap).detach()


def length_budget(step: int, lengths: tuple[tuple[int, int], ...]) -> int:
    """Tokens a response may have (OVR, sec. 4.1: 24k, from step 300 on 32k, from 700 on 48k)."""
    return [tokens for first, tokens in lengths if first <= step][-1]


def rates(step: int, count: int, peak: float, warmup: int) -> list[float]:
    """Learning rates of the `count` optimiser steps of iteration `step`: linear, then constant.

    The warm-up counts optimiser steps, so a critic with four a batch is warm four times as soon.
    """
    return [peak * min(1.0, (step * count + k + 1) / max(1, warmup)) for k in range(count)]


def moments(x: Tensor, world) -> tuple[float, float]:
    """Mean and variance of x (R,) over the tokens of all ranks."""
    x = x.double()
    count, total, squares = distributed.sums(world, len(x), x.sum().item(), x.square().sum().item())
    return total / count, max(squares / count - (total / count) ** 2, 0.0)


def normalise(packs: list[Pack], world):
    """A <- (A - mean) / std over all tokens of the batch (OVR, sec. 4.1)."""
    mean, variance = moments(torch.cat([pack.advantages for pack in packs]), world)
    for pack in packs:
        pack.advantages = (pack.advantages - mean) / (math.sqrt(variance) + 1e-8)


# ------------------------------------------------------------------ the plumbing


def reward_of(rollout: Rollout) -> float:
    """The place for a reward of one's own: it sees verdict, text and every column of the row."""
    return rollout.verdict.score * rollout.stopped  # a response that was cut is wrong


def give_rewards(rollouts: list[Rollout]):
    """Once, where the text is; from here on they travel with the rollout."""
    for r in rollouts:
        p = r.problem
        r.verdict = grade(p.answer, r.text, choices=p.choices, precision=p.precision)
        try:
            r.reward = reward_of(r)
        except Exception as error:  # of whoever has changed it
            where = r.problem.place or r.problem.id
            raise RuntimeError(f"{where}: reward_of fails on it: {error!r}") from error


def without_contrast(group: list[Rollout]) -> bool:
    """Samples of one problem that are all right or all wrong: to GRPO they say nothing."""
    return not group_advantages(torch.tensor([[float(r.reward) for r in group]])).any()


def resample(rollouts: list[Rollout], cfg: Config, others: Callable) -> list[Rollout]:
    """Dynamic sampling (DAPO, Yu et al. 2025, arXiv 2503.14476, sec. 3.2 and eq. 11): a group
    without contrast has no gradient, so another problem is sampled in its place, in --resample
    rounds at most. others(round, slots): rollouts of the problems that take these slots over.

    -> all rollouts of this rank. Of a slot the last group counts: groups_of().
    """
    newest, every = groups_of(rollouts, cfg), [*rollouts]
    for round in range(1, cfg.resample + 1):
        slots = [slot for slot, group in sorted(newest.items()) if without_contrast(group)]
        if not slots:
            break
        new = others(round, slots)
        give_rewards(new)
        newest |= groups_of(new, cfg)
        every += new
    return every


def compare_samples(rollouts: list[Rollout], packs: list[Pack], samples: int) -> dict[str, float]:
    """GRPO: a rollout's advantage over the other samples of its problem, for each of its tokens."""
    rewards = torch.tensor([float(r.reward) for r in rollouts])
    advantages = group_advantages(rewards.view(-1, samples))
    for pack in packs:
        counts = torch.tensor(pack.counts[: len(pack.members)], dtype=torch.int64)
        pack.advantages = advantages.flatten()[pack.members].repeat_interleave(counts)
    return {"no_contrast": sum(not group.any() for group in advantages)}


@torch.no_grad()
def critic_values(critic, packs: list[Pack], world):
    """V(s_t) before each response token, onto the packs."""
    values = [critic.values(pack.to(world.device)) for pack in packs]
    for pack, of_pack in zip(packs, values, strict=True):  # now, so that no pack waits for a copy
        pack.values = of_pack.cpu()
    distributed.release(critic)


def critic_metrics(packs: list[Pack], world) -> dict[str, float]:
    """How well V predicts the return: explained variance 1 if perfectly, 0 if it is a constant."""
    values = torch.cat([pack.values for pack in packs])
    returns = torch.cat([pack.returns for pack in packs])
    value_mean, _ = moments(values, world)
    return_mean, variance = moments(returns, world)
    _, unexplained = moments(returns - values, world)
    explained = 1 - unexplained / max(variance, 1e-8)
    return {"explained_variance": explained, "value_mean": value_mean, "return_mean": return_mean}


@torch.no_grad()
def store_old_logps(policy, packs: list[Pack], world):
    """Before the first of several policy steps: what the ratio is measured against."""
    logps = [policy.logps(pack.to(world.device))[0] for pack in packs]
    for pack, of_pack in zip(packs, logps, strict=True):
        pack.old_logps = of_pack.cpu()
    distributed.release(policy)


def critic_losses(critic, pack: Pack) -> dict[str, Tensor]:
    return {"value_loss": value_loss(critic.values(pack), pack.returns)}


def policy_losses(policy, pack: Pack, cfg: Config) -> dict[str, Tensor]:
    """The loss of each token, and what else is watched of it: (R,) all.

    The old log-prob of a token that an earlier policy drew is what the sampler stored then.
    """
    logps, entropies = policy.logps(pack)
    old_logps = logps.detach() if pack.old_logps is None else pack.old_logps
    old_logps = torch.where(pack.stale, pack.logps, old_logps)
    weights = importance_weights(old_logps, pack.logps, cfg.tis) if cfg.tis else 1.0
    losses = policy_loss(logps, old_logps, pack.advantages, *cfg.clip) * weights
    with torch.no_grad():
        gap, off = old_logps - pack.logps, (logps - old_logps).exp() - 1
        low, high = cfg.clip
        watched = {
            "entropy": entropies,
            "surprisal": -logps,  # as the entropy, if draws follow the log-probs
            "clip_fraction": (off < -low) | (off > high),
            "ratio_diff": off.abs(),
            "logp_diff": gap.abs(),  # 0 of a stale token
            "sampler_kl": gap.exp() - 1 - gap,  # k3 estimate of KL(sampler | trainer)
            "stale_tokens": pack.stale,
        }
    return {"policy_loss": losses} | watched | ({"tis_weight": weights} if cfg.tis else {})


def train(
    pair: tuple, parts: list, rates: list[float], losses_of: Callable, step: int, world
) -> dict[str, float]:
    """One pass over the parts of a batch, an optimiser step for each rate; critic or policy.

    losses_of(model, pack) -> {name: (R,)}, of which the first is the loss. A minibatch's loss is
    its sum over all trained tokens of all ranks, divided by their number, which is known before
    backward: the gradient is the same however tokens are cut into packs, and whoever has them.

    -> means over all tokens; grad_norm, lr, tokens. A loss or gradient that is not finite is a
    FloatingPointError on all ranks, before the step.
    """
    (model, optimizer), size = pair, len(parts) // len(rates)
    totals, norms, tokens_in_all = Counter(), [], 0
    for k, rate in enumerate(rates):
        packs = sum(parts[k * size : (k + 1) * size], [])
        (tokens,) = distributed.sums(world, sum(len(pack.targets) for pack in packs))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        rows = []  # sums of each pack, read after the loop, in which nothing waits for the GPU
        for pack in packs:
            columns = losses_of(model, pack.to(world.device))
            loss = next(iter(columns.values())).sum() / max(tokens, 1)
            distributed.backward(model, loss, world, last=pack is packs[-1])
            rows.append(torch.stack([x.detach().double().sum() for x in columns.values()]))
        norms.append(distributed.clip_gradients(model, CLIP_NORM))
        rows = torch.stack(rows).tolist()
        sums = distributed.sums(world, *(sum(column) for column in zip(*rows, strict=True)))
        broken = [p for p, row in zip(packs, rows, strict=True) if not math.isfinite(row[0])]
        suspects = [name for pack in broken for name in pack.names]
        distributed.refuse_nan(world, step, {"loss": sums[0], "grad_norm": norms[-1]}, suspects)
        optimizer.step()
        totals.update(dict(zip(columns, sums, strict=True)))
        tokens_in_all += tokens
    means = {name: total / max(tokens_in_all, 1) for name, total in totals.items()}
    return means | {"grad_norm": sum(norms) / len(norms), "lr": rates[-1], "tokens": tokens_in_all}


# ------------------------------------------------------------------ what a step leaves behind


def describe(rollouts: list[Rollout], world) -> dict[str, float]:
    """Means over the rollouts of all ranks; pictures and text apart where it matters."""
    values = defaultdict(list)
    for r in rollouts:
        kind, status = "image" if r.problem.images else "text", r.verdict.status
        row = {"reward": r.reward, "length": len(r.response_ids), "truncated": not r.stopped}
        row |= {f"reward_{kind}": r.reward, f"length_{kind}": len(r.response_ids)}
        row |= {"no_box": status in NO_BOX, "unparsed": status in UNREAD}
        row |= {f"{kind}/{name}": n > 0 for name, n in behaviors.count(r.text).items()}
        row |= watched(r)
        for name, value in row.items():
            values[name].append(value)
    return distributed.means(world, {name: (sum(x), len(x)) for name, x in values.items()})


def watched(rollout: Rollout) -> dict[str, float]:
    """What its row asks for in a column `watch`, {name: pattern}: whether the response matches,
    and the reward, to be averaged over all rows of the same `group`.
    """
    row = rollout.problem.extra
    patterns, group = row.get("watch"), row.get("group", "all")
    if not patterns:
        return {}
    shown = {"reward": rollout.reward} | behaviors.watched(rollout.text, patterns)
    return {f"{name}/{group}": float(value) for name, value in shown.items()}


def card_of(cfg: Config, step: int) -> str:
    """README.md of an exported policy."""
    title, run = "Open Vision Reasoner, stage 2: multimodal reinforcement learning", Path(cfg.out)
    context = cfg.prompt_tokens + cfg.longest
    return model_card(title, cfg, run / "model", run, context, {"step": step})


# ------------------------------------------------------------------ start and loop


def load_problems(name: str, cfg: Config, world, tokenizer, settings) -> Sequence:
    """Those whose prompts are not too long; each rank checks a share. Of no name none."""
    if not name:
        return []
    share = (world.rank, world.size)
    problems = data.read_problems(name, columns=cfg.columns, share=share)
    lengths, ids = {}, {}
    for i in range(world.rank, len(problems), world.size):
        p = problems[i]
        lengths[i] = data.prompt_length(p.prompt, p.images, tokenizer, settings, p.place)
        ids[i] = p.id
    ids = distributed.union(world, ids)
    if len({*ids.values()}) < len(ids):  # read_problems sees those of one rank
        ((twin, count), *_) = Counter(ids.values()).most_common(1)
        rows = [i + 1 for i, own in sorted(ids.items()) if own == twin]
        raise ValueError(f"{name}: {count} rows, as {rows[:2]}, have the id {twin!r}")
    lengths = distributed.union(world, lengths)
    problems, too_long = data.filter_long(problems, cfg.prompt_tokens, lengths)
    fault = f"{name}: {too_long} problems left out: prompts over {cfg.prompt_tokens} tokens"
    if not len(problems):
        raise ValueError(f"{fault}, and none is left: raise --prompt-tokens")
    if too_long and world.main:
        print(fault)
    return problems


def load_models(cfg: Config, directory: str, world) -> dict[str, tuple]:
    """{"policy": (model, optimizer), "critic": ...}, from one model; grpo has no critic."""
    learns = distributed.Trained(cfg.train_vision, cfg.lora_rank, cfg.lora_alpha, cfg.seed)
    models, how = {}, (learns, cfg.recompute, cfg.compile)
    heads = {"policy": "lm"} | ({"critic": "value"} if cfg.algorithm == "ppo" else {})
    for name, head in heads.items():
        torch.manual_seed(cfg.seed)  # the value head, the same on every rank
        model = distributed.load(directory, world, head, *how)
        trained = [p for p in model.parameters() if p.requires_grad]
        # the learning rate is train()'s
        optimizer = torch.optim.AdamW(trained, 0.0, BETAS, weight_decay=WEIGHT_DECAY, fused=True)
        models[name] = (model, optimizer)
        if cfg.offload:  # before the next one comes: a GPU has no room for both
            distributed.move(model, optimizer, "cpu")
    return models


def refuse_gap(gap: float, world, when: str):
    """RuntimeError where sampler and trainer are plainly not the same policy."""
    if not gap <= GAP_LIMITS[world.dtype]:  # NaN too
        raise RuntimeError(
            f"{when}: log-probs of sampler and trainer differ by {gap:.3g} nats a token on average,"
            f" more than {GAP_LIMITS[world.dtype]:g}: the sampler has other weights, or a stale"
            " cache. If it is ordinary rounding, raise GAP_LIMITS in rl.py and set --tis 2"
        )


def main(cfg: Config):
    world = distributed.start()
    if cfg.problems < world.size:
        raise ValueError(f"--problems {cfg.problems} < {world.size} ranks: one would have none")
    ensure(world, cfg.model, cfg.data)
    run, directory = Path(cfg.out), data.model_directory(cfg.model)
    start, state = checkpoint.resume_or_start(run, cfg)
    tokenizer, settings = data.load_tokenizer(directory), data.load_image_settings(directory)
    problems = load_problems(cfg.data, cfg, world, tokenizer, settings)
    held_out = load_problems(cfg.eval_data, cfg, world, tokenizer, settings)
    room = cfg.sampler_batch, cfg.prompt_tokens + cfg.longest, cfg.kv_cache_gb
    # before the trained models: vLLM measures the memory that is free when it starts
    sampler = open_sampler(cfg.sampler, directory, world, room)
    sampler.rest()
    models = load_models(cfg, directory, world)
    if state:
        checkpoint.load_state(state, models)
    policy, critic = models["policy"][0], models.get("critic", (None,))[0]
    known_prompt = canary(problems, tokenizer, settings, cfg.prompt_tokens)
    encode = partial(data.encode_problem, tokenizer=tokenizer, settings=settings)
    cost, losses_of = partial(train_flops, policy.config), partial(policy_losses, cfg=cfg)
    peaks = []  # GB that a rank had, taken wherever memory may be given back

    def offload(name: str, device, for_moments=None):
        """A model comes to its GPU to work, or goes to host memory to wait."""
        peaks.append(distributed.peak_gb(world))
        if cfg.offload:
            distributed.move(*models[name], device, for_moments)

    def rehearse():
        """The largest pack through both models, so that memory fails now or not at all."""
        pack = full_pack(cfg.pack_tokens)
        pack = with_blank_picture(pack) if cfg.train_vision else pack
        for name in models:
            offload(name, world.device)
            gb = distributed.rehearse(*models[name], pack, world)
            offload(name, "cpu")
            if world.main:
                print(f"rehearsal: {name}, a pack of {cfg.pack_tokens:,} tokens: {gb:.3g} GB")

    def sync(when: str):
        """The sampler gets the policy's weights, and has to agree with it on a known prompt."""
        offload("policy", world.device, for_moments="cpu")  # which leaves their room to the engine
        sampler.sync(distributed.whole_weights(policy, world.dtype))
        gap = canary_gap(sampler, policy, known_prompt, cfg.train_vision)
        distributed.release(policy)
        offload("policy", "cpu")
        refuse_gap(distributed.largest(world, gap), world, when)

    def evaluate(step: int, budget: int) -> dict[str, float]:
        """Where it is due; no weight, draw or order of the training changes by it."""
        due = step == cfg.steps - 1 or (cfg.eval_every and (step + 1) % cfg.eval_every == 0)
        if not (held_out and due):
            return {}
        timer("evaluate")
        return solved(sampler, held_out, budget, world)

    rehearse()
    sync("at the start")
    log, timer, stopped = RunLog(run, cfg, cfg.steps, world.main, start), Timer(), False
    batches = Batches(cfg, world, sampler, problems, start)
    saver = checkpoint.Saver(run, directory, world.dtype, cfg.keep_every)
    with stop_on_signal(run, world.main) as stop:
        for step in range(start, cfg.steps):
            # 1. sample: P problems, text and pictures mixed, G responses each, by today's policy
            timer("sample")
            budget = length_budget(step, cfg.lengths)
            rollouts = batches.sample(step, budget)
            # 2. reward: 1 if the boxed answer matches, else 0; a response that was cut is wrong
            timer("reward")
            give_rewards(rollouts)
            metrics = describe(rollouts, world) | {"length_budget": budget}
            if cfg.resample:
                rollouts = resample(rollouts, cfg, partial(batches.others, step, budget))
            sampler.rest()  # also where they were read: the last sync has woken it
            # 3. pack: ranks exchange rollouts, take equal shares; packs carry their own tensors
            timer("pack")
            rollouts, lengths = batches.collect(step, rollouts)
            metrics |= batches.counts
            parts = share_packs(rollouts, lengths, cfg, cost, encode, world)
            packs = sum(parts, [])
            # 4. advantages: of every token, how much better than expected?
            timer("advantages")
            if critic:
                offload("critic", world.device)
                critic_values(critic, packs, world)
                for p in packs:
                    p.advantages, p.returns = gae(p.rewards, p.values, p.counts, GAMMA, cfg.lam)
                normalise(packs, world)
                metrics |= critic_metrics(packs, world)
            else:
                metrics |= compare_samples(rollouts, packs, cfg.samples)
            traced = trace_rows(step, rollouts, packs, tokenizer, world)
            # 5. update: the critic in some steps and the policy in one, by the same function
            timer("update")
            if critic:
                lrs = rates(step, cfg.critic_steps, cfg.critic_lr, cfg.warmup)
                of_critic = train(models["critic"], parts, lrs, critic_losses, step, world)
                metrics |= of_critic | {"critic_grad_norm": of_critic["grad_norm"]}
                offload("critic", "cpu")
            offload("policy", world.device)
            if cfg.policy_steps > 1:
                store_old_logps(policy, packs, world)
            lrs = rates(step, cfg.policy_steps, cfg.lr, cfg.warmup)
            metrics |= train(models["policy"], parts, lrs, losses_of, step, world)
            refuse_gap(metrics["logp_diff"], world, f"step {step}")
            # 6. sync, log, save
            timer("sync")
            sync(f"after the update of step {step}")
            solved_now = evaluate(step, budget)
            metrics |= solved_now | timer.seconds() | {"peak_gb": max(peaks)}
            log.log(step, metrics, (*SHOWN, *solved_now))
            log.append("rollouts", (row_of(step, r, tokenizer) for r in rollouts[:LOGGED]))
            log.append("trace", traced)
            log.append("lengths", [batches.add_lengths(step, rollouts)])
            stopped = distributed.largest(world, stop.requested)
            if stopped or saver.due(step + 1, cfg):
                timer("save")  # after the log: all steps of a checkpoint stand in it
                saver.save(step + 1, models, policy, card_of(cfg, step + 1))
            if stopped:
                break
    if not stopped:
        offload("policy", world.device)
        checkpoint.export(policy, run / "model", directory, world.dtype, card_of(cfg, cfg.steps))
    elif world.main:
        print(stop.advice)
    log.close()
    distributed.finish(world)


if __name__ == "__main__":
    run_main(main, Config)
