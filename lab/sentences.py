"""What the numbers of a study allow to say. All sentences about results are made here.

`conclusions` is the one that matters: notebook 05, the report, docs/results.md and README take
what they say from it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from lab import figures, statistics

# ---- words, and sentences on one row of a table


def summed_up(rows: pd.DataFrame, column: str, link: str, p_column: str = "p_holm") -> str:
    """What rows of `compare` allow to say, in words: "better at a and b; no difference at c".

    column: what names a row, link: the word before the names. See `judgement`.
    """
    judged = {row[column]: statistics.judgement(row, p_column) for row in rows.to_dict("records")}
    found = _by_word(judged)
    return "; ".join(f"{word} {link} {listed(named)}" for word, named in found.items() if named)


def verdict(row: Mapping, p_column: str = "p", name: Callable[[str], str] = figures.label) -> str:
    """One sentence on a row of `compare`, as `judgement` allows. name: what a method is called in
    it.
    """
    method = name(row["method"])
    reference = name(row["reference"])
    metric = metric_name(row["metric"])
    word = statistics.judgement(row, p_column)
    if word == "identical":
        return f"{method} is identical to {reference} in {metric} on all {row['n']} images."
    numbers = f"{row['difference']:+.4f}, no interval"
    if not np.isnan(row["low"]):
        interval = f"[{row['low']:+.4f}, {row['high']:+.4f}]"
        numbers = f"{row['difference']:+.4f} {interval}, p = {row[p_column]:.2g}"
    numbers += f", n = {row['n']}"
    if word == "no difference":
        return f"{method} shows no difference to {reference} in {metric} ({numbers})."
    return f"{method} is {word} than {reference} in {metric} ({numbers})."


def metric_name(metric: str) -> str:
    """A metric as a sentence names it."""
    if metric == "discrimination":
        return "the share on the lesion asked for"
    for ending, meaning in (("_blocks", " by blocks"), ("_fine", " with more steps")):
        metric = str(metric).replace(ending, meaning)
    return metric.replace("_", " ")


def listed(words: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    words = list(words)
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


IN_WORDS = {  # what methods are called in sentences, for readers who do not know this repository
    "hybrid": "the hybrid",
    "hybrid_same": "the published hybrid (both maps at {deep}, α = 0.7)",
    "hybrid_coarse": "the hybrid averaged to the cells of {deep}",
    "layer_cam": "LayerCAM at {deep}",
    "layer_cam_shallow": "LayerCAM at {shallow} alone",
    "grad_cam_coarse": "Grad-CAM at {coarse} alone",
    "grad_cam_finer": "Grad-CAM one stage before {deep}",
    "times_sobel": "Grad-CAM × Sobel edges",
    "times_activation": "Grad-CAM × mean activation",
    "times_other": "Grad-CAM × another image's LayerCAM",
    "noise": "pixel noise",
}
UNNAMED = {
    "deep": "the last layer",
    "coarse": "the hybrid's coarse layer",
    "shallow": "the shallow layer",
}
EDITS = {  # what takes the place of pixels, by baseline
    "twin": "the pixels of the twin",
    "rise": "a blurred image (insertion) or mean grey (deletion)",
    "zero": "mean grey",
    "black": "black pixels",
}
OTHERS = (  # what is told beside the endpoints: (method, metric), against Grad-CAM
    ("hybrid", "insertion_blocks"),
    ("hybrid", "deletion_blocks"),
    ("hybrid_coarse", "energy"),
    ("hybrid_coarse", "average_precision"),
    ("hybrid_coarse", "deletion"),
    ("layer_cam_shallow", "insertion"),
    ("layer_cam_shallow", "deletion"),
    ("layer_cam_shallow", "energy"),
    ("hybrid_same", "insertion"),
    ("hybrid_same", "energy"),
    ("hybrid", "insertion_fine"),
    ("hybrid", "deletion_fine"),
    ("hybrid", "drop"),
    ("hybrid", "increase"),
    ("noise", "insertion"),
    ("noise", "deletion"),
)


@dataclass(frozen=True)
class Conclusions:
    """What the numbers of a run allow to say, as sentences.

    about: what the hybrid is. headline: the hybrid against Grad-CAM on the primary endpoints.
    fusion: whether its gains are the fusion's own. endpoints, controls, when, others, notes: a
    sentence for each row or group of rows. networks: {name: the endpoints on a further network}.
    """

    about: str
    headline: str
    fusion: str
    endpoints: list[str]
    controls: list[str]
    when: list[str]
    others: list[str]
    notes: list[str]
    networks: dict[str, list[str]]

    def markdown(self, confirmatory: bool) -> str:
        """All of it as a page, tables/05_conclusions.md. confirmatory: see `is_confirmatory`."""
        kind = (
            "Primary endpoints"
            if confirmatory
            else "Exploratory: other data, another baseline, or a fusion set by hand"
        )
        lines = [f"*{kind}. Their p are Holm-corrected over the {len(self.endpoints)}.*"]
        lines += ["", self.about] if self.about else []
        lines += ["", f"**{self.headline}** {self.fusion}"]
        sections = {
            "": self.endpoints,
            "**Is it the fusion?** (exploratory, p uncorrected)": self.controls,
            "**When does it help?** (exploratory, p uncorrected)": self.when,
            "**Other comparisons with Grad-CAM** (exploratory, p uncorrected)": self.others,
        }
        for name, sentences in self.networks.items():
            sections[f"**On {name}**, for which nothing was chosen (Holm-corrected)"] = sentences
        sections["**Notes**"] = self.notes
        for title, sentences in sections.items():
            if sentences:
                lines += ["", title] if title else []
                lines += ["", *(f"- {sentence}" for sentence in sentences)]
        return "\n".join(lines) + "\n"


def conclusions(
    summary,
    controls=None,
    by_area=None,
    by_complexity=None,
    pairs=None,
    classes=None,
    metrics=None,
    layers: Mapping[str, str] | None = None,
    steps: Sequence[int] = (),
) -> Conclusions:
    """The one place where results become sentences: notebook 05, the report, docs/results.md and
    README take them here.

    A function of the tables alone: with the columns swapped the sentences flip, on null data they
    say nothing. summary: rows of `judge`, for one network or several (column network; the first is
    the one that was chosen for). controls: of `against_controls`. by_area, by_complexity: of
    `by_group`. pairs, classes: of `compare`, for `discrimination` and `class_sensitivity`. metrics:
    records of `measure`. What is None was not measured, and nothing is said of it. layers: those of
    the study, to name them. steps: (steps, fine_steps), where both were measured. `read_tables`
    gives all this from a run's folder.
    """
    networks = list(dict.fromkeys(summary["network"])) if "network" in summary else [""]
    own = summary[summary["network"] == networks[0]] if networks[0] else summary
    places = UNNAMED | dict(layers or {})

    def name(method: str) -> str:
        if method == "grad_cam_coarse" and places["coarse"] == places["deep"]:
            method = "grad_cam"
        return IN_WORDS.get(method, figures.label(method)).format(**places)

    head = own[own["primary"]].to_dict("records")
    about = ""
    if layers:
        about = (
            f"The hybrid fuses Grad-CAM at {layers['coarse']} with LayerCAM at "
            f"{layers['shallow']}; Grad-CAM itself looks at {layers['deep']}."
        )
    further = {}
    for network in networks[1:]:
        rows = summary[(summary["network"] == network) & summary["primary"]]
        further[network] = [
            _sentence(verdict(row, "p_holm", name)) for row in rows.to_dict("records")
        ]
    return Conclusions(
        about=about,
        headline=headline(head),
        fusion=_is_it_the_fusion(head, controls, name),
        endpoints=[_sentence(verdict(row, "p_holm", name)) for row in head],
        controls=_controls_in_words(controls, name),
        when=_when(by_area, "area of the object", "", head)
        + _when(by_complexity, "complexity", "level ", head),
        others=_others(own, pairs, classes, name),
        notes=_notes(own, metrics, networks[0], steps, name),
        networks=further,
    )


def _sentence(text: str) -> str:
    """With a capital letter."""
    return text[0].upper() + text[1:]


def _by_word(judged: Mapping[str, str]) -> dict[str, list[str]]:
    """{what: judgement} as {judgement: [what, ...]}."""
    found = {word: [] for word in ("better", "worse", "no difference", "identical")}
    for what, word in judged.items():
        found[word].append(what)
    return found


def headline(head: Sequence[Mapping]) -> str:
    if not head:
        return "None of the primary endpoints was measured."
    judged = {metric_name(row["metric"]): statistics.judgement(row, "p_holm") for row in head}
    found = _by_word(judged)
    counts = [int(row["n"]) for row in head]
    total = len(judged)

    def on(word: str) -> str:
        of = f"all {total}" if len(found[word]) == total else f"{len(found[word])} of {total}"
        return f"{of} endpoints ({listed(found[word])})"

    if found["better"] and found["worse"]:
        worse = f"{len(found['worse'])} ({listed(found['worse'])})"
        sentences = [f"The hybrid is better than Grad-CAM on {on('better')} and worse on {worse}."]
    elif found["better"]:
        sentences = [f"The hybrid is better than Grad-CAM on {on('better')}."]
    elif found["worse"]:
        sentences = [f"The hybrid is worse than Grad-CAM on {on('worse')}."]
    elif found["no difference"]:
        sentences = ["No difference between the hybrid and Grad-CAM is shown on any endpoint."]
    else:
        sentences = ["The hybrid and Grad-CAM are the same map."]
    if found["no difference"] and len(found["no difference"]) < total:
        sentences.append(f"In {listed(found['no difference'])} no difference is shown.")
    if found["identical"] and len(found["identical"]) < total:
        sentences.append(f"In {listed(found['identical'])} the two are identical.")
    many = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    sentences.append(f"Measured on {many} image{'s' if max(counts) > 1 else ''}.")
    return " ".join(sentences)


def _is_it_the_fusion(head: Sequence[Mapping], controls, name: Callable) -> str:
    gained = [row["metric"] for row in head if statistics.judgement(row, "p_holm") == "better"]
    if not gained:
        return "No gain over Grad-CAM is shown, so there is none to put down to the fusion."
    if controls is None or controls.empty:
        return "Whether the fusion is the reason was not measured."
    own = []
    shared = []
    for metric in gained:
        found = _by_word(_against(controls, metric, name))
        alike = found["no difference"] + found["identical"]
        parts = []
        if found["worse"]:
            verb = "is" if len(found["worse"]) == 1 else "are"
            parts.append(f"{listed(found['worse'])} {verb} better still")
        if alike:
            parts.append(f"no difference to {listed(alike)} is shown")
        if parts:
            shared.append(f"In {metric_name(metric)} {', and '.join(parts)}.")
        else:
            own.append(f"In {metric_name(metric)} {_beats_them_all(head, controls, metric, name)}.")
    return " ".join(["Is that the fusion, or only the finer resolution?", *own, *shared])


def _beats_them_all(head: Sequence[Mapping], controls, metric: str, name: Callable) -> str:
    """How far the best control of the hybrid's own resolution is behind it."""
    mine = next(row["mean"] for row in head if row["metric"] == metric)
    rows = controls[controls["metric"] == metric].set_index("reference")["reference_mean"]
    best = rows.idxmin() if metric in statistics.LOWER_IS_BETTER else rows.idxmax()
    return (
        "the hybrid beats every map that is as fine as itself; the nearest is "
        f"{name(best)} with {rows[best]:.3f} against {mine:.3f}"
    )


