"""rollout.py: the sampler against the trainer's forward, transformers' generate and arithmetic.

A model of random weights over 40 words: its samples end by chance after some 40 tokens, so rows
leave the batch at all times. What is drawn is compared exactly, log-probs to 1e-5.
"""

import math

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from common import data
from common.data import ImageSettings, Problem
from model import Config, KVCache, Qwen25VL, VisionConfig, save_model
from rollout import Rollout, TorchSampler, draw_tokens, row_generator

SETTINGS = ImageSettings(28 * 28, 28 * 28 * 64, 14, 2, 2, (0.5,) * 3, (0.25,) * 3)
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|> <|image_pad|> <|vision_end|> "
    "{% else %}{{ c['text'] }} {% endif %}{% endfor %}<|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant{% endif %}"
)
LETTERS = [chr(c) for c in range(ord("a"), ord("z") + 1)]
WORDS = [*LETTERS, "user", "assistant", "[UNK]", "1", "2", "3", *data.MARKUP]


def picture(width, height):
    return Image.effect_noise((width, height), 90).convert("RGB")


PROBLEMS = [  # not in the order of their lengths, which is that of a pack
    Problem("long", " ".join(LETTERS), "3"),
    Problem("short", "a b", "1"),
    Problem("image", "what is <image> in c d e", "2", images=(picture(140, 84),)),
    Problem("two", "f g", "2", images=(picture(56, 28), picture(196, 140))),
]


@pytest.fixture(scope="module")
def tokenizer():
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=data.STOP)
    made.add_special_tokens({"additional_special_tokens": list(data.MARKUP)})
    made.chat_template = TEMPLATE
    return made


def build(tokenizer, seed=0):
    names = ("vision_start", "vision_end", "vision", "image", "video")
    special = {f"{n}_token_id": WORDS.index(t) for n, t in zip(names, data.VISION, strict=True)}
    config = Config(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(WORDS),
        mrope_section=(2, 2, 2),
        vision=VisionConfig(2, 32, 40, 2, out_hidden_size=48, fullatt_block_indexes=(1,)),
        bos_token_id=WORDS.index("<|endoftext|>"),
        eos_token_id=tokenizer.eos_token_id,
        **special,
    )
    torch.manual_seed(seed)
    return Qwen25VL(config)


@pytest.fixture(scope="module")
def model(tokenizer):
    return build(tokenizer)


@pytest.fixture(scope="module")
def sampler(model, tokenizer):
    return TorchSampler(model, tokenizer, SETTINGS)


def drawn(rollouts):
    return {(r.problem.id, r.sample): r.response_ids for r in rollouts}


def assert_same(some, others):
    """The same tokens, and the same log-probs to rounding."""
    found = {(r.problem.id, r.sample): r for r in others}
    for r in some:
        other = found[r.problem.id, r.sample]
        assert r.response_ids == other.response_ids and r.stopped == other.stopped
        assert torch.tensor(r.logps).sub(torch.tensor(other.logps)).abs().max() < 1e-5


# ---- the trainer's view


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_of_the_sampler_equal_those_of_the_packed_forward(sampler, model, temperature):
    rollouts = sampler.generate(PROBLEMS, 6, max_tokens=60, temperature=temperature)
    documents = [r.document for r in rollouts]
    packs = data.pack(documents, 400)
    assert len(packs) > 2 and any(pack.patches is not None for pack in packs)
    seen = 0
    for pack in packs:
        with torch.no_grad():
            logps, _ = model(
                **pack.inputs, rows=pack.rows, targets=pack.targets, temperature=temperature
            )
        sampled = torch.tensor([x for i in pack.members for x in rollouts[i].logps])
        assert (logps - sampled).abs().max() < 1e-5
        seen += len(sampled)
    assert seen == sum(len(r.response_ids) for r in rollouts) > 500


def test_each_token_carries_one_log_prob_and_none_a_vision_token(sampler):
    for r in sampler.generate(PROBLEMS, 8, max_tokens=50):
        assert isinstance(r, Rollout) and len(r.response_ids) == len(r.logps) > 0
        assert all(x < 0 for x in r.logps)
        assert not set(r.response_ids) & set(sampler.model.config.vision_token_ids)


