"""What became of the samples of an input, counted for the report at the end."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from triptych.data.parts import Encoded

MOST_REASONS = 10
"""Reasons that the report names; its file has all."""
_VARYING = re.compile(r"\S*/\S*|\d+|'[^']*'")


@dataclass(slots=True)
class Tally:
    """Counts by format, kind and reason."""

    formats: Counter[str] = field(default_factory=Counter)
    """Samples by the format that their records were read as."""
    samples: Counter[str] = field(default_factory=Counter)
    """Good samples by kind."""
    tokens: Counter[str] = field(default_factory=Counter)
    """Text tokens by kind, placeholders counted once."""
    rejects: Counter[str] = field(default_factory=Counter)
    """Bad samples by reason."""
    spelled: Counter[str] = field(default_factory=Counter)
    """Samples by special token that their text spells, which stays ordinary characters."""

    def good(self, record: Any, encoded: Encoded) -> None:
        """Count a sample."""
        shown = sorted({item.kind.name.lower() for item in encoded.media})
        several = "s" if len(encoded.media) > 1 else ""
        media = f"{' and '.join(shown)}{several}" if shown else "text only"
        kind = f"{'chat' if 'messages' in record else 'document'}, {media}"
        self.samples[kind] += 1
        self.tokens[kind] += len(encoded.input_ids)

    def bad(self, reason: str) -> None:
        """Count a reject; what differs from sample to sample is left out of its reason."""
        self.rejects[_VARYING.sub("…", reason.partition("  -> ")[0])] += 1

    def add(self, other: "Tally") -> None:
        """Count what another has counted."""
        for f in fields(self):
            getattr(self, f.name).update(getattr(other, f.name))

    @classmethod
    def of_content(cls, content: dict[str, dict[str, int]]) -> "Tally":
        """The inverse of ``content``."""
        return cls(**{name: Counter(counts) for name, counts in content.items()})

    def lines(self) -> Iterator[str]:
        """The report."""
        yield f"read as {_counts(self.formats)}"
        for kind, number in self.samples.most_common():
            yield f"  {number:,} samples of {kind}: {self.tokens[kind]:,} text tokens"
        for reason, number in self.rejects.most_common(MOST_REASONS):
            yield f"  {number:,} left out: {reason}"
        if self.spelled:
            yield f"  spelled in text, where they stay characters: {_counts(self.spelled)}"
            if any(token.startswith(("<|object_ref", "<|box", "<|quad")) for token in self.spelled):
                yield "  -> --parse-grounding makes places of them"

    def content(self) -> dict[str, dict[str, int]]:
        """All of it, for a file."""
        return {f.name: dict(getattr(self, f.name).most_common()) for f in fields(self)}


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{name} ({number:,})" for name, number in counter.most_common()) or "nothing"
