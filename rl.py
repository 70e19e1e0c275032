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

Dimensions: P problems, G tries each, N = P G rollouts, T tokens of a pack, R trained tokens.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

import behaviors
import checkpoints
import data
import parallel
import toy
from model import load_model
from reward import grade
from rollout import Rollout, TorchSampler
from runlog import RunLog, stop_on_signal


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
    pack_tokens: int = 4096  # tokens a pack, which is a micro-batch
    prompt_tokens: int = 512  # longer prompts are left out, with a count
    log_rollouts: int = 16  # decoded rollouts a step in rollouts.jsonl
    save_every: int = 20  # steps between checkpoints (average.py wants several)
    trace: bool = False  # print one picture problem through the six steps, then stop
    seed: int = 0
    threads: int = 0  # CPU threads a process; 0 shares the cores out
    wandb: str = ""  # project name; empty: off

    def __post_init__(self):
        if self.algorithm not in ("ppo", "grpo"):
            raise ValueError(f"algorithm must be ppo or grpo, got {self.algorithm}")
        if self.value_init not in ("orz", "paper"):
            raise ValueError(f"value_init must be orz or paper, got {self.value_init}")
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


def length_budget(step: int, lengths: tuple[int, ...], length_from: tuple[int, ...]) -> int:
    """Tokens a response may have (OVR, sec. 4.1: 24k, from step 300 on 32k, from 700 on 48k)."""
    return [length for first, length in zip(length_from, lengths, strict=True) if first <= step][-1]


# ------------------------------------------------------------------ the plumbing

SHOWN = ("reward", "reward_image", "reward_text", "length", "entropy", "grad_norm", "logp_diff_max")


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
        model = load_model(cfg.model, device=world.device, head=head)
        if head == "value" and cfg.value_init == "paper":
            torch.nn.init.uniform_(model.value_head.weight, -math.sqrt(5), math.sqrt(5))
        for weight in model.visual.parameters():
            weight.requires_grad_(cfg.train_vision)
        model = parallel.shard(model, world)
        trained = [p for p in model.parameters() if p.requires_grad]
        betas = (cfg.beta1, cfg.beta2)
        optimizer = torch.optim.AdamW(trained, lr, betas, weight_decay=cfg.weight_decay, fused=True)
        pair[name] = (model, optimizer)
    return pair


