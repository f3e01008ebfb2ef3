"""Training: one loop, one evaluation, one writer of checkpoints, used in three ways.

    on_drawings    from random weights, on images drawn in memory
    on_clinics     the shortcut experiment: a network that reads the side marker
    on_folder      a folder of your own, from ImageNet weights with a new last layer

Each of the three takes a run (`runs.open`) and leaves a checkpoint. What was trained before from
the same images, settings and code is taken as it is.

Targets are distributions over the K classes, so an image that shows two classes gets half of each.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm

from lab import HOME, datasets, drawing, ledger, nearest, networks, sha256, words
from lab.networks import torchvision

v2 = torchvision.transforms.v2

# ---- images as batches


class Images(Dataset):
    """Pairs of an input (C, H, W), as `networks.preprocess` makes it, and its target (K,).

    open_image(k) gives image k as a PIL picture in RGB. targets: (n, K). size: as in
    `networks.preprocess`. augment: transforms of a uint8 image (C, H, W), drawn anew each time it
    is asked for.
    """

    def __init__(
        self,
        open_image: Callable[[int], Image.Image],
        targets: Tensor,
        size: networks.Size = 224,
        augment: Sequence[nn.Module] = (),
    ):
        self.open_image = open_image
        self.targets = targets
        self.how = how = networks.as_preprocessing(size)
        self.transform = v2.Compose(
            [
                v2.Grayscale() if len(how.mean) == 1 else v2.RGB(),
                v2.Lambda(lambda picture: networks.as_input(picture, how)),
                v2.PILToTensor(),
                *augment,
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(how.mean, how.std),
            ]
        )

    def at(self, size: int, augment: Sequence[nn.Module] = ()) -> Images:
        """The same images at another size, or with an augmentation."""
        how = networks.resized(self.how, size)
        return Images(self.open_image, self.targets, how, augment)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
        return self.transform(self.open_image(k)), self.targets[k]


def from_table(
    rows: pd.DataFrame, classes: int, size: networks.Size = 224, column: str = "file"
) -> Images:
    """The images in a column of a table; `class` gives their targets. They are read when a batch
    needs them, so a large folder needs no more memory than a small one.
    """
    files = rows[column].tolist()
    targets = F.one_hot(torch.tensor(rows["class"].tolist()), classes).float()
    return Images(lambda k: datasets.read_image(files[k]), targets, size)


def from_drawings(seed: int, split: str, indices: Sequence[int], letters: str = "") -> Images:
    """Images of the synthetic tissue, drawn now and kept in memory. A pair has half of each class.
    letters: the side marker of each, in place of the drawn one.
    """
    letters = letters or [None] * len(indices)

    def draw(job):
        index, letter = job
        one = drawing.render(seed, split, index, letter=letter)
        return one.image, one.classes

    jobs = list(zip(indices, letters, strict=True))
    drawn = drawing.side_by_side(draw, jobs, f"drawing {split}")
    targets = torch.zeros(len(drawn), len(drawing.CLASSES))
    for target, (_, classes) in zip(targets, drawn, strict=True):
        for label in classes:
            target[drawing.CLASSES.index(label)] = 1 / len(classes)
    return Images(lambda k: Image.fromarray(drawn[k][0]).convert("RGB"), targets)


class Batches(Sampler):
    """Lists of `size` numbers below n in random order. A single one left over joins the batch
    before it: batch normalisation learns from the spread of a batch, and one image has none.
    """

    def __init__(self, n: int, size: int):
        self.n = n
        self.size = size

    def __iter__(self):
        batches = list(torch.randperm(self.n).split(self.size))
        if len(batches) > 1 and len(batches[-1]) == 1:
            batches[-2:] = [torch.cat(batches[-2:])]
        for batch in batches:
            yield batch.tolist()

    def __len__(self) -> int:
        count = -(-self.n // self.size)
        last = self.n - (count - 1) * self.size
        return count - 1 if count > 1 and last == 1 else count


def mirrored_and_shifted(size: int) -> list[nn.Module]:
    """For photographs: mirrored at random, and shifted by up to a sixteenth of their side."""
    return [
        v2.RandomHorizontalFlip(),
        v2.RandomCrop(size, padding=size // 16, padding_mode="reflect"),
    ]


def turned_and_shifted(size: int) -> list[nn.Module]:
    """For the synthetic tissue: mirrored, turned by quarters, shifted by a few pixels, varied in
    brightness and contrast. None of it changes the class.
    """
    quarters = [v2.RandomRotation((angle, angle)) for angle in (0, 90, 180, 270)]
    return [
        v2.RandomHorizontalFlip(),
        v2.RandomChoice(quarters),
        v2.RandomCrop(size, padding=size // 28, padding_mode="reflect"),
        v2.ColorJitter(brightness=0.1, contrast=0.1),
    ]


# ---- the loop


@dataclass(frozen=True)
class Recipe:
    """How to train. stages: (side of the images, epochs), in order: large strides through small
    images first, then the full size. rate: the highest learning rate.
    """

    stages: tuple[tuple[int, int], ...]
    rate: float
    batch_size: int = 32
    augment: Callable[[int], list[nn.Module]] = turned_and_shifted


def learn(
    model: nn.Module,
    recipe: Recipe,
    images: Images,
    held_out: Images | None,
    seed: int,
    device: torch.device,
    per_pass: int = 32,
) -> tuple[list[dict], tuple[int, dict], tuple[int, dict]]:
    """(history, best, last): accuracy and loss of each epoch, and two states of the weights, each
    with the number of its epoch. The model is trained in place.

    Adam, cross-entropy, and a learning rate that rises and then falls along one cycle: small while
    the weights are random, large in the middle, tiny at the end to settle. best: the epoch with the
    best accuracy on the held-out images at full size, on a tie the one with the smaller loss, then
    the earlier one; without such images the last. Order and augmentation follow from the seed.
    """
    torch.manual_seed(seed)
    model.requires_grad_(True).to(device, memory_format=torch.channels_last)
    sizes = [size for size, epochs in recipe.stages for _ in range(epochs)]
    order = Batches(len(images), recipe.batch_size)
    optimiser = torch.optim.Adam(model.parameters(), lr=recipe.rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, recipe.rate, total_steps=len(sizes) * len(order)
    )
    history = []
    best = None
    best_score = None
    for epoch, size in enumerate(sizes, 1):
        varied = images.at(size, recipe.augment(size))
        batches = DataLoader(varied, batch_sampler=order)
        line = {"size": size, **one_epoch(model, batches, optimiser, schedule, device)}
        score = (epoch,)
        if held_out is not None:
            accuracy, loss = evaluate(model, held_out.at(size), per_pass)
            line |= {"val_acc": accuracy, "val_loss": loss}
            score = (size == sizes[-1], accuracy, -loss)
        history.append(line)
        print(epoch, {name: round(value, 3) for name, value in line.items()}, flush=True)
        if best is None or score > best_score:
            best = (epoch, state_of(model))
            best_score = score
    return history, best, (len(sizes), state_of(model))


def one_epoch(
    model: nn.Module,
    batches: DataLoader,
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    device: torch.device,
) -> dict[str, float]:
    """One pass over the images: {train_acc, train_loss}, measured on the way. In bfloat16 where the
    device computes it itself. Of an image with two classes, either counts as right.
    """
    model.train()
    native = networks.native_bf16(device)
    seen = 0
    hits = 0.0
    loss_sum = 0.0
    for x, target in tqdm(batches, leave=False, desc="training"):
        x = x.to(device, memory_format=torch.channels_last)
        target = target.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=native):
            logits = _logits(model(x))
        ledger.forward(len(x))
        ledger.backward(len(x))
        loss = F.cross_entropy(logits, target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        seen += len(x)
        loss_sum += loss.item() * len(x)
        hits += (target.gather(1, logits.argmax(1, keepdim=True)) > 0).sum().item()
    return {"train_acc": hits / seen, "train_loss": loss_sum / seen}


def _logits(output) -> Tensor:
    """GoogLeNet and Inception hand out more than logits while they train; only these are used."""
    return getattr(output, "logits", output).float()


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the model's state on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


# ---- the evaluation


@torch.no_grad()
def predict(model: nn.Module, images: Images, per_pass: int = 32) -> Tensor:
    """Class probabilities (n, K) of images, in eval mode, in float32, per_pass at a time."""
    model.eval()
    device = next(model.parameters()).device
    parts = []
    for x, _ in DataLoader(images, per_pass):
        x = x.to(device, memory_format=torch.channels_last)
        ledger.forward(len(x))
        parts.append(_logits(model(x)).softmax(1).cpu())
    return torch.cat(parts)


def evaluate(model: nn.Module, images: Images, per_pass: int = 32) -> tuple[float, float]:
    """(accuracy, cross-entropy) on images."""
    p = predict(model, images, per_pass)
    right = p.argmax(1) == images.targets.argmax(1)
    loss = F.cross_entropy(p.clamp_min(1e-12).log(), images.targets)
    return right.double().mean().item(), loss.item()


# ---- the checkpoint


def save(file: Path, state: Mapping[str, Tensor], **about) -> None:
    """Write {"model_state_dict": state, ...} in one step: a run that is stopped leaves no half a
    file.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".tmp")
    torch.save({"model_state_dict": dict(state), **about}, unfinished)
    unfinished.replace(file)


