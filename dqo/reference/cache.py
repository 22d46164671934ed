"""Reference log-probabilities on disk, one entry a response, found by what they were computed from and by nothing else.

ref_cache/<sha256 of weights, architecture, dtype, softcap>/  numbers of one reference policy
    segment-<sha256 of its content>.safetensors               keys (n, 32), lengths (n,), logprobs and lse (sum of lengths,)
    meta.json                                                 the same in readable form; nothing reads it

A segment is whole when it exists, so a killed run loses what it had not flushed and nothing else. An entry belongs to token ids,
not to rows or files: other methods, other splits, smaller and larger files find what is there. A model directory that was
overwritten has other weights, hence another folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save
from transformers import PreTrainedModel

from dqo.errors import UserError
from dqo.files import check_room, remove_asides, write_whole
from dqo.models.policy import architecture_hash, final_softcap

logger = logging.getLogger(__name__)

FORMAT = 1  # of a segment and of response_key
_PER_TOKEN, _PER_RESPONSE = 8, 40  # bytes: two float32; a key of 32 bytes and a length
_ABANDONED = 3600.0  # seconds; a segment is written within a few of them


@dataclass(frozen=True)
class ReferenceId:
    """What the numbers depend on, beside the token ids."""

    weights: str  # sha256 of the parameters
    architecture: str  # sha256 of the configuration: equal weights compute other numbers with another rope_theta
    dtype: str  # of the forward pass, "float32" or "bfloat16"
    softcap: float | None  # of the final logits

    def key(self) -> str:
        return hashlib.sha256(json.dumps([FORMAT, asdict(self)], sort_keys=True).encode()).hexdigest()


def reference_id(model: PreTrainedModel, weights: str, bf16: bool) -> ReferenceId:
    """Of a model whose parameters have the hash `weights`. `bf16`: products are computed in bfloat16."""
    dtype = "bfloat16" if bf16 or model.dtype == torch.bfloat16 else "float32"
    return ReferenceId(weights, architecture_hash(model), dtype, final_softcap(model))


def response_key(prompt_ids: list[int], completion_ids: list[int], env_mask: np.ndarray | None = None) -> bytes:
    """sha256 of both lists of ids and of where one ends; and of the mask, where some ids are the environment's."""
    ids = array("q", [len(prompt_ids)])
    ids.extend(prompt_ids)
    ids.extend(completion_ids)
    return hashlib.sha256(ids.tobytes() + (b"" if env_mask is None else env_mask.tobytes())).digest()


def _name_of(content: bytes) -> str:
    return f"segment-{hashlib.sha256(content).hexdigest()[:32]}.safetensors"


@dataclass(frozen=True)
class Entry:
    """Of one response, float32 (T,) each."""

    logprobs: np.ndarray
    lse: np.ndarray


class ReferenceCache:
    """The entries of one reference policy under `root`. Any number of processes may read and add at the same time."""

    def __init__(self, root: str | Path, identity: ReferenceId, model_name: str):
        self.directory = Path(root) / identity.key()
        self.identity, self.model_name = identity, model_name
        self.damaged: set[Path] = set()  # segments that were named and are not read
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"ref_cache_dir {root} cannot be written: {error.strerror}; choose another") from error
        remove_asides(self.directory, older_than=_ABANDONED)

    def lookup(self, lengths: dict[bytes, int]) -> dict[bytes, Entry]:
        """The entries that are there of the responses asked for, {key: number of actions}."""
        found: dict[bytes, Entry] = {}
        for path in self._segments():
            try:
                self._take(path, lengths, found)
            except (SafetensorError, ValueError, KeyError, TypeError) as error:
                if path not in self.damaged:
                    logger.warning(
                        "%s is damaged (%s) and is not used: its responses are computed again; delete it", path, error
                    )
                self.damaged.add(path)
            except OSError as error:
                raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
        return found

    def add(self, entries: dict[bytes, Entry]) -> None:
        """Writes one segment."""
        if not entries:
            return
        values = list(entries.values())
        content = save(
            {
                "keys": np.frombuffer(b"".join(entries), np.uint8).reshape(-1, 32),
                "lengths": np.array([len(e.logprobs) for e in values], np.int64),
                "logprobs": np.concatenate([e.logprobs for e in values]),
                "lse": np.concatenate([e.lse for e in values]),
            }
        )
        path = self.directory / _name_of(content)
        write_whole(path, content)
        self.damaged.discard(path)

    @staticmethod
    def size(lengths: list[int]) -> int:
        """Bytes of responses with so many completion tokens."""
        return sum(_PER_TOKEN * length + _PER_RESPONSE for length in lengths)

    def check_room(self, lengths: list[int]) -> None:
        """Refuses to begin where the disk has no room for responses with so many completion tokens."""
        cure = "free some, or choose another --ref_cache_dir"
        check_room(self.directory, self.size(lengths), "the reference's log-probabilities need", cure)

    def describe(self) -> None:
        """Rewrites meta.json, for people."""
        responses = tokens = 0
        for path in self._segments():
            if path in self.damaged:
                continue
            with safe_open(path, framework="numpy") as file:
                lengths = file.get_tensor("lengths")
            responses, tokens = responses + len(lengths), tokens + int(lengths.sum())
        meta = {"model": self.model_name, **asdict(self.identity), "format": FORMAT}
        meta |= {"responses": responses, "tokens": tokens}
        write_whole(self.directory / "meta.json", (json.dumps(meta, indent=1) + "\n").encode())

    def _segments(self) -> list[Path]:
        return sorted(self.directory.glob("segment-*.safetensors"))

    def _take(self, path: Path, wanted: dict[bytes, int], found: dict[bytes, Entry]) -> None:
        """Copies what is wanted and not found yet out of one segment."""
        content = path.read_bytes()
        if _name_of(content) != path.name:
            raise ValueError("its content is not what was written")
        tensors = load(content)
        lengths, logprobs, lse = (tensors[name] for name in ("lengths", "logprobs", "lse"))
        raw = tensors["keys"].tobytes()
        keys = [raw[i : i + 32] for i in range(0, len(raw), 32)]
        if len(keys) != len(lengths):
            raise ValueError(f"{len(keys)} keys, {len(lengths)} lengths")
        chosen = [i for i, key in enumerate(keys) if key in wanted and key not in found]
        if not chosen:
            return
        ends = lengths.cumsum()
        if not len(logprobs) == len(lse) == ends[-1]:
            raise ValueError(f"lengths add up to {ends[-1]}, {len(logprobs)} logprobs, {len(lse)} lse")
        counts = lengths[chosen]
        if counts.tolist() != [wanted[keys[i]] for i in chosen]:
            raise ValueError("lengths differ from the responses'")
        into = counts.cumsum()  # one block a segment, holding nothing that is not wanted; entries are views of it
        rows = np.arange(into[-1]) + np.repeat(ends[chosen] - into, counts)
        logprobs, lse = logprobs[rows], lse[rows]
        bounds = [0, *into.tolist()]
        for i, begin, end in zip(chosen, bounds, bounds[1:]):
            found[keys[i]] = Entry(logprobs[begin:end], lse[begin:end])
