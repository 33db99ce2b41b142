"""The style sheet of the page: one calm column, light and dark, figures from edge to edge on a phone."""

STYLE = """
:root { --page: #ffffff; --ink: #1b1f24; --muted: #5b636d; --line: #dde1e6; --soft: #f5f7f9; --mark: #d55e00; }
@media (prefers-color-scheme: dark) {
  :root { --page: #16191d; --ink: #e8eaed; --muted: #a4acb6; --line: #343a42; --soft: #1f242a; --mark: #f28340; }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 820px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 12px; }
h2 { font-size: 1.15rem; margin: 44px 0 10px; }
.lead { font-size: 1.06rem; }
.note { border-left: 3px solid var(--mark); padding: 4px 12px; background: var(--soft); }
figure { margin: 0; }
img { display: block; width: 100%; height: auto; }
figcaption, section > p { color: var(--muted); font-size: 0.9rem; }
figcaption { margin-top: 6px; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; min-width: 60%; }
th, td { padding: 5px 18px 5px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { color: var(--muted); font-weight: 500; white-space: nowrap; }
tbody th { font-weight: 500; }
details { margin-top: 10px; }
summary { cursor: pointer; color: var(--muted); font-size: 0.9rem; }
pre { background: var(--soft); padding: 10px 12px; overflow-x: auto; font-size: 0.82rem; line-height: 1.45; }
@media (max-width: 600px) {
  main { padding: 20px 16px 48px; }
  figure img { width: calc(100% + 24px); max-width: none; margin: 0 -12px; }
}
"""
