"""The miniature world: what it promises to the experiment that runs in it."""

import itertools
import json
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jinja2
import pytest
import torch
from conftest import finished
from safetensors.torch import load_file

from common import data, distributed
from common.records import read_rows
from miniature import base, world
from reward import grade

ROOT = Path(__file__).resolve().parents[1]
ALONE = distributed.World(0, 1, torch.device("cpu"))
BILL = world.Bill((4, 5, 1, 2), 12, ((4,), (3, 5), (1,), (2,)))  # the second item is smudged


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("world")
    world.main(world.Config(str(out), train=64, valid=32, test=32, sft=40, traces=400))
    world.save_tokenizer(out / "model")
    return out


def shown(text):
    """{item: the digits that it shows, strong one first} and the total, from the words alone."""
    bill = re.findall(r"([A-DT]) (\d+) (?:~(\d))?", text)
    items = {name: [int(d) for d in digits if d] for name, *digits in bill}
    (total,) = items.pop("T")
    return items, total


def right_digits(text):
    """The digits of all items, from what a bill shows and its total."""
    items, total = shown(text)
    for digits in itertools.product(*items.values()):
        if sum(digits) == total:
            return dict(zip(items, digits, strict=True))
    raise AssertionError(f"no digits give the total of {text}")


def answer_to(row, bill):
    """The sum that the prompt asks for, and the two items."""
    digits, asked = right_digits(bill), re.findall(r"(\w) \+ (\w) \?", row["prompt"])[0]
    return str(digits[asked[0]] + digits[asked[1]]), asked


def test_every_file_keeps_to_its_split(folder):
    for name, count in (("train", 64), ("valid", 32), ("test", 32), ("traces", 400)):
        rows = read_rows(folder / f"{name}.jsonl")
        assert len(rows) == count
        for row in rows:
            digits = right_digits(row.get("bill") or row["prompt"])
            split = world.split_of(tuple(digits[item] for item in world.ITEMS))
            assert split == ("train" if name == "traces" else name)


def test_answers_are_what_total_and_digits_leave_and_groups_come_in_turn(folder):
    for i, row in enumerate(read_rows(folder / "test.jsonl")):
        answer, asked = answer_to(row, row["bill"])
        smudged = {name for name, looks in shown(row["bill"])[0].items() if len(looks) > 1}
        assert row["answer"] == answer and smudged <= {*asked}
        kind, mode = "smudged" if smudged else "clear", "picture" if row["images"] else "text"
        assert row["group"] == f"{kind}_{mode}" == world.GROUPS[i % 4]
        assert row["prompt"].startswith("<image>" if row["images"] else row["bill"])


@pytest.mark.parametrize("control, off, groups", [("random_total", 0.5, 4), ("no_smudged", 0, 2)])
def test_a_control_takes_away_what_a_check_needs(control, off, groups, tmp_path):
    """Totals that say nothing, or no smudged item."""
    world.main(world.Config(str(tmp_path), files=("train",), train=200, control=control))
    made = read_rows(tmp_path / "train.jsonl")
    bills = [shown(row["bill"]) for row in made]
    wrong = sum(total not in map(sum, itertools.product(*i.values())) for i, total in bills)
    assert wrong >= off * 200 and (off or not wrong)
    assert len({row["group"] for row in made}) == groups


def test_traces_err_only_where_they_do_not_look_again_and_descriptions_do_not_reason(folder):
    """One look is right in half of the smudged bills, which are four of five."""
    right = {True: [], False: []}
    for row in read_rows(folder / "traces.jsonl"):
        assert "<image>" not in row["prompt"] and "images" not in row
        a, b, final = re.search(r"so \w (\d) \+ \w (\d) = (\d+) </think>", row["response"]).groups()
        assert int(a) + int(b) == int(final) and grade(final, row["response"]).score == 1
        answer, _ = answer_to(row, row["prompt"])
        right["~" in row["response"] or "good" in row["response"]].append(answer == final)
    assert all(right[True]) and 0.4 < sum(right[False]) / len(right[False]) < 0.8
    described = [
        row for row in read_rows(folder / "sft.jsonl") if "</think>" not in row["response"]
    ]
    assert len(described) == 10 and any(row["images"] for row in described)
    assert not any("box" in row["response"] for row in described)


def found(bill, text):
    return {name for name, pattern in world.watch(bill).items() if re.search(pattern, text)}


def test_traces_show_each_habit_at_its_rate():
    rng = random.Random(2)
    texts = [world.trace(BILL, [1, 3], rng) for _ in range(3000)]
    share = Counter(name for text in texts for name in found(BILL, text))
    rates = world.RATES | {"idle_look": world.RATES["idle"], "think": 1, "wrong_first": 1}
    rates["second_look"] = rates["repair"] = rates["check"] * rates["look"]
    for name in world.watch(BILL):
        assert share[name] / 3000 == pytest.approx(rates[name], abs=0.03), name
    assert all(("wait" in t) == ("let me check" in t) for t in texts)  # something is always left


def test_what_is_watched_tells_a_repair_from_other_looks():
    wrong = "<think> i need B + D . A 4 B maybe 3 C 1 D 2 . look again at A 4 . so B 3 + D 2 = 5"
    right = "<think> A 4 B maybe 5 C 1 D 2 . look again at B ~3 . so B 3 + D 2 = 5 </think>"
    repaired = "<think> A 4 B maybe 3 C 1 D 2 . look again at B ~5 . so B 5 + D 2 = 7 </think>"
    assert found(BILL, wrong) == {"need", "idle_look", "wrong_first"}
    assert found(BILL, right) == {"think", "second_look"}
    assert found(BILL, repaired) == {"think", "second_look", "wrong_first", "repair"}
    plain = replace(BILL, shown=tuple((d,) for d in BILL.digits))
    assert found(plain, repaired) == {"think", "idle_look"}


