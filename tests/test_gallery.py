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

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
HOSTILE = '</script><script>alert(1)</script><img src=x onerror=alert(1)>"\' onload="x" <!-- {$css}'
THOUGHT = "<think>Let me look at the image again. It is 3.\n\nLet me check.</think>So \\boxed{3}"


class Page(HTMLParser):
    """elements: each in order, with the text inside it and the elements that it stands in."""

    def __init__(self, html: str):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(html)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        element = SimpleNamespace(tag=tag, attrs=dict(attrs), around=[*self.open], text="")
        self.elements.append(element)
        if tag not in ("meta", "img", "input", "br"):
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        for element in self.open:
            element.text += data

    def all(self, tag: str, kind: str = "") -> list:
        found = [element for element in self.elements if element.tag == tag]
        return [element for element in found if element.attrs.get("class", "").startswith(kind)]


def item(i: int, **more) -> dict:
    row = {"id": f"b/{i}", "source": "b", "prompt": "asked", "question": f"how many {i}?"}
    return row | {"answer": "3", "category": f"kind {i % 3}"} | more


def graded(i: int, response: str = THOUGHT, **more) -> dict:
    row = {"id": f"b/{i}", "sample": 0, "response": response, "finish": "stop", "tokens": 7}
    row |= {"score": 1.0, "status": "ok", "extracted": "3", "rule": "box"} | more
    return row | {"spans": behaviors.find_in_thought(row["response"], "")}


def many(count: int) -> tuple[list[dict], list[dict], list[str]]:
    """Rows, their items, and what came of them: of each outcome some."""
    kinds = {"right": ("ok", 1.0), "wrong": ("ok", 0.0), "ungraded": ("ok", None)}
    kinds |= {"truncated": ("truncated", 0.0), "refused": ("refused", 0.0)}
    outcomes = random.Random(1).choices([*kinds], k=count)
    rows = [graded(i, status=kinds[o][0], score=kinds[o][1]) for i, o in enumerate(outcomes)]
    return rows, [item(i) for i in range(count)], outcomes


def shown(rows, items, folder=Path(".")) -> Page:
    return Page(gallery.page(rows, items, "title", {"k": 1}, folder))


def test_the_numbers_are_those_of_a_naive_count():
    rows, items, outcomes = many(90)
    page, counts = shown(rows, items), Counter(outcomes)
    (numbers,) = page.all("p", "numbers")
    assert dict(re.findall(r"([a-z]+) (\d+)", numbers.text)) == {k: str(counts[k]) for k in counts}
    options = {option.text for option in page.all("option")}
    for name, naive in (("status", counts), ("category", Counter(i["category"] for i in items))):
        assert {f"{value} ({n})" for value, n in naive.items()} <= options
        assert Counter(card.attrs[f"data-{name}"] for card in page.all("article")) == naive


def test_hostile_texts_are_inert():
    bad = item(0, question=HOSTILE, category=HOSTILE, choices=[HOSTILE], answer=HOSTILE, id=HOSTILE)
    row = graded(0, f"<think>{HOSTILE}</think>{HOSTILE}\ud800", id=HOSTILE, extracted=HOSTILE)
    rows = [row | {"rule": HOSTILE}, graded(1, HOSTILE, id=HOSTILE)]
    text = gallery.page(rows, [bad], HOSTILE, {HOSTILE: HOSTILE}, Path("."))
    page, plain = Page(text), shown([graded(0)], [item(0, choices=["x"])])
    assert {e.tag for e in page.elements} <= {e.tag for e in plain.elements}
    assert [e.text for e in page.all("script")] == [e.text for e in plain.all("script")]
    assert not [a for e in page.elements for a in e.attrs if a.startswith("on")]
    assert page.all("h1")[0].text == HOSTILE and "<!--" not in text
    assert sum(HOSTILE in e.text for e in page.all("article")) == 2


