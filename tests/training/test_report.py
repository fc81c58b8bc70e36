import base64
import copy
import io
import json
import math
import shutil
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from PIL import Image  # matplotlib needs it too

from topk_ortho.training.report import write_report

VOID = {"meta", "img", "link", "br", "hr"}
FIGURES = ["training", "sparsity", "orthogonality", "pairs", "densities", "step_time", "ground_truth"]
CONFIG = {
    "source": "transformer",
    "model": {"name": "minilm", "hook": "blocks.3.hook_resid_post"},
    "text": {"source": "python-docs", "context_size": 128, "n_tokens": 300_000},
    "sae": {"architecture": "batchtopk", "n_features": 4096, "l0": 32, "decoder_norm": "l2", "widths": None},
    "penalty": {
        "target": "decoder", "op": "topk_pairs", "weight": 0.3, "warmup_fraction": 0.1, "every": 4, "fraction": 1e-3,
        "tau": "adaptive", "n_std": 2.0, "similarity": "positive", "reduction": "mean", "priority": "firing-rate",
    },
    "steps": 600, "batch_size": 1024, "lr": 3e-3, "seed": 0, "out_dir": "runs/minilm",
    "a_setting_of_tomorrow": {"nested": [1, 2]},
}  # fmt: skip
SYNTHETIC = {"d_in": 80, "n_parents": 48, "n_children": 4, "n_independent": 47}
SUMMARY = {
    "steps": 600, "tokens": 614_400, "seconds": 214.6, "explained_variance": 0.84217, "normalized_mse": 0.15783,
    "l0": 31.94, "dead_features": 1012, "dead_fraction": 0.2471, "mean_max_decoder_cosine": 0.4137, "penalty": 0.0631,
    "tokens_per_second": 2863.2, "transformer_tokens_per_second": 6180.0, "device": "cpu",
    "ce_loss_recovered": 0.9731, "ce_loss_clean": 3.412, "ce_loss_reconstructed": 3.601, "ce_loss_ablated": 10.44,
    "absorption_rate": 0.0832, "excess_absorption": 0.0611, "parent_recall": 0.9312, "mcc": 0.9155,
    "mcc_parent": 0.9523, "mcc_child": 0.9032, "f1": 0.8871,
    "versions": {"python": "3.11.7", "torch": "2.13.0+cpu", "topk_ortho": "0.1.0"},
}  # fmt: skip
MINIMAL_SUMMARY = dict.fromkeys([
    "steps", "tokens", "seconds", "explained_variance", "normalized_mse", "l0", "dead_features", "dead_fraction",
    "mean_max_decoder_cosine", "penalty", "tokens_per_second",
])  # fmt: skip
MINIMAL_ROW = {"step": 25, "tokens": 25_600, "fvu": 0.5} | dict.fromkeys([
    "lr", "loss", "sparsity", "auxiliary", "penalty", "penalty_weight", "l0", "dead_fraction", "gradient_norm",
    "tokens_per_second", "data_ms", "sae_ms", "penalty_ms", "memory_bytes",
])  # fmt: skip


