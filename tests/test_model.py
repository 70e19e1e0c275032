"""model.py against transformers: logits, gradients, positions, head, files.

The referee is Qwen2_5_VLForConditionalGeneration 5.19 (sdpa, fp32), which opens what save_model
wrote and reads one document at a time, with use_cache=False: it leaks across packed documents. Our
side reads packs. "Equal" is to float rounding: the largest difference over the largest value of the
tensor. The small model has windowed and full-attention vision blocks, and pictures of several
windows, whole and ragged.
"""

import json
import math
import multiprocessing
import os
import random
import re
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as official

import model
from common import distributed
from common.data import Document, Prompt
from common.packs import make_pack
from model import Config, Qwen25VL, VisionConfig, load_model, save_model
from tools import plan

START, END, IMAGE = 3, 4, 6  # of the small model's 96 tokens; 10 and above are words
IDS = dict(bos_token_id=1, eos_token_id=2, vision_start_token_id=START, vision_end_token_id=END)
IDS |= dict(vision_token_id=5, image_token_id=IMAGE, video_token_id=7)
VISION = VisionConfig(4, 32, 40, num_heads=2, out_hidden_size=64, fullatt_block_indexes=(1, 3))
SMALL = Config(64, 96, 3, 4, 2, 96, (2, 3, 3), VISION, **IDS)
TIED = replace(SMALL, tie_word_embeddings=True)
BIG, WIDE, SMALLEST = (1, 20, 18), (1, 4, 22), (1, 2, 2)  # 10 x 9 merged: windows of 4 x 4 and less
ONE, BETWEEN = (3, BIG, 9), (4, WIDE, 5, BIG, 6, SMALLEST, 3)  # parts of document()
FILE, CONFIG = "model.safetensors", "config.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def small_model(config=SMALL, head="lm", seed=0):
    """Every weight random, those too that begin at 1 or 0: a forgotten norm would not show."""
    torch.manual_seed(seed)
    network = Qwen25VL(config, head)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    return network


def referee(directory, dtype=torch.float32):
    load = official.Qwen2_5_VLForConditionalGeneration.from_pretrained
    return load(directory, dtype=dtype, attn_implementation="sdpa").eval()


def official_config(config):
    raw = json.loads(json.dumps(model.config_json(config, torch.float32)))
    del raw["model_type"]
    return official.Qwen2_5_VLConfig(**raw, attn_implementation="sdpa")


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
    wrong = {name: d for name in ours if not (d := distance(ours[name], theirs[name])) < 1e-4}
    assert not wrong


def assert_same_weights(one, other):
    for (name, weight), wanted in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(weight, wanted), name


PARTS = (5,), ONE, (12,), BETWEEN, (9,), (9,), (1, (1, 10, 14), 4)
MIXED = [document(*parts, seed=i) for i, parts in enumerate(PARTS)]
CASES = {"text": [document(21)], "one image": [document(*ONE)], "a mixed pack": MIXED}


# ---- parity with transformers


@pytest.mark.parametrize("documents", CASES.values(), ids=CASES.keys())
def test_logits_and_all_gradients_equal_those_of_transformers(pair, documents):
    ours, theirs = pair
    logits = ours.logits(make_pack(documents))
    wanted = torch.cat([theirs(**referee_inputs(doc)).logits[0] for doc in documents])
    assert distance(logits, wanted) < 1e-5
    assert_same_gradients(gradients(ours, logits), gradients(theirs, wanted))


def test_a_decoder_layer_with_the_heads_of_7b_equals_that_of_transformers_at_position_60000():
    config = replace(plan.MODELS["7b"], num_hidden_layers=1, vocab_size=8, intermediate_size=64)
    text = official_config(config).text_config
    ours, theirs = model.Decoder(config), official.Qwen2_5_VLTextModel(text)
    theirs.load_state_dict(ours.state_dict())
    pack = make_pack([document(3, (1, 4, 6), 4)])
    far = replace(pack, positions=pack.positions + 60_000)
    x = torch.randn(len(pack.ids), 3584, generator=torch.Generator().manual_seed(1))
    inputs = dict(inputs_embeds=x[None], position_ids=far.positions[:, None], use_cache=False)
    out, wanted = ours(x, far), theirs(**inputs).last_hidden_state[0]
    assert distance(out, wanted) < 1e-5
    assert_same_gradients(gradients(ours, out), gradients(theirs, wanted))


