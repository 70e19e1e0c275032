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


def config(**changed) -> rl.Config:
    small = dict(steps=4, problems=4, samples=4, lengths=((0, 8), (2, 12)), lr=1e-3)
    small |= dict(pack_tokens=128, prompt_tokens=64, save_every=100, warmup=2)
    return rl.Config(**small | changed)


def pack_with(**columns) -> packs.Pack:
    """A pack that has nothing but numbers of its trained tokens."""
    return replace(packs.filler_pack(), **{n: torch.as_tensor(x) for n, x in columns.items()})


def packed(rollouts: list, cfg: rl.Config) -> list:
    """The parts of a batch in one process, each a list of packs."""
    return packs.share_packs(rollouts, cfg, float, None, ALONE)


def put_column(parts: list, name: str, by_rollout: list):
    for pack in sum(parts, []):
        setattr(pack, name, torch.cat([by_rollout[i] for i in pack.members]))


def learner(model: nn.Module, lr: float = 0.0, steps: int = 1) -> rl.Learner:
    return rl.Learner(model, torch.optim.SGD(model.parameters(), lr), ALONE, lr, steps)


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
    advantages, _ = rl.gae(*twice, [n, n, 0], gamma, lam)
    r, v = rewards.tolist(), values.tolist()
    naive = naive_gae(r, v, gamma, lam) + naive_gae(r[::-1], v[::-1], gamma, lam)
    assert advantages.dtype == torch.float64
    torch.testing.assert_close(advantages.tolist(), naive, atol=1e-12, rtol=0)


def test_group_advantages_by_hand_and_a_group_without_contrast_teaches_nothing():
    got = rl.group_advantages(torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]))
    a, b = math.sqrt(3), 1 / math.sqrt(3)
    wanted = torch.tensor([[a, -b, -b, -b], [1, 1, -1, -1], [b, b, b, -a]])
    torch.testing.assert_close(got, wanted)
    for score, samples in itertools.product((0.0, 1.0, 0.1, 1 / 3), (2, 7, 16)):
        assert not rl.group_advantages(torch.full((3, samples), score)).any()


DAPO, TIS = dict(epsilon_high=0.28), dict(tis=1.5)


@pytest.mark.parametrize(
    # What today's policy gives the token, over what it gave before the first of several policy
    # steps (None: there is one), and over what the sampler's gave, today or in an earlier step.
    "settings, over_old, over_sampled, stale, advantage, loss, slope",
    [  # slope: d loss / d logp, 0 where the clip holds the token back; epsilon = 0.2
        ({}, 1.1, 1.1, False, 2.0, -2.2, -2.2),  # inside
        ({}, 1.5, 1.5, False, 2.0, -2.4, 0.0),  # good and already likelier: held back
        ({}, 0.5, 0.5, False, 2.0, -1.0, -1.0),  # good and less likely: free to return
        ({}, 0.5, 0.5, False, -2.0, 1.6, 0.0),  # bad and already less likely: held back
        ({}, 1.5, 1.5, False, -2.0, 3.0, 3.0),  # bad and likelier: free to return
        (DAPO, 1.25, 1.25, False, 2.0, -2.5, -2.5),  # PPO would hold it back at 1.2
        (DAPO, 1.3, 1.3, False, 2.0, -2.56, 0.0),
        (DAPO, 0.75, 0.75, False, -2.0, 1.6, 0.0),  # the lower end stays
        ({}, None, 1.5, False, 2.0, -2.0, -2.0),  # on-policy: the ratio is 1
        ({}, None, 1.5, True, 2.0, -2.4, 0.0),  # of an earlier policy: the clip acts
        ({}, 9.0, 1.5, True, 2.0, -2.4, 0.0),  # also with several policy steps
        ({}, 1.1, 1.5, False, 2.0, -2.2, -2.2),  # but not of today's own tokens
        (TIS, None, 0.5, False, 2.0, -1.0, -1.0),  # weighed by trainer / sampler
        (TIS, None, 7.0, False, -2.0, 3.0, 3.0),  # up to the cap
        (TIS, 1.1, 1.1, False, 2.0, -2.2, -2.2),  # by the trainer before it has learnt
        (TIS, None, 0.9, True, 2.0, -1.8, -1.8),  # the clip's ratio is weight enough
    ],
)
def test_the_loss_of_a_token_by_hand(
    settings, over_old, over_sampled, stale, advantage, loss, slope
):
    logps = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    columns = dict(logps=[-1 - math.log(over_sampled)], advantages=[advantage])
    if over_old is not None:
        columns["old_logps"] = [-1 - math.log(over_old)]
    columns = {name: torch.tensor(x, dtype=torch.float64) for name, x in columns.items()}
    policy = SimpleNamespace(logps=lambda pack: (logps, torch.zeros_like(logps)))
    losses = rl.policy_losses(policy, pack_with(**columns, stale=[stale]), config(**settings))
    (gradient,) = torch.autograd.grad(losses["policy_loss"].sum(), logps)
    assert losses["policy_loss"].item() == pytest.approx(loss)
    assert gradient.item() == pytest.approx(slope)


