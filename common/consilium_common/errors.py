"""The one error type that users see, and the exit status of each kind of error."""

from __future__ import annotations

from typing import Final

#: Exit status by the part of an error's code before the dot. Documented in README.md.
EXIT_STATUS: Final[dict[str, int]] = {
    "internal": 1,  # a fault of ours
    "usage": 2,  # arguments or options are wrong
    "study": 3,  # a study file is invalid, or a study is in the wrong state
    "data": 4,  # images, labels or manifests are wrong
    "identity": 5,  # certificates, invitations, roles
    "privacy": 6,  # budget, policy or ledger refuses
    "network": 7,  # nobody answers, or not the one expected
    "state": 8,  # files, disk, ports, processes
    "run": 9,  # a study ran and did not succeed
    "pacs": 11,  # the hospital's archive does not answer, refuses, or sends something else
}

#: Exit status of a check that found warnings and no errors.
WARNINGS_ONLY: Final = 10


def printable(text: str) -> str:
    """Return ``text`` with escapes for all that commands a terminal or is no text, as names of
    files may hold it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class ConsiliumError(Exception):
    """An error that names what happened, where, and what to do about it.

    Parameters
    ----------
    code : str
        ``category.name`` in lower case with hyphens, for example ``data.truncated``. The category
        is a key of :data:`EXIT_STATUS` and decides the exit status.
    message : str
        What happened, naming the thing. Never contains a patient's identity: errors may leave
        the site.
    where : str
        File, line, address or key the message is about; empty where there is none.
    hint : str
        What to do; empty where there is nothing useful to say.
    """

    def __init__(self, code: str, message: str, *, where: str = "", hint: str = "") -> None:
        if code.partition(".")[0] not in EXIT_STATUS:
            raise ValueError(f"unknown error category in code {code!r}")
        super().__init__(message)
        self.code = code
        self.message = message
        self.where = printable(where)
        self.hint = hint

    @property
    def exit_status(self) -> int:
        """Exit status of a command that ends with this error."""
        return EXIT_STATUS[self.code.partition(".")[0]]

    def to_dict(self) -> dict[str, str]:
        """Return the error as it appears in ``--json`` and on the wire."""
        return {
            "code": self.code,
            "message": self.message,
            "where": self.where,
            "hint": self.hint,
        }

    @classmethod
    def from_dict(cls, value: dict[str, str]) -> ConsiliumError:
        """Rebuild an error that came over the wire; unknown categories become ``internal``."""
        code = str(value.get("code", "internal.unknown"))
        if code.partition(".")[0] not in EXIT_STATUS:
            code = "internal.unknown"
        return cls(
            code,
            str(value.get("message", "")),
            where=str(value.get("where", "")),
            hint=str(value.get("hint", "")),
        )

    def __str__(self) -> str:
        where = f" ({self.where})" if self.where else ""
        hint = f" {self.hint}" if self.hint else ""
        return f"[{self.code}] {self.message}{where}{hint}"
