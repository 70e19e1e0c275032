"""The report on a made-up run of bills: the numbers it must find, the page it must write."""

import base64
import io
import json
import math
import random
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from evaluation import behaviors
from miniature import report

ITEMS = "ABCD"
GROUPS = ("smudged_picture", "clear_picture", "smudged_text", "clear_text")
MAIN = ("base", "coldstart", "rl")
# stage -> shares that think, check, look again where it is due, show a useless habit
STAGES = {
    "base": (0.0, 0.0, 0.0, 0.0),
    "coldstart": (0.95, 0.35, 0.9, 0.2),
    "rl": (1.0, 0.97, 0.95, 0.01),
    "forbid_again": (1.0, 0.97, 0.0, 0.01),
    "rl_without_coldstart": (0.0, 0.0, 0.0, 0.0),
    "rl_random_total": (1.0, 0.03, 0.5, 0.02),
}
USELESS = ("i need each digit .", "first list items .", "look again at C 2 .", "read again : A 1 .")
HOSTILE = ["</script><script>document.title='broken'</script>", "<!--<script>", "\"'", "\n"]
HOSTILE += ["\u202e", "{{ run }}", " a ", "", "\ud800"]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path):
    return [json.loads(line) for line in path.open()]


def problem(rng, i, folder):
    """A bill: of two smudged items one shows the wrong digit first."""
    item, right, group = ITEMS[i // 4 % 4], rng.randint(1, 5), GROUPS[i % 4]
    row = {"id": f"test-{i}", "group": group, "prompt": f"what is {item} + D ?", "images": []}
    if "picture" in group:
        row["images"] = [f"images/{i}.png"]
        (folder / "images").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (84, 140), (200, 40 * (i % 5), 90)).save(folder / row["images"][0])
    watch = {"check": "let me check", "second_look": f"look again at {item} ~", "need": "i need"}
    watch |= {"plan": "first list", "idle_look": r"look again at [A-D] \d", "reread": "read again"}
    first = right
    if "smudged" in group:
        first = rng.choice((right, right % 5 + 1))
        watch["wrong_first"] = rf"{item} maybe (?!{right}\b)"
    return row | {"watch": watch, "answer": str(right + 3), "bill": (item, right, first)}


def record(rng, row, sample, stage):
    item, right, said = row["bill"]
    think, check, again, useless = (rng.random() < share for share in STAGES[stage])
    words = [rng.choice(USELESS)] * useless + [f"A 1 {item} maybe {said} ."]
    if check:
        words.append(f"let me check . T 12 {item} {said} = 4 .")
        if again and said != right:
            words.append(f"wait , that is not right . look again at {item} ~{right} .")
            said = right
    answer = str(said + 3 if think else rng.randint(4, 9))
    text = f"<think> {' '.join(words)} so {answer} </think> " * think + f"\\boxed{{ {answer} }}"
    found = {"id": row["id"], "sample": sample, "extracted": answer, "response": text}
    return found | {"image": bool(row["images"]), "score": float(answer == row["answer"])}


def metrics_of(stage, step, steps):
    x = step / steps
    row = {"step": step, "seconds": 1.5, "loss": 3 - 2 * x, "reward_image": x, "length": 40 + x}
    for name in (*report.HABITS, "reward"):
        row |= {f"{name}/{group}": x**2 for group in GROUPS}
    for name in behaviors.NAMES:
        row |= {f"image/{name}": x, f"text/{name}": 1 - x}
    return row if stage.startswith("rl") else {k: row[k] for k in ("step", "seconds", "loss")}


