"""The demo without a browser: what it says of pictures and heads, and the Space that holds it."""

import argparse
import base64
import io
import json
import re
import runpy
import struct
import sys
import zlib
from html.parser import HTMLParser
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
from huggingface_hub import SpaceCard
from picture_helpers import CLASSES, picture, save_tiny_backbone, write_pictures
from PIL import Image
from transformers import pipeline

from hf_layerfusion import LayerFusionError, ViTForAttentiveLayerFusionClassification
from hf_layerfusion.cli import demo as command
from hf_layerfusion.demo import app, build_demo, find_examples, launch_demo, page
from hf_layerfusion.demo.inference import MOST_MEGAPIXELS, Reading, classify_picture, open_picture
from hf_layerfusion.hub.space import REQUIREMENT, write_space

HOSTILE = "<script>alert(1)</script>\"'{{7*7}}${7*7}`\\"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_tiny_backbone(tmp_path_factory.mktemp("backbone") / "tiny")


@pytest.fixture(scope="module")
def build(backbone):
    """Build a head with random parameters, so that its attention is not even."""

    def build_head(recipe="alf", **options):
        options = {"id2label": CLASSES, **options}
        torch.manual_seed(0)
        model = ViTForAttentiveLayerFusionClassification.from_backbone(backbone, recipe=recipe, **options)
        with torch.no_grad():
            for parameter in model.head.parameters():
                parameter.add_(0.5 * torch.randn_like(parameter))
        return model

    return build_head


@pytest.fixture(scope="module")
def head_folder(build, tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads") / "flowers"
    build().save_pretrained(folder)
    return folder


@pytest.fixture
def gradio(monkeypatch, tmp_path):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    return pytest.importorskip("gradio")


def images_of(html):
    """The pictures that a piece of HTML holds: alternative texts and pixels."""
    found = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attributes):
            if tag == "img":
                values = dict(attributes)
                data = values["src"].removeprefix("data:image/png;base64,")
                found.append((values["alt"], np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))))

    Parser().feed(html)
    return found


def cells_of(pixels):
    """One pixel of each of a heatmap's cells, as brightness."""
    return pixels[:: page._CELL, :: page._CELL].astype(int).sum(axis=-1)


