"""Reads the pages that report writes."""

from __future__ import annotations

import html.parser


class Page(html.parser.HTMLParser):
    """Collects text, headings, and everything that would be loaded from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words, self.loads, self.headings, self.svgs, self._stack = [], [], [], 0, []
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        self._stack.append(tag)
        self.svgs += tag == "svg"
        self.loads += [
            value
            for name, value in attrs
            if name in ("src", "srcset", "action") or (name in ("href", "xlink:href") and not value.startswith("#"))
        ]
        assert tag not in ("script", "link", "iframe", "img")

    def handle_data(self, data) -> None:
        self.words.append(data)
        if self._stack[-1:] == ["h2"]:
            self.headings.append(data)

    def handle_endtag(self, tag) -> None:
        if tag in self._stack:
            while self._stack.pop() != tag:
                pass
