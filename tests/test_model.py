"""model.py against transformers: logits, gradients, positions, cache, head, files.

The referee is Qwen2_5_VLForConditionalGeneration 5.19 (sdpa, fp32), which opens what save_model
wrote and reads one document at a time, with use_cache=False: it leaks across packed documents. Our
side reads packs. "Equal" is to float rounding: the largest difference over the largest value of the
tensor. The small model has windowed and full-attention vision blocks, and pictures of several
windows, whole and ragged; the shapes of 7B are taken layer by layer.
"""

import json
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as official

import model
from common.data import Document, Prompt, lay_out
from model import Config, KVCache, Qwen25VL, VisionConfig, load_model, save_model

REAL = Path(__file__).resolve().parents[1] / ".." / "shared" / "qwen2_5_vl"
needs_real = pytest.mark.skipif(
    not REAL.is_dir(), reason="no ../shared/qwen2_5_vl beside the repository: the real config.json"
)
START, END, IMAGE = 3, 4, 6  # of the small model's 96 tokens; 10 and above are words
VISION = VisionConfig(4, 32, 40, num_heads=2, out_hidden_size=64, fullatt_block_indexes=(1, 3))
SMALL = Config(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=96,
    mrope_section=(2, 3, 3),
    vision=VISION,
    bos_token_id=1,
    eos_token_id=2,
    vision_start_token_id=START,
    vision_end_token_id=END,
    vision_token_id=5,
    image_token_id=IMAGE,
    video_token_id=7,
)
TIED = replace(SMALL, tie_word_embeddings=True)
# Paper, sec. 3 (Base model), and Qwen2.5-VL's report, table 1
VISION_7B = VisionConfig(32, 1280, 3420, 16, 3584, (7, 15, 23, 31))
REAL_7B = Config(3584, 18944, 28, 28, 4, 152064, (16, 24, 24), VISION_7B)
VISION_3B = replace(VISION_7B, out_hidden_size=2048)
REAL_3B = Config(2048, 11008, 36, 16, 2, 151936, (16, 24, 24), VISION_3B, tie_word_embeddings=True)

BIG, WIDE, SMALLEST = (1, 20, 18), (1, 4, 22), (1, 2, 2)  # 10 x 9 merged: windows of 4 x 4 and less


# ---- a small world


def small_model(config=SMALL, head="lm", seed=0):
    """Every weight random, those too that begin at 1 or 0: a forgotten norm would not show."""
    torch.manual_seed(seed)
    made = Qwen25VL(config, head)
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    return made


@pytest.fixture(scope="module", params=[SMALL, TIED], ids=["untied", "tied"])
def pair(request, tmp_path_factory):
    """(ours, the referee): one set of weights."""
    directory = tmp_path_factory.mktemp("small")
    ours = small_model(request.param)
    save_model(ours, directory)
    return ours, referee(directory)


@pytest.fixture(scope="module")
def ours():
    return small_model()


def referee(directory):
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()


def document(*parts, seed=0):
    """parts: numbers of words, and grids of pictures. The response is the last two words."""
    rng = random.Random(f"{seed}/{parts}")
    noise = torch.Generator().manual_seed(rng.randrange(1 << 30))
    ids, grids, offsets, patches = [], [], [], []
    for part in parts:
        if isinstance(part, int):
            ids += [rng.randrange(10, 96) for _ in range(part)]
            continue
        offsets.append(len(ids) + 1)
        ids += [START] + [IMAGE] * (math.prod(part) // 4) + [END]
        grids.append(part)
        patches.append(torch.randn(math.prod(part), 1176, generator=noise))
    stacked = torch.cat(patches) if patches else None
    return Document(Prompt(ids[:-2], [], stacked, tuple(grids), tuple(offsets)), ids[-2:])


def packed(documents):
    """One pack of all, in the given order."""
    return lay_out(documents, list(range(len(documents))), 2)


def referee_inputs(doc):
    ids = torch.tensor([doc.ids])
    inputs = {"input_ids": ids, "mm_token_type_ids": (ids == IMAGE).int(), "use_cache": False}
    if doc.prompt.grids:
        grids = torch.tensor(doc.prompt.grids)
        inputs |= {"pixel_values": doc.prompt.patches, "image_grid_thw": grids}
    return inputs


def distance(a, b):
    """The largest difference, as a share of the largest value."""
    assert a.shape == b.shape, f"{a.shape} {b.shape}"
    assert a.isfinite().all() and b.isfinite().all()
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-9)).item()


def gradients(network, loss):
    network.zero_grad()
    loss.backward()
    named = {model.hub_name(name): weight.grad for name, weight in network.named_parameters()}
    return {name: grad for name, grad in named.items() if grad is not None}


def assert_same_gradients(ours, theirs, limit):
    assert ours.keys() == theirs.keys()
    worst = {name: distance(ours[name], theirs[name]) for name in ours}
    assert max(worst.values()) < limit, {k: v for k, v in worst.items() if v >= limit}


