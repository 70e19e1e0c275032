"""rl.py: pieces by hand, the gradient against an enumerated MDP, runs against themselves."""

import itertools
import json
import math
import random
import shutil
import signal
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import eval
import rl
from common import batches, checkpoint, data, distributed, packs
from common.distributed import World
from model import load_model
from reward import Verdict
from rollout import Rollout, Sampler, TorchSampler
from tools import trace

ALONE = World(0, 1, torch.device("cpu"))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def packed(rollouts: list, cfg: rl.Config) -> list:
    """The parts of a batch in one process, each a list of packs."""
    return packs.share_packs(rollouts, cfg, float, None, ALONE)


def by_document(parts: list, name: str) -> dict:
    """{index of a rollout in the batch: its numbers} of a column of the packs."""
    columns = {}
    for pack in sum(parts, []):
        numbers = getattr(pack, name).split(pack.counts)
        columns |= dict(zip(pack.members, numbers, strict=False))
    return columns


def put_column(parts: list, name: str, by_rollout: list):
    for pack in sum(parts, []):
        column = [by_rollout[i] for i in pack.members]
        setattr(pack, name, torch.cat([torch.zeros(0), *column]))


def learner(model: nn.Module, lr: float = 0.0, steps: int = 1) -> rl.Learner:
    return rl.Learner(model, torch.optim.SGD(model.parameters(), lr), ALONE, lr, steps)


def config(**changed) -> rl.Config:
    small = dict(steps=4, problems=4, samples=4, lengths=((0, 8), (2, 12)), lr=1e-3)
    small |= dict(pack_tokens=128, prompt_tokens=64, save_every=100, warmup=2)
    return rl.Config(**small | changed)


def lines_of(run: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run / f"{name}.jsonl").open()]


def metrics_of(run: Path) -> list[dict]:
    """Its steps, without what the machine decides."""
    rows, machine = lines_of(run, "metrics"), ("seconds", "peak_gb")
    return [{k: v for k, v in row.items() if not k.startswith(machine)} for row in rows]


def weights_of(run: Path) -> dict:
    return load_file(run / "model/model.safetensors")


def same_run(one: Path, other: Path, files: tuple = ()):
    """Bit for bit: metrics, weights, and these files."""
    assert metrics_of(one) == metrics_of(other)
    mine, theirs = weights_of(one), weights_of(other)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)
    for name in files:
        assert (one / f"{name}.jsonl").read_text() == (other / f"{name}.jsonl").read_text()


# ---- the pieces, by hand


def naive_gae(rewards, values, gamma, lam):
    """The double sum of eq. 16: A_t = sum_l (gamma lam)^l delta_{t+l}."""
    after = [*values[1:], 0.0]
    deltas = [r + gamma * w - v for r, w, v in zip(rewards, after, values, strict=True)]
    return [
        sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas)))
        for t in range(len(deltas))
    ]


NUMBERS = st.tuples(st.floats(-2, 2), st.floats(-2, 2))


@given(st.lists(NUMBERS, min_size=1, max_size=12), st.floats(0, 1), st.floats(0, 1))
def test_gae_is_the_double_sum_of_its_definition(steps, gamma, lam):
    rewards, values = (torch.tensor(x, dtype=torch.float64) for x in zip(*steps, strict=True))
    n = len(steps)
    twice = (torch.cat([x, x.flip(0), x[:0]]) for x in (rewards, values))  # back to back
    advantages, targets = rl.gae(*twice, [n, n, 0], gamma, lam)
    r, v = rewards.tolist(), values.tolist()
    naive = naive_gae(r, v, gamma, lam) + naive_gae(r[::-1], v[::-1], gamma, lam)
    assert advantages.dtype == targets.dtype == torch.float64
    torch.testing.assert_close(advantages.tolist(), naive, atol=1e-12, rtol=0)


def test_group_advantages_by_hand_and_a_group_without_contrast_teaches_nothing():
    got = rl.group_advantages(torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]))
    a, b = math.sqrt(3), 1 / math.sqrt(3)
    wanted = torch.tensor([[a, -b, -b, -b], [1, 1, -1, -1], [b, b, b, -a]])
    torch.testing.assert_close(got, wanted)
    for score, samples in itertools.product((0.0, 1.0, 0.1, 1 / 3), (2, 7, 16)):
        assert not rl.group_advantages(torch.full((3, samples), score)).any()


def pack_with(**columns) -> packs.Pack:
    """A pack that has nothing but numbers of its trained tokens."""
    return replace(packs.filler_pack(), **{n: torch.as_tensor(x) for n, x in columns.items()})


def losses_by_hand(logps, old_logps, sampler_logps, advantages, stale, **settings):
    """-> what policy_losses gives, and the gradient of its loss."""
    logps = torch.tensor(logps, dtype=torch.float64, requires_grad=True)
    columns = dict(logps=sampler_logps, old_logps=old_logps, advantages=advantages)
    columns = {n: torch.tensor(x).double() for n, x in columns.items() if x is not None}
    policy = SimpleNamespace(logps=lambda pack: (logps, torch.zeros_like(logps)))
    pack = pack_with(**columns, stale=torch.tensor(stale))
    losses = rl.policy_losses(policy, pack, config(**settings))
    (gradient,) = torch.autograd.grad(losses["policy_loss"].sum(), logps)
    return {name: x.tolist() for name, x in losses.items()}, gradient.tolist()


@pytest.mark.parametrize(
    "high, ratio, advantage, loss, slope, clipped",
    [  # slope: d loss / d logp; epsilon = 0.2; high 0: as epsilon
        (0, 1.0, 2.0, -2.0, -2.0, 0),
        (0, 1.1, 2.0, -2.2, -2.2, 0),  # inside
        (0, 1.5, 2.0, -2.4, 0.0, 1),  # good and already likelier: held back
        (0, 0.5, 2.0, -1.0, -1.0, 1),  # good and less likely: free to return
        (0, 0.5, -2.0, 1.6, 0.0, 1),  # bad and already less likely: held back
        (0, 1.5, -2.0, 3.0, 3.0, 1),  # bad and likelier: free to return
        (0.28, 1.25, 2.0, -2.5, -2.5, 0),  # DAPO's: PPO would hold it back at 1.2
        (0.28, 1.3, 2.0, -2.56, 0.0, 1),
        (0.28, 0.75, -2.0, 1.6, 0.0, 1),  # the lower end stays
    ],
)
def test_the_clip_by_hand(high, ratio, advantage, loss, slope, clipped):
    numbers = [math.log(ratio) - 3.0], [-3.0], [-3.0], [advantage], [False]
    losses, gradient = losses_by_hand(*numbers, epsilon_high=high)
    assert losses["policy_loss"] == pytest.approx([loss]) and gradient == pytest.approx([slope])
    assert losses["clip_fraction"] == [clipped]
    assert losses["ratio_diff"] == pytest.approx([abs(ratio - 1)])


