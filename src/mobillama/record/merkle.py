"""Merkle trees over sha256 (the construction of RFC 6962): one root names many leaves, and one leaf can be checked alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def leaf_digest(data: bytes | memoryview) -> bytes:
    """Return the 32-byte digest of a leaf: sha256(0x00 ‖ data)."""
    digest = hashlib.sha256(b"\x00")
    digest.update(data)
    return digest.digest()


def merkle_root(leaves: Sequence[bytes]) -> bytes:
    """Return the 32-byte root over leaf digests; an inner node is sha256(0x01 ‖ left ‖ right).

    Pairing neighbours level by level and carrying an odd last node up unchanged is RFC 6962's tree. The root of no
    leaves is sha256 of nothing.
    """
    level = list(leaves)
    if not level:
        return hashlib.sha256().digest()
    while len(level) > 1:
        paired = [hashlib.sha256(b"\x01" + level[i] + level[i + 1]).digest() for i in range(0, len(level) - 1, 2)]
        level = paired + ([level[-1]] if len(level) % 2 else [])
    return level[0]
