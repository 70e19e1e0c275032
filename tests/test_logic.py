"""Is every answer right and the only one? Each family is solved again from the text of its prompt.

pytest tests/test_logic.py
"""

import random
import re
import subprocess
import sys
from collections import Counter
from itertools import chain, combinations, permutations, product
from math import perm
from pathlib import Path

import pytest

from common import data
from curation import logic
from reward import grade

PER_LEVEL = 40  # problems solved again, of each family and level
EVERY = [(family, level) for family in logic.FAMILIES for level in logic.LEVELS]


def made(family: str, level: int, count: int) -> list[dict]:
    return list(logic.problems(count, 7, (family,), (level,)))


# ---- solvers: text of a prompt -> every answer that fits it


def names_in(text: str) -> list[str]:
    return re.findall(r"[A-Z][a-z]+", text)


def steps_of(prompt: str) -> list[str]:
    return re.findall(r"^\d+\. (.*)$", prompt, flags=re.M)


def solve_knights(prompt: str) -> set[str]:
    people = names_in(re.search(r"You meet (.*)\.", prompt)[1])
    told = [re.fullmatch(r'(\w+) says: "(.*)\."', step).groups() for step in steps_of(prompt)]
    assert [speaker for speaker, _ in told] == people

    def true(said: str, me: str, knights: tuple[str, ...]) -> bool:
        if either := re.fullmatch(r"(.*), or (.*), or both", said):
            return any(true(part, me, knights) for part in either.groups())
        if kind := re.fullmatch(r"(\w+) and I are of (the same kind|different kinds)", said):
            return ((kind[1] in knights) == (me in knights)) == (kind[2] == "the same kind")
        if number := re.fullmatch(r"The number of knights among us is exactly (\d)", said):
            return len(knights) == int(number[1])
        if " and " in said:
            return all(true(part, me, knights) for part in said.split(" and "))
        name, kind = re.fullmatch(r"(\w+) is a (knight|knave)", said).groups()
        return (name in knights) == (kind == "knight")

    subsets = chain.from_iterable(combinations(people, k) for k in range(len(people) + 1))
    fits = [s for s in subsets if all(true(said, me, s) == (me in s) for me, said in told)]
    return {", ".join(s) for s in fits}


def row_fact(sentence: str) -> tuple:
    """(kind, name, name or number) of a sentence about people in a row."""
    if m := re.fullmatch(r"There (?:is|are) exactly (\d) \w+ between (\w+) and (\w+)\.", sentence):
        return "between", m[2], m[3], int(m[1])
    if m := re.fullmatch(r"(\w+) (?:\w+ )+?(right )?before (\w+)\.", sentence):
        return ("right before" if m[2] else "before"), m[1], m[3]
    m = re.fullmatch(r"(\w+) (?:did|does|is) not \w+ (\w+)\.", sentence)
    return "not at", m[1], logic.ORDINALS.index(m[2])


def fits_row(fact: tuple, row: tuple[str, ...]) -> bool:
    kind, first, second, *gap = fact
    at = row.index(first)
    if kind == "not at":
        return at != second
    distance = row.index(second) - at
    return {
        "before": distance > 0,
        "right before": distance == 1,
        "between": gap and abs(distance) == gap[0] + 1,
    }[kind]


def rows_that_fit(prompt: str) -> list[tuple[str, ...]]:
    people = names_in(re.match(r"(\w+, )*\w+ and \w+", prompt)[0])
    rows = list(permutations(people))
    for step in steps_of(prompt):
        rows = [row for row in rows if fits_row(row_fact(step), row)]
    return rows


def solve_ordering(prompt: str) -> set[str]:
    asked = logic.ORDINALS.index(re.search(r"Who (?:is )?\w+ (\w+)\?", prompt)[1])
    rows = rows_that_fit(prompt)
    assert len(rows) == 1  # the whole order is fixed, not only the place asked for
    return {row[asked] for row in rows}


def solve_deduction(prompt: str) -> set[str]:
    rows = rows_that_fit(prompt)
    options = re.findall(r"^([A-E])\. (.*)$", prompt, flags=re.M)
    assert len(options) == 5 and len({row_fact(option)[0] for _, option in options}) == 1
    return {x for x, option in options if all(fits_row(row_fact(option), row) for row in rows)}


