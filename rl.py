"""Stage 2, multimodal reinforcement learning: PPO on text and pictures, with a reward that only
asks whether the boxed answer is right (OVR, sec. 3.2 and 4.1; the recipe is Open-Reasoner-Zero's).

The loop of main(): 1 sample, 2 reward, 3 pack, 4 advantages, 5 update, 6 sync, log, save. How it
departs from textbook PPO, all by the paper:
  -  No KL term and no reference model; no entropy bonus.
  -  GAE with gamma = lambda = 1: A_t = r - V(s_t) for the reward r, which is the critic's target.
  -  Strictly on-policy: one policy step a batch, so the ratio is exactly 1 and the clip never acts.
     It does with --policy-steps 4, or with --finish-share 0.8, which puts the longest responses of
     a step aside: they go on in the next, and begin with tokens of an older policy.
  -  Policy and critic are two networks, both from the cold start. (--algorithm grpo has no critic.)
  -  Advantages are normalised over all tokens of the batch.
  -  A response that is cut at the length budget is wrong: reward 0, nothing bootstrapped.

    torchrun rl.py                                 # the miniature: minutes on a laptop
    torchrun --nproc-per-node 2 rl.py              # the same numbers from two processes
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
from torch import Tensor, nn

from common import checkpoint, data, distributed
from common.batches import Batches, newest_problems
from common.data import Rollout
from common.log import RunLog, Timer, due, model_card, run_main, stop_on_signal
from common.packs import Pack, full_pack, share_packs, with_blank_picture
from evaluation import behaviors
from miniature.base import ensure
from model import train_flops
from reward import grade
from rollout import canary, canary_gap, open_sampler, solved

TITLE = "Open Vision Reasoner, stage 2: multimodal reinforcement learning"
GAMMA = 1.0  # discount a token; paper, sec. 4.1
BETAS, WEIGHT_DECAY = (0.9, 0.95), 0.0  # AdamW; paper, sec. 4.1
CLIP_NORM = 1.0  # of the gradient; Open-Reasoner-Zero's code
# The sampler's log-probs and the trainer's may differ by so many nats a token on average: rounding
# gives 1e-7 (torch) to 1e-4 (vLLM) in float32, about 0.01 in bfloat16, stale weights 0.3 and more.
GAP_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.1}
NO_BOX = ("no_box", "unclosed")  # of the matcher's statuses
UNREAD = ("unparsed", "gold_unparsed", "too_big", "failed")
SHOWN = "reward length entropy grad_norm logp_diff eval_image eval_text".split()  # on the step line


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
        counts = "steps samples policy_steps critic_steps prompt_tokens sampler_batch".split()
        if zero := [name for name in counts if getattr(self, name) < 1]:
            raise ValueError(f"--{zero[0].replace('_', '-')} counts from 1")
        if not self.data:
            raise ValueError("--data names no problems")
        starts, budgets = [first for first, _ in self.lengths], [last for _, last in self.lengths]
        if starts != sorted(set(starts)) or starts[:1] != [0] or min(budgets) < 1:
            raise ValueError(f"--lengths are pairs of step, from 0 on, and tokens: {self.lengths}")
        if self.pack_tokens < self.context:
            raise ValueError(f"--pack-tokens {self.pack_tokens} < {self.context}: prompt, response")
        if not self.parts / max(self.problems, 1) <= self.finish_share <= 1:
            fewer = f"--problems {self.problems} in --finish-share {self.finish_share} (at most 1)"
            cure = "raise these, or lower --critic-steps and --policy-steps"
            raise ValueError(f"{fewer} < {self.parts} parts of a batch: {cure}")
        if self.algorithm == "grpo" and (self.samples < 2 or self.finish_share < 1):
            rule = "--samples must be at least 2, and --finish-share 1"
            raise ValueError(f"grpo compares all samples of a problem: {rule}")
        if self.resample and self.algorithm == "ppo":
            why = "with ppo's critic a group that is all right or all wrong teaches, too"
            raise ValueError(f"--resample {self.resample} is for grpo alone: {why}")

    @property
    def context(self) -> int:
        """Tokens of the longest prompt and response of the run."""
        return self.prompt_tokens + max(tokens for _, tokens in self.lengths)

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
    *before* token t. Past the end V = A = 0, also of a cut: a failure, not a state with a future.
    With gamma = lam = 1 and one reward r at the end (OVR, sec. 4.1): A_t = r - V_t, target r.
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
    10) a larger high. Where old_logps = logps.detach() the gradient is that of -A log p.
    """
    ratios = (logps - old_logps).exp()
    return -torch.minimum(ratios * advantages, ratios.clamp(1 - low, 1 + high) * advantages)


