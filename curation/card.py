r"""What is in a file of rows and where it came from: one page, for who decides to train on it.

    sft.jsonl | rl.jsonl ───one pass───▶ counts, histograms, examples ─┐
    X.report.json ─▶ the reports of its inputs ─▶ ... ─▶ the sources ──┼─▶ sft.card.html
    X.dropped.jsonl, X.contaminated.jsonl ─────────────────────────────┘

    python -m curation.card --rows out/data/sft.jsonl

Each step of stage 0 writes a report beside its rows that names its inputs. Followed to the sources
they are the funnel: rows of every source after every step, and why the others went. Three things
are checked: in = kept + reasons of each step, the rows that the last step kept with the rows that
are here, and the sha256. What does not agree stands in red, and on the screen.

Rows are hostile text: all of it is escaped. The page has no script and no link, pictures are small
and inside, so it can be mailed. Nothing is held that grows with the file: counters of sources,
levels and the like, histograms in bins of a quarter of an octave, examples by reservoir sampling.
"""

import base64
import hashlib
import io
import json
import math
import os
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from html import escape
from itertools import islice, zip_longest
from pathlib import Path
from string import Template
from typing import Any

from matplotlib.ticker import EngFormatter, MaxNLocator
from PIL import Image

from common.log import beside, progress, run_main
from curation.alike import DAMAGED
from curation.curate import REASONS, answer_format, read_row
from curation.rules import malformed
from miniature.report import INK, chart

WHY = {reason: why for _, reason, why in REASONS}  # for a report that does not say
NO_REPORT = {"config": {}, "inputs": {}, "output": {}, "steps": {}, "command": "no report"}
CSS = (Path(__file__).parents[1] / "common/page.css").read_text()
BLUE = "#3f83d6"
LISTED = 50  # lines of a list, as of contaminated pairs
SIDE = 480  # pixels of a picture on the page


@dataclass(frozen=True)
class Config:
    """A page about a file of rows."""

    rows: str  # JSONL that curate.py wrote, or any other file of rows
    seed: int = 0  # of the examples
    examples: int = 10  # rows shown, and dropped rows


# ---- the chain of reports


def read_report(path: Path) -> dict:
    """As write_report (common/log.py) wrote it, its inputs as whole paths."""
    place = beside(path, "report.json")
    report = NO_REPORT | (json.loads(place.read_bytes()) if place.is_file() else {})
    inputs = {(path.parent / name).resolve(): mark for name, mark in report["inputs"].items()}
    return report | {"inputs": inputs}


def follow(path: Path, chain: dict[Path, dict]) -> None:
    """Adds the report of the file after those of the files whose rows became its rows. Each is read
    once, so a circle ends too."""
    if path in chain:
        return
    chain[path] = report = read_report(path)
    rows = report["config"].get("rows", ())
    count = 1 if isinstance(rows, str) else len(rows)
    for place in [*report["inputs"]][:count]:  # every step names its rows first, then scores
        follow(place, chain)
    chain[path] = chain.pop(path)  # to the end


def funnel(chain: dict[Path, dict]) -> dict[tuple[int, str], dict[str, Counter]]:
    """{(files before it, step): {source: {"in", "kept"}}} in the order that the rows went.
    Files at one height are joined: sets are read apart."""
    heights, steps = {}, defaultdict(lambda: defaultdict(Counter))
    for path, report in chain.items():
        below = [heights[place] for place in report["inputs"] if place in heights]
        heights[path] = 1 + max(below, default=-1)
        for step, source, counts in cells(report):
            cell = {"in": counts["in"], "kept": rows_after(counts)}
            steps[heights[path], step][source].update(cell)
    return dict(sorted(steps.items(), key=lambda item: item[0][0]))


def cells(report: dict) -> Iterator[tuple[str, str, dict]]:
    """(step, source, {"in", "kept", "reasons"})"""
    for step, of in report["steps"].items():
        for source, counts in of.items():
            yield step, source, counts


