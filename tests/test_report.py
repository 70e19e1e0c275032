"""The report on a made-up run of bills: the numbers it must find, the page it must write."""

import base64
import io
import json
import math
import random
import re
import shutil

import numpy as np
import pytest
from conftest import write_rows
from PIL import Image
from test_gallery import Page

from common.records import read_rows
from evaluation import behaviors, metrics
from miniature import report, world

MAIN = ("base", "coldstart", "rl")
NEVER = dict.fromkeys(world.RATES, 0.0)
STAGES = {  # how often the answers show a habit; None: they do not think
    "base": None,
    "coldstart": world.RATES,
    "rl": NEVER | {"check": 0.97, "look": 0.95},
    "forbid_again": NEVER | {"check": 0.97},
    "rl_without_coldstart": None,
}
HOSTILE = ["</script><script>document.title='broken'</script>", "<!--<script>", "\"'", "\n"]
HOSTILE += ["\u202e", "{{ run }}", " a ", "", "\ud800"]


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_rows(path, rows)


def record(rng, row, sample, rates):
    words = row["bill"].split()
    items = [[int(word.strip("~;") or 0) for word in words[i + 1 : i + 3]] for i in (0, 3, 6, 9)]
    bill = world.Bill((), int(words[13]), tuple((a, b) if b else (a,) for a, b in items))
    asked = [world.ITEMS.index(name) for name in re.findall(r"\b[A-D]\b", row["prompt"])[-2:]]
    thinks = rates is not None
    said = world.trace(bill, asked, rng, rates) if thinks else world.direct(rng.randint(2, 10))
    answer = re.search(r"boxed\{ (\d+)", said)[1]
    of = {"id": row["id"], "sample": sample, "image": bool(row["images"]), "response": said}
    return of | {"extracted": answer, "score": float(answer == row["answer"])}


def fake_run(folder, problems=16, steps=30, stages=tuple(STAGES)):
    rng, cfg = random.Random(0), world.Config(out=str(folder / "data"))
    (folder / "data/images").mkdir(parents=True, exist_ok=True)
    rows = [world.problem_row(rng, i, "test", cfg) for i in range(problems)]
    write(folder / "data/test.jsonl", *rows)
    lexicon = [f"{kind}/{name}" for kind in ("image", "text") for name in behaviors.NAMES]
    habits = [f"{name}/{group}" for name in report.HABITS for group in world.GROUPS]
    for stage in stages:
        word = stage.startswith("forbid_")
        for how, count in (("", 1),) if word else (("greedy", 1), ("sampled", 2)):
            out = [record(rng, row, k, STAGES[stage]) for row in rows for k in range(count)]
            write(folder / "eval" / ("rl" * word) / stage / how / "graded.jsonl", *out)
        if word:
            continue
        write(folder / "eval" / stage / "skills.json", {"faint digit": 0.97, "log P, 0 left": -6.5})
        about = {"config": {"seed": 3}, "command": f"python {stage}.py", "versions": {"torch": "2"}}
        write(folder / stage / "run.json", about)
        names = ("loss", "reward_image", "length", *lexicon, *habits)
        logged = [dict.fromkeys(names, i / steps) | {"step": i} for i in range(steps)]
        write(folder / stage / "metrics.jsonl", *[row | {"seconds": 1.5} for row in logged])
    return folder


def rollout(said, problem_id="train-0", **more):
    row = {"step": 0, "id": problem_id, "sample": 0, "prompt": "what ?", "images": []}
    row |= {"answer": "14", "reward": 1.0, "status": "match", "stopped": True, "tokens": said}
    numbers = [round(i / 7, 4) for i in range(len(said))]
    row |= {"logps": numbers, "values": numbers, "advantages": numbers[::-1]}
    return row | {"length": len(said), "response": " ".join(said)} | more


def reported(run):
    """The elements of the page, its text, {stage: text of its row in the table}, results.json."""
    report.main(report.Config(run))
    page = Page(text := (run / "report.html").read_text())
    rows, page.run, page.text, page.row_of = page.all("tr"), run, text, {}
    for stage in STAGES | report.STAGES:
        head = report.name_of(stage) + report.STAGES.get(stage, ("", ""))[1]
        found = [" ".join(row.text.split()) for row in rows if row.text.lstrip().startswith(head)]
        page.row_of[stage] = found[0].removeprefix(head) if found else ""
    page.results = json.loads((run / "results.json").read_text())
    return page


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return reported(fake_run(tmp_path_factory.mktemp("report"), problems=64))


@pytest.fixture
def no_charts(monkeypatch):
    """They take most of the time."""
    monkeypatch.setattr(report, "chart", lambda title, draw, lost: {"title": title, "lost": lost})


def mean(values):
    values = list(values)
    return pytest.approx(sum(values) / len(values)) if values else None


