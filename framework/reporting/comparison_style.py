"""How the page of a comparison looks: on a phone, on a screen, in the dark and on paper."""

STYLE = """
:root { --paper: #fff; --ink: #1f2328; --muted: #59636e; --rule: #d0d7de; --soft: #f6f8fa; --link: #0969da;
  --up: #1a7f37; --down: #cf222e; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --paper: #0d1117; --ink: #e6edf3; --muted: #9da7b3; --rule: #30363d;
  --soft: #161b22; --link: #58a6ff; --up: #3fb950; --down: #ff7b72; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 66rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.25rem 0 .5rem; }
p, li { max-width: 46rem; }
p { margin: .5rem 0 .75rem; }
a { color: var(--link); }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1rem; padding: 0; list-style: none; }
ul { padding-left: 1.2rem; }
.note { color: var(--muted); font-size: .9rem; }
.up { color: var(--up); } .down { color: var(--down); }
.interval { color: var(--muted); white-space: nowrap; }
.box { border: 1px solid var(--rule); border-left: .3rem solid var(--down); background: var(--soft);
  padding: .25rem 1rem; margin: 1rem 0; border-radius: .25rem; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
figure { margin: 0; min-width: 0; }
figure img { display: block; width: 100%; max-width: 34rem; height: auto; background: #fff;
  border: 1px solid var(--rule); border-radius: .25rem; }
figcaption { color: var(--muted); font-size: .85rem; padding: .25rem 0; }
.clips { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 10rem), 1fr)); }
.clips figure { max-width: 16rem; }
video { display: block; width: 100%; height: auto; image-rendering: pixelated; background: #888;
  border-radius: .25rem; }
.caption { font-weight: 600; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .25rem 0; }
th, td { text-align: right; padding: .3rem .5rem; border-bottom: 1px solid var(--rule); vertical-align: top; }
th:first-child { text-align: left; }
thead th { color: var(--muted); font-weight: 600; }
tbody th { font-weight: 400; min-width: 6.5rem; }
td, thead th { overflow-wrap: normal; }
.strong > * { background: var(--soft); } .strong th { font-weight: 600; }
pre { background: var(--soft); border: 1px solid var(--rule); border-radius: .25rem; padding: .75rem; font-size: .8rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; padding: .25rem 0; }
@media screen and (max-width: 52rem) {
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  table, caption, tbody, tr, tbody th, td { display: block; width: 100%; text-align: left; }
  tr { border: 1px solid var(--rule); border-radius: .25rem; margin: .5rem 0; padding: .25rem .5rem; }
  tr.strong { background: var(--soft); }
  tbody th, td { border: 0; padding: .1rem 0; }
  tbody th { font-weight: 600; }
  td { display: flex; justify-content: space-between; gap: 1rem; }
  td::before { content: attr(data-label); color: var(--muted); }
}
@media print {
  :root { --paper: #fff; --ink: #000; --muted: #444; --rule: #bbb; --soft: #f4f4f4; --up: #1a7f37; --down: #b3131d; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav, details { display: none; }
  .grid { grid-template-columns: 1fr 1fr; }
  figure, tr, .box, .clips { break-inside: avoid; }
  h2, h3, caption { break-after: avoid; }
}
"""
