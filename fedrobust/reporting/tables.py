"""One table, three ways to print it: a line per combination, a mean over seeds per cell."""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich import box
from rich.table import Table as RichTable

from fedrobust import intervals
from fedrobust.reporting import summary
from fedrobust.reporting.rows import Row
from fedrobust.reporting.summary import Spread, by_combination, spread

NOTHING = "–"
MARK = "†"
TOO_HIGH = "‡"


class Table(NamedTuple):
    """A table as text.

    Attributes:
        header: for every column the group it belongs to ("" for none) and its own name.
        lines: a cell per column.
        notes: sentences to print below: units, what was attacked and poisoned, which models are degenerate.
        num_labels: how many of the first columns say what a line is; the others hold its figures.
    """

    header: list[tuple[str, str]]
    lines: list[list[str]]
    notes: list[str]
    num_labels: int


class _Column(NamedTuple):
    group: str
    name: str
    cell: Callable[[Sequence[Row]], str]


def table(rows: Sequence[Row]) -> Table:
    """Summarizes the rows of one study.

    Args:
        rows: `Row`s, any number of seeds for each combination.

    Returns:
        `Table`. Accuracies and AUC in percent, mean ± sample standard deviation over seeds; under attack the lowest of
        all attacks at that radius; sizes over the dense model's; a model that predicts one class carries a mark and is
        named in a note.
    """
    groups = by_combination(rows)
    columns = [*_clean_columns(), *_robust_columns(rows), *_poisoned_columns(rows), *_cost_columns()]
    lines = [
        [*("✓" if on else "" for on in combination), *(column.cell(group) for column in columns)]
        for combination, group in groups.items()
    ]
    header = [("", "DP"), ("", "AT"), ("", "MC"), *((column.group, column.name) for column in columns)]
    return Table(header, lines, _notes(rows), num_labels=3)


def markdown(table: Table) -> str:
    """A table in Markdown, its notes below; labels are centred, figures stand right."""
    header, lines, notes, num_labels = table
    align = [":-:"] * num_labels + ["--:"] * (len(header) - num_labels)
    names = [f"{group} {name}".strip() for group, name in header]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in [names, align, *lines])
    return text + "\n\n" + "\n".join(f"- {note}" for note in notes) + "\n"


def latex(table: Table) -> str:
    """A table in LaTeX, for `booktabs` and `amssymb`, its notes below; columns as in `markdown`."""
    header, lines, notes, num_labels = table
    body = [" & ".join(map(_latex, cells)) + r" \\" for cells in lines]
    return "\n".join(
        [
            r"\begin{tabular}{" + "c" * num_labels + "r" * (len(header) - num_labels) + "}",
            r"\toprule",
            *_latex_groups([group for group, _ in header]),
            " & ".join(_latex(name) for _, name in header) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            *(r"\par\smallskip{\footnotesize " + _latex(note) + "}" for note in notes),
            "",
        ]
    )


def screen(table: Table) -> RichTable:
    """A table for a terminal, lines with a mark in red; columns as in `markdown`."""
    header, lines, notes, num_labels = table
    shown = RichTable(box=box.SIMPLE_HEAD, show_edge=False, padding=0, caption="\n".join(notes), caption_justify="left")
    for index, (group, name) in enumerate(header):
        shown.add_column(f"{group} {name}".strip(), justify="center" if index < num_labels else "right")
    for cells in lines:
        tight = (cell.replace(" ± ", "±") for cell in cells)
        shown.add_row(*tight, style="red" if any(MARK in cell for cell in cells) else "")
    return shown


def _clean_columns() -> list[_Column]:
    def accuracy(group: Sequence[Row]) -> str:
        mark = MARK if any(map(summary.is_degenerate, group)) else ""
        return percent(spread(group, summary.clean_figure("accuracy"))) + mark

    return [
        _Column("clean", "acc", accuracy),
        _Column("clean", "bal", lambda group: percent(spread(group, summary.clean_figure("balanced_accuracy")))),
        _Column("clean", "AUC", lambda group: percent(spread(group, summary.clean_figure("auc")))),
    ]


def _robust_columns(rows: Sequence[Row]) -> list[_Column]:
    """For each norm: the largest radius with its balanced accuracy, then the other radii downwards."""

    def column(norm: str, eps: float, field: str) -> _Column:
        def cell(group: Sequence[Row]) -> str:
            value = spread(group, summary.robust_figure(norm, eps, field))
            return percent(value) + TOO_HIGH * bool(value and any(map(summary.failed_checks, group)))

        name = {"accuracy": "acc", "balanced_accuracy": "bal"}[field]
        return _Column(f"{summary.norm_text(norm)} {summary.radius_text(norm, eps)}", name, cell)

    cases = summary.radii(rows)
    columns = []
    for norm in dict.fromkeys(norm for norm, _ in cases):
        radii = [eps for name, eps in reversed(cases) if name == norm]
        columns += [column(norm, radii[0], "accuracy"), column(norm, radii[0], "balanced_accuracy")]
        columns += [column(norm, eps, "accuracy") for eps in radii[1:]]
    return columns