TEXT, ONE, TWO, BETWEEN = (21,), (3, BIG, 9), (2, BIG, WIDE, 7), (4, WIDE, 5, BIG, 6, SMALLEST, 3)
CASES = {
    "text": [TEXT],
    "one image": [ONE],
    "two images of different sizes": [TWO],
    "images between text": [BETWEEN],
    "a pack of texts": [(5,), (9,), (9,), (3,)],
    "a mixed pack": [(5,), ONE, (12,), BETWEEN, (12,), (1, (1, 10, 14), 4)],
}


# ---- parity with transformers


@pytest.mark.parametrize("parts", CASES.values(), ids=CASES.keys())
def test_logits_and_all_gradients_equal_those_of_transformers(pair, parts):
    ours, theirs = pair
    documents = [document(*part, seed=i) for i, part in enumerate(parts)]
    logits = ours(**packed(documents).inputs)
    wanted = torch.cat([theirs(**referee_inputs(doc)).logits[0] for doc in documents])
    assert distance(logits, wanted) < 1e-5
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(7))
    assert_same_gradients(
        gradients(ours, (logits * weights).sum()),
        gradients(theirs, (wanted * weights).sum()),
        limit=1e-4,
    )


def test_the_small_model_can_tell_a_wrong_layout_of_windows_and_positions(ours):
    """Otherwise the parity above would prove nothing about them."""
    pack = packed([document(*BETWEEN)])
    logits = ours(**pack.inputs)
    for full in ((), (1,), (3,), (0, 1, 2, 3)):
        other = Qwen25VL(replace(SMALL, vision=replace(VISION, fullatt_block_indexes=full)))
        other.load_state_dict(ours.state_dict())
        assert distance(other(**pack.inputs), logits) > 1e-3
    narrow = Qwen25VL(replace(SMALL, vision=replace(VISION, window_size=84)))
    narrow.load_state_dict(ours.state_dict())
    assert distance(narrow(**pack.inputs), logits) > 1e-3
    counted = torch.arange(len(pack.ids)).expand(3, -1)
    for axis in range(3):
        wrong = pack.positions.clone()
        wrong[axis] = counted[axis]
        assert distance(ours(**pack.inputs | {"positions": wrong}), logits) > 1e-3


def test_windows_are_square_cut_at_the_edges_and_never_cross_an_image():
    order, windows, frames = model.window_order([(1, 20, 18), (2, 4, 22)], merge=2, side=4)
    first = [64, 64, 16, 64, 64, 16, 32, 32, 8]  # 10 x 9 merged patches of 4: 4+4+2 by 4+4+1
    assert windows == [*first, *[32, 32, 24] * 2]
    assert frames == [360, 88, 88]
    assert sorted(order.tolist()) == list(range(90 + 22 * 2))
    assert order[:16].tolist() == [9 * row + column for row in range(4) for column in range(4)]
    assert order[90:98].tolist() == [
        90 + 11 * row + column for row in range(2) for column in range(4)
    ]


REAL_SHAPES = {"7B": REAL_7B, "3B": REAL_3B}


@pytest.mark.parametrize("config", REAL_SHAPES.values(), ids=REAL_SHAPES.keys())
def test_names_and_shapes_of_the_real_models_are_those_of_transformers(config):
    with torch.device("meta"):
        ours = Qwen25VL(config)
        theirs = Qwen2_5_VLForConditionalGeneration(official_config(config))
    shapes = {name: weight.shape for name, weight in ours.named_parameters()}
    assert shapes == {model.hub_name(n): weight.shape for n, weight in theirs.named_parameters()}


def test_7b_has_the_parameters_that_the_paper_counts():
    with torch.device("meta"):
        ours = Qwen25VL(REAL_7B)
    language = sum(w.numel() for n, w in ours.named_parameters() if not n.startswith("visual."))
    assert round(language / 1e9, 3) == 7.616
    assert round(sum(w.numel() for w in ours.visual.parameters()) / 1e9, 3) == 0.677
    assert round(sum(w.numel() for w in ours.parameters()) / 1e9, 2) == 8.29


@needs_real
@pytest.mark.parametrize("name", ["config.json", "config-7b.json", "config-3b.json"])
def test_the_real_configuration_is_the_one_the_paper_gives(tmp_path, name):
    if not (REAL / name).is_file():
        pytest.skip(f"no {name} in {REAL}")
    shutil.copy(REAL / name, tmp_path / "config.json")
    config = model.read_config(tmp_path)
    assert config == (REAL_3B if "3b" in name else REAL_7B)
    raw = json.loads((REAL / name).read_text())
    written = model.config_json(config, torch.bfloat16)
    shared = raw.keys() & written.keys() - {"vision_config"}
    assert {k: raw[k] for k in shared} == json.loads(json.dumps({k: written[k] for k in shared}))
    vision = written["vision_config"]
    assert raw["vision_config"].items() >= json.loads(json.dumps(vision)).items()


def official_config(config):
    raw = model.config_json(config, torch.float32)
    del raw["model_type"]
    return Qwen2_5_VLConfig(**json.loads(json.dumps(raw)), attn_implementation="sdpa")


def with_same_weights(ours, theirs):
    """Both from the meta device; random weights, one copy for both: those of 7B are large."""
    ours.to_empty(device="cpu")
    for weight in ours.parameters():
        weight.data.uniform_(-0.02, 0.02) if weight.dim() > 1 else weight.data.uniform_(0.5, 1.5)
    theirs.load_state_dict(ours.state_dict(), assign=True)


