"""Write the table of rooms in docs/architecture.md from docs/layout.toml; with --check say whether it is up to date."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

DOCS = Path(__file__).parent
PAGE = DOCS / "architecture.md"
BEGIN, END = "<!-- rooms: from docs/layout.toml, by `make docs` -->\n", "<!-- end of rooms -->\n"


def table() -> str:
    """The rooms as a Markdown table, those that import nothing first."""
    layout = tomllib.loads((DOCS / "layout.toml").read_text(encoding="utf-8"))
    lines = ["| room | holds | may import |", "|---|---|---|"]
    for name, room in layout["rooms"].items():
        folder = (DOCS.parent / "blip2" / name).is_dir()
        imports = " ".join(f"`{other}`" for other in room["may_import"].split())
        lines.append(f"| `{name}{'/' if folder else '.py'}` | {room['holds']} | {imports} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """The whole page with the table as it should be."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> int:
    """Write or check the page."""
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        print("docs/architecture.md is out of date: run `make docs`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
