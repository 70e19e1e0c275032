"""planted.py: what each row names does catch its bug, and is silent without it.

So the bugs are a mutation test: of tests of this suite, called as they are, of doctor.py's checks,
and of the refusals of rl.py.
"""

import importlib
import inspect
import re
from dataclasses import replace
from pathlib import Path

import pytest
import test_model
from planted import BUGS, planted, rows_of, run
from test_rl import ALONE, config
from test_rollout import forbidden, model, sampler, tokenizer  # noqa: F401  for the tests called

import rl
from tools import doctor

CASES = [(name, catcher) for name, bug in BUGS.items() for catcher in bug.caught_by]
SILENT = set()  # what was seen not to fire on the sound code: once is enough


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    small, directory = test_model.small_model(), tmp_path_factory.mktemp("pair")
    test_model.save_model(small, directory)
    return small, test_model.referee(directory)


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


def fires(catcher: str, cfg: rl.Config, function, arguments: dict) -> bool:
    kind, _, wanted = catcher.partition(": ")
    # a test catches by what it asserts: that a bug makes it stumble is luck
    catches = (RuntimeError, ValueError) if wanted else AssertionError
    try:
        if kind == "doctor":
            doctor.examine(replace(cfg, lr=1e-5), ALONE)
        elif kind == "rl":
            rl.main(replace(cfg, steps=1, lr=1e-2, warmup=1))
        elif "uninterrupted" in inspect.signature(function).parameters:
            rl.main(cfg)
            function(**arguments, uninterrupted=Path(cfg.out))
        else:
            function(**arguments)
    except catches as error:
        return wanted in str(error)
    return False


@pytest.mark.parametrize("name, catcher", CASES, ids=[f"{n}, {c}" for n, c in CASES])
def test_each_bug_is_caught_by_what_its_row_names_and_nothing_is_caught_without_it(
    name, catcher, mini, tmp_path, request
):
    named = (None, {}) if ": " in catcher else named_test(catcher, request)
    cfg = config(model=mini.model, data=mini.train, out=str(tmp_path / "bug"))
    if catcher not in SILENT:
        assert not fires(catcher, replace(cfg, out=str(tmp_path / "sound")), *named)
        SILENT.add(catcher)
    with planted(name):
        assert fires(catcher, cfg, *named)


def test_a_run_goes_on_where_rl_would_stop(mini, tmp_path):
    cfg = config(model=mini.model, data=mini.train, steps=2, lr=1e-2, warmup=1, out=str(tmp_path))
    run("stale_sampler", cfg)
    first, second = rows_of(cfg.out, "stale_sampler")
    assert first["logp_diff"] < 1e-5 < 1e-3 < second["logp_diff"]