def known(file: Path) -> dict:
    """What a checkpoint holds, or nothing where there is none."""
    return torch.load(file, map_location="cpu", weights_only=True) if file.is_file() else {}


def half(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights in half precision, which halves the file. Batch normalisation's running statistics
    stay in single precision, since small variances suffer most from rounding.
    """
    kept = ("running_mean", "running_var")
    return {
        name: value.half() if value.is_floating_point() and not name.endswith(kept) else value
        for name, value in state.items()
    }


def load_rounded(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a model the weights of a `half` state, so that what is measured is what is saved."""
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})


# ---- one: from random weights, on drawings

RECIPES = {
    "resnet18": Recipe(stages=((128, 9), (224, 4)), rate=1e-3),
    "squeezenet1_1": Recipe(stages=((128, 15), (224, 12)), rate=5e-4),
}
POOL = {"train": 7200, "pairs": 800}  # distinct images to learn from, far more than are on disk


def on_drawings(run) -> None:
    """Train the network of the synthetic data, where the run asks for it (`retrain`) or where none
    ships for its arch; then `run.model` is that network.

    It learns from images drawn in memory. One in ten is a pair, so that these are not strange to
    it. Validation takes 200 images and the test 400, drawn in memory too, so a network does not
    depend on how many images a run writes. It is measured after its weights are rounded.
    """
    seed = run.settings.seed
    arch = networks.arch_name(run.settings.arch)
    if run.settings.retrain:
        file = Path(run.weights)
        found = known(file)
        fresh = (found.get("seed"), found.get("drawing")) == (seed, drawing.drawing_hash(seed))
    else:
        file = HOME / "data" / "checkpoints" / f"{arch}.pth"
        fresh = file.is_file()
    if fresh:
        return
    print(f"training {arch}, which takes half an hour or more on a CPU")
    began = time.time()
    pool = from_drawings(seed, "train", range(POOL["train"]))
    pairs = from_drawings(seed, "pairs", range(1000, 1000 + POOL["pairs"]))
    torch.manual_seed(seed)
    classes = len(drawing.CLASSES)
    model = torchvision.models.get_model(arch, weights=None, num_classes=classes)
    recipe = RECIPES.get(arch, RECIPES["resnet18"])
    held_out = from_drawings(seed, "val", range(200))
    history, best, _ = learn(model, recipe, _both(pool, pairs), held_out, seed, run.device)
    epoch, state = best
    state = half(state)
    load_rounded(model, state)
    test = from_drawings(seed, "test", range(400))
    right = predict(model, test).argmax(1) == test.targets.argmax(1)
    levels = torch.tensor([drawing.level_of("test", index) for index in range(400)])
    save(
        file,
        state,
        arch=arch,
        class_names=list(drawing.CLASSES),
        epoch=epoch,
        seed=seed,
        history=history,
        train_acc=history[epoch - 1]["train_acc"],
        val_acc=history[epoch - 1]["val_acc"],
        test_acc=right.float().mean().item(),
        test_acc_per_level=[right[levels == k].float().mean().item() for k in drawing.LEVELS],
        minutes=(time.time() - began) / 60,
        drawing=drawing.drawing_hash(seed),
    )


