"""Keeps what a model wrote from being evaluated: a few reasoning-gym scorers call `eval` or sympy's parser on it."""

import ast
import importlib
import re

_LITERALS = ("algorithmic.binary_matrix", "algorithmic.spiral_matrix", "algorithmic.string_insertion", "games.n_queens")
_ARITHMETIC = re.compile(r"(?:[\d\s+\-/().]|(?<!\*)\*(?!\*))*")  # no `**`: a tower of powers never ends
_FORMULA = re.compile(r"[\w\s+\-*/^().,=]*", re.ASCII)  # no quotes, brackets or attributes to call anything with
_NAMES = frozenset({"sin", "cos", "tan", "asin", "acos", "atan", "exp", "log", "sqrt", "pi", "Integral"})
_PARSED = {
    "countdown": _ARITHMETIC,
    "puzzle24": _ARITHMETIC,
    "intermediate_integration": _FORMULA,
    "polynomial_multiplication": _FORMULA,
    "simple_integration": _FORMULA,
}


def harmless(dataset: str, text: str) -> bool:
    """Whether `text` may reach the scorer of `dataset`: for those that parse it as code, only plain mathematics may."""
    if dataset not in _PARSED:
        return True
    names = re.findall(r"[^\W\d]\w*", text)
    return bool(_PARSED[dataset].fullmatch(text)) and all(len(name) == 1 or name in _NAMES for name in names)


def literals_only() -> None:
    """Make `eval` mean `ast.literal_eval` in the modules whose scorers use it to read a list."""
    for name in _LITERALS:
        vars(importlib.import_module(f"reasoning_gym.{name}"))["eval"] = ast.literal_eval
