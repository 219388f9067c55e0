"""Laws of tables, against one written by hand."""

import pytest
from rich.console import Console

from fedrobust.reporting import latex, markdown, screen, table

GOLDEN = """\
| DP | AT | MC | clean acc | clean bal | clean AUC | L∞ 8/255 acc | L∞ 8/255 bal | L∞ 4/255 acc | L∞ 2/255 acc | poison mean | poison rule | size params | size bytes | ε |
| :-: | :-: | :-: | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: |
|  |  |  | 95.0 | 93.0 | 97.0 | 55.0 | 53.0 | 75.0 | 85.0 | 50.0 | 93.0 | 1 | 1 | – |
|  |  | ✓ | 94.0 | 92.0 | 96.0 | 54.0 | 52.0 | 74.0 | 84.0 | 50.0 | 92.0 | 1/4.2 | 1/14 | – |
|  | ✓ |  | 90.0 | 88.0 | 92.0 | 80.0 | 78.0 | 85.0 | 87.5 | 50.0 | 88.0 | 1 | 1 | – |
|  | ✓ | ✓ | 89.0 | 87.0 | 91.0 | 79.0 | 77.0 | 84.0 | 86.5 | 50.0 | 87.0 | 1/4.2 | 1/14 | – |
| ✓ |  |  | 91.0 | 89.0 | 93.0 | 31.0 | 29.0 | 61.0 | 76.0 | 50.0 | 89.0 | 1 | 1 | 7.98 |
| ✓ |  | ✓ | 90.0 | 88.0 | 92.0 | 30.0 | 28.0 | 60.0 | 75.0 | 50.0 | 88.0 | 1/4.2 | 1/14 | 7.98 |
| ✓ | ✓ |  | 86.0† | 84.0 | 88.0 | 71.0 | 69.0 | 78.5 | 82.2 | 50.0 | 84.0 | 1 | 1 | 7.98 |
| ✓ | ✓ | ✓ | 85.0 | 83.0 | 87.0 | 70.0 | 68.0 | 77.5 | 81.2 | 50.0 | 83.0 | 1/4.2 | 1/14 | 7.98 |

- acc, bal: accuracy and its mean over classes, in %, mean over seeds (± standard deviation); L∞, L2: the lowest over all attacks at that radius. size: over the dense float32 model's.
- poison: accuracy after training with 20 % malicious clients (sign flip), by mean and by trimmed mean (rule).
- ε: at δ = 0.0001, record level, add-remove, Poisson sampling.
- Checks: of outputs, gradients and samples; no other attack asked (--attack.gate-examples).
- † Degenerate, one class for every image: DP + AT (seed 0).
"""  # noqa: E501


def test_markdown_is_the_table_written_by_hand(study):
    assert markdown(table(study())) == GOLDEN


def test_order_of_rows_does_not_matter(study):
    assert markdown(table(study()[::-1])) == GOLDEN


def test_several_seeds_show_mean_and_sample_standard_deviation(study):
    lines = table(study(3)).lines
    assert lines[0][3] == "96.0 ± 1.0"
    assert lines[6][3] == "87.0 ± 1.0†"
    assert table(study(3)).notes[-1].endswith("DP + AT (seed 0), DP + AT (seed 1), DP + AT (seed 2).")


def test_epsilon_is_the_largest_of_the_seeds_and_never_less_than_it_is(study):
    rows = study(3)
    for row, spent in zip((row for row in rows if row["privacy"]), (7.98, 7.9912, 7.9), strict=False):
        row["privacy"]["epsilon"] = spent
    assert [line[-1] for line in table(rows).lines] == ["–"] * 4 + ["8", *["7.98"] * 3]


def test_what_was_not_measured_is_a_dash_and_unused_columns_go(study):
    rows = [row | {"poisoned": None, "privacy": None} for row in study()]
    rows[0]["clean"]["auc"] = None
    rows[0]["robust"] = {}
    header, lines, notes, _ = table(rows)
    assert not any(group == "poison" for group, _ in header)
    assert lines[0][5:10] == ["–"] * 5 and {line[-1] for line in lines} == {"–"}
    assert len(notes) == 3


def test_rows_that_no_other_attack_asked_about_are_said_to_be_so(study):
    rows = study()
    note = "Checks: of outputs, gradients and samples; no other attack asked (--attack.gate-examples)."
    assert note in table(rows).notes
    for row in rows[:-1]:
        row["checks"] = [{"check": "auto_pgd_finds_no_more", "outcome": "passed", "figure": 0.0, "limit": 0.02}]
    assert note in table(rows).notes
    rows[-1]["robust"] = {}
    assert note not in table(rows).notes


def test_a_failed_check_calls_the_robust_accuracies_overestimated(study):
    rows = study()
    failed = {"check": "noise_finds_no_more", "outcome": "failed", "figure": 0.1, "limit": 0.002, "detail": ""}
    rows[2]["checks"] += [failed, failed]
    _, lines, notes, _ = table(rows)
    assert lines[2][6:10] == ["80.0‡", "78.0‡", "85.0‡", "87.5‡"]
    assert not any("‡" in cell for line in (*lines[:2], *lines[3:], lines[2][:6]) for cell in line)
    assert notes[-1] == "‡ Overestimated, by checks that failed: AT (seed 0: noise finds no more)."
    assert r"80.0$^\ddagger$" in latex(table(rows))


def test_several_norms_each_have_their_largest_radius_first(study):
    (row, *_) = study()
    row["robust"] |= {
        f"pgd20_l2_{e}": row["robust"]["pgd20_linf_0.031"] | {"norm": "l2", "eps": e} for e in (0.5, 0.25)
    }
    groups = list(dict.fromkeys(group for group, _ in table([row]).header))
    assert groups == ["", "clean", "L∞ 8/255", "L∞ 4/255", "L∞ 2/255", "L2 0.5", "L2 0.25", "poison", "size"]


def test_latex_is_balanced_and_plain_ascii(study):
    text = latex(table(study(2)))
    assert text.isascii()
    widths = {line.count("&") for line in text.splitlines() if line.endswith(r"\\") and "multicolumn" not in line}
    assert widths == {14}
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 1
    assert all(rule in text for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\cmidrule(lr){4-6}"))
    assert r"86.5 $\pm$ 0.7$^\dagger$" in text and r"20 \% malicious" in text


@pytest.mark.parametrize("width", [100, 160])
def test_terminal_shows_every_cell_of_one_seed(study, width):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(screen(table(study())))
    console.file.close()
    text = console.export_text()
    assert "…" not in text
    for line in table(study()).lines:
        assert any(all(cell in printed for cell in line) for printed in text.splitlines())
