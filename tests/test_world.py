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
from miniature import base, world
from reward import grade

ROOT = Path(__file__).resolve().parents[1]
ALONE = distributed.World(0, 1, torch.device("cpu"))
BILL = world.Bill((4, 5, 1, 2), 12, ((4,), (3, 5), (1,), (2,)))  # the second item is smudged


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("world")
    small = dict(train=64, valid=32, test=32, sft=40, traces=400)
    world.main(world.Config(out=str(out / "data"), **small))
    world.save_tokenizer(out / "model")
    return out


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


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
    digits, asked = (
        right_digits(bill),
        re.search(r"what is (\w) \+ (\w) \?", row["prompt"]).groups(),
    )
    return str(digits[asked[0]] + digits[asked[1]]), asked


def test_every_file_keeps_to_its_split(folder):
    for name in ("train", "valid", "test", "traces"):
        for row in rows(folder / f"data/{name}.jsonl"):
            digits = right_digits(row.get("bill") or row["prompt"])
            split = world.split_of(tuple(digits[item] for item in world.ITEMS))
            assert split == ("train" if name == "traces" else name)


def test_answers_are_what_total_and_digits_leave_and_groups_come_in_turn(folder):
    for i, row in enumerate(rows(folder / "data/test.jsonl")):
        answer, asked = answer_to(row, row["bill"])
        smudged = {name for name, looks in shown(row["bill"])[0].items() if len(looks) > 1}
        assert row["answer"] == answer and smudged <= {*asked}
        kind = "smudged" if smudged else "clear"
        mode = "picture" if row["images"] else "text"
        assert row["group"] == f"{kind}_{mode}" == world.GROUPS[i % 4]
        assert row["prompt"].startswith("<image>" if row["images"] else row["bill"])


def test_one_look_is_right_in_half_of_the_smudged_bills():
    rng = random.Random(1)
    bills = [world.random_bill(rng, "train", 1.0) for _ in range(2000)]
    right = sum(bill.shown[i][0] == bill.digits[i] for bill in bills for i in bill.smudged)
    assert 0.46 < right / 2000 < 0.54


@pytest.mark.parametrize("control, off, groups", [("random_total", 0.5, 4), ("no_smudged", 0, 2)])
def test_a_control_takes_away_what_a_check_needs(control, off, groups, tmp_path):
    """Totals that say nothing, or no smudged item."""
    world.main(world.Config(str(tmp_path), files=("train",), train=200, control=control))
    made = rows(tmp_path / "train.jsonl")
    bills = [shown(row["bill"]) for row in made]
    wrong = sum(total not in map(sum, itertools.product(*i.values())) for i, total in bills)
    assert wrong >= off * 200 and (off or not wrong)
    assert len({row["group"] for row in made}) == groups


def test_traces_are_text_only_and_go_wrong_only_where_they_do_not_look_again(folder):
    right = {True: [], False: []}
    for row in rows(folder / "data/traces.jsonl"):
        assert "<image>" not in row["prompt"] and "images" not in row
        a, b, final = re.search(r"so \w (\d) \+ \w (\d) = (\d+) </think>", row["response"]).groups()
        assert int(a) + int(b) == int(final) and grade(final, row["response"]).score == 1
        answer, _ = answer_to(row, row["prompt"])
        right["~" in row["response"] or "good" in row["response"]].append(answer == final)
    assert all(right[True]) and 0.4 < sum(right[False]) / len(right[False]) < 0.8


def test_a_quarter_of_the_cold_start_describes_bills_and_reasons_nowhere(folder):
    described = [r for r in rows(folder / "data/sft.jsonl") if "</think>" not in r["response"]]
    assert len(described) == 10 and any(r["images"] for r in described)
    assert not any("box" in r["response"] for r in described)


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


