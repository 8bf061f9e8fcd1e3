"""The fused steps of a network in PyTorch, onnxruntime, OpenVINO, MNN and LiteRT, each as one callable.

    run = ort_step(onnx_bytes(steps, head, x.shape, start), x, threads)      # run() is an inference

`steps` are those of `compressx.kernels.graph`, batch normalisation folded in, `start` the number of the image, `head`
the linear layers after them, or None. Weights are dense, their zeros in place.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Head(NamedTuple):
    """Linear layers at a network's end, rectified between.

    Attributes:
      layers: weight `[in, out]` and bias of each.
      average: over rows and columns first; else the image is flattened, in the order rows, columns, channels.
    """

    layers: list[tuple[Any, Any]]
    average: bool

    def channels_first(self, image: tuple[int, ...]) -> list[tuple[Any, Any]]:
        """The layers for engines whose images `[n, c, h, w]` are flattened in that order."""
        import numpy as np

        layers = [(np.asarray(w), np.asarray(b)) for w, b in self.layers]
        if not self.average:
            _, c, h, width = image
            w, b = layers[0]
            layers[0] = (w.reshape(h, width, c, -1).transpose(2, 0, 1, 3).reshape(h * width * c, -1), b)
        return layers


def _image(steps: list[Any], shape: tuple[int, ...], start: int) -> tuple[int, ...]:
    """Of the last step, `[n, c, h, w]`, for images `[n, h, w, c]`."""
    shapes = {start: shape}
    for s in steps:
        size, strides, pads = s.geometry[:3] if hasattr(s, "geometry") else (s.window, s.strides, s.pads)
        n, h, w, c = shapes[s.x]
        out = [(a + sum(p) - k) // d + 1 for a, k, d, p in zip((h, w), size, strides, pads, strict=True)]
        shapes[s.y] = (n, *out, s.w.shape[3] if hasattr(s, "geometry") else c)
    n, h, w, c = shapes[steps[-1].y]
    return n, c, h, w


def _folded(s: Any) -> tuple[Any, Any]:
    """Kernel `[cout, cin, kh, kw]` with its scale, and bias."""
    import numpy as np

    return np.ascontiguousarray((s.w * s.scale).transpose(3, 2, 0, 1)), s.bias


def torch_step(steps: list[Any], head: Head | None, x: Any, start: int, threads: int) -> Callable[[], Any]:
    """The steps in PyTorch, channels last, without gradients."""
    import torch

    from compressx.kernels.graph import Conv

    torch.set_num_threads(threads)
    last = torch.channels_last
    weights = {i: tuple(torch.tensor(a) for a in _folded(s)) for i, s in enumerate(steps) if isinstance(s, Conv)}
    weights = {i: (w.contiguous(memory_format=last), b) for i, (w, b) in weights.items()}
    image = torch.tensor(x).permute(0, 3, 1, 2).contiguous(memory_format=last)
    dense = head.channels_first(_image(steps, x.shape, start)) if head else []
    dense = [(torch.tensor(w).T.contiguous(), torch.tensor(b)) for w, b in dense]

    def run() -> Any:
        with torch.inference_mode():
            values = {start: image}
            for i, s in enumerate(steps):
                if not isinstance(s, Conv):
                    values[s.y] = torch.nn.functional.max_pool2d(values[s.x], s.window, s.strides, s.pads[0][0])
                    continue
                w, b = weights[i]
                pads = (s.geometry.pads[0][0], s.geometry.pads[1][0])
                y = torch.nn.functional.conv2d(values[s.x], w, b, s.geometry.strides, pads)
                if s.residual >= 0:
                    y += values[s.residual]
                values[s.y] = torch.relu_(y) if s.activation == "relu" else y
            y = values[steps[-1].y]
            if head:
                y = y.mean((2, 3)) if head.average else y.contiguous().flatten(1)
            for i, (w, b) in enumerate(dense):
                y = torch.nn.functional.linear(torch.relu_(y) if i else y, w, b)
            return y

    return run


def onnx_bytes(steps: list[Any], head: Head | None, shape: tuple[int, ...], start: int) -> bytes:
    """The steps as an ONNX model, NCHW, float32."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    from compressx.kernels.graph import Conv

    nodes, constants = [], []

    def constant(name: str, a: Any) -> str:
        constants.append(numpy_helper.from_array(np.ascontiguousarray(a), name))
        return name

    for i, s in enumerate(steps):
        if not isinstance(s, Conv):
            pads = [s.pads[0][0], s.pads[1][0], s.pads[0][1], s.pads[1][1]]
            options = {"kernel_shape": list(s.window), "strides": list(s.strides), "pads": pads}
            nodes.append(helper.make_node("MaxPool", [f"v{s.x}"], [f"v{s.y}"], **options))
            continue
        w, b = _folded(s)
        (t, bo), (le, r) = s.geometry.pads
        names = [f"v{s.x}", constant(f"w{i}", w), constant(f"b{i}", b)]
        steps_after = [name for name, used in (("add", s.residual >= 0), ("relu", s.activation == "relu")) if used]
        out = f"v{s.y}" if not steps_after else f"c{i}"
        options = {"pads": [t, le, bo, r], "strides": list(s.geometry.strides)}
        nodes.append(helper.make_node("Conv", names, [out], **options))
        for k, name in enumerate(steps_after):
            inputs = [out] + ([f"v{s.residual}"] if name == "add" else [])
            out = f"v{s.y}" if k + 1 == len(steps_after) else f"a{i}"
            nodes.append(helper.make_node("Add" if name == "add" else "Relu", inputs, [out]))
    result = f"v{steps[-1].y}"
    if head is not None:
        if head.average:
            nodes.append(helper.make_node("GlobalAveragePool", [result], ["mean"]))
        nodes.append(helper.make_node("Flatten", ["mean" if head.average else result], ["flat"]))
        result = "flat"
        for i, (w, b) in enumerate(head.channels_first(_image(steps, shape, start))):
            if i:
                nodes.append(helper.make_node("Relu", [result], [f"hr{i}"]))
                result = f"hr{i}"
            names = [result, constant(f"hw{i}", w), constant(f"hb{i}", b)]
            nodes.append(helper.make_node("Gemm", names, [f"h{i}"]))
            result = f"h{i}"
    n, h, w_, c = shape
    images = helper.make_tensor_value_info(f"v{start}", TensorProto.FLOAT, [n, c, h, w_])
    outputs = helper.make_tensor_value_info(result, TensorProto.FLOAT, list("nchw"[: 4 if head is None else 2]))
    graph = helper.make_graph(nodes, "network", [images], [outputs], constants)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(made)
    serialized: bytes = made.SerializeToString()
    return serialized


