"""Token by token: what sampler and critic made of single rollouts of RL.

    RUN/trace.jsonl, one rollout a line ──▶ a section of report.html, or a page of its own

    python -m miniature.tokens --run out/laptop/rl   # out/laptop/rl/tokens.html
    python -m miniature.tokens --run out/laptop/rl --step 40 --out tokens.html

rl.py keeps up to four rollouts a step, samples of one problem (tools/trace.py). Their tokens are
coloured by advantage (blue: made likelier, orange: less likely) or by value. The curve below is the
critic's forecast V before each token beside the return that came, tinted from where on it stays
within 1/2 of that; faint is the surprise -log p of the token. GRPO has no critic: there it is the
surprise alone. Of long responses beginning and end are shown. Tokens are hostile: they travel as
JSON without a "<" and reach the page as text alone.
"""

import base64
import io
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Template

from common.log import run_main

LISTS = ("tokens", "logps", "values", "advantages")  # an entry a token each
KEYS = "step id sample source prompt images answer status reward stopped length".split() + [*LISTS]
END = 1000  # tokens that are shown of a long response, at its beginning and at its end
SIDE = 320  # pixels of a picture


@dataclass(frozen=True)
class Config:
    run: Path = Path("out/laptop/rl")  # run directory of rl.py
    step: int | None = None  # opened first; none: the last whose samples differ in reward
    steps: int = 12  # embedded at most, first and last among them; the miniature's 12: 0.3 MB
    out: Path | None = None  # HTML to write; none: tokens.html in the run


def parse(line: bytes) -> dict:
    """A row; ValueError or TypeError says what is wrong with it."""
    row = json.loads(line, parse_constant=int)  # int refuses NaN, as browsers do
    if missing := [key for key in KEYS if key not in row]:
        raise ValueError(f"without {', '.join(missing)}")
    sizes = {name: len(row[name]) for name in LISTS if row[name] is not None or name != "values"}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"lists of different lengths, {sizes}")
    return row


def read(path: Path) -> Iterator[dict]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield parse(line)
            except (ValueError, TypeError) as error:  # broken JSON, broken UTF-8, no such row
                raise ValueError(f"{path}, line {number}: {error}; delete this line") from None


def shortened(row: dict) -> dict:
    """ "skipped": after how many tokens of a long response how many are not here."""
    row, size = {key: row[key] for key in KEYS}, len(row["tokens"])
    if size <= 2 * END:
        return row
    ends = {name: row[name] and row[name][:END] + row[name][-END:] for name in LISTS}
    return row | ends | {"skipped": [END, size - 2 * END]}


def picture(path: str) -> str:
    from common.data import load_image  # here: other pages use this file without torch

    image, file = load_image(path), io.BytesIO()
    image.thumbnail((SIDE, SIDE))
    image.save(file, "webp")
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def spread(steps: list[int], count: int) -> list[int]:
    """At most `count` of sorted steps, evenly, the first and the last among them."""
    ends = max(1, count - 1)
    return sorted({steps[round(i * (len(steps) - 1) / ends)] for i in range(ends + 1) if steps})


def gather(path: Path, count: int, step: int | None) -> dict:
    """What the page embeds. The file is read twice: a real run's need not fit in memory."""
    rewards = defaultdict(set)
    for row in read(path):
        rewards[row["step"]].add(row["reward"])
    wanted, asked = spread(sorted(rewards), count), {step} - {None}
    if asked - rewards.keys():
        raise ValueError(f"--step {step} is not in {path}; there are {wanted} and steps between")
    wanted = sorted({*wanted, *asked})
    rows = [shortened(row) for row in read(path) if row["step"] in wanted]
    files = dict.fromkeys(file for row in rows for file in row["images"])
    if lost := [file for file in files if not Path(file).is_file()]:
        print(f"{path}: {len(lost)} pictures are not there and not shown, as {lost[0]}")
    places = {file: place for place, file in enumerate(file for file in files if file not in lost)}
    for row in rows:  # samples share the pictures: places in one list
        row["images"] = [places[file] for file in row["images"] if file in places]
    mixed = (each for each in wanted if len(rewards[each]) > 1)
    opened = [None, *wanted, *mixed, *asked][-1]
    pictures = [picture(file) for file in places]
    return {"open": opened, "steps": wanted, "rows": rows, "pictures": pictures}


