"""Every reply of an evaluation to look at: graded records into one page, pictures and all.

    DIR/items.jsonl + images, DIR/graded.jsonl, DIR/summary.json if there ──▶ DIR/gallery.html

    python -m evaluation.gallery --run out/bench/mathvision
    python -m evaluation.gallery --run out/bench/mathvision --limit 200 --seed 1 --out wrong.html

A card shows the question, the gold, what a rule read from the reply, the verdict and the judge's
beside it, and the reply: its thought folded, sentences with a behaviour (behaviors.py) coloured.
Filters stand in the address: gallery.html#status=wrong&category=algebra. Of more than --limit
replies a part is drawn, half of them right if there are so many, and the page says so: no rate can
be read off it then. The counts at the top are of all replies.

Replies are hostile text: all of it is escaped, and the page's policy allows no address and no
script but its own. Each picture is in it once, small; cards that show it again name the first.
"""

import base64
import hashlib
import io
import json
import random
import re
import string
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from string import Template

from PIL import Image

from common.log import progress, run_main
from curation.alike import DAMAGED
from evaluation import behaviors
from evaluation.behaviors import HUES

CSS = (Path(__file__).parents[1] / "common/page.css").read_text()
SIDE = 480  # pixels of a picture, at most: 300 of them are 3 MB
OUTCOMES = "right wrong truncated unparsed refused empty ungraded".split()
COLORS = "#2f8f5b #c2483d #a67c00 #9b72b8 #3f83d6 #7a6a58 #6f7886".split()
COLORS = dict(zip(OUTCOMES, COLORS, strict=True))  # of a badge


@dataclass(frozen=True)
class Config:
    """A page of replies."""

    run: str  # directory of items.jsonl, graded.jsonl and summary.json
    out: str = ""  # HTML to write; empty: gallery.html in that directory
    limit: int = 500  # cards; of more replies some are drawn
    seed: int = 0  # of the draw

    def __post_init__(self):
        for name in ("items.jsonl", "graded.jsonl"):
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


# ---------------------------------------------------------------- a card


@cache  # the samples of an item share its pictures
def small(path: Path) -> str:
    """The picture as a data URI. Raises one of DAMAGED."""
    file = io.BytesIO()
    with Image.open(path) as image:
        image.thumbnail((SIDE, SIDE))
        image.convert("RGBA").save(file, "webp")
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def picture(path: Path, name: str, held: dict[str, str]) -> str:
    """held: {data URI: id of the element that has it}; grows."""
    try:
        source = small(path)
    except DAMAGED as error:
        return f'<p class="absent">{escape(f"{name} cannot be shown: {error}")}</p>'
    if source in held:
        return f'<img alt="{escape(name)}" data-same="{held[source]}">'
    held[source] = f"picture-{len(held)}"
    return f'<img alt="{escape(name)}" id="{held[source]}" src="{source}">'


def options(item: dict, row: dict) -> str:
    """The choices; gold and the one that was said are marked."""
    gold, said = (re.findall(r"[A-Z]", str(x or "")) for x in (item["answer"], row["extracted"]))
    lines = ""
    for letter, choice in zip(string.ascii_uppercase, item.get("choices") or (), strict=False):
        look = "gold" if letter in gold else "said" if letter in said else ""
        text = "" if str(choice).strip("() ") == letter else escape(str(choice))
        lines += f'<li class="{look}"><b>{letter}</b> {text}</li>'
    return f"<ul>{lines}</ul>" if lines else ""


def marked(text: str, begin: int, end: int, spans: list[behaviors.Span]) -> str:
    """text[begin:end], escaped. spans: of the whole text; a sentence may have several names."""
    found = defaultdict(list)
    for span in spans:
        found[max(span.start, begin), min(span.end, end)].append(span.name)
    pieces, at = [], begin
    for (start, stop), names in sorted(found.items()):
        if start < stop:
            title = ", ".join(names).replace("_", " ")
            pieces += [escape(text[at:start]), f'<mark style="--h:{HUES[names[-1]]}" ']
            pieces += [f'title="{title}">{escape(text[start:stop])}</mark>']
            at = stop
    return "".join([*pieces, escape(text[at:end])]).strip()


def reply(text: str, spans: list[behaviors.Span]) -> str:
    """The thought folded, what follows it in full. A thought that never closes is all there is."""
    begin = re.match(r"\s*(?:<think>)?", text).end()
    end, after = text.rfind("</think>"), text.rfind("</think>") + len("</think>")
    if end < 0:
        end = after = len(text) if "<think>" in text[:begin] else begin
    html = ""
    if text[begin:end].strip():
        count = sum(begin <= span.start < end for span in spans)
        html = f"<details><summary>Thought, {end - begin:,} characters, {count} marked</summary>"
        html += f'<p class="text">{marked(text, begin, end, spans)}</p></details>'
    rest = marked(text, after, len(text), spans)
    return html + (f'<p class="text">{rest}</p>' if rest else '<p class="absent">no answer</p>')