def rows_after(counts: dict) -> int:
    """A step may make several rows of one that it keeps, and then counts them as "rows"."""
    return counts.get("rows", counts["kept"])


def lost_rows(chain: dict[Path, dict]) -> Iterator[str]:
    """Where in = kept + reasons does not hold."""
    for path, report in chain.items():
        for step, source, counts in cells(report):
            rows, kept, gone = counts["in"], counts["kept"], sum(counts["reasons"].values())
            if rows != kept + gone:
                where = f"{path.name}, step {step}, source {source}"
                yield f"{where}: {rows:,} rows in, but {kept:,} kept and {gone:,} with a reason"


# ---- one pass over the rows


@dataclass
class Tally:
    """What is known after one pass."""

    rows: int = 0
    sha256: str = ""
    counts: dict = field(default_factory=lambda: defaultdict(Counter))  # "source" -> value -> rows
    bins: dict = field(default_factory=lambda: defaultdict(Counter))  # what -> quarter octave -> n
    examples: list = field(default_factory=list)  # rows


def tally(cfg: Config) -> Tally:
    path, found = Path(cfg.rows), Tally()
    digest, draw = hashlib.sha256(), random.Random(cfg.seed)
    with path.open("rb") as file:
        for number, line in enumerate(progress(file, f"reading {path.name}"), 1):
            digest.update(line)
            if not line.strip():
                continue
            row, wrong = read_row(line, ("id", "source", "prompt"))
            if wrong := wrong or malformed(row):
                raise ValueError(f"{path}, line {number}: {wrong}. curate.py drops such rows")
            look(row, path.parent, found)
            keep(found.examples, row, found.rows, cfg.examples, draw)
    found.sha256 = digest.hexdigest()
    return found


def look(row: dict, folder: Path, found: Tally) -> None:
    """Counts one row."""
    found.rows += 1
    for name, value in facts_of(row).items():
        found.counts[name][value] += 1
    for name in ("prompt", "response"):
        if name in row:
            found.bins[name][quarter(len(row[name]))] += 1
    for name in row.get("images") or []:
        try:
            with Image.open(folder / name) as image:  # reads its header alone
                found.bins["picture"][quarter(image.width * image.height)] += 1
        except DAMAGED:
            found.counts["lost pictures"][str(row["source"])] += 1


def facts_of(row: dict) -> dict[str, str]:
    said = row.get("origin")  # a dict; rows of one's own may say it in a word
    origin = said if isinstance(said, dict) else {}
    facts = {"source": row["source"], "level": row.get("level"), "answer": answer_format(row)}
    facts |= {"set": origin.get("set"), "licence": origin.get("license")}
    facts["pictures"] = len(row.get("images") or [])
    return {name: "(none)" if x in (None, "") else str(x) for name, x in facts.items()}


def keep(chosen: list, item: Any, seen: int, size: int, draw: random.Random) -> None:
    """Reservoir sampling (Vitter 1985, algorithm R): `chosen` is a uniform sample of `size` of all
    items so far, of which there are `seen` with this one."""
    if len(chosen) < size:
        chosen.append(item)
    elif (place := draw.randrange(seen)) < size:
        chosen[place] = item


def quarter(n: int) -> int:
    """Number of the bin [2^(q/4), 2^((q+1)/4)) that n lies in; n is at least 1."""
    return math.floor(4 * math.log2(n))


def not_as_reported(found: Tally, report: dict, name: str) -> Iterator[str]:
    """Where the file is not what the report beside it says, or its pictures are gone."""
    for source, n in found.counts.get("lost pictures", {}).items():
        yield f"{source}: {n:,} pictures cannot be opened"
    if not report["steps"]:
        yield f"No report of {name} names a step: which rows were dropped, and why, is not known"
        return
    *_, last = report["steps"].values()
    for source in {**last, **found.counts["source"]}:
        rows, kept = found.counts["source"][source], rows_after(last.get(source, {"kept": 0}))
        if rows != kept:
            yield f"{source}: {rows:,} rows, but the report says {kept:,} were kept"
    if found.sha256 not in report["output"][name]:
        yield f"{name} is not the file that its report describes: another sha256"


