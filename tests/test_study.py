"""The measuring of notebook 05: what a group of images gives, and what the cache relies on."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from nets import strong
from studies import LAYERS, SIZE, seen_by, study_of, toy_images

import cam_core as cc


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return seen_by(strong(), toy_images(tmp_path_factory.mktemp("images"), 5))


@pytest.fixture(scope="module")
def study():
    return study_of(strong())


def value(records, image, method, metric, baseline=""):
    table = pd.DataFrame(records).set_index(["image", "method", "metric", "baseline"])
    return table.loc[(image, method, metric, baseline), "value"]


def test_a_group_gives_what_the_functions_give_one_by_one(study, rows):
    records = cc.measure(study, rows, 2)
    x, target, maps = cc.explain_rows(study, rows, 0, 2)
    assert target.tolist() == rows["target"][:2].tolist()
    m = maps["hybrid"]
    masks = cc.datasets.load_masks(rows[:2], size=SIZE)
    boxes = cc.datasets.load_boxes(rows[:2], SIZE)
    twins = cc.datasets.load_batch(rows[:2], "twin", SIZE)
    curves = cc.faithfulness(
        study.model, x, {"hybrid": m}, target, list(rows["id"][:2]), twins, twins, 0, 4
    )
    expected = {
        ("energy", ""): cc.energy_in_mask(m, masks)[1],
        ("iou", ""): cc.iou(m, masks, 0.5)[1],
        ("box", ""): float(cc.box_iou(m, boxes, 0.5)[1] >= 0.5),
        ("ties", ""): cc.tie_fraction(m)[1],
        ("insertion", "twin"): cc.auc(curves["insertion"]["hybrid"])[1],
        ("deletion", "twin"): cc.auc(curves["deletion"]["hybrid"])[1],
    }
    for (metric, baseline), wanted in expected.items():
        assert value(records, "i1", "hybrid", metric, baseline) == pytest.approx(wanted, abs=1e-6)
    assert {record["image"] for record in records} == {"i0", "i1"}


def test_the_control_takes_the_next_images_layer_cam(study, rows):
    """And the last row's the first's, so every image has one, and none its own."""
    _, _, maps = cc.explain_rows(study, rows)
    fine = maps["layer_cam_shallow"]
    for k in range(5):
        donor = fine[(k + 1) % 5][None]
        expected = cc.hybrid(maps["grad_cam_coarse"][k : k + 1], donor, study.alpha)
        assert torch.allclose(maps["times_other"][k : k + 1], expected, atol=1e-3)


def test_groups_are_independent_and_together_they_are_the_whole(study, rows, tmp_path, monkeypatch):
    together = cc.measure_all(study, rows, tmp_path / "one")
    monkeypatch.setattr(cc, "GROUP", 2)
    groups = cc.shards(study, rows)
    assert [count for _, count, _, _ in groups] == [2, 2, 1]
    apart = []
    for part, count, extra, _ in reversed(groups):
        apart += cc.measure(study, part, count, extra)
    keys = ["image", "method", "metric", "baseline"]
    a = together.set_index(keys)["value"].sort_index()
    b = pd.DataFrame(apart).set_index(keys)["value"].sort_index()
    assert a.index.equals(b.index)
    exact = a.index.get_level_values("metric") != "ties"  # two values may tie, or almost
    assert np.allclose(a[exact], b[exact], atol=1e-5)


def test_what_was_measured_is_not_measured_again(study, rows, tmp_path, monkeypatch):
    first = cc.measure_all(study, rows, tmp_path)
    monkeypatch.setattr(cc, "measure", lambda *given: pytest.fail("measured again"))
    again = cc.measure_all(study, rows, tmp_path)
    pd.testing.assert_frame_equal(first, again)


@pytest.mark.parametrize(
    "change",
    [
        {"alpha": 0.5},
        {"rule": "mean"},
        {"steps": 5},
        {"seed": 1},
        {"batch_size": 2},
        {"precision": "bf16"},
        {"weights": "others"},
        {"layers": LAYERS | {"shallow": "0"}},
        {"methods": ("grad_cam", "hybrid")},
        {"baselines": ("rise",)},
        {"rise_masks": 3},
        {"thresholds": {"hybrid": 0.3}},
        {"n_extra": 1},
    ],
)
def test_each_setting_is_part_of_the_key(study, rows, change):
    key = cc.shards(study, rows)[0][3]
    assert cc.shards(study, rows)[0][3] == key
    assert cc.shards(replace(study, **change), rows)[0][3] != key


def test_pictures_and_a_cam_of_ones_own_are_part_of_the_key(study, rows, tmp_path, monkeypatch):
    key = cc.shards(study, rows)[0][3]
    moved = seen_by(strong(), toy_images(tmp_path, 5))
    assert cc.shards(study, moved)[0][3] == key  # where a file lies does not matter
    cc.datasets.Image.new("RGB", (SIZE, SIZE)).save(moved["file"][2])
    assert cc.shards(study, moved)[0][3] != key
    monkeypatch.setitem(cc.CAMS, "mine", lambda A, G: A.float().abs().mean(1))
    assert cc.shards(study, rows)[0][3] != key


def test_costly_extras_are_measured_on_the_first_images_alone(rows):
    study = study_of(strong(), baselines=("twin", "black"), n_extra=2, fine_steps=8, rise_masks=6)
    table = pd.DataFrame(cc.measure(study, rows, 3, 2))
    counts = table.groupby(["metric", "baseline"])["image"].nunique()
    assert counts["insertion", "twin"] == counts["deletion_blocks", "twin"] == 3
    assert counts["insertion", "black"] == counts["deletion_fine", "twin"] == 2
    rise = table[table["method"] == "rise"]
    assert rise["image"].nunique() == 2
    assert not {"energy", "iou", "box", "drop"} & set(rise["metric"])  # only its order counts
    judged = cc.judge(table, [("insertion", "twin")])
    assert judged[judged["method"] == "rise"]["n"].eq(2).all()


def test_images_without_masks_are_measured_without_localisation(study, rows):
    bare = rows.assign(truth="", mask="", boxes="")
    records = cc.measure(replace(study, baselines=("rise",)), bare, 2)
    assert {r["metric"] for r in records}.isdisjoint({"energy", "iou", "pointing", "box"})
    half = rows.assign(
        truth=["mask", "", "mask", "", ""], boxes=["[]", "", rows["boxes"][2], "", ""]
    )
    table = pd.DataFrame(cc.measure(study, half, 4))
    assert set(table[table["metric"] == "energy"]["image"]) == {"i0", "i2"}
    assert set(table[table["metric"] == "box"]["image"]) == {"i2"}


def test_thresholds_are_those_with_the_best_iou(study, rows):
    found = cc.choose_thresholds(study, rows)
    _, _, maps = cc.explain_rows(study, rows)
    masks = cc.datasets.load_masks(rows, size=SIZE)
    assert list(found) == list(study.methods)
    for name, m in maps.items():
        best = max(cc.iou(m, masks, t).mean() for t in cc.THRESHOLDS)
        assert cc.iou(m, masks, found[name]).mean() == pytest.approx(best)


def test_discrimination_is_one_half_for_maps_that_know_no_class(study, rows):
    other = rows["mask"].iloc[[1, 2, 3, 4, 0]].to_list()
    pairs = rows.assign(mask_b=other, class_b=(rows["target"] + 1) % 4, **{"class": rows["target"]})
    table = cc.discrimination(study, pairs)
    means = table[table["metric"] == "discrimination"].groupby("method")["value"].mean()
    for control in ("noise", "smooth_noise", "centre"):
        assert means[control] == pytest.approx(0.5)
    assert abs(means["grad_cam"] - 0.5) > 1e-3


def test_randomisation_leaves_the_blob_in_the_centre_as_it_is(study, rows, tmp_path):
    table = cc.randomisation(study, rows[:2], tmp_path)
    last = table[(table["stage"] == table["stage"].max()) & (table["metric"] == "ssim")]
    means = last.groupby("method")["value"].mean()
    assert means["centre"] == pytest.approx(1) and means["grad_cam"] < 0.99
    sensitive = cc.class_sensitivity(study, rows[:2]).groupby(["metric", "method"])["value"].mean()
    assert sensitive["class_ssim", "centre"] == pytest.approx(1)
    assert sensitive["class_ssim", "grad_cam"] < 0.99


def test_exposure_pairs_the_two_networks_by_image(study, rows):
    marked = rows.assign(marker=rows["mask"])
    honest = cc.on_marker(study, marked)
    cheating = honest.assign(value=honest["value"] + 0.1)
    table = cc.exposure(honest, cheating).set_index(["method", "metric"])
    assert table["difference"].round(6).eq(0.1).all()
    row = table.loc[("hybrid", "energy")]
    _, _, maps = cc.explain_rows(study, marked)
    masks = cc.datasets.load_masks(marked, "marker", SIZE)
    assert row["honest"] == pytest.approx(cc.energy_in_mask(maps["hybrid"], masks).mean())


def test_bf16_error_and_costs(study, rows):
    error = cc.bf16_error(study, rows[:2])
    assert error.shape == (8,) and 0 < error.max() < 0.1
    cost = cc.costs(study, rows[:2], rounds=1).set_index("method")
    assert cost.loc["forward", "ratio"] == 1 and (cost["seconds"] > 0).all()
    assert {"grad_cam", "hybrid", "hybrid_same", "layer_cam_shallow"} <= set(cost.index)


# ---- tables of a few planted values


def planted(values):
    """Records from {(image, method, metric, baseline): value}."""
    rows = []
    for (image, method, metric, baseline), number in values.items():
        row = {"image": image, "method": method, "metric": metric, "baseline": baseline}
        rows.append(row | {"value": number})
    return pd.DataFrame(rows)


def test_only_the_asked_kinds_and_images_are_compared():
    values = {}
    for k in range(12):
        for method, gain in (("grad_cam", 0), ("hybrid", 0.2), ("times_sobel", 0.1)):
            values[f"i{k}", method, "insertion", "twin"] = 0.5 + gain + 0.01 * k
            values[f"i{k}", method, "insertion", "black"] = 0.5 - gain
    metrics = planted(values)
    controls = cc.against_controls(metrics, [("insertion", "twin")])
    assert controls["reference"].tolist() == ["times_sobel"]
    assert controls["difference"].tolist() == pytest.approx([0.1])
    groups = {f"i{k}": "a" if k < 4 else "b" for k in range(11)}  # the last image is in none
    groups["i10"] = "alone"
    found = cc.by_group(metrics, groups, [("insertion", "twin")])
    assert found[["group", "n"]].to_numpy().tolist() == [["a", 4], ["b", 6]]
    order = [f"i{k}" for k in range(12)]
    growing = cc.by_number(metrics[metrics["baseline"] == "twin"], order)
    assert sorted(set(growing["n"])) == [10, 12]


def test_areas_begin_with_one_cell():
    areas = pd.Series({"a": 0.01, "b": 0.04, "c": 0.07, "d": 0.5})
    assert cc.area_groups(areas, 0.02).tolist() == ["≤ 1 cell", "≤ 5%", "≤ 10%", "> 10%"]
    assert cc.area_groups(areas, 0.06).tolist() == ["≤ 1 cell", "≤ 1 cell", "≤ 10%", "> 10%"]
    assert cc.area_groups(areas, 0.2).tolist() == ["≤ 1 cell", "≤ 1 cell", "≤ 1 cell", "> 20%"]


def test_no_picture_of_a_group_is_scored_twice(study, rows, tmp_path):
    """Whatever curve, unit or baseline asks for it; and what a run has scored another one knows."""
    scored = []

    def seen(module, inputs):
        scored.extend(zip(cc.picture_codes(inputs[0]).tolist(), strict=True))

    both = replace(study, baselines=("twin", "black"), n_extra=2, fine_steps=8)
    rows = seen_by(
        both.model, rows[:3].assign(target=1)
    )  # asked for one class, black is one picture
    with both.model.register_forward_pre_hook(seen):
        cc.explain_rows(both, rows, 0, 2)
        maps = len(scored)
        x, target, found = cc.explain_rows(both, rows, 0, 2)
        scored.clear()
        cc.mask_out(both, rows.iloc[:2], x, target, found)
        masked = len(scored)
        scored.clear()
        cc.measure_all(both, rows[:2], tmp_path)
        curves = scored[maps + masked :]
        assert len(curves) == len(set(curves)) > 100
        scored.clear()
        fewer = tuple(m for m in both.methods if m != "centre")
        cc.measure_all(replace(both, methods=fewer), rows[:2], tmp_path)
        assert len(scored) == maps + masked - 2, "maps and what they leave, and no curve"
