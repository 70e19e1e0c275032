"""rl.py: pieces by hand, the gradient against an enumerated MDP, runs against themselves."""

import itertools
import json
import math
import random
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import rl
from common import data, packs
from common.distributed import World
from model import load_model
from reward import Verdict
from rollout import Rollout, TorchSampler
from tools import trace

ALONE = World(0, 1, torch.device("cpu"))


def packed(rollouts: list, cfg: rl.Config) -> list:
    """The parts of a batch in one process, each a list of packs."""
    lengths = [len(r.document) for r in rollouts]
    return packs.share_packs(rollouts, lengths, cfg, float, None, ALONE)


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


def config(**changed) -> rl.Config:
    small = dict(steps=4, problems=4, samples=4, lengths=((0, 8), (2, 12)), lr=1e-3)
    small |= dict(pack_tokens=128, prompt_tokens=64, save_every=100, warmup=2)
    return rl.Config(**small | changed)


def metrics_of(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    machine = ("seconds", "peak_gb")
    return [{k: v for k, v in row.items() if not k.startswith(machine)} for row in rows]


def weights_of(run: Path) -> dict:
    return load_file(run / "model/model.safetensors")


# ---- the pieces, by hand


def naive_gae(rewards, values, gamma, lam):
    """The double sum of eq. 16: A_t = sum_l (gamma lam)^l delta_{t+l}."""
    after = [*values[1:], 0.0]
    deltas = [r + gamma * w - v for r, w, v in zip(rewards, after, values, strict=True)]
    return [
        sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas)))
        for t in range(len(deltas))
    ]


def test_gae_by_hand():
    rewards, values = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.5, 0.25, 0.75])
    # deltas at gamma 0.5: 0.125 - 0.5 = -0.375, 0.375 - 0.25 = 0.125, 1 - 0.75 = 0.25
    advantages, targets = rl.gae(rewards, values, [3], gamma=0.5, lam=0.5)
    assert advantages.tolist() == [-0.375 + 0.25 * 0.125 + 0.0625 * 0.25, 0.125 + 0.0625, 0.25]
    assert targets.tolist() == (advantages + values).tolist()


@given(
    st.lists(st.tuples(st.floats(-2, 2), st.floats(-2, 2)), min_size=1, max_size=12),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_gae_is_the_double_sum_of_its_definition(steps, gamma, lam):
    rewards, values = (torch.tensor(x, dtype=torch.float64) for x in zip(*steps, strict=True))
    n = len(steps)
    twice = (torch.cat([x, x.flip(0), x[:0]]) for x in (rewards, values))  # back to back
    advantages, targets = rl.gae(*twice, [n, n, 0], gamma, lam)
    r, v = rewards.tolist(), values.tolist()
    naive = naive_gae(r, v, gamma, lam) + naive_gae(r[::-1], v[::-1], gamma, lam)
    assert advantages.dtype == targets.dtype == torch.float64
    torch.testing.assert_close(advantages.tolist(), naive, atol=1e-12, rtol=0)


def test_with_gamma_and_lambda_1_a_token_gets_r_minus_v_and_the_critic_learns_r_everywhere():
    values = torch.rand(50, dtype=torch.float64)
    rewards = torch.zeros(50, dtype=torch.float64)
    rewards[-1] = 1.0
    advantages, targets = rl.gae(rewards, values, [50], 1.0, 1.0)
    torch.testing.assert_close(advantages, 1 - values, atol=1e-14, rtol=0)
    torch.testing.assert_close(targets, torch.ones_like(values), atol=1e-14, rtol=0)


def test_group_advantages_by_hand():
    got = rl.group_advantages(torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]))
    a, b = math.sqrt(3), 1 / math.sqrt(3)
    wanted = torch.tensor([[a, -b, -b, -b], [1, 1, -1, -1], [b, b, b, -a]])
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("score", [0.0, 1.0, 0.1, 1 / 3])
@pytest.mark.parametrize("tries", [2, 7, 16])
def test_a_group_without_contrast_teaches_nothing(score, tries):
    assert rl.group_advantages(torch.full((3, tries), score)).tolist() == [[0.0] * tries] * 3


def test_the_order_within_a_group_and_of_the_groups_does_not_matter():
    rewards = (torch.rand(5, 8, generator=torch.Generator().manual_seed(0)) < 0.4).float()
    tries, groups = torch.randperm(8), torch.randperm(5)
    shuffled = rl.group_advantages(rewards[groups][:, tries])
    torch.testing.assert_close(shuffled, rl.group_advantages(rewards)[groups][:, tries])


@pytest.mark.parametrize(
    "ratio, advantage, loss, slope",
    [  # slope: d loss / d logp; epsilon = 0.2
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),  # inside
        (1.5, 2.0, -2.4, 0.0),  # good and already likelier: held back
        (0.5, 2.0, -1.0, -1.0),  # good and less likely: free to return
        (0.5, -2.0, 1.6, 0.0),  # bad and already less likely: held back
        (1.5, -2.0, 3.0, 3.0),  # bad and likelier: free to return
        (0.9, -2.0, 1.8, 1.8),
    ],
)
def test_the_clip_by_hand(ratio, advantage, loss, slope):
    logp = torch.tensor([math.log(ratio) - 3.0], dtype=torch.float64, requires_grad=True)
    old, a = torch.tensor([-3.0]).double(), torch.tensor([advantage]).double()
    got = rl.policy_loss(logp, old, a, 0.2)
    got.sum().backward()
    assert got.item() == pytest.approx(loss) and logp.grad.item() == pytest.approx(slope)


def test_on_policy_the_loss_is_minus_the_mean_advantage_and_epsilon_is_inert():
    logps = torch.randn(100).sub(2).requires_grad_()
    advantages, gradients = torch.randn(100), []
    for epsilon in (0.2, 0.01, 0.0):
        loss = rl.policy_loss(logps, logps.detach(), advantages, epsilon).mean()
        assert loss.item() == pytest.approx(-advantages.mean().item(), abs=1e-6)
        gradients.append(torch.autograd.grad(loss, logps)[0])
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])
    torch.testing.assert_close(gradients[0], -advantages / 100)