def fake_run(folder, problems=16, steps=30, stages=tuple(STAGES)):
    rng = random.Random(0)
    rows = [problem(rng, i, folder / "data") for i in range(problems)]
    write(folder / "data/test.jsonl", rows)
    for stage in stages:
        place = folder / "eval" / stage
        if stage.startswith("forbid_"):
            out = [record(rng, row, 0, stage) for row in rows]
            write(folder / "eval/rl" / stage / "graded.jsonl", out)
            continue
        for how, count in (("greedy", 1), ("sampled", 2)):
            out = [record(rng, row, k, stage) for row in rows for k in range(count)]
            write(place / how / "graded.jsonl", out)
        (place / "skills.json").write_text('{"faint digit": 0.97, "log P(wait), 0 left": -6.5}')
        about = {"config": {"seed": 3}, "command": f"python {stage}.py", "versions": {"torch": "2"}}
        write(folder / stage / "run.json", [about | {"commit": {"hash": "0123", "dirty": False}}])
        logged = [metrics_of(stage, step, steps) for step in range(steps)]
        write(folder / stage / "metrics.jsonl", logged)
    return folder


def rollout(step, sample, reward, said, problem_id="train-0", **more):
    draw = random.Random(f"{step} {sample}")
    row = {"step": step, "id": problem_id, "sample": sample, "prompt": "what ?", "images": []}
    row |= {"answer": "14", "reward": reward, "status": "match", "stopped": True}
    row |= {"length": len(said), "tokens": said, "response": " ".join(said)}
    for name in ("logps", "values", "advantages"):
        row[name] = [round(draw.gauss(0, 1), 4) for _ in said]
    return row | more


