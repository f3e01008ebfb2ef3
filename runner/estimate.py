"""How long a run will take on this machine, said before its first notebook starts: the pictures
that the notebooks will score, times the speed of a bare forward pass, and the rest of their work in
units of a small piece of ordinary Python. Both are measured in a process of its own, which may fail
or take too long: an estimate never stops a run.

    python -m runner.estimate results/default

prints what was estimated beside what that run counted and took, from its manifest.json. WORK and
what is below it are fitted again from such tables: `once` and `each` are the line through the
pictures of two runs with different n_images, and `plain` is what is left of the seconds once the
pictures are taken off.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from lab import HOME
from runner import check

# ---- what notebooks do


@dataclass(frozen=True)
class Work:
    """Pictures that go forward through the network, those of which a gradient is asked as well, and
    plain work in units of `lab.machine.seconds_of_plain_work`.
    """

    forward: float = 0
    backward: float = 0
    plain: float = 0

    def plus(self, other: Work, count: float = 1) -> Work:
        """This and another one, that as often as `count`."""
        return Work(
            self.forward + count * other.forward,
            self.backward + count * other.backward,
            self.plain + count * other.plain,
        )


# {notebook: (once, each)}: without curves, whatever the number of images, and for each of them.
WORK = {
    1: (Work(80, 0, 2150), Work(1.4, 0, 0.2)),
    2: (Work(236, 219, 1470), Work(5, 4, 187)),
    3: (Work(103, 18, 1600), Work(6.4, 5.1, 107)),
    4: (Work(20, 20, 1980), Work(9, 6, 100)),
    5: (Work(350, 230, 2400), Work(25, 3, 84)),
}
BACKWARD = 0.8  # of a forward pass: what a gradient down to the layers costs on top of it
SCORING = 1.35  # of bare passes: making the pictures, and a processor that is warm by then
POINT = 0.015  # plain work for a point of a curve, whether its picture is scored or known
# What is left of the points of curves when equal pictures are scored once. With a twin most of the
# picture never changes.
LEFT = {"twin": 0.17, "rise": 0.78, "zero": 0.78, "black": 0.78}
# The same of the first points of a search, at which maps still differ.
EARLY = {"twin": 0.27, "rise": 0.97, "zero": 0.97, "black": 0.97}
PUSHED = (16, Work(13, 9))  # 02: so many images at most are pushed by noise, and what that takes
# 04, as `cam_core.search` has it: pairs of layers, rules and weights that are tried, where they are
# not given; on how many points all of them are measured, and the best quarter; and how many maps
# are measured on all points whatever happens.
TRIED = {"shallow_layer": 4, "rule": 4, "alpha": 3}
COARSE = 3
FEW, MORE = 2, 6
BLOCKS = 196  # of 16 x 16 pixels in an image: by blocks a curve has no more steps
WHOLE = 16
MAPS = {"main": 14, "all": 22}  # 05: those measured, by blocks the main ones
FURTHER = {"main": 6, "all": 14}  # with further baselines; with fine_steps as few as with main
DRAWN = Work(plain=2.3)  # 01: an image with mask and twin
TAUGHT = Work(forward=1, backward=1.5)  # 01: an image in a step of training
EPOCHS = {"retrain": 56_000, "shortcut": 2_000}  # 01: images that these trainings go through


def work_of(number: int, p: Mapping, images: Mapping[str, int]) -> Work:
    """What a notebook, 1 to 5, does with these parameters. images: how many the data set has of
    each split, see `tell`.
    """
    if number == 1:
        return making(p, images)
    n = min(p["n_images"] or images["test"], images["test"])
    if number == 4:  # half as many; too few to choose on are only looked at
        half = (p["n_images"] + 1) // 2
        n = min(half or images["val"], images["val"]) or min(half or 4, 4, images["test"])
    once, each = WORK[number]
    work = once.plus(each, n)
    if number == 2:
        most, pushed = PUSHED
        return work.plus(pushed, min(n, most))
    if number == 3:
        return work
    return work.plus(chosen_among(p, n, images) if number == 4 else compared(p, n))


def making(p: Mapping, images: Mapping[str, int]) -> Work:
    """What notebook 01 does: it draws or copies images, trains a network if it is asked to, and
    asks it about the test images.
    """
    once, each = WORK[1]
    work = once.plus(DRAWN, images["to_draw"])
    ours = p["dataset"] == "synthetic"
    if ours:
        work = work.plus(each, p["n_test"])
    if p["shortcut"] and ours:
        work = work.plus(TAUGHT, EPOCHS["shortcut"]).plus(Work(forward=4, plain=2), p["n_test"])
    if p["retrain"] and ours:
        work = work.plus(TAUGHT, EPOCHS["retrain"])
    elif p["classes"] or p["retrain"]:
        work = work.plus(TAUGHT, images["train"] * p["epochs"])
    return work


def curves(baseline: str, points: float, left: Mapping[str, float] = LEFT) -> Work:
    """Insertion and deletion with so many points each."""
    return Work(forward=2 * points * left[baseline], plain=2 * points * POINT)


def chosen_among(p: Mapping, n: int, images: Mapping[str, int]) -> Work:
    """The curves of 04 on n images."""
    tried = COARSE
    for name, count in TRIED.items():
        tried *= count if p[name] == "auto" else 1
    if not images["val"]:
        tried = 1  # nothing is chosen
    steps = p["steps"]
    baseline = p["baseline"].split(",")[0]
    work = curves(baseline, n * WHOLE * steps)
    if tried > WHOLE:
        few, more = min(FEW, steps), min(MORE, steps)
        work = work.plus(curves(baseline, n * tried * (few + (more - few) / 4), EARLY))
    return work


def compared(p: Mapping, n: int) -> Work:
    """The curves of 05 on n images, and the masks of RISE."""
    first, *others = p["baseline"].split(",")
    extra = min(p["n_extra"], n)
    checks = min(p["check_steps"], p["steps"], BLOCKS)
    points = n * (MAPS[p["method"]] * p["steps"] + MAPS["main"] * checks)
    points += extra * (FURTHER["main"] * p["fine_steps"] + (p["rise_masks"] > 0) * 2 * p["steps"])
    work = curves(first, points).plus(Work(forward=extra * p["rise_masks"]))
    for name in others:
        further = FURTHER[p["method"]] * min(p["check_steps"], p["steps"])
        work = work.plus(curves(name, extra * further))
    return work


# ---- how long that takes


@dataclass(frozen=True)
class Expected:
    """What is expected of a notebook: its work, and the seconds for its pictures and for all of
    it.
    """

    work: Work
    scoring: float
    seconds: float

    @property
    def pictures(self) -> int:
        """Pictures that go forward through the network."""
        return round(self.work.forward)


def expected_of(stem: str, p: Mapping, machine: Mapping) -> Expected:
    """What is expected of a notebook with these parameters on a machine that `tell` described."""
    number = int(stem[:2])
    images = machine["images"]
    speed = machine["seconds_per_picture"]
    if not images["twins"]:
        names = [name for name in p.get("baseline", "").split(",") if name != "twin"]
        p = {**p, "baseline": ",".join(names) or "rise"}
    work = work_of(number, p, images)
    scoring = SCORING * passes(work) * speed["scoring" if number > 3 else "float32"]
    if number == 5 and p["also"]:
        second = work_of(5, {**p, "n_images": (p["n_images"] + 1) // 2, "n_extra": 0}, images)
        scoring += SCORING * passes(second) * speed["also"]
        work = work.plus(second)
    return Expected(work, scoring, scoring + work.plain * machine["plain"])


def passes(work: Work) -> float:
    """How many forward passes of a picture the scoring amounts to."""
    return work.forward + BACKWARD * work.backward


def in_words(seconds: float) -> str:
    """ "40 s", "12 min", "2.5 h"."""
    if seconds < 90:
        return f"{max(10, round(seconds, -1)):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


# ---- asking the machine

TELL = "from runner import estimate; estimate.tell()"
PATIENCE = 120  # seconds for an answer, which usually takes five, on a busy machine fifty


def ask(parameters: Mapping[str, Mapping]) -> subprocess.Popen:
    """Start asking what `tell` tells, in a process of its own: what a network's own file does, and
    a GPU's memory, end with it. parameters: those of all notebooks.
    """
    union = {name: value for p in parameters.values() for name, value in p.items()}
    command = [sys.executable, "-c", TELL, json.dumps(union)]
    return subprocess.Popen(
        command, cwd=HOME, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def answer(asking: subprocess.Popen) -> dict | None:
    """What the process says, or None where it cannot or does not in time."""
    try:
        return json.loads(asking.communicate(timeout=PATIENCE)[0].splitlines()[-1])
    except (subprocess.TimeoutExpired, ValueError, IndexError):
        return None
    finally:
        asking.kill()


def tell() -> None:
    """Print, as JSON, what this machine is for a run with the parameters in the first argument:
    cores, device, precision, note (what has to be said of the precision), plain (seconds of plain
    work), seconds_per_picture in float32, as pictures are scored (scoring), and of the network
    `also`; and images, how many the data set has or will have of each split, how many are still to
    draw, and whether each has a twin.
    """
    import torch

    from lab import machine, networks

    s = SimpleNamespace(**json.loads(sys.argv[1]))
    cores = machine.threads(s.threads)
    torch.set_num_threads(cores)
    device = networks.pick_device(s.device)
    batch_size = machine.batch_size(s.batch_size, device)
    precision, note = machine.precision(s.precision, device)
    plain = machine.seconds_of_plain_work()
    images = images_of(s)
    model, how = network_of(s, s.arch, s.weights, device)
    speed = {"float32": machine.seconds_per_picture(model, how, batch_size)}
    speed["scoring"] = speed["float32"]
    if precision == "bf16":
        speed["scoring"] = machine.seconds_per_picture(model, how, batch_size, precision)
    if s.also:
        model, how = network_of(s, s.also, "auto", device)
        speed["also"] = machine.seconds_per_picture(model, how, batch_size, precision)
    about = {"cores": cores, "device": str(device), "precision": precision, "note": note}
    about |= {"plain": plain, "seconds_per_picture": speed, "images": images}
    print(f"\n{json.dumps(about)}")  # a network's own file may have printed something


def network_of(s: SimpleNamespace, arch: str, weights: str, device) -> tuple:
    """(the network, its preprocessing); one whose weights are still to be trained, or downloaded,
    as it is before that.
    """
    import torch

    from lab import networks, runs, words

    names = words(s.classes)
    weights = runs.weights_of(arch, weights, s.dataset, HOME / s.data_dir, s.retrain, names)
    to_be_trained = weights.endswith(".pth") and not Path(weights).is_file()
    of_torchvision = arch in networks.torchvision.models.list_models()
    if to_be_trained or (of_torchvision and weights.lower().startswith("imagenet")):
        make = networks.torchvision.models.get_model
        model = make(networks.arch_name(arch), weights=None).eval()
        model = model.to(device, memory_format=torch.channels_last)
        return model, networks.preprocessing_of(model)
    model, info = networks.load(arch, weights, device, names, s.head, s.fit)
    return model, info["preprocessing"]


def images_of(s: SimpleNamespace) -> dict:
    """How many images there are for training, for choosing on (val) and for measuring (test), how
    many are still to be drawn, and whether each has a twin. In a set that notebook 01 has not made
    yet as many as it will have, of the photographs that come with packages twenty.
    """
    from lab import datasets

    data = HOME / s.data_dir
    counts = {"train": s.n_train, "val": s.n_val, "test": s.n_test}
    if s.dataset == "synthetic":
        spec = data / s.dataset / "spec.json"
        there = json.loads(spec.read_text("utf-8")) if spec.is_file() else {}
        same = all(there.get(name) == count for name, count in counts.items())
        drawn = 0 if same and there.get("seed") == s.seed else sum(counts.values())
        used = {name: round(0.75 * counts[name]) for name in ("val", "test")}  # a fifth is healthy
        return counts | used | {"to_draw": drawn, "twins": True}
    folder = datasets.folder_of(data, s.dataset)
    if s.dataset in datasets.DATASETS and not folder.is_dir():
        n = s.n_test if s.dataset == "cifar10" else 20
        return {"train": 0, "val": 0, "test": n, "to_draw": n, "twins": False}
    frame = datasets.read(folder)
    found = {name: int((frame["split"] == name).sum()) for name in ("train", "val", "test", "all")}
    whole = found.pop("all")
    loose = found["val"] or whole
    if not found["test"]:  # as `datasets.split_rows` has it
        found["val"] = loose // 2 if loose >= 40 else 0
        found["test"] = loose - found["val"]
    return found | {"to_draw": 0, "twins": bool((frame["twin"] != "").all())}


# ---- before a run, and after it


def in_a_line(expected: Mapping[str, Expected], machine: Mapping, less: bool) -> str:
    """ "About 12 min on this machine (2 cores, 18 pictures/s in float32): 01 40 s, 02 2 min, ...".
    less: there is something that may shorten it, finished measurements or a cluster.
    """
    total = sum(each.seconds for each in expected.values())
    rate = 1 / machine["seconds_per_picture"]["scoring"]
    where = machine["device"]
    if where == "cpu":
        where = f"{machine['cores']} core{'s' if machine['cores'] > 1 else ''}"
    parts = [f"{stem[:2]} {in_words(each.seconds)}" for stem, each in expected.items()]
    return (
        f"{'At most about' if less else 'About'} {in_words(total)} on this machine ({where}, "
        f"{rate:.1f} pictures/s in {machine['precision']}): {', '.join(parts)}"
    )


def left(expected: Expected, done: int, elapsed: float) -> float:
    """Seconds that a notebook still needs, with so many pictures done in so many seconds: those for
    the other pictures, at the pace so far if that is slower than was expected, and what is left of
    its plain work.
    """
    plain = expected.seconds - expected.scoring
    pace = expected.scoring / max(expected.pictures, 1)
    plain_left = max(0, plain - max(0, elapsed - done * pace))
    if done:
        pace = max(pace, (elapsed - plain) / done)
    return max(0, expected.pictures - done) * pace + plain_left


def compare(folder: Path) -> str:
    """A table for the run in a folder: pictures and seconds of each notebook as the parameters and
    the machine of its manifest let us expect them now, each beside what it was.
    """
    manifest = check.manifest_of(folder)
    head = ("notebook", "forward", "was", "backward", "was", "plain work", "seconds", "was")
    lines = [head]
    for stem, entry in manifest["notebooks"].items():
        found = expected_of(stem, entry["parameters"], manifest["machine"])
        was = entry.get("pictures", {"forward": 0, "backward": 0})
        numbers = [found.work.forward, was["forward"], found.work.backward, was["backward"]]
        numbers += [found.work.plain, found.seconds, entry["seconds"]]
        lines.append((stem[:2], *(f"{number:,.0f}" for number in numbers)))
    return "\n".join("".join(f"{word:>11}" for word in words) for words in lines)


if __name__ == "__main__":
    print(compare(HOME / sys.argv[1]))