@pytest.mark.parametrize("old", [None, [5.0, 5.0, 5.0, -1.1]])
def test_the_clip_acts_on_tokens_of_an_earlier_policy_with_one_policy_step_and_with_several(old):
    """And with several, today's own tokens keep the log-probs from before the first of them."""
    sampled = [-2.0, -2.0, -0.9, -1.0]
    stale = [True, True, True, False]
    losses, gradient = losses_by_hand([-1.0] * 4, old, sampled, [1.0] * 4, stale)
    ratios = [1.2, 1.2, math.exp(-0.1), 1.0 if old is None else math.exp(0.1)]
    assert losses["policy_loss"] == pytest.approx([-ratio for ratio in ratios])
    assert gradient == pytest.approx([0.0, 0.0, -ratios[2], -ratios[3]])
    assert losses["logp_diff"][:3] == [0, 0, 0]


def test_importance_weights_scale_each_tokens_gradient_up_to_their_cap():
    """Of a sampler whose log-probs were off by so many nats."""
    drifts, advantages = [-1.0, 0.0, 0.3, 2.0], [1.0, -2.0, 3.0, 1.0]
    numbers = None, [-1.0 - drift for drift in drifts], advantages, [False] * 4
    losses, gradient = losses_by_hand([-1.0] * 4, *numbers, tis=1.5)
    weights = [min(math.exp(drift), 1.5) for drift in drifts]
    assert losses["tis_weight"] == pytest.approx(weights)
    weighed = [-a * w for a, w in zip(advantages, weights, strict=True)]
    assert gradient == pytest.approx(weighed) and losses["policy_loss"] == pytest.approx(weighed)
    plain, gradient = losses_by_hand([-1.0] * 4, *numbers)
    assert "tis_weight" not in plain and gradient == [-a for a in advantages]


def test_warm_up_counts_optimiser_steps():
    assert sum((rl.rates(step, 1, 8.0, 4) for step in range(6)), []) == [2, 4, 6, 8, 8, 8]
    assert rl.rates(0, 2, 8.0, 4) + rl.rates(1, 2, 8.0, 4) == [2, 4, 6, 8]
    assert rl.rates(0, 1, 8.0, 0) == [8]
    # The paper's 50: four critic steps an iteration reach the full rate within 13 iterations.
    assert rl.rates(12, 4, 1.0, 50)[1] == 1 and rl.rates(12, 1, 1.0, 50) == [0.26]


def test_problems_are_handed_out_longest_first_by_when_they_were_last_seen():
    """By mean, whatever the number of responses; unknown ones before, unfinished ones in front."""
    problems = {i: data.Problem(name, "", "") for i, name in enumerate("abcdef", start=40)}
    lengths = {"a": (0, 30, 3), "b": (3, 80, 2), "d": (1, 900, 30), "f": (2, 99, 1), "z": (9, 1, 1)}
    unfinished = [Rollout(problems[i], 0, None, i, [1]) for i in (43, 40, 40)]
    assert batches.longest_first(problems, lengths, unfinished) == [43, 40, 42, 44, 45, 41]
    assert batches.longest_first(problems, {}, []) == [*problems]


def test_lengths_are_summed_until_a_problem_is_drawn_again():
    lengths, problems = {}, [data.Problem(name, "", "") for name in "ab"]

    def add(*responses):
        rollouts = [Rollout(problems[p], 0, None, i, [1] * n) for p, i, n in responses]
        return batches.add_lengths(lengths, rollouts)

    assert add((0, 3, 10), (0, 3, 20), (1, 4, 5)) == {"a": (3, 30, 2), "b": (4, 5, 1)}
    assert add((0, 3, 60)) == {"a": (3, 90, 3)}  # one that was put aside
    assert add((0, 7, 1)) == {"a": (7, 1, 1)}
    assert lengths == {"a": (7, 1, 1), "b": (4, 5, 1)}


def test_advantages_are_normalised_over_tokens_so_that_short_right_answers_weigh_more():
    right, wrong = torch.ones(2000), torch.zeros(16000)
    some = [pack_with(advantages=x) for x in (right[:1500], torch.cat([right[1500:], wrong]))]
    rl.normalise([*some, pack_with(advantages=right[:0])], ALONE)
    assert some[0].advantages[0].item() == pytest.approx(2.828, abs=1e-3)
    assert some[1].advantages[-1].item() == pytest.approx(-0.354, abs=1e-3)
    alike = [pack_with(advantages=torch.full((n,), 0.5)) for n in (5, 3)]
    rl.normalise(alike, ALONE)
    assert not any(p.advantages.any() for p in alike)


def test_critic_metrics_of_a_perfect_a_constant_and_any_critic():
    returns, values = torch.tensor([1.0, 1, 0, 0, 0, 0]), torch.tensor([0.9, 0.6, 0.1, 0.3, 0, 0.2])

    def metrics(values):
        halves = [slice(0, 2), slice(2, 6)]
        some = [pack_with(values=values[h], returns=returns[h]) for h in halves]
        return rl.critic_metrics(some, ALONE)

    perfect = metrics(returns)
    assert perfect["explained_variance"] == 1
    assert perfect["value_mean"] == perfect["return_mean"] == pytest.approx(1 / 3)
    assert metrics(torch.full_like(returns, 0.7))["explained_variance"] == pytest.approx(0)
    naive = 1 - (returns - values).var(correction=0) / returns.var(correction=0)
    assert metrics(values)["explained_variance"] == pytest.approx(naive.item(), rel=1e-6)


@pytest.mark.parametrize(
    "wrong, named",
    [
        (dict(lengths=((1, 8), (2, 12))), "--lengths"),
        (dict(lengths=((0, 8), (4, 12), (2, 16))), "--lengths"),
        (dict(lengths=()), "--lengths"),
        (dict(lengths=((0, 0),)), "--lengths"),
        (dict(pack_tokens=75), "--pack-tokens 75 < 76"),
        (dict(algorithm="grpo", samples=1), "--samples"),
        (dict(problems=3), "--problems 3 .* < 4"),
        (dict(policy_steps=3), "--problems 4 .* < 12"),
        (dict(steps=0), "steps"),
        (dict(tis=-1), "--tis"),
        (dict(finish_share=1.1), "--finish-share 1.1"),
        (dict(finish_share=0.7), "--problems 4 in --finish-share 0.7 .* < 4 parts"),
        (dict(finish_share=0.5, algorithm="grpo"), "grpo .* --finish-share 1"),
        (dict(resample=2), "--resample 2 .* grpo alone"),
    ],
)
def test_a_setting_that_would_mislead_is_refused_by_name(wrong, named):
    with pytest.raises(ValueError, match=named):
        config(**wrong)


