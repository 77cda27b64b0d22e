"""Pictures: read from folders as they are meant, cut into tiles by the noise law, written back, refused by name."""

import io
import logging
import struct
import subprocess
import sys
import warnings
import zlib

import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff import data, pictures
from fastdiff.data import as_uint8, load_images, save_images, tiles
from fastdiff.errors import ArgumentError, BackendError, DataError

Image = pytest.importorskip("PIL.Image")

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (8, 12, 3), np.uint8)
GRAY = COLOUR[:, :, :1]


def encoded(pixels, form="PNG", **options):
    """The bytes of a picture file; `pixels` an array or a Pillow image."""
    image = pixels
    if isinstance(pixels, np.ndarray):
        image = Image.fromarray(pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def write(folder, **files):
    """Fill a folder: ``a_png=bytes`` is the file a.png."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / ".".join(name.rsplit("_", 1))).write_bytes(content)
    return folder


# --------------------------------------------------------------------------------------- read


def test_a_picture_of_the_right_size_keeps_its_values(tmp_path):
    write(tmp_path, a_png=encoded(COLOUR), b_bmp=encoded(COLOUR[::-1], "BMP"))
    images = load_images(tmp_path, (8, 12))
    np.testing.assert_array_equal(images, np.stack([COLOUR, COLOUR[::-1]]), strict=True)
    np.testing.assert_array_equal(load_images(tmp_path, None), images, strict=True)


FORMATS = {
    "png": "PNG", "PNG": "PNG", "bmp": "BMP", "tif": "TIFF", "tiff": "TIFF", "ppm": "PPM", "webp": "WEBP", "gif": "GIF",
}  # fmt: skip


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("pixels", [COLOUR, GRAY], ids=["colour", "gray"])
def test_every_format_without_loss(tmp_path, ending, pixels):
    options = {"lossless": True} if ending == "webp" else {}
    write(tmp_path, **{f"x_{ending}": encoded(pixels, FORMATS[ending], **options)})
    channels = 1 if pixels is GRAY and ending != "webp" else 3  # WebP has no gray
    images = load_images(tmp_path, None)
    np.testing.assert_array_equal(images, np.broadcast_to(pixels, (1, 8, 12, channels)))


def test_jpeg_is_close_and_its_ending_does_not_matter(tmp_path):
    smooth = np.add.outer(np.arange(32), np.arange(32)).astype(np.uint8)[..., None].repeat(3, axis=2)
    content = encoded(smooth, "JPEG", quality=95)
    write(tmp_path, a_jpg=content, b_JPEG=content, c_png=content)
    images = load_images(tmp_path, 32)
    assert np.abs(images.astype(int) - smooth).max() <= 4
    np.testing.assert_array_equal(images[1:], images[:-1])


def test_a_wide_picture_loses_both_sides_alike(tmp_path):
    wide = RNG.integers(0, 256, (8, 20, 3), np.uint8)
    write(tmp_path, a_png=encoded(wide), b_png=encoded(wide.swapaxes(0, 1).copy()))
    images = load_images(tmp_path, 8)
    np.testing.assert_array_equal(images[0], wide[:, 6:14])
    np.testing.assert_array_equal(images[1], wide.swapaxes(0, 1)[6:14])


@given(sides=st.tuples(*[st.integers(1, 40)] * 4))
@settings(max_examples=40)
def test_any_size_from_any_size(tmp_path_factory, sides):
    """One colour stays it, and the box never leaves the picture, whatever its rounding."""
    height, width, high, wide = sides
    folder = write(tmp_path_factory.getbasetemp() / "any", x_png=encoded(np.full((high, wide, 3), 77, np.uint8)))
    images = load_images(folder, (height, width), mode="rgb")
    np.testing.assert_array_equal(images, np.full((1, height, width, 3), 77, np.uint8), strict=True)


def test_shrinking_averages(tmp_path):
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    ramp = np.repeat(np.arange(64, dtype=np.uint8)[None] * 4, 64, axis=0)
    write(tmp_path, a_png=encoded(board), b_png=encoded(ramp))
    board, ramp = load_images(tmp_path, 8)[..., 0].astype(int)
    assert np.abs(board - 127.5).max() < 2  # picking single pixels gives 0 or 255
    want = np.arange(64).reshape(8, 8).mean(1) * 4
    assert np.abs(ramp - want)[:, 1:-1].max() <= 1


@pytest.mark.parametrize("size", [16, (16, 10), (5, 30)])
def test_a_large_jpeg_is_the_same_picture_when_decoded_small(tmp_path, monkeypatch, size):
    x, y = np.meshgrid(np.arange(640), np.arange(480))
    waves = np.stack([127.5 + 127 * np.sin(x / k + y / (90 - k)) for k in (20, 35, 50)], axis=-1).astype(np.uint8)
    write(tmp_path, a_jpg=encoded(waves, "JPEG", quality=95, exif=exif(6)))
    quick = load_images(tmp_path, size).astype(int)
    sizes = []
    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.draft", lambda image, mode, size: sizes.append(size))
    full = load_images(tmp_path, size).astype(int)
    assert sizes
    assert 0 < np.abs(quick - full).max() <= 6


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_camera_s_orientation_is_honoured(tmp_path, orientation):
    # How a picture is stored that a camera calls `orientation` (TIFF 6.0, tag 274).
    stored = {
        1: COLOUR, 2: COLOUR[:, ::-1], 3: COLOUR[::-1, ::-1], 4: COLOUR[::-1],
        5: COLOUR.swapaxes(0, 1), 6: np.rot90(COLOUR, 1), 7: np.rot90(COLOUR, 2).swapaxes(0, 1), 8: np.rot90(COLOUR, 3),
    }[orientation]  # fmt: skip
    write(tmp_path, x_png=encoded(np.ascontiguousarray(stored), exif=exif(orientation)))
    for size in (None, (8, 12)):
        np.testing.assert_array_equal(load_images(tmp_path, size)[0], COLOUR)


# --------------------------------------------------------------------------------------- colour


@pytest.mark.parametrize(
    ("modes", "channels"),
    [(["L"], 1), (["1", "L", "LA", "I;16"], 1), (["L", "RGB"], 3), (["P"], 3), (["RGBA"], 3), (["L", "P"], 3)],
)
def test_auto_is_gray_only_if_all_are(tmp_path, modes, channels):
    for i, mode in enumerate(modes):
        image = Image.new("I;16", (4, 4)) if mode == "I;16" else Image.fromarray(COLOUR).convert(mode)
        write(tmp_path, **{f"{i}_png": encoded(image)})
    assert load_images(tmp_path, 4).shape == (len(modes), 4, 4, channels)
    assert load_images(tmp_path, 4, mode="gray").shape[3] == 1
    assert load_images(tmp_path, 4, mode="rgb").shape[3] == 3


def test_gray_is_luma_and_rgb_of_gray_three_times_it(tmp_path):
    write(tmp_path / "c", x_png=encoded(COLOUR))
    write(tmp_path / "g", x_png=encoded(GRAY))
    luma = COLOUR.astype(float) @ [0.299, 0.587, 0.114]
    assert np.abs(load_images(tmp_path / "c", None, mode="gray")[0, ..., 0] - luma).max() <= 0.51
    np.testing.assert_array_equal(load_images(tmp_path / "g", None, mode="rgb")[0], GRAY.repeat(3, axis=2))


def on_white(values, alpha):
    return values * (alpha / 255) + 255 * (1 - alpha / 255)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
def test_what_is_transparent_lies_on_white(tmp_path, form):
    alpha = RNG.integers(0, 256, (8, 12, 1), np.uint8)
    alpha[0], alpha[1] = 0, 255
    options = {"lossless": True, "exact": True} if form == "WEBP" else {}
    write(tmp_path, **{f"x_{form}": encoded(np.concatenate([COLOUR, alpha], axis=2), form, **options)})
    assert np.abs(load_images(tmp_path, None)[0] - on_white(COLOUR, alpha)).max() <= 1
    np.testing.assert_array_equal(load_images(tmp_path, None)[0, 0], 255)


def test_transparency_of_gray_and_of_palettes(tmp_path):
    alpha = RNG.integers(0, 256, (8, 12, 1), np.uint8)
    palette = Image.fromarray(np.arange(96, dtype=np.uint8).reshape(8, 12))
    palette.putpalette(COLOUR.tobytes())
    one_colour = Image.fromarray(COLOUR)
    write(tmp_path / "la", x_png=encoded(np.concatenate([GRAY, alpha], axis=2)))
    write(tmp_path / "p", x_png=encoded(palette, transparency=alpha.tobytes()))
    write(tmp_path / "p1", x_gif=encoded(palette, "GIF", transparency=5))
    write(tmp_path / "rgb", x_png=encoded(one_colour, transparency=tuple(int(c) for c in COLOUR[2, 3])))
    write(tmp_path / "l", x_png=encoded(GRAY, transparency=int(GRAY[2, 3, 0])))
    la = load_images(tmp_path / "la", None)
    assert la.shape[3] == 1
    assert np.abs(la[0] - on_white(GRAY, alpha)).max() <= 1
    assert np.abs(load_images(tmp_path / "p", None)[0] - on_white(COLOUR, alpha)).max() <= 1
    want = COLOUR.copy()
    want[0, 5] = 255
    np.testing.assert_array_equal(load_images(tmp_path / "p1", None)[0], want)
    want = COLOUR.copy()
    want[2, 3] = 255
    np.testing.assert_array_equal(load_images(tmp_path / "rgb", None)[0], want)
    np.testing.assert_array_equal(load_images(tmp_path / "l", None)[0], np.where(GRAY[2, 3] == GRAY, 255, GRAY))


def test_sixteen_bits_are_rounded_to_eight(tmp_path):
    deep = RNG.integers(0, 1 << 16, (8, 12), np.uint16)
    deep[0, :4] = [0, 128, 129, 65535]  # 128 / 257 is below a half, 129 / 257 above
    write(
        tmp_path,
        a_png=encoded(deep),
        b_tif=encoded(deep, "TIFF"),
        c_pgm=b"P5 12 8 65535\n" + deep.astype(">u2").tobytes(),
    )
    write(tmp_path, d_tif=encoded(Image.frombytes("I;16B", (12, 8), deep.astype(">u2").tobytes()), "TIFF"))
    images = load_images(tmp_path, None)
    want = np.rint(deep / 257).astype(np.uint8)
    assert want[0, :4].tolist() == [0, 0, 1, 255]
    np.testing.assert_array_equal(images, np.broadcast_to(want[None, ..., None], (4, 8, 12, 1)))


# --------------------------------------------------------------------------------------- made by hand


def png(width, height, depth, colour, rows, **chunks):
    """The bytes of a PNG from the bytes of its rows (PNG 1.2, sections 3 and 4)."""

    def chunk(name, content):
        named = name.encode() + content
        return struct.pack(">I", len(content)) + named + struct.pack(">I", zlib.crc32(named))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    more = b"".join(chunk(name, content) for name, content in chunks.items())
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk("IHDR", header) + more + chunk("IDAT", data) + chunk("IEND", b"")


def tiff(width, height, samples, photometric, content, orientation=1):
    """The bytes of a TIFF of 8 bits (TIFF 6.0, section 2), little endian, in one strip."""
    at = 8 + 2 + 12 * 10 + 4
    tags = [
        (256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 1), (262, 3, photometric), (273, 4, at + 8),
        (274, 3, orientation), (277, 3, samples), (278, 4, height), (279, 4, len(content)),
    ]  # fmt: skip
    bits = struct.pack("<4H", 8, 8, 8, 8)
    entries = b""
    for tag, kind, value in tags:
        if tag == 258:
            entries += struct.pack("<HHII", tag, kind, samples, at if samples > 2 else 8)
        else:
            entries += struct.pack("<HHII", tag, kind, 1, value)  # a short one is in the lower half
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + bits + content


def deep(*values):
    return struct.pack(f">{len(values)}H", *values)


def test_pictures_made_by_hand_are_read_as_they_are_meant(tmp_path):
    gray_alpha = [deep(0x8000, 0xFFFF, 0, 0), deep(0, 0x8000, 0xFFFF, 0x4000)]  # values and alphas
    colour = [deep(0xFF80, 0x0080, 0x8123, 0, 0, 0)]
    palette, alphas = bytes([200, 10, 10, 0, 0, 0, 10, 200, 10, 255, 255, 255]), bytes([255, 0, 128])
    made = {
        "gray_alpha": (png(2, 2, 16, 4, gray_alpha), [[128, 255], [127, 255]]),
        "colour": (png(2, 1, 16, 2, colour), [[[255, 0, 129], [0, 0, 0]]]),
        "gray_key": (png(2, 1, 16, 0, [deep(0x8000, 0x8001)], tRNS=deep(0x8001)), [[128, 255]]),
        "gray_key_8": (png(2, 1, 8, 0, [bytes([7, 8])], tRNS=deep(8)), [[7, 255]]),
        "palette": (
            png(4, 1, 4, 3, [bytes([0x01, 0x23])], PLTE=palette, tRNS=alphas),
            [[[200, 10, 10], [255, 255, 255], [132, 228, 132], [255, 255, 255]]],
        ),
        "palette_1": (
            png(4, 1, 1, 3, [bytes([0b01100000])], PLTE=palette[:6]),
            [[[200, 10, 10], [0, 0, 0], [0, 0, 0], [200, 10, 10]]],
        ),
        "cmyk": (tiff(2, 1, 4, 5, bytes([0, 255, 255, 0, 0, 0, 0, 255])), [[[255, 0, 0], [0, 0, 0]]]),
        "white_is_zero": (tiff(2, 1, 1, 0, bytes([0, 250])), [[255, 5]]),
        # The first row is stored as the right-hand column: 6 in the tables of TIFF.
        "turned": (tiff(2, 3, 1, 1, bytes([1, 2, 3, 4, 5, 6]), orientation=6), [[5, 3, 1], [6, 4, 2]]),
    }
    for name, (content, want) in made.items():
        folder = write(tmp_path / name, **{("x_tif" if content.startswith(b"II") else "x_png"): content})
        want = np.array(want).reshape(*np.shape(want)[:2], -1)
        found = load_images(folder, None)
        assert found.shape == (1, *want.shape), name
        assert np.abs(found[0].astype(int) - want).max() <= 1, (name, found[0].tolist())


def test_a_cmyk_jpeg_of_photoshop_is_not_inverted(tmp_path):
    """Adobe writes ink as what is left of the paper; Pillow writes so too, which the marker APP14 says."""
    content = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)
    assert b"\xff\xee\x00\x0eAdobe" in content
    write(tmp_path, x_jpg=content)
    assert np.abs(load_images(tmp_path, 8)[0].astype(int) - [255, 0, 0]).max() <= 3


def test_colour_of_sixteen_bits_has_no_range_of_its_own(tmp_path):
    write(tmp_path, x_png=png(1, 1, 16, 2, [deep(4095, 0, 0)]))
    with pytest.raises(DataError, match="colour of 16 bits"):
        load_images(tmp_path, None, data_range=(0, 4095))


# --------------------------------------------------------------------------------------- more than fits into memory


@pytest.fixture
def many(tmp_path):
    rows = RNG.integers(0, 256, (70, 6, 5, 3), np.uint8)
    return write(tmp_path / "many", **{f"{i:02}_png": encoded(one) for i, one in enumerate(rows)}), rows


def test_a_cache_has_the_pictures_and_is_read_again(many, tmp_path, monkeypatch, capsys):
    folder, rows = many
    images = load_images(folder, None, cache=tmp_path / "cache", progress=True)
    assert isinstance(images, np.memmap)
    assert not images.flags.writeable
    np.testing.assert_array_equal(images, rows)
    assert "pictures: 70/70 (100 %)" in capsys.readouterr().err
    assert len(list((tmp_path / "cache").iterdir())) == 2
    decoded = []
    pixels = pictures._pixels
    monkeypatch.setattr(pictures, "_pixels", lambda *args: decoded.append(args) or pixels(*args))
    np.testing.assert_array_equal(load_images(folder, None, cache=tmp_path / "cache"), rows)
    assert not decoded
    (folder / "05.png").write_bytes(encoded(rows[6]))
    assert (load_images(folder, None, cache=tmp_path / "cache")[5] == rows[6]).all()
    assert load_images(folder, 4, cache=tmp_path / "cache").shape == (70, 4, 4, 3)
    assert len(decoded) == 140
    np.testing.assert_array_equal(load_images(folder, 4), load_images(folder, 4, cache=tmp_path / "cache"))


def test_a_cache_knows_which_were_left_out(tmp_path):
    (tmp_path / "in").mkdir()
    for k, name in enumerate("ab"):
        levels = {f"{i}_png": encoded(np.full((2, 2), 10 * k + i, np.uint8)) for i in range(k + 2)}
        write(tmp_path / "in" / name, **levels, bad_png=b"bad")
    want = load_images(tmp_path / "in", 2, labels=True, skip_bad=True)
    for _ in range(2):
        images, labels, names = load_images(tmp_path / "in", 2, labels=True, skip_bad=True, cache=tmp_path / "cache")
        np.testing.assert_array_equal(images, want[0])
        assert (labels.tolist(), names) == ([0, 0, 1, 1, 1], ["a", "b"])


def test_a_cache_is_whole_or_absent(many, tmp_path, monkeypatch):
    folder, _ = many
    write(folder, z_png=b"bad")
    with pytest.raises(DataError, match="1 of 71 pictures cannot be used"):
        load_images(folder, None, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    (folder / "z.png").write_bytes(encoded(np.zeros((4, 4, 3), np.uint8)))
    with pytest.raises(DataError, match=r"z\.png: 4 x 4 pixels"):
        load_images(folder, None, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    (folder / "z.png").unlink()
    load_images(folder, None, cache=tmp_path / "cache")
    place = next(file for file in (tmp_path / "cache").iterdir() if "kept" not in file.name)
    place.write_bytes(place.read_bytes()[:-9])
    with pytest.raises(DataError, match="remove it, and the pictures are read again"):
        load_images(folder, None, cache=tmp_path / "cache")


def test_a_cache_is_refused_or_asked_for(many, tmp_path, monkeypatch):
    folder, rows = many
    np.save(tmp_path / "x.npy", rows)
    with pytest.raises(ArgumentError, match=r"cache: .*numpy.load"):
        load_images(tmp_path / "x.npy", None, cache=tmp_path / "cache")
    with pytest.raises(ArgumentError, match="cache: got 3"):
        load_images(folder, None, cache=3)
    with pytest.raises(DataError, match="cannot be made as a folder"):
        load_images(folder, None, cache=tmp_path / "x.npy")
    monkeypatch.setattr(pictures, "_memory", lambda: 6299.0)
    with pytest.raises(ArgumentError, match="cache: got None, wants a folder: 70 pictures take"):
        load_images(folder, None)
    np.testing.assert_array_equal(load_images(folder, None, cache=tmp_path / "cache"), rows)


# --------------------------------------------------------------------------------------- folders


def test_the_order_is_that_of_code_points_whatever_the_folder_lists(tmp_path):
    names = ["10.png", "2.png", "B.png", "a.png", "a\u0308.png", "z.png", "ä.gif", "数.png", "🌸.png"]
    for i, name in enumerate(names):
        (tmp_path / name).write_bytes(encoded(np.full((1, 1), i, np.uint8), "GIF" if name.endswith("gif") else "PNG"))
    order = [
        names.index(n)
        for n in ("10.png", "2.png", "B.png", "a.png", "z.png", "ä.gif", "a\u0308.png", "数.png", "🌸.png")
    ]
    assert load_images(tmp_path, 1).reshape(-1).tolist() == order


def test_hidden_files_are_left_out_and_foreign_ones_logged(tmp_path, caplog):
    write(tmp_path, a_png=encoded(GRAY), notes_txt=b"x", Thumbs_db=b"x")
    (tmp_path / "._a.png").write_bytes(b"not one")
    (tmp_path / ".git").mkdir()
    with caplog.at_level(logging.WARNING, "fastdiff"):
        assert len(load_images(tmp_path, 8)) == 1
    (record,) = caplog.records
    assert record.getMessage().endswith(
        ": 2 files left out, as their names do not end like those of pictures: Thumbs.db, notes.txt"
    )
    caplog.clear()
    write(tmp_path / "sub", b_png=encoded(GRAY))
    (tmp_path / "notes.txt").unlink()
    (tmp_path / "Thumbs.db").unlink()
    with caplog.at_level(logging.WARNING, "fastdiff"):
        assert len(load_images(tmp_path)) == 1
    assert "labels=True reads them as classes): sub" in caplog.text


def test_enlarging_is_logged(tmp_path, caplog):
    write(tmp_path, a_png=encoded(GRAY), b_png=encoded(np.zeros((20, 9), np.uint8)))
    with caplog.at_level(logging.WARNING, "fastdiff"):
        load_images(tmp_path, 8)
        assert not caplog.records
        load_images(tmp_path, 9)
    assert "1 of 2 pictures are smaller than wanted" in caplog.text


def test_each_folder_is_a_class(tmp_path):
    for k, (name, count) in enumerate([("apple", 2), ("bäume", 1), ("zebra", 3)]):
        write(tmp_path / name, **{f"{i}_png": encoded(np.full((2, 2), 10 * k + i, np.uint8)) for i in range(count)})
    images, labels, names = load_images(tmp_path, 2, labels=True)
    assert names == ["apple", "bäume", "zebra"]
    np.testing.assert_array_equal(labels, np.array([0, 0, 1, 2, 2, 2], np.int64), strict=True)
    assert images[:, 0, 0, 0].tolist() == [0, 1, 10, 20, 21, 22]
    with pytest.raises(DataError, match=r"no pictures \(\.png, .*"):
        load_images(tmp_path, 2)
    write(tmp_path, loose_png=encoded(GRAY))
    with pytest.raises(DataError, match=r"of no class: loose\.png; with labels=True"):
        load_images(tmp_path, 2, labels=True)
    with pytest.raises(DataError, match="no folders; with labels=True"):
        load_images(write(tmp_path / ".hidden"), 2, labels=True)
    (tmp_path / "loose.png").unlink()
    (tmp_path / "nothing").mkdir()
    assert load_images(tmp_path, 2, labels=True)[2] == ["apple", "bäume", "zebra"]
    write(tmp_path / "nothing", x_png=b"")
    with pytest.raises(DataError, match=r"1 of 7 pictures cannot be used: nothing.x\.png \(not a picture\)"):
        load_images(tmp_path, 2, labels=True)


def test_classes_are_read_to_their_depth_and_what_is_left_out_is_counted(tmp_path, caplog):
    """As torchvision walks: a class's own pictures, then those of its folders, and of theirs."""
    for k, at in enumerate(["a", "a/deep", "a/deep/deeper", "a/z", "b/only/here"]):
        (tmp_path / at).mkdir(parents=True)
        write(tmp_path / at, x_png=encoded(np.full((2, 2), 60 * k, np.uint8)), notes_txt=b"x")
    (tmp_path / "a" / "deep" / "again").symlink_to(tmp_path / "a", target_is_directory=True)
    (tmp_path / "empty" / "inside").mkdir(parents=True)
    write(tmp_path / "a" / ".hidden", y_png=encoded(GRAY))
    with caplog.at_level(logging.WARNING, "fastdiff"):
        images, labels, names = load_images(tmp_path, 2, labels=True)
    assert images[:, 0, 0, 0].tolist() == [0, 60, 120, 180, 240]
    assert (labels.tolist(), names) == ([0, 0, 0, 0, 1], ["a", "b"])
    assert "left out 1 classes without pictures: empty" in caplog.text
    notes = "a/notes.txt, a/deep/notes.txt, a/deep/deeper/notes.txt, a/z/notes.txt, b/only/here/notes.txt"
    assert f"5 files left out, as their names do not end like those of pictures: {notes}" in caplog.text
    caplog.clear()
    write(tmp_path, top_png=encoded(GRAY))
    assert len(load_images(tmp_path, 2)) == 1
    assert "5 pictures left out, as folders (labels=True reads them as classes): a, b, empty" in caplog.text


def test_bad_pictures_are_left_out_and_listed_where_asked(tmp_path, caplog):
    for name, levels in {"a": (0, 100), "b": (200,)}.items():
        write(tmp_path / name, **{f"{k}_png": encoded(np.full((2, 2), k, np.uint8)) for k in levels})
        write(tmp_path / name, **{f"{i:02}_png": b"bad" for i in range(7)})
    with pytest.raises(DataError, match=r"skip_bad=True \(--skip-bad\) leaves out what is bad; 14 of 17 pictures"):
        load_images(tmp_path, 2, labels=True)
    images, labels, names = load_images(tmp_path, 2, labels=True, skip_bad=True)
    assert images[:, 0, 0, 0].tolist() == [0, 100, 200]
    assert (labels.tolist(), names) == ([0, 0, 1], ["a", "b"])
    assert "14 of 17 pictures left out: " in caplog.text
    assert all(f"{name}/{i:02}.png (not a picture)" in caplog.text for name in "ab" for i in range(7))
    assert load_images(tmp_path / "a", 2, skip_bad=True)[:, 0, 0, 0].tolist() == [0, 100]
    (tmp_path / "b" / "200.png").write_bytes(b"bad")
    with pytest.raises(DataError, match="classes of which no picture can be used: b"):
        load_images(tmp_path, 2, labels=True, skip_bad=True)
    with pytest.raises(DataError, match="8 of 8 pictures cannot be used"):
        load_images(tmp_path / "b", 2, skip_bad=True)


TWELVE = RNG.integers(0, 1 << 12, (8, 12), np.uint16)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "npy"])
def test_twelve_bits_in_files_of_sixteen(tmp_path, form, caplog):
    TWELVE[0, :4] = [0, 4095, 8, 9]  # 8 * 255 / 4095 = 0.498, 9 * 255 / 4095 = 0.56
    where = tmp_path
    if form == "npy":
        np.save(where := tmp_path / "x.npy", TWELVE[None])
        with pytest.raises(DataError, match="dtype uint16, where uint8 is wanted, or a data_range"):
            load_images(where, None)
    else:
        write(tmp_path, a_png=encoded(TWELVE, form))
        assert load_images(where, None).max() == 16
        assert "values from 0 to 16 of 0 to 255, less than an eighth of the range; data_range=" in caplog.text
    caplog.clear()
    read = load_images(where, None, data_range=(0, 4095))[0, ..., 0]
    np.testing.assert_array_equal(read, np.rint(TWELVE / 4095 * 255).astype(np.uint8))
    assert read[0, :4].tolist() == [0, 255, 0, 1]
    assert not caplog.records
    with pytest.raises(DataError, match=r"values from 0 to 4095, outside of data_range \(0, 4094\)"):
        load_images(where, None, data_range=(0, 4094))


