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
from collections import Counter
from itertools import groupby
from pathlib import Path

import jinja2

from common.data import load_image
from common.log import progress
from evaluation.behaviors import HUES, thinking

CARDS = 200  # their pictures take 2 MB
LOADER = jinja2.FileSystemLoader(Path(__file__).parent)
PAGES = jinja2.Environment(loader=LOADER, autoescape=True, undefined=jinja2.StrictUndefined)


def outcome(score: float | None, status: str = "ok") -> str:
    """The status; of a reply that could be read what it scored."""
    return {None: "ungraded", 1: "right"}.get(score, "wrong") if status == "ok" else status


def picture(path: Path, side: int = 480) -> str:
    """A data URI, of at most so many pixels a side."""
    image, file = load_image(str(path)), io.BytesIO()
    image.thumbnail((side, side))
    image.save(file, "webp")
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def card(row: dict, item: dict, folder: Path) -> dict:
    response, spans = row["response"], row["spans"]
    _, closed, answer = response.rpartition("</think>")  # a thought may never close
    is_thought = closed or response.lstrip().startswith("<think>")
    thought = thinking(response) if is_thought else ""
    place, pieces = response.find(thought), []  # (text, names of its behaviours)
    end_of_thought = place + len(thought)
    for (start, end), found in groupby(spans if thought else (), key=lambda span: span[1:]):
        names = [name for name, *_ in found]  # a sentence may have several
        pieces += [(response[place:start], []), (response[start:end], names)]
        place = end
    return {
        "status": outcome(row["score"], row["status"]),
        "category": " ".join(str(item.get("category") or "none").split()),
        "behaviour": "\n".join(sorted({name for name, *_ in spans})),
        "row": row,
        "item": item,
        "pictures": {name: picture(folder / name) for name in item.get("images") or ()},
        "judge": outcome(row["judge_score"]) if "judge_score" in row else "",
        "length": len(thought),
        "thought": [*pieces, (response[place:end_of_thought], [])],
        "answer": answer.strip() if closed or not is_thought else "",
    }


def page(rows: list, items: list, title: str, protocol: dict, folder: Path) -> str:
    """The HTML. rows: graded records. folder: that the items' pictures are relative to."""
    places = sorted(random.Random(0).sample(range(len(rows)), min(CARDS, len(rows))))
    by_id = {item["id"]: item for item in items}
    chosen = progress([rows[i] for i in places], "gallery")
    return PAGES.get_template("gallery.html").render(
        title=title,
        nonce=secrets.token_urlsafe(16),  # replies were written before it, so none can know it
        protocol=protocol,
        outcomes=Counter(outcome(row["score"], row["status"]) for row in rows).most_common(),
        cards=[card(row, by_id[row["id"]], folder) for row in chosen],
        counted=lambda values: Counter(filter(None, values)).most_common(),
        count=len(rows),
        hues=HUES,
    )
