"""The ledger: every number of every run, one SQL query away in ``$PROSPARSE_HOME/ledger.duckdb``.

The only package that knows duckdb, and it imports it on first use.
"""

from prosparse_core.ledger.examples import EXAMPLES
from prosparse_core.ledger.ledger import Ledger
from prosparse_core.ledger.table import Table

__all__ = ["EXAMPLES", "Ledger", "Table"]
