"""Build report.html from what a run wrote: `python report.py results/RUN`. pipeline.py does it at the end of a run.

One page that asks nothing of any other host: pictures are data URIs, formulas are MathML, style and script are those of
report_template.html and named in its Content-Security-Policy by their hashes. Every sentence and number is read from
the run's files, and what the run did not write is left out and named at the end, with the way to get it. Timings stand
in the section "What it costs" and nowhere else: without it two equal runs give equal bytes."""

import argparse
import base64
import hashlib
import io
import json
import re
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup, escape
from PIL import Image

HERE = Path(__file__).resolve().parent
WIDEST = 1600  # pixels of an embedded figure; the page stays under 5 MB
NEVER = "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'"  # the rest is allowed by name
NAMES = {"floored": "floored product", "mean": "weighted mean", "maximum": "weighted maximum"}  # of rules
RULES = {  # the fusion rules that the page can compute, as formulas; cam_core.FUSIONS has them as code
    "product": r"a^{\alpha}\, b^{1-\alpha}",
    "floored": r"(a + f)^{\alpha}\, (b + f)^{1-\alpha} - f",
    "mean": r"\alpha a + (1 - \alpha)\, b",
    "maximum": r"\max(\alpha a,\, (1 - \alpha)\, b)",
}
METRICS = {  # what the endpoints of the main table measure
    "insertion": "Area under the predicted class's probability while pixels are put back, those with the highest "
    "attribution first.",
    "deletion": "The same while they are taken away.",
    "energy": "Share of the map's sum that lies inside the object's mask.",
    "average_precision": "How well the map ranks the object's pixels before all others.",
}


# ---- reading a run