def solve_zebra(prompt: str) -> set[str]:
    people = names_in(prompt.split(" live in ")[0])
    kinds = [re.split(", | and ", line) for line in re.findall("^- (.*)$", prompt, flags=re.M)]
    facts = []
    for step in steps_of(prompt):
        house = re.fullmatch(r"(.*) does not live in house (\d)\.", step)
        pair = re.fullmatch(
            r"(.*?) (is not|is|lives directly to the left of|lives next door to) (.*)\.", step
        )
        facts.append((house[1], "house", int(house[2])) if house else pair.groups())
    facts = [(a[0].lower() + a[1:] if a.startswith("The ") else a, how, b) for a, how, b in facts]
    found = set()
    for houses in permutations(range(1, len(people) + 1)):
        for ways in product(*[permutations(kind) for kind in kinds]):
            lives = dict(zip(people, houses, strict=True))
            for way in ways:  # way[h - 1] is the trait in house h
                lives |= {trait: h for h, trait in enumerate(way, 1)}
            if all(fits_street(fact, lives) for fact in facts):
                assert not found, "two streets fit"
                asked = re.search(r"Who is (.*)\?", prompt)[1]
                found |= {name for name in people if lives[name] == lives[asked]}
    return found


def fits_street(fact: tuple, lives: dict[str, int]) -> bool:
    one, how, other = fact
    if how == "house":
        return lives[one] != other
    distance = lives[other] - lives[one]
    if how.startswith("is"):
        return (distance == 0) == (how == "is")
    return distance == 1 if how == "lives directly to the left of" else abs(distance) == 1