def assert_same_function(ours, theirs, ours_of, theirs_of, limit=1e-4):
    """Outputs to a tenth of the limit, gradients of all weights to the limit."""
    result = ours_of()
    upstream = torch.randn(result.shape, generator=torch.Generator().manual_seed(2))
    grads = gradients(ours, (result * upstream).sum())
    wanted = theirs_of()
    assert distance(result, wanted) < limit / 10
    assert_same_gradients(grads, gradients(theirs, (wanted * upstream).sum()), limit)


def test_a_decoder_layer_with_the_shapes_of_7b_equals_that_of_transformers():
    config = replace(REAL_7B, num_hidden_layers=1, vocab_size=8)
    text = official_config(config).text_config
    with torch.device("meta"):
        ours, theirs = model.Decoder(config), official.Qwen2_5_VLTextModel(text)
    theirs.rotary_emb = official.Qwen2_5_VLRotaryEmbedding(text)
    with_same_weights(ours, theirs)
    doc = document(3, (1, 4, 6), 4)
    positions = packed([doc]).positions + 5_000  # angles far from zero
    x = torch.randn(len(doc), config.hidden_size, generator=torch.Generator().manual_seed(1))
    referee_x = dict(inputs_embeds=x[None], position_ids=positions[:, None], use_cache=False)
    assert_same_function(
        ours,
        theirs,
        lambda: ours(x, positions, [len(doc)], None),
        lambda: theirs(**referee_x).last_hidden_state[0],
    )


def test_vision_blocks_with_the_shapes_of_7b_equal_those_of_transformers():
    vision = replace(VISION_7B, depth=2, fullatt_block_indexes=(1,))  # one windowed, one full
    settings = official_config(replace(REAL_7B, vision=vision)).vision_config
    tower = official.Qwen2_5_VisionTransformerPretrainedModel
    with torch.device("meta"):
        ours, theirs = model.VisionTower(vision), tower(settings)
    theirs.rotary_pos_emb = official.Qwen2_5_VLVisionRotaryEmbedding(settings)
    with_same_weights(ours, theirs)
    grids = [(1, 10, 6)]  # 5 x 3 merged: a window of 4 x 3 and one of 1 x 3
    patches = torch.randn(60, 1176, generator=torch.Generator().manual_seed(1))
    assert_same_function(
        ours,
        theirs,
        lambda: ours(patches, grids),
        lambda: theirs(patches, grid_thw=torch.tensor(grids)).pooler_output,
    )


# ---- positions


def test_positions_equal_get_rope_index_of_transformers(pair):
    rng = random.Random(0)
    cases = [part for case in CASES.values() for part in case]
    for _ in range(40):
        parts = [rng.randrange(1, 40)]
        for _ in range(rng.randrange(4)):
            parts.append((1, 2 * rng.randrange(1, 30), 2 * rng.randrange(1, 30)))
            parts.append(rng.randrange(1, 40))
        cases.append((*parts, 2))
    get_rope_index = pair[1].model.get_rope_index
    for parts in cases:
        doc = document(*parts)
        inputs = referee_inputs(doc)
        theirs, _ = get_rope_index(
            inputs["input_ids"], inputs["mm_token_type_ids"], inputs.get("image_grid_thw")
        )
        images = list(zip(doc.prompt.offsets, doc.prompt.grids, strict=True))
        assert torch.equal(model.mrope_positions(len(doc), images), theirs[:, 0])


def test_a_picture_takes_as_many_positions_as_its_longer_side():
    positions = model.mrope_positions(3 + 600 + 2, [(3, (1, 40, 60))])  # 20 x 30 merged
    assert positions[:, :3].tolist() == [[0, 1, 2]] * 3
    assert positions[:, 3].tolist() == [3, 3, 3]
    assert positions[:, 602].tolist() == [3, 3 + 19, 3 + 29]
    assert positions[:, 603:].tolist() == [[33, 34]] * 3


def test_an_image_that_does_not_fit_its_document_is_an_error():
    with pytest.raises(AssertionError, match="document of 5"):
        model.mrope_positions(5, [(2, (1, 4, 4))])


def test_angles_far_into_a_64k_document_equal_those_of_transformers():
    positions = torch.randint(0, 65_536, (3, 500), generator=torch.Generator().manual_seed(0))
    embedding = official.Qwen2_5_VLRotaryEmbedding(official_config(REAL_7B).text_config)
    cos, sin = embedding(torch.zeros(1, dtype=torch.float32), positions[:, None])
    axes = torch.arange(3).repeat_interleave(torch.tensor(REAL_7B.mrope_section))
    turns = model.frequencies(128, 1e6, torch.device("cpu"))
    ours = model.rotary(positions[axes].T * turns)
    assert ours[0].dtype == torch.float32
    assert distance(ours[0][:, 0], cos[0]) < 1e-6 and distance(ours[1][:, 0], sin[0]) < 1e-6


# ---- packs


MIXED = [
    document(*part, seed=i) for i, part in enumerate([(5,), ONE, (12,), TWO, (5,), (3, WIDE, 4)])
]


