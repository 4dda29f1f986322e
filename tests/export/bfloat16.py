"""bfloat16 graphs on ONNX Runtime's CPU provider, which has no bfloat16 products: computed in float32, then rounded.

That is what a matrix unit does, which adds up in float32 and rounds the sum.
"""

from pathlib import Path

import onnx_ir as ir
import onnxruntime
from onnx_ir.passes.common import ShapeInferencePass

BFLOAT16, FLOAT = ir.DataType.BFLOAT16, ir.DataType.FLOAT


def bfloat16_session(graph: Path) -> onnxruntime.InferenceSession:
    """A session of a copy in which every bfloat16 value is a float32 one that has been rounded to bfloat16."""
    model = ir.load(graph)
    ShapeInferencePass()(model)
    for node in list(model.graph):
        if node.op_type == "Cast" and node.attributes["to"].as_int() == FLOAT:
            continue  # from a rounded value, or from a weight as it is stored
        for value in node.outputs:
            if value.dtype != BFLOAT16:
                continue
            down = ir.node("Cast", [value], {"to": BFLOAT16})
            up = ir.node("Cast", [down.outputs[0]], {"to": FLOAT})
            value.replace_all_uses_with(up.outputs[0])
            down.replace_input_with(0, value)
            model.graph.insert_after(node, [down, up])
            down.outputs[0].dtype, up.outputs[0].dtype, value.dtype = BFLOAT16, FLOAT, FLOAT
        if node.op_type == "Cast" and node.attributes["to"].as_int() == BFLOAT16:
            node.attributes["to"] = ir.AttrInt64("to", FLOAT)
    # Weights that are stored in bfloat16 and used as such.
    for value in list(model.graph.initializers.values()):
        if value.dtype == BFLOAT16:
            for user, position in [(use.node, use.idx) for use in value.uses()]:
                if user.op_type != "Cast":
                    wide = ir.node("Cast", [value], {"to": FLOAT})
                    wide.outputs[0].dtype = FLOAT
                    model.graph.insert_before(user, wide)
                    user.replace_input_with(position, wide.outputs[0])
    path = graph.with_suffix(".emulated.onnx")
    ir.save(model, path)
    options = onnxruntime.SessionOptions()
    # Nothing may take the roundings away.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
