"""An HTML page, read as strictly as a browser is not."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "img", "link", "input"}


class Page(HTMLParser):
    """Collects what a page refers to, and checks that its tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.alts: list[str] = []
        self.labels: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name in ("src", "href", "data", "action", "srcset", "poster", "xlink:href"):
            if values.get(name):
                self.sources.append(str(values[name]))
        if tag == "img":
            self.alts.append(values.get("alt") or "")
        if tag == "svg":
            self.labels.append(values.get("aria-label") or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag
