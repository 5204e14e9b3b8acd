"""What to measure next, decided from the journal alone: a search never measures."""

from kvat_core.search._base import Allowance, Search
from kvat_core.search._find import find_search
from kvat_core.search._grid import Grid
from kvat_core.search._optuna import Optuna
from kvat_core.search._race import Race
from kvat_core.search._rationed import Rationed
from kvat_core.search._vetted import Vetted

__all__ = ["Allowance", "Grid", "Optuna", "Race", "Rationed", "Search", "Vetted", "find_search"]
