"""Errors that a user can cause and mend."""

import difflib
import importlib
import itertools
import math
from collections.abc import Collection, Iterable
from numbers import Integral, Real
from types import ModuleType

_LONGEST_WORD = 100
_MOST_WORDS = 1_000


class UserError(ValueError):
    """Something the user can mend. The message is one line: what is wrong, where, and what to do."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A phrase that names the known word nearest to `name`, or the empty string where none is near."""
    # Of what a hostile file holds, comparing could take hours.
    if len(name) > _LONGEST_WORD:
        return ""
    near = (word for word in known if len(word) <= _LONGEST_WORD)
    matches = difflib.get_close_matches(name, itertools.islice(near, _MOST_WORDS), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def check_word(name: str, word: object, known: Collection[str]) -> None:
    """Refuse a word that is none of those that an option can have.

    Raises:
        UserError: it names the option, and the nearest of the words.
    """
    if word not in known:
        raise UserError(f"{name}={word!r}{nearest(str(word), known)}; there are {', '.join(known)}")


def check_number(name: str, given: object) -> None:
    """Refuse what is no real number, such as text, None, a truth value or NaN.

    Raises:
        UserError: it names the argument.
    """
    if isinstance(given, bool) or not isinstance(given, Real) or math.isnan(given):
        raise UserError(f"{name}={given!r}: give a number")


def check_whole(name: str, given: object, least: int) -> None:
    """Refuse what is no whole number, or one below the least.

    Raises:
        UserError: it names the argument.
    """
    if isinstance(given, bool) or not isinstance(given, Integral) or given < least:
        raise UserError(f"{name}={given!r}: give a whole number of {least} or more")


def require(module: str, extra: str) -> ModuleType:
    """Import `module`; where it is not installed, name the extra that brings it.

    Raises:
        UserError: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise UserError(f"{module} is not installed: pip install 'bitswitch[{extra}]'") from error
