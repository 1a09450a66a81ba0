"""``text check``: whether the token files of a text folder are sound."""

from __future__ import annotations

from pathlib import Path

from tyro.conf import Positional

from composer_megatron.display import console, print_json


def text_check(folder: Positional[Path], *, json: bool = False) -> None:
    """Read every token of a text folder and compare it with the index, the counts, the vocabulary and the checksums.

    Args:
        folder: A text folder, made by tools/preprocess_text.py.
        json: Print one JSON object for programs instead of text.
    """
    from composer_megatron.text.check import check_text_folder

    info = check_text_folder(folder)
    if json:
        print_json({"folder": str(info.folder)} | info.as_dict())
        return
    for name, split in (("train", info.train), ("valid", info.valid)):
        checksum = f"sha256 {split.sha256[:16]}…" if split.sha256 else "no checksum, as older versions wrote it"
        console.print(f"{name}: {split.documents:,} documents, {split.tokens:,} tokens, {checksum}: sound")