class Operators(TorchDispatchMode):
    """What ran, and the most elements that any result had."""

    def __init__(self):
        super().__init__()
        self.names, self.elements = set(), 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        self.names.add(str(operator))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.elements = max(self.elements, *sizes)
        return out


@pytest.mark.parametrize("head", ["lm", "value"])
def test_responses_that_share_their_prompt_and_pictures_give_what_they_give_apart(head):
    network = small_model(head=head)
    first, second = document(2, BIG, 3, WIDE, 9).prompt, document(6).prompt
    answers = [(first, [30] * 7), (second, [23]), (first, [20, 21, 22]), (second, [40, 41])]
    documents = [Document(*answer) for answer in answers]
    shared, apart = make_pack(documents, share_prompts=True), make_pack(documents)
    assert len(apart.ids) - len(shared.ids) == len(first.ids) + len(second.ids)
    assert 2 * len(shared.patches) == len(apart.patches)
    read = network.values if head == "value" else lambda pack: network.logps(pack)[0]
    one, two = read(shared), read(apart)
    assert distance(one, two) < 1e-5
    with Operators() as backward:
        torch.autograd.grad(one.sum(), network.model.embed_tokens.weight, retain_graph=True)
    # hidden[rows] has a backward, index_put, that adds repeated rows in an order that follows where
    # the memory lies: at the miniature's size, two runs in five gave other last bits.
    assert not {name for name in backward.names if "index_put" in name}
    assert_same_gradients(gradients(network, one), gradients(network, two))


class OnGpu(torch.Tensor):
    is_cuda = True


@pytest.mark.parametrize("causal", [True, False])
def test_flash_attention_gets_what_its_interface_asks_for(monkeypatch, causal):
    def varlen(q, k, v, ends, k_ends, longest, longest_k, causal):
        """By its documentation."""
        lengths = ends.diff().tolist()
        assert ends.dtype == torch.int32 and torch.equal(ends, k_ends)
        assert longest == longest_k == max(lengths)
        plain = (x.as_subclass(torch.Tensor) for x in (q, k, v))
        return attend(*plain, lengths, causal).as_subclass(OnGpu)

    attend, qkv = model.attend, [torch.randn(20, n, 8).double() for n in (4, 2, 2)]
    ours = attend(*qkv, [5, 5, 1, 9], causal)
    monkeypatch.setattr(model, "flash_attn_varlen_func", varlen)
    flash = attend(*(x.as_subclass(OnGpu) for x in qkv), [5, 5, 1, 9], causal)
    assert isinstance(flash, OnGpu) and torch.equal(flash.as_subclass(torch.Tensor), ours)


