"""judge.py, against a server on this machine that says what the responses tell it to say."""

import json
import math
import re
from collections import Counter
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
        self.requests.append((prompt, body["seed"], body))
        name = re.search(r"in the reasoning: (\w+)\.", prompt)
        said = re.search(rf"\b{name[1] if name else 'judge'}=(\S+)", prompt)
        words = said[1].split(":") if said else ["0"]  # "none:2": the second time it says 2
        word = words[min(body["seed"], len(words) - 1)]
        if word == "400":
            return await send(writer, *bad_server.plain("400"), last=True)
        tag = "count" if name else "score" if "<score>" in prompt else "verdict"
        text = "".join(f"<{tag}> {said} </{tag}>" for said in word.split("|"))
        choice = {"delta": {"content": f"Let me see. {text}"}, "finish_reason": "stop"}
        await send(writer, HEAD.format(200, "text/event-stream", ""), event({"choices": [choice]}))
        await send(writer, "", "data: [DONE]\n\n", last=True)


@pytest.fixture
def judged(server, tmp_path):
    """Judges replies: responses[i] is the one to item i; `item` and `record` change all of them."""

    def judged(responses: list[str], what: str = "behaviors", item=(), record=(), **changed):
        item = {"source": "mathvista", "judge": True, "answer": "7"} | dict(item)
        record = {"sample": 0, "finish": "stop"} | dict(record)
        items = [{"id": f"q{i}", "prompt": f"Problem {i}"} | item for i in range(9)]
        rows = [{"id": f"q{i}", "response": text} | record for i, text in enumerate(responses)]
        write_rows(tmp_path / "items.jsonl", items)
        write_rows(tmp_path / "records.jsonl", rows)
        given = {"records": str(tmp_path), "what": what, "url": server.url, "model": "m"}
        judge.main(judge.Config(**given | changed))
        rows = rows_of(tmp_path / f"{'behaviors' if what == 'behaviors' else 'judged'}.jsonl")
        return [row["counts" if what == "behaviors" else "judge_score"] for row in rows]

    return judged


def rows_of(path: Path) -> list[dict]:
    return sorted(map(json.loads, path.read_text().splitlines()), key=lambda row: row["id"])


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


def test_each_behaviour_is_asked_once_a_response_at_temperature_0(server, judged):
    first, second = judged(["verification=3 backtracking=1", "<think> a </think>"])
    assert first == dict.fromkeys(NAMES, 0) | {"verification": 3, "backtracking": 1}
    assert second == dict.fromkeys(NAMES, 0)
    assert len(server.requests) == 16 and len({prompt for prompt, *_ in server.requests}) == 16
    for prompt, seed, body in server.requests:
        assert (seed, body["temperature"], body["model"]) == (0, 0, "m")
        assert "Problem" in prompt and "<count>N</count>" in prompt and "</think>" not in prompt


def test_a_missing_count_is_asked_for_once_more_and_is_then_none_and_never_0(server, judged):
    for _ in range(2):  # the second time both tries are made
        [found] = judged(["verification=none:2 backtracking=none subgoal_setting=1|2"])
        assert found["verification"] == 2
        assert found["backtracking"] is found["subgoal_setting"] is None
        assert Counter(seed for _, seed, _ in server.requests) == {0: 8, 1: 3}


def test_no_question_is_asked_twice(server, judged, tmp_path):
    same = {"item": {"prompt": "the same"}}
    first = judged(["verification=1"] * 3, **same)
    assert [counts["verification"] for counts in first] == [1, 1, 1]
    assert len(server.requests) == 8  # equal ones are one
    assert judged(["verification=1"] * 3, **same) == first and len(server.requests) == 8
    judged(["verification=2"], **same)
    assert len(server.requests) == 16  # another response is another question
    judged(["verification=2"], model="another judge", **same)
    assert len(server.requests) == 24  # and so is another model
    kept = [json.loads(line)["text"] for line in (tmp_path / "judge.jsonl").open()]
    assert len(kept) == 24 and all("<count>" in text for text in kept)  # as they came