def read_table(folder, name):
    """A table of the run, NAME or NAME.gz, as a data frame; None if the run wrote none, or an empty one."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    frame = pd.read_csv(path) if path else pd.DataFrame()
    if frame.empty:
        return None
    return frame.assign(baseline=frame["baseline"].fillna("")) if "baseline" in frame else frame


def read_json(path):
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def read_factors(folder):
    """The arrays of slider.npz (notebook 05 writes it) as {name: array}; {} if there are none."""
    if not (folder / "slider.npz").is_file():
        return {}
    with np.load(folder / "slider.npz", allow_pickle=False) as file:
        return dict(file)


def settings_of(fusion, factors, given):
    """Layers, weight and rule of the hybrid that was measured, {} if none was; given: the parameters of notebook 05.

    slider.npz has them as they were used. Without it, they are the choice of notebook 04, unless a parameter says
    otherwise.
    """
    own = {name: given[name] for name in ("alpha", "rule", "shallow_layer") if given.get(name, "auto") != "auto"}
    if len(factors):
        coarse, shallow, deep = (str(name) for name in factors["layers"][:3])
        used = dict(coarse=coarse, shallow=shallow, deep=deep)
        used |= dict(alpha=float(factors["alpha"]), rule=str(factors["rule"]))
    elif {"coarse", "shallow_layer", "layer", "alpha", "rule"} <= fusion.keys():
        used = dict(coarse=fusion["coarse"], shallow=own.get("shallow_layer", fusion["shallow_layer"]))
        used |= dict(alpha=float(own.get("alpha", fusion["alpha"])), rule=own.get("rule", fusion["rule"]))
        used["deep"] = fusion["layer"]
    else:
        return {}
    reasons = [f"{name.replace('_', ' ')} given as a parameter" for name in own]
    return used | {"reason": ", ".join(reasons + [fusion["reason"]] * ("reason" in fusion and len(own) < 3))}


# ---- pictures and formulas


def as_uri(data, kind):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def small(path, widest=WIDEST):
    """A picture file as (data URI, width, height): WebP of quality 85 on white, at most `widest` pixels wide."""
    with Image.open(path) as opened:
        image = opened.convert("RGBA")
    paper = Image.new("RGBA", image.size, "white")
    paper.alpha_composite(image)
    if paper.width > widest:
        paper = paper.resize((widest, max(1, round(paper.height * widest / paper.width))), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    paper.convert("RGB").save(file, "WEBP", quality=85, method=4)
    return as_uri(file.getvalue(), "image/webp"), *paper.size


def exact(pixels):
    """uint8 pixels, (H, W) or (H, W, 3), as a data URI without loss."""
    file = io.BytesIO()
    Image.fromarray(pixels).convert("RGB").save(file, "WEBP", lossless=True, quality=80, method=4)
    return as_uri(file.getvalue(), "image/webp")


def mathml(latex, block=False):
    from latex2mathml.converter import convert

    return Markup(convert(latex, display="block" if block else "inline"))


def figure(folder, stem, alt, caption):
    """A figure of the run for the template, None if the run has none of this name."""
    path = folder / "figures" / f"{stem}.png"
    return picture(path, alt, caption) if path.is_file() else None


def picture(path, alt, caption, widest=WIDEST):
    uri, width, height = small(path, widest)
    return dict(uri=uri, width=width, height=height, alt=alt, caption=caption)


# ---- tables: a cell is what is shown and what it is sorted by


def word(text):
    return str(text), str(text).lower()


def number(value, form=".4f"):
    """A value as a cell; nothing where there is none."""
    return ("", "") if pd.isna(value) else (format(value, form), f"{value:.9g}")


def interval(row):
    text = number(row["difference"], "+.4f")
    if pd.isna(row["low"]):
        return (f"{text[0]} (no interval)" if text[0] else "", text[1])
    return f"{text[0]} [{row['low']:+.4f}, {row['high']:+.4f}]", text[1]


def span(values):
    """n = 24, or n = 12 to 24 where rows rest on different numbers of images."""
    low, high = int(min(values)), int(max(values))
    return f"n = {low}" if low == high else f"n = {low} to {high}"


def name_of(metric, baseline=""):
    return metric.replace("_", " ") + (f" ({baseline})" if baseline else "")


def arrow(metric):
    import cam_core as cc

    return "↓" if metric in cc.LOWER_IS_BETTER else "↑"


def endpoints_table(head):
    """The endpoints, hybrid against Grad-CAM, as the two-minute reader wants them."""
    import cam_core as cc

    columns = ["endpoint", "Grad-CAM", "hybrid", "paired difference [95 % interval]", "p (Holm)", "images won", "n"]
    rows = [
        [word(f"{name_of(row['metric'], row['baseline'])} {arrow(row['metric'])}"), number(row["reference_mean"]),
         number(row["mean"]), interval(row), number(row["p_holm"], ".2g"), number(row["won"], ".0%"),
         number(row["n"], "d"), word(cc.judgement(row, "p_holm"))]
        for row in head
    ]  # fmt: skip
    caption = "Hybrid against Grad-CAM. Difference: mean over images of hybrid minus Grad-CAM, BCa bootstrap interval; "
    caption += "p: sign-flip permutation test, corrected for all rows together; ↑ higher is better, ↓ lower is better."
    return dict(caption=caption, columns=[*columns, "verdict"], rows=rows)


def methods_table(summary, head):
    """Every method and control on the endpoints: mean, and difference to Grad-CAM with its interval."""
    import cam_core as cc

    kinds = [(row["metric"], row["baseline"]) for row in head]
    methods = sorted(summary.method.unique(), key=lambda m: list(cc.STYLE).index(m) if m in cc.STYLE else 99)
    found = summary.set_index(["method", "metric", "baseline"]).sort_index()
    columns, rows = ["method"], []
    for metric, _ in kinds:
        columns += [f"{name_of(metric)} {arrow(metric)}", f"{name_of(metric)}: difference [95 % interval]"]
    for m in methods:
        cells = [word(cc.label(m))]
        for kind in kinds:
            row = found.loc[(m, *kind)] if (m, *kind) in found.index else None
            same = row is not None and bool(row["identical"])
            difference = ("identical", "0") if same and m != "grad_cam" else ("", "0") if same else None
            cells += [("", ""), ("", "")] if row is None else [number(row["mean"]), difference or interval(row)]
        rows.append(cells)
    own = summary[[k in kinds for k in zip(summary.metric, summary.baseline, strict=True)]]
    caption = f"Every method and control, {span(own.n)} images. Differences to Grad-CAM are paired by image; intervals "
    caption += "are 95 % BCa bootstrap intervals. Only the rows of the table above are corrected for their number."
    return dict(caption=caption, columns=columns, rows=rows)


def plain_table(frame, caption, form=".3f", names=None):
    """A table of the run as it is, without its run id; method names as in the figures."""
    import cam_core as cc

    frame = frame.drop(columns="run", errors="ignore")
    columns, rows = [(names or {}).get(c, c.replace("_", " ")) for c in frame], []
    for record in frame.to_dict("records"):
        cells = []
        for name, value in record.items():
            if isinstance(value, float):
                cells.append(number(value, ".2g" if name == "p" else form))
            else:
                cells.append(number(value, "d") if isinstance(value, int) else word(cc.label(str(value))))
        rows.append(cells)
    return dict(caption=caption, columns=columns, rows=rows)


# ---- sentences


def listed(words):
    words = list(words)
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def answer(head, controls):
    """The answer in two sentences, made from the numbers.

    head: rows of summary.csv, hybrid against Grad-CAM; controls: rows of tables/05_controls.csv, or None. "Better" and
    "worse" are cam_core.judgement's: an interval without zero, and p < 0.05 (corrected in the first sentence).
    """
    import cam_core as cc

    judged = {row["metric"]: cc.judgement(row, "p_holm") for row in head}
    by = {w: [name_of(m) for m in judged if judged[m] == w] for w in ("better", "worse", "identical", "no difference")}
    parts = [f"{w} than Grad-CAM on {listed(by[w])}" for w in ("better", "worse") if by[w]]
    parts += [f"identical to it on {listed(by['identical'])}"] if by["identical"] else []
    if by["no difference"]:
        names = listed(by["no difference"])
        parts.append(f"not shown to differ from {'it' if parts else 'Grad-CAM'} on {names}")
    first = f"The hybrid is {'; it is '.join(parts)} ({span([row['n'] for row in head])} images)."
    if not by["better"]:
        return first, "No gain over Grad-CAM is shown, so there is none to put down to the fusion."
    if controls is None:
        return first, "Whether that is the fusion's doing was not measured in this run."
    told, most = [], 0
    for metric in [m for m in judged if judged[m] == "better"]:
        rows = controls[controls.metric == metric].to_dict("records")
        rows = [row | {"identical": pd.isna(row["p"]) and row["difference"] == 0} for row in rows]
        found, most = {cc.label(row["reference"]): cc.judgement(row) for row in rows}, max(most, len(rows))
        better = [name for name, w in found.items() if w == "worse"]
        alike = [name for name, w in found.items() if w in ("no difference", "identical")]
        parts = [f"{listed(better)} {'is' if len(better) == 1 else 'are'} better still"] if better else []
        parts += [f"no difference to {listed(alike)} is shown"] if alike else []
        holds = "the gain stays against all of them" if rows else "nothing was compared"
        told.append(f"in {name_of(metric)} {' and '.join(parts) or holds}")
    maps = f"the {most} maps that share the hybrid's resolution, its two factors alone among them"
    return first, f"Of these gains, held against {maps}: {'; '.join(told)} (exploratory, p uncorrected)."


def marked(text):
    """The little Markdown that notebooks write into tables/*.md, lists, **strong** and *emphasis*, as safe HTML."""
    blocks, items = [], []
    for line in [*text.splitlines(), ""]:
        inner = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", str(escape(line.removeprefix("- ").strip())))
        inner = re.sub(r"(?<!\*)\*([^*\s][^*]*)\*(?!\*)", r"<em>\1</em>", inner)
        if line.startswith("- "):
            items.append(f"<li>{inner}</li>")
            continue
        blocks += [f"<ul>{''.join(items)}</ul>"] * bool(items) + [f"<p>{inner}</p>"] * bool(inner)
        items = []
    return Markup("\n".join(blocks))


# ---- parts


def failures(folder, metrics, baseline, count=4):
    """Where the hybrid loses most against Grad-CAM in insertion minus deletion: [{image, sentence, pictures}].

    Images on which it does not lose are none. metrics: of one network.
    """
    import cam_core as cc

    part = metrics[(metrics.baseline == baseline) & metrics.metric.isin(["insertion", "deletion"])]
    part = part[part.method.isin(["hybrid", "grad_cam"])]
    wide = part.pivot(index="image", columns=["method", "metric"], values="value").dropna()
    if not {(m, k) for m in ("hybrid", "grad_cam") for k in ("insertion", "deletion")} <= set(wide.columns):
        return []
    loss = sum(s * (wide["hybrid", k] - wide["grad_cam", k]) for s, k in ((1, "insertion"), (-1, "deletion")))
    found = []
    for image, value in loss[loss < -cc.ROUNDING].sort_values(kind="stable").head(count).items():
        row, stem = wide.loc[image], folder / "images" / f"05_{cc.safe_name(image)}"
        kinds = {"original": "the image", "overlay": "the hybrid laid over it"}
        files = {kind: Path(f"{stem}_{kind}.png") for kind in kinds}
        text = f"insertion {row['hybrid', 'insertion']:.4f}, Grad-CAM {row['grad_cam', 'insertion']:.4f}; "
        text += f"deletion {row['hybrid', 'deletion']:.4f}, Grad-CAM {row['grad_cam', 'deletion']:.4f}"
        pictures = [picture(f, f"{image}: {kinds[k]}", kinds[k], 448) for k, f in files.items() if f.is_file()]
        shown = f"{value:+.4f}" if abs(value) >= 5e-5 else f"{value:+.0e}"
        found.append(dict(image=image, value=shown, text=text, pictures=pictures))
    return found


def slider(folder, factors, colormap="inferno"):
    """What the page computes fusions from: images, 8-bit factors and masks as data URIs, and the table of colours."""
    import cam_core as cc

    if not len(factors):
        return None
    names, images = [str(layer) for layer in factors["layers"]], []
    for i, image in enumerate(map(str, factors["ids"])):
        path = folder / "images" / f"05_{cc.safe_name(image)}_original.png"
        if not path.is_file():
            continue
        with Image.open(path) as opened:
            aspect = opened.width / opened.height
            pixels = np.asarray(opened.convert("RGB").resize(factors["maps"].shape[:1:-1]))
        seen = f"{factors['predicted'][i]}, p = {factors['probability'][i]:.2f}"
        mask = exact(factors["masks"][i].astype(np.uint8) * 255) if factors["masks"][i].any() else ""
        entry = dict(id=image, seen=seen, aspect=round(aspect, 6), image=exact(pixels), mask=mask)
        images.append(entry | {"maps": [exact(m) for m in factors["maps"][i]]})
    if not images:
        return None
    titles = [f"{cam} at {name}" for cam, name in zip(["Grad-CAM", "LayerCAM"] * 2, names, strict=True)]
    rule = str(factors["rule"])
    hybrids = [
        dict(name=f"hybrid, {names[0]} with {names[1]}", maps=[0, 1], titles=titles[:2], alpha=float(factors["alpha"]),
             rule=rule if rule in RULES else "product"),
        dict(name=f"same-layer hybrid, both at {names[2]}", maps=[2, 3], titles=titles[2:], alpha=cc.PRIOR_ALPHA,
             rule="product"),
    ]  # fmt: skip
    rules = ["product"] + [rule] * (rule in RULES and rule != "product")
    content = dict(images=images, hybrids=hybrids, rules=rules, floor=cc.FLOOR)
    content["colours"] = cc.colours(np.linspace(0, 1, 256)[None], colormap=colormap)[0].tobytes().hex()
    formulas = {name: mathml(RULES[name]) for name in rules}
    unknown = "" if rule in RULES else f"The run fused by a rule of its own, {rule}, which this page cannot compute."
    return dict(content=content, formulas=formulas, floor=cc.FLOOR, unknown=unknown, count=len(images))


def costs(folder, manifest):
    """Tables of timings: all that may differ between two equal runs."""
    tables, cost, steps = [], read_table(folder, "cost.csv"), read_table(folder, "cost_02.csv")
    if cost is not None:
        where = f"{cost.device.iloc[0]}, batches of {cost.batch.iloc[0]}" if "device" in cost else ""
        caption = f"Per image, forward pass included, and in units of a bare forward pass ({where}): medians of five "
        caption += "interleaved rounds (no interval)."
        names = {"seconds": "seconds per image", "ratio": "in forward passes"}
        tables.append(plain_table(cost.drop(columns=["device", "batch"], errors="ignore"), caption, ".4f", names))
    if steps is not None:
        about = "The techniques of notebook 02, at another time of the run, on the number of images given."
        tables.append(plain_table(steps, about, ".4f"))
    spent = [[word(stem), number(entry["seconds"], ".1f")] for stem, entry in manifest.get("notebooks", {}).items()]
    if spent:
        tables.append(dict(caption="Wall-clock time of each notebook.", columns=["notebook", "seconds"], rows=spent))
    return tables


def provenance(manifest, fusion):
    """What the results were made from and with: rows of a list, and a table of the parameters."""
    notebooks = manifest.get("notebooks", {})
    runs = {entry["run"] for entry in notebooks.values()}
    dirty = {True: ", with changes that were not committed", False: ", without uncommitted changes"}
    facts = [("run", manifest["run"])]
    if len(runs) > 1:
        facts.append(("made in several runs", ", ".join(f"{s[:2]}: {e['run']}" for s, e in notebooks.items())))
    commit = manifest.get("commit")
    facts.append(("commit", f"{commit}{dirty.get(manifest.get('dirty'), '')}" if commit else "not in a git repository"))
    facts += [(key, fusion[name]) for key, name in (("network", "arch"), ("checkpoint, sha256", "weights_sha256"),
                                                    ("device", "device")) if fusion.get(name)]  # fmt: skip
    threads = {entry["parameters"].get("threads", 0) for entry in notebooks.values()}
    said = ", ".join("torch's default" if t == 0 else str(t) for t in sorted(threads))
    facts += [("threads", said)] * bool(said)
    facts += [(key, str(manifest[key])) for key in ("cpus", "python", "platform") if key in manifest]
    values = {}
    for stem, entry in notebooks.items():
        for name, value in entry["parameters"].items():
            values.setdefault(name, {}).setdefault(json.dumps(value, ensure_ascii=False), []).append(stem[:2])
    rows = []
    for name, found in sorted(values.items()):
        texts = [v if len(found) == 1 else f"{v} in {', '.join(where)}" for v, where in found.items()]
        rows.append([word(name), word("; ".join(texts))])
    table = dict(caption="Parameters, as the notebooks got them.", columns=["parameter", "value"], rows=rows)
    packages = [[word(name), word(version)] for name, version in sorted(manifest.get("packages", {}).items())]
    versions = dict(caption="Packages.", columns=["package", "version"], rows=packages)
    return dict(facts=facts, tables=[t for t in (table, versions) if t["rows"]])


ONLY_05 = "Run notebook 05: ./run_all.sh --only 05 with the options of this run."
MISSING = (  # what may be missing, and how to get it; the keys are those of `collect`
    (
        "summary",
        "All measurements: main table, forest plot, curves, failures",
        f"{ONLY_05} It needs the choice of notebook 04, or alpha and shallow_layer as parameters.",
    ),
    (
        "located",
        "Localisation: energy, average precision and the contours of masks",
        "No place of an object is known. Put masks (white on black) into masks/ in the images' folder, or boxes into "
        "boxes.csv; see “Your own images” in the README.",
    ),
    ("settings", "The choice of layers, rule and weight", "Run notebook 04: ./run_all.sh --from 04."),
    ("slider", "The slider: slider.npz and the pictures in images/", ONLY_05),
    ("pairs", "Images with two lesions, each asked for", "Only the synthetic data has them: dataset = synthetic."),
    ("shortcut", "The network that cheats", "./run_all.sh -f params/shortcut.yaml."),
    ("second", "A second network", "Add -p also squeezenet1_1, or another classifier of torchvision."),
    ("cost", "Timings of the methods: cost.csv", ONLY_05),
    ("manifest", "Where the results come from: manifest.json", "The runner writes it: ./run_all.sh."),
)


def collect(folder, manifest):
    """All that the template shows, from the run's files; parts that the run lacks are None or empty."""
    import cam_core as cc

    fusion, factors = read_json(folder / "fusion.json"), read_factors(folder)
    given = next((e["parameters"] for s, e in manifest.get("notebooks", {}).items() if s.startswith("05")), {})
    parts = dict(run=manifest.get("run", fusion.get("run", "unknown")), manifest=manifest, fusion=fusion)
    parts |= dict(METRICS=METRICS, NAMES=NAMES)
    parts["settings"] = settings_of(fusion, factors, given)
    summary, metrics = read_table(folder, "summary.csv"), read_table(folder, "metrics.csv")
    parts |= dict.fromkeys(["summary", "located", "pairs", "shortcut", "second", "cost", "answer", "said", "lost"])
    network = ""
    if summary is not None and "primary" in summary:
        networks = list(dict.fromkeys(summary.network)) if "network" in summary else [""]
        network, own = networks[0], summary
        own = own[own.network == network] if network else own
        head = own[own.primary].to_dict("records")
        if head:
            controls = read_table(folder, "tables/05_controls.csv")
            parts |= dict(summary=endpoints_table(head), methods=methods_table(own, head), network=network)
            parts |= dict(answer=answer(head, controls), n=span([row["n"] for row in head]), endpoints=head)
            parts["located"] = "energy" in set(own.metric)
            parts["sentences"] = [cc.verdict(row, "p_holm") for row in head]
        others = {n: summary[(summary.network == n) & summary.primary].to_dict("records") for n in networks[1:]}
        parts["second"] = [dict(endpoints_table(rows), name=n) for n, rows in others.items() if rows]
        if metrics is not None and head:
            base = next((row["baseline"] for row in head if row["baseline"]), "")
            mine = metrics[metrics.network == network] if network else metrics
            parts |= dict(lost=failures(folder, mine, base), baseline=base)
    parts |= figures(folder, parts.get("n", ""), bool(parts["located"]))
    conclusions = folder / "tables/05_conclusions.md"
    parts["said"] = marked(conclusions.read_text("utf-8")) if conclusions.is_file() else None
    parts["kind"] = conclusions.read_text("utf-8").splitlines()[0].strip("*") if conclusions.is_file() else ""
    parts["slider"] = slider(folder, factors, given.get("colormap", "inferno"))
    parts["provenance"] = provenance(manifest, fusion) if manifest else None
    parts["costs"], parts["cost"] = costs(folder, manifest), read_table(folder, "cost.csv") is not None
    notebooks = [p.stem for p in sorted((folder / "notebooks").glob("*.ipynb"))]
    parts["notebooks"] = [(s, (folder / "notebooks" / f"{s}.html").is_file()) for s in notebooks]
    files = "summary.csv metrics.csv metrics.csv.gz fusion.json cost.csv manifest.json tables figures images"
    here = [name for name in files.split() if (folder / name).exists() or name == "manifest.json" and manifest]
    parts["files"] = [name + "/" * (folder / name).is_dir() for name in here]
    parts["lacking"] = [(what, how) for key, what, how in MISSING if not parts[key]] + parts["no_figure"]
    return parts


def figures(folder, n, located):
    """The run's figures with their captions: {part: [figure, ...]}, tables beside them, and the missing ones."""
    interval_text = "95 % BCa bootstrap interval"
    many = f"{n} images" if n else "n as given"
    contour = " White contours are the true masks." if located else ""
    classes, pairs = (read_table(folder, f"tables/05_{name}.csv") for name in ("class_sensitivity", "pairs"))
    asked = f"n = {int(classes.n.max())}" if classes is not None else "n as given"
    shortcut = read_table(folder, "tables/05_shortcut.csv")
    cheated = f"n = {int(shortcut.n.max())}" if shortcut is not None else "n as given"
    plan = {
        "forest": [("05_differences", "Forest plot: each method's paired difference to Grad-CAM, one panel per metric",
                    f"Mean paired difference to Grad-CAM with its {interval_text}; right of the line is better in "
                    f"every panel (where lower is better it is mirrored). {many}; further baselines may have "
                    "fewer, as their titles say.")],
        "controls": [("05_controls", "The hybrid's paired difference to each control of its resolution",
                      f"Hybrid minus control, {interval_text}, {many}: right of the line the hybrid is better. p "
                      "uncorrected.")],
        "grid": [("05_glance", "Three images with Grad-CAM, shallow LayerCAM, the hybrid's Grad-CAM and the hybrid",
                  f"Single images (no interval), the first measured ones.{contour}"),
                 ("05_methods", "Every method's and control's map laid over the first two measured images",
                  f"Two single images (n = 2, so no interval), every map scaled to its own maximum.{contour}")],
        "curves": [("05_curves", "Insertion and deletion curves of the main methods",
                    f"Mean curves over the images that each title counts ({many} for the first baseline); bands are "
                    "95 % bootstrap intervals of the mean.")],
        "when": [(f"05_by_{name}", f"The hybrid's paired difference to Grad-CAM by {name}",
                  f"By {what}, {interval_text}; n of each group stands below its dot. Exploratory.")
                 for name, what in (("area", "area of the object"), ("complexity", "complexity of the image"))],
        "lost_figure": [("05_failures", "The images with the hybrid's largest losses, three methods",
                         f"Single images (no interval), the worst of {n or 'all'}; in the title hybrid minus Grad-CAM "
                         f"in insertion − deletion.{contour}")],
        "sanity": [("05_randomisation", "Similarity of the maps with the original ones while weights are randomised",
                    f"Rank correlation and structural similarity with the original map, mean of {asked} images (no "
                    "interval); randomised from the classifier down.")],
        "pairs_figure": [("05_pairs", "Share of the energy that lies on the lesion asked for, for every method",
                          f"Mean of {len_of(pairs)} images with two lesions; intervals are in the table.")],
        "shortcut_figures": [("05_shortcut", "Energy on the marker for the honest and the cheating network",
                              f"Left means, right cheating minus honest with its {interval_text}, {cheated} images."),
                             ("05_shortcut_maps", "Maps of the honest and the cheating network on three images",
                              "Three single images (n = 3, no interval); the white contour is the marker."),
                             ("01_shortcut", "Images with the side marker that the second network was taught to read",
                              "What the second network was taught on: single images, no interval.")],
    }  # fmt: skip
    parts = {key: list(filter(None, (figure(folder, *row) for row in rows))) for key, rows in plan.items()}
    usual = ["05_differences", "05_controls", "05_methods", "05_curves", "05_failures", "05_randomisation"]
    lacking = [stem for stem in usual if not (folder / "figures" / f"{stem}.png").is_file()]
    parts["no_figure"] = [(f"figures/{stem}.png", "Notebook 05 draws it: ./run_all.sh --only 05.") for stem in lacking]
    found = folder / "tables/05_shortcut.md"
    parts["shortcut"] = marked(found.read_text("utf-8")) if found.is_file() else None
    if shortcut is not None:
        caption = f"Share of each map's energy on the marker, {cheated} images; difference with its {interval_text}."
        shortcut = shortcut[shortcut.metric == "energy"].drop(columns="metric")
        parts["shortcut_table"] = plain_table(joined(shortcut.drop(columns="effect", errors="ignore")), caption)
    if classes is not None:
        caption = f"Rank correlation of the maps for the most and the least likely class, {asked} images (1: the "
        caption += f"class does not matter), and paired difference to Grad-CAM with its {interval_text}."
        rank = classes[classes.metric == "class_spearman"].drop(columns="metric")
        parts["classes"] = plain_table(joined(rank), caption)
    if pairs is not None:
        caption = f"{len_of(pairs)} images with two lesions: share of the energy on the one asked for (0.5: the "
        caption += f"map does not follow), and paired difference to Grad-CAM with its {interval_text}."
        share = pairs[pairs.metric == "discrimination"].drop(columns="metric")
        parts["pairs"] = plain_table(joined(share), caption)
    means = read_table(folder, "tables/05_means.csv")
    if means is not None:
        caption = f"All metrics as means, {many}; further baselines and RISE, where measured, on at most n_extra "
        caption += "images. Intervals: summary.csv."
        parts["means"] = plain_table(means, caption)
    return parts


def len_of(table):
    return "" if table is None else f"n = {int(table.n.max())}"


def joined(table):
    """difference, low and high in one column, as they are read."""
    texts = [interval(row)[0] for row in table.to_dict("records")]
    table = table.assign(difference=texts).drop(columns=["low", "high"])
    return table.rename(columns={"difference": "difference [95 % interval]"})


# ---- pages


def template():
    """The template, and the hashes of its own style and script for the Content-Security-Policy."""
    loader = jinja2.FileSystemLoader(HERE)
    options = dict(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment, name = jinja2.Environment(loader=loader, **options), "report_template.html"
    source, allowed = loader.get_source(environment, name)[0], {}
    for kind in ("style", "script"):
        inner = re.search(rf"<{kind}>(.*?)</{kind}>", source, re.S)[1]
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        allowed[kind] = f"{kind}-src 'sha256-{digest}'"
    return environment.get_template(name), allowed


def build(folder, manifest=None, timings=True):
    """The report of a run as HTML. manifest: that of manifest.json, if it is not written yet. timings=False leaves the
    section of timings out, and with it all that may differ between two equal runs.
    """
    folder = Path(folder)
    manifest = read_json(folder / "manifest.json") if manifest is None else manifest
    page, allowed = template()
    parts = collect(folder, manifest)
    policy = f"{NEVER}; {allowed['style']}; {allowed['script']}"
    fused = RULES.get(parts["settings"].get("rule"))
    formula = mathml(r"H = \frac{F}{\max F}, \qquad F = " + fused, block=True) if fused else ""
    return page.render(parts, policy=policy, timings=timings, notebook=None, formula=formula, math=mathml)


def harmless(markup):
    """HTML with the tags of prose and tables alone; what else names of classes and files hold is shown as it reads."""
    import bleach

    tags = {*bleach.ALLOWED_TAGS, *"div pre span table thead tbody tr th td caption p br hr h1 h2 h3 h4 h5 h6".split()}
    kept = {"*": ["class", "id", "colspan", "rowspan"], "a": ["href"]}
    return bleach.clean(re.sub(r"<style.*?</style>", "", str(markup), flags=re.S), tags, kept)


def notebook_page(path, run):
    """An executed notebook as a page without its code, scripts and requests: what a reader wants of it.

    Markup in Markdown, which may hold names of classes, is shown as it reads; formulas become MathML.
    """
    import nbformat
    from nbconvert import HTMLExporter
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    class Renderer(IPythonRenderer):
        def block_math(self, body):
            return mathml(body, block=True)

        def inline_math(self, body):
            return mathml(body)

        def image(self, text, url, title=None):
            return escape(text)

    book, heading = nbformat.read(path, 4), ""
    kinds = {"text/html", "text/markdown", "text/latex", "text/plain", "image/png", "image/jpeg"}
    for cell in book.cells:
        if cell.cell_type == "markdown":
            heading = (re.findall(r"^#+ (.+)$", cell.source, re.M) or [heading])[-1]
            continue
        stems, shown = iter(re.findall(r"\b\d\d_\w+(?=\.png)", cell.source)), []
        for out in cell.get("outputs", []):
            if set(out.get("data", {})) - kinds:
                continue  # a widget or a script: it needs a kernel, or what other hosts serve
            if "text/html" in out.get("data", {}):
                out.data["text/html"] = harmless(out.data["text/html"])
            if "image/png" in out.get("data", {}):
                out.metadata["image/png"] = {"alt": f"{heading}: {next(stems, 'figure')}"}
            shown.append(out)
        cell.outputs = shown
    book.cells = [cell for cell in book.cells if cell.cell_type == "markdown" or cell.get("outputs")]
    book.metadata.pop("widgets", None)
    exporter = HTMLExporter(template_name="basic", exclude_input=True, exclude_output_prompt=True)
    render = MarkdownWithMath(Renderer(True, False, exclude_anchor_links=True)).render  # escapes, and no javascript:
    exporter.register_filter("markdown2html", render)
    html, _ = exporter.from_notebook_node(book)
    page, allowed = template()
    policy = f"{NEVER}; {allowed['style']}"
    return page.render(notebook=Markup(html), stem=Path(path).stem, run=run, policy=policy)


def write(folder, manifest=None):
    """Write folder/report.html; see `build`."""
    path = Path(folder) / "report.html"
    path.write_text(build(folder, manifest), "utf-8")
    return path


def main():
    parser = argparse.ArgumentParser("report.py", None, __doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="RUN", help="the folder of a run, such as results/default")
    folder = parser.parse_args().folder
    if not any((folder / name).is_file() for name in ("manifest.json", "summary.csv", "fusion.json")):
        raise SystemExit(f"report.py: {folder} holds no run (no manifest.json, summary.csv or fusion.json).")
    path, manifest = write(folder), read_json(folder / "manifest.json")
    if "files" in manifest:  # the page is one of the files that the manifest lists
        data = path.read_bytes()
        entry = {"notebook": "report.py", "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest["files"]["report.html"] = entry
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", "utf-8")
    print(path)


if __name__ == "__main__":
    main()
