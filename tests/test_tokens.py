"""Token by token, against the rows it is made of, and in a browser where there is one."""

import base64
import io
import json
import random
import re
import shutil
import subprocess
from html import unescape

import pytest
from conftest import write_rows
from PIL import Image

from miniature import report, tokens

HOSTILE = ["</script><script>document.title='broken'</script>", "<!--<script>", "\"'", "\n", "\x00"]
HOSTILE += ["\u202e", "$css", " a ", "", "\ud800"]
LISTS = ("logps", "values", "advantages")


def rollout(step=0, sample=0, reward=0.0, said=HOSTILE, **more) -> dict:
    draw = random.Random(f"{step} {sample}")
    row = {"step": step, "id": f"train-{step}", "sample": sample, "source": "mini"}
    row |= {"prompt": "<image> what ?", "images": [], "answer": "14", "reward": reward}
    row |= {"status": "match", "stopped": True, "length": len(said), "tokens": said}
    for name in LISTS:
        row[name] = [round(draw.gauss(0, 1), 4) for _ in said]
    return row | more


def kept(folder, rows):
    write_rows(folder / "trace.jsonl", rows)
    return folder


def picture(path, shade) -> str:
    Image.new("RGB", (400, 200), (shade, 0, 0)).save(path)
    return str(path)


def data_of(section: str) -> str:
    data, script = re.findall("<script type=[^>]*>(.*?)</script>", section, re.DOTALL)
    assert script == tokens.SCRIPT
    return data


def embedded(section: str) -> dict:
    return json.loads(data_of(section))


def test_what_is_embedded_is_what_was_kept_number_by_number_and_token_by_token(tmp_path):
    rows = [rollout(step, k, extra="not shown") for step in range(3) for k in range(4)]
    found = embedded(tokens.section(kept(tmp_path, rows)))
    assert found["rows"] == [{k: v for k, v in row.items() if k != "extra"} for row in rows]


def test_pictures_are_embedded_once_and_small_and_those_that_are_gone_are_said(tmp_path, capsys):
    files = [picture(tmp_path / f"{shade}.png", shade) for shade in (50, 200)]
    gone = str(tmp_path / "gone.png")
    rows = [rollout(k, 0, images=images) for k, images in enumerate([files, files[1:], [gone]])]
    found = embedded(tokens.section(kept(tmp_path, rows)))
    assert [row["images"] for row in found["rows"]] == [[0, 1], [1], []]
    for uri, shade in zip(found["pictures"], (50, 200), strict=True):
        image = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
        assert image.size == (320, 160) and abs(image.getpixel((9, 9))[0] - shade) < 9
    assert f"1 pictures are not there and not shown, as {gone}" in capsys.readouterr().out


def test_of_a_long_response_beginning_and_end_are_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "END", 3)
    long, short = rollout(said=[*"abcdefghij"], values=None), rollout(1, said=[*"abcdef"])
    found, same = embedded(tokens.section(kept(tmp_path, [long, short])))["rows"]
    assert found["tokens"] == [*"abchij"] and found["skipped"] == [3, 4] and found["length"] == 10
    assert found["logps"] == long["logps"][:3] + long["logps"][7:] and found["values"] is None
    assert same == short


def test_hostile_tokens_are_data_alone(tmp_path):
    names = dict.fromkeys(("id", "source", "prompt", "answer", "status"), " ".join(HOSTILE))
    bad = tokens.section(kept(tmp_path, [rollout(**names)]))
    plain = tokens.section(kept(tmp_path, [rollout(tokens=["a"] * len(HOSTILE))]))
    assert bad.replace(data_of(bad), "") == plain.replace(data_of(plain), "")
    assert "<" not in data_of(bad) and data_of(bad).isascii()
    assert embedded(bad)["rows"][0]["answer"] == names["answer"]


@pytest.mark.parametrize("count", [2, 3, 12, 40])
def test_steps_are_spread_evenly_between_the_first_and_the_last(count):
    for n in (1, 2, 5, 12, 13, 100, 1000):
        steps = [7 + 3 * i for i in range(n)]
        found = tokens.spread(steps, count)
        assert len(found) == min(n, count) and {steps[0], steps[-1]} <= {*found} <= {*steps}
        gaps = {b - a for a, b in zip(found, found[1:], strict=False)}
        assert max(gaps, default=0) - min(gaps, default=0) <= 3  # no more than a step


