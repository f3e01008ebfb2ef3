"""What notebook 04 chooses from a validation table: planted tables, in which it is known what has to win."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from nbcode import definitions

import cam_core as cc

nb = SimpleNamespace(**definitions("04_hybrid_fusion", np=np, pd=pd))
LAYERS, ALPHAS = ("layer1", "layer2", "layer3", "layer2+layer3"), (0.0, 0.2, 0.5, 0.8, 1.0)
CELLS = [(layer, rule, alpha) for layer in LAYERS for rule in cc.FUSIONS for alpha in ALPHAS]
HOME = ("layer2", "product", 0.5)


def planted(winner=HOME, gain=0.05, noise=0.01, n=30, seed=0, end=-0.2, prior=0.0):
    """A validation table as 04 writes it: images differ widely, all fusions are alike but for the winner's gain."""
    rng = np.random.default_rng(seed)
    image = rng.uniform(0.2, 0.8, n)
    records = []
    for cell in [*CELLS, ("layer4", "product", cc.PRIOR_ALPHA)]:
        kind = "prior" if cell[0] == "layer4" else "end" if cell[2] in (0, 1) else "fusion"
        value = image + noise * rng.standard_normal(n) + {"prior": prior, "end": end, "fusion": 0.0}[kind]
        value += gain if cell == winner else 0
        part = pd.DataFrame({"image": [f"val/{i:05d}" for i in range(n)], "insertion": value, "deletion": 0.0})
        records.append(part.assign(layer=cell[0], rule=cell[1], alpha=cell[2], kind=kind, criterion=value))
    return pd.concat(records, ignore_index=True)


@pytest.mark.parametrize(
    "winner",
    [
        HOME,
        ("layer3", "product", 0.5),
        ("layer2+layer3", "product", 0.5),
        ("layer2", "mean", 0.5),
        ("layer2", "floored", 0.5),
        ("layer2", "product", 0.8),
        ("layer1", "maximum", 0.2),
    ],
)
def test_another_table_another_choice(winner):
    assert nb.choose(planted(winner)) == winner
    given = {"layer": winner[0], "rule": winner[1], "alpha": winner[2]}
    assert nb.choose(planted(winner), **given) == winner
    assert nb.choose(planted(HOME), **given) == winner  # given, so it is taken, whatever the table says


def test_the_table_on_disk_gives_the_same_choice(tmp_path):
    table = planted(gain=0.002)
    cc.save_table(table, tmp_path / "sweep.csv")
    again = pd.read_csv(tmp_path / "sweep.csv", keep_default_na=False, dtype={"image": str})
    assert nb.choose(again) == nb.choose(table)
    assert nb.stability(again).equals(nb.stability(table))


@pytest.mark.parametrize("name, value", [("layer", "layer3"), ("rule", "maximum"), ("alpha", 0.2)])
def test_a_given_parameter_narrows_the_choice(name, value):
    table = planted()
    position = ("layer", "rule", "alpha").index(name)
    assert nb.choose(table)[position] != value
    assert nb.choose(table, **{name: value})[position] == value
    assert nb.choose(table, **{name: HOME[position]}) == HOME
    assert nb.choose(table, **{name: "auto"}) == HOME
    assert set(nb.stability(table, **{name: value}).index.get_level_values(name)) == {value}


def test_a_value_that_was_not_measured_is_refused():
    with pytest.raises(ValueError, match="alpha=0.3.*did not measure"):
        nb.choose(planted(), alpha=0.3)
    table = planted()
    with pytest.raises(ValueError, match="not every image"):
        nb.choose(table.drop(index=table.index[table["kind"] == "fusion"][0]))


def test_no_end_and_no_prior_is_chosen_unless_given():
    table = planted(end=0.3, prior=0.3)
    layer, rule, alpha = nb.choose(table)
    assert 0 < alpha < 1 and layer != "layer4"
    assert nb.stability(table).index.get_level_values("alpha").isin([0.2, 0.5, 0.8]).all()
    assert nb.choose(table, alpha=1.0)[2] == 1.0
    assert nb.choose(table, alpha=0.0, layer="layer3")[::2] == ("layer3", 0.0)


def test_ties_go_to_the_first_in_a_fixed_order():
    table = planted(gain=0, noise=0)
    first = nb.choose(table)
    assert first[1] == next(iter(cc.FUSIONS))
    for seed in range(3):
        assert nb.choose(table.sample(frac=1, random_state=seed)) == first
    assert nb.stability(table)[first] == 1
    tied = planted(("layer3", "mean", 0.5)).assign(order=1)
    twin = tied[(tied["layer"] == "layer3") & (tied["rule"] == "mean") & (tied["alpha"] == 0.5)]
    same = (tied["layer"] == "layer1") & (tied["rule"] == "mean") & (tied["alpha"] == 0.8)
    tied.loc[same, "criterion"] = twin["criterion"].to_numpy()
    assert nb.choose(tied) == nb.choose(tied[::-1]) == ("layer1", "mean", 0.8)
    assert nb.stability(tied).max() == 1  # the second of two equal ones never wins


def test_stability_is_a_share_that_tells_a_clear_winner_from_noise():
    clear, noise = nb.stability(planted()), nb.stability(planted(gain=0))
    assert clear.sum() == pytest.approx(1) and noise.sum() == pytest.approx(1)
    assert clear[HOME] == 1 and nb.choose(planted()) == HOME
    assert noise.max() < 0.7 and (noise > 0).sum() > 5
    assert len(noise) == len(LAYERS) * len(cc.FUSIONS) * 3


def test_stability_is_the_bootstrap_of_the_choice():
    """Against the slow way: draw images, choose again."""
    table = planted(gain=0.003, n=8, seed=3)
    share = nb.stability(table, draws=4000)
    rng, wide = np.random.default_rng(1), nb.candidates(table)
    wins = [wide.to_numpy()[rng.choice(8, 8)].mean(0).argmax() for _ in range(4000)]
    slow = np.bincount(wins, minlength=len(share)) / 4000
    assert share.to_numpy() == pytest.approx(slow, abs=0.04)


def test_stability_depends_on_its_seed_alone():
    table = planted(gain=0.002)
    assert nb.stability(table, seed=1).equals(nb.stability(table.sample(frac=1, random_state=0), seed=1))
    assert not nb.stability(table, seed=1).equals(nb.stability(table, seed=2))


def test_one_image_is_enough_to_choose_and_always_agrees():
    table = planted(("layer3", "mean", 0.8), n=1)
    assert nb.choose(table) == ("layer3", "mean", 0.8) and nb.stability(table)["layer3", "mean", 0.8] == 1
