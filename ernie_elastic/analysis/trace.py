"""What a routing recorder leaves: which experts every token chose, or only how often each expert was chosen.

`RoutingTrace` keeps every choice, `RoutingCounts` only sums; statistics, figures and the report need the sums alone.
Files are npz archives without pickle, written whole or not at all; a damaged one is a FormatError when it is read.

Shape letters: T tokens, L layers with a router, K experts chosen per token, M tasks, E experts per layer.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ernie_elastic.errors import CheckpointError, DataError, FormatError
from ernie_elastic.stages import write_atomic

NO_TASK = -1  # a padded position: kept in a trace, counted nowhere
TRACE_VERSION = 1
_CHUNK_CHOICES = 4_000_000  # choices counted at once, so that a long trace needs little extra memory


@dataclass(frozen=True)
class TraceHeader:
    """What was traced, as every figure prints it.

    layers: model layer index of each traced layer, increasing. num_experts: routed experts per layer, E.
    source: what the tokens are, in words. shared_experts: always-on experts, which no trace contains.
    kept_experts: for a sub-model that runs by masking, the expert ids that each layer may still choose; None = all.
    """

    model: str
    spec: str
    num_experts: int
    top_k: int
    layers: tuple[int, ...]
    source: str = ""
    shared_experts: int = 0
    kept_experts: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts <= 65536:
            raise DataError(f"routing trace: top_k {self.top_k} of {self.num_experts} experts; need 1 <= k <= N")
        if not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise DataError(f"routing trace: layers {list(self.layers)} must be a non-empty increasing list of indices")
        if self.kept_experts is None:
            return
        if len(self.kept_experts) != len(self.layers):
            raise DataError(f"routing trace: {len(self.kept_experts)} kept-expert lists for {len(self.layers)} layers")
        for layer, kept in zip(self.layers, self.kept_experts, strict=True):
            inside = bool(kept) and list(kept) == sorted(set(kept)) and 0 <= kept[0] <= kept[-1] < self.num_experts
            if not inside or len(kept) < self.top_k:
                raise DataError(
                    f"routing trace: layer {layer} keeps experts {list(kept)}; need at least top_k = {self.top_k} "
                    f"increasing ids in 0..{self.num_experts - 1}"
                )

    def available(self) -> np.ndarray:
        """bool [L, E]: the experts that each layer may choose."""
        if self.kept_experts is None:
            return np.ones((len(self.layers), self.num_experts), dtype=bool)
        mask = np.zeros((len(self.layers), self.num_experts), dtype=bool)
        for index, kept in enumerate(self.kept_experts):
            mask[index, list(kept)] = True
        return mask

    @staticmethod
    def from_json(data: dict[str, Any]) -> TraceHeader:
        """Inverse of `dataclasses.asdict` after a JSON round trip. Raises KeyError, TypeError or DataError."""
        known = {f.name: data[f.name] for f in fields(TraceHeader)}
        kept = known["kept_experts"]
        known["layers"] = tuple(int(layer) for layer in known["layers"])
        known["kept_experts"] = None if kept is None else tuple(tuple(int(e) for e in row) for row in kept)
        return TraceHeader(**known)


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """Every routing choice of T tokens.

    expert_ids: uint8 (E <= 256) or uint16 [T, L, K], the K ids of a token distinct. task: int8 [T], an index into
    task_names, or -1 for padding. phase: uint8 [T], an index into phase_names. weights: float16 [T, L, K], the combine
    weights. Raises DataError when these do not fit each other. ours: the array form that engines already return.
    """

    expert_ids: np.ndarray
    task: np.ndarray
    task_names: tuple[str, ...]
    header: TraceHeader
    phase: np.ndarray | None = None
    phase_names: tuple[str, ...] = ("prefill", "decode")
    weights: np.ndarray | None = None

    def __post_init__(self) -> None:
        header, ids = self.header, self.expert_ids
        expected = (self.task.shape[0] if self.task.ndim == 1 else -1, len(header.layers), header.top_k)
        if ids.dtype not in (np.uint8, np.uint16) or ids.shape != expected:
            raise DataError(
                f"routing trace: expert_ids is {ids.dtype} {list(ids.shape)}, expected uint8 or uint16 "
                f"[tokens, layers, k] = {list(expected)}"
            )
        if ids.size and int(ids.max()) >= header.num_experts:
            raise DataError(f"routing trace: expert id {int(ids.max())}, the header has {header.num_experts} experts")
        check_names(self.task_names)
        _check_labels("task", self.task, np.int8, len(self.task_names), NO_TASK)
        if self.phase is not None:
            _check_labels("phase", self.phase, np.uint8, len(self.phase_names), 0)
            if self.phase.shape != self.task.shape:
                raise DataError(f"routing trace: {self.phase.shape[0]} phases for {self.task.shape[0]} tokens")
        if self.weights is not None and (self.weights.dtype != np.float16 or self.weights.shape != ids.shape):
            raise DataError(
                f"routing trace: weights are {self.weights.dtype} {list(self.weights.shape)}, expected float16 "
                f"{list(ids.shape)}"
            )


@dataclass(frozen=True, eq=False)
class RoutingCounts:
    """How many tokens of each task chose each expert.

    counts: int64 [M, L, E]. tokens: int64 [M]; counts.sum(-1) is tokens * k in every layer, since no token is dropped.
    Raises DataError when they do not fit.
    """

    counts: np.ndarray
    tokens: np.ndarray
    task_names: tuple[str, ...]
    header: TraceHeader

    def __post_init__(self) -> None:
        header = self.header
        check_names(self.task_names)
        expected = (len(self.task_names), len(header.layers), header.num_experts)
        if self.counts.dtype != np.int64 or self.counts.shape != expected:
            raise DataError(
                f"routing counts: counts is {self.counts.dtype} {list(self.counts.shape)}, expected int64 "
                f"{list(expected)}"
            )
        if self.tokens.dtype != np.int64 or self.tokens.shape != expected[:1] or (self.tokens < 0).any():
            raise DataError(f"routing counts: tokens must be int64 >= 0 [{expected[0]}], got {self.tokens!r}")
        if (self.counts < 0).any() or (self.counts > self.tokens[:, None, None]).any():
            raise DataError("routing counts: an expert's count lies outside of 0..tokens of its task")
        sums, wanted = self.counts.sum(-1), (self.tokens * header.top_k)[:, None]
        if (sums != wanted).any():
            task, layer = np.argwhere(sums != wanted)[0]
            raise DataError(
                f"routing counts: task {self.task_names[task]!r} has {sums[task, layer]} choices in layer "
                f"{header.layers[layer]}, expected tokens * k = {wanted[task, 0]}"
            )
        forbidden = self.counts.sum(0) * ~header.available()
        if forbidden.any():
            layer, expert = np.argwhere(forbidden)[0]
            raise DataError(f"routing counts: layer {header.layers[layer]} chose expert {expert}, which is not kept")


Routing = TypeVar("Routing", RoutingTrace, RoutingCounts)


def check_names(names: tuple[str, ...]) -> None:
    """Raise DataError unless these are 1 to 127 different task names."""
    if not names or len(set(names)) != len(names) or len(names) > 127:
        raise DataError(f"routing trace: task names {list(names)} must be 1 to 127 different names")


def _check_labels(what: str, labels: np.ndarray, dtype: type, count: int, lowest: int) -> None:
    if labels.ndim != 1 or labels.dtype != dtype:
        raise DataError(
            f"routing trace: {what} is {labels.dtype} {list(labels.shape)}, expected {dtype.__name__} [tokens]"
        )
    if labels.size and not lowest <= int(labels.min()) <= int(labels.max()) < count:
        raise DataError(
            f"routing trace: {what} holds {int(labels.min())}..{int(labels.max())}, expected {lowest}..{count - 1}"
        )


def counts_from_trace(trace: RoutingTrace, phase: str | None = None) -> RoutingCounts:
    """Counts int64 [M, L, E] of a trace; padding is left out. phase: count the tokens of this phase only.

    Raises DataError when a token names one expert twice, or when the phase is not in the trace.
    """
    header, num_tasks = trace.header, len(trace.task_names)
    use = trace.task != NO_TASK
    if phase is not None:
        if trace.phase is None or phase not in trace.phase_names:
            known = "no phases" if trace.phase is None else ", ".join(trace.phase_names)
            raise DataError(f"routing trace: phase {phase!r} asked for, but the trace has {known}")
        use = use & (trace.phase == trace.phase_names.index(phase))
    rows = np.flatnonzero(use)
    num_layers, experts = len(header.layers), header.num_experts
    cells = num_tasks * num_layers * experts
    flat = np.zeros(cells, dtype=np.int64)
    step = max(1, _CHUNK_CHOICES // (num_layers * header.top_k))
    for start in range(0, len(rows), step):
        chunk = rows[start : start + step]
        ids_TLK = np.sort(trace.expert_ids[chunk].astype(np.int64), axis=-1)
        twice = (ids_TLK[..., 1:] == ids_TLK[..., :-1]).any(-1)
        if twice.any():
            token, layer = np.argwhere(twice)[0]
            raise DataError(
                f"routing trace: token {int(chunk[token])} names one expert twice in layer {header.layers[layer]}: "
                f"{ids_TLK[token, layer].tolist()}; the {header.top_k} ids of a token must differ"
            )
        group_TL = trace.task[chunk].astype(np.int64)[:, None] * num_layers + np.arange(num_layers)
        flat += np.bincount((group_TL[..., None] * experts + ids_TLK).ravel(), minlength=cells)
    tokens = np.bincount(trace.task[rows], minlength=num_tasks).astype(np.int64)
    return RoutingCounts(flat.reshape(num_tasks, num_layers, experts), tokens, trace.task_names, header)


def merge(parts: Sequence[Routing]) -> Routing:
    """One trace (tokens in order) or one count table (sums) out of several of the same kind.

    The result has the header of the first part. Raises DataError when experts, k, layers or names differ, or when only
    some traces have phases or weights.
    """
    if not parts:
        raise DataError("routing trace: nothing to merge; pass at least one part")
    first = parts[0]
    for part in parts[1:]:
        mine, theirs = _identity(first), _identity(part)
        for name in mine:
            if mine[name] != theirs[name]:
                raise DataError(f"routing trace: cannot merge, {name} differs: {mine[name]} and {theirs[name]}")
    joined: dict[str, Any] = {}
    if isinstance(first, RoutingCounts):
        for name in ("counts", "tokens"):
            joined[name] = np.sum([getattr(part, name) for part in parts], axis=0)
    else:
        for name in ("expert_ids", "task", "phase", "weights"):
            values = [getattr(part, name) for part in parts]
            joined[name] = None if values[0] is None else np.concatenate(values)
    return replace(first, **joined)


def _identity(part: RoutingTrace | RoutingCounts) -> dict[str, Any]:
    """What must agree before two parts are added up."""
    header = part.header
    same: dict[str, Any] = {
        "kind": type(part).__name__,
        "num_experts": header.num_experts,
        "top_k": header.top_k,
        "layers": header.layers,
        "kept_experts": header.kept_experts,
        "task_names": part.task_names,
    }
    if isinstance(part, RoutingTrace):
        same["phase_names"] = None if part.phase is None else part.phase_names
        same["weights"] = part.weights is not None
    return same


def save_trace(path: Path | str, data: RoutingTrace | RoutingCounts) -> None:
    """Write a trace or counts as one compressed npz, whole or not at all. Raises CheckpointError on a full disk."""
    header: dict[str, Any] = {"version": TRACE_VERSION, **asdict(data.header), "task_names": list(data.task_names)}
    if isinstance(data, RoutingTrace):
        used = data.task[data.task != NO_TASK]
        tokens = np.bincount(used, minlength=len(data.task_names))
        optional = {"phase": data.phase, "weights": data.weights}
        arrays = {"expert_ids": data.expert_ids, "task": data.task}
        arrays |= {name: array for name, array in optional.items() if array is not None}
        header |= {"kind": "trace", "phase_names": list(data.phase_names)}
    else:
        tokens, arrays = data.tokens, {"counts": data.counts, "tokens": data.tokens}
        header["kind"] = "counts"
    header["arrays"] = sorted(arrays)  # an optional one that damage hides from the archive's index is missed on reading
    header["token_counts"] = dict(zip(data.task_names, tokens.tolist(), strict=True))
    packed = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, header=packed, **arrays)
    write_atomic(Path(path), buffer.getvalue())


def load_trace(path: Path | str) -> RoutingTrace:
    """Read a full trace. Raises CheckpointError when the file is missing, FormatError when it is damaged or counts."""
    data = _load(Path(path))
    if not isinstance(data, RoutingTrace):
        raise FormatError(f"{path} holds counts, not a token-by-token trace; read it with load_counts")
    return data


def load_counts(path: Path | str) -> RoutingCounts:
    """Read counts, or a full trace and count it. Raises CheckpointError (missing) or FormatError (damaged)."""
    data = _load(Path(path))
    if isinstance(data, RoutingCounts):
        return data
    try:
        return counts_from_trace(data)
    except DataError as error:
        raise FormatError(f"{path} is not a valid routing trace: {error}; record it anew") from error


def _load(path: Path) -> RoutingTrace | RoutingCounts:
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file; expected a routing trace (.npz); record one first")
    damage = (
        ValueError,
        KeyError,
        TypeError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
        NotImplementedError,
        OSError,
        MemoryError,
        RuntimeError,
        AttributeError,
    )
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        return _build(arrays)
    except damage as error:
        reason = str(error) or type(error).__name__
        raise FormatError(f"{path} is not a valid routing trace: {reason}; record it anew") from error


def _build(arrays: dict[str, np.ndarray]) -> RoutingTrace | RoutingCounts:
    """The object that the arrays of a file describe; any inconsistency raises."""
    info = json.loads(arrays.pop("header").tobytes())
    if info["version"] > TRACE_VERSION:
        raise ValueError(f"format version {info['version']}, this package reads up to {TRACE_VERSION}")
    if sorted(arrays) != info["arrays"]:
        raise ValueError(f"it holds the arrays {sorted(arrays)}, its header says {info['arrays']}")
    header, names = TraceHeader.from_json(info), tuple(str(name) for name in info["task_names"])
    data: RoutingTrace | RoutingCounts
    if info["kind"] == "counts":
        data = RoutingCounts(arrays["counts"], arrays["tokens"], names, header)
        tokens = data.tokens
    else:
        data = RoutingTrace(
            arrays["expert_ids"],
            arrays["task"],
            names,
            header,
            arrays.get("phase"),
            tuple(str(name) for name in info["phase_names"]),
            arrays.get("weights"),
        )
        tokens = np.bincount(data.task[data.task != NO_TASK], minlength=len(names))
    if tokens.tolist() != [info["token_counts"][name] for name in names]:
        raise ValueError(f"the arrays hold {tokens.tolist()} tokens, the header says {info['token_counts']}")
    return data
