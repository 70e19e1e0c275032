"""judge.py, against a server on this machine that says what the responses tell it to say."""

import asyncio
import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import bad_server
import numpy as np
import pytest
from bad_server import HEAD, event, send
from conftest import write_rows

from evaluation import behaviors, judge
from evaluation.behaviors import NAMES


class Scripted(bad_server.Server):
    """A response `verification=none:2` makes it say "none" at first, and <count>2</count> then."""

    async def answer(self, body: dict, writer):
        prompt = body["messages"][0]["content"]
        self.requests.append((prompt, body["seed"], body))
        name = re.search(r"in the reasoning: (\w+)\.", prompt)
        said = re.search(rf"\b{name[1] if name else 'judge'}=(\S+)", prompt)
        words = said[1].split(":") if said else ["0"]
        word = words[min(body["seed"], len(words) - 1)]
        await asyncio.sleep(self.hold)
        if word == "400":
            return await send(writer, *bad_server.plain("400"), last=True)
        tag = "count" if name else "score" if "<score>" in prompt else "verdict"
        text = {"none": "I cannot tell.", "two": f"<{tag}>1</{tag}> or <{tag}>2</{tag}>"}
        text = f"Let me see. {text.get(word, f'<{tag}> {word} </{tag}>')}"
        choice = {"delta": {"content": text}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1000, "completion_tokens": 10}
        await send(writer, HEAD.format(200, "text/event-stream", ""), event({"choices": [choice]}))
        await send(writer, "", event({"choices": [], "usage": usage}))
        await send(writer, "", "data: [DONE]\n\n", last=True)


def config(server, folder: Path, responses: list[str], what: str = "behaviors", **changed):
    """responses[i] is the reply to item i; `item` and `record` change all items and records."""
    item = {"source": "mathvista", "judge": True} | changed.pop("item", {})
    record = {"sample": 0, "finish": "stop"} | changed.pop("record", {})
    items = [{"id": f"q{i}", "prompt": f"Problem {i}", "answer": "7"} | item for i in range(9)]
    rows = [{"id": f"q{i}", "response": text} | record for i, text in enumerate(responses)]
    write_rows(folder / "items.jsonl", items)
    write_rows(folder / "records.jsonl", rows)
    given = {"records": str(folder), "what": what}
    return judge.Config(**given | {"url": server.url, "model": "m"} | changed)


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def judged(server, folder: Path, responses: list[str], what: str = "behaviors", **changed) -> list:
    judge.main(config(server, folder, responses, what, **changed))
    rows = lines_of(folder / ("behaviors.jsonl" if what == "behaviors" else "judged.jsonl"))
    rows.sort(key=lambda row: row["id"])
    return [row["counts" if what == "behaviors" else "judge_score"] for row in rows]


READ = {  # tag: what stands in a reply, and what is read from it
    "count": {"so <count>3</count>": 3, "<count>\n 0 </count>.": 0, "three": None, "": None,
              "<think> <count>N</count>? </think> <count>12</count>": 12, "<count></count>": None,
              "<count>2.5</count>": None, "<count>-1</count>": None, "<count>two</count>": None,
              "<count>1</count> <count>2</count>": None, "<count>1": None},
    "verdict": {"<verdict>correct</verdict>": 1.0, "<verdict> incorrect </verdict>": 0.0,
                "<verdict>correct|incorrect</verdict>": None,
                "<verdict>not correct</verdict>": None},
    "score": {"<score>0.7</score>": 0.7, "<score>1</score>": 1.0, "<score>0.75</score>": None,
              "<score>1.1</score>": None, "<verdict>correct</verdict>": None},
}  # fmt: skip


@pytest.mark.parametrize("kind", READ)
def test_only_one_whole_tag_is_a_verdict(kind):
    assert {text: judge.read(kind, text) for text in READ[kind]} == READ[kind]


def test_each_behaviour_is_asked_once_a_response_at_temperature_0(server, tmp_path):
    first, second = judged(
        server, tmp_path, ["verification=3 backtracking=1", "<think> a </think>"]
    )
    assert first == dict.fromkeys(NAMES, 0) | {"verification": 3, "backtracking": 1}
    assert second == dict.fromkeys(NAMES, 0)
    assert len(server.requests) == 16 and len({prompt for prompt, *_ in server.requests}) == 16
    for prompt, seed, body in server.requests:
        assert (seed, body["temperature"], body["model"]) == (0, 0, "m")
        assert "Problem" in prompt and "<count>N</count>" in prompt and "</think>" not in prompt
    assert judge.DEFINITIONS.keys() == set(NAMES)


def test_a_missing_count_is_asked_for_once_more_and_is_then_none_and_never_0(server, tmp_path):
    found = judged(server, tmp_path, ["verification=none:2 backtracking=none subgoal_setting=two"])
    assert found[0]["verification"] == 2
    assert found[0]["backtracking"] is found[0]["subgoal_setting"] is None
    asked = Counter(seed for _, seed, _ in server.requests)
    assert asked == {0: 8, 1: 3}
    judged(server, tmp_path, ["verification=none:2 backtracking=none subgoal_setting=two"])
    assert len(server.requests) == 11  # both tries are made


def test_a_second_run_asks_nothing_and_the_tokens_are_those_of_all_runs(server, tmp_path, capsys):
    told = "16 replies, 16,000 prompt_tokens, 160 completion_tokens"
    first = judged(server, tmp_path, ["verification=2", "x"])
    written = (tmp_path / "behaviors.jsonl").read_bytes()
    assert told in capsys.readouterr().out
    assert judged(server, tmp_path, ["verification=2", "x"]) == first
    assert (tmp_path / "behaviors.jsonl").read_bytes() == written
    assert len(server.requests) == 16
    assert told in capsys.readouterr().out
    records = lines_of(tmp_path / "judge.jsonl")
    assert all("<count>" in r["text"] and r["completion_tokens"] == 10 for r in records)
    judged(server, tmp_path, ["verification=2", "y"])
    assert len(server.requests) == 24  # another response is another question
    judged(server, tmp_path, ["verification=2", "y"], model="another judge")
    assert len(server.requests) == 40  # and so is another model


