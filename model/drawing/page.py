"""The frame of an HTML report: one file that needs no network and treats every name as plain text.

The page's Content-Security-Policy allows the one script and the one style sheet that it was made
with (by digest), and pictures from beside it or from data: URLs. It forbids everything else, so
`style=` and `onclick=` attributes have no effect: pass rules as `style` and code as `script`.
"""

import base64
import hashlib
import html

RESEARCH_ONLY = "Research use only; not a medical device."

# Classes for the body: .figures (a dl of key figures), .cards and .card (a grid), .wide (around a
# table that may be wider than a phone), .note, .doubt, .bad, .good and .dim (text), .controls.
BASE_STYLE = """\
:root { color-scheme: light dark; --ground: #f4f5f7; --card: #fff; --ink: #1b2128; --dim: #59626d;
  --line: #d5d9df; --accent: #0b5fa5; --doubt: #9a4b00; --doubt-ground: #fff1df; --bad: #b3201b;
  --good: #1d6b38; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171b; --card: #1e2329; --ink: #e8ebee;
  --dim: #a3adb8; --line: #38404a; --accent: #7cbcf5; --doubt: #ffb45e; --doubt-ground: #3a2a14;
  --bad: #ff8d86; --good: #7fd49b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
header, main, footer { max-width: 1240px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 22px; } footer { padding-bottom: 28px; color: var(--dim); }
h1 { font-size: 1.55rem; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 1.15rem; margin: 30px 0 10px; } h3 { font-size: 1rem; margin: 18px 0 6px; }
h1, h2, h3, p, li, dd, td, th, figcaption { overflow-wrap: anywhere; }
p { margin: 6px 0; max-width: 75ch; } a { color: var(--accent); }
.dim, figcaption { color: var(--dim); } .bad { color: var(--bad); }
.doubt { color: var(--doubt); } .good { color: var(--good); }
.note { border-left: 4px solid var(--doubt); background: var(--doubt-ground); padding: 8px 12px;
  border-radius: 4px; }
.figures { display: flex; flex-wrap: wrap; gap: 10px; margin: 14px 0; }
.figures > div { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 8px 14px; min-width: 104px; }
.figures dt { color: var(--dim); font-size: .85rem; }
.figures dd { margin: 0; font-size: 1.3rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; background: var(--card); font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--dim); padding: 4px 0; }
th, td { text-align: left; vertical-align: top; padding: 5px 12px 5px 8px;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; } td.number, th.number { text-align: right; white-space: nowrap; }
figure { margin: 12px 0; } figure img, figure svg { max-width: 100%; height: auto; }
.cards { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(270px, 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  overflow: hidden; min-width: 0; margin: 0; }
.card > :not(img):not(svg):not(.picture) { margin: 8px 12px; }
.card img { display: block; max-width: 100%; }
button, input, select { font: inherit; color: inherit; background: var(--card); padding: 7px 12px;
  border: 1px solid var(--line); border-radius: 6px; min-height: 40px; max-width: 100%; }
button { cursor: pointer; } button:hover:enabled { border-color: var(--accent); }
button:disabled { opacity: .5; cursor: default; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
.controls { display: flex; flex-wrap: wrap; gap: 8px; align-items: center; margin: 12px 0; }
[hidden] { display: none !important; }
@media (max-width: 600px) { header, main, footer { padding-left: 12px; padding-right: 12px; }
  .cards { grid-template-columns: 1fr; } .figures > div { flex: 1 1 40%; } }
@media print { :root { color-scheme: light; --ground: #fff; --card: #fff; --ink: #000;
  --dim: #444; --line: #bbb; --accent: #000; --doubt: #8a4300; --doubt-ground: #fff;
  --bad: #a00; --good: #060; } .controls, dialog { display: none !important; }
  .card, figure, tr { break-inside: avoid; } main, header, footer { max-width: none; padding: 0; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""


def page(title: str, body: str, script: str = "", style: str = "") -> str:
    """A complete HTML document.

    Args:
        title: plain text, for the window and the heading.
        body: HTML. Text from files, options or users must have gone through `escape`.
        script: JavaScript that runs at the end of the body.
        style: CSS added to BASE_STYLE.
    """
    head, foot = page_head_and_foot(title, script, style)
    return head + body + foot


def page_head_and_foot(title: str, script: str = "", style: str = "") -> tuple[str, str]:
    """The HTML before and after a page's body, for a body that is written piece by piece."""
    sheet = BASE_STYLE + style
    policy = (
        f"default-src 'none'; script-src {_csp_hash(script)}; style-src {_csp_hash(sheet)}; "
        "img-src 'self' file: data:; base-uri 'none'; form-action 'none'"
    )
    head = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{sheet}</style>
</head>
<body>
<header><h1>{escape(title)}</h1><p class="doubt">{RESEARCH_ONLY}</p></header>
<main>
"""
    run = f"<script>{script}</script>\n" if script else ""
    return head, f"\n</main>\n{run}</body>\n</html>\n"


def escape(text: str) -> str:
    """Text made safe for HTML, in an element or in a quoted attribute.

    Characters that cannot be shown, or that change the text around them (line ends, controls, marks
    of writing direction, bytes that are not UTF-8), appear as Python writes them: \\n, \\u202e,
    \\udcff.
    """
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return html.escape("".join(shown))


def _csp_hash(source: str) -> str:
    """The source expression by which a Content-Security-Policy allows a script or style sheet."""
    digest = hashlib.sha256(source.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