def test_rollouts_come_problem_by_problem_and_sample_by_sample(sampler):
    rollouts = sampler.generate(PROBLEMS, 3, max_tokens=2)
    wanted = [(problem.id, i) for problem in PROBLEMS for i in range(3)]
    assert [(r.problem.id, r.sample) for r in rollouts] == wanted


def test_turns_say_which_problems_are_done_and_the_index_which_one_it_was(sampler):
    rollouts = sampler.generate(PROBLEMS, 2, max_tokens=30, turns=[2, 0, 3])
    assert [(r.index, r.sample) for r in rollouts] == [(i, n) for i in (2, 0, 3) for n in (0, 1)]
    assert all(r.problem is PROBLEMS[r.index] for r in rollouts)
    whole = sampler.generate(PROBLEMS, 2, max_tokens=30)
    assert [r.index for r in whole] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert_same(rollouts, whole)
    assert sampler.generate(PROBLEMS, 2, max_tokens=30, turns=[]) == []


def test_turns_are_taken_a_batch_at_a_time(model, tokenizer, monkeypatch):
    """Ranks share a counter: one that took all turns at once would leave the others idle."""
    sampler, log = TorchSampler(model, tokenizer, SETTINGS, batch=5), []
    fill = sampler._fill
    monkeypatch.setattr(sampler, "_fill", lambda *a: (log.append("batch"), fill(*a)))

    def turns():
        for i in (3, 1, 0, 2):
            log.append(i)
            yield i

    sampler.generate(PROBLEMS, 2, max_tokens=4, turns=turns())
    assert log == [3, 1, "batch", 0, 2, "batch"]


def test_text_is_the_response_without_its_stop_token(sampler, tokenizer):
    for r in sampler.generate(PROBLEMS, 8, max_tokens=80):
        ids = [token for token in r.response_ids if token < WORDS.index(data.VISION[0])]
        assert r.text == " ".join(WORDS[token] for token in ids)


# ---- where a response ends


def test_the_stop_token_ends_a_response_and_belongs_to_it(sampler, tokenizer):
    rollouts = sampler.generate(PROBLEMS, 16, max_tokens=40)
    stop = tokenizer.eos_token_id
    ended = [r for r in rollouts if r.stopped]
    assert 10 < len(ended) < len(rollouts) - 10
    assert all(r.response_ids[-1] == stop and stop not in r.response_ids[:-1] for r in ended)
    assert any(len(r.response_ids) == 1 for r in sampler.generate(PROBLEMS[:1], 200, max_tokens=2))


def test_a_response_cut_at_max_tokens_has_not_stopped(sampler, tokenizer):
    for limit in (1, 2, 40):
        cut = [r for r in sampler.generate(PROBLEMS, 16, max_tokens=limit) if not r.stopped]
        assert cut and all(len(r.response_ids) == limit for r in cut)
        assert all(tokenizer.eos_token_id not in r.response_ids for r in cut)


def test_a_stop_token_in_the_last_place_has_stopped(sampler):
    long = sampler.generate(PROBLEMS, 4, max_tokens=200)
    one = next(r for r in long if r.stopped and len(r.response_ids) > 3)
    exact = sampler.generate(PROBLEMS, 4, max_tokens=len(one.response_ids))
    again = next(r for r in exact if (r.problem, r.sample) == (one.problem, one.sample))
    assert again.stopped and again.response_ids == one.response_ids


def test_a_longer_limit_only_goes_on_where_the_shorter_one_cut(sampler):
    short = sampler.generate(PROBLEMS, 8, max_tokens=10)
    long = drawn(sampler.generate(PROBLEMS, 8, max_tokens=50))
    for r in short:
        assert long[r.problem.id, r.sample][: len(r.response_ids)] == r.response_ids


# ---- randomness


