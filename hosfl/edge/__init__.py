"""A client without torch: the client half as a graph, run by onnxruntime over weights in numpy's arrays."""
