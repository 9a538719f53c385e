import pickle

from minivit.errors import UserError, nearest, reason


def test_nearest_names_best_first():
    assert nearest("vit_tiny", ["mixer_tiny", "vit_tiny_patch4", "resnet"]).startswith(" (nearest: vit_tiny_patch4")
    assert nearest("CIFAR-10", ["digits", "cifar10", "cifar100"]) == " (nearest: cifar10, cifar100)"


def test_nearest_says_nothing_where_nothing_is_near():
    assert nearest("zebra", ["cifar10"]) == ""


def test_a_message_is_one_printable_line():
    assert str(UserError("cannot read a\nb\x1b[31m\udce9: Größe 8×8 · ok")) == r"cannot read a\nb\x1b[31m\udce9: Größe 8×8 · ok"
    assert str(pickle.loads(pickle.dumps(UserError("a\tb")))) == r"a\tb"


def test_a_long_message_keeps_its_beginning_and_its_end():
    line = str(UserError(f"cannot read {'a' * 4000}: fetch it again"))
    assert len(line) <= 300 and line.startswith("cannot read aaa") and " ... " in line and line.endswith("aaa: fetch it again")
    assert str(UserError("a" * 300)) == "a" * 300


def test_the_reason_of_an_error_is_one_short_line():
    assert reason(OSError(28, "No space left on device", "/a/path")) == "No space left on device"
    assert reason(ValueError("one\n  two")) == "one two" and reason(ValueError()) == "ValueError"
    assert len(reason(ValueError("a" * 1000))) == 150


def test_user_error_is_a_value_error():
    assert issubclass(UserError, ValueError)
