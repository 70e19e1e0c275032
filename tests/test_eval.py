"""eval.py: what a record is worth, how it is summed up, and what a run keeps when it is cut off."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

import behaviors
import data
import eval  # noqa: A004
from reward import grade

FIELDS = {"id", "sample", "seed", "source", "image", "prompt", "response", "answer"}
FIELDS |= {"score", "status", "extracted", "finish", "tokens"}


def config(mini, out, **changed) -> eval.Config:
    small = dict(model=mini.model, data=mini.test, out=str(out), k=2, temperature=1.0)
    return eval.Config(**small | dict(max_tokens=8, seed=3, threads=1) | changed)


def records_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]


def by_try(records: list[dict]) -> dict:
    assert len({(r["id"], r["sample"]) for r in records}) == len(records)
    return {(r["id"], r["sample"]): r for r in records}


def record(name="p", sample=0, score=1.0, **changed) -> dict:
    base = dict(id=name, sample=sample, image=False, score=score, status="match", tokens=10)
    return base | dict(response="\\boxed{7}", finish="stop", answer="7") | changed


@pytest.fixture(scope="module")
def whole(mini, tmp_path_factory):
    out = tmp_path_factory.mktemp("eval")
    eval.main(config(mini, out))
    return out


# ---- what a record is worth


def test_a_truncated_reply_is_wrong_whatever_it_says():
    problem = data.Problem("p", "?", "7")
    right = record(finish="stop") | {"score": None, "status": None}
    assert eval.judged(problem, right)["score"] == 1.0
    cut = eval.judged(problem, right | {"finish": "length"})
    assert (cut["score"], cut["status"], cut["extracted"]) == (0.0, "truncated", None)


def test_choices_and_precision_of_the_problem_reach_the_matcher():
    choice = data.Problem("p", "?", "B", choices=("3", "4"))
    assert eval.judged(choice, record(response="\\boxed{4}"))["score"] == 1.0
    assert eval.judged(choice, record(response="\\boxed{3}"))["score"] == 0.0
    rounded = data.Problem("p", "?", "0.33", precision=2)
    assert eval.judged(rounded, record(response="\\boxed{0.3333}"))["score"] == 1.0
    irrational = data.Problem("p", "?", r"\sqrt{2}")
    assert eval.judged(irrational, record(response="\\boxed{1.41421}"))["score"] == 1.0
    assert eval.judged(irrational, record(response="\\boxed{1.4142}"))["score"] == 0.0
    exact = data.Problem("p", "?", "0.33")
    assert eval.judged(exact, record(response="\\boxed{0.3333}"))["score"] == 0.0


# ---- sums


def test_accuracy_and_its_error_are_over_problems_by_hand():
    scores = {"a": [1, 1, 0, 0], "b": [1, 1, 1, 1], "c": [0, 0, 0, 1]}  # means 0.5, 1, 0.25
    records = [record(p, i, s) for p, row in scores.items() for i, s in enumerate(row)]
    mean, error = eval.accuracy(records)
    assert mean == pytest.approx(7 / 12)
    deviations = [(m - 7 / 12) ** 2 for m in (0.5, 1, 0.25)]
    assert error == pytest.approx(math.sqrt(sum(deviations) / 2 / 3))
    greedy = [record(str(i), 0, float(i < 3)) for i in range(10)]
    assert eval.accuracy(greedy) == pytest.approx((0.3, math.sqrt(0.3 * 0.7 / 9)))
    assert eval.accuracy([record()]) == (1.0, 0.0)


def test_copies_of_a_sample_do_not_make_the_error_smaller():
    once = [record(str(i), 0, float(i < 3)) for i in range(10)]
    eightfold = [r | {"sample": k} for r in once for k in range(8)]
    assert eval.accuracy(eightfold) == pytest.approx(eval.accuracy(once))


def test_the_summary_keeps_pictures_and_text_apart():
    records = [record("a", 0, 1.0, image=True, tokens=4), record("b", 0, 0.0, tokens=8)]
    records.append(record("c", 0, 0.0, status="truncated", finish="length", tokens=30))
    summary = eval.summarise(records, {"k": 1})
    assert summary["protocol"] == {"k": 1}
    image, text = summary["image"], summary["text"]
    assert (image["accuracy"], image["problems"], image["samples"]) == (1.0, 1, 1)
    assert (text["accuracy"], text["problems"], text["tokens"]) == (0.0, 2, 19.0)
    assert text["status"] == {"match": 1, "truncated": 1} and summary["all"]["samples"] == 3
    assert text["behaviors"].keys() == set(behaviors.NAMES)
    assert "image" not in eval.summarise(records[1:], {})


# ---- runs


def test_every_problem_is_tried_k_times_and_graded(mini, whole):
    records = by_try(records_of(whole))
    problems = {p.id: p for p in data.read_problems(mini.test)}
    assert records.keys() == {(name, i) for name in problems for i in range(2)}
    for r in records.values():
        assert r.keys() == FIELDS and r["seed"] == 3 and r["tokens"] <= 8
        assert r["image"] == bool(problems[r["id"]].images)
        if r["finish"] == "stop":
            verdict = grade(r["answer"], r["response"])
            assert (r["score"], r["status"]) == (verdict.score, verdict.status)
        else:
            assert (r["score"], r["status"], r["tokens"]) == (0.0, "truncated", 8)
    assert {r["finish"] for r in records.values()} == {"stop", "length"}
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["all"]["problems"] == 10 and summary["all"]["samples"] == 20
    mean, error = eval.accuracy(list(records.values()))
    assert (summary["all"]["accuracy"], summary["all"]["standard_error"]) == (mean, error)
    assert summary["protocol"]["temperature"] == 1.0 and summary["protocol"]["k"] == 2


@pytest.mark.parametrize("kept", [0, 1, 3, 6, 19])
@pytest.mark.parametrize("torn", [False, True])
def test_a_run_that_was_cut_off_loses_and_repeats_nothing(
    mini, whole, tmp_path, monkeypatch, kept, torn
):
    lines = (whole / "records.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "protocol.json").write_text((whole / "protocol.json").read_text())
    rest = lines[kept][:40] if torn else ""
    (tmp_path / "records.jsonl").write_text("".join(lines[:kept]) + rest)
    monkeypatch.setattr(eval, "CHUNK", 3)
    eval.main(config(mini, tmp_path))
    one, other = by_try(records_of(tmp_path)), by_try(records_of(whole))
    assert one == other
    assert (tmp_path / "summary.json").read_text() == (whole / "summary.json").read_text()


def test_a_complete_run_samples_nothing_again(mini, whole, monkeypatch):
    def generate(self, problems, *rest):
        raise AssertionError(f"sampled {problems} again")

    before = (whole / "records.jsonl").read_text()
    monkeypatch.setattr(eval.TorchSampler, "generate", generate)
    eval.main(config(mini, whole))
    assert (whole / "records.jsonl").read_text() == before


@pytest.mark.parametrize("changed", [dict(temperature=0.5), dict(k=3), dict(seed=4)])
def test_replies_of_two_protocols_are_not_mixed(mini, whole, changed):
    name = next(iter(changed))
    with pytest.raises(ValueError, match=f"another protocol \\({name}"):
        eval.main(replace(config(mini, whole), **changed))


def test_a_smaller_limit_loses_no_reply_and_a_larger_one_adds_the_rest(mini, whole, tmp_path):
    eval.main(config(mini, tmp_path, limit=4))
    assert json.loads((tmp_path / "summary.json").read_text())["all"]["problems"] == 4
    eval.main(config(mini, tmp_path))
    assert by_try(records_of(tmp_path)) == by_try(records_of(whole))
    eval.main(config(mini, tmp_path, limit=4))
    assert json.loads((tmp_path / "summary.json").read_text())["all"]["problems"] == 4
    assert by_try(records_of(tmp_path)) == by_try(records_of(whole))


def test_regrading_gives_what_grading_gave_without_a_model(mini, whole, tmp_path, capsys):
    records = records_of(whole)
    spoilt = [r | {"score": 0.5, "status": "?", "extracted": "?"} for r in records]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in spoilt))
    (tmp_path / "protocol.json").write_text((whole / "protocol.json").read_text())
    eval.main(eval.Config(data=mini.test, regrade=str(tmp_path), limit=2))
    assert records_of(tmp_path) == records
    assert (tmp_path / "summary.json").read_text() == (whole / "summary.json").read_text()
    assert "n 5 x 2" in capsys.readouterr().out


def test_greedy_is_one_sample_a_problem_and_always_the_same(mini, tmp_path):
    for name in ("a", "b"):
        eval.main(config(mini, tmp_path / name, k=1, temperature=0.0, limit=4, seed=ord(name)))
    a, b = (records_of(tmp_path / name) for name in ("a", "b"))
    assert [r["response"] for r in a] == [r["response"] for r in b] and len(a) == 4


def test_a_setting_that_makes_no_sense_is_refused_by_name():
    with pytest.raises(ValueError, match="--model and --out"):
        eval.Config(data="d")
    with pytest.raises(ValueError, match="temperature"):
        eval.Config(data="d", out="o", model="m", k=4)


def test_two_problems_under_one_id_are_refused(mini, tmp_path):
    rows = Path(mini.test).read_text().splitlines(keepends=True)
    twice = Path(mini.test).with_name("twice.jsonl")
    twice.write_text(rows[0] + rows[0])
    with pytest.raises(ValueError, match="stand more than once"):
        eval.main(eval.Config(data=str(twice), model=mini.model, out=str(tmp_path)))
