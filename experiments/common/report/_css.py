"""The style sheet of the report page: inline, no outside fonts, light and dark, narrow screens and print."""

CSS = """\
:root { color-scheme: light dark; --back: #ffffff; --card: #f8fafc; --text: #111827; --soft: #4b5563; --line: #d8dee8;
  --accent: #0072b2; --good: #00694d; --bad: #b33c00; --badge: #fde68a; --badge-text: #713f12; }
@media (prefers-color-scheme: dark) {
  :root { --back: #0f141b; --card: #18202b; --text: #e6eaf0; --soft: #a7b1bf; --line: #303b4a;
    --accent: #6cc0ee; --good: #4fd1a5; --bad: #ff9a66; --badge: #6b4e0a; --badge-text: #fef3c7; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
header p { margin: .3rem 0; color: var(--soft); }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .7rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.3rem 0 .4rem; color: var(--soft); font-weight: 600; }
nav { margin: .9rem 0 0; font-size: .9rem; display: flex; flex-wrap: wrap; gap: .25rem 1rem; }
a { color: var(--accent); text-underline-offset: .15em; }
.badge { display: inline-block; background: var(--badge); color: var(--badge-text); border-radius: .35rem;
  padding: .05rem .5rem; font-size: .82rem; font-weight: 600; white-space: nowrap; vertical-align: .1em; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .7rem; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .65rem .85rem; }
.tile .name { color: var(--soft); font-size: .84rem; }
.tile .value { font-size: 1.4rem; font-weight: 650; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tile .note { color: var(--soft); font-size: .82rem; min-height: 1.2em; }
.tile.main { border-color: var(--accent); box-shadow: inset 0 0 0 1px var(--accent); }
.tile.main .value { color: var(--accent); }
.tile.good .value { color: var(--good); }
.tile.bad .value { color: var(--bad); }
.wide { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .9rem; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .5rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td.n, th.n { text-align: right; white-space: nowrap; }
td.w { overflow-wrap: break-word; max-width: 20rem; }
tr.total td { font-weight: 650; border-top: 2px solid var(--line); }
caption { text-align: left; color: var(--soft); padding-bottom: .3rem; }
figure { margin: 1.2rem 0 1.8rem; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: .6rem; padding: .6rem; }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .45rem; max-width: 46rem; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .75rem .9rem;
  margin: .5rem 0; overflow-x: auto; font: .88rem/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
pre.wrap { white-space: pre-wrap; overflow-wrap: anywhere; }
details > summary { cursor: pointer; color: var(--accent); }
footer { margin-top: 3rem; color: var(--soft); font-size: .85rem; }
@media (max-width: 40rem) {
  main { padding: 1rem .8rem 3rem; } h1 { font-size: 1.35rem; } figure img { padding: .25rem; }
}
@media print { nav { display: none; } .tile, figure { break-inside: avoid; } }
"""
