"""What the benchmarks stand on: equal results, the same work, times put in relation rightly, and memory as promised."""

import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch

import cam_core as cc

torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def importable(repo):
    sys.path.insert(0, str(repo / "benchmarks"))
    yield
    sys.path.remove(str(repo / "benchmarks"))


@pytest.fixture(scope="module")
def cam(importable):
    import cam

    return cam


@pytest.fixture(scope="module")
def faithfulness(importable):
    import faithfulness

    return faithfulness


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("depth", ["layer4", "layer2 + layer4"])
def test_the_maps_of_all_packages_are_equal_and_not_zero(cam, depth, layout):
    made = cam.make_contenders("resnet18", depth, 2, layout)
    differs = cam.compare_maps(made)
    assert set(differs) == set(cam.PAIRS) and max(differs.values()) < 1e-4
    assert all((m.amax((1, 2)) == 1).all() for m in made["ours: both maps"]())
    a, b, hybrids = made["ours: both maps, 21 hybrids"]()
    assert len(hybrids) == 21 and torch.equal(hybrids[10], cc.hybrid(a, b, 0.5, tuple(b.shape[1:])))


def test_unequal_maps_end_the_benchmark(cam):
    made = {name: lambda: (torch.eye(4)[None],) for name in cam.CONTENDERS}
    made["ours: both maps"] = lambda: (torch.eye(4)[None].flip(1),)
    with pytest.raises(SystemExit, match="a ratio would compare unequal things"):
        cam.compare_maps(made)


def test_the_areas_of_all_codes_are_equal(faithfulness):
    given = faithfulness.setting("squeezenet1_1", "channels_last", torch.device("cpu"), 3)
    areas = {code.__name__: code(*given, 7) for code in (faithfulness.ours, faithfulness.torchcam_metric)}
    areas["loop"] = faithfulness.reference_loop(*given, 7)
    for metric in ("insertion", "deletion"):
        means = [float(np.mean(area[metric])) for area in areas.values()]
        assert max(means) - min(means) < 1e-5 and means[0] > 0.01


def test_an_evaluation_scores_no_picture_twice(faithfulness):
    """Two curves of an image share both ends: 2 (steps - 1) + 1 pictures of each, and one grey one for each class."""
    model, x, target, maps = faithfulness.setting("squeezenet1_1", "channels_last", torch.device("cpu"), 3)
    with faithfulness.counted(model) as sizes:
        faithfulness.ours(model, x, target, maps, 7)
    assert sum(sizes) == 3 * (2 * 6 + 1) + len(set(target.tolist()))


def test_what_the_backward_pass_keeps(cam):
    """ResNet-50, batch of 8: at the last layer at most 10 MiB, of which peers keep hundreds."""
    import timing

    held = {
        name: timing.bytes_for_backward(cam.one_contender("resnet50", "layer4", name)) / 2**20
        for name in ("bare forward pass", "ours: both maps", "TorchCAM: both maps, sharing a pass")
    }
    assert held["bare forward pass"] == 0 and held["ours: both maps"] <= 10
    assert held["TorchCAM: both maps, sharing a pass"] > 300


def test_bytes_for_backward_by_hand(cam):
    import timing

    x, weight = torch.ones(1000, requires_grad=True), torch.nn.Parameter(torch.ones(1000))
    assert timing.bytes_for_backward(lambda: (x * weight).sum()) == 0, "leaves and parameters are there anyway"
    assert timing.bytes_for_backward(lambda: x.exp().exp().sum()) == 2 * 4000
    assert timing.bytes_for_backward(lambda: (y := x.exp(), y * y)) == 4000, "each storage once"


def test_times_are_interleaved_and_ratios_are_of_one_repetition(cam):
    import timing

    calls = []
    made = {name: lambda name=name: calls.append(name) or time.sleep(0.002) for name in "abc"}
    times = timing.repeat(made, 6, torch.device("cpu"))
    assert len(times) == 18 and [set(calls[3 * k : 3 * k + 3]) for k in range(7)] == [set("abc")] * 7
    assert times["name"].unique().tolist() == list("abc") and (times["seconds"] >= 0.002).all()
    base = pd.Series([1.0, 5.0, 2.0, 1.5])
    drift = pd.concat([
        pd.DataFrame({"repetition": range(4), "name": "a", "seconds": base}),
        pd.DataFrame({"repetition": range(4), "name": "b", "seconds": 3 * base}),
    ])  # fmt: skip
    found = timing.ratios(drift, "a").set_index("name")
    assert found.ratio["b"] == pytest.approx(3) and found.ms["b"] == pytest.approx(5250)


def test_moving_the_slider_takes_less_than_a_tenth_of_a_second(cam):
    times = cam.slider_times(5)
    assert times["seconds"].median() < 0.1
