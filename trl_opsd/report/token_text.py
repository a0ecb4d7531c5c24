"""What tokens stand for, to the byte."""

import json
import re
from collections.abc import Iterable
from typing import Any


_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_bytes(tokenizer: Any, token_ids: Iterable[int]) -> list[bytes]:
    """
    The bytes that tokens stand for. One by one, those of a byte-level vocabulary need be no whole characters.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        token_ids (`Iterable[int]`):
            Tokens. One that the tokenizer does not know, such as one that pads the model's vocabulary, is its number
            in angle brackets.

    Returns:
        `list[bytes]`: for each, in UTF-8 where it is text.
    """
    ids = list(token_ids)
    decoders = _decoders(tokenizer)
    added = {index: token.content for index, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
    names = tokenizer.convert_ids_to_tokens(ids)
    found = []
    for index, name in zip(ids, names, strict=True):
        if name is None:
            found.append(f"<{index}>".encode())
        elif index in added:
            found.append(_encoded(added[index]))
        elif "ByteLevel" in decoders:
            found.append(b"".join(_BYTES.get(character, _encoded(character)) for character in name))
        elif match := _BYTE.fullmatch(name) if "ByteFallback" in decoders else None:
            found.append(bytes.fromhex(match[1]))
        elif "▁" in decoders:
            found.append(_encoded(name.replace("▁", " ")))
        else:
            found.append(_encoded(tokenizer.decode([index], clean_up_tokenization_spaces=False)))
    return found


def _decoders(tokenizer: Any) -> set[str]:
    """Names of the steps by which a fast tokenizer makes text of tokens, and "▁" if that is its space."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return set()
    state = json.loads(decoder.__getstate__())
    steps = state.get("decoders", [state])
    names = {step["type"] for step in steps}
    return names | {"▁"} if "▁" in json.dumps(steps, ensure_ascii=False) else names


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _byte_characters() -> dict[str, bytes]:
    """The characters that byte-level vocabularies write bytes as: printable ones as they are, others above them."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    pairs = [*zip(printable, printable, strict=True), *zip(range(256, 512), others, strict=False)]
    return {chr(character): bytes([byte]) for character, byte in pairs}


_BYTES = _byte_characters()
