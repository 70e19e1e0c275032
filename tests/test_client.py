"""client.py against a server with all bad manners."""

import re

import pytest
from bad_server import THOUGHT, serving
from PIL import Image

from common.client import Endpoint, Reply, ask_for_all, user_message


def replies(endpoint: Endpoint, words) -> list:
    """To requests that the server answers by `words`, in the order they ended."""
    bodies = [{"messages": [user_message(f"{i}: 2 + 3 ? [{w}]")]} for i, w in enumerate(words)]
    jobs, found = [[body] for body in bodies], []
    ask_for_all(endpoint, jobs, lambda job: job and job.pop(), lambda _, r: found.append(r))
    return found


def asked_once(server, words: str, **settings) -> Reply | None:
    found = replies(Endpoint(server.url, "m", **dict(stall=1.0, retries=2) | settings), [words])
    return found[0] if found else None


def test_a_reply_has_the_text_its_end_and_the_counted_tokens(server):
    text = f"<think>\n{THOUGHT}\n</think>\n\n\\boxed{{5}}"
    assert asked_once(server, "right") == Reply(text, None, "stop", 10, len(text.split()))
    thought = asked_once(server, "vllm")  # in a field of its own
    assert (thought.thought, thought.text) == (THOUGHT, "\\boxed{5}")


FAULTS = {"500": "status 500", "stall": "APITimeoutError", "cut": "APIConnectionError"}
FAULTS |= {"error": "APIError", "junk": "JSONDecodeError"}
FAULTS |= dict.fromkeys(("unfinished", "abort", "html"), "ValueError")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_tried_again_and_is_a_failure_when_it_stays(server, fault, capsys):
    assert asked_once(server, f"{fault} {fault} right").text.endswith("\\boxed{5}")
    assert asked_once(server, fault) is None and len(server.requests) == 6
    assert re.search(rf"1 requests failed: {FAULTS[fault]}: .", capsys.readouterr().out)


def test_what_the_server_rejects_is_not_asked_again_and_printed(server, capsys):
    assert asked_once(server, "400 right") is None and len(server.requests) == 1
    assert re.search("1 requests failed: status 400: .*context too long", capsys.readouterr().out)


@pytest.mark.parametrize("words", ["401", "404", "tomorrow"])
def test_what_all_requests_share_stops_with_the_cure_without_the_key(server, words, monkeypatch):
    monkeypatch.setenv("SECRET", "told")  # the server repeats it
    with pytest.raises(SystemExit, match=f"KEY to say {words}; check the key, .* ends in /v1"):
        asked_once(server, words, key_env="SECRET")
    assert len(server.requests) == 1
    assert "authorization: bearer told" in server.headers[0].lower()


def test_a_dead_server_and_one_that_rejects_everything_are_not_asked_to_the_end(server):
    with pytest.raises(SystemExit, match="127.0.0.1:9/v1: .*does it run"):
        replies(Endpoint("http://127.0.0.1:9/v1", "m", retries=1), ["right"] * 100)
    with pytest.raises(SystemExit, match="50 failures and no reply since: .*context too long"):
        replies(Endpoint(server.url, "m", concurrency=4), ["400"] * 10_000)
    assert 50 <= len(server.requests) <= 54
    found = replies(Endpoint(server.url, "m", concurrency=1, retries=0), ["500", "right"] * 60)
    assert len(found) == 60  # a failure between two replies stops nothing


def test_a_key_that_is_missing_or_given_as_a_setting_is_refused():
    with pytest.raises(RuntimeError, match="no ABSENT: export ABSENT="):
        replies(Endpoint("http://127.0.0.1:9/v1", "m", key_env="ABSENT"), ["right"])
    with pytest.raises(ValueError, match="NAME of an environment variable") as error:
        Endpoint("http://127.0.0.1:9/v1", "m", key_env="sk-s3cr3t")
    assert "s3cr3t" not in str(error.value)


@pytest.mark.usefixtures("impatient")
def test_jobs_are_pulled_one_by_one_as_places_become_free():
    pulled, done = [], []

    def jobs():
        for i in range(40):
            pulled.append(i)
            assert len(pulled) <= len(done) + 5
            yield i

    def request(job):
        return None if job in done else {"messages": [user_message(f"{job} 1 + 1 [right]")]}

    with serving(hold=0.02) as server:
        endpoint = Endpoint(server.url, "m", concurrency=5)
        ask_for_all(endpoint, jobs(), request, lambda job, _: done.append(job))
    assert sorted(done) == pulled == [*range(40)]
    assert server.connections == 5  # all at once, kept open from request to request


def test_an_error_in_the_work_or_the_jobs_comes_out_as_it_is():
    endpoint = Endpoint("http://127.0.0.1:9/v1", "m")
    with pytest.raises(ZeroDivisionError):
        ask_for_all(endpoint, [1, 0], lambda job: 1 // job and None, print)
    with pytest.raises(KeyError, match="a bad job"):
        ask_for_all(endpoint, ({}["a bad job"] for _ in [1]), print, print)


def test_pictures_stand_where_their_markers_are_and_carry_what_they_are(tmp_path):
    names = [tmp_path / "a.png", tmp_path / "b"]
    Image.new("RGB", (4, 4), "red").save(names[0], "JPEG")  # by its name a PNG
    Image.new("RGB", (4, 4)).save(names[1], "PNG")
    see, first, et, second = user_message("see <image> and <image>", names)["content"]
    assert (see["text"], et["text"]) == ("see", "and")
    assert first["image_url"]["url"].startswith("data:image/jpeg;base64,/9j/")
    assert second["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
    unmarked = user_message("which ?", names)["content"]
    assert [part["type"] for part in unmarked] == ["image_url", "image_url", "text"]