def test_the_tokenizer_knows_every_word_and_gives_them_back(folder):
    tokenizer, rng = data.load_tokenizer(folder / "model"), random.Random(4)
    for _ in range(300):
        response = world.example(rng).response
        assert len(ids := tokenizer.encode(response)) == len(response.split())
        assert tokenizer.decode(ids) == response


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
    picture = world.draw(BILL.cells, rng)
    assert picture.size == (84, 140) and len(BILL.cells) == 15
    assert data.image_patches(picture, settings)[1] == (1, 10, 6)
    assert world.GLYPHS["~3"][0].max() < 0.5 < world.GLYPHS["3"][0].max()
    assert world.GLYPHS[";"][0].max() == 0


def test_countdowns_come_down_by_their_digits_and_stay_in_the_vocabulary():
    rng = random.Random(6)
    examples = [world.example(rng) for _ in range(600)]
    bills = [b for e in examples if e.prompt == "list each" for b in e.response.split(" . ")]
    assert len(bills) > 200
    for bill in bills:
        total, *steps = (int(n) for n in re.findall(r"-?\d+", bill))
        assert steps[1::2] == [total - sum(steps[: 2 * i + 1 : 2]) for i in range(4)]
        assert {*bill.split()} <= {*world.VOCABULARY}


def test_a_description_says_what_the_bill_shows():
    rng = random.Random(7)
    for _ in range(300):
        bill = world.busy_bill(rng)
        lines = dict(zip(world.LINES, [*bill.shown, (bill.total,)], strict=True))
        text = world.description(bill, rng)
        if "=" not in text:  # a countdown or a sum says what was said last
            for name, digit in re.findall(r"(?<!again at )\b([A-DT]) (?:maybe )?(\d+)", text):
                assert int(digit) == lines[name][0], text
        for name, digit in re.findall(r"again at ([A-DT]) ~(\d)", text):
            assert int(digit) == lines[name][1]


def test_a_word_of_a_trace_asks_for_its_skill():
    skills = {("B maybe 3", 2): "digit", ("A 4", 1): "digit", ("T 12 A 4 = 8", 1): "total"}
    skills |= {("T 12 A 4 = 8 B", 5): "countdown", ("so B 5 + D 2 = 7 </think>", 7): "sum"}
    skills |= {("unclear B ,", 1): "smudge", ("again at B ~5", 3): "faint", ("let me check", 2): ""}
    assert {case: base.skill_of(case[0].split(), case[1]) for case in skills} == skills


TINY = dict(align=2, steps=2, more=1, most=3)  # of the base model: two rounds


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("base")
    base.main(base.Config(out=str(out), **TINY))
    return out


def test_the_base_model_opens_as_a_directory_and_what_it_cannot_do_yet_is_measured(trained, capsys):
    assert data.load_tokenizer(trained / "model").chat_template
    base.main(base.Config(measure=str(trained / "model")))
    measured = json.loads(capsys.readouterr().out)
    assert all(0 < measured[name] < gate for name, gate in base.GATES.items())
    assert measured["log P(wait), 0 left"] < -2 and measured["log P(wait), some left"] < -2


def test_two_processes_train_the_base_model_of_one_to_the_last_bit(trained, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "miniature.base", "--out", str(tmp_path)]
    command += [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
    said = finished(command, ROOT, {}, 120)
    assert "3 steps, these gates do not hold: digit" in said  # after both rounds
    one, two = (load_file(out / "model/model.safetensors") for out in (trained, tmp_path))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_stage_on_its_defaults_first_makes_what_it_needs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    ran, code = [], 0

    def run(command, env):
        ran.append(command[-1])
        assert not {"RANK", "MASTER_ADDR", "WORLD_SIZE"} & {*env}
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(base.subprocess, "run", run)
    base.ensure(ALONE, "out/laptop/coldstart/model", "out/laptop/data/train.jsonl", "")
    base.ensure(ALONE, "out/laptop/base/model", "elsewhere/rows.jsonl")  # which is not made up
    assert ran == ["coldstart", "miniature.world", "miniature.base"]
    code = 1
    with pytest.raises(RuntimeError, match="coldstart has failed, .* out/laptop/coldstart/model"):
        base.ensure(ALONE, "out/laptop/coldstart/model")
