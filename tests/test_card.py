"""card.py on small made-up chains of files: what it must count and say, and what must not run."""

import json
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from html import unescape
from pathlib import Path

import pytest
from conftest import write_rows
from PIL import Image

from common import log
from curation import card

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Made:
    """The settings of a step, as its report keeps them."""

    rows: tuple[str, ...] = ()
    out: str = ""
    benchmarks: tuple[str, ...] = ()
    losses: tuple[str, ...] = ()
    passes: tuple[str, ...] = ()
    kind: str = "sft"


def a_row(i: int, **changes) -> dict:
    rng = random.Random(i)
    row = {"id": f"row-{i}", "source": f"set/{'abc'[i % 3]}", "prompt": f"What is {i} + 1?"}
    row |= {"images": [], "answer": str(i + 1), "level": i % 4}
    row["response"] = f"<think>{'so ' * rng.randint(5, 90)}</think>\\boxed{{{i + 1}}}"
    origin = {"set": "hub/set", "split": "train", "index": i, "license": "MIT"}
    return row | {"origin": origin} | changes


def step_of(rows: list[dict], kept: list[dict], reason: str = "near") -> dict:
    """What write_report takes of one step: {source: {"in", "kept", "reasons"}}."""
    old, new = (Counter(row["source"] for row in side) for side in (rows, kept))
    return {
        source: {"in": n, "kept": new[source], "reasons": {reason: n - new[source]}}
        for source, n in old.items()
    }


@pytest.fixture
def chain(tmp_path) -> Path:
    """raw.jsonl (90 rows read, 80 kept) -> sft.jsonl (60), with all that curate.py leaves."""
    rows = [a_row(i) for i in range(90)]
    raw, out = tmp_path / "raw.jsonl", tmp_path / "made" / "sft.jsonl"
    out.parent.mkdir()
    write_rows(raw, rows[:80])
    settings = Made(out=str(raw))
    log.write_report(raw, settings, [], {"read": step_of(rows, rows[:80], "no_answer")})
    write_rows(out, rows[:60])
    gone = [
        {"id": row["id"], "step": "rules", "reason": "near", "detail": f"as {row['id']}<b>"}
        for row in rows[60:80]
    ]
    write_rows(log.beside(out, "dropped.jsonl"), gone)
    tests = write_rows(tmp_path / "bench.jsonl", [{"id": "math_1", "prompt": "x"}])
    losses = write_rows(tmp_path / "sft.losses.jsonl", [{"id": "row-3", "loss": 1.25}])
    pairs = [
        {"id": f"row-{i}", "benchmark_id": f"{'math' if i % 3 else 'chart/qa'}_{i}", "score": 0.75}
        for i in range(70)
    ]
    contaminated = log.beside(out, "contaminated.jsonl")
    write_rows(contaminated, [pair | {"kind": "text"} for pair in pairs])
    settings = Made((str(raw),), str(out), (tests,), (losses,))
    levels = Counter((row["source"], row["level"]) for row in rows[:80])
    left = Counter((row["source"], row["level"]) for row in rows[:60])
    strata = {
        f"{source} / {level} / number": {"in": n, "kept": left[source, level]}
        for (source, level), n in levels.items()
    }
    drawn = {"edges": [0.5, 1.0, 1.5], "counts": [20, 60]}
    about = {"median": 1.1, "low": float("-inf"), "high": 4.5, "histogram": drawn}
    log.write_report(
        out,
        settings,
        [raw, tests, losses],
        {"rules": step_of(rows[:80], rows[:60])},
        why={"near": "A row above asks nearly the same."},
        strata=strata,
        losses={"set/a": about},
        passes={"set/a": [5, 9, 2]},
    )
    return out


def made(out: Path, **settings) -> str:
    card.main(card.Config(str(out), **settings))
    return log.beside(out, "card.html").read_text()


def cells(page: str) -> list[list[str]]:
    """Every line of every table as text."""
    lines = re.findall(r"<tr>(.*?)</tr>", page, flags=re.S)
    parts = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line, flags=re.S) for line in lines]
    plain = lambda cell: unescape(re.sub(r"<[^>]+>", "", cell)).replace("\xa0", " ")  # noqa: E731
    return [[plain(cell) for cell in line] for line in parts]


