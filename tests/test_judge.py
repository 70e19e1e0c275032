"""judge.py, against a server on this machine that says what the responses tell it to say."""

import itertools
import math
import re
from collections import Counter

import bad_server
import pytest
from bad_server import HEAD, event, send
from conftest import write_rows

from common.records import read_rows
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
        file, name = ("behaviors", "counts") if what == "behaviors" else ("judged", "judge_score")
        rows = {row["id"]: row[name] for row in read_rows(tmp_path / f"{file}.jsonl")}
        return [rows[name] for name in sorted(rows)]

    return judged


READ = {  # tag: what stands in a reply, and what is read from it
    "count": {"so <count>\n 3 </count>.": 3, "": None, "<count>2.5</count>": None,
              "<think> <count>N</count>? </think> <count>12</count>": 12, "<count></count>": None,
              "<count>-1</count>": None, "<count>1</count> <count>2</count>": None,
              "<count>1": None},
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
    assert len(server.requests) == len({prompt for prompt, *_ in server.requests}) == 16
    for prompt, seed, body in server.requests:
        assert (seed, body["temperature"], body["model"]) == (0, 0, "m")
        assert "Problem" in prompt and "</think>" not in prompt


def test_a_count_that_is_missing_twice_or_rejected_is_none_and_the_rejected_is_asked_anew(
    server, judged, capsys
):
    words = {"verification": "none:2", "backtracking": "none", "subgoal_setting": "1|2"}
    words["backward_chaining"] = "400"
    for run in (0, 1):  # the second time two tries have been made, and no answer of the server's
        [found] = judged([" ".join(f"{name}={word}" for name, word in words.items())])
        assert found == dict.fromkeys(NAMES, 0) | dict.fromkeys(words, None) | {"verification": 2}
        assert Counter(seed for _, seed, _ in server.requests) == {0: 8 + run, 1: 3}
    assert "3 of 8 questions unanswered" in capsys.readouterr().out


def test_no_question_is_asked_twice(server, judged, tmp_path):
    same = {"item": {"prompt": "the same"}}
    for responses, changed, asked in (
        (["verification=1"] * 3, {}, 8),  # equal ones are one
        (["verification=1"] * 3, {}, 8),
        (["verification=2"], {}, 16),  # another response is another question
        (["verification=2"], {"model": "another judge"}, 24),
    ):
        counts = judged(responses, **same, **changed)
        assert [f"verification={of['verification']}" for of in counts] == responses
        assert len(server.requests) == asked
    kept = [row["text"] for row in read_rows(tmp_path / "judge.jsonl")]
    assert len(kept) == 24 and all("<count>" in text for text in kept)  # as they came


def test_answers_are_right_wrong_or_not_known(server, judged):
    replies = ["judge=correct", "judge=incorrect", "judge=maybe"]
    replies += ["<think> judge=incorrect </think> judge=correct"]
    assert judged(replies, "answers", {"rubric": "Of the same term."}) == [1.0, 0.0, None, 1.0]
    prompt, *_ = server.requests[0]
    assert "REFERENCE: 7" in prompt and "<think>" not in prompt and "Of the same term." in prompt
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


def test_a_sample_is_the_same_each_time_and_part_of_a_larger_one(server, judged):
    def drawn(number: int) -> set[int]:
        counts = judged([f"verification={i}" for i in range(9)], sample=number)
        return {of["verification"] for of in counts}

    assert len(drawn(3)) == 3 and drawn(3) == drawn(3) < drawn(6) < drawn(0)
    assert len(server.requests) == 72


def numbers(printed: str, start: str) -> list[float]:
    [line] = [line for line in printed.splitlines() if line.startswith(start)]
    return [float(number) for number in re.findall(r"[\d.]+", line)]


def test_rates_are_the_lexicons_the_same_put_right_and_the_judges_with_intervals_over_problems(
    capsys,
):
    """100 problems, six samples. Three are judged: the lexicon hears 80 % of what verifies, 20 % of
    the rest. In the third not all counts could be read. Of the other three it hears 30 %."""
    records, rows = [], []
    for sample, problem in itertools.product(range(6), range(100)):
        hears = problem < 40 or 50 <= problem < 60 if sample < 3 else problem < 30
        record = {"id": problem, "sample": sample}
        records.append(record | {"response": "let me check that ." if hears else "nothing ."})
        counts = {"verification": 2 * (problem < 50), "visual_verification": int(problem < 10)}
        counts |= {"backtracking": None} if sample == 2 else {}
        rows += [record | {"counts": dict.fromkeys(NAMES, 0) | counts}] if sample < 3 else []
    judge.show(records, rows)
    printed = capsys.readouterr().out
    heard, right, low, high, judged, *ends = numbers(printed, "verification ")
    assert (heard, right, judged) == (40, 33.3, 50) and low < right < high  # (.4+.8-1) / (.8+.8-1)
    error = 100 * 1.96 * math.sqrt(0.5 * 0.5 / 100)  # of 100 problems
    assert ends == pytest.approx([50 - error, 50 + error], abs=2)
    assert numbers(printed, "visual_verification / verification: ")[0] == 20
    judge.show(records, rows[200:])  # none could be read whole
    assert "verification / verification: n/a" in capsys.readouterr().out