def _against(controls, metric: str, name: Callable) -> dict[str, str]:
    """{control: what the hybrid is against it} in one metric. Where the hybrid's Grad-CAM is that
    of the stage before the last, both have one row.
    """
    rows = controls[controls["metric"] == metric].drop_duplicates(
        ["reference_mean", "difference", "p"]
    )
    return {name(row["reference"]): statistics.judgement(row) for row in rows.to_dict("records")}


def _controls_in_words(controls, name: Callable) -> list[str]:
    """For each metric, which controls the hybrid beats."""
    if controls is None or controls.empty:
        return []
    sentences = []
    named = {}
    for metric in controls["metric"].unique():
        judged = _against(controls, metric, name)
        named |= judged
        found = _by_word(judged)
        words = [word for word in found if found[word]]
        if words in (["better"], ["worse"]):
            parts = [f"{words[0]} than all of them"]
        elif words == ["no difference"]:
            parts = ["no difference to any of them is shown"]
        else:
            parts = [f"{w} than {listed(found[w])}" for w in ("better", "worse") if found[w]]
            if found["no difference"]:
                parts.append(f"no difference to {listed(found['no difference'])} is shown")
            if found["identical"]:
                parts.append(f"identical to {listed(found['identical'])}")
        sentences.append(f"{_sentence(metric_name(metric))}: {'; '.join(parts)}.")
    against = f"its two factors alone and other maps that are finer than Grad-CAM: {listed(named)}"
    return [f"The hybrid is held against {against}.", *sentences]


