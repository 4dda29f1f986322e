"""TensorRT and TensorRT-RTX, two packages of one interface: what is built from a graph, and how."""