def weighted_loss(network, documents):
    """A sum over the tokens of all, each with weights of its own: the same in any layout."""
    logits = network(**packed(documents).inputs).split([len(doc) for doc in documents])
    loss = 0
    for doc, part in zip(documents, logits, strict=True):
        noise = torch.Generator().manual_seed(sum(doc.ids))
        loss = loss + (part * torch.randn(part.shape, generator=noise)).sum()
    return loss, {tuple(d.ids): x.detach() for d, x in zip(documents, logits, strict=True)}


def test_a_pack_equals_its_documents_one_by_one(ours):
    loss, logits = weighted_loss(ours, MIXED)
    grads = gradients(ours, loss)
    parts = [weighted_loss(ours, [doc]) for doc in MIXED]
    alone = {ids: x for _, found in parts for ids, x in found.items()}
    assert all(distance(logits[ids], alone[ids]) < 1e-5 for ids in alone)
    assert_same_gradients(grads, gradients(ours, sum(loss for loss, _ in parts)), 1e-4)


def test_the_order_of_documents_does_not_matter(ours):
    loss, logits = weighted_loss(ours, MIXED)
    grads = gradients(ours, loss)
    for seed in range(3):
        shuffled = random.Random(seed).sample(MIXED, len(MIXED))
        loss, other = weighted_loss(ours, shuffled)
        assert all(distance(other[ids], logits[ids]) < 1e-5 for ids in logits)
        assert_same_gradients(gradients(ours, loss), grads, 1e-4)


def test_a_document_cannot_see_its_neighbours(ours):
    pack = packed(MIXED)
    with torch.no_grad():
        before = ours(**pack.inputs)
        changed = pack.ids.clone()
        changed[: pack.lengths[0]] = 50
        after = ours(**pack.inputs | {"ids": changed})
    assert torch.equal(before[pack.lengths[0] :], after[pack.lengths[0] :])
    assert not torch.equal(before[: pack.lengths[0]], after[: pack.lengths[0]])


def test_an_image_shared_by_two_documents_equals_the_image_given_twice(ours):
    first = document(2, BIG, 3, WIDE, 9)
    second = Document(first.prompt, [20, 21, 22, 23])
    twin = replace(first.prompt, patches=first.prompt.patches.clone())
    shared = packed([first, document(6), second])
    twice = packed([first, document(6), Document(twin, second.response_ids)])
    assert 2 * len(shared.patches) == len(twice.patches) and len(shared.slots) == len(twice.slots)
    one, two = ours(**shared.inputs), ours(**twice.inputs)
    assert distance(one, two) < 1e-5
    weights = torch.randn_like(two)
    assert_same_gradients(
        gradients(ours, (one * weights).sum()), gradients(ours, (two * weights).sum()), 1e-4
    )


@pytest.mark.parametrize("head", ["lm", "value"])
def test_tries_that_share_their_prompt_give_the_log_probs_and_gradients_of_tries_apart(head):
    network = small_model(head=head)
    first, second = document(2, BIG, 3, WIDE, 9), document(6)
    tries = [([20, 21, 22], first), ([23], second), ([24, 25], first), ([30] * 7, first)]
    documents = [Document(d.prompt, ids) for ids, d in tries] + [Document(second.prompt, [40, 41])]
    order, found = [3, 1, 0, 4, 2], []
    for shared in (True, False):
        pack = lay_out(documents, order, shared=shared)
        wanted = dict(rows=pack.rows) | (dict(targets=pack.targets) if head == "lm" else {})
        out = network(**pack.inputs, **wanted)
        told = out[0] if head == "lm" else out
        weights = torch.linspace(-1, 1, len(told))
        found.append((told, gradients(network, (told * weights).sum()), len(pack.ids)))
    (one, grads, rows), (two, others, all_rows) = found
    assert all_rows - rows == 2 * len(first.prompt.ids) + len(second.prompt.ids)
    assert distance(one, two) < 1e-5
    assert_same_gradients(grads, others, 1e-4)


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ran = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.ran.add(str(operator))
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("head", ["lm", "value"])
def test_rows_that_several_documents_share_are_added_up_in_one_order(head):
    """hidden[rows] has a backward, index_put, that adds repeated rows in an order that follows
    where the memory lies: at the miniature's size, two runs in five gave other last bits.
    """
    network, shared = small_model(head=head), document(2, BIG, 30)
    network.visual.requires_grad_(False)  # its windows are an order without repetitions
    tries = [Document(shared.prompt, [20] * n) for n in range(1, 9)]
    pack = lay_out(tries, list(range(len(tries))), shared=True)
    wanted = dict(rows=pack.rows) | (dict(targets=pack.targets) if head == "lm" else {})
    out = network(**pack.inputs, **wanted)
    with Operators() as operators:
        (out if head == "value" else out[0]).sum().backward()
    assert "aten.index_add.default" in operators.ran
    assert not {name for name in operators.ran if "index_put" in name}