def test_what_the_server_rejects_is_none_and_asked_again_by_the_next_run(server, judged, capsys):
    assert judged(["verification=400"])[0]["verification"] is None
    assert "1 of 8 questions unanswered" in capsys.readouterr().out
    judged(["verification=400"])
    assert len(server.requests) == 9


def test_answers_are_right_wrong_or_not_known(server, judged):
    replies = ["judge=correct", "judge=incorrect", "judge=maybe"]
    replies += ["<think> judge=incorrect </think> judge=correct"]
    rubric = {"rubric": "Right if it is the same term."}
    assert judged(replies, "answers", rubric) == [1.0, 0.0, None, 1.0]
    prompt, *_ = server.requests[0]
    assert "REFERENCE: 7" in prompt and "<think>" not in prompt and rubric["rubric"] in prompt
    assert judged(["judge=0.7", "judge=1.0"], "answers", {"source": "mmvet"}) == [0.7, 1.0]


def test_no_answer_is_wrong_without_a_judge_and_rules_suffice_for_other_items(server, judged):
    replies = ["<think> judge=correct", "a </think> ", ""]
    assert judged(replies, "answers") == [0.0, 0.0, 0.0]
    assert judged(["judge=correct"], "answers", record={"finish": "length"}) == [0.0]
    with pytest.raises(ValueError, match="needs no judge"):
        judged(["judge=correct"], "answers", {"judge": False})
    with pytest.raises(ValueError, match="url"):
        judged(["judge=correct"], url="localhost:8000")
    assert server.requests == []


def test_a_sample_is_the_same_each_time_and_part_of_a_larger_one(server, judged, tmp_path):
    def drawn(number: int) -> set[str]:
        judged([f"verification={i}" for i in range(9)], sample=number)
        return {row["id"] for row in rows_of(tmp_path / "behaviors.jsonl")}

    assert len(drawn(3)) == 3 and drawn(3) == drawn(3) < drawn(6) < drawn(0)
    assert len(server.requests) == 72


def numbers(printed: str, start: str) -> list[float]:
    [line] = [line for line in printed.splitlines() if line.startswith(start)]
    return [float(number) for number in re.findall(r"[\d.]+", line)]


def test_the_lexicon_is_put_right_by_a_judged_sample(capsys):
    """It hears 300 of 600 responses; of 200 that are judged it hears 80 of 100, and 20 of none."""
    hears = [1] * 80 + [0] * 20 + [1] * 20 + [0] * 80 + [1] * 200 + [0] * 200
    texts = ["let me check that ." if heard else "nothing ." for heard in hears]
    records = [{"id": i, "sample": 0, "response": text} for i, text in enumerate(texts)]
    counts = [dict.fromkeys(NAMES, 0) | {"verification": int(i < 100)} for i in range(200)]
    judge.show(records, [{"id": i, "sample": 0, "counts": of} for i, of in enumerate(counts)])
    heard, right, low, high, judged, *_ = numbers(capsys.readouterr().out, "verification ")
    assert (heard, right, judged) == (50, 50, 50) and low < 50 < high  # (.5+.8-1) / (.8+.8-1)


def test_the_judges_rates_have_intervals_over_problems_and_leave_out_what_was_not_read(capsys):
    rows = []
    for i in range(300):  # two equal samples of 100 problems; a third could not be read
        counts = dict.fromkeys(NAMES, 0) | {"verification": 2 * (i % 100 < 40)}
        counts |= {"visual_verification": int(i % 100 < 10)}
        counts |= {"backtracking": None} if i >= 200 else {}
        rows.append({"id": i % 100, "sample": i // 100, "counts": counts})
    judge.show([row | {"response": "x"} for row in rows], rows)
    printed = capsys.readouterr().out
    *_, share, low, high = numbers(printed, "verification ")
    error = 100 * 1.96 * math.sqrt(0.4 * 0.6 / 100)  # of 100 problems
    assert "judge, 200" in printed
    assert share == 40 and (low, high) == pytest.approx((40 - error, 40 + error), abs=2)
    assert numbers(printed, "visual_verification / verification: ")[0] == 25
    judge.show([row | {"response": "x"} for row in rows], rows[200:])  # none could be read
    assert "verification / verification: n/a" in capsys.readouterr().out
