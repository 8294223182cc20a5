"""Give the tensors of an ONNX file the names that they had in the model.

Exporters keep most names. They fold a Linear's weight into an anonymous transposed matrix, keep one of equal tensors
alone, and may cut the position embedding: then the node that reads a tensor says which module it belongs to.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ...models.converted import MARK, ConvertedAttention, as_mark
from ...models.copied import ARCHITECTURE as COPIED
from ...models.errors import CheckpointError
from ..architecture import build
from ..report import some
from ..safety import Graph, Node
from ..weight_files import Weights

OWN = "graftvit"
"""The key that our own export writes, for its version."""
TOKENS = ("cls_token", "dist_token", "reg_token", "pos_embed", "mask_token")
"""Parameters of timm's models that belong to no layer."""
NAMED = re.compile(rf"(?:[^./:]+\.)+[^./:]+|{'|'.join(TOKENS)}")
PATCHES = re.compile(
    r"(?P<prefix>(?:.+\.)??)(?:patch_embed\.proj|(?P<stem>(?:(?:vit|deit|beit|dinov2\w*)\.)?embeddings\.)"
    r"patch_embeddings\.(?:projection\.)?)\.?weight"
)
SCALES = {"ls": "gamma", "layer_scale": "lambda1"}
"""What the parameter of a layer scale is called in a module of this name."""
READERS = ("MatMul", "Gemm", "Conv")
FIRST_ONLY = ("Reshape", "Transpose", "Resize", "Slice", "Expand", "Cast", "Squeeze", "Unsqueeze", "Identity")
"""Operations whose other inputs are sizes."""


def named_weights(graph: Graph, origin: str) -> Weights:
    """Return the tensors of a graph under the names of the exported model.

    Raises CheckpointError: a matrix has no name, and the node that reads it does not tell its module.
    """
    found = {name: tensor for name, tensor in _aliased(graph).items() if NAMED.fullmatch(name)}
    read: set[str] = set()
    for name, tensor, initializer in _read_by_modules(graph):
        found.setdefault(name, tensor)
        read.add(initializer)
    matrices = [(node, node.inputs[1]) for node in graph.nodes if node.op in READERS and node.inputs[1:]]
    nameless = {
        name: node
        for node, name in matrices
        if name in graph.initializers and name not in read and not NAMED.fullmatch(name)
    }
    if (nameless or not found) and OWN in graph.metadata:
        raise _unreadable(
            origin, f"of a model, of which the exporter changed {len(nameless) or 'all'} of the matrices"
        )
    if nameless or not found:
        raise _nameless(origin, nameless)
    return _of_the_tower(_with_tokens(found, graph), origin)


def _nameless(origin: str, nameless: dict[str, Node]) -> CheckpointError:
    such = next((f", such as {name!r} of node {node.name!r}" for name, node in nameless.items()), "")
    return CheckpointError(
        f"{origin} is an ONNX file, and {len(nameless) or 'all'} of its matrices have no names{such}: export it by "
        "torch.onnx.export, which names layers, or give the weights that it was exported from"
    )


def _aliased(graph: Graph) -> dict[str, Tensor]:
    """Return the initializers, and those that an Identity gives a second name."""
    tensors = dict(graph.initializers)
    for node in graph.nodes:
        if node.op == "Identity" and node.inputs and node.inputs[0] in graph.initializers:
            tensors.update(dict.fromkeys(node.outputs, graph.initializers[node.inputs[0]]))
    return tensors


def _read_by_modules(graph: Graph) -> Iterator[tuple[str, Tensor, str]]:
    """Yield the name of a parameter, the parameter, and its initializer for each that its node tells."""
    made_by = {output: node for node in graph.nodes for output in node.outputs}
    for node in graph.nodes:
        if not node.module:
            continue
        for position, name in enumerate(node.inputs):
            tensor = graph.initializers.get(name)
            part = None if tensor is None else _part(node, position, tensor, made_by)
            if tensor is None or part is None:
                continue
            turned = part == "weight" and (node.op == "MatMul" or (node.op == "Gemm" and not node.transposed))
            yield f"{node.module}.{part}", tensor.t().contiguous() if turned else tensor, name


def _part(node: Node, position: int, tensor: Tensor, made_by: dict[str, Node]) -> str | None:
    """Return what a module calls the tensor that its node reads at a position; None if that cannot be told."""
    if node.op in ("Gemm", "Conv", "LayerNormalization"):
        return (None, "weight", "bias")[position] if position < 3 else None
    if node.op == "MatMul":
        return "weight" if position == 1 and tensor.ndim == 2 else None
    if node.op == "Mul" and tensor.ndim == 1:
        return SCALES.get(node.module.rpartition(".")[2].rstrip("0123456789"))
    others = (made_by.get(name) for name in node.inputs)
    linear = any(other and other.op == "MatMul" and other.module == node.module for other in others)
    return "bias" if node.op == "Add" and tensor.ndim == 1 and linear else None


