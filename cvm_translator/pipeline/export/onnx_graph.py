"""The model as two ONNX graphs: encoder.onnx runs once a batch, decoder.onnx once a token.

    encoder   input_ids (B, S), attention_mask (B, S), int64
              -> present.I.encoder.key, .value (B, H, S, d): each decoder layer's view of the source
    decoder   input_ids (B), attention_mask (B, S), past_key_values.I.decoder.key, .value (B, H, P, d),
              past_key_values.I.encoder.key, .value (B, H, S, d)
              -> logits (B, V), next_token (B), present.I.decoder.key, .value (B, H, P + 1, d)

`next_token` is the best one but bos, pad and unk, which the native decoder never writes either. The first input is the
end mark with P = 0. Only standard operators are used, each of them in the native model's order.

In int8 the graphs hold the native model's own integers and compute on its grid: each token is rounded to absmax / 127
and shifted by 128, since ONNX Runtime multiplies unsigned by signed. On x86 processors without VNNI that product
saturates unless the session option `session.x64quantprecision` is 1.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from cvm_translator.models.runtimes.onnx import DECODER_FILE, ENCODER_FILE
from cvm_translator.models.transformer import BOS_ID, PAD_ID, UNK_ID, CvmTransformer
from cvm_translator.quantization.deployed import Int8Linear, Int8TiedEmbedding

OPSET, IR_VERSION = 18, 9
"""Read by ONNX Runtime from 1.17 on."""

MAX_FILE_BYTES = 1_900_000_000
"""Larger graphs, which no protocol buffer can hold, keep their weights in a file beside them."""

Array = NDArray[Any]


def write_onnx(onnx: Any, folder: Path, model: CvmTransformer) -> None:
    """Write both graphs of a float32 or an int8 model into an existing folder."""
    writer = ModelWriter(onnx, model)
    for name, build in ((ENCODER_FILE, writer.build_encoder), (DECODER_FILE, writer.build_decoder)):
        graph = build()
        is_large = graph.ByteSize() > MAX_FILE_BYTES
        onnx.save_model(graph, folder / name, save_as_external_data=is_large, location=f"{name}_data")


class Graph:
    """Nodes and constants under construction; each value goes by its name."""

    def __init__(self, onnx: Any) -> None:
        self._onnx = onnx
        self._nodes: list[Any] = []
        self._constants: dict[str, Any] = {}
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []

    def add(self, kind: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        """One operator with one output."""
        output = name or f"{kind.lower()}_{len(self._nodes)}"
        self._nodes.append(self._onnx.helper.make_node(kind, inputs, [output], **attributes))
        return output

    def constant(self, name: str, value: Array) -> str:
        if name not in self._constants:
            self._constants[name] = self._onnx.numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def number(self, value: float) -> str:
        return self.constant(f"number_{value!r}", np.array(value, dtype=np.float32))

    def integers(self, *values: int) -> str:
        return self.constant("integers_" + "_".join(map(str, values)), np.array(values, dtype=np.int64))

    def input(self, name: str, dtype: type, *shape: str | int) -> str:
        self._inputs.append(self._describe(name, dtype, shape))
        return name

    def output(self, name: str, dtype: type, *shape: str | int) -> None:
        self._outputs.append(self._describe(name, dtype, shape))

    def _describe(self, name: str, dtype: type, shape: tuple[str | int, ...]) -> Any:
        kind = self._onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return self._onnx.helper.make_tensor_value_info(name, kind, shape)

    def build(self, name: str) -> Any:
        """The checked ModelProto."""
        helper = self._onnx.helper
        graph = helper.make_graph(self._nodes, name, self._inputs, self._outputs, list(self._constants.values()))
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="cvm-translator")
        model.ir_version = IR_VERSION
        self._onnx.checker.check_model(model)
        return model


class ModelWriter:
    """Writes the parts of one model into graphs."""

    def __init__(self, onnx: Any, model: CvmTransformer) -> None:
        self._onnx, self._model, self._config = onnx, model, model.config
        self._embedding: nn.Module = model.embedding
        self._head_dim = model.config.dim // model.config.num_heads

    # ----------------------------------------------------------------------------------------------------- the graphs

    def build_encoder(self) -> Any:
        graph, config = Graph(self._onnx), self._config
        ids = graph.input("input_ids", np.int64, "batch", "source")
        mask = self._attention_bias(graph, graph.input("attention_mask", np.int64, "batch", "source"))
        length = graph.add("Slice", graph.add("Shape", ids), graph.integers(1), graph.integers(2))
        positions = graph.add("Slice", self._positions(graph), graph.integers(0), length, graph.integers(0))
        x = graph.add("Add", self._embed(graph, ids, [1, 2, 0]), positions)  # (B, S, D)
        for index in range(config.encoder_layers):
            layer = f"encoder_layers.{index}"
            x = graph.add("Add", x, self._encode_attention(graph, x, mask, layer))
            x = graph.add("Add", x, self._feed_forward(graph, x, layer))
        memory = self._norm(graph, x, "encoder_norm")
        for index in range(config.decoder_layers):
            projected = self._linear(graph, memory, f"decoder_layers.{index}.cross_attention.kv")  # (B, S, 2D)
            for part, name in enumerate(("key", "value")):
                half = self._cut(graph, projected, part)
                output = f"present.{index}.encoder.{name}"
                self._split_heads(graph, half, name=output)
                graph.output(output, np.float32, "batch", config.num_heads, "source", self._head_dim)
        return graph.build("encoder")

    def build_decoder(self) -> Any:
        graph, config = Graph(self._onnx), self._config
        ids = graph.input("input_ids", np.int64, "batch")
        mask = self._attention_bias(graph, graph.input("attention_mask", np.int64, "batch", "source"))
        past: dict[tuple[str, str, int], str] = {}
        for index in range(config.decoder_layers):
            for side, length in (("decoder", "past"), ("encoder", "source")):
                for name in ("key", "value"):
                    shape = ("batch", config.num_heads, length, self._head_dim)
                    past[side, name, index] = graph.input(f"past_key_values.{index}.{side}.{name}", np.float32, *shape)
        num_past = graph.add(
            "Slice", graph.add("Shape", past["decoder", "key", 0]), graph.integers(2), graph.integers(3)
        )
        position = graph.add("Gather", self._positions(graph), num_past)  # (1, D)
        x = graph.add("Add", self._embed(graph, ids, [1, 0]), position)  # (B, D)
        for index in range(config.decoder_layers):
            layer = f"decoder_layers.{index}"
            branch = self._decode_attention(
                graph, x, index, past["decoder", "key", index], past["decoder", "value", index]
            )
            x = graph.add("Add", x, branch)
            branch = self._cross_attention(
                graph, x, mask, layer, past["encoder", "key", index], past["encoder", "value", index]
            )
            x = graph.add("Add", x, branch)
            x = graph.add("Add", x, self._feed_forward(graph, x, layer))
        logits = self._project(graph, self._norm(graph, x, "decoder_norm"))
        graph.output(logits, np.float32, "batch", self._model.vocab_size)
        forbidden = np.zeros(self._model.vocab_size, dtype=np.float32)
        forbidden[[BOS_ID, PAD_ID, UNK_ID]] = -np.inf
        allowed = graph.add("Add", logits, graph.constant("forbidden", forbidden))
        graph.output(graph.add("ArgMax", allowed, name="next_token", axis=1, keepdims=0), np.int64, "batch")
        return graph.build("decoder")

    # ------------------------------------------------------------------------------------------------------ attention

    def _attention_bias(self, graph: Graph, mask: str) -> str:
        """(B, S) of 1 and 0 -> (B, 1, 1, S) of 0 and -1e9, to be added to scores."""
        padded = graph.add("Sub", graph.number(1.0), graph.add("Cast", mask, to=self._onnx.TensorProto.FLOAT))
        return graph.add("Unsqueeze", graph.add("Mul", padded, graph.number(-1e9)), graph.integers(1, 2))

    def _cut(self, graph: Graph, x: str, part: int) -> str:
        """The part of width D of the last dimension."""
        dim = self._config.dim
        return graph.add("Slice", x, graph.integers(part * dim), graph.integers((part + 1) * dim), graph.integers(-1))

    def _split_heads(self, graph: Graph, x: str, name: str | None = None) -> str:
        """(B, S, D) -> (B, H, S, d)."""
        shape = graph.integers(0, 0, self._config.num_heads, self._head_dim)
        return graph.add("Transpose", graph.add("Reshape", x, shape), name=name, perm=[0, 2, 1, 3])

    def _as_one_token(self, graph: Graph, x: str) -> str:
        """(B, D) -> (B, H, 1, d)."""
        return graph.add("Reshape", x, graph.integers(0, self._config.num_heads, 1, self._head_dim))

    def _attend(self, graph: Graph, q: str, keys: str, values: str, bias: str | None) -> str:
        """(B, H, T, d) each -> (B, H, T, d)."""
        scores = graph.add("MatMul", q, graph.add("Transpose", keys, perm=[0, 1, 3, 2]))
        scores = graph.add("Mul", scores, graph.number(1.0 / math.sqrt(self._head_dim)))
        if bias is not None:
            scores = graph.add("Add", scores, bias)
        return graph.add("MatMul", graph.add("Softmax", scores, axis=-1), values)

    def _encode_attention(self, graph: Graph, x: str, bias: str, layer: str) -> str:
        qkv = self._linear(graph, self._norm(graph, x, f"{layer}.attention_norm"), f"{layer}.attention.qkv")
        q, keys, values = (self._split_heads(graph, self._cut(graph, qkv, part)) for part in range(3))
        y = graph.add("Transpose", self._attend(graph, q, keys, values, bias), perm=[0, 2, 1, 3])
        return self._linear(
            graph, graph.add("Reshape", y, graph.integers(0, 0, self._config.dim)), f"{layer}.attention.out"
        )

    def _decode_attention(self, graph: Graph, x: str, index: int, past_keys: str, past_values: str) -> str:
        layer = f"decoder_layers.{index}"
        qkv = self._linear(graph, self._norm(graph, x, f"{layer}.attention_norm"), f"{layer}.attention.qkv")
        q, key, value = (self._as_one_token(graph, self._cut(graph, qkv, part)) for part in range(3))
        present = []
        for name, past, new in (("key", past_keys, key), ("value", past_values, value)):
            output = f"present.{index}.decoder.{name}"
            present.append(graph.add("Concat", past, new, name=output, axis=2))
            graph.output(output, np.float32, "batch", self._config.num_heads, "past + 1", self._head_dim)
        y = self._attend(graph, q, present[0], present[1], None)
        return self._linear(
            graph, graph.add("Reshape", y, graph.integers(0, self._config.dim)), f"{layer}.attention.out"
        )

    def _cross_attention(self, graph: Graph, x: str, bias: str, layer: str, keys: str, values: str) -> str:
        part = f"{layer}.cross_attention"
        q = self._as_one_token(graph, self._linear(graph, self._norm(graph, x, f"{part}_norm"), f"{part}.q"))
        y = self._attend(graph, q, keys, values, bias)
        return self._linear(graph, graph.add("Reshape", y, graph.integers(0, self._config.dim)), f"{part}.out")

    # --------------------------------------------------------------------------------------------------------- layers

    def _positions(self, graph: Graph) -> str:
        return graph.constant("positions", self._model.positions.cpu().numpy())

    def _norm(self, graph: Graph, x: str, name: str) -> str:
        norm = self._model.get_submodule(name)
        weight, bias = (self._parameter(graph, f"{name}.{kind}") for kind in ("weight", "bias"))
        return graph.add("LayerNormalization", x, weight, bias, axis=-1, epsilon=norm.eps)

    def _parameter(self, graph: Graph, name: str) -> str:
        return graph.constant(name, self._model.state_dict()[name].cpu().numpy())

    def _feed_forward(self, graph: Graph, x: str, layer: str) -> str:
        up = self._linear(graph, self._norm(graph, x, f"{layer}.feed_forward_norm"), f"{layer}.feed_forward.up")
        return self._linear(graph, graph.add("Relu", up), f"{layer}.feed_forward.down")

    def _linear(self, graph: Graph, x: str, name: str) -> str:
        module: Any = self._model.get_submodule(name)
        weight = graph.constant(f"{name}.weight", module.weight.detach().cpu().numpy().T)
        if isinstance(module, Int8Linear):
            y = self._multiply_int8(graph, x, weight, self._parameter(graph, f"{name}.weight_scale"))
        else:
            y = graph.add("MatMul", x, weight)
        return graph.add("Add", y, self._parameter(graph, f"{name}.bias"))

    def _multiply_int8(self, graph: Graph, x: str, weight: str, weight_step: str) -> str:
        """x (..., K) rounded per token × weight (K, M) int8 with a step a column -> (..., M)."""
        absmax = graph.add("ReduceMax", graph.add("Abs", x), graph.integers(-1), keepdims=1)
        absmax = graph.add("Max", absmax, graph.number(1e-30))  # a row of zeros stays one
        scaled = graph.add("Mul", x, graph.add("Div", graph.number(127.0), absmax))
        shifted = graph.add("Add", graph.add("Round", scaled), graph.number(128.0))
        integers = graph.add("Cast", shifted, to=self._onnx.TensorProto.UINT8)
        product = graph.add(
            "MatMulInteger", integers, weight, graph.constant("zero_point", np.array(128, dtype=np.uint8))
        )
        product = graph.add("Cast", product, to=self._onnx.TensorProto.FLOAT)
        step = graph.add("Div", absmax, graph.number(127.0))
        return graph.add("Mul", graph.add("Mul", product, step), weight_step)

    def _matrix(self, graph: Graph) -> str:
        """The tied matrix (D, V), held once: the projection wants it in this order."""
        return graph.constant("embedding.weight", self._model.embedding.weight.detach().cpu().numpy().T)

    def _embed(self, graph: Graph, ids: str, order: list[int]) -> str:
        """ids (...) -> (..., D), scaled by √D; `order` moves the first dimension to the end."""
        rows = graph.add("Gather", self._matrix(graph), ids, axis=1)  # (D, ...)
        if isinstance(self._embedding, Int8TiedEmbedding):
            rows = graph.add("Cast", rows, to=self._onnx.TensorProto.FLOAT)
            steps = graph.add("Gather", self._parameter(graph, "embedding.weight_scale"), ids)  # (...)
            rows = graph.add("Mul", rows, steps)
        return graph.add("Mul", graph.add("Transpose", rows, perm=order), graph.number(math.sqrt(self._config.dim)))

    def _project(self, graph: Graph, x: str) -> str:
        matrix = self._matrix(graph)
        if isinstance(self._embedding, Int8TiedEmbedding):
            steps = self._parameter(graph, "embedding.weight_scale")
            logits = self._multiply_int8(graph, x, matrix, steps)
            return graph.add("Identity", logits, name="logits")
        return graph.add("MatMul", x, matrix, name="logits")
