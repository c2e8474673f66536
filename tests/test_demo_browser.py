"""The demo in a real browser: somebody drops pictures and files that are none, at a desk and on a telephone."""

import shutil

import pytest
import torch
from picture_helpers import CLASSES, picture, save_tiny_backbone, write_pictures

from hf_layerfusion import ViTForAttentiveLayerFusionClassification
from hf_layerfusion.demo import build_demo, launch_demo

pytest.importorskip("gradio", reason="the demo needs gradio")
sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright to lead a browser with")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on the path"),
]

# Runs if the page takes a class's name for markup.
HOSTILE = "<img src=x onerror='window.hacked = true'>{{7*7}}${7*7}"
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
WAIT = 60_000  # ms; a result takes a fraction of a second on an idle machine

# WCAG 2.2, 1.4.3: the contrast of text, of its colour as it is drawn against the first opaque colour behind it.
CONTRAST = """
selector => {
  const parse = text => text.match(/[\\d.]+/g).map(Number)
  const luminance = ([r, g, b]) => [r, g, b]
    .map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0)
  return [...document.querySelectorAll(selector)].map(element => {
    let behind = element, back
    do {
      back = parse(getComputedStyle(behind).backgroundColor)
      behind = behind.parentElement
    } while (back.length === 4 && back[3] < 1 && behind)
    const [low, high] = [luminance(back), luminance(parse(getComputedStyle(element).color))].sort((a, b) => a - b)
    return (high + 0.05) / (low + 0.05)
  })
}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An attentive head with random parameters, and a training summary as a trained one has it."""
    backbone = save_tiny_backbone(tmp_path_factory.mktemp("backbone") / "tiny")
    torch.manual_seed(0)
    model = ViTForAttentiveLayerFusionClassification.from_backbone(backbone, id2label=[*CLASSES, HOSTILE])
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    tokens = len(model.config.bank)
    model.training_summary = {
        "repo_id": "someone/colours",
        "dataset": "colours",
        "metrics": {"accuracy": 0.9},
        "attention": {
            "token_names": model.config.token_names,
            "mean": [[1 / tokens] * tokens] * tokens,
            "num_images": 120,
        },
    }
    return model


@pytest.fixture(scope="module")
def address(model, tmp_path_factory):
    """The running page's address."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "uploads"))
        demo = build_demo(model, [write_pictures(folder / "pictures", 2)])
        try:
            yield launch_demo(demo, prevent_thread_lock=True)
        finally:
            demo.close()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"], headless=True)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, address):
    """Open the page; at the end, nothing may have gone wrong in it, and nobody but its server been asked."""
    pages, problems, requests = [], [], []

    def open_at(size="desktop", scheme="light"):
        width, height = SIZES[size]
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        page.set_default_timeout(WAIT)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address)
        page.wait_for_selector("#picture input[type=file]", state="attached")
        pages.append(page)
        return page

    yield open_at
    hacked = [page.evaluate("window.hacked") for page in pages]
    for page in pages:
        page.close()
    assert problems == []
    assert not any(hacked)
    assert requests
    outside = [url for url in requests if not url.startswith((address, "data:", f"blob:{address}"))]
    assert outside == []


def drop(page, path):
    page.set_input_files("#picture input[type=file]", path)


def size_of(page, selector):
    return page.eval_on_selector(selector, "e => [e.naturalWidth, e.naturalHeight, e.clientWidth, e.clientHeight]")


def faint_texts(page, *selectors):
    """Those of the texts that do not stand out: the least contrast of each below 4.5, which WCAG asks for."""
    found = {selector: page.evaluate(CONTRAST, selector) for selector in selectors}
    assert all(found.values())
    return {selector: min(values) for selector, values in found.items() if min(values) < 4.5}


def visible_text(page, selector):
    return " ".join(page.inner_text(selector).replace("\xa0", " ").split())


@pytest.mark.parametrize(("size", "scheme"), [("desktop", "light"), ("phone", "dark")])
def test_upload_shows_scores_and_layers(open_page, model, tmp_path, size, scheme):
    page = open_page(size, scheme)
    assert page.evaluate("document.body.classList.contains('dark')") == (scheme == "dark")
    assert "someone/colours" in visible_text(page, "h1")
    assert page.title() == "someone/colours"
    assert "On average over 120 test images" in visible_text(page, "#layers")

    picture(1, 5, (64, 48)).save(tmp_path / "leaf.png")
    drop(page, tmp_path / "leaf.png")
    page.wait_for_selector("#scores .lf-scores")
    page.wait_for_function("document.querySelector('#layers').innerText.includes('For this picture')")
    scores = visible_text(page, "#scores")
    assert all(label in scores for label in CLASSES)
    assert HOSTILE in scores
    assert scores.count("%") == 5  # four classes, and what they add up to

    tokens = len(model.config.bank)
    heatmap = page.locator("#layers img.lf-cells")
    heatmap.scroll_into_view_if_needed()
    assert heatmap.is_visible()
    assert f"Heatmap of {tokens} tokens by {tokens} attention heads" in heatmap.get_attribute("alt")
    natural_width, natural_height, width, height = size_of(page, "#layers img.lf-cells")
    assert natural_width == natural_height > 0
    assert width >= 4 * tokens
    # Names and cells stand in the same rows.
    rows = page.eval_on_selector_all("#layers .lf-names span", "all => all.map(e => e.getBoundingClientRect().y)")
    assert [name.strip() for name in page.locator("#layers .lf-names span").all_inner_texts()] == (
        model.config.token_names
    )
    assert rows[-1] - rows[0] == pytest.approx(height * (tokens - 1) / tokens, abs=1.5)
    # Nothing is cut off: neither the page nor the figure is wider than the window.
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    right = page.eval_on_selector("#layers .lf-means", "e => e.getBoundingClientRect().right")
    assert right <= SIZES[size][0]
    figure = (".lf-answer", ".lf-key", ".lf-names span", ".lf-means span", ".lf-ticks span", ".lf-axis", ".lf-column")
    assert (
        faint_texts(page, "h1", ".lf-header p", ".lf-name", ".lf-number", ".lf-small", ".lf-about td", *figure) == {}
    )


def test_examples_notes_and_clearing(open_page, tmp_path):
    page = open_page()
    examples = page.locator("button.gallery-item")
    assert examples.count() == 2 * len(CLASSES)
    examples.nth(3).click()
    page.wait_for_selector("#scores .lf-scores")
    page.click("#picture button[aria-label='Remove Image'], #picture button[aria-label='Clear']")
    page.wait_for_selector("#scores .lf-waiting")
    assert "On average" in visible_text(page, "#layers")
    picture(0, 1).save(tmp_path / "one.tiff")
    drop(page, tmp_path / "one.tiff")
    page.wait_for_selector("#scores .lf-note")
    assert "Most browsers cannot show TIFF" in visible_text(page, "#scores")
    assert faint_texts(page, ".lf-note") == {}


def test_bad_file_gets_a_readable_message(open_page, tmp_path):
    page = open_page("phone", "dark")
    (tmp_path / "notes.png").write_text("this is no picture")
    drop(page, tmp_path / "notes.png")
    message = page.wait_for_selector("#scores [role=alert]")
    assert message.is_visible()
    text = visible_text(page, "#scores")
    assert "This picture cannot be classified" in text
    assert "notes.png is not a picture" in text
    assert not any(word in visible_text(page, "body") for word in ("Traceback", "Error", str(tmp_path)))
    assert faint_texts(page, ".lf-error strong", ".lf-error p") == {}
