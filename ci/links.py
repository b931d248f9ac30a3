"""Check that every relative link between Markdown pages leads somewhere, anchors too."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)


def pages(root: Path) -> list[Path]:
    """Every page that readers see."""
    found = [root / "README.md", *(root / "docs").rglob("*.md"), *root.glob("packages/*/*.md")]
    found += root.glob("benchmarks/*.md")
    return sorted(page for page in found if page.exists())


def anchors(page: Path) -> set[str]:
    """The anchors that headings of a page make."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", title.replace("`", "")).strip().lower() for title in titles]
    return {title.replace(" ", "-") for title in plain}


def dead(root: Path = ROOT) -> list[str]:
    """One line for each link that leads nowhere."""
    found = []
    for page in pages(root):
        for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
            if re.match(r"[a-z]+:", link):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            if not target.exists():
                found.append(f"{page.relative_to(root)}: {link} does not exist")
            elif anchor and target.suffix == ".md" and anchor not in anchors(target):
                found.append(f"{page.relative_to(root)}: {link} has no such heading")
    return found


if __name__ == "__main__":
    lines = dead()
    print("\n".join(lines) or f"{len(pages(ROOT))} pages, no dead link")
    raise SystemExit(bool(lines))
