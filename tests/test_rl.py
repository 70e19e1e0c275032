"""rl.py: pieces by hand, the gradient against an enumerated MDP, runs against themselves."""

import itertools
import json
import math
import random
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import rl
from common import data, dealing, telling
from common import distributed as parallel
from model import load_model
from reward import Verdict
from rollout import Rollout, canary

ALONE = parallel.World(0, 1, torch.device("cpu"))


def packed(rollouts: list, cfg: rl.Config) -> list:
    """The packs of a batch in one process."""
    lengths = [len(r.document) for r in rollouts]
    return dealing.lay_out(rollouts, dealing.deal(rollouts, lengths, cfg, ALONE), cfg, ALONE)


def config(**changed) -> rl.Config:
    small = dict(steps=4, problems=4, samples=4, lengths=(8, 12), length_from=(0, 2), lr=1e-3)
    small |= dict(pack_tokens=128, prompt_tokens=64, threads=1, save_every=100, warmup=2)
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
    advantages, targets = rl.gae(rewards, values, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [-0.375 + 0.25 * 0.125 + 0.0625 * 0.25, 0.125 + 0.0625, 0.25]
    assert targets.tolist() == (advantages + values).tolist()


@given(
    st.lists(st.tuples(st.floats(-2, 2), st.floats(-2, 2)), min_size=1, max_size=12),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_gae_is_the_double_sum_of_its_definition(steps, gamma, lam):
    rewards, values = (torch.tensor(x, dtype=torch.float64) for x in zip(*steps, strict=True))
    advantages, targets = rl.gae(rewards, values, gamma, lam)
    naive = naive_gae(rewards.tolist(), values.tolist(), gamma, lam)
    assert advantages.dtype == targets.dtype == torch.float64
    torch.testing.assert_close(advantages.tolist(), naive, atol=1e-12, rtol=0)


def test_with_gamma_and_lambda_1_a_token_gets_r_minus_v_and_the_critic_learns_r_everywhere():
    values = torch.rand(50, dtype=torch.float64)
    rewards = torch.zeros(50, dtype=torch.float64)
    rewards[-1] = 1.0
    advantages, targets = rl.gae(rewards, values, 1.0, 1.0)
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
    budget = lambda step: rl.length_budget(step, (24, 32, 48), (0, 300, 700))  # noqa: E731
    assert [budget(s) for s in (0, 299, 300, 699, 700, 10**6)] == [24, 24, 32, 32, 48, 48]


def test_warm_up_counts_optimiser_steps():
    assert [rl.warm(step, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert rl.warm(0, 0) == 1
    # The paper's 50: four critic steps an iteration reach the full rate within 13 iterations.
    assert rl.warm(12 * 4 + 1, 50) == 1 and rl.warm(12, 50) == 0.26


def test_advantages_are_normalised_over_tokens_so_that_short_right_answers_weigh_more():
    right, wrong = [torch.ones(1000)] * 2, [torch.zeros(8000)] * 2
    got = rl.normalise([*right, *wrong], ALONE)
    assert [len(a) for a in got] == [1000, 1000, 8000, 8000]
    assert got[0][0].item() == pytest.approx(2.828, abs=1e-3)
    assert got[3][0].item() == pytest.approx(-0.354, abs=1e-3)
    flat = torch.cat(got).double()
    assert abs(flat.mean()) < 1e-6 and abs(flat.std(correction=0) - 1) < 1e-6


def test_advantages_without_contrast_stay_0():
    for a in rl.normalise([torch.full((5,), 0.5), torch.full((3,), 0.5)], ALONE):
        assert a.tolist() == [0.0] * len(a)


def test_critic_metrics_of_a_perfect_a_constant_and_an_offset_critic():
    returns = [torch.tensor([1.0, 1.0]), torch.tensor([0.0, 0.0, 0.0, 0.0])]
    found = rl.critic_metrics(returns, returns, ALONE)
    assert found["explained_variance"] == 1
    assert found["value_mean"] == found["return_mean"] == pytest.approx(1 / 3)
    constant = [torch.full_like(r, 0.7) for r in returns]
    assert rl.critic_metrics(constant, returns, ALONE)["explained_variance"] == pytest.approx(0)
    v, r = torch.tensor([0.9, 0.6, 0.1, 0.3, 0, 0.2]), torch.cat(returns)
    naive = 1 - (r - v).var(correction=0) / r.var(correction=0)
    got = rl.critic_metrics([v[:2], v[2:]], returns, ALONE)["explained_variance"]
    assert got == pytest.approx(naive.item(), rel=1e-6)


@pytest.mark.parametrize(
    "wrong, named",
    [
        (dict(algorithm="reinforce"), "algorithm"),
        (dict(value_init="zero"), "value_init"),
        (dict(lengths=(8, 12), length_from=(0,)), "length_from"),
        (dict(lengths=(8, 12), length_from=(1, 2)), "length_from"),
        (dict(lengths=(8, 12, 16), length_from=(0, 4, 2)), "length_from"),
        (dict(lengths=(), length_from=()), "length_from"),
        (dict(pack_tokens=75), "pack_tokens"),
        (dict(algorithm="grpo", samples=1), "samples"),
        (dict(problems=3), "critic_steps"),
        (dict(steps=0), "steps"),
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
        advantages, _ = rl.gae(rewards, values, 1.0, lam)
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

    def states(self, ids, lengths, rows, expand):
        starts = [0, *itertools.accumulate(lengths)]
        if expand is not None:  # a shared prompt's row: what follows it is the same in all
            places = expand.tolist()
            ids, rows = ids[expand], torch.tensor([places.index(row) for row in rows.tolist()])
        for row in rows.tolist():
            start = max(s for s in starts[:-1] if s <= row)
            yield tuple(ids[start + 2 : row + 1].tolist())  # two prompt tokens

    def forward(self, ids, lengths, rows, expand, targets=None, temperature=1.0, **unused):
        index = [STATES.index(s) for s in self.states(ids, lengths, rows, expand)]
        logits = self.theta[index] / temperature
        logps = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
        return logps, torch.zeros_like(logps)


class TabularCritic(TabularPolicy):
    def forward(self, ids, lengths, rows, expand, **unused):
        return self.theta[[STATES.index(s) for s in self.states(ids, lengths, rows, expand)]]


@pytest.mark.parametrize("lam", [0, 0.95, 1])
@pytest.mark.parametrize("pack_tokens", [76, 5 * 9])
def test_judge_gae_normalise_and_learn_give_the_exact_gradient_of_a_batch(lam, pack_tokens):
    """27 rollouts hold every sequence exactly as often as a uniform policy draws it.

    So the batch gradient is the exact one, over the normaliser: tokens of the batch times the
    advantages' deviation. Their mean, which normalise() takes off, has no gradient in expectation.
    """
    policy = TabularPolicy(torch.zeros(len(STATES), TOKENS, dtype=torch.float64))
    known = exact_values(policy.theta)
    critic = TabularCritic(table(known[s] for s in STATES))
    (exact,) = torch.autograd.grad(objective(policy.theta), policy.theta)
    drawn = [s for s in SEQUENCES for _ in range(TOKENS ** (HORIZON - len(s)))]
    assert len(drawn) == 27
    random.Random(0).shuffle(drawn)
    prompt = data.Prompt([9, 9], [9, 9], None, (), ())
    problem = data.Problem("mdp", "?", "!")
    rollouts = [
        Rollout(problem, i, prompt, list(s), [-math.log(3)] * len(s), s[-1] == STOP)
        for i, s in enumerate(drawn)
    ]
    cfg = config(samples=1, problems=27, clip=1e9, lam=lam, lengths=(4,), length_from=(0,))
    cfg = replace(cfg, prompt_tokens=2, pack_tokens=pack_tokens)
    parts = packed(rollouts, cfg)
    values = rl.judge(critic, parts, 27, ALONE.device)
    judged = []
    for sequence, value in zip(drawn, values, strict=True):
        assert value.tolist() == [known[sequence[:t]] for t in range(len(sequence))]
        rewards = [0.0] * (len(sequence) - 1) + [REWARD[sequence]]
        judged += naive_gae(rewards, value.tolist(), 1.0, lam)
    advantages, returns = rl.advantages_of(values, [REWARD[s] for s in drawn], cfg, ALONE)
    if lam == 1:
        for sequence, targets in zip(drawn, returns, strict=True):
            assert targets.tolist() == pytest.approx([REWARD[sequence]] * len(sequence))
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    found = rl.learn_policy(policy, optimizer, parts, rollouts, advantages, cfg, 0, ALONE)
    tokens, deviation = sum(map(len, drawn)), table(judged).std(correction=0)
    wanted = -exact * 27 / tokens / deviation
    assert found["tokens"] == tokens and found["logp_diff_max"] < 1e-7
    torch.testing.assert_close(policy.theta.grad, wanted, atol=1e-7, rtol=0)  # std + 1e-8


# ---- the update, on a model with pictures


@pytest.fixture(scope="module")
def batch(mini):
    """8 problems, 2 tries each, half with a picture; responses of 1 to 9 tokens."""
    tokenizer = data.load_tokenizer(mini.model)
    settings, rng = data.load_image_settings(mini.model), random.Random(0)
    rollouts = []
    for problem in data.read_problems(mini.train)[:8]:
        prompt = data.encode_prompt(problem.prompt, problem.images, tokenizer, settings)
        for i in range(2):
            ids = [rng.randrange(8, 100) for _ in range(rng.randint(1, 9))]
            rollouts.append(Rollout(problem, i, prompt, ids, [-4.0] * len(ids), True))
    advantages = [torch.randn(len(r.response_ids)) for r in rollouts]
    return rollouts, advantages


class CountingSGD(torch.optim.SGD):
    steps = 0

    def step(self, closure=None):
        self.steps += 1
        return super().step(closure)


UPDATE = dict(problems=8, samples=2, critic_lr=0.05, lr=0.05, warmup=0, clip=1e9, lam=1.0)
PACKS = [(36, 16), (64, 6), (100, 4), (4096, 1)]  # tokens a pack, and at least so many packs


def update(mini, batch, pack_tokens: int, critic_steps: int = 4, order=None, **changed) -> tuple:
    """One critic pass and one policy step -> both models, both optimisers, metrics."""
    rollouts, advantages = batch
    if order is not None:
        rollouts, advantages = [rollouts[i] for i in order], [advantages[i] for i in order]
    sizes = dict(prompt_tokens=20, pack_tokens=pack_tokens, critic_steps=critic_steps)
    cfg = config(**UPDATE | sizes | changed)
    torch.manual_seed(0)
    policy, critic = load_model(mini.model), load_model(mini.model, head="value")
    nn.init.normal_(critic.value_head.weight, std=0.1)
    slow, fast = (CountingSGD(m.parameters(), lr=1.0) for m in (policy, critic))
    parts = packed(rollouts, cfg)
    values = rl.judge(critic, parts, len(rollouts), ALONE.device)
    returns = [
        a * 0 + float(r.problem.answer) / 5 for a, r in zip(advantages, rollouts, strict=True)
    ]
    found = rl.learn_critic(critic, fast, parts, returns, cfg, 0, ALONE)
    found |= rl.learn_policy(policy, slow, parts, rollouts, advantages, cfg, 0, ALONE)
    return policy, critic, slow, fast, found, values, parts


@pytest.fixture(scope="module")
def reference(mini, batch):
    """One pack a part, each document with a prompt of its own."""
    return update(mini, batch, 4096, share_prompts=False)


def assert_same_weights(one, other, atol):
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("pack_tokens, packs", PACKS)
def test_the_update_does_not_depend_on_the_micro_batches_nor_on_shared_prompts(
    mini, batch, reference, pack_tokens, packs
):
    policy, critic, _, _, found, values, parts = update(mini, batch, pack_tokens)
    assert sum(len(p) for p, _ in parts) >= packs
    shared = any(pack.expand is not None for p, _ in parts for pack in p)
    assert shared or pack_tokens == 36  # which holds one document
    assert_same_weights(policy, reference[0], 1e-6)
    assert_same_weights(critic, reference[1], 1e-6)
    for name in ("policy_loss", "grad_norm", "value_loss", "critic_grad_norm", "entropy"):
        assert found[name] == pytest.approx(reference[4][name], rel=1e-5), name
    for mine, theirs in zip(values, reference[5], strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


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
        counts.append((sum(len(packs) for packs, _ in parts), waits.count))
    (many, one), (few, other) = counts
    assert many >= 4 * few and one == other > 0


def test_the_update_moves_every_weight(mini, reference):
    before = load_model(mini.model)
    for name, weight in reference[0].named_parameters():
        assert not torch.equal(weight, dict(before.named_parameters())[name]), name


@pytest.mark.parametrize("pack_tokens, packs", PACKS)
def test_every_rollout_is_trained_once_a_pass_and_every_sampled_token_with_it(
    batch, pack_tokens, packs
):
    rollouts, _ = batch
    cfg = config(**UPDATE | dict(prompt_tokens=20, pack_tokens=pack_tokens))
    parts = packed(rollouts, cfg)
    assert len(parts) == cfg.critic_steps
    members = [[i for pack in packs for i in pack.members] for packs, _ in parts]
    assert [sorted(m) for m in members] == [list(range(4 * k, 4 * k + 4)) for k in range(4)]
    for packs, tokens in parts:
        trained = [t for pack in packs for t in pack.targets.tolist()]
        mine = [rollouts[i] for pack in packs for i in pack.members]
        assert trained == [t for r in mine for t in r.response_ids] and tokens == len(trained)
        assert all(len(pack.ids) <= pack_tokens for pack in packs)


def test_the_critic_takes_its_steps_the_policy_one_and_the_numbers_are_those_of_the_batch(
    batch, reference
):
    _, _, slow, fast, found, _, _ = reference
    rollouts, advantages = batch
    assert (fast.steps, slow.steps) == (4, 1)
    assert found["tokens"] == sum(len(r.response_ids) for r in rollouts)
    assert found["policy_loss"] == pytest.approx(-torch.cat(advantages).mean().item(), abs=1e-6)
    assert found["clip_fraction"] == 0 and found["ratio_max"] == 0


def test_one_critic_step_gives_the_gradient_of_the_naive_mean_square(mini, batch):
    rollouts, advantages = batch
    _, critic, _, fast, found, values, _ = update(mini, batch, 4096, critic_steps=1)
    torch.manual_seed(0)
    load_model(mini.model)
    other = load_model(mini.model, head="value")
    nn.init.normal_(other.value_head.weight, std=0.1)
    total, count = 0.0, 0
    for i, rollout in enumerate(rollouts):  # one document at a time, all values, then a slice
        pack = data.pack([rollout.document], 4096)[0]
        start = len(rollout.prompt.ids) - 1
        every = other(**pack.inputs)[start : start + len(rollout.response_ids)]
        torch.testing.assert_close(every, values[i], atol=1e-5, rtol=0)
        goal = float(rollout.problem.answer) / 5
        total = total + 0.5 * (every - goal).square().sum()
        count += len(every)
    (total / count).backward()
    assert fast.steps == 1 and found["value_loss"] == pytest.approx(total.item() / count, rel=1e-5)
    for (name, a), b in zip(critic.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_the_order_of_the_groups_and_of_the_tries_does_not_matter(mini, batch, reference):
    order = [g * 2 + i for g in (5, 2, 7, 0, 1, 6, 3, 4) for i in (1, 0)]
    policy, *_, found, _, _ = update(mini, batch, 64, order=order)
    assert_same_weights(policy, reference[0], 1e-6)
    assert found["grad_norm"] == pytest.approx(reference[4]["grad_norm"], rel=1e-5)


class Poisoned(nn.Module):
    """One number for each (document, position); NaN wherever no response token is predicted."""

    def __init__(self, rollouts):
        super().__init__()
        table = torch.full((len(rollouts), 64), float("nan"))
        for i, rollout in enumerate(rollouts):
            start = len(rollout.prompt.ids) - 1
            table[i, start : start + len(rollout.response_ids)] = -1.0 - i / 100
        self.table = nn.Parameter(table)

    def forward(self, ids, lengths, rows, targets=None, **unused):
        flat = torch.cat([self.table[part[0], : len(part)] for part in ids.split(lengths)])
        return flat[rows] if targets is None else (flat[rows], torch.zeros(len(rows)))


@pytest.mark.parametrize("pack_tokens", [30, 4096])
def test_nan_in_every_slot_that_is_not_trained_changes_nothing(pack_tokens):
    rng, problem = random.Random(0), data.Problem("p", "?", "!")
    rollouts = []
    for i in range(8):  # the first token names the document
        prompt = data.Prompt([i, *[50] * rng.randint(0, 9)], [i], None, (), ())
        ids = [60] * rng.randint(1, 9)
        rollouts.append(Rollout(problem, i, prompt, ids, [-1.0 - i / 100] * len(ids), True))
    cfg = config(problems=8, samples=1, clip=1e9, warmup=0, lr=0, critic_lr=0)
    cfg = replace(cfg, prompt_tokens=10, pack_tokens=pack_tokens)
    parts = packed(rollouts, cfg)
    filled = [(packs + [data.filler_pack()], tokens) for packs, tokens in parts]  # as a short rank
    policy, critic = Poisoned(rollouts), Poisoned(rollouts)
    slow, fast = (torch.optim.SGD(m.parameters(), lr=0.0) for m in (policy, critic))
    values = rl.judge(critic, filled, 8, ALONE.device)
    judged = []
    for i, (value, rollout) in enumerate(zip(values, rollouts, strict=True)):
        assert value.tolist() == pytest.approx([-1.0 - i / 100] * len(rollout.response_ids))
        judged.append(rl.gae(torch.zeros(len(value)), value, 1.0, 1.0))
    advantages = rl.normalise([a for a, _ in judged], ALONE)
    found = rl.learn_critic(critic, fast, filled, [r for _, r in judged], cfg, 0, ALONE)
    found |= rl.learn_policy(policy, slow, filled, rollouts, advantages, cfg, 0, ALONE)
    assert all(math.isfinite(x) for x in found.values()), found
    assert found["logp_diff_max"] < 1e-6
    trained = torch.isfinite(policy.table)
    assert torch.isfinite(policy.table.grad).all() and (policy.table.grad[~trained] == 0).all()
    assert (policy.table.grad[trained] != 0).all()


class Rates(torch.optim.SGD):
    """Notes its learning rate at every step."""

    def step(self, closure=None):
        self.seen = [*getattr(self, "seen", []), self.param_groups[0]["lr"]]


def test_the_critic_warms_up_over_its_own_steps_and_the_policy_over_its():
    prompt, problem = data.Prompt([0], [0], None, (), ()), data.Problem("p", "?", "!")
    rollouts = [Rollout(problem, i, prompt, [60], [-1.0], True) for i in range(4)]
    cfg = config(samples=1, warmup=8, lr=1.0, critic_lr=10.0)
    parts, ones = packed(rollouts, cfg), [torch.ones(1)] * 4
    policy, critic = Poisoned(rollouts), Poisoned(rollouts)
    slow, fast = (Rates(m.parameters(), lr=99.0) for m in (policy, critic))
    for step in range(3):
        rl.learn_critic(critic, fast, parts, ones, cfg, step, ALONE)
        rl.learn_policy(policy, slow, parts, rollouts, ones, cfg, step, ALONE)
    assert fast.seen == [10 * k / 8 for k in range(1, 9)] + [10.0] * 4
    assert slow.seen == [1 / 8, 2 / 8, 3 / 8]


# ---- sampler and trainer


def test_importance_weights_are_truncated_ratios_without_a_gradient():
    logps = torch.tensor([-1.0, -2.0, -0.5, -1.0], requires_grad=True)
    sampled = torch.tensor([-1.0, -1.0, -3.0, -1.5])
    weights = rl.importance_weights(logps, sampled, cap=2.0)
    assert weights.tolist() == pytest.approx([1.0, math.exp(-1), 2.0, math.exp(0.5)])
    assert not weights.requires_grad


def test_importance_weights_scale_each_tokens_gradient(mini, batch):
    """A sampler that was off by known amounts; the reference weighs advantages by hand."""
    rollouts, advantages = batch
    shift = torch.Generator().manual_seed(1)
    drifts = [torch.randn(len(a), generator=shift) for a in advantages]
    cfg = config(**UPDATE | dict(prompt_tokens=20, pack_tokens=100))
    gradients = []
    for by_hand in (False, True):
        policy = load_model(mini.model)
        with torch.no_grad():
            true = []
            for r in rollouts:
                pack = data.pack([r.document], 100)[0]
                true.append(policy(**pack.inputs, rows=pack.rows, targets=pack.targets)[0])
        off = [
            replace(r, logps=(t - d).tolist())
            for r, t, d in zip(rollouts, true, drifts, strict=True)
        ]
        weighed = [a * d.exp().clamp(max=1.5) for a, d in zip(advantages, drifts, strict=True)]
        chosen = replace(cfg, tis=0.0 if by_hand else 1.5)
        slow = CountingSGD(policy.parameters(), lr=1.0)
        found = rl.learn_policy(
            policy,
            slow,
            packed(off, cfg),
            off,
            weighed if by_hand else advantages,
            chosen,
            0,
            ALONE,
        )
        gradients.append([p.grad for p in policy.parameters()])
        assert ("tis_weight" in found) is not by_hand
    assert 0.5 < rl.importance_weights(torch.cat(drifts), torch.zeros(1), 1.5).mean() < 1.5
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_a_sampler_whose_weights_were_not_copied_stops_the_run_in_its_first_step(
    mini, tmp_path, monkeypatch
):
    cfg = config(model=mini.model, data=mini.train, out=str(tmp_path), lr=1e-2, warmup=1)
    monkeypatch.setattr(rl.TorchSampler, "sync", lambda self, weights: [None for _ in weights])
    with pytest.raises(RuntimeError, match="after the update of step 0.*stale cache"):
        rl.main(cfg)
    assert not (tmp_path / "checkpoints").exists()


def test_a_gap_between_sampler_and_trainer_above_the_limit_stops_the_run(mini, tmp_path):
    cfg = config(model=mini.model, data=mini.train, out=str(tmp_path), gap_limit=1e-12)
    with pytest.raises(RuntimeError, match="more than 1e-12.*--gap-limit.*--tis"):
        rl.main(cfg)
    for gap in (float("nan"), float("inf"), 2e-3):
        with pytest.raises(RuntimeError, match="step 7"):
            rl.refuse_gap(gap, config(), ALONE, "step 7")
    rl.refuse_gap(1e-4, config(), ALONE, "step 7")


def test_the_canary_shows_a_picture_and_fills_a_block_of_the_prefix_cache(mini):
    tokenizer, settings = data.load_tokenizer(mini.model), data.load_image_settings(mini.model)
    problems = data.read_problems(mini.train)
    for limit in (512, 100):
        bird = canary(problems, tokenizer, settings, limit)
        length = data.prompt_length(bird.prompt, bird.images, tokenizer, settings)
        assert bird.images and min(limit - 20, 160) <= length <= limit
    bird = canary(data.read_problems(mini.text), tokenizer, settings, 512)
    assert not bird.images and bird.id == "canary"


def test_a_loss_that_is_not_finite_names_its_rollouts_and_changes_no_weight(mini, batch):
    rollouts, advantages = batch
    cfg = config(**UPDATE | dict(prompt_tokens=20, pack_tokens=60))
    broken = [a.clone() for a in advantages]
    broken[5][0] = math.nan
    policy, before = load_model(mini.model), load_model(mini.model)
    slow, parts = CountingSGD(policy.parameters(), lr=1.0), packed(rollouts, cfg)
    with pytest.raises(FloatingPointError, match="step 9: .*policy_loss.*in packs of") as error:
        rl.learn_policy(policy, slow, parts, rollouts, broken, cfg, 9, ALONE)
    (pack,) = [p for packs, _ in parts for p in packs if 5 in p.members]
    named = str(error.value).split("in packs of ")[1].split(";")[0]
    wanted = sorted(f"{rollouts[i].problem.id}#{rollouts[i].sample}" for i in pack.members)
    assert named == ", ".join(wanted)
    for one, other in zip(policy.parameters(), before.parameters(), strict=True):
        assert torch.equal(one, other)


# ---- whole runs


def run(cfg: rl.Config) -> Path:
    rl.main(cfg)
    return Path(cfg.out)


@pytest.fixture(scope="module")
def uninterrupted(mini, tmp_path_factory):
    out = tmp_path_factory.mktemp("rl") / "whole"
    return run(config(model=mini.model, data=mini.train, out=str(out)))


def test_a_run_tells_what_it_did_and_the_sampler_agrees_with_the_trainer(mini, uninterrupted):
    rows = metrics_of(uninterrupted)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert [row["length_budget"] for row in rows] == [8, 8, 12, 12]
    for row in rows:
        # a sampler that missed one update of this size would be off by 1e-3
        assert row["logp_diff_max"] < 1e-5 and abs(row["sampler_kl"]) < 1e-6
        assert row["ratio_max"] == 0 and row["clip_fraction"] == 0
        assert abs(row["policy_loss"]) < 1e-6  # minus the mean of normalised advantages
        assert row["tokens"] == pytest.approx(16 * row["length"]) and row["entropy"] > 0
        assert row["return_mean"] <= 1 and row["grad_norm"] > 0
    assert len({row["reward"] for row in rows}) > 1 and max(row["truncated"] for row in rows) > 0
    assert [row["lr"] for row in rows] == [5e-4, 1e-3, 1e-3, 1e-3]
    before, after = load_file(Path(mini.model) / "model.safetensors"), weights_of(uninterrupted)
    for name, weight in after.items():
        assert torch.equal(weight, before[name]) == name.startswith("visual."), name
    told = [json.loads(line) for line in (uninterrupted / "rollouts.jsonl").open()]
    assert len(told) == 4 * 16 and all(r["score"] == 0 for r in told if not r["stop"])
    for row in rows:
        mine = [r["score"] for r in told if r["step"] == row["step"]]
        assert row["reward"] == pytest.approx(sum(mine) / 16)
    assert load_model(uninterrupted / "model").lm_head is not None


def test_a_response_that_was_cut_is_wrong_even_if_it_was_right_so_far(mini, tmp_path, monkeypatch):
    monkeypatch.setattr(rl, "grade", lambda *a, **k: Verdict(1.0, "match", "7"))
    out = run(config(model=mini.model, data=mini.train, out=str(tmp_path), steps=1))
    told = [json.loads(line) for line in (out / "rollouts.jsonl").open()]
    assert {r["score"]: r["stop"] for r in told} == {1.0: True, 0.0: False}
    row = metrics_of(out)[0]
    assert row["reward"] == pytest.approx(1 - row["truncated"])


def interrupt(monkeypatch, how: str):
    """In step 1: Ctrl-C; in step 3: the machine dies. The names of the two ways to be cut off."""
    told = telling.rows_of

    def rows_of(step, *rest):
        if how == "ctrl-c" and step == 1:
            signal.raise_signal(signal.SIGINT)
        if how == "killed" and step == 3:
            raise RuntimeError("killed")
        return told(step, *rest)

    monkeypatch.setattr(telling, "rows_of", rows_of)


@pytest.mark.parametrize("how, save_every", [("ctrl-c", 100), ("killed", 2)])
def test_a_run_that_was_cut_off_goes_on_bit_for_bit(
    mini, uninterrupted, tmp_path, monkeypatch, capsys, how, save_every
):
    cfg = config(
        model=mini.model, data=mini.train, out=str(tmp_path / "cut"), save_every=save_every
    )
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
    resumed = run(cfg)
    assert metrics_of(resumed) == metrics_of(uninterrupted)
    one, other = weights_of(resumed), weights_of(uninterrupted)
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
    one, other = ((r / "rollouts.jsonl").read_text() for r in (resumed, uninterrupted))
    assert one == other


def test_a_run_that_died_after_its_last_checkpoint_still_writes_its_model(
    mini, tmp_path, monkeypatch
):
    cfg = config(model=mini.model, data=mini.train, out=str(tmp_path), steps=1, save_every=1)
    with monkeypatch.context() as patch:
        patch.setattr(telling, "rows_of", lambda *a: signal.raise_signal(signal.SIGINT) or [])
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
    with pytest.raises(FileExistsError, match="finished run"):
        rl.main(replace(cfg, problems=4, samples=2))


def test_a_run_does_not_go_on_under_other_settings(mini, tmp_path):
    cfg = config(model=mini.model, data=mini.text, out=str(tmp_path), steps=1, save_every=1)
    rl.main(cfg)
    for file in (tmp_path / "model").iterdir():
        file.unlink()
    (tmp_path / "model").rmdir()
    with pytest.raises(FileExistsError, match="lr 0.001 -> 0.5"):
        rl.main(replace(cfg, lr=0.5))


def test_data_without_pictures_run_as_well(mini, tmp_path):
    row = metrics_of(run(config(model=mini.model, data=mini.text, out=str(tmp_path), steps=1)))[0]
    assert "reward_text" in row and "reward_image" not in row


def test_grpo_gives_each_token_its_groups_advantage(batch):
    rollouts, _ = batch
    groups = torch.arange(16.0).view(8, 2)
    spread = rl.spread(groups.flatten(), rollouts)
    assert [a.tolist() for a in spread] == [
        [float(i)] * len(r.response_ids) for i, r in enumerate(rollouts)
    ]


@pytest.mark.parametrize("algorithm, source", [("ppo", "train"), ("grpo", "text")])
def test_a_trace_shows_the_six_steps_and_leaves_nothing_behind(
    mini, tmp_path, capsys, algorithm, source
):
    rows = getattr(mini, source)
    rl.main(config(model=mini.model, data=rows, out=str(tmp_path), algorithm=algorithm, trace=True))
    screen = capsys.readouterr().out
    for step in ("1 ask", "2 answer", "3 grade", "4 judge", "5 learn"):
        assert step in screen
    assert not list(tmp_path.iterdir())


def test_grpo_needs_no_critic(mini, tmp_path):
    cfg = config(model=mini.model, data=mini.train, out=str(tmp_path), algorithm="grpo", steps=2)
    assert rl.load_pair(cfg, ALONE).keys() == {"policy"}
    rows = metrics_of(run(cfg))
    assert len(rows) == 2 and all(row["grad_norm"] > 0 for row in rows)
    assert not {"value_loss", "explained_variance", "critic_grad_norm"} & rows[0].keys()


def test_long_prompts_are_left_out_and_counted(mini, tmp_path, capsys):
    cfg = config(model=mini.model, data=mini.train, out=str(tmp_path), steps=1, prompt_tokens=20)
    run(cfg)
    assert "6 problems left out: prompts over 20 tokens" in capsys.readouterr().out
    told = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").open()]
    assert told and all(r["image"] for r in told)  # the written grids are longer than the pictures


@pytest.mark.parametrize("train_vision", [False, True])
def test_policy_and_critic_start_from_the_same_model_and_the_tower_is_frozen_unless_asked(
    mini, train_vision
):
    pair = rl.load_pair(config(model=mini.model, train_vision=train_vision), ALONE)
    policy, critic = pair["policy"][0], pair["critic"][0]
    own = dict(policy.named_parameters())
    for name, weight in critic.named_parameters():
        assert name == "value_head.weight" or torch.equal(weight, own[name]), name
        assert weight.requires_grad == (train_vision or not name.startswith("visual."))
    assert critic.value_head.weight.std() < 0.02


def test_the_papers_value_head_is_there_when_asked_for(mini):
    critic, _ = rl.load_pair(config(model=mini.model, value_init="paper"), ALONE)["critic"]
    weight = critic.value_head.weight
    assert weight.abs().max() <= math.sqrt(5) and weight.std().item() == pytest.approx(1.29, 0.1)
