"""docs/speed.md, made from the tables of tests/benchmarks in results/reference/benchmarks.

The page's sentences hold for whatever the numbers are, but for those of the template that give
numbers themselves, which were measured by hand. `runner.results` writes it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

import cam_core as cc
from lab import HOME

BENCHMARKS = HOME / "results" / "reference" / "benchmarks"
DEPTHS = ("layer4", "layer2 + layer4")
NETWORKS = {"resnet18": "ResNet-18", "resnet50": "ResNet-50"}


def speed_page(folder: Path = BENCHMARKS) -> str:
    """docs/speed.md. ValueError where the tables come from more than one machine."""
    times = pd.read_csv(folder / "cam.csv")
    memory = pd.read_csv(folder / "cam_memory.csv")
    start = pd.read_csv(folder / "cam_start.csv")
    scoring = pd.read_csv(folder / "faithfulness.csv")
    grown = pd.read_csv(folder / "growth.csv")
    machines = set(pd.concat([times, memory, start, scoring, grown])["machine"])
    if len(machines) > 1:
        raise ValueError(f"{folder} has tables of several machines: {sorted(machines)}.")
    many = times[times["batch"] == times["batch"].max()]
    single = times[times["batch"] == 1]
    parts = dict(list(scoring.groupby("metric")))
    areas, deletion = parts["insertion and deletion"], parts["deletion"]
    start = start.set_index("name")
    page = Path(__file__).with_name("speed_template.md").read_text("utf-8")
    return page.format(
        machine=machines.pop(),
        budget=budget(folder),
        map_difference=times["largest_difference"].max(),
        batch=many["batch"].iloc[0],
        maps=maps_table(many, memory),
        peers=peers(many),
        single_n=single["n"].iloc[0],
        single=maps_table(single),
        search=search(folder),
        slider=start["ms"]["slider"],
        start=start["ratio"]["cam_core"],
        arch=NETWORKS[areas["arch"].iloc[0]],
        images=areas["images"].iloc[0],
        steps=areas["steps"].iloc[0],
        area_difference=_tolerance(areas, 1e-5),
        areas=scoring_table(areas),
        flipping_steps=deletion["steps"].iloc[0],
        flipping_difference=_tolerance(deletion, 1e-5),
        deletion=scoring_table(deletion),
        imputed=parts["imputation"]["pictures"].iloc[0],
        imputed_difference=_tolerance(parts["imputation"], 1e-4),
        imputation=scoring_table(parts["imputation"]),
        road_difference=_tolerance(parts["ROAD"], 1e-3),
        road=scoring_table(parts["ROAD"]),
        bf16=bf16(folder),
        growth=growth(grown),
    )


def _tolerance(table: pd.DataFrame, least: float) -> float:
    """To what the codes of a table agree: `least`, at which the benchmark would have stopped."""
    assert table["difference"].max() <= least
    return least


def _ratio(row, column: str = "ratio") -> str:
    """A ratio with its interval."""
    start = "" if column == "ratio" else f"{column}_"
    low, high = row[f"{start}low"], row[f"{start}high"]
    return f"{row[column]:.2f} [{low:.2f}, {high:.2f}]"


def maps_table(times: pd.DataFrame, memory: pd.DataFrame | None = None) -> str:
    """Times of maps beside a bare pass, for each network and depth; and what autograd keeps."""
    places = [(arch, depth) for arch in NETWORKS for depth in DEPTHS]
    heads = [f"{NETWORKS[arch]}, {depth}" for arch, depth in places]
    kept = None
    if memory is not None:
        heads.append("MiB kept")
        kept = memory[(memory["arch"] == "resnet50") & (memory["depth"] == "layer4")]
        kept = kept.set_index("name")["held_mib"]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    times = times.set_index(["name", "arch", "depth"])
    for name in times.index.unique("name"):
        rows = [times.loc[(name, *place)] for place in places]
        cells = ["1.00" if name.startswith("bare") else _ratio(row) for row in rows]
        if kept is not None:
            cells.append(f"{kept[name]:.0f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def peers(times: pd.DataFrame) -> str:
    """What the peers take beside ours for the same two maps of ResNet-50."""
    rows = times[(times["arch"] == "resnet50") & (times["depth"] == "layer4")].set_index("name")
    separate, shared, large = (
        _ratio(rows.loc[name], "to_ours")
        for name in (
            "TorchCAM: both maps",
            "TorchCAM: both maps, sharing a pass",
            "pytorch-grad-cam: both maps at 224 px",
        )
    )
    return (
        f"For the same two maps at `layer4` of ResNet-50, pytorch-grad-cam takes {large} times as "
        f"long as ours, and TorchCAM {separate} times. When both extractors of TorchCAM share one "
        f"forward pass, they take {shared} times as long as ours and keep all activations for it."
    )


def scoring_table(table: pd.DataFrame) -> str:
    """Pictures, rates and times of one metric."""
    rated = "rate_to_bare" in table and table["rate_to_bare"].notna().any()
    heads = ["pictures", "per s", *(["rate"] if rated else []), "time"]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for _, row in table.iterrows():
        cells = [f"{row['pictures']:.0f}", f"{row['per_s']:.3g}"]
        cells += [f"{row['rate_to_bare']:.2f}"] if rated else []
        cells.append("1.00" if row["name"] == "ours" else _ratio(row))
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def bf16(folder: Path) -> str:
    """What scoring in bfloat16 brings on this machine."""
    file = folder / "faithfulness_bf16.csv"
    if not file.is_file():
        return (
            "This processor has no bfloat16 instructions, so `-p precision bf16` was not measured."
        )
    table = pd.read_csv(file).set_index("name")
    return (
        f"`-p precision bf16` scores {table.ratio['float32']:.2f} times as fast, with a mean "
        f"absolute error of {table.mean_error['bf16']:.4f} in the areas (n = "
        f"{table.curves['bf16']} curves, largest {table.largest_error['bf16']:.4f})."
    )


def growth(grown: pd.DataFrame) -> str:
    """How time and memory grow with images and with steps."""
    sentences = []
    for varied, part in grown.groupby("varied", sort=False):
        first, last = part.iloc[0], part.iloc[-1]
        sentences.append(
            f"From {first[varied]} to {last[varied]} {varied}, {last[varied] / first[varied]:.0f} "
            f"times as many, time grows {last['seconds'] / first['seconds']:.1f}-fold, and the "
            f"peak of memory from {first['peak_mib']:.0f} to {last['peak_mib']:.0f} MiB."
        )
    return " ".join(sentences)


def budget(folder: Path) -> str:
    """How many pictures a default run scores, beside an earlier version; from pictures.csv:
    version (the earlier one first), notebook, forward, backward, asked.
    """
    file = folder / "pictures.csv"
    if not file.is_file():  # counted by hand, and not by the benchmarks
        return ""
    counts = pd.read_csv(file, dtype={"version": str, "notebook": str})
    before, now = counts["version"].unique()[[0, -1]]
    counts = counts.set_index(["version", "notebook"])[["forward", "backward", "asked"]]
    old, new = counts.loc[before], counts.loc[now]
    lines = [
        f"| notebook | forward, {before} | forward, now | backward, {before} | backward, now "
        "| points of curves, now |",
        "|---|---|---|---|---|---|",
    ]
    rows = [(name, old.loc[name], new.loc[name]) for name in new.index]
    for name, a, b in [*rows, ("all", old.sum(), new.sum())]:
        cells = [a["forward"], b["forward"], a["backward"], b["backward"], b["asked"]]
        lines.append(f"| {name} | {' | '.join(f'{cell:,.0f}' for cell in cells)} |")
    share = new["forward"].sum() / old["forward"].sum()
    of_curves = new[new["asked"] > 0].sum()
    passes = of_curves["forward"] / of_curves["asked"]
    table = "\n".join(lines)
    return f"""\
