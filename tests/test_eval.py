"""eval.py: what a reply is worth, what a run keeps when cut off, every benchmark's pipeline."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import finished, write_rows
from PIL import Image
from test_benchmarks import make

import eval  # noqa: A004
from common import data
from common.distributed import World
from evaluation import behaviors, benchmarks, metrics
from reward import grade
from rollout import Rollout, draw_tokens

ROOT = Path(__file__).resolve().parents[1]


def config(mini, out, **changed) -> eval.Config:
    small = dict(model=mini.model, data=mini.test, out=str(out), k=2, temperature=1.0)
    small |= dict(sampler="torch", max_tokens=8, seed=3)
    return eval.Config(**small | changed)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.open()]


@pytest.fixture(scope="module")
def whole(mini, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("eval")
    eval.main(config(mini, out))
    return out


@pytest.fixture
def copied(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path, dirs_exist_ok=True))  # pictures lie beside it


def test_choices_precision_and_kind_of_the_item_reach_the_matcher():
    item = {"prompt": "q", "images": []}
    for reply, gold, columns, score in (
        ("\\boxed{4}", "B", {"choices": ["3", "4"]}, 1),
        ("\\boxed{0.3333}", "0.33", {"precision": 2}, 1),
        ("The answer is b.", "B", {"kind": "free"}, 0),  # a name, and no option
    ):
        record, item = {"response": reply, "finish": "stop"}, item | {"answer": gold}
        assert eval.graded(record, item | columns)["score"] == score
        assert eval.graded(record, item)["score"] == 1 - score


def test_every_problem_is_tried_k_times_and_graded(mini, whole):
    rows, problems = read(whole / "graded.jsonl"), data.read_problems(mini.test)
    assert [(r["id"], r["sample"]) for r in rows] == [(p.id, n) for p in problems for n in (0, 1)]
    assert [r["image"] for r in rows[::2]] == [bool(p.images) for p in problems]
    for r in rows:
        if r["finish"] == "length":
            assert (r["score"], r["status"], r["tokens"]) == (0.0, "truncated", 8)
        elif "\\boxed" in r["response"]:
            assert r["score"] == grade(r["answer"], r["response"]).score
    assert {r["finish"] for r in rows} == {"stop", "length"}
    summary = json.loads((whole / "summary.json").read_text())
    assert (summary["n"], summary["k"], summary["protocol"]["k"]) == (10, 2, 2)
    mean = sum(r["score"] for r in rows) / len(rows)
    assert summary["headline"]["accuracy"]["score"] == pytest.approx(mean)
    assert {*summary["categories"]} == {"image", "text"}
    assert summary["behaviors"]["rates"].keys() == {*behaviors.NAMES}
    assert "</html>" in (whole / "gallery.html").read_text()


def test_a_run_that_is_killed_goes_on_where_it_stopped(mini, whole, tmp_path):
    """kill -9 in the middle, twice, the second time inside a line; then to the end."""
    cfg, records = config(mini, tmp_path, sampler_batch=1), tmp_path / "records.jsonl"
    code = f"""
import eval, itertools, os, signal
count, add = itertools.count(), eval.Appender.add
def killed(*a):
    if next(count) == 5: os.kill(os.getpid(), signal.SIGKILL)
    return add(*a)
