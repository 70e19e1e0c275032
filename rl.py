"""Stage 2, multimodal reinforcement learning: PPO on text and pictures, with a reward that only
asks whether the boxed answer is right (OVR, sec. 3.2 and 4.1; the recipe is Open-Reasoner-Zero's).

Six steps, again and again:
  1 ask    P problems, text and pictures mixed
  2 answer n tries each, by the policy as it is now                 rollout.py
  3 grade  1 if the last \\boxed{} matches the reference, else 0      reward.py
  4 judge  every token: reward minus what the critic expected there
  5 learn  the critic in 4 optimiser steps, the policy in 1
  6 tell   metrics, rollouts, behaviours, checkpoint; the sampler gets the new weights

How it departs from textbook PPO, all by the paper:
  1  No KL term and no reference model; no entropy bonus.
  2  GAE with gamma = lambda = 1: A_t = R - V(s_t), and the critic's target is R at every token.
  3  Strictly on-policy: one policy step for each batch. The ratio is exactly 1, so the clip never
     acts (any epsilon gives the same run) and no pass for old log-probs is needed.
  4  Policy and critic are two networks, both from the cold-start model.
  5  Advantages are normalised over all tokens of the batch.
  6  A response that is cut at the length budget is wrong: reward 0, nothing bootstrapped. The
     budget is a penalty that the curriculum relaxes.
`--algorithm grpo` replaces the critic by the mean of the n tries, in one `if`.

    torchrun rl.py                                 # the miniature: minutes on a laptop
    torchrun --nproc-per-node 2 rl.py              # the same numbers from two processes
    python rl.py --replay out/laptop/rl --step 87  # a recorded step once more, to study it
    bash runs/ovr_7b.sh                            # both stages at 7B, with the paper's numbers

Dimensions: P problems, G tries each, N = P G rollouts, T tokens of a pack, R trained tokens.
"""

import json
import math
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
import tyro
from torch import Tensor

from common import checkpoint as checkpoints
from common import data, dealing, telling
from common import distributed as parallel
from common.dealing import gather
from common.log import Pulse, RunLog, stop_on_signal
from common.provenance import model_card
from miniature import world as toy
from model import load_model, train_flops
from reward import grade
from rollout import Rollout, TorchSampler, VllmSampler, canary, canary_gap
from tools import plan


