"""How long the files are, and whether each still fits in one's head. ``make lint`` runs it."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: Lines of a file, by folder. Generated files do not count.
LIMITS = {"mlkernels": 450, "csrc": 600}
GENERATED = {"csrc/numbering.h", "csrc/schemas.h"}


def lengths(folder: str) -> dict[str, int]:
    files = (path for suffix in ("py", "h", "cpp", "cu") for path in (ROOT / folder).rglob(f"*.{suffix}"))
    named = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in files}
    return {name: count for name, count in named.items() if name not in GENERATED}


def main() -> int:
    wrong = []
    for folder in ("mlkernels", "csrc", "bench", "tools", "tests"):
        found = lengths(folder)
        print(f"{folder:<10}{len(found):>4} files{sum(found.values()):>7} lines, the longest {max(found.values())}")
        for name, count in sorted(found.items(), key=lambda item: -item[1]):
            limit = LIMITS.get(folder, sys.maxsize)
            if count > limit:
                print(f"  {name}: {count} lines, MORE THAN {limit}")
                wrong.append(name)
    if wrong:
        print(f"too long (tools/lengths.py): {', '.join(wrong)}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
