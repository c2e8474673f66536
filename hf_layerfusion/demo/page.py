"""What the page shows, as HTML. Every name in it comes from somebody else and is escaped."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..analysis.plots import MIN_COLOUR_RANGE
from ..bank import TokenBank, cell_place, is_cell, is_patch
from ..configuration_layer_fusion import MULTI_HEAD_TYPES, LayerFusionConfig
from ..hub.push import public_name
from ..hub.record import plain_text
from ..recipes import find_recipe
from .inference import Reading

MOST_CLASSES = 5
_MOST_LABELS, _MOST_METRICS = 12, 8
_LONGEST_TEXT = 400
_MOST_ROWS = 48  # of the heatmap; more of them scroll
_CELL = 16  # pixels of the heatmap's file for each cell, so that a saved copy can be looked at
_COLOUR_STOPS = 9
_MOST_TICKS = 12  # of layers
_MOST_HEAD_TICKS = 6  # which fit on a telephone


class TypicalAttention(NamedTuple):
    """Attentions `(H, N)`, each row summing to one, averaged over test images."""

    mean: Tensor
    num_images: int


def style_sheet() -> str:
    """The page's own styles. They stand in the page, so that it looks the same however it is launched."""
    return f"<style>{files(__package__).joinpath('style.css').read_text(encoding='utf-8')}</style>"


def render_header(config: LayerFusionConfig, title: str) -> str:
    layers = len({coordinate.layer for coordinate in config.bank.coordinates})
    tokens = len(config.bank)
    seen = "its scores" if config.head_type == "linear" else "its scores, and the layers that the head listened to"
    backbone = f"{'the frozen' if config.freeze_backbone else 'the fine-tuned'} backbone {_backbone(config)}"
    return (
        f'<header class="lf-header"><h1>{_text(title)}</h1>'
        f"<p>Drop a picture to see {seen}. This head reads {tokens} token{_s(tokens)} from {layers} layer{_s(layers)} of "
        f"{_text(backbone)}, and knows {config.num_labels} label{_s(config.num_labels)}.</p></header>"
    )


def render_title(title: str) -> str:
    return f'<h2 class="lf-title">{_text(title)}</h2>'


def render_waiting() -> str:
    return '<p class="lf-waiting">The classes of the picture appear here.</p>'


def render_error(message: str) -> str:
    return (
        '<div class="lf-error" role="alert"><strong>This picture cannot be classified</strong>'
        f"<p>{_text(message)}</p></div>"
    )


def render_scores(reading: Reading) -> str:
    """The highest scores as bars; a regression's values as they are."""
    shown = reading.scores[:MOST_CLASSES]
    winner = shown[0][0]
    is_share = reading.kind != "value"
    largest = max(abs(value) for _, value in shown) or 1.0
    rows = "".join(
        f'<li><span class="lf-name" title="{_text(name)}">{_text(name)}</span>'
        f'<span class="lf-number">{_percent(score) if is_share else f"{score:.4g}"}</span>'
        f'<span class="lf-track"><span class="lf-fill" style="width:{_css(score if is_share else abs(score) / largest)}">'
        "</span></span></li>"
        for name, score in shown
    )
    left = len(reading.scores) - len(shown)
    more = f" {left} more label{_s(left)} scored lower." if left else ""
    caption = {
        "probability": "Probabilities; over all labels they add up to 100 %.",
        "independent": "Probability of each label by itself; several may hold.",
        "value": "Predicted values.",
    }[reading.kind]
    notes = "".join(f'<p class="lf-note">{_text(note)}</p>' for note in reading.notes)
    head = f'<p class="lf-winner">{_text(winner)}</p>' if is_share else ""
    return f'<div class="lf-scores" role="status">{head}{notes}<ol>{rows}</ol><p class="lf-small">{caption}{more}</p></div>'


def render_rest(config: LayerFusionConfig, typical: TypicalAttention | None) -> str:
    """What is known of the layers before there is a picture."""
    if config.head_type == "linear" or typical is None:
        return _render_without_attention(config)
    return _render_layers(config, typical.mean, f"On average over {typical.num_images:,} test images, ")


def render_layers(config: LayerFusionConfig, attentions: Tensor | None, typical: TypicalAttention | None) -> str:
    """Which layers were listened to: columns by layer, and a heatmap of tokens by attention heads.

    Args:
        config: of the head.
        attentions: of one picture, `(H, N)`, each row summing to one; `None` of a linear head.
        typical: for comparison.
    """
    if attentions is None:
        return _render_without_attention(config)
    return _render_layers(config, attentions, "For this picture, ", typical)


