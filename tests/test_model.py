"""model.py against transformers: logits, gradients, positions, cache, head, files.

The referee is Qwen2_5_VLForConditionalGeneration 5.19 (sdpa, fp32), which opens what save_model
wrote and reads one document at a time, with use_cache=False: it leaks across packed documents. Our
side reads packs. "Equal" is to float rounding: the largest difference over the largest value of the
tensor. The small model has windowed and full-attention vision blocks, and pictures of several
windows, whole and ragged; the shapes of 7B are taken layer by layer.
"""

import json
import math
import os
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import model
from common.data import Document, Prompt
from common.packs import make_pack
from model import Config, Inputs, KVCache, Qwen25VL, VisionConfig, load_model, save_model

START, END, IMAGE = 3, 4, 6  # of the small model's 96 tokens; 10 and above are words
IDS = dict(bos_token_id=1, eos_token_id=2, vision_start_token_id=START, vision_end_token_id=END)
IDS |= dict(vision_token_id=5, image_token_id=IMAGE, video_token_id=7)
VISION = VisionConfig(4, 32, 40, num_heads=2, out_hidden_size=64, fullatt_block_indexes=(1, 3))
SMALL = Config(64, 96, 3, 4, 2, 96, (2, 3, 3), VISION, **IDS)
TIED = replace(SMALL, tie_word_embeddings=True)
# Paper, sec. 3 (Base model), and Qwen2.5-VL's report, table 1
VISION_7B = VisionConfig(32, 1280, 3420, 16, 3584, (7, 15, 23, 31))
REAL_7B = Config(3584, 18944, 28, 28, 4, 152064, (16, 24, 24), VISION_7B)
VISION_3B = replace(VISION_7B, out_hidden_size=2048)
REAL_3B = Config(2048, 11008, 36, 16, 2, 151936, (16, 24, 24), VISION_3B, tie_word_embeddings=True)

BIG, WIDE, SMALLEST = (1, 20, 18), (1, 4, 22), (1, 2, 2)  # 10 x 9 merged: windows of 4 x 4 and less
TEXT, ONE, TWO, BETWEEN = (21,), (3, BIG, 9), (2, BIG, WIDE, 7), (4, WIDE, 5, BIG, 6, SMALLEST, 3)
CASES = {
    "text": [TEXT],
    "one image": [ONE],
    "two images of different sizes": [TWO],
    "images between text": [BETWEEN],
    "a pack of texts": [(5,), (9,), (9,), (3,)],
    "a mixed pack": [(5,), ONE, (12,), BETWEEN, (12,), (1, (1, 10, 14), 4)],
}


# ---- a small world


def small_model(config=SMALL, head="lm", seed=0):
    """Every weight random, those too that begin at 1 or 0: a forgotten norm would not show."""
    torch.manual_seed(seed)
    network = Qwen25VL(config, head)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    return network


def referee(directory, dtype=torch.float32):
    from transformers import Qwen2_5_VLForConditionalGeneration as Official  # ranks do without

    return Official.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa").eval()


def official():
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

    return modeling_qwen2_5_vl


def official_config(config):
    raw = json.loads(json.dumps(model.config_json(config, torch.float32)))
    del raw["model_type"]
    return official().Qwen2_5_VLConfig(**raw, attn_implementation="sdpa")


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


def gradients(network, outputs):
    """Of a sum with random weights, by the names of the files."""
    network.zero_grad()
    weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(7))
    (outputs * weights).sum().backward()
    named = {model.hub_name(name): weight.grad for name, weight in network.named_parameters()}
    return {name: grad for name, grad in named.items() if grad is not None}


def assert_same_gradients(ours, theirs):
    assert ours.keys() == theirs.keys()
    wrong = {name: distance(ours[name], theirs[name]) for name in ours}
    assert max(wrong.values()) < 1e-4, {name: x for name, x in wrong.items() if x >= 1e-4}


