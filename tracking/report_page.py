"""The report's page around its charts: style and script inline, nothing fetched from anywhere."""

from __future__ import annotations

from html import escape

# Blue, orange, green, then what is told apart from them, also by most who see colours differently.
_LIGHT = ("#2563eb", "#d9660a", "#0e9f6e", "#9333ea", "#dc2660", "#0891b2", "#7c6a0a", "#64748b")
_DARK = ("#6ea8fe", "#ffa94d", "#3ddc97", "#c792ff", "#ff7aa2", "#4dd4ec", "#d9c34a", "#9fb0c6")
PALETTE = len(_LIGHT)

_STYLE = """
:root { color-scheme: light dark;
  --page: #f6f7f9; --card: #fff; --ink: #1c2430; --dim: #5d6b7e; --line: #e3e7ed; LIGHT }
@media (prefers-color-scheme: dark) {
  :root { --page: #11151b; --card: #1a2029; --ink: #e6ebf2; --dim: #97a4b6; --line: #2c3541; DARK }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 28px 24px 48px; max-width: 1280px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 26px; margin: 0 0 18px; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 32px 0 12px; overflow-wrap: anywhere; }
.tiles, .charts { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); }
.charts { grid-template-columns: repeat(auto-fill, minmax(min(100%, 460px), 1fr)); }
.tiles div, figure, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 12px 16px; }
.tiles span { display: block; color: var(--dim); font-size: 13px; overflow-wrap: anywhere; }
.tiles b { font-size: 24px; font-weight: 600; font-variant-numeric: tabular-nums; }
figure { margin: 0; position: relative; }
figcaption { font-weight: 600; padding-right: 60px; overflow-wrap: anywhere; }
.log-toggle { position: absolute; opacity: 0; }
.log-toggle + label { position: absolute; right: 14px; top: 12px; padding: 0 9px; border: 1px solid var(--line);
  border-radius: 99px; color: var(--dim); font-size: 13px; cursor: pointer; user-select: none; }
.log-toggle:checked + label { color: var(--card); background: var(--ink); border-color: var(--ink); }
.log-toggle:focus-visible + label { outline: 2px solid var(--c0); }
.log, .log-toggle:checked ~ svg .linear { display: none; }
.log-toggle:checked ~ svg .log { display: inline; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 4px 0 6px; padding: 0;
  font-size: 13px; }
.legend li::before { content: ""; display: inline-block; width: 12px; height: 3px; border-radius: 2px;
  margin-right: 6px; vertical-align: middle; background: currentColor; }
.legend .name { color: var(--dim); overflow-wrap: anywhere; }
.legend b { color: var(--ink); font-weight: 600; font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; height: auto; touch-action: pan-y; }
svg text { fill: var(--dim); font-size: 11.5px; font-variant-numeric: tabular-nums; }
.grid { stroke: var(--line); stroke-width: 1; }
.curve { fill: none; stroke: currentColor; stroke-width: 1.7; stroke-linejoin: round; stroke-linecap: round; }
.noisy { stroke-width: 1; opacity: 0.35; }
circle { fill: currentColor; }
.cursor { stroke: var(--dim); stroke-dasharray: 3 3; visibility: hidden; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child > * { border-bottom: 0; }
th { color: var(--dim); font-weight: 500; }
td { overflow-wrap: anywhere; }
.facts td { white-space: pre-wrap; }
.facts th { white-space: nowrap; width: 1%; padding-right: 28px; }
.numbers td:first-child { min-width: 170px; }
.numbers td:not(:first-child), .numbers th:not(:first-child) { text-align: right; white-space: nowrap; padding-right: 0;
  padding-left: 18px; }
.samples { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); }
.samples img { width: 100%; margin-top: 6px; image-rendering: pixelated; }
.note { color: var(--dim); }
COLORS
@media print { body { max-width: none; } figure { break-inside: avoid; } .log-toggle + label { display: none; } }
"""

# Reads a chart's values at the pointer: the legend shows them in place of the last ones.
_SCRIPT = """
for (const figure of document.querySelectorAll("figure")) {
  const { box, steps, axes, curves } = JSON.parse(figure.querySelector("script").textContent);
  const [left, right, top, bottom] = box;
  const svg = figure.querySelector("svg"), cursor = svg.querySelector(".cursor");
  const caption = figure.querySelector("figcaption"), title = caption.textContent;
  const read = [...figure.querySelectorAll(".legend b")], last = read.map(b => b.textContent);
  const dots = [...figure.querySelectorAll(".legend li")].map(item => {
    const dot = document.createElementNS(svg.namespaceURI, "circle");
    dot.setAttribute("class", item.className);
    dot.setAttribute("r", 4);
    dot.style.visibility = "hidden";
    return svg.appendChild(dot);
  });
  const across = step => left + (step - steps[0]) / (steps[1] - steps[0]) * (right - left);
  const nearest = (curve, step) => {
    let low = 0, high = curve.length - 1;
    while (high - low > 1) { const mid = (low + high) >> 1; if (curve[mid][0] <= step) low = mid; else high = mid; }
    return step - curve[low][0] <= curve[high][0] - step ? curve[low] : curve[high];
  };
  const hide = () => {
    [cursor, ...dots].forEach(part => part.style.visibility = "hidden");
    read.forEach((b, i) => b.textContent = last[i]);
    caption.textContent = title;
  };
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("pointermove", event => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
    if (at < left - 4 || at > right + 4) return hide();
    const step = steps[0] + (at - left) / (right - left) * (steps[1] - steps[0]);
    const log = figure.querySelector(".log-toggle")?.checked, scale = log ? Math.log10 : value => value;
    const [low, high] = axes[log ? "log" : "linear"].map(scale);
    const points = curves.map(curve => nearest(curve, step));
    const near = points.reduce((a, b) => Math.abs(a[0] - step) <= Math.abs(b[0] - step) ? a : b)[0];
    cursor.setAttribute("x1", across(near));
    cursor.setAttribute("x2", across(near));
    cursor.style.visibility = "visible";
    caption.textContent = title + " at step " + near.toLocaleString("en");
    points.forEach(([where, value], i) => {
      read[i].textContent = value === null ? "NaN" : Number(value.toPrecision(4)).toString();
      dots[i].style.visibility = value === null ? "hidden" : "visible";
      if (value === null) return;
      dots[i].setAttribute("cx", across(where));
      dots[i].setAttribute("cy", bottom - (scale(value) - low) / (high - low) * (bottom - top));
    });
  });
}
"""


def page(title: str, body: str) -> str:
    """A whole HTML document. ``title`` is text, ``body`` is HTML."""
    colors = "\n".join(f".c{index} {{ color: var(--c{index}); }}" for index in range(PALETTE))
    style = _STYLE.replace("LIGHT", _variables(_LIGHT)).replace("DARK", _variables(_DARK)).replace("COLORS", colors)
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n<body>{body}<script>{_SCRIPT}</script></body></html>\n"
    )


def _variables(colors: tuple[str, ...]) -> str:
    return " ".join(f"--c{index}: {color};" for index, color in enumerate(colors))