# ---- the oracle: an MDP small enough to enumerate catches signs, shifts, aggregation at once

TOKENS, HORIZON, STOP = 3, 3, 2
# All responses of up to 3 tokens, of which token 2 ends one early: 15, and in DRAWN each as often
# as a uniform policy draws it in 27.
DRAWN = itertools.product(range(TOKENS), repeat=HORIZON)
DRAWN = [s[: s.index(STOP) + 1] if STOP in s else s for s in DRAWN]
SEQUENCES = [*dict.fromkeys(DRAWN)]
random.Random(0).shuffle(DRAWN)
STATES = sorted({s[:t] for s in SEQUENCES for t in range(len(s))})
REWARD = dict(zip(SEQUENCES, [1.0, 0, 0, 1, 0, 0, 1, 1, 0, 0, 1, 0, 0.5, 0, 1], strict=True))
# one optimiser step on a batch of DRAWN
MDP = dict(samples=1, problems=27, lengths=((0, 4),), critic_steps=1, prompt_tokens=2)


def table(numbers) -> torch.Tensor:
    return torch.tensor([*numbers], dtype=torch.float64)


def logp_of(theta, sequence):
    """(R,) log-probs of the sequence's tokens under the table theta (states, tokens)."""
    logps = theta.log_softmax(-1)
    return torch.stack([logps[STATES.index(sequence[:t]), a] for t, a in enumerate(sequence)])


def exact_gradient(theta):
    """Of the expected reward, over all sequences."""
    theta = theta.clone().requires_grad_()
    objective = sum(logp_of(theta, s).sum().exp() * REWARD[s] for s in SEQUENCES)
    return torch.autograd.grad(objective, theta)[0]


def exact_values(theta) -> dict:
    """V of every state: the mean reward of the sequences through it, weighted by probability."""
    mass, values = {s: logp_of(theta, s).sum().exp().item() for s in SEQUENCES}, {}
    for state in STATES:
        through = [s for s in SEQUENCES if s[: len(state)] == state]
        values[state] = sum(mass[s] * REWARD[s] for s in through) / sum(mass[s] for s in through)
    return values


class TabularPolicy(nn.Module):
    """Stands in for the model: reads each document of a pack up to the row that predicts."""

    def __init__(self, theta):
        super().__init__()
        self.theta = nn.Parameter(theta)

    def rows(self, pack):
        starts, states = [0, *itertools.accumulate(pack.lengths)], []
        for row in pack.rows.tolist():
            start = max(s for s in starts if s <= row)
            states.append(tuple(pack.ids[start + 2 : row + 1].tolist()))  # two prompt tokens
        return self.theta[[STATES.index(state) for state in states]]

    values = rows

    def logps(self, pack):
        logps = self.rows(pack).log_softmax(-1).gather(1, pack.targets[:, None]).squeeze(1)
        return logps, torch.zeros_like(logps)


def mdp_parts(drawn, cfg, stale: int = 0) -> list:
    """Drawn by a uniform policy."""
    problem, rollouts = data.Problem("mdp", "?", "!"), []
    for i, s in enumerate(drawn):
        prompt = data.Prompt([9, 9], [9, 9], None, (), ())
        logps = [-math.log(TOKENS)] * len(s)
        one = Rollout(problem, 0, prompt, i, list(s), logps, True, reward=REWARD[s], stale=stale)
        rollouts.append(one)
    return packed(rollouts, cfg)


def advantages_on(parts: list, known: dict, lam: float) -> float:
    """Steps 4 of main(), with a critic that knows the values -> the normaliser's deviation."""
    rl.critic_values(learner(TabularPolicy(table(known[s] for s in STATES))), sum(parts, []))
    for p in sum(parts, []):
        p.advantages, p.returns = rl.gae(p.rewards, p.values, p.counts, rl.GAMMA, lam)
    deviation = torch.cat([p.advantages for p in sum(parts, [])]).std(correction=0)
    rl.normalise(sum(parts, []), ALONE)
    return deviation


@pytest.fixture
def unclipped(monkeypatch):
    monkeypatch.setattr(rl, "CLIP_NORM", 1e9)


@pytest.mark.parametrize("lam", [0, 0.95, 1])
@pytest.mark.parametrize("pack_tokens", [76, 5 * 9])
def test_values_gae_normalise_and_train_give_the_exact_gradient_of_a_batch(
    lam, pack_tokens, monkeypatch
):
    """The batch gradient is the exact one over the normaliser: tokens of the batch times the
    advantages' deviation. Their mean, which normalise() takes off, has no gradient in expectation.
    """
    monkeypatch.setattr(rl, "CLIP_NORM", 1e9)
    policy = TabularPolicy(torch.zeros(len(STATES), TOKENS, dtype=torch.float64))
    known, cfg = exact_values(policy.theta), config(**MDP, lam=lam, pack_tokens=pack_tokens)
    parts, naive = mdp_parts(DRAWN, cfg), []
    parts[0].append(packs.rollout_pack([], []))  # a filler, as on a rank that has run out of packs
    advantages_on(parts, known, lam)
    values, returns = by_document(parts, "values"), by_document(parts, "returns")
    for i, sequence in enumerate(DRAWN):
        assert values[i].tolist() == [known[sequence[:t]] for t in range(len(sequence))]
        rewards = [0.0] * (len(sequence) - 1) + [REWARD[sequence]]
        naive += naive_gae(rewards, values[i].tolist(), 1.0, lam)
        if lam == 1:
            assert returns[i].tolist() == pytest.approx([REWARD[sequence]] * len(sequence))
    metrics = rl.train(learner(policy), parts, partial(rl.policy_losses, cfg=cfg), 0)
    tokens, deviation = sum(map(len, DRAWN)), table(naive).std(correction=0)
    wanted = -exact_gradient(policy.theta) * 27 / tokens / deviation
    assert metrics["logp_diff"] < 1e-7
    torch.testing.assert_close(policy.theta.grad, wanted, atol=1e-7, rtol=0)  # std + 1e-8

    critic = TabularPolicy(torch.randn(len(STATES), dtype=torch.float64, generator=seeded(1)))
    metrics = rl.train(learner(critic), parts, rl.critic_losses, 0)
    states = [sequence[:t] for sequence in DRAWN for t in range(len(sequence))]
    targets = table(naive) + table(known[state] for state in states)
    error = critic.theta[[STATES.index(state) for state in states]] - targets
    (wanted,) = torch.autograd.grad(error.square().mean() / 2, critic.theta)
    assert metrics["value_loss"] == pytest.approx(error.square().mean().item() / 2)
    torch.testing.assert_close(critic.theta.grad, wanted)