def asked(item: dict | None, row: dict, folder: Path, held: dict[str, str]) -> str:
    if not item:
        return f'<p class="absent">No item has the id {escape(str(row["id"]))}.</p>'
    html = "".join(picture(folder / name, name, held) for name in item.get("images") or ())
    html = html or "<small>no picture</small>"
    html += f'<p class="text">{escape(item.get("question") or item["prompt"])}</p>'
    return f"{html}{options(item, row)}<p>Gold <b>{escape(str(item['answer']))}</b></p>"


def category_of(item: dict | None) -> str:
    return " ".join(str((item or {}).get("category") or "none").split())


def card(row: dict, item: dict | None, folder: Path, held: dict[str, str]) -> str:
    spans = behaviors.find(row["response"])
    result, category, said = outcome(row), category_of(item), row["extracted"]
    filters = {"status": result, "score": verdict(row["score"]), "category": category}
    filters["behaviour"] = "\n".join(sorted({span.name for span in spans}))
    data = "".join(f' data-{name}="{escape(value)}"' for name, value in filters.items())
    said = "nothing was read" if said is None else f"says <b>{escape(str(said))}</b>"
    judge = f"judge: <b>{verdict(row['judge_score'])}</b>" if "judge_score" in row else ""
    tokens = "tokens not counted" if row["tokens"] is None else f"{row['tokens']:,} tokens"
    facts = (row["id"], f"sample {row['sample']}", tokens, category)
    return (
        f"<article{data}><div>{asked(item, row, folder, held)}</div>"
        f'<div><h3><b class="badge" style="--c:{COLORS[result]}">{result}</b><span>{said} '
        f"<small>rule: {escape(str(row.get('rule')))}</small></span> <span>{judge}</span></h3>"
        f"{reply(row['response'], spans)}"
        f"<small>{escape(' · '.join(map(str, facts)))}</small></div></article>\n"
    )


# ---------------------------------------------------------------- the page


def choice(name: str, counts: Counter) -> str:
    lines = f'<option value="">any {name}</option>'
    for value, n in counts.most_common():
        lines += f'<option value="{escape(value)}">{escape(value)} ({n:,})</option>'
    return f'<select name="{name}" aria-label="{name}">{lines}</select>'


def legend() -> str:
    radio = '<label><input type="radio" name="behaviour" value='
    html = f'{radio}"" checked><mark class="any">any</mark></label>'
    for name, hue in HUES.items():
        mark = f'<mark style="--h:{hue}">{name.replace("_", " ")}</mark>'
        html += f'{radio}"{name}">{mark}</label>'
    return html


def bar(rows: list[dict]) -> str:
    """Outcomes of all replies, as lengths and as numbers."""
    lengths = numbers = ""
    for name, n in Counter(map(outcome, rows)).most_common():
        mark = f'<i style="--c:{COLORS[name]};flex-grow:{n}"></i>'
        lengths += mark
        numbers += f"<span>{mark}{name} <b>{n:,}</b></span>"
    return f'<div class="bar">{lengths}</div><p class="numbers">{numbers}</p>'


def note(rows: list[dict], cards: list[dict], seed: int) -> str:
    if len(cards) == len(rows):
        return ""
    n, right = len(cards), sum(row["score"] == 1 for row in cards)
    text = (
        f"{n:,} of {len(rows):,} replies, drawn by seed {seed}: {right:,} right, {n - right:,} not"
    )
    return f'<p class="note">{text}. No rate can be read off the cards.</p>'


def page(
    rows: list, items: list, title: str, protocol: dict, folder: Path, limit=500, seed=0
) -> str:
    """The HTML. rows: graded records. folder: that the items' pictures are relative to."""
    by_id, cards, held = {item["id"]: item for item in items}, draw(rows, limit, seed), {}
    shown = [(row, by_id.get(row["id"])) for row in cards]
    text = PAGE.substitute(
        css=CSS + OWN_CSS,
        sha256=base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode(),
        title=escape(title),
        protocol=escape(" · ".join(f"{name} {value}" for name, value in protocol.items())),
        bar=bar(rows),
        note=note(rows, cards, seed),
        status=choice("status", Counter(map(outcome, cards))),
        score=choice("score", Counter(verdict(row["score"]) for row in cards)),
        category=choice("category", Counter(category_of(item) for _, item in shown)),
        legend=legend(),
        cards="".join(card(*one, folder, held) for one in progress(shown, "gallery")),
        script=SCRIPT,
    )
    return text.encode(errors="replace").decode()  # JSON may hold half of a character


PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
style-src 'unsafe-inline'; script-src 'sha256-$sha256'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title><style>$css</style></head><body>
<header><div><h1>$title</h1>$bar<p class="facts">$protocol</p>$note</div></header>
<form><div>$status$score$category<input type="search" name="text" placeholder="words"
aria-label="words"><output></output></div><div class="legend">$legend</div></form>
<main>
$cards</main><script>$script</script></body></html>
""")

SCRIPT = """
const form = document.forms[0], count = document.querySelector("output");
const cards = [...document.querySelectorAll("article")];
const texts = cards.map(card => card.textContent.toLowerCase());
for (const image of document.querySelectorAll("[data-same]"))
  image.src = document.getElementById(image.dataset.same).src;

