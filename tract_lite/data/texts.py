"""Text files as programs leave them: compressed or not, and in which encoding."""

import gzip
import io
import logging
from typing import BinaryIO, TextIO

logger = logging.getLogger(__name__)

# How a file begins that is compressed, and one that is a spreadsheet.
GZIP, ZIP = b"\x1f\x8b", b"PK\x03\x04"
_MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16", b"\xef\xbb\xbf": "utf-8-sig"}
# What Excel writes where it does not write UTF-8, in the West.
EXCEL = "cp1252"


def open_text(source: str, encoding: str | None, other: str | None = None) -> TextIO:
    """A file, or standard input for "-", as text with its own line breaks.

    It is read in UTF-8 unless its first bytes say otherwise, in `other` where it is not UTF-8.
    Raises ValueError: the line that can't be read, no such encoding, or no text.
    """
    if encoding is None and source != "-":
        encoding = _find_encoding(source, other)
    try:
        # A mark of the byte order is no part of the text.
        name = "utf-8-sig" if (encoding or "utf-8").lower() in ("utf-8", "utf8") else encoding
        return io.TextIOWrapper(_open_bytes(source), encoding=name, newline="")
    except LookupError as error:
        raise ValueError(f"no encoding {encoding!r}: name one such as utf-8, utf-16 or {EXCEL}") from error


def _open_bytes(source: str) -> BinaryIO:
    if source == "-":
        return open(0, "rb", closefd=False)
    with open(source, "rb") as file:
        start = file.read(4)
    if start == ZIP:
        raise ValueError("it is no text: name it .xlsx if it is a spreadsheet, or unpack it")
    return gzip.open(source) if start[:2] == GZIP else open(source, "rb")  # type: ignore[return-value]


def _find_encoding(source: str, other: str | None) -> str:
    has_letters = False
    with _open_bytes(source) as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                for mark, encoding in _MARKS.items():
                    if line.startswith(mark):
                        return encoding
                if b"\0" in line[:2]:
                    return "utf-16-be" if line[:1] == b"\0" else "utf-16-le"
            try:
                line.decode("utf-8")
                has_letters = has_letters or not line.isascii()
            except UnicodeDecodeError as error:
                fault = f"line {number} is not UTF-8 (byte 0x{line[error.start]:02x})"
                # With other letters in UTF-8 before it, it is damaged.
                if other is None or has_letters:
                    advice = f"save the file in UTF-8, or name what it is written in, as in --encoding {EXCEL}"
                    raise ValueError(f"{fault}: {advice}") from error
                logger.warning("%s: %s: read as Excel's %s; --encoding names another", source, fault, other)
                return other
    return "utf-8"
