"""A checkpoint as an OpenVINO graph in float32: what optimum-intel would export, without its own transformers.

    model = build_graph(folder)       # needs: pip install openvino

Its inputs, its state (one pair of keys and values a layer, grown by Concat) and its masks have the form in which
OpenVINO looks for them: from there it makes paged attention, and fuses RoPE and RMSNorm.

Shapes: B sequences, L new tokens, S tokens with the history, H query heads, K KV heads, D head dim, E hidden size.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as op
from openvino.op.util import Variable, VariableInfo
from safetensors import safe_open

Node = Any


def build_graph(folder: Path) -> ov.Model:
    """ValueError for what is neither a Llama nor a Qwen 2 with plain RoPE."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or {}
    if config["model_type"] not in ("llama", "qwen2") or rope.get("rope_type", "default") != "default":
        raise ValueError(f"no graph for a {config['model_type']} with {rope.get('rope_type')} RoPE")
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        weights = {name: tensors.get_tensor(name).float().numpy() for name in tensors.keys()}
    return Graph(config, rope.get("rope_theta") or config["rope_theta"], weights).model()


class Graph:
    def __init__(self, config: dict[str, Any], theta: float, weights: dict[str, np.ndarray]):
        self.weights, self.eps = weights, config["rms_norm_eps"]
        self.layers, self.H, self.K = (
            config[key] for key in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        )
        self.D = config.get("head_dim") or config["hidden_size"] // self.H
        self.ids = named(op.parameter([-1, -1], np.int64), "input_ids")
        self.attention_mask = named(op.parameter([-1, -1], np.int64), "attention_mask")
        self.positions = named(op.parameter([-1, -1], np.int64), "position_ids")
        self.beams = named(op.parameter([-1], np.int32), "beam_idx")
        self.batch = op.gather(op.shape_of(self.ids), ints([0]), ints(0))
        self.sinks: list[Node] = []
        self.cos, self.sin = self._rotation(theta)
        self.mask = self._causal_mask()

    def model(self) -> ov.Model:
        embedding = op.constant(self.weights["model.embed_tokens.weight"])
        x = op.gather(embedding, self.ids, ints(0))
        for i in range(self.layers):
            x = self._layer(x, i)
        head = self.weights.get("lm_head.weight")
        head = embedding if head is None else op.constant(head)
        logits = named(op.matmul(self._norm(x, "model.norm"), head, False, True), "logits")
        inputs = [self.ids, self.attention_mask, self.positions, self.beams]
        return ov.Model([op.result(logits)], self.sinks, inputs, "folio_bench")

    def _layer(self, x: Node, i: int) -> Node:
        name = f"model.layers.{i}"
        h = self._norm(x, f"{name}.input_layernorm")
        q, k, v = (self._heads(h, f"{name}.self_attn.{p}_proj") for p in "qkv")
        k, v = self._remember(self._rotate(k), f"{i}.key"), self._remember(v, f"{i}.value")
        attended = op.scaled_dot_product_attention(
            self._rotate(q), self._repeat(k), self._repeat(v), self.mask, op.constant(np.float32(self.D**-0.5))
        )
        joined = op.reshape(op.transpose(attended, ints([0, 2, 1, 3])), ints([0, 0, self.H * self.D]), True)
        x = op.add(x, self._linear(joined, f"{name}.self_attn.o_proj"))
        h = self._norm(x, f"{name}.post_attention_layernorm")
        gate = op.swish(self._linear(h, f"{name}.mlp.gate_proj"))
        return op.add(
            x, self._linear(op.multiply(gate, self._linear(h, f"{name}.mlp.up_proj")), f"{name}.mlp.down_proj")
        )

    def _linear(self, x: Node, name: str) -> Node:
        y = op.matmul(x, op.constant(self.weights[f"{name}.weight"]), False, True)
        bias = self.weights.get(f"{name}.bias")
        return y if bias is None else op.add(y, op.constant(bias[None, None]))

    def _norm(self, x: Node, name: str) -> Node:
        mean = op.reduce_mean(op.power(x, floats(2)), ints([-1]), True)
        scale = op.divide(floats(1), op.sqrt(op.add(mean, floats(self.eps))))
        return op.multiply(op.multiply(x, scale), op.constant(self.weights[f"{name}.weight"][None, None]))

    def _heads(self, x: Node, name: str) -> Node:
        """[B, L, E] -> [B, H or K, L, D]"""
        heads = self.weights[f"{name}.weight"].shape[0] // self.D
        return op.transpose(op.reshape(self._linear(x, name), ints([0, 0, heads, self.D]), True), ints([0, 2, 1, 3]))

    def _rotation(self, theta: float) -> tuple[Node, Node]:
        """-> cosines and sines [B, 1, L, D]"""
        inverse = (theta ** (-np.arange(0, self.D, 2, dtype=np.float32) / self.D)).astype(np.float32)
        shape = op.concat([self.batch, ints([1]), ints([1])], 0)
        column = op.broadcast(op.constant(inverse[None, :, None]), shape, broadcast_spec="BIDIRECTIONAL")
        positions = op.convert(op.unsqueeze(self.positions, ints([1])), "f32")
        angles = op.transpose(op.matmul(column, positions, False, False), ints([0, 2, 1]))
        both = op.concat([angles, angles], -1)
        return op.unsqueeze(op.cos(both), ints([1])), op.unsqueeze(op.sin(both), ints([1]))

    def _rotate(self, x: Node) -> Node:
        half = self.D // 2
        first = op.slice(x, ints([0]), ints([half]), ints([1]), ints([3]))
        second = op.slice(x, ints([half]), ints([2**31 - 1]), ints([1]), ints([3]))
        turned = op.concat([op.multiply(second, floats(-1)), first], -1)
        return op.add(op.multiply(x, self.cos), op.multiply(turned, self.sin))

    def _remember(self, x: Node, name: str) -> Node:
        """[B, K, L, D] -> [B, K, S, D], which is also the next call's history."""
        info = VariableInfo()
        info.data_shape, info.data_type = ov.PartialShape([-1, self.K, -1, self.D]), ov.Type.f32
        info.variable_id = f"past_key_values.{name}present.{name}"
        variable = Variable(info)
        empty = op.broadcast(floats(0), op.concat([self.batch, ints([self.K]), ints([0]), ints([self.D])], 0))
        past = op.gather(op.read_value(empty, variable), self.beams, ints(0))
        grown = op.concat([past, x], 2)
        self.sinks.append(op.assign(grown, variable))
        return grown

    def _repeat(self, x: Node) -> Node:
        """[B, K, S, D] -> [B, H, S, D]"""
        if self.H == self.K:
            return x
        shape = op.shape_of(x)
        batch, length = (op.gather(shape, ints([i]), ints(0)) for i in (0, 2))
        wide = op.concat([batch, ints([self.K]), ints([self.H // self.K]), length, ints([self.D])], 0)
        repeated = op.broadcast(op.unsqueeze(x, ints([2])), wide, broadcast_spec="BIDIRECTIONAL")
        return op.reshape(repeated, ints([0, self.H, -1, self.D]), True)

    def _causal_mask(self) -> Node:
        """[B, 1, L, S] of booleans"""
        length = op.gather(op.shape_of(self.attention_mask), ints(1), ints(0))
        columns = op.unsqueeze(op.range(ints(0), length, ints(1), "i64"), ints([0, 1, 2]))
        seen = op.less_equal(columns, op.unsqueeze(self.positions, ints([1, 3])))
        return op.logical_and(seen, op.convert(op.unsqueeze(self.attention_mask, ints([1, 2])), "boolean"))


def named(node: Node, name: str) -> Node:
    node.friendly_name = name
    node.output(0).set_names({name})
    return node


def ints(value: Any) -> Node:
    return op.constant(np.array(value, dtype=np.int64))


def floats(value: float) -> Node:
    return op.constant(np.array(value, dtype=np.float32))
