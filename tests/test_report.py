"""report.html: its sentences follow the numbers, it asks nothing of any host, and its slider is cam_core.hybrid.

Most of this looks at the report of a small run that is made here; what only a browser can tell is asked of headless
Chromium, where there is one."""

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
import report

EVIL = "<script>alert(1)</script>"
ENDPOINTS = (("insertion", "twin"), ("deletion", "twin"), ("energy", ""), ("average_precision", ""))
FIGURES = "05_differences 05_controls 05_methods 05_curves 05_by_area 05_failures 05_randomisation 05_pairs".split()
CONTROLS = ["layer_cam_shallow", "grad_cam_coarse", "times_sobel"]


def measured(gain, n=12):
    """Values of all methods: the hybrid's are better than Grad-CAM's by `gain`, {metric: by how much}."""
    rng, rows = np.random.default_rng(0), []
    for metric, baseline in ENDPOINTS:
        base, noise, sign = rng.random(n), rng.normal(size=n), -1 if metric in cc.LOWER_IS_BETTER else 1
        better = gain.get(metric, 0) + 0.01 * (noise - noise.mean())
        for m, share in (("grad_cam", 0), ("hybrid", 1), ("layer_cam_shallow", 0.5), ("grad_cam_coarse", 0.5)):
            values = base + sign * share * better
            rows += [dict(image=f"<i>{k}</i>", method=m, metric=metric, baseline=baseline, value=v)
                     for k, v in enumerate(values)]  # fmt: skip
        rows += [dict(image=f"<i>{k}</i>", method="times_sobel", metric=metric, baseline=baseline, value=v + sign * 0.9)
                 for k, v in enumerate(base)]  # fmt: skip
    return pd.DataFrame(rows)


def judged(metrics):
    """summary.csv and tables/05_controls.csv as notebook 05 makes them."""
    summary = cc.compare(metrics, "grad_cam", resamples=2000).assign(network="resnet18")
    summary["primary"] = summary.method == "hybrid"
    summary["p_holm"] = np.nan
    summary.loc[summary.primary, "p_holm"] = cc.holm(summary.loc[summary.primary, "p"])
    pairs = [metrics[metrics.method.isin([c, "hybrid"])] for c in CONTROLS]
    tables = pd.concat([cc.compare(pair, c, resamples=2000) for c, pair in zip(CONTROLS, pairs, strict=True)])
    tables = tables[tables.method == "hybrid"].reset_index(drop=True)
    return summary, tables.drop(columns=["identical", "effect", "method", "baseline"])


def save(frame, path):
    frame.assign(run="0123456789ab").to_csv(path, index=False)


def make_run(folder, rule="floored", seconds=1.0, masks=True):
    """A finished run in little, with names that are markup."""
    for name in ("tables", "figures", "images", "notebooks"):
        (folder / name).mkdir(parents=True)
    metrics = measured({"energy": 0.2, "average_precision": 0.2, "deletion": -0.1})
    summary, controls = judged(metrics)
    if not masks:
        metrics, summary = (t[t.metric.isin(["insertion", "deletion"])] for t in (metrics, summary))
    save(metrics.assign(network="resnet18", label=EVIL), folder / "metrics.csv")
    save(summary, folder / "summary.csv")
    save(controls, folder / "tables/05_controls.csv")
    cost = pd.DataFrame({"method": ["forward", "hybrid"], "seconds": [seconds, 2 * seconds], "ratio": [1, 2.0]})
    save(cost.assign(device="cpu", batch=4), folder / "cost.csv")
    classes = summary[summary.metric == "insertion"].assign(metric="class_spearman", baseline="")
    save(classes[["method", "metric", "n", "mean", "difference", "low", "high", "p"]],
         folder / "tables/05_class_sensitivity.csv")  # fmt: skip
    pairs = classes.assign(metric="discrimination")
    save(pairs[["method", "metric", "n", "mean", "difference", "low", "high", "p"]], folder / "tables/05_pairs.csv")
    (folder / "tables/05_conclusions.md").write_text(f"*Exploratory: {EVIL}.*\n\n**All**\n- One {EVIL} of *two*.\n")
    rng = np.random.default_rng(1)
    for k in range(12):
        image = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
        cc.save_pictures(folder / "images", f"05_{cc.safe_name(f'<i>{k}</i>')}", image, rng.random((7, 7), np.float32))
    for name in FIGURES:
        Image.fromarray(rng.integers(0, 256, (30, 90), dtype=np.uint8)).save(folder / f"figures/{name}.png")
    maps = torch.from_numpy(rng.random((8, 7, 7), np.float32)) ** 2
    maps[:, :2] = 0  # where the product is zero
    large = (cc.enlarge(maps, (32, 32)).sqrt() * 255).round().byte().numpy().reshape(2, 4, 32, 32)
    place = np.zeros((2, 32, 32), bool)
    place[0, 8:20, 10:30] = masks
    np.savez_compressed(
        folder / "slider.npz", ids=np.array(["<i>0</i>", "<i>1</i>"]), predicted=np.array([EVIL, "ring"]), maps=large,
        probability=np.array([0.9, 0.8]), masks=place, layers=np.array(["layer3", "layer1", "layer4", "layer4"]),
        alpha=0.3, rule=rule, run=np.bytes_("0123456789ab"))  # fmt: skip
    fusion = dict(alpha=0.3, rule=rule, layer="layer4", coarse="layer3", shallow_layer="layer1", n=2, arch="resnet18")
    fusion |= dict(reason="chosen on 2 validation images", weights_sha256="ab" * 32, device="cpu")
    (folder / "fusion.json").write_text(json.dumps(fusion | {"share_of_resamples_won": 0.5, "run": "0123456789ab"}))
    entry = {"parameters": {"dataset": EVIL, "threads": 2, "alpha": "auto"}, "run": "0123456789ab", "seconds": seconds}
    manifest = {"run": "0123456789ab", "commit": "c" * 40, "dirty": True, "python": "3.11", "packages": {"torch": "2"}}
    manifest |= {"notebooks": {"05_evaluation": entry}, "files": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "notebooks/05_evaluation.ipynb").write_text("{}")
    return folder