# ---- the page


class Html(str):
    """What is HTML already; any other text is escaped on its way into the page."""


def safe(value: Any) -> str:
    if isinstance(value, Html):
        return value
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return escape(text.encode(errors="replace").decode())  # JSON may hold half of a character


def table(names: Iterable[str], rows: Iterable[Iterable]) -> str:
    """The first cell of a row is its heading. A wide table scrolls."""
    head, body = "".join(f"<th>{safe(name)}</th>" for name in names), ""
    for first, *rest in rows:
        cells = "".join(f"<td>{safe(cell)}</td>" for cell in rest)
        body += f'<tr><th scope="row">{safe(first)}</th>{cells}</tr>'
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def share(n: int, total: int) -> Html:
    """A number, what part of the total it is, and a bar of that length."""
    percent = 100 * n / max(1, total)
    bar = f'<b style="width:{min(100, percent):.3g}%"></b>'
    return Html(f"{n:,}&nbsp;<small>{percent:.3g}&nbsp;%</small>{bar}")


def picture(path: Path, name: str) -> str:
    file = io.BytesIO()
    try:
        with Image.open(path) as image:
            image.thumbnail((SIDE, SIDE))
            image.convert("RGBA").save(file, "webp")
    except DAMAGED as error:
        return f'<p class="absent">{safe(f"{name} cannot be shown: {error}")}</p>'
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{safe(name)}" src="data:image/webp;base64,{data}">'


def histogram(title: str, note: str, counts: list, edges: list, unit: str, bounds=()) -> str:
    def draw(axes):
        axes.stairs(counts, edges, fill=True, color=BLUE)
        for bound in filter(math.isfinite, bounds):
            axes.axvline(bound, color=INK, lw=1, ls="--")
        if unit in ("characters", "pixels"):  # their edges are powers
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(EngFormatter(places=0, sep=""))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel(unit)

    caption = f"<figcaption>{note}</figcaption>"
    return f"<figure><h3>{safe(title)}</h3>{chart(title, draw)}{caption}</figure>"


def octaves(title: str, bins: Counter, unit: str) -> str:
    if not bins:
        return ""
    places = range(min(bins), max(bins) + 1)
    edges = [2 ** (q / 4) for q in (*places, places[-1] + 1)]
    note = f"{bins.total():,} in all. Equal widths are equal ratios."
    return histogram(title, note, [bins[q] for q in places], edges, unit)


def funnel_section(chain: dict[Path, dict]) -> str:
    steps = funnel(chain)
    first = {s: of[s]["in"] for of in reversed(steps.values()) for s in of}  # the earliest is last
    left, total = dict(first), ["all", sum(first.values())]
    lines = {source: [source, n] for source, n in sorted(first.items(), key=lambda item: -item[1])}
    for of in steps.values():
        left |= {source: counts["kept"] for source, counts in of.items()}
        for source, line in lines.items():
            line.append(share(left[source], first[source]) if source in of else "·")
        total.append(share(sum(left.values()), total[1]))
    text = table(["source", "rows", *(step for _, step in steps)], [total, *lines.values()])
    reasons = [(step, reason, n, why) for (step, reason, why), n in reasons_of(chain).items()]
    return text + table(("step", "reason", "rows", "what it means"), reasons)


def reasons_of(chain: dict[Path, dict]) -> dict[tuple[str, str, str], int]:
    """{(step, reason, what it means): rows} of all steps of all files."""
    gone = Counter()
    for report in chain.values():
        meaning = WHY | report.get("why", {})
        for step, _, counts in cells(report):
            for reason, n in counts["reasons"].items():
                gone[step, reason.replace("_", " "), meaning.get(reason, "")] += n
    return gone


