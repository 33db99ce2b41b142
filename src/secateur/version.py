"""The version of Secateur, in the one place from which the package, its metadata and every record take it."""

__version__ = "0.1.0"
