"""Libraries that stand in for the CUDA libraries that a torch of the package index wants to load.

Run with the Python of an environment in which torch was installed without its dependencies, before
the first import of it. Torch for Linux is built with CUDA and does not load without its libraries,
several gigabytes, also where there is no GPU. Here each is replaced by one of a few kilobytes whose
functions all say that there is no device. Needs gcc, readelf and nm; takes seconds. What torch's
metadata says about these libraries goes too, so that pip does not fetch them later.
"""

from __future__ import annotations

import re
import subprocess
import sysconfig
import tempfile
from collections import defaultdict
from pathlib import Path

#: Each library without its version, and how the names of its functions begin where they carry none.
LIBRARIES = {
    "libcublas": "cublas",
    "libcublasLt": "cublasLt",
    "libcudart": "cuda",
    "libcudnn": "cudnn",
    "libcufft": "cufft",
    "libcufile": "cuFile",
    "libcupti": "cupti",
    "libcurand": "curand",
    "libcusolver": "cusolver",
    "libcusparse": "cusparse",
    "libcusparseLt": "cusparseLt",
    "libnccl": "nccl",
    "libnvToolsExt": "nvtx",
    "libnvrtc": "nvrtc",
    "libnvshmem_host": "nvshmem",
}
NO_DEVICE = 100  # cudaErrorNoDevice


def told(*command: str) -> str:
    """What a command prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def symbols(folder: Path) -> tuple[set[str], dict[str, set[str]], set[str]]:
    """What the libraries in a folder need, what they lack by version, and what they define."""
    needed: set[str] = set()
    lacking: dict[str, set[str]] = defaultdict(set)
    defined: set[str] = set()
    for library in sorted(folder.glob("*.so*")):
        if library.name.partition(".so")[0] in LIBRARIES:
            continue  # from an earlier run
        needed |= set(re.findall(r"NEEDED.*\[(.*?)\]", told("readelf", "-d", str(library))))
        for line in told("nm", "-D", str(library)).splitlines():
            *_, kind, symbol = line.split()
            name, _, version = symbol.partition("@")
            if kind == "U":
                lacking[version.lstrip("@")].add(name)
            else:
                defined.add(name)
    return needed, lacking, defined


def source(names: list[str]) -> str:
    """A library in C that has these functions."""
    lines = ["static int unused;"]
    for name in names:
        if "ErrorString" in name or "ErrorName" in name:
            lines.append(f'const char *{name}(void){{return "stub";}}')
        elif name.startswith("__cuda"):  # registers compiled code as torch loads
            lines.append(f"void *{name}(void){{return 0;}}")
        else:
            lines.append(f"int {name}(void){{return {NO_DEVICE};}}")
    return "\n".join([*lines, ""])


def build(folder: Path, library: str, version: str, names: list[str]) -> None:
    """Compile one library, with its symbols under a version if they have one."""
    with tempfile.TemporaryDirectory() as scratch:
        code, script = Path(scratch, "stub.c"), Path(scratch, "stub.map")
        code.write_text(source(names), encoding="ascii")
        command = ["gcc", "-shared", "-fPIC", "-w", "-fno-builtin", f"-Wl,-soname,{library}"]
        if version:
            script.write_text(f"{version} {{ global: *; }};\n", encoding="ascii")
            command.append(f"-Wl,--version-script={script}")
        subprocess.run([*command, "-o", str(folder / library), str(code)], check=True)


def main() -> None:
    """Make the libraries, and mend what torch says that it needs."""
    site = Path(sysconfig.get_paths()["purelib"])
    folder = site / "torch/lib"
    needed, lacking, defined = symbols(folder)
    made = sorted(name for name in needed if name.partition(".so")[0] in LIBRARIES)
    for library in made:
        version = library if library in lacking else "NVSHMEM" if "nvshmem" in library else ""
        prefix = LIBRARIES[library.partition(".so")[0]]
        missing = sorted(lacking.get(version, set()) - defined)
        names = [name for name in missing if version or name.startswith(prefix)]
        build(folder, library, version, names)
    for metadata in site.glob("torch-*.dist-info/METADATA"):
        text = metadata.read_text(encoding="utf-8")
        without = re.sub(r"(?m)^Requires-Dist: (?:nvidia-|triton\b).*\n", "", text)
        metadata.write_text(without, encoding="utf-8")
    print(f"{len(made)} libraries that say that there is no device are in {folder}")


if __name__ == "__main__":
    main()