def section(run: Path, steps: int = Config.steps, step: int | None = None) -> str:
    """HTML with its style, data and script; empty where the run has no trace."""
    path = run / "trace.jsonl"
    found = gather(path, steps, step) if path.is_file() else {"rows": []}
    data = json.dumps(found, separators=(",", ":")).replace("<", "\\u003c")  # no </, no <!--
    return SECTION.substitute(css=OWN_CSS, data=data, script=SCRIPT) if found["rows"] else ""


def main(cfg: Config) -> None:
    if not (body := section(cfg.run, cfg.steps, cfg.step)):
        raise FileNotFoundError(f"--run {cfg.run}: no trace.jsonl with rows in it, from rl.py")
    out = cfg.out or cfg.run / "tokens.html"
    out.write_text(PAGE.substitute(section=body), encoding="utf-8")
    print(f"{out}: {len(body) / 1e6:.1f} MB")


PAGE = Template("""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>Token by token</title>
<style>:root{color-scheme:light dark;--ink:CanvasText;--card:Canvas;--line:#8886;--good:#2c8a57;
--soft:color-mix(in srgb,CanvasText 65%,Canvas);--bad:#d0574c}*{box-sizing:border-box}body{padding:
0 14px;font:16px/1.55 system-ui,sans-serif;max-width:1108px;margin:24px auto}h2 span{font:14px
system-ui}</style></head><body>$section</body></html>""")

SECTION = Template("""<section id="tokens"><style>$css</style>
<h2>Token by token <span>where did the critic know?</span></h2>
<p>Samples of a problem, as RL drew them. Hover, tap, or walk with the arrow keys. V is the reward
that the critic expects before a token, the advantage what it was credited with.</p>
<div class="tk-bar"><label>Step <input type="range" min="0"><output></output></label>
<div role="group" aria-label="sample"></div><div role="group" aria-label="colour by"></div></div>
<div class="tk-body"><aside></aside><div><div class="tk-scale"></div>
<div class="tk-text" role="listbox" aria-label="tokens of the response"></div>
<div class="tk-panel"><dl></dl><div class="tk-curve"><div></div>
<svg viewBox="0 0 1 1" preserveAspectRatio="none" role="img"></svg></div><p></p></div></div></div>
<script type="application/json">$data</script><script type="module">$script</script></section>""")

