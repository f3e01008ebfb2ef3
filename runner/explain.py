"""Explain photographs: the likeliest classes, and maps of what speaks for them.

    ./run_all.sh explain PHOTO... [-p NAME VALUE]... [-f FILE] [--results-dir DIR]

A PHOTO is an image file or a folder of them. Without `-p arch` and `-p weights` the network is
efficientnet_lite0, whose ImageNet weights come with a Python package. `-p target tabby,espresso`
explains these classes side by side, by name or number; without it the predicted class is explained,
of a network for several labels those with a probability above 0.5, five at most. docs/explain.md
names the settings.

For each photograph five pictures are written into results/explain, with the map as NAME.npy
(float32, in [0, 1], as large as the network's input) and NAME.json, which says how it was made; of
classes that were asked for the names end in them. index.html shows all that lies in the folder.
Nothing of other photographs is touched. Exit codes: 0 done, 1 a photograph could not be explained,
weights could not be downloaded or a file not written, 2 refused before the first photograph, 130
stopped.
"""

from __future__ import annotations

import argparse
import base64
import datetime
import functools
import hashlib
import json
import os
import re
import sys
import tempfile
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

from lab import HOME, nearest, sha256
from runner import parameters
from runner.parameters import refuse

# torch and cam_core take seconds to import. What is wrong on the command line is told before that,
# so they are imported where they are first used.

TEMPLATE = Path(__file__).with_name("explain_template.html")
GENERATOR = "hybrid-grad-layercam explain"  # by this index.html is known as ours
KINDS = ("original", "overlay", "heatmap", "edges", "grayscale")  # of `figures.save_pictures`
MOST = 5  # classes that are printed, labels that are explained unasked
MOST_NAMES = 12  # classes that a message lists
FUNCTION = r".*\.py:\w+"  # a target that is FILE.py:function
LONGEST = 100  # bytes of a photograph's name in the names of its files


# ---- what is asked for


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's words."""
    parser = parameters.command_line("./run_all.sh explain", __doc__, "results/explain")
    what = "an image file, or a folder of them"
    parser.add_argument("photographs", nargs="+", metavar="PHOTO", help=what)
    return parser.parse_intermixed_args(words)


def settings_of(args: argparse.Namespace) -> dict[str, object]:
    """{name: value} of every setting that this command reads, as given or by default; exit code 2
    for what is not allowed.
    """
    given = parameters.check_given(parameters.read_given(args.f, args.p), ["explain"])
    folder = given.get("results_dir", "results/explain")
    values = parameters.parameters_of("explain", given)
    return values | {"results_dir": (HOME / Path(folder).expanduser()).resolve()}


def photographs(words: Sequence[str], out: Path) -> tuple[list[Path], list[str]]:
    """The image files that the command line names, each once, and what is wrong with the others.
    Pictures in the results folder are no photographs.
    """
    from lab import datasets

    files: dict[Path, None] = {}
    wrong = []
    for word in words:
        place = Path(os.path.abspath(parameters.located(word)))
        if not place.exists():
            wrong.append(f"there is no file {place}.")
            continue
        if not place.is_dir():
            files[place] = None
            continue
        try:
            inside = [Path(file) for file in datasets.read(place)["file"]]
        except ValueError as error:
            wrong.append(str(error))
            continue
        files |= {file: None for file in inside if not file.resolve().is_relative_to(out)}
    return list(files), wrong


# ---- the network, and how it is asked


@dataclass(frozen=True)
class Asked:
    """A network and what it is asked: the same for every photograph."""

    model: object
    info: Mapping  # see `networks.load`
    about: str  # the network in words
    targets: list  # class indices; or one function of the output; empty for what is predicted
    words: str  # the setting target, as given
    how: Mapping  # arguments of `cam_core.explain`
    colormap: str


