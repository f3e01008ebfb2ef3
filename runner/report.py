"""Build report.html from what a run wrote: `python -m runner.report results/RUN`.

The runner does it at the end of a run. One page that asks nothing of any other host: pictures are
data URIs, formulas are MathML, style and script are those of report_template.html and named in its
Content-Security-Policy by their hashes. Every sentence and number is read from the run's files.
What the run did not write is left out and named at the end, with the way to get it. Timings stand
in the section "What it costs" and nowhere else: without it two equal runs give equal bytes.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup, escape
from PIL import Image

import cam_core as cc

HERE = Path(__file__).resolve().parent
WIDEST = 1600  # pixels of an embedded figure; the page stays under 5 MB
# What a page may load and do; style and script are allowed by their hashes.
NEVER = "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'"
# Rules of fusion, as the page calls them and as formulas; cam_core.FUSIONS has them as code.
NAMES = {"floored": "floored product", "mean": "weighted mean", "maximum": "weighted maximum"}
RULES = {
    "product": r"a^{\alpha}\, b^{1-\alpha}",
    "floored": r"(a + f)^{\alpha}\, (b + f)^{1-\alpha} - f",
    "mean": r"\alpha a + (1 - \alpha)\, b",
    "maximum": r"\max(\alpha a,\, (1 - \alpha)\, b)",
}
# What the endpoints of the main table measure.
METRICS = {
    "insertion": "Area under the predicted class's probability while pixels are put back, those "
    "with the highest attribution first.",
    "deletion": "The same while they are taken away.",
    "energy": "Share of the map's sum that lies inside the object's mask.",
    "average_precision": "How well the map ranks the object's pixels before all others.",
}
INTERVAL = "95 % BCa bootstrap interval"


# ---- reading a run


@dataclass(frozen=True)
class Run:
    """What a run wrote. Tables that it did not write are None, other files empty."""

    folder: Path
    manifest: Mapping  # manifest.json
    fusion: Mapping  # fusion.json, the choice of notebook 04
    slider: Mapping[str, np.ndarray]  # slider.npz, from notebook 05
    tables: Mapping[str, pd.DataFrame]  # of notebook 05, see `cam_core.read_tables`

    @property
    def parameters_of_05(self) -> Mapping:
        """The parameters of notebook 05; {} if it did not run."""
        for stem, entry in self.manifest.get("notebooks", {}).items():
            if stem.startswith("05"):
                return entry["parameters"]
        return {}

    @property
    def summary(self) -> pd.DataFrame | None:
        return self.tables.get("summary")

    @property
    def networks(self) -> list[str]:
        """The networks that were measured; the first one is what the page is about."""
        return [] if self.summary is None else list(self.summary.network.unique())

    @property
    def own(self) -> pd.DataFrame:
        """The rows of summary.csv of the first network."""
        return self.summary[self.summary.network == self.networks[0]]

    @property
    def head(self) -> list[dict]:
        """The endpoints, hybrid against Grad-CAM, as rows of `cam_core.compare`; [] without 05."""
        return [] if self.summary is None else self.own[self.own.primary].to_dict("records")

    @property
    def n(self) -> str:
        """How many images stand behind the endpoints: "n = 24"; "" without them."""
        return span([row["n"] for row in self.head]) if self.head else ""

    def table(self, name: str) -> pd.DataFrame | None:
        """tables/NAME.csv."""
        return read_table(self.folder, f"tables/{name}.csv")


def read_run(folder: Path, manifest: Mapping) -> Run:
    """The files of a run that the page is made from."""
    measured = (folder / "summary.csv").is_file()
    return Run(
        folder=folder,
        manifest=manifest,
        fusion=read_json(folder / "fusion.json"),
        slider=read_slider(folder),
        tables=cc.sentences.read_tables(folder) if measured else {},
    )


def read_table(folder: Path, name: str) -> pd.DataFrame | None:
    """A table of the run; None if the run wrote none, or an empty one."""
    if not (folder / name).is_file():
        return None
    frame = pd.read_csv(folder / name)
    return None if frame.empty else frame


def read_json(path: Path) -> dict:
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def read_text(path: Path) -> str:
    return path.read_text("utf-8") if path.is_file() else ""


def read_slider(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of slider.npz by name; {} if there are none."""
    path = folder / "slider.npz"
    if not path.is_file():
        return {}
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


# ---- pictures and formulas


def as_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def exact(pixels: np.ndarray) -> str:
    """uint8 pixels, (H, W) or (H, W, 3), as a data URI without loss."""
    file = io.BytesIO()
    Image.fromarray(pixels).convert("RGB").save(file, "WEBP", lossless=True, quality=80, method=4)
    return as_uri(file.getvalue(), "image/webp")


