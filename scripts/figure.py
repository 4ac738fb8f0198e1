"""Draws docs/passes.svg, exact match against passes, from the first table of docs/recipes.md.

python scripts/figure.py
"""

from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"
QUESTIONS, BASE, BASE_PASSES = 60, 42, 10.1  # the causal base, greedy: docs/recipes.md
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 360, 56, 24, 24, 48
MOST_PASSES = 17
COLOURS = ("#c2410c", "#a16207", "#15803d", "#1d4ed8")


def read_series(text: str) -> dict[str, list[tuple[float, int]]]:
    """(passes, exact matches) of each way of decoding; a row without a name belongs to the one before."""
    series: dict[str, list[tuple[float, int]]] = {}
    name = ""
    table = text.split("| decoding | budget of passes |")[1].split("\n\n")[0].splitlines()[2:]
    for line in table:
        cells = [cell.strip().strip("*") for cell in line.strip("|").split("|")]
        name = cells[0].replace("`", "") or name
        series.setdefault(name, []).append((float(cells[3]), int(cells[2])))
    steady = next(name for name in series if name.startswith("steady"))
    for name in [name for name in series if name.startswith("the same, threshold")]:
        series[steady] += series.pop(name)  # one curve: steady at falling thresholds
    return {name: sorted(set(points)) for name, points in series.items()}


def x_of(passes: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * passes / MOST_PASSES


def y_of(exact: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * exact / QUESTIONS


def text_at(x: float, y: float, text: str, anchor: str = "start", colour: str = "#374151") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{text}</text>'


def draw(series: dict[str, list[tuple[float, int]]]) -> str:
    """The figure as SVG."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12" role="img" aria-label="Exact match against forward passes">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for exact in range(0, QUESTIONS + 1, 10):
        y = y_of(exact)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#e5e7eb"/>')
        parts.append(text_at(LEFT - 8, y + 4, str(exact), "end"))
    parts += [text_at(x_of(passes), HEIGHT - BOTTOM + 18, str(passes), "middle") for passes in range(0, 17, 2)]
    parts.append(text_at(x_of(8), HEIGHT - 10, "forward passes per answer (canvas of 16 tokens)", "middle"))
    parts.append(text_at(8, 14, f"exact match of {QUESTIONS}"))
    parts.append(f'<path d="M{LEFT} {y_of(BASE):.1f}H{WIDTH - RIGHT}" stroke="#6b7280" stroke-dasharray="5 4"/>')
    base = f"causal base, greedy: {BASE} in {BASE_PASSES} passes"
    parts.append(text_at(WIDTH - RIGHT, y_of(BASE) - 18, base, "end", "#6b7280"))
    for number, (name, points) in enumerate(series.items()):
        colour = COLOURS[number]
        path = "L".join(f"{x_of(passes):.1f} {y_of(exact):.1f}" for passes, exact in points)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts += [f'<circle cx="{x_of(p):.1f}" cy="{y_of(e):.1f}" r="3.5" fill="{colour}"/>' for p, e in points]
        y = y_of(22) + 18 * number
        parts.append(f'<circle cx="{x_of(8.6):.1f}" cy="{y - 4:.1f}" r="3.5" fill="{colour}"/>')
        parts.append(text_at(x_of(8.8), y, name.replace("the same, ", ""), colour=colour))
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    (DOCS / "passes.svg").write_text(draw(read_series((DOCS / "recipes.md").read_text())))
