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
    bash runs/ovr_7b.sh                            # both stages at 7B, with the paper's numbers

Dimensions: P problems, G tries each, N = P G rollouts, T tokens of a pack, R trained tokens.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor

import behaviors
import checkpoints
import data
import packing
import parallel
import toy
from model import load_model, train_flops
from provenance import model_card
from reward import grade
from rollout import Rollout, TorchSampler, VllmSampler, canary, canary_gap
from runlog import Pulse, RunLog, stop_on_signal


@dataclass(frozen=True)
class Config:
    """Stage 2. Defaults are the miniature's; the paper's value stands behind each setting."""

    model: str = "out/laptop/coldstart/model"  # HF directory of the cold-start model
    data: str = "out/laptop/data/train.jsonl"  # problems: JSONL, parquet, Hub id
    out: str = "out/laptop/rl"  # run directory
    algorithm: str = "ppo"  # ppo, or grpo (no critic); paper: ppo
    steps: int = 100  # iterations; paper: 900 to 1,000
    problems: int = 64  # unique prompts a step, over all ranks; paper: 512
    samples: int = 4  # tries a prompt; paper: 16
    lengths: tuple[int, ...] = (112, 144)  # tokens of a response; paper: 24k, 32k, 48k
    length_from: tuple[int, ...] = (0, 50)  # first step of each length; paper: 0, 300, 700
    temperature: float = 1.0  # of sampling and of the log-probs; paper: 1, top-p 1
    lr: float = 1.5e-4  # policy; paper: 1e-6
    critic_lr: float = 1e-3  # paper: 5e-6
    warmup: int = 5  # optimiser steps, linear, of policy and critic each; paper: 50
    critic_steps: int = 4  # optimiser steps a batch: one pass, cut into so many parts; paper: 4
    gamma: float = 1.0  # paper: 1
    lam: float = 1.0  # GAE's lambda; paper: 1
    epsilon: float = 0.2  # PPO's clip; paper: 0.2. Without effect at one policy step a batch
    beta1: float = 0.9  # AdamW; paper: 0.9
    beta2: float = 0.95  # AdamW; paper: 0.95
    weight_decay: float = 0.0  # paper: 0
    clip: float = 1.0  # gradient norm; Open-Reasoner-Zero
    value_init: str = "orz"  # N(0, 1/(d+1)) as in ORZ's code; "paper": U(-sqrt 5, sqrt 5)
    train_vision: bool = False  # the paper is silent; the tower is frozen as in stage 1
    sampler: str = "torch"  # torch, or vllm: faster from some tens of millions of parameters on
    sampler_batch: int = 256  # responses that a rank samples at once
    kv_cache_gb: float = 0.25  # vllm's room for keys and values, a rank; 7B: 57 kB a token
    tis: float = 0.0  # cap of the importance weight trainer / sampler, 2 is usual; 0: not weighted
    gap_limit: float = 0.0  # nats between sampler and trainer that stop a run; 0: by dtype
    pack_tokens: int = 4096  # tokens a pack, which is a micro-batch
    prompt_tokens: int = 512  # longer prompts are left out, with a count
    recompute: str = "none"  # activations in backward: none, selective (keeps attention), full
    offload: bool = False  # a model that waits for the other waits in host memory
    dtype: str = "auto"  # of the compute: bfloat16 on GPUs, float32 on CPUs; masters are float32
    shard_ranks: int = 0  # ranks that share one copy of the weights; 0: those of a node
    log_rollouts: int = 16  # decoded rollouts a step in rollouts.jsonl
    save_every: int = 20  # steps between checkpoints
    keep_last: int = 2  # newest checkpoints from which a run can go on
    keep_every: int = 1  # exported models stay for every so many steps; average.py wants several
    dump_minutes: float = 30.0  # without a new phase: every thread's stack into RUN/heartbeat
    trace: bool = False  # print one picture problem through the six steps, then stop
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
        if self.prompt_tokens + max(self.lengths) > self.pack_tokens:
            raise ValueError(f"pack_tokens {self.pack_tokens} < prompt_tokens + longest response")
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
        model = parallel.load(cfg.model, world, head, cfg.train_vision, cfg.recompute)
        if head == "value" and cfg.value_init == "paper":
            start = torch.empty(model.value_head.weight.shape)
            parallel.put(model.value_head.weight, start.uniform_(-math.sqrt(5), math.sqrt(5)))
        trained = [p for p in model.parameters() if p.requires_grad]
        betas = (cfg.beta1, cfg.beta2)
        optimizer = torch.optim.AdamW(trained, lr, betas, weight_decay=cfg.weight_decay, fused=True)
        pair[name] = (model, optimizer)
    return pair