def _when(table, what: str, group: str, head: Sequence[Mapping]) -> list[str]:
    """For each endpoint, in which groups of images the hybrid differs from Grad-CAM. what: what the
    images are grouped by; group: what stands before a group's name.
    """
    if table is None or table.empty:
        return []
    sentences = []
    something_shown = False
    for metric in [row["metric"] for row in head]:
        rows = table[table["metric"] == metric].to_dict("records")
        found = _by_word({f"{group}{row['group']}": statistics.judgement(row) for row in rows})
        unclear = found["no difference"] + found["identical"]
        parts = []
        for word in ("better", "worse"):
            if len(found[word]) == len(rows):
                parts.append(f"{word} in every group")
            elif found[word]:
                parts.append(f"{word} in {listed(found[word])}")
        something_shown |= bool(parts)
        if unclear:
            where = listed(unclear) if parts else "any group"
            parts.append(f"no difference shown in {where}")
        sentences.append(f"{_sentence(metric_name(metric))}, by {what}: {'; '.join(parts)}.")
    if not something_shown:
        return [f"By {what}, no difference is shown in any group, on any endpoint."]
    return sentences


def _others(own, pairs, classes, name: Callable) -> list[str]:
    """Other rows of the table, images with two lesions, and how much maps depend on the class."""
    sentences = []
    for method, metric in OTHERS:
        rows = own[(own["method"] == method) & (own["metric"] == metric)]
        sentences += [verdict(row, "p", name) for row in rows.head(1).to_dict("records")]
    for metric in ("insertion", "deletion"):  # with something else in the place of the pixels
        rows = own[(own["method"] == "hybrid") & (own["metric"] == metric) & ~own["primary"]]
        for row in rows.to_dict("records"):
            sentences.append(f"with {EDITS[row['baseline']]}, {verdict(row, 'p', name)}")
    if pairs is not None and len(pairs):
        rows = pairs[
            (pairs["metric"] == "discrimination")
            & pairs["method"].isin(["hybrid", "layer_cam_shallow"])
        ]
        for row in rows.to_dict("records"):
            row = {"reference": "grad_cam", **row}
            sentences.append(f"on images with two lesions, {verdict(row, 'p', name)}")
    if classes is not None and len(classes):
        rows = classes[classes["metric"] == "class_spearman"].set_index("method")
        parts = [
            f"{rows.loc[m, 'mean']:+.2f} for {name(m)}"
            for m in ("grad_cam", "hybrid", "layer_cam_shallow")
        ]
        n = int(rows["n"].iloc[0])
        sentences.append(
            "maps for the most and the least likely class have the rank correlation "
            f"{listed(parts)} (1: the class does not matter; a constant map counts as 0; n = {n})."
        )
    return [_sentence(text) for text in sentences]