def composition(found: Tally) -> str:
    text = ""
    for name, counts in found.counts.items():
        lines = [(value, share(n, found.rows)) for value, n in counts.most_common(LISTED)]
        text += table((name, "rows"), lines)
    return f'<div class="grid two">{text}</div>'


def histograms(found: Tally, report: dict) -> str:
    text = octaves("Length of the prompt", found.bins["prompt"], "characters")
    text += octaves("Length of the response", found.bins["response"], "characters")
    text += octaves("Size of a picture", found.bins["picture"], "pixels")
    if passes := report.get("passes"):
        counts = [sum(column) for column in zip(*passes.values(), strict=True)]
        edges = [solved - 0.5 for solved in range(len(counts) + 1)]
        note = f"Of {len(counts) - 1}; before what is never or always solved was dropped."
        text += histogram("Tries that were right", note, counts, edges, "tries")
    for source, about in report.get("losses", {}).items():
        low, high, drawn = about["low"], about["high"], about["histogram"]
        title, note = f"Loss: {source}", f"From {low:.3g} to {high:.3g} is normal for the source."
        ends, unit = (low, high), "nats a token"
        text += histogram(title, note, drawn["counts"], drawn["edges"], unit, ends)
    return f'<div class="grid">{text}</div>'


def contamination(cfg: Config, report: dict) -> str:
    path, columns = beside(cfg.rows, "contaminated.jsonl"), ("id", "benchmark_id", "kind", "score")
    if not report["config"].get("benchmarks") or not path.is_file():
        return "<p>Nobody looked for test questions, or what was found is gone.</p>"
    pairs = [[pair[column] for column in columns] for pair in islice(lines_of(path), LISTED)]
    text = f"<p>Rows that were dropped, and the test questions they are: the first {LISTED}.</p>"
    return text + table(columns, pairs)


def lines_of(path: Path) -> Iterator[dict]:
    """The objects of a JSONL file that a step wrote."""
    with path.open("rb") as file:
        yield from map(json.loads, progress(file, f"reading {path.name}"))


def example(row: dict, folder: Path) -> str:
    facts = " · ".join(f"{name} {safe(value)}" for name, value in facts_of(row).items())
    text = f"<h3>{safe(row['id'])}</h3><small>{facts}</small>"
    text += "".join(picture(folder / name, name) for name in row.get("images") or [])
    text += f'<p class="text">{safe(row["prompt"])}</p>'
    for name in ("choices", "answer"):
        if row.get(name) is not None:
            text += f'<p class="text">{name}: <b>{safe(row[name])}</b></p>'
    thought, closed, rest = row.get("response", "").rpartition("</think>")
    if closed:
        title = f"<summary>The thought, {len(thought):,} characters</summary>"
        text += f'<details>{title}<p class="text">{safe(thought + closed)}</p></details>'
    return f'<article>{text}<p class="text">{safe(rest.strip())}</p></article>'


def dropped_section(cfg: Config) -> str:
    """Some of the rows that the last step dropped; reasons take turns, so rare ones are seen."""
    path, columns = beside(cfg.rows, "dropped.jsonl"), ("id", "step", "reason", "detail")
    seen, chosen, draw = Counter(), defaultdict(list), random.Random(cfg.seed)
    for row in lines_of(path) if path.is_file() else ():
        seen[row["reason"]] += 1
        keep(chosen[row["reason"]], row, seen[row["reason"]], cfg.examples, draw)
    turns = [row for turn in zip_longest(*chosen.values()) for row in turn if row]
    lines = [[row[column] for column in columns] for row in turns[: cfg.examples]]
    return f"<p>{seen.total():,} in all; reasons take turns.</p>" + table(columns, lines)


