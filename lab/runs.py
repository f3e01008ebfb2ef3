"""A run: its settings, its data and network, the files it writes, and the cache of finished
measurements.

    run = runs.open(5, alpha=0.5, n_images=10)

is the one line with which a notebook begins.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import io
import json
import os
import re
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from PIL import Image

from lab import (
    HOME,
    RUN_ID,
    datasets,
    figures,
    heads,
    ledger,
    machine,
    networks,
    settings,
    words,
)

# ---- a run


class Run:
    """What a notebook works with; `open` makes it.

    settings: every setting the notebook reads, by name, as given or by default
    (params/default.yaml); precision, batch_size and threads as what they come to on this machine
    (`lab.machine`). out: the folder it writes into, with figures/, tables/, images/ and maps/.
    data: the folder of generated data. device: a torch.device. frame (the data set's table), model
    (frozen, in eval mode) and info (what is known of it, see `networks.load`) are read when they
    are first asked for.
    """

    def __init__(self, notebook: int, values: Mapping):
        self.notebook = notebook
        self.settings = SimpleNamespace(**values)
        self.data = HOME / values["data_dir"]
        self.out = HOME / values["results_dir"]
        self.device = networks.pick_device(values["device"])
        self._leave_nothing_open()
        self.folder = datasets.folder_of(self.data, values["dataset"])  # of the images

    def _leave_nothing_open(self) -> None:
        """Settings that depend on the machine become what they come to on it."""
        s = self.settings
        s.threads = machine.threads(s.threads)
        s.batch_size = machine.batch_size(s.batch_size, self.device)
        if hasattr(s, "precision"):  # notebooks that score nothing do not read it
            s.precision, note = machine.precision(s.precision, self.device)
            if note:
                print(note)

    @functools.cached_property
    def frame(self) -> pd.DataFrame:
        """The data set's table, with `known`, the index of each image's class among the network's
        (-1: none). What the folder holds and cannot be used is printed, and written to
        tables/NN_notes.csv, which the runner repeats at the end of the run.
        """
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            frame = datasets.read(self.folder)
        if notes:
            texts = list(dict.fromkeys(str(note.message) for note in notes))
            print(*texts, sep="\n")
            self.save_table(pd.DataFrame({"reason": texts}), f"{self.notebook:02d}_notes")
        return frame.assign(known=datasets.class_indices(frame, self.info["class_names"]))

    @functools.cached_property
    def _network(self) -> tuple[torch.nn.Module, dict]:
        s = self.settings
        return networks.load(s.arch, self.weights, self.device, words(s.classes), s.head, s.fit)

    @property
    def weights(self) -> str:
        """What the settings say of the network's weights, as `networks.load` takes it; see
        `weights_of`.
        """
        s = self.settings
        return weights_of(s.arch, s.weights, s.dataset, self.data, s.retrain, words(s.classes))

    @property
    def model(self) -> torch.nn.Module:
        return self._network[0]

    @property
    def info(self) -> dict:
        return self._network[1]

    @property
    def how(self) -> networks.Preprocessing:
        """How a picture becomes the network's input."""
        return self.info["preprocessing"]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the network's input in pixels."""
        return self.how.size

    @property
    def blank(self) -> torch.Tensor:
        """An empty picture (1, C, H, W), for finding layers: any picture will do."""
        return torch.zeros(1, len(self.how.mean), *self.size, device=self.device)

    def picture(self, file: str) -> Image.Image:
        """An image file as the network sees it, in its own pixels: all of it, or with fit="crop"
        its centre.
        """
        return networks.framed(datasets.read_image(file), self.how)

    def about_network(self) -> str:
        """One line on the network, how its input is made and what its output means."""
        return about_network(self.info, self.device)

    def other(self, arch: str) -> tuple[torch.nn.Module, dict]:
        """A second network (`also`) with the weights that belong to the same data, and what is
        known of it.
        """
        s = self.settings
        if networks.arch_name(arch) == self.info["arch"]:
            raise ValueError(f"also={arch!r} is the first network already: name another, or none.")
        names = words(s.classes)
        weights = weights_of(arch, "auto", s.dataset, self.data, s.retrain, names)
        return networks.load(arch, weights, self.device, fit=s.fit)

    def in_batches(self, rows: pd.DataFrame) -> list[pd.DataFrame]:
        """The rows of a table, batch_size at a time."""
        n = self.settings.batch_size
        return [rows[i : i + n] for i in range(0, len(rows), n)]

    def load(self, rows: pd.DataFrame) -> torch.Tensor:
        """The images of some rows as the network takes them: (B, C, H, W), on its device."""
        return datasets.load_batch(rows, size=self.how).to(self.device)

    def save_figure(self, figure, name: str) -> None:
        """Write figures/NAME.png and .pdf, and show the figure below the cell."""
        figures.save(figure, self.out / "figures" / f"{name}.png")

    def save_map(self, image: Image.Image, cam, name: str) -> None:
        """Write one explanation: images/NAME_*.png, see `figures.save_pictures`, and the raw map of
        the network's input, maps/NAME.npy, float32 (H, W).
        """
        figures.save_pictures(self.out / "images", name, image, cam, self.settings.colormap)
        raw = torch.as_tensor(cam).cpu().float().numpy()
        np.save(self.out / "maps" / f"{name}.npy", raw)

    def save_table(self, frame: pd.DataFrame, name: str, caption: str = "") -> None:
        """Write tables/NAME.csv and, with a caption, tables/NAME.tex; see `save_table`."""
        save_table(frame, self.out / "tables" / f"{name}.csv", caption)

    def save_resolved(self, **chosen) -> None:
        """Write what the run's settings came to as resolved.json, which the runner moves into the
        manifest, beside what was asked.
        """
        network = {
            "arch": self.info["arch"],
            "weights": self.info["weights"],
            "weights_sha256": self.info["sha256"],
            "head": self.info["head"],
            "preprocessing": dataclasses.asdict(self.how),
        }
        of_machine = {"batch_size": self.settings.batch_size}
        if hasattr(self.settings, "precision"):
            of_machine["precision"] = self.settings.precision
        about = {**network, **chosen, **of_machine, **numerics(self.device)}
        about["device"] = str(self.device)
        save_json(about, self.out / "resolved.json")

    def report_left_out(self, left_out: pd.DataFrame) -> None:
        """Say how many images were left out and why; write those whose files cannot be read to
        tables/NN_skipped.csv, which the runner repeats at the end of the run.
        """
        broken = left_out[~left_out["reason"].isin([UNUSED, MISTAKEN])]
        for reason, count in left_out["reason"].drop(broken.index).value_counts().items():
            print(f"{count} left out because {reason}")
        if len(broken):
            self.save_table(broken, f"{self.notebook:02d}_skipped")
            print(
                f"{len(broken)} left out because a file cannot be read or shows nothing:",
                *broken["reason"].head(5),
                sep="\n  ",
            )


def about_network(info: Mapping, device) -> str:
    """What a run says of its network: weights, classes, input and head."""
    how = info["preprocessing"]
    height, width = how.size
    weights = info["weights"]
    if weights == "its own":
        weights = "weights as its code makes them, no file"
    return (
        f"{info['arch']} ({weights}) on {device}, {len(info['class_names'])} classes. "
        f"Input: {height} x {width} pixels, {how.fit}, {how.interpolation}, mean "
        f"{[round(v, 3) for v in how.mean]}, std {[round(v, 3) for v in how.std]} ({how.source}). "
        f"Head: {info['head']}, {heads.HEADS[info['head']].about} ({info['head_source']})."
    )


UNUSED, MISTAKEN = "the network does not use its lesion", "the network sees another class in it"


def open(notebook: int, **given) -> Run:
    """The run of a notebook, 1 to 5, with the settings given and params/default.yaml's for the
    rest.

    Makes the results folder (results/interactive where none is given), seeds torch, sets the CPU
    threads and the style of figures. Raises ValueError for a setting that does not exist, that this
    notebook does not read, or whose value is not allowed.
    """
    values = settings.defaults(notebook) | {"results_dir": "results/interactive"}
    for name, value in given.items():
        values[name] = settings.check(name, value)
        if name not in settings.defaults(notebook):
            raise ValueError(
                f"{name} has no effect in notebook {notebook:02d}; it is read by "
                f"{settings.read_by(name)}."
            )
    values["arch"] = _from_home(values["arch"])
    values["weights"] = _from_home(values["weights"])
    run = Run(notebook, values)
    for name in ("figures", "tables", "images", "maps"):
        (run.out / name).mkdir(parents=True, exist_ok=True)
    torch.manual_seed(run.settings.seed)
    torch.set_num_threads(run.settings.threads)
    plt.style.use(Path(__file__).with_name("style.mplstyle"))
    return run


def _from_home(value: str) -> str:
    """A setting that names a file, seen from the repository, as an absolute path."""
    path = HOME / Path(value).expanduser()
    return str(path) if path.suffix in (".pth", ".pt", ".safetensors") or ".py:" in value else value


def weights_of(
    arch: str,
    weights: str,
    dataset: str,
    data: Path,
    retrain: bool = False,
    classes: Sequence[str] = (),
) -> str:
    """The `weights` argument of `networks.load` that a run's settings mean.

    "auto" is the shipped checkpoint for the synthetic data (with `retrain`, the one that notebook
    01 trained here), the one that 01 trained on a folder of your own if `classes` or `retrain` is
    given, and ImageNet else. An own network, FILE.py:name, is taken as it is.
    """
    if weights != "auto" or ".py:" in arch:
        return weights
    if dataset == "synthetic":
        return (
            str(data / dataset / "checkpoints" / f"{networks.arch_name(arch)}.pth")
            if retrain
            else "auto"
        )
    if dataset in datasets.DATASETS or not (classes or retrain):
        return "imagenet"
    return str(
        trained_folder(data, datasets.folder_of(data, dataset)) / f"{networks.arch_name(arch)}.pth"
    )


def trained_folder(data: Path, folder: Path) -> Path:
    """Where notebook 01 puts the networks that it trained on a folder of your own."""
    return data / "trained" / f"{folder.name}-{zlib.crc32(os.fsencode(folder)):08x}"


# ---- files


def save_table(frame, path: str | Path, caption: str = "") -> None:
    """Write the table as CSV with the run's id as its last column, floats with nine significant
    digits; with a caption also as LaTeX (booktabs) beside it, floats with four decimals.
    """
    frame.assign(run=RUN_ID).to_csv(path, index=False, float_format="%.9g", lineterminator="\n")
    if caption:
        style = frame.style.hide(axis="index").format(precision=4, na_rep="--", escape="latex")
        caption = re.sub(r"(?<!\\)([%&#_])", r"\\\1", caption)
        text = style.format_index(escape="latex", axis=1).to_latex(
            hrules=True, caption=caption, position="htbp", label=f"tab:{Path(path).stem}"
        )
        Path(path).with_suffix(".tex").write_text(
            f"% run {RUN_ID}, for the booktabs package\n{text}", "utf-8"
        )


def save_json(content: Mapping, path: str | Path) -> None:
    """Write a small JSON file with sorted keys and the run's id."""
    Path(path).write_text(
        json.dumps({**content, "run": RUN_ID}, indent=1, sort_keys=True, ensure_ascii=False) + "\n",
        encoding="utf-8",
    )


MEASURING = (
    "pictures",
    "heads",
    "networks",
    "folders",
    "datasets",
    "statistics",
)  # rooms that decide values


def code_hash(*registered: Callable) -> str:
    """SHA-256 of the code that decides what is measured: `cam_core`, the rooms of `lab` it stands
    on, and the file in which a CAM or a fusion rule of your own is defined (in a notebook, its
    source). Finished work is reused while it stays.
    """
    files = [
        HOME / "cam_core.py",
        *(HOME / "lab" / f"{room}.py" for room in MEASURING),
    ]
    parts = [file.read_bytes() for file in files]
    for function in registered:
        if function.__module__ != "cam_core":
            file = getattr(sys.modules.get(function.__module__), "__file__", None)
            parts.append(Path(file).read_bytes() if file else inspect.getsource(function).encode())
    return hashlib.sha256(b"\n".join(parts)).hexdigest()


def numerics(device: str | torch.device = "cpu") -> dict:
    """What the last bits of a result depend on beside code, data and the shape of a batch:
    versions, threads, device, instructions of the CPU, and torch's determinism and TF32 flags. Part
    of cache keys and of the manifest, and what the workers of a cluster must share.
    """
    place = torch.device(device)
    return {
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else place.type,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "tf32": [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32],
    }


def cache_file(folder: str | Path, key: Mapping) -> Path:
    """Where `cached` keeps what belongs to `key`."""
    text = json.dumps(key, sort_keys=True, default=os.fspath)
    return Path(folder) / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def cached(
    folder: str | Path, key: Mapping, make: Callable[..., list[dict]], scored: Mapping | None = None
) -> list[dict]:
    """What make() returns, a list of plain records, computed once: kept in `folder` under the hash
    of `key`, which must hold all that determines it, with the pictures that it cost. Written in one
    step, so a run that is stopped loses only the part it was at.

    scored: the key of `scores`; then make(known=...) is called with the scores that are known under
    it. Those were scored in other batches, so records can differ by rounding from what they would
    be without.
    """
    text, file = json.dumps(key, sort_keys=True, default=os.fspath), cache_file(folder, key)
    if file.is_file():
        kept = json.loads(file.read_text("utf-8"))
        ledger.add(kept["pictures"])
        return kept["records"]
    before = ledger.counts()
    if scored is None:
        records = make()
    else:
        with scores(folder, scored) as known:
            records = make(known=known)
    kept = {"key": json.loads(text), "pictures": ledger.since(before), "records": records}
    _write_whole(file, json.dumps(kept).encode())
    return json.loads(json.dumps(records))  # as it will be read


@contextmanager
def scores(folder: str | Path, key: Mapping) -> Iterator[dict]:
    """What is known of pictures under `key`, as `cam_core.perturbation_curves` takes it: read from
    `folder`, and written there again with what was added. key must hold all that decides the value
    of a picture with a given content.
    """
    file = cache_file(folder, {"kind": "scores", **key}).with_suffix(".npy")
    known = {}
    if file.is_file():
        for code, target, value in np.load(file).tolist():
            known[code, target] = value
    before = len(known)
    yield known
    if len(known) > before:
        table = [(code, target, value) for (code, target), value in known.items()]
        stream = io.BytesIO()
        np.save(stream, np.array(table, dtype=[("code", "i8"), ("target", "i8"), ("value", "f4")]))
        _write_whole(file, stream.getvalue())


def _write_whole(file: Path, content: bytes) -> None:
    """Write a file in one step, so that nobody reads half of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_suffix(f".{os.getpid()}.part")
    try:
        fresh.write_bytes(content)
        os.replace(fresh, file)
    finally:
        fresh.unlink(missing_ok=True)