def _notes(own, metrics, network: str, steps: Sequence[int], name: Callable) -> list[str]:
    """How exact the comparison is: the interval's width, further steps, tied pixels."""
    notes = []
    for method in ("hybrid_same", "hybrid"):
        rows = own[(own["method"] == method) & (own["metric"] == "insertion")].head(1)
        for row in rows.to_dict("records"):
            if not np.isnan(row["low"]):
                half = (row["high"] - row["low"]) / 2
                notes.append(
                    f"{row['n']} images tell the difference in insertion between {name(method)} "
                    f"and Grad-CAM to ±{half:.2g}."
                )
    if metrics is None:
        return notes
    if network and "network" in metrics:
        metrics = metrics[metrics["network"] == network]
    if steps:
        notes += _finer_steps(metrics, steps, name)
    ties = metrics[metrics["metric"] == "ties"].groupby("method")["value"].mean()
    if len(ties):
        shares = f"{ties['grad_cam']:.0%} in Grad-CAM, {ties['hybrid']:.0%} in the hybrid"
        notes.append(f"Tied pixels, which go in random order: {shares}.")
    return notes


def _finer_steps(metrics, steps: Sequence[int], name: Callable) -> list[str]:
    """What more steps do to the means: a trapezoid overshoots a curve that falls within its first
    step.
    """
    notes = []
    for metric in ("insertion", "deletion"):
        fine = metrics[metrics["metric"] == f"{metric}_fine"]
        if fine.empty:
            continue
        baseline = fine["baseline"].iloc[0]
        rough = metrics[(metrics["metric"] == metric) & (metrics["baseline"] == baseline)]
        rough = rough[rough["image"].isin(fine["image"])]
        change = fine.groupby("method")["value"].mean() - rough.groupby("method")["value"].mean()
        moved = listed([f"{change[m]:+.4f} for {name(m)}" for m in ("grad_cam", "hybrid")])
        n = fine["image"].nunique()
        text = f"With {steps[1]} steps instead of {steps[0]} the mean {metric} changes by {moved}"
        notes.append(f"{text} (n = {n}).")
    return notes


