"""Which fusion notebook 04 chooses: planted tables, in which it is known what has to win."""

from types import SimpleNamespace

import nets
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import cam_core as cc

PAIRS = ("layer4 × layer1", "layer4 × layer2", "layer3 × layer2", "layer3 × layer2+layer3")
ALPHAS = (0.0, 0.2, 0.5, 0.8, 1.0)
CELLS = [cc.Cell(pair, rule, alpha) for pair in PAIRS for rule in cc.FUSIONS for alpha in ALPHAS]
PRIOR = cc.Cell("layer4 × layer4", "product", cc.PRIOR_ALPHA)
HOME = cc.Cell("layer4 × layer2", "product", 0.5)


def planted(winner=HOME, gain=0.05, noise=0.01, n=30, seed=0, end=-0.2, prior=0.0):
    """A table as `sweep` returns it: images differ widely, fusions only by the winner's gain."""
    rng = np.random.default_rng(seed)
    cells = [*CELLS, PRIOR]
    kinds = ["prior" if c == PRIOR else "end" if c.alpha in (0, 1) else "fusion" for c in cells]
    offset = [{"prior": prior, "end": end, "fusion": 0.0}[kind] for kind in kinds]
    values = rng.uniform(0.2, 0.8, n) + noise * rng.standard_normal((len(cells), n))
    values += np.array(offset)[:, None]
    values[cells.index(winner)] += gain
    table = pd.DataFrame(np.repeat(cells, n, axis=0), columns=["layer", "rule", "alpha"])
    table["alpha"] = table["alpha"].astype(float)
    images = [f"val/{i:05d}" for i in range(n)] * len(cells)
    table = table.assign(image=images, kind=np.repeat(kinds, n), points=29)
    return table.assign(criterion=values.ravel())


WINNERS = [
    HOME,
    cc.Cell("layer4 × layer1", "product", 0.5),
    cc.Cell("layer3 × layer2", "product", 0.5),
    cc.Cell("layer3 × layer2+layer3", "product", 0.5),
    cc.Cell("layer4 × layer2", "mean", 0.5),
    cc.Cell("layer4 × layer2", "product", 0.8),
    cc.Cell("layer3 × layer2", "maximum", 0.2),
]


@pytest.mark.parametrize("winner", WINNERS, ids=str)
def test_another_table_another_choice(winner):
    assert cc.choose(planted(winner)) == winner


def test_the_table_on_disk_gives_the_same_choice(tmp_path):
    table = planted(gain=0.002)
    cc.runs.save_table(table, tmp_path / "sweep.csv")
    again = pd.read_csv(tmp_path / "sweep.csv")
    assert cc.choose(again) == cc.choose(table)
    assert cc.stability(again).equals(cc.stability(table))


GIVEN = {"shallow_layer": "layer1", "rule": "maximum", "alpha": 0.2}


@pytest.mark.parametrize("name", GIVEN)
def test_what_is_given_narrows_the_choice(name):
    table, value = planted(), GIVEN[name]
    part = {"shallow_layer": "fine"}.get(name, name)
    assert getattr(cc.choose(table), part) != value
    assert getattr(cc.choose(table, **{name: value}), part) == value
    assert cc.choose(table, **{name: getattr(HOME, part)}) == HOME
    assert cc.choose(table, **{name: "auto"}) == HOME
    shares = cc.stability(table, **{name: value})
    assert {getattr(cc.Cell(*cell), part) for cell in shares.index} == {value}


def test_what_is_given_is_taken_whatever_the_table_says():
    assert cc.choose(planted(), **GIVEN) == ("layer4 × layer1", "maximum", 0.2)


def test_a_value_that_was_not_measured_is_refused():
    with pytest.raises(ValueError, match="alpha=0.3.*not among"):
        cc.choose(planted(), alpha=0.3)


def test_an_image_without_a_value_is_refused():
    table = planted()
    first = table.index[table["kind"] == "fusion"][0]
    with pytest.raises(ValueError, match="lacks a value"):
        cc.choose(table.drop(index=first))
    table.loc[first, "criterion"] = np.nan
    with pytest.raises(ValueError, match="lacks a value"):
        cc.stability(table)


def test_no_end_and_no_prior_is_chosen_unless_its_weight_is_given():
    table = planted(end=0.3, prior=0.3)
    assert cc.choose(table) == HOME
    assert set(cc.stability(table).index.get_level_values("alpha")) == {0.2, 0.5, 0.8}
    assert cc.choose(table, alpha=1.0).alpha == 1.0
    end = cc.choose(table, alpha=0.0, shallow_layer="layer1")
    assert (end.fine, end.alpha) == ("layer1", 0.0)


