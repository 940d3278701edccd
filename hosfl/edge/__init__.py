"""A client without torch: onnxruntime runs the client half as a graph, with its weights in numpy arrays."""