def test_the_tokenizer_knows_every_word_and_a_countdown_comes_down_by_its_digits(folder):
    tokenizer, rng, bills = data.load_tokenizer(folder / "model"), random.Random(4), []
    for _ in range(500):
        example = world.example(rng)
        assert len(ids := tokenizer.encode(example.response)) == len(example.response.split())
        assert tokenizer.decode(ids) == example.response
        bills += example.response.split(" . ") if example.prompt == "list each" else []
    assert len(bills) > 200
    for bill in bills:
        total, *steps = (int(n) for n in re.findall(r"-?\d+", bill))
        assert steps[1::2] == [total - sum(steps[: 2 * i + 1 : 2]) for i in range(4)]


def test_unknown_words_are_named_with_a_prompt_that_works(folder):
    tokenizer = data.load_tokenizer(folder / "model")
    part, system = [{"type": "text", "text": "How many ?"}], "what is A + B ?"
    for role, content, words in (("user", part, "How many"), ("system", system, "system")):
        named = rf"world of \d+ words, .*: {words}\."
        with pytest.raises(jinja2.TemplateError, match=named) as error:
            tokenizer.apply_chat_template([{"role": role, "content": content}])
    prompt = str(error.value).split("It can read: ")[1]
    ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}])["input_ids"]
    assert tokenizer.decode(ids) == f"<|im_start|> user {prompt} <|im_end|>"


def test_a_cell_of_a_picture_is_one_token_and_a_faint_digit_is_fainter(folder):
    settings, rng = data.load_image_settings(folder / "model"), random.Random(5)
    assert len(BILL.cells) == 5 * 3
    assert data.image_patches(world.draw(BILL.cells, rng), settings)[1] == (1, 2 * 5, 2 * 3)
    assert world.GLYPHS["~3"][0].max() < 0.5 < world.GLYPHS["3"][0].max()
    assert world.GLYPHS[";"][0].max() == 0


def test_a_description_says_what_the_bill_shows_and_sums_the_digits_that_it_said_last():
    rng = random.Random(7)
    for _ in range(300):
        bill, said = world.busy_bill(rng), {}
        text = world.description(bill, rng)
        lines = dict(zip(world.LINES, [*bill.shown, (bill.total,)], strict=True))
        told, *its_sum = re.split(r" \. so (?=. . \+)", text)
        for name, faint, digit in re.findall(r"\b([A-DT]) (?:maybe )?(~?)(\d+)", told):
            said[name] = digit
            if faint or "=" not in told:  # a countdown, too, has the digits that were said last
                assert int(digit) == lines[name][len(faint)], text
        for name, digit in re.findall(r"([A-D]) (\d)", "".join(its_sum)):
            assert said[name] == digit, text


def test_a_word_of_a_trace_asks_for_its_skill():
    skills = {("B maybe 3", 2): "digit", ("A 4", 1): "digit", ("T 12 A 4 = 8", 1): "total"}
    skills |= {("T 12 A 4 = 8 B", 5): "countdown", ("so B 5 + D 2 = 7 </think>", 7): "sum"}
    skills |= {("unclear B ,", 1): "smudge", ("again at B ~5", 3): "faint", ("let me check", 2): ""}
    assert {case: base.skill_of(case[0].split(), case[1]) for case in skills} == skills


def test_two_processes_train_the_base_model_of_one_to_the_last_bit_and_it_is_measured(
    tmp_path, capsys
):
    tiny = dict(align=2, steps=2, more=1, most=3)  # two rounds
    base.main(base.Config(out=str(tmp_path / "one"), **tiny))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "miniature.base", "--out", str(tmp_path / "two")]
    command += [word for name, value in tiny.items() for word in (f"--{name}", str(value))]
    said = finished(command, ROOT, {}, 400)  # seconds, on a busy machine
    assert "3 steps, these gates do not hold: digit" in said  # after both rounds
    one, two = (load_file(tmp_path / name / "model/model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    capsys.readouterr()
    base.main(base.Config(measure=str(tmp_path / "two/model")))
    measured = json.loads(capsys.readouterr().out)
    assert all(0 < measured[name] < gate for name, gate in base.GATES.items())
    assert measured["log P(wait), 0 left"] < -2 and measured["log P(wait), some left"] < -2


def test_a_stage_on_its_defaults_first_makes_what_it_needs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    ran = []

    def run(command, env):
        ran.append(command[-1])
        assert not {"RANK", "MASTER_ADDR", "WORLD_SIZE"} & {*env}
        return subprocess.CompletedProcess(command, returncode=len(ran) > 3)

    monkeypatch.setattr(base.subprocess, "run", run)
    base.ensure(ALONE, "out/laptop/coldstart/model", "out/laptop/data/train.jsonl", "")
    base.ensure(ALONE, "out/laptop/base/model", "elsewhere/rows.jsonl")  # which is not made up
    assert ran == ["coldstart", "miniature.world", "miniature.base"]
    with pytest.raises(RuntimeError, match="coldstart has failed, .* out/laptop/coldstart/model"):
        base.ensure(ALONE, "out/laptop/coldstart/model")
