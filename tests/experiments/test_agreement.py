"""The table of AutoAttack beside torch's: counted by hand."""

from experiments.bench import agreement


def _row(side: str, member: str, seed: int, standing: list[int]) -> dict[str, object]:
    return {
        "model": "at", "side": side, "member": member, "seed": seed,
        "num_images": 10, "num_right": 8, "standing": standing,
    }  # fmt: skip


def test_members_alone_and_together_over_seeds() -> None:
    rows = [
        _row("fedrobust", "apgd_ce", 0, [0, 1, 2, 3]),
        _row("fedrobust", "apgd_ce", 1, [0, 1, 2]),
        _row("fedrobust", "fab_t", 0, [1, 2, 3, 4, 5]),
        _row("torchattacks", "apgd_ce", 0, [7]),
    ]
    lines = {line[1]: line[2:] for line in agreement.table(rows).lines}
    assert lines == {
        "apgd_ce": ["35.00 (30.00 to 40.00, 2)", "10.00", "–"],
        "fab_t": ["50.00", "–", "–"],
        # seed 0: images 1, 2, 3; seed 1, with the one run of fab_t: 1, 2
        "together": ["25.00 (20.00 to 30.00, 2)", "10.00", "–"],
    }


def test_the_note_gives_clean_accuracy() -> None:
    [note] = agreement.table([_row("fedrobust", "apgd_ce", 0, [])]).notes
    assert "clean: at 80.00" in note
