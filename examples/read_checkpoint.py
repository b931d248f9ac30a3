"""Reads a checkpoint without drivetrain: ``read_checkpoint.py NAME.ckpt`` prints what is in it."""

import json
import sys
from pathlib import Path

import torch
import xxhash
from safetensors.torch import load_file


def read_checkpoint(folder: Path) -> dict:
    """The tree, with tensors; values in codecs are left as the file has them."""
    manifest = (folder / "manifest.json").read_bytes()
    unhashed = manifest[:-36] + b"0" * 32 + manifest[-4:]
    assert xxhash.xxh3_128_hexdigest(unhashed).encode() == manifest[-36:-4], "manifest.json"
    manifest = json.loads(manifest)
    assert (manifest["format"], manifest["version"]) == ("drivetrain.checkpoint", 1)
    for name, file in manifest["files"].items():
        assert xxhash.xxh3_128_hexdigest((folder / name).read_bytes()) == file["xxh3_128"], name
    files = {n: load_file(folder / n) for n in manifest["files"] if n != manifest["state"]}
    tensors = {}
    for name, entry in manifest["tensors"].items():
        whole = tensors[name] = torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]))
        for shard in entry["shards"]:
            part = files[shard["file"]][shard["key"]].view(whole.dtype).reshape(shard["shape"])
            box = zip(shard["start"], shard["shape"], strict=True)
            whole[tuple(slice(start, start + size) for start, size in box)] = part

    def tensor(value: dict) -> object:
        return tensors[value["name"]] if value.get("$") == "tensor" else value

    return json.loads((folder / manifest["state"]).read_bytes(), object_hook=tensor)


if __name__ == "__main__":
    for key, value in read_checkpoint(Path(sys.argv[1])).items():
        print(f"{key}: {value}")