def test_the_step_asked_for_is_there_and_open_else_the_last_with_right_and_wrong_samples(tmp_path):
    rows = [rollout(s, k, float(k and s in (4, 9))) for s in range(30) for k in range(2)]
    kept(tmp_path, rows)
    found = embedded(tokens.section(tmp_path, steps=30))
    assert found["open"] == 9 and len(found["rows"]) == 60
    for step, steps, opened in ((None, [0, 29], 29), (0, [0, 29], 0), (4, [0, 4, 29], 4)):
        found = embedded(tokens.section(tmp_path, steps=2, step=step))
        assert found["steps"] == steps and found["open"] == opened
    with pytest.raises(ValueError, match="--step 31 is not in .*trace.jsonl"):
        tokens.section(tmp_path, step=31)


def test_without_a_trace_there_is_no_section(tmp_path):
    assert tokens.section(tmp_path) == "" == tokens.section(kept(tmp_path, []))
    with pytest.raises(FileNotFoundError, match="no trace.jsonl"):
        tokens.main(tokens.Config(run=tmp_path))


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        (json.dumps(rollout())[:-9], "delimiter|Unterminated|Expecting"),
        (json.dumps(rollout(logps=[float("nan")] * len(HOSTILE))), "NaN"),
        (json.dumps(rollout(advantages=[0.5])), "different lengths, .*'advantages': 1"),
        (json.dumps(rollout(logps=3)), "has no len"),
        ('{"step": 3}', "without id, sample"),
        ("[1]", "without step"),
        ("\xff", "decode|Expecting"),
    ],
)
def test_a_broken_line_is_named_with_its_file_and_the_cure(tmp_path, line, wrong):
    kept(tmp_path, [rollout(), rollout()])
    with (tmp_path / "trace.jsonl").open("ab") as file:
        file.write(line.encode("latin-1") + b"\n")
    with pytest.raises(ValueError, match=f"trace.jsonl, line 3: .*({wrong}).*delete this line"):
        tokens.section(tmp_path)


def test_the_report_has_the_section_of_its_rl_run(tmp_path):
    (tmp_path / "rl").mkdir()
    write_rows(tmp_path / "rl" / "run.json", [{"config": {}}])
    kept(tmp_path / "rl", [rollout()])
    report.main(report.Config(tmp_path))
    page = (tmp_path / "report.html").read_text()
    assert page.count(tokens.section(tmp_path / "rl")) == 1
    assert not re.search(r"https?://|<link|@import|src=\"(?!data:)", page)


def test_a_browser_shows_the_numbers_of_the_token_that_is_pointed_at(tmp_path, monkeypatch):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no chromium on this machine")
    monkeypatch.setattr(tokens, "END", 5)
    said = [*HOSTILE[:5], *"filler" * 15, *HOSTILE[5:-1]]
    said.append("é")  # in place of half a character, which --dump-dom cannot print
    ppo, grpo = rollout(reward=1.0, said=said), rollout(sample=1, said=said, values=None)
    tokens.main(tokens.Config(run=kept(tmp_path, [ppo, grpo])))
    acts = """HTMLElement.prototype.focus = function() {  // a window may open without the focus
      this.dispatchEvent(new FocusEvent("focusin", {bubbles: true}));
    };
    (function act_when_laid_out() {  // and without a size
      if (!svg.clientWidth) return setTimeout(act_when_laid_out, 20);
      const notes = [document.title], {right, y} = svg.getBoundingClientRect();
      const act = (on, kind, name, more) => {
        if (kind) on.dispatchEvent(new kind(name, {bubbles: true, ...more})); else on[name]();
        notes.push([...find("dl").children].map(cell => cell.lastChild.textContent));
      };
      act(tokens[0], PointerEvent, "pointerover");
      act(tokens[3], null, "focus");
      act(tokens[3], KeyboardEvent, "keydown", {key: "ArrowRight"});
      act(svg, PointerEvent, "pointermove", {clientX: right, clientY: y + 9});
      act(samples.lastChild, null, "click");
      document.title = JSON.stringify([...notes, modes.children.value.disabled]);
    })();"""
    page = tmp_path / "tokens.html"
    page.write_text(page.read_text().replace(tokens.SCRIPT, tokens.SCRIPT + acts))
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--virtual-time-budget=10000", "--window-size=1000,800"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"file://{page}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    title, *notes, disabled = json.loads(unescape(re.search("<title>(.*)</title>", done.stdout)[1]))
    assert title == "Token by token" and disabled
    ends = (0, 3, 4, -1, 0)
    assert [note[0] for note in notes] == [said[0], "↵", "\\u0000", "é", said[0]]
    assert [note[1].split()[0] for note in notes] == ["1", "4", "5", "100", "1"]
    for note, row, i in zip(notes, (ppo, ppo, ppo, ppo, grpo), ends, strict=True):
        for name, text in zip(LISTS, note[2:], strict=True):
            number = None if text == "no critic" else float(text.replace("−", "-"))
            assert number == (row[name] and pytest.approx(row[name][i], rel=5e-3))
