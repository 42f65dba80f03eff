"""Check every link, image and anchor of the built site that leads to the site itself: `python docs/check_links.py`."""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

SITE = Path(__file__).resolve().parent.parent / "build" / "site"


class Page(HTMLParser):
    """What a page links to, what it loads, and what can be linked to in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            elif name == "href" and tag == "a" and value:
                self.links.append(value)
            elif value and (name == "src" or (name == "href" and tag == "link")):
                self.loads.append(value)


def broken(site: Path) -> list[str]:
    """One line for each link of the site that leads nowhere, and for each thing it loads from elsewhere."""
    pages = {path: Page(path) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        for link in page.links + page.loads:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                found += (
                    [f"{path.relative_to(site)} loads {link}"] if link in page.loads and parts.scheme != "data" else []
                )
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            if not target.is_file() or (target in pages and anchor and anchor not in pages[target].anchors):
                found.append(f"{path.relative_to(site)} links to {link}")
    return found


if __name__ == "__main__":
    wrong = broken(SITE)
    print("\n".join(wrong) or f"{len(list(SITE.rglob('*.html')))} pages, no broken link")
    sys.exit(bool(wrong))
