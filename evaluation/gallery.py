"""The replies of an evaluation to look at: graded records into one page, pictures and all.

eval.py writes it, and anew with --regrade. A card shows the question, the gold, what a rule read
from the reply, the verdict and the judge's beside it, and the reply: its thought folded, sentences
with a behaviour coloured. Filters stand in the address: gallery.html#status=wrong&category=algebra.
Of many replies some are drawn; the counts at the top are of all.

Replies are hostile text: the template escapes all of it, and the page's policy allows no address
and no script but its own.
"""

import base64
import io
import random
import secrets
from collections import Counter, defaultdict
from pathlib import Path

import jinja2

from common.data import load_image
from common.log import progress
from evaluation.behaviors import HUES, thinking

FILTERS = ("status", "category", "behaviour")
SIDE = 480  # pixels of a picture, at most: 200 of them are 2 MB
LOADER = jinja2.FileSystemLoader(Path(__file__).parent)
PAGES = jinja2.Environment(loader=LOADER, autoescape=True, undefined=jinja2.StrictUndefined)


def verdict(score: float | None) -> str:
    return "ungraded" if score is None else "right" if score == 1 else "wrong"


def outcome(row: dict) -> str:
    """The status; of a reply that could be read what it scored."""
    return verdict(row["score"]) if row["status"] == "ok" else row["status"]


def picture(path: Path) -> str:
    """A data URI, small."""
    image, file = load_image(str(path)), io.BytesIO()
    image.thumbnail((SIDE, SIDE))
    image.save(file, "webp")
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def pieces(text: str, thought: str, spans: list) -> list[tuple[str, list[str]]]:
    """The thought as (piece, names of its behaviours); a sentence may have several."""
    begin, parts, names = text.find(thought), [], defaultdict(list)
    for name, start, end in spans if thought else ():
        names[start, end].append(name)
    for (start, end), of_sentence in names.items():  # sentences follow each other
        parts += [(text[begin:start], []), (text[start:end], of_sentence)]
        begin = end
    return [*parts, (text[begin : text.find(thought) + len(thought)], [])]


def card(row: dict, item: dict, folder: Path) -> dict:
    _, closed, answer = row["response"].rpartition("</think>")
    is_thought = closed or row["response"].lstrip().startswith("<think>")
    thought = thinking(row["response"]) if is_thought else ""
    category = " ".join(str(item.get("category") or "none").split())
    names = sorted({name for name, *_ in row["spans"]})
    values = outcome(row), category, "\n".join(names)
    return {
        "filters": dict(zip(FILTERS, values, strict=True)),
        "row": row,
        "item": item,
        "pictures": {name: picture(folder / name) for name in item.get("images") or ()},
        "judge": verdict(row["judge_score"]) if "judge_score" in row else "",
        "length": len(thought),
        "thought": pieces(row["response"], thought, row["spans"]),
        "answer": answer.strip() if closed or not is_thought else "",  # the thought may never close
    }


def page(rows: list, items: list, title: str, protocol: dict, folder: Path, limit=200) -> str:
    """The HTML. rows: graded records. folder: that the items' pictures are relative to. limit: of
    cards; the same of more rows each time."""
    places = sorted(random.Random(0).sample(range(len(rows)), min(limit, len(rows))))
    by_id = {item["id"]: item for item in items}
    chosen = progress([rows[i] for i in places], "gallery")
    cards = [card(row, by_id[row["id"]], folder) for row in chosen]
    counts = {name: Counter() for name in FILTERS}
    for name, values in (pair for shown in cards for pair in shown["filters"].items()):
        counts[name].update(values.split("\n") if values else ())
    text = PAGES.get_template("gallery.html").render(
        title=title,
        nonce=secrets.token_urlsafe(16),  # replies were written before it, so none can know it
        protocol=protocol,
        outcomes=Counter(map(outcome, rows)).most_common(),
        choices={name: choices.most_common() for name, choices in counts.items()},
        cards=cards,
        count=len(rows),
        hues=HUES,
    )
    return text.encode(errors="replace").decode()  # JSON may hold half of a character
