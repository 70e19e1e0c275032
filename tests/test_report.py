"""report.py on a small made-up run: the numbers it must find, the page it must write."""

import json
import math
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from conftest import finished
from PIL import Image

import eval  # noqa: A004
from evaluation import behaviors, metrics
from miniature import report

ROOT = Path(__file__).resolve().parents[1]
MAIN = ("base", "coldstart", "rl")
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
    row |= {"response": response, "extracted": str(said), "score": score}
    return row | {"status": "ok", "finish": "stop", "tokens": len(response.split())}


def make_problems(directory, rng, count):
    colours = np.random.default_rng(0)
    rows = []
    for i in range(count):
        grid = {cell: rng.randint(1, 5) for cell in CELLS}
        row = {"id": f"test-{i}", "source": f"miniature/{('image', 'text')[i % 2]}", "images": []}
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
    row |= {"critic_grad_norm": 2 - x, "logp_diff": 3e-6 + 1e-6 * noise}
    dip = 0.35 - 0.3 * math.sin(math.pi * x) ** 2 + 0.15 * x
    for i, name in enumerate(behaviors.NAMES):
        row |= {
            f"image/{name}": max(0.0, dip - 0.03 * i + noise),
            f"text/{name}": 0.05 * i + 0.3 * x,
        }
    return row | {"ratio_diff": 0.0, "clip_fraction": 0.0, "lr": 1e-4}


def fake_run(directory, problems=64, samples=2, steps=40, stages=tuple(STAGES)):
    """A complete run directory; the seconds of a stage are what its metrics say."""
    rng = random.Random(0)
    rows = make_problems(directory / "data", rng, problems)
    for stage in stages:
        about = {"config": {"seed": 3}, "command": f"python {stage}.py", "versions": {"torch": "2"}}
        about |= {"commit": {"hash": "0123456789abcdef", "dirty": False}}
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
                out += [
                    r | {"id": f"reading-{r['id']}", "source": "miniature/reading"} for r in seen
                ]
            write(directory / "eval" / stage / how / "graded.jsonl", out)


def read_accuracy(row, response):
    found = re.findall(r"([AB][123]) (\d) =", response)
    return sum(row["grid"][cell] == int(digit) for cell, digit in found), len(found)


@pytest.fixture
def run(tmp_path):
    return tmp_path / "laptop"


def test_the_results_are_the_shares_in_the_records(run):
    fake_run(run)
    report.main(report.Config(run))
    results = json.loads((run / "results.json").read_text())
    assert results["seed"] == 3 and results["stages"].keys() == STAGES.keys()
    times = {stage: 1.5 * 40 if stage.startswith("rl") else 20.0 for stage in STAGES}
    assert {stage: results["seconds"][stage] for stage in times} == times
    problems = {r["id"]: r for r in map(json.loads, (run / "data/test.jsonl").open())}
    for stage, found in results["stages"].items():
        folder = run / "eval" / stage
        greedy = [json.loads(line) for line in (folder / "greedy" / "graded.jsonl").open()]
        seeing = [r["score"] for r in greedy if r["source"] == "miniature/reading"]
        greedy = [r for r in greedy if r["source"] != "miniature/reading"]
        sampled = [json.loads(line) for line in (folder / "sampled" / "graded.jsonl").open()]
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


# ---- benchmarks: Figure 4 and Table 4

SCORES = {"base": 0.7, "coldstart": 0.4, "rl": 0.65, "average": 0.66}


def bench(run, stage, step, name, right, metric="accuracy", count=200, samples=1, paper=None):
    """One model's directory as eval.py leaves it, its item i right where i / count < right."""
    folder, rows = run / "bench" / stage / step / name, []
    for i in range(count):
        row = {"id": f"{name}-{i}", "answer": ("yes", "no")[i % 2], "extracted": "yes", "tokens": 9}
        score = float((i * 37 % count) / count < right)
        rows += [row | {"sample": s, "status": "ok", "score": score} for s in range(samples)]
    summary = metrics.summarise(metric, rows, items=rows[::samples], paper=paper)
    summary["protocol"] = {"model": f"{stage}/{step}", "bench": name, "k": samples}
    write(folder / "graded.jsonl", rows)
    (folder / "summary.json").write_text(json.dumps(summary))
    return summary


def bench_run(run):
    """A run of 40 steps a stage, three checkpoints, three benchmarks; the cold start forgets."""
    fake_run(run, problems=16, stages=MAIN)
    for name, metric, paper in (
        ("mathvista", "accuracy", {"accuracy": 72.1}),
        ("pope", "f1", {"f1": 83.2}),
        ("easy", "accuracy", None),
    ):
        for stage, right in SCORES.items():
            bench(run, stage, "end", name, 0.9 if name == "easy" else right, metric, paper=paper)
        bench(run, "coldstart", "step_000020", name, 0.55, metric, paper=paper)
        bench(run, "rl", "step_000008", name, 0.5, metric, paper=paper)
        bench(run, "rl", "step_000030", name, 0.6, metric, paper=paper)
    return run