def ask(values: Mapping[str, object]) -> Asked:
    """Load the network and try all that is asked of it on a picture of noise; exit code 2 where it
    cannot be, 1 where weights cannot be downloaded.
    """
    import torch

    import cam_core as cc
    from lab import machine

    torch.set_num_threads(machine.threads(values["threads"]))
    try:
        model, info = load(values)
        names = info["class_names"]
        targets = targets_of(values["target"], names)
        how = {
            "method": cam_of(values["cam"]),
            "layer": none_if_auto(values["layer"]),
            "shallow_layer": none_if_auto(values["shallow_layer"]),
            "alpha": 0.5 if values["alpha"] == "auto" else values["alpha"],
            "rule": none_if_auto(values["rule"]) or "product",
            "rival": rival_of(values["rival"], names),
            "gamma": values["gamma"],
        }
        if how["rival"] in targets:
            raise ValueError(f"rival={values['rival']!r} is the target itself: name another class.")
        about = printable(cc.runs.about_network(info, cc.networks.pick_device(values["device"])))
        asked = Asked(model, info, about, targets, values["target"], how, values["colormap"])
        return with_layers(asked)
    except ConnectionError as error:
        raise SystemExit(
            f"run_all.sh: {error} Or leave out arch and weights: efficientnet_lite0 needs no "
            "download."
        ) from None
    except (ValueError, OSError) as error:
        refuse(one_line(error))


def load(values: Mapping[str, object]) -> tuple:
    """The network and what is known of it, see `networks.load`. Where a target function is given it
    may be one without classes, such as a segmentation.
    """
    import cam_core as cc

    weights = cc.runs.weights_of(values["arch"], values["weights"], dataset="", data=HOME)
    given = (values["arch"], weights, values["device"], cc.words(values["classes"]))
    try:
        return cc.networks.load(*given, head=values["head"], fit=values["fit"])
    except ValueError:
        if values["head"] != "auto" or not re.fullmatch(FUNCTION, values["target"]):
            raise
    return cc.networks.load(*given, head="none", fit=values["fit"])


def cam_of(name: str) -> str:
    """The name of a CAM, which a network's own file may have added."""
    import cam_core as cc

    known = ["hybrid", *cc.CAMS]
    if name not in known:
        raise ValueError(f"cam={name!r} is unknown. {nearest(name, known)}")
    return name


def none_if_auto(value):
    return None if value == "auto" else value


def targets_of(text: str, class_names: Sequence[str]) -> list:
    """What `target` names: a function of the output, class indices, or nothing."""
    import cam_core as cc

    if re.fullmatch(FUNCTION, text):
        return [cc.networks.from_file(text, "target")[0]]
    asked = cc.words(text.lower())
    for index, name in enumerate(class_names):  # one name may hold a comma
        if asked and cc.words(name.lower()) == asked:
            return [index]
    try:
        return list(dict.fromkeys(cc.asked_classes(text, class_names)))
    except ValueError as error:
        message = str(error).replace("targets:", "target:", 1)
        known = {name.lower() for name in class_names}
        unknown = [word for word in asked if word not in known and not word.isdecimal()]
        raise ValueError(f"{message}{classes_with(unknown, class_names)}") from None


def classes_with(words: Sequence[str], class_names: Sequence[str]) -> str:
    """For an error message: the classes whose names hold one of the words, as "tiger cat" holds
    "cat".
    """
    sought = set(words)
    held = [name for name in class_names if sought & set(re.split(r"\W+", name.lower()))]
    more = ", ..." if len(held) > MOST_NAMES else ""
    return f"; with it in the name: {', '.join(held[:MOST_NAMES])}{more}" if held else ""


def rival_of(text: str, class_names: Sequence[str]) -> int | str | None:
    """What `rival` names: "auto", a class index, or nothing."""
    if text in ("", "auto"):
        return text or None
    found = targets_of(text, class_names)
    if len(found) != 1 or callable(found[0]):
        raise ValueError(f"rival={text!r} must be one class, by name or number, or auto.")
    return found[0]


def with_layers(asked: Asked) -> Asked:
    """The same with its layers found, once for all photographs. Noise stands for a photograph, so
    whatever a network, a layer or a target function refuses is seen here.
    """
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    target = asked.targets[0] if asked.targets else None
    try:
        found = explained(asked, network_input(asked, Image.fromarray(noise)), target)
    except ValueError:
        raise
    except Exception as error:  # a target function may raise anything
        if not callable(target):
            raise
        raise ValueError(
            f"target={asked.words}: the function fails on this network's output "
            f"({type(error).__name__}: {error})."
        ) from None
    layers = {"layer": found.layer, "shallow_layer": found.shallow_layer or None}
    return replace(asked, how={**asked.how, **layers})


# ---- one photograph


