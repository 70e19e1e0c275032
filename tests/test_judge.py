"""judge.py, against a server on this machine that says what the responses tell it to say."""

import json
import math
import re
from pathlib import Path

import bad_server
import pytest
from bad_server import HEAD, event, send
from conftest import write_rows

from evaluation import judge
from evaluation.behaviors import NAMES


class Scripted(bad_server.Server):
    """A response `verification=2` makes it say <count>2</count> where it is asked for that."""

    async def answer(self, body: dict, writer):
        prompt = body["messages"][0]["content"]
        self.requests.append((prompt, body))
        name = re.search(r"in the reasoning: (\w+)\.", prompt)
        said = re.search(rf"\b{name[1] if name else 'judge'}=(\S+)", prompt)
        word = said[1] if said else "0"
        if word == "400":
            return await send(writer, *bad_server.plain("400"), last=True)
        tag = "count" if name else "score" if "<score>" in prompt else "verdict"
        text = "".join(f"<{tag}> {said} </{tag}>" for said in word.split("|"))
        choice = {"delta": {"content": f"Let me see. {text}"}, "finish_reason": "stop"}
        await send(writer, HEAD.format(200, "text/event-stream", ""), event({"choices": [choice]}))
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
    said = ["verification=3 backtracking=1 subgoal_setting=1|2", "<think> a </think>"]
    first, second = judged(server, tmp_path, said)
    wanted = {"verification": 3, "backtracking": 1, "subgoal_setting": None}  # no count: never 0
    assert first == dict.fromkeys(NAMES, 0) | wanted
    assert second == dict.fromkeys(NAMES, 0)
    assert len(server.requests) == 16 and len({prompt for prompt, _ in server.requests}) == 16
    for prompt, body in server.requests:
        assert (body["temperature"], body["model"]) == (0, "m")
        assert "Problem" in prompt and "<count>N</count>" in prompt and "</think>" not in prompt
    assert judge.DEFINITIONS.keys() == set(NAMES)


def test_no_question_is_asked_twice(server, tmp_path):
    same = {"item": {"prompt": "the same"}}
    first = judged(server, tmp_path, ["verification=1"] * 3, **same)
    written = (tmp_path / "behaviors.jsonl").read_bytes()
    assert [counts["verification"] for counts in first] == [1, 1, 1]
    assert len(server.requests) == 8  # equal ones are one
    assert judged(server, tmp_path, ["verification=1"] * 3, **same) == first
    assert (tmp_path / "behaviors.jsonl").read_bytes() == written and len(server.requests) == 8
    judged(server, tmp_path, ["verification=2"], **same)
    assert len(server.requests) == 16  # another response is another question
    judged(server, tmp_path, ["verification=2"], model="another judge", **same)
    assert len(server.requests) == 24  # and so is another model


def test_what_the_server_rejects_is_none_and_asked_again_by_the_next_run(server, tmp_path, capsys):
    assert judged(server, tmp_path, ["verification=400"])[0]["verification"] is None
    assert "1 of 8 questions unanswered" in capsys.readouterr().out
    judged(server, tmp_path, ["verification=400"])
    assert len(server.requests) == 9


def test_answers_are_right_wrong_or_not_known(server, tmp_path):
    replies = ["judge=correct", "judge=incorrect", "judge=maybe"]
    replies += ["<think> judge=incorrect </think> judge=correct"]
    rubric = {"item": {"rubric": "Right if it is the same term."}}
    assert judged(server, tmp_path, replies, "answers", **rubric) == [1.0, 0.0, None, 1.0]
    prompt, _ = server.requests[0]
    assert "REFERENCE: 7" in prompt and "<think>" not in prompt
    assert "Right if it is the same term." in prompt
    scored = {"item": {"source": "mmvet"}}
    assert judged(server, tmp_path, ["judge=0.7", "judge=1.0"], "answers", **scored) == [0.7, 1.0]


def test_no_answer_is_wrong_without_a_judge_and_rules_suffice_for_other_items(server, tmp_path):
    replies = ["<think> judge=correct", "a </think> ", ""]
    assert judged(server, tmp_path, replies, "answers") == [0.0, 0.0, 0.0]
    cut = {"record": {"finish": "length"}}
    assert judged(server, tmp_path, ["judge=correct"], "answers", **cut) == [0.0]
    with pytest.raises(ValueError, match=f"{tmp_path} needs no judge"):
        judged(server, tmp_path, ["judge=correct"], "answers", item={"judge": False})
    assert server.requests == []


def test_a_sample_is_the_same_each_time_and_part_of_a_larger_one(server, tmp_path):
    responses = [f"verification={i}" for i in range(9)]

    def drawn(number: int) -> set[str]:
        judged(server, tmp_path, responses, sample=number)
        return {row["id"] for row in lines_of(tmp_path / "behaviors.jsonl")}

    assert len(drawn(3)) == 3 and drawn(3) == drawn(3) < drawn(6) < drawn(0)
    assert len(server.requests) == 72


def test_the_judges_rates_have_intervals_over_problems_and_leave_out_what_was_not_read(capsys):
    rows = []
    for i in range(100):
        counts = dict.fromkeys(NAMES, 0) | {"verification": 2 * (i < 40)}
        counts |= {"visual_verification": int(i < 10)}
        rows += [
            {"id": i, "counts": counts | {"backtracking": None} if n == 2 else counts}
            for n in range(3)
        ]
    judge.show_behaviors(rows)
    printed = capsys.readouterr().out
    assert "200 responses" in printed
    share, low, high = numbers(printed, "verification ")
    error = 1.96 * math.sqrt(0.4 * 0.6 / 100)  # of 100 problems: two equal samples say no more
    assert share == 40 and (low, high) == pytest.approx((40 - 100 * error, 40 + 100 * error), abs=2)
    assert numbers(printed, "visual_verification / verification: ")[0] == 25
    judge.show_behaviors([])


def numbers(printed: str, start: str) -> list[float]:
    line = next(line for line in printed.splitlines() if line.startswith(start))
    return [float(number) for number in re.findall(r"[\d.]+", line)]


def test_a_wrong_setting_is_refused_before_anything_is_asked(server, tmp_path):
    for changed in ({"sample": -1}, {"url": "localhost:8000"}):
        with pytest.raises(ValueError):
            config(server, tmp_path, ["a"], **changed)
