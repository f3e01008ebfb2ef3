"""What parameters there are and what each may be: read from the notebooks' cells, checked before the first one runs.

A value is parsed by the type that the notebook declares. A name that no notebook declares, or a value that does not
parse or is not allowed, ends the run with exit code 2, the nearest name and what is allowed."""
import ast
import difflib
import json
import re
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent

TYPES = {  # what a value of a type is called, what it looks like, and how it is read; all the rest is text
    "None": ("none", r"none|null", lambda word: None),
    "bool": ("true or false", r"true|false", lambda word: word == "true"),
    "int": ("a whole number", r"[+-]?\d+", int),
    "float": ("a number", r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", float)}
CHOICES = {"precision": "float32 bf16", "method": "main all", "rule": "auto product floored mean maximum"}
LEAST = {0: "n_images n_extra fine_steps rise_masks threads seed",
         1: "steps batch_size epochs", 5: "n_train n_val n_test"}
BASELINES, DATASETS = {"twin", "rise", "zero", "black"}, ("synthetic", "cifar10", "samples")
OWN_NETWORK, WEIGHTS = r"(.+\.py):\w+", r"auto|imagenet|IMAGENET1K_\w+"
WEIGHT_FILES = (".pth", ".pt", ".safetensors")


def is_colormap(name):
    import matplotlib  # only where another one than the default is asked for
    return name in matplotlib.colormaps


ALLOWED = {  # what is allowed beyond the type: in words, and as a test of the value
    "alpha": ("auto, or a number from 0 to 1", lambda v: v == "auto" or not isinstance(v, str) and 0 <= v <= 1),
    "device": ("auto, cpu, cuda, cuda:N or mps", lambda v: re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", v)),
    **{name: (ok.replace(" ", " or "), lambda v, ok=ok: v in ok.split()) for name, ok in CHOICES.items()},
    "baseline": (f"one or more of {','.join(sorted(BASELINES))}", lambda v: set(v.split(",")) <= BASELINES),
    "dataset": (f"{', '.join(DATASETS)}, or an existing folder", lambda v: v in DATASETS or Path(v).is_dir()),
    "weights": ("auto, imagenet, torchvision's IMAGENET1K_V1 and such, or an existing .pth, .pt or .safetensors file",
                lambda v: re.fullmatch(WEIGHTS, v) or Path(v).suffix in WEIGHT_FILES and Path(v).is_file()),
    "arch": ("auto, the name of a torchvision classifier, or FILE.py:name of a network of your own",
             lambda v: re.fullmatch(r"\w+", v) or (own := re.fullmatch(OWN_NETWORK, v)) and Path(own[1]).is_file()),
    "scheduler": ("nothing, or the address of a Dask scheduler, such as tcp://host:8786",
                  lambda v: re.fullmatch(r"((tcp|tls)://[^\s/]+:\d+)?", v)),
    "also": ("nothing, or the name of a torchvision classifier", lambda v: re.fullmatch(r"\w*", v)),
    "colormap": ("one of matplotlib's, such as inferno, viridis or jet", lambda v: v == "inferno" or is_colormap(v)),
    **{name: (f"a whole number, {low} or more", lambda v, low=low: v >= low)
       for low, names in LEAST.items() for name in names.split()}}


def refuse(message):
    print(f"run_all.sh: {message}", file=sys.stderr)
    raise SystemExit(2)


def read_cells(path):
    return [cell | {"source": "".join(cell["source"])} for cell in json.loads(path.read_text("utf-8"))["cells"]]


def declared(path):
    """The parameters a notebook declares, {name: (types, default)}; papermill's own inspector drops unions."""
    try:
        sources = [cell["source"] for cell in read_cells(path) if "parameters" in cell["metadata"].get("tags", [])]
        if len(sources) != 1:
            raise ValueError(f"{len(sources)} cells are tagged 'parameters', there must be exactly one")
        found = {}
        for line in ast.parse(sources[0]).body:
            types = [part.strip() for part in ast.unparse(getattr(line, "annotation", line)).split("|")]
            if not isinstance(line, ast.AnnAssign) or line.value is None or not set(types) <= {*TYPES, "str"}:
                raise ValueError(f"not a parameter of the form `name: type = literal`: {ast.unparse(line)}")
            found[line.target.id] = (types, ast.literal_eval(line.value))
        return found
    except (ValueError, KeyError, SyntaxError) as error:
        refuse(f"{path.name}: {error}")


def located(value):
    """An existing path made absolute, looked for where the user stands and then in the repository."""
    paths = [base / Path(value).expanduser() for base in (Path.cwd(), ROOT)]
    return next((str(path.resolve()) for path in paths if path.exists()), value)


def parse(name, types, value, source):
    """A word of the command line or a scalar of a YAML file as the type declared; ends the run if it is not allowed."""
    words, test = ALLOWED.get(name, (" or ".join(TYPES.get(kind, ["text"])[0] for kind in types), lambda v: True))
    word = value.strip().lower() if isinstance(value, str) else json.dumps(value, default=str)
    readings = [read(word) for kind, (_, look, read) in TYPES.items() if kind in types and re.fullmatch(look, word)]
    if "str" in types and isinstance(value, str):
        own = re.fullmatch(OWN_NETWORK, value) if name == "arch" else None
        known = name not in ("dataset", "weights") or value in DATASETS or re.fullmatch(WEIGHTS, value)
        readings.append(located(own[1]) + value[len(own[1]):] if own else value if known else located(value))
    if not readings or not test(readings[0]):
        refuse(f"{source}: {name} cannot be {value!r}. Allowed: {words}.")
    return readings[0]


def read_given(args):
    """The parameters the user gave and results_dir, {name: (value, source)}; the command line wins over the file."""
    try:
        content = yaml.safe_load(Path(located(args.f)).read_text("utf-8")) if args.f else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        refuse(f"-f {args.f}: {error}")
    if not isinstance(content, dict):
        refuse(f"-f {args.f}: a parameter file holds lines of the form `name: value`.")
    from_file = {str(name): (value, f"-f {args.f}") for name, value in content.items()}
    return {"results_dir": ("results/default", "default")} | from_file | {name: (value, "-p") for name, value in args.p}


def settle(given, specs, chosen):
    """The parameters of every notebook, {notebook: {name: value}}; ends the run if one is unknown or not allowed."""
    names = sorted({name for spec in specs.values() for name in spec} - {"root"} | {"results_dir"})
    for name, (_, source) in given.items():
        if name not in names:
            near = "".join(difflib.get_close_matches(name, names, 1, 0))
            refuse(f"{source}: there is no parameter {name!r}. Nearest: {near}. All: {', '.join(names)}.")
        if source == "-p" and name != "results_dir" and not any(name in specs[stem] for stem in chosen):
            refuse(f"-p: {name} would have no effect, none of these declares it: {', '.join(chosen)}.")
    return {stem: {name: parse(name, types, *given[name]) if name in given else default
                   for name, (types, default) in spec.items() if name not in ("root", "results_dir")}
            for stem, spec in specs.items()}
