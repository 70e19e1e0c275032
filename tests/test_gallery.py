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
from PIL import Image

from evaluation import behaviors, gallery

HOSTILE = '</script><script>alert(1)</script><img src=x onerror=alert(1)>"\' onload="x" <!-- {$css}'
THOUGHT = (
    "<think>Let me look at the image again. It is 3.\n\nLet me double-check.</think>So \\boxed{3}"
)


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
    """Of each outcome some."""
    outcomes = [("ok", 1.0), ("ok", 0.0), ("ok", None), ("truncated", 0.0), ("refused", 0.0)]
    pairs = random.Random(1).choices(outcomes, k=count)
    return [graded(i, status=status, score=score) for i, (status, score) in enumerate(pairs)]


def shown(rows, items, folder=Path("."), **more) -> Page:
    return Page(gallery.page(rows, items, "title", {"k": 1}, folder, **more))


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
        choices = {e.text for e in page.all("option")}
        assert {f"{value} ({n})" for value, n in naive.items()} <= choices
        assert Counter(card.attrs[f"data-{name}"] for card in page.all("article")) == naive


def test_hostile_texts_are_inert():
    bad = item(0, question=HOSTILE, category=HOSTILE, choices=[HOSTILE])
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


def test_the_page_has_small_pictures_no_address_and_allows_only_its_own_script(tmp_path):
    Image.effect_noise((1500, 900), 50).save(tmp_path / "a.png")
    page = shown([graded(0)], [item(0, images=["a.png"])], tmp_path)
    names = ("src", "href", "action", "srcset", "data", "poster")
    (used,) = (e.attrs[name] for e in page.elements for name in names if name in e.attrs)
    kind, content = used.split(",")
    assert kind == "data:image/webp;base64"
    assert Image.open(io.BytesIO(base64.b64decode(content))).size == (480, 288)
    assert not re.search(r"url\(|@import|https?:", page.all("style")[0].text)
    (policy,) = (e.attrs["content"] for e in page.all("meta") if "http-equiv" in e.attrs)
    nonce, again = page.all("script")[0].attrs["nonce"], shown([graded(0)], [item(0)])
    parts = "default-src 'none'", "img-src data:", "style-src 'unsafe-inline'"
    assert policy.split("; ") == [*parts, f"script-src 'nonce-{nonce}'"]
    assert len(nonce) > 20 and nonce != again.all("script")[0].attrs["nonce"]


def test_of_more_replies_the_same_ones_are_drawn_each_time_and_it_is_said():
    rows, items = [graded(i) for i in range(400)], [item(i) for i in range(400)]
    page, again = (shown(rows, items, limit=60) for _ in range(2))
    drawn = [int(re.search(r"b/(\d+)", card.text)[1]) for card in page.all("article")]
    assert len({*drawn}) == 60 and drawn == sorted(drawn) and drawn[-1] > 300
    assert [e.text for e in page.all("article")] == [e.text for e in again.all("article")]
    (note,) = page.all("p", **{"class": "note"})
    assert note.text.startswith("60 of 400 replies")
    assert not shown(rows, items, limit=400).all("p", **{"class": "note"})


def test_highlights_stand_at_the_spans_of_the_row():
    text = "Wait, that is wrong. Let me verify & check <b>. \n Let me look again.\n</think>"
    row, naive = graded(0, text), {}  # sentence -> names
    page = shown([row], [item(0)])
    for name, start, end in row["spans"]:
        naive.setdefault(text[start:end], []).append(name.replace("_", " "))
    assert len(naive) == 3
    assert {e.text: e.attrs["title"].split(", ") for e in page.all("mark")} == naive
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
    row, unread = graded(0, score=0.0, extracted="C", judge_score=1.0), {"extracted": None}
    choice = item(0, choices=["red", "green", "blue"], answer="B")
    page = shown([row, row | unread | {"judge_score": None, "tokens": None}], [choice])
    first, second = (card.text for card in page.all("article"))
    for part in ("A red", "Gold B", "says C", "judge: right", "7 tokens", "kind 0"):
        assert part in first
    for part in ("judge: ungraded", "nothing was read", "not counted tokens"):
        assert part in second
    looks = [e.attrs["class"] for e in page.all("li")]
    assert looks == ["", "gold", "said", "", "gold", ""]


def test_a_browser_filters_by_the_address_and_runs_nothing_else(tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no chromium on this machine")
    rows, items = many(60), [item(i) for i in range(60)]
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
