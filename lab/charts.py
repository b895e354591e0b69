"""Inline SVG and HTML for lab/report.py: charts with labels on the lines, no script, no address.

Every function returns a string. Colours are CSS variables of STYLE, so that one page serves light
and dark screens and paper.
"""
import html
import math
from typing import NamedTuple

WIDTH = 340                          # of a chart, in its own units
LEFT, RIGHT, TOP, BOTTOM = 40, 82, 8, 24   # room for the ticks and for the labels of the lines

STYLE = """
:root{--paper:#fff;--ink:#1c2024;--soft:#646b75;--rule:#e3e6ea;--band:#ced4db;--accent:#0b62c4;
--bad:#c2410c;color-scheme:light dark}
@media(prefers-color-scheme:dark){:root{--paper:#14171a;--ink:#e6e8ea;--soft:#9aa3ad;--rule:#2c3238;
--band:#3a424b;--accent:#6fb1ff;--bad:#ff9457}}
@media print{:root{--paper:#fff;--ink:#000;--soft:#555;--rule:#ddd;--band:#ced4db;--accent:#0b62c4;
--bad:#c2410c}@page{margin:14mm}*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1120px;padding:28px 20px 60px;background:var(--paper);
color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:15px;font-weight:600;color:var(--soft);margin:0 0 6px}
h2{font-size:19px;margin:44px 0 6px;break-after:avoid}
h3{font-size:15px;margin:18px 0 4px;break-after:avoid}
p{margin:4px 0 12px;max-width:76ch}
p.verdict{font-size:24px;line-height:1.35;margin:0 0 22px;max-width:46em}
.soft,figcaption span,th{color:var(--soft)}
.bad{color:var(--bad)}
code{font:13px ui-monospace,Menlo,Consolas,monospace;overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:max-content 1fr;gap:3px 18px;margin:0}
dt{color:var(--soft)}
dd{margin:0;min-width:0;overflow-wrap:anywhere}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(320px,100%),1fr));
gap:22px 26px}
.pair{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(440px,100%),1fr));
gap:22px 30px}
.grid>*,.pair>*{min-width:0}
figure{margin:0;break-inside:avoid}
figcaption{font-weight:600;margin-bottom:2px}
figcaption span{font-weight:400}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font:11px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;fill:var(--soft)}
svg .line{fill:none;stroke-width:1.8;stroke-linejoin:round}
svg .a{stroke:var(--accent)}svg text.a{fill:var(--accent);stroke:none;font-weight:600}
svg .b{stroke:var(--soft)}svg text.b{fill:var(--ink);stroke:none;font-weight:600}
svg .rule{stroke:var(--rule)}svg .zero{stroke:var(--soft);stroke-opacity:.6}
svg .band{fill:var(--band);fill-opacity:.6}svg .bar{fill:var(--accent);fill-opacity:.75}
svg .mark{stroke:var(--bad);stroke-dasharray:2 2}svg text.mark{fill:var(--bad);stroke:none}
.wide{overflow-x:auto;margin:0 0 10px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:14px}
th,td{text-align:left;padding:4px 14px 4px 0;border-bottom:1px solid var(--rule);
vertical-align:top}
th{font-weight:400}
tr{break-inside:avoid}
td.n,th.n{text-align:right}
td.n,td.s{white-space:nowrap}
td svg{width:130px}
.card{border-top:1px solid var(--rule);padding:10px 0 2px;break-inside:avoid}
.card p{margin:2px 0}
.tokens{font:14px/2.1 ui-monospace,Menlo,Consolas,monospace;margin:2px 0 8px;
overflow-wrap:anywhere}
.tokens b{font-weight:400;white-space:pre-wrap;padding:3px 1px;border:1px solid var(--soft);
border-left-width:0}
.tokens b:first-of-type{border-left-width:1px}
.small,.small table{font-size:13px}.small th,.small td{padding-right:9px}
@media(max-width:520px){body{padding:18px 14px 40px}p.verdict{font-size:20px}
dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:8px}}
@media print{body{max-width:none;padding:0;font-size:12px}p.verdict{font-size:18px}
.grid{grid-template-columns:repeat(2,1fr)}.pair.small{grid-template-columns:1fr}
h2+p{break-after:avoid}.wide{overflow:visible}}
"""


class Line(NamedTuple):
    """A line of a chart: (x, y) points, and the label at its end, such as "gold 0.71"."""
    points: list
    name: str
    form: str = ".2f"
    kind: str = "a"       # a: accent, b: grey

    def label(self):
        return f"{self.name} {format(self.points[-1][1], self.form)}".strip()


