"""Brings README.md up to date: line counts of the map, links to functions, the ledger.

python tests/readme.py          # rewrites README.md; tests/test_project.py fails until then
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools import ledger  # noqa: E402


def refreshed(text: str) -> str:
    """ValueError where a link names a function that its file does not have."""

    def counted(found: re.Match) -> str:
        lines = (ROOT / f"{found[1]}.py").read_text().count("\n")
        return f"| `{found[1]}.py` |{found[2]}| {lines} |"

    def linked(found: re.Match) -> str:
        name, file = found[1], found[2]
        return f"[{name}]({file}#L{line_of(name, ROOT / file)})"

    text = re.sub(r"^\| `(\w+)\.py` \|(.*)\| \d+ \|$", counted, text, flags=re.M)
    text = re.sub(r"\[`?(\w+)`?\]\(([\w/]+\.py)#L\d+\)", linked, text)
    return ledger.written(text)


def line_of(name: str, file: Path) -> int:
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        if re.match(rf"\s*(def|class) {name}\b|{name}\b.* = ", line):
            return number
    raise ValueError(f"README.md links to {name} in {file.name}, which is not there")


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(refreshed(readme.read_text()))