def test_ties_go_to_the_first_in_a_fixed_order():
    table = planted(gain=0, noise=0)
    first = cc.choose(table)
    assert first == ("layer3 × layer2", next(iter(cc.FUSIONS)), 0.2)
    for seed in range(3):
        assert cc.choose(table.sample(frac=1, random_state=seed)) == first
    assert cc.stability(table)[tuple(first)] == 1


def test_the_second_of_two_equal_winners_never_wins():
    late, early = cc.Cell("layer4 × layer2", "mean", 0.5), cc.Cell("layer3 × layer2", "mean", 0.8)
    table = planted(late)
    same = cc.rows_of(table, early).index
    table.loc[same, "criterion"] = (
        cc.rows_of(table, late)["criterion"].to_numpy() + 1e-9
    )  # rounding
    assert cc.choose(table) == cc.choose(table[::-1]) == early
    assert list(cc.ranking(table).index[:2]) == [early, late]
    assert cc.stability(table)[tuple(early)] == 1


def test_stability_is_a_share_that_tells_a_clear_winner_from_noise():
    clear, noise = cc.stability(planted()), cc.stability(planted(gain=0))
    assert clear.sum() == pytest.approx(1) and noise.sum() == pytest.approx(1)
    assert clear[tuple(HOME)] == 1
    assert noise.max() < 0.7 and (noise > 0).sum() > 5
    assert len(noise) == len(PAIRS) * len(cc.FUSIONS) * 3


def test_stability_is_the_bootstrap_of_the_choice():
    """Against the slow way: draw images, choose again."""
    table = planted(gain=0.003, n=8, seed=3)
    share = cc.stability(table, draws=4000)
    wide, rng = cc.candidates(table).to_numpy(), np.random.default_rng(1)
    wins = [wide[rng.choice(8, 8)].mean(0).argmax() for _ in range(4000)]
    slow = np.bincount(wins, minlength=len(share)) / 4000
    assert share.to_numpy() == pytest.approx(slow, abs=0.04)


def test_stability_depends_on_its_seed_alone():
    table = planted(gain=0.002)
    share = cc.stability(table, seed=1)
    assert share.equals(cc.stability(table.sample(frac=1, random_state=0), seed=1))
    assert not share.equals(cc.stability(table, seed=2))


def test_one_image_is_enough_to_choose_and_always_agrees():
    winner = cc.Cell("layer3 × layer2", "mean", 0.8)
    table = planted(winner, n=1)
    assert cc.choose(table) == winner and cc.stability(table)[tuple(winner)] == 1


def test_a_map_alone_has_the_mean_of_its_ends():
    singles = cc.single_maps(planted(end=0.5))
    assert list(singles) == [
        "Grad-CAM at layer4",
        "Grad-CAM at layer3",
        "LayerCAM at layer1",
        "LayerCAM at layer2",
        "LayerCAM at layer2+layer3",
    ]
    assert all(value > 0.8 for value in singles.values())


# ---- what may be chosen


@pytest.mark.parametrize(
    "ladder, coarse, fine",
    [
        (
            ["relu", "layer1", "layer2", "layer3", "layer4"],
            ["layer4", "layer3", "layer3+layer4"],
            ["layer1", "layer2", "layer3", "layer2+layer3"],
        ),
        (["a", "b", "c"], ["c", "b", "b+c"], ["b"]),
        (["a", "b"], ["b", "a", "a+b"], ["a"]),
        (["a"], ["a"], ["a"]),
    ],
)
def test_the_layers_that_are_tried(ladder, coarse, fine):
    assert cc.layer_candidates(ladder) == (coarse, fine)


def test_the_shipped_choice_lies_as_many_stages_back_in_another_network():
    there = cc.shipped_choice(["relu", "layer1", "layer2", "layer3", "layer4"])
    assert there == ("layer3 × layer1", "product", 0.5)
    assert cc.shipped_choice(list("abcdefg")).pair == "f × d"
    assert cc.shipped_choice(["a", "b"]).pair == "a × a"
    assert cc.shipped_choice(["a"]).pair == "a × a"


def test_the_reason_names_what_was_given():
    assert cc.reason(12, [], 144, True) == "chosen on 12 validation images"
    assert "with rule given as a parameter" in cc.reason(12, ["rule"], 36, True)
    assert cc.reason(12, ["shallow_layer", "rule", "alpha"], 1, True) == "given as a parameter"
    other = cc.reason(6, ["alpha"], 1, False)
    assert "not chosen on your data" in other and "alpha given as a parameter" in other


# ---- the sweep


@pytest.fixture
def rows(tmp_path):
    """Three images with their targets, as `measurable` returns them."""
    draw = np.random.default_rng(0)
    files = []
    for k in range(3):
        files.append(str(tmp_path / f"{k}.png"))
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), np.uint8)).save(files[-1])
    return pd.DataFrame({"id": list("abc"), "file": files, "twin": "", "target": [0, 1, 2]})


