"""Copy tables from committed files into README.md and RESULTS.md.

python benchmarks/documents.py

In a document, the lines between <!-- FILE N --> and <!-- end --> are the Nth paragraph of FILE.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import ROOT
from files import write_text

MARKED = re.compile(r"(<!-- (\S+) (\d+) -->)\n.*?<!-- end -->", re.DOTALL)


def include_tables(document):
    """Replace the marked paragraphs of a document whose source files exist."""

    def paragraph(match):
        source = ROOT / match[2]
        parts = source.read_text(encoding="utf-8").strip().split("\n\n") if source.is_file() else []
        number = int(match[3])
        if number > len(parts):
            return match[0]
        return f"{match[1]}\n{parts[number - 1]}\n<!-- end -->"

    text = document.read_text(encoding="utf-8")
    fresh = MARKED.sub(paragraph, text)
    if fresh != text:
        write_text(document, fresh)


if __name__ == "__main__":
    for document in ROOT.glob("*.md"):
        include_tables(document)
