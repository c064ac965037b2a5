"""A teacher with another tokenizer: its log-probabilities at ids and positions that both tokenizers share.

  shared ids         v of the student and m(v) of the teacher stand for the same bytes
  aligned positions  both cut the same bytes out of the same text there: one token of each
  list of a position  A, the student's K most likely shared ids; p and q renormalised on A            arXiv 2610.08448
  loss = sum_A p^ log(p^ / q^), which is TopK("reverse", "student", "drop")

All other positions are masked. Not here: spans of several tokens, and sorted probabilities (ULD, GOLD): a product of several
conditional probabilities is not the probability of a token, and 2610.08448 measured that such losses hurt. The loss itself is
divergences/top_k.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from opd_ops.inputs.teacher_lists import TopKLogprobs

SENTENCEPIECE_SPACE = "\u2581"
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer(Protocol):
    """What is read of a tokenizer of the library transformers."""

    @property
    def all_special_ids(self) -> list[int]: ...

    def get_vocab(self) -> dict[str, int]: ...


class MappedTeacher(NamedTuple):
    """What a call takes in the place of the teacher; (...) is the student's positions' shape."""

    lists: TopKLogprobs  # (..., K) of="student"; missing where not aligned
    mask: Tensor  # (...) bool: aligned positions where neither model masks a listed id; `mask=` of the call
    metrics: dict[str, Tensor]  # "aligned", the share of the positions; "listed_mass", the mean of q on the list


@dataclass(frozen=True, eq=False)
class IdMap:
    """Which id of the teacher is which id of the student.

    Args:
        student_to_teacher: (V,) int64, of the student's V ids: the teacher's id of the same bytes; -1: it has none.
        student_bytes: The bytes of each id, empty for special ones: `align` reads them. None: not known.
        teacher_bytes: The same of the teacher's ids.
    """

    student_to_teacher: Tensor
    student_bytes: tuple[bytes, ...] | None = None
    teacher_bytes: tuple[bytes, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.student_to_teacher, Tensor) or self.student_to_teacher.dtype != torch.int64:
            raise TypeError("IdMap.student_to_teacher: expected an int64 tensor (V,), -1 where an id is not shared")
        if self.student_to_teacher.dim() != 1 or not bool((self.student_to_teacher >= 0).any()):
            raise ValueError(
                f"IdMap.student_to_teacher: got shape {tuple(self.student_to_teacher.shape)} with "
                f"{int((self.student_to_teacher >= 0).sum())} shared ids, expected (V,) with one or more"
            )

    @staticmethod
    def of(student: Tokenizer, teacher: Tokenizer, *, also: Mapping[int, int] | None = None) -> IdMap:
        """The map of ids with equal bytes.

        If several ids of one model have the same bytes, it takes the smallest that is no byte token.

        `also`: further pairs (student's id, teacher's id), like both ends of a turn: special ids are not shared otherwise.
        """
        known = [token_bytes(tokenizer) for tokenizer in (student, teacher)]
        ids = [_first_ids(tokenizer, texts) for tokenizer, texts in zip((student, teacher), known, strict=True)]
        pairs = [ids[1].get(text, -1) if ids[0].get(text) == i else -1 for i, text in enumerate(known[0])]
        for own, other in (also or {}).items():
            pairs[own] = other
        return IdMap(torch.tensor(pairs), *known)

    @property
    def n_shared(self) -> int:
        return int((self.student_to_teacher >= 0).sum())

    def align(self, student_ids: Sequence[int], teacher_ids: Sequence[int]) -> Tensor:
        """(T,) for each token of the student's, the place of the teacher's token that is the same bytes of the text; else -1.

        Both sequences of ids are of one text, such as a response. Position t predicts token t + 1. So the `index` of
        `mapped_teacher` is one earlier on both sides: index[:-1] = (places[1:] - 1).clamp_min(-1).
        Raises: ValueError: the two texts differ.
        """
        if self.student_bytes is None or self.teacher_bytes is None:
            raise ValueError(
                "IdMap: made without the bytes of the ids; align needs IdMap.of(student_tokenizer, teacher_tokenizer)"
            )
        own, others = [self.student_bytes[i] for i in student_ids], [self.teacher_bytes[i] for i in teacher_ids]
        texts = b"".join(own), b"".join(others)
        if texts[0] != texts[1]:
            n = next((i for i, pair in enumerate(zip(*texts, strict=False)) if pair[0] != pair[1]), min(map(len, texts)))
            raise ValueError(
                f"align: the texts differ from byte {n} on: the student's goes on {texts[0][n : n + 20]!r}, the teacher's "
                f"{texts[1][n : n + 20]!r}; pass ids of one text, without a space that a tokenizer adds"
            )
        places, begin = {}, 0
        for place, text in enumerate(others):
            if text:
                places[begin, begin + len(text)] = place
            begin += len(text)
        aligned, begin = [], 0
        for text in own:
            aligned.append(places.get((begin, begin + len(text)), -1) if text else -1)
            begin += len(text)
        return torch.tensor(aligned, dtype=torch.long)


def token_bytes(tokenizer: Tokenizer) -> tuple[bytes, ...]:
    """The bytes that each id writes; empty for special ids, and for ids without a token.

    Byte-level vocabularies (GPT-2's alphabet), and those of sentencepiece with its space and its byte tokens.
    """
    vocab, special = tokenizer.get_vocab(), set(tokenizer.all_special_ids)
    is_byte_level = sum(token.startswith("\u0120") for token in vocab) > sum(
        token.startswith(SENTENCEPIECE_SPACE) for token in vocab
    )
    alphabet = _byte_alphabet()
    texts = [b""] * (max(vocab.values()) + 1)
    for token, i in vocab.items():
        if i in special:
            continue
        byte = BYTE_TOKEN.fullmatch(token)
        if is_byte_level and all(letter in alphabet for letter in token):
            texts[i] = bytes(alphabet[letter] for letter in token)
        elif byte is not None and not is_byte_level:
            texts[i] = bytes([int(byte[1], 16)])
        else:
            texts[i] = token.replace(SENTENCEPIECE_SPACE, " ").encode()
    return tuple(texts)


def _first_ids(tokenizer: Tokenizer, texts: Sequence[bytes]) -> dict[bytes, int]:
    """The id of each text. A byte token stands for its byte only where no other token does: tokenizers write the other."""
    byte_tokens = {i for token, i in tokenizer.get_vocab().items() if BYTE_TOKEN.fullmatch(token)}
    ids: dict[bytes, int] = {}
    for i in sorted(range(len(texts)), key=byte_tokens.__contains__):
        ids.setdefault(texts[i], i)
    ids.pop(b"", None)
    return ids


def _byte_alphabet() -> dict[str, int]:
    """The byte of each letter in byte-level vocabularies: printable ones stand for themselves, the others begin at 256."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