def render_about(config: LayerFusionConfig, record: Mapping[str, Any], head_parameters: int) -> str:
    """What the head is, what it was trained on, and how good it was found to be.

    Args:
        config: of the head.
        record: a training summary that `check_record` has seen.
        head_parameters: parameters of the head.
    """
    recipe = find_recipe(config.recipe)
    revision = f", revision {config.backbone_revision[:12]}" if config.backbone_revision else ""
    heads = config.num_heads or len(config.bank)
    # By default one for each token that is read, which in two stages are fewer than the bank's.
    is_known = config.head_type == "attentive" or (config.head_type in MULTI_HEAD_TYPES and config.num_heads)
    parts = f", {heads} attention head{_s(heads)}" if is_known else ""
    members = f" x {config.num_members}, an ensemble" if config.num_members > 1 else ""
    parts += f" for each of {config.num_queries} queries" if parts and config.num_queries > 1 else ""
    names = [str(config.id2label[index]) for index in range(config.num_labels)]
    labels = ", ".join(names[:_MOST_LABELS]) + (
        f" and {len(names) - _MOST_LABELS} more" if len(names) > _MOST_LABELS else ""
    )
    tokens = config.token_names
    rows = [
        ("Backbone", f"{_backbone(config)}{revision}{'' if config.freeze_backbone else ', fine-tuned'}"),
        ("Recipe", f"{config.recipe}: {recipe.description}"),
        (
            "Tokens",
            f"{len(tokens)} of width {config.hidden_size}: {tokens[0]} to {tokens[-1]}"
            if len(tokens) > 1
            else tokens[0],
        ),
        ("Head", f"{config.head_type.replace('_', ' ')}{members}{parts}, {head_parameters:,} parameters"),
        (f"{len(names)} labels" if len(names) > 1 else "Label", labels),
        *_trained_on(record),
        *_results(record),
    ]
    cells = "".join(f"<tr><th scope='row'>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in rows)
    return f'<table class="lf-about">{cells}</table>'


def typical_attention(config: LayerFusionConfig, record: Mapping[str, Any]) -> TypicalAttention | None:
    """What a training record says of a head's attention; `None` if nothing, or if it is of other tokens."""
    attention = record.get("attention")
    if attention is None or attention["token_names"] != config.token_names:
        return None
    return TypicalAttention(torch.tensor(attention["mean"], dtype=torch.float32), attention["num_images"])


# ---- parts -----------------------------------------------------------------------------------------------------------


def _render_without_attention(config: LayerFusionConfig) -> str:
    if config.head_type != "linear":
        return '<p class="lf-waiting">Drop a picture to see which layers the head listens to.</p>'
    names = config.token_names
    listed = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    how = "one token" if len(names) == 1 else f"{len(names)} tokens side by side"
    return (
        '<section class="lf-layers"><p class="lf-answer">This is a <b>linear</b> head: it has no attention, so there is '
        "nothing to say about which layers it listened to for one picture.</p>"
        f'<p class="lf-small">It reads {how}, with the same weights for every picture: {_text(listed)}.</p></section>'
    )


def _render_layers(
    config: LayerFusionConfig, attentions: Tensor, occasion: str, typical: TypicalAttention | None = None
) -> str:
    bank = config.bank
    weights = attentions.mean(dim=0).double().numpy()  # (N,)
    by_layer = _sum_by_layer(bank, weights)
    heaviest = sorted(by_layer, key=lambda layer: -by_layer[layer])[:3]
    ranking = ", ".join(f"<b>{_layer_name(layer)}</b> ({_percent(by_layer[layer])})" for layer in heaviest)
    if len(by_layer) == 1:
        answer = f"This head reads <b>{_layer_name(heaviest[0])}</b> and no other."
    elif config.head_type == "scalar_mix":
        answer = f"This head mixes the layers with learned weights, the same for every picture. Heaviest: {ranking}."
    else:
        answer = f"{occasion}the head listened most to {ranking}."
    columns = _render_columns(bank, by_layer, typical) if len(by_layer) > 1 else ""
    return (
        f'<section class="lf-layers"><p class="lf-answer">{answer}</p>'
        f"{columns}{_render_heatmap(config, attentions)}{_render_maps(config, weights)}</section>"
    )


def _render_columns(bank: TokenBank, by_layer: Mapping[int, float], typical: TypicalAttention | None) -> str:
    """One column per layer, with a line where even attention would be and a mark where it usually is."""
    even = _sum_by_layer(bank, np.full(len(bank), 1 / len(bank)))
    usual = _sum_by_layer(bank, typical.mean.mean(dim=0).double().numpy()) if typical else None
    top = max([*by_layer.values(), *even.values(), *(usual or {}).values()]) * 1.02
    numbered = set(sorted(by_layer, key=lambda layer: -by_layer[layer])[:3])
    step = math.ceil(len(by_layer) / _MOST_TICKS)
    columns = []
    for position, (layer, weight) in enumerate(by_layer.items()):
        title = f"{_layer_name(layer)}: {_percent(weight)}" + (f", usually {_percent(usual[layer])}" if usual else "")
        mark = f'<i class="lf-usual" style="bottom:{_css(usual[layer] / top)}"></i>' if usual else ""
        tick = str(layer) if position % step == 0 or layer in numbered else ""
        value = _percent(weight, digits=0) if layer in numbered else ""
        columns.append(
            f'<div class="lf-column" title="{title}"><div class="lf-plot">'
            f'<i class="lf-even" style="bottom:{_css(even[layer] / top)}"></i>'
            f'<div class="lf-bar" style="height:{_css(weight / top)}"><b>{value}</b></div>{mark}</div>'
            f"<span>{tick}</span></div>"
        )
    said = ", ".join(f"{_layer_name(layer)} {_percent(weight)}" for layer, weight in by_layer.items())
    keys = '<span class="lf-key"><i class="lf-key-even"></i>even attention</span>'
    if typical:
        usually = f"usually (mean of {typical.num_images:,} test images)"
        keys += f'<span class="lf-key"><i class="lf-key-usual"></i>{usually}</span>'
    return (
        '<figure class="lf-figure"><figcaption><h3>Weight of each layer</h3>'
        f'<span class="lf-keys">{keys}</span></figcaption>'
        f'<div class="lf-columns" role="img" aria-label="Weight of each layer: {said}">{"".join(columns)}</div>'
        '<p class="lf-axis">layer, from the first to the last block</p></figure>'
    )


def _render_heatmap(config: LayerFusionConfig, attentions: Tensor) -> str:
    """Tokens (rows) by attention heads (columns); all patches of an activation share a row, and all cells of a grid."""
    rows = _rows(config.bank)
    by_head = attentions.double().numpy()  # (H, N)
    values = np.stack([by_head[:, positions].sum(axis=1) for _, positions in rows])  # (rows, H)
    means = values.mean(axis=1)
    highest = max(float(values.max()), MIN_COLOUR_RANGE)
    heads = values.shape[1]
    strongest = rows[int(means.argmax())][0]
    if config.head_type in MULTI_HEAD_TYPES:
        title, columns = "Weight of each token in each attention head", f"{heads} attention head{_s(heads)}"
        axis = f"attention head{_s(heads)}"
        shares = "Each attention head shares out 100 % over all tokens."
    else:
        title, columns, axis, shares = "Weight of each token", "one column", "weight", "Together they have 100 %."
    alt = (
        f"Heatmap of {len(rows)} tokens by {columns}; the token with the most weight is {strongest} "
        f"({100 * float(means.max()):.1f} %)"
    )
    step = math.ceil(heads / _MOST_HEAD_TICKS)
    ticks = "".join(
        f'<span style="left:{_css((head + 0.5) / heads)}">{head + 1}</span>' for head in range(0, heads, step)
    )
    names = "".join(f"<span>{_text(name)}</span>" for name, _ in rows)
    widest = max(float(means.max()), MIN_COLOUR_RANGE)
    bars = "".join(
        f'<span><i style="width:{_css(0.6 * mean / widest)}"></i>{_percent(float(mean))}</span>' for mean in means
    )
    scrolls = " lf-scroll" if len(rows) > _MOST_ROWS else ""
    stops = ", ".join(_hex(colour) for colour in _colours(np.linspace(0, 1, _COLOUR_STOPS)))
    return (
        f'<figure class="lf-figure"><figcaption><h3>{title}</h3>'
        f'<span class="lf-keys"><span class="lf-key">0 %<i class="lf-scale" style="background:linear-gradient(90deg, '
        f'{stops})"></i>{_percent(highest)}</span></span></figcaption>'
        f'<div class="lf-heatmap{scrolls}" style="--rows:{len(rows)};--heads:{heads}">'
        f'<div class="lf-names">{names}</div>'
        f'<img class="lf-cells" alt="{_text(alt)}" src="{_picture(values / highest)}">'
        f'<div class="lf-means">{bars}</div>'
        f'<div class="lf-ticks" aria-hidden="true">{ticks}</div>'
        f'<div class="lf-axis lf-axis-heads">{axis}</div><div class="lf-axis lf-axis-mean">mean</div></div>'
        '<p class="lf-small">A token is what the backbone holds at one place: of a layer, its CLS vector, the mean over the '
        f"patches, the means over the cells of a grid of them, or the patches themselves. {shares}</p></figure>"
    )


def _render_maps(config: LayerFusionConfig, weights: np.ndarray) -> str:
    """For heads that read every patch, or cells: where in the picture the weight lies, one map per activation and grid."""
    bank, layout = config.bank, config.layout
    maps = []
    for name, positions in _rows(bank):
        layer, _, pool = bank.coordinates[positions[0]]
        if is_patch(pool):
            height, width = layout.grid(layer, config.image_size)
            aspect = f"{width}/{height}"
        elif is_cell(pool) and len(positions) > 1:
            height = width = cell_place(pool)[0]
            pixels = config.image_size or layout.image_size or (1, 1)
            aspect = f"{pixels[1]}/{pixels[0]}"
        else:
            continue
        values = weights[positions].reshape(height, width)
        total, highest = float(values.sum()), max(float(values.max()), 1e-12)
        top, left = divmod(int(values.argmax()), width)
        alt = f"Map of {name}: most weight in row {top + 1} of {height} from the top, column {left + 1} of {width}"
        maps.append(
            f'<div class="lf-map"><img alt="{_text(alt)}" src="{_picture(values / highest)}" '
            f'style="aspect-ratio:{aspect}"><span>{_text(name)}: {_percent(total)}</span></div>'
        )
    if not maps:
        return ""
    return (
        '<figure class="lf-figure"><figcaption><h3>Where in the picture</h3></figcaption>'
        f'<div class="lf-maps">{"".join(maps)}</div><p class="lf-small">The picture as the backbone sees it, resized and '
        "perhaps cropped. Mean over the attention heads; bright places have the most weight of their layer.</p></figure>"
    )


def _rows(bank: TokenBank) -> list[tuple[str, list[int]]]:
    """Names and token positions of the heatmap's rows, in the bank's order."""
    named = []
    for group, positions in bank.groups.items():
        name = group.name
        if group.pool == "patches":
            name = f"{name.rsplit(' · ', 1)[0]} · {len(positions)} patches"
        elif group.pool == "top patches":
            name = f"{name} ({len(positions)})"
        elif is_cell(group.pool):
            name = f"{name} ({len(positions)} cell{_s(len(positions))})"
        named.append((name, positions))
    return named


def _sum_by_layer(bank: TokenBank, weights: np.ndarray) -> dict[int, float]:
    sums: dict[int, float] = {}
    for coordinate, weight in zip(bank.coordinates, weights.tolist(), strict=True):
        sums[coordinate.layer] = sums.get(coordinate.layer, 0.0) + weight
    return dict(sorted(sums.items()))


def _layer_name(layer: int) -> str:
    return f"layer {layer}" if layer else "the embeddings (layer 0)"


def _picture(shares: np.ndarray) -> str:
    """Values from 0 to 1, rows by columns, as the address of a PNG that holds itself."""
    colours = np.kron(_colours(shares), np.ones((_CELL, _CELL, 1), dtype=np.uint8))
    buffer = io.BytesIO()
    Image.fromarray(colours).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _colours(shares: np.ndarray) -> np.ndarray:
    """The colours of all heatmaps of this library: viridis, as bytes."""
    from matplotlib import colormaps

    return colormaps["viridis"](shares, bytes=True)[..., :3]


def _hex(colour: Sequence[int]) -> str:
    return "#" + "".join(f"{part:02x}" for part in colour)


def _backbone(config: LayerFusionConfig) -> str:
    name = config.backbone_name_or_path or config.backbone_config.model_type
    return public_name(name)


def _trained_on(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    dataset = record.get("dataset_id") or record.get("dataset")
    if dataset:
        parts = (("train_images", "training"), ("test_images", "test"))
        counts = [f"{record[key]:,} {what} images" for key, what in parts if key in record]
        yield "Trained on", f"{dataset}" + (f" ({', '.join(counts)})" if counts else "")


def _results(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    where = f" ({record['split']})" if "split" in record else ""
    intervals = record.get("confidence_intervals", {})
    for name, value in list(record.get("metrics", {}).items())[:_MOST_METRICS]:
        shown = f"{value:.4g}"
        if name in intervals:
            low, high = intervals[name]
            shown += f", 95 % interval {low:.4g} to {high:.4g}"
        yield name.replace("_", " ").capitalize() + where, shown


def _percent(share: float, digits: int = 1) -> str:
    """`0.987` as `98.7 %`, as HTML."""
    least = 0.5 * 10 ** -(digits + 2)
    if 0 < share < least:
        return f"&lt;{10**-digits:.{digits}f}&nbsp;%"
    return f"{100 * share:.{0 if share in (0, 1) else digits}f}&nbsp;%"


def _css(share: float) -> str:
    return f"{100 * min(max(share, 0.0), 1.0):.2f}%"


def _s(count: int) -> str:
    return "" if count == 1 else "s"


def _text(value: Any) -> str:
    """Escape for text and attributes, and for the template languages that Gradio runs over the result."""
    escaped = html.escape(plain_text(value, _LONGEST_TEXT))
    for character in "${}`\\":
        escaped = escaped.replace(character, f"&#{ord(character)};")
    return escaped
