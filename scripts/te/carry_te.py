"""Pack Transformer Engine for a GPU machine without internet: about 45 MB instead of 290.

    python scripts/te/carry_te.py te_bundle                       # here; then copy te_bundle to the GPU machine
    python scripts/te/install_te.py te_bundle /tmp/te_site        # there; then export PYTHONPATH=/tmp/te_site

The size is the CUDA library: libtransformer_engine.so holds code for seven architectures. Every code object that is not
for `--arch` is overwritten by zeros inside `.nv_fatbin` (headers stay, so the loader still walks the list and picks the
one that fits), after which the file compresses from 343 MB to 24 MB. Tried with 2.20.2 on an H100. The bundle runs on
GPUs of that architecture only.

Needs pip with access to a package index, `readelf`, and about 2 GB of disk. No GPU and no torch.
"""

import argparse
import io
import lzma
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from base.terminal import one_line_on_ctrl_c

if __name__ == "__main__":
    one_line_on_ctrl_c("carry_te")

FATBIN_MAGIC = 0xBA55ED50
ARCH_OFFSET = 28  # of the 32-bit architecture number in a fatbin entry's header

LIBRARY = "transformer_engine/wheel_lib/libtransformer_engine.so"
# Loaded at run time only for NCCL expert parallelism; JAX bindings are not for us.
LEFT_OUT = ("transformer_engine/jax/", "transformer_engine/wheel_lib/", "transformer_engine/common/include/")

# Run-time needs that an image with PyTorch usually lacks. pydantic pins one pydantic-core, so both are named.
# importlib-metadata: 9 and later need a further package, lazy-importer.
WHEELS = (
    "pydantic==2.14.3",
    "pydantic-core==2.50.4",
    "annotated-types",
    "typing-extensions",
    "typing-inspection",
    "importlib-metadata<9",
    "nvdlfw-inspect",
)


def pip_download(folder: Path, requirements: tuple[str, ...], python: str) -> None:
    """Download wheels for Linux x86-64 and `python` ("3.12") into `folder`, without their dependencies."""
    platforms = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    command += ["--implementation", "cp", "--python-version", python]
    for platform in platforms:
        command += ["--platform", platform]
    subprocess.run([*command, *requirements], check=True)


def download_sdist(name: str, version: str, folder: Path) -> None:
    """Fetch an sdist by pip's own finder. `pip download` would first prepare its metadata, and this package's needs
    a torch built with CUDA for that."""
    from pip._internal.commands.download import DownloadCommand
    from pip._internal.network.download import Downloader

    command = DownloadCommand("download", "")
    with command.main_context():
        options, _ = command.parse_args([name, "--no-binary=:all:", "--no-deps"])
        session = command.get_default_session(options)
        finder = command._build_package_finder(options, session)
        found = [c.link for c in finder.find_all_candidates(name) if str(c.version) == version]
        if not found:
            raise SystemExit(f"{name} {version}: the package index has no sdist of it; choose another --version")
        Downloader(session, "off")(found[0], str(folder))


def fatbin_section(library: Path) -> tuple[int, int]:
    """File offset and size in bytes of `.nv_fatbin`."""
    listing = subprocess.run(["readelf", "-SW", library], capture_output=True, text=True, check=True).stdout
    for line in listing.splitlines():
        if " .nv_fatbin " in line:
            fields = line.split("]")[1].split()
            return int(fields[3], 16), int(fields[4], 16)
    raise SystemExit(f"{library}: no section .nv_fatbin; this is not a CUDA library that this script understands")