class Page(HTMLParser):
    """The tags of a page with their attributes, and the text of its captions, styles and scripts."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.texts.append([tag, ""])

    def handle_data(self, data):
        if self.texts:
            self.texts[-1][1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def said(self, tag):
        return [text for name, text in self.texts if name == tag]


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


# ---- sentences


def told(metrics):
    summary, controls = judged(metrics)
    return report.answer(summary[summary.primary].to_dict("records"), controls)


def swapped(metrics):
    """The two methods' values exchanged."""
    return metrics.replace({"method": {"grad_cam": "hybrid", "hybrid": "grad_cam"}})


def test_the_answer_follows_the_numbers_and_flips_with_the_columns():
    metrics = measured({"energy": 0.2, "deletion": 0.1, "average_precision": -0.1})
    first, second = told(metrics)
    assert first == ("The hybrid is better than Grad-CAM on deletion and energy; it is worse than Grad-CAM on average "
                     "precision; it is not shown to differ from it on insertion (n = 12 images).")  # fmt: skip
    assert "in deletion Grad-CAM × Sobel is better still; in energy Grad-CAM × Sobel is better still" in second
    assert "the 3 maps" in second and "exploratory" in second
    first, second = told(swapped(metrics))
    assert first == ("The hybrid is better than Grad-CAM on average precision; it is worse than Grad-CAM on deletion "
                     "and energy; it is not shown to differ from it on insertion (n = 12 images).")  # fmt: skip
    assert "in average precision" in second and "in energy" not in second


def test_the_answer_says_what_no_control_reaches_and_what_was_not_asked():
    metrics = measured({"energy": 0.2})
    summary, controls = judged(metrics[metrics.method != "times_sobel"].pipe(lambda t: pd.concat([t, t[
        t.method == "grad_cam"].assign(method="times_sobel")])))  # fmt: skip
    head = summary[summary.primary].to_dict("records")
    assert "in energy the gain stays against all of them" in report.answer(head, controls)[1]
    assert report.answer(head, None)[1] == "Whether that is the fusion's doing was not measured in this run."


def test_on_null_data_the_answer_claims_nothing():
    for metrics in (measured({}), swapped(measured({}))):
        first, second = told(metrics)
        assert first == ("The hybrid is not shown to differ from Grad-CAM on insertion, deletion, energy and average "
                         "precision (n = 12 images).")  # fmt: skip
        assert second == "No gain over Grad-CAM is shown, so there is none to put down to the fusion."
    same = measured({}).assign(value=0.5)
    assert "identical to it on insertion" in told(same)[0] and "better" not in told(same)[0]


def test_the_page_leads_with_the_answer_and_the_right_numbers(html, folder):
    summary, controls = judged(measured({"energy": 0.2, "average_precision": 0.2, "deletion": -0.1}))
    head = summary[summary.primary]
    for sentence in report.answer(head.to_dict("records"), controls):
        assert f"<p>{sentence.replace(chr(39), '&#39;')}</p>" in html
    for row in head.itertuples():
        text = f"{row.difference:+.4f} [{row.low:+.4f}, {row.high:+.4f}]"
        assert html.count(text) >= 2, f"{row.metric}: in the table and in the sentence"
    assert "the floored product of <strong>Grad-CAM at layer3</strong> and <strong>LayerCAM at layer1</strong>" in html
    assert "with α = 0.3 (chosen on 2 validation images)" in html


