"""The one error that this runner raises on purpose."""

from __future__ import annotations


class DeviceError(Exception):
    """Something is wrong: `what` on one line; where, and what would be right, on the next.

    Args:
        what: what is wrong, with the value found and the value expected.
        where: the file or flag.
        fix: what would be right.
        code: exit code: 2 the command or a file is wrong; 1 a check said no or the run failed.
    """

    def __init__(self, what: str, where: str = "", fix: str = "", code: int = 2) -> None:
        super().__init__(what)
        self.what, self.where, self.fix, self.code = what, where, fix, code

    def __str__(self) -> str:
        detail = " · ".join(part for part in (self.where, self.fix) if part)
        return f"{self.what}\n{detail}" if detail else self.what
