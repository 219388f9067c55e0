"""From rows to what people read: files, tables, figures. No JAX here."""

from fedrobust.reporting.plots import accuracy_against_radius, trade_off, training_curves
from fedrobust.reporting.rows import Combination, Row, append, config_hash, read, validate
from fedrobust.reporting.tables import Table, table, to_latex, to_markdown, to_rich

__all__ = [
    "Combination",
    "Row",
    "Table",
    "accuracy_against_radius",
    "append",
    "config_hash",
    "read",
    "table",
    "to_latex",
    "to_markdown",
    "to_rich",
    "trade_off",
    "training_curves",
    "validate",
]
