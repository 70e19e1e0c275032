"""The gallery against naive counts, hostile replies, and a browser where there is one."""

import base64
import io
import random
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import write_rows
from PIL import Image

from evaluation import behaviors, gallery

HOSTILE = '</script><script>alert(1)</script><img src=x onerror=alert(1)>"\' onload="x" <!-- {$css}'
THOUGHT = (
    "<think>Let me look at the image again. It is 3.\n\nLet me double-check.</think>So \\boxed{3}"
)
STATUSES = ("ok", "ok", "ok", "truncated", "unparsed", "refused", "empty")


class Page(HTMLParser):
    """Every element as a namespace, in order: tag, attrs, text inside it, elements around it."""

    def __init__(self, html: str):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(html)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        element = SimpleNamespace(tag=tag, attrs=dict(attrs), text="", around=list(self.open))
        self.elements.append(element)
        if tag not in ("meta", "img", "input"):
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        for element in self.open:
            element.text += data

    def all(self, tag: str, **attrs: str) -> list:
        found = [element for element in self.elements if element.tag == tag]
        return [e for e in found if all(e.attrs.get(key) == attrs[key] for key in attrs)]


def item(i: int, **more) -> dict:
    row = {"id": f"b/{i}", "source": "b", "prompt": "asked", "question": f"how many {i}?"}
    return row | {"answer": "3", "category": f"kind {i % 3}"} | more


def graded(i: int, response: str = THOUGHT, **more) -> dict:
    row = {"id": f"b/{i}", "sample": 0, "response": response, "finish": "stop", "tokens": 7}
    row |= {"score": 1.0, "status": "ok", "extracted": "3", "rule": "box"} | more
    return row | {"spans": behaviors.find_in_thought(row["response"], "")}


def many(count: int) -> list[dict]:
    draw = random.Random(1)
    rows = [graded(i, status=draw.choice(STATUSES)) for i in range(count)]
    for row in rows:
        row["score"] = draw.choice([0.0, 1.0, None]) if row["status"] == "ok" else 0.0
    return rows


def shown(rows, items, folder=Path("."), draws=(500, 0)) -> Page:
    return Page(gallery.page(rows, items, "title", {"k": 1}, folder, draws))


def outcome(row: dict) -> str:
    said = {0.0: "wrong", 1.0: "right", None: "ungraded"}
    return row["status"] if row["status"] != "ok" else said[row["score"]]


def test_the_numbers_are_those_of_a_naive_count():
    rows, items = many(90), [item(i) for i in range(90)]
    page, counts = shown(rows, items), Counter(map(outcome, rows))
    (numbers,) = page.all("p", **{"class": "numbers"})
    assert dict(re.findall(r"([a-z]+) (\d+)", numbers.text)) == {k: str(counts[k]) for k in counts}
    categories = Counter(each["category"] for each in items)
    for name, naive in (("status", counts), ("category", categories)):
        (select,) = page.all("select", name=name)
        options = [e for e in page.all("option") if select in e.around and e.attrs["value"]]
        texts = {e.attrs["value"]: e.text for e in options}
        assert texts == {value: f"{value} ({n})" for value, n in naive.items()}
        assert Counter(card.attrs[f"data-{name}"] for card in page.all("article")) == naive


def test_hostile_texts_are_inert():
    bad = item(0, question=HOSTILE, category=HOSTILE, choices=[HOSTILE], images=[HOSTILE])
    bad |= {"answer": HOSTILE, "id": HOSTILE}
    row = graded(0, f"<think>{HOSTILE}</think>{HOSTILE}\ud800", id=HOSTILE, extracted=HOSTILE)
    rows = [row | {"rule": HOSTILE}, graded(1, HOSTILE, id=HOSTILE)]
    text = gallery.page(rows, [bad], HOSTILE, {HOSTILE: HOSTILE}, Path("."))
    page, plain = Page(text), shown([graded(0)], [item(0, choices=["x"])])
    extra = {e.tag for e in page.elements} - {e.tag for e in plain.elements}
    assert not extra and len(page.all("script")) == 1
    assert page.all("script")[0].text == plain.all("script")[0].text
    assert not [a for e in page.elements for a in e.attrs if a.startswith("on")]
    assert page.all("h1")[0].text == HOSTILE and "<!--" not in text
    assert sum(HOSTILE in e.text for e in page.all("article")) == 2