def edit_report(out: Path, change) -> None:
    path = log.beside(out, "report.json")
    report = json.loads(path.read_text())
    change(report)
    path.write_text(json.dumps(report))


def test_the_counts_are_those_of_a_naive_count(chain):
    lines, rows = cells(made(chain)), [json.loads(line) for line in chain.open()]
    for name in ("source", "level"):
        for value, n in Counter(str(row[name]) for row in rows).items():
            assert [value, f"{n} {n / 0.6:.3g} %"] in lines
    for value in ("number", "hub/set", "MIT"):
        assert [value, "60 100 %"] in lines
    assert "<b>60</b> SFT rows of 3 sources, 0 with pictures" in made(chain)


def test_the_funnel_goes_from_the_source_to_the_file(chain):
    page = made(chain)
    lines = cells(page)
    assert ["source", "rows", "read", "rules"] in lines
    assert ["set/a", "30", "27 90 %", "20 66.7 %"] in lines
    assert ["all", "90", "80 88.9 %", "60 66.7 %"] in lines
    assert ["read", "no answer", "10", ""] in lines
    assert ["rules", "near", "20", "A row above asks nearly the same."] in lines
    assert "Nothing contradicts" in page


def test_rows_that_went_without_a_reason_are_shown_in_red_and_on_the_screen(chain, capsys):
    edit_report(chain, lambda report: report["steps"]["rules"]["set/a"]["reasons"].update(near=5))
    page = made(chain)
    said = "sft.jsonl, step rules, source set/a: 27 rows in, but 20 kept and 5 with a reason"
    assert f"<p>{said}</p>" in page and 'class="insight no"' in page
    assert f"WRONG: {said}" in capsys.readouterr().out


def test_a_file_that_changed_after_its_report_is_named(chain):
    with chain.open("a") as file:
        file.write(json.dumps(a_row(500)) + "\n")
        file.write(json.dumps(a_row(501, source="other")) + "\n")
    page = made(chain)
    assert "sft.jsonl is not the file that its report describes" in page
    assert "set/c: 21 rows, but the report says 20 were kept" in page
    assert "other: 1 rows, but the report says 0 were kept" in page


def test_a_circle_of_reports_ends_and_a_file_reached_twice_is_followed_once(chain):
    raw = chain.parent.parent / "raw.jsonl"
    again = {"made/sft.jsonl": "sha256 0"}
    edit_report(raw, lambda report: report.update(inputs=again, config={"rows": ["sft.jsonl"]}))
    files = {}
    card.follow(chain.resolve(), files)
    assert [path.name for path in files] == ["raw.jsonl", "sft.jsonl"]
    assert ["set/a", "30", "27 90 %", "20 66.7 %"] in cells(made(chain))


@pytest.mark.parametrize("name", ["sft.losses.jsonl", "bench.jsonl"])
def test_scores_and_benchmarks_are_no_part_of_the_funnel(chain, name):
    """Nor what they were made from: one curates, scores what stays, and curates the same again."""
    path = chain.parent.parent / name
    cell = {"in": 7, "kept": 7, "reasons": {}}
    settings = Made((str(chain),), str(path))
    log.write_report(path, settings, [chain], {"score": {"set/a": cell}})
    lines = cells(made(chain))
    assert ["source", "rows", "read", "rules"] in lines
    assert ["set/a", "30", "27 90 %", "20 66.7 %"] in lines


def test_sets_that_went_different_ways_meet_in_the_funnel(tmp_path):
    a, b = ([a_row(i, source=name) for i in range(10)] for name in ("a", "b"))
    place = {name: tmp_path / f"{name}.jsonl" for name in ("a", "b", "solved", "both")}

    def step(name, rows, kept, step, *inputs):
        write_rows(place[name], kept)
        settings = Made(tuple(str(place[one]) for one in inputs), str(place[name]))
        steps = {step: step_of(rows, kept)}
        log.write_report(place[name], settings, [place[one] for one in inputs], steps)

    step("a", a, a[:8], "read")
    step("b", b, b[:9], "read")
    step("solved", a[:8], a[:4], "rules", "a")
    step("both", a[:4] + b[:9], a[:1] + b[:5], "rules", "solved", "b")
    page = made(place["both"])
    lines = cells(page)
    assert ["source", "rows", "read", "rules", "rules"] in lines
    assert ["a", "10", "8 80 %", "4 40 %", "1 10 %"] in lines
    assert ["b", "10", "9 90 %", "·", "5 50 %"] in lines
    assert ["all", "20", "17 85 %", "13 65 %", "6 30 %"] in lines
    assert "Nothing contradicts" in page