@dataclass(frozen=True)
class Config:
    """Stage 2. Defaults are the miniature's; the paper's value stands behind each setting."""

    model: str = "out/laptop/coldstart/model"  # HF directory; paper: the cold-start model
    data: str = "out/laptop/data/train.jsonl"  # JSONL, parquet, Hub id; paper: 300 k (sec. 3.3)
    out: str = "out/laptop/rl"  # run directory
    algorithm: str = "ppo"  # ppo, or grpo (no critic); paper: ppo
    steps: int = 100  # iterations; paper: 900 to 1,000; laptop: minutes
    problems: int = 64  # unique prompts a step, over all ranks; paper: 512; laptop: seconds a step
    samples: int = 4  # tries a prompt; paper: 16; laptop: seconds a step
    lengths: tuple[int, ...] = (112, 144)  # of a response; paper: 24k, 32k, 48k; laptop: short sums
    length_from: tuple[int, ...] = (0, 50)  # their starts; paper: 0, 300, 700; laptop: 100 steps
    temperature: float = 1.0  # of sampling and of the log-probs; paper: 1, top-p 1
    lr: float = 1.5e-4  # policy; paper: 1e-6; laptop: small models want larger steps
    critic_lr: float = 1e-3  # critic; paper: 5e-6; laptop: small models want larger steps
    warmup: int = 5  # optimiser steps, linear, of each model; paper: 50; laptop: it has 100 steps
    critic_steps: int = 4  # parts of the one pass over a batch; paper: 4; ORZ code: one pass
    gamma: float = 1.0  # discount a token; paper: 1
    lam: float = 1.0  # GAE's lambda; paper: 1
    epsilon: float = 0.2  # PPO's clip; paper: 0.2. No effect at one policy step a batch
    beta1: float = 0.9  # AdamW; paper: 0.9
    beta2: float = 0.95  # AdamW; paper: 0.95
    weight_decay: float = 0.0  # AdamW; paper: 0
    clip: float = 1.0  # of the gradient's norm; ORZ code
    value_init: str = "orz"  # orz: N(0, 1/(d+1)); paper: U(-sqrt 5, sqrt 5); ORZ code: U is 77 off
    train_vision: bool = False  # trains tower and merger; ours: frozen, as in stage 1
    sampler: str = "torch"  # torch, or vllm: faster from some tens of millions of parameters on
    sampler_batch: int = 256  # responses that a rank samples at once
    kv_cache_gb: float = 0.25  # vllm's room for keys and values, a rank; 7B: 57 kB a token
    tis: float = 0.0  # cap of the weight trainer / sampler, 2 is usual; ours: 0, not weighted
    gap_limit: float = 0.0  # nats between sampler and trainer that stop a run; 0: by dtype
    pack_tokens: int = 4096  # tokens a pack, which is a micro-batch; ours: what memory holds
    prompt_tokens: int = 512  # longer prompts are left out, with a count; ours: never cut
    share_prompts: bool = (
        True  # tries of a problem in a pack share its tokens; the same to rounding
    )
    recompute: str = "none"  # activations in backward: none, selective (keeps attention), full
    compile: bool = False  # blocks by torch.compile: for GPUs; minutes at the start
    offload: bool = False  # a model that waits for the other waits in host memory
    dtype: str = "auto"  # bfloat16 on GPUs, float32 on CPUs; ours: masters always float32
    shard_ranks: int = 0  # ranks that share one copy of the weights; 0: those of a node
    log_rollouts: int = 16  # decoded rollouts a step in rollouts.jsonl
    save_every: int = 20  # steps between checkpoints
    keep_last: int = 2  # newest checkpoints from which a run can go on
    keep_every: int = 1  # exported models stay for every so many steps; average.py wants several
    dump_minutes: float = 30.0  # without a new phase: every thread's stack into RUN/heartbeat
    record: bool = True  # keeps what was sampled since the oldest checkpoint, for --replay
    trace: bool = False  # print one picture problem through the six steps, then stop
    replay: str = ""  # a run directory: learn from its recorded step once more, compare, then stop
    step: int = -1  # of --replay; -1: the last
    seed: int = 0
    threads: int = 0  # CPU threads a process; 0 shares the cores out
    wandb: str = ""  # project name; empty: off

    def __post_init__(self):
        if self.algorithm not in ("ppo", "grpo"):
            raise ValueError(f"algorithm must be ppo or grpo, got {self.algorithm}")
        if self.value_init not in ("orz", "paper"):
            raise ValueError(f"value_init must be orz or paper, got {self.value_init}")
        if self.sampler not in ("torch", "vllm"):
            raise ValueError(f"sampler must be torch or vllm, got {self.sampler}")
        if self.temperature <= 0:
            raise ValueError(f"temperature {self.temperature} must be positive; the paper's is 1")
        if self.sampler == "vllm" and self.temperature != 1:
            raise ValueError("vllm reports log-probs at temperature 1: --temperature 1 (the paper)")
        if self.tis < 0 or self.gap_limit < 0:
            raise ValueError(f"tis {self.tis} and gap_limit {self.gap_limit} must not be negative")
        if min(self.steps, self.samples, self.critic_steps) < 1:
            raise ValueError("steps, samples and critic_steps must be positive")
        if self.problems < self.critic_steps:
            raise ValueError(f"problems {self.problems} < critic_steps {self.critic_steps}")
        rising = sorted(self.length_from)
        if len(self.lengths) != len(rising) or [*self.length_from] != rising or rising[:1] != [0]:
            raise ValueError(f"lengths {self.lengths} need as many length_from, rising from 0")
        if (least := self.prompt_tokens + max(self.lengths)) > self.pack_tokens:
            raise ValueError(
                f"pack_tokens {self.pack_tokens} < prompt_tokens + longest response: {least}"
            )
        if self.algorithm == "grpo" and self.samples < 2:
            raise ValueError("grpo compares tries of one problem: samples must be at least 2")


