"""report.py on a small made-up run: the numbers it must find, the page it must write."""

import json
import math
import random
import re
import sys
import types

import numpy as np
import pytest
from PIL import Image

import behaviors
import report

CELLS = ("A1", "A2", "A3", "B1", "B2", "B3")
# stage -> (share right on pictures, on text, share that thinks, that looks again, digits misread)
STAGES = {
    "base": (0.45, 0.4, 0.0, 0.0, 0.0),
    "coldstart": (0.2, 0.9, 0.95, 0.3, 0.15),
    "rl": (0.93, 0.95, 1.0, 0.5, 0.02),
    "rl_without_coldstart": (0.5, 0.5, 0.0, 0.0, 0.0),
    "coldstart_text_only": (0.25, 0.9, 0.95, 0.3, 0.05),
    "rl_grpo": (0.9, 0.93, 1.0, 0.1, 0.03),
}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def answer_text(rng, grid, right, thinks, looks, misread):
    gold = sum(grid.values())
    said = gold if right else gold + rng.choice([-2, -1, 1, 3])
    if rng.random() >= thinks:
        return f"answer \\boxed{{ {said} }}", said
    words, total = ["i need the sum of the grid . first list cells , then add up ."], 0
    slip = rng.choice(CELLS) if rng.random() < looks else None
    for cell, digit in grid.items():
        if cell == slip:
            words.append(f"{cell} {digit % 5 + 1} = {total + digit % 5 + 1}")
            words.append(f"wait , that is not right . {total} . look at {cell} again :")
        read = digit % 5 + 1 if rng.random() < misread else digit
        total += digit
        words.append(f"{cell} {read} = {total}")
    if rng.random() < 0.4:
        words.append(f"let me check . read again : {total} is the same . good .")
    return f"<think> {' '.join(words)} </think> answer \\boxed{{ {said} }}", said


def record(rng, problem, sample, stage):
    right, text_right, thinks, looks, misread = STAGES[stage]
    image = bool(problem["images"])
    score = float(rng.random() < (right if image else text_right))
    response, said = answer_text(rng, problem["grid"], score, thinks, looks, misread)
    keep = ("id", "source", "prompt", "answer")
    row = {key: problem[key] for key in keep} | {"sample": sample, "seed": 0, "image": image}
    row |= {"response": response, "gold": problem["answer"], "answer": str(said), "score": score}
    return row | {"status": "ok", "finish": "stop", "tokens": len(response.split())}


def make_problems(directory, rng, count):
    colours = np.random.default_rng(0)
    rows = []
    for i in range(count):
        grid = {cell: rng.randint(1, 5) for cell in CELLS}
        row = {"id": f"test-{i}", "source": f"toy/{('image', 'text')[i % 2]}", "images": []}
        row |= {"prompt": "what is the sum of the grid ?", "answer": str(sum(grid.values()))}
        row["grid"] = grid
        if i % 2 == 0:
            row |= {"images": [f"images/{i}.png"], "prompt": "<image> " + row["prompt"]}
            pixels = (
                colours.integers(120, 255, (4, 6, 3), dtype=np.uint8).repeat(14, 0).repeat(14, 1)
            )
            (directory / "images").mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(directory / row["images"][0])
        rows.append(row)
    write(directory / "test.jsonl", rows)
    return rows


def rl_metrics(step, steps):
    x = step / steps
    budget = (48, 64, 96)[min(2, int(3 * x))]
    noise = 0.02 * math.sin(7.1 * step)
    row = {"step": step, "seconds": 1.5, "reward": 0.3 + 0.55 * x + noise, "length": 40 + 20 * x}
    row |= {"reward_image": 0.22 + 0.6 * x + noise, "reward_text": 0.75 + 0.15 * x - noise}
    row |= {
        "length_budget": budget,
        "truncated": 0.1 * (1 - x),
        "no_box": 0.02,
        "entropy": 0.6 - 0.4 * x,
    }
    row |= {
        "policy_loss": noise / 5,
        "value_loss": 0.2 - 0.15 * x,
        "explained_variance": 0.7 * x + noise,
    }
    row |= {"value_mean": 0.2 + 0.6 * x, "return_mean": 0.3 + 0.55 * x, "grad_norm": 0.5 + noise}
    row |= {"critic_grad_norm": 2 - x, "logp_diff_mean": 1e-7, "logp_diff_max": 3e-6 + 1e-6 * noise}
    dip = 0.35 - 0.3 * math.sin(math.pi * x) ** 2 + 0.15 * x
    for i, name in enumerate(behaviors.NAMES):
        row |= {
            f"image/{name}": max(0.0, dip - 0.03 * i + noise),
            f"text/{name}": 0.05 * i + 0.3 * x,
        }
    return row | {"ratio_max": 0.0, "clip_fraction": 0.0, "lr": 1e-4}