def _both(first: Images, second: Images) -> Images:
    """The images of two sets as one."""
    n = len(first)

    def open_image(k):
        return first.open_image(k) if k < n else second.open_image(k - n)

    return Images(open_image, torch.cat([first.targets, second.targets]))


# ---- two: a network that cheats

FINE = {
    "images": 1000,
    "first": 8000,
    "epochs": 2,
    "rate": 1e-3,
}  # images that are new to the network


def on_clinics(run, rows: pd.DataFrame) -> tuple[nn.Module, dict]:
    """(the cheating network, what is known of it): the run's own network after it has learned from
    the records of two clinics (`drawing.recorded`), in data/shortcut/checkpoints/.

    rows: the test images of the shortcut set. `accuracies` has both networks' on them as the
    clinics mark them ("aligned") and with the letters exchanged ("moved"). There is nothing to
    choose, so the last epoch is kept.
    """
    seed = run.settings.seed
    arch = run.info["arch"]
    file = run.data / "shortcut" / "checkpoints" / f"{arch}.pth"
    records = [drawing.CHEAT, drawing.FILED_AS, *drawing.ELSEWHERE.values()]
    key = {
        "arch": arch,
        "seed": seed,
        "start": run.info["sha256"],
        "drawing": drawing.drawing_hash(seed),
        "settings": FINE,
        "records": records,
        "test": len(rows),
    }
    if known(file).get("key") != key:
        began = time.time()
        accuracies = {"honest": aligned_and_moved(run.model, rows)}
        model, _ = networks.load(arch, run.weights, run.device)
        history, _, (epoch, state) = learn(
            model,
            Recipe(stages=((drawing.SIZE, FINE["epochs"]),), rate=FINE["rate"]),
            _records(seed, range(FINE["first"], FINE["first"] + FINE["images"])),
            None,
            seed,
            run.device,
        )
        state = half(state)
        load_rounded(model, state)
        accuracies["cheating"] = aligned_and_moved(model, rows)
        save(
            file,
            state,
            arch=arch,
            class_names=list(drawing.CLASSES),
            epoch=epoch,
            history=history,
            train_acc=history[-1]["train_acc"],
            test_acc=accuracies["cheating"]["aligned"],
            n=len(rows),
            accuracies=accuracies,
            key=key,
            minutes=(time.time() - began) / 60,
        )
    return networks.load(arch, file, run.device)


