"""Stage 2, multimodal reinforcement learning: PPO on text and pictures, with a reward that only
asks whether the boxed answer is right (OVR, sec. 3.2 and 4.1; the recipe is Open-Reasoner-Zero's).

Six steps, again and again:
  1 sample      P problems, text and pictures mixed; G responses each, by the policy as it is now
  2 reward      1 if the last \\boxed{} matches the reference, else 0; a response that was cut is 0
  3 pack        ranks exchange rollouts, and each takes an equal share of the work as packs
  4 advantages  of every token: the return minus what the critic expected there
  5 update      the critic in 4 optimiser steps, the policy in 1
  6 sync, log, save

How it departs from textbook PPO, all by the paper:
  1  No KL term and no reference model; no entropy bonus.
  2  GAE with gamma = lambda = 1: A_t = R - V(s_t), and the critic's target is R at every token.
  3  Strictly on-policy: one policy step for each batch, so that the ratio is exactly 1 and the clip
     never acts. With --policy-steps 4 it does: the log-probs of before the first step are the old
     ones, and epsilon matters.
  4  Policy and critic are two networks, both from the cold-start model.
  5  Advantages are normalised over all tokens of the batch.
  6  A response that is cut at the length budget is wrong: reward 0, nothing bootstrapped. The
     budget is a penalty that the curriculum relaxes.
`--algorithm grpo` replaces the critic by the mean of the G samples, in one `if`.

    torchrun rl.py                                 # the miniature: minutes on a laptop
    torchrun --nproc-per-node 2 rl.py              # the same numbers from two processes
    python -m tools.trace                          # one recorded problem through the six steps
    bash runs/ovr_7b.sh                            # both stages at 7B, with the paper's numbers

Dimensions: P problems, G samples each, N = P G rollouts, T tokens of a pack, R trained tokens.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from common import checkpoint, data, distributed
from common.log import RunLog, Timer, model_card, run_main, stop_on_signal
from common.packs import Pack, exchange, share_packs
from evaluation import behaviors
from miniature.world import ensure
from model import put, train_flops
from reward import grade
from rollout import Rollout, canary, canary_gap, load_rollouts, open_sampler, save_rollouts
from tools import trace

GAMMA = 1.0  # discount a token; paper, sec. 4.1
BETAS, WEIGHT_DECAY = (0.9, 0.95), 0.0  # AdamW; paper, sec. 4.1
CLIP_NORM = 1.0  # of the gradient; Open-Reasoner-Zero's code
# The sampler's log-probs and the trainer's may differ by so many nats a token on average: rounding
# gives 1e-6 to 1e-4 in float32 and about 0.01 in bfloat16, stale weights 0.3 and more.
GAP_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.1}
LOGGED = 16  # decoded rollouts a step in rollouts.jsonl
SHOWN = ("reward", "length", "entropy", "grad_norm", "logp_diff_max")  # on the step line


@dataclass(frozen=True)
class Config:
    """Stage 2. Defaults are the miniature's; the paper's value stands behind each setting."""

    model: str = "out/laptop/coldstart/model"  # HF directory or Hub name; paper: the cold start
    data: str = "out/laptop/data/train.jsonl"  # JSONL, parquet, Hub name; paper: 300 k problems
    columns: tuple[str, ...] = ()  # of rows with other names: prompt=problem answer=solution
    out: str = "out/laptop/rl"  # run directory
    algorithm: Literal["ppo", "grpo"] = "ppo"  # grpo has no critic; paper: ppo
    steps: int = 100  # iterations; paper: 900 to 1,000; laptop: minutes
    problems: int = 64  # unique prompts a step, over all ranks; paper: 512; laptop: seconds a step
    samples: int = 4  # responses a prompt; paper: 16; laptop: seconds a step
    policy_steps: int = 1  # optimiser steps a batch; paper: 1
    critic_steps: int = 4  # optimiser steps a batch, one pass; paper: 4; ORZ's code: one pass
    # (step, tokens): from that step on, tokens a response may have; paper: 0 24k, 300 32k, 700 48k
    lengths: tuple[tuple[int, int], ...] = ((0, 112), (50, 144))
    prompt_tokens: int = 512  # longer prompts are left out, with a count; ours: never cut
    lr: float = 1.5e-4  # policy; paper: 1e-6; laptop: small models want larger steps
    critic_lr: float = 1e-3  # critic; paper: 5e-6; laptop: small models want larger steps
    warmup: int = 5  # optimiser steps, linear, of each model; paper: 50; laptop: it has 100 steps
    lam: float = 1.0  # GAE's lambda; paper: 1
    epsilon: float = 0.2  # PPO's clip; paper: 0.2; acts with more than one policy step alone
    tis: float = 0.0  # cap of the weight trainer / sampler, 2 is usual; ours: 0, not weighted
    value_init: Literal["orz", "paper"] = "orz"  # N(0, 1/(d+1)); paper: U(-sqrt 5, sqrt 5), 77 off
    train_vision: bool = False  # trains tower and merger; ours: frozen, as in stage 1
    sampler: Literal["torch", "vllm"] = "torch"  # vllm: faster from tens of M parameters on
    sampler_batch: int = 256  # responses that a rank samples at once
    kv_cache_gb: float = 0.25  # vllm's room for keys and values, a rank; 7B: 57 kB a token
    pack_tokens: int = 4096  # tokens a pack, which is a micro-batch; ours: what memory holds
    recompute: Literal["none", "selective", "full"] = "none"  # of activations, in backward
    compile: bool = False  # blocks by torch.compile: for GPUs; minutes at the start
    offload: bool = False  # a model that waits for the other waits in host memory
    save_every: int = 20  # steps between checkpoints; 0: on Ctrl-C only
    keep_every: int = 1  # older exported models stay where this divides the step; the newest 2 do
    seed: int = 0

    def __post_init__(self):
        least = dict.fromkeys("steps problems samples policy_steps critic_steps".split(), 1)
        for name, bound in (least | {"tis": 0, "save_every": 0, "keep_every": 0}).items():
            if (value := getattr(self, name)) < bound:
                raise ValueError(f"--{name.replace('_', '-')} {value} is less than {bound}")
        starts = [first for first, _ in self.lengths]
        if starts != sorted(set(starts)) or starts[:1] != [0]:
            raise ValueError(f"--lengths are pairs of step and tokens, rising from 0: {starts}")
        if (longest := self.prompt_tokens + self.longest) > self.pack_tokens:
            raise ValueError(
                f"--pack-tokens {self.pack_tokens} < prompt_tokens + longest response: {longest}"
            )
        if not 0 < self.parts <= self.problems:
            raise ValueError(
                f"--policy-steps {self.policy_steps}, --critic-steps {self.critic_steps}: one has"
                f" to divide the other, and a step needs a problem (--problems {self.problems})"
            )
        if self.algorithm == "grpo" and self.samples < 2:
            raise ValueError("grpo compares samples of one problem: --samples must be at least 2")

    @property
    def longest(self) -> int:
        """Tokens of the longest response of the run."""
        return max(tokens for _, tokens in self.lengths)

    @property
    def parts(self) -> int:
        """Into how many parts a batch is cut; an optimiser step takes one or several of them. 0 if
        policy and critic cannot share them out.
        """
        if self.algorithm == "grpo":
            return self.policy_steps
        fewer, more = sorted((self.policy_steps, self.critic_steps))
        return more if more % fewer == 0 else 0


# ------------------------------------------------------------------ the algorithm


def gae(
    rewards: Tensor, values: Tensor, counts: list[int], gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16) of responses back to back.

    rewards, values (R,), tokens of each response -> advantages (R,), returns A + V (R,), which are
    the critic's targets.
    delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}; past the end V = A = 0,
    also where the response was cut: a cut is a failure, not a state with a future. values[t] is
    read at the state *before* token t. With gamma = lam = 1 and one reward R at the end (OVR, sec.
    4.1): A_t = R - V_t and the target is R, here the reward.
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


def policy_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, epsilon: float) -> Tensor:
    """PPO's clipped objective (Schulman et al. 2017, eq. 7) as a loss, a term a token: all (R,).

    -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A). On-policy, old_logps = logps.detach(), the ratio
    is 1 and the gradient is that of -A log p.
    """
    ratios = (logps - old_logps).exp()
    return -torch.minimum(ratios * advantages, ratios.clamp(1 - epsilon, 1 + epsilon) * advantages)


def value_loss(values: Tensor, returns: Tensor) -> Tensor:
    """Half the squared error, a term a token, unclipped as in the paper's equation: all (R,)."""
    return 0.5 * (values - returns) ** 2


