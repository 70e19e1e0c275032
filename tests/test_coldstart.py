"""coldstart.py: what is trained, what the loss is, and runs against themselves."""

import json
import random
import signal
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import write_rows
from safetensors.torch import load_file
from test_distributed import gaps_of, rows_of

import coldstart
from common import checkpoint, data, distributed
from common.distributed import World
from common.packs import make_pack
from model import load_model

ALONE = World(0, 1, torch.device("cpu"))


def config(mini, out=".", **changed) -> coldstart.Config:
    """4 steps of 10 rows: 40 of the miniature's 48, of which 8 have pictures."""
    small = dict(model=mini.model, data=mini.sft, out=str(out), batch_rows=10)
    small |= dict(valid=8, valid_every=2, pack_tokens=400, max_tokens=400)
    return coldstart.Config(**small | changed)


def run(cfg: coldstart.Config) -> Path:
    coldstart.main(cfg)
    return Path(cfg.out)


def encoded(mini, rows) -> list[data.Document]:
    tokenizer, settings = data.load_tokenizer(mini.model), data.load_image_settings(mini.model)
    return [data.encode_example(row, tokenizer, settings) for row in rows]


def mean_loss(model, documents) -> torch.Tensor:
    """Token by token, one document at a time."""
    terms = []
    for document in documents:
        logps, start = model.logits(make_pack([document])).log_softmax(-1), len(document.prompt.ids)
        terms += [-logps[t - 1, document.ids[t]] for t in range(start, len(document))]
    return torch.stack(terms).mean()


@pytest.fixture(scope="module")
def whole(mini, tmp_path_factory):
    return run(config(mini, tmp_path_factory.mktemp("coldstart") / "whole"))


def test_loss_and_gradient_are_those_of_the_mean_over_all_response_tokens_however_packs_are_cut(
    mini,
):
    rows = [*data.read_examples(mini.sft)]
    documents, model, counts = encoded(mini, rows[:6] + rows[-4:]), load_model(mini.model), []
    naive = mean_loss(model, documents)
    wanted = torch.autograd.grad(naive, list(model.parameters()))
    for budget in (max(map(len, documents)), 250, 4096):
        cfg = coldstart.Config(pack_tokens=budget, max_tokens=budget)
        packs, tokens, too_long = coldstart.share_rows(documents, lambda d: d, cfg, ALONE, float)
        assert (tokens, too_long) == (sum(len(d.response_ids) for d in documents), 0)
        loss = sum(coldstart.loss_of(model, pack, tokens, "cpu") for pack in packs)
        assert loss.item() == pytest.approx(naive.item(), rel=1e-6) and naive > 0.1
        own = torch.autograd.grad(loss, list(model.parameters()))
        for (name, _), a, b in zip(model.named_parameters(), own, wanted, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4, msg=name)
        counts.append(len(packs))
    assert counts[0] > counts[1] > counts[2] == 1


def test_the_learning_rate_by_hand_and_where_it_ends_however_short_the_run():
    lr = [coldstart.cosine_lr(step, 12, 1.0, 0.1, 0.2) for step in range(12)]
    assert lr[:2] == [0.5, 1.0]  # 2 steps up, then 10 down
    assert lr[6] == pytest.approx(0.55) and lr[2:] == sorted(lr[2:], reverse=True)
    for steps in (1, 2, 3, 10**6):
        for warmup in (0.0, 0.03, 1.0):
            assert coldstart.cosine_lr(steps - 1, steps, 2e-4, 2e-5, warmup) == 2e-5
    assert coldstart.cosine_lr(0, 7, 2e-4, 2e-5, 0.0) == 2e-4  # without warm-up the peak at once


def test_a_batch_of_packs_has_as_many_rows_as_fill_them_on_average(mini):
    """The paper's step: 640 packs of 64k tokens, which is about 9,500 of its rows."""
    rng = random.Random(1)
    lengths = [min(round(rng.lognormvariate(8.1, 0.75)), 70_000) for _ in range(60_000)]
    cfg = config(mini, batch_packs=640, pack_tokens=65536, max_tokens=65536)
    count, mean = coldstart.rows_a_step(cfg, lengths, range), sum(lengths) / len(lengths)
    assert count == pytest.approx(640 * 65536 / mean, rel=0.05) and 8_000 < count < 12_000
    half = coldstart.rows_a_step(cfg, [32768, 65537] * 600, range)
    assert half == pytest.approx(640 * 4, rel=0.1)  # rows that are too long fill no pack


