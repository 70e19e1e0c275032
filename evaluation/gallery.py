"""Every reply of an evaluation to look at: graded records into one page, pictures and all.

    DIR/items.jsonl + images, DIR/graded.jsonl, DIR/summary.json ──gallery.html──▶ DIR/gallery.html

    python -m evaluation.gallery --run out/bench/mathvision
    python -m evaluation.gallery --run out/bench/mathvision --limit 200 --seed 1 --out wrong.html

A card shows the question, the gold, what a rule read from the reply, the verdict and the judge's
beside it, and the reply: its thought folded, sentences with a behaviour coloured. Filters stand in
the address: gallery.html#status=wrong&category=algebra. Of more than --limit replies a part is
drawn, half of them right if there are so many, and the page says so: no rate can be read off it
then. The counts at the top are of all replies.

Replies are hostile text: the template escapes all of it, and the page's policy allows no address
and no script but its own. Each picture is in it once, small; cards that show it again name the
first.
"""

import base64
import io
import json
import random
import re
import secrets
import string
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import jinja2

from common.data import load_image
from common.log import progress, run_main
from evaluation.behaviors import HUES
from evaluation.records import read_rows

SIDE = 480  # pixels of a picture, at most: 300 of them are 3 MB
COLORS = {  # of a badge
    "right": "#2f8f5b",
    "wrong": "#c2483d",
    "truncated": "#a67c00",
    "unparsed": "#9b72b8",
    "refused": "#3f83d6",
    "empty": "#7a6a58",
    "ungraded": "#6f7886",
}
PAGES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


@dataclass(frozen=True)
class Config:
    """A page of replies."""

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
    """At most `limit` rows, half of them right, more if too few are not; order is kept."""
    if len(rows) <= limit:
        return rows
    right = [i for i, row in enumerate(rows) if row["score"] == 1]
    rest = [i for i, row in enumerate(rows) if row["score"] != 1]
    size = min(len(right), max(limit // 2, limit - len(rest)))
    chance = random.Random(seed)
    chosen = chance.sample(right, size) + chance.sample(rest, limit - size)
    return [rows[i] for i in sorted(chosen)]


def pictures(item: dict, folder: Path, held: dict[str, str]) -> list[dict]:
    """Each with its bytes where it is first seen, later with the id of the element that has them.

    held: {data URI: id}; grows.
    """
    found = []
    for name in item.get("images") or ():
        try:
            image, file = load_image(str(folder / name)), io.BytesIO()
        except (ValueError, OSError) as error:
            found.append({"name": name, "fault": str(error)})
            continue
        image.thumbnail((SIDE, SIDE))
        image.save(file, "webp")
        source = "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
        first = {"id": f"picture-{len(held)}", "source": source}
        found.append({"name": name} | ({"same": held[source]} if source in held else first))
        held.setdefault(source, first["id"])
    return found


def options(item: dict, said: str | None) -> list[dict]:
    """The choices; gold and the one that was said are marked."""
    gold, said = (re.findall(r"[A-Z]", str(text or "")) for text in (item["answer"], said))
    found = []
    for letter, choice in zip(string.ascii_uppercase, item.get("choices") or (), strict=False):
        look = "gold" if letter in gold else "said" if letter in said else ""
        text = "" if str(choice).strip("() ") == letter else str(choice)
        found.append({"letter": letter, "text": text, "look": look})
    return found


def pieces(text: str, begin: int, end: int, spans: list) -> list[tuple[str, list[str]]]:
    """text[begin:end] as (piece, names of its behaviours); a sentence may have several."""
    names, found, at = defaultdict(list), [], begin
    for name, start, stop in spans:
        names[max(start, begin), min(stop, end)].append(name)
    for (start, stop), of in sorted(names.items()):
        if at <= start < stop:
            found += [(text[at:start], []), (text[start:stop], of)]
            at = stop
    return [*found, (text[at:end].rstrip(), [])]


def reply(text: str, spans: list) -> dict:
    """The thought, and what follows it. A thought that never closes is all there is."""
    begin = re.match(r"\s*(?:<think>)?\s*", text).end()
    end, after = text.rfind("</think>"), text.rfind("</think>") + len("</think>")
    if end < begin:
        end = after = len(text) if "<think>" in text[:begin] else begin
    return {
        "length": len(text[begin:end].strip()),
        "marked": len(spans),
        "thought": pieces(text, begin, end, spans),
        "rest": text[after:].strip(),
    }


def card(row: dict, item: dict | None, folder: Path, held: dict[str, str]) -> dict:
    names = sorted({name for name, *_ in row["spans"]})
    category = " ".join(str((item or {}).get("category") or "none").split())
    told = {"status": outcome(row), "score": verdict(row["score"]), "category": category}
    told |= {"behaviour": "\n".join(names)}
    tokens = "tokens not counted" if row["tokens"] is None else f"{row['tokens']:,} tokens"
    return {
        "filters": told,
        "row": row,
        "item": item,
        "pictures": pictures(item, folder, held) if item else [],
        "options": options(item, row["extracted"]) if item else [],
        "judge": verdict(row["judge_score"]) if "judge_score" in row else "",
        "reply": reply(row["response"], row["spans"]),
        "facts": f"{row['id']} · sample {row['sample']} · {tokens} · {category}",
    }


def page(rows: list, items: list, title: str, protocol: dict, folder: Path, draws=(500, 0)) -> str:
    """The HTML. rows: graded records. folder: that the items' pictures are relative to.
    draws: most cards, and the seed of those that are drawn of more."""
    by_id, chosen, held = {item["id"]: item for item in items}, draw(rows, *draws), {}
    shown = progress(chosen, "gallery")
    cards = [card(row, by_id.get(row["id"]), folder, held) for row in shown]
    names = ("status", "score", "category")
    text = PAGES.get_template("gallery.html").render(
        title=title,
        nonce=secrets.token_urlsafe(16),  # replies were written before it, so none can know it
        protocol=" · ".join(f"{name} {value}" for name, value in protocol.items()),
        outcomes=Counter(map(outcome, rows)).most_common(),
        choices={n: Counter(c["filters"][n] for c in cards).most_common() for n in names},
        cards=cards,
        right=sum(row["score"] == 1 for row in chosen),
        count=len(rows),
        seed=draws[1],
        colors=COLORS,
        hues=HUES,
    )
    return text.encode(errors="replace").decode()  # JSON may hold half of a character


def main(cfg: Config) -> None:
    run = Path(cfg.run)
    items, rows = read_rows(run / "items.jsonl"), read_rows(run / "graded.jsonl")
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    title = str(items[0]["source"]) if items else run.name
    for name, told in summary["headline"].items():
        low, value, high = (told[x] * summary["scale"] for x in ("low", "score", "high"))
        title += f", {name} {value:.1f} ({low:.1f} to {high:.1f})"
    text = page(rows, items, title, summary["protocol"], run, (cfg.limit, cfg.seed))
    out = Path(cfg.out) if cfg.out else run / "gallery.html"
    out.write_text(text, encoding="utf-8")
    print(f"{out}: {min(len(rows), cfg.limit):,} of {len(rows):,} replies")


if __name__ == "__main__":
    run_main(main, Config)