def test_a_range_of_bytes(tmp_path):
    write(tmp_path, a_png=encoded(COLOUR // 16))
    read = load_images(tmp_path, None, data_range=(0, 15))[0]
    np.testing.assert_array_equal(read, COLOUR // 16 * 17)
    for bad in ((0, 0), (1, 0), 5, (0, np.nan), (0, 1, 2), ("a", 1)):
        with pytest.raises(ArgumentError, match=r"^data_range: got"):
            load_images(tmp_path, None, data_range=bad)


def test_no_folder_no_pictures(tmp_path):
    with pytest.raises(DataError, match=r"none: cannot be read: No such file"):
        load_images(tmp_path / "none")
    with pytest.raises(DataError, match=r"no pictures \(\.png"):
        load_images(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file: cannot be read: Not a directory"):
        load_images(tmp_path / "file")


def test_sizes_that_differ_name_two_files(tmp_path):
    write(tmp_path, a_png=encoded(COLOUR), b_png=encoded(COLOUR), c_png=encoded(COLOUR[:5]), d_png=encoded(COLOUR[:4]))
    with pytest.raises(DataError, match=r"c\.png: 5 x 12 pixels .*, where a\.png has 8 x 12"):
        load_images(tmp_path, None)
    assert load_images(tmp_path, 4).shape == (4, 4, 4, 3)


# --------------------------------------------------------------------------------------- hostile files


def chunk(kind, content):
    import zlib

    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def declared(width, height):
    """A PNG that claims a size and has three bytes of it."""
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\x00\x00\x00"
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"\0\0\0") + chunk(b"IEND", b"")


FRAMES = [Image.fromarray(COLOUR), Image.fromarray(np.ascontiguousarray(COLOUR[::-1]))]
NOISE = Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8))
HOSTILE = {
    "text_png": (b"this is text", "not a picture"),
    "zero_png": (b"", "not a picture"),
    "zero_jpg": (b"", "not a picture"),
    "signature_png": (encoded(NOISE)[:8], ".*"),
    "header_png": (encoded(NOISE)[:40], ".*"),
    "cut_png": (encoded(NOISE)[:-4000], ".*truncated.*"),
    "cut_jpg": (encoded(NOISE, "JPEG")[:-2000], ".*truncated.*"),
    "cut_gif": (encoded(NOISE, "GIF")[:-2000], ".*truncated.*"),
    "cut_webp": (encoded(NOISE, "WEBP")[:-500], ".*"),
    "cut_bmp": (encoded(NOISE, "BMP")[:-2000], ".*truncated.*"),
    "damaged_png": (encoded(NOISE)[:200] + b"\0" * 50 + encoded(NOISE)[250:], ".*"),
    "huge_png": (declared(100_000, 100_000), ".*decompression bomb.*"),
    "empty_png": (declared(30, 30), ".*"),
    "moving_gif": (encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), "2 pictures in one file"),
    "moving_png": (encoded(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]), "2 pictures in one file"),
    "moving_webp": (encoded(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]), "2 pictures in one file"),
    "pages_tif": (encoded(FRAMES[0], "TIFF", save_all=True, append_images=FRAMES[1:]), "2 pictures in one file"),
    "float_tif": (encoded(np.ones((4, 4), np.float32), "TIFF"), "mode F: values of no known range"),
    "wide_tif": (encoded(np.ones((4, 4), np.int32), "TIFF"), "mode I: values of no known range"),
    "script_png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("mode", ["auto", "rgb"])