def check_stage(found, ending, file, rows):
    """One mode of a stage in results.json, against the records."""
    records = read_rows(file)
    for kind in ("image", "text"):
        mine = [r for r in records if r["image"] == (kind == "image")]
        assert found[f"{kind}_accuracy{ending}"] == mean(r["score"] for r in mine)
        if ending:
            assert found["thinks"][kind] == mean("</think>" in r["response"] for r in mine)
            for name, rate in found["behaviors"][kind].items():
                assert rate == mean(behaviors.count(r["response"])[name] > 0 for r in mine)
    for group, rates in found["groups"].items():
        mine, shown = [r for r in records if rows[r["id"]]["group"] == group], []
        for r in mine:
            watch = rows[r["id"]]["watch"].items()
            shown.append({name for name, pattern in watch if re.search(pattern, r["response"])})
        expected = {name: mean(name in s for s in shown) for name in report.HABITS}
        expected["accuracy"] = mean(r["score"] for r in mine)
        expected["useless"] = mean(bool(s & report.USELESS) for s in shown)
        looks = mean("second_look" in s for s in shown if "wrong_first" in s)
        expected["second_look_where_wrong"] = looks
        assert {name: rates[f"{name}{ending}"] for name in expected} == expected


def test_the_results_are_the_shares_in_the_records(page):
    rows = {row["id"]: row for row in read_rows(page.run / "data/test.jsonl")}
    results, word = page.results, page.results["forbid"]["again"]
    assert results["seed"] == 3 and results["seconds"]["rl"] == 45
    assert {*results["stages"]} == STAGES.keys() - {"forbid_again"} and len(results["forbid"]) == 1
    for stage, found in results["stages"].items():
        assert found["skills"]["faint digit"] == 0.97 and {*found["groups"]} == {*world.GROUPS}
        check_stage(found, "", page.run / f"eval/{stage}/greedy/graded.jsonl", rows)
        check_stage(found, "_sampled", page.run / f"eval/{stage}/sampled/graded.jsonl", rows)
    check_stage(word, "", page.run / "eval/rl/forbid_again/graded.jsonl", rows)
    assert word["image_accuracy_sampled"] is None  # not measured


def rate_of(right, n, times=1):
    records = [{"id": i, "shown": {"right"} if i < right else set()} for i in range(n)] * times
    return report.share(records, "right")


def test_ten_identical_samples_of_a_problem_say_no_more_than_one_and_independent_ones_ten_times():
    for right, n in ((0, 9), (3, 40), (20, 40), (40, 40)):
        for rate in (rate_of(right, n), rate_of(right, n, times=10)):
            assert (rate.low, rate.high) == pytest.approx(metrics.wilson(right / n, n))
    draw, one = np.random.default_rng(0), rate_of(20, 60)
    mixed = [{"id": i, "shown": {draw.integers(3)}} for i in range(60) for _ in range(10)]
    free = report.share(mixed, 0)
    assert (free.high - free.low) / (one.high - one.low) == pytest.approx(10**-0.5, rel=0.25)


def test_two_rates_differ_where_newcombe_says_so():
    """His first example, 56 of 70 against 48 of 80: 0.2, and its interval begins at 0.0524."""
    high, low = rate_of(56, 70), rate_of(48, 80)
    edge = high.value - low.value - math.hypot(high.value - high.low, low.high - low.value)
    assert edge == pytest.approx(0.0524, abs=1e-4)
    assert high.above(low) and not low.above(high) and not rate_of(6, 10).above(rate_of(4, 10))


@pytest.mark.parametrize("ends", [(0.4, 0.1, 0.9), (0.4, 0.1, 0.1), (0.1, 0.1, 0.9), (0.3,) * 3])
def test_a_fall_before_the_rise_is_claimed_only_where_the_curve_has_both(tmp_path, ends):
    noise, shape = random.Random(1), np.interp(range(60), (0, 20, 59), ends)
    rows = [{"step": i, "seconds": 1.0, "x": v + noise.gauss(0, 0.03)} for i, v in enumerate(shape)]
    write(tmp_path / "rl/run.json", {"config": {}})
    write(tmp_path / "rl/metrics.jsonl", *rows)
    found = report.claim(report.Run(tmp_path), "dips", ["rl"], ["x"], "")
    assert found["holds"] == (ends == (0.4, 0.1, 0.9))


def test_a_claim_holds_where_the_rates_go_its_way_and_is_open_where_one_is_missing(page):
    there, path = report.Run(page.run), ["groups.smudged_picture.check_sampled"]
    for stages, expected in (
        (("base", "rl"), [True, False, False]),
        (("rl", "base"), [False, True, False]),
        (("base", "rl_without_coldstart"), [False, False, True]),
        (("base", "rl_grpo"), [None] * 3),
    ):
        ways = ("rises", "falls", "stays")
        assert [report.claim(there, way, stages, path, "")["holds"] for way in ways] == expected


