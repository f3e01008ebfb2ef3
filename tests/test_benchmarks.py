"""What the benchmarks stand on: equal results, the same work, ratios of one moment, memory."""

import sys

import numpy as np
import pandas as pd
import pytest
import torch

import cam_core as cc

torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def importable(repo):
    sys.path.insert(0, str(repo / "tests" / "benchmarks"))
    yield
    sys.path.remove(str(repo / "tests" / "benchmarks"))


@pytest.fixture(scope="module")
def cam(importable):
    import cam

    return cam


@pytest.fixture(scope="module")
def timing(importable):
    import timing

    return timing


@pytest.fixture(scope="module")
def faithfulness(importable):
    import faithfulness

    return faithfulness


def test_the_maps_of_all_packages_are_equal_and_not_zero(cam):
    made = cam.make_contenders("resnet18", "layer2 + layer4", 1)
    differs = cam.compare_maps(made)
    assert set(differs) == set(cam.PAIRS) and max(differs.values()) < 1e-4
    a, b, hybrids = made["ours: both maps, 21 hybrids"]()
    assert a.max() == b.max() == 1 and len(hybrids) == 21
    assert torch.equal(hybrids[10], cc.hybrid(a, b, 0.5, tuple(b.shape[1:])))


def test_unequal_maps_end_the_benchmark(cam):
    made = {name: lambda: (torch.eye(4)[None],) for name in cam.CONTENDERS}
    made["ours: both maps"] = lambda: (torch.eye(4)[None].flip(1),)
    with pytest.raises(SystemExit, match="unequal"):
        cam.compare_maps(made)


def test_the_areas_of_all_codes_are_equal_and_no_picture_is_scored_twice(faithfulness):
    """Two curves share both ends: 2 (steps - 1) + 1 pictures of an image, and grey ones."""
    given = faithfulness.setting("squeezenet1_1", torch.device("cpu"), 2)
    model, _, target, _ = given
    with faithfulness.counted(model) as sizes:
        areas = [faithfulness.ours(*given, 4)]
    assert sum(sizes) == 2 * (2 * 3 + 1) + len(set(target.tolist()))
    areas.append(faithfulness.torchcam_metric(*given, 4))
    areas.append(faithfulness.reference_loop(*given, 4))
    for metric in ("insertion", "deletion"):
        means = [np.mean(area[metric]) for area in areas]
        assert max(means) - min(means) < 1e-5 and means[0] > 0.01


def test_the_curves_of_quantus_are_ours(faithfulness):
    pytest.importorskip("quantus", reason="optional, see tests/benchmarks/faithfulness.py")
    given = faithfulness.setting("squeezenet1_1", torch.device("cpu"), 2, size=60)
    own = faithfulness.our_deletion(*given, 6)
    assert own.shape == (2, 6) and own.std() > 0.01
    assert torch.allclose(faithfulness.pixel_flipping(*given, 6).float(), own, atol=1e-5)


def test_the_imputed_images_of_all_codes_are_equal(faithfulness):
    _, x, _, maps = faithfulness.setting("squeezenet1_1", torch.device("cpu"), 2, size=64)
    removed = faithfulness.removed_pixels(maps)
    shares = removed.float().mean((1, 2))
    assert shares[[0, 2, 35]].tolist() == pytest.approx([0.1, 0.1, 0.9], abs=1e-3)
    own = faithfulness.our_imputation(x, removed)
    assert torch.allclose(faithfulness.their_imputation(x, removed), own, atol=1e-4)


def test_unequal_results_end_the_benchmark(faithfulness):
    with pytest.raises(SystemExit, match="unequal"):
        faithfulness.must_be_equal({"ours": 0.0, "theirs": 2e-5}, 1e-5, "curves")
    with pytest.raises(SystemExit, match="unequal"):
        faithfulness.must_be_equal({"theirs": float("nan")}, 1e-5, "curves")


def test_what_the_backward_pass_keeps(cam, timing):
    """At the last layer of ResNet-18 less than a MiB for an image; a peer holds all layers."""
    names = ["ours: both maps", "TorchCAM: both maps, sharing a pass"]
    made = cam.make_contenders("resnet18", "layer4", 1, only=names)
    ours, theirs = (timing.bytes_for_backward(made[name]) / 2**20 for name in names)
    assert 0 < ours < 1 and theirs > 20 * ours


def test_bytes_for_backward_by_hand(timing):
    """Each storage once, and neither leaves nor parameters, which are there anyway."""
    x, weight = torch.ones(1000, requires_grad=True), torch.nn.Parameter(torch.ones(1000))
    assert timing.bytes_for_backward(lambda: (x * weight).sum()) == 0
    assert timing.bytes_for_backward(lambda: x.exp().exp().sum()) == 2 * 4000
    assert timing.bytes_for_backward(lambda: (y := x.exp(), y * y)) == 4000


def test_times_are_interleaved_and_ratios_are_of_one_repetition(timing):
    calls = []
    made = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = timing.repeat(made, 6, torch.device("cpu"))
    assert len(times) == 18 and times["name"].unique().tolist() == list("abc")
    assert [set(calls[k : k + 3]) for k in range(0, 21, 3)] == [set("abc")] * 7  # one to warm up
    seconds = pd.Series([1.0, 5.0, 2.0, 1.5])  # a machine that slows down for a while
    tables = []
    for name, factor in (("a", 1), ("b", 3)):
        columns = {"repetition": range(4), "name": name, "seconds": factor * seconds}
        tables.append(pd.DataFrame(columns))
    found = timing.ratios(pd.concat(tables), "a").set_index("name")
    assert found.ratio["b"] == pytest.approx(3) and found.ms["b"] == pytest.approx(5250)