@pytest.mark.parametrize("size", [None, 8])
def test_hostile_files_are_named(tmp_path, name, mode, size):
    content, reason = HOSTILE[name]
    write(tmp_path, good_png=encoded(COLOUR), **{name: content})
    shown = ".".join(name.rsplit("_", 1))
    with pytest.raises(DataError, match=rf"1 of 2 pictures cannot be used: {shown} \({reason}\)$") as caught:
        load_images(tmp_path, size, mode=mode)
    assert str(tmp_path) in str(caught.value)


def test_all_bad_files_are_named_up_to_ten(tmp_path):
    good = {f"good{i}_png": encoded(COLOUR) for i in range(3)}
    bad = {f"{i:02}_png": (b"", encoded(NOISE)[:-4000])[i % 2] for i in range(12)}
    write(tmp_path, **good, **bad)
    with pytest.raises(DataError, match="12 of 15 pictures cannot be used: ") as caught:
        load_images(tmp_path)
    text = str(caught.value)
    assert [f"{i:02}.png" in text for i in range(12)] == [True] * 10 + [False] * 2
    assert text.endswith(" and 2 more")
    for name in list(bad)[10:]:
        (tmp_path / ".".join(name.rsplit("_", 1))).unlink()
    with pytest.raises(DataError, match=r"10 of 13 .* 09\.png \([^)]*\)*$"):
        load_images(tmp_path)