@pytest.mark.parametrize("stale", [False, True])
def test_what_is_watched_of_a_token_by_hand(stale):
    """Its log-prob is -1 by the trainer and 1.5 times less likely by the sampler."""
    logps = torch.tensor([-1.0], dtype=torch.float64)
    columns = dict(logps=logps - math.log(1.5), advantages=[2.0], stale=[stale])
    policy = SimpleNamespace(logps=lambda pack: (logps, logps * 0 + 0.7))
    losses = rl.policy_losses(policy, pack_with(**columns), config())
    gap = math.log(1.5)  # that a token is drawn by an older policy is no gap
    wanted = dict(logp_diff=gap, sampler_kl=0.5 - gap, ratio_diff=0, clip_fraction=0)
    if stale:
        wanted = dict(logp_diff=0, sampler_kl=0, ratio_diff=0.5, clip_fraction=1)
    wanted |= dict(surprisal=1, entropy=0.7, stale_tokens=stale)
    assert {name: losses[name].item() for name in wanted} == pytest.approx(wanted)


def test_warm_up_counts_optimiser_steps():
    assert sum((rl.rates(step, 1, 8.0, 4) for step in range(6)), []) == [2, 4, 6, 8, 8, 8]
    assert rl.rates(0, 2, 8.0, 4) + rl.rates(1, 2, 8.0, 4) == [2, 4, 6, 8]
    assert rl.rates(0, 1, 8.0, 0) == [8]


def test_problems_are_handed_out_longest_first_by_their_responses_since_they_were_last_drawn():
    """By mean, whatever their number; unknown ones before, unfinished ones in front."""
    problems = {i: data.Problem(name, "", "") for i, name in enumerate("abcdef", start=40)}
    lengths = {"b": (3, 80, 2), "d": (1, 900, 30), "f": (2, 99, 1), "z": (9, 1, 1)}

    def add(place, *tokens):
        problem = data.Problem("a", "", "")
        responses = [Rollout(problem, 0, None, place, [1] * n) for n in tokens]
        return batches.add_lengths(lengths, responses)

    assert add(0, 900, 99) == {"a": (0, 999, 2)}
    assert add(7, 10) == {"a": (7, 10, 1)}  # drawn again
    assert add(7, 20) == {"a": (7, 30, 2)}  # one that was put aside
    unfinished = [Rollout(problems[i], 0, None, i, [1]) for i in (43, 40, 40)]
    assert batches.longest_first(problems, lengths, unfinished) == [43, 40, 42, 44, 45, 41]
    assert batches.longest_first(problems, {}, []) == [*problems]


def test_explained_variance_is_over_all_packs():
    returns, values = torch.tensor([1.0, 1, 0, 0, 0, 0]), torch.tensor([0.9, 0.6, 0.1, 0.3, 0, 0.2])
    some = [pack_with(values=values[:2], returns=returns[:2])]
    some += [pack_with(values=values[2:], returns=returns[2:])]
    naive = 1 - (returns - values).var(correction=0) / returns.var(correction=0)
    wanted = dict(explained_variance=naive.item(), value_mean=0.35, return_mean=1 / 3)
    metrics = rl.critic_metrics(some)
    assert {name: metrics[name] for name in wanted} == pytest.approx(wanted)


def test_a_batch_in_which_all_tokens_are_alike_teaches_nothing_and_divides_by_nothing():
    alike = [torch.full((n,), 0.5) for n in (5, 3)]
    some = [pack_with(advantages=x, values=x, returns=x) for x in alike]
    rl.normalise(some)
    assert not any(pack.advantages.any() for pack in some)
    assert rl.critic_metrics(some)["explained_variance"] == 1


COUNTS = "steps samples policy_steps critic_steps prompt_tokens sampler_batch".split()


