# SPDX-License-Identifier: Apache-2.0
"""A page as a parser sees it."""

from html.parser import HTMLParser

INLINE = {"bdi", "b", "span"}
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Parsed(HTMLParser):
    """Elements, ids, and the text of each section without its figures, in which backticks stand for code.

    Attributes:
        elements: Name and attributes of each element, in order.
        texts: The text of each section, by its anchor.
        styles: What stands in style elements.
    """

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self.styles = ""
        self._open: list[str] = []
        self._section = ""
        self.feed(page)
        self.close()
        assert self._open == [], f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "code":
            self.handle_data("`")
        if tag == "section":
            self._section = str(dict(attributes)["id"])
            self.texts[self._section] = ""

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in INLINE:
            self.handle_data(" " if tag != "code" else "`")
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "style":
            self.styles += data
        elif self._section and "svg" not in self._open:
            self.texts[self._section] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """Attributes of each element of a kind."""
        return [attributes for name, attributes in self.elements if name == tag]