def rates(step: int, count: int, peak: float, warmup: int) -> list[float]:
    """Learning rates of the `count` optimiser steps of iteration `step`: linear, then constant.

    The warm-up counts optimiser steps, so a critic with four a batch is warm four times as soon.
    """
    return [peak * min(1.0, (step * count + k + 1) / max(1, warmup)) for k in range(count)]


def moments(x: Tensor) -> tuple[float, float]:
    """Mean and variance of x (R,) over the tokens of all ranks."""
    x = x.double()
    count, total, squares = distributed.sums(len(x), x.sum().item(), x.square().sum().item())
    return total / count, max(squares / count - (total / count) ** 2, 0.0)


def normalise(packs: list[Pack]):
    """A <- (A - mean) / std over all tokens of the batch (OVR, sec. 4.1)."""
    mean, variance = moments(torch.cat([pack.advantages for pack in packs]))
    for pack in packs:
        pack.advantages = (pack.advantages - mean) / (math.sqrt(variance) + 1e-8)


# ------------------------------------------------------------------ the plumbing


@dataclass
class Learner:
    """A model and how it steps. With --offload it waits in host memory and comes to its GPU to
    work, which has no room for policy, critic and the sampler's engine together."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    world: distributed.World
    lr: float
    steps: int = 1  # of the optimiser, a batch
    warmup: int = 0
    norm: str = "grad_norm"  # what the metric of its gradient is called
    offload: bool = False
    place: str = "gpu"
    peak_gb: float = 0.0  # that a rank had, read wherever memory may be given back

    def move(self, place: str):
        """To the "gpu", to "host" memory, or its "weights" alone: only an update needs moments."""
        if place == self.place:
            return
        self.place, self.peak_gb = place, max(self.peak_gb, distributed.peak_gb(self.world))
        if self.offload:
            device = "cpu" if place == "host" else self.world.device
            for_moments = "cpu" if place == "weights" else None
            distributed.move(self.model, self.optimizer, device, for_moments)


def reward_of(rollout: Rollout) -> float:
    """The place for a reward of one's own: it sees verdict, text and every column of the row."""
    return rollout.verdict.score * rollout.stopped  # a response that was cut is wrong


def give_rewards(rollouts: list[Rollout]):
    """Once, where the text is; from here on they travel with the rollout."""
    for r in rollouts:
        p = r.problem
        r.verdict = grade(p.answer, r.text, choices=p.choices, precision=p.precision)
        try:
            r.reward = float(reward_of(r))
        except Exception as error:  # of whoever has changed it
            where = r.problem.place or r.problem.id
            raise RuntimeError(f"{where}: reward_of fails on it: {error!r}") from error


def resample(rollouts: list[Rollout], cfg: Config, others: Callable) -> list[Rollout]:
    """Dynamic sampling (DAPO, Yu et al. 2025, arXiv 2503.14476, sec. 3.2 and eq. 11): a group that
    is all right or all wrong has no gradient, so another problem is sampled in its place, in
    --resample rounds at most. others(turn, slots): rollouts of problems that take these slots, the
    places 0 to P - 1 of a batch. -> all rollouts of this rank; of a slot the last are learnt from.
    """
    every = [*rollouts]
    for turn in range(1, cfg.resample + 1):
        rewards = defaultdict(set)
        for r in every:
            rewards[r.index].add(r.reward)
        newest = newest_problems(every, cfg.problems).items()
        slots = [slot for place, slot in newest if len(rewards[place]) == 1]
        if slots:
            new = others(turn, slots)
            give_rewards(new)
            every += new
    return every


def compare_samples(rollouts: list[Rollout], packs: list[Pack], samples: int) -> dict[str, float]:
    """GRPO: a rollout's advantage over the other samples of its problem, for each of its tokens."""
    rewards = torch.tensor([r.reward for r in rollouts], dtype=torch.float32)
    advantages = group_advantages(rewards.view(-1, samples))
    for pack in packs:
        counts = torch.tensor(pack.counts[: len(pack.members)], dtype=torch.int64)
        pack.advantages = advantages.flatten()[pack.members].repeat_interleave(counts)
    return {"no_contrast": sum(not group.any() for group in advantages)}


