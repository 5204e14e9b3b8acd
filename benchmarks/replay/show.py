"""The results of the replay as a table and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

NAMES = {
    "race": "kvat (race)",
    "one_shot": "exhaustive, 1 launch × 10",
    "interleaved": "exhaustive, 3 interleaved launches",
    "at_random": "random loads, at the cost of kvat",
    "halving": "successive halving (Optuna), one candidate to a launch",
}


def write_table(path: Path, results: dict[str, Any], bins: list[dict[str, float]]) -> None:
    """One row for each kind of world and strategy, and the reliability of what is claimed."""
    lines = [
        "| worlds | strategy | mean regret | 95th percentile | within 1 % of the best | cost ÷ grid | loads |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for case, rows in results.items():
        lines += [
            f"| {case} ({row['worlds']}) | {NAMES[name]} | {row['regret_mean']:.2%} | {row['regret_p95']:.2%} "
            f"| {row['within_1_percent']:.1%} | {row['cost_vs_grid']:.2f} | {row['loads']:.0f} |"
            for name, row in rows.items()
        ]
    lines += ["", "| claimed confidence | realised | worlds |", "|--:|--:|--:|"]
    lines += [f"| {one['claimed']:.3f} | {one['realised']:.3f} | {one['worlds']:.0f} |" for one in bins]
    path.write_text("\n".join(lines) + "\n")


def write_plot(path: Path, results: dict[str, Any], bins: list[dict[str, float]]) -> None:
    """Regret against cost of each strategy, and claimed against realised confidence."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "kvat"
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5))
    compared = {case: rows for case, rows in results.items() if len(rows) > 1}
    for name, label in NAMES.items():
        points = [(rows[name]["cost_vs_grid"], 100 * rows[name]["regret_p95"]) for rows in compared.values()]
        left.scatter(*zip(*points, strict=True), label=label, s=24)
    left.set_xscale("log")
    left.set_xlabel("cost ÷ interleaved grid of three launches")
    left.set_ylabel("95th percentile of regret, %")
    left.legend(fontsize="small")
    right.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    right.plot([one["claimed"] for one in bins], [one["realised"] for one in bins], marker="o", linestyle="none")
    right.set_xlabel("claimed confidence")
    right.set_ylabel("share within ε of the best")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
