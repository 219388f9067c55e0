"""The best shift of a threshold, by hand."""

import pytest

from fedrobust.evaluation import best_shift


@pytest.mark.parametrize(
    ("margins", "label", "expected"),
    [
        ([[-3.0, -2.0, -1.0, -0.5]], [0, 0, 1, 1], 1.5),
        ([[4.0, 3.0, 0.5, 1.0]], [1, 1, 0, 0], -2.0),
        ([[1.0, 2.0, -1.0, -2.0, -3.0]], [1, 0, 0, 0, 0], 0.0),  # classes weigh alike, however many there are
        ([[-3.0, 1.0], [-5.0, -2.0]], [0, 1], 2.5),  # the first is parted on (-1, 3), the second on (2, 5)
    ],
)
def test_it_lies_in_the_middle_of_the_best_stretch(margins, label, expected):
    assert best_shift(margins, label) == expected


@pytest.mark.parametrize(
    ("margins", "label", "message"),
    [
        ([], [0, 1], "the number of margins is 0"),
        ([[1.0, 2.0, 3.0]], [0, 1], "the shapes of margins is"),
        ([[1.0, 2.0], [1.0]], [0, 1], "the shapes of margins is"),
        ([[1.0, float("nan")]], [0, 1], "margins is"),
        ([[1.0, 2.0]], [1, 1], "label is"),
    ],
)
def test_what_it_cannot_be_told_is_one_line(margins, label, message):
    with pytest.raises(ValueError, match=f"^{message}[^\\n]*$"):
        best_shift(margins, label)
