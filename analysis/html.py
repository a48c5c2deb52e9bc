"""Small pieces of HTML: escaped tables and inline pictures, styled by one sheet. Nothing is loaded from anywhere."""

import base64
import io
from html import escape

from matplotlib.figure import Figure

STYLE = """
:root { color-scheme: light }
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff }
body { max-width: 1280px; margin: 2rem auto; padding: 0 1.5rem }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.1rem; margin: 2.2rem 0 .5rem }
p.note { color: #555; max-width: 60rem } .scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th { border-bottom: 2px solid #999; font-weight: 600 } th:first-child, td:first-child { text-align: left }
td.text { text-align: left; white-space: normal; max-width: 48rem; overflow-wrap: anywhere }
th.text { text-align: left }
#comparison th, #comparison td { padding: .25rem .45rem }
#comparison :is(th, td):last-child { text-align: left; white-space: normal }
td.yes { background: #e0f0e8 } td.some { background: #fff3d6 }
td.no { background: #f3f3f3; color: #555 } td.none { color: #999 }
img { max-width: 100%; height: auto } .warn { background: #fff3d6; border-left: 4px solid #d90; padding: .4rem .8rem }
"""


def page(title: str, body: list[str]) -> str:
    """A whole document."""
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(body) + "\n</body></html>\n"


def table(header: list[str] | tuple[str, ...], rows: list, identity: str, text_columns: tuple[int, ...] = ()) -> str:
    """A table; a cell is a string, or (string, css class). `identity` is its id."""
    kinds = (' class="text"' if i in text_columns else "" for i in range(len(header)))
    head = "".join(f"<th{kind}>{escape(name)}</th>" for name, kind in zip(header, kinds, strict=True))
    body = []
    for row in rows:
        cells = []
        for i, cell in enumerate(row):
            text, kind = cell if isinstance(cell, tuple) else (cell, "text" if i in text_columns else "")
            cells.append(f'<td class="{kind}">{escape(text)}</td>' if kind else f"<td>{escape(text)}</td>")
        body.append("<tr>" + "".join(cells) + "</tr>")
    inner = f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"
    return f'<div class="scroll"><table id="{identity}">{inner}</table></div>'


def picture(figure: Figure, alt: str) -> str:
    """A figure as an inline PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def note(text: str, kind: str = "note") -> str:
    return f'<p class="{kind}">{escape(text)}</p>'
