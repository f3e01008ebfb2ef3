"""The numbers in README and docs are those of results/reference/."""

import pandas as pd
import pytest

from runner import results


def test_the_results_in_readme_and_docs_are_what_the_reference_gives(repo):
    readme = (repo / "README.md").read_text("utf-8")
    hint = "python -m runner.results makes them anew"
    assert results.with_results(readme) == readme, hint
    assert (repo / "docs/results.md").read_text("utf-8") == results.results_page(), hint


@pytest.fixture(scope="module")
def benchmarks(repo):
    return repo / "results/reference/benchmarks"


def test_the_tables_of_speed_are_those_of_the_benchmarks(repo, benchmarks):
    page = (repo / "docs/speed.md").read_text("utf-8")
    rows = [*map_rows(benchmarks), *scoring_rows(benchmarks)]
    assert len(rows) == 13 and [row for row in rows if row not in page] == []


def map_rows(folder):
    """Times and memory of maps: channels-last, batches of 16."""
    times = pd.read_csv(folder / "cam.csv")
    times = times[(times.layout == "channels_last") & (times.batch == 16)]
    times = times.set_index(["name", "arch", "depth"])
    memory = pd.read_csv(folder / "cam_memory.csv").set_index(["name", "arch", "depth"])
    for name in times.index.unique("name"):
        cells = []
        for arch in ("resnet18", "resnet50"):
            for depth in ("layer4", "layer2 + layer4"):
                row = times.loc[(name, arch, depth)]
                interval = f" [{row.low:.2f}, {row.high:.2f}]"
                cells.append(f"{row.ratio:.2f}" + ("" if name.startswith("bare") else interval))
        kept = memory.held_mib[(name, "resnet50", "layer4")]
        yield f"| {name} | {' | '.join(cells)} | {kept:.0f} |"


def scoring_rows(folder):
    """Pictures scored per second for insertion and deletion: channels-last."""
    table = pd.read_csv(folder / "faithfulness.csv")
    for name, part in table[table.layout == "channels_last"].groupby("name", sort=False):
        cells = []
        for steps in (28, 224):
            row = part[part.steps == steps].iloc[0]
            cells.append(f"{row.per_s:.0f} | {row.rate_to_bare:.2f} | {row.ratio:.2f}")
        yield f"| {name} | {' | '.join(cells)} |"


def test_the_other_numbers_about_speed(repo, benchmarks):
    page = " ".join((repo / "docs/speed.md").read_text("utf-8").split())
    times = pd.read_csv(benchmarks / "cam.csv")
    times = times[(times.layout == "channels_last") & (times.depth == "layer4")]
    times = times.set_index(["name", "arch", "batch"])
    first = times.loc[("pytorch-grad-cam: both maps at 224 px", "resnet50", 16)]
    second = times.loc[("TorchCAM: both maps", "resnet50", 16)]
    start = pd.read_csv(benchmarks / "cam_start.csv").set_index("name")
    bf16 = pd.read_csv(benchmarks / "faithfulness_bf16.csv").set_index("name")
    phrases = [
        f"take {first.to_ours:.1f} times as long as ours",
        f"[{first.to_ours_low:.1f}, {first.to_ours_high:.1f}] and TorchCAM's",
        f"{second.to_ours:.1f} times [{second.to_ours_low:.1f}, {second.to_ours_high:.1f}]",
        f"redraws in {start.ms['slider']:.0f} ms",
        f"Importing `cam_core` takes {start.ratio['cam_core']:.2f} times",
        f"scores {bf16.ratio['float32']:.2f} times as fast",
        f"absolute error of {bf16.mean_error['bf16']:.4f} in the areas",
    ]
    assert [phrase for phrase in phrases if phrase not in page] == []