def test_failures_are_the_largest_losses_in_metrics_csv(html, folder):
    metrics = pd.read_csv(folder / "metrics.csv").fillna("")
    wide = metrics[metrics.baseline == "twin"].pivot(index="image", columns=["method", "metric"], values="value")
    loss = wide["hybrid", "insertion"] - wide["hybrid", "deletion"]
    loss = (loss - wide["grad_cam", "insertion"] + wide["grad_cam", "deletion"]).sort_values()
    shown = re.findall(r"<h3>&lt;i&gt;(\d+)&lt;/i&gt;: (-[\d.]+)</h3>", section(html, "failures"))
    assert [(f"<i>{k}</i>", v) for k, v in shown] == [(k, f"{v:+.4f}") for k, v in loss.head(4).items()]
    assert section(html, "failures").count("data:image/webp") == 2 * 4 + 1


# ---- nothing from elsewhere, nothing that runs, nothing unsaid


def test_nothing_is_requested_and_only_the_own_style_and_script_are_allowed(html):
    page = Page(html)
    links = [a[k] for _, a in page.tags for k in ("src", "href", "srcset", "action", "data", "poster") if a.get(k)]
    assert len(links) > 20
    for link in links:
        assert re.fullmatch(r"data:(image/webp;base64)?,[\w+/=]*|#\w+|\w[\w./]*", link), link[:80]
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/1998/Math/MathML)", html)
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;") and "unsafe" not in policy
    code = re.findall(r"<(style|script)>(.*?)</\1>", html, re.S)
    assert [kind for kind, _ in code] == ["style", "script"]
    for kind, inner in code:
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert not [name for _, a in page.tags for name in a if name.startswith("on") or name == "style"]


def test_names_are_shown_as_they_read(html):
    page = Page(html)
    assert len(page.all("script")) == 2 and not page.all("i") and EVIL not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in section(html, "said")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in section(html, "provenance")
    data = json.loads(re.search(r'id="slider-data">(.*?)</script>', html, re.S)[1])
    assert data["images"][0]["seen"] == f"{EVIL}, p = 0.90"


def test_every_picture_has_words_and_every_panel_its_n_and_interval(html):
    page = Page(html)
    pictures = page.all("img")
    assert len(pictures) == len(FIGURES) + 2 * 4 + 1
    assert all(len(a["alt"]) > 10 for a in pictures if a.get("id") != "large-picture")
    panels = [text.strip() for text in page.said("figcaption") if text.strip()]
    panels = [text for text in panels if text not in ("the image", "the hybrid laid over it")]  # said above the cards
    assert len(panels) == len(FIGURES)
    for text in [*panels, *[t for t in page.said("caption") + page.said("span") if "ifference" in t]]:
        assert "interval" in text and re.search(r"\bn (=|of)|[Ss]ingle|all rows", text), text
    assert "Single images, so no interval" in section(html, "failures")


def test_provenance_has_what_it_takes_to_make_it_again(html):
    part = section(html, "provenance")
    for fact in ("0123456789ab", "c" * 40 + ", with changes that were not committed", "ab" * 32, "<dd>2</dd>", "3.11"):
        assert fact in part, fact


def test_the_page_stays_small(html):
    assert len(html) < 5_000_000


# ---- equal runs, partial runs


def test_equal_runs_give_equal_bytes_but_for_the_section_of_timings(html, folder, tmp_path):
    other = make_run(tmp_path / "two", seconds=7.5)
    assert report.build(other, timings=False) == report.build(folder, timings=False)
    assert report.build(other) != html
    cut = [re.sub(r'<section id="cost">.*?</section>', "", text, flags=re.S) for text in (report.build(other), html)]
    assert cut[0] == cut[1] and "7.5000" in section(report.build(other), "cost")


