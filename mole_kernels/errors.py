"""One shape of message for every error: where, what was expected, what came, what to do."""

from __future__ import annotations


class MoleError(Exception):
    """`where: expected …, got …` and a hint; the base of every error this package raises on purpose.

    Args:
        where: The operator, file, key or argument at fault.
        problem: A sentence, where "expected … got …" does not fit.
        expected: What would have been right.
        got: What came.
        hint: What to do about it.
    """

    def __init__(
        self, where: str, problem: str = "", *, expected: object = None, got: object = None, hint: str = ""
    ) -> None:
        self.where, self.problem, self.expected, self.got, self.hint = where, problem, expected, got, hint
        parts = [problem.rstrip(".")] if problem else []
        if expected is not None:
            parts.append(f"expected {expected}" + (f", got {got}" if got is not None else ""))
        elif got is not None:
            parts.append(f"got {got}")
        text = f"{where}: {'; '.join(parts)}." + (f"\nHint: {hint.rstrip('.')}." if hint else "")
        super().__init__(text)

    def __reduce__(self):
        return (_rebuild, (type(self), self.where, self.problem, self.expected, self.got, self.hint))


def _rebuild(
    cls: type[MoleError], where: str, problem: str, expected: object, got: object, hint: str
) -> MoleError:
    return cls(where, problem, expected=expected, got=got, hint=hint)


class MoleShapeError(MoleError, ValueError):
    """A tensor whose shape does not fit the others."""


class MoleTypeError(MoleError, TypeError):
    """A dtype, device or Python type that the operator does not take."""


class MoleValueError(MoleError, ValueError):
    """An argument whose value makes no sense."""


class MoleFileError(MoleError, ValueError):
    """A file that is broken, hostile or not what it says it is."""


class MoleKeyError(MoleError, ValueError):
    """Keys of a file that match no layer, name one twice, or miss their other half."""


class MoleStateError(MoleError, RuntimeError):
    """A call that is right in itself, at the wrong moment."""


class MoleBackendError(MoleError, RuntimeError):
    """No backend takes this problem, or the one asked for by name refuses it."""


class MoleWarning(UserWarning):
    """Something was ignored or replaced, and the message says what."""


def printable(text: object, limit: int = 120) -> str:
    """Text from a file made safe to print: control characters escaped, long ones cut."""
    s = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return s if len(s) <= limit else s[: limit - 1] + "…"
