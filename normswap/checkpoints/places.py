"""Where the tensors are: one file, a folder in the Hugging Face layout, or shards that an index names.

An index, ``model.safetensors.index.json`` or ``pytorch_model.bin.index.json``, maps every tensor to the file it is in::

    {"metadata": {"total_size": 8}, "weight_map": {"conv.weight": "model-00001-of-00002.safetensors"}}
"""

from __future__ import annotations

import re
from pathlib import Path

from normswap.checkpoints.safety import parse_json
from normswap.checkpoints.words import first
from normswap.errors import NormswapError

INDEX = ".index.json"
LARGEST_INDEX = 2**26
WHOLE = ("model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
"""Names of weights in a folder, in the order they are tried; that of an index has :data:`INDEX` behind it."""

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def located(path: Path) -> Path:
    """``path``, or the file or index to read in it where it is a folder; raises :class:`NormswapError` for none."""
    if not path.is_dir():
        return path
    for name in (name + ending for name in WHOLE for ending in (INDEX, "")):
        if (path / name).is_file():
            return path / name
    inside = sorted(entry for entry in path.iterdir() if entry.is_file())
    found = [entry for entry in inside if entry.name.endswith(INDEX)]
    found = found or [entry for entry in inside if entry.suffix in WEIGHTS]
    if len(found) == 1:
        return found[0]
    if found:
        raise NormswapError(f"{path} is a folder with several checkpoints: {first([e.name for e in found])}; name one")
    raise NormswapError(
        f"{path} is a folder without {WHOLE[0]}, {WHOLE[1]} or their index; name a checkpoint ({', '.join(WEIGHTS)})"
    )


def read_index(path: Path) -> tuple[dict[str, str], dict[str, Path]]:
    """The metadata that is text, and the shard of every tensor; no shard is opened.

    Raises :class:`NormswapError` for an index that is damaged, or names a file outside its folder or one that is not
    there.
    """
    if path.stat().st_size > LARGEST_INDEX:
        raise NormswapError(f"{path} was not read: {path.stat().st_size} bytes are too large for an index")
    content = parse_json(path.read_bytes(), str(path))
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise NormswapError(f"{path} is no index of shards: it has no 'weight_map' from tensors to file names")
    for name in dict.fromkeys(shards.values()):
        if re.search(r"[/\\:\0]", name) or name in ("", ".", "..") or len(name) > 255 or name.endswith(INDEX):
            raise NormswapError(f"{path} was not read: it names {name!r}, which is no weights file in its folder")
        if not (path.parent / name).is_file():
            raise NormswapError(f"{path} names {name}, which is not there; download it again")
    metadata = content.get("metadata")
    texts = {k: v for k, v in metadata.items() if isinstance(v, str)} if isinstance(metadata, dict) else {}
    return texts, {name: path.parent / shard for name, shard in shards.items()}