def importance_weights(logps: Tensor, sampler_logps: Tensor, cap: float) -> Tensor:
    """min(pi_trainer / pi_sampler, cap), a weight a token: all (R,). Constants to the gradient.

    Truncated importance sampling (Ionides 2008): corrects the expectation for a sampler whose
    rounding differs, and the cap bounds the variance. Exactly 1 where the two agree.
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


def normalise(packs: list[Pack], world):
    """A <- (A - mean) / std over all tokens of the batch, on all ranks (OVR, sec. 4.1)."""
    flat = torch.cat([pack.advantages for pack in packs]).double()
    local = len(flat), flat.sum().item(), flat.square().sum().item()
    count, total, squares = distributed.sums(world, *local)
    mean = total / count
    std = math.sqrt(max(squares / count - mean**2, 0.0))
    for pack in packs:
        pack.advantages = (pack.advantages - mean) / (std + 1e-8)


# ------------------------------------------------------------------ the plumbing


def reward_of(rollout: Rollout) -> float:
    """The place for a reward of one's own: it sees verdict, text and every column of the row.

    It is computed once, by the rank that has the response, and travels with the rollout.
    """
    return rollout.verdict.score * rollout.stopped  # a response that was cut is wrong


def verdict_of(rollout: Rollout):
    problem = rollout.problem
    return grade(problem.answer, rollout.text, choices=problem.choices, precision=problem.precision)


def compare_samples(rollouts: list[Rollout], packs: list[Pack], samples: int):
    """GRPO: a rollout's advantage over the other samples of its problem, for each of its tokens."""
    rewards = torch.tensor([float(r.reward) for r in rollouts])
    advantages = group_advantages(rewards.view(-1, samples)).flatten()
    for pack in packs:
        counts = torch.tensor(pack.counts[: len(pack.members)], dtype=torch.int64)
        pack.advantages = advantages[pack.members].repeat_interleave(counts)