def plan(rollouts: list[Rollout], cfg: Config, world) -> list[tuple[list[data.Pack], float]]:
    """The batch in `critic_steps` parts of whole problems: (packs, trained tokens on all ranks).

    Every rollout is in exactly one pack; pack.members index `rollouts`; ranks get equally many.
    """
    mine, parts = len(rollouts) // cfg.samples, []
    (problems,) = parallel.sums(world, mine)
    for part in range(cfg.critic_steps):
        # Problem i of this rank is problem rank + size * i of the batch: any number of ranks cuts
        # the batch at the same places, so that the critic takes the same steps.
        cuts = (int(problems) * k // cfg.critic_steps - world.rank for k in (part, part + 1))
        low, high = (-(-cut // world.size) * cfg.samples for cut in cuts)
        documents = [r.document for r in rollouts[low:high]]
        packs = data.pack(documents, cfg.pack_tokens) if documents else []
        for pack in packs:
            pack.members = [low + i for i in pack.members]
        most = int(parallel.largest(world, len(packs)))
        packs += [data.filler_pack()] * (most - len(packs))
        if cfg.train_vision:  # ranks gather the tower together, and Adam wants a 0, not no gradient
            packs = [data.with_blank_picture(pack) for pack in packs]
        (tokens,) = parallel.sums(world, sum(len(pack.rows) for pack in packs))
        parts.append((packs, tokens))
    return parts


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
    """GRPO: one advantage a rollout, the same for each of its tokens. (P, G) -> N x (R,)."""
    pairs = zip(advantages.flatten(), rollouts, strict=True)
    return [advantage.expand(len(r.response_ids)) for advantage, r in pairs]


def normalise(advantages: list[Tensor], world) -> list[Tensor]:
    """(A - mean) / std over all tokens of the batch, on all ranks (OVR, sec. 4.1: batch-level)."""
    flat = torch.cat(advantages).double()
    local = len(flat), flat.sum().item(), flat.square().sum().item()
    count, total, squares = parallel.sums(world, *local)
    mean = total / count
    std = math.sqrt(max(squares / count - mean**2, 0.0))
    return [(a - mean) / (std + 1e-8) for a in advantages]


def critic_metrics(values: list[Tensor], returns: list[Tensor], world) -> dict:
    """How well V predicts the return, over all tokens of all ranks.

    explained_variance = 1 - Var(return - V) / Var(return): 1 a perfect critic, 0 a constant one.
    """
    v, g = torch.cat(values).double(), torch.cat(returns).double()
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
            (part * world.size).backward()  # FSDP takes the mean over ranks, the loss is a sum
            loss += part.item() * tokens
        norm += parallel.clip_gradients(critic, cfg.clip) / len(parts)
        optimizer.step()
        trained += tokens
    (loss,) = parallel.sums(world, loss)
    return {"value_loss": loss / trained, "critic_grad_norm": norm}


def learn_policy(
    policy, optimizer, parts, rollouts, advantages, cfg: Config, step: int, world
) -> dict:
    """One optimiser step on the whole batch. -> the loss, and what should hold on the way."""
    tokens = sum(count for _, count in parts)
    lr = cfg.lr * warm(step, cfg.warmup)
    optimizer.param_groups[0]["lr"] = lr
    optimizer.zero_grad()
    sampled = [torch.tensor(r.logps) for r in rollouts]
    loss = entropy = clipped = difference = off = far = kl = 0.0
    for pack in (pack for packs, _ in parts for pack in packs):
        moved = pack.to(world.device)
        logps, entropies = policy(
            **moved.inputs, rows=moved.rows, targets=moved.targets, temperature=cfg.temperature
        )
        old_logps = logps.detach()  # strictly on-policy: this step is the first since sampling
        advantage = gather(advantages, pack).to(world.device)
        part = policy_loss(logps, old_logps, advantage, cfg.epsilon).sum() / tokens
        (part * world.size).backward()
        loss += part.item()
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
    optimizer.step()
    local = loss, entropy, clipped, difference, kl
    loss, entropy, clipped, difference, kl = parallel.sums(world, *local)
    return {
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


def verdict_of(rollout: Rollout):
    p = rollout.problem
    return grade(p.answer, rollout.text, choices=p.choices, precision=p.precision)


def describe(rollouts: list[Rollout], verdicts: list, scores: list[float], world) -> dict:
    """Means over the rollouts of all ranks; pictures and text apart where it matters."""
    pairs = {}

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


def main(cfg: Config):
    world = parallel.start(cfg.threads)
    if cfg.problems < world.size:
        raise ValueError(f"problems {cfg.problems} < {world.size} ranks: one would have none")
    out = Path(cfg.out)
    toy.ensure(world, cfg.model, cfg.data)
    start, checkpoint = checkpoints.newest(out) if cfg.trace else checkpoints.claim(out, cfg)
    tokenizer, settings = data.load_tokenizer(cfg.model), data.load_image_settings(cfg.model)
    problems, dropped = data.filter_long(
        data.read_problems(cfg.data),
        cfg.prompt_tokens,
        lambda p: data.prompt_length(p.prompt, p.images, tokenizer, settings, p.id),
    )
    stream = data.Stream(problems, cfg.seed)
    pair = load_pair(cfg, world)
    if checkpoint:
        checkpoints.load_state(checkpoint, pair)
    policy = pair["policy"][0]
    sampler = TorchSampler(load_model(cfg.model, device=world.device), tokenizer, settings)
    sampler.sync(parallel.whole_weights(policy))
    log = None if cfg.trace else RunLog(out, cfg, cfg.steps, world.main, start)
    if world.main and dropped:
        print(f"{dropped} problems left out: prompts over {cfg.prompt_tokens} tokens")

    stopped = False
    with stop_on_signal(world.main) as stop:
        for step in range(start, start + 1 if cfg.trace else cfg.steps):
            # 1. ask: P problems, text and pictures mixed; every rank takes its share
            asked = stream.batch(step, cfg.problems)[world.rank :: world.size]
            # 2. answer: G tries each, by the policy as it is now
            budget = length_budget(step, cfg.lengths, cfg.length_from)
            seed = (cfg.seed, step)
            rollouts = sampler.generate(asked, cfg.samples, budget, cfg.temperature, seed)
            # 3. grade: 1 if the boxed answer matches, else 0; a response that was cut is wrong
            verdicts = [verdict_of(r) for r in rollouts]
            scores = [v.score * r.stopped for v, r in zip(verdicts, rollouts, strict=True)]
            # 4. judge every token: how much better than expected?
            parts = plan(rollouts, cfg, world)
            metrics = describe(rollouts, verdicts, scores, world) | {"length_budget": budget}
            if cfg.algorithm == "ppo":
                values = judge(pair["critic"][0], parts, len(rollouts), world.device)
                advantages, returns = advantages_of(values, scores, cfg, world)
                metrics |= critic_metrics(values, returns, world)
            else:
                values, scored = None, torch.tensor(scores).view(-1, cfg.samples)
                advantages = spread(group_advantages(scored), rollouts)
            if cfg.trace:
                if world.main:
                    print_trace(rollouts, verdicts, scores, values, advantages, cfg, tokenizer)
                return parallel.finish(world)
            # 5. learn: the critic in 4 steps, the policy in 1
            if cfg.algorithm == "ppo":
                metrics |= learn_critic(*pair["critic"], parts, returns, cfg, step, world)
            metrics |= learn_policy(*pair["policy"], parts, rollouts, advantages, cfg, step, world)
            parallel.refuse_nan(step, metrics)
            # 6. tell: the log, a checkpoint, and the sampler
            sampler.sync(parallel.whole_weights(policy))
            log.log(step, metrics, show=[name for name in SHOWN if name in metrics])
            log.rollouts(rows_of(step, rollouts, verdicts, scores)[: cfg.log_rollouts])
            stopped = parallel.largest(world, stop.requested)
            if stopped or (step + 1) % cfg.save_every == 0:
                checkpoints.save_checkpoint(out, step + 1, pair, policy, cfg.model)
            if stopped:
                break
    if not stopped:
        checkpoints.save_whole(policy, out / "model", cfg.model)
    elif world.main:
        print(stop.advice)
    log.close()
    parallel.finish(world)


if __name__ == "__main__":
    main(tyro.cli(Config))