def test_a_step_that_makes_several_rows_of_one_counts_them(chain):
    """27 rows of 9 problems that were kept, of 10."""
    more = {"in": 10, "kept": 9, "rows": 27, "reasons": {"no_answer": 1}}
    edit_report(
        chain.parent.parent / "raw.jsonl",
        lambda report: report["steps"]["read"].update({"set/a": more}),
    )
    last = {"in": 27, "kept": 10, "rows": 20, "reasons": {"near": 17}}
    edit_report(chain, lambda report: report["steps"]["rules"].update({"set/a": last}))
    page = made(chain)
    assert ["set/a", "10", "27 270 %", "20 200 %"] in cells(page) and "Nothing contradicts" in page


def test_what_rows_say_cannot_run(chain):
    evil = '<script>alert(1)</script><img src=x onerror="alert(2)">$x_{\ud800'
    rows = [
        a_row(i, prompt=evil, answer=evil, level=evil, choices=[evil], source=evil, id=f"{i}{evil}")
        for i in range(3)
    ]
    rows = [row | {"response": evil, "origin": {"set": evil, "license": evil}} for row in rows]
    out = chain.parent / "evil.jsonl"
    write_rows(out, rows)
    write_rows(
        log.beside(out, "dropped.jsonl"),
        [dict.fromkeys(("id", "step", "reason", "detail"), evil)],
    )
    page = made(out)
    assert "<script" not in page and "<img" not in page
    assert page.count("&lt;script&gt;") > 20


def test_the_page_stands_alone(chain):
    picture = Image.effect_noise((900, 700), 80)
    picture.save(chain.parent / "p.png")
    rows = [a_row(i, images=["p.png"], prompt="<image> see http://a.b/c.js") for i in range(3)]
    page = made(Path(write_rows(chain.parent / "shown.jsonl", rows)))
    assert "<script" not in page and "<link" not in page and "@import" not in page
    sources = re.findall(r'(?:src|href|url|action)\s*[=(]\s*"?([^">)]{1,9})', page)
    assert sources and all(source.startswith(("data:", "#")) for source in sources)
    assert page.count('src="data:image/webp') == 3 and len(page) < 1_000_000


def test_a_picture_is_scaled_to_the_page(tmp_path):
    import base64
    import io

    Image.new("RGB", (2000, 1000), "red").save(tmp_path / "p.png")
    data = re.search('base64,([^"]*)', card.picture(tmp_path / "p.png", "p.png"))[1]
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (480, 240)


def test_pictures_that_are_gone_are_counted_and_said(chain):
    (chain.parent / "torn.png").write_bytes(b"\x89PNG no")
    rows = [a_row(1, images=["gone.png"]), a_row(4, images=["torn.png"])]
    page = made(Path(write_rows(chain.parent / "lost.jsonl", rows)))
    assert "set/b: 2 pictures cannot be opened" in page
    assert "gone.png cannot be shown" in page and "torn.png cannot be shown" in page


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_rows(chain):
    pages = []
    for seed in (0, 0, 1):
        code = f"from curation import card; card.main(card.Config({str(chain)!r}, seed={seed}))"
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
        pages.append(log.beside(chain, "card.html").read_bytes())
    assert pages[0] == pages[1]
    shown = [re.findall(rb"<h3>row-\d+", page) for page in pages]
    assert len(shown[0]) == 10 and shown[0] != shown[2]


def test_every_row_is_equally_likely_to_be_shown():
    counts, size, n = Counter(), 5, 20
    for seed in range(4000):
        chosen, draw = [], random.Random(seed)
        for i in range(n):
            card.keep(chosen, i, i + 1, size, draw)
        counts.update(chosen)
    assert counts.total() == 4000 * size
    assert all(abs(counts[i] - 1000) < 5 * 27.4 for i in range(n))  # sqrt(4000 / 4 * 3 / 4) = 27.4