@torch.no_grad()
def critic_values(critic: Learner, packs: list[Pack]):
    """V(s_t) before each response token, onto the packs."""
    critic.move("gpu")
    values = [critic.model.values(pack.to(critic.world.device)) for pack in packs]
    for pack, of_pack in zip(packs, values, strict=True):  # now, so that no pack waits for a copy
        pack.values = of_pack.cpu()
    distributed.release(critic.model)


def critic_metrics(packs: list[Pack]) -> dict[str, float]:
    """How well V predicts the return: explained variance 1 if perfectly, 0 if it is a constant."""
    values, returns = (
        torch.cat([getattr(p, name) for p in packs]) for name in ("values", "returns")
    )
    value_mean, _ = moments(values)
    return_mean, variance = moments(returns)
    _, unexplained = moments(returns - values)
    explained = 1 - unexplained / max(variance, 1e-8)
    return {"explained_variance": explained, "value_mean": value_mean, "return_mean": return_mean}


@torch.no_grad()
def store_old_logps(policy: Learner, packs: list[Pack]):
    """Before the first of several policy steps: what the ratio is measured against."""
    policy.move("gpu")
    logps = [policy.model.logps(pack.to(policy.world.device))[0] for pack in packs]
    for pack, of_pack in zip(packs, logps, strict=True):
        pack.old_logps = of_pack.cpu()
    distributed.release(policy.model)


def critic_losses(critic, pack: Pack) -> dict[str, Tensor]:
    """Half the squared error of each token, unclipped as in the paper's equation: (R,)."""
    return {"value_loss": 0.5 * (critic.values(pack) - pack.returns) ** 2}


def policy_losses(policy, pack: Pack, cfg: Config) -> dict[str, Tensor]:
    """The loss of each token, and what else is watched of it: (R,) all.

    The old log-prob of a token that an earlier policy drew is what the sampler stored then.
    """
    low, high = cfg.epsilon, cfg.epsilon_high or cfg.epsilon
    logps, entropies = policy.logps(pack)
    old_logps = logps.detach() if pack.old_logps is None else pack.old_logps
    old_logps = torch.where(pack.stale, pack.logps, old_logps)
    losses = {"policy_loss": policy_loss(logps, old_logps, pack.advantages, low, high)}
    if cfg.tis:  # truncated importance sampling (Ionides 2008): min(pi_trainer / pi_sampler, cap)
        losses["tis_weight"] = (old_logps - pack.logps).exp().clamp(max=cfg.tis)
        losses["policy_loss"] = losses["policy_loss"] * losses["tis_weight"]
    gap, off = old_logps - pack.logps, (logps.detach() - old_logps).exp() - 1
    return losses | {
        "entropy": entropies,
        "surprisal": -logps,  # as the entropy, if draws follow the log-probs
        "clip_fraction": (off < -low) | (off > high),
        "ratio_diff": off.abs(),
        "logp_diff": gap.abs(),  # 0 of a stale token
        "sampler_kl": gap.exp() - 1 - gap,  # k3 estimate of KL(sampler | trainer)
        "stale_tokens": pack.stale,
    }


def train(learner: Learner, parts: list, losses_of: Callable, step: int) -> dict[str, float]:
    """One pass over the parts of a batch in equal minibatches, an optimiser step for each.

    losses_of(model, pack) -> {name: (R,)}, of which the first is the loss. A minibatch's loss is
    its sum over all trained tokens of all ranks, divided by their number, which is known before
    backward: the gradient is the same however tokens are cut into packs, and whoever has them.

    -> means over all tokens; norm of the gradient, lr, tokens. A loss or gradient that is not
    finite is a FloatingPointError on all ranks, before the step.
    """
    learner.move("gpu")
    model, optimizer, world = learner.model, learner.optimizer, learner.world
    totals, norms, tokens_in_all, size = Counter(), [], 0, len(parts) // learner.steps
    for k, rate in enumerate(rates(step, learner.steps, learner.lr, learner.warmup)):
        packs = sum(parts[k * size : (k + 1) * size], [])
        (tokens,) = distributed.sums(sum(len(pack.targets) for pack in packs))
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
        sums = distributed.sums(*(sum(column) for column in zip(*rows, strict=True)))
        now = {"loss": sums[0], "grad_norm": norms[-1]}
        distributed.refuse_nan(step, now, packs, [row[0] for row in rows])
        optimizer.step()
        totals.update(dict(zip(columns, sums, strict=True)))
        tokens_in_all += tokens
    means = {name: total / max(tokens_in_all, 1) for name, total in totals.items()}
    norm = sum(norms) / len(norms)
    return means | {learner.norm: norm, "lr": rate, "tokens": tokens_in_all}


