"""report.html: its sentences follow the numbers, it asks nothing of any host, and its slider is
cam_core's hybrid laid over the image.

Most of this looks at the report of a small run that is made here; what only a browser can tell is
asked of headless Chromium, where there is one.
"""

import base64
import hashlib
import io
import json
import re
import shutil
import sys
from html.parser import HTMLParser

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from browser import Browser, chromium
from PIL import Image

import cam_core as cc
from runner import report

EVIL = "<script>alert(1)</script>"
SHOWN_EVIL = "&lt;script&gt;alert(1)&lt;/script&gt;"
ENDPOINTS = [("insertion", "twin"), ("deletion", "twin"), ("energy", ""), ("average_precision", "")]
FIGURES = [figure[0] for plan in report.FIGURES.values() for figure in plan]
RUN = "0123456789ab"


def measured(gain, n=12):
    """Records of five methods: the hybrid is better than Grad-CAM by `gain`, {metric: how much}."""
    rng = np.random.default_rng(0)
    share = {"grad_cam": 0, "hybrid": 1, "layer_cam_shallow": 0.5, "grad_cam_coarse": 0.5}
    rows = []
    for metric, baseline in ENDPOINTS:
        base = rng.random(n)
        noise = rng.normal(size=n)
        sign = -1 if metric in cc.statistics.LOWER_IS_BETTER else 1
        better = gain.get(metric, 0) + 0.01 * (noise - noise.mean())
        values = {method: base + sign * s * better for method, s in share.items()}
        values["times_sobel"] = base + sign * 0.9
        for method, found in values.items():
            for k, value in enumerate(found):
                about = {"image": f"<i>{k}</i>", "method": method, "value": value}
                rows.append({**about, "metric": metric, "baseline": baseline})
    return pd.DataFrame(rows)


def save(frame, path):
    frame.assign(run=RUN).to_csv(path, index=False)


def make_run(folder, rule="floored", seconds=1.0, masks=True):
    """A finished run in little, with names that are markup."""
    for name in ("tables", "figures", "images", "notebooks"):
        (folder / name).mkdir(parents=True)
    metrics = measured({"energy": 0.2, "average_precision": 0.2, "deletion": -0.1})
    if not masks:
        metrics = metrics[metrics.metric.isin(["insertion", "deletion"])]
    summary = cc.judge(metrics, ENDPOINTS).assign(network="resnet18")
    save(metrics.assign(network="resnet18", label=EVIL), folder / "metrics.csv")
    save(summary, folder / "summary.csv")
    controls = cc.against_controls(metrics, ENDPOINTS)
    save(controls.drop(columns="identical"), folder / "tables/05_controls.csv")
    times = {"method": ["forward", "hybrid"], "seconds": [seconds, 2 * seconds], "ratio": [1, 2.0]}
    save(pd.DataFrame(times).assign(device="cpu", batch=4), folder / "cost.csv")
    columns = ["method", "metric", "n", "mean", "difference", "low", "high", "p"]
    classes = summary[summary.metric == "insertion"].assign(metric="class_spearman")[columns]
    save(classes, folder / "tables/05_class_sensitivity.csv")
    save(classes.assign(metric="discrimination"), folder / "tables/05_pairs.csv")
    (folder / "tables/05_shortcut.md").write_text(f"- One {EVIL} of *two*.\n")
    make_pictures(folder, rule, masks)
    choice = {"alpha": 0.3, "rule": rule, "layer": "layer4", "coarse": "layer3", "n": 2}
    choice |= {"shallow_layer": "layer1", "arch": "resnet18", "share_of_resamples_won": 0.5}
    choice |= {"reason": "chosen on 2 validation images", "weights_sha256": "ab" * 32}
    (folder / "fusion.json").write_text(json.dumps(choice | {"device": "cpu", "run": RUN}))
    given = {"dataset": EVIL, "threads": 2, "baseline": "twin", "fine_steps": 0}
    given |= dict.fromkeys(("alpha", "rule", "layer", "shallow_layer"), "auto")
    entry = {"parameters": given, "run": RUN, "seconds": seconds}
    manifest = {"run": RUN, "commit": "c" * 40, "dirty": True, "python": "3.11"}
    manifest |= {"packages": {"torch": "2"}, "notebooks": {"05_evaluation": entry}, "files": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "notebooks/05_evaluation.ipynb").write_text("{}")
    return folder


