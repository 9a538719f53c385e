"""What models are made of, against plain NumPy, and the statistics of what is dropped."""

import numpy as np
import pytest

from minivit import Tensor, UserError
from minivit.nn.initialisers import initialise, normal
from minivit.nn.layers import Attention, AttentionPool, Dropout, DropPath, LayerNorm, LayerScale, Linear, Mlp, PatchEmbed, Random, TokenMlp

FAINT = 1e-12  # a rate at which nothing is dropped, but by the way that drops


def filled(layer):
    initialise(layer, {"*": normal(0.5)}, seed=0)
    return layer


def images(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def with_gradients(layer, x):
    """The result, and all gradients, for the loss Σ r·result with a fixed r."""
    layer.zero_grad()
    source = Tensor(x, requires_grad=True)
    y = layer(source)
    y.backward(images(*y.shape, seed=1))
    return [y.numpy(), source.grad.numpy(), *(p.grad.numpy() for p in layer.parameters())]


# ---------------------------------------------------------------------------------------------------------------- dropping
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout(rate):
    layer = Dropout(rate, Random(3)).train()
    x = Tensor(np.ones((200, 300)), requires_grad=True)
    y = layer(x)
    kept = y.numpy() != 0
    np.testing.assert_allclose(y.numpy()[kept], 1 / (1 - rate), rtol=1e-12)
    assert abs(1 - kept.mean() - rate) < 5 * (rate * (1 - rate) / kept.size) ** 0.5
    rows, columns = kept.mean(1), kept.mean(0)
    assert rows.std() < 1.3 * (rate * (1 - rate) / 300) ** 0.5 and columns.std() < 1.3 * (rate * (1 - rate) / 200) ** 0.5
    y.backward(np.full(y.shape, 2.0))
    np.testing.assert_allclose(x.grad.numpy(), 2 * y.numpy())


def test_drop_path_drops_samples():
    y = DropPath(0.25, Random(0)).train()(Tensor(np.ones((2000, 3, 4)))).numpy()
    assert (y == y[:, :1, :1]).all()
    kept = y[:, 0, 0] != 0
    np.testing.assert_allclose(y[kept], 4 / 3)
    assert abs(kept.mean() - 0.75) < 5 * (0.25 * 0.75 / 2000) ** 0.5


def test_masks_depend_on_seed_step_and_layer_alone():
    def masks(seed, step):
        random = Random(seed)
        for _ in range(step):
            random.advance()
        layers = [Dropout(0.5, random).train() for _ in range(2)]
        return [layer(Tensor(np.ones((4, 64)))).numpy().tobytes() for layer in layers]

    assert masks(0, 0) == masks(0, 0)
    assert len({mask for seed in (0, 1) for step in (0, 1, 2) for mask in masks(seed, step)}) == 12


def test_the_state_resumes():
    random = Random(5)
    layer = Dropout(0.5, random).train()
    random.advance()
    saved, first = random.state.copy(), layer(Tensor(np.ones(64))).numpy()
    random.advance()
    assert not np.array_equal(layer(Tensor(np.ones(64))).numpy(), first)
    again = Random()
    again.state[...] = saved - np.array([0, 1], np.uint64)
    layer.random = again
    again.advance()
    np.testing.assert_array_equal(layer(Tensor(np.ones(64))).numpy(), first)


def test_a_later_pass_leaves_the_masks_of_an_earlier_one():
    random = Random(0)
    layer = Dropout(0.5, random).train()
    x = Tensor(np.ones(64), requires_grad=True)
    random.advance()
    first = layer(x)
    random.advance()
    first.sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), first.numpy())


def test_nothing_is_dropped_in_evaluation_or_at_rate_0():
    x = Tensor(np.ones((3, 4)))
    assert Dropout(0.5, Random(0))(x) is x
    assert DropPath(0.0, Random(0)).train()(x) is x


# ------------------------------------------------------------------------------------------------------------------- layers
def test_linear():
    layer = filled(Linear(4, 3, dtype="float64"))
    x = images(2, 5, 4)
    expected = x @ layer.weight.data.T + layer.bias.data
    np.testing.assert_allclose(layer(Tensor(x)).numpy(), expected, rtol=1e-12)
    assert Linear(4, 3, bias=False).bias is None
    plain = filled(Linear(4, 3, bias=False, dtype="float64"))
    np.testing.assert_allclose(plain(Tensor(x), residual=Tensor(expected)).numpy(), expected + x @ plain.weight.data.T, rtol=1e-12)


def test_layer_norm_and_scale():
    layer = filled(LayerNorm(6, 1e-3, "float64"))
    x, branch = images(2, 3, 6), images(2, 3, 6, seed=1)

    def expected(x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-3) * layer.weight.data + layer.bias.data

    np.testing.assert_allclose(layer(Tensor(x)).numpy(), expected(x), rtol=1e-10)
    total, normed = layer.add(Tensor(x), Tensor(branch))
    np.testing.assert_allclose(total.numpy(), x + branch)
    np.testing.assert_allclose(normed.numpy(), expected(x + branch), rtol=1e-10)
    scale = LayerScale(6, 0.1, "float64")
    np.testing.assert_allclose(scale(Tensor(x)).numpy(), 0.1 * x)


