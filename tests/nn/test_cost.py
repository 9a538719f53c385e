"""The cost of models: closed forms, published figures, and that counting computes and changes nothing."""

import threading

import numpy as np
import pytest

import minivit
from minivit import Tensor, UserError
from minivit.grad_mode import is_grad_enabled, trace
from minivit.kernels import OPS
from minivit.kernels.core.recording import record
from minivit.nn.cost import ModelCost

SIZES = {"image_size": 12, "patch_size": 4, "in_channels": 2, "num_classes": 7, "dim": 24, "depth": 3}


def model_of(family, **options):
    return minivit.create_model(family, **SIZES | options)


def vit_block(tokens, dim, hidden):
    products = tokens * dim * (3 * dim + dim) + 2 * tokens * hidden * dim  # qkv and the projection; the MLP
    return products + 2 * tokens**2 * dim + 2 * 5 * tokens * dim  # two products of attention; two layer norms


# -------------------------------------------------------------------------------------------------------------- closed forms
@pytest.mark.parametrize(
    "options, tokens, normed", [({}, 10, 10), ({"pool": "mean"}, 10, 1), ({"pool": "mean", "class_token": False}, 9, 1)]
)
def test_vit(options, tokens, normed):
    cost = model_of("vit", heads=4, mlp_ratio=1.5, **options).cost()
    assert cost.total == 9 * 2 * 4 * 4 * 24 + 3 * vit_block(tokens, 24, 36) + normed * 5 * 24 + 24 * 7
    assert cost.layers["patch_embed"] == 9 * 2 * 4 * 4 * 24
    assert cost.layers["blocks.1.attn"] == 2 * tokens**2 * 24
    assert cost.layers["blocks.1.norm1"] == cost.layers["blocks.1.norm2"] == 5 * tokens * 24
    assert cost.layers["blocks.1.mlp"] == 2 * tokens * 24 * 36


@pytest.mark.parametrize("family, options", [("vit", {}), ("localvit", {"channel_attention": None})])
def test_attention_pooling(family, options):
    cost = model_of(family, heads=4, pool="attention", **options).cost()
    assert cost.layers["attention_pool"] == 9 * 24 + 9 * 24  # the scores, and the weighted mean, of the patches alone


def test_mixer():
    cost = model_of("mixer", token_hidden=5, channel_hidden=11).cost()
    block = 2 * 9 * 5 * 24 + 2 * 9 * 24 * 11 + 2 * 5 * 9 * 24
    assert cost.total == 9 * 2 * 4 * 4 * 24 + 3 * block + 5 * 9 * 24 + 24 * 7
    assert cost.layers["blocks.2.mlp_tokens"] == 2 * 9 * 5 * 24
    tokens = 9 * 24  # the numbers of an MLP's output, or a layer norm's, which has two more a token
    assert cost.activations == 9 * 32 + tokens + 3 * (4 * tokens + 2 * 2 * 9 + 5 * 24 + 9 * 11) + tokens + 2 * 9 + 24 + 7


def test_ff_only():
    cost = model_of("ff_only", mlp_ratio=1.5, position_grid=5).cost()  # whose resizing to 3 a side counts nothing
    block = 2 * 10 * 24 * 36 + 2 * 15 * 10 * 24 + 2 * 5 * 10 * 24
    assert cost.total == 9 * 2 * 4 * 4 * 24 + 3 * block + 10 * 5 * 24 + 24 * 7
    assert cost.layers["blocks.0.mlp2"] == 2 * 15 * 10 * 24 and cost.layers["blocks.0.norm2"] == 5 * 10 * 24