## Pictures

A picture is one image in one pass. How many of them a default run, `./run_all.sh`, scores does not
depend on the machine:

{table}

That is {100 * share:.0f} % of the forward passes of version {before}. The smaller default is part
of that: 12 images instead of 24, and checks by half the steps. The last column is the naive
count: the points of curves whose value was asked for. Points that show the same picture are scored
once within a notebook. The notebooks that ask for curves make {100 * passes:.0f} %
as many passes, those for maps and predictions included.

{estimates(folder)}"""


def estimates(folder: Path) -> str:
    """What the runner said beforehand, and how long it took; from times.csv: machine, notebook,
    estimated_s, measured_s.
    """
    file = folder / "times.csv"
    if not file.is_file():
        return ""
    times = pd.read_csv(file, dtype={"notebook": str})
    names = list(times["notebook"].unique())
    lines = [f"| | {' | '.join(names)} | all |", "|---" * (2 + len(names)) + "|"]
    for machine, part in times.groupby("machine", sort=False):
        part = part.set_index("notebook")[["estimated_s", "measured_s"]] / 60
        part.loc["all"] = part.sum()
        cells = [f"{row.estimated_s:.1f} / {row.measured_s:.1f}" for row in part.itertuples()]
        lines.append(f"| {machine} | {' | '.join(cells)} |")
    table = "\n".join(lines)
    return f"""\
The runner measures a bare pass and says at the start how long a run will take. Minutes by notebook,
estimated / measured:

{table}
"""


# ---- choosing: successive halving on recorded curves

RECORDED = {
    "synthetic": "synthetic images with their twins, ResNet-18",
    "photographs": "ILSVRC photographs, RISE's baselines, EfficientNet-Lite0, the product alone",
}


def recorded(name: str, folder: Path = BENCHMARKS) -> np.ndarray:
    """Full curves of the fusions that notebook 04 tries, (images, 2, candidates, 29), insertion and
    deletion; on disk in steps of 1/65535.
    """
    return np.load(folder / f"search_{name}.npz")["curves"].astype(np.float64) / 65535


def losses(curves: np.ndarray, draws: int = 200) -> np.ndarray:
    """What successive halving misses of the best criterion, insertion - deletion, on as many image
    sets drawn with replacement; 0 where it finds the winner of an exhaustive search.
    """
    steps = curves.shape[-1] - 1
    rng = np.random.default_rng(0)
    found = []
    for _ in range(draws):
        some = curves[rng.integers(0, len(curves), len(curves))]

        def criterion(left: list, count: int, some: np.ndarray = some) -> pd.Series:
            points = cc.few_points(steps, count) if count else list(range(steps + 1))
            insertion, deletion = cc.auc(some[:, :, left][..., points], points).mean(0)
            return pd.Series(insertion - deletion)

        whole = criterion(list(range(curves.shape[2])), 0)
        found.append(whole.max() - whole[cc.successive_halving(whole.index, criterion)[0]])
    return np.array(found)


def search(folder: Path) -> str:
    """How often successive halving finds the best, and what it loses where it does not."""
    lines = ["| recorded curves | images | candidates | winner found | mean loss | largest loss |"]
    lines.append("|---|---|---|---|---|---|")
    for name, about in RECORDED.items():
        curves = recorded(name, folder)
        loss = losses(curves)
        found = f"{(loss < 1e-6).mean():.1%} | {loss.mean():.5f} | {loss.max():.5f}"
        lines.append(f"| {about} | {len(curves)} | {curves.shape[2]} | {found} |")
    return "\n".join(lines)