def test_the_page_has_small_pictures_no_address_and_allows_only_its_own_script(tmp_path):
    Image.effect_noise((1500, 900), 50).save(tmp_path / "a.png")
    page, again = (shown([graded(0)], [item(0, images=["a.png"])], tmp_path) for _ in range(2))
    names = {"src", "href", "action", "srcset", "data", "poster"}
    [used] = (e.attrs[name] for e in page.elements for name in names & e.attrs.keys())
    content = base64.b64decode(used.removeprefix("data:image/webp;base64,"), validate=True)
    assert Image.open(io.BytesIO(content)).size == (480, 288)
    policy, other = (p.all("meta")[1].attrs["content"] for p in (page, again))
    nonce = page.all("script")[0].attrs["nonce"]
    parts = "default-src 'none'", "img-src data:", "style-src 'unsafe-inline'"
    assert policy.split("; ") == [*parts, f"script-src 'nonce-{nonce}'"]
    assert len(nonce) > 20 and policy != other


def test_of_more_replies_the_same_ones_are_drawn_each_time_and_it_is_said(monkeypatch):
    rows, items = [graded(i) for i in range(100)], [item(i) for i in range(100)]
    monkeypatch.setattr(gallery, "CARDS", 20)
    page, again = (shown(rows, items) for _ in range(2))
    cards = [card.text for card in page.all("article")]
    assert cards == [card.text for card in again.all("article")] and len(cards) == 20
    assert any("b/9" in card for card in cards[-5:])  # of all, in their order
    assert page.all("p", "note")[0].text.startswith("20 of 100 replies")
    assert not shown(rows[:20], items).all("p", "note")


def test_highlights_stand_at_the_spans_of_the_row():
    text = "Wait, that is wrong. Let me verify & check <b>. \n Let me look again.\n</think>"
    row = graded(0, text)
    page, names = shown([row], [item(0)]), {name for name, *_ in row["spans"]}
    marks = [(e.text, name) for e in page.all("mark") for name in e.attrs["title"].split(", ")]
    naive = [(text[start:end], name.replace("_", " ")) for name, start, end in row["spans"]]
    assert sorted(marks) == sorted(naive) and len({sentence for sentence, _ in naive}) == 3
    assert {*page.all("article")[0].attrs["data-behaviour"].split("\n")} == names


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


def test_options_gold_and_the_words_of_rule_and_judge_stand_on_the_card():
    row = graded(0, score=0.0, extracted="C", judge_score=1.0)
    unread = row | {"extracted": None, "judge_score": None, "tokens": None}
    page = shown([row, unread], [item(0, choices=["red", "green", "blue"], answer="B")])
    first, second = (card.text for card in page.all("article"))
    for card, parts in ((first, ("A red", "Gold B", "says C", "judge: right", "7 tokens")),
                        (second, ("judge: ungraded", "nothing was read"))):  # fmt: skip
        assert [part for part in parts if part not in card] == []
    assert [e.attrs["class"] for e in page.all("li")] == ["", "gold", "said", "", "gold", ""]


@pytest.mark.skipif(not BROWSER, reason="no chromium on this machine")
def test_a_browser_filters_by_the_address_and_runs_nothing_else(tmp_path):
    rows, items, outcomes = many(60)
    rows[0]["response"] += "<script>document.title = 'broken'</script>"
    (tmp_path / "gallery.html").write_text(gallery.page(rows, items, "b", {}, tmp_path))
    address = f"file://{tmp_path}/gallery.html#status=wrong&category=kind 1&text=how MANY"
    command = [BROWSER, f"--user-data-dir={tmp_path / 'profile'}", "--headless=new"]
    command += ["--no-sandbox", "--disable-gpu", "--dump-dom", address]
    page = Page(subprocess.run(command, capture_output=True, text=True, timeout=120).stdout)
    wanted = [f"b/{i}" for i, outcome in enumerate(outcomes) if (outcome, i % 3) == ("wrong", 1)]
    left = [card.text for card in page.all("article") if "hidden" not in card.attrs]
    assert wanted and [re.search(r"b/\d+", text)[0] for text in left] == wanted
    assert page.all("output")[0].text == f"{len(wanted)} of 60" and page.all("title")[0].text == "b"
    assert all("open" in e.attrs for e in page.all("details"))  # the words may stand in the thought
