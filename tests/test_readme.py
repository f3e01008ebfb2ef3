"""What README says is true: its table is that of the reference run, its code runs."""

import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import cam_core as cc

NAMES = {
    ("insertion", "twin"): "insertion AUC, twin ↑",
    ("deletion", "twin"): "deletion AUC, twin ↓",
    ("energy", ""): "energy in the mask ↑",
    ("average_precision", ""): "average precision ↑",
}


@pytest.fixture(scope="module")
def readme(repo):
    return (repo / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def summary(repo):
    table = pd.read_csv(repo / "results" / "reference" / "full" / "summary.csv", keep_default_na=False)
    return table[table.network == "resnet18"]


def table_row(row):
    """A primary endpoint as README prints it."""
    numbers = [float(row[k]) for k in ("reference_mean", "mean", "difference", "low", "high", "p_holm", "won")]
    base, mean, difference, low, high, p, won = numbers
    name = NAMES[row["metric"], row["baseline"]]
    interval = f"{difference:+.4f} [{low:+.4f}, {high:+.4f}]"
    return f"| {name} | {base:.4f} | {mean:.4f} | {interval} | {p:.2g} | {won:.0%} |"


def test_the_table_is_that_of_the_reference_run(readme, summary):
    primary = summary[summary.primary.astype(str) == "True"]
    assert len(primary) == 4
    for row in primary.to_dict("records"):
        assert table_row(row) in readme, table_row(row)


def test_the_answer_agrees_with_the_reference_run(readme, repo):
    """The sentences that the run generated stand in README as they are."""
    text = (repo / "results" / "reference" / "full" / "tables" / "05_conclusions.md").read_text(encoding="utf-8")
    primary = text.split("**Is it the fusion?**")[0]
    for line in [line for line in primary.splitlines() if line.startswith("- ")]:
        assert line in readme, line


@pytest.fixture(scope="module")
def numbers(repo):
    """Functions that print a number of the reference runs as README does."""
    folder = repo / "results" / "reference" / "full"
    table = pd.read_csv(folder / "summary.csv", keep_default_na=False).set_index(
        ["network", "method", "metric", "baseline"]
    )
    area = pd.read_csv(folder / "tables" / "05_by_area.csv").set_index(["group", "metric"])
    classes = pd.read_csv(folder / "tables" / "05_class_sensitivity.csv").set_index(["method", "metric"])

    def mean(method, metric, baseline="", digits=3):
        return f"{float(table.loc[('resnet18', method, metric, baseline), 'mean']):.{digits}f}"

    def change(method, metric, baseline="", network="resnet18"):
        row = table.loc[(network, method, metric, baseline)]
        return "{:+.4f} [{:+.4f}, {:+.4f}]".format(*(float(row[k]) for k in ("difference", "low", "high")))

    return SimpleNamespace(
        mean=mean,
        change=change,
        gain=lambda method, metric: f"{float(table.loc[('resnet18', method, metric, ''), 'difference']):+.3f}",
        area=lambda group, metric, digits: f"{area.loc[(group, metric), 'difference']:+.{digits}f}",
        classes=lambda method: f"{classes.loc[(method, 'class_spearman'), 'mean']:+.2f}",
    )


def test_the_numbers_of_the_short_answer(readme, numbers):
    """Every number of the answer stands in README as the reference run gives it."""
    mean, change, n = numbers.mean, numbers.change, numbers
    phrases = [
        f"energy on the lesion is {mean('hybrid', 'energy')} (Grad-CAM {mean('grad_cam', 'energy')})",
        f"average precision {mean('hybrid', 'average_precision')} ({mean('grad_cam', 'average_precision')})",
        f"deletion AUC {mean('hybrid', 'deletion', 'twin', 4)} ({mean('grad_cam', 'deletion', 'twin', 4)})",
        f"insertion ({change('hybrid', 'insertion_blocks', 'twin')})",
        f"deletion ({change('hybrid', 'deletion_blocks', 'twin')})",
        f"{mean('grad_cam_coarse', 'energy')} and {mean('grad_cam_coarse', 'average_precision')}, LayerCAM",
        f"{mean('layer_cam_shallow', 'energy')} and {mean('layer_cam_shallow', 'average_precision')})",
        f"spoils it (average precision {mean('times_other', 'average_precision')})",
        f"even higher average precision ({mean('times_sobel', 'average_precision')})",
        f"at less energy ({mean('times_sobel', 'energy')})",
        f"mean activation is not shown to differ in it ({mean('times_activation', 'average_precision')})",
        f"LayerCAM at `layer1` alone reaches it ({mean('layer_cam_shallow', 'deletion', 'twin', 4)})",
        f"shrinks from {n.gain('hybrid', 'energy')} to {n.gain('hybrid_coarse', 'energy')}",
        f"({n.area('≤ 1 cell', 'average_precision', 3)} to {n.area('> 10%', 'average_precision', 3)})",
        f"from {n.area('≤ 1 cell', 'deletion', 4)} below one cell",
        f"to {n.area('> 10%', 'deletion', 4)} above 10 % of the image",
        f"insertion is far *worse* ({change('hybrid', 'insertion', 'black')}, n = 50)",
        f"drop {mean('hybrid', 'drop', digits=2)}, Grad-CAM {mean('grad_cam', 'drop', digits=2)}",
        f"(insertion {change('hybrid_same', 'insertion', 'twin')}, energy {change('hybrid_same', 'energy')})",
        f"(energy {change('hybrid', 'energy', '', 'squeezenet1_1')}, n = 80)",
        f"class is {n.classes('hybrid')} (Grad-CAM {n.classes('grad_cam')},",
        f"shallow LayerCAM {n.classes('layer_cam_shallow')};",
    ]
    prose = " ".join(readme.split())
    assert [phrase for phrase in phrases if phrase not in prose] == []


def test_what_it_says_of_squeezenets_own_choice(readme, repo):
    table = pd.read_csv(repo / "results" / "reference" / "squeezenet" / "summary.csv")
    own = table[table.primary].set_index("metric")
    said = {metric: cc.judgement({**row, "metric": metric}, "p_holm") for metric, row in own.to_dict("index").items()}
    assert said["energy"] == said["average_precision"] == "better"
    assert said["insertion"] == said["deletion"] == "no difference"
    energy = table[table.metric == "energy"].set_index("method")["mean"]
    assert energy["layer_cam_shallow"] > energy["hybrid"]
    for metric in ("energy", "average_precision"):
        row = own.loc[metric]
        assert f"({row.difference:+.4f} [{row.low:+.4f}, {row.high:+.4f}])" in " ".join(readme.split())


def test_what_it_says_of_the_cheat(readme, repo):
    folder, prose = repo / "results" / "reference" / "shortcut" / "tables", " ".join(readme.split())
    accuracy = pd.read_csv(folder / "01_shortcut.csv").set_index("network")
    assert f"costs it {100 * accuracy.lost.cheating:.0f} points of accuracy, the honest network none" in prose
    assert accuracy.lost.honest == 0
    table = pd.read_csv(folder / "05_shortcut.csv").set_index(["metric", "method"])
    energy, found = table.loc["energy"].cheating, table.loc["found"]
    said = f"the hybrid puts {energy.hybrid:.1%} of its energy there, Grad-CAM {energy.grad_cam:.1%}, shallow LayerCAM"
    assert f"{said} {energy.layer_cam_shallow:.1%}" in prose and f"On {int(table.n.iloc[0])} images" in prose
    cams = found.loc[["grad_cam", "layer_cam", "hybrid", "hybrid_same", "layer_cam_shallow"]]
    assert (cams.cheating == 1).all() and (cams.honest == 0).all()


def test_the_words_of_the_short_answer(repo):
    """Better than either factor, another image's LayerCAM spoils it, edges alone do well: as the tables allow."""
    folder = repo / "results" / "reference" / "full"
    controls = pd.read_csv(folder / "tables" / "05_controls.csv").assign(method="hybrid", identical=False)
    said = {(r["reference"], r["metric"]): cc.judgement(r) for r in controls.to_dict("records")}
    for factor in ("layer_cam_shallow", "grad_cam_coarse", "times_other"):
        assert said[factor, "energy"] == said[factor, "average_precision"] == "better"
    assert said["times_sobel", "average_precision"] == "worse" and said["times_sobel", "energy"] == "better"
    assert said["layer_cam_shallow", "deletion"] == said["grad_cam_coarse", "deletion_blocks"] == "no difference"
    assert said["times_activation", "average_precision"] == "no difference"
    table = pd.read_csv(folder / "summary.csv")
    other = table[(table.network == "squeezenet1_1") & table.primary].to_dict("records")
    assert [cc.judgement(row, "p_holm") for row in other] == ["worse"] * 4


def test_its_python_runs(readme, tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", readme, re.S)
    assert len(blocks) == 2
    pixels = np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cc, "CAMS", dict(cc.CAMS))
    names = {}
    for block in blocks:
        exec(block, names)
    assert Image.open(tmp_path / "overlay.png").size == (90, 60)
    assert names["info"]["class_names"][names["found"].target] in capsys.readouterr().out
    assert "my_cam" in cc.CAMS


def test_a_cam_of_ones_own_is_in_every_map_table(monkeypatch):
    import torch

    monkeypatch.setattr(cc, "CAMS", {**cc.CAMS, "my_cam": lambda A, G: (A.float() * G.float()).relu().sum(1)})
    model, _ = cc.load_model("squeezenet1_1")
    x = torch.randn(2, 3, 64, 64)
    deep, shallow = cc.default_layers(model, x)
    layers = {"deep": deep, "coarse": deep, "shallow": shallow, "finer": list(cc.stages(model, x))[-2]}
    shot = cc.capture(model, x, list(layers.values()))
    maps = cc.method_maps(shot, x, layers, alpha=0.5, rule="product", ids=["a"], seed=0)
    assert maps["my_cam"].shape == (1, 64, 64) and cc.label("my_cam") == "my_cam"


def speed_rows(folder):
    """README's table of times and memory, line by line, from what benchmarks/cam.py wrote: channels-last, batch 16."""
    times = pd.read_csv(folder / "cam.csv").query("layout == 'channels_last' and batch == 16")
    times = times.set_index(["name", "arch", "depth"])
    held = pd.read_csv(folder / "cam_memory.csv").set_index(["name", "arch", "depth"])["held_mib"]
    where = [(arch, depth) for arch in ("resnet18", "resnet50") for depth in ("layer4", "layer2 + layer4")]
    for name in times.index.unique("name"):
        cells = []
        for arch, depth in where:
            row = times.loc[(name, arch, depth)]
            interval = "" if name.startswith("bare") else f" [{row.low:.2f}, {row.high:.2f}]"
            cells.append(f"{row.ratio:.2f}{interval}")
        yield f"| {name} | {' | '.join(cells)} | {held[(name, 'resnet50', 'layer4')]:.0f} |"


def scoring_rows(folder):
    """README's table of insertion and deletion, from what benchmarks/faithfulness.py wrote: channels-last."""
    table = pd.read_csv(folder / "faithfulness.csv").query("layout == 'channels_last'")
    for name, part in table.groupby("name", sort=False):
        part = part.set_index("steps")
        cells = [f"{part.per_s[s]:.0f} | {part.rate_to_bare[s]:.2f} | {part.ratio[s]:.2f}" for s in (28, 224)]
        yield f"| {name} | {' | '.join(cells)} |"


def test_the_tables_of_speed_are_those_of_the_benchmarks(readme, repo):
    folder = repo / "results" / "reference" / "benchmarks"
    rows = [*speed_rows(folder), *scoring_rows(folder)]
    assert len(rows) == 13 and [row for row in rows if row not in readme] == []


def test_the_words_about_speed(readme, repo):
    """Each number of the paragraph on speed, and the limits it claims, from the benchmarks' tables."""
    folder, prose = repo / "results" / "reference" / "benchmarks", " ".join(readme.split())
    times = pd.read_csv(folder / "cam.csv").query("layout == 'channels_last'")
    to_ours = times[times.depth == "layer4"].set_index(["name", "arch", "batch"])
    peers = [(name, "resnet50", 16) for name in ("pytorch-grad-cam: both maps at 224 px", "TorchCAM: both maps")]
    first, second = (to_ours.loc[key] for key in peers)
    slider = pd.read_csv(folder / "cam_start.csv").set_index("name")
    bf16 = pd.read_csv(folder / "faithfulness_bf16.csv").set_index("name")
    single = times[(times["name"] == "ours: both maps") & (times.arch == "resnet18") & (times.batch == 1)]
    one, two = (single.set_index("depth").loc[depth] for depth in ("layer4", "layer2 + layer4"))
    phrases = [
        f"{first.to_ours:.1f} times as long as here [{first.to_ours_low:.1f}, {first.to_ours_high:.1f}]",
        f"TorchCAM's {second.to_ours:.1f} times [{second.to_ours_low:.1f}, {second.to_ours_high:.1f}]",
        f"cost {one.ratio:.2f} [{one.low:.2f}, {one.high:.2f}] of a bare pass, and {two.ratio:.2f} "
        f"[{two.low:.2f}, {two.high:.2f}] across layers",
        f"redraws in {slider.ms['slider']:.0f} ms",
        f"importing `cam_core` takes {slider.ratio['cam_core']:.2f} times",
        f"{bf16.ratio['float32']:.2f} times as fast",
        f"mean absolute error of {bf16.mean_error['bf16']:.4f} in the areas (n = {bf16.curves['bf16']:.0f} curves, "
        f"largest {bf16.largest_error['bf16']:.4f})",
    ]
    assert [phrase for phrase in phrases if phrase not in prose] == []
    grown = pd.read_csv(folder / "growth.csv")
    images, steps = (grown[grown.varied == v] for v in ("images", "steps"))
    for part, count in ((images, "images"), (steps, "steps")):
        each = part.seconds / part[count]
        assert part[count].max() / part[count].min() == 64 and each.max() / each.min() < 2.5, "grows in proportion"
    assert images.peak_mib.max() < 1.25 * images.peak_mib.min(), "memory does not grow with the images"