SCRIPT = r"""
const root = document.getElementById("tokens"), find = name => root.querySelector(name);
const all = JSON.parse(find("script").textContent), text = find(".tk-text"), svg = find("svg");
const [samples, modes] = root.querySelectorAll("[role=group]"), slider = find("input");
const MODES = {  // label, unit, the number of token i of rollout r
  advantage: ["Advantage", "standard deviations; + made likelier", (r, i) => r.advantages[i]],
  value: ["Value", "expected reward, before the token", (r, i) => r.values?.[i] ?? 0],
};
let row, mode = "advantage", tokens = [], marked = 0, point;
const show = x => String(+x.toPrecision(3)).replace("-", "−");
const plain = token => token.replace(/[\p{Cc}\p{Cf}\u2028\u2029]/gu, c => c === "\n" ? "↵"
  : "\\u" + c.codePointAt(0).toString(16).padStart(4, "0")) || "∅";
const at = i => i + 1 + (row.skipped && i >= row.skipped[0] ? row.skipped[1] : 0);
function make(tag, more, ...inside) {
  const element = Object.assign(document.createElement(tag), more);
  return element.append(...inside) ?? element;
}
function scale(name) {  // -> [ends of the legend, share of full colour], one for all steps
  const every = all.rows.flatMap(r => r.tokens.map((_, i) => Math.abs(MODES[name][2](r, i))));
  every.sort((a, b) => a - b);
  const top = name === "value" ? 1 : every[Math.floor(every.length * 0.98)] || 1;  // 2 % saturate
  return [[name === "advantage" ? -top : 0, top], x => x / top];
}
const color = share => `rgb(var(--tk-${share < 0 ? "down" : mode}) / calc(var(--tk-most) * `
  + `${Math.min(1, Math.abs(share)).toFixed(3)}))`;
function paint(name) {
  mode = name;
  const [[low, high], share] = scale(mode), [, unit, number] = MODES[mode];
  tokens.forEach((token, i) => { token.style.background = color(share(number(row, i))); });
  const bar = make("i"), middle = (low + high) / 2;
  bar.style.background = `linear-gradient(90deg, ${[low, middle, high].map(x => color(share(x)))})`;
  find(".tk-scale").replaceChildren(unit, make("span", {}, show(low), bar, show(high)));
  for (const button of modes.children) button.ariaPressed = button.name === mode;
}
function mark(i) {  // a token: its numbers, its place on the curve, where Tab comes to
  if (!tokens[i]) return;
  const a = row.advantages[i], push = a > 0 ? "likelier" : a < 0 ? "less likely" : "no push";
  const numbers = Object.entries({token: plain(row.tokens[i]),
    place: `${at(i)} of ${row.length}`, "log p": show(row.logps[i]),
    "value V": row.values ? show(row.values[i]) : "no critic", [`advantage: ${push}`]: show(a)});
  find("dl").replaceChildren(...numbers.map(([name, value]) =>
    make("div", {}, make("dt", {}, name), make("dd", {}, value))));
  Object.assign(tokens[marked] ?? {}, {ariaSelected: false, tabIndex: -1});
  Object.assign(tokens[marked = i], {ariaSelected: true, tabIndex: 0, ariaLabel: numbers.join()});
  find(".at").setAttribute("d", `M${point(i)[0]} 0V1`);
  find(".dot").setAttribute("d", `M${point(i)}h0`);
}
function draw() {  // the curve and what it says; -> the token that moved V most
  const v = row.values ?? [], n = tokens.length, surprise = row.logps.map(u => -u);
  const most = Math.max(...surprise, 1e-9);
  const low = Math.min(0, row.reward, ...v), high = Math.max(1, row.reward, ...v);
  const x = i => n > 1 ? i / (n - 1) : 0.5, y = u => 1 - (u - low) / (high - low);
  const line = (list, to) => list.map((u, i) =>  // broken where tokens are left out
    `${i && i !== row.skipped?.[0] ? "L" : "M"}${x(i)} ${to(u)}`).join("");
  const path = (name, d = "") => `<path class="${name}" d="${d}"/>`;
  const knew = v.findLastIndex(u => Math.abs(u - row.reward) >= 0.5) + 1;
  point = i => [x(i), v.length ? y(v[i]) : 1 - surprise[i] / most];
  svg.innerHTML = path("knew", knew && knew < v.length ? `M${x(knew)} 0H1V1H${x(knew)}z` : "") +
    path("surprise", line(surprise, u => 1 - u / most)) +
    path("return", `M0 ${y(row.reward)}H1`) + path("value", line(v, y)) + path("at") + path("dot");
  find(".tk-curve div").replaceChildren(...[high, low].map(u => make("span", {}, show(u))));
  const moves = v.slice(1).map((u, i) => i + 1 === row.skipped?.[0] ? 0 : u - v[i]);
  const sizes = moves.map(Math.abs), moved = Math.max(0, sizes.indexOf(Math.max(...sizes)));
  const key = (name, said) => make("span", {className: name}, said);
  find(".tk-panel p").replaceChildren(key("value", v.length ? "V" : "no critic"),
    key("return", `return ${show(row.reward)}`), key("surprise", `−log p, 0 to ${show(most)}`),
    !v.length ? "" : !knew ? "V is within ½ of the return all along. " : knew < v.length
      ? `From token ${at(knew)} on V stays within ½ of the return. `
      : "V does not end within ½ of the return. ",
    moves.length ? `V moved most, by ${show(moves[moved])}, on token ${at(moved)}.` : "");
  return moved;
}
function open(chosen) {  // a rollout
  row = chosen;
  const rows = all.rows.filter(r => r.step === row.step), tick = r => r.reward === 1 ? "✓" : "✗";
  slider.value = all.steps.indexOf(row.step);
  slider.ariaValueText = find("output").textContent = row.step;
  samples.replaceChildren(...rows.map(r => make("button", {type: "button", onclick: () => open(r),
    ariaPressed: r === row, title: r.id}, `${tick(r)} sample ${r.sample}`)));
  find("aside").replaceChildren(
    ...row.images.map(p => make("img", {alt: `picture of ${row.id}`, src: all.pictures[p]})),
    make("p", {}, row.prompt.replaceAll("<image>", "").trim()),
    make("p", {}, "Right: ", make("b", {}, row.answer)),
    make("p", {className: row.reward === 1 ? "tk-right" : "tk-wrong"},
      `${tick(row)} ${row.status}, reward ${show(row.reward)}${row.stopped ? "" : ", cut"}`),
    make("small", {}, `${row.id}, ${row.source}, ${row.length} tokens`));
  tokens = row.tokens.map(token =>
    make("span", {role: "option", tabIndex: -1}, plain(token).replaceAll("↵", "↵\n")));
  text.replaceChildren(...tokens.flatMap((token, i) => [row.skipped?.[0] === i
    ? make("em", {}, ` … ${row.skipped[1]} tokens left out … `) : make("wbr"), token]));
  modes.children.value.disabled = !row.values;
  paint(mode);
  mark(draw());
}
modes.append(...Object.entries(MODES).map(([name, [label]]) =>
  make("button", {type: "button", name, onclick: () => paint(name)}, label)));
slider.max = all.steps.length - 1;
slider.oninput = () => open(all.rows.find(r => r.step === all.steps[slider.value]));
text.onpointerover = event => mark(tokens.indexOf(event.target));
text.addEventListener("focusin", text.onpointerover);
text.onkeydown = ({key}) => tokens[marked + {ArrowLeft: -1, ArrowRight: 1}[key]]?.focus();
const near = event => Math.round(event.offsetX / svg.clientWidth * (tokens.length - 1));
svg.onpointermove = event => mark(near(event));
svg.onclick = event => tokens[near(event)]?.focus();
open(all.rows.find(r => r.step === all.open));
"""

