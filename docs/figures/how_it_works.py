"""Draws docs/figures/how_it_works.png: python docs/figures/how_it_works.py"""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

# Okabe and Ito's colours, which everyone can tell apart.
OWN, LENT, GONE, PLAIN = "#0072B2", "#E69F00", "#BBBBBB", "#333333"


def box(axes, x, y, text, colour, dashed=False, width=1.5):
    style = {"facecolor": "white" if dashed else colour, "edgecolor": colour, "linestyle": "--" if dashed else "-"}
    axes.add_patch(
        FancyBboxPatch((x - width / 2, y - 0.3), width, 0.6, boxstyle="round,pad=0.06", linewidth=1.6, **style)
    )
    axes.text(x, y, text, ha="center", va="center", fontsize=10, color="#777777" if dashed else "white")


def arrow(axes, start, end, colour=PLAIN, bend=0.0, dashed=False):
    style = f"arc3,rad={bend}"
    line = "--" if dashed else "-"
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=13, color=colour, connectionstyle=style, linestyle=line
        )
    )


def layer(axes, x, title, borrows):
    axes.text(x, 6.5, title, ha="center", fontsize=12, weight="bold")
    side = GONE if borrows else OWN
    for offset, name in ((-2, "query"), (0, "key"), (2, "value")):
        gone = borrows and name != "value"
        box(axes, x + offset, 1.2, f"{name} proj.", GONE if gone else OWN, gone)
        arrow(axes, (x, 0.1), (x + offset, 0.78), GONE if gone else PLAIN, dashed=gone)
    axes.text(x, -0.2, "layer input", ha="center", fontsize=10)
    box(axes, x, 2.5, "key cache", side, borrows)
    box(axes, x + 2, 2.5, "value cache", OWN)
    arrow(axes, (x, 1.6), (x, 2.1), side if borrows else PLAIN, dashed=borrows)
    arrow(axes, (x + 2, 1.6), (x + 2, 2.1))
    box(axes, x - 1, 3.8, "softmax(Q K')" if not borrows else "no Q.K, no softmax", side, borrows, 2.6)
    arrow(axes, (x - 2, 1.6), (x - 1.5, 3.4), side if borrows else PLAIN, dashed=borrows)
    arrow(axes, (x, 2.9), (x - 0.6, 3.4), side if borrows else PLAIN, dashed=borrows)
    box(axes, x + 0.6, 5.1, "probabilities x values", OWN, width=3.0)
    arrow(axes, (x + 2, 2.9), (x + 1.1, 4.7))
    if not borrows:
        arrow(axes, (x - 0.8, 4.2), (x + 0.2, 4.7))
    arrow(axes, (x + 0.6, 5.5), (x + 0.6, 5.95))
    axes.text(x + 0.6, 6.05, "output proj.", ha="center", fontsize=10)


def main():
    figure = Figure(figsize=(10.5, 5.2), layout="constrained")
    axes = figure.add_subplot()
    layer(axes, 0, "source, layer s", borrows=False)
    layer(axes, 7, "borrower, layer l > s", borrows=True)
    arrow(axes, (0.4, 3.95), (6.4, 5.05), LENT, bend=-0.12)
    axes.text(3.4, 5.35, "attention probabilities,\nthe same tensor", ha="center", fontsize=10, color="#9a6a00")
    axes.set_xlim(-3.2, 10.2)
    axes.set_ylim(-0.6, 6.9)
    axes.axis("off")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