def test_the_page_is_one_file_with_its_figures_and_examples_of_what_some_stage_fails(page):
    assert not re.search(r"https?://|<script|<link|@import|src=\"(?!data:)", page.text)
    assert page.text.count("<svg") == len(page.all("figure")) > 0 and "NaN" not in page.text
    ids = re.findall(r'<clipPath id="([^"]*)"', page.text)
    assert ids and len(ids) == len(set(ids))  # figures share a page, and must not share clip paths
    assert page.text.count("data:image/webp;base64,") == report.EXAMPLES
    for example in report.examples(report.Run(page.run)):
        assert [*example["answers"]] == [*MAIN] and example["problem"]["images"]
        assert min(answer["score"] for answer in example["answers"].values()) == 0


def test_the_table_and_the_headline_show_the_numbers_of_the_results(page):
    found = page.results["stages"] | {"forbid_again": page.results["forbid"]["again"]}
    for stage, rates in found.items():
        both = [
            rates["groups"]["smudged_picture"].get(key) for key in ("accuracy", "accuracy_sampled")
        ]
        words = "".join(rf" {100 * rate:.0f} \d+–\d+" for rate in both if rate is not None)
        assert re.match(words, page.row_of[stage])
    groups = [found[stage]["groups"] for stage in (*MAIN, "forbid_again")]
    solved = [f"{100 * rates['smudged_picture']['accuracy']:.0f}" for rates in groups]
    assert re.findall(r"(\d+) % (?!checked)", page.all("h1")[0].text) == solved


@pytest.mark.parametrize("stages", [("base",), ("mine", "rl")])
def test_what_was_not_run_is_said_and_survived(tmp_path, stages, monkeypatch, no_charts):
    monkeypatch.setitem(STAGES, "mine", STAGES["rl"])
    page = reported(fake_run(tmp_path, steps=12, stages=stages))
    assert {*page.results["stages"]} == {*stages} and "NaN" not in page.text
    lost = {stage for stage, row in page.row_of.items() if "not in this run" in row}
    assert lost == {*report.STAGES} - {*stages}
    assert "mine" not in stages or page.row_of["mine"]


def test_a_run_without_groups_or_without_evaluation_is_reported_too(tmp_path, no_charts):
    """As a 7B run is, whose rows have no groups, and any run in its first minutes."""
    rows = read_rows(fake_run(tmp_path) / "data/test.jsonl")
    keys = ("id", "prompt", "images", "answer")
    write(tmp_path / "data/test.jsonl", *[{key: row[key] for key in keys} for row in rows])
    page = reported(tmp_path)
    accuracy = f"{100 * page.results['stages']['rl']['image_accuracy']:.0f}"
    assert re.search(rf"Picture problems solved:.* {accuracy} % after RL", page.text, re.S)
    shutil.rmtree(tmp_path / "eval")
    assert "no stage has been evaluated yet" in reported(tmp_path).text
    with pytest.raises(SystemExit, match="nothing to report"):
        report.main(report.Config(tmp_path / "data"))


def test_hostile_text_is_text_alone(tmp_path, no_charts):
    """Prompts, ids, answers, replies and tokens that break out change no tag of the page."""

    def tags_of(folder, text, tokens):
        run = fake_run(folder, stages=MAIN)
        for file in (run / "eval").glob("*/*/graded.jsonl"):
            more = {"extracted": text}
            write(file, *[r | more | {"response": r["response"] + text} for r in read_rows(file)])
        said = {"status": text, "prompt": text, "answer": text}
        write(run / "data/test.jsonl", *[row | said for row in read_rows(run / "data/test.jsonl")])
        write(run / "rl/trace.jsonl", rollout(tokens, text, **said))
        return [(element.tag, sorted(element.attrs)) for element in reported(run).elements]

    bad = tags_of(tmp_path / "bad", " ".join(HOSTILE), HOSTILE)
    assert bad == tags_of(tmp_path / "plain", "a", ["a"] * len(HOSTILE))
    assert ("span", ["data-is", "style", "tabindex"]) in bad


def test_tokens_are_shown_with_their_numbers_long_responses_cut_and_grpo_has_no_values(
    tmp_path, monkeypatch, no_charts
):
    monkeypatch.setattr(report, "END", 3)
    run = fake_run(tmp_path, problems=1, stages=("rl",))
    files = [str(run / "data/images/test-0-0.png"), "gone.png"]
    row = rollout([*"abcdefghij"], values=None, images=files)
    alike = [rollout("a", step=1), rollout("b", step=1)]  # not a step to learn from
    write(run / "rl/trace.jsonl", row, rollout("", reward=0.0, images=files), *alike)
    page = reported(run)
    picture = page.all("img")[-1].attrs["src"].split(",")[1]
    small = Image.open(io.BytesIO(base64.b64decode(picture)))
    assert "gone.png is not there" in page.text and small.size == (84, 140)
    shown = [e.attrs["data-is"] for e in page.elements if "data-is" in e.attrs]
    found = [re.findall(r"(?:token|log p|value V|advantage) (\S+)", text) for text in shown]
    numbers = [(str(i + 1), row["logps"][i], row["advantages"][i]) for i in (0, 1, 2, 7, 8, 9)]
    assert found == [[place, str(logp), "none", str(a)] for place, logp, a in numbers]
    assert "4 tokens left out" in page.text