def describe(rollouts: list[Rollout]) -> dict[str, float]:
    """Means over the rollouts of all ranks; pictures and text apart where it matters."""
    values = defaultdict(list)
    for r in rollouts:
        kind, status = "image" if r.problem.images else "text", r.verdict.status
        row = {"reward": r.reward, "length": len(r.response_ids), "truncated": not r.stopped}
        row |= {f"reward_{kind}": r.reward, f"length_{kind}": len(r.response_ids)}
        row |= {"no_box": status in NO_BOX, "unparsed": status in UNREAD}
        row |= {f"{kind}/{name}": n > 0 for name, n in behaviors.count(r.text).items()}
        if patterns := r.problem.extra.get("watch"):  # {name: pattern}; shown by `group`
            own = {"reward": r.reward} | behaviors.watched(r.text, patterns)
            group = r.problem.extra.get("group", "all")
            row |= {f"{name}/{group}": float(value) for name, value in own.items()}
        for name, value in row.items():
            values[name].append(value)
    return distributed.means(values)


# ------------------------------------------------------------------ start and loop


def load_problems(name: str, cfg: Config, world, tokenizer, settings) -> Sequence:
    """Those whose prompts are not too long; each rank checks a share. Of no name none."""
    if not name:
        return []
    problems = data.read_problems(name, columns=cfg.columns, share=(world.rank, world.size))
    mine = range(world.rank, len(problems), world.size)
    lengths = {i: data.prompt_length(problems[i], tokenizer, settings) for i in mine}
    lengths = sorted(distributed.union(lengths).items())
    short = [i for i, length in lengths if length <= cfg.prompt_tokens]
    too_long = len(problems) - len(short)
    fault = f"{name}: {too_long} problems left out: prompts over {cfg.prompt_tokens} tokens"
    if not short:
        raise ValueError(f"{fault}, and none is left: raise --prompt-tokens")
    if too_long and world.main:
        print(fault)
    return data.Rows(problems.__getitem__, short)