def test_with_several_policy_steps_the_clip_acts_and_the_gradient_is_that_of_ppo(unclipped):
    """Two steps on two halves, against PPO's loss written out over the tables."""
    drawn, total = DRAWN[:26], sum(map(len, DRAWN[:26]))
    start = torch.randn(len(STATES), TOKENS, dtype=torch.float64, generator=seeded(3))
    policy = learner(TabularPolicy(start.clone()), lr=9.0, steps=2)
    cfg = config(**MDP | dict(problems=26, policy_steps=2, critic_steps=2))
    parts = mdp_parts(drawn, cfg)
    advantages = [torch.randn(len(s), generator=seeded(i)).double() for i, s in enumerate(drawn)]
    put_column(parts, "advantages", advantages)
    rl.store_old_logps(policy, sum(parts, []))
    metrics = rl.train(policy, parts, partial(rl.policy_losses, cfg=cfg), 0)

    theta, clipped, off = start.clone().requires_grad_(), 0, 0.0
    for half in (range(13), range(13, 26)):
        loss, tokens = 0.0, sum(len(drawn[i]) for i in half)
        for i in half:
            ratio = (logp_of(theta, drawn[i]) - logp_of(start, drawn[i])).exp()
            a, bounded = advantages[i], ratio.clamp(0.8, 1.2)
            loss = loss - torch.min(ratio * a, bounded * a).sum() / tokens
            clipped += ((ratio - 1).abs() > 0.2).sum().item()
            off += (ratio - 1).abs().sum().item()
        (gradient,) = torch.autograd.grad(loss, theta)
        theta = (theta - 9.0 * gradient).detach().requires_grad_()
    torch.testing.assert_close(policy.model.theta, theta, atol=1e-5, rtol=1e-5)
    assert metrics["ratio_diff"] == pytest.approx(off / total, rel=1e-4)
    assert metrics["clip_fraction"] == pytest.approx(clipped / total) and clipped > 0


def test_tokens_of_an_earlier_policy_are_weighed_by_their_ratio_and_the_gradient_is_exact(
    unclipped,
):
    """The first token of each response is drawn by a uniform policy, the rest by today's, which
    differs in the first state alone. There the gradient is the exact one, as if today's policy had
    drawn. States behind are visited as often as the old policy chose them: 1/3 instead of p(a).
    """
    theta, tokens = torch.zeros(len(STATES), TOKENS, dtype=torch.float64), sum(map(len, DRAWN))
    theta[STATES.index(())] = table([0.5, -0.4, 0.2])
    first, exact = theta[STATES.index(())].softmax(0), exact_gradient(theta)
    for i, state in enumerate(STATES):
        exact[i] *= 1 / TOKENS / first[state[0]] if state else 1.0
    cfg, policy = config(**MDP, epsilon=9.0, tis=2.0), TabularPolicy(theta)
    parts = mdp_parts(DRAWN, cfg, stale=1)
    deviation = advantages_on(parts, exact_values(theta), 1.0)
    metrics = rl.train(learner(policy), parts, partial(rl.policy_losses, cfg=cfg), 0)
    wanted = -exact * 27 / tokens / deviation
    torch.testing.assert_close(policy.theta.grad, wanted, atol=1e-7, rtol=0)
    assert metrics["stale_tokens"] == 27 / tokens
    off = [abs(3 * first[s[0]].item() - 1) for s in DRAWN]
    assert metrics["ratio_diff"] == pytest.approx(sum(off) / tokens, rel=1e-6)
    assert metrics["logp_diff"] < 1e-7 and metrics["tis_weight"] == pytest.approx(1)


# ---- the update, on a model with pictures

UPDATE = dict(problems=8, samples=2, prompt_tokens=20)


@pytest.fixture(scope="module")
def batch(mini):
    """8 problems, 2 samples each, half with a picture; responses of 1 to 9 tokens."""
    tokenizer = data.load_tokenizer(mini.model)
    settings, rng = data.load_image_settings(mini.model), random.Random(0)
    rollouts = []
    for index, problem in enumerate(data.read_problems(mini.train)[:8]):
        prompt = data.encode_prompt(problem, tokenizer, settings)
        for i in range(2):
            ids = [rng.randrange(8, 100) for _ in range(rng.randint(1, 9))]
            rollouts.append(Rollout(problem, i, prompt, index, ids, [-4.0] * len(ids), True))
    return rollouts, [torch.randn(len(r.response_ids), generator=seeded(7)) for r in rollouts]


def update(mini, batch, pack_tokens: int) -> tuple:
    """One critic pass and one policy step -> both models, metrics, parts."""
    rollouts, advantages = batch
    cfg = config(**UPDATE, pack_tokens=pack_tokens)
    policy = learner(load_model(mini.model), 0.02)
    critic = learner(load_model(mini.model, head="value"), 0.02, steps=4)
    nn.init.normal_(critic.model.value_head.weight, std=0.1, generator=seeded(0))
    parts, critic.norm = packed(rollouts, cfg), "critic_grad_norm"
    rl.critic_values(critic, sum(parts, []))
    put_column(parts, "advantages", advantages)
    goals = [torch.full((len(r.response_ids),), float(r.problem.answer) / 5) for r in rollouts]
    put_column(parts, "returns", goals)
    metrics = rl.train(critic, parts, rl.critic_losses, 0)
    metrics |= rl.train(policy, parts, partial(rl.policy_losses, cfg=cfg), 0)
    return policy.model, critic.model, metrics, parts