def explained(asked: Asked, x, target):
    """`cam_core.explain` of a network's input, as it was asked for."""
    import cam_core as cc

    return cc.explain(asked.model, x, target, **asked.how)


def network_input(asked: Asked, image):
    """A photograph as the network takes it, (1, C, H, W), on its device."""
    import cam_core as cc

    x = cc.networks.preprocess(image, asked.info["preprocessing"])
    first = next(asked.model.parameters(), x)
    return x.to(first)


def likeliest(asked: Asked, image, found) -> list[dict]:
    """The likeliest classes, at most five, as {index, name, probability}; {index, name, value} for
    a network whose output is no probability. Empty where its output has no such form, which only a
    target function can read. found: an explanation of the photograph.
    """
    what, row = "probability", found.probabilities
    if row is None:
        what, row = "value", values_of(asked, image)
    names = asked.info["class_names"]
    order = (-row).argsort(kind="stable")[:MOST].tolist()
    return [{"index": k, "name": names[k], what: float(row[k])} for k in order]


def values_of(asked: Asked, image):
    """What a network without probabilities hands out for a photograph, (classes,)."""
    import numpy as np
    import torch

    import cam_core as cc

    with torch.no_grad():
        output = asked.model(network_input(asked, image))
    try:
        return cc.heads.logits_of(output, 1).float()[0].cpu().numpy()
    except ValueError:
        return np.zeros(0)


def explain_photograph(file: Path, asked: Asked) -> tuple[object, list[dict], list]:
    """(the photograph, its likeliest classes, an explanation of each target): what was asked for;
    else of several labels those that are likelier than not; else the predicted class.
    """
    import cam_core as cc

    image = cc.datasets.read_image(file)
    first, *others = asked.targets or [None]
    found = [explained(asked, image, first)]
    top = likeliest(asked, image, found[0])
    if not asked.targets and asked.info["head"].startswith("sigmoid"):
        others = [entry["index"] for entry in top[1:] if entry["probability"] > 0.5]
    found += [explained(asked, image, target) for target in others]
    return image, top, found


# ---- its files


def record_of(file: Path, asked: Asked, image, seen, top: Sequence[Mapping], found) -> dict:
    """What NAME.json says of a map."""
    info = asked.info
    how = info["preprocessing"]
    function = asked.words.rpartition(":")[2] if found.target is None else ""
    record = {
        "photograph": file.name,
        "photograph_sha256": sha256(file),
        "place": hashlib.sha256(bytes(file)).hexdigest()[:16],  # which file it was, not its path
        "photograph_size": list(image.size),
        "size": list(seen.size),  # of the part that the network sees, so of the pictures
        "target": found.target,
        "target_name": function or info["class_names"][found.target],
        "probability": found.probability,
        "score": found.score,
        "likeliest": list(top),
        "method": found.method,
        "layer": found.layer,
        "map": list(found.cam.shape),
        "empty": not found.cam.any(),
    }
    if found.method == "hybrid":
        used = {"shallow_layer": found.shallow_layer, "alpha": found.alpha}
        record |= used | {"rule": asked.how["rule"]}
    if found.rival is not None:
        record |= {"rival": info["class_names"][found.rival], "gamma": asked.how["gamma"]}
    return record | {
        "network": asked.about,
        "arch": info["arch"],
        "weights": info["weights"],
        "weights_sha256": info["sha256"],
        "head": info["head"],
        "head_source": info["head_source"],
        "preprocessing": vars(how),
        "colormap": asked.colormap,
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        "by": GENERATOR,
    }


def own_name(out: Path, file: Path, place: str) -> str:
    """A photograph's name, made safe, for the names of its files. Where another photograph has
    taken it, a checksum of the photograph's path follows.
    """
    from lab import datasets

    name = datasets.safe_name(printable(file.stem))
    own = f"-{zlib.crc32(bytes(file)):08x}"
    if len(name.encode()) > LONGEST:
        name = name.encode()[:LONGEST].decode(errors="ignore") + own
    for taken in out.glob("*.json"):
        if taken.stem.casefold().startswith(name.casefold()):
            record = read_record(taken) or {}
            same_name = record.get("name", "").casefold() == name.casefold()
            if same_name and record["place"] != place:
                return name + own
    return name


