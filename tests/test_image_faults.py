"""Folders with files that are no pictures, or odd ones: each named, counted and left out, or read as it is meant."""

from __future__ import annotations

import io
import os
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import transferkit as tk
from transferkit import errors, image_headers
from transferkit.data import batches

Image = pytest.importorskip("PIL.Image")
PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
SMOOTH = np.broadcast_to(np.linspace(0, 255, 30)[None, :, None], (20, 30, 3)).astype(np.uint8)


def coded(kind: str, pixels: Any = PIXELS, mode: str | None = None, **options: Any) -> bytes:
    picture = Image.fromarray(pixels)
    out = io.BytesIO()
    (picture.convert(mode) if mode else picture).save(out, kind, **options)
    return out.getvalue()


PNG, JPEG, GIF, BMP = (coded(kind) for kind in ("PNG", "JPEG", "GIF", "BMP"))


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header says so, whatever it holds."""
    head = b"IHDR" + struct.pack(">II", width, height) + b"\x08\x02\0\0\0"
    return PNG[:8] + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + PNG[33:]


def jpeg_with(old: bytes, new: bytes) -> bytes:
    assert JPEG.count(old) >= 1
    return JPEG.replace(old, new, 1)


SIZES = struct.pack(">BHH", 8, 20, 30)  # of the JPEG's frame header: bits, height, width
NOTHING = "no picture: it begins with "  # and the first twelve bytes
UNDECODED = r"damaged, or of a kind that isn't decoded \(.+\)"

#: What is in the file → what is said of it, whole (a pattern where TensorFlow has its say).
BAD: dict[str, tuple[str, bytes | Callable[[Path], object], str]] = {
    "empty": ("x.jpg", b"", "an empty file"),
    "text": ("x.jpg", b"hello world, I am no picture at all", NOTHING),
    "a page of an error": ("x.jpg", b"<!DOCTYPE html><html>404", NOTHING),
    "zeros": ("x.jpg", bytes(4096), NOTHING),
    "SVG": ("x.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>", NOTHING),
    "WebP": ("x.jpg", b"RIFF\x24\0\0\0WEBPVP8 " + bytes(40), "a WebP file, which TensorFlow doesn't decode"),
    "TIFF": ("x.jpg", coded("TIFF"), "a TIFF file, which TensorFlow doesn't decode"),
    "HEIC": ("x.jpg", b"\0\0\0\x18ftypheic" + bytes(40), "a HEIC file, which TensorFlow doesn't decode"),
    "AVIF": ("x.jpg", b"\0\0\0\x1cftypavif" + bytes(40), "a AVIF file, which TensorFlow doesn't decode"),
    "JPEG 2000": ("x.jpg", b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40), "a JPEG 2000 file, which TensorFlow doesn't decode"),
    "JPEG XL": ("x.jpg", b"\xff\x0a" + bytes(40), "a JPEG XL file, which TensorFlow doesn't decode"),
    "Photoshop": ("x.png", b"8BPS\0\1" + bytes(40), "a Photoshop file, which TensorFlow doesn't decode"),
    "PDF": ("x.png", b"%PDF-1.7\n" + bytes(40), "a PDF file, which TensorFlow doesn't decode"),
    "icon": ("x.bmp", b"\0\0\1\0\1\0" + bytes(40), "a icon file, which TensorFlow doesn't decode"),
    "PNG moved as text": ("x.png", PNG.replace(b"\r\n", b"\n"), NOTHING),
    "PNG's signature alone": ("x.png", PNG[:8], "a PNG without its header"),
    "PNG cut in its header": ("x.png", PNG[:20], "a file that ends within its header"),
    "PNG cut": ("x.png", PNG[: len(PNG) // 2], UNDECODED + "; it doesn't end as a PNG does"),
    "PNG without a width": ("x.png", png_of(0, 20), "a PNG of 0 × 20 pixels"),
    "decompression bomb": ("x.png", png_of(100_000, 100_000), "a PNG of 100,000 × 100,000 pixels, above the limit of 1,000,000"),
    "JPEG cut in its header": ("x.jpg", JPEG[:3], "a file that ends within its header"),
    "JPEG cut": ("x.jpg", JPEG[: len(JPEG) // 2], UNDECODED + "; it doesn't end as a JPEG does"),
    "JPEG with a damaged header": ("x.jpg", JPEG[:2] + b"\0\0" + JPEG[4:], "a JPEG whose header is damaged"),
    "JPEG without a frame": ("x.jpg", b"\xff\xd8\xff\xda" + bytes(20), "a JPEG without its size"),
    "huge JPEG": (
        "x.jpg",
        jpeg_with(SIZES, struct.pack(">BHH", 8, 60_000, 60_000)),
        "a JPEG of 60,000 × 60,000 pixels, above the limit of 1,000,000",
    ),
    "JPEG of 12 bits": (
        "x.jpg",
        jpeg_with(SIZES, struct.pack(">BHH", 12, 20, 30)),
        UNDECODED + "; a JPEG of a rare kind",
    ),
    "lossless JPEG": ("x.jpg", jpeg_with(b"\xff\xc0", b"\xff\xc3"), UNDECODED + "; a JPEG of a rare kind"),
    "GIF cut": ("x.gif", GIF[: len(GIF) // 2].replace(b"\x3b", b"\x3a"), UNDECODED + "; it doesn't end as a GIF does"),
    "GIF without a height": ("x.gif", GIF[:8] + b"\0\0" + GIF[10:], "a GIF of 30 × 0 pixels"),
    "BMP with a palette": (
        "x.bmp",
        coded("BMP", mode="P"),
        "a BMP with a palette, whose numbers TensorFlow takes for shades of grey",
    ),
    "BMP of 1 bit": ("x.bmp", coded("BMP", mode="1"), UNDECODED + "; a BMP of 1 bits a pixel"),
    "BMP cut": ("x.bmp", BMP[: len(BMP) // 2], UNDECODED + "; a BMP of 24 bits a pixel"),
    "link to nothing": ("x.jpg", lambda path: path.symlink_to("nowhere.jpg"), "a link to a file that isn't there"),
    "pipe": ("x.jpg", lambda path: os.mkfifo(path), "no file, but a device, pipe or socket"),
}


def folder(root: Path, name: str = "good.png", content: bytes | Callable[[Path], object] = PNG) -> Path:
    """A class of three good pictures, and one with a file of that content besides."""
    for number, name_of_good in enumerate(("cats/a.png", "cats/b.png", "cats/c.jpg", "dogs/d.png")):
        (root / name_of_good).parent.mkdir(parents=True, exist_ok=True)
        (root / name_of_good).write_bytes(coded("PNG" if name_of_good.endswith("png") else "JPEG", PIXELS[number:]))
    path = root / "dogs" / name
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)
    return root


def read(root: Path, **options: Any) -> tk.Data:
    return tk.Data.image_folder(root, size=(20, 30), max_pixels=1_000_000, **options)


@pytest.mark.parametrize("fault", BAD)
def test_what_is_no_picture_is_named_before_training(tmp_path: Path, fault: str) -> None:
    name, content, said = BAD[fault]
    root = folder(tmp_path / "photos", name, content)
    with pytest.raises(errors.DataError) as caught:
        read(root)
    (found,) = caught.value.found
    place = f"{root / 'dogs' / name}: "
    assert found.startswith(place)
    if said == NOTHING:
        assert isinstance(content, bytes)
        said += repr(content[:12])
    if said.startswith(UNDECODED):
        assert re.fullmatch(said, found.removeprefix(place)), found
    else:
        assert found == place + said
    assert str(caught.value) == (
        f"Reading pictures from {str(root)!r}.\n"
        f"  found: {found}\n"
        "  likely cause: 1 of 5 files that are named like pictures can't be read as one\n"
        "  to fix it: replace them or take them out of the folder; or leave them out: max_bad=1"
    )
    with pytest.warns(UserWarning, match="Left out 1 of 5 pictures: "):
        data = read(root, max_bad=1)
    assert len(data) == 4
    assert [(one.path, f"{one.path}: {one.reason}") for one in data.bad] == [(str(root / "dogs" / name), found)]
    assert sum(len(batch.x) for batch in batches(data, batch_size=2)) == 4


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder(tmp_path / "photos")

    def refuse(path: Any, *rest: Any) -> Any:
        if str(path).endswith("good.png"):
            raise PermissionError(13, "Permission denied")
        return open(path, *rest)

    monkeypatch.setattr(image_headers, "open", refuse, raising=False)  # root may read everything
    with pytest.raises(errors.DataError) as caught:
        read(root)
    assert caught.value.found == (f"{root / 'dogs' / 'good.png'}: a file that can't be read (Permission denied)",)


def test_all_bad_files_are_named_and_counted(tmp_path: Path) -> None:
    root = folder(tmp_path / "photos")
    for number in range(30):
        (root / "cats" / f"z{number:02}.jpg").write_bytes(b"")
    with pytest.raises(errors.DataError) as caught:
        read(root, max_bad=29)
    assert len(caught.value.found) == 21
    assert caught.value.found[-1] == "and 10 more"
    assert "30 of 35 files" in str(caught.value)
    with pytest.raises(errors.DataError):
        read(root, max_bad=0.8)
    with pytest.warns(UserWarning, match="Left out 30 of 35"):
        assert len(read(root, max_bad=0.9)) == 5


def test_a_class_of_which_nothing_is_left_is_named(tmp_path: Path) -> None:
    root = folder(tmp_path / "photos")
    (root / "birds").mkdir()
    (root / "birds" / "x.jpg").write_bytes(b"")
    with pytest.raises(errors.DataError) as caught:
        read(root, max_bad=5)
    assert caught.value.found == ("no picture in 'birds'", f"left out: {root / 'birds' / 'x.jpg'}: an empty file")


def damaged_in_the_middle() -> bytes:
    at = PNG.index(b"IDAT") + 40
    return PNG[:at] + bytes([PNG[at] ^ 255]) + PNG[at + 1 :]


def test_damage_in_the_middle_is_found_when_pixels_are_looked_at(tmp_path: Path) -> None:
    root = folder(tmp_path / "photos", "x.png", damaged_in_the_middle())
    with pytest.raises(errors.DataError, match=r"x\.png: damaged, or of a kind that isn't decoded"):
        read(root, check="pixels")
    with pytest.warns(UserWarning, match="Left out 1 of 5"):
        assert len(read(root, check="pixels", max_bad=1)) == 4
    with pytest.raises(errors.PlanError, match="check='all'"):
        read(root, check="all")


def test_damage_that_shows_in_training_names_the_file(tmp_path: Path) -> None:
    root = folder(tmp_path / "photos", "x.png", damaged_in_the_middle())
    for number in range(40):
        (root / "cats" / f"{number:02}.png").write_bytes(coded("PNG", PIXELS[:, ::-1][:, number % 20 :]))
    data = read(root)
    model = tk.ModelBuilder((20, 30, 3)).conv(2).pool().classifier(data.class_names).build(seed=0)
    plan = tk.FineTuner().phase("all", train=tk.Layers.all(), epochs=1)
    with pytest.raises(errors.DataError) as caught:
        plan.fit(model, data, batch_size=4, verbose=0, seed=0)
    (found,) = caught.value.found
    assert found.startswith(f"{root / 'dogs' / 'x.png'}: damaged, or of a kind that isn't decoded")
    assert 'check="pixels"' in str(caught.value)


def first(root: Path) -> Any:
    """The pixels of the picture that the test put in, as they are trained on."""
    data = read(root)
    assert data.bad == ()
    return data.rows(np.array([len(data) - 1])).x[0]


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return coded("JPEG", SMOOTH, quality=95, exif=exif)


def test_odd_pictures_are_read_as_they_are_meant(tmp_path: Path) -> None:
    def near(name: str, content: bytes, expected: Any, tolerance: float) -> None:
        seen = first(folder(tmp_path / name.replace("/", "-"), "x" + os.path.splitext(name)[1], content))
        assert np.abs(seen - np.asarray(expected, np.float32)).max() <= tolerance, name

    still = [Image.fromarray(PIXELS).quantize(255), Image.fromarray(SMOOTH).quantize(255)]
    moving = io.BytesIO()
    still[0].save(moving, "GIF", save_all=True, append_images=still[1:])
    alpha = np.dstack([PIXELS, np.full((20, 30), 9, np.uint8)])
    deep = (np.arange(600).reshape(20, 30) * 100).astype(np.uint16)
    grey = np.repeat(PIXELS[:, :, :1], 3, axis=2)
    near("PNG named.jpg", PNG, PIXELS, 0)
    near("UPPER.PNG", PNG, PIXELS, 0)
    near("palette.png", coded("PNG", mode="P"), Image.fromarray(PIXELS).convert("P").convert("RGB"), 0)
    near("animated.gif", moving.getvalue(), still[0].convert("RGB"), 0)
    near("alpha.png", coded("PNG", alpha), PIXELS, 0)
    near("grey.png", coded("PNG", PIXELS[:, :, 0]), grey, 0)
    near("16 bits.png", coded("PNG", deep), np.repeat((deep // 256)[:, :, None], 3, axis=2), 1)
    near("interlaced.png", tf.io.encode_png(PIXELS).numpy(), PIXELS, 0)
    near("CMYK.jpg", coded("JPEG", SMOOTH, "CMYK", quality=95), SMOOTH, 6)
    near("progressive.jpg", coded("JPEG", SMOOTH, progressive=True, quality=95), SMOOTH, 6)
    near("24 bits.bmp", BMP, PIXELS, 0)
    near("grey.bmp", coded("BMP", PIXELS[:, :, 0]), grey, 0)
    near("32 bits.bmp", coded("BMP", mode="RGBA"), PIXELS, 0)


def test_a_folder_one_level_too_high_is_an_error(tmp_path: Path) -> None:
    for part in ("test", "train"):
        folder(tmp_path / "photos" / part)
    with pytest.raises(errors.DataError) as caught:
        read(tmp_path / "photos")
    assert str(caught.value).partition("\n")[2] == (
        "  found: 'test', 'train', each with the same folders in it: 'cats', 'dogs'\n"
        "  likely cause: these are parts of a data set, for training and testing say, and the classes lie one level below\n"
        f"  to fix it: give one of the parts: {str(tmp_path / 'photos' / 'train')!r}"
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(tmp_path: Path, orientation: int) -> None:
    from PIL import ImageOps

    raw = turned(orientation)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(raw))), np.float32)
    root = folder(tmp_path / "photos", "x.jpg", raw)
    data = tk.Data.image_folder(root, size=upright.shape[:2])
    assert np.abs(data.rows(np.array([len(data) - 1])).x[0] - upright).max() <= 6
    said = f"1 photographs are turned upright as their Exif data says: {str(root / 'dogs' / 'x.jpg')!r}"
    assert (said in data.notes) == (orientation != 1)


def test_what_is_passed_over_and_what_is_worth_knowing_is_said(tmp_path: Path) -> None:
    root = folder(tmp_path / "photos", "copy.jpg", coded("PNG", PIXELS))
    for hidden in ("._d.png", ".DS_Store", "Thumbs.db", "notes.txt", "old.webp", "new.webp"):
        (root / "dogs" / hidden).write_bytes(b"\0\5\x16\7")
    (root / "dogs" / "inside.jpg").mkdir()
    (root / "dogs" / "inside.jpg" / "e.png").write_bytes(coded("PNG", PIXELS[:, 2:]))
    (root / ".git").mkdir()
    (root / "cats" / "again.png").write_bytes(coded("PNG", PIXELS[1:]))
    data = read(root)
    assert len(data) == 7
    assert data.bad == ()
    assert data.notes == (
        "2 files that end in .webp aren't read",
        f"1 files are named as another format than theirs, and read all the same: {str(root / 'dogs' / 'copy.jpg')!r}",
        f"1 pictures are there twice: {f'{root}/cats/again.png = {root}/cats/b.png'!r}",
        f"1 pictures are there twice, in two classes: {f'{root}/cats/a.png = {root}/dogs/copy.jpg'!r}",
    )
    assert data.take(np.arange(3)).notes == data.notes
