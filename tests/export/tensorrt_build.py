"""Child process of test_tensorrt.py: parses and builds ONNX files with TensorRT for RTX, which needs no GPU for it.

A process of its own, because a builder that crashes takes its process along.  Prints one JSON object per file.
"""

import json
import sys

import tensorrt_rtx as trt


class Log(trt.ILogger):
    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.messages: list[str] = []

    def log(self, severity, message):
        if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
            self.messages.append(message)


for path in sys.argv[1:]:
    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network()
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(path):
        errors = [str(parser.get_error(i)) for i in range(parser.num_errors)]
        print(json.dumps({"bytes": 0, "errors": errors}), flush=True)
        continue
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        if tensor.shape and -1 in tuple(tensor.shape):
            rest = tuple(tensor.shape)[1:]
            profile.set_shape(tensor.name, (1, *rest), (8, *rest), (32, *rest))
        elif tensor.is_shape_tensor:
            profile.set_shape_input(tensor.name, [1], [6], [16])
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    print(json.dumps({"bytes": plan.nbytes if plan is not None else 0, "errors": log.messages}), flush=True)