@torch.no_grad()
def critic_values(critic, packs: list[Pack], world):
    """V(s_t) before each response token, onto the packs."""
    values = [critic.values(pack.to(world.device)) for pack in packs]
    for pack, of_pack in zip(packs, values, strict=True):  # now, so that no pack waits for a copy
        pack.values = of_pack.cpu()
    distributed.release(critic)


def critic_metrics(packs: list[Pack], world) -> dict[str, float]:
    """How well V predicts the return, over all tokens of all ranks.

    explained_variance = 1 - Var(return - V) / Var(return): 1 a perfect critic, 0 a constant one.
    """
    v, g = (torch.cat([getattr(p, name) for p in packs]).double() for name in ("values", "returns"))
    local = (len(v), v.sum(), g.sum(), (g * g).sum(), (g - v).sum(), (g - v).square().sum())
    n, v1, g1, g2, e1, e2 = distributed.sums(world, *map(float, local))
    variance, unexplained = g2 / n - (g1 / n) ** 2, e2 / n - (e1 / n) ** 2
    explained = 1 - unexplained / max(variance, 1e-8)
    return {"explained_variance": explained, "value_mean": v1 / n, "return_mean": g1 / n}


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
    """The loss of each token, and what else should be watched of it: (R,) all."""
    logps, entropies = policy.logps(pack)
    old_logps = logps.detach() if pack.old_logps is None else pack.old_logps
    weights = importance_weights(old_logps, pack.logps, cfg.tis) if cfg.tis else 1.0
    losses = policy_loss(logps, old_logps, pack.advantages, cfg.epsilon) * weights
    with torch.no_grad():
        gap, off = old_logps - pack.logps, ((logps - old_logps).exp() - 1).abs()
        watched = {
            "entropy": entropies,
            "surprisal": -logps,  # as the entropy, if draws follow the log-probs
            "clip_fraction": off > cfg.epsilon,
            "ratio_max": off,  # the ratio's largest distance from 1
            "logp_diff_mean": gap.abs(),
            "logp_diff_max": gap.abs(),
            "sampler_kl": gap.exp() - 1 - gap,  # k3 estimate of KL(sampler | trainer)
        }
    return {"policy_loss": losses} | watched | ({"tis_weight": weights} if cfg.tis else {})


