"""Tables: as text, in colour with ``rich.print``, and as HTML in a notebook."""

import abc
import html
from collections.abc import Sequence
from typing import Any, NamedTuple

__all__ = ["Table", "Tabular"]


class Table(NamedTuple):
    """Cells of a table, as text.

    Attributes:
      header: the name of each column.
      rows: a tuple of cells each.
      totals: rows below a rule.
      left: which columns are set to the left; numbers go to the right.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    totals: tuple[tuple[str, ...], ...] = ()
    left: tuple[int, ...] = (0,)

    def without_empty_columns(self, keep: int = 0) -> "Table":
        """The table without the columns that are empty in all rows, but for the first ``keep``."""
        shown = [i for i in range(len(self.header)) if i < keep or any(row[i] for row in self.rows)]
        header, rows, totals = (
            tuple(tuple(line[i] for i in shown) for line in lines) for lines in ([self.header], self.rows, self.totals)
        )
        return Table(header[0], rows, totals, tuple(shown.index(i) for i in self.left if i in shown))

    def text(self) -> str:
        """The table in plain text."""
        lines = [self.header, *self.rows, *self.totals]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        rule = "  ".join("-" * width for width in widths)
        text = ["  ".join(
            cell.ljust(width) if i in self.left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip() for line in lines]  # fmt: skip
        body, totals = text[1 : 1 + len(self.rows)], text[1 + len(self.rows) :]
        return "\n".join([text[0], rule, *body, *([rule, *totals] if totals else [])])

    def html(self) -> str:
        """The table for a page, in the colours of its text, so for light and dark pages."""

        def row(cells: Sequence[str], tag: str, style: str = "") -> str:
            sides = ["left" if i in self.left else "right" for i in range(len(cells))]
            return "<tr>" + "".join(
                f'<{tag} style="text-align:{side};padding:0.15em 0.8em;{style}">{html.escape(cell)}</{tag}>'
                for cell, side in zip(cells, sides, strict=True)
            ) + "</tr>"  # fmt: skip

        rule = "border-top:1px solid currentColor;"
        totals = [row(cells, "td", rule if i == 0 else "") for i, cells in enumerate(self.totals)]
        return "\n".join([
            '<div style="overflow-x:auto"><table style="border-collapse:collapse;font-variant-numeric:tabular-nums">',
            f"<thead>{row(self.header, 'th', 'border-bottom:1px solid currentColor;')}</thead>",
            "<tbody>", *(row(cells, "td") for cells in self.rows), *totals, "</tbody></table></div>",
        ])  # fmt: skip


class Tabular(abc.ABC):
    """Base class of results with a table: text when printed, coloured by ``rich.print``, HTML in a notebook."""

    @abc.abstractmethod
    def table(self) -> Table:
        """The cells."""

    def __str__(self) -> str:
        return self.table().text()

    __repr__ = __str__

    def __rich__(self) -> Any:
        from rich.markup import escape
        from rich.table import Table as RichTable

        table = self.table()
        shown = RichTable(header_style="bold", box=None, pad_edge=False)
        for i, name in enumerate(table.header):
            shown.add_column(name, justify="left" if i in table.left else "right", style="cyan" if i == 0 else None,
                             overflow="fold")  # fmt: skip
        for cells in table.rows:
            shown.add_row(*map(escape, cells))
        if table.totals:
            shown.add_row(*("" for _ in table.header))
        for cells in table.totals:
            shown.add_row(*map(escape, cells), style="bold")
        return shown

    def _repr_html_(self) -> str:
        return self.table().html()
