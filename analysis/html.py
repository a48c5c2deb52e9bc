"""Small pieces of HTML: escaped tables and inline pictures, styled by one sheet. Nothing is loaded from anywhere."""

import base64
import io
from html import escape

from matplotlib.figure import Figure

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --soft: #555; --page: #fff; --rule: #ddd; --strong: #999 }
:root { --yes: #d9e9f8; --some: #fdebcf; --no: #f2f2f2; --base: #000 }
:root { --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #cc79a7; --c4: #56b4e9; --c5: #e69f00 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --soft: #a8a8a8; --page: #16181b; --rule: #34383d; --strong: #6a7078 }
  :root { --yes: #17395a; --some: #4d3a12; --no: #24272b; --base: #fff }
  :root { --c0: #4da6e0; --c1: #f28a3c; --c2: #2fc79d; --c3: #e3a0c6; --c4: #8fd0f5; --c5: #f0b940 }
  img { background: #fff }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page) }
body { max-width: 1280px; margin: 2rem auto; padding: 0 1.5rem }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.1rem; margin: 2.2rem 0 .5rem }
p.note { color: var(--soft); max-width: 60rem } .scroll { overflow-x: auto }
p.verdict { font-size: 1.1rem; max-width: 60rem; margin: .5rem 0 }
@media (max-width: 700px) { body { padding: 0 .7rem; margin: 1rem auto } h1 { font-size: 1.2rem } }
.row { display: flex; flex-wrap: wrap; gap: .4rem; align-items: center; margin: .3rem 0 }
button { font: inherit; font-size: 13.5px; color: inherit; background: none; border: 1px solid var(--strong) }
button { border-radius: .4rem; padding: .35rem .6rem; cursor: pointer } [aria-pressed=false] { opacity: .4 }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem }
figure { margin: 0; min-width: 0 } figcaption { font-size: 13.5px } .said { color: var(--soft); font-size: 13.5px }
.plot { touch-action: pan-y } .plot svg { display: block; user-select: none }
svg text { font-size: 12.5px; fill: var(--soft) } svg line, polyline { fill: none }
.grid { stroke: var(--rule) } .zero { stroke: var(--base) } .cursor { stroke: var(--strong); pointer-events: none }
.thick { stroke-width: 2 } .thin { stroke-width: .8; opacity: .35 } .bar { stroke-width: 2.5 }
.band { opacity: .18; stroke: none } .mark { fill: none; stroke-width: 1.5 } .drag { fill: var(--strong); opacity: .25 }
.sb { stroke: var(--base) } .band.sb { fill: var(--base) }
select { font: inherit; font-size: 13.5px; color: inherit; background: var(--page); border: 1px solid var(--strong) }
select { border-radius: .4rem; padding: .3rem; max-width: 100% } label { font-size: 13.5px; color: var(--soft) }
.maps { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem }
.multiples { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .4rem .6rem }
.multiples figcaption { color: var(--soft); overflow-wrap: anywhere } .multiples svg { display: block }
.pages [aria-pressed=false] { opacity: .75 } .pages [aria-pressed=true] { border-color: var(--ink); font-weight: 600 }
#inside svg text { font-size: 11.5px } #inside .value { fill: currentColor; pointer-events: none }
#inside :is(button, select, svg):focus-visible { outline: 2px solid var(--c0); outline-offset: 2px }
.missing { fill: none; stroke: var(--rule) } .picked { fill: none; stroke: var(--ink); stroke-width: 2.5 }
.others { stroke: var(--strong); opacity: .3; stroke-width: .8 } .dot { fill: #fff; stroke: #000; pointer-events: none }
.lifting svg { display: block } .lifting td { padding-block: .1rem } .lifting .zero { stroke: var(--strong) }
.fill0 { fill: var(--c0) } .fill1 { fill: var(--c1) } .error { stroke: var(--ink); stroke-width: 2 }
.diamond { fill: var(--page); stroke: var(--ink); stroke-width: 1.3 }
dt { font-weight: 600 } dd { margin: 0 0 .4rem 1rem; max-width: 56rem } summary { cursor: pointer }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap }
th { border-bottom: 2px solid var(--strong); font-weight: 600 } th:first-child, td:first-child { text-align: left }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--page) }
td.text { text-align: left; white-space: normal; max-width: 48rem; overflow-wrap: anywhere }
th.text { text-align: left }
#comparison th, #comparison td { padding: .25rem .45rem }
#comparison :is(th, td):last-child { text-align: left; white-space: normal }
td.yes { background: var(--yes) } td.some { background: var(--some) }
td.no { background: var(--no); color: var(--soft) } td.none { color: var(--strong) }
img { max-width: 100%; height: auto }
.warn { background: var(--some); border-left: 4px solid #d90; padding: .4rem .8rem }
"""
# One class a colour: a line's stroke, a band's fill.
STYLE += "".join(f".s{i} {{ stroke: var(--c{i}) }} .band.s{i} {{ fill: var(--c{i}) }}\n" for i in range(6))


def page(title: str, body: list[str]) -> str:
    """A whole document."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{escape(title)}</title><style>{STYLE}</style>"
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


def glossary(words: dict[str, str]) -> str:
    """Words and what they mean, folded away."""
    items = "".join(f"<dt>{escape(word)}</dt><dd>{escape(text)}</dd>" for word, text in words.items())
    return f"<details><summary>What the columns mean</summary><dl>{items}</dl></details>"


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def note(text: str, kind: str = "note") -> str:
    return f'<p class="{kind}">{escape(text)}</p>'