def ending_of(record: Mapping) -> str:
    """What is put behind a photograph's name for a class that was asked for, "_281-tabby"."""
    name = re.sub(r"\W+", "_", record["target_name"]).strip("_")[:30]
    return f"_{name}" if record["target"] is None else f"_{record['target']}-{name}"


def free_name(out: Path, name: str, record: Mapping) -> str:
    """The name of a map's files; "a_281-tabby" may also be the name of another photograph."""
    taken = read_record(out / f"{name}.json")
    if taken is None or taken["place"] == record["place"]:
        return name
    return f"{name}-{record['place']}"


def write_map(out: Path, name: str, image, cam, record: Mapping, colormap: str) -> None:
    """Write NAME.json, NAME.npy and the five pictures; each is there as a whole or not at all."""
    import numpy as np

    import cam_core as cc

    with tempfile.TemporaryDirectory(dir=out, prefix=".unfinished-") as folder:
        cc.figures.save_pictures(Path(folder), name, image, cam, colormap)
        np.save(Path(folder, f"{name}.npy"), cam.astype(np.float32))
        text = json.dumps(record, indent=1) + "\n"
        Path(folder, f"{name}.json").write_text(text, "utf-8")
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.suffix == ".json"):
            file.replace(out / file.name)


def check_folder(out: Path) -> None:
    """Refuse a results folder that holds what this command did not write (exit code 2)."""
    page = out / "index.html"
    try:
        ours = page.is_file() and GENERATOR in page.read_text("utf-8", "replace")[:2000]
        ours = ours or any(read_record(file) for file in out.glob("*.json"))
        if out.is_dir() and not ours and any(out.iterdir()):
            refuse(
                f"results_dir: {out} was not made by explain (it has no index.html of it), so "
                "nothing is written into it. Name a new folder."
            )
    except OSError as error:
        refuse(f"results_dir: {error}")
    if out.exists() and not out.is_dir():
        refuse(f"results_dir: {out} is a file. Name a folder.")


# ---- the page


def read_record(file: Path) -> dict | None:
    """What a NAME.json of ours holds; None for another file."""
    try:
        record = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("by") == GENERATOR else None


def sections(out: Path) -> list[dict]:
    """What the page shows: for each photograph and network the maps that lie in the folder, the
    latest first.
    """
    found: dict[tuple, dict] = {}
    for file in out.glob("*.json"):
        record = read_record(file)
        if record is None or not (out / f"{file.stem}_overlay.png").is_file():
            continue
        key = (record["place"], record["arch"], record["weights_sha256"])
        section = found.setdefault(key, {"maps": [], "made": ""})
        links = {kind: quote(f"{file.stem}_{kind}.png") for kind in KINDS}
        links |= {kind: quote(f"{file.stem}.{kind}") for kind in ("npy", "json")}
        section["maps"].append(record | {"links": links, "about": about_map(record)})
    for section in found.values():
        section["maps"].sort(key=lambda record: record["made"], reverse=True)
        latest = section["maps"][0]
        shared = ("photograph", "photograph_size", "size", "likeliest", "made", "network")
        section |= {name: latest[name] for name in shared}
        order = [entry["index"] for entry in latest["likeliest"]]
        section["maps"].sort(key=lambda record: rank(record["target"], order))
    return sorted(found.values(), key=lambda section: section["made"], reverse=True)


def rank(target: int | None, order: Sequence[int]) -> int:
    return order.index(target) if target in order else len(order)


