"""The ledger: every published system that the library implements, with source, place, status and test."""

from .record import System
from .shelves import Shelf, shelves

__all__ = ["Shelf", "System", "shelves"]