def make_pictures(folder, rule, masks):
    """The pictures of a run: figures, five of each image, and what the slider fuses."""
    rng = np.random.default_rng(1)
    for k in range(12):
        image = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
        stem = f"05_{cc.datasets.safe_name(f'<i>{k}</i>')}"
        cc.figures.save_pictures(folder / "images", stem, image, rng.random((7, 7), np.float32))
    for name in FIGURES:
        pixels = rng.integers(0, 256, (30, 90), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"figures/{name}.png")
    maps = torch.from_numpy(rng.random((8, 7, 7), np.float32)) ** 2
    maps[:, :2] = 0  # where the product is zero
    large = (cc.enlarge(maps, (32, 32)).sqrt() * 255).round().byte().numpy()
    place = np.zeros((2, 32, 32), bool)
    place[0, 8:20, 10:30] = masks
    np.savez_compressed(
        folder / "slider.npz",
        ids=np.array(["<i>0</i>", "<i>1</i>"]),
        predicted=np.array([EVIL, "ring"]),
        probability=np.array([0.9, 0.8]),
        maps=large.reshape(2, 4, 32, 32),
        masks=place,
        layers=np.array(["layer3", "layer1", "layer4", "layer4"]),
        alpha=0.3,
        rule=rule,
    )


class Page(HTMLParser):
    """The tags of a page with their attributes."""

    def __init__(self, html):
        super().__init__()
        self.tags = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def policy(self):
        named = [a for a in self.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
        return named[0]["content"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "one")


@pytest.fixture(scope="module")
def html(folder):
    report.write(folder)
    return (folder / "report.html").read_text("utf-8")


def section(html, name):
    found = re.search(rf'<section id="{name}">.*?</section>', html, re.S)
    return found[0] if found else ""


# ---- what it says


def test_the_page_leads_with_the_conclusions_and_the_right_numbers(html, folder):
    found = cc.sentences.conclusions(**cc.sentences.read_tables(folder))
    for sentence in (found.headline, found.fusion):
        assert f"<p>{sentence}</p>" in html.replace("&#39;", "'")
    assert "Exploratory" in html.split("Made from the numbers")[0]
    for row in found.endpoints + found.controls:
        assert row in section(html, "conclusions").replace("&#39;", "'")
    summary = pd.read_csv(folder / "summary.csv")
    for row in summary[summary.primary].itertuples():
        text = f"{row.difference:+.4f} [{row.low:+.4f}, {row.high:+.4f}]"
        assert text in section(html, "numbers")
    fused = "the floored product of <strong>Grad-CAM at layer3</strong> and <strong>LayerCAM at"
    assert f"{fused} layer1</strong> with α = 0.3 (chosen on 2 validation images)" in html


@pytest.mark.parametrize("slider", [True, False])
def test_notebook_05_alone_with_a_given_alpha_has_its_report(tmp_path, slider, monkeypatch):
    """`--only 05 -p alpha 0.5` into a new folder: nobody chose a fusion, so there is no reason."""
    folder = make_run(tmp_path / "one")
    (folder / "fusion.json").unlink()
    if not slider:
        (folder / "slider.npz").unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["notebooks"]["05_evaluation"]["parameters"]["alpha"] = 0.5
    (folder / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(sys, "argv", ["report", str(folder)])
    report.main()
    assert "The hybrid is better" in (folder / "report.html").read_text("utf-8")
    used = report.settings_of(report.read_run(folder, manifest))
    assert used.get("reason") == ("alpha given as a parameter" if slider else None)


def test_failures_are_the_largest_losses_in_metrics_csv(html, folder):
    metrics = pd.read_csv(folder / "metrics.csv")
    wide = metrics.pivot(index="image", columns=["method", "metric"], values="value")
    gain = (wide["hybrid"] - wide["grad_cam"])[["insertion", "deletion"]]
    gain = (gain.insertion - gain.deletion).sort_values()
    found = re.findall(r"<h3>&lt;i&gt;(\d+)&lt;/i&gt;: (-[\d.]+)</h3>", section(html, "failures"))
    expected = [(image, f"{value:+.4f}") for image, value in gain.head(4).items()]
    assert [(f"<i>{k}</i>", v) for k, v in found] == expected
    assert section(html, "failures").count("data:image/webp") == 2 * 4 + 1


def test_provenance_has_what_it_takes_to_make_it_again(html):
    part = section(html, "provenance")
    commit = "c" * 40 + ", with changes that were not committed"
    for fact in (RUN, commit, "ab" * 32, "<dd>2</dd>", "3.11"):
        assert fact in part, fact


# ---- nothing from elsewhere, nothing that runs, nothing unsaid


def test_nothing_is_requested_and_only_the_own_style_and_script_are_allowed(html):
    page = Page(html)
    names = ("src", "href", "srcset", "action", "data", "poster")
    links = [attributes[k] for _, attributes in page.tags for k in names if attributes.get(k)]
    assert len(links) > 20
    for link in links:
        assert re.fullmatch(r"data:(image/webp;base64)?,[\w+/=]*|#\w+|\w[\w./]*", link), link[:80]
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/1998/Math/MathML)", html)
    policy = page.policy()
    assert policy.startswith("default-src 'none'; img-src data:;") and "unsafe" not in policy
    code = re.findall(r"<(style|script)>(.*?)</\1>", html, re.S)
    assert [kind for kind, _ in code] == ["style", "script"]
    for kind, inner in code:
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    handlers = [name for _, attributes in page.tags for name in attributes]
    assert not [name for name in handlers if name.startswith("on") or name == "style"]


def test_names_are_shown_as_they_read(html):
    page = Page(html)
    assert len(page.all("script")) == 2 and not page.all("i") and EVIL not in html
    assert SHOWN_EVIL in section(html, "shortcut") and SHOWN_EVIL in section(html, "provenance")
    data = json.loads(re.search(r'id="slider-data">(.*?)</script>', html, re.S)[1])
    assert data["images"][0]["seen"] == f"{EVIL}, p = 0.90"


def test_every_picture_has_words_and_every_figure_its_n_and_interval(html):
    pictures = [a for a in Page(html).all("img") if a.get("id") != "large-picture"]
    assert len(pictures) == len(FIGURES) + 2 * 4
    assert all(len(attributes["alt"]) > 10 for attributes in pictures)
    captions = re.findall(r"<figcaption>(.{30,}?)</figcaption>", html)
    assert len(captions) == len(FIGURES)
    for text in captions:
        assert "interval" in text and re.search(r"\bn (=|of)|[Ss]ingle|n as given", text), text


def test_the_page_stays_small(html):
    assert len(html) < 5_000_000


# ---- equal runs, partial runs


def test_equal_runs_give_equal_bytes_but_for_the_section_of_timings(html, folder, tmp_path):
    other = make_run(tmp_path / "two", seconds=7.5)
    assert report.build(other, timings=False) == report.build(folder, timings=False)
    slower = report.build(other)
    assert "7.5000" in section(slower, "cost") and slower != html
    cut = [re.sub(r'<section id="cost">.*?</section>', "", h, flags=re.S) for h in (slower, html)]
    assert cut[0] == cut[1]


@pytest.mark.parametrize(
    ("gone", "lost", "message"),
    [
        (["summary.csv", "metrics.csv"], ["numbers"], "./run_all.sh --only 05"),
        (["slider.npz"], ["slider"], "The slider"),
        (["fusion.json", "slider.npz"], ["slider"], "Run notebook 04"),
        (["cost.csv", "manifest.json"], ["cost", "provenance"], "cost.csv"),
        (["figures", "tables"], ["maps", "curves", "sanity"], "figures/05_methods.png"),
        (["images"], ["slider"], "pictures in images/"),
    ],
)
def test_a_run_without_a_part_tells_how_to_get_it(folder, html, tmp_path, gone, lost, message):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for name in gone:
        shutil.rmtree(copy / name) if (copy / name).is_dir() else (copy / name).unlink()
    without = report.build(copy)
    for name in lost:
        assert section(html, name) and not section(without, name), name
        assert f'href="#{name}"' not in without
    assert message in section(without, "missing") and message not in section(html, "missing")


def test_a_run_of_05_alone_with_a_given_alpha_has_a_report(folder, tmp_path):
    """./run_all.sh --only 05 -p alpha 0.5 into a new folder: there is no choice of notebook 04."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "fusion.json").unlink()
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["notebooks"]["05_evaluation"]["parameters"]["alpha"] = 0.3
    without = report.build(copy, manifest)
    assert "with α = 0.3 (alpha given as a parameter)" in without
    assert section(without, "numbers") and section(without, "slider")


def test_photographs_without_masks_have_no_localisation(tmp_path):
    html = report.build(make_run(tmp_path / "photos", masks=False))
    assert "masks/" in section(html, "missing") and "energy" not in section(html, "numbers")
    assert "contours are the true masks" not in html


def test_a_run_without_notebook_05_has_a_report(tmp_path):
    entry = {"run": RUN, "parameters": {}, "seconds": 1}
    manifest = {"run": RUN, "notebooks": {"02_gradcam": entry}}
    html = report.build(tmp_path, manifest)
    assert RUN in html and "no answer" in html and "Run notebook 05" in section(html, "missing")
    assert not section(html, "numbers") and section(html, "provenance")


def test_from_the_shell_it_writes_the_page_and_its_hash(folder, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    monkeypatch.setattr(sys, "argv", ["report", str(copy)])
    report.main()
    listed = json.loads((copy / "manifest.json").read_text())["files"]["report.html"]
    assert listed["sha256"] == hashlib.sha256((copy / "report.html").read_bytes()).hexdigest()
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path)])
    with pytest.raises(SystemExit, match="holds no run"):
        report.main()


# ---- executed notebooks as pages


def test_a_notebook_becomes_a_page_without_code_scripts_and_requests(tmp_path):
    new = nbformat.v4
    code = new.new_code_cell('fig = cc.figures.curves(t, "x")\nrun.save_figure(fig, "05_curves")')
    widget = {"application/vnd.jupyter.widget-view+json": {"model_id": "a"}, "text/plain": "Slider"}
    script = {"application/javascript": "alert(1)", "text/plain": "<js>"}
    table = f"<style>td {{}}</style><table><tr><td onclick='x()'>{EVIL}</td></tr></table>"
    text = {"text/markdown": f"**{EVIL}** $a^2$"}
    shown = [
        {"image/png": "", "text/plain": "<Figure>"},
        widget,
        script,
        {"text/html": table},
        text,
    ]
    code.outputs = [new.new_output("display_data", data=data) for data in shown]
    code.outputs.append(new.new_output("stream", text=f"told {EVIL}"))
    words = "## Curves\n\n$$ \\frac{a}{b} $$ of `$c$`, ![x](https://example.org/x.png) "
    words += "[y](javascript:alert) <b>z</b>"
    cells = [new.new_markdown_cell(words), code, new.new_code_cell("silent = 1")]
    book = new.new_notebook(cells=cells, metadata={"widgets": {"a": {}}})
    nbformat.write(book, tmp_path / "05_x.ipynb")
    html = report.notebook_page(tmp_path / "05_x.ipynb", RUN)
    page = Page(html)
    for gone in ("save_figure", "silent", "Slider", "&lt;js&gt;"):
        assert gone not in html
    assert html.count("<math ") == 2 and "<mfrac>" in html and "<code>$c$</code>" in html
    assert not page.all("script") and not page.all("b") and html.count(SHOWN_EVIL[:27]) == 3
    assert not re.search(r"javascript:|onclick|cdn|unpkg|src=\"http", html)
    assert [attributes["alt"] for attributes in page.all("img")] == ["Curves: 05_curves"]
    assert "script-src" not in page.policy() and "default-src 'none'" in page.policy()


# ---- what a browser shows


@pytest.fixture(scope="module")
def browser():
    if chromium() is None:
        pytest.skip("no Chromium here (apt install chromium): what the page draws is not seen")
    opened = Browser()
    yield opened
    opened.close()


DRAWN = "document.documentElement.dataset.drawn === location.hash"


def canvas(browser, name="fused"):
    uri = browser.ask(f"document.getElementById('canvas-{name}').toDataURL()")
    data = base64.b64decode(uri.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def image_of(folder, k):
    """The image as the slider has it."""
    path = folder / "images" / f"05_{cc.datasets.safe_name(f'<i>{k}</i>')}_original.png"
    with Image.open(path) as opened:
        return np.asarray(opened.resize((32, 32)))


@pytest.mark.parametrize(
    ("kind", "alpha", "rule"),
    [(0, 0.3, "floored"), (0, 0.5, "product"), (1, 0.7, "product"), (1, 1, "floored")],
)
def test_the_slider_draws_what_cam_core_computes(browser, html, folder, kind, alpha, rule):
    place = f"#alpha={alpha}&image=1&hybrid={kind}&rule={int(rule == 'floored')}&opacity=0.6"
    browser.open(f"file://{folder}/report.html{place}")
    browser.wait(DRAWN)
    with np.load(folder / "slider.npz") as stored:
        maps = torch.from_numpy(stored["maps"][1, 2 * kind : 2 * kind + 2])
    maps = (maps.float() / 255) ** 2
    fused = cc.hybrid(maps[:1], maps[1:], alpha, rule=rule)[0]
    image = image_of(folder, 1)
    for name, cam in {"first": maps[0], "second": maps[1], "fused": fused}.items():
        cam = cam / cam.max()
        off = np.abs(canvas(browser, name) - cc.figures.overlay(image, cam, 0.6).astype(int))
        assert (off <= 1).mean() > 0.99 and off.max() <= 4, "between two colours it may be either"
    assert np.array_equal(canvas(browser, "image"), image)


def test_zero_attribution_leaves_the_picture_as_it_is(browser, html, folder):
    browser.open(f"file://{folder}/report.html#image=1&hybrid=0&opacity=1")
    browser.wait(DRAWN)
    with np.load(folder / "slider.npz") as stored:
        stored = stored["maps"][1, 0]
    image = image_of(folder, 1)
    drawn = canvas(browser, "first")
    assert (stored == 0).sum() > 50 and np.array_equal(drawn[stored == 0], image[stored == 0])
    top = np.unravel_index(stored.argmax(), stored.shape)
    hottest = cc.figures.colours(np.ones((1, 1)))[0, 0]
    assert np.array_equal(drawn[top], hottest), "full opacity at the maximum shows its colour alone"
    browser.open(f"file://{folder}/report.html#image=1&hybrid=0&opacity=0.5")
    browser.wait(DRAWN)
    half = (image[top].astype(int) + hottest) / 2
    assert np.abs(canvas(browser, "first")[top] - half).max() <= 0.5


def test_the_slider_moves_the_picture_and_the_contour_is_the_mask(browser, html, folder):
    browser.open(f"file://{folder}/report.html#alpha=0.5&image=0&contour=0")
    browser.wait(DRAWN)
    before = canvas(browser)
    browser.ask("document.getElementById('alpha').focus()")
    browser.press("ArrowRight", 39)
    browser.wait("document.getElementById('alpha-value').textContent === '0.51'")
    after = canvas(browser)
    assert (before != after).any()
    browser.ask("document.getElementById('contour').click()")
    white = (canvas(browser) == 255).all(2)
    edge = np.zeros((32, 32), bool)
    edge[8:20, 10:30] = True
    edge[9:19, 11:29] = False
    assert white[edge].all() and np.array_equal(canvas(browser)[~edge], after[~edge])


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (360, True)])
def test_the_page_loads_alone_and_fits(browser, html, folder, width, dark):
    browser.open(f"file://{folder}/report.html", width, dark=dark)
    browser.wait("document.documentElement.dataset.drawn")
    assert browser.requests == [f"file://{folder}/report.html"] and browser.complaints == []
    empty = "[...document.images].filter((i) => i.id !== 'large-picture' && !i.naturalWidth).length"
    assert browser.ask(empty) == 0 and browser.ask("document.images.length") > 10
    browser.ask("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert browser.ask("document.documentElement.scrollWidth") == width, "only tables scroll"
    paper = browser.ask("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper))) < 150) == dark


def test_the_policy_stops_what_does_not_belong_here(browser, html, tmp_path):
    planted = "<main><script>document.title = 'sprung'</script><img src='http://127.0.0.1:9/x.png'>"
    (tmp_path / "report.html").write_text(html.replace("<main>", planted), "utf-8")
    browser.open(f"file://{tmp_path}/report.html")
    browser.wait("document.documentElement.dataset.drawn")
    assert browser.ask("document.title") != "sprung" and len(browser.complaints) >= 2


def test_tables_sort_by_click_and_by_keyboard(browser, html, folder):
    browser.open(f"file://{folder}/report.html")
    table = "document.querySelectorAll('table.sortable')[0]"
    column = f"[...{table}.tBodies[0].rows].map((row) => row.cells[2].textContent)"
    head = f"{table}.tHead.rows[0].cells[2]"
    state = f"{head}.getAttribute('aria-sort')"
    first = [float(v) for v in browser.ask(column)]
    assert first != sorted(first) and browser.ask(state) is None
    browser.ask(f"{head}.querySelector('button').click()")
    assert [float(v) for v in browser.ask(column)] == sorted(first)
    assert browser.ask(state) == "ascending"
    browser.ask(f"{head}.querySelector('button').focus()")
    browser.press("Enter", 13, "\r")
    assert [float(v) for v in browser.ask(column)] == sorted(first, reverse=True)


def test_a_picture_opens_large_by_keyboard_and_closes_again(browser, html, folder):
    browser.open(f"file://{folder}/report.html")
    browser.ask("document.querySelector('.zoom').focus()")
    browser.press("Enter", 13, "\r")
    assert browser.ask("document.querySelector('dialog').open")
    large = "document.getElementById('large-picture')"
    assert browser.ask(f"{large}.alt") == browser.ask("document.images[0].alt")
    browser.wait(f"{large}.naturalWidth === 90")
    browser.press("Escape", 27)
    browser.wait("!document.querySelector('dialog').open")
    assert browser.complaints == []