@pytest.mark.parametrize(
    ("gone", "lost", "said"),
    [
        (["summary.csv", "metrics.csv"], ["numbers"], "./run_all.sh --only 05"),
        (["slider.npz"], ["slider"], "The slider"),
        (["fusion.json", "slider.npz"], ["slider"], "Run notebook 04"),
        (["cost.csv", "manifest.json"], ["cost", "provenance"], "cost.csv"),
        (["figures", "tables"], ["maps", "curves", "said", "sanity"], "figures/05_methods.png"),
        (["images"], ["slider"], "pictures in images/"),
    ],
)
def test_a_run_without_a_part_says_so_and_how_to_get_it(folder, tmp_path, gone, lost, said):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    whole = report.build(copy)
    for name in gone:
        shutil.rmtree(copy / name) if (copy / name).is_dir() else (copy / name).unlink()
    html = report.build(copy)
    for name in lost:
        assert section(whole, name) and not section(html, name), name
        assert f'href="#{name}"' not in html
    assert said in section(html, "missing") and said not in section(whole, "missing")
    assert "params/shortcut.yaml" in section(whole, "missing"), "the whole one has no network that cheats either"


def test_photographs_without_masks_have_no_localisation(tmp_path):
    html = report.build(make_run(tmp_path / "photos", masks=False))
    assert "masks/" in section(html, "missing") and "energy" not in section(html, "numbers")
    assert "contours are the true masks" not in html


def test_a_run_of_one_notebook_alone_has_a_report(tmp_path):
    entry = {"run": "feedfeedfeed", "parameters": {}, "seconds": 1}
    manifest = {"run": "feedfeedfeed", "notebooks": {"02_gradcam": entry}}
    html = report.build(tmp_path, manifest)
    assert "feedfeedfeed" in html and "no answer" in html and "Run notebook 05" in section(html, "missing")
    assert not section(html, "numbers") and section(html, "provenance")


def test_from_the_shell_it_writes_the_page_and_its_hash(folder, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    monkeypatch.setattr(sys, "argv", ["report.py", str(copy)])
    report.main()
    listed = json.loads((copy / "manifest.json").read_text())["files"]["report.html"]
    assert listed["sha256"] == hashlib.sha256((copy / "report.html").read_bytes()).hexdigest()
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="holds no run"):
        report.main()


# ---- executed notebooks as pages


def test_a_notebook_becomes_a_page_without_code_scripts_and_requests(tmp_path):
    new = nbformat.v4
    code = new.new_code_cell('cc.save_figure(fig, out / "figures" / "05_curves.png")')
    pixel = base64.b64encode(io.BytesIO(b"").getvalue()).decode()
    widget = {"application/vnd.jupyter.widget-view+json": {"model_id": "a"}, "text/plain": "IntSlider()"}
    script = {"application/javascript": "alert(1)", "text/plain": "<js>"}
    table = {"text/html": f"<style>td {{}}</style><table><tr><td onclick='x()'>{EVIL}</td></tr></table>"}
    said = {"text/markdown": f"**{EVIL}** $a^2$"}
    shown = [{"image/png": pixel, "text/plain": "<Figure>"}, widget, script, table, said]
    code.outputs = [new.new_output("display_data", data=data) for data in shown]
    code.outputs.append(new.new_output("stream", text=f"said {EVIL}"))
    words = new.new_markdown_cell("## Curves\n\n$$ \\frac{a}{b} $$ of `$c$`, ![x](https://example.org/x.png) "
                                  "[y](javascript:alert) <b>z</b>")  # fmt: skip
    book = new.new_notebook(cells=[words, code, new.new_code_cell("silent = 1")], metadata={"widgets": {"a": {}}})
    nbformat.write(book, tmp_path / "05_x.ipynb")
    html = report.notebook_page(tmp_path / "05_x.ipynb", "0123456789ab")
    page = Page(html)
    assert "save_figure" not in html and "silent" not in html and "IntSlider" not in html and "&lt;js&gt;" not in html
    assert html.count("<math ") == 2 and "<mfrac>" in html and "<code>$c$</code>" in html
    assert not page.all("script") and not page.all("b") and html.count("&lt;script&gt;alert(1)") == 3
    assert not re.search(r"javascript:|onclick|cdn|unpkg|src=\"http", html)
    assert [a["alt"] for a in page.all("img")] == ["Curves: 05_curves"]
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv"))
    assert "script-src" not in policy and "default-src 'none'" in policy and "0123456789ab" in html


# ---- what a browser shows


@pytest.fixture(scope="module")
def browser():
    if chromium() is None:
        pytest.skip("no Chromium here (apt install chromium): what the page draws is not looked at")
    opened = Browser()
    yield opened
    opened.close()


DRAWN = "document.documentElement.dataset.drawn === location.hash"


def canvas(browser, name="fused"):
    uri = browser.ask(f"document.getElementById('canvas-{name}').toDataURL()")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB"))