def solve_cryptarithm(prompt: str) -> set[str]:
    """Column by column from the right, as on paper."""
    one, other, total = re.search(r"(\w+) \+ (\w+) = (\w+) each", prompt).groups()
    known = {x: int(d) for x, d in re.findall(r"([A-Z]) = (\d)", prompt)}
    found = set()

    def column(place: int, carry: int, digits: dict[str, int]):
        if place > len(total):
            if carry == 0 and all(digits[word[0]] for word in (one, other, total)):
                found.add("".join(str(digits[x]) for x in total))
            return
        here = [word[-place] for word in (one, other, total) if place <= len(word)]
        free = [x for x in dict.fromkeys(here) if x not in digits]
        spare = [d for d in range(10) if d not in digits.values()]
        for way in permutations(spare, len(free)):
            now = digits | dict(zip(free, way, strict=True))
            value = carry + sum(now[x] for x in here[:-1])
            if value % 10 == now[here[-1]]:
                column(place + 1, value // 10, now)

    column(1, 0, known)
    return found


def solve_kinship(prompt: str) -> set[str]:
    parent = {}
    for step in steps_of(prompt):
        elder, children = re.fullmatch(
            r"(?:The children of )?(\w+) (?:are|has one child:) (.*)\.", step
        ).groups()
        parent |= dict.fromkeys(names_in(children), elder)
    kin, person = re.search(r"Who are the (.*) of (\w+)\?", prompt).groups()

    def children(people: set[str]) -> set[str]:
        return {child for child, elder in parent.items() if elder in people}

    def siblings(name: str) -> set[str]:
        return {x for x in parent if x != name and parent[x] == parent.get(name)}

    def cousins(name: str) -> set[str]:
        return children(siblings(parent[name]))

    relatives = {
        "grandchildren": lambda: children(children({person})),
        "nieces and nephews": lambda: children(siblings(person)),
        "first cousins": lambda: cousins(person),
        "first cousins' children": lambda: children(cousins(person)),
        "second cousins": lambda: children(cousins(parent[person])),
    }
    return {", ".join(sorted(relatives[kin.split(" (")[0]]()))}


def zeller(day: int, month: int, year: int) -> int:
    """Zeller's congruence of 1882, Monday is 0."""
    month, year = (month + 12, year - 1) if month < 3 else (month, year)
    return (day + 13 * (month + 1) // 5 + year + year // 4 - year // 100 + year // 400 + 5) % 7


def solve_calendar(prompt: str) -> set[str]:
    week = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
    if m := re.match(r"Today is (\w+)\. .* (?:in (\d+) days|(\d+) days ago)\?", prompt):
        return {week[(week.index(m[1]) + int(m[2] or 0) - int(m[3] or 0)) % 7]}
    dates = re.findall(r"(\d+) ([A-Z]\w+) (\d+)", prompt)
    first, second = (zeller(int(d), 1 + logic.MONTHS.index(m), int(y)) for d, m, y in dates)
    assert f" is a {week[first]}." in prompt
    return {week[second]}


def solve_remainders(prompt: str) -> set[str]:
    low, high = map(int, re.search(r"at least (\d+) and at most (\d+)", prompt).groups())
    bags = [(int(d), int(r)) for d, r in re.findall(r"bags of (\d+), (\d+) would", prompt)]
    return {str(n) for n in range(low, high + 1) if all(n % d == r for d, r in bags)}


def solve_boxes(prompt: str) -> set[str]:
    box = {thing: int(n) for n, thing in re.findall(r"box (\d) holds a (\w+)", prompt)}
    for step in steps_of(prompt):
        if step.startswith("Move each"):
            box = {thing: n % len(box) + 1 for thing, n in box.items()}
            continue
        if condition := re.match(r"If the (\w+) is in box (\d), (.*); otherwise (.*)", step):
            thing, n, then, otherwise = condition.groups()
            step = then if box[thing] == int(n) else otherwise
        a, b = map(int, re.findall(r"box (\d)", step))
        box = {thing: {a: b, b: a}.get(n, n) for thing, n in box.items()}
    if asked := re.search(r"What does box (\d) hold", prompt):
        return {thing for thing, n in box.items() if n == int(asked[1])}
    return {str(box[re.search(r"Which box holds the (\w+)", prompt)[1]])}


def solve_circuit(prompt: str) -> set[str]:
    inputs = re.findall(r"\b[a-z]\b", re.search(r"inputs (.*), each", prompt)[1])
    gates = re.findall(r"^(g\d+) = (\w+) (\w+) (NOT )?(\w+)$", prompt, flags=re.M)
    asked, ones = re.search(r"is (g\d+) equal", prompt)[1], 0
    assert f"of the {2 ** len(inputs)} assignments" in prompt
    for bits in product((False, True), repeat=len(inputs)):
        on = dict(zip(inputs, bits, strict=True))
        for gate, x, how, negated, y in gates:
            pair = on[x], on[y] != bool(negated)
            on[gate] = {"AND": all(pair), "OR": any(pair), "XOR": pair[0] != pair[1]}[how]
        ones += on[asked]
    return {str(ones)}


def solve_paths(prompt: str) -> set[str]:
    grid = [line.split() for line in re.findall(r"^(?:[.#SE] ?)+$", prompt, flags=re.M)]
    down, across = len(grid) - 1, len(grid[0]) - 1
    assert grid[0][0] == "S" and grid[down][across] == "E"
    walkers = Counter({(0, 0): 1})  # one for each path so far
    for _ in range(down + across):
        after = Counter()
        for (y, x), count in walkers.items():
            for place in ((y + 1, x), (y, x + 1)):
                if place[0] <= down and place[1] <= across and grid[place[0]][place[1]] != "#":
                    after[place] += count
        walkers = after
    return {str(walkers[down, across])}


@pytest.mark.parametrize(("family", "level"), EVERY)
def test_a_solver_that_reads_the_prompt_finds_the_answer_and_no_other(family, level):
    solve = globals()[f"solve_{family}"]
    for row in made(family, level, PER_LEVEL):
        assert solve(row["prompt"]) == {row["answer"]}, row["prompt"]


# ---- rewards


@pytest.mark.parametrize("family", logic.FAMILIES)
def test_the_matcher_takes_the_answer_and_none_of_another_problem(family):
    rows = list(logic.problems(60, 3, (family,)))
    for row, other in zip(rows, rows[1:] + rows[:1], strict=True):
        choices = row.get("choices")
        say = rf"So it is \boxed{{{row['answer']}}}."
        assert grade(row["answer"], say, choices=choices).score == 1, row
        if other["answer"] != row["answer"]:
            said = grade(row["answer"], rf"\boxed{{{other['answer']}}}", choices=choices)
            assert said.score == 0 and said.status == "mismatch", (row, other["answer"])


def test_no_name_passes_for_another():
    words = [*logic.NAMES, *logic.THINGS, *logic.WEEKDAYS]
    assert len(set(words)) == len(words)
    for gold, said in product(words, repeat=2):
        assert grade(gold, rf"\boxed{{{said}}}").score == (gold == said), (gold, said)


def test_names_may_come_in_any_order_but_all_of_them_and_no_more():
    gold = "Boris, Anna, Zoe"
    assert grade(gold, r"\boxed{Zoe, Anna and Boris}").score == 1
    for said in ("Boris, Anna", "Boris, Anna, Zoe, Leo", "Boris, Anna, Leo"):
        assert grade(gold, rf"\boxed{{{said}}}").score == 0, said


def test_an_option_may_be_named_by_letter_or_by_text():
    for row in made("deduction", 2, 30):
        for i, option in enumerate(row["choices"]):
            right = "ABCDE"[i] == row["answer"]
            for said in ("ABCDE"[i], option, rf"\text{{{option}}}"):
                verdict = grade(row["answer"], rf"\boxed{{{said}}}", choices=row["choices"])
                assert verdict.score == right, (row["prompt"], said)


def pattern(row: dict) -> str:
    """The answer with each name or thing as the place of its first mention in the prompt."""
    seen = list(dict.fromkeys(re.findall(r"\w+", row["prompt"])))
    seen = [word for word in seen if word in {*logic.NAMES, *logic.THINGS}]
    return re.sub(r"[A-Za-z]{2,}", lambda m: str(seen.index(m[0])), row["answer"])


@pytest.mark.parametrize(("family", "level"), EVERY)
def test_no_constant_guess_is_right_two_times_in_five(family, level):
    rows = made(family, level, 300)
    assert Counter(row["answer"] for row in rows).most_common(1)[0][1] < 0.3 * len(rows)
    if family not in ("calendar", "kinship"):  # nor one by place, as "the first who is named"
        assert Counter(map(pattern, rows)).most_common(1)[0][1] < 0.4 * len(rows)


# ---- levels


def days_apart(prompt: str) -> int:
    if "Today" in prompt:
        return 0
    dates = re.findall(r"(\d+) ([A-Z]\w+) (\d+)", prompt)
    (d, m, y), (e, n, z) = ((int(d), logic.MONTHS.index(m), int(y)) for d, m, y in dates)
    return abs(365 * (y - z) + 30 * (m - n) + d - e)


DISTANCE = ("grandch", "nieces", "first cousins (", "first cousins'", "second")


def ways(prompt: str) -> int:
    """To give digits to the letters of a cryptarithm that have none."""
    sum_, known = re.search("sum (.*) each", prompt)[1], re.findall(r"[A-Z] = \d", prompt)
    hidden = len(set(re.findall("[A-Z]", sum_))) - len(known)
    return perm(10 - len(known), hidden)


SIZES = {
    "calendar": days_apart,
    "cryptarithm": ways,
    "kinship": lambda prompt: next(i for i, kin in enumerate(DISTANCE) if f"the {kin}" in prompt),
    "remainders": lambda prompt: int(re.search(r"at most (\d+)", prompt)[1]),
}


@pytest.mark.parametrize("family", logic.FAMILIES)
def test_every_level_is_larger_than_the_one_below(family):
    size = SIZES.get(family, len)  # of the text, if nothing says it better
    means = [sum(size(row["prompt"]) for row in made(family, level, 100)) for level in logic.LEVELS]
    assert means == sorted(set(means)), means


# ---- rows


def test_row_i_depends_on_seed_and_i_alone():
    rows = list(logic.problems(120, 5))
    assert rows[:50] == list(logic.problems(50, 5))
    assert rows[::-1] == [logic.problem(5, i) for i in reversed(range(120))]
    assert [row["prompt"] for row in rows] != [row["prompt"] for row in logic.problems(120, 6)]


def test_families_and_levels_take_turns():
    rows = list(logic.problems(2 * len(EVERY), 0))
    count = Counter((row["source"].removeprefix("logic/"), row["level"]) for row in rows)
    assert count == dict.fromkeys(EVERY, 2)
    assert len({row["id"] for row in rows}) == len(rows)


def test_another_process_with_other_hashes_makes_the_same_rows():
    code = "import sys; from curation import logic; rows = logic.problems(110, 1)"
    code += "; print([r['prompt'] + r['answer'] for r in rows])"
    code += "; sys.exit('torch' in sys.modules)"
    root, printed = Path(logic.__file__).parents[1], set()
    for hashes in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=root,
            env={"PYTHONHASHSEED": hashes, "PYTHONIOENCODING": "utf-8"},
            capture_output=True,
            check=True,
        )
        printed.add(done.stdout)
    assert len(printed) == 1


def test_ten_thousand_problems_hardly_repeat():
    prompts = [row["prompt"] for row in logic.problems(10_000, 11)]
    assert len(set(prompts)) > 0.995 * len(prompts)


def test_the_file_is_what_the_stages_read(tmp_path):
    path = tmp_path / "deep" / "logic.jsonl"
    logic.main(logic.Config(count=110, seed=2, out=str(path)))
    read, rows = data.read_problems(path), list(logic.problems(110, 2))
    assert [(p.id, p.prompt, p.answer, p.source) for p in read] == [
        (row["id"], row["prompt"], row["answer"], row["source"]) for row in rows
    ]
    assert [p.choices for p in read] == [tuple(row.get("choices", ())) or None for row in rows]
    assert {p.name for p in path.parent.iterdir()} == {"logic.jsonl", "logic.report.json"}
    assert rows[7]["origin"] == {
        "set": "logic",
        "split": "seed 2",
        "index": 7,
        "license": "Apache-2.0",
    }


def test_what_does_not_exist_is_named():
    with pytest.raises(ValueError, match="'sudoku'.*knights, ordering"):
        logic.problems(1, 0, ("knights", "sudoku"))
    with pytest.raises(ValueError, match="levels .*6.*1 to 5"):
        logic.problems(1, 0, ("knights",), (1, 6))


def test_clues_that_leave_two_worlds_are_refused():
    with pytest.raises(ValueError, match="leave 2 worlds"):
        logic.pin_down([1, 2, 3], [("It is odd.", lambda w: w % 2 == 1)])
    clues = [("It is positive.", lambda w: w > 0), ("It is three.", lambda w: w == 3)]
    assert logic.pin_down([1, 2, 3], [*clues, *random.Random(0).sample(clues, 2)]) == [clues[1][0]]