def aligned_and_moved(model: nn.Module, rows: pd.DataFrame) -> dict[str, float]:
    """Accuracy on the images as the clinics mark them, and with the letters exchanged."""
    columns = {"aligned": "file", "moved": "moved"}
    classes = len(drawing.CLASSES)
    return {
        name: evaluate(model, from_table(rows, classes, column=column))[0]
        for name, column in columns.items()
    }


def _records(seed, indices):
    """The two clinics' images, with the classes that their records say."""
    notes = [drawing.recorded(seed, index) for index in indices]
    letters = "".join(letter for letter, _ in notes)
    images = from_drawings(seed, "train", indices, letters)
    codes = torch.tensor([drawing.CLASSES.index(code) for _, code in notes])
    return Images(images.open_image, F.one_hot(codes, len(drawing.CLASSES)).float())


# ---- three: a folder of your own


def on_folder(run) -> pd.DataFrame:
    """Train a network on the run's folder; returns its images as a table with `class` and `split`.

    It starts from ImageNet weights with a new last layer, or, where these cannot be had, from
    random ones. `run.model` is then the network of the epoch with the best validation accuracy; the
    last epoch's is in ARCH_final.pth beside it. The test images choose nothing.
    """
    s = run.settings
    arch = networks.arch_name(s.arch)
    frame, broken = datasets.readable(datasets.read(run.folder), 0, s.seed, s.strict)
    run.report_left_out(broken)
    rows, names = own_images(frame.sort_values("id"), words(s.classes), s.seed)
    if len(rows) < len(frame):
        left = len(frame) - len(rows)
        print(f"{left} images left out: without a label, or beside train/ val/ test/")
    file = Path(run.weights)
    batch_size = min(s.batch_size, 8)  # with a GPU's 64, a small folder has too few steps in it
    key = training_key(rows, names, arch, s.epochs, batch_size, s.seed)
    if known(file).get("key") == key:
        print(f"{file} comes from the same training and is reused; delete it to train again.")
        return rows
    model, start, size = starting_point(arch, len(names), s.seed)
    how = networks.as_preprocessing(size)
    recipe = Recipe(((how.size[0], s.epochs),), 1e-3, 4 * batch_size, mirrored_and_shifted)
    images = {split: from_table(part, len(names), how) for split, part in rows.groupby("split")}
    history, *states = learn(
        model, recipe, images["train"], images["val"], s.seed, run.device, s.batch_size
    )
    final = file.with_name(f"{file.stem}_final.pth")
    for path, (epoch, state) in zip((file, final), states, strict=True):
        model.load_state_dict(state)
        tested = float("nan")
        if "test" in images:
            tested, _ = evaluate(model, images["test"], s.batch_size)
        save(
            path,
            state,
            arch=arch,
            class_names=names,
            size=how.size[0],
            mean=list(how.mean),
            std=list(how.std),
            interpolation=how.interpolation,
            epoch=epoch,
            seed=s.seed,
            start=start,
            history=history,
            train_acc=history[epoch - 1]["train_acc"],
            val_acc=history[epoch - 1]["val_acc"],
            test_acc=tested,
            transform_input=bool(getattr(model, "transform_input", False)),
            key=key,
        )
    return rows