def test_a_picture_above_pillow_s_limit_is_refused_and_the_limit_is_the_user_s(tmp_path, monkeypatch):
    write(tmp_path, x_png=encoded(COLOUR))  # 96 pixels
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
    with pytest.raises(DataError, match=r"x\.png \(.*bomb"):  # Pillow's warning is an error here
        load_images(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError, match=r"x\.png \(8 x 12 pixels, more than PIL\.Image\.MAX_IMAGE_PIXELS = 60\)"):
            load_images(tmp_path)
    for limit in (96, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert len(load_images(tmp_path)) == 1


def test_stills_of_formats_that_can_move_are_read(tmp_path):
    write(tmp_path, a_gif=encoded(COLOUR, "GIF"), b_webp=encoded(COLOUR, "WEBP", lossless=True))
    write(tmp_path, c_jpg=encoded(FRAMES[0], "MPO", save_all=True, append_images=FRAMES[1:], quality=100))
    images = load_images(tmp_path, None)
    np.testing.assert_array_equal(images[:2], np.stack([COLOUR, COLOUR]))
    want = np.asarray(Image.open(io.BytesIO(encoded(COLOUR, "JPEG", quality=100))))
    np.testing.assert_array_equal(images[2], want)  # the first view of the camera's two


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
@given(data=st.data())
@settings(max_examples=40)
def test_damaged_bytes_are_a_picture_or_a_data_error(tmp_path_factory, form, data):
    content = bytearray(encoded(COLOUR, form))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    folder = write(tmp_path_factory.getbasetemp() / "damaged", x_png=bytes(content))
    try:
        images = load_images(folder, 4)
    except DataError:
        return
    assert images.shape[:3] == (1, 4, 4)
    assert images.dtype == np.uint8


def test_a_link_to_nowhere_and_a_file_without_permission(tmp_path):
    (tmp_path / "x.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(DataError, match=r"x\.png \(No such file or directory\)"):
        load_images(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"size": 0}, "size"),
        ({"size": 8.5}, "size"),
        ({"size": True}, "size"),
        ({"size": "8"}, "size"),
        ({"size": (8,)}, "size"),
        ({"size": (8, 8, 3)}, "size"),
        ({"size": (8, 0)}, "size"),
        ({"size": 10**6}, "size"),
        ({"mode": "grey"}, "mode"),
    ],
)
def test_arguments_are_refused(tmp_path, arguments, named):
    write(tmp_path, a_png=encoded(COLOUR))
    with pytest.raises(ArgumentError, match=f"^{named}: got "):
        load_images(tmp_path, **arguments)