def train(
    pair: tuple, minibatches: list, rates: list[float], losses_of: Callable, step: int, world
) -> dict[str, float]:
    """One optimiser step for each minibatch, at its learning rate; for critic and policy alike.

    losses_of(model, pack) -> {name: (R,)}, of which the first is the loss. A minibatch's loss is
    its sum over all trained tokens of all ranks, divided by their number, which is known before
    backward: the gradient is the same however tokens are cut into packs, and whoever has them.

    -> means over all tokens of all minibatches, maxima where the name ends in _max; and grad_norm,
    lr, tokens.
    FloatingPointError, on all ranks and before the step, where loss or gradient is not finite.
    """
    model, optimizer = pair
    totals, maxima, norms, tokens_in_all = Counter(), Counter(), [], 0
    for packs, rate in zip(minibatches, rates, strict=True):
        (tokens,) = distributed.sums(world, sum(len(pack.targets) for pack in packs))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        rows = []  # a row a pack, read after the loop, in which nothing waits for the GPU
        for pack in packs:
            columns = losses_of(model, pack.to(world.device))
            loss = next(iter(columns.values())).sum() / max(tokens, 1)
            distributed.backward(model, loss, world, last=pack is packs[-1])
            rows.append(torch.stack([sum_or_max(name, x) for name, x in columns.items()]))
        norm = distributed.clip_gradients(model, CLIP_NORM)
        rows = torch.stack(rows).tolist()
        by_name = dict(zip(columns, zip(*rows, strict=True), strict=True))
        sums = distributed.sums(world, *(sum(values) for values in by_name.values()))
        finite = {"loss": sums[0], "grad_norm": norm}
        broken = [p for p, row in zip(packs, rows, strict=True) if not math.isfinite(row[0])]
        distributed.refuse_nan(world, step, finite, [name for p in broken for name in p.names])
        optimizer.step()
        norms.append(norm)
        tokens_in_all += tokens
        totals.update(dict(zip(columns, sums, strict=True)))
        maxima |= {name: max(maxima[name], *values) for name, values in by_name.items()}
    means = {name: total / max(tokens_in_all, 1) for name, total in totals.items()}
    means |= {n: distributed.largest(world, maxima[n]) for n in means if n.endswith("_max")}
    numbers = {"grad_norm": sum(norms) / len(norms), "lr": rates[-1], "tokens": tokens_in_all}
    return means | numbers


def sum_or_max(name: str, values: Tensor) -> Tensor:
    """A pack's sum, or its maximum; a filler has no tokens, and its maximum is 0."""
    values = torch.cat([values.detach().double(), values.new_zeros(1, dtype=torch.float64)])
    return values.max() if name.endswith("_max") else values.sum()