def test_rows_too_long_are_left_out_and_counted_and_a_step_of_nothing_else_is_skipped(
    mini, tmp_path
):
    """--batch-rows 2 --max-tokens 90 died at the first batch whose rows were all too long."""
    cfg = config(mini, tmp_path, batch_rows=2, max_tokens=90, valid_every=0)
    train, _ = coldstart.split_rows(cfg, ALONE)
    rows, stream = rows_of(run(cfg)), data.Stream(train, cfg.seed)
    assert [row["step"] for row in rows if "valid_loss" in row] == [19] == [len(rows) - 1]
    for row in rows:
        batch = encoded(mini, stream.batch(row["step"], 2))
        fitting = [len(d.response_ids) for d in batch if len(d) <= 90]  # none is cut
        assert (row["too_long"], row["tokens"]) == (2 - len(fitting), sum(fitting))
        assert ("loss" in row) == ("grad_norm" in row) == bool(fitting)
    skipped = [row for row in rows if not row["tokens"]]
    assert 0 < len(skipped) < sum(row["too_long"] > 0 for row in rows)


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(valid=48), "has 48 rows, --valid keeps 48: lower it"),
        (dict(max_tokens=20), "--max-tokens 20 fits no --valid row: raise it"),  # a loss of 0.0
        (dict(data="cut.jsonl"), "cut.jsonl, line 1: .*cut.png: damaged picture"),
        (dict(eval_data="cut.jsonl"), "cut.jsonl, line 1: .*cut.png: damaged picture"),
        (dict(pack_tokens=300), "--max-tokens 400 > --pack-tokens 300"),
        (dict(epochs=0), "must be positive"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_before_the_run(
    mini, tmp_path, monkeypatch, changed, message
):
    monkeypatch.chdir(tmp_path)
    content = next(Path(mini.sft).parent.glob("images/*.png")).read_bytes()
    Path("cut.png").write_bytes(content[:-40])
    row = {"prompt": "<image> ?", "response": "x", "images": ["cut.png"], "answer": "1"}
    write_rows(Path("cut.jsonl"), [{"id": "r"} | row])
    with pytest.raises(ValueError, match=message):
        run(config(mini, "run", **changed))
    assert not Path("run/metrics.jsonl").exists()


def test_each_rank_checks_a_share_of_the_rows(mini, monkeypatch):
    """Each of them all took 19 minutes a start."""
    shares, read = [], data.read_examples

    def noted(*given, share, **more):
        shares.append(share)
        return read(*given, share=share, **more)

    monkeypatch.setattr(data, "read_examples", noted)
    coldstart.split_rows(config(mini), World(1, 2, torch.device("cpu")))
    assert shares == [(1, 2)]


def test_a_run_learns_from_all_rows_but_those_for_validation_and_logs_what_it_did(mini, whole):
    (train, valid), rows = coldstart.split_rows(config(mini), ALONE), rows_of(whole)
    places = [row.place for row in data.read_examples(mini.sft)]
    assert sorted(row.place for row in [*train, *valid]) == sorted(places) and len(valid) == 8
    assert any(row.images for row in train)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]  # one epoch
    answers = [len(document.response_ids) for document in encoded(mini, train)]
    assert sum(row["tokens"] for row in rows) == sum(answers)
    lr = [coldstart.cosine_lr(step, 4, 1.5e-3, 1.5e-4, 0.03) for step in range(4)]
    assert [row["lr"] for row in rows] == lr
    assert [row["step"] for row in rows if "valid_loss" in row] == [0, 2, 3]
    loss = mean_loss(load_model(whole / "model"), encoded(mini, valid)).item()
    assert rows[3]["valid_loss"] == pytest.approx(loss, rel=1e-5)
    assert loss < rows[0]["valid_loss"] and rows[3]["loss"] < rows[0]["loss"]
    assert not (whole / "checkpoints").exists() and (whole / "model/tokenizer.json").is_file()