def test_without_pillow_the_error_says_what_to_install(tmp_path, monkeypatch):
    write(tmp_path, a_png=encoded(COLOUR))
    monkeypatch.setitem(sys.modules, "PIL", None)
    for act in (
        lambda: load_images(tmp_path),
        lambda: tiles(tmp_path, 4, 2),
        lambda: save_images(COLOUR[None], tmp_path / "new"),
    ):
        with pytest.raises(BackendError, match=r'pip install "fastdiff-engine\[plot\]"'):
            act()
    assert not (tmp_path / "new").exists()


def test_pillow_is_imported_on_first_use_only():
    code = "import sys, fastdiff, fastdiff.plots; assert 'PIL' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# --------------------------------------------------------------------------------------- arrays in files


@pytest.mark.parametrize("shape", [(3, 8, 12), (3, 8, 12, 1), (3, 8, 12, 3)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_files_hold_pictures_too(tmp_path, shape, order):
    array = RNG.integers(0, 256, shape, np.uint8)
    np.save(tmp_path / "x.npy", np.asarray(array, order=order))
    channels = shape[3] if len(shape) == 4 else 1
    images = load_images(tmp_path / "x.npy", None)
    np.testing.assert_array_equal(images, array.reshape(3, 8, 12, channels), strict=True)
    np.testing.assert_array_equal(load_images(tmp_path / "x.npy", 8), images[:, :, 2:10], strict=True)
    assert load_images(tmp_path / "x.npy", 8, mode="gray").shape[3] == 1
    with pytest.raises(ArgumentError, match=r"^labels: got True for an \.npy file"):
        load_images(tmp_path / "x.npy", labels=True)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 4), np.uint8), r"shape \(3, 4\), where \(pictures, height, width\)"),
        (np.zeros((3, 4, 4, 2), np.uint8), r"shape \(3, 4, 4, 2\)"),
        (np.zeros((0, 4, 4), np.uint8), r"shape \(0, 4, 4\)"),
        (np.zeros((3, 4, 4), np.float32), r"dtype float32, where uint8"),
        (np.zeros((3, 4, 4), bool), r"dtype bool"),
    ],
)
def test_npy_refusals(tmp_path, array, message):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(DataError, match=rf"x\.npy: {message}"):
        load_images(tmp_path / "x.npy")
    with pytest.raises(DataError, match=r"y\.npy: cannot be read"):
        load_images(tmp_path / "y.npy")


