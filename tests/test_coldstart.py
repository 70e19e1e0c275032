"""coldstart.py: what is trained, what the loss is, and runs against themselves."""

import json
import random
import signal
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import coldstart
from common import checkpoint, data
from common.distributed import World
from common.packs import make_pack
from model import load_model

ALONE = World(0, 1, torch.device("cpu"))
STEPS = 4  # of 8 rows; 40 rows, 8 of them for validation


def config(mini, out=".", **changed) -> coldstart.Config:
    small = dict(model=mini.model, data=mini.sft, out=str(out), epochs=1, batch_rows=8, valid=8)
    small |= dict(pack_tokens=400, max_tokens=400, valid_every=2)
    return coldstart.Config(**small | changed)


def run(cfg: coldstart.Config) -> Path:
    coldstart.main(cfg)
    return Path(cfg.out)


def metrics_of(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    machine = ("seconds", "tokens_per_second", "peak_gb")
    return [{k: v for k, v in row.items() if not k.startswith(machine)} for row in rows]


def weights_of(run: Path) -> dict:
    return load_file(run / "model/model.safetensors")


def encoded(mini, rows) -> list[data.Document]:
    tokenizer, settings = data.load_tokenizer(mini.model), data.load_image_settings(mini.model)
    return [data.encode_example(row, tokenizer, settings) for row in rows]


@pytest.fixture(scope="module")
def whole(mini, tmp_path_factory):
    return run(config(mini, tmp_path_factory.mktemp("coldstart") / "whole"))


@pytest.fixture(scope="module")
def documents(mini):
    rows = [*data.read_examples(mini.sft)[:6], *data.read_examples(mini.replay)[:4]]
    return encoded(mini, rows)


def naive_loss(model, documents) -> torch.Tensor:
    """Document by document, all logits, the mean of -log p over the response tokens."""
    terms = []
    for document in documents:
        logps = model.logits(make_pack([document])).log_softmax(-1)
        start = len(document.prompt.ids)
        terms += [-logps[t - 1, document.ids[t]] for t in range(start, len(document))]
    return torch.stack(terms).mean()


def shipped_loss(model, documents, budget: int) -> tuple[torch.Tensor, int]:
    cfg = coldstart.Config(pack_tokens=budget, max_tokens=budget)
    packs, tokens, too_long = coldstart.share_rows(documents, lambda d: d, cfg, ALONE, float)
    assert (tokens, too_long) == (sum(len(d.response_ids) for d in documents), 0)
    return sum(coldstart.loss_of(model, pack, tokens, "cpu") for pack in packs), len(packs)


def test_loss_and_gradient_are_those_of_the_mean_over_all_response_tokens_however_packs_are_cut(
    mini, documents
):
    model = load_model(mini.model)
    losses, gradients, counts = [], [], []
    for budget in (max(map(len, documents)), 250, 4096):
        loss, packs = shipped_loss(model, documents, budget)
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        counts.append(packs)
    assert counts[0] > counts[1] > counts[2] == 1
    naive = naive_loss(model, documents)
    assert losses == pytest.approx([naive.item()] * 3, rel=1e-6) and naive > 0.1
    wanted = torch.autograd.grad(naive, list(model.parameters()))
    for own in gradients:
        for (name, _), a, b in zip(model.named_parameters(), own, wanted, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4, msg=name)


def test_the_learning_rate_by_hand_and_where_it_ends_however_short_the_run():
    lr = [coldstart.cosine_lr(step, 12, 1.0, 0.1, 0.2) for step in range(12)]
    assert lr[:2] == [0.5, 1.0]  # 2 steps up, then 10 down
    assert lr[6] == pytest.approx(0.55) and lr[2:] == sorted(lr[2:], reverse=True)
    for steps in (1, 2, 3, 7, 10**6):
        for warmup in (0.0, 0.03, 0.5, 1.0):
            assert coldstart.cosine_lr(steps - 1, steps, 2e-4, 2e-5, warmup) == 2e-5
    assert coldstart.cosine_lr(0, 7, 2e-4, 2e-5, 0.0) == 2e-4  # without warm-up the peak at once


def test_a_batch_of_packs_has_as_many_rows_as_fill_them_on_average(mini):
    """The paper's step: 640 packs of 64k tokens, which is about 9,500 of its rows."""
    rng = random.Random(1)
    lengths = [min(round(rng.lognormvariate(8.1, 0.75)), 70_000) for _ in range(60_000)]
    cfg = config(mini, batch_packs=640, pack_tokens=65536, max_tokens=65536)
    count = coldstart.rows_a_step(cfg, lengths, range, ALONE)
    mean = sum(lengths) / len(lengths)
    assert count == pytest.approx(640 * 65536 / mean, rel=0.05) and 8_000 < count < 12_000
    assert coldstart.rows_a_step(config(mini), lengths, range, ALONE) == 8  # no packs: rows
    half = coldstart.rows_a_step(cfg, [32768, 65537] * 600, range, ALONE)
    assert half == pytest.approx(640 * 4, rel=0.1)  # rows that are too long fill no pack


def test_rows_too_long_are_left_out_and_counted_and_a_step_of_nothing_else_is_skipped(
    mini, tmp_path, capsys
):
    """--batch-rows 2 --max-tokens 90 died at the first batch whose rows were all too long."""
    cfg = config(mini, tmp_path, batch_rows=2, max_tokens=90)
    train, _ = coldstart.split_rows(cfg, ALONE)
    rows, stream = metrics_of(run(cfg)), data.Stream(train, cfg.seed)
    assert [row["step"] for row in rows] == list(range(16))
    for row in rows:
        batch = encoded(mini, stream.batch(row["step"], 2))
        fitting = [len(d.response_ids) for d in batch if len(d) <= 90]  # none is cut
        assert (row["too_long"], row["tokens"]) == (2 - len(fitting), sum(fitting))
        assert ("loss" in row) == ("grad_norm" in row) == bool(fitting)
    skipped = [row for row in rows if not row["tokens"]]
    assert 0 < len(skipped) < sum(row["too_long"] > 0 for row in rows)
    assert capsys.readouterr().out.count("too_long      2") == len(skipped)


def test_where_no_validation_row_fits_the_cure_is_named(mini, tmp_path):
    """valid_loss was 0.0 for ever."""
    _, (only,) = coldstart.split_rows(config(mini, valid=1), ALONE)
    cfg = config(mini, tmp_path, valid=1, max_tokens=len(encoded(mini, [only])[0]) - 1)
    with pytest.raises(ValueError, match="validation rows are longer than --max-tokens .*raise it"):
        run(cfg)


def test_a_cut_picture_among_replayed_rows_is_refused_before_the_run(mini, tmp_path):
    content = next(Path(mini.replay).parent.glob("images/*.png")).read_bytes()
    (tmp_path / "cut.png").write_bytes(content[:-40])
    row = {"id": "r", "prompt": "<image> ?", "response": "x", "images": ["cut.png"]}
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="rows.jsonl, line 1: .*cut.png: damaged picture"):
        coldstart.split_rows(config(mini, tmp_path, replay=str(rows)), ALONE)


