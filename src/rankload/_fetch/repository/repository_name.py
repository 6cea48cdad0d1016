"""The name of a repository, as torch.hub's functions take it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rankload._text import printable
from rankload.errors import ArgumentError

#: Owner and name in GitHub's alphabets, then a git reference or commit.
_NAME = re.compile(r"([A-Za-z0-9][A-Za-z0-9-]*)/([A-Za-z0-9._-]+)(?::(.+))?")

#: What git forbids in a reference (git-check-ref-format(1)), and ``%``, which a URL would decode.
_FORBIDDEN_IN_REF = re.compile(r"[\x00-\x20\x7f~^:?*\[\\%#]|\.\.|@\{|//|^[/.-]|[/.]$")


@dataclass(frozen=True)
class RepositoryName:
    """``owner/name[:ref]``.

    Attributes:
        owner: user or organisation on GitHub.
        name: name of the repository.
        ref: branch, tag or commit; None for the default branch.
    """

    owner: str
    name: str
    ref: str | None

    @classmethod
    def parse(cls, text: str) -> RepositoryName:
        """Parse the argument ``github`` of torch.hub's functions.

        Raises:
            ArgumentError: the text is no such name.
        """
        match = _NAME.fullmatch(text) if isinstance(text, str) and len(text.encode(errors="replace")) < 250 else None
        if match is None or match[2] in (".", "..") or (match[3] and _FORBIDDEN_IN_REF.search(match[3])):
            raise ArgumentError(
                f"repository {printable(str(text))!r}: expected owner/name or owner/name:ref, such as "
                "'pytorch/vision:v0.10.0'"
            )
        return cls(match[1], match[2], match[3])

    @property
    def owner_name(self) -> str:
        """The name in torch.hub's list of trusted repositories."""
        return f"{self.owner}_{self.name}"

    def directory_name(self, ref: str) -> str:
        """Return the name of the directory in torch.hub's directory: a reference's slashes become underscores."""
        return f"{self.owner_name}_{ref.replace('/', '_')}"

    def __str__(self) -> str:
        return f"{self.owner}/{self.name}" + (f":{self.ref}" if self.ref else "")