def test_the_page_has_no_address_and_allows_only_its_own_script(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    page = shown([graded(0)], [item(0, images=["a.png"])], tmp_path)
    names = ("src", "href", "action", "srcset", "data", "poster")
    used = [e.attrs[name] for e in page.elements for name in names if name in e.attrs]
    assert len(used) == 1 and used[0].startswith("data:image/webp;base64,")
    assert not re.search(r"url\(|@import|https?:", page.all("style")[0].text)
    (policy,) = (e.attrs["content"] for e in page.all("meta") if "http-equiv" in e.attrs)
    nonce, again = page.all("script")[0].attrs["nonce"], shown([graded(0)], [item(0)])
    parts = "default-src 'none'", "img-src data:", "style-src 'unsafe-inline'"
    assert policy.split("; ") == [*parts, f"script-src 'nonce-{nonce}'"]
    assert len(nonce) > 20 and nonce != again.all("script")[0].attrs["nonce"]


def test_each_picture_is_stored_once_and_small_and_one_that_is_missing_is_named(tmp_path):
    Image.effect_noise((1500, 900), 50).save(tmp_path / "a.png")
    shutil.copy(tmp_path / "a.png", tmp_path / "same.png")
    Image.new("RGBA", (20, 20), (1, 2, 3, 0)).save(tmp_path / "b.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing")
    items = [item(0, images=["a.png", "b.png"]), item(1, images=["same.png"])]
    items += [item(2, images=["gone.png", "broken.png"])]
    rows = [graded(0, sample=s) for s in range(3)] + [graded(1), graded(2)]
    page = shown(rows, items, tmp_path)
    first = {e.attrs["id"]: e.attrs["src"] for e in page.all("img") if "src" in e.attrs}
    later = Counter(e.attrs["data-same"] for e in page.all("img") if "src" not in e.attrs)
    (a, source), (b, other) = first.items()
    assert source != other and later == {a: 3, b: 2}
    assert Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).size == (480, 288)
    last = page.all("article")[-1].text
    assert "gone.png cannot be shown" in last and "broken.png cannot be shown" in last


def test_a_draw_is_seeded_ordered_and_said():
    rows = [graded(i) for i in range(400)]
    drawn = gallery.draw(rows, 60, 0)
    assert len(drawn) == 60 and [row for row in rows if row in drawn] == drawn
    assert drawn == gallery.draw(rows, 60, 0) != gallery.draw(rows, 60, 1)
    page = shown(rows, [item(i) for i in range(400)], draws=(60, 5))
    (note,) = page.all("p", **{"class": "note"})
    assert note.text.startswith("60 of 400 replies, drawn by seed 5")
    assert len(page.all("article")) == 60
    whole = shown(rows, [item(i) for i in range(400)], draws=(400, 0))
    assert len(whole.all("article")) == 400 and not whole.all("p", **{"class": "note"})


@pytest.mark.parametrize(
    "text",
    [
        THOUGHT,
        "Wait, that is wrong. Let me verify & check <b>. \n Let me re-examine the image.\n</think>",
        "<think>First, I need x. Let me recheck the figure, then",
    ],
)
def test_highlights_stand_at_the_spans_of_the_row(text):
    row = graded(0, text)
    page, naive = shown([row], [item(0)]), {}  # sentence -> names
    for name, start, end in row["spans"]:
        naive.setdefault(text[start:end], []).append(name.replace("_", " "))
    marks = [e for e in page.all("mark") if any(a.tag == "article" for a in e.around)]
    assert naive and {e.text: e.attrs["title"].split(", ") for e in marks} == naive
    (card,) = page.all("article")
    assert set(card.attrs["data-behaviour"].split("\n")) == {name for name, *_ in row["spans"]}


