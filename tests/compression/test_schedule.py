import pytest

from fedrobust.compression import cubic_sparsity, one_shot_sparsity


def test_sparsity_follows_the_cubic_at_hand_computed_steps():
    sparsity = cubic_sparsity(final=0.8, begin=10, end=30)
    assert sparsity(0) == sparsity(10) == 0.0
    assert sparsity(20) == pytest.approx(0.8 * (1 - 0.5**3))
    assert sparsity(30) == sparsity(1000) == 0.8


def test_sparsity_never_falls_and_holds_between_changes():
    sparsity = cubic_sparsity(final=0.5, initial=0.1, begin=3, end=20, every=4)
    values = [sparsity(step) for step in range(25)]
    assert values == sorted(values)
    assert values[0] == pytest.approx(0.1) and values[19] < values[20] == values[-1] == 0.5
    assert values[3:7] == [pytest.approx(0.1)] * 4 and values[7] == values[10] > values[6]


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ({"final": 1.0}, "final"),
        ({"final": -0.1}, "final"),
        ({"final": 0.5, "initial": 0.6}, "initial"),
        ({"final": 0.5, "end": 0}, "end"),
        ({"final": 0.5, "begin": -1}, "begin"),
        ({"final": 0.5, "every": 0}, "every"),
    ],
)
def test_settings_out_of_range_are_named_in_one_line(setting, name):
    with pytest.raises(ValueError, match=rf"^{name} is .*must be .*$"):
        cubic_sparsity(**{"begin": 0, "end": 10, **setting})


def test_one_shot_jumps_once():
    sparsity = one_shot_sparsity(final=0.75, begin=4)
    assert [sparsity(step) for step in (0, 3, 4, 5, 1000)] == [0.0, 0.0, 0.75, 0.75, 0.75]
    assert one_shot_sparsity(final=0.5, begin=0)(0) == 0.5


@pytest.mark.parametrize(("setting", "name"), [({"final": 1.0}, "final"), ({"begin": -1}, "begin")])
def test_a_one_shot_out_of_range_is_named_in_one_line(setting, name):
    with pytest.raises(ValueError, match=rf"^{name} is .*must be .*$"):
        one_shot_sparsity(**{"final": 0.5, "begin": 0, **setting})
