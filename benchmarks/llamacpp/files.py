"""GGUF files of the very weights that xexport exports: llama.cpp's own converter, then its quantizer.

The random weights of a preset (``Family.init``, seed 0) are written in the layout that the converter
reads, a Hugging Face folder, with llama.cpp's tensor types left to llama-quantize.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamacpp.build import Log, Tools, run

__all__ = ["FORMATS", "SHAPES", "Format", "GgufFile", "gguf", "gguf_file", "summary"]


@dataclass(frozen=True)
class Format:
    """A pair of formats that are compared.

    Attributes:
        target: xexport's.
        quantize: arguments of llama-quantize; none keeps float32.
        label: what llama.cpp's side is called.
    """

    target: str
    quantize: tuple[str, ...]
    label: str


#: Q4_0 keeps the head in 6 bits (Q6_K) unless told otherwise; "int4-pure" is the one with a 4-bit head.
FORMATS = {
    "fp32": Format("cpu-fp32", (), "F32"),
    "int8": Format("cpu-int8", ("Q8_0",), "Q8_0"),
    "int4": Format("cpu-int4", ("Q4_0",), "Q4_0"),
    "int4-pure": Format("cpu-int4", ("--pure", "Q4_0"), "Q4_0, 4-bit head"),
}
#: Name on the command line -> (family, preset).
SHAPES = {
    "rwkv-12x768": ("rwkv", "0.1B"),
    "rwkv-24x1024": ("rwkv", "0.4B"),
    "mamba-24x768": ("mamba", "130m"),
    "quick": ("rwkv", "zoo"),
}


@dataclass(frozen=True)
class GgufFile:
    """One file and how its tensors are stored.

    Attributes:
        path: where it is.
        types: tensor type -> {tensors, bytes}.
        exceptions: name pattern -> type, for the matrices that are not in the majority's type.
        bytes_per_token: what a step reads: every tensor, but one row of the embedding table.
    """

    path: Path
    types: Mapping[str, Mapping[str, int]]
    exceptions: Mapping[str, str]
    bytes_per_token: int


def gguf_file(shape: str, name: str, cache: Path, tools: Tools, log: Log) -> GgufFile:
    """The GGUF of a shape in a format of :data:`FORMATS`, made if it isn't in the cache.

    Raises:
        BenchmarkError: the converter or the quantizer failed.
    """
    folder = cache / "gguf"
    folder.mkdir(exist_ok=True)
    exact = folder / f"{shape}-{tools.version}-fp32.gguf"
    if not exact.is_file():
        log(f"{shape}: converting random weights to GGUF")
        _convert(shape, exact, tools)
    wanted = folder / f"{shape}-{tools.version}-{name}.gguf"
    if not wanted.is_file():
        log(f"{shape}: quantizing to {FORMATS[name].label}")
        *flags, kind = FORMATS[name].quantize
        part = wanted.with_suffix(".part")
        run([tools.program("llama-quantize"), *flags, str(exact), str(part), kind], "llama-quantize")
        part.rename(wanted)
    return summary(wanted, tools)


def summary(path: Path, tools: Tools) -> GgufFile:
    """Read what is in a GGUF file, without its weights."""
    reader = gguf(tools).GGUFReader(str(path))
    types: dict[str, dict[str, int]] = {}
    matrices: dict[str, str] = {}
    read = 0
    for tensor in reader.tensors:
        kind, size = tensor.tensor_type.name, int(tensor.n_bytes)
        row = types.setdefault(kind, {"tensors": 0, "bytes": 0})
        row["tensors"] += 1
        row["bytes"] += size
        rows = int(tensor.shape[1]) if len(tensor.shape) > 1 else 1  # shape is width first
        read += size // rows if tensor.name == "token_embd.weight" else size
        if sum(int(d) > 1 for d in tensor.shape) > 1:
            matrices[re.sub(r"blk\.\d+\.", "", tensor.name)] = kind
    usual = max(types, key=lambda kind: types[kind]["bytes"])
    odd = {name: kind for name, kind in sorted(matrices.items()) if kind != usual}
    return GgufFile(path, types, odd, read)


def gguf(tools: Tools) -> Any:
    """The ``gguf`` package of llama.cpp's own source tree."""
    folder = str(tools.source / "gguf-py")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    import gguf as package

    return package


def _convert(shape: str, out: Path, tools: Tools) -> None:
    folder = out.with_suffix(".hf")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        _write_checkpoint(shape, folder)
        script = str(tools.source / "convert_hf_to_gguf.py")
        part = out.with_suffix(".part")
        command = [sys.executable, script, str(folder), "--outfile", str(part), "--outtype", "f32"]
        run(command, "llama.cpp's converter (it needs torch, transformers and safetensors)")
        part.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_checkpoint(shape: str, folder: Path) -> None:
    """A Hugging Face folder: config.json, model.safetensors and, for RWKV, a vocabulary."""
    from safetensors.torch import save_file

    from xexport.models._resolve import resolve

    family, preset = SHAPES[shape]
    source = resolve(family, preset=preset)
    c = source.config
    if family == "rwkv":
        config = _rwkv_config(c)
        tensors = {_rwkv_name(name): t.contiguous() for name, t in source.tensors.items()}
        (folder / "rwkv_vocab_v20230424.txt").write_text(_ascii_vocabulary(), encoding="utf-8")
    else:
        config = _mamba_config(c)
        tensors = {name: t.contiguous() for name, t in source.tensors.items()}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


def _rwkv_config(c: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["Rwkv7ForCausalLM"],
        "model_type": "rwkv7",
        "num_hidden_layers": c["layers"],
        "hidden_size": c["width"],
        "intermediate_size": c["ffn_width"] or 4 * c["width"],
        "head_size": c["head_size"],
        "layer_norm_epsilon": 1e-5,
        "vocab_size": c["vocab_size"],
        "lora_rank_decay": c["decay_rank"],
        "lora_rank_iclr": c["iclr_rank"],
        "lora_rank_value_residual_mix": c["value_rank"],
        "lora_rank_gate": c["gate_rank"],
    }


def _mamba_config(c: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "num_hidden_layers": c["layers"],
        "hidden_size": c["width"],
        "intermediate_size": c["inner_width"] or 2 * c["width"],
        "state_size": c["state_size"],
        "conv_kernel": c["conv_kernel"],
        "time_step_rank": c["dt_rank"] or -(-c["width"] // 16),
        "layer_norm_epsilon": c["norm_eps"],
        "vocab_size": c["vocab_size"],
        "tie_word_embeddings": False,
    }


def _rwkv_name(name: str) -> str:
    """The published name of a tensor -> the one in a Hugging Face folder."""
    fixed = {"emb.weight": "model.embeddings.weight", "head.weight": "head.weight"}
    if name in fixed:
        return fixed[name]
    name = name.replace("blocks.0.ln0.", "pre_ln.")
    name = (
        name.replace("blocks.", "layers.").replace(".att.", ".attention.").replace(".ffn.", ".feed_forward.")
    )
    return f"model.{name}"


def _ascii_vocabulary() -> str:
    """One token a printable character; the converter pads to the size of the embedding."""
    return "".join(f"{i} {chr(i + 31)!r} 1\n" for i in range(1, 96))