def test_all_rows_but_those_for_validation_train_all_weights_but_those_of_the_tower(
    mini, tmp_path, monkeypatch
):
    names, make_pack = [], coldstart.make_pack

    def noted(documents, members):
        names.extend(document.name for document in documents)
        return make_pack(documents, members)

    monkeypatch.setattr(coldstart, "make_pack", noted)
    cfg = config(mini, tmp_path, replay=mini.replay, batch_rows=10, valid_every=0)
    trained_run = run(cfg)
    assert ["valid_loss" in row for row in metrics_of(trained_run)] == [False, False, False, True]
    sft, replay = ({r.place for r in data.read_examples(x)} for x in (mini.sft, mini.replay))
    valid, trained = names[:8], names[8:]
    assert len(trained) == len(set(trained)) == 40  # 32 rows and 8 replayed, one epoch
    assert set(trained) == (sft - set(valid)) | replay and set(valid) < sft
    rows = [r.place for r in coldstart.split_rows(cfg, ALONE)[1]]
    assert sorted(rows) == sorted(valid)  # the same at every start
    before, after = load_file(Path(mini.model) / "model.safetensors"), weights_of(trained_run)
    assert before.keys() == after.keys()
    for name, weight in after.items():  # the tower keeps every bit, though some rows have pictures
        assert torch.equal(weight, before[name]) == name.startswith("visual."), name


