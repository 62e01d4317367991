"""The picture of the README: what turned frames cost, and what alignment gives back. Run: make figures.

Four clients hold the same rank-4 update with a little noise of their own, and each client's frame is turned by a random
rotation of a given largest angle. Writes docs/results/frames.csv (every seed) and docs/frames.png from that file.
"""

import csv
from pathlib import Path
from statistics import mean, stdev

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fedrot import Adapter, LoraPair, align
from fedrot.core.diagnostics import exact_errors
from fedrot.core.seeding import generator
from table import read_csv

DOCS = Path(__file__).parents[1] / "docs"
CLIENTS, RANK, WIDTH, NOISE, SEEDS = 4, 4, 64, 0.4, range(10)
ANGLES = (0, 15, 30, 45, 60, 75, 90, 120, 150, 180)
VARIANTS = {"FedIT (no alignment)": 0.0, "FedRot, strength 0.4": 0.4, "FedRot, strength 1": 1.0}


def turned(angle: float, rng: torch.Generator) -> torch.Tensor:
    """A random rotation in SO(r) whose largest angle is `angle` degrees."""
    k = torch.randn(RANK, RANK, generator=rng, dtype=torch.float64)
    k = k - k.T
    largest = torch.linalg.eigvals(k).imag.abs().max()
    return torch.linalg.matrix_exp(k / largest * torch.deg2rad(torch.tensor(float(angle))))


def clients(angle: float, seed: int) -> tuple[list[Adapter], Adapter]:
    """The clients' adapters and the reference that they started from."""
    rng = generator("frames", seed)
    a = torch.randn(RANK, WIDTH, generator=rng, dtype=torch.float64) / WIDTH**0.5
    b = torch.randn(WIDTH, RANK, generator=rng, dtype=torch.float64) / WIDTH**0.5
    made = []
    for _ in range(CLIENTS):
        r = turned(angle, rng)
        own_a = a + NOISE * torch.randn(a.shape, generator=rng, dtype=torch.float64) / WIDTH**0.5
        own_b = b + NOISE * torch.randn(b.shape, generator=rng, dtype=torch.float64) / WIDTH**0.5
        made.append(Adapter({"layer": LoraPair(r.T @ own_a, own_b @ r, scale=1.0)}))
    return made, Adapter({"layer": LoraPair(a, b, scale=1.0)})


def measure() -> list[tuple[str, int, int, float]]:
    """(variant, angle, seed, relative aggregation error) for all."""
    rows = []
    for angle in ANGLES:
        for seed in SEEDS:
            held, reference = clients(angle, seed)
            for name, strength in VARIANTS.items():
                aligned = [align(adapter, reference, "A", strength) for adapter in held]
                errors = exact_errors(aligned, [1.0] * CLIENTS)["layer"]
                rows.append((name, angle, seed, (errors["after2"] / errors["ideal2"]) ** 0.5))
            rows.append(("rank-4 floor", angle, seed, (errors["floor2"] / errors["ideal2"]) ** 0.5))
    return rows


def draw(path: Path, out: Path) -> None:
    """The figure, from the file alone: mean over seeds, with a band of one standard deviation."""
    rows = read_csv(path)
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.add_subplot()
    for name, colour in zip(
        dict.fromkeys(r["variant"] for r in rows), ("#D55E00", "#56B4E9", "#0072B2", "#000000"), strict=True
    ):
        values = {a: [float(r["error"]) for r in rows if r["variant"] == name and r["angle"] == str(a)] for a in ANGLES}
        middle = [mean(v) for v in values.values()]
        spread = [stdev(v) for v in values.values()]
        style = {"linestyle": ":"} if "floor" in name else {"marker": "o", "markersize": 3.5}
        ax.plot(ANGLES, middle, color=colour, label=name, **style)
        low, high = ([m + sign * s for m, s in zip(middle, spread, strict=True)] for sign in (-1, 1))
        ax.fill_between(ANGLES, low, high, color=colour, alpha=0.15, linewidth=0)
    ax.set_xlabel("how far each client's frame is turned (degrees)")
    ax.set_ylabel("aggregation error, of the ideal update")
    ax.set_xticks(range(0, 181, 30))
    ax.set_ylim(bottom=0)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, axis="y", alpha=0.25)
    ax.legend(frameon=False)
    figure.savefig(out, dpi=150)


def main() -> None:
    """Measure, write, draw."""
    path = DOCS / "results" / "frames.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["variant", "angle", "seed", "error"])
        writer.writerows((*row[:3], f"{row[3]:.6f}") for row in measure())
    draw(path, DOCS / "frames.png")
    print(path, DOCS / "frames.png", sep="\n")


if __name__ == "__main__":
    main()