def split(parts: list[list[Pack]], steps: int) -> list[list[Pack]]:
    """The parts of a batch as minibatches for so many optimiser steps."""
    size = len(parts) // steps
    return [sum(parts[k : k + size], []) for k in range(0, len(parts), size)]


# ------------------------------------------------------------------ what a step leaves behind


def describe(rollouts: list[Rollout], world) -> dict[str, float]:
    """Means over the rollouts of all ranks; pictures and text apart where it matters."""
    pairs = {}

    def mean(name: str, values: list[float]):
        pairs[name] = (sum(values), len(values))

    statuses = [r.verdict.status for r in rollouts]
    mean("reward", [r.reward for r in rollouts])
    mean("length", [len(r.response_ids) for r in rollouts])
    mean("truncated", [not r.stopped for r in rollouts])
    mean("no_box", [status in ("no_box", "unclosed") for status in statuses])
    mean("unparsed", [status in ("unparsed", "gold_unparsed", "too_big") for status in statuses])
    for kind in ("image", "text"):
        some = [r for r in rollouts if bool(r.problem.images) is (kind == "image")]
        mean(f"reward_{kind}", [r.reward for r in some])
        mean(f"length_{kind}", [len(r.response_ids) for r in some])
        counts = [behaviors.count(r.text) for r in some]
        for name in behaviors.NAMES:
            mean(f"{kind}/{name}", [c[name] > 0 for c in counts])
    return distributed.means(world, pairs)


def record_of(run: Path, step: int) -> Path:
    """What was sampled in a step: a run that resumes there reads it instead of sampling again."""
    return run / f"rollouts/step_{step:06}.npz"


def record(run: Path, step: int, rollouts: list[Rollout]):
    """Writes what was sampled, before it is learnt from; what no resume will read again goes."""
    record_of(run, step).parent.mkdir(exist_ok=True)
    save_rollouts(record_of(run, step), rollouts)
    oldest = min(checkpoint.complete_steps(run), default=0)
    for file in (run / "rollouts").glob("step_*.npz"):
        if int(file.stem.removeprefix("step_")) < oldest:
            file.unlink()


def card_of(cfg: Config, step: int, metrics: dict[str, float]) -> str:
    """README.md of an exported policy."""
    names = ("reward", "reward_image", "reward_text", "length")
    extra = {"step": step} | {name: metrics[name] for name in names if name in metrics}
    title, run = "Open Vision Reasoner, stage 2: multimodal reinforcement learning", Path(cfg.out)
    return model_card(title, cfg, run / "model", run, cfg.prompt_tokens + cfg.longest, extra)


# ------------------------------------------------------------------ start and loop


def load_problems(cfg: Config, world, tokenizer, settings):
    """-> problems, and how many were left out for too long a prompt; each rank checks a share."""
    share = (world.rank, world.size)
    problems = data.read_problems(cfg.data, columns=cfg.columns, share=share)
    data.check_images(problems, share)
    lengths = {}
    for i in range(world.rank, len(problems), world.size):
        p = problems[i]
        lengths[i] = data.prompt_length(p.prompt, p.images, tokenizer, settings, p.place)
    return data.filter_long(problems, cfg.prompt_tokens, distributed.union(world, lengths))


def load_models(cfg: Config, directory: str, world) -> dict[str, tuple]:
    """{"policy": (model, optimizer), "critic": ...}, from one model; grpo has no critic."""
    models = {}
    heads = {"policy": ("lm", cfg.lr), "critic": ("value", cfg.critic_lr)}
    for name in ("policy", "critic") if cfg.algorithm == "ppo" else ("policy",):
        head, lr = heads[name]
        torch.manual_seed(cfg.seed)  # the value head, the same on every rank
        how = (cfg.train_vision, cfg.recompute, cfg.compile)
        model = distributed.load(directory, world, head, *how)
        if head == "value" and cfg.value_init == "paper":
            start = torch.empty(model.value_head.weight.shape)
            put(model.value_head.weight, start.uniform_(-math.sqrt(5), math.sqrt(5)))
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr, BETAS, weight_decay=WEIGHT_DECAY, fused=True)
        models[name] = (model, optimizer)
        if cfg.offload:  # before the next one comes: a GPU has no room for both
            distributed.move(model, optimizer, "cpu")
    return models


