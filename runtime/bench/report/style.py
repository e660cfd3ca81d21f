"""The report's style sheet: light and dark, wide and narrow, on screen and on paper."""

STYLE = """
:root { --bg:#fbfbfa; --panel:#ffffff; --ink:#1b1d22; --dim:#5d6470; --line:#e2e4e8; --good:#0b7a4b; --bad:#b3261e;
  --c0:#6b7280; --c1:#0b66c3; --c2:#c2410c; --c3:#0f766e; --c4:#9d3c8c; --c5:#8a6100; --c6:#4338ca; }
@media (prefers-color-scheme: dark) { :root { --bg:#121418; --panel:#1a1d23; --ink:#e9ebef; --dim:#a0a7b4; --line:#2e333c;
  --good:#4fd29a; --bad:#ff8a80; --c0:#a5adba; --c1:#62aef7; --c2:#ff9a62; --c3:#4fd0c0; --c4:#e58bd4; --c5:#e6b74a; --c6:#a3a0ff; } }
* { box-sizing: border-box; }
body { margin:0; background:var(--bg); color:var(--ink); font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif; }
header, main { max-width:1240px; margin:0 auto; padding:0 24px; }
header { padding-top:44px; }
.eyebrow { margin:0; color:var(--dim); font-size:.85rem; letter-spacing:.02em; }
h1 { margin:.25em 0 0; font-size:clamp(1.3rem, 3vw, 1.8rem); line-height:1.25; font-weight:650; max-width:36em; overflow-wrap:anywhere; }
h2 { margin:2.4em 0 .7em; font-size:1.2rem; font-weight:650; }
h3 { margin:0 0 .4em; font-size:1rem; font-weight:600; }
main { padding-bottom:72px; }
.cards { display:grid; grid-template-columns:repeat(auto-fit,minmax(170px,1fr)); gap:12px; margin:0 0 20px; }
.cards div { background:var(--panel); border:1px solid var(--line); border-radius:10px; padding:14px 16px; }
.cards dt { color:var(--dim); font-size:.85rem; }
.cards dd { margin:2px 0 0; font-size:1.5rem; font-weight:650; font-variant-numeric:tabular-nums; }
.cards dd.sub { font-size:.85rem; font-weight:400; color:var(--dim); }
.scroll { overflow-x:auto; background:var(--panel); border:1px solid var(--line); border-radius:10px; }
table { border-collapse:collapse; width:100%; font-size:.82rem; font-variant-numeric:tabular-nums; }
.warn { border-left:4px solid var(--c5); background:var(--panel); padding:8px 14px; margin:0 0 12px; font-size:.92rem; }
.hint { color:var(--dim); font-size:.88rem; max-width:75em; }
tr.first th, tr.first td { border-top:2px solid var(--dim); }
th, td { padding:6px 7px; text-align:left; white-space:nowrap; border-bottom:1px solid var(--line); }
th:first-child { padding-left:16px; } td:last-child, th:last-child { padding-right:16px; }
thead th { color:var(--dim); font-weight:500; font-size:.82rem; }
tbody th { font-weight:600; } tr.eager th, tr.eager td, tr.compiled th, tr.compiled td { color:var(--dim); font-weight:400; }
.narrow th, .narrow td { padding:2px 12px; font-weight:400; }
.n { text-align:right; } .failed { color:var(--bad); white-space:normal; }
.charts { display:grid; grid-template-columns:repeat(auto-fill,minmax(min(100%,500px),1fr)); gap:16px; }
figure { margin:0; background:var(--panel); border:1px solid var(--line); border-radius:10px; padding:18px 20px 14px; }
figcaption { color:var(--dim); font-size:.85rem; margin-top:8px; }
svg { display:block; width:100%; height:auto; max-width:760px; }
svg text { fill:var(--ink); font-size:13px; } svg .tick, svg .name { fill:var(--dim); font-size:12px; }
svg .row { font-weight:600; fill:currentColor; }
svg .grid { stroke:var(--line); } svg .axis { stroke:var(--dim); }
svg .line { fill:none; stroke:currentColor; stroke-width:2; stroke-linejoin:round; }
svg .dot { fill:currentColor; } svg .ring { fill:none; stroke:currentColor; stroke-width:3; }
svg .whisker { stroke:currentColor; stroke-width:1.5; opacity:.5; }
svg .area { fill:currentColor; opacity:.28; } svg .mark { stroke:currentColor; stroke-width:2; }
.s0 { color:var(--c0); } .s1 { color:var(--c1); } .s2 { color:var(--c2); } .s3 { color:var(--c3); } .s4 { color:var(--c4); }
.s5 { color:var(--c5); } .s6 { color:var(--c6); }
.legend { display:flex; flex-wrap:wrap; gap:4px 18px; list-style:none; margin:0 0 8px; padding:0; font-size:.85rem; }
.key { display:inline-block; vertical-align:middle; margin-right:7px; width:18px; border-top:3px solid currentColor; }
.key.dash { border-top-style:dashed; border-top-width:2px; }
.key.ring { width:12px; height:12px; border:3px solid currentColor; border-radius:50%; }
.gallery { display:grid; grid-template-columns:repeat(auto-fill,minmax(min(45%,165px),1fr)); gap:12px; list-style:none; margin:0 0 1.6em; padding:0; }
.gallery li { background:var(--panel); border:1px solid var(--line); border-radius:10px; overflow:hidden; }
.gallery img { display:block; width:100%; aspect-ratio:1; object-fit:contain; image-rendering:pixelated; background:var(--line); }
.gallery div { padding:8px 12px 10px; font-size:.85rem; line-height:1.4; overflow-wrap:anywhere; }
.gallery span { display:block; } .truth { font-weight:600; } .number { color:var(--dim); }
.right { color:var(--good); } .wrong { color:var(--bad); }
details { background:var(--panel); border:1px solid var(--line); border-radius:10px; padding:12px 18px; margin-bottom:12px; }
summary { font-weight:600; cursor:pointer; }
.facts { display:grid; grid-template-columns:minmax(110px,max-content) 1fr; gap:5px 22px; margin:10px 0; font-size:.9rem; }
.facts dt { color:var(--dim); } .facts dd { margin:0; overflow-wrap:anywhere; }
.notes { color:var(--dim); font-size:.88rem; padding-left:1.2em; }
@media print { body { background:none; } section { break-inside:avoid-page; } }
"""