# ------------------------------------------------------------------ the algorithm


def gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16) of one response.

    rewards, values (R,) -> advantages (R,) and the critic's targets A + V (R,).
    delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}; past the end V = A = 0,
    also where the response was cut: a cut is a failure, not a state with a future. values[t] is
    read at the state *before* token t. With gamma = lam = 1 and one reward R at the end (OVR, sec.
    4.1): A_t = R - V_t, target R.
    """
    advantages, after, advantage = [], 0.0, 0.0
    for reward, value in zip(reversed(rewards.tolist()), reversed(values.tolist()), strict=True):
        advantage = reward + gamma * after - value + gamma * lam * advantage
        advantages.append(advantage)
        after = value
    advantages = torch.tensor(advantages[::-1], dtype=values.dtype)
    return advantages, advantages + values


def group_advantages(rewards: Tensor, eps: float = 1e-6) -> Tensor:
    """GRPO (Shao et al. 2024, sec. 4.1.2): A = (r - mean) / std in each group. (P, G) -> (P, G).

    A group that is all right or all wrong carries no signal and gets exactly 0, not noise / eps.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    std = rewards.std(dim=1, keepdim=True, correction=0)
    return torch.where(std > eps, centred / std.clamp_min(eps), 0.0)


def policy_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, epsilon: float) -> Tensor:
    """PPO's clipped objective (Schulman et al. 2017, eq. 7) as a loss, a term a token: all (R,).

    -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A). On-policy, old_logps = logps.detach(), the ratio
    is 1 and the gradient is that of -A log p.
    """
    ratios = (logps - old_logps).exp()
    return -torch.minimum(ratios * advantages, ratios.clamp(1 - epsilon, 1 + epsilon) * advantages)


def value_loss(values: Tensor, targets: Tensor) -> Tensor:
    """Half the squared error, a term a token, unclipped as in the paper's equation: all (R,)."""
    return 0.5 * (values - targets) ** 2


def importance_weights(logps: Tensor, sampled: Tensor, cap: float) -> Tensor:
    """min(pi_trainer / pi_sampler, cap), a weight a token: all (R,). Constants to the gradient.

    Truncated importance sampling (Ionides 2008): corrects the expectation for a sampler whose
    rounding differs, and the cap bounds the variance. Exactly 1 where the two agree.
    """
    return (logps - sampled).exp().clamp(max=cap).detach()


def length_budget(step: int, lengths: tuple[int, ...], length_from: tuple[int, ...]) -> int:
    """Tokens a response may have (OVR, sec. 4.1: 24k, from step 300 on 32k, from 700 on 48k)."""
    return [length for first, length in zip(length_from, lengths, strict=True) if first <= step][-1]


# ------------------------------------------------------------------ the plumbing

# nats a token; float32 gives 1e-6 to 1e-4, bfloat16 about 0.01
GAP_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.1}
SHOWN = ("reward", "length", "entropy", "grad_norm", "logp_diff_max")


def warm(step: int, warmup: int) -> float:
    """Linear warm-up to 1, then constant. step counts optimiser steps from 0."""
    return min(1.0, (step + 1) / max(1, warmup))


