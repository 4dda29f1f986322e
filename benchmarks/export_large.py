"""Export a checkpoint of Llama-3.1-8B's shape: time, peak memory, and bytes written.

The weights are holes in sparse files, 16 GB of zeros that take no room: an export looks for NaN in them and hashes
them, and never loads them.

    python benchmarks/export_large.py [--folder DIR] [--link]
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tokenizers import Tokenizer, models
from transformers import LlamaConfig, PreTrainedTokenizerFast

# https://huggingface.co/meta-llama/Llama-3.1-8B, config.json
SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
}  # fmt: skip
SHARDS = 4


def make_checkpoint(folder: Path) -> int:
    """Write a bfloat16 checkpoint of the shape in sparse shards; its size in bytes."""
    import torch
    from transformers import AutoModelForCausalLM

    config = LlamaConfig(**SHAPE, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))  # noqa: S106 - no password
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(folder)  # noqa: S106
    with torch.device("meta"):
        parameters = list(AutoModelForCausalLM.from_config(config).named_parameters())
    weight_map, total = {}, 0
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        header, offset = {}, 0
        for name, parameter in parameters[shard::SHARDS]:
            end = offset + 2 * parameter.numel()
            header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [offset, end]}
            weight_map[name], offset = file, end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + offset)
        total += offset
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def written_bytes(folder: Path) -> int:
    """What a folder's files take on the disk; files that are links to others take nothing."""
    files = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return sum(512 * file.st_blocks for file in files if file.st_nlink == 1)


def main() -> None:
    """Make the checkpoint, export it, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="Where to work; a temporary folder by default.")
    parser.add_argument("--link", action="store_true", help="Hard-link the weights instead of copying them.")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        checkpoint = folder / "llama-3.1-8b"
        checkpoint.mkdir()
        size = make_checkpoint(checkpoint)
        command = [sys.executable, "-m", "dpo_fast.export", "--policy", str(checkpoint), "--reference", "none"]
        command += ["--output", str(folder / "bundle"), "--no-self-check", *(["--link"] if arguments.link else [])]
        started = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - started
        result = {
            "checkpoint_gigabytes": round(size / 1e9, 2),
            "export_seconds": round(seconds, 1),
            "peak_memory_gigabytes": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9, 3),
            "written_megabytes": round(written_bytes(folder / "bundle") / 1e6, 2),
            "graph_megabytes": round((folder / "bundle" / "policy.onnx").stat().st_size / 1e6, 2),
            "linked": arguments.link,
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for name, value in result.items():
        print(f"{name.replace('_', ' '):24} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