def test_a_rollout_does_not_depend_on_what_else_is_in_the_batch(sampler):
    together = sampler.generate(PROBLEMS, 5, max_tokens=60, seed=(3, 7))
    assert_same(sampler.generate(PROBLEMS[::-1], 5, max_tokens=60, seed=(3, 7)), together)
    for problem in PROBLEMS:
        assert_same(sampler.generate([problem], 2, max_tokens=60, seed=(3, 7)), together)


@pytest.mark.parametrize("batch", [1, 5, 7, 15])
def test_a_rollout_does_not_depend_on_the_batch_size(sampler, model, tokenizer, batch):
    whole = sampler.generate(PROBLEMS, 5, max_tokens=60)
    small = TorchSampler(model, tokenizer, SETTINGS, batch=batch)
    assert_same(small.generate(PROBLEMS, 5, max_tokens=60), whole)


def test_the_same_seed_draws_the_same_and_another_something_else(sampler):
    first = drawn(sampler.generate(PROBLEMS, 4, max_tokens=30, seed=(1, 2)))
    assert drawn(sampler.generate(PROBLEMS, 4, max_tokens=30, seed=(1, 2))) == first
    for seed in ((1, 3), (2, 2), (12,), (1, 2, 0)):
        other = drawn(sampler.generate(PROBLEMS, 4, max_tokens=30, seed=seed))
        assert all(other[key] != first[key] for key in first)
    samples = [first["short", i] for i in range(4)]
    assert len({tuple(ids) for ids in samples}) == 4


def test_rows_of_different_addresses_draw_independent_numbers():
    addresses = [
        ((s, t), f"p{i}", n) for s in (0, 1) for t in (0, 1) for i in (0, 1, 2) for n in range(16)
    ]
    rows = [torch.rand(200, generator=row_generator(*a), dtype=torch.float64) for a in addresses]
    rows = torch.stack(rows)
    assert len(rows.unique(dim=0)) == len(addresses) == 192
    correlation = torch.corrcoef(rows).fill_diagonal_(0).abs()
    assert correlation.max() < 5.5 / math.sqrt(200)  # 18,336 pairs; 1 / sqrt(200) is one deviation
    firsts = rows[:, 0].sort().values  # Kolmogorov-Smirnov over the rows' first numbers
    assert (firsts - (torch.arange(192) + 0.5) / 192).abs().max() < 1.95 / math.sqrt(192)


# ---- what is drawn


def chi_square(counts, probabilities):
    """In standard deviations of its own distribution."""
    expected = counts.sum() * probabilities
    kept = expected > 5
    value = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    freedom = int(kept.sum()) - 1
    return ((value - freedom) / math.sqrt(2 * freedom)).item()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_their_probabilities_say(temperature):
    noise = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(1, 30, generator=noise)
    wanted = (logits[0].double() / temperature).softmax(0)
    none = torch.zeros(0, dtype=torch.int64)
    n = 100_000
    even = (torch.arange(n, dtype=torch.float64) + 0.5) / n  # the inverse CDF, cell by cell
    counts = draw_tokens(logits.expand(n, -1), even, temperature, none).bincount(minlength=30)
    assert (counts - n * wanted).abs().max() <= 1
    uniforms = torch.rand(n, generator=noise, dtype=torch.float64)
    counts = draw_tokens(logits.expand(n, -1), uniforms, temperature, none).bincount(minlength=30)
    assert abs(chi_square(counts, wanted)) < 4


def test_the_first_tokens_of_many_samples_follow_the_model(sampler, model):
    """The whole path: prompts, addressed generators, draws; forbidden tokens share out theirs."""
    rollouts = sampler.generate(PROBLEMS[2:3], 4000, max_tokens=1)
    pack = data.pack([rollouts[0].document], 1000)[0]
    with torch.no_grad():
        probabilities = model(**pack.inputs, rows=pack.rows).double().softmax(-1)[0]
    probabilities[list(model.config.vision_token_ids)] = 0
    tokens = torch.tensor([r.response_ids[0] for r in rollouts])
    counts = tokens.bincount(minlength=len(WORDS))
    assert abs(chi_square(counts, probabilities / probabilities.sum())) < 4