# --------------------------------------------------------------------------------------- tiles

PHOTOS = [RNG.integers(0, 256, (20, 30, 3), np.uint8), RNG.integers(0, 256, (9, 7, 3), np.uint8)]


def test_tiles_are_the_law():
    got = tiles(PHOTOS, (6, 5), 20, seed=2**40 + 3)
    assert got.shape == (20, 6, 5, 3)
    assert got.dtype == np.uint8
    seen = set()
    for k in range(20):
        w = naive.words(0, seed=2**40 + 3, stream=7, step=1, row=k)
        photo = PHOTOS[w[0] * 2 >> 32]
        top, left = w[1] * (photo.shape[0] - 5) >> 32, w[2] * (photo.shape[1] - 4) >> 32
        np.testing.assert_array_equal(got[k], photo[top : top + 6, left : left + 5])
        seen.add((w[0] * 2 >> 32, top, left))
    assert len(seen) > 10
    np.testing.assert_array_equal(tiles(PHOTOS, (6, 5), 5, seed=2**40 + 3, first_sample=9), got[9:14])


def test_tiles_reach_every_place():
    gray = np.arange(20, dtype=np.uint8).reshape(4, 5)
    corners = tiles([gray], (3, 3), 400, seed=1)[:, 0, 0, 0]
    assert sorted(set(corners.tolist())) == [0, 1, 2, 5, 6, 7]
    assert tiles([gray], (4, 5), 3, seed=1).tolist() == [gray[..., None].tolist()] * 3
    assert tiles([gray], 2, 0).shape == (0, 2, 2, 1)


