"""planted.py: what each row names does catch its bug, and is silent without it.

So the bugs are a mutation test: of tests of this suite, called as they are, of doctor.py's checks,
and of the refusals of rl.py.
"""

import importlib
import inspect
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import test_model
from PIL import Image
from planted import BUGS, Config, draw, planted, rows_of, run, table
from test_rl import ALONE, config
from test_rollout import model, sampler, tokenizer  # noqa: F401  fixtures of the tests called

import rl
from tools import doctor

CASES = [(name, catcher) for name, bug in BUGS.items() for catcher in bug.caught_by]


@pytest.fixture(scope="session")
def ours():
    return test_model.small_model()


@pytest.fixture(scope="session")
def pair(ours, tmp_path_factory):
    directory = tmp_path_factory.mktemp("pair")
    test_model.save_model(ours, directory)
    return ours, test_model.referee(directory)


@pytest.fixture(scope="session")
def silent() -> set:
    """What was seen not to fire on the sound code: seeing it once is enough."""
    return set()


def named_test(catcher: str, request):
    """-> the test function that `file.name[case]` names, and its arguments, made before the bug."""
    file, name, case = re.fullmatch(r"(\w+)\.(\w+)(?:\[(\d+)])?", catcher).groups(default="0")
    function, arguments = getattr(importlib.import_module(file), name), {}
    for mark in getattr(function, "pytestmark", []):
        names, chosen = mark.args[0], [*mark.args[1]][int(case)]
        names = names.split(", ") if isinstance(names, str) else names
        arguments |= zip(names, chosen if len(names) > 1 else [chosen], strict=True)
    for name in {*inspect.signature(function).parameters} - {*arguments, "uninterrupted"}:
        arguments[name] = request.getfixturevalue(name)
    return function, arguments


def fires(catcher: str, mini, folder: Path, function, arguments: dict) -> bool:
    kind, _, wanted = catcher.partition(": ")
    if kind == "doctor":
        cfg = rl.Config(model=mini.model, data=mini.train, lr=1e-5)
        return doctor.examine(cfg, ALONE)[wanted][0] == "FAIL"
    cfg = config(model=mini.model, data=mini.train, out=str(folder))
    try:
        if kind == "rl":
            rl.main(replace(cfg, steps=1, lr=1e-2, warmup=1))
        elif "uninterrupted" in inspect.signature(function).parameters:
            rl.main(cfg)
            function(**arguments, uninterrupted=folder)
        else:
            function(**arguments)
    except (AssertionError, RuntimeError) as error:
        return kind != "rl" or wanted in str(error)
    return False


@pytest.mark.parametrize("name, catcher", CASES, ids=[f"{n}, {c}" for n, c in CASES])
def test_each_bug_is_caught_by_what_its_row_names_and_nothing_is_caught_without_it(
    name, catcher, mini, tmp_path, request, silent
):
    named = (None, {}) if ": " in catcher else named_test(catcher, request)
    if catcher not in silent:
        assert not fires(catcher, mini, tmp_path / "sound", *named)
        silent.add(catcher)
    before = [getattr(where, attribute) for where, attribute, _ in BUGS[name].patches]
    with planted(name):
        assert fires(catcher, mini, tmp_path / "bug", *named)
    after = [getattr(where, attribute) for where, attribute, _ in BUGS[name].patches]
    assert all(one is other for one, other in zip(before, after, strict=True))  # taken out again


def test_a_run_goes_on_where_rl_would_stop(mini, tmp_path):
    cfg = Config(mini.model, mini.train, steps=2, problems=4, lr=1e-2, out=str(tmp_path))
    run("stale_sampler", cfg)
    first, second = rows_of(cfg, "stale_sampler")
    assert first["logp_diff_mean"] < 1e-5 < 1e-3 < second["logp_diff_mean"]


def test_the_table_says_what_a_curve_did_and_what_gave_it_away(tmp_path):
    flat = [{"step": i, "reward": 0.5, "policy_loss": 1e-9 * i} for i in range(12)]
    curves = {"healthy": [row | {"reward": 0.5 + 0.02 * row["step"]} for row in flat]}
    curves["stop_untrained"] = [row | {"policy_loss": 0.01 * (row["step"] > 3)} for row in flat]
    curves["wrong_sign"] = [row | {"reward": 0.5 - 0.04 * row["step"]} for row in flat]
    for name, rows in curves.items():
        (tmp_path / name).mkdir()
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name / "metrics.jsonl").write_text(text)
    cfg = Config(out=str(tmp_path), picture=str(tmp_path / "all.png"))
    names = ["stop_untrained", "wrong_sign"]
    healthy, *rows = table(cfg, names).splitlines()[2:]
    assert "rises, 0.54 to 0.68" in healthy
    assert "flat, 0.50 to 0.50, below healthy" in rows[0]
    assert "policy_loss 0.01 in step 4, not 0 to " in rows[0]
    assert "falls, 0.42 to 0.14" in rows[1] and "reward 0.38 in step 3" in rows[1]
    draw(cfg, names)
    assert Image.open(cfg.picture).width > 1000