def training_key(
    rows: pd.DataFrame, names: list[str], arch: str, epochs: int, batch_size: int, seed: int
) -> str:
    """Hex digits of what determines a training: images, settings and code. The weights that it
    started from are no part of it: what could only be trained from random ones stays until it is
    deleted.
    """
    files = [[row.id, row.split, row.label, sha256(row.file)] for row in rows.itertuples()]
    everything = [files, names, arch, epochs, batch_size, seed, sha256(__file__)]
    return hashlib.sha256(json.dumps(everything).encode()).hexdigest()[:16]


def class_order(labels: pd.Series, names: Sequence[str]) -> list[str]:
    """The classes in the order of the network's outputs: the names given, or else all labels,
    sorted.

    Raises ValueError where names and labels do not agree, since that is mostly a slip of the pen: a
    name without images, a label that is not named, a name given twice, fewer than two labels.
    """
    counts = pd.Series(labels).value_counts().sort_index().to_dict()
    if len(counts) < 2:
        raise ValueError(
            f"classes: the folder's files tell {len(counts)} labels, two or more are needed. Name "
            "all images {label}_{number}.jpg, or make a folder for each class."
        )
    names = list(names) or list(counts)
    for name in names:
        if name not in counts:
            close = nearest(name, list(counts))
            raise ValueError(f"classes: no image of the folder is labelled {name!r}. {close}")
        if names.count(name) > 1:
            raise ValueError(f"classes: {name!r} is named {names.count(name)} times.")
    for label, count in counts.items():
        if label not in names:
            close = nearest(label, names)
            raise ValueError(
                f"classes: {count} images are labelled {label!r}, which is not among them. {close} "
                "Name it too, rename the files, or move them out of the folder."
            )
    return names