def test_settings_reach_what_they_set(mini, tmp_path, monkeypatch):
    """Each of them could be dropped on the way, and all other runs would still agree."""
    rows = [json.loads(line) for line in Path(mini.sft).open()]
    renamed = [row | {"question": row.pop("prompt")} for row in rows if not row.get("images")]
    own = dict(data=write_rows(tmp_path / "sft.jsonl", renamed), columns=("prompt=question",))
    own |= dict(weight_decay=0.3, seed=5, save_every=1, keep_every=2, recompute="full")
    cfg, update = config(mini, tmp_path / "run", **own, compile=True), coldstart.update
    blocks, groups = [], []
    monkeypatch.setattr(distributed, "recompute_blocks", lambda _, kind: blocks.append(kind))
    monkeypatch.setattr(distributed, "compile_blocks", lambda _: blocks.append("compiled"))

    def noted(model, optimizer, *rest):
        for group in optimizer.param_groups:
            ndim = {weight.ndim for weight in group["params"]}
            groups.append((ndim, group["weight_decay"], group["betas"]))
        return update(model, optimizer, *rest)

    monkeypatch.setattr(coldstart, "update", noted)
    first, kept = rows_of(run(cfg))[0], (tmp_path / "run/checkpoints").glob("*/model")
    assert groups[:2] == [({2}, 0.3, coldstart.BETAS), ({1}, 0.0, coldstart.BETAS)]
    assert {*blocks} == {"full", "compiled"}
    batch = data.Stream(coldstart.split_rows(cfg, ALONE)[0], 5).batch(0, 10)
    assert first["tokens"] == sum(len(d.response_ids) for d in encoded(mini, batch))
    assert sorted(model.parent.name for model in kept) == [f"step_{n:06}" for n in (2, 3, 4)]


def test_what_the_last_step_has_ruined_is_not_exported(mini, tmp_path):
    with pytest.raises(FloatingPointError, match="step 0: .*valid_loss"):
        run(config(mini, tmp_path, epochs=0.25, lr=1e30, lr_end=1e30))
    assert not (tmp_path / "model").exists()


def test_all_weights_are_trained_but_those_of_the_tower(mini, whole):
    before, after = (load_file(Path(x, "model.safetensors")) for x in (mini.model, whole / "model"))
    assert before.keys() == after.keys()
    for name, weight in after.items():  # the tower keeps every bit, though some rows have pictures
        assert torch.equal(weight, before[name]) == name.startswith("visual."), name


@pytest.mark.parametrize("every, steps", [(2, [1, 3]), (0, [3])])  # 0: at the end only
def test_evaluation_on_the_way_changes_no_number_of_the_run(mini, whole, tmp_path, every, steps):
    rows = rows_of(run(config(mini, tmp_path, eval_data=mini.test, eval_every=every)))
    names = {"eval_image", "eval_text"}
    assert [row["step"] for row in rows if names <= row.keys()] == steps
    seen = [row.pop(name) for row in rows for name in names & row.keys()]
    assert len(seen) == 2 * len(steps) and all(0 <= share <= 1 for share in seen)
    assert rows == rows_of(whole)
    assert not any(gap.any() for gap in gaps_of(tmp_path, whole))


@pytest.mark.parametrize(
    "how, place, name, save_every, states",
    [
        ("ctrl-c", coldstart, "update", 0, [1]),
        ("killed", coldstart, "update", 1, [1]),
        ("killed", checkpoint, "export", 4, [4]),
    ],
)
def test_a_run_that_was_cut_off_goes_on_bit_for_bit(
    mini, whole, tmp_path, monkeypatch, how, place, name, save_every, states
):
    cfg, original = config(mini, tmp_path, save_every=save_every), getattr(place, name)

    def cut_off(*given):
        if how == "ctrl-c":
            signal.raise_signal(signal.SIGINT)
        elif checkpoint.complete_steps(tmp_path):
            raise RuntimeError("killed")
        return original(*given)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, cut_off)
        with nullcontext() if how == "ctrl-c" else pytest.raises(RuntimeError, match="killed"):
            run(cfg)
    assert checkpoint.complete_steps(tmp_path) == states and not (tmp_path / "model").exists()
    torch.manual_seed(12345)  # nothing may hang on the global state of a process
    run(cfg)
    assert rows_of(tmp_path) == rows_of(whole)
    assert not any(gap.any() for gap in gaps_of(tmp_path, whole))