def assert_same_weights(one, other):
    pairs = zip(one.named_parameters(), other.named_parameters(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


PARTS = [(5,), ONE, (12,), TWO, (5,), (3, WIDE, 4)]
MIXED = [document(*parts, seed=seed) for seed, parts in enumerate(PARTS)]


# ---- parity with transformers


@pytest.mark.parametrize("parts", CASES.values(), ids=CASES.keys())
def test_logits_and_all_gradients_equal_those_of_transformers(pair, parts):
    ours, theirs = pair
    documents = [document(*part, seed=i) for i, part in enumerate(parts)]
    logits = ours.logits(make_pack(documents))
    wanted = torch.cat([theirs(**referee_inputs(doc)).logits[0] for doc in documents])
    assert distance(logits, wanted) < 1e-5
    assert_same_gradients(gradients(ours, logits), gradients(theirs, wanted))


def test_the_small_model_can_tell_a_wrong_layout_of_windows_and_positions(ours):
    """Otherwise the parity above would prove nothing about them."""
    pack = make_pack([document(*BETWEEN)])
    logits = ours.logits(pack)
    layouts = [{"fullatt_block_indexes": full} for full in ((), (1,), (3,), (0, 1, 2, 3))]
    for change in [*layouts, {"window_size": 84}]:
        other = Qwen25VL(replace(SMALL, vision=replace(VISION, **change)))
        other.load_state_dict(ours.state_dict())
        assert distance(other.logits(pack), logits) > 1e-3
    for axis in range(3):
        wrong = pack.positions.clone()
        wrong[axis] = torch.arange(len(pack.ids))
        assert distance(ours.logits(replace(pack, positions=wrong)), logits) > 1e-3


@pytest.mark.parametrize("config", [REAL_7B, REAL_3B], ids=["7B", "3B"])
def test_names_and_shapes_of_the_real_models_are_those_of_transformers(config):
    with torch.device("meta"):
        ours = Qwen25VL(config)
        theirs = official().Qwen2_5_VLForConditionalGeneration(official_config(config))
    shapes = {name: weight.shape for name, weight in ours.named_parameters()}
    assert shapes == {model.hub_name(n): weight.shape for n, weight in theirs.named_parameters()}
    if config is REAL_7B:  # as the paper counts
        tower = sum(weight.numel() for weight in ours.visual.parameters())
        whole = sum(weight.numel() for weight in ours.parameters())
        assert (round((whole - tower) / 1e9, 3), round(tower / 1e9, 3)) == (7.616, 0.677)


def same_function(ours, theirs, run_ours, run_theirs):
    """Both come from the meta device and get one copy of random weights: those of 7B are large."""
    ours.to_empty(device="cpu")
    for weight in ours.parameters():
        weight.data.uniform_(-0.02, 0.02) if weight.dim() > 1 else weight.data.uniform_(0.5, 1.5)
    theirs.load_state_dict(ours.state_dict(), assign=True)
    out = run_ours()
    grads, wanted = gradients(ours, out), run_theirs()
    assert distance(out, wanted) < 1e-5
    assert_same_gradients(grads, gradients(theirs, wanted))


def test_a_decoder_layer_with_the_shapes_of_7b_equals_that_of_transformers():
    config = replace(REAL_7B, num_hidden_layers=1, vocab_size=8)
    text = official_config(config).text_config
    with torch.device("meta"):
        ours, theirs = model.Decoder(config), official().Qwen2_5_VLTextModel(text)
    theirs.rotary_emb = official().Qwen2_5_VLRotaryEmbedding(text)
    pack = make_pack([document(3, (1, 4, 6), 4)])
    far = replace(pack, positions=pack.positions + 60_000)  # as at the end of a document of 64k
    x = torch.randn(len(pack.ids), 3584, generator=torch.Generator().manual_seed(1))
    inputs = dict(inputs_embeds=x[None], position_ids=far.positions[:, None], use_cache=False)
    same_function(ours, theirs, lambda: ours(x, far), lambda: theirs(**inputs).last_hidden_state[0])


def test_vision_blocks_with_the_shapes_of_7b_equal_those_of_transformers():
    vision = replace(VISION_7B, depth=2, fullatt_block_indexes=(1,))  # one windowed, one full
    settings = official_config(replace(REAL_7B, vision=vision)).vision_config
    with torch.device("meta"):
        ours = model.VisionTower(vision)
        theirs = official().Qwen2_5_VisionTransformerPretrainedModel(settings)
    theirs.rotary_pos_emb = official().Qwen2_5_VLVisionRotaryEmbedding(settings)
    grids = torch.tensor([[1, 10, 6]])  # 5 x 3 merged: a window of 4 x 3 and one of 1 x 3
    x = torch.randn(60, 1176, generator=torch.Generator().manual_seed(1))
    same_function(
        ours, theirs, lambda: ours(x, grids.tolist()), lambda: theirs(x, grids).pooler_output
    )


def test_positions_equal_get_rope_index_of_transformers(pair):
    rng = random.Random(0)
    cases = [part for case in CASES.values() for part in case]
    for _ in range(40):
        parts = [rng.randrange(1, 40)]
        for _ in range(rng.randrange(4)):
            parts += [(1, 2 * rng.randrange(1, 30), 2 * rng.randrange(1, 30)), rng.randrange(1, 40)]
        cases.append((*parts, 2))
    for doc in (document(*parts) for parts in cases):
        inputs = referee_inputs(doc)
        theirs, _ = pair[1].model.get_rope_index(
            inputs["input_ids"], inputs["mm_token_type_ids"], inputs.get("image_grid_thw")
        )
        images = list(zip(doc.prompt.offsets, doc.prompt.grids, strict=True))
        assert torch.equal(model.mrope_positions(len(doc), images), theirs[:, 0])


# ---- packs


def test_a_document_cannot_see_its_neighbours(ours):
    pack = make_pack(MIXED)
    changed = pack.ids.clone()
    changed[: pack.lengths[0]] = 50
    before, after = ours.logits(pack), ours.logits(replace(pack, ids=changed))
    assert torch.equal(before[pack.lengths[0] :], after[pack.lengths[0] :])
    assert not torch.equal(before[: pack.lengths[0]], after[: pack.lengths[0]])


class Operators(TorchDispatchMode):
    """What ran, and the most elements that any result had."""

    def __init__(self):
        super().__init__()
        self.names, self.elements = set(), 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        self.names.add(str(operator))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("head", ["lm", "value"])
def test_responses_that_share_their_prompt_and_pictures_give_what_they_give_apart(head):
    network = small_model(head=head)
    first, second = document(2, BIG, 3, WIDE, 9), document(6)
    responses = [([30] * 7, first), ([23], second), ([20, 21, 22], first), ([40, 41], second)]
    documents = [Document(doc.prompt, ids) for ids, doc in responses]
    twin = replace(first.prompt, patches=first.prompt.patches.clone())  # passes the tower twice
    apart = [*documents[:2], Document(twin, documents[2].response_ids), documents[3]]
    shared, plain = make_pack(documents, share_prompts=True), make_pack(apart)
    assert len(plain.ids) - len(shared.ids) == len(first.prompt.ids) + len(second.prompt.ids)
    assert 2 * len(shared.patches) == len(plain.patches)
    one, two, again = (
        network.logps(pack)[0] if head == "lm" else network.values(pack)
        for pack in (shared, plain, shared)
    )
    assert distance(one, two) < 1e-5
    assert_same_gradients(gradients(network, one), gradients(network, two))
    with Operators() as backward:
        torch.autograd.grad(again.sum(), network.model.embed_tokens.weight)
    # hidden[rows] has a backward, index_put, that adds repeated rows in an order that follows where
    # the memory lies: at the miniature's size, two runs in five gave other last bits.
    assert "aten.index_add.default" in backward.names
    assert not {name for name in backward.names if "index_put" in name}


def test_lengths_that_do_not_add_up_are_an_error(ours):
    pack = make_pack([document(*ONE)])
    with pytest.raises(AssertionError, match="lengths sum to 100, the pack has 104 tokens"):
        ours.logits(Inputs(pack.ids, pack.positions, [50, 50]))


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
            scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -math.inf)
        out.append((scores.softmax(-1) @ c).transpose(0, 1))
    return torch.cat(out)


class OnGpu(torch.Tensor):
    is_cuda = True


@pytest.mark.parametrize("causal", [True, False])
def test_flash_attention_gets_what_its_interface_asks_for(monkeypatch, causal):
    torch.manual_seed(0)
    qkv = [torch.randn(20, heads, 8, dtype=torch.float64) for heads in (4, 2, 2)]
    ours = model.attend(*qkv, [5, 5, 1, 9], causal)
    monkeypatch.setattr(model, "flash_attn_varlen_func", naive_varlen)
    flash = model.attend(*(x.as_subclass(OnGpu) for x in qkv), [5, 5, 1, 9], causal)
    assert isinstance(flash, OnGpu) and distance(flash.as_subclass(torch.Tensor), ours) < 1e-6


# ---- KV cache


def test_token_by_token_with_a_cache_equals_the_whole_documents(ours):
    """Prompts of different lengths, with and without pictures; rows are repeated and dropped."""
    prompts = [document(*parts) for parts in ((5,), ONE, (13,), BETWEEN)]
    pack, words = make_pack(prompts), random.Random(3)
    owner, tokens = [0, 1, 1, 2, 3, 3], [[] for _ in range(6)]  # of each row: prompt, own tokens
    with torch.no_grad():
        cache = KVCache(SMALL, 4, max(pack.lengths) + 12, torch.float32, torch.device("cpu"))
        last = torch.tensor(pack.lengths).cumsum(0) - 1
        first = ours.logits(pack, rows=last, cache=cache)
        assert distance(first, ours.logits(pack)[last]) < 1e-5
        assert cache.lengths.tolist() == pack.lengths
        cache.take(torch.tensor(owner))
        positions = pack.positions[:, last].amax(0)[torch.tensor(owner)] + 1
        for step in range(12):
            tokens = [[*own, words.randrange(10, 96)] for own in tokens]
            newest = torch.tensor([own[-1] for own in tokens])
            logits = ours.logits(Inputs(newest, positions.expand(3, -1), None), cache=cache)
            positions = positions + 1
            for row, prompt in enumerate(owner):
                ids = prompts[prompt].response_ids + tokens[row]
                whole = ours.logits(make_pack([Document(prompts[prompt].prompt, ids)]))[-1]
                assert distance(logits[row], whole) < 1e-5, f"row {row}, step {step}"
            if step == 3:  # the last of a copy, the first, and a swap
                rows = torch.tensor([4, 2, 1, 3])
                cache.take(rows)
            elif step == 7:
                rows = cache.keep(torch.tensor([False, True, False, True]))
                assert sorted(rows.tolist()) == [1, 3]
            else:
                continue
            owner, tokens = ([of_row[i] for i in rows] for of_row in (owner, tokens))
            positions = positions[rows]


# ---- heads


@pytest.mark.parametrize("chunk", [1, 7, 32, 33, 1000])
def test_chunked_log_probs_equal_those_of_the_full_logits(chunk):
    noise = torch.Generator().manual_seed(0)
    hidden = torch.randn(33, 8, generator=noise, requires_grad=True)
    weight = torch.randn(50, 8, generator=noise, requires_grad=True)
    targets = torch.randint(0, 50, (33,), generator=noise)
    upstream = torch.randn(33, generator=noise)
    logps, entropies = model.chunked_logps(hidden, weight, targets, chunk)
    full = (hidden.double() @ weight.double().T).log_softmax(-1)
    wanted = full[range(33), targets]
    assert (logps - wanted).abs().max() < 1e-5
    assert (entropies - torch.distributions.Categorical(logits=full).entropy()).abs().max() < 1e-5
    assert not entropies.requires_grad
    ours = torch.autograd.grad((logps * upstream).sum(), [hidden, weight])
    theirs = torch.autograd.grad((wanted * upstream).sum(), [hidden, weight])
    assert max(map(distance, ours, theirs)) < 1e-5


def test_in_bf16_log_probs_are_float32_and_the_head_s_gradient_is_rounded_once():
    """Summed over 32 chunks in bf16 it was off by 0.7 %."""
    torch.manual_seed(0)
    targets = torch.randint(0, 200, (4096,))
    half = [torch.randn(n, 32).bfloat16().requires_grad_() for n in (4096, 200)]
    half[1].data /= 32**0.5
    whole = [x.detach().double().requires_grad_() for x in half]
    logps, _ = model.chunked_logps(*half, targets, chunk=128)
    exact = F.linear(*half).float().log_softmax(-1)[range(4096), targets]
    assert logps.dtype == torch.float32 and (logps - exact).abs().max() < 1e-5
    logps.sum().backward()
    F.linear(*whole).log_softmax(-1)[range(4096), targets].sum().backward()
    error = (half[1].grad - whole[1].grad).norm() / whole[1].grad.norm()
    assert half[1].grad.dtype == torch.bfloat16 and error < 0.0035


def test_the_logits_of_a_long_row_never_exist_and_none_are_kept_for_backward():
    shapes, targets = set(), torch.zeros(64, dtype=torch.int64)
    hidden, weight = torch.randn(64, 4, requires_grad=True), torch.randn(50, 4, requires_grad=True)
    hooks = lambda x: shapes.add(x.shape) or x, lambda x: x  # noqa: E731
    with Operators() as ran, torch.autograd.graph.saved_tensors_hooks(*hooks):
        model.chunked_logps(hidden, weight, targets, chunk=8)[0].sum().backward()
    assert ran.elements == 8 * 50
    assert shapes == {(64, 4), (50, 4), (64,)}


def test_a_critic_reads_the_hidden_states_with_a_head_of_width_one(pair, tmp_path):
    ours, theirs = pair
    save_model(ours, tmp_path)
    critic = load_model(tmp_path, head="value")
    assert critic.lm_head is None and critic.value_head.weight.shape == (1, 64)
    pack = make_pack(MIXED)
    inputs = [referee_inputs(doc) for doc in MIXED]
    hidden = torch.cat([theirs.model(**x).last_hidden_state[0] for x in inputs])
    wanted = (hidden @ critic.value_head.weight[0])[pack.rows]
    assert distance(critic.values(pack), wanted) < 1e-5
    assert critic.bfloat16().values(pack).dtype == torch.float32


def test_a_new_value_head_is_small_and_follows_the_seed(tmp_path):
    """Open-Reasoner-Zero's code: N(0, 1/(C+1)), so that values begin near 0."""
    vision = replace(VISION, out_hidden_size=512)
    wide = replace(SMALL, hidden_size=512, mrope_section=(16, 24, 24), vision=vision)
    save_model(Qwen25VL(wide), tmp_path)
    torch.manual_seed(5)
    weight = load_model(tmp_path, head="value").value_head.weight
    torch.manual_seed(5)
    assert torch.equal(weight, torch.empty(1, 512).normal_(std=1 / 513))


# ---- files


def saved(directory, network, limit=None):
    """A directory of the network, in several files where a limit is given."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "SHARD_BYTES", limit or model.SHARD_BYTES)
        save_model(network, directory)
    return directory


def refusal(directory, kind=ValueError):
    with pytest.raises(kind) as error:
        load_model(directory)
    return str(error.value)


def test_both_layouts_of_names_load_and_what_transformers_saves(tmp_path, pair):
    ours, theirs = pair
    theirs.save_pretrained(tmp_path)
    assert "text_config" in json.loads((tmp_path / "config.json").read_text())
    again = load_model(tmp_path)
    assert replace(again.config, vision_token_id=5) == ours.config  # transformers drops that one
    assert_same_weights(again, ours)
    named = {name: weight.detach() for name, weight in theirs.named_parameters()}
    assert sum(name.startswith("model.language_model.layers.0.") for name in named) == 12
    save_file(named, tmp_path / "model.safetensors")
    assert_same_weights(load_model(tmp_path), ours)


@pytest.mark.parametrize("before", [None, 200_000], ids=["over one file", "over several"])
@pytest.mark.parametrize("after", [None, 150_000], ids=["one file", "several"])
def test_what_is_saved_loads_here_and_in_transformers(tmp_path, ours, before, after):
    saved(tmp_path, small_model(seed=1), before)  # of which nothing stays behind
    saved(tmp_path, ours, after)
    assert_same_weights(load_model(tmp_path), ours)
    theirs = {model.hub_name(n): weight for n, weight in referee(tmp_path).named_parameters()}
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.named_parameters())
    files = sorted(file.name for file in tmp_path.glob("*safetensors*"))
    count = len(files) - 1
    if after:
        numbered = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        assert count > 3 and files == [*numbered, model.INDEX]
    else:
        assert files == ["model.safetensors"]


def test_a_tied_head_is_the_embedding_before_and_after_saving(tmp_path):
    tied = small_model(TIED)
    weights = load_file(saved(tmp_path, tied) / "model.safetensors")
    assert "lm_head.weight" not in weights
    again = load_model(tmp_path)
    assert again.head_weight is again.model.embed_tokens.weight
    embedding = weights["model.embed_tokens.weight"]
    save_file(weights | {"lm_head.weight": embedding.clone()}, tmp_path / "model.safetensors")
    assert_same_weights(load_model(tmp_path), tied)  # present and equal, as some hub files have it
    save_file(weights | {"lm_head.weight": embedding + 1}, tmp_path / "model.safetensors")
    assert "model.safetensors: lm_head.weight differs" in refusal(tmp_path)


@pytest.mark.parametrize("config", [SMALL, TIED], ids=["untied", "tied"])
def test_a_critic_survives_saving_and_gives_a_policy_its_body_but_no_head(tmp_path, config):
    critic = small_model(config, head="value")
    save_model(critic, tmp_path)
    assert_same_weights(load_model(tmp_path, head="value"), critic)
    if config is TIED:
        assert load_model(tmp_path).value_head is None  # tied: the head is the embedding
    else:
        assert "missing lm_head.weight" in refusal(tmp_path)


def test_bf16_is_saved_and_loaded_and_rounds_as_transformers_does(tmp_path, ours):
    save_model(ours, tmp_path, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    half, exact = load_model(tmp_path, torch.bfloat16), load_model(tmp_path)
    assert_same_weights(exact, small_model().bfloat16().float())  # float32 masters of bf16 files
    doc = document(*TEXT)
    theirs = referee(tmp_path, torch.bfloat16)(**referee_inputs(doc)).logits[0].float()
    logits, wanted = half.logits(make_pack([doc])), exact.logits(make_pack([doc]))
    assert logits.dtype == torch.float32 and distance(logits, wanted) < 0.05
    assert (logits - theirs).abs().mean() < 0.2 * (logits - wanted).abs().mean()


def test_tokenizer_template_and_settings_are_copied_along(tmp_path, ours):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    copied = """tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json
        vocab.json merges.txt chat_template.json chat_template.jinja preprocessor_config.json
        video_preprocessor_config.json generation_config.json""".split()
    for name in [*copied, "config.json", "model-00009.safetensors", "adapter_config.json"]:
        (source / name).write_text(f'"{name}"')
    for like in (source, target):  # at last onto itself
        save_model(ours, target, like=like)
        names = {file.name for file in target.iterdir()}
        assert names == {*copied, "config.json", "model.safetensors"}
        assert all((target / name).read_text() == f'"{name}"' for name in copied)
    assert load_model(target).config == SMALL


# ---- directories that do not fit

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 3900233256\n"
NORM, NESTED = "model.norm.weight", "model.language_model.norm.weight"
FILE, SECOND, INDEX = "model.safetensors", "model-00002-of-00004.safetensors", model.INDEX
OTHER = "lists other files than are there,"


def tensors(changes):
    """None takes one away."""

    def damage(folder):
        weights = load_file(folder / FILE) | changes
        save_file({n: w for n, w in weights.items() if w is not None}, folder / FILE)

    return damage


def content(name, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def config(**changes):
    return content("config.json", lambda old: json.dumps(json.loads(old) | changes).encode())


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (tensors({NORM: None}), f"does not fit config.json: missing {NORM}"),
        (tensors({"lm_head.weight": None}), "missing lm_head.weight"),
        (tensors({"model.odd": torch.ones(2)}), f"unexpected model.odd in {FILE}"),
        (tensors({NORM: torch.ones(63)}), f"{NORM} is [63] in {FILE}, [64] by config.json"),
        (tensors({NESTED: torch.ones(64)}), f"{NORM} stands twice, in {FILE} and {FILE}"),
        (lambda folder: save_file({NORM: torch.ones(64)}, folder / "more.safetensors"),
         f"{NORM} stands twice, in {FILE} and more.safetensors"),
        (config(intermediate_size=95), "and 1 more"),
        (content("config.json", lambda old: b"\xef\xbb\xbf" + old), "config.json is no JSON"),
        (content("config.json", lambda old: old[:-5]), "config.json is no JSON"),
        (content("config.json", lambda old: b"\xff\xfe"), "config.json is no JSON"),
        (content("config.json", lambda old: LFS), "config.json is no JSON"),
        (content("config.json", lambda old: b"[]"), "config.json: "),
        (config(model_type="qwen2_vl"), "config.json: model_type is 'qwen2_vl'"),
        (config(use_sliding_window=True), "use_sliding_window"),
        (config(hidden_act="gelu"), "hidden_act gelu"),
        (config(hidden_size=None), "hidden_size"),
        (config(hidden_size=32), "out_hidden_size 64, not 32"),
        (config(num_attention_heads=8), "mrope_section (2, 3, 3) with head_dim 8"),
        (config(rope_scaling={"type": "yarn"}), "config.json: rope {'type': 'yarn'}"),
        (config(rope_scaling=None), "mrope_section"),
        (config(vision_config=None), "config.json"),
    ],
)  # fmt: skip
def test_a_directory_that_does_not_fit_is_refused_by_name(tmp_path, ours, damage, said):
    damage(saved(tmp_path, ours))
    assert said in (message := refusal(tmp_path)) and str(tmp_path) in message


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (content(SECOND, lambda old: LFS), f"{SECOND} is cut, or a Git-LFS pointer"),
        (content(SECOND, lambda old: b""), f"{SECOND} is cut"),
        (content(SECOND, lambda old: old[:90]), f"{SECOND} is cut"),
        (content(SECOND, lambda old: old[:-1]), f"{SECOND} is cut"),
        (lambda folder: (folder / SECOND).unlink(), f"{INDEX} {OTHER} ['{SECOND}']"),
        # transformers would take this file, and vLLM the index
        (lambda folder: shutil.copy(folder / SECOND, folder / FILE), f"{INDEX} {OTHER} ['{FILE}']"),
        (content(INDEX, lambda old: old[:-10]), f"{INDEX} is no JSON"),
        (content(INDEX, lambda old: b'{"weight_map": null}'), f"{INDEX} {OTHER}"),
        (content(INDEX, lambda old: b'{"metadata": {}}'), f"{INDEX} {OTHER}"),
    ],
)  # fmt: skip
def test_files_and_index_that_do_not_belong_together_are_refused_by_name(
    tmp_path, ours, damage, said
):
    damage(saved(tmp_path, ours, 200_000))
    assert said in refusal(tmp_path)


def test_a_directory_without_a_model_says_what_is_missing(tmp_path, ours):
    assert "config.json is missing" in refusal(tmp_path, FileNotFoundError)
    (saved(tmp_path, ours) / FILE).unlink()
    assert "no *.safetensors" in refusal(tmp_path, FileNotFoundError)


# ---- config.json


@pytest.mark.parametrize("config", [SMALL, TIED, REAL_7B, REAL_3B])
def test_flat_and_nested_configurations_are_both_read(tmp_path, config):
    odd = replace(config, rms_norm_eps=3e-5, rope_theta=5e5, eos_token_id=(2, 0))
    raw = json.loads(json.dumps(model.config_json(odd, torch.bfloat16)))
    assert raw["eos_token_id"] == [2, 0] and config.stop_ids == (config.eos_token_id,)
    for flat in (raw, raw | {"text_config": None}):
        (tmp_path / "config.json").write_text(json.dumps(flat))
        assert model.read_config(tmp_path) == odd and odd.stop_ids == (2, 0)
    official_config(odd).save_pretrained(tmp_path)
    nested = json.loads((tmp_path / "config.json").read_text())
    assert "hidden_size" not in nested and nested["text_config"]["rms_norm_eps"] == 3e-5
    assert replace(model.read_config(tmp_path), vision_token_id=odd.vision_token_id) == odd


# ---- several ranks


def sharded(directory, mesh, head="lm"):
    """As a stage builds it, with a frozen tower that every rank holds whole, in bf16 compute; and
    how many elements it read.
    """
    network = model.empty_model(directory, head)
    frozen = {*network.visual.requires_grad_(False).bfloat16().parameters()}
    precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for module in (*network.model.layers, network):
        fully_shard(module, mesh=mesh, mp_policy=precision, ignored_params=frozen)
    register_fsdp_forward_method(network, "logps")
    network.to_empty(device="cpu")
    read_data, counts = HuggingFaceStorageReader.read_data, []

    def spy(reader, plan, planner):
        counts.extend(math.prod(item.lengths) for item in plan.items)
        return read_data(reader, plan, planner)

    torch.manual_seed(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HuggingFaceStorageReader, "read_data", spy)
        model.load_weights(network, directory)
    return network, sum(counts)


def four_ranks(rank, root):
    """What several ranks do together; an assertion that fails here fails the test."""
    dist.init_process_group("gloo", f"file://{root}/meet", rank=rank, world_size=4)
    flat = init_device_mesh("cpu", (4,), mesh_dim_names=("shard",))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    group = dist.new_group(backend="gloo")  # of a thread that saves while the training goes on
    cases = [(flat, "lm", "policy"), (mesh, "lm", "tied"), (mesh, "value", "policy")]
    for mesh, head, name in cases:
        network, elements = sharded(root / name, mesh, head)
        own = [w.to_local() if isinstance(w, DTensor) else w for w in network.parameters()]
        if head == "value":
            own.pop()  # is drawn, not read
        assert elements == sum(map(torch.numel, own))
        torch.manual_seed(3)
        whole = load_model(root / name, head=head)
        state = network.state_dict()
        for (name, weight), wanted in zip(state.items(), whole.parameters(), strict=True):
            assert isinstance(weight, DTensor) is not name.startswith("visual."), name
            weight = weight.full_tensor() if isinstance(weight, DTensor) else weight
            assert torch.equal(weight.float(), wanted), name
        if head == "lm":  # leaves gathered bf16 weights, which are not the masters
            network.logps(make_pack(MIXED[:2]))
        save_model(network, root / "float32")
        save_model(network, root / "bfloat16", dtype=torch.bfloat16)
        with ThreadPoolExecutor(1) as thread, pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "SHARD_BYTES", 200_000)
            arguments = network.state_dict(), network.config, root / "several", torch.float32
            thread.submit(model.save_weights, *arguments, group=group).result()
        dist.barrier()
        assert len([*(root / "several").iterdir()]) > 5
        for directory in (root / "float32", root / "several"):
            assert_same_weights(load_model(directory, head=head), whole)
        half = load_model(root / "bfloat16", torch.bfloat16, head=head)
        assert_same_weights(half, whole.bfloat16())
        dist.barrier()
    with pytest.raises(ValueError, match="lm_head.weight differs"):
        sharded(root / "untied", mesh)
    with pytest.raises(OSError, match="writing .*policy/config.json/model failed"):
        save_model(network, root / "policy/config.json/model")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # Python's own clean-up may abort in a gloo thread, see distributed.finish


def test_ranks_read_their_own_rows_alone_and_write_one_model(tmp_path):
    policy, tied = small_model(), small_model(TIED)
    for network in (policy, tied):
        network.visual.bfloat16().float()  # a frozen tower is kept in bfloat16
    saved(tmp_path / "policy", policy, 200_000)
    weights = load_file(saved(tmp_path / "tied", tied) / "model.safetensors")
    shutil.copytree(tmp_path / "tied", tmp_path / "untied")
    head = weights["model.embed_tokens.weight"].clone()
    head[-1] += 1  # of which the first rank reads nothing
    save_file(weights | {"lm_head.weight": head}, tmp_path / "untied/model.safetensors")
    torch.multiprocessing.spawn(four_ranks, (tmp_path,), nprocs=4)