@functools.cache  # compiling takes as long as an eighth of a forward pass
def template():
    """The page's template, with what does not change from page to page filled in."""
    import jinja2

    source = TEMPLATE.read_text("utf-8")
    style = re.search(r"<style>(.*?)</style>", source, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = "default-src 'none'; img-src 'self' file:; base-uri 'none'; form-action 'none'"
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    fixed = {"policy": f"{policy}; style-src 'sha256-{digest}'", "generator": GENERATOR}
    environment.globals |= {"shown": printable, "number": number} | fixed
    return environment.from_string(source)


def write_page(out: Path) -> None:
    """Write index.html, in one step."""
    page = template().render(sections=sections(out))
    unfinished = out / ".index.new"
    unfinished.write_text(page, "utf-8")
    unfinished.replace(out / "index.html")


# ---- in words


def printable(text: str) -> str:
    """A name without what would move the cursor or break an encoding."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))


def one_line(error: Exception) -> str:
    return printable(" ".join(str(error).split()))


def number(entry: Mapping) -> str:
    """A class's probability, or value, as it is printed."""
    if "probability" in entry and entry["probability"] is not None:
        return f"{100 * entry['probability']:.1f} %"
    return f"{entry.get('value', entry.get('score')):.4g}"


def about_map(record: Mapping) -> str:
    """How a map was made, in words."""
    text = f"{record['method']} at {record['layer']}"
    if record["method"] == "hybrid":
        text = f"Grad-CAM at {record['layer']} with LayerCAM at {record['shallow_layer']}"
        text += f", {record['rule']}, alpha {record['alpha']:g}"
    if "rival" in record:
        text += f", less {record['gamma']:g} of the score of {record['rival']}"
    return text


def tell(record: Mapping, out: Path, name: str) -> None:
    """Print what was explained and where it lies."""
    probability = record["probability"]
    p = "" if probability is None else f", probability {probability:.4f}"
    index = "" if record["target"] is None else f" (class {record['target']})"
    print(f"  explained: {printable(record['target_name'])}{index}{p}, score {record['score']:.4g}")
    if record["empty"]:
        print("    The map is zero everywhere: nothing at these layers speaks for it.")
    for ending in ("_overlay.png", ".npy"):
        print(f"    {out / name}{ending}", flush=True)


def tell_top(file: Path, image, top: Sequence[Mapping]) -> None:
    """Print a photograph's likeliest classes."""
    print(f"\n{printable(file.name)}, {image.width} x {image.height} pixels")
    for entry in top:
        print(f"  {number(entry):>9}  {printable(entry['name'])}", flush=True)


# ---- the whole command


def explain_all(files: Sequence[Path], asked: Asked, out: Path) -> list[str]:
    """Explain and write one photograph after the other; what could not be, and why."""
    from filelock import FileLock

    import cam_core as cc

    lock = FileLock(out / ".lock")  # another call may write into the same folder
    wrong = []
    for file in files:
        try:
            image, top, found = explain_photograph(file, asked)
        except Exception as error:  # one bad photograph never stops the others
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            name = "" if file.name in str(error) else f"{file}: "
            wrong.append(f"{name}{kind}{error}")
            print(f"\n{one_line(wrong[-1])}", file=sys.stderr, flush=True)
            continue
        tell_top(file, image, top)
        seen = cc.networks.framed(image, asked.info["preprocessing"])
        with lock:
            for one in found:
                record = record_of(file, asked, image, seen, top, one)
                record["name"] = own_name(out, file, record["place"])
                ending = ending_of(record) if asked.targets or len(found) > 1 else ""
                name = free_name(out, record["name"] + ending, record)
                write_map(out, name, seen, one.cam, record, asked.colormap)
                tell(record, out, name)
            write_page(out)
    return wrong


def main(words: Sequence[str] | None = None) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    warnings.formatwarning = lambda message, *_: f"Note: {one_line(message)}\n"
    # Threads that wait for work sleep. Measured on two cores that other programs used as well: 10 s
    # instead of 23 for one photograph.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    args = parse_arguments(words)
    values = settings_of(args)
    out = values["results_dir"]
    check_folder(out)
    try:
        files, wrong = photographs(args.photographs, out)
        for message in wrong:
            print(f"{one_line(message)}\n", file=sys.stderr, flush=True)
        if files:
            asked = ask(values)
            out.mkdir(parents=True, exist_ok=True)
            write_page(out)
            print(asked.about, flush=True)
            failed = explain_all(files, asked, out)
            wrong += failed
            if len(failed) < len(files):
                print(f"\nLook at {out / 'index.html'}", flush=True)
        elif not wrong:
            refuse(f"there is no photograph in {', '.join(args.photographs)}.")
    except BrokenPipeError:  # nobody reads on, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:  # a full disk, a folder without permission
        raise SystemExit(
            f"run_all.sh: stopped by {error}. What was written is complete. Make room or give "
            "permission, and run it again."
        ) from None
    except KeyboardInterrupt:
        print("Stopped; what was written is complete.", file=sys.stderr)
        raise SystemExit(130) from None
    if wrong:
        print(f"{len(wrong)} of what was named could not be explained:", file=sys.stderr)
        for message in wrong:
            print(f"  {one_line(message)}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
