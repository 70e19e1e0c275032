"""rollout.py: the torch sampler against the trainer's forward and arithmetic; the canary; a step's
rollouts on disk.

The miniature's model with random weights: one sample in three ends by chance within 60 tokens, so
rows leave the batch at all times. Its vocabulary has rows behind the last word, as Qwen2.5-VL's.
"""

import math
from dataclasses import replace

import pytest
import torch
from PIL import Image

from common import data
from common.batches import load_rollouts, save_rollouts
from common.data import ImageSettings, Problem
from common.packs import make_pack
from miniature import base, world
from model import Qwen25VL
from reward import Verdict, grade
from rollout import TorchSampler, canary, canary_gap

SETTINGS = ImageSettings(28 * 28, 28 * 28 * 64, 14, 2, 2, (0.5,) * 3, (0.25,) * 3)
WIDTH = 48
SIZES = ((101, 77), (56, 28), (333, 215))  # most need a resize
PICTURES = tuple(Image.effect_noise(size, 90).convert("RGB") for size in SIZES)
PROBLEMS = [  # not in the order of their lengths, which is that of a pack
    Problem("long", "table paper small line here there next to on in one by side page", "3"),
    Problem("short", "A B", "1"),
    Problem("image", "what is <image> in 3 4", "2", images=PICTURES[:1]),
    Problem("two", "what is", "2", images=PICTURES[1:]),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    world.save_tokenizer(folder := tmp_path_factory.mktemp("tokenizer"))
    return data.load_tokenizer(folder)


def build(tokenizer, seed=0):
    config = base.model_config(len(tokenizer) + 9)
    small = dict(hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2)
    vision = replace(config.vision, out_hidden_size=WIDTH)
    torch.manual_seed(seed)
    return Qwen25VL(replace(config, **small, mrope_section=(2, 2, 2), vision=vision))


@pytest.fixture(scope="module")
def forbidden(tokenizer):
    pictures = tokenizer.convert_tokens_to_ids([*data.VISION])
    return [*pictures, *range(len(tokenizer), len(tokenizer) + 9)]


@pytest.fixture(scope="module")
def model(tokenizer):
    return build(tokenizer)


@pytest.fixture(scope="module")
def sampler(model, tokenizer):
    return TorchSampler(model, tokenizer, SETTINGS)


def ids_of(rollouts):
    return {(r.index, r.sample): r.response_ids for r in rollouts}


@torch.no_grad()
def gap(rollouts, model) -> float:
    """Largest difference between the sampler's log-probs and those of the packed forward."""
    largest = 0.0
    for r in rollouts:
        logps, _ = model.logps(make_pack([r.document]))
        largest = max(largest, (torch.tensor(r.logps) - logps).abs().max().item())
    return largest


def assert_same(some, others):
    """The same tokens, and the same log-probs to rounding."""
    by_name = {r.name: r for r in others}
    for r in some:
        other = by_name[r.name]
        assert r.response_ids == other.response_ids and r.stopped == other.stopped
        assert torch.tensor(r.logps).sub(torch.tensor(other.logps)).abs().max() < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_the_packed_forward_whatever_the_temperature(
    sampler, model, temperature
):
    rollouts = sampler.generate(PROBLEMS, 6, max_tokens=60, temperature=temperature)
    assert sum(len(r.response_ids) for r in rollouts) > 500
    assert gap(rollouts, model) < 1e-5


def test_problems_are_taken_in_the_order_of_the_indices_when_there_is_room(tokenizer):
    """Ranks share a counter: one that took all problems at once would leave the others idle."""
    sampler, log = TorchSampler(build(tokenizer), tokenizer, SETTINGS, batch=5), []
    # each batch has a picture, and its prompts are read at once
    sampler.model.visual.register_forward_pre_hook(lambda *_: log.append("batch"))
    indices = (log.append(i) or i for i in (3, 1, 0, 2))
    rollouts = sampler.generate(PROBLEMS, 2, max_tokens=4, indices=indices)
    assert log == [3, 1, "batch", 0, 2, "batch"]
    assert [(r.index, r.sample) for r in rollouts] == [(i, n) for i in (3, 1, 0, 2) for n in (0, 1)]
    assert all(r.problem is PROBLEMS[r.index] for r in rollouts)
    assert sampler.generate(PROBLEMS, 2, indices=[]) == []


def test_the_prompt_and_its_pictures_are_read_once_whatever_the_samples(tokenizer):
    sampler, tokens, patches = TorchSampler(build(tokenizer), tokenizer, SETTINGS), [], []
    first = sampler.model.model.layers[0]
    first.register_forward_pre_hook(lambda _, inputs: tokens.append(len(inputs[0])))
    sampler.model.visual.register_forward_pre_hook(lambda _, inputs: patches.append(len(inputs[0])))
    rollouts = sampler.generate(PROBLEMS, 8, max_tokens=50)
    prompts = [r.prompt for r in rollouts[::8]]
    assert patches == [sum(len(p.patches) for p in prompts if p.patches is not None)]
    # Then every token but the last of a row is fed once, and rows that have ended are fed no more.
    assert tokens[0] == sum(len(p.ids) for p in prompts)
    assert sum(tokens[1:]) == sum(len(r.response_ids) - 1 for r in rollouts)


def test_a_response_ends_with_a_stop_token_of_config_json_or_is_cut(tokenizer):
    """Some files list several."""
    model, ends = build(tokenizer), set()
    other = tokenizer.convert_tokens_to_ids("A")
    model.config = replace(model.config, eos_token_id=(tokenizer.eos_token_id, other))
    for r in TorchSampler(model, tokenizer, SETTINGS).generate(PROBLEMS, 16, max_tokens=60):
        stops = [token in model.config.stop_ids for token in r.response_ids]
        assert not any(stops[:-1]) and stops[-1] == r.stopped
        assert r.stopped or len(stops) == 60
        words = tokenizer.convert_ids_to_tokens(r.response_ids)
        assert r.text == " ".join(word for word in words if word not in data.MARKUP)
        ends.add(r.response_ids[-1] if r.stopped else None)
    assert ends == {*model.config.stop_ids, None}


def test_a_rollout_depends_on_its_address_alone(sampler, model, tokenizer):
    whole = sampler.generate(PROBLEMS, 5, max_tokens=60, seed=(3, 7))
    for batch in (1, 7):
        small = TorchSampler(model, tokenizer, SETTINGS, batch=batch)
        assert_same(small.generate(PROBLEMS[::-1], 5, max_tokens=60, seed=(3, 7)), whole)
    some = sampler.generate(PROBLEMS, 5, max_tokens=60, seed=(3, 7), indices=[2, 0])
    assert len(some) == 10
    assert_same(some, whole)
    first = ids_of(whole)
    assert len({*map(tuple, first.values())}) == len(whole)
    for seed in ((3, 8), (2, 7), (37,), (3, 7, 0)):
        other = ids_of(sampler.generate(PROBLEMS, 5, max_tokens=60, seed=seed))
        assert all(other[key] != first[key] for key in first)


def test_a_problem_that_stands_twice_in_a_batch_is_sampled_anew(sampler):
    once = sampler.generate(PROBLEMS, 4, max_tokens=30)
    batch = [*PROBLEMS, PROBLEMS[0], *PROBLEMS, replace(PROBLEMS[1], prompt="B")]  # an equal id
    rollouts = sampler.generate(batch, 4, max_tokens=30)
    assert len({tuple(r.response_ids) for r in rollouts if r.index in (0, 4, 5)}) == 12
    assert_same(rollouts[:16], once)  # the first one of each is sampled as if it stood alone
    some = sampler.generate(batch, 4, max_tokens=30, indices=[5, 9])  # as another rank does it
    assert [r.response_ids for r in some] == [r.response_ids for r in rollouts if r.index in (5, 9)]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_first_tokens_of_many_samples_follow_the_model(sampler, model, forbidden, temperature):
    """The whole path: prompts, addressed numbers, draws; forbidden tokens share out theirs."""
    rollouts = sampler.generate(PROBLEMS[2:3], 4000, 1, temperature)
    pack = make_pack([rollouts[0].document])
    with torch.no_grad():
        logits = model.logits(pack, pack.rows).double()[0]
    probabilities = (logits / temperature).softmax(0)
    probabilities[forbidden] = 0
    tokens = torch.tensor([r.response_ids[0] for r in rollouts])
    expected = len(tokens) * probabilities / probabilities.sum()
    likely = expected > 5
    misses = (tokens.bincount(minlength=len(expected)) - expected)[likely]
    freedom = int(likely.sum()) - 1  # the mean of chi square, and half its variance
    assert abs((misses**2 / expected[likely]).sum() - freedom) < 4 * math.sqrt(2 * freedom)


def test_forbidden_tokens_are_never_drawn_even_if_the_model_wants_nothing_else(
    tokenizer, forbidden
):
    """Picture tokens, and rows of the vocabulary that are no token of the tokenizer."""
    model, wish, words = build(tokenizer), 100 * torch.randn(WIDTH), ("2", "wait")
    with torch.no_grad():
        for token in (0, -2):  # hidden states point along the wish or against it
            model.lm_head.weight[forbidden[token]] = wish
            model.lm_head.weight[forbidden[token + 1]] = -wish
    sampler = TorchSampler(model, tokenizer, SETTINGS, forbid=words)
    more = {*forbidden, *tokenizer.convert_tokens_to_ids(words)}
    assert sampler.forbidden.tolist() == sorted(more)
    for temperature in (1.0, 0.0):
        rollouts = sampler.generate(PROBLEMS, 8, max_tokens=20, temperature=temperature)
        assert not {token for r in rollouts for token in r.response_ids} & more
        assert min(x for r in rollouts for x in r.logps) < -50  # of the unmasked distribution
    with pytest.raises(ValueError, match="--forbid 'wait 2': the tokenizer has no single token"):
        TorchSampler(model, tokenizer, SETTINGS, forbid=("wait 2",))


@pytest.mark.parametrize("temperature", [1.0, 0.0])
@pytest.mark.parametrize(
    "name, place, value, message",
    [
        ("lm_head.weight", ..., 3e38, "long#0: .* token 1 .*infinity: none"),  # products overflow
        ("visual.merger.ln_q.weight", 3, math.inf, "image#0: .* token 1 .*visual.merger"),
        ("model.embed_tokens.weight", slice(66, 91), math.nan, ".* token [2-9].*embed_t"),
    ],
)
def test_logits_that_are_not_finite_are_named(tokenizer, name, place, value, message, temperature):
    """Problem, token and weight; and before a token out of bounds is drawn from them."""
    model = build(tokenizer)
    model.get_parameter(name).data[place] = value
    with pytest.raises(FloatingPointError, match=f"^{message}.*--lr"):
        TorchSampler(model, tokenizer, SETTINGS).generate(PROBLEMS, 32, 40, temperature)


def test_sync_gives_the_log_probs_of_the_new_weights_and_the_canary_notices_old_ones(tokenizer):
    sampler, policy = TorchSampler(build(tokenizer), tokenizer, SETTINGS), build(tokenizer, seed=1)
    problem = canary(PROBLEMS, tokenizer, SETTINGS, 512)
    assert canary_gap(sampler, policy, problem, vision=False) > 0.01
    sampler.sync(policy.named_parameters())
    assert canary_gap(sampler, policy, problem, vision=True) < 1e-5
    after = sampler.generate(PROBLEMS, 3, max_tokens=30)
    assert gap(after, policy) < 1e-5
    with torch.no_grad():
        policy.lm_head.weight.zero_()  # a copy, not a reference
    assert_same(sampler.generate(PROBLEMS, 3, max_tokens=30), after)
    with pytest.raises(KeyError, match="model.layers.9.odd"):
        sampler.sync([("model.layers.9.odd", torch.zeros(1))])


def test_the_canary_shows_a_picture_and_fills_a_block_of_the_prefix_cache(tokenizer):
    for limit in (512, 100):
        problem = canary(PROBLEMS, tokenizer, SETTINGS, limit)
        length = data.prompt_length(problem, tokenizer, SETTINGS)
        assert problem.images and min(limit - 20, 160) <= length <= limit


def test_saved_rollouts_come_back_bit_for_bit_for_the_same_problems(sampler, tokenizer, tmp_path):
    rollouts, file = sampler.generate(PROBLEMS, 3, max_tokens=30), tmp_path / "step_000007.npz"
    for r in rollouts:
        r.verdict = grade(r.problem.answer, f"{r.text} \\boxed{{{r.sample}}}")
        r.reward = r.verdict.score * r.stopped + 0.1  # one's own may be any number
    rollouts[4].verdict = Verdict(0.0, "too_big", "é\x00" * 9999)  # as a model may write it
    rollouts[5].verdict = None
    save_rollouts(file, rollouts)
    assert [*tmp_path.iterdir()] == [file]
    assert file.stat().st_size < 200_000  # a long answer takes its own room, not everyone's
    loaded = load_rollouts(file, PROBLEMS, tokenizer, SETTINGS)
    for one, other in zip(loaded, rollouts, strict=True):
        assert replace(one, prompt=other.prompt) == other  # a prompt holds a tensor
        assert one.document.ids == other.document.ids
    others = [*PROBLEMS[:2], Problem("new", "A", "1"), PROBLEMS[3]]
    with pytest.raises(ValueError, match=f"{file} is of other problems .* delete"):
        load_rollouts(file, others, tokenizer, SETTINGS)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{file} is damaged .*delete it"):
        load_rollouts(file, PROBLEMS, tokenizer, SETTINGS)


def test_a_rollout_that_is_interrupted_again_and_again_ends_like_one_that_is_not(
    sampler, model, tokenizer, tmp_path
):
    """Weights stay: then its numbers go on where they stopped. Problems are a batch's places in a
    stream; on the way the unfinished ones are written and read, as where a run resumes.
    """
    stream, file = data.Stream(PROBLEMS, seed=5), tmp_path / "step.npz"
    problems, ended, rounds = {i: stream[i] for i in range(8, 12)}, [], 0
    whole = sampler.generate(problems, 6, max_tokens=60)
    small = TorchSampler(model, tokenizer, SETTINGS, batch=11)  # a problem's rest may be divided
    how = dict(enough=lambda ended, of: ended >= 0.1 * of)
    while len(ended) < 24:
        rollouts = small.generate(problems, 6, 60, **how)
        save_rollouts(file, rollouts)
        unfinished = load_rollouts(file, stream, tokenizer, SETTINGS, unfinished=True)
        how |= dict(unfinished=unfinished, indices=[*{r.index: 0 for r in unfinished}][::-1])
        ended, rounds = ended + [r for r in rollouts if not r.unfinished], rounds + 1
        assert len(ended) + len(unfinished) == 24
    assert rounds > 3 and {r.stale > 0 for r in ended} == {True, False}
    assert_same(ended, whole)
    assert {r.text for r in ended} == {r.text for r in whole}