@pytest.mark.parametrize(
    "wrong, named",
    [
        (dict(lengths=((1, 8), (2, 12))), "--lengths"),
        (dict(lengths=((0, 8), (4, 12), (2, 16))), "--lengths"),
        (dict(lengths=((0, 8), (4, 12), (4, 16))), "--lengths"),
        (dict(lengths=((0, 0),)), "--lengths"),
        (dict(pack_tokens=75), "--pack-tokens 75 < 76"),
        (dict(algorithm="grpo", samples=1), "--samples"),
        (dict(problems=3), "--problems 3 .* < 4"),
        (dict(policy_steps=3), "--problems 4 .* < 12"),
        *(({name: 0}, f"--{name.replace('_', '-')} counts from 1") for name in COUNTS),
        (dict(data=""), "--data names no problems"),
        (dict(finish_share=1.1), "--finish-share 1.1"),
        (dict(finish_share=0.7), "--problems 4 in --finish-share 0.7 .* < 4 parts"),
        (dict(finish_share=0.5, algorithm="grpo"), "grpo .* --finish-share 1"),
        (dict(resample=2), "--resample 2 .* grpo alone"),
    ],
)
def test_a_setting_that_would_mislead_is_refused_by_name(wrong, named):
    with pytest.raises(ValueError, match=named):
        config(**wrong)


def test_more_ranks_than_problems_are_refused(monkeypatch):
    monkeypatch.setattr(distributed, "start", lambda: replace(ALONE, size=5))
    with pytest.raises(ValueError, match="--problems 4 < 5 ranks"):
        rl.main(config())


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


def exact_value(state) -> float:
    """The mean reward of the sequences through it."""
    through = [REWARD[s] for s in DRAWN if s[: len(state)] == state]
    return sum(through) / len(through)


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


def mdp_parts(drawn, cfg) -> list:
    """Drawn by a uniform policy."""
    problem, rollouts = data.Problem("mdp", "?", "!"), []
    for i, s in enumerate(drawn):
        prompt = data.Prompt([9, 9], [9, 9], None, (), ())
        logps = [-math.log(TOKENS)] * len(s)
        rollouts.append(Rollout(problem, i, prompt, i, list(s), logps, True, reward=REWARD[s]))
    return packed(rollouts, cfg)


@pytest.mark.parametrize("lam", [0, 0.95, 1])
@pytest.mark.parametrize("pack_tokens", [76, 5 * 9])
def test_values_gae_normalise_and_train_give_the_exact_gradient_of_a_batch(
    lam, pack_tokens, monkeypatch
):
    """The batch gradient is the exact one over the normaliser: tokens of the batch times the
    advantages' deviation. Their mean, which normalise() takes off, has no gradient in expectation.
    """
    policy = TabularPolicy(torch.zeros(len(STATES), TOKENS, dtype=torch.float64))
    cfg = config(**MDP, lam=lam, pack_tokens=pack_tokens)
    parts, naive, values = mdp_parts(DRAWN, cfg), [], []
    parts[0].append(packs.rollout_pack([], []))  # a filler, as on a rank that has run out of packs
    every = sum(parts, [])
    rl.critic_values(learner(TabularPolicy(table(map(exact_value, STATES)))), every)
    for p in every:
        p.advantages, p.returns = rl.gae(p.rewards, p.values, p.counts, rl.GAMMA, lam)
    rl.normalise(every)
    for sequence in DRAWN:
        own = [exact_value(sequence[:t]) for t in range(len(sequence))]
        naive += naive_gae([0.0] * (len(own) - 1) + [REWARD[sequence]], own, 1.0, lam)
        values += own
    metrics = rl.train(learner(policy), parts, partial(rl.policy_losses, cfg=cfg), 0)
    tokens, deviation = sum(map(len, DRAWN)), table(naive).std(correction=0)
    wanted = -exact_gradient(policy.theta) * 27 / tokens / deviation
    assert metrics["logp_diff"] < 1e-7
    torch.testing.assert_close(policy.theta.grad, wanted, atol=1e-7, rtol=0)  # std + 1e-8

    critic = TabularPolicy(torch.randn(len(STATES), dtype=torch.float64, generator=seeded(1)))
    monkeypatch.setattr(rl, "CLIP_NORM", 0.01)
    metrics = rl.train(learner(critic), parts, rl.critic_losses, 0)
    states = [sequence[:t] for sequence in DRAWN for t in range(len(sequence))]
    error = critic.theta[[*map(STATES.index, states)]] - table(naive) - table(values)
    (wanted,) = torch.autograd.grad(error.square().mean() / 2, critic.theta)
    assert metrics["value_loss"] == pytest.approx(error.square().mean().item() / 2)
    assert metrics["grad_norm"] == pytest.approx(wanted.norm().item())  # before it is clipped
    torch.testing.assert_close(critic.theta.grad, wanted / wanted.norm() * 0.01)