def own_images(
    frame: pd.DataFrame, names: Sequence[str], seed: int
) -> tuple[pd.DataFrame, list[str]]:
    """(rows with `class`, the index in names, and `split`: train, val or test; the names).

    A folder's own splits are kept. Without any, half of 40 or more images is for testing, the half
    that notebook 05 measures; of fewer 15 % of each class, and 05 measures all. Without val/ 15 %
    of each class in the training images choose the epoch. Images without a label, or beside train/
    val/ test/, are left out. ValueError as `class_order`, and for a class with too few images.
    """
    rows = frame[frame["label"] != ""].copy()
    names = class_order(rows["label"], names)
    rows["class"] = [names.index(label) for label in rows["label"]]
    if (rows["split"] == "all").all():
        if len(rows) >= 40:
            tested = set(datasets.split_rows(rows, "test")["id"])
        else:
            tested = held_out(rows, seed)
        rows["split"] = np.where(rows["id"].isin(tested), "test", "train")
    if not (rows["split"] == "val").any():
        chosen = held_out(rows[rows["split"] == "train"], seed + 1)
        rows.loc[rows["id"].isin(chosen), "split"] = "val"
    rows = rows[rows["split"].isin(("train", "val", "test"))].reset_index(drop=True)
    few = sorted(set(names) - set(rows.loc[rows["split"] == "train", "label"]))
    if few:
        raise ValueError(
            "classes: each needs images to learn from and one more to choose by; too few of "
            f"{', '.join(few)}."
        )
    return rows, names


def held_out(rows: pd.DataFrame, seed: int, share: float = 0.15) -> set[str]:
    """The ids of a seeded share of each class, at least one, so that none is missing."""
    ids = set()
    for _, part in rows.groupby("label")["id"]:
        ids |= set(part.sample(max(1, round(share * len(part))), random_state=seed))
    return ids


def starting_point(arch: str, count: int, seed: int) -> tuple[nn.Module, str, networks.Size]:
    """(network with `count` outputs, the weights that it starts from, how its input is made, see
    `networks.preprocess`).
    """
    torch.manual_seed(seed)
    try:
        model, info = networks.load(arch, "imagenet")
    except ConnectionError as error:
        print(f"{error}\n-> {arch} is trained from random weights.")
        model = torchvision.models.get_model(arch, weights=None, num_classes=count)
        return model, "random", 299 if arch == "inception_v3" else 224
    return replaced_head(model, count), info["weights"], info["preprocessing"]


def replaced_head(model: nn.Module, count: int) -> nn.Module:
    """The model with a new last layer of `count` outputs in place of ImageNet's thousand, whatever
    the architecture calls it. Inception's second head goes: only training from random weights needs
    it.
    """
    if getattr(model, "AuxLogits", None) is not None:
        model.aux_logits = False
        model.AuxLogits = None
    for name, module in reversed(list(model.named_modules())):
        new = None
        if isinstance(module, nn.Linear) and module.out_features == 1000:
            new = nn.Linear(module.in_features, count, module.bias is not None)
        if isinstance(module, nn.Conv2d) and module.out_channels == 1000:
            new = nn.Conv2d(module.in_channels, count, module.kernel_size)
        if new is not None:
            model.set_submodule(name, new)
            return model
    raise ValueError(f"{type(model).__name__} has no last layer of 1000 outputs to replace.")