def picture(path: Path, alt: str, caption: str, widest: int = WIDEST) -> dict:
    """A picture file for the template: WebP of quality 85 on white, at most `widest` wide."""
    with Image.open(path) as opened:
        image = opened.convert("RGBA")
    paper = Image.new("RGBA", image.size, "white")
    paper.alpha_composite(image)
    if paper.width > widest:
        height = max(1, round(paper.height * widest / paper.width))
        paper = paper.resize((widest, height), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    paper.convert("RGB").save(file, "WEBP", quality=85, method=4)
    uri = as_uri(file.getvalue(), "image/webp")
    return dict(uri=uri, width=paper.width, height=paper.height, alt=alt, caption=caption)


def mathml(latex: str, block: bool = False) -> Markup:
    from latex2mathml.converter import convert

    return Markup(convert(latex, display="block" if block else "inline"))


# ---- tables: a cell is what is shown and what it is sorted by

Cell = tuple[str, str]


def word(text) -> Cell:
    return str(text), str(text).lower()


def number(value: float, form: str = ".4f") -> Cell:
    """A value as a cell; nothing where there is none."""
    return ("", "") if pd.isna(value) else (format(value, form), f"{value:.9g}")


def interval(row: Mapping) -> Cell:
    """A row's difference with its interval."""
    shown, sorted_by = number(row["difference"], "+.4f")
    if not shown:
        return "", ""
    if pd.isna(row["low"]):
        return f"{shown} (no interval)", sorted_by
    return f"{shown} [{row['low']:+.4f}, {row['high']:+.4f}]", sorted_by


def span(values: Sequence[int]) -> str:
    """n = 24, or n = 12 to 24 where rows rest on different numbers of images."""
    low = int(min(values))
    high = int(max(values))
    return f"n = {low}" if low == high else f"n = {low} to {high}"


def name_of(metric: str, baseline: str = "") -> str:
    name = metric.replace("_", " ")
    return f"{name} ({baseline})" if baseline else name


def arrow(metric: str) -> str:
    """The direction that is better."""
    return "↓" if metric in cc.statistics.LOWER_IS_BETTER else "↑"


def table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> dict:
    return dict(caption=caption, columns=list(columns), rows=list(rows))


def endpoints_table(head: Sequence[Mapping]) -> dict:
    """The endpoints, hybrid against Grad-CAM, as the two-minute reader wants them."""
    columns = ["endpoint", "Grad-CAM", "hybrid", "paired difference [95 % interval]", "p (Holm)"]
    columns += ["images won", "n", "verdict"]
    rows = []
    for row in head:
        name = name_of(row["metric"], row["baseline"])
        cells = [
            word(f"{name} {arrow(row['metric'])}"),
            number(row["reference_mean"]),
            number(row["mean"]),
            interval(row),
            number(row["p_holm"], ".2g"),
            number(row["won"], ".0%"),
            number(row["n"], "d"),
            word(cc.statistics.judgement(row, "p_holm")),
        ]
        rows.append(cells)
    caption = (
        "Hybrid against Grad-CAM. Difference: mean over images of hybrid minus Grad-CAM, BCa "
        "bootstrap interval; p: sign-flip permutation test, corrected for all rows together; "
        "↑ higher is better, ↓ lower is better."
    )
    return table(caption, columns, rows)


def methods_table(summary: pd.DataFrame, head: Sequence[Mapping]) -> dict:
    """Every method and control on the endpoints: mean, and difference to Grad-CAM."""
    columns = ["method"]
    for row in head:
        name = name_of(row["metric"])
        columns.append(f"{name} {arrow(row['metric'])}")
        columns.append(f"{name}: difference [95 % interval]")
    found = {}
    for row in summary.to_dict("records"):
        found[row["method"], row["metric"], row["baseline"]] = row
    order = list(cc.figures.STYLE)
    methods = sorted(
        summary.method.unique(), key=lambda m: order.index(m) if m in order else len(order)
    )
    rows = []
    ns = []
    for method in methods:
        cells = [word(cc.figures.label(method))]
        for kind in head:
            row = found.get((method, kind["metric"], kind["baseline"]))
            cells += [("", ""), ("", "")] if row is None else [number(row["mean"]), against(row)]
            ns += [] if row is None else [row["n"]]
        rows.append(cells)
    caption = (
        f"Every method and control, {span(ns)} images. Differences to Grad-CAM are paired by "
        "image; intervals are 95 % BCa bootstrap intervals. Only the rows of the table above are "
        "corrected for their number."
    )
    return table(caption, columns, rows)


def against(row: Mapping) -> Cell:
    """A method's difference to Grad-CAM; "identical" where each image's is zero."""
    if row["method"] == "grad_cam":
        return "", "0"
    return ("identical", "0") if row["identical"] else interval(row)


def plain_table(
    frame: pd.DataFrame, caption: str, form: str = ".3f", names: Mapping[str, str] | None = None
) -> dict:
    """A table of the run as it is, without its run id; method names as in the figures."""
    names = names or {}
    frame = frame.drop(columns="run", errors="ignore")
    rows = []
    for record in frame.to_dict("records"):
        cells = []
        for name, value in record.items():
            if isinstance(value, float):
                cells.append(number(value, ".2g" if name == "p" else form))
            elif isinstance(value, int):
                cells.append(number(value, "d"))
            else:
                cells.append(word(cc.figures.label(str(value))))
        rows.append(cells)
    return table(caption, [names.get(c, name_of(c)) for c in frame], rows)


def joined(frame: pd.DataFrame) -> pd.DataFrame:
    """difference, low and high in one column, as they are read."""
    texts = [interval(row)[0] for row in frame.to_dict("records")]
    frame = frame.assign(difference=texts).drop(columns=["low", "high"])
    return frame.rename(columns={"difference": "difference [95 % interval]"})


# ---- sentences


def marked(text: str) -> Markup | None:
    """The little Markdown that notebooks write into tables/*.md, lists, **strong** and *emphasis*,
    as safe HTML; None for an empty text.
    """
    blocks = []
    items = []
    for line in [*text.splitlines(), ""]:
        inner = str(escape(line.removeprefix("- ").strip()))
        inner = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", inner)
        inner = re.sub(r"(?<!\*)\*([^*\s][^*]*)\*(?!\*)", r"<em>\1</em>", inner)
        if line.startswith("- "):
            items.append(f"<li>{inner}</li>")
            continue
        if items:
            blocks.append(f"<ul>{''.join(items)}</ul>")
            items = []
        if inner:
            blocks.append(f"<p>{inner}</p>")
    return Markup("\n".join(blocks)) if blocks else None


# ---- the parts of the page: each returns what the template shows, None or empty where it lacks


def collect(run: Run) -> dict:
    """All that the template shows."""
    parts = dict(run=run.manifest.get("run", run.fusion.get("run", "unknown")))
    parts |= dict(fusion=run.fusion, METRICS=METRICS, NAMES=NAMES, manifest=bool(run.manifest))
    parts["settings"] = settings_of(run)
    parts |= numbers_part(run)
    parts |= conclusions_part(run)
    parts |= losses_part(run)
    parts |= figures_part(run)
    parts |= tables_part(run)
    parts["slider"] = slider_part(run)
    parts["provenance"] = provenance_part(run) if run.manifest else None
    parts["costs"] = costs_part(run)
    parts["cost"] = (run.folder / "cost.csv").is_file()
    parts |= files_part(run)
    parts["lacking"] = lacking(run, parts)
    return parts


def settings_of(run: Run) -> dict:
    """Layers, weight and rule of the hybrid that was measured, and why; {} if none was.

    slider.npz has them as they were used. Without it they are the choice of notebook 04, unless a
    parameter of 05 says otherwise.
    """
    names = ("alpha", "rule", "shallow_layer")
    given = {}
    for name in names:
        if run.parameters_of_05.get(name, "auto") != "auto":
            given[name] = run.parameters_of_05[name]
    reasons = [f"{name.replace('_', ' ')} given as a parameter" for name in given]
    if "reason" in run.fusion and len(given) < len(names):
        reasons.append(run.fusion["reason"])
    if run.slider:
        coarse, shallow, deep = (str(name) for name in run.slider["layers"][:3])
        alpha = float(run.slider["alpha"])
        rule = str(run.slider["rule"])
    elif {"coarse", "layer", *names} <= run.fusion.keys():
        chosen = {**run.fusion, **given}
        coarse = chosen["coarse"]
        shallow = chosen["shallow_layer"]
        deep = chosen["layer"]
        alpha = float(chosen["alpha"])
        rule = chosen["rule"]
    else:
        return {}
    used = dict(coarse=coarse, shallow=shallow, deep=deep, alpha=alpha, rule=rule)
    return used | {"reason": ", ".join(reasons)}


def numbers_part(run: Run) -> dict:
    """The main tables, and that of a second network."""
    parts = dict.fromkeys(["summary", "methods", "located", "endpoints", "second"])
    parts["n"] = run.n
    parts["network"] = run.networks[0] if run.networks else ""
    if not run.head:
        return parts
    parts["endpoints"] = run.head
    parts["summary"] = endpoints_table(run.head)
    parts["methods"] = methods_table(run.own, run.head)
    parts["located"] = "energy" in set(run.own.metric)
    parts["second"] = []
    for name in run.networks[1:]:
        rows = run.summary[(run.summary.network == name) & run.summary.primary]
        parts["second"].append(endpoints_table(rows.to_dict("records")) | {"name": name})
    return parts


def conclusions_part(run: Run) -> dict:
    """What the numbers allow to say: the answer, and all of it."""
    shortcut = marked(read_text(run.folder / "tables/05_shortcut.md"))
    parts = dict(answer=None, kind="", conclusions=None, shortcut=shortcut)
    if not run.head:
        return parts
    used = settings_of(run)
    tables = dict(run.tables)
    if used:  # what was measured, which can be another than the choice in fusion.json
        tables["layers"] = {place: used[place] for place in ("deep", "coarse", "shallow")}
    given = run.parameters_of_05
    if given.get("fine_steps"):
        tables["steps"] = (given["steps"], given["fine_steps"])
    found = cc.sentences.conclusions(**tables)
    text = found.markdown(is_confirmatory(run))
    parts["answer"] = (found.headline, found.fusion)
    parts["kind"] = text.splitlines()[0].strip("*")
    parts["conclusions"] = marked(text)
    return parts


def is_confirmatory(run: Run) -> bool:
    """Whether the endpoints were fixed before this data was measured; not if it is not known."""
    given = run.parameters_of_05
    return bool(given) and cc.is_confirmatory(SimpleNamespace(settings=SimpleNamespace(**given)))


def losses_part(run: Run, count: int = 4) -> dict:
    """The images on which the hybrid loses most against Grad-CAM in insertion minus deletion.

    `lost` is None where it was not measured, and [] where the hybrid loses on no image.
    """
    baseline = next((row["baseline"] for row in run.head if row["baseline"]), "")
    parts = dict(lost=None, baseline=baseline)
    metrics = run.tables.get("metrics")
    if metrics is None or not run.head:
        return parts
    mine = metrics[metrics.network == run.networks[0]]
    mine = mine[(mine.baseline == baseline) & mine.metric.isin(["insertion", "deletion"])]
    mine = mine[mine.method.isin(["hybrid", "grad_cam"])]
    wide = mine.pivot(index="image", columns=["method", "metric"], values="value").dropna()
    gain = wide["hybrid", "insertion"] - wide["grad_cam", "insertion"]
    gain -= wide["hybrid", "deletion"] - wide["grad_cam", "deletion"]
    worst = gain[gain < -cc.statistics.ROUNDING].sort_values(kind="stable").head(count)
    parts["lost"] = []
    for image, value in worst.items():
        parts["lost"].append(loss(run.folder, image, value, wide.loc[image]))
    return parts


def loss(folder: Path, image: str, value: float, row: pd.Series) -> dict:
    """One image on which the hybrid loses, with its pictures."""
    stem = f"05_{cc.datasets.safe_name(image)}"
    pictures = []
    for kind, what in (("original", "the image"), ("overlay", "the hybrid laid over it")):
        path = folder / "images" / f"{stem}_{kind}.png"
        if path.is_file():
            pictures.append(picture(path, f"{image}: {what}", what, 448))
    text = (
        f"insertion {row['hybrid', 'insertion']:.4f}, Grad-CAM {row['grad_cam', 'insertion']:.4f}; "
        f"deletion {row['hybrid', 'deletion']:.4f}, Grad-CAM {row['grad_cam', 'deletion']:.4f}"
    )
    shown = f"{value:+.4f}" if abs(value) >= 5e-5 else f"{value:+.0e}"
    return dict(image=image, value=shown, text=text, pictures=pictures)


# {part of the page: [(figure, what it shows to those who cannot see it, caption)]}
FIGURES = {
    "forest": [
        (
            "05_differences",
            "Forest plot: each method's paired difference to Grad-CAM, one panel per metric",
            "Mean paired difference to Grad-CAM with its {interval}; right of the line is better "
            "in every panel (where lower is better it is mirrored). {n}; further baselines may "
            "have fewer, as their titles say.",
        )
    ],
    "controls": [
        (
            "05_controls",
            "The hybrid's paired difference to each control of its resolution",
            "Hybrid minus control, {interval}, {n}: right of the line the hybrid is better. p "
            "uncorrected.",
        )
    ],
    "grid": [
        (
            "05_glance",
            "Three images with Grad-CAM, shallow LayerCAM, the hybrid's Grad-CAM and the hybrid",
            "Single images (no interval), the first measured ones.{contour}",
        ),
        (
            "05_methods",
            "Every method's and control's map laid over the first two measured images",
            "Two single images (n = 2, so no interval), every map scaled to its own maximum."
            "{contour}",
        ),
    ],
    "curves": [
        (
            "05_curves",
            "Insertion and deletion curves of the main methods",
            "Mean curves over the images that each title counts ({n} for the first baseline); "
            "bands are 95 % bootstrap intervals of the mean.",
        )
    ],
    "when": [
        (
            "05_by_area",
            "The hybrid's paired difference to Grad-CAM by area",
            "By area of the object, {interval}; n of each group stands below its dot. Exploratory.",
        ),
        (
            "05_by_complexity",
            "The hybrid's paired difference to Grad-CAM by complexity",
            "By complexity of the image, {interval}; n of each group stands below its dot. "
            "Exploratory.",
        ),
    ],
    "lost_figure": [
        (
            "05_failures",
            "The images with the hybrid's largest losses, three methods",
            "Single images (no interval), the worst of {n}; in the title hybrid minus Grad-CAM in "
            "insertion − deletion.{contour}",
        )
    ],
    "sanity": [
        (
            "05_randomisation",
            "Similarity of the maps with the original ones while weights are randomised",
            "Rank correlation and structural similarity with the original map, mean of {classes} "
            "images (no interval); randomised from the classifier down.",
        )
    ],
    "pairs_figure": [
        (
            "05_pairs",
            "Share of the energy that lies on the lesion asked for, for every method",
            "Mean of {pairs} images with two lesions; intervals are in the table.",
        )
    ],
    "shortcut_figures": [
        (
            "05_shortcut",
            "Energy on the marker for the honest and the cheating network",
            "Left means, right cheating minus honest with its {interval}, {shortcut} images.",
        ),
        (
            "05_shortcut_maps",
            "Maps of the honest and the cheating network on three images",
            "Three single images (n = 3, no interval); the white contour is the marker.",
        ),
        (
            "01_shortcut",
            "Images with the side marker that the second network was taught to read",
            "What the second network was taught on: single images, no interval.",
        ),
    ],
}


def counts(run: Run) -> dict[str, str]:
    """What captions say of the number of images, {which images: "n = 24 images"}."""
    found = {"n": f"{run.n} images" if run.n else "n as given"}
    for name, stem in (
        ("classes", "05_class_sensitivity"),
        ("pairs", "05_pairs"),
        ("shortcut", "05_shortcut"),
    ):
        frame = run.table(stem)
        found[name] = "n as given" if frame is None else f"n = {int(frame.n.max())}"
    return found


def figures_part(run: Run) -> dict[str, list[dict]]:
    """The run's figures with their captions; those that it did not draw are left out."""
    located = run.summary is not None and "energy" in set(run.own.metric)
    contour = " White contours are the true masks." if located else ""
    values = counts(run) | {"interval": INTERVAL, "contour": contour}
    parts = {}
    for part, plan in FIGURES.items():
        parts[part] = []
        for stem, alt, caption in plan:
            path = run.folder / "figures" / f"{stem}.png"
            if path.is_file():
                parts[part].append(picture(path, alt, caption.format(**values)))
    return parts


def tables_part(run: Run) -> dict:
    """The tables beside the figures."""
    n = counts(run)
    classes = table_of(
        run.table("05_class_sensitivity"),
        "class_spearman",
        "Rank correlation of the maps for the most and the least likely class, "
        f"{n['classes']} images (1: the class does not matter), and paired difference to Grad-CAM "
        f"with its {INTERVAL}.",
    )
    pairs = table_of(
        run.table("05_pairs"),
        "discrimination",
        f"{n['pairs']} images with two lesions: share of the energy on the one asked for (0.5: the "
        f"map does not follow), and paired difference to Grad-CAM with its {INTERVAL}.",
    )
    shortcut = table_of(
        run.table("05_shortcut"),
        "energy",
        f"Share of each map's energy on the marker, {n['shortcut']} images; difference with its "
        f"{INTERVAL}.",
    )
    means = run.table("05_means")
    if means is not None:
        means = plain_table(
            means,
            f"All metrics as means, {n['n']}; further baselines and RISE, where measured, on at "
            "most n_extra images. Intervals: summary.csv.",
        )
    return dict(classes=classes, pairs=pairs, shortcut_table=shortcut, means=means)


def table_of(frame: pd.DataFrame | None, metric: str, caption: str) -> dict | None:
    """The rows of one metric of a table as it is shown."""
    if frame is None:
        return None
    rows = frame[frame.metric == metric].drop(columns=["metric", "effect"], errors="ignore")
    return plain_table(joined(rows), caption)


def slider_part(run: Run) -> dict | None:
    """What the page computes fusions from: images, 8-bit factors and masks as data URIs, and the
    table of colours.
    """
    images = [
        image for index in range(len(run.slider.get("ids", []))) for image in one_image(run, index)
    ]
    if not images:
        return None
    rule = str(run.slider["rule"])
    known = rule in RULES
    rules = list(dict.fromkeys(["product", rule if known else "product"]))
    colormap = run.parameters_of_05.get("colormap", "inferno")
    colours = cc.figures.colours(np.linspace(0, 1, 256)[None], colormap=colormap)
    content = dict(
        images=images,
        hybrids=hybrids_of(run.slider, rule if known else "product"),
        rules=rules,
        floor=cc.FLOOR,
        colours=colours[0].tobytes().hex(),
    )
    unknown = "" if known else f"The run fused by {rule}, a rule of its own that is not shown here."
    formulas = {name: mathml(RULES[name]) for name in rules}
    return dict(
        content=content, formulas=formulas, floor=cc.FLOOR, unknown=unknown, count=len(images)
    )


def one_image(run: Run, index: int) -> list[dict]:
    """An image of the slider with its maps and mask; [] if its picture is not there."""
    stored = run.slider
    image = str(stored["ids"][index])
    path = run.folder / "images" / f"05_{cc.datasets.safe_name(image)}_original.png"
    if not path.is_file():
        return []
    height, width = stored["maps"].shape[-2:]
    with Image.open(path) as opened:
        aspect = opened.width / opened.height
        pixels = np.asarray(opened.convert("RGB").resize((width, height)))
    mask = stored["masks"][index]
    entry = dict(
        id=image,
        seen=f"{stored['predicted'][index]}, p = {stored['probability'][index]:.2f}",
        aspect=round(aspect, 6),
        image=exact(pixels),
        mask=exact(mask.astype(np.uint8) * 255) if mask.any() else "",
        maps=[exact(each) for each in stored["maps"][index]],
    )
    return [entry]


def hybrids_of(stored: Mapping[str, np.ndarray], rule: str) -> list[dict]:
    """The two hybrids of the slider: which stored maps they fuse, and how at the beginning."""
    coarse, shallow, deep, fine = (str(layer) for layer in stored["layers"])
    across = dict(
        name=f"hybrid, {coarse} with {shallow}",
        maps=[0, 1],
        titles=[f"Grad-CAM at {coarse}", f"LayerCAM at {shallow}"],
        alpha=float(stored["alpha"]),
        rule=rule,
    )
    same = dict(
        name=f"same-layer hybrid, both at {deep}",
        maps=[2, 3],
        titles=[f"Grad-CAM at {deep}", f"LayerCAM at {fine}"],
        alpha=cc.PRIOR_ALPHA,
        rule="product",
    )
    return [across, same]


def costs_part(run: Run) -> list[dict]:
    """Tables of timings: all that may differ between two equal runs."""
    tables = []
    cost = read_table(run.folder, "cost.csv")
    if cost is not None:
        where = f"{cost.device.iloc[0]}, batches of {cost.batch.iloc[0]}"
        caption = (
            "Per image, forward pass included, and in units of a bare forward pass "
            f"({where}): medians of three interleaved rounds (no interval)."
        )
        names = {"seconds": "seconds per image", "ratio": "in forward passes"}
        tables.append(plain_table(cost.drop(columns=["device", "batch"]), caption, ".4f", names))
    steps = read_table(run.folder, "cost_02.csv")
    if steps is not None:
        caption = (
            "The techniques of notebook 02, at another time of the run, on the number of images "
            "given."
        )
        tables.append(plain_table(steps, caption, ".4f"))
    spent = []
    for stem, entry in run.manifest.get("notebooks", {}).items():
        spent.append([word(stem), number(entry["seconds"], ".1f")])
    if spent:
        tables.append(table("Wall-clock time of each notebook.", ["notebook", "seconds"], spent))
    return tables


def provenance_part(run: Run) -> dict:
    """What the results were made from and with: a list of facts, and tables below it."""
    manifest = run.manifest
    notebooks = manifest.get("notebooks", {})
    facts = [("run", manifest["run"])]
    runs = {stem[:2]: entry["run"] for stem, entry in notebooks.items()}
    if len(set(runs.values())) > 1:
        made = ", ".join(f"{number}: {each}" for number, each in runs.items())
        facts.append(("made in several runs", made))
    facts.append(("commit", commit_of(manifest)))
    for key, name in (
        ("network", "arch"),
        ("checkpoint, sha256", "weights_sha256"),
        ("device", "device"),
    ):
        if run.fusion.get(name):
            facts.append((key, run.fusion[name]))
    threads = {entry["parameters"].get("threads", 0) for entry in notebooks.values()}
    if threads:
        words = ["all that it may use" if count == 0 else str(count) for count in sorted(threads)]
        facts.append(("threads", ", ".join(words)))
    facts += [
        (key, str(manifest[key])) for key in ("cpus", "python", "platform") if key in manifest
    ]
    packages = [[word(name), word(v)] for name, v in sorted(manifest.get("packages", {}).items())]
    tables = [
        table(
            "Parameters, as the notebooks got them.",
            ["parameter", "value"],
            parameter_rows(notebooks),
        ),
        table("Packages.", ["package", "version"], packages),
    ]
    return dict(facts=facts, tables=[each for each in tables if each["rows"]])


def commit_of(manifest: Mapping) -> str:
    """The commit that a run was made from, in words."""
    if not manifest.get("commit"):
        return "not in a git repository"
    if manifest["dirty"]:
        return f"{manifest['commit']}, with changes that were not committed"
    return f"{manifest['commit']}, without uncommitted changes"


def parameter_rows(notebooks: Mapping[str, Mapping]) -> list[list[Cell]]:
    """A row for each parameter; where notebooks got different values, each with its notebooks."""
    values = {}
    for stem, entry in notebooks.items():
        for name, value in entry["parameters"].items():
            text = json.dumps(value, ensure_ascii=False)
            values.setdefault(name, {}).setdefault(text, []).append(stem[:2])
    rows = []
    for name, found in sorted(values.items()):
        texts = list(found)
        if len(found) > 1:
            texts = [f"{text} in {', '.join(where)}" for text, where in found.items()]
        rows.append([word(name), word("; ".join(texts))])
    return rows


def files_part(run: Run) -> dict:
    """Notebooks and files that the page links to."""
    notebooks = []
    for path in sorted((run.folder / "notebooks").glob("*.ipynb")):
        notebooks.append((path.stem, path.with_suffix(".html").is_file()))
    files = []
    for name in ("summary.csv", "metrics.csv", "metrics.csv.gz", "fusion.json", "cost.csv"):
        if (run.folder / name).is_file():
            files.append(name)
    if run.manifest:  # written after the report
        files.append("manifest.json")
    for name in ("tables", "figures", "images", "maps"):
        if (run.folder / name).is_dir():
            files.append(f"{name}/")
    return dict(notebooks=notebooks, files=files)


# What may be missing, and how to get it; the keys are those of `collect`.
ONLY_05 = "Run notebook 05: ./run_all.sh --only 05 with the options of this run."
MISSING = {
    "summary": (
        "All measurements: main table, forest plot, curves, failures",
        f"{ONLY_05} It needs the choice of notebook 04, or alpha and shallow_layer as parameters.",
    ),
    "located": (
        "Localisation: energy, average precision and the contours of masks",
        "No place of an object is known. Put masks (white on black) into masks/ in the images' "
        "folder, or boxes into boxes.csv.",
    ),
    "settings": (
        "The choice of layers, rule and weight",
        "Run notebook 04: ./run_all.sh --from 04.",
    ),
    "slider": ("The slider: slider.npz and the pictures in images/", ONLY_05),
    "pairs": (
        "Images with two lesions, each asked for",
        "Only the synthetic data has them: dataset = synthetic.",
    ),
    "shortcut": ("The network that cheats", "./run_all.sh -f params/shortcut.yaml."),
    "second": ("A second network", "Add -p also squeezenet1_1, or another of torchvision's."),
    "cost": ("Timings of the methods: cost.csv", ONLY_05),
    "manifest": (
        "Where the results come from: manifest.json",
        "The runner writes it: ./run_all.sh.",
    ),
}
USUAL = ("forest", "controls", "grid", "curves", "lost_figure", "sanity")  # parts with figures


def lacking(run: Run, parts: Mapping) -> list[tuple[str, str]]:
    """What this report does not show, and how to get it."""
    found = [about for key, about in MISSING.items() if not parts[key]]
    for part in USUAL:
        stem = FIGURES[part][-1][0]
        if not (run.folder / "figures" / f"{stem}.png").is_file():
            found.append((f"figures/{stem}.png", "Notebook 05 draws it: ./run_all.sh --only 05."))
    return found


# ---- pages


def template() -> tuple[jinja2.Template, dict[str, str]]:
    """The template, and what allows its own style and script in the Content-Security-Policy."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    name = "report_template.html"
    source = (HERE / name).read_text("utf-8")
    allowed = {}
    for kind in ("style", "script"):
        inner = re.search(rf"<{kind}>(.*?)</{kind}>", source, re.S)[1]
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        allowed[kind] = f"{kind}-src 'sha256-{digest}'"
    return environment.get_template(name), allowed


def build(folder: Path, manifest: Mapping | None = None, timings: bool = True) -> str:
    """The report of a run as HTML.

    manifest: that of manifest.json, if it is not written yet. timings=False leaves the section of
    timings out, and with it all that may differ between two equal runs.
    """
    folder = Path(folder)
    if manifest is None:
        manifest = read_json(folder / "manifest.json")
    parts = collect(read_run(folder, manifest))
    formula = ""
    if parts["settings"].get("rule") in RULES:
        fused = RULES[parts["settings"]["rule"]]
        formula = mathml(r"H = \frac{F}{\max F}, \qquad F = " + fused, block=True)
    page, allowed = template()
    policy = f"{NEVER}; {allowed['style']}; {allowed['script']}"
    return page.render(
        parts, policy=policy, timings=timings, notebook=None, formula=formula, math=mathml
    )


def harmless(markup: str) -> str:
    """HTML with the tags of prose and tables alone; what else names of classes and files hold is
    shown as it reads.
    """
    import bleach

    tags = "div pre span table thead tbody tr th td caption p br hr h1 h2 h3 h4 h5 h6".split()
    kept = {"*": ["class", "id", "colspan", "rowspan"], "a": ["href"]}
    plain = re.sub(r"<style.*?</style>", "", str(markup), flags=re.S)
    return bleach.clean(plain, {*bleach.ALLOWED_TAGS, *tags}, kept)


# What a notebook's output may be in its page; a widget or a script needs a kernel or other hosts.
SHOWN = {"text/html", "text/markdown", "text/latex", "text/plain", "image/png", "image/jpeg"}


def notebook_page(path: Path, run: str) -> str:
    """An executed notebook as a page without its code, scripts and requests.

    Markup in Markdown, which may hold names of classes, is shown as it reads; formulas become
    MathML.
    """
    import nbformat
    from nbconvert import HTMLExporter

    book = nbformat.read(path, 4)
    book.metadata.pop("widgets", None)
    kept = []
    heading = ""
    for cell in book.cells:
        if cell.cell_type == "markdown":
            heading = (re.findall(r"^#+ (.+)$", cell.source, re.M) or [heading])[-1]
            kept.append(cell)
        elif cell.get("outputs"):
            cell.outputs = outputs_of(cell, heading)
            kept += [cell] if cell.outputs else []
    book.cells = kept
    exporter = HTMLExporter(template_name="basic", exclude_input=True, exclude_output_prompt=True)
    exporter.register_filter("markdown2html", markdown_renderer())
    html, _ = exporter.from_notebook_node(book)
    page, allowed = template()
    policy = f"{NEVER}; {allowed['style']}"
    return page.render(notebook=Markup(html), stem=Path(path).stem, run=run, policy=policy)


def outputs_of(cell, heading: str) -> list:
    """The outputs of a code cell that a page can show, made harmless; pictures get words."""
    stems = iter(re.findall(r'save_figure\(.*?"(\d\d_\w+)"', cell.source, re.S))
    shown = []
    for output in cell.outputs:
        data = output.get("data", {})
        if set(data) - SHOWN:
            continue
        if "text/html" in data:
            data["text/html"] = harmless(data["text/html"])
        if "image/png" in data:
            output.metadata["image/png"] = {"alt": f"{heading}: {next(stems, 'figure')}"}
        shown.append(output)
    return shown


def markdown_renderer() -> Callable[[str], str]:
    """Markdown to HTML: markup and javascript: addresses are escaped, formulas become MathML."""
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    class Renderer(IPythonRenderer):
        def block_math(self, body):
            return mathml(body, block=True)

        def inline_math(self, body):
            return mathml(body)

        def image(self, text, url, title=None):
            return escape(text)

    renderer = Renderer(escape=True, allow_harmful_protocols=False, exclude_anchor_links=True)
    return MarkdownWithMath(renderer).render


# ---- writing


def write(folder: Path, manifest: Mapping | None = None) -> Path:
    """Write folder/report.html; see `build`."""
    path = Path(folder) / "report.html"
    path.write_text(build(folder, manifest), "utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser("python -m runner.report", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="RUN", help="a run, such as results/default")
    folder = parser.parse_args().folder
    files = ("manifest.json", "summary.csv", "fusion.json")
    if not any((folder / name).is_file() for name in files):
        raise SystemExit(f"{folder} holds no run (none of {', '.join(files)}).")
    path = write(folder)
    manifest = read_json(folder / "manifest.json")
    if "files" in manifest:  # the page is one of the files that the manifest lists
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        entry = {"notebook": "runner.report", "bytes": len(data), "sha256": digest}
        manifest["files"]["report.html"] = entry
        text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
        (folder / "manifest.json").write_text(text, "utf-8")
    print(path)


if __name__ == "__main__":
    main()
