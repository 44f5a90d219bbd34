import io

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from experiments import pictures
from tests.experiments import jpeg_sets


def by_pillow(file, box, size):
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB").crop(box).resize((size, size), Image.BILINEAR))


def by_us(file, box, size, mirrored=False):
    out = np.empty((size, size, 3), np.uint8)
    pictures.crop(file, lambda height, width: box, out, mirrored)
    return out


@settings(max_examples=100)
@given(
    kind=st.sampled_from(sorted(set(jpeg_sets.KINDS))),
    height=st.integers(17, 140),
    width=st.integers(17, 140),
    size=st.integers(16, 70),
    seed=st.integers(0, 1000),
)
def test_pictures_are_pillows(kind, height, width, size, seed):
    rng = np.random.default_rng(seed)
    file = jpeg_sets.encoded(jpeg_sets.picture(rng, height, width, detail=20), kind)
    box = pictures.random_box(height, width, rng.random(40).tolist())
    ours, pillows = by_us(file, box, size), by_pillow(file, box, size)
    difference = np.abs(ours.astype(int) - pillows)
    if kind not in ("png", "cmyk") and min(box[2] - box[0], box[3] - box[1]) >= 2 * size:  # decoded at half the size
        assert difference.max() <= 40
        assert difference.mean() < 6
    else:
        assert difference.max() <= 1
        assert difference.mean() < 0.3
    np.testing.assert_array_equal(by_us(file, box, size, mirrored=True), ours[:, ::-1])


def test_files_with_restart_markers_are_not_read_twice(monkeypatch):
    pixels = jpeg_sets.picture(np.random.default_rng(0), 200, 70, detail=30)
    file = jpeg_sets.encoded(pixels, "restarts")
    assert b"\xff\xdd" in file
    assert b"\xff\xd1" in file
    expected = by_pillow(file, (0, 0, 40, 40), 30)
    monkeypatch.setattr(pictures.Image, "open", None)
    assert np.abs(by_us(file, (0, 0, 40, 40), 30).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("kind", ["rgb", "444", "gray"])
def test_rows_that_are_not_decoded_change_nothing(kind):
    pixels = jpeg_sets.picture(np.random.default_rng(0), 100, 70, detail=30)
    file = jpeg_sets.encoded(pixels, kind)
    for bottom in range(30, 101):
        # With a byte after its end the file is decoded as a whole.
        box = 5, bottom - 30, 60, bottom
        np.testing.assert_array_equal(by_us(file, box, 28), by_us(file + b"\0", box, 28))


@pytest.mark.parametrize(("by", "size"), [(2, 40), (4, 20), (8, 10)])
def test_large_parts_are_decoded_at_a_fraction_of_the_size(by, size, monkeypatch):
    pixels = np.repeat(np.repeat(jpeg_sets.picture(np.random.default_rng(0), 17, 13), 16, 0), 16, 1)
    seen = []
    decode = simplejpeg.decode_jpeg
    monkeypatch.setattr(
        simplejpeg, "decode_jpeg", lambda file, **how: (seen.append(len(how["buffer"])), decode(file, **how))[1]
    )
    file, box = jpeg_sets.encoded(pixels), (50, 99, 150, 209)
    difference = np.abs(by_us(file, box, size).astype(int) - by_pillow(file, box, size))
    (decoded,) = seen
    assert decoded <= pixels.size / by**2
    assert difference.mean() < 4  # so the part is where it should be


@settings(max_examples=200)
@given(height=st.integers(1, 500), width=st.integers(1, 500), seed=st.integers(0, 1000))
def test_boxes_lie_inside(height, width, seed):
    for box in (
        pictures.random_box(height, width, np.random.default_rng(seed).random(40).tolist()),
        pictures.centre_box(height, width, 224),
    ):
        left, top, right, bottom = box
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height


def test_random_boxes():
    boxes = np.array([pictures.random_box(300, 400, draws) for draws in np.random.default_rng(0).random((2000, 40))])
    left, top, right, bottom = boxes.T
    area, aspect = (right - left) * (bottom - top) / 120_000, (right - left) / (bottom - top)
    assert 0.078 < area.min() < 0.1
    assert 0.95 < area.max() <= 1
    assert 0.73 < aspect.min() < 0.78
    assert 1.3 < aspect.max() < 1.36
    assert abs(np.log(aspect).mean()) < 0.05
    for start, stop in ((left, 400 - right), (top, 300 - bottom)):
        np.testing.assert_allclose(start.mean(), stop.mean(), rtol=0.1)
    # Where nothing fits, as torchvision does: the centre.
    assert pictures.random_box(10, 100, [0.9] * 40) == (43, 0, 56, 10)
    assert pictures.random_box(100, 10, [0.9] * 40) == (0, 43, 10, 56)


@pytest.mark.parametrize("kind", ["rgb", "progressive", "cmyk", "gray", "png", "restarts"])
def test_truncated_files_cannot_be_read(kind):
    file = jpeg_sets.encoded(jpeg_sets.picture(np.random.default_rng(0), 80, 60), kind)
    for length in (0, 1, 10, len(file) // 2, len(file) - 200):
        # Also where what is missing lies below the box.
        with pytest.raises(Exception):  # noqa: B017, PT011
            by_us(file[:length], (0, 0, 8, 8), 8)


def test_broken_data_in_the_middle_is_read_as_pillow_does():
    file = jpeg_sets.encoded(jpeg_sets.picture(np.random.default_rng(0), 200, 100, detail=20))
    broken = file[: len(file) // 3] + bytes(30) + file[len(file) // 3 + 30 :]
    for box, most in (((0, 0, 90, 40), 1), ((0, 60, 90, 140), 40), ((0, 100, 90, 200), 40)):  # 1, or decoded smaller
        difference = np.abs(by_us(broken, box, 30).astype(int) - by_pillow(broken, box, 30))
        assert difference.max() <= most
        assert difference.mean() < 6