@pytest.mark.parametrize("tokens", ["performer", "transformer"])
def test_t2t(tokens):
    cost = minivit.create_model(
        "t2t",
        image_size=12,
        in_channels=2,
        num_classes=7,
        unfolds=((5, 2, 2), (3, 2, 1), (2, 1, 0)),  # 6, 3 and 2 a side
        tokens=tokens,
        token_dim=10,
        dim=24,
        depth=3,
        heads=4,
        mlp_ratio=1.5,
    ).cost()
    for name, count, inputs in (("attention1", 36, 5 * 5 * 2), ("attention2", 9, 3 * 3 * 10)):
        layers = {n: macs for n, macs in cost.layers.items() if n.startswith(f"tokens_to_token.{name}")}
        attention = 4 * count * 10 * 5 + count * 5 if tokens == "performer" else 2 * count**2 * 10
        assert sum(layers.values()) == attention + count * (5 * (inputs + 10) + inputs * 30 + 3 * 10 * 10)
    assert cost.layers["tokens_to_token.project"] == 4 * 2 * 2 * 10 * 24
    tail = {n: macs for n, macs in cost.layers.items() if not n.startswith("tokens_to_token")}
    assert sum(tail.values()) == 3 * vit_block(5, 24, 36) + 5 * 5 * 24 + 24 * 7


def test_overlapping_patches():
    cost = model_of("vit", heads=4, patch_stride=3, patch_padding=2).cost()  # (12 + 2·2 - 4) // 3 + 1 = 5 a side
    assert cost.layers["patch_embed"] == 25 * 2 * 4 * 4 * 24
    assert cost.layers["blocks.0.attn"] == 2 * 26**2 * 24


def test_products_of_ops():
    assert OPS["matmul"].cost((2, 3, 4), (4, 5)).macs == 2 * 3 * 4 * 5
    assert OPS["linear"].cost((2, 3, 4), (5, 4), (5,), None, "gelu").macs == 2 * 3 * 4 * 5
    assert OPS["channel_mixing"].cost((2, 3, 4), (6, 4), (6,), (5, 6), (5,), None, "none").macs == 2 * 3 * 6 * (4 + 5)
    assert OPS["token_mixing"].cost((2, 3, 4), (6, 3), (6,), (5, 6), (5,), None, "none").macs == 2 * 4 * 6 * (3 + 5)
    assert OPS["softmax"].cost((2, 3)).macs == OPS["gelu"].cost((2, 3), "none").macs == OPS["add"].cost((2, 3), (2, 3)).macs == 0


# The figures of 2012.12877, table 5 (tiny, small, base) and of timm's tables, in units of 10^9, to the decimals given there.
@pytest.mark.parametrize(
    "name, published",
    [
        ("vit_tiny_patch16_224", "1.3"),
        ("vit_small_patch16_224", "4.6"),
        ("vit_base_patch16_224", "17.6"),
        ("vit_base_patch32_224", "4.41"),
        ("vit_large_patch16_224", "61.60"),
        ("mixer_s32_224", "1.00"),
        ("mixer_s16_224", "3.79"),
        ("mixer_b32_224", "3.24"),
        ("mixer_b16_224", "12.62"),
        ("mixer_l32_224", "11.27"),
        ("mixer_l16_224", "44.60"),
    ],
)
def test_published_figures(name, published):
    total = minivit.create_model(name, init="zeros").cost().total
    assert f"{total / 1e9:.{len(published.split('.')[1])}f}" == published


# The figures of the authors' code for 2101.11986, which its table 2 has too; they count slightly otherwise.
@pytest.mark.parametrize(
    "name, published",
    [("7", 1.1), ("10", 1.5), ("12", 1.8), ("14", 4.8), ("19", 8.5), ("24", 13.8), ("t_14", 6.1), ("t_19", 9.8), ("t_24", 15.0)],
)
def test_published_figures_of_t2t(name, published):
    total = minivit.create_model(f"t2t_vit_{name}", init="zeros").cost().total
    assert abs(total / 1e9 - published) < max(0.06, 0.01 * published)


@pytest.mark.parametrize("family, options", [("vit", {"heads": 4}), ("mixer", {})])
def test_each_block_costs_the_same(family, options):
    one, two, three = (model_of(family, **options | {"depth": depth}).cost().total for depth in (1, 2, 3))
    assert 0 < three - two == two - one < one