def _poisoned_columns(rows: Sequence[Row]) -> list[_Column]:
    def column(name: str, rule: str | None) -> _Column:
        def cell(group: Sequence[Row]) -> str:
            return percent(spread(group, lambda row: ((row["poisoned"] or {}).get(rule) or {}).get("accuracy")))

        return _Column("poison", name, cell)

    rules = list(dict.fromkeys(summary.robust_rule(row) for row in rows if row["poisoned"]))
    names = ["rule"] if len(rules) == 1 else [f"rule {number}" for number in range(1, len(rules) + 1)]
    return [column("mean", "mean"), *map(column, names, rules)] if rules else []


def _cost_columns() -> list[_Column]:
    def ratio(field: str) -> Callable[[Sequence[Row]], str]:
        def cell(group: Sequence[Row]) -> str:
            value = spread(group, lambda row: row["size"][field])
            return summary.ratio_text(value.mean) if value else NOTHING

        return cell

    def epsilon(group: Sequence[Row]) -> str:
        spent = [row["privacy"]["epsilon"] for row in group if row["privacy"]]
        return intervals.upper_text(max(spent), 3) if spent else NOTHING

    return [
        _Column("size", "params", ratio("parameters_ratio")),
        _Column("size", "bytes", ratio("bytes_ratio")),
        _Column("", "ε", epsilon),
    ]


def _notes(rows: Sequence[Row]) -> list[str]:
    notes = [
        "acc, bal: accuracy and its mean over classes, in %, mean over seeds (± standard deviation); L∞, L2: the lowest"
        " over all attacks at that radius. size: over the dense float32 model's."
    ]
    notes += ["Accuracies on the validation split."] * (summary.split_name(rows) == "validation")
    poisonings = dict.fromkeys(
        f"{100 * row['poisoned']['malicious_share']:.3g} % malicious clients ({_words(row['poisoned']['attack'])}), by"
        f" mean and by {_words(summary.robust_rule(row))} (rule)"
        + (
            f", stopped after {row['poisoned']['rounds_share']:.0%} of the rounds"
            * (row["poisoned"]["rounds_share"] < 1)
        )
        for row in rows
        if row["poisoned"]
    )
    notes += [f"poison: accuracy after training with {text}." for text in poisonings]
    privacies = dict.fromkeys(
        f"δ = {row['privacy']['delta']:.2g}, {row['privacy']['unit']} level, {row['privacy']['relation']},"
        f" {row['privacy']['sampling']} sampling"
        for row in rows
        if row["privacy"]
    )
    notes += [f"ε: at {text}." for text in privacies]
    alone = [row for row in rows if row["robust"] and not summary.is_whole_gate(row)]
    notes += ["Checks: of outputs, gradients and samples; no other attack asked (--attack.gate-examples)."] * bool(
        alone
    )
    degenerate = [
        f"{combination.label} (seed {row['seed']})"
        for combination, group in by_combination(rows).items()
        for row in group
        if summary.is_degenerate(row)
    ]
    notes += [f"{MARK} Degenerate, one class for every image: {', '.join(degenerate)}."] * bool(degenerate)
    overestimated = [
        f"{combination.label} (seed {row['seed']}: {', '.join(map(_words, summary.failed_checks(row)))})"
        for combination, group in by_combination(rows).items()
        for row in group
        if summary.failed_checks(row)
    ]
    return notes + [f"{TOO_HIGH} Overestimated, by checks that failed: {'; '.join(overestimated)}."] * bool(
        overestimated
    )


def percent(value: Spread | None) -> str:
    """A share in percent, with its standard deviation where there is one."""
    if value is None:
        return NOTHING
    return f"{100 * value.mean:.1f}" + (f" ± {100 * value.std:.1f}" if value.std is not None else "")


def _words(name: str | None) -> str:
    return (name or "no").replace("_", " ")


def _latex_groups(groups: Sequence[str]) -> list[str]:
    """The line of group names above the header, each over a rule as wide as its columns; none where none has a name."""
    names, rules, start = [], [], 1
    if not any(groups):
        return []
    for group, members in itertools.groupby(groups):
        width = len(list(members))
        names.append(rf"\multicolumn{{{width}}}{{c}}{{{_latex(group)}}}")
        rules += [rf"\cmidrule(lr){{{start}-{start + width - 1}}}"] * bool(group)
        start += width
    return [" & ".join(names) + r" \\", " ".join(rules)]


def _latex(text: str) -> str:
    special: dict[str, str | int | None] = {
        "✓": r"\checkmark",
        "±": r"$\pm$",
        "ε": r"$\varepsilon$",
        "δ": r"$\delta$",
        "σ": r"$\sigma$",
        "∞": r"$\infty$",
        MARK: r"$^\dagger$",
        TOO_HIGH: r"$^\ddagger$",
        NOTHING: "--",
        "%": r"\%",
        "_": r"\_",
        "&": r"\&",
        "#": r"\#",
    }
    return text.translate(str.maketrans(special)).replace(r"L$\infty$", r"L$_\infty$")
