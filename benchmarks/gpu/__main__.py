"""dpo_fast against its peers on an NVIDIA GPU: speed, memory and errors, written to a file that can be read later.

    python -m benchmarks.gpu --verify                                    are the numbers right?
    python -m benchmarks.gpu [--shapes smollm2-135m,llama-3.2-1b]        how fast?
    python -m benchmarks.gpu table benchmarks/results/*.json [--write README.md]

The contenders are TRL's `evaluate()` and a tuned PyTorch loop in bfloat16, ONNX Runtime on CUDA, TensorRT, TensorRT-RTX
and ONNX Runtime's TensorRT provider, each in a process of its own, alone on the GPU. One that cannot run here is listed
with the reason; one that fails, with its error, and the others go on. benchmarks/results/README.md says what each
figure is, and what the options are for.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks import each other by name

from gpu.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