def load_pair(cfg: Config, world) -> dict:
    """{"policy": (model, optimizer), "critic": ...}, from one model; grpo has no critic."""
    pair = {}
    heads = {"policy": ("lm", cfg.lr), "critic": ("value", cfg.critic_lr)}
    for name in ("policy", "critic") if cfg.algorithm == "ppo" else ("policy",):
        head, lr = heads[name]
        torch.manual_seed(cfg.seed)  # the value head, the same on every rank
        how = (cfg.train_vision, cfg.recompute, cfg.compile)
        model = parallel.load(cfg.model, world, head, *how)
        if head == "value" and cfg.value_init == "paper":
            start = torch.empty(model.value_head.weight.shape)
            parallel.put(model.value_head.weight, start.uniform_(-math.sqrt(5), math.sqrt(5)))
        trained = [p for p in model.parameters() if p.requires_grad]
        betas = (cfg.beta1, cfg.beta2)
        optimizer = torch.optim.AdamW(trained, lr, betas, weight_decay=cfg.weight_decay, fused=True)
        pair[name] = (model, optimizer)
    return pair


def recorded(cfg: Config) -> Config:
    """The settings of the run that is to be replayed, from its run.json."""
    file = Path(cfg.replay) / "run.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing: --replay wants the directory of a run of rl.py"
        )
    known, about = {f.name for f in fields(Config)}, json.loads(file.read_text(encoding="utf-8"))
    if unknown := set(about["config"]) - known:
        raise ValueError(f"{file} has settings that rl.py does not know: {', '.join(unknown)}")
    then = {k: tuple(v) if isinstance(v, list) else v for k, v in about["config"].items()}
    steps = [int(f.stem[5:]) for f in Path(cfg.replay).glob("sampled/step_*[0-9].npz")]
    if not steps or cfg.step not in (-1, *steps):
        there = f"{min(steps)} to {max(steps)}" if steps else "none"
        raise ValueError(f"{cfg.replay}: step {cfg.step} is not recorded; there: {there}")
    step = max(steps) if cfg.step == -1 else cfg.step
    then |= dict(replay=cfg.replay, step=step, steps=step + 1, sampler="torch", trace=False)
    return Config(**then | dict(out=cfg.replay))


def load_problems(cfg: Config, world, tokenizer, settings):
    """-> problems, and how many were left out for too long a prompt; each rank measures some."""
    problems = data.read_problems(cfg.data)
    mine = ((i, problems[i]) for i in range(world.rank, len(problems), world.size))
    lengths = {
        i: data.prompt_length(p.prompt, p.images, tokenizer, settings, p.id) for i, p in mine
    }
    return data.filter_long(problems, cfg.prompt_tokens, parallel.union(world, lengths))


def load_sampler(cfg: Config, world, tokenizer, settings):
    """Before the trained models: vLLM measures the memory that is free when it starts."""
    if cfg.replay:
        return dealing.Recording(cfg.replay, tokenizer, settings)
    if cfg.sampler == "torch":
        model = load_model(cfg.model, world.dtype, world.device)
        return TorchSampler(model, tokenizer, settings, cfg.sampler_batch)
    longest = cfg.prompt_tokens + max(cfg.lengths)
    room = (cfg.sampler_batch, longest, cfg.kv_cache_gb)
    return VllmSampler(cfg.model, tokenizer, settings, *room, world.dtype)


def refuse_gap(gap: float, cfg: Config, world, when: str):
    """RuntimeError where sampler and trainer are plainly not the same policy."""
    limit = cfg.gap_limit or GAP_LIMITS[world.dtype]
    if not gap <= limit:  # NaN too
        raise RuntimeError(
            f"{when}: log-probs of sampler and trainer differ by {gap:.3g} nats a token on average,"
            f" more than {limit:g}: the sampler does not have the policy's weights, or reads a"
            " stale cache. If this is its ordinary rounding, raise --gap-limit and set --tis 2"
        )


@torch.no_grad()
def judge(critic, parts, count: int, device) -> list[Tensor]:
    """V(s_t) before each response token, by rollout."""
    every, found = [pack for packs, _ in parts for pack in packs], []
    for pack in every:
        moved = pack.to(device)
        found.append(critic(**moved.inputs, rows=moved.rows))
    values = [torch.zeros(0)] * count
    for pack, of_pack in zip(every, found, strict=True):  # now, so that no pack waits for a copy
        for i, part in zip(pack.members, of_pack.cpu().split(pack.trained), strict=False):
            values[i] = part  # a filler has none
    parallel.release(critic)
    return values