@pytest.mark.parametrize("name", minivit.list_models())
def test_every_preset(name):
    cost = minivit.create_model(name, init="zeros").cost()
    assert cost.total == sum(cost.layers.values()) == cost.exits[-1]
    assert all(macs > 0 for macs in cost.layers.values())
    assert list(cost.exits) == sorted(set(cost.exits)) and cost.exits[0] > 0


# ------------------------------------------------------------------------------------------------------------------ cascades
def cascade(**options):
    given = {
        "image_size": 12,
        "in_channels": 2,
        "num_classes": 7,
        "patches": ((6, 6, 0), (4, 4, 0), (3, 3, 0)),
        "dim": 24,
        "depth": 2,
        "heads": 4,
        "init": "zeros",
    }
    return minivit.create_model("dvt", **given | options)


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("relationships", [False, True])
def test_reuse_costs(features, relationships):
    cost = cascade(feature_reuse=features, relationship_reuse=relationships).cost()
    extra = 48 if features else 0
    stages = [g**2 * 2 * (12 // g) ** 2 * 24 + 2 * vit_block(g**2 + 1, 24, 96) + (g**2 + 1) * 5 * 24 + 24 * 7 for g in (2, 3, 4)]
    for k, (u, g) in enumerate(((2, 3), (3, 4)), 1):
        if features:  # LN, 24 -> 128 -> 48 and S in both blocks, and the wider LN and fc1
            embedding = (u**2 + 1) * (5 * 24 + 24 * 128 + 128 * 48) + 2 * (2 * u) ** 2 * 48
            stages[k] += 2 * (embedding + (g**2 + 1) * extra * (5 + 96))
        if relationships:  # 8 -> 24 -> 8 for each pair of tokens, S on the rows and on the columns
            stages[k] += (u**2 + 1) ** 2 * 2 * 8 * 24 + 8 * 2 * (2 * u) ** 2 * ((u**2 + 1) + (g**2 + 1))
    assert cost.exits == (stages[0], stages[0] + stages[1], sum(stages))
    assert cost.total == sum(cost.layers.values())


def test_the_stage_of_a_layer_is_its_exit():
    cost = cascade().cost()
    for k in range(3):
        assert cost.exits[k] == sum(macs for name, macs in cost.layers.items() if int(name.split(".")[1]) <= k)


@pytest.mark.parametrize("backbone, mlp", [("mixer", "mlp_channels"), ("ff_only", "mlp1")])
def test_other_backbones(backbone, mlp):
    cost = cascade(backbone=backbone, relationship_reuse=False).cost()
    prefix = int(backbone == "ff_only")
    assert cost.layers[f"stages.1.blocks.0.{mlp}"] == (3**2 + prefix) * 96 * (24 + 48 + 24)
    assert cost.layers["stages.1.blocks.0.feature_reuse.1"] == (2**2 + prefix) * (24 * 128 + 128 * 48)
    assert len(cost.exits) == 3 and cost.total == sum(cost.layers.values())


def test_stages_of_other_sizes():
    cost = cascade(dim=(8, 16, 24), depth=(1, 2, 3), heads=(2, 4, 4)).cost()
    assert len([name for name in cost.layers if name.startswith("stages.2.blocks.") and name.endswith(".attn")]) == 3
    assert cost.layers["stages.1.relation_reuse"] == 5**2 * (2 * 6 + 6 * 8) + 8 * 2 * 4**2 * (5 + 10)


def test_dvt_deit_small():
    exits = minivit.create_model("dvt_deit_small", init="zeros").cost().exits
    assert [f"{macs / 1e9:.3f}" for macs in exits] == ["1.145", "3.656", "8.844"]


@pytest.mark.parametrize(
    "features, relationships, published",
    [
        (False, False, ["0.47", "1.37", "3.15"]),
        (True, False, ["0.47", "1.43", "3.31"]),
        (False, True, ["0.47", "1.41", "3.34"]),
        (True, True, ["0.47", "1.46", "3.50"]),
    ],
)
def test_dvt_t2t_vit_12(features, relationships, published):
    """2105.15075, table 6."""
    model = minivit.create_model("dvt_t2t_vit_12", init="zeros", feature_reuse=features, relationship_reuse=relationships)
    assert [f"{macs / 1e9:.2f}" for macs in model.cost().exits] == published


def test_dvt_t2t_vit_14():
    exits = minivit.create_model("dvt_t2t_vit_14", init="zeros").cost().exits
    assert [f"{macs / 1e9:.3f}" for macs in exits] == ["1.207", "3.841", "9.328"]


# ---------------------------------------------------------------------------------------------------------- changes nothing
@pytest.mark.parametrize("name", minivit.list_models("*_nano_*"))
def test_no_kernel_runs(name):
    model = minivit.create_model(name, image_size=8, in_channels=2)
    with record() as recording:
        model.cost()
    assert recording.calls == []
    with record() as recording:  # which notices kernels
        model(np.zeros((1, 2, 8, 8), np.float32))
    assert recording.calls


def test_the_model_stays_as_it_is():
    model = model_of("vit", heads=4, drop_path_rate=0.2, attn_drop_rate=0.1, proj_drop_rate=0.1)
    expected = model.cost()
    model.train()
    model.blocks[1].eval()
    modes = [m.training for m in model.modules()]
    state, weights = model.random.state.copy(), model.state_dict()
    assert model.cost() == expected  # evaluation mode's: dropout asks for products of its own
    assert [m.training for m in model.modules()] == modes and len(set(modes)) == 2
    assert (model.random.state == state).all()
    assert all((p.data == weights[n]).all() and p.requires_grad for n, p in model.named_parameters())
    assert is_grad_enabled() and model(np.zeros((1, 2, 12, 12))).requires_grad


def test_the_dtype_costs_nothing():
    assert model_of("mixer", dtype="float64").cost() == model_of("mixer", dtype="float32").cost()


def test_ops_run_again_after_a_mistake():
    class Broken(minivit.Module):
        def forward(self, x):
            raise UserError("broken")

    model = model_of("mixer").train()
    model.blocks[1] = Broken()
    with pytest.raises(UserError, match="broken"):
        model.cost()
    assert model.training and is_grad_enabled()
    assert (Tensor([1.0]) + Tensor([2.0])).item() == 3


def test_other_threads_compute():
    class Ignore:
        def op(self, op, inputs, outputs, constants):
            self.seen = op.name

    tracer, results = Ignore(), []
    with trace(tracer):
        thread = threading.Thread(target=lambda: results.append((Tensor([1.0]) + Tensor([2.0])).item()))
        thread.start()
        thread.join()
        assert (Tensor([[1.0]]) @ Tensor([[2.0]])).shape == (1, 1)
    assert results == [3] and tracer.seen == "matmul"


# --------------------------------------------------------------------------------------------------------------------- table
def test_layers_are_in_order_of_execution():
    names = [name.split(".")[0] for name in model_of("vit", heads=4).cost().layers]
    assert names == ["patch_embed"] + ["blocks"] * 3 * 6 + ["norm", "head"]


def test_a_shared_module_has_its_first_name():
    model = model_of("mixer")
    model.blocks[2] = model.blocks[0]
    cost = model.cost()
    assert cost.layers["blocks.0.mlp_tokens"] == 2 * cost.layers["blocks.1.mlp_tokens"]
    assert not any(name.startswith("blocks.2") for name in cost.layers)


def test_as_text():
    lines = str(ModelCost({"embed": 1_500_000, "": 500_000}, (1_500_000, 2_000_000), 9)).splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "layer multiply-adds share",
        "embed 1,500,000 75.0 %",
        "(the model itself) 500,000 25.0 %",
        "up to exit 1 1,500,000 75.0 %",
        "up to exit 2 2,000,000 100.0 %",
        "total 2,000,000 100.0 %",
    ]
    assert len(set(map(len, lines))) == 1
    assert "exit" not in str(ModelCost({"head": 5}, (5,), 9))