def section_of(run):
    return report.benchmarks(report.read_run(run))


def table_rows(section):
    """{(benchmark, score): {column: text of its cell}} of Table 4."""
    found = {}
    for row in re.findall(r"<tr>(.*?)</tr>", section[section.index("<tbody>") :]):
        name, score = re.search(r'"row">([^<]*)<small>(.*?)</small>', row).groups()
        cells = re.findall(r'<td data-name="([^"]*)">(.*?)</td>', row.replace("−", "-"))
        found[name, score] = {k: re.sub("<[^>]*>", " ", cell).split() for k, cell in cells}
    return found


def test_table_4_says_what_the_summaries_say(run):
    bench_run(run)
    rows = table_rows(section_of(run))
    assert [*rows] == [
        ("easy", "accuracy; n 200; k 1"),
        ("mathvista", "accuracy; n 200; k 1"),
        ("pope", "f1; n 200; k 1"),
        ("pope", "accuracy; n 200; k 1"),
    ]
    for (name, score), cells in rows.items():
        for stage in SCORES:
            file = run / "bench" / stage / "end" / name / "summary.json"
            told = json.loads(file.read_text())["headline"][score.split(";")[0]]
            shown = cells[report.name_of(stage)]
            assert shown == [f"{100 * told['score']:.1f}", "±", f"{100 * told['error']:.1f}"]
    assert rows["mathvista", "accuracy; n 200; k 1"]["In the paper"] == ["72.1"]
    assert rows["pope", "f1; n 200; k 1"]["In the paper"] == ["83.2"]
    assert rows["pope", "accuracy; n 200; k 1"]["In the paper"] == ["–"]


def test_differences_are_those_of_the_same_items_and_are_marked_where_they_are_clear(run):
    bench_run(run)
    rows = table_rows(section_of(run))
    draw = np.random.default_rng(1)
    for new, old in (("coldstart", "base"), ("rl", "coldstart")):
        scores = [
            [row["score"] for row in map(json.loads, file.open())]
            for file in (run / "bench" / s / "end/mathvista/graded.jsonl" for s in (new, old))
        ]
        change = 100 * np.subtract(*scores)
        draws = change[draw.integers(0, len(change), (20_000, len(change)))].mean(1)
        cells = rows["mathvista", "accuracy; n 200; k 1"]
        value, star, low, high = cells["Cold start - base" if old == "base" else "RL - cold start"]
        assert float(value) == pytest.approx(change.mean(), abs=0.051) and star == "*"
        ends = float(low.strip("[,")), float(high.strip("]"))
        assert ends == pytest.approx(np.quantile(draws, (0.025, 0.975)), abs=0.6)
    easy = rows["easy", "accuracy; n 200; k 1"]
    assert easy["RL - cold start"] == ["+0.0", "[+0.0,", "+0.0]"]  # the same answers: no star


def test_figure_4_goes_from_the_base_over_both_stages_to_the_average(run, monkeypatch):
    bench_run(run)
    drawn = {}

    def panel(title, note, draw):
        axes = report.plt.figure().add_subplot()
        draw(axes)
        dots = np.asarray(axes.collections[-1].get_offsets())
        drawn[title] = dots, [text.get_text() for text in axes.get_xticklabels()], axes

    monkeypatch.setattr(report, "panel", panel)
    report.figure_4(report.read_run(run))
    dots, ticks, axes = drawn["mathvista"]
    order = [("base", "end"), ("coldstart", "step_000020"), ("coldstart", "end")]
    order += [("rl", "step_000008"), ("rl", "step_000030"), ("rl", "end"), ("average", "end")]
    told = [
        json.loads((run / "bench" / a / b / "mathvista/summary.json").read_text())["headline"]
        for a, b in order
    ]
    assert dots[:, 0] == pytest.approx([0, 20 / 40, 1, 1 + 8 / 40, 1 + 30 / 40, 2, 2.45])
    assert dots[:, 1] == pytest.approx([100 * t["accuracy"]["score"] for t in told])
    whiskers = [path.vertices[:, 1] for path in axes.collections[0].get_paths()]
    ends = [[100 * t["accuracy"][end] for end in ("low", "high")] for t in told]
    assert np.array(whiskers) == pytest.approx(np.array(ends))
    assert ticks == ["base", "cold start\n40 steps", "RL\n40 steps", "average"]
    assert [*drawn] == ["easy", "mathvista", "pope"]
    report.plt.close("all")