def png_header(width, height):
    """The beginning of a PNG that says it is that large."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"")
    chunks = b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in (header, data)
    )
    return b"\x89PNG\r\n\x1a\n" + chunks


def saved(image, image_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


# ---- pictures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["alf", "scalar-mix", "linear-last"])
def test_scores_are_those_of_the_pipeline(build, recipe):
    model = build(recipe)
    image = picture(1, 5)
    reading = classify_picture(model, image)
    classify = pipeline("image-classification", model=model, image_processor=model.image_processor)
    expected = {row["label"]: row["score"] for row in classify(image, top_k=3)}
    assert dict(reading.scores) == pytest.approx(expected, abs=1e-6)
    values = [score for _, score in reading.scores]
    assert values == sorted(values, reverse=True)
    assert reading.kind == "probability"


def test_attentions_are_those_of_the_head(build):
    model = build(num_queries=2)
    image = picture(0, 3)
    attentions = classify_picture(model, image).attentions
    pixels = model.image_processor(images=image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model(pixels, output_attentions=True).layer_attentions[0]
    assert attentions.shape == (2 * len(model.config.bank), len(model.config.bank))
    torch.testing.assert_close(attentions, expected.flatten(0, 1))
    torch.testing.assert_close(attentions.sum(dim=-1), torch.ones(len(attentions)))


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"problem_type": "multi_label_classification"}, "independent"),
        ({"problem_type": "regression"}, "value"),
        ({"id2label": ["age"]}, "value"),
        ({}, "probability"),
    ],
)
def test_kinds_of_scores(build, options, kind):
    model = build("linear-last", **options)
    reading = classify_picture(model, picture(2, 1))
    assert reading.kind == kind
    pixels = model.image_processor(images=picture(2, 1), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = model(pixels).logits[0]
    expected = {"independent": logits.sigmoid(), "value": logits, "probability": logits.softmax(-1)}[kind]
    assert [score for _, score in reading.scores] == pytest.approx(sorted(expected.tolist(), reverse=True), abs=1e-6)
    numbers = re.findall('class="lf-number">([^<]+)<', page.render_scores(reading))
    assert all(number.endswith("%") == (kind != "value") for number in numbers)
    assert len(numbers) == len(logits)


GOOD = {
    "grey.png": (lambda: saved(picture(0, 1).convert("L"), "PNG"), None),
    "cmyk.jpg": (lambda: saved(picture(0, 1).convert("CMYK"), "JPEG"), None),
    "deep.png": (lambda: saved(Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 99), "PNG"), None),
    "moving.gif": (
        lambda: saved(picture(0, 1), "GIF", save_all=True, append_images=[picture(1, 1), picture(2, 2)]),
        "has 3 pictures; the first one",
    ),
    "scan.tiff": (lambda: saved(picture(0, 1), "TIFF"), "browsers cannot show TIFF"),
    "point.png": (lambda: saved(Image.new("RGB", (1, 1)), "PNG"), None),
}
BAD = {
    "notes.png": (lambda: b"these are no pixels\n" * 9, "notes.png is not a picture"),
    "nothing.jpg": (lambda: b"", "nothing.jpg is not a picture"),
    "drawing.svg": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', "drawing.svg is not a picture"),
    "cut.jpg": (lambda: saved(picture(0, 1, (400, 300)), "JPEG")[:9000], "cut.jpg is damaged or cut off"),
    "large.png": (lambda: png_header(9000, 9000), r"large.png is too large \(9,000 x 9,000 pixels\).* 64 megapixels"),
    "huge.png": (lambda: png_header(60000, 60000), "huge.png is too large.* 64 megapixels"),
    "heights.tiff": (lambda: saved(Image.fromarray(np.float32([[-3, 1e6]])), "TIFF"), "no 8-bit or 16-bit picture"),
}


@pytest.mark.parametrize("name", GOOD)
def test_pictures_of_every_kind(name, tmp_path):
    content, note = GOOD[name]
    (tmp_path / "upload").write_bytes(content())
    image, notes = open_picture(tmp_path / "upload", name)
    assert image.mode == "RGB"
    assert len(notes) == (note is not None)
    assert all(note in said for said in notes)


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_in_words(name, tmp_path):
    content, message = BAD[name]
    (tmp_path / "upload").write_bytes(content())
    with pytest.raises(LayerFusionError, match=message) as error:
        open_picture(tmp_path / "upload", name)
    assert str(tmp_path) not in str(error.value)
    assert "object at 0x" not in str(error.value)
    assert MOST_MEGAPIXELS == 64  # which the messages name


# ---- the page ------------------------------------------------------------------------------------------------------


def test_heatmap_shows_the_weights(build):
    config = build().config
    tokens = len(config.bank)
    attentions = torch.zeros(tokens, tokens)
    chosen = [(3 * head + 1) % tokens for head in range(tokens)]
    attentions[range(tokens), chosen] = 1
    ((alt, pixels),) = images_of(page.render_layers(config, attentions, None))
    cells = cells_of(pixels)
    assert cells.shape == (tokens, tokens)  # tokens by heads
    assert cells.argmax(axis=0).tolist() == chosen
    assert f"{tokens} tokens by {tokens} attention heads" in alt
    assert min(pixels.shape[:2]) >= 16 * tokens


def test_patches_share_a_row_and_have_a_map(build):
    config = build("aat").config
    names = config.token_names
    assert len(names) == 17  # CLS and 4 x 4 patches
    attentions = torch.full((8, 17), 0.1 / 16)
    attentions[:, names.index("layer 3 · final_norm · patch 6")] = 0.9  # second row, third column
    html = page.render_layers(config, attentions, None)
    (alt, heatmap), (map_alt, where) = images_of(html)
    assert cells_of(heatmap).shape == (2, 8)
    assert "2 tokens by 8 attention heads" in alt
    assert "layer 3 · final_norm · 16 patches" in alt
    assert np.unravel_index(cells_of(where).argmax(), (4, 4)) == (1, 2)
    assert "row 2 of 4 from the top, column 3 of 4" in map_alt
    assert "reads <b>layer 3</b> and no other" in html


def test_layers_are_compared_with_what_is_usual(build):
    config = build().config
    tokens = len(config.bank)
    usual = torch.full((tokens, tokens), 1 / tokens)
    record = {"attention": {"token_names": config.token_names, "mean": usual.tolist(), "num_images": 1234}}
    typical = page.typical_attention(config, record)
    rest = page.render_rest(config, typical)
    assert "On average over 1,234 test images" in rest
    attentions = torch.zeros(1, tokens)
    attentions[0, config.token_names.index("layer 2 · block · cls")] = 1
    html = page.render_layers(config, attentions, typical)
    assert "listened most to <b>layer 2</b> (100&nbsp;%)" in html
    assert html.count('class="lf-usual"') == 3  # layers
    assert "layer 2: 100&nbsp;%, usually 33.3&nbsp;%" in html
    # A record of other tokens is no comparison.
    record["attention"]["token_names"] = record["attention"]["token_names"][::-1]
    assert page.typical_attention(config, record) is None
    assert "lf-usual" not in page.render_layers(config, attentions, None)


def test_heads_without_attention_say_so(build):
    linear, mix = build("linear-last").config, build("scalar-mix")
    for html in (page.render_layers(linear, None, None), page.render_rest(linear, None)):
        assert "it has no attention" in html
        assert "layer 3 · final_norm · cls" in html
        assert images_of(html) == []
    reading = classify_picture(mix, picture(0, 0))
    html = page.render_layers(mix.config, reading.attentions, None)
    assert "the same for every picture" in html
    assert len(images_of(html)) == 1
    assert "attention head" not in html


def test_description_of_the_head(build):
    model = build()
    record = {
        "dataset": "flowers",
        "split": "test",
        "train_images": 1257,
        "metrics": {"balanced_accuracy": 0.98765},
        "confidence_intervals": {"balanced_accuracy": [0.97, 0.99]},
    }
    text = re.sub("<[^>]+>", "|", page.render_about(model.config, record, 1234567))
    for shown in (
        "alf: Attentive Layer Fusion over the block outputs of all layers",
        "6 of width 32: layer 1 · block · cls to layer 3 · block · mean",
        "attentive, 6 attention heads, 1,234,567 parameters",
        "blue, green, red",
        "flowers (1,257 training images)",
        "Balanced accuracy (test)||0.9877, 95 % interval 0.97 to 0.99",
    ):
        assert shown in text
    assert "|tiny" in text  # the backbone's folder, and no path
    assert str(model.config.backbone_name_or_path) not in text


def test_names_of_strangers_stay_text(build):
    config = build(id2label=[HOSTILE, "a", "b"]).config
    reading = Reading([(HOSTILE, 0.5), ("a", 0.3), ("a", 0.2)], "probability", None, [HOSTILE])
    record = {"dataset": HOSTILE, "split": HOSTILE, "metrics": {HOSTILE: 1.0}}
    for html in (
        page.render_header(config, HOSTILE),
        page.render_title(HOSTILE),
        page.render_error(HOSTILE),
        page.render_scores(reading),
        page.render_about(config, record, 1),
    ):
        assert "&lt;script&gt;" in html.lower()
        assert not re.search(r"<script|[{}`$\\]", html)
    assert page.render_scores(reading).count(">a</span>") == 2  # two classes may have one name


@pytest.mark.parametrize(
    ("share", "shown"),
    [(0, "0&nbsp;%"), (1e-7, "&lt;0.1&nbsp;%"), (0.0251, "2.5&nbsp;%"), (0.9876, "98.8&nbsp;%"), (1, "100&nbsp;%")],
)
def test_percentages(share, shown):
    assert page._percent(share) == shown


# ---- the app -------------------------------------------------------------------------------------------------------


def function_of(demo):
    """What the page calls for an upload, and its number."""
    ((number, function),) = [(number, entry.fn) for number, entry in demo.fns.items() if entry.fn.__name__ == "show"]
    return function, number


def test_app_answers_uploads(gradio, build, tmp_path):
    demo = build_demo(build(), title="Flowers")
    show, _ = function_of(demo)
    (tmp_path / "upload").write_bytes(GOOD["moving.gif"][0]())
    scores, layers = show({"path": str(tmp_path / "upload"), "orig_name": "moving.gif"})
    assert "the first one was classified" in scores
    assert "For this picture" in layers
    waiting, rest = show(None)
    assert "appear here" in waiting
    (tmp_path / "upload").write_bytes(b"no picture")
    scores, layers = show({"path": str(tmp_path / "upload"), "orig_name": "<b>.png"})
    assert 'role="alert"' in scores
    assert "&lt;b&gt;.png is not a picture" in scores
    assert layers == rest


def test_failures_of_the_model_are_told_in_words(gradio, build, tmp_path, caplog, monkeypatch):
    model = build()
    show, _ = function_of(build_demo(model))
    picture(0, 0).save(tmp_path / "upload.png")

    def fail(**inputs):
        raise RuntimeError("out of memory\nand a long story")

    monkeypatch.setattr(model, "forward", fail)
    scores, _ = show({"path": str(tmp_path / "upload.png"), "orig_name": "upload.png"})
    assert "could not read this picture (out of memory)" in scores
    assert "Traceback" not in scores


def ask(address, function, path):
    """What the page answers to a browser that names a file, as text."""
    data = [{"path": str(path), "meta": {"_type": "gradio.FileData"}}]
    body = json.dumps({"data": data, "fn_index": function, "session_hash": "me"}).encode()
    request = Request(f"{address}gradio_api/queue/join", body, {"Content-Type": "application/json"})
    urlopen(request, timeout=60).close()
    with urlopen(f"{address}gradio_api/queue/data?session_hash=me", timeout=60) as events:
        return next(line.decode() for line in events if b"process_completed" in line)


def test_app_is_private(gradio, build, tmp_path):
    """No analytics, no public functions, and no file of this machine but the examples."""
    folder = write_pictures(tmp_path / "pictures", 1)
    demo = build_demo(build(), [folder / "red"])
    assert not demo.analytics_enabled
    address = launch_demo(demo, prevent_thread_lock=True)
    try:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
        assert demo.share_url is None
        with pytest.raises(LayerFusionError, match=r"port \d+ is taken"):
            launch_demo(build_demo(build()), port=demo.server_port, prevent_thread_lock=True)
        assert demo.get_api_info()["named_endpoints"] == {}
        with urlopen(address) as response:
            assert response.status == 200
        _, number = function_of(demo)
        secret = folder / "blue" / "00.png"
        for path in (secret, folder, "/etc/hostname"):
            with pytest.raises(HTTPError) as error:
                urlopen(f"{address}gradio_api/file={path}")
            assert error.value.code in (403, 404)
        (shown,) = (tmp_path / "uploads").rglob("*.png")
        assert "For this picture" in ask(address, number, shown)  # what the page itself offers
        assert "For this picture" not in ask(address, number, secret)
    finally:
        demo.close()


def test_app_of_a_folder(gradio, head_folder):
    assert build_demo(str(head_folder)).title == "flowers"
    assert build_demo(head_folder, title="Mine").title == "Mine"


@pytest.mark.parametrize("missing", ["gradio", "matplotlib"])
def test_missing_extra_is_named(build, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(LayerFusionError, match=r"pip install 'hf-layerfusion\[demo\]'"):
        build_demo(build())


def test_heads_that_cannot_be_shown(gradio, build, tmp_path):
    with pytest.raises(LayerFusionError, match=r"holds no config\.json"):
        build_demo(tmp_path)
    model = build()
    model.image_processor = None
    with pytest.raises(LayerFusionError, match="no image processor"):
        build_demo(model)


def test_examples_come_from_all_over_a_folder(tmp_path):
    folder = write_pictures(tmp_path / "pictures", 20)
    extra = tmp_path / "extra.png"
    picture(0, 0).save(extra)
    found = find_examples([extra, folder])
    assert found[0] == extra
    assert len(found) == 1 + app.MOST_EXAMPLES
    assert {path.parent.name for path in found[1:]} == set(CLASSES)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.png", "there is no file .*missing.png"),
        ("empty", "holds no pictures"),
        ("text.png", "not a readable"),
    ],
)
def test_bad_examples(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(LayerFusionError, match=message):
        find_examples([tmp_path / name])


def test_command(gradio, head_folder, tmp_path, monkeypatch):
    launched = []
    monkeypatch.setattr(command, "launch_demo", lambda demo, **options: launched.append((demo, options)))
    picture(0, 0).save(tmp_path / "example.png")
    parser = argparse.ArgumentParser()
    command.add_options(parser)
    command.run(parser.parse_args([str(head_folder)]))
    command.run(
        parser.parse_args([str(head_folder), "--port", "7999", "--share", "--examples", str(tmp_path / "example.png")])
    )
    assert [demo.title for demo, _ in launched] == ["flowers", "flowers"]
    assert [options for _, options in launched] == [{"port": None, "share": False}, {"port": 7999, "share": True}]
    command.run(parser.parse_args([str(head_folder), "--device", "cpu"]))
    with pytest.raises(LayerFusionError, match=r"holds no config\.json"):
        command.run(parser.parse_args([str(tmp_path)]))


# ---- the Space -----------------------------------------------------------------------------------------------------


def test_space_of_a_head_on_the_hub(tmp_path):
    picture(0, 0).save(tmp_path / "a picture!.PNG")
    folder = write_space(
        tmp_path / "space",
        "user/flowers",
        title="Flowers & more: 'a test'",
        examples=[tmp_path / "a picture!.PNG"],
        requirements="hf-layerfusion[demo] @ git+https://example.org/user/hf_layerfusion",
        license="mit",
        sdk_version="6.1.0",
    )
    assert {path.name for path in folder.iterdir()} == {"app.py", "requirements.txt", "README.md", "examples"}
    card = SpaceCard.load(folder / "README.md")
    values = card.data.to_dict()
    assert values["title"] == "Flowers & more: 'a test'"
    assert (values["sdk"], values["sdk_version"], values["app_file"]) == ("gradio", "6.1.0", "app.py")
    assert (values["models"], values["license"]) == (["user/flowers"], "mit")
    lines = (folder / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == [
        "hf-layerfusion[demo] @ git+https://example.org/user/hf_layerfusion"
    ]
    assert [path.name for path in (folder / "examples").iterdir()] == ["00-a-picture.png"]
    code = (folder / "app.py").read_text()
    compile(code, "app.py", "exec")
    assert "HEAD = 'user/flowers'" in code
    assert "user/flowers" in card.text


def test_space_runs_as_it_is(gradio, head_folder, tmp_path):
    picture(0, 0).save(tmp_path / "one.png")
    folder = write_space(tmp_path / "space", head_folder, examples=[tmp_path / "one.png", tmp_path / "one.png"])
    names = runpy.run_path(str(folder / "app.py"))
    assert names["demo"].title == "flowers"
    assert [path.name for path in names["EXAMPLES"]] == ["00-one.png", "01-one.png"]
    card = SpaceCard.load(folder / "README.md").data
    assert card.models is None  # a folder means nothing on the Hub
    assert card.sdk_version == gradio.__version__
    assert REQUIREMENT in (folder / "requirements.txt").read_text().splitlines()


def test_space_opens_the_head_from_the_hub(gradio, hub, backbone, tmp_path, monkeypatch):
    hub.upload_folder(backbone, "me/tiny-backbone")
    ViTForAttentiveLayerFusionClassification.from_backbone("me/tiny-backbone", id2label=CLASSES).save_pretrained(
        tmp_path / "head"
    )
    hub.upload_folder(tmp_path / "head", "me/flowers")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "flowers").mkdir(parents=True)  # a folder of that name is not the head
    folder = write_space(tmp_path / "space", "me/flowers")
    monkeypatch.chdir(folder)
    names = runpy.run_path(str(folder / "app.py"))
    assert names["HEAD"] == "me/flowers"
    assert names["demo"].title == "me/flowers"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_repo_id": "../else where"}, "is no Hub id"),
        ({"head_repo_id": "a/b/c"}, "is no Hub id"),
        ({"title": "\n"}, "has no letters"),
        ({"requirements": "one\ntwo"}, "is not one line for pip"),
        ({"requirements": [""]}, "is not one line for pip"),
        ({"examples": ["missing.png"]}, "there is no file missing.png"),
    ],
)
def test_spaces_that_cannot_be(options, message, tmp_path):
    with pytest.raises(LayerFusionError, match=message):
        write_space(tmp_path / "space", **{"head_repo_id": "user/flowers", **options})
    assert not (tmp_path / "space").exists()


def test_space_leaves_files_of_others_alone(tmp_path):
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "mine.png").write_bytes(b"mine")
    with pytest.raises(LayerFusionError, match="holds files already"):
        write_space(tmp_path, "user/flowers")
    with pytest.raises(LayerFusionError, match="no folder"):
        write_space(tmp_path / "space", tmp_path / "nothing")
    assert (tmp_path / "examples" / "mine.png").read_bytes() == b"mine"
    assert not (tmp_path / "app.py").exists()
