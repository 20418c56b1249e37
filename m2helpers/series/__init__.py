"""A user's own table, in and out: `cells` cuts a file up, `roles` says what each column is, `times` how time goes on,
`table` checks and keeps it, `writing` puts forecasts into a file."""

from .table import History, Table, read_series, read_table, table_of

__all__ = ["History", "Table", "read_series", "read_table", "table_of"]