def fake_run(directory, problems=64, samples=2, steps=40, stages=tuple(STAGES)):
    """A complete run directory; the seconds of a stage are 60 and what its metrics say."""
    rng = random.Random(0)
    rows = make_problems(directory / "data", rng, problems)
    for stage in stages:
        about = {"config": {"seed": 3}, "command": f"python {stage}.py", "versions": {"torch": "2"}}
        about |= {"commit": {"hash": "0123456789abcdef", "dirty": False}}
        about |= {"seconds_total": 60.0} if stage != "base" else {}  # base: from its metrics
        (directory / stage).mkdir()
        (directory / stage / "run.json").write_text(json.dumps(about))
        metrics = [rl_metrics(step, steps) for step in range(steps)]
        if not stage.startswith("rl"):
            loss = [3 * math.exp(-step / 9) + 0.3 for step in range(steps)]
            metrics = [
                {"step": i, "seconds": 0.5, "loss": x, "lr": 1e-3} for i, x in enumerate(loss)
            ]
            for row in metrics[::5]:
                row["valid_loss"] = row["loss"] + 0.05
        write(directory / stage / "metrics.jsonl", metrics)
        for how, count in (("greedy", 1), ("sampled", samples)):
            out = [record(rng, row, k, stage) for row in rows for k in range(count)]
            if how == "greedy":
                seen = [r for r in out[:40] if r["image"]]
                out += [r | {"id": f"reading-{r['id']}", "source": "toy/reading"} for r in seen]
            write(directory / "eval" / stage / how / "records.jsonl", out)


def read_accuracy(row, response):
    found = re.findall(r"([AB][123]) (\d) =", response)
    return sum(row["grid"][cell] == int(digit) for cell, digit in found), len(found)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "toy", types.SimpleNamespace(read_accuracy=read_accuracy))
    return tmp_path / "laptop"


def test_the_results_are_the_shares_in_the_records(run):
    fake_run(run)
    report.main(report.Config(run))
    results = json.loads((run / "results.json").read_text())
    assert results["seed"] == 3 and results["stages"].keys() == STAGES.keys()
    assert results["seconds"] == {stage: 60.0 for stage in STAGES} | {"base": 20.0}
    problems = {r["id"]: r for r in map(json.loads, (run / "data/test.jsonl").open())}
    for stage, found in results["stages"].items():
        folder = run / "eval" / stage
        greedy = [json.loads(line) for line in (folder / "greedy" / "records.jsonl").open()]
        seeing = [r["score"] for r in greedy if r["source"] == "toy/reading"]
        greedy = [r for r in greedy if r["source"] != "toy/reading"]
        sampled = [json.loads(line) for line in (folder / "sampled" / "records.jsonl").open()]
        for kind in ("image", "text"):
            mine = [
                [r for r in rows if r["image"] == (kind == "image")] for rows in (greedy, sampled)
            ]
            for rows, key in zip(
                mine, (f"{kind}_accuracy", f"{kind}_accuracy_sampled"), strict=True
            ):
                assert found[key] == pytest.approx(np.mean([r["score"] for r in rows]))
            scores = [r["score"] for r in mine[0]]
            error = np.std(scores, ddof=1) / math.sqrt(len(scores))
            assert found[f"{kind}_accuracy_se"] == pytest.approx(error)
            for name in behaviors.NAMES:
                has = [any(s.name == name for s in behaviors.find(r["response"])) for r in mine[1]]
                assert found["behaviors"][kind][name] == pytest.approx(np.mean(has))
        assert found["n"] == 32 and found["perception_accuracy"] == pytest.approx(np.mean(seeing))
        images = [r for r in greedy if r["image"]]
        counts = np.array([read_accuracy(problems[r["id"]], r["response"]) for r in images]).sum(0)
        read = counts[0] / counts[1] if counts[1] else None
        assert found["read_accuracy"] == (read if read is None else pytest.approx(read))


