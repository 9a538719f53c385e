import pickle

from minivit.errors import UserError, nearest


def test_nearest_names_best_first():
    assert nearest("vit_tiny", ["mixer_tiny", "vit_tiny_patch4", "resnet"]).startswith(" (nearest: vit_tiny_patch4")
    assert nearest("CIFAR-10", ["digits", "cifar10", "cifar100"]) == " (nearest: cifar10, cifar100)"


def test_nearest_says_nothing_where_nothing_is_near():
    assert nearest("zebra", ["cifar10"]) == ""


def test_a_message_is_one_printable_line():
    assert str(UserError("cannot read a\nb\x1b[31m\udce9: Größe 8×8 · ok")) == r"cannot read a\nb\x1b[31m\udce9: Größe 8×8 · ok"
    assert str(pickle.loads(pickle.dumps(UserError("a\tb")))) == r"a\tb"


def test_user_error_is_a_value_error():
    assert issubclass(UserError, ValueError)