class Panel(NamedTuple):
    """Lines that share one y axis. bands: for each line the (x, low, high) of published runs."""
    lines: list
    bands: list = ()
    height: int = 150
    form: str = "g"       # of the ticks
    least: float = None   # the axis reaches at least from here
    most: float = None    # to here


def escape(text):
    """Return text for HTML; control characters, which it does not allow, become U+FFFD."""
    kept = (c if c in "\n\t" or ord(c) >= 32 and not 127 <= ord(c) < 160 else "\ufffd"
            for c in str(text))
    return html.escape("".join(kept).encode("utf-8", "replace").decode())


def ticks(low, high, n=4):
    """Return round numbers between low and high, about n of them."""
    rough = (high - low) / n
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def limits(values, least=None, most=None):
    """Return an axis that holds all values, and least and most if they are given."""
    low = min(values if least is None else [*values, least])
    high = max(values if most is None else [*values, most])
    if high - low < 1e-9 * max(1, abs(high)):
        return low - 0.5, high + 0.5
    pad = 0.04 * (high - low)
    return (low if low == least else low - pad), (high if high == most else high + pad)


def thin(points, most=300):
    """Keep at most about `most` points of a long line, among them the first and the last."""
    step = max(1, len(points) // most)
    kept = points[::step]
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def path(points):
    """Return the d of an SVG path through points in chart units."""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def spread_labels(heights, lowest, gap=12):
    """Move the labels of lines apart that end too close to each other -> heights up to `lowest`."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    moved = list(heights)
    for above, below in zip(order, order[1:]):
        moved[below] = max(moved[below], moved[above] + gap)
    last = order[-1]
    shift = max((moved[last] - heights[last]) / 2, moved[last] - lowest)
    return [y - shift for y in moved]


def panel_svg(panel, scale_x, top):
    """Draw one panel of a chart -> list of SVG elements."""
    values = [y for line in panel.lines for _, y in line.points]
    values += [y for band in panel.bands for _, *ends in band for y in ends]
    low, high = limits(values, panel.least, panel.most)

    def y_of(y):
        return top + panel.height * (high - y) / (high - low)

    right = WIDTH - RIGHT
    made = []
    for band in filter(None, panel.bands):
        edge = [(scale_x(x), y_of(upper)) for x, _, upper in band]
        edge += [(scale_x(x), y_of(lower)) for x, lower, _ in reversed(band)]
        made.append(f'<path class="band" d="{path(edge)}Z"/>')
    for tick in ticks(low, high, max(3, panel.height // 30)):
        y = y_of(tick)
        kind = "zero" if tick == 0 and low < 0 else "rule"
        made.append(f'<path class="{kind}" d="M{LEFT} {y:.1f}H{right}"/>')
        made.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">'
                    f'{format(tick, panel.form)}</text>')
    ends = spread_labels([y_of(line.points[-1][1]) for line in panel.lines],
                         top + panel.height - 4)
    for line, end in zip(panel.lines, ends):
        drawn = [(scale_x(x), y_of(y)) for x, y in thin(line.points)]
        made.append(f'<path class="line {line.kind}" d="{path(drawn)}"/>')
        made.append(f'<text class="{line.kind}" x="{drawn[-1][0] + 5:.1f}" y="{end + 4:.1f}">'
                    f'{escape(line.label())}</text>')
    return made


def chart(title, unit, panels, x_name, marks=()):
    """Return a figure of panels above each other with one x axis.

    marks: x positions of warnings. Lines without a point are left out; without any line the figure
    says so.
    """
    panels = [p._replace(lines=[line for line in p.lines if line.points]) for p in panels]
    panels = [p for p in panels if p.lines]
    caption = f"<figcaption>{escape(title)} <span>{escape(unit)}</span></figcaption>"
    if not panels:
        return f'<figure>{caption}<p class="soft">not in this log</p></figure>'
    xs = [x for p in panels for line in p.lines for x, _ in line.points]
    low, high = limits(xs, min(xs), max(xs))

    def scale_x(x):
        return LEFT + (WIDTH - LEFT - RIGHT) * (x - low) / (high - low)

    made = []
    top = TOP
    for panel in panels:
        bands = [[row for row in band if low <= row[0] <= high] for band in panel.bands]
        made += panel_svg(panel._replace(bands=bands), scale_x, top)
        top += panel.height + 14
    bottom = top - 14
    for x in marks:
        made.append(f'<path class="mark" d="M{scale_x(x):.1f} {TOP}V{bottom}"/>')
        made.append(f'<text class="mark" x="{scale_x(x) + 3:.1f}" y="{TOP + 8}">warning</text>')
    for tick in ticks(low, high):
        made.append(f'<text x="{scale_x(tick):.1f}" y="{bottom + 15}" text-anchor="middle">'
                    f'{tick:g}</text>')
    made.append(f'<text x="{WIDTH - RIGHT + 14}" y="{bottom + 15}">{escape(x_name)}</text>')
    size = f"0 0 {WIDTH} {bottom + BOTTOM}"
    return (f'<figure>{caption}<svg viewBox="{size}" role="img" aria-label="{escape(title)}">'
            f'{"".join(made)}</svg></figure>')


def interval(value, half, low, high):
    """Draw a value and its 95% interval on an axis from low to high, with a line at 0."""
    def x_of(x):
        return 4 + 142 * (min(max(x, low), high) - low) / (high - low)

    made = []
    if low < 0 < high:
        made.append(f'<path class="zero" d="M{x_of(0):.1f} 1V17"/>')
    made.append('<path class="rule" d="M4 9H146"/>')
    if half is not None:
        made.append(f'<path class="a" stroke-width="8" stroke-opacity=".35" '
                    f'd="M{x_of(value - half):.1f} 9H{x_of(value + half):.1f}"/>')
    made.append(f'<circle class="bar" cx="{x_of(value):.1f}" cy="9" r="3"/>')
    return f'<svg viewBox="0 0 150 18" aria-hidden="true">{"".join(made)}</svg>'


def histograms(groups, x_name, bins=36):
    """Draw one histogram per group under each other. groups: {label: numbers}; labels stay above.

    Each is scaled to its own highest bar; a tick marks the mean.
    """
    groups = {label: values for label, values in groups.items() if values}
    everything = [v for values in groups.values() for v in values]
    low, high = limits(everything)
    width = 560

    def x_of(x):
        return 8 + (width - 16) * (x - low) / (high - low)

    made = []
    top = 14
    for label, values in groups.items():
        counts = [0] * bins
        for v in values:
            counts[min(bins - 1, int(bins * (v - low) / (high - low)))] += 1
        mean = sum(values) / len(values)
        made.append(f'<text class="b" x="8" y="{top}">{escape(label)}</text>')
        made.append(f'<text x="{width - 8}" y="{top}" text-anchor="end">'
                    f'{len(values)} responses, mean score {mean:.2f}</text>')
        base = top + 50
        for i, count in enumerate(counts):
            if count:
                x = x_of(low + (high - low) * i / bins)
                h = 40 * count / max(counts)
                made.append(f'<rect class="bar" x="{x:.1f}" y="{base - h:.1f}" '
                            f'width="{(width - 16) / bins - 1:.1f}" height="{h:.1f}"/>')
        made.append(f'<path class="rule" d="M8 {base}H{width - 8}"/>')
        made.append(f'<path class="zero" stroke-width="2" '
                    f'd="M{x_of(mean):.1f} {base - 44}V{base + 4}"/>')
        top = base + 24
    for tick in ticks(low, high, 6):
        made.append(f'<text x="{x_of(tick):.1f}" y="{top - 8}" text-anchor="middle">'
                    f'{tick:g}</text>')
    made.append(f'<text x="{width - 8}" y="{top + 6}" text-anchor="end">{escape(x_name)}</text>')
    return f'<svg viewBox="0 0 {width} {top + 10}" role="img">{"".join(made)}</svg>'


def table(heads, rows, numbers=()):
    """Return a table; cells are HTML. numbers: indices of the columns that align right.

    The first column names the rows and is not broken.
    """
    def line(tag, cells):
        kinds = [' class="n"' if i in numbers else "" for i in range(len(cells))]
        kinds[0] = ' class="s"'
        return "".join(f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in zip(kinds, cells))

    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    return (f'<div class="wide"><table><thead><tr>{line("th", heads)}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>")


def facts(pairs):
    """Return a list of names and their values, both HTML; empty values are left out."""
    rows = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in pairs if value)
    return f"<dl>{rows}</dl>"


def page(title, parts):
    """Return the whole document."""
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width,initial-scale=1">'
            f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
            + "\n".join(parts) + "\n</body></html>\n")