def test_the_thought_is_folded_and_the_answer_is_not():
    for response, thought, answer in (
        (THOUGHT, THOUGHT[len("<think>") : THOUGHT.rindex("</think>")], "So \\boxed{3}"),
        ("a</think> b</think>\n\nc", "a</think> b", "c"),
        ("<think>never done", "never done", "no answer"),
        ("just 3", None, "just 3"),
        ("", None, "no answer"),
    ):
        page = shown([graded(0, response)], [item(0)])
        folded = [e.text for e in page.all("p") if any(a.tag == "details" for a in e.around)]
        assert folded == ([thought] if thought else [])
        (right,) = (e for e in page.all("div") if "rule: box" in e.text)
        assert [e.text for e in page.all("p") if e.around[-1] is right] == [answer]


def test_options_gold_judge_and_facts_stand_on_the_card():
    row = graded(0, score=0.0, extracted="C", judge_score=1.0)
    choice = item(0, choices=["red", "green", "blue"], answer="B")
    page = shown([row], [choice])
    for part in ("A red", "Gold B", "says C", "judge: right", "7 tokens", "kind 0"):
        assert part in page.all("article")[0].text
    looks = {e.text: e.attrs["class"] for e in page.all("li")}
    assert looks == {"A red": "", "B green": "gold", "C blue": "said"}
    (card,) = shown([graded(0, judge_score=None, extracted=None, tokens=None)], [choice]).all(
        "article"
    )
    for part in ("judge: ungraded", "nothing was read", "not counted tokens"):
        assert part in card.text


def test_a_browser_filters_by_the_address_and_runs_nothing_else(tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no chromium on this machine")
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    rows, items = many(60), [item(i, images=["a.png"]) for i in range(60)]
    rows[0]["response"] += "<script>document.title = 'broken'</script>"
    text = gallery.page(rows, items, "b", {}, tmp_path)
    (tmp_path / "gallery.html").write_text(text)
    address = f"file://{tmp_path}/gallery.html#status=wrong&category=kind 1&text=how MANY"
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom", address]
    command.insert(1, f"--user-data-dir={tmp_path / 'profile'}")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    page = Page(done.stdout)
    pairs = zip(rows, items, strict=True)
    wanted = [
        row["id"] for row, of in pairs if (outcome(row), of["category"]) == ("wrong", "kind 1")
    ]
    left = [e for e in page.all("article") if "hidden" not in e.attrs]
    assert wanted and [re.search(r"b/\d+", e.text)[0] for e in left] == wanted
    assert page.all("output")[0].text == f"{len(wanted)} of 60"
    assert page.all("title")[0].text == "b"
    assert all("open" in e.attrs for e in page.all("details"))  # the words may stand in the thought
    assert len(page.all("img")) == 60 and len({e.attrs["src"] for e in page.all("img")}) == 1


def test_the_command_reads_the_summary_and_names_what_is_missing(tmp_path, capsys):
    write_rows(tmp_path / "items.jsonl", [item(0)])
    write_rows(tmp_path / "graded.jsonl", [graded(0), graded(0, sample=1)])
    with pytest.raises(FileNotFoundError, match="no summary.json in it"):
        gallery.Config(run=str(tmp_path))
    score = {"score": 0.5, "error": 0.1, "low": 0.25, "high": 0.75}
    summary = {"headline": {"accuracy": score}, "scale": 100, "protocol": {"model": "m", "k": 2}}
    write_rows(tmp_path / "summary.json", [summary])
    gallery.main(gallery.Config(run=str(tmp_path), out=str(tmp_path / "x.html"), limit=1))
    page = Page((tmp_path / "x.html").read_text())
    assert page.all("h1")[0].text == "b, accuracy 50.0 (25.0 to 75.0)"
    assert page.all("p", **{"class": "facts"})[0].text == "model m · k 2"
    assert capsys.readouterr().out == f"{tmp_path / 'x.html'}: 1 of 2 replies\n"
