"""What a file is, by its first bytes and not by its name."""

from __future__ import annotations

from pathlib import Path

from normswap.errors import NormswapError


def first_bytes(path: Path) -> bytes:
    if path.is_dir():
        raise NormswapError(f"{path} is a folder; name a .pt, .pth or .safetensors file in it")
    if not path.exists():
        raise NormswapError(f"{path} does not exist")
    if not path.is_file():
        raise NormswapError(f"{path} is not a regular file")
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise NormswapError(f"{path} cannot be read: {error.strerror or error}") from error
    if not head:
        raise NormswapError(f"{path} is empty (0 bytes); write or download it again")
    return head


def is_safetensors(head: bytes) -> bool:
    """Eight bytes of length, then JSON."""
    return len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32


def looks_like(head: bytes) -> str:
    if head.startswith(b"version https://git-lfs"):
        return "; it is a Git LFS pointer to the file: run git lfs pull"
    if head.lstrip()[:5].lower() in (b"<html", b"<!doc"):
        return "; it is a web page, as a failed download leaves it: download it again"
    if head.startswith(b"\x89HDF"):
        return "; it is an HDF5 file (Keras)"
    if head.startswith(b"GGUF"):
        return "; it is a GGUF file"
    return ""