def small_run(folder):
    """As much of a run as `sweep` needs, on a small network."""
    names = dict(baseline="twin,zero", steps=4, seed=0, batch_size=8, precision="float32")
    info = {"arch": "tiny", "sha256": "1", "weights": "own", "head": "softmax"}
    given = dict(settings=SimpleNamespace(**names), model=nets.strong(), info=info)
    how = cc.networks.as_preprocessing(16)
    return SimpleNamespace(**given, how=how, data=folder, device=torch.device("cpu"))


SMALL = [cc.Cell("6 × 2", rule, alpha) for rule in cc.FUSIONS for alpha in (0.0, 0.5, 1.0)]


def test_an_image_of_few_blocks_has_as_many_steps(rows):
    """32 x 32 pixels are four blocks of 16 x 16, so 28 steps by blocks are four."""
    model, cell = nets.strong(), [cc.Cell("6 × 2", "mean", 0.5)]
    asked, most = (
        cc.measure_cells(model, rows, cell, 32, "zero", steps=steps, block=16) for steps in (28, 4)
    )
    assert asked == most


def test_a_cell_is_the_area_under_the_curves_of_its_map(rows):
    """Against the parts it is made of, for one cell; and the ends are the same for every rule."""
    model, cell = nets.strong(), cc.Cell("6 × 2", "mean", 0.5)
    x = cc.datasets.load_batch(rows, size=16)
    captured = cc.capture(model, x, ["2", "6"], [0, 1, 2])
    maps = []
    for cam, name in ((cc.grad_cam, "6"), (cc.layer_cam, "2")):
        maps.append(cc.enlarge(cam(captured.activations[name], captured.gradients[name]), (16, 16)))
    fused = {"mean": cc.hybrid(*maps, 0.5, rule="mean")}
    grey = torch.zeros_like(x)
    curves = cc.faithfulness(model, x, fused, captured.target, list("abc"), grey, grey, steps=4)
    records = pd.DataFrame(cc.measure_cells(model, rows, SMALL, 16, "zero", steps=4))
    own = cc.rows_of(records, cell)
    assert own["image"].tolist() == list("abc")
    for metric in ("insertion", "deletion"):
        assert own[metric].to_numpy() == pytest.approx(cc.auc(curves[metric]["mean"]), abs=1e-6)
    ends = records[records["alpha"] != 0.5].groupby(["image", "alpha"])["insertion"]
    assert (ends.nunique() == 1).all()
    assert records.groupby(["image"])["insertion"].nunique().min() > 2


def test_the_sweep_measures_each_image_once(rows, tmp_path, monkeypatch):
    run = small_run(tmp_path)
    prior = cc.Cell("6 × 6", "product", 0.7)
    table = cc.sweep(run, rows, SMALL, beside={prior: "prior"})
    assert len(table) == 3 * (len(SMALL) + 1) and set(table["baseline"]) == {"zero"}  # no twins
    assert set(cc.rows_of(table, prior)["kind"]) == {"prior"}
    assert table["criterion"].equals(table["insertion"] - table["deletion"])
    assert cc.choose(table).alpha == 0.5

    def never(*args, **given):
        raise AssertionError("measured again")

    monkeypatch.setattr(cc, "measure_cells", never)
    assert cc.sweep(run, rows, SMALL, beside={prior: "prior"}).equals(table)
    for changed in ({"cells": SMALL[:3]}, {"block": 4}, {"rows": rows.assign(target=1)}):
        with pytest.raises(AssertionError, match="measured again"):
            cc.sweep(**{"run": run, "rows": rows, "cells": SMALL} | changed)


def harmonic(a, b, alpha):
    return 1 / (alpha / (a + 0.01) + (1 - alpha) / (b + 0.01))


def test_a_rule_of_ones_own_joins_the_sweep_and_can_win(rows, tmp_path, monkeypatch):
    run = small_run(tmp_path)
    cc.sweep(run, rows, SMALL)
    monkeypatch.setitem(cc.FUSIONS, "harmonic", harmonic)
    own = cc.Cell("6 × 2", "harmonic", 0.5)
    table = cc.sweep(run, rows, [*SMALL, own])
    assert len(cc.rows_of(table, own)) == 3
    table.loc[cc.rows_of(table, own).index, "criterion"] = 2.0
    assert cc.choose(table) == own


def test_the_deciding_baseline_is_the_first_that_the_images_allow(rows):
    assert cc.deciding_baseline("twin,zero", rows) == "zero"
    assert cc.deciding_baseline("twin", rows) == "rise"
    assert cc.deciding_baseline("twin, zero", rows.assign(twin="t.png")) == "twin"
    assert cc.deciding_baseline("black,rise", rows) == "black"
