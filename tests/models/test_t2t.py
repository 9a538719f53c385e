"""T2T-ViT: its fixed tables, its dropout, its grids, and what a cascade of it takes as options."""

import numpy as np
import pytest
from safetensors.numpy import save_file

import minivit
from minivit import Trainer, UserError

SMALL = dict(image_size=8, in_channels=2, num_classes=3, dim=12, depth=1, heads=2, token_dim=8, unfolds=((3, 1, 1), (3, 2, 1), (3, 1, 1)))


def small(**options):
    return minivit.create_model("t2t", **SMALL | options)


def pictures(number=4):
    return np.random.default_rng(0).standard_normal((number, 2, 8, 8)).astype(np.float32)


def test_the_position_embedding():
    table = small(dim=6).pos_embed.numpy()
    assert table.shape == (1, 17, 6)
    angles = 5 / 10000 ** np.array([0, 0, 1 / 3, 1 / 3, 2 / 3, 2 / 3])
    np.testing.assert_allclose(table[0, 5], np.where(np.arange(6) % 2, np.cos(angles), np.sin(angles)), rtol=1e-6)
    double = small(dim=6, dtype="float64").pos_embed.numpy()
    assert np.array_equal(double, table) and double.dtype == np.float64  # rounded to float32 as in the authors' code


@pytest.mark.parametrize("features, rows", [(None, 4), (3, 3), (11, 11)])
def test_features_are_orthogonal(features, rows):
    block = small(kernel_features=features).tokens_to_token.attention1
    w = block.w.numpy().astype(np.float64)
    assert w.shape == (rows, 8) and not block.w.requires_grad
    products = w @ w.T if rows <= 8 else w.T @ w
    np.testing.assert_allclose(products, rows * np.eye(min(rows, 8)), atol=1e-5)
    other = small(kernel_features=features, seed=1).tokens_to_token.attention1.w.numpy()
    assert not np.array_equal(w, other) and not np.array_equal(w, small(kernel_features=features).tokens_to_token.attention2.w.numpy())


@pytest.mark.parametrize("init", ["timm", "jax"])
def test_first_weights(init):
    state = minivit.create_model("t2t", **SMALL | dict(dim=64, depth=2, heads=4, token_dim=32, num_classes=50), init=init).state_dict()
    ours = {name: array.std() for name, array in state.items() if name.endswith("weight") and "norm" not in name}
    xavier = {"kqv": (2 / (32 + 288)) ** 0.5, "qkv": (2 / 128) ** 0.5, "fc1": (2 / (64 + 192)) ** 0.5, "project": 288**-0.5}
    for layer, name in (
        ("kqv", "tokens_to_token.attention2.kqv.weight"),
        ("project", "tokens_to_token.project.weight"),
        ("qkv", "blocks.1.attn.qkv.weight"),
        ("fc1", "blocks.1.mlp.fc1.weight"),
    ):
        assert ours[name] == pytest.approx(0.02 if init == "timm" else xavier[layer], rel=0.1), name
    assert (ours["head.weight"] > 0) == (init == "timm")
    assert {name for name, std in ours.items() if std == 0} == (set() if init == "timm" else {"head.weight"})


def test_training_leaves_the_tables_as_they_are():
    model = small()
    before = model.state_dict()
    trainer = Trainer(model, lr=0.1)
    for _ in range(3):
        trainer.step(pictures(), np.arange(4) % 3)
    after = model.state_dict()
    fixed = {"pos_embed", "tokens_to_token.attention1.w", "tokens_to_token.attention2.w"}
    assert {name for name in after if np.array_equal(before[name], after[name])} == fixed


def test_performers_drop_in_training_unless_told_otherwise():
    model = small().train()
    assert not np.array_equal(model.tokens(pictures()).numpy(), model.tokens(pictures()).numpy())
    model = small(token_drop_rate=0.0).train()
    assert np.array_equal(model.tokens(pictures()).numpy(), model.tokens(pictures()).numpy())
    model = small(tokens="transformer").train()
    assert np.array_equal(model.tokens(pictures()).numpy(), model.tokens(pictures()).numpy())


@pytest.mark.parametrize("tokens", ["performer", "transformer"])
def test_the_answer_to_an_image_depends_on_it_alone(tokens):
    model = small(tokens=tokens)
    together = model.tokens(pictures()).numpy()
    alone = model.tokens(pictures()[2:3]).numpy()
    np.testing.assert_allclose(together[2:3], alone, rtol=1e-5, atol=1e-6)


def test_weights_for_another_image_size(tmp_path):
    source, target = small(), small(image_size=16, seed=1)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    minivit.load_weights(target, tmp_path / "weights.safetensors")
    assert target.pos_embed.shape == (1, 65, 12) and np.isfinite(target.pos_embed.numpy()).all()
    assert np.array_equal(target.pos_embed.numpy()[:, 0], source.pos_embed.numpy()[:, 0])
    assert np.array_equal(target.tokens_to_token.attention2.w.numpy(), source.tokens_to_token.attention2.w.numpy())


def cascade(**options):
    given = dict(image_size=8, in_channels=2, num_classes=3, dim=12, depth=1, heads=2, patches=((4, 4, 0), (4, 2, 0), (3, 2, 1)))
    return minivit.create_model("dvt", backbone="t2t", **given | options)


def test_a_cascade_takes_the_later_unfolds_as_an_option():
    model = cascade(options=dict(token_dim=8, kernel_features=2, unfolds=((3, 1, 1), (3, 1, 1))))
    assert [stage.grid for stage in model.stages] == [(2, 2), (3, 3), (4, 4)]
    assert model.stages[1].config.unfolds == ((4, 2, 0), (3, 1, 1), (3, 1, 1))
    assert {stage.tokens_to_token.attention1.w.shape for stage in model.stages} == {(2, 8)}
    assert [logits.shape for logits in model.exits(pictures())] == [(4, 3)] * 3
    assert [stage.grid for stage in cascade(patches=((3, 1, 1), (3, 1, 2))).stages] == [(2, 2), (3, 3)]  # by default each halves the grid


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(unfolds=((3, 1, 1),) * 3), "options: unfolds, after those of patches, must hold 2 values, not 3"),
        (dict(unfolds=3), "options: unfolds, after those of patches, must be a list, not 3"),
        (dict(unfolds=((4, 1, 0), (3, 1, 1))), "unfolds: number 2 takes patches of 4×4, and of images of 8×8 only 2×2"),
        (dict(patch_size=3), "options: t2t has no option 'patch_size' to set here"),
        (dict(dim=3), "options: t2t has no option 'dim' to set here"),
    ],
)
def test_bad_options_of_a_cascade(options, message):
    with pytest.raises(UserError, match=message) as caught:
        cascade(options=options)
    assert "\n" not in str(caught.value)


def test_images_of_another_shape():
    with pytest.raises(UserError, match=r"images have shape \(4, 2, 8, 8\), the model takes \(B, 2, 16, 16\)"):
        small(image_size=16)(pictures())