def load_sampler(cfg: Config, world, tokenizer, settings):
    """Before the trained models: vLLM measures the memory that is free when it starts."""
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


def exchange(rollouts: list[Rollout], verdicts: list, asked: list, cfg: Config, world):
    """Every rank's rollouts and verdicts on every rank, in the order of the batch.

    -> rollouts, verdicts, lengths in tokens of their documents. Ids travel as arrays, 8 bytes a
    token with the log-prob. Texts stay but for those that are logged, and so do pictures: who
    trains a rollout reads the prompt anew.
    """
    if world.size == 1:
        return rollouts, verdicts, [len(r.document) for r in rollouts]
    sent, known = {}, {(r.index, r.sample): r for r in rollouts}
    for r, verdict in zip(rollouts, verdicts, strict=True):
        tokens = np.array(r.response_ids, np.int32), np.array(r.logps, np.float32)
        text = r.text if r.index * cfg.samples + r.sample < cfg.log_rollouts else ""
        sent[r.index, r.sample] = (tokens, r.stopped, text, verdict, len(r.document))
    every, verdicts, lengths = [], [], []
    for (index, sample), found in sorted(parallel.union(world, sent).items()):
        (ids, logps), stopped, text, verdict, length = found
        theirs = Rollout(asked[index], sample, None, ids, logps, stopped, text, index)
        every.append(known.get((index, sample), theirs))
        verdicts.append(verdict)
        lengths.append(length)
    return every, verdicts, lengths