def advantages_of(values: list[Tensor], scores: list[float], cfg: Config, world):
    """PPO: the score is the last token's reward. -> normalised advantages, returns, by rollout."""
    judged = []
    for value, score in zip(values, scores, strict=True):
        rewards = torch.zeros(len(value))
        rewards[-1] = score
        judged.append(gae(rewards, value, cfg.gamma, cfg.lam))
    return normalise([a for a, _ in judged], world), [r for _, r in judged]


def spread(advantages: Tensor, rollouts: list[Rollout]) -> list[Tensor]:
    """GRPO: one advantage a rollout, the same for each of its tokens. (N,) -> N x (R,)."""
    pairs = zip(advantages, rollouts, strict=True)
    return [advantage.expand(len(r.response_ids)) for advantage, r in pairs]


def normalise(advantages: list[Tensor], world) -> list[Tensor]:
    """(A - mean) / std over all tokens of the batch, on all ranks (OVR, sec. 4.1: batch-level)."""
    flat = torch.cat([torch.zeros(0), *advantages]).double()  # a rank may have fillers alone
    local = len(flat), flat.sum().item(), flat.square().sum().item()
    count, total, squares = parallel.sums(world, *local)
    mean = total / count
    std = math.sqrt(max(squares / count - mean**2, 0.0))
    return [(a - mean) / (std + 1e-8) for a in advantages]


def critic_metrics(values: list[Tensor], returns: list[Tensor], world) -> dict:
    """How well V predicts the return, over all tokens of all ranks.

    explained_variance = 1 - Var(return - V) / Var(return): 1 a perfect critic, 0 a constant one.
    """
    v, g = (torch.cat([torch.zeros(0), *x]).double() for x in (values, returns))
    local = (len(v), v.sum(), g.sum(), (g * g).sum(), (g - v).sum(), (g - v).square().sum())
    n, v1, g1, g2, e1, e2 = parallel.sums(world, *map(float, local))
    spread, unexplained = g2 / n - (g1 / n) ** 2, e2 / n - (e1 / n) ** 2
    explained = 1 - unexplained / max(spread, 1e-8)
    return {"explained_variance": explained, "value_mean": v1 / n, "return_mean": g1 / n}


def learn_critic(critic, optimizer, parts, returns, cfg: Config, step: int, world) -> dict:
    """One pass over the batch in `critic_steps` optimiser steps."""
    losses, norm = [], 0.0
    for k, (packs, tokens) in enumerate(parts):
        rate = warm(step * cfg.critic_steps + k, cfg.warmup)
        optimizer.param_groups[0]["lr"] = cfg.critic_lr * rate
        optimizer.zero_grad()
        for pack in packs:
            moved, targets = pack.to(world.device), gather(returns, pack, world.device)
            values = critic(**moved.inputs, rows=moved.rows)
            part = value_loss(values, targets).sum() / max(tokens, 1)
            parallel.backward(critic, part, world, last=pack is packs[-1])
            losses.append(part.detach().double() * tokens)
        norm += parallel.clip_gradients(critic, cfg.clip) / len(parts)
        optimizer.step()
    (loss,) = parallel.sums(world, torch.stack(losses).sum().item())
    return {"value_loss": loss / sum(tokens for _, tokens in parts), "critic_grad_norm": norm}


