"""Checkpoints of Hugging Face's format, beside small ones that transformers made (tests/golden/hugging_face.py)."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jaxsparse.artifacts import ArtifactError, formats
from jaxsparse.artifacts.hugging_face import families
from jaxsparse.models import GPT
from jaxsparse.trees import by_path
from tests.problems import slow_except

GOLDEN = Path(__file__).parents[1] / "golden" / "hugging_face"
LOGITS = dict(np.load(GOLDEN / "logits.npz"))
TOKENS = LOGITS.pop("tokens")


def read(folder):
    """The config.json and all tensors of a checkpoint."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= safetensors.numpy.load_file(path)
    return json.loads((folder / "config.json").read_text()), tensors


def changed(tmp_path, name, config=(), tensors=lambda tensors: tensors):
    """A checkpoint like a golden one, with other keys in config.json (None takes one away) or other tensors."""
    found, stored = read(GOLDEN / name)
    folder = tmp_path / "changed"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    found = {key: value for key, value in (found | dict(config)).items() if value != "gone"}
    (folder / "config.json").write_text(json.dumps(found))
    safetensors.numpy.save_file(tensors(stored), folder / "model.safetensors")
    return folder


def same(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for (path, x), y in zip(by_path(tree).items(), jax.tree.leaves(other), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y, err_msg=path)


@pytest.mark.parametrize("name", slow_except(["gpt2", "llama_biases", "mistral", "qwen2"], LOGITS))
def test_logits_are_those_of_transformers(name):
    model, params = formats.from_hf(GOLDEN / name)
    logits = jax.jit(model.apply)({"params": params}, TOKENS)
    np.testing.assert_allclose(logits, LOGITS[name], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOGITS)
def test_logits_of_stacked_blocks(name):
    model, params = formats.from_hf(GOLDEN / name, scan=True)
    logits = jax.jit(model.apply)({"params": params}, TOKENS)
    np.testing.assert_allclose(logits, LOGITS[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", slow_except(["gpt2", "llama_biases"], LOGITS))
def test_written_as_it_was_read(name, tmp_path):
    was, tensors = read(GOLDEN / name)
    for scan in (False, True):
        model, params = formats.from_hf(GOLDEN / name, scan=scan)
        assert model.scan is scan
        assert ("blocks" in params) is scan
        out = tmp_path / str(scan)
        formats.to_hf(out, model, params, family=was["model_type"])
        config, written = read(out)
        assert set(written) == set(tensors)
        for key in tensors:
            np.testing.assert_array_equal(written[key], tensors[key], err_msg=key)
        again, _ = formats.from_hf(out, scan=scan)
        assert again == model
        same_keys = set(config) & set(was) - {"n_inner", "bos_token_id", "eos_token_id"}
        same_keys -= {key for key in was if key.endswith("pdrop")}
        assert len(same_keys) > 8
        assert {key: config[key] for key in same_keys} == {key: was[key] for key in same_keys}
        with safetensors.safe_open(out / "model.safetensors", "numpy") as file:
            assert file.metadata() == {"format": "pt"}


def test_several_files_with_an_index(tmp_path):
    model, params = formats.from_hf(GOLDEN / "gpt2")
    formats.to_hf(tmp_path / "gpt2", model, params, max_shard_size=8_000)
    index = json.loads((tmp_path / "gpt2" / "model.safetensors.index.json").read_text())
    names = sorted(set(index["weight_map"].values()))
    assert names[0] == f"model-00001-of-0000{len(names)}.safetensors"
    assert len(names) > 3
    sizes = [sum(x.nbytes for x in safetensors.numpy.load_file(tmp_path / "gpt2" / name).values()) for name in names]
    assert sum(sizes) == index["metadata"]["total_size"]
    assert max(sizes) <= 8_000
    assert not (tmp_path / "gpt2" / "model.safetensors").exists()
    same(formats.from_hf(tmp_path / "gpt2")[1], params)


def test_dtypes(tmp_path):
    model, params = formats.from_hf(GOLDEN / "llama", dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(ml_dtypes.bfloat16)}
    assert model.dtype == model.param_dtype == jnp.bfloat16
    formats.to_hf(tmp_path / "bfloat16", model, jax.tree.map(jnp.asarray, params))
    assert read(tmp_path / "bfloat16")[0]["torch_dtype"] == "bfloat16"
    again, loaded = formats.from_hf(tmp_path / "bfloat16")
    assert again == model
    same(loaded, params)
    params["norm"]["scale"] = params["norm"]["scale"].astype(np.float32)
    formats.to_hf(tmp_path / "mixed", model, params)
    assert read(tmp_path / "mixed")[0]["torch_dtype"] == "float32"
    again, loaded = formats.from_hf(tmp_path / "mixed")
    assert again.dtype == jnp.float32
    same(loaded, params)
    params["norm"]["scale"] = params["norm"]["scale"].astype(np.float16)
    formats.to_hf(tmp_path / "halves", model, params)
    assert read(tmp_path / "halves")[0]["torch_dtype"] == "float32"
    with pytest.raises(ValueError, match="dtype must be None or one of bfloat16, float16, float32, float64, got int8"):
        formats.from_hf(tmp_path / "mixed", dtype="int8")
    with pytest.raises(ValueError, match="dtype must be None or one of .*, got 'floaty'"):
        formats.from_hf(tmp_path / "mixed", dtype="floaty")
    with pytest.raises(ValueError, match="norm/scale must be one of bfloat16, .*, got int32"):
        formats.to_hf(tmp_path / "int", model, params | {"norm": {"scale": np.ones(16, np.int32)}})


def test_stacked_blocks_of_several_dtypes_keep_all_values(tmp_path):
    def halves(tensors):
        name = next(name for name in tensors if "layers.0.mlp.up_proj" in name)
        return {other: 1e6 * x for other, x in tensors.items()} | {name: tensors[name].astype(np.float16)}

    folder = changed(tmp_path, "llama", tensors=halves)
    model, params = formats.from_hf(folder, scan=True)
    _, apart = formats.from_hf(folder)
    for path, leaf in by_path(params["blocks"]).items():
        blocks = [by_path(apart[f"block_{i}"])[path] for i in range(model.num_layers)]
        assert leaf.dtype == np.float32
        np.testing.assert_array_equal(leaf, np.stack(blocks), err_msg=path)


def test_older_checkpoints(tmp_path):
    """Without the prefix, with constants among the tensors, and with the keys of before version 5."""

    def older(prefix, extra):
        def rename(tensors):
            return {name.removeprefix(prefix): x for name, x in tensors.items()} | {name: np.ones(2) for name in extra}

        return rename

    _, params = formats.from_hf(GOLDEN / "gpt2")
    extra = ["h.0.attn.bias", "h.1.attn.masked_bias"]
    same(formats.from_hf(changed(tmp_path, "gpt2", {}, older("transformer.", extra)))[1], params)
    model, params = formats.from_hf(GOLDEN / "llama")
    keys = {"rope_parameters": "gone", "rope_theta": 10_000.0, "rope_scaling": None, "num_key_value_heads": "gone"}
    folder = changed(tmp_path, "llama", keys, older("model.", ["layers.0.self_attn.rotary_emb.inv_freq"]))
    found, loaded = formats.from_hf(folder)
    assert found == model
    same(loaded, params)
    model, params = formats.from_hf(GOLDEN / "qwen2")  # with a head that repeats the embedding
    embedding = params["embedding"]["embedding"]
    tied = changed(tmp_path, "qwen2", {}, lambda tensors: tensors | {"lm_head.weight": embedding})
    same(formats.from_hf(tied)[1], params)
    other = changed(tmp_path, "qwen2", {}, lambda tensors: tensors | {"lm_head.weight": embedding + 1})
    with pytest.raises(ArtifactError, match="tie_word_embeddings is true.*lm_head.weight is not model.embed_tokens"):
        formats.from_hf(other)


REFUSED = [
    ("gpt2", {"model_type": "gpt_neox"}, "model_type is 'gpt_neox', expected one of gpt2, llama, mistral, qwen2"),
    ("gpt2", {"model_type": {"a": 1}}, "model_type is {'a': 1}, expected one of gpt2, llama, mistral, qwen2"),
    ("gpt2", {"n_embd": 2**63}, "n_embd is 9223372036854775808, expected at most 2147483647"),
    ("gpt2", {"activation_function": "relu"}, "activation_function is 'relu', and models.GPT has 'gelu_new' or"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
    ("gpt2", {"n_head": 3}, "n_embd is 16, expected a multiple of n_head, 3"),
    ("gpt2", {"n_layer": "two"}, "n_layer is 'two', expected an int >= 1"),
    ("gpt2", {"n_positions": "gone"}, "n_positions is missing"),
    ("gpt2", {"quantization_config": {"quant_method": "awq"}}, r"quantization_config is there \('awq'\)"),
    ("gpt2", {"dtype": "float8", "quantization_config": 8}, r"quantization_config is there \(8\)"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling is of the type 'llama3'"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 8.0}}, "rope_scaling is of the type 'linear'"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope_parameters is of the type 'yarn'"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ("llama", {"rms_norm_eps": None}, "rms_norm_eps is None, expected a finite number above 0"),
    ("llama", {"rope_parameters": {"rope_theta": 0}}, "rope_theta is 0, expected a finite number above 0"),
    ("llama", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters has angles of their"),
    ("llama", {"rope_scaling": 2.0}, "rope_scaling is 2.0, expected an object"),
    ("llama", {"num_key_value_heads": 3}, "num_attention_heads is 4, expected a multiple of num_key_value_heads, 3"),
    ("mistral", {"sliding_window": 8}, "sliding_window is 8, .* expected at least its length, 32, or max_length=8"),
    ("mistral", {"sliding_window": "gone", "max_position_embeddings": 8192}, "sliding_window is 4096"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8}, "sliding_window is 8"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8}, "sliding_window is 8"),
]  # fmt: skip


def test_what_gpt_cannot_do_is_refused_by_name(tmp_path):
    for name, keys, message in REFUSED:
        with pytest.raises(ArtifactError, match=rf"config.json: {message}"):
            formats.from_hf(changed(tmp_path, name, keys))


def test_up_to_its_window_a_model_is_one_without(tmp_path):
    folder = changed(tmp_path, "mistral", {"sliding_window": 8})
    model, params = formats.from_hf(folder, max_length=8)
    assert model.max_length == 8
    same(params, formats.from_hf(GOLDEN / "mistral")[1])
    with pytest.raises(ArtifactError, match="max_length is 33, expected 1 to 32, max_position_embeddings"):
        formats.from_hf(GOLDEN / "mistral", max_length=33)
    with pytest.raises(
        ArtifactError, match="max_length is 8, but there are learned positions: expected n_positions, 20"
    ):
        formats.from_hf(GOLDEN / "gpt2", max_length=8)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    def without(name):
        return lambda tensors: {key: x for key, x in tensors.items() if key != name}

    def other(name, change):
        return lambda tensors: tensors | {name: np.ascontiguousarray(change(tensors.get(name)))}

    down = "model.layers.1.mlp.down_proj.weight"
    for tensors, message in [
        (without(down), f"by its config.json, it lacks {down}$"),
        (
            other("model.layers.2.mlp.up_proj.bias", lambda _: np.ones(2)),
            "it has model.layers.2.mlp.up_proj.bias, which",
        ),
        (
            other("lm_head.weight", lambda x: x[:-1]),
            r"lm_head.weight must have shape \(48, 16\) by config.json, got \(47,",
        ),
        (other(down, lambda x: x.T), rf"{down} must have shape \(16, 20\) by config.json, got \(20, 16\)"),
        (other(down, lambda x: x.astype(np.int8)), f"{down} must be one of bfloat16, .*, got int8"),
    ]:
        with pytest.raises(ArtifactError, match=message):
            formats.from_hf(changed(tmp_path, "llama", {}, tensors))
    large = other(down, lambda x: np.full_like(x, 1e5))
    with pytest.raises(ArtifactError, match=rf"{down}: 320 of its values are too large for the dtype"):
        formats.from_hf(changed(tmp_path, "llama", {}, large), dtype="float16")
    with pytest.raises(ArtifactError, match="config.json says 2147483647 blocks, but there are 28 tensors"):
        formats.from_hf(changed(tmp_path, "gpt2", {"n_layer": 2**31 - 1}))
    with pytest.raises(ArtifactError, match=r"lacks lm_head.weight"):
        formats.from_hf(changed(tmp_path, "qwen2", {"tie_word_embeddings": False}))
    with pytest.raises(ArtifactError, match=r"has model.layers.0.self_attn.k_proj.bias, .* place for"):
        formats.from_hf(changed(tmp_path, "llama_biases", {"attention_bias": False}))


def test_damaged_checkpoints(tmp_path):
    folder = tmp_path / "mistral"
    shutil.copytree(GOLDEN / "mistral", folder)
    second, index = folder / "model-00002-of-00004.safetensors", folder / "model.safetensors.index.json"
    data, listing = second.read_bytes(), json.loads(index.read_text())
    second.write_bytes(data[:-1])
    with pytest.raises(ArtifactError, match=r"model-00002-of-00004.safetensors is damaged, or not a safetensors file"):
        formats.from_hf(folder)
    second.unlink()
    with pytest.raises(ArtifactError, match=r"model-00002-of-00004.safetensors is missing"):
        formats.from_hf(folder)
    second.write_bytes(data)
    for where, message in [
        ("model-00004-of-00004.safetensors", "model.layers.0.mlp.up_proj.weight should be in model-00004"),
        ("../other.safetensors", "expected files of this folder, got '../other.safetensors'"),
        ("", "expected files of this folder, got ''"),
        (4, "expected a weight_map"),
    ]:
        moved = listing["weight_map"] | {"model.layers.0.mlp.up_proj.weight": where}
        index.write_text(json.dumps(listing | {"weight_map": moved}))
        with pytest.raises(ArtifactError, match=f"index.json: {message}"):
            formats.from_hf(folder)
    index.rename(folder / "pytorch_model.bin")
    with pytest.raises(
        FileNotFoundError, match="has neither model.safetensors nor .*pytorch_model.bin has another format"
    ):
        formats.from_hf(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ArtifactError, match=r"config.json: expected a JSON object"):
        formats.from_hf(folder)


def cut(params, units=None, heads=None, groups=None, blocks=None):
    """Params with fewer units, query heads, heads of keys and values, and blocks."""
    inside, outside = {}, dict(params)
    for i, name in enumerate(name for name in params if name.startswith("block_")):
        block = jax.tree.map(np.asarray, outside.pop(name))
        if i in (range(9) if blocks is None else blocks):
            attention, mlp = block["attention"], block["mlp"]
            attention["query"] = {key: x[..., :heads, :] for key, x in attention["query"].items()}
            attention["out"]["kernel"] = attention["out"]["kernel"][:heads]
            for part in ("key", "value"):
                attention[part] = {key: x[..., :groups, :] for key, x in attention[part].items()}
            mlp |= {part: {key: x[..., :units] for key, x in mlp[part].items()} for part in set(mlp) - {"down"}}
            mlp["down"]["kernel"] = mlp["down"]["kernel"][:units]
            inside[f"block_{len(inside)}"] = block
    return outside | inside


CUTS = [
    ("gpt2", "gpt2", {"units": 12, "blocks": [1]}),
    ("llama", "llama", {"units": 12, "heads": 2, "groups": 2}),
    ("llama", "mistral", {"heads": 3, "groups": 3, "blocks": [0]}),  # 3 heads do not divide the width
    ("llama_biases", "llama", {"heads": 2, "groups": 1, "blocks": [1]}),
    ("qwen2", "qwen2", {"units": 4, "heads": 2, "groups": 1}),
]


@pytest.mark.parametrize(("name", "family", "cuts"), slow_except([CUTS[0], CUTS[2]], CUTS))
def test_smaller_models_go_back(name, family, cuts, tmp_path):
    model, params = formats.from_hf(GOLDEN / name)
    small = cut(params, **cuts)
    formats.to_hf(tmp_path / "small", model, small)
    config, _ = read(tmp_path / "small")
    assert config["model_type"] == family
    again, loaded = formats.from_hf(tmp_path / "small")
    assert again == model.fitted(small)
    same(loaded, small)


def test_cuts_that_no_checkpoint_can_say_are_refused(tmp_path):
    def refused(name, change, message, **options):
        model, params = formats.from_hf(GOLDEN / name)
        with pytest.raises(ValueError, match=message):
            formats.to_hf(tmp_path / "out", model, change(params), **options)
        assert list(tmp_path.iterdir()) == []

    def narrow(params):
        def change(path, leaf):
            for axis, size in enumerate(leaf.shape):
                leaf = leaf.take(range(15), axis) if size == 16 else leaf
            return leaf

        return jax.tree_util.tree_map_with_path(change, params)

    def short_heads(params):
        def change(path, leaf):
            axis = {"out": 1}.get(path[-2].key, -1)
            return leaf.take(range(2), axis) if "attention" in str(path) and leaf.ndim > 1 else leaf

        return jax.tree_util.tree_map_with_path(change, params)

    one = lambda params: params | {"block_1": cut(params, units=8)["block_1"]}  # noqa: E731
    refused("gpt2", lambda params: cut(params, heads=2, groups=2), "GPT-2 cannot have 2 heads of 4 with width 16")
    refused("gpt2", lambda params: cut(params, groups=2), "GPT-2 has as many key and value heads as query heads, got 2")
    refused("llama", one, r"block_1/mlp/.* must have shape .*20.*, got .*8.*: all blocks of a GPT have the same widths")
    refused("llama", narrow, "embedding/embedding has width 15, and the model 16: norms divide by the width")
    refused("llama", short_heads, "the heads have 2 channels, and those of the model 4: attention divides by")
    refused("llama", lambda params: {"params": params}, "params of a GPT have embedding/embedding; these have params/")
    keep_3 = lambda params: cut(params, heads=3, groups=3)  # noqa: E731
    refused("llama", keep_3, r"the family llama does not take width % num_heads = 1 \(only 0\)", family="llama")


def test_models_of_no_family_are_refused(tmp_path):
    shape = {"vocab_size": 8, "width": 4, "num_layers": 1, "num_heads": 2}
    llama = {"positions": "rotary", "norm": "rms", "mlp": "gated", "bias": False}
    for options, family, message in [
        ({"bias": False}, None, r"gpt2, the nearest, does not take bias = False \(only True\), attention_bias = False"),
        ({"positions": "rotary"}, None, r"gpt2, the nearest, does not take positions = 'rotary' \(only 'learned'\)"),
        (llama | {"norm": "layer"}, None, r"llama, the nearest, does not take norm = 'layer' \(only 'rms'\)"),
        (llama | {"attention_bias": "qkv"}, "llama", "the family llama does not take attention_bias = 'qkv'"),
        (llama | {"bias": True}, "mistral", "the family mistral does not take bias = True"),
        ({}, "bert", "family must be None or one of gpt2, llama, mistral, qwen2, got 'bert'"),
    ]:
        with pytest.raises(ValueError, match=message):
            families.family_for(GPT(**shape, **options), family)
    for options, family in (({}, "gpt2"), (llama, "llama"), (llama | {"attention_bias": "qkv"}, "qwen2")):
        assert families.family_for(GPT(**shape, **options))[0] == family


def test_the_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    model, params = formats.from_hf(GOLDEN / "qwen2")
    out = tmp_path / "new" / "out"
    out.mkdir(parents=True)  # empty
    formats.to_hf(out, model, params)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    with pytest.raises(FileExistsError, match="out is there already: expected a new or an empty folder"):
        formats.to_hf(out, model, params)
    with pytest.raises(ValueError, match="max_shard_size must be an int of at least 1, in bytes, got '1GB'"):
        formats.to_hf(tmp_path / "other", model, params, max_shard_size="1GB")

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(safetensors.numpy, "save", full)
    with pytest.raises(OSError, match="no space left"):
        formats.to_hf(tmp_path / "other", model, params)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_the_tokenizer_comes_along(tmp_path):
    model, params = formats.from_hf(GOLDEN / "qwen2")
    was = changed(tmp_path, "qwen2", {"eos_token_id": [1, 7]})
    (was / "tokenizer.json").write_text("{}")
    (was / "unrelated.txt").write_text("")
    formats.to_hf(tmp_path / "out", model, params, copy_from=was)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json"
    ]  # fmt: skip
    config, _ = read(tmp_path / "out")
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (0, [1, 7], None)
    with pytest.raises(FileNotFoundError):
        formats.to_hf(tmp_path / "other", model, params, copy_from=tmp_path)
    (was / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="config.json: expected a JSON object"):
        formats.to_hf(tmp_path / "other", model, params, copy_from=was)
