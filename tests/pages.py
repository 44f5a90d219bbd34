"""HTML, read back."""

import html.parser

VOID = {"meta", "br", "img", "input"}


class Page(html.parser.HTMLParser):
    """The text of a page, its tables as rows of cells, and what it refers to. Complains of tags that are not closed."""

    def __init__(self, text):
        super().__init__()
        self.text, self.tables, self.links, self.open, self.drawings = "", [], [], [], 0
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.links += [value for name, value in attrs if name in ("href", "src", "xlink:href")]
        self.drawings += tag == "svg"
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        elif self.open and self.open[-1] not in ("style", "script"):
            self.text += data