def full_rows():
    """Six hundred steps of a run that goes well, a line every 25, an evaluation every 100."""
    for step in range(25, 601, 25):
        left = math.exp(-step / 150)
        noise = 0.01 * math.sin(7 * step)
        row = {
            "step": step, "tokens": 1024 * step, "lr": 3e-3, "loss": 0.2 + left, "sparsity": 0.1, "auxiliary": 0.02,
            "fvu": 0.15 + 0.8 * left + noise, "penalty": 0.06 + 0.3 * left + noise, "penalty_weight": 0.3,
            "l0": 32 + 200 * noise, "dead_fraction": 0.25 * (1 - left), "gradient_norm": 1.0,
            "tokens_per_second": 2800.0, "data_ms": 90 + 400 * left, "sae_ms": 210, "penalty_ms": 60,
            "memory_bytes": 5e8,
        }  # fmt: skip
        if step % 100 == 0:
            counts = [round(900 * math.exp(-((i - 15) ** 2) / 12)) for i in range(24)]
            edges = [-6 + i / 4 for i in range(25)]
            row |= {
                "explained_variance": 0.84 - 0.8 * left, "normalized_mse": 0.16, "held_out_l0": 31.9 - 5 * left,
                "mean_max_decoder_cosine": 0.4 + 0.2 * left, "pair_threshold": 0.25 + 0.3 * left,
                "pair_jaccard": None if step == 100 else 0.9 - left, "tau": 0.12 + 0.1 * left,
                "density_histogram": {"log10_edges": edges, "counts": counts, "silent": 412 + step},
                "ce_loss_recovered": 0.97, "absorption_rate": 0.08 + 0.4 * left, "excess_absorption": 0.06 + 0.3 * left,
                "parent_recall": 0.93 - 0.3 * left, "mcc": 0.9 - 0.4 * left, "mcc_parent": 0.95 - 0.3 * left,
                "mcc_child": 0.88 - 0.5 * left, "f1": 0.85 - 0.5 * left,
            }  # fmt: skip
        yield row


def write_run(folder, config=CONFIG, summary=SUMMARY, rows=None):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "summary.json").write_text(json.dumps(summary))
    lines = full_rows() if rows is None else rows
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    write_report(folder)
    return folder


class Page(HTMLParser):
    """A tree, of a document whose tags must balance."""

    def __init__(self, path):
        super().__init__()
        self.root = ET.Element("document")
        self.stack = [self.root]
        self.feed(path.read_text("utf-8"))
        self.close()
        assert self.stack == [self.root], "an element is not closed"

    def handle_starttag(self, tag, attributes):
        element = ET.SubElement(self.stack[-1], tag, {name: value or "" for name, value in attributes})
        if tag not in VOID:
            self.stack.append(element)

    def handle_endtag(self, tag):
        assert self.stack.pop().tag == tag

    def handle_data(self, data):
        last = self.stack[-1]
        if len(last):
            last[-1].tail = (last[-1].tail or "") + data
        else:
            last.text = (last.text or "") + data

    def all(self, tag):
        return list(self.root.iter(tag))

    def text(self, element=None):
        return " ".join("".join((self.root if element is None else element).itertext()).split())

    def described(self):
        """Terms of all description lists, with their descriptions."""
        pairs = {}
        for parent in [*self.all("dl"), *self.all("div")]:
            for element in parent:
                if element.tag == "dt":
                    term = pairs[self.text(element)] = []
                elif element.tag == "dd":
                    term.append(self.text(element))
        return pairs

    def table(self, title):
        (details,) = (d for d in self.all("details") if self.text(d.find("summary")) == title)
        return {self.text(row.find("th")): self.text(row.find("td")) for row in details.iter("tr")}


def changed(config, **changes):
    """A configuration with sections updated and the rest replaced."""
    config = copy.deepcopy(config)
    for name, value in changes.items():
        config[name] = config.get(name, {}) | value if isinstance(value, dict) else value
    return config


@pytest.fixture(scope="module")
def full_run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def full_page(full_run):
    return Page(full_run / "report.html")


def test_says_what_was_trained(full_page):
    setup = {term: text[0] for term, text in full_page.described().items()}
    assert setup["Activations"] == (
        "Of minilm, at blocks.3.hook_resid_post, as it reads Python's own documentation "
        "(300,000 tokens in windows of 128)."
    )
    assert setup["Autoencoder"] == (
        "4,096 features. BatchTopK: the largest of a whole batch are kept, 32 a token on average."
    )
    assert setup["Training"] == (
        "600 steps of 1,024 tokens, 614,400 tokens in all, at a learning rate of up to 0.003, seed 0. "
        "It took 3 min 35 s on cpu."
    )
    assert setup["Penalty"] == (
        "The 0.1% of all pairs of features whose decoder directions are most similar are pushed apart: their squared "
        "cosines, averaged, are added to the loss. Opposite directions are not penalised. Only pairs of |cosine| above "
        "a bound count that follows the data: 2 standard deviations above the mean over all pairs. In each pair only "
        "the feature that fires more rarely is changed. The weight is 0.3, reached after 10% of the "
        "steps; one step in 4 uses it, with a weight as much larger."
    )


