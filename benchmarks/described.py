"""What is said of a result in names and values: title, machine, settings, quality. Tables are in views.py."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from skerry.benchmarks.shown import DASH, amount, entries, mapping, number, percent, plain, ratio, short

Document = Mapping[str, Any]
MOST_FACTS = 300
READ = frozenset({  # of the environment
    "cpu", "cores_usable", "cores_online", "isa", "isa_lowered", "memory_bytes", "os", "python", "versions",
    "load_average", "git",
})  # fmt: skip


def title_of(document: Document) -> str:
    """What was measured, on one line."""
    subject, sides = document.get("subject"), mapping(mapping(document.get("comparison")).get("sides"))
    if sides:
        names = [plain(mapping(side).get("name") or name, 80) for name, side in sides.items()]
        return " against ".join(reversed(names))
    if not isinstance(subject, dict):
        return plain(subject) if subject else plain(document.get("level"), 40)
    named = [subject.get(key) for key in ("name", "version", "target", "precision", "a", "b", "url")]
    return " ".join(plain(one, 80) for one in named if isinstance(one, str) and one) or plain(document.get("level"), 40)


def began(document: Document) -> str:
    """To the second: 2026-11-23 10:12:13 UTC."""
    raw = plain(document.get("began"), 40)
    return re.sub(r"\.\d+", "", raw).replace("T", " ", 1).replace("+00:00", " UTC")


def commit_of(document: Document) -> str:
    git = mapping(mapping(document.get("environment")).get("git"))
    return plain(git["commit"], 60) if git.get("commit") else ""


def environment_facts(document: Document) -> list[tuple[str, str]]:
    """The fingerprint, in the words of a person. What the machine did not say is left out."""
    found = mapping(document.get("environment"))
    git = mapping(found.get("git"))
    cores = " of ".join(plain(found[key]) for key in ("cores_usable", "cores_online") if found.get(key) is not None)
    facts = [
        ("Processor", plain(found.get("cpu"))), ("Cores usable", cores or DASH),
        ("Instruction set", plain(found.get("isa")) + (" (lowered on purpose)" if found.get("isa_lowered") else "")),
        ("Memory", amount(number(found.get("memory_bytes")), "B")), ("System", plain(found.get("os"))),
        ("Python", plain(found.get("python"))),
        *((plain(name, 60), plain(version)) for name, version in mapping(found.get("versions")).items()),
        ("Load before the run", plain(found.get("load_average"))),
        ("Commit", commit_of(document) or DASH), ("Schema", plain(document.get("schema"))),
        *flat({k: v for k, v in found.items() if k not in READ}),
    ]  # fmt: skip
    if git.get("dirty"):
        facts.append(("Checkout", "had changes that are in no commit"))
    return [(name, value) for name, value in facts if value != DASH]


def quality_facts(quality: Document) -> list[tuple[str, str]]:
    """What was found of answers and their length, beside its bound."""
    if not quality:
        return []
    prompts, positions = (fact(key, quality.get(key)) for key in ("prompts", "positions"))
    low, bound = (percent(number(quality.get(key))) for key in ("agreement_low", "bound"))
    facts = [
        ("Agreement of answers", f"{percent(number(quality.get('agreement')))}, at least {low}; bound {bound}"),
        ("Compared", f"{positions} tokens of {prompts} prompts"),
        ("Length of answers", f"{percent(number(quality.get('length_ratio')))} of A's; "
                              f"bound {percent(number(quality.get('length_bound')))}"),
    ]  # fmt: skip
    if number(quality.get("self_agreement")) not in (None, 1.0):
        facts.append(("A with itself", f"{percent(number(quality.get('self_agreement')))} agree"))
    if number(quality.get("likelihood_ratio")) is not None:
        allowed = ratio(number(quality.get("likelihood_bound")))
        facts.append(("Perplexity, B over A", f"{ratio(number(quality.get('likelihood_ratio')))}; bound {allowed}"))
    return [
        *facts,
        ("Verdict", plain(quality.get("verdict"), 40)),
        *(("Reason", one) for one in texts(quality.get("reasons"))),
    ]


def flat(raw: Any, before: str = "") -> list[tuple[str, str]]:
    """Names joined by dots, and what they hold; lists of plain values on one line."""
    found: list[tuple[str, str]] = []
    for name, value in list(mapping(raw).items())[:MOST_FACTS]:
        key = f"{before}.{plain(name, 60)}" if before else plain(name, 60)
        if isinstance(value, dict) and value and key.count(".") < 4:
            found += flat(value, key)
        elif isinstance(value, list | tuple) and not entries(value):
            found.append((key, plain(", ".join(plain(one, 60) for one in value[:40]), 400)))
        elif value is not None:
            found.append((key, fact(str(name), value)))
    return found


def fact(name: str, raw: Any) -> str:
    """A value of a field whose name tells its unit."""
    value = number(raw)
    if value is None:
        return raw[:12] if isinstance(raw, str) and re.fullmatch("[0-9a-f]{64}", raw) else plain(raw)
    if name.endswith("_seconds") or name == "seconds":
        return amount(value, "s")
    if name.endswith("_bytes") or name in ("peak_rss", "pss", "rss", "gpu_memory"):
        return amount(value, "B")
    return f"{value:,.0f}" if value == int(value) and isinstance(raw, int) else short(value)


def texts(raw: Any) -> list[str]:
    return [plain(one, 600) for one in raw] if isinstance(raw, list | tuple) else []


def plain_unit(raw: Document) -> str:
    return plain(raw["unit"], 30) if raw.get("unit") else ""
