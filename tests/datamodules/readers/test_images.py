"""The same image in another coding gives the same pixels; what cannot be used is a BadSample with its reason."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from datamodules.readers.base import BadSample, inside
from datamodules.readers.images import MAX_PIXELS, open_image, open_rgb
from tests.datamodules.conftest import image_bytes


def saved(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def huge_png(side: int) -> bytes:
    """A PNG whose header promises ``side`` x ``side`` pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def test_sixteen_bits_are_scaled():
    ramp = np.linspace(0, 255, 64).round().astype(np.uint8).reshape(8, 8)
    for deep in (ramp.astype(np.uint16) * 257, ramp.astype(np.int32) * 257, ramp.astype(np.float32) / 255):
        form = "PNG" if deep.dtype == np.uint16 else "TIFF"
        pixels = np.asarray(open_rgb(saved(Image.fromarray(deep), form)))
        np.testing.assert_array_equal(pixels, np.repeat(ramp[..., None], 3, axis=2))
    official = np.asarray(open_rgb(saved(Image.fromarray(ramp.astype(np.uint16) * 257)), official=True))
    assert (official[ramp > 0] == 255).all()  # PIL's own conversion cuts


def test_the_camera_orientation_is_applied():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to see it upright
    data = saved(image, "PNG", exif=exif)
    np.testing.assert_array_equal(np.asarray(open_rgb(data)), np.rot90(np.asarray(image), -1))
    np.testing.assert_array_equal(np.asarray(open_rgb(data, official=True)), np.asarray(image))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_are_white(mode):
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.paste((200, 200, 200, 255), (0, 0, 2, 4))
    pixels = np.asarray(open_rgb(saved(image.convert(mode))))
    assert (pixels[:, 2:] == 255).all() and (np.abs(pixels[:, :2].astype(int) - 200) < 3).all()


def test_what_cannot_be_used_says_why(tmp_path):
    for data, reason in (
        (b"<html>", "corrupt image: not in"),
        (b"version https://git-lfs.github.com/spec/v1\n", "corrupt image: a git-lfs pointer"),
        (image_bytes(0)[:100], "corrupt image"),
        (huge_png(60_000), "image too large"),
        (huge_png(int(MAX_PIXELS**0.5) + 1), "image too large"),
    ):
        with pytest.raises(BadSample, match=f"^{reason}"):
            open_rgb(data)
    with pytest.raises(BadSample, match="^missing image"):
        open_rgb(tmp_path / "absent.jpg")
    assert open_rgb(image_bytes(0)[:-100], truncated=True).size == (24, 24)
    assert open_image(saved(Image.new("P", (2, 2)))).mode == "P"


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "a\0b", "x" * 300, 7, None, "", "a\\..\\b"])
def test_paths_stay_in_their_folder(name):
    with pytest.raises(BadSample, match="^bad path"):
        inside("/data", name)
    assert str(inside("/data", "a/b..c.jpg")) == "/data/a/b..c.jpg"
