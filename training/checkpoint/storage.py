"""Checkpoint storage for torch.distributed.checkpoint (DCP): safetensors shards and a JSON index, no pickle anywhere.

DCP's own FileSystemWriter writes its `.metadata` and its shards with pickle, so that whoever can write a checkpoint
can run code in the process that loads it. This writer and reader use DCP's planners (resharding between world
sizes and parallel modes) over a plain format instead.

torch's own safetensors pair (HuggingFaceStorageWriter and -Reader, tried with 2.13) reshards without pickle, too, but
its save holds a second copy of a rank's state in memory (1.9 GB more for 1.0 GB), writes into the final folder without
checksums (a flipped bit loads silently), and keeps one chunk a tensor and rank (a second one replaces the first).


    shard_00003_01.safetensors   tensors held by rank 3, second file of at most FILE_BYTES
    index.json                   {fqn: {dtype, shape, chunks: [{file, key, offset, shape}]}}

Saving has two halves. `StagingWriter`, driven by `dcp.save`, only plans and copies the shards into host buffers that
outlive the save (the stall of the training loop). Writing the buffers to disk is publish.py's, in a thread.
"""

import json
import math
import os
import secrets
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint import LoadPlan, LoadPlanner, SavePlan, SavePlanner, StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from base.words import some

INDEX = "index.json"
TEMPORARY = ".tmp-"  # how the names of folders begin that are being written or removed
# A power of two, because the pinned-memory allocator rounds a request up to one.
FILE_BYTES = 2**30
IO_THREADS = 4
NAMES_SHOWN = 5
SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class CheckpointError(RuntimeError):
    """A checkpoint can't be written, isn't whole, or doesn't fit the run; the message says which and what to do."""


class NonFiniteState(CheckpointError):
    """A NaN or infinity in weights or optimizer state; `names`: the stored names of the tensors. Nothing was saved."""

    def __init__(self, step: int, names: list[str]) -> None:
        super().__init__(f"step {step} was not saved: values that are not finite in {first_names(names)}")
        self.step, self.names = step, names


def first_names(names: list[str]) -> str:
    """The first few of them, and how many more."""
    return some(sorted(names), NAMES_SHOWN)


@dataclass(frozen=True)
class StagedFile:
    """One safetensors file to be: its header, and its data section as a host buffer of uint8."""

    name: str
    header: bytes
    data: Tensor


class StagingBuffers:
    """Host buffers kept between saves; pinned when the tensors come from a GPU.

    Pinned memory is what makes the copy fast; allocating it is slow (6 s for 12 GB): `reserve` does it in a thread,
    while the first step compiles, else the first save pays.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._spare: list[Tensor] = []
        self._thread: threading.Thread | None = None

    def reserve(self, nbytes: int, pinned: bool = True) -> None:
        """Begin to allocate what a save of nbytes needs, in files of FILE_BYTES. Where there is less memory, what was
        not allocated is asked for by the save itself, whose error is the user's."""

        def allocate() -> None:
            with suppress(RuntimeError):
                for _ in range(math.ceil(nbytes / FILE_BYTES)):
                    self._spare.append(torch.empty(FILE_BYTES, dtype=torch.uint8, pin_memory=pinned))

        self._thread = threading.Thread(target=allocate, name="staging", daemon=True)
        self._thread.start()

    def get(self, name: str, nbytes: int, pinned: bool) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() != nbytes or buffer.is_pinned() != pinned:
            self._buffers[name] = buffer = self._take(nbytes, pinned)
        return buffer

    def _take(self, nbytes: int, pinned: bool) -> Tensor:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if nbytes <= FILE_BYTES and self._spare and self._spare[-1].is_pinned() == pinned:
            return self._spare.pop()[:nbytes]
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)


def _entry_key(index: MetadataIndex) -> str:
    offset = index.offset or ()
    return f"{index.fqn}@{','.join(map(str, offset))}" if any(offset) else index.fqn


def _item_bytes(item: WriteItem) -> int:
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize


def _buckets(items: Iterable[WriteItem]) -> list[list[WriteItem]]:
    """Items in files of at most FILE_BYTES (or one larger tensor), wide dtypes first so that views are aligned."""
    ordered = sorted(items, key=lambda i: (-i.tensor_data.properties.dtype.itemsize, i.index.fqn, i.index.offset or ()))
    files: list[list[WriteItem]] = []
    used = 0
    for item in ordered:
        nbytes = _item_bytes(item)
        if not files or used + nbytes > FILE_BYTES:
            files.append([])
            used = 0
        files[-1].append(item)
        used += nbytes
    return files