def test_attention_pool():
    layer, x = AttentionPool(6, "float64"), images(3, 5, 6)
    np.testing.assert_allclose(layer(Tensor(x)).numpy(), x.mean(1), rtol=1e-12)
    weights = np.exp(x @ filled(layer).weight.data[0])
    expected = (weights[:, :, None] * x).sum(1) / weights.sum(1, keepdims=True)
    np.testing.assert_allclose(layer(Tensor(x)).numpy(), expected, rtol=1e-12)


def test_patch_embed():
    layer = filled(PatchEmbed(6, 3, 2, 5, "float64"))
    x = images(4, 2, 6, 6)
    weight = layer.proj.weight.data.reshape(5, -1)  # (O, C·P·P)
    patches = [x[:, :, i : i + 3, j : j + 3].reshape(4, -1) for i in (0, 3) for j in (0, 3)]
    expected = np.stack([p @ weight.T + layer.proj.bias.data for p in patches], axis=1)
    np.testing.assert_allclose(layer(Tensor(x)).numpy(), expected, rtol=1e-12)
    with pytest.raises(UserError, match=r"^patch_size must divide image_size: 7 is not a multiple of 3$"):
        PatchEmbed(7, 3, 2, 5)
    with pytest.raises(UserError, match=r"images have shape \(4, 2, 6, 9\), the model takes \(B, 2, 6, 6\)"):
        layer(Tensor(images(4, 2, 6, 9)))


def test_attention():
    layer = filled(Attention(6, 2, Random(0), dtype="float64"))
    x = images(3, 5, 6)
    qkv = (x @ layer.qkv.weight.data.T + layer.qkv.bias.data).reshape(3, 5, 3, 2, 3)
    q, k, v = qkv.transpose(2, 0, 3, 1, 4)  # (B, H, N, D) each
    logits = q @ k.swapaxes(-1, -2) / 3**0.5
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    context = (p @ v).transpose(0, 2, 1, 3).reshape(3, 5, 6)
    np.testing.assert_allclose(layer(Tensor(x)).numpy(), context @ layer.proj.weight.data.T + layer.proj.bias.data, rtol=1e-10)
    with pytest.raises(UserError, match=r"^heads must divide dim: 6 is not a multiple of 4$"):
        Attention(6, 4, Random(0))


def test_token_mlp_is_the_mlp_of_the_transposed():
    over_tokens, over_channels = (filled(kind(5, 7, Random(0), "gelu_tanh", dtype="float64")) for kind in (TokenMlp, Mlp))
    x = images(2, 5, 4)
    expected = over_channels(Tensor(x.swapaxes(1, 2).copy())).numpy().swapaxes(1, 2)
    np.testing.assert_allclose(over_tokens(Tensor(x)).numpy(), expected, rtol=1e-10)
    np.testing.assert_allclose(over_tokens(Tensor(x), residual=Tensor(x)).numpy(), x + expected, rtol=1e-10)


@pytest.mark.parametrize(
    "make",
    [
        lambda drop: Mlp(4, 7, Random(0), "gelu", drop, "float64"),
        lambda drop: Mlp(4, 7, Random(0), "gelu_tanh", drop, "float64"),
        lambda drop: TokenMlp(5, 7, Random(0), "gelu", drop, "float64"),
        lambda drop: Attention(4, 2, Random(0), attn_drop=drop, dtype="float64"),
        lambda drop: Attention(4, 2, Random(0), qkv_bias=False, attn_drop=drop, proj_drop=drop, dtype="float64"),
    ],
)
def test_the_way_that_drops_computes_the_same(make):
    x = images(2, 5, 4)
    fused, dropping = filled(make(0.0)).train(), filled(make(FAINT)).train()
    for a, b in zip(with_gradients(fused, x), with_gradients(dropping, x)):
        np.testing.assert_allclose(b, a, rtol=1e-9, atol=1e-11)


def test_attention_drops_probabilities():
    layer = filled(Attention(4, 2, Random(0), attn_drop=0.5, dtype="float64")).train()
    layer.proj.weight.data[...] = np.eye(4)
    layer.qkv.weight.data[8:] = 0  # v = bias: context = bias · Σ of what is kept of each row
    sums = (layer(Tensor(images(400, 5, 4))).numpy() - layer.proj.bias.data) / layer.qkv.bias.data[8:]
    np.testing.assert_allclose(sums[..., 0], sums[..., 1])  # one head's channels see the same probabilities
    assert sums.std() > 0.1 and abs(sums.mean() - 1) < 0.05
