"""What rl.py writes about a step: single tokens, and a record from which it can be learnt again."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import rl
from common import data, dealing, telling
from common import distributed as parallel
from miniature import tokens
from model import load_model
from reward import Verdict
from rollout import Rollout

ALONE = parallel.World(0, 1, torch.device("cpu"))


def config(mini, out, **changed) -> rl.Config:
    small = dict(model=mini.model, data=mini.train, out=str(out), steps=5, problems=4, samples=4)
    small |= dict(lengths=(8, 12), length_from=(0, 2), pack_tokens=160, prompt_tokens=64)
    small |= dict(lr=1e-3, warmup=2, threads=1, save_every=2)
    return rl.Config(**small | changed)


@pytest.fixture(scope="module")
def run(mini, tmp_path_factory):
    """Five steps; states of steps 2 and 4 are left."""
    cfg = config(mini, tmp_path_factory.mktemp("told") / "run")
    rl.main(cfg)
    return cfg


def rows(cfg, name: str) -> list[dict]:
    with open(f"{cfg.out}/{name}.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# ------------------------------------------------------------------ replay


@pytest.mark.parametrize("step", [2, 3, 4, -1])
def test_a_replay_gives_every_number_of_the_recorded_step_bit_for_bit(run, capsys, step):
    rl.main(rl.Config(replay=run.out, step=step, lr=7.0))  # other settings are the run's own
    told = capsys.readouterr().out
    same, of = (int(x) for x in told.split(" numbers of step")[0].splitlines()[-1].split(" of "))
    row = rows(run, "metrics")[step]
    assert same == of == sum(not n.startswith(("seconds", "peak_gb", "step")) for n in row)
    assert f"{row['grad_norm']:14.7g} {row['grad_norm']:14.7g}" in told
    assert told.count("log p ") == 8  # the rollouts that pulled most


def test_a_replay_tells_where_it_differs(run, capsys, monkeypatch):
    monkeypatch.setattr(rl, "value_loss", lambda values, targets: (values - targets).abs())
    rl.main(rl.Config(replay=run.out, step=4))
    told = capsys.readouterr().out
    recorded = rows(run, "metrics")[4]["value_loss"]
    line = next(x for x in told.splitlines() if x.startswith("value_loss")).split()
    assert float(line[1]) == pytest.approx(recorded, rel=1e-5) and line[1] != line[2]


def test_a_replay_writes_nothing_into_the_run(run):
    from pathlib import Path

    def state():
        return {p: p.stat().st_mtime_ns for p in Path(run.out).rglob("*")}

    before = state()
    rl.main(rl.Config(replay=run.out, step=3))
    assert state() == before


def test_steps_are_recorded_since_the_oldest_state_and_others_are_refused_by_name(run, tmp_path):
    kept = sorted(p.name for p in (tmp_path / run.out / "sampled").iterdir())
    assert kept == [f"step_{step:06}.npz" for step in (2, 3, 4)]
    with pytest.raises(ValueError, match="step 1 is not recorded; there: 2 to 4"):
        rl.main(rl.Config(replay=run.out, step=1))
    with pytest.raises(FileNotFoundError, match="run.json is missing: --replay wants"):
        rl.main(rl.Config(replay=str(tmp_path)))


def test_a_run_that_records_nothing_cannot_be_replayed_and_says_so(mini, tmp_path):
    cfg = config(mini, tmp_path / "run", steps=1, record=False)
    rl.main(cfg)
    with pytest.raises(ValueError, match="step -1 is not recorded; there: none"):
        rl.main(rl.Config(replay=cfg.out))


def test_a_record_of_other_problems_is_refused(mini, tmp_path):
    tokenizer = data.load_tokenizer(mini.model)
    problems = list(data.read_problems(mini.train)[:2])
    made = [Rollout(p, 0, None, [9, 10], [-1.0, -2.0], True, "") for p in problems]
    tmp_path.joinpath("sampled").mkdir()
    dealing.keep(tmp_path, 7, made)
    recording = dealing.Recording(tmp_path, tokenizer, data.load_image_settings(mini.model))
    again = recording.generate(problems, 1, 99, 1.0, (0, 7), turns=range(2))
    assert [r.response_ids for r in again] == [[9, 10]] * 2 and again[1].logps == [-1.0, -2.0]
    assert again[0].prompt.ids and again[0].stopped is True
    with pytest.raises(ValueError, match="step_000007.npz is of other problems"):
        recording.generate(problems[::-1], 1, 99, 1.0, (0, 7), turns=range(2))
    with pytest.raises(FileNotFoundError, match="step 8 was not recorded"):
        recording.generate(problems, 1, 99, 1.0, (0, 8), turns=range(2))


# ------------------------------------------------------------------ token by token


def test_told_tokens_are_those_of_the_record_with_values_and_normalised_advantages(run, mini):
    """Values and log-probs against a critic and a policy loaded anew from the state of step 4."""
    told = [row for row in rows(run, "tokens") if row["step"] == 4]
    assert 1 <= len(told) <= telling.TOLD and len({row["id"] for row in told}) == 1
    record = np.load(f"{run.out}/sampled/step_000004.npz")
    surprisal = rows(run, "metrics")[4]["surprisal"]
    assert surprisal == pytest.approx(-record["logps"].mean(), rel=1e-4)
    ends = [0, *record["sizes"].cumsum()]
    policy = load_model(f"{run.out}/checkpoints/step_000004/model")
    tokenizer = data.load_tokenizer(mini.model)
    settings = data.load_image_settings(mini.model)
    problem = next(p for p in data.read_problems(mini.train) if p.id == told[0]["id"])
    prompt = data.encode_prompt(problem.prompt, problem.images, tokenizer, settings)
    for row in told:
        i = [*zip(record["problems"], record["samples"], strict=True)].index(
            (row["id"], row["sample"])
        )
        ids = record["ids"][ends[i] : ends[i + 1]].tolist()
        assert row["tokens"] == [tokenizer.decode([t]) for t in ids] and row["length"] == len(ids)
        assert row["sampled"] == pytest.approx(record["logps"][ends[i] : ends[i + 1]], rel=1e-3)
        (pack,) = data.pack([data.Document(prompt, ids)], 999)
        with torch.no_grad():
            logps, entropies = policy(**pack.inputs, rows=pack.rows, targets=pack.targets)
        assert row["logp"] == pytest.approx(logps.tolist(), rel=1e-3, abs=1e-5)
        assert row["entropy"] == pytest.approx(entropies.tolist(), rel=1e-3, abs=1e-5)
        # A = (R - V - mean) / std: one line through all tokens of the step, falling with V
        others = [(v, a) for r in told for v, a in zip(r["value"], r["advantage"], strict=True)]
        assert len(others) > 3
        shift = [a + v * slope(told) for v, a in zip(row["value"], row["advantage"], strict=True)]
        assert max(shift) - min(shift) < 0.02
    assert len(told[0]["pictures"]) == len(problem.images)
    assert all(p.startswith("data:image/webp;base64,") for p in told[0]["pictures"])


def slope(told: list[dict]) -> float:
    """1 / std, from the two tokens of a try whose values are farthest apart."""
    pairs = [(v, a) for v, a in zip(told[0]["value"], told[0]["advantage"], strict=True)]
    (v1, a1), (v2, a2) = min(pairs), max(pairs)
    return (a1 - a2) / (v2 - v1)


def test_the_page_shows_what_the_run_has_told(run):
    from pathlib import Path

    assert rows(run, "tokens")[0]["id"] in tokens.section(Path(run.out))


def test_a_run_that_goes_on_tells_no_step_twice(mini, tmp_path):
    cfg = config(mini, tmp_path / "run", steps=3)
    rl.main(cfg)
    before = rows(cfg, "tokens")
    import shutil

    shutil.rmtree(tmp_path / "run/model")  # as if it had died at its end: state of step 2
    rl.main(cfg)
    assert rows(cfg, "tokens") == before


@pytest.mark.parametrize(
    "scores, wanted",
    [
        ([1, 1, 1, 0], [0, 1, 2, 3]),
        ([0, 1, 0, 1, 0, 1, 0, 1], [0, 1, 2, 3]),
        ([0, 0, 0, 0, 0, 0, 0, 1], [0, 1, 2, 7]),
        ([1, 1, 1, 1, 1, 1], [0, 1, 2, 3]),
    ],
)
def test_right_and_wrong_tries_are_told_side_by_side(scores, wanted):
    tries = [Rollout(data.Problem("p", "?", "1"), i, None) for i in range(len(scores))]
    assert telling.tries_to_tell(tries, scores, len(scores)) == wanted


def test_a_problem_with_a_picture_and_with_contrast_is_told_first():
    def group(name, images, scores):
        problem = data.Problem(name, "?", "1", images)
        return [(Rollout(problem, i, None), s) for i, s in enumerate(scores)]

    groups = [("a", (), (1, 0)), ("b", ("x.png",), (1, 1)), ("c", ("x.png",), (0, 1))]
    pairs = [pair for found in groups for pair in group(*found)]
    rollouts, scores = zip(*pairs, strict=True)
    assert telling.tries_to_tell(rollouts, scores, 2) == [4, 5]
    assert telling.tries_to_tell(rollouts[:4], scores[:4], 2) == [2, 3]  # no contrast on pictures
    assert telling.tries_to_tell(rollouts[:2], scores[:2], 2) == [0, 1]  # no pictures


def test_of_a_long_response_the_head_and_the_tail_are_told(monkeypatch, mini):
    monkeypatch.setattr(telling, "HEAD", 3)
    tokenizer, ids = data.load_tokenizer(mini.model), [*range(8, 18)]
    r = Rollout(data.Problem("p", "?", "1"), 0, None, ids, [-float(i) for i in ids], True)
    column = torch.arange(10.0)
    verdict, found = Verdict(1.0, "match", "1"), {0: (column, column)}
    given = [r], [verdict], [1.0], [0], [r], None, [column], found, tokenizer, ALONE
    (row,) = telling.token_rows(5, [0], *given)
    assert row["skipped"] == [3, 4] and row["length"] == 10 and row["value"] is None
    assert row["logp"] == [0.0, 1.0, 2.0, 7.0, 8.0, 9.0] and len(row["tokens"]) == 6
    r = replace(r, response_ids=ids[:6])
    (row,) = telling.token_rows(5, [0], [r], [verdict], [1.0], [0], [r], *given[5:])
    assert "skipped" not in row and len(row["tokens"]) == 6


def test_the_rollout_whose_tokens_were_nearly_impossible_is_named_first(capsys):
    problem = data.Problem("p", "?", "1")
    usual = Rollout(problem, 0, None, [1, 2, 3], [-0.1] * 3, True)
    odd = Rollout(problem, 1, None, [1, 2, 3], [-0.1, -9.0, -0.1], True)
    telling.print_pushes([usual, odd], [torch.ones(3), -torch.ones(3)], [1.0, 0.0], ALONE)
    first, second = capsys.readouterr().out.splitlines()[1:]
    pull = 1 - np.exp(-0.1)
    share = (2 * pull + 1 - np.exp(-9)) / (5 * pull + 1 - np.exp(-9))
    assert first.split()[:2] == ["p#1", f"{share:.1%}"] and "1: log p -9.00" in first
    assert second.split()[0] == "p#0"
