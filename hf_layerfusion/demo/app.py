"""The Gradio app. It needs the extra `hf-layerfusion[demo]`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging

from ..configuration_layer_fusion import LayerFusionConfig
from ..errors import LayerFusionError
from ..hub.record import check_record
from ..images import check_image, find_images
from ..modeling_layer_fusion import ViTForAttentiveLayerFusionClassification
from . import page
from .inference import classify_picture, open_picture

if TYPE_CHECKING:
    import gradio

logger = logging.get_logger(__name__)

# More nobody clicks through.
MOST_EXAMPLES = 12
# Uploads are deleted when they are this old, in seconds.
_KEPT_FOR = 3600
_MOST_BYTES = "50mb"


def build_demo(
    model: ViTForAttentiveLayerFusionClassification | str | Path,
    examples: Iterable[str | Path] = (),
    *,
    backbone: str | Path | None = None,
    title: str | None = None,
) -> gradio.Blocks:
    """A page on which people drop a picture and see its classes and the layers that the head listened to.

    Nothing on it asks the network for anything: no analytics, fonts and scripts from the page's own server.

    Args:
        model: a model, or the Hub id or folder of a head.
        examples: pictures to click on: files, and folders of them (at most 12 of each).
        backbone: for a head given by name, the backbone to use instead of the pinned one.
        title: by default the head's name.

    Returns:
        The app, for [`launch_demo`] or its own `launch`.

    Raises:
        LayerFusionError: if gradio or matplotlib is missing, the head cannot be used, or an example cannot be read.
    """
    gr = _import_gradio()
    name = None
    if not isinstance(model, ViTForAttentiveLayerFusionClassification):
        name = str(model)
        model = _open(name, backbone)
    if model.image_processor is None:
        raise LayerFusionError("this head has no image processor: set model.image_processor")
    model.eval()
    config, record = model.config, check_record(model.training_summary)
    title = title or _title_of(config, record, name or str(model.name_or_path or ""))
    pictures = find_examples(examples)
    typical = page.typical_attention(config, record)
    at_rest = page.render_rest(config, typical)

    def show(upload: Any) -> tuple[str, str]:
        """What stands in the two places for results; `upload` is what the browser says of the file, or `None`."""
        if not upload:
            return page.render_waiting(), at_rest
        try:
            picture, notes = open_picture(upload["path"], upload.get("orig_name") or "This file")
            reading = classify_picture(model, picture)
            reading.notes = notes
            return page.render_scores(reading), page.render_layers(config, reading.attentions, typical)
        except LayerFusionError as error:
            return page.render_error(str(error)), at_rest
        except Exception as error:  # whoever looks at the page gets words, whoever runs it the traceback
            logger.exception("a picture could not be classified")
            reason = str(error).split("\n", 1)[0]
            return page.render_error(f"The model could not read this picture ({reason}). Try another one."), at_rest

    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(_KEPT_FOR, _KEPT_FOR)) as demo:

        def html(value: str, **options: Any) -> Any:
            return gr.HTML(value, apply_default_css=False, **options)

        html(page.style_sheet() + page.render_header(config, title))
        with gr.Row(equal_height=True):
            upload = gr.Image(
                label="Picture",
                type="filepath",
                image_mode=None,
                sources=["upload", "clipboard"],
                height=340,
                min_width=280,
                buttons=["fullscreen"],
                elem_id="picture",
            )
            with gr.Column(min_width=280):
                scores = html(
                    page.render_waiting(),
                    label="Result",
                    show_label=True,
                    container=True,
                    padding=True,
                    elem_id="scores",
                )
        if pictures:
            gr.Examples([[str(file)] for file in pictures], upload, examples_per_page=MOST_EXAMPLES)
        html(page.render_title("Layers the head listened to"))
        layers = html(at_rest, elem_id="layers")
        about = page.render_about(config, record, sum(part.numel() for part in model.head.parameters()))
        html(page.render_title("About this head") + about, elem_id="about")
        # Without preprocessing, whose errors about broken files are not written for people.
        upload.change(
            show, upload, [scores, layers], preprocess=False, show_progress="minimal", api_visibility="private"
        )
    return demo


def launch_demo(
    demo: gradio.Blocks,
    *,
    port: int | None = None,
    share: bool = False,
    prevent_thread_lock: bool = False,
) -> str:
    """Serve the page to this machine, and to nobody else unless asked to.

    It listens on 127.0.0.1, or where the environment variable `GRADIO_SERVER_NAME` says, which is how a Space is told.

    Args:
        demo: from [`build_demo`].
        port: by default the first free one from 7860.
        share: also make a public address, through Gradio's servers.
        prevent_thread_lock: return at once; the server runs until `demo.close()`.

    Returns:
        The page's address.

    Raises:
        LayerFusionError: if the port is taken.
    """
    gr = _import_gradio()
    from gradio.themes.utils.fonts import LocalFont

    # Gradio ships all letters of this font in these two weights.
    fonts = (LocalFont("Source Sans Pro", weights=(400, 700)), "system-ui", "sans-serif")
    try:
        demo.launch(
            server_port=port,
            share=share,
            prevent_thread_lock=True,
            quiet=True,
            ssr_mode=False,  # which would start a second server
            theme=gr.themes.Default(primary_hue="blue", font=fonts),
            footer_links=[],
            max_file_size=_MOST_BYTES,
            enable_monitoring=False,
        )
    except OSError as error:
        if port is None:
            raise
        raise LayerFusionError(
            f"port {port} is taken or may not be used: give another, or none for a free one"
        ) from error
    address = str(demo.share_url or demo.local_url)
    if not prevent_thread_lock:
        print(f"open {address} in a browser; Ctrl+C ends it", flush=True)
        demo.block_thread()
    return address


def find_examples(paths: Iterable[str | Path]) -> list[Path]:
    """Pictures to click on: files as given, and of each folder at most 12, from all over it.

    Raises:
        LayerFusionError: for a path that is not there, a folder without pictures, and a file that cannot be read.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            files = find_images(path)
            if not files:
                raise LayerFusionError(f"examples: folder {path} holds no pictures")
            count = min(len(files), MOST_EXAMPLES)
            found += [files[index * len(files) // count] for index in range(count)]
        else:
            found.append(path)
    for file in found:
        check_image(file, f"example {file}")
    return found


def _import_gradio() -> Any:
    try:
        import gradio
        import matplotlib  # noqa: F401 (the heatmap's colours)
    except ImportError as error:
        raise LayerFusionError(f"{error}: the demo needs pip install 'hf-layerfusion[demo]'") from error
    return gradio


def _open(name: str, backbone: str | Path | None) -> ViTForAttentiveLayerFusionClassification:
    try:
        model = ViTForAttentiveLayerFusionClassification.from_pretrained(name, backbone=backbone)
    except OSError as error:
        raise LayerFusionError(f"no head can be loaded from {name!r}: {error}") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _title_of(config: LayerFusionConfig, record: Mapping[str, Any], name: str) -> str:
    """The head's repository, or its folder's name, or what it is."""
    folder = Path(name).resolve().name if name and Path(name).is_dir() else ""
    dataset = f" for {record['dataset']}" if "dataset" in record else ""
    return record.get("repo_id") or folder or name or f"{config.recipe} head{dataset}"