def ort_step(model: bytes, x: Any, threads: int) -> Callable[[], Any]:
    """onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.transpose(0, 3, 1, 2).copy()}
    return lambda: session.run(None, feed)[0]


def openvino_step(model: bytes, x: Any, threads: int) -> Callable[[], Any]:
    """OpenVINO with its latency hint, in float32."""
    import openvino

    core = openvino.Core()
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    request = core.compile_model(core.read_model(model), "CPU", options).create_infer_request()
    image = x.transpose(0, 3, 1, 2).copy()
    return lambda: next(iter(request.infer([image], share_inputs=True, share_outputs=True).values()))


def mnn_step(model: bytes, x: Any, threads: int) -> Callable[[], Any]:
    """MNN's session, converted from ONNX by its own tool, high precision."""
    import MNN
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "m.onnx"), Path(folder, "m.mnn")
        source.write_bytes(model)
        tool = Path(shutil.which("mnnconvert") or Path(sys.executable).with_name("mnnconvert")).absolute()
        command = [str(tool), "-f", "ONNX", "--modelFile", str(source), "--MNNModel", str(target), "--bizCode", "x"]
        subprocess.run(command, check=True, capture_output=True, cwd=folder)  # it leaves files where it runs
        net = MNN.Interpreter(str(target))
    session = net.createSession({"numThread": threads, "precision": "high", "backend": "CPU"})
    given, image = net.getSessionInput(session), x.transpose(0, 3, 1, 2).copy()

    def run() -> Any:
        host = MNN.Tensor(image.shape, MNN.Halide_Type_Float, image, MNN.Tensor_DimensionType_Caffe)  # keeps no image
        given.copyFrom(host)
        net.runSession(session)
        out = net.getSessionOutput(session)
        empty = np.zeros(out.getShape(), np.float32)
        copy = MNN.Tensor(out.getShape(), MNN.Halide_Type_Float, empty, MNN.Tensor_DimensionType_Caffe)
        out.copyToHostTensor(copy)
        return np.array(copy.getNumpyData())  # it is only a view

    return run


