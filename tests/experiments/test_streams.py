import dataclasses
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from experiments import data, pictures, streams
from tests.experiments import jpeg_sets, tiny_sets

OPTIONS = {"batch_size": 8, "image_size": 32, "seed": 3}


@dataclasses.dataclass
class Files:
    """A source of files in memory; their labels are their numbers."""

    files: list

    def __len__(self):
        return len(self.files)

    def __getitem__(self, number):
        return self.files[number], number

    def name_of(self, number):
        return f"file {number}"


@pytest.fixture(scope="module")
def imagenet(imagenet_dir):
    return streams.open_set("imagenet2012", imagenet_dir)


@pytest.fixture(scope="module")
def small():
    """Forty images of 12 x 16 pixels."""
    rng = np.random.default_rng(0)
    return Files([jpeg_sets.encoded(jpeg_sets.picture(rng, 12, 16)) for _ in range(40)])


def take(stream, count):
    batches = [next(stream) for _ in range(count)]
    stream.close()
    return batches


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        for ours, theirs in zip(batch, other, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def joined(batches):
    return streams.Batch(*(np.concatenate(parts) for parts in zip(*batches, strict=True)))


# --- Sets -------------------------------------------------------------------------------------------------------------


def test_imagenet(imagenet):
    assert [len(part) for part in imagenet[:3]] == [60, 0, 20]
    assert imagenet.num_classes == 1000
    assert "tensorflow" not in sys.modules
    made = {name: file for number in range(4) for name, file in expected_files(number)}
    for number in range(60):
        name = imagenet.train.name_of(number)
        file, label = imagenet.train[number]
        assert file == made.pop(name)
        assert label == NUMBERS[name.partition("_")[0]]
    assert not made


NUMBERS = {"n01440764": 0, "n02099601": 207, "n03394916": 566, "n07753592": 954}


def expected_files(number):
    name = jpeg_sets.CLASSES[number]
    return [(f"{name}_{i + 1}.JPEG", file) for i, file in enumerate(jpeg_sets.files(number, 15))]


def test_train_is_shuffled_with_the_labels_of_all_classes(imagenet):
    assert len({imagenet.train[number][1] for number in range(15)}) > 1


def test_classes_by_name_and_number_get_labels_in_order(imagenet_dir, imagenet):
    subset = streams.open_set("imagenet2012", imagenet_dir, classes=("n07753592", 0))
    assert [len(part) for part in subset[:3]] == [30, 0, 10]
    assert subset.num_classes == 2
    for number in range(30):
        name = subset.train.name_of(number).partition("_")[0]
        assert subset.train[number][1] == {"n07753592": 0, "n01440764": 1}[name]
    whole = [imagenet.test[number] for number in range(20)]
    assert [subset.test[number] for number in range(10)] == [
        (file, {954: 0, 0: 1}[label]) for file, label in whole if label in (954, 0)
    ]


def test_so_many_examples_and_validation(imagenet_dir, imagenet):
    part = streams.open_set("imagenet2012", imagenet_dir, examples=16, validation=0.25)
    assert [len(split) for split in part[:3]] == [12, 4, 16]
    names = [source.name_of(number) for source in (part.train, part.validation) for number in range(len(source))]
    assert names == [imagenet.train.name_of(number) for number in range(16)]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("n01440764", "n02099600"), "has no class 'n02099600'; did you mean 'n02099601'[?] It has 1000 classes"),
        ((1000,), "has no class 1000[.] It has 1000 classes"),
        (("n01440764", 0), "classes that differ"),
        ((), "classes that differ"),
    ],
)
def test_classes_that_are_not_there(imagenet_dir, classes, message):
    with pytest.raises(ValueError, match=message):
        streams.open_set("imagenet2012", imagenet_dir, classes=classes)


def test_classes_without_images(imagenet_dir, monkeypatch):
    with pytest.raises(ValueError, match=r"'imagenet2012' has no image of config.data.classes=\(1,\) to train on"):
        streams.open_set("imagenet2012", imagenet_dir, classes=(1,))
    of_split = data.as_source
    monkeypatch.setattr(
        data, "as_source", lambda *given, **options: of_split(*given, **options) if given[2] == "train" else []
    )
    with pytest.raises(ValueError, match=r"'imagenet2012' has no image of config.data.classes=\(0,\) to test on"):
        streams.open_set("imagenet2012", imagenet_dir, classes=(0,))
    with pytest.raises(ValueError, match="'imagenet2012' has no image to test on"):
        streams.open_set("imagenet2012", imagenet_dir)