def refuse_gap(gap: float, world, when: str):
    """RuntimeError where sampler and trainer are plainly not the same policy."""
    if not gap <= GAP_LIMITS[world.dtype]:  # NaN too
        raise RuntimeError(
            f"{when}: log-probs of sampler and trainer differ by {gap:.3g} nats a token on average,"
            f" more than {GAP_LIMITS[world.dtype]:g}: the sampler does not have the policy's"
            " weights, or reads a stale cache. If this is its ordinary rounding, raise GAP_LIMITS"
            " in rl.py and set --tis 2"
        )


def main(cfg: Config):
    world = distributed.start()
    if cfg.problems < world.size:
        raise ValueError(f"--problems {cfg.problems} < {world.size} ranks: one would have none")
    ensure(world, cfg.model, cfg.data)
    run, directory = Path(cfg.out), data.model_directory(cfg.model)
    start, state = checkpoint.resume_or_start(run, cfg)
    tokenizer, settings = data.load_tokenizer(directory), data.load_image_settings(directory)
    problems, too_long = load_problems(cfg, world, tokenizer, settings)
    stream = data.Stream(problems, cfg.seed)
    room = cfg.sampler_batch, cfg.prompt_tokens + cfg.longest, cfg.kv_cache_gb
    # before the trained models: vLLM measures the memory that is free when it starts
    sampler = open_sampler(cfg.sampler, directory, world, room)
    sampler.rest()
    models = load_models(cfg, directory, world)
    if state:
        checkpoint.load_state(state, models)
    policy, critic = models["policy"][0], models.get("critic", (None,))[0]
    known_prompt = canary(problems, tokenizer, settings, cfg.prompt_tokens)
    cost = partial(train_flops, policy.config)

    def encode(problem: data.Problem) -> data.Prompt:
        name = problem.place or problem.id
        return data.encode_prompt(problem.prompt, problem.images, tokenizer, settings, name)

    def sample(step: int, problems: list[data.Problem], budget: int) -> list[Rollout]:
        """This rank's rollouts; those of a step that was cut off are read, not sampled again."""
        record, count = record_of(run, step), len(problems) * cfg.samples
        if distributed.everyone(record.exists())[
            0
        ]:  # a shared disk may tell ranks different things
            every = load_rollouts(record, problems, tokenizer, settings)
            if len(every) != count:
                raise ValueError(f"{record} has {len(every)} rollouts, not {count}: delete it")
            return [r for r in every if r.index % world.size == world.rank]
        dynamic = cfg.sampler == "vllm"
        mine = distributed.my_problems(world, len(problems), f"{step}", dynamic)
        seed = (cfg.seed, step)
        return sampler.generate(problems, cfg.samples, budget, seed=seed, indices=mine)

    def offload(name: str, device):
        """A model comes to its GPU to work, or goes to host memory to wait."""
        if cfg.offload and name in models:
            distributed.move(*models[name], device)

    def sync(when: str):
        """The sampler gets the policy's weights, and has to agree with it on a known prompt."""
        sampler.sync(distributed.whole_weights(policy, world.dtype))
        gap = canary_gap(sampler, policy, known_prompt, cfg.train_vision)
        distributed.release(policy)
        refuse_gap(distributed.largest(world, gap), world, when)

    offload("policy", world.device)
    sync("at the start")
    offload("policy", "cpu")
    log, timer, stopped = RunLog(run, cfg, cfg.steps, world.main, start), Timer(), False
    if world.main and too_long:
        print(f"{too_long} problems left out: prompts over {cfg.prompt_tokens} tokens")
    saver = checkpoint.Saver(run, directory, world.dtype, cfg.keep_every)
    with saver, stop_on_signal(run, world.main) as stop:
        for step in range(start, cfg.steps):
            # 1. sample: P problems, text and pictures mixed, G responses each, by today's policy
            timer("sample")
            batch, budget = stream.batch(step, cfg.problems), length_budget(step, cfg.lengths)
            rollouts = sample(step, batch, budget)
            sampler.rest()  # also where they were read: the last sync has woken it
            # 2. reward: 1 if the boxed answer matches, else 0; a response that was cut is wrong
            timer("reward")
            for r in rollouts:
                r.verdict = verdict_of(r)
                r.reward = reward_of(r)
            metrics = describe(rollouts, world) | {"length_budget": budget}
            # 3. pack: ranks exchange rollouts, take equal shares; packs carry their own tensors
            timer("pack")
            rollouts, lengths = exchange(rollouts, batch, world)
            assert len(rollouts) == cfg.problems * cfg.samples, f"{len(rollouts)} rollouts"
            if world.main:
                record(run, step, rollouts)
            parts = share_packs(rollouts, lengths, cfg, cost, encode, world)
            packs = sum(parts, [])
            # 4. advantages: of every token, how much better than expected?
            timer("advantages")
            if cfg.algorithm == "ppo":
                offload("critic", world.device)
                critic_values(critic, packs, world)
                for p in packs:
                    p.advantages, p.returns = gae(p.rewards, p.values, p.counts, GAMMA, cfg.lam)
                normalise(packs, world)
                metrics |= critic_metrics(packs, world)
            else:
                compare_samples(rollouts, packs, cfg.samples)
            traced = trace.rows_of(step, rollouts, packs, cfg.samples, tokenizer, world)
            # 5. update: the critic in some steps and the policy in one, by the same function
            timer("update")
            if critic:
                lrs = rates(step, cfg.critic_steps, cfg.critic_lr, cfg.warmup)
                minibatches = split(parts, cfg.critic_steps)
                of_critic = train(models["critic"], minibatches, lrs, critic_losses, step, world)
                metrics |= of_critic | {"critic_grad_norm": of_critic["grad_norm"]}
                metrics["peak_gb"] = distributed.peak_gb(world)  # before its memory is given back
                offload("critic", "cpu")
            offload("policy", world.device)
            if cfg.policy_steps > 1:
                store_old_logps(policy, packs, world)
            lrs = rates(step, cfg.policy_steps, cfg.lr, cfg.warmup)
            minibatches, losses_of = split(parts, cfg.policy_steps), partial(policy_losses, cfg=cfg)
            metrics |= train(models["policy"], minibatches, lrs, losses_of, step, world)
            metrics["peak_gb"] = max(metrics.get("peak_gb", 0.0), distributed.peak_gb(world))
            refuse_gap(metrics["logp_diff_mean"], world, f"step {step}")
            # 6. sync, log, save
            timer("sync")
            sync(f"after the update of step {step}")
            metrics["peak_gb"] = max(metrics["peak_gb"], distributed.peak_gb(world))
            log.log(step, metrics | timer.seconds(), SHOWN)
            log.append("rollouts", (trace.row_of(step, r, tokenizer) for r in rollouts[:LOGGED]))
            log.append("trace", traced)
            stopped = distributed.largest(world, stop.requested)
            if stopped or (cfg.save_every and (step + 1) % cfg.save_every == 0):
                timer("save")  # after the log: all steps of a checkpoint stand in it
                saver.save(step + 1, models, policy, card_of(cfg, step + 1, metrics))
            saver.wait_for_save()
            offload("policy", "cpu")
            if stopped:
                break
    if not stopped:
        offload("policy", world.device)
        card = card_of(cfg, cfg.steps, {})
        checkpoint.export(policy, run / "model", directory, world.dtype, card)
    elif world.main:
        print(stop.advice)
    log.close()
    distributed.finish(world)


if __name__ == "__main__":
    run_main(main, Config)