def tflite_bytes(steps: list[Any], head: Head | None, shape: tuple[int, ...], start: int) -> bytes:
    """The steps as a LiteRT (TensorFlow Lite) model, NHWC, float32, written with the schema that its package brings.

    Padding is `SAME` where that pads alike, and an operation of its own otherwise.
    """
    import flatbuffers
    import numpy as np
    from ai_edge_litert import schema_py_generated as tfl
    from jax import lax

    from compressx.kernels.graph import Conv

    codes = ("ADD", "CONV_2D", "FULLY_CONNECTED", "MAX_POOL_2D", "PAD", "MEAN")
    graph, buffers = tfl.SubGraphT(), [tfl.BufferT()]
    graph.tensors, graph.operators = [], []
    shapes: dict[int, tuple[int, ...]] = {}
    values: dict[int, int] = {}

    def tensor(dims: tuple[int, ...], data: Any = None) -> int:
        made = tfl.TensorT()
        integer = data is not None and data.dtype == np.int32
        made.type = tfl.TensorType.INT32 if integer else tfl.TensorType.FLOAT32
        made.shape, made.name = list(dims), f"t{len(graph.tensors)}"
        if data is not None:
            made.buffer = len(buffers)
            held = tfl.BufferT()
            held.data = np.frombuffer(np.ascontiguousarray(data).tobytes(), np.uint8)
            buffers.append(held)
        graph.tensors.append(made)
        shapes[len(graph.tensors) - 1] = dims
        return len(graph.tensors) - 1

    def constant(a: Any) -> int:
        return tensor(a.shape, a if a.dtype == np.int32 else a.astype(np.float32))

    def add(code: str, inputs: list[int], dims: tuple[int, ...], kind: str, **options: Any) -> int:
        made, out = tfl.OperatorT(), tensor(dims)
        made.opcodeIndex, made.inputs, made.outputs = codes.index(code), inputs, [out]
        made.builtinOptionsType = getattr(tfl.BuiltinOptions, kind)
        made.builtinOptions = getattr(tfl, kind + "T")()
        for name, value in options.items():
            setattr(made.builtinOptions, name, value)
        graph.operators.append(made)
        return out

    def padded(x: int, pads: Any, size: Any, strides: Any) -> tuple[int, int]:
        n, h, w, c = shapes[x]
        if tuple(map(tuple, pads)) == tuple(map(tuple, lax.padtype_to_pads((h, w), size, strides, "SAME"))):
            return x, tfl.Padding.SAME
        if not any(map(any, pads)):
            return x, tfl.Padding.VALID
        dims = (n, h + sum(pads[0]), w + sum(pads[1]), c)
        widths = constant(np.array([(0, 0), *pads, (0, 0)], np.int32))
        return add("PAD", [x, widths], dims, "PadOptions"), tfl.Padding.VALID

    values[start] = image = tensor(shape)
    for s in steps:
        size, strides, pads = s.geometry[:3] if isinstance(s, Conv) else (s.window, s.strides, s.pads)
        n, h, w, c = shapes[values[s.x]]
        oh, ow = ((a + sum(p) - k) // d + 1 for a, k, d, p in zip((h, w), size, strides, pads, strict=True))
        x, padding = padded(values[s.x], pads, size, strides)
        options = {"padding": padding, "strideH": strides[0], "strideW": strides[1]}
        if not isinstance(s, Conv):
            options |= {"filterHeight": size[0], "filterWidth": size[1]}
            values[s.y] = add("MAX_POOL_2D", [x], (n, oh, ow, c), "Pool2DOptions", **options)
            continue
        kernel, bias = _folded(s)
        act = tfl.ActivationFunctionType.RELU if s.activation == "relu" else tfl.ActivationFunctionType.NONE
        options |= {"dilationHFactor": 1, "dilationWFactor": 1}
        options["fusedActivationFunction"] = act if s.residual < 0 else tfl.ActivationFunctionType.NONE
        inputs, dims = [x, constant(kernel.transpose(0, 2, 3, 1)), constant(bias)], (n, oh, ow, kernel.shape[0])
        y = add("CONV_2D", inputs, dims, "Conv2DOptions", **options)
        if s.residual >= 0:
            y = add("ADD", [y, values[s.residual]], dims, "AddOptions", fusedActivationFunction=act)
        values[s.y] = y
    result = values[steps[-1].y]
    if head is not None:
        n, _, _, c = shapes[result]
        if head.average:
            axes = constant(np.array([1, 2], np.int32))
            result = add("MEAN", [result, axes], (n, c), "ReducerOptions", keepDims=False)
        for i, (weight, bias) in enumerate(head.layers):  # the first flattens its image
            inputs = [result, constant(np.asarray(weight).T), constant(np.asarray(bias))]
            last = i + 1 == len(head.layers)
            act = tfl.ActivationFunctionType.NONE if last else tfl.ActivationFunctionType.RELU
            dims = (n, weight.shape[1])
            options = {"fusedActivationFunction": act}
            result = add("FULLY_CONNECTED", inputs, dims, "FullyConnectedOptions", **options)
    graph.inputs, graph.outputs = [image], [result]
    model = tfl.ModelT()
    model.version, model.subgraphs, model.buffers, model.operatorCodes = 3, [graph], buffers, []
    for name in codes:
        code = tfl.OperatorCodeT()
        code.builtinCode = code.deprecatedBuiltinCode = getattr(tfl.BuiltinOperator, name)
        code.version = 1
        model.operatorCodes.append(code)
    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def litert_step(model: bytes, x: Any, threads: int) -> Callable[[], Any]:
    """LiteRT's interpreter with XNNPACK, as it is by default."""
    from ai_edge_litert.interpreter import Interpreter

    net = Interpreter(model_content=model, num_threads=threads)
    net.allocate_tensors()
    given, out = net.get_input_details()[0]["index"], net.get_output_details()[0]["index"]

    def run() -> Any:
        net.set_tensor(given, x)
        net.invoke()
        return net.get_tensor(out)

    return run
