"""Weights in and out, and what is said of files that do not fit."""

import errno
import json
import struct
import zipfile
from contextlib import suppress

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import minivit
from minivit import UserError, files
from minivit.io.weights import read_safetensors
from minivit.models.positions import resize

SMALL = dict(image_size=8, patch_size=4, num_classes=3, dim=16, depth=2)


def vit(**options):
    return minivit.create_model("vit", **{**SMALL, "heads": 2, **options})


def mixer(**options):
    return minivit.create_model("mixer", **{**SMALL, **options})


def same(model, state):
    own = model.state_dict()
    return own.keys() == state.keys() and all(np.array_equal(own[n], state[n]) for n in own)


def refused(model, path, **options):
    """What is said; the model must not have changed."""
    before = model.state_dict()
    with pytest.raises(UserError) as caught:
        minivit.load_weights(model, path, **options)
    assert same(model, before)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


def to_google(model, block=("LayerNorm_2", "MultiHeadDotProductAttention_1", "MlpBlock_3"), prefix=""):
    """The parameters of a ViT in Google's layout."""
    norm2, attention, mlp = block
    heads, state = model.config.heads, model.state_dict()
    out = {
        "cls": state["cls_token"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
    }
    for i in range(model.config.depth):
        ours, theirs = f"blocks.{i}.", f"Transformer/encoderblock_{i}/"
        for a, b in (("norm1", "LayerNorm_0"), ("norm2", norm2)):
            out |= {f"{theirs}{b}/scale": state[f"{ours}{a}.weight"], f"{theirs}{b}/bias": state[f"{ours}{a}.bias"]}
        for k in (0, 1):
            out |= {
                f"{theirs}{mlp}/Dense_{k}/kernel": state[f"{ours}mlp.fc{k + 1}.weight"].T,
                f"{theirs}{mlp}/Dense_{k}/bias": state[f"{ours}mlp.fc{k + 1}.bias"],
            }
        dim = model.config.dim
        for k, part in enumerate(("query", "key", "value")):
            rows = slice(k * dim, (k + 1) * dim)
            out |= {
                f"{theirs}{attention}/{part}/kernel": state[f"{ours}attn.qkv.weight"][rows].T.reshape(dim, heads, -1),
                f"{theirs}{attention}/{part}/bias": state[f"{ours}attn.qkv.bias"][rows].reshape(heads, -1),
            }
        out |= {
            f"{theirs}{attention}/out/kernel": state[f"{ours}attn.proj.weight"].T.reshape(heads, -1, dim),
            f"{theirs}{attention}/out/bias": state[f"{ours}attn.proj.bias"],
        }
    return {prefix + name: array for name, array in out.items()}


# ------------------------------------------------------------------------------------------------------------ safetensors
@pytest.mark.parametrize("make", [vit, mixer])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_round_trip(make, dtype, tmp_path):
    model = make(dtype=dtype, seed=1)
    path = tmp_path / "new" / "w.safetensors"
    minivit.save_weights(model, path, {"note": "mine"})
    other = make(dtype=dtype, seed=2)
    minivit.load_weights(other, str(path))
    assert same(other, model.state_dict())
    arrays, metadata = read_safetensors(path)
    assert arrays.keys() == load_file(path).keys() and metadata["note"] == "mine"
    described = json.loads(metadata["model"])
    again = minivit.create_model(described.pop("family"), **{k: v for k, v in described.items() if k != "name"})
    assert again.config == model.config
    assert [p.name for p in path.parent.iterdir()] == ["w.safetensors"]


def test_other_dtypes(tmp_path):
    model, path = vit(), tmp_path / "w.safetensors"
    minivit.save_weights(vit(dtype="float64", seed=3), path)
    minivit.load_weights(model, path)
    assert model.head.weight.dtype == np.float32
    save_file({n: a.astype(np.float16) for n, a in vit(seed=4).state_dict().items()}, path)
    minivit.load_weights(model, path)
    np.testing.assert_allclose(model.head.weight.data, vit(seed=4).head.weight.data, rtol=1e-3, atol=1e-7)
    header = json.dumps({"a": {"dtype": "BF16", "shape": [1, 2], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\x80\x3f\x20\xc0")
    np.testing.assert_array_equal(read_safetensors(path)[0]["a"], [[1.0, -2.5]])
    path.write_bytes(path.read_bytes().replace(b'"BF16", "shape": [1, 2]', b'"F8_E4M3", "shape": [4]'.ljust(23)))
    assert "a has dtype F8_E4M3: convert it to F32" in refused(model, path)


def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    minivit.save_weights(vit(seed=1), path)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*w\.safetensors: No space left on device"):
        minivit.save_weights(vit(seed=2), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


DAMAGED = {".safetensors": "is damaged or no safetensors file", ".npz": "it is no .npz file of plain arrays, or not whole"}


@pytest.mark.parametrize("make", [vit, mixer])
@pytest.mark.parametrize("ending", [".safetensors", ".npz"])
def test_damaged_and_missing_files(make, ending, tmp_path):
    path = tmp_path / f"w{ending}"
    assert "No such file" in refused(make(), path)
    if ending == ".npz":
        np.savez_compressed(path, **to_google(vit()))
    else:
        minivit.save_weights(make(), path)
    whole = path.read_bytes()
    for content in (b"", b"garbage", whole[:100], whole[:-10], whole[: len(whole) // 2], b"\xff" * 3000, whole[::-1]):
        path.write_bytes(content)
        assert DAMAGED[ending] in refused(make(), path), content[:20]
    flipped = bytearray(whole)
    flipped[len(whole) // 2 : len(whole) // 2 + 200] = bytes(200)
    if ending == ".npz":  # a checksum guards these
        path.write_bytes(flipped)
        assert DAMAGED[ending] in refused(make(), path)


@pytest.mark.parametrize("ending", [".safetensors", ".npz"])
def test_any_damage_raises_a_user_error_or_none(ending, tmp_path):
    path, model, rng = tmp_path / f"w{ending}", vit(depth=1), np.random.default_rng(0)
    if ending == ".npz":
        np.savez_compressed(path, **to_google(model))
    else:
        minivit.save_weights(model, path)
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    for _ in range(200):
        content = whole.copy()
        content[rng.integers(0, min(len(whole), 4000), 4)] = rng.integers(0, 256, 4)
        path.write_bytes(content.tobytes())
        with suppress(UserError):  # a weight may have changed, which no reader can tell
            minivit.load_weights(model, path)


def test_google_normalises_before_the_mean(tmp_path):
    path = tmp_path / "w.npz"
    np.savez(path, **to_google(vit()))
    assert "comes before the mean over tokens, here after it: take pool='cls'" in refused(vit(pool="mean"), path)


def test_no_npz_of_numbers(tmp_path):
    path = tmp_path / "w.npz"
    np.savez(path, cls=np.array([{}], dtype=object))  # would be unpickled
    assert "it is no .npz file of plain arrays, or not whole" in refused(vit(), path)
    np.savez(path, **(to_google(vit()) | {"cls": np.full((1, 1, 16), "text")}))
    assert "is no npz file of weights: cls hold no numbers" in refused(vit(), path)
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))
    assert "it is no .npz file of plain arrays, or not whole" in refused(vit(), path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "text")
    assert "it is no .npz file of plain arrays, or not whole" in refused(vit(), path)


def test_a_folder_and_other_endings(tmp_path):
    for name, message in (("w.txt", "weights are .safetensors or .npz files"), ("w.pt", "is a pickle"), ("w", "weights are .safetensors")):
        assert message in refused(vit(), tmp_path / name)
        with pytest.raises(UserError, match=r"weights are saved as \.safetensors"):
            minivit.save_weights(vit(), tmp_path / name)
    (tmp_path / "w.safetensors").mkdir()
    assert "No such file" in refused(vit(), tmp_path / "w.safetensors")


# --------------------------------------------------------------------------------------------------------- names and shapes
def test_wrong_names_and_shapes_are_listed(tmp_path):
    path = tmp_path / "w.safetensors"
    state = vit().state_dict()
    state["blocks.1.norm1.weight"] = np.zeros(5, np.float32)
    state["extra"] = state.pop("norm.bias")
    save_file(state, path)
    message = refused(vit(), path)
    for fact in ("wrong shape: blocks.1.norm1.weight is (5,), not (16,)", "missing: norm.bias", "unexpected: extra"):
        assert fact in message
    minivit.save_weights(mixer(), path)
    assert "missing: cls_token, pos_embed, patch_embed.proj.weight" in refused(vit(), path)


def test_the_head_of_other_classes(tmp_path):
    path = tmp_path / "w.safetensors"
    minivit.save_weights(vit(num_classes=7, seed=1), path)
    message = refused(vit(), path)
    assert "head.weight is (7, 16), not (3, 16); head.bias is (7,), not (3,)" in message and "head=False" in message
    model = vit()
    own = model.head.weight.data.copy()
    minivit.load_weights(model, path, head=False)
    expected = vit(num_classes=7, seed=1).state_dict()
    assert np.array_equal(model.head.weight.data, own)
    assert np.array_equal(model.pos_embed.data, expected["pos_embed"])
    save_file({n: a for n, a in expected.items() if not n.startswith("head.")}, path)
    assert "has no head: load it with head=False" in refused(model, path)
    minivit.load_weights(model, path, head=False)


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "module._orig_mod."])
def test_names_of_a_wrapped_module(prefix, tmp_path):
    source, model, path = vit(seed=1), vit(), tmp_path / "w.safetensors"
    save_file({prefix + name: array for name, array in source.state_dict().items()}, path)
    minivit.load_weights(model, path)
    assert same(model, source.state_dict())


def test_positions_of_another_image_size(tmp_path):
    path = tmp_path / "w.safetensors"
    source = vit(image_size=16, seed=1)
    minivit.save_weights(source, path)
    model = vit()
    minivit.load_weights(model, path)
    np.testing.assert_array_equal(model.pos_embed.data, resize(source.pos_embed.data, 2, 1, "bicubic_antialias"))
    np.savez(tmp_path / "w.npz", **to_google(source))
    minivit.load_weights(model, tmp_path / "w.npz")
    np.testing.assert_array_equal(model.pos_embed.data, resize(source.pos_embed.data, 2, 1, "bilinear"))
    assert "position embedding of 17 tokens" in refused(vit(pool="mean", class_token=False), path)
    minivit.save_weights(mixer(image_size=16), path)
    assert "blocks.0.mlp_tokens.fc1.weight is (8, 16), not (8, 4)" in refused(mixer(), path)


# --------------------------------------------------------------------------------------------------------- Google's names
@pytest.mark.parametrize(
    "block, prefix",
    [
        (("LayerNorm_2", "MultiHeadDotProductAttention_1", "MlpBlock_3"), ""),
        (("LayerNorm_2", "MultiHeadDotProductAttention_1", "MlpBlock_3"), "opt/target/"),
        (("LayerNorm_1", "MultiHeadDotProductAttention_0", "MlpBlock_0"), "params/"),
        (("LayerNorm_1", "MultiHeadDotProductAttention_0", "MlpBlock_0"), "params/img/"),
    ],
)
def test_google_numbering_and_prefixes(block, prefix, tmp_path):
    source, path = vit(seed=1), tmp_path / "w.npz"
    arrays = to_google(source, block, prefix)
    if prefix:
        arrays["opt/0/mu/cls"] = np.zeros(3)  # what a training checkpoint holds besides
    if prefix.startswith("params/"):
        arrays[f"{prefix}pos_embedding"] = arrays.pop(f"{prefix}Transformer/posembed_input/pos_embedding")
    np.savez(path, **arrays)
    model = vit()
    minivit.load_weights(model, path)
    assert same(model, source.state_dict())


def test_pre_logits_belongs_to_the_head_of_the_file(tmp_path):
    source, model, path = vit(seed=1), vit(num_classes=7), tmp_path / "w.npz"
    np.savez(path, **to_google(source), **{"pre_logits/kernel": np.zeros((16, 16)), "pre_logits/bias": np.zeros(16)})
    assert "its head has a layer pre_logits, which vit does not: load with head=False" in refused(vit(), path)
    own_head = model.head.weight.numpy().copy()
    minivit.load_weights(model, path, head=False)
    assert same(model, {**source.state_dict(), "head.weight": own_head, "head.bias": np.zeros(7, np.float32)})


def test_a_file_without_a_head(tmp_path):
    source, model, path = vit(seed=1), vit(), tmp_path / "w.npz"
    np.savez(path, **{name: array for name, array in to_google(source).items() if not name.startswith("head/")})
    assert "missing: head/kernel, head/bias" in refused(vit(), path)
    minivit.load_weights(model, path, head=False)
    np.testing.assert_array_equal(model.cls_token.data, source.cls_token.data)


def test_google_names_that_do_not_fit(tmp_path):
    path = tmp_path / "w.npz"
    arrays = to_google(vit())
    del arrays["Transformer/encoderblock_1/MlpBlock_3/Dense_0/bias"]
    arrays["others/kernel"] = np.zeros((4, 4))
    np.savez(path, **arrays)
    message = refused(vit(), path)
    assert "missing: Transformer/encoderblock_1/MlpBlock_3/Dense_0/bias; unexpected: others/kernel" in message
    assert "unexpected: Transformer/encoderblock_1/" in refused(vit(depth=1), path)
    assert "missing: stem/kernel" in refused(mixer(), path)


@pytest.mark.parametrize("name", ["query/kernel", "value/bias", "out/kernel"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 2, 2), (2, 2, 2, 2, 2)])
def test_google_shapes_that_do_not_fit(name, shape, tmp_path):
    path = tmp_path / "w.npz"
    arrays = to_google(vit())
    arrays[f"Transformer/encoderblock_0/MultiHeadDotProductAttention_1/{name}"] = np.zeros(shape, np.float32)
    np.savez(path, **arrays)
    assert "shape" in refused(vit(), path)


def test_google_head_of_other_classes(tmp_path):
    path = tmp_path / "w.npz"
    np.savez(path, **to_google(vit(num_classes=7, seed=1)))
    assert "head.weight is (7, 16), not (3, 16)" in refused(vit(), path)
    model = vit()
    minivit.load_weights(model, path, head=False)
    assert np.array_equal(model.cls_token.data, vit(seed=1).cls_token.data)
