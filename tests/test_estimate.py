"""A run says beforehand how long it will take, and runs as well where it cannot say it."""

import sys
import time

import pytest
from PIL import Image

import cam_core as cc
from runner import estimate, parameters, progress

STEMS = [path.stem for path in sorted((parameters.HOME / "notebooks").glob("0*.ipynb"))]
MACHINE = {
    "cores": 2,
    "device": "cpu",
    "precision": "float32",
    "note": "",
    "plain": 0.05,
    "seconds_per_picture": {"float32": 0.05, "scoring": 0.05, "also": 0.02},
    "images": {"train": 800, "val": 150, "test": 300, "to_draw": 0, "twins": True},
}


def seconds(number, machine=MACHINE, **given):
    """What is expected of a notebook with these settings."""
    stem = STEMS[number - 1]
    p = parameters.parameters_of(stem, given)
    return estimate.expected_of(stem, p, machine).seconds


# What runs with the settings of params/default.yaml, but so many images, counted: (notebook,
# n_images, forward, backward). The estimate has to be right within 30 %.
COUNTED = [
    (2, 24, 572, 468),
    (2, 6, 351, 305),
    (2, 12, 463, 388),
    (3, 24, 258, 141),
    (3, 6, 142, 49),
    (3, 12, 190, 81),
    (4, 12, 2245, 48),
    (5, 12, 3648, 275),
]


@pytest.mark.parametrize(("number", "n_images", "forward", "backward"), COUNTED)
def test_the_pictures_of_a_run_are_those_that_it_counted(number, n_images, forward, backward):
    given = {"n_images": n_images}
    stem = STEMS[number - 1]
    work = estimate.expected_of(stem, parameters.parameters_of(stem, given), MACHINE).work
    assert estimate.passes(work) == pytest.approx(forward + estimate.BACKWARD * backward, rel=0.2)


MORE = {
    "n_images": [2, 24, 160, 0],
    "steps": [6, 28, 224],
    "method": ["main", "all"],
    "baseline": ["twin", "twin,rise", "twin,rise,black"],
    "n_extra": [2, 8, 24],
    "fine_steps": [0, 56, 224],
    "rise_masks": [0, 100, 1000],
    "also": ["", "squeezenet1_1"],
    "shortcut": [False, True],
    "retrain": [False, True],
    "n_test": [40, 400],
}


@pytest.mark.parametrize("name", MORE)
def test_more_of_anything_takes_longer(name):
    longer = []
    for number in range(1, 6):
        found = [seconds(number, **{name: value}) for value in MORE[name]]
        assert found == sorted(found)
        longer.append(found[-1] > found[0])
    assert any(longer)


def test_a_machine_that_is_slower_in_everything_takes_as_much_longer():
    speed = {name: 3 * value for name, value in MACHINE["seconds_per_picture"].items()}
    slow = {**MACHINE, "plain": 3 * MACHINE["plain"], "seconds_per_picture": speed}
    for number in range(1, 6):
        assert seconds(number, slow) == pytest.approx(3 * seconds(number))


def test_without_twins_another_baseline_decides():
    without = {**MACHINE, "images": {**MACHINE["images"], "twins": False}}
    both = [seconds(5, without, baseline=text) for text in ("twin,rise", "rise", "twin")]
    assert len(set(both)) == 1 and both[0] > seconds(5, baseline="twin")


def test_a_set_without_validation_images_is_looked_at_only():
    few = {**MACHINE, "images": {**MACHINE["images"], "val": 0, "test": 20}}
    assert seconds(4, few, n_images=20) == seconds(4, few, n_images=0) < seconds(4, n_images=20)


def test_the_numbers_of_maps_are_those_of_the_study():
    assert len(cc.methods_of("main")) == estimate.MAPS["main"]
    assert len(cc.methods_of("all")) == estimate.MAPS["all"]
    assert len(cc.CURVES) == estimate.FURTHER["main"]


def test_the_machine_is_asked_in_a_process_of_its_own_that_may_fail(monkeypatch):
    for code in ("print('no JSON')", "raise SystemExit(3)", "import os; os._exit(9)"):
        monkeypatch.setattr(estimate, "TELL", code)
        assert estimate.answer(estimate.ask({})) is None
    monkeypatch.setattr(estimate, "PATIENCE", 0.5)
    monkeypatch.setattr(estimate, "TELL", "import time; time.sleep(100)")
    asking = estimate.ask({})
    assert estimate.answer(asking) is None and asking.wait(timeout=30) != 0


def test_what_the_machine_says_is_enough_for_every_notebook(tmp_path, monkeypatch):
    """With images of one's own and a network of one's own, which prints."""
    (tmp_path / "photos").mkdir()
    for k in range(3):
        Image.new("RGB", (40, 40), (50 * k, 0, 0)).save(tmp_path / "photos" / f"{k}.png")
    (tmp_path / "net.py").write_text(NETWORK)
    given = {"dataset": str(tmp_path / "photos"), "arch": f"{tmp_path / 'net.py'}:Net"}
    p = {stem: parameters.parameters_of(stem, given) for stem in STEMS}
    monkeypatch.setattr(estimate, "PATIENCE", 600)
    machine = estimate.answer(estimate.ask(p))
    counts = {"train": 0, "val": 0, "test": 3, "to_draw": 0, "twins": False}
    assert machine["images"] == counts and machine["cores"] >= 1
    expected = {stem: estimate.expected_of(stem, p[stem], machine) for stem in STEMS}
    assert all(each.seconds > 0 for each in expected.values())


NETWORK = """
from torch import nn

def Net():
    print("made")
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""


def test_the_time_left_falls_to_nothing_and_grows_where_it_goes_slower():
    expected = estimate.Expected(estimate.Work(forward=100), scoring=50, seconds=60)
    assert estimate.left(expected, 0, 0) == 60
    on_time = [estimate.left(expected, done, 10 + done / 2) for done in (0, 30, 100)]
    assert on_time == [50, 35, 0]
    assert estimate.left(expected, 50, 110) == pytest.approx(100), "at half the speed"
    assert estimate.left(expected, 120, 1000) == 0


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "10 s"), (44, "40 s"), (95, "2 min"), (5000, "83 min"), (9000, "2.5 h")],
)
def test_a_time_in_words(seconds, words):
    assert estimate.in_words(seconds) == words


def test_half_a_progress_file_counts_nothing(tmp_path):
    file = tmp_path / "progress.json"
    assert progress.counts(file) == {}
    file.write_text('{"forward": 12, "back')
    assert progress.counts(file) == {}
    file.write_text('{"forward": 12, "backward": 3}')
    assert progress.counts(file)["forward"] == 12


def test_the_bar_shows_pictures_and_time_left_on_a_terminal_only(tmp_path, capfd, monkeypatch):
    file = tmp_path / "progress.json"
    expected = estimate.Expected(estimate.Work(forward=200), scoring=600, seconds=600)
    with progress.bar("04_x", expected, file):
        pass
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(progress, "PAUSE", 0.01)
    with progress.bar("04_x", expected, file):
        file.write_text('{"forward": 100}')
        time.sleep(0.3)
    shown = capfd.readouterr().err
    assert "100 of 200 pictures, about 5 min left" in shown
