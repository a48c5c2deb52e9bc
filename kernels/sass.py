"""Counts instructions in compiled kernels, with the disassembler that the triton package carries. No GPU needed."""

import importlib.util
import os
import re
import subprocess
from collections import Counter
from pathlib import Path

# The block-scaled tensor-core instruction of each architecture: a kernel without it does not compute in 4 bits.
BLOCK_SCALED = {"100f": "UTCOMMA", "120f": "OMMA.SF"}


def _tools() -> Path:
    spec = importlib.util.find_spec("triton")  # found, not imported
    folder = Path(spec.submodule_search_locations[0]) / "backends" / "nvidia" / "bin" if spec else None
    if folder is None or not (folder / "cuobjdump").is_file() or not (folder / "nvdisasm").is_file():
        raise RuntimeError("cuobjdump and nvdisasm not found: pip install triton==3.7.1 (they come in its wheel)")
    return folder


def opcodes(library: Path) -> Counter[str]:
    """How often each SASS opcode (with its suffixes) occurs in the device code of a library.

    Raises RuntimeError when the disassembler is missing or fails.
    """
    folder = _tools()
    environment = {
        **os.environ,
        "PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}",
    }  # cuobjdump calls nvdisasm
    result = subprocess.run(
        [folder / "cuobjdump", "--dump-sass", library], capture_output=True, text=True, env=environment, timeout=300
    )
    if result.returncode != 0:
        raise RuntimeError(f"cuobjdump {library}: {result.stderr.strip()[-500:]}")
    # "/*0040*/   @!P0 UTCOMMA.4X gdesc[UR4], ... ;": address, an optional predicate, the opcode
    return Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", result.stdout, re.MULTILINE))


def block_scaled_count(library: Path, arch: str) -> int:
    """How many block-scaled tensor-core instructions of `arch` ("100f" or "120f") the library holds."""
    return sum(count for name, count in opcodes(library).items() if name.startswith(BLOCK_SCALED[arch]))