def test_forbidden_tokens_are_never_drawn_even_if_the_model_wants_nothing_else(tokenizer):
    model = build(tokenizer)
    vision, wish = list(model.config.vision_token_ids), torch.randn(48)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[vision[0]], model.lm_head.weight[vision[3]] = 100 * wish, -100 * wish
    for temperature in (1.0, 0.0):
        rollouts = TorchSampler(model, tokenizer, SETTINGS).generate(
            PROBLEMS, 8, max_tokens=20, temperature=temperature
        )
        assert not {token for r in rollouts for token in r.response_ids} & set(vision)
        assert min(x for r in rollouts for x in r.logps) < -50  # of the unmasked distribution


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_a_draw_at_the_ends_of_the_unit_interval_is_an_allowed_token(uniform):
    forbidden = torch.tensor([0, 1, 5, 6])
    logits = torch.zeros(1, 7)
    token = draw_tokens(logits, torch.tensor([uniform], dtype=torch.float64), 1.0, forbidden)
    assert token.item() == {0.0: 2, 0.5: 3}.get(uniform, 4)


def test_greedy_equals_generate_of_transformers(sampler, model, tokenizer, tmp_path):
    save_model(model, tmp_path)
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    pad = model.config.image_token_id
    for r in sampler.generate(PROBLEMS, 1, max_tokens=24, temperature=0):
        ids = torch.tensor([r.prompt.ids])
        inputs = {"input_ids": ids, "mm_token_type_ids": (ids == pad).int()}
        if r.prompt.grids:
            grids = torch.tensor(r.prompt.grids)
            inputs |= {"pixel_values": r.prompt.patches, "image_grid_thw": grids}
        out = theirs.generate(
            **inputs,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=24,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
            suppress_tokens=list(model.config.vision_token_ids),
        )
        assert out[0, ids.shape[1] :].tolist() == r.response_ids


# ---- new weights


def test_sync_gives_the_log_probs_of_the_new_weights(tokenizer):
    sampler, policy = TorchSampler(build(tokenizer), tokenizer, SETTINGS), build(tokenizer, seed=1)
    before = sampler.generate(PROBLEMS, 3, max_tokens=30)
    sampler.sync(policy.named_parameters())
    after = sampler.generate(PROBLEMS, 3, max_tokens=30)
    assert drawn(after) != drawn(before)
    assert_same(after, TorchSampler(policy, tokenizer, SETTINGS).generate(PROBLEMS, 3, 30))
    with torch.no_grad():
        policy.lm_head.weight.zero_()  # a copy, not a reference
    assert_same(sampler.generate(PROBLEMS, 3, max_tokens=30), after)


def test_sync_refuses_a_name_it_does_not_know(sampler):
    with pytest.raises(KeyError, match="model.layers.9.odd"):
        sampler.sync([("model.layers.9.odd", torch.zeros(1))])


# ---- cost


def test_the_prompt_and_its_pictures_are_read_once_whatever_the_samples(tokenizer, monkeypatch):
    sampler, tokens, patches, steps = (
        TorchSampler(build(tokenizer), tokenizer, SETTINGS),
        [],
        [],
        [],
    )
    fill, step = KVCache.fill, KVCache.step

    def counted_fill(cache, layer, k, v, lengths):
        tokens.append(len(k))
        fill(cache, layer, k, v, lengths)

    def counted_step(cache, layer, q, k, v):
        steps.append(len(q))
        return step(cache, layer, q, k, v)

    monkeypatch.setattr(KVCache, "fill", counted_fill)
    monkeypatch.setattr(KVCache, "step", counted_step)
    sampler.model.visual.register_forward_pre_hook(lambda _, inputs: patches.append(len(inputs[0])))
    rollouts = sampler.generate(PROBLEMS, 8, max_tokens=50)
    prompts = [r.prompt for r in rollouts[::8]]
    assert tokens == [sum(len(p.ids) for p in prompts)] * 2  # layers
    assert patches == [sum(len(p.patches) for p in prompts if p.patches is not None)]
    # Every token but the last of a row is fed once, and rows that have ended are fed no more.
    assert sum(steps) == 2 * sum(len(r.response_ids) - 1 for r in rollouts)