def test_value_loss_is_half_the_squared_error_unclipped():
    got = rl.value_loss(torch.tensor([0.0, 3.0, -1.0]), torch.tensor([1.0, 1.0, 0.0]))
    assert got.tolist() == [0.5, 2.0, 0.5]


def test_the_length_budget_rises_at_the_papers_steps():
    lengths = ((0, 24), (300, 32), (700, 48))
    assert [rl.length_budget(s, lengths) for s in (0, 299, 300, 699, 700, 10**6)] == [
        24,
        24,
        32,
        32,
        48,
        48,
    ]


def test_warm_up_counts_optimiser_steps():
    assert sum((rl.rates(step, 1, 8.0, 4) for step in range(6)), []) == [2, 4, 6, 8, 8, 8]
    assert rl.rates(0, 2, 8.0, 4) + rl.rates(1, 2, 8.0, 4) == [2, 4, 6, 8]
    assert rl.rates(0, 1, 8.0, 0) == [8]
    # The paper's 50: four critic steps an iteration reach the full rate within 13 iterations.
    assert rl.rates(12, 4, 1.0, 50)[1] == 1 and rl.rates(12, 1, 1.0, 50) == [0.26]


def pack_with(**columns) -> packs.Pack:
    """A pack that has nothing but numbers of its trained tokens."""
    return replace(packs.filler_pack(), **{n: torch.as_tensor(x) for n, x in columns.items()})


def test_advantages_are_normalised_over_tokens_so_that_short_right_answers_weigh_more():
    right, wrong = torch.ones(2000), torch.zeros(16000)
    some = [pack_with(advantages=x) for x in (right[:1500], torch.cat([right[1500:], wrong]))]
    rl.normalise([*some, pack_with(advantages=right[:0])], ALONE)
    assert some[0].advantages[0].item() == pytest.approx(2.828, abs=1e-3)
    assert some[1].advantages[-1].item() == pytest.approx(-0.354, abs=1e-3)
    flat = torch.cat([p.advantages for p in some]).double()
    assert abs(flat.mean()) < 1e-6 and abs(flat.std(correction=0) - 1) < 1e-6


def test_advantages_without_contrast_stay_0():
    some = [pack_with(advantages=torch.full((n,), 0.5)) for n in (5, 3)]
    rl.normalise(some, ALONE)
    assert all((p.advantages == 0).all() for p in some)


def test_critic_metrics_of_a_perfect_a_constant_and_an_offset_critic():
    returns, values = torch.tensor([1.0, 1, 0, 0, 0, 0]), torch.tensor([0.9, 0.6, 0.1, 0.3, 0, 0.2])

    def metrics(values):
        halves = [slice(0, 2), slice(2, 6)]
        return rl.critic_metrics(
            [pack_with(values=values[h], returns=returns[h]) for h in halves], ALONE
        )

    perfect = metrics(returns)
    assert perfect["explained_variance"] == 1
    assert perfect["value_mean"] == perfect["return_mean"] == pytest.approx(1 / 3)
    assert metrics(torch.full_like(returns, 0.7))["explained_variance"] == pytest.approx(0)
    naive = 1 - (returns - values).var(correction=0) / returns.var(correction=0)
    assert metrics(values)["explained_variance"] == pytest.approx(naive.item(), rel=1e-6)