def test_rows_alone_make_a_page_that_says_what_is_not_known(tmp_path):
    page = made(Path(write_rows(tmp_path / "alone.jsonl", [a_row(i) for i in range(5)])))
    assert "No report of alone.jsonl names a step" in page and "Nothing contradicts" not in page
    assert "Nobody looked for test questions" in page


def test_an_empty_file_makes_a_page(tmp_path):
    assert "<b>0</b>" in made(Path(write_rows(tmp_path / "empty.jsonl", [])))


def test_a_row_that_no_stage_can_read_stops_with_its_line(tmp_path):
    for wrong in ("{", "[1]", json.dumps(a_row(1, images=7)), '{"id": 1}'):
        (tmp_path / "some.jsonl").write_text(f"{json.dumps(a_row(0))}\n\n{wrong}\n")
        with pytest.raises(ValueError, match="some.jsonl, line 3: "):
            made(tmp_path / "some.jsonl")


def test_a_thought_is_folded_and_what_follows_is_not(chain):
    rows = [a_row(1), a_row(2, response="no <think> closes"), a_row(3)]
    page = made(Path(write_rows(chain.parent / "some.jsonl", rows)))
    assert len(re.findall(r"<details><summary>The thought, [\d,]+ characters<", page)) == 2
    assert "&lt;/think&gt;</p></details>" in page and '<p class="text">\\boxed{2}</p>' in page
    assert '<p class="text">no &lt;think&gt; closes</p>' in page


def test_the_first_contaminated_pairs_are_listed(chain):
    lines = cells(made(chain))
    assert ["row-49", "math_49", "text", "0.75"] in lines
    assert not [line for line in lines if line[0] == "row-50" and "0.75" in line]


def test_no_benchmark_is_said_plainly(chain):
    edit_report(chain, lambda report: report["config"].update(benchmarks=[]))
    assert "Nobody looked for test questions" in made(chain)


def test_dropped_rows_of_rare_reasons_are_seen(chain):
    rows = [{"id": str(i), "step": "rules", "reason": "near", "detail": ""} for i in range(500)]
    rows.insert(100, {"id": "rare", "step": "rules", "reason": "leak", "detail": "Answer: 42"})
    write_rows(log.beside(chain, "dropped.jsonl"), rows)
    text = card.dropped_section(card.Config(str(chain), examples=4))
    assert "501 in all" in text and len(cells(text)) == 1 + 4
    assert ["rare", "rules", "leak", "Answer: 42"] in cells(text)


def test_every_file_of_the_chain_stands_with_its_hash(chain):
    losses = chain.parent.parent / "sft.losses.jsonl"
    log.write_report(losses, Made((str(chain),), str(losses)), [chain], {})
    lines = {line[0]: line for line in cells(made(chain)) if len(line) == 4}
    for name in ("sft.jsonl", "../raw.jsonl", "../bench.jsonl", "../sft.losses.jsonl"):
        sha = re.search(r"sha256 (\w+)", log.fingerprint(chain.parent / name))[0]
        assert lines[name][2].startswith(sha)
    assert lines["../bench.jsonl"][1] == "no report"
    assert lines["../sft.losses.jsonl"][1] == log.command_line()


def test_lengths_fall_into_their_bins(tmp_path):
    rows = [a_row(i, prompt="the sum " * (i + 1)) for i in range(9)]
    naive = Counter()
    for i in range(9):
        naive[max(q for q in range(99) if 2 ** (q / 4) <= 8 * (i + 1) + 1e-9)] += 1
    path = write_rows(tmp_path / "some.jsonl", rows)
    assert card.tally(card.Config(path)).bins["prompt"] == naive


def test_losses_stand_with_their_bounds_and_pass_rates_are_summed(chain, monkeypatch):
    drawn = {}
    monkeypatch.setattr(card, "histogram", lambda title, *said: drawn.update({title: said}) or "")
    edit_report(chain, lambda report: report["passes"].update({"set/b": [1, 0, 3]}))
    made(chain)
    counts, edges = drawn["Tries that were right"][1:3]
    assert counts == [6, 9, 5] and edges == [-0.5, 0.5, 1.5, 2.5]
    note, counts, *_, bounds = drawn["Loss: set/a"]
    assert counts == [20, 60] and bounds == (float("-inf"), 4.5) and "4.5 is normal" in note


def test_the_page_is_made_without_torch():
    code = "import sys; from curation import card; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
