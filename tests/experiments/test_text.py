"""Text: files held out, tokens, windows, and what a program makes of them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse
from experiments import program, tasks, text
from experiments.inputs import open_dataset
from experiments.measures import ACCURACY, LOSS, measure_of
from experiments.options import refuse_idle
from experiments.results import collect
from experiments.workdir import flat
from tests.experiments import tiny_text
from tests.experiments.test_program import smoke_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_text.write(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def made(folder):
    config = tiny_text.config(folder, "static")
    return program.make_program(config, open_dataset(config))


def as_bytes(split):
    return np.asarray(split.tokens).tobytes()


# --- Files and tokens -----------------------------------------------------------------------------------------------


def test_whole_files_are_held_out_whichever_others_there_are(folder, tmp_path):
    found = text.load(str(folder), length=8, validation=0.2, test=0.2)
    files = {path.read_bytes() for path in folder.rglob("*.txt")}
    splits = {name: as_bytes(getattr(found, name)) for name in ("train", "validation", "test")}
    of_file = {contents: [name for name, whole in splits.items() if contents in whole] for contents in files}
    assert all(len(names) == 1 for names in of_file.values())
    assert {name for (name,) in of_file.values()} == set(splits)
    assert sum(map(len, splits.values())) == sum(map(len, files)) == found.about["bytes"]
    more = tiny_text.write(tmp_path, files=20)
    for name, contents in splits.items():
        of_more = as_bytes(getattr(text.load(str(more), length=8, validation=0.2, test=0.2), name))
        assert all(part in of_more for part, (split,) in of_file.items() if split == name), contents
    same = text.load(str(folder / "**" / "*.txt"), length=8, validation=0.2, test=0.2)
    assert same.about["sha256"] == found.about["sha256"]
    assert [as_bytes(getattr(same, name)) for name in splits] == list(splits.values())


@pytest.mark.slow
def test_the_default_is_the_source_of_the_standard_library():
    found = text.load(length=64, examples=1000)
    assert found.about["source"].startswith("standard library of Python 3.")
    assert found.about["files"] > 300
    assert {"sha256", "bytes", "train_tokens", "test_tokens"} <= set(found.about)
    assert b"import " in as_bytes(found.train)
    assert not any({"test", "tests", "site-packages"} & set(name.split("/")) for name in text._library())


def test_a_link_is_a_file_where_it_is(tmp_path):
    outside, folder = tmp_path / "outside.txt", tmp_path / "text"
    tiny_text.write(folder)
    outside.write_bytes(b"what is elsewhere " * 20)
    paths = {path.relative_to(folder).as_posix() for path in folder.rglob("*.txt")}
    for name in ("one.txt", "part_1/other.txt"):
        (folder / name).symlink_to(outside)
        paths.add(name)
    for given in (folder, folder / "**" / "*.txt"):
        assert {*text._found(str(given), "files")} == paths
    found = text.load(str(folder), length=8, test=0.2)
    assert sum(as_bytes(split).count(outside.read_bytes()) for split in (found.train, found.test)) == 2
    assert found.about["files"] == len(paths)
    assert {*text._found(str(folder / "one.txt"), "files")} == {"one.txt"}
    # What is tested on is not trained on, by whatever path.
    tested = text.load(str(folder), length=8, test_files=str(outside))
    assert outside.read_bytes() not in as_bytes(tested.train)


def test_a_text_to_test_on_of_its_own(folder):
    tested = next(iter(sorted(folder.rglob("*.txt"))))
    found = text.load(str(folder), length=8, test_files=str(tested))
    assert as_bytes(found.test) == tested.read_bytes()
    assert tested.read_bytes() not in as_bytes(found.train)
    assert len(found.train.tokens) + len(found.test.tokens) == found.about["bytes"]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(200, np.uint8), (50_000, np.uint16), (100_000, np.int32)])
def test_ids_of_a_tokenizer(tmp_path, vocab_size, dtype):
    ids = np.random.RandomState(0).randint(0, vocab_size, 300)
    np.save(tmp_path / "train.npy", ids)
    np.minimum(ids, 65_535).astype("<u2").tofile(tmp_path / "val.bin")
    files = {"files": str(tmp_path / "train.npy"), "test_files": str(tmp_path / "val.bin")}
    if vocab_size < 2**16:
        found = text.load(**files, length=8, vocab_size=vocab_size)
        np.testing.assert_array_equal(found.test.tokens, ids)
    else:
        found = text.load(**files | {"test_files": files["files"], "files": files["test_files"]}, length=8,
                          vocab_size=vocab_size)  # fmt: skip
        np.testing.assert_array_equal(found.test.tokens, ids)
    assert found.test.tokens.dtype == dtype
    assert found.num_classes == vocab_size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "config.data.length is at least 1, got 0"),
        ({"epoch_tokens": 0}, "config.data.epoch_tokens is at least 1, got 0"),
        ({"test": 1.0}, r"config.data.test is in \[0, 1\), with config.data.validation less than 1, got 1.0 and 0.0"),
        ({"vocab_size": 1}, "config.data.vocab_size is from 2 to"),
        ({"vocab_size": 50}, "config.data.vocab_size is for files of ids, .npy and .bin; .*file_0.txt is none"),
        ({"files": "NOWHERE"}, "config.data.files is a file, a folder or a pattern, and 'NOWHERE' matches no file"),
        ({"files": "ONE"}, "of 1 file none is left for test. Files are held out whole: give more of them"),
        ({"test": 0.0}, "of 16 files none is left for test"),
        ({"length": 10**6}, "the train text has .* tokens, and it takes at least 1000001"),
    ],
)
def test_texts_that_cannot_be_read(folder, options, message):
    given = {"files": str(folder), "length": 8, "test": 0.2, **options}
    if given["files"] == "ONE":
        given["files"] = str(folder / "part_0" / "file_0.txt")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        text.load(**given)


@pytest.mark.parametrize(
    ("ids", "vocab_size", "message"),
    [
        (np.arange(10), 9, "ids from 0 to 9, but config.data.vocab_size is 9"),
        (np.ones((2, 3), int), 9, r"one axis of integers, got int64 of shape \(2, 3\)"),
        (np.ones(9), 9, "one axis of integers, got float64"),
        (np.arange(10), None, "looks like ids of tokens: config.data.vocab_size says how many"),
    ],
)
def test_ids_that_are_none(tmp_path, ids, vocab_size, message):
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", ids)
    with pytest.raises(ValueError, match=message):
        text.load(str(tmp_path / "a.npy"), test_files=str(tmp_path / "b.npy"), length=2, vocab_size=vocab_size)


def test_windows_to_calibrate_with():
    tokens = np.arange(50, 150).astype(np.uint8)
    found = text.windows(tokens, 3, number=200, length=5)
    assert found.dtype == jnp.int32
    starts = np.asarray(found[:, 0])
    np.testing.assert_array_equal(found, starts[:, None] + np.arange(5))
    assert (starts.min(), starts.max()) == (50, 145)  # the first and the last that there are
    np.testing.assert_array_equal(found, text.windows(tokens, jax.random.key(3), 200, 5))
    with pytest.raises(ValueError, match="length is from 1 to the 100 tokens of the text, got 101"):
        text.windows(tokens, 0, 1, 101)


# --- Windows of a run -----------------------------------------------------------------------------------------------


def test_the_windows_of_a_step_depend_on_its_number_alone(made):
    key, task = jax.random.key(0), made.task
    whole = task.numbers(key, 0, 9, 2)
    np.testing.assert_array_equal(task.numbers(key, 4, 3, 1), whole[4:7])
    places = len(task.dataset.train.tokens) - 8
    many = task.numbers(key, 0, 2000, 1)
    assert (int(many.min()), int(many.max())) == (0, places - 1)
    inputs, targets, _ = task.look_up(jnp.array([places - 1]), task.dataset.train)
    np.testing.assert_array_equal(inputs[0, 1:], targets[0, :-1])
    assert int(targets[0, -1]) == int(task.dataset.train.tokens[-1])  # the last token is predicted too


@pytest.mark.parametrize(("eval_windows", "size"), [(None, 4), (None, 7), (5, 4)])
def test_every_held_out_token_is_predicted_once(folder, eval_windows, size):
    config = tiny_text.config(folder, **{"data.eval_windows": eval_windows})
    dataset = open_dataset(config)
    task, split = tasks.make_task(config, dataset), dataset.test
    predicted = []
    for batch in task.in_batches(split, size):
        _, targets, real = task.evaluated(batch, split)
        places = np.asarray(batch)[:, None] + 1 + np.arange(8)
        np.testing.assert_array_equal(targets[real], split.tokens[places[np.asarray(real)]])
        predicted += places[np.asarray(real)].tolist()
    assert len(set(predicted)) == len(predicted)
    if eval_windows is None:
        assert sorted(predicted) == list(range(1, len(split.tokens)))
    else:
        assert len(predicted) == 5 * 8
        assert max(predicted) - min(predicted) > len(split.tokens) / 2  # spread over it
    found = task.results(jnp.float32(len(predicted) * 2.0), jnp.int32(len(predicted)), split)
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        {"loss": 2.0, "accuracy": 1.0, "perplexity": math.exp(2), "bits_per_byte": 2 / math.log(2)}
    )


@pytest.mark.slow
def test_a_run_is_of_these_windows_and_leaves_the_embedding_dense(made):
    """Losses of two steps and of the held-out text are those of the model by hand."""
    state, dataset = made.init(0), made.task.dataset
    masks = jaxsparse.get_masks(state.opt_state, state.params)
    assert float(jaxsparse.density(masks)) == pytest.approx(0.1, abs=0.01)
    assert masks["block_0"]["mlp"]["up"]["kernel"].shape == (8, 32)
    assert {np.ndim(masks[name]["embedding"]) for name in ("embedding", "positions")} == {0}

    @jax.jit
    def loss(params, inputs, targets):
        logits = made.model.apply({"params": params}, inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    inputs, targets, _ = made.task.look_up(made.task.numbers(state.order_key, 0, 1, 1)[0], dataset.train)
    first, whole = float(loss(state.params, inputs, targets)), jnp.asarray(dataset.test.tokens, jnp.int32)
    full = (len(whole) - 1) // 8 * 8
    by_hand = loss(state.params, whole[:full].reshape(-1, 8), whole[1 : full + 1].reshape(-1, 8))
    evaluated = made.evaluate(state, dataset.test)
    assert float(evaluated["loss"]) == pytest.approx(float(by_hand), rel=0.01)  # the last window is not full
    state, measured = made.train_chunk(state, dataset, 0, 2)
    assert float(measured["losses"][0]) == pytest.approx(first, rel=1e-5)


# --- What does not go together --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.streamed": True}, "config.data.streamed is for images, and a text is held in the memory"),
        ({"model.name": "mlp"}, "config.model.name='mlp' is not for text"),
        ({"data.batch_size": 10_000}, None),
    ],
)
def test_what_does_not_go_with_a_text(folder, changes, message):
    config = tiny_text.config(folder, **changes)
    if message is None:
        assert len(open_dataset(config).train) == 6 * 8  # what check_config compares the batch with
        return
    with pytest.raises(ValueError, match=message):
        program.make_program(config, open_dataset(config))


def test_a_gpt_is_not_for_images(folder):
    config = smoke_config()
    config.model.name = "gpt"
    with pytest.raises(ValueError, match="config.model.name='gpt' is not for images"):
        program.make_program(config, open_dataset(config))


@pytest.mark.parametrize("score", ["grasp", "synflow"])
def test_scores_of_images_are_refused(folder, score):
    config = tiny_text.config(folder)
    with config.unlocked():
        config.method = {"name": "prune_at_init", "score": score, "sparsity": 0.5}
    with pytest.raises(ValueError, match=f"config.method: the score '{score}' is for images"):
        program.make_program(config, open_dataset(config))


def test_keys_without_effect_are_errors(folder):
    config = tiny_text.config(folder)
    with pytest.raises(ValueError, match="config.data.flip has no effect without images"):
        refuse_idle(config, ["data.flip"])
    with pytest.raises(ValueError, match="config.data.length has no effect without a text"):
        refuse_idle(smoke_config(), ["data.length"])
    with pytest.raises(ValueError, match="config.distill_weight has no effect without config.distill_from"):
        refuse_idle(config, ["distill_weight"])


def test_another_text_is_not_gone_on_with(made):
    about = dict(made.task.about)
    made.task.refuse_another(about)
    with pytest.raises(ValueError, match=r"the run was begun with another text: .*, \d[\d,]* bytes in 16 files; now"):
        made.task.refuse_another(about | {"sha256": "0"})


def test_text_is_compared_by_its_loss(folder):
    config = tiny_text.config(folder)
    assert (measure_of(config), measure_of(smoke_config())) == (LOSS, ACCURACY)
    flattened = flat(config.to_dict())
    assert measure_of(flattened) == LOSS
    assert collect.tested_on(flattened) == f"text of {folder}, test 0.2, length 8"
    assert LOSS.value(1.23456) == "1.2346 nats a token"
    assert ACCURACY.value(0.98765) == "98.77%"