@pytest.mark.parametrize(
    "wrong, named",
    [
        (dict(lengths=((1, 8), (2, 12))), "lengths"),
        (dict(lengths=((0, 8), (4, 12), (2, 16))), "lengths"),
        (dict(lengths=((0, 8), (0, 12))), "lengths"),
        (dict(lengths=()), "lengths"),
        (dict(pack_tokens=75), "pack-tokens"),
        (dict(algorithm="grpo", samples=1), "samples"),
        (dict(problems=3), "critic-steps 4.*--problems 3"),
        (dict(policy_steps=3), "policy-steps 3, --critic-steps 4"),
        (dict(steps=0), "steps"),
        (dict(save_every=-1), "save-every -1 is less than 0"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(wrong, named):
    with pytest.raises(ValueError, match=named):
        config(**wrong)


# ---- the oracle: an MDP small enough to enumerate (TRAPS: signs, shifts, aggregation at once)

TOKENS, HORIZON, STOP = 3, 3, 2


def sequences() -> list[tuple[int, ...]]:
    """All responses: up to 3 tokens, token 2 ends one early."""
    done, open_ = [], [()]
    for _ in range(HORIZON):
        grown = [s + (t,) for s in open_ for t in range(TOKENS)]
        done += [s for s in grown if s[-1] == STOP]
        open_ = [s for s in grown if s[-1] != STOP]
    return done + open_


SEQUENCES = sequences()
STATES = sorted({s[:t] for s in SEQUENCES for t in range(len(s))})
REWARD = dict(zip(SEQUENCES, [1.0, 0, 0, 1, 0, 0, 1, 1, 0, 0, 1, 0, 0.5, 0, 1], strict=True))


def table(numbers) -> torch.Tensor:
    return torch.tensor([*numbers], dtype=torch.float64)


def logp_of(theta, sequence):
    """(R,) log-probs of the sequence's tokens under the table theta (states, tokens)."""
    logps = theta.log_softmax(-1)
    return torch.stack([logps[STATES.index(sequence[:t]), a] for t, a in enumerate(sequence)])


def objective(theta):
    return sum(logp_of(theta, s).sum().exp() * REWARD[s] for s in SEQUENCES)


def exact_values(theta) -> dict:
    """V of every state: the mean reward of the sequences through it, weighted by probability."""
    mass = {s: logp_of(theta, s).sum().exp().item() for s in SEQUENCES}
    return {
        state: sum(m * REWARD[s] for s, m in mass.items() if s[: len(state)] == state)
        / sum(m for s, m in mass.items() if s[: len(state)] == state)
        for state in STATES
    }


def test_the_mdp_has_15_sequences_that_share_all_the_probability():
    theta = torch.randn(len(STATES), TOKENS, dtype=torch.float64)
    assert len(SEQUENCES) == 15 and len(STATES) == 7
    assert sum(logp_of(theta, s).sum().exp() for s in SEQUENCES).item() == pytest.approx(1)


@pytest.mark.parametrize("critic, lam", [("exact", 0), ("exact", 0.95), ("exact", 1), ("zero", 1)])
@pytest.mark.parametrize("seed", range(3))
def test_the_expected_gradient_of_the_loss_is_the_gradient_of_the_expected_reward(
    critic, lam, seed
):
    torch.manual_seed(seed)
    theta = torch.randn(len(STATES), TOKENS, dtype=torch.float64, requires_grad=True)
    (exact,) = torch.autograd.grad(objective(theta), theta)
    known, expected = exact_values(theta), torch.zeros_like(exact)
    for sequence in SEQUENCES:
        logps = logp_of(theta, sequence)
        rewards = torch.zeros(len(sequence), dtype=torch.float64)
        rewards[-1] = REWARD[sequence]
        values = table(known[sequence[:t]] for t in range(len(sequence)))
        if critic == "zero":
            values = torch.zeros_like(values)
        advantages, _ = rl.gae(rewards, values, [len(sequence)], 1.0, lam)
        loss = rl.policy_loss(logps, logps.detach(), advantages, 0.2).sum()
        (gradient,) = torch.autograd.grad(loss, theta)
        expected += logps.detach().sum().exp() * gradient
    assert exact.abs().max() > 0.01
    torch.testing.assert_close(expected, -exact, atol=1e-13, rtol=1e-12)


class TabularPolicy(nn.Module):
    """Stands in for the model: reads each document of a pack up to the row that predicts."""

    def __init__(self, theta):
        super().__init__()
        self.theta = nn.Parameter(theta)

    def states(self, pack):
        starts, ids, rows = [0, *itertools.accumulate(pack.lengths)], pack.ids, pack.rows
        if pack.expand is not None:  # a shared prompt's row: what follows it is the same in all
            places = pack.expand.tolist()
            ids, rows = ids[pack.expand], torch.tensor([places.index(r) for r in rows.tolist()])
        for row in rows.tolist():
            start = max(s for s in starts[:-1] if s <= row)
            yield tuple(ids[start + 2 : row + 1].tolist())  # two prompt tokens

    def logps(self, pack):
        logits = self.theta[[STATES.index(s) for s in self.states(pack)]]
        logps = logits.log_softmax(-1).gather(1, pack.targets[:, None]).squeeze(1)
        return logps, torch.zeros_like(logps)

    def values(self, pack):
        return self.theta[[STATES.index(s) for s in self.states(pack)]]


def drawn_by_a_uniform_policy() -> list[tuple[int, ...]]:
    """27 sequences, each as often as the uniform policy draws it."""
    drawn = [s for s in SEQUENCES for _ in range(TOKENS ** (HORIZON - len(s)))]
    assert len(drawn) == 27
    random.Random(0).shuffle(drawn)
    return drawn


def mdp_rollouts(drawn) -> list[Rollout]:
    prompt, problem = data.Prompt([9, 9], [9, 9], None, (), ()), data.Problem("mdp", "?", "!")
    rows = []
    for i, s in enumerate(drawn):
        r = Rollout(problem, 0, prompt, i, list(s), [-math.log(3)] * len(s), s[-1] == STOP)
        r.reward = REWARD[s]
        rows.append(r)
    return rows


@pytest.mark.parametrize("lam", [0, 0.95, 1])
@pytest.mark.parametrize("pack_tokens", [76, 5 * 9])
def test_values_gae_normalise_and_train_give_the_exact_gradient_of_a_batch(
    lam, pack_tokens, monkeypatch
):
    """27 rollouts hold every sequence exactly as often as a uniform policy draws it.

    So the batch gradient is the exact one, over the normaliser: tokens of the batch times the
    advantages' deviation. Their mean, which normalise() takes off, has no gradient in expectation.
    """
    monkeypatch.setattr(rl, "CLIP_NORM", 1e9)
    policy = TabularPolicy(torch.zeros(len(STATES), TOKENS, dtype=torch.float64))
    known = exact_values(policy.theta)
    critic = TabularPolicy(table(known[s] for s in STATES))
    (exact,) = torch.autograd.grad(objective(policy.theta), policy.theta)
    drawn = drawn_by_a_uniform_policy()
    cfg = config(samples=1, problems=27, lam=lam, lengths=((0, 4),), critic_steps=1)
    cfg = replace(cfg, prompt_tokens=2, pack_tokens=pack_tokens)
    parts = packed(mdp_rollouts(drawn), cfg)
    batch, naive = sum(parts, []), []
    rl.critic_values(critic, batch, ALONE)
    values = by_document(parts, "values")
    for i, sequence in enumerate(drawn):
        assert values[i].tolist() == [known[sequence[:t]] for t in range(len(sequence))]
        rewards = [0.0] * (len(sequence) - 1) + [REWARD[sequence]]
        naive += naive_gae(rewards, values[i].tolist(), 1.0, lam)
    for p in batch:
        p.advantages, p.returns = rl.gae(p.rewards, p.values, p.counts, rl.GAMMA, lam)
    rl.normalise(batch, ALONE)
    if lam == 1:
        for i, returns in by_document(parts, "returns").items():
            assert returns.tolist() == pytest.approx([REWARD[drawn[i]]] * len(drawn[i]))
    pair = policy, torch.optim.SGD(policy.parameters(), lr=0.0)
    losses_of = partial(rl.policy_losses, cfg=cfg)
    metrics = rl.train(pair, rl.split(parts, 1), [0.0], losses_of, 0, ALONE)
    tokens, deviation = sum(map(len, drawn)), table(naive).std(correction=0)
    wanted = -exact * 27 / tokens / deviation
    assert metrics["logp_diff_max"] < 1e-7
    torch.testing.assert_close(policy.theta.grad, wanted, atol=1e-7, rtol=0)  # std + 1e-8


def test_with_several_policy_steps_the_clip_acts_and_the_gradient_is_that_of_ppo(monkeypatch):
    """Two steps on two halves, against PPO's loss written out over the tables."""
    monkeypatch.setattr(rl, "CLIP_NORM", 1e9)
    drawn = drawn_by_a_uniform_policy()[:26]
    start = torch.randn(len(STATES), TOKENS, dtype=torch.float64, generator=seeded(3))
    policy = TabularPolicy(start.clone())
    cfg = config(samples=1, problems=26, policy_steps=2, critic_steps=2, lengths=((0, 4),))
    parts = packed(mdp_rollouts(drawn), cfg)
    advantages = [torch.randn(len(s), generator=seeded(i)).double() for i, s in enumerate(drawn)]
    put_column(parts, "advantages", advantages)
    rl.store_old_logps(policy, sum(parts, []), ALONE)
    pair = policy, torch.optim.SGD(policy.parameters(), lr=0.0)
    losses_of = partial(rl.policy_losses, cfg=cfg)
    metrics = rl.train(pair, rl.split(parts, 2), [9.0, 9.0], losses_of, 0, ALONE)

    theta = start.clone().requires_grad_()
    clipped, off = 0, 0.0
    for half in (range(13), range(13, 26)):
        loss, tokens = 0.0, sum(len(drawn[i]) for i in half)
        for i in half:
            ratio = (logp_of(theta, drawn[i]) - logp_of(start, drawn[i])).exp()
            a, bounded = advantages[i], ratio.clamp(0.8, 1.2)
            loss = loss - torch.min(ratio * a, bounded * a).sum() / tokens
            clipped += ((ratio - 1).abs() > 0.2).sum().item()
            off = max(off, (ratio - 1).abs().max().item())
        (gradient,) = torch.autograd.grad(loss, theta)
        theta = (theta - 9.0 * gradient).detach().requires_grad_()
    torch.testing.assert_close(policy.theta, theta, atol=1e-5, rtol=1e-5)
    assert metrics["ratio_max"] == pytest.approx(off, rel=1e-4) and off > 0.2
    total = sum(len(s) for s in drawn)
    assert metrics["clip_fraction"] == pytest.approx(clipped / total) and clipped > 0


# ---- the update, on a model with pictures


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def batch(mini):
    """8 problems, 2 samples each, half with a picture; responses of 1 to 9 tokens."""
    tokenizer = data.load_tokenizer(mini.model)
    settings, rng = data.load_image_settings(mini.model), random.Random(0)
    rollouts = []
    for index, problem in enumerate(data.read_problems(mini.train)[:8]):
        prompt = data.encode_prompt(problem.prompt, problem.images, tokenizer, settings)
        for i in range(2):
            ids = [rng.randrange(8, 100) for _ in range(rng.randint(1, 9))]
            rollouts.append(Rollout(problem, i, prompt, index, ids, [-4.0] * len(ids), True))
    return rollouts, [torch.randn(len(r.response_ids), generator=seeded(7)) for r in rollouts]


class CountingSGD(torch.optim.SGD):
    steps = 0

    def step(self, closure=None):
        self.steps += 1
        return super().step(closure)


UPDATE = dict(problems=8, samples=2, prompt_tokens=20)
PACKS = [(36, 16), (64, 6), (100, 4), (4096, 1)]  # tokens a pack, and at least so many packs


def update(mini, batch, pack_tokens: int, critic_steps: int = 4, order=None) -> tuple:
    """One critic pass and one policy step -> both models, both optimisers, metrics, parts."""
    rollouts, advantages = batch
    if order is not None:
        advantages = [advantages[i] for i in order]
        rollouts = [replace(rollouts[i], index=k // 2) for k, i in enumerate(order)]
    cfg = config(**UPDATE, pack_tokens=pack_tokens, critic_steps=critic_steps)
    torch.manual_seed(0)
    policy, critic = load_model(mini.model), load_model(mini.model, head="value")
    nn.init.normal_(critic.value_head.weight, std=0.1)
    slow, fast = (CountingSGD(m.parameters(), lr=1.0) for m in (policy, critic))
    parts = packed(rollouts, cfg)
    rl.critic_values(critic, sum(parts, []), ALONE)
    put_column(parts, "advantages", advantages)
    goals = [torch.full((len(r.response_ids),), float(r.problem.answer) / 5) for r in rollouts]
    put_column(parts, "returns", goals)
    lrs, losses_of = [0.05] * critic_steps, partial(rl.policy_losses, cfg=cfg)
    passes = rl.split(parts, critic_steps)
    metrics = rl.train((critic, fast), passes, lrs, rl.critic_losses, 0, ALONE)
    metrics["critic_grad_norm"] = metrics["grad_norm"]
    metrics |= rl.train((policy, slow), rl.split(parts, 1), [0.05], losses_of, 0, ALONE)
    return policy, critic, slow, fast, metrics, parts


@pytest.fixture(scope="module")
def reference(mini, batch):
    """One pack a part, each document with a prompt of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rl, "CLIP_NORM", 1e9)
        patch.setattr(packs, "make_pack", lambda *a, share_prompts, f=packs.make_pack: f(*a))
        return update(mini, batch, 4096)


@pytest.fixture
def unclipped(monkeypatch):
    monkeypatch.setattr(rl, "CLIP_NORM", 1e9)


def assert_same_weights(one, other, atol):
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("pack_tokens, count", PACKS)
def test_the_update_does_not_depend_on_the_micro_batches_nor_on_shared_prompts(
    mini, batch, reference, unclipped, pack_tokens, count
):
    policy, critic, _, _, metrics, parts = update(mini, batch, pack_tokens)
    assert sum(map(len, parts)) >= count
    shared = any(pack.expand is not None for pack in sum(parts, []))
    assert shared or pack_tokens == 36  # which holds one document
    assert not any(pack.expand is not None for pack in sum(reference[5], []))
    assert_same_weights(policy, reference[0], 1e-6)
    assert_same_weights(critic, reference[1], 1e-6)
    for name in ("policy_loss", "grad_norm", "value_loss", "critic_grad_norm", "entropy"):
        assert metrics[name] == pytest.approx(reference[4][name], rel=1e-5), name
    mine, theirs = by_document(parts, "values"), by_document(reference[5], "values")
    assert mine.keys() == theirs.keys() == set(range(16))
    for i in mine:
        torch.testing.assert_close(mine[i], theirs[i], atol=1e-5, rtol=0)


class Waits(TorchDispatchMode):
    """Counts what a host waits for: numbers read from a device, sizes that follow values."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += any(n in str(operator) for n in ("_local_scalar_dense", "nonzero", "unique"))
        return operator(*args, **(kwargs or {}))


def test_learning_waits_for_the_device_as_often_with_many_packs_as_with_few(mini, batch):
    counts = []
    for pack_tokens in (36, 4096):
        with Waits() as waits:
            *_, parts = update(mini, batch, pack_tokens)
        counts.append((sum(map(len, parts)), waits.count))
    (many, one), (few, other) = counts
    assert many >= 4 * few and one == other > 0


def test_the_update_moves_every_weight(mini, reference):
    before = dict(load_model(mini.model).named_parameters())
    for name, weight in reference[0].named_parameters():
        assert not torch.equal(weight, before[name]), name


@pytest.mark.parametrize("pack_tokens, count", PACKS)
def test_every_rollout_is_trained_once_a_pass_with_its_own_numbers(batch, pack_tokens, count):
    rollouts = [replace(r, reward=k / 16) for k, r in enumerate(batch[0])]
    rollouts = [
        replace(r, logps=[-k - t / 8 for t in range(len(r.logps))]) for k, r in enumerate(rollouts)
    ]
    parts = packed(rollouts, config(**UPDATE, pack_tokens=pack_tokens))
    members = [[i for pack in part for i in pack.members] for part in parts]
    assert [sorted(m) for m in members] == [list(range(4 * k, 4 * k + 4)) for k in range(4)]
    assert all(len(pack.ids) <= pack_tokens for pack in sum(parts, []))
    targets, logps, rewards = (by_document(parts, n) for n in ("targets", "logps", "rewards"))
    for i, r in enumerate(rollouts):
        assert targets[i].tolist() == r.response_ids and logps[i].tolist() == r.logps
        assert rewards[i].tolist() == [0.0] * (len(r.response_ids) - 1) + [r.reward]


def test_the_critic_takes_its_steps_the_policy_one_and_the_numbers_are_those_of_the_batch(
    batch, reference
):
    _, _, slow, fast, metrics, _ = reference
    assert (fast.steps, slow.steps) == (4, 1)
    assert metrics["policy_loss"] == pytest.approx(-torch.cat(batch[1]).mean().item(), abs=1e-6)
    assert metrics["clip_fraction"] == 0 and metrics["ratio_max"] == 0


def test_one_critic_step_gives_the_gradient_of_the_naive_mean_square(mini, batch, unclipped):
    _, critic, _, fast, metrics, parts = update(mini, batch, 4096, critic_steps=1)
    torch.manual_seed(0)
    load_model(mini.model)
    other, values = load_model(mini.model, head="value"), by_document(parts, "values")
    nn.init.normal_(other.value_head.weight, std=0.1)
    total, count = 0.0, 0
    for i, rollout in enumerate(batch[0]):  # one document at a time
        mine = other.values(packs.pack_alone([rollout.document]))
        torch.testing.assert_close(mine, values[i], atol=1e-5, rtol=0)
        total = total + 0.5 * (mine - float(rollout.problem.answer) / 5).square().sum()
        count += len(mine)
    (total / count).backward()
    assert fast.steps == 1
    assert metrics["value_loss"] == pytest.approx(total.item() / count, rel=1e-5)
    for (name, a), b in zip(critic.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_the_order_of_the_groups_and_of_the_samples_does_not_matter(
    mini, batch, reference, unclipped
):
    order = [g * 2 + i for g in (5, 2, 7, 0, 1, 6, 3, 4) for i in (1, 0)]
    policy, *_, metrics, _ = update(mini, batch, 64, order=order)
    assert_same_weights(policy, reference[0], 1e-6)
    assert metrics["grad_norm"] == pytest.approx(reference[4]["grad_norm"], rel=1e-5)


class Poisoned(nn.Module):
    """One number for each (document, position); NaN wherever no response token is predicted."""

    def __init__(self, rollouts):
        super().__init__()
        numbers = torch.full((len(rollouts), 64), float("nan"))
        for i, rollout in enumerate(rollouts):
            start = len(rollout.prompt.ids) - 1
            numbers[i, start : start + len(rollout.response_ids)] = -1.0 - i / 100
        self.numbers = nn.Parameter(numbers)

    def values(self, pack):
        parts = pack.ids.split(pack.lengths)
        return torch.cat([self.numbers[part[0], : len(part)] for part in parts])[pack.rows]

    def logps(self, pack):
        return self.values(pack), torch.zeros(len(pack.rows))


def poisoned_rollouts(count: int, tokens=lambda i: 1 + i) -> list[Rollout]:
    rows = []
    for i in range(count):  # the first token names the document
        prompt = data.Prompt([i, *[50] * (i % 4)], [i], None, (), ())
        ids = [60] * tokens(i)
        logps = [-1.0 - i / 100] * len(ids)
        rows.append(Rollout(data.Problem(f"p{i}", "?", "!"), 0, prompt, i, ids, logps, True))
    return rows


@pytest.mark.parametrize("pack_tokens", [30, 4096])
def test_nan_in_every_slot_that_is_not_trained_changes_nothing(pack_tokens, unclipped):
    rollouts = poisoned_rollouts(8)
    cfg = config(problems=8, samples=1, critic_steps=4, lengths=((0, 8),), prompt_tokens=10)
    parts = packed(rollouts, replace(cfg, pack_tokens=pack_tokens))
    filler = packs.rollout_pack([], [])  # as on a rank that has run out of packs
    parts = [[*part, replace(filler)] for part in parts]
    policy, critic, batch = Poisoned(rollouts), Poisoned(rollouts), sum(parts, [])
    rl.critic_values(critic, batch, ALONE)
    for i, values in by_document(parts, "values").items():
        assert values.tolist() == pytest.approx([-1.0 - i / 100] * len(values))
    for p in batch:
        p.advantages, p.returns = rl.gae(p.rewards, p.values, p.counts, 1.0, 1.0)
    rl.normalise(batch, ALONE)
    losses_of, slow = partial(rl.policy_losses, cfg=cfg), torch.optim.SGD(policy.parameters())
    fast, lrs = torch.optim.SGD(critic.parameters()), [0.0] * 4
    metrics = rl.train((critic, fast), rl.split(parts, 4), lrs, rl.critic_losses, 0, ALONE)
    metrics |= rl.train((policy, slow), rl.split(parts, 1), [0.0], losses_of, 0, ALONE)
    assert all(math.isfinite(x) for x in metrics.values()), metrics
    assert metrics["logp_diff_max"] < 1e-6
    trained = torch.isfinite(policy.numbers)
    assert torch.isfinite(policy.numbers.grad).all()
    assert (policy.numbers.grad[~trained] == 0).all() and (policy.numbers.grad[trained] != 0).all()


# ---- sampler and trainer


def test_importance_weights_are_truncated_ratios_without_a_gradient():
    logps = torch.tensor([-1.0, -2.0, -0.5, -1.0], requires_grad=True)
    by_sampler = torch.tensor([-1.0, -1.0, -3.0, -1.5])
    weights = rl.importance_weights(logps, by_sampler, cap=2.0)
    assert weights.tolist() == pytest.approx([1.0, math.exp(-1), 2.0, math.exp(0.5)])
    assert not weights.requires_grad


def test_importance_weights_scale_each_tokens_gradient(mini, batch, unclipped):
    """A sampler that was off by known amounts; the reference weighs advantages by hand."""
    rollouts, advantages = batch
    drifts = [torch.randn(len(a), generator=seeded(i)) for i, a in enumerate(advantages)]
    gradients = []
    for tis in (0.0, 1.5):
        policy = load_model(mini.model)
        cfg = config(**UPDATE, pack_tokens=100, tis=tis)
        parts = packed(rollouts, cfg)
        with torch.no_grad():
            true = [policy.logps(packs.pack_alone([r.document]))[0] for r in rollouts]
        put_column(parts, "logps", [t - d for t, d in zip(true, drifts, strict=True)])
        weighed = [a * d.exp().clamp(max=1.5) for a, d in zip(advantages, drifts, strict=True)]
        put_column(parts, "advantages", advantages if tis else weighed)
        pair, losses_of = (
            (policy, CountingSGD(policy.parameters())),
            partial(rl.policy_losses, cfg=cfg),
        )
        metrics = rl.train(pair, rl.split(parts, 1), [0.0], losses_of, 0, ALONE)
        gradients.append([p.grad for p in policy.parameters()])
        assert ("tis_weight" in metrics) == (tis > 0)
    assert 0.5 < metrics["tis_weight"] < 1.5
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_a_sampler_whose_weights_were_not_copied_stops_the_run_in_its_first_step(
    mini, tmp_path, monkeypatch
):
    cfg = config(model=mini.model, data=mini.train, out=str(tmp_path), lr=1e-2, warmup=1)
    monkeypatch.setattr(TorchSampler, "sync", lambda self, weights: [None for _ in weights])
    with pytest.raises(RuntimeError, match="after the update of step 0.*stale cache"):
        rl.main(cfg)
    assert not (tmp_path / "checkpoints").exists()


def test_a_gap_between_sampler_and_trainer_above_the_limit_stops_the_run(mini, tmp_path):
    for gap in (float("nan"), float("inf"), 2e-3):
        with pytest.raises(RuntimeError, match="step 7.*more than 0.001.*GAP_LIMITS.*--tis"):
            rl.refuse_gap(gap, ALONE, "step 7")
    rl.refuse_gap(1e-4, ALONE, "step 7")


def test_a_loss_that_is_not_finite_names_its_rollouts_and_changes_no_weight(mini, batch):
    rollouts, advantages = batch
    advantages = [a.clone() for a in advantages]
    advantages[5][0] = math.nan
    cfg = config(**UPDATE, pack_tokens=60)
    policy, before, parts = load_model(mini.model), load_model(mini.model), packed(rollouts, cfg)
    put_column(parts, "advantages", advantages)
    pair, losses_of = (policy, CountingSGD(policy.parameters())), partial(rl.policy_losses, cfg=cfg)
    with pytest.raises(FloatingPointError, match="step 9: .*loss.*in packs of") as error:
        rl.train(pair, rl.split(parts, 1), [1.0], losses_of, 9, ALONE)
    (pack,) = [p for p in sum(parts, []) if 5 in p.members]
    names = str(error.value).split("in packs of ")[1].split(";")[0]
    wanted = sorted(f"{rollouts[i].problem.id}#{rollouts[i].sample}" for i in pack.members)
    assert names == ", ".join(wanted)
    assert all(torch.equal(*w) for w in zip(policy.parameters(), before.parameters(), strict=True))


def test_a_run_that_diverges_says_which_token_and_what_to_do(mini, tmp_path):
    cfg = config(model=mini.model, data=mini.train, out=str(tmp_path), lr=1e20, warmup=1)
    with pytest.raises(
        FloatingPointError, match="logits of response token .* are not finite.*lower --lr"
    ):
        rl.main(cfg)


# ---- whole runs


def run(cfg: rl.Config) -> Path:
    rl.main(cfg)
    return Path(cfg.out)


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
        assert row["logp_diff_max"] < 1e-5 and abs(row["sampler_kl"]) < 1e-6
        assert row["ratio_max"] == 0 and row["clip_fraction"] == 0
        assert abs(row["policy_loss"]) < 1e-6  # minus the mean of normalised advantages
        assert row["return_mean"] <= 1 and row["grad_norm"] > 0 and row["entropy"] > 0
    assert rows[-1]["value_mean"] - rows[0]["value_mean"] > 0.1  # the critic learns
    assert len({row["reward"] for row in rows}) > 1 and max(row["truncated"] for row in rows) > 0
    assert [row["lr"] for row in rows] == [5e-4, 1e-3, 1e-3, 1e-3]
    before, after = load_file(Path(mini.model) / "model.safetensors"), weights_of(uninterrupted)
    for name, weight in after.items():
        assert torch.equal(weight, before[name]) == name.startswith("visual."), name
    lines = [json.loads(line) for line in (uninterrupted / "rollouts.jsonl").open()]
    assert len(lines) == 4 * 16 and all(r["reward"] == 0 for r in lines if not r["stopped"])
    for row in rows:
        mine = [r["reward"] for r in lines if r["step"] == row["step"]]
        assert row["reward"] == pytest.approx(sum(mine) / 16)
    assert load_model(uninterrupted / "model").lm_head is not None


def test_the_trace_of_a_run_has_the_numbers_of_its_tokens_and_reads_as_six_steps(uninterrupted):
    rows = [json.loads(line) for line in (uninterrupted / "trace.jsonl").open()]
    assert {row["step"] for row in rows} == {0, 1, 2, 3}
    for row in rows:
        columns = [row[name] for name in ("tokens", "logps", "values", "advantages")]
        assert {len(column) for column in columns} == {row["length"]}
    screen = trace.page(trace.read(uninterrupted, -1))
    for step in ("1 sample", "2 reward", "3 pack", "4 advantages", "5 update", "6 sync"):
        assert step in screen
    with pytest.raises(ValueError, match="step 9 is not there; there are 0 to 3"):
        trace.read(uninterrupted, 9)
    with pytest.raises(FileNotFoundError, match="--run wants the directory of a run of rl.py"):
        trace.read(uninterrupted / "nowhere", -1)


def test_a_response_that_was_cut_is_wrong_even_if_it_was_right_so_far(mini, tmp_path, monkeypatch):
    monkeypatch.setattr(rl, "grade", lambda *a, **k: Verdict(1.0, "match", "7"))
    out = run(config(model=mini.model, data=mini.train, out=str(tmp_path), steps=1))
    lines = [json.loads(line) for line in (out / "rollouts.jsonl").open()]
    assert {r["reward"]: r["stopped"] for r in lines} == {1.0: True, 0.0: False}
    row = metrics_of(out)[0]
    assert row["reward"] == pytest.approx(1 - row["truncated"])


def interrupt(monkeypatch, how: str):
    """In step 1: Ctrl-C; in step 3, after sampling and before learning: the machine dies."""
    rows_of = trace.rows_of

    def interrupted(step, *rest):
        if how == "ctrl-c" and step == 1:
            signal.raise_signal(signal.SIGINT)
        if how == "killed" and step == 3:
            raise RuntimeError("killed")
        return rows_of(step, *rest)

    monkeypatch.setattr(trace, "rows_of", interrupted)


@pytest.mark.parametrize("how, save_every", [("ctrl-c", 0), ("killed", 2)])
def test_a_run_that_was_cut_off_goes_on_bit_for_bit_and_samples_nothing_twice(
    mini, uninterrupted, tmp_path, monkeypatch, capsys, how, save_every
):
    cfg = config(model=mini.model, data=mini.train, out=str(tmp_path / "cut"))
    cfg = replace(cfg, save_every=save_every)
    with monkeypatch.context() as patch:
        interrupt(patch, how)
        if how == "killed":
            with pytest.raises(RuntimeError, match="killed"):
                rl.main(cfg)
        else:
            rl.main(cfg)
            assert "to resume" in capsys.readouterr().out
    assert [f.name for f in (tmp_path / "cut/checkpoints").iterdir()] == ["step_000002"]
    assert not (tmp_path / "cut/model").exists()
    torch.manual_seed(12345)  # nothing may hang on the global state of a process
    sampled, generate = [], TorchSampler.generate

    def noted(self, problems, *rest, seed=(0,), **more):
        sampled.append(seed)
        return generate(self, problems, *rest, seed=seed, **more)

    monkeypatch.setattr(TorchSampler, "generate", noted)
    resumed = run(cfg)
    steps = [seed[1] for seed in sampled if len(seed) == 2]  # the canary has no step
    assert steps == ([2, 3] if how == "ctrl-c" else [])  # both were sampled before the kill
    assert metrics_of(resumed) == metrics_of(uninterrupted)
    one, other = weights_of(resumed), weights_of(uninterrupted)
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
    for name in ("rollouts.jsonl", "trace.jsonl"):
        assert (resumed / name).read_text() == (uninterrupted / name).read_text()


def test_the_sampler_rests_before_the_update_also_where_rollouts_were_read(
    mini, tmp_path, monkeypatch
):
    cfg = config(model=mini.model, data=mini.train, out=str(tmp_path / "run"), steps=1)
    calls = []
    for where, name in ((TorchSampler, "rest"), (TorchSampler, "sync"), (rl, "critic_values")):
        call = getattr(where, name)

        def noted(*rest, name=name, call=call):
            calls.append(name)
            return call(*rest)

        monkeypatch.setattr(where, name, noted)
    run(cfg)
    first, calls[:] = [*calls], []
    shutil.rmtree(tmp_path / "run/model")  # it has no checkpoint: its one step is done again
    monkeypatch.setattr(TorchSampler, "_run", None)  # only the canary samples
    monkeypatch.setattr(rl, "canary_gap", lambda *rest: 0.0)
    run(cfg)
    assert calls == first == ["rest", "sync", "rest", "critic_values", "sync"]


def test_a_run_that_died_after_its_last_checkpoint_still_writes_its_model(
    mini, tmp_path, monkeypatch
):
    cfg = config(model=mini.model, data=mini.train, out=str(tmp_path), steps=1, save_every=1)
    with monkeypatch.context() as patch:
        patch.setattr(trace, "rows_of", lambda *a: signal.raise_signal(signal.SIGINT) or [])
        rl.main(cfg)
    assert (tmp_path / "checkpoints/step_000001/state").is_dir()
    assert not (tmp_path / "model").exists()
    rl.main(cfg)
    one = load_file(tmp_path / "checkpoints/step_000001/model/model.safetensors")
    assert all(torch.equal(w, one[n]) for n, w in weights_of(tmp_path).items())


def test_the_two_newest_states_are_kept_and_every_model(mini, tmp_path):
    cfg = config(model=mini.model, data=mini.text, out=str(tmp_path), steps=3, save_every=1)
    run(replace(cfg, problems=4, samples=2))
    folders = sorted((tmp_path / "checkpoints").iterdir())
    assert [f.name for f in folders] == ["step_000001", "step_000002", "step_000003"]
    assert [(f / "state").exists() for f in folders] == [False, True, True]
    assert all((f / "model/model.safetensors").exists() for f in folders)
    kept = sorted(f.name for f in (tmp_path / "rollouts").iterdir())
    assert kept == ["step_000001.npz", "step_000002.npz"]  # what a resume may read
    with pytest.raises(FileExistsError, match="finished run"):
        rl.main(replace(cfg, problems=4, samples=2))


def test_data_without_pictures_run_as_well(mini, tmp_path):
    cfg = config(model=mini.model, data=mini.text, out=str(tmp_path), steps=1, save_every=0)
    row = metrics_of(run(cfg))[0]
    assert "reward_text" in row and "reward_image" not in row


def test_several_policy_steps_move_the_ratio_and_are_warmed_up_one_by_one(mini, tmp_path):
    cfg = config(model=mini.model, data=mini.train, out=str(tmp_path), steps=2, warmup=4)
    rows = metrics_of(run(replace(cfg, policy_steps=2, lr=1e-2)))
    assert all(row["ratio_max"] > 0.01 for row in rows)
    assert [row["lr"] for row in rows] == [5e-3, 1e-2]
    assert all(row["logp_diff_max"] < 1e-4 for row in rows)  # old log-probs against the sampler's


def test_grpo_gives_each_token_its_groups_advantage(batch):
    rewards = [1, 0, 0, 0, 1, 1, 0, 1, 1, 0, 0, 1, 0, 0, 1, 1]
    rollouts = [replace(r, reward=x) for r, x in zip(batch[0], rewards, strict=True)]
    parts = packed(rollouts, config(**UPDATE, pack_tokens=64, algorithm="grpo"))
    assert len(parts) == 1
    parts[0].append(packs.rollout_pack([], []))
    rl.compare_samples(rollouts, parts[0], samples=2)
    wanted = rl.group_advantages(torch.tensor(rewards).view(8, 2).float()).flatten().tolist()
    for i, advantages in by_document(parts, "advantages").items():
        assert advantages.tolist() == [wanted[i]] * len(rollouts[i].response_ids)


def test_grpo_needs_no_critic(mini, tmp_path):
    cfg = config(model=mini.model, data=mini.train, out=str(tmp_path), algorithm="grpo", steps=2)
    assert rl.load_models(cfg, mini.model, ALONE).keys() == {"policy"}
    rows = metrics_of(run(cfg))
    assert len(rows) == 2 and all(row["grad_norm"] > 0 for row in rows)
    assert not {"value_loss", "explained_variance", "critic_grad_norm"} & rows[0].keys()
    assert "4 advantages" in trace.page(trace.read(tmp_path, -1))


def test_long_prompts_are_left_out_and_counted(mini, tmp_path, capsys):
    cfg = config(model=mini.model, data=mini.train, out=str(tmp_path), steps=1, prompt_tokens=20)
    run(cfg)
    assert "6 problems left out: prompts over 20 tokens" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").open()]
    assert lines and all(r["image"] for r in lines)  # written grids are longer than the pictures


@pytest.mark.parametrize("train_vision", [False, True])
def test_policy_and_critic_start_from_the_same_model_and_the_tower_is_frozen_unless_asked(
    mini, train_vision
):
    models = rl.load_models(config(train_vision=train_vision), mini.model, ALONE)
    policy, critic = models["policy"][0], models["critic"][0]
    own = dict(policy.named_parameters())
    for name, weight in critic.named_parameters():
        assert name == "value_head.weight" or torch.equal(weight, own[name]), name
        assert weight.requires_grad == (train_vision or not name.startswith("visual."))
    assert critic.value_head.weight.std() < 0.02


def test_the_papers_value_head_is_there_when_asked_for(mini):
    critic, _ = rl.load_models(config(value_init="paper"), mini.model, ALONE)["critic"]
    weight = critic.value_head.weight
    assert weight.abs().max() <= math.sqrt(5) and weight.std().item() == pytest.approx(1.29, 0.1)
