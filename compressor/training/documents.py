"""A document: what is never divided between splits. A text, a pair, an image or a clip."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Media:
    """An image or a clip that is read when a batch needs it.

    Attributes:
        path: the file.
        sha256: of its bytes, or of the pixels of one image in a file of many.
        index: of the image in such a file.
    """

    path: Path
    sha256: str
    index: int | None = None


@dataclass(frozen=True)
class Document:
    """One text, perhaps with the text a model should answer, or one image or clip.

    Attributes:
        text: what is read; empty for images and clips.
        label: class number of labelled data.
        rows: the texts that become rows of a batch; empty until a corpus for encoders is made.
        target: the answer of a pair, the words of a clip.
        media: the image or clip.
    """

    text: str = ""
    label: int | None = None
    rows: tuple[str, ...] = ()
    target: str | None = None
    media: Media | None = None

    @property
    def content(self) -> str:
        """What makes two documents the same: texts with white space normalized, hash of media."""
        parts = [self.text, self.target or ""] + ([self.media.sha256] if self.media else [])
        return " ".join(" ".join(parts).split())

    @property
    def source(self) -> str:
        """What is read, without the answer: whatever shares it belongs into one split."""
        return self.media.sha256 if self.media else " ".join(self.text.split())