@pytest.mark.parametrize("kind", [0, 1], ids=["hybrid", "same-layer"])
@pytest.mark.parametrize("alpha", [0, 0.3, 0.5, 1])
@pytest.mark.parametrize("rule", ["product", "floored"])
def test_the_slider_draws_what_cam_core_computes(browser, html, folder, kind, alpha, rule):
    rules = ["product", "floored"]
    place = f"#alpha={alpha}&image=1&hybrid={kind}&rule={rules.index(rule)}&opacity=0.4&contour=0"
    browser.open(f"file://{folder}/report.html{place}")
    browser.wait(DRAWN)
    with np.load(folder / "slider.npz") as stored:
        maps = (torch.from_numpy(stored["maps"][1, 2 * kind : 2 * kind + 2]).float() / 255) ** 2
    with Image.open(folder / "images" / f"05_{cc.safe_name('<i>1</i>')}_original.png") as opened:
        image = np.asarray(opened.resize((32, 32)))
    overlays = {"first": maps[0], "second": maps[1], "fused": cc.hybrid(maps[:1], maps[1:], alpha, rule=rule)[0]}
    for name, cam in overlays.items():
        off = np.abs(canvas(browser, name) - cc.overlay(image, cam).astype(int))
        assert (off <= 1).mean() > 0.99 and off.max() <= 4, "a value between two colours may fall on either side"
    assert np.array_equal(canvas(browser, "image"), image)
    if alpha in (0, 1):
        assert np.array_equal(canvas(browser), canvas(browser, "first" if alpha == 1 else "second"))


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
    box = "document.getElementById('pick-hybrid')"
    browser.ask(f"{box}.value = 1; {box}.dispatchEvent(new Event('change'))")
    assert browser.ask("document.getElementById('alpha-value').textContent") == f"{cc.PRIOR_ALPHA:.2f}"


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (360, False), (360, True)])
def test_the_page_loads_alone_and_fits(browser, html, folder, width, dark):
    browser.open(f"file://{folder}/report.html", width, dark=dark)
    browser.wait("document.documentElement.dataset.drawn")
    assert browser.requests == [f"file://{folder}/report.html"] and browser.complaints == []
    assert browser.ask("[...document.images].filter((i) => i.id !== 'large-picture' && !i.naturalWidth).length") == 0
    assert browser.ask("document.images.length") > 10
    browser.ask("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert browser.ask("document.documentElement.scrollWidth") == width, "only tables scroll, in their own box"
    assert browser.ask("document.querySelector('.scroll').scrollWidth > 300")
    paper = browser.ask("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper))) < 150) == dark
    assert browser.ask("getComputedStyle(document.querySelector('.zoom')).backgroundColor") == "rgb(255, 255, 255)"


def test_the_policy_stops_what_does_not_belong_here(browser, html, folder, tmp_path):
    (tmp_path / "report.html").write_text(html.replace("<main>", "<main><script>document.title = 'sprung'</script>"
                                                       "<img src='http://127.0.0.1:9/x.png'>"), "utf-8")  # fmt: skip
    browser.open(f"file://{tmp_path}/report.html")
    browser.wait("document.documentElement.dataset.drawn")
    assert browser.ask("document.title") != "sprung" and len(browser.complaints) >= 2


def test_tables_sort_by_click_and_by_keyboard(browser, html, folder):
    browser.open(f"file://{folder}/report.html")
    table = "document.querySelectorAll('table.sortable')[0]"
    column = f"[...{table}.tBodies[0].rows].map((row) => row.cells[2].textContent)"
    button = f"{table}.tHead.rows[0].cells[2].querySelector('button')"
    state = f"{table}.tHead.rows[0].cells[2].getAttribute('aria-sort')"
    first = [float(v) for v in browser.ask(column)]
    assert first != sorted(first) and browser.ask(state) is None
    browser.ask(f"{button}.click()")
    assert [float(v) for v in browser.ask(column)] == sorted(first) and browser.ask(state) == "ascending"
    browser.ask(f"{button}.focus()")
    browser.press("Enter", 13, "\r")
    assert [float(v) for v in browser.ask(column)] == sorted(first, reverse=True)
    assert browser.ask(state) == "descending"


def test_a_picture_opens_large_by_keyboard_and_closes_again(browser, html, folder):
    browser.open(f"file://{folder}/report.html")
    browser.ask("document.querySelector('.zoom').focus()")
    browser.press("Enter", 13, "\r")
    assert browser.ask("document.querySelector('dialog').open")
    assert browser.ask("document.getElementById('large-picture').alt") == browser.ask("document.images[0].alt")
    browser.wait("document.getElementById('large-picture').naturalWidth === 90")
    browser.press("Escape", 27)
    browser.wait("!document.querySelector('dialog').open")
    assert browser.complaints == []