def test_set_that_was_not_prepared_says_how_to(tmp_path):
    with pytest.raises(FileNotFoundError, match="data set 'imagenet2012' is not in .* as array_record") as error:
        streams.open_set("imagenet2012", str(tmp_path))
    message = str(error.value)
    for part in ("ILSVRC2012_img_train.tar (138 GB)", "ILSVRC2012_img_val.tar (6.3 GB)", "pip install tensorflow"):
        assert part in message
    assert f"{tmp_path}/downloads/manual\n" in message
    assert f"data_dir='{tmp_path}', file_format='array_record').download_and_prepare()" in message
    with pytest.raises(FileNotFoundError, match="data set 'imagenette/320px-v2' is not in .* as array_record") as error:
        streams.open_set("imagenette/320px-v2", str(tmp_path))
    assert "image-net.org" not in str(error.value)


def test_sets_of_another_kind(tmp_path):
    with pytest.raises(ValueError, match="unknown data set 'imagenet2021'; did you mean 'imagenet2012'?"):
        streams.open_set("imagenet2021", str(tmp_path))
    with pytest.raises(ValueError, match="'tiny_digits' needs images of any size"):
        streams.open_set("tiny_digits", str(tmp_path))
    with pytest.raises(ValueError, match="'tiny_unlabelled' is not one of images with one label"):
        streams.open_set("tiny_unlabelled", str(tmp_path))