def test_pictures_that_nobody_looks_at_give_gradients_of_zero(ours):
    """A rank without pictures runs the tower on a dummy one, so that no collective hangs."""
    pack, dummy = packed([document(8)]), document(1, SMALLEST, 2).prompt
    plain = ours(**pack.inputs)
    inputs = pack.inputs | {"patches": dummy.patches, "grids": list(dummy.grids)}
    logits = ours(**inputs)
    assert torch.equal(logits, plain)
    grads = gradients(ours, logits.sum())
    tower = [name for name in grads if name.startswith("visual.")]
    assert len(tower) == len(list(ours.visual.parameters()))
    assert not any(grads[name].any() for name in tower)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": torch.full((90,), 90)}, "index (90 is )?out of (bounds|range)"),
        ({"grids": [(1, 20, 20)]}, "have 400 patches, got 360"),
        ({"lengths": [50, 50]}, "lengths sum to 100, the pack has 104 tokens"),
    ],
    ids=["sources", "grids", "lengths"],
)
def test_a_pack_that_does_not_add_up_is_an_error(ours, change, message):
    with pytest.raises((ValueError, AssertionError, IndexError), match=message):
        ours(**packed([document(*ONE)]).inputs | change)


# ---- KV cache


def test_token_by_token_with_a_cache_equals_the_whole_documents(ours):
    """Prompts of different lengths, with and without pictures; rows are repeated and dropped."""
    prompts = [document(*parts) for parts in ((5,), ONE, (13,), BETWEEN)]
    pack, words = packed(prompts), random.Random(3)
    owner, held = [0, 1, 1, 2, 3, 3], [[] for _ in range(6)]  # row -> its prompt, its own tokens
    with torch.no_grad():
        cache = KVCache(SMALL, 4, max(pack.lengths) + 12, torch.float32, torch.device("cpu"))
        last = torch.tensor(pack.lengths).cumsum(0) - 1
        first = ours(**pack.inputs, cache=cache, rows=last)
        assert distance(first, ours(**pack.inputs)[last]) < 1e-5
        assert cache.lengths.tolist() == pack.lengths
        cache.take(torch.tensor(owner))
        positions = pack.positions[:, last].amax(0)[torch.tensor(owner)] + 1
        for step in range(12):
            tokens = [words.randrange(10, 96) for _ in owner]
            held = [own + [token] for own, token in zip(held, tokens, strict=True)]
            logits = ours(torch.tensor(tokens), positions.expand(3, -1), cache=cache)
            positions = positions + 1
            for row, prompt in enumerate(owner):
                ids = prompts[prompt].response_ids + held[row]
                whole = ours(**packed([Document(prompts[prompt].prompt, ids)]).inputs)[-1]
                assert distance(logits[row], whole) < 1e-5, f"row {row}, step {step}"
            if step == 3:  # the last of a copy, the first, and a swap
                rows = torch.tensor([4, 2, 1, 3])
                cache.take(rows)
            elif step == 7:
                rows = cache.keep(torch.tensor([False, True, False, True]))
                assert sorted(rows.tolist()) == [1, 3]
            else:
                continue
            owner, held = ([held_by[i] for i in rows] for held_by in (owner, held))
            positions = positions[rows]