def test_samples_of_one_problem_are_not_counted_as_independent():
    """Ten identical samples a problem say no more than one."""
    once = [{"id": i, "score": i % 3 == 0} for i in range(30)]
    one = report.ratio(once, lambda row: row["score"])
    ten = report.ratio(once * 10, lambda row: row["score"])
    assert ten.value == one.value == pytest.approx(1 / 3) and ten.error == pytest.approx(one.error)


def test_a_ratio_of_two_rates_has_the_error_that_resampling_finds():
    draw = np.random.default_rng(0)
    total = draw.random(400) < 0.6
    right = total & (draw.random(400) < 0.3)
    rows = [{"id": i, "r": r, "t": t} for i, (r, t) in enumerate(zip(right, total, strict=True))]
    got = report.ratio(rows, lambda row: row["r"], lambda row: row["t"])
    picks = draw.integers(0, 400, (4000, 400))
    assert got.value == pytest.approx(right.sum() / total.sum())
    assert got.error == pytest.approx(np.std(right[picks].sum(1) / total[picks].sum(1)), rel=0.05)


def test_the_page_is_one_file_with_every_section(run):
    fake_run(run)
    report.main(report.Config(run))
    page = (run / "report.html").read_text()
    assert not re.search(r"https?://|<script|<link|@import|src=\"(?!data:)", page)
    sections = re.findall(r'<section id="([^"]*)"', page)
    assert sections == "stages figure-3 insights figure-5 table-4 invariants examples".split()
    assert page.count("<svg") == 1 + 3 + 6 + 3 + 9 and page.count("data:image/png;base64,") == 5
    assert page.count("not run") == 2  # rl_text_only and average, and nothing else
    assert "<mark" in page and "NaN" not in page and ">nan" not in page and "$" not in page
    ids = re.findall(r'<clipPath id="([^"]*)"', page)
    assert len(ids) == len(set(ids))  # figures share a page, and must not share clip paths


@pytest.mark.parametrize(
    "stages", [("base", "coldstart", "rl"), ("base",), ("rl",), ("mine", "rl")]
)
def test_what_was_not_run_is_said_and_survived(run, stages, monkeypatch):
    monkeypatch.setitem(STAGES, "mine", STAGES["rl_grpo"])
    fake_run(run, problems=16, steps=12, stages=stages)
    report.main(report.Config(run))
    page = (run / "report.html").read_text()
    assert "not run" in page and "NaN" not in page
    assert list(json.loads((run / "results.json").read_text())["stages"]) == sorted(
        stages, key=lambda stage: stage == "mine"
    )


def test_the_paper_is_confirmed_only_where_the_curve_confirms_it(run):
    """Suppressed then amplified, suppressed alone, and flat but for noise."""
    fake_run(run, problems=16)
    noise = [0.03 * (-1) ** step for step in range(40)]
    for end, tone in ((0.4, "yes"), (0.05, "half"), (0.3, "no")):
        shape = np.interp(range(40), (0, 20, 39), (0.3, 0.3 if tone == "no" else 0.05, end))
        rows = [{"step": i, "seconds": 1.0} for i in range(40)]
        for row, value, extra in zip(rows, shape, noise, strict=True):
            row["image/visual_reflection"] = float(value + extra)
        write(run / "rl" / "metrics.jsonl", rows)
        _, verdict, text = report.insight_amplified(report.read_run(run))
        assert report.VERDICTS[verdict][0] == tone, text


def test_a_finding_needs_two_standard_errors():
    low, high = report.Rate(0.5, 0.03), report.Rate(0.57, 0.03)
    assert not high.above(low) and report.Rate(0.6, 0.03).above(low)
    assert not report.Rate().above(low) and not high.above(report.Rate())


def test_an_empty_directory_is_refused(run):
    run.mkdir()
    with pytest.raises(SystemExit, match="nothing to report"):
        report.main(report.Config(run))