def load_models(cfg: Config, directory: str, world) -> dict[str, Learner]:
    """{"policy": ..., "critic": ...}, from one model; grpo has no critic."""
    learns = distributed.Trained(cfg.train_vision, cfg.lora_rank, cfg.lora_alpha, cfg.seed)
    kinds = {"policy": ("lm", cfg.lr, cfg.policy_steps, "grad_norm")}
    if cfg.algorithm == "ppo":
        kinds["critic"] = "value", cfg.critic_lr, cfg.critic_steps, "critic_grad_norm"
    learners = {}
    for name, (head, lr, steps, norm) in kinds.items():
        torch.manual_seed(cfg.seed)  # the value head, the same on every rank
        model = distributed.load(directory, world, head, learns, cfg.recompute, cfg.compile)
        trained = [p for p in model.parameters() if p.requires_grad]
        # the learning rate is train()'s
        optimizer = torch.optim.AdamW(trained, 0.0, BETAS, weight_decay=WEIGHT_DECAY, fused=True)
        learners[name] = Learner(model, optimizer, world, lr, steps, cfg.warmup, norm, cfg.offload)
        learners[name].move("host")  # before the next one comes: a GPU has no room for both
    return learners


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
    # before the trained models: vLLM measures the memory that is free when it starts
    room = cfg.sampler_batch, cfg.context, cfg.kv_cache_gb
    sampler = open_sampler(cfg.sampler, directory, world, room)
    sampler.rest()
    learners = load_models(cfg, directory, world)
    policy, critic = learners["policy"], learners.get("critic")
    pairs = {name: (learner.model, learner.optimizer) for name, learner in learners.items()}
    if state:
        checkpoint.load_state(state, pairs)
    known_prompt = canary(problems, tokenizer, settings, cfg.prompt_tokens)
    encode = partial(data.encode_prompt, tokenizer=tokenizer, settings=settings)
    cost, losses_of = partial(train_flops, policy.model.config), partial(policy_losses, cfg=cfg)
    card = partial(model_card, TITLE, cfg, run / "model", run, cfg.context)

    def sync(when: str):
        """The sampler gets the policy's weights, and has to agree with it on a known prompt."""
        policy.move("weights")  # which leaves the room of its moments to the engine
        sampler.sync(distributed.whole_weights(policy.model, world.dtype))
        gap = canary_gap(sampler, policy.model, known_prompt, cfg.train_vision)
        distributed.release(policy.model)
        policy.move("host")
        refuse_gap(distributed.largest(gap), world, when)

    # a rehearsal: the largest pack through both models, so that memory fails now or not at all
    pack = with_blank_picture(full_pack(cfg.pack_tokens), cfg.train_vision)
    for name, learner in learners.items():
        learner.move("gpu")
        distributed.rehearse(*pairs[name], pack, world, f"{name}, a pack")
        learner.move("host")
    sync("at the start")
    log, timer, stopped = RunLog(run, cfg, cfg.steps, world.main, start), Timer(), False
    batches = Batches(cfg, world, sampler, problems, start)
    saver = checkpoint.Saver(run, directory, world.dtype, cfg.keep_every)
    with stop_on_signal(run, world.main) as stop:
        for step in range(start, cfg.steps):
            # 1. sample: P problems, text and pictures mixed, G responses each, by today's policy
            timer("sample")
            budget = [tokens for first, tokens in cfg.lengths if first <= step][-1]
            rollouts = batches.sample(step, budget)
            # 2. reward: 1 if the boxed answer matches, else 0; a response that was cut is wrong
            timer("reward")
            give_rewards(rollouts)
            metrics = describe(rollouts) | {"length_budget": budget}
            rollouts = resample(rollouts, cfg, partial(batches.others, step, budget))
            sampler.rest()  # after a resume, too, where rollouts were read and none sampled
            # 3. pack: from here on the rollouts of all ranks, and this rank's packs of each part
            timer("pack")
            rollouts = batches.collect(step, rollouts)
            parts = share_packs(rollouts, cfg, cost, encode, world)
            packs = sum(parts, [])
            # 4. advantages: of every token, how much better than expected?
            timer("advantages")
            if critic:
                critic_values(critic, packs)
                for p in packs:
                    p.advantages, p.returns = gae(p.rewards, p.values, p.counts, GAMMA, cfg.lam)
                normalise(packs)
                metrics |= critic_metrics(packs)
            else:
                metrics |= compare_samples(rollouts, packs, cfg.samples)
            # 5. update: critic and policy, in some optimiser steps each, by the same function
            timer("update")
            if critic:
                metrics |= train(critic, parts, critic_losses, step)
                critic.move("host")
            if cfg.policy_steps > 1:
                store_old_logps(policy, packs)
            metrics |= train(policy, parts, losses_of, step)
            refuse_gap(metrics["logp_diff"], world, f"step {step}")
            # 6. sync, log, save
            timer("sync")
            sync(f"after the update of step {step}")
            if held_out and due(step, cfg.steps, cfg.eval_every):
                timer("evaluate")
                metrics |= solved(sampler, held_out, budget, world)
            metrics |= batches.counts | timer.seconds()
            metrics["peak_gb"] = max(learner.peak_gb for learner in learners.values())
            log.log(step, metrics, SHOWN, batches.rows(step, rollouts, packs))
            stopped = distributed.largest(stop.requested)
            if stopped or saver.due(step + 1, cfg):
                timer("save")  # after the log: all steps of a checkpoint stand in it
                saver.save(step + 1, pairs, policy.model, card(step=step + 1))
            if stopped:
                break
    if not stopped:
        policy.move("gpu")
        last_card = card(step=cfg.steps)
        checkpoint.export(policy.model, run / "model", directory, world.dtype, last_card)
    elif world.main:
        print(stop.advice)
    log.close()
    distributed.finish(world)


if __name__ == "__main__":
    run_main(main, Config)