PENALTIES = {
    "none": ({"target": "none"}, "None: nothing keeps features apart but the reconstruction itself."),
    "max_cosine": (
        {"op": "max_cosine", "target": "activations", "n_chunks": 8, "warmup_fraction": 0.0, "every": 1},
        "For every feature the squared cosine to the most similar other one, by their activations over a batch, is "
        "added to the loss (the penalty of OrtSAE, within 8 random chunks). The weight is 0.3.",
    ),
    "fixed_tau": (
        {"tau": 0.25, "similarity": "abs", "priority": "none", "reduction": "sum", "warmup_fraction": 0.0, "every": 1},
        "The 0.1% of all pairs of features whose decoder directions are most similar are pushed apart: their squared "
        "cosines, summed, are added to the loss. Opposite directions count as similar too. Only pairs of |cosine| "
        "above 0.25 count. The weight is 0.3.",
    ),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_penalty_in_words(tmp_path, name):
    settings, words = PENALTIES[name]
    run = write_run(tmp_path, changed(CONFIG, penalty=settings), rows=[MINIMAL_ROW])
    assert Page(run / "report.html").described()["Penalty"] == [words]


ARCHITECTURES = {
    "standard": "Standard: ReLU, kept sparse by an L1 term of weight 0.1.",
    "topk": "TopK: the 32 largest are kept on each token.",
    "jumprelu": "JumpReLU: each fires above a threshold that it learns, and a sparsity term pulls to 32 a token.",
    "matryoshka": "Matryoshka: nested dictionaries, of which the small ones must do without the rest; 32 features a "
    "token on average.",
    "something-new": "Architecture: something-new.",
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture_in_words(tmp_path, name):
    run = write_run(tmp_path, changed(CONFIG, sae={"architecture": name, "sparsity_weight": 0.1}), rows=[MINIMAL_ROW])
    assert Page(run / "report.html").described()["Autoencoder"] == [f"4,096 features. {ARCHITECTURES[name]}"]


def test_synthetic_data_in_words(tmp_path):
    run = write_run(tmp_path, changed(CONFIG, source="synthetic", synthetic=SYNTHETIC), rows=[MINIMAL_ROW])
    page = Page(run / "report.html")
    assert page.text(page.all("h1")[0]) == "Sparse autoencoder of synthetic features"
    assert page.described()["Activations"] == [
        "Made up, with known true features in 80 dimensions: 48 parents with 4 children each, which are on only if "
        "their parent is, and 47 independent ones."
    ]


def test_the_depth_of_a_hierarchy_in_words(tmp_path):
    settings = changed(CONFIG, source="synthetic", synthetic=SYNTHETIC | {"depth": 2})
    page = Page(write_run(tmp_path, settings, rows=[MINIMAL_ROW]) / "report.html")
    assert page.described()["Activations"][0].endswith("ones. The hierarchy has 2 levels below the parents.")


def test_the_data_of_the_benchmark_in_words(tmp_path):
    run = write_run(
        tmp_path,
        changed(CONFIG, source="synthsaebench", synthsaebench={"d_in": 80, "n_true": 1024}),
        rows=[MINIMAL_ROW],
    )
    page = Page(run / "report.html")
    assert page.text(page.all("h1")[0]) == "Sparse autoencoder of synthetic features"
    assert page.described()["Activations"] == [
        "Made up as SynthSAEBench does, with 1,024 known true features in 80 dimensions."
    ]


def test_stability_is_drawn_where_it_was_measured(tmp_path):
    shares = {"unmatched": 0.1, "same": 0.0, "parent_child": 0.5, "siblings": 0.1, "relatives": 0.0, "unrelated": 0.3}
    lines = [
        {"step": step, "until": step + 100, "n_pairs": 9, "jaccard_lag_1": 0.9, "turnover": 0.05} | shares
        for step in (100, 200)
    ]
    tmp_path.joinpath("pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(write_run(tmp_path, rows=[MINIMAL_ROW]) / "report.html")
    titles = [page.text(title) for title in page.all("h3")]
    assert titles[-2:] == ["Stability of the selected pairs", "What the selected pairs stand for"]
    alternative_texts = [image.attrib["alt"] for image in page.all("img")]
    assert "1 step: from 0.9 at step 100 to 0.9 at step 200." in alternative_texts[-2]
    assert "parent and child: from 0.5 at step 100" in alternative_texts[-1]


def test_headlines_have_value_direction_and_meaning(full_page):
    values = {
        "Explained variance": ("0.842", "↑ higher is better"),
        "L0": ("31.9", "↕ a trade-off"),
        "Dead features": ("24.7%", "↓ lower is better"),
        "Mean max decoder cosine": ("0.414", "↓ lower is better"),
        "Training tokens/s": ("2,863", "↑ higher is better"),
        "CE loss recovered": ("0.973", "↑ higher is better"),
        "Absorption rate": ("8.3%", "↓ lower is better"),
        "Excess absorption": ("6.1%", "↓ lower is better"),
        "Parent recall": ("93.1%", "↑ higher is better"),
        "MCC": ("0.915", "↑ higher is better"),
        "F1": ("0.887", "↑ higher is better"),
    }
    tiles = {term: text for term, text in full_page.described().items() if len(text) == 3}
    assert {term: (value, better) for term, (value, better, _) in tiles.items()} == values
    assert all(meaning for _, _, meaning in tiles.values())
    assert tiles["Dead features"][2].endswith("1,012 features.")
    assert tiles["MCC"][2].endswith("Parents 0.952, children 0.903.")
    assert tiles["CE loss recovered"][2].endswith("Loss 3.412, reconstructed 3.601, removed 10.440.")
    assert tiles["Training tokens/s"][2].endswith("The transformer alone: 6,180.")


def test_figures_are_in_the_page_and_in_their_folder(full_run, full_page):
    assert sorted(path.stem for path in (full_run / "figures").iterdir()) == sorted(FIGURES)
    images = full_page.all("img")
    assert len(images) == len(full_page.all("figcaption")) == len(FIGURES)
    for image, name in zip(images, FIGURES, strict=True):
        prefix, _, data = image.get("src").partition(",")
        assert prefix == "data:image/png;base64"
        content = base64.b64decode(data, validate=True)
        assert content == (full_run / "figures" / f"{name}.png").read_bytes()
        with Image.open(io.BytesIO(content)) as decoded:
            assert decoded.width == 1120
            assert len(decoded.convert("L").getcolors()) > 10


def test_alternative_texts_say_what_is_drawn(full_page):
    texts = dict(zip(FIGURES, (image.get("alt") for image in full_page.all("img")), strict=True))
    first, last = ([*full_rows()][i]["fvu"] for i in (0, -1))
    assert f"training batch: from {first:.3g} at step 25 to {last:.3g} at step 600" in texts["training"]
    assert "held-out tokens: from 0.571 at step 100 to 0.175 at step 600" in texts["training"]
    assert "pairs kept since the evaluation before: from 0.636 at step 200" in texts["pairs"]
    assert "1,012 never" in texts["densities"]
    assert "the tallest bar holds 900, between 0.0056 and 0.01 of the tokens" in texts["densities"]
    assert "SAE 210 ms, penalty 60 ms" in texts["step_time"]
    assert "MCC, children" in texts["ground_truth"]


def test_tables_hold_everything(full_page):
    settings = full_page.table("Configuration")
    assert settings["model.hook"] == "blocks.3.hook_resid_post"
    assert settings["penalty.fraction"] == "0.001"
    assert settings["text.n_tokens"] == "300,000"
    assert settings["sae.widths"] == "null"
    assert settings["a_setting_of_tomorrow.nested"] == "[1, 2]"
    assert len(settings) == 28
    measurements = full_page.table("Measurements")
    assert measurements["normalized_mse"] == "0.15783"
    assert set(measurements) == set(SUMMARY) - {"versions"}
    assert full_page.text(full_page.all("footer")[0]) == "python 3.11.7, torch 2.13.0+cpu, topk_ortho 0.1.0."


def test_page_stands_alone_and_is_accessible(full_page):
    assert full_page.all("html")[0].get("lang") == "en"
    assert not full_page.all("script")
    assert not full_page.all("link")
    assert all(image.get("alt") for image in full_page.all("img"))
    levels = [int(e.tag[1]) for e in full_page.root.iter() if e.tag in ("h1", "h2", "h3", "h4")]
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip([0, *levels], levels, strict=False))
    ids = {element.get("id") for element in full_page.root.iter()}
    assert {section.get("aria-labelledby") for section in full_page.all("section")} <= ids


def test_minimal_run(tmp_path):
    """Nothing optional, one line of metrics, and null wherever it may be."""
    run = write_run(tmp_path, {"source": "transformer", "penalty": {"target": "none"}}, MINIMAL_SUMMARY, [MINIMAL_ROW])
    page = Page(run / "report.html")
    tiles = {term: text[0] for term, text in page.described().items() if len(text) == 3}
    names = ["Explained variance", "L0", "Dead features", "Mean max decoder cosine", "Training tokens/s"]
    assert tiles == dict.fromkeys(names, "not measured")
    assert [image.get("alt") for image in page.all("img")] == [
        "Line chart. fraction of variance unexplained, training batch: from 0.5 at step 25 to 0.5 at step 25."
    ]
    assert page.text(page.all("footer")[0]) == "Versions: not recorded."
    setup = {term: text[0] for term, text in page.described().items()}
    assert setup["Activations"] == "Of an unknown model, at an unknown place, as it reads an unknown text."
    assert setup["Autoencoder"] == "An unknown number of features. Architecture: unknown."
    assert setup["Training"] == "An unknown number of steps."


def test_null_everywhere(tmp_path):
    summary = {name: None for name in SUMMARY if name != "versions"}
    rows = [
        {name: None for row in full_rows() for name in row},
        *(dict.fromkeys(row) | {"step": row["step"]} for row in full_rows()),
    ]
    page = Page(write_run(tmp_path, summary=summary, rows=rows) / "report.html")
    tiles = {term: text[0] for term, text in page.described().items() if len(text) == 3}
    assert tiles == dict.fromkeys(
        [
            "Explained variance", "L0", "Dead features", "Mean max decoder cosine", "Training tokens/s",
            "CE loss recovered", "Absorption rate", "Excess absorption", "Parent recall", "MCC", "F1",
        ],
        "not measured",
    )  # fmt: skip
    assert page.table("Measurements") == dict.fromkeys(summary, "not measured")
    assert not page.all("img")


@pytest.mark.parametrize("rows", [[], [{"step": 25}]], ids=["no_line", "a_line_without_values"])
def test_no_figures_where_there_is_nothing_to_draw(tmp_path, rows):
    page = Page(write_run(tmp_path, rows=rows) / "report.html")
    assert not page.all("img")
    assert "Over the course of training" not in page.text()


def test_a_value_that_is_not_finite_counts_as_missing(tmp_path):
    rows = [row | {"l0": math.nan, "held_out_l0": math.inf, "dead_fraction": None} for row in full_rows()]
    page = Page(write_run(tmp_path, summary=SUMMARY | {"l0": math.nan, "seconds": math.nan}, rows=rows) / "report.html")
    assert page.described()["L0"][0] == "not measured"
    assert page.table("Measurements")["l0"] == "not measured"
    assert page.described()["Training"][0].endswith("seed 0. It ran on cpu.")
    assert len(page.all("img")) == len(FIGURES) - 1


def test_figures_of_an_earlier_run_go(tmp_path):
    write_run(tmp_path)
    (tmp_path / "figures" / "mine.png").touch()
    off = changed(CONFIG, penalty={"target": "none"})
    pairs = dict.fromkeys(("pair_threshold", "pair_jaccard", "tau"))
    page = Page(write_run(tmp_path, off, rows=[r | pairs | {"penalty": 0.0} for r in full_rows()]) / "report.html")
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {*FIGURES, "mine"} - {"pairs"}
    texts = [image.get("alt") for image in page.all("img")]
    assert not any("penalty" in text for text in texts), "zeros of a penalty that is off"


def test_of_a_resumed_run_the_later_lines_count(tmp_path):
    rows = [MINIMAL_ROW | {"step": step} for step in range(100, 601, 100)]
    again = [row | {"fvu": 0.111} for row in rows[-2:]]
    page = Page(write_run(tmp_path, rows=rows + again) / "report.html")
    assert "to 0.111 at step 600" in page.all("img")[0].get("alt")


def test_names_are_escaped(tmp_path):
    name = "<script>alert(1)</script>\"'&"
    config = changed(CONFIG, model={"name": name}, text={"source": name}, sae={"architecture": name})
    run = write_run(tmp_path, config | {name: name}, SUMMARY | {"device": name}, [MINIMAL_ROW])
    page = Page(run / "report.html")
    assert not page.all("script")
    assert page.text(page.all("title")[0]).startswith(f"Sparse autoencoder of {name}")
    assert page.text(page.all("h1")[0]) == f"Sparse autoencoder of {name}"
    assert page.described()["Autoencoder"][0].endswith(f"Architecture: {name}.")
    assert page.table("Configuration")[name] == name


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        write_report(tmp_path)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    pytest.importorskip("selenium", reason="selenium is not installed")
    for program in ("chromium", "chromedriver"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in (
        "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):  # fmt: skip
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def show(browser, path, *, width=1200, scheme="light"):
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(Path(path).resolve().as_uri())


def test_in_a_browser(browser, full_run):
    show(browser, full_run / "report.html")
    assert browser.execute_script(
        "return Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth, () => 0)))"
    ) == [1120] * len(FIGURES)
    visible = browser.find_element("tag name", "body").text
    for number in (
        "0.842", "31.9", "24.7%", "1,012 features.", "0.414", "2,863", "0.973", "8.3%", "93.1%", "0.915", "0.887",
    ):  # fmt: skip
        assert number in visible

    details = browser.find_element("tag name", "details")
    row = details.find_element("tag name", "th")
    assert not row.is_displayed()
    details.find_element("tag name", "summary").click()
    assert row.is_displayed()
    assert browser.get_log("browser") == []


@pytest.fixture(scope="module")
def long_names_run(tmp_path_factory):
    long = "a_name_without_a_space_" * 10
    config = changed(CONFIG, model={"name": long, "hook": long}, text={"source": long}) | {long: long}
    return write_run(tmp_path_factory.mktemp("long"), config)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(browser, long_names_run, scheme):
    show(browser, long_names_run / "report.html", width=400, scheme=scheme)
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.execute_script("return [innerWidth, document.documentElement.scrollWidth]") == [400, 400]
    too_wide = (
        "return [...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > 400).length"
    )
    assert browser.execute_script(too_wide) == 0
    ink, page = browser.execute_script(
        "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor].map(c => +c.match(/\\d+/)[0])"
    )
    assert (ink > page) == (scheme == "dark")
