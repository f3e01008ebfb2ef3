"""Make docs/results.md, docs/speed.md and the results in README.md from results/reference/: `python
-m runner.results`.

Every sentence about results comes from `lab.sentences`, so it says what the numbers allow.
"""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

import cam_core as cc
from lab import HOME
from runner import speed

REFERENCE = HOME / "results" / "reference"
BEGIN, END = "<!-- made by python -m runner.results -->", "<!-- until here -->"
ENDPOINTS = {  # what a reader calls them; the arrow tells which way is better
    "energy": "share of the map inside the lesion (energy) ↑",
    "average_precision": "lesion's pixels ranked first (average precision) ↑",
    "insertion": "probability while pixels are put back (insertion AUC) ↑",
    "deletion": "probability while pixels are replaced (deletion AUC) ↓",
}


def endpoints_table(summary: pd.DataFrame) -> str:
    """The primary endpoints, hybrid against Grad-CAM, as a Markdown table of four rows."""
    rows = summary[summary["primary"] & (summary["network"] == summary["network"].iloc[0])]
    lines = [
        "| | Grad-CAM | hybrid | difference [95 % interval] | p (Holm) | |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows.sort_values("metric", key=lambda m: m.map(list(ENDPOINTS).index)).to_dict(
        "records"
    ):
        interval = f"{row['difference']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]"
        lines.append(
            f"| {ENDPOINTS[row['metric']]} | {row['reference_mean']:.3f} | {row['mean']:.3f} "
            f"| {interval} | {row['p_holm']:.2g} | {cc.statistics.judgement(row, 'p_holm')} |"
        )
    return "\n".join(lines)


def readme_part() -> str:
    """The answer and the table of README.md."""
    tables = cc.sentences.read_tables(REFERENCE / "full")
    summary = tables["summary"]
    found = cc.sentences.conclusions(**tables)
    black = summary[(summary["method"] == "hybrid") & (summary["baseline"] == "black")]
    black = black[black["metric"] == "insertion"].iloc[0]
    moved = summary[(summary["network"] == "squeezenet1_1") & summary["primary"]]
    chosen_anew = cc.sentences.conclusions(**cc.sentences.read_tables(REFERENCE / "squeezenet"))
    paragraphs = [
        f"**{found.headline}** {found.about} {found.fusion}",
        endpoints_table(summary),
        f"It depends on what takes the place of a pixel. With black pixels, {_small(black)}",
        "It does not carry over. On SqueezeNet, with the same choice, "
        f"{_lower(cc.sentences.headline(moved.to_dict('records')))} With a fusion chosen for it, "
        f"{_lower(chosen_anew.headline)}",
    ]
    return "\n\n".join(paragraphs)


def _lower(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]


def _small(row: pd.Series) -> str:
    return _lower(
        cc.sentences.verdict(row, "p", lambda m: cc.sentences.IN_WORDS.get(m, "Grad-CAM"))
    )


def results_page() -> str:
    """docs/results.md."""
    full = cc.sentences.read_tables(REFERENCE / "full")
    squeezenet = cc.sentences.read_tables(REFERENCE / "squeezenet")
    shortcut = (REFERENCE / "shortcut" / "tables" / "05_shortcut.md").read_text("utf-8")
    page = Path(__file__).with_name("results_template.md").read_text("utf-8")
    return page.format(
        full=cc.sentences.conclusions(**full).markdown(True),
        full_table=endpoints_table(full["summary"]),
        squeezenet=cc.sentences.conclusions(**squeezenet).markdown(True),
        squeezenet_table=endpoints_table(squeezenet["summary"]),
        shortcut=shortcut,
    )


def with_results(readme: str) -> str:
    """README with its results made anew."""
    part = f"{BEGIN}\n\n{readme_part()}\n\n{END}"
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: part, readme, flags=re.S)


def main() -> None:
    readme = HOME / "README.md"
    readme.write_text(with_results(readme.read_text("utf-8")), "utf-8")
    (HOME / "docs" / "results.md").write_text(results_page(), "utf-8")
    (HOME / "docs" / "speed.md").write_text(speed.speed_page(), "utf-8")
    print("README.md, docs/results.md and docs/speed.md are made anew from results/reference/.")


if __name__ == "__main__":
    main()
