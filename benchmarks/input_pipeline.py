"""Images a second from JPEG files to random crops of 224 x 224 pixels: ours, Pillow's, and what else there is.

Each way gives the same crops of the same files on one core, in turns, in processor time, so that a busy machine slows
none of them more. The files are made here: noise over many octaves, as photographs have, of such quality that an image
takes as many bytes as ImageNet's do (110 kB). Ways whose library is not installed are left out.

Usage: ``python -m benchmarks.input_pipeline [--images 150] [--seconds 6]``
"""

import argparse
import importlib.metadata
import io
import os
import statistics
import time

import numpy as np
import simplejpeg
from PIL import Image

from benchmarks import timing
from experiments import pictures, streams

SIZE = 224
SETS = {"ImageNet-like": (370, 490, 0.2), "large": (1000, 1330, 0.2)}  # height, width, and how much they vary


def photograph(rng, height, width):
    """A JPEG file; one in six has colours in full resolution, the others in half."""
    octaves = [1 << i for i in range(1, 9)]

    def field(octaves):
        parts = [o**0.1 * _enlarged(rng, 2 + height // o, 2 + width // o, height, width) for o in octaves]
        return sum(parts) / np.std(sum(parts))

    # Most of what there is to see is light and dark; colours vary less, and more slowly.
    grey, colours = field(octaves), np.stack([field(octaves[3:]) for _ in range(3)], -1)
    pixels = 120 + 50 * grey[..., None] + 12 * colours + 6 * rng.standard_normal((height, width, 1))
    buffer, full = io.BytesIO(), rng.random() < 1 / 6
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    image.save(buffer, "JPEG", quality=int(rng.integers(90, 97)), subsampling="4:4:4" if full else "4:2:0")
    return buffer.getvalue()


def _enlarged(rng, rows, columns, height, width):
    noise = Image.fromarray(rng.standard_normal((rows, columns)).astype(np.float32))
    return np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC))


def examples(count, height, width, spread):
    """Files, and a crop of each: left, top, right, bottom."""
    rng = np.random.default_rng(0)
    files, boxes = [], []
    for _ in range(count):
        scale = np.exp(spread * rng.standard_normal())
        shape = int(scale * height), int(scale * width)
        shape = shape[::-1] if rng.random() < 0.25 else shape
        files.append(photograph(rng, *shape))
        boxes.append(pictures.random_box(*shape, rng.random(40).tolist()))
    return files, boxes


def plain(file, box):
    image = Image.open(io.BytesIO(file)).convert("RGB").crop(box)
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def draft(file, box):
    image = Image.open(io.BytesIO(file))
    by = max(by for by in (1, 2, 4, 8) if by == 1 or min(box[2] - box[0], box[3] - box[1]) >= by * SIZE)
    image.draft("RGB", (image.width // by, image.height // by))
    part = tuple(x / by for x in box)
    return np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR, part))


def ours(file, box):
    out = np.empty((SIZE, SIZE, 3), np.uint8)
    pictures.crop(file, lambda height, width: box, out)
    return out


def simplejpeg_and_pillow(file, box):
    left, top, right, bottom = box
    image = Image.fromarray(simplejpeg.decode_jpeg(file)[top:bottom, left:right])
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def ways():
    found = {"Pillow": plain, "Pillow, draft": draft, "simplejpeg, resized by Pillow": simplejpeg_and_pillow}
    found["experiments.pictures"] = ours
    try:
        import cv2
    except ImportError:
        pass
    else:
        cv2.setNumThreads(1)

        def opencv(interpolation, file, box):
            left, top, right, bottom = box
            image = cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR_RGB)[top:bottom, left:right]
            return cv2.resize(image, (SIZE, SIZE), interpolation=interpolation)

        found["OpenCV, INTER_LINEAR"] = lambda *args: opencv(cv2.INTER_LINEAR, *args)
        found["OpenCV, INTER_AREA"] = lambda *args: opencv(cv2.INTER_AREA, *args)
    try:
        import tensorflow as tf
    except ImportError:
        pass
    else:
        tf.config.set_visible_devices([], "GPU")
        tf.config.threading.set_inter_op_parallelism_threads(1)
        tf.config.threading.set_intra_op_parallelism_threads(1)

        @tf.function(input_signature=[tf.TensorSpec((), tf.string), tf.TensorSpec((4,), tf.int32)])
        def tensorflow(file, window):
            image = tf.image.decode_and_crop_jpeg(file, window, channels=3)
            image = tf.image.resize(image, (SIZE, SIZE), antialias=True)
            return tf.cast(tf.round(image), tf.uint8)

        def windows(files, boxes):
            return np.asarray(files, object), np.array([(y, x, v - y, u - x) for x, y, u, v in boxes], np.int32)

        def tf_data(files, boxes):
            crops = tf.data.Dataset.from_tensor_slices(windows(files, boxes)).map(tensorflow)
            return list(crops.as_numpy_iterator())

        tf_data.at_once = True
        found["tf.data, decode_and_crop_jpeg"] = tf_data
    return found