@pytest.fixture(scope="module")
def reference(mini, batch):
    """One pack a part, each document with a prompt of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rl, "CLIP_NORM", 1e9)
        patch.setattr(packs, "make_pack", lambda *a, share_prompts, f=packs.make_pack: f(*a))
        return update(mini, batch, 4096)


class Waits(TorchDispatchMode):
    """Counts what a host waits for: numbers read from a device, sizes that follow values."""

    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += any(n in str(operator) for n in ("_local_scalar_dense", "nonzero", "unique"))
        return operator(*args, **(kwargs or {}))


def test_the_update_does_not_depend_on_the_micro_batches_nor_on_shared_prompts(
    mini, batch, reference, unclipped
):
    """Nor does it wait for the device more often where there are many."""
    *_, reference_metrics, reference_parts = reference
    assert not any(pack.expand is not None for pack in sum(reference_parts, []))
    before, waited = dict(load_model(mini.model).named_parameters()), set()
    for pack_tokens, count in ((36, 16), (100, 4), (4096, 1)):
        with Waits() as waits:
            *models, metrics, parts = update(mini, batch, pack_tokens)
        waited.add(waits.count)
        assert sum(map(len, parts)) >= count
        shared = any(pack.expand is not None for pack in sum(parts, []))
        assert shared or pack_tokens == 36  # which holds one document
        for model, other in zip(models, reference, strict=False):
            theirs = dict(other.named_parameters())
            for name, weight in model.named_parameters():
                assert name == "value_head.weight" or not torch.equal(weight, before[name]), name
                torch.testing.assert_close(weight, theirs[name], atol=1e-6, rtol=1e-4)
        mean = torch.cat(batch[1]).mean().item()
        assert metrics["policy_loss"] == pytest.approx(-mean, abs=1e-6)
        for name in ("policy_loss", "grad_norm", "value_loss", "critic_grad_norm", "entropy"):
            assert metrics[name] == pytest.approx(reference_metrics[name], rel=1e-5), name
        mine, theirs = by_document(parts, "values"), by_document(reference_parts, "values")
        assert mine.keys() == theirs.keys() == set(range(16))
        for i in mine:
            torch.testing.assert_close(mine[i], theirs[i], atol=1e-5, rtol=0)
    assert len(waited) == 1 and waited != {0}


def test_what_rows_ask_to_watch_is_counted_by_group_whichever_ranks_have_them(monkeypatch):
    def rollout(group, text, reward):
        extra = {"group": group, "watch": {"check": r"\bcheck\b"}} if group else {}
        problem, verdict = data.Problem("p", "?", "!", extra=extra), Verdict(reward, "match", "!")
        return Rollout(problem, 0, None, text=text, verdict=verdict, reward=reward)

    mine = [rollout("a", "let me check", 1.0), rollout("", "check", 0.0)]
    others = [rollout("a", "checked", 0.0), rollout("b", "", 1.0)]
    alone = rl.describe(mine + others, ALONE)
    shown = {name: alone[name] for name in alone if name.endswith(("/a", "/b"))}
    assert shown == {"reward/a": 0.5, "check/a": 0.5, "reward/b": 1.0, "check/b": 0.0}
    sent = []
    monkeypatch.setattr(distributed, "everyone", lambda pairs: sent.append(pairs) or [*sent])
    rl.describe(mine, ALONE)
    assert rl.describe(others, ALONE) == alone  # of both ranks


def test_a_loss_that_is_not_finite_names_its_rollouts_and_changes_no_weight(mini, batch):
    rollouts, cfg = batch[0], config(**UPDATE, pack_tokens=60)
    policy, before, parts = load_model(mini.model), load_model(mini.model), packed(rollouts, cfg)
    advantages = [a.clone() for a in batch[1]]
    advantages[5][0] = math.nan
    put_column(parts, "advantages", advantages)
    with pytest.raises(FloatingPointError, match="step 9: .*loss.*in packs of") as error:
        rl.train(learner(policy, 1.0), parts, partial(rl.policy_losses, cfg=cfg), 9)
    (pack,) = [p for p in sum(parts, []) if 5 in p.members]
    names = str(error.value).split("in packs of ")[1].split(";")[0]
    assert names == ", ".join(sorted(rollouts[i].name for i in pack.members))
    assert all(torch.equal(*w) for w in zip(policy.parameters(), before.parameters(), strict=True))


def test_a_reward_of_ones_own_that_fails_names_the_row(monkeypatch):
    monkeypatch.setattr(rl, "reward_of", lambda r: r.problem.extra["price"])
    problem = data.Problem("p", "?", "1", place="own.jsonl, line 3")
    with pytest.raises(RuntimeError, match="own.jsonl, line 3: reward_of .*KeyError.*price"):
        rl.give_rewards([Rollout(problem, 0, None, text="\\boxed{1}")])


def test_a_gap_between_sampler_and_trainer_above_the_limit_stops_the_run():
    for gap in (float("nan"), float("inf"), 2e-3):
        with pytest.raises(RuntimeError, match="step 7.*more than 0.001.*GAP_LIMITS.*--tis"):
            rl.refuse_gap(gap, ALONE, "step 7")
    rl.refuse_gap(1e-4, ALONE, "step 7")


# ---- whole runs


def run(cfg: rl.Config) -> Path:
    rl.main(cfg)
    return Path(cfg.out)


@pytest.fixture
def cfg(mini, tmp_path) -> rl.Config:
    return config(model=mini.model, data=mini.train, out=str(tmp_path / "run"))


def cut_off(cfg: rl.Config, how: str, at: int):
    """Ctrl-C in step `at`; or the machine dies in it, when it has learnt and not yet saved."""
    trace_rows = batches.trace_rows

    def interrupted(step, *rest):
        if step == at and how == "killed":
            raise RuntimeError("killed")
        if step == at:
            signal.raise_signal(signal.SIGINT)
        return trace_rows(step, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "trace_rows", interrupted)
        with pytest.raises(RuntimeError, match="killed") if how == "killed" else nullcontext():
            rl.main(cfg)


def note(patch, calls: list, where, name: str):
    """Puts into `calls` the name of what is called there, and the step for which it samples."""
    function = getattr(where, name)

    def call(*rest, **more):
        calls.append((name, *more.get("seed", (0,))[1:]))  # the canary has no step
        return function(*rest, **more)

    patch.setattr(where, name, call)


@pytest.fixture(scope="module")
def uninterrupted(mini, tmp_path_factory):
    out = tmp_path_factory.mktemp("rl") / "whole"
    return run(config(model=mini.model, data=mini.train, out=str(out)))


def test_a_run_logs_what_it_did_and_the_sampler_agrees_with_the_trainer(mini, uninterrupted):
    rows = metrics_of(uninterrupted)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert [row["length_budget"] for row in rows] == [8, 8, 12, 12]
    for row in rows:
        # a sampler that missed one update of this size would be off by 1e-3
        assert row["logp_diff"] < 1e-5 and abs(row["sampler_kl"]) < 1e-6
        assert row["ratio_diff"] == 0 and row["clip_fraction"] == 0
        assert abs(row["policy_loss"]) < 1e-6  # minus the mean of normalised advantages
        assert row["return_mean"] <= 1 and row["grad_norm"] > 0 and row["entropy"] > 0
    values, returns = [[row[name] for row in rows] for name in ("value_mean", "return_mean")]
    assert values[1] - values[0] > 0.05 and returns[0] > values[0]  # the critic learns: up ...
    assert values[2] - values[1] < -0.05 and returns[1] < values[1]  # ... and down with returns
    assert len({row["reward"] for row in rows}) > 1 and max(row["truncated"] for row in rows) > 0
    assert [row["lr"] for row in rows] == [5e-4, 1e-3, 1e-3, 1e-3]
    before, after = load_file(Path(mini.model) / "model.safetensors"), weights_of(uninterrupted)
    for name, weight in after.items():
        assert torch.equal(weight, before[name]) == name.startswith("visual."), name
    lines = lines_of(uninterrupted, "rollouts")
    assert len(lines) == 4 * 16 and all(r["reward"] == 0 for r in lines if not r["stopped"])
    for row in rows:
        mine = [r["reward"] for r in lines if r["step"] == row["step"]]
        assert row["reward"] == pytest.approx(sum(mine) / 16)


def test_the_trace_of_a_run_has_the_numbers_of_its_tokens_and_reads_as_six_steps(
    uninterrupted, tmp_path
):
    rows = lines_of(uninterrupted, "trace")
    assert {row["step"] for row in rows} == {0, 1, 2, 3}
    for row in rows:
        columns = [row[name] for name in ("tokens", "logps", "values", "advantages")]
        assert {len(column) for column in columns} == {row["length"]}
    screen = trace.page(batches.read_trace(uninterrupted, -1))
    for step in ("1 sample", "2 reward", "3 pack", "4 advantages", "5 update", "6 sync"):
        assert step in screen
    with pytest.raises(ValueError, match="step 9 is not there; there are 0 to 3"):
        batches.read_trace(uninterrupted, 9)
    (tmp_path / "trace.jsonl").touch()
    with pytest.raises(ValueError, match="there are none"):
        batches.read_trace(tmp_path, -1)


def test_a_step_to_show_is_the_last_in_which_samples_differ(tmp_path):
    def read(*steps):
        rows = [{"step": k, "reward": r} for k, rewards in enumerate(steps) for r in rewards]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "trace.jsonl").write_text(lines)
        return {row["step"] for row in batches.read_trace(tmp_path, -1)}

    assert read([0, 1], [1, 0], [1, 1], [0, 0]) == {1}
    assert read([0, 0], [1, 1]) == {1}


def test_a_response_that_was_cut_is_wrong_even_if_it_was_right_so_far(cfg, monkeypatch):
    monkeypatch.setattr(rl, "grade", lambda *a, **k: Verdict(1.0, "match", "7"))
    out = run(replace(cfg, steps=1))
    assert {r["reward"]: r["stopped"] for r in lines_of(out, "rollouts")} == {1: True, 0: False}
    (row,) = metrics_of(out)
    assert row["reward"] == pytest.approx(1 - row["truncated"])


@pytest.mark.parametrize("how, at, save_every", [("ctrl-c", 1, 0), ("killed", 3, 2)])
def test_a_run_that_was_cut_off_goes_on_bit_for_bit_and_samples_nothing_twice(
    cfg, uninterrupted, monkeypatch, capsys, how, at, save_every
):
    """The sampler rests before the update also where rollouts were read: a sync has woken it."""
    cfg = replace(cfg, save_every=save_every)
    cut_off(cfg, how, at)
    assert ("to resume" in capsys.readouterr().out) == (how == "ctrl-c")
    assert [f.name for f in Path(cfg.out, "checkpoints").iterdir()] == ["step_000002"]
    assert not Path(cfg.out, "model").exists()
    torch.manual_seed(12345)  # nothing may hang on the global state of a process
    calls, of_sampler = [], ((Sampler, "generate"), (TorchSampler, "rest"), (TorchSampler, "sync"))
    for where, name in (*of_sampler, (rl, "critic_values")):
        note(monkeypatch, calls, where, name)
    resumed = run(cfg)
    step = [("rest",), ("critic_values",), ("sync",), ("generate",)]  # the last for the canary
    sampled = [[("generate", k)] if how == "ctrl-c" else [] for k in (2, 3)]  # read, if killed
    assert calls == [("rest",), *step[2:], *sampled[0], *step, *sampled[1], *step]
    same_run(resumed, uninterrupted, ("rollouts", "trace", "lengths"))


def test_neither_the_rehearsal_nor_the_order_of_problems_changes_a_number_of_the_run(
    cfg, uninterrupted, monkeypatch
):
    """12 problems, 4 a step: those of step 3 were seen before, and come by their lengths."""
    orders, longest_first = [], batches.longest_first

    def as_they_come(*given):
        orders.append(longest_first(*given))
        return [*given[0]]

    monkeypatch.setattr(distributed, "rehearse", lambda *given: None)
    monkeypatch.setattr(batches, "longest_first", as_they_come)
    same_run(run(cfg), uninterrupted)
    assert orders[:3] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert orders[3] != sorted(orders[3]) == [12, 13, 14, 15]


TAIL = dict(steps=6, problems=8, samples=3, finish_share=0.5, lengths=((0, 8), (3, 12)))
# rates at which a policy moves so far in a step that the clip has to act
TAIL |= dict(lr=2e-3, sampler_batch=12, save_every=2)


@pytest.fixture(scope="module")
def tailed(mini, tmp_path_factory):
    """A run that puts unfinished responses aside, with what is recorded of each step."""
    out = tmp_path_factory.mktemp("tail") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "complete_steps", lambda run: [])  # no record is deleted
        return run(config(model=mini.model, data=mini.train, out=str(out), **TAIL))


def account(run: Path, mini, cfg: rl.Config):
    """Of a run that put responses aside and kept all records: nothing is lost or doubled, what goes
    on does so from its tokens, none is graded half-way, and the metrics are of what has ended.
    """
    tools = data.load_tokenizer(mini.model), data.load_image_settings(mini.model)
    stream, ended, going_on = data.Stream(data.read_problems(mini.train), 0), Counter(), {}
    for row in metrics_of(run):
        places = range(row["step"] * cfg.problems, (row["step"] + 1) * cfg.problems)
        rollouts = batches.load_rollouts(batches.record_of(run, row["step"]), stream, *tools)
        by_key = {(r.index, r.sample): r for r in rollouts}
        new = {*itertools.product(places, range(cfg.samples))}
        assert by_key.keys() == new | going_on.keys() and len(rollouts) == len(by_key)
        for key, r in by_key.items():
            before = going_on.get(key)
            assert r.stale == (len(before.response_ids) if before else 0)
            assert not before or r.response_ids[: r.stale] == before.response_ids
            assert not before or r.logps[: r.stale] == before.logps
        going_on = {key: r for key, r in by_key.items() if r.unfinished}
        assert all(r.verdict is None and not r.stopped for r in going_on.values())
        done = [r for r in rollouts if not r.unfinished]
        for r in done:
            assert r.verdict and r.stale < len(r.response_ids)
            assert r.stopped or len(r.response_ids) == row["length_budget"]
        ended.update((r.index, r.sample) for r in done)
        tokens = sum(len(r.response_ids) for r in done)
        assert row["tokens"] == tokens and row["unfinished"] == len(going_on)
        assert row["stale_tokens"] == pytest.approx(sum(r.stale for r in done) / tokens)
        assert row["reward"] == pytest.approx(sum(r.reward for r in done) / len(done))
        assert row["logp_diff"] < 1e-5
    every = itertools.product(range(cfg.steps * cfg.problems), range(cfg.samples))
    assert ended == Counter(dict.fromkeys(every, 1)) and not going_on


def test_with_a_finish_share_nothing_is_lost_doubled_or_graded_half_way(mini, tailed):
    account(tailed, mini, config(**TAIL))
    rows = metrics_of(tailed)
    assert min(row["unfinished"] for row in rows[:-1]) > 0
    assert max(row["stale_tokens"] for row in rows) > 0.1
    assert max(row["clip_fraction"] for row in rows) > 0 == rows[0]["ratio_diff"]


@pytest.mark.parametrize("how, at", [("ctrl-c", 1), ("killed", 3)])
def test_responses_that_were_put_aside_go_on_bit_for_bit_where_a_run_is_resumed(
    cfg, tailed, how, at
):
    """Killed in step 3, whose record and that of the step before the checkpoint are read."""
    cfg = replace(cfg, **TAIL)
    cut_off(cfg, how, at)
    same_run(run(cfg), tailed, ("rollouts", "trace", "lengths"))


def test_what_was_put_aside_goes_on_also_with_another_setting(cfg, tailed):
    """The steps behind the checkpoint are sampled anew then, and nothing before them is lost."""
    cfg = replace(cfg, **TAIL)
    cut_off(cfg, "killed", 3)
    rows = metrics_of(run(replace(cfg, finish_share=1.0)))
    before = [row["unfinished"] for row in metrics_of(tailed)]
    assert [row["unfinished"] for row in rows] == [*before[:2], 0, 0, 0, 0]
    sizes = [round(row["tokens"] / row["length"]) for row in rows]
    assert sizes == [24 - before[0], 24 + before[0] - before[1], 24 + before[1], 24, 24, 24]


def test_models_wait_in_host_memory_from_the_start_and_a_full_pack_is_tried_before_the_first_batch(
    cfg, monkeypatch
):
    """Two models beside the waking engine took 81.5 GB of 80 when a run was resumed."""
    calls, moments, move, rehearse = [], [], distributed.move, distributed.rehearse
    for where, name in ((distributed, "load"), (Sampler, "generate"), (TorchSampler, "sync")):
        note(monkeypatch, calls, where, name)

    def moved(model, optimizer, device, for_moments=None):
        there = "whole" if for_moments is None else "weights"
        kind = "policy" if model.value_head is None else "critic"
        calls.append((kind, "in host memory" if device == "cpu" else there))
        moments.append(len(optimizer.state) > 0)
        move(model, optimizer, device, for_moments)

    def tried(model, optimizer, pack, *more):
        calls.append(("rehearse", len(pack.ids)))
        rehearse(model, optimizer, pack, *more)

    monkeypatch.setattr(distributed, "move", moved)
    monkeypatch.setattr(distributed, "rehearse", tried)
    cfg, start = replace(cfg, save_every=1, offload=True), []
    for name in ("policy", "critic"):
        start += [("load",), (name, "in host memory")]
    for name in ("policy", "critic"):
        start += [(name, "whole"), ("rehearse", 128), (name, "in host memory")]
    sync = [("policy", "weights"), ("sync",), ("generate",), ("policy", "in host memory")]
    update = [("critic", "whole"), ("critic", "in host memory"), ("policy", "whole")]
    run(replace(cfg, steps=1))
    steps = [("generate", 0), *update, *sync, ("policy", "whole")]
    assert calls == [*start, *sync, *steps] and not moments[0]
    calls.clear()
    shutil.rmtree(Path(cfg.out, "model"))
    run(replace(cfg, steps=2))  # a resume, with moments
    assert calls[: len(start + sync) + 1] == [*start, *sync, ("generate", 1)] and moments[-1]


def test_evaluation_on_the_way_is_eval_pys_and_changes_no_number_of_the_run(
    mini, cfg, uninterrupted, tmp_path
):
    watched = run(replace(cfg, eval_data=mini.test, eval_every=3))
    rows, names = metrics_of(watched), ("eval_image", "eval_text")
    assert [[name in row for name in names] for row in rows] == [[False] * 2] * 2 + [[True] * 2] * 2
    others = [{k: v for k, v in row.items() if k not in names} for row in rows]
    assert others == metrics_of(uninterrupted)
    one, other = weights_of(watched), weights_of(uninterrupted)
    assert all(torch.equal(one[name], other[name]) for name in other)
    how = dict(data=mini.test, sampler="torch", max_tokens=12, out=str(tmp_path / "eval"))
    eval.main(eval.Config(model=str(watched / "model"), **how))
    pictured = {row["id"] for row in map(json.loads, Path(mini.test).open()) if row["images"]}
    scores = {name: [] for name in names}
    for row in lines_of(tmp_path / "eval", "graded"):
        scores[names[row["id"] not in pictured]].append(row["score"])
    for name in names:
        assert rows[-1][name] == pytest.approx(sum(scores[name]) / len(scores[name]))


def test_a_run_that_was_stopped_in_its_last_step_keeps_its_checkpoints_and_writes_its_model_later(
    mini, cfg
):
    """On text alone. Of states the two newest are kept, and of rollouts what a resume may read."""
    cfg, out = replace(cfg, data=mini.text, steps=3, save_every=1, samples=2), Path(cfg.out)
    cut_off(cfg, "ctrl-c", 2)
    assert not (out / "model").exists()
    rl.main(cfg)
    folders = sorted((out / "checkpoints").iterdir())
    assert [f.name for f in folders] == ["step_000001", "step_000002", "step_000003"]
    assert [(f / "state").exists() for f in folders] == [False, True, True]
    last = load_file(folders[-1] / "model/model.safetensors")
    assert all(torch.equal(weight, last[name]) for name, weight in weights_of(out).items())
    kept = sorted(f.name for f in (out / "rollouts").iterdir())
    assert kept == ["step_000000.npz", "step_000001.npz", "step_000002.npz"]  # 0: what goes on
    assert all("reward_text" in r and "reward_image" not in r for r in metrics_of(out))
    with pytest.raises(FileExistsError, match="finished run"):
        rl.main(cfg)


def test_several_policy_steps_move_the_ratio_and_are_warmed_up_one_by_one(cfg):
    (row,) = metrics_of(run(replace(cfg, steps=1, warmup=4, policy_steps=2, lr=1e-2)))
    assert row["ratio_diff"] > 1e-3 and row["lr"] == 5e-3
    assert row["logp_diff"] < 1e-5  # old log-probs against the sampler's


def test_grpo_gives_each_token_its_groups_advantage(batch):
    rewards = [1, 0, 0, 0, 1, 1, 0, 1, 1, 0, 0, 1, 0, 0, 1, 1]
    rollouts = [replace(r, reward=x) for r, x in zip(batch[0], rewards, strict=True)]
    parts = packed(rollouts, config(**UPDATE, pack_tokens=64, algorithm="grpo"))
    assert len(parts) == 1
    parts[0].append(packs.rollout_pack([], []))
    assert rl.compare_samples(rollouts, parts[0], samples=2) == {"no_contrast": 4}
    wanted = rl.group_advantages(torch.tensor(rewards).view(8, 2).float()).flatten().tolist()
    for i, advantages in by_document(parts, "advantages").items():
        assert advantages.tolist() == [wanted[i]] * len(rollouts[i].response_ids)


def group(index: int, *rewards: int) -> list[Rollout]:
    """Samples of one problem that have these scores."""
    problem, texts = data.Problem(f"p{index}", "?", "1"), ("\\boxed{0}", "\\boxed{1}")
    own = dict(stopped=True, index=index)
    some = [Rollout(problem, n, None, text=texts[r], **own) for n, r in enumerate(rewards)]
    rl.give_rewards(some)
    return some


def test_groups_without_contrast_give_way_to_other_problems_round_by_round():
    """By hand: of four groups two; of the two that take over one, which the second round replaces;
    what has no contrast after that stays."""
    cfg, calls = config(algorithm="grpo", samples=2, resample=2), []
    batch = group(12, 0, 0) + group(13, 1, 0) + group(14, 1, 1) + group(15, 0, 1)  # of step 3
    rounds = {1: group(-25, 1, 1) + group(-27, 0, 1), 2: group(-29, 0, 0)}

    def others(round, slots):
        calls.append((round, slots))
        return rounds[round]

    every = rl.resample(batch, cfg, others)
    assert calls == [(1, [0, 2]), (2, [0])] and len(every) == 14
    assert batches.newest_problems(every, 4) == {-29: 0, 13: 1, -27: 2, 15: 3}
    assert rl.resample(batch[2:4], cfg, others) == batch[2:4] and len(calls) == 2


def test_a_run_of_grpo_needs_no_critic_and_resamples_and_goes_on_bit_for_bit(cfg, monkeypatch):
    cfg = replace(cfg, algorithm="grpo", steps=2, save_every=1)
    plain = metrics_of(run(replace(cfg, out=f"{cfg.out}/plain")))
    assert plain[0]["grad_norm"] > 0
    assert not {"value_loss", "explained_variance", "critic_grad_norm"} & plain[0].keys()
    assert "4 advantages" in trace.page(batches.read_trace(Path(cfg.out) / "plain", -1))
    cfg = replace(cfg, resample=2)
    whole = run(replace(cfg, out=f"{cfg.out}/whole"))
    rows, sampled = metrics_of(whole), lines_of(whole, "rollouts")
    assert rows[0]["reward"] == plain[0]["reward"]  # of the problems before any gave way
    assert rows[0]["resampled"] > 0 and rows[0]["grad_norm"] != plain[0]["grad_norm"]
    for row in rows:
        rewards = [r["reward"] for r in sampled if r["step"] == row["step"]]
        groups = [{*rewards[i : i + 4]} for i in range(0, 16, 4)]
        assert sum(len(group) == 1 for group in groups) == row["no_contrast"]
    cut, calls = replace(cfg, out=f"{cfg.out}/cut"), []
    cut_off(cut, "killed", 1)
    note(monkeypatch, calls, Sampler, "generate")
    same_run(run(cut), whole, ("rollouts",))
    assert not [call for call in calls if len(call) > 1]  # all is recorded


def test_problems_that_cannot_be_trained_on_are_left_out_with_a_count_or_refused(
    mini, cfg, tmp_path, monkeypatch, capsys
):
    """Each rank reads a share: the id that the other has read comes by the union."""
    tools = data.load_tokenizer(mini.model), data.load_image_settings(mini.model)
    words = rl.load_problems(mini.train, replace(cfg, prompt_tokens=26), ALONE, *tools)
    assert "6 problems left out: prompts over 26 tokens" in capsys.readouterr().out
    assert len(words) == 6 and not any(p.images for p in words)  # which take more tokens
    with pytest.raises(ValueError, match="12 problems left out: .* 3 tokens, and none is left"):
        rl.load_problems(mini.train, replace(cfg, prompt_tokens=3), ALONE, *tools)
    file, rows = tmp_path / "rows.jsonl", Path(mini.text).read_text().splitlines()[:2]
    file.write_text("".join(json.dumps(json.loads(row) | {"id": "twin"}) + "\n" for row in rows))
    monkeypatch.setattr(distributed, "union", lambda world, own: own | {1: (5, "twin")})
    with pytest.raises(ValueError, match="rows 1 and 2 have the id 'twin'"):
        rl.load_problems(str(file), cfg, World(0, 2, torch.device("cpu")), *tools)


@pytest.mark.parametrize("train_vision", [False, True])
def test_policy_and_critic_start_alike_and_the_tower_is_frozen_unless_asked(mini, train_vision):
    learners = rl.load_models(config(train_vision=train_vision), mini.model, ALONE)
    policy, critic = learners["policy"].model, learners["critic"].model
    own = dict(policy.named_parameters())
    for name, weight in critic.named_parameters():
        assert name == "value_head.weight" or torch.equal(weight, own[name]), name
        assert weight.requires_grad == (train_vision or not name.startswith("visual."))
    assert critic.value_head.weight.std() < 0.02
