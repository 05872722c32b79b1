"""Docstrings of installed packages as question and answer: real text that every machine already has.

One public object is one row: the user asks what a dotted name does, the assistant answers with the first paragraphs
of its documentation. The order is by name, the wording of a question follows from a hash of the name, and nothing
depends on the clock, on addresses or on the order of imports, so the same installation gives the same rows.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import inspect
import io
import pkgutil
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

ANSWER_CHARACTERS = 480  # about 110 tokens of English: a short answer, and a bounded training sequence
SHORTEST_ANSWER = 24
QUESTIONS = (
    "What does `{name}` do?",
    "Explain `{name}`.",
    "How do I use `{name}` in Python?",
    "Tell me about `{name}`.",
    "What is `{name}` for?",
)
# Modules whose import acts (opens a browser, prints, needs a display) or that hold tests and tools, not an API.
_NEVER_IMPORT = frozenset(
    {"antigravity", "this", "idlelib", "turtledemo", "turtle", "lib2to3", "tkinter", "ensurepip", "test"}
)
_NOT_API = re.compile(
    r"(^|\.)(_|tests?$|testing$|conftest$|setup$|examples?$|distutils$|f2py$|ctypeslib$|typing$|core\.)"
)
_SIGNATURE = re.compile(r"^[\w.]+\(.*?\)(\s*->[^\n]*)?$", re.S)
_RULE = re.compile(r"^\s*[-=~^*]{3,}\s*$", re.M)


@dataclass
class Harvest:
    """Rows and what was left out, so that a shrinking dataset is seen and not guessed at."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    failed_imports: list[str] = field(default_factory=list)


def read_python_docs(packages: list[str], stdlib: bool = False) -> Harvest:
    """Harvest `packages` (import names) and, on request, the standard library. Ordered by dotted name."""
    harvest = Harvest()
    found: dict[str, str] = {}
    for root in sorted(set(packages)):
        harvest.versions[root] = _version(root)
        for module in _modules(root, harvest):
            found.update(_documented(module, root))
    if stdlib:
        harvest.versions["python"] = ".".join(map(str, sys.version_info[:3]))
        for name in sorted(sys.stdlib_module_names):
            if name in _NEVER_IMPORT or _NOT_API.search(name):
                continue
            imported = _import(name, harvest)
            if imported is not None:
                found.update(_documented(imported, name))
    for name, doc in sorted(_shortest_name_per_doc(found).items()):
        harvest.rows.append(make_row(name, doc))
    return harvest


def make_row(name: str, answer: str) -> dict[str, Any]:
    """One training row. The question's wording is drawn by a hash of the name: varied, and always the same."""
    pick = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % len(QUESTIONS)
    question = QUESTIONS[pick].format(name=name)
    return {"id": name, "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def summarize(doc: str, characters: int = ANSWER_CHARACTERS) -> str:
    """The first paragraphs of a docstring that fit, without signature lines and section headings ('' when none do)."""
    kept: list[str] = []
    used = 0
    for block in re.split(r"\n\s*\n", doc.strip()):
        if _RULE.search(block) or block.lstrip().startswith((">>>", "..", ":")):
            break
        paragraph = block.rstrip()
        if not kept and _SIGNATURE.match(paragraph):
            continue
        if used + len(paragraph) > characters:
            break
        kept.append(paragraph)
        used += len(paragraph) + 2
    if not kept:
        return ""
    text = "\n\n".join(kept)
    first, _, rest = text.partition("\n")
    return rest.strip() if rest.strip() and _SIGNATURE.match(first) else text


def _documented(module: ModuleType, root: str) -> Iterator[tuple[str, str]]:
    """(dotted name, answer) for the module's public classes, their own public methods, and functions."""
    for name, member in _members(module):
        owner = getattr(member, "__module__", None) or module.__name__
        if not isinstance(owner, str) or (owner.split(".")[0].lstrip("_") != root.lstrip("_") and owner != "builtins"):
            continue
        if owner == "builtins" and module.__name__ != "builtins" and not inspect.isbuiltin(member):
            continue
        path = f"{module.__name__}.{name}" if module.__name__ != "builtins" else name
        yield from _answer(path, member)
        if inspect.isclass(member):
            for attribute, value in sorted(vars(member).items()):
                if not attribute.startswith("_") and (
                    callable(value) or isinstance(value, (classmethod, staticmethod))
                ):
                    yield from _answer(f"{path}.{attribute}", getattr(member, attribute, None))


def _members(module: ModuleType) -> list[tuple[str, Any]]:
    names = [n for n in getattr(module, "__all__", dir(module)) if isinstance(n, str) and not n.startswith("_")]
    found = []
    for name in sorted(set(names)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            member = getattr(module, name, None)
        if inspect.isclass(member) or (callable(member) and hasattr(member, "__name__")):
            found.append((name, member))
    return found


def _answer(path: str, member: Any) -> Iterator[tuple[str, str]]:
    doc = getattr(member, "__doc__", None)
    text = summarize(inspect.cleandoc(doc)) if isinstance(doc, str) else ""
    if len(text) >= SHORTEST_ANSWER and not re.search(r" at 0x[0-9a-f]+", text):
        yield path, text


def _shortest_name_per_doc(found: dict[str, str]) -> dict[str, str]:
    """One object is exported under many paths: keep the shortest name of each text, the first by name among equals."""
    best: dict[str, str] = {}
    for name, text in found.items():
        held = best.get(text)
        if held is None or (len(name), name) < (len(held), held):
            best[text] = name
    return {name: text for text, name in best.items()}


def _modules(root: str, harvest: Harvest) -> Iterator[ModuleType]:
    package = _import(root, harvest)
    if package is None:
        return
    yield package
    paths = getattr(package, "__path__", None)
    if paths is None:
        return
    names = []
    pending = [(list(paths), root + ".")]
    while pending:
        where, prefix = pending.pop()
        for entry in pkgutil.iter_modules(where, prefix):
            if _NOT_API.search(entry.name):
                continue
            names.append(entry.name)
            if entry.ispkg:
                module = _import(entry.name, harvest)
                pending.append((list(getattr(module, "__path__", [])), entry.name + "."))
    for name in sorted(names):
        module = _import(name, harvest)
        if module is not None:
            yield module


def _import(name: str, harvest: Harvest) -> ModuleType | None:
    """Import quietly. A module that this machine cannot import is counted, not fatal: docs are taken where they are."""
    quiet = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # noqa: BLE001  foreign code may raise anything while it is imported
        harvest.failed_imports.append(f"{name}: {type(error).__name__}: {error}"[:200])
        return None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(sys.modules.get(package), "__version__", "unknown"))