def keep_architecture(data: bytearray, offset: int, size: int, arch: int) -> tuple[int, int]:
    """Zero every code object in `data[offset : offset + size]` that is not for `arch` (90 for sm_90 and sm_90a).

    Layout: containers of (magic u32, version u16, header bytes u16, payload bytes u64), each holding entries of
    (kind u16, version u16, header bytes u32, payload bytes u64, ..., architecture u32 at 28). Returns (kept, zeroed)
    counts. Raises ValueError where the bytes are not laid out so, before anything is written to a file.
    """
    kept = zeroed = 0
    position, end = offset, offset + size
    while position < end:
        magic, _, header, payload = struct.unpack_from("<IHHQ", data, position)
        if magic != FATBIN_MAGIC:
            raise ValueError(
                f"at byte {position}: got magic {magic:#x}, needed {FATBIN_MAGIC:#x}; a newer CUDA format?"
            )
        entry, stop = position + header, position + header + payload
        while entry < stop:
            _, _, entry_header, code = struct.unpack_from("<HHIQ", data, entry)
            if struct.unpack_from("<I", data, entry + ARCH_OFFSET)[0] == arch:
                kept += 1
            else:
                data[entry + entry_header : entry + entry_header + code] = bytes(code)
                zeroed += 1
            entry += entry_header + code
        if entry != stop:
            raise ValueError(f"entries end at byte {entry}, the container at {stop}; a newer CUDA format?")
        position = (stop + 7) & ~7
    if not kept:
        raise ValueError(f"no code object for architecture {arch}; give an --arch that the wheel was built for")
    return kept, zeroed


def pack_library(wheel: Path, scratch: Path, out: Path, arch: int) -> None:
    """Write OUT/libtransformer_engine.so.xz, reduced to `arch`."""
    with zipfile.ZipFile(wheel) as archive:
        library = Path(archive.extract(LIBRARY, scratch))
    data = bytearray(library.read_bytes())
    kept, zeroed = keep_architecture(data, *fatbin_section(library), arch)
    print(f"{library.name}: {kept} code objects for sm_{arch} kept, {zeroed} others zeroed; compressing (a minute)")
    (out / f"{library.name}.xz").write_bytes(lzma.compress(bytes(data), preset=6))


def pack_tree(wheels: list[Path], target: Path, wanted) -> None:
    """Write the members of `wheels` for which `wanted(name)` holds as one .tar.xz; a name that recurs is taken once."""
    seen: set[str] = set()
    with tarfile.open(target, "w:xz", preset=9) as tar:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    if name in seen or name.endswith("/") or not wanted(name):
                        continue
                    seen.add(name)
                    member = tarfile.TarInfo(name)
                    content = archive.read(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder to write the bundle to; must not exist")
    parser.add_argument("--version", default="2.20.2", help="of Transformer Engine (default: %(default)s)")
    parser.add_argument("--arch", type=int, default=90, help="compute capability times ten (default: 90, Hopper)")
    parser.add_argument("--python", default="3.12", help="the GPU machine's Python (default: %(default)s)")
    args = parser.parse_args()
    (args.out / "wheels").mkdir(parents=True)
    (args.out / "build").mkdir()

    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        engine = (f"transformer_engine=={args.version}", f"transformer_engine_cu13=={args.version}")
        pip_download(scratch, (*engine, "nvidia-cudnn-frontend>=1.29"), args.python)
        pip_download(args.out / "wheels", WHEELS, args.python)
        download_sdist("transformer_engine_torch", args.version, args.out / "build")
        (core,) = scratch.glob("transformer_engine_cu13-*.whl")
        (meta,) = scratch.glob("transformer_engine-*.whl")
        (frontend,) = scratch.glob("nvidia_cudnn_frontend-*.whl")
        pack_tree([core, meta], args.out / "tree.tar.xz", lambda name: not name.startswith(LEFT_OUT))
        pack_tree([frontend], args.out / "build" / "cudnn_frontend.tar.xz", lambda name: name.startswith("include/"))
        pack_library(core, scratch, args.out, args.arch)
    shutil.copy(Path(__file__).with_name("install_te.py"), args.out)

    total = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"{args.out}: {total / 1e6:.1f} MB. On the GPU machine: python {args.out}/install_te.py {args.out} SITE")


if __name__ == "__main__":
    main()