def test_with_several_policy_steps_the_clip_acts_and_the_gradient_is_that_of_ppo():
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


def test_a_loss_that_is_not_finite_names_its_rollouts_and_changes_no_weight():
    policy, cfg = TabularPolicy(torch.zeros(len(STATES), TOKENS)), config(**MDP, pack_tokens=20)
    parts = mdp_parts(DRAWN, cfg)
    broken = [torch.full((len(s),), math.nan if s == (1, 1, 1) else 1.0) for s in DRAWN]
    put_column(parts, "advantages", broken)
    (pack,) = [p for p in sum(parts, []) if DRAWN.index((1, 1, 1)) in p.members]
    names = ", ".join(sorted(pack.names))
    with pytest.raises(FloatingPointError, match=f"step 9: .*loss.*in packs of {names};"):
        rl.train(learner(policy, 1.0), parts, partial(rl.policy_losses, cfg=cfg), 9)
    assert not policy.theta.any()


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
    """One critic pass and one policy step -> both models, metrics, packs."""
    rollouts, advantages = batch
    cfg = config(**UPDATE, pack_tokens=pack_tokens)
    policy = learner(load_model(mini.model), 0.02)
    critic = learner(load_model(mini.model, head="value"), 0.02, steps=4)
    nn.init.normal_(critic.model.value_head.weight, std=0.1, generator=seeded(0))
    parts, critic.norm = packed(rollouts, cfg), "critic_grad_norm"
    rl.critic_values(critic, sum(parts, []))
    put_column(parts, "advantages", advantages)
    put_column(parts, "returns", advantages)
    metrics = rl.train(critic, parts, rl.critic_losses, 0)
    metrics |= rl.train(policy, parts, partial(rl.policy_losses, cfg=cfg), 0)
    return policy.model, critic.model, metrics, sum(parts, [])


class Waits(TorchDispatchMode):
    """Counts what a host waits for: numbers read from a device, sizes that follow values."""

    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += any(n in str(operator) for n in ("_local_scalar_dense", "nonzero", "unique"))
        return operator(*args, **(kwargs or {}))


def test_the_update_does_not_depend_on_the_micro_batches_nor_on_shared_prompts(
    mini, batch, monkeypatch
):
    """Nor does it wait for the device more often where there are many."""
    monkeypatch.setattr(rl, "CLIP_NORM", 1e9)
    with monkeypatch.context() as patch:  # one pack a part, each document with its own prompt
        patch.setattr(packs, "make_pack", lambda *a, share_prompts, f=packs.make_pack: f(*a))
        *reference, reference_metrics, apart = update(mini, batch, 4096)
    assert not any(pack.expand is not None for pack in apart)
    before, waited = dict(load_model(mini.model).named_parameters()), set()
    for pack_tokens, count in ((36, 16), (100, 4), (4096, 1)):
        with Waits() as waits:
            *models, metrics, every = update(mini, batch, pack_tokens)
        waited.add(waits.count)
        assert len(every) >= count
        shared = any(pack.expand is not None for pack in every)
        assert shared or pack_tokens == 36  # which holds one document
        for model, other in zip(models, reference, strict=True):
            theirs = dict(other.named_parameters())
            for name, weight in model.named_parameters():
                assert name == "value_head.weight" or not torch.equal(weight, before[name]), name
                torch.testing.assert_close(weight, theirs[name], atol=1e-6, rtol=1e-4)
        for name in ("policy_loss", "grad_norm", "value_loss", "critic_grad_norm", "entropy"):
            assert metrics[name] == pytest.approx(reference_metrics[name], rel=1e-5), name
    assert len(waited) == 1 and waited != {0}


def test_a_step_is_described_by_means_with_pictures_and_text_apart():
    check = "<think> let me check . </think>"

    def rollout(image, status, tokens, stopped, text=""):
        problem, verdict = data.Problem("p", "?", "!", image), Verdict(0.0, status, "!")
        how = dict(stopped=stopped, text=text, verdict=verdict, reward=float(status == "match"))
        return Rollout(problem, 0, None, response_ids=[1] * tokens, **how)

    some = [rollout(("a.png",), "match", 4, True, check), rollout(("a.png",), "no_box", 8, False)]
    some += [rollout((), "match", 2, True, check), rollout((), "too_big", 2, True)]
    some += [rollout((), "unclosed", 4, True)]
    wanted = dict(reward=2 / 5, reward_image=1 / 2, reward_text=1 / 3)
    wanted |= dict(length=4, length_image=6, length_text=8 / 3, truncated=1 / 5)
    wanted |= dict(no_box=2 / 5, unparsed=1 / 5)
    wanted |= {"image/verification": 1 / 2, "text/verification": 1 / 3, "text/backtracking": 0}
    metrics = rl.describe(some)
    assert {name: metrics[name] for name in wanted} == pytest.approx(wanted)


