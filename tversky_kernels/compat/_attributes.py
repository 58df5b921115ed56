"""Options of a compound loss that one of its parts has."""

from __future__ import annotations


def attributes_of(part: str, *names: str):
    """A class decorator: the named options are those of the attribute ``part``, and setting one sets it there."""

    def decorate(cls):
        for name in names:
            setattr(cls, name, _forwarded(part, name))
        return cls

    return decorate


def _forwarded(part: str, name: str) -> property:
    return property(
        lambda self: getattr(getattr(self, part), name),
        lambda self, value: setattr(getattr(self, part), name, value),
    )