def learn_policy(
    policy, optimizer, parts, rollouts, advantages, cfg: Config, step: int, world, watched=None
) -> dict:
    """One optimiser step on the whole batch. -> the loss, and what should hold on the way.

    watched {rollout: ...}: gets the log-probs and entropies of those, (R,) each.

    FloatingPointError before the step where the loss or its gradient is not finite.
    """
    tokens = sum(count for _, count in parts)
    lr = cfg.lr * warm(step, cfg.warmup)
    optimizer.param_groups[0]["lr"] = lr
    optimizer.zero_grad()
    sampled = [torch.tensor(r.logps) for r in rollouts]
    packs, told, seen = [pack for of_part, _ in parts for pack in of_part], [], []
    for pack in packs:  # nothing in this loop waits for the GPU: its numbers are read after it
        moved = pack.to(world.device)
        by_sampler = gather(sampled, pack, world.device)
        advantage = gather(advantages, pack, world.device)
        logps, entropies = policy(
            **moved.inputs, rows=moved.rows, targets=moved.targets, temperature=cfg.temperature
        )
        old_logps = logps.detach()  # strictly on-policy: this step is the first since sampling
        losses = policy_loss(logps, old_logps, advantage, cfg.epsilon)
        trust = (
            importance_weights(old_logps, by_sampler, cfg.tis)
            if cfg.tis
            else torch.ones_like(logps)
        )
        part = (losses * trust).sum() / tokens
        parallel.backward(policy, part, world, last=pack is packs[-1])
        told.append(tell(part, logps, old_logps, by_sampler, entropies, trust, cfg.epsilon))
        if not {*pack.members}.isdisjoint(watched or ()):
            seen.append((pack, logps.detach(), entropies))
    for pack, *columns in seen:
        pairs = zip(*(x.cpu().split(pack.trained) for x in columns), strict=True)
        watched |= {i: x for i, x in zip(pack.members, pairs, strict=True) if i in watched}
    norm = parallel.clip_gradients(policy, cfg.clip)
    told = torch.stack(told).cpu()  # (packs, 9)
    broken = [
        pack
        for pack, (part, *_) in zip(packs, told.tolist(), strict=True)
        if not math.isfinite(part)
    ]
    suspects = [
        f"{rollouts[i].problem.id}#{rollouts[i].sample}" for pack in broken for i in pack.members
    ]
    summed = parallel.sums(world, *told[:, :7].sum(0).tolist())
    loss, entropy, surprisal, clipped, difference, kl, weighed = summed
    far, off = told[:, 7:].amax(0).tolist()
    metrics = {
        "policy_loss": loss,
        "grad_norm": norm,
        "lr": lr,
        "entropy": entropy / tokens,
        "surprisal": surprisal / tokens,  # as the entropy, if draws follow the log-probs
        "clip_fraction": clipped / tokens,
        "ratio_max": parallel.largest(world, off),
        "logp_diff_mean": difference / tokens,
        "logp_diff_max": parallel.largest(world, far),
        "sampler_kl": kl / tokens,
        "tokens": tokens,
    }
    parallel.refuse_nan(world, step, metrics, suspects)
    optimizer.step()
    return metrics | ({"tis_weight": weighed / tokens} if cfg.tis else {})


@torch.no_grad()
def tell(part, logps, old_logps, by_sampler, entropies, trust, epsilon: float) -> Tensor:
    """What learn_policy reports of a pack, (9,) float64: seven sums over its tokens, two maxima."""
    gap = old_logps - by_sampler
    off = ((logps - old_logps).exp() - 1).abs()
    kl = gap.exp() - 1 - gap  # k3 estimate of KL(sampler | trainer)
    summed = entropies, -logps, off > epsilon, gap.abs(), kl, trust
    nothing = gap.new_zeros(1)  # a filler has no tokens
    most = (torch.cat([nothing, x]).max() for x in (gap.abs(), off))
    return torch.stack([x.double() for x in (part, *(x.sum() for x in summed), *most)])


def verdict_of(rollout: Rollout):
    p = rollout.problem
    return grade(p.answer, rollout.text, choices=p.choices, precision=p.precision)


def score_of(verdict, rollout: Rollout) -> float:
    """The reward; a response that was cut is wrong, whatever it says."""
    return verdict.score * rollout.stopped