@pytest.mark.parametrize("live", ["1111", "0111", "1110", "0001", "1010", "0110", "1000"])
def test_keep_equals_take_of_the_rows_it_returns(live):
    def filled():
        cache = KVCache(SMALL, 4, 5, torch.float32, torch.device("cpu"))
        for number, x in enumerate([*cache.keys, *cache.values]):
            x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(number)))
        cache.lengths = torch.arange(4)
        return cache

    kept, taken = filled(), filled()
    rows = kept.keep(torch.tensor([c == "1" for c in live]))
    taken.take(rows)
    assert sorted(rows.tolist()) == [i for i, c in enumerate(live) if c == "1"]
    for a, b in zip([*kept.keys, *kept.values], [*taken.keys, *taken.values], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(kept.lengths, taken.lengths)


# ---- log-probs and entropies


@pytest.mark.parametrize("chunk", [1, 7, 32, 33, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
def test_chunked_log_probs_equal_those_of_the_full_logits(chunk, temperature):
    noise = torch.Generator().manual_seed(0)
    hidden = torch.randn(33, 8, generator=noise, requires_grad=True)
    weight = torch.randn(50, 8, generator=noise, requires_grad=True)
    targets = torch.randint(0, 50, (33,), generator=noise)
    upstream = torch.randn(33, generator=noise)
    logps, entropies = model.chunked_logps(hidden, weight, targets, temperature, chunk)
    full = (hidden.double() @ weight.double().T / temperature).log_softmax(-1)
    wanted = full[range(33), targets]
    assert (logps - wanted).abs().max() < 1e-5
    assert (entropies - torch.distributions.Categorical(logits=full).entropy()).abs().max() < 1e-5
    ours = torch.autograd.grad((logps * upstream).sum(), [hidden, weight])
    theirs = torch.autograd.grad((wanted * upstream).sum(), [hidden, weight])
    assert max(map(distance, ours, theirs)) < 1e-5


def test_entropies_carry_no_gradient_and_log_probs_are_float32_in_bf16():
    hidden = torch.randn(5, 8, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(20, 8, dtype=torch.bfloat16)
    logps, entropies = model.chunked_logps(hidden, weight, torch.arange(5))
    assert logps.dtype == entropies.dtype == torch.float32
    assert logps.requires_grad and not entropies.requires_grad
    exact = F.linear(hidden, weight).float().log_softmax(-1)[range(5), range(5)]
    assert (logps - exact).abs().max() < 1e-6


def test_no_targets_give_no_log_probs(ours):
    """A filler pack has no trained token, and still runs."""
    nothing = torch.zeros(0, dtype=torch.int64)
    logps, entropies = ours(**packed([document(6)]).inputs, rows=nothing, targets=nothing)
    assert logps.shape == entropies.shape == (0,)
    logps.sum().backward()


class Largest(TorchDispatchMode):
    """The most elements that any tensor had, in forward and backward."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_the_logits_of_a_long_row_never_exist(monkeypatch):
    monkeypatch.setattr(model, "KEPT_LOGITS", 4 * 64 * 50 - 1)
    hidden = torch.randn(64, 4, requires_grad=True)
    weight = torch.randn(50, 4, requires_grad=True)
    with Largest() as full:
        F.linear(hidden, weight).log_softmax(-1)[:, 0].sum().backward()
    with Largest() as chunked:
        logps, _ = model.chunked_logps(hidden, weight, torch.zeros(64, dtype=torch.int64), chunk=8)
        logps.sum().backward()
    assert full.elements == 64 * 50
    assert chunked.elements == 8 * 50


@pytest.mark.parametrize("limit", [4 * 64 * 50 - 1, 4 * 64 * 50])
def test_between_forward_and_backward_no_logits_are_kept_but_of_small_packs(monkeypatch, limit):
    monkeypatch.setattr(model, "KEPT_LOGITS", limit)
    kept = []
    hidden, weight = torch.randn(64, 4, requires_grad=True), torch.randn(50, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        model.chunked_logps(hidden, weight, torch.zeros(64, dtype=torch.int64), chunk=8)
    small = limit >= 4 * 64 * 50
    assert small is any(50 in shape and shape != (50, 4) for shape in kept)


def test_the_model_gives_log_probs_of_the_wanted_rows_only(ours):
    pack = packed(MIXED)
    with torch.no_grad():
        logps, entropies = ours(
            **pack.inputs, rows=pack.rows, targets=pack.targets, temperature=0.7
        )
        full = (ours(**pack.inputs) / 0.7).log_softmax(-1)[pack.rows]
    assert len(logps) == 2 * len(MIXED)
    assert (logps - full.gather(1, pack.targets[:, None])[:, 0]).abs().max() < 1e-5
    assert (entropies + (full.exp() * full).sum(-1)).abs().max() < 1e-5


# ---- the critic


def test_a_critic_reads_the_hidden_states_with_a_head_of_width_one(pair, tmp_path):
    ours, theirs = pair
    save_model(ours, tmp_path)
    critic = load_model(tmp_path, head="value")
    assert critic.lm_head is None and critic.value_head.weight.shape == (1, 64)
    pack = packed(MIXED)
    values = critic(**pack.inputs)
    assert values.shape == (len(pack.ids),) and values.dtype == torch.float32
    inputs = [referee_inputs(doc) for doc in MIXED]
    hidden = torch.cat([theirs.model(**x).last_hidden_state[0] for x in inputs])
    assert distance(values, hidden @ critic.value_head.weight[0]) < 1e-5
    assert distance(critic(**pack.inputs, rows=pack.rows), values[pack.rows]) < 1e-5


def test_a_critic_s_values_are_float32_in_bf16_too():
    critic = small_model(head="value").bfloat16()
    assert critic(**packed([document(8)]).inputs).dtype == torch.float32


def test_a_new_value_head_is_small(tmp_path):
    """Open-Reasoner-Zero's code: N(0, 1/(C+1)), so that values begin near 0."""
    vision = replace(VISION, out_hidden_size=512)
    wide = replace(SMALL, hidden_size=512, mrope_section=(16, 24, 24), vision=vision)
    save_model(Qwen25VL(wide), tmp_path)
    weight = load_model(tmp_path, head="value").value_head.weight
    assert weight.std().item() == pytest.approx(1 / 513, rel=0.15)


@pytest.mark.parametrize("config", [SMALL, TIED], ids=["untied", "tied"])
def test_a_critic_survives_saving_and_loading(tmp_path, config):
    critic = small_model(config, head="value")
    save_model(critic, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert_same_weights(load_model(tmp_path, head="value"), critic)


def test_an_unknown_head_is_an_error():
    with pytest.raises(ValueError, match="'reward'"):
        Qwen25VL(SMALL, head="reward")


# ---- loading and saving


def assert_same_weights(one, other):
    pairs = zip(one.named_parameters(), other.named_parameters(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def in_memory_name(name):
    """The names that transformers >= 4.52 gives the weights of a loaded model."""
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1)


def test_both_layouts_of_names_load(tmp_path, ours):
    hub, memory = tmp_path / "hub", tmp_path / "memory"
    save_model(ours, hub)
    shutil.copytree(hub, memory)
    weights = load_file(hub / "model.safetensors")
    renamed = {in_memory_name(name): weight for name, weight in weights.items()}
    assert sum(name.startswith("model.language_model.layers.0.") for name in renamed) == 12
    save_file(renamed, memory / "model.safetensors")
    assert_same_weights(load_model(hub), ours)
    assert_same_weights(load_model(memory), ours)
    names = dict(referee(hub).named_parameters()).keys()
    assert renamed.keys() == names


def test_what_transformers_saves_loads(tmp_path, pair):
    ours, theirs = pair
    theirs.save_pretrained(tmp_path)
    assert "text_config" in json.loads((tmp_path / "config.json").read_text())
    found = load_model(tmp_path)
    assert replace(found.config, vision_token_id=5) == ours.config  # transformers drops that one
    assert_same_weights(found, ours)


def test_shards_load_here_and_in_transformers(tmp_path, ours, monkeypatch):
    monkeypatch.setattr(model, "SHARD_BYTES", 200_000)
    save_model(ours, tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 3 and all(file.stat().st_size < 250_000 for file in files)
    index = json.loads((tmp_path / model.INDEX).read_text())
    assert index["weight_map"].keys() == dict(ours.named_parameters()).keys()
    assert index["metadata"]["total_size"] == sum(4 * w.numel() for w in ours.parameters())
    assert_same_weights(load_model(tmp_path), ours)
    theirs = {model.hub_name(n): weight for n, weight in referee(tmp_path).named_parameters()}
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.named_parameters())
    monkeypatch.undo()
    save_model(ours, tmp_path)  # over the shards, none of which stays behind
    assert [file.name for file in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    assert_same_weights(load_model(tmp_path), ours)


def test_a_missing_shard_is_named(tmp_path, ours, monkeypatch):
    monkeypatch.setattr(model, "SHARD_BYTES", 200_000)
    save_model(ours, tmp_path)
    (tmp_path / "model-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="json names .*model-00002.safetensors"):
        load_model(tmp_path)


def test_a_tied_head_is_the_embedding_before_and_after_saving(tmp_path):
    tied = small_model(TIED)
    assert tied.head_weight is tied.model.embed_tokens.weight
    save_model(tied, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in weights
    again = load_model(tmp_path)
    assert again.head_weight is again.model.embed_tokens.weight
    embedding = weights["model.embed_tokens.weight"]
    save_file(weights | {"lm_head.weight": embedding.clone()}, tmp_path / "model.safetensors")
    assert_same_weights(load_model(tmp_path), tied)  # present and equal, as some hub files have it
    save_file(weights | {"lm_head.weight": embedding + 1}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="lm_head.weight differs"):
        load_model(tmp_path)


def test_weights_that_do_not_fit_are_named(tmp_path, ours):
    save_model(ours, tmp_path)
    good = load_file(tmp_path / "model.safetensors")
    norm, bias = "model.norm.weight", "visual.blocks.2.attn.proj.bias"

    def refused(weights, *messages):
        save_file(weights, tmp_path / "model.safetensors")
        with pytest.raises(ValueError) as error:
            load_model(tmp_path)
        assert all(message in str(error.value) for message in messages), error.value

    fewer = {name: weight for name, weight in good.items() if name not in (norm, bias)}
    refused(fewer, f"missing {norm}", f"missing {bias}", str(tmp_path))
    refused(good | {"model.layers.9.odd": torch.ones(2)}, "unexpected model.layers.9.odd")
    refused(good | {norm: torch.ones(63)}, f"{norm} is [63] in the files, [64] by config.json")
    refused({norm: good[norm]}, "and ", " more")
    untied = {name: weight for name, weight in good.items() if name != "lm_head.weight"}
    refused(untied, "missing lm_head.weight")


def test_a_policy_may_read_a_critic_s_body_but_not_without_a_head(tmp_path):
    save_model(small_model(TIED, head="value"), tmp_path)
    assert load_model(tmp_path).value_head is None  # tied: the head is the embedding
    save_model(small_model(SMALL, head="value"), tmp_path)
    with pytest.raises(ValueError, match="missing lm_head.weight"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2_vl"}, "qwen2_vl"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": 66}, "hidden_size 66"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"rope_scaling": {"rope_type": "yarn", "mrope_section": [2, 3, 3]}}, "yarn"),
        ({"rope_scaling": {"type": "mrope"}}, "mrope_section"),
        ({"rope_scaling": None}, "mrope_section"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 4]}}, "mrope_section"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [5, 3]}}, "mrope_section"),
        ({"vision_config": None}, "vision_config"),
        ({"vision_config": {"depth": 2}}, "hidden_size"),
        ({"vision_config": {"hidden_act": "quick_gelu"}}, "quick_gelu"),
        ({"vision_config": {"out_hidden_size": 32}}, "out_hidden_size 32"),
        ({"vision_config": {"num_heads": 3}}, "num_heads 3"),
        ({"vision_config": {"window_size": 100}}, "window_size 100"),
    ],
)
def test_settings_that_are_not_supported_are_named(tmp_path, changes, message):
    raw = model.config_json(SMALL, torch.float32)
    if changes.get("vision_config") and "depth" not in changes["vision_config"]:
        changes = {"vision_config": raw["vision_config"] | changes["vision_config"]}
    raw = {key: value for key, value in (raw | changes).items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message) as error:
        model.read_config(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


def test_a_directory_without_a_model_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(model.config_json(SMALL, torch.float32)))
    with pytest.raises(FileNotFoundError, match="safetensors"):
        load_model(tmp_path)


