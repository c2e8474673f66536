"""Pictures of every mode become the RGB pixels that transformers' pipelines see; broken ones are named."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
from picture_helpers import picture
from PIL import Image
from transformers.image_utils import load_image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_layerfusion import LayerFusionError
from hf_layerfusion.images import (
    check_image,
    decode_image,
    find_images,
    process_image,
    processed_size,
    resize_processor,
)

COLOUR = np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8)
GREY = COLOUR[..., 0]
ROTATED = 6  # EXIF: turn by 90 degrees


def _picture(mode):
    image = Image.fromarray(COLOUR)
    if mode == "palette with transparent colour":
        palette = image.quantize(16)
        palette.info["transparency"] = 3
        return palette
    if mode == "palette with alpha":
        palette = image.quantize(16)
        palette.info["transparency"] = bytes(range(0, 256, 16))
        return palette
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(GREY))
    return image.convert(mode)


def _bytes_of(image, image_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:Palette images with Transparency:UserWarning")
@pytest.mark.parametrize(
    ("mode", "image_format"),
    [
        ("RGB", "PNG"),
        ("L", "PNG"),
        ("1", "PNG"),
        ("P", "PNG"),
        ("palette with transparent colour", "PNG"),
        ("palette with alpha", "PNG"),
        ("LA", "PNG"),
        ("RGBA", "PNG"),
        ("RGBA", "WEBP"),
        ("P", "GIF"),
        ("CMYK", "TIFF"),
        ("CMYK", "JPEG"),
        ("L", "JPEG"),
        ("RGB", "JPEG"),
        ("LAB", "TIFF"),
    ],
)
def test_pixels_are_those_of_the_pipeline(tmp_path, mode, image_format):
    path = tmp_path / f"picture.{image_format.lower()}"
    path.write_bytes(_bytes_of(_picture(mode), image_format))
    expected = np.asarray(load_image(str(path)))
    assert expected.shape == (12, 9, 3)
    for value in (
        str(path),
        path,
        path.read_bytes(),
        Image.open(path),
        {"bytes": path.read_bytes(), "path": None},
        {"bytes": None, "path": str(path)},
        {"bytes": path.read_bytes(), "path": "a name inside an archive.png"},
    ):
        check_image(value, "row 0")
        image = decode_image(value, "row 0")
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), expected)


@pytest.mark.parametrize("array", [COLOUR, GREY.astype(np.uint16) * 257])
def test_pictures_are_turned_upright(array):
    exif = Image.Exif()
    exif[0x0112] = ROTATED
    value = _bytes_of(Image.fromarray(array), "PNG", exif=exif)
    upright = decode_image(value, "row 0")
    assert upright.size == (12, 9)
    expected = array if array.ndim == 3 else np.repeat(GREY[..., None], 3, axis=-1)
    np.testing.assert_array_equal(np.asarray(upright), np.rot90(expected, -1))


@pytest.mark.parametrize("factor", [256, 257])  # the two ways to widen 8 bits to 16
@pytest.mark.parametrize(
    ("dtype", "image_format", "mode"),
    [
        (np.uint16, "PNG", "I;16"),
        (np.uint16, "TIFF", "I;16"),
        (np.int32, "TIFF", "I"),
        (np.int32, "PPM", "I"),
        (np.float32, "TIFF", "F"),
    ],
)
def test_16_bits_are_scaled_to_8(dtype, image_format, mode, factor):
    value = _bytes_of(Image.fromarray((GREY.astype(np.uint32) * factor).astype(dtype)), image_format)
    assert Image.open(io.BytesIO(value)).mode == mode
    decoded = np.asarray(decode_image(value, "row 0"))
    np.testing.assert_array_equal(decoded, np.repeat(GREY[..., None], 3, axis=-1))


def test_big_endian_16_bits():
    image = Image.frombytes("I;16B", (9, 12), (GREY.astype(">u2") * 257).tobytes())
    for value in (image, _bytes_of(image, "TIFF")):
        np.testing.assert_array_equal(np.asarray(decode_image(value, "row 0"))[..., 1], GREY)


def test_dark_16_bit_picture_stays_dark():
    """The mode says 16 bits, so values under 256 are nearly black, not an 8-bit picture."""
    decoded = decode_image(Image.fromarray(np.full((2, 2), 255, dtype=np.uint16)), "row 0")
    assert np.asarray(decoded).max() == 0


@pytest.mark.parametrize(
    "array",
    [GREY.astype(np.int32), GREY.astype(np.float32), GREY.astype(np.float32) / 255],
    ids=["I to 255", "F to 255", "F to 1"],
)
def test_wide_modes_with_narrow_values(array):
    decoded = np.asarray(decode_image(Image.fromarray(array), "row 0"))[..., 2].astype(int)
    assert np.abs(decoded - GREY).max() <= (1 if array.max() <= 1 else 0)  # 1: x / 255 * 255 may round down


@pytest.mark.parametrize(
    ("array", "range_"),
    [
        (np.array([[0, 70000]], dtype=np.int32), "0 to 70000"),
        (np.array([[-5, 20]], dtype=np.int32), "-5 to 20"),
        (np.array([[0, np.nan]], dtype=np.float32), "nan to nan"),
    ],
)
def test_unknown_ranges_are_refused(array, range_):
    with pytest.raises(LayerFusionError, match=rf"^row 3: pixels of mode . range from {range_}.*: rescale it"):
        decode_image(Image.fromarray(array), "row 3")


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP"])
def test_truncated_picture_is_named(tmp_path, image_format):
    whole = _bytes_of(Image.fromarray(np.tile(COLOUR, (10, 10, 1))), image_format)
    path = tmp_path / "17.img"
    path.write_bytes(whole[: len(whole) // 2])
    for value in (path, path.read_bytes(), {"bytes": path.read_bytes(), "path": "17.img"}):
        with pytest.raises(
            LayerFusionError, match=r"^row 17 \(cats/17\) is not a readable image \(.+\): remove or replace the file$"
        ):
            decode_image(value, "row 17 (cats/17)")


@pytest.mark.parametrize("value", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + bytes(40)])
@pytest.mark.parametrize("read", [decode_image, check_image])
def test_not_an_image(read, value):
    with pytest.raises(LayerFusionError, match=r"^row 2 is not a readable image \(.+\): remove or replace"):
        read(value, "row 2")


def test_check_finds_a_wrong_checksum():
    value = bytearray(_bytes_of(Image.fromarray(COLOUR), "PNG"))
    value[60] ^= 1  # inside the compressed pixels
    with pytest.raises(LayerFusionError, match=r"^row 2 is not a readable image"):
        check_image(bytes(value), "row 2")


def test_check_leaves_a_pil_image_usable(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(COLOUR).save(path)
    with Image.open(path) as image:
        check_image(image, "row 0")
        np.testing.assert_array_equal(np.asarray(decode_image(image, "row 0")), COLOUR)


@pytest.mark.parametrize("read", [decode_image, check_image])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "row 5: found NoneType instead of an image"),
        ({"bytes": None, "path": None}, "row 5: found NoneType instead of an image"),
        (3, "row 5: found int instead of an image"),
        ("nowhere/cat.png", "row 5: there is no file nowhere/cat.png: check the path"),
    ],
)
def test_no_image_there(read, value, message):
    with pytest.raises(LayerFusionError, match=message):
        read(value, "row 5")


def test_find_images(tmp_path):
    wanted = ["a.png", "b/c.JPG", "b/d/e.tiff", "z.webp"]
    for name in [*wanted, "notes.txt", "b/._c.jpg", ".hidden/x.png", "paper.pdf"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert find_images(tmp_path) == [tmp_path / name for name in wanted]
    assert find_images(str(tmp_path / "b" / "d")) == [tmp_path / "b" / "d" / "e.tiff"]
    with pytest.raises(LayerFusionError, match=r"no such folder: .*nowhere"):
        find_images(tmp_path / "nowhere")


# ---- the processor's size ----------------------------------------------------------------------------------------

CROPPING = BitImageProcessorPil(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224})
RESIZING = ViTImageProcessorPil(size={"height": 224, "width": 224})


@pytest.mark.parametrize(
    ("processor", "size", "crop_size"),
    [(CROPPING, {"shortest_edge": 64}, {"height": 56, "width": 56}), (RESIZING, {"height": 56, "width": 56}, None)],
)
def test_resize_processor(processor, size, crop_size):
    before = processor.to_dict()
    resized = resize_processor(processor, 56)
    assert processor.to_dict() == before
    assert {key: value for key, value in dict(resized.size).items() if value is not None} == size
    if crop_size:
        assert dict(resized.crop_size) | crop_size == dict(resized.crop_size)
    wide = Image.new("RGB", (90, 40))
    assert resized(images=wide, return_tensors="pt")["pixel_values"].shape == (1, 3, 56, 56)
    kept = {key: value for key, value in resized.to_dict().items() if key not in ("size", "crop_size")}
    assert kept == {key: value for key, value in before.items() if key not in ("size", "crop_size")}


def test_resize_processor_to_its_own_size_changes_nothing():
    image = picture(0, 0, (300, 260))
    for processor in (CROPPING, RESIZING):
        same = resize_processor(processor, 224)
        before, after = (p(images=image, return_tensors="np")["pixel_values"] for p in (processor, same))
        np.testing.assert_array_equal(before, after)


def test_processed_size():
    assert processed_size(CROPPING) == processed_size(RESIZING) == [224, 224]
    assert processed_size(resize_processor(CROPPING, 56)) == [56, 56]


def test_image_size_of_a_processor_that_reads_its_size_otherwise():
    processor = resize_processor(ConvNextImageProcessorPil(), 96)
    for size in ((64, 64), (120, 60)):
        assert process_image(processor, Image.new("RGB", size))["pixel_values"].shape == (3, 96, 96)


def test_a_processor_that_keeps_its_own_size():
    processor = SimpleNamespace(size={"height": 8, "width": 8})
    with pytest.raises(LayerFusionError, match="a SimpleNamespace cannot be made to give 16 x 16 pixels"):
        resize_processor(processor, 16)


def test_a_processor_without_a_size():
    with pytest.raises(LayerFusionError, match="a SimpleNamespace has no size to set: leave image_size out"):
        resize_processor(SimpleNamespace(mean=0.5), 56)
