"""Names of a graph's nodes that say which module of the network they belong to, for profiles and graph viewers."""

from __future__ import annotations

from ast import literal_eval

import onnx_ir as ir

from runtime.profiling.parts import MOVES, REST

_SCOPES = "pkg.torch.onnx.name_scopes"
_EXPORTER = ("pkg.torch.onnx.", "namespace")
_MOVES = ("Gather", "GatherElements", "GatherND", "NonZero", "ScatterElements", "ScatterND", "TopK")


def name_by_module(model: ir.Model) -> None:
    """Name every node ``MODULE/OPERATION``, such as ``blocks.0.attn.qkv/MatMul_29``; backends keep most of the name.

    Nodes of the network itself, outside its modules, are ``token_moves/...`` where tokens are chosen, gathered or
    scattered, and ``step/...`` otherwise. What the exporter notes beside each node is removed: it holds the paths of
    source files on the machine that exported, and nobody reads it after this.
    """
    for number, node in enumerate(model.graph):
        operation = (node.name or f"{node.op_type}_{number}").removeprefix("node_")
        node.name = f"{_module(node) or (MOVES if node.op_type in _MOVES else REST)}/{operation}"
        for key in [key for key in node.metadata_props if key.startswith(_EXPORTER)]:
            del node.metadata_props[key]


def _module(node: ir.Node) -> str:
    """Path of the innermost module below the host, such as ``blocks.0.attn``; empty for the host's own operations."""
    scopes = literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    modules = [scope for scope in scopes[:-1] if scope.startswith("model.")]
    return modules[-1].removeprefix("model.") if modules else ""
