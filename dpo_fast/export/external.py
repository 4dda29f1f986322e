"""Reading what a graph points to. Weights may be hard links here, which onnx_ir refuses: export makes them itself."""

import os

import onnx_ir as ir

from dpo_fast.errors import BundleError


def readable(tensor: ir.ExternalTensor) -> ir.ExternalTensor:
    """The same tensor, by its file's own path; for reading, not for being saved in a graph.

    Raises:
        BundleError: the file lies outside the graph's folder.
    """
    folder, path = os.path.realpath(tensor.base_dir), os.path.realpath(tensor.path)
    if not path.startswith(folder + os.sep):
        raise BundleError(f"{tensor.name}: lies in {tensor.path}, outside the bundle; do not trust this bundle")
    return ir.ExternalTensor(
        path, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=str(tensor.name)
    )