def test_what_rows_ask_to_watch_is_counted_by_group():
    def rollout(group, text, reward):
        extra = {"group": group, "watch": {"check": r"\bcheck\b"}} if group else {}
        problem, verdict = data.Problem("p", "?", "!", extra=extra), Verdict(reward, "match", "!")
        return Rollout(problem, 0, None, text=text, verdict=verdict, reward=reward)

    watched = [rollout("a", "let me check", 1.0), rollout("a", "checked", 0.0)]
    metrics = rl.describe([*watched, rollout("b", "", 1.0), rollout("", "check", 0.0)])
    shown = {name: metrics[name] for name in metrics if name.endswith(("/a", "/b"))}
    assert shown == {"reward/a": 0.5, "check/a": 0.5, "reward/b": 1.0, "check/b": 0.0}


def test_a_reward_of_ones_own_that_fails_names_the_row(monkeypatch):
    monkeypatch.setattr(rl, "reward_of", lambda r: r.problem.extra["price"])
    problem = data.Problem("p", "?", "1", place="own.jsonl, line 3")
    with pytest.raises(RuntimeError, match="own.jsonl, line 3: reward_of .*KeyError.*price"):
        rl.give_rewards([Rollout(problem, 0, None, text="\\boxed{1}")])


def test_a_gap_between_sampler_and_trainer_that_is_no_number_stops_the_run():
    with pytest.raises(RuntimeError, match="step 7.*more than 0.001.*GAP_LIMITS.*--tis"):
        rl.refuse_gap(math.nan, ALONE, "step 7")


def test_the_trace_is_of_a_pictured_problem_with_right_and_wrong_samples_and_has_their_numbers(
    mini, batch
):
    """Of problems with (0, 2) and without a picture (1); of problem 2 as many right as wrong."""
    scores = {0: [0, 0], 1: [1, 0], 2: [1, 1, 1, 0, 0, 1]}
    rollouts = [
        replace(batch[0][2 * i], sample=n, reward=x, verdict=Verdict(x, "match", "!"))
        for i, rewards in scores.items()
        for n, x in enumerate(rewards)
    ]
    parts = packed(rollouts, config(**UPDATE, pack_tokens=64, critic_steps=1))
    for name, sign in (("values", 1), ("advantages", -1)):
        own = [sign * (torch.arange(len(r.response_ids)) + r.sample) for r in rollouts]
        put_column(parts, name, own)
    rows = batches.trace_rows(7, rollouts, sum(parts, []), data.load_tokenizer(mini.model))
    assert [(row["id"], row["sample"]) for row in rows] == [("train-2", n) for n in (0, 1, 3, 4)]
    for row in rows:
        assert row["values"] == [row["sample"] + t for t in range(row["length"])]
        assert row["advantages"] == [-value for value in row["values"]]


# ---- whole runs


def run(cfg: rl.Config) -> Path:
    rl.main(cfg)
    return Path(cfg.out)


@pytest.fixture
def cfg(mini, tmp_path) -> rl.Config:
    return config(model=mini.model, data=mini.train, out=str(tmp_path / "run"))


@pytest.fixture(scope="module")
def uninterrupted(mini, tmp_path_factory):
    out = tmp_path_factory.mktemp("rl") / "whole"
    return run(config(model=mini.model, data=mini.train, out=str(out)))


def lines_of(run: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run / f"{name}.jsonl").open()]


def metrics_of(run: Path) -> list[dict]:
    """Its steps, without what the machine decides."""
    rows, machine = lines_of(run, "metrics"), ("seconds", "peak_gb")
    return [{k: v for k, v in row.items() if not k.startswith(machine)} for row in rows]


def weights_of(directory: Path) -> dict:
    return load_file(directory / "model/model.safetensors")


def assert_same_weights(one: Path, other: Path):
    mine, theirs = weights_of(one), weights_of(other)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def assert_same_run(one: Path, other: Path, files: tuple = ()):
    """Bit for bit: metrics, weights, and these files."""
    assert metrics_of(one) == metrics_of(other)
    assert_same_weights(one, other)
    for name in files:
        assert (one / f"{name}.jsonl").read_text() == (other / f"{name}.jsonl").read_text()


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