function fits(i, name, value) {
  if (name === "text") return texts[i].includes(value.toLowerCase());
  return cards[i].dataset[name].split("\\n").includes(value);
}
function filter() {
  const wanted = [...new FormData(form)].filter(([, value]) => value);
  cards.forEach((card, i) => { card.hidden = !wanted.every(([n, value]) => fits(i, n, value)); });
  count.textContent = `${cards.filter(card => !card.hidden).length} of ${cards.length}`;
  const inside = wanted.some(([name]) => name === "behaviour" || name === "text");
  for (const thought of document.querySelectorAll("details")) thought.open = inside;
  history.replaceState(null, "", "#" + new URLSearchParams(wanted));
}
function fromAddress() {
  form.reset();
  for (const [name, value] of new URLSearchParams(location.hash.slice(1)))
    if (form.elements[name]) form.elements[name].value = value;
  filter();
}
form.addEventListener("input", filter);
form.addEventListener("submit", event => event.preventDefault());
addEventListener("hashchange", fromAddress);
fromAddress();
"""

OWN_CSS = """
:root{color-scheme:light dark}header{grid-template-columns:1fr;padding-top:40px}
h1{margin-bottom:14px}.bar{display:flex;gap:2px;border-radius:5px;overflow:hidden}
i{display:inline-block;width:10px;height:10px;background:var(--c)}
.numbers{display:flex;flex-wrap:wrap;gap:4px 20px;margin:10px 0;font-size:15px}
.numbers i{border-radius:3px;margin-right:7px}.facts{font-size:13px;overflow-wrap:anywhere}
.note{margin:10px 0 0;padding:8px 14px;border-left:4px solid var(--half);background:var(--card)}
form{position:sticky;top:0;z-index:1;margin-top:22px;padding:12px max(20px,50vw - 540px);
background:var(--paper);border-bottom:1px solid var(--line)}
form>div{display:flex;flex-wrap:wrap;gap:8px;align-items:center}form>.legend{margin-top:10px;font-size:12px}
select,[type=search]{font:inherit;font-size:14px;color:inherit;background:var(--card);
border:1px solid var(--line);border-radius:8px;padding:6px 10px;min-width:0;height:36px}
[type=search]{flex:1 1 150px}output{font-weight:600}
.legend label{cursor:pointer}.legend input{position:absolute;opacity:0}
.legend mark{display:block;padding:2px 6px}.any{background:var(--line);color:inherit}
.legend :checked+mark{box-shadow:0 0 0 2px var(--ink)}
.legend :focus-visible+mark{outline:2px solid #3f83d6;outline-offset:3px}
article{display:grid;grid-template-columns:minmax(0,2fr) minmax(0,3fr);gap:28px;
content-visibility:auto;contain-intrinsic-size:auto 420px;overflow-wrap:anywhere}
article[hidden]{display:none}article p{margin:10px 0}article small,summary{color:var(--soft)}
article img{display:block;max-width:100%;max-height:300px;background:#fff;border-radius:6px;
margin-bottom:10px}
article h3{display:flex;flex-wrap:wrap;gap:4px 14px;margin:0;font-size:15px;font-weight:400}
.badge{background:var(--c);color:#fff;border-radius:6px;padding:0 9px;font-weight:600}
.text{white-space:pre-wrap;font-size:15px}summary{cursor:pointer;font-size:14px;margin-top:8px}
details .text{border-left:3px solid var(--line);padding-left:14px}
ul{list-style:none;margin:0;padding:0;font-size:15px;display:flex;flex-wrap:wrap;gap:2px 22px}
.gold{color:var(--good)}.said{color:var(--bad)}
@media (max-width:760px){form{position:static;padding:12px 14px}select{flex:1 1 28%}
article{grid-template-columns:minmax(0,1fr);gap:14px;padding:14px}}
"""


def main(cfg: Config) -> None:
    run, summary = Path(cfg.run), {}
    files = ((run / name).open(encoding="utf-8") for name in ("items.jsonl", "graded.jsonl"))
    items, rows = ([json.loads(line) for line in file] for file in files)
    if (run / "summary.json").is_file():
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    title = str(items[0]["source"]) if items else run.name
    for name, told in summary.get("headline", {}).items():
        low, value, high = (told[x] * summary["scale"] for x in ("low", "score", "high"))
        title += f", {name} {value:.1f} ({low:.1f} to {high:.1f})"
    text = page(rows, items, title, summary.get("protocol", {}), run, cfg.limit, cfg.seed)
    out = Path(cfg.out) if cfg.out else run / "gallery.html"
    out.write_text(text, encoding="utf-8")
    print(f"{out}: {min(len(rows), cfg.limit):,} of {len(rows):,} replies")


if __name__ == "__main__":
    run_main(main, Config)