def test_too_few_rows_to_keep_some_for_validation_are_refused(mini):
    with pytest.raises(ValueError, match="has 40 rows, --valid keeps 40: lower it"):
        coldstart.split_rows(config(mini, valid=40), ALONE)


def test_a_run_learns_and_logs_what_it_did(whole):
    rows = metrics_of(whole)
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert [row["step"] for row in rows if "valid_loss" in row] == [0, 2, 3]
    assert rows[3]["valid_loss"] < rows[0]["valid_loss"] and rows[3]["loss"] < rows[0]["loss"]
    assert all(row["too_long"] == 0 and row["tokens"] > 200 for row in rows)
    lr = [coldstart.cosine_lr(step, STEPS, 1.5e-3, 1.5e-4, 0.03) for step in range(STEPS)]
    assert [row["lr"] for row in rows] == lr and lr[-1] == 1.5e-4
    assert not (whole / "checkpoints").exists() and (whole / "model/tokenizer.json").is_file()


def test_evaluation_on_the_way_changes_no_number_of_the_run(mini, whole, tmp_path):
    cfg = config(mini, tmp_path, eval_data=mini.test, eval_every=2)
    watched, names = run(cfg), ("eval_image", "eval_text")
    rows = metrics_of(watched)
    seen = [row["step"] for row in rows if all(name in row for name in names)]
    assert seen == [*range(1, len(rows), 2)] or seen == [*range(1, len(rows), 2), len(rows) - 1]
    assert all(0 <= row.get(name, 0) <= 1 for row in rows for name in names)
    assert [{k: v for k, v in row.items() if k not in names} for row in rows] == metrics_of(whole)
    one, other = weights_of(watched), weights_of(whole)
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_evaluation_at_the_end_only_and_a_cut_picture_in_its_rows_before_the_run(mini, tmp_path):
    rows = metrics_of(run(config(mini, tmp_path / "end", eval_data=mini.test, eval_every=0)))
    assert ["eval_text" in row for row in rows] == [False] * (len(rows) - 1) + [True]
    (tmp_path / "cut.png").write_bytes(b"\x89PNG")
    row = {"id": "x", "prompt": "<image> ?", "images": ["cut.png"], "answer": "1"}
    file = tmp_path / "cut.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="cut"):
        run(config(mini, tmp_path / "refused", eval_data=str(file)))
    assert not (tmp_path / "refused/metrics.jsonl").exists()


@pytest.mark.parametrize(
    "how, save_every, states", [("ctrl-c", 0, [3]), ("killed", 1, [1, 2]), ("at the end", 4, [4])]
)
def test_a_run_that_was_cut_off_goes_on_bit_for_bit(
    mini, whole, tmp_path, monkeypatch, how, save_every, states
):
    cfg, validate, calls = config(mini, tmp_path, save_every=save_every), coldstart.validate, []

    def killed(*arguments):
        raise RuntimeError("killed")

    def cut_off(*arguments):  # in step 2, the second validation
        calls.append(None)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT) if how == "ctrl-c" else killed()
        return validate(*arguments)

    with monkeypatch.context() as patch:
        if how == "at the end":
            patch.setattr(checkpoint, "export", killed)
        else:
            patch.setattr(coldstart, "validate", cut_off)
        with nullcontext() if how == "ctrl-c" else pytest.raises(RuntimeError, match="killed"):
            run(cfg)
    assert checkpoint.complete_steps(tmp_path) == states and not (tmp_path / "model").exists()
    torch.manual_seed(12345)  # nothing may hang on the global state of a process
    run(cfg)
    assert metrics_of(tmp_path) == metrics_of(whole)
    one, other = weights_of(tmp_path), weights_of(whole)
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