eval.Appender.add = killed
eval.main(eval.Config(**{vars(cfg)}))"""
    for lines in (5, 10):
        run = subprocess.run([sys.executable, "-c", code], cwd=ROOT)
        assert run.returncode == -9 and len(read(records)) == lines
    records.write_bytes(records.read_bytes() + b'{"id": "test-0", "sam')
    eval.main(cfg)
    for name in ("records.jsonl", "summary.json"):
        assert (tmp_path / name).read_text() == (whole / name).read_text()


def test_two_ranks_give_the_replies_of_one(mini, whole, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", "eval.py", "--model", mini.model, "--data", mini.test]
    command += "--k 2 --temperature 1 --max-tokens 8 --seed 3".split()
    command += "--sampler torch --sampler-batch 4 --out".split()
    finished([*command, str(tmp_path)], ROOT, {"OMP_NUM_THREADS": "1"}, 200)
    assert [p.name for p in tmp_path.glob("records*")] == ["records.jsonl"]
    assert (tmp_path / "records.jsonl").read_text() == (whole / "records.jsonl").read_text()


OTHER = dict(temperature=0.5, k=3, limit=4, forbid=("a",), max_tokens=9, top_p=0.5, seed=4)
OTHER |= dict(pictures="blank", model="other")


@pytest.mark.parametrize("name, value", OTHER.items())
def test_replies_of_two_protocols_are_not_mixed(mini, whole, name, value):
    with pytest.raises(ValueError, match=f"another protocol \\({name}"):
        eval.main(config(mini, whole, **{name: value}))


def test_another_seed_draws_other_replies_and_a_limit_takes_the_first_items(mini, whole, tmp_path):
    eval.main(config(mini, tmp_path, seed=4, limit=3))
    items, replies = (read(tmp_path / f"{name}.jsonl") for name in ("items", "records"))
    assert [i["id"] for i in items] == [i["id"] for i in read(whole / "items.jsonl")[:3]]
    before = read(whole / "records.jsonl")[: len(replies)]
    assert [r["response"] for r in replies] != [r["response"] for r in before] and len(replies) == 6


def test_regrading_gives_what_grading_gave_and_asks_the_lexicon_once_a_reply(
    whole, copied, monkeypatch
):
    heard, under_way = [], (copied / "records.jsonl").read_bytes() + b'{"id": "test-0", "sam'
    (copied / "records.jsonl").write_bytes(under_way)
    monkeypatch.setattr(behaviors, "find", lambda text: heard.append(text) or [])
    eval.main(eval.Config(regrade=(str(copied),)))
    for name in ("graded.jsonl", "summary.json"):
        assert (copied / name).read_text() == (whole / name).read_text()
    assert not heard
    assert (copied / "records.jsonl").read_bytes() == under_way  # a look does a run no harm
    monkeypatch.setattr(behaviors, "VERSION", 0)  # another lexicon
    eval.finish(copied)
    assert len(heard) == 20


def test_a_gold_may_be_put_right_and_it_is_said_that_items_changed(copied, capsys):
    items = [item | {"answer": "99"} for item in read(copied / "items.jsonl")]
    write_rows(copied / "items.jsonl", items)
    assert eval.finish(copied)["headline"]["accuracy"]["score"] == 0
    assert "items.jsonl was changed after it was asked" in capsys.readouterr().out
    records = read(copied / "records.jsonl")
    write_rows(copied / "records.jsonl", records[1:])  # as of a run that has not ended
    with pytest.raises(ValueError, match=f"{copied}: replies .* missing .* again"):
        eval.finish(copied)
    write_rows(copied / "records.jsonl", records)
    write_rows(copied / "items.jsonl", items[1:])
    with pytest.raises(ValueError, match=f"item {items[0]['id']} has a reply, and is gone"):
        eval.finish(copied)


def test_a_forbidden_word_is_never_said_and_stands_in_the_protocol(mini, whole, tmp_path):
    assert any("answer" in record["response"] for record in read(whole / "records.jsonl"))
    for _ in range(2):  # the second time it is complete
        eval.main(config(mini, tmp_path, forbid=("answer",)))
    records = read(tmp_path / "records.jsonl")
    assert len(records) == 20 and not any("answer" in r["response"].split() for r in records)
    assert json.loads((tmp_path / "protocol.json").read_text())["forbid"] == ["answer"]


def test_the_control_shows_white_pictures_and_asks_the_same(mini, whole, tmp_path):
    cfg, shown = config(mini, tmp_path, pictures="blank"), 0
    eval.prepare(cfg, eval.runs_of(cfg)[tmp_path], tmp_path)
    for item, true in zip(*(read(out / "items.jsonl") for out in (tmp_path, whole)), strict=True):
        assert item | {"images": 0} == true | {"images": 0}
        for name, own in zip(item["images"], true["images"], strict=True):
            with Image.open(tmp_path / name) as white, Image.open(whole / own) as picture:
                assert white.size == picture.size and white.getextrema() == ((255, 255),) * 3
            shown += 1
    assert shown == 5


def test_shuffled_pictures_are_never_the_items_own_though_items_share_them(tmp_path):
    colors = {"a": "red", "b": "red", "c": "blue", "d": "green"}  # a and b are one picture
    for name, color in colors.items():
        Image.new("RGB", (4, 4), color).save(tmp_path / name, "png")
    items = [{"images": [*names]} for names in ["a", "a", "b", "c", "d", "", "c"]]
    shown = eval.with_other_pictures(items, "shuffled", tmp_path)
    for item, row in zip(items, shown, strict=True):
        for own, other in zip(item["images"], row["images"], strict=True):
            assert colors[own] != colors[other]
    two = [{"images": [*names]} for names in ["cd", "ad", "ac", "d"]]
    with pytest.raises(ValueError, match="no others to show for .'c', 'd'"):
        eval.with_other_pictures(two, "shuffled", tmp_path)


def test_several_benchmarks_in_any_case_go_into_folders_of_model_and_benchmark(
    mini, tmp_path, monkeypatch
):
    def generate(problems, samples, max_tokens, temperature, seed):
        assert (max_tokens, temperature, samples) == (32768, 0, 1)
        return [Rollout(p, 0, None, i, [1], stopped=True, text="7") for i, p in enumerate(problems)]

    monkeypatch.chdir(tmp_path)
    opened, echo = [], SimpleNamespace(generate=generate)
    monkeypatch.setattr(eval, "open_for", lambda *a: opened.append(a) or echo)
    sizes = {"math500": 1, "realworldqa": 3}
    for name in sizes:
        make(name, Path("place", name))
    cfg = eval.Config("out/a/rl/model", ("MATH500", "RealWorldQA"), "place")
    eval.main(cfg)
    written = {n: json.loads(Path(f"out/eval/a_rl/{n}/summary.json").read_text()) for n in sizes}
    assert {name: summary["n"] for name, summary in written.items()} == sizes
    assert len(opened) == 1  # one engine for all
    for changed, out in ((dict(out="x"), "x"), (dict(model="Q/Q-7B"), "out/eval/Q_Q-7B/pope")):
        assert [*eval.runs_of(replace(cfg, bench=("pope",), **changed))] == [Path(out)]
    for spec, sampler in ((None, "torch"), ("there", "vllm")):
        monkeypatch.setattr(eval, "find_spec", lambda name, spec=spec: spec)
        assert eval.chosen_sampler(cfg) == sampler


def test_a_server_is_asked_by_one_rank_and_again_only_for_what_it_failed_at(server, tmp_path):
    Image.new("RGB", (28, 28)).save(tmp_path / "p.png")
    words = ["right", "apart", "wrong", "400 right"]
    rows = [{"id": w, "prompt": f"2 + 3 ? [{w}]", "answer": "5", "images": []} for w in words]
    rows[0] |= {"prompt": "<image> 2 + 3 ? [right]", "images": ["p.png"]}
    own = dict(data=write_rows(tmp_path / "rows.jsonl", rows), out=str(tmp_path / "out"))
    cfg = eval.Config("m", url=server.url, k=2, temperature=0.6, top_p=0.95, max_tokens=99, **own)
    [(out, bench)] = eval.runs_of(cfg).items()
    eval.prepare(cfg, bench, out)
    for rank in (1, 2):
        world = SimpleNamespace(rank=rank, size=3, main=False, wait=lambda: None)
        eval.sample(cfg, bench, out, world, None)
    with pytest.raises(ValueError, match="1 replies are missing: give the command again"):
        eval.main(cfg)
    assert len(server.requests) == 8 and len(read(out / "records.jsonl")) == 7
    for _ in range(2):  # the second time nothing is missing
        eval.main(cfg)
    rows, bodies = read(out / "graded.jsonl"), [body for _, body in server.requests]
    assert [(r["id"], r["sample"]) for r in rows] == [(w, n) for w in words for n in (0, 1)]
    assert [r["score"] for r in rows] == [1, 1, 1, 1, 0, 0, 1, 1]
    assert all(r["response"].startswith("<think>") for r in rows)  # whichever field it came in
    assert len(bodies) == 9 and len({body["seed"] for body in bodies}) == 8
    how = {(body["max_tokens"], body["temperature"], body["top_p"]) for body in bodies}
    assert how == {(99, 0.6, 0.95)}
    assert sum("image_url" in str(body["messages"]) for body in bodies) == 2


def test_two_runs_are_compared_item_by_item(whole, copied, capsys):
    rows = read(whole / "graded.jsonl")
    gained = {row["id"] for row in rows[:6] if row["score"] == 0}
    write_rows(copied / "graded.jsonl", [row | {"score": 1.0} for row in rows[:6]] + rows[6:])
    eval.main(eval.Config(compare=(str(whole), str(copied))))
    printed = capsys.readouterr().out
    assert f"gained: {len(gained)}" in printed and "lost: 0" in printed and "McNemar" in printed
    assert "visual_verification: +0.000 of the replies" in printed
    with pytest.raises(FileNotFoundError, match="nothing/summary.json"):
        eval.main(eval.Config(compare=(str(whole), str(copied / "nothing"))))


def test_mmmu_pro_is_the_mean_of_its_two_forms_and_draws_a_question_in_both(tmp_path, capsys):
    for name, right in (("mmmu_pro", 180), ("mmmu_pro_vision", 120)):
        rows = [{"id": f"{name}/q{i}", "score": float(i < right)} for i in range(300)]
        rows = [r | dict(sample=0, status="ok", answer="A", chance=0.1) for r in rows]
        summary = metrics.summarise("accuracy", rows, rows) | {"protocol": {}}
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "graded.jsonl", rows)
        write_rows(tmp_path / name / "summary.json", [summary])
    eval.main(eval.Config(table=(f"{tmp_path}/mmmu_pro", f"{tmp_path}/mmmu_pro_vision")))
    [line] = re.findall("^mmmu_pro, both +accuracy +50.0 .*", capsys.readouterr().out, re.M)
    ends = [float(end) for end in re.search(r"(\d+\.\d) \.\. (\d+\.\d)", line).groups()]
    error = 196 * math.sqrt(0.2 / 300)  # of 300 questions, not of 600 rows
    assert ends == pytest.approx([50 - error, 50 + error], abs=0.4)


def test_the_table_has_a_line_for_each_directory_and_its_protocol(whole, tmp_path, capsys):
    same = [shutil.copytree(whole, f"{tmp_path}/{name}/same") for name in ("a", "b")]
    (tmp_path / "begun").mkdir()
    eval.main(eval.Config(table=(*same, str(whole), str(tmp_path / "begun"))))
    printed = capsys.readouterr().out
    assert f"{tmp_path}/begun: no summary.json" in printed
    assert re.findall(r"^(\S+) +avg@2 ", printed, re.M) == [*same, str(whole)]
    assert printed.count("max_tokens 8") == 3


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(data="d"), "give --model and --bench or --data"),
        (dict(data="d", model="m", k=4), "--temperature"),
        (dict(bench=("mathvizta",), model="m"), "there are aime2024"),
        (dict(data="d", model="m", top_p=0.0), "--top-p 0.0"),
        (dict(data="d", model="m", max_tokens=0), "--max-tokens"),
        (dict(regrade=("a",), table=("a",)), "one at a time"),
        (dict(data="d", model="m", place="p"), "--place"),
        (dict(bench=("pope",), model="m", columns=("prompt=q",)), "--columns is for --data"),
        (dict(data="d", model="m", bench=("a", "b")), "--data is one set"),
        (dict(data="d", model="m", url="http://h/v1", forbid=("wait",)), "--forbid"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        eval.Config(**settings)


def test_a_user_s_error_is_one_line_with_its_cure_and_nothing_is_retried(tmp_path):
    command = [sys.executable, "eval.py", "--model", "m", "--out", str(tmp_path)]
    nowhere = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    run = subprocess.run([*command, "--bench", "mathvista"], cwd=ROOT, env=nowhere,
                         capture_output=True, text=True)  # fmt: skip
    assert run.returncode == 1 and "Traceback" not in run.stderr and "Retry" not in run.stderr
    assert re.search("error: .*AI4Math/MathVista .* --place DIR$", run.stderr.strip()), run.stderr


def replied(name: str, folder: Path, reply, k: int = 1) -> tuple[dict, list[dict]]:
    """(summary, items) of a benchmark, from its columns, its items answered by reply(item, n)."""
    place, out = make(name, folder / "place"), folder / "out"
    cfg = eval.Config("m", (name,), str(place), out=str(out), k=k, temperature=1.0)
    eval.prepare(cfg, eval.runs_of(cfg)[out], out)
    items, done = read(out / "items.jsonl"), {"finish": "stop", "tokens": 5}
    pairs = [(item, n) for item in items for n in range(k)]
    records = [done | {"id": i["id"], "sample": n, "response": reply(i, n)} for i, n in pairs]
    write_rows(out / "records.jsonl", records)
    return eval.finish(out), items


NAMES = [b.name for b in benchmarks.BENCHMARKS]


@pytest.mark.parametrize("name", NAMES)
def test_an_oracle_reaches_the_top_of_every_benchmark(name, tmp_path):
    said = "<think>x</think> \\boxed{{{}}}"
    summary, items = replied(name, tmp_path, lambda item, n: said.format(item["answer"]))
    if benchmarks.named(name).judge == "only":
        assert not summary["headline"] and summary["left_out"] == len(items)
        return
    top = 200 if name == "mme" else 1  # one category
    assert all(of["score"] == pytest.approx(top) for of in summary["headline"].values())
    assert summary["status"] == {"ok": len(items)}


@pytest.mark.parametrize("name", [n for n in NAMES if benchmarks.named(n).metric == "accuracy"])
def test_a_constant_gets_its_share_and_each_letter_once_gets_chance(name, tmp_path):
    summary, items = replied(name, tmp_path, lambda item, n: "The answer is (A).")
    share = sum(str(item["answer"]).strip("() ") == "A" for item in items) / len(items)
    assert summary["headline"]["accuracy"]["score"] == pytest.approx(share)
    (k, *other) = {len(item.get("choices") or ()) for item in items}
    if k and not other:
        letters = "ABCDEFGHIJ"
        again, _ = replied(name, tmp_path / "k", lambda item, n: f"\\boxed{{{letters[n]}}}", k)
        assert again["headline"]["accuracy"]["score"] == pytest.approx(1 / k)
        assert again["chance"]["accuracy"] == pytest.approx(1 / k)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9])
def test_top_p_draws_only_of_the_fewest_likeliest_tokens_that_have_the_share(top_p):
    logits, banned = torch.randn(20, 9, generator=torch.Generator().manual_seed(0)), 3
    uniforms = torch.linspace(0, 0.9999, 1000).double()
    for row in logits:
        tokens = draw_tokens(row.expand(1000, 9), uniforms, 0.7, torch.tensor([banned]), top_p)
        weights = {i: math.exp(x / 0.7) for i, x in enumerate(row.tolist()) if i != banned}
        naive = set()
        for token in sorted(weights, key=weights.get, reverse=True):
            if sum(weights[t] for t in naive) < top_p * sum(weights.values()):
                naive.add(token)
        assert {*tokens.tolist()} == naive


def test_top_p_reaches_the_sampler(mini):
    """Of so small a share only the likeliest token is left."""
    sampler = eval.open_for(config(mini, "", top_p=1e-6), World(0, 1, torch.device("cpu")))
    problems = data.read_problems(mini.test)
    warm, greedy = (sampler.generate(problems, 1, 8, temperature) for temperature in (1.0, 0.0))
    assert [r.response_ids for r in warm] == [r.response_ids for r in greedy]
