"""Tables and drawings that fit the window they are printed in: from 80 columns on no figure is cut.

In: columns and rows, or a function that draws into a given width. Out: rich renderables. One too wide for its window
first closes the gaps between its columns, then breaks headings and wraps words, and last leaves out columns that its
maker named as expendable, saying so in a line below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Column, Table
from rich.text import Text

WIDE_GAP, CLOSE_GAP, HALF = 3, 1, 0.5


def table(
    title: str, *columns: str, left: int = 1, text: Sequence[str] = (), expendable: Sequence[str] = ()
) -> FittedTable:
    """An empty table in the one style of meshwright. The first `left` columns and those named in `text` are words, the
    others numbers; `expendable` ones may be left out of a narrow window, the first named first."""
    made = FittedTable(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False
    )
    made.expendable = tuple(expendable)
    for number, name in enumerate(columns):
        words = number < left or name in text
        made.add_column(name, justify="left" if words else "right", no_wrap=not words)
    return made


class FittedTable(Table):
    """A rich table that is laid out anew for the width it is printed in."""

    expendable: tuple[str, ...] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The first form that fits; the last one where none does."""
        forms = list(self._forms())
        form = next((one for one in forms if one.caps(options.max_width) is not None), forms[-1])
        yield self._drawn(form, form.caps(options.max_width))
        if form.left_out:
            yield Text(f"(left out in this narrow window: {', '.join(form.left_out)})", style="dim")

    def _forms(self) -> Iterator[_Form]:
        """Every way to draw this table, the roomiest first."""
        close = _Form(tuple(self.columns), ())
        for dropped in range(len(self.expendable) + 1):
            out = self.expendable[:dropped]
            columns = [column for column in self.columns if str(column.header) not in out]
            left_out = tuple(name for name in out if any(str(column.header) == name for column in self.columns))
            form = _Form(tuple(columns), left_out)
            close = replace(form, gap=CLOSE_GAP)
            if not dropped:
                yield from (form, close)
            yield replace(close, broken=True)
            if not dropped:
                yield replace(form, narrowest=HALF)
            yield replace(close, broken=True, narrowest=HALF)
        yield replace(close, broken=True, narrowest=0.0)

    def _drawn(self, form: _Form, caps: Sequence[int] | None) -> Table:
        """A plain table of this form."""
        made = Table(
            title=self.title, title_justify="left", title_style="bold", box=self.box, pad_edge=False, show_edge=False,
            padding=(0, (form.gap - 1) // 2),
        )  # fmt: skip
        for number, column in enumerate(form.columns):
            made.add_column(
                form.heading(column), justify=column.justify, no_wrap=column.no_wrap,
                max_width=None if caps is None else caps[number],
            )  # fmt: skip
        cells = [list(column.cells) for column in form.columns]
        for number, row in enumerate(self.rows):
            made.add_row(*(values[number] for values in cells), style=row.style, end_section=row.end_section)
        return made


@dataclass(frozen=True)
class _Form:
    """One way to draw a table."""

    columns: tuple[Column, ...]
    left_out: tuple[str, ...]
    gap: int = WIDE_GAP
    broken: bool = False
    narrowest: float = 1.0
    """Columns of words may be wrapped down to this share of their longest cell, and never break a word."""

    def heading(self, column: Column) -> str:
        """The name of a column, on several lines where headings of numbers are broken (words wrap by themselves)."""
        name = str(column.header)
        return name.replace(" ", "\n").replace("/GPU", "\n/GPU") if self.broken and column.no_wrap else name

    def caps(self, width: int) -> list[int] | None:
        """The width of every column if this form fits into `width`, else None. The widest words give first."""
        room = width - self.gap * (len(self.columns) - 1)
        natural = [max(_widths(column, self.heading(column), "\n")) for column in self.columns]
        least = [
            size if column.no_wrap else max(int(size * self.narrowest), *_widths(column, self.heading(column), None))
            for size, column in zip(natural, self.columns, strict=True)
        ]
        for cap in range(max(natural), 0, -1):
            sizes = [max(low, min(high, cap)) for low, high in zip(least, natural, strict=True)]
            if sum(sizes) <= room:
                return sizes
        return None


def _widths(column: Column, heading: str, separator: str | None) -> Iterator[int]:
    """Of every line of a column, or with separator None of every word."""
    yield 0
    for cell in (heading, *column.cells):
        yield from (cell_len(part) for part in str(cell).split(separator))


@dataclass(frozen=True)
class Drawing:
    """Text that is drawn for the width it is printed in."""

    draw: Callable[[int], str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.draw(options.max_width))