def deal(rollouts: list[Rollout], lengths: list[int], cfg: Config, world, cost=float) -> list:
    """This rank's bins of rollouts (indices), for each of the `critic_steps` parts of the batch.

    A part is whole problems and does not depend on the number of ranks, so that the critic takes
    the same steps on any. Every rollout is in exactly one bin of one rank; ranks get equally many,
    and those that run at the same time cost about the same.
    """
    problems, parts = len(rollouts) // cfg.samples, []
    for part in range(cfg.critic_steps):
        low, high = (problems * k // cfg.critic_steps * cfg.samples for k in (part, part + 1))
        groups = [r.problem.id for r in rollouts[low:high]]
        bins = packing.plan(lengths[low:high], groups, cfg.pack_tokens, world.size, cost)
        parts.append([[low + i for i in members] for members in bins[world.rank]])
    return parts


def read_prompts(rollouts: list[Rollout], tokenizer, settings):
    """Prompts and lists of those that another rank has sampled; tries of a problem share one."""
    prompts = {}
    for r in (r for r in rollouts if r.prompt is None):
        if r.index not in prompts:
            p = r.problem
            prompts[r.index] = data.encode_prompt(p.prompt, p.images, tokenizer, settings, p.id)
        r.prompt = prompts[r.index]
        r.response_ids, r.logps = r.response_ids.tolist(), r.logps.tolist()


def lay_out(rollouts: list[Rollout], parts: list, cfg: Config, world) -> list:
    """Bins of rollouts -> (packs, trained tokens on all ranks) of each part."""
    documents, laid = [r.document for r in rollouts], []
    for bins in parts:
        packs = []
        for members in bins:
            members = sorted(members, key=lambda i: len(documents[i]))
            packs.append(data.lay_out(documents, members) if members else data.filler_pack())
        if cfg.train_vision:  # ranks gather the tower together, and Adam wants a 0, not no gradient
            packs = [data.with_blank_picture(pack) for pack in packs]
        (tokens,) = parallel.sums(world, sum(len(pack.rows) for pack in packs))
        laid.append((packs, tokens))
    return laid


def plan(rollouts, lengths, cfg: Config, world, tokenizer, settings, cost):
    """-> indices of the rollouts that this rank trains, and its (packs, tokens) of each part, whose
    members count along those indices.
    """
    parts = deal(rollouts, lengths, cfg, world, cost)
    share = sorted(i for bins in parts for members in bins for i in members)
    place = {i: k for k, i in enumerate(share)}
    ours = [rollouts[i] for i in share]
    read_prompts(ours, tokenizer, settings)
    parts = [[[place[i] for i in members] for members in bins] for bins in parts]
    return share, lay_out(ours, parts, cfg, world)


def gather(per_rollout: list[Tensor], pack: data.Pack) -> Tensor:
    """Values of every rollout's response tokens -> those of a pack's trained tokens, (R,)."""
    return torch.cat([torch.zeros(0), *(per_rollout[i] for i in pack.members)])


@torch.no_grad()
def judge(critic, parts, count: int, device) -> list[Tensor]:
    """V(s_t) before each response token, by rollout."""
    values = [torch.zeros(0)] * count
    for pack in (pack for packs, _ in parts for pack in packs):
        moved = pack.to(device)
        found = critic(**moved.inputs, rows=moved.rows).cpu()
        owner = torch.arange(len(pack.lengths)).repeat_interleave(torch.tensor(pack.lengths))
        sizes = owner[pack.loss_mask].bincount(minlength=len(pack.lengths)).tolist()
        for i, part in zip(pack.members, found.split(sizes), strict=False):  # a filler has none
            values[i] = part
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
    loss, norm, trained = 0.0, 0.0, 0.0
    for k, (packs, tokens) in enumerate(parts):
        rate = warm(step * cfg.critic_steps + k, cfg.warmup)
        optimizer.param_groups[0]["lr"] = cfg.critic_lr * rate
        optimizer.zero_grad()
        for pack in packs:
            moved = pack.to(world.device)
            values = critic(**moved.inputs, rows=moved.rows)
            part = value_loss(values, gather(returns, pack).to(world.device)).sum() / max(tokens, 1)
            parallel.backward(critic, part, world, last=pack is packs[-1])
            loss += part.item() * tokens
        norm += parallel.clip_gradients(critic, cfg.clip) / len(parts)
        optimizer.step()
        trained += tokens
    (loss,) = parallel.sums(world, loss)
    return {"value_loss": loss / trained, "critic_grad_norm": norm}


def learn_policy(
    policy, optimizer, parts, rollouts, advantages, cfg: Config, step: int, world
) -> dict:
    """One optimiser step on the whole batch. -> the loss, and what should hold on the way.

    FloatingPointError before the step where the loss or its gradient is not finite.
    """
    tokens = sum(count for _, count in parts)
    lr = cfg.lr * warm(step, cfg.warmup)
    optimizer.param_groups[0]["lr"] = lr
    optimizer.zero_grad()
    sampled = [torch.tensor(r.logps) for r in rollouts]
    loss = entropy = clipped = difference = off = far = kl = weighed = 0.0
    suspects, every = [], [pack for packs, _ in parts for pack in packs]
    for pack in every:
        moved = pack.to(world.device)
        logps, entropies = policy(
            **moved.inputs, rows=moved.rows, targets=moved.targets, temperature=cfg.temperature
        )
        old_logps = logps.detach()  # strictly on-policy: this step is the first since sampling
        advantage = gather(advantages, pack).to(world.device)
        losses = policy_loss(logps, old_logps, advantage, cfg.epsilon)
        if cfg.tis:
            weights = importance_weights(logps, gather(sampled, pack).to(world.device), cfg.tis)
            losses, weighed = losses * weights, weighed + weights.sum().item()
        part = losses.sum() / tokens
        parallel.backward(policy, part, world, last=pack is every[-1])
        loss += part.item()
        if not math.isfinite(part.item()):
            suspects += [f"{rollouts[i].problem.id}#{rollouts[i].sample}" for i in pack.members]
        entropy += entropies.sum().item()
        ratios = (logps.detach() - old_logps).exp()
        clipped += ((ratios - 1).abs() > cfg.epsilon).sum().item()
        gap = old_logps.cpu() - gather(sampled, pack)
        difference += gap.abs().sum().item()
        kl += (gap.exp() - 1 - gap).sum().item()  # k3 estimate of KL(sampler | trainer)
        if len(gap):
            far = max(far, gap.abs().max().item())
            off = max(off, (ratios - 1).abs().max().item())
    norm = parallel.clip_gradients(policy, cfg.clip)
    local = loss, entropy, clipped, difference, kl, weighed
    loss, entropy, clipped, difference, kl, weighed = parallel.sums(world, *local)
    metrics = {
        "policy_loss": loss,
        "grad_norm": norm,
        "lr": lr,
        "entropy": entropy / tokens,
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


def verdict_of(rollout: Rollout):
    p = rollout.problem
    return grade(p.answer, rollout.text, choices=p.choices, precision=p.precision)


def score_of(verdict, rollout: Rollout) -> float:
    """The reward; a response that was cut is wrong, whatever it says."""
    return verdict.score * rollout.stopped


def describe(rollouts: list[Rollout], verdicts: list, world) -> dict:
    """Means over the rollouts of all ranks; pictures and text apart where it matters."""
    pairs, scores = {}, [score_of(v, r) for v, r in zip(verdicts, rollouts, strict=True)]

    def mean(name: str, values: list[float]):
        pairs[name] = (sum(values), len(values))

    mean("reward", scores)
    mean("length", [len(r.response_ids) for r in rollouts])
    mean("truncated", [not r.stopped for r in rollouts])
    mean("no_box", [v.status in ("no_box", "unclosed") for v in verdicts])
    mean("unparsed", [v.status in ("unparsed", "gold_unparsed", "too_big") for v in verdicts])
    for kind, wanted in (("image", True), ("text", False)):
        mine = [i for i, r in enumerate(rollouts) if bool(r.problem.images) is wanted]
        mean(f"reward_{kind}", [scores[i] for i in mine])
        mean(f"length_{kind}", [len(rollouts[i].response_ids) for i in mine])
        counts = [behaviors.count(rollouts[i].text) for i in mine]
        for name in behaviors.NAMES:
            mean(f"{kind}/{name}", [c[name] > 0 for c in counts])
    return parallel.means(world, pairs)


def rows_of(step: int, rollouts: list[Rollout], verdicts: list, scores: list[float]) -> list[dict]:
    """What rollouts.jsonl keeps of a rollout."""
    return [
        {
            "step": step,
            "id": r.problem.id,
            "source": r.problem.source,
            "image": bool(r.problem.images),
            "prompt": r.problem.prompt,
            "response": r.text,
            "answer": r.problem.answer,
            "score": score,
            "status": v.status,
            "tokens": len(r.response_ids),
            "stop": r.stopped,
        }
        for r, v, score in zip(rollouts, verdicts, scores, strict=True)
    ]


def print_trace(rollouts, verdicts, scores, values, advantages, cfg: Config, tokenizer):
    """One picture problem through the six steps with the numbers of this batch."""
    groups = [range(i, i + cfg.samples) for i in range(0, len(rollouts), cfg.samples)]
    seen = [g for g in groups if rollouts[g[0]].problem.images] or groups
    group = next((g for g in seen if len({scores[i] for i in g}) > 1), seen[0])
    first = rollouts[group[0]]
    problem, prompt = first.problem, first.prompt
    print(f"1 ask     {problem.id}: {problem.prompt!r}, reference {problem.answer}")
    print(f"          {len(prompt.ids)} tokens, pictures of (t, h, w) patches {prompt.grids}")
    print(f"2 answer  {cfg.samples} tries at temperature {cfg.temperature:g}")
    for i in group:
        print(f"          #{rollouts[i].sample}  {rollouts[i].text}")
    print("3 grade")
    for i in group:
        print(f"          #{rollouts[i].sample}  {verdicts[i].status}, reward {scores[i]:g}")
    best, worst = max(group, key=scores.__getitem__), min(group, key=scores.__getitem__)
    for i in dict.fromkeys((best, worst)):
        print(f"4 judge   #{rollouts[i].sample}, reward {scores[i]:g}")
        print("          token           log p   value V  advantage A   5 learn")
        for t, token in enumerate(rollouts[i].response_ids):
            a, v = advantages[i][t].item(), values[i][t].item() if values else math.nan
            push = "likelier" if a > 0 else "less likely" if a < 0 else "-"
            word = tokenizer.decode([token])
            print(f"          {word:14} {rollouts[i].logps[t]:6.2f} {v:9.2f} {a:12.2f}   {push}")


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
    out = Path(cfg.out)
    toy.ensure(world, cfg.model, cfg.data)
    start, checkpoint = checkpoints.newest(out) if cfg.trace else checkpoints.claim(out, cfg)
    directory = data.model_directory(cfg.model)
    tokenizer, settings = data.load_tokenizer(directory), data.load_image_settings(directory)
    problems = data.read_problems(cfg.data)
    mine = ((i, problems[i]) for i in range(world.rank, len(problems), world.size))
    lengths = {
        i: data.prompt_length(p.prompt, p.images, tokenizer, settings, p.id) for i, p in mine
    }
    lengths = parallel.union(world, lengths)
    problems, dropped = data.filter_long(problems, cfg.prompt_tokens, lengths)
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
        sampler.sync(parallel.whole_weights(policy, world.dtype))
        gap = canary_gap(sampler, policy, bird, cfg.temperature, cfg.train_vision)
        refuse_gap(parallel.largest(world, gap), cfg, world, when)
        parallel.release(policy)

    sync("at the start")
    log = None if cfg.trace else RunLog(out, cfg, cfg.steps, world.main, start)
    if world.main and dropped:
        print(f"{dropped} problems left out: prompts over {cfg.prompt_tokens} tokens")

    def turn(name: str, device):  # of a model to work on its GPU, or to wait in host memory
        if cfg.offload and name in pair:
            parallel.move(*pair[name], device)

    turn("policy", "cpu")
    turn("critic", "cpu")
    stopped = False
    pulse = (lambda *_: None) if cfg.trace else Pulse(out, world.rank, cfg.dump_minutes)
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
            metrics = describe(mine, verdicts, world) | {"length_budget": budget}
            rollouts, verdicts, lengths = exchange(mine, verdicts, asked, cfg, world)
            scores = [score_of(v, r) for v, r in zip(verdicts, rollouts, strict=True)]
            # 4. judge every token: how much better than expected?
            pulse("judge", step)
            share, parts = plan(rollouts, lengths, cfg, world, tokenizer, settings, cost)
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
                print_trace(rollouts, verdicts, scores, values, advantages, cfg, tokenizer)
                return parallel.finish(world)
            # 5. learn: the critic in 4 steps, the policy in 1
            pulse("learn", step)
            if cfg.algorithm == "ppo":
                metrics |= learn_critic(*pair["critic"], parts, returns, cfg, step, world)
                metrics["peak_gb"] = parallel.peak_gb(world)
                turn("critic", "cpu")
            turn("policy", world.device)
            metrics |= learn_policy(*pair["policy"], parts, ours, advantages, cfg, step, world)
            parallel.refuse_nan(world, step, metrics)
            refuse_gap(metrics["logp_diff_mean"], cfg, world, f"step {step}")
            metrics["peak_gb"] = max(metrics.get("peak_gb", 0.0), parallel.peak_gb(world))
            # 6. tell: the sampler, a checkpoint, and the log
            pulse("sync", step)
            sync(f"after the update of step {step}")
            metrics |= pulse.seconds()
            log.log(step, metrics, show=[name for name in SHOWN if name in metrics])
            log.rollouts(rows_of(step, rollouts, verdicts, scores)[: cfg.log_rollouts])
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