def test_set_with_a_split_called_test(tmp_path):
    tiny_sets.TinySizes(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    tiny = streams.open_set("tiny_sizes", str(tmp_path))
    assert [len(part) for part in tiny[:3]] == [500, 0, 100]
    assert tiny.num_classes == 10
    assert tiny.test.name_of(7) == "tiny_sizes test 7"
    assert Image.open(io.BytesIO(tiny.test[7][0])).size == (16, 16)


# --- Order ------------------------------------------------------------------------------------------------------------


def test_every_epoch_has_each_example_at_most_once_in_another_order(small):
    numbers = [batch.numbers for batch in take(streams.train_stream(small, **OPTIONS), 10)]
    first, second = np.concatenate(numbers[:5]), np.concatenate(numbers[5:])
    np.testing.assert_array_equal(np.sort(first), np.arange(40))
    np.testing.assert_array_equal(np.sort(second), np.arange(40))
    assert (first != second).mean() > 0.8
    assert (first != np.arange(40)).mean() > 0.8


def test_seeds_differ(small):
    # The order of a seed is not that of another one's second epoch either.
    orders = [np.concatenate([batch.numbers for batch in take(stream, 10)]).reshape(2, 40) for stream in (
        streams.train_stream(small, **OPTIONS | {"seed": seed}) for seed in (3, 4)
    )]  # fmt: skip
    for ours in orders[0]:
        for other in orders[1]:
            assert (ours != other).mean() > 0.8


@pytest.mark.slow
@settings(max_examples=20)
@given(
    count=st.sampled_from([1, 2, 4]),
    batch=st.integers(1, 3),
    examples=st.integers(12, 40),
    seed=st.integers(0, 1 << 32),
)
def test_shards_together_give_the_batches_of_one(small, count, batch, examples, seed):
    source, options = Files(small.files[:examples]), {"image_size": 8, "seed": min(seed, (1 << 32) - 1)}
    steps = examples // (batch * count)
    whole = take(streams.train_stream(source, batch_size=batch * count, **options), 2 * steps + 1)
    shards = [
        take(streams.train_stream(source, batch_size=batch, shard=(index, count), **options), 2 * steps + 1)
        for index in range(count)
    ]
    assert_same([joined(parts) for parts in zip(*shards, strict=True)], whole)
    for epoch in (whole[:steps], whole[steps:-1]):
        numbers = joined(epoch).numbers
        assert len(set(numbers)) == len(numbers) == steps * batch * count


@settings(max_examples=20)
@given(count=st.sampled_from([1, 2, 4]), batch=st.integers(1, 5), examples=st.integers(1, 40))
def test_evaluation_covers_every_example_once_over_the_shards(small, count, batch, examples):
    source = Files(small.files[:examples])
    shards = [
        list(streams.eval_batches(source, batch_size=batch, image_size=8, shard=(index, count)))
        for index in range(count)
    ]
    assert {len(batches) for batches in shards} == {-(-examples // (batch * count))}
    together = joined([joined(parts) for parts in zip(*shards, strict=True)])
    assert len(together.labels) == len(shards[0]) * batch * count
    np.testing.assert_array_equal(together.real, np.arange(len(together.real)) < examples)
    np.testing.assert_array_equal(together.numbers[together.real], np.arange(examples))
    np.testing.assert_array_equal(together.labels[together.real], np.arange(examples))
    assert (together.numbers[~together.real] == -1).all()
    assert not together.images[~together.real].any()
    assert (together.replaced == -1).all()


def test_shapes_and_dtypes(imagenet):
    (batch,) = take(streams.train_stream(imagenet.train, **OPTIONS), 1)
    assert [part.shape for part in batch] == [(8, 32, 32, 3), (8,), (8,), (8,), (8,)]
    assert [part.dtype for part in batch] == [np.uint8, np.int32, np.int32, bool, np.int32]
    assert batch.real.all()
    np.testing.assert_array_equal(batch.labels, [imagenet.train[number][1] for number in batch.numbers])


def test_batch_that_is_larger_than_the_set(small):
    with pytest.raises(ValueError, match="a batch of 64 is more than the 40 train examples"):
        streams.train_stream(small, batch_size=16, image_size=8, seed=0, shard=(1, 4))


# --- Where it is ------------------------------------------------------------------------------------------------------


def test_goes_on_in_the_middle_of_an_epoch(imagenet):
    whole = take(streams.train_stream(imagenet.train, **OPTIONS), 12)
    stream = streams.train_stream(imagenet.train, **OPTIONS)
    take(stream, 9)
    state = json.loads(json.dumps(stream.get_state()))
    resumed = streams.train_stream(imagenet.train, prefetch=0, **OPTIONS)
    next(resumed)
    resumed.set_state(state)
    assert resumed.get_state() == state
    assert_same(take(resumed, 3), whole[9:])
    # As one of two shards.
    resumed = streams.train_stream(imagenet.train, **OPTIONS | {"batch_size": 4}, shard=(1, 2))
    resumed.set_state(state)
    np.testing.assert_array_equal(take(resumed, 1)[0].images, whole[9].images[4:])


@pytest.mark.parametrize(("key", "changed"), [("seed", {"seed": 4}), ("global_batch", {"batch_size": 4})])
def test_state_of_another_stream(small, key, changed):
    state = streams.train_stream(small, **OPTIONS).get_state()
    with pytest.raises(ValueError, match=f"the saved stream of examples has {key} {state[key]}, this one"):
        streams.train_stream(small, **OPTIONS | changed).set_state(state)


@pytest.mark.slow
def test_processes_give_the_same(imagenet):
    whole = take(streams.train_stream(imagenet.train, **OPTIONS), 10)
    stream = streams.train_stream(imagenet.train, workers=2, **OPTIONS)
    assert_same(take(stream, 6), whole[:6])
    assert_same(take(stream, 4), whole[6:])  # after close, and so with new processes
    ours, theirs = (
        list(streams.eval_batches(imagenet.test, batch_size=6, image_size=32, workers=workers)) for workers in (0, 1)
    )
    assert_same(ours, theirs)
    assert len(ours) == 4


@pytest.mark.slow
def test_a_process_that_dies_is_told(imagenet):
    before = set(multiprocessing.active_children())
    stream = streams.train_stream(imagenet.train, workers=1, **OPTIONS)
    next(stream)
    (worker,) = set(multiprocessing.active_children()) - before
    os.kill(worker.pid, signal.SIGKILL)  # as the system does when the memory is full
    with pytest.raises(
        streams.StreamError, match=r"one of the 1 processes that read images has died \(config.data.wor"
    ):
        take(stream, 1000)
    stream.close()


PROGRAM = """
    import signal, sys, time
    from absl import app
    from experiments import pictures, streams

    def main(argv):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
        source = streams.open_set("imagenet2012", argv[1]).train
        stream = streams.train_stream(source, batch_size=8, image_size=32, seed=0, workers=2)
        next(stream)
        print("running", flush=True)
        while True:
            next(stream)
            time.sleep(0.01)

    if __name__ == "__main__":
        app.run(main)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc"), reason="looks for processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_processes_end_with_the_program(imagenet_dir, tmp_path, number):
    (tmp_path / "reads.py").write_text(textwrap.dedent(PROGRAM))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), str(tmp_path)])}
    command = [sys.executable, "-m", "reads", imagenet_dir]
    # Its own group, so that the signal reaches the workers too, as Ctrl-C does.
    program = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        assert program.stdout.readline() == b"running\n"
        if number == signal.SIGINT:
            os.killpg(program.pid, number)
        else:
            program.send_signal(number)
        program.wait(timeout=60)
    finally:
        program.kill()
        program.wait()
        program.stdout.close()
    for _ in range(100):
        if not (left := of_group(program.pid)):
            break
        time.sleep(0.1)
    assert not left


def of_group(group):
    """The processes of a group that still run."""
    found = []
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{process}/stat") as file:
                state, _, its_group = file.read().rpartition(")")[2].split()[:3]
        except OSError:  # it ended just now
            continue
        if int(its_group) == group and state != "Z":
            found.append(process)
    return found


# --- Pictures ---------------------------------------------------------------------------------------------------------


def test_evaluation_shows_the_centre():
    pixels = np.full((64, 96, 3), 255, np.uint8)
    pixels[4:60, 20:76] = 90
    assert pictures.centre_box(64, 96, 224) == (20, 4, 76, 60)
    (batch,) = streams.eval_batches(Files([jpeg_sets.encoded(pixels, "png")]), batch_size=1, image_size=56)
    np.testing.assert_array_equal(batch.images, np.full((1, 56, 56, 3), 90, np.uint8))


def test_half_of_the_pictures_are_mirrored_and_crops_change_with_the_epoch():
    ramp = np.repeat(np.arange(64, dtype=np.uint8)[None, :, None], 64, 0).repeat(3, 2)
    source = Files([jpeg_sets.encoded(ramp, "png")] * 200)
    batches = take(streams.train_stream(source, batch_size=200, image_size=16, seed=0), 2)
    mirrored = [batch.images[:, 0, 0, 0] > batch.images[:, 0, -1, 0] for batch in batches]
    assert 0.4 < np.mean(mirrored) < 0.6
    of_first = [batch.images[batch.numbers == 0] for batch in batches]
    assert (of_first[0] != of_first[1]).any()


# --- What cannot be read ----------------------------------------------------------------------------------------------


def test_unreadable_examples_are_replaced_by_the_next(small):
    broken = Files(list(small.files))
    for number in (7, 8, 39):
        broken.files[number] = jpeg_sets.truncated(small.files[number])
    broken.files[20] = b"not an image"
    whole, ours = (joined(take(streams.train_stream(source, **OPTIONS), 5)) for source in (small, broken))
    asked = np.where(ours.replaced >= 0, ours.replaced, ours.numbers)
    np.testing.assert_array_equal(asked, whole.numbers)
    replaced = ours.replaced >= 0
    assert dict(zip(ours.replaced[replaced], ours.numbers[replaced], strict=True)) == {7: 9, 8: 9, 39: 0, 20: 21}
    np.testing.assert_array_equal(ours.labels, ours.numbers)
    np.testing.assert_array_equal(ours.images[~replaced], whole.images[~replaced])
    evaluated = joined(list(streams.eval_batches(broken, batch_size=16, image_size=8)))
    np.testing.assert_array_equal(np.flatnonzero(evaluated.replaced >= 0), [7, 8, 20, 39])
    np.testing.assert_array_equal(np.flatnonzero(~evaluated.real[:40]), [7, 8, 20, 39])
    assert evaluated.real.sum() == 36


def test_too_many_unreadable_in_a_row():
    source = Files([b"not an image"] * 150)
    with pytest.raises(streams.StreamError, match="101 images in a row, from file 0 on, cannot be read"):
        next(streams.eval_batches(source, batch_size=1, image_size=8))
    with pytest.raises(streams.StreamError, match=r"4 images in a row, .* The last one: cannot identify image file"):
        next(streams.eval_batches(Files(source.files[:4]), batch_size=1, image_size=8))


def test_corrupt_imagenet(tmp_path):
    jpeg_sets.prepare_imagenet(tmp_path, train=4, validation=1, corrupt=1)
    train = streams.open_set("imagenet2012", str(tmp_path)).train
    batch = joined(list(streams.eval_batches(train, batch_size=8, image_size=16)))
    (replaced,) = batch.replaced[batch.replaced >= 0]
    assert train.name_of(replaced) == "n01440764_1.JPEG"