def files_section(chain: dict[Path, dict], last: Path, sha256: str) -> str:
    marks = {place: mark for report in chain.values() for place, mark in report["inputs"].items()}
    lines = []
    for path, mark in (marks | {last: f"sha256 {sha256}"}).items():
        report = read_report(path)  # scores and benchmarks have theirs, too
        commit = report.get("commit") or {"hash": "unknown", "dirty": False}
        changed = " with uncommitted changes" * commit["dirty"]
        name = os.path.relpath(path, last.parent)
        command, mark = (Html(f"<code>{safe(text)}</code>") for text in (report["command"], mark))
        lines.append((name, command, mark, commit["hash"] + changed))
    return table(("file", "command", "fingerprint", "commit"), lines)


def headline(found: Tally, kind: str) -> str:
    sources, pictured = len(found.counts["source"]), found.rows - found.counts["pictures"]["0"]
    return f"<b>{found.rows:,}</b> {kind} rows of {sources} sources, {pictured:,} with pictures"


PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$name</title><style>$css</style></head><body>
<header><div><p class="kicker">$name</p><h1>$headline</h1></div></header>
<main><div class="insight $tone"><h3>$verdict</h3>$wrong</div>
$sections</main><footer></footer></body></html>
""")

OWN_CSS = """
header{grid-template-columns:1fr;margin-bottom:12px}.no p{color:var(--bad)}
.wide code{display:block;width:280px;white-space:normal;overflow-wrap:anywhere;font-size:13px}
.wide{overflow:auto;max-height:1200px;margin:16px 0}.wide th,.wide td{width:auto;padding:8px 12px}
.wide th{white-space:nowrap;max-width:46vw;overflow:hidden;text-overflow:ellipsis}
.wide tbody th{position:sticky;left:0;background:var(--card)}.wide td{white-space:nowrap}
td b{display:block;height:4px;border-radius:2px;margin-top:6px;background:#3f83d6}
.wide td:last-child:not(:has(b)){min-width:240px;white-space:normal;overflow-wrap:anywhere}
.two{grid-template-columns:repeat(2,minmax(0,1fr));align-items:start}.two .wide{margin:0}
summary{cursor:pointer;margin-top:16px}article h3{margin:0;font-size:15px;overflow-wrap:anywhere}
article img{display:block;max-width:100%;margin:10px 0;border-radius:6px;background:#fff}
.text{white-space:pre-wrap;overflow-wrap:anywhere;font-size:14px;margin:8px 0;max-height:480px;
overflow-y:auto}
@media (max-width:640px){.two{grid-template-columns:minmax(0,1fr)}table{display:table}
thead{display:table-header-group}tbody{display:table-row-group}tr{display:table-row}
.wide th,.wide td{display:table-cell;border-top:1px solid var(--line)}}
"""


def main(cfg: Config) -> None:
    chain, last = {}, Path(cfg.rows).resolve()
    follow(last, chain)
    report, found = chain[last], tally(cfg)
    wrong = [*lost_rows(chain), *not_as_reported(found, report, last.name)]
    sections = {
        "The funnel": funnel_section(chain),
        "Composition": composition(found),
        "Lengths, difficulty, losses": histograms(found, report),
        "Contamination": contamination(cfg, report),
        "Rows drawn by lot": "".join(example(row, last.parent) for row in found.examples),
        "Dropped rows drawn by lot": dropped_section(cfg),
        "Every file": files_section(chain, last, found.sha256),
    }
    text = PAGE.substitute(
        css=CSS + OWN_CSS,
        name=safe(last.name),
        headline=headline(found, safe(report["config"].get("kind", "").upper())),
        tone="no" if wrong else "yes",
        verdict=f"Found wrong: {len(wrong):,}" if wrong else "Nothing contradicts the reports",
        wrong="".join(f"<p>{safe(line)}</p>" for line in wrong),
        sections="".join(f"<section><h2>{h}</h2>{text}</section>" for h, text in sections.items()),
    )
    out = beside(cfg.rows, "card.html")
    out.write_text(text, encoding="utf-8")
    said = "".join(f"WRONG: {line}\n" for line in wrong)
    print(f"{said}{out}".encode(errors="replace").decode())


if __name__ == "__main__":
    run_main(main, Config)