@pytest.mark.parametrize("chunk", [1, 32, 1000])
def test_chunked_log_probs_equal_those_of_the_full_logits(chunk):
    torch.manual_seed(0)
    hidden, weight = torch.randn(33, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    targets, upstream = torch.randint(0, 50, (33,)), torch.randn(33)
    logps, entropies = model.chunked_logps(hidden, weight, targets, chunk)
    full = (hidden.double() @ weight.double().T).log_softmax(-1)
    wanted = full[range(33), targets]
    assert (logps - wanted).abs().max() < 1e-5
    assert (entropies - torch.distributions.Categorical(logits=full).entropy()).abs().max() < 1e-5
    assert not entropies.requires_grad
    below_frozen, _ = model.chunked_logps(hidden, weight.detach(), targets, chunk)
    ours = torch.autograd.grad((logps * upstream).sum(), [hidden, weight])
    theirs = torch.autograd.grad((wanted * upstream).sum(), [hidden, weight])
    assert all(distance(*pair) < 1e-5 for pair in zip(ours, theirs, strict=True))
    assert torch.equal(torch.autograd.grad((below_frozen * upstream).sum(), hidden)[0], ours[0])


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
    assert ran.elements == 8 * 50 and shapes == {(64, 4), (50, 4), (64,)}


def test_a_critic_reads_the_hidden_states_with_a_head_of_width_one_that_begins_small(pair):
    _, theirs = pair
    torch.manual_seed(5)
    critic, pack = load_model(theirs.name_or_path, head="value"), make_pack(MIXED)
    torch.manual_seed(5)  # Open-Reasoner-Zero's code: N(0, 1/(C+1)), so that values begin near 0
    assert torch.equal(critic.value_head.weight, torch.empty(1, 64).normal_(std=1 / 65))
    hidden = [theirs.model(**referee_inputs(doc)).last_hidden_state[0] for doc in MIXED]
    wanted = (torch.cat(hidden) @ critic.value_head.weight[0])[pack.rows]
    assert distance(critic.values(pack), wanted) < 1e-5
    assert critic.bfloat16().values(pack).dtype == torch.float32


# ---- files


def split(directory):
    """Into two files, as the hub has large models: the tower, and the decoder with its head."""
    weights = load_file(directory / FILE)
    decoder = {name: weights.pop(name) for name in [*weights] if not name.startswith("visual.")}
    save_file(weights, directory / FIRST)
    save_file(decoder, directory / SECOND)
    (directory / FILE).unlink()


def test_both_layouts_of_names_load_and_what_transformers_saves(tmp_path, pair):
    ours, theirs = pair
    theirs.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert replace(again.config, vision_token_id=5) == ours.config  # transformers drops that one
    assert_same_weights(again, ours)
    named = {name: weight.detach() for name, weight in theirs.named_parameters()}
    assert "model.language_model.layers.0.mlp.up_proj.weight" in named
    save_file(named, tmp_path / FILE)
    assert_same_weights(load_model(tmp_path), ours)


@pytest.mark.parametrize("config", [SMALL, TIED], ids=["untied", "tied"])
def test_what_is_saved_loads_and_leaves_nothing_older(tmp_path, config):
    older, newer = small_model(config, seed=1), small_model(config)
    save_model(older, tmp_path)
    split(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{")  # not read: the files say it all
    assert_same_weights(load_model(tmp_path), older)
    save_model(newer, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {FILE, CONFIG}
    assert_same_weights(load_model(tmp_path), newer)
    weights = load_file(tmp_path / FILE)
    assert ("lm_head.weight" in weights) == (config is SMALL)
    head = newer.head_weight.detach().clone()  # some hub files have it where it is tied, too
    save_file(weights | {"lm_head.weight": head}, tmp_path / FILE)
    assert_same_weights(load_model(tmp_path), newer)


def test_a_critic_survives_saving_and_gives_a_policy_its_body_but_no_head(tmp_path):
    for config, name in ((TIED, "tied"), (SMALL, "untied")):
        critic = small_model(config, head="value")
        save_model(critic, tmp_path / name)
        assert_same_weights(load_model(tmp_path / name, head="value"), critic)
    assert load_model(tmp_path / "tied").value_head is None  # its head is the embedding
    with pytest.raises(ValueError, match="missing lm_head.weight"):
        load_model(tmp_path / "untied")


def test_bf16_is_saved_and_loaded_and_rounds_as_transformers_does(tmp_path, ours):
    save_model(ours, tmp_path, dtype=torch.bfloat16)
    assert json.loads((tmp_path / CONFIG).read_text())["torch_dtype"] == "bfloat16"
    half, exact = load_model(tmp_path, torch.bfloat16), load_model(tmp_path)
    assert_same_weights(exact, small_model().bfloat16().float())  # float32 masters of bf16 files
    doc = document(21)
    theirs = referee(tmp_path, torch.bfloat16)(**referee_inputs(doc)).logits[0].float()
    logits, wanted = half.logits(make_pack([doc])), exact.logits(make_pack([doc]))
    assert logits.dtype == torch.float32 and distance(logits, wanted) < 0.05
    assert (logits - theirs).abs().mean() < 0.2 * (logits - wanted).abs().mean()


def test_tokenizer_template_and_settings_are_copied_along(tmp_path, ours):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    copied = """tokenizer.json tokenizer_config.json added_tokens.json vocab.json merges.txt
        chat_template.jinja preprocessor_config.json generation_config.json""".split()
    for name in [*copied, CONFIG, SECOND, "adapter_config.json"]:
        (source / name).write_text(f'"{name}"')
    for like in (source, target):  # at last onto itself
        save_model(ours, target, like=like)
        assert {file.name for file in target.iterdir()} == {*copied, CONFIG, FILE}
        assert all((target / name).read_text() == f'"{name}"' for name in copied)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 3900233256\n"
NORM, NESTED, FINAL = "model.norm.weight", "model.language_model.norm.weight", torch.ones(64)


@pytest.mark.parametrize(
    "file, change, said",
    [
        (SECOND, {NORM: None}, f"missing {NORM}"),
        (SECOND, {"model.odd": FINAL}, f"model.odd in {SECOND} is [64]"),
        (SECOND, {NORM: FINAL[1:]}, f"{NORM} in {SECOND} is [63], by config.json [64]"),
        (FIRST, {NESTED: FINAL}, f"{NORM} stands twice, in {FIRST} and {SECOND}"),
        (SECOND, lambda old: LFS, f"{SECOND} is cut, or a Git-LFS pointer"),
        (SECOND, lambda old: old[:-1], f"{SECOND} is cut"),
        (CONFIG, lambda old: b"\xef\xbb\xbf" + old, "config.json"),
        (CONFIG, lambda old: old[:-5], "config.json"),
        (CONFIG, {"model_type": "qwen2_vl"}, "qwen2_vl"),
        (CONFIG, {"rope_scaling": {"type": "yarn"}}, "yarn"),
        (CONFIG, {"use_sliding_window": True}, "use_sliding_window"),
        (CONFIG, {"hidden_act": "gelu"}, "gelu"),
        (CONFIG, {"hidden_size": None}, "hidden_size"),
    ],
)
def test_a_directory_that_does_not_fit_is_refused_by_name(tmp_path, ours, file, change, said):
    """change: of tensors or settings (None takes one away), or of a file's bytes."""
    save_model(ours, tmp_path)
    split(tmp_path)
    path = tmp_path / file
    if callable(change):
        path.write_bytes(change(path.read_bytes()))
    elif file == CONFIG:
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    else:
        weights = load_file(path) | change
        save_file({name: w for name, w in weights.items() if w is not None}, path)
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        load_model(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_flat_and_nested_configurations_are_both_read(tmp_path):
    odd = replace(plan.MODELS["3b"], rms_norm_eps=3e-5, rope_theta=5e5, eos_token_id=(2, 0))
    flat = model.config_json(odd, torch.bfloat16) | {"text_config": None}
    (tmp_path / CONFIG).write_text(json.dumps(flat))
    assert model.read_config(tmp_path) == odd
    assert (odd.stop_ids, SMALL.stop_ids) == ((2, 0), (2,))
    official_config(odd).save_pretrained(tmp_path)
    nested = json.loads((tmp_path / CONFIG).read_text())
    assert "hidden_size" not in nested
    nested["text_config"]["tie_word_embeddings"] = False  # some files repeat a default there
    (tmp_path / CONFIG).write_text(json.dumps(nested))
    assert replace(model.read_config(tmp_path), vision_token_id=odd.vision_token_id) == odd


def four_ranks(rank, root):
    """As two nodes of two GPUs; an assertion that fails here fails the test."""
    dist.init_process_group("gloo", f"file://{root}/meet", rank=rank, world_size=4)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    world = distributed.World(rank, 4, torch.device("cpu"), torch.bfloat16, mesh)
    read_data, counts = HuggingFaceStorageReader.read_data, []

    def counted(reader, plan, planner):
        counts.extend(math.prod(item.lengths) for item in plan.items)
        return read_data(reader, plan, planner)

    with patch.object(HuggingFaceStorageReader, "read_data", counted):
        network = distributed.load(root / "tied", world)
    own = (w.to_local() if isinstance(w, DTensor) else w for w in network.parameters())
    assert sum(counts) == sum(map(torch.numel, own))
    whole, state = load_model(root / "tied"), network.state_dict()
    for (name, weight), wanted in zip(state.items(), whole.parameters(), strict=True):
        assert isinstance(weight, DTensor) is not name.startswith("visual."), name
        assert torch.equal(model.gathered(weight).float(), wanted), name
    network.logps(make_pack(MIXED[:2]))  # leaves gathered bf16 weights, which are not the masters
    for dtype in (torch.float32, torch.bfloat16):
        save_model(network, root / str(dtype), dtype=dtype)
        dist.barrier()
        assert_same_weights(load_model(root / str(dtype), dtype), whole.to(dtype))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # Python's own clean-up may abort in a gloo thread, see distributed.finish


def test_ranks_read_their_own_rows_alone_and_write_one_model(tmp_path):
    network = small_model(TIED)
    network.visual.bfloat16().float()  # a frozen tower is kept in bfloat16
    save_model(network, tmp_path / "tied")
    split(tmp_path / "tied")
    # imports are most of a start: one process does them, and the ranks are its forks
    multiprocessing.set_forkserver_preload(["pytest", "common.packs", official.__name__])
    start = torch.multiprocessing.start_processes
    start(four_ranks, (tmp_path,), nprocs=4, start_method="forkserver")