def test_tiles_of_a_folder_are_those_of_its_pictures(tmp_path):
    write(tmp_path, a_png=encoded(PHOTOS[0]), b_png=encoded(PHOTOS[1]))
    np.testing.assert_array_equal(tiles(tmp_path, 6, 9, seed=4), tiles(PHOTOS, 6, 9, seed=4))
    np.testing.assert_array_equal(tiles(tmp_path, 6, 9, short=8), tiles(PHOTOS, 6, 9, short=8))
    assert tiles(tmp_path, 6, 9, mode="gray").shape == (9, 6, 6, 1)
    assert tiles([PHOTOS[0], PHOTOS[0][..., :1]], 6, 9).shape == (9, 6, 6, 3)
    assert tiles([PHOTOS[0][..., 0], PHOTOS[0][..., :1]], 6, 9).shape == (9, 6, 6, 1)
    with pytest.raises(DataError, match="no pictures"):
        tiles(write(tmp_path / "none"), 6, 9)


def test_pictures_can_be_shrunk_before_they_are_cut(tmp_path):
    board = (np.indices((64, 128)).sum(0) % 2 * 255).astype(np.uint8)
    shrunk = tiles([board], (8, 16), 5, short=8)
    assert np.abs(shrunk.astype(int) - 127.5).max() < 2  # 8 x 16 is the whole of it
    with pytest.raises(ArgumentError, match=r"^size: .*fit into pictures\[0\], \(8, 16\)"):
        tiles([board], (9, 9), 5, short=8)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"pictures": []}, "pictures"),
        ({"pictures": [PHOTOS[0].astype(float)]}, r"pictures\[0\]"),
        ({"pictures": [PHOTOS[0], np.zeros((4, 4, 4), np.uint8)]}, r"pictures\[1\]"),
        ({"pictures": [np.zeros((0, 4), np.uint8)]}, r"pictures\[0\]"),
        ({"size": None}, "size"),
        ({"size": 10}, "size"),
        ({"count": -1}, "count"),
        ({"seed": -1}, "seed"),
        ({"short": 0}, "short"),
        ({"mode": "x"}, "mode"),
        ({"first_sample": -1}, "first_sample"),
    ],
)
def test_tiles_refuse(arguments, named):
    with pytest.raises(ArgumentError, match=f"^{named}: got "):
        tiles(**({"pictures": PHOTOS, "size": 4, "count": 2} | arguments))


