"""Every reply of an evaluation to look at: graded records into one page, pictures and all.

    DIR/items.jsonl + images, DIR/graded.jsonl, DIR/summary.json ──gallery.html──▶ DIR/gallery.html

    python -m evaluation.gallery --run out/bench/mathvision --limit 200 --seed 1

A card shows the question, the gold, what a rule read from the reply, the verdict and the judge's
beside it, and the reply: its thought folded, sentences with a behaviour coloured. Filters stand in
the address: gallery.html#status=wrong&category=algebra. Of more than --limit replies so many are
drawn; the counts at the top are of all.

Replies are hostile text: the template escapes all of it, and the page's policy allows no address
and no script but its own. Each picture is in it once, small; later cards name the first.
"""

import base64
import io
import json
import random
import secrets
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import jinja2

from common.data import load_image
from common.log import progress, run_main
from common.records import read_rows
from evaluation.behaviors import HUES, thinking

FILTERS = ("status", "score", "category", "behaviour")
SIDE = 480  # pixels of a picture, at most: 300 of them are 3 MB
LOADER = jinja2.FileSystemLoader(Path(__file__).parent)
PAGES = jinja2.Environment(loader=LOADER, autoescape=True, undefined=jinja2.StrictUndefined)


@dataclass(frozen=True)
class Config:
    run: str  # directory of eval.py: items.jsonl, graded.jsonl and summary.json
    out: str = ""  # HTML to write; empty: gallery.html in that directory
    limit: int = 500  # cards; of more replies some are drawn
    seed: int = 0  # of the draw

    def __post_init__(self):
        for name in ("items.jsonl", "graded.jsonl", "summary.json"):
            if not Path(self.run, name).is_file():
                raise FileNotFoundError(f"--run {self.run}: no {name} in it")


def verdict(score: float | None) -> str:
    return "ungraded" if score is None else "right" if score == 1 else "wrong"


def outcome(row: dict) -> str:
    """The status; of a reply that could be read what it scored."""
    return verdict(row["score"]) if row["status"] == "ok" else row["status"]


def draw(rows: list[dict], limit: int, seed: int) -> list[dict]:
    """At most `limit` rows, in their order."""
    chosen = random.Random(seed).sample(range(len(rows)), min(limit, len(rows)))
    return [rows[i] for i in sorted(chosen)]


def pictures(item: dict, folder: Path, ids: dict[str, str]) -> list[dict]:
    """Each with the id of the element that has its bytes, the first with these. ids: {bytes as data
    URI: id}; grows."""
    shown = []
    for name in item.get("images") or ():
        try:
            image, file = load_image(str(folder / name)), io.BytesIO()
        except (ValueError, OSError) as error:
            shown.append({"name": name, "fault": str(error)})
            continue
        image.thumbnail((SIDE, SIDE))
        image.save(file, "webp")
        source = "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
        first = "" if source in ids else source
        shown.append({"name": name, "id": ids.setdefault(source, f"p{len(ids)}"), "source": first})
    return shown


def pieces(text: str, thought: str, spans: list) -> list[tuple[str, list[str]]]:
    """The thought as (piece, names of its behaviours); a sentence may have several."""
    begin, parts, names = text.find(thought), [], defaultdict(list)
    for name, start, end in spans if thought else ():
        names[start, end].append(name)
    for (start, end), of_sentence in names.items():  # sentences follow each other
        parts += [(text[begin:start], []), (text[start:end], of_sentence)]
        begin = end
    return [*parts, (text[begin : text.find(thought) + len(thought)], [])]


def card(row: dict, item: dict, folder: Path, ids: dict[str, str]) -> dict:
    _, closed, answer = row["response"].rpartition("</think>")
    is_thought = closed or row["response"].lstrip().startswith("<think>")
    thought = thinking(row["response"]) if is_thought else ""
    category = " ".join(str(item.get("category") or "none").split())
    names = sorted({name for name, *_ in row["spans"]})
    values = outcome(row), verdict(row["score"]), category, "\n".join(names)
    return {
        "filters": dict(zip(FILTERS, values, strict=True)),
        "row": row,
        "item": item,
        "pictures": pictures(item, folder, ids),
        "judge": verdict(row["judge_score"]) if "judge_score" in row else "",
        "length": len(thought),
        "thought": pieces(row["response"], thought, row["spans"]),
        "answer": answer.strip() if closed or not is_thought else "",  # the thought may never close
    }


def page(rows: list, items: list, title: str, protocol: dict, folder: Path, draws=(500, 0)) -> str:
    """The HTML. rows: graded records. folder: that the items' pictures are relative to.
    draws: most cards, and the seed of those that are drawn of more."""
    by_id, ids, chosen = {item["id"]: item for item in items}, {}, draw(rows, *draws)
    cards = [card(row, by_id[row["id"]], folder, ids) for row in progress(chosen, "gallery")]
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
        seed=draws[1],
        hues=HUES,
    )
    return text.encode(errors="replace").decode()  # JSON may hold half of a character


def main(cfg: Config) -> None:
    run = Path(cfg.run)
    items, rows = read_rows(run / "items.jsonl"), read_rows(run / "graded.jsonl")
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    title = str(items[0]["source"]) if items else run.name
    for name, score in summary["headline"].items():
        ends = (score[end] * summary["scale"] for end in ("score", "low", "high"))
        title += ", {} {:.1f} ({:.1f} to {:.1f})".format(name, *ends)
    out = Path(cfg.out or run / "gallery.html")
    text = page(rows, items, title, summary["protocol"], run, (cfg.limit, cfg.seed))
    out.write_text(text, encoding="utf-8")
    print(f"{out}: {min(len(rows), cfg.limit):,} of {len(rows):,} replies")


if __name__ == "__main__":
    run_main(main, Config)