def _with_tokens(found: dict[str, Tensor], graph: Graph) -> dict[str, Tensor]:
    """Return the tensors with class token and positions, where the exporter folded these into nameless ones.

    They are what is put beside the patches first, and what is added to the patches first.
    """
    patches = next((match for match in map(PATCHES.fullmatch, found) if match), None)
    if patches is None:
        return found
    width = len(found[patches[0]])
    stem, prefix = patches["stem"], patches["prefix"]
    names = ("cls_token", "pos_embed") if stem is None else (f"{stem}cls_token", f"{stem}position_embeddings")
    made_by = {output: node for node in graph.nodes for output in node.outputs}
    for name, op in zip(names, ("Concat", "Add"), strict=True):
        pieces = [_rows(graph.initializers[each], width) for each in _beside_patches(graph, made_by, op)]
        if prefix + name in found or not pieces or any(piece is None for piece in pieces):
            continue
        tensor = torch.cat([piece for piece in pieces if piece is not None], 1)
        if op == "Add" or tensor.shape[1] == 1:
            found[prefix + name] = tensor
    return found


def _beside_patches(graph: Graph, made_by: dict[str, Node], op: str) -> list[str]:
    """Return the initializers that the first node `op` of the patches takes beside them."""
    patches = {output for node in graph.nodes if node.op == "Conv" for output in node.outputs[:1]}
    for node in graph.nodes:
        if node.op in (op, "Concat", "Add", *FIRST_ONLY) and (inside := patches & set(_data(node))):
            if node.op == op:
                return [
                    found
                    for name in _data(node)
                    if name not in inside
                    for found in _held(name, graph, made_by)
                ]
            patches.update(node.outputs)
    return []


def _data(node: Node) -> tuple[str, ...]:
    return node.inputs[:1] if node.op in FIRST_ONLY else node.inputs


def _held(name: str, graph: Graph, made_by: dict[str, Node]) -> list[str]:
    """Return the initializers, in order, that a value is made of."""
    held, waiting, seen = [], [name], set()
    while waiting:
        value = waiting.pop()
        node = made_by.get(value)
        if value in graph.initializers:
            held.append(value)
        elif node is not None and node.op in ("Concat", *FIRST_ONLY) and value not in seen:
            waiting += reversed(_data(node))
        seen.add(value)
    return held


def _rows(tensor: Tensor, width: int) -> Tensor | None:
    """Return tokens as (1, tokens, width), from that, from a grid of them, or from equal ones for a batch."""
    if tensor.ndim == 4 and tensor.shape[:2] == (1, width):
        return tensor.flatten(2).transpose(1, 2)
    if tensor.ndim not in (3, 4) or tensor.shape[-1] != width or not len(tensor):
        return None
    return tensor[:1].reshape(1, -1, width) if bool((tensor == tensor[:1]).all()) else None


def _of_the_tower(tensors: dict[str, Tensor], origin: str) -> Weights:
    """Return the part of the graph that has the patch embedding, without what stands before all of its names."""
    prefix = next((match["prefix"] for match in map(PATCHES.fullmatch, tensors) if match), "")
    inside = {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}
    rest = {name: f"outside of {prefix}*" for name in tensors if not name.startswith(prefix)}
    words = f"an ONNX graph ({prefix}*)" if prefix else "an ONNX graph"
    return replace(Weights(inside, origin, words), left_out=rest)


def with_own_marks(weights: Weights, metadata: Mapping[str, str]) -> Weights:
    """Return the weights of our own export with the marks of the converted layers that its description has.

    A graph has no marks, because it does not read them; without them the weights would pass for softmax attention. It
    has no weights either that its output does not depend on as they are: the exporter leaves out a bias of zeros, and
    the queries of an operator that reads none.

    Raises CheckpointError: the student copies its teacher's attention, the graph lacks weights, or the model was
    converted and the file does not say how it is built.
    """
    if weights.architecture == COPIED or "copies" in metadata:
        raise _unreadable(
            weights.origin, "of a student that runs with its teacher's attention, whose parts it mixes"
        )
    if weights.architecture is None and "plan" in metadata:
        raise _unreadable(weights.origin, "of a converted model, which it does not describe")
    if weights.architecture is None or OWN not in metadata:
        return weights
    model = build(weights.architecture, weights.model_args, on_meta=True, within=weights.tensors)
    marks = {
        f"{path}.{MARK}": as_mark(layer.resolved)
        for path, layer in model.named_modules()
        if isinstance(layer, ConvertedAttention) and layer.is_marked
    }
    found = {**weights.tensors, **marks}
    lost = [
        name
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point() and name not in found
    ]
    if lost:
        raise _unreadable(
            weights.origin,
            f"of a model without {some(lost)}, which the exporter left out, as zeros, or changed",
        )
    return replace(weights, tensors=found)


def _unreadable(origin: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{origin} is the ONNX graph {what}: it runs, but its weights cannot be read back; give the run, folder or "
        "file that it was exported from"
    )