class Page(HTMLParser):
    """The report of a run: its tags in order, the words of every table row."""

    def __init__(self, run):
        super().__init__()
        report.main(report.Config(run))
        self.text, self.tags, self.rows = (run / "report.html").read_text(), [], []
        self.results = json.loads((run / "results.json").read_text())
        self.feed(self.text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("tr", "section"):
            self.rows.append("")

    def handle_data(self, data):
        if self.rows:
            self.rows[-1] = f"{self.rows[-1]} {data.strip()}".strip()

    def row_of(self, name):
        return next(" ".join(row.split()) for row in self.rows if row.startswith(name))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fake_run(tmp_path_factory.mktemp("report"), problems=64)


@pytest.fixture(scope="module")
def page(run):
    return Page(run)


@pytest.fixture
def no_charts(monkeypatch):
    """They take most of the time."""
    monkeypatch.setattr(report, "chart", lambda name, draw: "<svg></svg>")


# ---- numbers


def mean(values):
    values = list(values)
    return pytest.approx(sum(values) / len(values)) if values else None


def check_stage(found, ending, records, rows):
    """One mode of a stage in results.json, against the records."""
    for kind in ("image", "text"):
        mine = [r for r in records if r["image"] == (kind == "image")]
        assert found[f"{kind}_accuracy{ending}"] == mean(r["score"] for r in mine)
        if ending:
            assert found["thinks"][kind] == mean("</think>" in r["response"] for r in mine)
            for name, rate in found["behaviors"][kind].items():
                assert rate == mean(behaviors.count(r["response"])[name] > 0 for r in mine)
    for group, rates in found["groups"].items():
        mine = [r for r in records if rows[r["id"]]["group"] == group]
        shown = [
            {name for name, x in rows[r["id"]]["watch"].items() if re.search(x, r["response"])}
            for r in mine
        ]
        assert rates[f"accuracy{ending}"] == mean(r["score"] for r in mine)
        for name in report.HABITS:
            assert rates[f"{name}{ending}"] == mean(name in s for s in shown)
        assert rates[f"useless{ending}"] == mean(bool(s & report.USELESS) for s in shown)
        looks = mean("second_look" in s for s in shown if "wrong_first" in s)
        assert rates[f"second_look_where_wrong{ending}"] == looks


def test_the_results_are_the_shares_in_the_records(run, page):
    rows = {row["id"]: row for row in read(run / "data/test.jsonl")}
    results, word = page.results, page.results["forbid"]["again"]
    assert results["seed"] == 3 and results["seconds"]["rl"] == 45
    assert {*results["stages"]} == STAGES.keys() - {"forbid_again"} and len(results["forbid"]) == 1
    for stage, found in results["stages"].items():
        assert found["skills"]["faint digit"] == 0.97 and {*found["groups"]} == {*GROUPS}
        check_stage(found, "", read(run / f"eval/{stage}/greedy/graded.jsonl"), rows)
        check_stage(found, "_sampled", read(run / f"eval/{stage}/sampled/graded.jsonl"), rows)
    check_stage(word, "", read(run / "eval/rl/forbid_again/graded.jsonl"), rows)
    assert word["image_accuracy_sampled"] is word["intervals"]["image_accuracy_sampled"] is None


def rate_of(right, n, times=1):
    records = [{"id": i} for i in range(n)] * times
    return report.share(records, lambda record: record["id"] < right)


def test_the_ends_of_an_interval_are_the_shares_that_the_score_test_just_accepts():
    """Wilson's interval by its definition, |p - end| = z sqrt(end (1 - end) / n). Ten identical
    samples a problem say no more than one, ten independent ones nearly ten times as much."""
    for right, n in ((0, 9), (3, 40), (20, 40), (40, 40)):
        for rate in (rate_of(right, n), rate_of(right, n, times=10)):
            for end in (rate.low, rate.high):
                width = 1.96 * math.sqrt(end * (1 - end) / n)
                assert abs(rate.value - end) == pytest.approx(width, abs=1e-9)
    draw, one = np.random.default_rng(0), rate_of(20, 60)
    mixed = [{"id": i, "right": draw.random() < 1 / 3} for i in range(60) for _ in range(10)]
    free = report.share(mixed, lambda record: record["right"])
    assert (free.high - free.low) / (one.high - one.low) == pytest.approx(10**-0.5, rel=0.25)


def test_two_rates_differ_where_newcombe_says_so():
    """His first example, 56 of 70 against 48 of 80: 0.2, and its interval begins at 0.0524."""
    high, low = rate_of(56, 70), rate_of(48, 80)
    edge = high.value - low.value - math.hypot(high.value - high.low, low.high - low.value)
    assert edge == pytest.approx(0.0524, abs=1e-4)
    assert high.above(low) and not low.above(high) and not rate_of(6, 10).above(rate_of(4, 10))
    assert not report.Rate().above(low) and not high.above(report.Rate())


# ---- claims


@pytest.mark.parametrize("ends", [(0.4, 0.1, 0.9), (0.4, 0.1, 0.1), (0.1, 0.1, 0.9), (0.3,) * 3])
def test_a_fall_before_the_rise_is_claimed_only_where_the_curve_has_both(tmp_path, ends):
    noise, shape = random.Random(1), np.interp(range(60), (0, 20, 59), ends)
    rows = [{"step": i, "seconds": 1.0, "x": v + noise.gauss(0, 0.03)} for i, v in enumerate(shape)]
    write(tmp_path / "rl/run.json", [{"config": {}}])
    write(tmp_path / "rl/metrics.jsonl", rows)
    found = report.claim(report.read_run(tmp_path), "dips", ["rl"], ["x"], "")
    assert found["holds"] == (ends == (0.4, 0.1, 0.9))


def test_a_claim_holds_where_the_rates_go_its_way_and_is_open_where_one_is_missing(run):
    there, path = report.read_run(run), ["groups.smudged_picture.check_sampled"]

    def holds(*stages):
        ways = ("rises", "falls", "stays")
        return [report.claim(there, way, stages, path, "")["holds"] for way in ways]

    assert holds("base", "rl") == [True, False, False] and holds("base", "rl_grpo") == [None] * 3
    assert holds("rl", "base") == [False, True, False]
    assert holds("base", "rl_without_coldstart") == [False, False, True]


# ---- the page


def test_the_page_is_one_file_with_every_section_and_its_figures(page):
    assert not re.search(r"https?://|<script|<link|@import|src=\"(?!data:)", page.text)
    sections = [about["id"] for tag, about in page.tags if tag == "section"]
    assert sections == "stages figure-3 insights figure-5 table-4 examples tokens".split()
    assert page.text.count("<svg") == 1 + 3 + 3 * 3 + 3 and "NaN" not in page.text
    ids = re.findall(r'<clipPath id="([^"]*)"', page.text)
    assert ids and len(ids) == len(set(ids))  # figures share a page, and must not share clip paths
    assert page.text.count("data:image/webp;base64,") >= 4


def test_the_table_and_the_headline_show_the_numbers_of_the_results(page):
    cells = [(group, "accuracy") for group in GROUPS]
    cells += [(GROUPS[0], name) for name in ("check", "second_look_where_wrong", "useless")]
    found = page.results["stages"] | {"forbid_again": page.results["forbid"]["again"]}
    for stage, rates in found.items():
        words = [report.name_of(stage), report.STAGES[stage][1]]
        for group, name in cells:
            for key in (name, f"{name}_sampled"):
                rate = rates["groups"][group].get(key)
                if rate is not None:
                    ends = rates["intervals"]["groups"][group][key]
                    words += [f"{100 * rate:.0f}", "–".join(f"{100 * end:.0f}" for end in ends)]
                words += ["n/a"] if rate is None and key == name else []
        assert page.row_of(words[0]) == " ".join(words)
    said = re.search(r"<h1>(.*?)</h1>", page.text, re.DOTALL)[1]
    solved = [found[stage]["groups"][GROUPS[0]]["accuracy"] for stage in (*MAIN, "forbid_again")]
    assert re.findall(r"(\d+) % (?!checked)", said) == [f"{100 * rate:.0f}" for rate in solved]


@pytest.mark.parametrize("stages", [MAIN, ("base",), ("mine", "rl")])
def test_what_was_not_run_is_said_and_survived(tmp_path, stages, monkeypatch, no_charts):
    monkeypatch.setitem(STAGES, "mine", STAGES["rl"])
    page = Page(fake_run(tmp_path, steps=12, stages=stages))
    assert {*page.results["stages"]} == {*stages} and "NaN" not in page.text
    for stage in report.STAGES:
        lost = "not in this run" in page.row_of(report.name_of(stage))
        assert lost == (stage not in stages), stage
    assert "mine" not in stages or page.row_of("mine")


def test_a_run_without_groups_or_without_evaluation_is_reported_too(tmp_path, no_charts):
    """As a 7B run is, whose rows have no groups, and any run in its first minutes."""
    rows = read(fake_run(tmp_path) / "data/test.jsonl")
    keys = ("id", "prompt", "images", "answer")
    write(tmp_path / "data/test.jsonl", [{key: row[key] for key in keys} for row in rows])
    page = Page(tmp_path)
    accuracy = page.results["stages"]["rl"]["image_accuracy"]
    assert re.search(
        rf"Picture problems solved:.* {100 * accuracy:.0f} % after RL", page.text, re.S
    )
    shutil.rmtree(tmp_path / "eval")
    assert "no stage has been evaluated yet" in Page(tmp_path).text
    with pytest.raises(SystemExit, match="nothing to report"):
        report.main(report.Config(tmp_path / "data"))


def test_hostile_text_is_text_alone(tmp_path, no_charts):
    """Prompts, ids, answers, replies and tokens that break out change no tag of the page."""

    def page_of(folder, text, tokens):
        run = fake_run(folder, stages=MAIN)
        for file in (run / "eval").glob("*/*/graded.jsonl"):
            rows = [r | {"response": r["response"] + text, "extracted": text} for r in read(file)]
            write(file, rows)
        said = {"status": text, "prompt": text, "answer": text}
        write(run / "data/test.jsonl", [row | said for row in read(run / "data/test.jsonl")])
        write(run / "rl/trace.jsonl", [rollout(0, k, 1.0, tokens, text, **said) for k in range(2)])
        return Page(run).tags

    bad = page_of(tmp_path / "bad", " ".join(HOSTILE), HOSTILE)
    plain = page_of(tmp_path / "plain", "a", ["a"] * len(HOSTILE))
    names = [[(tag, sorted(about)) for tag, about in tags] for tags in (bad, plain)]
    assert names[0] == names[1] and ("span", {"data-is", "style", "tabindex"}) in [
        (tag, {*about}) for tag, about in names[0]
    ]


# ---- examples and tokens


def test_examples_are_of_the_kinds_that_they_say(run):
    found = report.examples(report.read_run(run))
    assert len(found) >= 3 and {example["kind"] for example in found} <= {*report.EXAMPLES}
    for example in found:
        last = example["answers"]["rl"]
        scores = [answer["score"] == 1 for answer in example["answers"].values()]
        look = re.search(example["problem"]["watch"]["second_look"], last["response"])
        kind = "Repaired by a second look" if look else "Learned"
        kind = "Always right" if all(scores) else kind if scores[-1] else "Wrong at the end"
        assert [*example["answers"]] == [*MAIN] and example["kind"] == kind


def tokens_of(page):
    """Of each token on the page its place, log p, value and advantage, as the reader sees them."""
    shown = [about["data-is"] for _, about in page.tags if "data-is" in about]
    return [re.findall(r"(?:token|log p|value V|advantage) (\S+)", text) for text in shown]


def test_the_tokens_are_those_of_a_second_look_that_made_the_difference(tmp_path, no_charts):
    """In step 3 one sample looked again and one did not; in step 4 both did; then rewards differ
    and nobody looked; in step 6 looks are not what the row watches for."""
    run, watch = fake_run(tmp_path, stages=("rl",)), {"wrong_first": "B 3", "second_look": "again"}
    write(run / "data/train.jsonl", [{"id": "train-0", "watch": watch}, {"id": "train-1"}])
    looks, does_not = "B 3 again B 5".split(), "B 3 so 5".split()
    rows = [rollout(step, 0, 0.0, does_not) for step in (0, 1, 2, 3, 5)]
    rows += [rollout(step, 1, float(step != 2), looks) for step in (2, 3, 4)]
    rows += [rollout(4, 0, 0.0, looks), rollout(5, 1, 1.0, does_not)]
    rows += [rollout(6, k, float(k), looks, "train-1") for k in range(2)]
    for hidden, step in ((), 3), ((3,), 4), ((3, 4), 6), ((3, 4, 6), 5), ((2, 3, 4, 5, 6), 1):
        kept = [row for row in rows if row["step"] not in hidden]
        write(run / "rl/trace.jsonl", kept)
        numbers = []
        for row in (row for row in kept if row["step"] == step):
            columns = zip(row["logps"], row["values"], row["advantages"], strict=True)
            numbers += [[str(x) for x in (i, *of)] for i, of in enumerate(columns, 1)]
        assert tokens_of(Page(run)) == numbers
    write(run / "rl/trace.jsonl", rows)
    report.main(report.Config(run, step=2))
    assert "Step 2:" in (run / "report.html").read_text()
    with pytest.raises(ValueError, match="--step 31 is not in .*trace.jsonl"):
        report.main(report.Config(run, step=31))


def test_long_responses_are_cut_grpo_has_no_values_and_a_broken_line_is_named(
    tmp_path, monkeypatch, no_charts
):
    monkeypatch.setattr(report, "END", 3)
    run = fake_run(tmp_path, problems=1, stages=("rl",))
    files = [str(run / "data/images/0.png"), "gone.png"]
    write(run / "rl/trace.jsonl", [rollout(0, 0, 1.0, [*"abcdefghij"], values=None, images=files)])
    page = Page(run)
    pictures = [about["src"] for tag, about in page.tags if tag == "img"]
    small = Image.open(io.BytesIO(base64.b64decode(pictures[-1].split(",")[1])))
    assert "gone.png is not there" in page.text and small.size == (84, 140)
    assert [place for place, *_ in tokens_of(page)] == ["1", "2", "3", "8", "9", "10"]
    assert {value for _, _, value, _ in tokens_of(page)} == {"none"}
    assert "4 tokens left out" in page.text
    for line in (b'{"step": 3', b"\xff"):
        with (run / "rl/trace.jsonl").open("ab") as file:
            file.write(line + b"\n")
        with pytest.raises(ValueError, match="trace.jsonl, line 2: .*delete this line"):
            report.main(report.Config(run))