def note(patch, calls: list, where, name: str, label=None):
    """Puts into `calls` what label() says of a call, or its name and the step that it samples."""
    function = getattr(where, name)

    def call(*rest, **more):
        named = name, *more.get("seed", (0,))[1:]  # the canary has no step
        calls.append(label(*rest, **more) if label else named)
        return function(*rest, **more)

    patch.setattr(where, name, call)


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
    assert [row["lr"] for row in rows] == [5e-4, 1e-3, 1e-3, 1e-3]
    before, after = load_file(Path(mini.model) / "model.safetensors"), weights_of(uninterrupted)
    for name, weight in after.items():
        assert torch.equal(weight, before[name]) == name.startswith("visual."), name


def test_settings_reach_what_they_set(mini, cfg, monkeypatch):
    """Each of them could be dropped on the way, and all other runs would still agree."""
    own = dict(lr=2e-3, critic_lr=7e-3, critic_steps=2, lam=0.5, seed=5, save_every=1)
    own |= dict(keep_every=2, recompute="full", compile=True)
    cfg, seen, gae, blocks = replace(cfg, **own), set(), rl.gae, []
    monkeypatch.setattr(distributed, "recompute_blocks", lambda _, kind: blocks.append(kind))
    monkeypatch.setattr(distributed, "compile_blocks", lambda _: blocks.append("compiled"))
    for name, *wanted in (("policy", 2e-3, 1), ("critic", 7e-3, 2)):
        learner = rl.load_models(cfg, mini.model, ALONE)[name]
        (group,) = learner.optimizer.param_groups
        assert [learner.lr, learner.steps] == wanted
        assert (group["betas"], group["weight_decay"]) == (rl.BETAS, rl.WEIGHT_DECAY)
    monkeypatch.setattr(rl, "gae", lambda *given: seen.add(given[3:]) or gae(*given))
    note(monkeypatch, seeds := [], Sampler, "generate", lambda *_, **how: how.get("seed"))
    rows = lines_of(run(cfg), "rollouts")
    assert seen == {(rl.GAMMA, 0.5)} and {*blocks} == {"full", "compiled"}
    assert [seed for seed in seeds if seed] == [(5, step) for step in range(4)]  # canary: none
    first = data.Stream(data.read_problems(mini.train), 5).batch(0, 4)
    assert {row["id"] for row in rows if row["step"] == 0} == {problem.id for problem in first}
    kept = sorted(model.parent.name for model in Path(cfg.out).glob("checkpoints/*/model"))
    assert kept == [f"step_{step:06}" for step in (2, 3, 4)]


def test_a_step_whose_log_probs_are_not_the_trainers_stops_the_run(cfg, monkeypatch):
    """Those of its own tokens; the canary's are right, and notice nothing."""
    generate = Sampler.generate

    def off(*given, **how):
        rollouts = generate(*given, **how)
        for r in rollouts if "seed" in how else ():
            r.logps = [logp - 1 for logp in r.logps]
        return rollouts

    monkeypatch.setattr(Sampler, "generate", off)
    with pytest.raises(RuntimeError, match="step 0: .* 1 nats"):
        run(replace(cfg, steps=1))


def test_a_response_that_was_cut_is_wrong_even_if_it_was_right_so_far(mini, cfg, monkeypatch):
    monkeypatch.setattr(rl, "grade", lambda *a, **k: Verdict(1.0, "match", "7"))
    out = run(replace(cfg, data=mini.text, steps=1))  # and no picture is wanted
    assert {r["reward"]: r["stopped"] for r in lines_of(out, "rollouts")} == {1: True, 0: False}
    (row,) = metrics_of(out)
    assert row["reward"] == row["reward_text"] == pytest.approx(1 - row["truncated"])
    assert "reward_image" not in row


def test_the_trace_of_a_run_has_the_numbers_of_its_tokens_and_reads_as_six_steps(uninterrupted):
    rows = lines_of(uninterrupted, "trace")
    assert {row["step"] for row in rows} == {0, 1, 2, 3}
    for row in rows:
        columns = [row[name] for name in ("tokens", "logps", "values", "advantages")]
        assert {len(column) for column in columns} == {row["length"]}
    screen = trace.page(batches.read_trace(uninterrupted, -1))
    for step in ("1 sample", "2 reward", "3 pack", "4 advantages", "5 update", "6 sync"):
        assert step in screen


