"""What a browser would find in a page: its tables, its texts, its numbers as JSON."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any, NamedTuple


class Found(NamedTuple):
    """A cell: its text, and the value that it is sorted by."""

    text: str
    value: str


class Page(HTMLParser):
    """The parts of a page; what is written there as text is text."""

    def __init__(self, source: str):
        super().__init__(convert_charrefs=True)
        self.tables: dict[str, list[list[Found]]] = {}
        self.heads: dict[str, list[str]] = {}
        self.ids: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._table = self._inside = ""
        self._scripts: dict[str, str] = {}
        self.feed(source)

    @property
    def figures(self) -> dict[str, Any]:
        return json.loads(self._scripts["figures"], parse_constant=lambda name: 1 / 0)

    @property
    def by_id(self) -> dict[str, str]:
        return {attributes["id"]: name for name, attributes in self.elements if "id" in attributes}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.elements.append((tag, attributes))
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag == "table":
            self._table = attributes["id"].removeprefix("table-")
            self.tables[self._table], self.heads[self._table] = [], []
        if tag == "th":
            self.heads[self._table].append(attributes["data-key"])
        if tag == "tr":
            self.tables[self._table].append([])
        if tag == "td":
            self.tables[self._table][-1].append(Found("", attributes["data-value"]))
        if tag in ("td", "script", "style", "small"):
            self._inside = attributes.get("id", tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "script", "style", "small"):
            self._inside = ""
        if tag == "thead":
            self.tables[self._table].clear()

    def handle_data(self, data: str) -> None:
        if self._inside == "td":
            cell = self.tables[self._table][-1][-1]
            self.tables[self._table][-1][-1] = Found((cell.text + data).strip(), cell.value)
        if self._inside in ("figures", "script"):
            self._scripts[self._inside] = self._scripts.get(self._inside, "") + data
        elif self._inside != "style":
            self.text += data
