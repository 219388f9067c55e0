"""From rows to what people read: files, tables, figures. No JAX here."""

from fedrobust.reporting.curve import POINT_FIELDS, auc_against_epsilon, epsilon_table
from fedrobust.reporting.effects import effects_table
from fedrobust.reporting.plots import accuracy_against_radius, trade_off, training_curves
from fedrobust.reporting.rows import FIELDS, Combination, Row, append, config_hash, read, validate
from fedrobust.reporting.tables import Table, latex, markdown, screen, table
from fedrobust.reporting.uplink import UPLINK_FIELDS, accuracy_against_uplink, uplink_table

__all__ = [
    "FIELDS",
    "POINT_FIELDS",
    "UPLINK_FIELDS",
    "Combination",
    "Row",
    "Table",
    "accuracy_against_radius",
    "accuracy_against_uplink",
    "append",
    "auc_against_epsilon",
    "config_hash",
    "effects_table",
    "epsilon_table",
    "latex",
    "markdown",
    "read",
    "screen",
    "table",
    "trade_off",
    "training_curves",
    "uplink_table",
    "validate",
]