def read_tables(folder: str | Path) -> dict:
    """The tables of a run as `conclusions` takes them, `conclusions(**read_tables(folder))`. What
    the run did not write is left out; without summary.csv there is nothing to conclude:
    FileNotFoundError.
    """
    folder = Path(folder)
    names = {
        "summary": "summary.csv",
        "controls": "tables/05_controls.csv",
        "by_area": "tables/05_by_area.csv",
    }
    names |= {"by_complexity": "tables/05_by_complexity.csv", "pairs": "tables/05_pairs.csv"}
    names |= {"classes": "tables/05_class_sensitivity.csv", "metrics": "metrics.csv"}
    found = {}
    for name, path in names.items():
        files = [file for file in (folder / path, folder / f"{path}.gz") if file.is_file()]
        if files:
            table = pd.read_csv(files[0])
            found[name] = (
                table.assign(baseline=table["baseline"].fillna(""))
                if "baseline" in table
                else table
            )
    if "summary" not in found:
        raise FileNotFoundError(f"{folder / 'summary.csv'} is not there: notebook 05 writes it.")
    if (folder / "fusion.json").is_file():
        fusion = json.loads((folder / "fusion.json").read_text("utf-8"))
        places = {"deep": "layer", "coarse": "coarse", "shallow": "shallow_layer"}
        if set(places.values()) <= set(fusion):
            found["layers"] = {place: fusion[name] for place, name in places.items()}
    return found


def shortcut_conclusions(exposed, on_cheating, area: float, seed: int = 0) -> str:
    """Whether a person could have found the cheat, as a page: tables/05_shortcut.md.

    exposed: rows of `exposure`. on_cheating: records of `on_marker` for the cheating network. area:
    the marker's share of an image.
    """
    n = exposed["n"].max()
    lines = [
        f"**Could a person have found the cheat?** ({n} images; the marker is {area:.1%} of each.)",
        "",
    ]
    for method in exposed["method"].unique():
        rows = exposed[exposed["method"] == method].set_index("metric")
        lines.append(f"- {_exposed_in_words(method, rows)}")
    three = ["grad_cam", "layer_cam_shallow", "hybrid"]
    energy = on_cheating[(on_cheating["metric"] == "energy") & on_cheating["method"].isin(three)]
    against = statistics.compare(energy.assign(metric="energy_on_the_marker"), "grad_cam", seed)
    lines += ["", "On the cheating network alone, where more on the marker is better:", ""]
    for row in against[against["method"] != "grad_cam"].to_dict("records"):
        lines.append(f"- {verdict(row)}")
    return "\n".join(lines) + "\n"


def _exposed_in_words(method: str, rows) -> str:
    """One method's rows of `exposure`, with the metric as their index."""
    energy = rows.loc["energy"]
    found = rows.loc["found"]
    hottest = rows.loc["hottest"]
    change = "no difference shown"
    if (energy["low"] > 0 or energy["high"] < 0) and energy["p"] < 0.05:
        change = f"{energy['difference']:+.1%} [{energy['low']:+.1%}, {energy['high']:+.1%}]"
    return (
        f"{figures.label(method)}: energy on the marker {energy['honest']:.1%} for the honest "
        f"network, {energy['cheating']:.1%} for the cheating one ({change}); it stands out on "
        f"{found['honest']:.0%} and {found['cheating']:.0%} of the images, and holds the maximum "
        f"on {hottest['honest']:.0%} and {hottest['cheating']:.0%}."
    )