def test_equal_questions_are_paid_for_once(server, tmp_path):
    same = {"item": {"prompt": "the same"}}
    assert judged(server, tmp_path, ["verification=1"] * 5, **same)[4]["verification"] == 1
    assert len(server.requests) == 8


def test_what_the_server_rejects_is_none_and_asked_again_by_the_next_run(server, tmp_path, capsys):
    assert judged(server, tmp_path, ["verification=400"])[0]["verification"] is None
    assert "1 requests failed" in capsys.readouterr().out
    assert len(lines_of(tmp_path / "judge.jsonl")) == 7
    judged(server, tmp_path, ["verification=400"])
    assert len(server.requests) == 9


def test_after_kill_9_nothing_that_was_answered_is_asked_again(server, tmp_path):
    server.hold = 0.2
    cfg = config(server, tmp_path, [f"verification={i}" for i in range(6)], concurrency=4)
    command = [sys.executable, "-m", "evaluation.judge", "--concurrency", "4"]
    for name in ("records", "what", "url", "model"):
        command += [f"--{name}", getattr(cfg, name)]
    process = subprocess.Popen(command)
    path, ends = tmp_path / "judge.jsonl", time.monotonic() + 300
    while len(server.requests) < 16:
        assert process.poll() is None and time.monotonic() < ends
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept, before = path.read_bytes().count(b"\n"), len(server.requests)
    assert before - 2 * 4 <= kept < 48  # all replies but those on the way
    with path.open("ab") as file:
        file.write(b'{"hash": "cut off in the')
    server.hold = 0.0
    judge.main(cfg)
    assert len(server.requests) - before == 48 - kept and len(lines_of(path)) == 48
    rows = lines_of(tmp_path / "behaviors.jsonl")
    assert sorted(row["counts"]["verification"] for row in rows) == [0, 1, 2, 3, 4, 5]


def test_answers_are_right_wrong_or_not_known(server, tmp_path):
    replies = ["judge=correct", "judge=incorrect", "judge=maybe", "judge=maybe:correct"]
    replies += ["<think> judge=incorrect </think> judge=correct"]
    assert judged(server, tmp_path, replies, "answers") == [1.0, 0.0, None, 1.0, 1.0]
    assert len(server.requests) == 7
    prompt = server.requests[0][0]
    assert "REFERENCE: 7" in prompt and "<think>" not in prompt


def test_mm_vet_has_a_score_and_a_rubric_is_handed_on(server, tmp_path):
    scored = {"item": {"source": "mmvet"}}
    assert judged(server, tmp_path, ["judge=0.7", "judge=1.0"], "answers", **scored) == [0.7, 1.0]
    rubric = {"item": {"rubric": "Right if it is the same term."}}
    judged(server, tmp_path, ["judge=correct"], "answers", **rubric)
    assert "Right if it is the same term." in server.requests[-1][0]


def test_no_answer_is_wrong_without_a_judge_and_rules_suffice_for_other_items(server, tmp_path):
    replies = ["<think> judge=correct", "a </think> ", ""]
    assert judged(server, tmp_path, replies, "answers") == [0.0, 0.0, 0.0]
    cut = {"record": {"finish": "length"}}
    assert judged(server, tmp_path, ["judge=correct"], "answers", **cut) == [0.0]
    with pytest.raises(ValueError, match="officially needs no judge; --all asks one"):
        judged(server, tmp_path, ["judge=correct"], "answers", item={"judge": False})
    assert server.requests == []
    every = {"item": {"judge": False}, "all": True}
    assert judged(server, tmp_path, ["judge=correct"], "answers", **every) == [1.0]


def test_a_sample_is_the_same_each_time_and_part_of_a_larger_one(server, tmp_path):
    responses = [f"verification={i}" for i in range(9)]

    def drawn(number: int) -> set[str]:
        judged(server, tmp_path, responses, sample=number)
        return {row["id"] for row in lines_of(tmp_path / "behaviors.jsonl")}

    assert len(drawn(3)) == 3 and drawn(3) == drawn(3) < drawn(6) < drawn(0)
    assert len(server.requests) == 72


def test_the_table_puts_the_lexicon_right_by_the_judge(capsys):
    rng = np.random.default_rng(0)
    records, rows = [], []
    for i in range(600):
        true, heard = rng.random() < 0.4, rng.random() < 0.2
        text = "Let me check." if true or heard else "So it is 4."
        records.append({"id": f"q{i}", "sample": 0, "response": text})
        if i % 2:
            counts = dict.fromkeys(NAMES, 0) | {"verification": 2 * true}
            rows.append({"id": f"q{i}", "sample": 0, "counts": counts})
    judge.show_behaviors(records, rows)
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("verification"))
    share, of, lexicon, right, low, high = map(float, re.findall(r"[\d.]+", line))
    texts = [record["response"] for record in records]
    assert of == 300 and lexicon == pytest.approx(
        100 * behaviors.rates(behaviors.presence(texts))["verification"], abs=0.1
    )
    assert abs(lexicon - 52) < 5 and abs(right - 40) < 5 and low < 40 < high and abs(share - 40) < 6


def test_a_wrong_setting_is_refused_before_anything_is_asked(server, tmp_path):
    for changed in ({"sample": -1}, {"max_tokens": 0}, {"url": "localhost:8000"}):
        with pytest.raises(ValueError):
            config(server, tmp_path, ["a"], **changed)
