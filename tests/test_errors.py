import pickle

from minivit.errors import UserError, listed, nearest, reason, shown


def test_nearest_names_best_first():
    assert nearest("vit_tiny", ["mixer_tiny", "vit_tiny_patch4", "resnet"]).startswith(" (nearest: vit_tiny_patch4")
    assert nearest("CIFAR-10", ["digits", "cifar10", "cifar100"]) == " (nearest: cifar10, cifar100)"


def test_nearest_says_nothing_where_nothing_is_near():
    assert nearest("zebra", ["cifar10"]) == ""


def test_a_message_is_one_printable_line():
    assert str(UserError("cannot read a\nb\x1b[31m\udce9: Größe 8×8 · ok")) == r"cannot read a\nb\x1b[31m\udce9: Größe 8×8 · ok"
    assert str(pickle.loads(pickle.dumps(UserError("a\tb")))) == r"a\tb"


def test_a_long_message_keeps_its_beginning_and_its_end():
    line = str(UserError(f"weights do not fit: {'a' * 1000}: give others"))
    assert len(line) == 300 and line.startswith("weights do not fit: aaa") and " ... aaa" in line and line.endswith("aaa: give others")
    assert str(UserError("a" * 300)) == "a" * 300


def test_the_reason_of_an_error_is_one_short_line():
    assert reason(OSError(28, "No space left on device", "/a/path")) == "No space left on device"
    assert reason(ValueError("one\n  two")) == "one two" and reason(ValueError()) == "ValueError"
    assert len(reason(ValueError("a" * 1000))) == 150


def test_values_are_shown_short():
    assert shown("abc") == "'abc'" and shown((1, 2.5, None)) == "(1, 2.5, None)"
    deep = value = []
    for _ in range(100_000):
        value.append(value := [])
    for long in ("x" * 1000, [*range(1000)], 10**1000, 10**10_000, deep, {"a": deep}):
        assert len(shown(long)) < 100


def test_of_many_names_the_first_are_listed():
    assert listed("abcd") == "a, b, c, d" and listed("abcdef") == "a, b, c, and 3 more" and listed([]) == ""


def test_user_error_is_a_value_error():
    assert issubclass(UserError, ValueError)