def _header(items: list[WriteItem]) -> bytes:
    """safetensors header: 8-byte little-endian length, then JSON, padded with spaces to a multiple of 8."""
    entries, begin = {}, 0
    for item in items:
        end = begin + _item_bytes(item)
        dtype = SAFETENSORS_DTYPES[item.tensor_data.properties.dtype]
        shape = list(item.tensor_data.chunk.sizes)
        entries[_entry_key(item.index)] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class StagingWriter(StorageWriter):
    """DCP storage writer that stages this rank's shards in host memory. Afterwards `folder`, `files` and, on the
    coordinator, `index` say what is to be written where. `check_space` gets the bytes of the whole checkpoint, on the
    coordinator, before anything is copied."""

    def __init__(self, root: Path, name: str, buffers: StagingBuffers, check_space: Callable[[int], None]) -> None:
        self.root, self.name, self.buffers, self.check_space = root, name, buffers, check_space
        self.folder: Path | None = None
        self.files: list[StagedFile] = []
        self.index: dict[str, Any] | None = None
        self.total_bytes = 0

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        self.files, self.index = [], None

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO:
                raise CheckpointError(f"{item.index.fqn} is not a tensor: checkpoints hold tensors and JSON only")
            if item.tensor_data.properties.dtype not in SAFETENSORS_DTYPES:
                raise CheckpointError(f"{item.index.fqn} has dtype {item.tensor_data.properties.dtype}, not storable")
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Coordinator only: choose a folder that no earlier, killed attempt can have used, and tell every rank."""
        self.total_bytes = sum(_item_bytes(item) for plan in plans for item in plan.items)
        self.root.mkdir(parents=True, exist_ok=True)
        self.check_space(self.total_bytes)
        folder = self.root / f"{TEMPORARY}{self.name}-{secrets.token_hex(4)}"
        folder.mkdir()
        return [replace(p, storage_data={"folder": str(folder), "shard": i}) for i, p in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        self.folder = Path(plan.storage_data["folder"])
        shard, results = plan.storage_data["shard"], []
        for i, items in enumerate(_buckets(plan.items)):
            name = f"shard_{shard:05d}_{i:02d}.safetensors"
            self.files.append(self._stage(name, items, planner))
            for item in items:
                where = {"file": name, "key": _entry_key(item.index)}
                results.append(WriteResult(item.index, _item_bytes(item), where))
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the optimizer changes the weights right after this returns
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _stage(self, name: str, items: list[WriteItem], planner: SavePlanner) -> StagedFile:
        tensors = [planner.resolve_data(item).detach() for item in items]
        pinned = any(t.is_cuda for t in tensors)
        data = self.buffers.get(name, sum(_item_bytes(item) for item in items), pinned)
        begin = 0
        for item, tensor in zip(items, tensors, strict=True):
            end = begin + _item_bytes(item)
            target = data[begin:end].view(tensor.dtype).view(tensor.shape)
            target.copy_(tensor, non_blocking=True)
            begin = end
        return StagedFile(name, _header(items), data)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        where = {result.index: result.storage_data for rank_results in results for result in rank_results}
        self.index = {}
        for fqn, tensor in metadata.state_dict_metadata.items():
            chunks = [
                {**where[MetadataIndex(fqn, c.offsets)], "offset": list(c.offsets), "shape": list(c.sizes)}
                for c in tensor.chunks
            ]
            dtype = str(tensor.properties.dtype).removeprefix("torch.")
            self.index[fqn] = {"dtype": dtype, "shape": list(tensor.size), "chunks": chunks}

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


def read_index(folder: Path) -> dict[str, Any]:
    """index.json of a checkpoint folder. Raises CheckpointError where it can't be read."""
    try:
        return json.loads((folder / INDEX).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / INDEX}: {error}") from error


def dtype_named(name: str) -> torch.dtype:
    """torch.float32 for "float32". Raises CheckpointError for one that safetensors doesn't know."""
    known = {str(dtype).removeprefix("torch."): dtype for dtype in SAFETENSORS_DTYPES}
    if name not in known:
        raise CheckpointError(f"{INDEX}: unknown dtype {name!r}; known: {', '.join(known)}")
    return known[name]


class ShardReader(StorageReader):
    """DCP storage reader of what `StagingWriter` and publish.py wrote. Reads only the slices asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors, where = {}, {}
        for fqn, entry in read_index(self.folder).items():
            where |= {MetadataIndex(fqn, torch.Size(c["offset"])): c for c in entry["chunks"]}
            chunks = [ChunkStorageMetadata(torch.Size(c["offset"]), torch.Size(c["shape"])) for c in entry["chunks"]]
            properties = TensorProperties(dtype=dtype_named(entry["dtype"]))
            tensors[fqn] = TensorStorageMetadata(properties, torch.Size(entry["shape"]), chunks)
        return Metadata(tensors, storage_data=where)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.where: dict[MetadataIndex, dict[str, Any]] = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        per_file: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            per_file[self.where[item.storage_index]["file"]].append(item)
        with ThreadPoolExecutor(IO_THREADS) as pool:
            list(pool.map(lambda entry: self._read_file(*entry, planner), per_file.items()))
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _read_file(self, name: str, items: list[ReadItem], planner: LoadPlanner) -> None:
        with safe_open(self.folder / name, framework="pt") as file:
            for item in items:
                key = self.where[item.storage_index]["key"]
                spans = zip(item.storage_offsets, item.lengths, strict=True)
                slices = tuple(slice(begin, begin + length) for begin, length in spans)
                source = file.get_slice(key)[slices] if slices else file.get_tensor(key)
                target = planner.resolve_tensor(item).detach()
                target.copy_(source)
                planner.commit_tensor(item, target)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return Path(checkpoint_id).is_dir()
