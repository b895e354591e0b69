"""Tables, rows and samples for the terminal."""


def printable(text):
    """Replace control characters except newline and tab: they could be terminal escape codes."""
    return "".join(c if c in "\n\t" or c.isprintable() else "\ufffd" for c in text)


def is_missing(value):
    """Return whether there is no value. A log has None where a row in memory has NaN."""
    return value is None or value != value


def cell(value, form):
    """Format one value: "-" if it is missing, 40/50/10 if it is a list of shares."""
    if is_missing(value):
        return "-"
    if isinstance(value, (list, tuple)):
        return "/".join(cell(x, ".0%").rstrip("%") for x in value)
    return format(value, form)


def format_table(rows, columns):
    """Format rows (dicts) as lines of aligned columns.

    columns: {heading: (key, format)}. Strings are aligned left, numbers right. A column without any
    value is left out.
    """
    columns = {heading: column for heading, column in columns.items()
               if not all(is_missing(r.get(column[0])) for r in rows)}
    lines = [list(columns)]
    for r in rows:
        lines.append([cell(r.get(key), form) for key, form in columns.values()])
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    text = [any(isinstance(r.get(key), str) for r in rows) for key, _ in columns.values()]
    result = []
    for line in lines:
        cells = [x.ljust(w) if t else x.rjust(w) for x, w, t in zip(line, widths, text)]
        result.append("  ".join(cells).rstrip())
    return "\n".join(result)


def print_row(row):
    """Print a row of metrics on one line: name, value, name, value, ..."""
    print("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v:>2}"
                    for k, v in row.items()))


def print_samples(chats, before, after):
    """Print the responses of two models to the same chats."""
    for chat, old, new in zip(chats, before, after):
        print(f"--- {chat[-1]['content']!r}\nbefore: {old!r}\nafter:  {new!r}")