@pytest.mark.parametrize("config", [SMALL, TIED, REAL_7B, REAL_3B])
def test_flat_and_nested_configurations_are_both_read(tmp_path, config):
    odd = replace(config, rms_norm_eps=3e-5, rope_theta=5e5)
    (tmp_path / "config.json").write_text(json.dumps(model.config_json(odd, torch.bfloat16)))
    assert model.read_config(tmp_path) == odd
    official_config(odd).save_pretrained(tmp_path)
    nested = json.loads((tmp_path / "config.json").read_text())
    assert "hidden_size" not in nested and nested["text_config"]["rms_norm_eps"] == 3e-5
    assert replace(model.read_config(tmp_path), vision_token_id=odd.vision_token_id) == odd


def test_bf16_is_saved_and_loaded(tmp_path, ours):
    half = small_model().bfloat16()
    save_model(half, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert load_file(tmp_path / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    assert_same_weights(load_model(tmp_path, torch.bfloat16), half)
    assert_same_weights(load_model(tmp_path), half.float())  # float32 masters of bf16 files
    pack = packed(MIXED)
    with torch.no_grad():
        logits = load_model(tmp_path, torch.bfloat16)(**pack.inputs)
        exact = load_model(tmp_path)(**pack.inputs)
    assert logits.dtype == torch.float32 and distance(logits, exact) < 0.05


def test_tokenizer_template_and_settings_are_copied_along(tmp_path, ours):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    copied = """tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json
        vocab.json merges.txt chat_template.json chat_template.jinja preprocessor_config.json
        video_preprocessor_config.json generation_config.json""".split()
    for name in [*copied, "config.json", "model-00009.safetensors", "adapter_config.json"]:
        (source / name).write_text(f'"{name}"')
    save_model(ours, target, like=source)
    found = {file.name for file in target.iterdir()}
    assert found == {*copied, "config.json", "model.safetensors"}
    assert all((target / name).read_text() == f'"{name}"' for name in copied)
    assert load_model(target).config == SMALL
    save_model(ours, target, like=target)  # onto itself
    assert {file.name for file in target.iterdir()} == found


def naive_varlen(q, k, v, q_ends, k_ends, longest_q, longest_k, causal):
    """flash_attn_varlen_func by its documentation: packed (T, H, D), K heads shared in groups."""
    assert q_ends.dtype == torch.int32 and torch.equal(q_ends, k_ends)
    assert longest_q == longest_k == int(q_ends.diff().max()) and int(q_ends[-1]) == len(q)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out = []
    for start, stop in zip(q_ends[:-1].tolist(), q_ends[1:].tolist(), strict=True):
        a, b, c = (x[start:stop].transpose(0, 1) for x in (q, k, v))
        scores = a @ b.transpose(1, 2) / q.shape[2] ** 0.5
        if causal:
            above = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(above, float("-inf"))
        out.append((scores.softmax(-1) @ c).transpose(0, 1))
    return torch.cat(out)


class OnGpu:
    """As much of a tensor on a GPU as the choice of a kernel looks at."""

    is_cuda, dtype = True, torch.bfloat16


def test_what_lies_behind_the_end_for_cudnn_changes_nothing_and_leaves_few_lengths(monkeypatch):
    torch.manual_seed(0)
    q, k, v = (torch.randn(30, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    found = []
    for room in (0, 3):
        monkeypatch.setattr(model, "room_for_cudnn", lambda q, length, room=room: room)
        out = model.attend(q, k, v, [9, 9, 12], causal=True)
        found.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    monkeypatch.undo()
    for length, first in ((1, SDPBackend.FLASH_ATTENTION), (5000, SDPBackend.CUDNN_ATTENTION)):
        with model.kernels(OnGpu, length):
            assert _cur_sdpa_kernel_backends(with_priority=True)[0] == first
    planned = {n + model.room_for_cudnn(OnGpu, n) for n in range(2048, 65537)}
    assert len(planned) == 5 * 8 + 1 and max(planned) == 65536
    assert all(model.room_for_cudnn(OnGpu, n) < n / 8 for n in range(2048, 65537, 7))
    assert model.room_for_cudnn(OnGpu, 2047) == 0 == model.room_for_cudnn(torch.zeros(1), 5000)


@pytest.mark.parametrize("causal", [True, False])
def test_flash_attention_gets_what_its_interface_asks_for(monkeypatch, causal):
    torch.manual_seed(0)
    lengths = [5, 5, 1, 9]
    q, k, v = (torch.randn(20, heads, 8) for heads in (4, 2, 2))
    ours = model.attend(q, k, v, lengths, causal)
    monkeypatch.setattr(model, "takes_flash", lambda q: True)
    monkeypatch.setattr(model, "flash_attn_varlen_func", naive_varlen)
    torch.testing.assert_close(model.attend(q, k, v, lengths, causal), ours, atol=1e-6, rtol=1e-5)
