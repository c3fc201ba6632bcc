"""Fingerprints of a model that is never whole in memory, taken of its parameters as they pass."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor, nn

from pumice.arch.weights import Shards
from pumice.disk import write
from pumice.plan import fingerprint, tensor_digest


class Digesting:
    """A source that takes digests of the parameters that pass, for the fingerprints of a model that is never whole.

    They are kept in a file beside the journal, since a resumed run does not see the first blocks again.
    """

    def __init__(self, source: Shards, path: Path) -> None:
        self.source, self.path = source, path
        self.digests = json.loads(path.read_text()) if path.exists() else {"fingerprint": {}, "applied": {}}

    def load_rest(self) -> None:
        self.source.load_rest()
        rest = [(key, p) for key, p in self.source.model.named_parameters() if not p.is_meta]
        self.note("fingerprint", rest)
        self.note("applied", rest)

    def load(self, block: nn.Module, name: str) -> None:
        self.source.load(block, name)
        self.note("fingerprint", ((f"{name}.{key}", p) for key, p in block.named_parameters()))

    def release_rest(self) -> None:
        self.source.release_rest()

    def release(self, block: nn.Module, name: str) -> None:
        self.source.release(block, name)

    def note(self, which: str, parameters: Iterable[tuple[str, Tensor]]) -> None:
        self.digests[which] |= {key: tensor_digest(key, tensor).hex() for key, tensor in parameters}
        write(self.path, lambda path: path.write_text(json.dumps(self.digests)))

    def fingerprints(self) -> dict[str, str]:
        """Of the base, and of the weights that were written."""
        return {which: fingerprint(map(bytes.fromhex, found.values())) for which, found in self.digests.items()}