def card_of(cfg: Config, out: Path, step: int, metrics: dict) -> str:
    """README.md of an exported policy."""
    names = ("reward", "reward_image", "reward_text", "length")
    extra = {"step": step} | {name: metrics[name] for name in names if name in metrics}
    title = "Open Vision Reasoner, stage 2: multimodal reinforcement learning"
    context = cfg.prompt_tokens + max(cfg.lengths)
    return model_card(title, cfg, out / "model", out, context, extra)


def main(cfg: Config):
    world = parallel.start(cfg.threads, cfg.dtype, cfg.shard_ranks)
    if cfg.problems < world.size:
        raise ValueError(f"problems {cfg.problems} < {world.size} ranks: one would have none")
    if cfg.trace and world.size > 1:
        raise ValueError("--trace follows one problem in one process: python rl.py --trace")
    cfg = recorded(cfg) if cfg.replay else cfg
    out, looks = Path(cfg.out), bool(cfg.trace or cfg.replay)  # looks on, and writes nothing
    toy.ensure(world, cfg.model, cfg.data)
    past = checkpoints.newest(out, cfg.step if cfg.replay else None) if looks else None
    start, checkpoint = past or checkpoints.claim(out, cfg)
    directory = data.model_directory(cfg.model)
    tokenizer, settings = data.load_tokenizer(directory), data.load_image_settings(directory)
    problems, dropped = load_problems(cfg, world, tokenizer, settings)
    stream = data.Stream(problems, cfg.seed)
    local = replace(cfg, model=directory)
    sampler = load_sampler(local, world, tokenizer, settings)
    sampler.rest()
    pair = load_pair(local, world)
    if checkpoint:
        checkpoints.load_state(checkpoint, pair)
    policy, critic = pair["policy"][0], pair.get("critic", (None,))[0]
    cost = partial(train_flops, policy.config)
    bird = canary(problems, tokenizer, settings, cfg.prompt_tokens)

    def sync(when: str):
        """The sampler gets the policy's weights, and has to agree with it on a known prompt."""
        if cfg.replay:
            return parallel.release(policy)
        sampler.sync(parallel.whole_weights(policy, world.dtype))
        gap = canary_gap(sampler, policy, bird, cfg.temperature, cfg.train_vision)
        refuse_gap(parallel.largest(world, gap), cfg, world, when)
        parallel.release(policy)

    sync("at the start")
    log = None if looks else RunLog(out, cfg, cfg.steps, world.main, start)
    if world.main and dropped:
        print(f"{dropped} problems left out: prompts over {cfg.prompt_tokens} tokens")

    def turn(name: str, device):  # of a model to work on its GPU, or to wait in host memory
        if cfg.offload and name in pair:
            parallel.move(*pair[name], device)

    turn("policy", "cpu")
    turn("critic", "cpu")
    stopped = False
    pulse = (lambda *_: None) if looks else Pulse(out, world.rank, cfg.dump_minutes)
    saver = checkpoints.Saver(out, directory, world.dtype, cfg.keep_last, cfg.keep_every)
    with saver, stop_on_signal(world.main) as stop:
        for step in range(start, start + 1 if cfg.trace else cfg.steps):
            # 1. ask: P problems, text and pictures mixed
            pulse("ask", step)
            asked = stream.batch(step, cfg.problems)
            # 2. answer: G tries each, by the policy as it is now; every rank takes its share
            pulse("answer", step)
            budget = length_budget(step, cfg.lengths, cfg.length_from)
            turns = parallel.turns(world, len(asked), f"{step}", dynamic=cfg.sampler == "vllm")
            seed = (cfg.seed, step)
            mine = sampler.generate(asked, cfg.samples, budget, cfg.temperature, seed, turns=turns)
            sampler.rest()
            # 3. grade: 1 if the boxed answer matches, else 0; a response that was cut is wrong
            pulse("grade", step)
            verdicts = [verdict_of(r) for r in mine]
            scores = [score_of(v, r) for v, r in zip(verdicts, mine, strict=True)]
            metrics = telling.describe(mine, verdicts, scores, world) | {"length_budget": budget}
            rollouts, verdicts, lengths = dealing.exchange(mine, verdicts, asked, cfg, world)
            scores = [score_of(v, r) for v, r in zip(verdicts, rollouts, strict=True)]
            if world.main and cfg.record and not looks:
                dealing.keep(out, step, rollouts)
            # 4. judge every token: how much better than expected?
            pulse("judge", step)
            share, parts = dealing.place(rollouts, lengths, cfg, world, tokenizer, settings, cost)
            ours, values = [rollouts[i] for i in share], None
            if cfg.algorithm == "ppo":
                turn("critic", world.device)
                values = judge(critic, parts, len(ours), world.device)
                reached = [scores[i] for i in share]
                advantages, returns = advantages_of(values, reached, cfg, world)
                metrics |= critic_metrics(values, returns, world)
            else:
                scored = group_advantages(torch.tensor(scores).view(-1, cfg.samples)).flatten()
                advantages = spread(scored[share], ours)
            if cfg.trace:
                told = rollouts, verdicts, scores, values, advantages
                telling.print_trace(*told, cfg, tokenizer)
                return parallel.finish(world)
            # 5. learn: the critic in 4 steps, the policy in 1
            pulse("learn", step)
            if cfg.algorithm == "ppo":
                metrics |= learn_critic(*pair["critic"], parts, returns, cfg, step, world)
                metrics["peak_gb"] = parallel.peak_gb(world)
                turn("critic", "cpu")
            turn("policy", world.device)
            chosen = telling.tries_to_tell(rollouts, scores, cfg.samples)
            watched = {k: None for k, i in enumerate(share) if i in chosen}
            learnt = parts, ours, advantages, cfg, step, world
            metrics |= learn_policy(*pair["policy"], *learnt, watched)
            parallel.refuse_nan(world, step, metrics)
            if cfg.replay:
                turn("policy", "cpu")
                if step < cfg.step:
                    continue
                if world.main:
                    telling.print_replay(out, step, metrics)
                telling.print_pushes(ours, advantages, [scores[i] for i in share], world)
                return parallel.finish(world)
            refuse_gap(metrics["logp_diff_mean"], cfg, world, f"step {step}")
            metrics["peak_gb"] = max(metrics.get("peak_gb", 0.0), parallel.peak_gb(world))
            # 6. tell: the sampler, a checkpoint, and the log
            pulse("sync", step)
            sync(f"after the update of step {step}")
            metrics |= pulse.seconds()
            log.log(step, metrics, show=[name for name in SHOWN if name in metrics])
            if world.main and step < start + 2:  # of a GPU that plan.py knows
                packs = [pack for of_part, _ in parts for pack in of_part]
                plan.show_beside("rl", cfg, policy.config, world.size, packs, metrics)
            told = rollouts, verdicts, scores
            log.append("rollouts", telling.rows_of(step, *told)[: cfg.log_rollouts])
            of_ours = share, ours, values, advantages, watched
            log.append(
                "tokens", telling.token_rows(step, chosen, *told, *of_ours, tokenizer, world)
            )
            stopped = parallel.largest(world, stop.requested)
            if stopped or (step + 1) % cfg.save_every == 0:
                pulse("save", step)  # after the log: a checkpoint's steps all stand in it
                saver.save(step + 1, pair, policy, card_of(cfg, out, step + 1, metrics))
            saver.settle()
            turn("policy", "cpu")
            if stopped:
                break
    pulse("leave", cfg.steps)
    if not stopped:
        turn("policy", world.device)
        card = card_of(cfg, out, cfg.steps, {})
        checkpoints.save_whole(policy, out / "model", directory, world.dtype, card)
    elif world.main:
        print(stop.advice)
    log.close()
    parallel.finish(world)
    pulse.close()


if __name__ == "__main__":
    main(tyro.cli(Config))