OWN_CSS = """
#tokens{--tk-advantage:50 125 225;--tk-down:226 112 20;--tk-value:150 100 215;
--tk-surprise:20 150 140;--tk-most:.7}@media (prefers-color-scheme:dark){#tokens{--tk-most:.6}}
.tk-bar,.tk-bar *{display:flex;flex-wrap:wrap;gap:8px;align-items:center}.tk-bar{column-gap:32px}
.tk-bar button{font:inherit;font-size:14px;color:inherit;padding:6px 11px;background:var(--card);
border:1px solid var(--line);border-radius:8px}.tk-bar :disabled{opacity:.4}
.tk-bar [aria-pressed=true]{box-shadow:0 0 0 2px var(--ink)}.tk-body{display:grid;
grid-template-columns:230px minmax(0,1fr);gap:28px;margin-top:20px}.tk-body aside{align-self:start;
position:sticky;top:16px;overflow-wrap:anywhere}.tk-body aside p{margin:8px 0}.tk-right{
color:var(--good)}.tk-wrong{color:var(--bad)}.tk-body img{width:100%;max-width:250px;
border-radius:6px;image-rendering:pixelated}.tk-scale{font-size:13px}.tk-scale span{
white-space:nowrap;margin-left:12px}.tk-scale i{display:inline-block;width:150px;height:11px;
margin:0 8px}.tk-text{line-height:1.95;white-space:pre-wrap;overflow-wrap:anywhere;
margin:10px 0 16px}.tk-text span{padding:2px;margin:0 1px;border-radius:4px;cursor:pointer;
unicode-bidi:isolate;scroll-margin-bottom:300px}.tk-text [aria-selected=true]{
outline:2px solid var(--ink)}.tk-panel{position:sticky;bottom:0;background:var(--card);
border:1px solid var(--line);border-radius:12px;padding:12px 14px;font-size:12px}.tk-panel span{
margin-right:8px}.tk-panel,.tk-scale,.tk-body small{color:var(--soft)}.tk-panel p{margin:6px 0 0}
.tk-panel dl{display:grid;grid-template-columns:repeat(4,minmax(0,1fr));gap:4px 10px;margin:0 0 9px}
.tk-panel dd{margin:0;color:var(--ink);font-size:15px;font-weight:600;overflow:hidden}
.tk-curve,.tk-panel dd{display:flex;white-space:pre}.tk-curve div{display:grid;
align-content:space-between}.tk-curve svg{flex:1;min-width:0;height:84px;overflow:visible;
cursor:crosshair;touch-action:pan-y}.tk-curve path{fill:none;stroke:currentColor;
vector-effect:non-scaling-stroke;pointer-events:none}.tk-panel .value{color:rgb(var(--tk-value));
stroke-width:2}.tk-panel .surprise{stroke-opacity:.6;color:rgb(var(--tk-surprise))}
.tk-panel .return{color:var(--ink);stroke-dasharray:5 4}
.tk-curve .knew{fill:rgb(var(--tk-value)/.12);stroke:none}
.tk-curve .dot{color:var(--ink);stroke-width:9;stroke-linecap:round}@media (max-width:760px){
.tk-body{grid-template-columns:minmax(0,1fr);gap:14px}.tk-body aside{position:static;
display:flow-root}.tk-body img{float:left;width:40%;margin-right:14px}}
"""


if __name__ == "__main__":
    run_main(main, Config)