def all_of(way, files, boxes):
    if getattr(way, "at_once", False):
        return way(files, boxes)
    return [way(file, box) for file, box in zip(files, boxes, strict=True)]


class InMemory:
    """A source of files, each so many times."""

    def __init__(self, files, times):
        self.files, self.times = files, times

    def __len__(self):
        return len(self.files) * self.times

    def __getitem__(self, number):
        return self.files[number % len(self.files)], 0

    def name_of(self, number):
        return f"image {number}"


def streamed(source, workers, seconds):
    """Images a second of the whole stream, when it has come up to speed."""
    stream = streams.train_stream(source, batch_size=64, image_size=SIZE, seed=0, workers=workers)
    for _ in range(4 * max(workers, 1)):  # what was built while the processes started
        next(stream)
    start, batches = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        next(stream)
        batches += 1
    took = time.perf_counter() - start
    stream.close()
    return 64 * batches / took


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=150, help="files of the set that is like ImageNet")
    parser.add_argument("--seconds", type=float, default=6.0, help="for each way and set, and for each stream")
    args = parser.parse_args()

    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    alternatives, rows, notes, files_of = ways(), [], [], {}
    for name, (height, width, spread) in SETS.items():
        files, boxes = examples(args.images if name != "large" else max(args.images // 6, 1), height, width, spread)
        files_of[name] = files
        results = {way: all_of(function, files, boxes) for way, function in alternatives.items()}
        expected = np.stack(results["Pillow"]).astype(int)
        seconds = {way: [] for way in alternatives}
        while sum(map(sum, seconds.values())) < args.seconds * len(alternatives) or len(seconds["Pillow"]) < 3:
            for way, function in list(alternatives.items())[:: 1 if len(seconds["Pillow"]) % 2 else -1]:
                start = time.process_time()
                all_of(function, files, boxes)
                seconds[way].append(time.process_time() - start)
        for way, times in seconds.items():
            ratios = [a / b for a, b in zip(seconds["Pillow"], times, strict=True)]
            low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
            difference = np.abs(np.stack(results[way]) - expected)
            rows.append([
                name, way, f"{len(files) / statistics.median(times):.0f}", f"{middle:.2f}",
                f"{low:.2f} to {high:.2f}", str(difference.max()), f"{difference.mean():.2f}",
            ])  # fmt: skip
        sizes = [Image.open(io.BytesIO(file)).size for file in files]
        notes.append(
            f"{name}: {len(files)} files of {np.mean([len(file) for file in files]) / 1000:.0f} kB and "
            f"{np.mean([s[0] for s in sizes]):.0f} x {np.mean([s[1] for s in sizes]):.0f} pixels on average, "
            f"{len(seconds['Pillow'])} rounds."
        )
    os.sched_setaffinity(0, cores)
    source = InMemory(files_of["ImageNet-like"], times=64)
    rates = ", ".join(f"{streamed(source, w, args.seconds):.0f} with workers={w}" for w in (0, 1, 2))
    versions = ("pillow", "simplejpeg", "numpy", "grain", "opencv-python-headless", "tensorflow-cpu")
    found = [d for d in versions if any(importlib.metadata.distributions(name=d))]
    timing.save(
        "input_pipeline",
        f"From JPEG files to random crops of {SIZE} x {SIZE}",
        ["images", "way", "images/s per core", "faster than Pillow", "middle half of rounds", "largest difference",
         "mean difference"],
        rows,
        f"Medians of processor time on one core, in turns. {' '.join(notes)} Differences are from Pillow's pixels, of "
        "0 to 255. Where crops are at least 448 x 448 pixels, ours and Pillow's draft decode at half the size or less. "
        f"Batches of 64 through train_stream, ImageNet-like, in images/s of the whole machine ({len(cores)} cores, not "
        f"all free): {rates}. " + ", ".join(f"{name} {importlib.metadata.version(name)}" for name in found) + ".",
    )  # fmt: skip


if __name__ == "__main__":
    main()