def test_a_step_to_show_is_the_last_in_which_samples_differ_and_one_that_is_not_there_is_refused(
    tmp_path,
):
    def shown(*rewards, step=-1):
        rows = [{"step": k, "reward": r} for k, of_step in enumerate(rewards) for r in of_step]
        (tmp_path / "trace.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {row["step"] for row in batches.read_trace(tmp_path, step)}

    assert shown([0, 1], [1, 0], [1, 1], [0, 0]) == {1}
    assert shown([0, 0], [1, 1]) == {1}
    assert shown([0, 0], [1, 1], step=0) == {0}
    with pytest.raises(ValueError, match="step 9 is not there; there are 0 to 1"):
        shown([0, 0], [1, 1], step=9)
    with pytest.raises(ValueError, match="there are none"):
        shown()


@pytest.mark.parametrize(
    "how, save_every, saved, oldest", [("ctrl-c", 0, 4, 0), ("killed", 2, 2, 1)]
)
def test_a_run_that_was_cut_off_in_its_last_step_goes_on_bit_for_bit_and_samples_nothing_twice(
    cfg, uninterrupted, monkeypatch, capsys, how, save_every, saved, oldest
):
    """The sampler rests before the update also where rollouts were read: a sync has woken it."""
    cfg, out = replace(cfg, save_every=save_every), Path(cfg.out)
    cut_off(cfg, how, 3)
    assert ("to resume" in capsys.readouterr().out) == (how == "ctrl-c")
    assert checkpoint.complete_steps(out) == [saved] and not (out / "model").exists()
    torch.manual_seed(12345)  # nothing may hang on the global state of a process
    calls, of_sampler = [], ((Sampler, "generate"), (TorchSampler, "rest"), (TorchSampler, "sync"))
    for where, name in (*of_sampler, (rl, "critic_values")):
        note(monkeypatch, calls, where, name)
    assert_same_run(run(cfg), uninterrupted, ("rollouts", "trace", "lengths"))
    sync = [("sync",), ("generate",)]  # for the canary
    steps = [("rest",), ("critic_values",), *sync] * (4 - saved)
    assert calls == [("rest",), *sync, *steps]
    kept = sorted(file.name for file in (out / "rollouts").iterdir())  # what a resume may read
    assert kept == [f"step_{step:06}.npz" for step in range(oldest, 4)]


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
    assert_same_run(run(cfg), uninterrupted)
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
    assert ended == Counter(every) and not going_on


def test_with_a_finish_share_nothing_is_lost_doubled_or_graded_half_way(mini, tailed):
    account(tailed, mini, config(**TAIL))
    rows = metrics_of(tailed)
    assert min(row["unfinished"] for row in rows[:-1]) > 0
    assert max(row["stale_tokens"] for row in rows) > 0.1
    assert max(row["clip_fraction"] for row in rows) > 0 == rows[0]["ratio_diff"]


@pytest.mark.parametrize("how, at", [("ctrl-c", 2), ("killed", 3)])
def test_responses_that_were_put_aside_go_on_bit_for_bit_where_a_run_is_resumed(
    cfg, tailed, how, at
):
    """Killed in step 3, whose record and that of the step before the checkpoint are read."""
    cfg = replace(cfg, **TAIL)
    cut_off(cfg, how, at)
    assert_same_run(run(cfg), tailed, ("rollouts", "trace", "lengths"))


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

    def moved(model, optimizer, device, for_moments=None):
        part = "whole" if for_moments is None else "weights"
        kind = "policy" if model.value_head is None else "critic"
        return kind, "in host memory" if device == "cpu" else part

    def tried(model, optimizer, pack, *more):
        return "rehearse", len(pack.ids)

    calls, start = [], []
    for where, name in ((distributed, "load"), (Sampler, "generate"), (TorchSampler, "sync")):
        note(monkeypatch, calls, where, name)
    note(monkeypatch, calls, distributed, "move", moved)
    note(monkeypatch, calls, distributed, "rehearse", tried)
    for name in ("policy", "critic"):
        start += [("load",), (name, "in host memory")]
    for name in ("policy", "critic"):
        start += [(name, "whole"), ("rehearse", 128), (name, "in host memory")]
    sync = [("policy", "weights"), ("sync",), ("generate",), ("policy", "in host memory")]
    update = [("critic", "whole"), ("critic", "in host memory"), ("policy", "whole")]
    cfg = replace(cfg, save_every=1, offload=True)
    out = run(replace(cfg, steps=1))
    assert calls == [*start, *sync, ("generate", 0), *update, *sync, ("policy", "whole")]
    calls.clear()
    shutil.rmtree(out / "model")
    run(replace(cfg, steps=2))  # a resume
    assert calls[: len(start + sync) + 1] == [*start, *sync, ("generate", 1)]


def test_evaluation_on_the_way_is_eval_pys_and_changes_no_number_of_the_run(
    mini, cfg, uninterrupted, tmp_path
):
    watched = run(replace(cfg, eval_data=mini.test, eval_every=3))
    rows, names = metrics_of(watched), ("eval_image", "eval_text")
    assert [[name in row for name in names] for row in rows] == [[False] * 2] * 2 + [[True] * 2] * 2
    others = [{k: v for k, v in row.items() if k not in names} for row in rows]
    assert others == metrics_of(uninterrupted)
    assert_same_weights(watched, uninterrupted)
    how = dict(data=mini.test, sampler="torch", max_tokens=12, out=str(tmp_path / "eval"))
    eval.main(eval.Config(model=str(watched / "model"), **how))
    pictured = {row["id"] for row in map(json.loads, Path(mini.test).open()) if row["images"]}
    scores = {name: [] for name in names}
    for row in lines_of(tmp_path / "eval", "graded"):
        scores[names[row["id"] not in pictured]].append(row["score"])
    for name in names:
        assert rows[-1][name] == pytest.approx(sum(scores[name]) / len(scores[name]))


def test_grpo_gives_each_token_its_groups_advantage(batch):
    rewards = [1, 0, 0, 0, 1, 1, 0, 1, 1, 0, 0, 1, 0, 0, 1, 1]
    rollouts = [replace(r, reward=x) for r, x in zip(batch[0], rewards, strict=True)]
    (part,) = packed(rollouts, config(**UPDATE, pack_tokens=64, algorithm="grpo"))
    part.append(packs.rollout_pack([], []))
    assert rl.compare_samples(rollouts, part, samples=2)["no_contrast"] == 4
    wanted = rl.group_advantages(torch.tensor(rewards).view(8, 2).float()).flatten().tolist()
    for pack in part:
        for i, got in zip(pack.members, pack.advantages.split(pack.counts), strict=False):
            assert got.tolist() == [wanted[i]] * len(rollouts[i].response_ids)


def test_groups_without_contrast_give_way_to_other_problems_round_by_round():
    """By hand: of four groups two; of the two that take over one, which the second round replaces;
    what has no contrast after that stays."""

    def group(index: int, *scores: int) -> list[Rollout]:
        problem, own = data.Problem(f"p{index}", "?", "1"), dict(index=index, stopped=True)
        texts = [f"\\boxed{{{score}}}" for score in scores]
        return [Rollout(problem, n, None, text=text, **own) for n, text in enumerate(texts)]

    cfg, calls = config(algorithm="grpo", samples=2, resample=2), []
    batch = group(12, 0, 0) + group(13, 1, 0) + group(14, 1, 1) + group(15, 0, 1)  # of step 3
    rl.give_rewards(batch)
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
    assert_same_run(run(cut), whole, ("rollouts",))
    assert not [call for call in calls if len(call) > 1]  # all is recorded


def test_problems_that_cannot_be_trained_on_are_left_out_with_a_count_or_refused(mini, cfg, capsys):
    tools = data.load_tokenizer(mini.model), data.load_image_settings(mini.model)
    words = rl.load_problems(mini.train, replace(cfg, prompt_tokens=26), ALONE, *tools)
    assert "6 problems left out: prompts over 26 tokens" in capsys.readouterr().out
    assert len(words) == 6 and not any(p.images for p in words)  # which take more tokens
    with pytest.raises(ValueError, match="12 problems left out: .* 3 tokens, and none is left"):
        rl.load_problems(mini.train, replace(cfg, prompt_tokens=3), ALONE, *tools)


def test_each_rank_decodes_the_pictures_of_its_share_alone(mini, cfg, monkeypatch):
    """All rows on every rank took 19 minutes a start. Rank 1 of 2 has the rows without pictures."""
    tools = data.load_tokenizer(mini.model), data.load_image_settings(mini.model)
    seen, load_image = [], data.load_image
    monkeypatch.setattr(data, "load_image", lambda *given: seen.append(given) or load_image(*given))
    for rank, pictures in ((0, 6), (1, 0)):
        rl.load_problems(mini.train, cfg, replace(ALONE, rank=rank, size=2), *tools)
        assert len(seen) == pictures
        seen.clear()
