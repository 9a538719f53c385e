"""CrossViT: what is its own. Tests of all families are in test_golden, test_presets and test_steps."""

import numpy as np
import pytest

import minivit
from minivit import UserError, plots
from minivit.kernels.resample import axis_matrix

SMALL = dict(image_size=8, branch_sizes=(8, 6), patch_sizes=(2, 3), dims=(6, 8), depths=(1, 2), stages=2, heads=(3, 2), num_classes=3)


def small(**options):
    return minivit.create_model("crossvit", **SMALL | options)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(patch_sizes=(3, 3)), "^patch_size must divide image_size: 8 is not a multiple of 3$"),
        (dict(heads=(3, 3)), "^heads must divide dim: 8 is not a multiple of 3$"),
        (dict(dims=(6, 8, 8)), r"^dims must hold 2 values, not 3: \(6, 8, 8\)$"),
        (dict(dims=6), "^dims must be a list, not 6$"),
        (dict(depths=(1, 0)), r"^depths\[1\] must be a whole number of at least 1, not 0$"),
        (dict(stages=0), "^stages must be a whole number of at least 1, not 0$"),
        (dict(mlp_ratios=(4.0, 0.01)), "^mlp_ratio=0.01 leaves no hidden channel of dim 8"),
    ],
)
def test_bad_values_are_named(options, message):
    with pytest.raises(UserError, match=message):
        small(**options)


def test_a_convolution_stem_is_for_some_patch_sizes():
    with pytest.raises(UserError, match=r"^stem='convolution' is for patch_sizes of 2, 3, 4, 6, 8, 12, 16 pixels, not 5$"):
        minivit.create_model("crossvit", image_size=20, branch_sizes=(20, 20), patch_sizes=(4, 5), stem="convolution")
    with pytest.raises(UserError, match=r"^patch_size must divide image_size: 8 is not a multiple of 3$"):
        small(patch_sizes=(3, 3), stem="convolution")


@pytest.mark.parametrize("patch, size", [(2, 6), (3, 9), (4, 12), (6, 18), (8, 16), (12, 36), (16, 32)])
def test_every_convolution_stem_has_its_grid(patch, size):
    model = small(image_size=size, branch_sizes=(size, 6), patch_sizes=(patch, 3), stem="convolution")
    assert model.patch_embed[0].grid == (size // patch, size // patch)
    assert model(np.zeros((1, 3, size, size))).shape == (1, 3)


def test_images_of_another_shape():
    with pytest.raises(UserError, match=r"images have shape \(2, 3, 6, 6\), the model takes \(B, 3, 8, 8\)"):
        small()(np.zeros((2, 3, 6, 6)))


def test_a_branch_sees_the_resized_image():
    model = small(dtype="float64")
    images = np.random.default_rng(0).random((2, 3, 8, 8))
    matrix = axis_matrix(8, 6, "bicubic")
    resized = np.einsum("ik,jl,bckl->bcij", matrix, matrix, images)
    rows = resized.reshape(2, 3, 2, 3, 2, 3).transpose(0, 2, 4, 1, 3, 5).reshape(2, 4, 27)
    weight = model.patch_embed[1].proj.weight.numpy().reshape(8, 27)
    expected = rows @ weight.T + model.patch_embed[1].proj.bias.numpy() + model.pos_embed_1.numpy()[:, 1:]
    np.testing.assert_allclose(model.embed(1, minivit.Tensor(images)).numpy()[:, 1:], expected, rtol=1e-10)


def test_weights_go_out_and_come_in_again(tmp_path):
    model = small(seed=1)
    minivit.save_weights(model, tmp_path / "model.safetensors")
    other = small(seed=2)
    minivit.load_weights(other, tmp_path / "model.safetensors")
    images = np.random.default_rng(0).random((2, 3, 8, 8))
    assert np.array_equal(model(images).numpy(), other(images).numpy())
    larger = small(seed=2, image_size=16, branch_sizes=(16, 12), num_classes=5)
    minivit.load_weights(larger, tmp_path / "model.safetensors", head=False)
    assert larger.pos_embed_0.shape == (1, 65, 6) and larger.pos_embed_1.shape == (1, 17, 8)
    np.testing.assert_array_equal(larger.pos_embed_1.numpy()[:, 0], model.pos_embed_1.numpy()[:, 0])
    assert larger(np.zeros((2, 3, 16, 16))).shape == (2, 5)


def test_names_as_the_authors_write_them():
    model = small()
    state = {name.replace("_embed_", "_embed.").replace("_token_", "_token."): array for name, array in model.state_dict().items()}
    assert "pos_embed.0" in state and "cls_token.1" in state
    model.load_state_dict(model.rename_foreign(state))


def test_reset_head():
    model = small().train()
    before = model.state_dict()
    model.reset_head(7)
    assert model.config.num_classes == 7 and all(head.training for head in model.head)
    assert model(np.zeros((2, 3, 8, 8))).shape == (2, 7)
    after = model.state_dict()
    assert all(np.array_equal(before[n], after[n]) for n in before if not n.startswith("head."))
    assert all(after[f"head.{b}.weight"].std() > 0 for b in (0, 1))


def test_which_parameters_decay():
    model = small()
    decayed = {id(p) for p in model.decayed_parameters()}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert {"head.0.weight", "blocks.0.fusion.1.attn.wk.weight"} <= names
    assert not any(name.startswith(("pos_embed", "cls_token")) or name.endswith("bias") for name in names)


def test_rates_over_depth():
    model = small(drop_path_rate=0.3)
    rates = [[block.drop_path1.rate for block in stage.blocks[1].layers] for stage in model.blocks]
    np.testing.assert_allclose(rates, [[0, 0.1], [0.2, 0.3]])
    assert [stage.fusion[0].drop_path.rate for stage in model.blocks] == pytest.approx([0.1, 0.3])


def test_cost_counts_every_product():
    cost = small().cost()
    assert cost.layers["patch_embed.1"] == 4 * 27 * 8
    assert cost.layers["blocks.0.fusion.1.attn.wk"] == (1 + 16) * 6 * 6  # the class token of branch 1 among the patches of branch 0
    assert cost.layers["blocks.0.fusion.1.attn"] == 2 * (1 + 16) * 6
    assert len(cost.exits) == 1


def test_pictures_of_both_branches(tmp_path):
    model = minivit.create_model("crossvit_nano_8", dims=(8, 12), heads=(2, 2), depths=(1, 1))
    minivit.train(model, "digits", epochs=1, limit=64, out=tmp_path / "run", progress=False)
    names = [path.name for path in plots.draw_run(tmp_path / "run", progress=False)]
    kinds = ("filters", "positions")
    assert names == [
        "curves.png",
        *(f"{kind}_branch{b}.png" for b in (1, 2) for kind in kinds),
        *(f"attention_branch{b}.png" for b in (1, 2)),
        "rollout.png",
    ]