# --------------------------------------------------------------------------------------- written


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_saved_is_loaded(tmp_path, channels):
    images = RNG.integers(0, 256, (12, 5, 7, channels), np.uint8)
    files = save_images(images, tmp_path / "new")
    assert [file.name for file in files] == [f"{k:04}.png" for k in range(12)]
    assert sorted((tmp_path / "new").iterdir()) == files
    np.testing.assert_array_equal(load_images(tmp_path / "new", None), images, strict=True)
    names = [file.name for file in save_images(images[:2], tmp_path / "new", first=99_999)]
    assert names == ["099999.png", "100000.png"]  # one width a call, so that names sort as numbers


def test_existing_files_are_kept_unless_asked(tmp_path):
    images = RNG.integers(0, 256, (5, 2, 2, 1), np.uint8)
    save_images(images[:1], tmp_path, first=3)
    with pytest.raises(DataError, match=r"not overwritten: 0003\.png$"):
        save_images(images, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    save_images(images, tmp_path, overwrite=True)
    np.testing.assert_array_equal(load_images(tmp_path, None), images)


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "none" / "deep"):
        for act in (lambda at: save_images(COLOUR[None], at), lambda at: data.picture_files(at, 5)):
            with pytest.raises(DataError, match=f"{folder.name}: cannot be made as a folder"):
                act(folder)
    files = data.picture_files(tmp_path / "new", 3, first=8)
    assert [file.name for file in files] == ["0008.png", "0009.png", "0010.png"]
    assert not list((tmp_path / "new").iterdir())


def test_floats_are_rounded_and_clipped():
    values = np.array([-9, 0, 0.49, 0.51, 254.6, 255, 300, 1e300]).reshape(1, 8, 1, 1)
    assert as_uint8(values).reshape(-1).tolist() == [0, 0, 0, 1, 255, 255, 255, 255]
    unit = np.array([-1.2, -1, 0.003, 1, 2], np.float32).reshape(1, 5, 1, 1)
    assert as_uint8(unit, data_range=(-1, 1)).reshape(-1).tolist() == [0, 0, 128, 255, 255]
    assert as_uint8(COLOUR[None]) is not None
    np.testing.assert_array_equal(as_uint8(COLOUR[None] / 255, data_range=(0, 1))[0], COLOUR)
    np.testing.assert_array_equal(as_uint8(COLOUR[None].astype(np.int64))[0], COLOUR)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"images": COLOUR}, "images"),
        ({"images": np.zeros((2, 4, 4, 2))}, "images"),
        ({"images": np.zeros((2, 0, 4, 3))}, "images"),
        ({"images": np.full((1, 1, 1, 1), np.nan)}, "images"),
        ({"images": np.zeros((1, 1, 1, 1), complex)}, "images"),
        ({"data_range": (1, 1)}, "data_range"),
        ({"data_range": (1, 0)}, "data_range"),
        ({"data_range": 255}, "data_range"),
        ({"data_range": (0, 1, 2)}, "data_range"),
        ({"data_range": (0, np.inf)}, "data_range"),
        ({"first": -1}, "first"),
    ],
)
def test_save_images_refuse(tmp_path, arguments, named):
    with pytest.raises(ArgumentError, match=f"^{named}: got "):
        save_images(**({"images": COLOUR[None], "folder": tmp_path / "new"} | arguments))
    assert not (tmp_path / "new").exists()
