"""coldstart.py: what is trained, what the loss is, and runs against themselves."""

import json
import math
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import coldstart
from common import checkpoint as checkpoints
from common import data
from common import distributed as parallel
from model import load_model

ALONE = parallel.World(0, 1, torch.device("cpu"))
STEPS = 4  # of 8 rows; 40 rows, 8 of them for validation


def config(mini, out=".", **changed) -> coldstart.Config:
    small = dict(model=mini.model, data=mini.sft, out=str(out), epochs=1, batch=8, valid=8)
    small |= dict(pack_tokens=400, max_tokens=400, valid_every=2, threads=1)
    return coldstart.Config(**small | changed)


def run(cfg: coldstart.Config) -> Path:
    coldstart.main(cfg)
    return Path(cfg.out)


def metrics_of(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    machine = ("seconds", "tokens_per_second", "peak_gb")
    return [{k: v for k, v in row.items() if not k.startswith(machine)} for row in rows]


def wait_for(path: Path):
    """A checkpoint is written while the run goes on."""
    until = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until, f"{path} was never written"
        time.sleep(0.05)


def weights_of(run: Path) -> dict:
    return load_file(run / "model/model.safetensors")


@pytest.fixture(scope="module")
def whole(mini, tmp_path_factory):
    return run(config(mini, tmp_path_factory.mktemp("coldstart") / "whole"))


@pytest.fixture(scope="module")
def documents(mini):
    tokenizer, settings = data.load_tokenizer(mini.model), data.load_image_settings(mini.model)
    rows = [*data.read_examples(mini.sft)[:6], *data.read_examples(mini.replay)[:4]]
    return [data.encode_example(row, tokenizer, settings) for row in rows]


def naive_loss(model, documents) -> torch.Tensor:
    """Document by document, all logits, the mean of -log p over the response tokens."""
    terms = []
    for document in documents:
        pack = data.pack([document], len(document))[0]
        logps = model(**pack.inputs).log_softmax(-1)
        start = len(document.prompt.ids)
        terms += [-logps[t - 1, document.ids[t]] for t in range(start, len(document))]
    return torch.stack(terms).mean()


def shipped_loss(model, documents, budget) -> tuple[torch.Tensor, int]:
    cfg = coldstart.Config(pack_tokens=budget, max_tokens=budget)
    packs, tokens, left_out = coldstart.packs_of(documents, lambda d: d, cfg, ALONE, float)
    assert left_out == 0
    assert tokens == sum(len(d.response_ids) for d in documents)
    return sum(coldstart.loss_of(model, pack, tokens, "cpu") for pack in packs), len(packs)


def test_the_loss_is_the_mean_over_all_response_tokens(mini, documents):
    model = load_model(mini.model)
    loss, _ = shipped_loss(model, documents, 300)
    assert loss.item() == pytest.approx(naive_loss(model, documents).item(), rel=1e-6)
    assert loss.item() > 0.1


def test_the_gradient_does_not_depend_on_the_micro_batches(mini, documents):
    model = load_model(mini.model)
    gradients, counts = [], []
    for budget in (max(map(len, documents)), 250, 4096):
        loss, packs = shipped_loss(model, documents, budget)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        counts.append(packs)
    assert counts[0] > counts[1] > counts[2] == 1
    naive = torch.autograd.grad(naive_loss(model, documents), list(model.parameters()))
    for other in (gradients[0], gradients[1], naive):
        for (name, _), a, b in zip(model.named_parameters(), gradients[2], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4, msg=name)


def test_the_stop_token_carries_loss_and_the_prompts_do_not(mini, documents):
    stop = data.load_tokenizer(mini.model).convert_tokens_to_ids(data.STOP)
    for document in documents:
        pack = data.pack([document], len(document))[0]
        assert pack.targets.tolist() == document.response_ids and document.response_ids[-1] == stop
        assert stop in document.prompt.ids  # the end of the user's turn, which is not trained
    model = load_model(mini.model)
    cut = [replace(d, response_ids=d.response_ids[:-1]) for d in documents]
    count = sum(len(d.response_ids) for d in documents)
    of_all = shipped_loss(model, documents, 4096)[0] * count
    of_cut = shipped_loss(model, cut, 4096)[0] * (count - len(documents))
    packs = [data.pack([d], len(d))[0] for d in documents]
    naive = -sum(model(**p.inputs).log_softmax(-1)[-2, stop] for p in packs)
    assert (of_all - of_cut).item() == pytest.approx(naive.item(), rel=1e-4) and naive > 0.1


def test_only_the_language_model_moves_and_the_tower_keeps_every_bit(mini, tmp_path):
    trained = run(config(mini, tmp_path, replay=mini.replay))  # some rows hold pictures
    before, after = load_file(Path(mini.model) / "model.safetensors"), weights_of(trained)
    assert before.keys() == after.keys()
    for name, weight in after.items():
        assert torch.equal(weight, before[name]) == name.startswith("visual."), name
    assert sum(name.startswith("visual.") for name in after) > 20


def test_a_run_learns_and_tells_what_it_did(whole):
    rows = metrics_of(whole)
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert [row["step"] for row in rows if "valid_loss" in row] == [0, 2, 3]
    assert rows[3]["valid_loss"] < rows[0]["valid_loss"] and rows[3]["loss"] < rows[0]["loss"]
    assert all(row["too_long"] == 0 and row["tokens"] > 200 for row in rows)
    lr = [coldstart.cosine_lr(step, STEPS, 1e-3, 1e-4, 0.03) for step in range(STEPS)]
    assert [row["lr"] for row in rows] == lr
    assert not (whole / "checkpoints").exists()
    for file in ("tokenizer.json", "config.json", "preprocessor_config.json"):
        assert (whole / "model" / file).is_file(), file


def test_the_learning_rate_by_hand():
    lr = [coldstart.cosine_lr(step, 12, 1.0, 0.1, 0.2) for step in range(12)]
    assert lr[:3] == [0.5, 1.0, 1.0]  # 2 steps up; the cosine starts at the peak
    assert lr[7] == pytest.approx(0.55)  # half-way down, step 2 + 5 of 10
    assert lr[11] == pytest.approx(0.1 + 0.45 * (1 + math.cos(0.9 * math.pi)))
    assert coldstart.cosine_lr(0, 1000, 2e-4, 2e-5, 0.0) == 2e-4  # no warm-up: the peak at once
    assert coldstart.cosine_lr(10**6, 10**6, 2e-4, 2e-5, 0.03) == pytest.approx(2e-5)


def test_long_rows_are_left_out_and_counted_and_none_is_cut(mini, tmp_path):
    tokenizer, settings = data.load_tokenizer(mini.model), data.load_image_settings(mini.model)
    rows = data.read_examples(mini.sft)
    every = {r.id: data.encode_example(r, tokenizer, settings) for r in rows}
    lengths = sorted(map(len, every.values()))
    limit = lengths[len(lengths) // 2]
    cfg = config(mini, tmp_path, max_tokens=limit, pack_tokens=limit)
    train, valid = coldstart.split_rows(cfg)
    assert any(len(every[r.id]) > limit for r in valid)  # too long to pack
    told = metrics_of(run(cfg))
    stream = data.Stream(train, cfg.seed)
    for row in told:
        batch = [every[r.id] for r in stream.batch(row["step"], cfg.batch)]
        assert row["too_long"] == sum(len(d) > limit for d in batch)
        assert row["tokens"] == sum(len(d.response_ids) for d in batch if len(d) <= limit)
    assert 0 < sum(row["too_long"] for row in told) < STEPS * cfg.batch


def test_validation_rows_are_never_trained_and_all_others_are(mini, tmp_path, monkeypatch):
    read, encode = [], data.encode_example
    monkeypatch.setattr(
        data, "encode_example", lambda row, *rest: (read.append(row.id), encode(row, *rest))[1]
    )
    cfg = config(mini, tmp_path, replay=mini.replay, batch=10)
    run(cfg)
    valid, trained = read[:8], read[8:]
    assert len(set(valid)) == 8 and len(trained) == len(set(trained)) == 40  # 32 rows, 8 replayed
    assert not set(valid) & set(trained)
    assert sum(name.startswith("replay") for name in trained) == 8
    assert [r.id for r in coldstart.split_rows(cfg)[1]] == valid  # the same at every start
    assert [r.id for r in coldstart.split_rows(replace(cfg, seed=1))[1]] != valid


def test_too_few_rows_or_settings_that_contradict_are_refused_by_name(mini):
    with pytest.raises(ValueError, match="lower --valid"):
        coldstart.split_rows(config(mini, valid=40))
    with pytest.raises(ValueError, match="max_tokens 401 > pack_tokens 400"):
        config(mini, max_tokens=401)
    for name in ("epochs", "batch", "valid"):
        with pytest.raises(ValueError, match=name):
            config(mini, **{name: 0})


@pytest.mark.parametrize("how, save_every", [("ctrl-c", 0), ("killed", 1)])
def test_a_run_that_was_cut_off_goes_on_bit_for_bit(
    mini, whole, tmp_path, monkeypatch, how, save_every
):
    cfg, validate = config(mini, tmp_path, save_every=save_every), coldstart.validate
    calls = []

    def cut_off(*arguments):  # in step 2, the second validation
        calls.append(None)
        if len(calls) == 2 and how == "killed":
            raise RuntimeError("killed")
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return validate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(coldstart, "validate", cut_off)
        if how == "killed":
            with pytest.raises(RuntimeError, match="killed"):
                coldstart.main(cfg)
        else:
            coldstart.main(cfg)
    done = {"killed": "step_000002", "ctrl-c": "step_000003"}[how]
    wait_for(tmp_path / "checkpoints" / done / "state")
    assert not (tmp_path / "model").exists()
    torch.manual_seed(12345)
    run(cfg)
    assert metrics_of(tmp_path) == metrics_of(whole)
    one, other = weights_of(tmp_path), weights_of(whole)
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_a_run_that_died_after_its_last_checkpoint_still_writes_its_model(
    mini, whole, tmp_path, monkeypatch
):
    cfg, save = config(mini, tmp_path, save_every=STEPS), checkpoints.save_whole

    def dies(policy, directory, *rest):
        if directory == tmp_path / "model":
            (tmp_path / "model.part").mkdir()
            raise RuntimeError("killed")
        save(policy, directory, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_whole", dies)
        with pytest.raises(RuntimeError, match="killed"):
            coldstart.main(cfg)
    run(cfg)
    assert all(torch.equal(w, weights_of(whole)[n]) for n, w in weights_of(tmp_path).items())


def test_a_finished_run_is_not_overwritten(mini, whole):
    before = (whole / "metrics.jsonl").read_text()
    with pytest.raises(FileExistsError, match="finished run"):
        coldstart.main(config(mini, whole))
    assert (whole / "metrics.jsonl").read_text() == before


def test_an_unfinished_run_does_not_go_on_under_other_settings(mini, tmp_path, monkeypatch):
    cfg = config(mini, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(coldstart, "validate", lambda *a: signal.raise_signal(signal.SIGINT) or 0.0)
        coldstart.main(cfg)
    with pytest.raises(FileExistsError, match="batch 8 -> 9; lr 0.001 -> 0.5"):
        coldstart.main(replace(cfg, lr=0.5, batch=9))