def test_what_a_benchmark_lacks_is_left_out_and_said(run):
    fake_run(run, problems=16, stages=MAIN)
    bench(run, "base", "end", "blink", 0.7)
    bench(run, "rl", "end", "blink", 0.6)  # without a cold start there is no step to compare
    bench(run, "coldstart", "step_000020", "blink", 0.6)  # not its last model
    bench(run, "base", "end", "mmstar", 0.7)
    bench(run, "coldstart", "end", "mmstar", 0.7, count=150)
    bench(run, "rl_grpo", "end", "blink", 0.7)
    write(run / "bench/coldstart/end/blink/records.jsonl", [{"id": "blink-0"}])
    bench(run, "base", "end", "mm-vet", 0.7)
    file = run / "bench/base/end/mm-vet/summary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"headline": {}}))
    page = section_of(run)
    rows = table_rows(page)
    blink = rows["blink", "accuracy; n 200; k 1"]
    assert blink["Cold start"] == blink["Average"] == ["not", "scored"]
    assert blink["RL - cold start"] == blink["Cold start - base"] == ["–"]
    assert rows["mmstar", "accuracy; n 150 or 200; k 1"]["Cold start - base"] == ["–"]
    assert "mmstar, base and coldstart cannot be compared: the runs have different items" in page
    assert "coldstart/end/blink is not finished" in page
    assert "rl_grpo/end/blink is no stage of the recipe" in page
    assert "base/end/mm-vet has no score, which wants a judge" in page
    assert "NaN" not in page and len(rows) == 2


def test_replies_that_were_cut_off_are_said(run):
    fake_run(run, problems=16, stages=MAIN)
    for stage, share in (("base", 0.04), ("rl", 0.12)):
        bench(run, stage, "end", "blink", 0.7)
        file = run / "bench" / stage / "end/blink/summary.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"truncated": share}))
    assert "blink: replies cut off, and so wrong: rl 12%." in section_of(run)


def test_models_that_were_not_asked_alike_are_said(run):
    fake_run(run, problems=16, stages=("base", "coldstart"))
    bench(run, "base", "end", "blink", 0.7)
    bench(run, "coldstart", "end", "blink", 0.7, samples=2)
    page = section_of(run)
    assert "blink: its models were asked with different k." in page
    rows = table_rows(page)
    assert rows["blink", "accuracy; n 200; k 1 or 2"]["Base"][0] == "70.0"
    assert rows["blink", "avg@2; n 200; k 1 or 2"]["Cold start"][0] == "70.0"


def test_a_page_with_benchmarks_is_one_file_and_without_there_is_no_such_section(run):
    bench_run(run)
    report.main(report.Config(run))
    page = (run / "report.html").read_text()
    assert not re.search(r"https?://|<script|<link|@import|src=\"(?!data:)", page)
    assert page.count("<svg") == 1 + 3 + 6 + 3 + 3 + 9 and "$" not in page
    ids = re.findall(r'<clipPath id="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert "Cold start: gained in 0, lost in 3, changed nothing clear in 1 of 4." in page
    assert "Cold start + RL: gained in 3, lost in 0, changed nothing clear in 1 of 4." in page
    shutil.rmtree(run / "bench")
    assert section_of(run) == ""


def test_the_script_scores_what_is_not_scored_yet(mini, tmp_path):
    """Base: there. Cold start: its end, a checkpoint, and one that is its end once more."""
    model = tmp_path / "coldstart/model"
    for folder in ("base/model", "coldstart/model", "coldstart/checkpoints/step_000002/model"):
        shutil.copytree(mini.model, tmp_path / folder)
    other = tmp_path / "coldstart/checkpoints/step_000001/model"
    shutil.copytree(mini.model, other)
    weights = safetensors.numpy.load_file(other / "model.safetensors")
    halved = {name: weight / 2 for name, weight in weights.items()}
    safetensors.numpy.save_file(halved, other / "model.safetensors", {"format": "pt"})
    there = tmp_path / "bench/base/end/mine"
    small = {"data": mini.text, "max_tokens": 8, "threads": 1}
    eval.main(eval.Config(f"{tmp_path}/base/model", bench="mine", out=str(there), **small))
    before = {path: path.stat().st_mtime_ns for path in there.iterdir()}
    command = ["bash", "runs/eval.sh", str(tmp_path), "--max-tokens", "8", "--threads", "1"]
    output = finished(command, ROOT, {"BENCHES": f"mine={mini.text}"}, 200)
    said = re.findall(r"^== (.* mine)$", output, flags=re.M)
    assert said == ["coldstart/end mine", "coldstart/step_000001 mine"]
    assert "step_000002 is the end of its stage" in output
    assert {path: path.stat().st_mtime_ns for path in there.iterdir()} == before
    run = report.read_run(tmp_path)
    order = [(scored.stage, scored.step) for scored in run.benchmarks["mine"]]
    assert order == [("base", math.inf), ("coldstart", 1), ("coldstart", math.inf)]
    assert json.loads((tmp_path / "bench/coldstart/end/mine/protocol.json").read_text())[
        "model"
    ] == str(model)
    page = (tmp_path / "report.html").read_text()
    section = page[page.index('<section id="benchmarks"') :]
    assert ("mine", "accuracy; n 4; k 1") in table_rows(section)
