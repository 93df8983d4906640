"""The command line: parse, call one function, print. Each verb imports what it needs only when it runs."""

from mobillama.cli.main import main

__all__ = ["main"]
