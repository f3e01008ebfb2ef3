"""The sentences about results are made from the numbers: other numbers, other sentences."""

import re
from dataclasses import fields

import numpy as np
import pandas as pd
import pytest

import cam_core as cc

KINDS = [("insertion", "twin"), ("deletion", "twin"), ("energy", ""), ("average_precision", "")]
LAYERS = {"deep": "layer4", "coarse": "layer3", "shallow": "layer1", "finer": "layer3"}


def records(gains, n=40, spread=0.02):
    """A value per image, method and metric; gains: {method: its gain over Grad-CAM, everywhere}."""
    rng = np.random.default_rng(0)
    rows = []
    for metric, baseline in KINDS:
        base = rng.uniform(0.3, 0.6, n)
        sign = -1 if metric in cc.statistics.LOWER_IS_BETTER else 1
        for method, gain in {"grad_cam": 0.0, **gains}.items():
            noise = 0 if method == "grad_cam" else rng.normal(0, spread, n)
            about = {"method": method, "metric": metric, "baseline": baseline}
            for i, value in enumerate(base + sign * gain + noise):
                rows.append({"image": f"i{i}", **about, "value": value})
    return pd.DataFrame(rows)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Fewer resamples: these effects are far from any border."""
    compare = cc.statistics.compare
    monkeypatch.setattr(
        cc.statistics, "compare", lambda table, *given: compare(table, *given, resamples=299)
    )


def concluded(metrics, grouped=False):
    """The conclusions of a table of values, by the steps of notebook 05; grouped: with by_area."""
    summary = cc.judge(metrics, KINDS).assign(network="resnet18")
    controls = cc.against_controls(metrics, KINDS) if "times_other" in set(metrics.method) else None
    groups = {image: "small" if int(image[1:]) < 20 else "large" for image in metrics["image"]}
    by_area = cc.by_group(metrics, groups, KINDS) if grouped else None
    return cc.sentences.conclusions(
        summary, controls, by_area=by_area, metrics=metrics, layers=LAYERS
    )


def every_sentence(found):
    return found.markdown(True)


def swapped(metrics):
    names = {"hybrid": "grad_cam", "grad_cam": "hybrid"}
    return metrics.assign(method=metrics["method"].replace(names))


GAIN = {"hybrid": 0.05, "layer_cam_shallow": 0.05, "times_other": 0.0, "times_sobel": 0.1}


def test_a_gain_is_called_better_and_the_controls_that_share_it_are_named():
    found = concluded(records(GAIN))
    assert "better than Grad-CAM on all 4 endpoints" in found.headline
    assert "Measured on 40 images" in found.headline
    assert "In energy Grad-CAM × Sobel edges is better still" in found.fusion
    assert "no difference to LayerCAM at layer1 alone is shown" in found.fusion
    energy = next(s for s in found.controls if s.startswith("Energy"))
    assert energy.startswith("Energy: better than Grad-CAM × another image's LayerCAM;")
    assert "worse than Grad-CAM × Sobel edges" in energy


def test_a_gain_that_no_control_reaches_is_the_fusions():
    gains = {"hybrid": 0.05, "layer_cam_shallow": 0.0, "times_other": 0.0}
    found = concluded(records(gains), grouped=True)
    assert "the hybrid beats every map that is as fine as itself" in found.fusion
    for metric in ("Insertion", "Deletion", "Energy", "Average precision"):
        assert f"{metric}: better than all of them." in found.controls
    assert all("better in every group" in s for s in found.when) and len(found.when) == 4


def test_with_the_columns_swapped_the_sentences_flip():
    metrics = records({"hybrid": 0.05})
    one = concluded(metrics, grouped=True)
    other = concluded(swapped(metrics), grouped=True)
    assert "worse than Grad-CAM on all 4 endpoints" in other.headline
    assert other.fusion.startswith("No gain over Grad-CAM is shown")
    for a, b in zip(one.endpoints + one.when, other.endpoints + other.when, strict=True):
        assert "better" in a and "worse" not in a
        assert "worse" in b and "better" not in b


def test_null_data_says_nothing():
    metrics = records({"hybrid": 0.0, "layer_cam_shallow": 0.0, "times_other": 0.0}, spread=0.05)
    found = concluded(metrics, grouped=True)
    text = every_sentence(found)
    assert "better" not in text and "worse" not in text
    assert found.headline.startswith("No difference between the hybrid and Grad-CAM is shown")
    assert all("shows no difference to Grad-CAM" in s for s in found.endpoints)
    assert found.when == [
        "By area of the object, no difference is shown in any group, on any endpoint."
    ]


def test_equal_maps_are_called_identical():
    found = concluded(records({"hybrid": 0.0}, spread=0.0))
    assert found.headline.startswith("The hybrid and Grad-CAM are the same map.")
    assert all("is identical to Grad-CAM" in s and "on all 40 images" in s for s in found.endpoints)


def test_a_mixture_names_each_endpoint_once_and_under_the_right_word():
    metrics = records({"hybrid": 0.05})
    worse = (metrics["metric"] == "energy") & (metrics["method"] == "hybrid")
    metrics.loc[worse, "value"] -= 0.1
    base = metrics[(metrics["metric"] == "deletion") & (metrics["method"] == "grad_cam")]
    same = (metrics["metric"] == "deletion") & (metrics["method"] == "hybrid")
    metrics.loc[same, "value"] = base["value"].to_numpy()
    headline = concluded(metrics).headline
    assert headline.startswith(
        "The hybrid is better than Grad-CAM on 2 of 4 endpoints (insertion and average precision) "
        "and worse on 1 (energy). In deletion the two are identical."
    )


def test_without_controls_or_other_tables_nothing_is_said_of_them():
    summary = cc.judge(records({"hybrid": 0.05}), KINDS)
    found = cc.sentences.conclusions(summary)
    assert found.fusion == "Whether the fusion is the reason was not measured."
    assert found.controls == found.when == [] and found.about == "" and found.networks == {}


def test_names_are_for_strangers():
    metrics = records({**GAIN, "grad_cam_coarse": 0.0, "hybrid_same": 0.0, "hybrid_coarse": 0.0})
    text = every_sentence(concluded(metrics))
    assert "Hybrid's" not in text and "{" not in text and "_" not in text
    assert "Grad-CAM at layer3 alone" in text


def test_a_second_network_is_told_apart_and_does_not_touch_the_first():
    metrics = records({"hybrid": 0.05})
    first = cc.judge(metrics, KINDS).assign(network="resnet18")
    second = cc.judge(swapped(metrics), KINDS).assign(network="squeezenet1_1")
    found = cc.sentences.conclusions(pd.concat([first, second]))
    alone = cc.sentences.conclusions(first)
    assert found.headline == alone.headline and found.endpoints == alone.endpoints
    assert list(found.networks) == ["squeezenet1_1"]
    assert all("worse than Grad-CAM" in s for s in found.networks["squeezenet1_1"])


def test_the_tables_that_a_run_wrote_give_the_same_conclusions(tmp_path):
    """What is read back from CSV lacks the column `identical` in the table of controls."""
    metrics = records({**GAIN, "grad_cam_coarse": 0.0})
    same = metrics[metrics["method"] == "hybrid"].assign(method="times_activation")
    metrics = pd.concat([metrics, same])
    summary = cc.judge(metrics, KINDS).assign(network="resnet18")
    controls = cc.against_controls(metrics, KINDS)
    columns = ["reference", "metric", "n", "reference_mean", "mean", "difference", "low", "high"]
    (tmp_path / "tables").mkdir()
    cc.runs.save_table(summary, tmp_path / "summary.csv")
    cc.runs.save_table(controls[[*columns, "p", "won"]], tmp_path / "tables" / "05_controls.csv")
    found = cc.sentences.conclusions(**cc.sentences.read_tables(tmp_path))
    expected = cc.sentences.conclusions(summary, controls)
    for field in fields(found):
        assert getattr(found, field.name) == getattr(expected, field.name), field.name
    assert "identical to Grad-CAM × mean activation" in " ".join(found.controls)
    with pytest.raises(FileNotFoundError, match=r"summary\.csv"):
        cc.sentences.read_tables(tmp_path / "tables")


@pytest.mark.parametrize("name", ["full", "squeezenet", "shortcut", "smoke"])
def test_the_shipped_results_can_be_concluded(repo, name):
    found = cc.sentences.conclusions(
        **cc.sentences.read_tables(repo / "results" / "reference" / name)
    )
    assert len(found.endpoints) == 4 and len(found.controls) == 7
    assert "nan" not in found.markdown(True)


def test_the_cheat_is_told_from_the_numbers():
    rng = np.random.default_rng(0)
    rows = []
    for method in ("grad_cam", "layer_cam_shallow", "hybrid"):
        for k in range(20):
            for metric in ("energy", "found", "hottest"):
                value = rng.uniform(0, 0.1) if metric == "energy" else float(k % 2)
                about = {"image": f"i{k}", "method": method, "metric": metric, "baseline": ""}
                rows.append(about | {"value": value})
    honest = pd.DataFrame(rows)
    gain = rng.uniform(0.15, 0.25, len(honest)) * (honest["method"] == "hybrid")
    cheating = honest.assign(value=honest["value"] + gain)
    text = cc.sentences.shortcut_conclusions(cc.exposure(honest, cheating), cheating, 0.01)
    hybrid = next(line for line in text.splitlines() if line.startswith("- Hybrid:"))
    assert re.search(r"\(\+(19|20|21)\.\d% \[", hybrid)
    assert text.count("no difference shown") == 2  # the other two show nothing
    assert "Hybrid is better than Grad-CAM in energy on the marker" in text
